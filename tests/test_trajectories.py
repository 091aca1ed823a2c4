"""LossHistory: readings against lists, what is noted against forwards of its own, and its use by `prune` and as an
epoch rule."""
import math

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.learner import load_learner
from fastai.losses import MSELossFlat
from helpers import examples, fit
from hypothesis import given
from hypothesis import strategies as st
from numbered_rows import Rows
from test_epoch_rules import BS, N, Watch, dataloaders, epoch_learner
from test_rho_epochs import NOISE, noisy_learner
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import (
    IES,
    ByHistory,
    DatasetScores,
    InfoBatch,
    LossHistory,
    RandomSubset,
    alignment,
    first_learnt,
    forgetting_events,
    label_margins,
    loss_variance,
    mean_margin,
    prune,
)

value = st.one_of(st.floats(-5, 5, width=16), st.just(float('nan')))


@examples(80)
@given(st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(value, min_size=k, max_size=k), min_size=1, max_size=12)),
       st.integers(0, 99))
def test_readings_against_lists(rows, seed):
    "Each row's trajectory alone, with lists"
    table,k = torch.tensor(rows).T,len(rows[0])
    reference = torch.rand(k, generator=torch.Generator().manual_seed(seed))
    aum, variance, first, forgotten, aligned = mean_margin(table), loss_variance(table), first_learnt(
        table), forgetting_events(table), alignment(table, reference)
    for i,row in enumerate(rows):
        known = [o for o in row if not math.isnan(o)]
        if not known:
            assert all(o[i].isnan() for o in (aum, variance, first, forgotten, aligned))
            continue
        assert abs(aum[i] - np.mean(known)) < 1e-3 and abs(variance[i] - np.var(known)) < 1e-2
        assert first[i] == next((e for e,o in enumerate(row) if o > 0), k)
        right = [o > 0 for o in known]
        assert forgotten[i] == (sum(a and not b for a,b in zip(right, right[1:])) if any(right) else k)
        if len(known) < 2: assert aligned[i].isnan()
        elif np.std(known) > 0.05:
            other = [reference[e].item() for e,o in enumerate(row) if not math.isnan(o)]
            if np.std(other) > 0.02: assert abs(aligned[i] - np.corrcoef(known, other)[0, 1]) < 1e-2


def test_what_is_noted():
    class Margins(Callback):
        order = 20
        def before_fit(self): self.kept = []
        def before_train(self): self.kept.append(torch.full((N,), torch.nan))
        def after_loss(self):
            if not self.training: return
            from numbered_rows import rows_of
            pred = self.pred.detach()
            self.kept[-1][rows_of(self.x)] = torch.stack([p[y] - max(o for c,o in enumerate(p) if c != y) for p,
                                                          y in zip(pred, self.y)])
    history, watch, margins = LossHistory(k=3), Watch(), Margins()
    learn = fit(epoch_learner().prune_epochs(delta=1.), 5, cbs=[history, watch, margins])
    assert history.losses.shape == history.margins.shape == (3, N) and history.kept[0].dtype == torch.float16
    for e in range(3):
        seen = torch.full((N,), torch.nan)
        seen[torch.cat(watch.rows[e + 2])] = torch.cat(watch.losses[e + 2])
        assert torch.allclose(history.losses[e], seen, atol=2e-3, rtol=2e-3, equal_nan=True)
        assert torch.allclose(history.margins[e], margins.kept[e + 2], atol=4e-3, rtol=4e-3, equal_nan=True)
    assert np.allclose(history.valid, [o[1] for o in learn.recorder.values[-3:]], atol=1e-5)


def test_scores_prune_and_suspects(tmp_path):
    history = LossHistory()
    learn = noisy_learner(cbs=history, path=tmp_path)
    fit(learn, 5)
    table = history.scores('aum')
    assert isinstance(table, DatasetScores)
    assert NOISE[prune(learn.dls, table, 0.7).train.dataset.row_numbers].float().mean() < 0.5*NOISE.float().mean()
    suspects = history.suspects(30)
    assert len(suspects) == 30 and NOISE[suspects.row.tolist()].float().mean() > 0.7
    assert suspects.aum.is_monotonic_increasing
    for reading in ('variance', 'first_learnt', 'forgetting', 'alignment'):
        assert history.scores(reading).values.isfinite().all()
    assert torch.equal(history.read(lambda losses: losses.amax(0)), history.losses.amax(0))
    with pytest.raises(ValueError, match="Did you mean 'variance'"): history.read('varience')
    learn.export('learner.pkl')
    assert load_learner(tmp_path/'learner.pkl').loss_history.kept == []
    n = len(history.kept)
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=3, show_plot=False)
    assert len(history.kept) == n


def test_a_reading_is_a_rules_score():
    history = LossHistory()
    learn = noisy_learner(cbs=history).prune_epochs(ByHistory(history, 'aum', InfoBatch(0.8, 1., weighted=False)))
    fit(learn, 8)
    times = learn.selection.selected.float()
    assert learn.selection.ledger.trained.iloc[:2].tolist() == [N]*2 and times[NOISE].mean() < 0.8*times[~NOISE].mean()
    for rule,last in ((IES(), 5), (RandomSubset(), 0)):
        with pytest.raises(ValueError, match=f'goes by {last}: use a rule that goes by the last loss alone'):
            ByHistory(history, 'aum', rule)
    with pytest.raises(ValueError, match='must be a callback of this Learner'):
        fit(noisy_learner().prune_epochs(ByHistory(history)), 1)


def test_memory_is_said_in_advance():
    lines = []
    learn = epoch_learner(cbs=LossHistory(k=4))
    with learn.no_bar():
        learn.logger = lambda o: lines.append(o) if isinstance(o, str) else None
        learn.fit(6)
    assert lines[0] == 'LossHistory: 200 rows x 4 epochs x 4 bytes = 0.0032 MB'
    history = learn.loss_history
    assert sum(o.nbytes for o in history.kept) == 4*4*N


def test_regression_selection_and_refusals():
    rows = Rows(N)
    rows.targets = rows.targets.float()
    history = LossHistory()
    fit(epoch_learner(dataloaders(rows), nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), loss_func=MSELossFlat(),
                      cbs=history), 2)
    assert history.margins.isnan().all() and history.scores('variance').values.isfinite().all()
    with pytest.raises(ValueError, match="needs margins"): history.scores('aum')
    selected = LossHistory()
    # what a selector has narrowed
    learn = fit(epoch_learner(cbs=selected).select(pick='uniform', frac=0.5, enlarge=False), 2)
    assert (~selected.losses.isnan()).sum() == learn.selection.total('trained')
    with pytest.raises(ValueError, match='makes one item of two'): fit(epoch_learner(cbs=[LossHistory(), MixUp()]), 1)
    with pytest.raises(ValueError, match='Nothing was trained yet'): LossHistory().scores()
    with pytest.raises(ValueError, match='were never scored'):
        fit(epoch_learner(cbs=history), 0) and selected.scores('variance')


def test_margins():
    pred, targ = torch.randn(20, 5), torch.randint(0, 5, (20,))
    expected = [p[t] - max(o for c,o in enumerate(p) if c != t) for p,t in zip(pred, targ)]
    for t in (targ, targ[:, None], targ.int()): assert torch.allclose(label_margins(pred, t), torch.stack(expected))
    ignored = targ.index_fill(0, torch.tensor([3]), -100)
    assert label_margins(pred, ignored).isnan().nonzero().flatten().tolist() == [3]
    assert label_margins(pred, F.one_hot(targ, 5).float()) is None and label_margins(pred, targ, targ) is None and BS
