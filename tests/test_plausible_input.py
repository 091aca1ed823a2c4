"""What somebody with a notebook types: it does what it says, or says what to type instead, and typing that works."""
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.data import TabularDataLoaders
from helpers import N_CLASSES, Toy, fit, learner, linear, loaders, mlp, weights_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from rholoss_fastai.all import *  # noqa: F403 (what it brings is tested)
from rholoss_fastai.all import ItemLosses, LossHistory, label_probability, probe_predictions, restrict_rows
from rholoss_fastai.loaders import with_loaders


def numbers(x, classes): return x[:, 0]*2
def large(n=400, **kwargs): return loaders(train=Toy(n, **kwargs), valid=Toy(48, 1, **kwargs))
def torch_loaders(): return DataLoaders(TorchDataLoader(Toy(400), 24, shuffle=True), TorchDataLoader(Toy(48, 1), 24))

class Stream(IterableDataset):
    def __iter__(self): return iter([Toy()[i] for i in range(72)])
class Counted(Stream):
    def __len__(self): return 72
def stream(data): return DataLoaders(TorchDataLoader(data, 24), TorchDataLoader(Toy(24, 1), 24))

def refused(learn, *words, n_epoch=2):
    "The Learner refuses to fit before its first step, and says this; what it says"
    before = weights_of(learn)
    with pytest.raises(ValueError) as e: fit(learn, n_epoch)
    assert torch.equal(before, weights_of(learn))
    for word in words: assert word in str(e.value)
    return str(e.value)


def test_star_import_brings_what_the_pages_name():
    assert {'LossHistory', 'ByHistory', 'TeacherIL', 'label_noise'} <= set(globals())

@pytest.mark.parametrize('method', 'select rho_loss batch_loss_filter selective_backprop reducr rho_epochs one_pass'
                         .split())
def test_a_misspelt_argument_is_named_with_the_nearest(method):
    with pytest.raises(TypeError, match=f"{method} has no argument 'sead'"): getattr(learner(), method)(sead=1)
def test_nearest():
    with pytest.raises(TypeError, match="'fracc'. Did you mean 'frac'"): learner().rho_loss(fracc=0.1)
    with pytest.raises(TypeError, match="'explor'. Did you mean 'explore'"): learner().rho_epochs(explor=0.1)
    with pytest.raises(ValueError, match="Did you mean 'body'"): learner().rho_epochs(features='bdy')


# Loaders

def test_streams():
    "The way out fits the method, and works"
    refused(learner(stream(Counted())).rho_loss(), 'pass a module or a Learner as il=')
    refused(learner(stream(Counted())).rho_loss(linear()), 'pass enlarge=False')
    assert fit(learner(stream(Counted())).rho_loss(linear(), enlarge=False)).selection.total('trained') == 36
    for add in (lambda l: l.select(unit='token'), lambda l: l.select()):
        learn = learner(stream(Stream()))
        add(learn)
        refused(learn, '__len__')

@pytest.mark.parametrize('add', [lambda l: l.select(unit='token'), lambda l: l.select(), lambda l: l.prune_epochs()])
def test_no_batch(add):
    learn = learner(DataLoaders(DataLoader(Toy(20), bs=24, shuffle=True, drop_last=True), DataLoader(Toy(20), bs=24)))
    add(learn)
    refused(learn, 'drop_last=False')

def test_probe_of_torch_loaders():
    learn = learner(torch_loaders()).reducr()
    assert fit(learn).selection.total('trained') > 0
    found = probe_predictions(learner(torch_loaders()), verbose=False)
    assert found.logits.shape == (400, 3)


# Targets and losses

@pytest.mark.parametrize('targets, loss_func, n_out', [
    (numbers, MSELossFlat(), 1), (lambda x, c: (c > 0).float()[:, None], BCEWithLogitsLossFlat(), 1),
    (lambda x, c: (x[:, :3] > 0).float(), BCEWithLogitsLossFlat(), 3), (lambda x, c: c*0, None, 3)])
def test_reducr_needs_classes(targets, loss_func, n_out):
    refused(learner(large(targets=targets), lambda: linear(n_out), loss_func).reducr(), 'class')

def test_reducr_where_training_misses_a_class():
    "Of a class that only validation has, nothing is known: it is left out of what the others are judged by"
    data = Toy(400)
    some = [data[i] for i in range(400) if data.y[i] < 2]
    learn = learner(DataLoaders(DataLoader(some, bs=24, shuffle=True), DataLoader(Toy(48, 1), bs=24))).reducr(frac=0.5)
    assert fit(learn).selection.total('trained') > 0 and len(learn.selector.pick.class_weights) == 2

class Same(nn.Module):
    def __init__(self, value): super().__init__(); self.value = value
    def forward(self, pred, targ): return F.cross_entropy(pred, targ)*0 + self.value

