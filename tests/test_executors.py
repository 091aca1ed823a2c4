"Runs in several processes give what they give one after the other"
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType

import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn
from torch.utils.data import TensorDataset

from rholoss_fastai.all import compare, crossfit_irreducible, run_tasks, score_dataset, tune_just_train_twice
from rholoss_fastai.executors import run_in_order


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Bits depend on the number of threads, and processes are copied only where there is one"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def dls():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=generator)
    data = TensorDataset(x, (x[:,0] + torch.randn(96, generator=generator) > 0).long())
    return DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(data, bs=32))


def make_learner(dls): return Learner(dls, nn.Linear(5, 2), loss_func=CrossEntropyLossFlat())


def same_model(dls, model=nn.Linear(5, 2)): return Learner(dls, model, loss_func=CrossEntropyLossFlat()) # noqa: B008


quiet = dict(progress=False)


def test_cross_fitting(dls):
    fit = partial(crossfit_irreducible, make_learner, dls, 2, n_folds=3, seed=1, **quiet)
    here,apart = fit(),fit(executor=2)
    assert torch.equal(here.values, apart.values)
    same = {k: v for k,v in here.info.items() if k != 'seconds'}
    assert same == {k: v for k,v in apart.info.items() if k != 'seconds'}


@pytest.mark.parametrize('score', ['el2n', 'forgetting', 'loss_variance'])
@pytest.mark.many(2)
def test_scores_of_a_data_set(dls, score, tmp_path):
    fit = partial(score_dataset, make_learner, dls, score, epochs=2, n_runs=3, **quiet)
    here = fit()
    fit(path=tmp_path/'scores.safetensors', executor=2)
    apart = fit(path=tmp_path/'scores.safetensors') # all there
    assert torch.equal(here.values, apart.values) and apart.info['n_runs'] == 3


def test_a_pair_of_just_train_twice(dls):
    groups = torch.arange(96) % 2
    tune = partial(tune_just_train_twice, make_learner, dls, groups, [1, 2], 2, [1., 5.], **quiet)
    pd.testing.assert_frame_equal(tune(), tune(executor=2))


@pytest.mark.parametrize('call', [partial(crossfit_irreducible, n_epoch=1), partial(score_dataset, epochs=1, n_runs=2)])
def test_a_model_that_is_not_new_is_told_beforehand(dls, call):
    with pytest.raises(ValueError, match='a new Learner with a new model each time'):
        call(same_model, dls, executor=2, **quiet)


def seeds(n, generator): return [int(torch.randint(2**31, (), generator=generator)) for _ in range(n)]

def third_fails(dls):
    learn = make_learner(dls)
    if torch.initial_seed() == seeds(4, torch.Generator().manual_seed(0))[2]: learn.loss_func = None
    return learn

def test_runs_before_one_that_fails_are_kept(dls, tmp_path):
    path = tmp_path/'scores.safetensors'
    with pytest.raises(RuntimeError, match='run 2: '):
        score_dataset(third_fails, dls, epochs=1, n_runs=4, path=path, executor=2, **quiet)
    whole = score_dataset(make_learner, dls, epochs=1, n_runs=4, path=path, **quiet)
    assert whole.info['n_runs'] == 4
    assert torch.equal(whole.values, score_dataset(make_learner, dls, epochs=1, n_runs=4, **quiet).values)


def later_sooner(i, step):
    time.sleep(0.03*(4 - i))
    return i

def test_results_come_in_order_whatever_ends_first():
    taken,steps = [],[]
    run_in_order(later_sooner, [dict(i=i) for i in range(5)], taken.append, 3, threads=1, step=lambda: steps.append(1),
                 n_steps=10)
    assert taken == list(range(5)) and len(steps) == 10


def some_none(i, step):
    if i == 3: raise ValueError('lost')
    return i or None

@pytest.mark.parametrize('executor', [2, ThreadPoolExecutor(2), map])
def test_none_is_a_result_like_others_and_a_lost_one_is_not(executor):
    taken = []
    with pytest.raises(RuntimeError, match='1 of 5 runs are lost: run 3: ValueError: lost'):
        run_in_order(some_none, [dict(i=i) for i in range(5)], taken.append, executor, threads=1)
    assert taken == [None, 1, 2]


# New processes, which import what they run

@pytest.mark.parametrize('call', [compare, partial(crossfit_irreducible, n_epoch=1), partial(score_dataset, epochs=1),
                                  partial(tune_just_train_twice, groups=torch.arange(96) % 2, n_epochs_id=[1],
                                          n_epoch=1, upweights=[2.])])
def test_what_no_new_process_finds_is_told_beforehand(dls, call, monkeypatch):
    built = []
    def inside(dls):
        built.append(1)
        return Learner(dls, nn.Linear(5, 2), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(TypeError, match="CUDA is here.*inside.*top of a file and import them, or pass executor=None"):
        call(inside, dls, executor=2, **quiet)
    assert len(built) < 3 # looked at, not trained

def test_several_threads_ask_for_new_processes_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    tasks = dict(a=1, b=2)
    with pytest.raises(TypeError, match='each has 2 threads.*pass threads=1, or executor=None'):
        run_tasks(lambda o: 2*o, tasks, 2, threads=2)
    for mend in (dict(executor=2, threads=1), dict(executor=None)):
        assert run_tasks(lambda o: 2*o, tasks, **mend)[0] == dict(a=2, b=4)

def test_functions_of_a_notebook(monkeypatch):
    def of_notebook(o): return o
    of_notebook.__module__, of_notebook.__qualname__ = '__main__', 'of_notebook'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    notebook = ModuleType('__main__')
    notebook.of_notebook = of_notebook
    monkeypatch.setitem(sys.modules, '__main__', notebook)
    with pytest.raises(TypeError, match=r'\(of_notebook of this notebook\)'):
        run_tasks(partial(later_sooner, step=of_notebook), dict(a=torch.zeros(3)), 2, threads=2)
