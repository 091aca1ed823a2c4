"""learn.select: what is trained on against an independent computation, for scores and picks by name and as objects."""
from collections import Counter
from functools import partial
from multiprocessing import active_children

import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from helpers import fit, learner
from numbered_rows import N, Rows, rows_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader

from rholoss_fastai.all import (
    PICKS,
    SCORES,
    BatchSelector,
    Boltzmann,
    ImportanceSample,
    PerClass,
    SeparateForward,
    ThenUniform,
    TopFraction,
    Uniform,
    bald,
    entropy,
    gradient_norm_bound,
    score_inputs,
)

BS = 24

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

def dropout_learner(model=net, bs=BS, shuffle=True):
    return learner(lambda: DataLoaders(DataLoader(Rows(), bs=bs, shuffle=shuffle), DataLoader(Rows(), bs=N)), model)

class Trained(Callback):
    "Candidates, the logits that the model has for them in eval mode, and the rows that are trained on"
    order = -6 # before the selector
    def __init__(self): self.batches, self.rows = [], []
    def before_batch(self):
        if not self.training: return
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng(): logits = self.model(*self.xb)
        self.model.train()
        self.batches.append((rows_of(self.x), logits, self.y))
    def after_pred(self):
        if self.training: self.rows.append(rows_of(self.x))

BY_HAND = dict(
    loss=lambda logits, y: -logits.double().log_softmax(1)[range(len(y)), y],
    gradient_norm=lambda logits, y: (logits.double().softmax(1) - torch.eye(3)[y]).norm(dim=1),
    entropy=lambda logits, y: torch.distributions.Categorical(logits=logits.double()).entropy(),
    margin=lambda logits, y: logits.double().softmax(1).sort(1).values[:,
                                                                       1] - logits.double().softmax(1).sort(
    1).values[:, 2],
    least_confidence=lambda logits, y: -logits.double().softmax(1).max(1).values)

@pytest.mark.parametrize('name', BY_HAND)
@pytest.mark.parametrize('by_object', [False, True])
def test_top_items_of_each_score(name, by_object):
    seen = Trained()
    score, pick = (SCORES[name], TopFraction(0.25)) if by_object else (name, 'top')
    fit(dropout_learner().select(score, pick, **({} if by_object else {'frac': 0.25}), precision=None), 2, cbs=seen)
    assert len(seen.rows) == 2*N//BS
    for (rows, logits, y), trained in zip(seen.batches, seen.rows):
        scores = BY_HAND[name](logits, y)
        assert len(trained) == 6 and set(trained.tolist()) <= set(rows.tolist())
        chosen = torch.isin(rows, trained)
        assert scores[chosen].min() >= scores[~chosen].max() - 1e-5

@pytest.mark.parametrize('name', [name for name, score in SCORES.items() if 'il' not in score_inputs(score)])
def test_every_score_trains(name):
    learn = fit(dropout_learner().select(name, frac=0.25), 2)
    passes = 10*('log_probs' in score_inputs(SCORES[name])) + (score_inputs(SCORES[name]) != ('log_probs',))
    assert (learn.selection.ledger.selected == 0.25).all() and (learn.selection.ledger.scored == passes*N).all()
    assert all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('name', PICKS)
def test_every_pick_trains(name):
    sized = name not in ('loss_share', 'percentile')
    learn = fit(dropout_learner().select('gradient_norm', name, **({'frac': 0.25} if sized else {})), 4)
    ledger = learn.selection.ledger
    assert (ledger.selected == 0.25).all() if sized else ((ledger.selected > 0) & (ledger.selected <= 1)).all()
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_a_function_and_the_selectors_arguments():
    seen = Trained()
    def least_of_class_0(pred, sharpness=1.): return -sharpness*pred[:, 0]
    learn = fit(dropout_learner().select(least_of_class_0, Boltzmann(0.25, T=1e-6), enlarge=True, warmup_epochs=1,
                                         precision=None), 2, cbs=seen)
    assert learn.selector.pick.T == 1e-6 and learn.selection.ledger.scored.tolist() == [0, N]
    for (rows, logits, _), trained in zip(seen.batches[N//BS:], seen.rows[N//BS:]):
        assert len(trained) == min(BS, len(rows)) # n_b is the loader's batch size
        assert torch.equal(trained.sort().values, rows[(-logits[:, 0]).topk(len(trained)).indices].sort().values)

def test_mc_dropout_scores_disagreement():
    "Rows whose hidden units are dropped to effect disagree more than rows of zeros, where only the bias is left"
    def model(): return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
    seen = Trained()
    learn = dropout_learner(model)
    with torch.no_grad(): learn.model[-1].weight.mul_(5)
    fit(learn.select(bald, TopFraction(0.25), n_mc=30, precision=None), 1, cbs=seen)
    size = torch.cat([rows for rows in seen.rows]).unique()
    norms = Rows().images.flatten(1).norm(dim=1)
    assert norms[size].mean() > norms.mean()

class Tokens(nn.Module):
    "Rows of an image, as a sequence, through a layer that has dropout of its own"
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)
    def forward(self, x):
        x = x.squeeze(1)
        out = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))

