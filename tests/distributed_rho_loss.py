"""One process of the distributed test; see test_distributed.py, which runs two."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn

from rholoss_fastai.all import IrreducibleLosses, crossfit_irreducible  # noqa: F401

N, BS, FRAC = 200, 4, 0.25


def broadcast(self, t, rank):
    "fastai's insists on CUDA"
    t = torch.LongTensor(t)
    dist.broadcast(t, rank)
    return t.tolist()


class Rows:
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.randint(0, 3, (N,), generator=generator)
        self.values = torch.randn(N, 5, generator=generator)
        self.values[:, 0] = torch.arange(N)/N
    def __len__(self): return N
    def __getitem__(self, i): return self.values[i], self.targets[i]


class Watch(Callback):
    "Rows before and after selection, and the irreducible losses that each candidate met"
    def __init__(self, order): self.order, self.rows = order, []
    def before_batch(self):
        if self.training: self.rows.append((self.x[:, 0]*N).round().long())


class Taken(Callback):
    "The rows that DivBS's rule takes of this process's candidates, with gradients made one by one"
    order = -5.5
    def before_fit(self): self.rows = []
    def before_batch(self):
        if not self.training: return
        model = getattr(self.model, 'module', self.model)
        grads = [torch.autograd.grad(nn.functional.cross_entropy(model(x[None]), y[None]),
                                     model[2].weight)[0].flatten().double() for x, y in zip(self.x, self.y)]
        S, basis, taken = sum(grads), [], []
        for _ in range(len(grads)//2):
            share = [-1. if i in taken else abs(float(g @ S)) for i, g in enumerate(grads)]
            taken.append(max(range(len(grads)), key=share.__getitem__))
            e = grads[taken[-1]] - sum((grads[taken[-1]] @ b)*b for b in basis)
            basis.append(e/e.norm())
            S = S - (basis[-1] @ S)*basis[-1]
        self.rows.append((self.x[sorted(taken), 0]*N).round().long())


def main(out):
    DistributedDL._broadcast = broadcast
    il = torch.rand(N, generator=torch.Generator().manual_seed(2))
    met = []

    def score(loss, il):
        met.append(il)
        return loss - il

    set_seed(0)
    dls = DataLoaders(DataLoader(Rows(), bs=BS, shuffle=True, drop_last=True), DataLoader(Rows(), bs=50))
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    before, after = Watch(-6), Watch(-4)
    learn.rho_loss(il, frac=FRAC, score=score, epoch='candidates')
    with learn.distrib_ctx(sync_bn=False), learn.no_logging(): learn.fit(2, cbs=[before, after])
    rank = dist.get_rank()

    crossfitted = Learner(dls, nn.Sequential(nn.Linear(5, 3)),
                          loss_func=CrossEntropyLossFlat()).rho_loss(frac=FRAC, epoch='candidates',
                                                                     il_epochs=1, il_folds=3)
    if hasattr(crossfitted, 'progress'): crossfitted.remove_cb(crossfitted.progress)
    with crossfitted.distrib_ctx(sync_bn=False), crossfitted.no_logging(): crossfitted.fit(1)

    def new(model=None):
        res = Learner(dls, model or nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)),
                      loss_func=CrossEntropyLossFlat(), lr=0.01)
        if hasattr(res, 'progress'): res.remove_cb(res.progress)
        return res

    set_seed(0)
    divbs, taken = new().select(pick='divbs', frac=0.5, precision=None), Taken()
    seen = Watch(-6), Watch(-4)
    with divbs.distrib_ctx(sync_bn=False), divbs.no_logging(): divbs.fit(2, cbs=[*seen, taken])

    set_seed(0)
    tokens = new().rho_loss(il[:, None], frac=0.5, unit='token')
    with tokens.distrib_ctx(sync_bn=False), tokens.no_logging(): tokens.fit(2)

    refused = {}
    for name, learn_two in dict(staleness=new().select(staleness=2),
                                queue=new().selective_backprop(queue=True, warmup_epochs=0)).items():
        try:
            with learn_two.distrib_ctx(sync_bn=False), learn_two.no_logging(): learn_two.fit(1)
        except ValueError as e: refused[name] = str(e)

    def weights(o): return torch.cat([p.detach().flatten() for p in o.model.parameters()])
    torch.save(dict(divbs=dict(candidates=seen[0].rows, selected=seen[1].rows, by_rule=taken.rows,
                               weights=weights(divbs), ledger=divbs.selection.ledger.to_dict('list')),
                    tokens=dict(weights=weights(tokens), ledger=tokens.selection.ledger.to_dict('list')),
                    refused=refused,
                    candidates=before.rows, selected=after.rows, il_met=met, il=il,
                    weights=[p.detach() for p in learn.model.parameters()],
                    ledger=learn.selection.ledger.to_dict('list'), seen=learn.selection.seen,
                    counts=learn.selection.selected,
                    crossfit=crossfitted.selector.il.values), Path(out)/f'rank{rank}.pt')


if __name__ == '__main__': main(sys.argv[1])
