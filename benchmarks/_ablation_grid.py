"""What benchmarks/ablation.py trains: datasets and lengths, studies, and the variants of each."""

import dataclasses
from dataclasses import dataclass, field

import _common  # noqa: F401  so that ddp is found
import torch
from torch import nn

from ddp.blocks import Attention, Block
from ddp.config import Config
from ddp.data import permutation
from ddp.reverse import UNet

# dataset -> fields of Config of all its runs: their length, and what is predicted
DATASETS = {
    "digits": {"epochs": 100, "prediction": "x0"},  # the default of versions 0.5 and 0.6
    "mnist": {"max_steps": 1000, "prediction": "x0"},
    "cifar10": {"max_steps": 700},
    "swiss_roll": {"max_steps": 1500},
    "checkerboard": {"max_steps": 1500},
}


POINTS = ("swiss_roll", "checkerboard")  # have no patches, resolutions, labels or pixels


@dataclass(frozen=True)
class Variant:
    """One change of the default; all else stays as it is."""

    name: str
    fields: dict = field(default_factory=dict)  # of Config
    zero_init: bool | None = None  # residual branches and output start at 0; None: as init says
    items: int | None = None  # training items; None: all
    bad_pixels: float = 0.0  # fraction of training items with a quarter of their pixels random
    bad_labels: float = 0.0  # fraction of training items with a random label
    level_groups: int = 0  # parts of a batch, each of neighboring noise levels; 0: parts mix them
    equal_seconds: bool = False  # as many steps as fit into the seconds of the default
    evaluate: tuple = ()  # what else is measured: keys of EVALUATIONS in ablation.py
    seeds: int = 5

    @property
    def is_for_points(self):
        of_images = {"patch_size", "channel_mult", "class_cond"} & {*self.fields}
        return not of_images and not self.bad_pixels and not self.bad_labels


def config_of(
    variant,
    items,  # a data.Dataset
    **fields,  # of Config, of all variants
):
    """Return (the Config of the default, that of a variant): it differs in variant.fields alone.

    What another default would follow from a field stays as the default has it."""
    default = Config(**fields).resolve(items)
    return default, dataclasses.replace(default, **variant.fields)


def of_fields(evaluate=(), seeds=5, **fields):
    """Return a Variant that is named after its fields of Config."""
    name = ",".join(f"{key}={value}" for key, value in fields.items()) or "default"
    return Variant(name, fields, evaluate=evaluate, seeds=seeds)


# With and without each of the four that the project is named for. Dropout is off by default.
FOUR = (
    {},
    {"norm": "none"},
    {"activation": "relu"},
    {"dropout": 0.1},
    {"init": "default"},
)
NORM_RATES = {  # learning rates that are tried for each norm and optimizer
    "muon": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "adamw": (1e-3, 3e-3, 1e-2),
}


def parts():
    """Return the variants of the four parts, each against its alternatives."""
    variants = []
    for fields in FOUR:
        evaluate = ("nfe",) if fields else ("nfe", "statistics", "by_level")
        variants.append(of_fields(evaluate, **fields))
    variants += [of_fields(norm=norm) for norm in ("group", "batch_no_mean")]
    variants += [of_fields(dropout=rate) for rate in (0.05, 0.2)]
    variants += [of_fields(activation="silu")]
    variants += [of_fields(negative_slope=slope) for slope in (0.1, 0.2)]
    for init, zero in (("xavier", False), ("kaiming", True), ("kaiming", False), ("default", True)):
        name = f"init={init},{'zero' if zero else 'nonzero'} branches"
        variants.append(Variant(name, {"init": init}, zero_init=zero))
    for fields in ({"norm": "none"}, {"norm": "group"}, {"activation": "silu"}, {"dropout": 0.1}):
        variant = of_fields(**fields)
        name = f"{variant.name} at equal seconds"
        variants.append(dataclasses.replace(variant, name=name, equal_seconds=True))
    return variants


def rates():
    """Return each norm and optimizer at several learning rates, to be compared at the best."""
    variants = []
    for norm in ("batch", "group", "none"):
        for optimizer, lrs in NORM_RATES.items():
            for lr in lrs:
                if (norm, optimizer, lr) != ("batch", "muon", 1e-3):  # the default
                    variants.append(of_fields(norm=norm, optimizer=optimizer, lr=lr, seeds=3))
    return variants


def crossed(values, make):
    """Return make(fields, value) for each of FOUR and each value."""
    return [make(fields, value) for value in values for fields in FOUR]


def robustness(seeds=3):
    """Return what a user may change or get wrong, with and without each of the four."""

    def with_field(name):
        return lambda fields, value: of_fields(seeds=seeds, **fields, **{name: value})

    def with_fault(fault, **more):
        def make(fields, value):
            variant = of_fields(seeds=seeds, **fields, **more)
            return dataclasses.replace(
                variant, name=f"{variant.name},{fault}={value}", **{fault: value}
            )

        return make

    variants = crossed((1e-5, 1e-4, 1e-3, 1e-2, 3e-2), with_field("lr"))
    variants += crossed((8, 32, 512), with_field("batch_size"))
    variants += crossed((0.1, 0.4), with_fault("bad_pixels"))
    variants += crossed((0.0, 0.1, 0.4), with_fault("bad_labels", class_cond=True))
    return variants


def few_items(seeds=3):
    """Return dropout on few items, where it should matter."""
    variants = []
    for count in (50, 150, 500):
        for rate in (0.0, 0.05, 0.1, 0.2):
            name = f"items={count},dropout={rate}"
            variants.append(Variant(name, {"dropout": rate}, items=count, seeds=seeds))
    return variants


