"""Item losses against the loss function itself, called on one item at a time."""
import copy
import pickle
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from fastai.losses import (
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorMask
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rholoss_fastai.losses import ItemLosses, item_losses
from rholoss_fastai.nested import plain, prediction, tensors

pytestmark = pytest.mark.filterwarnings('ignore')  # PyTorch's on batching rules, broadcasting and KL divergence's mean
few = examples(8, derandomize=True)
sizes, seeds = st.integers(1, 5), st.integers(0, 2**16)

def same_items(losses, expected, **kwargs): assert_close(losses, expected.float(), rtol=1e-4, atol=1e-5, **kwargs)

def one_by_one(loss_func, pred, *targs):
    return torch.stack([plain(loss_func(pred[i:i+1], *[t[i:i+1] for t in targs])).reshape(())
                        for i in range(len(pred))])

def state(o):
    return {k: state(v) if hasattr(v, '__dict__') and not isinstance(v, Tensor) else v for k,v in vars(o).items()}

# batches: (prediction, *targets)
def classes(bs, shape=(), c=5): return torch.randn(bs, c, *shape), torch.randint(0, c, (bs, *shape))
def masks(bs): return classes(bs, (3, 4))
def sequences(bs): pred, targ = classes(bs, (6,)); return pred.transpose(1, 2).contiguous(), targ
def labels(bs): return torch.randn(bs, 4), torch.randint(0, 2, (bs, 4))
def float_labels(bs): pred, targ = labels(bs); return pred, targ.float()
def probabilities(bs): pred, targ = float_labels(bs); return pred.sigmoid(), targ
def soft(bs): return torch.randn(bs, 5), torch.rand(bs, 5).softmax(1)
def numbers(bs, shape=()): return torch.randn(bs, *shape), torch.randn(bs, *shape)
def columns(bs): return numbers(bs, (1,))
def images(bs): return numbers(bs, (3, 4, 5))
def column_and_row(bs): return torch.randn(bs, 1), torch.randn(bs)
def distributions(bs): pred, targ = soft(bs); return pred.log_softmax(1), targ
def log_probs(bs): pred, targ = classes(bs); return pred.log_softmax(1), targ
def signs(bs): pred, targ = labels(bs); return pred, (2*targ - 1).float()
def counts(bs): return torch.randn(bs, 3), torch.randint(0, 9, (bs, 3)).float()
def with_variance(bs): return torch.randn(bs, 3), torch.randn(bs, 3), torch.rand(bs, 3) + 0.1
def pairs(bs): return torch.randn(bs, 4), torch.randn(bs, 4), torch.randint(0, 2, (bs,))*2 - 1
def rankings(bs): return torch.randn(bs), torch.randn(bs), (torch.randint(0, 2, (bs,))*2 - 1).float()
def triples(bs): return torch.randn(bs, 4), torch.randn(bs, 4), torch.randn(bs, 4)
def label_sets(bs): return torch.randn(bs, 4), torch.stack([torch.tensor([1, 3, -1, 0])]*bs)

weight = torch.tensor([0.5, 1., 2., 3., 0.1])
reducing = [ # (loss that takes a reduction, batches)
    (CrossEntropyLossFlat, (classes, sequences)), (partial(CrossEntropyLossFlat, axis=1), (masks,)),
    (partial(CrossEntropyLossFlat, label_smoothing=0.1), (classes, sequences)),
    (LabelSmoothingCrossEntropyFlat, (classes, sequences)),
            (partial(LabelSmoothingCrossEntropyFlat, axis=1, eps=0.2), (masks,)),
    (LabelSmoothingCrossEntropy, (classes, masks)),
    (FocalLossFlat, (classes, sequences)), (partial(FocalLossFlat, axis=1, gamma=1.), (masks,)),
            (FocalLoss, (classes, masks)),
    (BCEWithLogitsLossFlat, (labels, columns)),
            (partial(BCEWithLogitsLossFlat, pos_weight=torch.tensor([1., 2., 3., 4.])), (labels,)),
    (BCELossFlat, (probabilities,)), (MSELossFlat, (numbers, columns, images, column_and_row)),
            (L1LossFlat, (numbers, columns, images)),
    (DiceLoss, (masks,)), (partial(DiceLoss, square_in_union=True), (masks,)),
    (nn.CrossEntropyLoss, (classes, masks, soft)),
            (partial(nn.CrossEntropyLoss, label_smoothing=0.1), (classes, masks)),
    (nn.NLLLoss, (log_probs,)), (nn.BCEWithLogitsLoss, (float_labels,)), (nn.BCELoss, (probabilities,)),
    (nn.MSELoss, (numbers, columns, images)), (nn.L1Loss, (numbers, images)), (nn.SmoothL1Loss, (images,)),
            (nn.HuberLoss, (images,)),
    (nn.KLDivLoss, (distributions,)), (nn.PoissonNLLLoss, (counts,)), (nn.GaussianNLLLoss, (with_variance,)),
    (nn.SoftMarginLoss, (signs,)), (nn.HingeEmbeddingLoss, (signs,)), (nn.MultiMarginLoss, (classes,)),
    (nn.MultiLabelMarginLoss, (label_sets,)), (nn.MultiLabelSoftMarginLoss, (float_labels,)),
            (nn.CosineEmbeddingLoss, (pairs,)),
    (nn.MarginRankingLoss, (rankings,)), (nn.TripletMarginLoss, (triples,)),
            (nn.TripletMarginWithDistanceLoss, (triples,)),
]
functions = [
    (F.cross_entropy, (classes, masks, soft)), (F.nll_loss, (log_probs,)),
    (F.binary_cross_entropy_with_logits, (float_labels,)),
    (F.binary_cross_entropy, (probabilities,)), (F.mse_loss, (numbers, images)), (F.l1_loss, (images,)),
    (F.smooth_l1_loss, (images,)),
    (F.huber_loss, (columns,)), (F.kl_div, (distributions,)), (F.poisson_nll_loss, (counts,)),
    (F.gaussian_nll_loss, (with_variance,)),
    (F.soft_margin_loss, (signs,)), (F.hinge_embedding_loss, (signs,)), (F.multi_margin_loss, (classes,)),
    (F.multilabel_margin_loss, (label_sets,)), (F.multilabel_soft_margin_loss, (float_labels,)),
    (F.cosine_embedding_loss, (pairs,)),
    (F.margin_ranking_loss, (rankings,)), (F.triplet_margin_loss, (triples,)),
    (partial(F.cross_entropy, label_smoothing=0.1), (masks,)),
]
def name_of(o):
    if isinstance(o, partial): return f'{name_of(o.func)}-partial'
    return getattr(o, '__name__', None)
def cases(table):
    return [pytest.param(loss, batch, id=f'{name_of(loss)}-{batch.__name__}') for loss,
            batches in table for batch in batches]

def check(loss_func, batch, reduction):
    losses = ItemLosses(loss_func)
    res = losses(*batch)
    assert type(res) is Tensor and res.dtype == torch.float32 and res.shape == (len(batch[0]),)
    assert losses.route in ('attribute', 'argument'), losses
    same_items(res, one_by_one(loss_func, *batch))
    whole = plain(loss_func(*batch))
    same_items(res.sum() if reduction == 'sum' else res.mean(), whole)

@few
@given(bs=sizes, seed=seeds, reduction=st.sampled_from(['mean', 'sum']))
@pytest.mark.parametrize('make_loss, make_batch', cases(reducing))
def test_loss_objects(make_loss, make_batch, bs, seed, reduction):
    torch.manual_seed(seed)
    loss_func, batch = make_loss(reduction=reduction), make_batch(bs)
    before = state(loss_func)
    check(loss_func, batch, reduction)
    assert str(state(loss_func)) == str(before)

@few
@given(bs=sizes, seed=seeds, reduction=st.sampled_from([None, 'mean', 'sum']))
@pytest.mark.parametrize('function, make_batch', cases(functions))
def test_functions(function, make_batch, bs, seed, reduction):
    torch.manual_seed(seed)
    check(partial(function, reduction=reduction) if reduction else function, make_batch(bs), reduction)

def test_defaults():
    "The reduction that a loss has when none is given: fastai's dice loss sums"
    for make_loss, batches in reducing:
        loss_func, batch = make_loss(), batches[0](3)
        same_items(item_losses(loss_func, *batch), one_by_one(loss_func, *batch))

@pytest.mark.parametrize('loss_func', [nn.KLDivLoss(reduction='batchmean'), partial(F.kl_div, reduction='batchmean')])
def test_batchmean(loss_func):
    pred, targ = distributions(4)
    losses = item_losses(loss_func, pred, targ)
    same_items(losses, (targ * (targ.log() - pred)).sum(1))
    same_items(losses.mean(), loss_func(pred, targ))

def test_reduction_none():
    pred, targ = images(3)
    same_items(item_losses(nn.MSELoss(reduction='none'), pred, targ), ((pred - targ)**2).mean((1, 2, 3)))

# class weights and ignored targets

@few
@given(bs=sizes, seed=seeds)
def test_class_weights(bs, seed):
    torch.manual_seed(seed)
    pred, targ = masks(bs)
    log_prob = pred.log_softmax(1).gather(1, targ[:,None])[:,0]
    expected = (-log_prob * weight[targ]).mean((1, 2))
    for loss_func in (CrossEntropyLossFlat(axis=1, weight=weight), nn.CrossEntropyLoss(weight=weight),
                      partial(F.cross_entropy, weight=weight)):
        losses = item_losses(loss_func, pred, targ)
        same_items(losses, expected)
        same_items(losses.sum()*12 / weight[targ].sum(), plain(loss_func(pred, targ)))
    same_items(item_losses(nn.CrossEntropyLoss(weight=weight, reduction='sum'), pred, targ), expected*12)

@few
@given(bs=sizes, seed=seeds, ignore=st.sampled_from([-100, 255, 2]), share=st.sampled_from([0.1, 0.5, 0.95]))
def test_ignore_index(bs, seed, ignore, share):
    torch.manual_seed(seed)
    pred, targ = masks(bs)
    targ[torch.rand(targ.shape) < share] = ignore
    valid = targ != ignore
    for loss_func in (CrossEntropyLossFlat(axis=1, ignore_index=ignore), nn.CrossEntropyLoss(ignore_index=ignore),
                      partial(F.cross_entropy, ignore_index=ignore)):
        losses, expected = item_losses(loss_func, pred, TensorMask(targ)), one_by_one(loss_func, pred, targ)
        same_items(losses, torch.where(valid.any(2).any(1), expected, 0.)) # PyTorch's own is NaN where all is ignored
        counts = valid.sum((1, 2))
        if valid.any(): same_items((losses*counts).sum() / counts.sum(), plain(loss_func(pred, targ)))
    summed = nn.CrossEntropyLoss(ignore_index=ignore, reduction='sum')
    same_items(item_losses(summed, pred, targ), one_by_one(summed, pred, targ))

def test_ignored_classes_of_items():
    pred, targ = classes(4)
    targ[1] = -100
    losses = item_losses(CrossEntropyLossFlat(), pred, targ)
    assert losses[1] == 0
    same_items(losses[[0, 2, 3]], F.cross_entropy(pred, targ, reduction='none')[[0, 2, 3]])

def test_later_changes_count():
    pred, targ = classes(4)
    loss_func = CrossEntropyLossFlat(weight=torch.ones(5))
    losses = ItemLosses(loss_func)
    first = losses(pred, targ)
    loss_func.func.weight.mul_(2)
    same_items(losses(pred, targ), first*2)
    loss_func.func.weight = None
    same_items(losses(pred, targ), first)
    pred, targ = masks(4)
    loss_func = nn.CrossEntropyLoss()
    losses = ItemLosses(loss_func)
    first = losses(pred, targ)
    loss_func.reduction = 'sum'
    same_items(losses(pred, targ), first*12)

# no mark on the loss function

class HandsOn(nn.Module):
    "Its reduction is that of a loss that it holds"
    def __init__(self): super().__init__(); self.cross_entropy = nn.CrossEntropyLoss()
    @property
    def reduction(self): return self.cross_entropy.reduction
    @reduction.setter
    def reduction(self, value): self.cross_entropy.reduction = value
    def forward(self, pred, targ): return self.cross_entropy(pred, targ)

class Delegates:
    "Reads and writes go to the loss that it wraps"
    def __init__(self, loss_func): self.__dict__['loss_func'] = loss_func
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        return getattr(self.__dict__['loss_func'], name)
    def __setattr__(self, name, value): setattr(self.loss_func, name, value)
    def __call__(self, pred, targ): return self.loss_func(pred, targ)

class Slots:
    __slots__ = 'reduction',
    def __init__(self): self.reduction = 'mean'
    def __call__(self, pred, targ): return F.cross_entropy(pred, targ, reduction=self.reduction)

class ReadOnly(HandsOn):
    @property
    def reduction(self): return self.cross_entropy.reduction

class Raises(nn.CrossEntropyLoss):
    def forward(self, pred, targ): raise RuntimeError('no loss today')

MARKED = dict(flat=CrossEntropyLossFlat, plain=nn.CrossEntropyLoss, hands_on=HandsOn,
              delegates=lambda: Delegates(nn.CrossEntropyLoss()), slots=Slots,
              read_only=ReadOnly, base=lambda: BaseLoss(HandsOn),
              compiled=lambda: torch.compile(nn.CrossEntropyLoss(), backend='eager'))

@pytest.mark.parametrize('make', MARKED.values(), ids=MARKED)
def test_no_mark(make):
    (pred, targ), loss_func = classes(4), make()
    same_items(item_losses(loss_func, pred, targ), F.cross_entropy(pred, targ, reduction='none'))
    assert loss_func.reduction == 'mean' and plain(loss_func(pred, targ)).shape == ()
    with pytest.raises(ValueError): item_losses(loss_func, pred[...,None,None].expand(4, 5, 3, 3), targ)
    assert loss_func.reduction == 'mean' and plain(loss_func(pred, targ)).shape == ()

@pytest.mark.parametrize('loss_func', [Raises(), BaseLoss(Raises)], ids=['plain', 'flat'])
def test_no_mark_when_it_raises(loss_func):
    with pytest.raises(ValueError, match='no loss today'): item_losses(loss_func, *classes(4))
    assert loss_func.reduction == 'mean'
    if isinstance(loss_func, BaseLoss): assert loss_func.func.reduction == 'mean'

def test_no_mark_in_other_threads():
    loss_func, (pred, targ) = CrossEntropyLossFlat(), classes(8)
    seen, stop = set(), threading.Event()
    def watch():
        while not stop.is_set(): seen.add(loss_func.reduction)
    thread = threading.Thread(target=watch)
    thread.start()
    losses = ItemLosses(loss_func)
    for _ in range(300): losses(pred, targ)
    stop.set(); thread.join()
    assert seen == {'mean'}

# predictions

@dataclass
class Output(OrderedDict):
    "As the models of transformers return"
    loss: Tensor = None
    logits: Tensor = None
    hidden_states: tuple = None
    def __post_init__(self):
        for name in ('loss', 'logits', 'hidden_states'):
            if getattr(self, name) is not None: self[name] = getattr(self, name)
    def __setitem__(self, name, value): super().__setitem__(name, value); super().__setattr__(name, value)

Named = namedtuple('Named', 'scores hidden')
nestings = dict(tuple=lambda p: (p, [torch.randn(len(p), 2)]), list=lambda p: [p],
                dict=lambda p: dict(other=torch.randn(len(p), 2), logits=p),
                first=lambda p: dict(loss=torch.tensor(0.), start=p, end=-p), named=lambda p: Named(p, -p),
                output=lambda p: Output(loss=torch.tensor(0.), logits=p, hidden_states=(-p, -p)),
                nested=lambda p: ([p, p], p))

@pytest.mark.parametrize('nest', nestings.values(), ids=nestings.keys())
def test_prediction(nest):
    pred, targ = classes(4)
    assert prediction(nest(pred)) is pred
    for loss_func in (CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy,
                      partial(F.cross_entropy, label_smoothing=0.)):
        same_items(item_losses(loss_func, nest(pred), targ), F.cross_entropy(pred, targ, reduction='none'))

@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16], ids=str)
def test_structure_is_kept(half):
    "A loss of one's own gets what the model returned, in float32"
    def of_output(output, targ):
        assert type(output) is Output and output.logits.dtype == output['logits'].dtype == torch.float32
        return F.cross_entropy(output.logits, targ) + output.hidden_states[1].pow(2).mean()
    def with_reduction(output, targ, reduction='mean'): return F.cross_entropy(output.logits, targ, reduction=reduction)
    pred, targ = classes(4)
    pred, hidden = pred.to(half), torch.randn(4, 3).to(half)
    output = Output(loss=torch.tensor(1.), logits=pred, hidden_states=(None, hidden))
    expected = F.cross_entropy(pred.float(), targ, reduction='none')
    same_items(item_losses(of_output, output, targ), expected + hidden.float().pow(2).mean(1))
    same_items(item_losses(with_reduction, output, targ), expected)
    assert output.logits is pred and output['logits'] is pred

