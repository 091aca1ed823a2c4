"""What bookkeeping costs as the data set, the candidate batch and the number of steps grow, on synthetic rows.

python benchmarks/scaling.py --out benchmarks/results/scaling.json

The parts: `order`, noting the order of an epoch, which fastai's loader has drawn; `rows`, the rows of a batch;
`lookup`, their irreducible losses; `ledger`, counting a batch in the record; `epoch`, opening and closing an epoch's
line in it. A batch's bookkeeping is the sum, with its share of what is done once an epoch. Seconds are the processor's,
on CUDA the clock's.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from fastai.data.load import DataLoader
from fastai.torch_core import default_device, set_seed
from fastcore.basics import noop
from fastcore.script import call_parse

sys.path.extend(str(Path(__file__).parent/o) for o in ('.', '../recipes'))
from common import accept_underscores, machine, print_table
from step_cost import clock, resident

from rholoss_fastai.all import IrreducibleLosses, SelectionRecord, track_rows

N_CANDIDATES, FRAC, STEP_MS = 320, 0.1, 10.


class Rows:
    "A data set of `n` random rows in memory"
    def __init__(self, n): self.items,self.targets = torch.randn(n, 2),torch.randint(0, 10, (n,))
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return self.items[i],self.targets[i]


def loader(dataset, bs, device):
    return DataLoader(dataset, bs=bs, shuffle=True, drop_last=True, create_item=noop,
                      create_batch=lambda rows: (dataset.items[rows], dataset.targets[rows]), retain=lambda b,_: b,
                      device=device)


def seconds(device, f, *args):
    "Seconds that `f` takes, and what it returns"
    began = clock(device)
    res = f(*args)
    return (clock(device) - began)[0 if device.type == 'cuda' else 1],res


def median(values): return float(np.median(values))


class Batches:
    "The bookkeeping of candidate batches: their rows, their irreducible losses, and the record"
    def __init__(self, dataset, il, bs, device):
        self.bs,self.device,self.n_b,self.il = bs,device,max(1, round(bs*FRAC)),il.values.to(device)
        dl,idxs = loader(dataset, bs, device),np.random.permutation(len(dataset)).tolist()
        dl.get_idxs = lambda: idxs # fastai's own shuffling takes far longer than what is measured here
        self.tracked,self.record,self.n_batches = track_rows(dl),SelectionRecord(),len(dl)
        self.losses = [torch.rand(bs, device=device) for _ in range(8)]

    def order(self):
        "Seconds of noting an epoch's order"
        return seconds(self.device, self.tracked.get_idxs)[0]

    def epoch(self, k, first=0):
        "Seconds of each part for `k` batches, and of opening and closing their epoch"
        def rows(): return [self.tracked.rows((first + i) % self.n_batches, self.device) for i in range(k)]
        def lookup(rows): return [self.il[o] for o in rows]
        def ledger(rows, il):
            for i in range(k):
                losses = self.losses[i % 8]
                scores = losses - il[i]
                idxs = scores.topk(self.n_b).indices
                self.record.batch(self.bs, self.bs, self.n_b, rows[i], rows[i][idxs], idxs, scores, losses, il[i])
        def selection(rows, il):
            for i in range(k): rows[i][(self.losses[i % 8] - il[i]).topk(self.n_b).indices]
        res = dict(epoch=seconds(self.device, self.record.start_epoch, self.device, len(self.il))[0])
        res['rows'],rows = seconds(self.device, rows)
        res['lookup'],il = seconds(self.device, lookup, rows)
        res['ledger'] = seconds(self.device, ledger, rows, il)[0] - seconds(self.device, selection, rows, il)[0]
        res['epoch'] += seconds(self.device, self.record.end_epoch)[0]
        return res

    def bytes_a_row(self):
        "Of all that is kept for each row"
        kept = [self.tracked.tracker.order, self.il, self.record.seen, self.record.selected]
        return sum({o.data_ptr(): o.numel()*o.element_size() for o in kept}.values())/len(self.il)


def bookkeeping(dataset, il, bs, device, batches, repeats):
    "Microseconds a batch of each part, and of all, as medians of `repeats` epochs of `batches` batches"
    run = Batches(dataset, il, bs, device)
    order = [run.order() for _ in range(repeats)]
    k = min(batches, run.n_batches)
    parts = [run.epoch(k) for _ in range(repeats + 1)][1:] # the first warms up
    us = {name: 1e6*median([o[name] for o in parts])/k for name in ('rows', 'lookup', 'ledger')}
    us.update({name: 1e6*value/run.n_batches
               for name,value in dict(order=median(order), epoch=median([o['epoch'] for o in parts])).items()})
    us['all'] = sum(us.values())
    return dict(n_rows=len(dataset), n_candidates=bs, microseconds={name: round(value, 2) for name,value in us.items()},
                nanoseconds_an_item=round(1000*us['all']/bs, 1), share_of_step=round(us['all']/1000/STEP_MS, 5),
                bytes_a_row=round(run.bytes_a_row(), 2))


def files(dataset, values, device, folder, repeats):
    "Seconds of making, saving, loading and checking `IrreducibleLosses`"
    path,dl = Path(folder)/'il.safetensors',loader(dataset, N_CANDIDATES, device)
    made,il = seconds(device, IrreducibleLosses.of, values, dl)
    calls = dict(save=(il.save, path), load=(IrreducibleLosses.load, path), check=(il.check, dl))
    own = {name: median([seconds(device, *call)[0] for _ in range(repeats)]) for name,call in calls.items()}
    return dict(n_rows=len(dataset), make=round(made, 4), **{name: round(o, 4) for name,o in own.items()},
                bytes_a_row=round(path.stat().st_size/len(dataset), 2)),il


def growth(dataset, il, device, windows, batches):
    "The same bookkeeping after more and more steps, beside an array that each step appends to"
    run,log,res = Batches(dataset, il, N_CANDIDATES, device),np.asarray([]),[]
    run.order()
    rows = np.arange(run.n_b)
    def append():
        nonlocal log
        for _ in range(batches): log = np.append(log, rows)
    run.epoch(batches)
    for window in range(windows):
        parts = run.epoch(batches, first=window*batches)
        us = 1e6*(parts['rows'] + parts['lookup'] + parts['ledger'])/batches
        res.append(dict(steps=(window + 1)*batches, microseconds=round(us, 2),
                        append_microseconds=round(1e6*seconds(device, append)[0]/batches, 2),
                        resident_mb=round(resident('VmRSS') - log.nbytes/2**20, 1) if sys.platform == 'linux'
                        else None))
    return res


def show(result):
    parts = ('order', 'rows', 'lookup', 'ledger', 'epoch', 'all')
    print_table(['rows', 'candidates', *[f'{k} us' for k in parts], f'% of {STEP_MS:g} ms', 'ns an item',
                 'bytes a row'],
                [[f"{o['n_rows']:,}", o['n_candidates'], *[f"{o['microseconds'][k]:.1f}" for k in parts],
                  f"{100*o['share_of_step']:.2f}", o['nanoseconds_an_item'], o['bytes_a_row']]
                 for o in result['rows'] + result['candidates']])
    print()
    print_table(['rows', 'made s', 'saved s', 'loaded s', 'checked s', 'bytes a row'],
                [[f"{o['n_rows']:,}", o['make'], o['save'], o['load'], o['check'], o['bytes_a_row']]
                 for o in result['files']])
    print()
    print_table(['steps', 'us a batch', 'of an array appended to', 'resident MB'],
                [[o['steps'], o['microseconds'], o['append_microseconds'], o['resident_mb']] for o in result['steps']])


accept_underscores()


@call_parse
def main(
    rows:str='10000,100000,1000000,10000000', # Sizes of the data set, at 320 candidates
    candidates:str='64,320,1280,5120', # Sizes of the candidate batch, at the third of the sizes above
    batches:int=500, # Batches of an epoch that are measured
    windows:int=10, # Windows of the growth with steps, of 4 times as many batches
    repeats:int=5, # Epochs
    out:str=None, # JSON file for the results
):
    "Bookkeeping by rows, candidates and steps"
    set_seed(0)
    device,sizes = default_device(),[int(o) for o in rows.split(',')]
    result = dict(machine=machine(), step_ms=STEP_MS, frac=FRAC, rows=[], candidates=[], files=[])
    for i,n in enumerate(sizes):
        dataset = Rows(n)
        with tempfile.TemporaryDirectory() as folder: cost,il = files(dataset, torch.rand(n), device, folder, repeats)
        result['files'].append(cost)
        result['rows'].append(bookkeeping(dataset, il, min(N_CANDIDATES, n), device, batches, repeats))
        if i == min(2, len(sizes) - 1):
            result['candidates'] = [bookkeeping(dataset, il, int(bs), device, batches, repeats)
                                    for bs in candidates.split(',')]
            result['steps'] = growth(dataset, il, device, windows, 4*batches)
    show(result)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        lines = [f' "{k}": ' + (json.dumps(v) if not isinstance(v, list) else '[\n  ' + ',\n  '.join(map(json.dumps, v))
                                + '\n ]') for k,v in result.items()]
        Path(out).write_text('{\n' + ',\n'.join(lines) + '\n}\n')
