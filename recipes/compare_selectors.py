"""Every selector that the RHO-LOSS paper compares, on CIFAR-10: one command, one table, one figure. It can be stopped and goes on where it was.

python recipes/compare_selectors.py --path <folder> --noise 0.2 --folder runs/selectors-noisy
python recipes/compare_selectors.py --path <folder> --noise 0 --folder runs/selectors-clean
python recipes/compare_selectors.py --path <folder> --noise 0.2 --folder runs/paper --arch resnet18 --frac 0.1 --steps 15000 --mc_steps 15000 --seeds 0,1,2

Even rows train, odd rows are the holdout that the irreducible losses come from. The last line is the paper's setting, for a GPU. Scores that need MC dropout
cost ten forward passes more, and may be given fewer steps; they are compared with a uniform run of as many. All models have dropout, so that all have one
uniform run to be compared with.
"""
import json
from functools import partial
from pathlib import Path

import torch
from cifar10_data import ImageRows, image_loader, image_loaders, read_images
from cifar10_rho_loss import ARCHITECTURES, make_learner
from common import accept_underscores, best, fit_steps, last_five, machine, plot_histories, print_table, read_run, steps_to, write_run
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse
from torch import nn

from rholoss_fastai.all import Boltzmann, ImportanceSample, IrreducibleLosses, ThenUniform, TopFraction, Uniform, fit_irreducible, redraw_labels

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
MAIN = ('uniform', 'random', 'rho_loss', 'loss', 'negative_il', 'gradient_norm')
WITH_MC = ('mc_entropy', 'conditional_entropy', 'bald', 'loss_minus_conditional_entropy', 'loss_plus_conditional_entropy')


def narrow_cnn():
    "A fifth of the small CNN's work"
    def block(n_in, n_out): return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 32), nn.Flatten(), nn.Linear(32*4*4, 10))


def learner_with_dropout(dls, arch, lr):
    learn = make_learner(dls, arch, lr)
    if arch == 'small_cnn': learn.model.insert(len(learn.model) - 1, nn.Dropout(0.1))
    else: learn.model.fc = nn.Sequential(nn.Dropout(0.1), learn.model.fc)
    return learn


def table_row(name, history, summary, base):
    "What stands in the table: steps and seconds to the best of the uniform run of as many steps"
    base = [row for row in base if row[0] <= summary['steps']]
    reached,target = steps_to(history, best(base)),steps_to(base, best(base))
    return [name, summary['steps'], f"{best(history):.4f}", f"{last_five(history):.4f}",
            f"{reached[0]} ({reached[0]/target[0]:.2f})" if reached else 'not reached', f"{reached[3]:.0f} ({reached[3]/target[3]:.2f})" if reached else '-',
            f"{summary['noisy_selected']:.3f}" if 'noisy_selected' in summary else '-']


HEADER = ['selector', 'steps', 'best', 'last five', "steps to uniform's best", 'seconds to it', 'wrong labels among selected']


