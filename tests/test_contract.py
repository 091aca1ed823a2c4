"""What every method keeps to, a line of METHODS each: the loop stays fastai's, and nothing is left behind."""
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback, event
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from helpers import Interrupt, N, Noted, Toy, fit, learner, linear, loaders, mlp, no_trace, on_cuda, weights_of

import rholoss_fastai
from rholoss_fastai.all import (
    GroupDRO,
    ImportanceSample,
    IrreducibleLosses,
    PerClass,
    RowWeights,
    ThenUniform,
    TopFraction,
    grand,
    irreducible_losses,
)

IL = torch.rand(N, generator=torch.Generator().manual_seed(4))


@dataclass
class Method:
    add: Callable # of a Learner: so that something is left out, or weighed
    whole: Callable = None # of a Learner: so that every item is trained on as in plain training; None: it can't be
    undo: str|type = 'no_selection' # method of the Learner, or class of the callback
    exact: bool = True # is `whole` bit for bit plain training? A weighted loss is computed in another order
    mixup: bool = True # goes with MixUp?
    others: bool = True # goes with what else changes the rate?
    acts: bool = True # otherwise than plain training within three epochs?
    rows: bool = True # counts rows, so has a record


def select(score, pick, **kwargs):
    return Method(lambda l: l.select(score, pick, frac=0.5, **kwargs),
                  lambda l: l.select(score, pick, frac=1., **kwargs))
def by_object(pick, whole):
    return Method(lambda l: l.select('loss', pick()), whole and (lambda l: l.select('loss', whole())))
def pruned(rule, whole=None, acts=True, **kwargs):
    mixup = rule == 'random'
    return Method(lambda l: l.prune_epochs(rule, **kwargs), whole and (lambda l: l.prune_epochs(rule, **whole)),
                  'no_pruning', mixup=mixup, acts=acts)

def table(learn): return IrreducibleLosses.of(IL, learn.dls.train)


METHODS = dict(
    top=select('loss', 'top'),
    top_shared=Method(lambda l: l.select('loss', 'top', frac=0.5, forward='reuse'),
                      lambda l: l.select('loss', 'top', frac=1., forward='reuse'), mixup=False),
    top_enlarged=select('loss', 'top', enlarge=True),
    top_steps=select('loss', 'top', enlarge=True, epoch='steps'),
    top_stale=select('loss', 'top', staleness=2),
    entropy=select('entropy', 'top'),
    gradient_norm=select('gradient_norm', 'boltzmann'),
    uniform=select('loss', 'uniform'),
    per_class=by_object(lambda: PerClass(0.5), lambda: PerClass(1.)),
    then_uniform=by_object(lambda: ThenUniform(pick=TopFraction(0.5)), lambda: ThenUniform(pick=TopFraction(1.))),
    importance=Method(lambda l: l.select('gradient_norm', ImportanceSample(0.5)), mixup=False),
    batch_loss_filter=Method(lambda l: l.batch_loss_filter(0.5, warmup_epochs=0),
                             lambda l: l.batch_loss_filter(0.5, min_sample_perc=1., warmup_epochs=0)),
    filter_scaled=Method(lambda l: l.batch_loss_filter(0.5, warmup_epochs=0, scale_lr='linear'),
                         lambda l: l.batch_loss_filter(0.5, min_sample_perc=1., warmup_epochs=0, scale_lr='linear')),
    selective_backprop=Method(lambda l: l.selective_backprop(3., warmup_epochs=0),
                              lambda l: l.selective_backprop(0., warmup_epochs=0)),
    queue=Method(lambda l: l.selective_backprop(1., warmup_epochs=0, queue=True),
                 lambda l: l.selective_backprop(0., warmup_epochs=0, queue=True)),
    rho_table=Method(lambda l: l.rho_loss(IL, frac=0.5), lambda l: l.rho_loss(IL, frac=1.)),
    rho_within=Method(lambda l: l.rho_loss(IL, frac=0.5, enlarge=False),
                      lambda l: l.rho_loss(IL, frac=1., enlarge=False)),
    rho_model=Method(lambda l: l.rho_loss(linear(), frac=0.5), lambda l: l.rho_loss(linear(), frac=1.)),
    rho_beside=Method(lambda l: l.rho_loss(learner(), frac=0.5, update_il=True, track=dict(first=torch.arange(N) < 9),
                                           fallback='uniform')),
    tokens=Method(lambda l: l.select(unit='token', frac=0.5), lambda l: l.select(unit='token', frac=1.), mixup=False,
                  rows=False),
    proxy=Method(lambda l: l.select('loss', 'top', frac=0.5, proxy=learner(seed=3))),
    infobatch=pruned('infobatch', dict(ratio=0.), delta=1.),
    random=pruned('random', dict(keep=1.)),
    ies=pruned('ies', dict(threshold=0.), acts=False),
    seta=pruned('seta', dict(prune=0., window=1.)),
    rho_epochs=Method(lambda l: l.rho_epochs(table(l), drop=0.3, gate=False),
                      lambda l: l.rho_epochs(table(l), drop=0., by_memory=False, gate=False),
                      'no_pruning', mixup=False),
    row_weights=Method(lambda l: l.add_cb(RowWeights(torch.linspace(0.1, 3, N))),
                       lambda l: l.add_cb(RowWeights(torch.ones(N))), RowWeights,
                       exact=False, mixup=False, rows=False),
    group_dro=Method(lambda l: l.add_cb(GroupDRO((torch.arange(N) % 2).tolist())), None, GroupDRO, mixup=False,
                     rows=False),
    one_pass=Method(lambda l: l.one_pass('lr', every=1), lambda l: l.one_pass('lr', every=10**6, diverged=None),
                    'no_one_pass', exact=False, others=False,
                    rows=False),
)

