"""`rho_epochs`: the rule against lists, the gate, what is billed, and that wrong labels are left out."""
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import set_seed
from helpers import examples, fit, learner
from hypothesis import given
from hypothesis import strategies as st
from numbered_rows import Rows, rows_of
from test_epoch_rules import BS, STEPS, N, Watch, dataloaders, epoch_learner, linear
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import (
    EpochInfo,
    IrreducibleLosses,
    Reducible,
    RhoEpochs,
    is_log_loss,
    label_probability,
    probe_predictions,
)
from rholoss_fastai.learnable import learnable_rows

NOISE = torch.rand(N, generator=torch.Generator().manual_seed(5)) < 0.3


def noisy_rows(n=N):
    "Three classes that the pixels' mean tells, of which some are labelled wrong"
    rows = Rows(n)
    rows.images = rows.images/3 + 2*rows.targets[:, None, None, None]
    rows.images[:, 0, 0, 0] = torch.arange(n)/1024
    rows.clean = rows.targets.clone()
    rows.targets = torch.where(NOISE[:n], (rows.targets + 1) % 3, rows.targets)
    return rows


def features(x): return torch.cat([x.flatten(1), F.one_hot(x.mean((1, 2, 3)).round().long().clamp(0, 8), 9).float()], 1)
def noisy_learner(rows=None, **kwargs): return epoch_learner(dataloaders(rows or noisy_rows()), **kwargs)
def clean_learner(): rows = noisy_rows(); rows.targets = rows.clean; return noisy_learner(rows)


numbers = st.one_of(st.floats(0, 6, width=32), st.sampled_from([0., 1., 2.]))


@examples(80)
@given(st.lists(st.tuples(numbers, st.one_of(st.floats(0, 1, width=32), st.just(float('nan'))), st.integers(0, 2)),
                min_size=2, max_size=50),
       st.floats(0, 0.9), st.floats(0.05, 0.8), st.floats(0, 0.2))
def test_the_rule_against_lists(items, drop, keep, explore):
    il, p_last, classes = zip(*items)
    n,rows = len(items),torch.arange(len(items))*2
    rule = Reducible(None, drop, keep, explore)
    rule.table = torch.full((2*n,), 99.).index_copy_(0, rows, torch.tensor(il))
    chosen = rule(torch.tensor(p_last)[:, None], EpochInfo(rows, classes=torch.tensor(classes)),
                  torch.Generator().manual_seed(0))
    assert len(chosen.unique()) == len(chosen) and set(chosen.tolist()) <= set(rows.tolist())
    # what is left out: the highest il, of no class more than half; ties at the edge may go either way
    edge = sorted(il, reverse=True)[:round(drop*n)]
    surely_left = [i for i in range(n) if not edge or il[i] < edge[-1]]
    pool = learnable_rows(torch.tensor(il), drop, torch.tensor(classes), torch.Generator().manual_seed(0)).tolist()
    assert set(surely_left) <= set(pool)
    for c in set(classes):
        own = [i for i in range(n) if classes[i] == c]
        gone = [i for i in own if i not in pool]
        assert len(gone) <= len(own)//2
        assert all(il[i] >= max((il[j] for j in own if j in pool), default=0) for i in gone)
    wanted = {i: np.exp(-il[i])*(1 - (0 if np.isnan(p_last[i]) else p_last[i])) for i in pool}
    n_best,n_more = max(1, round(keep*len(pool))),round(explore*len(pool))
    taken = [i for i in pool if 2*i in set(chosen.tolist())]
    assert len(taken) == len(chosen) == min(len(pool), n_best + n_more)
    others = []
    for c in {classes[i] for i in pool}: # of each class half of its share in any case
        own = sorted((wanted[i] for i in pool if classes[i] == c), reverse=True)
        least = int(0.5*keep*len(own) + 1e-9)
        others += own[least:]
        assert sum(classes[i] == c for i in taken) >= least
    n_others = n_best - (len(pool) - len(others))
    bar = sorted(others, reverse=True)[n_others - 1] if n_others else float('inf')
    assert {i for i in pool if wanted[i] > bar + 1e-6} <= set(taken)


def test_probability_of_the_label():
    pred, targ = torch.randn(9, 4), torch.randint(0, 4, (9,))
    loss = F.cross_entropy(pred, targ, reduction='none')
    for t in (targ, targ[:, None], targ.int()):
        assert torch.allclose(label_probability(5*loss, pred, t), (-loss).exp(), atol=1e-6)
    assert torch.allclose(label_probability(loss, pred, torch.rand(9, 4)), (-loss).exp()) # several labels, or numbers
    assert torch.allclose(label_probability(loss, pred, torch.rand(9), scale=2.), (-loss/2).exp())
    assert is_log_loss(CrossEntropyLossFlat()) and is_log_loss(BCEWithLogitsLossFlat()) and is_log_loss(nn.NLLLoss())
    assert is_log_loss(F.cross_entropy)
    assert not is_log_loss(MSELossFlat()) and not is_log_loss(nn.L1Loss()) and not is_log_loss(lambda pred, targ: 0)


