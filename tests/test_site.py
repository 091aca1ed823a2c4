"The site: notebooks that its build can process, links that lead somewhere, cells with outputs, figures with alt text"
import ast
import functools
import posixpath
import re
from pathlib import Path

import pytest
import yaml
from fastcore.nbio import read_nb
from helpers import run_in_process
from nbdev.config import get_config
from nbdev.doclinks import nbglob

from rholoss_fastai._show_doc import ParameterRenderer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = get_config(ROOT)
NBS = CONFIG.nbs_path
NOTEBOOKS = nbglob(NBS, as_path=True).sorted()
UNSHOWN = {'hide', 'export', 'exporti', 'exports', 'default_exp'}
SHOWS = re.compile(r'(^|[.\s(])(print|display|show|show_\w+|plot\w*|report|suspects)\(')
SILENT = re.compile(r'test_\w+|seed|set_\w+|manual_seed|no_\w+|close|save|append|update|mkdir|use|filterwarnings|'
                    r'simplefilter|write_text|savefig|nbdev_export|rmtree|unlink|add_cbs?|remove_cbs?|backward|step|zero_grad')
FENCE = re.compile(r'^(```|~~~).*?^\1', re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r'`[^`\n]*`')
LINK = re.compile(r'(?<!!)\[[^\]]*\](?:\[[^\]]*\])?\(([^)\s]+)\)|<a[^>]*\shref="([^"]+)"')
IMAGE = re.compile(r'!\[([^\]]*)\]\(([^)\s]+)|<img([^>]*)>')

def notebook_id(path): return path.relative_to(NBS).as_posix()
def is_shown(cell):
    "Does the site show the outputs of this code cell?"
    flags = cell.directives_
    no_output = flags.get('output') == 'false' or flags.get('include') == 'false' or flags.get('eval') == 'false'
    return cell.cell_type == 'code' and not flags.keys() & UNSHOWN and not no_output

@functools.cache
def parsed_cells(notebook):
    "Cells of a notebook, with nbdev's directives read and taken off"
    from nbdev.process import NBProcessor
    nb = read_nb(notebook)
    NBProcessor(nb=nb, rm_directives=False)
    return nb.cells

def statements(cell): return [] if cell.source.lstrip().startswith('%%') else cell.parsed_() or []
def prose(text): return INLINE_CODE.sub('', FENCE.sub('', text))

notebooks = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=notebook_id)

@notebooks
def test_cells_with_an_import_hold_only_imports(notebook):
    "The site's build runs every cell that contains an import, anywhere in it, without the cells before it"
    imports = ast.Import, ast.ImportFrom
    cells = [cell for cell in parsed_cells(notebook) if cell.cell_type == 'code']
    if not any(cell.directives_.keys() & {'export', 'exports'} for cell in cells): return # nothing is run
    for cell in cells:
        if cell.directives_.get('eval') == 'false' or 'nbdev_export()' in cell.source: continue
        trees = statements(cell)
        only,at_top = (test(isinstance(t, imports) for t in trees) for test in (all, any))
        if cell.directives_.keys() & {'export', 'exports', 'exporti'}: # run anyway, with the exported cells before it
            mixed = at_top and any(isinstance(t, (ast.Expr, ast.Assign)) for t in trees)
        else: mixed = not only and any(isinstance(node, imports) for t in trees for node in ast.walk(t))
        assert not mixed, f'cell {cell.id}: put its imports in a cell of their own\n{cell.source}'

@notebooks
def test_headings_are_clean(notebook):
    "`## Name -` is dropped where it is a cell of its own, and printed with its dash where it is not"
    for cell in parsed_cells(notebook):
        if cell.cell_type != 'markdown': continue
        dashed = re.findall(r'^#+ .*\s-\s*$', FENCE.sub('', cell.source), re.MULTILINE)
        alone = not dashed or cell.source.strip() == dashed[0].strip()
        assert alone, f'cell {cell.id}: give the heading {dashed[0]!r} a cell of its own'

