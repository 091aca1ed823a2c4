"""Pruning: kept rows against brute force, InfoBatch's rule epoch by epoch, what a loader reads, and processes."""
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ShowGraphCallback  # noqa: F401 (patches `no_bar`)
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches `fit_one_cycle` and `lr_find`)
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize, MultiCategorize, OneHotEncode
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import SGD
from fastai.tabular.data import TabularDataLoaders
from fastai.torch_core import set_seed
from fasttransform import Transform
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_rows import Rows, rows_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from rholoss_fastai.all import (DatasetScores, EpochPruner, ForgettingTracker, IrreducibleLosses, ItemTable, fingerprint, gradient_norm_bound,
                                prune, row_classes, track_rows)

N, BS = 200, 16


class Reads(Rows):
    "Notes the rows that are read"
    def __init__(self, n=N): super().__init__(n); self.read = []
    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def dataloaders(dataset=None, bs=BS, drop_last=False, **kwargs):
    return DataLoaders(DataLoader(dataset or Reads(), bs=bs, shuffle=True, drop_last=drop_last, **kwargs), DataLoader(Rows(32), bs=32), device='cpu')


def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
def learner(dls=None, model=None, **kwargs):
    set_seed(0)
    return Learner(dls or dataloaders(), model or net(), **{**dict(loss_func=CrossEntropyLossFlat(), lr=1e-2), **kwargs})


def fit(learn, n_epoch=1, one_cycle=False, **kwargs):
    with learn.no_bar(), learn.no_logging(): (learn.fit_one_cycle if one_cycle else learn.fit)(n_epoch, **kwargs)
    return learn


def kept(dls, scores, *args, **kwargs): return prune(dls, scores, *args, **kwargs).train.dataset.row_numbers.tolist()
def random_scores(n=N, seed=1): return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# prune

