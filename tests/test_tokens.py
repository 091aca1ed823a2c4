"Selection of the loss's elements, against brute force"
import math
from functools import partial
from types import SimpleNamespace

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
from helpers import draws, examples, fit, learner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rholoss_fastai.all import (
    Boltzmann,
    ImportanceSample,
    ItemLosses,
    RankSample,
    TeacherIL,
    element_losses,
    top_elements,
)

values = st.lists(st.floats(width=32, allow_infinity=False) | st.sampled_from([math.nan, 0., 1., math.inf]), min_size=1,
                  max_size=40)

def brute_force(keys, counted, frac):
    "Sort in Python: NaN last, the earlier of equal ones first"
    at = [i for i in range(len(keys)) if counted[i]]
    n = min(len(at), max(1, math.floor(len(at)*frac + 1e-6)))
    at.sort(key=lambda i: (math.isnan(keys[i]), 0. if math.isnan(keys[i]) else -keys[i]))
    return sorted(at[:n])

@examples(150)
@given(values, st.integers(0, 10**6), st.floats(0.01, 1.))
def test_equals_brute_force(keys, seed, frac):
    counted = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed)) < 0.7
    chosen = top_elements(torch.tensor(keys), counted, frac)
    assert chosen.nonzero().flatten().tolist() == brute_force(torch.tensor(keys).tolist(), counted.tolist(), frac)

def test_ten_thousand_tokens():
    gen = torch.Generator().manual_seed(0)
    keys, counted = torch.randn(100, 100, generator=gen), torch.rand(100, 100, generator=gen) < 0.9
    chosen = top_elements(keys, counted, 0.6)
    assert chosen.shape == (100, 100)
    assert chosen.flatten().nonzero().flatten().tolist() == brute_force(keys.flatten().tolist(),
                                                                        counted.flatten().tolist(), 0.6)

class Items(list):
    def new_empty(self): return Items()

class LM(nn.Module):
    def __init__(self, n=9, d=12):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(n, d), nn.GRU(d, d, batch_first=True), nn.Linear(d, n)
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0])

def sequences(padded=True, n=40, bs=10):
    x, y = torch.randint(0, 9, (n, 7)), torch.randint(0, 9, (n, 7))
    if padded: y[:, 5:] = -100; y[::3, 3:] = -100
    dl = DataLoader(Items(zip(x, y)), bs=bs)
    return DataLoaders(dl, dl)

def sequence_learner(loss=None, padded=True, **kwargs):
    return learner(partial(sequences, padded), LM, loss, lr=0.1, **kwargs)

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
            with torch.no_grad():
                scores = scores - F.cross_entropy(self.il(x).flatten(0, 1), y.flatten(), reduction='none')
        chosen = brute_force(scores.tolist(), (y.flatten() != -100).tolist(), self.frac)
        expected = losses[chosen].mean()
        assert self.learn.token_selector.mask.flatten().nonzero().flatten().tolist() == chosen
        assert torch.allclose(self.learn.loss, expected, rtol=1e-5)
        for a, b in zip(grads, torch.autograd.grad(expected, params)): assert torch.allclose(a, b, atol=1e-6)
        self.n += 1

def tokens(learn, il=None, **kwargs):
    "By the loss, or by the loss beyond the reference's"
    return learn.select(unit='token', **kwargs) if il is None else learn.rho_loss(il, unit='token', **kwargs)

def token_learner(il=None, frac=0.5, **kwargs): return tokens(sequence_learner(**kwargs), il, frac=frac)

@pytest.mark.parametrize('padded', [True, False])
@pytest.mark.parametrize('il', [True, False])
def test_trains_on_the_mean_of_the_chosen(padded, il):
    reference = LM() if il else None
    learn = fit(token_learner(reference, padded=padded), 2, cbs=(watch := Watch(reference)))
    assert watch.n == 8 and learn.selection is learn.token_selector.record
    counted = sum(int((y != -100).sum()) for _, y in learn.dls.train.dataset)
    ledger = learn.selection.ledger
    assert ledger.elements_loaded.tolist() == [counted]*2 and ledger.loaded.tolist() == [40]*2
    assert (ledger.elements_trained/counted == ledger.selected).all()
    assert (ledger.selected - 0.5).abs().max() < 0.02 and (ledger.forward == 'reuse').all()
    assert (ledger.loss_share > 0.5).all() if not il else True
    assert reference is None or reference.training and all(p.grad is None for p in reference.parameters())

