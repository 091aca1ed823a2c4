"""One process of the distributed test: run by torchrun, two of these; see test_distributed.py."""
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

    crossfitted = Learner(dls, nn.Sequential(nn.Linear(5, 3)), loss_func=CrossEntropyLossFlat()).rho_loss(frac=FRAC, epoch='candidates', il_epochs=1, il_folds=3)
    if hasattr(crossfitted, 'progress'): crossfitted.remove_cb(crossfitted.progress)
    with crossfitted.distrib_ctx(sync_bn=False), crossfitted.no_logging(): crossfitted.fit(1)

    torch.save(dict(candidates=before.rows, selected=after.rows, il_met=met, il=il, weights=[p.detach() for p in learn.model.parameters()],
                    ledger=learn.selection.ledger.to_dict('list'), seen=learn.selection.seen, counts=learn.selection.selected,
                    crossfit=crossfitted.selector.il.values), Path(out)/f'rank{rank}.pt')


if __name__ == '__main__': main(sys.argv[1])
