"""Selective-Backprop against independent results, its queue and its remembered losses, and everything else that a fit
may have in it."""
import math
import pickle
import random
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (patches to_fp16)
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.torch_core import TensorCategory, TensorImage
from helpers import fit
from numbered_rows import Rows, image_learner, rows_of
from scipy import stats
from torch import nn

from rholoss_fastai.all import PercentileSample, Pick, RankSample, Selection, SelectiveBackprop, Stopwatch, Uniform
from rholoss_fastai.nested import join_batches
from rholoss_fastai.selector import check_learner

N, BS = 112, 16


def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(3),
                         nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 3))


conv_learner = partial(image_learner, model=model, n=N, bs=BS)


def weights(learn):
    return torch.cat([p.detach().flatten() for p in [*learn.model.parameters(), *learn.model.buffers()]])


class Draws(PercentileSample):
    "Keeps what it was given and what it drew"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scores, self.drawn = [], []
    def __call__(self, scores, pct_train=0., size=None):
        selection = super().__call__(scores, pct_train, size)
        self.scores.append(scores.clone()); self.drawn.append(selection.idxs)
        return selection


class Candidates(Callback):
    "The rows of each batch that the loader delivers"
    order = -6
    def __init__(self): self.rows = []
    def before_batch(self):
        if self.training: self.rows.append(rows_of(self.x))


class Steps(Callback):
    "The rows of each training step"
    order = -4
    def __init__(self): self.rows = []
    def before_batch(self):
        if self.training: self.rows.append(rows_of(self.x))


class Interrupt(Callback):
    "The user's ctrl-C in a step"
    order = 45
    def __init__(self, after): self.after = after
    def after_loss(self):
        if self.training and self.iter >= self.after: raise KeyboardInterrupt


# The rule

@pytest.mark.parametrize('beta,sampling_min', [(3., 0.), (1., 0.), (0.5, 0.2), (0., 0.)])
def test_draws_follow_the_percentile_to_the_power_of_beta(beta, sampling_min):
    "Chi-square over 10^5 draws"
    n, repeats = 50, 2000
    losses = torch.arange(n).float()[torch.randperm(n, generator=torch.Generator().manual_seed(2))]
    pick, count = PercentileSample(beta, history=n, sampling_min=sampling_min, seed=1), torch.zeros(n)
    for _ in range(repeats): count[pick(losses).idxs] += 1
    p, count = np.maximum(((losses.numpy() + 1)/n)**beta, sampling_min), count.numpy()
    assert (count[p == 1] == repeats).all()
    often = (p*repeats >= 5) & ((1-p)*repeats >= 5) # the test's own condition
    chi2 = ((count - repeats*p)[often]**2/(repeats*p*(1-p))[often]).sum()
    assert not often.any() or stats.chi2.sf(chi2, often.sum()) > 0.01, chi2
    assert abs(count[~often].sum() - repeats*p[~often].sum()) < 10


@pytest.mark.parametrize('history', [7, 30, 31, 64, 1024])
@pytest.mark.parametrize('ties', [False, True])
def test_percentile_in_a_running_history(history, ties):
    "Batches smaller than the history, as large and larger, against scipy in a loop over a list"
    generator, seen, pick = torch.Generator().manual_seed(0), [], PercentileSample(1., history)
    for n in (30, 7, 31, 64, 1, 30, 30):
        losses = torch.randn(n, generator=generator)
        if ties: losses = losses.round(decimals=0)
        seen = (seen + losses.tolist())[-history:]
        expected = [stats.percentileofscore(seen, o, kind='rank')/100 for o in losses.tolist()]
        torch.testing.assert_close(pick.probabilities(losses), torch.tensor(expected).float())
        assert pick.past_losses().tolist() == sorted(seen)


def test_the_batch_is_not_looped_over(monkeypatch):
    "The number of tensor operations doesn't depend on the batch or the history"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))
    counts = []
    for n, history in ((8, 16), (320, 1024)):
        pick = PercentileSample(3., history)
        pick(torch.rand(n))
        with Count() as count: pick(torch.rand(n))
        counts.append(count.n)
    assert counts[0] == counts[1] < 60


LOSSES = dict(zero=torch.zeros(64), equal=torch.full((64,), 2.5),
              infinite=torch.cat([torch.rand(63), torch.tensor([math.inf])]), negative=-torch.rand(64),
              nan=torch.full((64,), math.nan), one_nan=torch.cat([torch.rand(63), torch.tensor([math.nan])]),
              minus_infinite=torch.cat([torch.rand(63), torch.tensor([-math.inf])]))