def test_all_tokens_are_plain_training():
    plain, whole, weighted = (list(fit(o, 2).model.parameters())
                              for o in (sequence_learner(), token_learner(frac=1.), token_learner(frac=1 - 1e-9)))
    for a, b, c in zip(plain, whole, weighted): assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-6)

def test_a_loss_that_sums():
    # all of them, by weights
    learn = fit(token_learner(loss=CrossEntropyLossFlat(reduction='sum'), frac=1 - 1e-9), 1, lr=1e-4)
    other = fit(sequence_learner(CrossEntropyLossFlat(reduction='sum')), 1, lr=1e-4)
    for a, b in zip(learn.model.parameters(), other.model.parameters()): assert torch.allclose(a, b, atol=1e-6)

def test_start_every_and_warmup():
    learn = fit(tokens(sequence_learner(), frac=0.5, warmup_epochs=1, every=2), 3)
    kept = learn.selection.ledger.selected
    assert kept[0] == 1 and 0.7 < kept[1] < 0.8 and kept[1] == kept[2]
    assert (fit(tokens(sequence_learner(), frac=0.5, start=0.5), 2).selection.ledger.selected
            < 1).tolist() == [False, True]

def test_undone_and_in_the_table():
    learn = sequence_learner()
    n = len(learn.cbs)
    tokens(tokens(learn, frac=0.5), frac=0.25)
    assert len(learn.cbs) == n + 1 and learn.token_selector.pick.frac == 0.25
    fit(learn, 1)
    assert len(learn.metrics) == 0 and 'selected' in learn.recorder.metric_names
    assert len(learn.no_selection().cbs) == n and len(learn.selection.ledger) == 1

def test_validation_and_predictions_are_plain():
    learn = fit(token_learner(frac=0.2), 1)
    lines = len(learn.selection.ledger)
    loss = learn.validate()[0]
    assert math.isclose(loss, learn.no_selection().validate()[0], rel_tol=1e-6) and len(learn.selection.ledger) == lines

class Stop(Callback):
    order = 70
    def after_batch(self):
        if self.training and self.iter == 1: raise KeyboardInterrupt

def test_interrupted():
    learn = token_learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Stop())
    fit(learn, 1)
    assert len(learn.selection.ledger) == 2
    assert learn.selection.ledger.elements_loaded[0] < learn.selection.ledger.elements_loaded[1]
    assert len(learn.metrics) == 0

def test_gradient_accumulation_divides_it():
    a = fit(token_learner(frac=1 - 1e-9), 1, cbs=GradientAccumulation(20))
    b = fit(sequence_learner(), 1, cbs=GradientAccumulation(20))
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=1e-6)

def test_pixels_and_labels():
    set_seed(0)
    x = torch.randn(12, 3, 4, 4)
    for y, loss, model in ((x[:, 0] > 0).long(), CrossEntropyLossFlat(axis=1), nn.Conv2d(3, 2, 1)), \
                          ((x.mean((2, 3)) > 0).float(), BCEWithLogitsLossFlat(),
                           nn.Sequential(nn.Flatten(), nn.Linear(48, 3))):
        dl = DataLoader(list(zip(x, y)), bs=6)
        learn = fit(tokens(Learner(DataLoaders(dl, dl), model, loss_func=loss, lr=0.1), frac=0.25), 1)
        assert learn.selection.ledger.elements_loaded[0] == y.numel()
        assert learn.selection.ledger.selected[0] == pytest.approx(0.25, abs=0.03)

