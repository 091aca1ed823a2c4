"Hypergradients against exact derivatives and dense linear algebra in float64, and what fits do with them"
import math
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.basics import OptimWrapper, RMSProp
from fastai.callback.core import (
    Callback,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches fit_one_cycle, lr_find)
from fastai.callback.tracker import ReduceLROnPlateau, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, Lamb, Lookahead
from fastai.torch_core import TensorImage, set_seed
from fasttransform import Transform
from helpers import examples, fit, learner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from rholoss_fastai.all import OnePassTuner, Update, hypergradient

torch_sgd, torch_adam, torch_adamw = (partial(OptimWrapper, opt=o)
                                      for o in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))
OPTIMISERS = dict(
    sgd=partial(SGD, mom=0.8, wd=0.03), sgd_l2=partial(SGD, mom=0.8, wd=0.03, decouple_wd=False),
    sgd_plain=partial(SGD, wd=0.03),
    rmsprop=partial(RMSProp, wd=0.03), rmsprop_mom=partial(RMSProp, mom=0.8, wd=0.03),
    adamw=partial(Adam, mom=0.8, wd=0.03),
    adam_l2=partial(Adam, mom=0.8, wd=0.03, decouple_wd=False),
    torch_sgd=partial(torch_sgd, momentum=0.8, weight_decay=0.03),
    torch_sgd_plain=partial(torch_sgd, weight_decay=0.03),
    torch_adam=partial(torch_adam, betas=(0.8, 0.95), weight_decay=0.03),
    torch_adamw=partial(torch_adamw, betas=(0.8, 0.95), weight_decay=0.03))
WITH_MOMENTUM = [name for name in OPTIMISERS if 'plain' not in name and name != 'rmsprop']


def mlp(*sizes, double=True):
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.Tanh())][:-1]
    return nn.Sequential(*layers).double() if double else nn.Sequential(*layers)


def data(n=60, n_valid=20, seed=0, double=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + n_valid, 3, generator=generator, dtype=torch.float64)
    y = (x[:, :1]*x[:, 1:2] + x[:, 2:] + 0.1*torch.randn(n + n_valid, 1, generator=generator, dtype=torch.float64))
    if not double: x, y = x.float(), y.float()
    return (x[:n], y[:n]), (x[n:], y[n:])


def loader(x, y, bs, shuffle=True, **kwargs): return DataLoader(list(zip(x, y)), bs=bs, shuffle=shuffle, **kwargs)


def loaders(bs=20, shuffle=True, **kwargs):
    train, valid = data(**kwargs)
    return DataLoaders(loader(*train, bs, shuffle), loader(*valid, len(valid[0]), False))


class FloatLoss(Callback):
    "fastai's Recorder can't average losses in float64"
    order = Recorder.order - 1
    def after_batch(self): self.learn.loss = self.loss.float()


def two_groups(model): return [list(model[0].parameters()), list(model[2:].parameters())]


def double_learner(opt='sgd', model=None, dls=None, seed=0, double=True, lr=0.05, **kwargs):
    opt_func = OPTIMISERS[opt] if isinstance(opt, str) else opt
    model, dls = model or partial(mlp, 3, 4, 1, double=double), dls or partial(loaders, double=double)
    return learner(dls, model, nn.MSELoss(), seed, lr, opt_func=opt_func, **kwargs).add_cb(FloatLoss())


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.state_dict().values()]).cpu()
def tuner(learn): return learn.one_pass_tuner


class Spy(Callback):
    "What stood before the step in which the hyper-parameters are tuned, and the slopes that came out"
    order = OnePassTuner.order - 1
    def before_fit(self):
        self.slopes, own = [], tuner(self.learn)
        own.hypers.clipped = lambda leaf, slope: self.slopes.append(slope) or slope

    def before_step(self):
        if not tuner(self.learn)._fit.due or self.slopes: return
        self.grads = [p.grad.clone() for p in self.model.parameters()]
        self.before = deepcopy((self.model, self.opt))
        self.batch = self.xb, self.yb


def spied(learn, hessian_share=1, **kwargs):
    spy = Spy()
    fit(learn.one_pass(hessian_share=hessian_share, **kwargs), cbs=spy)
    spy.slopes = spy.slopes[:len(tuner(learn).hypers.leaves)]
    return spy


def valid_loss(model, learn): return nn.functional.mse_loss(model(learn.dls.valid_x), learn.dls.valid_y)


SCALES = dict(lr=(math.log10, lambda t: 10**t), wd=(math.log10, lambda t: 10**t),
              mom=(lambda v: math.log(v/(1 - v)), lambda t: 1/(1 + math.exp(-t))))


def exact_slope(spy, learn, name, group, h=1e-4):
    """Derivative of the validation loss by a transformed hyper-parameter of the one step, taken by the optimiser
    itself: five-point differences"""
    inward, outward = SCALES[name]
    def loss(shift):
        model, opt = deepcopy(spy.before)
        for p, g in zip(model.parameters(), spy.grads): p.grad = g.clone()
        values = [hyper[name] for hyper in opt.hypers]
        values[group] = outward(inward(values[group]) + shift)
        opt.set_hyper(name, values)
        opt.step()
        with torch.no_grad(): return valid_loss(model, learn).item()
    return (8*(loss(h) - loss(-h)) - loss(2*h) + loss(-2*h))/(12*h)


def with_valid(dls):
    (_, _), (x, y) = data()
    dls.valid_x, dls.valid_y = x, y
    return dls


# The optimiser's step as a function

@pytest.mark.parametrize('name', OPTIMISERS)
@pytest.mark.parametrize('wd_bn_bias', [False, True])
def test_update_is_the_optimisers_step(name, wd_bn_bias):
    "For several steps, with biases that fastai does not decay, and values of its own in each group"
    learn = double_learner(name, splitter=two_groups, wd_bn_bias=wd_bn_bias)
    learn.create_opt()
    learn.opt.set_hyper('lr', [0.01, 0.1])
    update, (x, y) = Update(learn.opt), data()[0]
    for _ in range(4):
        learn.loss_func(learn.model(x), y).backward()
        expected = [update(p, p.grad.clone(), hyper) for group, hyper in zip(learn.opt.param_lists, learn.opt.hypers)
                    for p in group]
        learn.opt.step()
        for p, new in zip(learn.model.parameters(), expected): assert torch.allclose(p, new, rtol=1e-12, atol=1e-14)
        learn.opt.zero_grad()


@examples(25)
@given(lr=st.floats(1e-6, 1.), wd=st.floats(1e-7, 0.1), mom=st.floats(0.01, 0.99),
       name=st.sampled_from(['sgd', 'sgd_l2', 'adamw', 'adam_l2']))
