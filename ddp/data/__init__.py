"""Datasets by name, and folders of images, as one kind of object: a Dataset."""

import os
from functools import partial
from pathlib import Path

from ddp.data.dataset import Dataset, permutation, to_float, to_pixels
from ddp.data.files import printable
from ddp.data.folder import load_folder
from ddp.data.toy import TOYS, load_toy
from ddp.data.vision import load_cifar10, load_digits, load_mnist

__all__ = ["DATASETS", "Dataset", "load_dataset", "permutation"]
__all__ += ["resolve_name", "to_float", "to_pixels"]

# name -> function(data_dir, seed, progress) -> Dataset; called by keyword, so `**_` takes the rest
DATASETS = {
    "digits": load_digits,
    "mnist": partial(load_mnist, "mnist"),
    "fashion_mnist": partial(load_mnist, "fashion_mnist"),
    "cifar10": load_cifar10,
}
DATASETS |= {name: partial(load_toy, name) for name in TOYS}


def load_dataset(
    name,  # a key of DATASETS, or the path of a folder or .zip of images
    data_dir="data",  # where files are looked for, and downloaded to
    *,
    seed=0,  # of random datasets: those of points
    image_size=None,  # of a folder: (H, W), default the images' own up to 64, else (32, 32)
    channels=None,  # of a folder: 1 or 3, default 1 when every image is gray
    test_fraction=None,  # of a folder without a test split, default 0.1
    progress=None,  # makes a progress bar as tqdm does
):
    """The Dataset of that name or path.

    Raises ValueError for a name that is neither, OSError for data that is missing or damaged."""
    options = {"image_size": image_size, "channels": channels, "test_fraction": test_fraction}
    if name in DATASETS:
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"omit {option}={value}: it is for folders, not dataset={name}")
        data_dir = os.path.expanduser(data_dir)
        return DATASETS[name](data_dir=data_dir, seed=seed, progress=progress)
    path = Path(os.path.expanduser(name))
    if not name or not os.path.exists(path):
        known = ", ".join(DATASETS)
        raise ValueError(
            f"dataset={printable(name)} is neither a known dataset ({known}) nor a folder or .zip "
            "of images that is there"
        )
    return load_folder(path, **options)


def resolve_name(name):
    """A name of DATASETS as it is, the path of a folder or .zip made absolute."""
    path = os.path.expanduser(name or "")
    is_path = name and name not in DATASETS and os.path.exists(path)
    return str(Path(path).resolve()) if is_path else name