@pytest.mark.parametrize('keep,offset', [(1, 0), (0.5, 0), (0.3, 0.2), (0.004, 0), (0.5, 0.5)])
def test_hardest_easiest_moderate(keep, offset):
    dls, scores = dataloaders(), random_scores()
    order = np.argsort(-scores.numpy())
    size, left_out = max(1, round(keep*N)), round(offset*N)
    if size < 10: dls.train.dataset.targets[:] = 0 # one class: none can vanish
    assert kept(dls, scores, keep, offset=offset) == sorted(order[left_out:left_out+size])
    assert kept(dls, scores, keep, 'easiest', offset) == sorted(order[::-1][left_out:left_out+size])
    il = random_scores(seed=2)
    clean = [o for o in range(N) if o not in np.argsort(-il.numpy())[:left_out]]
    if offset:
        assert kept(dls, scores, keep, offset=offset, il=il) == sorted(sorted(clean, key=lambda o: -scores[o])[:size])
        assert set(kept(dls, scores, keep, 'random', offset, il=il)) <= set(clean)
    else:
        nearest = sorted(range(N), key=lambda o: abs(scores[o] - scores.sort().values[(N-1)//2]))[:size]
        assert kept(dls, scores, keep, 'moderate') == sorted(nearest)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=60), st.floats(0.02, 1), st.integers(1, 20), st.integers(0, 5))
def test_stratified_covers_the_scores(values, keep, n_strata, seed):
    "The number that was asked for, and no stratum is cut short while another one keeps more"
    dls = dataloaders(Rows(len(values)))
    dls.train.dataset.targets[:] = 0
    rows = kept(dls, torch.tensor(values), keep, 'stratified', n_strata=n_strata, seed=seed)
    assert len(set(rows)) == len(rows) == max(1, round(keep*len(values)))
    scores = np.array(values, dtype=np.float32)
    low, width = scores.min(), max(scores.max() - scores.min(), np.finfo(np.float32).tiny)
    stratum = np.minimum(((scores - low)/width*np.float32(n_strata)).astype(int), n_strata - 1)
    of = {o: (sum(stratum[rows] == o), sum(stratum == o)) for o in set(stratum)}
    most = max(k for k,_ in of.values())
    for k,size in of.values(): assert k == size or k >= most - 1


def test_ties_and_seeds():
    "Equal scores are broken at random: a data set sorted by class keeps all of them"
    rows = Rows(N)
    rows.targets = rows.targets.sort().values
    dls, scores = dataloaders(rows), torch.zeros(N)
    for strategy in ('hardest', 'easiest', 'moderate', 'random', 'stratified'):
        first, again, other = (kept(dls, scores, 0.3, strategy, seed=seed) for seed in (0, 0, 1))
        assert first == again != other and set(rows.targets[first].tolist()) == {0, 1, 2}
    state = torch.get_rng_state()
    kept(dls, scores, 0.3, 'random')
    assert torch.equal(state, torch.get_rng_state())
    counts = torch.zeros(N)
    for seed in range(60): counts[kept(dls, scores, 0.5, 'random', seed=seed)] += 1
    assert counts.min() > 10 and counts.max() < 50 # every row about as often


def test_rows_keep_their_numbers_and_nothing_else_is_read():
    dls, scores = dataloaders(num_workers=0, drop_last=True), random_scores()
    il = IrreducibleLosses.of(random_scores(seed=2), dls.train)
    pruned = prune(dls, DatasetScores.of(scores, dls.train), 0.25, 'random')
    rows = pruned.train.dataset.row_numbers
    dls.train.dataset.read.clear()
    assert fingerprint(pruned.train) == fingerprint(dls.train) and pruned.valid is dls.valid and len(dls.train.dataset) == N
    assert pruned.train.bs == BS and pruned.train.drop_last and pruned.train.shuffle and pruned.device == dls.device
    dls.train.dataset.read.clear()
    loader = track_rows(pruned.train)
    for i,(x,y) in enumerate(loader):
        assert torch.equal(loader.rows(i), rows_of(x)) and torch.equal(y, dls.train.dataset.targets[rows_of(x)])
    assert sorted(dls.train.dataset.read) == rows.tolist() # each once
    learn = fit(learner(pruned).rho_loss(il, frac=0.5), 2)
    assert set(learn.selection.seen.nonzero().flatten().tolist()) <= set(rows.tolist())
    twice = prune(pruned, scores, 0.5)
    assert twice.train.dataset.row_numbers.tolist() == sorted(sorted(rows.tolist(), key=lambda o: -scores[o])[:25])


def test_workers_and_augmentation_stay():
    class Noise(Transform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + torch.rand(()) if x.ndim else x
    rows = Rows(40)
    def image(i): return rows.images[i]
    def label(i): return 'abc'[rows.targets[i]]
    dls = Datasets(range(40), [[image, Noise()], [label, Categorize(vocab=list('abc'))]], splits=[list(range(32)), list(range(32, 40))]).dataloaders(
        bs=4, dl_type=TfmdDL, num_workers=2, device='cpu')
    pruned = prune(dls, random_scores(32), 0.5)
    assert pruned.train.fake_l.num_workers == 2 and pruned.vocab == dls.vocab and pruned.c == 3
    loader = track_rows(pruned.train)
    for i,(x,y) in enumerate(loader):
        assert torch.equal(y, rows.targets[loader.rows(i)]) and not torch.equal(x, rows.images[loader.rows(i)])
    torch_dls = DataLoaders(TorchDataLoader(rows, 4, shuffle=True, num_workers=2), TorchDataLoader(rows, 4))
    pruned = prune(torch_dls, random_scores(40), 0.5)
    loader = track_rows(pruned.train)
    for i,(_,y) in enumerate(loader): assert torch.equal(y, rows.targets[loader.rows(i)])
    assert pruned.train.num_workers == 2 and len(pruned.train) == 5


def test_classes():
    rows = Rows(N)
    watched = []
    def image(i):
        assert not watched, 'an image was decoded'
        return rows.images[i]
    def label(i): return 'abc'[rows.targets[i]]
    def two_labels(i): return ['a', 'abc'[rows.targets[i]]]
    def loader(*tfms): return Datasets(range(N), [[image], *tfms]).dataloaders(bs=4, device='cpu').train
    frame = pd.DataFrame(dict(a=np.arange(N)/N, label=[label(i) for i in range(N)]))
    tabular = TabularDataLoaders.from_df(frame, cont_names=['a'], y_names='label', valid_idx=list(range(150, N)), device='cpu').train
    x, y = rows.images, rows.targets
    named, several = loader([label, Categorize(vocab=list('abc'))]), loader([two_labels, MultiCategorize(vocab=list('abc')), OneHotEncode(3)])
    watched.append(1) # fastai reads an item when it makes a loader
    for dl,n in ((named, N), (DataLoader(rows, bs=9), N), (TorchDataLoader(TensorDataset(x, y), 7, shuffle=True), N),
                 (tabular, 150), (DataLoader(list(zip(x, y)), bs=8, shuffle=True), N)):
        assert torch.equal(row_classes(dl), y[:n])
    pruned = prune(DataLoaders(DataLoader(list(zip(x, y)), bs=8, shuffle=True), DataLoader(rows)), random_scores(), 0.2)
    assert torch.equal(row_classes(pruned.train), y[pruned.train.dataset.row_numbers])
    for dl in (several, DataLoader(list(zip(x, y.float()))), DataLoader(list(zip(x, x))), DataLoader(list(x))):
        assert row_classes(dl) is None


def test_per_class_and_vanishing_classes():
    rows = Rows(N)
    rows.targets = torch.tensor([0]*120 + [1]*75 + [2]*5)
    dls, scores = dataloaders(rows), random_scores() + rows.targets # the rarest class is the hardest
    for strategy in ('hardest', 'easiest', 'moderate', 'random', 'stratified'):
        assert rows.targets[kept(dls, scores, 0.1, strategy, per_class=True)].bincount().tolist() == [12, 8, 1]
    order = scores[:120].argsort(descending=True)[:12].tolist()
    assert set(order) <= set(kept(dls, scores, 0.1, per_class=True))
    with pytest.raises(ValueError, match='No row of class 0 would be left of 120'): prune(dls, scores, 0.2)
    with pytest.raises(ValueError, match='No row of class 1, 2 would be left of 80'): prune(dls, scores, 0.2, 'easiest')
    prune(dls, scores, 0.6)
    regression = dataloaders(list(zip(rows.images, rows.targets.float())))
    assert len(kept(regression, scores, 0.1)) == 20
    with pytest.raises(ValueError, match='needs one class a row'): prune(regression, scores, per_class=True)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(keep=0), ValueError, r'keep must lie in \(0, 1\]; got 0'), (dict(keep=1.01), ValueError, 'got 1.01'), (dict(keep='half'), TypeError, 'keep'),
    (dict(keep=0.7, offset=0.4), ValueError, 'more than the whole'), (dict(offset=-0.1), ValueError, 'offset'), (dict(n_strata=0), ValueError, 'n_strata'),
    (dict(strategy='hard'), ValueError, 'strategy must be one of'), (dict(strategy='moderate', offset=0.1), ValueError, "doesn't choose"),
    (dict(il=torch.rand(N)), ValueError, 'offset=0 leaves out none'), (dict(offset=0.1, il=torch.rand(3)), ValueError, '3 values for a data set of 200 rows'),
    (dict(seed=-1), ValueError, 'seed'),
])
def test_bad_settings_of_prune(kwargs, error, message):
    with pytest.raises(error, match=message): prune(dataloaders(), random_scores(), **kwargs)


