"The rows of each batch against data sets whose items are their rows: every kind of loader, with workers"
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader, SkipItemException
from fastai.text.data import LMDataLoader
from fastai.torch_core import TensorImage, set_seed
from row_loaders import HalfDL, N, Rows, check_rows, epochs, fastai_loaders, make, rows_in, same, torch_loaders
from torch import tensor
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, Sampler

from rholoss_fastai.item_table import fingerprint
from rholoss_fastai.loaders import restrict_rows, scoring_loader
from rholoss_fastai.nested import subset_batch
from rholoss_fastai.rows import RowsUnknown, dataset_size, epoch_size, preserve_rng, track_rows


@pytest.mark.parametrize('kind', fastai_loaders)
@pytest.mark.parametrize('shuffle,drop_last', [(True, True), (True, False), (False, False)])
def test_order_is_that_without_tracking(kind, shuffle, drop_last):
    plain,twin = (make(kind, shuffle=shuffle, drop_last=drop_last) for _ in range(2))
    tracked = track_rows(twin)
    assert same(epochs(plain), epochs(tracked))
    assert check_rows(tracked) == len(list(plain)) > 0

@pytest.mark.parametrize('kind', ['plain', 'tfmd', 'sorted', 'weighted', 'partial', 'tabular', 'rank1'])
@pytest.mark.many(2)
def test_workers(kind):
    plain,twin = (make(kind, shuffle=True, drop_last=kind!='tfmd', num_workers=2) for _ in range(2))
    tracked = track_rows(twin)
    set_seed(5); expected = [list(plain) for _ in range(2 if kind in ('plain', 'tabular') else 1)]
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
    assert 'Way out: ' in str(e.value)
    for f in (epoch_size, scoring_loader, lambda o: restrict_rows(o, [0])):
        with pytest.raises(ValueError, match=why): f(loader)

class Skips(Rows):
    def __getitem__(self, i):
        if i == 17: raise SkipItemException
        return super().__getitem__(i)

@pytest.mark.parametrize('num_workers', [0, 2])
def test_skipped_item(num_workers):
    source = DataLoader(Skips(), bs=8, num_workers=num_workers, shuffle=True)
    for loader in (track_rows(source), track_rows(restrict_rows(source, [4,17,20]))):
        with pytest.raises(ValueError, match='row 17 was skipped'): [loader.rows(i) for i,_ in enumerate(loader)]

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
    assert check_rows(tracked) == 3 and tracked.batch_size == 20 and loader.batch_size == 8
    assert tracked.dataset is loader.dataset
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
    assert {k: epoch_size(make(k)) for k in fastai_loaders} == dict(plain=N, tfmd=N, sorted=N, weighted=N,
                                                                    partial=31, tabular=N,
                                                                     tabular_weighted=N, rank0=27, rank1=27)
    sizes = dict(shuffled=N, seeded=N, sequential=N, torch_weighted=70, batches=N)
    assert {k: epoch_size(track_rows(make(k))) for k in torch_loaders} == sizes
    assert {dataset_size(make(k)) for k in [*fastai_loaders, *torch_loaders]} == {N}
    assert epoch_size(TfmdDL(Rows(), n=10, num_workers=0)) == 10
    assert epoch_size(restrict_rows(make('partial'), range(9))) == 9

# the random state

def test_preserve_rng():
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(1); expected = draw()
    set_seed(1)
    with pytest.raises(KeyboardInterrupt), preserve_rng():
        draw()
        raise KeyboardInterrupt
    assert draw() == expected

def run_script(code, *args, **env):
    args = [sys.executable, '-W', 'ignore', '-c', code, *map(str, args)]
    return subprocess.run(args, env=dict(os.environ, **env), capture_output=True, text=True)

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
    assert torch.equal(rows[0], x) and rows[0].device == x.device and type(small[0]) is TensorImage
    assert len(small[1]['y']) == 32
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

# what to do where rows can't be known

def test_the_way_out_is_the_callers():
    dl = DataLoader(iter(range(9)), bs=4)
    with pytest.raises(RowsUnknown, match='is iterable. Way out: a DataLoader whose index names a row'): track_rows(dl)
    with pytest.raises(RowsUnknown, match='is iterable. Use rounds.$'): track_rows(dl, way_out='Use rounds.')
    with pytest.raises(RowsUnknown) as e: track_rows(dl)
    assert 'il=' not in str(e.value) and str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    assert str(e.value.mended('Do this.')).endswith('iterable. Do this.')
