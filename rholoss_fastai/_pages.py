"What the pages of the documentation share: measured results where they are at hand, as tables"
import json
from pathlib import Path

import numpy as np

from rholoss_fastai.compare import Comparison
from rholoss_fastai.interpret import name_lines  # noqa: F401  used by the pages

RESULTS = 'https://github.com/rholoss-fastai/rholoss_fastai/tree/main/benchmarks/results'

def measured(
    pattern:str # Name of files in `benchmarks/results`; may hold wildcards
)->list: # What each of them holds; empty where there are none
    "Results of the benchmarks; outside a clone of the repository a sentence that says where they are"
    folder = next((o/'benchmarks'/'results' for o in [Path.cwd(), *Path.cwd().parents] if (o/'benchmarks'/'results').is_dir()), None)
    files = sorted(folder.glob(pattern)) if folder else []
    if not files: print(f'{pattern} is not here. What was measured is kept in {RESULTS}')
    return [json.loads(o.read_text(encoding='utf-8')) for o in files]

def markdown_table(
    rows:list # A dict per row, with the same keys
)->str:
    "A Markdown table, numbers to the right"
    names = list(rows[0])
    numbers = {name: all(isinstance(o[name], (int, float)) or str(o[name])[:1] in '+-−–0123456789' for o in rows) for name in names}
    lines = [names, ['---:' if numbers[name] else '---' for name in names], *([str(o[name]) for name in names] for o in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)

def comparison_rows(
    result:Comparison
)->list: # A dict per method, of text
    "A comparison as a reader wants it: what came of it, against plain training, at what cost"
    table,plain,res = result.table,result.table.loc['plain'],[]
    for method,row in table.iterrows():
        against = '–' if method == 'plain' else f'{100*row.difference:+.1f} ({100*row.low:+.1f} to {100*row.high:+.1f})'
        line = {'method': f'`{method}`', 'seeds': int(row.seeds), result.metric: f'{row[result.metric]:.1%}', 'points over plain (95 % interval)': against,
                'seconds, plain = 1': f'{row.seconds/plain.seconds:.2f}'}
        if not np.isnan(row.wrong_labels): line['wrong labels trained on'] = f'{row.wrong_labels:.0%}'
        res.append(line)
    return res
