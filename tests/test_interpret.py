"Tables and plots of rows against counts and losses made independently, for every kind of loader"
import gc
import random
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders
from helpers import fit, learner, loaders
from numbered_rows import Rows
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from rholoss_fastai.all import (
    EpochPruner,
    InfoBatch,
    IrreducibleLosses,
    SelectionRecord,
    dataset_size,
    il_in_force,
    long_tail,
    row_targets,
    whole_dataset,
)
from rholoss_fastai.il_source import ProbeIL

N = 96
NAMES = ['ant', 'bee', 'cat']


class Valued(Rows):
    "Rows with a number as target"
    def __init__(self, n):
        super().__init__(n)
        self.targets = self.images.mean((1, 2, 3))[:, None]


def convolution(n_out=3):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(64, n_out))


def plain(tmp_path, loader=DataLoader, bs='bs'):
    dls = DataLoaders(loader(Rows(N), shuffle=True, **{bs: 8}), loader(Rows(8), **{bs: 8}))
    return Learner(dls, convolution(), loss_func=CrossEntropyLossFlat())


def torch_loader(tmp_path): return plain(tmp_path, TorchDataLoader, 'batch_size')


def images(tmp_path):
    for i in range(N + 8):
        folder = tmp_path/('valid' if i >= N else 'train')/NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(folder/f'{i:03}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, bs=8, num_workers=0)
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))


def long_tailed(tmp_path):
    learn = images(tmp_path)
    return Learner(long_tail(learn.dls, ratio=4), learn.model)


def regression(tmp_path):
    dls = DataLoaders(DataLoader(Valued(N), bs=8, shuffle=True), DataLoader(Valued(8), bs=8))
    return Learner(dls, convolution(1), loss_func=MSELossFlat())


def tabular(tmp_path):
    frame = pd.DataFrame(dict(x=np.random.default_rng(0).normal(size=N+8), kind=['ab'[i % 2] for i in range(N+8)],
                              y=[NAMES[i % 3] for i in range(N+8)]))
    dls = TabularDataLoaders.from_df(frame, procs=[Categorify, Normalize], cat_names=['kind'], cont_names=['x'],
                                     y_names='y', bs=8,
                                     valid_idx=list(range(N, N+8)))
    return tabular_learner(dls, layers=[8])


def text(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(text=[' '.join(rng.choice(list('abcdefgh'), 2 + i % 7)) for i in range(N+8)],
                              label=[NAMES[i % 3] for i in range(N+8)],
                              is_valid=[i >= N for i in range(N+8)]))
    dls = TextDataLoaders.from_df(frame, text_col='text', label_col='label', valid_col='is_valid', bs=8,
                                  tok_tfm=BaseTokenizer(), n_workers=0, num_workers=0)
    config = {**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 8, 'n_layers': 1}
    return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False)


learners = dict(plain=plain, torch=torch_loader, images=images, long_tailed=long_tailed, regression=regression,
                tabular=tabular, text=text)


def fitted(kind, tmp_path, **kwargs):
    set_seed(0)
    learn = learners[kind](tmp_path)
    il = IrreducibleLosses.of(torch.rand(dataset_size(learn.dls.train), generator=torch.Generator().manual_seed(1)),
                              learn.dls.train)
    learn.rho_loss(il, frac=0.25, epoch='candidates', **kwargs)
    fit(learn, 3)
    return learn


def losses_and_predictions(learn, kind):
    "Of each row by itself, without any of this package's loaders"
    dataset, model, res = whole_dataset(learn.dls.train), learn.model.eval(), []
    for i in range(len(dataset)):
        dl = learn.dls.train
        if kind == 'tabular': *x, y = dl.after_batch(dataset.iloc[[i]])
        elif kind == 'torch': *x, y = (o[None] for o in dataset[i])
        else: *x, y = dl.after_batch(tuple(o[None] for o in dl.after_item(dataset[i])))
        device = next(model.parameters()).device
        with torch.no_grad(): pred = model(*(o.as_subclass(torch.Tensor).to(device) for o in x))
        pred, y = pred[0] if isinstance(pred, tuple) else pred, y.as_subclass(torch.Tensor).to(device)
        loss = F.mse_loss(pred, y) if y.is_floating_point() else F.cross_entropy(pred, y.reshape(-1).long())
        res.append((loss.item(), pred.item() if y.is_floating_point() else pred.argmax().item()))
    return torch.tensor(res).unbind(1)


