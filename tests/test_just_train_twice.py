"""Just Train Twice, Group DRO and worst groups, against closed forms and brute force."""
import importlib
import json
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy, error_rate
from fastai.optimizer import SGD
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from numbered_rows import N, Rows, rows_of
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import (GroupDRO, Groups, RowWeights, WorstGroup, error_set, just_train_twice, prune, restrict_rows, row_groups, track_rows,
                                tune_just_train_twice, weighted_loaders)

VALID, BS = Rows(60), 32


def loaders(bs=BS, **kwargs): return DataLoaders(DataLoader(Rows(), bs=bs, shuffle=True, **kwargs), DataLoader(VALID, bs=25))
def learner(dls, lr=0.02, **kwargs): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), CrossEntropyLossFlat(), lr=lr, opt_func=SGD, **kwargs)
def fit(learn, n_epoch=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, **kwargs)
    return learn
def item_losses(model, rows=slice(None)):
    data = Rows()
    return F.cross_entropy(model(data.images[rows]), data.targets[rows], reduction='none')


class Noted(Callback):
    "The rows, told by the items themselves, and the loss of each batch"
    run_valid = False
    def before_fit(self): self.batches, self.gradients = [], []
    def after_loss(self): self.batches.append((rows_of(self.xb[0]), self.learn.loss_grad.item()))
    def after_backward(self): self.gradients.append(self.model[1].weight.grad.clone())


@pytest.mark.parametrize('adjustment', [0., 3.])
def test_group_dro_follows_its_formula(adjustment):
    "A model that stands still (lr 0): the weights of the groups, and each batch's loss and gradient, in float64 from the rows in the batch"
    codes = torch.arange(N) % 4 % 3 # sizes 120, 60, 60
    codes[7], names = 3, 'abcd' # one row alone: absent from most batches
    groups, noted, eta = [names[i] for i in codes], Noted(), 0.3
    learn = learner(loaders(), lr=0.)
    dro = GroupDRO(groups, eta=eta, adjustment=adjustment)
    fit(learn, 2, cbs=[dro, noted])
    losses, n_g = item_losses(learn.model).detach().double(), codes.bincount().double()
    q, history = torch.full((4,), 0.25, dtype=torch.double), []
    for i, (rows, loss) in enumerate(noted.batches):
        mine = codes[rows]
        of_group = {g: losses[rows][mine == g].mean() for g in mine.unique().tolist()}
        for g, mean in of_group.items(): q[g] = q[g]*torch.exp(eta*(mean + adjustment/n_g[g].sqrt()))
        q = q/q.sum()
        assert abs(loss - sum(q[g]*mean for g, mean in of_group.items())) < 1e-5
        if (i + 1) % 8 == 0: history.append(q.tolist())
    np.testing.assert_allclose(dro.table.to_numpy(), history, rtol=1e-5)
    rows, _ = noted.batches[-1]
    expected = sum(q[g].float()*item_losses(learn.model, rows)[codes[rows] == g].mean() for g in codes[rows].unique().tolist())
    gradient, = torch.autograd.grad(expected, learn.model[1].weight)
    torch.testing.assert_close(noted.gradients[-1], gradient, rtol=1e-4, atol=1e-6)
    assert list(dro.table.columns) == list(names) and learn.dls.train.__dict__.get('rows') is None


