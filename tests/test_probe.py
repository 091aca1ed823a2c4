"""Irreducible losses by ridge regression: against refits, on every kind of inputs and targets, and on inputs that
can't work"""
import random
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ShowGraphCallback  # noqa: F401 (patches `no_bar`)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, L1LossFlat, MSELossFlat
from fastai.optimizer import SGD
from fastai.tabular.core import Categorify, Normalize, TabularPandas
from fastai.text.core import BaseTokenizer
from fastai.text.data import TextDataLoaders
from fastcore.basics import noop
from helpers import fit
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, TensorDataset

from rholoss_fastai import side_models
from rholoss_fastai.features import BodyInputs, RandomPatches, is_trained, table_features, text_features
from rholoss_fastai.il_source import il_values
from rholoss_fastai.irreducible import IrreducibleLosses, small_cnn
from rholoss_fastai.loaders import restrict_rows
from rholoss_fastai.noise import redraw_labels
from rholoss_fastai.probe import Probe, choose_features, probe_cost, probe_irreducible, probe_predictions
from rholoss_fastai.ridge import FoldRidge, HeldOutRidge, class_logits, fit_scale, smoothed_shares, standardise

quiet = dict(progress=False, verbose=False)

def data(n=120, d=6, n_classes=3, seed=0):
    "Classes that a linear model can tell apart, mostly"
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, n_classes, (n,), generator=generator)
    return torch.randn(n, d, generator=generator) + 1.2*torch.randn(n_classes, d, generator=generator)[y], y

def make_learner(x, y, n_out=3, loss_func=None, model=None, bs=16, **kwargs):
    loaders = [DataLoader(TensorDataset(x, y), bs=bs, shuffle=True, drop_last=True, **kwargs),
               DataLoader(TensorDataset(x[:8], y[:8]), bs=8)]
    return Learner(DataLoaders(*loaders, device='cpu'), model or nn.Linear(x.shape[1], n_out),
                   loss_func=loss_func or CrossEntropyLossFlat())

def refits(x, targets, penalty, rows):
    "Predictions for `rows`, each by scikit-learn's fit to all other rows"
    x = standardise(x.double().clone()).numpy()
    others = [np.delete(np.arange(len(x)), i) for i in rows]
    return torch.tensor(np.array([Ridge(alpha=penalty).fit(x[o], targets[o]).predict(x[i:i+1])[0] for i,
                                  o in zip(rows, others)]))

def auc(score, wrong):
    ranks,n = score.argsort().argsort().double(),wrong.sum().item()
    return (ranks[wrong].sum().item() - n*(n-1)/2)/(n*(len(wrong) - n))

# ---- the algebra

@pytest.mark.parametrize('n,d', [(90, 6), (30, 50), (20, 20)])
@pytest.mark.parametrize('alpha', [1e-2, 1., 100.])
def test_leave_one_out_is_what_refits_give(n, d, alpha):
    x,y = (o.double() for o in data(n, d, seed=1))
    targets = torch.stack([y, x[:,0]**2], 1)
    ridge = HeldOutRidge(x.clone(), targets)
    expected = refits(x, targets.numpy(), ridge.penalty(alpha), range(n))
    torch.testing.assert_close(ridge.predict(alpha), expected, rtol=1e-7, atol=1e-7)
    rows = torch.tensor([3, 11, 4])
    torch.testing.assert_close(ridge.predict(alpha, rows), expected[rows], rtol=1e-7, atol=1e-7)

@pytest.mark.parametrize('n,d', [(90, 6), (30, 50)])
@pytest.mark.parametrize('folds', [2, 7])
def test_folds_are_what_refits_give(n, d, folds):
    x,y = (o.double() for o in data(n, d, seed=2))
    ridge = FoldRidge(x.clone(), y, folds=folds)
    scaled,predicted = standardise(x.clone()).numpy(),ridge.predict(0.5)[:,0].numpy()
    assert torch.equal(torch.cat(ridge.folds).sort().values, torch.arange(n)) and len(ridge.folds) == folds
    for fold in ridge.folds:
        others = np.delete(np.arange(n), fold.numpy())
        fitted = Ridge(alpha=ridge.penalty(0.5)).fit(scaled[others], y[others].numpy())
        np.testing.assert_allclose(predicted[fold], fitted.predict(scaled[fold.numpy()]), atol=1e-8)

@pytest.mark.parametrize('make', [HeldOutRidge, FoldRidge])
def test_blocks_change_nothing(make):
    x,y = data(500, 20)
    whole,parts = (make(x.double(), y, block=block).predict(0.1) for block in (8192, 7))
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('make', [HeldOutRidge, FoldRidge])
def test_half_precision_is_near(make):
    x,y = data(500, 20)
    exact,half = make(x.double(), y).predict(0.1),make(x.half(), y).predict(0.1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=5e-3)

def test_features_are_held_in_the_precision_they_come_in():
    x,y = data(500, 20)
    for dtype in (torch.float16, torch.float32): assert HeldOutRidge(x.to(dtype), y).x.dtype == dtype

def test_far_columns_keep_their_digits():
    x,y = data(200, 4)
    near,far = (HeldOutRidge(x.double() + shift, y).predict(0.1) for shift in (0, 1e6))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-6)

