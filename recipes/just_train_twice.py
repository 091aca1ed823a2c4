"""Groups on which a model does badly: plain training (ERM), Just Train Twice and Group DRO side by side.

python recipes/just_train_twice.py --path <folder> --seeds 0,1,2 --out runs/framed
python recipes/just_train_twice.py --preset waterbirds --path <folder> --out runs/waterbirds

Without a preset, two classes of the CIFAR-10 in the folder, in a coloured frame that agrees with the class in most
training rows and in half of the others. With one, a folder with a metadata file: a row an image or a text, with the
class, the columns whose crossing is its group, and the split (0 or train, 1 or val, 2 or test). Any other data set:
--metadata and the names of its columns. Images begin from a pretrained ResNet, texts from BERT (needs pip install
transformers); with --no_pretrained, a ResNet or a small AWD-LSTM begins from scratch. Each run reports the epoch whose
worst group was best on the validation rows; one that was killed starts anew. What --path must hold, by preset:

waterbirds: the folder waterbird_complete95_forest2water2 (linked to by github.com/kohpangwei/group_DRO), which has
metadata.csv and the images
celeba: list_attr_celeba.csv and list_eval_partition.csv, as Kaggle and WILDS have them, and the folder
img_align_celeba, or one of that name in it
multinli: metadata_random.csv of github.com/kohpangwei/group_DRO, and multinli_1.0_train.jsonl, _dev_matched.jsonl and
_dev_mismatched.jsonl of MultiNLI 1.0
civilcomments: all_data_with_identities.csv of WILDS; the groups are by identity_any, whether any identity is named, not
WILDS's 16, which overlap

The authors of Just Train Twice trained BERT's first model by SGD; here it is trained as the second is, by AdamW with a
learning rate that falls to 0.
"""
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from cifar10_data import ImageRows, image_loader, read_images
from cifar10_rho_loss import ARCHITECTURES
from common import Evaluations, accept_underscores, best, last_five, machine, print_table, read_run, steps_to, write_run
from fastai.callback.schedule import ParamScheduler, SchedLin
from fastai.callback.training import GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.external import URLs, untar_data
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, ColSplitter, Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.torch_core import default_device, set_seed
from fastai.vision import models
from fastai.vision.augment import Flip, RandomResizedCrop
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from fastcore.script import call_parse, store_true
from text_rho_loss import SMALL_LSTM, Classifier

from rholoss_fastai.all import GroupDRO, just_train_twice, row_groups, tune_just_train_twice, weighted_loaders
from rholoss_fastai.just_train_twice import misclassified
from rholoss_fastai.side_models import score_rows

METHODS = ('erm', 'jtt', 'group_dro')
COLOURS = torch.tensor([[220, 40, 40], [40, 80, 220]], dtype=torch.uint8)
WIDTH = 3 # pixels of the frame

BERT,SEPARATOR = 'bert-base-uncased',' xxsep '
LR_BERT,LR_LSTM = 2e-5,1e-3
SPLITS = dict(train=0, val=1, valid=1, test=2)

# published, by paper or github.com/anniesch/jtt: epochs, T (epochs_id), lambda_up, learning rate, weight decay, batch
# size; of BERT also word pieces
PRESETS = dict(
    waterbirds=dict(metadata='metadata.csv', file='img_filename', target='y', group='y,place', split='split',
                    epochs=300, epochs_id='60', upweight='100', lr=1e-5, wd=1., bs=64),
    celeba=dict(metadata='list_attr_celeba.csv', file='image_id', folder='img_align_celeba', target='Blond_Hair',
                group='Blond_Hair,Male', split='partition', epochs=50, epochs_id='1', upweight='50', lr=1e-5,
                wd=0.1, bs=128),
    multinli=dict(metadata='metadata_random.csv', text='sentence1,sentence2', target='gold_label',
                  group='gold_label,sentence2_has_negation', split='split', epochs=5, epochs_id='2', upweight='4',
                  lr=2e-5, wd=0., bs=32, max_length=128),
    civilcomments=dict(metadata='all_data_with_identities.csv', text='comment_text', target='toxicity',
                       group='toxicity,identity_any', split='split', epochs=3, epochs_id='2', upweight='6', lr=1e-5,
                       wd=0.01, bs=16, max_length=300))


