"""RHO-LOSS on sentences: CoLA (is it grammatical?) and SST-2 (is it favourable?), by a fastai text Learner or a Hugging
Face classifier.

python recipes/text_rho_loss.py --data sst2 --path <folder> --noise 0.2 --folder runs/sst2
python recipes/text_rho_loss.py --data cola --path <folder> --methods rho_loss:frac=0.1 --budget steps --fit fit \
    --metric matthews_corrcoef

The folder holds `cola_train.tsv` and `cola_dev.tsv` with the columns source, label, mark and sentence
(github.com/nyu-mll/CoLA-baselines), or `sst2_train.tsv` and `sst2_dev.tsv` with the columns sentence and label
(github.com/clairett/pytorch-sentiment-classification), without headings. Evaluated on dev. With `--pretrained`,
AWD-LSTM's or ALBERT's weights are downloaded and fine-tuned; without, a small model starts from scratch.
"""
import csv
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from common import accept_underscores, compared, read_method
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, ColSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import MatthewsCorrCoef, accuracy
from fastai.optimizer import OptimWrapper
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.torch_core import default_device
from fastcore.script import call_parse, store_true
from torch import nn

from rholoss_fastai.all import noisy_labels

COLUMNS = dict(cola=['source', 'label', 'mark', 'text'], sst2=['text', 'label'])
SMALL_LSTM = dict(emb_sz=128, n_hid=128, n_layers=1) # of 400, 1152 and 3
SMALL_ALBERT = dict(embedding_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=256)
LEARNING_RATE = {('fastai', False): 1e-3, ('fastai', True): 2e-3, ('hf', False): 5e-4, ('hf', True): 2e-5}


def read_sentences(path, data):
    "Sentences and labels of training and dev set, marked by `is_valid`"
    parts = []
    for split in ('train', 'dev'):
        file = Path(path)/f'{data}_{split}.tsv'
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: --path must hold {data}_train.tsv and {data}_dev.tsv.")
        parts.append(pd.read_csv(file, sep='\t', names=COLUMNS[data],
                                 quoting=csv.QUOTE_NONE)[['text', 'label']].assign(is_valid=split == 'dev'))
    return pd.concat(parts, ignore_index=True)


def fastai_learner(sentences, bs, pretrained):
    "Loaders, and a function of them that makes a fastai text classifier"
    block = DataBlock(blocks=(TextBlock.from_df('text', n_workers=0), CategoryBlock(vocab=[0, 1])),
                      get_x=ColReader('text'), get_y=ColReader('label'), splitter=ColSplitter())
    def make(dls, **kwargs):
        config = None if pretrained else {**awd_lstm_clas_config, **SMALL_LSTM}
        return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=pretrained, **kwargs)
    return block.dataloaders(sentences, bs=bs, val_bs=200, num_workers=0),make


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
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer,tokenizer.decoder = pre_tokenizers.BertPreTokenizer(),decoders.WordPiece()
    special = ['<pad>', '[UNK]', '[CLS]', '[SEP]']
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special,
                                                                   show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]',
                                                             special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                   **dict(zip(('pad_token', 'unk_token', 'cls_token', 'sep_token'), special)))


def huggingface_learner(sentences, bs, pretrained, name='albert/albert-base-v2'):
    "Loaders, and a function of them that makes a fastai Learner of a Hugging Face classifier"
    from transformers import AlbertConfig, AlbertForSequenceClassification, AutoTokenizer
    from transformers import AutoModelForSequenceClassification as AutoClassifier
    texts = sentences.text[~sentences.is_valid].tolist()
    tokenizer = AutoTokenizer.from_pretrained(name) if pretrained else word_pieces(texts)
    def collate(items):
        encoded,labels = zip(*items)
        return tokenizer.pad(encoded, return_tensors='pt'),torch.tensor(labels)
    def loader(part, bs, **kwargs):
        encoded = tokenizer(part.text.tolist(), truncation=True, max_length=128)['input_ids']
        return DataLoader([(dict(input_ids=ids), label) for ids,label in zip(encoded, part.label.tolist())], bs=bs,
                          create_batch=collate, **kwargs)
    dls = DataLoaders(loader(sentences[~sentences.is_valid], bs, shuffle=True, drop_last=True),
                      loader(sentences[sentences.is_valid], 200))
    dls.device = default_device()
    def make(dls, **kwargs):
        if pretrained: model = AutoClassifier.from_pretrained(name, num_labels=2)
        else:
            model = AlbertForSequenceClassification(AlbertConfig(vocab_size=len(tokenizer), num_labels=2,
                                                                 pad_token_id=0, **SMALL_ALBERT))
        return Learner(dls, Classifier(model), loss_func=CrossEntropyLossFlat(), **kwargs)
    return dls,make


MODELS = dict(fastai=fastai_learner, hf=huggingface_learner)
METRICS = dict(accuracy=lambda: accuracy, matthews_corrcoef=MatthewsCorrCoef)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder of the data
    data:str='cola', # cola or sst2
    model:str='fastai', # fastai (AWD-LSTM) or hf (ALBERT)
    pretrained:store_true=False, # Download pretrained weights and fine-tune them?
    methods:str='random rho_loss:frac=0.1', # Methods of `compare`, separated by spaces; settings after a colon
    metric:str='accuracy', # accuracy or matthews_corrcoef, CoLA's own
    noise:float=0., # Share of the training labels redrawn; dev stays clean
    bs:int=32, # Items trained on in each step, n_b
    epochs:float=5., # Budget, in epochs of plain training
    budget:str='cost', # What is equal: cost, seconds or steps
    fit:str='fit_one_cycle', # fit_one_cycle, or fit for a constant rate
    lr:float=None, # Learning rate; default by model
    seeds:int=1, # Runs of each method
    folder:str='runs/text', # Folder of the runs; those that are there are not run again
):
    "Compare methods on sentences, of which RHO-LOSS cross-fits its irreducible losses"
    if path is None:
        raise SystemExit('--path is missing: the folder that holds the data, as the first lines of this recipe say.')
    for name,value,known in (('data', data, COLUMNS), ('model', model, MODELS), ('metric', metric, METRICS)):
        if value not in known: raise SystemExit(f"--{name} must be one of {', '.join(known)}; got {value!r}.")
    lr = lr or LEARNING_RATE[model,pretrained]
    dls,new_learner = MODELS[model](read_sentences(path, data), bs, pretrained)
    if noise: dls = noisy_labels(dls, noise)
    def make_learner(dls):
        learn = new_learner(dls, lr=lr, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
                            metrics=METRICS[metric]())
        if pretrained: learn.unfreeze()
        return learn
    compared(folder, make_learner, dls, [read_method(o) for o in methods.split()], n_epoch=epochs, budget=budget,
             fit=fit, seeds=seeds)