def test_scores_of_another_data_set(tmp_path):
    dls, other = dataloaders(), dataloaders(Rows(150))
    table = DatasetScores.of(random_scores(150), other.train)
    with pytest.raises(ValueError, match='DatasetScores for 150 rows'): prune(dls, table)
    file = DatasetScores.of(random_scores(), dls.train).save(tmp_path/'scores')
    assert kept(dls, file) == kept(dls, random_scores())
    dls.train.dataset.targets = (dls.train.dataset.targets + 1) % 3
    with pytest.raises(ValueError, match='targets differ'): prune(dls, file)
    with pytest.raises(ValueError, match='200 values|150 values'): prune(dls, random_scores(150))
    with pytest.raises(ValueError, match='NaN or infinite'): prune(dls, torch.full((N,), torch.nan))
    with pytest.raises(TypeError, match='dls must be DataLoaders'): prune(dls.train, random_scores())


# Epochs pruned by InfoBatch's rule

class Watch(Callback):
    "What each epoch trained on, row by row: its rows, their losses by a forward in the same mode, and the loss that was minimised"
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
            assert not (dropped & ~below).any() and k in {max(1, round((1 - ratio)*m)), max(1, round((1 - ratio)*m)) + 1} and len(trained) % bs != 1
            weight[below] = m/k
        else: assert not dropped.any()
        for r,l,got in zip(rows, losses, minimised): assert abs(got - (weight[r]*l).mean().item()) < 1e-5
        remembered[trained] = torch.cat(losses)
    return remembered


