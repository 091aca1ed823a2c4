"Set the version everywhere it stands, and date it in the changelog; the release workflow then commits and tags"
import re
import sys
from datetime import date
from pathlib import Path

from fastcore.script import call_parse

ROOT = Path(__file__).resolve().parent.parent
PLACES = { # file: what stands there, with the version between the two groups
    'settings.ini': r'(^version = )[\d.]+()$',
    'rholoss_fastai/__init__.py': r'(^__version__ = ")[\d.]+(")$',
    'CITATION.cff': r'(^version: )[\d.]+()$',
}

def replaced(text, pattern, new, name):
    "`text` with the one match of `pattern` replaced"
    text,n = re.subn(pattern, new, text, flags=re.MULTILINE)
    if n != 1: sys.exit(f'{name} should hold {pattern!r} once, and holds it {n} times')
    return text

def dated(changelog, version, day):
    "The changelog with what is unreleased headed by `version` and `day`; or its heading of that version dated"
    heading = f'## {version}, {day}'
    if f'\n## {version}, ' in changelog: pattern,new = rf'^## {re.escape(version)}, .*$',heading
    else: pattern,new = r'^## Unreleased$',f'## Unreleased\n\n{heading}'
    return replaced(changelog, pattern, new, 'CHANGELOG.md')

@call_parse
def main(
    version:str, # Such as 0.2.0
    root:str=None, # The repository's root
):
    "Write `version` into settings.ini, `__init__.py`, CITATION.cff and CHANGELOG.md"
    root,day = Path(root or ROOT),date.today().isoformat()
    if not re.fullmatch(r'\d+\.\d+\.\d+', version): sys.exit(f'version must be numbers such as 0.2.0; got {version}')
    texts = {name: (root/name).read_text(encoding='utf-8') for name in (*PLACES, 'CHANGELOG.md')}
    for name,pattern in PLACES.items(): texts[name] = replaced(texts[name], pattern, rf'\g<1>{version}\g<2>', name)
    name = 'CITATION.cff'
    texts[name] = replaced(texts[name], r'^date-released: .*$', f'date-released: {day}', name)
    texts['CHANGELOG.md'] = dated(texts['CHANGELOG.md'], version, day)
    for name,text in texts.items(): (root/name).write_text(text, encoding='utf-8')