@pytest.mark.parametrize('name', LOSSES)
def test_probabilities_of_odd_losses(name):
    losses, pick = LOSSES[name], PercentileSample(3.)
    for _ in range(3): p = pick.probabilities(losses)
    assert ((p >= 0) & (p <= 1)).all()
    if name in ('zero', 'equal', 'nan'): torch.testing.assert_close(p, torch.full((64,), (0.5 + 1/(2*192))**3))
    if name == 'infinite': assert p.argmax() == 63
    if name in ('one_nan', 'minus_infinite'): assert p.argmin() == 63 and p[63] < 1e-5
    if name == 'negative': assert p.argmax() == losses.argmax()


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('queue', [False, True])
def test_training_on_odd_losses(name, queue):
    "There is always something to train on"
    odd = LOSSES[name][-BS:]
    def score(loss): return odd
    learn = conv_learner().selective_backprop(score=score, queue=queue, warmup_epochs=0)
    if name == 'nan':
        with pytest.warns(UserWarning, match='every score was NaN'): fit(learn, 2)
    else: fit(learn, 2)
    assert (learn.selection.ledger.trained > 0).all()
    assert torch.isfinite(weights(learn)).all()


def test_selection_of_nothing_never_gives_an_empty_batch():
    learn, steps = conv_learner().selective_backprop(1e6, warmup_epochs=0), Steps()
    fit(learn, 2, cbs=steps)
    assert len(steps.rows) == 2*N//BS and {len(o) for o in steps.rows} == {2} # batch norm needs two
    learn, steps = conv_learner().selective_backprop(1e6, warmup_epochs=0, queue=True), Steps()
    fit(learn, 2, cbs=steps)
    assert [len(o) for o in steps.rows] == [BS] # the first batch of the fit, as it came
    assert learn.selector.waiting <= 2*N/BS


def test_expected_share():
    learn = fit(conv_learner(n=480, bs=32).selective_backprop(1., warmup_epochs=0), 8, 1e-4)
    assert learn.selection.ledger.selected.mean() == pytest.approx(0.5, abs=0.03)


def test_keep_is_another_way_to_say_beta():
    assert SelectiveBackprop().pick.beta == 3
    assert SelectiveBackprop(keep=0.25).pick.beta == 3
    assert SelectiveBackprop(keep=1).pick.beta == 0
    assert SelectiveBackprop(beta=0).pick.beta == 0
    schedule = pickle.loads(pickle.dumps(SelectiveBackprop(keep=SchedLin(1., 0.25)))).pick.beta
    assert [schedule(o) for o in (0., 1.)] == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize('n,keep', [(4, 0.5), (20, 0.25)])
def test_composers_rule(n, keep, repeats=10000):
    "How often each rank is drawn, against numpy's draws without replacement with p ~ ((rank - 1/2)/n) ** (1/keep - 1)"
    pick, losses, ours = RankSample(keep), torch.arange(n).float(), torch.zeros(n)
    for _ in range(repeats): ours[pick(losses).idxs] += 1
    p = (np.arange(0.5, n)/n)**(1/keep - 1)
    generator, theirs = np.random.default_rng(0), np.zeros(n)
    for _ in range(repeats): theirs[generator.choice(n, int(keep*n), replace=False, p=p/p.sum())] += 1
    assert ours.sum() == theirs.sum() == repeats*int(keep*n)
    assert np.abs(ours.numpy() - theirs).max() < 5*(2*repeats*0.25)**0.5


