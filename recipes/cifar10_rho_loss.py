"""RHO-LOSS on CIFAR-10 as published: even rows train, odd rows are the holdout that the irreducible losses come from.

python recipes/cifar10_rho_loss.py --path <folder> --noise 0.2 --seeds 0,1,2 --folder runs/cifar10

Without any holdout data: the irreducible losses of all rows are cross-fitted, and all rows train, as they do in the
plain run beside it.

python recipes/cifar10_rho_loss.py --path <folder> --noise 0.2 --cross_fit --folder runs/cifar10-all

Other folders of images, <train>/<class>/ and <test>/<class>/ (CIFAR-100's may be <superclass>/<class>/), take the same
commands, with more options:

CIFAR-100     --path <folder> --arch resnet18                             fastai's URLs.CIFAR_100 unpacks so
CINIC-10      --path <folder> --bs 64 --holdout_folder valid              its folders are train, valid and test
Clothing-1M   --path <folder> --noise 0 --arch resnet18 --size 64 --test_folder clean_test
              The folder must hold train/<class>/ with the million images of noisy labels and clean_test/<class>/ with
              the 10 526 of clean ones, classes named alike, sorted into folders after the lists noisy_label_kv.txt,
              clean_label_kv.txt and clean_test_key_list.txt that come with the data (from its authors, on request). All
              of it is held in memory, twice while it is split: 25 GB at 64 pixels.
"""
from functools import partial
from pathlib import Path

import torch
from cifar10_data import ImageRows, image_loader, image_loaders, read_images
from common import accept_underscores, compared
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse, store_true
from torch import nn
from torchvision.models import resnet18

from rholoss_fastai.all import Uniform, crossfit_irreducible, fit_irreducible, redraw_labels, small_cnn


def resnet18_32px(n_classes=10, size=32):
    "ResNet-18 with the stem for 32-pixel images: a 3x3 convolution, no pooling"
    model = resnet18(num_classes=n_classes)
    model.conv1,model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False),nn.Identity()
    return model


ARCHITECTURES = dict(small_cnn=small_cnn, resnet18=resnet18_32px)


def make_learner(dls, arch, lr, **kwargs):
    # torch's AdamW: fastai's Adam has other betas and eps than the published runs
    model = ARCHITECTURES[arch](**kwargs).to(memory_format=torch.channels_last) # convolutions are faster so
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
                   lr=lr)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; default: fastai's URLs.CIFAR
    train_folder:str='train', # Its folder of training images
    test_folder:str='test', # Its folder of test images
    holdout_folder:str=None, # Folder of holdout images; then all training rows train. Default: odd rows
    size:int=32, # Height and width that images are brought to
    methods:str='random,rho_loss', # Of random (of each candidate batch) and rho_loss, beside plain training
    cross_fit:store_true=False, # Cross-fit the irreducible losses, and train on holdout rows too?
    noise:float=0.2, # Share of the training and holdout labels redrawn uniformly; the test set stays clean
    frac:float=0.1, # Selected share of each candidate batch
    bs:int=32, # Items trained on in each step, n_b
    steps:int=4000, # Training steps, at a constant rate
    eval_every:int=200, # Steps between evaluations
    arch:str='small_cnn', # small_cnn or resnet18
    lr:float=1e-3, # Learning rate
    il_arch:str='small_cnn', # Architecture of the irreducible-loss model
    il_epochs:int=10, # Its epochs; the best one's losses are kept
    il_lr:float=1e-3, # Its learning rate
    il_one_cycle:store_true=False, # Let its rate rise to that and fall to 0? Better for as many epochs; --il_lr 6e-3
    il_folds:int=2, # Cross-fit: number of irreducible-loss models
    compile:store_true=False, # Compile the scoring forward
    seeds:str='0', # Seeds of weights and batches
    noise_seed:int=0, # Seed of the labels and of the irreducible-loss model, which all runs share
    folder:str='runs/cifar10_rho_loss', # Folder of the runs; those that are there are not run again
):
    "Train on CIFAR-10 with label noise, plainly and with RHO-LOSS, for a given number of training steps"
    for name in (arch, il_arch):
        if name not in ARCHITECTURES:
            raise SystemExit(f"--arch and --il_arch must be one of {', '.join(ARCHITECTURES)}; got {name!r}.")
    device,path = default_device(),Path(path or untar_data(URLs.CIFAR))
    images,targets,files = read_images(path/train_folder, size)
    rows,n = torch.arange(len(targets)),len(targets)
    if holdout_folder:
        more = read_images(path/holdout_folder, size)
        images,targets = torch.cat([images, more[0]]),torch.cat([targets, more[1]])
        files,rows = files + more[2],torch.arange(n + len(more[1]))
    even,odd = (rows[:n],rows[n:]) if holdout_folder else (rows[::2],rows[1::2])
    labels,noisy = redraw_labels(targets, noise, seed=noise_seed)
    everything,test = ImageRows(images, labels, files),ImageRows(*read_images(path/test_folder, size))
    chosen,holdout = rows if cross_fit else even,everything.of(odd)
    train,kind = everything.of(chosen),dict(n_classes=int(targets.max()) + 1, size=size)

    def il(make_learner_, dls):
        set_seed(noise_seed)
        if not cross_fit:
            learn = make_learner(image_loaders(holdout, test, min(320, len(holdout)), augment=True, device=device),
                                 il_arch, il_lr, **kind)
            return fit_irreducible(learn, image_loader(train, 500, shuffle=False, device=device), il_epochs,
                                   one_cycle=il_one_cycle)
        def fold(dls):
            # the fold's own copy: scoring stays plain
            dls.train.after_batch = image_loader(train, 1, augment=True).after_batch
            return make_learner(dls, il_arch, il_lr, **kind)
        folds = image_loaders(train, test, min(320, len(train)*(il_folds - 1)//il_folds), device=device)
        return crossfit_irreducible(fold, folds, il_epochs, il_folds, one_cycle=il_one_cycle, seed=noise_seed)
    def learner(dls):
        learn = make_learner(dls, arch, lr, **kind)
        learn.metrics = [accuracy]
        return learn
    known = dict(random=lambda learn: learn.rho_loss(pick=Uniform(frac), epoch='candidates'),
                 rho_loss=lambda learn, il: learn.rho_loss(il, frac=frac, compile=compile, epoch='candidates'))
    if not set(methods.split(',')) <= {*known}:
        raise SystemExit(f"--methods must be of {', '.join(known)}; got {methods!r}.")
    dls = image_loaders(train, test, bs, device=device)
    compared(folder, learner, dls, [(o, known[o]) for o in methods.split(',')], n_epoch=steps/len(dls.train),
             budget='steps', fit='fit', il=il, bill='none', seeds=[int(o) for o in seeds.split(',')],
             noisy=noisy[chosen], evaluations=max(1, steps//eval_every))
