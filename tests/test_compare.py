"""Equal cost, whose evaluations leave no trace; runs in files, processes and Ray; what is said about them, and what is
refused."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ShowGraphCallback  # noqa: F401 (patches `no_bar`)
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import F1Score, Perplexity, RocAucBinary, accuracy, error_rate, rmse
from fastai.optimizer import SGD, Adam
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.data import ImageDataLoaders
from helpers import learner, processes, start_process
from PIL import Image
from scipy import stats
from small_tasks import TASKS, square
from torch import nn

from rholoss_fastai.all import (
    STEP_COST,
    Comparison,
    IrreducibleLosses,
    Prices,
    compare,
    fit_within,
    measure_prices,
    prune,
    run_tasks,
)
from rholoss_fastai.comparison import comparison_settings
from rholoss_fastai.loss_tasks import in_words, same_loss
from rholoss_fastai.side_models import learner_settings

N, BS = 192, 16
SOME = ('random', 'infobatch', 'batch_loss_filter', 'selective_backprop', 'rho_loss')


def data(n=N, bs=BS, **kwargs):
    "Loaders whose rows have two classes, and which of the rows have a wrong label"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2*n, 6, generator=generator)
    y = (x[:, :3].sum(1) > 0).long()
    wrong = torch.rand(n, generator=generator) < 0.25
    labels = torch.where(wrong, 1 - y[:n], y[:n])
    train,valid = list(zip(x[:n], labels)), list(zip(x[n:], y[n:]))
    dls = DataLoaders.from_dsets(train, valid, bs=bs, num_workers=0, device='cpu', **kwargs)
    dls.loaders[1] = dls.valid.new(bs=n) # judged in one batch
    return dls, wrong


def net(): return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
def make_learner(dls, seed=None, **kwargs):
    return learner(dls, net, seed=seed, **{**dict(opt_func=Adam, lr=0.02, metrics=accuracy), **kwargs})
def noisy_learner(**kwargs): return make_learner(lambda: data()[0], seed=0, **kwargs)


def quick(methods=('random',), make=make_learner, dls=None, **kwargs):
    return compare(make, dls or data()[0], methods,
                   **{**dict(n_epoch=2, seeds=2, evaluations=3, threads=1, progress=False), **kwargs})


def without_seconds(table): return table[[o for o in table.columns if 'seconds' not in o]]
def weights(learn): return torch.cat([o.flatten() for o in learn.model.state_dict().values()])


class Watch(Callback):
    "Notes the share of the schedule, the rate and the mode of each training step"
    order = 61
    def __init__(self): self.shares, self.rates, self.modes, self.epochs = [], [], [], []
    def before_batch(self):
        if not self.training: return
        self.shares.append(self.pct_train); self.rates.append(self.opt.hypers[-1]['lr'])
        self.modes.append(self.model.training)
        self.epochs.append(self.learn.n_epoch)


# Budget

def costs(learn):
    "Plain epochs that a run cost, from the ledger alone: independent of the meter"
    ledger = learn.selection.ledger
    price = sum(o.loaded if o.forward == 'reuse' else o.trained + learn.selection.scoring_cost*o.scored/STEP_COST
                for o in ledger.itertuples())
    return price/N


@pytest.mark.parametrize('method', [
    lambda learn: learn.select('loss', 'uniform', frac=0.5, enlarge=True),
    lambda learn: learn.select('loss', 'top', frac=0.25, enlarge=True),
    lambda learn: learn.select('loss', 'top', frac=0.25, forward='reuse'), lambda learn: learn.batch_loss_filter(),
    lambda learn: learn.prune_epochs(0.8),
    lambda learn: learn.selective_backprop(beta=2, queue=True),
    lambda learn: learn.rho_loss(torch.zeros(N), frac=0.1, epoch='candidates')])
@pytest.mark.many(2)
def test_cost_is_that_of_plain_training_and_the_rate_decays(method):
    watch = Watch()
    learn = method(noisy_learner(cbs=watch))
    meter = fit_within(learn, 6)
    a_step = max(1, (N/BS)/meter.steps*6)*BS/N*(1 + 1/(STEP_COST*0.1)) # the dearest
    assert abs(meter.cost - 6) <= a_step/2 + 1e-6
    assert meter.cost == pytest.approx(costs(learn), rel=1e-6)
    assert meter.trained == learn.selection.total('trained') and meter.scored == learn.selection.total('scored')
    assert watch.shares == sorted(watch.shares) and watch.shares[0] == 0 and watch.shares[-1] > 1 - 2*a_step/6
    assert watch.rates[-1] < 0.05*max(watch.rates) and max(watch.rates) == pytest.approx(0.02, rel=0.02)
    assert all(watch.modes)
    assert [o['cost'] for o in meter.history] == sorted(o['cost'] for o in meter.history) and len(meter.history) == 10
    assert 0 <= watch.epochs[-1] - meter.epochs <= 2 # what callbacks are told of the epochs to come


@pytest.mark.parametrize('fit', ['fit_one_cycle', 'fit_flat_cos', 'fit', 'fine_tune'])
def test_plain_training_is_fastais_own(fit):
    class NoValidation(Callback): # which would draw random numbers
        def before_validate(self): raise CancelValidException
    runs = []
    for i in range(2):
        learn = noisy_learner(cbs=[] if i else NoValidation())
        with learn.no_bar(), learn.no_logging():
            if i: fit_within(learn, 3, fit, lr=0.01, evaluations=1 + 4*i)
            else: getattr(learn, fit)(3, 0.01)
        runs.append(weights(learn))
    assert torch.equal(*runs)


def test_evaluations_leave_no_trace():
    "Between steps whose gradients accumulate, with dropout, batch norm, and a loader that is shuffled"
    runs = []
    for n in (1, 25):
        learn = noisy_learner(cbs=GradientAccumulation(3*BS))
        frozen = learn.model[1] # a layer that trains in eval mode stays so
        class Freeze(Callback):
            def before_batch(self): frozen.eval()
        learn.add_cb(Freeze())
        meter = fit_within(learn.select('loss', 'top', frac=0.5), 3, evaluations=n)
        runs.append(weights(learn))
        assert len(meter.history) == n and not frozen.training or n == 1
    assert torch.equal(*runs)


@pytest.mark.parametrize('metric', [accuracy, error_rate, F1Score(), RocAucBinary(), Perplexity()])
def test_what_is_evaluated_is_what_validate_says(metric):
    learn = noisy_learner(metrics=metric)
    meter = fit_within(learn, 2, evaluations=4)
    with learn.no_bar(), learn.no_logging():
        assert meter.history[-1]['value'] == pytest.approx(learn.validate()[1], rel=1e-6)
    assert len({o['value'] for o in meter.history}) > 1


def test_a_bill_shortens_the_longest_fit():
    assert fit_within(noisy_learner(), 3, bill=1.).steps == 2*N//BS
    assert fit_within(noisy_learner(), 3, 'fine_tune', bill=1.).steps == 3*N//BS # an epoch of it frozen
    assert len(fit_within(noisy_learner(), 3, 'fine_tune', evaluations=5).history) == 5 # spread over it, too
    with pytest.raises(ValueError, match='used up before training begins'): fit_within(noisy_learner(), 2, bill=2.)


def test_equal_seconds_and_own_fits():
    learn,began = noisy_learner(), time.process_time()
    meter = fit_within(learn, 2, unit='seconds', per_epoch=0.4)
    assert meter.clocks.seconds[0] == pytest.approx(0.8, abs=0.1) and time.process_time() - began >= 0.8
    assert meter.share_at_end > 0.9 and meter.lr_at_end < 0.005
    def fit(learn, n_epoch):
        learn.fit(1, 0.01)
        learn.fit_one_cycle(n_epoch - 1, 0.02)
    assert fit_within(noisy_learner(), 3, fit).steps == 3*N//BS
    with pytest.raises(ValueError, match='must be one of fit_one_cycle'):
        fit_within(noisy_learner(), 3, 'fit_two_cycles')
    with pytest.raises(ValueError, match='needs per_epoch'): fit_within(noisy_learner(), 3, unit='seconds')
    with pytest.raises(ValueError, match='has trained nothing'): fit_within(noisy_learner(), 3, lambda learn, n: None)


def test_trackers_read_the_validation(tmp_path):
    learn = noisy_learner(cbs=[EarlyStoppingCallback('valid_loss', patience=50), SaveModelCallback(fname='best')])
    learn.path = tmp_path
    assert fit_within(learn, 2).steps == 2*N//BS


def test_a_method_that_selects_nothing_is_told():
    class Nothing(Callback):
        def before_batch(self):
            if self.training: self.learn.yb = ()
    learn = noisy_learner(cbs=Nothing())
    with pytest.raises(ValueError, match='selects no item at all'): fit_within(learn, 2)


def test_prices_are_positive_and_count():
    prices = measure_prices(make_learner, data()[0], steps=3, rounds=1)
    assert min(prices.train, prices.score, prices.seconds) > 0 and min(prices.load, prices.step) >= 0
    assert prices.score == 1
    dear = Prices(train=2., score=4., load=1., step=8.)
    learn = noisy_learner().select('loss', 'top', frac=0.25)
    meter = fit_within(learn, 4, prices=dear)
    plain = (1 + 2)*N + 8*N/BS
    assert meter.cost == pytest.approx((meter.loaded + 4*learn.selection.scoring_cost*meter.scored + 2*meter.trained
                                        + 8*meter.steps)/plain)


@pytest.mark.parametrize('n_epoch,unit', [(1, 'steps'), (3, 'cost')])
def test_fine_tuning_is_evaluated_as_often_as_asked_in_even_steps(n_epoch, unit):
    for run in quick(fit='fine_tune', n_epoch=n_epoch, evaluations=5, seeds=1, budget=unit).runs:
        apart = np.diff([0, *[o['cost'] for o in run['history']]])
        assert len(apart) == 5 and run['cost'] == pytest.approx(n_epoch + 1, abs=0.05)
        assert apart == pytest.approx((n_epoch + 1)/5, abs=1.1*BS/N)


# Executors

@pytest.mark.parametrize('kind', ['processes', 'pool', pytest.param('spawn', marks=pytest.mark.slow)])
def test_a_worker_that_dies_loses_its_task_only(kind):
    if kind == 'processes': results,errors = run_tasks(square, TASKS, 2, threads=1)
    else:
        with ProcessPoolExecutor(2, get_context('fork' if kind == 'pool' else 'spawn')) as pool:
            results,errors = run_tasks(square, TASKS, pool, threads=1)
    assert results == dict(a=(4, 1), b=(9, 1), c=(16, 1))
    assert set(errors) == {'dies', 'fails'} and 'exit code -9' in errors['dies'] and 'TypeError' in errors['fails']


def test_executors_of_all_kinds():
    tasks = {k: v for k,v in TASKS.items() if v != 'kill'}
    for executor in (None, 3, ThreadPoolExecutor(2), map, lambda f, o: list(map(f, o))):
        seen = []
        results,errors = run_tasks(square, tasks, executor, threads=1,
                                   done=lambda name, result: seen.append(name))
        assert {k: v[0] for k,v in results.items()} == dict(a=4, b=9, c=16) and list(errors) == ['fails']
        assert sorted(seen) == sorted(tasks)
    for executor in (0, True, 'two'):
        with pytest.raises((TypeError, ValueError)): run_tasks(square, tasks, executor)


@pytest.fixture(scope='module')
def some_runs(tmp_path_factory):
    "A comparison of several methods made here, one run after the other, and its folder"
    folder = tmp_path_factory.mktemp('some')
    return quick(SOME, folder=folder, noisy=data()[1]), folder


@pytest.mark.slow
def test_processes_and_here_agree_to_the_last_bit(some_runs):
    here,_ = some_runs
    with ProcessPoolExecutor(2, processes) as pool: pooled = quick(SOME, noisy=data()[1], executor=pool)
    for other in (pooled, quick(SOME, noisy=data()[1], executor=2)):
        pd.testing.assert_frame_equal(without_seconds(here.table), without_seconds(other.table), rtol=0, atol=0)
        assert [[o['value'] for o in run['history']] for run in here.runs] == [[o['value'] for o in run['history']]
                                                                               for run in other.runs]


@pytest.mark.slow
def test_ray_agrees_to_the_last_bit(monkeypatch):
    ray = pytest.importorskip('ray')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(o for o in sys.path if o))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    class OnRay:
        def submit(self, func, *args): return ray.remote(func).remote(*args).future()
    try: result = quick(executor=OnRay())
    finally: ray.shutdown()
    pd.testing.assert_frame_equal(without_seconds(quick().table), without_seconds(result.table), rtol=0, atol=0)


def fails_once(learn):
    if learn.dls.train.rng.random() < 2 and torch.initial_seed() == 1: raise RuntimeError('no memory left')


def test_a_run_that_fails_is_named_and_the_others_stand():
    with pytest.warns(UserWarning, match='mine, seed 1: RuntimeError: no memory left'):
        result = quick([('mine', fails_once)], seeds=3)
    assert result.table.seeds.to_dict() == dict(plain=3, mine=2) and 'Not in it: mine, seed 1' in result.verdict
    with pytest.raises(RuntimeError, match='No run of plain training came to its end'): quick(fit=lambda learn, n: 1/0)


# Files

@pytest.mark.slow
def test_runs_that_are_there_are_not_run_again(some_runs, tmp_path):
    first,folder = some_runs
    folder = shutil.copytree(folder, tmp_path/'runs')
    assert len(list(folder.glob('*.json'))) == 2*6 and (folder/'il.safetensors').exists()
    (folder/'random-seed1.json').unlink()
    written = {o: o.stat().st_mtime_ns for o in folder.iterdir()}
    again = quick(SOME, folder=folder, noisy=data()[1])
    assert {o: o.stat().st_mtime_ns for o in written} == written
    pd.testing.assert_frame_equal(without_seconds(first.table), without_seconds(again.table), rtol=0, atol=0)
    assert set(Comparison.load(folder).table.index) == set(first.table.index)
    first.save(folder/'all.json')
    pd.testing.assert_frame_equal(Comparison.load(folder/'all.json').table, first.table)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder of finished runs"
    folder = tmp_path_factory.mktemp('runs')
    quick(folder=folder, seeds=1)
    return folder


@pytest.mark.parametrize('changed', [dict(n_epoch=3), dict(lr=0.1), dict(fit='fit_flat_cos'), dict(evaluations=4),
                                     dict(metric='valid_loss'),
                                     dict(dls=data(n=N+16)[0]), dict(make=partial(make_learner, lr=0.1)),
                                     dict(make=partial(make_learner, cbs=MixUp())),
                                     dict(make=partial(make_learner, wd=0.5)),
                                     dict(make=partial(make_learner, opt_func=SGD)),
                                     dict(dls=data(after_batch=lambda b: b)[0]),
                                     dict(noisy=np.arange(N) < 3), dict(prices=Prices(2.))])
def test_runs_with_other_settings_are_refused(runs, changed):
    with pytest.raises(ValueError, match='other settings'): quick(folder=runs, seeds=1, **changed)


class Notes(Callback):
    "Fills what it began with in each way there is"
    def __init__(self, share):
        self.share, self.half, self.n, self.seen, self.by, self.sums = share, share/2, 0, [], {}, torch.zeros(2)
    def after_batch(self):
        self.n += 1
        self.seen.append(self.half)
        self.by[self.n % 3] = self.by.get(self.n % 3, 0)
        self.by[self.n % 3] += 1
        self.sums[0] += self.n
        self.learn.half = self.n # of the Learner


@pytest.mark.parametrize('there,here', [(MixUp(0.4), MixUp(0.2)), (GradientAccumulation(32), GradientAccumulation(64)),
                                        (Notes(1), Notes(2)), (ParamScheduler(dict(lr=partial(SchedCos, 1))),
                                                               ParamScheduler(dict(lr=partial(SchedCos, 2))))])
def test_callbacks_are_told_apart_by_their_settings(there, here):
    def of(cbs): return learner_settings(make_learner(data()[0], cbs=cbs))['callbacks']
    assert of(there) == of(deepcopy(there)) != of(here)


def test_callbacks_that_a_run_has_used_are_the_same_and_others_are_named(tmp_path):
    cbs = [MixUp(0.4), Notes(1), EarlyStoppingCallback(patience=9)]
    for _ in range(2): quick(make=partial(make_learner, cbs=cbs), folder=tmp_path, seeds=1)
    assert cbs[1].n
    with pytest.raises(ValueError, match=r'callbacks is .*MixUp.*0\.4.* there, .*MixUp.*0\.2.* here'):
        quick(make=partial(make_learner, cbs=[MixUp(0.2)]), folder=tmp_path, seeds=1)


def various():
    return [in_words(o) for o in (MixUp(0.4), partial(F1Score, average='macro'), Adam,
                                  CrossEntropyLossFlat(weight=torch.ones(2)), Prices(2.), {'b', 'a'}, Notes(1),
                                  lambda x: x in {'a', 'b', 'c'} or N)]

@pytest.mark.slow
def test_words_are_the_same_in_every_process():
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), os.getcwd()]))
    for seed in '12':
        script = 'from test_compare import *; print(various())'
        said = subprocess.check_output([sys.executable, '-W', 'ignore', '-c', script], text=True,
                                       env=dict(env, PYTHONHASHSEED=seed))
        assert said == f'{various()}\n'


def weighted(weights, kind):
    "Losses by class weights, which fill something on the way"
    w = torch.tensor(weights)
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w
        def forward(self, pred, targ): return (torch.zeros_like(pred).scatter_(1, targ[:,None], 1)*self.w*pred).sum()
    def one_hot(pred, targ): return (torch.zeros_like(pred).scatter_(1, targ[:,None], 1)*w*pred).sum()
    def in_parts(pred, targ):
        parts = []
        for o in pred: parts.append(o*w)
        return sum(parts).sum()
    def masked(pred, targ):
        pred[targ < 0] = 0
        return (pred*weights[0]).sum()
    flat = CrossEntropyLossFlat(weight=w)
    def outer(pred, targ): return partial(one_hot)(pred, targ) + flat(pred, targ)
    return dict(one_hot=one_hot, in_parts=in_parts, masked=masked, module=Weighted(), outer=outer,
                several=nn.ModuleList([nn.CrossEntropyLoss(weight=w)]), partials=partial(partial(partial(one_hot))),
                long=nn.CrossEntropyLoss(weight=torch.cat([torch.ones(6000), w])))[kind]

@pytest.mark.parametrize('kind', ['one_hot', 'in_parts', 'masked', 'module', 'outer', 'several', 'partials', 'long'])
def test_losses_are_told_apart_by_their_weights(kind):
    assert same_loss(weighted([1., 2.], kind), weighted([1., 2.], kind))
    assert not same_loss(weighted([1., 2.], kind), weighted([2., 1.], kind))

def test_what_is_noted_in_use_says_nothing(tmp_path):
    files = [Image.fromarray(np.full((8, 8, 3), 20*i, np.uint8)).save(tmp_path/f'{i}.png') or tmp_path/f'{i}.png'
             for i in range(8)]
    dls = ImageDataLoaders.from_lists(tmp_path, files, [i % 2 for i in range(8)], valid_pct=0.25, bs=2, num_workers=0,
                                      batch_tfms=aug_transforms(size=6))
    learn = Learner(dls, nn.Flatten(), loss_func=nn.CrossEntropyLoss())
    before = learner_settings(learn)
    dls.one_batch()
    assert learner_settings(learn) == before
    other = ImageDataLoaders.from_lists(tmp_path, files, [i % 2 for i in range(8)], valid_pct=0.25, bs=2, num_workers=0,
                                        batch_tfms=aug_transforms(size=7))
    assert learner_settings(Learner(other, nn.Flatten(), loss_func=nn.CrossEntropyLoss())) != before


def test_functions_are_told_apart_by_what_they_do_and_find():
    scale = 2
    def by(factor): return lambda x: factor*x
    funcs = [by(1), by(2), lambda x: x*scale, lambda x: x.relu(), lambda x: x.tanh(), lambda x: N*x, lambda x: BS*x,
             lambda x: [o + 1 for o in x], lambda x: [o + 2 for o in x], lambda x, n=1: x, lambda x, *, n=2: x]
    assert len({in_words(o) for o in funcs}) == len(funcs)


def test_another_method_of_that_name_machine_or_damage_is_refused(tmp_path):
    quick([('mine', lambda learn: learn.select('loss', frac=0.5))], folder=tmp_path, seeds=1)
    with pytest.raises(ValueError, match='other settings \\(method'):
        quick([('mine', lambda learn: learn.select('loss', frac=0.25))], folder=tmp_path, seeds=1)
    mine = [[('loop', lambda learn, frac=frac: learn.select('loss', frac=frac))] for frac in (0.5, 0.25)]
    quick(mine[0], folder=tmp_path, seeds=1)
    with pytest.raises(ValueError, match='other settings \\(method'): quick(mine[1], folder=tmp_path, seeds=1)
    file = tmp_path/'plain-seed0.json'
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, 'machine': dict(run['machine'], cpu='an abacus')}))
    with pytest.raises(ValueError, match='another machine \\(cpu: an abacus there'): quick(folder=tmp_path, seeds=1)
    with pytest.raises(ValueError, match='another machine|threads'): quick(folder=tmp_path, seeds=1, threads=2)
    file.write_text('{"method": "pl')
    with pytest.raises(ValueError, match='remove it'): quick(folder=tmp_path, seeds=1)


def test_settings_are_the_same_in_every_process():
    "A function shows itself with its address in memory, which is another each time"
    def of(loss):
        learn = make_learner(data()[0], loss_func=loss)
        return comparison_settings(learn, 'fit', learn.dls.valid, None, Prices(), n_epoch=1)
    def made(wrong=0):
        def loss(pred, targ): return nn.functional.cross_entropy(pred, targ) + wrong
        return loss
    assert of(made()) == of(made()) and of(made()) != of(made(1)) and of(partial(made(), b=made())) == of(
        partial(made(), b=made()))


def test_irreducible_losses_of_another_making_are_refused(tmp_path):
    def zeros(make_learner, dls): return IrreducibleLosses.of(torch.zeros(N), dls.train)
    def ones(make_learner, dls): return IrreducibleLosses.of(torch.ones(N), dls.train)
    for _ in range(2): quick(['rho_loss'], folder=tmp_path, seeds=1, il=zeros)
    for il in (ones, 'auto'):
        with pytest.raises(ValueError, match='il.safetensors holds irreducible losses that were made otherwise'):
            quick(['rho_loss'], folder=tmp_path, seeds=1, il=il)


def test_a_folder_of_two_comparisons_is_told(runs, tmp_path):
    shutil.copytree(runs, tmp_path/'runs')
    quick(folder=tmp_path/'runs', seeds=[1], n_epoch=3)
    with pytest.raises(ValueError, match='other settings \\(n_epoch\\)'): Comparison.load(tmp_path/'runs')


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from test_compare import SOME, data, quick
quick(SOME, folder={folder!r}, noisy=data()[1])
"""


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_table(some_runs, tmp_path):
    "Killed after any number of seconds, again and again"
    script = tmp_path/'script.py'
    script.write_text(SCRIPT.format(path=[os.path.dirname(__file__), os.getcwd()], folder=str(tmp_path/'runs')))
    rng = np.random.default_rng(0)
    for _ in range(int(os.environ.get('RHOLOSS_KILLS', 4))):
        n_before = len(list((tmp_path/'runs').glob('*.json')))
        process = start_process(script, out=tmp_path/'log')
        while process.is_alive() and len(list((tmp_path/'runs').glob('*.json'))) <= n_before: time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert all(json.loads(o.read_text()) for o in (tmp_path/'runs').glob('*.json'))
    resumed = quick(SOME, folder=tmp_path/'runs', noisy=data()[1])
    pd.testing.assert_frame_equal(without_seconds(resumed.table), without_seconds(some_runs[0].table), rtol=0, atol=0)


