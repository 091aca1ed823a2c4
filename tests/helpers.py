"""A toy task that trains in milliseconds, Learners on it, and what tests of every method share."""
import gc
import multiprocessing
import os
import runpy
import socket
import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # noqa: F401 (patches `no_bar`)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastcore.basics import noop
from hypothesis import settings
from torch import nn

N, N_VALID, BS, N_FEATURES, N_CLASSES = 72, 24, 24, 6, 3

# A processor that multiplies in bfloat16 scores in it, and chooses other items than these tests compute in float32
if hasattr(torch.cpu, 'get_capabilities'):
    def in_float32(capabilities=torch.cpu.get_capabilities): return {**capabilities(), 'amx_bf16': False}
    torch.cpu.get_capabilities = in_float32


def examples(n, **kwargs):
    "So many examples of hypothesis; an eighth, but five at least, where slow tests are left out"
    if os.environ.get('RHOLOSS_QUICK'): n = min(n, max(5, n//8))
    return settings(max_examples=n, deadline=None, **kwargs)

def draws(n):
    "So many draws of a simulation; a quarter where slow tests are left out"
    return n//4 if os.environ.get('RHOLOSS_QUICK') else n


# Processes of their own: forked from one that has imported all that takes seconds, and has done nothing else

PRELOAD = ['fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'fastai.distributed', 'matplotlib.pyplot',
           'nbdev.test', 'sklearn.datasets', 'torch._dynamo', 'rholoss_fastai.all'] # optimisers import `_dynamo`
processes = multiprocessing.get_context('forkserver' if 'forkserver' in multiprocessing.get_all_start_methods()
                                         else 'spawn')
if hasattr(processes, 'set_forkserver_preload'): processes.set_forkserver_preload(PRELOAD)

def start_server():
    "Let the server be a fork of this process, which has imported nearly all and has run nothing yet"
    from multiprocessing import forkserver, resource_tracker  # not on Windows

    for name in PRELOAD:
        with suppress(ImportError): import_module(name)
    def fork(path, args, fds):
        if pid := os.fork(): return pid
        try: # what Python would have been started for
            for fd in {int(o) for o in os.listdir('/proc/self/fd')} - {0, 1, 2, *fds}:
                with suppress(OSError): os.close(fd) # among them those by which it sees that this process has ended
            sys.stdout, sys.stderr = (os.fdopen(fd, 'w', 1, closefd=False) for fd in (1, 2)) # not pytest's
            exec(args[-1], {})
        finally: os._exit(0)
    resource_tracker.ensure_running()
    with patch('multiprocessing.util.spawnv_passfds', fork): forkserver.ensure_running()

def _run(code, args, env, out):
    gc.freeze() # what was imported needn't be looked at by each `gc.collect()`
    multiprocessing.set_start_method(None, force=True) # Python's own for what the code starts, as in a fresh process
    os.environ.update(env)
    log = os.open(out, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2): os.dup2(log, stream)
    sys.argv = [str(o) for o in args]
    if os.path.exists(code):
        sys.path.insert(0, os.path.dirname(code)) # as Python does
        runpy.run_path(code, run_name='__main__')
    else: exec(compile(code, '<code>', 'exec'), {'__name__': '__main__'})

def start_process(code, *args, out, env=None):
    "A process of its own that runs code, or a file, and prints to the file `out`"
    run = processes.Process(target=_run, args=(str(code), [code, *args], env or {}, out))
    run.start()
    return run

def run_in_process(code, *args, out, timeout=600, env=({},)):
    "Run code, or a file, in a process of its own for each of `env`; what they printed, if all end well"
    logs = [f'{out}{i}.log' for i in range(len(env))]
    runs = [start_process(code, *args, out=log, env=o) for o, log in zip(env, logs)]
    try:
        for run in runs: run.join(timeout)
    finally:
        for run in runs: run.kill()
    said = [Path(log).read_text(errors='replace') if os.path.exists(log) else '' for log in logs]
    assert all(run.exitcode == 0 for run in runs), '\n'.join(o[-8000:] for o in said)
    return said

def two_processes(code, *args, out):
    "Run code, or a file, in two processes of a distributed run, on the CPU"
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                  ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1',
                  CUDA_VISIBLE_DEVICES='')
    return run_in_process(code, *args, out=out, env=[dict(shared, RANK=o, LOCAL_RANK=o) for o in '01'])


class Toy:
    """Rows of six features, and one of three classes that depends on them; made of the seed, so that every process has
    the same"""
    def __init__(self, n=N, seed=0, targets=None):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(N_FEATURES, N_CLASSES, generator=torch.Generator().manual_seed(99))
        self.x = torch.randn(n, N_FEATURES, generator=generator)
        classes = (self.x@weights + 0.5*torch.randn(n, N_CLASSES, generator=generator)).argmax(1) if n else torch.empty(
            0, dtype=torch.long)
        self.y = classes if targets is None else targets(self.x, classes)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]
    def new_empty(self): return type(self)(0) # for `export`