@notebooks
def test_titles_are_words(notebook):
    "The sidebar lists them: in words, not as modules are called"
    title = next(line for cell in parsed_cells(notebook) if cell.cell_type == 'markdown'
                 for line in cell.source.splitlines() if line.startswith('# '))
    assert '_' not in title.replace('rholoss_fastai',
                                    '') and (title[2].isupper() or 'rholoss' in title), f'{title!r}: a title in words'

def quiet_functions(cells):
    "Names of functions, defined in these cells, that return nothing and print nothing"
    for tree in (t for cell in cells if cell.cell_type == 'code' for t in statements(cell)):
        if not isinstance(tree, ast.FunctionDef): continue
        returns = any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree))
        if not returns and not SHOWS.search(ast.unparse(tree)): yield tree.name

def shows(trees, quiet):
    "Does a cell of these statements show something: does it print or plot, or end in a value?"
    checks = [ast.unparse(t).startswith('test_') for t in trees]
    spoken = [t for t,check in zip(trees, checks) if not check and isinstance(t, (ast.Expr, ast.For, ast.With))]
    if any(SHOWS.search(ast.unparse(t)) for t in spoken): return True
    if not trees or checks[-1] or not isinstance(trees[-1], ast.Expr): return False
    value = trees[-1].value
    if not isinstance(value, ast.Call): return True
    name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, 'id', '')
    return name not in quiet and not SILENT.fullmatch(name)

@notebooks
def test_shown_cells_have_outputs(notebook):
    cells = parsed_cells(notebook)
    quiet = set(quiet_functions(cells))
    for cell in cells:
        if not is_shown(cell) or cell.get('outputs') or 'cuda' in cell.directives_: continue
        hushed = re.search(r'redirect_stdout|capture|;\s*$', cell.source)
        empty = f'cell {cell.id} shows something but holds no output: run the notebook\n{cell.source}'
        assert hushed or not shows(statements(cell), quiet), empty

@notebooks
def test_figures_have_alt_text_and_a_caption(notebook):
    for cell in parsed_cells(notebook):
        if cell.cell_type == 'markdown':
            for alt,target,tag in IMAGE.findall(FENCE.sub('', cell.source)):
                said = alt.strip() or re.search(r'\salt="[^"]+"', tag)
                assert said, f'cell {cell.id}: say what the image {target or tag} shows'
        elif is_shown(cell):
            kinds = [kind for output in cell.get('outputs', []) for kind in output.get('data', {})]
            if not any(kind.startswith('image/') for kind in kinds): continue
            for flag,what in {'fig-alt': 'what its figure shows',
                              'fig-cap': 'in a caption what is to be seen in it'}.items():
                assert cell.directives_.get(flag), f'cell {cell.id}: say {what}, with `#| {flag}: "..."`\n{cell.source}'

INSTALL = '! [ -e /content ] && pip install -Uqq git+https://github.com/rholoss-fastai/rholoss_fastai'

@notebooks
def test_notebooks_install_the_package_in_colab(notebook):
    "Where the badge on the page leads, nothing is installed yet"
    cells = [cell for cell in parsed_cells(notebook) if cell.cell_type == 'code'
             and 'default_exp' not in cell.directives_]
    if not cells: return
    first = cells[0]
    assert INSTALL in first.source and {'hide',
                                        'eval'} <= first.directives_.keys(
        ), f'the first cell of code should be\n#| hide\n#| eval: false\n{INSTALL}'

def test_measured_outside_a_clone(tmp_path, monkeypatch, capsys):
    "A page that is run in Colab says where the figures are"
    from rholoss_fastai._pages import measured
    monkeypatch.chdir(tmp_path.anchor) # `tmp_path` lies within the clone where CI keeps all that it writes there
    assert measured('rho_epochs.json') == [] and '/benchmarks/results' in capsys.readouterr().out
    (tmp_path/'benchmarks'/'results').mkdir(parents=True)
    (tmp_path/'benchmarks'/'results'/'rho_epochs.json').write_text('{"a": 1}')
    (tmp_path/'nbs').mkdir()
    monkeypatch.chdir(tmp_path/'nbs')
    assert measured('rho_*.json') == [{'a': 1}] and not capsys.readouterr().out

