"""Scores of a data set: against float64 loops, tables of what a model knew when, kills, and real loaders with
workers."""
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import (
    CSVLogger,
    ShowGraphCallback,  # noqa: F401 (patches `no_bar`)
)
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches `lr_find`)
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import SGD, Adam
from fasttransform import Transform
from helpers import fit, learner
from numbered_rows import Rows
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import WeightedRandomSampler

from rholoss_fastai.all import (
    DatasetScores,
    ForgettingTracker,
    IrreducibleLosses,
    dataset_scores,
    el2n,
    grand,
    restrict_rows,
    score_dataset,
    score_rows,
)

quiet = dict(progress=False)


def dataset_learner(dataset, model, loss_func=None, bs=16, **kwargs):
    dls = DataLoaders(DataLoader(dataset, bs=bs, shuffle=True), DataLoader(dataset, bs=bs), device='cpu')
    return learner(dls, model, loss_func, **{**dict(seed=None, opt_func=Adam, lr=1e-3), **kwargs})


def normed(learn, score, dl=None, **kwargs): return score(learn, dl or learn.dls.train, **quiet, **kwargs).values


# GraNd against a loop in float64

class Tied(nn.Module):
    "The same weights twice"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6, 6),nn.Linear(6, 3)
    def forward(self, x): return self.b(self.a(torch.tanh(self.a(x.flatten(1)[:, :6]))))


class Branches(nn.Module):
    "Control flow that depends on values, which `vmap` refuses"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(36, 3),nn.Linear(36, 3)
    def forward(self, x):
        x = x.flatten(1)
        return self.a(x) if x.sum() > 0 else self.b(x)


class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.rnn,self.head = nn.LSTM(6, 5, batch_first=True),nn.Linear(5, 3)
    def forward(self, x): return self.head(self.rnn(x[:, 0])[0][:, -1])


class Output(nn.Module):
    "A dictionary with logits, from two inputs of which one is a dictionary"
    def __init__(self): super().__init__(); self.head = nn.Linear(72, 3)
    def forward(self, x):
        return dict(logits=self.head(torch.cat([x['left'].flatten(1), x['right'].flatten(1)], 1)), hidden=x['left'])


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Dropout(0.5),
                         nn.Linear(36, 3))


def mean_absolute(pred, targ):
    return sum(abs(a.item()*0 + (b - c).abs().mean()) for a,b,c in zip(pred[:, 0].detach(), pred, targ))/len(pred)


CASES = dict(
    cnn=(cnn, CrossEntropyLossFlat, None), tied=(Tied, CrossEntropyLossFlat, None),
    control_flow=(Branches, CrossEntropyLossFlat, None),
    recurrent=(Recurrent, nn.CrossEntropyLoss, None), output=(Output, CrossEntropyLossFlat, None),
    several_labels=(cnn, BCEWithLogitsLossFlat, lambda y: F.one_hot(y, 3).double()),
    regression=(cnn, MSELossFlat, lambda y: torch.stack([y, -y, 2*y], 1).double()),
    by_value=(cnn, lambda: mean_absolute, lambda y: torch.stack([y, -y, 2*y], 1).double()))


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('max_bytes', [2**30, 2**17])
@pytest.mark.many(3)
def test_grand_equals_a_loop_in_float64(case, max_bytes):
    make, loss, targets = CASES[case]
    torch.manual_seed(0)
    rows, model, loss_func = Rows(41), make().double(), loss()
    x, y = rows.images.double(), rows.targets if targets is None else targets(rows.targets)
    for p in model.parameters(): p.data.normal_(std=0.3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(0.5, 2)
    inputs = [dict(left=a, right=a**2) for a in x] if case == 'output' else list(x)
    learn = dataset_learner(list(zip(inputs, y)), model, loss_func)
    got = normed(learn, grand, max_bytes=max_bytes)
    model.eval()
    expected = []
    for i in range(41):
        xb = {k: v[None] for k,v in inputs[i].items()} if case == 'output' else inputs[i][None]
        pred = model(xb)
        pred = pred['logits'] if isinstance(pred, dict) else pred
        grads = torch.autograd.grad(loss_func(pred, y[i:i+1]), list(model.parameters()), allow_unused=True)
        expected.append(torch.cat([g.flatten() for g in grads if g is not None]).norm())
    assert torch.allclose(got.double(), torch.stack(expected), rtol=1e-6, atol=1e-9)


def test_grand_is_over_what_trains():
    learn = dataset_learner(Rows(20), cnn())
    whole = normed(learn, grand)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    body, head = normed(learn, grand), learn.model[-1]
    assert (body < whole).all()
    for p in learn.model.parameters(): p.requires_grad_(p is head.weight)
    hidden = learn.model[:-1].eval()(learn.dls.train_ds.images)
    error = learn.model.eval()(learn.dls.train_ds.images).softmax(1) - F.one_hot(learn.dls.train_ds.targets)
    # an outer product's norm
    assert torch.allclose(normed(learn, grand), error.norm(dim=1)*hidden.norm(dim=1), rtol=1e-5)
    head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match='unfreeze'): normed(learn, grand)


