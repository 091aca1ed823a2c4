"What the pages of the documentation share: measured results where they are at hand, as tables"
import json
from pathlib import Path

import numpy as np

from rholoss_fastai.compare import Comparison
from rholoss_fastai.interpret import name_lines  # noqa: F401  used by the pages

RESULTS = 'https://github.com/rholoss-fastai/rholoss_fastai/tree/main/benchmarks/results'

def measured(
    *patterns:str # Names of files in `benchmarks/results`; may hold wildcards
)->list: # What each of them holds; empty where there are none
    "Results of the benchmarks; where there are none, a sentence that says where to look"
    folders = [o/'benchmarks'/'results' for o in (Path.cwd(), *Path.cwd().parents)]
    folder = next((o for o in folders if o.is_dir()), None)
    if folder is None: print(f'What was measured is kept with the source: {RESULTS}')
    files = sorted(o for pattern in patterns for o in folder.glob(pattern)) if folder else []
    if folder and not files: print(f"Not measured yet: benchmarks/results holds no {' or '.join(patterns)}.")
    return [json.loads(o.read_text(encoding='utf-8')) for o in files]

def markdown_table(
    rows:list # A dict per row, with the same keys
)->str:
    "A Markdown table, numbers to the right"
    names = list(rows[0])
    def number(o): return isinstance(o, (int, float)) or str(o)[:1] in '+-−–0123456789'
    rule = ['---:' if all(number(o[name]) for o in rows) else '---' for name in names]
    lines = [names, rule, *([str(o[name]) for name in names] for o in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)

def comparison_rows(
    result:Comparison
)->list: # A dict per method, of text; the best first
    "A comparison as a reader wants it: what came of it, against plain training, at what cost"
    table,metric,res = result.table,result.metric,[]
    share = table[metric].between(0, 1).all() and result.greater # accuracy and the like: in per cent and points
    def number(o, form='.3g'): return f'{o:.1%}' if share else format(o, form)
    def difference(o): return f'{100*o:+.1f}'.replace('-0.0', '0.0') if share else f'{o:+.3g}'
    for method,row in table.sort_values(metric, ascending=not result.greater).iterrows():
        interval = '' if np.isnan(row.low) else f' ({difference(row.low)} to {difference(row.high)})'
        line = {'method': f'`{method}`', 'seeds': int(row.seeds), metric: number(row[metric]),
                f"{'points' if share else 'difference'} to plain (95 % interval)":
                    '–' if method == 'plain' else difference(row.difference) + interval,
                'cost, plain epochs': f'{row.cost:.2f}', 'seconds': f'{row.seconds:.0f}'}
        if not np.isnan(row.wrong_labels): line['wrong labels trained on'] = f'{row.wrong_labels:.0%}'
        res.append(line)
    return res

_KINDS = dict(confused=', classes taken for each other', tail20=', the rarest class 20 times rarer')
_SETTINGS = dict(scratch='small network from scratch', finetune='pretrained body') # of `benchmarks/rho_epochs.py`

def rho_epochs_rows(
    result:dict # What `benchmarks/rho_epochs.py` wrote
)->list: # A dict per setting, of text
    "`rho_epochs` beside plain training of the same seeds, where there is such"
    def key(line): return line['setting'],line['noise'],line['budget']
    plain,res = {key(o): o for o in result['table'] if o['run'] == 'plain'},[]
    for line in result['table']:
        if 'points' not in line: continue
        setting,_,kind = line['setting'].partition('_')
        rows = ', one pass over the chosen rows' if 'rows' in line['run'] else ''
        beside = plain[key(line)]
        worst = [f"{np.mean(o['lowest_recall']):.2f}" for o in (beside, line)]
        res.append({'trained': f"{_SETTINGS.get(setting, setting)}{_KINDS.get(kind, '')}{rows}",
                    'labels redrawn': f"{line['noise']:.0%}",
                    'budget': f"{line['budget']} {'epochs' if setting == 'finetune' else 'steps'}",
                    'plain': f"{np.mean(beside['accuracy']):.1%}", '`rho_epochs`': f"{np.mean(line['accuracy']):.1%}",
                    'points, by seed': ', '.join(f'{o:+.1f}' for o in line['points']),
                    "recall of the worst class, plain / `rho_epochs`": ' / '.join(worst),
                    'processor seconds, plain = 1': f"{np.mean(line['cost']):.2f}"})
    return sorted(res, key=lambda o: (o['trained'].startswith('pretrained'), o['labels redrawn'] == '0%'))
