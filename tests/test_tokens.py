"Selection of the loss's elements, against brute force"
import math

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.text.data import LMDataLoader
from fastai.text.models.awdlstm import awd_lstm_lm_config
from fastai.text.models.core import AWD_LSTM, get_language_model
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import Boltzmann, ImportanceSample, top_elements

values = st.lists(st.floats(width=32, allow_infinity=False) | st.sampled_from([math.nan, 0., 1., math.inf]), min_size=1, max_size=40)

def brute_force(keys, counted, frac):
    "Sort in Python: NaN last, the earlier of equal ones first"
    at = [i for i in range(len(keys)) if counted[i]]
    n = min(len(at), max(1, math.floor(len(at)*frac + 1e-6)))
    at.sort(key=lambda i: (math.isnan(keys[i]), 0. if math.isnan(keys[i]) else -keys[i]))
    return sorted(at[:n])

@settings(max_examples=150, deadline=None)
@given(values, st.integers(0, 10**6), st.floats(0.01, 1.))
def test_equals_brute_force(keys, seed, frac):
    counted = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed)) < 0.7
    chosen = top_elements(torch.tensor(keys), counted, frac)
    assert chosen.nonzero().flatten().tolist() == brute_force(torch.tensor(keys).tolist(), counted.tolist(), frac)

def test_ten_thousand_tokens():
    gen = torch.Generator().manual_seed(0)
    keys, counted = torch.randn(100, 100, generator=gen), torch.rand(100, 100, generator=gen) < 0.9
    chosen = top_elements(keys, counted, 0.6)
    assert chosen.shape == (100, 100) and chosen.flatten().nonzero().flatten().tolist() == brute_force(keys.flatten().tolist(), counted.flatten().tolist(), 0.6)

class Items(list):
    def new_empty(self): return Items()

class LM(nn.Module):
    def __init__(self, n=9, d=12): super().__init__(); self.emb, self.rnn, self.out = nn.Embedding(n, d), nn.GRU(d, d, batch_first=True), nn.Linear(d, n)
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0])

def learner(loss=None, padded=True, n=40, bs=10, **kwargs):
    set_seed(0)
    x, y = torch.randint(0, 9, (n, 7)), torch.randint(0, 9, (n, 7))
    if padded: y[:, 5:] = -100; y[::3, 3:] = -100
    dl = DataLoader(Items(zip(x, y)), bs=bs)
    return Learner(DataLoaders(dl, dl), LM(), loss_func=loss or CrossEntropyLossFlat(), opt_func=SGD, lr=0.1, **kwargs)

class Watch(Callback):
    "Gradient, loss and choice of each step, and what they would be by brute force"
    order = 20
    def __init__(self, il=None, frac=0.5): self.il, self.frac, self.n = il, frac, 0
    def after_backward(self):
        x, y = self.xb[0], self.yb[0]
        grads, params = [p.grad.clone() for p in self.model.parameters()], list(self.model.parameters())
        losses = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction='none')
        scores = losses.detach()
        if self.il is not None:
            with torch.no_grad(): scores = scores - F.cross_entropy(self.il(x).flatten(0, 1), y.flatten(), reduction='none')
        chosen = brute_force(scores.tolist(), (y.flatten() != -100).tolist(), self.frac)
        expected = losses[chosen].mean()
        assert self.learn.token_selector.mask.flatten().nonzero().flatten().tolist() == chosen
        assert torch.allclose(self.learn.loss, expected, rtol=1e-5)
        for a, b in zip(grads, torch.autograd.grad(expected, params)): assert torch.allclose(a, b, atol=1e-6)
        self.n += 1

def fit(learn, n_epoch=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, **kwargs)
    return learn

@pytest.mark.parametrize('padded', [True, False])
@pytest.mark.parametrize('il', [True, False])
def test_trains_on_the_mean_of_the_chosen(padded, il):
    reference = LM() if il else None
    learn = fit(learner(padded=padded).select_tokens(frac=0.5, il=reference), cbs=(watch := Watch(reference)))
    assert watch.n == 8 and learn.selection is learn.token_selector.record
    counted = sum(int((y != -100).sum()) for _, y in learn.dls.train.dataset)
    ledger = learn.selection.ledger
    assert ledger.elements_loaded.tolist() == [counted]*2 and ledger.loaded.tolist() == [40]*2 and (ledger.elements_trained/counted == ledger.selected).all()
    assert (ledger.selected - 0.5).abs().max() < 0.02 and (ledger.forward == 'reuse').all()
    assert (ledger.loss_share > 0.5).all() if not il else True
    assert reference is None or reference.training and all(p.grad is None for p in reference.parameters())

def test_all_tokens_are_plain_training():
    trained = [list(fit(o).model.parameters()) for o in (learner(), learner().select_tokens(frac=1.))]
    for a, b in zip(*trained): assert torch.allclose(a, b, atol=1e-6)

def test_a_loss_that_sums():
    learn = fit(learner(CrossEntropyLossFlat(reduction='sum')).select_tokens(frac=1.), 1, lr=1e-4)
    other = fit(learner(CrossEntropyLossFlat(reduction='sum')), 1, lr=1e-4)
    for a, b in zip(learn.model.parameters(), other.model.parameters()): assert torch.allclose(a, b, atol=1e-6)

def test_start_every_and_warmup():
    learn = fit(learner().select_tokens(frac=0.5, warmup_epochs=1, every=2), 3)
    kept = learn.selection.ledger.selected
    assert kept[0] == 1 and 0.7 < kept[1] < 0.8 and kept[1] == kept[2]
    assert (fit(learner().select_tokens(frac=0.5, start=0.5), 2).selection.ledger.selected < 1).tolist() == [False, True]

