"""What `learn.rho_epochs()` buys a single run at equal cost, everything billed, by the rate fully decayed.

python benchmarks/rho_epochs.py --path <folder> --folder runs/rho_epochs --setting scratch --budgets 2000,4000 \
    --seeds 0,1,2
python benchmarks/rho_epochs.py --path <folder> --folder runs/rho_epochs --setting finetune --noise 0.3
python benchmarks/rho_epochs.py --path <folder> --folder runs/rho_epochs --size 16 --budgets 2000 --noise 0.2 --tail 20
python benchmarks/rho_epochs.py --folder runs/rho_epochs --out benchmarks/results/rho_epochs.json

A run is a method and its settings, `method:name=value,name=value`, and is kept in a file of its own, so a job that was
stopped goes on with the next one.

- `scratch`: 25 000 rows of CIFAR-10, a small CNN, batches of 32, Adam at 1e-3. A budget is so many steps of plain
  training. A method that pays for irreducible losses takes fewer: those that are left when the seconds they took,
  measured as they were made, are taken for steps of the same run.
- `finetune`: EfficientNet-Lite0 with ImageNet's weights, 6 000 rows at 64 pixels, four epochs of one cycle, as a user
  types it: by the default the probe's cost is counted and taken off the steps. `rho_epochs:epoch="rows"` takes one pass
  over the chosen rows instead. Tested on 5 000 rows.

Seconds are the processor's, which other work on the machine disturbs less than the clock's; both are kept. Evaluations
are left out.
"""
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (patches `fit_one_cycle`)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_data import CIFAR_STATS, CONFUSED, LITE_STATS, ImageRows, image_loaders, pretrained_body, read_images
from common import accept_underscores, machine, print_table

from rholoss_fastai.all import long_tail_rows, redraw_labels, small_cnn

SETTINGS = dict(scratch=dict(rows=25_000, size=32, lr=1e-3, bs=32, noise=0.2, budgets='2000,4000',
                             runs='plain rho_epochs'),
                finetune=dict(rows=6_000, size=64, lr=1e-3, bs=32, noise=0.3, budgets='4', runs='plain rho_epochs'))


class Budget(Callback):
    "Ends the fit after so many steps, by which the rate is scheduled, less those of irreducible losses; no validation"
    order = -6 # before what chooses rows
    def __init__(self, n_steps): self.n_steps,self.step,self.billed,self.began = n_steps,0,0.,None

    @property
    def left(self):
        "Steps of the whole fit, as far as can be told now"
        if not self.billed or self.step < 20: return self.n_steps
        return max(self.step,
                   self.n_steps - self.billed*self.step/(time.process_time() - self.began - self.billed_since))

    def before_train(self):
        if self.began is None: self.began,self.billed_before = time.process_time(),self.billed
        self.learn.pct_train = min(1., self.step/self.left)
    @property
    def billed_since(self): return self.billed - self.billed_before
    def before_batch(self):
        if self.training: self.before_train()
    def before_validate(self): raise CancelValidException
    def after_step(self): self.step += 1
    def after_batch(self):
        if self.training and self.step >= self.left - 0.5: raise CancelFitException


class NoValidation(Callback):
    def before_validate(self): raise CancelValidException


def billed(budget):
    "Count the processor's seconds that irreducible losses take, as they are made"
    from rholoss_fastai.rho_epochs import RhoEpochs
    def timed(func):
        def run(*args, **kwargs):
            began = time.process_time()
            try: return func(*args, **kwargs)
            finally: budget.billed += time.process_time() - began
        return run
    kept = {name: getattr(RhoEpochs, name) for name in ('begin', 'prepare')}
    for name,func in kept.items(): setattr(RhoEpochs, name, timed(func))
    return lambda: [setattr(RhoEpochs, name, func) for name,func in kept.items()]


def read_run(run):
    "Method and settings of `run`"
    method,_,options = run.partition(':')
    if method not in ('plain', 'rho_epochs'): raise SystemExit(f"{run!r} names no method: plain or rho_epochs.")
    return method,{name: json.loads(value) for name,value in (o.split('=') for o in options.split(',') if o)}


def evaluate(learn, test):
    "Test accuracy, and the recall of each class"
    model = learn.model.eval()
    with torch.no_grad(): pred = torch.cat([model(x).argmax(1) for x,_ in test])
    targets = torch.cat([y for _,y in test])
    return ((pred == targets).float().mean().item(),
            [round((pred[targets == c] == c).float().mean().item(), 4) for c in range(10)])