def test_update_for_any_value(lr, wd, mom, name):
    p = nn.Parameter(torch.tensor([1.3, -0.2, 0.], dtype=torch.float64))
    opt = OPTIMISERS[name]([p], lr=lr)
    opt.set_hypers(wd=wd, mom=mom)
    for g in ([1., -2., 0.], [0.5, 1e-9, 0.]):
        p.grad = torch.tensor(g, dtype=torch.float64)
        new = Update(opt)(p, p.grad.clone(), opt.hypers[0])
        opt.step()
        assert torch.allclose(p, new, rtol=1e-12, atol=1e-15) and new.isfinite().all()


# Must show 1

@pytest.mark.parametrize('name', WITH_MOMENTUM)
def test_one_term_is_the_exact_derivative_through_the_last_step(name):
    "lr, wd and mom of each of two groups, in the third step, so that there are moments"
    learn = double_learner(name, dls=with_valid(loaders()), splitter=two_groups)
    learn.create_opt()
    learn.lr = [0.02, 0.05]
    spy = spied(learn, n_terms=1, every=3)
    exact = [exact_slope(spy, learn, name, group) for name in ('lr', 'wd', 'mom') for group in (0, 1)]
    assert all(e != 0 for e in exact)
    assert torch.allclose(torch.stack(spy.slopes), torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize('name', ['sgd', 'sgd_l2', 'adamw', 'adam_l2'])
def test_per_parameter_rates_are_exact(name):
    "The derivative by each single weight's rate, against the whole group's: they add up to it"
    learn = double_learner(name, dls=with_valid(loaders()))
    spy = spied(learn, n_terms=1, every=3, tune='lr', per='parameter')
    assert [s.shape for s in spy.slopes] == [p.shape for p in learn.model.parameters()]
    assert sum(s.sum().item() for s in spy.slopes) == pytest.approx(exact_slope(spy, learn, 'lr', 0), rel=1e-6)


def flat(values): return torch.cat([v.reshape(-1) for v in values])


def brute_force(spy, learn, name, n_terms, factor=1., n_part=None):
    "The series with dense Jacobians of a step that is written down anew, by torch.func"
    model, opt = spy.before
    names, sizes = [n for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()]
    shapes, group_of = [p.shape for p in model.parameters()], [0, 0, 1, 1]
    (x, y), decoupled = (o[0] for o in spy.batch), name in ('sgd', 'adamw')
    state = [opt.state[p] for p in model.parameters()]
    def unflat(w): return {n: o.view(shape) for n, o, shape in zip(names, w.split(sizes), shapes)}
    def loss(w, x, y): return nn.functional.mse_loss(torch.func.functional_call(model, unflat(w), (x,)), y)
    def step(w, theta):
        lr, wd, mom = (torch.cat([o[g].expand(n) for n, g in zip(sizes, group_of)])
                       for o in (10**theta[0], 10**theta[1], torch.sigmoid(theta[2])))
        # fastai spares biases
        wd = wd*torch.cat([torch.full((n,), float(len(shape) > 1), dtype=w.dtype) for n, shape in zip(sizes, shapes)])
        g = factor*torch.func.grad(loss)(w, x[:n_part], y[:n_part])
        if n_part:
            g = torch.func.grad(loss)(w_before, x, y) + g - torch.func.grad(loss)(w_before, x[:n_part], y[:n_part])
        if not decoupled: g = g + wd*w
        old = flat([s['grad_avg'] for s in state])
        if 'sgd' in name: change = mom*old + g
        else:
            t, beta = state[0]['step'] + 1, opt.hypers[0]['sqr_mom']
            first = (mom*old + (1 - mom)*g)/(1 - mom**t)
            change = first/((((beta*flat([s['sqr_avg'] for s in state]) + (1 - beta)*g**2)/(1 - beta**t)).sqrt())
                            + opt.hypers[0]['eps'])
        return w - lr*change - (lr*wd*w if decoupled else 0.)
    w = w_before = flat([p.detach() for p in model.parameters()])
    theta = torch.tensor([[SCALES[o][0](hyper[o]) for hyper in opt.hypers] for o in ('lr', 'wd', 'mom')], dtype=w.dtype)
    by_w, by_theta = torch.func.jacrev(step, argnums=(0, 1))(w, theta)
    v = torch.func.grad(loss)(step(w, theta), learn.dls.valid_x, learn.dls.valid_y)
    p = sum(torch.linalg.matrix_power(by_w.T, i) @ v for i in range(n_terms))
    return (by_theta.flatten(1).T @ p)


@pytest.mark.parametrize('name', ['sgd', 'sgd_l2', 'adamw', 'adam_l2'])
@pytest.mark.parametrize('n_terms', [1, 2, 5])
def test_k_terms_are_the_frozen_linearisation(name, n_terms):
    learn = double_learner(name, dls=with_valid(loaders()), splitter=two_groups, lr=[0.1, 0.3])
    spy = spied(learn, n_terms=n_terms, every=3)
    assert torch.allclose(torch.stack(spy.slopes), brute_force(spy, learn, name, n_terms), rtol=1e-6, atol=1e-14)


def test_second_derivatives_of_a_part_of_the_batch():
    "The step and its value are the whole batch's; I - dw'/dw is that of the first quarter of it"
    learn = double_learner(dls=with_valid(loaders()), splitter=two_groups)
    spy = spied(learn, hessian_share=0.25, n_terms=4, every=3)
    assert torch.allclose(torch.stack(spy.slopes), brute_force(spy, learn, 'sgd', 4, n_part=5), rtol=1e-6, atol=1e-14)


class Quadratic(nn.Module):
    "Half w'Aw - b'w: one A and b to train, another to validate, as the input says"
    def __init__(self, seed=0, n=4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        def normal(*size): return torch.randn(*size, generator=generator, dtype=torch.float64)
        self.a, self.b = [o @ o.T/n + 0.2*torch.eye(n) for o in (normal(n, n), normal(n, n))], [normal(n), normal(n)]
        self.w, self.u = nn.Parameter(normal(n//2)), nn.Parameter(normal(n - n//2))
    def value(self, w, which): return 0.5*w @ self.a[which] @ w - self.b[which] @ w
    def forward(self, x): return self.value(torch.cat([self.w, self.u]), int(x[0].item())).expand(len(x))


def quadratic_learner(lr, wd, mom, decouple_wd):
    zeros = torch.zeros(4, dtype=torch.float64)
    dls = DataLoaders(loader(zeros, zeros, 1), loader(zeros + 1, zeros, 4))
    return Learner(dls, Quadratic(), loss_func=lambda pred, _: pred.mean(), splitter=lambda m: [[m.w], [m.u]],
                   wd_bn_bias=True,
                   opt_func=partial(SGD, mom=mom, wd=wd, decouple_wd=decouple_wd), lr=lr, cbs=FloatLoss())


@pytest.mark.parametrize('decouple_wd', [False, True])
@pytest.mark.parametrize('n_terms', [1, 3, 5])
def test_k_terms_at_a_fixed_point_are_exact(decouple_wd, n_terms):
    "K steps unrolled, each from the momentum of the first, from weights that these steps leave where they are"
    lr, wd, mom = torch.tensor([0.1, 0.2]), [0.03, 0.1], [0.5, 0.8]
    learn = quadratic_learner(lr.tolist(), wd, 0.5, decouple_wd)
    learn.wd, model = wd, learn.model
    learn.create_opt()
    learn.opt.set_hyper('mom', mom)
    a, b = model.a[0], model.b[0]
    def spread(o): return torch.stack([o[0], o[0], o[1], o[1]])
    momentum = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    decay = spread(torch.tensor(wd, dtype=torch.float64))
    w = torch.linalg.solve(a + torch.diag(decay), b - spread(torch.tensor(mom, dtype=torch.float64))*momentum)
    with torch.no_grad(): model.w.copy_(w[:2]); model.u.copy_(w[2:])
    for p, o in ((model.w, momentum[:2]), (model.u, momentum[2:])): learn.opt.state[p]['grad_avg'] = o.clone()
    spy = spied(learn, n_terms=n_terms, every=1, diverged=None)
    theta = [[SCALES[name][0](float(v)) for v in values] for name, values in dict(lr=lr, wd=wd, mom=mom).items()]
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    rate, decay, m = spread(10**theta[0]), spread(10**theta[1]), spread(torch.sigmoid(theta[2]))
    x = w
    for _ in range(n_terms): x = x - rate*(m*momentum + a @ x - b) - rate*decay*x
    assert torch.allclose(x, w, rtol=1e-9) # it is one
    exact, = torch.autograd.grad(model.value(x, 1), theta)
    assert torch.allclose(torch.stack(spy.slopes).view(3, 2), exact, rtol=1e-6, atol=1e-7*exact.abs().max())
    assert exact[1:].abs().min() > 1e-6


@pytest.mark.parametrize('name', ['sgd_plain', 'torch_sgd_plain'])
def test_k_terms_are_k_steps_of_plain_sgd(name):
    """Without momentum nothing is held: K steps of the optimiser itself at the fixed point, by differences, in weight
    decay"""
    model, h = Quadratic(), 1e-5
    opt_func = partial(SGD, wd=0.03, decouple_wd=False) if name == 'sgd_plain' else OPTIMISERS[name]
    def make():
        return Learner(quadratic_learner(0.1, 0.03, 0., False).dls, Quadratic(), loss_func=lambda pred, _: pred.mean(),
                       wd_bn_bias=True, lr=0.2,
                       cbs=FloatLoss(), opt_func=opt_func)
    w = torch.linalg.solve(model.a[0] + 0.03*torch.eye(4), model.b[0])
    def start():
        learn = make()
        learn.create_opt()
        with torch.no_grad(): learn.model.w.copy_(w[:2]); learn.model.u.copy_(w[2:])
        return learn
    def loss(wd):
        learn = start()
        learn.opt.set_hyper('wd', wd)
        for _ in range(5):
            learn.model(torch.zeros(1)).mean().backward()
            learn.opt.step()
            learn.opt.zero_grad()
        return learn.model(torch.ones(1)).mean().item()
    exact = (loss(0.03*10**h) - loss(0.03*10**-h))/(2*h)
    assert spied(start(), n_terms=5, every=1, tune='wd').slopes[0].item() == pytest.approx(exact, rel=1e-6)


def test_hypergradient_by_hand():
    "One weight: w' = w - lr*a*w, so the series is geometric"
    w, lr, a = (torch.tensor(o, dtype=torch.float64, requires_grad=True) for o in (2., 0.1, 3.))
    new = w - lr*a*w
    slope, = hypergradient([new], [w], [lr], [torch.tensor(1.5, dtype=torch.float64)], n_terms=4)
    assert slope.item() == pytest.approx(-3*2*1.5*sum(0.7**i for i in range(4)))


# What the step's gradient goes through on its way

@pytest.mark.parametrize('n_terms', [1, 3])
def test_clipped_gradients(n_terms):
    "The hypergradient is that of the clipped step; clipping counts as a constant factor"
    learn = double_learner('sgd', dls=with_valid(loaders()), cbs=GradientClip(0.05), splitter=two_groups)
    spy, name = spied(learn, n_terms=n_terms, every=3), 'sgd'
    assert sum((g**2).sum() for g in spy.grads).sqrt() == pytest.approx(0.05, rel=1e-3)
    if n_terms == 1: expected = [exact_slope(spy, learn, o, g) for o in ('lr', 'wd', 'mom') for g in (0, 1)]
    else:
        model = spy.before[0]
        own = torch.autograd.grad(nn.functional.mse_loss(model(spy.batch[0][0]), spy.batch[1][0]),
                                  list(model.parameters()))
        expected = brute_force(spy, learn, name, n_terms, spy.grads[0].norm()/own[0].norm()).tolist()
    assert torch.stack(spy.slopes).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('n_terms', [1, 5])
def test_gradient_accumulation(n_terms):
    """It tunes as a batch of the accumulated size does, where the batches that make a step are alike: second
    derivatives are those of the last"""
    (x, y), valid = data(n=15)[0], data()[1]
    rows = [(a, b) for o in range(0, 15, 5) for _ in range(4) for a, b in zip(x[o:o+5], y[o:o+5])]
    learners = [double_learner(dls=DataLoaders(DataLoader(rows, bs=bs), loader(*valid, 20)), cbs=cbs) for bs,
                cbs in ((20, None), (5, GradientAccumulation(20)))]
    for learn in learners:
        fit(learn.one_pass(n_terms=n_terms, every=2, valid_dl=loader(*valid, 20), hessian_share=1), 4)
    assert torch.allclose(*map(weights, learners)) and len(tuner(learners[0]).history) == 6
    assert tuner(learners[0]).history.lr.tolist() == pytest.approx(tuner(learners[1]).history.lr.tolist())


@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
def test_mixed_precision_on_a_cpu(precision):
    "fastai's is for CUDA alone: here it changes nothing"
    learners = [fit(double_learner(double=False, lr=1e-3), 0),
                fit(getattr(double_learner(double=False, lr=1e-3), precision)(), 0)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for learn in learners: fit(learn.one_pass(every=2), 4)
    assert tuner(learners[0]).history.lr.tolist() == pytest.approx(tuner(learners[1]).history.lr.tolist(), rel=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
def test_mixed_precision_on_cuda(precision):
    "Hypergradients are computed in full precision, so half precision changes what is learnt by its noise only"
    learners = [double_learner(double=False, lr=1e-3), getattr(double_learner(double=False, lr=1e-3), precision)()]
    for learn in learners:
        learn.dls.to(torch.device('cuda'))
        fit(learn.one_pass(every=2), 10)
    assert tuner(learners[0]).history.lr.iloc[-1] == pytest.approx(tuner(learners[1]).history.lr.iloc[-1], rel=0.2)


# No trace of validation

class Net(nn.Module):
    "Batch norm, dropout, and a buffer that it writes in eval mode too"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer('calls', torch.zeros(()))
        self.seen = 0
    def forward(self, x):
        self.calls += 1
        self.seen += len(x)
        return self.body(x)


def test_training_is_what_it_is_without():
    "With hyper-parameters that don't move, the same weights, buffers, batches and random numbers"
    runs = []
    for tune in (False, True):
        learn = double_learner(partial(SGD, mom=0.9, wd=0.01), Net, double=False, lr=0.1)
        if tune: learn.one_pass(every=2, hyper_lr=1e-12)
        fit(learn, 4, cbs=NoValidation())
        runs.append((weights(learn), learn.model.seen, torch.rand(3), learn.recorder.losses))
    (w0, seen0, random0, losses0), (w1, seen1, random1, losses1) = runs
    assert torch.allclose(w0, w1, atol=1e-6) and seen0 == seen1 == 4*60 and torch.equal(random0, random1)
    assert torch.allclose(torch.stack(losses0), torch.stack(losses1), atol=1e-6)


class NoValidation(Callback):
    def before_validate(self): raise CancelValidException


@pytest.mark.parametrize('valid_pct', [0., 0.2])
def test_transforms_of_training_stay_on(valid_pct):
    "A validation batch cut from the training set has no augmentation, and fetching it does not switch training's off"
    class Marks(Transform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + 100
    items = [(torch.randn(3), torch.randn(1)) for _ in range(40)]
    dsets = Datasets(list(range(40)), [[lambda i: items[i][0]], [lambda i: items[i][1]]],
                     splits=[range(30), range(30, 40)])
    dls, seen = dsets.dataloaders(bs=5, num_workers=0, after_batch=[Marks]), []
    class Net(nn.Sequential):
        def forward(self, x):
            seen.append((self.training, x.mean().item() > 50))
            return super().forward(x)
    fit(Learner(dls, Net(*mlp(3, 4, 1, double=False)), loss_func=nn.MSELoss(),
                lr=1e-6).one_pass(every=2, valid_pct=valid_pct, n_terms=1), 2)
    assert all(training == marked for training, marked in seen)
    assert sum(training for training, _ in seen) == 2*(4 if valid_pct else 6)


def test_validation_batches_are_shuffled_and_cover_the_set():
    learn = double_learner(dls=DataLoaders(loader(*data()[0], 6), loader(*data()[1], 10, False)), double=True)
    learn.one_pass(every=1)
    learn.create_opt()
    batches = [next(tuner_batches(learn))[0] for _ in range(8)]
    assert [len(b) for b in batches] == 2*[6, 6, 6, 2]
    seen = [torch.cat(passed) for passed in (batches[:4], batches[4:])]
    for o in seen: assert torch.equal(o.sort(0).values, data()[1][0].sort(0).values)
    assert not torch.equal(*seen)
    assert len(next(tuner_batches(learn.one_pass(valid_bs=9)))[0]) == 9
    assert len(next(tuner_batches(learn.one_pass(valid_bs=7, valid_pct=0.2)))[0]) == 7


@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_valid_pct(kind):
    "The rows that are validated on never train, in any fit"
    x, y = torch.arange(40.)[:, None].repeat(1, 3)/40, torch.zeros(40, 1)
    make = {'fastai': lambda: loader(x, y, 5),
            'torch': lambda: TorchDataLoader(TensorDataset(x, y), 5, shuffle=True)}[kind]
    trained, dls = [], DataLoaders(make(), make())
    class Look(Callback):
        def before_batch(self): trained.extend(self.xb[0][:, 0].tolist() if self.training else [])
    learn = Learner(dls, mlp(3, 4, 1, double=False), loss_func=nn.MSELoss(), cbs=Look(),
                    lr=1e-4).one_pass(valid_pct=0.25, every=1)
    for _ in range(2): fit(learn, 2)
    valid = {row for batch in (next(tuner_batches(learn)) for _ in range(4)) for row in batch[0][:, 0].tolist()}
    assert len(trained) == 4*30 and len(set(trained)) == 30 and len(valid) == 10 and not valid & set(trained)
    assert learn.dls.train is dls.train and len(learn.dls.train_ds) == 40
    assert kind == 'torch' or trained[:30] != trained[60:90] # each fit has an order of its own


def tuner_batches(learn):
    if tuner(learn)._fit is None: tuner(learn).before_fit()
    return tuner(learn)._fit.valid.batches


# Models whose kernels or states need care

class Recurrent(nn.Module):
    "A language model that remembers its state from batch to batch"
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.out, self.hidden = nn.Embedding(11, 6), nn.LSTM(6, 7, batch_first=True), nn.Linear(
            7, 11), None
    def reset(self): self.hidden = None
    def forward(self, x):
        out, hidden = self.lstm(self.embed(x), self.hidden)
        self.hidden = tuple(o.detach() for o in hidden)
        return self.out(out).flatten(0, 1)


def text_loaders(n=12):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 11, (n + 4, 6, 4), generator=generator) # batches of 4 sequences
    batches = [(t[:-1].T, t[1:].T.flatten()) for t in text]
    return DataLoaders(batches[:n], batches[n:])


def test_a_recurrent_models_state_stays():
    "Hidden states are training's own, and LSTM kernels are twice differentiable"
    runs = []
    for tune in (False, True):
        set_seed(0)
        states = []
        class Look(Callback):
            def after_batch(self): states.extend([self.model.hidden[0]] if self.training else [])
        learn = Learner(text_loaders(), Recurrent(), loss_func=nn.CrossEntropyLoss(),
                        opt_func=partial(SGD, mom=0.9, wd=1e-4), lr=0.5, cbs=Look())
        fit(learn.one_pass(every=2, hyper_lr=1e-12) if tune else learn)
        runs.append(torch.stack(states))
    assert torch.allclose(*runs, atol=1e-6)


def test_attention_is_twice_differentiable():
    set_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0., batch_first=True), nn.Flatten(),
                          nn.Linear(20, 1))
    x, y = torch.randn(40, 5, 4), torch.randn(40, 1)
    learn = Learner(DataLoaders(loader(x[:30], y[:30], 10), loader(x[30:], y[30:], 10)), model, loss_func=nn.MSELoss())
    assert tuner(fit(learn.one_pass(every=2), 2)).history.lr.nunique() == 3


class Flash(nn.Module):
    "Attention that insists on a kernel whose backward pass has no derivative"
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 1)
    def forward(self, x):
        x = self.out.weight*x[:, None, None, :].expand(-1, 1, 4, -1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION): x = nn.functional.scaled_dot_product_attention(x, x, x)
        return self.out(x.mean((1, 2)))


def test_what_is_differentiable_once_only():
    with pytest.raises(RuntimeError, match=r'one_pass\(n_terms=1\) needs no second derivative'):
        fit(double_learner(model=Flash, double=False).one_pass(every=1))
    assert len(tuner(fit(double_learner(model=Flash, double=False).one_pass(every=1, n_terms=1))).lines) == 3


# Fits

def test_columns_history_and_the_next_fit():
    learn = double_learner(double=False, lr=1e-3, metrics=lambda p, t: (p - t).abs().mean()).one_pass(every=2)
    fit(learn, 4)
    assert list(learn.recorder.metric_names[4:-1]) == ['lr', 'wd', 'mom'] and len(learn.metrics) == 1
    history = tuner(learn).history
    assert history.step.tolist() == [2, 4, 6, 8, 10, 12]
    assert list(history.columns) == ['step', 'valid_loss', 'lr', 'wd', 'mom', 'rolled_back']
    assert list(learn.recorder.values[-1][3:]) == pytest.approx(history[['lr', 'wd', 'mom']].iloc[-1].tolist())
    assert (learn.lr, learn.wd) == (history.lr.iloc[-1], history.wd.iloc[-1])
    assert learn.recorder.lrs[-1] == pytest.approx(learn.lr)
    learn.validate()
    fit(learn, 1)
    assert list(learn.recorder.metric_names).count('lr') == 1
    assert tuner(learn).history.lr[5:7].tolist()[0] == learn.recorder.lrs[0]
    learned = learn.lr
    fit(learn.no_one_pass(), 1)
    assert learn.recorder.lrs == [learned]*3 and not hasattr(learn, 'one_pass_tuner') and len(learn.metrics) == 1
    axs = tuner(fit(learn.one_pass(every=1), 2)).plot_hypers()
    assert [ax.get_title() for ax in axs] == ['lr', 'wd', 'mom', 'valid_loss'] and len(axs[0].lines[0].get_xdata()) == 6


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'torch_adamw'])
@pytest.mark.parametrize('per', ['group', 'parameter'])
@pytest.mark.many(3)
def test_two_fits_are_one(name, per, tmp_path):
    "Also where the second is another process's: weights and moments by learn.save, what was learnt by state_dict"
    lr = 1e-2 if 'torch' in name else [1e-2, 2e-2]
    make = lambda: double_learner(name, dls=loaders(bs=60, shuffle=False), splitter=two_groups, lr=lr,
                                  path=tmp_path).one_pass(every=2, per=per)
    whole, halves = fit(make(), 10), fit(make(), 5)
    halves.save('half')
    state, resumed = tuner(halves).state_dict(), make()
    fit(halves, 5)
    resumed.load('half')
    tuner(resumed).load_state_dict(state)
    fit(resumed, 5)
    for learn in (halves, resumed):
        assert torch.allclose(weights(whole), weights(learn), rtol=1e-9) and len(tuner(learn).history) == 5
        assert torch.allclose(flat(tuner(whole).hypers.leaves).detach(), flat(tuner(learn).hypers.leaves).detach(),
                              rtol=1e-6)
    with pytest.raises(ValueError, match='make Learner and tuner as they were'):
        tuner(double_learner(name).one_pass()).load_state_dict(state)


def test_an_explicit_rate_begins_anew():
    learn = fit(double_learner(lr=1e-3).one_pass(every=2), 4)
    fit(learn, 1, lr=0.02)
    assert learn.recorder.lrs[0] == pytest.approx(0.02)
    assert tuner(learn).history.lr.iloc[6] == pytest.approx(0.02, rel=0.15)
    assert next(iter(tuner(learn).hypers.adam.state.values()))['step'] == 1


def test_export(tmp_path):
    dsets = Datasets(list(range(40)), [[math.sin], [math.cos]], splits=[range(30), range(30, 40)])
    model = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1)).double()
    learn = Learner(dsets.dataloaders(bs=5, num_workers=0), model, loss_func=nn.L1Loss(), path=tmp_path,
                    cbs=FloatLoss())
    fit(learn.one_pass(every=2))
    learn.export('learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.equal(weights(load_learner(tmp_path/'learner.pkl')), weights(learn))


def test_interrupted_fit():
    class Stop(Callback):
        def after_step(self):
            if self.iter == 1: raise KeyError('power cut')
    learn = double_learner().one_pass(every=1)
    with pytest.raises(KeyError): fit(learn, 1, cbs=Stop())
    learned = learn.lr
    fit(learn, 0)
    assert list(learn.recorder.metric_names).count('lr') == 1 and learn.opt.hypers[-1]['lr'] == learned != 0.05
    fit(learn, 1) # the gradient that the cut left behind counts in the first step, as it does in fastai
    assert tuner(learn).history.step.tolist() == [1, 2, 3, 4]


def test_frozen_groups():
    "A frozen group's values stay; once it trains they move"
    learn = double_learner(splitter=two_groups)
    learn.freeze()
    first = learn.model[0].weight.detach().clone()
    fit(learn.one_pass(every=1))
    history = tuner(learn).history
    assert torch.equal(first, learn.model[0].weight) and history.lr_0.tolist() == pytest.approx([0.05]*3)
    assert history.lr_1.iloc[-1] != pytest.approx(0.05)
    learn.unfreeze()
    fit(learn, 2)
    last = tuner(learn).history.iloc[-1]
    assert last.lr_0 != pytest.approx(0.05) and last.mom_0 != pytest.approx(0.8)
    learn.freeze() # Adam's own momentum must not carry them on
    fit(learn)
    again = tuner(learn).history.iloc[-1]
    assert all(again[f'{name}_0'] == last[f'{name}_0'] and again[f'{name}_1'] != last[f'{name}_1']
               for name in ('lr', 'wd', 'mom'))


@pytest.mark.parametrize('name', ['sgd', 'sgd_l2', 'adamw', 'torch_sgd'])
def test_rates_of_single_weights_in_force(name):
    "The step that is taken is the update with each weight's own rate"
    learn = double_learner(name).one_pass(every=2, per='parameter', tune='lr', hyper_lr=0.5)
    class Look(Callback):
        order = OnePassTuner.order - 1
        steps = 0
        def before_step(self):
            rates = [10**t.detach() for t in tuner(self.learn).hypers.leaves]
            update = Update(self.opt)
            self.expected = [update(p, p.grad.clone(), {**self.opt.hypers[0], 'lr': rate}).detach() for p,
                             rate in zip(self.model.parameters(), rates)]
            self.spread = max((rate.max() - rate.min()).item() for rate in rates)
        def before_backward(self):
            if self.steps: # checked before the next batch's backward, when the step is over
                for p, new in zip(self.model.parameters(), self.expected): assert torch.allclose(p, new, rtol=1e-9)
            self.steps += 1
    look = Look()
    fit(learn, 5, cbs=look)
    assert look.steps == 15 and look.spread > 1e-3


def test_schedules():
    with pytest.raises(ValueError, match='A schedule sets lr, mom'):
        with double_learner().one_pass().no_bar() as learn: learn.fit_one_cycle(1)
    learn = double_learner().one_pass(tune='wd', every=1)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2)
        assert len(set(learn.recorder.lrs)) == 6 and tuner(learn).history.wd.nunique() == 6
        with pytest.raises(ValueError, match='A schedule sets lr'):
            double_learner().one_pass(tune='lr').fit(1, cbs=ReduceLROnPlateau())
        learn = double_learner().one_pass(every=1)
        learn.lr_find(num_it=5, show_plot=False)
    assert not tuner(learn).lines
    fit(learn)
    assert len(tuner(learn).lines) == 3


