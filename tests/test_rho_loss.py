"""RHO-LOSS with everything else that a fit may have in it."""
import re
import time
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (patches to_fp16)
from fastai.callback.hook import ActivationStats  # noqa: F401  (patches summary)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from helpers import Toy, fit, learner, loaders, on_cuda, weights_of
from numbered_rows import Rows, image_learner, rows_of
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rholoss_fastai.all import (
    SCORES,
    Companion,
    ImportanceSample,
    RhoLossCallback,
    Uniform,
    fit_irreducible,
    irreducible_losses,
    learner_precision,
    probe_irreducible,
    small_cnn,
)
from rholoss_fastai.il_source import AutoIL, MadeIL
from rholoss_fastai.loaders import restrict_rows

N, BS, FRAC = 120, 8, 0.25


def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(64, 3))


conv_learner = partial(image_learner, model=model, n=N, bs=BS)


def il_values(n=N): return torch.rand(n, generator=torch.Generator().manual_seed(9))


class Interrupt(Callback):
    "The user's ctrl-C in the third batch"
    order = 45
    def after_loss(self):
        if self.training and self.iter == 2: raise KeyboardInterrupt


class Batches(Callback):
    "Rows that each training step was given, before and after selection"
    order = -4
    def before_fit(self): self.rows = []
    def before_batch(self):
        if self.training: self.rows.append(rows_of(self.x))


class Algorithm1(Callback):
    "The rows that the paper's algorithm 1 would take, computed with another model and NumPy"
    order = -6
    def __init__(self, il): self.il = il.numpy()
    def before_fit(self): self.candidates, self.rows = [], []
    def before_batch(self):
        if not self.training: return
        rows, net = rows_of(self.x), model()
        net.load_state_dict(self.model.state_dict())
        with torch.no_grad(): loss = F.cross_entropy(net.eval()(self.x), self.y, reduction='none').numpy()
        self.candidates.append(rows)
        self.rows.append(rows[np.sort(np.argsort(loss - self.il[rows.numpy()])[-BS:])])


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('drop_last', [True, False])
def test_choice_equals_an_independent_one(num_workers, drop_last):
    n = 230
    learn = conv_learner(num_workers=num_workers, drop_last=drop_last,
                         n=n).rho_loss(il_values(n), frac=FRAC, epoch='candidates')
    expected, selected = Algorithm1(il_values(n)), Batches()
    fit(learn, 3, cbs=[expected, selected])
    assert len(selected.rows) == 3*(n//32 + (not drop_last))
    for got, wanted in zip(selected.rows, expected.rows): assert torch.equal(got, wanted)
    assert torch.equal(learn.selection.selected.long(), torch.bincount(torch.cat(selected.rows), minlength=n))
    assert torch.equal(learn.selection.seen.long(), torch.bincount(torch.cat(expected.candidates), minlength=n))


COMPANIONS = dict(
    nothing=lambda: [], mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()],
    accumulation=lambda: [GradientAccumulation(2*BS)],
    clip=lambda: [GradientClip(0.1)], save=lambda: [SaveModelCallback(monitor='selected', fname='best')],
    csv=lambda: [CSVLogger()],
    nan=lambda: [TerminateOnNaNCallback()])


@pytest.mark.parametrize('name', COMPANIONS)
def test_beside_other_callbacks(name, tmp_path):
    "From the first batch, twice in a row, after an interrupted fit, and each in the order of selection before mixing"
    learn = conv_learner(tmp_path).rho_loss(il_values(), frac=FRAC, epoch='candidates')
    epoch_steps = N // (BS*4)
    for _ in range(2):
        selected = Batches()
        fit(learn, 1, cbs=[*COMPANIONS[name](), selected])
        assert [len(o) for o in selected.rows] == [BS]*epoch_steps
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[*COMPANIONS[name](), Interrupt()])
    fit(learn, 2, method='fit_one_cycle', cbs=COMPANIONS[name]())
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    assert [o for o in learn.recorder.metric_names if o != 'time'] == ['epoch', 'train_loss', 'valid_loss',
                                                                       'accuracy', 'selected']
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert learn.dls.bs == BS
    ledger = learn.selection.ledger
    assert ledger.trained.tolist() == [BS*epoch_steps]*2 + [BS*3] + [BS*epoch_steps]*2 # interrupted in the third batch
    assert (ledger.selected == FRAC).all()
    assert torch.isfinite(torch.cat([p.flatten() for p in learn.model.parameters()])).all()
    if name == 'csv':
        header = (tmp_path/'history.csv').read_text().splitlines()[0].split(',')
        assert header[:5] == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'selected']
    if name == 'save': assert (tmp_path/'models'/'best.pth').exists()