@pytest.mark.parametrize('value', [0., 3.])
@pytest.mark.parametrize('add', [lambda l: l.select(), lambda l: l.select(forward='reuse'), lambda l: l.prune_epochs(),
                                 lambda l: l.add_cb(LossHistory())])
def test_a_loss_that_never_moves(value, add):
    learn = learner(loss_func=Same(value))
    add(learn)
    refused(learn, 'whatever the model predicts', "learn.select(pick='uniform')")

@pytest.mark.parametrize('pred', [torch.full((8, 1), 2.), torch.full((8, 1), 1e4)])
def test_a_hinge_that_all_items_are_beyond(pred):
    "is no fault of the loss"
    ItemLosses(lambda p, t: (1 - p).relu().mean()).check(None, pred, torch.zeros(8))

def test_nan_of_one_row_is_told_of_that_row():
    data = Toy(400)
    data.x[123, 0] = float('nan')
    said = refused(learner(loaders(train=data)).rho_loss('probe', gate=False), '1 of 400 rows', '[123]')
    assert 'FillMissing' in said
    dls = loaders(train=data)
    part = with_loaders(dls, [restrict_rows(dls.train, range(100, 300))])
    with pytest.raises(ValueError, match=r'1 of 200 rows .* the first \[123\]'):
        probe_predictions(learner(part), verbose=False)


# `rho_epochs`

def said(learn, n_epoch=1):
    lines = []
    learn.logger = lambda *o, **kwargs: lines.append(' '.join(map(str, o)))
    with learn.no_bar(): learn.fit(n_epoch)
    return '\n'.join(lines)

def test_says_what_it_leaves_out():
    "of no class more than half, whatever `drop` is"
    il = torch.rand(72)
    learn = learner().rho_epochs(il, drop=1., gate=False)
    assert 'leaves out the 50%' in said(learn) or 'leaves out the 49%' in said(learn)
    assert 'leaves out the 25%' in said(learner().rho_epochs(il, drop=0.25, gate=False))

def test_scale_of_a_restricted_training_set():
    "Rows that are left out are no part of the mean irreducible loss"
    dls = large(targets=numbers)
    part = with_loaders(dls, [restrict_rows(dls.train, range(0, 400, 2))])
    il = torch.arange(400.)
    il[1::2] = 1e6
    learn = learner(part, lambda: linear(1), MSELossFlat()).rho_epochs(il, drop=0.2, gate=False)
    assert fit(learn).epoch_pruner.rule.scale == pytest.approx(199.)

class Likelihood(nn.Module):
    "Below 0, as densities' are"
    def forward(self, pred, targ): return (pred.view(-1) - targ).square().mean() - 5.

def test_losses_below_0():
    "The best known counts as no loss, so that probabilities stay between 0 and 1 and rank as the losses do"
    il = torch.linspace(-5, 1, 72)
    dls = loaders(train=Toy(targets=numbers), valid=Toy(24, 1, targets=numbers))
    learn = learner(dls, lambda: linear(1), Likelihood())
    fit(learn.rho_epochs(il, drop=0., keep=0.5, explore=0., gate=False, epoch='rows'), 1)
    rule = learn.epoch_pruner.rule
    p = label_probability(il, torch.zeros(72, 1), torch.rand(72), rule.scale, rule.low)
    assert rule.low == -5 and rule.scale == pytest.approx(3.) and p[0] == 1 and (p.diff() < 0).all() and p.min() > 0
    assert label_probability(torch.tensor([-9.]), torch.zeros(1, 1), torch.rand(1), 3., -5.).item() == 1
    # at first nothing is remembered: the half of the lowest irreducible loss, filled up to whole batches
    assert learn.selection.selected[:36].all()


# Histories

def test_suspects_by_each_reading():
    "of wrong labels: low margins, high variance, learnt late, forgotten often; of functions the lowest"
    wrong = torch.rand(400, generator=torch.Generator().manual_seed(3)) < 0.15
    history = LossHistory()
    learn = learner(large(targets=lambda x, c: torch.where(wrong[:len(c)] if len(c) == 400 else torch.zeros(len(c)) > 0,
                                                           (c + 1) % N_CLASSES, c)), mlp, cbs=history)
    fit(learn, 6)
    for reading in ('aum', 'first_learnt', 'forgetting'):
        assert wrong[history.suspects(40, reading).row.tolist()].float().mean() > 2*wrong.float().mean()
    for reading, sign in dict(variance=-1, first_learnt=-1, forgetting=-1, aum=1, alignment=1).items():
        values = torch.tensor(history.suspects(400, reading)[reading].to_numpy())*sign
        assert (values.diff() >= 0).all()
    def last(losses): return -losses[-1]
    found = history.suspects(10, last)
    assert sorted(found.row) == sorted(history.losses[-1].topk(10).indices.tolist()) and 'last' in found
    assert history.scores(lambda losses: losses[-1]).info['score'] == '<lambda>'


