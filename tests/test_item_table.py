"The fingerprint of a data set, and tables of one value per row"
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import Datasets, TfmdDL
from fastai.tabular.core import Categorify, TabDataLoader, TabularPandas
from fastai.torch_core import set_seed
from fastcore.basics import noop
from row_loaders import N, Rows, chosen, fastai_loaders, make, tabular, torch_loaders
from safetensors.torch import save_file
from torch import tensor
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Subset, TensorDataset

from rholoss_fastai.item_table import ItemTable, fingerprint
from rholoss_fastai.loaders import restrict_rows, scoring_loader
from rholoss_fastai.rows import track_rows

# the fingerprint

def fingerprint_of(dataset): return fingerprint(TorchDataLoader(dataset, batch_size=4))

def test_paths():
    def of(folder, order=None, label=lambda o: o.parent.name, n=50):
        files = [Path(folder)/('cat' if i%2 else 'dog')/f'{i:05}.png' for i in order or range(n)]
        return fingerprint(TfmdDL(Datasets(files, [[lambda o: o], [label]]), bs=4, num_workers=0))
    here = of('/data/pets')
    assert here == of('elsewhere/c/pets2') and here['n'] == 50 and here['targets'] and here['items']
    swapped = list(range(50)); swapped[10],swapped[12] = 12,10
    assert of('/data/pets', swapped)['items'] != here['items']
    relabelled = of('/data/pets', label=lambda o: 'cat' if o.stem == '00020' else o.parent.name)
    assert relabelled['items'] == here['items'] and relabelled['targets'] != here['targets']
    assert of('/data/pets', n=49)['n'] == 49

def test_quick(tmp_path):
    files = [tmp_path/f'class{i%100}'/f'image_{i:06}.jpeg' for i in range(50_000)]
    loader = TfmdDL(Datasets(files, [[lambda o: o], [lambda o: o.parent.name]]), bs=4, num_workers=0)
    start = time.perf_counter()
    fingerprint(loader)
    assert time.perf_counter() - start < 10 # a second at most where nothing else runs

def test_tensors_and_attributes():
    x,y = torch.rand(1000,3),torch.randint(0, 9, (1000,))
    here = fingerprint_of(TensorDataset(x, y))
    assert here == fingerprint_of(TensorDataset(x.clone(), y.clone()))
    y2 = y.clone(); y2[7] += 1
    assert fingerprint_of(TensorDataset(x, y2))['targets'] != here['targets']
    assert fingerprint_of(TensorDataset(x.flip(0), y))['items'] != here['items']
    assert fingerprint_of(TensorDataset(x))['targets'] == ''
    class Vision(Rows):
        def __init__(self, data, targets): self.data,self.targets,self.n = data,targets,len(data)
        def __getitem__(self, i): raise AssertionError('opened')
    pictures = np.random.default_rng(0).integers(0, 255, (1000,4,4,3), dtype=np.uint8)
    labels = list(y.tolist())
    here = fingerprint_of(Vision(pictures, labels))
    assert fingerprint_of(Vision(pictures, [*labels[:7], labels[7]+1, *labels[8:]]))['targets'] != here['targets']
    assert fingerprint_of(Vision(pictures[::-1], labels))['items'] != here['items']
    class Folder(Vision):
        def __init__(self, *files): self.samples,self.targets,self.n = [(o, 0) for o in files],[0]*len(files),len(files)
    here = fingerprint_of(Folder('/a/b/1.png', '/a/b/2.png'))
    assert fingerprint_of(Folder('/c/1.png', '/c/2.png')) == here != fingerprint_of(Folder('/c/2.png', '/c/1.png'))

def test_subset_of_known_rows():
    x,y = torch.rand(1000,3),torch.arange(1000)%7
    def of(rows, y=y): return fingerprint_of(Subset(Subset(TensorDataset(x, y), range(0,1000,2)), rows))
    here,y2 = of([5,9,2]),y.clone()
    y2[18] += 1
    assert here == of([5,9,2]) and here['n'] == 3 and all(here.values())
    relabelled = of([5,9,2], y2)
    assert of([9,5,2])['items'] != here['items'] == relabelled['items'] and relabelled['targets'] != here['targets']

