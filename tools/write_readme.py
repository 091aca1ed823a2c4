"Write README.md from nbs/index.ipynb with nbdev's own cell filters (nbdev-readme needs quarto, this does not)"
import posixpath
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb
from fastcore.script import call_parse, store_true
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, populate_language, rm_export, rm_header_dash, strip_ansi
from nbdev.readme_filter import doc_link

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r'(^```.*?^```\s*?$)', re.MULTILINE | re.DOTALL)
TARGET = re.compile(r'(!?\[[^\]]*\]\(|<img[^>]*\ssrc=")([^)\s"]+)')
WARNING = '<!-- Written from nbs/index.ipynb by tools/write_readme.py: edit the notebook, not this file -->'

def relink(markdown, config):
    "`markdown` with links to pages pointing at the documentation site, other relative ones from the repository's root"
    def target(match):
        link = doc_link(match[2], config.doc_url)
        if not re.match(r'[a-z]+:|#|/', link): link = posixpath.normpath(posixpath.join(config.nbs_path.name, link))
        return match[1] + link
    return ''.join(part if part.startswith('```') else TARGET.sub(target, part) for part in FENCE.split(markdown))

def output_markdown(output, cell):
    "One output of `cell` as Markdown; a plot belongs in nbs/images, where the site and the README can both link to it"
    if output.output_type == 'stream': text = output.text
    elif output.output_type == 'error':
        raise ValueError(f"cell {cell.id} of the index holds an error; run the notebook again")
    else:
        data = output.data
        if any(kind.startswith('image/') for kind in data):
            raise ValueError(f"cell {cell.id} of the index has an image among its outputs, which a README can't hold: "
                             "save the image in nbs/images, show it with ![](images/name.png) in a Markdown cell, and "
                             "give the code cell `#| output: false`")
        if 'text/markdown' in data: return ''.join(data['text/markdown'])
        html = re.sub(r'<style.*?</style>', '', ''.join(data.get('text/html', '')), flags=re.DOTALL).strip()
        if '<table' in html: return html
        text = data.get('text/plain', '')
    text = ''.join(text).rstrip()
    return '' if not text or text.startswith('<IPython.core.display') else f'```\n{text}\n```'

def cell_markdown(cell, lookup):
    "`cell`, filtered already, as blocks of Markdown"
    if cell.cell_type == 'markdown': return [lookup.linkify(cell.source)]
    if cell.cell_type != 'code': return []
    flags = cell.directives_
    code = ([f'```{cell.metadata.language}\n{cell.source.strip()}\n```'] if flags.get('echo') != 'false'
            and cell.source.strip() else [])
    return (code + ([output_markdown(o, cell) for o in cell.get('outputs', [])]
                    if flags.get('output') != 'false' else []))

def readme(path=None):
    "The README's text, made from the notebook at `path`"
    config = get_config(ROOT)
    nb = read_nb(path or config.nbs_path/config.readme_nb)
    NBProcessor(nb=nb, procs=[FrontmatterProc, populate_language, strip_ansi, hide_line, rm_header_dash, rm_export,
                              clean_magics, hide_],
                process=True)
    lookup = NbdevLookup(strip_libs=config.lib_name, incl_libs=(config.lib_name,)) # a README links to this site alone
    blocks = [f"# {nb.frontmatter_['title']}", WARNING]
    if 'description' in nb.frontmatter_: blocks.append(f"> {nb.frontmatter_['description']}")
    for cell in nb.cells: blocks += cell_markdown(cell, lookup)
    return relink('\n\n'.join(block.strip('\n') for block in blocks if block.strip()), config) + '\n'

@call_parse
def main(
    check:store_true=False, # Only compare: exit 1 where README.md is out of date
):
    "Write README.md from nbs/index.ipynb"
    path, text = ROOT/'README.md', readme()
    if not check: path.write_text(text, encoding='utf-8')
    elif path.read_text(encoding='utf-8') != text:
        sys.exit('README.md is out of date: run `python tools/write_readme.py`')
