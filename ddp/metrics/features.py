"""The spaces in which sets are compared: items -> features (N, D) float64.

Pixels and points need no network. The classifier is a small network, trained when it is first
needed and then kept in a cache. Inception is the network of published FIDs. FEATURES lists them.
"""

import dataclasses
import functools
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ddp.data.dataset import digest, permutation, to_float
from ddp.io.checkpoint import read_archive
from ddp.io.files import atomic_write

VERSION = 1  # raise when classifier training changes: scores compare only within a version
MAX_SIDE = 16  # larger images are averaged down: a covariance needs more items than features
WIDTH = 64  # features of the classifier
EPOCHS = 40  # of its training, which ends after EPOCHS or MAX_STEPS, whichever comes first
MAX_STEPS = 1500
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
CLASSIFIER_ITEMS = 500  # items at a time through the classifier
INCEPTION_ITEMS = 50
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "github.com/toshas/torch-fidelity/releases"


def pixel_features(
    items,  # uint8 (N, C, H, W), or points (N, D)
):
    """Pixels in [0, 1], averaged down to at most 16 a side; points stay as they are."""
    if items.ndim == 2:
        return items.double()
    x = items.float() / 255  # (N, C, H, W)
    height, width = x.shape[-2:]
    x = F.adaptive_avg_pool2d(x, [min(MAX_SIDE, height), min(MAX_SIDE, width)])
    return x.flatten(1).double()  # (N, C * height * width)


class Classifier(nn.Module):
    """A convolutional classifier: float (B, C, H, W) in [-1, 1] -> logits (B, n_outputs).

    Trained on the labels of a dataset or, where it has none, on rotations (rotation_task).
    `accuracy` is the fraction of test items that it gets right."""

    def __init__(
        self,
        event,  # (C, H, W)
        n_outputs,  # classes, or rotations
    ):
        super().__init__()
        channels = event[0]
        side = min(event[1:])
        layers = conv_block(channels, WIDTH // 2, stride=2 if side >= 16 else 1)
        layers += conv_block(WIDTH // 2, WIDTH, stride=1)
        while side >= 8:  # down to 4 to 7 pixels a side
            layers += conv_block(WIDTH, WIDTH, stride=2)
            side = side // 2
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(WIDTH, n_outputs)  # logits
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))

    def pooled(self, x):
        """The last layer but one, averaged over space: (B, WIDTH)."""
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.out(self.pooled(x))

    @torch.no_grad()
    def features_and_probs(
        self,
        items,  # uint8 (N, C, H, W)
    ):
        """Features (N, WIDTH) and class probabilities (N, n_outputs), float64 on the CPU."""
        device = self.out.weight.device
        parts = []
        for part in items.split(CLASSIFIER_ITEMS):
            parts.append(self.pooled(to_float(part).to(device)))  # (n, WIDTH)
        features = torch.cat(parts)  # (N, WIDTH)
        probs = self.out(features).softmax(dim=1)  # (N, n_outputs)
        return features.double().cpu(), probs.double().cpu()

    def features(self, items):
        """Features (N, WIDTH) of uint8 items (N, C, H, W)."""
        return self.features_and_probs(items)[0]

    def class_probs(self, items):
        """Class probabilities (N, n_outputs) of uint8 items (N, C, H, W)."""
        return self.features_and_probs(items)[1]

    @property
    def fingerprint(self):
        """16 hex digits of the weights: two machines with the same ones give the same scores."""
        return digest(self.state_dict().values())


def conv_block(width_in, width_out, stride):
    """Convolution, BatchNorm, LeakyReLU: a list of layers."""
    convolution = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width_out), nn.LeakyReLU(0.1)]


def rotation_task(
    x,  # (B, C, H, W)
    label,  # (B,) or None
):
    """Inputs and targets: the labels or, without labels, the rotation that was applied to x.

    Self-supervised (Gidaris et al. 2018): every item comes in all four rotations, or two where it
    is not square."""
    if label is not None:
        return x, label
    is_square = x.shape[-1] == x.shape[-2]
    quarters = range(0, 4, 1 if is_square else 2)  # quarter turns
    rotated = []
    for k in quarters:
        rotated.append(torch.rot90(x, k, (-2, -1)))
    target = torch.arange(len(quarters)).repeat_interleave(len(x))
    return torch.cat(rotated), target  # (len(quarters) * B, C, H, W), (len(quarters) * B,)


def count_outputs(dataset):
    """How many classes, or rotations, the classifier of a dataset tells apart."""
    if dataset.classes:
        return len(dataset.classes)
    inputs, _ = rotation_task(dataset.train[:1], None)
    return len(inputs)


