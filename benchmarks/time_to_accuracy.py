"""What selection buys on the clock: CIFAR-10 with wrong labels, or clean, by a small CNN; even rows train, odd rows are the IL model's.

python benchmarks/time_to_accuracy.py --path <folder> --noise 0.2 --il_file il.safetensors --folder runs/tta --runs 'uniform rho_loss:frac=0.5'
python benchmarks/time_to_accuracy.py --path <folder> --noise 0.2 --il_file il.safetensors --folder runs/tta --schedule decayed --budgets 2000,4000
python benchmarks/time_to_accuracy.py --folder runs/tta --out benchmarks/results/time_to_accuracy.json

A run is a method and its settings, `method:name=value,name=value`; `bs` is the DataLoader's batch size, `proxy=true` scores with a narrow CNN. Each is
kept in a file of its own, so a job that was stopped goes on with the next one. Two schedules:

- `constant`: the learning rate as it is, `--steps` steps; with `--until` a run ends when it has passed the best of the uniform run of its seed;
- `decayed`: the learning rate falls to 0 within each budget, as a comparison at equal cost needs ("No Train No Gain"). A budget is so many uniform
  steps; every method takes the steps that the same seconds buy, by the cost of a step measured in alternation beforehand.

Seconds leave evaluations out, and are counted three times: on the clock; of the processor, which other work on the machine disturbs less; and as steps times
the cost of a step, measured for all runs in one process in alternation, which it disturbs least. On a CPU the budgets and the table go by the processor's.
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import SchedCos
from fastai.learner import Learner
from fastai.torch_core import default_device, set_seed
from fastcore.script import bool_arg, call_parse

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from cifar10_data import ImageRows, image_loader, image_loaders, read_images  # noqa: E402
from cifar10_rho_loss import make_learner  # noqa: E402
from compare_selectors import narrow_cnn  # noqa: E402
from common import accept_underscores, best, fit_steps, machine, print_table, same_machine, steps_to  # noqa: E402
from torch import nn  # noqa: E402

from rholoss_fastai.all import IrreducibleLosses, Uniform, fit_irreducible, redraw_labels  # noqa: E402

METHODS = ('uniform', 'random', 'rho_loss', 'batch_loss_filter', 'selective_backprop')
RUNS = ('uniform random:frac=0.25 rho_loss:frac=0.5,compile=true rho_loss:frac=0.33,compile=true rho_loss:frac=0.25,compile=true '
        'rho_loss:frac=0.1,compile=true batch_loss_filter:bs=64 selective_backprop:keep=0.5,bs=64')


# A run: `method:name=value,...`

def read_value(text):
    "A number, a precision, or the word itself"
    if text in ('float32', 'bfloat16', 'float16'): return getattr(torch, text)
    try: return json.loads(text)
    except json.JSONDecodeError: return text


def read_run(run):
    "Method and settings of `run`"
    method,_,options = run.partition(':')
    if method not in METHODS: raise SystemExit(f"{run!r} names no method: choose among {', '.join(METHODS)}.")
    return method,dict((name, read_value(value)) for name,value in (o.split('=') for o in options.split(',') if o))


def select(learn, method, settings, il, seed):
    "Let `learn` select"
    if method == 'random': learn.rho_loss(pick=Uniform(**settings, seed=seed), epoch='candidates')
    if method == 'rho_loss':
        if settings.pop('proxy', False): settings['proxy'] = Learner(learn.dls, narrow_cnn(), loss_func=learn.loss_func, opt_func=learn.opt_func, lr=learn.lr)
        learn.rho_loss(il, **{'epoch': 'candidates', **settings})
    # no epoch of warm-up, so that a step costs the same all through the run
    if method == 'batch_loss_filter': learn.batch_loss_filter(**settings, warmup_epochs=0)
    if method == 'selective_backprop': learn.selective_backprop(**settings, seed=seed, warmup_epochs=0)
    return learn


class DecayedRate(Callback):
    "The learning rate falls to 0 as half a cosine over `n_steps` training steps"
    def __init__(self, n_steps): self.n_steps,self.step = n_steps,0
    def before_fit(self): self.rate = SchedCos(self.opt.hypers[-1]['lr'], 0.)
    def before_batch(self):
        if not self.training: return
        self.opt.set_hyper('lr', self.rate(self.step/self.n_steps))
        self.step += 1


class StopAbove(Callback):
    "Ends training at the first evaluation with an accuracy of at least `accuracy`"
    order = 71 # after Evaluations
    def __init__(self, accuracy): self.accuracy = accuracy
    def after_batch(self):
        if self.training and self.evaluations.history and self.evaluations.history[-1][2] >= self.accuracy: raise CancelFitException


def read_data(path, noise, noise_seed):
    "Training rows (even) with their holdout (odd), the rows whose labels are wrong, the test set, and every other image of it"
    images,targets,files = read_images(Path(path)/'train')
    labels,noisy = redraw_labels(targets, noise, seed=noise_seed)
    everything,test = ImageRows(images, labels, files),ImageRows(*read_images(Path(path)/'test'))
    even,odd = torch.arange(0, len(labels), 2),torch.arange(1, len(labels), 2)
    return SimpleNamespace(train=everything.of(even), holdout=everything.of(odd), noisy=noisy[even], test=test, noise=noise,
                           on_the_way=test.of(torch.arange(0, len(test), 2)))


def irreducible(data, il_file, noise_seed, device, epochs, lr, one_cycle):
    "Irreducible losses from `il_file`; fitted and written to it where it isn't there"
    if Path(il_file).exists(): return IrreducibleLosses.load(il_file)
    set_seed(noise_seed)
    learn = make_learner(image_loaders(data.holdout, data.test, min(320, len(data.holdout)), augment=True, device=device), 'small_cnn', lr)
    il = fit_irreducible(learn, image_loader(data.train, 500, shuffle=False, device=device), epochs, one_cycle=one_cycle)
    il.save(il_file)
    return il


def new_learner(run, data, options, seed, il):
    "A Learner that selects as `run` says"
    method,settings = read_run(run)
    set_seed(seed)
    learn = make_learner(image_loaders(data.train, data.test, settings.pop('bs', options.bs), device=options.device), options.arch, options.lr)
    if settings.get('scale_factor', 1) < 1 and options.arch == 'small_cnn':
        # so that its last layer takes smaller images; the identity at 32 pixels
        learn.model.insert(len(learn.model) - 2, nn.AdaptiveAvgPool2d(4))
    return select(learn, method, settings, il, seed)


def accuracy(learn, batches):
    "Share of the images in `batches` classified correctly"
    model = learn.model.eval()
    with torch.no_grad(): right = [(model(x).argmax(1) == y).float() for x,y in batches]
    return round(torch.cat(right).mean().item(), 5)


def fit_run(run, data, options, seed, n_steps, every, decayed, il, until=None):
    "Train, and what came of it"
    learn = new_learner(run, data, options, seed, il)
    cbs = ([DecayedRate(n_steps)] if decayed else []) + ([StopAbove(until)] if until else [])
    evaluations = fit_steps(learn, data.on_the_way.batches(options.device), n_steps, every, cbs)
    method = read_run(run)[0]
    result = dict(run=run, method=method, noise=data.noise, seed=seed, bs=options.bs, lr=options.lr, arch=options.arch, steps=evaluations.step,
                  final=accuracy(learn, data.test.batches(options.device)), history=evaluations.history, cpu_seconds=evaluations.cpu_seconds,
                  il_seconds=il.info['seconds'] if method == 'rho_loss' else 0., machine=machine())
    if method != 'uniform':
        selected = learn.selection.selected.cpu()
        result.update(noisy_selected=round((selected[data.noisy].sum()/selected.sum()).item(), 4),
                      trained_share=round(evaluations.items/max(1, learn.selection.total('loaded')), 4))
    return result


def write(path, content):
    "Whole or not at all"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content) + '\n')
    os.replace(temporary, path)


def step_costs(runs, data, options, il, path, rounds=3, steps=40):
    "Seconds of a step of each run, by alternating short fits; kept in `path`, so that a job that goes on has the same budgets"
    costs = json.loads(path.read_text()) if path.exists() else {}
    missing = [run for run in runs if run not in costs]
    if missing:
        measured = {run: [] for run in ['uniform', *missing]}
        for _ in range(rounds):
            for run in measured:
                evaluations = fit_steps(new_learner(run, data, options, 0, il), data.on_the_way.batches(options.device)[:1], steps, steps)
                measured[run].append(seconds_of(dict(history=evaluations.history, cpu_seconds=evaluations.cpu_seconds, machine=machine()))[-1]/steps)
        # the cheapest of each, as disturbances only add; in units of the uniform step, which an earlier job may have measured on a busier machine
        new = {run: min(o) for run,o in measured.items()}
        costs = {**{run: cost*costs.get('uniform', new['uniform'])/new['uniform'] for run,cost in new.items()}, **costs}
        write(path, costs)
    return costs


# Tables

def on_cpu(result): return result['machine']['device'].startswith('CPU')
def seconds_of(result):
    "Seconds up to each evaluation: the processor's on a CPU, else the clock's"
    return result['cpu_seconds'] if on_cpu(result) else [row[3] for row in result['history']]


def reached(result, target):
    "Steps, clock seconds and processor seconds until the accuracy `target` was first met, or None"
    row = steps_to(result['history'], target)
    return row and (row[0], row[3], result['cpu_seconds'][result['history'].index(row)])


def mean(values): return round(float(np.mean(values)), 4)


def constant_table(results, costs=None):
    "A line a run: means over seeds, as shares of what the uniform run of the same seed took to its best; IL seconds by the clock"
    costs = costs or {}
    uniform = costs.get('uniform')
    base = {o['seed']: o for o in results if o['run'] == 'uniform'}
    table = []
    for run in dict.fromkeys(o['run'] for o in results):
        own = [o for o in results if o['run'] == run and o['seed'] in base]
        pairs = [(reached(o, best(base[o['seed']]['history'])), reached(base[o['seed']], best(base[o['seed']]['history'])), o) for o in own]
        line = dict(run=run, seeds=len(own), best=mean([best(o['history']) for o in own]), reached=sum(a is not None for a,_,_ in pairs))
        if 'noisy_selected' in own[0]: line['noisy_selected'] = mean([o['noisy_selected'] for o in own])
        pairs = [o for o in pairs if o[0]]
        if pairs:
            i = 2 if on_cpu(own[0]) else 1
            line.update(steps=mean([a[0] for a,_,_ in pairs]), seconds=mean([a[i] for a,_,_ in pairs]),
                        steps_share=mean([a[0]/b[0] for a,b,_ in pairs]), seconds_share=mean([a[i]/b[i] for a,b,_ in pairs]),
                        seconds_shares=[round(a[i]/b[i], 3) for a,b,_ in pairs], clock_share=mean([a[1]/b[1] for a,b,_ in pairs]),
                        il_seconds=mean([o['il_seconds'] for o in own]),
                        with_il=mean([(a[i] + o['il_seconds'])/b[i] for a,b,o in pairs]),
                        amortised=mean([(a[i] + o['il_seconds']/len(own))/b[i] for a,b,o in pairs]))
            if run in costs:
                cost = costs[run]/uniform # in alternation: runs are hours apart, and what else the machine does changes
                line.update(step_cost=round(cost, 3), alternated_share=mean([cost*a[0]/b[0] for a,b,_ in pairs]),
                            alternated_shares=[round(cost*a[0]/b[0], 3) for a,b,_ in pairs],
                            alternated_with_il=mean([(cost*a[0] + o['il_seconds']/uniform)/b[0] for a,b,o in pairs]),
                            alternated_amortised=mean([(cost*a[0] + o['il_seconds']/len(own)/uniform)/b[0] for a,b,o in pairs]))
        table.append(line)
    return table


def decayed_table(results):
    "A line a run and budget: means over seeds, beside the uniform run's at the same budget and seed"
    base = {(o['budget'], o['seed']): o for o in results if o['run'] == 'uniform'}
    table = []
    for budget,run in sorted({(o['budget'], o['run']) for o in results}):
        own = [o for o in results if (o['budget'], o['run']) == (budget, run) and (budget, o['seed']) in base]
        if not own: continue
        others = [base[budget, o['seed']] for o in own]
        table.append(dict(run=run, budget=budget, seeds=len(own), steps=own[0]['steps'], seconds=mean([seconds_of(o)[-1] for o in own]),
                          seconds_share=mean([seconds_of(o)[-1]/seconds_of(b)[-1] for o,b in zip(own, others)]),
                          final=mean([o['final'] for o in own]), finals=[o['final'] for o in own],
                          gain=mean([o['final'] - b['final'] for o,b in zip(own, others)]),
                          gains=[round(o['final'] - b['final'], 4) for o,b in zip(own, others)]))
    return table


def show(groups):
    def number(line, key, form='.2f'): return format(line[key], form) if key in line else '-'
    for noise,group in groups.items():
        print(f"Share of labels redrawn: {noise}")
        if group['constant']:
            print_table(['constant rate', 'seeds', 'best', "reached uniform's", 'steps', 'share', 'seconds', 'share', 'of the clock', 'with IL',
                         'amortised', 'step cost', 'share by it', 'with IL', 'amortised', 'noisy among selected'],
                        [[o['run'], o['seeds'], f"{o['best']:.4f}", o['reached'], number(o, 'steps', '.0f'), number(o, 'steps_share'),
                          number(o, 'seconds', '.0f'), number(o, 'seconds_share'), number(o, 'clock_share'), number(o, 'with_il'), number(o, 'amortised'),
                          number(o, 'step_cost'), number(o, 'alternated_share'), number(o, 'alternated_with_il'), number(o, 'alternated_amortised'),
                          number(o, 'noisy_selected', '.3f')] for o in group['constant']])
            print()
        if group['decayed']:
            print_table(['rate decayed to 0', 'budget (uniform steps)', 'seeds', 'steps', 'seconds', "share of uniform's", 'final', 'gain', 'gains'],
                        [[o['run'], o['budget'], o['seeds'], o['steps'], f"{o['seconds']:.0f}", f"{o['seconds_share']:.2f}", f"{o['final']:.4f}",
                          f"{o['gain']:+.4f}", ' '.join(f'{g:+.3f}' for g in o['gains'])] for o in group['decayed']])
            print()


def summarise(folder):
    "Tables and histories of all runs in `folder`, by noise, and the machine"
    results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob('*/*.json'))]
    def costs(noise):
        path = Path(folder)/f'costs-noise{noise}.json'
        return json.loads(path.read_text()) if path.exists() else {}
    if not results: raise SystemExit(f"There is no run in {folder}.")
    for o in results: same_machine(o['machine'], results[0]['machine'], f"{o['run']}, seed {o['seed']}")
    order = {run: i for i,run in enumerate(dict.fromkeys(['uniform', *RUNS.split(), *(o['run'] for o in results)]))}
    groups = {}
    for noise in sorted({o['noise'] for o in results}, reverse=True):
        of_noise = sorted((o for o in results if o['noise'] == noise), key=lambda o: (order[o['run']], o['seed']))
        constant,decayed = ([o for o in of_noise if ('budget' in o) == with_budget] for with_budget in (False, True))
        groups[str(noise)] = dict(constant=constant_table(constant, costs(noise)), decayed=decayed_table(decayed),
                                  histories=[dict(run=o['run'], seed=o['seed'], steps=[row[0] for row in o['history']], seconds=seconds_of(o),
                                                  accuracy=[row[2] for row in o['history']]) for o in constant])
    settings = {k: results[0][k] for k in ('bs', 'lr', 'arch')}
    return dict(machine=results[0]['machine'], settings=settings, noise=groups)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder with train/<class>/ and test/<class>/; without it nothing is trained, and the runs in `folder` are summarised
    folder:str='runs/time_to_accuracy', # Folder of the runs, a file each
    runs:str=RUNS, # Runs, separated by spaces
    seeds:str='0,1,2', # Seeds of weights and batches
    schedule:str='constant', # constant, or decayed to 0 within each of `budgets`
    steps:int=4000, # Constant rate: training steps
    until:float=None, # Constant rate: stop when the uniform run's best of the same seed is passed by so much
    budgets:str='2000,4000', # Decayed: budgets, in uniform steps
    eval_every:int=200, # Constant rate: steps between evaluations on every other test image; decayed: eight evaluations a run
    noise:float=0.2, # Share of the training and holdout labels redrawn uniformly over all classes
    noise_seed:int=0, # Seed of the labels and of the IL model
    il_file:str=None, # Irreducible losses: loaded from here if the file exists, else fitted and saved here
    il_epochs:int=12, # Epochs of the IL model
    il_lr:float=6e-3, # Its learning rate
    il_one_cycle:bool_arg=True, # Let its learning rate rise to that and fall to 0?
    bs:int=32, # Items trained on in each step of uniform, random and RHO-LOSS, n_b; the others narrow batches of this size
    lr:float=1e-3, # Learning rate
    arch:str='small_cnn', # small_cnn or resnet18
    out:str=None, # JSON file for the summary
):
    "Accuracy against seconds, by method"
    folder,runs,seeds = Path(folder),runs.split(),[int(o) for o in seeds.split(',')]
    if schedule not in ('constant', 'decayed'): raise SystemExit(f"--schedule must be constant or decayed; got {schedule!r}.")
    methods = [read_run(run)[0] for run in runs]
    if path:
        if 'rho_loss' in methods and not il_file: raise SystemExit("RHO-LOSS needs --il_file: a file to load, or to write.")
        options = SimpleNamespace(bs=bs, lr=lr, arch=arch, device=default_device())
        data = read_data(path, noise, noise_seed)
        il = irreducible(data, il_file, noise_seed, options.device, il_epochs, il_lr, il_one_cycle) if 'rho_loss' in methods else None
        kept = folder/f'{schedule}-noise{noise}'
        costs = step_costs(runs, data, options, il, folder/f'costs-noise{noise}.json')
        for seed in seeds:
            for run in runs:
                for budget in [None] if schedule == 'constant' else [int(o) for o in budgets.split(',')]:
                    name = run.replace(':', '-').replace('=', '').replace(',', '-') + (f'-{budget}' if budget else '')
                    file,base = kept/f'{name}-{seed}.json',kept/f'uniform-{seed}.json'
                    if file.exists(): continue
                    target = best(json.loads(base.read_text())['history']) + until if until is not None and base.exists() else None
                    n_steps = round(budget*costs['uniform']/costs[run]) if budget else steps
                    result = fit_run(run, data, options, seed, n_steps, max(1, -(-n_steps//8)) if budget else eval_every, bool(budget), il, target)
                    write(file, dict(result, budget=budget) if budget else result)
                    print(f"{name}-{seed}: {result['steps']} steps, {seconds_of(result)[-1]:.0f} s, best {best(result['history']):.4f}, "
                          f"final {result['final']:.4f}", flush=True)
    summary = summarise(folder)
    show(summary['noise'])
    if out: write(Path(out), summary)