# Must show 5

def finite(learn): return weights(learn).isfinite().all()


@pytest.mark.parametrize('name', ['sgd', 'sgd_l2'])
@pytest.mark.many(2)
def test_a_rate_that_blows_up_recovers(name):
    learn = double_learner(name, dls=loaders(n=300, n_valid=100), lr=10.).one_pass()
    with pytest.warns(UserWarning) as caught: fit(learn, 20)
    assert any('lr 10 to 1' in str(o.message) for o in caught)
    assert any('Training diverged by step 10' in str(o.message) for o in caught)
    history = tuner(learn).history
    assert finite(learn) and history.rolled_back.iloc[0]
    assert learn.recorder.values[-1][1] < 0.5*tuner(learn).reference[0]


@pytest.mark.parametrize('n_epoch', [1, 3])
def test_nan_between_two_steps_of_the_hyper_parameters(n_epoch):
    "`every` beyond the end of the fit: the check at the end of an epoch is all there is"
    learn = double_learner(dls=loaders(n=600), lr=10.).one_pass(every=10**6)
    with pytest.warns(UserWarning, match='back to the weights of step 0'): fit(learn, n_epoch)
    assert finite(learn) and learn.lr == pytest.approx(0.1)


def test_training_losses_count_too():
    """A loss that shot up between two looks, though validation looks well again: networks that die of it come back to
    the first loss"""
    class Loud(Callback):
        order = OnePassTuner.order - 1
        def before_step(self): self.learn.loss = self.loss + (100. if self.iter == 2 else 0.)
    with pytest.warns(UserWarning, match='diverged by step 10 .training loss'):
        learn = fit(double_learner(dls=loaders(100, n=1000), cbs=Loud()).one_pass(every=5))
    assert tuner(learn).history.rolled_back.tolist() == [False, True]
    assert tuner(learn).history.valid_loss.iloc[1] < 2*tuner(learn).reference[0]