METHOD = pytest.mark.parametrize('method', METHODS.values(), ids=list(METHODS))

LOADERS = partial(loaders, 36) # two batches an epoch

def with_method(method, whole=False, dls=LOADERS, **kwargs):
    learn = learner(dls, metrics=accuracy, **kwargs)
    (method.whole if whole else method.add)(learn)
    return learn

def undo(learn, method):
    if isinstance(method.undo, str): return getattr(learn, method.undo)()
    return learn.remove_cb(method.undo)

def own(learn): return [cb for cb in learn.cbs if type(cb).__module__.startswith('rholoss_fastai')]


# What else a user has in a fit: name -> function that returns callbacks

BESIDE = dict(nothing=list, mixup=lambda: [MixUp()],
              others=lambda: [GradientAccumulation(72), GradientClip(0.1), SaveModelCallback(with_opt=True),
                              ReduceLROnPlateau(patience=0),
                              EarlyStoppingCallback(patience=1)])

def run(learn, beside):
    fit(learn, 3, cbs=BESIDE[beside](), seed=1)
    # columns of its own come after
    return weights_of(learn), torch.get_rng_state(), [list(o[:3]) for o in learn.recorder.values]

@cache
def plain_run(beside, path): return run(learner(LOADERS, mlp, metrics=accuracy, path=path), beside)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('models')

