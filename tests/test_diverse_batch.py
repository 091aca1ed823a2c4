"DivBS against an implementation that makes the outer products, and within `learn.select`"
import copy
import math
import pickle

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from helpers import draws, examples, fit, learner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from rholoss_fastai.all import Candidates, DivBS, ThenUniform, diverse_items, find_pick, logit_gradients
from rholoss_fastai.losses import ItemLosses
from rholoss_fastai.scorers import SeparateForward

quick = examples(60)

def outer_products(R, f):
    "`(n, C*d)`, the last layer's gradient of each item"
    return torch.stack([torch.outer(a, b).flatten() for a, b in zip(R.double(), f.double())])

class ByTheRule:
    "Hong et al. 2024, algorithm 1, with explicit gradients, in float64: what may be taken next, given what was taken"
    def __init__(self, g): self.g, self.S, self.basis, self.taken = g, g.sum(0), [], []
    def shares(self):
        shares = (self.g @ self.S).abs()
        shares[self.taken] = -1
        return shares
    def take(self, i):
        e = self.g[i].clone()
        for _ in range(2): e -= sum(((e @ b)*b for b in self.basis), torch.zeros_like(e)) # twice is enough (Kahan)
        self.taken.append(i)
        if e.norm() > 1e-6*self.g[i].norm():
            self.basis.append(e/e.norm())
            self.S = self.S - (self.basis[-1] @ self.S)*self.basis[-1]

