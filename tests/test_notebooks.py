"Every notebook's cells, run by nbdev's own runner, each notebook in a process of its own"
from pathlib import Path

import pytest
from fastcore.nbio import read_nb
from helpers import run_in_process
from nbdev.config import get_config
from nbdev.doclinks import nbglob

CONFIG = get_config(Path(__file__).parent)
NBS = CONFIG.nbs_path
NOTEBOOKS = {path.relative_to(NBS).as_posix(): path for path in nbglob(NBS, as_path=True).sorted()}
RUNNER = '''
import sys
from functools import partial
import nbdev.test
from matplotlib.backend_bases import FigureCanvasBase
# a figure is drawn as it is shown, in fewer pixels, and not beforehand too, for a window that isn't there
FigureCanvasBase.draw_idle = lambda canvas: None
nbdev.test.CaptureShell = partial(nbdev.test.CaptureShell, mpl_format='png')
name, basepath, skip_flags, force_flags = sys.argv[1:]
passed, _ = nbdev.test.test_nb(name, skip_flags.split(), force_flags.split(), basepath=basepath)
sys.exit(not passed)
'''

def has_flag(path, flag):
    return any(flag in cell.directives for cell in read_nb(path).cells if cell.cell_type == 'code')

@pytest.mark.slow # most of them train; all together take minutes
@pytest.mark.parametrize('name,flags', [(name, '') for name in NOTEBOOKS] + [
    pytest.param(name, 'cuda', marks=pytest.mark.cuda) for name, path in NOTEBOOKS.items() if has_flag(path, 'cuda')])
def test_notebook(name, flags, tmp_path):
    run_in_process(RUNNER, NOTEBOOKS[name], CONFIG.config_path, ' '.join(CONFIG.tst_flags), flags, out=tmp_path/'log',
                   timeout=1800, env=[dict(IN_TEST='1')])
