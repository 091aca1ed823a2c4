import gc
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'  # before anything imports pyplot
os.environ.setdefault('OMP_NUM_THREADS', '1')  # before anything imports torch: tests run side by side, one per core
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')  # to ask for CUDA must not start it: tests fork

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

gc.set_threshold(100_000, 50, 50)  # while all is imported and collected, little is garbage
sys.dont_write_bytecode = False  # what pytest rewrites is kept: five seconds of each process

def pytest_configure(config):
    "`-m 'not slow'` is for between two edits: fewer examples and draws too (see `helpers`)"
    if 'not slow' in config.option.markexpr: os.environ['RHOLOSS_QUICK'] = '1'
    else: os.environ.pop('RHOLOSS_QUICK', None)

n_modules = 0

def set_imports_aside():
    "What is imported by now stays: the garbage collector needn't look at it again and again"
    global n_modules
    gc.collect()
    gc.freeze()
    n_modules = len(sys.modules)

def pytest_collection_finish(session):
    starts = any(vars(o.module).keys() & {'run_in_process', 'two_processes', 'start_process'} for o in session.items)
    if starts and sys.platform == 'linux':
        from helpers import start_server
        start_server()
    set_imports_aside()
    gc.set_threshold(20_000, 20, 20) # and seldom at what comes
    seed_only_what_is_there()

def pytest_runtest_setup():
    "Some tests import torchvision or the compiler: each `gc.collect()` of the package would take 0.15 s from then on"
    if len(sys.modules) > n_modules + 50: set_imports_aside()

def seed_only_what_is_there():
    "`torch.manual_seed` notes a whole stack for each kind of device that isn't there, a millisecond each time"
    torch = sys.modules.get('torch')
    for kind in ('cuda', 'xpu', 'mtia'):
        device = getattr(torch, kind, None)
        if device is not None and not device.is_available():
            device.manual_seed_all = device.manual_seed = lambda seed: None

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of many cases all but every n-th count as slow; long tests first, so that no process is left with one at the end;
    skip what needs CUDA where there is none"""
    n_seen = Counter()
    for item in items:
        mark, name = item.get_closest_marker('many'), item.nodeid.split('[')[0]
        if mark and n_seen[name] % mark.args[0]: item.add_marker('slow')
        n_seen[name] += 1
    items.sort(key=lambda item: 'slow' not in item.keywords)
    cuda = [item for item in items if 'cuda' in item.keywords]
    if not cuda: return
    import torch
    if not torch.cuda.is_available():
        for item in cuda: item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))

@pytest.fixture(scope='session')
def copy_repository():
    "A function that copies what git tracks or would track, as it is now, to a folder; some folders may be left out"
    listed = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True,
                            text=True, capture_output=True).stdout.splitlines()
    def copy(target, skip=()):
        for name in listed:
            if not (ROOT/name).is_file() or name.startswith(skip): continue
            (target/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, target/name)
        return target
    return copy

@pytest.fixture(scope='session')
def root():
    "The repository's root"
    return ROOT

@pytest.fixture(scope='session')
def shared_data():
    "The folder of shared data sets: $RHOLOSS_DATA, or ../shared/data beside the repository"
    path = Path(os.environ.get('RHOLOSS_DATA', ROOT.parent/'shared'/'data'))
    if not path.is_dir(): pytest.skip(f'no shared data in {path}: set RHOLOSS_DATA to the folder that holds them')
    return path

@pytest.fixture(scope='session')
def small_cifar(tmp_path_factory):
    "Ten classes of a few small images in CIFAR-10's layout"
    path,rng = tmp_path_factory.mktemp('cifar'),np.random.default_rng(0)
    for split,n in (('train', 16), ('test', 4)):
        for label in range(10):
            (path/split/f'class{label}').mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (32, 32, 3)) + 18*label
                Image.fromarray(pixels.astype(np.uint8)).save(path/split/f'class{label}'/f'{i:04d}.png')
    return path

@pytest.fixture
def narrow_cnn(monkeypatch):
    "The recipes' small CNN with so few channels that a step costs what fastai's loop does: import recipes afterwards"
    import importlib

    import torch
    monkeypatch.syspath_prepend(str(ROOT/'recipes'))
    def narrow(n_classes=10, size=32):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False), torch.nn.BatchNorm2d(8),
                                   torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8*(size//4)**2, n_classes))
    for name, models in (('cifar10_rho_loss', 'ARCHITECTURES'), ('batch_selection', 'MODELS'),
                         ('image_one_pass', 'MODELS')):
        monkeypatch.setitem(getattr(importlib.import_module(name), models), 'small_cnn', narrow)