@quick
@given(st.integers(2, 30), st.integers(2, 6), st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_equals_explicit_outer_products(n, C, d, seed, ties):
    gen = torch.Generator().manual_seed(seed)
    if ties: R, f = (torch.randint(-1, 2, (n, k), generator=gen).float() for k in (C, d))
    else: R, f = torch.randn(n, C, generator=gen), torch.randn(n, d, generator=gen)
    rule = ByTheRule(outer_products(R, f))
    scale = rule.shares().max()
    taken = diverse_items((R @ R.T)*(f @ f.T), n).tolist()
    assert sorted(taken) == list(range(n))
    for i in taken:
        shares = rule.shares()
        # the rule says nothing about what is taken once nothing of the sum is left
        if shares.max() <= 1e-3*scale: return
        assert shares[i] >= shares.max() - 1e-3*scale # within rounding, one of those with the largest share
        rule.take(i)

@quick
@given(st.integers(3, 25), st.integers(0, 10**6))
def test_exactly_the_rule_without_ties(n, seed):
    gen = torch.Generator().manual_seed(seed)
    R, f = torch.randn(n, 5, generator=gen).double(), torch.randn(n, 12, generator=gen).double()
    rule = ByTheRule(outer_products(R, f))
    for _ in range(n//2): rule.take(rule.shares().argmax().item())
    assert diverse_items((R @ R.T)*(f @ f.T), n//2).tolist() == rule.taken

@pytest.mark.parametrize('sample', [False, True])
def test_nan_comes_last_and_every_item_once(sample):
    R, f = torch.randn(12, 3), torch.randn(12, 4)
    R[3], f[7] = math.nan, math.inf
    gen = torch.Generator().manual_seed(0) if sample else None
    taken = diverse_items((R @ R.T)*(f @ f.T), 12, gen).tolist()
    assert sorted(taken) == list(range(12)) and set(taken[-2:]) == {3, 7}

@pytest.mark.parametrize('gram', [torch.zeros(6, 6), torch.full((6, 6), math.nan), torch.ones(6, 6), torch.eye(6),
                                  1e-20*torch.eye(6), 1e30*torch.eye(6)])
def test_nothing_to_tell_apart(gram):
    assert sorted(diverse_items(gram, 4).tolist()) == [0, 1, 2, 3]
    assert len(set(diverse_items(gram, 6, torch.Generator().manual_seed(0)).tolist())) == 6

def test_begins_again_where_the_taken_span_everything():
    kinds = torch.arange(40) % 4
    taken = kinds[diverse_items(F.one_hot(kinds, 4).float() @ F.one_hot(kinds, 4).float().T, 16)]
    for round in taken.split(4): assert sorted(round.tolist()) == [0, 1, 2, 3]

def test_draws_in_proportion_to_the_shares():
    n = draws(4000)
    g = torch.tensor([[3., 0.], [0., 1.], [0.5, 0.]])
    shares, counts, gen = (g @ g.sum(0)).abs(), torch.zeros(3), torch.Generator().manual_seed(0)
    for _ in range(n): counts[diverse_items(g @ g.T, 1, gen)] += 1
    assert torch.allclose(counts/n, shares/shares.sum(), atol=2/n**0.5)

# What the pick is given

class Net(nn.Module):
    "A head that is not the last module, and a linear layer after it that is not a head"
    def __init__(self, C=4):
        super().__init__()
        self.head, self.body, self.other = nn.Linear(6, C), nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, C)
    def forward(self, x):
        f = self.body(x)
        out = self.head(f)
        self.other(f)
        return out

class NoHead(nn.Module):
    def __init__(self, C=4): super().__init__(); self.net = nn.Linear(5, C)
    def forward(self, x): return self.net(x).sigmoid()*2

def candidates(model, loss, y, score_bs=None):
    x = torch.randn(len(y), 5)
    dl = DataLoader(list(zip(x, y)), bs=4)
    scorer = SeparateForward(precision=None,
                             score_bs=score_bs).begin_epoch(Learner(DataLoaders(dl, dl), model, loss_func=loss),
                                                            torch.device('cpu'))
    return Candidates((x,), (y,), asked=('loss', 'gram'), scorer=scorer, item_losses=ItemLosses(loss)), scorer

def multi(y, C=4): return F.one_hot(y, C).float()

@pytest.mark.parametrize('score_bs', [None, 3])
@pytest.mark.parametrize('loss,targets', [(CrossEntropyLossFlat(), lambda y: y),
                                          (CrossEntropyLossFlat(label_smoothing=0.1), lambda y: y),
    (BCEWithLogitsLossFlat(), multi), (MSELossFlat(), multi),
                                          (lambda pred, y: ((pred - multi(y))**4).mean(), lambda y: y)],
                         ids='ce smooth bce mse own'.split())
def test_gram_is_that_of_the_heads_gradients(loss, targets, score_bs):
    set_seed(0)
    model, y = Net(), targets(torch.randint(0, 4, (10,)))
    c, scorer = candidates(model, loss, y, score_bs)
    with scorer.context(): losses, gram = c['loss'], c['gram']
    assert c.scored == 10 and not any(m._forward_hooks for m in model.modules()) and not gram.requires_grad
    grads = [torch.autograd.grad(ItemLosses(loss)(model(x[None]), t[None]).sum(), model.head.weight)[0].flatten() for x,
             t in zip(c.xb[0], y)]
    grads = torch.stack(grads).double()
    assert torch.allclose(gram.double(), grads @ grads.T, rtol=1e-4, atol=1e-6)
    assert torch.allclose(losses, ItemLosses(loss)(model(c.xb[0]), y))

def test_without_a_head_the_logits_alone():
    model, y = NoHead(), torch.randint(0, 4, (10,))
    c, scorer = candidates(model, CrossEntropyLossFlat(), y)
    with scorer.context(): gram = c['gram']
    R = model(c.xb[0]).softmax(1) - F.one_hot(y, 4)
    assert torch.allclose(gram, R @ R.T, atol=1e-5)

def test_hooks_go_where_scoring_fails():
    model = Net()
    c, scorer = candidates(model, lambda pred, y: 1/0, torch.randint(0, 4, (10,)))
    with pytest.raises(ValueError, match="ZeroDivisionError"), scorer.context(): c['gram']
    assert not any(m._forward_hooks for m in model.modules())

def test_an_output_object():
    class Out(dict): pass
    logits, y = torch.randn(6, 3), torch.randint(0, 3, (6,))
    def loss(out, y): return F.cross_entropy(out['logits'], y)
    with torch.no_grad(): grads = logit_gradients(ItemLosses(loss), Out(hidden=torch.randn(6, 2), logits=logits), y)
    assert torch.allclose(grads, logits.softmax(1) - F.one_hot(y, 3), atol=1e-6)

# In training

def vectors():
    x = torch.randn(96, 5)
    dl = DataLoader(list(zip(x, x[:, :4].argmax(1))), bs=24, shuffle=True)
    return DataLoaders(dl, dl)

def head_learner(): return learner(vectors, Net, lr=0.1)

@pytest.mark.parametrize('kwargs', [dict(), dict(enlarge=True), dict(score_bs=5), dict(score='gradient_norm'),
                                    dict(forward='twice')], ids=str)
def test_trains(kwargs):
    learn = fit(head_learner().select(pick='divbs', frac=0.25, **kwargs), 2)
    assert (learn.selection.ledger.selected == 0.25).all() and (learn.selection.ledger.scored == 96).all()
    assert (learn.selection.ledger.forward == 'twice').all()
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_the_cheaper_forward_stays_one_of_its_own():
    learn = fit(head_learner().select(pick='divbs', frac=0.95), 3)
    assert (learn.selection.ledger.forward == 'twice').all()

class Stream(IterableDataset):
    "Items without numbers"
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)
    def __len__(self): return len(self.items) # fastai asks for it, of a loader of PyTorch

class Seen(Callback):
    "Candidates, and what is trained on"
    def __init__(self, order): self.order, self.batches = order, []
    def before_batch(self):
        if self.training: self.batches.append(self.xb[0])

@pytest.mark.parametrize('kind', [DataLoader, TorchDataLoader])
def test_a_stream_without_an_end(kind):
    class Endless(IterableDataset):
        def __iter__(self):
            while True: yield torch.zeros(5), torch.tensor(0)
    dls = DataLoaders(kind(Endless(), 12), kind(Endless(), 12))
    with pytest.raises(ValueError, match='give the data set a length'):
        fit(Learner(dls, Net(), loss_func=CrossEntropyLossFlat()).select(pick='divbs'), 1)

def by_the_rule(R, f, size):
    rule = ByTheRule(outer_products(R, f))
    for _ in range(size): rule.take(rule.shares().argmax().item())
    return sorted(rule.taken)

@pytest.mark.parametrize('torch_loader', [False, True])
def test_a_stream_without_row_numbers(torch_loader):
    "What is trained on is what the rule takes, batch by batch, by the head's gradients"
    set_seed(0)
    x = torch.randn(48, 5)
    stream, kind = Stream(list(zip(x, x[:, :4].argmax(1)))), TorchDataLoader if torch_loader else DataLoader
    dls = DataLoaders(kind(stream, 12), kind(stream, 12))
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.1)
    before, after = Seen(-6), Seen(-4)
    class Rule(Callback):
        order = -5.5
        def before_fit(self): self.taken = []
        def before_batch(self):
            if not self.training: return
            with torch.no_grad(): f = self.model.body(self.x); R = self.model.head(f).softmax(1) - F.one_hot(self.y, 4)
            self.taken.append(by_the_rule(R, f, 4))
    fit(learn.select(pick='divbs', frac=1/3, precision=None), 2, cbs=[before, after, rule := Rule()])
    assert learn.selection.selected is None and learn.selection.ledger.trained.tolist() == [16, 16]
    assert len(rule.taken) == 8
    for x, chosen, taken in zip(before.batches, after.batches, rule.taken): assert torch.equal(x[taken], chosen)

