"""What the report says of runs of every kind: right counts, and no advice that can't be followed."""
import time

import pytest
import torch
from helpers import fit
from numbered_rows import N, loaders, row_learner

from rholoss_fastai.all import IrreducibleLosses

KNOBS = ('staleness', 'scale_factor', 'compile')


@pytest.mark.parametrize('bs', [16, 32])
def test_pruned_epochs_count_the_rows_that_were_left_out(bs):
    learn = fit(row_learner(loaders(bs)).prune_epochs(delta=1.), 4)
    report = learn.selection.report()
    assert report.table.at_hand.tolist() == [N]*4
    assert report.table.trained.sum() == learn.selection.total('trained') < 4*N
    assert f'{report.table.trained.sum():,} of {4*N:,} items at hand' in str(report)
    assert not any(o in str(report) for o in KNOBS)
    assert 'candidate' not in str(report) and 'irreducible' not in str(report)
    assert report.seconds_all > report.seconds_as_many


@pytest.mark.parametrize('epoch', ['steps', 'cost'])
def test_rounds_save_nothing(epoch):
    "As many steps as plain training has, each on what was chosen last; what is spent on the way is billed once"
    learn = row_learner(loaders()).rho_epochs(torch.rand(N), drop=0.1, gate=False, epoch=epoch, refresh=True)
    began = time.perf_counter()
    ledger, report = fit(learn, 4).selection.ledger, learn.selection.report()
    assert ledger.seconds_il.sum() > 0 and (ledger.seconds + ledger.seconds_il).sum() < time.perf_counter() - began
    assert report.table.at_hand.max() <= N + 32 and 'Rows were chosen anew for each round' in str(report)
    assert 'brings back' not in str(report) and 'saved' not in str(report)
    learn.rho_epochs(torch.rand(N), drop=0.1, gate=False, epoch='rows')
    assert 'items at hand' in str(fit(learn, 2).selection.report())


def test_where_nothing_was_left_out_nothing_is_advised():
    for learn in (row_learner(loaders()).batch_loss_filter(warmup_epochs=2),
                  row_learner(loaders()).select('loss', 'top', frac=1.)):
        report = fit(learn, 2).selection.report()
        assert report.left_out == 0 and 'Nothing was left out' in str(report)
        assert not any(o in str(report) for o in (*KNOBS, 'plain_seconds', 'saved'))


def test_the_seconds_of_a_selector_are_those_of_its_ledger():
    learn = fit(row_learner(loaders()).rho_loss(torch.rand(N), frac=0.25), 2)
    ledger, report = learn.selection.ledger, learn.selection.report()
    assert report.table.at_hand.tolist() == ledger.loaded.tolist()
    loading = (ledger.seconds - ledger.seconds_scoring - ledger.seconds_training).clip(lower=0)
    everything = (ledger.seconds_training/ledger.trained*ledger.loaded + loading).sum()
    assert report.seconds_all == pytest.approx(everything)
    assert report.saved == pytest.approx(everything - ledger.seconds.sum())
    share, selected = (ledger.score_share*ledger.loaded).sum()/ledger.loaded.sum(), ledger.trained.sum(
        )/ledger.loaded.sum()
    assert f'The {selected:.0%} of the candidates that were selected hold {share:.0%} of the score' in str(report)
    ledger_il = learn.selection.lines[0]['seconds_il'] = 5.
    assert f'The irreducible losses cost {ledger_il:.1f} s' in str(learn.selection.report())


def test_the_quality_of_the_irreducible_losses_is_told_where_it_is_known():
    learn = row_learner(loaders())
    il = IrreducibleLosses.of(torch.rand(N), learn.dls.train, accuracy=0.81, chance=0.34, seconds=2.5)
    report = fit(learn.rho_loss(il, frac=0.25), 1).selection.report()
    assert report.seconds_il == 2.5 and 'right for 81% of the rows, by chance 34% would be' in str(report)