def rows_of(x, data=None):
    "The rows of a batch of features, told by the features themselves"
    return (x[:, None] == (Toy() if data is None else data).x).all(2).int().argmax(1)


def loaders(bs=BS, train=None, valid=None, shuffle=True, **kwargs):
    "Training and validation loader of the toy task, which shuffle alike each time"
    set_seed(0)
    train, valid = Toy() if train is None else train, Toy(N_VALID, 1) if valid is None else valid
    return DataLoaders(DataLoader(train, bs=bs, shuffle=shuffle, n_inp=1, **kwargs), DataLoader(valid, bs=bs, n_inp=1))


def linear(n_out=N_CLASSES): return nn.Linear(N_FEATURES, n_out)

def mlp(n_out=N_CLASSES):
    "With batch norm and dropout, whose buffers, modes and draws scoring must leave alone"
    return nn.Sequential(nn.Linear(N_FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, n_out))


def learner(dls=None, model=linear, loss_func=None, seed=0, lr=0.05, **kwargs):
    "A Learner on the toy task; `model` is a function or a module, and `dls` a function or loaders"
    if seed is not None: set_seed(seed)
    model = model if isinstance(model, nn.Module) else model()
    dls = loaders() if dls is None else dls() if callable(dls) else dls
    return Learner(dls, model, loss_func=loss_func or CrossEntropyLossFlat(), lr=lr, **{'opt_func': SGD, **kwargs})


def on_cuda(learn):
    learn.dls.to(torch.device('cuda'))
    return learn

def quiet(learn):
    "Without bars and lines, whatever is called"
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn


def fit(learn, n_epoch=1, *args, method='fit', seed=None, **kwargs):
    "Fit without a word; the Learner"
    if seed is not None: set_seed(seed)
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(n_epoch, *args, **kwargs)
    return learn


def weights_of(learn):
    weights = [o.detach().flatten().clone() for o in learn.model.state_dict().values() if o.is_floating_point()]
    return torch.cat(weights).cpu()


class Interrupt(Callback):
    "The user's ctrl-C (or another exception) when an event comes first in the second epoch"
    def __init__(self, event, order=30, error=KeyboardInterrupt): self.at, self.order, self.error = event, order, error
    def __call__(self, event_name):
        due = getattr(self.learn, 'epoch', 0) == 1 and self.at in (event_name, None)
        if event_name in ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
                          'before_step', 'after_step', 'after_batch'):
            due = due and self.training
        if due: raise self.error


class Noted(Callback):
    "The rows and the loss of every batch that is trained on"
    order, run_valid = 40, False
    def before_fit(self): self.rows, self.losses = [], []
    def after_loss(self):
        self.rows.append(rows_of(self.xb[0])); self.losses.append(self.learn.loss_grad.detach().clone())


@contextmanager
def no_trace(learn):
    "What a scoring forward must leave as it was, bit for bit"
    def modes(): return [m.training for m in learn.model.modules()]
    def attributes(): return {name: sorted(vars(m)) for name, m in learn.model.named_modules()}
    def held(): return [o.clone() for o in learn.model.state_dict().values()]
    grads = [p.grad for p in learn.model.parameters()]
    before = modes(), attributes(), held(), torch.get_rng_state(), getattr(learn.loss_func, 'reduction',
                                                                           None), torch.is_grad_enabled()
    yield
    after = modes(), attributes(), held(), torch.get_rng_state(), getattr(learn.loss_func, 'reduction',
                                                                          None), torch.is_grad_enabled()
    assert before[:2] == after[:2] and before[4:] == after[4:]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2])) and torch.equal(before[3], after[3])
    assert all(a is b.grad for a, b in zip(grads, learn.model.parameters()))
