"""Every recipe, end to end on a few small images."""
import importlib
import json
import math
import os
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from helpers import fit, run_in_process
from PIL import Image

from rholoss_fastai.all import Comparison, IrreducibleLosses, restrict_rows, scoring_loader, track_rows

RECIPES = Path(__file__).parent.parent/'recipes'
COLUMNS = 'step,epoch,accuracy,seconds,items_scored,items_trained'


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


def run(name, **kwargs):
    "A recipe's `main`, called as a function"
    importlib.import_module(name).main(**kwargs)


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


def compared(folder, *methods, seeds=1):
    "The comparison that a recipe left, with these methods beside plain training"
    table = Comparison.load(folder/'comparison.json').table
    assert list(table.index) == ['plain', *methods] and (table.seeds == seeds).all()
    assert (folder/'comparison.png').stat().st_size > 5000
    return table


@pytest.mark.slow
def test_cifar10_rho_loss_and_comparison(folder, tmp_path, capsys, narrow_cnn):
    for name,options in (('holdout', {}), ('cross_fit', dict(cross_fit=True, il_one_cycle=True))):
        run('cifar10_rho_loss', path=folder, steps=20, eval_every=10, bs=8, frac=0.25, il_epochs=2,
            folder=tmp_path/name, **options)
        table = compared(tmp_path/name, 'random', 'rho_loss')
        assert (table.steps == 20).all() and (table.trained == 20*8).all() and table.scored.tolist() == [0, 0, 20*32]
        assert (table.wrong_labels > 0).all()
        il = IrreducibleLosses.load(tmp_path/name/'il.safetensors')
        assert (len(il), il.info['n_folds']) == ((160, 2) if options else (80, 1))
    capsys.readouterr()
    run('compare_runs', folder=tmp_path/'holdout')
    assert 'rho_loss' in capsys.readouterr().out


def test_other_folders(tmp_path):
    "CIFAR-100's superclasses, CINIC-10's three folders, and images of another size"
    rng = np.random.default_rng(0)
    for split, n in (('train', 8), ('valid', 6), ('clean', 2)):
        for label in range(6):
            folder = tmp_path/split/f'super{label % 2}'/f'class{label}'
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray((rng.integers(0, 60, (20, 24, 3)) + 30*label).astype(np.uint8)).save(folder/f'{i}.jpg')
    run('cifar10_rho_loss', path=tmp_path, methods='rho_loss', steps=6, eval_every=2, bs=8, frac=0.25, il_epochs=1,
        size=16, test_folder='clean',
        holdout_folder='valid', folder=tmp_path/'out')
    compared(tmp_path/'out', 'rho_loss')
    assert len(IrreducibleLosses.load(tmp_path/'out'/'il.safetensors')) == 6*8 # all of train, none of valid


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
        for split, n in (('train', 64), ('dev', 20)):
            words = [' '.join(rng.choice(['a', 'film', '"about', "n't", 'cats'], rng.integers(2, 9)))
                     + (' bad', ' good')[i % 2] for i in range(n)]
            (folder/f'{data}_{split}.tsv').write_text('\n'.join(row.format(i % 2, o) for i, o in enumerate(words))
                                                      + '\n')


@pytest.mark.slow
@pytest.mark.parametrize('model', ['fastai', 'hf'])
def test_text(tmp_path, capsys, model):
    if model == 'hf': pytest.importorskip('transformers')
    sentences(tmp_path, np.random.default_rng(0))
    for data,metric,method in (('cola', 'matthews_corrcoef', 'rho_loss:frac=0.5'),
                               ('sst2', 'accuracy', 'batch_loss_filter')):
        run('text_rho_loss', path=tmp_path, data=data, model=model, methods=f'random {method}', metric=metric,
            noise=0.1, epochs=3, bs=8, folder=tmp_path/data)
        table = compared(tmp_path/data, 'random', method)
        assert metric in table and table.cost.tolist() == pytest.approx([3]*3, abs=0.3)
        assert table.wrong_labels.between(0, 0.5).all()
        assert (table.cost_il > 0).tolist() == [False, False, data == 'cola']