def test_temperature_never_does_worse_than_chance():
    "Also with classes of very different sizes, and features that say nothing"
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([0.9, 0.09, 0.01]), 2000, True, generator=generator)
    pred,shares = HeldOutRidge(torch.randn(2000, 50, generator=generator), y).predict(0.1),smoothed_shares(y, 3)
    assert fit_scale(pred, y, shares)[1] <= F.cross_entropy(shares.log().expand(2000, 3), y) + 1e-4

def test_binary_temperature_is_the_lowest_of_a_grid():
    x,y = data(400, 6, 2)
    targets = torch.stack([y, 1-y], 1).float()
    pred,shares = HeldOutRidge(x.clone(), targets).predict(0.1),smoothed_shares(targets)
    scale,loss = fit_scale(pred, targets, shares, binary=True)
    grid = [F.binary_cross_entropy_with_logits(class_logits(pred, shares, s, True), targets).item()
            for s in np.linspace(0.1, 20, 400)]
    assert loss <= min(grid) + 1e-6 and 0.1 < scale < 20

# ---- irreducible losses of each kind of target

def test_classes():
    x,y = data()
    il = probe_irreducible(make_learner(x, y), features=lambda x: x, **quiet)
    assert isinstance(il, IrreducibleLosses) and len(il) == 120
    onehot,rows = F.one_hot(y, 3).double().numpy(),[0, 7, 30, 119]
    pred = refits(x, onehot, il.info['penalty'], rows)
    shares = smoothed_shares(y, 3)
    expected = F.cross_entropy(class_logits(pred, shares, 1/il.info['temperature']), y[rows], reduction='none')
    torch.testing.assert_close(il[rows].double(), expected, rtol=1e-3, atol=1e-4)
    assert il.info['accuracy'] > il.info['chance'] + 0.2 and il.info['seconds'] > 0 and il.info['process_seconds'] > 0
    torch.testing.assert_close(il.p_il, (-il.values).exp())

@pytest.mark.parametrize('shape,dtype', [((-1, 1), torch.int64), ((-1,), torch.int32), ((-1, 1), torch.uint8)])
def test_classes_of_any_integer_type_and_in_a_column(shape, dtype):
    x,y = data()
    one,other = (probe_irreducible(make_learner(x, t), features='columns', **quiet)
                 for t in (y, y.to(dtype).reshape(shape)))
    torch.testing.assert_close(one.values, other.values)

def test_the_unit_is_the_learners_loss():
    "Class weights and label smoothing are in the irreducible losses as they are in the training loss"
    x,y = data()
    weights = torch.tensor([1., 2., 5.])
    plain,weighted = (probe_irreducible(make_learner(x, y, loss_func=f), features='columns', **quiet)
                      for f in (CrossEntropyLossFlat(), nn.CrossEntropyLoss(weight=weights)))
    torch.testing.assert_close(weighted.values, plain.values*weights[y])

def test_a_loss_that_wants_a_models_whole_output():
    x,y = data()
    il = probe_irreducible(make_learner(x, y, loss_func=lambda pred, y: pred.loss), features='columns', **quiet)
    torch.testing.assert_close(il.values, probe_irreducible(make_learner(x, y), features='columns', **quiet).values)

@pytest.mark.parametrize('loss_func,per_item', [(MSELossFlat(), torch.square), (L1LossFlat(), torch.abs)])
@pytest.mark.parametrize('column', [False, True])
def test_numbers(loss_func, per_item, column):
    x,_ = data()
    y = x[:,0] + 0.1*torch.randn(120, generator=torch.Generator().manual_seed(1))
    learn = make_learner(x, y[:,None] if column else y, 1, loss_func)
    il = probe_irreducible(learn, features=lambda x: x, **quiet)
    rows = [0, 5, 119]
    expected = per_item(refits(x, y.double().numpy(), il.info['penalty'], rows) - y[rows])
    torch.testing.assert_close(il[rows].double(), expected.double(), rtol=1e-3, atol=1e-4)
    assert il.info['r2'] > 0.9 and 'temperature' not in il.info

def test_labels_yes_or_no():
    x,y = data(300)
    targets = torch.stack([(y == 0), (y == 1), x[:,0] > 0], 1).float()
    il = probe_irreducible(make_learner(x, targets, 3, BCEWithLogitsLossFlat()), features='columns', **quiet)
    flipped = targets.clone()
    flipped[:30] = 1 - flipped[:30]
    wrong = torch.arange(300) < 30
    worse = probe_irreducible(make_learner(x, flipped, 3, BCEWithLogitsLossFlat()), features='columns', **quiet)
    assert il.info['accuracy'] > il.info['chance'] and auc(worse.values, wrong) > 0.9

def test_one_label_yes_or_no():
    x,y = data(300, n_classes=2)
    learn = make_learner(x, y.float()[:,None], 1, BCEWithLogitsLossFlat())
    found = probe_predictions(learn, features='columns', **quiet)
    assert found.kind == 'labels' and found.probs.shape == (300, 1)
    torch.testing.assert_close(found.p_label, torch.where(y.bool(), found.probs[:,0], 1 - found.probs[:,0]))

