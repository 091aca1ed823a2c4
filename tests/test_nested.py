"Subsets of nested batches, class targets, and numbers by position"
from collections import UserDict, namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorImage, TensorMask
from fastai.vision.core import TensorPoint
from fastcore.foundation import L
from helpers import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import tensor

from rholoss_fastai.nested import as_tensor, batch_size, class_targets, subset_batch

# subsets of a batch

Pair = namedtuple('Pair', 'first second')
class Encoding(UserDict):
    "Like Hugging Face's BatchEncoding"
    def __init__(self, data, encodings=None):
        super().__init__(data)
        self._encodings = encodings

def test_types_and_metadata():
    point = TensorPoint(torch.rand(6,4,2), img_size=(10,20))
    details = dict(mask=TensorMask(torch.arange(6)), nothing=None, scale=tensor(2.), name='train', sizes=(1,2))
    batch = (Pair(torch.rand(6,3), [point]), details,
             Encoding(dict(ids=torch.arange(12).view(6,2)), ['tokens']*6), L(torch.arange(6), torch.ones(6)))
    idxs = tensor([4,0])
    res = subset_batch(batch, idxs)
    assert type(res) is tuple and type(res[0]) is Pair and type(res[1]) is dict and type(res[2]) is Encoding
    assert type(res[3]) is L
    small = res[0].second[0]
    assert type(small) is TensorPoint and small.img_size == (10,20) and torch.equal(small.data, point.data[idxs])
    assert type(res[1]['mask']) is TensorMask and res[1]['mask'].tolist() == [4,0]
    assert res[1]['nothing'] is None and res[1]['scale'] == 2 and res[1]['name'] == 'train' and res[1]['sizes'] == (1,2)
    assert res[2]['ids'].tolist() == [[8,9],[0,1]] and res[2]._encodings is None and batch[2]._encodings
    assert len(batch[2]['ids']) == 6
    assert batch_size(batch) == 6 and batch_size(res) == 2

leaves = st.one_of(st.just('tensor'), st.just('image'), st.none(), st.just('text'), st.floats(allow_nan=False))
def dicts_alike(o):
    if not isinstance(o, (list, tuple, dict)): return False
    held = list(o.values()) if isinstance(o, dict) else list(o)
    alike = isinstance(o, list) and len(o) > 1 and all(isinstance(v, dict) and v.keys() == o[0].keys() for v in o)
    return alike or any(map(dicts_alike, held))

KEYS = st.text('ab_ é漢', max_size=2) # of any letter: to list them all takes seconds
def nest(o): return st.one_of(st.lists(o, max_size=3), st.tuples(o, o), st.dictionaries(KEYS, o, max_size=3))

@examples(60)
@given(tree=st.recursive(leaves, nest),
       idxs=st.lists(st.integers(0, 6), max_size=7))
def test_any_nesting(tree, idxs):
    def grow(o):
        if o == 'tensor': return torch.rand(7,2)
        if o == 'image': return TensorImage(torch.rand(7,1))
        if isinstance(o, dict): return {k: grow(v) for k,v in o.items()}
        return type(o)(map(grow, o)) if isinstance(o, (list, tuple)) else o
    def naive(o):
        if isinstance(o, torch.Tensor): return torch.stack([o[i] for i in idxs]) if idxs else o[:0]
        if isinstance(o, dict): return {k: naive(v) for k,v in o.items()}
        return type(o)(map(naive, o)) if isinstance(o, (list, tuple)) else o
    def equal(a, b):
        if isinstance(a, torch.Tensor): return type(a) is type(b) and torch.equal(a, b)
        if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        return type(a) is type(b) and (len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple))
                                       else a == b)
    batch = (torch.arange(7), grow(tree))
    assume(not dicts_alike(batch)) # one of them an item, so it seems
    assert equal(subset_batch(batch, tensor(idxs, dtype=torch.long)), naive(batch))