def test_wrong_labels_are_left_out_and_all_is_billed():
    learn,watch = noisy_learner().rho_epochs(features=features),Watch()
    fit(learn, 6, method='fit_one_cycle', cbs=watch)
    rule,times = learn.epoch_pruner.rule,learn.selection.selected.float()
    assert 0.2 < rule.wrong < 0.4 and not rule.plain and rule.by_memory and rule.will_refresh and rule._refreshed
    assert rule.table.info['averaged_with'] and rule.table.info['features'] == 'body'
    assert times[NOISE].mean() < 0.5*times[~NOISE].mean()
    assert [len(o) for o in watch.rows] == [STEPS]*6 # as many steps as plain training
    ledger = learn.selection.ledger
    # the second: the refresh
    assert ledger.seconds_il.iloc[0] > 0 and (ledger.seconds_il > 0).sum() == 2 and ledger.scored.sum() == 0
    assert learn.recorder.lrs[-1] < 5e-5 and len(learn.recorder.lrs) == 6*STEPS
    rows = fit(noisy_learner().rho_epochs(features=features, epoch='rows'), 3).selection.ledger
    assert rows.trained.max() < 0.8*N # fewer steps
    alone = fit(noisy_learner().rho_epochs(features=features, by_memory=False, epoch='rows'), 3)
    assert alone.selection.ledger.trained.nunique() == 1 and set(alone.selection.selected.unique().tolist()) == {0, 3}


def test_clean_labels_are_trained_on_plainly():
    def weights(prepare):
        set_seed(0) # of the loaders' order, too
        learn = fit(prepare(clean_learner()), 3)
        return learn,torch.cat([o.flatten() for o in learn.model.state_dict().values()])
    plain = weights(lambda o: o)[1]
    for epoch in ('steps', 'rows'):
        learn,gated = weights(lambda o: o.rho_epochs(features=features, epoch=epoch))
        rule = learn.epoch_pruner.rule
        assert rule.plain and rule.wrong < 0.05 and torch.equal(gated, plain) # bit for bit
    assert not torch.equal(weights(lambda o: o.rho_epochs(features=features, gate=False))[1], plain)


def said(learn, n_epoch):
    lines = []
    with learn.no_bar():
        learn.logger = lambda o: lines.append(o) if isinstance(o, str) else None
        learn.fit(n_epoch)
    return lines[0]


def test_shares_beside_their_limits():
    "What is refused for a limit doesn't read as if it were equal to it"
    rule = RhoEpochs()
    rule.plain,rule.share = True,0.2001
    assert 'would cost 21% of this fit, more than il_budget=20%' in rule.says(None)
    rule.wrong = 0.0499
    assert 'about 4% of the labels look wrong, fewer than 5%' in rule.says(None)


def test_where_the_targets_leave_nothing_to_tell():
    "Other features would be refused again, so they aren't named; what is named works"
    def pixels(n): rows = Rows(n); rows.targets = (rows.images[:, 0] > 0).long(); return DataLoader(rows, bs=BS)
    def learn(): return epoch_learner(DataLoaders(pixels(N), pixels(30)), lambda: nn.Conv2d(1, 2, 3, padding=1),
                                      loss_func=CrossEntropyLossFlat(axis=1))
    with pytest.raises(ValueError, match="il='crossfit', drop=... and gate=False") as e:
        fit(learn().rho_epochs(il_budget=99.), 1)
    assert 'features' not in str(e.value)
    fit(learn().rho_epochs(il='crossfit', drop=0.2, gate=False, il_budget=99.), 1)


def test_how_cross_fitted_losses_are_kept(capsys, tmp_path):
    "What is printed can be typed, and what it saves is taken"
    learn = noisy_learner().rho_epochs('crossfit', drop=0.2, gate=False)
    with learn.no_bar(): learn.fit(1)
    call = capsys.readouterr().out.split('Keep them with ')[1].split('(path)')[0]
    path = eval(call, dict(learn=learn))(tmp_path/'il')
    fit(noisy_learner().rho_epochs(path, drop=0.2, gate=False), 1)


def test_the_first_line():
    assert 'trains plainly' in said(clean_learner().rho_epochs(features=features), 1)
    line = said(noisy_learner().rho_epochs(features=features), 4)
    for part in ('labels look wrong', 'leaves out the', 'best 60%', 'irreducible losses took', 'anew once at a quarter',
                 f'{STEPS} steps per epoch, as in plain training'):
        assert part in line
    assert line.startswith('rho_epochs: about')


