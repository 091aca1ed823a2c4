"Faulty training sets of every kind: which rows are changed, how, and that all else stays as it was"
import random

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, get_image_files, parent_label
from fastai.learner import Learner
from fastai.tabular.core import Categorify, FillMissing, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.torch_core import TensorCategory, tensor
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fasttransform import Transform
from helpers import examples, fit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Subset, TensorDataset

from rholoss_fastai.all import (
    IrreducibleLosses,
    add_noise,
    class_names,
    fingerprint,
    long_tail,
    long_tail_rows,
    noisy_inputs,
    noisy_labels,
    redraw_labels,
    relabel,
    relevant_classes,
    replace_dataset,
    restrict_rows,
    row_targets,
    scoring_loader,
    track_rows,
    whole_dataset,
)

N, N_VALID = 60, 12
NAMES = ['ant', 'bee', 'cat']
TARGETS = torch.arange(N + N_VALID) % 3


def input_of(row): return torch.full((4,), float(row))


class Pairs:
    "Map-style rows that make their label themselves"
    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        row = self.rows[i]
        return input_of(row), row % 3


class Dicts(Pairs):
    def __getitem__(self, i): return dict(x=input_of(self.rows[i]), labels=self.rows[i] % 3)


class Classed(Pairs):
    "As torchvision's data sets"
    classes = NAMES
    @property
    def targets(self): return [row % 3 for row in self.rows]


def block(**kwargs):
    return DataBlock((TransformBlock(type_tfms=input_of), CategoryBlock), get_y=lambda row: NAMES[row % 3],
                     splitter=IndexSplitter(range(N, N+N_VALID)),
                     **kwargs).dataloaders(range(N+N_VALID), bs=8, num_workers=0)


def numbers():
    "Datasets without a vocabulary"
    parts = [Datasets(rows, [[input_of], [lambda row: tensor(row % 3)]]) for rows in (range(N), range(N, N+N_VALID))]
    return DataLoaders.from_dsets(*parts, bs=8, num_workers=0)


def tensors():
    x = torch.stack([input_of(i) for i in range(N+N_VALID)])
    return [TensorDataset(x[part], TARGETS[part]) for part in (slice(N), slice(N, None))]


def plain(make):
    return DataLoaders(DataLoader(make(range(N)), bs=8, shuffle=True), DataLoader(make(range(N, N+N_VALID)), bs=8))


def subset():
    both = TensorDataset(*(torch.cat([a, b]) for a, b in zip(*(o.tensors for o in tensors()))))
    return DataLoaders(DataLoader(Subset(both, range(N)), bs=8, shuffle=True),
                       DataLoader(Subset(both, range(N, N+N_VALID)), bs=8))


def tabular():
    frame = pd.DataFrame(dict(x=np.arange(N+N_VALID, dtype=np.float32), kind=['ab'[i % 2] for i in range(N+N_VALID)],
                              y=[NAMES[i % 3] for i in range(N+N_VALID)]))
    return TabularDataLoaders.from_df(frame, procs=[Categorify], cat_names=['kind'], cont_names=['x'],
                                      y_names='y', bs=8,
                                      valid_idx=list(range(N, N+N_VALID)))


kinds = dict(block=block, numbers=numbers,
             tensors=lambda: DataLoaders(*(DataLoader(o, bs=8, shuffle=i==0) for i, o in enumerate(tensors()))),
             torch=lambda: DataLoaders(*(TorchDataLoader(o, batch_size=8, shuffle=i==0) for i,
                                         o in enumerate(tensors()))),
             pairs=lambda: plain(Pairs), dicts=lambda: plain(Dicts), classed=lambda: plain(Classed), subset=subset,
             tabular=tabular)


def read(dl):
    "Rows that inputs tell, and targets, of an epoch in the loader's order"
    rows, targets = [], []
    for batch in dl:
        x = batch['x'] if isinstance(batch, dict) else batch[-2]
        y = batch['labels'] if isinstance(batch, dict) else batch[-1]
        rows.append(x.reshape(len(x), -1)[:, 0].round().long())
        targets.append(y.reshape(-1).long())
    return torch.cat(rows).cpu(), torch.cat(targets).cpu()


def rng_state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# Labels

