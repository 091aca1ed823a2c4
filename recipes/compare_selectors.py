"""Every selector that the RHO-LOSS paper compares, on CIFAR-10: one command, one table, one figure. It can be stopped
and goes on where it was.

python recipes/compare_selectors.py --path <folder> --noise 0.2 --folder runs/selectors-noisy
python recipes/compare_selectors.py --path <folder> --noise 0 --folder runs/selectors-clean
python recipes/compare_selectors.py --path <folder> --noise 0.2 --folder runs/paper --arch resnet18 --frac 0.1 \
    --epochs 20 --seeds 0,1,2

Even rows train, odd rows are the holdout that the irreducible losses come from. The last line is the paper's setting,
for a GPU. All take as many steps, at a constant rate, as the paper compares them; the seconds say what that leaves out.
Scores that need MC dropout cost ten forward passes more. All models have dropout, so that all have one plain run to be
compared with.
"""
from functools import partial

import torch
from cifar10_data import even_rows_and_holdout, image_loader, image_loaders
from cifar10_rho_loss import ARCHITECTURES, make_learner
from common import accept_underscores, compared
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device
from fastcore.script import call_parse
from torch import nn

from rholoss_fastai.all import Boltzmann, ImportanceSample, ThenUniform, TopFraction, Uniform, fit_irreducible

# name -> score, pick; the paper's own names for the first
SELECTORS = dict(
    random=('loss', Uniform),
    rho_loss=('reducible', TopFraction),
    loss=('loss', TopFraction),
    negative_il=('negative_il', TopFraction),
    gradient_norm=('gradient_norm', TopFraction),
    boltzmann=('reducible', partial(Boltzmann, T=0.25)),
    gradient_norm_is=('gradient_norm', ImportanceSample),
    then_uniform=('reducible', partial(ThenUniform, at=0.25)),
    proxy=('reducible', TopFraction),
    mc_entropy=('mc_entropy', TopFraction),
    conditional_entropy=('conditional_entropy', TopFraction),
    bald=('bald', TopFraction),
    loss_minus_conditional_entropy=('loss_minus_conditional_entropy', TopFraction),
    loss_plus_conditional_entropy=('loss_plus_conditional_entropy', TopFraction),
)
MAIN = ('random', 'rho_loss', 'loss', 'negative_il', 'gradient_norm')


def narrow_cnn():
    "A fifth of the small CNN's work"
    def block(n_in, n_out):
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 32), nn.Flatten(), nn.Linear(32*4*4, 10))


def learner_with_dropout(dls, arch, lr):
    learn = make_learner(dls, arch, lr)
    learn.metrics = [accuracy]
    if arch == 'small_cnn': learn.model.insert(len(learn.model) - 1, nn.Dropout(0.1))
    else: learn.model.fc = nn.Sequential(nn.Dropout(0.1), learn.model.fc)
    return learn


def selector(name, frac):
    "A method of `compare`"
    score,pick = SELECTORS[name]
    def select(learn, il):
        proxy = Learner(learn.dls, narrow_cnn(), loss_func=CrossEntropyLossFlat(),
                        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), lr=learn.lr)
        learn.rho_loss(il, score=score, pick=pick(frac), epoch='candidates', proxy=proxy if name == 'proxy' else None)
    return name,select


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; default: fastai's URLs.CIFAR
    folder:str='runs/selectors', # Folder of the runs; those that are there are not run again
    selectors:str='all', # all, main, or names separated by commas
    noise:float=0.2, # Share of the training and holdout labels redrawn uniformly; the test set stays clean
    frac:float=0.25, # Selected share of each candidate batch
    bs:int=32, # Items trained on in each step, n_b
    epochs:int=2, # Training steps, in epochs of plain training
    evaluations:int=20, # Of each run
    test_rows:int=2000, # Test images, evenly spaced; 0: all
    arch:str='small_cnn', # small_cnn or resnet18
    lr:float=1e-3, # Learning rate, constant
    il_epochs:int=10, # Epochs of the irreducible-loss model, a small CNN
    seeds:str='0', # Seeds, separated by commas
):
    "Compare the selectors at equal steps"
    names = dict(all=SELECTORS, main=MAIN).get(selectors) or selectors.split(',')
    unknown = set(names) - {*SELECTORS}
    if unknown:
        raise SystemExit(f"--selectors must be all, main, or among {', '.join(SELECTORS)}; got "
                         f"{', '.join(sorted(unknown))}.")
    if arch not in ARCHITECTURES: raise SystemExit(f"--arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}.")
    device = default_device()
    train,holdout,test,noisy = even_rows_and_holdout(path, noise, test_rows)
    def il(make_learner_, dls):
        learn_il = make_learner(image_loaders(holdout, test, min(320, len(holdout)), augment=True, device=device),
                                'small_cnn', 1e-3)
        return fit_irreducible(learn_il, image_loader(train, 500, shuffle=False, device=device), il_epochs)
    compared(folder, partial(learner_with_dropout, arch=arch, lr=lr), image_loaders(train, test, bs, device=device),
             [selector(o, frac) for o in names], n_epoch=epochs, budget='steps', fit='fit',
             seeds=[int(o) for o in seeds.split(',')], noisy=noisy, il=il, bill='none', evaluations=evaluations)
