"""BatchLossFilter against brute force, with everything else that a fit may have in it, and for every kind of task."""
import math
import warnings
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (patches to_fp16)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.text.models.awdlstm import RNNDropout
from fastai.torch_core import set_seed
from helpers import examples, fit, learner, on_cuda, quiet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rholoss_fastai.batch_loss_filter as module
from rholoss_fastai.all import BatchLossFilter, LossShare

quick = examples(200)


# The pick

def smallest(losses, share):
    """Fewest of the descending `losses` that sum to `share` of them all, in fractions; with share 1 all up to the last
    that isn't 0. Where one is negative, all count from the lowest."""
    above = [loss - min(0, losses[-1]) for loss in losses]
    k = next(k for k, reached in enumerate(accumulate(above), 1) if reached >= share*sum(above))
    return k if share < 1 else max(k, *[i for i, loss in enumerate(losses, 1) if loss != 0], 1, 1)

def check_selection(idxs, n):
    assert idxs.dtype == torch.long and 1 <= len(idxs) <= n
    assert idxs.tolist() == sorted(set(idxs.tolist())) and idxs[0] >= 0 and idxs[-1] < n

percent = st.integers(0, 100)
# in 1/1024: float32 holds them
exact_losses = lambda low: st.lists(st.integers(low, 2**16) | st.integers(0, 3) | st.just(0), min_size=1, max_size=50)

@quick
@given(exact_losses(0) | exact_losses(-2**16), percent, percent, st.integers(1, 16), percent)
def test_pick_equals_brute_force(numerators, share, samples, multiple_of, easiest):
    if share == samples == 0: share = 90
    n, losses = len(numerators), torch.tensor(numerators)/1024
    idxs = LossShare(share/100, samples/100, multiple_of, easiest/100)(losses).idxs
    check_selection(idxs, n)
    ordered = sorted((Fraction(o, 1024) for o in numerators), reverse=True)
    n_hard = smallest(ordered, Fraction(share, 100)) if share else 0
    n_hard = max(1, n_hard, math.ceil(Fraction(n*samples, 100)))
    n_easy = min(n - n_hard, math.ceil(Fraction(n*easiest, 100)))
    size = min(n, math.ceil(Fraction(n_hard + n_easy, multiple_of))*multiple_of)
    assert sorted(losses[idxs].tolist(), reverse=True) == [float(o) for o in ordered[:size-n_easy] + ordered[n-n_easy:]]

@quick
@given(st.lists(st.floats(0, 2.**100, width=32), min_size=1, max_size=80), st.integers(1, 99))
def test_pick_is_the_smallest_for_any_float(losses, share):
    "The share is reached, and by one item fewer it isn't, but for the rounding of a float64 sum"
    losses = torch.tensor(losses)
    idxs = LossShare(share/100)(losses).idxs
    check_selection(idxs, len(losses))
    ordered = sorted(map(Fraction, losses.tolist()), reverse=True)
    wanted, kept = Fraction(share, 100)*sum(ordered), sorted(map(Fraction, losses[idxs].tolist()), reverse=True)
    assert kept == ordered[:len(kept)]
    assert sum(kept) >= wanted*(1 - Fraction(1, 10**11))
    if len(kept) > 1: assert sum(kept[:-1]) < wanted

@quick
@given(st.lists(st.floats(0, 2.**100, width=32) | st.just(0.), min_size=1, max_size=80))
def test_share_1_keeps_exactly_the_items_with_a_loss(losses):
    losses = torch.tensor(losses)
    idxs = LossShare(1.)(losses).idxs
    if losses.any(): assert torch.equal(idxs, losses.nonzero().flatten())
    else: assert len(idxs) == 1

@quick
@given(st.lists(st.floats(width=32) | st.sampled_from([math.inf, -math.inf, math.nan, 0., 1.]), min_size=1,
                max_size=40), percent, percent,
       st.sampled_from([1, 8]), percent)
def test_pick_of_anything(losses, share, samples, multiple_of, easiest):
    if share == samples == 0: samples = 10
    losses = torch.tensor(losses)
    idxs = LossShare(share/100, samples/100, multiple_of, easiest/100)(losses).idxs
    check_selection(idxs, len(losses))
    kept, numbers = losses[idxs], ~losses.isnan()
    assert kept.isposinf().sum() == losses.isposinf().sum()
    if kept.isnan().any(): assert (~kept.isnan()).sum() == numbers.sum()  # NaN only once every number is taken

@pytest.mark.parametrize('losses,n', [([0.]*10, 1), ([1.]*10, 9), ([-1.]*10, 1), ([math.nan]*10, 1),
                                      ([math.inf]*10, 10),
                                      ([math.inf]+[1.]*8, 9), ([math.inf]+[1.]*20, 19),
                                      ([5., -1., -1., -1.], 1), ([3.], 1)])