def one_run(make_dls, test, setting, noisy, budget, seed, method, options):
    "Train once, and say what came of it"
    set_seed(seed) # of the loaders too, so that runs of a seed see the same batches
    dls = make_dls()
    model = (small_cnn(size=dls.train.dataset.images.shape[-1]) if setting.startswith('scratch')
             else pretrained_body()).to(memory_format=torch.channels_last)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    # `Budget` takes off what was measured; a fine-tune takes off what is counted, as everybody's does
    if method == 'rho_epochs':
        learn.rho_epochs(seed=seed, **(dict(epoch='steps') if setting.startswith('scratch') else {}), **options)
    steps = Budget(budget) if setting.startswith('scratch') else NoValidation()
    n_epoch = math.ceil(budget/len(dls.train)) if setting.startswith('scratch') else budget
    counter = steps if setting.startswith('scratch') else Budget(0)
    restore,began,cpu = billed(counter),time.perf_counter(),time.process_time()
    try:
        with learn.no_bar(): learn.fit_one_cycle(n_epoch, SETTINGS[setting.split('_')[0]]['lr'], cbs=steps)
    finally: restore()
    res = dict(seconds=round(time.perf_counter() - began, 2), cpu_seconds=round(time.process_time() - cpu, 2),
               billed=round(counter.billed, 2))
    res['accuracy'],res['recall'] = evaluate(learn, test)
    if method == 'plain': res['steps'] = steps.step if setting.startswith('scratch') else budget*len(dls.train)
    else:
        n_steps = -(-learn.selection.total('trained')//dls.train.bs)
        res['steps'] = steps.step if setting.startswith('scratch') else n_steps
        times,rule = learn.selection.selected.float(),learn.epoch_pruner.rule
        res.update(wrong_estimate=rule.wrong, drop=rule.drop, plain=rule.plain)
        if noisy.any(): res['wrong_trained'] = (times[noisy].sum()/times.sum()).item()
    return res


def table_of(runs):
    "Points above the plain run of the same seed, noise and budget, and the share of its seconds"
    def key(o): return o['setting'],o['noise'],o['budget']
    plain = {(*key(o), o['seed']): o for o in runs if o['run'] == 'plain'}
    table = []
    for k,run in dict.fromkeys((key(o), o['run']) for o in runs):
        own = sorted((o for o in runs if (key(o), o['run']) == (k, run)), key=lambda o: o['seed'])
        row = dict(setting=k[0], noise=k[1], budget=k[2], run=run, accuracy=[round(o['accuracy'], 4) for o in own],
                   cpu_seconds=[o['cpu_seconds'] for o in own], billed=[o['billed'] for o in own],
                   lowest_recall=[min(o['recall']) for o in own], steps=[o['steps'] for o in own],
                   mean=round(np.mean([o['accuracy'] for o in own]).item(), 4))
        against = [plain.get((*k, o['seed'])) for o in own]
        if run != 'plain' and all(against):
            row['points'] = [round(100*(o['accuracy'] - p['accuracy']), 2) for o,p in zip(own, against)]
            row['cost'] = [round(o['cpu_seconds']/p['cpu_seconds'], 3) for o,p in zip(own, against)]
        table.append(row)
    return table


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/
    folder:str='runs/rho_epochs', # A file for each run
    setting:str='scratch', # scratch or finetune
    noise:float=None, # Share of the training labels redrawn; default 0.2 and 0.3
    confusion:store_true=False, # Redraw them as the class that each is taken for, not uniformly?
    tail:float=1., # The rarest class has so many times fewer rows than the first
    size:int=None, # Height and width of the images; default the setting's own
    budgets:str=None, # scratch: plain steps, several with commas; finetune: epochs
    seeds:str='0,1,2', # Of weights and batches
    runs:str=None, # Methods and their settings, with spaces between
    rows:int=0, # Training rows, evenly spaced; 0: the setting's own
    threads:int=1, # Threads of PyTorch
    out:str=None, # Write the table of all runs in `folder` to this file
):
    "Plain training and `rho_epochs` at equal cost"
    if setting not in SETTINGS: raise SystemExit(f"--setting must be one of {', '.join(SETTINGS)}; got {setting!r}.")
    if rows and tail > 1: raise SystemExit('--rows and --tail both choose training rows: give one of them.')
    folder,defaults = Path(folder),SETTINGS[setting]
    noise = defaults['noise'] if noise is None else noise
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    if path:
        path,size,rows = Path(path),size or defaults['size'],rows or defaults['rows']
        setting += f"{'_confused' if confusion else ''}{f'_tail{tail:g}' if tail > 1 else ''}"
        if size != defaults['size']: setting += f'_size{size}'
        images,targets,files = read_images(path/'train', size)
        some = (torch.arange(0, len(targets), max(1, len(targets)//rows))[:rows] if tail == 1
                else long_tail_rows(targets, tail))
        images,targets,files = images[some],targets[some],[files[i] for i in some.tolist()]
        labels,noisy = redraw_labels(targets, noise, CONFUSED if confusion else None)
        stats = LITE_STATS if setting.startswith('finetune') else CIFAR_STATS
        train,test = ImageRows(images, labels, files, stats),ImageRows(*read_images(path/'test', size), stats)
        if setting.startswith('finetune'): test = test.of(torch.arange(0, len(test), 2))
        batches,make_dls = test.batches('cpu'),partial(image_loaders, train, test, defaults['bs'])
        for budget in map(int, (budgets or defaults['budgets']).split(',')):
            for seed in map(int, seeds.split(',')):
                for run in (runs or defaults['runs']).split():
                    name = f'{setting}-{len(train)}-{noise:g}-{budget}-{run}-{seed}'.replace('"', '').replace(':', '_')
                    file = folder/f'{name}.json'
                    if file.exists(): continue
                    method,options = read_run(run)
                    result = one_run(make_dls, batches, setting, noisy, budget, seed, method, options)
                    result = dict(setting=setting, rows=len(train), noise=noise, budget=budget, run=run, seed=seed,
                                  **result, machine=machine())
                    file.write_text(json.dumps(result))
                    print(name, {k: result[k] for k in ('accuracy', 'cpu_seconds', 'billed', 'steps')}, flush=True)
    table = table_of([json.loads(f.read_text()) for f in sorted(folder.glob('*.json'))])
    columns = ('setting', 'noise', 'budget', 'run', 'mean', 'accuracy', 'points', 'cost', 'lowest_recall',
               'cpu_seconds', 'billed', 'steps')
    print_table(columns, [[row.get(k, '') for k in columns] for row in table])
    if out: Path(out).write_text(json.dumps(dict(machine=machine(), table=table), indent=1) + '\n')
