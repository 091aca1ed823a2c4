"""A table with wrong labels: UCI's kin8nm, naval or power, of which side of the median a row lies, by fastai's tabular
model.

python benchmarks/compare_table.py --path <uci_regression.npz> --data kin8nm --noise 0.2

Every fifth row is kept for the test, whose labels stay right. Everything is billed; each run is kept in a file of
`--folder`.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.block import CategoryBlock
from fastai.data.transforms import IndexSplitter
from fastai.metrics import accuracy
from fastai.tabular.core import Normalize, TabularPandas
from fastai.tabular.learner import tabular_learner
from fastcore.script import call_parse

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from common import accept_underscores, compared, read_method

from rholoss_fastai.all import noisy_labels


def make_learner(dls): return tabular_learner(dls, layers=[200, 100], metrics=accuracy)


accept_underscores()


@call_parse
def main(
    path:str=None, # File uci_regression.npz, with `<data>_x` and `<data>_y`
    data:str='kin8nm', # Whose rows
    noise:float=0.2, # Share of the training labels redrawn
    methods:str='rho_epochs rho_loss', # Beside plain training, separated by spaces
    seeds:int=3, # Runs of each method
    epochs:float=8., # Budget, in epochs of plain training
    budget:str='seconds', # What is equal: seconds, cost or steps
    folder:str=None, # Folder of the runs; default runs/table_<data>
    out:str=None, # JSON file for all of them
):
    "Methods at equal cost on a table"
    if path is None: raise SystemExit('--path is missing: the file uci_regression.npz.')
    torch.set_num_threads(1) # too little work in a step to share it out
    with np.load(path) as arrays:
        if f'{data}_x' not in arrays:
            raise SystemExit(f"--data must be one of {', '.join(o[:-2] for o in arrays if o.endswith('_x'))}; got "
                             f"{data!r}.")
        x,y = arrays[f'{data}_x'],arrays[f'{data}_y'][:,0]
    table = pd.DataFrame(x, columns=[f'x{i}' for i in range(x.shape[1])]).assign(high=y > np.median(y))
    columns = [o for o in table if o != 'high']
    rows = TabularPandas(table, [Normalize], cont_names=columns, y_names='high', y_block=CategoryBlock(),
                         splits=IndexSplitter(range(0, len(table), 5))(table))
    dls = rows.dataloaders(bs=64)
    if noise: dls = noisy_labels(dls, noise)
    result = compared(folder or f'runs/table_{data}', make_learner, dls, [read_method(o) for o in methods.split()],
                      n_epoch=epochs, budget=budget, seeds=seeds)
    if out: result.save(out)