# What is said

def made(finals, metric='accuracy', budget='cost', **kwargs):
    "A comparison of runs with these final metrics by method"
    runs = [dict(method=method, seed=seed, settings=dict(metric=metric, budget=budget, n_epoch=5), final=v, steps=100,
                 epochs=5, loaded=1, scored=0, trained=1,
                 cost=5., seconds=10., clock=10., cost_il=0.5*(method == 'rho'), seconds_il=1.*(method == 'rho'),
                 own_cost_il=0., own_seconds_il=0., bill=0.,
                 wrong_labels=None, machine={},
                 history=[dict(step=50, epoch=2, cost=2.5, seconds=5., value=v - 0.01),
                          dict(step=100, epoch=5, cost=5., seconds=10., value=v)])
            for method,values in finals.items() for seed,v in enumerate(values)]
    return Comparison(runs, **kwargs)


def test_differences_are_paired_and_intervals_students():
    plain,rho = [0.60, 0.70, 0.65], [0.63, 0.72, 0.69]
    row = made(dict(plain=plain, rho=rho)).table.loc['rho']
    low,high = stats.ttest_rel(rho, plain).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((low, high)) and row.difference == pytest.approx(0.03)
    assert row.spread == pytest.approx(np.std(rho, ddof=1))
    assert row.cost == 5.5 and row.seconds == 11 and row.steps_to_plain == 50 and row.cost_to_plain == 3.
    assert row.seconds_to_plain == 6.
    # not reached with each seed
    assert math.isnan(made(dict(plain=[0.9, 0.5], rho=[0.8, 0.6])).table.steps_to_plain.rho)