def test_awd_lstm_carries_its_state():
    set_seed(0)
    lines = [torch.randint(0, 20, (30,)) for _ in range(20)]
    def make():
        dls = DataLoaders(*[LMDataLoader([(o,) for o in lines], bs=4, seq_len=8, num_workers=0) for _ in range(2)])
        config = dict(awd_lstm_lm_config, emb_sz=12, n_hid=14, n_layers=1, output_p=0., hidden_p=0., input_p=0.,
                      embed_p=0., weight_p=0.2)
        return Learner(dls, get_language_model(AWD_LSTM, 20, config=config), loss_func=CrossEntropyLossFlat(),
                       cbs=rnn_cbs(), lr=0.01)
    learn, reference, other = make(), make(), make()
    other.model.load_state_dict(learn.model.state_dict())
    # all of them, by weights; the reference draws no random number
    for o in (tokens(learn, reference, frac=1 - 1e-9), other): set_seed(1), fit(o, 2)
    for p, q in zip(learn.model.parameters(), other.model.parameters()): assert torch.allclose(p, q, atol=1e-5)
    assert (fit(tokens(learn, reference, frac=0.5), 1).selection.ledger.selected - 0.5).abs().max() < 0.02

def test_export(tmp_path):
    learn = fit(token_learner(LM()), 1)
    learn.path = tmp_path
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    assert repr(loaded.token_selector) == repr(learn.token_selector)

def own(pred, targ): return F.cross_entropy(pred.flatten(0, 1), targ.flatten())

@pytest.mark.parametrize('make,kind,message', [
    (lambda: tokens(sequence_learner(), score='entropy'), ValueError, 'wants pred'),
    (lambda: tokens(sequence_learner(), score='reducible'), ValueError, 'il=model'),
    (lambda: tokens(sequence_learner(), pick=ImportanceSample(0.5)), TypeError, 'one that ranks'),
    (lambda: sequence_learner().rho_loss(unit='token'), TypeError, 'element_losses'),
    (lambda: fit(token_learner(loss=own), 2), ValueError, "reduction='none'"),
    (lambda: fit(token_learner(cbs=MixUp()), 2), ValueError, 'MixUp'),
    (lambda: tokens(sequence_learner().select('loss')), ValueError, 'no_selection'),
    (lambda: tokens(sequence_learner(), frac=0), ValueError, 'frac must lie')])
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message): make()

def test_shares_parameters_with_the_target():
    learn = sequence_learner()
    with pytest.raises(ValueError, match='shares parameters'): tokens(learn, learn.model)

@pytest.mark.parametrize('pick', ['uniform', Boltzmann(0.5), 'rank'])
def test_other_picks(pick):
    learn = fit(tokens(sequence_learner(), pick=pick, **({} if isinstance(pick, Boltzmann) else dict(frac=0.5))), 1)
    assert abs(learn.selection.ledger.selected[0] - 0.5) < 0.02