def precision(seeds=3):
    """Return FOUR in float32; the other studies train in what is fast."""
    variants = []
    for fields in FOUR:
        variant = of_fields(seeds=seeds, **fields)
        fields = {**fields, "precision": "fp32"}
        variants.append(dataclasses.replace(variant, name=f"{variant.name},fp32", fields=fields))
    return variants


def levels():
    """Return BatchNorm on groups of neighboring noise levels, and on groups that mix them."""
    variants = []
    for groups in (4, 8):
        name = f"groups={groups}"
        fields = {"shards": groups}
        variants.append(Variant(f"{name} of mixed levels", fields, evaluate=("by_level",)))
        variants.append(
            Variant(
                f"{name} of neighboring levels",
                fields,
                level_groups=groups,
                evaluate=("by_level",),
            )
        )
    return variants


# The network of digits up to version 0.4: patches of one pixel, 32 channels on two resolutions.
NARROW = {"channels_base": 16, "blocks_per_level": 4, "channel_mult": [2, 2], "patch_size": 1}


def quality(seeds=3):
    """Return what the defaults are chosen among."""
    changes = [
        {"prediction": "x0", "weighting": "min_snr"},
        {"prediction": "edm", "weighting": "min_snr"},
        {"prediction": "v", "weighting": "min_snr"},
        {"prediction": "v", "weighting": "v"},
        {"prediction": "x0", "weighting": "v"},
        {"prediction": "eps", "weighting": "snr"},
        {"lr": 2e-3},
        {"noise_copies": 1},
        {"noise_copies": 2},
        {"noise_copies": 4},
        {"noise_copies": 4, "blocks_per_level": 8},
        {"noise_dist": "lognormal"},
        {"ema_decay": 0.995},
        {"lr_schedule": "linear"},
        {"timesteps": 0},
    ]
    old = {**NARROW, "noise_copies": 2}
    for fields in ({}, {"prediction": "v"}, {"prediction": "v", "weighting": "v"}):
        changes.append({**old, **fields})
    return [of_fields(seeds=seeds, **change) for change in changes]


STUDIES = {
    "parts": parts,
    "rates": rates,
    "levels": levels,
    "few_items": few_items,
    "robustness": robustness,
    "precision": precision,
    "quality": quality,
}


class NoMeanBatchNorm(nn.BatchNorm2d):
    """BatchNorm without its mean and its bias (Kadkhodaie et al. 2024): x / std * weight.

    The variance is about the mean, as in theirs. Of images (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bias.requires_grad_(False)

    def forward(self, x):
        if self.training:
            variance = x.float().var(dim=(0, 2, 3), unbiased=False)  # (C,)
            momentum = 0.0 if self.momentum is None else 1 - self.momentum
            with torch.no_grad():
                self.running_var.mul_(momentum).add_(variance, alpha=1 - momentum)
                self.num_batches_tracked += 1
        else:
            variance = self.running_var
        gain = (self.weight * torch.rsqrt(variance + self.eps)).to(x.dtype)
        return x * gain[:, None, None]


class NoMeanBatchNorm1d(nn.BatchNorm1d):
    """The same of points (B, C)."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bias.requires_grad_(False)

    def forward(self, x):
        return NoMeanBatchNorm.forward(self, x[:, :, None, None])[:, :, 0, 0]


def batch_no_mean(channels, dims):
    return NoMeanBatchNorm(channels) if dims == 2 else NoMeanBatchNorm1d(channels)


@torch.no_grad()
def set_branches(network, zero):
    """Let residual branches, FiLM and the output start at 0, or not at 0, whatever init did."""
    for module in network.modules():
        if isinstance(module, Block):
            norm = module.norm2
            last = module.layer2 if isinstance(norm, nn.Identity) else norm
            set_start(last.weight, zero, is_gain=last is norm)
            set_start(module.film.weight, zero)
        elif isinstance(module, Attention):
            set_start(module.proj.weight, zero)
    out = network.conv_out if isinstance(network, UNet) else network.proj_out
    set_start(out.weight, zero)


def set_start(weight, zero, is_gain=False):
    """Set a weight to 0; or one that is 0 to what is common: a gain to 1, a layer by Xavier."""
    if zero:
        nn.init.zeros_(weight)
    elif not weight.any():
        nn.init.ones_(weight) if is_gain else nn.init.xavier_normal_(weight)


def spoil(dataset, variant, seed):
    """Return the dataset with fewer training items, or with faults in some of them."""
    train = dataset.train
    labels = dataset.train_labels
    count = len(train)
    if variant.items:
        chosen = permutation(seed, 1, count)[: variant.items]
        labels = None if labels is None else labels[chosen]
        return dataclasses.replace(dataset, train=train[chosen], train_labels=labels)
    generator = torch.Generator().manual_seed(seed)
    order = permutation(seed, 2, count)
    if variant.bad_pixels:
        chosen = order[: round(variant.bad_pixels * count)]
        items = train[chosen]
        noise = torch.randint(256, items.shape, generator=generator, dtype=torch.uint8)
        where = torch.rand(items.shape, generator=generator) < 0.25
        train = train[:].clone()
        train[chosen] = torch.where(where, noise, items)
    if variant.bad_labels:
        chosen = order[: round(variant.bad_labels * count)]
        labels = labels.clone()
        classes = len(dataset.classes)
        labels[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return dataclasses.replace(dataset, train=train, train_labels=labels)
