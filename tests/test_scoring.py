"Scoring leaves no trace in a model, and the state that it carries from batch to batch stays with its rows"
import pytest
import torch
from fastai.text.models import AWD_LSTM
from torch import nn

from rholoss_fastai.scoring import carried_state, carries_state, copy_state, merge_state, scoring_mode, select_state

cpu = torch.device('cpu')

class Recurrent(nn.Module):
    "Goes on from the hidden state of the batch before"
    def __init__(self, kind=nn.LSTM, layers=1):
        super().__init__(); self.rnn, self.hidden = kind(3, 4, layers, batch_first=True), None
    def reset(self): self.hidden = None
    def forward(self, x):
        out, hidden = self.rnn(x, self.hidden)
        self.hidden = tuple(o.detach() for o in hidden) if isinstance(hidden, tuple) else hidden.detach()
        return out

class Awd(nn.Module):
    def __init__(self, emb=4, hidden=5, layers=2, **kwargs):
        super().__init__(); self.body = AWD_LSTM(9, emb, hidden, layers, pad_token=0, **kwargs)
    def reset(self): self.body.reset()
    def forward(self, x): return self.body(x)

class InPlace(Recurrent):
    "Writes into what it has"
    def __init__(self):
        super().__init__(nn.GRU); self.steps, self.seen, self.memory = 0, [], dict(last=torch.zeros(2, 3))
    def forward(self, x):
        self.steps += 1
        self.seen.append(x.sum())
        self.memory['last'].add_(1)
        self.memory['new'] = x
        if self.steps > 1: self.more = x
        return super().forward(x)

class Hooked(nn.Sequential):
    "A hook keeps what a layer gave, on the layer"
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.ReLU())
        self[0].register_forward_hook(lambda m, i, o: setattr(m, 'out', o.detach()))

class Centred(nn.Module):
    "A buffer that the first batch fills"
    def __init__(self): super().__init__(); self.register_buffer('centre', None)
    def forward(self, x):
        if self.centre is None: self.centre = x.mean(0).detach()
        return x - self.centre

def numbers(): return torch.randn(4, 5, 3)
def tokens(): return torch.randint(1, 9, (4, 5))
models = [(Recurrent, numbers), (lambda: Recurrent(nn.GRU, 2), numbers), (lambda: Recurrent(nn.RNN), numbers),
          (Awd, tokens), (InPlace, numbers), (Hooked, numbers), (Centred, numbers)]

def snapshot(model):
    def of(o):
        if isinstance(o, torch.Tensor): return o.detach().clone()
        if isinstance(o, dict): return {k: of(v) for k, v in o.items()}
        return [of(v) for v in o] if isinstance(o,
                                                (list, tuple)) else o if isinstance(
            o, (int, float, str, type(None))) else id(o)
    return [{k: of(v) for k, v in vars(m).items() if k != '_modules'} for m in model.modules()]

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b

@pytest.mark.parametrize('raises', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('warm', [0, 2])
@pytest.mark.parametrize('make_model, make_batch', models)
def test_no_trace(make_model, make_batch, warm, training, raises):
    torch.manual_seed(0)
    model = make_model()
    for _ in range(warm): model(make_batch())
    identities = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    before = snapshot(model)
    for _ in range(2):
        try:
            with scoring_mode(model, cpu, training):
                model(make_batch()); model(make_batch())
                if raises: raise KeyboardInterrupt
        except KeyboardInterrupt: pass
        assert same(snapshot(model), before)
        assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == identities

@pytest.mark.parametrize('make_model, make_batch', models[:4])
def test_training_goes_on_as_if_nothing_was_scored(make_model, make_batch):
    outs = []
    for scored in (False, True):
        torch.manual_seed(0)
        model, batches = make_model(), [make_batch() for _ in range(3)]
        torch.manual_seed(1)
        for batch in batches:
            if scored:
                with scoring_mode(model, cpu): model(batch)
            out = model(batch)
        outs.append(out[0] if isinstance(out, tuple) else out)
    assert torch.equal(*outs)

def test_a_model_without_state_keeps_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 2))
    with scoring_mode(model, cpu): model(torch.randn(4, 3))
    assert carried_state(model) == [] and not carries_state(model)

@pytest.mark.parametrize('make_model, make_batch, names', [(*models[0], ['hidden']), (*models[3], ['body.hidden'])])
def test_state_is_told(make_model, make_batch, names):
    model = make_model()
    assert carries_state(model)
    model(make_batch())
    with scoring_mode(model, cpu): model(make_batch())
    assert carried_state(model) == names

@pytest.mark.parametrize('rows',
                         [([0], [3], [1]), ([0, 1, 2, 3], [2, 0], [1, 3, 2]), ([3, 1], [0, 1, 2], [0, 1, 2, 3])])
@pytest.mark.parametrize('make_model, make_batch',
                         models[:4] + [(lambda: Awd(4, 4, 1), tokens), (lambda: Awd(6, 4, 2, bidir=True), tokens)])
def test_rows_keep_their_state(make_model, make_batch, rows):
    "Three batches, of each some rows: every row is where it would be had all gone on"
    torch.manual_seed(0)
    model, batches = make_model().eval(), [make_batch() for _ in range(3)]
    last = lambda o: o[0] if isinstance(o, tuple) else o
    with torch.no_grad():
        expected = [last(model(b)) for b in batches]
        model.reset()
        for i, (batch, idxs) in enumerate(zip(batches, map(torch.tensor, rows))):
            with scoring_mode(model, cpu):
                torch.testing.assert_close(last(model(batch)), expected[i])
                state = copy_state(model)
            select_state(model, idxs, 4)
            torch.testing.assert_close(last(model(batch[idxs])), expected[i][idxs])
            merge_state(model, state, idxs)

def test_rows_that_cannot_be_told():
    "A state of as many steps as rows: neither dimension is known to be that of the rows"
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.layer, self.state = nn.Linear(3, 3), torch.zeros(4, 4, 3)
        def forward(self, x): self.state = self.state + 1; return self.layer(x)
    model = Odd()
    with scoring_mode(model, cpu): model(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r'in `state`, of shape \(4, 4, 3\)'): select_state(model, torch.tensor([0]), 4)