def test_transformers():
    "A real output object, and a real tokeniser's"
    outputs = pytest.importorskip('transformers.modeling_outputs')
    pred, targ = classes(4)
    output = outputs.SequenceClassifierOutput(loss=torch.tensor(1.), logits=pred)
    expected = F.cross_entropy(pred, targ, reduction='none')
    same_items(item_losses(CrossEntropyLossFlat(), output, targ), expected)
    same_items(item_losses(lambda output, targ: F.cross_entropy(output.logits, targ), output, targ), expected)

@few
@given(bs=sizes, seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_dtypes(bs, seed, dtype):
    torch.manual_seed(seed)
    pred, targ = classes(bs)
    pred = pred.to(dtype)
    expected = F.cross_entropy(pred.double(), targ, reduction='none').float()
    for loss_func in (CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy,
                      lambda p, t: F.cross_entropy(p, t)):
        losses = item_losses(loss_func, pred, targ)
        assert losses.dtype == torch.float32
        assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    pred, targ = float_labels(bs)
    same_items(item_losses(nn.BCEWithLogitsLoss(), pred.to(dtype), targ.to(dtype)),
               F.binary_cross_entropy_with_logits(pred.to(dtype).double(), targ.double(), reduction='none').mean(1))

def test_tensor_subclasses():
    pred, targ = classes(4)
    expected = F.cross_entropy(pred, targ, reduction='none')
    def own(pred, targ): return F.cross_entropy(pred, targ)
    def with_reduction(pred, targ, reduction='mean'): return F.cross_entropy(pred, targ, reduction=reduction)
    for loss_func in (CrossEntropyLossFlat(), F.cross_entropy, own, with_reduction):
        losses = item_losses(loss_func, TensorBase(pred), TensorCategory(targ))
        assert type(losses) is Tensor
        same_items(losses, expected)
    image = TensorImage(torch.rand(2, 3, 4, 4))
    res = plain(Output(logits=image, hidden_states=[image]))
    assert type(res) is Output and type(res.logits) is Tensor and type(res['hidden_states'][0]) is Tensor
    assert res.logits.data_ptr() == image.data_ptr()
    assert type(plain(Named(image, 1)).scores) is Tensor

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy,
                                       lambda p, t: F.cross_entropy(p, t)])
