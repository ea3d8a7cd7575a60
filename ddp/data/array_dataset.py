"""Arrays of any kind as a dataset: images, sequences or vectors in .npy, .npz, or a folder of .npy.

uint8 images are pixels. All other numbers are standardized by the moments of the training items,
see Units. What is large stays in its file, and is read when it is used."""

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddp.data.array_sources import find_labels, find_layout, find_sources
from ddp.data.dataset import Dataset
from ddp.data.files import counted, printable
from ddp.data.layout import TRAIN
from ddp.data.mapped import Mapped, slices
from ddp.data.npy import Joined
from ddp.data.splits import choose_splits, split_fields
from ddp.units import Moments

MAX_IN_MEMORY = 1 << 28  # bytes of an array; a larger one stays in its file
CHUNK_BYTES = 1 << 22  # of an array, that are looked through at a time
HASHED_BLOCKS = 64  # of CHUNK_BYTES; of a larger array they are evenly spread
MAX_CLASSES = 1 << 15


def load_arrays(
    path,  # an .npy, an .npz, or a folder of .npy
    labels=None,  # a .npy or .csv of labels in the order of the items; default: those in the file
    channels=None,  # says which axis they are on, where the shape leaves that open
    test_fraction=None,  # of arrays without a test split, default 0.1
    units=None,  # the Units of a model that is there already; default: of the training items
    progress=None,  # makes a progress bar as tqdm does
):
    """A Dataset of arrays.

    Raises ValueError for data that cannot be used, OSError for what is missing or damaged."""
    path = Path(path).absolute()
    sources, lines = find_sources(path)
    rows = Joined([source.array for source in sources])
    layout = find_layout(path, rows, sources[0].name, channels)
    if len(rows) < 2:
        raise ValueError(f"{path} holds {counted(len(rows), 'item')}; at least 2 are needed")
    lines.insert(0, f"{counted(len(rows), 'item')} in {path}: {layout.text}")
    classes, numbers, splits = [], None, None
    if sources[0].split is not None:
        counts = [source.array.shape[0] for source in sources]
        splits = torch.from_numpy(np.repeat([source.split for source in sources], counts))
    if found := find_labels(sources, labels):
        classes, numbers, splits, more = number_labels(path, *found, splits)
        lines += more
    splits, numbers, more = choose_splits(path, len(rows), splits, numbers, test_fraction)
    fields = {"classes": [] if numbers is None else classes, "summary": lines + more}
    fields["known_fingerprint"] = fingerprint(rows, layout, splits, numbers)
    if layout.is_pixels:
        if units:
            raise ValueError(f"{path} holds images of 256 values; the model is of other numbers")
        convert = partial(as_pixels, layout.axis)
    else:
        own = check_numbers(path, rows, layout.axis, (splits == TRAIN).numpy(), progress)
        fields["units"] = units or own
        if len(fields["units"].mean) != layout.event[0]:
            raise ValueError(f"{path} has {layout.event[0]} channels, not {len(units.mean)}")
        convert = partial(as_x0, layout.axis, fields["units"])
    items = Mapped(rows, layout.event, convert)
    items = items[:] if rows.nbytes <= MAX_IN_MEMORY else items
    fields |= split_fields(items, splits, numbers)
    return Dataset(path.name if path.is_dir() else path.stem, **fields)


def number_labels(path, labels, has_label, splits=None):
    """(class names, labels (N,) int64 or None, splits, lines of text) of what find_labels found.

    Classes are those of the training items, in order; -1 is the label of items that have none, and
    the split of those that have another one: they are left out."""
    is_train = has_label if splits is None else (splits == TRAIN).numpy()
    classes, counts = np.unique(labels[is_train], return_counts=True)
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"{path} has {len(classes):,} different labels; expected at most {MAX_CLASSES:,}"
        )
    if len(classes) < 2:
        return [], None, splits, ["no classes: that takes two or more different labels"]
    numbers = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    is_known = has_label & (classes[numbers] == labels)
    is_other = torch.from_numpy(has_label & ~is_known)
    numbers = torch.from_numpy(np.where(is_known, numbers, -1))
    names = [printable(name.decode() if isinstance(name, bytes) else name) for name in classes]
    shown = [f"{name} {count}" for name, count in zip(names[:20], counts[:20], strict=True)]
    lines = [f"{len(names)} classes: {', '.join(shown)}{', ...' * (len(names) > 20)}"]
    if is_other.any():
        splits = torch.where(is_other, -1, splits)
        lines.append(f"left out {counted(int(is_other.sum()), 'item')} of no class in training")
    return names, numbers, splits, lines


# ---- rows of an array as items ----


def channels_first(axis, rows):
    """Rows of an array with the channels on the second axis; axis: where they are, or None."""
    return rows[:, None] if axis is None else np.moveaxis(rows, axis, 1)


def as_pixels(axis, rows):
    """Rows of an array as images (B, C, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(channels_first(axis, rows)))


def as_numbers(axis, rows):
    """Rows of an array as (B, C, ...), in float32 where that has all their digits, or float64."""
    is_narrow = rows.dtype.itemsize <= 2 or rows.dtype == np.float32
    dtype = np.float32 if is_narrow else np.float64
    return np.ascontiguousarray(channels_first(axis, rows), dtype)


def as_x0(axis, units, rows):
    """Rows of an array as standardized items (B, C, ...) float32."""
    return units.standardize(torch.from_numpy(as_numbers(axis, rows)))


def check_numbers(path, rows, axis, is_train, progress=None):
    """The Units of the training items of an array (N, ...); is_train: (N,) bool.

    Raises ValueError when an item, of whichever split, is not finite."""
    moments = Moments()
    chunks = list(slices(rows, CHUNK_BYTES))
    if progress is not None:
        chunks = progress(chunks, desc="checking", unit="part", leave=False, delay=2)
    for chunk in chunks:
        items = as_numbers(axis, rows[chunk])
        is_finite = np.isfinite(items).reshape(len(items), -1).all(axis=1)
        if not is_finite.all():
            number = chunk.start + int(is_finite.argmin())
            raise ValueError(f"item {number:,} of {path} has NaN or infinity; leave such items out")
        moments.add(items[is_train[chunk]])
    return moments.units()


# ---- the fingerprint ----


def fingerprint(rows, layout, splits, labels=None):
    """16 hex digits that tell these items, in their splits, from any others.

    Of an array of up to CHUNK_BYTES * HASHED_BLOCKS all bytes count. Of a larger one count as many,
    in evenly spread blocks, and the size and the time of the last change of each file."""
    sha = hashlib.sha256(repr((rows.dtype.str, rows.shape, layout.event, layout.axis)).encode())
    sha.update(splits.numpy())
    if labels is not None:
        sha.update(labels.numpy())
    chunks = list(slices(rows, CHUNK_BYTES))
    if rows.nbytes > CHUNK_BYTES * HASHED_BLOCKS:
        places = np.linspace(0, len(chunks) - 1, HASHED_BLOCKS).round().astype(int)
        chunks = [chunks[k] for k in places]
        for path in dict.fromkeys(array.path for array in rows.arrays):
            status = os.stat(path)
            sha.update(repr((status.st_size, status.st_mtime_ns)).encode())
    for chunk in chunks:
        sha.update(np.ascontiguousarray(rows[chunk]))
    return sha.hexdigest()[:16]
