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
    heading = f"\n## {citation['version']}, {citation['date-released']}\n"
    assert citation['version'] == settings()['version'] and heading in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')

def test_set_version(tmp_path):
    for name in 'settings.ini', 'CITATION.cff', 'CHANGELOG.md', 'rholoss_fastai/__init__.py':
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text((ROOT/name).read_text(encoding='utf-8'), encoding='utf-8')
    main('7.8.9', root=str(tmp_path))
    texts = {path.name: path.read_text(encoding='utf-8') for path in tmp_path.rglob('*') if path.is_file()}
    assert '\nversion = 7.8.9\n' in texts['settings.ini'] and '\nversion: 7.8.9\n' in texts['CITATION.cff']
    assert '__version__ = "7.8.9"' in texts['__init__.py']
    assert re.search(r'^## Unreleased\n\n## 7\.8\.9, \d{4}-\d\d-\d\d$', texts['CHANGELOG.md'], re.MULTILINE)

@pytest.mark.parametrize('before,after', [
    ('# C\n\n## Unreleased\n\n- a\n', '# C\n\n## Unreleased\n\n## 1.0.0, 2030-01-02\n\n- a\n'),
    ('\n## Unreleased\n\n## 1.0.0, soon\n', '\n## Unreleased\n\n## 1.0.0, 2030-01-02\n')])
def test_changelog_is_dated(before, after): assert dated(before, '1.0.0', '2030-01-02') == after

def test_changelog_without_a_place_for_the_version():
    with pytest.raises(SystemExit, match='Unreleased'): dated('# C\n', '1.0.0', '2030-01-02')

ABSENT = ['accelerate', 'nbdev', 'pytest', 'hypothesis', 'transformers']
FIVE_LINES = f'import sys; sys.modules.update(dict.fromkeys({ABSENT}))' + '''
from fastai.vision.all import *
from rholoss_fastai.all import *
import rholoss_fastai
assert Path(rholoss_fastai.__file__).is_relative_to(sys.prefix), rholoss_fastai.__file__
set_seed(0)
labels = torch.arange(64) % 2
images = torch.randn(64, 8) + 3*labels[:,None]
dls = DataLoaders(*[DataLoader(list(zip(images, labels)), bs=8, shuffle=shuffle) for shuffle in (True, False)])
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
learn.batch_loss_filter(warmup_epochs=0)
with learn.no_bar(): learn.fit(2, 0.1)
learn.selection.report()
with learn.no_bar(): assert learn.validate()[1] > 0.9
'''

def run(*command, cwd, **kwargs):
    "What a command printed; its errors are the test's"
    done = subprocess.run([str(o) for o in command], cwd=cwd, text=True, capture_output=True, timeout=600, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

@pytest.fixture(scope='module')
def dist(tmp_path_factory, copy_repository):
    "sdist, and the wheel that is built from it, not from the repository"
    pytest.importorskip('build')
    out = tmp_path_factory.mktemp('dist')
    copy = copy_repository(tmp_path_factory.mktemp('repository'), skip=('nbs/', 'benchmarks/', 'recipes/', 'tests/'))
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, copy, cwd=out)
    return {path.suffix: path for path in out.iterdir()}

@pytest.mark.slow
def test_metadata_renders_on_pypi(dist, tmp_path):
    pytest.importorskip('twine')
    run(sys.executable, '-m', 'twine', 'check', '--strict', *dist.values(), cwd=tmp_path)

@pytest.mark.slow
def test_wheel_works_outside_of_the_repository(dist, tmp_path):
    """In a fresh environment, which sees the torch and fastai at hand but not this repository; what `pip install` alone
    brings is enough: accelerate, nbdev and the testing tools are optional"""
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv', cwd=tmp_path)
    python = tmp_path/'venv'/('Scripts' if sys.platform == 'win32' else 'bin')/'python'
    purelib = Path(run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    others = tmp_path/'others' # all that is installed, but for the editable install of this repository
    others.mkdir()
    for entry in Path(sysconfig.get_path('purelib')).iterdir():
        if 'rholoss_fastai' not in entry.name and entry.suffix != '.pth': (others/entry.name).symlink_to(entry)
    (purelib/'others.pth').write_text(f'{others}\n')
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', dist['.whl'], cwd=tmp_path)
    env = {'PATH': '', 'HOME': str(tmp_path), 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'}
    run(python, '-W', 'ignore', '-c', FIVE_LINES, cwd=tmp_path, env=env)
    assert (purelib/'rholoss_fastai'/'py.typed').exists()
