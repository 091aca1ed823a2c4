"""Picks by enumeration, simulation and brute force, on odd scores of every kind."""
import copy
import math
import pickle
from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import pytest
import torch
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin
from helpers import draws, examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rholoss_fastai.all import (
    PICKS,
    Boltzmann,
    ImportanceSample,
    LossShare,
    PercentileSample,
    PerClass,
    Pick,
    RankSample,
    Selection,
    ThenUniform,
    TopFraction,
    Uniform,
    find_pick,
)
from rholoss_fastai.picks import RankedPick

quick = examples(100)
any_scores = st.lists(st.floats(width=32) | st.sampled_from([math.inf, -math.inf, math.nan, 0., 1.]), min_size=1,
                      max_size=40)
SIZED = {name: cls for name, cls in PICKS.items() if cls.fraction is not Pick.fraction}
each_sized = pytest.mark.parametrize('name', SIZED)

def picked(pick, scores, pct_train=0., size=None, targ=None):
    "The selection, with the classes where the pick asks for them"
    if targ is None: targ = torch.arange(len(scores)) % 3
    figures = dict(targ=targ, gram=torch.diag(torch.nan_to_num(scores.float(), nan=math.nan).abs()))
    return pick(scores, pct_train, size, **{name: figures[name] for name in pick.needs})

def check(selection, n, size, weighted=False):
    idxs, weights = selection
    assert idxs.dtype == torch.long and len(idxs) == size and idxs.min() >= 0 and idxs.max() < n
    assert (idxs.diff() >= 0 if weighted else idxs.diff() > 0).all()
    assert (weights is not None) == weighted
    if weighted:
        assert weights.dtype == torch.float32 and weights.shape == (size,) and weights.isfinite().all()
        assert (weights > 0).all()


# Every pick of fixed size

@quick
@given(any_scores, st.integers(1, 40), st.sampled_from(sorted(SIZED)))
def test_size_is_exact_whatever_the_scores(scores, size, name):
    scores, pick = torch.tensor(scores), find_pick(name)
    size = min(size, len(scores))
    check(picked(pick, scores, size=size), len(scores), size, pick.weighted)
    check(picked(pick, scores), len(scores), pick.size(len(scores)), pick.weighted)

@each_sized
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(name, dtype):
    scores = torch.tensor([0.5, 2., 0.25, 8., 1., math.nan]).to(dtype)
    check(picked(pick := find_pick(name, 0.5), scores), 6, 3, pick.weighted)

@each_sized
def test_batch_of_one(name):
    for value in (0.3, 0., -1., math.nan, math.inf):
        pick = find_pick(name)
        selection = picked(pick, torch.tensor([value]))
        check(selection, 1, 1, pick.weighted)
        assert selection.weights is None or selection.weights.item() == 1

@pytest.mark.parametrize('name', sorted(set(SIZED) - {'uniform'}))
@pytest.mark.parametrize('others', [[0.1, 3., 0.5], [-5., -math.inf, -9.], [math.inf, 1e38, -1e38]], ids=str)
def test_nan_comes_last(name, others):
    scores = torch.tensor([math.nan, *others[:2], math.nan, others[2], math.nan])
    pick = find_pick(name)
    for _ in range(100): assert set(picked(pick, scores, size=3).idxs.tolist()) <= {1, 2, 4}

def test_percentile_sample_never_draws_nan():
    pick = PercentileSample(beta=0., sampling_min=0.5)
    for _ in range(20): assert picked(pick, torch.tensor([1., math.nan, 2., math.nan])).idxs.tolist() == [0, 2]

@each_sized
@pytest.mark.parametrize('value', [math.nan, 0., 3., math.inf, -math.inf])
def test_scores_all_alike(name, value):
    pick = find_pick(name, 0.25)
    check(picked(pick, torch.full((12,), value)), 12, 3, pick.weighted)

