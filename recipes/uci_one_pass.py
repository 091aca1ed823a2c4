"""UCI regression from random learning rates, weight decays and momenta: what one run makes of them, by method.

python recipes/uci_one_pass.py --path <uci_regression.npz> --data energy --method one_pass_all --starts 30 \
    --out runs/uci
python recipes/uci_one_pass.py --path <uci_regression.npz> --data energy --method asha \
    --out runs/uci     (needs pip install ".[tune]")
python recipes/uci_one_pass.py --out runs/uci     (the table of all runs in that folder)

The settings are those of Clarke et al. (2022): an MLP with 50 hidden units, 4000 full-batch steps of SGD with momentum
and L2 weight decay, starts lr 10^U(-6,-1), wd 10^U(-7,-2), momentum U(0,1). A run that ends with NaN is left out of
mean, median and best, and counted.
"""
import json
import math
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from common import accept_underscores, machine, print_table
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastcore.script import call_parse
from torch import nn

import rholoss_fastai.all  # noqa: F401 (patches one_pass)

N_VALID = dict(energy=78, kin8nm=1475, power=1722) # the paper's, of the rows that are not for testing
TUNED = dict(lorraine=('wd',), one_pass=('lr', 'wd'), one_pass_all=('lr', 'wd', 'mom'))
LOOPS = ('random', 'baydin', 'diff_through_opt')
RAY = ('bayesopt', 'asha', 'pbt')
PAPER = dict( # mean, median and best of 200 starts, table 1 of the paper (Kin8nm's there times 1000)
    energy=dict(random=(21, 7.8, 0.120), lorraine=(22, 8.2, 0.161), baydin=(5.5, 6.7, 0.103),
                one_pass=(2.5, 2.2, 0.147), one_pass_all=(1.28, 0.9, 0.139), diff_through_opt=(1.10, 0.48, 0.123)),
    kin8nm=dict(random=(0.038, 0.033, 0.00644), lorraine=(0.038, 0.034, 0.00639), baydin=(0.0245, 0.027, 0.00652),
                one_pass=(0.010, 0.0076, 0.00644), one_pass_all=(0.010, 0.00695, 0.00592),
                diff_through_opt=(0.008, 0.00717, 0.00609)),
    power=dict(random=(67,), lorraine=(67,), baydin=(17.82,), one_pass=(17.33,), one_pass_all=(17.4,),
               diff_through_opt=(17.17,)))


class Regression:
    "Rows of one data set, normalised: pairs `x (n, d)`, `y (n, 1)`; `unit` turns a squared error into the original's"
    def __init__(self, path, name):
        with np.load(path) as arrays: x, y = (torch.from_numpy(arrays[f'{name}_{o}']).float() for o in 'xy')
        n_test, n_valid = len(x)//10, N_VALID.get(name, len(x)//10)
        rest = slice(0, len(x) - n_test)
        std = x[rest].std(0)
        x, self.unit = (x - x[rest].mean(0))/std.where(std > 0, 1.), y[rest].var().item()
        y = (y - y[rest].mean())/y[rest].std()
        n = len(x) - n_test
        self.train, self.valid, self.test, self.all = ((x[o], y[o]) for o in (slice(n - n_valid), slice(n - n_valid, n),
                                                                              slice(n, None), rest))


def random_starts(n, seed=0):
    "`n` settings, the same whatever the method"
    rng = np.random.default_rng(seed)
    return [dict(lr=10**rng.uniform(-6, -1), wd=10**rng.uniform(-7, -2), mom=rng.uniform(0, 1)) for _ in range(n)]


def mlp(d, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 50), nn.ReLU(), nn.Linear(50, 1))


# In bare PyTorch, all starts at once: weights have a first dimension of starts