def test_settings_of_scores_are_settings_of_runs(tmp_path):
    from prune import Scores, pruned

    from rholoss_fastai.loss_tasks import in_words
    def method(runs): return pruned('el2n', 0.5, Scores(tmp_path, None, None, 2, runs, 10, 5, 0), False, 0.1, 0)[1]
    assert in_words(method(2)) == in_words(method(2)) != in_words(method(3))


def test_bad_options_end_with_a_sentence(regression, tmp_path):
    from common import read_method
    with pytest.raises(SystemExit, match='must be name:setting=value'): read_method('rho_loss:frac')
    with pytest.raises(SystemExit, match='--data must be one of'): run('uci_one_pass', path=regression, data='none')
    with pytest.raises(SystemExit, match='No such file'): run('compare_runs', folder=tmp_path/'none')


def test_text_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match='--data must be one of cola, sst2'):
        run('text_rho_loss', path=tmp_path, data='imdb')
    with pytest.raises(SystemExit, match='--path is missing'): run('text_rho_loss')
    with pytest.raises(FileNotFoundError, match='cola_train.tsv is missing'): run('text_rho_loss', path=tmp_path)


def test_real_sentences(shared_data):
    from text_rho_loss import read_sentences
    for data, n, n_dev in (('cola', 8551, 527), ('sst2', 6920, 872)):
        read = read_sentences(shared_data/'text', data)
        assert (~read.is_valid).sum() == n and read.is_valid.sum() == n_dev
        assert sorted(read.label.unique()) == [0, 1] and read.text.str.len().min() > 0
        assert not read.isna().any(axis=None)


@pytest.mark.slow
def test_command_line(folder, tmp_path):
    "Options with underscores, as in Python, and a clear end for bad ones"
    out = tmp_path/'out'
    run_in_process(RECIPES/'cifar10_rho_loss.py', '--path', folder, '--methods', 'random', '--steps', 10,
                   '--eval_every', 5, '--bs', 8, '--folder', out, out=tmp_path/'log')
    compared(out, 'random')
    with pytest.raises(SystemExit, match='--methods must be of'): run('cifar10_rho_loss', path=folder, methods='best')
    with pytest.raises(FileNotFoundError, match='No images'): run('cifar10_rho_loss', path=tmp_path)


@pytest.mark.slow
def test_batch_selection(folder, tmp_path, narrow_cnn):
    run('batch_selection', path=folder, methods='batch_loss_filter selective_backprop:beta=1,queue=true composer',
        epochs=2, bs=16, seeds=2, folder=tmp_path)
    table = compared(tmp_path, 'batch_loss_filter', 'selective_backprop:beta=1,queue=true', 'composer', seeds=2)
    assert table.cost.tolist() == pytest.approx([2]*4, abs=0.15)
    with pytest.raises(SystemExit, match='names no method'):
        run('batch_selection', path=folder, methods='best:beta=1', folder=tmp_path)
    with pytest.raises(SystemExit, match='Did you mean'):
        run('batch_selection', path=folder, methods='batch_los_filter', folder=tmp_path)


@pytest.mark.slow
def test_prune(folder, tmp_path, narrow_cnn):
    few = dict(path=folder, epochs=2, score_runs=2, score_epochs=1, forgetting_epochs=2, il_epochs=1, bs=16,
               evaluations=1, keep='0.6,0.4', per_class=True)
    methods = ('el2n', 'forgetting', 'stratified', 'random')
    run('prune', **few, methods=','.join([*methods, 'infobatch']), folder=tmp_path/'static')
    table = compared(tmp_path/'static', *[f'{m} {k}' for m in methods for k in (0.6, 0.4)], 'infobatch')
    assert (table.steps == 20).all()
    run_ = tmp_path/'static'/'infobatch-seed0.json'
    before = run_.stat().st_mtime_ns
    run('prune', **few, methods=','.join([*methods, 'infobatch']), folder=tmp_path/'static')
    assert run_.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match='other settings'):
        run('prune', **dict(few, epochs=3), methods='random', folder=tmp_path/'static')
    run('prune', **dict(few, keep='0.5'), methods='el2n,el2n_il,reducible', noise=0.2, budget='cost',
        folder=tmp_path/'noise')
    assert compared(tmp_path/'noise', 'el2n 0.5', 'el2n_il 0.5', 'reducible 0.5').wrong_labels.between(0, 0.5).all()
    assert json.loads((tmp_path/'noise'/'noise.json').read_text())['reducible']['found'][-1] == 1
    with pytest.raises(SystemExit, match='--methods must be of'): run('prune', path=folder, methods='grand')