def test_tables_of_pages():
    from rholoss_fastai._pages import markdown_table
    assert markdown_table([{'run': '`a`', 'points': '+1.0', 'n': 3}, {'run': 'b', 'points': '–', 'n': 4}]) == (
        '| run | points | n |\n| --- | ---: | ---: |\n| `a` | +1.0 | 3 |\n| b | – | 4 |')

def test_settings_name_files_that_exist():
    site = yaml.safe_load((NBS/'_quarto.yml').read_text())
    website = site['website']
    images = [website['favicon'], website['image'], website['open-graph']['image'], website['twitter-card']['image']]
    links = [entry['href'] for entry in website['navbar']['left']]
    files = [site['format']['html']['css'], *site['filters'], *images, *links, '404.qmd']
    missing = [name for name in files if not (NBS/name).is_file()]
    assert not missing, f'nbs/_quarto.yml names {missing}, which are not in nbs'

def test_api_index_is_current():
    from write_api_index import notebook
    written = [cell.source for cell in read_nb(NBS/'api_index.ipynb').cells]
    assert written == [cell.source for cell in notebook().cells], 'run python tools/write_api_index.py'

def documented(
    table:dict[str, int], # Rows by name
    pick:str|None=None, # Name of a pick
    *targs, # Targets
    score=max, # Largest first
    il=None, # Irreducible losses
)->list: # Rows
    "A function with every kind of parameter"

def test_parameters_of_every_kind():
    text = ParameterRenderer(documented, name='Learner.documented')._repr_markdown_()
    rows = [[cell.strip() for cell in row.strip('|').split(' | ')] for row in text.splitlines()
            if row.startswith('| <code>')]
    assert 'learn.documented(table, pick=None, *targs, score=max, il=None)' in text
    assert rows == [
        ['<code>table</code>', '`dict[str, int]`', '', 'Rows by name'],
        ['<code>pick</code>', '`str or None`', '`None`', 'Name of a pick'],
        ['<code>*targs</code>', '', '', 'Targets'],
        ['<code>score</code>', '`callable`', '`max`', 'Largest first'],
        ['<code>il</code>', '', '`None`', 'Irreducible losses']]
    assert '**`list`**' in text and '*A function with every kind of parameter*' in text

def test_source_links_lead_to_a_line():
    from rholoss_fastai.picks import TopFraction
    text = ParameterRenderer(TopFraction)._repr_markdown_()
    line = int(re.search(r'/picks\.py#L(\d+)', text)[1])
    assert (ROOT/'rholoss_fastai'/'picks.py').read_text().splitlines()[line-1].startswith('class TopFraction')

# What follows is about notebooks as the site's build processes them

def identifier(heading):
    "The anchor that pandoc makes of a heading"
    explicit = re.search(r'\{[^}]*#([\w.:-]+)[^}]*\}\s*$', heading)
    if explicit: return explicit[1]
    text = re.sub(r'\{[^}]*\}\s*$', '', heading)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    text = re.sub(r'<[^>]+>', '', text).replace('`', '').replace('*', '').replace('$', '').replace('\\', '')
    text = re.sub(r'[^\w\s.-]', '', text.lower().strip())
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', text)) or 'section'

