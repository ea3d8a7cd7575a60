"""What an evaluation is about: its options, the candidates, and the real items to compare with."""

import dataclasses
import hashlib
import math
from pathlib import Path

import torch

from ddp.config import Config
from ddp.data import load_dataset, permutation, to_float, to_pixels
from ddp.data.arrays import load_samples
from ddp.io.checkpoint import load_guide, load_model
from ddp.io.device import sampling_dtype
from ddp.model import DiffusionModel
from ddp.options import SamplerOptions, check_fields, flag
from ddp.sampling import sample

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
        """These options with each number chosen for the data, and at most what there is of it."""
        vlb_samples = self.vlb_samples or (16 if dataset.is_image else 64)
        nll_items = self.nll_items or (128 if dataset.is_image else 2000)
        counts = [len(c.samples) for c in candidates if c.samples is not None]
        counts.append(len(getattr(dataset, self.reference)))  # of the real items
        return dataclasses.replace(
            self,
            num_samples=min(self.num_samples, *counts),
            vlb_items=min(self.vlb_items, len(dataset.test)),
            vlb_samples=vlb_samples + vlb_samples % 2,  # two halves give the Monte Carlo error
            nll_items=min(nll_items, len(dataset.test)),
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
    samples: torch.Tensor | None = None  # (N, *event), uint8 pixels or points
    results: dict = dataclasses.field(default_factory=dict)  # metric -> nested dict of Estimates

    def require_fit(self, dataset):
        """Raise ValueError unless the model was trained on such data."""
        same_classes = not self.model.num_classes or dataset.classes == self.classes
        if dataset.event != self.model.event or not same_classes or len(dataset.test) < 2:
            raise ValueError(
                f"the data, {dataset.event} of classes {dataset.classes}, is not what {self.name} "
                f"was trained on, {self.model.event} of classes {self.classes}, or has too few "
                "test items"
            )


class Reference:
    """The real items that samples are compared with, the same for every candidate.

    progress: (iterable, desc=) -> the same items, such as tqdm."""

    def __init__(self, dataset, options, device="cpu", progress=None):
        items, labels, others = dataset.test, dataset.test_labels, dataset.train
        if options.reference == "train":
            items, labels, others = dataset.train, dataset.train_labels, dataset.test
        self.dataset = dataset  # its test items are those of likelihoods
        self.items, self.labels = fixed_subset(items, labels, options.num_samples)  # (N, *event)
        self.baseline, _ = fixed_subset(others, None, len(self.items))  # as if it were samples
        self.baseline_matches = len(self.baseline) == len(self.items)  # distances fall with number
        self.device = device  # for networks that measure
        self.progress = progress or (lambda iterable, desc=None: iterable)
        self.spaces = {}  # feature space -> RealFeatures


def fixed_subset(items, labels, count):
    """`count` of the items and their labels, always the same, at random: a folder is sorted."""
    indices = permutation(0, 0, len(items))[:count]  # (count,)
    return items[indices], None if labels is None else labels[indices]


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


def distinct_names(paths):
    """A name for each path: the file's, the folder's, or the whole path, whichever differ."""
    stems = [Path(path).stem for path in paths]
    parents = [Path(path).resolve().parent.name for path in paths]
    for names in (stems, parents):
        if len(set(names)) == len(paths):
            return names
    return paths


def load_candidates(paths, checkpoints, dataset_options, sampling, weights, device, progress):
    """(candidates, dataset): what lies at the paths, and the data to compare it with.

    checkpoints: those of the paths that are one; all others are samples. dataset_options: of
    load_dataset, over those of the first checkpoint. sampling: a SamplerOptions."""
    names = dict(zip(paths, distinct_names(paths), strict=True))  # path -> name
    candidates = {}  # path -> Candidate; checkpoints first, since one may name the dataset
    for path in checkpoints:
        candidates[path] = checkpoint_candidate(path, names[path], sampling, weights, device)
    if checkpoints:
        dataset_options = candidates[checkpoints[0]].config.data_options() | dataset_options
    dataset = load_dataset(**dataset_options, progress=progress)
    for path in paths:
        if path in candidates:
            candidates[path].require_fit(dataset)
            continue
        items, summary = load_samples(path, dataset.event)  # .npz, .npy, a folder or a .zip
        about = {"samples": str(Path(path).resolve()), "count": len(items), "summary": summary}
        if Path(path).is_file():
            about["sha256"] = file_digest(path)
        candidates[path] = Candidate(names[path], about, samples=items)
    return [candidates[path] for path in paths], dataset


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def generate_samples(candidate, reference, options):
    """Samples (N, *event) of a candidate's model: as many as real items, and with their labels."""
    model = candidate.sampling_model
    batches = torch.arange(len(reference.items)).split(options.batch_size)  # (B,) each
    parts = []
    for indices in reference.progress(batches, desc="samples"):
        label = reference.labels[indices].to(model.device) if model.num_classes else None
        x0 = sample(model, indices, options.seed, label, **candidate.sampler_options)
        parts.append(to_pixels(x0).cpu())  # uint8, or points as they are
    return torch.cat(parts)


def iterate_test_set(model, reference, options, name, num_items, copies=1):
    """Yield x0 (B, *event), indices (B,) and label (B,) or None of test items, in batches."""
    dataset = reference.dataset
    items, labels = fixed_subset(dataset.test, dataset.test_labels, num_items)
    size = max(1, options.batch_size // copies)  # the model sees copies of each item at a time
    batches = torch.arange(len(items)).split(size)
    for indices in reference.progress(batches, desc=name):
        label = labels[indices].to(model.device) if model.num_classes else None
        yield to_float(items[indices]).to(model.device), indices, label


def nats_per_unit(dataset):
    """Nats in the unit of likelihoods: bits/dim for images (of uint8 data), nats for points."""
    return math.log(2) * math.prod(dataset.event) if dataset.is_image else 1.0


def log_density(dataset, num_items):
    """The true log-density (N,) in nats of the test items measured; None where it is unknown."""
    items, _ = fixed_subset(dataset.test, None, num_items)
    return dataset.log_density and dataset.log_density(items)
