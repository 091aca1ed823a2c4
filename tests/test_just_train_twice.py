"""Just Train Twice, against its parts done by hand."""
import importlib
import json
import math
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from helpers import fit
from numbered_rows import BS, VALID, N, Noted, Rows, loaders, row_learner
from PIL import Image
from torch import nn

from rholoss_fastai.all import (
    GroupDRO,
    RowWeights,
    WorstGroup,
    error_set,
    just_train_twice,
    misclassified,
    restrict_rows,
    tune_just_train_twice,
    weighted_loaders,
)


@pytest.mark.parametrize('kind', ['shuffled', 'workers', 'restricted', 'drop_last', 'sorted'])
def test_error_set_is_the_rows_that_come_out_wrong(kind):
    dls = loaders(**dict(workers=dict(num_workers=2), drop_last=dict(drop_last=True)).get(kind, {}))
    own = torch.arange(1, N, 3) if kind == 'restricted' else torch.arange(N)
    if kind == 'restricted': dls.loaders = [restrict_rows(dls.train, own), dls.valid]
    if kind == 'sorted':
        dls.loaders = [SortedDL(Rows(), sort_func=lambda o: float(o[0][0, 3, 3]), bs=BS, shuffle=True), dls.valid]
    set_seed(1)
    learn = row_learner(dls)
    learn.model.train()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in learn.model.state_dict().items()}
    errors = error_set(learn)
    wrong = learn.model(Rows().images).argmax(1) != Rows().targets
    assert errors.tolist() == own[wrong[own]].tolist() and 0 < len(errors) < len(own)
    assert torch.equal(before, torch.get_rng_state()) and learn.model.training
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    il = torch.zeros(N).index_fill(0, errors[::2], 5.) # what irreducible losses call noise
    noisy = len(errors[::2])
    assert error_set(learn, il=il, noise=noisy/len(own)).tolist() == errors[1::2].tolist()
    assert error_set(learn, wrong=lambda pred, targ: torch.zeros(len(targ))).tolist() == []


@pytest.mark.parametrize('by', ['sampling', 'loss'])
def test_just_train_twice_is_its_parts(by):
    "The second Learner, by hand from the first's frozen model; the same each time, and the random state is left alone"
    made = []
    def make(dls):
        made.append(row_learner(dls, cbs=Noted()))
        return made[-1]
    dls, before = loaders(), torch.get_rng_state()
    learn = just_train_twice(make, dls, 2, 2, 7, by=by, seed=3, progress=False)
    first = made[0]
    wrong = first.model(Rows().images).argmax(1) != Rows().targets
    assert learn is made[1] and len(made) == 2 and learn.error_set.tolist() == wrong.nonzero().flatten().tolist()
    assert torch.equal(before, torch.get_rng_state())
    assert len(learn.noted.batches) == len(first.noted.batches) == 2*len(dls.train)
    seen = torch.cat([rows for rows, _ in learn.noted.batches])
    if by == 'loss':
        assert len(seen.unique()) == N
        scaled = learn.row_weights.scaled
        torch.testing.assert_close(scaled, torch.where(wrong, 7., 1.)*N/(N + 6*wrong.sum()))
    else:
        assert wrong[seen].float().mean() > wrong.float().mean()
        assert learn.dls.train.wgts[wrong.numpy()].min() == pytest.approx(7/(N + 6*wrong.sum().item()))
    again = just_train_twice(make, dls, 2, 2, 7, by=by, seed=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), again.model.parameters()))
    assert 1 <= len(learn.error_set) < N


