"Rows against data sets whose items are their rows: every kind of loader, workers, folds, files"
import json, os, pickle, random, signal, subprocess, sys, time
from collections import UserDict, namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.load import DataLoader, SkipItemException
from fastai.distributed import DistributedDL
from fastai.tabular.core import Categorify, TabDataLoader, TabularPandas, TabWeightedDL
from fastai.text.data import LMDataLoader, SortedDL
from fastai.torch_core import TensorImage, TensorMask, set_seed
from fastai.vision.core import TensorPoint
from fastcore.basics import noop
from fastcore.foundation import L
from fasttransform import Transform
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import tensor
from torch.utils.data import DataLoader as TorchDataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset, WeightedRandomSampler

from rholoss_fastai.item_table import ItemTable, fingerprint

from rholoss_fastai.loaders import restrict_rows, scoring_loader

from rholoss_fastai.nested import batch_size, subset_batch

from rholoss_fastai.rows import RowSubset, dataset_size, epoch_size, preserve_rng, track_rows

N = 53

class Rows(Dataset):
    "Item `i` is `i`"
    def __init__(self, n=N): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return tensor(i), tensor(-i)

class Lengths(Rows):
    def __getitem__(self, i): return torch.full((1,), i), tensor(-i)

def tabular(n=N):
    frame = pd.DataFrame(dict(row=np.arange(n, dtype=np.float32), kind=['ab'[i%2] for i in range(n)], y=np.arange(n)%3))
    return TabularPandas(frame, procs=[Categorify], cat_names=['kind'], cont_names=['row'], y_names='y')

class HalfDL(DistributedDL):
    "One rank of two, without a process group"
    def _broadcast(self, t, rank): return list(t)

weights = np.arange(N) % 5
fastai_loaders = dict(
    plain=lambda **kw: DataLoader(Rows(), **kw),
    tfmd=lambda **kw: TfmdDL(Rows(), **kw),
    sorted=lambda **kw: SortedDL(Lengths(), sort_func=lambda o: int(o[0])%7, **kw),
    weighted=lambda **kw: WeightedDL(Rows(), wgts=weights, **kw),
    partial=lambda **kw: PartialDL(Rows(), partial_n=31, **kw),
    tabular=lambda **kw: TabDataLoader(tabular(), **kw),
    tabular_weighted=lambda **kw: TabWeightedDL(tabular(), wgts=weights, **kw),
    rank0=lambda **kw: HalfDL(TfmdDL(Rows(), **kw), rank=0, world_size=2),
    rank1=lambda **kw: HalfDL(WeightedDL(Rows(), wgts=weights, **kw), rank=1, world_size=2),
)

def make(kind, seed=3, **kwargs):
    set_seed(seed)
    return (fastai_loaders[kind] if kind in fastai_loaders else torch_loaders[kind])(**dict(dict(bs=8, num_workers=0), **kwargs))

def rows_in(batch):
    "The rows that a batch itself holds"
    x = batch[1] if len(batch) == 3 else batch[0]
    return x.flatten().long()

def epochs(loader, n=3, seed=11):
    "The batches of `n` epochs"
    set_seed(seed)
    return [list(loader) for _ in range(n)]

def same(a, b):
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and torch.equal(a, b)

def check_rows(loader):
    n = 0
    for i,batch in enumerate(loader):
        assert torch.equal(loader.rows(i), rows_in(batch))
        assert loader.rows(i).dtype == torch.int64
        n += 1
    return n

@pytest.mark.parametrize('kind', fastai_loaders)
@pytest.mark.parametrize('shuffle,drop_last', [(True, True), (True, False), (False, False)])
def test_order_is_that_without_tracking(kind, shuffle, drop_last):
    plain,twin = (make(kind, shuffle=shuffle, drop_last=drop_last) for _ in range(2))
    tracked = track_rows(twin)
    assert same(epochs(plain), epochs(tracked))
    assert check_rows(tracked) == len(list(plain)) > 0

@pytest.mark.parametrize('kind', ['plain', 'tfmd', 'sorted', 'weighted', 'partial', 'tabular', 'rank1'])
def test_workers(kind):
    plain,twin = (make(kind, shuffle=True, drop_last=kind!='tfmd', num_workers=2) for _ in range(2))
    tracked = track_rows(twin)
    set_seed(5); expected = [list(plain) for _ in range(2)]
    set_seed(5)
    for epoch in expected:
        for i,(batch,plain_batch) in enumerate(zip(tracked, epoch, strict=True)):
            assert same(batch, plain_batch) and torch.equal(tracked.rows(i), rows_in(batch))

@pytest.mark.parametrize('kind', fastai_loaders)
def test_a_copy_each_epoch_moves_the_original_on(kind):
    "As the selector does it: a fresh copy each epoch, an epoch of the original among them, one interrupted"
    def run(loader, track):
        set_seed(9)
        res = []
        for epoch in range(4):
            it = iter(track(loader) if epoch != 1 else loader)
            res.append([next(it), next(it)] if epoch == 2 else list(it))
            del it
        return res
    assert same(run(make(kind, shuffle=True), track_rows), run(make(kind, shuffle=True), lambda o: o))

