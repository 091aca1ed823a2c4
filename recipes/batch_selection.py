"""BatchLossFilter and Selective-Backprop against training on everything, at equal epochs.

python recipes/batch_selection.py --path <folder of CIFAR-10> --method batch_loss_filter --out runs/batch_loss_filter-0
python recipes/batch_selection.py --data imagenette --method selective_backprop --beta 1 --arch xresnet18
python recipes/compare_runs.py runs
"""
from functools import partial
from pathlib import Path

import torch
from cifar10_data import ImageRows, image_loaders, read_images
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, best, fit_epochs, last_five, machine, read_precision, steps_to, write_run
from fastai.data.external import URLs, untar_data
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastai.vision.all import FlipItem, ImageDataLoaders, Normalize, RandomResizedCrop, imagenet_stats, xresnet18
from fastcore.script import call_parse

from rholoss_fastai.all import RankSample

METHODS = ('uniform', 'batch_loss_filter', 'selective_backprop', 'composer')
FOLDERS = dict(imagenette=URLs.IMAGENETTE_160, imagewoof=URLs.IMAGEWOOF_160)


def evenly_spaced(images, n):
    "`n` of the images, of all classes alike, as they are sorted by class; 0: all"
    return images.of(torch.arange(0, len(images), max(1, len(images)//n))[:n]) if n else images


def cifar10(path, rows, test_rows, bs, device):
    "In memory; `rows` of the training images and `test_rows` of the test images"
    path = Path(path or untar_data(URLs.CIFAR))
    train,test = evenly_spaced(ImageRows(*read_images(path/'train')), rows),evenly_spaced(ImageRows(*read_images(path/'test')), test_rows)
    return image_loaders(train, test, bs, augment=True, device=device),test.batches(device)


def image_folder(path, data, bs):
    "Imagenette or Imagewoof as fastai loads them"
    path = Path(path or untar_data(FOLDERS[data]))
    dls = ImageDataLoaders.from_folder(path, valid='val', bs=bs, item_tfms=RandomResizedCrop(128, min_scale=0.35),
                                       batch_tfms=[FlipItem(0.5), Normalize.from_stats(*imagenet_stats)])
    return dls,dls.valid


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder of the data; default: fastai's download
    data:str='cifar10', # cifar10, imagenette or imagewoof
    method:str='batch_loss_filter', # uniform, batch_loss_filter, selective_backprop or composer (a fixed share by rank)
    min_loss_perc:float=0.9, # BatchLossFilter: share of each batch's loss to keep
    beta:float=1., # Selective-Backprop: selectivity, of which a share of 1/(beta+1) is trained on
    queue:bool=False, # Selective-Backprop: let selected items wait for a full batch
    staleness:int=1, # Selective-Backprop: epochs for which a loss is remembered
    keep:float=0.5, # Composer: share of each batch
    mixup:bool=False, # Add MixUp
    epochs:int=6, # Epochs, with a one-cycle schedule
    bs:int=64, # Batch size
    lr:float=3e-3, # Highest learning rate
    arch:str='small_cnn', # small_cnn or resnet18 (CIFAR-10), xresnet18 (folders)
    rows:int=0, # CIFAR-10: use so many training rows; 0: all
    test_rows:int=0, # CIFAR-10: test on so many rows; 0: all
    warmup_epochs:int=1, # Epochs on everything first
    precision:str='auto', # Scoring precision: auto (bfloat16 where it is native), own (as training), float32, bfloat16 or float16
    compile:bool=False, # Compile the scoring forward
    seed:int=0, # Seed of weights and batches
    out:str='runs/batch_selection', # Folder for history.csv, summary.json and accuracy.png
):
    "Train for a number of epochs with a selection method"
    if method not in METHODS: raise SystemExit(f"--method must be one of {', '.join(METHODS)}; got {method!r}.")
    if data != 'cifar10' and data not in FOLDERS: raise SystemExit(f"--data must be cifar10, {' or '.join(FOLDERS)}; got {data!r}.")
    settings = {k: v for k,v in locals().items() if k not in ('path', 'out')}
    set_seed(seed)
    device = default_device()
    dls,test = cifar10(path, rows, test_rows, bs, device) if data == 'cifar10' else image_folder(path, data, bs)
    model = xresnet18(n_out=10) if arch == 'xresnet18' else ARCHITECTURES[arch]()
    learn = Learner(dls, model.to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), lr=lr,
                    opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    if mixup:
        from fastai.callback.mixup import MixUp
        learn.add_cb(MixUp(0.4))
    shared = dict(warmup_epochs=warmup_epochs, precision=read_precision(precision), compile=compile)
    if method == 'batch_loss_filter': learn.batch_loss_filter(min_loss_perc, **shared)
    if method == 'selective_backprop': learn.selective_backprop(beta, queue=queue, staleness=staleness, seed=seed, **shared)
    if method == 'composer': learn.selective_backprop(pick=RankSample(keep, seed=seed), **shared)

    evaluations = fit_epochs(learn, test, epochs, lr)
    history = evaluations.history
    summary = dict(settings, best=best(history), steps_to_best=steps_to(history, best(history))[0], last_five=last_five(history),
                   accuracy=history[-1][2], valid_loss=evaluations.losses[-1], valid_losses=evaluations.losses, seconds=history[-1][3],
                   cpu_seconds=evaluations.cpu_seconds[-1], items_trained=history[-1][5],
                   ledger=learn.selection.ledger.to_dict('list') if method != 'uniform' else None, **machine())
    write_run(out, history, summary)
    trained = summary['items_trained']/(epochs*len(dls.train_ds))
    print(f"{method}: accuracy {summary['accuracy']:.4f}, validation loss {summary['valid_loss']:.4f}, {summary['seconds']:.0f} s, "
          f"{trained:.0%} of the items trained on")
    print(f"Written to {out}")