def test_composers_rule_in_training():
    learn, steps = conv_learner().selective_backprop(pick=RankSample(0.5), start=0.5, end=0.9, every=2,
                                                     scale_factor=0.5, warmup_epochs=0), Steps()
    fit(learn, 10, cbs=steps)
    sizes = torch.tensor([len(o) for o in steps.rows]).view(10, -1)
    assert (sizes[:5] == BS).all() and (sizes[9:] == BS).all()
    assert (sizes[5:9, ::2] == BS//2).all() and (sizes[5:9, 1::2] == BS).all()


# The queue

def drawn_rows(candidates, pick, first_batches=(0,)):
    "Rows in the order they were selected, and which batches were trained as they came"
    batches = [o for i, o in enumerate(candidates.rows) if i not in first_batches]
    assert len(batches) == len(pick.drawn)
    return torch.cat([rows[idxs] for rows, idxs in zip(batches, pick.drawn)])


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('drop_last', [True, False])
def test_queue_trains_each_selected_item_exactly_once(num_workers, drop_last):
    "In the order they were selected, over epochs and two fits; what is left waits"
    n, pick, candidates, steps = 118, Draws(2.), Candidates(), Steps()
    learn = conv_learner(n=n, num_workers=num_workers,
                         drop_last=drop_last).selective_backprop(pick=pick, queue=True, warmup_epochs=0)
    epoch_batches = n//BS + (not drop_last)
    fit(learn, 2, cbs=[candidates, steps])
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == len(steps.rows)
    first_fit = len(steps.rows)
    fit(learn, 1, cbs=[candidates, steps])
    assert len(candidates.rows) == 3*epoch_batches
    selected = drawn_rows(candidates, pick, (0, 2*epoch_batches))
    trained = torch.cat([o for i, o in enumerate(steps.rows) if i not in (0, first_fit)])
    assert [len(o) for o in steps.rows] == [BS]*len(steps.rows)
    assert learn.selector.waiting == len(selected) - len(trained) < BS
    assert torch.equal(trained, selected[:len(trained)])
    if learn.selector.waiting:
        xb, yb, rows = learn.selector.delivery.items
        for waiting in (rows_of(xb[0]), rows): assert torch.equal(waiting, selected[len(trained):])
        assert torch.equal(yb[0], Rows(n).targets[rows])
    assert torch.equal(learn.selection.selected.long(), torch.bincount(torch.cat(steps.rows), minlength=n))
    assert torch.equal(learn.selection.seen.long(), torch.bincount(torch.cat(candidates.rows), minlength=n))
    assert learn.selection.ledger.trained.sum() == BS*len(steps.rows)


def test_queue_outlives_an_interrupted_fit():
    pick, candidates, steps = Draws(2.), Candidates(), Steps()
    learn = conv_learner().selective_backprop(pick=pick, queue=True, warmup_epochs=0)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=[candidates, steps, Interrupt(6)])
    interrupted = len(candidates.rows), len(steps.rows)
    assert learn.selector.waiting
    fit(learn, 2, cbs=[candidates, steps])
    selected = drawn_rows(candidates, pick, (0, interrupted[0]))
    trained = torch.cat([o for i, o in enumerate(steps.rows) if i not in (0, interrupted[1])])
    assert torch.equal(trained, selected[:len(trained)]) and learn.selector.waiting == len(selected) - len(trained) < BS
    assert learn.selection.ledger.trained.tolist()[0] == BS*interrupted[1]


