"""Every recipe, end to end on a few small images."""
import importlib
import json
import math
import subprocess
import sys
import tarfile
from functools import partial
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


@pytest.fixture(scope='module')
def regression(tmp_path_factory):
    "A made-up data set in the layout of the UCI file"
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp('uci')/'made_up.npz'
    x = rng.normal(size=(200, 3))
    np.savez(file, toy_x=x, toy_y=(x[:, :1]*x[:, 1:2] + x[:, 2:])*7 + 3)
    return file


def test_uci_one_pass(regression, tmp_path, capsys):
    for method in ('random', 'baydin', 'diff_through_opt', 'lorraine', 'one_pass', 'one_pass_all'):
        run('uci_one_pass', path=regression, data='toy', method=method, starts=2, steps=40, out=tmp_path, results=tmp_path/'all.json')
    table = json.loads((tmp_path/'all.json').read_text())['table']
    assert [(row['runs'], row['failed']) for row in table] == [(2, 0)]*6 and all(math.isfinite(row['median']) for row in table)
    before = (tmp_path/'toy-one_pass.json').read_text()
    run('uci_one_pass', path=regression, data='toy', method='one_pass', starts=2, steps=40, out=tmp_path) # nothing is run again
    assert (tmp_path/'toy-one_pass.json').read_text() == before and 'one_pass_all' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='--method must be one of'): run('uci_one_pass', path=regression, method='best', out=tmp_path)


def test_uci_loops_are_the_learners_steps(regression):
    "The bare loops, all starts at once, train as fastai's SGD does, and differentiate as `learn.one_pass` does, one step back"
    uci = importlib.import_module('uci_one_pass')
    data, starts = uci.Regression(regression, 'toy'), [dict(lr=0.03, wd=0.01, mom=0.8), dict(lr=0.1, wd=1e-3, mom=0.3)]
    for i, run_ in enumerate(uci.run_loops('random', data, starts, 30)):
        assert run_['mse'] == pytest.approx(uci.run_learner(None, data, starts[i], i, 30)['mse'], rel=1e-4)
    loops = uci.Loops(3, starts)
    loops.diff_through_opt(data, 20, every=10, horizon=1) # through one step the exact derivative is the series' first term
    for i, start in enumerate(starts):
        learn = uci.Learner(uci.DataLoaders(uci.Repeat(data.train, 20), [data.valid]), uci.mlp(3, i), loss_func=uci.F.mse_loss, lr=start['lr'], wd=start['wd'],
                            wd_bn_bias=True, opt_func=partial(uci.SGD, mom=start['mom'], decouple_wd=False)).one_pass(n_terms=1, hyper_clip=None)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert learn.lr == pytest.approx(10**loops.theta['lr'][i].item(), rel=1e-3) and learn.wd == pytest.approx(10**loops.theta['wd'][i].item(), rel=1e-3)


def test_ray_is_optional(regression, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(SystemExit, match=r'pip install "\.\[tune\]"'): run('uci_one_pass', path=regression, data='toy', method='asha', out=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['bayesopt', 'asha', 'pbt'])
def test_uci_by_ray_tune(regression, tmp_path, method):
    pytest.importorskip('ray.tune'); pytest.importorskip('optuna')
    run('uci_one_pass', path=regression, data='toy', method=method, starts=3, steps=40, out=tmp_path, results=tmp_path/'all.json')
    row, = json.loads((tmp_path/'all.json').read_text())['table']
    assert row['runs'] == 1 and math.isfinite(row['median'])


def test_image_one_pass(folder, tmp_path):
    for method in ('constant', 'one_pass'):
        run('image_one_pass', path=folder, method=method, steps=25, eval_every=10, bs=8, out=tmp_path/method)
        rows, summary = check(tmp_path/method, 25, method)
        assert summary['finite'] and [r['step'] for r in rows] == [10, 20, 25]
    assert summary['last']['lr'] != 1e-5 and (tmp_path/'one_pass'/'hypers.png').stat().st_size > 5000


def test_ptb_one_pass(tmp_path, capsys):
    "A made-up language in which the next word follows from the last"
    rng = np.random.default_rng(0)
    for name, n in (('train', 200), ('valid', 40), ('test', 40)):
        lines = [' '.join(f'w{(start + 3*i) % 20}' for i in range(6)) for start in rng.integers(0, 20, n)]
        (tmp_path/f'ptb.{name}.txt').write_text('\n'.join(lines) + '\n')
    perplexities = []
    for method in ('constant', 'one_pass'):
        run('ptb_one_pass', path=tmp_path, method=method, lr=0.01, epochs=4, hidden=16, bs=4, seq_len=10, every=2, out=tmp_path/method)
        perplexities.append(json.loads((tmp_path/method/'summary.json').read_text())['test'])
    assert perplexities[1] < 0.8*perplexities[0]
    with pytest.raises(FileNotFoundError, match='ptb.train.txt'): run('ptb_one_pass', path=tmp_path/'elsewhere')