@pytest.mark.parametrize('loss', [F.multilabel_soft_margin_loss, nn.MultiLabelSoftMarginLoss(),
                                  partial(partial(F.binary_cross_entropy_with_logits), reduction='mean')],
                         ids=['function', 'module', 'partial'])
def test_labels_by_losses_of_every_form(loss):
    x,y = data(60)
    targets = torch.stack([(y == 0), (y == 1), x[:,0] > 0], 1).float()
    found = probe_predictions(make_learner(x, targets, 3, loss), features='columns', **quiet)
    assert found.kind == 'labels'
    expected = F.binary_cross_entropy_with_logits(found.logits, targets, reduction='none').mean(1)
    torch.testing.assert_close(found.losses(loss), expected)

def test_table_features_whatever_the_order_of_columns():
    "Random combinations reach as far from the first column as from the last"
    generator = torch.Generator().manual_seed(0)
    cats = torch.stack([torch.randint(k, (2000,), generator=generator) for k in (64, 2)], 1)
    spreads = [table_features(o, None)[:,66:].std(0).mean().item() for o in (cats, cats.flip(1))]
    assert spreads == pytest.approx([spreads[0]]*2, rel=0.05)

def test_made_by_name_outside_of_a_fit():
    "Where there is no bill of a fit"
    x,y = data()
    learn = make_learner(x, y)
    learn.logger = noop
    assert torch.equal(il_values('auto', learn.dls, learn), il_values('probe', learn.dls, learn))

def test_averaged_with_losses_of_some_rows_alone(tmp_path):
    "Of a restricted loader, as the probe is"
    learn = make_learner(*data())
    dl = restrict_rows(learn.dls.train, range(0, 120, 2))
    table = probe_irreducible(learn, dl, features='columns', **quiet,
                              average_with=IrreducibleLosses.of(torch.rand(60), dl))
    assert torch.equal(table.unknown, torch.arange(120) % 2 == 1)
    assert table.info['mean'] == pytest.approx(table.values[::2].mean().item())
    table.save(tmp_path/'il')
    assert IrreducibleLosses.load(tmp_path/'il').check(dl)

def test_labels_that_are_wrong_stand_out():
    x,y = data(600)
    labels,wrong = redraw_labels(y, 0.2, seed=1)
    for kwargs in (dict(), dict(folds=5)):
        assert auc(probe_irreducible(make_learner(x, labels), features='columns', **kwargs, **quiet).values,
                   wrong) > 0.85

# ---- rows

@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_rows_are_in_the_data_sets_order(kind):
    x,y = data()
    learn = make_learner(x, y)
    dl = TorchDataLoader(TensorDataset(x, y), batch_size=16, shuffle=True,
                         drop_last=True) if kind == 'torch' else learn.dls.train
    one = probe_irreducible(learn, dl, features='columns', **quiet)
    other = probe_irreducible(learn, dl, features=table_features(None, x), **quiet) # numbers by position
    torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)
    one.check(dl)

def test_features_may_be_anything_array_like():
    x,y = data()
    learn = make_learner(x, y)
    frame = pd.DataFrame(x.numpy(), index=np.arange(120)[::-1]) # by position, whatever the index
    first,*others = (probe_irreducible(learn, features=o, **quiet).values for o in (x, x.numpy(), x.tolist(), frame))
    for o in others: torch.testing.assert_close(first, o)
    with pytest.raises(ValueError, match='one line for each of the 120 rows'):
        probe_irreducible(learn, features=x[:10], **quiet)

def test_a_restricted_loader_is_probed_on_its_rows():
    x,y = data()
    learn,rows = make_learner(x, y),torch.arange(0, 120, 2)
    part = probe_irreducible(learn, restrict_rows(learn.dls.train, rows), features=lambda x: x, **quiet)
    alone = probe_irreducible(make_learner(x[rows], y[rows]), features=lambda x: x, **quiet)
    torch.testing.assert_close(part[rows], alone.values, rtol=1e-4, atol=1e-5)
    assert len(part) == 120 and part.info['n_rows'] == 60
    assert torch.equal(part.unknown.nonzero().flatten(), torch.arange(1, 120, 2))
    with pytest.raises(ValueError, match='nothing is known of 60 of the rows'): part.check(learn.dls.train)
    assert part.check(restrict_rows(learn.dls.train, rows[:9])) is part

def test_some_rows_for_a_quick_look():
    x,y = data(300)
    found = probe_predictions(make_learner(x, y), features='columns', n_rows=50, **quiet)
    assert len(found) == 50 and torch.equal(found.targets, y[found.rows]) and found.rows.unique().numel() == 50

def test_augmentation_is_off():
    x,y = data()
    class Noise(Callback):
        def before_batch(self): raise AssertionError('callbacks of training have no part in it')
    learn = make_learner(x, y)
    learn.add_cb(Noise())
    probe_irreducible(learn, features='columns', **quiet)

# ---- it leaves no trace, and is saved and billed