@pytest.mark.parametrize('n_epoch,ratio,delta', [(1, 0.5, 0.875), (3, 0.5, 0.875), (8, 0.5, 0.875), (7, 0.9, 0.5), (6, 0.3, 1.), (4, 0.7, 0.)])
def test_the_rule_for_any_number_of_epochs(n_epoch, ratio, delta):
    learn, watch = learner().prune_epochs(ratio, delta), Watch()
    fit(learn, n_epoch, cbs=watch)
    remembered = check_rule(watch, n_epoch, ratio, delta)
    assert torch.equal(learn.epoch_pruner.remembered, remembered)
    trained = [len(torch.cat(o)) for o in watch.rows]
    ledger = learn.selection.ledger
    assert ledger.trained.tolist() == ledger.loaded.tolist() == trained and ledger.scored.sum() == 0
    assert np.allclose(ledger.selected, np.array(trained)/N) and [o < N for o in trained] == [0 < e < int(delta*n_epoch + 1e-6) for e in range(n_epoch)]
    assert learn.selection.selected.tolist() == torch.cat([r for o in watch.rows for r in o]).bincount(minlength=N).tolist()


@pytest.mark.parametrize('workers', [0, 2])
def test_nothing_dropped_is_read(workers):
    dls = dataloaders(num_workers=workers)
    learn, watch = learner(dls).prune_epochs(0.8), Watch()
    if workers == 0:
        class Read(Callback):
            def before_train(self): dls.train.dataset.read.clear()
            def after_train(self): assert sorted(dls.train.dataset.read) == sorted(torch.cat(watch.rows[-1]).tolist())
        learn.add_cb(Read())
    fit(learn, 5, cbs=watch)
    check_rule(watch, 5, 0.8, 0.875)


def test_expected_gradient_is_that_of_everything():
    "With a rate of 0 the losses stay as they are, and the sums over an epoch's batches average out to the whole data set's gradient"
    class Sum(Callback):
        order = 90
        def before_fit(self): self.sums, self.n = torch.zeros(3, 36), 0
        def before_backward(self): self.bs = len(self.y)
        def after_backward(self):
            if 0 < self.epoch < 200: self.sums += self.model[1].weight.grad*self.bs
        def after_train(self): self.n += 0 < self.epoch < 200
    model, rows = linear(), Rows(40)
    learn, sums = learner(dataloaders(rows, bs=20), model, opt_func=SGD).prune_epochs(0.7, 1.), Sum()
    fit(learn, 200, lr=0., cbs=sums)
    assert learn.selection.ledger.selected[1:].max() < 0.8
    F.cross_entropy(model(rows.images), rows.targets, reduction='sum').backward()
    full = model[1].weight.grad
    spread = (sums.sums/sums.n - full).norm()/full.norm()
    assert spread < 0.12
    plain, sums = learner(dataloaders(rows, bs=20), model, opt_func=SGD).prune_epochs(0.7, 1., weighted=False), Sum()
    fit(plain, 50, lr=0., cbs=sums)
    assert (sums.sums/sums.n - full).norm()/full.norm() > 2*spread # it is the weights that do it