def test_nan_stays_with_its_item(loss_func):
    pred, targ = classes(4)
    pred[2,1] = float('nan')
    assert item_losses(loss_func, pred, targ).isnan().tolist() == [False, False, True, False]

def test_nan_of_a_mask():
    pred, targ = masks(3)
    pred[1,0,0,0] = float('nan')
    assert item_losses(CrossEntropyLossFlat(axis=1), pred, targ).isnan().tolist() == [False, True, False]

def test_gradients():
    pred, targ = masks(3)
    pred.requires_grad_()
    item_weights = torch.rand(3)
    for loss_func in (CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss(), F.cross_entropy,
                      lambda p, t: F.cross_entropy(p, t)):
        grad, = torch.autograd.grad((item_losses(loss_func, pred, targ)*item_weights).sum(), pred)
        expected, = torch.autograd.grad((F.cross_entropy(pred, targ, reduction='none').mean((1, 2))*item_weights).sum(),
                                        pred)
        assert_close(grad, expected)
        with torch.no_grad(): assert not item_losses(loss_func, pred, targ).requires_grad

# losses that only reduce

class Combined:
    def __init__(self):
        self.focal, self.dice, self.last = FocalLossFlat(axis=1), DiceLoss(axis=1, reduction='mean'), None
    def __call__(self, pred, targ):
        self.last = self.focal(pred, targ)
        return self.last + self.dice(pred, targ)

def of_values(pred, targ):
    "Control flow that depends on values"
    return F.cross_entropy(pred, targ) * (2 if pred.max().item() > 1 else 1)

def of_numpy(pred, targ): return torch.as_tensor(((pred - targ).numpy()**2).mean())
def variance(pred, targ): return (pred - targ).flatten(1).var(1).mean()

class IgnoresReduction(nn.CrossEntropyLoss):
    def forward(self, pred, targ): return F.cross_entropy(pred, targ)

