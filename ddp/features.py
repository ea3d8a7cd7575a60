"""The spaces in which sample sets are compared: items -> features, (N, D) float.

`pixels` and the plane itself need nothing; a judge is a small classifier, trained when it is first
needed and remembered; `inception` is the network of published Frechet distances.
"""

import dataclasses
import hashlib
import math
import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ddp.checkpoint import read_archive, replace
from ddp.data import order, to_float

LARGEST_SIDE = 16  # larger pictures are averaged down: a covariance needs more items than features
WIDTH = 64  # features of a judge
EPOCHS, STEPS, BATCH, LEARNING_RATE = 40, 1500, 128, 2e-3  # of its training; whichever ends first
RECIPE = 1  # of a judge; another one gives other figures
WEIGHTS_URL = "github.com/toshas/torch-fidelity/releases"


def pixel_features(items):
    """uint8 (N, C, H, W) -> float64 (N, D) in [0, 1], averaged down to at most 16 pixels a side;
    points stay as they are."""
    if items.ndim == 2:
        return items.double()
    x = items.float() / 255
    side = [min(LARGEST_SIDE, s) for s in x.shape[-2:]]
    return F.adaptive_avg_pool2d(x, side).flatten(1).double()


class Judge(nn.Module):
    """A convolutional classifier of pictures: float (B, C, H, W) in [-1, 1] -> logits (B, classes).

    Trained on the labels of a dataset or, where it has none, on how far each picture was turned
    (Gidaris et al. 2018). `accuracy` is its share of test items right; `fingerprint`, 16 hex
    digits of its weights, tells whether two machines judge alike."""

    def __init__(self, event, classes):
        super().__init__()
        channels, side, layers = event[0], min(event[1:]), []
        layers += self.layer(channels, WIDTH // 2, 2 if side >= 16 else 1)
        layers += self.layer(WIDTH // 2, WIDTH, 1)
        while side >= 8:
            layers, side = [*layers, *self.layer(WIDTH, WIDTH, 2)], side // 2
        self.body, self.out = nn.Sequential(*layers), nn.Linear(WIDTH, classes)
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))

    @staticmethod
    def layer(width_in, width, stride):
        convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(width), nn.LeakyReLU(0.1)

    def features(self, x):
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.out(self.features(x))

    @torch.no_grad()
    def of(self, items):
        """uint8 items (N, C, H, W) -> features (N, D) and class probabilities (N, classes)."""
        parts = [
            self.features(to_float(part).to(self.out.weight.device)) for part in items.split(500)
        ]
        features = torch.cat(parts)
        return features.double().cpu(), self.out(features).softmax(dim=1).double().cpu()

    @property
    def fingerprint(self):
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


def questions(x, label):
    """What a judge is asked: the items and labels, or, without labels, the items turned by every
    quarter (every half, when they are not square), and which it was."""
    if label is not None:
        return x, label
    quarters = range(0, 4, 1 if x.shape[-1] == x.shape[-2] else 2)
    which = torch.arange(len(quarters)).repeat_interleave(len(x))
    return torch.cat([torch.rot90(x, k, (-2, -1)) for k in quarters]), which


def answers(dataset):
    """How many answers a judge chooses from."""
    return len(dataset.classes) or len(questions(dataset.train[:1], None)[0])


def train_judge(dataset, progress, device="cpu"):
    """A Judge from a fixed seed: the same whenever a machine trains it. It sees but half of the
    training items, so that the other half, of which floors are made, is as new to it as samples."""
    seen = order(0, 0, len(dataset.train))[len(dataset.train) // 2 :]
    labels = None if dataset.train_labels is None else dataset.train_labels[seen]
    dataset = dataclasses.replace(dataset, train=dataset.train[seen], train_labels=labels)
    turns = answers(dataset) if labels is None else 1
    steps = min(STEPS, math.ceil(EPOCHS * len(dataset.train) / BATCH))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge(dataset.event, answers(dataset)).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in progress(range(steps)):
        x0, label = questions(*dataset.batch(0, step, BATCH // turns))
        loss = F.cross_entropy(judge(x0.to(device)), label.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    judge.eval().requires_grad_(False)
    items, label = questions(dataset.test, dataset.test_labels)
    judge.accuracy.fill_((judge.of(items)[1].argmax(dim=1) == label).double().mean())
    return judge


def judge_of(dataset, progress, device="cpu"):
    """(the dataset's Judge, where it is remembered): trained when there is none that is whole."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ddp")
    path = home / f"judge-{dataset.fingerprint}-{RECIPE}.pth"
    try:
        state = read_archive(path)
        judge = Judge(dataset.event, len(state["out.bias"])).to(device)
        judge.load_state_dict(state)
        whole = all(tensor.isfinite().all() for tensor in state.values())
        if whole and len(judge.out.bias) == answers(dataset):
            return judge.eval().requires_grad_(False), path
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError):
        pass
    judge = train_judge(dataset, progress, device)
    try:
        replace(path, lambda temporary: torch.save(judge.state_dict(), temporary))
    except OSError:
        path = None  # a machine that keeps nothing judges none the worse
    return judge, path


def inception(weights=None, device="cpu"):
    """The function of uint8 items -> features (N, 2048) of the network that published Frechet
    distances use, as the package torch-fidelity has it. weights: a file, else downloaded.

    Raises OSError, saying what is missing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit
        raise OSError(
            f"inception needs the package torch-fidelity, which is not there ({error}); "
            "pip install torch-fidelity"
        ) from None
    try:
        if weights:
            torch.load(weights, map_location="cpu", weights_only=True)  # it looks for no harm
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"the weights of inception, {weights or 'a download'}, cannot be had ({reason}); "
            f"give --inception_weights the file weights-inception-2015-12-05-6726825d.pth from "
            f"{WEIGHTS_URL}"
        ) from None
    network.to(device)

    @torch.no_grad()
    def features(items):
        parts = [network(p.expand(-1, 3, -1, -1).to(device))[0].cpu() for p in items.split(50)]
        return torch.cat(parts).double()

    return features