def test_a_fit_that_another_callback_stops():
    learn = double_learner(dls=loaders(n=2000), lr=10., cbs=TerminateOnNaNCallback()).one_pass(every=10**6)
    with pytest.warns(UserWarning, match='diverged'): fit(learn, 1)
    assert finite(learn)


def test_divergence_with_a_rate_that_is_not_learnt():
    learn = double_learner(dls=loaders(n=600), lr=10.).one_pass(tune=('wd', 'mom'))
    with pytest.warns(UserWarning, match='and stopped: the learning rate is not learnt'): fit(learn, 10)
    assert finite(learn) and len(learn.recorder.losses) < 300


def test_what_no_rate_helps():
    class Break(Callback):
        order = OnePassTuner.order + 1
        def after_step(self):
            with torch.no_grad(): self.model[0].weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match='ten times in a row'):
        learn = fit(double_learner(dls=loaders(n=600), cbs=Break()).one_pass(every=1))
    broken = learn.model[0].weight.isnan().sum()
    assert broken <= 1 and len(tuner(learn).lines) <= 12 # the callback acts after the roll-back


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_a_lucky_validation_batch_is_no_measure(seed):
    "Losses of single items differ a hundredfold; nothing moves, so nothing diverges"
    train, valid = data(n_valid=60)
    learn = double_learner(dls=DataLoaders(loader(*train, 20), loader(*valid, 1, False)), lr=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn.one_pass(every=1, hyper_lr=1e-6, valid_bs=1, seed=seed), 10)
    history = tuner(learn).history
    assert not history.rolled_back.any() and history.valid_loss.min() < 0.1*tuner(learn).reference[0]