def test_no_trace():
    x,y = data()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    learn = make_learner(x, y, model=model)
    model.train()
    model[1].eval()
    def state():
        return ([m.training for m in model.modules()], {k: v.clone() for k,v in model.state_dict().items()},
                random.getstate(),
                np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                [len(m._forward_pre_hooks) for m in model.modules()])
    before = state()
    probe_irreducible(learn, features='body', **quiet)
    after = state()
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    assert before[0] == after[0] and before[2:] == after[2:]

def test_the_same_whenever_it_is_made():
    x,y = torch.rand(80, 3, 12, 12),torch.randint(0, 2, (80,))
    first,second = (probe_irreducible(make_learner(x, y, model=small_cnn(2, 3, 12)), features='patches', **quiet)
                    for _ in range(2))
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=0)

def test_saved_like_any(tmp_path):
    x,y = data()
    learn = make_learner(x, y)
    il = probe_irreducible(learn, features='columns', **quiet)
    loaded = IrreducibleLosses.load(il.save(tmp_path/'il.safetensors'))
    assert torch.equal(il.values, loaded.values) and loaded.info == il.info
    loaded.check(learn.dls.train)

def test_it_says_what_it_will_do_and_how_good_it_was(capsys):
    x,y = data()
    learn = make_learner(x, y)
    with learn.no_bar(): probe_irreducible(learn)
    before,after = capsys.readouterr().out.splitlines()
    assert "'columns'" in before and '120 rows' in before and 'MiB' in before and 'training steps' in before
    assert 'Held-out accuracy' in after and 'by chance' in after
    probe_irreducible(learn, **quiet)
    assert capsys.readouterr().out == ''

def test_cost_by_counts():
    x,y = torch.rand(640, 3, 32, 32),torch.randint(0, 10, (640,))
    learn = make_learner(x, y, model=small_cnn(10), bs=32)
    patches,body,folds = probe_cost(learn),probe_cost(learn, features='body'),probe_cost(learn, folds=5)
    assert patches.bytes == 640*patches.dim*4 and not patches.forward and body.forward and folds.steps < patches.steps
    assert body.steps > 640/32/3 # at least a forward pass over the data

# ---- a look at some rows, and then at all

class Counted(TensorDataset):
    "How often was each row read?"
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.reads = torch.zeros(len(tensors[0]), dtype=torch.long)

    def __getitem__(self, i):
        self.reads[i] += 1
        return super().__getitem__(i)

def counted(kind, n=640):
    "A Learner on rows of a kind whose reads are counted, the names of its features the first of which is the kind's"
    generator = torch.Generator().manual_seed(3)
    y,model = torch.randint(0, 3, (n,), generator=generator),nn.Linear(5, 3)
    x = torch.randn(n, 5, generator=generator) + y[:,None]
    if kind in ('patches', 'body'):
        x,model = torch.rand(n, 3, 8, 8, generator=generator) + 0.3*y[:,None,None,None],small_cnn(3, 3, 8)
    if kind == 'tfidf':
        x = torch.randint(2, 40, (n, 9), generator=generator) + 5*y[:,None]
        model = nn.Sequential(nn.Embedding(60, 4), nn.Flatten(), nn.Linear(36, 3))
    learn = make_learner(x, y, model=model)
    learn.dls.train.dataset = Counted(x, y)
    return learn

def dataset(learn): return learn.dls.train.dataset

@pytest.mark.parametrize('features', ['patches', 'body', 'tfidf', 'columns', 'own', 'numbers'])
@pytest.mark.parametrize('folds', [None, 4])
@pytest.mark.many(5)
def test_a_row_is_read_once_for_a_look_and_for_all(features, folds):
    "And what is said of all is what is said without a look before"
    own = dict(own=lambda x: torch.cat([x, x**2], 1), numbers=torch.randn(320, 7))
    learn,asked = counted(features, 320),own.get(features, features)
    expected = Probe(learn, features=asked).predictions(folds=folds, **quiet)
    probe = Probe(learn, features=asked)
    assert probe.cost().n_read == 0 and probe.cost(50).steps < probe.cost().steps
    dataset(learn).reads.zero_()
    looks = [probe.predictions(n, **quiet) for n in (150, 60, 200, 150)]
    assert [len(o) for o in looks] == [150, 60, 200, 150] and torch.equal(looks[0].rows, looks[3].rows)
    assert all(set(looks[1].rows.tolist()) <= set(o.rows.tolist()) <= set(looks[2].rows.tolist()) for o in looks)
    assert dataset(learn).reads.max() == 1 and dataset(learn).reads.sum() == probe.cost().n_read == 200
    left,found,again = probe.cost(),*(probe.predictions(folds=folds, **quiet) for _ in range(2))
    assert dataset(learn).reads.eq(1).all() and again.logits is found.logits
    assert left.steps < probe_cost(learn, features=asked).steps if features in ('patches', 'body') else left.steps
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.targets, expected.targets)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(looks[0].logits, probe_predictions(learn, features=asked, n_rows=150, **quiet).logits,
                               rtol=1e-3, atol=1e-3)