@METHOD
@pytest.mark.parametrize('beside', BESIDE)
@pytest.mark.many(2)
def test_on_everything_is_plain_fastai(method, beside, folder):
    "Weights, buffers and random state after three epochs, bit for bit; a weighted loss to its last digits"
    if method.whole is None or not getattr(method, beside, True): pytest.skip('refused, or never on everything')
    plain, ours = plain_run(beside, folder), run(with_method(method, True, model=mlp, path=folder), beside)
    if method.exact: assert torch.equal(plain[0], ours[0]) and torch.equal(plain[1], ours[1]) and plain[2] == ours[2]
    torch.testing.assert_close(plain[0], ours[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain[2], ours[2], rtol=1e-4, atol=1e-5)

@METHOD
@pytest.mark.parametrize('beside', BESIDE)
@pytest.mark.many(2)
def test_beside_other_callbacks(method, beside, folder):
    "Trains otherwise than plain fastai does, on finite numbers; or refuses, by name, before the first step"
    learn = with_method(method, model=mlp, path=folder)
    before = weights_of(learn)
    if not getattr(method, beside, True):
        with pytest.raises(ValueError, match=dict(mixup='MixUp', others='A schedule sets lr')[beside]):
            run(learn, beside)
        assert torch.equal(before, weights_of(learn))
    else:
        after, _, values = run(learn, beside)
        assert after.isfinite().all() and len(values) > 1
        assert torch.equal(after, plain_run(beside, folder)[0]) != method.acts


class Watched(Callback):
    "Enters or leaves a context in the events between which a method scores"
    run_valid = False
    def __init__(self, order, act): self.order, self.act = order, act
    def before_batch(self): self.act()
    def after_pred(self): self.act()
    def after_loss(self): self.act()

@METHOD
def test_scoring_leaves_no_trace(method):
    """From before a method's events to after them: buffers, attributes, modes, gradients, random state, the loss
    function's reduction"""
    learn, contexts = with_method(method, model=mlp), []
    def enter():
        contexts.append(no_trace(learn))
        contexts[-1].__enter__()
    fit(learn, 2, cbs=[Watched(-9, enter), Watched(-1, lambda: contexts.pop().__exit__(None, None, None))])
    assert all(p.grad is None or p.grad.isfinite().all() for p in learn.model.parameters())

@METHOD
def test_events_exist(method):
    "fastai passes over an event that is misspelt"
    names = {name for cb in own(with_method(method)) for name in dir(type(cb))
             if name.startswith(('before_', 'after_'))}
    assert names and names <= {o for o in dir(event) if not o.startswith('_')}

@METHOD
@pytest.mark.many(2)
def test_one_item_with_batch_norm(method):
    "The last batch has two items, of which half would be one, more than batch norm can take"
    learn = with_method(method, model=mlp, dls=loaders(14))
    assert weights_of(fit(learn, 3)).isfinite().all()

@METHOD
@pytest.mark.many(2)
def test_twice_in_a_row(method):
    """A second fit goes on, with the same columns and no more; validation and predictions in between are the Learner's
    own"""
    learn = with_method(method)
    fit(learn, 2)
    columns, n_values = list(learn.recorder.metric_names), len(learn.validate())
    assert n_values == 2 and learn.get_preds()[0].shape == (24, 3) and [m.name for m in learn.metrics] == ['accuracy']
    scored = learn.selection.total('scored') if method.rows else 0
    copy = deepcopy(learn)
    fit(learn, 1, method='fit_one_cycle' if method.undo != 'no_one_pass' else 'fit')
    assert list(learn.recorder.metric_names) == columns and [m.name for m in learn.metrics] == ['accuracy']
    fit(learn, 2, start_epoch=1)
    assert weights_of(fit(copy, 1)).isfinite().all() and len(copy.validate()) == 2
    if not method.rows: return
    assert len(learn.selection.ledger) == 4 and learn.selection.total('scored') >= scored
    assert learn.selection.total('trained') == int(learn.selection.selected.sum()) <= learn.selection.total('loaded')

@METHOD
@pytest.mark.many(2)
def test_lr_find(method, tmp_path):
    "A search for the rate trains plainly: the same losses as without, and the method acts in the next fit"
    def search(learn):
        with learn.no_bar(), learn.no_logging():
            torch.manual_seed(3)
            learn.lr_find(num_it=5, show_plot=False)
        return torch.stack(list(learn.recorder.losses))
    with_it = with_method(method, path=tmp_path)
    torch.testing.assert_close(search(with_it), search(learner(LOADERS, path=tmp_path)), rtol=0, atol=0)
    if method.rows: assert not with_it.selection.lines
    noted = Noted()
    fit(with_it, 2, cbs=noted)
    assert noted.rows and (not method.rows or with_it.selection.total('trained') > 0)

@METHOD
@pytest.mark.many(2)
def test_export_and_load(method, tmp_path):
    "What is loaded predicts the same and validates; after undoing, the file needs this package no more"
    learn = fit(with_method(method, path=tmp_path), 2)
    x = Toy().x
    learn.export('with.pkl')
    loaded = load_learner(tmp_path/'with.pkl')
    loaded.dls = loaders()
    assert torch.equal(loaded.model(x), learn.model(x)) and len(loaded.validate()) == 2
    assert loaded.get_preds()[0].shape == (24, 3)
    undo(learn, method)
    # what was recorded can still be read
    assert not own(learn) and (not method.rows or len(learn.selection.ledger) == 2)
    learn.export('without.pkl')
    assert b'rholoss_fastai' not in (tmp_path/'without.pkl').read_bytes()
    loaded, learn.dls = load_learner(tmp_path/'without.pkl'), loaders()
    loaded.dls = loaders()
    assert torch.equal(weights_of(fit(learn, 1, reset_opt=True)), weights_of(fit(loaded, 1)))


EVENTS = ['before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward',
          'after_backward', 'before_step', 'after_step',
          'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch']

@METHOD
@pytest.mark.parametrize('part', range(3))
@pytest.mark.many(6)
def test_interrupted_in_any_event(method, part, tmp_path):
    """The user's ctrl-C before a method's callbacks, and in a second fit after them: nothing is left behind, and the
    Learner goes on"""
    for name in EVENTS[(part + list(METHODS.values()).index(method)) % 3::3]:
        learn, n_lines = with_method(method, path=tmp_path), 0
        for order in (-10, 15):
            with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Interrupt(name, order))
            assert len(learn.validate()) == 2, name
            assert [m.name for m in learn.metrics] == ['accuracy'], name
            assert type(learn.loss_func).__module__.startswith('fastai'), name
            if name in ('before_epoch', 'after_loss', 'after_validate'):
                learn.export('interrupted.pkl')
                loaded = load_learner(tmp_path/'interrupted.pkl')
                loaded.dls = loaders()
                assert len(loaded.validate()) == 2, name
            if not method.rows: continue
            assert len(learn.selection.ledger) - n_lines in (1, 2), name
            n_lines = len(learn.selection.ledger)
        fit(learn, 1)
        assert weights_of(learn).isfinite().all() and len(learn.validate()) == 2, name
        undo(learn, method)
        assert not own(learn) and [m.name for m in learn.metrics] == ['accuracy'], name
        assert type(learn.loss_func).__module__.startswith('fastai'), name


