"""Datasets by name, and folders of images, as one kind of object: a Dataset."""

from functools import partial
from pathlib import Path

from ddp.data.dataset import Dataset, permutation, to_float, to_pixels
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
        return DATASETS[name](data_dir=data_dir, seed=seed, progress=progress)
    paths = [Path(name)]
    if Path(name).is_absolute():  # as a checkpoint remembers it; it may have moved to data_dir
        paths += [Path(data_dir, Path(name).name), Path(data_dir)]
    for path in paths:
        if path.exists():
            return load_folder(path, **options)
    raise ValueError(
        f"dataset={name} is neither a known dataset ({', '.join(DATASETS)}) nor a folder or "
        ".zip of images; if it has moved, set data_dir to where it is"
    )


def resolve_name(name):
    """A name of DATASETS as it is, the path of a folder or .zip made absolute."""
    is_path = name and name not in DATASETS and Path(name).exists()
    return str(Path(name).resolve()) if is_path else name