@settings(max_examples=15, deadline=None)
@given(upweight=st.floats(1, 100), share=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_upweighted_rows_weigh_exactly_that_much(upweight, share, seed):
    "Expected counts of sampling, and the loss's weights: both lambda/(n + (lambda-1)k) for a row of the k in the set, and 1/(...) for the others"
    chosen = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share
    weights = torch.where(chosen, upweight, 1.)
    expected = weights.double()/(N + (upweight - 1)*chosen.sum())
    np.testing.assert_allclose(weighted_loaders(loaders(), weights).train.wgts, expected, rtol=1e-6)
    callback = RowWeights(weights)
    learn = learner(loaders(), lr=0.)
    noted = Noted()
    fit(learn, cbs=[callback, noted])
    losses = item_losses(learn.model).detach()
    for rows, loss in noted.batches: assert abs(loss - (N*expected[rows]*losses[rows]).mean().item()) < 1e-4*max(1, upweight)
    assert sorted(torch.cat([rows for rows, _ in noted.batches]).tolist()) == list(range(N)) # an epoch goes through each row once


def test_weighted_loaders_draw_by_weight_and_know_their_rows():
    some = torch.arange(0, N, 2)
    dls = loaders(num_workers=0)
    dls.loaders = [restrict_rows(dls.train, some), dls.valid]
    weights = torch.ones(N).index_fill(0, torch.arange(0, 40), 9.) # 20 of the 120 rows
    weighted = weighted_loaders(dls, weights)
    set_seed(0)
    loader, counts = track_rows(weighted.train), torch.zeros(N)
    for _ in range(60):
        for i, (x, _) in enumerate(loader):
            assert torch.equal(rows_of(x), loader.rows(i))
            counts += loader.rows(i).bincount(minlength=N)
    assert len(weighted.train) == len(dls.train) and counts.sum() == 60*120 and not counts[1::2].any()
    heavy, light = counts[:40:2].mean(), counts[40::2].mean()
    assert abs(heavy/light - 9) < 0.6 # about 4 standard deviations of the ratio
    dls.loaders = [WeightedDL(Rows(), bs=BS, wgts=np.linspace(1, 3, N), shuffle=True), dls.valid]
    drawn = weighted_loaders(dls, weights).train.wgts # what is weighted already: the product
    np.testing.assert_allclose(drawn[0]/drawn[-1], 9/3)


@pytest.mark.parametrize('kind', ['shuffled', 'workers', 'restricted', 'drop_last', 'sorted'])
def test_error_set_is_the_rows_that_come_out_wrong(kind):
    dls = loaders(**dict(workers=dict(num_workers=2), drop_last=dict(drop_last=True)).get(kind, {}))
    own = torch.arange(1, N, 3) if kind == 'restricted' else torch.arange(N)
    if kind == 'restricted': dls.loaders = [restrict_rows(dls.train, own), dls.valid]
    if kind == 'sorted': dls.loaders = [SortedDL(Rows(), sort_func=lambda o: float(o[0][0, 3, 3]), bs=BS, shuffle=True), dls.valid]
    set_seed(1)
    learn = learner(dls)
    learn.model.train()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in learn.model.state_dict().items()}
    errors = error_set(learn)
    wrong = learn.model(Rows().images).argmax(1) != Rows().targets
    assert errors.tolist() == own[wrong[own]].tolist() and 0 < len(errors) < len(own)
    assert torch.equal(before, torch.get_rng_state()) and learn.model.training and all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    il = torch.zeros(N).index_fill(0, errors[::2], 5.) # what irreducible losses call noise
    noisy = len(errors[::2])
    assert error_set(learn, il=il, noise=noisy/len(own)).tolist() == errors[1::2].tolist()
    assert error_set(learn, wrong=lambda pred, targ: torch.zeros(len(targ))).tolist() == []


@pytest.mark.parametrize('by', ['sampling', 'loss'])
def test_just_train_twice_is_its_parts(by):
    "The second Learner, by hand from the first's frozen model; the same each time, and the random state is left alone"
    made = []
    def make(dls):
        made.append(learner(dls, cbs=Noted()))
        return made[-1]
    dls, before = loaders(), torch.get_rng_state()
    learn = just_train_twice(make, dls, 2, 2, 7, by=by, seed=3, progress=False)
    first = made[0]
    wrong = first.model(Rows().images).argmax(1) != Rows().targets
    assert learn is made[1] and len(made) == 2 and learn.error_set.tolist() == wrong.nonzero().flatten().tolist()
    assert torch.equal(before, torch.get_rng_state()) and len(learn.noted.batches) == len(first.noted.batches) == 2*len(dls.train)
    seen = torch.cat([rows for rows, _ in learn.noted.batches])
    if by == 'loss':
        assert len(seen.unique()) == N
        scaled = learn.row_weights.scaled
        torch.testing.assert_close(scaled, torch.where(wrong, 7., 1.)*N/(N + 6*wrong.sum()))
    else: assert wrong[seen].float().mean() > wrong.float().mean() and learn.dls.train.wgts[wrong.numpy()].min() == pytest.approx(7/(N + 6*wrong.sum().item()))
    again = just_train_twice(make, dls, 2, 2, 7, by=by, seed=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), again.model.parameters()))
    assert 1 <= len(learn.error_set) < N


