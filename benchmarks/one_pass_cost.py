"""What one-pass tuning costs in time (on a CPU processor seconds) and memory, against plain fastai training in the same
process, in alternation.

python benchmarks/one_pass_cost.py --out benchmarks/results/one_pass_cost.json
"""
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, machine, print_table
from step_cost import clock, loader

import rholoss_fastai.all  # noqa: F401 (patches one_pass)


def mlp(*sizes):
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
    return nn.Sequential(nn.Flatten(), *layers)


# architecture, batch size, shape of an item
MODELS = {k: (model, 128, (3, 32, 32)) for k, model in ARCHITECTURES.items()}
MODELS.update(mlp=(partial(mlp, 64, 256, 256, 10), 1024, (64,)),
              mlp_wide=(partial(mlp, 3072, 512, 512, 10), 128, (3, 32, 32)))


VARIANTS = dict(one_pass={}, whole_batch=dict(hessian_share=1.), one_term=dict(n_terms=1), no_guard=dict(diverged=None),
                hdlr=dict(per='parameter'))


class Clock(Callback):
    "Seconds of each pass over the training batches, after a first one to warm up; validation is skipped"
    order = 99
    def __init__(self, device): self.device, self.seconds = device, []
    def before_train(self): self.began = clock(self.device)
    def after_train(self):
        self.seconds.append((clock(self.device) - self.began)[0 if self.device.type == 'cuda' else 1].item())
    def before_validate(self): raise CancelValidException


def learner(arch, n_batches, device):
    model, bs, shape = MODELS[arch]
    set_seed(0)
    images, targets = torch.randn(bs*n_batches, *shape), torch.randint(0, 10, (bs*n_batches,))
    dls = DataLoaders(loader(images, targets, bs, device), loader(images[:bs], targets[:bs], bs, device), device=device)
    learn = Learner(dls, model(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), lr=1e-3, wd=1e-4,
                    cbs=Clock(device))
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    return learn


def fit(learn):
    with learn.no_logging(): learn.fit(1)


def peak_memory(learn, device):
    "Bytes allocated at the peak of an epoch, weights and moments included"
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        fit(learn)
        return torch.cuda.max_memory_allocated()
    held = (sum(p.nbytes for p in learn.model.state_dict().values())
            + sum(o.nbytes for s in learn.opt.state.values() for o in s.values() if torch.is_tensor(o)))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler: fit(learn)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]' and event.device_index() < 0:
            now += event.nbytes()
            peak = max(peak, now)
    return held + peak


def cost(arch, n_batches, repeats, device):
    "Plain training and one-pass tuning, in alternation"
    runs = dict(plain=learner(arch, n_batches, device))
    for name, kwargs in VARIANTS.items():
        runs[name] = learner(arch, n_batches, device).one_pass(every=10, hyper_lr=1e-6, **kwargs)
    for _ in range(repeats + 1):
        for learn in runs.values(): fit(learn)
    seconds = {name: statistics.median(learn.clock.seconds[1:])/n_batches for name, learn in runs.items()}
    memory = {name: peak_memory(learn, device) for name, learn in runs.items()}
    return dict(arch=arch, bs=MODELS[arch][1], n_parameters=sum(p.numel() for p in runs['plain'].model.parameters()),
                ms_per_step={k: round(v*1e3, 3) for k, v in seconds.items()},
                time_ratio={k: round(v/seconds['plain'], 3) for k, v in seconds.items()},
                megabytes={k: round(v/2**20, 2) for k, v in memory.items()},
                memory_ratio={k: round(v/memory['plain'], 3) for k, v in memory.items()})


accept_underscores()


@call_parse
def main(
    archs:str='mlp,small_cnn,mlp_wide', # mlp, small_cnn, resnet18, mlp_wide (its memory is weights, not activations)
    n_batches:int=20, # Batches of an epoch
    repeats:int=7, # Alternations, each an epoch; the median counts
    out:str=None, # JSON file for the results
):
    "Cost of a training step with one-pass tuning, at every=10 and n_terms=5 unless its column says otherwise"
    device = default_device()
    rows = [cost(arch, n_batches, repeats, device) for arch in archs.split(',')]
    names = list(rows[0]['time_ratio'])
    print_table(['model', 'plain ms', *(f'{n} time' for n in names[1:]), 'plain MB',
                 *(f'{n} memory' for n in names[1:])],
                [[r['arch'], r['ms_per_step']['plain'], *(r['time_ratio'][n] for n in names[1:]),
                  r['megabytes']['plain'], *(r['memory_ratio'][n] for n in names[1:])] for r in rows])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(machine=machine(), every=10, n_terms=5, runs=rows), indent=1) + '\n')