class Pixels(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(2, 3, 1)
    def forward(self, x): return self.conv(x)

class Words(nn.Module):
    "Its last layer is linear, but predicts for many positions"
    def __init__(self): super().__init__(); self.out = nn.Linear(2, 3)
    def forward(self, x): return self.out(x)

TASKS = dict(
    segmentation=(torch.randn(24, 2, 4, 5), lambda x: (x[:, 0] > 0).long(), Pixels, CrossEntropyLossFlat(axis=1),
                  lambda p, y: p.softmax(1) - F.one_hot(y, 3).movedim(-1, 1), 20),
    tagging=(torch.randn(24, 7, 2), lambda x: (x[..., 0] > 0).long(), Words, CrossEntropyLossFlat(),
             lambda p, y: p.softmax(-1) - F.one_hot(y, 3), 7))

@pytest.mark.parametrize('task', TASKS)
def test_many_predictions_of_an_item(task):
    "The derivatives of an item's loss by all its logits"
    x, targets, model, loss, grad, n = TASKS[task]
    set_seed(0)
    y, model = targets(x), model()
    dl = DataLoader(list(zip(x, y)), bs=12)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=loss, opt_func=SGD, lr=0.)
    with torch.no_grad(): R = (grad(model(x), y)/n).flatten(1).double()
    after = Seen(-4)
    fit(learn.select(pick='divbs', frac=0.25, precision=None), 1, cbs=after)
    for first, chosen in zip((0, 12), after.batches):
        taken = by_the_rule(R[first:first+12], torch.ones(12, 1), 3)
        assert torch.equal(chosen, x[first:first+12][taken])

