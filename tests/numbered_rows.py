"""A small data set whose items tell their row, for tests of what is selected and weighed, and Learners on it."""
from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from helpers import learner, quiet
from torch import nn
from torch.nn import functional as F

N = 240


class Rows:
    "Images and targets made from the row's number, so that every batch tells which rows it holds"
    def __init__(self, n=N):
        generator = torch.Generator().manual_seed(3)
        self.targets = torch.randint(0, 3, (n,), generator=generator)
        self.images = torch.randn(n, 1, 6, 6, generator=generator) + self.targets[:, None, None, None]
        self.images[:, 0, 0, 0] = torch.arange(n)/1024
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return self.images[i], self.targets[i]
    def new_empty(self): return Rows(0) # for `export`


def rows_of(xb): return (xb[:, 0, 0, 0]*1024).round().long()


VALID, BS = Rows(60), 32


def loaders(bs=BS, train=None, valid=VALID, valid_bs=25, **kwargs):
    return DataLoaders(DataLoader(Rows() if train is None else train, bs=bs, shuffle=True, **kwargs),
                       DataLoader(valid, bs=valid_bs))

def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

def row_learner(dls, lr=0.02, **kwargs):
    "A linear one, from where the random numbers stand"
    return learner(dls, linear, seed=None, lr=lr, **kwargs)

def image_learner(path=None, *, model, n, bs, data=Rows, num_workers=0, drop_last=True, **kwargs):
    "One with a metric and Adam that says nothing, whatever is called"
    dls = partial(loaders, bs, data(n), data(48), 48, drop_last=drop_last, num_workers=num_workers)
    return quiet(learner(dls, model, **{**dict(opt_func=Adam, lr=1e-3, metrics=accuracy, path=path), **kwargs}))

def item_losses(model, rows=slice(None)):
    data = Rows()
    return F.cross_entropy(model(data.images[rows]), data.targets[rows], reduction='none')


class Noted(Callback):
    "The rows, told by the items themselves, and the loss of each batch"
    run_valid = False
    def before_fit(self): self.batches, self.gradients = [], []
    def after_loss(self): self.batches.append((rows_of(self.xb[0]), self.learn.loss_grad.item()))
    def after_backward(self): self.gradients.append(self.model[1].weight.grad.clone())


class Interrupt(Callback):
    "The user's ctrl-C in the third batch"
    def after_loss(self):
        if self.iter == 2: raise KeyboardInterrupt
