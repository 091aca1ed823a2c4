"REDUCR against NumPy"
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from helpers import examples, fit, learner, loaders
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rholoss_fastai.all import ClassWeights, WorstGroup, class_irreducible, probe_features, restrict_rows
from rholoss_fastai.noise import row_targets
from rholoss_fastai.picks import Uniform


@examples(60)
@given(st.integers(2, 20), st.integers(2, 5), st.floats(0., 3.), st.integers(0, 10**6), st.booleans())
def test_equals_numpy(n, C, eta, seed, nans):
    rng = np.random.default_rng(seed)
    pick, L = ClassWeights(0.4, eta), np.zeros(C)
    for step in range(5):
        loss, il, held_out = rng.gamma(1., size=n), rng.gamma(1., size=(n, C)), rng.gamma(1., size=C)
        if nans and step < 3: loss[0] = np.nan
        w = np.exp(-eta*(L - L.min())); w /= w.sum()
        m = np.maximum(0, loss[:, None] - il)
        score = np.where(np.isnan(loss), -np.inf, m @ w)
        k = max(1, math.floor(0.4*n + 1e-6))
        chosen = np.sort(np.argsort(-score, kind='stable')[:k])
        pick.note_held_out(torch.tensor(held_out))
        loss, il = torch.tensor(loss), torch.tensor(il)
        mine = pick(loss, loss=loss, class_il=il).idxs.numpy()
        assert np.allclose(np.sort(score[mine]), np.sort(score[chosen])) # ties may go either way
        for i in mine:
            if not np.isnan(m[i]).any(): L += m[i] - held_out
        assert np.allclose(pick._sums.numpy(), L)

def by_hand(x, y, c, boost, train, held_out, penalty, n, C):
    "Weighted least squares, by the normal equations of the weighted rows themselves"
    w = np.where(y[train] == c, 1 + boost, 1.)[:, None]
    X, Y = np.c_[x, np.ones(n)], np.eye(C)[y]
    R = penalty*n*np.eye(X.shape[1]); R[-1, -1] = 0
    return X[held_out] @ np.linalg.solve(X[train].T @ (w*X[train]) + R, X[train].T @ (w*Y[train]))

def test_the_references_are_weighted_ridge():
    set_seed(0)
    n, C = 90, 3
    x, y = torch.randn(n, 4), torch.arange(n) % C
    x[:, 0] += y.float()
    table = class_irreducible(x, y, boost=3., folds=3, penalty=0.02)
    z = ((x - x.mean(0))/x.std(0, unbiased=False)).double().numpy()
    fold = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) % 3).numpy()
    for c in range(C):
        pred = np.empty((n, C))
        for k in range(3): pred[fold == k] = by_hand(z, y.numpy(), c, 3., fold != k, fold == k, 0.02, n, C)
        shares = (np.bincount(y.numpy()) + 1)/(n + C)
        def losses(scale):
            return F.cross_entropy(torch.tensor(scale*(pred - shares) + np.log(shares)), y, reduction='none')
        best = min(np.linspace(0.05, 20, 2000), key=lambda s: losses(s).mean().item())
        assert torch.allclose(table[:, c].double(), losses(best), atol=0.03)

def test_memory_of_many_classes():
    "No tensor of predictions by every reference of every class"
    largest = 0
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): largest = max(largest, out.numel())
            return out
    n, C = 60, 20
    with Sizes(): table = class_irreducible(torch.randn(n, 4), torch.arange(n) % C, folds=2)
    assert table.shape == (n, C) and n*C <= largest < 2*n*C

class Items(list):
    def new_empty(self): return Items() # for `export`

def learner_and_table():
    x = torch.randn(160, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3] + torch.tensor([0., 0., -1.])).argmax(1)
    items = list(zip(x, y))
    def dls():
        return DataLoaders(DataLoader(Items(items[:120]), bs=12, shuffle=True), DataLoader(Items(items[120:]), bs=40))
    return learner(dls, lambda: nn.Linear(5, 3), opt_func=Adam, lr=0.1), class_irreducible(x[:120], y[:120])

class HeldOut(Callback):
    "What the pick is told before each epoch"
    order = -6
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.training and self.iter == 0:
            x, y = self.dls.valid.one_batch()
            with torch.no_grad(): losses = F.cross_entropy(self.model(x), y, reduction='none')
            self.seen.append((self.learn.selector.pick._held_out.clone(),
                              torch.stack([losses[y == c].mean() for c in range(3)])))

def test_trains_and_is_undone():
    learn, table = learner_and_table()
    n = len(learn.cbs)
    learn.reducr(table, frac=0.25)
    fit(learn, 3, cbs=(held_out := HeldOut()))
    assert len(held_out.seen) == 3 and all(torch.allclose(a, b, atol=1e-5) for a, b in held_out.seen)
    weights = learn.selector.pick.class_weights
    assert weights.shape == (3,) and weights.sum().item() == pytest.approx(1)
    assert len(learn.no_selection().cbs) == n