def published(targets, share, seed):
    "The labels of the published CIFAR-10 runs of this project's recipes"
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.rand(len(targets), generator=generator) < share
    return torch.where(redrawn, torch.randint(0, 10, targets.shape, generator=generator), targets)


@examples(40)
@given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 2**31))
def test_redrawn_uniformly(n, share, seed):
    targets = torch.arange(n) % 10
    labels, changed = redraw_labels(targets, share, n_classes=10, seed=seed)
    assert torch.equal(labels, published(targets, share, seed)) and torch.equal(changed, labels != targets)
    assert labels.dtype == targets.dtype


@examples(10)
@given(st.integers(2, 5), st.floats(0.2, 1), st.integers(0, 1000))
def test_redrawn_from_a_confusion_matrix(n_classes, share, seed):
    matrix = torch.rand(n_classes, n_classes, generator=torch.Generator().manual_seed(seed)).softmax(1)
    targets = torch.arange(20_000) % n_classes
    labels, _ = redraw_labels(targets, share, matrix, seed=seed)
    counts = torch.zeros(n_classes, n_classes).index_put_((targets, labels), torch.tensor(1.), accumulate=True)
    expected = share*matrix + (1-share)*torch.eye(n_classes)
    assert (counts/counts.sum(1, keepdim=True) - expected).abs().max() < 0.04


def test_extremes():
    targets = torch.arange(30) % 3
    assert torch.equal(redraw_labels(targets, 0.)[0], targets)
    swapped, changed = redraw_labels(targets, 1., {0: 1, 1: 0})
    assert torch.equal(swapped, torch.tensor([1, 0, 2])[targets]) and torch.equal(changed, targets < 2)
    assert torch.equal(redraw_labels(targets.to(torch.uint8), 0.5)[0], redraw_labels(targets, 0.5)[0])


@pytest.mark.parametrize('kind', kinds)
def test_noisy_labels(kind):
    dls = kinds[kind]()
    before, marks = rng_state(), fingerprint(dls.train)
    noisy = noisy_labels(dls, 0.5, seed=1)
    assert rng_state() == before
    wanted, changed = redraw_labels(TARGETS[:N], 0.5, n_classes=3, seed=1)
    assert torch.equal(noisy.noisy, changed) and 0 < changed.sum() < N
    # read through the loader, each row has its own input, and its new label; the original has the old one
    for loaders, expected in ((noisy, wanted), (dls, TARGETS)):
        rows, targets = read(loaders.train)
        assert len(rows) >= N-7 and torch.equal(targets, expected[rows])
        assert torch.equal(row_targets(loaders.train), expected[:N])
    rows, targets = read(noisy.valid)
    assert torch.equal(targets, TARGETS[rows]) and len(rows) == N_VALID # which stay as they are
    assert fingerprint(noisy.train) != marks == fingerprint(dls.train)
    tracked = track_rows(noisy.train)
    for i, batch in enumerate(tracked): assert torch.equal(read([batch])[0], tracked.rows(i))
    rows, targets = read(scoring_loader(noisy.train, [5, 2, 3]))
    assert torch.equal(targets, wanted[rows]) and sorted(rows.tolist()) == [2, 3, 5]


@pytest.mark.parametrize('kind', kinds)
def test_one_other_label_is_another_data_set(kind):
    dls = kinds[kind]()
    labels = row_targets(dls.train).clone()
    marks = fingerprint(relabel(dls.train, labels))
    labels[37] = (labels[37] + 1) % 3
    other = fingerprint(relabel(dls.train, labels))
    # a table's items are whole rows
    assert other['targets'] != marks['targets'] and (other['items'] == marks['items'] or kind == 'tabular')


@pytest.mark.parametrize('kind', ['block', 'pairs', 'tabular', 'torch'])
def test_the_order_of_batches_stays(kind):
    "The same seed, the same batches, with the fault and without"
    orders = []
    for fault in (lambda o: o, noisy_labels, lambda o: noisy_inputs(o, 1e-3)):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        dls = fault(kinds[kind]())
        orders.append(torch.cat([read(dls.train)[0] for _ in range(2)]))
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])


