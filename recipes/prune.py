"""Training on less of CIFAR-10: pruned by score, or anew each epoch as InfoBatch does; a run that was killed goes on where it was.

python recipes/prune.py --path <folder> --methods all,el2n,forgetting,stratified,random --keep 0.7,0.5,0.3,0.1 --out runs/static
python recipes/prune.py --path <folder> --methods all,infobatch --seeds 0,1,2 --epochs 20 --out runs/dynamic
python recipes/prune.py --path <folder> --methods all,random,el2n,el2n_il,reducible --keep 0.5 --noise 0.2 --out runs/noise
"""
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from cifar10_data import ImageRows, image_loaders, read_images
from cifar10_rho_loss import ARCHITECTURES
from common import Evaluations, accept_underscores, best, last_five, machine, plot_histories, print_table, read_run, steps_to, write_run
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse

from rholoss_fastai.all import IrreducibleLosses, crossfit_irreducible, prune, redraw_labels, score_dataset

# method -> the score that it goes by (None: no score), and how `prune` uses it
PRUNING = dict(all=None, random=('el2n', dict(strategy='random')), el2n=('el2n', {}), stratified=('el2n', dict(strategy='stratified')),
               forgetting=('forgetting', {}), reducible=('reducible', {}), el2n_il=('el2n', {}))
EPOCHWISE = dict(infobatch='loss', reducible_epochs='reducible')
METHODS = (*PRUNING, *EPOCHWISE)


class SomeEpochs(Evaluations):
    "Evaluations after `n` of the epochs, evenly spaced, and after the last"
    def __init__(self, test, n): super().__init__(test); self.n = n
    def after_train(self):
        self.spent += self._clock() - self.resumed
        done = (self.epoch + 1)*self.n/self.n_epoch
        if int(done) > int(done - self.n/self.n_epoch): self.evaluate()


class Scores:
    "Scores and irreducible losses of the training set, made when they are first asked for and kept in files"
    def __init__(self, folder, make_learner, dls, epochs, runs, forgetting_epochs, il_epochs, seed):
        self.folder,self.make_learner,self.dls,self.seed = folder,make_learner,dls,seed
        short,long = dict(epochs=epochs, n_runs=runs),dict(epochs=forgetting_epochs, n_runs=1)
        self.settings,self.il_epochs,self.made = dict(el2n=short, reducible=short, forgetting=long),il_epochs,{}

    def __call__(self, name):
        if name not in self.made:
            self.made[name] = score_dataset(self.make_learner, self.dls, name, seed=self.seed, path=self.folder/f'{name}.safetensors',
                                            il=self.il if name == 'reducible' else None, **self.settings[name])
        return self.made[name]

    @property
    def il(self):
        file = self.folder/'il.safetensors'
        if not file.exists(): crossfit_irreducible(self.make_learner, self.dls, self.il_epochs, seed=self.seed).save(file)
        return IrreducibleLosses.load(file)


def table_of(runs):
    "A row for each method and kept share: means over seeds, and shares of the items and the seconds of training on everything with the same seed"
    whole,table = {s['seed']: s for _,s in runs if s['method'] == 'all'},[]
    for method,keep in dict.fromkeys((s['method'], s['keep']) for _,s in runs):
        own = [s for _,s in runs if (s['method'], s['keep']) == (method, keep)]
        row = dict(method=method, keep=keep, seeds=len(own), accuracy=np.mean([s['accuracy'] for s in own]), lowest=min(s['accuracy'] for s in own),
                   highest=max(s['accuracy'] for s in own), seconds=np.mean([s['seconds'] for s in own]))
        if all(s['seed'] in whole for s in own):
            for k in 'items_trained', 'seconds': row[f'share_{k}'] = sum(s[k] for s in own)/sum(whole[s['seed']][k] for s in own)
        if 'noisy_trained' in own[0]: row['noisy_trained'] = np.mean([s['noisy_trained'] for s in own])
        table.append({k: v if isinstance(v, (str, int)) else round(float(v), 4) for k,v in row.items()})
    return table