def test_without_pruning_nothing_changes():
    def weights(prepare, n_epoch=3):
        learn = prepare(learner())
        fit(learn, n_epoch)
        return torch.cat([o.flatten() for o in learn.model.state_dict().values()])
    plain = weights(lambda learn: learn)
    for prepare in (lambda o: o.prune_epochs(0.), lambda o: o.prune_epochs(delta=0.), lambda o: o.prune_epochs(delta=0.3),
                    lambda o: o.prune_epochs().no_pruning()):
        assert torch.equal(weights(prepare), plain)
    assert not torch.equal(weights(lambda o: o.prune_epochs()), plain)
    assert torch.equal(weights(lambda o: o.prune_epochs(seed=1), 4), weights(lambda o: o.prune_epochs(seed=1), 4))
    assert not torch.equal(weights(lambda o: o.prune_epochs(seed=1), 4), weights(lambda o: o.prune_epochs(seed=2), 4))


def test_draws_come_from_a_generator_of_its_own():
    "The same rows whatever the global state, which isn't moved by drawing"
    def drawn(disturb):
        set_seed(0)
        learn, watch = learner(model=linear()).prune_epochs(seed=3), Watch()
        class Disturb(Callback):
            order = -20
            def before_train(self): disturb()
        fit(learn, 4, lr=0., cbs=[watch, Disturb()])
        return [set(torch.cat(o).tolist()) for o in watch.rows]
    assert drawn(lambda: None) == drawn(lambda: (torch.rand(9), np.random.rand(9)))
    learn = fit(learner().prune_epochs(), 2)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    learn.epoch_pruner._draw()
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()