def test_mixup_mixes_what_was_selected():
    class Mixed(Callback):
        order = 1
        def before_fit(self): self.sizes = []
        def before_batch(self):
            if self.training: self.sizes.append((len(self.x), len(self.learn.mix_up.lam)))
    learn, mixed = conv_learner().rho_loss(il_values(), frac=FRAC, epoch='candidates'), Mixed()
    fit(learn, 1, cbs=[MixUp(), mixed])
    assert mixed.sizes == [(BS, BS)]*(N//(4*BS))


def test_gradients_are_of_the_selected_items_alone():
    "The first step's gradient equals autograd's over the selected items"
    class FirstGradient(Callback):
        order = 44
        def before_fit(self): self.gradient = None
        def after_backward(self):
            if self.gradient is None:
                self.gradient, self.batch = [p.grad.clone() for p in self.model.parameters()], (self.x, self.y)
    def no_dropout(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    learn = conv_learner()
    learn.model = no_dropout()
    start = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.rho_loss(il_values(), frac=FRAC, epoch='candidates')
    first = FirstGradient()
    fit(learn, 1, cbs=first)
    net = no_dropout()
    net.load_state_dict(start)
    F.cross_entropy(net(first.batch[0]), first.batch[1]).backward()
    for got, parameter in zip(first.gradient, net.parameters()): torch.testing.assert_close(got, parameter.grad)


def test_lr_find_never_selects_and_never_cross_fits(tmp_path, capsys):
    learn = conv_learner(tmp_path).rho_loss('crossfit', frac=FRAC, epoch='candidates')
    selected = Batches()
    with learn.no_logging(), learn.no_mbar(): learn.add_cb(selected).lr_find(num_it=12, show_plot=False)
    assert {len(o) for o in selected.rows} == {BS}
    assert learn.selector.il is None and 'cross-fitting' not in capsys.readouterr().out
    assert len(learn.selection.ledger) == 0
    learn.fit(1)
    assert 'cross-fitting' in capsys.readouterr().out
    assert learn.selection.ledger.seconds_il[0] > 0


def test_only_a_fit_cross_fits_or_checks_the_data(tmp_path):
    "`summary`, `tta` and `with learn:` fire before_fit too"
    learn = conv_learner(tmp_path).rho_loss('crossfit', frac=FRAC, epoch='candidates')
    learn.freeze()
    with learn.no_mbar():
        learn.summary()
        with learn: learn.get_preds(inner=True)
    assert learn.selector.il is None and list(learn.metrics.attrgot('name')) == ['accuracy']


@pytest.mark.parametrize('again', [lambda learn: learn, lambda learn: learn.rho_loss(gate=False)], ids=['fit', 'type'])
def test_of_another_data_set_they_are_made_anew_and_billed(again):
    "Those made for the Learner's first data set; the same rows under other transforms keep theirs"
    learn = learner().rho_loss(gate=False, il_budget=99.)
    fit(learn, 1)
    first = learn.selector.il
    learn.dls = loaders(bs=12)
    fit(learn, 1)
    assert learn.selector.il is first
    learn.dls = loaders(train=Toy(60, 5))
    fit(again(learn), 8) # which the default budget allows
    assert torch.equal(learn.selector.il.values, probe_irreducible(learn, progress=False, verbose=False).values)
    assert len(learn.selector.il) == 60 and learn.selection.ledger.seconds_il.iloc[-8] > 0


def test_the_data_are_looked_at_once_a_loader(monkeypatch):
    looks, belonging = [], MadeIL.belonging
    monkeypatch.setattr(MadeIL, 'belonging', lambda self, dl: looks.append(dl) or belonging(self, dl))
    learn = learner().rho_loss('probe', gate=False)
    first = learn.dls
    for dls in (first, first, loaders(bs=12)):
        learn.dls = dls
        fit(learn, 1)
    assert looks == [first.train, dls.train]


@pytest.mark.parametrize('method', ['rho_loss', 'rho_epochs'])
def test_of_another_loss_function_they_are_made_anew(method):
    "A copy of it is the same, and so is one that notes what it has seen"
    class Notes(CrossEntropyLossFlat):
        def __call__(self, *args):
            self.seen = super().__call__(*args).detach()
            return super().__call__(*args)
    smoothed = CrossEntropyLossFlat(label_smoothing=0.2)
    learn = getattr(learner(loss_func=Notes()), method)(gate=False, il_budget=99.)
    def table(): return learn.selector.il if method == 'rho_loss' else learn.epoch_pruner.rule.table
    fit(learn, 1)
    first = table()
    fit(learn, 1)
    assert table() is first
    learn.loss_func = deepcopy(learn.loss_func)
    fit(learn, 1)
    assert table() is first
    learn.loss_func = smoothed
    fit(learn, 1)
    fresh = probe_irreducible(learner(loss_func=smoothed), progress=False, verbose=False)
    torch.testing.assert_close(table().values, fresh.values)
    assert not torch.equal(first.values, fresh.values) and learn.selection.ledger.seconds_il.iloc[-1] > 0


def test_cross_fitted_by_the_loss_function_of_the_fit():
    "Which may be another than when it was typed"
    learns = [learner(loss_func=o).rho_loss('crossfit', il_epochs=1) for o in (None, FocalLossFlat())]
    learns[0].loss_func = FocalLossFlat()
    one, other = (fit(learn, 1).selector.il.values for learn in learns)
    assert torch.equal(one, other)


def test_of_rows_that_were_left_out_they_are_made_too():
    learn = learner()
    whole = learn.dls
    learn.dls = DataLoaders(restrict_rows(whole.train, range(40)), whole.valid)
    fit(learn.rho_loss(gate=False, il_budget=99.), 1)
    assert learn.selector.il.values.isnan().sum() == 32
    learn.dls = whole
    fit(learn, 1)
    assert learn.selector.il.values.isfinite().all()


def test_pixels_of_small_images_are_cross_fitted():
    "Though the images have features, these don't predict pixels"
    x = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    items = list(zip(x, (x[:,0] > 0.5).long()))
    dls = DataLoaders.from_dsets(items, items[:8], bs=8, num_workers=0, device='cpu')
    learn = learner(dls, lambda: nn.Conv2d(3, 2, 1), CrossEntropyLossFlat(axis=1)).rho_loss(il_budget=99., frac=0.5)
    fit(learn, 1)
    assert learn.selection.ledger.selected.tolist() == [0.5] and learn.selector.il.info['n_folds'] == 2


def test_a_share_that_is_a_tensor():
    one,other = (fit(learner().rho_loss(torch.arange(72.), frac=o), 1).selection for o in (torch.tensor(0.25), 0.25))
    assert torch.equal(one.selected, other.selected)


@pytest.mark.parametrize('undo', ['no_selection', 'replace', 'temporary'])
def test_nothing_stays_behind_after_an_interrupted_fit(undo):
    learn = conv_learner()
    if undo == 'temporary':
        with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[RhoLossCallback(il_values(), frac=FRAC), Interrupt()])
    else:
        learn.rho_loss(il_values(), frac=FRAC, epoch='candidates')
        with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[MixUp(), Interrupt()])
        assert learn.selection.ledger.trained.tolist() == [3*BS] # what was cut short was paid for
        learn.no_selection() if undo == 'no_selection' else learn.rho_loss(frac=0.5, epoch='candidates')
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    fit(learn, 1, cbs=MixUp())
    assert list(learn.metrics.attrgot('name')) == ['accuracy']


