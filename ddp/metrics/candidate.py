"""What an evaluation is about: its options, the candidates, and the real items to compare with."""

import dataclasses
import math
from pathlib import Path

import torch

from ddp.config import Config
from ddp.data import permutation, to_float, to_pixels
from ddp.distributed import in_order
from ddp.io.checkpoint import load_guide, load_model
from ddp.io.device import sampling_dtype
from ddp.io.files import file_digest
from ddp.model import DiffusionModel
from ddp.options import SamplerOptions, check_fields, flag
from ddp.sampling import sample

OLD_OPTIONS = {  # names before 0.2, still accepted
    "vlb_items": "test_items",
    "vlb_samples": "draws",
    "nll_items": "exact_items",
    "dequant_samples": "exact_draws",
}
COUNT = {"at_least": 1, "at_most": 2**32 - 1}  # bounds of options
ITEMS = COUNT | {"at_least": 2}  # an error needs two


@dataclasses.dataclass
class EvaluateOptions:
    """How to measure. What is None is chosen for the data by `resolve`."""

    num_samples: int = flag(2000, "samples to measure, at most as many as real items", **ITEMS)
    reference: str = flag("test", "split of the real items to compare with", str, ("test", "train"))
    vlb_items: int = flag(2000, "test items for the loss and the VLB", **ITEMS)
    vlb_samples: int = flag(None, "noise levels for each (default: 16; points: 64)", int, **COUNT)
    nll_items: int = flag(None, "test items for ODE NLL (default: 128; points: 2000)", int, **ITEMS)
    dequant_samples: int = flag(4, "dequantizations of each image for the ODE NLL", **COUNT)
    seed: int = flag(0, "seed of noise and samples", **COUNT | {"at_least": 0})
    batch_size: int = flag(250, "items at a time", **COUNT)
    inception_weights: str = flag(None, "weights of Inception (default: downloaded)", str)

    def __post_init__(self):
        check_fields(self)

    def resolve(self, dataset, candidates):
        """These options with each number chosen for the data, and at most what there is of it.

        Raises ValueError when there are fewer than two samples or real items."""
        counts = {c.name: len(c.samples) for c in candidates if c.samples is not None}
        counts[f"the {self.reference} split of {dataset.name}"] = len(
            getattr(dataset, self.reference)
        )
        for name, count in counts.items():
            if count < 2:
                raise ValueError(f"{name} holds {count}; at least 2 are needed, for an error")
        is_point = len(dataset.event) == 1
        vlb_samples = self.vlb_samples or (64 if is_point else 16)
        nll_items = self.nll_items or (2000 if is_point else 128)
        likelihood_items = max(2, len(dataset.test))  # with fewer there is no model to measure
        return dataclasses.replace(
            self,
            num_samples=min(self.num_samples, *counts.values()),
            vlb_items=min(self.vlb_items, likelihood_items),
            vlb_samples=vlb_samples + vlb_samples % 2,  # two halves give the Monte Carlo error
            nll_items=min(nll_items, likelihood_items),
        )


@dataclasses.dataclass
class Candidate:
    """What is measured: a model, or somebody's samples."""

    name: str  # in tables and names of files
    about: dict  # where it comes from, plain types, for the JSON
    model: DiffusionModel | None = None  # for likelihoods, in float32; None: samples alone
    sampling_model: DiffusionModel | None = None  # the same for samples, perhaps in bfloat16
    sampler_options: dict | None = None  # keyword arguments of ddp.sampling.sample
    config: Config | None = None  # of the model's training; it names the dataset
    classes: list | None = None  # that the model was trained on, their names
    group: str | None = None  # of trainings to which it belongs
    samples: torch.Tensor | None = None  # (N, *event), uint8 pixels, or floats as the dataset's
    results: dict = dataclasses.field(default_factory=dict)  # metric -> nested dict of Estimates

    def require_fit(self, dataset):
        """Raise ValueError unless the model was trained on such data."""

        def text(data, classes):
            floats = "" if data.units is None else "floats "
            return f"{floats}{data.event} of classes {classes}"

        same_classes = not self.model.num_classes or dataset.classes == self.classes
        same_kind = (dataset.units is None) == (self.model.units is None)
        if dataset.event != self.model.event or not same_classes or not same_kind:
            raise ValueError(
                f"the data, {text(dataset, dataset.classes)}, is not what {self.name} was trained "
                f"on, {text(self.model, self.classes)}"
            )
        if len(dataset.test) < 2:
            raise ValueError(
                f"{dataset.name} has {len(dataset.test)} test items; expected 2 or more"
            )


class Reference:
    """The real items that samples are compared with, the same for every candidate.

    progress: (iterable, desc=) -> the same items, such as tqdm."""

    def __init__(self, dataset, options, device="cpu", progress=None):
        items, labels = dataset.test, dataset.test_labels
        others, other_labels = dataset.train, dataset.train_labels
        if options.reference == "train":
            items, labels, others, other_labels = others, other_labels, items, labels
        self.dataset = dataset  # its test items are those of likelihoods
        self.items, self.labels = fixed_subset(items, labels, options.num_samples)  # (N, *event)
        self.baseline, _ = fixed_subset(others, None, len(self.items))  # as if it were samples
        # of a class-conditional model's samples: as random as those of the baseline, or the counts
        # of classes would be nearer to the real ones than those of any new items
        pool = labels if other_labels is None else other_labels
        self.sample_labels = None if pool is None else fresh_labels(pool, len(self.items))
        self.baseline_matches = len(self.baseline) == len(self.items)  # distances fall with number
        self.device = device  # for networks that measure
        self.progress = progress or (lambda iterable, desc=None: iterable)
        self.spaces = {}  # feature space -> RealFeatures