def test_degenerate_losses(losses, n): assert len(LossShare(0.9)(torch.tensor(losses)).idxs) == n

def test_half_precision_losses():
    losses = torch.tensor([0.5, 2., 0.25, 8.])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert LossShare(0.9)(losses.to(dtype)).idxs.tolist() == [1, 3]


# Learners

N, BS = 64, 16

class Rows:
    """Items made from the row's number; the fifth column is the number itself, so that every batch tells which rows it
    holds"""
    def __init__(self, n=N, image=False, dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, 5, generator=generator, dtype=dtype)
        self.y = (self.x[:, 0] + 0.7*torch.randn(n, generator=generator) > 0).long()
        self.x[:, 4] = torch.arange(n)/1024
        if image: self.x = self.x[:, None, None].expand(n, 1, 5, 5).contiguous()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]
    def new_empty(self): return type(self)(0)

def rows_of(x): return (x.reshape(len(x), -1)[:, 4]*1024).round().long()

def plain_model(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 2))
def usual_model():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2),
                         nn.Linear(16, 2))

def lazy_learner(path=None, model=plain_model, data=None, loss_func=None, bs=BS, seed=0, num_workers=0,
                 drop_last=True, **kwargs):
    "One that says nothing, whose lazy layer a batch has made"
    set_seed(seed)
    data, model = Rows() if data is None else data, model()
    dls = DataLoaders(DataLoader(data, bs=bs, shuffle=True, drop_last=drop_last, num_workers=num_workers),
                      DataLoader(data, bs=N))
    with torch.no_grad(): model.eval()(*dls.train.one_batch()[:-1])
    return quiet(learner(dls, model, loss_func, seed,
                         **{**dict(opt_func=Adam, lr=1e-3, metrics=accuracy, path=path), **kwargs}))

def weights(learn): return torch.cat([o.detach().flatten().double() for o in learn.model.state_dict().values()])

class Batches(Callback):
    "Rows of each training step, as the loss meets them"
    order = 1
    def before_fit(self): self.rows = []
    def after_loss(self):
        if self.training: self.rows.append(rows_of(self.x))

class Oracle(Callback):
    "Rows that the algorithm takes, worked out item by item from its own forward in eval mode"
    order = -6
    def __init__(self, share): self.share = share
    def before_fit(self): self.rows = []
    def before_batch(self):
        if not self.training: return
        self.model.eval()
        with torch.no_grad(): losses = F.cross_entropy(self.model(self.x), self.y, reduction='none').double()
        self.model.train()
        order = sorted(range(len(losses)), key=lambda i: -losses[i])
        k = next(k for k in range(1, len(losses)+1) if losses[order[:k]].sum() >= self.share*losses.sum())
        self.rows.append(rows_of(self.x)[sorted(order[:k])])

@pytest.mark.parametrize('model', [plain_model, usual_model])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_choice_equals_an_independent_one(model, num_workers):
    oracle, batches = Oracle(0.7), Batches()
    learn = fit(lazy_learner(model=model, num_workers=num_workers).batch_loss_filter(0.7, warmup_epochs=0), 2, 1e-2,
                cbs=[oracle, batches])
    assert len(batches.rows) == 2*N//BS and len({len(o) for o in batches.rows}) > 1
    for got, expected in zip(batches.rows, oracle.rows): assert torch.equal(got, expected)
    assert torch.equal(learn.selection.selected.long(), torch.bincount(torch.cat(oracle.rows), minlength=N))


# Both ways of scoring

@pytest.mark.parametrize('forward', ['twice', 'reuse'])
def test_gradient_is_of_the_selected_items_alone(forward):
    class First(Callback):
        order = 44
        def before_fit(self): self.gradient = None
        def after_backward(self):
            if self.gradient is None:
                self.gradient, self.batch = [p.grad.clone() for p in self.model.parameters()], (self.x, self.y)
    learn, first = lazy_learner().batch_loss_filter(0.6, warmup_epochs=0, forward=forward), First()
    start = {k: v.clone() for k, v in learn.model.state_dict().items()}
    fit(learn, 1, cbs=first)
    assert len(first.batch[0]) < BS
    net = lazy_learner().model
    net.load_state_dict(start)
    F.cross_entropy(net(first.batch[0]), first.batch[1]).backward()
    for got, parameter in zip(first.gradient, net.parameters()):
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-6)