def test_the_verdict_knows_more_from_less():
    finals = dict(plain=[0.60, 0.70, 0.65], better=[0.63, 0.72, 0.68], worse=[0.57, 0.66, 0.62],
                  same=[0.62, 0.69, 0.65])
    words = made(finals).verdict
    assert '`better` pays; `worse` does not pay; of `same` it can\'t be told' in words
    assert '2.7 ± 1.4 points above' in words
    words = made(finals, metric='error_rate').verdict
    assert '`worse` pays; `better` does not pay' in words
    assert '`better` pays' in made(finals, metric='error_rate', greater=True).verdict
    one = made({k: v[:1] for k,v in finals.items()}).verdict
    assert 'with one seed: no interval' in one and 'pays' not in one
    nan = made(dict(plain=[0.6, 0.7], broken=[0.5, math.nan])).verdict
    assert "`broken` can't be compared: accuracy is NaN" in nan
    with pytest.raises(ValueError, match='no run of plain training'): made(dict(rho=[0.1]))


def test_seeds_without_a_plain_run_tell_nothing():
    result = made(dict(plain=[0.6], mine=[0.65, 0.7]))
    assert '5.0 points above plain training, with one seed: no interval' in result.verdict
    result.runs = [o for o in result.runs if (o['method'], o['seed']) != ('mine', 0)]
    assert "`mine` can't be compared: there is no run of plain training with a seed of its own" in result.verdict


