"""CIFAR-10 in memory: decoded once, so that decoding on a few cores doesn't hide what training costs."""
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastcore.basics import noop
from PIL import Image

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def read_images(folder):
    "uint8 images `(n,3,32,32)`, targets `(n,)` and relative paths of the files `<class>/<name>` in `folder`, sorted by path"
    folder = Path(folder)
    files = sorted(f.relative_to(folder) for f in folder.glob('*/*') if f.suffix in ('.jpg', '.png'))
    if not files: raise FileNotFoundError(f"No images in {folder}/<class>/: --path must hold the folders train and test of CIFAR-10.")
    classes = sorted({f.parts[0] for f in files})
    images = np.stack([np.asarray(Image.open(folder/f).convert('RGB')) for f in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([classes.index(f.parts[0]) for f in files]), files


def redraw_labels(targets, share, seed=0):
    "`targets` with a share of them redrawn uniformly over all classes, and which of them changed"
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.rand(len(targets), generator=generator) < share
    labels = torch.where(redrawn, torch.randint(0, 10, targets.shape, generator=generator), targets)
    return labels, labels != targets


class ImageRows:
    "Rows of an image table: a map-style data set"
    def __init__(self, images, targets, items): self.images,self.targets,self.items = images,targets,items
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return self.images[i],self.targets[i]
    def batch(self, rows): return self.images[rows],self.targets[rows]
    def batches(self, device, bs=500):
        "All rows, normalised, in batches on `device`"
        return [(normalized(x).contiguous(memory_format=torch.channels_last).to(device), y.to(device))
                for x,y in zip(self.images.split(bs), self.targets.split(bs))]
    def of(self, rows): return ImageRows(self.images[rows], self.targets[rows], [self.items[i] for i in rows.tolist()])


def normalized(images):
    mean,std = (images.new_tensor(o, dtype=torch.float)[:,None,None] for o in (MEAN, STD))
    return (images.float()/255 - mean)/std


def flipped(images): return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


def image_loader(rows, bs, shuffle=True, augment=False, device=None):
    "A fastai DataLoader that takes whole batches from memory"
    def prepare(b): return (flipped if augment else noop)(normalized(b[0])).contiguous(memory_format=torch.channels_last), b[1]
    return DataLoader(rows, bs=bs, shuffle=shuffle, drop_last=shuffle, create_item=noop, create_batch=rows.batch, retain=lambda b,_: b,
                      after_batch=prepare, device=device)


def image_loaders(train, test, bs, augment=False, device=None):
    dls = DataLoaders(image_loader(train, bs, augment=augment, device=device), image_loader(test, 500, shuffle=False, device=device))
    return dls if device is None else dls.to(device)