@each_sized
def test_draws_have_their_own_seed(name):
    if 'seed' not in SIZED[name].__init__.__code__.co_varnames: return
    scores, state = torch.rand(50), torch.get_rng_state()
    kwargs = dict(sample=True) if name == 'divbs' else {} # by default it draws nothing
    first, again, other = (SIZED[name](0.4, seed=seed, **kwargs) for seed in (1, 1, 2))
    draws = [[picked(o, scores, 1.).idxs.tolist() for _ in range(5)] for o in (first, again, other)]
    assert draws[0] == draws[1] != draws[2] and draws[0][0] != draws[0][1]
    assert torch.equal(torch.get_rng_state(), state)

@each_sized
def test_copies_and_pickles(name):
    pick, scores = find_pick(name, 0.4), torch.rand(20)
    picked(pick, scores)
    for other in (pickle.loads(pickle.dumps(pick)), copy.deepcopy(pick)):
        assert repr(other) == repr(pick) and '_' not in repr(pick).replace('uniform_share', '')
        check(picked(other, scores), 20, 8, pick.weighted)

class HostReads(TorchDispatchMode):
    "What reads a value, or a size that depends on values, from the device. (`tolist` of a CPU tensor isn't dispatched)"
    ops = ('_local_scalar_dense', 'nonzero', '_unique2', 'unique_dim', 'masked_select', 'bincount', 'equal')
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [name for name in self.ops if name == func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))

@each_sized
def test_no_host_sync(name, monkeypatch):
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda o: (lists.append(o), tolist(o))[1])
    scores, targ, pick = torch.rand(32), torch.arange(32) % 3, find_pick(name, 0.25)
    with HostReads() as reads: picked(pick, scores, targ=targ)
    assert reads.seen == lists == []
    with HostReads() as reads: LossShare()(scores), PercentileSample()(scores)
    assert reads.seen and lists # the picks that must read are caught

@pytest.mark.cuda
@each_sized
def test_no_host_sync_on_cuda(name):
    scores, targ, pick = torch.rand(320, device='cuda'), torch.randint(10, (320,), device='cuda'), find_pick(name, 0.1)
    picked(pick, scores, targ=targ)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode('error')
        for size in (None, 1, 320): selection = picked(pick, scores, size=size, targ=targ)
    finally: torch.cuda.set_sync_debug_mode(mode)
    check(selection, 320, 320, pick.weighted)


# Uniform

def test_uniform_is_a_permutation_of_its_generator():
    pick, generator = Uniform(0.3, seed=5), torch.Generator().manual_seed(5)
    for _ in range(4):
        assert torch.equal(pick(torch.empty(30)).idxs, torch.randperm(30, generator=generator)[:9].sort().values)

def test_uniform_goes_on_where_it_was_saved():
    pick = Uniform(0.5)
    pick(torch.empty(20))
    other = pickle.loads(pickle.dumps(pick))
    assert torch.equal(other(torch.empty(20)).idxs, pick(torch.empty(20)).idxs)


# Boltzmann

def without_replacement(p, size):
    "Probability of each set of `size` items drawn one after another, by adding up all orders"
    sets = Counter()
    for order in permutations(range(len(p)), size):
        left, probability = 1., 1.
        for i in order: left, probability = left - p[i], probability*p[i]/left
        sets[tuple(sorted(order))] += probability
    return sets

def same_distribution(counts, wanted, n):
    assert set(counts) <= set(wanted)
    for o, p in wanted.items(): assert abs(counts[o]/n - p) < 5*(p*(1-p)/n)**0.5 + 1e-9, (o, counts[o]/n, p)

@pytest.mark.parametrize('T', [0.25, 1., 5.])
@pytest.mark.parametrize('size', [1, 2, 3])
def test_boltzmann_draws_by_exp(T, size, n=4000):
    n = draws(n)
    pick, scores = Boltzmann(T=T), torch.tensor([0.5, -0.2, 0.9, 0.1])
    wanted = without_replacement((scores.double()/T).softmax(0).tolist(), size)
    same_distribution(Counter(tuple(pick(scores, size=size).idxs.tolist()) for _ in range(n)), wanted, n)