class NoSuchReduction:
    reduction = 'mean'
    def __call__(self, pred, targ):
        if self.reduction not in ('mean', 'sum'): raise ValueError('no such reduction')
        return F.cross_entropy(pred, targ, reduction=self.reduction)

class DropsElements(nn.CrossEntropyLoss):
    "With reduction 'none' it returns the elements that count, only"
    def forward(self, pred, targ):
        return F.cross_entropy(pred,
                               targ) if self.reduction == 'mean' else F.cross_entropy(pred, targ, reduction='none')[
            targ > 0]

@few
@given(bs=sizes, seed=seeds)
@pytest.mark.parametrize('make_loss, make_batch, route', [
    (Combined, masks, 'vmap'), (lambda: of_values, classes, 'loop'), (lambda: of_numpy, images, 'loop'),
    (lambda: variance, images, 'vmap'),
    (IgnoresReduction, classes, 'vmap'), (NoSuchReduction, classes, 'vmap'),
    (lambda: partial(F.mse_loss, size_average=False), images, 'vmap'),
    (lambda: torch.jit.trace(F.mse_loss, numbers(3)), numbers, 'vmap'), (nn.PairwiseDistance, columns, 'vmap')])
def test_only_reduces(make_loss, make_batch, route, bs, seed):
    torch.manual_seed(seed)
    loss_func, batch = make_loss(), make_batch(bs)
    losses = ItemLosses(loss_func)
    for _ in range(2): same_items(losses(*batch), one_by_one(loss_func, *batch))
    assert losses.route == route

def test_drops_elements():
    pred, targ = masks(3)
    targ[0,0,0] = 0
    same_items(item_losses(DropsElements(), pred, targ), one_by_one(nn.CrossEntropyLoss(), pred, targ))

def test_vmap_leaves_nothing_behind():
    loss_func = Combined()
    item_losses(loss_func, *masks(3))
    assert loss_func.last is None

class Centred(nn.Module):
    "Keeps a running mean of predictions: anew, in place, or in a list"
    def __init__(self, how):
        super().__init__()
        self.how,self.seen,self.weight = how,[],nn.Parameter(torch.ones(()))
        self.register_buffer('centre', torch.zeros(5))
    def forward(self, pred, targ):
        res = self.weight*F.cross_entropy(pred - self.centre, targ)
        if self.how == 'anew': self.centre = 0.9*self.centre + 0.1*pred.detach().mean(0)
        if self.how == 'in place': self.centre.mul_(0.9).add_(0.1*pred.detach().mean(0))
        self.seen.append(len(pred))
        return res

class CentredReducing(nn.CrossEntropyLoss):
    "The same, and takes a reduction"
    how,seen = 'in place',[1]
    def __init__(self): super().__init__(); self.centre = torch.zeros(5)
    def forward(self, pred, targ):
        res = F.cross_entropy(pred - self.centre, targ, reduction=self.reduction)
        self.centre.mul_(0.9).add_(0.1*pred.detach().mean(0))
        return res

@pytest.mark.parametrize('make', [lambda: Centred('anew'), lambda: Centred('in place'), CentredReducing,
                                  lambda: BaseLoss(Centred, how='anew', flatten=False)],
                         ids=['anew', 'in place', 'reducing', 'flat'])
def test_what_a_loss_keeps_is_its_own(make):
    "Items, checks and weights leave a loss with a state of its own as it was, and each item is seen from that state"
    pred,targ = classes(6)
    loss_func = make()
    loss_func(pred, targ) # so that it has a state
    before = copy.deepcopy(loss_func)
    losses = ItemLosses(loss_func)
    for _ in range(2):
        same_items(losses(pred, targ),
                   torch.stack([copy.deepcopy(before)(pred[i:i+1], targ[i:i+1]).detach() for i in range(6)]))
    losses.check(None, pred, targ, weighting=True)
    assert_close(losses.weighted(torch.ones(6), pred, targ), copy.deepcopy(before)(pred, targ))
    inner,old = getattr(loss_func, 'func', loss_func),getattr(before, 'func', before)
    assert torch.equal(inner.centre, old.centre) and inner.seen == old.seen

def test_item_losses_draw_no_random_numbers():
    def noisy(pred, targ): return F.cross_entropy(F.dropout(pred, 0.5), targ)
    losses,state = ItemLosses(noisy),torch.get_rng_state()
    pred,targ = classes(6)
    state = torch.get_rng_state()
    losses(pred, targ), losses.check(None, pred, targ)
    assert torch.equal(state, torch.get_rng_state())

def test_structures_one_by_one():
    "Several targets, a dict of them, and tensors without a batch dimension"
    def loss_func(output, boxes, labels):
        return F.cross_entropy(output['logits'], labels['class']) + ((boxes - output['anchors'])**2).mean()
    pred, targ = classes(4)
    boxes, anchors = torch.randn(4, 7, 3), torch.randn(7, 3)
    losses = item_losses(loss_func, dict(logits=pred, anchors=anchors, note='x'), boxes, {'class': targ, 'note': None})
    same_items(losses, F.cross_entropy(pred, targ, reduction='none') + ((boxes - anchors)**2).mean((1, 2)))

def test_loop_after_vmap():
    "A branch that vmap first meets in a later batch"
    def loss_func(pred, targ):
        if pred.shape[-1] == 3: return (pred - targ).sum() * pred.max().item()
        return (pred - targ).sum()
    losses = ItemLosses(loss_func)
    losses(*numbers(2, (2,)))
    assert losses.route == 'vmap'
    batch = numbers(2, (3,))
    same_items(losses(*batch), one_by_one(loss_func, *batch))
    assert losses.route == 'loop'

def test_pickle():
    pred, targ = classes(4)
    smoothed = partial(F.cross_entropy, label_smoothing=0.1)
    for loss_func in (CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy, smoothed, of_values):
        losses = ItemLosses(loss_func)
        expected = losses(pred, targ)
        for other in (pickle.loads(pickle.dumps(losses)), copy.deepcopy(losses)):
            assert torch.equal(other(pred, targ), expected) and other.route == losses.route

# weights

def same_grads(a, b, pred):
    grads = [torch.autograd.grad(o, [t for t in tensors(pred) if t.requires_grad], allow_unused=True, retain_graph=True)
             for o in (a, b)]
    for x,y in zip(*grads):
        if x is not None or y is not None: assert_close(x, y, rtol=1e-5, atol=1e-6)

def leaf(t): return t.detach().clone().requires_grad_() if t.is_floating_point() else t

def own_class_weights(pred, targ): return F.cross_entropy(pred, targ, weight=weight)
def own_void(pred, targ): return F.cross_entropy(pred, targ, ignore_index=255)
def own_mse(pred, targ): return ((pred - targ)**2).mean()
def own_sum(pred, targ): return ((pred - targ)**2).sum()

def void(make):
    def batch(bs):
        pred,targ = make(bs)
        targ[torch.rand(targ.shape) < 0.3] = 255
        targ.view(-1)[0] = 1
        return pred,targ
    return batch
def smoothed(make, **kwargs): return partial(make, label_smoothing=0.1, **kwargs)