@pytest.mark.parametrize('layer', [partial(nn.TransformerEncoderLayer, 6, 2, 8, dropout=0.3, batch_first=True),
                                   partial(nn.LSTM, 6, 6, 2, dropout=0.3, batch_first=True),
                                   partial(nn.MultiheadAttention, 6, 2, dropout=0.3, batch_first=True)],
                         ids=['transformer', 'lstm', 'attention'])
def test_dropout_inside_fused_layers_counts(layer):
    """PyTorch's fast path of a transformer layer in eval mode leaves dropout out; recurrent and attention layers have
    no dropout layer inside"""
    values = []
    def disagreement(log_probs): values.append(bald(log_probs)); return values[-1]
    fused = torch.backends.mha.get_fastpath_enabled()
    learn = fit(dropout_learner(lambda: Tokens(layer())).select(disagreement, frac=0.25, precision=None), 1)
    assert torch.cat(values).min() > 1e-7 and torch.backends.mha.get_fastpath_enabled() == fused
    assert not any(p.isnan().any() for p in learn.model.parameters())

@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('norm', [partial(nn.BatchNorm1d, 36), nn.Identity], ids=['batch norm', 'buffer'])
def test_one_forward_leaves_what_backward_needs(mode, norm):
    "Buffers that a graph holds on to may not be written between forward and backward"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(36))
            self.register_buffer('scale', torch.full((36,), 0.5))
        def forward(self, x): return x*self.weight*self.scale
    learn = dropout_learner(lambda: nn.Sequential(nn.Flatten(), norm(), Scaled(), nn.Linear(36, 3)))
    fit(learn.select('loss', TopFraction(0.5), forward='reuse', mode=mode), 2)
    assert (learn.selection.ledger.forward == 'reuse').all() and (learn.selection.ledger.selected == 0.5).all()

def test_fallback_says_where_it_cannot_tell():
    def calm(loss): return -1 - loss
    with pytest.warns(UserWarning, match="can't tell what the selected are worth: the scores calm"):
        fit(dropout_learner().select(calm, frac=0.25, fallback='uniform'), 3)

def test_a_batch_that_is_not_selected_from_is_spread_over_its_candidates():
    "A loader of texts sorts each batch by length: its first items would be the longest"
    seen = Trained()
    fit(dropout_learner().select('loss', frac=0.25, enlarge=True, every=2), 1, cbs=seen)
    assert len(seen.batches[1][0]) == 4*BS and torch.equal(seen.rows[1], seen.batches[1][0][::4])


# Weights