def test_moved_masks():
    def of(folder, order=1):
        files = [Path(folder)/'images'/f'{i}.png' for i in range(40)]
        def mask(o): return Path(folder)/'masks'/f'{order*int(o.stem)%41}.png'
        datasets = Datasets(files, [[noop], [mask, lambda o: None]], do_setup=False)
        return fingerprint(TfmdDL(datasets, bs=4, num_workers=0, do_setup=False))
    assert of('/data/camvid') == of('/elsewhere')
    assert of('/data/camvid', 3)['targets'] != of('/data/camvid')['targets'] != ''

def test_opaque_data_sets():
    here = fingerprint_of(Rows())
    class Reversed(Rows):
        def __getitem__(self, i): return super().__getitem__(N-1-i)
    class Augmented(Rows):
        def __getitem__(self, i): return torch.rand(2), tensor(-i)
    other,random_inputs = fingerprint_of(Reversed()),fingerprint_of(Augmented())
    assert other['items'] != here['items'] and other['targets'] != here['targets']
    assert random_inputs == dict(n=N, targets=here['targets'], items='')
    # what can't be told isn't compared
    assert ItemTable.of(torch.zeros(N), TorchDataLoader(Rows())).check(TorchDataLoader(Augmented()))
    as_dicts = fingerprint_of([dict(ids=[i], label=i%2) for i in range(9)])
    assert as_dicts['targets'] != fingerprint_of([dict(ids=[i], label=0) for i in range(9)])['targets']
    assert as_dicts['items'] == fingerprint_of([dict(ids=[i], label=0) for i in range(9)])['items']
    def numbered(x, y): return TfmdDL(Datasets(range(9), [[lambda i: x[i]], [lambda i: y[i]]]), bs=2, num_workers=0)
    x,y = torch.rand(9,2),torch.arange(9)
    here = fingerprint(numbered(x, y))
    assert here == fingerprint(numbered(x.clone(), y)) and here['items'] != fingerprint(numbered(x.flip(0), y))['items']

def test_tabular_fingerprint():
    here = fingerprint(make('tabular'))
    assert here == fingerprint(restrict_rows(make('tabular', shuffle=True), chosen)) and here['targets']
    table = tabular(); table.items.iloc[5, list(table.items.columns).index('y')] = 9
    assert fingerprint(TabDataLoader(table))['targets'] != here['targets']

def test_the_same_for_every_copy():
    for kind in [*fastai_loaders, *torch_loaders]:
        loader = make(kind)
        copies = [track_rows(loader), scoring_loader(loader), scoring_loader(loader, chosen)]
        if kind != 'batches': copies += [restrict_rows(loader, chosen), track_rows(restrict_rows(loader, chosen))]
        assert all(fingerprint(o) == fingerprint(loader) for o in copies), kind

def test_fingerprint_draws_nothing():
    class Augmented(Rows):
        def __getitem__(self, i): return torch.rand(2) + random.random() + np.random.rand(), tensor(i)
    loader = make('tfmd', shuffle=True); loader.dataset = Augmented()
    def draws(use):
        set_seed(6)
        if use: fingerprint(loader)
        return random.random(), np.random.rand(), torch.rand(1).item()
    assert draws(True) == draws(False)

script = '''
import json, sys
from pathlib import Path
import numpy as np, torch
from fastai.data.core import Datasets, TfmdDL
from fastai.data.load import DataLoader
from rholoss_fastai.item_table import fingerprint, ItemTable
rng = np.random.default_rng(0)
files = [Path('/data')/str(i%3)/f'{i}.png' for i in range(300)]
loaders = [TfmdDL(Datasets(files, [[lambda o: o], [lambda o: {o.parent.name, *'uvwxyz'}]]), num_workers=0),
           DataLoader([(rng.random(3), 'ab'[i%2], object()) for i in range(40)], bs=4)]
print(json.dumps([fingerprint(o) for o in loaders]))
'''

def run_script(code, *args, **env):
    args = [sys.executable, '-W', 'ignore', '-c', code, *map(str, args)]
    return subprocess.run(args, env=dict(os.environ, **env), capture_output=True, text=True)