class Block(nn.Module):
    "A decoder's layer: what is to come is masked"
    def __init__(self, d, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3*d), nn.Linear(d, d)
        self.mlp, self.norms = nn.Sequential(nn.Linear(d, 2*d), nn.GELU(),
                                             nn.Linear(2*d, d)), nn.ModuleList([nn.LayerNorm(d) for _ in range(2)])
    def forward(self, h):
        q, k, v = (o.unflatten(-1, (self.heads, -1)).transpose(1, 2) for o in self.qkv(self.norms[0](h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norms[1](h))

class CausalOutput(dict):
    "As Hugging Face's models return it: a dictionary with attributes"
    __getattr__ = dict.__getitem__

class CausalLM(nn.Module):
    def __init__(self, n=9, d=16):
        super().__init__()
        self.emb, self.place, self.block, self.head = nn.Embedding(n, d), nn.Embedding(32, d), Block(d), nn.Linear(d, n)
    def forward(self, input_ids):
        h = self.block(self.emb(input_ids) + self.place.weight[:input_ids.shape[1]])
        return CausalOutput(logits=self.head(h), past_key_values=None, hidden_states=(h,))

def lm_loss(out, targ, reduction='mean', ignore_index=-100):
    return F.cross_entropy(out.logits.flatten(0, 1), targ.flatten(), reduction=reduction, ignore_index=ignore_index)

class WatchCausal(Watch):
    def after_backward(self):
        chosen = self.learn.token_selector.mask
        with torch.no_grad():
            excess = [F.cross_entropy(m(self.x).logits.flatten(0, 1), self.y.flatten(), reduction='none')
                      for m in (self.model, self.il)]
        assert chosen.flatten().nonzero().flatten().tolist() == brute_force((excess[0] - excess[1]).tolist(),
                                                                            (self.y != -100).flatten().tolist(),
                                                                            self.frac)
        self.n += 1

def test_a_causal_model_with_an_output_object():
    learn, reference = sequence_learner(lm_loss), CausalLM()
    learn.model = CausalLM()
    fit(tokens(learn, reference, frac=0.5), 1, cbs=(watch := WatchCausal(reference)))
    assert watch.n == 4 and learn.selection.ledger.selected[0] == pytest.approx(0.5, abs=0.02)

def test_a_causal_model_of_transformers():
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    learn, reference = sequence_learner(lm_loss), transformers.GPT2LMHeadModel(config)
    learn.model = transformers.GPT2LMHeadModel(config)
    fit(tokens(learn, reference, frac=0.5), 1)
    assert learn.selection.ledger.selected[0] == pytest.approx(0.5, abs=0.02)

# A table of element losses

class Sentences(Items):
    "Rows of different length"
    def __init__(self, n=40, seed=0):
        gen = torch.Generator().manual_seed(seed)
        sizes = torch.randint(2, 9, (n,), generator=gen).tolist()
        super().__init__([(torch.randint(0, 9, (k,), generator=gen), torch.randint(0, 9, (k,), generator=gen))
                          for k in sizes])

def padded_batch(items, first=False):
    "To the longest of the batch, on either side; what the loss ignores is not only padding"
    length = max(len(y) for _, y in items)
    x, y = torch.zeros(len(items), length, dtype=torch.long), torch.full((len(items), length), -100)
    for i, (a, b) in enumerate(items):
        place = slice(length - len(a), None) if first else slice(len(a))
        x[i, place], y[i, place] = a, b.masked_fill(b == 4, -100)
    return x, y

class PerToken(nn.Module):
    "Tags each word by itself: padding can't reach it"
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.emb, self.out = nn.Embedding(9, 12), nn.Linear(12, 9)
    def forward(self, x): return self.out(self.emb(x).tanh())

def tagger(first=False, seed=0, bs=10, shuffle=True):
    set_seed(seed)
    dls = DataLoaders(*[DataLoader(Sentences(), bs=bs, shuffle=shuffle, create_batch=partial(padded_batch, first=first))
                        for _ in range(2)])
    return Learner(dls, PerToken(seed), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.1)

def test_table_of_a_reference_says_what_it_says():
    reference = tagger(seed=3)
    learn = tagger()
    table = element_losses(reference, learn.dls.train)
    for (x, y), line in zip(learn.dls.train.dataset, table):
        expected = F.cross_entropy(reference.model(x), y, reduction='none')[y != 4]
        assert torch.allclose(line, expected, atol=1e-5)

@pytest.mark.parametrize('first', [False, True])
@pytest.mark.parametrize('dense', [False, True])
def test_table_and_model_choose_alike(first, dense):
    reference = tagger(seed=3)
    table = element_losses(reference, reference.dls.train)
    if dense: table = torch.stack([F.pad(o, (0, 9 - len(o)), value=math.nan) for o in table])
    by_model, by_table = (fit(tokens(tagger(first), il, frac=0.4), 2) for il in (reference, table))
    assert torch.equal(by_model.model.out.weight, by_table.model.out.weight)
    assert not torch.equal(by_model.model.out.weight, fit(tokens(tagger(first), frac=0.4), 2).model.out.weight)
    assert (by_table.selection.ledger.selected - 0.4).abs().max() < 0.02

@pytest.mark.parametrize('shape', [(3, 5), (6,)])
def test_elements_are_where_the_targets_are(shape):
    "fastai's losses move axes before they flatten"
    set_seed(0)
    pred, y = torch.randn(4, 3, *shape, requires_grad=True), torch.randint(0, 3, (4, *shape))
    y[:, 0] = 255
    item_losses = ItemLosses(CrossEntropyLossFlat(axis=1, ignore_index=255))
    losses, counted = item_losses.elements(pred, y)
    assert torch.equal(counted, y != 255)
    assert torch.allclose(losses, F.cross_entropy(pred, y, reduction='none', ignore_index=255), atol=1e-6)
    weights = torch.rand(y.shape)*(y != 255)
    expected = (weights*F.cross_entropy(pred, y, reduction='none', ignore_index=255)).sum()/(y != 255).sum()
    assert torch.allclose(item_losses.weighted(weights, pred, y), expected, atol=1e-6)

def test_table_on_pixels():
    set_seed(0)
    x = torch.randn(12, 3, 4, 5)
    y = (x[:, 0] > 0).long()
    y[:, 0] = 255 # the border is not judged
    il, model = torch.rand(12, 4, 5), nn.Conv2d(3, 2, 1)
    il[y == 255] = math.nan
    dl = DataLoader(list(zip(x, y)), bs=6, shuffle=True)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255), lr=0.1)
    class Check(Callback):
        order, n = 20, 0
        def after_loss(self):
            if not self.training: return
            rows = [(x == o).flatten(1).all(1).nonzero().item() for o in self.x]
            scores = F.cross_entropy(self.pred, self.y, reduction='none', ignore_index=255).detach() - il[rows]
            chosen = brute_force(scores.flatten().tolist(), (self.y != 255).flatten().tolist(), 0.25)
            assert self.learn.token_selector.mask.flatten().nonzero().flatten().tolist() == chosen
            Check.n += 1
    fit(tokens(learn, il, frac=0.25), 1, cbs=Check())
    assert Check.n == 2 and learn.selection.ledger.elements_loaded[0] == 12*15