def plot(runs, table, path):
    "Accuracy against the kept share, a line a method; against steps and seconds where only one share was kept"
    if len({row['keep'] for row in table}) < 3:
        histories = {row['method']: [h for h,s in runs if s['method'] == row['method']] for row in table}
        return plot_histories(histories, path)
    fig,ax = plt.subplots(figsize=(6, 3.6), layout='constrained')
    whole = next((row for row in table if row['method'] == 'all'), None)
    for method in dict.fromkeys(row['method'] for row in table if row is not whole):
        own = sorted((row['keep'], row['accuracy']) for row in [*table] if row['method'] == method or row is whole)
        ax.plot(*zip(*own), marker='o', label=method)
    ax.set(xlabel='share of the rows kept', ylabel='test accuracy')
    ax.legend()
    ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; default: fastai's URLs.CIFAR
    methods:str='all,el2n,forgetting,stratified,random', # Of all, random, el2n, el2n_il (without what irreducible losses call noise), stratified,
                                                         # forgetting, reducible; or epoch by epoch: infobatch, reducible_epochs
    keep:str='0.7,0.5,0.3,0.1', # Kept shares
    per_class:bool=False, # Keep the same share of each class?
    seeds:str='0', # Seeds of weights and batches
    epochs:int=6, # Epochs of training on everything, with a one-cycle schedule
    equal:str='steps', # Pruned sets are trained on for equal 'steps', as in Data Diet, or for equal 'epochs'
    rows:int=0, # Use so many training rows, evenly spaced; 0: all
    noise:float=0., # Share of the training labels redrawn uniformly over all classes
    score_epochs:int=2, # EL2N: epochs of each run
    score_runs:int=10, # EL2N: number of runs
    forgetting_epochs:int=10, # Forgetting: epochs of its run
    il_epochs:int=5, # Irreducible losses: epochs of each of two folds
    offset:float=0.1, # el2n_il: share left out first
    ratio:float=0.5, # infobatch: share of the rows below the mean that is dropped
    delta:float=0.875, # infobatch: share of the epochs after which the others are on everything
    bs:int=64, # Batch size
    lr:float=3e-3, # Highest learning rate
    arch:str='small_cnn', # small_cnn or resnet18
    evaluations:int=4, # Evaluations of each run
    score_seed:int=0, # Seed of the scores and of the noise, which all runs share
    out:str='runs/prune', # Folder for scores, a folder for each run, comparison.json and comparison.png
):
    "Train on pruned CIFAR-10 with each method, kept share and seed"
    methods,keeps,seeds = methods.split(','),[float(o) for o in keep.split(',')],[int(o) for o in seeds.split(',')]
    wrong = [o for o in methods if o not in METHODS]
    if wrong: raise SystemExit(f"--methods must be of {', '.join(METHODS)}; got {', '.join(wrong)}.")
    if equal not in ('steps', 'epochs'): raise SystemExit(f"--equal must be steps or epochs; got {equal!r}.")
    settings = {k: v for k,v in locals().items() if k in 'per_class epochs equal rows noise score_epochs score_runs forgetting_epochs il_epochs offset ratio '
                                                         'delta bs lr arch score_seed'.split()}
    device,out = default_device(),Path(out)
    (out/'scores').mkdir(parents=True, exist_ok=True)
    path = Path(path or untar_data(URLs.CIFAR))
    images,targets,files = read_images(path/'train')
    labels,noisy = redraw_labels(targets, noise, seed=score_seed)
    train,test = ImageRows(images, labels, files),ImageRows(*read_images(path/'test')).batches(device)
    if rows:
        some = torch.arange(0, len(train), max(1, len(train)//rows))[:rows]
        train,noisy = train.of(some),noisy[some]

    def loaders(): return image_loaders(train, train.of(torch.arange(1)), bs, augment=True, device=device)
    def make_learner(dls):
        model = ARCHITECTURES[arch]().to(memory_format=torch.channels_last)
        return Learner(dls, model, loss_func=CrossEntropyLossFlat(), lr=lr, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    scores = Scores(out/'scores', make_learner, loaders(), score_epochs, score_runs, forgetting_epochs, il_epochs, score_seed)

    runs = []
    for seed in seeds:
        for method,share in [(m, k) for m in methods for k in (keeps if m in PRUNING and m != 'all' else [1.])]:
            folder = out/f'{method}-{share:g}-{seed}'
            if (folder/'summary.json').exists():
                runs.append(read_run(folder))
                if any(runs[-1][1][k] != v for k,v in settings.items()): raise SystemExit(f"{folder} holds a run with other settings: choose another --out.")
                continue
            set_seed(seed)
            dls,n_epoch = loaders(),epochs
            if method in PRUNING and PRUNING[method]:
                name,how = PRUNING[method]
                if method == 'el2n_il': how = dict(il=scores.il, offset=offset)
                dls = prune(dls, scores(name), share, seed=seed, per_class=per_class, **how)
                if equal == 'steps': n_epoch = round(epochs*len(train)/len(dls.train_ds))
            set_seed(seed)
            learn = make_learner(dls)
            if method in EPOCHWISE: learn.prune_epochs(ratio, delta, score=EPOCHWISE[method], seed=seed, il=scores.il if method == 'reducible_epochs' else None)
            evaluated = SomeEpochs(test, evaluations)
            with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(n_epoch, lr, cbs=evaluated)
            history = evaluated.history
            summary = dict(settings, method=method, keep=share, seed=seed, best=best(history), steps_to_best=steps_to(history, best(history))[0],
                           last_five=last_five(history), accuracy=history[-1][2], seconds=history[-1][3], items_trained=history[-1][5], **machine())
            if method in EPOCHWISE: summary['selected'] = learn.selection.ledger.selected.round(4).tolist()
            if noise:
                times = learn.selection.selected.cpu() if method in EPOCHWISE else torch.zeros(len(train)).index_fill_(
                    0, torch.as_tensor(np.asarray(getattr(dls.train_ds, 'row_numbers', range(len(train)))), dtype=torch.long), 1)
                summary['noisy_trained'] = round((times[noisy].sum()/times.sum()).item(), 4)
            write_run(folder, history, summary)
            runs.append((history, summary))
            print(f"{method}, {share:.0%} kept, seed {seed}: accuracy {summary['accuracy']:.4f}, {summary['items_trained']} items, "
                  f"{summary['seconds']:.0f} s", flush=True)

    table = table_of(runs)
    print_table(list(table[0]), [[row.get(k, '-') for k in table[0]] for row in table])
    result = dict(table=table, settings=dict(settings, rows=len(train), seeds=len(seeds)), machine=machine(),
                  scores={name: o.info for name,o in scores.made.items()})
    if noise:
        kept = np.linspace(0.02, 1, 50)
        def found(o): return [round((noisy[o.values.topk(round(k*len(noisy))).indices].sum()/noisy.sum()).item(), 4) for k in kept]
        result['curves'] = {name: dict(kept=kept.round(3).tolist(), found=found(o)) for name,o in scores.made.items()}
    (out/'comparison.json').write_text(json.dumps(result) + '\n')
    plot(runs, table, out/'comparison.png')
    print(f"Written to {out}")