def test_validation_as_holdout():
    noisy = noisy_labels(block(), 0.5, seed=1, valid=True)
    assert torch.equal(row_targets(noisy.valid), redraw_labels(TARGETS[N:], 0.5, n_classes=3, seed=2)[0])
    assert torch.equal(noisy.noisy_valid, row_targets(noisy.valid) != TARGETS[N:]) and noisy.noisy_valid.any()


def test_a_cell_that_runs_again():
    "Labels of noisy DataLoaders are redrawn once more: what is wrong is told by those before any redrawing"
    again = noisy_labels(noisy_labels(block(), 0.5, seed=1, valid=True), 0.5, seed=1, valid=True)
    assert torch.equal(again.noisy, noisy_labels(block(), 0.5, seed=1).noisy) and again.noisy_valid.any()
    other = noisy_labels(again, 0.5, seed=7)
    assert torch.equal(other.noisy, row_targets(other.train) != TARGETS[:N]) and (other.noisy != again.noisy).any()


def test_names_and_numbers():
    for dls in (block(), tabular(), plain(Classed)):
        assert list(class_names(dls.train)) == NAMES
        by_name, by_number = noisy_labels(dls, 0.5, dict(cat='ant')), noisy_labels(dls, 0.5, {2: 0})
        assert torch.equal(row_targets(by_name.train), row_targets(by_number.train))
        assert torch.equal(row_targets(by_name.train)[by_name.noisy].unique(), torch.tensor([0]))
    assert class_names(plain(Pairs).train) is None
    with pytest.raises(ValueError, match="'dog' is no class: the data set has ant, bee, cat"):
        noisy_labels(block(), 0.5, dict(dog='ant'))
    with pytest.raises(ValueError, match="'cat' is no class"): noisy_labels(plain(Pairs), 0.5, dict(cat=0))


def test_fastai_goes_on_as_before():
    "Types, vocabulary, decoding, and a Learner"
    dls = noisy_labels(block(), 0.5)
    x, y = dls.train_ds[0]
    assert type(y) is TensorCategory and dls.c == 3 and dls.vocab == NAMES
    assert [dls.train_ds.decode((x, y))[1] for x, y in dls.train_ds] == [NAMES[i] for i in row_targets(dls.train)]
    learn = Learner(dls, nn.Linear(4, 3))
    il = IrreducibleLosses.of(torch.zeros(N), dls.train)
    learn.rho_loss(il, frac=0.5, epoch='candidates')
    fit(learn, 2)
    assert learn.selection.seen.sum() > learn.selection.selected.sum() > 0
    with pytest.raises(ValueError, match='relabelled'): Learner(block(), nn.Linear(4, 3)).rho_loss(il)


def test_many_labels_or_none_are_refused():
    def loaders(y_block, get_y):
        return DataBlock((TransformBlock(type_tfms=input_of), y_block), get_y=get_y,
                         splitter=IndexSplitter([0])).dataloaders(range(20), bs=8, num_workers=0)
    for dls in (loaders(MultiCategoryBlock, lambda row: NAMES[:1 + row % 2]),
                loaders(RegressionBlock, lambda row: row/7)):
        with pytest.raises(TypeError, match='the number of one class for each row'): noisy_labels(dls)
    with pytest.raises(ValueError, match='without a label'):
        noisy_labels(DataLoaders(DataLoader([torch.zeros(2)]*5, bs=2), DataLoader([1], bs=1)))
    unlabelled = [dict(x=torch.zeros(2))]*5
    with pytest.raises(ValueError, match='no label among them'):
        noisy_labels(DataLoaders(DataLoader(unlabelled, bs=2), DataLoader(unlabelled, bs=2)))
    with pytest.raises(TypeError, match='must be DataLoaders'): noisy_labels(block().train)
    with pytest.raises(ValueError, match='59 labels for a data set of 60 rows'):
        relabel(block().train, torch.zeros(59, dtype=torch.long))


def test_a_loader_that_takes_batches_elsewhere_is_refused():
    class Table(Pairs):
        def batch(self, rows): return torch.stack([input_of(i) for i in rows]), torch.tensor(rows) % 3
    rows = Table(range(N))
    dl = DataLoader(rows, bs=8, create_item=lambda i: i, create_batch=rows.batch)
    with pytest.raises(ValueError, match='makes its items in its own way'): noisy_labels(DataLoaders(dl, dl))
    with pytest.raises(ValueError, match='59 rows in place of one of 60'):
        replace_dataset(plain(Pairs).train, Pairs(range(59)))


