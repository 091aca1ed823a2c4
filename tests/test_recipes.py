"""Every recipe, end to end on a few small images."""
import importlib
import json
import math
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from PIL import Image

from rholoss_fastai.all import IrreducibleLosses, restrict_rows, scoring_loader, track_rows

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
def folder(small_cifar): return small_cifar


def check(out, steps, method):
    header, *rows = (out/'history.csv').read_text().splitlines()
    assert header == COLUMNS
    assert steps is None or int(rows[-1].split(',')[0]) == steps
    summary = json.loads((out/'summary.json').read_text())
    assert summary['method'] == method and summary['seconds'] > 0
    assert (out/'accuracy.png').stat().st_size > 5000
    return [dict(zip(header.split(','), map(float, row.split(',')))) for row in rows], summary


def test_cifar10_rho_loss_and_comparison(folder, tmp_path, capsys):
    for method in ('uniform', 'random', 'rho_loss', 'uniform_all', 'cross_fit'):
        out = tmp_path/'runs'/f'{method}-0'
        il_file = tmp_path/f'{method}.safetensors'
        run('cifar10_rho_loss', path=folder, method=method, steps=12, eval_every=5, bs=8, frac=0.25, il_epochs=2, il_file=il_file, out=out,
            il_one_cycle=method == 'cross_fit')
        rows, summary = check(out, 12, method)
        assert [r['step'] for r in rows] == [5, 10, 12] and rows[-1]['items_trained'] == 12*8
        assert rows[-1]['items_scored'] == (12*32 if method in ('rho_loss', 'cross_fit') else 0)
        assert bool(summary['il']) == (method in ('rho_loss', 'cross_fit')) == il_file.exists()
        if summary['il']: assert summary['il']['n_folds'] == (2 if method == 'cross_fit' else 1)
    run('compare_runs', folder=tmp_path/'runs')
    table = capsys.readouterr().out
    assert "steps to uniform's best" in table and 'rho_loss' in table
    assert json.loads((tmp_path/'runs'/'comparison.json').read_text())['table'][0]['method'] == 'uniform'


def test_other_folders(tmp_path):
    "CIFAR-100's superclasses, CINIC-10's three folders, and images of another size"
    rng = np.random.default_rng(0)
    for split, n in (('train', 8), ('valid', 6), ('clean', 2)):
        for label in range(6):
            folder = tmp_path/split/f'super{label % 2}'/f'class{label}'
            folder.mkdir(parents=True)
            for i in range(n): Image.fromarray((rng.integers(0, 60, (20, 24, 3)) + 30*label).astype(np.uint8)).save(folder/f'{i}.jpg')
    run('cifar10_rho_loss', path=tmp_path, method='rho_loss', steps=4, eval_every=2, bs=8, frac=0.25, il_epochs=1, size=16, test_folder='clean',
        holdout_folder='valid', il_file=tmp_path/'il', out=tmp_path/'out')
    check(tmp_path/'out', 4, 'rho_loss')
    assert len(IrreducibleLosses.load(tmp_path/'il')) == 6*8 # all of train, none of valid


def test_loaders_in_memory_go_through_the_rows_asked_for():
    from cifar10_data import ImageRows, image_loader
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 4, 4)
    dl = image_loader(ImageRows(images, torch.arange(40), list(range(40))), 8)
    for loader, rows in ((dl, range(40)), (restrict_rows(dl, range(3, 33, 2)), range(3, 33, 2))):
        tracked, seen = track_rows(loader), []
        for i, (_, y) in enumerate(tracked):
            assert y.tolist() == tracked.rows(i).tolist()
            seen += y.tolist()
        assert set(seen) <= set(rows) and len(seen) == len(rows)//8*8
        assert sorted(y for _, ys in scoring_loader(loader) for y in ys.tolist()) == list(rows)


def sentences(folder, rng):
    "CoLA's and SST-2's files, with a word that tells the label"
    for data, row in (('cola', 'x\t{0}\t\t{1}'), ('sst2', '{1}\t{0}')):
        for split, n in (('train', 96), ('dev', 20)):
            words = [' '.join(rng.choice(['a', 'film', '"about', "n't", 'cats'], rng.integers(2, 9))) + (' bad', ' good')[i % 2] for i in range(n)]
            (folder/f'{data}_{split}.tsv').write_text('\n'.join(row.format(i % 2, o) for i, o in enumerate(words)) + '\n')