@pytest.mark.parametrize('kind', fastai_loaders)
def test_other_batch_size(kind):
    loader = make(kind, shuffle=True)
    large = track_rows(loader, bs=20)
    sizes = [len(rows_in(b)) for b in large]
    assert check_rows(large) == len(sizes) and sizes[0] == 20 and loader.bs == 8
    assert all(len(rows_in(b)) <= 8 for b in loader)
    if kind not in ('sorted', 'rank0', 'rank1'):
        plain,large = make(kind, shuffle=True),track_rows(make(kind, shuffle=True), bs=20)
        assert torch.equal(*(torch.cat([rows_in(b) for b in epochs(o, 1)[0]]) for o in (plain, large)))

def test_ranks_share_the_epoch():
    seen = []
    for rank in range(2):
        set_seed(1)
        loader = track_rows(HalfDL(TfmdDL(Rows(), bs=8, shuffle=True, num_workers=0), rank=rank, world_size=2))
        n_batches = check_rows(loader)
        assert len(loader.rows(0)) == 8 and n_batches == 4 and epoch_size(loader) == 27 and dataset_size(loader) == N
        seen.append(torch.cat([loader.rows(i) for i in range(n_batches)]))
    assert sorted(set(torch.cat(seen).tolist())) == list(range(N))

def test_new_of_a_copy_is_untracked():
    tracked = track_rows(make('tfmd', shuffle=True))
    list(tracked)
    fresh = tracked.new(shuffle=False)
    assert not any(o in vars(fresh) for o in ('rows', 'get_idxs', 'do_item', 'randomize', 'tracker'))
    assert torch.cat([rows_in(b) for b in fresh]).tolist() == list(range(N))

def test_tracking_twice_and_own_functions():
    loader = DataLoader(Rows(), bs=8, get_idxs=lambda: [5,3,9,3])
    assert check_rows(track_rows(loader)) == 1 and torch.equal(next(iter(track_rows(loader)))[0], tensor([5,3,9,3]))
    again = track_rows(track_rows(make('tfmd', shuffle=True), bs=4))
    assert again.bs == 4 and check_rows(again) == 14
    assert same(epochs(make('tfmd', shuffle=True)), epochs(track_rows(track_rows(make('tfmd', shuffle=True)))))

def test_methods_given_to_the_loader():
    "fastai binds them to the loader, so a copy's are the copy's"
    class Given:
        def shuffle_fn(self, idxs): return idxs[::-1][:2*self.bs]
    loader = DataLoader(Rows(), bs=8, shuffle=True, shuffle_fn=Given().shuffle_fn)
    assert [len(list(o)) for o in (loader, track_rows(loader), track_rows(loader, bs=3))] == [2, 2, 2]
    assert check_rows(track_rows(loader, bs=3)) == 2

def test_tracking_leaves_the_original_alone():
    for kind in fastai_loaders:
        loader = make(kind, shuffle=True)
        before = {k: id(v) for k,v in vars(loader).items()}
        random_before = loader.dl.rng.getstate() if kind.startswith('rank') else loader.rng.getstate()
        track_rows(loader, bs=5); restrict_rows(loader, range(3,30)); list(scoring_loader(loader)); fingerprint(loader)
        assert {k: id(v) for k,v in vars(loader).items()} == before, kind
        assert random_before == (loader.dl if kind.startswith('rank') else loader).rng.getstate()

def test_order_takes_four_bytes_a_row():
    tracked = track_rows(TfmdDL(Rows(1000), bs=8, shuffle=True, num_workers=0))
    next(iter(tracked))
    assert tracked.tracker.order.nbytes == 4000

def test_pickled_copy():
    "Where workers are spawned rather than forked, the copy travels"
    tracked = pickle.loads(pickle.dumps(track_rows(restrict_rows(make('tfmd', shuffle=True), range(0,N,2)), bs=5)))
    assert check_rows(tracked) == 6 and check_rows(pickle.loads(pickle.dumps(track_rows(make('rank1'))))) == 4

def test_rows_errors():
    tracked = track_rows(make('tfmd', drop_last=True))
    with pytest.raises(ValueError, match='No epoch has begun'): tracked.rows(0)
    next(iter(tracked))
    for i in (-1, 6, 100):
        with pytest.raises(ValueError, match='There is no batch'): tracked.rows(i)
    assert len(tracked.rows(5)) == 8
    for bs in (0, -3, 2.5, True, 'all'):
        with pytest.raises(ValueError, match='bs='): track_rows(make('tfmd'), bs=bs)

class Stream(IterableDataset):
    def __iter__(self): return iter(torch.arange(9))

class OwnIteration(DataLoader):
    def __iter__(self): return super().__iter__()

class OwnTorchIteration(TorchDataLoader):
    def __iter__(self): return super().__iter__()

@pytest.mark.parametrize('loader,why', [
    (lambda: [torch.zeros(3)], "neither fastai's nor PyTorch's"),
    (lambda: None, "neither fastai's nor PyTorch's"),
    (lambda: DataLoader(Stream(), bs=2), 'iterable'),
    (lambda: DataLoader(bs=2, create_item=lambda i: i, n=4), 'iterable'),
    (lambda: DataLoader(Rows(), bs=None), 'whole batches'),
    (lambda: DataLoader(Rows(), bs=4, create_batches=lambda samples: iter([])), 'create_batches'),
    (lambda: OwnIteration(Rows(), bs=4), '__iter__'),
    (lambda: LMDataLoader([torch.arange(50)], bs=2, seq_len=5, shuffle=True), 'shuffling cuts the text anew'),
    (lambda: TorchDataLoader(Stream(), batch_size=2), 'iterable'),
    (lambda: TorchDataLoader(Rows(), batch_size=None), 'whole batches'),
    (lambda: TorchDataLoader(Rows(), in_order=False), 'overtake'),
    (lambda: OwnTorchIteration(Rows()), '__iter__'),
])
def test_refused(loader, why):
    loader = loader()
    with pytest.raises(ValueError, match=why) as e: track_rows(loader)
    assert 'pass a module or a Learner as `il=`' in str(e.value)
    for f in (epoch_size, scoring_loader, lambda o: restrict_rows(o, [0])):
        with pytest.raises(ValueError, match=why): f(loader)

