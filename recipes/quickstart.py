"""RHO-LOSS against plain training on scikit-learn's embedded digits, part of whose labels are flipped, in equal
seconds: a minute on two cores.

python recipes/quickstart.py
"""
from pathlib import Path

import torch
from common import accept_underscores, compared
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def flipped_digits(noise, seed=0):
    "Images `(n,1,8,8)` in a random order, labels of which a share `noise` is wrong, true labels, and which are wrong"
    digits,generator = load_digits(),torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images,true = torch.tensor(digits.images, dtype=torch.float)[order,None]/16,torch.tensor(digits.target)[order]
    wrong = torch.rand(len(true), generator=generator) < noise
    return (images,torch.where(wrong, (true + torch.randint(1, 10, true.shape, generator=generator)) % 10, true),
            true,wrong)


def small_cnn():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
                         nn.Linear(32*16, 10))


def make_learner(dls): return Learner(dls, small_cnn(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=4e-3)


accept_underscores()


@call_parse
def main(
    noise:float=0.4, # Share of the training labels that are flipped
    bs:int=16, # Items trained on in each step
    epochs:float=8., # Budget, in epochs of plain training
    seeds:int=4, # Runs of each method
    processes:int=2, # Runs at a time
    out:str='runs/quickstart' # Folder for runs, table and plot
):
    "Plain training, RHO-LOSS, and RHO-LOSS by epochs in equal processor seconds, everything billed"
    torch.set_num_threads(1) # too little work in a step to share it out
    images,labels,true,wrong = flipped_digits(noise)
    train,test = slice(400, None),slice(0, 400)
    dls = DataLoaders(DataLoader(TensorDataset(images[train], labels[train]), bs=bs, shuffle=True, drop_last=True),
                      DataLoader(TensorDataset(images[test], true[test]), bs=400))
    print(f"Digits, {wrong[train].float().mean():.0%} of {len(labels[train])} training labels flipped; {epochs:g} "
          f"epochs, {seeds} seeds.\n")
    compared(out, make_learner, dls, ['rho_epochs', 'rho_loss'], n_epoch=epochs, budget='seconds', seeds=seeds,
             noisy=wrong[train], evaluations=6, executor=processes)
    print(f"\nFigure: {Path(out)/'comparison.png'}")