def test_schedules_see_the_true_number_of_steps():
    seen = []
    class Steps(Callback):
        order = 90
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.pct_train, self.learn.n_iter))
    learn = fit(learner().prune_epochs(0.8), 6, one_cycle=True, cbs=Steps())
    n_iter = [-(-o//BS) for o in learn.selection.ledger.trained]
    assert min(n_iter) < max(n_iter) == 13
    expected = [(e, (e + i/n)/6, n) for e,n in enumerate(n_iter) for i in range(n)]
    assert [o[::2] for o in seen] == [o[::2] for o in expected] and np.allclose([o[1] for o in seen], [o[1] for o in expected])
    assert len(learn.recorder.lrs) == sum(n_iter) and abs(learn.pct_train - 1) < 1e-6
    assert max(learn.recorder.lrs) == pytest.approx(1e-2, rel=0.05) and learn.recorder.lrs[-1] < 1e-2/20


def test_weights_before_gradients_accumulate():
    "The gradient of a step over two batches is the sum of weighted item losses over the number of items"
    grads = []
    class Keep(Callback):
        order = 91
        def before_step(self): grads.append(self.model[1].weight.grad.clone())
    model, rows = linear(), Rows(12*BS)
    learn, watch = learner(dataloaders(rows), model, opt_func=SGD).prune_epochs(0.5, 1.), Watch()
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
        learn = fit(learner().prune_epochs(score=score, il=None if score is gradient_norm_bound else il), 4, cbs=Expect())
        assert torch.allclose(learn.epoch_pruner.remembered, seen, atol=1e-6) and learn.selection.ledger.selected.min() < 1


def test_reducible_leaves_noise_out_and_is_unweighted():
    rows = Reads()
    noise = torch.rand(N, generator=torch.Generator().manual_seed(5)) < 0.2
    rows.targets = torch.where(noise, (rows.targets + 1) % 3, rows.targets)
    il = torch.where(noise, 6., 0.1)
    times = {}
    for score in ('loss', 'reducible'):
        learn, watch = learner(dataloaders(rows)).prune_epochs(0.8, score=score, il=il), Watch()
        fit(learn, 8, cbs=watch)
        counts = learn.selection.selected.float()
        times[score] = (counts[noise].mean()/counts[~noise].mean()).item()
        for losses,loss in zip(watch.losses[1:6], watch.loss[1:6]):
            unweighted = np.allclose([o.mean().item() for o in losses], loss, atol=1e-5)
            assert unweighted == (score == 'reducible')
    assert times['reducible'] < 0.7 < 1.2 < times['loss']
    weighted = learner(dataloaders(rows)).prune_epochs(0.8, score='reducible', il=il, weighted=True)
    watch = Watch()
    fit(weighted, 3, cbs=watch)
    assert not np.allclose([o.mean().item() for o in watch.losses[1]], watch.loss[1], atol=1e-4)


@pytest.mark.parametrize('refresh', [2, 3])
def test_refresh(refresh):
    selected = fit(learner().prune_epochs(0.9, 1., refresh=refresh), 8).selection.ledger.selected
    assert [o == 1 for o in selected] == [e % refresh == 0 for e in range(8)]


def test_memory_over_several_fits():
    learn, watch = learner().prune_epochs(), Watch()
    fit(learn, 3)
    fit(learn, 4, cbs=watch)
    assert learn.selection.ledger.selected.lt(1).tolist() == [False, True, False] + [True]*3 + [False] # the second fit begins with what the first remembered
    learn.dls = dataloaders(Reads(100))
    fit(learn, 3)
    assert learn.selection.ledger.selected.lt(1).tolist()[-3:] == [False, True, False] and len(learn.epoch_pruner.remembered) == 100


def test_of_a_pruned_data_set():
    "Both ways together"
    dls = prune(dataloaders(), random_scores(), 0.5, 'random')
    rows = set(dls.train.dataset.row_numbers.tolist())
    learn, watch = learner(dls).prune_epochs(), Watch()
    fit(learn, 4, cbs=watch)
    trained = [set(torch.cat(o).tolist()) for o in watch.rows]
    assert trained[0] == trained[3] == rows and trained[1] < rows and learn.selection.ledger.selected[1] == len(trained[1])/100


@pytest.mark.parametrize('n', range(66, 78))
def test_a_last_batch_is_never_a_single_item(n):
    "Which batch norm in training mode refuses"
    learn = fit(learner(dataloaders(Reads(n))).prune_epochs(0.5, 1., seed=n), 4)
    assert all(o % BS != 1 for o in learn.selection.ledger.trained)


def test_rows_without_a_number_stay():
    "A loss that isn't finite, or isn't known, says nothing"
    learn = fit(learner().prune_epochs(0.9, 1.), 2)
    for value in (torch.nan, torch.inf, -torch.inf):
        learn.epoch_pruner.remembered[[3, 50]] = value
        for _ in range(20):
            rows, weights = learn.epoch_pruner._draw()
            assert {3, 50} <= set(rows.tolist()) and weights[[3, 50]].tolist() == [1, 1] and len(rows) < 0.7*N and weights.isfinite().all()


def test_other_callbacks_and_calls(tmp_path):
    learn = learner(path=tmp_path, metrics=lambda pred, targ: pred.sum()).prune_epochs()
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
    assert learn.recorder.metric_names.count('selected') == 1 and len(learn.metrics) == 1 and learn.selection.ledger.selected.iloc[-1] == 1
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    assert loaded.epoch_pruner.remembered is None
    loaded.dls = learn.dls
    fit(loaded, 3)
    assert loaded.selection.ledger.selected.lt(1).tolist()[-3:] == [False, True, False]
    learn.prune_epochs(0.2)
    assert len([cb for cb in learn.cbs if isinstance(cb, EpochPruner)]) == 1
    assert learn.epoch_pruner.ratio == 0.2 and learn.selection is learn.epoch_pruner.record
    learn.no_pruning()
    fit(learn, 1)
    assert not any(isinstance(cb, EpochPruner) for cb in learn.cbs) and 'selected' not in learn.recorder.metric_names


def test_selection_and_mixup_are_refused():
    for first,second in ((lambda o: o.prune_epochs(), lambda o: o.batch_loss_filter()), (lambda o: o.batch_loss_filter(), lambda o: o.prune_epochs())):
        with pytest.raises(ValueError, match='one of them|no_pruning|no_selection'): fit(second(first(learner())), 1)
    with pytest.raises(ValueError, match='makes one item of two'): fit(learner().prune_epochs(), 1, cbs=MixUp())
    with pytest.raises(ValueError, match='makes one item of two'): learner(cbs=MixUp()).prune_epochs()


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(ratio=1), ValueError, r'ratio must lie in \[0, 1\); got 1'), (dict(ratio=1.2), ValueError, 'ratio'), (dict(ratio='half'), TypeError, 'ratio'),
    (dict(delta=-0.1), ValueError, 'delta must lie in'), (dict(delta=1.1), ValueError, 'delta must lie in'),
    (dict(score='el2n'), ValueError, "score is 'el2n'"), (dict(score='bald'), ValueError, 'passes'),
    (dict(score='reducible'), ValueError, 'needs irreducible losses'), (dict(refresh=1), ValueError, 'refresh'), (dict(refresh=2.5), TypeError, 'refresh'),
    (dict(score='reducible', il=torch.rand(7)), ValueError, '7 values for a data set of 200'), (dict(seed=-1), ValueError, 'seed'),
    (dict(score='reducible', il=torch.full((N,), torch.nan)), ValueError, 'NaN'), (dict(score=lambda margin: 0), ValueError, 'parameters'),
])
def test_bad_settings_of_prune_epochs(kwargs, error, message):
    with pytest.raises(error, match=message): learner().prune_epochs(**kwargs)