def test_tune_takes_the_same_error_sets_and_sorts_by_the_worst_group():
    groups = ['ab'[i % 2] for i in range(60)]
    table = tune_just_train_twice(learner, loaders(), groups, (1, 3), 2, (1, 10), seed=3, progress=False)
    sizes = {t: len(just_train_twice(learner, loaders(), t, 1, 2, seed=3, progress=False).error_set) for t in (1, 3)}
    assert {t: n for t, n in zip(table.n_epoch_id, table.errors)} == sizes
    assert len(table) == 4 and table.worst_group.is_monotonic_decreasing and set(zip(table.n_epoch_id, table.upweight)) == {(1, 1), (1, 10), (3, 1), (3, 10)}
    best = table.iloc[0]
    worst = WorstGroup(accuracy, groups)
    def make(dls): return learner(dls, metrics=worst)
    just_train_twice(make, loaders(), int(best.n_epoch_id), 2, best.upweight, seed=3, progress=False)
    assert worst.table[-2:].min(axis=1).max() == pytest.approx(best.worst_group) # the pair by itself gives the same


@pytest.mark.parametrize('metric, worst, brute', [
    (accuracy, min, lambda p, t: (p == t).float().mean().item()), (error_rate, max, lambda p, t: (p != t).float().mean().item()),
    (F1Score(average='macro'), min, lambda p, t: f1_score(t, p, average='macro'))], ids=['accuracy', 'error_rate', 'f1'])
@pytest.mark.parametrize('ordered', [True, False], ids=['in order', 'sorted'])
def test_worst_group_is_that_of_a_loop(metric, worst, brute, ordered, tmp_path):
    dls, names = loaders(), np.array(list('abcab'*12))
    if not ordered: dls.loaders = [dls.train, SortedDL(VALID, sort_func=lambda o: float(o[0][0, 3, 3]), bs=25)]
    measure = WorstGroup(metric, pd.Series(names), worst=worst)
    save = SaveModelCallback(monitor='worst_group', fname=tmp_path/'best', comp=np.less if worst is max else None)
    learn = fit(learner(dls, metrics=[accuracy, measure]), 3, cbs=save)
    values = learn.validate() # of the best epoch's weights, loaded at the end
    pred = learn.model.eval()(VALID.images).argmax(1)
    expected = {o: brute(pred[names == o], VALID.targets[names == o]) for o in 'abc'}
    assert measure.table.iloc[-1].to_dict() == pytest.approx(expected) and values[-1] == pytest.approx(worst(expected.values()))
    assert len(measure.table) == 4 and values[-1] == pytest.approx((np.max if worst is min else np.min)([o[-1] for o in learn.recorder.values]))
    assert learn.get_preds(dl=dls.train)[0].shape == (N, 3) # other data: no metric is asked


def test_groups_of_columns_functions_and_values():
    table = pd.DataFrame(dict(y=[0, 1, 1, 0], place=list('aabb'), gap=['a', None, 'b', 'b']))
    dl = DataLoader(table, bs=2)
    for groups, codes, names in (
            ('place', [0, 0, 1, 1], ['a', 'b']), (('y', 'place'), [0, 2, 3, 1], ['0, a', '0, b', '1, a', '1, b']), (lambda o: o.y, [0, 1, 1, 0], [0, 1]),
            (torch.tensor([5, 5, 9, 9]), [0, 0, 1, 1], [5, 9]), (table.place, [0, 0, 1, 1], ['a', 'b']),
            (Groups(torch.tensor([1, 0, 0, 1]), ['x', 'y']), [1, 0, 0, 1], ['x', 'y'])):
        known = row_groups(dl, groups)
        assert known.codes.tolist() == codes and known.names == names
    for groups, words in ((('y', 'gap'), '1 rows have no group'), ('none', 'no column none; it has y, place, gap'), ([1, 2], '2 groups for a data set of 4'),
                          (['a']*4, 'All rows are in one group'), (pd.Categorical(list('aabb'), list('abc')), 'No row is in group c')):
        with pytest.raises(ValueError, match=words): row_groups(dl, groups)
    with pytest.raises(ValueError, match='No row is in group b'): row_groups(restrict_rows(dl, [0, 1]), 'place') # of the rows that it goes through
    with pytest.raises(TypeError, match='not a table'): row_groups(DataLoader(Rows(), bs=2), 'place')


