"Loaders of every kind whose items are their rows"

import numpy as np
import pandas as pd
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.tabular.core import Categorify, TabDataLoader, TabularPandas, TabWeightedDL
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from torch import tensor
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, Sampler, WeightedRandomSampler

N = 53

class Rows(Dataset):
    "Item `i` is `i`"
    def __init__(self, n=N): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return tensor(i), tensor(-i)

class Lengths(Rows):
    def __getitem__(self, i): return torch.full((1,), i), tensor(-i)

def tabular(n=N):
    frame = pd.DataFrame(dict(row=np.arange(n, dtype=np.float32), kind=['ab'[i%2] for i in range(n)], y=np.arange(n)%3))
    return TabularPandas(frame, procs=[Categorify], cat_names=['kind'], cont_names=['row'], y_names='y')

class HalfDL(DistributedDL):
    "One rank of two, without a process group"
    def _broadcast(self, t, rank): return list(t)

weights = np.arange(N) % 5
fastai_loaders = dict(
    plain=lambda **kw: DataLoader(Rows(), **kw),
    tfmd=lambda **kw: TfmdDL(Rows(), **kw),
    sorted=lambda **kw: SortedDL(Lengths(), sort_func=lambda o: int(o[0])%7, **kw),
    weighted=lambda **kw: WeightedDL(Rows(), wgts=weights, **kw),
    partial=lambda **kw: PartialDL(Rows(), partial_n=31, **kw),
    tabular=lambda **kw: TabDataLoader(tabular(), **kw),
    tabular_weighted=lambda **kw: TabWeightedDL(tabular(), wgts=weights, **kw),
    rank0=lambda **kw: HalfDL(TfmdDL(Rows(), **kw), rank=0, world_size=2),
    rank1=lambda **kw: HalfDL(WeightedDL(Rows(), wgts=weights, **kw), rank=1, world_size=2),
)

def make(kind, seed=3, **kwargs):
    set_seed(seed)
    return (fastai_loaders[kind] if kind in fastai_loaders
            else torch_loaders[kind])(**dict(dict(bs=8, num_workers=0), **kwargs))

def rows_in(batch):
    "The rows that a batch itself holds"
    x = batch[1] if len(batch) == 3 else batch[0]
    return x.flatten().long()

def epochs(loader, n=3, seed=11):
    "The batches of `n` epochs"
    set_seed(seed)
    return [list(loader) for _ in range(n)]

def same(a, b):
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and torch.equal(a, b)

def check_rows(loader):
    n = 0
    for i,batch in enumerate(loader):
        assert torch.equal(loader.rows(i), rows_in(batch))
        assert loader.rows(i).dtype == torch.int64
        n += 1
    return n

class EagerBatches(Sampler):
    "Draws its order when asked for an iterator, before the loader draws its seed"
    def __len__(self): return 6
    def __iter__(self): return iter(torch.randperm(48).view(6,8).tolist())

torch_loaders = dict(
    shuffled=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, shuffle=True, **kw),
    seeded=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, shuffle=True,
                                            generator=torch.Generator().manual_seed(5), **kw),
    sequential=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs, drop_last=True, **kw),
    torch_weighted=lambda bs, **kw: TorchDataLoader(Rows(), batch_size=bs,
                                                    sampler=WeightedRandomSampler(weights.tolist(), 70), **kw),
    batches=lambda bs, **kw: TorchDataLoader(Rows(), batch_sampler=EagerBatches(), **kw),
)

chosen = [50, 3, 4, 8, 21, 22, 39, 41, 7, 0, 12]