def test_data_changed_in_the_midst_of_a_fit_is_noticed():
    class Change(Callback):
        def before_epoch(self):
            if self.epoch == 1: self.learn.dls = conv_learner(n=100).dls
    with pytest.raises(ValueError, match='100'):
        fit(conv_learner().rho_loss(il_values(), frac=FRAC, epoch='candidates'), 2, cbs=Change())


def test_no_last_batch_of_one_item():
    "108 rows in candidate batches of 107 would leave one, which batch norm can't take"
    learn = conv_learner(drop_last=False, n=108)
    learn.dls.train.bs = 32
    fit(learn.rho_loss(il_values(108), frac=0.3, epoch='candidates'), 1)
    assert learn.selection.ledger.loaded.tolist() == [108]


def test_deepcopy_keeps_irreducible_losses():
    learn = fit(conv_learner().rho_loss(il_values(), frac=FRAC, epoch='candidates'), 1)
    copied = deepcopy(learn)
    copied.logger = learn.logger
    fit(copied, 1)
    assert len(copied.selection.ledger) == 2 and len(learn.selection.ledger) == 1


def test_loaders_that_cannot_be_enlarged():
    dataset = Rows(N)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(dataset), BS, True)
    learn = conv_learner()
    learn.dls = DataLoaders(torch.utils.data.DataLoader(dataset, batch_sampler=sampler),
                            torch.utils.data.DataLoader(Rows(48), batch_size=48))
    with pytest.raises(ValueError, match='enlarge=False'):
        fit(learn.rho_loss(il_values(), frac=FRAC, epoch='candidates'), 1)
    learn.no_selection()
    fit(learn.rho_loss(il_values(), frac=FRAC, enlarge=False), 1)
    assert learn.selection.ledger.trained.tolist() == [2*N//BS]


def test_an_interrupted_lr_find_leaves_selection_on(tmp_path):
    learn = conv_learner(tmp_path).rho_loss(il_values(), frac=FRAC, epoch='candidates')
    with pytest.raises(KeyboardInterrupt), learn.added_cbs(Interrupt()), learn.no_logging(), learn.no_mbar():
        learn.lr_find(show_plot=False)
    fit(learn, 1)
    assert learn.selection.ledger.selected.tolist() == [FRAC]


def test_validate_and_get_preds_never_select():
    plain, learn = conv_learner(), conv_learner().rho_loss(il_values(), frac=FRAC, epoch='candidates')
    learn.model.load_state_dict(plain.model.state_dict())
    for o in (plain, learn): o.create_opt()
    with plain.no_mbar(), learn.no_mbar():
        assert learn.validate() == plain.validate()
        for ds_idx in (0, 1):
            for got, expected in zip(learn.get_preds(ds_idx=ds_idx), plain.get_preds(ds_idx=ds_idx)):
                assert got.shape == expected.shape
    assert len(learn.selection.ledger) == 0

    class ValidateWithin(Callback):
        "A callback that validates in the midst of a fit must not end selection"
        order = 90
        def after_train(self):
            self.learn.validate()
            self.learn.training = True
    fit(learn, 2, cbs=ValidateWithin())
    assert learn.selection.ledger.selected.tolist() == [FRAC]*2


def test_fine_tune_warms_up_once():
    learn = conv_learner(splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())]).rho_loss(
        il_values(), frac=FRAC, warmup_epochs=1, epoch='candidates')
    fit(learn, 2, method='fine_tune')
    assert learn.selection.ledger.selected.tolist() == [1, FRAC, FRAC]


def test_start_epoch():
    learn = conv_learner().rho_loss(il_values(), frac=FRAC, warmup_epochs=2, epoch='candidates')
    fit(learn, 4, start_epoch=2) # a run that goes on in a new process: its two warm-up epochs are over
    assert learn.selection.ledger.selected.tolist() == [FRAC]*2


def test_export_and_load(tmp_path):
    learn = fit(conv_learner(tmp_path).rho_loss(il_values(), frac=FRAC, epoch='candidates'), 1)
    learn.export('a.pkl')
    assert learn.selector.il is not None # the Learner itself keeps them
    fit(learn, 1)
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size < 60_000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'a.pkl')
    loaded.logger = lambda *_: None
    dl = DataLoader(Rows(48), bs=48)
    with learn.no_mbar(), loaded.no_mbar(): assert torch.equal(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])
    loaded.dls = learn.dls
    with pytest.raises(ValueError, match='not exported'): fit(loaded, 1)
    fit(loaded.rho_loss(il_values(), frac=FRAC, epoch='candidates'), 1)