class LiveBytes(TorchDispatchMode):
    "The most bytes of tensors made inside that lived at once"
    def __init__(self): super().__init__(); self.live = self.most = 0; self.known = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        for t in tree_leaves(res):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known: continue
            self.known.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.forget, key, size)
        return res
    def forget(self, key, size): self.known.discard(key); self.live -= size


@pytest.mark.parametrize('model',
                         [cnn(), nn.Sequential(nn.Flatten(), nn.Linear(36, 200), nn.ReLU(), nn.Linear(200, 3))])
def test_grand_keeps_to_its_memory(model):
    learn = dataset_learner(Rows(120), model, bs=120)
    most, values = {}, {}
    for max_bytes in (2**18, 2**20, 2**22):
        with LiveBytes() as live: values[max_bytes] = normed(learn, grand, max_bytes=max_bytes)
        most[max_bytes] = live.most - 120*36*4*3 # the batch itself and its copies
        assert most[max_bytes] <= max_bytes
    assert most[2**20] > 2*most[2**18] # memory that is allowed is used
    for o in values.values(): assert torch.allclose(o, values[2**18], rtol=1e-5)
    with pytest.raises(ValueError, match=r'max_bytes=5000, but a single item'): normed(learn, grand, max_bytes=5000)


# Any score, in data set order

def to_float(x): return x


@pytest.mark.parametrize('kind', ['fastai', 'workers', 'drop_last', 'torch', 'weighted'])
@pytest.mark.many(3)
def test_scores_are_in_data_set_order(kind):
    torch.manual_seed(0)
    rows = Rows()
    dl = dict(fastai=lambda: DataLoader(rows, bs=16, shuffle=True),
              workers=lambda: DataLoader(rows, bs=16, shuffle=True, num_workers=2),
              drop_last=lambda: DataLoader(rows, bs=100, shuffle=True, drop_last=True),
              torch=lambda: TorchDataLoader(rows, 16, shuffle=True),
              weighted=lambda: TorchDataLoader(rows, 16,
                                               sampler=WeightedRandomSampler(torch.rand(len(rows)), 60)))[kind]()
    learn = Learner(DataLoaders(dl, DataLoader(rows, bs=16), device='cpu'), cnn(), loss_func=CrossEntropyLossFlat())
    learn.model.train()
    buffers, state = [b.clone() for b in learn.model.buffers()], torch.get_rng_state()
    got = {name: dataset_scores(learn, dl, name, il=torch.arange(240.), **quiet).values
           for name in ('el2n', 'loss', 'reducible', 'entropy')}
    custom = dataset_scores(learn, dl, lambda pred,il: pred.amax(1)*il, il=torch.arange(240.), **quiet)
    by_grand = normed(learn, grand, dl)
    assert learn.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a,b in zip(buffers, learn.model.buffers()))
    with torch.no_grad(): logits = learn.model.eval()(rows.images)
    loss = F.cross_entropy(logits, rows.targets, reduction='none')
    assert torch.allclose(got['el2n'], (logits.softmax(1) - F.one_hot(rows.targets)).norm(dim=1), atol=1e-5)
    assert torch.allclose(got['entropy'], torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)
    assert torch.allclose(got['loss'], loss, atol=1e-5)
    assert torch.allclose(got['reducible'], loss - torch.arange(240.), atol=1e-4)
    assert torch.allclose(custom.values, logits.amax(1)*torch.arange(240.), atol=1e-3)
    assert custom.info['score'] == '<lambda>'
    assert torch.corrcoef(torch.stack([got['el2n'], by_grand]))[0, 1] > 0.5