def test_losses_of_selected_items_are_no_divergence():
    class Loud(Callback):
        order = OnePassTuner.order - 1
        def before_step(self): self.learn.loss = self.loss + (100. if self.iter == 2 else 0.)
    learn = fit(double_learner(dls=loaders(100, n=1000),
                               cbs=Loud()).batch_loss_filter(0.9, warmup_epochs=0).one_pass(every=5))
    assert not tuner(learn).history.rolled_back.any()


def test_another_loss_is_no_divergence():
    learn = fit(double_learner().one_pass(every=1), 1)
    learn.loss_func = lambda pred, y: 10*nn.functional.mse_loss(pred, y)
    fit(learn, 20, lr=1e-4)
    assert not tuner(learn).history.rolled_back.any()


def test_a_stopped_fit_leaves_no_gradients():
    "The next fit would begin with those that blew up"
    learn = double_learner(dls=loaders(n=600), lr=1e4).one_pass(('wd', 'mom'), every=2)
    with pytest.warns(UserWarning, match='loss .*: back to the weights of step .*and stopped'): fit(learn, 5)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    fit(learn, 2, lr=0.01)
    assert len(learn.recorder.values) == 2 and not tuner(learn).history.rolled_back.iloc[-1]


def test_nan_and_an_interruption():
    class Stop(Callback):
        def after_step(self):
            if self.iter == 25: raise KeyError('power cut')
    learn = double_learner(dls=loaders(n=600), lr=1e12).one_pass(('wd', 'mom'), every=1000)
    with pytest.raises(KeyError): fit(learn, cbs=Stop())
    assert not finite(learn)
    with pytest.warns(UserWarning, match='weights not finite'): fit(learn, 1, lr=0.01)
    assert finite(learn) and learn.recorder.values[-1][1] < 2*tuner(learn).reference[0]


