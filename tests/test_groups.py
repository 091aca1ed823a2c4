"""The groups of a data set's rows, and the worst of them, against a loop."""
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.data.load import DataLoader
from fastai.metrics import F1Score, accuracy, error_rate
from fastai.text.data import SortedDL
from helpers import fit
from numbered_rows import VALID, N, Rows, loaders, row_learner
from sklearn.metrics import f1_score

from rholoss_fastai.all import Groups, WorstGroup, restrict_rows, row_groups


@pytest.mark.parametrize('metric, worst, brute', [
    (accuracy, min, lambda p, t: (p == t).float().mean().item()),
    (error_rate, max, lambda p, t: (p != t).float().mean().item()),
    (F1Score(average='macro'), min, lambda p, t: f1_score(t, p, average='macro'))],
                         ids=['accuracy', 'error_rate', 'f1'])
@pytest.mark.parametrize('ordered', [True, False], ids=['in order', 'sorted'])
def test_worst_group_is_that_of_a_loop(metric, worst, brute, ordered, tmp_path):
    dls, names = loaders(), np.array(list('abcab'*12))
    if not ordered:
        dls.loaders = [dls.train, SortedDL(VALID, sort_func=lambda o: float(o[0][0, 3, 3]), bs=25, num_workers=0)]
    measure = WorstGroup(metric, pd.Series(names), worst=worst)
    save = SaveModelCallback(monitor='worst_group', fname=tmp_path/'best', comp=np.less if worst is max else None)
    learn = fit(row_learner(dls, metrics=[accuracy, measure]), 3, cbs=save)
    values = learn.validate() # of the best epoch's weights, loaded at the end
    pred = learn.model.eval()(VALID.images).argmax(1)
    expected = {o: brute(pred[names == o], VALID.targets[names == o]) for o in 'abc'}
    assert measure.table.iloc[-1].to_dict() == pytest.approx(expected)
    assert values[-1] == pytest.approx(worst(expected.values()))
    assert len(measure.table) == 4
    assert values[-1] == pytest.approx((np.max if worst is min else np.min)([o[-1] for o in learn.recorder.values]))
    assert learn.get_preds(dl=dls.train)[0].shape == (N, 3) # other data: no metric is asked


def test_groups_of_columns_functions_and_values():
    table = pd.DataFrame(dict(y=[0, 1, 1, 0], place=list('aabb'), gap=['a', None, 'b', 'b']))
    dl = DataLoader(table, bs=2)
    for groups, codes, names in (
            ('place', [0, 0, 1, 1], ['a', 'b']), (('y', 'place'), [0, 2, 3, 1], ['0, a', '0, b', '1, a', '1, b']),
            (lambda o: o.y, [0, 1, 1, 0], [0, 1]),
            (torch.tensor([5, 5, 9, 9]), [0, 0, 1, 1], [5, 9]), (table.place, [0, 0, 1, 1], ['a', 'b']),
            (Groups(torch.tensor([1, 0, 0, 1]), ['x', 'y']), [1, 0, 0, 1], ['x', 'y'])):
        known = row_groups(dl, groups)
        assert known.codes.tolist() == codes and known.names == names
    for groups, words in ((('y', 'gap'), '1 rows have no group'), ('none', 'no column none; it has y, place, gap'),
                          ([1, 2], '2 groups for a data set of 4'),
                          (['a']*4, 'All rows are in one group'),
                          (pd.Categorical(list('aabb'), list('abc')), 'No row is in group c')):
        with pytest.raises(ValueError, match=words): row_groups(dl, groups)
    # of the rows that it goes through
    with pytest.raises(ValueError, match='No row is in group b'): row_groups(restrict_rows(dl, [0, 1]), 'place')
    with pytest.raises(TypeError, match='not a table'): row_groups(DataLoader(Rows(), bs=2), 'place')
