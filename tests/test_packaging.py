"What is handed out: every import is declared, the version stands once, sdist and wheel work outside the repository"
import ast
import re
import subprocess
import sys
import sysconfig
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from set_version import dated, main

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'rholoss_fastai'
DISTRIBUTIONS = {'PIL': 'pillow', 'sklearn': 'scikit-learn'} # where a package is imported by another name
OPTIONAL = { # imported where the user has asked for what they do: what brings them
    'accelerate': 'dev_requirements', 'nbdev': 'dev_requirements', 'transformers': 'transformers',
    'ray': 'tune_requirements', 'optuna': 'tune_requirements',
}

def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini')
    return config['DEFAULT']

def declared(key='requirements'): return {re.split(r'[\[<>=!~]', name)[0] for name in settings()[key].split()}

def imported(path):
    "Top-level packages that a file imports, anywhere in it"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]

@pytest.mark.parametrize('path', sorted(PACKAGE.glob('*.py')), ids=lambda path: path.stem)
def test_every_imported_package_is_declared(path):
    "Relying on what fastai happens to bring breaks when fastai stops bringing it"
    others = set(imported(path)) - set(sys.stdlib_module_names) - {'rholoss_fastai'}
    undeclared = {name for name in others if DISTRIBUTIONS.get(name, name) not in declared() and name not in OPTIONAL}
    assert not undeclared, f'{path.name} imports {undeclared}: name them in the requirements of settings.ini'

def test_optional_packages_are_in_an_extra():
    for name,key in OPTIONAL.items():
        if key.endswith('_requirements'): assert name in declared(key), f'{name} is no part of {key}'

def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == settings()['version']
    assert f"\n## {citation['version']}, {citation['date-released']}\n" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')

def test_set_version(tmp_path):
    for name in 'settings.ini', 'CITATION.cff', 'CHANGELOG.md', 'rholoss_fastai/__init__.py':
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text((ROOT/name).read_text(encoding='utf-8'), encoding='utf-8')
    main('7.8.9', root=str(tmp_path))
    texts = {path.name: path.read_text(encoding='utf-8') for path in tmp_path.rglob('*') if path.is_file()}
    assert '\nversion = 7.8.9\n' in texts['settings.ini'] and '__version__ = "7.8.9"' in texts['__init__.py'] and '\nversion: 7.8.9\n' in texts['CITATION.cff']
    assert re.search(r'^## Unreleased\n\n## 7\.8\.9, \d{4}-\d\d-\d\d$', texts['CHANGELOG.md'], re.MULTILINE)

def test_changelog_is_dated():
    assert dated('# C\n\n## Unreleased\n\n- a\n', '1.0.0', '2030-01-02') == '# C\n\n## Unreleased\n\n## 1.0.0, 2030-01-02\n\n- a\n'
    assert dated('\n## Unreleased\n\n## 1.0.0, soon\n', '1.0.0', '2030-01-02') == '\n## Unreleased\n\n## 1.0.0, 2030-01-02\n'
    with pytest.raises(SystemExit, match='Unreleased'): dated('# C\n', '1.0.0', '2030-01-02')

FIVE_LINES = '''
from fastai.vision.all import *
from rholoss_fastai.all import *
import rholoss_fastai
assert Path(rholoss_fastai.__file__).is_relative_to(sys.prefix), rholoss_fastai.__file__
set_seed(0)
labels = torch.arange(64) % 2
images = torch.randn(64, 8) + 3*labels[:,None]
dls = DataLoaders(*[DataLoader(list(zip(images, labels)), bs=8, shuffle=shuffle) for shuffle in (True, False)])
learn = Learner(dls, nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
learn.batch_loss_filter(warmup_epochs=0)
with learn.no_bar(): learn.fit(2, 0.1)
learn.selection.report()
with learn.no_bar(): assert learn.validate()[1] > 0.9
'''

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "sdist, and the wheel that is built from it, not from the repository"
    pytest.importorskip('build')
    copy,out = tmp_path_factory.mktemp('repository')/'repo',tmp_path_factory.mktemp('dist')
    files = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True, text=True, capture_output=True).stdout
    for name in files.splitlines():
        if not (ROOT/name).is_file() or name.startswith(('nbs/', 'benchmarks/', 'recipes/', 'tests/')): continue
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        (copy/name).write_bytes((ROOT/name).read_bytes())
    run = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, copy], cwd=out, text=True, capture_output=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return {path.suffix: path for path in out.iterdir()}

@pytest.mark.slow
def test_metadata_renders_on_pypi(dist):
    pytest.importorskip('twine')
    run = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *dist.values()], text=True, capture_output=True)
    assert run.returncode == 0, run.stdout

@pytest.mark.slow
def test_wheel_works_outside_of_the_repository(dist, tmp_path):
    "In a fresh environment, which sees the torch and fastai at hand but not this repository"
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'venv'], check=True)
    python = tmp_path/'venv'/('Scripts' if sys.platform == 'win32' else 'bin')/'python'
    purelib = subprocess.run([python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, text=True, capture_output=True).stdout.strip()
    links = tmp_path/'others' # what is installed, without the editable install of this repository
    links.mkdir()
    for entry in Path(sysconfig.get_path('purelib')).iterdir():
        if 'rholoss_fastai' not in entry.name and entry.suffix != '.pth': (links/entry.name).symlink_to(entry)
    (Path(purelib)/'others.pth').write_text(f'{links}\n')
    install = subprocess.run([python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', dist['.whl']], cwd=tmp_path, text=True, capture_output=True)
    assert install.returncode == 0, install.stderr[-3000:]
    run = subprocess.run([python, '-W', 'ignore', '-c', 'import sys\n' + FIVE_LINES], cwd=tmp_path, text=True, capture_output=True, timeout=300,
                         env={'PATH': '', 'HOME': str(tmp_path), 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert (Path(purelib)/'rholoss_fastai'/'py.typed').exists()
