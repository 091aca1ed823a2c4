"""What selection buys on the clock: CIFAR-10 with wrong labels, or clean, by a small CNN; even rows train, odd rows are
the IL model's.

python benchmarks/time_to_accuracy.py --path <folder> --noise 0.2 --folder runs/tta --out runs/tta.json
python benchmarks/time_to_accuracy.py --path <folder> --noise 0.2 --folder runs/tta-steps --budget steps --fit fit

A run is a method and its settings, `method:name=value,name=value`, and is kept in a file of its own, so a job that was
stopped goes on with the next one. By default the learning rate is fully decayed within each budget, which is what the
same seconds buy (`--budget seconds`), and what steps cost is measured beforehand; with `--budget steps --fit fit` all
take as many steps at a constant rate. Seconds are the processor's, evaluations are left out, and so are irreducible
losses by a holdout model unless `--bill whole` or `share`: the table has both.
"""
import sys
from pathlib import Path

from fastai.metrics import accuracy
from fastai.torch_core import default_device
from fastcore.script import call_parse

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_data import even_rows_and_holdout, image_loader, image_loaders
from cifar10_rho_loss import make_learner
from common import accept_underscores, compared, read_method

from rholoss_fastai.all import fit_irreducible

RUNS = ('random rho_loss:frac=0.5,compile=true rho_loss:frac=0.33,compile=true rho_loss:frac=0.25,compile=true '
        'rho_loss:frac=0.1,compile=true batch_loss_filter:warmup_epochs=0 selective_backprop:keep=0.5,warmup_epochs=0')


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/
    folder:str='runs/time_to_accuracy', # Folder of the runs, a file each
    runs:str=RUNS, # Runs, separated by spaces
    seeds:str='0,1,2', # Seeds of weights and batches
    epochs:float=5., # Budget, in epochs of plain training
    budget:str='seconds', # What is equal: seconds, cost or steps
    fit:str='fit_one_cycle', # fit_one_cycle, fit_flat_cos, or fit for a constant rate
    evaluations:int=20, # Of each run
    noise:float=0.2, # Share of the training and holdout labels redrawn uniformly over all classes
    noise_seed:int=0, # Seed of the labels and of the IL model
    il_epochs:int=12, # Epochs of the IL model
    bill:str='none', # Of what it costs, each run is billed its share, the whole or none
    bs:int=32, # Items trained on in each step of plain training and RHO-LOSS, n_b
    lr:float=1e-3, # Learning rate, the highest of a schedule
    arch:str='small_cnn', # small_cnn or resnet18
    out:str=None, # JSON file for all runs
):
    "Accuracy against seconds, by method"
    if path is None:
        raise SystemExit('--path is missing: the folder of CIFAR-10, with train/<class>/ and test/<class>/.')
    device = default_device()
    train,holdout,test,noisy = even_rows_and_holdout(path, noise, seed=noise_seed)
    def il(make_learner_, dls):
        learn = make_learner(image_loaders(holdout, test, min(320, len(holdout)), augment=True, device=device),
                             'small_cnn', 6e-3)
        return fit_irreducible(learn, image_loader(train, 500, shuffle=False, device=device), il_epochs, one_cycle=True)
    def learner(dls):
        learn = make_learner(dls, arch, lr)
        learn.metrics = [accuracy]
        return learn
    methods = [read_method(o) for o in runs.split()]
    result = compared(folder, learner, image_loaders(train, test, bs, device=device), methods, n_epoch=epochs,
                      budget=budget, fit=fit, noisy=noisy, seeds=[int(o) for o in seeds.split(',')], il=il, bill=bill,
                      evaluations=evaluations, prices='measure' if budget == 'cost' else None)
    if out: result.save(Path(out))
