"""Every benchmark with the smallest settings: what its results hold, and what it computes; never how long anything
takes."""
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch

from rholoss_fastai.all import Comparison

METHODS = ('rho_loss', 'batch_loss_filter', 'selective_backprop')


@pytest.fixture(autouse=True)
def scripts(monkeypatch, root):
    for name in ('recipes', 'benchmarks'): monkeypatch.syspath_prepend(str(root/name))


def script(name): return importlib.import_module(name)


# step_cost

@pytest.mark.slow
def test_step_cost(tmp_path, capsys):
    out = tmp_path/'step_cost.json'
    def run(**kwargs):
        script('step_cost').main(models='mlp', fracs='0.25', kept='0.5', seconds=0, rounds=1, out=out, **kwargs)
    run(methods='selective_backprop')
    first = json.loads(out.read_text())
    run()
    assert first['machine']['device'] and first['machine']['torch'] and capsys.readouterr().out.count('n_B/n_b') == 4
    cases = json.loads(out.read_text())['cases']
    assert [(o['model'], o['method']) for o in cases] == [('mlp', method) for method in sorted(METHODS)]
    assert cases[2:] == first['cases'] # what the file holds isn't measured again
    names = {'package', 'limit', 'reference', 'selected', 'candidates', 'fastai'}
    for o in cases:
        assert (o['n_candidates'], o['n_selected']) == ((128, 32) if o['method'] == 'rho_loss' else (128, 64))
        assert o['steps'] == 3
        assert set(o['milliseconds']) == set(o['cpu_milliseconds']) == set(o['megabytes']) == names
        ms = o['milliseconds' if torch.cuda.is_available() else 'cpu_milliseconds']
        assert all(low <= middle <= high for middle,low,high in ms.values())
        assert math.isclose(o['over_limit'], ms['package'][0]/ms['limit'][0], abs_tol=1e-3)
        assert math.isclose(o['over_bound'], ms['package'][0]/(1.05*ms['limit'][0] + 2), abs_tol=1e-3)


def test_step_cost_refuses(tmp_path):
    with pytest.raises(SystemExit, match='There is no perceptron'): script('step_cost').main(models='perceptron')
    out = tmp_path/'step_cost.json'
    out.write_text(json.dumps(dict(machine=dict(device='an abacus', cpu='wood', torch='0'), cases=[])))
    with pytest.raises(SystemExit, match='another machine'): script('step_cost').main(models='mlp', out=out)


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak of resident memory can be told on Linux')
def test_peak_memory_is_of_each_run_by_itself():
    def megabytes(n): return script('step_cost').peak_memory(lambda: torch.ones(n*2**18).sum(), torch.device('cpu'))
    assert 60 < megabytes(64) < 70 and 14 < megabytes(16) < 24 and 60 < megabytes(64) < 70


@pytest.fixture
def candidates():
    "A model that keeps batch norm out, items, targets, irreducible losses and rows"
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 10)
    x,y,il = torch.randn(40, 4), torch.randint(0, 10, (40,)), torch.rand(40)
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction='none').detach()
    return (model, x, y, il, torch.arange(100, 140)), losses


def test_bare_loops_choose_what_the_methods_say(candidates):
    step_cost,(args,losses) = script('step_cost'),candidates
    il = args[3]
    def chosen(choose): return set(choose(*args).tolist())
    highest,reducible = (set(o.argsort()[-8:].tolist()) for o in (losses, losses - il))
    assert highest != reducible
    assert chosen(step_cost.scored_at_the_limit(8,
                                                False)) == chosen(step_cost.batch_loss_filter_reference(8)) == highest
    assert chosen(step_cost.scored_at_the_limit(8, True)) == chosen(step_cost.rho_loss_reference(8)) == reducible
    assert step_cost.first_items(8)(*args) == slice(8)


def test_bare_selective_backprop_draws_by_rank(candidates):
    "With half kept, an item's first draw has a probability in proportion to its rank"
    choose,(args,losses) = script('step_cost').selective_backprop_reference(20),candidates
    np.random.seed(0)
    first = [choose(*args)[0].item() for _ in range(2000)]
    counts = np.bincount(first, minlength=40)[losses.argsort().numpy()]
    expected = 2000*(np.arange(40) + 0.5)/800
    assert ((counts - expected)**2/expected).sum() < 73 # chi-squared with 39 degrees of freedom, 0.1 %


