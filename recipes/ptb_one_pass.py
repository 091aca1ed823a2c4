"""A language model on Penn Treebank from any learning rate, weight decay and momentum, which `learn.one_pass()` tunes
on the validation text.

python recipes/ptb_one_pass.py --path <folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt> --method one_pass \
    --lr 0.01 --out runs/ptb

Clarke et al. (2022) train two layers of 650 units on 40 parallel sequences of 70 words for 72 epochs, gradients clipped
to a norm of 0.25: --hidden 650 --layers 2 --bs 40 --seq_len 70 --epochs 72. The defaults are smaller.
"""
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from common import accept_underscores, machine
from fastai.callback.rnn import ModelResetter
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse
from torch import nn

import rholoss_fastai.all  # noqa: F401 (patches one_pass)

FILES = [f'ptb.{o}.txt' for o in ('train', 'valid', 'test')]


def read_text(folder):
    "Word numbers of the three texts, `<eos>` at each line's end, and the number of words"
    folder = Path(folder)
    missing = [name for name in FILES if not (folder/name).exists()]
    if missing:
        raise FileNotFoundError(f"No {', '.join(missing)} in {folder}: --path must hold {', '.join(FILES)}, one "
                                "sentence a line.")
    texts = [(folder/name).read_text(encoding='utf-8').replace('\n', ' <eos> ').split() for name in FILES]
    numbers = {word: i for i, word in enumerate(sorted({word for text in texts for word in text}))}
    return [torch.tensor([numbers[word] for word in text]) for text in texts], len(numbers)


class TextBatches:
    "`bs` sequences side by side, `seq_len` words of each at a time, and the words that follow: batches go on in turn"
    def __init__(self, text, bs, seq_len):
        self.text, self.seq_len = text[:len(text)//bs*bs].view(bs, -1), seq_len
        if self.text.shape[1] < 2:
            raise ValueError(f"{len(text)} words are too few for {bs} sequences of at least 2: lower --bs.")
    def __len__(self): return -(-(self.text.shape[1] - 1)//self.seq_len)
    def __iter__(self):
        inputs, targets = self.text[:, :-1], self.text[:, 1:]
        return zip(inputs.split(self.seq_len, 1), targets.split(self.seq_len, 1))


class LanguageModel(nn.Module):
    "Embedding, LSTM, and a linear layer; the hidden state lasts until `reset`"
    def __init__(self, n_words, hidden, layers):
        super().__init__()
        self.embed, self.out, self.state = nn.Embedding(n_words, hidden), nn.Linear(hidden, n_words), None
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
    def reset(self): self.state = None
    def forward(self, x):
        out, state = self.lstm(self.embed(x), self.state)
        self.state = tuple(o.detach() for o in state)
        return self.out(out)


accept_underscores()


@call_parse
def main(
    path:str='.', # Folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt
    method:str='one_pass', # one_pass, or constant: the values as they are
    lr:float=1., # Learning rate to begin with
    wd:float=1e-6, # L2 weight decay to begin with
    mom:float=0.5, # Momentum to begin with
    epochs:int=10, # Epochs
    hidden:int=200, # Units of embedding and LSTM
    layers:int=1, # Layers of the LSTM
    bs:int=40, # Sequences side by side
    seq_len:int=70, # Words of each in a batch
    every:int=10, # Training steps between two steps of the hyper-parameters
    seed:int=0, # Of the weights
    out:str='runs/ptb_one_pass', # Folder for summary.json
):
    "Train a small LSTM and print perplexities"
    if method not in ('one_pass', 'constant'):
        raise SystemExit(f"--method must be one_pass or constant; got {method!r}.")
    settings = {k: v for k, v in locals().items() if k not in ('path', 'out')}
    texts, n_words = read_text(path)
    train, valid, test = (TextBatches(text, bs, seq_len) for text in texts)
    set_seed(seed)
    learn = Learner(DataLoaders(train, valid, device=default_device()), LanguageModel(n_words, hidden, layers),
                    loss_func=CrossEntropyLossFlat(), lr=lr, wd=wd, opt_func=partial(SGD, mom=mom, decouple_wd=False),
                    cbs=[ModelResetter(), GradientClip(0.25)])
    if method == 'one_pass': learn.one_pass(every=every)
    began = time.perf_counter()
    with learn.no_bar():
        learn.fit(epochs)
        seconds = time.perf_counter() - began
        valid,tested = [row[1] for row in learn.recorder.values],learn.validate(dl=test)[0]
    def perplexity(loss): return math.exp(min(loss, 50.))
    summary = dict(settings, seconds=seconds, valid=[perplexity(o) for o in valid], test=perplexity(tested),
                   last={k: learn.opt.hypers[0][k] for k in ('lr', 'wd', 'mom')}, **machine())
    if method == 'one_pass': summary['hypers'] = learn.one_pass_tuner.history.to_dict('list')
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out)/'summary.json').write_text(json.dumps(summary, indent=1) + '\n')
    last = f"{summary['valid'][-1]:.1f}" if valid else 'unknown (training stopped in its first epoch)'
    print(f"{method}: validation perplexity {last}, test perplexity {summary['test']:.1f}, {seconds:.0f} s")