def test_boltzmann_between_top_and_chance():
    scores = torch.randn(100)
    assert torch.equal(Boltzmann(0.2, T=1e-6)(scores).idxs, TopFraction(0.2)(scores).idxs)
    hot, counts = Boltzmann(0.2, T=1e6), torch.zeros(100)
    for _ in range(1000): counts[hot(scores).idxs] += 1
    assert (counts - 200).abs().max() < 5*(1000*0.2*0.8)**0.5

@pytest.mark.parametrize('T', [0.25, SchedLin(0.1, 3.), SchedExp(0.1, 3.), SchedCos(2., 0.1), lambda pct: 0.5 + pct])
@pytest.mark.many(3)
def test_boltzmann_follows_a_schedule(T, n=3000):
    n = draws(n)
    scores = torch.tensor([1., 0.])
    for pct in (0., 0.5, 1.):
        pick, now = Boltzmann(0.5, T=T), T(pct) if callable(T) else T
        p = 1/(1 + math.exp(-1/now))
        same_distribution(Counter(pick(scores, pct).idxs.item() for _ in range(n)), {0: p, 1: 1-p}, n)


# ImportanceSample

def rates(pick, scores): return [o.double() for o in pick.probabilities(scores)]

@quick
@given(st.lists(st.floats(0, 2.**100, width=32) | st.just(0.), min_size=1, max_size=30), st.floats(0, 1))
def test_rates_are_the_formula(scores, share):
    p, uniform = rates(ImportanceSample(uniform_share=share), torch.tensor(scores))
    total, n = sum(map(Fraction, scores)), len(scores)
    wanted = [share/n + (1-share)*float(Fraction(o)/total) if total else 1/n for o in scores]
    torch.testing.assert_close(p, torch.tensor(wanted, dtype=torch.float64), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(uniform, torch.full((n,), 1/n, dtype=torch.float64), rtol=1e-6, atol=0)

@pytest.mark.parametrize('share', [0., 0.3, 1.])
@pytest.mark.parametrize('size', [1, 2, 3])
def test_expected_gradient_is_the_full_one_by_enumeration(share, size):
    "All possible draws of a tiny batch, each with its probability, in float64"
    x, y, w = (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
               for shape in ((4, 3), (4,), (3,)))
    w.requires_grad_()
    losses = (x@w - y)**2
    norms = torch.stack([torch.autograd.grad(o, w, retain_graph=True)[0].norm() for o in losses])
    p, uniform = rates(ImportanceSample(uniform_share=share), norms)
    weights = uniform/p
    expected = sum(p[list(draw)].prod()*(weights*losses)[list(draw)].mean() for draw in product(range(4), repeat=size))
    got, wanted = (torch.autograd.grad(o, w, retain_graph=True)[0] for o in (expected, losses.mean()))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('share', [0., 0.3])
def test_expected_gradient_is_the_full_one_by_simulation(share, n=4000):
    n = draws(n)
    x, y, w = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((64, 3), (64,), (3,)))
    grads = 2*(x@w - y)[:, None]*x
    pick = ImportanceSample(0.25, uniform_share=share)
    drawn = [pick(grads.norm(dim=1)) for _ in range(n)]
    estimates = torch.stack([(weights[:, None]*grads[idxs]).mean(0) for idxs, weights in drawn])
    assert ((estimates.mean(0) - grads.mean(0)).abs() < 5*estimates.std(0)/n**0.5).all()
    plain = torch.stack([grads[Uniform(0.25, seed=i)(x).idxs].mean(0) for i in range(500)])
    if not share: assert estimates.var(0).sum() < plain.var(0).sum()

def test_draws_are_with_replacement_at_their_rates(n=4000):
    n = draws(n)
    pick, scores = ImportanceSample(uniform_share=0.2), torch.tensor([0., 1., 3.])
    p = rates(pick, scores)[0].tolist()
    wanted = Counter()
    for i, j in product(range(3), repeat=2): wanted[tuple(sorted((i, j)))] += p[i]*p[j]
    same_distribution(Counter(tuple(pick(scores, size=2).idxs.tolist()) for _ in range(n)), wanted, n)

