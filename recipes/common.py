"""What the recipes share: training for a number of steps, evaluating on the way, and comparing runs."""
import csv
import json
import platform
import sys
import time
from pathlib import Path

import fastai
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastprogress.fastprogress import progress_bar

import rholoss_fastai
from rholoss_fastai.all import native_bfloat16
from rholoss_fastai.nested import prediction

matplotlib.use('Agg') # figures go to files

COLUMNS = ['step', 'epoch', 'accuracy', 'seconds', 'items_scored', 'items_trained']


class Evaluations(Callback):
    "The test accuracy on the way, every `every` steps or at each epoch's end; seconds, on the clock and of the processor, leave the evaluations out"
    order = 70 # after everything else

    def __init__(self,
        test, # Batches `(images, targets)` of the test set: a list or a DataLoader
        n_steps=None, # Stop after so many training steps
        every=None # Steps between evaluations; None: one at the end of each epoch
    ):
        self.test,self.n_steps,self.every = test,n_steps,every
        self.history,self.losses,self.predictions,self.cpu_seconds,self.step,self.items,self.spent = [],[],[],[],0,0,np.zeros(2)

    def _clock(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    def before_fit(self):
        total = self.n_steps or self.n_epoch*len(self.dls.train)
        self.bar = progress_bar(range(total), leave=False) if sys.stdout.isatty() else None
        if self.bar: self.bar.update(0)

    def before_train(self): self.resumed = self._clock()
    def before_validate(self): raise CancelValidException # the test set is looked at here

    def after_train(self):
        self.spent += self._clock() - self.resumed
        if not self.every: self.evaluate()

    def after_batch(self):
        if not self.training or not len(self.yb): return
        self.step += 1
        self.items += len(self.yb[0])
        if self.bar: self.bar.update(self.step)
        if not self.every or (self.step % self.every and self.step < self.n_steps): return
        self.spent += self._clock() - self.resumed
        self.evaluate()
        if self.step >= self.n_steps: raise CancelFitException
        self.resumed = self._clock()

    def evaluate(self):
        "Append a row to `history`, the mean test loss to `losses`, and the predicted classes `(n,)` to `predictions`"
        model,right,loss,n,classes = self.model.eval(),0,0.,0,[]
        with torch.no_grad():
            for x,y in self.test:
                pred = prediction(model(x))
                classes.append(pred.argmax(1))
                right,loss,n = right + (classes[-1] == y).sum(),loss + F.cross_entropy(pred, y, reduction='sum'),n + len(y)
        self.predictions.append(torch.cat(classes).cpu())
        model.train()
        record = getattr(self.learn, 'selection', None)
        seconds,cpu_seconds = self.spent.round(3).tolist()
        self.losses.append(round(float(loss)/n, 5))
        self.cpu_seconds.append(cpu_seconds)
        self.history.append([self.step, self.epoch, round(float(right)/n, 5), seconds, record.total('scored') if record else 0, self.items])


class ShareOfSteps(Callback):
    "`pct_train`, which schedules go by, of a fit that ends after `n_steps` training steps and not with its epochs"
    order = -6 # before a selector
    def __init__(self, n_steps): self.n_steps = n_steps
    def before_train(self): self.learn.pct_train = self.evaluations.step/self.n_steps
    def before_batch(self):
        if self.training: self.before_train()


def fit_steps(learn, test, n_steps, every, cbs=()):
    "Fit `learn` at a constant rate, unless one of `cbs` changes it, for `n_steps` training steps; its `Evaluations`"
    evaluations = Evaluations(test, n_steps, every)
    # an epoch has at least one step, so this is enough of them
    with learn.no_logging(), learn.no_bar(): learn.fit(n_steps, cbs=[evaluations, ShareOfSteps(n_steps), *cbs])
    return evaluations


def fit_epochs(learn, test, n_epoch, lr=None):
    "Fit `learn` for `n_epoch` epochs with fastai's one-cycle schedule; its `Evaluations`"
    evaluations = Evaluations(test)
    with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(n_epoch, lr, cbs=evaluations)
    return evaluations


def accept_underscores():
    "Let options be written with underscores as in Python, --eval_every, as well as with dashes"
    sys.argv[1:] = ['--' + a[2:].split('=')[0].replace('_', '-') + a[len(a.split('=')[0]):] if a.startswith('--') else a for a in sys.argv[1:]]


def read_precision(name):
    "What the selectors' `precision` wants: 'auto', None for 'own', or the dtype of that name"
    return name if name == 'auto' else None if name == 'own' else getattr(torch, name)


def steps_to(history, accuracy):
    "Row of `history` in which `accuracy` was first reached, or None"
    return next((row for row in history if row[COLUMNS.index('accuracy')] >= accuracy), None)


def best(history): return max(row[COLUMNS.index('accuracy')] for row in history)
def last_five(history): return float(np.mean([row[COLUMNS.index('accuracy')] for row in history[-5:]]))


def cpu_name():
    "The processor's name, as the system tells it"
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine():
    "What the figures were measured on"
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return dict(device=device, cpu=cpu_name(), threads=threads, amx=native_bfloat16(torch.device('cpu')), python=platform.python_version(),
                torch=torch.__version__, fastai=fastai.__version__, rholoss_fastai=rholoss_fastai.__version__)


def same_machine(a, b, what):
    "End with an error where `what` was measured on machine `a`, which is not `b`: their seconds can't be compared"
    differ = {k: (a[k], b[k]) for k in ('device', 'cpu', 'torch') if a[k] != b[k]}
    if differ: raise SystemExit(f"{what} was measured on another machine, {differ}: keep the results of each in a place of their own.")


def write_run(out, history, summary):
    "Write history.csv, summary.json and accuracy.png to the folder `out`"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out/'history.csv', 'w', newline='') as f: csv.writer(f).writerows([COLUMNS, *history])
    plot_histories({summary['method']: [history]}, out/'accuracy.png')
    # last and in one go: a run that has a summary is complete
    (out/'summary.tmp').write_text(json.dumps(summary, indent=1) + '\n')
    (out/'summary.tmp').replace(out/'summary.json')


def read_run(out):
    "History and summary that `write_run` wrote"
    out = Path(out)
    with open(out/'history.csv') as f: rows = list(csv.reader(f))[1:]
    return [[int(r[0]), int(r[1]), float(r[2]), float(r[3]), int(r[4]), int(r[5])] for r in rows], json.loads((out/'summary.json').read_text())


def plot_histories(runs, path, title=None):
    "Accuracy against steps and against seconds, a line a method: the mean over its runs, and their range. `runs`: method -> histories"
    fig,axs = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout='constrained')
    for method,histories in runs.items():
        rows = np.array([h[:min(map(len, histories))] for h in histories], dtype=float) # (runs, evaluations, columns)
        accuracy = rows[:,:,2]
        for ax,column in zip(axs, (0, 3)):
            x = rows[:,:,column].mean(0)
            line, = ax.plot(x, accuracy.mean(0), label=method)
            ax.fill_between(x, accuracy.min(0), accuracy.max(0), alpha=0.2, color=line.get_color(), lw=0)
    axs[0].set(xlabel='training steps', ylabel='test accuracy')
    axs[1].set(xlabel='seconds of training')
    axs[0].legend()
    for ax in axs: ax.spines[['top', 'right']].set_visible(False)
    if title: fig.suptitle(title)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def print_table(header, rows):
    "A plain table, columns aligned"
    rows = [[str(o) for o in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows: print('  '.join(cell.ljust(w) if i==0 else cell.rjust(w) for i,(cell,w) in enumerate(zip(row, widths))))
