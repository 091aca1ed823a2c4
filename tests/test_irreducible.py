"Irreducible losses: what needs real loaders with workers, whole fits, interruptions or processes"
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ShowGraphCallback
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches `lr_find` and `fit_one_cycle`)
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import TensorImage, TensorMask, default_device, set_seed
from fasttransform import Transform
from helpers import fit, two_processes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from rholoss_fastai.irreducible import (
    IrreducibleLosses,
    crossfit_irreducible,
    fit_irreducible,
    irreducible_losses,
    learner_copies,
)
from rholoss_fastai.loaders import restrict_rows

quiet = dict(progress=False)
adamw = partial(OptimWrapper, opt=torch.optim.AdamW)

def data(n=96, seed=0):
    "Two classes that a linear model can tell apart; the first input is the number of the row"
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=generator)
    x = torch.randn(n, 6, generator=generator) + 1.5*y[:,None]
    return torch.cat([torch.arange(n)[:,None], x], 1), y

def make_dls(n=96, seed=0, bs=16, **kwargs):
    train,valid = (TensorDataset(*data(size, s)) for size,s in ((n, seed), (24, 99)))
    return DataLoaders(DataLoader(train, bs=bs, shuffle=True, drop_last=True, **kwargs), DataLoader(valid, bs=24),
                       device='cpu')

class Net(nn.Module):
    "Batch norm and dropout; notes the rows that it trained on and those that it scored"
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        self.trained,self.scored = set(),set()

    def forward(self, x):
        (self.trained if self.training else self.scored).update(x[:,0].long().tolist())
        return self.layers(x[:,1:])

def make_learner(dls, opt_func=Adam, lr=1e-2, **kwargs):
    return Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, **kwargs)

def rng_state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

def brute_force(model, dataset):
    "The loss of each row, one at a time"
    model.eval()
    with torch.no_grad(): return torch.stack([F.cross_entropy(model(x[None]), y[None]) for x,y in dataset])

# ---- cross-fitting

@pytest.mark.slow
@pytest.mark.parametrize('n_folds', [2, 3, 5])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_no_row_is_scored_by_a_model_that_trained_on_it(n_folds, num_workers):
    dls,models = make_dls(n=97, num_workers=num_workers),[]
    def make(dls):
        learn = make_learner(dls)
        models.append(learn.model)
        return learn
    il = crossfit_irreducible(make, dls, 2, n_folds=n_folds, **quiet)
    assert len(models) == n_folds and len(il) == 97 and il.info['n_folds'] == n_folds
    assert len(il.info['best_epoch']) == n_folds
    assert all(not m.trained & m.scored for m in models)
    assert sorted(row for m in models for row in m.scored) == list(range(97))
    sizes = [len(m.scored) for m in models]
    assert max(sizes) - min(sizes) <= 1
    # each model had all other rows to train on, though it drops the last few of each epoch
    assert all(len(m.trained) > 0.8*(97-len(m.scored)) for m in models)

inputs,labels = data()

class Jitter(Transform):
    "Augmentation that draws from each of the global generators"
    split_idx = 0
    def encodes(self, x:TensorImage): return x + 0.1*random.random() + 0.1*np.random.rand() + 0.1*torch.rand(1).item()

class Features(Transform):
    def encodes(self, i:int): return TensorImage(inputs[i])

class Label(Transform):
    def encodes(self, i:int): return int(labels[i])

def augmented_dls(num_workers=0):
    datasets = Datasets(list(range(96)), [[Features(), Jitter()], Label()], splits=[range(80), range(80, 96)])
    return datasets.dataloaders(bs=16, num_workers=num_workers, device='cpu', after_batch=[Jitter()])

@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [0, 2])
def test_the_seed_alone_decides(num_workers):
    def run(seed, global_seed):
        set_seed(3)
        dls = augmented_dls(num_workers)
        set_seed(global_seed)
        before,order = rng_state(),dls.train.rng.getstate()
        il = crossfit_irreducible(make_learner, dls, 1 if num_workers else 2, seed=seed, **quiet)
        assert rng_state() == before
        assert dls.train.rng.getstate() == order
        return il.values
    first = run(0, 1)
    assert torch.equal(first, run(0, 2))
    assert not torch.equal(first, run(1, 1))