def test_tune_takes_the_same_error_sets_and_sorts_by_the_worst_group():
    groups = ['ab'[i % 2] for i in range(60)]
    table = tune_just_train_twice(row_learner, loaders(), groups, (1, 3), 2, (1, 10), seed=3, progress=False)
    sizes = {t: len(just_train_twice(row_learner, loaders(), t, 1, 2, seed=3, progress=False).error_set)
             for t in (1, 3)}
    assert {t: n for t, n in zip(table.n_epoch_id, table.errors)} == sizes
    assert len(table) == 4 and table.worst_group.is_monotonic_decreasing
    assert set(zip(table.n_epoch_id, table.upweight)) == {(1, 1), (1, 10), (3, 1), (3, 10)}
    best = table.iloc[0]
    worst = WorstGroup(accuracy, groups)
    def make(dls): return row_learner(dls, metrics=worst)
    just_train_twice(make, loaders(), int(best.n_epoch_id), 2, best.upweight, seed=3, progress=False)
    assert worst.table[-2:].min(axis=1).max() == pytest.approx(best.worst_group) # the pair by itself gives the same


def test_nan_is_the_worst_of_groups_and_epochs():
    values = iter([1., math.nan, 3., 5., *[math.nan]*4]) # of two groups, two epochs, two pairs
    def metric(pred, targ): return torch.tensor(next(values))
    table = tune_just_train_twice(row_learner, loaders(), ['ab'[i % 2] for i in range(60)], [1], 2, [1, 10], metric,
                                  worst=max, progress=False)
    assert table.upweight.tolist() == [1, 10] and table.epoch.tolist() == [1, 0]
    assert table.worst_group[0] == 5 and math.isnan(table.worst_group[1])


def never(pred, targ): return torch.zeros(len(targ))
def always(pred, targ): return torch.ones(len(targ))


@pytest.mark.parametrize('change, error, words', [
    (dict(wrong=never), ValueError,
     'The error set is empty: after n_epoch_id=1 epochs .* Lower n_epoch_id, or regularise'),
    (dict(wrong=always), ValueError, 'The error set is all of the 240 training rows.* Raise n_epoch_id'),
    (dict(il=torch.zeros(N), noise=1.), ValueError, 'but for what il= calls noise. Lower n_epoch_id, or noise'),
    (dict(il=torch.zeros(9)), ValueError, '9 values for a data set of 240'),
    (dict(upweight=0.5), ValueError, 'upweight'), (dict(upweight='20'), TypeError, 'upweight'),
    (dict(n_epoch_id=0), ValueError, 'n_epoch_id'), (dict(n_epoch=0), ValueError, 'n_epoch'),
    (dict(by='copies'), ValueError, "'sampling' or 'loss'; got 'copies'"),
    (dict(noise=2.), ValueError, 'noise'), (dict(dls=[1]), TypeError, 'DataLoaders; got list')])
def test_bad_input_of_just_train_twice(change, error, words):
    args = dict(make_learner=row_learner, dls=loaders(), n_epoch_id=1, n_epoch=1, upweight=5, progress=False)
    with pytest.raises(error, match=words): just_train_twice(**dict(args, **change))


