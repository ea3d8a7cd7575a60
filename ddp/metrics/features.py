"""The spaces in which sets are compared: items -> features (N, D) float64.

Pixels, values and points need no network; filters are a network of fixed random weights, which
needs no training. The classifier is a small one, trained when it is first needed and then kept in a
cache. Inception is the network of published FIDs. FEATURES lists them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from ddp.data.dataset import digest, permutation, to_float
from ddp.data.mapped import subset
from ddp.distributed import main_first, on_main
from ddp.io.checkpoint import read_archive, require_same
from ddp.io.files import atomic_write, cache_folder
from ddp.metrics.distances import prdc
from ddp.metrics.fixed_features import PART, filter_features, pixel_features, value_features
from ddp.metrics.uncertainty import Estimate

VERSION = 2  # raise when classifier training changes: scores compare only within a version
WIDTH = 64  # features of the classifier
EPOCHS = 40  # of its training, or 1500 steps, if these are fewer
BATCH_SIZE = 128
LEAST_ACCURACY = 0.85  # of a classifier whose features mean something
MOST_NOISE = 0.5  # precision of noise by a classifier whose features mean something
PROBES = 500  # items of noise, at most
MAX_HELDOUT = 10_000  # items that a classifier is tested on, at most


class Classifier(nn.Module):
    """A convolutional classifier: float (B, C, H, W) in [-1, 1] -> logits (B, n_outputs).

    Trained on the labels of a dataset or, where it has none, on rotations (rotation_task).
    `accuracy` is the fraction of test items that it gets right."""

    def __init__(self, event, n_outputs):
        super().__init__()
        side = min(event[1:])
        layers = conv_block(event[0], WIDTH // 2, stride=2 if side >= 16 else 1)
        layers += conv_block(WIDTH // 2, WIDTH, stride=1)
        while side >= 8:  # down to 4 to 7 pixels a side
            layers += conv_block(WIDTH, WIDTH, stride=2)
            side //= 2
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(WIDTH, n_outputs)  # logits
        self.register_buffer("accuracy", torch.zeros(()))  # float32: MPS has no float64

    def forward(self, x):
        return self.out(self.body(x).mean(dim=(2, 3)))

    @torch.no_grad()
    def features_and_probs(self, items):
        """Features (N, WIDTH) and class probabilities (N, n_outputs), float64 on the CPU."""
        parts = []
        for part in items.split(PART):  # uint8 (n, C, H, W)
            x = self.body(to_float(part).to(self.out.weight.device))  # (n, WIDTH, h, w)
            parts.append(x.mean(dim=(2, 3)))
        features = torch.cat(parts)  # (N, WIDTH)
        probs = self.out(features).softmax(dim=1)  # (N, n_outputs)
        return features.cpu().double(), probs.cpu().double()

    def features(self, items):
        return self.features_and_probs(items)[0]

    def class_probs(self, items):
        return self.features_and_probs(items)[1]

    @property
    def fingerprint(self):
        """16 hex digits of the weights: two machines with the same ones give the same scores."""
        return digest(self.state_dict().values())


def conv_block(width_in, width_out, stride):
    convolution = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width_out), nn.LeakyReLU(0.1)]


def rotation_task(x, label):
    """Inputs and targets: the labels or, without labels, the rotation that was applied to x.

    Self-supervised (Gidaris et al. 2018): every item comes in all four rotations, or two where it
    is not square."""
    if label is not None:
        return x, label
    quarters = range(0, 4, 1 if x.shape[-1] == x.shape[-2] else 2)  # quarter turns
    target = torch.arange(len(quarters)).repeat_interleave(len(x))
    return torch.cat([torch.rot90(x, k, (-2, -1)) for k in quarters]), target


def count_outputs(dataset):
    """How many classes, or rotations, the classifier of a dataset tells apart."""
    return len(dataset.classes) or len(rotation_task(dataset.train[:1], None)[0])


def train_classifier(dataset, progress, device="cpu"):
    """Train a Classifier from a fixed seed: on one machine always to the same weights.

    It sees half of the training items: the other half, of which the real-vs-real baseline is made,
    is as new to it as samples are."""
    count = len(dataset.train)
    indices = permutation(0, 0, count)[count // 2 :]  # the baseline takes them from the front
    labels = None if dataset.train_labels is None else dataset.train_labels[indices]
    whole = dataset
    dataset = replace(dataset, train=subset(dataset.train, indices), train_labels=labels)
    n_outputs = count_outputs(dataset)
    rotations = n_outputs if labels is None else 1  # inputs made of each item
    steps = min(1500, math.ceil(EPOCHS * len(dataset.train) / BATCH_SIZE))
    with torch.random.fork_rng():  # leave the caller's random numbers alone
        torch.manual_seed(0)
        classifier = Classifier(dataset.event, n_outputs).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in progress(range(steps)):
        x0, target = rotation_task(*dataset.batch(0, step, BATCH_SIZE // rotations))
        loss = F.cross_entropy(classifier(x0.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    classifier.eval().requires_grad_(False)
    items, target = rotation_task(*heldout_items(whole))
    predicted = classifier.class_probs(items).argmax(dim=1)  # (M,)
    classifier.accuracy.fill_((predicted == target).double().mean())
    return classifier


def heldout_items(dataset):
    """(items, labels) on which a classifier is tested: the test split or, where that has no labels
    and the training split has some, the half of that which the classifier does not see."""
    items, labels, count = dataset.test, dataset.test_labels, len(dataset.test)
    if dataset.train_labels is not None and labels is None:
        items, labels, count = dataset.train, dataset.train_labels, len(dataset.train) // 2
    elif count <= MAX_HELDOUT:
        return items[:], labels
    indices = permutation(0, 0, len(items))[: min(count, MAX_HELDOUT)]
    return items[indices], None if labels is None else labels[indices]


def load_or_train_classifier(dataset, progress, device="cpu"):
    """(the dataset's classifier, its cache file): trained when there is none.

    progress wraps an iterable, as tqdm does. The file is None where it cannot be written."""
    try:
        cache = cache_folder()
    except OSError:  # there is no home: nothing is kept
        return train_classifier(dataset, progress, device), None
    path = cache / f"classifier-{dataset.fingerprint}-{VERSION}.pth"
    with torch.device("meta"):  # its shapes, without its random numbers
        classifier = Classifier(dataset.event, count_outputs(dataset))
    try:
        state = read_archive(path)  # checks every CRC, reads tensors and plain types only
        require_same("the classifier", state, classifier.state_dict())
        if not all(weight.isfinite().all() for weight in state.values()):
            raise ValueError("a weight of the classifier is not finite")
        classifier.load_state_dict(state, assign=True)
        return classifier.to(device).eval().requires_grad_(False), path
    except Exception:  # there is none, or whatever damage may be: no file is worth a failure
        classifier = train_classifier(dataset, progress, device)
    try:
        atomic_write(path, lambda temporary: torch.save(classifier.state_dict(), temporary))
    except (OSError, RuntimeError):  # torch's zip writer raises the latter on a full disk
        path = None  # it is trained again next time
    return classifier, path


def inception(weights=None, device="cpu"):
    """The function uint8 items (N, C, H, W) -> features (N, 2048) of which published FIDs are made.

    weights: their path; downloaded when None. Raises OSError, saying what is missing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights:  # torch-fidelity unpickles; check the file first
            torch.load(weights, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048"], weights)
    except Exception as error:  # of the package, of its download, or whatever a bad file raises
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"inception_weights={weights} cannot be used ({reason}); pip install torch-fidelity "
            "and, if it cannot download, give the file weights-inception-2015-12-05-6726825d.pth "
            "from github.com/toshas/torch-fidelity/releases"
        ) from None
    network.to(device)

    @torch.no_grad()
    def features(items):
        parts = []
        for part in items.split(50):
            rgb = part.expand(-1, 3, -1, -1).to(device)  # gray becomes color
            parts.append(network(rgb)[0].cpu())  # (n, 2048)
        return torch.cat(parts).double()

    return features


@dataclass(frozen=True)
class Extractor:
    """What a feature space makes of items."""

    features: Callable  # items (N, *event) -> (N, D) float64
    class_probs: Callable | None = None  # items -> (N, classes) float64, where it knows classes
    about: dict = field(default_factory=dict)  # what to report of it, plain types
    weak: str | None = None  # why its numbers mean little, a line


def classifier_space(dataset, progress=iter, device="cpu", **_):
    def load_or_train():
        classifier, path = load_or_train_classifier(dataset, progress, device)
        return classifier.cpu(), path  # from where it goes to the other processes

    classifier, path = on_main(load_or_train)
    classifier.to(device)
    count = len(rotation_task(*heldout_items(dataset))[1])
    right = torch.arange(count) < round(classifier.accuracy.item() * count)  # as many of them
    accuracy = Estimate.proportion(right)
    about = {
        "accuracy": accuracy.value,
        "accuracy_interval": accuracy.interval,
        "fingerprint": classifier.fingerprint,
        "trained_on": "labels" if dataset.classes else "rotations",
        "file": path and str(path),
    }
    class_probs = classifier.class_probs if dataset.classes else None
    weak = None
    if accuracy.interval[0] < LEAST_ACCURACY:
        weak = (
            f"the classifier has only {accuracy.value:.0%} of {count:,} held-out items right, so "
            "what it takes for real may be mush; look at filters"
        )
    elif (fooled := noise_precision(classifier, dataset.test)) > MOST_NOISE:
        weak = (
            f"the classifier takes {fooled:.0%} of pure noise for real, so what else it takes for "
            "real may be mush; look at filters"
        )
    return Extractor(classifier.features, class_probs, about, weak)


def noise_precision(classifier, items):
    """Precision of noise among real items (N, C, H, W): of their own pixels, shuffled.

    Classes that are easily told apart leave a classifier right, and blind to all else."""
    items = items[:PROBES]
    pixels = items.flatten(2)  # (n, C, H * W)
    order = permutation(0, 0, pixels.shape[2])
    noise = pixels[:, :, order].reshape(items.shape)
    return prdc(classifier.features(noise), classifier.features(items))["precision"]


def pixel_space(dataset, **_):
    return Extractor(pixel_features)


def value_space(dataset, **_):
    return Extractor(value_features)


def filter_space(dataset, **_):
    return Extractor(filter_features)


def inception_space(dataset, device="cpu", inception_weights=None, **_):
    if dataset.event[0] not in (1, 3):
        raise ValueError(f"inception is for images of 1 or 3 channels, not {dataset.event[0]}")
    with main_first():  # which downloads for all
        return Extractor(inception(inception_weights, device))


@dataclass(frozen=True)
class Space:
    """A feature space: how its Extractor is built, and the data that it is for."""

    build: Callable  # (dataset, progress=, device=, inception_weights=) -> Extractor
    kind: str | tuple  # one or more of those that kinds_of gives
    by_default: bool = True  # used unless metrics are chosen by name

    @property
    def kinds(self):
        return (self.kind,) if isinstance(self.kind, str) else self.kind


def kinds_of(dataset):
    """The kinds of data that it is, by which spaces, distances and metrics are chosen."""
    if dataset.is_image:
        return ("image", "pixels" if dataset.is_pixels else "float_image")
    if len(dataset.event) == 2:
        return ("sequence",)
    return ("point", "low_dim" if dataset.event[0] <= 2 else "high_dim")


FEATURES = {
    "classifier": Space(classifier_space, "image"),
    "filters": Space(filter_space, ("image", "sequence")),
    "pixels": Space(pixel_space, "pixels"),
    "values": Space(value_space, ("float_image", "sequence")),
    "inception": Space(inception_space, "pixels", by_default=False),  # its weights are a download
    "points": Space(value_space, "point"),
}