def test_a_run_that_diverged_leaves_the_picture_to_the_others():
    result = made(dict(plain=[0.6, 0.7], lost=[math.inf, 0.7]), metric='valid_loss')
    assert "`lost` can't be compared: valid_loss is infinite" in result.verdict
    low,high = result.plot()[0].get_ylim()
    assert 0.6 < low < high < 0.7
    made(dict(plain=[math.nan, 0.7])).plot()


def test_tables_and_pictures():
    result = made({'plain': [0.6, 0.7], **{f'm{i}': [0.6 + i/100, 0.7 + i/100] for i in range(8)}})
    lines = result.to_markdown().split('\n')
    assert lines[0].startswith('| method | accuracy') and lines[2].startswith('| plain |')
    assert len(lines[0].split('|')) == len(lines[3].split('|'))
    assert '<table' in result._repr_html_() and 'm7' in repr(result)
    axs = result.plot()
    labels = [o.get_text() for o in axs[0].texts]
    assert labels == ['plain', 'm7', 'm6', 'm5', 'm4', 'm3'] and len(axs[1].lines) == 6
    with pytest.raises(ValueError, match='six'): result.plot(result.methods)


def test_wrong_labels_trained_on_are_counted():
    dls,wrong = data()
    def without(learn): learn.dls = prune(learn.dls, wrong.float(), 0.7, 'easiest')
    result = quick([('without', without), 'batch_loss_filter'], dls=dls, noisy=wrong)
    # fewer rows, as many steps
    assert result.table.steps.without == result.table.steps.plain
    assert result.table.cost.without == result.table.cost.plain
    assert result.table.wrong_labels.plain == pytest.approx(wrong.float().mean().item())
    assert result.table.wrong_labels.without == 0
    assert 0 < result.table.wrong_labels.batch_loss_filter < 1