def test_each_roll_back_is_a_tenth_again():
    "Adam begins anew, from the good values and no others"
    set_seed(0) # of the loader's order, too: the last good state must be that of the step before
    learn = double_learner(dls=loaders(600, n=6000)).one_pass('lr', every=1)
    class Break(Callback):
        order = OnePassTuner.order - 1
        def before_step(self):
            if self.iter in (4, 5, 6): self.learn.loss = self.loss*math.nan
    with pytest.warns(UserWarning, match='training loss not finite'): fit(learn, cbs=Break())
    history = tuner(learn).history
    back = history[history.rolled_back]
    assert back.step.tolist() == [5, 6, 7]
    assert (back.lr/history.lr.iloc[back.index[0] - 1]).tolist() == pytest.approx([0.1, 0.01, 0.001])
    assert next(iter(tuner(learn).hypers.adam.state.values()))['step'] == len(history) - back.index[-1] - 1


def test_hypergradients_that_are_not_finite():
    "The second derivative of a norm at 0 is NaN"
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 1, dtype=torch.float64))
        def forward(self, x): return nn.functional.normalize((x*(x[:, :1] > 0))@self.weight, dim=1)
    learn = double_learner(model=Norms, lr=1e-3)
    with pytest.warns(UserWarning, match=r'not finite.*one_pass\(n_terms=1\) does without'):
        fit(learn.one_pass(every=1))
    assert finite(learn) and learn.lr == pytest.approx(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn.one_pass(every=1, n_terms=1))
    assert len(tuner(learn).lines) == 3


