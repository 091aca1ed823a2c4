"""RHO-LOSS on CIFAR-10 as published: even rows train, odd rows are the holdout that the irreducible losses come from.

python recipes/cifar10_rho_loss.py --path <folder> --method rho_loss --noise 0.2 --out runs/rho_loss-0
python recipes/cifar10_rho_loss.py --path <folder> --method uniform  --noise 0.2 --out runs/uniform-0
python recipes/compare_runs.py runs

Without any holdout data: the irreducible losses of all rows are cross-fitted, and all rows train, as they do in the uniform run beside it.

python recipes/cifar10_rho_loss.py --path <folder> --method cross_fit   --noise 0.2 --out runs_all/cross_fit-0
python recipes/cifar10_rho_loss.py --path <folder> --method uniform_all --noise 0.2 --out runs_all/uniform_all-0

Other folders of images, <train>/<class>/ and <test>/<class>/ (CIFAR-100's may be <superclass>/<class>/), take the same commands, with more options:

CIFAR-100     --path <folder> --arch resnet18                             fastai's URLs.CIFAR_100 unpacks so
CINIC-10      --path <folder> --bs 64 --holdout_folder valid              its folders are train, valid and test
Clothing-1M   --path <folder> --noise 0 --arch resnet18 --size 64 --test_folder clean_test
              The folder must hold train/<class>/ with the million images of noisy labels and clean_test/<class>/ with the 10 526 of clean ones, classes named
              alike, sorted into folders after the lists noisy_label_kv.txt, clean_label_kv.txt and clean_test_key_list.txt that come with the data (from its
              authors, on request). All of it is held in memory, twice while it is split: 25 GB at 64 pixels.
"""
import time
from functools import partial
from pathlib import Path

import torch
from cifar10_data import ImageRows, image_loader, image_loaders, read_images
from common import accept_underscores, best, fit_steps, last_five, machine, read_precision, steps_to, write_run
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse
from torch import nn
from torchvision.models import resnet18

from rholoss_fastai.all import IrreducibleLosses, Uniform, crossfit_irreducible, fit_irreducible, redraw_labels, small_cnn


def resnet18_32px(n_classes=10, size=32):
    "ResNet-18 with the stem for 32-pixel images: a 3x3 convolution, no pooling"
    model = resnet18(num_classes=n_classes)
    model.conv1,model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False),nn.Identity()
    return model


ARCHITECTURES = dict(small_cnn=small_cnn, resnet18=resnet18_32px)


