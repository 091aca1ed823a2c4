"Write nbs/api_index.ipynb: everything public on one page, in the sidebar's order, with its first line of documentation"
import importlib
import inspect
import re
import sys
from pathlib import Path

import yaml
from check_sync import generated_modules
from fastcore.nbio import dict2nb, mk_cell, new_nb, read_nb, write_nb
from fastcore.script import call_parse, store_true

ROOT = Path(__file__).resolve().parent.parent
NBS,PACKAGE = ROOT/'nbs',ROOT/'rholoss_fastai'
TITLE = '''# Index of the API

> Everything public on one page: `from rholoss_fastai.all import *`'''

def sidebar_pages(entries):
    "Notebooks in the order in which the sidebar lists them"
    for entry in entries:
        if isinstance(entry, dict) and 'contents' in entry: yield from sidebar_pages(entry['contents'])
        else: yield entry['href'] if isinstance(entry, dict) else entry

def anchors(module):
    "Anchor of everything that the page of `module` documents, methods of fastai's classes included"
    symbols = importlib.import_module('rholoss_fastai._modidx').d['syms'].get(f'rholoss_fastai.{module}', {})
    return {name.removeprefix(f'rholoss_fastai.{module}.'): link[0].partition('#')[2] for name,link in symbols.items()}

def first_line(value, name):
    "The first line of an object's own documentation; of a constant, what it holds"
    if inspect.isclass(value) or inspect.isroutine(value): return (inspect.getdoc(value) or '').partition('\n')[0]
    if isinstance(value, (dict, list, tuple, set)): return ', '.join(f'`{key}`' for key in value)
    return f'`{value!r}`' if isinstance(value, (int, float, str)) else ''

def entries(module):
    "`(name, anchor, documentation)` of what `module` adds to a Learner, then of the names in its `__all__`"
    from fastai.learner import Learner
    namespace,links = importlib.import_module(f'rholoss_fastai.{module}'),anchors(module)
    for name,anchor in links.items():
        if re.fullmatch(r'Learner\.[a-z]\w*', name):
            yield name.replace('Learner', 'learn'), anchor, first_line(getattr(Learner, name.partition('.')[2]), name)
    for name in namespace.__all__: yield name, links.get(name), first_line(getattr(namespace, name), name)

def title(notebook):
    "A notebook's title: the first heading of its Markdown cells"
    text = '\n'.join(cell.source for cell in read_nb(notebook).cells if cell.cell_type == 'markdown')
    return re.search(r'^# (.+)$', text, re.MULTILINE)[1]

def cells():
    "The page's cells: a heading and a table for each module"
    yield mk_cell(TITLE, 'markdown')
    modules = {notebook.relative_to(NBS).as_posix(): path.stem for path,notebook in generated_modules(PACKAGE).items()}
    sidebar = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    for page in sidebar_pages(sidebar):
        if page not in modules: continue
        rows = [(f'[`{name}`]({page}#{anchor})' if anchor else f'`{name}`', text.replace('|', r'\|'))
                for name,anchor,text in entries(modules[page])]
        if not rows: continue
        table = '\n'.join(f'| {name} | {text} |' for name,text in rows)
        yield mk_cell(f'## [{title(NBS/page)}]({page})\n\n|  |  |\n| {"-"*30} | {"-"*70} |\n{table}', 'markdown')

def notebook():
    "The page as a notebook, its cells numbered so that the same text gives the same file"
    nb = new_nb(list(cells()))
    for i,cell in enumerate(nb.cells): cell['id'] = f'api-index-{i}'
    return dict2nb(nb)

@call_parse
def main(
    check:store_true=False, # Only compare: exit 1 where the page is out of date
):
    "Write nbs/api_index.ipynb"
    path,nb = NBS/'api_index.ipynb',notebook()
    if not check: write_nb(nb, path)
    elif not path.exists() or [c.source for c in read_nb(path).cells] != [c.source for c in nb.cells]:
        sys.exit('nbs/api_index.ipynb is out of date: run `python tools/write_api_index.py`')