def test_uniform_share_bounds_the_weights():
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))**20
    assert ImportanceSample(1., uniform_share=0.1)(scores).weights.max() <= 10.001
    assert ImportanceSample(1.)(scores).weights.max() > 10
    idxs, weights = ImportanceSample(0.5, uniform_share=1.)(scores)
    torch.testing.assert_close(weights, torch.ones(500))

def test_rates_of_odd_scores():
    nan, inf = math.nan, math.inf
    for scores, wanted in (([nan, 1., 3.], [0, 1/4, 3/4]), ([-2., 1., 1.], [0, 1/2, 1/2]),
                           ([0., 0., nan], [1/2, 1/2, 0]), ([nan, nan], [1/2, 1/2]),
                           ([inf, inf, 1., nan], [1/2, 1/2, 0, 0]), ([-inf, -1., -3.], [1/3]*3), ([3e38]*4, [1/4]*4)):
        torch.testing.assert_close(rates(ImportanceSample(), torch.tensor(scores))[0],
                                   torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)
    p, uniform = rates(ImportanceSample(uniform_share=0.5), torch.tensor([nan, 1., 3.]))
    torch.testing.assert_close(p, torch.tensor([0, 3/8, 5/8], dtype=torch.float64))
    # the mean over what is a number
    torch.testing.assert_close(uniform, torch.tensor([0, 1/2, 1/2], dtype=torch.float64))


# PerClass

@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 100), st.booleans(),
       st.randoms(use_true_random=False))
def test_quotas_equal_an_election(counts, size, equal, random):
    "Seat after seat, as Sainte-Lague has it; of classes with an equal claim the one with the more wanted candidate"
    classes = [c for c, count in enumerate(counts) for _ in range(count)]
    ranks = list(range(len(classes)))
    random.shuffle(classes), random.shuffle(ranks)
    targ, scores = torch.tensor(classes), torch.tensor(ranks)/8
    size, left, expected, got = min(size, len(classes)), {}, [], Counter()
    for c in sorted(set(classes)):
        left[c] = sorted((i for i, o in enumerate(classes) if o == c), key=lambda i: -scores[i])
    for _ in range(size):
        def claim(c):
            return got[c] == 0, -got[c] if equal else Fraction(counts[c])/(2*got[c]
                                                                           + 1) if got[c] else 0, scores[left[c][0]]
        best = max((c for c in left if left[c]), key=claim)
        expected.append(left[best].pop(0))
        got[best] += 1
    assert PerClass(equal=equal)(scores, size=size, targ=targ).idxs.tolist() == sorted(expected)

@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.floats(0.05, 1), st.booleans())
def test_no_class_starves_and_shares_are_kept(counts, frac, equal):
    targ = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    n, pick = len(targ), PerClass(frac, equal=equal)
    size = pick.size(n)
    got = torch.bincount(targ[pick(torch.randn(n), targ=targ).idxs], minlength=len(counts)).tolist()
    assert sum(got) == size and all(g <= c for g, c in zip(got, counts))
    if size >= len(counts): assert min(got) >= 1
    else: assert max(got) == 1
    if equal:  # nobody who has more to give is two behind
        assert all(g >= max(got) - 1 for g, c in zip(got, counts) if g < c)
    else:  # at most about one item from proportion, but for those that the smallest classes are given
        given_ = sum(max(0., 1 - size*c/n) for c in counts)
        assert all(abs(g - size*c/n) <= 1.5 + given_ for g, c in zip(got, counts))