def frame(images, colours):
    "A copy of uint8 images `(n,3,h,w)` in frames of `colours`, `(n,)`"
    res = COLOURS[colours][:,:,None,None].expand_as(images).clone()
    inside = slice(WIDTH, -WIDTH)
    res[:,:,inside,inside] = images[:,:,inside,inside]
    return res


def framed(images, targets, files, agree, seed):
    "Images in frames that agree with their class, 0 or 1, in the share `agree` of each class; and the group of each"
    agrees,generator = torch.zeros(len(targets), dtype=torch.bool),torch.Generator().manual_seed(seed)
    for c in (0, 1):
        rows = (targets == c).nonzero().flatten()
        agrees[rows[torch.randperm(len(rows), generator=generator)[:round(agree*len(rows))]]] = True
    return ImageRows(frame(images, torch.where(agrees, targets, 1-targets)), targets,
                     files), [f"{c}, {'own' if a else 'other'} frame"
                            for c,a in zip(targets.tolist(), agrees.tolist())]


def framed_cifar(path, classes, rows, agree, bs, lr, wd, arch, seed, device):
    "Loaders of training and validation rows, one of test rows, their groups, and a function that makes a Learner"
    def of_classes(folder):
        images,targets,files = read_images(path/folder)
        names = sorted({f.parts[-2] for f in files})
        missing = set(classes) - set(names)
        if missing or len(classes) != 2:
            raise SystemExit(f"--classes must be two of {', '.join(names)}; got {','.join(classes)}.")
        keep = torch.isin(targets, torch.tensor([names.index(o) for o in classes])).nonzero().flatten()
        return images[keep],(targets[keep] == names.index(classes[1])).long(),[files[i] for i in keep.tolist()]
    images,targets,files = of_classes('train')
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    parts = dict(train=order[len(order)//6:][:rows or None].sort().values, valid=order[:len(order)//6].sort().values)
    data = {name: framed(images[o], targets[o], [files[i] for i in o.tolist()], agree if name == 'train' else 0.5, seed)
            for name,o in parts.items()}
    data['test'] = framed(*of_classes('test'), 0.5, seed)
    train,valid,test = (image_loader(data[o][0], bs if o == 'train' else 500, shuffle=o == 'train',
                                     augment=o == 'train', device=device) for o in data)
    def make_learner(dls):
        model = ARCHITECTURES[arch](n_classes=2).to(memory_format=torch.channels_last)
        return Learner(dls, model, loss_func=CrossEntropyLossFlat(), lr=lr, wd=wd,
                       opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    return DataLoaders(train, valid).to(device), test, {name: groups for name,(_,groups) in data.items()}, make_learner


def existing(file):
    if not file.exists():
        raise SystemExit(f"{file} is missing: --path must hold it, or --metadata name another metadata file.")
    return file


def with_partition(path, table):
    "CelebA's attributes with the split, which has a file of its own"
    return table.merge(pd.read_csv(existing(path/'list_eval_partition.csv')), on='image_id', validate='1:1')


def with_sentences(path, table):
    """Group DRO's metadata of MultiNLI with the sentences, which have files of their own

    By its `dataset_scripts/generate_multinli.py`, the first column numbers the rows of the three files one after the
    other; rows whose label is '-' are left out, but counted."""
    files = [existing(path/f'multinli_1.0_{o}.jsonl') for o in ('train', 'dev_matched', 'dev_mismatched')]
    columns = ['gold_label', 'sentence1', 'sentence2']
    rows = pd.concat([pd.read_json(o, lines=True, dtype=False)[columns] for o in files],
                     ignore_index=True).reindex(table.iloc[:,0])
    labels = rows.gold_label.map(dict(contradiction=0, entailment=1, neutral=2)).to_numpy()
    if not (labels == table.gold_label.to_numpy()).all():
        raise SystemExit(f"The labels in {', '.join(map(str, files))} are not those of the metadata file.")
    return table.assign(**{o: rows[o].to_numpy() for o in columns[1:]})


JOINS = dict(celeba=with_partition, multinli=with_sentences)


def read_table(path, options):
    "The metadata: columns `file` or `text`, `target`, `group` and `split` (0, 1, 2)"
    path,kind = Path(path),'text' if options.text else 'file'
    file = existing(path/options.metadata)
    table = pd.read_csv(file)
    columns = dict(group=options.group.split(','), item=(options.text or options.file).split(','),
                   target=[options.target], split=[options.split])
    def missing(): return [o for names in columns.values() for o in names if o not in table.columns]
    if missing() and options.preset in JOINS: table = JOINS[options.preset](path, table)
    if missing():
        raise SystemExit(f"{file} has no column {', '.join(missing())}; it has {', '.join(map(str, table.columns))}. "
                         "Name its columns by --target, --group, --split and --file or --text.")
    def plain(o): return ((o >= 0.5) if o.dtype.kind == 'f' and o.nunique() > 2 else o).astype(str) # WILDS: shares
    res = pd.DataFrame(dict(target=plain(table[options.target]),
                            split=[int(SPLITS.get(o, o)) for o in table[options.split]]))
    res['group'] = pd.concat([plain(table[o]) for o in columns['group']], axis=1).agg(', '.join, axis=1)
    items = table[columns['item']].fillna('').astype(str)
    if options.text: res[kind] = items.agg(SEPARATOR.join, axis=1)
    else:
        names,folder = items[columns['item'][0]].tolist(),path/options.folder
        # as Kaggle packs CelebA
        if not (folder/names[0]).exists() and (folder/folder.name/names[0]).exists(): folder = folder/folder.name
        res[kind] = [str(folder/o) for o in names]
    return res.sort_values('split', kind='stable', ignore_index=True)


def bert_data(seen, test, paired, max_length, bs, lr, wd, device):
    "Loaders of texts, one of test texts, and a function that makes a Learner of BERT, fine-tuned as in Group DRO"
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as e:
        raise SystemExit(f"Texts begin from {BERT} ({e}): pip install transformers, or choose --no_pretrained.") from e
    tokenizer = AutoTokenizer.from_pretrained(BERT)
    numbers = {o: i for i,o in enumerate(sorted(set(seen.target)))}
    def collate(items):
        texts,labels = zip(*items)
        encoded = tokenizer(*map(list, zip(*texts)), truncation=True, max_length=max_length, padding=True,
                            return_token_type_ids=True, return_tensors='pt')
        return dict(encoded),torch.tensor(labels)
    def loader(part, bs, **kwargs):
        texts = [tuple(o.split(SEPARATOR, 1)) if paired else (o,) for o in part.text]
        return DataLoader(list(zip(texts, part.target.map(numbers))), bs=bs, create_batch=collate,
                          device=device, **kwargs)
    def make_learner(dls):
        model = Classifier(AutoModelForSequenceClassification.from_pretrained(BERT, num_labels=len(numbers)))
        # fastai's Adam, not torch's: it spares biases and layer norms
        return Learner(dls, model, loss_func=CrossEntropyLossFlat(), lr=lr, wd=wd,
                       opt_func=partial(Adam, sqr_mom=0.999, eps=1e-8),
                       cbs=[GradientClip(1.), ParamScheduler(dict(lr=SchedLin(lr, 0.)))])
    dls = DataLoaders(loader(seen[~seen.is_valid], bs, shuffle=True, drop_last=True), loader(seen[seen.is_valid], 4*bs),
                      device=device)
    return dls, loader(test, 4*bs), make_learner


def table_data(path, options, bs, lr, wd, arch, size, pretrained, device):
    "As `framed_cifar`, for images or texts of a metadata file"
    table = read_table(path, options)
    seen,test = table[table.split < 2],table[table.split == 2]
    seen = seen.assign(is_valid=seen.split == 1).reset_index(drop=True)
    groups = dict(train=seen.group[~seen.is_valid].tolist(), valid=seen.group[seen.is_valid].tolist(),
                  test=test.group.tolist())
    if options.text and pretrained:
        dls,test,make_learner = bert_data(seen, test, ',' in options.text, options.max_length, bs, lr, wd, device)
        return dls, test, groups, make_learner
    common = dict(get_y=ColReader('target'), splitter=ColSplitter())
    if options.text:
        block = DataBlock((TextBlock.from_df('text', n_workers=0), CategoryBlock), get_x=ColReader('text'), **common)
        def make_learner(dls):
            return text_classifier_learner(dls, AWD_LSTM, config={**awd_lstm_clas_config, **SMALL_LSTM},
                                           pretrained=False, metrics=[], lr=lr, wd=wd,
                                           opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
                                           loss_func=CrossEntropyLossFlat())
    else:
        block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'),
                          item_tfms=RandomResizedCrop(size, min_scale=0.7),
                          batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)], **common)
        def make_learner(dls):
            # the published weight decay is an L2 penalty on all parameters
            learn = vision_learner(dls, getattr(models, arch), pretrained=pretrained, normalize=False, metrics=[],
                                   lr=lr, wd=wd, wd_bn_bias=True, opt_func=partial(SGD, mom=0.9, decouple_wd=False),
                                   loss_func=CrossEntropyLossFlat())
            learn.unfreeze()
            return learn
    dls = block.dataloaders(seen, bs=bs, num_workers=0 if options.text else None, device=device)
    return dls, dls.test_dl(test, with_labels=True), groups, make_learner