class Skips(Rows):
    def __getitem__(self, i):
        if i == 17: raise SkipItemException
        return super().__getitem__(i)

@pytest.mark.parametrize('num_workers', [0, 2])
def test_skipped_item(num_workers):
    loader = DataLoader(Skips(), bs=8, num_workers=num_workers, shuffle=True)
    with pytest.raises(ValueError, match='row 17 was skipped'): list(track_rows(loader))
    with pytest.raises(ValueError, match='row 17 was skipped'): list(track_rows(restrict_rows(loader, [4,17,20])))

def test_unshuffled_language_model():
    def make_lm(): return LMDataLoader([torch.arange(20), torch.arange(20,53)], bs=4, seq_len=5)
    plain,tracked = make_lm(), track_rows(make_lm())
    assert same(epochs(plain, 2), epochs(tracked, 2))
    assert dataset_size(tracked) == epoch_size(tracked) == plain.n == 12
    for i,(x,_) in enumerate(tracked):
        assert tracked.rows(i).tolist() == list(range(4*i, 4*i+4))
        assert x[:,0].tolist() == [(r%4)*13 + r//4*5 for r in tracked.rows(i).tolist()]
    with pytest.raises(ValueError, match='enlarge=False'): track_rows(make_lm(), bs=8)
    with pytest.raises(ValueError, match='Restrict its texts'): restrict_rows(make_lm(), [0])
    assert fingerprint(make_lm()) != fingerprint(LMDataLoader([torch.arange(20), torch.arange(20,53)], bs=2, seq_len=5))
    assert check_lm(track_rows(scoring_loader(make_lm()))) == 3

def check_lm(loader): return sum(len(loader.rows(i)) == 4 for i,_ in enumerate(loader))

# PyTorch's own loader

class EagerBatches(Sampler):
    "Draws its order when asked for an iterator, before the loader draws its seed"
    def __len__(self): return 6
    def __iter__(self): return iter(torch.randperm(48).view(6,8).tolist())

torch_loaders = dict(
    shuffled=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, shuffle=True, **kw),
    seeded=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, shuffle=True, generator=torch.Generator().manual_seed(5), **kw),
    sequential=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, drop_last=True, **kw),
    torch_weighted=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, sampler=WeightedRandomSampler(weights.tolist(), 70), **kw),
    batches=lambda bs, **kw: TorchDataLoader(Rows(), batch_sampler=EagerBatches(), **kw),
)

@pytest.mark.parametrize('kind', torch_loaders)
def test_torch_order(kind):
    plain,twin = (make(kind) for _ in range(2))
    tracked = track_rows(twin)
    assert same(epochs(plain), epochs(tracked))
    assert len(tracked) == len(plain) == check_rows(tracked)
    def copies(loader, track):
        set_seed(2)
        res = []
        for epoch in range(3):
            it = iter(track(loader))
            res.append([next(it)] if epoch == 1 else list(it))
        return res + [torch.rand(1)]
    assert same(copies(make(kind), track_rows), copies(make(kind), lambda o: o))

@pytest.mark.slow
@pytest.mark.parametrize('kind,persistent_workers', [('shuffled', True), ('seeded', False), ('batches', True)])
def test_torch_workers(kind, persistent_workers):
    plain,tracked = (make(kind, num_workers=2, persistent_workers=persistent_workers) for _ in range(2))
    def run(loader, track):
        set_seed(2)
        return [list(track(loader)) for _ in range(2)] + [torch.rand(1)]
    assert same(run(plain, lambda o: o), run(tracked, track_rows))
    tracked = track_rows(tracked)
    it = iter(tracked)
    next(it)
    assert len(tracked.notes.drawn) <= 4  # as many as batches are under way
    del it
    assert check_rows(tracked) == len(plain)

def test_torch_rows():
    loader = make('shuffled')
    tracked = track_rows(loader, bs=20)
    with pytest.raises(ValueError, match='No epoch has begun'): tracked.rows(0)
    assert check_rows(tracked) == 3 and tracked.batch_size == 20 and loader.batch_size == 8 and tracked.dataset is loader.dataset
    with pytest.raises(ValueError, match='while batch 2 is the current one'): tracked.rows(0)
    with pytest.raises(ValueError, match='enlarge=False'): track_rows(make('batches'), bs=4)
    assert track_rows(track_rows(loader, bs=20)).batch_size == 20
    class Names(Sampler):
        def __len__(self): return 2
        def __iter__(self): return iter(['a','b'])
    named = track_rows(TorchDataLoader(dict(a=1, b=2), sampler=Names()))
    next(iter(named))
    with pytest.raises(ValueError, match='does not yield row numbers'): named.rows(0)

def test_torch_loader_as_dls():
    dls = DataLoaders(make('shuffled'), make('sequential'))
    dls.train = track_rows(dls.train)
    assert len(dls.train) == 7 and dls.train_ds.n == N and next(iter(dls.train))[0].shape == (8,)