def test_bad_loaders():
    stream = DataLoaders(DataLoader(iter(range(9)), bs=3), DataLoader(Rows(9)))
    with pytest.raises(ValueError, match="can't be known"): fit(Learner(stream, net(), loss_func=CrossEntropyLossFlat()).prune_epochs(), 1)
    with pytest.raises(ValueError, match="can't be known"): prune(stream, random_scores(9))
    with pytest.raises(ValueError, match='An epoch has no batches'): fit(learner(dataloaders(Reads(70), bs=64, drop_last=True)).prune_epochs(0.9), 3)
    class Drops(Callback):
        order = -6
        def before_batch(self):
            if self.training: self.learn.xb, self.learn.yb = (self.x[1:],), (self.y[1:],)
    with pytest.raises(ValueError, match='15 items, but 16 rows'): fit(learner().prune_epochs(), 1, cbs=Drops())


def test_other_tasks():
    "Regression with a loss that gives one number, in a PyTorch loader"
    rows = Rows(N)
    data = TensorDataset(rows.images, rows.images.mean((1, 2, 3)) + torch.arange(N)/50)
    dls = DataLoaders(TorchDataLoader(data, BS, shuffle=True), TorchDataLoader(data, 50))
    for loss_func in (MSELossFlat(), lambda pred, targ: ((pred.squeeze(-1) - targ)**2).mean()):
        learn = fit(learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), loss_func=loss_func).prune_epochs(), 4)
        assert learn.selection.ledger.selected[1:3].max() < 1 and learn.recorder.values[-1][0] < learn.recorder.values[0][0]


# Several processes

script = '''
import sys, os
sys.path.insert(0, os.path.dirname({path!r}))
from test_pruning import *
from distributed_rho_loss import broadcast
from fastai.distributed import DistributedDL
import torch.distributed as dist
DistributedDL._broadcast = broadcast
learn = learner(dataloaders(Rows(N)), linear()).prune_epochs()
if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
tracker, watch = ForgettingTracker(), Watch()
with learn.distrib_ctx(sync_bn=False), learn.no_logging(): learn.fit(4, cbs=[tracker, watch])
torch.save(dict(rows=[torch.cat(o) for o in watch.rows], losses=[torch.cat(o) for o in watch.losses], remembered=learn.epoch_pruner.remembered,
                ledger=learn.selection.ledger.to_dict('list'), forgotten=tracker.forgotten, learnt=tracker.learnt), {out!r} + str(dist.get_rank()))
'''