@pytest.fixture(autouse=True)
def no_figures_stay():
    yield
    plt.close('all')


@pytest.mark.parametrize('kind', learners)
@pytest.mark.many(3)
def test_tables(kind, tmp_path):
    learn = fitted(kind, tmp_path)
    record, il = learn.selection, learn.selector.il.values
    seen, selected = record.seen.clone(), record.selected.clone()
    loss, predicted = losses_and_predictions(learn, kind)
    ledger, buffers = record.ledger, deepcopy(list(learn.model.buffers()))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    cbs = list(learn.cbs)

    top, never, suspects, ax = record.top(7), record.never(5), record.suspects(20), record.plot_il(n=30)

    # most selected first, and of those the rarest; never selected, most seen first
    keys = sorted(range(len(seen)), key=lambda i: (-selected[i], seen[i]))
    assert [(-s, c) for s, c in zip(top.selected, top.seen)] == [(-selected[i].item(), seen[i].item())
                                                                 for i in keys[:7]]
    refused = sorted(seen[(selected == 0) & (seen > 0)].tolist(), reverse=True)
    assert never.seen.tolist() == refused[:5] and not never.selected.any()
    # suspects by the sum of both losses, of rows that are trained on
    suspicion = torch.where(learn.dls.kept, il + loss, -torch.inf) if kind == 'long_tailed' else il + loss
    assert torch.equal(torch.tensor(suspects.row), suspicion.topk(20).indices) and len(suspects) == 20
    assert np.allclose(suspects.loss, loss[suspects.row.tolist()], atol=1e-4)
    assert np.allclose(suspects.il, il[suspects.row.tolist()])
    # each line is of its row
    targets = row_targets(learn.dls.train)
    names = NAMES if kind in ('images', 'long_tailed', 'tabular', 'text') else None
    for table in (top, never, suspects):
        assert table.seen.tolist() == seen[table.row.tolist()].tolist()
        assert table.selected.tolist() == selected[table.row.tolist()].tolist()
        for column, values in (('label', targets), ('predicted', predicted)):
            values = values[table.row.tolist()].flatten()
            if kind == 'regression': assert np.allclose(table[column], values, atol=1e-5)
            else: assert table[column].tolist() == [names[int(i)] if names else int(i) for i in values]
        assert ('file' in table) == (kind in ('images', 'long_tailed'))
        if 'file' in table: assert table.file.tolist() == [whole_dataset(learn.dls.train).items[i] for i in table.row]
    dots = torch.tensor(np.asarray(ax.collections[0].get_offsets()))
    assert len(dots) == 30 and all((torch.stack([il, loss], 1) - dot).abs().max(1).values.min() < 1e-4 for dot in dots)
    # and nothing has changed
    assert record.ledger.equals(ledger) and torch.equal(record.seen, seen) and torch.equal(record.selected, selected)
    assert all(torch.equal(a, b) for a, b in zip(buffers, learn.model.buffers()))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert [type(cb) for cb in learn.cbs] == [type(cb) for cb in cbs]
    fit(learn, 1)
    assert len(record.lines) == 4