# sizes

def test_epoch_size():
    assert {k: epoch_size(make(k)) for k in fastai_loaders} == dict(plain=N, tfmd=N, sorted=N, weighted=N, partial=31, tabular=N,
                                                                     tabular_weighted=N, rank0=27, rank1=27)
    sizes = dict(shuffled=N, seeded=N, sequential=N, torch_weighted=70, batches=N)
    assert {k: epoch_size(track_rows(make(k))) for k in torch_loaders} == sizes
    assert {dataset_size(make(k)) for k in [*fastai_loaders, *torch_loaders]} == {N}
    assert epoch_size(TfmdDL(Rows(), n=10, num_workers=0)) == 10
    assert epoch_size(restrict_rows(make('partial'), range(9))) == 9

# some rows

chosen = [50, 3, 4, 8, 21, 22, 39, 41, 7, 0, 12]

@pytest.mark.parametrize('kind', [*fastai_loaders, 'shuffled', 'seeded', 'sequential', 'torch_weighted'])
def test_restricted_rows(kind):
    loader = make(kind, **({} if kind in torch_loaders else dict(shuffle=True)))
    fold = restrict_rows(loader, chosen, seed=4)
    tracked = track_rows(fold)
    set_seed(1); first = [[rows_in(b) for b in tracked] for _ in range(3)]
    assert check_rows(tracked) > 0
    drawn = torch.cat(first[0]+first[1]+first[2]).tolist()
    assert set(drawn) <= set(chosen) and dataset_size(fold) == N
    if kind in ('plain', 'tfmd', 'sorted', 'tabular', 'shuffled', 'seeded'):
        assert sorted(torch.cat(first[0]).tolist()) == sorted(chosen) and not same(first[0], first[1])
        again = restrict_rows(make(kind, seed=99, **({} if kind in torch_loaders else dict(shuffle=True))), chosen, seed=4)
        set_seed(1)
        assert same(first, [[rows_in(b) for b in again] for _ in range(3)])
    if 'weighted' in kind or kind == 'rank1': assert all(weights[o] for o in drawn)
    set_seed(1)
    assert check_rows(track_rows(restrict_rows(fold, [3,8,22]), bs=2)) in (1, 2, 3)
    with pytest.raises(ValueError, match='row 1 is not among the 11 rows'): restrict_rows(fold, [3,1])

def test_restricted_workers():
    for kind in ('tfmd', 'shuffled'):
        fold = track_rows(restrict_rows(make(kind, num_workers=2, **({} if kind == 'shuffled' else dict(shuffle=True))), chosen, seed=4))
        assert check_rows(fold) == 2

def test_restricting_leaves_no_trace():
    "Neither the original's order nor the global generators move"
    for kind in ('tfmd', 'shuffled', 'seeded'):
        kwargs = {} if kind in torch_loaders else dict(shuffle=True)
        def run(use):
            loader = make(kind, **kwargs)
            set_seed(1)
            if use:
                fold = restrict_rows(loader, chosen)
                with preserve_rng(): list(fold)
            return [list(loader), list(loader), torch.rand(1), tensor(random.random())]
        assert same(run(True), run(False))

@pytest.mark.parametrize('rows,error,match', [([], ValueError, 'No rows'), ([0,53], ValueError, 'row 53'), ([-1,2], ValueError, 'row -1'),
    ([1,2,1], ValueError, 'more than once'), ([[1,2]], ValueError, 'shape'), ([1.,2.], TypeError, 'whole numbers'),
    (np.ones(N, dtype=bool), TypeError, 'mask')])
def test_bad_rows(rows, error, match):
    for kind in ('tfmd', 'shuffled'):
        for f in (restrict_rows, scoring_loader):
            with pytest.raises(error, match=match): f(make(kind), rows)

def test_rows_of_any_kind():
    for rows in (range(3), [0,1,2], (0,1,2), L(0,1,2), np.arange(3), tensor([0,1,2]), np.array([0,1,2], dtype=np.uint8)):
        assert check_rows(track_rows(restrict_rows(make('tfmd'), rows))) == 1

def test_no_weight_left():
    for kind in ('weighted', 'tabular_weighted', 'torch_weighted'):
        with pytest.raises(ValueError, match='weight of 0'): restrict_rows(make(kind), [0,5,10])
    with pytest.raises(ValueError, match="can't be restricted"): restrict_rows(make('batches'), [0,1])
    with pytest.raises(ValueError, match='get_idxs'): restrict_rows(DataLoader(Rows(), bs=4, get_idxs=lambda: [0,1]), [0])

def test_subset_of_a_data_set():
    subset = RowSubset(Datasets(list('abcdef'), [[ord], [str.upper]]), np.array([4,0]))
    assert [subset[0], subset[tensor(1)], subset[np.int64(1)]] == [(101,'E'), (97,'A'), (97,'A')]
    assert list(subset) == [(101,'E'), (97,'A')] and subset.items == ['e','a'] and subset.n_inp == 1 and len(subset) == 2
    with pytest.raises(IndexError): subset[2]
    class Fetches(Rows):
        def __getitems__(self, idxs): return [self[i] for i in idxs]
    read = []
    Fetches.__getitems__ = lambda self, idxs: read.append(idxs) or [self[i] for i in idxs]
    assert check_rows(track_rows(restrict_rows(TorchDataLoader(Fetches(), batch_size=4), chosen))) == 3
    assert read[0] == chosen[:4] and not hasattr(make('shuffled').dataset, '__getitems__')