def test_a_trial_reads_for_the_look_too():
    "Two kinds of features, each read once, and the winner's algebra is not done twice"
    learn = counted('body')
    nn.init.uniform_(next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)).weight)
    assert choose_features(learn)[0] == ['body', 'patches']
    probe = Probe(learn)
    probe.cost()
    dataset(learn).reads.zero_()
    look,found = probe.predictions(400, **quiet),probe.predictions(**quiet)
    assert dataset(learn).reads.eq(1).all() and probe.features == look.info['features'] == found.info['features']
    assert 'trial on 400 rows' in probe.why and set(probe._solutions) == {
        ('body', 400, None), ('patches', 400, None), (probe.features, 640, None)}

def test_a_probe_of_some_rows_only_says_what_is_left(capsys):
    learn = counted('columns')
    probe = Probe(learn)
    probe.predictions(200, progress=False)
    probe.predictions(progress=False)
    first,_,then,_ = capsys.readouterr().out.splitlines()
    assert '200 rows' in first and 'one pass over the data' in first
    assert '640 rows' in then and 'one pass over the 440 of them that are not read yet' in then

def test_an_interrupted_trial_is_no_choice(monkeypatch):
    learn = counted('body')
    nn.init.uniform_(next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)).weight)
    probe,solve = Probe(learn),Probe._solve
    monkeypatch.setattr(Probe, '_solve', lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): probe.predictions(400, **quiet)
    monkeypatch.setattr(Probe, '_solve', solve)
    assert probe.features == 'auto'
    probe.predictions(400, **quiet)
    assert 'trial on 400 rows' in probe.why

def test_an_interrupted_reading_is_begun_again():
    learn,n = counted('columns'),[0]
    def features(x):
        n[0] += 1
        if n[0] == 3: raise KeyboardInterrupt
        return x
    probe = Probe(learn, features=features)
    with pytest.raises(KeyboardInterrupt): probe.predictions(**quiet)
    found,expected = (o.predictions(**quiet) for o in (probe, Probe(learn, features=lambda x: x)))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.targets, expected.targets)

@pytest.mark.parametrize('folds', [None, 4])
def test_few_rows_with_a_trial_are_read_once(folds):
    "The trial takes all of them, and leaves the winner's features"
    learn = counted('body')
    nn.init.uniform_(next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)).weight)
    probe = Probe(learn)
    probe.cost()
    dataset(learn).reads.zero_()
    found = probe.predictions(folds=folds, **quiet)
    assert dataset(learn).reads.eq(1).all() and set(probe._known) <= {probe.features}
    alone = probe_predictions(learn, features=probe.features, folds=folds, **quiet)
    torch.testing.assert_close(found.logits, alone.logits, rtol=1e-3, atol=1e-3)

def test_what_was_read_of_a_model_goes_once_it_has_learnt():
    learn = counted('body')
    probe = Probe(learn, features='body')
    probe.predictions(300, **quiet)
    fit(learn, 1)
    found,expected = (o.predictions(**quiet) for o in (probe, Probe(learn, features='body')))
    torch.testing.assert_close(found.logits, expected.logits)

def test_a_look_is_held_in_full_precision(monkeypatch):
    "And takes its own room alone, where all rows would be held in half"
    import rholoss_fastai.probe as module
    monkeypatch.setattr(module, '_in_half', lambda n, dim: n > 500)
    learn = counted('columns')
    expected = probe_predictions(learn, features=lambda x: x*1e5, n_rows=300, **quiet) # more than half precision has
    assert expected.info['accuracy'] > 0.5
    probe = Probe(learn, features=lambda x: x)
    probe.predictions(300, **quiet)
    assert probe._by(probe.features).x.shape == (300, 5) and probe._by(probe.features).x.dtype == torch.float32
    rows,x,_ = module.probe_features(learn, features=lambda x: x*1e5, progress=False)
    assert torch.equal(x, learn.dls.train.dataset.tensors[0][rows]*1e5)

# ---- which features

def test_auto():
    x,y = data()
    assert choose_features(make_learner(x, y))[0] == ['columns']
    images,labels = torch.rand(32, 3, 16, 16),torch.randint(0, 2, (32,))
    fresh = small_cnn(2, 3, 16)
    assert choose_features(make_learner(images, labels, model=fresh))[0] == ['patches']
    trained = small_cnn(2, 3, 16)
    for m in trained.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight)
    assert choose_features(make_learner(images, labels, model=trained))[0] == ['body', 'patches']
    large = torch.rand(32, 3, 80, 80)
    assert choose_features(make_learner(large, labels, model=small_cnn(2, 3, 80)))[0] == []
    with pytest.raises(ValueError, match='No features are at hand.*crossfit_irreducible'):
        probe_irreducible(make_learner(large, labels, model=small_cnn(2, 3, 80)), **quiet)

def test_auto_does_not_trust_what_was_fitted_on_these_labels():
    images,labels = torch.rand(64, 3, 16, 16),torch.randint(0, 2, (64,))
    learn = make_learner(images, labels, model=small_cnn(2, 3, 16))
    fit(learn, 1)
    assert is_trained(learn.model) and choose_features(learn)[0] == ['patches']