@pytest.mark.parametrize('bad', [dict(gate='no'), dict(look=0), dict(look='all')], ids=str)
def test_settings_that_say_nothing_are_refused(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))): learner().rho_epochs(**bad)

def test_settings_follow_the_length_of_the_fit():
    learn = noisy_learner().rho_epochs(features=features)
    learn.pretrained = True # as `vision_learner` notes it
    for n_epoch,by_memory in ((2, False), (8, True)): # a fine-tune of few epochs leaves out and does not choose
        fit(learn, n_epoch)
        assert learn.epoch_pruner.rule.by_memory == by_memory and not learn.epoch_pruner.rule.will_refresh
    seconds = learn.selection.ledger.seconds_il
    assert (seconds > 0.02).sum() <= 1 # made once, for both fits


def test_given_irreducible_losses():
    il = torch.where(NOISE, 5., 0.1)
    learn = fit(noisy_learner().rho_epochs(il, features=features), 3)
    assert torch.equal(learn.epoch_pruner.rule.table.values, il) and learn.selection.selected[NOISE].float().mean() < 1
    learn = fit(noisy_learner().rho_epochs(il, drop=0.25, gate=False), 3) # nothing is to be estimated
    assert learn.epoch_pruner.rule.wrong is None and learn.epoch_pruner.rule.drop == 0.25
    learn = fit(noisy_learner().prune_epochs('reducible', il=il, drop=0.2), 3)
    assert learn.selection.selected[NOISE].float().mean() < 0.5*learn.selection.selected[~NOISE].float().mean()
    with pytest.raises(ValueError, match='needs irreducible losses.*rho_epochs'):
        fit(noisy_learner().prune_epochs('reducible'), 1)
    with pytest.raises(ValueError, match='7 values for a data set of 200'): noisy_learner().rho_epochs(torch.rand(7))
    with pytest.raises(ValueError, match='more than the whole'): noisy_learner().rho_epochs(keep=0.9, explore=0.3)
    with pytest.raises(TypeError): noisy_learner().rho_epochs(share=0.3)


def test_no_class_starves():
    rows = noisy_rows()
    rows.targets[:6],rows.targets[6:] = 2,rows.targets[6:] % 2
    il = torch.rand(N)
    il[:6] = 9. # the smallest class has the highest irreducible losses of all
    learn = fit(noisy_learner(rows).rho_epochs(il, drop=0.2, gate=False, explore=0.4), 4)
    assert (learn.selection.selected[:6] > 0).sum() >= 3


def test_numbers_and_several_labels():
    "Regression and multi-label targets have a form of their own"
    few = NOISE & (torch.arange(N) % 3 == 0)
    for loss_func,targets,n_out,noise,options in ((MSELossFlat(), lambda rows: rows.clean.float()
                                                   + torch.where(few, 8., 0.), 1, few, {}),
                                                (BCEWithLogitsLossFlat(),
                                                 lambda rows: F.one_hot(rows.targets, 3).float(), 3, NOISE,
                                                 dict(gate=False, drop=0.2))):
        rows = noisy_rows()
        rows.targets = targets(rows)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, n_out))
        dls = dataloaders(rows)
        dls.loaders = [dls.train, dls.train] # the other has classes
        learn = fit(epoch_learner(dls, model, loss_func=loss_func).rho_epochs(features=features, **options), 3)
        rule,times = learn.epoch_pruner.rule,learn.selection.selected.float()
        assert not rule.plain and times[noise].mean() < 0.7*times[~noise].mean()
        assert learn.epoch_pruner.remembered.nan_to_num(0.).max() <= 1


def test_export_and_start_epoch(tmp_path):
    learn = noisy_learner(path=tmp_path).rho_epochs(features=features)
    fit(learn, 2)
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    loaded.dls = learn.dls
    fit(loaded, 3, start_epoch=1) # judged anew, and only the epochs that are left
    assert loaded.epoch_pruner.rule.table is not None and len(loaded.selection.ledger) == 2 + 2


def test_the_estimate():
    found = probe_predictions(noisy_learner(), features=features, verbose=False)
    assert abs(found.wrong - NOISE.float().mean()) < 0.08
    assert probe_predictions(clean_learner(), features=features, verbose=False).wrong < 0.05


def test_remembering_costs_no_pass():
    "p_last comes from the training forward itself"
    class Expect(Callback):
        order = 20
        def before_fit(self): self.seen = torch.full((N,), torch.nan)
        def after_loss(self):
            if self.training:
                self.seen[rows_of(self.x)] = self.pred.detach().softmax(1).gather(1, self.y[:, None])[:, 0]
    expect,calls = Expect(),[]
    model = linear()
    model.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    learn = noisy_learner(model=model).rho_epochs(torch.rand(N), drop=0.1, gate=False, refresh=False)
    fit(learn, 3, cbs=expect)
    assert torch.allclose(learn.epoch_pruner.remembered, expect.seen, atol=1e-6, equal_nan=True)
    assert sum(o == BS for o in calls) == 3*STEPS and isinstance(learn.epoch_pruner.rule.table, IrreducibleLosses)


