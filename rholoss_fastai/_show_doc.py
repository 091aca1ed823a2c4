"How the site shows a function: signature, docstring and a table of its parameters (`[tool.nbdev] renderer`)"
import inspect
import re
import textwrap
from types import UnionType
from typing import Union, get_args, get_origin

from fastcore.docments import DocmentTbl, empty
from nbdev.showdoc import BasicMarkdownRenderer

KINDS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
WIDTHS = dict(name=16, anno=16, default=12, docment=56) # dashes under the header: so pandoc divides the width

CALLABLES = r'\b(?:builtin_function_or_method|function|type)\b'

def type_text(anno):
    "A type as a reader writes it, without module paths; nothing where it is only the type of a default of None"
    if anno is empty or anno is type(None): return ''
    if get_origin(anno) in (Union, UnionType): return ' or '.join(type_text(o) or 'None' for o in get_args(anno))
    text = anno.__name__ if inspect.isclass(anno) and not hasattr(anno, '__args__') else str(anno).strip("'")
    for pattern,word in ((r'\b(?:\w+\.)+(?=\w)', ''), (r'\bNoneType\b', 'None'), (CALLABLES, 'callable')):
        text = re.sub(pattern, word, text)
    return text

def default_text(default):
    "A default as it stands in code"
    return '' if default is empty else getattr(default, '__name__', None) or repr(default)

def signature_text(name, params, width=84):
    "`name(a, b=1, *, c=2)`, broken where a page would end"
    parts,star = [],False
    for param,d in params.items():
        if d.kind is inspect.Parameter.KEYWORD_ONLY and not star: parts.append('*')
        star = star or d.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        parts.append(KINDS.get(d.kind, '') + param + (f'={default_text(d.default)}' if d.default is not empty else ''))
    text = re.sub(r'^Learner\.', 'learn.', name) + f"({', '.join(parts)})"
    return textwrap.fill(text, width, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)

class ParameterTable(DocmentTbl):
    "Parameters with type, default and what they mean; empty where none is described"
    def __init__(self, obj):
        super().__init__(obj)
        self.signature = {name: type(d)(d) for name,d in self.dm.items() if name != 'return'}
        if inspect.isclass(obj) and set(self.signature) == {'args', 'kwargs'}: # a tuple with names
            self.signature = dict(inspect.signature(obj).parameters)
        for d in self.dm.values():
            d.anno,default = type_text(d.anno) or empty,default_text(d.default)
            d.default = f'`{default}`' if default else empty
            if isinstance(d.anno, str): d.anno = f'`{d.anno}`'

    @property
    def hdr_str(self):
        titles = dict(anno='Type', default='Default', docment='What it is')
        names = ['Parameter', *(titles[column] for column in self._columns)]
        dashes = ['-'*WIDTHS[column] for column in ('name', *self._columns)]
        return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (names, dashes))

    @property
    def params_str(self):
        # as HTML, or nbdev would link the name of a parameter to a function that happens to have it too
        def code(match): return f"| <code>{KINDS.get(self.signature[match[1]].kind, '')}{match[1]}</code>"
        return re.sub(r'^\| (\w+)', code, super().params_str, flags=re.MULTILINE)

class ParameterRenderer(BasicMarkdownRenderer):
    "Source link, heading, short signature, docstring, table of parameters"
    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym, name=name, title_level=title_level)
        self.table = ParameterTable(self.sym)
        self.dm = signature_text(self.nm, self.table.signature)

    def _repr_markdown_(self):
        text = super()._repr_markdown_()
        try: line = inspect.getsourcelines(inspect.unwrap(self.sym))[1]
        except (OSError, TypeError): line = None
        # nbdev looks the line up under another name, and finds none
        text = text.replace('.py#LNone)', f'.py#L{line})' if line else '.py)')
        return f'{text}\n\n{self.table}'.rstrip()