weighable = [ # everything in `reducing` and `functions`, and what they can be given
    *[(partial(make, reduction=reduction), batches) for make,batches in reducing for reduction in ('mean', 'sum')],
    *[(lambda function=function, **kw: partial(function, **kw), batches) for function,batches in functions],
    (lambda: CrossEntropyLossFlat(weight=weight), (classes, sequences)),
             (lambda: CrossEntropyLossFlat(axis=1, weight=weight), (masks,)),
    (lambda: nn.CrossEntropyLoss(weight=weight), (classes, masks, soft)),
             (lambda: nn.NLLLoss(weight=weight), (log_probs,)),
    (lambda: nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), (classes, masks)),
    (lambda: nn.CrossEntropyLoss(weight=weight, ignore_index=255), (void(classes), void(masks))),
    (lambda: CrossEntropyLossFlat(axis=1, ignore_index=255), (void(masks),)),
             (lambda: CrossEntropyLossFlat(ignore_index=255), (void(sequences),)),
    (lambda: CrossEntropyLossFlat(axis=1, ignore_index=255, reduction='sum'), (void(masks),)),
    (lambda: partial(F.cross_entropy, weight=weight, ignore_index=255), (void(masks),)),
    (lambda: FocalLossFlat(weight=weight), (classes, sequences)),
             (lambda: LabelSmoothingCrossEntropyFlat(weight=weight), (classes,)),
    (lambda: LabelSmoothingCrossEntropy(weight=weight), (classes, masks)),
             (lambda: nn.MultiMarginLoss(weight=weight), (classes,)),
    (lambda: nn.MultiLabelSoftMarginLoss(weight=weight[:4]), (float_labels,)),
             (lambda: nn.BCEWithLogitsLoss(weight=weight[:4]), (float_labels,)),
    (lambda: nn.BCEWithLogitsLoss(pos_weight=weight[:4]), (float_labels,)),
             (lambda: nn.KLDivLoss(reduction='batchmean'), (distributions,)),
    (lambda: DiceLoss(), (masks,)), (Combined, (masks,)), (lambda: own_class_weights, (classes,)),
             (lambda: own_void, (void(masks),)),
    (lambda: own_mse, (numbers, columns, images)), (lambda: own_sum, (numbers, images)), (HandsOn, (classes,)),
]
@pytest.mark.parametrize('make_loss, make_batch', cases(weighable))
def test_weights_of_one_change_nothing(make_loss, make_batch):
    "The loss of the batch to 1e-6, its gradient, and in later batches, when it is known what it divides by"
    torch.manual_seed(3)
    losses = None
    for size in (4, 4, 5):
        loss_func = make_loss() if losses is None else losses.loss_func
        pred,*targs = make_batch(size)
        pred = leaf(pred)
        losses = losses or ItemLosses(loss_func)
        whole,res = plain(loss_func(pred, *targs)),losses.weighted(torch.ones(size), pred, *targs)
        assert res.shape == ()
        assert_close(res, whole, rtol=1e-6, atol=1e-6, equal_nan=True)
        if whole.requires_grad: same_grads(res, whole, pred)

@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('make, batch, class_weights, ignored', [
    (nn.CrossEntropyLoss, classes, weight, -100), (nn.CrossEntropyLoss, void(masks), weight, 255),
    (nn.CrossEntropyLoss, void(masks), None, 255),
    (CrossEntropyLossFlat, void(sequences), weight, 255), (CrossEntropyLossFlat, classes, None, -100)])
def test_weights_by_hand(make, batch, class_weights, ignored, reduction):
    "`sum_i w_i s_i / sum_i d_i`, element by element"
    pred,targ = batch(5)
    item_weights = torch.tensor([0., 1., 2., 0.5, 3.])
    losses = ItemLosses(make(weight=class_weights, ignore_index=ignored, reduction=reduction))
    log_probs = (pred.transpose(1, 2) if make is CrossEntropyLossFlat and pred.ndim == 3 else pred).log_softmax(1)
    total = divisor = 0.
    for i in range(5):
        for at in range(targ[i].numel()):
            c = targ[i].reshape(-1)[at].item()
            if c == ignored: continue
            cw = 1. if class_weights is None else class_weights[c].item()
            total -= item_weights[i]*cw*log_probs[i].reshape(5, -1)[c, at]
            divisor += cw
    expected = total if reduction == 'sum' else total/divisor
    for _ in range(2): assert_close(losses.weighted(item_weights, pred, targ), expected, rtol=1e-5, atol=1e-5)

def test_a_divisor_is_not_guessed():
    "A batch whose classes all weigh 1 doesn't tell whether the weights are divided by; a later one does"
    pred = torch.randn(4, 5)
    for make, divides in ((nn.CrossEntropyLoss, True), (FocalLoss, False)):
        loss_func = make(weight=weight)
        losses = ItemLosses(loss_func)
        for targ in (torch.tensor([1, 1, 1, 1]), torch.tensor([0, 2, 3, 4]), torch.tensor([3, 3, 4, 1])):
            assert_close(losses.weighted(torch.ones(4), pred, targ), plain(loss_func(pred, targ)), rtol=1e-6, atol=1e-6)
        assert list(losses.divisors.values()) == ['class weights' if divides else 'mean']

def test_class_weights_of_1_are_tried_once(monkeypatch):
    "And what is found stays right when they change, in place or for others"
    from rholoss_fastai import losses as module
    tried, dividing = [], module.dividing
    monkeypatch.setattr(module, 'dividing', lambda *args: tried.append(args) or dividing(*args))
    loss_func = CrossEntropyLossFlat(weight=torch.ones(5))
    losses, own = ItemLosses(loss_func), loss_func.func
    def changed():
        yield
        yield own.weight.data.mul_(3.)
        own.weight = torch.rand(5) + 0.5
        yield
    for _ in changed():
        for ones in (True, False):
            pred, targ = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
            weights = torch.ones(6) if ones else torch.rand(6)
            class_weights = own.weight[targ]
            expected = (weights*class_weights*F.cross_entropy(pred, targ, reduction='none')).sum()/class_weights.sum()
            got = losses.weighted(weights, pred, targ)
            for one, other in ((got, expected), *zip(*(torch.autograd.grad(o, pred) for o in (got, expected)))):
                assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(tried) == 1

class OfCounted:
    "Takes a reduction, and says nothing of what it leaves out"
    reduction = 'mean'
    def __call__(self, pred, targ):
        elements = F.cross_entropy(pred, targ, ignore_index=255, reduction='none')
        return elements if self.reduction == 'none' else elements.sum()/(targ != 255).sum()

@pytest.mark.parametrize('loss_func', [own_void, OfCounted()], ids=['own_void', 'of_counted'])
def test_the_first_batch_does_not_say_what_ones_own_loss_divides_by(loss_func):
    "Nothing void in the first batch, where each item's mean counts alike"
    losses = ItemLosses(loss_func)
    for batch in (masks(4), void(masks)(4), masks(5), void(masks)(5)):
        for weights in (torch.ones(len(batch[0])), torch.full((len(batch[0]),), 3.)):
            assert_close(losses.weighted(weights, *batch), weights[0]*loss_func(*batch), rtol=1e-6, atol=1e-6)

