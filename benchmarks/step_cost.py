"""What selection costs in a training step, as ratios against bare PyTorch loops taken in the same process, in alternation.

python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
"""
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastcore.basics import noop
from fastcore.script import call_parse

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_rho_loss import ARCHITECTURES  # noqa: E402
from common import machine, print_table  # noqa: E402

from rholoss_fastai.all import track_rows  # noqa: E402

N_CANDIDATES, N_SELECTED, STEPS = 320, 32, 5


def clock(device):
    if device.type == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def loader(images, targets, bs, device=None):
    rows = list(range(len(targets)))
    return DataLoader(rows, bs=bs, shuffle=True, drop_last=True, create_item=noop, create_batch=lambda idxs: (images[idxs], targets[idxs]),
                      retain=lambda b, _: b, device=device)


class StepTimes(Callback):
    "Seconds of each training step, from before the first event of a batch to after the last; validation is skipped"
    order = -99
    def __init__(self, device): self.device, self.seconds = device, []
    def before_validate(self): raise CancelValidException
    def before_batch(self): self.began = clock(self.device)


class StepEnds(Callback):
    order = 99
    def after_batch(self):
        if self.training: self.learn.step_times.seconds.append(clock(self.learn.step_times.device) - self.learn.step_times.began)


def fastai_learner(arch, images, targets, bs, device):
    dls = DataLoaders(loader(images, targets, bs, device), loader(images[:bs], targets[:bs], bs, device), device=device)
    learn = Learner(dls, ARCHITECTURES[arch](), loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), lr=1e-3,
                    cbs=[StepTimes(device), StepEnds()])
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    return learn


def bare_loop(arch, device):
    "One no-grad forward over n_B in eval mode, the top n_b by loss minus a number, one training step over these"
    model = ARCHITECTURES[arch]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(xb, yb, il):
        model.eval()
        with torch.no_grad(): idxs = (F.cross_entropy(model(xb), yb, reduction='none') - il).topk(N_SELECTED).indices
        model.train()
        loss = F.cross_entropy(model(xb[idxs]), yb[idxs])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def bare_training(arch, device):
    "One training step over n_b, nothing scored"
    model = ARCHITECTURES[arch]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(xb, yb, il):
        loss = F.cross_entropy(model(xb[:N_SELECTED]), yb[:N_SELECTED])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_cost(arch, repeats, device):
    "Median seconds of a RHO-LOSS step, of plain fastai's step over n_b, and of the bare loops'"
    set_seed(0)
    n = N_CANDIDATES*STEPS
    images, targets, il = torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,)), torch.rand(n)
    rho = fastai_learner(arch, images, targets, N_SELECTED, device).rho_loss(il, frac=N_SELECTED/N_CANDIDATES)
    uniform = fastai_learner(arch, images[:N_SELECTED*STEPS], targets[:N_SELECTED*STEPS], N_SELECTED, device)
    bare = dict(bare_rho=bare_loop(arch, device), bare_uniform=bare_training(arch, device))
    seconds = dict(rho_loss=rho.step_times.seconds, uniform=uniform.step_times.seconds, bare_rho=[], bare_uniform=[])
    for repeat in range(repeats + 1):
        for learn in (rho, uniform):
            with learn.no_logging(): learn.fit(1)
        for name, step in bare.items():
            for rows in torch.randperm(n).split(N_CANDIDATES):
                batch = [o[rows].to(device) for o in (images, targets, il)]
                began = clock(device)
                step(*batch)
                seconds[name].append(clock(device) - began)
        if repeat == 0: # warm-up
            for o in seconds.values(): o.clear()
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    quartiles = {k: [round(q*1e3, 3) for q in statistics.quantiles(v, n=4)] for k, v in seconds.items()}
    return dict(arch=arch, milliseconds={k: round(v*1e3, 3) for k, v in medians.items()}, quartiles_ms=quartiles,
                rho_over_bare=round(medians['rho_loss']/medians['bare_rho'], 3),
                rho_over_limit=round(medians['rho_loss']/(1.05*medians['bare_rho'] + 2e-3), 3),
                overhead_ms=round((medians['rho_loss'] - medians['bare_rho'])*1e3, 3),
                fastai_overhead_ms=round((medians['uniform'] - medians['bare_uniform'])*1e3, 3))


def tracking_cost(repeats, n=320*50):
    "Microseconds a batch that index tracking adds: iterating a loader, and a tracked copy of it with the rows asked for, in alternation"
    images, targets = torch.randn(n, 4), torch.zeros(n)
    dl = loader(images, targets, N_CANDIDATES)

    def plain():
        for _ in dl: pass

    def tracked():
        copy = track_rows(dl)
        for i, _ in enumerate(copy): copy.rows(i)
    seconds = dict(plain=[], tracked=[])
    for repeat in range(repeats + 1):
        for name, run in (('plain', plain), ('tracked', tracked)):
            began = time.perf_counter()
            run()
            if repeat: seconds[name].append((time.perf_counter() - began)/len(dl))
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    return dict(microseconds={k: round(v*1e6, 1) for k, v in medians.items()}, added_us=round((medians['tracked'] - medians['plain'])*1e6, 1))


@call_parse
def main(
    repeats:int=20, # Alternations, of 5 steps each
    archs:str='small_cnn,resnet18', # Models
    out:str=None, # JSON file for the results
):
    "Cost of a RHO-LOSS step at 320 candidates and 32 selected"
    device = default_device()
    tracking = tracking_cost(repeats)
    print(f"index tracking: {tracking['added_us']} microseconds a batch of {N_CANDIDATES} (at most 50)\n")
    results = [step_cost(arch, repeats if arch == 'small_cnn' else max(4, repeats//4), device) for arch in archs.split(',')]
    print_table(['model', 'RHO-LOSS ms', 'bare loop ms', 'ratio', 'overhead ms', "fastai's own overhead ms", 'share of 1.05 x bare + 2 ms'],
                [[r['arch'], r['milliseconds']['rho_loss'], r['milliseconds']['bare_rho'], r['rho_over_bare'], r['overhead_ms'], r['fastai_overhead_ms'],
                  r['rho_over_limit']] for r in results])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(machine=machine(), tracking=tracking, steps=results), indent=1) + '\n')
