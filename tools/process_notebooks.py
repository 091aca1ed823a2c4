"Process the notebooks for the site, into `_proc`, as `nbdev-proc-nbs` does but without asking for Quarto"
import os
from functools import cache
from pathlib import Path

import nbdev.processors
from fastcore.script import call_parse
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent

# each cell asks for the settings anew, and each time two files are parsed: a third of all that processing costs
nbdev.processors.get_config = cache(nbdev.processors.get_config)

@call_parse
def main(
    n_workers:int=2, # Notebooks processed at the same time; 0: here, one after the other
):
    "Run what the site's build runs of each notebook: its imports and exported cells, and no other cell"
    os.chdir(ROOT)
    proc_nbs(n_workers=n_workers, force=True)
