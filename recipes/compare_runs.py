"""Compare runs of a recipe: one table, one figure.

python recipes/compare_runs.py runs
"""
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import accept_underscores, best, last_five, plot_histories, print_table, read_run, steps_to
from fastcore.script import call_parse


def compare(
    runs, # method -> list of (history, summary), runs of one method with different seeds in the same order
    baseline='uniform' # The method whose best accuracy is to be reached
):
    "Rows of the table, a dict each: mean over seeds of accuracies, and of steps and seconds to the baseline's best of the same seed"
    table = []
    base = {summary['seed']: history for history,summary in runs[baseline]}
    for method,results in runs.items():
        row = dict(method=method, seeds=len(results), best=np.mean([best(h) for h,_ in results]), last_five=np.mean([last_five(h) for h,_ in results]),
                   seconds=np.mean([h[-1][3] for h,_ in results]))
        pairs = [(base[s['seed']], h) for h,s in results if s['seed'] in base]
        reached = [(steps_to(b, best(b)), steps_to(h, best(b))) for b,h in pairs]
        row['reached'] = sum(own is not None for _,own in reached)
        if pairs and row['reached'] == len(pairs):
            row.update(steps=np.mean([own[0] for _,own in reached]), steps_share=np.mean([own[0]/b[0] for b,own in reached]),
                       seconds_to=np.mean([own[3] for _,own in reached]), seconds_share=np.mean([own[3]/b[3] for b,own in reached]))
        il = [s['il']['seconds'] for _,s in results if s.get('il')]
        if il: row['seconds_il'] = np.mean(il)
        noisy = [s['noisy_selected'] for _,s in results if 'noisy_selected' in s]
        if noisy: row['noisy_selected'] = np.mean(noisy)
        matthews = [s['matthews'] for _,s in results if 'matthews' in s]
        if matthews: row['matthews'] = np.mean(matthews)
        table.append({k: v if isinstance(v, (str, int)) else float(v) for k,v in row.items()})
    return table


def show(table, baseline='uniform'):
    def number(row, key, form): return format(row[key], form) if key in row else '-'
    print_table(['method', 'seeds', 'best', 'last five', f"steps to {baseline}'s best", 'share', 'seconds to it', 'share', 'seconds in all',
                 'IL seconds', 'noisy among selected'],
                [[r['method'], r['seeds'], f"{r['best']:.4f}", f"{r['last_five']:.4f}", number(r, 'steps', '.0f'), number(r, 'steps_share', '.2f'),
                  number(r, 'seconds_to', '.0f'), number(r, 'seconds_share', '.2f'), f"{r['seconds']:.0f}", number(r, 'seconds_il', '.0f'),
                  number(r, 'noisy_selected', '.3f')] for r in table])


accept_underscores()


@call_parse
def main(
    folder:str, # Folder that holds the runs, a folder each
    baseline:str='uniform', # Method whose best accuracy is to be reached
    out:str=None, # Folder for comparison.json and comparison.png; default: `folder`
    title:str=None, # Title of the figure
):
    "Print a table of the runs in `folder`, and save it with a figure"
    runs = defaultdict(list)
    for summary in sorted(Path(folder).glob('*/summary.json')):
        history,summary = read_run(summary.parent)
        runs[summary['method']].append((history, summary))
    if baseline not in runs: raise SystemExit(f"There is no run of the baseline {baseline!r} in {folder}: found {', '.join(runs) or 'none'}.")
    runs = {baseline: runs[baseline], **runs} # the baseline first
    table = compare(runs, baseline)
    show(table, baseline)
    out = Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    settings = runs[baseline][0][1]
    histories = {method: [history for history,_ in results] for method,results in runs.items()}
    (out/'comparison.json').write_text(json.dumps(dict(table=table, settings=settings, histories=histories)) + '\n')
    plot_histories(histories, out/'comparison.png', title)