def test_bad_batches():
    x,idxs = torch.zeros(4,2),tensor([1])
    for extra in (['a']*4, ('a',)*4, [None,'b',None,None], [1,2,3,4], np.zeros(4), torch.zeros(5)):
        with pytest.raises(ValueError, match='batch of 4|beside tensors of 4'): subset_batch((x, extra), idxs)
    for empty in ((), None, 'text', [tensor(1.)], dict(a='b')):
        with pytest.raises(ValueError, match='without any tensor'): batch_size(empty)
    assert subset_batch((torch.zeros(1,2), ['a']), tensor([0]))[1] == ['a']

# one tensor per item

@pytest.mark.parametrize('n', [2, 3, 8])
def test_lists_of_one_tensor_an_item(n):
    "Images of several sizes and the boxes in them: channels and boxes aren't items"
    images = [torch.rand(3, 8 + i%3, 10) for i in range(n)]
    boxes = [dict(boxes=torch.rand(1 + i%3, 4)) for i in range(n)]
    for batch in ((images, boxes), ((images,), (boxes,)), ((torch.rand(n, 2), boxes), torch.zeros(n))):
        for f in (batch_size, lambda b: subset_batch(b, tensor([0]))):
            with pytest.raises(ValueError, match=f'a list of {n} (dicts|tensors), one an item.*Collate'): f(batch)

def test_three_channels_are_not_three_items():
    "Where the number of items happens to be that of channels, and every first dimension agrees"
    batch = ([torch.rand(3, 4, 4) for _ in range(3)],), (torch.arange(3),)
    with pytest.raises(ValueError, match='a list of 3 tensors, one an item'): subset_batch(batch, tensor([0]))

def test_lists_of_inputs_are_no_items():
    a, b, c = torch.arange(4.), torch.rand(4, 3), torch.rand(4, 2, 2)
    for batch in ([a, b], ([a, b], c), (([a, b, c],), (a,)), ([[a, b], c],), [torch.rand(2, 3), torch.rand(2)]):
        small = subset_batch(batch, tensor([1]))
        assert batch_size(small) == 1

# classes and numbers

@pytest.mark.parametrize('dtype', [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool])
def test_classes_of_any_type_and_shape(dtype):
    targ = tensor([1, 0, 1]).to(dtype)
    for o in (targ, targ[:,None]):
        assert torch.equal(class_targets(o), tensor([1, 0, 1])) and class_targets(o).dtype == torch.int64
    assert torch.equal(class_targets(targ[:,None], torch.rand(3, 2)), tensor([1, 0, 1]))
    assert class_targets(targ[:,None], torch.rand(3, 1, 2)).shape == (3, 1) # sequences of one token
    many = torch.zeros(3, 4, dtype=dtype)
    assert class_targets(many).shape == (3, 4)

def test_targets_that_are_no_classes_stay():
    for targ in (torch.rand(3, 1), torch.rand(3), (tensor([1]), tensor([2])), None): assert class_targets(targ) is targ

@pytest.mark.parametrize('index', [range(10, 14), [3, 2, 1, 0], list('abcd'), [1, 1, 1, 1]])
@pytest.mark.parametrize('values', [[.5, 1.5, 2.5, 3.5], [1, 2, 3, 4], [True, False, True, True]])
def test_a_series_is_taken_by_position(values, index):
    series, expected = pd.Series(values, index=index), torch.tensor(values)
    for form in (series, series.values, values, tuple(values), expected, [torch.tensor(v) for v in values],
                 series.convert_dtypes()):
        assert as_tensor(form).tolist() == values and type(as_tensor(form)) is torch.Tensor
    assert as_tensor(series, torch.float32).dtype == torch.float32
    assert as_tensor(TensorImage(expected.float())).dtype == torch.float32

def test_numbers_are_copied_and_free():
    x = torch.rand(3, requires_grad=True)
    assert not as_tensor(x).requires_grad
    for bad in (['a', 'b'], pd.Series(['a', 'b']), [None, 1]):
        with pytest.raises(TypeError, match='expected numbers'): as_tensor(bad)