class Loops:
    "SGD with momentum and L2 weight decay from several starts side by side"
    def __init__(self, d, starts):
        models = [mlp(d, seed) for seed in range(len(starts))]
        self.w = [torch.stack([p.detach().T if p.ndim > 1 else p.detach()[None] for p in ps])
                  for ps in zip(*(m.parameters() for m in models))]
        self.momentum = [torch.zeros_like(w) for w in self.w]
        values = {k: torch.tensor([s[k] for s in starts], dtype=torch.float32).view(-1, 1, 1) for k in starts[0]}
        self.theta = dict(lr=values['lr'].log10(), wd=values['wd'].log10(), mom=values['mom'].logit())

    def losses(self, w, x, y): return ((torch.relu(x @ w[0] + w[1]) @ w[2] + w[3] - y)**2).mean((1, 2)) # one a start

    def stepped(self, w, momentum, batch, differentiable=False):
        "Weights, momenta and gradients after a step"
        if not differentiable: w = [o.detach() for o in w]
        leaves = w if w[0].requires_grad else [o.requires_grad_() for o in w]
        grads = torch.autograd.grad(self.losses(leaves, *batch).sum(), leaves, create_graph=differentiable)
        lr, wd, mom = 10**self.theta['lr'], 10**self.theta['wd'], torch.sigmoid(self.theta['mom'])
        with torch.set_grad_enabled(differentiable):
            momentum = [mom*m + g + wd*o for m, g, o in zip(momentum, grads, w)]
            return [o - lr*m for o, m in zip(w, momentum)], momentum, grads

    def step(self, batch):
        self.w, self.momentum, grads = self.stepped(self.w, self.momentum, batch)
        return grads

    def random(self, data, steps):
        "The settings as they are, on training and validation rows, since nothing is tuned"
        for _ in range(steps): self.step(data.all)

    def baydin(self, data, steps, hyper_lr=1e-3):
        "Hypergradient descent (Baydin et al. 2018) as in the paper: log10 lr rises by the product of two gradients"
        last = None
        for _ in range(steps):
            grads = self.step(data.all)
            if last is not None:
                rise = sum((a*b).sum((1, 2), keepdim=True) for a, b in zip(grads, last))
                self.theta['lr'] = (self.theta['lr'] + hyper_lr*rise).clamp(-10, 0)
            last = grads

    def diff_through_opt(self, data, steps, every=10, horizon=5):
        "The exact derivative through the last `horizon` steps, in place of the series"
        leaves = [o.requires_grad_() for o in self.theta.values()]
        adam = torch.optim.Adam(leaves, lr=0.05)
        for _ in range(steps//every):
            with torch.no_grad(): frozen = {k: o.detach() for k, o in self.theta.items()}
            theta, self.theta = self.theta, frozen
            for _ in range(every - horizon): self.step(data.train)
            self.theta = theta
            w, momentum = self.w, self.momentum
            for _ in range(horizon): w, momentum, _ = self.stepped(w, momentum, data.train, differentiable=True)
            for leaf, slope in zip(leaves, torch.autograd.grad(self.losses(w, *data.valid).sum(), leaves)):
                leaf.grad = slope
            adam.step()
            with torch.no_grad(): self.theta['lr'].clamp_(-10, 0)
            self.w, self.momentum = [o.detach() for o in w], [o.detach() for o in momentum]

    def mse(self, data, rows='test'):
        with torch.no_grad(): return (self.losses(self.w, *getattr(data, rows))*data.unit).tolist()


def run_loops(method, data, starts, steps):
    "Final test errors of all starts, and what each ended with"
    loops, began = Loops(data.train[0].shape[1], starts), time.perf_counter()
    getattr(loops, method)(data, steps)
    seconds = (time.perf_counter() - began)/len(starts)
    last = dict(lr=10**loops.theta['lr'], wd=10**loops.theta['wd'], mom=torch.sigmoid(loops.theta['mom']))
    last = {k: v.detach().flatten().tolist() for k, v in last.items()}
    return [dict(start=start, mse=mse, seconds=seconds, last={k: v[i] for k, v in last.items()})
            for i, (start, mse) in enumerate(zip(starts, loops.mse(data)))]


# With the Learner

class Repeat:
    "The same batch again and again: an epoch of full-batch steps"
    def __init__(self, batch, n): self.batch, self.n = batch, n
    def __len__(self): return self.n
    def __iter__(self): return iter([self.batch]*self.n)


def run_learner(tune, data, start, seed, steps):
    "Final test error of one start with `learn.one_pass(tune)`; None: without"
    dls = DataLoaders(Repeat(data.train if tune else data.all, steps), [data.valid])
    learn = Learner(dls, mlp(data.train[0].shape[1], seed), loss_func=F.mse_loss, lr=start['lr'], wd=start['wd'],
                    wd_bn_bias=True, opt_func=partial(SGD, mom=start['mom'], decouple_wd=False))
    if tune: learn.one_pass(tune, every=10, n_terms=5, hyper_lr=0.05, hessian_share=1.)
    began = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    seconds = time.perf_counter() - began
    with torch.no_grad(): mse = F.mse_loss(learn.model.cpu()(data.test[0]), data.test[1]).item()*data.unit
    hypers = learn.opt.hypers[0]
    return dict(start=start, mse=mse, seconds=seconds, last={k: hypers[k] for k in ('lr', 'wd', 'mom')},
                rolled_back=sum(line['rolled_back'] for line in learn.one_pass_tuner.lines) if tune else 0)


# Engines that run many trials, by Ray Tune

def trial(config, data, steps, seed=0, reports=10):
    "One trial of Ray Tune, which may be stopped, or go on from another's weights with other settings"
    from ray import tune
    loops, done = Loops(data.train[0].shape[1], [config]), 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            with np.load(Path(folder)/'state.npz') as arrays:
                state = [torch.from_numpy(arrays[k]) for k in arrays.files]
        done, loops.w, loops.momentum = int(state[0]), state[1:5], state[5:]
    folder = Path(tune.get_context().get_trial_dir())
    while done < steps:
        for _ in range(steps//reports): loops.step(data.train)
        done += steps//reports
        np.savez(folder/'state.npz', done, *(o.detach().numpy() for o in [*loops.w, *loops.momentum]))
        error = loops.mse(data, 'valid')[0]
        # a tuner must not see NaN
        tune.report(dict(valid=error if math.isfinite(error) else 1e9, mse=loops.mse(data)[0], steps=done),
                    checkpoint=tune.Checkpoint.from_directory(folder))


def bounded(config):
    "PBT multiplies by 1.2 again and again, and from a momentum of 1 on there is no logit"
    return dict(config, mom=min(max(config['mom'], 0.), 0.999))


def run_ray(method, data, n_trials, steps, seed=0):
    "Test error of the best of `n_trials` by validation, by Bayesian optimisation, ASHA or population-based training"
    try:
        import ray
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as e:
        raise SystemExit(f'--method {method} runs on Ray Tune, which is not installed ({e}): pip install '
                         '".[tune]"') from e
    ray.init(num_cpus=1, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    storage = TemporaryDirectory() # in place of ~/ray_results
    space = dict(lr=tune.loguniform(1e-6, 1e-1), wd=tune.loguniform(1e-7, 1e-2), mom=tune.uniform(0, 1))
    search = scheduler = None
    if method == 'bayesopt':
        from optuna.samplers import GPSampler
        search = OptunaSearch(sampler=GPSampler(seed=seed))
    if method == 'asha': scheduler = ASHAScheduler(time_attr='steps', max_t=steps, grace_period=steps//10)
    if method == 'pbt':
        scheduler = PopulationBasedTraining(time_attr='steps', perturbation_interval=steps//10,
                                            hyperparam_mutations=dict(space), custom_explore_fn=bounded, synch=False)
    began = time.perf_counter()
    tuner = tune.Tuner(tune.with_resources(tune.with_parameters(trial, data=data, steps=steps), dict(cpu=1)),
                       param_space=space, tune_config=tune.TuneConfig(metric='valid', mode='min', num_samples=n_trials,
                                                                      search_alg=search, scheduler=scheduler,
                                                                      max_concurrent_trials=1 if method == 'bayesopt'
                                                                      else None, reuse_actors=True),
                       run_config=tune.RunConfig(verbose=0, storage_path=storage.name))
    results = tuner.fit()
    best = results.get_best_result()
    spent = sum(r.metrics.get('steps', 0) for r in results)
    ray.shutdown()
    storage.cleanup()
    return [dict(start={k: best.config[k] for k in space}, mse=best.metrics['mse'], seconds=time.perf_counter() - began,
                 trials=n_trials, steps=spent)]


# Results

def read(folder):
    "Rows of all runs in `folder`, by data set and method"
    return {tuple(file.stem.split('-')): json.loads(file.read_text())['runs']
            for file in sorted(Path(folder).glob('*-*.json'))}


def summarise(rows):
    "Mean, median and best of the final test errors, those that are no numbers left out"
    mses, runs = [row['mse'] for row in rows if math.isfinite(row['mse'])], rows[0].get('trials', len(rows))
    if not mses: return dict(runs=runs, failed=len(rows), mean=None, median=None, best=None, seconds=None)
    return dict(runs=runs, failed=len(rows) - len(mses), mean=float(np.mean(mses)), median=float(np.median(mses)),
                best=min(mses), seconds=float(np.median([row['seconds'] for row in rows])))


def collect(folder, results=None):
    "Print the table of all runs in `folder`, and write it with their errors to the JSON file `results`"
    order = ['random', 'baydin', 'lorraine', 'one_pass', 'one_pass_all', 'diff_through_opt', *RAY]
    runs = dict(sorted(read(folder).items(), key=lambda o: (list(PAPER).index(o[0][0]) if o[0][0] in PAPER
                                                            else len(PAPER), order.index(o[0][1]))))
    def number(v): return f'{v:.4g}' if v is not None else ''
    table, errors = [], {}
    for (data, method), rows in runs.items():
        paper = ' / '.join(map(number, PAPER.get(data, {}).get(method, ())))
        table.append(dict(data=data, method=method, **summarise(rows), paper=paper))
        errors.setdefault(data, {})[method] = [row['mse'] if math.isfinite(row['mse']) else None for row in rows]
    print_table(['data', 'method', 'starts', 'NaN', 'mean', 'median', 'best', 'seconds', 'paper: mean / median / best'],
                [[r['data'], r['method'], r['runs'], r['failed'],
                  *(number(r.get(o)) for o in ('mean', 'median', 'best', 'seconds')), r['paper']] for r in table])
    if results:
        Path(results).write_text(json.dumps(dict(machine=machine(), table=table, errors=errors), indent=1) + '\n')


accept_underscores()


@call_parse
def main(
    path:str=None, # File uci_regression.npz; None: only print the table of `out`
    data:str='energy', # energy, kin8nm, power, or another data set of the file
    method:str='one_pass_all', # random, baydin, diff_through_opt, lorraine, one_pass, one_pass_all, bayesopt, asha, pbt
    starts:int=30, # Random starts, or trials of Ray Tune
    steps:int=4000, # Full-batch steps
    seed:int=0, # Of the starts
    out:str='runs/uci', # Folder for <data>-<method>.json; what is there already is not run again
    results:str=None, # JSON file for the table of all runs in `out`
):
    "Final test errors from random starts"
    if path:
        if method not in (*LOOPS, *TUNED, *RAY):
            raise SystemExit(f"--method must be one of {', '.join((*LOOPS, *TUNED, *RAY))}; got {method!r}.")
        with np.load(path) as arrays: known = [o[:-2] for o in arrays if o.endswith('_x')]
        if data not in known: raise SystemExit(f"--data must be one of {', '.join(known)}; got {data!r}.")
        rows, file = Regression(path, data), Path(out)/f'{data}-{method}.json'
        stored = json.loads(file.read_text()) if file.exists() else dict(steps=steps, seed=seed, runs=[])
        runs = stored['runs']
        if (stored['steps'], stored['seed']) != (steps, seed) or (method in RAY and runs
                                                                  and runs[0]['trials'] != starts):
            raise SystemExit(f"{file} holds runs with other settings: choose another --out.")
        settings = random_starts(starts, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        def save():
            file.write_text(json.dumps(dict(data=data, method=method, steps=steps, seed=seed, machine=machine(),
                                            runs=runs), indent=1) + '\n')
        if method in RAY: runs = runs or run_ray(method, rows, starts, steps, seed)
        elif method in LOOPS: runs = runs if len(runs) >= starts else run_loops(method, rows, settings, steps)
        else:
            for i in range(len(runs), starts):
                runs.append(run_learner(TUNED[method], rows, settings[i], i, steps))
                save()
        save()
    collect(out, results)