def test_folds_differ_with_the_seed_and_the_global_state_survives_an_error():
    dls,seen = make_dls(),[]
    def make(dls):
        seen.append(dls.train)
        raise KeyboardInterrupt
    before = rng_state()
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt): crossfit_irreducible(make, dls, 1, seed=seed)
    assert rng_state() == before
    rows = [set(dl.dataset.row_numbers.tolist()) for dl in seen]
    assert rows[0] != rows[1]

def test_folds_keep_augmentation_and_validation():
    dls = augmented_dls()
    def make(fold):
        (x, _),(again, _) = fold.train.dataset[0], fold.train.dataset[0]
        assert not torch.equal(x, again)
        assert fold.valid is dls.valid and len(fold.train.dataset) == 40 and fold.device == dls.device
        return make_learner(fold)
    crossfit_irreducible(make, dls, 1, **quiet)

def test_plain_pytorch_loaders():
    train,valid = (TorchDataLoader(TensorDataset(*data(n)), batch_size=16, shuffle=n>48) for n in (96, 48))
    dls = DataLoaders(train, valid)
    il = crossfit_irreducible(make_learner, dls, 2, **quiet)
    assert torch.equal(il.values, crossfit_irreducible(make_learner, dls, 2, **quiet).values)

def test_make_learner_must_make_learners():
    dls = make_dls()
    model,body = Net(),nn.Linear(7, 4)
    learn = make_learner(dls)
    for make,message in (
        (lambda dls: None, 'must return a Learner; got NoneType'),
        (lambda dls: learn, 'has others'),
        (lambda dls: Learner(dls, model, CrossEntropyLossFlat()), 'shares parameters'),
        (lambda dls: Learner(dls, nn.Sequential(body, nn.Linear(4, 2)), CrossEntropyLossFlat()), 'shares parameters')):
        with pytest.raises((ValueError, TypeError), match=message): crossfit_irreducible(make, dls, 1, **quiet)

@pytest.mark.parametrize('kwargs, error, message', [
    (dict(n_folds=1), ValueError, 'n_folds must be a whole number of at least 2; got 1'),
    (dict(n_folds=97), ValueError, 'n_folds=97, but the data set has 96 rows'),
    (dict(n_folds=2.), TypeError, 'n_folds must be a whole number of at least 2; got 2.0'),
    (dict(n_epoch=0), ValueError, 'n_epoch must be a whole number of at least 1; got 0'),
    (dict(seed=-1), ValueError, 'seed must be a whole number of at least 0; got -1')])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        crossfit_irreducible(make_learner, make_dls(), **{'n_epoch': 1, **quiet, **kwargs})

def test_a_fold_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match='delivers no batch'):
        crossfit_irreducible(make_learner, make_dls(n=40, bs=32), 1, **quiet)

def test_loaders_are_no_dataloaders():
    with pytest.raises(TypeError, match='dls must be DataLoaders'):
        crossfit_irreducible(make_learner, make_dls().train, 1)

# ---- fitting on holdout data

class BruteForce(Callback):
    "All losses after each epoch, by hand"
    order = 99
    def __init__(self, dataset): self.dataset,self.losses,self.weights = dataset,[],[]
    def after_train(self):
        model = Net()
        model.load_state_dict(self.learn.model.state_dict())
        self.losses.append(brute_force(model, self.dataset))
        self.weights.append(model.state_dict())

@pytest.mark.parametrize('one_cycle', [False, True])
@pytest.mark.parametrize('opt_func', [Adam, adamw])
def test_the_best_epoch_is_the_lowest(one_cycle, opt_func):
    set_seed(1)
    target = make_dls(seed=0)
    by_hand = BruteForce(target.train.dataset)
    learn = make_learner(make_dls(seed=1), opt_func, cbs=by_hand)
    il = fit_irreducible(learn, target.train, 6, lr=0.3, one_cycle=one_cycle, **quiet)
    means = [o.mean().item() for o in by_hand.losses]
    best = int(np.argmin(means))
    assert len(means) == 6 and il.info['best_epoch'] == [best] and il.info['n_epoch'] == 6
    torch.testing.assert_close(il.values, by_hand.losses[best], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in by_hand.weights[best].items())
    assert torch.equal(irreducible_losses(learn, target.train, **quiet).values, il.values)

