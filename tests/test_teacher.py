"A teacher's losses as irreducible losses"
import math
from functools import partial

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import Adam
from helpers import examples, fit, learner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import TeacherIL
from rholoss_fastai.il_source import il_values
from rholoss_fastai.teacher import class_columns, class_log_probs, fit_temperature


class Rows(list): classes = ['cat', 'dog', 'car']

def named_rows(n=120, names=True):
    x = torch.randn(n, 4)
    rows = list(zip(x, x[:, :3].argmax(1)))
    return DataLoaders(DataLoader(Rows(rows) if names else rows, bs=24, shuffle=True), DataLoader(rows[:60], bs=30))

def named_learner(**kwargs):
    return learner(partial(named_rows, **kwargs), lambda: nn.Linear(4, 3), opt_func=Adam, lr=0.1)

def teacher(x): return 5*torch.stack([x[:, 2], x[:, 3], x[:, 1], x[:, 0]], 1) # car, other, dog, cat
COLUMNS = [3, 2, 0]

def expected(x, y, temperature):
    return F.cross_entropy(teacher(x)[:, COLUMNS].log_softmax(1)/temperature, y, reduction='none')

@pytest.mark.parametrize('classes', [['car', 'other', 'dog', 'cat'], COLUMNS, dict(cat=3, dog=2, car=0),
                                     {0: 3, 1: [2], 2: 0}], ids=str)
def test_classes_by_name_and_number(classes):
    learn = named_learner()
    values = il_values(TeacherIL(teacher, classes, temperature=2.), learn.dls, learn)
    x, y = (torch.stack(o) for o in zip(*learn.dls.train.dataset))
    assert torch.allclose(values, expected(x, y, 2.), atol=1e-5)

@pytest.mark.parametrize('probabilities', [False, True])
def test_in_training(probabilities):
    seen, learn = [], named_learner()
    source = TeacherIL((lambda x: teacher(x).softmax(1)) if probabilities else teacher, ['car', 'other', 'dog', 'cat'])
    learn.rho_loss(source, frac=0.25)
    call = TeacherIL.__call__
    class Spy(TeacherIL):
        def __call__(self, c):
            seen.append((call(self, c), expected(c.xb[0], c.yb[0], self.temperature)))
            return seen[-1][0]
    source.__class__ = Spy
    fit(learn, 2)
    assert seen and all(torch.allclose(a, b, atol=1e-3) for a, b in seen)
    assert (learn.selection.ledger.selected < 0.5).all() and learn.selection.ledger.seconds_il[0] > 0

def test_a_module_keeps_its_mode_and_state():
    module, learn = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)), named_learner()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    learn.rho_loss(TeacherIL(module), frac=0.5)
    fit(learn, 1)
    assert all(m.training for m in module.modules())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())

@examples(25)
@given(st.floats(0.2, 20), st.integers(0, 10**6))
def test_temperature_is_the_best(T, seed):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(300, 4, generator=gen)
    y, logs = logits.softmax(1).multinomial(1, generator=gen)[:, 0], (T*logits).log_softmax(1)
    def loss(t): return F.cross_entropy(logs.double()/t, y).item()
    found = fit_temperature(logs, y)
    grid = torch.logspace(-2, 2, 400).tolist()
    assert loss(found) <= min(map(loss, grid)) + 1e-6

def test_columns_add_up():
    p = torch.rand(5, 6).softmax(1)
    columns = [[0, 2], [1], [3, 4]]
    sums = torch.stack([p[:, o].sum(1) for o in columns], 1)
    for out in (p, p.log() - 7):
        assert torch.allclose(class_log_probs(out, columns).exp(), sums/sums.sum(1, keepdim=True), atol=1e-6)
    assert class_log_probs(torch.tensor([[0., 1.]])).isfinite().all()

@pytest.mark.parametrize('make,kind,message', [
    (lambda: TeacherIL('clip'), TypeError, 'a module or a function'),
    (lambda: TeacherIL(teacher, temperature=0.), ValueError, 'temperature must lie'),
    (lambda: named_learner().rho_loss(TeacherIL(teacher, ['car', 'dog'])), ValueError, 'no class for cat'),
    (lambda: named_learner(names=False).rho_loss(TeacherIL(teacher, ['car', 'dog'])), ValueError, 'no class names'),
    (lambda: TeacherIL(teacher).values(None), ValueError, 'give learn='),
    (lambda: class_columns(dict(cat=0), ['cat', 'dog']), ValueError, 'no class for dog')])
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message): make()

def test_shares_parameters():
    learn = named_learner()
    with pytest.raises(ValueError, match='shares parameters'): learn.rho_loss(TeacherIL(learn.model))

def test_no_held_out_rows():
    learn = named_learner()
    learn.dls.loaders = learn.dls.loaders[:1]
    with pytest.raises(ValueError, match='held_out=dl'): TeacherIL(teacher, COLUMNS).values(learn.dls.train, learn)
    assert math.isfinite(TeacherIL(teacher, COLUMNS, held_out=learn.dls.train).values(learn.dls.train, learn).sum())

def test_other_classes_have_columns_and_a_temperature_of_their_own():
    learn,source = named_learner(),TeacherIL(teacher, ['car', 'other', 'dog', 'cat'])
    fit(learn.rho_loss(source, frac=0.5), 1)
    rows = [(x, (y + 1) % 3) for x,y in learn.dls.train.dataset]
    class Others(list): classes = ['car', 'cat', 'dog']
    learn.dls = DataLoaders(DataLoader(Others(rows), bs=24, shuffle=True), DataLoader(rows[:60], bs=30))
    fit(learn, 1)
    anew = TeacherIL(teacher, source.classes)
    assert torch.equal(source.values(learn.dls.train, learn), anew.values(learn.dls.train, learn))
    assert source.temperature == anew.temperature