def test_two_processes(tmp_path):
    pytest.importorskip('accelerate', reason='distributed training needs accelerate')
    (tmp_path/'run.py').write_text(script.format(path=__file__, out=str(tmp_path/'rank')))
    env = dict(os.environ, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(tmp_path/'run.py')], env=env,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    ranks = [torch.load(tmp_path/f'rank{rank}', weights_only=False) for rank in (0, 1)]
    for key in ('remembered', 'forgotten', 'learnt'): assert torch.equal(ranks[0][key], ranks[1][key])
    remembered = torch.full((N,), torch.nan)
    for epoch in range(4):
        rows, losses = (torch.cat([o[key][epoch] for o in ranks]) for key in ('rows', 'losses'))
        below = remembered < remembered.nanmean() + 1e-6
        dropped = torch.ones(N, dtype=torch.bool).index_fill_(0, rows, False)
        assert not (dropped & ~below).any() and bool(dropped.any()) == (0 < epoch < 3)
        assert len(rows) - len(rows.unique()) <= 1 # one row twice where their number is odd: the mean of both losses counts
        sums = torch.zeros(2, N).index_add_(1, rows, torch.stack([losses, torch.ones_like(losses)]))
        remembered = remembered.where(sums[1] == 0, sums[0]/sums[1])
        assert ranks[0]['ledger']['trained'][epoch] == len(rows)
    assert torch.allclose(ranks[0]['remembered'], remembered, atol=1e-6)



# What is refused

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(reduction='sum'), CrossEntropyLossFlat(weight=torch.tensor([1., 5., 0.2]))],
                         ids=['sum', 'class weights'])
def test_a_loss_that_is_not_the_mean_of_its_items(loss_func):
    "Weighted epochs would be on another scale than the others"
    with pytest.raises(ValueError, match="isn't the mean of its items' losses"): fit(learner(loss_func=loss_func).prune_epochs(), 2)
    fit(learner(loss_func=loss_func).prune_epochs(weighted=False), 2)


def test_fewer_rows_than_a_batch():
    with pytest.raises(ValueError, match='10 rows are left, fewer than a batch'): prune(dataloaders(drop_last=True), random_scores(), 0.05)


def test_a_table_with_nan_is_no_score():
    table = ItemTable(random_scores().index_fill(0, torch.tensor([3]), float('nan')), fingerprint(dataloaders().train))
    with pytest.raises(ValueError, match='1 of 200 scores are NaN or infinite, the first in rows'): prune(dataloaders(), table, 0.5)


def test_an_interrupted_lr_find_does_not_switch_it_off():
    class Interrupt(Callback):
        def after_loss(self):
            if self.iter == 2: raise KeyboardInterrupt
    learn = learner().prune_epochs(delta=1.)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=5, show_plot=False)
    fit(learn, 3)
    assert learn.selection.ledger.trained.iloc[-1] < N
    tracked = learner(cbs=ForgettingTracker())
    with tracked.no_bar(), tracked.no_logging(), tracked.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): tracked.lr_find(num_it=5, show_plot=False)
    assert fit(tracked, 2).forgetting_tracker.n_epochs == 2


@pytest.mark.cuda
def test_on_cuda_without_waiting():
    learn = fit(learner(dataloaders(Rows(N)).to('cuda'), net().cuda()).prune_epochs(), 4)
    assert learn.epoch_pruner.remembered.is_cuda and learn.selection.ledger.selected.min() < 1
    half = learner(dataloaders(Rows(N)).to('cuda'), net().cuda()).to_fp16().prune_epochs()
    fit(half, 4)
    assert half.epoch_pruner.remembered.isfinite().all()
    class Strict(Callback):
        order = -4
        def before_batch(self):
            if self.training: torch.cuda.set_sync_debug_mode('error')
        def after_loss(self): torch.cuda.set_sync_debug_mode('default')
    fit(learn, 2, cbs=Strict())