class GroupEvaluations(Evaluations):
    "After each epoch, the accuracy of each group of validation and test rows; `seconds` count from `started`"
    def __init__(self, test, valid, groups, started):
        super().__init__(test)
        self.started,self.by_group = started,[]
        self.parts = {name: (dl, row_groups(dl, groups[name])) for name,dl in dict(valid=valid, test=test).items()}

    def before_fit(self):
        self.spent = self._clock() - self.started

    def evaluate(self):
        right = {name: 1 - score_rows(self.learn, dl, misclassified).cpu() for name,(dl,_) in self.parts.items()}
        self.by_group.append({name: {g: round(right[name][known.codes == i].mean().item(), 4)
                                     for i,g in enumerate(known.names)}
                              for name,(_,known) in self.parts.items()})
        self.history.append([self.step, self.epoch, round(right['test'].mean().item(), 5), round(self.spent, 3), 0,
                             self.items])


def chosen(by_group):
    "The epoch whose worst group is best on the validation rows"
    return int(np.argmax([min(o['valid'].values()) for o in by_group]))


def check_settings(stored, settings, what):
    "End with an error where `stored`, what is in `what` already, was made with other settings"
    differ = [k for k,v in settings.items() if stored.get(k) != v]
    if differ: raise SystemExit(f"{what} with other settings ({', '.join(differ)}): choose another --out.")


