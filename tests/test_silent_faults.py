"""What was quietly wrong once is right now, or refused before the first step: losses, targets, methods, and callbacks
of every order."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader, SkipItemException
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.text.data import LMDataLoader
from helpers import N_VALID, Interrupt, N, Toy, fit, learner, linear, loaders, rows_of, weights_of
from test_losses import cases, weighable
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import (
    EpochRule,
    GroupDRO,
    LossHistory,
    Pick,
    RowWeights,
    Selection,
    TopFraction,
    el2n,
    error_set,
    irreducible_losses,
    just_train_twice,
    probe_predictions,
)

IL = torch.rand(N, generator=torch.Generator().manual_seed(4))
ORDERS = [-10, -7, -4, 0, 3, 9, 15]

# One line a method; what selects takes the hardest quarter, so that it can be told whether it did

SELECT = dict(
    top=lambda l: l.select('loss', 'top', frac=0.25, forward='twice', precision=None),
    enlarged=lambda l: l.select('loss', 'top', frac=0.25, forward='twice', precision=None, enlarge=True),
    filter=lambda l: l.batch_loss_filter(0., min_sample_perc=0.25, warmup_epochs=0, forward='twice', precision=None),
    rho=lambda l: l.rho_loss(torch.zeros(N), frac=0.25, precision=None),
    stale=lambda l: l.select('loss', 'top', frac=0.25, staleness=2, precision=None))
DRAW = dict(backprop=lambda l: l.selective_backprop(warmup_epochs=0),
            queue=lambda l: l.selective_backprop(queue=True, warmup_epochs=0),
            importance=lambda l: l.select('loss', 'importance', frac=0.5))
WEIGH = dict(infobatch=lambda l: l.prune_epochs(delta=1.), row_weights=lambda l: l.add_cb(RowWeights(torch.ones(N))),
             group_dro=lambda l: l.add_cb(GroupDRO((torch.arange(N) % 2).tolist())))
METHODS = {**SELECT, **DRAW, **WEIGH}

class Ones(EpochRule):
    "Every row, each weighed by 1"
    weighs, last = True, 0
    def __call__(self, remembered, epoch, generator): return epoch.rows, torch.ones(len(epoch.rows))

def alike(loss): return torch.ones_like(loss)
# the routes on which the loss is made of weighed item losses, with weights of 1;
# of GroupDRO in batches that hold as many of each group
ONES = dict(row_weights=lambda l: l.add_cb(RowWeights(torch.full((l.dls.train.n,), 7.))),
            pruning=lambda l: l.prune_epochs(Ones()),
            group_dro=lambda l: l.add_cb(GroupDRO(['a', 'b']*(l.dls.train.n//2), eta=1e-12)),
            importance=lambda l: l.select(alike, 'importance', frac=0.5))
def methods(of): return pytest.mark.parametrize('method', of.values(), ids=list(of))

def refused(learn, match, n_epoch=1, **kwargs):
    "The message of the error that `fit` raises before it has changed a weight"
    before = weights_of(learn)
    with pytest.raises(ValueError, match=match) as error: fit(learn, n_epoch, **kwargs)
    assert torch.equal(before, weights_of(learn))
    return str(error.value)


# 1. Item losses that mean nothing

def cox(pred, targ):
    order = targ[:, 0].argsort(descending=True)
    risk, event = pred[order, 0], targ[order, 1]
    return -((risk - risk.logcumsumexp(0))*event).sum()/event.sum().clamp(min=1)
def info_nce(pred, targ):
    return F.cross_entropy(F.normalize(pred, dim=1)@F.normalize(pred, dim=1).T/0.1, torch.arange(len(pred)))
def correlation(pred, targ): return 1 - torch.corrcoef(torch.stack([pred[:, 0], targ[:, 0]]))[0, 1]
def pairwise(pred, targ): return F.softplus(-(pred[:, :1] - pred[:, :1].T)*(targ[:, :1] - targ[:, :1].T).sign()).mean()
def list_wise(pred, targ): return -(targ[:, 0].softmax(0)*pred[:, 0].log_softmax(0)).sum()
def variance(pred, targ): return F.relu(1 - pred.std(0)).mean()
def standardised(pred, targ): return ((pred[:, 0] - pred[:, 0].mean())/pred[:, 0].std() - targ[:, 0]).square().mean()
def worst(pred, targ): return (pred[:, 0] - targ[:, 0]).square().max()
def nothing(pred, targ): return torch.tensor(0.)
def r_squared(pred, targ): return ((pred[:, 0] - targ[:, 0])**2).sum()/((targ[:, 0] - targ[:, 0].mean())**2).sum()
MEANINGLESS = [cox, info_nce, correlation, pairwise, list_wise, variance, standardised, worst, nothing, r_squared]

def survival(x, y): return torch.stack([x[:, 0].abs() + 0.1*x[:, 1].abs(), (x[:, 2] > -0.5).float()], 1)

@pytest.mark.parametrize('loss', MEANINGLESS, ids=[o.__name__ for o in MEANINGLESS])
@methods(METHODS)
def test_a_loss_that_is_not_made_of_its_items_is_named(loss, method):
    learn = learner(loaders(train=Toy(targets=survival), valid=Toy(24, 1, survival)), loss_func=loss)
    method(learn)
    assert loss.__name__ in refused(learn, loss.__name__)


def test_losses_that_are_kept_or_weighed_later_are_looked_at_first():
    "By a history of losses, and before the first of two trainings"
    dls = loaders(train=Toy(targets=survival), valid=Toy(24, 1, survival))
    refused(learner(dls, loss_func=cox, cbs=LossHistory()), 'cox')
    trained = []
    class Trains(Callback):
        def after_step(self): trained.append(1)
    def make(dls): return learner(dls, loss_func=cox, cbs=Trains())
    def wrong(pred, targ): return (pred[:, 0] > 0).float()
    with pytest.raises(ValueError, match='cox'):
        just_train_twice(make, dls, 1, 1, 3., by='loss', wrong=wrong, progress=False)
    assert not trained


class OwnLoss(nn.Module):
    "A model that computes its own loss, as some of Hugging Face's do"
    def __init__(self): super().__init__(); self.head = linear()
    def forward(self, x, y): return dict(loss=F.cross_entropy(self.head(x), y), logits=self.head(x))

@methods(METHODS)
def test_a_model_that_computes_its_own_loss(method):
    data = [(x, y, y) for x, y in zip(Toy().x, Toy().y)]
    dls = DataLoaders(DataLoader(data, bs=24, shuffle=True, n_inp=2), DataLoader(data[:24], bs=24, n_inp=2))
    learn = learner(dls, OwnLoss(), lambda out, y: out['loss'])
    method(learn)
    assert "loss_func=lambda out, y: F.cross_entropy(out['logits'], y)" in refused(learn, 'logits')
    learn = learner(dls, OwnLoss(), lambda out, y: F.cross_entropy(out['logits'], y)) # what it says to type
    method(learn)
    assert weights_of(fit(learn, 2)).isfinite().all()


# 2. Carried state

class Recurrent(nn.Module):
    "A language model that goes on from where the last batch left it"
    def __init__(self, has_reset=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.recurrent, self.head, self.hidden = nn.Embedding(8,
                                                                          12), nn.LSTM(
            12, 12, batch_first=True), nn.Linear(12, 8), None
        if has_reset: self.reset = lambda: setattr(self, 'hidden', None)
    def forward(self, x):
        out, hidden = self.recurrent(self.embed(x), self.hidden)
        self.hidden = tuple(o.detach() for o in hidden)
        return self.head(out)

class States(Callback):
    "The state at the start of each batch, before selection, and the rows that are trained on"
    order, run_valid = -9, False
    def before_fit(self): self.states = []
    def before_batch(self):
        self.states.append(None if self.model.hidden is None else [o.clone() for o in self.model.hidden])

def texts():
    ids = [torch.randint(0, 8, (60,), generator=torch.Generator().manual_seed(i)) for i in range(24)]
    return DataLoaders(LMDataLoader(ids[:16], bs=8, seq_len=10, lens=[60]*16, num_workers=0),
                       LMDataLoader(ids[16:], bs=8, seq_len=10, lens=[60]*8, num_workers=0))

def states_of(add, has_reset=True):
    learn, states = learner(texts(), Recurrent(has_reset), CrossEntropyLossFlat(), cbs=ModelResetter() if has_reset
                            else None), States()
    add(learn)
    fit(learn, 1, 0., cbs=states)
    return states.states

STATEFUL = dict(top=lambda l: l.select('loss', 'top', frac=0.5, forward='twice', precision=None),
                shared=lambda l: l.select('loss', 'top', frac=0.5, forward='reuse'),
                uniform=lambda l: l.select('loss', 'uniform', frac=0.5, precision=None),
                filter=lambda l: l.batch_loss_filter(0.5, warmup_epochs=0, precision=None),
                importance=lambda l: l.select('loss', 'importance', frac=0.5, precision=None),
                own_il=lambda l: l.select('reducible', 'top', frac=0.5, il=Recurrent(), precision=None))

@methods(STATEFUL)
@pytest.mark.parametrize('has_reset', [True, False])
@pytest.mark.many(3)
def test_rows_go_on_from_their_own_state(method, has_reset):
    "A model that stands still (rate 0): all rows' states are those of plain training in every batch"
    plain, ours = states_of(lambda l: None, has_reset), states_of(method, has_reset)
    assert len(plain) == len(ours) > 3 and plain[0] is None and ours[0] is None
    for a, b in zip(plain[1:], ours[1:]):
        for s, t in zip(a, b): torch.testing.assert_close(t, s, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('add', [lambda l: l.selective_backprop(queue=True, warmup_epochs=0),
                                 lambda l: l.select('loss', 'top', frac=0.5, score_bs=4)])
def test_state_that_cannot_be_kept_is_refused(add):
    learn = learner(texts(), Recurrent(), CrossEntropyLossFlat(), cbs=ModelResetter())
    add(learn)
    refused(learn, 'carries state from batch to batch')

def test_a_model_that_begins_anew_is_no_carrier():
    "Recurrent layers and a state that is left over, but each batch begins without: it may be enlarged"
    class Reader(nn.Module):
        def __init__(self):
            super().__init__(); self.recurrent, self.head = nn.LSTM(1, 5, batch_first=True), nn.Linear(5, 3)
        def reset(self): self.hidden = None
        def forward(self, x):
            self.reset()
            out, self.hidden = self.recurrent(x[..., None])
            return self.head(out[:, -1])
    learn = fit(learner(model=Reader).select('loss', 'top', frac=0.25, enlarge=True), 2)
    assert learn.selection.ledger.selected.tolist() == [0.25]*2 or learn.selection.ledger.selected.min() > 0.2


# 3. The loss in force

CLASS_WEIGHTS = torch.tensor([0.01, 1., 50.])

class Replaces(Callback):
    "Another loss from the second epoch on, as in deferred re-weighting"
    run_valid = False
    def __init__(self, order, event='before_epoch'): self.order, self.event = order, event
    def __call__(self, event):
        if event == self.event and self.epoch >= 1: self.learn.loss_func = CrossEntropyLossFlat(weight=CLASS_WEIGHTS)

class Hardest(Callback):
    "Share of what is trained on that is truly the hardest of the candidates, under the loss in force"
    order, run_valid = -6, False
    def __init__(self): self.shares = {}
    def before_batch(self): self.candidates = self.x.clone(), self.y.clone()
    def after_pred(self):
        x, y = self.candidates
        with torch.no_grad():
            losses = F.cross_entropy(self.model(x), y, reduction='none', weight=self.learn.loss_func.func.weight)
        mine = (x[None] == self.x[:, None]).all(2).int().argmax(1)
        hardest = losses.topk(len(mine)).indices
        self.shares.setdefault(self.epoch, []).append(torch.isin(mine, hardest).float().mean().item())

@pytest.mark.parametrize('order', ORDERS)
@methods({k: SELECT[k] for k in ('top', 'enlarged', 'filter', 'rho')})
@pytest.mark.many(3)
def test_selection_goes_by_the_loss_in_force(method, order):
    learn, hardest = learner(), Hardest()
    method(learn)
    fit(learn, 3, cbs=[Replaces(order), hardest])
    assert len(hardest.shares) == 3 and all(share == 1 for shares in hardest.shares.values() for share in shares)

class Ratio(Callback):
    "Of the loss that is trained on to that of the loss function in force"
    run_valid, order = False, 5 # before gradient accumulation divides it
    def before_fit(self): self.ratios = []
    def before_validate(self): raise CancelValidException
    def after_loss(self): self.ratios.append((self.learn.loss_grad/self.learn.loss_func(self.pred, *self.yb)).item())

@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), CrossEntropyLossFlat(reduction='sum'),
                                  CrossEntropyLossFlat(weight=CLASS_WEIGHTS), nn.CrossEntropyLoss(label_smoothing=0.2)],
                         ids=['mean', 'sum', 'class weights', 'smoothed'])
@methods({k: v for k, v in ONES.items() if k != 'group_dro'}) # whose groups differ in a batch that is shuffled
@pytest.mark.many(5)
def test_weights_of_one_train_on_the_loss_in_force(method, loss, order):
    "3, 4: also with class weights, `reduction='sum'` and smoothing"
    learn, ratio = learner(loss_func=loss), Ratio()
    method(learn)
    fit(learn, 2, cbs=[Replaces(order), ratio])
    assert max(abs(o - 1) for o in ratio.ratios) < 1e-5

class Scaled(nn.Module):
    "Says what it is given, so that any loss can be trained on"
    def __init__(self): super().__init__(); self.by = nn.Parameter(torch.ones(1))
    def forward(self, x): return x*self.by

class TrainedOn(Callback):
    "The loss that is trained on, and the loss function's of the same items"
    order, run_valid = 5, False
    def before_fit(self): self.losses = []
    def before_validate(self): raise CancelValidException
    def after_loss(self):
        self.losses.append((self.learn.loss_grad.detach().clone(), self.learn.loss_func(self.pred, *self.yb).detach()))

@pytest.mark.filterwarnings('ignore') # PyTorch's on KL divergence's mean and on broadcasting
@pytest.mark.parametrize('make_loss, make_batch', cases(weighable))
@pytest.mark.many(6)
def test_weights_of_one_of_every_loss(make_loss, make_batch):
    "4: to 1e-6, by every route; train twice by='loss' is by row weights"
    torch.manual_seed(3)
    data = list(zip(*make_batch(8)))
    def dls():
        dls = DataLoaders(*[DataLoader(data, bs=4) for _ in range(2)])
        dls.n_inp = 1
        return dls
    def make(dls): return learner(dls, Scaled, make_loss(), lr=0., cbs=TrainedOn())
    learns = [make(dls()) for _ in ONES]
    for add, learn in zip(ONES.values(), learns): add(learn); fit(learn, 1)
    def every_second(pred, targ): return torch.arange(len(pred)) % 2
    learns.append(just_train_twice(make, dls(), 1, 1, 1., by='loss', wrong=every_second, progress=False))
    for learn in learns:
        assert len(learn.trained_on.losses) == 2
        for ours, own in learn.trained_on.losses:
            torch.testing.assert_close(ours, own.as_subclass(torch.Tensor), rtol=1e-6, atol=1e-6)


# 5. Two makers of the loss

MAKERS = dict(prune=lambda l: l.prune_epochs(delta=1.),
              weights=lambda l: l.add_cb(RowWeights(torch.linspace(0.1, 3, N))),
              dro=lambda l: l.add_cb(GroupDRO((torch.arange(N) % 2).tolist(), eta=0.5)),
              importance=lambda l: l.select('loss', 'importance', frac=0.5))

class ByHand(Callback):
    "The loss that is trained on, beside the mean of item losses with the product of all weights"
    order, run_valid = 5, False
    def before_fit(self): self.ratios = []
    def after_loss(self):
        losses, weights = F.cross_entropy(self.pred, self.y, reduction='none'), torch.ones(len(self.y))
        rows = rows_of(self.x)
        if hasattr(self.learn, 'row_weights'):
            weights = weights*(torch.linspace(0.1, 3, N)/torch.linspace(0.1, 3, N).mean())[rows]
        pruned = getattr(getattr(self.learn, 'epoch_pruner', None), '_fit', None)
        if pruned is not None and pruned.weights is not None: weights = weights*pruned.weights[rows]
        selector = getattr(self.learn, 'selector', None)
        if selector is not None and selector._fit.weights is not None: weights = weights*selector._fit.weights
        self.ratios.append((self.learn.loss_grad/(weights*losses).mean()).item())

@pytest.mark.parametrize('first', MAKERS)
@pytest.mark.parametrize('second', MAKERS)
def test_two_makers_of_the_loss_are_composed_or_refused(first, second):
    if first == second: return
    learn, by_hand = learner(), ByHand()
    if 'dro' in (first, second) or {first, second} == {'prune', 'importance'}:
        with pytest.raises(ValueError, match='use one|Use one|one of them'):
            MAKERS[second](MAKERS[first](learn) or learn); fit(learn, 2)
        return
    for name in (first, second): MAKERS[name](learn)
    fit(learn, 3, cbs=by_hand)
    assert len(by_hand.ratios) > 6 and max(abs(o - 1) for o in by_hand.ratios) < 1e-4


# 6. Inputs that callbacks change

class Changes(Callback):
    def __init__(self, how, order): self.how, self.order = how, order
    def before_batch(self): self.learn.xb = (self.how(self.x),)

def normalised(x): return (x - 200)/10
def flattened(x): return x.flatten(1)
def cast(x): return x.float()/25
def noisy(x): return x + torch.randn_like(x)

INPUTS = dict(normalised=(lambda x, y: x*10 + 200, normalised), flattened=(lambda x, y: x.view(-1, 2, 3), flattened),
              cast=(lambda x, y: (x*25).round().int(), cast))

class Changed(Toy):
    def __init__(self, how, *args): super().__init__(*args); self.x = how(self.x, self.y)

@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('change', INPUTS)
@methods({k: METHODS[k] for k in ('top', 'enlarged', 'filter', 'rho', 'backprop', 'queue', 'importance')})
@pytest.mark.many(4)
def test_inputs_that_a_callback_changes(change, order, method):
    "Before selection: what is trained on is truly the hardest; after it: refused, with the order that mends it"
    data, how = INPUTS[change]
    learn = learner(loaders(train=Changed(data), valid=Changed(data, 24, 1)))
    method(learn)
    if order > -5:
        message = refused(learn, 'order below -5', cbs=Changes(how, order))
        assert f'Changes (order {order})' in message
        return
    hardest = Hardest()
    fit(learn, 2, cbs=[Changes(how, order), hardest])
    if method in SELECT.values(): assert all(share == 1 for shares in hardest.shares.values() for share in shares)

def test_inputs_that_a_callback_changes_in_cross_fitting():
    learn = learner(loaders(train=Changed(INPUTS['flattened'][0]), valid=Changed(INPUTS['flattened'][0], 24, 1)))
    refused(learn.rho_loss(il_epochs=1, frac=0.5), 'il=', cbs=Changes(flattened, -9))

class Watches(Callback):
    "Looks at what there is, and changes nothing"
    order = -8
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(self.x.mean())

@pytest.mark.parametrize('change', ['normalised', 'cast'])
def test_what_is_scored_outside_of_training_is_as_the_model_knows_it(change):
    "A callback that acts before selection acts in no copy of the Learner, and in no forward outside of training"
    data, how = INPUTS[change]
    def learn():
        return learner(loaders(train=Changed(data), valid=Changed(data, 24, 1)), cbs=[Changes(how, -9), Watches()])
    for method in (lambda l: l.rho_loss(frac=0.5), lambda l: l.rho_loss(il='crossfit', frac=0.5),
                   lambda l: l.select('reducible', il='auto')):
        target = learn()
        method(target)
        assert 'Changes (order -9)' in refused(target, 'il=', 20)
    fitted = fit(learn(), 1)
    for ask in (lambda: irreducible_losses(fitted, fitted.dls.train), lambda: el2n(fitted, fitted.dls.train),
                lambda: error_set(fitted)):
        with pytest.raises(ValueError, match='Changes .order -9. changes the inputs in before_batch'): ask()

@pytest.mark.parametrize('how', [normalised, noisy])
@methods(dict(probe=lambda l: probe_predictions(l, features='body'),
              epochs=lambda l: l.rho_epochs(features='body', gate=False),
              anew=lambda l: l.rho_epochs(IL, 0.3, gate=False, refresh=True),
              auto=lambda l: l.rho_loss(il='auto', frac=0.5)))
def test_the_body_is_asked_as_it_was_trained(method, how):
    """By the probe, also where rho_epochs asks it, before the first step: a callback of training alone is no less a
    change"""
    change = Changes(how, -9)
    change.run_valid = False
    learn = learner(cbs=change)
    with pytest.raises(ValueError, match='Changes .order -9.*il='): method(learn); fit(learn, 8)

def test_who_watches_is_no_changer():
    learn, watches = learner(), Watches()
    fit(learn.rho_loss(il_epochs=1, frac=0.5, enlarge=False), 1, cbs=watches)
    assert len(watches.seen) == 3 + 1 # of the batches, none of what was tried; the last is the validation's

class Counts(Callback):
    "What has gone by, in what can be written to"
    order,run_valid = -9,False
    def before_fit(self): self.n,self.rows,self.held = torch.zeros(()),np.zeros(N),set()
    def before_batch(self):
        self.n += len(self.xb[0])
        self.rows += rows_of(self.xb[0]).bincount(minlength=N).numpy()
        self.held |= set(rows_of(self.xb[0]).tolist())

def test_who_counts_counts_what_is_trained_on():
    "Not the rows that callbacks are tried on"
    learn, counts = learner().rho_loss(gate=False, il_budget=99., enlarge=False), Counts()
    class Stop(Callback):
        def after_batch(self): raise CancelFitException
    fit(learn, 1, cbs=[counts, Stop()])
    assert learn.selector.il is not None and counts.n == 24 == counts.rows.sum() and len(counts.held) == 24

def test_what_is_not_scored_may_change():
    learn = learner(loaders(train=Changed(INPUTS['cast'][0]),
                            valid=Changed(INPUTS['cast'][0], 24, 1))).select('loss', 'uniform', frac=0.5)
    assert weights_of(fit(learn, 1, cbs=Changes(cast, 3))).isfinite().all()


# 7. Rows that a batch loses later

class Loses(Callback):
    "Drops an item of the second batch"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self):
        if self.iter == 1: self.learn.xb, self.learn.yb = (self.x[1:],), (self.y[1:],)

NEED_NO_ROWS = ('top', 'enlarged', 'filter', 'backprop', 'importance')

@pytest.mark.parametrize('order', [-10, -7])
@methods({k: v for k, v in METHODS.items() if k not in NEED_NO_ROWS})
def test_rows_lost_before(method, order):
    learn = learner(loaders(8))
    method(learn)
    with pytest.raises(ValueError, match='rows were drawn for it'): fit(learn, 1, cbs=Loses(order))

class Skips(Toy):
    "An item that can't be read, which fastai's loader leaves out, so that all later ones move up"
    def __getitem__(self, i):
        if i == 50: raise SkipItemException
        return super().__getitem__(i)

def drops(items): return [torch.stack(o) for o in zip(*[o for o in items if o is not None])]
class NoneAt50(Toy):
    def __getitem__(self, i): return None if i == 50 else super().__getitem__(i)
def torch_loaders():
    return DataLoaders(*[torch.utils.data.DataLoader(o, batch_size=8, collate_fn=drops)
                         for o in (NoneAt50(), Toy(N_VALID, 1))])

@pytest.mark.parametrize('make', [lambda: loaders(8, Skips(), shuffle=False), torch_loaders], ids=['fastai', 'torch'])
@methods({k: v for k, v in METHODS.items() if k not in ('group_dro', 'stale')})
def test_rows_that_the_loader_skips(method, make, request):
    """Where rows are needed an error by the batch it happens in; where not, the same items are trained on as if they
    had not been there, and the counts of rows are unknown"""
    learn = learner(make())
    method(learn)
    if request.node.callspec.id.split('-')[0] in NEED_NO_ROWS or request.node.callspec.id.split('-')[
            -1] in NEED_NO_ROWS:
        with pytest.warns(UserWarning, match="aren't counted"): fit(learn, 1)
        assert learn.selection.ledger.loaded.item() == N - 1 and learn.selection.seen is None
        assert learn.selection.selected is None and weights_of(learn).isfinite().all()
    else:
        with pytest.raises(ValueError, match='row 50 was skipped|rows were drawn for it'): fit(learn, 1)

def test_where_rows_are_unknown_the_way_out_is_the_methods():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(Toy())
        def __len__(self): return N
    def learn():
        return learner(DataLoaders(torch.utils.data.DataLoader(Stream(), batch_size=8),
                                   torch.utils.data.DataLoader(Toy(N_VALID, 1), batch_size=8)))
    for method, way_out in ((METHODS['stale'], 'staleness=1'), (METHODS['rho'], 'il='),
                            (METHODS['infobatch'], 'batch_loss_filter'),
                            (METHODS['row_weights'], 'loss function'),
                            (METHODS['group_dro'], 'map-style|one value a row|length')):
        target = learn()
        with pytest.raises((ValueError, TypeError), match=way_out) as error: method(target); fit(target, 1)
        assert ('il=' in str(error.value)) == (way_out == 'il=')
    fit(learn().batch_loss_filter(warmup_epochs=0), 1)

@pytest.mark.parametrize('order', [-4, 0, 15])
@methods(WEIGH)
def test_rows_lost_after(method, order):
    "Weights of rows can't be told either, wherever the batch loses them"
    learn = learner()
    method(learn)
    with pytest.raises(ValueError, match='rows were drawn for it'): fit(learn, 1, cbs=Loses(order))


# 8. Scores of the task's own form

def labels(x, y): return (x[:, :3] > 0).float()
def numbers(x, y): return x[:, :1]*2
PROBABLE = ['entropy', 'margin', 'least_confidence', 'gradient_norm']

class Kept(Callback):
    "Predictions and targets of the candidates"
    order, run_valid = -9, False
    def before_fit(self): self.batches = []
    def before_batch(self):
        with torch.no_grad(): self.batches.append((self.model(self.x).double(), self.y, self.x))
    def after_pred(self): self.batches[-1] += (self.x,)

@pytest.mark.parametrize('score', PROBABLE)
@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()], ids=['fastai', 'torch'])
def test_scores_of_several_labels_are_the_sigmoids(score, loss):
    kept = Kept()
    learn = learner(loaders(train=Toy(targets=labels), valid=Toy(24, 1, labels)), loss_func=loss)
    fit(learn.select(score, 'top', frac=0.25, precision=None, forward='twice'), 2, 0.5, cbs=kept)
    for pred, y, x, trained in kept.batches:
        p = pred.sigmoid()
        right = dict(entropy=-(p*p.log() + (1 - p)*(1 - p).log()).mean(1), margin=-(2*p - 1).abs().mean(1),
                     least_confidence=torch.minimum(p, 1 - p).mean(1),
                     gradient_norm=(p - y).norm(dim=1))[score]
        mine = (x[None] == trained[:, None]).all(2).int().argmax(1)
        others = torch.ones(len(x), dtype=torch.bool).index_fill_(0, mine, False)
        assert right[mine].min() >= right[others].max() - 1e-5

@pytest.mark.parametrize('score', PROBABLE)
@pytest.mark.parametrize('loss', [MSELossFlat(), nn.L1Loss(), nn.HuberLoss()], ids=['mse', 'l1', 'huber'])
def test_scores_of_probabilities_refuse_numbers(score, loss):
    def three(x, y): return x[:, :3]
    learn = learner(loaders(train=Toy(targets=three), valid=Toy(24, 1, three)), loss_func=loss)
    refused(learn.select(score, 'top', frac=0.25), 'numbers')

@pytest.mark.parametrize('dtype', [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize('score', ['loss', *PROBABLE])
@pytest.mark.many(3)
def test_class_targets_in_a_column_of_any_type(score, dtype):
    "14: as fastai's tabular targets come; the same rows are trained on as with `(n,)` long"
    def run(targets):
        learn = learner(loaders(train=Toy(targets=targets), valid=Toy(24, 1, targets))).select(score, 'top', frac=0.25)
        return weights_of(fit(learn, 2, seed=3))
    torch.testing.assert_close(run(lambda x, y: y[:, None].to(dtype)), run(lambda x, y: y))


def test_log_probabilities_are_of_the_losses_classes():
    "On the axis where the loss has them: for a tagger the last"
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__(); self.body = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        def forward(self, x): return self.body(x.view(-1, 3, 2))
    def tags(x, y): return torch.stack([y]*3, 1)
    sums = []
    def uncertain(log_probs): sums.append(log_probs.exp().sum(-1)); return log_probs.amax(-1).mean((0, 2))
    learn = learner(loaders(train=Toy(targets=tags), valid=Toy(24, 1, tags)), Tagger(), CrossEntropyLossFlat())
    fit(learn.select(uncertain, 'top', frac=0.5, n_mc=2, precision=None), 1)
    assert len(sums) == 3 and sums[0].shape == (2, 24, 3)
    for o in sums: torch.testing.assert_close(o, torch.ones_like(o))
    fit(learner(loaders(train=Toy(targets=tags), valid=Toy(24, 1, tags)), Tagger(),
                CrossEntropyLossFlat()).select('bald', 'top', frac=0.5, n_mc=2), 1)


# 10. What will have no effect is said

def said(learn, n_epoch=1):
    lines = []
    with learn.no_bar(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.logger = lines.append
        learn.fit(n_epoch)
    return ' '.join([str(o.message) for o in caught] + [str(o) for o in lines])

def test_what_will_have_no_effect_is_said():
    assert 'warmup_epochs=0' in said(learner().batch_loss_filter())
    assert 'warmup_epochs=0' in said(learner().selective_backprop())
    assert 'warmup_epochs=0' not in said(learner().batch_loss_filter(), 2)
    assert 'does nothing' in said(learner().prune_epochs())
    def normed(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert 'batch norm needs two' in said(learner(loaders(8), normed).select('loss', 'top', frac=0.1))
    with pytest.raises(ValueError, match='frac=0.1'): learner().select('loss', TopFraction(0.5), frac=0.1)
    with pytest.raises(ValueError, match='frac=0.1'): learner().rho_loss(IL, frac=0.1, pick=TopFraction(0.5))


# 11. Viewers change nothing

def state(learn):
    return {k: list(v) if isinstance(v, list) else v for k, v in vars(learn.recorder).items()
            if k not in ('learn', '_learn')}, dict(vars(learn))

@pytest.mark.parametrize('view', [lambda o: o.top(3, show=False), lambda o: o.never(3, show=False),
                                  lambda o: o.suspects(3), lambda o: o.plot_il(), lambda o: o.report()],
                         ids=['top', 'never', 'suspects', 'plot_il', 'report'])
def test_viewers_change_nothing(view):
    learn = fit(learner().rho_loss(IL, frac=0.25, enlarge=False), 2)
    learn.model.train()
    before, random = state(learn), torch.get_rng_state()
    view(learn.selection)
    after = state(learn)
    assert before[0].keys() == after[0].keys() and before[1].keys() == after[1].keys()
    assert all(v is after[0][k] or not isinstance(v, (nn.Module, torch.Tensor)) and v == after[0][k] for k,
               v in before[0].items())
    assert all(v is after[1][k] for k, v in before[1].items()) and learn.model.training
    assert torch.equal(random, torch.get_rng_state())
    assert len(learn.recorder.losses) == 6 and len(learn.recorder.values) == 2

def test_tables_show_what_a_row_is_known_by():
    from fastai.tabular.all import CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
    x, y = Toy().x, Toy().y
    frame = pd.DataFrame(dict(a=x[:, 0], b=x[:, 1], y=['pqr'[i] for i in y]),
                         index=[f'patient {i}' for i in range(100, 100 + N)])
    dls = TabularDataLoaders.from_df(frame, procs=[Normalize], cont_names=['a', 'b'], y_names='y',
                                     y_block=CategoryBlock(), valid_idx=list(range(0, N, 3)), bs=8)
    learn = tabular_learner(dls, layers=[4], loss_func=CrossEntropyLossFlat())
    fit(learn.select('loss', 'top', frac=0.5), 1)
    table = learn.selection.top(5, show=False)
    assert [frame.loc[i, 'y'] for i in table['index']] == table.label.tolist()
    # the rows of the training set are others
    assert [int(i.split()[1]) - 100 for i in table['index']] != table.row.tolist()


# 12. Losses remembered of another data set

@pytest.mark.parametrize('staleness', [2, 3])
def test_losses_are_not_remembered_across_data_sets(staleness):
    learn = fit(learner(lr=0.).select('loss', 'top', frac=0.25, staleness=staleness, precision=None), 1)
    learn.dls = loaders(train=Toy(seed=7))
    hardest = Hardest()
    fit(learn, 1, cbs=hardest)
    assert all(o == 1 for o in hardest.shares[0]) and learn.selection.ledger.scored.tolist() == [N, N]
    assert int(learn.selection.seen.sum()) in (N, 0) # not those of two data sets


# 13. What a pick needs

@pytest.mark.parametrize('needs', [('targ',), ('loss',), ('pred',), ('il',), ('loss', 'pred', 'targ', 'il')])
@pytest.mark.parametrize('scored', [True, False])
def test_a_pick_gets_what_it_needs(needs, scored):
    "Right values, without a gradient, by the model in eval mode, whether or not there is a score"
    got = []
    class Own(Pick):
        needs_scores = scored
        def fraction(self, pct_train=0.): return 0.5
        def __call__(self, scores, pct_train=0., size=None, **figures):
            got.append({k: v for k, v in figures.items()})
            assert all(not v.requires_grad for v in figures.values())
            return Selection(torch.arange(size))
    Own.needs = needs
    class Seen(Callback):
        order, run_valid = -9, False
        def before_fit(self): self.batches = []
        def before_batch(self):
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng():
                self.batches.append((self.model(self.x), self.y, rows_of(self.x)))
            self.model.train()
    seen = Seen()
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    fit(learner(model=model).select('loss', Own(), il=IL, precision=None), 1, cbs=seen)
    assert len(got) == len(seen.batches) == 3
    for figures, (pred, y, rows) in zip(got, seen.batches):
        right = dict(targ=y, pred=pred, loss=F.cross_entropy(pred, y, reduction='none'), il=IL[rows])
        assert set(figures) == set(needs)
        for name, value in figures.items(): torch.testing.assert_close(value, right[name])


# 17. Exports; 18. anything array-like by position

def test_series_of_any_index_are_taken_by_position():
    series = pd.Series(IL.numpy(), index=range(100, 100 + N))
    for add in (lambda l, o: l.rho_loss(o, frac=0.25), lambda l, o: l.add_cb(RowWeights(o)),
                lambda l, o: l.select('reducible', 'top', frac=0.25, il=o)):
        ours, plain = learner(), learner()
        add(ours, series), add(plain, IL)
        assert torch.equal(weights_of(fit(ours, 1, seed=2)), weights_of(fit(plain, 1, seed=2)))
    mask = pd.Series((IL > 0.5).numpy(), index=range(100, 100 + N))
    learn = fit(learner().batch_loss_filter(track=dict(high=mask), warmup_epochs=0), 1)
    assert 0 < learn.selection.ledger.high.item() < 1


# 19. Lists of items, classes that are none

class OfList(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
    def forward(self, images): return torch.stack([self.head(self.conv(o[None]).mean((2, 3)))[0] for o in images])

def listed(items): return [o[0] for o in items], torch.stack([o[1] for o in items])

@pytest.mark.parametrize('bs', [3, 4, 8]) # as many as there are channels, and others
@methods({k: METHODS[k] for k in ('top', 'filter', 'rho', 'stale', 'backprop', 'queue', 'importance')})
def test_lists_of_items_are_named(method, bs):
    data = [(torch.rand(3, 8, 8 + i % 3), torch.tensor(i % 3)) for i in range(N)]
    learn = learner(DataLoaders(*[DataLoader(data, bs=bs, create_batch=listed) for _ in range(2)]), OfList())
    method(learn)
    refused(learn, 'list of|in a batch of|tensors only')

@pytest.mark.parametrize('none', [-1, 255])
def test_gradients_of_classes_that_are_none(none):
    "A loss of one's own knows which it leaves out; index errors, or wrong memory on a device, come of gathering them"
    def own(pred, targ):
        counted = (targ >= 0) & (targ < 3)
        return (F.cross_entropy(pred, targ.where(counted, 0), reduction='none')*counted).sum()/counted.sum()
    def targets(x, y): return y.where(x[:, 0] > -0.5, none)
    data = Toy(targets=targets)
    fit(learn := learner(loaders(train=data, valid=Toy(24, 1, targets)),
                         loss_func=own).select('gradient_norm', 'top', frac=0.25), 2)
    assert learn.selection.selected.sum() > 0 and not learn.selection.selected[data.y == none].any()


# More of each kind, as a reader who wants to break it would try them

class Within(Callback):
    "Fits once more at the end of the first epoch"
    def __init__(self, another): self.another, self.done = another, False
    def after_train(self):
        if self.done: return
        self.done = True
        fit(learner().batch_loss_filter(warmup_epochs=0) if self.another else self.learn, 1)

@methods(METHODS)
def test_a_fit_within_a_fit(method):
    "Of another Learner it changes nothing; of the same it would end the selection, and is refused"
    learn = learner()
    method(learn)
    fit(learn, 3, cbs=Within(True))
    if hasattr(learn, 'selection'): assert len(learn.selection.ledger) == 3
    with pytest.raises(ValueError, match='in the midst of a fit'): fit(learn, 2, cbs=Within(False))
    assert weights_of(fit(learn, 1)).isfinite().all()

class Output(dict):
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None

class Named(nn.Module):
    "Inputs in a dict, and an output object with a prediction beside others"
    def __init__(self): super().__init__(); self.head, self.aside = linear(), linear()
    def forward(self, x):
        x = x['x'] if isinstance(x, dict) else x
        return Output(logits=self.head(x), aside=self.aside(x), n=torch.tensor(len(x)))

class InDicts(Toy):
    def __getitem__(self, i): return dict(x=self.x[i], mask=torch.ones(2)), self.y[i]

def labels_and_class(x, y): return torch.cat([(x[:, :2] > 0).float(), y[:, None].float()], 1)
def two_tasks(out, targ):
    return F.cross_entropy(out.logits,
                           targ[:, 2].long()) + 0.3*F.binary_cross_entropy_with_logits(out.aside[:, :2], targ[:, :2])
def masked(pred, targ):
    counted = (targ[:, :3] > 0).float(); return ((pred - 1)**2*counted).sum()/counted.sum().clamp(min=1)
def normed(momentum):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU(), nn.Linear(8, 3))
def spectral():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(),
                         nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)))

TASKS = dict( # name -> targets, model, loss, data
    output=(None, Named, lambda out, y: F.cross_entropy(out.logits, y), Toy),
             dict_inputs=(None, Named, lambda out, y: F.cross_entropy(out.logits, y), InDicts),
    several_tasks=(labels_and_class, Named, two_tasks, Toy),
             column=(lambda x, y: y[:, None].to(torch.int8), linear, CrossEntropyLossFlat(), Toy),
    labels=(labels, linear, BCEWithLogitsLossFlat(pos_weight=torch.tensor([1., 5., 9.])), Toy),
             own_labels=(labels, linear, F.binary_cross_entropy_with_logits, Toy),
    numbers=(lambda x, y: x[:, 0], lambda: linear(1), MSELossFlat(), Toy),
             column_of_numbers=(numbers, lambda: linear(1), nn.HuberLoss(), Toy),
    doubles=(lambda x, y: x[:, :1].double(), lambda: linear(1), lambda p, t: F.mse_loss(p, t.float()), Toy),
             masked=(labels, linear, masked, Toy),
    summed=(numbers, lambda: linear(1), lambda p, t: ((p - t)**2).sum(), Toy),
             one_class=(lambda x, y: y*0, linear, nn.CrossEntropyLoss(weight=torch.tensor([2., 1., 0.])), Toy),
    void=(lambda x, y: y.where(x[:, 0] > -0.5, -100), linear, F.cross_entropy, Toy),
             smoothed=(None, linear, nn.CrossEntropyLoss(label_smoothing=0.1), Toy),
    cumulative_norm=(None, lambda: normed(None), CrossEntropyLossFlat(), Toy),
             spectral_norm=(None, spectral, CrossEntropyLossFlat(), Toy))
def task_learner(name, **kwargs):
    targets, model, loss, data = TASKS[name]
    return learner(loaders(train=data(targets=targets), valid=data(24, 1, targets), **kwargs), model, loss)

class Candidate(Callback):
    order, run_valid = -6, False
    def before_fit(self): self.shares = []
    def before_batch(self):
        training = [m.training for m in self.model.modules()]
        self.model.eval()
        with torch.no_grad(): pred = self.model(*self.xb)
        for m, was in zip(self.model.modules(), training): m.training = was
        def item(o, i):
            return type(o)({k: item(v, i) for k, v in o.items()}) if isinstance(o, dict) else o[i:i+1] if o.ndim else o
        self.losses = torch.stack([self.learn.loss_func(item(pred, i), self.y[i:i+1]).nan_to_num()
                                   for i in range(len(self.y))]).squeeze()
        self.x_of = self.first(self.xb[0])
    def first(self, x): return x['x'] if isinstance(x, dict) else x
    def after_pred(self):
        mine = (self.x_of[None] == self.first(self.xb[0])[:, None]).all(2).int().argmax(1)
        kept = self.losses[mine].sort().values
        self.shares.append((kept - self.losses.topk(len(mine)).values.sort().values).abs().max().item())

@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('method', [SELECT['top'], lambda l: l.select('loss', 'top', frac=0.25, forward='reuse')],
                         ids=['own forward', 'shared'])
@pytest.mark.many(3)
def test_the_hardest_of_every_task(task, method):
    "By one call of the loss function for each item alone"
    # a shared forward is in training mode, by the user's choice
    if task == 'cumulative_norm' and method is not SELECT['top']: return
    learn, candidate = task_learner(task), Candidate()
    method(learn)
    fit(learn, 2, cbs=candidate)
    assert len(candidate.shares) == 6 and max(candidate.shares) < 1e-4

@pytest.mark.parametrize('task', TASKS)
@methods(ONES)
@pytest.mark.many(3)
def test_weights_of_one_of_every_task(task, method):
    learn, trained = task_learner(task, shuffle=False), TrainedOn()
    method(learn)
    fit(learn, 2, cbs=trained)
    assert len(trained.losses) == 6
    for ours, own in trained.losses:
        torch.testing.assert_close(ours, own.as_subclass(torch.Tensor), rtol=1e-6, atol=0., equal_nan=True)

@pytest.mark.parametrize('task', TASKS)
@methods({k: METHODS[k] for k in ('filter', 'rho', 'backprop', 'queue', 'importance', 'infobatch', 'group_dro')})
@pytest.mark.many(3)
def test_every_method_trains_on_every_task(task, method):
    learn = task_learner(task)
    method(learn)
    assert weights_of(fit(learn, 2)).isfinite().all()

@methods(METHODS)
def test_targets_that_broadcast_are_refused(method):
    "`(bs, 1)` against `(bs,)`: every prediction with every target, of PyTorch's own and of one's own losses"
    for loss in (nn.MSELoss(), lambda p, t: ((p - t)**2).mean()):
        learn = learner(loaders(train=Toy(targets=lambda x, y: x[:, 0]), valid=Toy(24, 1, lambda x, y: x[:, 0])),
                        lambda: linear(1), loss)
        method(learn)
        assert '(24, 1) float32, target (24,)' in refused(learn,
                                                          'combined every item|neither the sum nor a mean').replace(
            '(72', '(24').replace('(48', '(24')

@methods({k: METHODS[k] for k in ('top', 'filter', 'rho', 'backprop', 'importance')})
def test_one_row_without_a_number_is_not_trained_on(method):
    data = Toy()
    data.x[5] = float('nan')
    learn = learner(loaders(8, data))
    method(learn)
    fit(learn, 2)
    assert weights_of(learn).isfinite().all() and learn.selection.selected[5] == 0

class Later(Callback):
    "A loss that compares items, from the second epoch on"
    order, run_valid = -20, False
    def before_epoch(self):
        if self.epoch == 1:
            self.learn.loss_func = lambda p, t: F.cross_entropy(p, t) + p.mean(0).square().sum()
            self.before = weights_of(self.learn)

@methods({k: v for k, v in METHODS.items() if k != 'stale'})
def test_a_loss_that_comes_later_is_looked_at_too(method):
    "Before its first step"
    learn, later = learner(), Later()
    method(learn)
    with pytest.raises(ValueError, match='neither the sum nor a mean'): fit(learn, 2, cbs=later)
    assert torch.equal(later.before, weights_of(learn))


# 16. Interrupted beside MixUp, which leaves its own loss in the Learner

@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_step', 'before_validate'])
@methods(dict(top=METHODS['top'], rho=METHODS['rho'], random=lambda l: l.prune_epochs('random')))
@pytest.mark.many(3)
def test_interrupted_beside_mixup(method, event, tmp_path):
    learn = learner(path=tmp_path, cbs=MixUp())
    method(learn)
    for goes_on in (False, True):
        with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=Interrupt(event, 15))
        if goes_on: assert len(learn.validate()) == 1
        learn.export('interrupted.pkl')
        loaded = load_learner(tmp_path/'interrupted.pkl')
        loaded.dls = loaders()
        assert len(loaded.validate()) == 1
    assert weights_of(fit(learn, 1)).isfinite().all() and type(learn.loss_func) is CrossEntropyLossFlat