def test_reuse_and_twice_are_the_same_training():
    runs = []
    for forward in ('twice', 'reuse'):
        batches = Batches()
        learn = lazy_learner(model=lambda: plain_model().double(), data=Rows(dtype=torch.float64))
        fit(learn.batch_loss_filter(0.7, warmup_epochs=0, forward=forward), 3, 1e-2, cbs=[batches, GradientClip(0.5)])
        assert learn.selection.ledger.forward.tolist() == [forward]*3
        runs.append((weights(learn), batches.rows, learn.selection))
    (a, rows_a, record_a), (b, rows_b, record_b) = runs
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert all(torch.equal(*o) for o in zip(rows_a, rows_b))
    assert torch.equal(record_a.selected, record_b.selected)
    # no forward for scoring alone
    assert (record_a.ledger.scored.tolist(), record_b.ledger.scored.tolist()) == ([N]*3, [0]*3)
    for column in ('loaded', 'trained', 'selected'):
        assert record_a.ledger[column].tolist() == record_b.ledger[column].tolist()
    torch.testing.assert_close(torch.tensor(record_a.ledger.loss_share), torch.tensor(record_b.ledger.loss_share))

def test_auto_decides_by_what_the_epoch_before_kept():
    def run(**kwargs): return fit(lazy_learner().batch_loss_filter(**kwargs), 5, 1e-2)
    many, few = run(min_loss_perc=0.98), run(min_loss_perc=0.5)
    assert many.selection.ledger.forward.tolist() == ['none', 'twice', 'reuse', 'reuse', 'reuse']
    assert few.selection.ledger.forward.tolist() == ['none'] + ['twice']*4
    changing = run(min_loss_perc=SchedLin(1., 0.1), warmup_epochs=0)
    selected, forward = changing.selection.ledger.selected.tolist(), changing.selection.ledger.forward.tolist()
    assert forward == ['twice'] + ['reuse' if o > 2/3 else 'twice' for o in selected[:-1]]
    assert {'twice', 'reuse'} <= set(forward[1:])
    assert torch.equal(weights(changing), weights(run(min_loss_perc=SchedLin(1., 0.1), warmup_epochs=0)))

class Recurrent(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers, self.head = nn.LSTM(5, 4, 2, dropout=dropout, batch_first=True), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.layers(x.view(len(x), 1, 5))[0][:, -1])

class StochasticDepth(nn.Module):
    def forward(self, x): return x

@pytest.mark.parametrize('extra,reuses', [
    (nn.Identity, True), (lambda: nn.BatchNorm1d(5), False), (lambda: nn.Dropout(0.1), False),
    (lambda: nn.AlphaDropout(0.1), False),
    (lambda: nn.SyncBatchNorm(5), False), (StochasticDepth, False), (nn.Flatten, True)])
def test_auto_never_reuses_where_chance_or_the_batch_has_a_say(extra, reuses):
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.extra, self.net = extra(), plain_model()
        def forward(self, x): return self.net(x)
    learn = fit(lazy_learner(model=Model).batch_loss_filter(0.99, warmup_epochs=0), 2)
    assert learn.selection.ledger.forward.tolist() == ['twice', 'reuse' if reuses else 'twice']

@pytest.mark.parametrize('make,reuses', [(lambda: Recurrent(0.), True), (lambda: Recurrent(0.5), False),
                                         (lambda: nn.Sequential(RNNDropout(0.1)), False)])
def test_auto_knows_dropout_inside_other_layers(make, reuses):
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.extra, self.net = make(), plain_model()
        def forward(self, x): return self.net(x)
    assert fit(lazy_learner(model=Model).batch_loss_filter(0.99, warmup_epochs=0),
               2).selection.ledger.forward[1] == ('reuse' if reuses else 'twice')

def test_auto_does_not_reuse_a_prediction_that_cannot_be_narrowed():
    class States(nn.Module):
        "Recurrent states come (layers, bs, hidden)"
        def __init__(self): super().__init__(); self.net = plain_model()
        def forward(self, x): return self.net(x), x.new_zeros(2, len(x), 3)
    loss_func = lambda pred, targ, reduction='mean': F.cross_entropy(pred[0], targ, reduction=reduction)
    make = partial(lazy_learner, model=States, loss_func=loss_func, metrics=None)
    assert fit(make().batch_loss_filter(0.99), 3).selection.ledger.forward.tolist() == ['none', 'twice', 'twice']
    with pytest.raises(ValueError, match='first dimension'):
        fit(make().batch_loss_filter(0.5, warmup_epochs=0, forward='reuse'), 1)

@pytest.mark.parametrize('model,forward', [(usual_model, 'twice'), (usual_model, 'auto'), (usual_model, 'reuse'),
                                           (plain_model, 'auto')])
def test_all_items_is_plain_fastai(model, forward):
    def run(select):
        learn = fit(select(lazy_learner(model=model)), 3, 1e-2)
        return weights(learn), torch.get_rng_state(), learn.recorder.losses
    plain, filtered = run(lambda o: o), run(lambda o: o.batch_loss_filter(min_sample_perc=1, forward=forward))
    assert torch.equal(plain[0], filtered[0]) and torch.equal(plain[1], filtered[1]) and plain[2] == filtered[2]