def test_bf16_scores_choose_nearly_the_same():
    chosen = []
    for precision in (None, torch.float32, torch.bfloat16):
        learn, selected = conv_learner().rho_loss(il_values(), frac=FRAC, precision=precision,
                                                  epoch='candidates'), Batches()
        fit(learn, 1, cbs=selected)
        chosen.append(selected.rows[0])
    assert torch.equal(chosen[0], chosen[1])
    assert len(set(chosen[0].tolist()) & set(chosen[2].tolist())) >= BS-1


def test_an_outer_autocast_keeps_its_gradients():
    "Weights cast under no_grad must not be reused by the training forward"
    learn = conv_learner().rho_loss(il_values(), frac=FRAC, epoch='candidates')
    before = [p.clone() for p in learn.model.parameters()]
    with torch.autocast('cpu', dtype=torch.bfloat16): fit(learn, 1)
    assert all((a != b).any() for a, b in zip(before, learn.model.parameters()))


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('fails', ['model', 'loss', 'score'])
def test_no_trace_when_scoring_raises(mode, fails):
    class Fragile(nn.Module):
        def __init__(self): super().__init__(); self.net = model()
        def forward(self, x):
            out = self.net(x)
            if fails == 'model': raise RuntimeError('broken')
            return out
    def loss_func(pred, targ, reduction='mean'):
        if fails == 'loss': raise RuntimeError('broken')
        return F.cross_entropy(pred, targ, reduction=reduction)
    def score(loss, il):
        if fails == 'score': raise RuntimeError('broken')
        return loss - il
    class State(Callback):
        order = -6
        def before_batch(self): self.before = trace(self.learn)
    def trace(learn):
        return [*[b.clone() for b in learn.model.buffers()], torch.get_rng_state(),
                torch.tensor([m.training for m in learn.model.modules()])]
    learn, state = conv_learner(), State()
    learn.model, learn.loss_func = Fragile(), loss_func
    learn.rho_loss(il_values(), frac=FRAC, mode=mode, score=score, epoch='candidates')
    learn.add_cb(state)
    with pytest.raises((RuntimeError, ValueError), match='broken'): fit(learn, 1)
    for got, expected in zip(trace(learn), state.before): assert torch.equal(got, expected)
    assert all(p.grad is None for p in learn.model.parameters())


def test_frac_1_is_plain_fastai():
    def weights(select):
        learn = select(conv_learner())
        fit(learn, 2)
        return [*learn.model.state_dict().values(), torch.get_rng_state()]
    plain = weights(lambda learn: learn)
    for select in (lambda learn: learn.rho_loss(il_values(), frac=1, epoch='candidates'),
                   lambda learn: learn.rho_loss(pick=Uniform(1.), epoch='candidates'),
                   lambda learn: learn.rho_loss(il_values(), frac=1, enlarge=False)):
        for got, expected in zip(weights(select), plain): assert torch.equal(got, expected)


def test_cross_fitting_restores_the_random_state_and_leaves_the_learner_alone():
    class First(Callback):
        order = 55
        def before_train(self):
            self.seen = [*[v.clone() for v in self.model.state_dict().values()], torch.get_rng_state()]
    firsts = []
    for select in (lambda learn: learn.rho_loss(il_values(), frac=FRAC, epoch='candidates'),
                   lambda learn: learn.rho_loss(frac=FRAC, il_epochs=1, epoch='candidates')):
        first = First()
        fit(select(conv_learner()), 1, cbs=first)
        firsts.append(first.seen)
    for a, b in zip(*firsts): assert torch.equal(a, b)


def test_irreducible_losses_cost_is_booked_once(tmp_path):
    first = fit(conv_learner().rho_loss(frac=FRAC, il_epochs=1, epoch='candidates'), 2)
    il = first.selector.il
    assert first.selection.ledger.seconds_il.tolist() == [il.info['seconds'], 0]
    second = fit(conv_learner(seed=1).rho_loss(il, frac=FRAC, epoch='candidates'), 1)
    assert second.selection.ledger.seconds_il.tolist() == [0]
    again = fit(first.rho_loss(frac=0.5, epoch='candidates'), 1) # a second call keeps the irreducible losses
    assert again.selector.il is il
    assert again.selection.ledger.selected.tolist() == [0.5]


def test_a_model_of_irreducible_losses_is_asked_for_as_few_at_a_time():
    sizes = []
    class Model(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x.flatten(1))
    fit(conv_learner().rho_loss(Model(36, 3), frac=0.5, score_bs=3), 1)
    assert max(sizes) == 3


def test_a_second_call_says_what_changes():
    "What isn't said stays; what is, also where it is the default, takes the place of what there was"
    learn = conv_learner().rho_loss(il_epochs=1)
    crossfit = learn.selector.il_source
    assert learn.rho_loss(frac=0.25).selector.il_source is crossfit
    assert learn.rho_loss(il_epochs=2, il_folds=3).selector.il_source.settings == dict(n_epoch=2, lr=None, n_folds=3,
                                                                                       seed=0)
    auto = learn.rho_loss('auto').selector.il_source
    assert isinstance(auto, AutoIL) and auto.budget == 0.2
    assert learn.rho_loss(il_budget=0.7).selector.il_source is auto and auto.budget == 0.7
    assert learn.rho_loss().selector.il_source is auto and auto.budget == 0.7
    with pytest.raises(ValueError, match='il_budget must lie'): learn.rho_loss(il_budget=0)
    table = conv_learner().rho_loss(il_values())
    assert isinstance(table.rho_loss('auto').selector.il_source, AutoIL)
    with pytest.raises(ValueError, match='^il_epochs is about cross-fitting, but il=probe'):
        learn.rho_loss('probe', il_epochs=3)


