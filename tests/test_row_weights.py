"""Rows that count more: the loss that is trained on, against closed forms, under every loss function and beside other
callbacks."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from helpers import examples, fit
from hypothesis import given
from hypothesis import strategies as st
from numbered_rows import BS, VALID, Interrupt, N, Noted, Rows, item_losses, loaders, row_learner, rows_of
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import (
    FitCallback,
    ForgettingTracker,
    GroupDRO,
    LossHistory,
    RowWeights,
    WorstGroup,
    prune,
    restrict_rows,
    track_rows,
    weigh_loss,
    weighted_loaders,
)


@pytest.mark.parametrize('adjustment', [0., 3.])
def test_group_dro_follows_its_formula(adjustment):
    """A model that stands still (lr 0): the weights of the groups, and each batch's loss and gradient, in float64 from
    the rows in the batch"""
    codes = torch.arange(N) % 4 % 3 # sizes 120, 60, 60
    codes[7], names = 3, 'abcd' # one row alone: absent from most batches
    groups, noted, eta = [names[i] for i in codes], Noted(), 0.3
    learn = row_learner(loaders(), lr=0.)
    dro = GroupDRO(groups, eta=eta, adjustment=adjustment)
    fit(learn, 2, cbs=[dro, noted])
    losses, n_g = item_losses(learn.model).detach().double(), codes.bincount().double()
    q, history = torch.full((4,), 0.25, dtype=torch.double), []
    for i, (rows, loss) in enumerate(noted.batches):
        mine = codes[rows]
        of_group = {g: losses[rows][mine == g].mean() for g in mine.unique().tolist()}
        for g, mean in of_group.items(): q[g] = q[g]*torch.exp(eta*(mean + adjustment/n_g[g].sqrt()))
        q = q/q.sum()
        assert abs(loss - sum(q[g]*mean for g, mean in of_group.items())) < 1e-5
        if (i + 1) % 8 == 0: history.append(q.tolist())
    np.testing.assert_allclose(dro.table.to_numpy(), history, rtol=1e-5)
    rows, _ = noted.batches[-1]
    expected = sum(q[g].float()*item_losses(learn.model, rows)[codes[rows] == g].mean()
                   for g in codes[rows].unique().tolist())
    gradient, = torch.autograd.grad(expected, learn.model[1].weight)
    torch.testing.assert_close(noted.gradients[-1], gradient, rtol=1e-4, atol=1e-6)
    assert list(dro.table.columns) == list(names) and learn.dls.train.__dict__.get('rows') is None


@examples(15)
@given(upweight=st.floats(1, 100), share=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_upweighted_rows_weigh_exactly_that_much(upweight, share, seed):
    """Expected counts of sampling, and the loss's weights: both lambda/(n + (lambda-1)k) for a row of the k in the
    set, and 1/(...) for the others"""
    chosen = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share
    weights = torch.where(chosen, upweight, 1.)
    expected = weights.double()/(N + (upweight - 1)*chosen.sum())
    np.testing.assert_allclose(weighted_loaders(loaders(), weights).train.wgts, expected, rtol=1e-6)
    callback = RowWeights(weights)
    learn = row_learner(loaders(), lr=0.)
    noted = Noted()
    fit(learn, cbs=[callback, noted])
    losses = item_losses(learn.model).detach()
    for rows, loss in noted.batches:
        assert abs(loss - (N*expected[rows]*losses[rows]).mean().item()) < 1e-4*max(1, upweight)
    # an epoch goes through each row once
    assert sorted(torch.cat([rows for rows, _ in noted.batches]).tolist()) == list(range(N))


def test_weighted_loaders_draw_by_weight_and_know_their_rows():
    some = torch.arange(0, N, 2)
    dls = loaders(num_workers=0)
    dls.loaders = [restrict_rows(dls.train, some), dls.valid]
    weights = torch.ones(N).index_fill(0, torch.arange(0, 40), 9.) # 20 of the 120 rows
    weighted = weighted_loaders(dls, weights)
    set_seed(0)
    loader, counts = track_rows(weighted.train), torch.zeros(N)
    for _ in range(60):
        for i, (x, _) in enumerate(loader):
            assert torch.equal(rows_of(x), loader.rows(i))
            counts += loader.rows(i).bincount(minlength=N)
    assert len(weighted.train) == len(dls.train) and counts.sum() == 60*120 and not counts[1::2].any()
    heavy, light = counts[:40:2].mean(), counts[40::2].mean()
    assert abs(heavy/light - 9) < 0.6 # about 4 standard deviations of the ratio
    dls.loaders = [WeightedDL(Rows(), bs=BS, wgts=np.linspace(1, 3, N), shuffle=True), dls.valid]
    drawn = weighted_loaders(dls, weights).train.wgts # what is weighted already: the product
    np.testing.assert_allclose(drawn[0]/drawn[-1], 9/3)


def test_lr_find_and_pruned_rows_leave_the_groups_alone():
    groups = ['ab'[i % 2] for i in range(N)]
    learn = row_learner(prune(loaders(), torch.arange(N).float(), 0.5), cbs=GroupDRO(groups))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    fit(learn, 1)
    assert len(learn.group_dro.table) == 1
    fit(learn, 1)
    assert len(learn.group_dro.table) == 2 # goes on where it was


def test_an_interrupted_lr_find_does_not_switch_it_off():
    learn = row_learner(loaders(), cbs=GroupDRO(['ab'[i % 2] for i in range(N)]))
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt):
        learn.lr_find(num_it=5, show_plot=False)
    assert len(fit(learn, 1).group_dro.table) == 1


def test_a_loaded_learner_predicts(tmp_path):
    "An export leaves the training set out, which the groups were of"
    learn = fit(row_learner(loaders(), path=tmp_path, cbs=GroupDRO(['ab'[i % 2] for i in range(N)])), 1)
    learn.export('learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'learner.pkl')
    with loaded.no_bar(): preds = loaded.get_preds(dl=DataLoader(VALID, bs=25))[0]
    assert torch.allclose(preds, learn.model.eval()(VALID.images).softmax(1), atol=1e-5)


def test_group_dro_is_in_float32_under_autocast():
    "Half precision would round the sums of a group, and overflow in a scaled backward"
    learn = row_learner(loaders(), cbs=GroupDRO(['ab'[i % 2] for i in range(N)]))
    kinds = []
    class Kind(Callback):
        def after_loss(self): kinds.append(self.learn.loss_grad.dtype)
    with torch.autocast('cpu', torch.bfloat16): fit(learn, 1, cbs=Kind())
    assert set(kinds) == {torch.float32}


CLASS_WEIGHTS = torch.tensor([0.2, 1., 5.])
LOSSES = {
    'cross entropy': (CrossEntropyLossFlat(), 'class'),
    'class weights': (CrossEntropyLossFlat(weight=CLASS_WEIGHTS), 'class'),
    'torch class weights': (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), 'class'),
    'sum': (CrossEntropyLossFlat(reduction='sum'), 'class'),
    'weights and sum': (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction='sum'), 'class'),
    'ignored class': (CrossEntropyLossFlat(ignore_index=1), 'class'),
    'class weights and ignored': (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1), 'class'),
    'focal': (FocalLossFlat(), 'class'),
    'smoothing': (LabelSmoothingCrossEntropy(), 'class'), 'smoothing flat': (LabelSmoothingCrossEntropyFlat(), 'class'),
    'multi margin': (nn.MultiMarginLoss(), 'class'), 'function': (F.cross_entropy, 'class'),
    'own': (lambda p, t: F.cross_entropy(p, t)*3, 'class'),
    'multi-label': (BCEWithLogitsLossFlat(), 'multi'),
    'pos_weight': (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1., 3., 9.])), 'multi'),
    'multi-label sum': (nn.BCEWithLogitsLoss(reduction='sum'), 'multi'),
    'soft margin': (nn.MultiLabelSoftMarginLoss(), 'multi'),
    'mse': (MSELossFlat(), 'number'), 'mse sum': (nn.MSELoss(reduction='sum'), 'number'),
    'l1': (L1LossFlat(), 'number'), 'huber': (nn.HuberLoss(), 'number')}


class Targets(Rows):
    "Of every kind"
    def __init__(self, kind, n=N):
        super().__init__(n)
        self.kinds = dict(multi=(F.one_hot(self.targets, 3) + F.one_hot((self.targets + 1) % 3, 3)).float(),
                          number=torch.randn(n, 3))
        self.targets = self.kinds.get(kind, self.targets)


class Trained(Callback):
    "The loss trained on, and what the loss function in force says of the same items"
    order, run_valid = 5, False
    def before_fit(self): self.batches = []
    def after_loss(self):
        self.batches.append((rows_of(self.xb[0]), self.learn.loss_grad.double().item(),
                             self.loss_func(self.pred, *self.yb).double().item()))
    def ratios(self): return [a/b for _, a, b in self.batches]


def losses_of(name, *cbs, shuffle=True, lr=1e-3):
    "Train a model a little on a loss, with callbacks"
    loss_func, kind = LOSSES[name]
    dls, noted = DataLoaders(DataLoader(Targets(kind), bs=BS, shuffle=shuffle),
                             DataLoader(Targets(kind, 60), bs=25)), Trained()
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), loss_func, lr=lr)
    fit(learn, cbs=[*cbs, noted])
    return learn, noted


@pytest.mark.parametrize('name', LOSSES)
def test_rows_that_weigh_the_same_train_on_the_loss_function_itself(name):
    np.testing.assert_allclose(losses_of(name, RowWeights([7]*N))[1].ratios(), 1, rtol=1e-6)
    halves = (torch.arange(N) % 2).tolist() # every batch in order holds as many of each
    np.testing.assert_allclose(losses_of(name, GroupDRO(halves, eta=1e-9), shuffle=False)[1].ratios(), 1, rtol=1e-6)


@pytest.mark.parametrize('name', ['cross entropy', 'class weights', 'sum', 'weights and sum', 'ignored class',
                                  'class weights and ignored', 'mse', 'mse sum'])
def test_weights_stand_in_the_loss_functions_own_reduction(name):
    "In float64: the weights in the numerator, the loss's own divisor below"
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1)).double() + 0.1
    learn, noted = losses_of(name, RowWeights(weights), lr=0.)
    model, data = learn.model.double(), learn.dls.train.dataset
    scaled = weights/weights.mean()
    for rows, loss, _ in noted.batches:
        pred, targ, w = model(data.images[rows].double()).detach(), data.targets[rows], scaled[rows]
        if name.startswith('mse'): items, counts = (pred - targ).pow(2).sum(1), torch.full((len(rows),), 3.)
        else:
            counts = (CLASS_WEIGHTS.double() if 'weights' in name
                      else torch.ones(3).double())[targ]*(targ != 1 if 'ignored' in name else 1)
            items = -pred.log_softmax(1)[range(len(rows)), targ]*counts
        expected = (w*items).sum()/(1 if 'sum' in name else counts.sum())
        assert loss == pytest.approx(expected.item(), rel=1e-5)


class Halved(FitCallback):
    "Another callback that weighs the loss"
    makes_loss = 'weights'
    def after_loss(self): weigh_loss(self.learn, self.item_losses(), torch.full((len(self.y),), 0.5))


@pytest.mark.parametrize('order', [-6, -5, -4])
def test_two_makers_of_the_loss_multiply_or_are_refused_in_either_order(order):
    weights, other = torch.linspace(0.1, 5, N), Halved()
    other.order = order
    for cbs in ([RowWeights(weights), other], [other, RowWeights(weights)]):
        learn, noted = losses_of('cross entropy', *cbs, lr=0.)
        scaled, data = weights/weights.mean(), Rows()
        for rows, loss, _ in noted.batches:
            items = F.cross_entropy(learn.model(data.images[rows]), data.targets[rows], reduction='none')
            assert loss == pytest.approx(0.5*(scaled[rows]*items).mean().item(), rel=1e-5)
    groups = (torch.arange(N) % 2).tolist()
    for cbs in ([GroupDRO(groups), other], [other, GroupDRO(groups)], [RowWeights(weights), GroupDRO(groups)],
                [GroupDRO(groups), RowWeights(weights)]):
        with pytest.raises(ValueError, match='GroupDRO makes the training loss, and so does'):
            losses_of('cross entropy', *cbs)


class Reweighted(Callback):
    "Class weights from the fourth batch on"
    run_valid = False
    def before_batch(self):
        if self.iter == 3: self.learn.loss_func = CrossEntropyLossFlat(weight=CLASS_WEIGHTS)


@pytest.mark.parametrize('weigh',
                         [lambda: RowWeights([1]*N), lambda: GroupDRO((torch.arange(N) % 2).tolist(), eta=1e-9)])
def test_a_loss_that_is_replaced_in_training_is_the_one_trained_on(weigh):
    learn, noted = losses_of('cross entropy', weigh(), Reweighted(), shuffle=False)
    np.testing.assert_allclose(noted.ratios(), 1, rtol=1e-6)
    rows, loss, _ = noted.batches[-1]
    assert loss != pytest.approx(F.cross_entropy(learn.model(Rows().images[rows]), Rows().targets[rows]).item(),
                                 rel=1e-2)


class Narrow(Callback):
    "Keeps some items of each batch, and says which rows these are, as selectors do"
    order, run_valid, delivered_rows = -6, False, None
    def before_batch(self):
        keep = torch.arange(1, len(self.y), 3)
        self.delivered_rows = rows_of(self.xb[0])[keep]
        self.learn.xb, self.learn.yb = (self.xb[0][keep],), (self.yb[0][keep],)


class Drop(Callback):
    "Loses the last item of the third batch, and tells nobody"
    order, run_valid = -6, False
    def before_batch(self):
        if self.iter == 2: self.learn.xb, self.learn.yb = (self.xb[0][:-1],), (self.yb[0][:-1],)


def test_the_weights_are_those_of_the_rows_that_are_in_the_batch():
    weights, data = torch.linspace(0.1, 5, N), Rows()
    learn, noted = losses_of('cross entropy', RowWeights(weights), Narrow(), lr=0.)
    for rows, loss, _ in noted.batches:
        items = F.cross_entropy(learn.model(data.images[rows]), data.targets[rows], reduction='none')
        assert len(rows) == len(range(1, len(items)*3, 3))
        assert loss == pytest.approx(((weights/weights.mean())[rows]*items).mean().item(), rel=1e-5)
    for weigh in RowWeights(weights), GroupDRO((torch.arange(N) % 2).tolist()):
        with pytest.raises(ValueError, match='31 items, but 32 rows'): losses_of('cross entropy', weigh, Drop())


def test_beside_a_selector_the_weights_are_those_of_what_it_delivers():
    weights, data, groups = torch.linspace(0.1, 5, N), Rows(), torch.arange(N) % 2
    for weigh in RowWeights(weights), GroupDRO(groups.tolist(), eta=1e-9):
        learn, noted = row_learner(loaders(), lr=0.), Trained()
        fit(learn.batch_loss_filter(min_loss_perc=0.3, warmup_epochs=0), cbs=[weigh, noted])
        for rows, loss, _ in noted.batches:
            items = F.cross_entropy(learn.model(data.images[rows]), data.targets[rows], reduction='none')
            expected = ((weights/weights.mean())[rows]*items).mean() if isinstance(weigh, RowWeights) else \
                sum(items[groups[rows] == g].mean()/2 for g in groups[rows].unique())
            assert len(rows) < BS and loss == pytest.approx(expected.item(), rel=1e-5)


def test_weights_are_taken_by_position():
    weights = torch.rand(N)
    series = pd.Series(weights.numpy(), index=np.arange(N) + 10)
    given = [callback.scaled for callback in map(RowWeights, (weights, series, weights.tolist(), weights.numpy()))
             if losses_of('cross entropy', callback)]
    for o in given[1:]: torch.testing.assert_close(o, given[0])
    np.testing.assert_allclose(weighted_loaders(loaders(), series).train.wgts, weights.double()/weights.double().sum())
    groups = pd.Series(['ab'[i % 2] for i in range(N)], index=np.arange(N)[::-1])
    dro = GroupDRO(groups)
    losses_of('cross entropy', dro)
    assert dro.known.codes.tolist() == [0, 1]*(N//2)


@pytest.mark.parametrize('weigh', [lambda: RowWeights(torch.linspace(1, 2, N)),
                                   lambda: GroupDRO((torch.arange(N) % 2).tolist())])
def test_an_interrupted_fit_leaves_nothing(weigh, tmp_path):
    learn = row_learner(loaders(), path=tmp_path, cbs=weigh())
    cb = learn.cbs[-1]
    before = learn.validate()
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Interrupt())
    learn.model.load_state_dict({k: torch.zeros_like(v) for k, v in learn.model.state_dict().items()})
    assert len(learn.validate()) == len(before) and cb._fit is None
    learn.export('learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'learner.pkl')
    restored = next(o for o in loaded.cbs if type(o) is type(cb))
    assert getattr(restored, 'scaled', None) is None and getattr(restored, 'source', None) is None
    noted = Trained()
    fit(learn.remove_cb(cb), 1, cbs=noted)
    np.testing.assert_allclose(noted.ratios(), 1, rtol=1e-6) # without it the loss is the plain one


class OwnRows(Rows):
    "A data set that has an attribute `rows`, for which fastai's loader answers too"
    def __init__(self, n=N): super().__init__(n); self.rows = ['some', 'thing']


@pytest.mark.parametrize('callback', [lambda: RowWeights(torch.ones(N)), lambda: GroupDRO(Rows().targets),
                                      ForgettingTracker, LossHistory], ids=['weights', 'dro', 'forgetting', 'history'])
def test_rows_of_a_data_sets_own_are_no_rows_of_a_batch(callback):
    worst = WorstGroup(accuracy, VALID.targets)
    fit(row_learner(loaders(train=OwnRows(), valid=OwnRows(60)), metrics=worst, cbs=callback()), 1)
    assert worst.table.notna().all(axis=None)