def test_tabular_fold_is_the_table():
    fold = restrict_rows(make('tabular', shuffle=True), chosen)
    cats,conts,ys = next(iter(scoring_loader(fold, bs=20)))
    assert conts.flatten().tolist() == chosen and ys.flatten().tolist() == [o%3 for o in chosen]
    assert cats.flatten().tolist() == [1+o%2 for o in chosen]
    assert fold.new(shuffle=False).one_batch()[1].flatten().tolist() == chosen[:8]

# scoring

class Noise(Transform):
    "An augmentation"
    split_idx = 0
    def encodes(self, x:TensorImage): return x + torch.rand_like(x) + 1000

class ToImage(Transform):
    def encodes(self, i:int): return TensorImage(float(i))

class ToTensor(Transform):
    def encodes(self, i:int): return tensor(float(i))

def augmented(n_train=30, **kwargs):
    datasets = Datasets(list(range(N)), [[ToImage(), Noise()], [ToTensor()]], splits=[range(n_train), range(n_train, N)])
    kwargs = dict(dict(num_workers=0), **kwargs)
    return TfmdDL(datasets.train, bs=8, shuffle=True, drop_last=True, after_item=[Noise()], after_batch=[Noise()], **kwargs)

@pytest.mark.parametrize('num_workers', [0, 2])
def test_scoring_sees_no_augmentation(num_workers):
    train = augmented(num_workers=num_workers)
    it = iter(train)
    assert next(it)[0].min() >= 3000
    for rows in (None, [5,2,9]):
        scoring = track_rows(scoring_loader(train, rows))
        for i,(x,y) in enumerate(scoring): assert torch.equal(x.as_subclass(torch.Tensor), y) and torch.equal(scoring.rows(i), y.long())
    partly = iter(scoring_loader(train))
    next(partly)
    del partly  # interrupted
    assert next(it)[0].min() >= 3000 and train.dataset.split_idx == 0
    assert all(x.min() >= 3000 for x,_ in train)

def test_fold_is_augmented():
    fold = track_rows(restrict_rows(augmented(), range(10,30)))
    for i,(x,y) in enumerate(fold): assert x.min() >= 3000 and torch.equal(fold.rows(i), y.long())
    assert all(torch.equal(x.as_subclass(torch.Tensor), y) for x,y in scoring_loader(fold)) and len(scoring_loader(fold).dataset) == 20

def test_scoring_of_lists_and_own_split():
    lists = TfmdLists(list(range(9)), [ToImage(), Noise()], splits=[range(9), []])
    loader = TfmdDL(lists.train, bs=4, num_workers=0, shuffle=True)
    assert torch.cat(list(scoring_loader(loader))).tolist() == list(range(9)) and loader.one_batch().min() >= 1000
    class Own(Rows):
        split_idx = 0
        def __getitem__(self, i): return tensor(i) + (1000 if self.split_idx == 0 else 0)
    own = TfmdDL(Own(), bs=4, num_workers=0)
    assert torch.cat(list(scoring_loader(own))).tolist() == list(range(N)) and own.one_batch().min() >= 1000

@pytest.mark.parametrize('kind', [*fastai_loaders, *torch_loaders])
def test_scoring_covers_every_row_once(kind):
    loader = make(kind, **({} if kind in torch_loaders else dict(shuffle=True, drop_last=True)))
    scoring = track_rows(scoring_loader(loader, bs=10))
    assert [len(rows_in(b)) for b in scoring] == [10]*5+[3]
    rows = [scoring_rows for i,b in enumerate(scoring) for scoring_rows in scoring.rows(i).tolist()]
    assert check_rows(scoring) == 6 and (sorted(rows) if kind == 'sorted' else rows) == list(range(N))
    some = track_rows(scoring_loader(loader, [7,0,15], bs=2))
    assert check_rows(some) == 2

def test_scoring_rows_without_weight():
    assert check_rows(track_rows(scoring_loader(make('weighted', shuffle=True), [0,5,10]))) == 1

# subsets of a batch

Pair = namedtuple('Pair', 'first second')
class Encoding(UserDict):
    "Like Hugging Face's BatchEncoding"
    def __init__(self, data, encodings=None):
        super().__init__(data)
        self._encodings = encodings

def test_types_and_metadata():
    point = TensorPoint(torch.rand(6,4,2), img_size=(10,20))
    details = dict(mask=TensorMask(torch.arange(6)), nothing=None, scale=tensor(2.), name='train', sizes=(1,2))
    batch = (Pair(torch.rand(6,3), [point]), details,
             Encoding(dict(ids=torch.arange(12).view(6,2)), ['tokens']*6), L(torch.arange(6), torch.ones(6)))
    idxs = tensor([4,0])
    res = subset_batch(batch, idxs)
    assert type(res) is tuple and type(res[0]) is Pair and type(res[1]) is dict and type(res[2]) is Encoding and type(res[3]) is L
    small = res[0].second[0]
    assert type(small) is TensorPoint and small.img_size == (10,20) and torch.equal(small.data, point.data[idxs])
    assert type(res[1]['mask']) is TensorMask and res[1]['mask'].tolist() == [4,0]
    assert res[1]['nothing'] is None and res[1]['scale'] == 2 and res[1]['name'] == 'train' and res[1]['sizes'] == (1,2)
    assert res[2]['ids'].tolist() == [[8,9],[0,1]] and res[2]._encodings is None and batch[2]._encodings and len(batch[2]['ids']) == 6
    assert batch_size(batch) == 6 and batch_size(res) == 2