def test_weights_of_elements():
    pred,targ = void(sequences)(4)
    losses,element_weights = ItemLosses(CrossEntropyLossFlat(ignore_index=255)),torch.rand(4, 6)
    values,counts = losses.elements(pred, targ)
    assert values.shape == counts.shape == (4, 6) and torch.equal(counts, targ != 255)
    assert_close(values, F.cross_entropy(pred.transpose(1, 2), targ, ignore_index=255, reduction='none'))
    for _ in range(2):
        assert_close(losses.weighted(element_weights, pred, targ), (element_weights*values).sum()/counts.sum())
    with pytest.raises(ValueError, match='expected .4,., one an item, or the 24'):
        losses.weighted(torch.ones(5), pred, targ)

@pytest.mark.parametrize('loss_func, batch, shape', [
    (CrossEntropyLossFlat(axis=1), masks, (3, 3, 4)), (nn.CrossEntropyLoss(), masks, (3, 3, 4)),
    (nn.CrossEntropyLoss(), classes, (3,)),
    (BCEWithLogitsLossFlat(), labels, (3, 4)), (MSELossFlat(), images, (3, 3, 4, 5)), (F.mse_loss, numbers, (3,)),
    (DiceLoss(), masks, (3, 5))])
def test_elements(loss_func, batch, shape):
    pred,targ = batch(3)
    values,counts = ItemLosses(loss_func).elements(pred, targ)
    assert values.shape == counts.shape == shape and counts.all()
    same_items(values.reshape(3, -1).sum(1) if isinstance(loss_func, DiceLoss) else values.reshape(3, -1).mean(1),
               item_losses(loss_func, pred, targ))

def test_no_elements():
    with pytest.raises(ValueError, match='own_mse has no losses of single elements'):
        ItemLosses(own_mse).elements(*images(3))

# do they mean something?

def cox(pred, targ):
    risk,time,event = pred[:,0],targ[:,0],targ[:,1]
    order = time.argsort(descending=True)
    risk,event = risk[order],event[order]
    return -((risk - risk.logcumsumexp(0))*event).sum()/event.sum().clamp(min=1)
def info_nce(pred, targ): z = F.normalize(pred, dim=1); return F.cross_entropy(z@z.T/0.1, torch.arange(len(z)))
def correlation(pred, targ): return 1 - torch.corrcoef(torch.stack([pred[:,0], targ[:,0]]))[0,1]
def nothing(pred, targ): return torch.tensor(0.)
def moments(pred, targ): return (pred.mean(0) - targ.mean(0)).square().sum()
def ranknet(pred, targ):
    difference,right = pred[:,0][:,None] - pred[:,0][None],(targ[:,0][:,None] > targ[:,0][None]).float()
    off = ~torch.eye(len(pred), dtype=torch.bool)
    return F.binary_cross_entropy_with_logits(difference, right,
                                              reduction='none').where(off, 0.).sum()/off.sum().clamp(min=1)
def r_squared(pred, targ): return (pred - targ).square().sum()/(targ - targ.mean(0)).square().sum()
def mean_difference(pred, targ): return (pred[:,:1].mean() - targ[:,:1].mean()).square()
def concordance(pred, targ):
    p,t = pred[:,0],targ[:,0]
    return 1 - 2*((p - p.mean())*(t - t.mean())).mean()/(p.var(correction=0) + t.var(correction=0)
                                                         + (p.mean() - t.mean())**2)
def vicreg(pred, targ): return (1 - pred.std(0)).relu().mean() + (pred - targ).square().mean()
def mmd(pred, targ):
    def k(a, b): return (-torch.cdist(a, b)**2).exp()
    return k(pred, pred).mean() + k(targ, targ).mean() - 2*k(pred, targ).mean()
def standardised(pred, targ):
    p = (pred - pred.mean(0))/(pred.var(0, correction=0) + 1e-6).sqrt(); return (p - targ).square().mean()
def barlow(pred, targ):
    a,b = ((o - o.mean(0))/o.std(0) for o in (pred, targ))
    return ((a.T@b/len(a) - torch.eye(a.shape[1]))**2).sum()
def pearson(pred, targ):
    p,t = pred[:,0] - pred[:,0].mean(),targ[:,0] - targ[:,0].mean(); return -(p*t).sum()/(p.norm()*t.norm() + 1e-8)
def two_columns(bs): return torch.randn(bs, 2), torch.rand(bs, 2).round(decimals=3)
def errors(pred, targ): return (pred - targ).abs().mean(1)
def of_batch(pred, targ, overlap): p = pred.sigmoid(); return overlap((p*targ).sum(), p.sum(), targ.sum())
def dice(pred, targ): return of_batch(pred, targ, lambda both, p, t: 1 - (2*both + 1)/(p + t + 1))
def iou(pred, targ): return of_batch(pred, targ, lambda both, p, t: 1 - both/(p + t - both))
def tversky(pred, targ):
    return of_batch(pred, targ, lambda both, p, t: 1 - both/(both + 0.3*(p - both) + 0.7*(t - both)))