# Weighted loaders

def test_weighted_loaders_are_pruned_and_weighted_again():
    "Of the chosen rows each is drawn by its weight; weights multiply"
    weights = torch.ones(72)
    weights[:8] = 0.
    weights[8:16] = 8.
    for add in (lambda l: l.prune_epochs('random', keep=0.5),
                lambda l: l.rho_epochs(torch.rand(72), drop=0.2, gate=False)):
        learn = learner(weighted_loaders(loaders(), weights))  # noqa: F405
        add(learn)
        counts = fit(learn, 8).selection.selected
        assert not counts[:8].any() and counts[8:16].float().mean() > 2*counts[16:].float().mean()
    twice = weighted_loaders(weighted_loaders(loaders(), weights), weights).train  # noqa: F405
    torch.testing.assert_close(torch.tensor(twice.wgts), (weights*weights/(weights*weights).sum()).double())


# What is not what was meant

def test_a_learner_where_new_ones_are_made():
    "A Learner is no function that makes one, and the function that is named does"
    learn = learner()
    with pytest.raises(TypeError, match='such as learner_copies'): score_dataset(learn, learn.dls, n_runs=1)  # noqa: F405
    scores = score_dataset(learner_copies(learn), learn.dls, epochs=1, n_runs=1, progress=False)  # noqa: F405
    assert len(scores) == 72

@pytest.mark.parametrize('call', [
    lambda f, dls: score_dataset(f, dls, n_runs=1), lambda f, dls: compare(f, dls, ('rho_epochs',), 2), # noqa: F405
    lambda f, dls: just_train_twice(f, dls, 1, 1, 5)], ids=['score_dataset', 'compare', 'just_train_twice']) # noqa: F405
def test_a_maker_of_learners_that_takes_no_loaders(call):
    with pytest.raises(TypeError, match="such as `def make_learner\\(dls\\)"): call(lambda: learner(), loaders())

def test_a_strategy_in_the_place_of_scores():
    with pytest.raises(ValueError, match="prune\\(dls, scores, strategy='random'\\)"): prune(loaders(), 'random')  # noqa: F405
    assert len(prune(loaders(), torch.rand(72), strategy='random').train_ds) == 36  # noqa: F405

def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no file .*none.safetensors: expected one that'):
        learner().rho_loss(tmp_path/'none.safetensors')

def test_suspects_of_a_table_of_data():
    "Rows of a data frame can't be drawn: they are listed, by their index in the frame"
    random = np.random.default_rng(0)
    frame = pd.DataFrame(dict(number=random.normal(size=120), kind=random.choice(list('xyz'), 120)),
                         index=np.arange(120)[::-1] + 1000)
    frame['label'] = np.where(frame.number > 0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(frame, procs=[Categorify, Normalize], cat_names=['kind'], cont_names=['number'],
                                     y_names='label', y_block=CategoryBlock(), valid_idx=list(range(100, 120)), bs=16)
    found = label_noise(dls).show(4)  # noqa: F405
    assert len(found) == 4 and frame.label[found['index']].tolist() == found.label.tolist()

@pytest.mark.parametrize('features', [None, ['body'], {'body': 1}])
def test_features_that_are_no_features(features):
    with pytest.raises(TypeError, match="features must be 'auto', one of 'body', .* or one line of numbers"):
        probe_predictions(learner(), features=features, progress=False)

def test_a_history_before_its_fit():
    with pytest.raises(ValueError, match='fit with this callback first'): LossHistory().suspects()

def test_what_stands_where_a_loader_is_expected():
    learn = learner()
    for o in ('columns', numbers): # the features, in the loader's place
        with pytest.raises(TypeError, match='dl must be the training DataLoader, .* features='): label_noise(learn, o)  # noqa: F405
    assert len(label_noise(learn, features='columns', verbose=False, progress=False).suspects(72)) == 72  # noqa: F405
    for ask in (lambda dl: el2n(learn, dl), lambda dl: relabel(dl, [0]*72)):  # noqa: F405
        with pytest.raises(TypeError, match='pass the training set.s, dls.train'): ask(learn.dls)
        ask(learn.dls.train)

def test_yes_and_no_are_two_classes():
    "Where no loss says what booleans are, as of DataLoaders alone"
    found = []
    for dtype in (torch.bool, torch.int64):
        dls = loaders(train=Toy(120, targets=lambda x, classes, dtype=dtype: (classes == 1).to(dtype)))
        found.append(label_noise(dls, verbose=False, progress=False))  # noqa: F405
    assert torch.equal(found[0].predictions.logits, found[1].predictions.logits) and found[0].share == found[1].share
    assert found[0].suspects(9).equals(found[1].suspects(9))
