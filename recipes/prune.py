"""Training on less of CIFAR-10: pruned by score, or anew each epoch; a comparison that was killed goes on where it was.

python recipes/prune.py --path <folder> --methods el2n,forgetting,stratified,random --keep 0.7,0.5,0.3,0.1 \
    --folder runs/static
python recipes/prune.py --path <folder> --methods infobatch,rs2 --seeds 0,1,2 --epochs 20 --folder runs/dynamic
python recipes/prune.py --path <folder> --methods random,el2n,el2n_il,reducible --keep 0.5 --noise 0.2 \
    --folder runs/noise
"""
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cifar10_data import ImageRows, image_loaders, read_images
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, compared
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device
from fastcore.script import call_parse

from rholoss_fastai.all import IrreducibleLosses, crossfit_irreducible, prune, redraw_labels, score_dataset, write_json
from rholoss_fastai.compare import METHODS

# method -> the score that it goes by, and how `prune` uses it
PRUNING = dict(random=('el2n', dict(strategy='random')), el2n=('el2n', {}),
               stratified=('el2n', dict(strategy='stratified')), forgetting=('forgetting', {}),
               reducible=('reducible', {}), el2n_il=('el2n', {}))
EPOCHWISE = ('infobatch', 'rs2', 'seta', 'ies', 'rho_epochs')


class Scores:
    "Scores and irreducible losses of the training set, made when they are first asked for and kept in files"
    def __init__(self, folder, make_learner, dls, epochs, runs, forgetting_epochs, il_epochs, seed):
        self.folder,self.make_learner,self.dls,self.seed = folder,make_learner,dls,seed
        short,long = dict(epochs=epochs, n_runs=runs),dict(epochs=forgetting_epochs, n_runs=1)
        self.settings,self.il_epochs,self.made = dict(el2n=short, reducible=short, forgetting=long),il_epochs,{}

    def __call__(self, name):
        if name not in self.made:
            self.made[name] = score_dataset(self.make_learner, self.dls, name, seed=self.seed,
                                            path=self.folder/f'{name}.safetensors', il=self.il if name == 'reducible'
                                            else None, **self.settings[name])
        return self.made[name]

    @property
    def il(self):
        file = self.folder/'il.safetensors'
        if not file.exists():
            crossfit_irreducible(self.make_learner, self.dls, self.il_epochs, seed=self.seed).save(file)
        return IrreducibleLosses.load(file)


def pruned(method, keep, scores, per_class, offset, seed):
    "A method of `compare` that trains on a part of the rows for good; what the scores cost isn't in the bill"
    name,how = PRUNING[method]
    made = dict(scores.settings[PRUNING[method][0]], il_epochs=scores.il_epochs) # by which `compare` knows runs again
    def put_in(learn, made=made):
        il = dict(il=scores.il, offset=offset) if method == 'el2n_il' else {}
        learn.dls = prune(learn.dls, scores(name), keep, seed=seed, per_class=per_class, **how, **il)
    return f'{method} {keep:g}',put_in


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; default: fastai's URLs.CIFAR
    methods:str='el2n,forgetting,stratified,random', # Of random, el2n, el2n_il (without noise), stratified, forgetting,
                                                     # reducible; or by epoch: infobatch, rs2, seta, ies, rho_epochs
    keep:str='0.7,0.5,0.3,0.1', # Kept shares
    per_class:bool=False, # Keep the same share of each class?
    seeds:str='0', # Seeds of weights and batches
    epochs:float=6, # Epochs of training on everything, in one cycle; all take as many steps, or cost as much
    budget:str='steps', # What is equal: steps, cost or seconds
    rows:int=0, # Use so many training rows, evenly spaced; 0: all
    noise:float=0., # Share of the training labels redrawn uniformly over all classes
    score_epochs:int=2, # EL2N: epochs of each run
    score_runs:int=10, # EL2N: number of runs
    forgetting_epochs:int=10, # Forgetting: epochs of its run
    il_epochs:int=5, # Irreducible losses: epochs of each of two folds
    offset:float=0.1, # el2n_il: share left out first
    bs:int=64, # Batch size
    lr:float=3e-3, # Highest learning rate
    arch:str='small_cnn', # small_cnn or resnet18
    evaluations:int=4, # Evaluations of each run
    score_seed:int=0, # Seed of the scores and of the noise, which all runs share
    folder:str='runs/prune', # Folder for scores, runs, comparison.json and comparison.png
):
    "Train on pruned CIFAR-10 with each method, kept share and seed"
    methods,keeps = methods.split(','),[float(o) for o in keep.split(',')]
    wrong = [o for o in methods if o not in (*PRUNING, *EPOCHWISE)]
    if wrong: raise SystemExit(f"--methods must be of {', '.join((*PRUNING, *EPOCHWISE))}; got {', '.join(wrong)}.")
    path,folder,device = Path(path or untar_data(URLs.CIFAR)),Path(folder),default_device()
    images,targets,files = read_images(path/'train')
    labels,noisy = redraw_labels(targets, noise, seed=score_seed)
    train = ImageRows(images, labels, files)
    if rows:
        some = torch.arange(0, len(train), max(1, len(train)//rows))[:rows]
        train,noisy = train.of(some),noisy[some]
    dls = image_loaders(train, ImageRows(*read_images(path/'test')), bs, augment=True, device=device)
    def make_learner(dls):
        model = ARCHITECTURES[arch]().to(memory_format=torch.channels_last)
        return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=lr,
                       opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    scores = Scores(folder/'scores', make_learner, dls, score_epochs, score_runs, forgetting_epochs, il_epochs,
                    score_seed)
    chosen = [o for m in methods for o in ([(m, METHODS[m])] if m in EPOCHWISE
                                           else [pruned(m, k, scores, per_class, offset, score_seed) for k in keeps])]
    compared(folder, make_learner, dls, chosen, n_epoch=epochs, budget=budget, seeds=[int(o) for o in seeds.split(',')],
             noisy=noisy if noise else None, evaluations=evaluations)
    if noise: # how much of the noise is among the rows that would be kept
        kept = np.linspace(0.02, 1, 50)
        def found(o):
            return [round((noisy[o.values.topk(round(k*len(noisy))).indices].sum()/noisy.sum()).item(), 4)
                    for k in kept]
        write_json(folder/'noise.json',
                   {name: dict(kept=kept.round(3).tolist(), found=found(o)) for name,o in scores.made.items()})