def f1_of_labels(pred, targ): p = pred.sigmoid(); return 1 - (2*(p*targ).sum(0)/((p + targ).sum(0) + 1e-6)).mean()
def worst(pred, targ): return errors(pred, targ).max()
def median(pred, targ): return errors(pred, targ).median()
def quantile(pred, targ): return errors(pred, targ).quantile(0.9)
def hardest(pred, targ): return errors(pred, targ).topk(len(pred)//2).values.mean()
def root(pred, targ): return (pred - targ).square().mean().sqrt()
def tilted(pred, targ): return errors(pred, targ).logsumexp(0)
def perplexity(pred, targ): return errors(pred, targ).mean().exp()
def geometric(pred, targ): return errors(pred, targ).log().mean().exp()
def by_difficulty(pred, targ): loss = errors(pred, targ); return (loss.detach()*loss).sum()/loss.detach().sum()
def relative_to_predictions(pred, targ): return (pred - targ).abs().sum()/pred.abs().sum()
def balanced_predictions(pred, targ):
    p = pred.softmax(1).mean(0); return (pred - targ).square().mean() + (p*p.log()).sum()
def same_means(pred, targ): return (pred - targ).square().mean() + moments(pred, targ)
coupled = [cox, info_nce, correlation, nothing, moments, ranknet, r_squared, concordance, vicreg, mmd, standardised,
           barlow, pearson, mean_difference, dice, iou, tversky,
           f1_of_labels, worst, median, quantile, hardest, root, tilted, perplexity, geometric, by_difficulty,
           relative_to_predictions, balanced_predictions, same_means]

@pytest.mark.parametrize('loss_func', coupled)
def test_losses_that_compare_items_are_refused(loss_func):
    "Batches small and large, of a model that is trained, and of one that hardly says anything yet"
    for seed,(bs,scale) in enumerate([(4, 1.), (24, 1.), (24, 0.05), (256, 0.05)]):
        torch.manual_seed(seed)
        pred,targ = two_columns(bs)
        if loss_func is cox: targ[:,1] = (targ[:,1] > .2).float()
        losses,pred = ItemLosses(loss_func),scale*pred
        with pytest.raises(ValueError, match=loss_func.__name__): losses.check(losses(pred, targ), pred, targ)

def centred(pred, targ): return (pred - targ + targ.mean(0)).square().mean()
def z_scored(pred, targ): return (pred - (targ - targ.mean(0))/(targ.std(0, correction=0) + 1e-6)).square().mean()
def between_extremes(pred, targ):
    return (pred - (targ - targ.amin(0))/(targ.amax(0) - targ.amin(0) + 1e-6)).abs().mean()
def ranked(pred, targ): return (pred - targ.argsort(0).argsort(0)/len(targ)).square().mean()
def with_covariance(pred, targ): return (pred - targ).square().mean() - 2*(pred*(targ - targ.mean(0))).mean()
def above_mean(pred, targ): return F.binary_cross_entropy_with_logits(pred, (targ > targ.mean(0)).float())
def advantage(pred, targ): return -(pred.log_softmax(1)[:,0]*(targ[:,0] - targ[:,0].mean())).mean()

@pytest.mark.parametrize('loss_func', [centred, z_scored, between_extremes, ranked, with_covariance,
                                       above_mean, advantage])
def test_losses_that_compare_targets_are_refused(loss_func):
    "Of a model that hardly says anything yet, and of one that is far from all targets"
    for seed,(bs,scale,offset) in enumerate([(4, 1., 3.), (24, 0.05, 0.), (24, 0.05, 3.), (24, 1., 3.)]):
        torch.manual_seed(seed)
        pred,targ = two_columns(bs)
        with pytest.raises(ValueError, match=loss_func.__name__):
            ItemLosses(loss_func).check(None, scale*pred + offset, targ)

# what it divides by is no matter of predictions
def by_targets(pred, targ): return (pred - targ).abs().sum()/targ.abs().sum()
def masked(pred, targ):
    counted = (targ > .3).float(); return ((pred - targ).square()*counted).sum()/counted.sum().clamp(min=1)
def focal(pred, targ):
    loss = F.cross_entropy(pred, targ.argmax(1), reduction='none'); return ((1 - (-loss).exp())**2*loss).mean()
def dice_of_items(pred, targ): p = pred.sigmoid(); return (1 - (2*(p*targ).sum(1) + 1)/((p + targ).sum(1) + 1)).mean()
def focal_and_dice(pred, targ): return focal(pred, targ) + dice_of_items(pred, targ)
def classes_and_numbers(pred, targ):
    return F.cross_entropy(pred, targ.argmax(1), weight=torch.tensor([.5, 2.])) + F.mse_loss(pred, targ)
def twice_weighted(pred, targ):
    return F.cross_entropy(pred, targ.argmax(1), weight=torch.tensor([.5, 3.])) + F.cross_entropy(pred, targ.argmax(1))
def log_cosh(pred, targ): return (pred - targ).cosh().log().mean()
def pinball(pred, targ): error = targ - pred; return torch.maximum(.9*error, -.1*error).mean()
def gaussian(pred, targ): return F.gaussian_nll_loss(pred[:,0], targ[:,0], pred[:,1].exp())
def with_penalty(pred, targ):
    return F.cross_entropy(pred, targ.argmax(1), label_smoothing=.1) + 1e-2*pred.square().mean()
def in_part_single(pred, targ): return F.cross_entropy(pred.float(), targ.argmax(1)) + (pred - targ).square().mean()
def cosine(pred, targ): return 1 - F.cosine_similarity(pred, targ).mean()
separable = [by_targets, masked, focal, dice_of_items, focal_and_dice, classes_and_numbers, twice_weighted, log_cosh,
             pinball, gaussian, with_penalty, in_part_single, cosine]

@pytest.mark.parametrize('loss_func', separable)
def test_losses_of_ones_own_pass(loss_func):
    for seed,(bs,scale) in enumerate([(4, 1.), (24, 1.), (24, 0.05), (256, 1.), (24, 0.)]):
        torch.manual_seed(seed)
        pred,targ = two_columns(bs)
        ItemLosses(loss_func).check(None, scale*pred, targ, weighting=True)

def test_a_loss_of_the_models_own_is_refused():
    pred,targ = classes(6)
    for loss_func in (lambda out, y: out['loss'], lambda out, y: out['loss'].clone(), nothing):
        for loss in (F.cross_entropy(pred, targ), torch.tensor(1.)):
            losses,output = ItemLosses(loss_func),dict(loss=loss, logits=pred)
            with pytest.raises(ValueError, match=r"does not depend on the predictions.*loss_func of its logits"):
                losses.check(None, output, targ)
    with pytest.raises(ValueError, match='no prediction of each item.*logits'):
        item_losses(lambda out, y: out['loss'], dict(loss=torch.tensor(1.)), targ)
    class PreCalculated(BaseLoss):
        def __init__(self): super().__init__(nn.CrossEntropyLoss)
        def __call__(self, pred, targ, **kwargs): return torch.tensor(0.)
    with pytest.raises(ValueError, match='does not depend'): ItemLosses(PreCalculated()).check(None, pred, targ)
    ItemLosses(lambda out, y: F.cross_entropy(out['logits'], y)).check(None, dict(loss=torch.tensor(1.), logits=pred),
                                                                       targ)

@pytest.mark.parametrize('make_loss, make_batch', cases(weighable))
def test_losses_of_items_pass(make_loss, make_batch):
    for bs in (2, 7):
        torch.manual_seed(bs)
        losses,batch = ItemLosses(make_loss()),make_batch(bs)
        values,state = losses(*batch),torch.get_rng_state()
        with torch.no_grad(): assert losses.check(values, *batch) is values
        assert torch.equal(torch.get_rng_state(), state)

# `vmap` can't take it
def by_branch(pred, targ): return F.cross_entropy(pred, targ) if pred.isfinite().all().item() else pred.sum()
def hinge(pred, targ): return (1 - pred).relu().mean()
@pytest.mark.parametrize('loss_func, batch', [
    (CrossEntropyLossFlat(), lambda: (torch.zeros(8, 5), classes(8)[1])), # an untrained model whose last layer is zero
    (lambda p, t: F.cross_entropy(p, t), lambda: (torch.zeros(8, 5), classes(8)[1])),
    (hinge, lambda: (torch.full((8, 1), 2.), torch.zeros(8))), # everything right, and nothing to be learnt
    (MSELossFlat(), lambda: (torch.ones(8, 1), torch.ones(8, 1))), # so here
    (CrossEntropyLossFlat(), lambda: (classes(1))), (cox, lambda: two_columns(1)), # a single item
    # a model that diverged is no fault of the loss
    (CrossEntropyLossFlat(), lambda: (torch.full((8, 5), float('nan')), classes(8)[1])),
    (CrossEntropyLossFlat(), lambda: (classes(8)[0].half(), classes(8)[1])),
    (by_branch, lambda: classes(8)), (of_numpy, lambda: images(4)),
    (lambda p, t: F.dropout(p, 0.5).square().mean() + t.sum()*0, lambda: numbers(8, (3,)))])
def test_right_though_they_look_odd(loss_func, batch):
    batch = batch()
    ItemLosses(loss_func).check(None, *batch)

def test_items_without_a_number():
    "Images that are void all over: the loss of the rest means something; whoever trains on each one's is told"
    pred,targ = masks(6)
    targ[2] = 255
    losses = ItemLosses(own_void)
    assert losses.check(None, pred, targ).isnan().tolist() == [False, False, True, False, False, False]
    with pytest.raises(ValueError, match='not for 1 of its 6 items alone.*ignore_index'):
        losses.check(None, pred, targ, weighting=True)
    ItemLosses(partial(F.cross_entropy, ignore_index=255)).check(None, pred, targ, weighting=True)

def test_two_heads_pass():
    def both(pred, box, label):
        known = label > 0
        return ((pred[0] - box).abs().mean(2)*known).sum()/known.sum().clamp(min=1) + F.cross_entropy(
            pred[1].flatten(0, 1), label.flatten())
    for seed in range(10):
        torch.manual_seed(seed)
        pred,label = (torch.randn(24, 2, 4), torch.randn(24, 2, 4)),torch.randint(0, 4, (24, 2))
        label[::3,1] = 0
        ItemLosses(both).check(None, pred, torch.rand(24, 2, 4), label)

# what is predicted

@pytest.mark.parametrize('loss_func, task, axis, ignored', [
    (CrossEntropyLossFlat(), 'classes', -1, -100), (CrossEntropyLossFlat(axis=1, ignore_index=255), 'classes', 1, 255),
    (nn.CrossEntropyLoss(), 'classes', 1, -100), (F.cross_entropy, 'classes', 1, -100),
    (partial(F.cross_entropy, ignore_index=7), 'classes', 1, 7),
    (FocalLossFlat(), 'classes', -1, None), (DiceLoss(), 'classes', 1, None),
    (LabelSmoothingCrossEntropy(), 'classes', 1, None),
    (BCEWithLogitsLossFlat(), 'multilabel', -1, None), (nn.BCELoss(), 'multilabel', 1, None),
    (BCELossFlat(), 'multilabel', -1, None),
    (MSELossFlat(), 'regression', -1, None), (F.l1_loss, 'regression', 1, None),
    (nn.TripletMarginLoss(), 'other', 1, None),
    (Combined(), 'classes', None, None), (HandsOn(), 'classes', None, None), (own_class_weights, 'classes', None, None),
    (lambda p, t: F.binary_cross_entropy_with_logits(p, t.float()), 'multilabel', None, None),
    (own_mse, None, None, None),
    (lambda p, a, b: F.cross_entropy(p, a) + F.cross_entropy(p, b), 'other', None, None),
    (lambda p, t: F.cross_entropy(p[0], t) + F.mse_loss(p[1], t), None, None, None)])
def test_task(loss_func, task, axis, ignored):
    losses = ItemLosses(loss_func)
    assert (losses.task, losses.axis, losses.ignore_index) == (task, axis, ignored)
    assert losses.activated == (getattr(loss_func, 'func', loss_func).__class__.__name__ == 'BCELoss')

# errors

@pytest.mark.parametrize('loss_func, error, message', [
    (None, TypeError, 'loss_func is None'), ('mse', TypeError, "loss_func is 'mse'"),
    (CrossEntropyLossFlat, TypeError, r'CrossEntropyLossFlat\(\)'),
    (MSELossFlat, TypeError, r'expected what it makes: MSELossFlat\(\)'),
    (nn.CTCLoss(), ValueError, 'batch in the second dimension'),
    (F.ctc_loss, ValueError, 'Wrap it'), (partial(F.ctc_loss, blank=1), ValueError, 'Wrap it')])
def test_bad_loss_func(loss_func, error, message):
    with pytest.raises(error, match=message): ItemLosses(loss_func)

def over_items(pred, targ): return (pred - targ).std(0)
def no_tensor(pred, targ): return 3.
class NormalisesBatch(nn.Module):
    def __init__(self): super().__init__(); self.norm = nn.BatchNorm1d(5)
    def forward(self, pred, targ): return F.cross_entropy(self.norm(pred), targ)

many = 'Prediction and targets differ in their number of items'
@pytest.mark.parametrize('loss_func, batch, message', [
    (CrossEntropyLossFlat(), lambda: classes(4)[:1], 'unlabelled'),
    (CrossEntropyLossFlat(), lambda: (classes(4)[0], None), 'unlabelled'),
    (CrossEntropyLossFlat(), lambda: (classes(8)[0], classes(4)[1]),
     many + r': prediction \(8, 5\) float32, target \(4,\) int64'),
    (lambda p, t: F.cross_entropy(p, t), lambda: (classes(8)[0], classes(4)[1]), many),
    (nn.GaussianNLLLoss(), lambda: (*numbers(4), torch.rand(3)), many),
    (CrossEntropyLossFlat(), lambda: classes(0), 'empty'),
    (CrossEntropyLossFlat(), lambda: (torch.randn(4, 3, 5), classes(4)[1]),
     r'failed on prediction \(4, 3, 5\) float32, target \(4,\) int64'),
    (nn.CrossEntropyLoss(), lambda: (torch.randn(4, 3, 5), classes(4)[1]), 'failed on prediction'),
    (F.cross_entropy, lambda: (torch.randn(4, 3, 5), classes(4)[1]),
     "cross_entropy failed on .*Check that the model's output"),
    (lambda p, t: F.cross_entropy(p, t), lambda: (torch.randn(4, 3, 5), classes(4)[1]), 'failed on prediction'),
    (nn.MSELoss(), lambda: column_and_row(4), 'combined every item'),
    (over_items, lambda: numbers(4, (3,)), "over_items has no loss for each item.*reduction='none'"),
    (NormalisesBatch(), lambda: classes(4), 'has no loss for each item.*batch of one item'),
    (no_tensor, lambda: classes(4), r'expected one number, got no tensor \(float\)')])
def test_bad_batches(loss_func, batch, message):
    with pytest.raises(ValueError, match=message): item_losses(loss_func, *batch())

def test_bad_prediction():
    for bad in ('cat', None, {}, (), Output(loss=torch.tensor(1.))):
        with pytest.raises(TypeError, match='Expected a prediction that is a tensor or holds one'): prediction(bad)

def test_out_of_memory_is_passed_on():
    def loss_func(pred, targ, reduction='mean'): raise torch.cuda.OutOfMemoryError('too large')
    with pytest.raises(torch.cuda.OutOfMemoryError): item_losses(loss_func, *classes(4))
    with pytest.raises(torch.cuda.OutOfMemoryError): item_losses(lambda p, t: loss_func(p, t), *classes(4))

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_no_sync():
    "No route but the loop makes the host wait"
    for loss_func, make_batch in ((CrossEntropyLossFlat(), classes),
                                  (CrossEntropyLossFlat(axis=1, ignore_index=255), masks),
                                  (nn.MSELoss(), images), (F.cross_entropy, masks), (Combined(), masks)):
        batch = [t.cuda() for t in make_batch(8)]
        losses = ItemLosses(loss_func)
        expected = losses(*batch)
        torch.cuda.set_sync_debug_mode('error')
        try: res = losses(*batch)
        finally: torch.cuda.set_sync_debug_mode('default')
        assert res.is_cuda and torch.equal(res, expected)
