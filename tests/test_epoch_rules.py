"""Epochs chosen by a rule: InfoBatch's epoch by epoch, what a loader reads, schedules, interruptions and processes."""

from multiprocessing import active_children

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ShowGraphCallback  # noqa: F401 (patches `no_bar`)
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches `fit_one_cycle` and `lr_find`)
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Transform
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from helpers import examples, fit, learner, two_processes
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numbered_rows import Rows, rows_of
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from rholoss_fastai.all import (
    IES,
    EpochInfo,
    EpochPruner,
    EpochRule,
    ForgettingTracker,
    InfoBatch,
    IrreducibleLosses,
    RandomSubset,
    SelectionRecord,
    SeTa,
    gradient_norm_bound,
    loss_groups,
    prune,
)

N, BS, STEPS = 200, 32, 7 # of an epoch


class Reads(Rows):
    "Notes the rows that are read"
    def __init__(self, n=N): super().__init__(n); self.read = []
    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def dataloaders(dataset=None, bs=BS, drop_last=False, **kwargs):
    return DataLoaders(DataLoader(dataset or Reads(), bs=bs, shuffle=True, drop_last=drop_last, **kwargs),
                       DataLoader(Rows(30), bs=30), device='cpu')


def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
def epoch_learner(dls=None, model=None, **kwargs):
    return learner(dls or dataloaders, model or net, **{**dict(opt_func=Adam, lr=1e-2), **kwargs})


def choose(learn):
    pruner = learn.epoch_pruner
    return pruner.choose(EpochInfo(torch.arange(N), 1, 8, bs=BS))


def random_scores(n=N, seed=1): return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# Epochs pruned by InfoBatch's rule

class Watch(Callback):
    """What each epoch trained on, row by row: its rows, their losses by a forward in the same mode, and the loss that
    was minimised"""
    order = 5 # after the pruner has weighted, before GradientAccumulation (6) divides
    def before_fit(self): self.rows, self.losses, self.loss, self.n_iter = [], [], [], []
    def before_train(self):
        for o in (self.rows, self.losses, self.loss, self.n_iter): o.append([])
    def after_loss(self):
        if not self.training: return
        self.rows[-1].append(rows_of(self.x))
        self.losses[-1].append(F.cross_entropy(self.pred, self.y, reduction='none').detach())
        self.loss[-1].append(self.learn.loss_grad.item())
        self.n_iter[-1].append(self.learn.n_iter)


def check_rule(watch, n_epoch, ratio, delta, n=N, bs=BS):
    "Every epoch against the rule, with what rows had lost when they were last trained on"
    remembered, pruned = torch.full((n,), torch.nan), int(delta*n_epoch + 1e-6)
    for epoch,(rows,losses,minimised) in enumerate(zip(watch.rows, watch.losses, watch.loss)):
        trained = torch.cat(rows)
        assert len(trained.unique()) == len(trained) and set(watch.n_iter[epoch]) == {len(rows)}
        below = remembered < remembered.nanmean()
        dropped = torch.ones(n, dtype=torch.bool).index_fill_(0, trained, False)
        weight = torch.ones(n)
        if 0 < epoch < pruned:
            m, k = int(below.sum()), int((below & ~dropped).sum())
            assert not (dropped & ~below).any()
            assert k in {max(1, round((1 - ratio)*m)), max(1, round((1 - ratio)*m)) + 1} and len(trained) % bs != 1
            weight[below] = m/k
        else: assert not dropped.any()
        for r,l,got in zip(rows, losses, minimised): assert abs(got - (weight[r]*l).mean().item()) < 1e-5
        remembered[trained] = torch.cat(losses)
    return remembered


@pytest.mark.parametrize('n_epoch,ratio,delta', [(1, 0.5, 0.875), (3, 0.5, 0.875), (8, 0.5, 0.875), (7, 0.9, 0.5),
                                                 (6, 0.3, 1.), (4, 0.7, 0.)])
def test_the_rule_for_any_number_of_epochs(n_epoch, ratio, delta):
    learn, watch = epoch_learner().prune_epochs(ratio, delta), Watch()
    fit(learn, n_epoch, cbs=watch)
    remembered = check_rule(watch, n_epoch, ratio, delta)
    assert torch.equal(learn.epoch_pruner.remembered, remembered)
    trained = [len(torch.cat(o)) for o in watch.rows]
    ledger = learn.selection.ledger
    assert ledger.trained.tolist() == ledger.loaded.tolist() == trained and ledger.scored.sum() == 0
    assert np.allclose(ledger.selected, np.array(trained)/N)
    assert [o < N for o in trained] == [0 < e < int(delta*n_epoch + 1e-6) for e in range(n_epoch)]
    assert learn.selection.selected.tolist() == torch.cat([r for o in watch.rows
                                                           for r in o]).bincount(minlength=N).tolist()


@pytest.mark.parametrize('workers', [0, 2])
def test_nothing_dropped_is_read(workers):
    dls = dataloaders(num_workers=workers)
    learn, watch = epoch_learner(dls).prune_epochs(0.8), Watch()
    if workers == 0:
        class Read(Callback):
            def before_train(self): dls.train.dataset.read.clear()
            def after_train(self): assert sorted(dls.train.dataset.read) == sorted(torch.cat(watch.rows[-1]).tolist())
        learn.add_cb(Read())
    fit(learn, 5, cbs=watch)
    check_rule(watch, 5, 0.8, 0.875)


@pytest.mark.slow
def test_expected_gradient_is_that_of_everything():
    """With a rate of 0 the losses stay as they are, and the sums over an epoch's batches average out to the whole data
    set's gradient"""
    class Sum(Callback):
        order = 90
        def before_fit(self): self.sums, self.n = torch.zeros(3, 36), 0
        def before_backward(self): self.bs = len(self.y)
        def after_backward(self):
            if 0 < self.epoch < 200: self.sums += self.model[1].weight.grad*self.bs
        def after_train(self): self.n += 0 < self.epoch < 200
        def before_validate(self): raise CancelValidException
    model, rows = linear(), Rows(40)
    learn, sums = epoch_learner(dataloaders(rows, bs=20), model, opt_func=SGD).prune_epochs(0.7, 1.), Sum()
    fit(learn, 200, lr=0., cbs=sums)
    assert learn.selection.ledger.selected[1:].max() < 0.8
    F.cross_entropy(model(rows.images), rows.targets, reduction='sum').backward()
    full = model[1].weight.grad
    spread = (sums.sums/sums.n - full).norm()/full.norm()
    assert spread < 0.12
    plain, sums = epoch_learner(dataloaders(rows, bs=20), model,
                                opt_func=SGD).prune_epochs(0.7, 1., weighted=False), Sum()
    fit(plain, 50, lr=0., cbs=sums)
    assert (sums.sums/sums.n - full).norm()/full.norm() > 2*spread # it is the weights that do it