leaves = st.one_of(st.just('tensor'), st.just('image'), st.none(), st.just('text'), st.floats(allow_nan=False))
def nest(o): return st.one_of(st.lists(o, max_size=3), st.tuples(o, o), st.dictionaries(st.text(max_size=2), o, max_size=3))

@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tree=st.recursive(leaves, nest),
       idxs=st.lists(st.integers(0, 6), max_size=7))
def test_any_nesting(tree, idxs):
    def grow(o):
        if o == 'tensor': return torch.rand(7,2)
        if o == 'image': return TensorImage(torch.rand(7,1))
        if isinstance(o, dict): return {k: grow(v) for k,v in o.items()}
        return type(o)(map(grow, o)) if isinstance(o, (list, tuple)) else o
    def naive(o):
        if isinstance(o, torch.Tensor): return torch.stack([o[i] for i in idxs]) if idxs else o[:0]
        if isinstance(o, dict): return {k: naive(v) for k,v in o.items()}
        return type(o)(map(naive, o)) if isinstance(o, (list, tuple)) else o
    def equal(a, b):
        if isinstance(a, torch.Tensor): return type(a) is type(b) and torch.equal(a, b)
        if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        return type(a) is type(b) and (len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b)
    batch = (torch.arange(7), grow(tree))
    assert equal(subset_batch(batch, tensor(idxs, dtype=torch.long)), naive(batch))

def test_bad_batches():
    x,idxs = torch.zeros(4,2),tensor([1])
    for extra in (['a']*4, ('a',)*4, [None,'b',None,None], [1,2,3,4], np.zeros(4), torch.zeros(5)):
        with pytest.raises(ValueError, match='batch of 4|beside tensors of 4'): subset_batch((x, extra), idxs)
    for empty in ((), None, 'text', [tensor(1.)], dict(a='b')):
        with pytest.raises(ValueError, match='without any tensor'): batch_size(empty)
    assert subset_batch((torch.zeros(1,2), ['a']), tensor([0]))[1] == ['a']

# the fingerprint

def fingerprint_of(dataset): return fingerprint(TorchDataLoader(dataset, batch_size=4))

def test_paths():
    def of(folder, order=None, label=lambda o: o.parent.name, n=50):
        files = [Path(folder)/('cat' if i%2 else 'dog')/f'{i:05}.png' for i in order or range(n)]
        return fingerprint(TfmdDL(Datasets(files, [[lambda o: o], [label]]), bs=4, num_workers=0))
    here = of('/data/pets')
    assert here == of('elsewhere/c/pets2') and here['n'] == 50 and here['targets'] and here['items']
    swapped = list(range(50)); swapped[10],swapped[12] = 12,10
    assert of('/data/pets', swapped)['items'] != here['items']
    relabelled = of('/data/pets', label=lambda o: 'cat' if o.stem == '00020' else o.parent.name)
    assert relabelled['items'] == here['items'] and relabelled['targets'] != here['targets']
    assert of('/data/pets', n=49)['n'] == 49

def test_quick(tmp_path):
    files = [tmp_path/f'class{i%100}'/f'image_{i:06}.jpeg' for i in range(50_000)]
    loader = TfmdDL(Datasets(files, [[lambda o: o], [lambda o: o.parent.name]]), bs=4, num_workers=0)
    start = time.perf_counter()
    fingerprint(loader)
    assert time.perf_counter() - start < 10 # a second at most where nothing else runs

def test_tensors_and_attributes():
    x,y = torch.rand(1000,3),torch.randint(0, 9, (1000,))
    here = fingerprint_of(TensorDataset(x, y))
    assert here == fingerprint_of(TensorDataset(x.clone(), y.clone()))
    y2 = y.clone(); y2[7] += 1
    assert fingerprint_of(TensorDataset(x, y2))['targets'] != here['targets']
    assert fingerprint_of(TensorDataset(x.flip(0), y))['items'] != here['items']
    assert fingerprint_of(TensorDataset(x))['targets'] == ''
    class Vision(Rows):
        def __init__(self, data, targets): self.data,self.targets,self.n = data,targets,len(data)
        def __getitem__(self, i): raise AssertionError('opened')
    pictures = np.random.default_rng(0).integers(0, 255, (1000,4,4,3), dtype=np.uint8)
    labels = list(y.tolist())
    here = fingerprint_of(Vision(pictures, labels))
    assert fingerprint_of(Vision(pictures, [*labels[:7], labels[7]+1, *labels[8:]]))['targets'] != here['targets']
    assert fingerprint_of(Vision(pictures[::-1], labels))['items'] != here['items']
    class Folder(Vision):
        def __init__(self, *files): self.samples,self.targets,self.n = [(o, 0) for o in files],[0]*len(files),len(files)
    here = fingerprint_of(Folder('/a/b/1.png', '/a/b/2.png'))
    assert fingerprint_of(Folder('/c/1.png', '/c/2.png')) == here != fingerprint_of(Folder('/c/2.png', '/c/1.png'))

