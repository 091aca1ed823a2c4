"""The record: counts by row for one data set at a time, and the ledger's lines."""
from contextlib import suppress
from copy import deepcopy

import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from helpers import examples, fit
from hypothesis import given
from hypothesis import strategies as st
from numbered_rows import BS, VALID, Interrupt, N, Rows, loaders, row_learner

from rholoss_fastai.all import SelectionRecord, prune

SELECT = dict(filter=lambda learn: learn.batch_loss_filter(min_loss_perc=0.5, warmup_epochs=0),
              top=lambda learn: learn.select('loss', 'top', frac=0.5),
              pruner=lambda learn: learn.prune_epochs(delta=1.))


@pytest.mark.parametrize('select', SELECT.values(), ids=SELECT)
@pytest.mark.parametrize('data', [Rows, lambda: list(Rows())], ids=['object', 'list'])
def test_counts_are_of_one_data_set(select, data):
    "Another one of the same length begins at 0; more fits, interrupted ones, and other loaders of the same data go on"
    dataset = data()
    def loaders_of(dataset, bs=BS):
        return DataLoaders(DataLoader(dataset, bs=bs, shuffle=True), DataLoader(VALID, bs=25))
    learn = row_learner(loaders_of(dataset))
    select(learn)
    fit(learn, 2)
    assert learn.selection.seen.sum() == learn.selection.total('loaded') > 0
    with suppress(KeyboardInterrupt): fit(learn, 1, cbs=Interrupt())
    learn.dls = loaders_of(dataset, 16)
    fit(learn, 1)
    loaded, trained = learn.selection.total('loaded'), learn.selection.total('trained')
    assert learn.selection.seen.sum() == loaded and learn.selection.selected.sum() == trained
    learn.dls = loaders_of(data())
    fit(learn, 1)
    assert learn.selection.seen.sum() == learn.selection.total('loaded') - loaded
    assert learn.selection.selected.sum() == learn.selection.total('trained') - trained


def test_a_part_of_a_data_set_counts_by_the_rows_of_the_whole():
    learn = row_learner(loaders())
    SELECT['filter'](learn)
    fit(learn, 1)
    learn.dls = prune(learn.dls, torch.arange(N).float(), 0.5)
    fit(learn, 1)
    assert learn.selection.seen.sum() == N + N//2 and learn.selection.seen.max() == 2


@examples(20)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_a_line_is_that_of_a_loop(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    record, rows_seen, rows_selected = SelectionRecord(), torch.zeros(500), torch.zeros(500)
    record.start_epoch(torch.device('cpu'), n_rows=500)
    totals = dict(loss=0., selected=0., top20=0., score=0., score_selected=0., elements=0)
    for n in sizes:
        losses, scores = torch.rand(n, generator=generator).double(), torch.randn(n, generator=generator).double()
        rows, idxs = torch.randint(0, 500, (n,),
                                   generator=generator), torch.randperm(n, generator=generator)[:max(1, n//3)]
        elements = torch.tensor(n*3)
        record.batch(n, n, len(idxs), rows, rows[idxs], idxs, scores, losses, elements_loaded=n*5,
                     elements_trained=elements)
        rows_seen += rows.bincount(minlength=500)
        rows_selected += rows[idxs].bincount(minlength=500)
        for name, value in dict(loss=losses.sum(), selected=losses[idxs].sum(),
                                top20=losses.sort().values[-((n + 4)//5):].sum(), elements=elements,
                                score=scores.clamp(min=0).sum(),
                                score_selected=scores[idxs].clamp(min=0).sum()).items(): totals[name] += value.item()
    # also of a line under way
    assert torch.equal(record.seen.float(), rows_seen) and torch.equal(record.selected.float(), rows_selected)
    under_way = record.ledger.drop(columns='seconds')
    record.end_epoch()
    line = record.ledger.iloc[0]
    pd.testing.assert_frame_equal(under_way, record.ledger.drop(columns='seconds'))
    assert line.loss_share == pytest.approx(totals['selected']/totals['loss'])
    assert line.top20_share == pytest.approx(totals['top20']/totals['loss'])
    if totals['score']: assert line.score_share == pytest.approx(totals['score_selected']/totals['score'])
    assert line.elements_loaded == sum(sizes)*5 and line.elements_trained == totals['elements']


def test_a_copy_keeps_the_ledger_and_leaves_the_rows():
    learn = SELECT['filter'](row_learner(loaders()))
    fit(learn, 2)
    copied = deepcopy(learn.selection)
    pd.testing.assert_frame_equal(copied.ledger, learn.selection.ledger)
    assert copied.seen is None and copied.learner is None
    assert len(copied.percentiles) == len(learn.selection.percentiles)