def test_references_by_the_probe():
    "Without a table: that of `class_irreducible` on the probe's features, here the inputs' columns, and it is billed"
    learn, _ = learner_and_table()
    learn.reducr(frac=0.25)
    fit(learn, 2)
    x, y = (torch.stack(o) for o in zip(*learn.dls.train.dataset))
    rows, features, targets = probe_features(learn)
    assert torch.equal(rows, torch.arange(120)) and torch.equal(targets, y)
    assert torch.allclose(learn.selector.il_source.values_by_class, class_irreducible(features, targets), atol=1e-5)
    ledger = learn.selection.ledger
    assert ledger.seconds_il[0] > 0 == ledger.seconds_il[1] and ledger.selected.max() < 0.5

@pytest.mark.parametrize('own', [False, True])
def test_suspects_by_the_reference_for_each_rows_class(own):
    learn, table = learner_and_table()
    learn.reducr(table if own else 'probe', frac=0.25)
    fit(learn, 1)
    suspects, table = learn.selection.suspects(5), learn.selector.il_source.values_by_class
    assert np.allclose(suspects.il, table[suspects.row.to_numpy(), suspects.label.to_numpy()])

@pytest.mark.cuda
def test_references_on_cuda():
    learn, table = learner_and_table()
    learn.dls.to('cuda')
    fit(learn.reducr(frac=0.25), 2)
    host = learner_and_table()[0].reducr(frac=0.25)
    assert torch.allclose(learn.selector.il_source.values_by_class, fit(host, 1).selector.il_source.values_by_class,
                          atol=1e-3)

def test_rows_that_the_loader_leaves_out():
    learn, table = learner_and_table()
    kept = torch.arange(0, 120, 2)
    learn.dls = DataLoaders(restrict_rows(learn.dls.train, kept), learn.dls.valid)
    learn.reducr(frac=0.25)
    fit(learn, 1)
    values = learn.selector.il_source.values_by_class
    assert values.shape == (120, 3) and values.isfinite().all()
    assert values[1::2].std(0).max() < 1e-6 < values[::2].std(0).min()

def test_export_without_references(tmp_path):
    for il in ('probe', None):
        learn, table = learner_and_table()
        learn.path = tmp_path
        learn.reducr(table if il is None else il, frac=0.25)
        fit(learn, 1)
        learn.export()
        loaded = load_learner(tmp_path/'export.pkl')
        loaded.dls = learn.dls
        assert len(loaded.validate()) == 1
        for quiet in (nullcontext, loaded.no_logging): # with logging, what it will do is printed before
            with pytest.raises(ValueError, match='give them again to learn.reducr'), loaded.no_bar(), quiet():
                loaded.fit(1)

def test_the_worst_class_gains():
    "A rare class, which plain selection passes over, is trained on more, and its accuracy shows beside the mean"
    set_seed(0)
    n = 600
    y = torch.tensor([0]*270 + [1]*270 + [2]*60)
    x = torch.randn(n, 6) + 1.5*F.one_hot(y, 6)
    order = torch.randperm(n)
    items = [(x[i], y[i]) for i in order]
    ends = {}
    for method in ('reducr', 'uniform'):
        set_seed(1)
        dls = DataLoaders(DataLoader(items[:450], bs=10, shuffle=True), DataLoader(items[450:], bs=150))
        learn = Learner(dls, nn.Linear(6, 3), loss_func=CrossEntropyLossFlat(), lr=0.05,
                        metrics=WorstGroup(accuracy, row_targets(dls.valid), name='worst_class'))
        if method == 'reducr': learn.reducr(frac=0.25)
        else: learn.select(pick='uniform', frac=0.25, enlarge=True)
        fit(learn, 3)
        rare = torch.tensor([int(t) == 2 for _, t in items[:450]])
        ends[method] = learn.selection.selected[rare].sum()/learn.selection.selected.sum(), learn.recorder.values[-1][
            -1]
    assert 'worst_class' in learn.recorder.metric_names and ends['reducr'][0] > ends['uniform'][0]

def test_refused():
    with pytest.raises(ValueError, match='give the DataLoaders a validation set'):
        fit(learner(DataLoaders(loaders().train)).reducr(frac=0.25), 1)
    learn, table = learner_and_table()
    with pytest.raises(ValueError, match='for 100 rows, but the training set has 120'): learn.reducr(table[:100])
    with pytest.raises(ValueError, match=r'expected finite numbers \(n, C\)'): learn.reducr(table[:, 0])
    with pytest.raises(ValueError, match='expected one of probe'): learn.reducr('crossfit')
    with pytest.raises(ValueError, match='give one of them'): ClassWeights(0.2, pick=Uniform(0.5))

def test_other_classes_have_weights_of_their_own():
    pick = ClassWeights(0.5)
    for C in (3, 2):
        pick(torch.rand(4), loss=torch.rand(4), class_il=torch.rand(4, C))
        assert pick.class_weights.shape == (C,)