@pytest.mark.slow
def test_the_same_in_every_process():
    "Whatever the order of its sets: Python draws it anew in each process"
    other = run_script(script, PYTHONHASHSEED='2' if os.environ.get('PYTHONHASHSEED') == '1' else '1')
    with redirect_stdout(StringIO()) as here: exec(script, {})
    assert other.stdout and other.stdout == here.getvalue(), other.stderr
    assert all(all(o.values()) for o in json.loads(other.stdout))

# tables

class OtherTable(ItemTable):
    def validate(self):
        if self.values.isnan().any(): raise ValueError('NaN')

def table_of(n=9):
    return ItemTable(torch.arange(n), dict(n=n, targets='aa', items='bb'), dict(model='resnet18', folds=[1,2]))

def test_table(tmp_path):
    table,path = table_of(),tmp_path/'new folder'/'il.safetensors'
    assert table.values.dtype == torch.float32 and len(table) == 9 and table[tensor([2,3])].tolist() == [2,3]
    assert 'resnet18' in repr(table)
    table.save(path); table.save(str(path))
    same = ItemTable.load(str(path))
    assert torch.equal(same.values, table.values) and same.fingerprint == table.fingerprint and same.info == table.info
    assert [o.name for o in path.parent.iterdir()] == ['il.safetensors']
    bad = ((torch.zeros(3), '3 values for a data set of 9'), (torch.zeros(9,1), 'one value per row'),
           (tensor(1.), 'one value per row'))
    for values,error in bad:
        with pytest.raises(ValueError, match=error): ItemTable(values, dict(n=9, targets='', items=''))
    with pytest.raises(TypeError, match="can't be kept in a file"):
        ItemTable(torch.zeros(9), dict(n=9), dict(model=object()))
    with pytest.raises(ValueError, match='NaN'): OtherTable(tensor([float('nan')]), dict(n=1))

def test_bad_files(tmp_path):
    path = tmp_path/'il.safetensors'
    with pytest.raises(FileNotFoundError): ItemTable.load(path)
    table_of().save(path)
    content = path.read_bytes()
    half,no_n = content[:60],content.replace(b'\\"n\\"', b'\\"m\\"', 1)
    assert no_n != content
    for bad in (b'', content[:5], half, content[:-4], b'not a file of numbers', no_n, b'\x80\x04pickle'*9):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='truncated, corrupt'): ItemTable.load(path)
    torch.save(torch.zeros(9), path)
    with pytest.raises(ValueError, match='truncated, corrupt'): ItemTable.load(path)
    save_file(dict(weight=torch.zeros(9)), path)
    with pytest.raises(ValueError, match='holds no ItemTable: it holds'): ItemTable.load(path)
    save_file(dict(values=torch.zeros(9)), path, dict(kind='ItemTable', format='1', fingerprint='{', info='{}'))
    with pytest.raises(ValueError, match='truncated, corrupt'): ItemTable.load(path)
    save_file(dict(values=torch.zeros(9)), path, dict(kind='ItemTable', format='2', fingerprint='{}', info='{}'))
    with pytest.raises(ValueError, match='has format 2, but this version reads 1'): ItemTable.load(path)
    OtherTable(torch.zeros(2), dict(n=2, targets='', items='')).save(path)
    with pytest.raises(ValueError, match='holds OtherTable, not ItemTable'): ItemTable.load(path)

def test_check():
    loader = make('tfmd')
    table = ItemTable.of(torch.zeros(N), loader, seed=3)
    assert table.check(track_rows(loader)) is table and table.info == dict(seed=3)
    for part,error in (('targets', 'relabelled'), ('items', 'another order')):
        other = ItemTable(table.values, dict(table.fingerprint, **{part: 'ff'}))
        with pytest.raises(ValueError, match=error): other.check(loader)
    with pytest.raises(ValueError, match='for 53 rows, but this data set has 9'):
        table.check(TfmdDL(Rows(9), num_workers=0))

def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'il.safetensors'
    table_of().save(path)
    before = path.read_bytes()
    for name in ('replace', 'fsync'):
        with monkeypatch.context() as m:
            m.setattr(os, name, lambda *a: (_ for _ in ()).throw(OSError('disk full')))
            with pytest.raises(OSError, match='disk full'): table_of(12).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def killed(path):
    os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    ItemTable(torch.arange(12), dict(n=12, targets='', items='')).save(path)