def test_subset_of_known_rows():
    x,y = torch.rand(1000,3),torch.arange(1000)%7
    def of(rows, y=y): return fingerprint_of(Subset(Subset(TensorDataset(x, y), range(0,1000,2)), rows))
    here,y2 = of([5,9,2]),y.clone()
    y2[18] += 1
    assert here == of([5,9,2]) and here['n'] == 3 and all(here.values())
    relabelled = of([5,9,2], y2)
    assert of([9,5,2])['items'] != here['items'] == relabelled['items'] and relabelled['targets'] != here['targets']

def test_moved_masks():
    def of(folder, order=1):
        files = [Path(folder)/'images'/f'{i}.png' for i in range(40)]
        def mask(o): return Path(folder)/'masks'/f'{order*int(o.stem)%41}.png'
        datasets = Datasets(files, [[noop], [mask, lambda o: None]], do_setup=False)
        return fingerprint(TfmdDL(datasets, bs=4, num_workers=0, do_setup=False))
    assert of('/data/camvid') == of('/elsewhere') and of('/data/camvid', 3)['targets'] != of('/data/camvid')['targets'] != ''

def test_opaque_data_sets():
    here = fingerprint_of(Rows())
    class Reversed(Rows):
        def __getitem__(self, i): return super().__getitem__(N-1-i)
    class Augmented(Rows):
        def __getitem__(self, i): return torch.rand(2), tensor(-i)
    other,random_inputs = fingerprint_of(Reversed()),fingerprint_of(Augmented())
    assert other['items'] != here['items'] and other['targets'] != here['targets']
    assert random_inputs == dict(n=N, targets=here['targets'], items='')
    assert ItemTable.of(torch.zeros(N), TorchDataLoader(Rows())).check(TorchDataLoader(Augmented()))  # what can't be told isn't compared
    as_dicts = fingerprint_of([dict(ids=[i], label=i%2) for i in range(9)])
    assert as_dicts['targets'] != fingerprint_of([dict(ids=[i], label=0) for i in range(9)])['targets']
    assert as_dicts['items'] == fingerprint_of([dict(ids=[i], label=0) for i in range(9)])['items']
    def numbered(x, y): return TfmdDL(Datasets(range(9), [[lambda i: x[i]], [lambda i: y[i]]]), bs=2, num_workers=0)
    x,y = torch.rand(9,2),torch.arange(9)
    here = fingerprint(numbered(x, y))
    assert here == fingerprint(numbered(x.clone(), y)) and here['items'] != fingerprint(numbered(x.flip(0), y))['items']

def test_tabular_fingerprint():
    here = fingerprint(make('tabular'))
    assert here == fingerprint(restrict_rows(make('tabular', shuffle=True), chosen)) and here['targets']
    table = tabular(); table.items.iloc[5, list(table.items.columns).index('y')] = 9
    assert fingerprint(TabDataLoader(table))['targets'] != here['targets']

def test_the_same_for_every_copy():
    for kind in [*fastai_loaders, *torch_loaders]:
        loader = make(kind)
        copies = [track_rows(loader), scoring_loader(loader), scoring_loader(loader, chosen)]
        if kind != 'batches': copies += [restrict_rows(loader, chosen), track_rows(restrict_rows(loader, chosen))]
        assert all(fingerprint(o) == fingerprint(loader) for o in copies), kind

def test_fingerprint_draws_nothing():
    class Augmented(Rows):
        def __getitem__(self, i): return torch.rand(2) + random.random() + np.random.rand(), tensor(i)
    loader = make('tfmd', shuffle=True); loader.dataset = Augmented()
    def draws(use):
        set_seed(6)
        if use: fingerprint(loader)
        return random.random(), np.random.rand(), torch.rand(1).item()
    assert draws(True) == draws(False)

script = '''
import json, sys
from pathlib import Path
import numpy as np, torch
from fastai.data.core import Datasets, TfmdDL
from fastai.data.load import DataLoader
from rholoss_fastai.item_table import fingerprint, ItemTable
rng = np.random.default_rng(0)
files = [Path('/data')/str(i%3)/f'{i}.png' for i in range(300)]
loaders = [TfmdDL(Datasets(files, [[lambda o: o], [lambda o: {o.parent.name, 'x'}]]), num_workers=0),
           DataLoader([(rng.random(3), 'ab'[i%2], object()) for i in range(40)], bs=4)]
print(json.dumps([fingerprint(o) for o in loaders]))
'''

def run_script(code, *args, **env):
    args = [sys.executable, '-W', 'ignore', '-c', code, *map(str, args)]
    return subprocess.run(args, env=dict(os.environ, **env), capture_output=True, text=True)

@pytest.mark.slow
def test_the_same_in_every_process():
    runs = [run_script(script, PYTHONHASHSEED=seed) for seed in ('1', '2')]
    assert runs[0].stdout and runs[0].stdout == runs[1].stdout, runs[0].stderr
    assert all(all(o.values()) for o in json.loads(runs[0].stdout))

# tables

class OtherTable(ItemTable):
    def validate(self):
        if self.values.isnan().any(): raise ValueError('NaN')

def table_of(n=9): return ItemTable(torch.arange(n), dict(n=n, targets='aa', items='bb'), dict(model='resnet18', folds=[1,2]))

