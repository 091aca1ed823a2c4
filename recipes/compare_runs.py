"""The runs of `compare` in a folder, as far as they have come: one table, one figure.

python recipes/compare_runs.py runs/cifar10
"""
from pathlib import Path

from common import accept_underscores
from fastcore.script import call_parse

from rholoss_fastai.all import Comparison

accept_underscores()


@call_parse
def main(
    folder:str, # Folder of the runs, or a file of them
):
    "Print the table and the verdict, and save the figure beside the runs"
    try: result = Comparison.load(folder)
    except (OSError, ValueError) as e: raise SystemExit(f"{folder}: {e}") from e
    print(result)
    result.plot()[0].figure.savefig((Path(folder) if Path(folder).is_dir() else Path(folder).parent)/'comparison.png',
                                    dpi=110)