def test_irreducible_losses_that_are_too_dear_for_the_fit():
    """The README's promise: never worse for somebody who has read nothing; a fit that is too short trains plainly, and
    a longer one does not"""
    learn = noisy_learner().rho_epochs(features=features, il_budget=1e-4, gate=False)
    line = said(learn, 1)
    assert 'of this fit, more than il_budget=0%: trains plainly' in line and 'il=' in line
    allowed = float(line.split('allow for it (il_budget=')[1].split(')')[0])
    assert 'leaves out' in said(noisy_learner().rho_epochs(features=features, il_budget=allowed, gate=False), 1)
    assert learn.selection.total('scored') == 0 and learn.selection.seconds_il < 1
    assert learn.epoch_pruner.rule.table is None
    # at hand
    assert 'leaves out' in said(noisy_learner().rho_epochs(features=features, il_budget=1e-4, gate=False,
                                                           il=torch.rand(N), drop=0.1), 1)
    rule = learn.epoch_pruner.rule
    rule.il_budget = rule.share*0.6 # dear for one epoch, not for two
    assert 'trains plainly' in said(learn, 1)
    assert 'leaves out' in said(learn, 2)
    with pytest.raises(ValueError, match='il_budget'): noisy_learner().rho_epochs(il_budget=0)


def test_too_dear_is_plain_training_bit_for_bit():
    def weights(method):
        set_seed(0)
        learn = method(noisy_learner())
        fit(learn, 2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(weights(lambda o: o.rho_epochs(features=features, il_budget=1e-4)), weights(lambda o: o))


def test_a_look_reads_rows_that_are_not_read_again(monkeypatch):
    "Both are billed, the rest as what it is"
    from rholoss_fastai import rho_epochs
    from rholoss_fastai.probe import Probe
    n_look,seen = N//2,[]
    def counting(x):
        seen.append(len(x))
        return features(x)
    monkeypatch.setattr(rho_epochs, 'rows_to_look_at', lambda n, n_epoch, most: n_look)
    learn = noisy_learner().rho_epochs(features=counting, il_budget=99.)
    rule,steps = learn.epoch_pruner.rule,3*len(learn.dls.train)
    fit(learn, 3)
    assert sum(seen) == N + 8 # eight tell how many features there are
    probe = Probe(noisy_learner(), features=features)
    look = probe.cost(n_look).steps
    wrong = probe.predictions(n_look, progress=False, verbose=False).wrong
    assert rule.share == pytest.approx((look + probe.cost().steps)/steps) and wrong > rule.threshold
    assert rule.own_cost == pytest.approx(min(0.9, rule.share))
    assert rule.wrong == pytest.approx(probe.predictions(progress=False, verbose=False).wrong, abs=1e-6)


def test_an_epoch_of_the_same_cost_is_shorter_by_what_the_probe_takes():
    """Images whose probe costs a known share of the fit, by counts: that many steps fewer, and where they are at hand
    none"""
    from rholoss_fastai.probe import probe_cost
    learn = noisy_learner().rho_epochs(features=features, gate=False, il_budget=10.)
    n = len(learn.dls.train)
    share = probe_cost(noisy_learner(), features=features).steps/(3*n)
    class Dear(type(learn.epoch_pruner.rule)):
        def begin(self, learn, dl):
            res = super().begin(learn, dl)
            assert self.own_cost == pytest.approx(share)
            self.own_cost = 0.4
            return res
    rule = learn.epoch_pruner.rule
    rule.__class__ = Dear
    assert f'{round(0.6*n)} steps per epoch, {n - round(0.6*n)} fewer' in said(learn, 3)
    steps = []
    class Count(Callback):
        def after_step(self): steps.append(1)
    rule.__class__ = Dear.__mro__[1]
    fit(learn, 2, cbs=[Count()]) # the first fit has paid
    assert rule.own_cost == 0 and len(steps) == 2*n
    # of those that are given a look at the labels, here at all of them
    learn = fit(noisy_learner().rho_epochs(torch.rand(N), features=features, threshold=0., refresh=False), 3)
    assert learn.epoch_pruner.rule.own_cost == pytest.approx(share)


def test_a_fine_tune_without_frozen_epochs():
    "Its first fit is of no epochs"
    learn = noisy_learner().rho_epochs(il_budget=99.)
    fit(learn, 2, method='fine_tune', freeze_epochs=0)
    assert len(learn.selection.ledger) == 2 and not learn.epoch_pruner.rule.plain