@pytest.mark.parametrize('loss,targets', [(BCEWithLogitsLossFlat(), multi), (MSELossFlat(), multi),
                                          (nn.L1Loss(), multi), (nn.HuberLoss(reduction='sum'), multi)],
                         ids=lambda o: getattr(o, '__name__', None) or str(o))
def test_other_losses_train(loss, targets):
    set_seed(0)
    x = torch.randn(48, 5)
    dl = DataLoader(list(zip(x, targets(x[:, :4].argmax(1)))), bs=12)
    learn = fit(Learner(DataLoaders(dl, dl), Net(), loss_func=loss, opt_func=SGD,
                        lr=0.01).select(pick='divbs', frac=0.25), 2)
    assert learn.selection.ledger.trained.tolist() == [12, 12]
    assert all(o.isfinite().all() for o in learn.model.parameters())

def test_staleness_only_where_something_is_left_to_save():
    "The products of gradients are of now: remembered losses would save no forward"
    with pytest.raises(ValueError, match=r"needs the prediction of each candidate anew \(gram\)"):
        head_learner().select(pick='divbs', staleness=2)
    with pytest.raises(ValueError, match=r"anew \(pred\)"): head_learner().select('entropy', staleness=2)
    with pytest.raises(ValueError, match=r"anew \(log_probs\)"): head_learner().select('bald', staleness=2)
    for kwargs in (dict(pick='per_class'), dict(pick=ThenUniform(0.5))):
        learn = fit(head_learner().select(staleness=2, **kwargs), 4)
        assert learn.selection.ledger.scored.tolist()[:2] == [96, 0]

def test_one_kind_of_item_and_a_diverged_model():
    learn = head_learner()
    dl = DataLoader([(torch.ones(5), torch.tensor(1))]*24, bs=12)
    learn.dls = DataLoaders(dl, dl)
    assert fit(learn.select(pick='divbs', frac=0.25), 2).selection.ledger.trained.tolist() == [6, 6]
    diverged = head_learner()
    with torch.no_grad(): diverged.model.head.weight.fill_(math.nan)
    with pytest.warns(UserWarning, match='every score was NaN'): fit(diverged.select(pick='divbs', frac=0.25), 1)
    assert diverged.selection.ledger.trained.tolist() == [24]

def test_refused_before_training():
    with pytest.raises(ValueError, match="gram: .*forward='twice'"):
        head_learner().select(pick='divbs', forward='reuse')
    with pytest.raises(ValueError, match='gram: .*compile=False'): head_learner().select(pick='divbs', compile=True)
    with pytest.raises(ValueError, match='frac must lie'): DivBS(0.)

def test_copies():
    pick = find_pick('divbs', 0.3)
    for other in (copy.deepcopy(pick), pickle.loads(pickle.dumps(pick))):
        assert repr(other) == repr(pick) == 'DivBS(frac=0.3, sample=False, seed=0)'
    g = torch.randn(20, 6)
    draws = [DivBS(0.3, sample=True, seed=seed)(torch.empty(20), gram=g @ g.T).idxs.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(ThenUniform(pick=DivBS(0.3), at=0.5)(torch.rand(20), gram=g @ g.T).idxs) == 6

def test_one_number_an_item_without_an_axis_of_its_own():
    pred,targ = torch.tensor([0.5, -2., 3.]),torch.zeros(3)
    found = logit_gradients(ItemLosses(nn.SmoothL1Loss()), pred, targ)
    torch.testing.assert_close(found, torch.tensor([[0.5], [-1.], [1.]]))