def test_who_asks_for_irreducible_losses_hears_that_nothing_looks_at_them():
    with pytest.warns(UserWarning, match='they change nothing'): conv_learner().select(il='auto')
    with pytest.warns(UserWarning, match='they change nothing'): conv_learner().rho_loss('auto', score='loss')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        conv_learner().rho_loss(score='loss')


@pytest.mark.slow
def test_a_small_cnn_serves_a_resnet_and_two_more_targets(tmp_path):
    """Irreducible losses are fitted once, by a smaller model on other rows, whatever is trained with them, and however
    often"""
    class Images(Rows):
        def __init__(self, start):
            super().__init__(48)
            self.pixels = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(start))
        def __getitem__(self, i): return self.pixels[i], super().__getitem__(i)[1]
    def dls(start): return DataLoaders(DataLoader(Images(start), bs=BS, shuffle=True), DataLoader(Images(start), bs=48))
    def learner_of(arch, start=0): return Learner(dls(start), arch, loss_func=CrossEntropyLossFlat())
    il = fit_irreducible(learner_of(small_cnn(3), start=1), learner_of(small_cnn(3)).dls.train, 1, progress=False)
    booked = []
    from torchvision.models import resnet18  # which brings the compiler, for seconds
    for seed, arch in enumerate((partial(resnet18, num_classes=3), partial(small_cnn, 3), partial(small_cnn, 3))):
        set_seed(seed)
        learn = fit(learner_of(arch()).rho_loss(il, frac=FRAC, epoch='candidates'), 1)
        booked.append(learn.selection.ledger.seconds_il.sum())
        assert learn.selector.il is il
    assert booked == [il.info['seconds'], 0, 0]
    il.save(tmp_path/'il.safetensors')
    again = fit(learner_of(small_cnn(3)).rho_loss(tmp_path/'il.safetensors', frac=FRAC, epoch='candidates'), 1)
    assert again.selection.ledger.seconds_il.sum() == 0


def test_update_il_needs_an_optimiser_of_its_own():
    "A ready-made one holds the target's parameters: stepping it for the IL model would train the target"
    learn = conv_learner()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match='update_il=True needs an optimiser'):
        fit(learn.rho_loss(model(), update_il=True, frac=FRAC, epoch='candidates'), 1)


def test_a_proxy_is_trained_with_weights_and_measured_without_a_trace():
    """With importance sampling the proxy's gradient is weighted as the target's; comparing it with the target writes
    no running statistics"""
    proxy, steps = conv_learner(seed=1), []
    learn = conv_learner().rho_loss(il_values(), pick=ImportanceSample(FRAC), score='loss', proxy=proxy)
    class Updates(Callback):
        "Once a selected batch is trained on, the proxy's batch norm has seen one batch more, and nothing else"
        order = 60
        def after_batch(self):
            if self.training:
                steps.append((proxy.model[1].num_batches_tracked.item(), self.learn.selector._fit.weights.clone()))
    fit(learn, 1, cbs=Updates())
    assert [n for n, _ in steps] == list(range(1, len(steps) + 1)) and any((w != 1).any() for _, w in steps)


@pytest.mark.parametrize('make', [lambda learn, other: learn.select(frac=FRAC, proxy=other),
                                  lambda learn, other: learn.rho_loss(other, frac=FRAC, update_il=True)],
                         ids=['proxy', 'il'])
def test_a_model_beside_keeps_its_modes(make):
    other = conv_learner(seed=1)
    other.model.eval()[4].train()
    modes, before = [m.training for m in other.model.modules()], weights_of(other)
    fit(make(conv_learner(), other), 1)
    assert [m.training for m in other.model.modules()] == modes and not torch.equal(weights_of(other), before)


def test_weights_of_a_companion():
    "Its gradient is that of the weighted mean of item losses"
    other = conv_learner()
    x, y, weights = Rows().images[:5], Rows().targets[:5], torch.tensor([0., 1., 2., 3., 4.])
    companion = Companion(other, torch.device('cpu'))
    before = deepcopy(companion.model).train()
    for module in (before, companion.model): module[4].p = 0.
    companion.opt, seen = type('Opt', (), dict(step=lambda self: None, zero_grad=lambda self: None))(), None
    companion.step((x,), (y,), weights=weights)
    (F.cross_entropy(before(x), y, reduction='none')*weights).mean().backward()
    seen = [p.grad for p in companion.model.parameters()]
    for got, p in zip(seen, before.parameters()): assert torch.allclose(got, p.grad, atol=1e-6)


def test_a_score_asked_for_is_the_score():
    "Whatever else is given: the training loss with irreducible losses at hand, as the baseline of the paper"
    il, batches = il_values()*10, {}
    for name in ('loss', 'reducible'):
        learn = conv_learner().rho_loss(il, score=name, frac=FRAC, epoch='candidates')
        assert learn.selector.score is SCORES[name]
        assert learn.selector.inputs == (('loss',) if name == 'loss' else ('loss', 'il'))
        batches[name] = fit(learn, 1).selection.selected
    assert not torch.equal(*batches.values())