# Comparisons on CIFAR-10

@pytest.mark.slow
def test_time_to_accuracy(small_cifar, tmp_path, narrow_cnn):
    out = tmp_path/'out.json'
    runs = 'random rho_loss:frac=0.5 selective_backprop:keep=0.5,warmup_epochs=0'
    options = dict(path=small_cifar, folder=tmp_path/'runs', il_epochs=1, seeds='0', bs=8, epochs=2,
                   evaluations=2, out=out)
    script('time_to_accuracy').main(**options, runs=runs, budget='steps', fit='fit')
    result = Comparison.load(out)
    assert list(result.table.index) == ['plain', *runs.split()] and (result.table.steps == 20).all()
    assert not result.table.cost_il.any()
    with pytest.raises(SystemExit, match='other settings'):
        script('time_to_accuracy').main(**options, runs=runs, budget='cost')
    with pytest.raises(SystemExit, match='--path is missing'): script('time_to_accuracy').main()
    with pytest.raises(SystemExit, match='names no method'):
        script('time_to_accuracy').main(**options, runs='best:frac=1')


@pytest.mark.slow
def test_compare_cifar10(small_cifar, tmp_path, capsys, narrow_cnn):
    out,options = tmp_path/'out.json',dict(path=small_cifar, folder=tmp_path/'runs', seeds='0,1', bs=16, epochs=3,
                                           methods='random infobatch batch_loss_filter')
    script('compare_cifar10').main(**options, dry_run=True)
    assert '8 runs, about' in capsys.readouterr().out and not out.exists()
    script('compare_cifar10').main(**options, out=out)
    table = Comparison.load(out).table
    assert list(table.index) == ['plain', 'random', 'infobatch', 'batch_loss_filter'] and (table.seeds == 2).all()
    assert (tmp_path/'runs'/'prices.json').exists()
    assert table.cost.tolist() == pytest.approx([3]*4, abs=0.3) and table.wrong_labels.between(0, 0.5).all()
    with pytest.raises(SystemExit, match='--arch must be one of'): script('compare_cifar10').main(arch='mlp')


# rho_epochs

@pytest.mark.slow
def test_rho_epochs(small_cifar, tmp_path, capsys):
    module,folder,out = script('rho_epochs'),tmp_path/'runs',tmp_path/'out.json'
    runs = 'plain rho_epochs:drop=0.2,gate=false,by_memory=false'
    module.main(path=str(small_cifar), folder=str(folder), rows=160, noise=0.5, budgets='9', seeds='0', runs=runs,
                out=str(out))
    files = {f.name: f.read_text() for f in folder.glob('*.json')}
    plain,chosen = json.loads(out.read_text())['table']
    assert len(files) == 2 and plain['steps'] == [9] and chosen['steps'][0] <= 9 and chosen['billed'][0] > 0
    assert len(chosen['points']) == 1
    # nothing is left to do
    module.main(path=str(small_cifar), folder=str(folder), rows=160, noise=0.5, budgets='9', seeds='0', runs=runs)
    assert files == {f.name: f.read_text() for f in folder.glob('*.json')}
    with pytest.raises(SystemExit, match='names no method'): module.read_run('rho_loss')
    assert capsys.readouterr().out.count('rho_epochs') >= 2


# scaling

def test_scaling(tmp_path, capsys):
    out = tmp_path/'scaling.json'
    script('scaling').main(rows='1000,2000', candidates='32,64', batches=4, windows=2, repeats=2, out=out)
    assert 'bytes a row' in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [o['n_rows'] for o in result['rows']] == [o['n_rows'] for o in result['files']] == [1000, 2000]
    assert [o['n_candidates'] for o in result['candidates']] == [32, 64]
    assert [o['steps'] for o in result['steps']] == [16, 32]
    for o in result['rows'] + result['candidates']:
        us = o['microseconds']
        assert us['all'] == pytest.approx(sum(v for k,v in us.items() if k != 'all'), abs=0.05)
        assert o['bytes_a_row'] == result['rows'][0]['bytes_a_row'] < 32
        assert o['share_of_step'] == pytest.approx(us['all']/1e4, abs=1e-5)