def test_reuse_trains_batch_norm_on_the_candidates():
    "What the documents say: with one forward, running statistics are of the whole batch"
    def running_mean(forward, **kwargs):
        learn = lazy_learner(model=lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)))
        return fit(learn.batch_loss_filter(0.5, warmup_epochs=0, forward=forward, **kwargs), 1).model[0].running_mean
    everything = running_mean('twice', min_sample_perc=1)
    torch.testing.assert_close(running_mean('reuse'), everything)
    assert (running_mean('twice') - everything).abs().max() > 1e-3


# In a fit

def test_first_epoch_is_whole_and_the_filter_survives_the_fit():
    "As in the original, but it does not remove itself"
    learn = fit(lazy_learner().batch_loss_filter(0.6), 2)
    fit(learn, 2)
    ledger = learn.selection.ledger
    assert ledger.selected[0] == 1 and (ledger.selected[1:] < 1).all()
    assert ledger.scored.tolist() == [0, N, N, N]
    assert ledger.loss_share[0] == 1 and (ledger.loss_share[1:] >= 0.6).all()
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'selected',
                                                 'loss_perc', 'time']
    assert learn.recorder.values[-1][-2:] == [ledger.selected[3], ledger.loss_share[3]]
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    fit(learn.no_selection(), 1)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert len(learn.selection.ledger) == 4

def test_columns_are_the_shares_of_items_and_of_loss():
    class Shares(Callback):
        order = -6
        def before_fit(self): self.kept, self.total = [], []
        def before_batch(self):
            if self.training: self.total.append(self.losses())
        def after_pred(self):
            if self.training: self.kept.append(self.losses())
        def losses(self):
            with torch.no_grad(): return F.cross_entropy(self.model(self.x), self.y, reduction='none')
    learn, shares = lazy_learner().batch_loss_filter(0.8, warmup_epochs=0), Shares()
    fit(learn, 1, cbs=shares)
    kept, total = torch.cat(shares.kept), torch.cat(shares.total)
    assert learn.recorder.values[0][-2] == len(kept)/len(total)
    assert learn.recorder.values[0][-1] == pytest.approx((kept.sum()/total.sum()).item(), abs=1e-5)

COMPANIONS = dict(nothing=lambda: [], mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()],
                  accumulation=lambda: [GradientAccumulation(2*BS)],
                  clip=lambda: [GradientClip(0.1)], csv=lambda: [CSVLogger()])

@pytest.mark.parametrize('forward', ['twice', 'auto', 'reuse'])
@pytest.mark.parametrize('name', COMPANIONS)
def test_beside_other_callbacks(name, forward, tmp_path):
    learn = lazy_learner(tmp_path, data=Rows(image=True)).batch_loss_filter(0.7, forward=forward, warmup_epochs=0)
    if forward == 'reuse' and name in ('mixup', 'cutmix'):
        with pytest.raises(ValueError, match="forward='twice'"): fit(learn, 1, cbs=COMPANIONS[name]())
        return
    start = weights(learn)
    fit(learn, 1, cbs=COMPANIONS[name]())
    fit(learn, 2, method='fit_one_cycle', cbs=COMPANIONS[name]())
    assert (learn.selection.ledger.selected < 1).all() and (learn.selection.ledger.loss_share > 0.7 - 1e-5).all()
    assert torch.isfinite(weights(learn)).all() and not torch.equal(weights(learn), start)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat) and list(learn.metrics.attrgot('name')) == ['accuracy']
    if name == 'csv':
        header, *lines = (tmp_path/'history.csv').read_text().splitlines()
        assert header.split(',') == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'selected', 'loss_perc', 'time']
        assert [float(o.split(',')[4]) for o in lines] == pytest.approx(learn.selection.ledger.selected[1:].tolist())

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('forward', ['twice', 'auto'])
def test_what_is_mixed_is_what_was_selected(mix, forward):
    class Mixed(Callback):
        order = -4
        def before_fit(self): self.rows = []
        def before_batch(self):
            if self.training: self.rows.append(rows_of(self.x))
    oracle, mixed = Oracle(0.7), Mixed()
    learn = lazy_learner(data=Rows(image=True)).batch_loss_filter(0.7, warmup_epochs=0, forward=forward)
    fit(learn, 2, cbs=[oracle, mixed, mix()])
    for got, expected in zip(mixed.rows, oracle.rows): assert torch.equal(got, expected)
    assert set(learn.selection.ledger.forward) == {'twice'}