def test_bad_input(tmp_path):
    il = irreducible_losses(conv_learner(), conv_learner().dls.train, progress=False)
    class Other(Rows):
        def __init__(self): super().__init__(N); self.images, self.targets = self.images.flip(0), self.targets.flip(0)
    other = conv_learner()
    other.dls = DataLoaders(DataLoader(Other(), bs=BS, shuffle=True), DataLoader(Other(), bs=48))
    with pytest.raises(ValueError, match='[Tt]arget|[Ii]tem|order'): other.rho_loss(il)
    il.save(tmp_path/'il.safetensors')
    with pytest.raises(ValueError): other.rho_loss(tmp_path/'il.safetensors')
    with pytest.raises(FileNotFoundError): conv_learner().rho_loss(tmp_path/'none.safetensors')
    whole = (tmp_path/'il.safetensors').read_bytes()
    for broken in (whole[:-5], whole[:20], b'', b'something else altogether'):
        (tmp_path/'broken.safetensors').write_bytes(broken)
        with pytest.raises(ValueError, match='broken.safetensors'):
            conv_learner().rho_loss(tmp_path/'broken.safetensors')

    def stream():
        yield from ((torch.randn(1, 6, 6), 0) for _ in range(64))
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return stream()
        def __len__(self): return 64
    unknown = conv_learner()
    unknown.dls = DataLoaders(DataLoader(Stream(), bs=BS), DataLoader(Rows(48), bs=48))
    with pytest.raises(ValueError, match='on the fly'): unknown.rho_loss(il_values(64))

    class WrongShape(nn.Module):
        def __init__(self): super().__init__(); self.net = model()
        def forward(self, x): return self.net(x)[:-1]
    wrong = conv_learner()
    wrong.model = WrongShape()
    with pytest.raises(ValueError, match='number of items'):
        fit(wrong.rho_loss(il_values(), frac=FRAC, epoch='candidates'), 1)

    coupled = conv_learner()
    coupled.loss_func = lambda pred, targ: pred.std(0).sum() if len(pred) > 1 else pred[:, :2]
    with pytest.raises(ValueError, match='item'): fit(coupled.rho_loss(il_values(), frac=FRAC, epoch='candidates'), 1)


