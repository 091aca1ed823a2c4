"The README's text, from a small notebook that holds every kind of cell and output"
import pytest
from fastcore.nbio import mk_cell, new_nb, write_nb
from write_readme import readme

DOCS = 'https://rholoss-fastai.github.io/rholoss_fastai'

def output(**data):
    return dict(output_type='display_data', metadata={},
                data={kind.replace('_', '/'): text for kind, text in data.items()})

def readme_of(tmp_path, *cells):
    nb = new_nb([mk_cell('# A title\n\n> A blurb', 'markdown'), *cells])
    write_nb(nb, tmp_path/'index.ipynb')
    return readme(tmp_path/'index.ipynb')

def test_title_code_and_outputs(tmp_path):
    table = '<style>td {color: red}</style><table><tr><td>1</td></tr></table>'
    text = readme_of(tmp_path, mk_cell('#| hide\nhidden()'),
                     mk_cell('#| echo: false\nquiet()', outputs=[output(text_plain='42')]),
                     mk_cell('#| output: false\nmute()', outputs=[output(image_png='iVBO')]),
                     mk_cell('shown()', outputs=[dict(output_type='stream', name='stdout', text='printed\n'),
                                                 output(text_html=table)]))
    assert text.startswith('# A title\n\n<!--') and '\n\n> A blurb\n\n' in text
    assert 'hidden' not in text and 'quiet' not in text and '#|' not in text
    for block in ('```\n42\n```', '```python\nmute()\n```', '```python\nshown()\n```\n\n```\nprinted\n```',
                  '<table><tr><td>1</td></tr></table>'):
        assert f'\n\n{block}\n' in text
    assert 'style' not in text and 'iVBO' not in text

@pytest.mark.parametrize('link,expected', [
    ('![a plot](images/a.png)', '![a plot](nbs/images/a.png)'),
    ('<img src="images/a.png" width="400">', '<img src="nbs/images/a.png" width="400">'),
    ('[tutorial](tutorials/cifar10.ipynb)', f'[tutorial]({DOCS}/tutorials/cifar10.html)'),
    ('[picks](02_picks.ipynb#Why)', f'[picks]({DOCS}/picks.html#Why)'),
    ('[licence](../LICENSE)', '[licence](LICENSE)'),
    ('[paper](https://arxiv.org/abs/2206.07137)', '[paper](https://arxiv.org/abs/2206.07137)'),
    ('[below](#use)', '[below](#use)'),
    ('```python\nx[0](images/a.png)\n```', '```python\nx[0](images/a.png)\n```')])
def test_links(tmp_path, link, expected): assert f'\n\n{expected}\n' in readme_of(tmp_path, mk_cell(link, 'markdown'))

def test_image_among_outputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match='nbs/images'):
        readme_of(tmp_path, mk_cell('plot()', outputs=[output(image_png='iVBO')]))
