"""Datasets by name, folders of images, and arrays, as one kind of object: a Dataset."""

import os
from functools import partial
from pathlib import Path

from ddp.data.array_dataset import load_arrays
from ddp.data.array_sources import is_array_path
from ddp.data.dataset import Dataset, permutation, to_data, to_float, to_pixels
from ddp.data.files import printable
from ddp.data.folder import load_folder
from ddp.data.toy import TOYS, load_toy
from ddp.data.vision import load_cifar10, load_digits, load_mnist
from ddp.io.spelling import did_you_mean

__all__ = ["DATASETS", "Dataset", "load_dataset", "permutation"]
__all__ += ["resolve_name", "to_data", "to_float", "to_pixels"]

# name -> function(data_dir, seed, progress) -> Dataset; called by keyword, so `**_` takes the rest
DATASETS = {
    "digits": load_digits,
    "mnist": partial(load_mnist, "mnist"),
    "fashion_mnist": partial(load_mnist, "fashion_mnist"),
    "cifar10": load_cifar10,
}
DATASETS |= {name: partial(load_toy, name) for name in TOYS}


def load_dataset(
    name,  # a key of DATASETS, or a path: of images, a folder or .zip; of arrays, see load_arrays
    data_dir="data",  # where files are looked for, and downloaded to
    *,
    seed=0,  # of random datasets: those of points
    image_size=None,  # of a folder: (H, W), default the images' own up to 64, else (32, 32)
    channels=None,  # of images: 1 or 3, default 1 when every one is gray; of an array: any number
    test_fraction=None,  # of a path without a test split, default 0.1
    labels=None,  # of arrays: the path of a .npy or .csv
    cache=None,  # of a folder or .zip of images: the folder to keep them in, decoded, on disk
    units=None,  # of arrays: the Units of a model that is there already
    progress=None,  # makes a progress bar as tqdm does
):
    """The Dataset of that name or path.

    Raises ValueError for a name that is neither, OSError for data that is missing or damaged."""
    options = {"image_size": image_size, "channels": channels, "test_fraction": test_fraction}
    options |= {"labels": labels, "cache": cache}
    if name in DATASETS:
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"omit {option}={value}: it is for paths, not dataset={name}")
        data_dir = os.path.expanduser(data_dir)
        return DATASETS[name](data_dir=data_dir, seed=seed, progress=progress)
    path = Path(os.path.expanduser(name))
    if not name or not os.path.exists(path):
        known = ", ".join(DATASETS)
        raise ValueError(
            f"dataset={printable(name)} is neither a known dataset ({known}) nor a folder, .zip, "
            f".npy or .npz that is there{did_you_mean(name, DATASETS)}"
        )
    if is_array_path(path):
        refuse(name, "an array", image_size=image_size, cache=cache)
        options = {"labels": labels, "channels": channels, "test_fraction": test_fraction}
        return load_arrays(path, **options, units=units, progress=progress)
    refuse(name, "images", labels=labels, units=units)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels}: expected 1, gray, or 3, color, of images")
    del options["labels"]
    return load_folder(path, **options, progress=progress)


def refuse(name, kind, **options):
    """Raise ValueError when an option is given that is not for this kind of data."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"omit {option}={value}: {name} is {kind}")


def resolve_name(name):
    """A name of DATASETS as it is, a path made absolute."""
    path = os.path.expanduser(name or "")
    is_path = name and name not in DATASETS and os.path.exists(path)
    return str(Path(path).resolve()) if is_path else name