def test_nan_scores(recwarn):
    values = il_values()
    class NaNModel(nn.Module):
        def __init__(self): super().__init__(); self.net = model()
        def forward(self, x): return self.net(x)*float('nan')
    learn = conv_learner()
    learn.model = NaNModel()
    fit(learn.rho_loss(values, frac=FRAC, epoch='candidates'), 1)
    assert learn.selection.ledger.trained.tolist() == [BS*(N//(4*BS))]
    assert any('every score was NaN' in str(o.message) for o in recwarn)
    stopped = conv_learner()
    stopped.model = NaNModel()
    fit(stopped.rho_loss(values, frac=FRAC, epoch='candidates'), 3, cbs=TerminateOnNaNCallback())
    assert stopped.selection.ledger.trained.tolist() == [BS]


def test_never_one_item_with_batch_norm():
    learn = conv_learner(drop_last=False)
    learn.dls.train.bs = 4
    learn.rho_loss(il_values(), frac=0.05, enlarge=False)
    fit(learn, 1)
    assert learn.selection.ledger.trained.tolist() == [2*N//4]


def test_schedule_of_the_fraction():
    learn = fit(conv_learner().rho_loss(il_values(), frac=SchedCos(1., 0.1), epoch='candidates'), 5)
    selected = learn.selection.ledger.selected.tolist()
    assert selected[0] == 1 and all(a > b for a, b in zip(selected, selected[1:]))


def test_learner_as_irreducible_model_is_neither_trained_nor_registered():
    learn_il = conv_learner(seed=5)
    weights = [v.clone() for v in learn_il.model.state_dict().values()]
    learn = conv_learner().rho_loss(learn_il.model.train(), frac=FRAC, epoch='candidates')
    n_parameters = len(list(learn.model.parameters()))
    fit(learn, 1)
    assert learn_il.model.training and all(p.grad is None for p in learn_il.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, learn_il.model.state_dict().values()))
    assert len(list(learn.model.parameters())) == n_parameters


def test_every_event_of_the_selectors_exists():
    from fastai.callback.core import event

    from rholoss_fastai.all import BatchSelector
    names = [o for o in dir(BatchSelector) if o.startswith(('before_', 'after_'))]
    assert names and all(hasattr(event, o) for o in names)


@pytest.mark.cuda
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
def test_mixed_precision(half):
    learn = on_cuda(conv_learner()).rho_loss(il_values(), frac=FRAC, epoch='candidates')
    getattr(learn, half)()
    fit(learn, 2)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Interrupt())
    fit(learn, 1)
    assert (learn.selection.ledger.selected == FRAC).all()
    assert learner_precision(learn, torch.device('cuda')) == (torch.float16 if half == 'to_fp16' else torch.bfloat16)


@pytest.mark.cuda
def test_no_host_sync():
    class NoSync(Callback):
        "CUDA raises at a synchronising call between the batch's arrival and its training forward"
        order = -6
        def before_batch(self):
            if self.training and self.iter > 0: torch.cuda.set_sync_debug_mode('error')
        def after_batch(self): torch.cuda.set_sync_debug_mode('default')
    class Resume(Callback):
        order = -4
        def before_batch(self): torch.cuda.set_sync_debug_mode('default')
    learn = on_cuda(conv_learner()).rho_loss(il_values(), frac=FRAC, epoch='candidates')
    fit(learn, 2, cbs=[NoSync(), Resume()])


@pytest.mark.cuda
@pytest.mark.parametrize('settings', [{}, dict(score='gradient_norm'), dict(score='bald'), dict(on_the_fly=True),
                                      dict(compile=True),
                                      dict(score_bs=8)], ids=str)
def test_nothing_is_copied_to_the_host(settings):
    "By a profiler's trace, from a batch's arrival to its training forward"
    class Enter(Callback):
        order = -6
        def before_batch(self):
            self.span = record_function('selection')
            if self.training and self.iter > 0: self.span.__enter__()
    class Leave(Callback):
        order = 99
        def before_batch(self):
            if self.training and self.iter > 0: self.enter.span.__exit__(None, None, None)
    settings = dict(settings)
    il = model().cuda() if settings.pop('on_the_fly', False) else il_values()
    # compiled, and checked
    learn = fit(on_cuda(conv_learner()).rho_loss(il, frac=FRAC, **settings, epoch='candidates'), 1)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        fit(learn, 1, cbs=[Enter(), Leave()])
    spans = [e.time_range for e in trace.events() if e.name == 'selection' and e.device_type == DeviceType.CPU]
    inside = [e for e in trace.events() if e.device_type == DeviceType.CPU
              and any(o.start <= e.time_range.start <= o.end for o in spans)]
    launched = [kernel.name for e in inside for kernel in e.kernels]
    assert len(spans) > 1 and launched and not [name for name in launched if 'DtoH' in name]


def test_the_score_follows_the_kind_of_irreducible_losses(tmp_path):
    """A probe's differences say little, its probabilities much; a model's losses are subtracted, as published. However
    they are given"""
    from rholoss_fastai.all import IrreducibleLosses, probe_irreducible, reducible_loss, worth_learning
    learn = conv_learner()
    features = torch.randn(len(learn.dls.train.dataset), 4, generator=torch.Generator().manual_seed(0))
    probe = probe_irreducible(learn, features=features, progress=False, verbose=False)
    probe.save(tmp_path/'il.safetensors')
    for il in (probe, tmp_path/'il.safetensors', str(tmp_path/'il.safetensors'), 'probe', 'auto'):
        assert learn.rho_loss(il).selector.score is worth_learning, il
    other = IrreducibleLosses.of(probe.values, learn.dls.train)
    for il in (other, probe.values, conv_learner().model): assert learn.rho_loss(il).selector.score is reducible_loss
    assert learn.rho_loss(probe, score='reducible').selector.score is reducible_loss


def test_what_cannot_be_learnt_is_not_chosen(tmp_path):
    """Rows of highest irreducible loss, as many as labels look wrong, of no class more than half; the score wants them
    least, the ledger still tells them"""
    from rholoss_fastai.all import IrreducibleLosses, il_source, worth_learning
    from rholoss_fastai.candidates import Candidates
    from rholoss_fastai.side_models import score_rows
    dl,n = conv_learner().dls.train,len(conv_learner().dls.train.dataset)
    labels = torch.tensor([int(dl.dataset[i][-1]) for i in range(n)])
    il = torch.rand(n, generator=torch.Generator().manual_seed(1))
    il[labels == 0] += 5 # a class that is hard for all
    for wrong,share in ((0.23, 0.2), (0.02, 0), (None, 0)):
        table = IrreducibleLosses.of(il, dl, model='ridge', **({} if wrong is None else dict(wrong=wrong)))
        source = il_source(table)
        source.begin(conv_learner(), torch.device('cpu'))
        found = source.hopeless(Candidates((labels,), (), torch.arange(n)))
        left_out = sorted(range(n), key=lambda i: -il[i])[:round(share*n)]
        for c in range(2): # the lowest of a class come back until half of it stays
            own = [i for i in left_out if labels[i] == c]
            left_out = [i for i in left_out if i not in own[int((labels == c).sum())//2:]]
        assert found.nonzero().flatten().tolist() == sorted(left_out)
        rows = torch.arange(0, n, 2)
        assert torch.equal(source.hopeless(Candidates((labels[rows],), (), rows)), found[rows])
    learn = conv_learner()
    table = IrreducibleLosses.of(il, learn.dls.train, model='ridge', wrong=0.23)
    learn.rho_loss(table, frac=0.5, score=worth_learning)
    fit(learn, 2)
    chosen = learn.selection.selected.bool()
    source = il_source(table); source.begin(learn, torch.device('cpu'))
    assert not (chosen & source.hopeless(Candidates((labels,), (), torch.arange(n)))).any() and chosen.any()
    for bad in (lambda: score_rows(learn, learn.dls.train, worth_learning, il),
                lambda: learn.prune_epochs(score='worth_learning', il=table)):
        with pytest.raises(ValueError, match='only a selector knows'): bad()
    with pytest.raises(ValueError, match='needs irreducible losses'):
        conv_learner().select(lambda hopeless: hopeless.float())


def digits(noise, n=1400):
    from sklearn.datasets import load_digits

    from rholoss_fastai.all import redraw_labels
    x,y = (torch.tensor(o) for o in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8)/16
    labels,_ = redraw_labels(y, noise)
    items = [list(zip(x[rows], labels[rows])) for rows in (slice(n), slice(n, None))]
    return DataLoaders.from_dsets(*items, bs=32, num_workers=0, device='cpu')


def digits_learner(noise):
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    learn = Learner(digits(noise), net, loss_func=CrossEntropyLossFlat(), lr=3e-3)
    learn.remove_cb(learn.progress)
    return learn


@pytest.mark.slow
def test_where_hardly_any_label_looks_wrong_it_trains_plainly(capsys):
    """Bit for bit, billed, and said before the first step; of another data set it selects again, and by request it
    always does"""
    plain,gated = digits_learner(0.),digits_learner(0.).rho_loss(il_budget=99.)
    for learn in (plain, gated):
        set_seed(1)
        learn.fit(2)
    for a,b in zip(plain.model.parameters(), gated.model.parameters()): assert torch.equal(a, b)
    ledger = gated.selection.ledger
    assert ledger.scored.sum() == 0 and ledger.selected.tolist() == [1, 1] and ledger.seconds_il.sum() > 0
    said = capsys.readouterr().out
    assert 'trains plainly, as without it (gate=False selects all the same)' in said and 'candidates' not in said
    il = gated.selector.il
    gated.dls = digits(0.3)
    gated.rho_loss('probe').fit(1)
    assert gated.selection.ledger.selected.tolist() == [0.5] and gated.selector.il.info['wrong'] > 0.2
    for kwargs in (dict(gate=False), dict(score='learnable')):
        learn = digits_learner(0.).rho_loss(il, **kwargs)
        learn.fit(1)
        assert learn.selection.ledger.selected.tolist() == [0.5], kwargs
    learn = digits_learner(0.).rho_loss(pick=Uniform(0.5), epoch='candidates') # needs no irreducible losses
    learn.fit(1)
    assert learn.selector.il is None and learn.selection.ledger.selected.tolist() == [0.5]
    learn = digits_learner(0.).rho_loss(il) # a table knows how many labels look wrong
    learn.fit(1)
    assert learn.selection.ledger.selected.tolist() == [1.]


def test_an_epoch_without_batches_is_named_by_default_too():
    learn = learner(dls=DataLoaders(DataLoader(Toy(20), bs=24, drop_last=True), DataLoader(Toy(24), bs=24)))
    with pytest.raises(ValueError, match='no batches: .* drop_last=False'): fit(learn.rho_loss(), 1)
    learn.dls = DataLoaders(DataLoader(Toy(20), bs=24, drop_last=False), DataLoader(Toy(24), bs=24))
    fit(learn, 1)


def test_where_they_cost_more_than_they_may_it_trains_plainly(capsys):
    "As in the frozen epoch of a fine_tune, bit for bit, and says so; in a longer fit it selects"
    plain,dear = digits_learner(0.3),digits_learner(0.3).rho_loss()
    for learn in (plain, dear):
        set_seed(1)
        learn.fit(1)
    for a,b in zip(plain.model.parameters(), dear.model.parameters()): assert torch.equal(a, b)
    assert dear.selector.il is None and dear.selection.ledger.selected.tolist() == [1.]
    said = capsys.readouterr().out
    budget = re.search(r'more than il_budget=20%: trains plainly, as without it.*il_budget=([\d.]+)\)', said)[1]
    learn = digits_learner(0.3).rho_loss(il_budget=float(budget))
    learn.fit(1)
    class Stop(Callback): # one epoch of the forty tells
        def after_epoch(self): raise CancelFitException
    dear.fit(40, cbs=Stop())
    for o in (learn, dear): assert o.selector.il is not None and o.selection.ledger.selected.iloc[-1] == 0.5
    with pytest.raises(ValueError, match='more than il_budget'): digits_learner(0.3).rho_loss(score='reducible').fit(1)


def rows_read(monkeypatch):
    "How many images were compared with patches, where a look takes 400 rows; eight tell how many features there are"
    from rholoss_fastai import beside, features
    read,forward = [],features.RandomPatches.forward
    def counted(self, x):
        read.append(len(x))
        return forward(self, x)
    monkeypatch.setattr(beside, 'rows_to_look_at', lambda n, n_epoch, most: 400)
    monkeypatch.setattr(features.RandomPatches, 'forward', counted)
    return read


@pytest.mark.parametrize('il', ['probe', 'auto'])
@pytest.mark.parametrize('noise,made', [(0., False), (0.3, True)])
@pytest.mark.many(3)
def test_the_gate_looks_at_a_few_rows_first(monkeypatch, il, noise, made):
    "Which are not read again, where all are; the next fit's model has other features, and what was read goes"
    read = rows_read(monkeypatch)
    learn = digits_learner(noise).rho_loss(il, il_budget=99.)
    learn.fit(1)
    source,n = learn.selector.il_source,len(learn.dls.train.dataset)
    assert sum(read) == 8 + (n if made else 400)
    assert (source.table is not None) is made and learn.selector.off is not made
    assert learn.selection.ledger.selected.tolist() == [0.5 if made else 1.]
    assert getattr(source, 'made_by', source)._probe is None
    learn.fit(1)
    assert sum(read) == (8 + n if made else 2*(8 + 400))


class OwnProbe(MadeIL):
    by_probe = True
    def make(self, learn, progress): return probe_irreducible(learn, progress=False, verbose=False)

class Numbers(MadeIL):
    def make(self, learn, progress): return torch.rand(len(learn.dls.train_ds))


@pytest.mark.parametrize('source', [OwnProbe, Numbers])
def test_a_source_of_ones_own_needs_make_alone(monkeypatch, source):
    from rholoss_fastai import beside
    monkeypatch.setattr(beside, 'rows_to_look_at', lambda n, n_epoch, most: 400)
    learn = fit(digits_learner(0.3).rho_loss(source()), 1)
    assert learn.selection.ledger.selected.tolist() == [0.5] and learn.selection.ledger.seconds_il.tolist()[0] > 0


@pytest.mark.parametrize('noise', [0., 0.3])
@pytest.mark.parametrize('il', ['probe', 'auto'])
@pytest.mark.many(3)
def test_all_that_the_gate_spends_is_billed_once(monkeypatch, il, noise):
    "A look, an estimate, a table: by a clock that counts the rows that are read"
    read = rows_read(monkeypatch)
    learn = digits_learner(noise).rho_loss(il, il_budget=99.)
    monkeypatch.setattr(time, 'perf_counter', lambda: float(sum(read)))
    fit(learn, 1)
    assert learn.selection.ledger.seconds_il.tolist() == [8 + (400 if noise == 0 else len(learn.dls.train.dataset))]


def test_the_gate_bills_nothing_for_a_table_that_is_paid():
    "Else `compare` would take it for one that was made in the run"
    il = fit(digits_learner(0.3).rho_loss('probe'), 1).selector.il
    learn = fit(digits_learner(0.3).rho_loss(il), 1)
    assert learn.selection.ledger.seconds_il.tolist() == [0] and learn.selection.ledger.selected.tolist() == [0.5]
