"What holds for the project as a whole: versions, floors, names, notebooks, the README"
import ast
import copy
import functools
import importlib
import json
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from check_sync import generated_modules
from fastcore.nbio import read_nb
from nbdev.clean import clean_nb
from write_readme import readme

import rholoss_fastai
import rholoss_fastai.all

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NBS = ROOT/'rholoss_fastai', ROOT/'nbs'
SOURCES = {path.stem: notebook for path, notebook in generated_modules(PACKAGE).items()}
METHODS = {'batch_loss_filter', 'selective_backprop', 'rho_loss', 'rho_epochs', 'just_train_twice',
           'one_pass', 'tokens'}
NOTEBOOKS = sorted(path for path in NBS.rglob('*.ipynb')
                   if not any(part[0] in '._' for part in path.relative_to(NBS).parts))

def notebook_id(path): return path.relative_to(NBS).as_posix()
def floor(module): return int(SOURCES[module].name.split('_')[0])
@functools.cache
def tree(module): return ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))

def imported(module):
    "Names of this package's modules that `module` imports, anywhere in its code"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = f"rholoss_fastai.{node.module or ''}" if node.level else node.module
            names = [source] if source.strip('.') != 'rholoss_fastai' else [f'rholoss_fastai.{alias.name}'
                                                                            for alias in node.names]
        else: continue
        yield from (name.split('.')[1] for name in names if name.startswith('rholoss_fastai.'))

def test_versions_are_equal():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    assert rholoss_fastai.__version__ == settings['DEFAULT']['version']

@pytest.mark.parametrize('module', SOURCES)
def test_module_comes_from_a_numbered_notebook(module):
    assert SOURCES[module].exists(
        ), f'{module}.py was made from {SOURCES[module].name}, which is gone: delete the module'
    assert re.fullmatch(rf'\d\d_{module}',
                        SOURCES[module].stem), f'{module}.py comes from {SOURCES[module].name}, not NN_{module}.ipynb'

@pytest.mark.parametrize('module', SOURCES)
def test_module_imports_from_lower_floors_only(module):
    for name in imported(module):
        assert name in SOURCES, f'{module} imports {name}, which is no module of a notebook'
        assert floor(name) < floor(
            module), f'{module} ({floor(module)}) imports {name} ({floor(name)}), which does not lie below it'
        assert not {module, name} <= METHODS, f'{module} imports {name}: methods are siblings'

@pytest.mark.parametrize('module', SOURCES)
def test_module_names_its_imports_and_never_pickles(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, 'module', '')}
        elif isinstance(node, (ast.Attribute, ast.Name)): names = {ast.unparse(node)}
        else: continue
        assert '*' not in names, f'{module} imports * in line {node.lineno}: name what it needs'
        if module == 'executors': names -= {'pickle'} # looks whether a function travels, and writes nothing
        banned = names & {'pickle', 'cloudpickle', 'dill', 'joblib', 'torch.load', 'torch.save', 'load_pickle',
                          'save_pickle'}
        assert not banned, f'{module} uses {banned} in line {node.lineno}: files are safetensors'

@pytest.mark.parametrize('module', SOURCES)
def test_module_and_its_classes_can_be_read_at_a_sitting(module):
    assert len((PACKAGE/f'{module}.py').read_text(encoding='utf-8').splitlines()) <= 420
    long = [(node.name, lines) for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)
            and (lines := node.end_lineno - node.lineno + 1) > 200]
    assert not long, f'longer than two screens: {long}'

@pytest.mark.parametrize('module', [o for o in SOURCES if o != 'il_source'])
def test_one_place_tells_the_forms_of_irreducible_losses_apart(module):
    told = [node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.Call)
            and ast.unparse(node.func) == 'isinstance' and ast.unparse(node.args[0]) in ('il', 'self.il')]
    assert not told, f'{module} asks of what type `il` is, in line {told}: ask `il_source` or `il_name`'