@pytest.mark.slow
def test_bills(monkeypatch):
    dls,_ = data()
    il = IrreducibleLosses.of(torch.zeros(N), dls.train, n_epoch=3, n_folds=2, seconds=7.)
    each = 3*(1 + 1/STEP_COST) # epochs trained, and scored
    costs = {bill: quick(['rho_loss'], dls=dls, il=il, n_epoch=6, bill=bill, seeds=seeds).table
             for bill,seeds in (('share', 2), ('whole', 1), ('none', 1))}
    assert [costs[o].cost_il.rho_loss for o in ('share', 'whole', 'none')] == pytest.approx([each/2, each, 0.])
    assert [costs[o].seconds_il.rho_loss for o in ('share', 'whole', 'none')] == pytest.approx([3.5, 7., 0.])
    assert all(t.cost.rho_loss == pytest.approx(6, abs=0.6) for t in costs.values())
    assert costs['whole'].steps.rho_loss < costs['none'].steps.rho_loss
    with pytest.raises(ValueError, match='less than an epoch would be left'):
        quick(['rho_loss'], dls=dls, il=il, n_epoch=4, bill='whole')


# Kinds of Learners

def test_a_table_of_data_and_a_metric_that_falls():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(a=rng.normal(size=200), b=rng.choice(list('xyz'), 200)))
    frame['y'] = frame.a*2 + (frame.b == 'x')
    dls = TabularDataLoaders.from_df(frame, procs=[Categorify, Normalize], cat_names=['b'], cont_names=['a'],
                                     y_names='y', valid_idx=range(40), bs=16,
                                     device='cpu', num_workers=0)
    result = quick(['batch_loss_filter', 'rho_loss'],
                   lambda dls: tabular_learner(dls, layers=[8], metrics=rmse, loss_func=MSELossFlat(), lr=0.01), dls)
    assert not result.greater and result.metric == '_rmse' and result.table['_rmse'].notna().all()