@pytest.mark.parametrize('model', ['fastai', 'hf'])
def test_text(tmp_path, capsys, model):
    if model == 'hf': pytest.importorskip('transformers')
    sentences(tmp_path, np.random.default_rng(0))
    for method, data in (('uniform', 'cola'), ('random', 'sst2'), ('rho_loss', 'cola')):
        out = tmp_path/'runs'/method
        run('text_rho_loss', path=tmp_path, data=data, model=model, method=method, noise=0.1, steps=8, eval_every=4, bs=8, frac=0.25, il_epochs=1,
            il_file=tmp_path/'il', out=out)
        rows, summary = check(out, 8, method)
        assert [r['step'] for r in rows] == [4, 8] and rows[-1]['items_trained'] == 8*8
        assert rows[-1]['items_scored'] == (8*32 if method == 'rho_loss' else 0) and bool(summary['il']) == (method == 'rho_loss')
        assert len(summary['matthews_history']) == 2 and -1 <= summary['matthews'] == max(summary['matthews_history']) <= 1
    assert len(IrreducibleLosses.load(tmp_path/'il')) == 96
    run('text_rho_loss', path=tmp_path, model=model, noise=0.1, steps=2, eval_every=2, bs=8, frac=0.25, il_file=tmp_path/'il', out=out) # loaded
    assert 'cross-fitting' in (printed := capsys.readouterr().out) and printed.count('cross-fitting') == 1
    run('compare_runs', folder=tmp_path/'runs')
    assert 'matthews' in json.loads((tmp_path/'runs'/'comparison.json').read_text())['table'][0]


def test_text_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match='--data must be one of cola, sst2'): run('text_rho_loss', path=tmp_path, data='imdb')
    with pytest.raises(SystemExit, match='--path is missing'): run('text_rho_loss')
    with pytest.raises(FileNotFoundError, match='cola_train.tsv is missing'): run('text_rho_loss', path=tmp_path)


def test_real_sentences(shared_data):
    from text_rho_loss import read_sentences
    for data, n, n_dev in (('cola', 8551, 527), ('sst2', 6920, 872)):
        read = read_sentences(shared_data/'text', data)
        assert (~read.is_valid).sum() == n and read.is_valid.sum() == n_dev
        assert sorted(read.label.unique()) == [0, 1] and read.text.str.len().min() > 0 and not read.isna().any(axis=None)


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


def test_prune(folder, tmp_path, capsys):
    few = dict(path=folder, epochs=2, score_runs=2, score_epochs=1, forgetting_epochs=2, il_epochs=1, bs=16, evaluations=1, keep='0.6,0.5,0.4', per_class=True)
    run('prune', **few, methods='all,el2n,forgetting,stratified,random,infobatch', out=tmp_path/'static')
    for method in ('all-1-0', 'el2n-0.5-0', 'random-0.4-0', 'infobatch-1-0'):
        check(tmp_path/'static'/method, 20 if method == 'all-1-0' else None, method.split('-')[0])
    result = json.loads((tmp_path/'static'/'comparison.json').read_text())
    assert len(result['table']) == 2 + 4*3 and result['scores']['el2n']['n_runs'] == 2 and (tmp_path/'static'/'comparison.png').exists()
    assert all(0.7 < row['share_items_trained'] <= 1 for row in result['table'])
    (tmp_path/'static'/'el2n-0.5-0'/'summary.json').unlink() # as if it had been killed
    before = (tmp_path/'static'/'random-0.4-0'/'summary.json').stat().st_mtime_ns
    capsys.readouterr()
    run('prune', **few, methods='all,el2n,forgetting,stratified,random,infobatch', out=tmp_path/'static')
    assert capsys.readouterr().out.count('accuracy 0') == 1 and (tmp_path/'static'/'random-0.4-0'/'summary.json').stat().st_mtime_ns == before
    assert json.loads((tmp_path/'static'/'comparison.json').read_text())['table'][2]['accuracy'] == result['table'][2]['accuracy'] # the same again
    with pytest.raises(SystemExit, match='other settings'): run('prune', **dict(few, epochs=3), methods='all', out=tmp_path/'static')
    run('prune', **dict(few, keep='0.5'), methods='all,el2n,el2n_il,reducible,reducible_epochs', noise=0.2, equal='epochs', out=tmp_path/'noise')
    result = json.loads((tmp_path/'noise'/'comparison.json').read_text())
    assert all(0 <= row['noisy_trained'] < 0.5 for row in result['table']) and result['curves']['reducible']['found'][-1] == 1
    assert [row['share_items_trained'] for row in result['table'][1:4]] == [0.5]*3
    with pytest.raises(SystemExit, match='--methods must be of'): run('prune', path=folder, methods='grand')


def test_quickstart(tmp_path, capsys):
    run('quickstart', seeds=1, steps=60, out=tmp_path)
    table = capsys.readouterr().out
    assert 'RHO-LOSS' in table and 'IL seconds' in table and (tmp_path/'quickstart.png').exists()