def test_scoring_is_not_augmented():
    class Augment(Transform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return torch.zeros_like(x) if x.ndim else x
    rows = Rows(50)
    def image(i): return rows.images[i]
    def label(i): return rows.targets[i]
    dsets = Datasets(range(50), [[image, Augment()], [label]], splits=[list(range(40)), list(range(40, 50))])
    dls = dsets.dataloaders(bs=8, dl_type=TfmdDL, num_workers=0, device='cpu')
    assert not dls.train.one_batch()[0].any()
    learn = Learner(dls, cnn(), loss_func=CrossEntropyLossFlat())
    with torch.no_grad(): logits = learn.model.eval()(rows.images[:40])
    for score in (el2n, grand): assert len(normed(learn, score).unique()) > 30
    assert torch.allclose(normed(learn, el2n), (logits.softmax(1) - F.one_hot(rows.targets[:40], 3)).norm(dim=1),
                          atol=1e-5)


def test_mean_over_learners_and_names():
    learns = [dataset_learner(Rows(30), cnn()) for _ in range(3)]
    dl = learns[0].dls.train
    table = el2n(learns, dl, **quiet)
    assert torch.allclose(table.values, torch.stack([el2n(o, dl, **quiet).values for o in learns]).mean(0))
    assert table.info['n_runs'] == 3
    for bad, message in ((('forgetting',), "score is 'forgetting', expected one of"),
                         (('entropi',), "Did you mean 'entropy'"), (('bald',), 'several passes')):
        with pytest.raises(ValueError, match=message): dataset_scores(learns, dl, *bad, **quiet)
    for bad in ([], [3], dl):
        with pytest.raises(TypeError, match='learns must be'): el2n(bad, dl)
    with pytest.raises(ValueError, match='irreducible losses'): dataset_scores(learns, dl, 'reducible', **quiet)
    il = IrreducibleLosses.of(torch.rand(31), DataLoader(Rows(31)))
    with pytest.raises(ValueError, match='for 31 rows, but this data set has 30'):
        dataset_scores(learns, dl, 'reducible', il=il)
    part = restrict_rows(dl, [7, 2, 3, 11, 5])
    some, whole = el2n(learns[0], part, **quiet), el2n(learns[0], dl, **quiet)
    rows = [2, 3, 5, 7, 11]
    assert torch.allclose(some[rows], whole[rows]) and some.unknown.sum() == 25 and some.info['n_known'] == 5
    with pytest.raises(ValueError, match='nothing is known of 25'): some.check(dl)


def test_tables_fit_their_data_set(tmp_path):
    learn = dataset_learner(Rows(30), cnn())
    table = el2n(learn, learn.dls.train, **quiet)
    table.save(tmp_path/'el2n')
    again = DatasetScores.load(tmp_path/'el2n')
    assert torch.equal(again.values, table.values) and again.info == table.info
    again.check(learn.dls.train)
    other = Rows(30)
    other.targets = 2 - other.targets
    with pytest.raises(ValueError, match='targets differ'): again.check(DataLoader(other))
    with pytest.raises(ValueError, match='holds DatasetScores, not IrreducibleLosses'):
        IrreducibleLosses.load(tmp_path/'el2n')
    learn.model[-1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match='30 of 30 scores are NaN'): el2n(learn, learn.dls.train, **quiet)


# Forgetting: a model that is right where a table says so

class Script(nn.Module):
    "Right about row r in epoch e where `table[e,r]`; the row is read from the input"
    def __init__(self, table, targets):
        super().__init__()
        self.table, self.targets, self.epoch, self.weight = table, targets, 0, nn.Parameter(torch.zeros(()))
    def forward(self, x):
        rows = (x[:, 0, 0, 0]*1024).round().long()
        table, targets = self.table.to(x.device), self.targets.to(x.device)
        right = table[self.epoch][rows]
        return F.one_hot((targets[rows] + ~right) % 3, 3).float() + self.weight


class NextEpoch(Callback):
    "Epochs of the table go on over several fits"
    order = 99
    def after_epoch(self): self.model.epoch += 1


def counted(table):
    "Forgotten how often, and never learnt, row by row"
    forgotten, learnt = [], []
    for column in table.T.tolist():
        forgotten.append(sum(a and not b for a,b in zip(column, column[1:])))
        learnt.append(any(column))
    return torch.tensor(forgotten), torch.tensor(learnt)


LOADERS = dict(fastai=partial(DataLoader, bs=16, shuffle=True),
               workers=partial(DataLoader, bs=16, shuffle=True, num_workers=2),
               torch=partial(TorchDataLoader, batch_size=16, shuffle=True),
               torch_workers=partial(TorchDataLoader, batch_size=16, shuffle=True, num_workers=2),
               in_order=partial(DataLoader, bs=7))


def scripted(table, make_dl=LOADERS['fastai'], **kwargs):
    rows = Rows(table.shape[1])
    dls = DataLoaders(make_dl(rows), DataLoader(rows, bs=50), device='cpu')
    return Learner(dls, Script(table, rows.targets), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.,
                   cbs=NextEpoch(), **kwargs)


def knowledge(epochs, n, seed=0): return torch.rand(epochs, n, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize('online', [True, False])
@pytest.mark.parametrize('kind', LOADERS)
@pytest.mark.many(3)
def test_forgetting_of_every_row(kind, online):
    table = knowledge(4, 96)
    table[:, :5] = False
    tracker = ForgettingTracker(online)
    learn = scripted(table, LOADERS[kind])
    fit(learn, 2, cbs=tracker)
    fit(learn, 2, cbs=tracker) # counts go on
    forgotten, learnt = counted(table)
    assert torch.equal(tracker.forgotten.long().cpu(), forgotten) and torch.equal(tracker.learnt.cpu(), learnt)
    assert tracker.never_learnt.sum() >= 5
    scores = tracker.scores()
    assert torch.equal(scores.values, torch.where(learnt, forgotten.float(), 4.))
    assert scores.values[:5].min() == 4 > forgotten.max()
    assert scores.info == dict(score='forgetting', n_epoch=4, n_runs=1)
    scores.check(learn.dls.train)


def test_forgetting_where_rows_are_left_out():
    "An epoch that doesn't present a row says nothing about it"
    table, seen = knowledge(6, 100), []
    class Seen(Callback):
        order = 98
        def before_train(self): seen.append(torch.zeros(100, dtype=torch.bool))
        def after_pred(self):
            if self.training: seen[-1][(self.x[:, 0, 0, 0]*1024).round().long()] = True
    tracker = ForgettingTracker()
    learn = scripted(table, partial(DataLoader, bs=32, shuffle=True, drop_last=True))
    fit(learn, 1, cbs=[tracker, Seen()])
    with pytest.raises(ValueError, match='4 of 100 rows were never in a batch'): tracker.scores()
    fit(learn, 5, cbs=[tracker, Seen()])
    for row in range(100):
        history = table[torch.stack(seen)[:, row], row].tolist()
        assert tracker.forgotten[row] == sum(a and not b for a,b in zip(history, history[1:]))
        assert tracker.learnt[row] == any(history)
    assert len(tracker.scores()) == 100


def test_what_does_not_count(tmp_path):
    table = knowledge(40, 240)
    tracker = ForgettingTracker()
    learn = scripted(table, path=tmp_path, metrics=lambda pred, targ: pred.sum())
    learn.add_cb(tracker)
    fit(learn, 2)
    before = tracker.forgotten.clone(), tracker.last.clone(), tracker.n_epochs
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds()
        learn.lr_find(num_it=20, show_plot=False, start_lr=1e-9, end_lr=1e-8)
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Stop())
    learn.remove_cb(learn.cbs[-1]) if isinstance(learn.cbs[-1], Stop) else None
    assert torch.equal(before[0], tracker.forgotten) and torch.equal(before[1], tracker.last)
    assert before[2] == tracker.n_epochs
    learn.model.epoch = 2
    for cb in [cb for cb in learn.cbs if isinstance(cb, Stop)]: learn.remove_cb(cb)
    fit(learn, 3)
    assert torch.equal(tracker.forgotten.long(), counted(table[:5])[0])
    learn.export('learner.pkl')
    assert load_learner(tmp_path/'learner.pkl').forgetting_tracker.n_epochs == 5
    learn.dls = scripted(knowledge(40, 120)).dls # another data set: counts begin anew
    fit(learn, 1)
    assert len(tracker.forgotten) == 120 and tracker.n_epochs == 1


def test_forgetting_beside_selection():
    def offline(learn):
        tracker = ForgettingTracker(online=False)
        fit(learn, 3, cbs=tracker)
        return tracker
    table = knowledge(3, 240)
    for prepare in (lambda learn: learn.batch_loss_filter(0.5), lambda learn: learn.add_cb(MixUp())):
        learn = prepare(scripted(table))
        with pytest.raises(ValueError, match=r'use ForgettingTracker\(online=False\)'):
            fit(learn, 1, cbs=ForgettingTracker())
        assert torch.equal(offline(prepare(scripted(table))).forgotten.long(), counted(table)[0])


def test_what_is_right_is_the_users_choice():
    rows = Rows(60)
    values = torch.randn(60, 2)
    data = list(zip(rows.images, values))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(ValueError, match='correct=function'):
        fit(dataset_learner(data, model, MSELossFlat()), 1, cbs=ForgettingTracker())
    tracker = ForgettingTracker(correct=lambda pred, targ: (pred - targ).abs().amax(1) < 1)
    learn = dataset_learner(data, model, MSELossFlat(), opt_func=SGD, lr=0.)
    fit(learn, 2, cbs=tracker)
    assert torch.equal(tracker.learnt, (model(rows.images) - values).abs().amax(1) < 1) and not tracker.forgotten.any()
    with pytest.raises(ValueError, match='for each of the 16 items'):
        fit(learn, 1, cbs=ForgettingTracker(correct=lambda pred, targ: (pred > targ)))


# Several runs

def make_learner(dls, **kwargs):
    return Learner(dls, cnn(), **{**dict(loss_func=CrossEntropyLossFlat(), lr=1e-2), **kwargs})
def dataloaders(n=64):
    return DataLoaders(DataLoader(Rows(n), bs=16, shuffle=True, drop_last=True), DataLoader(Rows(30), bs=30),
                       device='cpu')


@pytest.mark.parametrize('score', ['el2n', 'grand', 'forgetting', 'loss_variance', 'reducible'])
@pytest.mark.many(5)
def test_killed_runs_go_on_with_the_next_model(score, tmp_path):
    kwargs = dict(score=score, epochs=2, seed=3, il=torch.rand(64, generator=torch.Generator().manual_seed(0))
                  if score == 'reducible' else None, **quiet)
    dls, alive, calls = dataloaders(), [], []
    def make(dls):
        calls.append(1)
        assert sum(o() is not None for o in alive) == 0 # one model at a time
        learn = make_learner(dls)
        alive.append(weakref.ref(learn.model))
        if len(calls) == 3:
            def kill(*_): raise KeyboardInterrupt
            learn.model.register_forward_hook(kill)
        return learn
    whole = score_dataset(make_learner, dls, n_runs=3, **kwargs)
    with pytest.raises(KeyboardInterrupt): score_dataset(make, dls, n_runs=3, path=tmp_path/'scores', **kwargs)
    assert DatasetScores.load(tmp_path/'scores').info['n_runs'] == 2
    torch.rand(3) # the global state doesn't matter
    alive.clear()
    resumed = score_dataset(make, dls, n_runs=3, path=tmp_path/'scores', **kwargs) # one is made to compare its settings
    assert len(calls) == 3 + 2 and torch.equal(resumed.values, whole.values) and resumed.info['n_runs'] == 3
    assert not torch.equal(whole.values, score_dataset(make_learner, dls, n_runs=3, **dict(kwargs, seed=4)).values)
    state = torch.get_rng_state()
    done = score_dataset(make, dls, n_runs=3, path=tmp_path/'scores', **kwargs) # nothing left to do
    assert len(calls) == 3 + 2 + 1 and torch.equal(done.values, whole.values)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_scores_of_runs_are_those_of_their_models():
    "Mean over runs and variance over epochs, against what each model says by itself"
    dls, learns, losses, trackers = dataloaders(), [], [], []
    rows = dls.train.dataset
    class Losses(Callback):
        order = 98
        def after_train(self):
            with torch.no_grad():
                losses.append(F.cross_entropy(self.model.eval()(rows.images), rows.targets, reduction='none'))
            self.model.train()
    def make(dls):
        trackers.append(ForgettingTracker())
        learns.append(make_learner(dls, cbs=[Losses(), trackers[-1]]))
        return learns[-1]
    by_el2n = score_dataset(make, dls, epochs=2, n_runs=3, **quiet)
    assert torch.allclose(by_el2n.values, torch.stack([el2n(o, dls.train, **quiet).values for o in learns]).mean(0),
                          atol=1e-6)
    assert len({tuple(o.model[-1].bias.tolist()) for o in learns}) == 3
    losses.clear()
    variance = score_dataset(make, dls, 'loss_variance', epochs=4, n_runs=2, **quiet).values
    assert torch.allclose(variance, torch.stack(losses).view(2, 4, -1).var(1, correction=0).mean(0), atol=1e-5)
    forgetting = score_dataset(make, dls, 'forgetting', epochs=4, n_runs=2, **quiet).values
    assert torch.equal(forgetting, torch.stack([o.scores().values for o in trackers[-2:]]).mean(0))


def test_files_of_other_runs_are_refused(tmp_path):
    dls, path = dataloaders(), tmp_path/'scores'
    kwargs = dict(epochs=1, n_runs=2, path=path, **quiet)
    score_dataset(make_learner, dls, **kwargs)
    for change, message in ((dict(epochs=2), 'n_epoch=1 there, 2 here'), (dict(seed=1), 'seed=0 there, 1 here'),
                            (dict(n_runs=1), 'n_runs=2 there, 1 here'),
                            (dict(score='loss'), "score='el2n' there, 'loss' here"),
                            (dict(lr=0.1), "lr=None there, '0.1' here")):
        with pytest.raises(ValueError, match=message): score_dataset(make_learner, dls, **dict(kwargs, **change))
    with pytest.raises(ValueError, match='this data set has 80'): score_dataset(make_learner, dataloaders(80), **kwargs)
    def other(dls): return Learner(dls, Tied(), loss_func=CrossEntropyLossFlat())
    smooth = partial(make_learner, loss_func=CrossEntropyLossFlat(label_smoothing=0.1))
    for made, message in ((other, r"model='Sequential\(.* there, 'Tied\(.* here"),
                          (smooth, r'loss=.*label_smoothing=0.0.* there, .*label_smoothing=0.1.* here'),
                          (partial(make_learner, cbs=GradientClip(0.1)), r'callbacks=.*GradientClip\(max_norm=0.1')):
        for n_runs in (2, 3): # all there, or one to come
            with pytest.raises(ValueError, match=message): score_dataset(made, dls, **dict(kwargs, n_runs=n_runs))
    kept = dict(kwargs, path=tmp_path/'own')
    for _ in range(2): score_dataset(make_learner, dls, lambda loss: loss, **kept)
    with pytest.raises(ValueError, match='score=.* there, .* here'):
        score_dataset(make_learner, dls, lambda loss: 2*loss, **kept)
    made = iter([make_learner, other])
    with pytest.raises(ValueError, match='make Learners that train alike; run 1 is not as the runs before it: model='):
        score_dataset(lambda dls: next(made)(dls), dls, epochs=1, n_runs=2, **quiet)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match='truncated, corrupt'): score_dataset(make_learner, dls, **kwargs)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(score='importance'), ValueError, 'expected one of .*el2n, grand, forgetting, loss_variance'),
    (dict(epochs=0), ValueError, 'epochs must be'),
    (dict(n_runs=0), ValueError, 'n_runs must be'), (dict(n_runs=1.5), TypeError, 'n_runs must be'),
    (dict(max_bytes=0), ValueError, 'max_bytes'),
    (dict(score='loss_variance', epochs=1), ValueError, 'loss_variance'),
    (dict(score='reducible'), ValueError, 'irreducible losses'),
    (dict(score=lambda entropy: 0), ValueError, 'parameters'),
])
def test_bad_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        score_dataset(make_learner, dataloaders(), **{**dict(epochs=1, n_runs=1), **quiet, **kwargs})