def test_without_pruning_nothing_changes():
    def weights(prepare, n_epoch=3):
        learn = prepare(epoch_learner())
        fit(learn, n_epoch)
        return torch.cat([o.flatten() for o in learn.model.state_dict().values()])
    plain = weights(lambda learn: learn)
    for prepare in (lambda o: o.prune_epochs(0.), lambda o: o.prune_epochs(delta=0.),
                    lambda o: o.prune_epochs(delta=0.3),
                    lambda o: o.prune_epochs().no_pruning()):
        assert torch.equal(weights(prepare), plain)
    assert not torch.equal(weights(lambda o: o.prune_epochs()), plain)
    assert torch.equal(weights(lambda o: o.prune_epochs(seed=1), 4), weights(lambda o: o.prune_epochs(seed=1), 4))
    assert not torch.equal(weights(lambda o: o.prune_epochs(seed=1), 4), weights(lambda o: o.prune_epochs(seed=2), 4))


def test_draws_come_from_a_generator_of_its_own():
    "The same rows whatever the global state, which isn't moved by drawing"
    def drawn(disturb):
        set_seed(0)
        learn, watch = epoch_learner(model=linear()).prune_epochs(seed=3), Watch()
        class Disturb(Callback):
            order = -20
            def before_train(self): disturb()
        fit(learn, 4, lr=0., cbs=[watch, Disturb()])
        return [set(torch.cat(o).tolist()) for o in watch.rows]
    assert drawn(lambda: None) == drawn(lambda: (torch.rand(9), np.random.rand(9)))
    learn = fit(epoch_learner().prune_epochs(), 2)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    choose(learn)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()


