"""Image classification from a learning rate far too small or too large: what `learn.one_pass()` makes of it, against
the rate as it is.

python recipes/image_one_pass.py --path <folder of CIFAR-10> --method one_pass --lr 1e-5 --out runs/one_pass-1e-5
python recipes/image_one_pass.py --path <folder of CIFAR-10> --method constant --lr 0.03 --out runs/constant-0.03
python recipes/image_one_pass.py --method one_pass \
    --lr 1e-5     (FashionMNIST by torchvision, with the MLP of Clarke et al. 2022)
"""
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from cifar10_data import ImageRows, image_loaders, read_images
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, best, fit_steps, last_five, machine, print_table, read_run, write_run
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse
from torch import nn
from torchvision.datasets import FashionMNIST

import rholoss_fastai.all  # noqa: F401 (patches one_pass)


def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(3*28*28, 50), nn.ReLU(), nn.Linear(50, 10))


MODELS = dict(mlp=mlp, **ARCHITECTURES)


def fashion(folder, train):
    "FashionMNIST in memory, its one channel three times"
    data = FashionMNIST(folder, train=train, download=True)
    return ImageRows(data.data[:, None].expand(-1, 3, -1, -1), data.targets, range(len(data)))


def collect(folder, results):
    "Print the table of all runs in `folder`, and write it to the JSON file `results`"
    summaries = [read_run(file.parent)[1] for file in sorted(Path(folder).glob('*/summary.json'))]
    runs = [{k: s[k] for k in ('method', 'lr', 'bs', 'steps', 'valid_bs', 'seed', 'accuracy', 'best', 'seconds',
                               'finite')} for s in summaries]
    for run, s in zip(runs, summaries):
        if s['method'] == 'one_pass':
            run.update({f'last_{k}': s['last'][k] for k in ('lr', 'wd', 'mom') if k in s['last']},
                       rolled_back=s['rolled_back'])
    runs.sort(key=lambda o: (o['bs'], o['method'], o['lr']))
    columns = list(max(runs, key=len))
    print_table(columns,
                [[f'{v:.4g}' if isinstance(v := run.get(k, ''), float) else v for k in columns] for run in runs])
    Path(results).write_text(json.dumps(dict(machine=machine(), runs=runs), indent=1) + '\n')


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; None: FashionMNIST
    method:str='one_pass', # one_pass, or constant: the values as they are
    lr:float=1e-5, # Learning rate to begin with
    mom:float=0.9, # Momentum to begin with
    wd:float=1e-4, # L2 weight decay to begin with
    tune:str='lr,wd,mom', # What one_pass learns
    steps:int=2000, # Training steps
    bs:int=32, # Batch size
    valid_pct:float=0.1, # one_pass: share of the training images to validate on, which don't train
    valid_bs:int=128, # one_pass: items in a validation batch
    hyper_lr:float=0.05, # one_pass: Adam's learning rate
    n_terms:int=5, # one_pass: terms of the series
    per:str='group', # one_pass: a rate per parameter 'group', or for each weight: 'parameter'
    arch:str=None, # mlp, small_cnn or resnet18; default: small_cnn, and for FashionMNIST mlp
    eval_every:int=500, # Steps between evaluations
    seed:int=0, # Of weights and batches
    out:str='runs/image_one_pass', # Folder for history.csv, summary.json and figures
    results:str=None, # JSON file for the table of this run and all others beside `out`
):
    "Train for a number of steps at a constant rate, or with one-pass tuning"
    if method not in ('one_pass', 'constant'):
        raise SystemExit(f"--method must be one_pass or constant; got {method!r}.")
    arch = arch or ('small_cnn' if path else 'mlp')
    if arch not in MODELS: raise SystemExit(f"--arch must be one of {', '.join(MODELS)}; got {arch!r}.")
    settings = {k: v for k, v in locals().items() if k not in ('path', 'out', 'results')}
    device, folder = default_device(), Path(path or Path.home()/'.fastai'/'data'/'fashion')
    train, test = (ImageRows(*read_images(folder/o)) if path else fashion(folder, o == 'train')
                   for o in ('train', 'test'))
    set_seed(seed)
    learn = Learner(image_loaders(train, test, bs, device=device), MODELS[arch]().to(memory_format=torch.channels_last),
                    loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=mom, decouple_wd=False), lr=lr, wd=wd)
    if method == 'one_pass':
        learn.one_pass(tune.split(','), valid_pct=valid_pct, valid_bs=valid_bs, hyper_lr=hyper_lr,
                       n_terms=n_terms, per=per)
    evaluations = fit_steps(learn, test.batches(device), steps, eval_every)
    history = evaluations.history
    summary = dict(settings, best=best(history), last_five=last_five(history), accuracy=history[-1][2],
                   test_losses=evaluations.losses, seconds=history[-1][3],
                   finite=all(p.isfinite().all().item() for p in learn.model.parameters()), **machine())
    if method == 'one_pass':
        tuner = learn.one_pass_tuner
        summary['hypers'] = tuner.history.iloc[::5].to_dict('list')
        summary['last'] = tuner.history.iloc[-1].to_dict()
        summary['rolled_back'] = int(tuner.history.rolled_back.sum())
    write_run(out, history, summary)
    if method == 'one_pass':
        tuner.plot_hypers()[0].figure.savefig(Path(out)/'hypers.png', dpi=110)
        plt.close('all')
    print(f"{method} from lr {lr:g}: accuracy {summary['accuracy']:.4f} after {steps} steps, {summary['seconds']:.0f} "
          "s")
    print(f"Written to {out}")
    if results: collect(Path(out).parent, results)