def test_within_a_class_the_pick_decides():
    targ, scores = torch.arange(200) % 2, torch.randn(200)
    for c in (0, 1):
        rows = (targ == c).nonzero().flatten()
        got = PerClass(0.2)(scores, targ=targ).idxs
        assert torch.equal(got[targ[got] == c], rows[TopFraction(0.2)(scores[rows]).idxs])
    p, counts, pick = torch.tensor([2., 1.]).softmax(0), Counter(), PerClass(pick=Boltzmann(0.5, T=1.))
    for _ in range(3000):
        counts.update(pick(torch.tensor([2., 5., 1., 4.]), targ=torch.tensor([0, 1, 0, 1])).idxs.tolist())
    assert abs(counts[0]/3000 - p[0]) < 0.05 and abs(counts[1]/3000 - p[0]) < 0.05  # e^(5-4) as e^(2-1)

def test_stratified_random_subset_needs_no_scores():
    pick, targ = PerClass(pick=Uniform(0.1)), torch.arange(100) % 5
    assert not pick.needs_scores
    assert torch.bincount(targ[pick(torch.empty(100), targ=targ).idxs]).tolist() == [2]*5

@pytest.mark.parametrize('make', [lambda o: o, lambda o: o[:, None], lambda o: o.float(), lambda o: o.half(),
                                  lambda o: o == 1, lambda o: o.to(torch.uint8),
                                  lambda o: o - 100], ids=['int64', 'column', 'float', 'half', 'bool', 'uint8',
                                                           'negative'])
def test_targets_of_other_kinds(make):
    targ, scores = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([6., 5., 4., 1., 2., 3.])
    assert PerClass()(scores, size=3, targ=make(targ)).idxs.tolist() == [0, 1, 4]

@pytest.mark.parametrize('targ',
                         [None, (torch.zeros(4), torch.zeros(4)), torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)],
                         ids=['none', 'two', 'soft', 'more'])
def test_what_is_no_class_is_refused(targ):
    with pytest.raises(ValueError, match=r'one class per item as the target, shape \(4,\); got'):
        PerClass()(torch.rand(4), targ=targ)


# ThenUniform

def test_then_uniform():
    pick, scores = ThenUniform(0.2, at=0.3, seed=4), torch.randn(50)
    for pct in (0., 0.29):
        assert torch.equal(pick(scores, pct).idxs, TopFraction(0.2)(scores).idxs) and pick.now(pct).needs_scores
    drawn = [pick(scores, pct).idxs for pct in (0.3, 0.7, 1.)]
    assert torch.equal(drawn[0], Uniform(0.2, seed=4)(scores).idxs) and not torch.equal(drawn[1], drawn[2])
    assert not any(pick.now(pct).needs_scores for pct in (0.3, 1.))

def test_then_uniform_keeps_the_size_of_its_pick():
    pick = ThenUniform(pick=TopFraction(SchedLin(0.5, 0.1)), at=0.5)
    assert [len(pick(torch.rand(100), pct).idxs) for pct in (0., 0.25, 0.5, 1.)] == [50, 40, 30, 10]
    assert [pick.size(100, pct) for pct in (0., 0.5, 1.)] == [50, 30, 10]

def test_then_uniform_hands_on_what_its_pick_is():
    weighted = ThenUniform(pick=ImportanceSample(0.5), at=0.5)
    assert weighted.weighted and weighted(torch.rand(8)).weights is not None
    assert weighted(torch.rand(8), 0.9).weights is None
    quota = ThenUniform(pick=PerClass(0.25), at=0.5)
    targ = torch.arange(8) % 2
    assert quota.needs == ('targ',) and targ[quota(torch.rand(8), targ=targ).idxs].sum() == 1
    assert len(quota(torch.rand(8), 0.9, targ=targ).idxs) == 2 and quota.now(0.9).needs == ()
    with pytest.raises(ValueError, match='got NoneType'): quota(torch.rand(8))
    nested = ThenUniform(pick=ThenUniform(0.5, at=0.2), at=0.6)
    assert [nested.now(pct).needs_scores for pct in (0.1, 0.3, 0.7)] == [True, False, False]


# Your own

