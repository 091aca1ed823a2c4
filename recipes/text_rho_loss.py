"""RHO-LOSS on sentences: CoLA (is it grammatical?) and SST-2 (is it favourable?), by a fastai text Learner or a Hugging Face classifier.

python recipes/text_rho_loss.py --data sst2 --path <folder> --method rho_loss --out runs/rho_loss-0
python recipes/text_rho_loss.py --data sst2 --path <folder> --method uniform  --out runs/uniform-0
python recipes/compare_runs.py runs

The folder holds `cola_train.tsv` and `cola_dev.tsv` with the columns source, label, mark and sentence (github.com/nyu-mll/CoLA-baselines), or
`sst2_train.tsv` and `sst2_dev.tsv` with the columns sentence and label (github.com/clairett/pytorch-sentiment-classification), without headings.
Evaluated on dev. With `--pretrained`, AWD-LSTM's or ALBERT's weights are downloaded and fine-tuned; without, a small model starts from scratch.
"""
import csv
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from common import accept_underscores, best, fit_steps, last_five, machine, steps_to, write_run
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.text.all import AWD_LSTM, CategoryBlock, ColReader, ColSplitter, DataBlock, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.torch_core import default_device, set_seed
from fastcore.script import call_parse, store_true
from sklearn.metrics import matthews_corrcoef
from torch import nn

from rholoss_fastai.all import Uniform, noisy_labels, plain

COLUMNS = dict(cola=['source', 'label', 'mark', 'text'], sst2=['text', 'label'])
SMALL_LSTM = dict(emb_sz=128, n_hid=128, n_layers=1) # of 400, 1152 and 3
SMALL_ALBERT = dict(embedding_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
LEARNING_RATE = {('fastai', False): 1e-3, ('fastai', True): 2e-3, ('hf', False): 5e-4, ('hf', True): 2e-5}


def read_sentences(path, data):
    "Sentences and labels of training and dev set, marked by `is_valid`"
    parts = []
    for split in ('train', 'dev'):
        file = Path(path)/f'{data}_{split}.tsv'
        if not file.exists(): raise FileNotFoundError(f"{file} is missing: --path must hold {data}_train.tsv and {data}_dev.tsv.")
        parts.append(pd.read_csv(file, sep='\t', names=COLUMNS[data], quoting=csv.QUOTE_NONE)[['text', 'label']].assign(is_valid=split == 'dev'))
    return pd.concat(parts, ignore_index=True)


def fastai_learner(sentences, bs, pretrained, noisy):
    "A function of `lr` that makes a fastai text classifier"
    block = DataBlock(blocks=(TextBlock.from_df('text', n_workers=0), CategoryBlock(vocab=[0, 1])), get_x=ColReader('text'), get_y=ColReader('label'),
                      splitter=ColSplitter())
    dls = noisy(block.dataloaders(sentences, bs=bs, val_bs=200, num_workers=0))
    def make(**kwargs):
        config = None if pretrained else {**awd_lstm_clas_config, **SMALL_LSTM}
        return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=pretrained, metrics=[], **kwargs)
    return make


class Classifier(nn.Module):
    "A Hugging Face sequence classifier as fastai calls it: of one input, a dict of tensors"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, encoded): return self.model(**encoded).logits


def word_pieces(texts):
    "A tokeniser learnt from `texts`, where none can be downloaded"
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer,tokenizer.pre_tokenizer,tokenizer.decoder = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ['<pad>', '[UNK]', '[CLS]', '[SEP]']
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(('pad_token', 'unk_token', 'cls_token', 'sep_token'), special)))