def never(pred, targ): return torch.zeros(len(targ))
def always(pred, targ): return torch.ones(len(targ))


@pytest.mark.parametrize('change, error, words', [
    (dict(wrong=never), ValueError, 'The error set is empty: after n_epoch_id=1 epochs .* Lower n_epoch_id, or regularise'),
    (dict(wrong=always), ValueError, 'The error set is all of the 240 training rows.* Raise n_epoch_id'),
    (dict(il=torch.zeros(N), noise=1.), ValueError, 'but for what il= calls noise. Lower n_epoch_id, or noise'),
    (dict(il=torch.zeros(9)), ValueError, '9 values for a data set of 240'),
    (dict(upweight=0.5), ValueError, 'upweight'), (dict(upweight='20'), TypeError, 'upweight'),
    (dict(n_epoch_id=0), ValueError, 'n_epoch_id'), (dict(n_epoch=0), ValueError, 'n_epoch'),
    (dict(by='copies'), ValueError, "'sampling' or 'loss'; got 'copies'"),
    (dict(noise=2.), ValueError, 'noise'), (dict(dls=[1]), TypeError, 'DataLoaders; got list')])
def test_bad_input_of_just_train_twice(change, error, words):
    args = dict(make_learner=learner, dls=loaders(), n_epoch_id=1, n_epoch=1, upweight=5, progress=False)
    with pytest.raises(error, match=words): just_train_twice(**dict(args, **change))


def test_bad_input():
    dls = loaders()
    groups = ['ab'[i % 2] for i in range(N)]
    for weights, words in ((torch.ones(5), r'shape \(5,\)'), (-torch.ones(N), 'none negative'), (torch.full((N,), torch.nan), 'finite'),
                           (torch.zeros(N), 'not all 0')):
        with pytest.raises(ValueError, match=words): weighted_loaders(dls, weights)
        with pytest.raises(ValueError, match=words): fit(learner(dls), cbs=RowWeights(weights))
    torch_dls = DataLoaders(torch.utils.data.DataLoader(Rows(), BS), torch.utils.data.DataLoader(VALID, BS))
    with pytest.raises(TypeError, match="by='loss'"): weighted_loaders(torch_dls, torch.ones(N))
    with pytest.raises(ValueError, match='eta'): GroupDRO(groups, eta=0)
    with pytest.raises(ValueError, match='adjustment'): GroupDRO(groups, adjustment=-1)
    with pytest.raises(ValueError, match='2 groups for a data set of 240'): fit(learner(dls), cbs=GroupDRO(['a', 'b']))
    with pytest.raises(ValueError, match='MixUp makes one item of two'): fit(learner(dls), cbs=[GroupDRO(groups), MixUp()])
    with pytest.raises(ValueError, match='240 rows|drawn for it'): fit(learner(dls).batch_loss_filter(min_loss_perc=0.3, warmup_epochs=0), cbs=GroupDRO(groups))
    stream = DataLoaders(DataLoader(iter(list(zip(Rows().images, Rows().targets))), bs=8), dls.valid)
    with pytest.raises(ValueError, match='iterable'): fit(learner(stream), cbs=GroupDRO(groups))
    with pytest.raises(ValueError, match='worst must be min or max'): WorstGroup(accuracy, groups, worst='min')
    with pytest.raises(ValueError, match='240 groups for a data set of 60'): fit(learner(dls, metrics=WorstGroup(accuracy, groups)))
    with pytest.raises(ValueError, match="doesn't shuffle"): learner(dls, metrics=WorstGroup(accuracy, groups)).validate(dl=dls.train)
    with pytest.raises(ValueError, match='The error set is empty'): tune_just_train_twice(learner, dls, groups[:60], [1], 1, [5], wrong=never, progress=False)
    with pytest.raises(ValueError, match='need one value each'): tune_just_train_twice(learner, dls, groups[:60], [], 1, [5])
    with pytest.raises(ValueError, match='Pass wrong='): error_set(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), CrossEntropyLossFlat()))