def test_a_ranked_pick_of_ones_own():
    class Lowest(RankedPick):
        def keys(self, scores, pct_train=0.): return -scores
    scores = torch.tensor([3., math.nan, 1., 2.])
    assert Lowest(0.5)(scores).idxs.tolist() == [2, 3] and Lowest(0.75)(scores).idxs.tolist() == [0, 2, 3]
    assert PerClass(pick=Lowest(0.5))(scores, targ=torch.tensor([0, 0, 1, 1])).idxs.tolist() == [0, 2]

def test_a_pick_of_ones_own_needs_no_more_than_a_call():
    class First(Pick):
        def __call__(self, scores, pct_train=0., size=None): return Selection(torch.arange(1))
    pick = First()
    assert pick.now(0.5) is pick and pick.needs == () and not pick.weighted and pick.fraction() is None
    assert pick.size(9) is None


# By name, and what is refused

def test_every_name_makes_a_pick():
    for name, cls in PICKS.items(): assert type(find_pick(name)) is cls
    for name in SIZED:
        assert find_pick(name, 0.3).fraction() == 0.3
        assert find_pick(name, SchedLin(0.2, 0.4)).fraction(0.5) == pytest.approx(0.3)
    assert {type(find_pick(name)) for name in PICKS} - set(SIZED.values()) == {LossShare, PercentileSample}
    own = RankSample(0.7)
    assert find_pick(own) is own

@pytest.mark.parametrize('call,kind,message', [
    (lambda: find_pick('topp'), ValueError, "pick is 'topp', expected one of top, uniform, .* Did you mean 'top'"),
    (lambda: find_pick('percentile', 0.2), ValueError, r"frac=0.2 doesn't apply.*pick=PercentileSample\("),
    (lambda: find_pick(TopFraction(0.2), 0.2), ValueError, 'give one of them'),
    (lambda: find_pick(TopFraction), TypeError, 'must be a name'),
    (lambda: find_pick(None), TypeError, r'such as TopFraction\(0.1\); got None'),
    (lambda: find_pick('top', 1.5), ValueError, r'frac must lie in \(0, 1\]; got 1.5'),
    (lambda: Boltzmann(T=0), ValueError, r'T must lie in \(0, inf\); got 0'),
    (lambda: Boltzmann(T=SchedLin(1., 0.)), ValueError, 'at pct_train=1'),
    (lambda: Boltzmann(T='cold'), TypeError, "got 'cold'"),
    (lambda: Boltzmann(0.), ValueError, 'frac must lie'),
    (lambda: ImportanceSample(uniform_share=1.1), ValueError, r'uniform_share must lie in \[0, 1\]'),
    (lambda: ImportanceSample(2), ValueError, 'frac must lie'),
    (lambda: PerClass(pick=LossShare()), TypeError, 'one that ranks the items'),
    (lambda: PerClass(pick=ImportanceSample()), TypeError, 'one that ranks the items'),
    (lambda: PerClass(0.2, pick=TopFraction()), ValueError, 'give one of them'),
    (lambda: PerClass(pick='top'), TypeError, 'one that ranks the items'),
    (lambda: ThenUniform(pick=LossShare()), TypeError, 'one of fixed size'),
    (lambda: ThenUniform(pick='top'), TypeError, 'one of fixed size'),
    (lambda: ThenUniform(at=25), ValueError, r'at must lie in \[0, 1\]; got 25'),
    (lambda: ThenUniform(at=SchedLin(0., 1.)), TypeError, 'not a schedule')])
def test_bad_input_is_refused_at_once(call, kind, message):
    with pytest.raises(kind, match=message): call()

@pytest.mark.parametrize('cls', [TopFraction, RankSample, Boltzmann])
def test_a_class_of_nan_has_no_quota(cls):
    scores, targ = torch.tensor([1., 2., 3., 4., math.nan, math.nan]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert not PerClass(pick=cls(0.5))(scores, targ=targ).idxs.ge(4).any()

def test_ranks_are_among_numbers():
    scores = torch.rand(5)
    keys = RankSample(0.25).keys(torch.cat([scores, torch.full((9,), math.nan)]))
    torch.testing.assert_close(keys[:5], RankSample(0.25).keys(scores))
    assert keys[5:].isnan().all()