def test_auto_knows_of_a_copy_that_it_was_fitted():
    "Of a Recorder fastai copies and exports no values"
    learn = make_learner(torch.rand(64, 3, 16, 16), torch.randint(0, 2, (64,)), model=small_cnn(2, 3, 16))
    learn.opt_func = SGD # it keeps no state that would tell
    assert choose_features(deepcopy(learn))[0] == choose_features(learn)[0]
    fit(learn, 1)
    assert choose_features(deepcopy(learn))[0] == ['patches']

def test_a_trial_decides_between_body_and_patches():
    "The class is in the second channel; one body sees only that, another only the first"
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (200,), generator=generator)
    x = torch.rand(200, 2, 8, 8, generator=generator)
    x[:,1] += y[:,None,None]
    for channel,expected in ((1, 'body'), (0, 'patches')):
        body = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(4, 2))
        nn.init.uniform_(body[1].weight)
        with torch.no_grad(): body[0].weight[:,1-channel] = 0
        if expected == 'body': x = x + 0.5*torch.randn(x.shape, generator=generator)
        assert probe_irreducible(make_learner(x, y, model=body),
                                 **quiet).info['features'] == expected or expected == 'body'

def test_body_of_a_new_head_is_the_pooled_body():
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 2))
    model,x = nn.Sequential(body, head).eval(),torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(BodyInputs(model)(model, (x,)), body(x), rtol=1e-3, atol=1e-3)
        nn.init.uniform_(head[0].weight), nn.init.uniform_(head[3].weight) # now it was trained too
        torch.testing.assert_close(BodyInputs(model)(model, (x,)), model[:1](x).new_tensor(head[:4](body(x))))

def test_body_without_a_linear_layer():
    x,y = torch.rand(32, 3, 8, 8),torch.randint(0, 2, (32,))
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="no nn.Linear.*features='patches'"):
        probe_irreducible(make_learner(x, y, model=model), features='body', **quiet)

def test_features_of_another_kind_of_input():
    x,y = data()
    with pytest.raises(ValueError, match='expected images'):
        probe_irreducible(make_learner(x, y), features='patches', **quiet)
    with pytest.raises(ValueError, match="features must be one of.*Did you mean 'patches'"):
        probe_irreducible(make_learner(x, y), features='patch', **quiet)

@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 32, 48), (4, 64, 64), (3, 5, 5), (1, 3, 3)])
def test_patches_of_images_of_any_size(shape):
    images = torch.rand(40, *shape)
    found = RandomPatches(images, n_filters=8)(images)
    assert found.shape == (40, 64) and found.isfinite().all()
    as_bytes = RandomPatches((255*images).byte(), n_filters=8)((255*images).byte())
    assert torch.corrcoef(torch.stack([found.flatten(), as_bytes.flatten()]))[0,1] > 0.99

@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 12, 21), (3, 16, 16)])
def test_patches_are_those_of_the_formula(shape):
    "Each patch in its own units, answers beyond the threshold on either side, means over the quarters of the image"
    images = torch.randn(20, *shape)
    patches = RandomPatches(images, n_filters=6)
    small = patches._small(images).double()
    cut = F.unfold(small, 4).transpose(1, 2) # (bs, places, channels*4*4)
    cut = cut - cut.mean(2, keepdim=True)
    cut = cut/(cut.var(2, keepdim=True) + 0.05).sqrt()
    answers = (cut @ patches.filters.double().flatten(1).T).transpose(1, 2)
    answers = torch.cat([(answers - 0.25).relu(), (-answers - 0.25).relu()], 1)
    answers = answers.unflatten(2, [n - 3 for n in small.shape[2:]])
    torch.testing.assert_close(patches(images).double(), F.adaptive_avg_pool2d(answers, 2).flatten(1), atol=1e-5,
                               rtol=1e-4)

def text_dls(n=200):
    rng = random.Random(0)
    def text(label):
        return ' '.join(rng.choice(('good fine great', 'bad poor awful')[label if rng.random() < 0.8
                                                                         else 1-label].split()) for _ in range(6))
    frame = pd.DataFrame([dict(text=text(i % 2), label='ab'[i % 2]) for i in range(n)])
    return TextDataLoaders.from_df(frame, valid_pct=0.1, seed=0, text_col='text', label_col='label',
                                   tok_tfm=BaseTokenizer(), bs=16,
                                    num_workers=0), frame

@pytest.mark.slow
def test_texts():
    dls,_ = text_dls()
    learn = Learner(dls, nn.Sequential(nn.Embedding(100, 4), nn.Flatten(), nn.LazyLinear(2)),
                    loss_func=CrossEntropyLossFlat())
    assert choose_features(learn)[0] == ['tfidf']
    il = probe_irreducible(learn, **quiet)
    assert il.info['features'] == 'tfidf' and il.info['accuracy'] > 0.85 and len(il) == 180

def test_padding_is_no_word():
    texts = [torch.tensor(o) for o in ([3, 4, 5], [4, 5], [3, 6, 7], [6, 7])]*10
    class Texts:
        def __len__(self): return len(texts)
        def __getitem__(self, i): return texts[i], torch.tensor(i % 4//2)
    def padded(batch):
        size = max(len(x) for x,_ in batch)
        return torch.stack([F.pad(x, (0, size-len(x)), value=1) for x,_ in batch]), torch.stack([y for _,y in batch])
    dls = DataLoaders(*(DataLoader(Texts(), bs=4, shuffle=True, create_batch=padded) for _ in range(2)), device='cpu')
    learn = Learner(dls, nn.Linear(1, 1), loss_func=CrossEntropyLossFlat())
    found = probe_irreducible(learn, **quiet)
    expected = probe_irreducible(learn, features=text_features([o.numpy() for o in texts]), **quiet)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-4)

