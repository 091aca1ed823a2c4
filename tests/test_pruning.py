"""Pruning: kept rows against brute force, and what a loader reads."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ShowGraphCallback  # noqa: F401 (patches `no_bar`)
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches `fit_one_cycle` and `lr_find`)
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize, MultiCategorize, OneHotEncode
from fastai.tabular.data import TabularDataLoaders
from fasttransform import Transform
from helpers import examples, fit
from hypothesis import given
from hypothesis import strategies as st
from numbered_rows import Rows, rows_of
from test_epoch_rules import N, dataloaders, epoch_learner
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from rholoss_fastai.all import DatasetScores, IrreducibleLosses, ItemTable, fingerprint, prune, row_classes, track_rows


def kept(dls, scores, *args, **kwargs): return prune(dls, scores, *args, **kwargs).train.dataset.row_numbers.tolist()
def random_scores(n=N, seed=1): return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# prune

@pytest.mark.parametrize('keep,offset', [(1, 0), (0.5, 0), (0.3, 0.2), (0.004, 0), (0.5, 0.5)])
def test_hardest_easiest_moderate(keep, offset):
    dls, scores = dataloaders(), random_scores()
    order = np.argsort(-scores.numpy())
    size, left_out = max(1, round(keep*N)), round(offset*N)
    if size < 10: dls.train.dataset.targets[:] = 0 # one class: none can vanish
    assert kept(dls, scores, keep, offset=offset) == sorted(order[left_out:left_out+size])
    assert kept(dls, scores, keep, 'easiest', offset) == sorted(order[::-1][left_out:left_out+size])
    il = random_scores(seed=2)
    clean = [o for o in range(N) if o not in np.argsort(-il.numpy())[:left_out]]
    if offset:
        assert kept(dls, scores, keep, offset=offset, il=il) == sorted(sorted(clean, key=lambda o: -scores[o])[:size])
        assert set(kept(dls, scores, keep, 'random', offset, il=il)) <= set(clean)
    else:
        nearest = sorted(range(N), key=lambda o: abs(scores[o] - scores.sort().values[(N-1)//2]))[:size]
        assert kept(dls, scores, keep, 'moderate') == sorted(nearest)


@examples(40)
@given(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=60), st.floats(0.02, 1), st.integers(1, 20),
       st.integers(0, 5))
def test_stratified_covers_the_scores(values, keep, n_strata, seed):
    "The number that was asked for, and no stratum is cut short while another one keeps more"
    dls = dataloaders(Rows(len(values)))
    dls.train.dataset.targets[:] = 0
    rows = kept(dls, torch.tensor(values), keep, 'stratified', n_strata=n_strata, seed=seed)
    assert len(set(rows)) == len(rows) == max(1, round(keep*len(values)))
    scores = np.array(values, dtype=np.float32)
    low, width = scores.min(), max(scores.max() - scores.min(), np.finfo(np.float32).tiny)
    stratum = np.minimum(((scores - low)/width*np.float32(n_strata)).astype(int), n_strata - 1)
    of = {o: (sum(stratum[rows] == o), sum(stratum == o)) for o in set(stratum)}
    most = max(k for k,_ in of.values())
    for k,size in of.values(): assert k == size or k >= most - 1


def test_ties_and_seeds():
    "Equal scores are broken at random: a data set sorted by class keeps all of them"
    rows = Rows(N)
    rows.targets = rows.targets.sort().values
    dls, scores = dataloaders(rows), torch.zeros(N)
    for strategy in ('hardest', 'easiest', 'moderate', 'random', 'stratified'):
        first, again, other = (kept(dls, scores, 0.3, strategy, seed=seed) for seed in (0, 0, 1))
        assert first == again != other and set(rows.targets[first].tolist()) == {0, 1, 2}
    state = torch.get_rng_state()
    kept(dls, scores, 0.3, 'random')
    assert torch.equal(state, torch.get_rng_state())
    counts = torch.zeros(N)
    for seed in range(60): counts[kept(dls, scores, 0.5, 'random', seed=seed)] += 1
    assert counts.min() > 10 and counts.max() < 50 # every row about as often


def test_rows_keep_their_numbers_and_nothing_else_is_read():
    dls, scores = dataloaders(bs=16, drop_last=True), random_scores()
    il = IrreducibleLosses.of(random_scores(seed=2), dls.train)
    pruned = prune(dls, DatasetScores.of(scores, dls.train), 0.25, 'random')
    rows = pruned.train.dataset.row_numbers
    dls.train.dataset.read.clear()
    assert fingerprint(pruned.train) == fingerprint(dls.train) and pruned.valid is dls.valid
    assert len(dls.train.dataset) == N
    assert pruned.train.bs == 16 and pruned.train.drop_last and pruned.train.shuffle and pruned.device == dls.device
    dls.train.dataset.read.clear()
    loader = track_rows(pruned.train)
    for i,(x,y) in enumerate(loader):
        assert torch.equal(loader.rows(i), rows_of(x)) and torch.equal(y, dls.train.dataset.targets[rows_of(x)])
    assert sorted(dls.train.dataset.read) == rows.tolist() # each once
    learn = fit(epoch_learner(pruned).rho_loss(il, frac=0.5, epoch='candidates'), 2)
    assert set(learn.selection.seen.nonzero().flatten().tolist()) <= set(rows.tolist())
    twice = prune(pruned, scores, 0.5)
    assert twice.train.dataset.row_numbers.tolist() == sorted(sorted(rows.tolist(), key=lambda o: -scores[o])[:25])


def test_workers_and_augmentation_stay():
    class Noise(Transform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + torch.rand(()) if x.ndim else x
    rows = Rows(40)
    def image(i): return rows.images[i]
    def label(i): return 'abc'[rows.targets[i]]
    dls = Datasets(range(40), [[image, Noise()], [label, Categorize(vocab=list('abc'))]],
                   splits=[list(range(32)), list(range(32, 40))]).dataloaders(
     bs=4, dl_type=TfmdDL, num_workers=2, device='cpu')
    pruned = prune(dls, random_scores(32), 0.5)
    assert pruned.train.fake_l.num_workers == 2 and pruned.vocab == dls.vocab and pruned.c == 3
    loader = track_rows(pruned.train)
    for i,(x,y) in enumerate(loader):
        assert torch.equal(y, rows.targets[loader.rows(i)]) and not torch.equal(x, rows.images[loader.rows(i)])
    torch_dls = DataLoaders(TorchDataLoader(rows, 4, shuffle=True, num_workers=2), TorchDataLoader(rows, 4))
    pruned = prune(torch_dls, random_scores(40), 0.5)
    loader = track_rows(pruned.train)
    for i,(_,y) in enumerate(loader): assert torch.equal(y, rows.targets[loader.rows(i)])
    assert pruned.train.num_workers == 2 and len(pruned.train) == 5


def test_classes():
    rows = Rows(N)
    watched = []
    def image(i):
        assert not watched, 'an image was decoded'
        return rows.images[i]
    def label(i): return 'abc'[rows.targets[i]]
    def two_labels(i): return ['a', 'abc'[rows.targets[i]]]
    def loader(*tfms): return Datasets(range(N), [[image], *tfms]).dataloaders(bs=4, device='cpu').train
    frame = pd.DataFrame(dict(a=np.arange(N)/N, label=[label(i) for i in range(N)]))
    tabular = TabularDataLoaders.from_df(frame, cont_names=['a'], y_names='label', valid_idx=list(range(150, N)),
                                         device='cpu').train
    x, y = rows.images, rows.targets
    named, several = loader([label, Categorize(vocab=list('abc'))]), loader(
        [two_labels, MultiCategorize(vocab=list('abc')), OneHotEncode(3)])
    watched.append(1) # fastai reads an item when it makes a loader
    for dl,n in ((named, N), (DataLoader(rows, bs=9), N), (TorchDataLoader(TensorDataset(x, y), 7, shuffle=True), N),
                 (tabular, 150), (DataLoader(list(zip(x, y)), bs=8, shuffle=True), N)):
        assert torch.equal(row_classes(dl), y[:n])
    pruned = prune(DataLoaders(DataLoader(list(zip(x, y)), bs=8, shuffle=True), DataLoader(rows)), random_scores(), 0.2)
    assert torch.equal(row_classes(pruned.train), y[pruned.train.dataset.row_numbers])
    for dl in (several, DataLoader(list(zip(x, y.float()))), DataLoader(list(zip(x, x))), DataLoader(list(x))):
        assert row_classes(dl) is None


def test_per_class_and_vanishing_classes():
    rows = Rows(N)
    rows.targets = torch.tensor([0]*120 + [1]*75 + [2]*5)
    dls, scores = dataloaders(rows), random_scores() + rows.targets # the rarest class is the hardest
    for strategy in ('hardest', 'easiest', 'moderate', 'random', 'stratified'):
        assert rows.targets[kept(dls, scores, 0.1, strategy, per_class=True)].bincount().tolist() == [12, 8, 1]
    order = scores[:120].argsort(descending=True)[:12].tolist()
    assert set(order) <= set(kept(dls, scores, 0.1, per_class=True))
    with pytest.raises(ValueError, match='No row of class 0 would be left of 120'): prune(dls, scores, 0.2)
    with pytest.raises(ValueError, match='No row of class 1, 2 would be left of 80'): prune(dls, scores, 0.2, 'easiest')
    prune(dls, scores, 0.6)
    regression = dataloaders(list(zip(rows.images, rows.targets.float())))
    assert len(kept(regression, scores, 0.1)) == 20
    with pytest.raises(ValueError, match='needs one class per row'): prune(regression, scores, per_class=True)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(keep=0), ValueError, r'keep must lie in \(0, 1\]; got 0'), (dict(keep=1.01), ValueError, 'got 1.01'),
    (dict(keep='half'), TypeError, 'keep'),
    (dict(keep=0.7, offset=0.4), ValueError, 'more than the whole'), (dict(offset=-0.1), ValueError, 'offset'),
    (dict(n_strata=0), ValueError, 'n_strata'),
    (dict(strategy='hard'), ValueError, 'strategy must be one of'),
    (dict(strategy='moderate', offset=0.1), ValueError, "doesn't choose"),
    (dict(il=torch.rand(N)), ValueError, 'offset=0 leaves out none'),
    (dict(offset=0.1, il=torch.rand(3)), ValueError, '3 values for a data set of 200 rows'),
    (dict(seed=-1), ValueError, 'seed'),
])
def test_bad_settings_of_prune(kwargs, error, message):
    with pytest.raises(error, match=message): prune(dataloaders(), random_scores(), **kwargs)


def test_scores_of_another_data_set(tmp_path):
    dls, other = dataloaders(), dataloaders(Rows(150))
    table = DatasetScores.of(random_scores(150), other.train)
    with pytest.raises(ValueError, match='DatasetScores for 150 rows'): prune(dls, table)
    file = DatasetScores.of(random_scores(), dls.train).save(tmp_path/'scores')
    assert kept(dls, file) == kept(dls, random_scores())
    dls.train.dataset.targets = (dls.train.dataset.targets + 1) % 3
    with pytest.raises(ValueError, match='targets differ'): prune(dls, file)
    with pytest.raises(ValueError, match='200 values|150 values'): prune(dls, random_scores(150))
    with pytest.raises(ValueError, match='NaN or infinite'): prune(dls, torch.full((N,), torch.nan))
    with pytest.raises(TypeError, match='dls must be DataLoaders'): prune(dls.train, random_scores())


# What is refused

def test_fewer_rows_than_a_batch():
    with pytest.raises(ValueError, match='10 rows are left, fewer than a batch'):
        prune(dataloaders(drop_last=True), random_scores(), 0.05)


def test_a_table_with_nan_is_no_score():
    table = ItemTable(random_scores().index_fill(0, torch.tensor([3]), float('nan')), fingerprint(dataloaders().train))
    with pytest.raises(ValueError, match='1 of 200 scores are NaN or infinite, the first in rows'):
        prune(dataloaders(), table, 0.5)