def test_schedules_see_the_true_number_of_steps():
    seen = []
    class Steps(Callback):
        order = 90
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.pct_train, self.learn.n_iter))
    learn = fit(epoch_learner().prune_epochs(0.8), 6, method='fit_one_cycle', cbs=Steps())
    n_iter = [-(-o//BS) for o in learn.selection.ledger.trained]
    assert min(n_iter) < max(n_iter) == STEPS
    expected = [(e, (e + i/n)/6, n) for e,n in enumerate(n_iter) for i in range(n)]
    assert [o[::2] for o in seen] == [o[::2] for o in expected]
    assert np.allclose([o[1] for o in seen], [o[1] for o in expected])
    assert len(learn.recorder.lrs) == sum(n_iter) and abs(learn.pct_train - 1) < 1e-6
    assert max(learn.recorder.lrs) == pytest.approx(1e-2, rel=0.05) and learn.recorder.lrs[-1] < 1e-2/20


def test_weights_before_gradients_accumulate():
    "The gradient of a step over two batches is the sum of weighted item losses over the number of items"
    grads = []
    class Keep(Callback):
        order = 91
        def before_step(self): grads.append(self.model[1].weight.grad.clone())
    model, rows = linear(), Rows(12*BS)
    learn, watch = epoch_learner(dataloaders(rows), model, opt_func=SGD).prune_epochs(0.5, 1.), Watch()
    fit(learn, 2, lr=0., cbs=[GradientAccumulation(2*BS), watch, Keep()])
    losses = F.cross_entropy(model(rows.images), rows.targets, reduction='none')
    below = losses < losses.mean()
    weight = torch.where(below, below.sum()/below[torch.cat(watch.rows[1])].sum(), 1.)
    model.zero_grad()
    ((weight*losses)[torch.cat(watch.rows[1][:2])].sum()/(2*BS)).backward()
    assert weight.max() > 1.8 and torch.allclose(grads[6], model[1].weight.grad, atol=1e-5) # six steps an epoch


def test_remembered_scores():
    "Those of the training forward, for any score"
    il = random_scores(seed=4)
    def error(loss, pred, y, r): return (pred.softmax(1) - F.one_hot(y, 3)).norm(dim=1)
    for score,expected in (('reducible', lambda loss, pred, y, r: loss - il[r]), (gradient_norm_bound, error),
                           (lambda loss, il: loss*il, lambda loss, pred, y, r: loss*il[r])):
        seen = torch.full((N,), torch.nan)
        class Expect(Callback):
            order = 20
            def after_loss(self):
                if self.training:
                    rows, pred = rows_of(self.x), self.pred.detach()
                    seen[rows] = expected(F.cross_entropy(pred, self.y, reduction='none'), pred, self.y, rows)
        learn = fit(epoch_learner().prune_epochs(score=score, il=None if score is gradient_norm_bound else il), 4,
                    cbs=Expect())
        assert torch.allclose(learn.epoch_pruner.remembered, seen, atol=1e-6)
        assert learn.selection.ledger.selected.min() < 1


def test_reducible_leaves_noise_out_and_is_unweighted():
    rows = Reads()
    noise = torch.rand(N, generator=torch.Generator().manual_seed(5)) < 0.2
    rows.targets = torch.where(noise, (rows.targets + 1) % 3, rows.targets)
    il = torch.where(noise, 6., 0.1)
    times = {}
    for score in ('loss', 'reducible'):
        learn, watch = epoch_learner(dataloaders(rows)).prune_epochs(0.8, score=score, il=il), Watch()
        fit(learn, 8, cbs=watch)
        counts = learn.selection.selected.float()
        times[score] = (counts[noise].mean()/counts[~noise].mean()).item()
        for losses,loss in zip(watch.losses[1:6], watch.loss[1:6]):
            unweighted = np.allclose([o.mean().item() for o in losses], loss, atol=1e-5)
            assert unweighted == (score == 'reducible')
    assert times['reducible'] < 0.7 < 1.2 < times['loss']
    weighted = epoch_learner(dataloaders(rows)).prune_epochs(0.8, score='reducible', il=il, weighted=True)
    watch = Watch()
    fit(weighted, 3, cbs=watch)
    assert not np.allclose([o.mean().item() for o in watch.losses[1]], watch.loss[1], atol=1e-4)


def test_rows_that_a_refresh_trained_on_are_not_scored_besides():
    learn = fit(epoch_learner().prune_epochs('ies', 1e9, 0.1, refresh=2), 10)
    ledger = learn.selection.ledger
    assert (ledger.scored[6:] > 0).tolist() == [True, False]*2 == (ledger.trained[6:] == N).tolist()


def test_irreducible_losses_are_billed():
    learn = epoch_learner()
    il = IrreducibleLosses.of(torch.rand(N), learn.dls.train, seconds=7.)
    assert fit(learn.prune_epochs(score='reducible', il=il), 2).selection.ledger.seconds_il.tolist() == [7, 0]
    learn = fit(epoch_learner().prune_epochs(score='reducible', il='crossfit'), 2)
    assert learn.selection.ledger.seconds_il[0] > learn.selection.ledger.seconds[0] > learn.selection.seconds_il


@pytest.mark.parametrize('refresh', [2, 3])
def test_refresh(refresh):
    selected = fit(epoch_learner().prune_epochs(0.9, 1., refresh=refresh), 8).selection.ledger.selected
    assert [o == 1 for o in selected] == [e % refresh == 0 for e in range(8)]


def test_memory_over_several_fits():
    learn, watch = epoch_learner().prune_epochs(), Watch()
    fit(learn, 3)
    fit(learn, 4, cbs=watch)
    # the second fit begins with what the first remembered
    assert learn.selection.ledger.selected.lt(1).tolist() == [False, True, False] + [True]*3 + [False]
    learn.dls = dataloaders(Reads(100))
    fit(learn, 3)
    assert learn.selection.ledger.selected.lt(1).tolist()[-3:] == [False, True, False]
    assert len(learn.epoch_pruner.remembered) == 100


def test_of_another_loss_function_nothing_is_remembered():
    "Its irreducible losses are made anew, too, and billed"
    def fitted(*losses):
        learn = learner().prune_epochs(score='reducible', il='probe')
        for learn.loss_func in losses: fit(learn, 2)
        return learn
    plain, smoothed = CrossEntropyLossFlat(), CrossEntropyLossFlat(label_smoothing=0.2)
    learn = fitted(plain, smoothed)
    assert torch.equal(learn.epoch_pruner.il_values, fitted(smoothed).epoch_pruner.il_values)
    assert not torch.equal(learn.epoch_pruner.il_values, fitted(plain).epoch_pruner.il_values)
    for ledger, anew in ((learn.selection.ledger, True),
                         (fitted(plain, CrossEntropyLossFlat()).selection.ledger, False)):
        assert ledger.seconds_il.gt(0).tolist() == [True, False, anew, False]
        assert ledger.selected.lt(1).tolist() == [False, False, not anew, False]


def test_of_a_pruned_data_set():
    "Both ways together"
    dls = prune(dataloaders(), random_scores(), 0.5, 'random')
    rows = set(dls.train.dataset.row_numbers.tolist())
    learn, watch = epoch_learner(dls).prune_epochs(), Watch()
    fit(learn, 4, cbs=watch)
    trained = [set(torch.cat(o).tolist()) for o in watch.rows]
    assert trained[0] == trained[3] == rows and trained[1] < rows
    assert learn.selection.ledger.selected[1] == len(trained[1])/100


@pytest.mark.parametrize('n', range(34, 46))
def test_a_last_batch_is_never_a_single_item(n):
    "Which batch norm in training mode refuses"
    learn = fit(epoch_learner(dataloaders(Reads(n), bs=16)).prune_epochs(0.5, 1., seed=n), 4)
    assert all(o % 16 != 1 for o in learn.selection.ledger.trained)


def test_rows_without_a_number_stay():
    "A loss that isn't finite, or isn't known, says nothing"
    learn = fit(epoch_learner().prune_epochs(0.9, 1.), 2)
    for value in (torch.nan, torch.inf, -torch.inf):
        learn.epoch_pruner.remembered[[3, 50]] = value
        for _ in range(20):
            rows, weights = choose(learn)
            assert {3, 50} <= set(rows.tolist()) and weights[(rows == 3) | (rows == 50)].tolist() == [1, 1]
            assert len(rows) < 0.7*N and weights.isfinite().all()


def test_other_callbacks_and_calls(tmp_path):
    learn = epoch_learner(path=tmp_path, metrics=lambda pred, targ: pred.sum()).prune_epochs()
    tracker = ForgettingTracker()
    fit(learn, 4, cbs=tracker)
    assert len(tracker.scores()) == N and tracker.n_epochs == 4
    before = len(learn.selection.ledger), learn.epoch_pruner.remembered.clone()
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds()
        learn.lr_find(num_it=20, show_plot=False)
    assert len(learn.selection.ledger) == before[0] and torch.equal(before[1], learn.epoch_pruner.remembered)
    assert len(learn.metrics) == 1
    class Stop(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Stop())
    for cb in [cb for cb in learn.cbs if isinstance(cb, Stop)]: learn.remove_cb(cb)
    fit(learn, 2)
    assert learn.recorder.metric_names.count('selected') == 1 and len(learn.metrics) == 1
    assert learn.selection.ledger.selected.iloc[-1] == 1
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    assert loaded.epoch_pruner.remembered is None
    loaded.dls = learn.dls
    fit(loaded, 3)
    assert loaded.selection.ledger.selected.lt(1).tolist()[-3:] == [False, True, False]
    learn.prune_epochs(0.2)
    assert len([cb for cb in learn.cbs if isinstance(cb, EpochPruner)]) == 1
    assert learn.epoch_pruner.rule.ratio == 0.2 and learn.selection is learn.epoch_pruner.record
    learn.no_pruning()
    fit(learn, 1)
    assert not any(isinstance(cb, EpochPruner) for cb in learn.cbs) and 'selected' not in learn.recorder.metric_names


def test_selection_and_mixup_are_refused():
    for first,second in ((lambda o: o.prune_epochs(), lambda o: o.batch_loss_filter()),
                         (lambda o: o.batch_loss_filter(), lambda o: o.prune_epochs())):
        with pytest.raises(ValueError, match='one of them|no_pruning|no_selection'):
            fit(second(first(epoch_learner())), 1)
    class Own(EpochPruner): pass
    learn = epoch_learner()
    learn.add_cb(Own())
    with pytest.raises(ValueError, match='one of them'): learn.batch_loss_filter()
    with pytest.raises(ValueError, match='makes one item of two'): fit(epoch_learner().prune_epochs(), 1, cbs=MixUp())
    with pytest.raises(ValueError, match='makes one item of two'): epoch_learner(cbs=MixUp()).prune_epochs()
    # what is named instead works, also of rho_epochs, whose rule is its own
    with pytest.raises(ValueError, match=r"learn.prune_epochs\(rule='random'\), .* learn.no_pruning\(\), learn.rho_"):
        fit(epoch_learner().rho_epochs(), 1, cbs=MixUp())
    fit(epoch_learner().rho_epochs().prune_epochs(rule='random'), 1, cbs=MixUp())
    fit(epoch_learner().rho_epochs().no_pruning().rho_loss(torch.rand(N)), 1, cbs=MixUp())


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(ratio=1), ValueError, r'ratio must lie in \[0, 1\); got 1'), (dict(ratio=1.2), ValueError, 'ratio'),
    (dict(ratio='half'), TypeError, 'ratio'),
    (dict(delta=-0.1), ValueError, 'delta must lie in'), (dict(delta=1.1), ValueError, 'delta must lie in'),
    (dict(score='el2n'), ValueError, "score is 'el2n'"), (dict(score='bald'), ValueError, 'passes'),
    (dict(score='reducible'), ValueError, 'needs irreducible losses'), (dict(refresh=1), ValueError, 'refresh'),
    (dict(refresh=2.5), TypeError, 'refresh'),
    (dict(score='reducible', il=torch.rand(7)), ValueError, '7 values for a data set of 200'),
    (dict(seed=-1), ValueError, 'seed'),
    (dict(score='reducible', il=torch.full((N,), torch.nan)), ValueError, 'NaN'),
    (dict(score=lambda margin: 0), ValueError, 'parameters'),
])
def test_bad_settings_of_prune_epochs(kwargs, error, message):
    with pytest.raises(error, match=message): epoch_learner().prune_epochs(**kwargs)