def table_of(runs):
    "A row a method: means over seeds"
    table = []
    for method in dict.fromkeys(s['method'] for _,s in runs):
        own = [s for _,s in runs if s['method'] == method]
        worst = [s['worst_group'] for s in own]
        table.append(dict(method=method, seeds=len(own), worst_group=round(np.mean(worst), 4), lowest=min(worst),
                          highest=max(worst), accuracy=round(np.mean([s['accuracy'] for s in own]), 4),
                          seconds=round(np.mean([s['seconds'] for s in own]), 1)))
    return table


def plot(runs, path):
    "The worst group's accuracy after each epoch, a line a method: the mean over seeds, and their range"
    fig,ax = plt.subplots(figsize=(6, 3.6), layout='constrained')
    for method in dict.fromkeys(s['method'] for _,s in runs):
        worst = np.array([[min(o['test'].values()) for o in s['by_group']] for _,s in runs if s['method'] == method])
        epochs = np.arange(1, worst.shape[1]+1)
        line, = ax.plot(epochs, worst.mean(0), label=method)
        ax.fill_between(epochs, worst.min(0), worst.max(0), alpha=0.2, color=line.get_color(), lw=0)
    ax.set(xlabel='epoch', ylabel="worst group's test accuracy")
    ax.legend()
    ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