class WarnOfWaits(Callback):
    "PyTorch warns of each wait for the device in a step, but for a fit's first, in which what is given is looked at"
    order = -100
    def before_batch(self):
        if self.training and self.train_iter: torch.cuda.set_sync_debug_mode('warn')

class NoLonger(Callback):
    order = 200
    def after_batch(self): torch.cuda.set_sync_debug_mode('default')

@pytest.mark.cuda
@pytest.mark.parametrize('name', [o for o in METHODS if o != 'one_pass'])
def test_the_host_waits_once_a_step_at_most(name, monkeypatch):
    waits, package = Counter(), Path(rholoss_fastai.__file__).parent
    def noted(message, *args, **kwargs):
        if 'called a synchronizing' in str(message) and any(Path(frame.filename).parent == package
                                                            for frame in traceback.extract_stack()):
            waits[learn.epoch, learn.iter] += 1
    learn = on_cuda(with_method(METHODS[name]))
    monkeypatch.setattr(warnings, 'showwarning', noted)
    warnings.simplefilter('always')
    torch.set_warn_always(True) # else PyTorch says it once
    try: fit(learn, 3, cbs=[WarnOfWaits(), NoLonger()])
    finally:
        torch.set_warn_always(False)
        torch.cuda.set_sync_debug_mode('default')
    assert max(waits.values(), default=0) <= 1, waits
    if name in ('batch_loss_filter', 'selective_backprop'): assert waits # for the number of the selected
    assert weights_of(learn).isfinite().all() and next(learn.model.parameters()).is_cuda