def test_schedules():
    learn = fit(lazy_learner().batch_loss_filter(SchedLin(0.3, 0.9), warmup_epochs=0), 5, 1e-4)
    selected = learn.selection.ledger.selected.tolist()
    assert all(a < b for a, b in zip(selected, selected[1:]))
    learn = fit(lazy_learner().batch_loss_filter(0.01, SchedCos(1., 0.25), warmup_epochs=0), 4)
    assert learn.selection.ledger.selected[0] > 0.9 and learn.selection.ledger.selected[3] < 0.5

def test_multiple_of_and_small_last_batch():
    batches = Batches()
    fit(lazy_learner(data=Rows(N+3), drop_last=False).batch_loss_filter(0.5, multiple_of=8, warmup_epochs=0), 2,
        cbs=batches)
    sizes = [len(o) for o in batches.rows]
    assert sizes[N//BS::N//BS+1] == [3, 3] and {o for o in sizes if o != 3} <= {8, 16}

def test_never_one_item_with_batch_norm():
    learn = fit(lazy_learner(model=usual_model).batch_loss_filter(0.01, warmup_epochs=0), 1)
    assert learn.selection.ledger.trained.tolist() == [2*N//BS]

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_diverged(value, recwarn):
    class Diverged(nn.Module):
        def __init__(self): super().__init__(); self.net = plain_model()
        def forward(self, x): return self.net(x)*value
    learn = fit(lazy_learner(model=Diverged).batch_loss_filter(warmup_epochs=0), 1)
    assert learn.selection.ledger.trained[0] >= N//BS

def test_export_and_load(tmp_path):
    learn = fit(lazy_learner(tmp_path).batch_loss_filter(SchedCos(0.9, 0.5), multiple_of=2, scale_lr='sqrt'), 2)
    learn.export('a.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'a.pkl')
    loaded.logger = lambda *_: None
    dl = DataLoader(Rows(40), bs=16)
    with learn.no_mbar(), loaded.no_mbar(): assert torch.equal(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])
    assert len(loaded.selection.ledger) == 2
    loaded.dls = learn.dls
    fit(loaded, 1)
    assert loaded.selection.ledger.selected[2] < 1  # its warm-up is over


# The rate that follows the share

class Steps(Callback):
    "What each step was given: candidates, items, the weights before it, and the rate that an onlooker sees"
    order = 55
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append((len(self.x), [o['lr'] for o in self.opt.hypers]))

@pytest.mark.parametrize('forward', ['twice', 'reuse'])
@pytest.mark.parametrize('rule,power', [('linear', 1), ('sqrt', 0.5), (None, 0)])
def test_scale_lr_is_sgd_by_hand(rule, power, forward):
    class ByHand(Callback):
        order = -4
        def before_fit(self): self.net, self.factors = lazy_learner().model, []
        def after_pred(self):
            if not self.training: return
            self.net.load_state_dict(self.model.state_dict())
            self.net.zero_grad()
            factor = (len(self.x)/BS)**power
            self.factors.append(factor)
            F.cross_entropy(self.net(self.x), self.y).backward()
            with torch.no_grad():
                for lr, p in zip([0.1, 0.1, 0.3, 0.3], self.net.parameters()): p -= factor*lr*p.grad
        def after_batch(self):
            if self.training: torch.testing.assert_close([*self.model.parameters()], [*self.net.parameters()])
    learn = lazy_learner(opt_func=partial(SGD, mom=0., wd=0.),
                         splitter=lambda m: [[*m[1].parameters()], [*m[3].parameters()]])
    by_hand, steps = ByHand(), Steps()
    fit(learn.batch_loss_filter(0.6, warmup_epochs=0, scale_lr=rule, forward=forward), 2, slice(0.1, 0.3),
        cbs=[by_hand, steps])
    if rule: assert max(by_hand.factors) < 1 and len(set(by_hand.factors)) > 1
    assert all(rates == [0.1, pytest.approx(0.3)] for _, rates in steps.seen)

def test_scale_lr_leaves_the_schedule_alone():
    runs = []
    for scale_lr in (None, 'linear'):
        learn = lazy_learner().batch_loss_filter(0.5, scale_lr=scale_lr)
        fit(learn, 3, 1e-2, method='fit_one_cycle')
        runs.append(learn)
    assert runs[0].recorder.lrs == runs[1].recorder.lrs
    assert [float(o) for o in runs[0].recorder.hps['lr']] == [float(o) for o in runs[1].recorder.hps['lr']]
    assert runs[0].selection.ledger.trained[0] == N and not torch.equal(weights(runs[0]), weights(runs[1]))

def test_scale_lr_is_off_where_nothing_is_left_out():
    plain = fit(lazy_learner(), 2, 1e-2)
    filtered = fit(lazy_learner().batch_loss_filter(0.5, warmup_epochs=2, scale_lr='linear'), 2, 1e-2)
    assert torch.equal(weights(plain), weights(filtered))

@pytest.mark.parametrize('opt_func',
                         [partial(OptimWrapper, opt=torch.optim.SGD), partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_scale_lr_of_a_pytorch_optimizer(opt_func):
    rates = []
    class AtStep(Callback):
        order = 44
        def before_step(self): rates.append((len(self.x), self.opt.opt.param_groups[0]['lr']))
    steps = Steps()
    learn = fit(lazy_learner(opt_func=opt_func).batch_loss_filter(0.6, warmup_epochs=0, scale_lr='linear'), 1, 1e-2,
                cbs=[AtStep(), steps])
    assert rates and all(lr == pytest.approx(1e-2*n/BS) for n, lr in rates)
    assert all(o == [1e-2] for _, o in steps.seen)
    assert learn.opt.opt.param_groups[0]['lr'] == 1e-2

@pytest.mark.parametrize('error', [CancelStepException, CancelFitException, KeyboardInterrupt])
def test_scale_lr_restores_the_rate_of_a_cancelled_step(error):
    class Cancel(Callback):
        order = 10
        def before_step(self):
            if self.iter % 2: raise error
    learn, steps = lazy_learner().batch_loss_filter(0.5, warmup_epochs=0, scale_lr='linear'), Steps()
    with suppress(KeyboardInterrupt): fit(learn, 1, 1e-2, cbs=[Cancel(), steps])
    assert all(rates == [1e-2] for _, rates in steps.seen)
    if error is not KeyboardInterrupt: assert learn.opt.hypers[0]['lr'] == 1e-2
    learn.remove_cbs(Cancel)
    fit(learn, 1, 3e-3, cbs=steps)
    assert len(steps.seen) == N//BS and all(rates == [3e-3] for _, rates in steps.seen)

def test_scale_lr_with_gradient_accumulation():
    "The step's share is of all the batches in it"
    class AtStep(Callback):
        order = 44
        def before_fit(self): self.sizes, self.shares = [], []
        def after_backward(self): self.sizes.append(len(self.x))
        def before_step(self):
            self.shares.append((self.opt.hypers[0]['lr']/1e-2, sum(self.sizes)/(BS*len(self.sizes)), len(self.sizes)))
            self.sizes = []
    at_step, steps = AtStep(), Steps()
    fit(lazy_learner().batch_loss_filter(0.6, warmup_epochs=0, scale_lr='linear'), 4, 1e-2,
        cbs=[GradientAccumulation(2*BS), at_step, steps])
    assert len(at_step.shares) > 2 and all(n > 1 for *_, n in at_step.shares)
    assert all(got == pytest.approx(expected) for got, expected, _ in at_step.shares)
    assert len(steps.seen) == 4*N//BS and all(rates == [1e-2] for _, rates in steps.seen)

def test_scale_lr_is_refused_in_a_distributed_run(monkeypatch):
    monkeypatch.setattr(module, 'num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='drift apart'): fit(lazy_learner().batch_loss_filter(scale_lr='linear'), 1)


# Tasks, inputs and outputs

class Output(OrderedDict):
    "A dictionary whose values are attributes, as Hugging Face's outputs are"
    def __getattr__(self, k):
        try: return self[k]
        except KeyError: raise AttributeError(k) from None

@dataclass
class Record:
    logits: torch.Tensor
    hidden: tuple

class Net(nn.Module):
    "Puts a tensor through `layers` wherever the input holds it, and shapes what comes out"
    def __init__(self, layers, take=lambda x: x, give=lambda o: o):
        super().__init__(); self.layers, self.take, self.give = layers, take, give
    def forward(self, *xb): return self.give(self.layers(self.take(*xb)))

def items(n, *columns):
    return [tuple(col[i] if isinstance(col, torch.Tensor) else {k: v[i] for k, v in col.items()} for col in columns)
            for i in range(n)]

def classes(pred, targ, reduction='mean'): return F.cross_entropy(pred.logits, targ, reduction=reduction)

def task(name):
    "Items, model, loss function, and the loss of each item worked out by hand"
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=generator)
    n, x = 64, randn(64, 5)
    y = (x[:, 0] > 0).long()
    crossed = lambda o, t: F.cross_entropy(o, t, reduction='none')
    if name == 'regression':
        return items(n, x, x[:, :1]**2), Net(nn.Linear(5, 1)), MSELossFlat(), lambda o, t: (o-t).square().flatten()
    if name == 'summed regression':
        return items(n, x, randn(n, 3)), Net(nn.Linear(5, 3)), nn.MSELoss(reduction='sum'), lambda o, t: (
            o-t).square().sum(1)
    if name == 'multi-label':
        return (items(n, x, (randn(n, 4) > 0).float()), Net(nn.Linear(5, 4)), BCEWithLogitsLossFlat(),
                lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction='none').mean(1))
    if name == 'segmentation':
        return (items(n, randn(n, 1, 6, 6), (randn(n, 6, 6) > 0).long()), Net(nn.Conv2d(1, 2, 3, padding=1)),
                CrossEntropyLossFlat(axis=1),
                lambda o, t: crossed(o, t).mean((1, 2)))
    if name == 'sequence':
        targ = torch.randint(0, 3, (n, 7), generator=generator)
        targ[:, 4:] = -100  # padding
        def by_hand(o, t): return crossed(o[:, :4].flatten(0, 1), t[:, :4].flatten()).view(-1, 4).mean(1)
        return items(n, randn(n, 7, 5), targ), Net(nn.Linear(5, 3)), CrossEntropyLossFlat(ignore_index=-100), by_hand
    if name == 'tuple':
        return items(n, x, 2*x, y), Net(nn.Linear(5, 2), take=lambda a, b: a+b), CrossEntropyLossFlat(), crossed
    if name == 'dict':
        return items(n, dict(x=x, mask=x > 0), y), Net(nn.Linear(5, 2),
                                                       take=lambda d: d['x']*d['mask']), CrossEntropyLossFlat(), crossed
    gives = {'output object': lambda o: Output(logits=o, hidden=(o*2, o*3)),
             'dataclass': lambda o: Record(o, (o*2, o*3))}
    return items(n, dict(x=x), y), Net(nn.Linear(5, 2), take=lambda d: d['x'],
                                       give=gives[name]), classes, lambda o, t: crossed(o.logits, t)

TASKS = ['regression', 'summed regression', 'multi-label', 'segmentation', 'sequence', 'tuple', 'dict', 'output object',
         'dataclass']

@pytest.mark.parametrize('forward', ['twice', 'reuse', 'auto'])
@pytest.mark.parametrize('name', TASKS)
def test_tasks(name, forward):
    data, model, loss_func, by_hand = task(name)
    class Sizes(Callback):
        order = -6
        def before_fit(self): self.expected, self.got = [], []
        def before_batch(self):
            if not self.training: return
            with torch.no_grad(): losses = by_hand(self.model(*self.xb), *self.yb).double().sort(descending=True).values
            assert losses.shape == (16,)
            self.expected.append(next(k for k in range(1, 17) if losses[:k].sum() >= 0.7*losses.sum()))
        def after_batch(self):
            if self.training: self.got.append(len(self.yb[0]))
    set_seed(0)
    dls = DataLoaders(DataLoader(data, bs=16, shuffle=True), DataLoader(data, bs=16), )
    dls.n_inp = len(data[0]) - 1
    learn, sizes = Learner(dls, model, loss_func=loss_func), Sizes()
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.batch_loss_filter(0.7, warmup_epochs=0, forward=forward)
    fit(learn, 2, 1e-2, cbs=sizes)
    assert sizes.got == sizes.expected and min(sizes.got) < 16


# Bad input

BAD = [(dict(min_loss_perc=1.1), 'min_loss_perc must lie in [0, 1]; got 1.1'), (dict(min_loss_perc=-0.1), 'got -0.1'),
       (dict(min_loss_perc=math.nan), 'got nan'),
       (dict(min_sample_perc=2), 'min_sample_perc must lie in [0, 1]; got 2'),
       (dict(min_sample_perc=math.nan), 'got nan'), (dict(min_sample_perc=-1), 'got -1'),
       (dict(keep_easiest=1.5), 'keep_easiest must lie in [0, 1]; got 1.5'),
       (dict(min_loss_perc=0, min_sample_perc=0), 'both 0'),
       (dict(min_loss_perc=SchedLin(0.5, 1.5)), 'got 1.5 at pct_train=1'),
       (dict(multiple_of=0), 'multiple_of must be a whole number of at least 1; got 0'),
       (dict(multiple_of=-8), 'got -8'),
       (dict(scale_lr='cubic'), "scale_lr must be 'linear', 'sqrt' or None"), (dict(scale_lr=True), 'got True'),
       (dict(forward='once'), "'twice', 'reuse' or 'auto'"),
       (dict(warmup_epochs=-1), 'warmup_epochs must be a whole number of at least 0'),
       (dict(enlarge=True), 'enlarge=False'), (dict(start=0.5, end=0.2), 'start must be smaller')]

@pytest.mark.parametrize('kwargs,message', BAD)
def test_bad_values(kwargs, message):
    for make in (BatchLossFilter, lazy_learner().batch_loss_filter):
        with pytest.raises(ValueError) as e: make(**kwargs)
        assert message in str(e.value)

@pytest.mark.parametrize('kwargs', [dict(min_loss_perc='90%'), dict(min_loss_perc=None), dict(min_sample_perc=True),
                                    dict(multiple_of=8.),
                                    dict(multiple_of=True), dict(keep_easiest=lambda pct: 'few'),
                                    dict(min_los_perc=0.5), dict(pick=LossShare())])
def test_bad_kinds(kwargs):
    with pytest.raises(TypeError): lazy_learner().batch_loss_filter(**kwargs)

def test_multiple_of_above_the_batch():
    learn = lazy_learner().batch_loss_filter(multiple_of=BS+1, warmup_epochs=3)
    start = weights(learn)
    with pytest.raises(ValueError, match='multiple_of=17 is larger than the batch of 16'): fit(learn, 1)
    assert torch.equal(weights(learn), start)
    fit(lazy_learner().batch_loss_filter(multiple_of=BS), 1)

def test_every_event_exists():
    from fastai.callback.core import event
    names = [o for o in dir(BatchLossFilter) if o.startswith(('before_', 'after_'))]
    assert names and all(hasattr(event, o) for o in names)


# What the host asks of the device

class HostReads(TorchDispatchMode):
    """Operations that need a number on the host: on a GPU each would wait for the device. (`tolist` of a CPU tensor
    isn't dispatched)"""
    ops = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
           torch.ops.aten.masked_select.default}
    def __init__(self): super().__init__(); self.reads = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in self.ops
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('forward', ['twice', 'reuse'])
def test_one_read_a_batch_without_a_gpu(forward, monkeypatch):
    counts, lists, tolist = [], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda o: (lists.append(o), tolist(o))[1])
    class Count(Callback):
        def __init__(self, order, event, begin): self.order, self.event, self.begin = order, event, begin
        def toggle(self):
            if not self.training or self.iter == 0: return
            if self.begin:
                lists.clear()
                self.learn.reads = HostReads()
                self.learn.reads.__enter__()
            else:
                self.learn.reads.__exit__(None, None, None)
                counts.append((self.learn.reads.reads, len(lists)))
        def before_batch(self):
            if self.event == 'before_batch': self.toggle()
        def after_pred(self):
            if self.event == 'after_pred': self.toggle()
    event = 'before_batch' if forward == 'twice' else 'after_pred'
    learn = lazy_learner(model=usual_model).batch_loss_filter(0.7, multiple_of=2, keep_easiest=0.1, warmup_epochs=0,
                                                              forward=forward)
    fit(learn, 2, cbs=[Count(-6, event, True), Count(-4, event, False)])
    assert counts == [(0, 1)]*(2*(N//BS - 1))


# On a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('forward', ['twice', 'reuse'])
def test_one_host_sync_a_batch(forward):
    counts = []
    class Count(Callback):
        "Synchronising calls in `before_batch` or `after_pred` between this callback and the selector's other side"
        def __init__(self, order, event, begin): self.order, self.event, self.begin = order, event, begin
        def toggle(self):
            if not self.training or self.iter == 0: return
            if self.begin:
                self.learn.caught = warnings.catch_warnings(record=True)
                self.learn.messages = self.learn.caught.__enter__()
                warnings.simplefilter('always')
                torch.cuda.set_sync_debug_mode('warn')
            else:
                torch.cuda.set_sync_debug_mode('default')
                self.learn.caught.__exit__(None, None, None)
                counts.append(sum('called a synchronizing' in str(o.message) for o in self.learn.messages))
        def before_batch(self):
            if self.event == 'before_batch': self.toggle()
        def after_pred(self):
            if self.event == 'after_pred': self.toggle()
    event = 'before_batch' if forward == 'twice' else 'after_pred'
    learn = on_cuda(lazy_learner()).batch_loss_filter(0.7, multiple_of=2, keep_easiest=0.1, warmup_epochs=0,
                                                      forward=forward)
    torch.set_warn_always(True) # else PyTorch says it once
    try: fit(learn, 2, cbs=[Count(-6, event, True), Count(-4, event, False)])
    finally:
        torch.set_warn_always(False)
        torch.cuda.set_sync_debug_mode('default')
    assert counts == [1]*(2*(N//BS - 1))

@pytest.mark.cuda
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
@pytest.mark.parametrize('forward', ['twice', 'reuse'])
def test_mixed_precision(half, forward):
    learn = on_cuda(lazy_learner(model=usual_model))
    learn.batch_loss_filter(0.7, scale_lr='sqrt', forward=forward, warmup_epochs=0)
    getattr(learn, half)()
    steps = Steps()
    fit(learn, 3, 1e-2, cbs=steps)
    assert all(rates == [1e-2] for _, rates in steps.seen)
    assert (learn.selection.ledger.selected < 1).all() and (learn.selection.ledger.loss_share > 0.69).all()