def test_the_guard_can_be_left_out():
    learn = double_learner(dls=loaders(n=600), lr=10.)
    with pytest.warns(UserWarning, match='lr 10 to 1'): fit(learn.one_pass(diverged=None, every=10**6), 3)
    assert not learn.recorder.values[-1][1] < 5*1.99 and not tuner(learn).lines


def test_bad_weights_to_begin_with():
    learn = double_learner()
    with torch.no_grad(): learn.model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match='validation loss before training is nan'): fit(learn.one_pass())


def test_a_large_hypergradient_is_clipped():
    "One outlier among a hundred: unclipped it would rule Adam's step size for long"
    learn = fit(double_learner().one_pass(every=1))
    own = tuner(learn)
    leaf = own.hypers.leaves[0]
    rms = (own.hypers.adam.state[leaf]['exp_avg_sq']/(1 - 0.999**own.hypers.adam.state[leaf]['step'])).sqrt()
    assert own.hypers.clipped(leaf, torch.tensor(1e9, dtype=torch.float64)) == pytest.approx(10*rms.item())
    assert own.hypers.clipped(leaf, -rms) == -rms
    own.hypers.clip = None
    assert own.hypers.clipped(leaf, torch.tensor(1e9)) == 1e9


# Must show 6

def test_validation_batches_that_come_to_an_end():
    learn = double_learner()
    batches = list(learn.dls.valid)
    with pytest.raises(ValueError, match='give a DataLoader, not a generator'):
        fit(learn.one_pass(every=1, valid_dl=(b for b in batches)), 5)

def test_a_first_loss_that_is_not_above_0():
    "Two times -1 is no divergence"
    def below(pred, y): return nn.functional.mse_loss(pred, y) - 100
    learn = double_learner()
    learn.loss_func = below
    with pytest.raises(ValueError, match='must be above 0: add a constant to the loss, or pass diverged=None'):
        fit(learn.one_pass(every=2), 1)
    fit(learn.one_pass(every=2, diverged=None), 1)

def test_an_epoch_without_a_step():
    "More batches are accumulated than the epoch has: the first step is in the second epoch"
    learn = double_learner()
    fit(learn.one_pass(every=1), 3, cbs=GradientAccumulation(100))
    assert weights(learn).isfinite().all()

@pytest.mark.parametrize('kwargs,message', [
    (dict(tune=('lr', 'beta')), 'expected one or several of'), (dict(tune=()), 'expected one or several of'),
    (dict(tune=('lr', 'lr')), 'each once'),
    (dict(every=0), 'every must be a whole number of at least 1'),
    (dict(n_terms=0), 'n_terms must be a whole number of at least 1'),
    (dict(hyper_lr=0.), 'hyper_lr must lie in'), (dict(hessian_share=0.), 'hessian_share must lie in'),
    (dict(hyper_clip=-1.), 'hyper_clip must lie in'),
    (dict(diverged=1.), 'diverged must lie in'), (dict(per='layer'), "per must be 'group' or"),
    (dict(per='parameter', tune='wd'), "leaves out 'lr'"),
    (dict(valid_pct=1.), 'valid_pct must lie in'), (dict(valid_pct=0.001), 'leaves nothing to validate on'),
    (dict(valid_bs=0), 'valid_bs must be'),
    (dict(valid_pct=0.1, valid_dl=[1]), 'it brings its own rows'), (dict(valid_bs=5, valid_dl=[1]), 'and batches'),
    (dict(valid_dl=[]), 'The validation set is empty'), (dict(valid_dl=3), 'needs validation batches')])
def test_bad_values(kwargs, message):
    learn = double_learner()
    with pytest.raises(ValueError, match=message): learn.one_pass(**kwargs)
    assert not hasattr(learn, 'one_pass_tuner')


@pytest.mark.parametrize('kwargs', [dict(every=1.5), dict(n_terms='5'), dict(hyper_lr='fast'), dict(seed=None)])
def test_bad_kinds(kwargs):
    with pytest.raises(TypeError): double_learner().one_pass(**kwargs)


@pytest.mark.parametrize('opt,kwargs,message', [
    ('sgd_plain', {}, 'the optimiser has no momentum'), ('torch_sgd_plain', {}, 'the optimiser has no momentum'),
    ('rmsprop', {}, 'has no momentum'),
    (partial(SGD, mom=0.9), {}, 'wd begins at 0'), (partial(SGD, mom=0.9, wd=0.1), dict(wd=0.), 'wd begins at 0'),
    (partial(SGD, mom=1., wd=0.1), {}, 'mom begins at 1'), ('sgd', dict(lr=0.), 'lr begins at 0'),
    (Lamb, {}, "the optimiser's step lamb_step"), (lambda p, lr: Lookahead(SGD(p, lr)), {}, 'a step of Lookahead'),
    (partial(torch_sgd, momentum=0.9, nesterov=True), {}, 'without nesterov'),
    (partial(OptimWrapper, opt=torch.optim.Adagrad), {}, 'SGD, Adam and AdamW'),
    (partial(torch_adam, amsgrad=True), {}, 'amsgrad')])
def test_bad_optimisers(opt, kwargs, message):
    with pytest.raises(ValueError, match=message): double_learner(opt, **kwargs).one_pass()


def test_what_the_fit_finds_out():
    learn = double_learner().one_pass(every=1)
    with pytest.raises(ValueError, match='wd begins at 0'): fit(learn, wd=0.)
    learn = double_learner(dls=DataLoaders(loader(*data()[0], 20)))
    with pytest.raises(ValueError, match='needs validation batches'): learn.one_pass()
    assert tuner(fit(learn.one_pass(valid_dl=loader(*data()[1], 7)).remove_cb(learn.recorder), 0)) is not None
    learn = double_learner(dls=DataLoaders(loaders().train, loader(*(o[:0] for o in data()[1]), 20)))
    with pytest.raises(ValueError, match='The validation set is empty'): learn.one_pass()
    fit(learn.one_pass(valid_pct=0.2, every=1), 1, cbs=NoValidation())
    learn = double_learner(dls=loaders(40)).rho_loss(torch.zeros(60), frac=0.5,
                                                     epoch='candidates').one_pass(valid_pct=0.2)
    with pytest.raises(ValueError, match='a selector'): fit(learn)


def test_steps_that_another_callback_cancels():
    "The hyper-parameters stay, too"
    class Skip(Callback):
        order = OnePassTuner.order + 1
        def before_step(self): raise CancelStepException
    class NoTraining(Callback):
        order = OnePassTuner.order - 1
        def before_train(self): raise CancelTrainException
    learn = fit(double_learner().one_pass(every=1), cbs=Skip())
    assert learn.lr == pytest.approx(0.05) and tuner(learn).hypers.values()['lr'] == pytest.approx([0.05])
    assert not tuner(learn).lines
    fit(double_learner().one_pass(every=1), cbs=NoTraining())