def classifier_items(dataset):
    """The dataset with only that half of the training items that the classifier is trained on.

    The real-vs-real baseline is made of the other half, which is as new to the classifier as
    samples are."""
    count = len(dataset.train)
    indices = permutation(0, 0, count)[count // 2 :]  # the baseline takes them from the front
    labels = dataset.train_labels
    if labels is not None:
        labels = labels[indices]
    return dataclasses.replace(dataset, train=dataset.train[indices], train_labels=labels)


def train_classifier(dataset, progress, device="cpu"):
    """Train a Classifier from a fixed seed: on one machine always to the same weights."""
    dataset = classifier_items(dataset)
    n_outputs = count_outputs(dataset)
    rotations = n_outputs if dataset.train_labels is None else 1  # inputs made of each item
    steps = min(MAX_STEPS, math.ceil(EPOCHS * len(dataset.train) / BATCH_SIZE))
    with torch.random.fork_rng():  # leave the caller's random numbers alone
        torch.manual_seed(0)
        classifier = Classifier(dataset.event, n_outputs).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in progress(range(steps)):
        x0, label = dataset.batch(0, step, BATCH_SIZE // rotations)
        x0, target = rotation_task(x0, label)  # (B, *event), (B,)
        loss = F.cross_entropy(classifier(x0.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    classifier.eval().requires_grad_(False)
    items, target = rotation_task(dataset.test, dataset.test_labels)
    predicted = classifier.class_probs(items).argmax(dim=1)  # (M,)
    classifier.accuracy.fill_((predicted == target).double().mean())
    return classifier


def cache_path(dataset):
    """Where the classifier of a dataset is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ddp" / f"classifier-{dataset.fingerprint}-{VERSION}.pth"


def load_classifier(path, dataset, device="cpu"):
    """The Classifier in a file. Raises OSError or ValueError unless it is whole and fits."""
    state = read_archive(path)  # checks every CRC, reads tensors and plain types only
    classifier = Classifier(dataset.event, count_outputs(dataset)).to(device)
    try:
        classifier.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds another classifier ({error})") from None
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    return classifier.eval().requires_grad_(False)


def load_or_train_classifier(
    dataset,
    progress,  # a wrapper of iterables, such as tqdm; iter for none
    device="cpu",
):
    """(the dataset's classifier, the file in which it is kept): trained when there is none.

    The file is None where the cache cannot be written, which is not an error."""
    path = cache_path(dataset)
    try:
        return load_classifier(path, dataset, device), path
    except (OSError, ValueError):
        classifier = train_classifier(dataset, progress, device)
    try:
        atomic_write(path, functools.partial(torch.save, classifier.state_dict()))
    except OSError:
        path = None  # it is trained again next time
    return classifier, path


def inception(
    weights=None,  # path of the weights; downloaded when None
    device="cpu",
):
    """The function uint8 items (N, C, H, W) -> features (N, 2048) of which published FIDs are made.

    The network is that of the package torch-fidelity. Raises OSError, saying what is missing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit
        raise OSError(
            f"inception needs the package torch-fidelity, which is not there ({error}); "
            "pip install torch-fidelity"
        ) from None
    try:
        if weights:  # torch-fidelity unpickles; check the file first
            torch.load(weights, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"inception_weights={weights} cannot be read or downloaded ({reason}); "
            f"give the file {INCEPTION_FILE} from {INCEPTION_URL}"
        ) from None
    return functools.partial(inception_features, network.to(device), device)


@torch.no_grad()
def inception_features(
    network,
    device,
    items,  # uint8 (N, C, H, W)
):
    """Inception features (N, 2048), float64 on the CPU."""
    parts = []
    for part in items.split(INCEPTION_ITEMS):
        rgb = part.expand(-1, 3, -1, -1).to(device)  # gray becomes color
        parts.append(network(rgb)[0].cpu())  # (n, 2048)
    return torch.cat(parts).double()


@dataclass(frozen=True)
class Extractor:
    """What a feature space makes of items."""

    features: Callable  # items (N, *event) -> (N, D) float64
    class_probs: Callable | None = None  # items -> (N, classes) float64, where it knows classes
    about: dict = field(default_factory=dict)  # what to report of it, plain types


def classifier_space(dataset, progress=iter, device="cpu", **_):
    """The Extractor of the dataset's classifier."""
    classifier, path = load_or_train_classifier(dataset, progress, device)
    about = {
        "accuracy": classifier.accuracy.item(),
        "fingerprint": classifier.fingerprint,
        "trained_on": "labels" if dataset.classes else "rotations",
        "file": None if path is None else str(path),
    }
    class_probs = classifier.class_probs if dataset.classes else None
    return Extractor(classifier.features, class_probs, about)


def pixel_space(dataset, **_):
    """The Extractor of pixels, or of the coordinates of points."""
    return Extractor(pixel_features)


def inception_space(dataset, device="cpu", inception_weights=None, **_):
    """The Extractor of Inception features."""
    return Extractor(inception(inception_weights, device))


@dataclass(frozen=True)
class Space:
    """A feature space: how its Extractor is built, and the data that it is for."""

    build: Callable  # (dataset, progress=, device=, inception_weights=) -> Extractor
    kind: str  # "image" or "point"
    by_default: bool = True  # used unless metrics are chosen by name


FEATURES = {
    "classifier": Space(classifier_space, "image"),
    "pixels": Space(pixel_space, "image"),
    "inception": Space(inception_space, "image", by_default=False),  # its weights are a download
    "points": Space(pixel_space, "point"),
}