def huggingface_learner(sentences, bs, pretrained, noisy, name='albert/albert-base-v2'):
    "A function of `lr` that makes a fastai Learner of a Hugging Face classifier"
    from transformers import AlbertConfig, AlbertForSequenceClassification, AutoModelForSequenceClassification, AutoTokenizer
    texts = sentences.text[~sentences.is_valid].tolist()
    tokenizer = AutoTokenizer.from_pretrained(name) if pretrained else word_pieces(texts)
    def collate(items):
        encoded,labels = zip(*items)
        return tokenizer.pad(encoded, return_tensors='pt'),torch.tensor(labels)
    def loader(part, bs, **kwargs):
        encoded = tokenizer(part.text.tolist(), truncation=True, max_length=128)['input_ids']
        return DataLoader([(dict(input_ids=ids), label) for ids,label in zip(encoded, part.label.tolist())], bs=bs, create_batch=collate, **kwargs)
    dls = noisy(DataLoaders(loader(sentences[~sentences.is_valid], bs, shuffle=True, drop_last=True), loader(sentences[sentences.is_valid], 200)))
    dls.device = default_device()
    def make(**kwargs):
        if pretrained: model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        else: model = AlbertForSequenceClassification(AlbertConfig(vocab_size=len(tokenizer), num_labels=2, pad_token_id=0, **SMALL_ALBERT))
        return Learner(dls, Classifier(model), loss_func=CrossEntropyLossFlat(), **kwargs)
    return make


MODELS = dict(fastai=fastai_learner, hf=huggingface_learner)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder of the data
    data:str='cola', # cola or sst2
    model:str='fastai', # fastai (AWD-LSTM) or hf (ALBERT)
    pretrained:store_true=False, # Download pretrained weights and fine-tune them?
    method:str='rho_loss', # uniform, random (a random subset of each candidate batch) or rho_loss (cross-fitted)
    noise:float=0., # Share of the training labels redrawn; dev stays clean
    frac:float=0.1, # Selected share of each candidate batch
    bs:int=32, # Items trained on in each step, n_b
    steps:int=1000, # Training steps
    eval_every:int=50, # Steps between evaluations
    lr:float=None, # Learning rate, constant; default by model
    il_epochs:int=4, # Epochs of each of the two cross-fitting models; the best one's losses are kept
    il_file:str=None, # Irreducible losses: loaded from here if the file exists, else cross-fitted and saved here
    seed:int=0, # Seed of weights and batches
    out:str='runs/text_rho_loss', # Folder for history.csv, summary.json and accuracy.png
):
    "Train a classifier of sentences, uniformly or with RHO-LOSS, for a given number of steps"
    if path is None: raise SystemExit('--path is missing: the folder that holds the data, as the first lines of this recipe say.')
    for name,value,known in (('method', method, ('uniform', 'random', 'rho_loss')), ('data', data, COLUMNS), ('model', model, MODELS)):
        if value not in known: raise SystemExit(f"--{name} must be one of {', '.join(known)}; got {value!r}.")
    lr = lr or LEARNING_RATE[model,pretrained]
    settings = {k: v for k,v in locals().items() if k not in ('path', 'out', 'il_file', 'name', 'value', 'known')}
    set_seed(seed)
    def noisy(dls): return noisy_labels(dls, noise, seed=seed) if noise else dls
    make = MODELS[model](read_sentences(path, data), bs, pretrained, noisy)
    learn = make(lr=lr, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    if pretrained: learn.unfreeze()
    if method == 'random': learn.rho_loss(pick=Uniform(frac, seed=seed), epoch='candidates')
    if method == 'rho_loss': learn.rho_loss(il_file if il_file and Path(il_file).exists() else 'crossfit', frac=frac, epoch='candidates', **({} if il_file and Path(il_file).exists() else dict(il_epochs=il_epochs)))

    test,began = plain(list(learn.dls.valid)),time.perf_counter()
    evaluations = fit_steps(learn, test, steps, eval_every)
    history,seconds = evaluations.history,time.perf_counter() - began
    il = learn.selector.il if method == 'rho_loss' else None
    if il and il_file: il.save(il_file)
    labels = torch.cat([y for _,y in test]).cpu()
    matthews = [round(float(matthews_corrcoef(labels, o)), 4) for o in evaluations.predictions]
    summary = dict(settings, best=best(history), steps_to_best=steps_to(history, best(history))[0], last_five=last_five(history),
                   matthews=max(matthews), matthews_history=matthews, seconds=history[-1][3], seconds_with_evaluations=round(seconds, 1),
                   il=il.info if il else None, **machine())
    write_run(out, history, summary)
    print(f"{method}: best accuracy {summary['best']:.4f} after {summary['steps_to_best']} of {steps} steps, best Matthews correlation "
          f"{summary['matthews']:.4f}, {summary['seconds']:.0f} s of training" + (f", {il.info['seconds']:.0f} s for irreducible losses" if il else ''))
    print(f"Written to {out}")