@pytest.mark.parametrize('module', SOURCES)
def test_module_has_all(module):
    assert hasattr(importlib.import_module(f'rholoss_fastai.{module}'), '__all__')

@pytest.mark.parametrize('module', SOURCES)
def test_all_hands_on_every_name_that_is_asked_for(module):
    public = importlib.import_module(f'rholoss_fastai.{module}').__all__
    assert module in rholoss_fastai.all._modules, f'rholoss_fastai/all.py does not load {module}: add the module there'
    missing = [name for name in public if getattr(rholoss_fastai.all, name, None) is None]
    assert not missing, f'rholoss_fastai/all.py does not hand on {missing}'

def test_a_star_import_brings_what_a_user_writes():
    assert len(rholoss_fastai.all.__all__) <= 80
    assert not {'plain', 'prediction', 'batch_size', 'margin', 'entropy', 'loss', 'pred', 'targ', 'il',
                'small_cnn'} & set(rholoss_fastai.all.__all__)

def test_names_in_all_exist_once():
    names = rholoss_fastai.all.__all__
    assert all(hasattr(rholoss_fastai.all, name) for name in names)
    assert len(set(names)) == len(
        names), f'defined in two modules: {sorted(name for name in set(names) if names.count(name) > 1)}'

def test_names_in_all_shadow_none_of_fastai():
    import fastai.vision.all
    shadowed = [name for name in rholoss_fastai.all.__all__
                if getattr(fastai.vision.all, name, None) not in (None, getattr(rholoss_fastai.all, name))]
    assert not shadowed, f'{shadowed} would hide names of fastai.vision.all'

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=notebook_id)
def test_notebook_is_clean(notebook):
    stored = json.loads(notebook.read_text(encoding='utf-8'))
    cleaned = copy.deepcopy(stored)
    clean_nb(cleaned)
    assert cleaned == stored, 'run nbdev-clean'

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=notebook_id)
def test_notebook_flags_open_their_cells(notebook):
    for cell in read_nb(notebook).cells:
        if cell.cell_type != 'code': continue
        lines = cell.source.splitlines()
        n_flags = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
        late = [line for line in lines[n_flags:] if re.match(r'\s*#\s*\|', line)]
        assert not late, f'cell {cell.id}: nbdev ignores {late}, since a flag must stand on the first lines of its cell'

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=notebook_id)
def test_notebook_folders_carry_plain_names(notebook):
    assert not any(re.match(r'\d', part)
                   for part in notebook.relative_to(NBS).parts[:-1]), 'links into a numbered folder break'

def test_sidebar_lists_every_notebook():
    def pages(entries):
        for entry in entries:
            if isinstance(entry, dict): yield from pages(entry['contents'])
            else: yield entry
    listed = list(pages(yaml.safe_load((NBS/'sidebar.yml').read_text())['website']['sidebar']['contents']))
    assert sorted(listed) == sorted(map(notebook_id, NOTEBOOKS)), 'nbs/sidebar.yml and the notebooks in nbs/ differ'

def test_readme_is_current():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(), 'run python tools/write_readme.py'

def test_readme_sets_up_in_two_commands():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for command in 'pip install -e . && python recipes/quickstart.py', 'pip install -e ".[dev]" && python -m pytest':
        assert f'\n{command}\n' in text, f'the README no longer says {command}'

def test_no_path_of_one_machine():
    files = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
                           check=True, text=True,
                           capture_output=True).stdout.splitlines()
    for name in files:
        if Path(name).suffix not in {'.py', '.ipynb', '.md', '.toml', '.ini', '.yml', '.json', '.csv', ''}: continue
        if not (ROOT/name).is_file(): continue
        found = re.search(r'''(?<![\w.:/-])/(?:home|root|tmp|work|Users|mnt|opt)/[\w.-]+''',
                          (ROOT/name).read_text(encoding='utf-8'))
        assert not found, f'{name} holds {found[0]}, a path of one machine'
