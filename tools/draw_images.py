"Draw the site's icon, its social picture and the README's: favicon, social and suspects.png in nbs/images"
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import numpy as np
from fastcore.script import call_parse
from matplotlib import pyplot as plt

IMAGES = Path(__file__).resolve().parent.parent/'nbs'/'images'
BLUE,GREY,RED = '#2780e3','#c3cad3','#e0553a'

def candidates(ax, rows, columns, size, seed=3):
    "A batch of candidates: those worth a backward pass in blue, a wrong label in red, the rest grey"
    kinds = np.random.default_rng(seed).choice([BLUE, GREY, RED], rows*columns, p=[0.22, 0.68, 0.10])
    x,y = np.meshgrid(range(columns), range(rows))
    ax.scatter(x, y, c=kinds, s=size, marker='s')
    ax.set(xlim=(-0.6, columns-0.4), ylim=(rows-0.4, -0.6), aspect='equal')
    ax.axis('off')

def suspects(n=9):
    "Digits whose labels look wrong, found by `label_noise` without any training"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImageBW
    from sklearn.datasets import load_digits

    from rholoss_fastai.all import label_noise, noisy_labels
    digits = load_digits()
    images = (digits.images*255/16).astype(np.uint8)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=lambda i: images[i],
                      get_y=lambda i: digits.target[i], splitter=IndexSplitter(range(1500, 1797)))
    dls = noisy_labels(block.dataloaders(range(1797), bs=64, num_workers=0), 0.2)
    axs = label_noise(dls, progress=False, verbose=False).show(n, ncols=n, size=1.1)
    return axs.flat[0].figure

@call_parse
def main():
    "Draw them"
    suspects().savefig(IMAGES/'suspects.png', dpi=110)
    fig = plt.figure(figsize=(12, 6.3))
    fig.text(0.06, 0.66, 'rholoss_fastai', size=58, weight='bold', color='#1b2733')
    fig.text(0.06, 0.50, 'Data selection for fastai', size=32, color='#1b2733')
    fig.text(0.06, 0.32, 'Train on the items of each batch\nthat are worth a backward pass', size=23, color='#5a6673',
             linespacing=1.5)
    fig.text(0.06, 0.14, 'learn.rho_loss()', size=24, family='monospace', color=BLUE)
    candidates(fig.add_axes([0.66, 0.12, 0.29, 0.76]), 11, 8, 560)
    fig.savefig(IMAGES/'social.png', dpi=100)
    fig = plt.figure(figsize=(0.64, 0.64))
    ax = fig.add_axes([0, 0, 1, 1])
    ax.scatter([0, 1, 0, 1], [0, 0, 1, 1], c=[BLUE, GREY, GREY, BLUE], s=420, marker='s')
    ax.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5))
    ax.axis('off')
    fig.savefig(IMAGES/'favicon.png', dpi=100, transparent=True)
    plt.close('all')
