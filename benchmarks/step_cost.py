"""What selection costs in a training step, as ratios against bare PyTorch loops taken in the same process, in alternation.

python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
"""
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
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
from common import accept_underscores, machine, print_table  # noqa: E402

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


def bare_loop(arch, device, choose):
    "A training step in bare PyTorch over the items that `choose(model, xb, yb, extra)` takes"
    model = ARCHITECTURES[arch]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(xb, yb, extra):
        idxs = choose(model, xb, yb, extra)
        loss = F.cross_entropy(model(xb[idxs]), yb[idxs])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def first_items(model, xb, yb, extra):
    "The first n_b, nothing scored: plain training"
    return slice(N_SELECTED)


def most_reducible(model, xb, yb, il):
    "One no-grad forward over n_B in eval mode, the top n_b by loss minus irreducible loss"
    model.eval()
    with torch.no_grad(): idxs = (F.cross_entropy(model(xb), yb, reduction='none') - il).topk(N_SELECTED).indices
    model.train()
    return idxs


def largest_losses(model, xb, yb, kept):
    "BatchLossFilter as first published: scoring in train mode and float32, sorted and summed by NumPy on the host"
    with torch.no_grad(): losses = F.cross_entropy(model(xb), yb, reduction='none').cpu().numpy()
    order = np.argsort(losses)[::-1]
    share = np.cumsum(losses[order])/losses.sum()
    n = max(int(np.argmax(share >= 0.01)) + 1, int(np.ceil(len(yb)*kept)))
    return torch.from_numpy(order[:n].copy()).to(xb.device)


def alternate(learners, bare, batches, repeats, device):
    "Seconds of each step, by name: an epoch of each Learner, then a pass of each bare loop over `batches()`, again and again"
    seconds = {**{name: learn.step_times.seconds for name, learn in learners.items()}, **{name: [] for name in bare}}
    for repeat in range(repeats + 1):
        for learn in learners.values():
            with learn.no_logging(): learn.fit(1)
        for name, step in bare.items():
            for batch in batches():
                began = clock(device)
                step(*batch)
                seconds[name].append(clock(device) - began)
        if repeat == 0: # warm-up
            for o in seconds.values(): o.clear()
    return seconds


def in_milliseconds(seconds):
    "Median and quartiles of each list of seconds, in milliseconds"
    return {k: [round(q*1e3, 3) for q in np.quantile(v, [0.5, 0.25, 0.75])] for k, v in seconds.items()}


def rho_loss_cost(arch, repeats, device):
    "A RHO-LOSS step, plain fastai's step over n_b, and the bare loops'"
    set_seed(0)
    n = N_CANDIDATES*STEPS
    images, targets, il = torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,)), torch.rand(n)
    rho = fastai_learner(arch, images, targets, N_SELECTED, device).rho_loss(il, frac=N_SELECTED/N_CANDIDATES)
    uniform = fastai_learner(arch, images[:N_SELECTED*STEPS], targets[:N_SELECTED*STEPS], N_SELECTED, device)

    def batches(): return ([o[rows].to(device) for o in (images, targets, il)] for rows in torch.randperm(n).split(N_CANDIDATES))
    bare = dict(bare_rho=bare_loop(arch, device, most_reducible), bare_uniform=bare_loop(arch, device, first_items))
    times = in_milliseconds(alternate(dict(rho_loss=rho, uniform=uniform), bare, batches, repeats, device))
    median = {k: v[0] for k, v in times.items()}
    return dict(arch=arch, milliseconds=times, rho_over_bare=round(median['rho_loss']/median['bare_rho'], 3),
                rho_over_limit=round(median['rho_loss']/(1.05*median['bare_rho'] + 2), 3),
                overhead_ms=round(median['rho_loss'] - median['bare_rho'], 3),
                fastai_overhead_ms=round(median['uniform'] - median['bare_uniform'], 3))


def filter_cost(arch, kept, repeats, device, bs=128):
    "A BatchLossFilter step with two forwards and with one, and the original's in bare PyTorch, at the same kept share"
    set_seed(0)
    images, targets = torch.randn(bs*STEPS, 3, 32, 32), torch.randint(0, 10, (bs*STEPS,))
    learners = {forward: fastai_learner(arch, images, targets, bs, device).batch_loss_filter(0.01, kept, warmup_epochs=0, forward=forward)
                for forward in ('twice', 'reuse')}

    def batches(): return ((images[rows].to(device), targets[rows].to(device), kept) for rows in torch.randperm(bs*STEPS).split(bs))
    times = in_milliseconds(alternate(learners, dict(original=bare_loop(arch, device, largest_losses)), batches, repeats, device))
    for learn in learners.values(): assert abs(learn.selection.kept - kept) < 0.01
    return dict(arch=arch, kept=kept, milliseconds=times, twice_over_original=round(times['twice'][0]/times['original'][0], 3),
                reuse_over_original=round(times['reuse'][0]/times['original'][0], 3))


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


accept_underscores()


@call_parse
def main(
    repeats:int=20, # Alternations, of 5 steps each; a quarter of it for ResNet-18
    archs:str='small_cnn,resnet18', # Models
    kept:str='0.1,0.3,0.5,0.9', # Kept shares of BatchLossFilter
    out:str=None, # JSON file for the results
):
    "Cost of a training step with selection: RHO-LOSS at 320 candidates and 32 selected, BatchLossFilter at 128"
    device = default_device()
    tracking = tracking_cost(repeats)
    print(f"index tracking: {tracking['added_us']} microseconds a batch of {N_CANDIDATES}\n")
    n = {arch: repeats if arch == 'small_cnn' else max(3, repeats//4) for arch in archs.split(',')}
    rho = [rho_loss_cost(arch, n[arch], device) for arch in n]
    print_table(['model', 'RHO-LOSS ms', 'bare loop ms', 'ratio', 'overhead ms', "fastai's own overhead ms", 'share of 1.05 x bare + 2 ms'],
                [[r['arch'], r['milliseconds']['rho_loss'][0], r['milliseconds']['bare_rho'][0], r['rho_over_bare'], r['overhead_ms'],
                  r['fastai_overhead_ms'], r['rho_over_limit']] for r in rho])
    print()
    filters = [filter_cost(arch, float(k), n[arch], device) for arch in n for k in kept.split(',') if k]
    print_table(['model', 'kept', 'original ms', "'twice' ms", 'ratio', "'reuse' ms", 'ratio'],
                [[r['arch'], r['kept'], r['milliseconds']['original'][0], r['milliseconds']['twice'][0], r['twice_over_original'],
                  r['milliseconds']['reuse'][0], r['reuse_over_original']] for r in filters])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(machine=machine(), tracking=tracking, rho_loss=rho, batch_loss_filter=filters), indent=1) + '\n')