class Page:
    "A processed notebook: its text, its address, its anchors, its links"
    def __init__(self, path, folder):
        nb = read_nb(path)
        self.name = path.relative_to(folder).as_posix()
        texts,front = [],{}
        for cell in nb.cells:
            source = ''.join(cell.source)
            if cell.cell_type == 'raw' and source.startswith('---'): front = yaml.safe_load(source.strip().strip('-'))
            elif cell.cell_type == 'markdown': texts.append(source)
            texts += [''.join(output.get('data', {}).get('text/markdown', '')) for output in cell.get('outputs', [])]
        self.text = '\n\n'.join(texts)
        address = front.get('output-file', Path(self.name).with_suffix('.html').name)
        self.address = posixpath.join(posixpath.dirname(self.name), address)
        self.anchors,seen = set(),{}
        for heading in re.findall(r'^#{1,6}\s+(.*?)\s*#*$', FENCE.sub('', self.text), re.MULTILINE):
            name = identifier(heading)
            self.anchors.add(f'{name}-{seen[name]}' if name in seen else name)
            seen[name] = seen.get(name, 0) + 1
        self.anchors |= {*re.findall(r'\sid="([^"]+)"', self.text), *re.findall(r'\]\{[^}]*#([\w.:-]+)', self.text)}
        text = prose(self.text)
        self.links = [a or b for a,b in LINK.findall(text)] + [target for _,target,_ in IMAGE.findall(text) if target]

@pytest.fixture(scope='module')
def processed(tmp_path_factory, copy_repository):
    "The folder of processed notebooks, made from a copy of the repository"
    clone = copy_repository(tmp_path_factory.mktemp('clone'))
    said, = run_in_process(clone/'tools'/'process_notebooks.py', '--n-workers', '0', out=clone/'log',
                           env=[dict(PYTHONPATH=str(clone))])
    assert 'imports and other code' not in said, said[-6000:]
    return clone/'_proc'

@pytest.fixture(scope='module')
def pages(processed):
    found = [Page(path, processed) for path in sorted(processed.rglob('*.ipynb'))]
    return {page.name: page for page in found}

@pytest.mark.slow
def test_every_notebook_is_processed(processed, pages):
    assert sorted(pages) == sorted(map(notebook_id, NOTEBOOKS))
    for name in '_quarto.yml', 'styles.css', 'show_doc.lua', '404.qmd', 'images/social.png':
        assert (processed/name).is_file(), name

@pytest.mark.slow
def test_parameters_are_tables(pages):
    text = next(page for page in pages.values() if page.name.endswith('_rho_loss.ipynb')).text
    assert re.search(r'^### Learner\.rho_loss$', text, re.MULTILINE) and 'learn.rho_loss(' in text
    assert re.search(r'^\| <code>frac</code> \| `float` \| ', text, re.MULTILINE)
    assert not re.search(r'NoneType|\bfunction=|#LNone', ''.join(page.text for page in pages.values()))

@pytest.mark.slow
def test_headings_have_no_dash(pages):
    for page in pages.values():
        dashed = re.findall(r'^#+ .*\s-\s*$', FENCE.sub('', page.text), re.MULTILINE)
        assert not dashed, f'{page.name}: {dashed}'

def broken_links(page, pages, folder):
    "Links of `page` that lead to no page, file or anchor of this site"
    by_address = {p.address: p for p in pages.values()}
    for link in page.links:
        target,_,anchor = link.partition('#')
        if target.startswith(CONFIG.doc_url.rstrip('/')):
            goal = by_address.get(target.removeprefix(CONFIG.doc_url.rstrip('/')).strip('/') or 'index.html')
        elif re.match(r'[a-z]+:|//', target): continue
        elif not target: goal = page
        else:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page.name), target))
            goal = pages.get(path) or by_address.get(path)
            if goal is None and not anchor and (folder/path).is_file(): continue
        if goal is None or anchor and anchor.lower() not in goal.anchors: yield link

@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(processed, pages):
    broken = [f'{page.name}: {link}' for page in pages.values() for link in broken_links(page, pages, processed)]
    assert not broken, '\n'.join(broken)

@pytest.mark.slow
def test_links_of_the_readme_lead_somewhere(processed, pages):
    text = prose((ROOT/'README.md').read_text(encoding='utf-8'))
    links = [a or b for a,b in LINK.findall(text)]
    readme = type('Readme', (), dict(name='README.md', anchors=set(), links=links))
    broken = list(broken_links(readme, pages, ROOT))
    assert len(links) > 5 and not broken, broken