@pytest.mark.slow
def test_expected_gradient_of_a_fit_is_the_full_one(n_epoch=5, times=60):
    """Importance sampling in the training loop: gradients of many batches of the same candidates, no step taken,
    average to that of all"""
    class Gradients(Callback):
        def __init__(self): self.seen = []
        def before_step(self):
            self.seen.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone())
            self.opt.zero_grad()
            raise CancelStepException
    def model(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    learn = learner(lambda: DataLoaders(DataLoader([*Rows()]*times, bs=N), DataLoader(Rows(1), bs=1)), model)
    grads = Gradients()
    loss = learn.loss_func(learn.model(Rows().images), Rows().targets)
    full = torch.cat([o.flatten() for o in torch.autograd.grad(loss, learn.model.parameters())])
    learn.select('gradient_norm', ImportanceSample(0.1, uniform_share=0.1), precision=None)
    fit(learn, n_epoch, cbs=grads)
    seen = torch.stack(grads.seen)
    assert len(seen) == n_epoch*times and (seen.std(0) > 0).any()
    assert ((seen.mean(0) - full).abs() < 5.5*seen.std(0)/len(seen)**0.5).all()

def test_items_may_stand_in_a_batch_more_than_once():
    seen = Trained()
    learn = fit(dropout_learner().select(lambda loss: loss**8, ImportanceSample(0.5)), 1, cbs=seen)
    counts = Counter(torch.cat(seen.rows).tolist())
    assert max(counts.values()) > 1 and sum(counts.values()) == N//2 == learn.selection.ledger.trained.sum()

def test_weights_and_mixup_are_refused():
    for pick in ('importance', ThenUniform(pick=ImportanceSample(0.5))):
        with pytest.raises(ValueError, match='weights each item'):
            fit(dropout_learner().select('gradient_norm', pick), 2, cbs=MixUp())


# What the selector asks the pick

@pytest.mark.parametrize('equal', [False, True])
@pytest.mark.parametrize('enlarge', [False, True])
def test_quotas_in_a_fit(equal, enlarge):
    seen = Trained()
    fit(dropout_learner().select('loss', PerClass(0.25, equal=equal), enlarge=enlarge, precision=None), 2, cbs=seen)
    for (rows, logits, y), trained in zip(seen.batches, seen.rows):
        losses, size = BY_HAND['loss'](logits, y), len(trained)
        had, got = (torch.bincount(Rows().targets[o], minlength=3) for o in (rows, trained))
        wanted = torch.full((3,), size/3) if equal else had*size/len(rows)
        assert ((got - wanted).abs() < 1).all() or (got > wanted).any() and (had == got)[got < wanted].all()
        for c in range(3): # within a class the highest losses
            chosen = torch.isin(rows, trained)
            kept, left = losses[chosen & (y == c)], losses[~chosen & (y == c)]
            if len(kept) and len(left): assert kept.min() >= left.max() - 1e-5

def test_a_stratified_subset_is_not_scored():
    learn = fit(dropout_learner().select('loss', PerClass(pick=Uniform(0.25))), 2)
    assert learn.selection.ledger.scored.sum() == 0

@pytest.mark.parametrize('forward', ['twice', 'reuse'])
@pytest.mark.parametrize('enlarge', [False, True])
def test_scoring_ends_where_chance_begins(forward, enlarge):
    learn = fit(dropout_learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))).select(
        'loss', ThenUniform(0.25, at=0.5), forward=forward, enlarge=enlarge), 4)
    ledger = learn.selection.ledger
    assert ledger.forward.tolist() == [forward]*2 + ['none']*2 and (ledger.scored[2:] == 0).all()
    assert ledger.selected.between(0.2, 0.3).all()

def test_then_uniform_is_the_pick_and_then_chance():
    seen = Trained()
    fit(dropout_learner().select('entropy', ThenUniform(0.25, at=0.5, seed=3), precision=None), 2, cbs=seen)
    chance = Uniform(0.25, seed=3)
    for i, ((rows, logits, y), trained) in enumerate(zip(seen.batches, seen.rows)):
        if i < N//BS: assert set(trained.tolist()) == set(rows[BY_HAND['entropy'](logits, y).topk(6).indices].tolist())
        else: assert torch.equal(trained, rows[chance(torch.empty(len(rows))).idxs])

def test_a_schedule_of_the_fraction():
    learn = fit(dropout_learner().select('margin', 'boltzmann', frac=SchedLin(1., 0.25)), 4)
    assert learn.selection.ledger.selected.is_monotonic_decreasing and learn.selection.ledger.selected.iloc[-1] < 0.5


# One of a Learner

def test_select_replaces_select_and_is_undone():
    learn = dropout_learner()
    n = len(learn.cbs)
    assert learn.select('loss') is learn and learn.select(entropy, 'uniform', 0.5) is learn
    assert type(learn.selector) is BatchSelector and learn.selector.score is entropy and len(learn.cbs) == n + 1
    assert len(learn.no_selection().cbs) == n

def test_export_and_load(tmp_path):
    for pick in PICKS:
        learn = fit(dropout_learner().select('entropy', pick), 1)
        learn.path = tmp_path
        learn.export()
        loaded = load_learner(tmp_path/'export.pkl')
        assert repr(loaded.selector) == repr(learn.selector)