def test_bad_learners_and_loaders():
    dls, one = dataloaders(), make_learner(dataloaders())
    with pytest.raises(TypeError, match='dls must be DataLoaders'): score_dataset(make_learner, dls.train)
    with pytest.raises(ValueError, match='this one has others'): score_dataset(lambda dls: one, dls, **quiet)
    def same_model(dls): return Learner(dls, one.model, loss_func=one.loss_func)
    with pytest.raises(ValueError, match='shares parameters'):
        score_dataset(same_model, dls, epochs=1, n_runs=2, **quiet)
    stream = DataLoaders(DataLoader(iter(range(9)), bs=3), DataLoader(Rows(9)))
    with pytest.raises(ValueError, match="can't be known"): score_dataset(make_learner, stream, **quiet)
    with pytest.raises(ValueError, match="can't be known"):
        fit(Learner(stream, cnn(), loss_func=CrossEntropyLossFlat()), 1, cbs=ForgettingTracker())


class Column(Rows):
    "Classes as a table has them, `(1,)` int8"
    def __getitem__(self, i): x, y = super().__getitem__(i)[:2]; return x, torch.as_tensor(y).view(1).to(torch.int8)


def test_classes_in_a_column():
    torch.manual_seed(0)
    plain, column = (dataset_learner(data, cnn()) for data in (Rows(30), Column(30)))
    column.model.load_state_dict(plain.model.state_dict())
    for score in (el2n, grand): assert torch.allclose(normed(column, score), normed(plain, score), atol=1e-6)
    tracker = ForgettingTracker()
    fit(column, 2, cbs=tracker)
    assert len(tracker.scores()) == 30


