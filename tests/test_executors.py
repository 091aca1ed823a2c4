"Runs in several processes give what they give one after the other"
from functools import partial

import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import TensorDataset

from rholoss_fastai.all import crossfit_irreducible, score_dataset, tune_just_train_twice
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


def test_runs_before_one_that_fails_are_kept(dls, tmp_path):
    calls = []
    def third_fails(dls):
        calls.append(1)
        learn = make_learner(dls)
        if torch.initial_seed() == seeds[2]: learn.loss_func = None
        return learn
    generator = torch.Generator().manual_seed(0)
    seeds = [int(torch.randint(2**31, (), generator=generator)) for _ in range(4)]
    path = tmp_path/'scores.safetensors'
    with pytest.raises(RuntimeError, match='run 2: '):
        score_dataset(third_fails, dls, epochs=1, n_runs=4, path=path, executor=2, **quiet)
    whole = score_dataset(make_learner, dls, epochs=1, n_runs=4, path=path, **quiet)
    assert whole.info['n_runs'] == 4
    assert torch.equal(whole.values, score_dataset(make_learner, dls, epochs=1, n_runs=4, **quiet).values)


def test_results_come_in_order_whatever_ends_first():
    import time
    def task(i, step):
        time.sleep(0.03*(4 - i))
        return i
    taken,steps = [],[]
    run_in_order(task, [dict(i=i) for i in range(5)], taken.append, 3, threads=1, step=lambda: steps.append(1),
                 n_steps=10)
    assert taken == list(range(5)) and len(steps) == 10
