"""BatchLossFilter and Selective-Backprop against plain training at equal cost: on CIFAR-10, or on a folder of images as
fastai loads it.

python recipes/batch_selection.py --path <folder of CIFAR-10> --seeds 3
python recipes/batch_selection.py --data imagenette --methods selective_backprop:beta=1 --arch xresnet18
"""
from functools import partial
from pathlib import Path

import torch
from cifar10_data import ImageRows, image_loaders, read_images
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, compared, read_method
from fastai.callback.mixup import MixUp
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device
from fastai.vision.all import FlipItem, ImageDataLoaders, Normalize, RandomResizedCrop, imagenet_stats, xresnet18
from fastcore.script import call_parse

from rholoss_fastai.all import RankSample

FOLDERS = dict(imagenette=URLs.IMAGENETTE_160, imagewoof=URLs.IMAGEWOOF_160)
MODELS = dict(ARCHITECTURES, xresnet18=partial(xresnet18, n_out=10))


def cifar10(path, bs, device):
    path = Path(path or untar_data(URLs.CIFAR))
    return image_loaders(ImageRows(*read_images(path/'train')), ImageRows(*read_images(path/'test')), bs, augment=True,
                         device=device)


def image_folder(path, bs):
    return ImageDataLoaders.from_folder(path, valid='val', bs=bs, item_tfms=RandomResizedCrop(128, min_scale=0.35),
                                        batch_tfms=[FlipItem(0.5), Normalize.from_stats(*imagenet_stats)])


def composer(learn): learn.selective_backprop(pick=RankSample(0.5))


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder of the data; default: fastai's download
    data:str='cifar10', # cifar10, imagenette or imagewoof
    methods:str='batch_loss_filter selective_backprop composer', # Settings as in selective_backprop:beta=1,queue=true;
                                                                 # composer draws a fixed share by rank
    mixup:bool=False, # Add MixUp
    epochs:int=6, # Budget, in epochs of plain training
    bs:int=64, # Batch size
    lr:float=3e-3, # Highest learning rate
    arch:str='small_cnn', # small_cnn or resnet18 (CIFAR-10), xresnet18 (folders)
    seeds:int=1, # Runs of each method
    folder:str='runs/batch_selection', # Folder of the runs; those that are there are not run again
):
    "Compare selection methods that need nothing but the batch"
    if data != 'cifar10' and data not in FOLDERS:
        raise SystemExit(f"--data must be cifar10, {' or '.join(FOLDERS)}; got {data!r}.")
    if arch not in MODELS: raise SystemExit(f"--arch must be one of {', '.join(MODELS)}; got {arch!r}.")
    dls = (cifar10(path, bs, default_device()) if data == 'cifar10'
           else image_folder(path or untar_data(FOLDERS[data]), bs))
    def make_learner(dls):
        return Learner(dls, MODELS[arch]().to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(),
                       metrics=accuracy, lr=lr, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=[MixUp(0.4)]
                       if mixup else None)
    compared(folder, make_learner, dls, [('composer', composer) if o == 'composer' else read_method(o)
                                         for o in methods.split()], n_epoch=epochs, seeds=seeds)
