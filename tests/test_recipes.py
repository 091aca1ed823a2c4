"""Every recipe, end to end on a few small images."""
import importlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPES = Path(__file__).parent.parent/'recipes'
COLUMNS = 'step,epoch,accuracy,seconds,items_scored,items_trained'


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


def run(name, **kwargs):
    "A recipe's `main`, called as a function"
    importlib.import_module(name).main(**kwargs)


def command(*args):
    "A recipe from the command line"
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=RECIPES)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Ten classes of ten small images in CIFAR-10's layout"
    path, rng = tmp_path_factory.mktemp('cifar'), np.random.default_rng(0)
    for split, n in (('train', 16), ('test', 4)):
        for label in range(10):
            (path/split/f'class{label}').mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (32, 32, 3)) + 18*label
                Image.fromarray(pixels.astype(np.uint8)).save(path/split/f'class{label}'/f'{i:04d}.png')
    return path


def check(out, steps, method):
    header, *rows = (out/'history.csv').read_text().splitlines()
    assert header == COLUMNS
    assert int(rows[-1].split(',')[0]) == steps
    summary = json.loads((out/'summary.json').read_text())
    assert summary['method'] == method and summary['seconds'] > 0
    assert (out/'accuracy.png').stat().st_size > 5000
    return [dict(zip(header.split(','), map(float, row.split(',')))) for row in rows], summary


def test_cifar10_rho_loss_and_comparison(folder, tmp_path, capsys):
    for method in ('uniform', 'random', 'rho_loss', 'uniform_all'):
        out = tmp_path/'runs'/f'{method}-0'
        run('cifar10_rho_loss', path=folder, method=method, steps=12, eval_every=5, bs=8, frac=0.25, il_epochs=2, il_file=tmp_path/'il.safetensors', out=out)
        rows, summary = check(out, 12, method)
        assert [r['step'] for r in rows] == [5, 10, 12] and rows[-1]['items_trained'] == 12*8
        assert rows[-1]['items_scored'] == (12*32 if method == 'rho_loss' else 0)
        assert bool(summary['il']) == (method == 'rho_loss')
    assert (tmp_path/'il.safetensors').exists()
    run('compare_runs', folder=tmp_path/'runs')
    table = capsys.readouterr().out
    assert "steps to uniform's best" in table and 'rho_loss' in table
    assert json.loads((tmp_path/'runs'/'comparison.json').read_text())['table'][0]['method'] == 'uniform'


def test_command_line(folder, tmp_path):
    "Options with underscores, as in Python, and a clear end for bad ones"
    out = tmp_path/'out'
    done = command('cifar10_rho_loss.py', '--path', folder, '--method', 'uniform', '--steps', 4, '--eval_every', 2, '--bs', 8, '--out', out)
    assert done.returncode == 0, done.stderr
    check(out, 4, 'uniform')
    with pytest.raises(SystemExit, match='--method must be one of'): run('cifar10_rho_loss', path=folder, method='best')
    with pytest.raises(FileNotFoundError, match='No images'): run('cifar10_rho_loss', path=tmp_path)


@pytest.mark.parametrize('method', ['uniform', 'batch_loss_filter', 'selective_backprop', 'composer'])
def test_batch_selection(folder, tmp_path, method):
    run('batch_selection', path=folder, method=method, epochs=2, bs=16, out=tmp_path/method)
    rows, summary = check(tmp_path/method, 20, method)
    assert len(rows) == 2 and len(summary['valid_losses']) == 2
    if method != 'uniform': assert summary['ledger']['selected'][0] == 1 > summary['ledger']['selected'][1]


def test_quickstart(tmp_path, capsys):
    run('quickstart', seeds=1, steps=60, out=tmp_path)
    table = capsys.readouterr().out
    assert 'RHO-LOSS' in table and 'IL seconds' in table and (tmp_path/'quickstart.png').exists()


def test_on_real_cifar10(shared_data, tmp_path):
    with tarfile.open(shared_data/'cifar10_jpeg.tar.xz') as archive: archive.extractall(tmp_path, filter='data')
    run('cifar10_rho_loss', path=tmp_path/'cifar10', method='random', steps=10, eval_every=10, out=tmp_path/'out')
    rows, summary = check(tmp_path/'out', 10, 'random')
    assert abs(summary['noisy_candidates'] - 0.18) < 0.01 # a tenth of the redrawn labels stay the same