@pytest.mark.parametrize('score', ['reducible', SCORES['negative_il'], lambda loss, il: loss - 0.5*il])
def test_scores_with_irreducible_losses_belong_to_rho_loss(score):
    with pytest.raises(ValueError, match=r'needs irreducible losses \(`il`\): use learn.rho_loss\(score='):
        dropout_learner().select(score)
    dropout_learner().select(score, 'uniform') # which asks for no score

@pytest.mark.parametrize('args,kwargs,kind,message', [
    (('entrophy',), {}, ValueError, "Did you mean 'entropy'"), ((0.5,), {}, TypeError, 'expected a function'),
    (('loss', 'tip'), {}, ValueError, "Did you mean 'top'"),
    (('loss', TopFraction), {}, TypeError, 'must be a name'),
    (('loss', TopFraction(0.5), 0.5), {}, ValueError, 'give one of them'),
    (('loss', 'top', 0), {}, ValueError, r'frac must lie in \(0, 1\]'),
    (('loss', 'percentile'), dict(enlarge=True), ValueError, 'enlarge=False'),
    (('loss',), dict(modes='train'), TypeError, 'modes'),
    (('loss',), dict(epoch='candidate'), ValueError, "Did you mean 'candidates'"),
    (('loss',), dict(forward=SeparateForward(), score_bs=4, precision=None), ValueError,
     'precision, score_bs would change nothing'),
    ((partial(gradient_norm_bound, targ=None),), dict(every=0), ValueError, 'every must be')])
def test_bad_input_is_refused_at_once(args, kwargs, kind, message):
    with pytest.raises(kind, match=message): dropout_learner().select(*args, **kwargs)

def test_another_method_is_refused():
    with pytest.raises(ValueError, match='already selects with BatchLossFilter'):
        dropout_learner().batch_loss_filter().select('loss')

@pytest.mark.parametrize('kind', [DataLoader, TorchDataLoader])
@pytest.mark.many(2)
def test_no_worker_outlives_the_fit(kind):
    "A pass that isn't used up is let go: garbage collection would wait for its workers, five seconds for each"
    train = kind(Rows(), 8, shuffle=True, num_workers=2)
    learn,others = learner(lambda: DataLoaders(train, DataLoader(Rows(), bs=N)), net), set(active_children())
    learn.select('loss', 'top', frac=0.3, enlarge=True, epoch='steps', warmup_epochs=0)
    for _ in range(2):
        fit(learn, 1)
        assert set(active_children()) <= others
    assert learn.selection.ledger.trained.tolist() == [len(train)*8]*2

@pytest.mark.parametrize('settings', [dict(), dict(pick='uniform'), dict(score='bald', n_mc=3), dict(forward='reuse'),
                                      dict(score='loss_plus_conditional_entropy', n_mc=2), dict(staleness=2),
                                      dict(pick=ThenUniform(0.5, at=0.))], ids=str)
@pytest.mark.many(3)
def test_an_epoch_of_the_same_cost(settings):
    "By the ledger, in each epoch: also where nothing is scored, where much is, and with one forward for both"
    frac = {} if isinstance(settings.get('pick'), ThenUniform) else dict(frac=0.5)
    learn = fit(dropout_learner(bs=2).select(enlarge=True, epoch='cost', **frac, **settings), 2)
    plain = len(learn.dls.train)
    for line in learn.selection.ledger.itertuples():
        assert abs(line.trained/2*line.step_cost - plain) <= 0.51*line.step_cost

def test_several_passes_with_classes_on_an_axis_of_ones_own():
    "Under a loss of one's own: the same figures as with the classes on the second axis"
    class Positions(nn.Module):
        def __init__(self, last):
            super().__init__(); self.last, self.drop, self.out = last, nn.Dropout(0.5), nn.Linear(36, 12)
        def forward(self, x):
            res = self.out(self.drop(x.flatten(1))).view(-1, 4, 3)
            return res if self.last else res.transpose(1, 2)
    found = []
    for last in (True, False):
        def own(pred, y): return F.cross_entropy(pred.transpose(1, 2) if last else pred, y[:, None].expand(-1, 4))
        def score(log_probs):
            found.append(partial(bald, task='classes', axis=2 if last else 1)(log_probs))
            return found[-1]
        learn = dropout_learner(partial(Positions, last), bs=N)
        learn.loss_func = own
        fit(learn.select(score, frac=0.5, n_mc=3), 1, seed=0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