def test_table_after_export(tmp_path):
    reference = tagger(seed=3)
    learn = fit(tokens(tagger(), element_losses(reference, reference.dls.train), frac=0.5), 1)
    learn.path = tmp_path
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    loaded.dls = learn.dls
    assert len(loaded.validate()) == 1
    with pytest.raises(ValueError, match='give it again, il=table'): fit(loaded, 1)

def wrong_line():
    table = element_losses(tagger(), tagger().dls.train)
    table[7] = table[7][1:]
    return table

class Longer(Callback):
    "Changes the targets of the second batch"
    order = -20
    def before_batch(self):
        if self.training and self.iter == 1: self.learn.yb = (self.y.masked_fill(self.y == 3, -100),)

def lm_table():
    dls = DataLoaders(*[LMDataLoader([(torch.randint(0, 9, (30,)),) for _ in range(9)], bs=4, seq_len=8, shuffle=True,
                                     num_workers=0) for _ in range(2)])
    return Learner(dls, LM(), loss_func=CrossEntropyLossFlat()).rho_loss([torch.ones(30)]*9, unit='token')

@pytest.mark.parametrize('make,message', [
    (lambda: tokens(tagger(), [torch.ones(2)]*7), 'of 7 rows, but the training set has 40'),
    (lambda: fit(tokens(tagger(shuffle=False), wrong_line()), 2), '1 of 10 rows have another'),
    (lambda: fit(tokens(tagger(), element_losses(tagger(), tagger().dls.train)), 2, cbs=Longer()),
     'of 40 rows have another number of elements'),
    (lambda: tokens(tagger(), [torch.tensor([math.inf])]*40), 'infinite'),
    (lm_table, 'a reference model, which needs no rows')])
def test_tables_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message): make()