def fixed_subset(items, labels, count):
    """`count` of the items and their labels, always the same, at random: a folder is sorted."""
    indices = permutation(0, 0, len(items))[:count]  # (count,)
    return items[indices], None if labels is None else labels[indices]


def fresh_labels(labels, count):
    """`count` labels (count,) of a split, always the same, another draw than fixed_subset's.

    Where there are fewer, each is taken once before any is taken again."""
    rounds = range(math.ceil(count / len(labels)))
    indices = torch.cat([permutation(1, k, len(labels)) for k in rounds])[:count]
    return labels[indices]


def checkpoint_candidate(path, name=None, sampling=None, weights="ema", device="cpu"):
    """The Candidate of a checkpoint, named as its file. sampling: a SamplerOptions."""
    sampling = sampling or SamplerOptions()
    device = torch.device(device)
    model, config, state = load_model(path, weights, device)
    dtype = sampling_dtype(sampling.precision, config.precision, device)  # of samples only
    guide = load_guide(sampling.guide_checkpoint, device, dtype)
    options = sampling.resolve(model, guide)  # keyword arguments of sample
    about = {
        "checkpoint": str(Path(path).resolve()),
        "sha256": file_digest(path),
        "step": state["step"],
        "weights": weights,
        **options,
        "guide_checkpoint": sampling.guide_checkpoint,
        "precision": str(dtype).removeprefix("torch."),
        "provenance": state["provenance"],
    }
    del about["guide"]  # a model
    models = (model.for_inference(), model.for_inference(dtype))  # for likelihoods, for samples
    return Candidate(name or Path(path).stem, about, *models, options, config, state["classes"])


def generate_samples(candidate, reference, options):
    """Samples (N, *event) of a candidate's model: as many as real items; with sample_labels."""
    model = candidate.sampling_model

    def draw(indices):  # (B,)
        label = reference.sample_labels[indices].to(model.device) if model.num_classes else None
        x0 = sample(model, indices, options.seed, label, **candidate.sampler_options)
        x0 = to_pixels(x0) if model.is_pixels else x0
        return change_units(x0, model.units, reference.dataset.units).cpu()

    batches = torch.arange(len(reference.items)).split(options.batch_size)
    return torch.cat([*in_order(draw, reference.progress(batches, desc="samples"))])


def measure_test_set(measure, model, reference, options, name, num_items, copies=1):
    """Yield measure(x0 (B, *event), indices (B,), label (B,) or None) of batches of test items.

    The processes share the batches; what it returns lies on the CPU. Raises ValueError when the
    model needs labels, and the test items have none."""
    dataset = reference.dataset
    if model.num_classes and dataset.test_labels is None:
        raise ValueError(f"{name}: the test items of {dataset.name} have no labels for the model")
    items, labels = fixed_subset(dataset.test, dataset.test_labels, num_items)
    size = max(1, options.batch_size // copies)  # the model sees copies of each item at a time

    def measure_batch(indices):
        label = labels[indices].to(model.device) if model.num_classes else None
        x0 = change_units(to_float(items[indices]), dataset.units, model.units)
        return measure(x0.to(model.device), indices, label)

    batches = torch.arange(len(items)).split(size)
    yield from in_order(measure_batch, reference.progress(batches, desc=name))


def change_units(x0, old, new):
    """Return x0 (B, *event), standardized by the Units `old`, as `new` standardize it."""
    if old is new or (torch.equal(old.mean, new.mean) and torch.equal(old.std, new.std)):
        return x0
    return new.standardize(old.restore(x0))


def likelihood_unit(dataset):
    """The unit of likelihoods: bits/dim of pixels, nats of built-in points, else nats/dim."""
    if dataset.is_pixels:
        return "bits/dim"
    return "nats" if dataset.units is None else "nats/dim"


def nats_per_unit(dataset):
    """Nats in the unit of likelihoods."""
    dimensions = math.prod(dataset.event)
    per_unit = {"bits/dim": math.log(2) * dimensions, "nats/dim": float(dimensions), "nats": 1.0}
    return per_unit[likelihood_unit(dataset)]


def log_std(units):
    """The mean over dimensions of log std: what standardizing takes off the entropy, nats/dim."""
    return 0.0 if units is None else units.std.double().log().mean().item()


def nats_of_units(units, dataset):
    """What to add to nats of items that are standardized by other Units than the dataset's."""
    return math.prod(dataset.event) * (log_std(units) - log_std(dataset.units))


def log_density(dataset, num_items):
    """The true log-density (N,) in nats of the test items measured; None where it is unknown."""
    items, _ = fixed_subset(dataset.test, None, num_items)
    return dataset.log_density and dataset.log_density(items)
