"""RHO-LOSS against uniform training on scikit-learn's embedded digits, part of whose labels are flipped: a minute on two cores.

python recipes/quickstart.py
"""
from pathlib import Path

import torch
from common import accept_underscores, best, fit_steps, last_five, plot_histories, print_table, steps_to
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import numpy as np
from rholoss_fastai.all import Uniform, fit_irreducible


def flipped_digits(noise, seed=0):
    "Images `(n,1,8,8)` in a random order, labels of which a share `noise` is wrong, true labels, and which are wrong"
    digits,generator = load_digits(),torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images,true = torch.tensor(digits.images, dtype=torch.float)[order,None]/16,torch.tensor(digits.target)[order]
    wrong = torch.rand(len(true), generator=generator) < noise
    return images,torch.where(wrong, (true + torch.randint(1, 10, true.shape, generator=generator)) % 10, true),true,wrong


def small_cnn():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
                         nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32*16, 10))


def learner(data, test, bs, seed):
    set_seed(seed)
    dls = DataLoaders(DataLoader(data, bs=bs, shuffle=True, drop_last=True), DataLoader(test, bs=500))
    return Learner(dls, small_cnn(), loss_func=CrossEntropyLossFlat(), lr=2e-3)


accept_underscores()


@call_parse
def main(
    noise:float=0.3, # Share of labels that are flipped, in training and holdout data
    frac:float=0.1, # Selected share of each candidate batch
    bs:int=16, # Items trained on in each step
    steps:int=400, # Training steps
    seeds:int=3, # Runs of each method
    out:str='runs/quickstart' # Folder for the plot
):
    "Uniform training, a random subset and RHO-LOSS at equal steps"
    torch.set_num_threads(1) # too little work in a step to share it out
    images,labels,true,wrong = flipped_digits(noise)
    test,train,holdout = slice(0, 400),slice(400, 1100),slice(1100, None)
    clean = TensorDataset(images[test], true[test])
    train_data,holdout_data = TensorDataset(images[train], labels[train]),TensorDataset(images[holdout], labels[holdout])

    learn_il = learner(holdout_data, clean, 64, seed=0)
    il = fit_irreducible(learn_il, DataLoader(train_data, bs=350), 15)

    histories,selected = {'uniform': [], 'random subset': [], 'RHO-LOSS': []},{}
    for seed in range(seeds):
        for method in histories:
            learn = learner(train_data, clean, bs, seed)
            if method == 'random subset': learn.rho_loss(pick=Uniform(frac, seed=seed), epoch='candidates')
            if method == 'RHO-LOSS': learn.rho_loss(il, frac=frac, epoch='candidates')
            histories[method].append(fit_steps(learn, [(images[test], true[test])], steps, 20).history)
            if method != 'uniform':
                counts = learn.selection.selected
                selected.setdefault(method, []).append((counts[wrong[train]].sum()/counts.sum()).item())

    rows = []
    for method,runs in histories.items():
        reached = [steps_to(run, best(base)) for run,base in zip(runs, histories['uniform'])]
        steps_mean = f"{np.mean([r[0] for r in reached]):.0f}" if all(reached) else f"not in {steps}"
        seconds_mean = f"{np.mean([r[3] for r in reached]):.2f}" if all(reached) else '-'
        share = np.mean(selected[method]) if method in selected else wrong[train].float().mean()
        rows.append([method, f"{np.mean([best(r) for r in runs]):.3f}", f"{np.mean([last_five(r) for r in runs]):.3f}", steps_mean, seconds_mean,
                     f"{share:.1%}", f"{il.info['seconds']:.1f}" if method=='RHO-LOSS' else '-'])
    print(f"Digits with {wrong[train].float().mean():.0%} of the labels flipped, {len(train_data)} for training, {len(holdout_data)} holdout; "
          f"{steps} steps of {bs} items, mean of {seeds} runs.\n")
    print_table(['method', 'best accuracy', 'at the end', "steps to uniform's best", 'seconds to it', 'flipped among trained', 'IL seconds'], rows)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    plot_histories(histories, out/'quickstart.png', f"digits, {noise:.0%} of the labels flipped")
    print(f"\nFigure: {out/'quickstart.png'}. All methods take equally many steps; what a step costs is in the seconds.")
