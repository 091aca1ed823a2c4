"How many labels are wrong, and which: against labels that were made wrong on purpose"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize, ToTensor, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.text.core import BaseTokenizer
from fastai.text.data import TextDataLoaders
from fastai.vision.core import PILImage
from helpers import draws
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torch.utils.data import TensorDataset

from rholoss_fastai import learnable
from rholoss_fastai.label_noise import LabelNoise, label_noise, row_names
from rholoss_fastai.learnable import share_of_wrong_labels
from rholoss_fastai.loaders import restrict_rows
from rholoss_fastai.noise import redraw_labels
from rholoss_fastai.probe import probe_predictions

quiet = dict(progress=False, verbose=False)

def calibrated(n, n_classes, sharpness, seed=0):
    "Logits, and classes that are drawn by them"
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness*torch.randn(n, n_classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:,0]

def blobs(n=600, n_classes=3, spread=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, n_classes, (n,), generator=generator)
    return torch.randn(n, 6, generator=generator) + spread*torch.randn(n_classes, 6, generator=generator)[y], y

def make_dls(x, y, bs=50):
    return DataLoaders(*(DataLoader(TensorDataset(x, y), bs=bs, shuffle=s) for s in (True, False)), device='cpu')

# ---- how many

def test_the_estimate_takes_one_thread(monkeypatch):
    "Of BLAS: a second would wait for the first as busily as it works, and processor seconds are billed"
    threads,minimize = [],learnable.minimize
    def counted(*args, **kwargs):
        threads.append({o['num_threads'] for o in threadpool_info() if o['user_api'] == 'blas'})
        return minimize(*args, **kwargs)
    monkeypatch.setattr(learnable, 'minimize', counted)
    with threadpool_limits(2, 'blas'): share_of_wrong_labels(*calibrated(500, 3, 3.))
    assert threads and all(o == {1} for o in threads)

@pytest.mark.parametrize('n_classes', [2, 3, 10])
@pytest.mark.parametrize('redrawn', [0., 0.05, 0.2, 0.4])
def test_the_share_is_found(n_classes, redrawn):
    logits,truth = calibrated(10_000, n_classes, 4)
    labels,wrong = redraw_labels(truth, redrawn, n_classes=n_classes, seed=1)
    share,low,high = share_of_wrong_labels(logits, labels)
    assert abs(share - wrong.float().mean()) < 0.025
    assert low - 0.005 <= wrong.float().mean() <= high + 0.005 and low <= share <= high

@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says():
    "95 % of the draws, or near"
    hits, n = 0, draws(30)
    for seed in range(n):
        logits,truth = calibrated(2000, 5, 3, seed)
        labels,wrong = redraw_labels(truth, 0.2, n_classes=5, seed=seed)
        _,low,high = share_of_wrong_labels(logits, labels)
        hits += low <= wrong.float().mean() <= high
    assert hits >= 0.83*n

def test_predictions_that_know_nothing_say_so_by_the_interval():
    generator = torch.Generator().manual_seed(0)
    share,low,high = share_of_wrong_labels(torch.randn(2000, 5, generator=generator),
                                           torch.randint(0, 5, (2000,), generator=generator))
    assert high - low > 0.3

def test_the_likelihood_is_highest_at_the_estimate():
    "A grid of all three numbers finds none better, and the gradient is that of the likelihood"
    from scipy.optimize import check_grad

    from rholoss_fastai.learnable import _Agreement
    logits,truth = calibrated(3000, 4, 3)
    labels,_ = redraw_labels(truth, 0.2, n_classes=4, seed=1)
    top = logits.topk(2, 1).values
    agreement = _Agreement(top[:,0] - top[:,1], logits.argmax(1) == labels, 4)
    params,loss = agreement.best()
    grid = [agreement._loss((a, b, s))[0] for a in np.linspace(0.3, 8, 24) for b in np.linspace(-3, 3, 24)
            for s in np.linspace(0, 0.6, 31)]
    assert loss <= min(grid) + 1e-3
    start = np.array([1., 0.3, 0.1])
    assert check_grad(lambda p: agreement._loss(p)[0], lambda p: agreement._loss(p)[1],
                      start) < 1e-2*np.abs(agreement._loss(start)[1]).max()

# ---- which

def test_suspects_are_wrong():
    x,y = blobs()
    labels,wrong = redraw_labels(y, 0.2, seed=1)
    noise = label_noise(make_dls(x, labels), **quiet)
    assert noise.low <= wrong.float().mean() <= noise.high
    assert wrong[noise.table.row].float().mean() > 0.85 and len(noise.table) == len(noise)
    assert noise.table.p_label.is_monotonic_increasing and noise.table.row.is_unique
    assert (noise.table.label == labels[noise.table.row].numpy()).all()

def test_of_a_learner_and_of_predictions_at_hand():
    x,y = blobs()
    learn = Learner(make_dls(x, y), nn.Linear(6, 3), loss_func=CrossEntropyLossFlat())
    one = label_noise(learn, **quiet)
    other = label_noise(learn, predictions=probe_predictions(learn, **quiet))
    pd.testing.assert_frame_equal(one.table, other.table)
    assert (one.share, one.low, one.high) == (other.share, other.low, other.high)

def test_a_quick_look_at_some_rows():
    x,y = blobs(2000)
    labels,wrong = redraw_labels(y, 0.2, seed=1)
    noise = label_noise(make_dls(x, labels), n_rows=500, folds=5, **quiet)
    assert len(noise.predictions) == 500 and abs(noise.share - wrong.float().mean()) < 0.1
    assert set(noise.table.row) <= set(noise.predictions.rows.tolist())