def test_a_test_loader_apart_and_other_metrics():
    dls,_ = data()
    test_dl = data(n=64)[0].valid
    apart = quick(dls=dls, test_dl=test_dl, metric=error_rate, seeds=1)
    assert apart.metric == 'error_rate' and not apart.greater
    loss = quick(dls=dls, metric='valid_loss', seeds=1)
    assert loss.metric == 'valid_loss' and not loss.greater and (loss.table.valid_loss > 0).all()
    steps = quick(SOME[:2], dls=dls, budget='steps', seeds=1)
    assert steps.table.steps.nunique() == 1 and 'in as many steps' in steps.verdict
    seconds = quick(dls=dls, budget='seconds')
    assert seconds.table.seconds.random == pytest.approx(seconds.table.seconds.plain, rel=0.5)


def test_a_forecast_trains_nothing(tmp_path, capsys):
    forecast = quick(SOME, folder=tmp_path, dry_run=True)
    assert not list(tmp_path.iterdir()) and list(forecast.index) == ['plain', *SOME]
    assert (forecast.all_seconds > 0).all()
    assert '12 runs, about' in capsys.readouterr().out and forecast.steps['plain'] == 2*N/BS
    assert forecast.steps['random'] == forecast.steps['plain'] # a step costs the same


def test_a_meter_counts_its_own_fits_only():
    learn = noisy_learner().rho_epochs(features='columns', il_budget=9., drop=0.1, gate=False, refresh=False)
    spent = [fit_within(learn, 4) for _ in range(2)]
    assert spent[1].trained + spent[0].trained == learn.selection.total('trained')
    assert spent[0].cost_il > 0 == spent[1].cost_il # the irreducible losses are made once