def make_learner(dls, arch, lr, **kwargs):
    # torch's AdamW: fastai's Adam has other betas and eps than the published runs
    model = ARCHITECTURES[arch](**kwargs).to(memory_format=torch.channels_last) # convolutions are faster so
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), lr=lr)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; default: fastai's URLs.CIFAR
    train_folder:str='train', # Its folder of training images
    test_folder:str='test', # Its folder of test images
    holdout_folder:str=None, # Its folder of holdout images; then all rows of the training folder train. Default: the training folder's odd rows
    size:int=32, # Height and width that images are brought to
    method:str='rho_loss', # uniform, random (a random subset of each candidate batch), rho_loss; on both halves: uniform_all, cross_fit (RHO-LOSS)
    noise:float=0.2, # Share of the training and holdout labels redrawn uniformly over all classes; the test set stays clean
    frac:float=0.1, # Selected share of each candidate batch
    bs:int=32, # Items trained on in each step, n_b
    steps:int=4000, # Training steps
    eval_every:int=200, # Steps between evaluations
    arch:str='small_cnn', # small_cnn or resnet18
    lr:float=1e-3, # Learning rate, constant
    il_arch:str='small_cnn', # Architecture of the irreducible-loss model
    il_epochs:int=10, # Its epochs; the best one's losses are kept
    il_lr:float=1e-3, # Its learning rate
    il_one_cycle:bool=False, # Let its learning rate rise to that and fall to 0? A better model for as many epochs; --il_lr 6e-3 suits
    il_folds:int=2, # Cross-fit: number of irreducible-loss models
    il_file:str=None, # Irreducible losses: loaded from here if the file exists, else fitted and saved here
    precision:str='auto', # Scoring precision: auto (bfloat16 where it is native), own (as training), float32, bfloat16 or float16
    compile:bool=False, # Compile the scoring forward
    seed:int=0, # Seed of weights and batches
    noise_seed:int=0, # Seed of the labels and of the irreducible-loss model, which runs with other seeds may share
    out:str='runs/cifar10_rho_loss', # Folder for history.csv, summary.json and accuracy.png
):
    "Train on CIFAR-10 with label noise, uniformly or with RHO-LOSS, at a given number of training steps"
    methods = ('uniform', 'uniform_all', 'random', 'rho_loss', 'cross_fit')
    if method not in methods: raise SystemExit(f"--method must be one of {', '.join(methods)}; got {method!r}.")
    for name in (arch, il_arch):
        if name not in ARCHITECTURES: raise SystemExit(f"--arch and --il_arch must be one of {', '.join(ARCHITECTURES)}; got {name!r}.")
    settings = {k: v for k,v in locals().items() if k not in ('methods', 'name', 'path', 'out', 'il_file')}
    device = default_device()
    path = Path(path or untar_data(URLs.CIFAR))
    images,targets,files = read_images(path/train_folder, size)
    n = len(targets)
    if holdout_folder:
        more = read_images(path/holdout_folder, size)
        images,targets,files = torch.cat([images, more[0]]),torch.cat([targets, more[1]]),files + more[2]
    rows = torch.arange(len(targets))
    even,odd = (rows[:n],rows[n:]) if holdout_folder else (rows[::2],rows[1::2])
    labels,noisy = redraw_labels(targets, noise, seed=noise_seed)
    everything,test = ImageRows(images, labels, files),ImageRows(*read_images(path/test_folder, size))
    chosen,holdout = rows if method in ('uniform_all', 'cross_fit') else even,everything.of(odd)
    train = everything.of(chosen)
    kind = dict(n_classes=int(targets.max()) + 1, size=size)

    set_seed(seed)
    learn = make_learner(image_loaders(train, test, bs, device=device), arch, lr, **kind)
    il = None
    if method == 'random': learn.rho_loss(pick=Uniform(frac, seed=seed), epoch='candidates')
    if method in ('rho_loss', 'cross_fit'):
        if il_file and Path(il_file).exists(): il = IrreducibleLosses.load(il_file)
        else:
            state = torch.get_rng_state()
            set_seed(noise_seed)
            if method == 'cross_fit':
                def il_learner(dls):
                    dls.train.after_batch = image_loader(train, 1, augment=True).after_batch # the fold's own copy: scoring stays plain
                    return make_learner(dls, il_arch, il_lr, **kind)
                n_fold = len(train)*(il_folds - 1)//il_folds
                dls = image_loaders(train, test, min(320, n_fold), device=device)
                il = crossfit_irreducible(il_learner, dls, il_epochs, il_folds, one_cycle=il_one_cycle, seed=noise_seed)
            else:
                learn_il = make_learner(image_loaders(holdout, test, min(320, len(holdout)), augment=True, device=device), il_arch, il_lr, **kind)
                il = fit_irreducible(learn_il, image_loader(train, 500, shuffle=False, device=device), il_epochs, one_cycle=il_one_cycle)
            torch.set_rng_state(state)
            if il_file: il.save(il_file)
        learn.rho_loss(il, frac=frac, epoch='candidates', precision=read_precision(precision), compile=compile)

    began = time.perf_counter()
    history = fit_steps(learn, test.batches(device), steps, eval_every).history
    seconds = time.perf_counter() - began
    summary = dict(settings, best=best(history), steps_to_best=steps_to(history, best(history))[0], last_five=last_five(history),
                   seconds=history[-1][3], seconds_with_evaluations=round(seconds, 1), il=il.info if il else None, **machine())
    if il or method == 'random':
        selected = learn.selection.selected.cpu()
        summary.update(noisy_candidates=round(noisy[chosen].float().mean().item(), 4),
                       noisy_selected=round((selected[noisy[chosen]].sum()/selected.sum()).item(), 4))
    write_run(out, history, summary)
    print(f"{method}: best accuracy {summary['best']:.4f} after {summary['steps_to_best']} of {steps} steps, mean of the last five evaluations "
          f"{summary['last_five']:.4f}, {summary['seconds']:.0f} s of training" + (f", {il.info['seconds']:.0f} s for irreducible losses" if il else ''))
    print(f"Written to {out}")