def test_rows_of_a_restricted_loader_keep_their_numbers():
    x,y = blobs()
    labels,wrong = redraw_labels(y, 0.2, seed=1)
    dls,rows = make_dls(x, labels),torch.arange(300, 600)
    noise = label_noise(dls, restrict_rows(dls.train, rows), **quiet)
    assert noise.table.row.min() >= 300 and wrong[noise.table.row].float().mean() > 0.8

@pytest.fixture(scope='module')
def image_dls(tmp_path_factory):
    "Images in folders: red and blue, with some noise; two of each stand in the wrong folder"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i in range(80):
        colour = i % 2
        label = ('red', 'blue')[1 - colour if i < 4 else colour]
        (path/label).mkdir(exist_ok=True)
        pixels = rng.integers(0, 100, (16, 16, 3))
        pixels[...,2*colour] += 120
        PILImage.create(pixels.astype(np.uint8)).save(path/label/f'{i:03d}.png')
    files = sorted(path.rglob('*.png'), key=lambda f: f.name)
    dsets = Datasets(files, [[PILImage.create], [parent_label, Categorize()]], splits=(list(range(80)), list(range(8))))
    return dsets.dataloaders(bs=16, num_workers=0, after_item=[ToTensor()], device='cpu')

def test_files_names_and_pictures(image_dls):
    noise = label_noise(image_dls, **quiet)
    table = noise.suspects(4)
    assert set(table.row) == {0, 1, 2, 3} and [f.name for f in table.file] == [f'{i:03d}.png' for i in table.row]
    assert all(f.parent.name == label != predicted for f,label,
               predicted in zip(table.file, table.label, table.predicted))
    axs = noise.show(4, ncols=3)
    titles = [ax.get_title() for ax in axs.flat]
    assert axs.shape == (2, 3) and titles[0] == f'{table.label[0]} → {table.predicted[0]}' and titles[4:] == ['', '']
    np.testing.assert_array_equal(axs.flat[0].images[0].get_array(), np.asarray(PILImage.create(table.file[0])))

def test_texts_by_index_and_text():
    frame = pd.DataFrame(dict(text=['good fine great']*40 + ['bad poor awful']*40, label=['pos']*40 + ['neg']*40),
                         index=range(100, 180))
    frame.loc[[103, 150], 'label'] = ['neg', 'pos']
    dls = TextDataLoaders.from_df(frame, valid_pct=0.1, seed=0, text_col='text', label_col='label',
                                  tok_tfm=BaseTokenizer(), bs=16,
                                   num_workers=0)
    noise = label_noise(dls, **quiet)
    wrong = [i for i in (103, 150) if i in set(dls.train_ds.items.index)]
    table = noise.suspects(len(wrong))
    assert sorted(table['index']) == wrong and all('good' in t or 'bad' in t for t in table.text)
    assert noise.show(2).equals(noise.suspects(2)) # no pictures: the table

def test_rows_without_a_name():
    x,y = blobs(20)
    assert row_names(DataLoader(TensorDataset(x, y), bs=4), [3]) == {}

def test_images_that_are_tensors():
    images = torch.rand(60, 1, 8, 8)
    y = torch.arange(60) % 2
    images[y == 1,:,:4] += 2
    noise = label_noise(make_dls(images, y), **quiet)
    assert len(noise.show(5).flat[0].images) == 1

# ---- in words

def test_words():
    x,y = blobs()
    labels,_ = redraw_labels(y, 0.2, seed=1)
    noise = label_noise(make_dls(x, labels), **quiet)
    text = str(noise)
    assert f'{noise.share:.1%} of 600 labels' in text and "features 'columns'" in text and 'by chance' in text
    assert 'too little' not in text
    assert text in noise._repr_html_() and '<table' in noise._repr_html_()

def test_it_says_where_features_tell_too_little():
    x,y = blobs(200)
    noise = label_noise(make_dls(x, y), features=torch.randn(200, 3, generator=torch.Generator().manual_seed(0)),
                        **quiet)
    assert 'tell too little' in str(noise)

# ---- what can't be done

def test_numbers_are_no_labels():
    x,_ = blobs()
    learn = Learner(make_dls(x, x[:,0]), nn.Linear(6, 1), loss_func=MSELossFlat())
    with pytest.raises(ValueError, match='targets are numbers.*one class'): label_noise(learn, **quiet)

def test_one_class():
    x,_ = blobs(50)
    with pytest.raises(ValueError, match='All 50 targets are alike'):
        label_noise(make_dls(x, torch.zeros(50, dtype=torch.long)), **quiet)

def test_no_learner():
    with pytest.raises(TypeError, match='learn must be a Learner or DataLoaders'): label_noise(torch.rand(3), **quiet)

def test_features_that_need_a_trained_model():
    x,y = torch.rand(40, 3, 80, 80),torch.arange(40) % 2
    with pytest.raises(ValueError, match='No features are at hand'): label_noise(make_dls(x, y, bs=8), **quiet)

def test_too_few_suspects_asked_for():
    x,y = blobs(60)
    noise = label_noise(make_dls(x, y), **quiet)
    with pytest.raises(ValueError, match='n'): noise.suspects(0)
    assert len(noise.suspects(1000)) == 60
    assert isinstance(noise, LabelNoise)