def test_lr_find_and_pruned_rows_leave_the_groups_alone():
    groups = ['ab'[i % 2] for i in range(N)]
    learn = learner(prune(loaders(), torch.arange(N).float(), 0.5), cbs=GroupDRO(groups))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    fit(learn, 1)
    assert len(learn.group_dro.table) == 1
    fit(learn, 1)
    assert len(learn.group_dro.table) == 2 # goes on where it was


class Interrupt(Callback):
    "The user's ctrl-C in the third batch"
    def after_loss(self):
        if self.iter == 2: raise KeyboardInterrupt


def test_an_interrupted_lr_find_does_not_switch_it_off():
    learn = learner(loaders(), cbs=GroupDRO(['ab'[i % 2] for i in range(N)]))
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=5, show_plot=False)
    assert len(fit(learn, 1).group_dro.table) == 1


def test_a_loaded_learner_predicts(tmp_path):
    "An export leaves the training set out, which the groups were of"
    learn = fit(learner(loaders(), path=tmp_path, cbs=GroupDRO(['ab'[i % 2] for i in range(N)])), 1)
    learn.export('learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'learner.pkl')
    with loaded.no_bar(): preds = loaded.get_preds(dl=DataLoader(VALID, bs=25))[0]
    assert torch.allclose(preds, learn.model.eval()(VALID.images).softmax(1), atol=1e-5)


def test_group_dro_is_in_float32_under_autocast():
    "Half precision would round the sums of a group, and overflow in a scaled backward"
    learn = learner(loaders(), cbs=GroupDRO(['ab'[i % 2] for i in range(N)]))
    kinds = []
    class Kind(Callback):
        def after_loss(self): kinds.append(self.learn.loss_grad.dtype)
    with torch.autocast('cpu', torch.bfloat16): fit(learn, 1, cbs=Kind())
    assert set(kinds) == {torch.float32}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/'recipes'))
    return importlib.import_module('just_train_twice')