def test_several_labels_and_numbers():
    "EL2N of labels is `||sigmoid - y||`; of numbers there is none"
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(0, 2, (20, 3))
    data = list(zip(x, y))
    learn = dataset_learner(data, nn.Linear(4, 3), nn.BCEWithLogitsLoss())
    learn.loss_func = lambda pred, targ: F.binary_cross_entropy_with_logits(pred, targ.float())
    with torch.no_grad(): expected = (learn.model(x).sigmoid() - y).norm(dim=1)
    assert torch.allclose(normed(learn, el2n), expected, atol=1e-6)
    with pytest.raises(ValueError, match='has the model predict numbers'):
        normed(dataset_learner(list(zip(x, y.float())), nn.Linear(4, 3), nn.MSELoss()), el2n)


def test_forgetting_with_several_targets():
    class Two(Rows):
        def __getitem__(self, i): x, y = super().__getitem__(i)[:2]; return x, y, y
    def loss(pred, a, b): return F.cross_entropy(pred, a) + F.cross_entropy(pred, b)
    learn = dataset_learner(Two(30), cnn(), loss)
    learn.dls.train.n_inp = learn.dls.valid.n_inp = learn.dls.n_inp = 1
    with pytest.raises(ValueError, match='one class per item.*correct=function of pred and the targets'):
        fit(learn, 1, cbs=ForgettingTracker())
    for online in (True, False):
        tracker = ForgettingTracker(online=online, correct=lambda pred, a, b: (pred.argmax(1) == a) & (a == b))
        fit(learn, 1, cbs=tracker)
        assert len(tracker.scores()) == 30


