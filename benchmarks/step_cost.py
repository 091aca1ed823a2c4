"""What selection costs in a training step, and against what: taken in one process, in alternation, in milliseconds and
megabytes.

python benchmarks/step_cost.py --out benchmarks/results/step_cost_cpu.json
python benchmarks/step_cost.py --models resnet18 --methods rho_loss --fracs 0.1 \
    --out benchmarks/results/step_cost_cpu.json

A run adds what its file lacks, so that the whole can be measured in pieces; `--again` measures anew. Every case holds,
beside the package's step:

- `limit`: bare PyTorch, one forward without gradients over the candidates, in the package's scoring precision and
  memory format, and one training step on the selected;
- `reference`: bare PyTorch, the step as the paper's own code takes it, written here from its description: scored in
  train mode and float32, with its logging, sorting or drawing in NumPy;
- `selected` and `candidates`: bare PyTorch, plain training steps on n_b and on n_B items;
- `fastai`: fastai's own step on n_b items, which tells its loop's share from the selection's.

On a CPU the ratios are of the processor's seconds, which other work on the machine disturbs less than the clock's; both
are kept. Memory is the largest amount in use during a step beyond what was in use before it: on CUDA as PyTorch counts
it, on Linux the resident memory, which holds the libraries' work space too.
"""
import ctypes
import json
import math
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
from torch import nn

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_rho_loss import ARCHITECTURES
from common import accept_underscores, machine, print_table, same_machine

from rholoss_fastai.all import RankSample, ScoringForward, top_items

N_SELECTED = 32 # of RHO-LOSS, as published: candidates are n_b/frac
N_LOADED = 128 # of the methods that select within the loader's batch
STEPS = 3 # of each in turn


# The models, and random items for them

def random_images(n): return torch.randn(n, 3, 32, 32)
def random_digits(n): return torch.randn(n, 784)
def random_tokens(n): return torch.randint(0, 1000, (n, 32))


def mlp():
    "784-512-512-10, as published for QMNIST"
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


class TextClassifier(nn.Module):
    "A transformer encoder of two layers over 32 tokens, mean-pooled"
    def __init__(self, width=128):
        super().__init__()
        self.tokens,self.positions = nn.Embedding(1000, width),nn.Parameter(torch.zeros(32, width))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 2*width, batch_first=True), 2)
        self.head = nn.Linear(width, 10)

    def forward(self, x): return self.head(self.encoder(self.tokens(x) + self.positions).mean(1))


MODELS = dict(small_cnn=(ARCHITECTURES['small_cnn'], random_images),
              resnet18=(ARCHITECTURES['resnet18'], random_images), mlp=(mlp, random_digits),
              transformer=(TextClassifier, random_tokens))


# Steps in bare PyTorch

