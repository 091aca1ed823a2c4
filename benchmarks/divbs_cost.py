"""What DivBS adds to a training step of a ResNet-18: products of last-layer gradients and the recursion, beside the
step. Medians of process seconds on the CPU (of seconds on a GPU), taken in alternation.

python benchmarks/divbs_cost.py --out benchmarks/results/divbs_cost.json
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse
from torchvision.models import resnet18

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from common import accept_underscores, machine, print_table

from rholoss_fastai.all import ItemLosses, diverse_items, logit_gradients


def medians(jobs, repeats, device):
    "Milliseconds of each job, in turn"
    clock = time.perf_counter if device.type == 'cuda' else time.process_time # which other processes don't lengthen
    seconds = {name: [] for name in jobs}
    for repeat in range(repeats + 1): # the first is a warm-up
        for name,job in jobs.items():
            began = clock()
            job()
            if device.type == 'cuda': torch.cuda.synchronize(device)
            if repeat: seconds[name].append(clock() - began)
    return {name: 1e3*statistics.median(o) for name,o in seconds.items()}

def cost(n_candidates, frac, n_classes, n_features, image_size, repeats, device):
    "What DivBS takes beside a training step on the items that are taken"
    set_seed(0)
    n_b,item_losses = int(frac*n_candidates),ItemLosses(CrossEntropyLossFlat())
    model = resnet18(num_classes=n_classes).to(device)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(n_b, 3, image_size, image_size, device=device)
    y = torch.randint(0, n_classes, (n_candidates,), device=device)
    logits = torch.randn(n_candidates, n_classes, device=device)
    features = torch.randn(n_candidates, n_features, device=device).relu()
    def products():
        with torch.no_grad():
            R = logit_gradients(item_losses, logits, y)
            return (R @ R.T)*(features @ features.T)
    gram = products()
    def step():
        torch.nn.functional.cross_entropy(model(x), y[:n_b]).backward()
        opt.step()
        opt.zero_grad()
    ms = medians(dict(products=products, recursion=lambda: diverse_items(gram, n_b), step=step), repeats, device)
    return dict(n_candidates=n_candidates, taken=n_b, n_classes=n_classes, n_features=n_features, image_size=image_size,
                **{f'{name}_ms': round(o, 2) for name,o in ms.items()},
                share=round((ms['products'] + ms['recursion'])/ms['step'], 4))


accept_underscores()


@call_parse
def main(
    n_candidates:int=320, # Items in a batch of candidates
    n_classes:int=1000, # Classes
    n_features:int=2048, # Inputs of the last layer
    image_size:int=224, # Height and width of the images of the step
    fracs:str='0.1,0.3', # Shares that are taken, with commas
    repeats:int=5, # Timed rounds
    out:str=None, # JSON file for the results
):
    "What DivBS adds to a step, for some shares of the candidates"
    rows = [cost(n_candidates, frac, n_classes, n_features, image_size, repeats, default_device())
            for frac in map(float, fracs.split(','))]
    print_table(list(rows[0]), [list(o.values()) for o in rows])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(machine=machine(), repeats=repeats, rows=rows), indent=1) + '\n')