def test_recipe(recipe, tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for split, n in (('train', 60), ('test', 12)):
        for label, name in enumerate(('automobile', 'truck')):
            (tmp_path/'data'/split/name).mkdir(parents=True)
            for i in range(n):
                file = f'{split}/{name}/{i:03d}.png'
                Image.fromarray(rng.integers(0, 180, (32, 32, 3)).astype(np.uint8)).save(tmp_path/'data'/file) # noise: there is only the frame to learn
                rows.append((file, label, i % 2, 2 if split == 'test' else int(i % 3 == 0)))
    recipe.main(path=tmp_path/'data', epochs=2, epochs_id='1,2', upweight='5', agree=0.8, bs=16, lr=1e-3, out=tmp_path/'framed')
    result = json.loads((tmp_path/'framed'/'comparison.json').read_text())
    assert [row['method'] for row in result['table']] == ['erm', 'jtt', 'group_dro'] and len(result['tuned']) == 2
    summary = json.loads((tmp_path/'framed'/'jtt-0'/'summary.json').read_text())
    assert summary['error_set']['rows'] == sum(summary['error_set']['groups'].values()) and len(summary['by_group'][0]['test']) == 4
    assert (tmp_path/'framed'/'comparison.png').stat().st_size > 5000 and 'worst_group' in capsys.readouterr().out
    pd.DataFrame(rows, columns=['file', 'y', 'place', 'split']).to_csv(tmp_path/'data'/'metadata.csv', index=False)
    table = dict(path=tmp_path/'data', metadata='metadata.csv', target='y', group='y,place', no_pretrained=True, epochs=1, bs=16, lr=1e-4, methods='erm')
    recipe.main(file='file', arch='resnet18', size=32, out=tmp_path/'images', **table)
    assert set(json.loads((tmp_path/'images'/'erm-0'/'summary.json').read_text())['by_group'][0]['test']) == {'0, 0', '0, 1', '1, 0', '1, 1'}
    with pytest.raises(SystemExit, match='no column species'): recipe.main(**dict(table, target='species', file='file', out=tmp_path/'none'))


@pytest.fixture
def texts(tmp_path):
    "Metadata of pairs of texts, where a word agrees with the class in most rows"
    rng, rows = np.random.default_rng(0), []
    for i in range(96):
        label, common = i % 2, i % 5 > 0
        words = rng.choice(['the', 'cat', 'sat', 'on', 'a', 'mat'], rng.integers(2, 9)).tolist() + [('no', 'yes')[label if common else 1-label]]
        rows.append((' '.join(words), ('bad', 'good')[label], ('is', 'was')[label], int(common), ('train', 'val', 'test')[(i // 20) % 3]))
    pd.DataFrame(rows, columns=['first', 'second', 'y', 'common', 'split']).to_csv(tmp_path/'texts.csv', index=False)
    return dict(path=tmp_path, metadata='texts.csv', text='first,second', target='y', group='y,common', epochs=1, bs=8, out=tmp_path/'out')


def check_texts(out, methods):
    result = json.loads((out/'comparison.json').read_text())
    assert [row['method'] for row in result['table']] == methods
    for method in methods:
        summary = json.loads((out/f'{method}-0'/'summary.json').read_text())
        assert set(summary['by_group'][0]['test']) == {'is, 0', 'is, 1', 'was, 0', 'was, 1'}
    return summary


def test_recipe_texts(recipe, texts):
    recipe.main(**texts, no_pretrained=True)
    summary = check_texts(texts['out'], ['erm', 'jtt', 'group_dro'])
    assert summary['lr'] == 1e-3 and not summary['pretrained']
    with pytest.raises(SystemExit, match=r'other settings \(lr\): choose another --out'): recipe.main(**texts, no_pretrained=True, lr=2e-3)


def test_recipe_texts_by_bert(recipe, texts, monkeypatch):
    "A tiny BERT in place of the downloaded one: it reads pairs, and its learning rate falls to 0"
    transformers = pytest.importorskip('transformers')
    from text_rho_loss import word_pieces
    from tokenizers.processors import TemplateProcessing
    table, bert = pd.read_csv(texts['path']/'texts.csv'), texts['path']/'bert'
    tokenizer = word_pieces([*table['first'], *table['second']])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1 [SEP]:1',
                                                                    special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    tokenizer.save_pretrained(bert)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertForSequenceClassification(config).save_pretrained(bert)
    monkeypatch.setattr(recipe, 'BERT', str(bert))
    recipe.main(**dict(texts, epochs=2), methods='erm,jtt')
    assert check_texts(texts['out'], ['erm', 'jtt'])['lr'] == 2e-5
    options = recipe.SimpleNamespace(**{**texts, 'preset': None, 'split': 'split', 'max_length': 6})
    dls, test, groups, make_learner = recipe.table_data(texts['path'], options, bs=8, lr=1e-2, wd=0.1, arch=None, size=None, pretrained=True, device='cpu')
    xb, yb = next(iter(test))
    assert xb['input_ids'].shape[1] == 6 and xb['token_type_ids'].max() == 1 and len(test.dataset) == len(groups['test'])
    assert [('is', 'was')[o] for o in yb] == [o.split(', ')[0] for o in groups['test'][:len(yb)]]
    learn = fit(make_learner(dls))
    rates = learn.recorder.hps['lr']
    assert rates[0] == 1e-2 and np.allclose(np.diff(rates), -1e-2/len(dls.train))
    spared = {name for name, p in learn.model.named_parameters() if not learn.opt.state[p].get('do_wd', True)}
    assert spared == {name for name, _ in learn.model.named_parameters() if name.endswith('bias') or 'LayerNorm' in name}


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
    with pytest.raises(SystemExit, match='list_eval_partition.csv is missing'): recipe.read_table(tmp_path, options_of(recipe, 'celeba'))
    pd.DataFrame(dict(image_id=names[::-1], partition=[2]*4 + [1]*4 + [0]*8)).to_csv(tmp_path/'list_eval_partition.csv', index=False)
    (tmp_path/folder).mkdir(parents=True)
    for name in names: Image.new('RGB', (8, 10)).save(tmp_path/folder/name)
    table = recipe.read_table(tmp_path, options_of(recipe, 'celeba'))
    assert table.split.tolist() == [0]*8 + [1]*4 + [2]*4 and table.group[:4].tolist() == ['1, 1', '-1, 1', '1, -1', '-1, -1']
    assert table.file.tolist() == [str(tmp_path/folder/name) for name in names]
    dls, test, groups, make_learner = recipe.table_data(tmp_path, options_of(recipe, 'celeba'), bs=4, lr=0.1, wd=0.5, arch='resnet18', size=8,
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
        lines = [dict(gold_label=labels[i % 4], sentence1=f'premise {i}', sentence2=f'hypothesis {i}', genre='fiction') for i in range(n, n + rows)]
        (tmp_path/f'multinli_1.0_{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
        n += rows
    numbers = [i for i in range(n) if i % 4 != 2]
    metadata = pd.DataFrame(dict(gold_label=[{0: 0, 1: 1, 3: 2}[i % 4] for i in numbers], sentence2_has_negation=[int(i > 9) for i in numbers],
                                 split=[i % 3 for i in numbers]), index=numbers)
    metadata.to_csv(tmp_path/'metadata_random.csv')
    table = recipe.read_table(tmp_path, options_of(recipe, 'multinli'))
    ordered = [i for split in range(3) for i in numbers if i % 3 == split]
    assert table.text.tolist() == [f'premise {i} xxsep hypothesis {i}' for i in ordered]
    assert table.group.tolist() == [f'{metadata.gold_label[i]}, {int(i > 9)}' for i in ordered] and table.split.tolist() == [i % 3 for i in ordered]
    metadata.assign(gold_label=1).to_csv(tmp_path/'metadata_random.csv')
    with pytest.raises(SystemExit, match='not those of the metadata'): recipe.read_table(tmp_path, options_of(recipe, 'multinli'))


def test_recipe_reads_civilcomments(recipe, tmp_path):
    pd.DataFrame(dict(id=range(6), comment_text=['a', None, 'c', 'd', 'e', 'f'], split=['train', 'val', 'test']*2, toxicity=[0.1, 0.5, 0.9, 0.2, 0., 1.],
                      identity_any=[0, 1]*3)).to_csv(tmp_path/'all_data_with_identities.csv')
    table = recipe.read_table(tmp_path, options_of(recipe, 'civilcomments'))
    assert table.text.tolist() == ['a', 'd', '', 'e', 'c', 'f'] and table.split.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.group.tolist() == ['False, 0', 'False, 1', 'True, 1', 'False, 0', 'True, 0', 'True, 1']


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
        with pytest.raises(SystemExit, match=r'tuned.csv is of a search with other settings'): recipe.main(**args, **changed)
    (texts['out']/'tuned.json').unlink()
    with pytest.raises(SystemExit, match=r'tuned.csv is of a search with other settings'): recipe.main(**args, upweight='2,4')


def test_recipe_frames_agree_as_told(recipe):
    images, targets = torch.randint(0, 255, (200, 3, 32, 32), dtype=torch.uint8), torch.arange(200) % 2
    data, groups = recipe.framed(images, targets, list(range(200)), 0.95, 0)
    own = (data.images[:, :, 0, 0] == recipe.COLOURS[targets]).all(1)
    assert own.sum() == 190 and [f"{c}, {'own' if a else 'other'} frame" for c, a in zip(targets.tolist(), own.tolist())] == groups
    assert torch.equal(data.images[:, :, 3:-3, 3:-3], images[:, :, 3:-3, 3:-3])