def test_bad_input():
    dls = loaders()
    groups = ['ab'[i % 2] for i in range(N)]
    for weights, words in ((torch.ones(5), r'shape \(5,\)'), (-torch.ones(N), 'none negative'),
                           (torch.full((N,), torch.nan), 'finite'),
                           (torch.zeros(N), 'not all 0')):
        with pytest.raises(ValueError, match=words): weighted_loaders(dls, weights)
        with pytest.raises(ValueError, match=words): fit(row_learner(dls), cbs=RowWeights(weights))
    torch_dls = DataLoaders(torch.utils.data.DataLoader(Rows(), BS), torch.utils.data.DataLoader(VALID, BS))
    with pytest.raises(TypeError, match="by='loss'"): weighted_loaders(torch_dls, torch.ones(N))
    with pytest.raises(ValueError, match='eta'): GroupDRO(groups, eta=0)
    with pytest.raises(ValueError, match='adjustment'): GroupDRO(groups, adjustment=-1)
    with pytest.raises(ValueError, match='2 groups for a data set of 240'):
        fit(row_learner(dls), cbs=GroupDRO(['a', 'b']))
    with pytest.raises(ValueError, match='MixUp makes one item of two'):
        fit(row_learner(dls), cbs=[GroupDRO(groups), MixUp()])
    stream = DataLoaders(DataLoader(iter(list(zip(Rows().images, Rows().targets))), bs=8), dls.valid)
    with pytest.raises(ValueError, match='iterable'): fit(row_learner(stream), cbs=GroupDRO(groups))
    with pytest.raises(ValueError, match='worst must be min or max'): WorstGroup(accuracy, groups, worst='min')
    with pytest.raises(ValueError, match='240 groups for a data set of 60'):
        fit(row_learner(dls, metrics=WorstGroup(accuracy, groups)))
    with pytest.raises(ValueError, match="doesn't shuffle"):
        row_learner(dls, metrics=WorstGroup(accuracy, groups)).validate(dl=dls.train)
    with pytest.raises(ValueError, match='The error set is empty'):
        tune_just_train_twice(row_learner, dls, groups[:60], [1], 1, [5], wrong=never, progress=False)
    with pytest.raises(ValueError, match='need one value each'):
        tune_just_train_twice(row_learner, dls, groups[:60], [], 1, [5])
    with pytest.raises(ValueError, match='Pass wrong='):
        error_set(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), CrossEntropyLossFlat()))


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/'recipes'))
    return importlib.import_module('just_train_twice')