def test_undone_and_in_the_table():
    learn = learner()
    n = len(learn.cbs)
    learn.select_tokens(frac=0.5).select_tokens(frac=0.25)
    assert len(learn.cbs) == n + 1 and learn.token_selector.pick.frac == 0.25
    fit(learn, 1)
    assert len(learn.metrics) == 0 and 'selected' in learn.recorder.metric_names
    assert len(learn.no_token_selection().cbs) == n and len(learn.selection.ledger) == 1

def test_validation_and_predictions_are_plain():
    learn = fit(learner().select_tokens(frac=0.2), 1)
    lines = len(learn.selection.ledger)
    loss = learn.validate()[0]
    assert math.isclose(loss, learn.no_token_selection().validate()[0], rel_tol=1e-6) and len(learn.selection.ledger) == lines

class Stop(Callback):
    order = 70
    def after_batch(self):
        if self.training and self.iter == 1: raise KeyboardInterrupt

def test_interrupted():
    learn = learner().select_tokens(frac=0.5)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Stop())
    fit(learn, 1)
    assert len(learn.selection.ledger) == 2 and learn.selection.ledger.elements_loaded[0] < learn.selection.ledger.elements_loaded[1]
    assert len(learn.metrics) == 0

def test_gradient_accumulation_divides_it():
    a = fit(learner().select_tokens(frac=1.), 1, cbs=GradientAccumulation(20))
    b = fit(learner(), 1, cbs=GradientAccumulation(20))
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=1e-6)

def test_pixels_and_labels():
    set_seed(0)
    x = torch.randn(12, 3, 4, 4)
    for y, loss, model in ((x[:, 0] > 0).long(), CrossEntropyLossFlat(axis=1), nn.Conv2d(3, 2, 1)), \
                          ((x.mean((2, 3)) > 0).float(), BCEWithLogitsLossFlat(), nn.Sequential(nn.Flatten(), nn.Linear(48, 3))):
        dl = DataLoader(list(zip(x, y)), bs=6)
        learn = fit(Learner(DataLoaders(dl, dl), model, loss_func=loss, lr=0.1).select_tokens(frac=0.25), 1)
        assert learn.selection.ledger.elements_loaded[0] == y.numel() and learn.selection.ledger.selected[0] == pytest.approx(0.25, abs=0.03)

def test_awd_lstm_carries_its_state():
    set_seed(0)
    lines = [torch.randint(0, 20, (30,)) for _ in range(20)]
    def make():
        dls = DataLoaders(*[LMDataLoader([(o,) for o in lines], bs=4, seq_len=8) for _ in range(2)])
        config = dict(awd_lstm_lm_config, emb_sz=12, n_hid=14, n_layers=1, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=0.2)
        return Learner(dls, get_language_model(AWD_LSTM, 20, config=config), loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs(), lr=0.01)
    learn, reference, other = make(), make(), make()
    other.model.load_state_dict(learn.model.state_dict())
    for o in (learn.select_tokens('reducible', frac=1., il=reference), other): set_seed(1), fit(o, 2) # the reference draws no random number
    for p, q in zip(learn.model.parameters(), other.model.parameters()): assert torch.allclose(p, q, atol=1e-5)
    assert (fit(learn.select_tokens(frac=0.5, il=reference), 1).selection.ledger.selected - 0.5).abs().max() < 0.02

def test_export(tmp_path):
    learn = fit(learner().select_tokens(il=LM(), frac=0.5), 1)
    learn.path = tmp_path
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    assert repr(loaded.token_selector) == repr(learn.token_selector)

def own(pred, targ): return F.cross_entropy(pred.flatten(0, 1), targ.flatten())

@pytest.mark.parametrize('make,kind,message', [
    (lambda: learner().select_tokens('entropy'), ValueError, 'wants pred'), (lambda: learner().select_tokens('reducible'), ValueError, 'il=model'),
    (lambda: learner().select_tokens(pick=ImportanceSample(0.5)), TypeError, 'one that ranks'), (lambda: learner().select_tokens(il=[1., 2.]), TypeError, 'reference model'),
    (lambda: fit(learner(own).select_tokens()), ValueError, "reduction='none'"), (lambda: fit(learner(cbs=MixUp()).select_tokens()), ValueError, 'MixUp'),
    (lambda: fit(learner().select('loss').select_tokens()), ValueError, 'no_selection'), (lambda: learner().select_tokens(frac=0), ValueError, 'frac must lie')])
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message): make()

def test_shares_parameters_with_the_target():
    learn = learner()
    with pytest.raises(ValueError, match='shares parameters'): fit(learn.select_tokens(il=learn.model))

@pytest.mark.parametrize('pick', ['uniform', Boltzmann(0.5), 'rank'])
def test_other_picks(pick):
    learn = fit(learner().select_tokens(pick=pick, **({} if isinstance(pick, Boltzmann) else dict(frac=0.5))), 1)
    assert abs(learn.selection.ledger.selected[0] - 0.5) < 0.02

def test_a_causal_model_of_transformers():
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    def lm_loss(out, targ, reduction='mean', ignore_index=-100):
        return F.cross_entropy(out.logits.flatten(0, 1), targ.flatten(), reduction=reduction, ignore_index=ignore_index)
    learn, reference = learner(lm_loss), transformers.GPT2LMHeadModel(config)
    learn.model = transformers.GPT2LMHeadModel(config)
    fit(learn.select_tokens(frac=0.5, il=reference), 1)
    assert learn.selection.ledger.selected[0] == pytest.approx(0.5, abs=0.02)
