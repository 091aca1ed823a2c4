"""Scores against closed forms, SciPy and float64 brute force, on odd input of every kind."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from fastai.losses import BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, MSELossFlat
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.checks import by_name
from rholoss_fastai.losses import ItemLosses
from rholoss_fastai.scores import (
    SCORES,
    bald,
    conditional_entropy,
    entropy,
    find_score,
    for_loss,
    gradient_norm_bound,
    least_confidence,
    loss_minus_conditional_entropy,
    loss_plus_conditional_entropy,
    margin,
    mc_entropy,
    score_inputs,
    training_loss,
)

quick = examples(100)

ENTROPY = lambda p: -sum(o*math.log(o) for o in p if o > 0)
BY_HAND = {entropy: ENTROPY, margin: lambda p: sorted(p)[-2] - sorted(p)[-1], least_confidence: lambda p: 1 - max(p)}
MC = (mc_entropy, conditional_entropy, bald)

def inputs(score, n=6, n_classes=4, n_mc=3, dtype=torch.float32, seed=0):
    "What `score` asks for, made up"
    g = torch.Generator().manual_seed(seed)
    made = dict(loss=torch.rand(n, generator=g), il=torch.rand(n, generator=g), hopeless=torch.arange(n) % 3 == 1,
                pred=torch.randn(n, n_classes, generator=g),
                targ=torch.randint(n_classes, (n,), generator=g),
                log_probs=torch.randn(n_mc, n, n_classes, generator=g).log_softmax(2))
    return {name: made[name].to(dtype) if made[name].is_floating_point() else made[name]
            for name in score_inputs(score)}


# Against independent results

@quick
@given(st.lists(st.lists(st.floats(-60, 60), min_size=5, max_size=5), min_size=1, max_size=8))
def test_scores_without_labels_equal_brute_force(logits):
    for score, by_hand in BY_HAND.items():
        got = score(torch.tensor(logits))
        assert got.dtype == torch.float32 and got.shape == (len(logits),)
        np.testing.assert_allclose(got, [by_hand(p) for p in softmax(np.array(logits), 1).tolist()], atol=2e-6)

@quick
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=6))
def test_two_classes_in_closed_form(ps):
    "A pass that says p, one that says 1-p: the mean is undecided, and each pass has the entropy h(p)"
    p = torch.tensor(ps, dtype=torch.float64)
    passes = torch.stack([torch.stack([p, 1-p], 1), torch.stack([1-p, p], 1)]).log().float()
    h = torch.tensor([ENTROPY([o, 1-o]) for o in ps])
    torch.testing.assert_close(mc_entropy(passes), torch.full_like(h, math.log(2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(conditional_entropy(passes), h, atol=1e-6, rtol=0)
    torch.testing.assert_close(bald(passes), math.log(2) - h, atol=2e-6, rtol=0)
    for score in (entropy, mc_entropy, conditional_entropy):  # without a second opinion they are one
        torch.testing.assert_close(score(passes[0] if score is entropy else passes[:1]), h, atol=1e-6, rtol=0)
    torch.testing.assert_close(margin(passes[0]), -(2*p - 1).abs().float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(least_confidence(passes[0]), torch.minimum(p, 1-p).float(), atol=1e-6, rtol=0)

@quick
@given(st.integers(1, 12), st.integers(1, 7), st.integers(2, 50), st.floats(0.01, 40), st.integers(0, 2**31))
def test_mc_dropout_equals_float64(n_mc, n, n_classes, spread, seed):
    logits = np.random.default_rng(seed).normal(size=(n_mc, n, n_classes))*spread
    p = softmax(logits, 2)
    def h(p): return np.where(p > 0, -p*np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    log_probs = torch.tensor(log_softmax(logits, 2)).float()
    wanted = {mc_entropy: h(p.mean(0)), conditional_entropy: h(p).mean(0), bald: h(p.mean(0)) - h(p).mean(0)}
    for score, value in wanted.items(): np.testing.assert_allclose(score(log_probs), value, atol=5e-6)
    disagreement = np.mean([(q*(np.log(np.maximum(q, 1e-300)) - np.log(np.maximum(p.mean(0), 1e-300)))).sum(-1)
                            for q in p], axis=0)
    # mean divergence from the mean: another definition
    np.testing.assert_allclose(bald(log_probs), disagreement, atol=5e-6)
    assert bald(log_probs).min() >= -5e-6 and (bald(log_probs) <= math.log(n_mc) + 5e-6).all()
    loss = torch.rand(n)
    np.testing.assert_allclose(loss_minus_conditional_entropy(loss, log_probs), loss - h(p).mean(0), atol=5e-6)
    np.testing.assert_allclose(loss_plus_conditional_entropy(loss, log_probs), loss + h(p).mean(0), atol=5e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('score', MC)
def test_passes_of_half_precision_are_normalised(score, dtype):
    """The probabilities of a pass no longer sum to one; agreement is still agreement, and no entropy is above the
    largest"""
    log_probs = (2*torch.randn(1, 200, 100)).log_softmax(2).to(dtype)
    assert not torch.allclose(log_probs.double().exp().sum(2), torch.ones(1, 200, dtype=torch.float64), atol=1e-4)
    if score is bald: assert bald(log_probs.expand(10, -1, -1)).abs().max() < 5e-6
    else: torch.testing.assert_close(score(log_probs), entropy(log_probs[0].double().log_softmax(1)), atol=5e-6, rtol=0)
    assert score(torch.zeros(2, 3, 100, dtype=dtype) - math.log(100)).max() <= math.log(100) + 1e-5

@pytest.mark.parametrize('score', [*BY_HAND, *MC], ids=lambda o: o.__name__)
def test_masks_have_the_mean_of_their_positions(score):
    pred = torch.randn(*([3] if score in MC else []), 4, 5, 6, 7)
    pixels = torch.stack([score(pred[..., i, j]) for i in range(6) for j in range(7)]).mean(0)
    torch.testing.assert_close(score(pred), pixels)
    torch.testing.assert_close(partial(score, axis=-1)(pred.movedim(-3, -1)), pixels)
    torch.testing.assert_close(score(pred, axis=-3), pixels)

def test_mc_dropout_of_a_model():
    "Ten passes of a network with dropout, item by item and pass by pass"
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4))
    with torch.no_grad(): log_probs = torch.stack([net(torch.ones(5, 3)).log_softmax(1) for _ in range(10)])
    for i in range(5):
        passes = log_probs[:, i].double().exp().tolist()
        mean = [sum(o)/10 for o in zip(*passes)]
        assert bald(log_probs)[i].item() == pytest.approx(ENTROPY(mean) - sum(map(ENTROPY, passes))/10, abs=1e-5)
    assert bald(log_probs).min() > 1e-3


# Every score, on odd input

each_score = pytest.mark.parametrize('score', SCORES.values(), ids=SCORES)

@each_score
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precisions(score, dtype):
    res = score(**inputs(score, dtype=dtype))
    assert res.shape == (6,) and res.is_floating_point()
    exact = score(**inputs(score, dtype=torch.float64))
    torch.testing.assert_close(res.double(), exact.double(), rtol=0.02,
                               atol=0.03 if dtype in (torch.float16, torch.bfloat16) else 1e-5)

@each_score
def test_batch_of_one_and_each_item_for_itself(score):
    whole = inputs(score)
    def item(name, o): return o[:, 2:3] if name == 'log_probs' else o[2:3]
    torch.testing.assert_close(score(**{name: item(name, o) for name, o in whole.items()}), score(**whole)[2:3])

@each_score
def test_nan_stays_with_its_item(score):
    odd = inputs(score)
    for name, o in odd.items():
        if name == 'log_probs': o[1, 3, 0] = math.nan
        elif o.is_floating_point(): o[3] = math.nan
    res = score(**odd)
    assert res.isnan().tolist() == [False]*3 + [True] + [False]*2

@each_score
def test_ties(score):
    alike = {name: o.select(1, 0).unsqueeze(1).expand(-1, 5, -1) if name == 'log_probs'
             else o[:1].expand(5, *o.shape[1:]) for name, o in inputs(score).items()}
    assert score(**alike).unique().numel() == 1

@each_score
def test_a_class_is_missing(score):
    "No target of it, and impossible by the logits: it neither counts nor makes NaN"
    four = inputs(score, n_classes=4)
    if 'targ' in four: four['targ'] = four['targ'] % 3
    three = {name: o[..., :3] if name == 'pred' else o[..., :3].log_softmax(2) if name == 'log_probs' else o for name,
             o in four.items()}
    for name in {'pred', 'log_probs'} & set(four):
        four[name] = four[name].clone().index_fill_(-1, torch.tensor([3]), -math.inf)
    torch.testing.assert_close(score(**four), score(**three), atol=1e-6, rtol=1e-5)

def test_certainty_is_zero_in_every_measure():
    certain = torch.tensor([[0., -math.inf, -math.inf], [200., 0., -200.]])
    for score in BY_HAND: torch.testing.assert_close(score(certain), torch.full((2,), -1. if score is margin else 0.))
    for score in MC: torch.testing.assert_close(score(certain.log_softmax(1).expand(4, 2, 3)), torch.zeros(2))

def test_outputs_that_hold_logits():
    logits = torch.randn(4, 3)
    for score in BY_HAND:
        assert torch.equal(score(dict(hidden=torch.zeros(4, 9), logits=logits)), score((logits, None)))

def test_gradient_norm_is_that_of_cross_entropy():
    pred, targ = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (8,))
    grad, = torch.autograd.grad(F.cross_entropy(pred, targ, reduction='sum'), pred)
    torch.testing.assert_close(gradient_norm_bound(pred, targ), grad.norm(dim=1).float())


# By name

def test_every_name_is_found_and_names_what_it_needs():
    for name, score in SCORES.items():
        assert find_score(name) is score
        assert set(score_inputs(score)) <= {'loss', 'il', 'hopeless', 'pred', 'targ', 'log_probs'}

def test_functions_are_handed_back():
    def own(loss, pred, sharpness=2.): return loss
    for score in (own, partial(entropy, axis=-1), training_loss, lambda il: -il): assert find_score(score) is score

@pytest.mark.parametrize('score,kind,message', [
    ('entrpy', ValueError,
     "score is 'entrpy', expected one of loss, .*, or one of your own. Did you mean 'entropy'"),
    ('zzz', ValueError, r"of your own\.$"), (None, TypeError, 'score is None, expected a function'),
    (0.1, TypeError, 'such as training_loss'),
    (torch.ones(3), TypeError, 'expected a function'),
    (lambda loss, index: loss, ValueError, r'\(loss, index\), expected one or more of')])
def test_bad_scores_are_refused(score, kind, message):
    with pytest.raises(kind, match=message): find_score(score)

def test_names_of_anything():
    assert by_name('fruit', 'pear', dict(pear=3)) == 3
    with pytest.raises(ValueError,
                       match="fruit is 'paer', expected one of apple, pear, or one of your own. Did you "
                             "mean 'pear'?"):
        by_name('fruit', 'paer', dict(apple=1, pear=2))


# Shapes that cannot be

@pytest.mark.parametrize('score', [*BY_HAND, *MC], ids=lambda o: o.__name__)
@pytest.mark.parametrize('shape,axis', [((4, 1), 1), ((4,), 1), ((4, 3), 0), ((4, 3), -2), ((4, 3), 2)])
def test_what_is_no_classifier_is_refused(score, shape, axis):
    pred = torch.zeros(*([3] if score in MC else []), *shape)
    with pytest.raises(ValueError, match='such as training_loss|n_mc, bs, n_classes'): score(pred, axis=axis)

def test_passes_must_come_first():
    with pytest.raises(ValueError, match=r'expected log_probs \(n_mc, bs, n_classes, ...\).*got \(4, 3\)'):
        bald(torch.zeros(4, 3))


# The form of the task that the loss is for

def binary(pred): return pred.double().sigmoid()
OF_LABELS = {entropy: lambda p: (-(p*p.log()) - (1-p)*(1-p).log()).flatten(1).mean(1),
             margin: lambda p: -(2*p - 1).abs().flatten(1).mean(1),
             least_confidence: lambda p: torch.minimum(p, 1-p).flatten(1).mean(1)}
multilabel_losses = [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(), nn.MultiLabelSoftMarginLoss(),
                     F.binary_cross_entropy_with_logits,
                     partial(F.binary_cross_entropy_with_logits, pos_weight=torch.ones(4)),
                     lambda p, t: F.binary_cross_entropy_with_logits(p, t.float())]

@pytest.mark.parametrize('loss_func', multilabel_losses)
@pytest.mark.parametrize('shape', [(6, 4), (6, 1), (6, 4, 3, 2)])
def test_several_labels_have_a_sigmoid(loss_func, shape):
    losses, pred, targ = ItemLosses(loss_func), 3*torch.randn(shape), torch.randint(0, 2, shape)
    for score, by_hand in OF_LABELS.items():
        torch.testing.assert_close(for_loss(score, losses)(pred).double(), by_hand(binary(pred)), rtol=1e-4, atol=1e-5)
    leaf = pred.double().requires_grad_()
    grad, = torch.autograd.grad(F.binary_cross_entropy_with_logits(leaf, targ.double(), reduction='sum'), leaf)
    for labels in (targ, targ.float(), targ.bool()):
        torch.testing.assert_close(for_loss(gradient_norm_bound, losses)(pred, labels).double(),
                                   grad.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6)
    if shape == (6, 1): for_loss(gradient_norm_bound, losses)(pred, targ[:,0])

@pytest.mark.parametrize('loss_func', [nn.BCELoss(), BCELossFlat(), F.binary_cross_entropy])
def test_labels_that_are_probabilities_already(loss_func):
    losses, pred, targ = ItemLosses(loss_func), torch.rand(5, 3), torch.randint(0, 2, (5, 3))
    for score, by_hand in OF_LABELS.items():
        torch.testing.assert_close(for_loss(score, losses)(pred).double(), by_hand(pred.double()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(for_loss(gradient_norm_bound, losses)(pred, targ), (pred - targ).norm(dim=1))

all_of_classes = [entropy, margin, least_confidence, gradient_norm_bound, *MC, loss_minus_conditional_entropy,
                  loss_plus_conditional_entropy]
@pytest.mark.parametrize('score', all_of_classes, ids=lambda o: o.__name__)
@pytest.mark.parametrize('loss_func,what',
                         [(MSELossFlat(), 'numbers'), (F.l1_loss, 'numbers'), (nn.TripletMarginLoss(), 'no classes'),
 (lambda pred, a, b: F.cross_entropy(pred, a) + F.cross_entropy(pred, b), 'several targets'),
                          (lambda pred, targ: (pred - targ).square().mean(), 'task=')])
def test_where_there_are_no_classes(score, loss_func, what):
    "Coordinates and embeddings are no probabilities, however much they look like it"
    odd = inputs(score)
    if 'targ' in odd: odd['targ'] = torch.randn(6, 4)
    with pytest.raises(ValueError, match=f'{score.__name__} is for the probabilities of classes.*{what}'):
        for_loss(score, ItemLosses(loss_func))(**odd)

@pytest.mark.parametrize('score', [*MC, loss_minus_conditional_entropy, loss_plus_conditional_entropy],
                         ids=lambda o: o.__name__)
def test_passes_of_several_labels_are_refused(score):
    with pytest.raises(ValueError, match='several labels'):
        for_loss(score, ItemLosses(nn.BCEWithLogitsLoss()))(**inputs(score))

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), FocalLossFlat(), F.cross_entropy,
                                       nn.NLLLoss(),
                                       lambda p, t: F.cross_entropy(p, t),
                                       lambda p, t: -p.log_softmax(1).gather(1, t[:,None]).mean()])
@each_score
def test_classes_as_before(score, loss_func):
    assert torch.equal(for_loss(score, ItemLosses(loss_func))(**inputs(score)), score(**inputs(score)))

@pytest.mark.parametrize('score', [entropy, margin, least_confidence], ids=lambda o: o.__name__)
def test_the_axis_and_the_void_are_those_of_the_loss(score):
    pred, targ = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6)) # sequences, whose classes come last
    sequences = ItemLosses(CrossEntropyLossFlat(ignore_index=3))
    torch.testing.assert_close(for_loss(score, sequences)(pred), score(pred.transpose(1, 2)))
    torch.testing.assert_close(for_loss(gradient_norm_bound, sequences)(pred, targ),
                               gradient_norm_bound(pred.transpose(1, 2), targ, ignore_index=3))
    masks = ItemLosses(nn.CrossEntropyLoss(ignore_index=255))
    pred, targ = torch.randn(4, 5, 3, 2), torch.randint(0, 5, (4, 3, 2))
    targ[1], targ[0,0] = 255, 255 # one is void all over
    leaf = pred.double().requires_grad_()
    grad, = torch.autograd.grad(F.cross_entropy(leaf, targ, ignore_index=255, reduction='sum'), leaf)
    got = for_loss(gradient_norm_bound, masks)(pred, targ)
    torch.testing.assert_close(got.double(), grad.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6)
    assert got[1] == 0

def test_what_was_given_stays():
    pred = torch.randn(4, 5, 6)
    assert torch.equal(for_loss(partial(entropy, axis=2), ItemLosses(nn.CrossEntropyLoss()))(pred),
                       entropy(pred, axis=2))
    numbers = lambda pred, targ: (pred - targ).square().mean()
    assert torch.equal(for_loss(partial(entropy, task='classes'), ItemLosses(numbers))(pred), entropy(pred))
    def own(pred, axis=7): return pred
    for score in (own, training_loss, lambda il: -il): assert for_loss(score, ItemLosses(nn.MSELoss())) is score

@pytest.mark.parametrize('dtype', [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_classes_in_a_column(dtype):
    pred, targ = torch.randn(6, 3), torch.randint(0, 3, (6,))
    for o in (targ.to(dtype), targ.to(dtype)[:,None]):
        assert torch.equal(gradient_norm_bound(pred, o), gradient_norm_bound(pred, targ))

def test_several_targets_are_refused():
    with pytest.raises(ValueError, match='needs one target, and the batch has 2'):
        gradient_norm_bound(torch.randn(4, 3), (torch.zeros(4).long(), torch.zeros(4)))

def test_the_argument_is_called_what_it_is():
    with pytest.raises(ValueError, match=r'wrong has the parameters \(a, b\)'): score_inputs(lambda a, b: a, 'wrong')