@pytest.mark.slow
def test_recipe(recipe, tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for split, n in (('train', 60), ('test', 12)):
        for label, name in enumerate(('automobile', 'truck')):
            (tmp_path/'data'/split/name).mkdir(parents=True)
            for i in range(n):
                file = f'{split}/{name}/{i:03d}.png'
                # noise: there is only the frame to learn
                Image.fromarray(rng.integers(0, 180, (32, 32, 3)).astype(np.uint8)).save(tmp_path/'data'/file)
                rows.append((file, label, i % 2, 2 if split == 'test' else int(i % 3 == 0)))
    recipe.main(path=tmp_path/'data', epochs=2, epochs_id='1,2', upweight='5', agree=0.8, bs=16, lr=1e-3,
                out=tmp_path/'framed')
    result = json.loads((tmp_path/'framed'/'comparison.json').read_text())
    assert [row['method'] for row in result['table']] == ['erm', 'jtt', 'group_dro'] and len(result['tuned']) == 2
    summary = json.loads((tmp_path/'framed'/'jtt-0'/'summary.json').read_text())
    assert summary['error_set']['rows'] == sum(summary['error_set']['groups'].values())
    assert len(summary['by_group'][0]['test']) == 4
    assert (tmp_path/'framed'/'comparison.png').stat().st_size > 5000 and 'worst_group' in capsys.readouterr().out
    pd.DataFrame(rows, columns=['file', 'y', 'place', 'split']).to_csv(tmp_path/'data'/'metadata.csv', index=False)
    table = dict(path=tmp_path/'data', metadata='metadata.csv', target='y', group='y,place', no_pretrained=True,
                 epochs=1, bs=16, lr=1e-4, methods='erm')
    recipe.main(file='file', arch='resnet18', size=32, out=tmp_path/'images', **table)
    assert set(json.loads((tmp_path/'images'/'erm-0'/'summary.json').read_text())['by_group'][0]['test']) == {
        '0, 0', '0, 1', '1, 0', '1, 1'}
    with pytest.raises(SystemExit, match='no column species'):
        recipe.main(**dict(table, target='species', file='file', out=tmp_path/'none'))


@pytest.fixture
def texts(tmp_path):
    "Metadata of pairs of texts, where a word agrees with the class in most rows"
    rng, rows = np.random.default_rng(0), []
    for i in range(96):
        label, common = i % 2, i % 5 > 0
        words = rng.choice(['the', 'cat', 'sat', 'on', 'a', 'mat'],
                           rng.integers(2, 9)).tolist() + [('no', 'yes')[label if common else 1-label]]
        rows.append((' '.join(words), ('bad', 'good')[label], ('is', 'was')[label], int(common),
                     ('train', 'val', 'test')[(i // 20) % 3]))
    pd.DataFrame(rows, columns=['first', 'second', 'y', 'common', 'split']).to_csv(tmp_path/'texts.csv', index=False)
    return dict(path=tmp_path, metadata='texts.csv', text='first,second', target='y', group='y,common', epochs=1, bs=8,
                out=tmp_path/'out')


def check_texts(out, methods):
    result = json.loads((out/'comparison.json').read_text())
    assert [row['method'] for row in result['table']] == methods
    for method in methods:
        summary = json.loads((out/f'{method}-0'/'summary.json').read_text())
        assert set(summary['by_group'][0]['test']) == {'is, 0', 'is, 1', 'was, 0', 'was, 1'}
    return summary


@pytest.mark.slow
def test_recipe_texts(recipe, texts):
    recipe.main(**texts, no_pretrained=True)
    summary = check_texts(texts['out'], ['erm', 'jtt', 'group_dro'])
    assert summary['lr'] == 1e-3 and not summary['pretrained']
    with pytest.raises(SystemExit, match=r'other settings \(lr\): choose another --out'):
        recipe.main(**texts, no_pretrained=True, lr=2e-3)


def test_recipe_texts_by_bert(recipe, texts, monkeypatch):
    "A tiny BERT in place of the downloaded one: it reads pairs, and its learning rate falls to 0"
    transformers = pytest.importorskip('transformers')
    from text_rho_loss import word_pieces
    from tokenizers.processors import TemplateProcessing
    table, bert = pd.read_csv(texts['path']/'texts.csv'), texts['path']/'bert'
    tokenizer = word_pieces([*table['first'], *table['second']])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='[CLS] $A [SEP]',
                                                                    pair='[CLS] $A [SEP] $B:1 [SEP]:1',
                                                                    special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    tokenizer.save_pretrained(bert)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=32)
    transformers.BertForSequenceClassification(config).save_pretrained(bert)
    monkeypatch.setattr(recipe, 'BERT', str(bert))
    recipe.main(**dict(texts, epochs=2), methods='erm,jtt')
    assert check_texts(texts['out'], ['erm', 'jtt'])['lr'] == 2e-5
    options = recipe.SimpleNamespace(**{**texts, 'preset': None, 'split': 'split', 'max_length': 6})
    dls, test, groups, make_learner = recipe.table_data(texts['path'], options, bs=8, lr=1e-2, wd=0.1, arch=None,
                                                        size=None, pretrained=True, device='cpu')
    xb, yb = next(iter(test))
    assert xb['input_ids'].shape[1] == 6 and xb['token_type_ids'].max() == 1
    assert len(test.dataset) == len(groups['test'])
    assert [('is', 'was')[o] for o in yb] == [o.split(', ')[0] for o in groups['test'][:len(yb)]]
    learn = fit(make_learner(dls))
    rates = learn.recorder.hps['lr']
    assert rates[0] == 1e-2 and np.allclose(np.diff(rates), -1e-2/len(dls.train))
    spared = {name for name, p in learn.model.named_parameters() if not learn.opt.state[p].get('do_wd', True)}
    assert spared == {name for name, _ in learn.model.named_parameters() if name.endswith('bias')
                      or 'LayerNorm' in name}


def test_recipe_says_that_transformers_is_missing(recipe, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(SystemExit, match='pip install transformers'): recipe.main(**texts)


def options_of(recipe, preset, **kwargs):
    return recipe.SimpleNamespace(**{**dict(text=None, folder='', preset=preset), **recipe.PRESETS[preset], **kwargs})


@pytest.mark.parametrize('folder', ['img_align_celeba', 'img_align_celeba/img_align_celeba'])
def test_recipe_reads_celeba(recipe, tmp_path, folder):
    names = [f'{i:06d}.jpg' for i in range(1, 17)]
    attributes = pd.DataFrame(dict(image_id=names, Blond_Hair=[1, -1]*8, Male=[1, 1, -1, -1]*4, Young=1))
    attributes.to_csv(tmp_path/'list_attr_celeba.csv', index=False)
    with pytest.raises(SystemExit, match='list_eval_partition.csv is missing'):
        recipe.read_table(tmp_path, options_of(recipe, 'celeba'))
    pd.DataFrame(dict(image_id=names[::-1],
                      partition=[2]*4 + [1]*4 + [0]*8)).to_csv(tmp_path/'list_eval_partition.csv', index=False)
    (tmp_path/folder).mkdir(parents=True)
    for name in names: Image.new('RGB', (8, 10)).save(tmp_path/folder/name)
    table = recipe.read_table(tmp_path, options_of(recipe, 'celeba'))
    assert table.split.tolist() == [0]*8 + [1]*4 + [2]*4
    assert table.group[:4].tolist() == ['1, 1', '-1, 1', '1, -1', '-1, -1']
    assert table.file.tolist() == [str(tmp_path/folder/name) for name in names]
    dls, test, groups, make_learner = recipe.table_data(tmp_path, options_of(recipe, 'celeba'), bs=4, lr=0.1, wd=0.5,
                                                        arch='resnet18', size=8,
                                                        pretrained=False, device='cpu')
    assert len(dls.train_ds) == 8 and len(test.dataset) == len(groups['test']) == 4
    learn = make_learner(dls)
    learn.create_opt()
    ours, theirs = (dict(model.named_parameters()) for model in (learn.model, deepcopy(learn.model)))
    sgd = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9, weight_decay=0.5)
    learn.opt.set_hypers(lr=0.1, wd=0.5)
    for _ in range(3):
        for name in ours: ours[name].grad = torch.randn_like(ours[name]); theirs[name].grad = ours[name].grad.clone()
        learn.opt.step(); sgd.step()
    for name in ours: torch.testing.assert_close(ours[name], theirs[name])


def test_recipe_reads_multinli(recipe, tmp_path):
    "Rows without a label are left out of the metadata, but counted by its numbers"
    labels, n = ['contradiction', 'entailment', '-', 'neutral'], 0
    for name, rows in (('train', 9), ('dev_matched', 4), ('dev_mismatched', 5)):
        lines = [dict(gold_label=labels[i % 4], sentence1=f'premise {i}', sentence2=f'hypothesis {i}', genre='fiction')
                 for i in range(n, n + rows)]
        (tmp_path/f'multinli_1.0_{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
        n += rows
    numbers = [i for i in range(n) if i % 4 != 2]
    metadata = pd.DataFrame(dict(gold_label=[{0: 0, 1: 1, 3: 2}[i % 4] for i in numbers],
                                 sentence2_has_negation=[int(i > 9) for i in numbers],
                                 split=[i % 3 for i in numbers]), index=numbers)
    metadata.to_csv(tmp_path/'metadata_random.csv')
    table = recipe.read_table(tmp_path, options_of(recipe, 'multinli'))
    ordered = [i for split in range(3) for i in numbers if i % 3 == split]
    assert table.text.tolist() == [f'premise {i} xxsep hypothesis {i}' for i in ordered]
    assert table.group.tolist() == [f'{metadata.gold_label[i]}, {int(i > 9)}' for i in ordered]
    assert table.split.tolist() == [i % 3 for i in ordered]
    metadata.assign(gold_label=1).to_csv(tmp_path/'metadata_random.csv')
    with pytest.raises(SystemExit, match='not those of the metadata'):
        recipe.read_table(tmp_path, options_of(recipe, 'multinli'))


def test_recipe_reads_civilcomments(recipe, tmp_path):
    pd.DataFrame(dict(id=range(6), comment_text=['a', None, 'c', 'd', 'e', 'f'], split=['train', 'val', 'test']*2,
                      toxicity=[0.1, 0.5, 0.9, 0.2, 0., 1.],
                      identity_any=[0, 1]*3)).to_csv(tmp_path/'all_data_with_identities.csv')
    table = recipe.read_table(tmp_path, options_of(recipe, 'civilcomments'))
    assert table.text.tolist() == ['a', 'd', '', 'e', 'c', 'f'] and table.split.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.group.tolist() == ['False, 0', 'False, 1', 'True, 1', 'False, 0', 'True, 0', 'True, 1']


@pytest.mark.slow
def test_recipe_reuses_a_search_with_its_own_settings_only(recipe, texts, monkeypatch):
    searches = []
    def search(make_learner, dls, groups, times, epochs, weights, **kwargs):
        searches.append((times, weights))
        return pd.DataFrame([dict(n_epoch_id=times[0], upweight=weights[0], worst_group=0.5)])
    monkeypatch.setattr(recipe, 'tune_just_train_twice', search)
    args = dict(texts, no_pretrained=True, methods='jtt', seeds='0')
    for _ in range(2): recipe.main(**args, upweight='2,4')
    assert searches == [([1], [2., 4.])]
    for changed in (dict(upweight='2,8'), dict(upweight='2,4', lr=0.1), dict(upweight='2,4', by='loss')):
        with pytest.raises(SystemExit, match=r'tuned.csv is of a search with other settings'):
            recipe.main(**args, **changed)
    (texts['out']/'tuned.json').unlink()
    with pytest.raises(SystemExit, match=r'tuned.csv is of a search with other settings'):
        recipe.main(**args, upweight='2,4')


def test_recipe_frames_agree_as_told(recipe):
    images, targets = torch.randint(0, 255, (200, 3, 32, 32), dtype=torch.uint8), torch.arange(200) % 2
    data, groups = recipe.framed(images, targets, list(range(200)), 0.95, 0)
    own = (data.images[:, :, 0, 0] == recipe.COLOURS[targets]).all(1)
    assert own.sum() == 190 and [f"{c}, {'own' if a else 'other'} frame" for c,
                                 a in zip(targets.tolist(), own.tolist())] == groups
    assert torch.equal(data.images[:, :, 3:-3, 3:-3], images[:, :, 3:-3, 3:-3])


@pytest.mark.parametrize('kind', [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_classes_in_a_column_are_classes(kind):
    "As fastai's tables have them: `(bs, 1)`, of any integer type"
    data = Rows()
    targets = data.targets.clamp(max=1) if kind is torch.bool else data.targets
    pred = torch.randn(N, 3)
    expected = (pred.argmax(1) != targets).float()
    for targ in targets.to(kind), targets.to(kind)[:, None]: assert torch.equal(misclassified(pred, targ), expected)
    dls = DataLoaders(DataLoader(list(zip(data.images, targets[:, None])), bs=BS, shuffle=True),
                      DataLoader(VALID, bs=25))
    def make(dls): return row_learner(dls, cbs=Noted())
    wide = just_train_twice(make, dls, 1, 1, 5, progress=False)
    dls.loaders = [DataLoader(list(zip(data.images, targets)), bs=BS, shuffle=True), dls.valid]
    assert torch.equal(wide.error_set, just_train_twice(make, dls, 1, 1, 5, progress=False).error_set)


def test_what_the_error_set_cannot_judge_is_told_before_training():
    made = []
    def make(dls):
        made.append(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), MSELossFlat(), cbs=Noted()))
        return made[-1]
    numbers = DataLoaders(DataLoader([(x, y.float()) for x, y in Rows()], bs=BS), DataLoader(VALID, bs=25))
    with pytest.raises(ValueError, match='Pass wrong='): just_train_twice(make, numbers, 1, 1, 5, progress=False)
    assert not hasattr(made[0].noted, 'batches') # not one batch
    torch_dls = DataLoaders(torch.utils.data.DataLoader(Rows(), BS), torch.utils.data.DataLoader(VALID, BS))
    with pytest.raises(TypeError, match="by='loss'"): just_train_twice(make, torch_dls, 1, 1, 5, progress=False)
    assert len(made) == 1