def test_what_was_too_dear_to_be_made_is_not_billed():
    assert fit_within(noisy_learner().rho_epochs(il_budget=1e-9), 2).cost_il == 0


@pytest.mark.parametrize('method', [lambda learn, il: learn.rho_epochs(il, drop=0.1, gate=False, refresh=False),
                                    lambda learn, il: learn.prune_epochs(score='reducible', il=il)])
def test_irreducible_losses_that_others_paid_for_are_not_billed_again(method):
    learn = noisy_learner()
    il = IrreducibleLosses.of(torch.rand(N), learn.dls.train, n_epoch=3, n_folds=2, seconds=7.)
    meters = [fit_within(method(o, il), 4) for o in (learn, noisy_learner())]
    assert [bool(o.cost_il) for o in meters] == [True, False] and learn.selection.ledger.seconds_il.sum() == 7


# Bad input

def test_bad_input():
    dls,_ = data()
    with pytest.raises(ValueError, match="Did you mean 'rho_loss'"): quick(['rho_los'])
    with pytest.raises(TypeError, match='A method is a name'): quick([3])
    with pytest.raises(TypeError, match='methods must be names'): quick('plain')
    with pytest.raises(ValueError, match='Two methods are called'): quick(['random', ('random', print)])
    model = net()
    with pytest.raises(ValueError, match='new Learner with a new model'):
        quick(make=lambda dls: Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    with pytest.raises(ValueError, match='no metric to judge by'): quick(make=partial(make_learner, metrics=None))
    with pytest.raises(ValueError, match="metric='f1' is none of"): quick(metric='f1')
    with pytest.raises(ValueError, match='noisy must be a mask'): quick(noisy=[True]*3)
    for bad in (dict(n_epoch=0), dict(budget='time'), dict(bill='half'), dict(seeds=0), dict(seeds=[1, 1]),
                dict(evaluations=0), dict(fit='fits'),
                dict(prices='dear'), dict(il_budget=2.)):
        with pytest.raises(ValueError): quick(**bad)
    with pytest.raises(ValueError, match='nothing to evaluate on'):
        quick(dls=DataLoaders(dls.train, dls.valid.new(dataset=[])))
    with pytest.raises(TypeError, match='dls must be DataLoaders'): compare(make_learner, dls.train)
    def nan(pred, targ): return torch.tensor(math.nan)
    assert "can't be compared: nan is NaN" in quick(metric=nan).verdict


def test_random_state_and_loaders_are_left_alone():
    dls,_ = data()
    set_seed(3)
    state,order = torch.get_rng_state(),dls.train.rng.getstate()
    quick(dls=dls)
    quick(dls=dls, dry_run=True)
    measure_prices(make_learner, dls, steps=1, rounds=1)
    assert torch.equal(torch.get_rng_state(), state) and dls.train.rng.getstate() == order