def test_dicts_of_tokens():
    ids = torch.tensor([[3, 4, 0], [4, 3, 5], [6, 7, 0], [7, 6, 8]]).repeat(10, 1)
    class Texts:
        def __len__(self): return 40
        def __getitem__(self, i):
            return dict(input_ids=ids[i], attention_mask=(ids[i] > 0).long(), labels=torch.tensor(i % 4//2))
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(3, 2)
        def forward(self, batch): return self.layer(batch['input_ids'].float())
    dls = DataLoaders(*(DataLoader(Texts(), bs=8) for _ in range(2)), device='cpu')
    il = probe_irreducible(Learner(dls, Model(), loss_func=CrossEntropyLossFlat()), **quiet)
    assert il.info['features'] == 'tfidf' and il.info['accuracy'] == 1

def test_tables():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(kind=rng.choice(list('abc'), 300), size=rng.normal(size=300)*100 + 1e4))
    frame['label'] = np.where((frame['kind'] == 'a') ^ (frame['size'] > 1e4), 'yes', 'no') # neither column tells alone
    table = TabularPandas(frame, [Categorify, Normalize], ['kind'], ['size'], 'label',
                          splits=(list(range(250)), list(range(250, 300))))
    dls = table.dataloaders(bs=32, num_workers=0)
    learn = Learner(dls, nn.Linear(1, 2), loss_func=CrossEntropyLossFlat())
    assert choose_features(learn)[0] == ['columns']
    il = probe_irreducible(learn, **quiet)
    assert il.info['accuracy'] > 0.9 and len(il) == 250

# ---- refreshing

def test_averaged_with_earlier_ones():
    x,y = data()
    learn = make_learner(x, y)
    old,new = (probe_irreducible(learn, features=o, **quiet) for o in (x[:,:2], x[:,2:]))
    both = probe_irreducible(learn, features=x[:,2:], average_with=old, **quiet)
    torch.testing.assert_close(both.p_il, (old.p_il + new.p_il)/2)
    other = make_learner(*data(seed=5))
    with pytest.raises(ValueError, match='another data set'): probe_irreducible(other, average_with=old, **quiet)

# ---- inputs that are bad

def test_fewer_rows_than_features():
    x,y = data(40, 200)
    il = probe_irreducible(make_learner(x, y), features=lambda x: x, **quiet)
    assert il.values.isfinite().all() and il.info['dim'] == 200

def never(*xb): raise AssertionError('nothing should have been spent')

def test_one_class():
    x,_ = data()
    with pytest.raises(ValueError, match='All 120 targets are alike'):
        probe_irreducible(make_learner(x, torch.ones(120, dtype=torch.long)), features=never, **quiet)

def test_a_class_of_one_row():
    x,y = data()
    y[17] = 3
    il = probe_irreducible(make_learner(x, y), features='columns', **quiet)
    assert il.values.isfinite().all() and il.values.argmax() == 17

def test_constant_features():
    x,y = data()
    constant = torch.cat([x, torch.full((120, 2), 7e8)], 1)
    expected,il = (probe_irreducible(make_learner(x, y), features=o, **quiet) for o in (x, constant))
    assert il.values.isfinite().all() and abs(il.info['accuracy'] - expected.info['accuracy']) < 0.05
    il = probe_irreducible(make_learner(x, y), features=torch.ones(120, 3), **quiet)
    shares = smoothed_shares(y, 3)
    torch.testing.assert_close(il.values, -shares.log()[y], rtol=0, atol=2e-2)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_features_that_are_no_numbers(value):
    x,y = data()
    x[100,2] = value
    with pytest.raises(ValueError, match=r'1 of 120 rows have features that are NaN or infinite, the first \[100\]'):
        probe_irreducible(make_learner(x, y), features=lambda x: x, **quiet)

def test_many_rows_are_kept_in_half_precision(monkeypatch):
    "As of 2 GiB of features, here of far less"
    import rholoss_fastai.probe as probe
    x,y = data(2000, 30)
    learn = make_learner(x, y, bs=256)
    whole = probe_irreducible(learn, features=lambda x: x, **quiet)
    monkeypatch.setattr(probe, '_in_half', lambda n, dim: True)
    kept = []
    monkeypatch.setattr(probe, 'check_features', lambda x, **kwargs: kept.append(x.dtype))
    half = probe_irreducible(learn, features=lambda x: x, **quiet)
    assert kept[-1] == torch.float16
    torch.testing.assert_close(half.values, whole.values, rtol=0.05, atol=0.02)

@pytest.mark.slow
def test_a_thousand_classes():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2500) % 1000
    x = torch.randn(1000, 40, generator=generator)[y] + 0.1*torch.randn(2500, 40, generator=generator)
    il = probe_irreducible(make_learner(x, y, 1000, bs=500), features=lambda x: x, **quiet)
    assert il.info['accuracy'] > 0.2 and il.values.isfinite().all()