def test_scoring_does_not_change_training():
    def weights(train):
        set_seed(2)
        target,learn = make_dls(seed=0),make_learner(make_dls(seed=1))
        set_seed(3)
        train(learn, target)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()]), target.train.rng.getstate()
    plain = weights(lambda learn,target: fit(learn, 1))
    scored = weights(lambda learn,target: fit_irreducible(learn, target.train, 1, **quiet))
    assert torch.equal(plain[0], scored[0]) and plain[1] == scored[1]

def test_epochs_without_a_finite_mean_are_never_the_best():
    class Breaks(Callback):
        "The model gives NaN after some epochs, and is mended for the others"
        order = 98
        def __init__(self, broken): self.broken,self.bias = broken,None
        def before_train(self):
            if self.bias is not None: self.learn.model.layers[-1].bias.data.copy_(self.bias)
        def after_train(self):
            bias = self.learn.model.layers[-1].bias.data
            self.bias = bias.clone()
            if self.epoch in self.broken: bias.fill_(float('nan'))
    target = make_dls(seed=0)
    learn = make_learner(make_dls(seed=1), cbs=Breaks((0, 2)))
    il = fit_irreducible(learn, target.train, 3, **quiet)
    assert il.info['best_epoch'] == [1] and il.values.isfinite().all()
    learn = make_learner(make_dls(seed=1), cbs=Breaks((0, 1, 2)))
    with pytest.raises(ValueError, match='the model diverged'): fit_irreducible(learn, target.train, 3, **quiet)

class Interrupts(Callback):
    def __init__(self, exception): self.exception = exception
    def before_batch(self):
        if self.epoch == 1: raise self.exception

@pytest.mark.parametrize('exception', [KeyboardInterrupt(), RuntimeError('out of luck')])
def test_an_interrupted_fit_leaves_nothing_behind(exception):
    target,learn = make_dls(seed=0),make_learner(make_dls(seed=1))
    before,logger = {type(cb) for cb in learn.cbs},learn.logger
    with learn.added_cbs(Interrupts(exception)):
        with pytest.raises(type(exception)): fit_irreducible(learn, target.train, 3)
    assert {type(cb) for cb in learn.cbs} == before and len(learn.cbs) == len(before)
    assert learn.logger is logger and learn.create_mbar and learn.progress.learn is learn
    assert fit_irreducible(learn, target.train, 1, **quiet).values.isfinite().all()

def test_callbacks_on_the_holdout_learner(tmp_path):
    target = make_dls(seed=0)
    trackers = [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=50)]
    learn = make_learner(make_dls(seed=1), path=tmp_path, metrics=accuracy,
                         cbs=[*trackers, MixUp(), ShowGraphCallback()])
    il = fit_irreducible(learn, target.train, 2, **quiet)
    assert [len(o) for o in learn.recorder.values] == [3, 3]  # trackers read the validation's results, so it ran
    assert len(il) == 96 and isinstance(learn.loss_func, CrossEntropyLossFlat)
    learn = make_learner(make_dls(seed=1))
    fit_irreducible(learn, target.train, 2, **quiet)
    assert [len(o) for o in learn.recorder.values] == [1, 1]
    fit_irreducible(learn, target.train, 1, validate=True, **quiet)
    assert [len(o) for o in learn.recorder.values] == [2]

def test_a_holdout_without_validation_set():
    target = make_dls(seed=0)
    learn = make_learner(DataLoaders(make_dls(seed=1).train))
    assert len(fit_irreducible(learn, target.train, 1, **quiet)) == 96

def test_the_training_set_as_holdout():
    dls = make_dls()
    with pytest.raises(ValueError, match='crossfit_irreducible'): fit_irreducible(make_learner(dls), dls.train, 1)

@pytest.mark.slow
def test_progress(capsys):
    target = make_dls(seed=0)
    fit_irreducible(make_learner(make_dls(seed=1)), target.train, 30)
    shown = capsys.readouterr().out
    assert '360/360' in shown and 'irreducible loss' in shown
    assert len(shown) < 2000 and 'train_loss' not in shown  # a file keeps every update, and this is one
    learn = make_learner(make_dls(seed=1))
    with learn.no_bar(): fit_irreducible(learn, target.train, 1)
    fit_irreducible(learn, target.train, 1, **quiet)
    assert capsys.readouterr().out == ''

# ---- scoring