def test_queue_is_carried_through_fine_tune():
    pick, candidates, steps = Draws(2.), Candidates(), Steps()
    fit(conv_learner().selective_backprop(pick=pick, queue=True), 2, method='fine_tune', cbs=[candidates, steps])
    vanilla = {*range(N//BS)} # the warm-up epoch is the frozen one
    selected = drawn_rows(candidates, pick, {*vanilla, N//BS})
    assert torch.equal(torch.cat(steps.rows[N//BS + 1:]), selected[:len(selected)//BS*BS])


def test_queue_over_everything_is_plain_training():
    "beta 0 selects all: the same batches, dropout and weights as without"
    plain, queued = fit(conv_learner(), 2), fit(conv_learner().selective_backprop(0., queue=True, warmup_epochs=0), 2)
    assert torch.equal(weights(plain), weights(queued))
    assert plain.recorder.losses == queued.recorder.losses


def test_queue_fills_up_partial_batches():
    "With everything selected and a last batch of 6 of 16: 230 = 14 x 16 + 6"
    learn, steps = conv_learner(n=230, drop_last=False).selective_backprop(0., queue=True, warmup_epochs=0), Steps()
    fit(learn, 3, cbs=steps)
    assert {len(o) for o in steps.rows} == {BS} and len(steps.rows) == 3*230//BS
    assert learn.selector.waiting == 3*230 % BS


@pytest.mark.parametrize('beta', [0.2, 0.5])
def test_what_waits_has_a_forward_of_its_own(beta):
    "Also where one forward for scores and training would cost less"
    learn, steps = conv_learner(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), Steps()
    fit(learn.selective_backprop(beta, queue=True, warmup_epochs=0), 3, cbs=steps)
    assert learn.selection.ledger.forward.tolist() == ['twice']*3 and {len(o) for o in steps.rows} == {BS}
    alone = fit(conv_learner(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))).selective_backprop(
        beta, warmup_epochs=0), 3)
    assert alone.selection.ledger.forward.tolist() == ['twice', 'reuse', 'reuse']


def test_batches_without_selection_train_as_they_come():
    learn, steps = conv_learner().selective_backprop(queue=True, every=3, start=0.25, end=0.75), Steps()
    pick = learn.selector.pick = Draws(3.)
    fit(learn, 4, cbs=steps)
    sizes = [len(o) for o in steps.rows]
    assert set(sizes) == {BS}
    assert len(sizes) == 4*N//BS - len(pick.drawn) + sum(map(len, pick.drawn))//BS
    assert len(pick.drawn) == 2*len(range(0, N//BS, 3))


def test_schedules_follow_candidate_batches():
    learn, last = conv_learner().selective_backprop(queue=True), []
    class LastRate(Callback):
        order = 61
        def after_batch(self):
            if self.training: last.append((self.pct_train, self.train_iter))
    fit(learn, 3, method='fit_one_cycle', cbs=LastRate())
    n_batches, n_steps = 3*N//BS, len(learn.recorder.losses)
    assert last[-1] == (pytest.approx(1), n_batches) and len(learn.recorder.hps['lr']) == n_batches
    assert n_steps < n_batches
    plain = fit(conv_learner(), 3, method='fit_one_cycle')
    assert set(learn.recorder.lrs) <= set(plain.recorder.lrs)


def test_recorder_logs_the_losses_of_steps_alone():
    class Losses(Callback):
        order = Recorder.order - 1
        def __init__(self): self.of_steps = []
        def after_step(self): self.of_steps.append(self.learn.loss.item())
    learn, seen = conv_learner().selective_backprop(queue=True, warmup_epochs=0), Losses()
    fit(learn, 3, cbs=seen)
    smooth, logged = 0., []
    for i, loss in enumerate(seen.of_steps):
        smooth = 0.98*smooth + 0.02*loss
        logged.append(smooth/(1 - 0.98**(i+1)))
    np.testing.assert_allclose([o.item() for o in learn.recorder.losses], logged, rtol=1e-4)


def test_time_of_cancelled_batches(monkeypatch):
    "Every candidate batch counts scoring, only steps count training"
    added = []
    original = Stopwatch.add
    monkeypatch.setattr(Stopwatch, 'add',
                        lambda self, name, start, end: (added.append(name), original(self, name, start, end))[1])
    learn, steps, candidates = conv_learner().selective_backprop(queue=True), Steps(), Candidates()
    fit(learn, 3, cbs=[steps, candidates])
    assert added.count('training') == len(steps.rows) < added.count('scoring') == len(candidates.rows)
    ledger = learn.selection.ledger
    assert (ledger.seconds_scoring + ledger.seconds_training <= ledger.seconds).all()


class Observer(Callback):
    "Ends in `after_batch` what it began in `before_batch`, and reads what the Recorder leaves, as loggers do"
    order = 51
    def before_fit(self): self.logged = 0
    def before_batch(self): self.began = True
    def after_batch(self):
        if self.training:
            self.logged += self.began and self.smooth_loss.item() > 0 and len(self.xb[0]) > 0 and self.learn.loss.item(
                ) > 0


COMPANIONS = dict(
    nothing=lambda: [], mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()],
    accumulation=lambda: [GradientAccumulation(2*BS)],
    clip=lambda: [GradientClip(0.1)], save=lambda: [SaveModelCallback(monitor='selected', fname='best')],
    csv=lambda: [CSVLogger()],
    nan=lambda: [TerminateOnNaNCallback()], progress=lambda: [ProgressCallback()], logger=lambda: [Observer()],
    stats=lambda: [ActivationStats(every=4)])


@pytest.mark.parametrize('queue', [False, True])
@pytest.mark.parametrize('name', COMPANIONS)
@pytest.mark.many(3)
def test_beside_other_callbacks(name, queue, tmp_path):
    "From the first batch, twice in a row, and after an interrupted fit"
    learn = conv_learner(tmp_path).selective_backprop(1., queue=queue, warmup_epochs=0)
    for _ in range(2):
        steps = Steps()
        fit(learn, 2, cbs=[*COMPANIONS[name](), steps])
        assert {len(o) for o in steps.rows} == {BS} if queue else all(1 < len(o) <= BS for o in steps.rows)
        assert len(learn.recorder.losses) == len(steps.rows)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[*COMPANIONS[name](), Interrupt(4)])
    fit(learn, 2, method='fit_one_cycle', cbs=COMPANIONS[name]())
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    assert [o for o in learn.recorder.metric_names if o != 'time'] == ['epoch', 'train_loss', 'valid_loss',
                                                                       'accuracy', 'selected']
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    ledger = learn.selection.ledger
    assert (ledger.loaded[[0, 1, 2, 3, 5, 6]] == N).all() and ledger.selected.between(0.2, 0.75).all()
    assert torch.isfinite(weights(learn)).all()


@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('queue', [False, True])
def test_selection_before_mixing(mix, queue):
    "What is scored is the item as it is, and what waits stays unmixed"
    class Clean(Callback):
        order = -3
        def before_fit(self): self.ok = []
        def before_batch(self):
            if not self.training: return
            images = Rows(N).images[rows_of(self.x)]
            waiting = self.learn.selector.delivery.items if hasattr(self.learn.selector.delivery, 'items') else None
            if waiting is not None:
                images, x = torch.cat([images, Rows(N).images[waiting[2]]]), torch.cat([self.x, waiting[0][0]])
            else: x = self.x
            self.ok.append(torch.equal(x, images))
    learn, clean, pick = conv_learner(), Clean(), Draws(1.)
    learn.selective_backprop(pick=pick, queue=queue, warmup_epochs=0)
    fit(learn, 2, cbs=[mix(), clean])
    assert clean.ok and all(clean.ok) and len(pick.drawn) >= 2*N//BS - 1


def test_gradient_accumulation_counts_queued_items():
    class Updates(Callback):
        def before_fit(self): self.n = 0
        def after_step(self): self.n += 1
    learn, updates, steps = conv_learner().selective_backprop(1., queue=True, warmup_epochs=0), Updates(), Steps()
    fit(learn, 4, cbs=[GradientAccumulation(3*BS), updates, steps])
    assert updates.n == len(steps.rows)//3 > 3


def test_validate_predict_and_lr_find_leave_the_queue_alone():
    learn = fit(conv_learner(n=240).selective_backprop(queue=True), 2)
    waiting, n_lines = learn.selector.waiting, len(learn.selection.lines)
    with learn.no_logging(): learn.validate(); learn.get_preds(); learn.lr_find(num_it=20, show_plot=False)
    assert learn.selector.waiting == waiting > 0 and len(learn.selection.lines) == n_lines


def test_queue_is_dropped_where_it_would_not_fit():
    learn = fit(conv_learner(n=240).selective_backprop(2., queue=True), 2)
    assert learn.selector.waiting
    class NextQueue(Callback):
        order = -6
        def before_train(self):
            if self.epoch == 0: self.learn.waited = self.learn.selector.waiting
    waiting = learn.selector.waiting
    assert fit(learn, 1, cbs=NextQueue()).waited == waiting and learn.selector.waiting
    steps = Steps()
    learn.dls = conv_learner(bs=8).dls
    assert fit(learn, 2, cbs=[NextQueue(), steps]).waited == 0
    assert {len(o) for o in steps.rows} == {8}


class Nested(Rows):
    "Inputs in dictionaries and tuples"
    def __getitem__(self, i):
        return dict(image=self.images[i], point=(self.images[i, 0, 0, :2], torch.tensor(i))), self.targets[i]


class NestedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model()
    def forward(self, inputs):
        where, row = inputs['point']
        assert len(where) == len(inputs['image']) and torch.equal(row, rows_of(inputs['image']))
        return self.net(inputs['image'])


def test_queue_of_nested_inputs():
    learn = fit(conv_learner(data=Nested, model=NestedModel).selective_backprop(2., queue=True), 3)
    assert learn.selection.ledger.trained.sum() == learn.selection.selected.sum()


def test_joined_batches():
    Point = namedtuple('Point', 'where name scale')
    def point(x, name='a', scale=2.): return dict(points=[Point(torch.tensor(x), name, torch.tensor(scale))], none=None)
    joined = join_batches(point([1, 2]), point([3]))
    assert joined['points'][0].where.tolist() == [1, 2, 3] and joined['points'][0].name == 'a'
    assert joined['points'][0].scale == 2 and joined['none'] is None
    for other in (point([3], name='b'), point([3], scale=1.), point([[3]]), dict(points=[], none=None),
                  dict(points=point([3])['points'])):
        with pytest.raises(ValueError, match="don't fit together"): join_batches(point([1, 2]), other)


def test_queue_keeps_types_and_metadata():
    class Typed(Callback):
        order = -6
        def before_batch(self):
            self.learn.xb, self.learn.yb = (TensorImage(self.x, source='camera'),), (TensorCategory(self.y),)
    class Kinds(Callback):
        order = -4
        def before_fit(self): self.met = set()
        def before_batch(self):
            if self.training: self.met.add((type(self.x), self.x.source, type(self.y)))
    kinds = Kinds()
    fit(conv_learner().selective_backprop(2., queue=True, warmup_epochs=0), 2, cbs=[Typed(), kinds])
    assert kinds.met == {(TensorImage, 'camera', TensorCategory)}


class Texts(Rows):
    "Sequences of differing length"
    def __getitem__(self, i): return torch.randn(4 + i % 5, 1), self.targets[i]


def test_queue_of_differing_shapes_is_an_error():
    def padded(items):
        x, y = zip(*items)
        return nn.utils.rnn.pad_sequence(x, batch_first=True)[:, :random.choice([4, 5])], torch.stack(y)
    class Mean(nn.Module):
        def __init__(self): super().__init__(); self.linear = nn.Linear(1, 3)
        def forward(self, x): return self.linear(x.mean(1))
    learn = conv_learner(data=Texts, model=Mean)
    for dl in learn.dls: dl.create_batch = padded
    fit(learn.selective_backprop(2., warmup_epochs=0), 2)
    with pytest.raises(ValueError,
                       match=r'a Tensor of shape \(\d+, [45], 1\) and a Tensor of shape \(\d+, [45], 1\).*pad them'):
        fit(learn.selective_backprop(2., warmup_epochs=0, queue=True), 2)


# Remembered losses

class Forwards(Callback):
    "Forward passes and their items, with gradient and without, by epoch"
    order = -6
    def before_fit(self):
        self.scored, self.trained = [0]*self.n_epoch, [0]*self.n_epoch
        def count(module, args):
            if not self.training: return
            of = self.trained if torch.is_grad_enabled() else self.scored
            of[self.epoch] += len(args[0])
        self.hook = self.model.register_forward_pre_hook(count)
    def after_fit(self): self.hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('queue', [False, True])
def test_remembered_losses_belong_to_their_rows(num_workers, queue):
    "Refreshed every third epoch, by the model of then; no scoring forward in between"
    class Oracle(Callback):
        order = -6
        def before_fit(self): self.rows, self.losses = [], []
        def before_batch(self):
            if not self.training: return
            net = model()
            net.load_state_dict(self.model.state_dict())
            with torch.no_grad(): self.losses.append(F.cross_entropy(net.eval()(self.x), self.y, reduction='none'))
            self.rows.append(rows_of(self.x))
    n, k, n_epoch, pick, oracle, forwards = 230, 3, 7, Draws(2.), Oracle(), Forwards()
    learn = conv_learner(n=n, num_workers=num_workers).selective_backprop(pick=pick, staleness=k, queue=queue)
    fit(learn, n_epoch, cbs=[oracle, forwards])
    per_epoch, remembered, i = n//BS, torch.full((n,), math.inf), 0
    for epoch in range(1, n_epoch): # the first is the warm-up
        for b in range(epoch*per_epoch, (epoch+1)*per_epoch):
            rows = oracle.rows[b]
            if (epoch - 1) % k == 0: remembered[rows] = oracle.losses[b]
            torch.testing.assert_close(pick.scores[i], remembered[rows])
            i += 1
    assert len(pick.scores) == i
    assert forwards.scored == [0, per_epoch*BS, 0, 0, per_epoch*BS, 0, 0] == learn.selection.ledger.scored.tolist()
    assert forwards.trained == learn.selection.ledger.trained.tolist()


def test_rows_never_scored_rank_first():
    pick = Draws(2.)
    # 15 rows are dropped each epoch
    learn = fit(conv_learner(n=239).selective_backprop(pick=pick, staleness=2, warmup_epochs=0), 2)
    unknown = [(scores.isinf().nonzero().flatten(), scores) for scores in pick.scores[14:]]
    assert sum(len(rows) for rows, _ in unknown) > 0
    for rows, scores in unknown: assert set(scores.argsort(descending=True)[:len(rows)].tolist()) == set(rows.tolist())
    assert learn.selection.ledger.forward.tolist() == ['twice', 'none']


def test_losses_of_another_loss_function_are_not_remembered():
    learn = fit(conv_learner().selective_backprop(staleness=2, warmup_epochs=0), 1)
    learn.loss_func = CrossEntropyLossFlat()
    fit(learn, 1)
    learn.loss_func = LabelSmoothingCrossEntropyFlat()
    assert fit(learn, 2).selection.ledger.forward.tolist() == ['twice', 'none', 'twice', 'none']


def test_epochs_before_start_do_not_count_as_scored():
    "Else the first epoch that selects could be one that remembers, and there would be nothing to remember"
    pick = Draws(2.)
    learn = fit(conv_learner().selective_backprop(pick=pick, staleness=2, start=0.25, warmup_epochs=0), 4)
    assert (learn.selection.ledger.scored > 0).tolist() == [False, True, False, True]
    assert all(torch.isfinite(o).all() for o in pick.scores)


# Low-resolution scoring

def test_scale_factor_scores_what_interpolation_gives():
    class Oracle(Callback):
        order = -6
        def before_fit(self): self.losses = []
        def before_batch(self):
            if not self.training: return
            net = model()
            net.load_state_dict(self.model.state_dict())
            small = F.interpolate(self.x, size=(3, 3), mode='bilinear', antialias=True)
            with torch.no_grad(): self.losses.append(F.cross_entropy(net.eval()(small), self.y, reduction='none'))
    pick, oracle = Draws(2.), Oracle()
    fit(conv_learner().selective_backprop(pick=pick, scale_factor=0.5, warmup_epochs=0), 2, cbs=oracle)
    assert len(pick.scores) == len(oracle.losses)
    for got, wanted in zip(pick.scores, oracle.losses): torch.testing.assert_close(got, wanted)


class Flat(Rows):
    def __getitem__(self, i): return self.images[i].flatten(), self.targets[i]


def test_scale_factor_needs_images():
    learn = conv_learner(data=Flat,
                         model=lambda: nn.Linear(36, 3)).selective_backprop(scale_factor=0.5, warmup_epochs=0)
    before = weights(learn)
    with pytest.raises(ValueError, match=r'one image tensor.*got \(16, 36\)'): fit(learn, 1)
    assert torch.equal(weights(learn), before)


# Randomness

def test_draws_leave_the_global_random_state_alone():
    class State(Callback):
        def __init__(self, order): self.order, self.states = order, {}
        def before_batch(self):
            if self.training:
                self.states[self.train_iter] = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].tolist()),
                                                random.getstate()]
    for kwargs in (dict(), dict(queue=True), dict(staleness=2), dict(pick=RankSample(0.5)), dict(forward='reuse')):
        learn, before, after = conv_learner().selective_backprop(warmup_epochs=0, **kwargs), State(-6), State(-4)
        fit(learn, 2, cbs=[before, after])
        assert after.states
        for i in after.states:
            assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a,
                       b in zip(before.states[i], after.states[i]))


@pytest.mark.parametrize('kwargs', [dict(), dict(queue=True), dict(staleness=2), dict(keep=0.5, sampling_min=0.1)])
def test_the_same_seed_gives_the_same_weights(kwargs):
    first, second, other = (weights(fit(conv_learner().selective_backprop(seed=seed, **kwargs), 3))
                            for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


# The record, and what is kept of it

@pytest.mark.parametrize('queue', [False, True])
def test_ledger(queue):
    learn = fit(conv_learner().selective_backprop(2., history=100, queue=queue), 4)
    ledger = learn.selection.ledger
    assert ledger[['history_p10', 'history_p50', 'history_p90']].iloc[0].isna().all()
    past = learn.selector.pick.past_losses().numpy()
    wanted = np.percentile(past, [10, 50, 90], method='nearest')
    np.testing.assert_allclose(ledger[['history_p10', 'history_p50', 'history_p90']].iloc[-1], wanted, rtol=1e-6)
    assert ledger.loaded.tolist() == [N]*4 and ledger.scored.tolist()[:2] == ([0, N])
    assert ledger.top20_share[1:].between(0.2, 1).all() and (ledger.loss_share[1:] > ledger.selected[1:] - 0.1).all()
    other = fit(conv_learner().selective_backprop(pick=RankSample(0.5)), 2).selection.ledger
    assert not [o for o in other.columns if o.startswith('history')]


@pytest.mark.parametrize('kwargs', [dict(queue=True), dict(staleness=2), dict(keep=SchedLin(1., 0.25)),
                                    dict(pick=RankSample(0.5))])
def test_export_and_load(kwargs, tmp_path):
    learn = fit(conv_learner(tmp_path).selective_backprop(**kwargs), 3)
    dls = learn.dls
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    assert loaded.selector.waiting == 0 and getattr(loaded.selector.memory, 'values', None) is None
    assert getattr(loaded.selector.delivery, 'waits_for', None) is None
    loaded.dls = dls
    x, _ = dls.valid.one_batch()
    assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x))
    fit(loaded, 1)
    assert len(loaded.selection.ledger) == 4 and loaded.selection.ledger.selected.iloc[-1] < 1
    assert (tmp_path/'learner.pkl').stat().st_size < 60_000


