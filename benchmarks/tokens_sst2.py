"""Selection of tokens on a small causal language model: SST-2 sentences of which some tokens were replaced at random,
plain training and the better tokens.

python benchmarks/tokens_sst2.py --path <folder> --out benchmarks/results/tokens_sst2.json

The folder holds `sst2_train.tsv`, `sst2_dev.tsv` and `sst2_test.tsv`
(github.com/clairett/pytorch-sentiment-classification). The reference reads the test split and the first sentences of
the training split as they are, the models the other ones with errors; perplexity is that of the dev split as it is.
"""
import csv
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from torch import nn

sys.path.append(str(Path(__file__).parent.parent/'recipes'))
from common import accept_underscores, machine, print_table

import rholoss_fastai.all  # noqa: F401 (patches `select`)

PAD,BEGIN,UNKNOWN = -100,0,1


class TokenModel(nn.Module):
    "Embedding, one layer of GRU, and the embedding again for the prediction"
    def __init__(self, n_words, width):
        super().__init__()
        self.emb,self.rnn = nn.Embedding(n_words, width),nn.GRU(width, width, batch_first=True)
        self.drop,self.out = nn.Dropout(0.2),nn.Linear(width, n_words)
        self.out.weight = self.emb.weight
        nn.init.normal_(self.emb.weight, std=0.1)

    def forward(self, x): return self.out(self.drop(self.rnn(self.drop(self.emb(x)))[0]))


def read_words(path, split, most=30):
    "The first words of each sentence"
    return [o.split()[:most] for o in pd.read_csv(Path(path)/f'sst2_{split}.tsv', sep='\t', names=['text', 'label'],
                                                  quoting=csv.QUOTE_NONE).text]

def numbered(sentences, vocab): return [torch.tensor([vocab.get(o, UNKNOWN) for o in words]) for words in sentences]

def with_errors(sentences, share, n_words, seed):
    "Sentences with a share of their words replaced, and which"
    gen = torch.Generator().manual_seed(seed)
    wrong = [torch.rand(len(o), generator=gen) < share for o in sentences]
    return [torch.where(w, torch.randint(2, n_words, o.shape, generator=gen), o) for o,w in zip(sentences, wrong)],wrong

def batched(items):
    "Pad: inputs begin with a word of their own, what is to be predicted is padded with what the loss ignores"
    length = max(len(words) for words,_ in items)
    x,y,w = (torch.full((len(items), length), o) for o in (BEGIN, PAD, 0))
    for i,(words,wrong) in enumerate(items):
        n = len(words)
        x[i,1:n],y[i,:n],w[i,:n] = words[:-1],words,wrong.long()
    return x,(y + (w << 20)).where(y != PAD, PAD) # the mark travels with the target until `Marks` takes it off

class Marks(Callback):
    "Takes the marks of replaced words off the targets, and counts how many were among the trained"
    order = -20
    def before_fit(self): self.wrong = self.trained = 0
    def before_batch(self):
        y = self.yb[0]
        self.replaced = (y != PAD) & (y >> 20 > 0)
        self.learn.yb = (torch.where(self.replaced, y & (1 << 20) - 1, y),)
    def after_batch(self):
        if not self.training: return
        chosen = self.learn.token_selector.mask if hasattr(self.learn, 'token_selector') else self.yb[0] != PAD
        self.wrong += (self.replaced & chosen).sum().item()
        self.trained += chosen.sum().item()

def learner(sentences, wrong, valid, n_words, width, bs, seed):
    set_seed(seed)
    items = list(zip(sentences, wrong))
    dls = DataLoaders(DataLoader(items, bs=bs, shuffle=True, create_batch=batched, drop_last=True),
                      DataLoader([(o, torch.zeros(len(o))) for o in valid], bs=100, create_batch=batched))
    return Learner(dls, TokenModel(n_words, width), loss_func=CrossEntropyLossFlat(), opt_func=Adam, cbs=Marks())

def fit(learn, n_epoch, lr=3e-3):
    began = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, lr)
    seconds = time.process_time() - began
    replaced = learn.marks.wrong/learn.marks.trained # before `validate`, which counts anew
    with learn.no_bar(): loss = learn.validate()[0]
    return dict(perplexity=round(math.exp(loss), 1), replaced=round(replaced, 4), seconds=round(seconds, 1))

def compare(path, seed, methods, share, frac, n_reference, epochs, il_epochs, width, bs, n_vocab):
    "Plain training, a random share of the tokens, and those whose loss exceeds the reference's the most"
    words = read_words(path, 'train')
    vocab = {word: i + 2 for i,(word,_) in enumerate(Counter(o for s in words for o in s).most_common(n_vocab))}
    n_words = len(vocab) + 2
    train,valid,clean = (numbered(o, vocab) for o in (words, read_words(path, 'dev'), read_words(path, 'test')))
    clean,train = clean + train[:n_reference],train[n_reference:]
    noisy,wrong = with_errors(train, share, n_words, seed)
    reference = learner(clean, [torch.zeros(len(o)) for o in clean], valid, n_words, width, bs, seed)
    res = [dict(method='reference', **fit(reference, il_epochs))]
    kwargs_of = dict(plain=None, random=dict(pick='uniform'), tokens=dict(score='reducible', il=reference))
    for method in methods.split(','):
        kwargs = kwargs_of[method]
        learn = learner(noisy, wrong, valid, n_words, width, bs, seed)
        if kwargs is not None: learn.select(unit='token', frac=frac, **kwargs)
        res.append(dict(method=method, **fit(learn, epochs)))
    return [dict(seed=seed, **o) for o in res]


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder of the data
    seeds:str='0', # Seeds, with commas
    methods:str='plain,random,tokens', # What is compared, with commas
    share:float=0.3, # Share of the training tokens that is replaced
    frac:float=0.6, # Share of the tokens that is trained on
    n_reference:int=3500, # Sentences of the training split that the reference reads, and the models don't
    epochs:int=4, # Epochs of the models
    il_epochs:int=6, # Epochs of the reference
    width:int=96, # Of embedding and GRU
    bs:int=64, # Sentences in a batch
    n_vocab:int=3000, # Words that have a number of their own
    out:str=None, # JSON file for the results
):
    "Held-out perplexity, and the share of replaced tokens among those trained on, at equal steps"
    if path is None:
        raise SystemExit('--path is missing: the folder that holds the data, as the first lines of this file say.')
    settings = dict(methods=methods, share=share, frac=frac, n_reference=n_reference, epochs=epochs,
                    il_epochs=il_epochs, width=width, bs=bs, n_vocab=n_vocab)
    rows = [row for seed in seeds.split(',') for row in compare(path, int(seed), **settings)]
    print_table(list(rows[0]), [list(o.values()) for o in rows])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(machine=machine(), **settings, rows=rows), indent=1) + '\n')