def test_an_iterable_data_set():
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(*data()))
    x,y = data()
    with pytest.raises(ValueError, match='no length'):
        probe_irreducible(make_learner(x, y), TorchDataLoader(Stream(), batch_size=8), features=never, **quiet)

def test_auto_knows_what_no_features_predict():
    "Small images, whose targets are pixels, or several: these are for cross-fitting"
    x,y = torch.rand(32, 3, 8, 8),torch.randint(0, 2, (32,))
    assert choose_features(make_learner(x, y, model=small_cnn(2, 3, 8)))[0] == ['patches']
    names,why = choose_features(make_learner(x, (x[:,0] > 0.5).long(), model=nn.Conv2d(3, 2, 1)))
    assert names == [] and 'pixels' in why
    two = make_learner(x, y, model=small_cnn(2, 3, 8))
    two.dls = DataLoaders(*[DataLoader(TensorDataset(x, y, y), bs=16)]*2, device='cpu')
    two.dls.train.n_inp = 1
    assert choose_features(two)[0] == []

def test_targets_that_are_pixels():
    x = torch.rand(16, 3, 8, 8)
    learn = make_learner(x, torch.randint(0, 2, (16, 8, 8)), model=nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match='pixels.*crossfit_irreducible'):
        probe_irreducible(learn, features=never, **quiet)

def test_two_targets():
    x,y = data()
    dl = DataLoader(TensorDataset(x, y, y), bs=16, n_inp=1)
    dl.n_inp = 1
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.Linear(6, 3),
                    loss_func=lambda pred, a, b: F.cross_entropy(pred, a))
    with pytest.raises(ValueError, match='2 targets: expected one'): probe_irreducible(learn, features=never, **quiet)

def test_one_row():
    x,y = data()
    learn = make_learner(x, y)
    with pytest.raises(ValueError, match='1 row'):
        probe_irreducible(learn, restrict_rows(learn.dls.train, [3]), features=never, **quiet)

@pytest.mark.parametrize('kwargs,message', [(dict(folds=1), 'folds'), (dict(folds=2.5), 'folds')])
def test_arguments_are_checked_when_called(kwargs, message):
    x,y = data()
    with pytest.raises((ValueError, TypeError), match=message):
        probe_irreducible(make_learner(x, y), features=never, **kwargs, **quiet)

def test_more_folds_than_rows():
    x,y = data(12)
    with pytest.raises(ValueError, match='folds=20'):
        probe_irreducible(make_learner(x, y, bs=4), features='columns', folds=20, **quiet)

def test_no_learner():
    with pytest.raises(TypeError, match='learn must be a Learner or DataLoaders; got list'):
        probe_predictions([], **quiet)

# ---- real data

@pytest.fixture(scope='session')
def cifar(shared_data, tmp_path_factory):
    "3000 training images of CIFAR-10, 300 of each class, as bytes"
    import tarfile

    from PIL import Image
    archive,rows = shared_data/'cifar10_jpeg.tar.xz',{}
    if not archive.exists(): pytest.skip('no CIFAR-10 in the shared data')
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split('/')
            if len(parts) == 4 and parts[1] == 'train' and len(rows.setdefault(parts[2], [])) < 300:
                rows[parts[2]].append(np.array(Image.open(tar.extractfile(member))))
            if parts[1:2] == ['train'] and len(rows) == 10 and all(len(o) == 300 for o in rows.values()): break
    images = torch.from_numpy(np.concatenate([np.stack(rows[k]) for k in sorted(rows)])).permute(
        0, 3, 1, 2).contiguous()
    return images, torch.arange(10).repeat_interleave(300)

@pytest.mark.slow
def test_patches_tell_wrong_labels_of_cifar10(cifar):
    images,targets = cifar
    labels,wrong = redraw_labels(targets, 0.2, seed=0)
    learn = make_learner(images.float()/255, labels, model=small_cnn(10), bs=100)
    il = probe_irreducible(learn, **quiet)
    assert il.info['features'] == 'patches' and il.info['accuracy'] > 0.38 and auc(il.values, wrong) > 0.85


# ---- another device than the host

def test_values_may_stay_on_the_host(monkeypatch):
    "A batch's values in another place than the model, which stands on `meta` here for want of CUDA"
    monkeypatch.setattr(side_models, 'autocast', lambda *args: nullcontext())
    learn = make_learner(*data())
    learn.model.to('meta')
    rows = side_models.map_rows(learn, learn.dls.train, lambda model, xb, yb, rows: rows)
    assert torch.equal(rows, torch.arange(120))

@pytest.mark.cuda
@pytest.mark.parametrize('features', ['columns', 'auto', lambda x: x.cpu()])
def test_a_probe_on_cuda(features):
    learn = make_learner(*data())
    host = probe_irreducible(learn, features=features, **quiet)
    learn.dls.to('cuda'); learn.model.to('cuda')
    assert torch.allclose(probe_irreducible(learn, features=features, **quiet).values, host.values, atol=1e-3)