def test_ranks_are_among_the_tokens_that_count():
    "Padding, whose loss is 0, doesn't lift the easiest tokens"
    learn = sequence_learner().select(unit='token', pick=RankSample(0.2))
    selector, chosen, n = learn.token_selector, 0, draws(200)
    learn.pct_train, selector._fit = 0., SimpleNamespace(first=False)
    losses, counted = torch.arange(1., 41).expand(1, 40), torch.arange(40)[None] < 10
    for _ in range(n): chosen = chosen + selector.chosen(losses.where(counted, 0.), counted)[0].float()
    assert chosen.sum() == 2*n and chosen[:3].sum() < 0.02*chosen.sum() # by their ranks 0.2 %, among all tokens 20 %

# unit='token'

@pytest.mark.parametrize('method', ['select', 'rho_loss'])
@pytest.mark.parametrize('argument,why', [
    (dict(forward='twice'), 'forward that training makes'), (dict(staleness=2), 'forward that training makes'),
    (dict(scale_factor=0.5), 'forward that training makes'),
    (dict(proxy=object()), 'forward that training makes'), (dict(enlarge=True), 'no item leaves the batch'),
    (dict(min_items=4), 'no item leaves the batch'),
    (dict(track=dict(a=torch.ones(40).bool())), 'counts elements'), (dict(fallback='uniform'), 'counts elements'),
    (dict(il_budget=0.5), 'made beforehand')],
    ids=lambda o: o if isinstance(o, str) else next(iter(o)))
def test_arguments_that_say_nothing_of_tokens(method, argument, why):
    kwargs = dict(il=LM(), **(dict(score='reducible') if method == 'select' else {}))
    with pytest.raises(ValueError, match=f"says nothing of tokens: .*{why}.* Leave it out"):
        getattr(sequence_learner(), method)(unit='token', **kwargs, **argument)

def test_arguments_that_are_as_they_are_anyway():
    fit(sequence_learner().rho_loss(LM(), unit='token', forward='reuse', enlarge=False, staleness=1, update_il=False,
                                    epoch='candidates'), 1)
    with pytest.raises(ValueError, match='gate=False says nothing of tokens: the gate looks at the labels of items'):
        sequence_learner().rho_loss(LM(), unit='token', gate=False)
    for argument in (dict(update_il=True), dict(il_epochs=3), dict(il_folds=2)):
        with pytest.raises(ValueError, match='made beforehand'):
            sequence_learner().rho_loss(LM(), unit='token', **argument)
    with pytest.raises(TypeError, match='fracs'): sequence_learner().select(unit='token', fracs=0.2)

@pytest.mark.parametrize('make,kind,message', [
    (lambda: sequence_learner().select(unit='tokens'), ValueError, "Did you mean 'token'"),
    (lambda: sequence_learner().rho_loss(LM(), unit=None), ValueError, "'item', 'token'"),
    (lambda: sequence_learner().select(unit='token', il=LM()), ValueError, "don't look at it: use score='reducible'"),
    (lambda: sequence_learner().rho_loss(LM(), unit='token', pick='uniform'), ValueError, "don't look at it"),
    (lambda: sequence_learner().rho_loss('probe', unit='token'), TypeError, "il='probe' stands for losses of items"),
    (lambda: sequence_learner().rho_loss(TeacherIL(lambda x: x), unit='token'), TypeError, 'losses of items'),
    (lambda: token_learner().select('loss'), ValueError, 'no_selection'),
    (lambda: token_learner().prune_epochs('random'), ValueError, 'no_selection')])
def test_units_that_do_not_go(make, kind, message):
    with pytest.raises(kind, match=message): make()

def test_a_diverged_model_goes_on_to_nan_without_an_error():
    "As plain training would; the choice is arbitrary"
    learn = token_learner(LM())
    with torch.no_grad(): learn.model.out.weight.fill_(math.nan)
    assert fit(learn, 1).selection.ledger.selected[0] == pytest.approx(0.5, abs=0.02)