@pytest.mark.parametrize('num_workers', [0, 2])
def test_scoring_is_a_plain_loop_in_order(num_workers):
    set_seed(0)
    dls = augmented_dls(num_workers)
    learn = fit(make_learner(dls))
    it = iter(dls.train)  # in the middle of an epoch
    next(it)
    il = irreducible_losses(learn, dls.train, **quiet)
    by_hand = brute_force(learn.model, zip(inputs[:80], labels[:80], strict=True))
    torch.testing.assert_close(il.values, by_hand, rtol=1e-4, atol=1e-5)
    assert len(list(it)) == 4
    other = irreducible_losses(learn, dls.train.new(shuffle=False, drop_last=False, bs=7), **quiet)
    torch.testing.assert_close(il.values, other.values, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('fails', [False, True])
def test_scoring_leaves_no_trace(fails):
    dls = make_dls()
    learn = fit(make_learner(dls), 2)
    learn.model.train()
    learn.model.layers[1].eval()
    if fails: learn.loss_func = lambda pred, targ: 1/0
    def trace():
        opt = [{k: torch.as_tensor(v).tolist() for k,v in state.items()} for state in learn.opt.state.values()]
        return ([m.training for m in learn.model.modules()],
                {k: v.tolist() for k,v in learn.model.state_dict().items()}, rng_state(), opt,
                [p.grad.tolist() for p in learn.model.parameters()], list(learn.recorder.values), list(learn.cbs),
                learn.training, learn.dl,
                dls.train.rng.getstate())
    before,opt,loaders = trace(),learn.opt,list(dls.loaders)
    if fails:
        with pytest.raises(ValueError, match='ZeroDivisionError'): irreducible_losses(learn, dls.train)
    else: irreducible_losses(learn, dls.train)
    assert trace() == before and learn.opt is opt and learn.dls is dls
    assert all(a is b for a,b in zip(dls.loaders, loaders, strict=True))

def test_a_loader_of_some_rows():
    "Those rows have the losses that they have in the whole; of the others nothing is known, and nobody takes them"
    dls = make_dls()
    learn, rows = make_learner(dls), [30, 2, 5, 77]
    part, whole = restrict_rows(dls.train, rows), irreducible_losses(learn, dls.train, **quiet)
    some = irreducible_losses(learn, part, **quiet)
    torch.testing.assert_close(some[rows], whole[rows])
    assert len(some) == len(whole) and some.unknown.sum() == len(whole) - 4 and some.check(part) is some
    with pytest.raises(ValueError, match='of 4 of 96 rows: nothing is known of 92'): some.check(dls.train)
    rows = list(range(48))
    part = restrict_rows(dls.train, rows)
    part_dls = DataLoaders(part, dls.valid)
    il = crossfit_irreducible(make_learner, part_dls, 1, **quiet)
    assert not il[rows].isnan().any() and il.info['n_known'] == 48
    il = fit_irreducible(make_learner(DataLoaders(dls.valid, dls.valid)), part, 1, **quiet)
    assert not il[rows].isnan().any() and il.info['n_known'] == 48

def test_how_good_the_model_is():
    dls = make_dls()
    learn = make_learner(dls)
    il = irreducible_losses(learn, dls.train, **quiet)
    preds, targs = learn.get_preds(dl=dls.train.new(shuffle=False, drop_last=False))
    assert il.info['accuracy'] == pytest.approx((preds.argmax(1) == targs).float().mean().item())
    assert il.info['chance'] == pytest.approx(targs.bincount().max().item()/len(targs))
    numbers = Learner(DataLoaders(*(DataLoader([(torch.rand(3), torch.rand(2)) for _ in range(8)], bs=4)
                                    for _ in range(2))), nn.Linear(3, 2), nn.MSELoss())
    assert 'accuracy' not in irreducible_losses(numbers, numbers.dls.train, **quiet).info

def test_a_diverged_model():
    dls = make_dls()
    learn = make_learner(dls)
    learn.model.layers[0].weight.data[0,0] = float('nan')
    with pytest.raises(ValueError, match='96 of 96 irreducible losses are NaN'):
        irreducible_losses(learn, dls.train, **quiet)

def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 2)
        def forward(self, a, b): return self.layer(a+b)
    x,y = data(64)
    dls = DataLoaders(*(DataLoader(TensorDataset(x, x, y), bs=16, shuffle=True, n=64) for _ in range(2)))
    dls.n_inp = 2
    il = crossfit_irreducible(lambda dls: Learner(dls, Two(), CrossEntropyLossFlat(), lr=1e-3), dls, 1, **quiet)
    assert len(il) == 64