accept_underscores()


@call_parse
def main(
    path:str=None, # Folder of the data; default: fastai's URLs.CIFAR
    preset:str=None, # waterbirds, celeba, multinli or civilcomments: names of columns and published settings
    methods:str='erm,jtt,group_dro', # Of erm, jtt, group_dro
    seeds:str='0', # Seeds of weights and batches
    epochs:int=None, # Epochs; default 8, or the preset's
    epochs_id:str=None, # T: epochs of the first model. Several: tuned, with `upweight`. Default 1, or the preset's
    upweight:str=None, # Lambda_up, one or several. Default 20, or the preset's
    by:str='sampling', # Upweight by sampling or by loss
    eta:float=0.01, # Group DRO's step size
    adjustment:float=0., # Group DRO's generalisation adjustment
    bs:int=None, # Batch size; default 64, or the preset's
    lr:float=None, # Learning rate, constant but for BERT's; default 1e-3, BERT's 2e-5, or the preset's
    wd:float=None, # Weight decay; default 0.01, or the preset's
    arch:str=None, # Framed CIFAR-10: small_cnn or resnet18; other images: a torchvision ResNet, default resnet50
    classes:str='automobile,truck', # Framed CIFAR-10's two classes
    rows:int=0, # Framed CIFAR-10: use so many training rows; 0: all but a sixth, which validates
    agree:float=0.95, # Framed CIFAR-10: share of the training rows in which class and frame agree
    data_seed:int=0, # Framed CIFAR-10: seed of the frames and the split
    metadata:str=None, # Other data: file in `path`
    file:str=None, # Its column of image files
    folder:str=None, # Folder of these in `path`
    text:str=None, # Its column of texts, or several to join, in place of images
    target:str=None, # Its column of classes
    group:str=None, # Its column of groups, or several to cross
    split:str=None, # Its column of splits
    max_length:int=None, # Word pieces of a text that BERT reads; default 128, or the preset's
    size:int=224, # Height and width of images of a metadata file
    no_pretrained:store_true=False, # Begin without pretrained weights?
    out:str='runs/just_train_twice', # A folder for each run, comparison.json and comparison.png
):
    "Train with each method and seed, and compare their worst groups"
    methods,seeds,pretrained = methods.split(','),[int(o) for o in seeds.split(',')],not no_pretrained
    if not set(methods) <= set(METHODS):
        raise SystemExit(f"--methods must be of {', '.join(METHODS)}; got {','.join(methods)}.")
    if preset is not None and preset not in PRESETS:
        raise SystemExit(f"--preset must be one of {', '.join(PRESETS)}; got {preset}.")
    defaults = dict(dict(epochs=8, epochs_id='1', upweight='20', bs=64, lr=1e-3, wd=0.01, folder='', text=None,
                         split='split', file=None, max_length=128, arch='resnet50' if preset or metadata
                         else 'small_cnn'), **PRESETS.get(preset, {}))
    given = dict(epochs=epochs, epochs_id=epochs_id, upweight=upweight, bs=bs, lr=lr, wd=wd, arch=arch,
                 metadata=metadata, file=file, folder=folder, text=text, target=target, group=group, split=split,
                 max_length=max_length)
    options = SimpleNamespace(preset=preset, **{k: defaults.get(k) if v is None else v for k,v in given.items()})
    if options.text and lr is None: options.lr = PRESETS.get(preset, {}).get('lr', LR_BERT) if pretrained else LR_LSTM
    if options.metadata and not (options.target and options.group and (options.file or options.text)):
        raise SystemExit("--metadata also needs --target, --group, and --file or --text: the names of its columns.")
    settings = dict(vars(options), by=by, eta=eta, adjustment=adjustment, classes=classes, rows=rows, agree=agree,
                    data_seed=data_seed, size=size, pretrained=pretrained)
    device,out,path = default_device(),Path(out),Path(path or untar_data(URLs.CIFAR))
    of_learner = dict(bs=options.bs, lr=options.lr, wd=options.wd, arch=options.arch, device=device)
    if options.metadata:
        dls,test,groups,make_learner = table_data(path, options, size=size, pretrained=pretrained, **of_learner)
    else:
        dls,test,groups,make_learner = framed_cifar(path, classes.split(','), rows, agree, seed=data_seed, **of_learner)
    known = row_groups(dls.train, groups['train'])
    times,weights = [int(o) for o in options.epochs_id.split(',')],[float(o) for o in options.upweight.split(',')]

    out.mkdir(parents=True, exist_ok=True)
    tuned = None
    if 'jtt' in methods and len(times)*len(weights) > 1:
        if (out/'tuned.csv').exists():
            stored = json.loads((out/'tuned.json').read_text()) if (out/'tuned.json').exists() else {}
            check_settings(stored, settings, f"{out/'tuned.csv'} is of a search")
        else:
            (out/'tuned.json').write_text(json.dumps(settings) + '\n')
            tune_just_train_twice(make_learner, dls, groups['valid'], times, options.epochs, weights, by=by,
                                  seed=seeds[0]).to_csv(out/'tuned.csv', index=False)
        tuned = pd.read_csv(out/'tuned.csv').to_dict('records')
        times,weights = [tuned[0]['n_epoch_id']],[tuned[0]['upweight']]

    runs = []
    for method,seed in [(m, s) for m in methods for s in seeds]:
        run = out/f'{method}-{seed}'
        if (run/'summary.json').exists():
            runs.append(read_run(run))
            check_settings(runs[-1][1], settings, f"{run} holds a run")
            continue
        evaluated = GroupEvaluations(test, dls.valid, groups, time.perf_counter())
        if method == 'jtt':
            learn = just_train_twice(make_learner, dls, times[0], options.epochs, weights[0], by=by, cbs=evaluated,
                                     seed=seed, progress=False)
        else:
            set_seed(seed)
            learn = make_learner(dls if method == 'erm'
                                 else weighted_loaders(dls, 1/known.codes.bincount()[known.codes]))
            with learn.no_logging(), learn.no_bar():
                learn.fit(options.epochs, cbs=[evaluated] + ([GroupDRO(groups['train'], eta, adjustment)]
                                                             if method == 'group_dro' else []))
        history,epoch = evaluated.history,chosen(evaluated.by_group)
        summary = dict(settings, method=method, seed=seed, best=best(history),
                       steps_to_best=steps_to(history, best(history))[0], last_five=last_five(history), epoch=epoch,
                       accuracy=history[epoch][2], worst_group=min(evaluated.by_group[epoch]['test'].values()),
                       seconds=history[-1][3], items_trained=history[-1][5], by_group=evaluated.by_group, **machine())
        if method == 'jtt':
            counts = known.codes[learn.error_set].bincount(minlength=len(known.names))
            summary['error_set'] = dict(n_epoch_id=times[0], upweight=weights[0], rows=len(learn.error_set),
                                        groups=dict(zip(known.names, counts.tolist())))
        write_run(run, history, summary)
        runs.append((history, summary))
        print(f"{method}, seed {seed}: worst group {summary['worst_group']:.4f}, accuracy {summary['accuracy']:.4f}, "
              f"{summary['seconds']:.0f} s; {summary.get('error_set', '')}", flush=True)

    table = table_of(runs)
    print_table(list(table[0]), [list(row.values()) for row in table])
    result = dict(table=table, settings=dict(settings, rows=len(known.codes), seeds=len(seeds), epochs_id=times[0],
                                             upweight=weights[0]),
                  machine=machine(), tuned=tuned,
                  worst_group={f"{s['method']}-{s['seed']}": [min(o['test'].values()) for o in s['by_group']]
                               for _,s in runs},
                  error_sets={s['seed']: s['error_set'] for _,s in runs if s['method'] == 'jtt'})
    (out/'comparison.json').write_text(json.dumps(result) + '\n')
    plot(runs, out/'comparison.png')
    print(f"Written to {out}")