def test_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path/'il.safetensors'
    table_of().save(path)
    process = get_context('fork').Process(target=killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.equal(ItemTable.load(path).values, torch.arange(9.))

# what a data frame may gain, and where folders may move

def frame_dls(folder, **extra):
    frame = pd.DataFrame(dict(fn=[f'{i:02d}.png' for i in range(20)],
                              label=['xy'[i%2] for i in range(20)])).assign(**extra)
    read = [[lambda r: f'{folder}/{r["fn"]}', noop], [lambda r: r['label'], noop]]
    return TfmdDL(Datasets(frame, read), bs=4, num_workers=0)

def table_dl(**extra):
    frame = pd.DataFrame(dict(u=np.arange(20.), y=['xy'[i%2] for i in range(20)])).assign(**extra)
    return TabDataLoader(TabularPandas(frame, procs=[Categorify], cont_names=['u'], y_names='y'), bs=4)

def test_a_column_that_is_not_used():
    for make_dl in (lambda **kw: frame_dls('/data', **kw), table_dl):
        here = fingerprint(make_dl())
        assert all(here.values()) and fingerprint(make_dl(note=1.5)) == here
    assert fingerprint(table_dl(u=np.arange(20.)[::-1]))['items'] != fingerprint(table_dl())['items']
    changed = frame_dls('/data', fn=[f'{19-i:02d}.png' for i in range(20)])
    assert fingerprint(changed)['items'] != fingerprint(frame_dls('/data'))['items']
    relabelled = frame_dls('/data', label=['x']*20)
    assert fingerprint(relabelled)['targets'] != fingerprint(frame_dls('/data'))['targets']

def test_a_folder_of_a_frame_may_move():
    assert fingerprint(frame_dls('/data/a')) == fingerprint(frame_dls('/elsewhere/b/c'))

# tables of a part

@pytest.mark.parametrize('rows', [[1, 2, 5], [5, 1, 2], list(range(52))])
def test_a_table_of_some_rows(rows, tmp_path):
    whole = make('plain')
    part, values = restrict_rows(whole, rows), torch.rand(len(rows))
    ascending = sorted(rows)
    table = ItemTable.of(values, part, made='here')
    assert len(table) == N and torch.equal(table[ascending], values) and table.info['n_known'] == len(rows)
    assert table.unknown.sum() == N - len(rows) and not table.unknown[ascending].any()
    table = ItemTable.load(table.save(tmp_path/'part'))
    table.check(part); table.check(restrict_rows(whole, rows[:1]))
    with pytest.raises(ValueError, match=f'of {len(rows)} of 53 rows: nothing is known of {N - len(rows)}'):
        table.check(whole)
    foreign = [next(i for i in range(N) if i not in rows), rows[0]]
    with pytest.raises(ValueError, match='nothing is known of 1 '): table.check(restrict_rows(whole, foreign))
    again = ItemTable.of(table.values, part) # the whole length, with NaN where nothing is known
    assert again.info['n_known'] == len(rows) and again.check(part)

def test_only_rows_outside_may_be_missing():
    from rholoss_fastai.importance import DatasetScores
    from rholoss_fastai.irreducible import IrreducibleLosses
    whole, values = make('plain'), torch.rand(3)
    part = restrict_rows(whole, [1, 2, 5])
    for cls in (IrreducibleLosses, DatasetScores):
        assert cls.of(values, part).check(part).info['n_known'] == 3
        for bad in (tensor([.1, float('nan'), .2]), tensor([.1, float('inf'), .2])):
            with pytest.raises(ValueError, match='NaN or infinite'): cls.of(bad, part)
        odd = torch.rand(N); odd[7] = float('nan')
        with pytest.raises(ValueError, match='NaN or infinite'): cls.of(odd, whole)

@pytest.mark.parametrize('index', [range(10, 10+N), range(N-1, -1, -1)])
def test_a_series_with_an_index_of_its_own(index):
    values = np.random.rand(N).astype('float32')
    assert torch.equal(ItemTable.of(pd.Series(values, index=index), make('plain')).values, torch.tensor(values))