def test_save_and_load(tmp_path):
    dls = make_dls()
    il = crossfit_irreducible(make_learner, dls, 2, **quiet)
    il.save(tmp_path/'il.safetensors')
    loaded = IrreducibleLosses.load(tmp_path/'il.safetensors').check(dls.train)
    assert torch.equal(loaded.values, il.values) and loaded.info == il.info
    assert loaded.info['model'] == 'Net' and loaded.info['loss'] == 'CrossEntropyLossFlat'
    assert loaded.info['seconds'] > 0
    assert loaded.info['mean'] == pytest.approx(il.values.mean().item())
    with pytest.raises(ValueError): loaded.check(make_dls(seed=5).train)

# ---- models that return more than a tensor

class Wrapped(Net):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
    def forward(self, x): return self.wrap(super().forward(x))

@pytest.mark.slow
@pytest.mark.parametrize('wrap', [lambda o: (o, [o.detach()]), lambda o: dict(logits=o),
                                  lambda o: SimpleNamespace(loss=None, logits=o)])
def test_outputs_that_hold_the_prediction(wrap):
    def make(dls): return Learner(dls, Wrapped(wrap), CrossEntropyLossFlat(), lr=1e-2)
    crossfitted = [crossfit_irreducible(o, make_dls(), 2, **quiet).values for o in (make, make_learner)]
    assert torch.equal(*crossfitted)
    def fitted(make):
        set_seed(0)
        learn = make(make_dls(seed=1))
        return fit_irreducible(learn, make_dls(seed=0).train, 2, **quiet)
    assert torch.equal(fitted(make).values, fitted(make_learner).values)

@pytest.mark.slow
def test_a_loss_that_wants_the_whole_output_gets_it():
    dls = make_dls()
    def loss(pred, targ, reduction='mean'): return F.cross_entropy(pred[0], targ, reduction=reduction) + 0*pred[1].sum()
    def make(dls): return Learner(dls, Wrapped(lambda o: (o, o)), loss, lr=1e-2)
    assert torch.equal(crossfit_irreducible(make, dls, 1, **quiet).values,
                       crossfit_irreducible(make_learner, dls, 1, **quiet).values)

@pytest.mark.slow
def test_recurrent_text_model_out_of_the_box():
    from fastai.text.all import (
        AWD_LSTM,
        BaseTokenizer,
        TextDataLoaders,
        awd_lstm_clas_config,
        text_classifier_learner,
    )
    set_seed(0)
    words = 'good great fine bad awful poor a the film plot'.split()
    texts = [' '.join(random.choices(words, k=random.randint(3, 12))) for _ in range(60)]
    frame = pd.DataFrame(dict(text=texts, label=[str('bad' in t) for t in texts],
                              is_valid=[i >= 48 for i in range(60)]))
    dls = TextDataLoaders.from_df(frame, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=20,
                                  device='cpu',
                                  tok_tfm=BaseTokenizer(), num_workers=0)
    config = dict(awd_lstm_clas_config, emb_sz=8, n_hid=12, n_layers=2)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config)
    make = learner_copies(learn)
    new,(text,_) = make(dls),dls.one_batch()
    for model in (new.model, learn.model): model.eval(); model.reset()
    with torch.no_grad(): assert torch.equal(new.model(text)[0], learn.model(text)[0])
    before = {k: v.clone() for k,v in new.model.named_parameters() if v.requires_grad}
    fit(new, cbs=Callback(after_pred=lambda cb: setattr(cb.learn, 'pred', cb.pred[0])))
    assert all(not torch.equal(v, before[k]) for k,v in new.model.named_parameters() if 'weight_hh_l0_raw' in k)
    il = crossfit_irreducible(make, dls, 1, **quiet)
    assert len(il) == 48 and torch.equal(il.values, crossfit_irreducible(make, dls, 1, **quiet).values)