def test_table(tmp_path):
    table,path = table_of(),tmp_path/'new folder'/'il.safetensors'
    assert table.values.dtype == torch.float32 and len(table) == 9 and table[tensor([2,3])].tolist() == [2,3] and 'resnet18' in repr(table)
    table.save(path); table.save(str(path))
    same = ItemTable.load(str(path))
    assert torch.equal(same.values, table.values) and same.fingerprint == table.fingerprint and same.info == table.info
    assert [o.name for o in path.parent.iterdir()] == ['il.safetensors']
    bad = ((torch.zeros(3), '3 values for a data set of 9'), (torch.zeros(9,1), 'one value a row'), (tensor(1.), 'one value a row'))
    for values,error in bad:
        with pytest.raises(ValueError, match=error): ItemTable(values, dict(n=9, targets='', items=''))
    with pytest.raises(TypeError, match="can't be kept in a file"): ItemTable(torch.zeros(9), dict(n=9), dict(model=object()))
    with pytest.raises(ValueError, match='NaN'): OtherTable(tensor([float('nan')]), dict(n=1))

def test_bad_files(tmp_path):
    path = tmp_path/'il.safetensors'
    with pytest.raises(FileNotFoundError): ItemTable.load(path)
    table_of().save(path)
    content = path.read_bytes()
    half,no_n = content[:60],content.replace(b'\\"n\\"', b'\\"m\\"', 1)
    assert no_n != content
    for bad in (b'', content[:5], half, content[:-4], b'not a file of numbers', no_n, b'\x80\x04pickle'*9):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='truncated, corrupt'): ItemTable.load(path)
    torch.save(torch.zeros(9), path)
    with pytest.raises(ValueError, match='truncated, corrupt'): ItemTable.load(path)
    save_file(dict(weight=torch.zeros(9)), path)
    with pytest.raises(ValueError, match='holds no ItemTable: it holds'): ItemTable.load(path)
    save_file(dict(values=torch.zeros(9)), path, dict(kind='ItemTable', format='1', fingerprint='{', info='{}'))
    with pytest.raises(ValueError, match='truncated, corrupt'): ItemTable.load(path)
    save_file(dict(values=torch.zeros(9)), path, dict(kind='ItemTable', format='2', fingerprint='{}', info='{}'))
    with pytest.raises(ValueError, match='has format 2, but this version reads 1'): ItemTable.load(path)
    OtherTable(torch.zeros(2), dict(n=2, targets='', items='')).save(path)
    with pytest.raises(ValueError, match='holds OtherTable, not ItemTable'): ItemTable.load(path)

def test_check():
    loader = make('tfmd')
    table = ItemTable.of(torch.zeros(N), loader, seed=3)
    assert table.check(track_rows(loader)) is table and table.info == dict(seed=3)
    for part,error in (('targets', 'relabelled'), ('items', 'another order')):
        other = ItemTable(table.values, dict(table.fingerprint, **{part: 'ff'}))
        with pytest.raises(ValueError, match=error): other.check(loader)
    with pytest.raises(ValueError, match='for 53 rows, but this data set has 9'): table.check(TfmdDL(Rows(9), num_workers=0))

def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'il.safetensors'
    table_of().save(path)
    before = path.read_bytes()
    for name in ('replace', 'fsync'):
        with monkeypatch.context() as m:
            m.setattr(os, name, lambda *a: (_ for _ in ()).throw(OSError('disk full')))
            with pytest.raises(OSError, match='disk full'): table_of(12).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

killed = '''
import os, signal, sys, torch
from rholoss_fastai.item_table import ItemTable
os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ItemTable(torch.arange(12), dict(n=12, targets='', items='')).save(sys.argv[1])
'''

@pytest.mark.slow
def test_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path/'il.safetensors'
    table_of().save(path)
    assert run_script(killed, path).returncode == -signal.SIGKILL
    assert torch.equal(ItemTable.load(path).values, torch.arange(9.))

# the random state

def test_preserve_rng():
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(1); expected = draw()
    set_seed(1)
    with pytest.raises(KeyboardInterrupt), preserve_rng():
        draw()
        raise KeyboardInterrupt
    assert draw() == expected

# on a GPU

@pytest.mark.cuda
def test_cuda():
    set_seed(1)
    tracked = track_rows(TfmdDL(Rows(10_000), bs=320, shuffle=True, num_workers=0, device='cuda'))
    it = iter(tracked)
    x,y = next(it)
    tracked.rows(0, x.device)
    idxs,image = torch.arange(0, 320, 10, device='cuda'),TensorImage(torch.rand(320,3,8,8, device='cuda'))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        rows = [tracked.rows(i, x.device) for i in range(len(tracked))]
        small = subset_batch((image, dict(y=y)), idxs)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(rows[0], x) and rows[0].device == x.device and type(small[0]) is TensorImage and len(small[1]['y']) == 32
    before = torch.cuda.get_rng_state()
    with preserve_rng(): torch.rand(3, device='cuda')
    assert torch.equal(before, torch.cuda.get_rng_state())
    listed = TorchDataLoader(Rows(), batch_size=8, shuffle=True)
    tracked = track_rows(listed)
    for i,(x,_) in enumerate(tracked): assert torch.equal(tracked.rows(i, 'cuda').cpu(), x)

@pytest.mark.cuda
def test_cuda_begun_inside():
    code = '''
import torch
from rholoss_fastai.rows import preserve_rng
torch.manual_seed(3)
assert not torch.cuda.is_initialized()
with preserve_rng(): torch.rand(3, device='cuda')
a = torch.rand(3, device='cuda')
torch.manual_seed(3)
assert torch.equal(a, torch.rand(3, device='cuda'))
'''
    res = run_script(code)
    assert res.returncode == 0, res.stderr