class Elsewhere(CrossEntropyLossFlat):
    "With class weights that are on another device until somebody puts them where the model is"
    def __init__(self): super().__init__(weight=torch.ones(3))
    def to(self, device): self.at = device
    def __call__(self, *args, **kwargs):
        assert self.at == torch.device('cpu')
        return super().__call__(*args, **kwargs)

@pytest.mark.parametrize('use', [
    lambda l: irreducible_losses(l, l.dls.train, progress=False), lambda l: grand(l, l.dls.train, progress=False),
    lambda l: fit(learner().select(proxy=l, frac=0.5))])
def test_class_weights_are_put_where_the_model_is_before_a_fit_too(use): use(learner(loss_func=Elsewhere()))

@pytest.mark.parametrize('first,second,undo_first', [
    (lambda l: l.prune_epochs(), lambda l: l.select('loss'), 'no_pruning'),
    (lambda l: l.rho_epochs(), lambda l: l.rho_loss(), 'no_pruning'),
    (lambda l: l.rho_epochs(), lambda l: l.select(unit='token'), 'no_pruning'),
    (lambda l: l.rho_loss(IL), lambda l: l.rho_epochs(), 'no_selection')])
def test_two_that_decide_are_refused_as_the_second_is_added(first, second, undo_first):
    "And what the error says to type works"
    learn = first(learner())
    before = list(learn.cbs)
    with pytest.raises(ValueError, match=undo_first): second(learn)
    assert list(learn.cbs) == before
    getattr(learn, undo_first)()
    assert len(own(second(learn))) >= 1


@pytest.mark.parametrize('add', [
    lambda l: l.select('loss', il=IL), lambda l: l.select('reducible', 'uniform', il=IL),
    lambda l: l.rho_loss(IL, pick='uniform'), lambda l: l.rho_loss(table(l), score='loss'),
    lambda l: l.rho_loss(linear(), score='loss'), lambda l: l.batch_loss_filter(il=IL, score='loss'),
    lambda l: l.selective_backprop(il='probe', score='loss')])
def test_irreducible_losses_that_nothing_looks_at_are_told(add, recwarn):
    add(learner())
    assert sum('they change nothing' in str(o.message) for o in recwarn.list) == 1

@pytest.mark.parametrize('add', [
    lambda l: l.rho_loss(), lambda l: l.rho_loss(IL), lambda l: l.rho_loss(pick='uniform'), lambda l: l.select('loss'),
    lambda l: l.rho_loss(IL, score=lambda loss, il: loss - il), lambda l: l.batch_loss_filter(il=IL),
    lambda l: l.rho_loss(linear()).rho_loss(frac=0.2), lambda l: l.rho_loss(IL).rho_loss(pick='uniform'),
    lambda l: l.rho_loss('probe').rho_loss(score='loss')])
def test_and_others_are_not(add, recwarn):
    add(learner())
    assert not any('they change nothing' in str(o.message) for o in recwarn.list)


@pytest.mark.parametrize('il', ['probe', 'auto', 'crossfit'])
def test_an_exported_learner_says_to_give_them_again_and_that_works(tmp_path, monkeypatch, il):
    "Also where the gate would look at some rows first"
    from rholoss_fastai import beside
    monkeypatch.setattr(beside, 'rows_to_look_at', lambda n, n_epoch, most: 40)
    learner().rho_loss(il, gate=il != 'probe').export(tmp_path/'learn.pkl')
    learn = load_learner(tmp_path/'learn.pkl')
    learn.dls = loaders()
    with pytest.raises(ValueError, match='not exported with a Learner: give them again'): fit(learn, 1)
    fit(learn.rho_loss(il, gate=False, **(dict(il_budget=99.) if il == 'auto' else {})), 1)
    assert learn.selection.ledger.selected.tolist()[0] < 0.7