def test_bad_loaders():
    stream = DataLoaders(DataLoader(iter(range(9)), bs=3), DataLoader(Rows(9)))
    with pytest.raises(ValueError, match="can't be known"):
        fit(Learner(stream, net(), loss_func=CrossEntropyLossFlat()).prune_epochs(), 1)
    with pytest.raises(ValueError, match="can't be known"): prune(stream, random_scores(9))
    with pytest.raises(ValueError, match='An epoch has no batches'):
        fit(epoch_learner(dataloaders(Reads(50), bs=64, drop_last=True)).prune_epochs(0.9), 3)
    with pytest.raises(ValueError, match='batch_loss_filter') as e:
        fit(Learner(stream, net(), loss_func=CrossEntropyLossFlat()).prune_epochs(), 1)
    assert 'il=' not in str(e.value) # which would not mend it
    class Drops(Callback):
        order = -6
        def before_batch(self):
            if self.training: self.learn.xb, self.learn.yb = (self.x[1:],), (self.y[1:],)
    with pytest.raises(ValueError, match='31 items, but 32 rows'): fit(epoch_learner().prune_epochs(), 1, cbs=Drops())


def test_other_tasks():
    "Regression with a loss that gives one number, in a PyTorch loader"
    rows = Rows(N)
    data = TensorDataset(rows.images, rows.images.mean((1, 2, 3)) + torch.arange(N)/50)
    dls = DataLoaders(TorchDataLoader(data, BS, shuffle=True), TorchDataLoader(data, 50))
    for loss_func in (MSELossFlat(), lambda pred, targ: ((pred.squeeze(-1) - targ)**2).mean()):
        learn = fit(epoch_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 1)),
                                  loss_func=loss_func).prune_epochs(), 4)
        assert learn.selection.ledger.selected[1:3].max() < 1
        assert learn.recorder.values[-1][0] < learn.recorder.values[0][0]


# Several processes

script = '''
import sys, os
from test_epoch_rules import *
from distributed_rho_loss import broadcast
from fastai.distributed import DistributedDL
import torch.distributed as dist
DistributedDL._broadcast = broadcast
learn = epoch_learner(dataloaders(Rows(N)), linear()).prune_epochs()
if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
tracker, watch = ForgettingTracker(), Watch()
with learn.distrib_ctx(sync_bn=False), learn.no_logging(): learn.fit(4, cbs=[tracker, watch])
torch.save(dict(rows=[torch.cat(o) for o in watch.rows], losses=[torch.cat(o) for o in watch.losses],
                remembered=learn.epoch_pruner.remembered, ledger=learn.selection.ledger.to_dict('list'),
                forgotten=tracker.forgotten, learnt=tracker.learnt), {out!r} + str(dist.get_rank()))
'''


@pytest.mark.slow
def test_two_processes(tmp_path):
    pytest.importorskip('accelerate', reason='distributed training needs accelerate')
    two_processes(script.format(out=str(tmp_path/'rank')), out=tmp_path/'log')
    ranks = [torch.load(tmp_path/f'rank{rank}', weights_only=False) for rank in (0, 1)]
    for key in ('remembered', 'forgotten', 'learnt'): assert torch.equal(ranks[0][key], ranks[1][key])
    remembered = torch.full((N,), torch.nan)
    for epoch in range(4):
        rows, losses = (torch.cat([o[key][epoch] for o in ranks]) for key in ('rows', 'losses'))
        below = remembered < remembered.nanmean() + 1e-6
        dropped = torch.ones(N, dtype=torch.bool).index_fill_(0, rows, False)
        assert not (dropped & ~below).any() and bool(dropped.any()) == (0 < epoch < 3)
        # one row twice where their number is odd: the mean of both losses counts
        assert len(rows) - len(rows.unique()) <= 1
        sums = torch.zeros(2, N).index_add_(1, rows, torch.stack([losses, torch.ones_like(losses)]))
        remembered = remembered.where(sums[1] == 0, sums[0]/sums[1])
        assert ranks[0]['ledger']['trained'][epoch] == len(rows)
    assert torch.allclose(ranks[0]['remembered'], remembered, atol=1e-6)


@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(reduction='sum'),
                                       CrossEntropyLossFlat(weight=torch.tensor([1., 5., 0.2]))],
                         ids=['sum', 'class weights'])
def test_weights_keep_the_losses_own_reduction(loss_func):
    "Weights of 1 leave the loss as it is, others make what it would have computed of the items"
    class Compare(Callback):
        order = 5
        def before_fit(self): self.n = 0
        def after_loss(self):
            if not self.training: return
            weights = self.epoch_pruner._fit.weights
            weights = torch.ones(len(self.y)) if weights is None else weights[rows_of(self.x)]
            each = F.cross_entropy(self.pred, self.y, reduction='none', weight=getattr(loss_func.func, 'weight', None))
            per = 1 if loss_func.func.reduction == 'sum' else loss_func.func.weight[self.y].sum()
            assert torch.allclose(self.learn.loss_grad, (weights*each).sum()/per, rtol=1e-5)
            self.n += bool((weights != 1).any())
    compare = Compare()
    fit(epoch_learner(loss_func=loss_func).prune_epochs(0.5, 1.), 3, cbs=compare)
    assert compare.n > 5


def test_an_interrupted_lr_find_does_not_switch_it_off():
    class Interrupt(Callback):
        def after_loss(self):
            if self.iter == 2: raise KeyboardInterrupt
    learn = epoch_learner().prune_epochs(delta=1.)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt):
        learn.lr_find(num_it=5, show_plot=False)
    fit(learn, 3)
    assert learn.selection.ledger.trained.iloc[-1] < N
    tracked = epoch_learner(cbs=ForgettingTracker())
    with tracked.no_bar(), tracked.no_logging(), tracked.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt):
        tracked.lr_find(num_it=5, show_plot=False)
    assert fit(tracked, 2).forgetting_tracker.n_epochs == 2