@pytest.mark.slow
def test_unet_out_of_the_box():
    from fastai.vision.all import resnet18, unet_learner
    set_seed(0)
    images = torch.rand(4, 3, 32, 32)
    pairs = [(TensorImage(o), TensorMask(o[0] > 0.5).long()) for o in images]
    dls = DataLoaders(TfmdDL(pairs, bs=2, shuffle=True, num_workers=0), TfmdDL(pairs, bs=2, num_workers=0),
                      device='cpu')
    learn = unet_learner(dls, resnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1),
                         normalize=False)
    learn.model(images[:2])  # hooks hold on to activations of a graph
    il = crossfit_irreducible(learner_copies(learn), dls, 1, **quiet)
    assert len(il) == 4 and il.info['model'] == 'resnet18'

# ---- copies of a Learner

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_copies_are_of_the_learner_as_it_was():
    dls = make_dls()
    def splitter(model): return [list(model.layers[0].parameters()), list(model.layers[1:].parameters())]
    learn = make_learner(dls, adamw, lr=3e-3, wd=0.07, moms=(0.8,0.7,0.8), train_bn=False, wd_bn_bias=True,
                         splitter=splitter,
                         metrics=accuracy, cbs=MixUp())
    learn.freeze()
    make,before = learner_copies(learn),weights(learn)
    learn.unfreeze()
    fit(learn)
    one,two = make(dls),make(dls)
    for new in (one, two):
        assert torch.equal(weights(new), before) and not torch.equal(before, weights(learn))
        assert new.loss_func is learn.loss_func and new.opt_func is adamw and new.splitter is splitter
        assert (new.lr, new.wd, new.moms, new.train_bn, new.wd_bn_bias) == (3e-3, 0.07, (0.8,0.7,0.8), False, True)
        assert not new.model.layers[0].weight.requires_grad and new.model.layers[4].weight.requires_grad
        assert not new.metrics and {type(cb).__name__ for cb in new.cbs} == {'TrainEvalCallback', 'Recorder',
                                                                             'CastToTensor'}
    new = fit(one)
    assert torch.equal(weights(two), before) and torch.equal(new.model.layers[0].weight, two.model.layers[0].weight)
    assert len(new.opt.param_lists) == 2

def test_copies_are_silent(capsys):
    dls = make_dls()
    learner_copies(make_learner(dls))(dls).fit(1)
    assert capsys.readouterr().out == ''

@pytest.mark.parametrize('mode', [AMPMode.FP16, AMPMode.BF16])
def test_copies_keep_mixed_precision(mode):
    dls = make_dls()
    learn = make_learner(dls, cbs=MixedPrecision(mode, init_scale=2.**7))
    new, = [cb for cb in learner_copies(learn)(dls).cbs if isinstance(cb, MixedPrecision)]
    assert new is not learn.mixed_precision and new.amp_mode == mode and new.kwargs['init_scale'] == 2.**7

def test_an_optimiser_that_is_made_already_is_not_shared():
    dls = make_dls()
    model = Net()
    opt = OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt, lr=0.1)
    make,before = learner_copies(learn),weights(learn)
    one,two = fit(make(dls)),make(dls)
    assert torch.equal(weights(learn), before) and torch.equal(weights(two), before)
    assert not torch.equal(weights(one), before)
    assert {id(p) for group in one.opt.param_lists for p in group} == {id(p) for p in one.model.parameters()}
    assert not learn.opt_func.opt.state and len(crossfit_irreducible(make, dls, 1, **quiet)) == 96

opt_funcs = dict(adam=Adam, sgd=SGD, momentum=partial(SGD, mom=0.9), adamw=adamw,
                 torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD))

@pytest.mark.parametrize('name', opt_funcs)
@pytest.mark.parametrize('num_it', [10, 30])
def test_a_fitted_learner_is_refused_and_lr_find_does_not_count(name, num_it, tmp_path):
    dls = make_dls()
    learn = make_learner(dls, opt_funcs[name], path=tmp_path)
    before = weights(learn)
    learner_copies(learn)
    with learn.no_bar():
        learn.lr_find(num_it=num_it, show_plot=False, stop_div=False)
        learner_copies(learn)
        with learn.no_logging(): learn.validate(); learn.get_preds()
    assert torch.equal(weights(learner_copies(learn)(dls)), before)
    fit(learn)
    with pytest.raises(ValueError, match=r"Make a fresh Learner.*il="): learner_copies(learn)

