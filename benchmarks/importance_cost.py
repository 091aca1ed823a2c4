"""What EL2N and GraNd cost on the same model, as a ratio of medians taken in alternation in one process.

python benchmarks/importance_cost.py --out benchmarks/results/importance_cost.json
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_data import ImageRows, image_loader
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, machine, print_table

from rholoss_fastai.all import el2n, grand


def cost(arch, n, repeats, max_bytes, device):
    "Milliseconds an item of both scores, and their ratio"
    set_seed(0)
    rows = ImageRows(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (n,)),
                     list(range(n)))
    dl = image_loader(rows, 64, shuffle=False, device=device)
    learn = Learner(DataLoaders(dl, dl, device=device), ARCHITECTURES[arch]().to(device),
                    loss_func=CrossEntropyLossFlat())
    scores = dict(el2n=lambda: el2n(learn, dl, progress=False),
                  grand=lambda: grand(learn, dl, max_bytes, progress=False))
    seconds = {name: [] for name in scores}
    for repeat in range(repeats + 1): # the first is a warm-up
        for name,score in scores.items():
            began = time.perf_counter()
            score() # its values end up on the host, so the device is done
            if repeat: seconds[name].append(time.perf_counter() - began)
    ms = {name: 1e3*statistics.median(o)/n for name,o in seconds.items()}
    return dict(arch=arch, el2n_ms=round(ms['el2n'], 3), grand_ms=round(ms['grand'], 2),
                ratio=round(ms['grand']/ms['el2n'], 1))


accept_underscores()


@call_parse
def main(
    rows:int=256, # Random images of 32 pixels
    repeats:int=3, # Measurements of each
    archs:str='small_cnn,resnet18', # Models
    max_bytes:int=2**30, # GraNd's memory for gradients and activations
    out:str=None, # JSON file for the results
):
    "Milliseconds an item of EL2N and of GraNd"
    models = [cost(arch, rows, repeats, max_bytes, default_device()) for arch in archs.split(',')]
    print_table(list(models[0]), [list(o.values()) for o in models])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(machine=machine(), rows=rows, repeats=repeats, models=models), indent=1)
                             + '\n')