@pytest.mark.cuda
def test_on_cuda_without_waiting():
    learn = fit(epoch_learner(dataloaders(Rows(N)).to('cuda'), net().cuda()).prune_epochs(), 4)
    assert learn.epoch_pruner.remembered.is_cuda and learn.selection.ledger.selected.min() < 1
    half = epoch_learner(dataloaders(Rows(N)).to('cuda'), net().cuda()).to_fp16().prune_epochs()
    fit(half, 4)
    assert half.epoch_pruner.remembered.isfinite().all()
    class Strict(Callback):
        order = -4
        def before_batch(self):
            # the first batch is looked at, which waits
            if self.training and self.train_iter: torch.cuda.set_sync_debug_mode('error')
        def after_loss(self): torch.cuda.set_sync_debug_mode('default')
    try: fit(learn, 2, cbs=Strict())
    finally: torch.cuda.set_sync_debug_mode('default')


# The rules, against naive implementations written from their papers

# ties, unknown and infinite losses
numbers = st.one_of(st.floats(0, 9, width=32), st.sampled_from([0., 1., 2.5, float('nan'), float('inf')]))


def generator(seed=0): return torch.Generator().manual_seed(seed)


@examples(80)
@given(st.lists(numbers, min_size=2, max_size=60), st.floats(0, 0.95), st.integers(2, 9), st.integers(0, 9))
def test_infobatch_against_lists(losses, ratio, bs, seed):
    rows = torch.arange(len(losses))*3 + 1
    chosen = InfoBatch(ratio, 1.)(torch.tensor(losses)[:, None], EpochInfo(rows, 0, 1, bs=bs), generator(seed))
    known = [o for o in losses if np.isfinite(o)]
    mean = torch.tensor(known).mean().item() if known else np.nan
    below = {int(r) for r,o in zip(rows, losses) if np.isfinite(o) and o < mean}
    above = set(rows.tolist()) - below
    if chosen is None:
        assert max(1, round((1 - ratio)*len(below))) >= len(below) - 1
        return
    kept,weights = chosen
    stay = [r for r in kept.tolist() if r in below]
    assert set(kept.tolist()) == above | set(stay) and len(kept) == len(set(kept.tolist())) and len(kept) % bs != 1
    assert len(stay) - max(1, round((1 - ratio)*len(below))) in (0, 1)
    for r,w in zip(kept.tolist(), weights.tolist()): assert abs(w - (len(below)/len(stay) if r in below else 1)) < 1e-5


def has_a_tie(values, centres):
    "Does a value ever lie halfway between two centres as these move? Which of them it goes to is a matter of taste"
    for _ in range(100):
        distances = np.abs(values[:, None] - centres)
        nearest = np.sort(distances, 1)[:, :2]
        if nearest.shape[1] == 2 and np.isclose(*nearest.T, atol=1e-12).any(): return True
        of = distances.argmin(1)
        centres = np.array([values[of == g].mean() if (of == g).any() else o for g, o in enumerate(centres)])

@examples(80)
@given(st.lists(st.floats(0, 9, width=16), min_size=1, max_size=80), st.integers(1, 8))
@example([0.]*5 + [1., 1., 2., 2.5], 3)
def test_groups_of_losses_against_scikit_learn(losses, n_groups):
    values = np.array(losses, dtype=np.float64)
    begin = np.unique(np.sort(values)[np.round(np.linspace(0, len(values)-1,
                                                           2*n_groups+1)[1::2].astype(np.float32)).astype(int)])
    assume(not has_a_tie(values, begin))
    found = KMeans(len(begin), init=begin[:, None], n_init=1, tol=0, max_iter=100,
                   algorithm='lloyd').fit(values[:, None])
    groups = loss_groups(torch.tensor(losses), n_groups).numpy()
    assume(len(np.unique(found.labels_)) == len(begin) == len(np.unique(groups)))
    def spread(labels):
        return sum(((values[labels == g] - values[labels == g].mean())**2).sum() for g in np.unique(labels))
    assert np.isclose(spread(groups), spread(found.labels_), rtol=1e-6, atol=1e-9)
    # from easy to hard
    assert all(values[groups == g].max() <= values[groups == g+1].min() for g in range(len(begin)-1))


def test_seta_slides_over_groups():
    "Epoch by epoch, with scikit-learn's k-means"
    rule,losses,rows = SeTa(0.2, 5, 0.5, 0.9),torch.rand(200, generator=generator(3))**2,torch.arange(200)
    losses[[5, 9]] = torch.nan
    rule.begin(None, None)
    for epoch in range(10):
        chosen = set(rule(losses[:, None], EpochInfo(rows, epoch, 10), generator(epoch)).tolist())
        kept = torch.randperm(200, generator=generator(epoch))[:160].sort().values
        if epoch == 9: assert chosen == set(kept.tolist())
        else:
            known = kept[~losses[kept].isnan()].numpy()
            values = losses[known].double().numpy()[:, None]
            begin = np.sort(values[:, 0])[np.round(np.linspace(0, len(values)-1, 11)[1::2]).astype(int)]
            labels = KMeans(5, init=begin[:, None], n_init=1, tol=0).fit(values)
            rank = labels.cluster_centers_[:, 0].argsort().argsort()[labels.labels_]
            first = epoch % 4 # 2 of 5 groups fit in at 4 places
            expected = set(known[(rank >= first) & (rank < first + 2)].tolist()) | (set(kept.tolist()) & {5, 9})
            assert chosen == expected


def test_seta_where_losses_are_alike():
    "Fewer kinds of losses than groups: the window slides over what there is, and never over nothing"
    losses = torch.tensor([0.]*30 + [1.]*20 + [5.]*10)
    rule, rows, turns = SeTa(0., 10, 0.34, 1.), torch.arange(60), []
    rule.begin(None, None)
    for epoch in range(6): turns.append(rule(losses[:, None], EpochInfo(rows, epoch, 10), generator(epoch)).tolist())
    easy, middle, hard = rows[:30].tolist(), rows[30:50].tolist(), rows[50:].tolist()
    assert turns == [easy, middle, hard]*2
    chosen = rule(torch.zeros(60, 1), EpochInfo(rows, 1, 10), generator())
    assert len(chosen) == 60 # all mastered alike