def test_a_learner_that_was_interrupted_or_frozen_is_refused():
    dls = make_dls()
    learn = make_learner(dls)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=Interrupts(KeyboardInterrupt()))
    with pytest.raises(ValueError, match='already been fitted'): learner_copies(learn)
    learn = fit(make_learner(dls))
    learn.unfreeze()  # clears the optimiser's state
    with pytest.raises(ValueError, match='already been fitted'): learner_copies(learn)

@pytest.mark.parametrize('name', opt_funcs)
def test_the_classic_workflow_is_refused(name, tmp_path):
    learn = make_learner(make_dls(), opt_funcs[name], path=tmp_path)
    learn.freeze()
    learner_copies(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        learn.unfreeze()
        learn.lr_find(num_it=30, show_plot=False, stop_div=False)
    with pytest.raises(ValueError, match='already been fitted'): learner_copies(learn)

# ---- several processes

script = '''
import os, sys, torch
from test_irreducible import *
torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
fitted = []
def make(dls):
    fitted.append(1)
    return make_learner(dls)
torch.manual_seed(rank)
dls,before = make_dls(),rng_state()
il = crossfit_irreducible(make, dls, 2, n_folds=3)
assert os.environ['WORLD_SIZE'] == '2'
assert rng_state() == before
assert len(fitted) == (2, 1)[rank], fitted
il.save({out!r} + str(rank))
torch.distributed.destroy_process_group()
'''

@pytest.mark.slow
def test_processes_share_the_folds(tmp_path):
    two_processes(script.format(out=str(tmp_path/'il')), out=tmp_path/'log')
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # as in the processes: sums come out differently over more
    try: alone = crossfit_irreducible(make_learner, make_dls(), 2, n_folds=3, **quiet)
    finally: torch.set_num_threads(threads)
    for rank in (0, 1):
        il = IrreducibleLosses.load(tmp_path/f'il{rank}')
        assert torch.equal(il.values, alone.values)
        assert {k: v for k,v in il.info.items() if k != 'seconds'} == {k: v for k,v in alone.info.items()
                                                                       if k != 'seconds'}

# ---- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['to_fp32', 'to_fp16', 'to_bf16'])
def test_cuda_and_mixed_precision(mode):
    target,dls = make_dls(seed=0).to(default_device()),make_dls(seed=1).to(default_device())
    learn = getattr(make_learner(dls), mode)()
    il = fit_irreducible(learn, target.train, 2, **quiet)
    before = torch.cuda.get_rng_state().tolist()
    il = irreducible_losses(learn, target.train, **quiet)
    assert torch.cuda.get_rng_state().tolist() == before
    by_hand = brute_force(learn.model.cpu(), target.train.dataset)
    torch.testing.assert_close(il.values, by_hand, rtol=0, atol=1e-3 if mode == 'to_fp32' else 0.1)
    make = learner_copies(getattr(make_learner(dls), mode)())
    assert torch.equal(*(crossfit_irreducible(make, dls, 2, **quiet).values for _ in range(2)))

def test_what_is_degraded_is_known():
    "Rows that a restricted loader left out stay unknown"
    x = torch.randn(60, 2)
    dl = restrict_rows(DataLoader(TensorDataset(x, torch.arange(60) % 3), bs=6), range(0, 60, 2))
    table = IrreducibleLosses.of(torch.rand(30), dl)
    worse = table.degraded(0.5)
    assert worse.check(dl) is worse and torch.equal(worse.unknown, table.unknown)
    assert 0 < (worse.values != table.values)[::2].sum() <= 15
    assert torch.equal(worse.values[::2].sort().values, table.values[::2].sort().values)

def test_holdout_data_share_no_row_with_what_is_scored():
    data = TensorDataset(torch.randn(60, 2), torch.arange(60) % 3)
    def dl(rows): return restrict_rows(DataLoader(data, bs=6), rows)
    def learn(rows): return Learner(DataLoaders(dl(rows), dl(rows)), nn.Linear(2, 3), CrossEntropyLossFlat())
    for train_dl, n in ((dl(range(30, 60)), 3), (DataLoader(data, bs=6), 33)):
        with pytest.raises(ValueError, match=f'holds {n} of the rows of train_dl'):
            fit_irreducible(learn(range(33)), train_dl, 1, **quiet)
    assert len(fit_irreducible(learn(range(30)), dl(range(30, 60)), 1, **quiet)) == 60
