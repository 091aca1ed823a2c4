"Restricted and scoring loaders against data sets whose items are their rows"
import random

import numpy as np
import pytest
import torch
from fastai.data.core import Datasets, TfmdDL, TfmdLists
from fastai.data.load import DataLoader
from fastai.torch_core import TensorImage, set_seed
from fastcore.foundation import L
from fasttransform import Transform
from row_loaders import N, Rows, check_rows, chosen, fastai_loaders, make, rows_in, same, torch_loaders, weights
from torch import tensor
from torch.utils.data import DataLoader as TorchDataLoader

from rholoss_fastai.loaders import restrict_rows, scoring_loader
from rholoss_fastai.rows import RowSubset, dataset_size, preserve_rng, track_rows

# some rows

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
        again = restrict_rows(make(kind, seed=99, **({} if kind in torch_loaders else dict(shuffle=True))),
                              chosen, seed=4)
        set_seed(1)
        assert same(first, [[rows_in(b) for b in again] for _ in range(3)])
    if 'weighted' in kind or kind == 'rank1': assert all(weights[o] for o in drawn)
    set_seed(1)
    assert check_rows(track_rows(restrict_rows(fold, [3,8,22]), bs=2)) in (1, 2, 3)
    with pytest.raises(ValueError, match='row 1 is not among the 11 rows'): restrict_rows(fold, [3,1])

def test_restricted_workers():
    for kind in ('tfmd', 'shuffled'):
        fold = track_rows(restrict_rows(make(kind, num_workers=2, **({} if kind == 'shuffled' else dict(shuffle=True))),
                                        chosen, seed=4))
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

@pytest.mark.parametrize('rows,error,match',
                         [([], ValueError, 'No rows'), ([0,53], ValueError, 'row 53'), ([-1,2], ValueError, 'row -1'),
 ([1,2,1], ValueError, 'more than once'), ([[1,2]], ValueError, 'shape'), ([1.,2.], TypeError, 'whole numbers'),
 (np.ones(N, dtype=bool), TypeError, 'mask')])
def test_bad_rows(rows, error, match):
    for kind in ('tfmd', 'shuffled'):
        for f in (restrict_rows, scoring_loader):
            with pytest.raises(error, match=match): f(make(kind), rows)

def test_rows_of_any_kind():
    for rows in (range(3), [0,1,2], (0,1,2), L(0,1,2), np.arange(3), tensor([0,1,2]),
                 np.array([0,1,2], dtype=np.uint8)):
        assert check_rows(track_rows(restrict_rows(make('tfmd'), rows))) == 1

def test_no_weight_left():
    for kind in ('weighted', 'tabular_weighted', 'torch_weighted'):
        with pytest.raises(ValueError, match='weight of 0'): restrict_rows(make(kind), [0,5,10])
    with pytest.raises(ValueError, match="can't be restricted"): restrict_rows(make('batches'), [0,1])
    with pytest.raises(ValueError, match='get_idxs'):
        restrict_rows(DataLoader(Rows(), bs=4, get_idxs=lambda: [0,1]), [0])

def test_subset_of_a_data_set():
    subset = RowSubset(Datasets(list('abcdef'), [[ord], [str.upper]]), np.array([4,0]))
    assert [subset[0], subset[tensor(1)], subset[np.int64(1)]] == [(101,'E'), (97,'A'), (97,'A')]
    assert list(subset) == [(101,'E'), (97,'A')] and subset.items == ['e','a'] and subset.n_inp == 1
    assert len(subset) == 2
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
    datasets = Datasets(list(range(N)), [[ToImage(), Noise()], [ToTensor()]],
                        splits=[range(n_train), range(n_train, N)])
    kwargs = dict(dict(num_workers=0), **kwargs)
    return TfmdDL(datasets.train, bs=8, shuffle=True, drop_last=True, after_item=[Noise()],
                  after_batch=[Noise()], **kwargs)

@pytest.mark.parametrize('num_workers', [0, 2])
def test_scoring_sees_no_augmentation(num_workers):
    train = augmented(num_workers=num_workers)
    it = iter(train)
    assert next(it)[0].min() >= 3000
    for rows in (None, [5,2,9]):
        scoring = track_rows(scoring_loader(train, rows))
        for i,(x,y) in enumerate(scoring):
            assert torch.equal(x.as_subclass(torch.Tensor), y) and torch.equal(scoring.rows(i), y.long())
    partly = iter(scoring_loader(train))
    next(partly)
    del partly  # interrupted
    assert next(it)[0].min() >= 3000 and train.dataset.split_idx == 0
    assert all(x.min() >= 3000 for x,_ in train)

def test_fold_is_augmented():
    fold = track_rows(restrict_rows(augmented(), range(10,30)))
    for i,(x,y) in enumerate(fold): assert x.min() >= 3000 and torch.equal(fold.rows(i), y.long())
    assert all(torch.equal(x.as_subclass(torch.Tensor), y) for x,y in scoring_loader(fold))
    assert len(scoring_loader(fold).dataset) == 20

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