@examples(60)
@given(st.lists(numbers, min_size=1, max_size=40), st.integers(1, 9), st.floats(0.05, 1), st.integers(0, 20))
def test_seta_always_chooses_something(losses, n_groups, window, turn):
    rule, rows = SeTa(0., n_groups, window, 1.), torch.arange(len(losses))
    for epoch in range(turn + 1): chosen = rule(torch.tensor(losses)[:, None], EpochInfo(rows, epoch, 99), generator())
    chosen = set(range(len(losses))) if chosen is None else set(chosen.tolist())
    unknown = {i for i,o in enumerate(losses) if not np.isfinite(o)}
    assert unknown <= chosen and (chosen - unknown or len(unknown) == len(losses))
    values = [losses[i] for i in chosen - unknown]
    outside = [o for i,o in enumerate(losses) if np.isfinite(o) and i not in chosen]
    assert not any(min(values) < o < max(values) for o in outside) # consecutive groups, and never a part of one
    assert not set(values) & set(outside)


@examples(80)
@given(st.lists(st.lists(st.one_of(st.floats(0, 3, width=32), st.sampled_from([0., 1., float('nan'), float('inf')])),
                         min_size=5, max_size=5), min_size=1, max_size=40),
       st.floats(0, 2), st.floats(0, 1))
def test_ies_against_lists(histories, threshold, floor):
    rows,classes = torch.arange(len(histories))*2,[i % 3 for i in range(len(histories))]
    mastered = []
    for h in histories: # the newest first
        bends = [abs(h[t] - 2*h[t+1] + h[t+2]) for t in range(3)]
        mastered.append(sum(bends)/3 < threshold - 1e-5) # rounding aside
    near = [abs(sum(abs(h[t] - 2*h[t+1] + h[t+2]) for t in range(3))/3 - threshold) < 1e-4 for h in histories]
    assume(not any(near))
    chosen = IES(threshold, floor)(torch.tensor(histories), EpochInfo(rows, 6, 9, classes=torch.tensor(classes)),
                                   generator())
    chosen = set(rows.tolist()) if chosen is None else set(chosen.tolist())
    assert {int(r) for r,m in zip(rows, mastered) if not m} <= chosen
    for c in range(3):
        own = [int(r) for r,k in zip(rows, classes) if k == c]
        moving = sum(not m for m,k in zip(mastered, classes) if k == c)
        # a class that is mastered keeps a share
        assert len(chosen & set(own)) == max(moving, int(np.ceil(floor*len(own))))


def test_ies_leaves_and_comes_back():
    "Mastered rows are scored, not trained on, and return when their loss moves again"
    learn = epoch_learner(model=linear()).prune_epochs('ies', threshold=0.02, floor=0.)
    watch = Watch()
    fit(learn, 6, lr=0., cbs=watch)
    # all of them: a batch at random is left
    assert [len(torch.cat(o)) for o in watch.rows][:5] == [N]*5 and len(torch.cat(watch.rows[5])) == BS
    fit(learn, 2, lr=0.5, cbs=watch) # nothing is remembered of the fit before but losses; rows move again
    trained = [len(torch.cat(o)) for o in watch.rows]
    assert trained[0] == BS and trained[1] > 100
    assert N - BS <= learn.selection.ledger.scored.iloc[-1] <= N


def test_ies_where_one_class_or_all_are_mastered():
    "A class that is mastered keeps a share of its rows; so does everything"
    rows, classes = torch.arange(60), torch.arange(60) % 3
    still, moving = torch.zeros(60, 5), torch.rand(60, 5, generator=generator())*3
    one = IES(0.01, 0.2)(torch.where((classes == 1)[:, None], still, moving), EpochInfo(rows, 6, 9, classes=classes),
                         generator())
    assert (classes[one] == 1).sum() == 4 and (classes[one] != 1).sum() == 40
    every = IES(0.01, 0.2)(still, EpochInfo(rows, 6, 9, classes=classes), generator())
    assert classes[every].bincount().tolist() == [4, 4, 4]
    # a batch is drawn by the pruner
    assert len(IES(0.01, 0.)(still, EpochInfo(rows, 6, 9, classes=classes), generator())) == 0
    assert len(IES(0.01, 0.2)(still, EpochInfo(rows, 6, 9), generator())) == 12 # no classes, as in regression
    assert IES(0.01)(torch.full((60, 5), torch.nan), EpochInfo(rows, 6, 9, classes=classes), generator()) is None