def test_queue_without_known_rows():
    "A batch sampler hides no rows, but a loader of one's own may"
    class Shuffled(DataLoader):
        def create_item(self, s): return super().create_item((s*7) % N)
    learn, steps = conv_learner(), Steps()
    learn.dls.loaders[0] = Shuffled(Rows(N), bs=BS, shuffle=True, drop_last=True)
    fit(learn.selective_backprop(2., queue=True, warmup_epochs=0), 3, cbs=steps)
    assert {len(o) for o in steps.rows} == {BS}


# What is refused

class Weighted(Pick):
    weighted = True
    def __call__(self, scores, pct_train=0., size=None):
        return Selection(torch.arange(len(scores)), torch.ones(len(scores)))


BAD = [
    (dict(beta=-1), ValueError, r'beta must lie in \[0, inf\); got -1'),
    (dict(beta=math.nan), ValueError, 'got nan'),
    (dict(beta=math.inf), ValueError, 'got inf'),
    (dict(beta='3'), TypeError, "got '3'"),
    (dict(beta=SchedLin(1., -1.)), ValueError, 'at pct_train=1'),
    (dict(keep=0), ValueError, r'keep must lie in \(0, 1\]; got 0'),
    (dict(keep=1.5), ValueError, 'got 1.5'),
    (dict(keep=math.nan), ValueError, 'got nan'),
    (dict(beta=3, keep=0.25), ValueError, 'beta=3 and keep=0.25 .* give one of them'),
    (dict(history=0), ValueError, 'history must be a whole number of at least 1; got 0'),
    (dict(history=10.5), TypeError, 'history must be a whole number of at least 1; got 10.5'),
    (dict(sampling_min=-0.1), ValueError, r'sampling_min must lie in \[0, 1\]; got -0.1'),
    (dict(staleness=0), ValueError, 'staleness must be a whole number of at least 1; got 0'),
    (dict(scale_factor=0), ValueError, r'scale_factor must lie in \(0, 1\]; got 0'),
    (dict(warmup_epochs=-1), ValueError, 'warmup_epochs must be a whole number of at least 0'),
    (dict(beta=2., pick=RankSample(0.5)), ValueError, 'give its numbers to RankSample'),
    (dict(history=10, pick=RankSample(0.5)), ValueError, 'give its numbers to RankSample'),
    (dict(pick=0.5), TypeError, 'pick must be a name'),
    (dict(enlarge=True), ValueError, 'Pass enlarge=False'),
    (dict(staleness=2, forward='reuse'), ValueError, "use forward='twice'"),
    (dict(queue=True, forward='reuse'), ValueError, "Use forward='twice'"),
    (dict(queue=True, pick=Weighted()), ValueError, 'use queue=False'),
    (dict(queue=True, pick=Uniform(0.5), enlarge=True), ValueError, 'use one of them'),
    (dict(queue=True, min_items=4), ValueError, 'Leave min_items out'),
    (dict(quue=True), TypeError, 'quue'),
]