def test_on_real_cifar10(shared_data, tmp_path):
    with tarfile.open(shared_data/'cifar10_jpeg.tar.xz') as archive: archive.extractall(tmp_path, filter='data')
    run('cifar10_rho_loss', path=tmp_path/'cifar10', method='random', steps=10, eval_every=10, out=tmp_path/'out')
    rows, summary = check(tmp_path/'out', 10, 'random')
    assert abs(summary['noisy_candidates'] - 0.18) < 0.01 # a tenth of the redrawn labels stay the same


def test_compare_selectors_and_resume(folder, tmp_path, capsys):
    settings = dict(path=folder, folder=tmp_path, bs=8, steps=4, mc_steps=2, eval_every=2, test_rows=20, il_epochs=1)
    run('compare_selectors', **settings, selectors='rho_loss,bald')
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['bald-0', 'rho_loss-0', 'uniform-0']
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*/history.csv')}
    run('compare_selectors', **settings)
    assert {p: p.stat().st_mtime_ns for p in written} == written, 'a run that was there was run again'
    result = json.loads((tmp_path/'comparison.json').read_text())
    names = importlib.import_module('compare_selectors').SELECTORS
    assert [row[0] for row in result['table']] == ['uniform', *names]
    assert dict(row[:2] for row in result['table'])['bald'] == 2
    scored = {name: runs[0][-1][4] for name, runs in result['histories'].items()}
    assert scored['then_uniform'] == 32 and scored['rho_loss'] == scored['loss'] == 4*32 # a quarter of the steps, not of the epochs
    assert len(json.loads((tmp_path/'proxy-0'/'summary.json').read_text())['spearman']) == 2 # epochs
    assert (tmp_path/'comparison.png').stat().st_size > 5000
    assert 'wrong labels among selected' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='got nonsense'): run('compare_selectors', **settings, selectors='nonsense')


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
    for changed in (dict(steps=80), dict(seed=1)):
        for method in ('one_pass', 'random'):
            with pytest.raises(SystemExit, match='other settings: choose another --out'):
                run('uci_one_pass', **{**dict(path=regression, data='toy', method=method, starts=3, steps=40, out=tmp_path), **changed})
    assert (tmp_path/'toy-one_pass.json').read_text() == before


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
def test_uci_by_ray_tune(regression, tmp_path, method, monkeypatch):
    pytest.importorskip('ray.tune'); pytest.importorskip('optuna')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(RECIPES), *sys.path])) # of Ray's workers
    run('uci_one_pass', path=regression, data='toy', method=method, starts=3, steps=40, out=tmp_path, results=tmp_path/'all.json')
    row, = json.loads((tmp_path/'all.json').read_text())['table']
    assert row['runs'] == 3 and math.isfinite(row['median'])
    with pytest.raises(SystemExit, match='other settings'): run('uci_one_pass', path=regression, data='toy', method=method, starts=4, steps=40, out=tmp_path)


def test_pbt_keeps_the_momentum_below_one():
    bounded = importlib.import_module('uci_one_pass').bounded
    assert [bounded(dict(lr=0.2, wd=0., mom=mom))['mom'] for mom in (0.99*1.2, 0.5, -0.1)] == [0.999, 0.5, 0.] and bounded(dict(lr=0.2, mom=0.))['lr'] == 0.2


def test_image_one_pass(folder, tmp_path):
    for method in ('constant', 'one_pass'):
        run('image_one_pass', path=folder, method=method, steps=25, eval_every=10, bs=8, out=tmp_path/method, results=tmp_path/'all.json')
        rows, summary = check(tmp_path/method, 25, method)
        assert summary['finite'] and [r['step'] for r in rows] == [10, 20, 25]
    constant, tuned = json.loads((tmp_path/'all.json').read_text())['runs']
    assert (constant['method'], tuned['method'], tuned['accuracy']) == ('constant', 'one_pass', summary['accuracy'])
    assert tuned['last_lr'] == summary['last']['lr']
    assert summary['last']['lr'] != 1e-5 and (tmp_path/'one_pass'/'hypers.png').stat().st_size > 5000


def test_ptb_one_pass(tmp_path, monkeypatch, capsys):
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
    class Stops(Callback):
        def before_train(self): raise CancelFitException
    monkeypatch.setattr(importlib.import_module('ptb_one_pass'), 'ModelResetter', Stops)
    run('ptb_one_pass', path=tmp_path, method='constant', epochs=1, hidden=16, bs=4, seq_len=10, out=tmp_path/'stopped')
    assert json.loads((tmp_path/'stopped'/'summary.json').read_text())['valid'] == [] and 'stopped in its first epoch' in capsys.readouterr().out