def summarise(folder, seeds):
    "Table (of the first seed's runs, or all of them) and figure of the runs in `folder`"
    runs = {path.parent.name: read_run(path.parent) for path in sorted(Path(folder).glob('*/summary.json'))}
    names = [name for name in ('uniform', *SELECTORS) if any(f'{name}-{seed}' in runs for seed in seeds)]
    rows = [table_row(name if len(seeds) == 1 else f'{name}, seed {seed}', *runs[f'{name}-{seed}'], runs[f'uniform-{seed}'][0])
            for name in names for seed in seeds if f'{name}-{seed}' in runs]
    print_table(HEADER, rows)
    histories = {name: [runs[f'{name}-{seed}'][0] for seed in seeds if f'{name}-{seed}' in runs] for name in names}
    settings = runs[f'uniform-{seeds[0]}'][1]
    (Path(folder)/'comparison.json').write_text(json.dumps(dict(header=HEADER, table=rows, settings=settings, histories=histories)) + '\n')
    plot_histories({k: v for k,v in histories.items() if k not in WITH_MC}, Path(folder)/'comparison.png')


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; default: fastai's URLs.CIFAR
    folder:str='runs/selectors', # Folder of the runs, a folder each; those that are there are not run again
    selectors:str='all', # all, main, or names separated by commas
    noise:float=0.2, # Share of the training and holdout labels redrawn uniformly over all classes; the test set stays clean
    frac:float=0.25, # Selected share of each candidate batch
    bs:int=32, # Items trained on in each step, n_b
    steps:int=1000, # Training steps
    mc_steps:int=300, # Training steps of the scores that need MC dropout
    eval_every:int=50, # Steps between evaluations
    test_rows:int=2000, # Test images, evenly spaced; 0: all
    arch:str='small_cnn', # small_cnn or resnet18
    lr:float=1e-3, # Learning rate, constant
    il_epochs:int=10, # Epochs of the irreducible-loss model, a small CNN
    il_file:str=None, # Irreducible losses: loaded from here if the file exists, else fitted and saved here; default: in `folder`
    seeds:str='0', # Seeds, separated by commas
):
    "Compare the selectors at equal steps"
    names = dict(all=['uniform', *SELECTORS], main=list(MAIN)).get(selectors) or selectors.split(',')
    unknown = set(names) - {'uniform', *SELECTORS}
    if unknown: raise SystemExit(f"--selectors must be all, main, or among uniform, {', '.join(SELECTORS)}; got {', '.join(sorted(unknown))}.")
    if arch not in ARCHITECTURES: raise SystemExit(f"--arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}.")
    names = list(dict.fromkeys(['uniform', *names]))
    if min(steps, mc_steps) < eval_every: raise SystemExit(f"--eval_every={eval_every} must be at most --steps={steps} and --mc_steps={mc_steps}.")
    settings = dict(bs=bs, frac=frac, noise=noise, arch=arch, lr=lr)
    seeds,folder,device = [int(o) for o in seeds.split(',')],Path(folder),default_device()
    path,il_file = Path(path or untar_data(URLs.CIFAR)),Path(il_file or folder/'il.safetensors')
    images,targets,files = read_images(path/'train')
    labels,noisy = redraw_labels(targets, noise, seed=0)
    everything,test = ImageRows(images, labels, files),ImageRows(*read_images(path/'test'))
    if test_rows: test = test.of(torch.arange(0, len(test), max(1, len(test)//test_rows))[:test_rows])
    even,odd = torch.arange(0, len(labels), 2),torch.arange(1, len(labels), 2)
    train,holdout,test_batches = everything.of(even),everything.of(odd),test.batches(device)

    if not il_file.exists():
        set_seed(0)
        learn_il = make_learner(image_loaders(holdout, test, min(320, len(holdout)), augment=True, device=device), 'small_cnn', 1e-3)
        fit_irreducible(learn_il, image_loader(train, 500, shuffle=False, device=device), il_epochs).save(il_file)
    il = IrreducibleLosses.load(il_file)
    for seed in seeds:
        for name in names:
            out,n_steps = folder/f'{name}-{seed}',mc_steps if name in WITH_MC else steps
            if (out/'summary.json').exists():
                _,there = read_run(out)
                if any(there[k] != v for k,v in dict(settings, steps=n_steps).items()):
                    raise SystemExit(f"{out} holds a run with other settings: choose another --folder.")
                continue
            set_seed(seed)
            learn = learner_with_dropout(image_loaders(train, test, bs, device=device), arch, lr)
            if name != 'uniform':
                score,pick = SELECTORS[name]
                proxy = Learner(learn.dls, narrow_cnn(), loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), lr=lr)
                learn.rho_loss(il, epoch='candidates', score=score, pick=pick(frac), proxy=proxy if name == 'proxy' else None)
            history = fit_steps(learn, test_batches, n_steps, eval_every).history
            summary = dict(settings, method=name, seed=seed, steps=n_steps, best=best(history),
                           last_five=last_five(history), seconds=history[-1][3], il=il.info, **machine())
            if name != 'uniform':
                selected = learn.selection.selected.cpu()
                summary['noisy_selected'] = round((selected[noisy[even]].sum()/selected.sum()).item(), 4)
                if name == 'proxy': summary['spearman'] = learn.selection.ledger.spearman.tolist()
            write_run(out, history, summary)
            print(f"{name}, seed {seed}: best {summary['best']:.4f}, {summary['seconds']:.0f} s", flush=True)
    summarise(folder, seeds)