# one_pass_cost

@pytest.mark.slow
def test_one_pass_cost(tmp_path, capsys, monkeypatch):
    out, variants = tmp_path/'one_pass_cost.json', {'plain', *script('one_pass_cost').VARIANTS}
    monkeypatch.setitem(script('one_pass_cost').MODELS, 'mlp', (lambda: script('one_pass_cost').mlp(64, 256, 10), 256,
                                                                (64,)))
    script('one_pass_cost').main(archs='mlp', n_batches=10, repeats=1, out=out)
    stored = json.loads(out.read_text())
    run, = stored['runs']
    assert (stored['every'], stored['n_terms'], run['arch']) == (10, 5, 'mlp')
    assert 'one_pass time' in capsys.readouterr().out
    for of, ratio in (('ms_per_step', 'time_ratio'), ('megabytes', 'memory_ratio')):
        assert set(run[of]) == set(run[ratio]) == variants and run[ratio]['plain'] == 1
        assert all(math.isclose(run[ratio][o], run[of][o]/run[of]['plain'], rel_tol=0.02) for o in variants)


# importance_cost

def test_importance_cost(tmp_path):
    out = tmp_path/'importance_cost.json'
    script('importance_cost').main(rows=16, repeats=1, archs='small_cnn', out=out)
    model, = json.loads(out.read_text())['models']
    assert model['arch'] == 'small_cnn'
    assert math.isclose(model['ratio'], model['grand_ms']/model['el2n_ms'], rel_tol=0.05)


# divbs_cost

def test_divbs_cost(tmp_path):
    out = tmp_path/'divbs_cost.json'
    script('divbs_cost').main(n_candidates=20, n_classes=5, n_features=8, image_size=32, fracs='0.2,0.5',
                              repeats=1, out=out)
    rows = json.loads(out.read_text())['rows']
    assert [o['taken'] for o in rows] == [4, 10]
    for o in rows:
        assert o['share'] == pytest.approx((o['products_ms'] + o['recursion_ms'])/o['step_ms'], abs=2e-3)
        assert o['step_ms'] > 0


# tokens_sst2

def test_tokens_sst2(tmp_path):
    rng = np.random.default_rng(0)
    for split,n in (('train', 60), ('dev', 8), ('test', 8)):
        lines = [' '.join(rng.choice(list('abcdefghij'), rng.integers(3, 9))) + '\t1' for _ in range(n)]
        (tmp_path/f'sst2_{split}.tsv').write_text('\n'.join(lines) + '\n')
    out = tmp_path/'tokens.json'
    script('tokens_sst2').main(path=tmp_path, epochs=2, il_epochs=1, width=8, bs=10, n_vocab=10,
                               n_reference=20, out=out)
    rows = {o['method']: o for o in json.loads(out.read_text())['rows']}
    assert list(rows) == ['reference', 'plain', 'random', 'tokens']
    assert all(1 < o['perplexity'] < 100 for o in rows.values())
    assert rows['reference']['replaced'] == 0 and all(0.15 < rows[o]['replaced'] < 0.45 for o in ('plain', 'random'))

def test_errors_in_sentences_and_their_marks():
    benchmark = script('tokens_sst2')
    sentences = [torch.full((n,), 5) for n in (4000, 2000)]
    noisy,wrong = benchmark.with_errors(sentences, 0.3, 50, 0)
    assert abs(torch.cat(wrong).float().mean() - 0.3) < 0.02 and all((o[~w] == 5).all() for o,w in zip(noisy, wrong))
    x,y = benchmark.batched(list(zip(noisy, wrong)))
    marks = benchmark.Marks()
    marks.learn = type('Fake', (), dict(yb=(y,)))()
    marks.before_batch()
    assert torch.equal(marks.replaced[1,:2000], wrong[1]) and not marks.replaced[1,2000:].any()
    assert torch.equal(marks.learn.yb[0][0], noisy[0]) and (marks.learn.yb[0][1,2000:] == benchmark.PAD).all()
    assert torch.equal(x[0,1:], noisy[0][:-1])