@pytest.mark.parametrize('kwargs,kind,message', BAD)
def test_bad_input_is_refused_at_once(kwargs, kind, message):
    learn = conv_learner()
    with pytest.raises(kind, match=message): learn.selective_backprop(**kwargs)
    assert not hasattr(learn, 'selector')


def test_queue_in_a_distributed_run_is_refused(monkeypatch):
    learn = conv_learner().selective_backprop(queue=True)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='distributed run.*Use queue=False'): check_learner(learn.selector, learn)
    learn.selective_backprop()
    check_learner(learn.selector, learn)


def test_queue_without_a_batch_size_is_refused():
    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self): yield from zip(Rows(N).images.split(BS), Rows(N).targets.split(BS))
        def __len__(self): return N//BS
    dls = DataLoaders(torch.utils.data.DataLoader(Batches(), batch_size=None), DataLoader(Rows(48), bs=48))
    learn = Learner(dls, model(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='with a batch size'), learn.no_bar(), learn.no_logging():
        learn.selective_backprop(queue=True).fit(1)


def test_mixup_with_reuse_is_refused():
    with pytest.raises(ValueError, match="use forward='twice'"):
        fit(conv_learner().selective_backprop(forward='reuse'), 1, cbs=MixUp())


def test_another_method_is_refused():
    learn = conv_learner().selective_backprop()
    with pytest.raises(ValueError, match=r'learn.no_selection\(\)'): learn.rho_loss(torch.rand(N))
    learn.selective_backprop(beta=1) # replaces the first
    assert learn.selector.pick.beta == 1 and not hasattr(learn.no_selection(), 'selector')


def test_regression_losses():
    class Targets(Rows):
        def __getitem__(self, i): return self.images[i], self.targets[i:i+1].float()
    learn = conv_learner(data=Targets, loss_func=MSELossFlat(), metrics=None,
                         model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 1)))
    fit(learn.selective_backprop(1., queue=True), 3)
    assert learn.selection.ledger.selected.iloc[-1] == pytest.approx(0.5, abs=0.2)