def test_what_other_callbacks_do_to_a_batch():
    class Flat(Callback):
        def before_batch(self): self.learn.xb = (self.x.flatten(1),)
    (x, y), _ = data()
    dls = DataLoaders(loader(x[:, :, None], y, 20), loader(x[:, :, None], y, 20))
    with pytest.raises(RuntimeError, match='what other callbacks do in before_batch'):
        fit(double_learner(dls=dls, cbs=Flat()).one_pass())


def test_single_rates_become_one():
    learn = fit(double_learner().one_pass('lr', per='parameter', every=1, hyper_lr=0.2), 3)
    rates = torch.cat([10**t.detach().flatten() for t in tuner(learn).hypers.leaves])
    assert learn.no_one_pass().lr == pytest.approx(rates.median().item()) == learn.opt.hypers[0]['lr']
    assert rates.max() > 1.5*learn.lr


def test_state_of_another_kind():
    single, group = (fit(double_learner().one_pass('lr', per=per, every=1)) for per in ('parameter', 'group'))
    for a, b in ((single, group), (group, single)):
        with pytest.raises(ValueError, match='make Learner and tuner as they were'):
            tuner(a).load_state_dict(tuner(b).state_dict())


def test_a_tensor_that_is_not_of_items():
    "Then second derivatives are of the whole batch"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(3, 4, 1)
        def forward(self, x, edges): return self.net(x)*edges.mean()
    (x, y), _ = data()
    batches = [(x[i:i+20], torch.ones(2, 11).double(), y[i:i+20]) for i in (0, 20, 40)]
    dls = DataLoaders(batches, batches)
    dls.n_inp = 2
    whole, part = (fit(double_learner(model=Net, dls=dls).one_pass(every=1, hessian_share=o)) for o in (1., 0.5))
    assert len(tuner(part).lines) == 3 and torch.equal(weights(whole), weights(part))


def test_a_loss_without_item_losses():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 5)
        def forward(self, x): return self.net(x).log_softmax(-1).transpose(0, 1)
    items = [(torch.randn(6, 3), torch.randint(1, 5, (2,))) for _ in range(20)]
    dls = DataLoaders(*(DataLoader(items, bs=5) for _ in range(2)))
    def ctc(pred, y): return nn.CTCLoss()(pred, y, torch.full((len(y),), 6), torch.full((len(y),), 2))
    for loss_func in (ctc, partial(nn.functional.ctc_loss, input_lengths=torch.full((5,), 6),
                                   target_lengths=torch.full((5,), 2))):
        assert len(tuner(fit(Learner(dls, Net(), loss_func=loss_func, opt_func=partial(SGD, mom=0.9),
                                     wd=1e-4).one_pass(every=1, n_terms=1))).lines) == 4


def test_half_precision_weights():
    (x, y), (vx, vy) = data(double=False)
    dls = DataLoaders(loader(x.bfloat16(), y.bfloat16(), 20), loader(vx.bfloat16(), vy.bfloat16(), 20))
    learn = double_learner(model=lambda: mlp(3, 4, 1, double=False).bfloat16(), dls=dls)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn.one_pass(every=1))
    assert len(tuner(learn).lines) == 3 and learn.lr != pytest.approx(0.05, rel=1e-3)


def test_validation_batches_do_not_travel():
    learn = deepcopy(double_learner().one_pass(valid_dl=loader(*data()[1], 7)))
    with pytest.raises(ValueError, match='not copied or exported with the Learner.*pass valid_dl='): fit(learn)
    assert len(tuner(fit(deepcopy(double_learner().one_pass(every=1)))).lines) == 3


def test_weight_decay_of_the_next_fit():
    learn = fit(double_learner(), 1)
    learn.opt.set_hyper('wd', 0.)
    with pytest.raises(ValueError, match='wd begins at 0'): learn.one_pass()
    learn.wd = slice(1e-4, 1e-2)
    fit(learn.one_pass(every=1))
    learn.wd = 1e-3
    assert fit(learn.one_pass(every=1)).wd == pytest.approx(1e-3, rel=0.5)


def test_loaders_that_cannot_be_cut():
    batches = [tuple(data()[0])]
    with pytest.raises(ValueError, match='valid_bs=2, but list'):
        fit(double_learner(dls=DataLoaders(batches, batches)).one_pass(valid_bs=2))
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(zip(*data()[0]))
        def __len__(self): return 60
    dls = DataLoaders(TorchDataLoader(Stream(), 20), batches)
    with pytest.raises(ValueError, match="valid_pct can't split.*pass valid_dl="):
        fit(double_learner(dls=dls).one_pass(valid_pct=0.1))


def test_scripted_models():
    with pytest.raises(ValueError, match='TorchScript'):
        double_learner(model=lambda: torch.jit.script(mlp(3, 4, 1))).one_pass()


def test_with_a_selector():
    "Selected batches are what trains, and what is differentiated"
    learn = fit(double_learner(dls=loaders(40)).batch_loss_filter(0.5, warmup_epochs=0).one_pass(every=1), 2)
    assert learn.selection.kept < 1 and len(tuner(learn).history) == 4


def test_with_mixup():
    "Second derivatives are those of the mixed inputs and their first targets"
    x, y = data(double=False)[0]
    dls = DataLoaders(loader(x, (y[:, 0] > 0).long(), 10), loader(x, (y[:, 0] > 0).long(), 10))
    learn = Learner(dls, mlp(3, 4, 2, double=False), loss_func=CrossEntropyLossFlat(), cbs=MixUp(0.4))
    assert len(tuner(fit(learn.one_pass(every=2), 2)).lines) == 6


def test_cancelled_fit_leaves_no_columns():
    class Stop(Callback):
        def after_batch(self): raise CancelFitException
    learn = fit(double_learner(cbs=Stop()).one_pass(every=1))
    assert len(learn.metrics) == 0 and tuner(learn)._fit is None and len(tuner(learn).lines) == 1


def test_fastais_own_losses_and_tensors():
    "They hand on tensors of classes of their own, gradients included"
    x, y = data(double=False)[0]
    dls = DataLoaders(loader(TensorImage(x), (y[:, 0] > 0).long(), 10), loader(x, (y[:, 0] > 0).long(), 10))
    learn = fit(Learner(dls, mlp(3, 4, 2, double=False), loss_func=CrossEntropyLossFlat()).one_pass(every=2), 2)
    assert len(tuner(learn).lines) == 6 and all(type(p.grad) is torch.Tensor for p in learn.model.parameters())


def test_one_tuner_only():
    learn = double_learner().one_pass(every=3).one_pass('lr', every=7)
    assert sum(isinstance(cb, OnePassTuner) for cb in learn.cbs) == 1 and learn.one_pass_tuner.every == 7
    assert callable(learn.one_pass)