def test_ies_looks_at_rows_as_training_sees_them():
    "With the transforms of training, so that a row that leaves is compared with itself"
    class Brighter(Transform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + 1. if x.is_floating_point() else x
    learn = epoch_learner(dataloaders(after_batch=Brighter()), linear()).prune_epochs('ies', threshold=0.02, floor=0.)
    # with the same losses in every epoch, whatever is looked at: but for the transform, rows would come back
    fit(learn, 8, lr=0.)
    trained = learn.selection.ledger.trained.tolist()
    assert trained == [N]*5 + [BS]*3 and learn.selection.ledger.scored.tolist()[6:] == [N]*2


@pytest.mark.parametrize('rule,kwargs', [('infobatch', dict(delta=1.)), ('random', dict(keep=0.02)),
                                         ('seta', dict(prune=0.97)), ('ies', dict(threshold=99., floor=0.))])
@pytest.mark.parametrize('n', [18, 35])
def test_shares_below_a_batch(rule, kwargs, n):
    "A full batch is trained on at least, and none of a single item, which batch norm can't take"
    if rule == 'infobatch': kwargs = dict(ratio=0.99, **kwargs)
    learn = fit(epoch_learner(dataloaders(Reads(n), bs=16)).prune_epochs(rule, **kwargs), 8)
    assert all(o >= 16 and o % 16 != 1 for o in learn.selection.ledger.trained.iloc[1:])
    assert all(o.isfinite().all() for o in learn.model.parameters())


@pytest.mark.parametrize('rule,kwargs',
                         [('infobatch', {}), ('random', dict(keep=0.4)), ('seta', {}), ('ies', dict(threshold=0.3))])
def test_resumed(rule, kwargs, tmp_path):
    """Stopped after four of eight epochs, saved, loaded and gone on with: the number of steps and the rate of each are
    those of an epoch's true length"""
    class Steps(Callback):
        order = 90
        def before_fit(self): self.lrs, self.n_iter, self.pct = [], [], []
        def before_batch(self):
            if self.training:
                self.lrs.append(self.opt.hypers[0]['lr']); self.n_iter.append(self.learn.n_iter)
                self.pct.append(self.pct_train)
    learn = epoch_learner(path=tmp_path).prune_epochs(rule, **kwargs)
    fit(learn, 4, method='fit_one_cycle')
    learn.save('half')
    again = epoch_learner(path=tmp_path).prune_epochs(rule, **kwargs)
    again.load('half')
    fit(again, 8, method='fit_one_cycle', start_epoch=4, cbs=(steps := Steps()))
    ledger = again.selection.ledger
    n_iter = [-(-o//BS) for o in ledger.trained]
    assert len(ledger) == 4 and steps.n_iter == [n for n in n_iter for _ in range(n)]
    assert np.allclose(steps.pct, [(4 + e + i/n)/8 for e,n in enumerate(n_iter) for i in range(n)])
    assert steps.lrs[0] > steps.lrs[-1] and steps.lrs[-1] < 1e-2/10


@pytest.mark.parametrize('keep', [0.1, 0.3, 0.5, 0.7, 1.])
def test_random_subsets_take_turns(keep):
    rule,rows,seen = RandomSubset(keep),torch.arange(50)+7,torch.zeros(57)
    rule.begin(None, None)
    for epoch in range(20):
        chosen = rule(torch.empty(50, 0), EpochInfo(rows, epoch, 20), generator(epoch))
        chosen = rows if chosen is None else chosen
        assert len(chosen.unique()) == len(chosen) == round(keep*50)
        seen[chosen] += 1
        assert seen[7:].max() - seen[7:].min() <= 1


# A rule of the user's own, and rounds

class HardHalf(EpochRule):
    "The half of the rows with the highest last loss, new ones first"
    def __call__(self, remembered, epoch, generator):
        last = remembered[:, 0].nan_to_num(torch.inf)
        return epoch.rows[last.argsort(descending=True)[:len(last)//2]]


@pytest.mark.parametrize('n,drop_last', [(N, False), (N, True), (192, False), (205, True)])
@pytest.mark.parametrize('rule', ['random', HardHalf()])
@pytest.mark.many(3)
def test_rounds_make_up_as_many_steps(n, drop_last, rule):
    "Each round chosen anew from what is remembered, on across epochs, and the rate at its end"
    dls = dataloaders(Reads(n), drop_last=drop_last)
    learn,watch,steps = epoch_learner(dls),Watch(),len(dls.train)
    learn.prune_epochs(rule, epoch='steps', **(dict(keep=0.3) if rule == 'random' else {}))
    fit(learn, 5, method='fit_one_cycle', cbs=watch)
    assert [len(o) for o in watch.rows] == [steps]*5 == [o[0] for o in watch.n_iter]
    assert len(learn.recorder.lrs) == 5*steps
    plain = fit(epoch_learner(dls), 5, method='fit_one_cycle')
    assert np.allclose(learn.recorder.lrs, plain.recorder.lrs)
    batches = [r for o in watch.rows for r in o]
    losses = [r for o in watch.losses for r in o]
    per_round = max(1, round(0.3*n)//BS) if rule == 'random' else n//2//BS
    known = torch.full((n,), torch.nan)
    for first in range(0, len(batches), per_round):
        rows = torch.cat(batches[first:first+per_round])
        assert len(rows.unique()) == len(rows) and all(len(b) == BS for b in batches[first:first+per_round])
        if rule != 'random': # those of the highest losses known when the round began
            last = known.nan_to_num(torch.inf)
            assert last[rows].min() >= last.sort(descending=True).values[n//2 - 1]
        known[rows] = torch.cat(losses[first:first+per_round])
    assert learn.selection.ledger.trained.tolist() == [steps*BS]*5


def test_rounds_of_everything_are_plain_training():
    class All(EpochRule):
        last = 0
        def __call__(self, remembered, epoch, generator): return None
    for kwargs in (dict(), dict(drop_last=True)):
        ends = []
        for prepare in (lambda o: o, lambda o: o.prune_epochs(All(), epoch='steps'), lambda o: o.prune_epochs(All())):
            learn = fit(prepare(epoch_learner(dataloaders(**kwargs))), 3)
            ends.append(torch.cat([o.flatten() for o in learn.model.state_dict().values()]))
        assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.slow
def test_workers_and_torch_loaders_in_rounds():
    rows = Rows(N)
    for dls in (dataloaders(rows, num_workers=2),
                DataLoaders(TorchDataLoader(rows, BS, shuffle=True, num_workers=2), TorchDataLoader(rows, 50))):
        learn,watch,others = epoch_learner(dls).prune_epochs(HardHalf(), epoch='steps'),Watch(),set(active_children())
        fit(learn, 2, cbs=watch)
        assert set(active_children()) <= others # a round that isn't used up leaves no worker behind
        assert [len(o) for o in watch.rows] == [STEPS]*2
        assert torch.equal(learn.selection.selected,
                           torch.cat([r for o in watch.rows for r in o]).bincount(minlength=N))


def test_a_function_is_a_rule():
    def first_rows(remembered, epoch, generator): return epoch.rows[:40]
    learn = fit(epoch_learner().prune_epochs(first_rows), 2)
    assert learn.selection.ledger.trained.tolist() == [40, 40] and (learn.selection.selected > 0).sum() == 40
    learn = fit(epoch_learner().prune_epochs(lambda remembered, epoch, generator: epoch.rows[:3]), 2)
    assert learn.selection.ledger.trained.tolist() == [BS]*2 # less than a batch: filled up at random
    learn = fit(epoch_learner().prune_epochs(lambda remembered, epoch, generator: epoch.rows[:0]), 2)
    assert learn.selection.ledger.trained.tolist() == [BS]*2
    for choice,message in ((lambda r, e, g: e.rows[:5]*0, '1 of them different'),
                           (lambda r, e, g: e.rows + 1, 'some of `epoch.rows`'),
                           (lambda r, e, g: (e.rows, torch.ones(N)), 'weighs = True')):
        with pytest.raises(ValueError, match=message): fit(epoch_learner().prune_epochs(choice), 1)
    with pytest.raises(TypeError, match="has no setting 'keep'; it has ratio.* keep is one of rule='random', "):
        epoch_learner().prune_epochs('infobatch', keep=0.5)
    with pytest.raises(ValueError, match="Did you mean 'random'"): epoch_learner().prune_epochs('randon')
    for args,kwargs in ((('random', 0.3, 9), {}), (('random', 0.3), dict(keep=0.5)), ((IES(), 0.3), {}),
                        ((0.3,), dict(ratio=0.5))):
        with pytest.raises(TypeError, match='each once; got 0.3'): epoch_learner().prune_epochs(*args, **kwargs)
    with pytest.raises(TypeError, match='settings of a rule that is given by name'):
        epoch_learner().prune_epochs(HardHalf(), keep=0.5)


def test_it_says_what_it_will_do():
    assert '1 of 5 groups' in SeTa(window=0.05).says(EpochInfo(torch.arange(5), n_epoch=10))
    def said(n_epoch, *args, **kwargs):
        lines = []
        learn = epoch_learner().prune_epochs(*args, **kwargs)
        with learn.no_bar():
            learn.logger = lambda o: lines.append(o) if isinstance(o, str) else None
            learn.fit(n_epoch)
        return lines
    assert 'does nothing in 1 epoch' in said(1)[0] and 'does nothing in 2 epoch' in said(2)[0]
    assert 'does nothing in 3' in said(3, 'ies')[0]
    assert said(8)[0].startswith('prune_epochs: 6 of 8 epochs without 50% of the rows')
    assert f'at most {STEPS} steps' in said(8)[0]
    assert 'another 25%' in said(2, 'random', keep=0.25)[0]
    assert f'{STEPS} steps per epoch, as in plain training' in said(1, 'random', epoch='steps')[0]


def test_no_sentence_with_mixup_unless_nothing_is_remembered():
    fit(epoch_learner(cbs=MixUp()).prune_epochs('random'), 1)
    for rule in ('seta', 'ies', 'infobatch'):
        with pytest.raises(ValueError, match="rule='random'"): epoch_learner(cbs=MixUp()).prune_epochs(rule)


# Interruption

events = ['before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step',
          'after_step', 'after_batch', 'after_train',
          'before_validate', 'after_validate', 'after_epoch']


@pytest.mark.parametrize('part', range(2))
@pytest.mark.parametrize('epoch', ['rows', 'steps'])
@pytest.mark.many(2)
def test_interrupted_anywhere(epoch, part, tmp_path):
    "And gone on with, again and again"
    class Stop(Callback):
        order = 30
        def __call__(self, name):
            if name == event and self.learn.epoch == 1 and (self.learn.training or 'valid' in event
                                                            or 'epoch' in event): raise KeyboardInterrupt
    learn = epoch_learner(path=tmp_path, metrics=lambda pred, targ: pred.sum()).prune_epochs(delta=1., epoch=epoch)
    for event in events[part ^ (epoch == 'steps')::2]:
        with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Stop())
        learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Stop)])
        record = learn.selection
        assert record.ledger.selected.iloc[0] == 1 and repr(record), event
        with learn.no_bar(), learn.no_logging():
            assert len(learn.validate()) == 2, event
            learn.export('learner.pkl')
            assert len(load_learner(tmp_path/'learner.pkl').metrics) == 1, event
            learn.lr_find(num_it=3, show_plot=False)
        lines = len(record.ledger)
        fit(learn, 2)
        assert len(record.ledger) == lines + 2 and record.ledger.trained.iloc[-1] <= (
            N if epoch == 'rows' else STEPS*BS), event
    learn.no_pruning()
    assert len(record.ledger) == lines + 2 and isinstance(learn.selection, SelectionRecord) and len(learn.metrics) == 1
    fit(learn, 1)
    assert len(record.ledger) == lines + 2


def test_an_export_after_no_pruning_needs_nothing_of_this_package(tmp_path):
    import pickle
    import zipfile
    learn = epoch_learner(path=tmp_path).prune_epochs()
    fit(learn, 3)
    learn.no_pruning()
    assert len(learn.selection.ledger) == 3 # still to be read
    learn.export('learner.pkl')
    with zipfile.ZipFile(tmp_path/'learner.pkl') as z:
        content = z.read(next(o for o in z.namelist() if o.endswith('data.pkl')))
    assert b'rholoss' not in content and pickle


two_rules = '''
import sys, os
from test_epoch_rules import *
from distributed_rho_loss import broadcast
from fastai.distributed import DistributedDL
from rholoss_fastai.all import LossHistory
import torch.distributed as dist
DistributedDL._broadcast = broadcast
class Draws(Callback):
    "What was remembered before each choice, and what was chosen"
    order = -4
    def before_fit(self): self.rows, self.before = [], []
    def before_train(self): self.before.append(self.epoch_pruner.memory.values.clone())
results = {{}}
for rule,kwargs in (('seta', dict(prune=0.1)), ('ies', dict(threshold=0.1, floor=0.2))):
    history, watch, draws = LossHistory(), Watch(), Draws()
    learn = epoch_learner(dataloaders(Rows(N)), linear()).prune_epochs(rule, seed=4, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    with learn.distrib_ctx(sync_bn=False), learn.no_logging(): learn.fit(8, 0.05, cbs=[watch, draws, history])
    results[rule] = dict(rows=[torch.cat(o) for o in watch.rows], losses=[torch.cat(o) for o in watch.losses],
                         before=draws.before, weights=torch.cat([o.flatten() for o in learn.model.parameters()]),
                         history=history.losses, valid=history.valid,
                         ledger=learn.selection.ledger.to_dict('list'))
torch.save(results, {out!r} + str(dist.get_rank()))
'''


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path):
    "SeTa, IES and LossHistory: what both remember is gathered, both choose the same rows and end with the same weights"
    pytest.importorskip('accelerate', reason='distributed training needs accelerate')
    two_processes(two_rules.format(out=str(tmp_path/'rank')), out=tmp_path/'log')
    ranks = [torch.load(tmp_path/f'rank{rank}', weights_only=False) for rank in (0, 1)]
    for rule in ('seta', 'ies'):
        a, b = (o[rule] for o in ranks)
        assert torch.equal(a['weights'], b['weights'])
        assert torch.equal(a['history'].nan_to_num(-1), b['history'].nan_to_num(-1)) and a['valid'] == b['valid']
        for epoch in range(8):
            assert torch.equal(a['before'][epoch].nan_to_num(-1), b['before'][epoch].nan_to_num(-1))
            rows, losses = (torch.cat([o[key][epoch] for o in (a, b)]) for key in ('rows', 'losses'))
            assert len(rows) - len(rows.unique()) <= 1 # one row twice where their number is odd
            sums = torch.zeros(2, N).index_add_(1, rows, torch.stack([losses, torch.ones_like(losses)]))
            expected = (sums[0]/sums[1])
            # NaN: not trained on, in neither
            assert torch.allclose(a['history'][epoch], expected, atol=5e-3, equal_nan=True)
            if epoch == 7: continue
            newest = a['before'][epoch + 1][:, 0]
            trained = sums[1] > 0
            assert torch.allclose(newest[trained], expected[trained], atol=1e-5)
        counts = a['ledger']['trained']
        assert min(counts) < N
        if rule == 'ies': # mastered by three second differences; of a class at least a fifth stays
            for epoch in range(8):
                h = a['before'][epoch]
                mastered = (h[:, :3] - 2*h[:, 1:4] + h[:, 2:5]).abs().mean(1) < 0.1
                chosen = torch.cat([o['rows'][epoch] for o in (a, b)]).unique()
                assert set((~mastered).nonzero().flatten().tolist()) <= set(chosen.tolist())