@pytest.mark.parametrize('score', ['el2n', 'grand', 'forgetting', 'loss_variance'])
def test_a_part_is_a_data_set(score):
    dls, rows = dataloaders(), [0, 5, 7, 11, 20, 21, 22, 30]
    part = DataLoaders(restrict_rows(dls.train.new(bs=4, drop_last=False), rows), dls.valid)
    table = score_dataset(make_learner, part, score, epochs=2, n_runs=2, **quiet)
    assert table.check(part.train) and table.unknown.sum() == len(table) - 8 and table[rows].isfinite().all()


def test_losses_that_mean_nothing():
    "A contrastive loss: a single item's is 0"
    def info_nce(pred, targ): z = F.normalize(pred, dim=1); return F.cross_entropy(z@z.T/0.1, torch.arange(len(z)))
    learn = dataset_learner(Rows(30), cnn(), info_nce)
    for score in ('grand', 'loss'):
        with pytest.raises(ValueError, match='info_nce of an item alone is 0 for each'):
            dataset_scores(learn, learn.dls.train, score, **quiet)


@pytest.mark.slow
def test_progress_bar_counts_every_batch(capsys):
    from rholoss_fastai import importance
    seen = SimpleNamespace(total=0, steps=0)
    from contextlib import contextmanager
    @contextmanager
    def counting(total, show=True):
        seen.total, seen.steps = total, 0
        def step(comment=None): seen.steps += 1
        yield step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, 'batch_progress', counting)
        for score in ('el2n', 'grand', 'forgetting', 'loss_variance'):
            score_dataset(make_learner, dataloaders(), score, epochs=2, n_runs=2)
            assert seen.steps == seen.total > 0
        el2n([make_learner(dataloaders())]*2, dataloaders().train)
        assert seen.steps == seen.total == 8