def test_labels_that_no_vocabulary_made():
    dls = noisy_labels(numbers(), 0.5)
    assert all(isinstance(y, torch.Tensor) for _, y in dls.train_ds)


# Inputs

@pytest.mark.parametrize('kind', [o for o in kinds])
def test_noisy_inputs(kind):
    dls = kinds[kind]()
    before = rng_state()
    noisy = noisy_inputs(dls, std=0.1, share=0.5, seed=3)
    assert rng_state() == before and 10 < noisy.noisy_inputs.sum() < N-10
    def inputs(dl):
        res = {}
        for batch in dl:
            x = batch['x'] if isinstance(batch, dict) else batch[-2]
            res.update({round(o.flatten()[0].item()): o for o in x})
        return torch.stack([res[i] for i in range(N)]).cpu()
    clean, once, again = (inputs(scoring_loader(o.train)) for o in (dls, noisy, noisy))
    changed = (once != clean).flatten(1).any(1)
    assert torch.equal(changed, noisy.noisy_inputs) and torch.equal(once, again)
    difference = (once - clean)[changed]
    assert 0.07 < difference.std() < 0.13 and len(difference.unique()) > 0.9*difference.numel() # no two rows alike
    rows, targets = read(noisy.train)
    assert torch.equal(targets, TARGETS[rows])
    other = inputs(scoring_loader(noisy_inputs(dls, std=0.1, share=0.5, seed=4).train))
    assert not torch.equal(other, once)


def test_images_with_noise(tmp_path):
    """Of files, as bytes, the same in the picture and in the tensor; augmentation that the data set itself does is off
    when scored"""
    for i in range(24):
        (tmp_path/NAMES[i % 3]).mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), 100 + i, np.uint8)).save(tmp_path/NAMES[i % 3]/f'{i:02}.png')
    class Brighter(Transform):
        split_idx = 0
        def encodes(self, x: PILImage): return PILImage.create(np.full((6, 6, 3), 255, np.uint8))
    files = get_image_files(tmp_path).sorted()
    dls = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label,
                    splitter=IndexSplitter([0, 1])).dataloaders(files, bs=4, num_workers=0)
    noisy = noisy_labels(noisy_inputs(dls, std=0.1), 0.5)
    x, _ = noisy.train_ds[0]
    assert type(x) is PILImage
    pixels = torch.from_numpy(np.array(dls.train_ds[0][0]))
    assert torch.equal(torch.from_numpy(np.array(x)), add_noise(pixels[None], 0.1)[0][0])
    assert fingerprint(noisy.train)['items'] == fingerprint(dls.train)['items'] # the paths
    assert noisy.noisy.any() and noisy.noisy_inputs.all() and noisy.one_batch()[0].shape == (4, 3, 6, 6)
    noisy.show_batch(max_n=2)
    dls.train_ds.tls[0].tfms.add([Brighter()])
    assert np.array(noisy_inputs(dls, std=0.).train_ds[0][0]).min() == 255
    scored = next(iter(scoring_loader(noisy_inputs(dls, std=0.).train)))[0]
    assert scored.max() < 0.6 and np.array(dls.train_ds[0][0]).min() == 255


def test_image_dataloaders_from_a_frame(tmp_path):
    for i in range(12): Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(tmp_path/f'{i}.png')
    frame = pd.DataFrame(dict(name=[f'{i}.png' for i in range(12)], label=[NAMES[i % 3] for i in range(12)]))
    dls = ImageDataLoaders.from_df(frame, tmp_path, valid_pct=0.25, seed=0, bs=4, num_workers=0)
    noisy = noisy_labels(dls, 0.9)
    assert [dls.vocab[i] for i in row_targets(dls.train)] == dls.train_ds.items.label.tolist()
    assert torch.equal(row_targets(noisy.train) != row_targets(dls.train), noisy.noisy) and noisy.noisy.any()
    assert torch.equal(torch.stack([y for _, y in noisy.train_ds]).as_subclass(torch.Tensor), row_targets(noisy.train))