def test_pictures(tmp_path, monkeypatch):
    "Those of the rows in the table, in their order, unless not wanted; where fastai has none, only the table"
    learn = fitted('images', tmp_path)
    titles = lambda: [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
    top = learn.selection.top(5)
    assert [o.split(' → ')[0].split('\n')[0] for o in titles()] == top.label.tolist()
    for title,line in zip(titles(), top.itertuples()):
        assert title.endswith(f'\n{line.selected} of {line.seen}')
        assert (f'→ {line.predicted}\n' in title) == (line.predicted != line.label)
    plt.close('all')
    learn.selection.top(5, show=False)
    assert not plt.get_fignums()
    fitted('plain', tmp_path).selection.top(5)
    assert not plt.get_fignums()


def test_rows_that_fastai_cannot_draw():
    "Plain tensors in `Datasets`, whose loaders have a `show_batch` all the same"
    x, y = torch.rand(40, 4), torch.arange(40) % 2
    data = Datasets(range(40), [[lambda i: x[i]], [lambda i: y[i]]], splits=[range(32), range(32, 40)])
    learn = Learner(data.dataloaders(bs=8), nn.Linear(4, 2), loss_func=CrossEntropyLossFlat())
    fit(learn.select('loss', frac=0.5), 1)
    assert len(learn.selection.top(5)) == 5 and not plt.get_fignums()


@pytest.mark.parametrize('method', [lambda learn, il: learn.rho_epochs(il, drop=0.2, gate=False),
                                    lambda learn, il: learn.prune_epochs(score='reducible', il=il)])
def test_suspects_by_what_the_epochs_were_pruned_by(method):
    il = torch.rand(72, generator=torch.Generator().manual_seed(0))
    learn = learner()
    method(learn, il)
    record = fit(learn, 1).selection
    assert record.suspects(9).equals(record.suspects(9, il=il))


def test_irreducible_losses_of_a_pruner_added_by_hand_are_made_once(monkeypatch):
    made, make = [], ProbeIL.make
    monkeypatch.setattr(ProbeIL, 'make', lambda self, *args: made.append(self) or make(self, *args))
    learn = fit(learner(cbs=EpochPruner(InfoBatch(score='reducible', il='probe'))), 1)
    learn.dls = loaders(bs=12)
    fit(learn, 1)
    learn.selection.suspects(9)
    assert made == [il_in_force(learn)]


def test_rows_that_were_never_candidates():
    learn = learner()
    record = fit(learn.rho_epochs(torch.arange(72.), drop=0.2, gate=False, by_memory=False), 1).selection
    n = int((record.seen == 0).sum())
    with pytest.raises(ValueError, match=f'at least once. {n} rows were never candidates: .*selection.seen == 0') as e:
        record.never()
    assert n > 0 and 'nothing' not in str(e.value)
    class Stop(Callback):
        order = -100
        def before_batch(self):
            if self.training: raise CancelFitException
    learn = fit(learner(cbs=Stop()).prune_epochs('random'), 1)
    with pytest.raises(ValueError, match='nothing has been trained on yet'): learn.selection.top()


def ledger_of(**columns):
    "A record of three epochs, in which a half of 8 candidates was selected, and these held three quarters of the loss"
    line = dict(epoch=0, loaded=8, scored=8, trained=4, selected=0.5, loss_share=0.75, score_share=0.75,
                top20_share=0.2, correct=0.1, forward='twice', step_cost=1.7,
                seconds=3., seconds_scoring=1., seconds_training=1., seconds_il=0.)
    record = SelectionRecord()
    record.lines = [dict(line, epoch=i, **{name: values[i] for name,values in columns.items()}) for i in range(3)]
    return record

@pytest.mark.parametrize('columns,titles', [
    ({}, ['what the selected hold', 'where the time goes']),
    (dict(trained=[8, 4, 2], selected=[1., 0.5, 0.25], loss_share=[1., 0.8, 0.6]),
     ['items trained on', 'what the selected hold', 'where the time goes']),
    (dict(loaded=[8, 4, 4], trained=[8, 4, 4], scored=[0, 0, 0], selected=[1., 0.5, 0.5], loss_share=[1.]*3,
          score_share=[1.]*3),
     ['rows that the rule chose', 'where the time goes']),
    (dict(loss_share=[np.nan]*3, score_share=[np.nan]*3), ['where the time goes'])],
                         ids=['constant', 'varies', 'rule', 'not looked at'])
def test_plot_draws_what_says_something(columns, titles):
    axs = ledger_of(**columns).plot()
    assert [ax.get_title() for ax in axs] == titles
    plt.close('all')

def test_plot_has_chance_beside_the_loss_and_the_bill_apart():
    held,seconds = ledger_of(seconds_il=[7., 0., 1.]).plot()
    lines = {line.get_label(): line.get_ydata().tolist() for line in held.lines}
    assert lines == {'loss': [0.75]*3, 'by chance': [0.5]*3}
    assert {o.get_text() for o in held.texts} == {'loss', 'by chance'}
    heights = np.array([[bar.get_height() for bar in bars] for bars in seconds.containers])
    assert heights.sum(0).tolist() == [3., 3., 3.] and '8.0 s' in seconds.get_legend().get_title().get_text()
    with pytest.raises(ValueError, match='2 pictures to draw, and axs has 3'): ledger_of().plot(axs=[None]*3)
    plt.close('all')


def test_irreducible_losses_of_every_kind(tmp_path):
    learn = fitted('images', tmp_path)
    il, expected = learn.selector.il, learn.selection.suspects(10)
    for given in (il, il.values, il.values.tolist(), il.save(tmp_path/'il'), str(tmp_path/'il')):
        assert learn.selection.suspects(10, il=given).equals(expected)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    suspects = learn.selection.suspects(96, il=model)
    x, y = learn.dls.train.after_batch(tuple(torch.stack(o)
                                             for o in zip(*map(learn.dls.train.after_item, learn.dls.train_ds))))
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    assert np.allclose(suspects.sort_values('row').il, F.cross_entropy(model(x), y, reduction='none').detach(),
                       atol=1e-4)
    learn.no_selection()
    assert learn.selection.suspects(10, il=il).equals(expected)
    with pytest.raises(ValueError, match='There are no irreducible losses'): learn.selection.suspects(10)
    with pytest.raises(ValueError, match='95 values for a data set of 96'):
        learn.selection.suspects(10, il=il.values[1:])


def test_more_than_there_are(tmp_path):
    learn = fitted('plain', tmp_path)
    seen, selected = learn.selection.seen, learn.selection.selected
    assert len(learn.selection.suspects(1000)) == N
    assert len(learn.selection.top(1000)) == (selected > 0).sum()
    assert len(learn.selection.never(1000)) == ((selected == 0) & (seen > 0)).sum()
    learn.selection.selected.fill_(1)
    with pytest.raises(ValueError, match='every row that was a candidate was selected'): learn.selection.never()


def test_other_selectors(tmp_path):
    learn = plain(tmp_path).batch_loss_filter(0.5)
    fit(learn, 2)
    assert len(learn.selection.top(4)) == 4
    assert len(learn.selection.suspects(4, il=torch.zeros(N))) == 4


def test_what_is_missing(tmp_path):
    learn = plain(tmp_path).rho_loss(torch.zeros(N), frac=0.25, epoch='candidates')
    with pytest.raises(ValueError, match='fit with selection first'): learn.selection.top()
    learn = fitted('plain', tmp_path)
    record = learn.selection
    small = Learner(DataLoaders(*[DataLoader(Rows(8), bs=8)]*2), convolution(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='counts 96 rows, but this Learner'): record.top(learn=small)
    with pytest.raises(TypeError, match='learn must be a Learner'): record.top(learn=learn.model)
    for method in (record.top, record.never, record.suspects, record.plot_il):
        with pytest.raises(ValueError, match='n must be'): method(0)
    assert record.learner is learn
    other = plain(tmp_path)
    learn.remove_cbs(list(learn.cbs))
    del learn
    gc.collect()
    with pytest.raises(ValueError, match='is gone: pass it'): record.top()
    assert len(record.top(3, learn=other)) == 3
    assert deepcopy(record).learner is None and SelectionRecord().learner is None


@pytest.mark.cuda
def test_on_cuda(tmp_path):
    learn = images(tmp_path).rho_loss(torch.rand(N), frac=0.25, epoch='candidates')
    learn.dls.to(torch.device('cuda'))
    fit(learn, 2)
    suspects = learn.selection.suspects(10)
    learn.dls.to(torch.device('cpu'))
    learn.model.cpu()
    loss, _ = losses_and_predictions(learn, 'images')
    assert np.allclose(suspects.loss, loss[suspects.row.tolist()], atol=1e-3)
    assert len(learn.selection.top(4)) == len(learn.selection.never(4)) == 4
