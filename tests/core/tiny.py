"""What the tests of the core have in common: small data, and small models in training."""

import torch

from ddp.config import Config
from ddp.data import Dataset, load_dataset
from ddp.training import Trainer

TINY = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 16, "warmup": 2}


def tiny_trainer(dataset="digits", precision="fp32", **fields):
    """Return a Trainer of a small network; `dataset` is a name or a Dataset."""
    if isinstance(dataset, str):
        dataset = load_dataset(dataset)
    config = Config(dataset=dataset.name, **{**TINY, **fields})
    return Trainer(config, dataset, precision=precision)


def random_points(
    count=64,  # of training items
    classes=0,  # labels, in turn
    event=(2,),
    seed=0,
):
    """Return a Dataset of one's own: standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(count, *event, generator=generator)
    test = torch.randn(16, *event, generator=generator)
    if not classes:
        return Dataset("mine", train, test)
    names = [f"class {i}" for i in range(classes)]
    train_labels = torch.arange(count) % classes
    return Dataset("mine", train, test, train_labels, torch.arange(16) % classes, names)