@pytest.mark.cuda
def test_scores_on_cuda():
    learn = make_learner(dataloaders())
    expected = {score: normed(learn, score) for score in (el2n, grand)}
    dls = dataloaders().to('cuda')
    learn = Learner(dls, learn.model.cuda(), loss_func=CrossEntropyLossFlat())
    for score in (el2n, grand): assert np.allclose(normed(learn, score), expected[score], rtol=1e-3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    normed(learn, grand, max_bytes=2**20)
    assert torch.cuda.max_memory_allocated() - before < 2**20 + 2**22
    tracker = ForgettingTracker()
    fit(learn, 3, cbs=tracker)
    assert tracker.forgotten.is_cuda and len(tracker.scores()) == 64 and score_rows(learn, dls.train).is_cuda


def test_runs_that_write_elsewhere_train_alike(tmp_path):
    names = iter(range(9))
    def make(dls): return make_learner(dls, path=tmp_path, cbs=CSVLogger(f'{next(names)}.csv'))
    assert score_dataset(make, dataloaders(), epochs=1, n_runs=2, **quiet).info['n_runs'] == 2

def test_a_file_that_says_little_of_its_runs_is_refused(tmp_path):
    path, dls = tmp_path/'scores.safetensors', dataloaders()
    table = score_dataset(make_learner, dls, epochs=1, n_runs=1, **quiet)
    table.info = {k: v for k, v in table.info.items() if k != 'settings'}
    table.save(path)
    with pytest.raises(ValueError, match="doesn't say how its models were trained"):
        score_dataset(make_learner, dls, epochs=1, n_runs=1, path=path, **quiet)
    path.unlink()
    score_dataset(make_learner, dls, epochs=1, n_runs=1, path=path, **quiet)
