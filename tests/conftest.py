import os
from pathlib import Path

import pytest

os.environ['MPLBACKEND'] = 'Agg'  # before anything imports pyplot
ROOT = Path(__file__).resolve().parent.parent

def pytest_collection_modifyitems(items):
    "Skip what needs CUDA where there is none"
    cuda = [item for item in items if 'cuda' in item.keywords]
    if not cuda: return
    import torch
    if not torch.cuda.is_available():
        for item in cuda: item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))

@pytest.fixture(scope='session')
def root():
    "The repository's root"
    return ROOT

@pytest.fixture(scope='session')
def shared_data():
    "The folder of shared data sets: $RHOLOSS_DATA, or ../shared/data beside the repository"
    path = Path(os.environ.get('RHOLOSS_DATA', ROOT.parent/'shared'/'data'))
    if not path.is_dir(): pytest.skip(f'no shared data in {path}: set RHOLOSS_DATA to the folder that holds them')
    return path