def test_noise_on_what_is_no_signal():
    with pytest.raises(TypeError, match='Noise for a tensor of torch.int64'):
        noisy_inputs(DataLoaders(*[DataLoader([(tensor(1), 2)]*4, bs=2)]*2)).train_ds[0]
    with pytest.raises(TypeError, match='Noise for a str'):
        noisy_inputs(DataLoaders(*[DataLoader([('a', 2)]*4, bs=2)]*2)).train_ds[0]
    with pytest.raises(ValueError, match='std must lie'): noisy_inputs(block(), std=-1)


def test_noise_in_a_table_is_in_units_of_its_columns():
    frame = pd.DataFrame(dict(a=np.arange(200)*1000., y=['ab'[i % 2] for i in range(200)]))
    frame.loc[3, 'a'] = np.nan
    dls = TabularDataLoaders.from_df(frame, procs=[FillMissing, Categorify, Normalize], cont_names=['a'], y_names='y',
                                     valid_idx=list(range(190, 200)), bs=8)
    noisy = noisy_inputs(dls, std=0.3)
    difference = noisy.train_ds.items.a - dls.train_ds.items.a
    assert abs(difference.std() - 0.3) < 0.05 and list(noisy.train_ds.items.a_na) == list(dls.train_ds.items.a_na)


def test_in_worker_processes():
    noisy = noisy_inputs(noisy_labels(plain(Pairs), 0.5), 0.1)
    here = read(scoring_loader(noisy.train))
    noisy.train.fake_l.num_workers = 2
    there = read(scoring_loader(noisy.train))
    assert all(torch.equal(a, b) for a, b in zip(here, there))


# Classes that count, and rare ones

@pytest.mark.parametrize('kind', kinds)
def test_relevant_classes(kind):
    some = relevant_classes(kinds[kind](), [0, 2])
    assert torch.equal(some.relevant, TARGETS[:N] != 1)
    assert len(read(scoring_loader(some.train))[0]) == N
    rows, targets = read(some.valid)
    assert targets.unique().tolist() == [0, 2] and len(rows) == N_VALID*2//3
    assert len(whole_dataset(some.valid)) == N_VALID


def test_relevant_classes_must_occur():
    with pytest.raises(ValueError, match='training set has no row'): relevant_classes(block(), [7])
    with pytest.raises(ValueError, match="'dog' is no class"): relevant_classes(block(), ['dog'])


@examples(40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.floats(1, 1000), st.integers(0, 100))
def test_long_tail_rows(targets, ratio, seed):
    targets = torch.tensor(targets)
    rows = long_tail_rows(targets, ratio, seed)
    assert torch.equal(rows, rows.unique()) and torch.equal(rows, long_tail_rows(targets, ratio, seed))
    last = targets.max().item()
    for c in range(last+1):
        n, kept = (targets == c).sum().item(), (targets[rows] == c).sum().item()
        assert kept == (max(1, round(n / ratio**(c/max(last, 1)))) if n else 0)


@pytest.mark.parametrize('kind', kinds)
def test_long_tail_of_what_has_noise_already(kind):
    noisy = noisy_labels(kinds[kind](), 0.4)
    labels = row_targets(noisy.train)
    tail = long_tail(noisy, ratio=10, seed=2)
    assert torch.equal(tail.kept.nonzero().flatten(), long_tail_rows(labels, 10, seed=2))
    rows, targets = read(scoring_loader(tail.train))
    assert torch.equal(rows.sort().values, tail.kept.nonzero().flatten()) and torch.equal(targets, labels[rows])
    assert torch.equal(tail.noisy, noisy.noisy) and fingerprint(tail.train) == fingerprint(noisy.train)
    # and the other way round: all rows are relabelled, some are read
    other = noisy_labels(tail, 0.4, seed=9)
    rows, targets = read(scoring_loader(other.train))
    assert torch.equal(rows.sort().values, tail.kept.nonzero().flatten())
    assert torch.equal(targets, redraw_labels(labels, 0.4, n_classes=3, seed=9)[0][rows])
    assert len(other.noisy) == N


def test_restricted_loaders_stay_restricted():
    dl = restrict_rows(block().train, [4, 5, 6])
    rows, targets = read(scoring_loader(relabel(dl, torch.zeros(N, dtype=torch.long))))
    assert rows.tolist() == [4, 5, 6] and targets.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match='ratio must lie'): long_tail(block(), ratio=0.5)