@pytest.mark.slow
def test_quickstart(tmp_path, capsys):
    run('quickstart', seeds=1, epochs=3, out=tmp_path)
    compared(tmp_path, 'rho_epochs', 'rho_loss')
    assert 'with one seed: no interval' in capsys.readouterr().out


@pytest.mark.slow
def test_on_real_cifar10(shared_data, tmp_path):
    with tarfile.open(shared_data/'cifar10_jpeg.tar.xz') as archive: archive.extractall(tmp_path, filter='data')
    run('cifar10_rho_loss', path=tmp_path/'cifar10', methods='random', steps=800, eval_every=800, folder=tmp_path/'out')
    # a tenth of the redrawn labels stay the same
    assert abs(compared(tmp_path/'out', 'random').wrong_labels.plain - 0.18) < 0.01


@pytest.mark.slow
def test_compare_selectors(folder, tmp_path, narrow_cnn):
    settings = dict(path=folder, folder=tmp_path, bs=8, epochs=1, evaluations=2, test_rows=20, il_epochs=1)
    run('compare_selectors', **settings)
    table = compared(tmp_path, *importlib.import_module('compare_selectors').SELECTORS)
    # a quarter of the steps
    assert (table.steps == 10).all() and table.scored.then_uniform == 3*32
    assert table.scored.rho_loss == table.scored.loss == 10*32
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
        run('uci_one_pass', path=regression, data='toy', method=method, starts=2, steps=40, out=tmp_path,
            results=tmp_path/'all.json')
    table = json.loads((tmp_path/'all.json').read_text())['table']
    assert [(row['runs'], row['failed']) for row in table] == [(2, 0)]*6
    assert all(math.isfinite(row['median']) for row in table)
    before = (tmp_path/'toy-one_pass.json').read_text()
    # nothing is run again
    run('uci_one_pass', path=regression, data='toy', method='one_pass', starts=2, steps=40, out=tmp_path)
    assert (tmp_path/'toy-one_pass.json').read_text() == before and 'one_pass_all' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='--method must be one of'):
        run('uci_one_pass', path=regression, method='best', out=tmp_path)
    for changed in (dict(steps=80), dict(seed=1)):
        for method in ('one_pass', 'random'):
            with pytest.raises(SystemExit, match='other settings: choose another --out'):
                run('uci_one_pass', **{**dict(path=regression, data='toy', method=method, starts=3, steps=40,
                                              out=tmp_path), **changed})
    assert (tmp_path/'toy-one_pass.json').read_text() == before


def test_uci_loops_are_the_learners_steps(regression):
    """The bare loops, all starts at once, train as fastai's SGD does, and differentiate as `learn.one_pass` does, one
    step back"""
    uci = importlib.import_module('uci_one_pass')
    data, starts = uci.Regression(regression, 'toy'), [dict(lr=0.03, wd=0.01, mom=0.8), dict(lr=0.1, wd=1e-3, mom=0.3)]
    for i, run_ in enumerate(uci.run_loops('random', data, starts, 30)):
        assert run_['mse'] == pytest.approx(uci.run_learner(None, data, starts[i], i, 30)['mse'], rel=1e-4)
    loops = uci.Loops(3, starts)
    # through one step the exact derivative is the series' first term
    loops.diff_through_opt(data, 20, every=10, horizon=1)
    for i, start in enumerate(starts):
        learn = uci.Learner(uci.DataLoaders(uci.Repeat(data.train, 20), [data.valid]), uci.mlp(3, i),
                            loss_func=uci.F.mse_loss, lr=start['lr'], wd=start['wd'],
                            wd_bn_bias=True, opt_func=partial(uci.SGD, mom=start['mom'], decouple_wd=False)).one_pass(
            n_terms=1, hyper_clip=None)
        fit(learn, 1)
        assert learn.lr == pytest.approx(10**loops.theta['lr'][i].item(), rel=1e-3)
        assert learn.wd == pytest.approx(10**loops.theta['wd'][i].item(), rel=1e-3)


