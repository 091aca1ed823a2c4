"Runs in several processes give what they give one after the other"
import os
import subprocess
import sys
import threading
import time
import tracemalloc
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
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from rholoss_fastai.all import compare, crossfit_irreducible, run_tasks, score_dataset, tune_just_train_twice
from rholoss_fastai.executors import check_executor, run_in_order


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


@pytest.fixture
def new_processes(monkeypatch): monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)

def decorated(o): return o
replaced, decorated = decorated, partial(decorated)

class Holds:
    def __init__(self, held): self.held = held
    def __len__(self): return 8
    def __getitem__(self, i): return torch.zeros(5), 0

@pytest.mark.parametrize('func', [lambda o: o, partial(lambda o, a: o, a=1), Holds([lambda o: o]), replaced])
def test_functions_that_have_no_name_of_their_own_are_named(func, new_processes):
    with pytest.raises(TypeError, match=r"can't import all they need \(test_executors\.(<lambda>|decorated)\)\. Write"):
        run_tasks(later_sooner, dict(a=func), 2)

@pytest.mark.parametrize('held', [open, lambda _: (o for o in 'ab'), lambda _: threading.Lock()])
def test_data_that_no_process_can_be_sent_are_told_before_training(held, tmp_path, new_processes, monkeypatch):
    (tmp_path/'file').write_text('some')
    trained, data = [], Holds(held(tmp_path/'file'))
    monkeypatch.setattr(Learner, 'fit', lambda *_: trained.append(1))
    loaders = DataLoaders(DataLoader(data, bs=4, shuffle=True), DataLoader(data, bs=4))
    message = r"can't be sent .* pickle '.*\. What is open .* in a data set's `__getitem__`\. Or pass executor=None"
    for call in (partial(compare, methods=['rho_loss']), partial(score_dataset, epochs=1),
                 partial(tune_just_train_twice, groups=[0, 1]*4, n_epochs_id=[1], n_epoch=1, upweights=[2.])):
        with pytest.raises(TypeError, match=message): call(make_learner, loaders, executor=2, **quiet)
    assert not trained

def test_data_are_looked_at_without_a_copy(new_processes):
    x = torch.zeros(10_000_000)
    image = Image.fromarray(x[:9_000_000].view(3000, 3000).byte().numpy())
    data = [x, x.numpy(), pd.DataFrame(x.view(-1, 5).numpy()), bytes(10_000_000), image, TensorDataset(x)]
    tracemalloc.start()
    try:
        check_executor(2, 1, data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally: tracemalloc.stop()

def test_a_system_whose_processes_are_all_new_is_not_told_to_copy(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('multiprocessing.get_all_start_methods', lambda: ['spawn'])
    with pytest.raises(TypeError, match='since this system has no others.*them, or pass executor=None'):
        run_tasks(lambda o: o, dict(a=1), 2, threads=1)

SCRIPT = """
from rholoss_fastai.executors import run_tasks
print(run_tasks(len, dict(a='12'), 2, threads=2))
"""

@pytest.mark.slow
def test_a_script_that_starts_runs_wherever_it_is_read_is_told(tmp_path):
    script = tmp_path/'script.py'
    script.write_text(SCRIPT)
    env = dict(os.environ, PYTHONPATH=os.getcwd())
    said = subprocess.run([sys.executable, '-W', 'ignore', script], capture_output=True, text=True, env=env)
    assert "under `if __name__ == '__main__':`" in said.stderr and 'exit code 1, see what it printed' in said.stdout
    script.write_text(SCRIPT.replace('print', "if __name__ == '__main__': print"))
    said = subprocess.run([sys.executable, '-W', 'ignore', script], capture_output=True, text=True, env=env)
    assert said.stdout == "({'a': 2}, {})\n"