class BareLoop:
    "Training steps on the items that `choose(model, x, y, il, rows)` takes"
    def __init__(self, model, device, choose):
        self.model,self.choose = model.to(device),choose
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def __call__(self, x, y, il, rows):
        idxs = self.choose(self.model, x, y, il, rows)
        F.cross_entropy(self.model(x[idxs]), y[idxs]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def first_items(n): return lambda model, x, y, il, rows: slice(n)


def scored_at_the_limit(n, reducible):
    "The `n` highest losses, or reducible losses, by one forward in eval mode without gradients, as the package scores"
    forwards = {}
    def choose(model, x, y, il, rows):
        forward = forwards.setdefault(model, ScoringForward(model, x.device))
        model.eval()
        with torch.no_grad(): losses = F.cross_entropy(forward(x).float(), y, reduction='none')
        model.train()
        return top_items(losses - il if reducible else losses, n)
    return choose


def train_mode_losses(model, x, y):
    with torch.no_grad(): return F.cross_entropy(model(x), y, reduction='none')


def rho_loss_reference(n):
    "RHO-LOSS: what was selected is appended to one array, and the percentiles of six others are logged, at each step"
    log = dict(sequence=np.asarray([]))
    def choose(model, x, y, il, rows):
        losses = train_mode_losses(model, x, y)
        reducible = losses - il
        idxs = reducible.argsort(descending=True)[:n]
        values = dict(loss=losses, il=il, reducible=reducible)
        for name,o in {**values, **{f'{name}_selected': o[idxs] for name,o in values.items()}}.items():
            o = o.cpu().numpy()
            for p in (2.5, 25, 50, 75, 97.5): log[name, p] = np.percentile(o, p)
        log['sequence'] = np.append(log['sequence'], rows[idxs].cpu().numpy())
        return idxs
    return choose


def batch_loss_filter_reference(n):
    "BatchLossFilter: losses sorted and summed by NumPy on the host"
    def choose(model, x, y, il, rows):
        losses = train_mode_losses(model, x, y).cpu().numpy()
        order = np.argsort(losses)[::-1]
        share = np.cumsum(losses[order])/losses.sum()
        kept = max(int(np.argmax(share >= 0.01)) + 1, n)
        return torch.from_numpy(order[:kept].copy()).to(x.device)
    return choose


def selective_backprop_reference(n):
    "Selective-Backprop of Composer: a fixed number drawn by rank with NumPy"
    def choose(model, x, y, il, rows):
        order = train_mode_losses(model, x, y).argsort()
        p = (np.arange(len(y)) + 0.5)**(len(y)/n - 1)
        return order[torch.from_numpy(np.random.choice(len(y), n, replace=False, p=p/p.sum())).to(x.device)]
    return choose


# fastai's loop

class StepTimes(Callback):
    "Seconds, on the clock and of the processor, of each training step, all events included; validation is skipped"
    order = -99
    def __init__(self, device): self.device,self.seconds = device,[]
    def before_validate(self): raise CancelValidException
    def before_batch(self): self.began = clock(self.device)


class StepEnds(Callback):
    order = 99
    def after_batch(self):
        if self.training:
            self.learn.step_times.seconds.append(clock(self.learn.step_times.device) - self.learn.step_times.began)


def clock(device):
    if device.type == 'cuda': torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def loader(x, y, bs, device):
    "Batches of rows of two tensors, with next to no cost of their own"
    return DataLoader(list(range(len(y))), bs=bs, shuffle=True, drop_last=True, create_item=noop,
                      create_batch=lambda rows: (x[rows], y[rows]), retain=lambda b,_: b, device=device)


def learner(make_model, x, y, bs, device):
    dls = DataLoaders(loader(x, y, bs, device), loader(x[:bs], y[:bs], bs, device), device=device)
    learn = Learner(dls, make_model(), loss_func=CrossEntropyLossFlat(), lr=1e-3,
                    opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=[StepTimes(device), StepEnds()])
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    return learn


# A case: one model, method and fraction

def variants(model, method, frac, device):
    "Functions that take `STEPS` steps each and return their seconds `(STEPS, 2)`, by name; and n_B and n_b"
    make_model,random_items = MODELS[model]
    n_candidates,n = ((round(N_SELECTED/frac),N_SELECTED) if method == 'rho_loss'
                      else (N_LOADED,math.ceil(N_LOADED*frac)))
    x,y,il = random_items(n_candidates*STEPS),torch.randint(0, 10, (n_candidates*STEPS,)),torch.rand(n_candidates*STEPS)

    def of_fastai(bs, select=noop):
        learn = learner(make_model, *((x, y) if select is not noop else (x[:n*STEPS], y[:n*STEPS])), bs, device)
        select(learn)
        def run():
            learn.step_times.seconds.clear()
            with learn.no_logging(): learn.fit(1)
            return list(learn.step_times.seconds)
        run.learn = learn
        return run

    def of_bare(choose):
        loop = BareLoop(make_model(), device, choose)
        def run():
            seconds = []
            for rows in torch.randperm(len(y)).split(n_candidates):
                batch = [o[rows].to(device) for o in (x, y, il)]
                began = clock(device)
                loop(*batch, rows.to(device))
                seconds.append(clock(device) - began)
            return seconds
        return run

    def rho_loss(learn): learn.rho_loss(il, frac=frac, epoch='candidates') # `STEPS` steps, as of all
    # as many as `frac` says, whatever their losses
    def batch_loss_filter(learn): learn.batch_loss_filter(0.01, frac, warmup_epochs=0)
    def selective_backprop(learn): learn.selective_backprop(pick=RankSample(frac), warmup_epochs=0)
    select = dict(rho_loss=rho_loss, batch_loss_filter=batch_loss_filter, selective_backprop=selective_backprop)[method]
    reference = dict(rho_loss=rho_loss_reference, batch_loss_filter=batch_loss_filter_reference,
                     selective_backprop=selective_backprop_reference)[method]
    if method == 'selective_backprop': n = RankSample(frac).size(n_candidates)
    return (dict(package=of_fastai(n if method == 'rho_loss' else n_candidates, select),
                 limit=of_bare(scored_at_the_limit(n, method == 'rho_loss')), reference=of_bare(reference(n)),
                 selected=of_bare(first_items(n)), candidates=of_bare(first_items(n_candidates)), fastai=of_fastai(n)),
            n_candidates,n)


def resident(key):
    "Megabytes of a line of /proc/self/status"
    return int(next(line for line in Path('/proc/self/status').read_text().splitlines()
                    if line.startswith(key)).split()[1])/1024


def peak_memory(run, device):
    "Megabytes that `run` takes beyond those in use before, at its peak; None where the system doesn't tell"
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    linux = sys.platform == 'linux'
    if linux:
        # memory that was freed goes back to the system, or it would be taken again unseen
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5') # the peak counts from here
        before = resident('VmRSS')
    run()
    return resident('VmHWM') - before if linux else None


def in_milliseconds(seconds): return [round(float(q), 3) for q in np.quantile(seconds, [0.5, 0.25, 0.75])*1000]


def measure(model, method, frac, seconds, rounds, device):
    "One case: medians and quartiles of each variant over `rounds` rounds at least, and more until `seconds` are spent"
    set_seed(0)
    np.random.seed(0)
    runs,n_candidates,n = variants(model, method, frac, device)
    for run in runs.values(): run() # warms up
    memory = {name: peak_memory(run, device) for name,run in runs.items()}
    times,began = {name: [] for name in runs},time.perf_counter()
    while len(times['package']) < rounds*STEPS or time.perf_counter() - began < seconds:
        for name,run in runs.items(): times[name] += run()
    clock_ms,cpu_ms = ({name: in_milliseconds(np.array(values)[:,i]) for name,values in times.items()}
                       for i in range(2))
    megabytes = {name: None if o is None else round(o, 1) for name,o in memory.items()}
    kept = runs['package'].learn.selection.kept
    assert abs(kept*n_candidates - n) < 1e-6, f"{method} at {frac} kept {kept} of {n_candidates}"
    return dict(model=model, method=method, frac=frac, n_candidates=n_candidates, n_selected=n,
                steps=len(times['package']), forward=runs['package'].learn.selection.last('forward'),
                milliseconds=clock_ms, cpu_milliseconds=cpu_ms, megabytes=megabytes,
                **ratios(cpu_ms if device.type == 'cpu' else clock_ms))


def ratios(ms):
    "The package's step over each of the others'; and over 1.05 times the limit plus 2 ms, which it should stay below"
    package,limit = ms['package'][0],ms['limit'][0]
    return dict({f'over_{name}': round(package/values[0], 3) for name,values in ms.items()
                 if name not in ('package', 'fastai')},
                over_bound=round(package/(1.05*limit + 2), 3), overhead_ms=round(package - limit, 3),
                fastai_overhead_ms=round(ms['fastai'][0] - ms['selected'][0], 3))


# Results

def read(out):
    "The cases of a file, which must be of this machine"
    if not out or not Path(out).exists(): return []
    content = json.loads(Path(out).read_text())
    same_machine(content['machine'], machine(), out)
    return content['cases']


def write(out, cases):
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    cases = sorted(cases, key=lambda o: (list(MODELS).index(o['model']), o['method'], o['frac']))
    text = ',\n '.join(json.dumps(o) for o in cases)
    Path(out).write_text(f'{{"machine": {json.dumps(machine())},\n"cases": [\n {text}\n]}}\n')


def show(cases):
    names = ['package', 'limit', 'reference', 'selected', 'candidates', 'fastai']
    ms = 'milliseconds' if torch.cuda.is_available() else 'cpu_milliseconds'
    print_table(['model', 'method', 'n_B/n_b', *[f'{o} ms' for o in names], '/ limit', '/ (1.05 limit + 2)',
                 '/ reference', '/ selected', '/ candidates'],
                [[o['model'], o['method'], f"{o['n_candidates']}/{o['n_selected']}",
                  *[o[ms][name][0] for name in names], o['over_limit'], o['over_bound'], o['over_reference'],
                  o['over_selected'], o['over_candidates']] for o in cases])
    print()
    print_table(['model', 'method', 'n_B/n_b', *[f'{o} MB' for o in names]],
                [[o['model'], o['method'], f"{o['n_candidates']}/{o['n_selected']}",
                  *[o['megabytes'][name] for name in names]] for o in cases])


accept_underscores()


@call_parse
def main(
    models:str='small_cnn,resnet18,mlp,transformer', # Models
    methods:str='rho_loss,batch_loss_filter,selective_backprop', # Methods
    fracs:str='0.1,0.25,0.5', # RHO-LOSS: n_b/n_B, with n_b = 32
    kept:str='0.3,0.5,0.9', # The others: share kept of a batch of 128
    seconds:float=20., # Time for each case
    rounds:int=5, # Rounds of each case at least, of 3 steps each
    again:bool=False, # Measure also what the file already holds?
    out:str=None, # JSON file that the results are added to
):
    "Cost of a training step with selection"
    for names,known in ((models, MODELS), (methods, ('rho_loss', 'batch_loss_filter', 'selective_backprop'))):
        unknown = [o for o in names.split(',') if o not in known]
        if unknown: raise SystemExit(f"There is no {', '.join(unknown)}: choose among {', '.join(known)}.")
    device,done = default_device(),read(out)
    wanted = [(model, method, float(frac)) for model in models.split(',') for method in methods.split(',')
              for frac in (fracs if method == 'rho_loss' else kept).split(',')]
    def key(case): return case['model'],case['method'],case['frac']
    for case in wanted:
        if case in map(key, done) and not again: continue
        result = measure(*case, seconds, rounds, device)
        done = [o for o in done if key(o) != case] + [result]
        if out: write(out, done)
    show([o for o in done if key(o) in wanted])
