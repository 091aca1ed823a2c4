"""The tables of the documentation: every method at equal cost, on CIFAR-10 with wrong labels or clean, from scratch or
on a pretrained body.

python benchmarks/compare_cifar10.py --path <folder> --noise 0.2 --arch small_cnn
python benchmarks/compare_cifar10.py --path <folder> --noise 0 --arch small_cnn
python benchmarks/compare_cifar10.py --path <folder> --noise 0.3 --arch efficientnet
python benchmarks/compare_cifar10.py --path <folder> --noise 0.2 --confusion --size 16

One command makes one table: all training rows (or `--rows` of them), the learning rate fully decayed within the budget,
irreducible losses billed, prices measured on this machine beforehand. Each run is kept in a file of `--folder`; all of
them end up in `benchmarks/results/compare_<arch>_noise<share>.json`.
"""
import sys
from pathlib import Path

import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import default_device
from fastcore.script import call_parse, store_true

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_data import CIFAR_STATS, CONFUSED, LITE_STATS, ImageRows, image_loaders, pretrained_body, read_images
from cifar10_rho_loss import make_learner
from common import accept_underscores, compared, read_method

from rholoss_fastai.all import redraw_labels

# height and width of the images, training rows, epochs, highest learning rate
SETTINGS = dict(small_cnn=(32, 25_000, 5., 3e-3), resnet18=(32, 50_000, 10., 3e-3), efficientnet=(64, 6_000, 4., 1e-3))
METHODS = ('random rs2 infobatch seta ies batch_loss_filter selective_backprop select:pick=divbs,frac=0.1 '
           'select:pick=divbs,frac=0.2 select:pick=divbs,frac=0.3 rho_loss rho_loss_published rho_epochs')
RESULTS = Path(__file__).parent/'results'


def learner_of(arch, lr, size):
    "A function of loaders that makes a Learner"
    def make(dls):
        if arch != 'efficientnet':
            learn = make_learner(dls, arch, lr, **(dict(size=size) if arch == 'small_cnn' else {}))
        else:
            learn = Learner(dls, pretrained_body().to(memory_format=torch.channels_last),
                            loss_func=CrossEntropyLossFlat(), lr=lr)
        learn.metrics = [accuracy]
        return learn
    return make


def some(images, n): return images.of(torch.arange(0, len(images), max(1, len(images)//n))[:n]) if n else images


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/
    arch:str='small_cnn', # small_cnn or resnet18, from scratch; efficientnet, a pretrained body at 64 pixels
    noise:float=0.2, # Share of the training labels redrawn; the test set stays clean
    confusion:store_true=False, # Redraw them as the class that each is taken for, not uniformly?
    size:int=None, # Height and width of the images; default by arch
    methods:str=METHODS, # Beside plain training, separated by spaces; settings after a colon, as in rho_loss:frac=0.5
    seeds:str='0,1,2', # Seeds of weights and batches
    rows:int=None, # Training rows, evenly spaced; 0: all; default by arch
    test_rows:int=None, # Test rows, evenly spaced; default all, for a pretrained body 2 000
    epochs:float=None, # Budget, in epochs of plain training; default by arch
    bs:int=32, # Batch size
    lr:float=None, # Highest learning rate; default by arch
    evaluations:int=4, # Of each run
    budget:str='cost', # What is equal: cost, by counts and measured prices; seconds; or steps
    bill:str='whole', # Of what shared irreducible losses cost, each run is billed the whole, its share, or none
    executor:int=None, # Processes; None: one run after the other here
    threads:int=1, # PyTorch's threads for each run
    dry_run:bool=False, # Only say what it will take?
    folder:str=None, # Folder of the runs; default runs/compare_<arch>_noise<share>
    out:str=None, # JSON file for all of them; default in benchmarks/results
):
    "Methods at equal cost on CIFAR-10: a table, a figure, a verdict"
    if arch not in SETTINGS: raise SystemExit(f"--arch must be one of {', '.join(SETTINGS)}; got {arch!r}.")
    if path is None:
        raise SystemExit('--path is missing: the folder of CIFAR-10, with train/<class>/ and test/<class>/.')
    default_size,n_rows,n_epoch,highest = SETTINGS[arch]
    size = size or default_size
    name = f"compare_{arch}_noise{noise:g}{'_confused' if confusion else ''}"
    if size != default_size: name += f'_size{size}'
    torch.set_num_threads(threads)
    images,targets,files = read_images(Path(path)/'train', size)
    stats = LITE_STATS if arch == 'efficientnet' else CIFAR_STATS
    train = some(ImageRows(images, targets, files, stats), n_rows if rows is None else rows)
    train.targets,noisy = redraw_labels(train.targets, noise, CONFUSED if confusion else None)
    test = some(ImageRows(*read_images(Path(path)/'test', size), stats), (2_000 if arch == 'efficientnet' else 0)
                if test_rows is None else test_rows)
    result = compared(folder or f'runs/{name}', learner_of(arch, lr or highest, size),
                      image_loaders(train, test, bs, device=default_device()),
                      [read_method(o) for o in methods.split()], n_epoch=epochs or n_epoch, budget=budget,
                      seeds=[int(o) for o in seeds.split(',')], noisy=noisy if noise else None, bill=bill,
                      prices='measure' if budget == 'cost' else None, executor=executor, threads=threads,
                      dry_run=dry_run, evaluations=evaluations)
    if not dry_run: result.save(Path(out or RESULTS/f'{name}.json'))