def test_ray_is_optional(regression, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(SystemExit, match=r'pip install "\.\[tune\]"'):
        run('uci_one_pass', path=regression, data='toy', method='asha', out=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['bayesopt', 'asha', 'pbt'])
def test_uci_by_ray_tune(regression, tmp_path, method, monkeypatch):
    pytest.importorskip('ray.tune'); pytest.importorskip('optuna')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(RECIPES), *sys.path])) # of Ray's workers
    run('uci_one_pass', path=regression, data='toy', method=method, starts=3, steps=40, out=tmp_path,
        results=tmp_path/'all.json')
    row, = json.loads((tmp_path/'all.json').read_text())['table']
    assert row['runs'] == 3 and math.isfinite(row['median'])
    with pytest.raises(SystemExit, match='other settings'):
        run('uci_one_pass', path=regression, data='toy', method=method, starts=4, steps=40, out=tmp_path)


def test_pbt_keeps_the_momentum_below_one():
    bounded = importlib.import_module('uci_one_pass').bounded
    assert [bounded(dict(lr=0.2, wd=0., mom=mom))['mom'] for mom in (0.99*1.2, 0.5, -0.1)] == [0.999, 0.5, 0.]
    assert bounded(dict(lr=0.2, mom=0.))['lr'] == 0.2


@pytest.mark.slow
def test_image_one_pass(folder, tmp_path):
    for method in ('constant', 'one_pass'):
        run('image_one_pass', path=folder, method=method, steps=25, eval_every=10, bs=8, out=tmp_path/method,
            results=tmp_path/'all.json')
        rows, summary = check(tmp_path/method, 25, method)
        assert summary['finite'] and [r['step'] for r in rows] == [10, 20, 25]
    constant, tuned = json.loads((tmp_path/'all.json').read_text())['runs']
    assert (constant['method'], tuned['method'], tuned['accuracy']) == ('constant', 'one_pass', summary['accuracy'])
    assert tuned['last_lr'] == summary['last']['lr']
    assert summary['last']['lr'] != 1e-5 and (tmp_path/'one_pass'/'hypers.png').stat().st_size > 5000


@pytest.mark.slow
def test_ptb_one_pass(tmp_path, monkeypatch, capsys):
    "A made-up language in which the next word follows from the last"
    rng = np.random.default_rng(0)
    for name, n in (('train', 200), ('valid', 40), ('test', 40)):
        lines = [' '.join(f'w{(start + 3*i) % 20}' for i in range(6)) for start in rng.integers(0, 20, n)]
        (tmp_path/f'ptb.{name}.txt').write_text('\n'.join(lines) + '\n')
    perplexities = []
    for method in ('constant', 'one_pass'):
        run('ptb_one_pass', path=tmp_path, method=method, lr=0.01, epochs=4, hidden=16, bs=4, seq_len=10, every=2,
            out=tmp_path/method)
        perplexities.append(json.loads((tmp_path/method/'summary.json').read_text())['test'])
    assert perplexities[1] < 0.8*perplexities[0]
    with pytest.raises(FileNotFoundError, match='ptb.train.txt'): run('ptb_one_pass', path=tmp_path/'elsewhere')
    class Stops(Callback):
        def before_train(self): raise CancelFitException
    monkeypatch.setattr(importlib.import_module('ptb_one_pass'), 'ModelResetter', Stops)
    run('ptb_one_pass', path=tmp_path, method='constant', epochs=1, hidden=16, bs=4, seq_len=10, out=tmp_path/'stopped')
    assert json.loads((tmp_path/'stopped'/'summary.json').read_text())['valid'] == []
    assert 'stopped in its first epoch' in capsys.readouterr().out
