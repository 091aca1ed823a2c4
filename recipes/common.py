"""What the recipes share: training for a number of steps, evaluating on the way, and comparing runs."""
import csv
import json
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.learner import Learner

from rholoss_fastai.all import compare, machine  # noqa: F401 (`machine` for benchmarks)
from rholoss_fastai.all import same_machine as check_machine
from rholoss_fastai.nested import prediction

matplotlib.use('Agg') # figures go to files

COLUMNS = ['step', 'epoch', 'accuracy', 'seconds', 'items_scored', 'items_trained']


class Evaluations(Callback):
    "The test accuracy on the way, every `every` steps or at each epoch's end; seconds leave the evaluations out"
    order = 70 # after everything else

    def __init__(self,
        test, # Batches `(images, targets)` of the test set: a list or a DataLoader
        n_steps=None, # Stop after so many training steps
        every=None # Steps between evaluations; None: one at the end of each epoch
    ):
        self.test,self.n_steps,self.every,self.history = test,n_steps,every,[]
        self.losses,self.step,self.items,self.spent = [],0,0,0.

    def _clock(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return time.perf_counter()

    def before_train(self): self.resumed = self._clock()
    def before_validate(self): raise CancelValidException # the test set is looked at here

    def after_train(self):
        self.spent += self._clock() - self.resumed
        if not self.every: self.evaluate()

    def after_batch(self):
        if not self.training or not len(self.yb): return
        self.step += 1
        self.items += len(self.yb[0])
        if not self.every or (self.step % self.every and self.step < self.n_steps): return
        self.spent += self._clock() - self.resumed
        self.evaluate()
        if self.step >= self.n_steps: raise CancelFitException
        self.resumed = self._clock()

    def evaluate(self):
        "Append a row to `history`, and the mean test loss to `losses`"
        model = self.model.eval()
        with torch.no_grad(): preds,targets = zip(*[(prediction(model(x)), y) for x,y in self.test])
        preds,targets = torch.cat(preds),torch.cat(targets)
        model.train()
        record = getattr(self.learn, 'selection', None)
        self.losses.append(round(F.cross_entropy(preds, targets).item(), 5))
        self.history.append([self.step, self.epoch, round((preds.argmax(1) == targets).float().mean().item(), 5),
                             round(self.spent, 3), record.total('scored') if record else 0, self.items])


def fit_steps(learn, test, n_steps, every, cbs=()):
    "Fit `learn` at a constant rate, unless one of `cbs` changes it, for `n_steps` training steps; its `Evaluations`"
    evaluations = Evaluations(test, n_steps, every)
    # an epoch has at least one step
    with learn.no_logging(), learn.no_bar(): learn.fit(n_steps, cbs=[evaluations, *cbs])
    return evaluations


def compared(folder, make_learner, dls, methods, **kwargs):
    "As `compare`, with its table printed, and kept in `folder` with its figure"
    try: result = compare(make_learner, dls, methods, folder=folder, **kwargs)
    except (TypeError, ValueError) as e: raise SystemExit(str(e)) from e
    print(result)
    if kwargs.get('dry_run'): return result
    result.save(Path(folder)/'comparison.json')
    result.plot()[0].figure.savefig(Path(folder)/'comparison.png', dpi=110)
    plt.close('all')
    return result


def read_value(text):
    "A number, a precision, or the word itself"
    if text in ('float32', 'bfloat16', 'float16'): return getattr(torch, text)
    try: return json.loads(text)
    except json.JSONDecodeError: return text


def with_il(learn, il, settings): return learn.rho_loss(il, **settings)
def called(learn, name, settings): return getattr(learn, name)(**settings)


def read_method(run):
    "A method of `compare` out of `name:setting=value,setting=value`; the name is one of the Learner's methods then"
    name,_,options = run.partition(':')
    parts = [o.partition('=') for o in options.split(',') if o]
    if not all(is_ for _,is_,_ in parts): raise SystemExit(f"{run!r} must be name:setting=value,setting=value.")
    settings = {k: read_value(v) for k,_,v in parts}
    if not settings: return name
    if name == 'rho_loss': return run,partial(with_il, settings={'epoch': 'candidates', **settings})
    if not hasattr(Learner, name): raise SystemExit(f"{run!r} names no method of a Learner.")
    return run,partial(called, name=name, settings=settings)


def accept_underscores():
    "Let options be written with underscores as in Python, --eval_every, as well as with dashes"
    sys.argv[1:] = ['--' + a[2:].split('=')[0].replace('_', '-') + a[len(a.split('=')[0]):] if a.startswith('--') else a
                    for a in sys.argv[1:]]


def steps_to(history, accuracy):
    "Row of `history` in which `accuracy` was first reached, or None"
    return next((row for row in history if row[COLUMNS.index('accuracy')] >= accuracy), None)


def best(history): return max(row[COLUMNS.index('accuracy')] for row in history)
def last_five(history): return float(np.mean([row[COLUMNS.index('accuracy')] for row in history[-5:]]))


def same_machine(a, b, what):
    "End with an error where `what` was measured on machine `a`, which is not `b`: their seconds can't be compared"
    try: check_machine(a, b, what)
    except ValueError as e: raise SystemExit(str(e)) from e


def write_run(out, history, summary):
    "Write history.csv, summary.json and accuracy.png to the folder `out`"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out/'history.csv', 'w', newline='') as f: csv.writer(f).writerows([COLUMNS, *history])
    fig,ax = plt.subplots(figsize=(5, 3.6), layout='constrained')
    ax.plot([row[0] for row in history], [row[2] for row in history])
    ax.set(xlabel='training steps', ylabel='test accuracy', title=summary['method'])
    fig.savefig(out/'accuracy.png', dpi=110)
    plt.close(fig)
    # last and in one go: a run that has a summary is complete
    (out/'summary.tmp').write_text(json.dumps(summary, indent=1) + '\n')
    (out/'summary.tmp').replace(out/'summary.json')


def read_run(out):
    "History and summary that `write_run` wrote"
    out = Path(out)
    with open(out/'history.csv') as f: rows = list(csv.reader(f))[1:]
    return ([[int(r[0]), int(r[1]), float(r[2]), float(r[3]), int(r[4]), int(r[5])] for r in rows],
            json.loads((out/'summary.json').read_text()))


def print_table(header, rows):
    "A plain table, columns aligned"
    rows = [[str(o) for o in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(w) if i==0 else cell.rjust(w) for i,(cell,w) in enumerate(zip(row, widths))))
