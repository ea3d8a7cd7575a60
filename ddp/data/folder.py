"""Images from a folder or a .zip, whatever they are, as one uint8 tensor, and as a dataset.

Hidden files and what this project wrote are passed over; damaged images and those above 89 million
pixels are skipped, to no effect on others; what the disk cannot read is an error."""

import itertools
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddp.data.cache import Cache, CacheStore
from ddp.data.dataset import Dataset
from ddp.data.decode import Memory, decode, probe
from ddp.data.files import counted, printable, require_honest
from ddp.data.layout import (
    IMAGE_SUFFIXES,
    TOOL_FILE,
    Layout,
    find_classes,
    find_splits,
    lies_in,
    read_tool_labels,
    written_folders,
)
from ddp.data.listing import open_files
from ddp.data.mapped import Mapped
from ddp.data.splits import choose_splits, split_fields

DARK = 32  # of 255: no pixel of 12-bit data in 16 bits is above an eighth


@dataclass
class Images:  # what was read from a folder or .zip
    items: torch.Tensor | Mapped  # (N, C, H, W) uint8
    labels: torch.Tensor | None  # (N,) int64, -1 for none; None: there are no classes
    classes: list  # names of the class folders
    splits: torch.Tensor | None  # (N,) int64: TRAIN, VAL, TEST, -1 for left out; None: all in one
    summary: list  # lines of text: what was read, and what was not


def load_folder(
    path,  # of a folder or a .zip
    image_size=None,  # (H, W), see read_images
    channels=None,  # 1 or 3
    test_fraction=None,  # where no folder says what is for testing; default 0.1
    cache=None,  # the folder to keep decoded images in; default: beside the data, if they are many
    progress=None,  # makes a progress bar as tqdm does
):
    """A Dataset of images, split by folders `train` and `test`, else at random by a fixed seed."""
    cache = Cache(path, cache, image_size, channels)
    images = read_images(path, image_size, channels, cache=cache, progress=progress)
    count = len(images.items)
    if count < 2:
        raise OSError(f"{path} holds one readable image; at least 2 are needed")
    splits, labels, lines = choose_splits(path, count, images.splits, images.labels, test_fraction)
    classes = [] if labels is None else images.classes
    fields = split_fields(images.items, splits, labels)
    path = Path(path).resolve()
    name = path.stem if path.is_file() else path.name
    dataset = Dataset(name, **fields, classes=classes, summary=images.summary + lines)
    if isinstance(images.items, Mapped):
        dataset.known_fingerprint = cache.fingerprint(dataset, f"test_fraction {test_fraction}")
    return dataset


def read_images(
    path,  # of a folder, a .zip, or one image
    image_size=None,  # (H, W); default: the images' common size up to 64, else (32, 32)
    channels=None,  # 1 or 3; default: 1 when every image is gray
    is_dataset=True,  # find splits and classes, and leave out what is in no split
    cache=None,  # a Cache, which keeps them on the disk where it wants to; default: in memory
    progress=None,  # makes a progress bar as tqdm does
):
    """All images there, in the order of their names, as `Images`.

    Raises OSError when no image, or not the whole of a file, can be read; ValueError when they do
    not fit into memory."""
    path = Path(os.path.expanduser(path))
    if cache and (kept := cache.load()):
        return Images(**kept)
    options = {"image_size": image_size, "channels": channels, "progress": progress}
    with open_files(path) as (files, others), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about pixels that are refused in open_image
        listing = list_images(path, files, others, is_dataset)
        if not cache or not cache.wants(listing.num_bytes(image_size, channels)):
            return decode_images(listing, Memory(), **options)
        with cache.lock(progress):
            kept = cache.load()  # another process may have been first
            if not kept:
                store = CacheStore(cache)
                store.finish(decode_images(listing, store, **options))
                kept = cache.load()
    return Images(**kept)


@dataclass
class Listing:  # which images there are, before any is decoded
    path: Path
    files: object  # name -> File
    names: list  # of the images, sorted
    layout: Layout | None  # None: not a dataset
    others: dict  # name -> why something is no file
    lines: list  # lines of text: what was left out

    @property
    def is_alone(self):
        """Whether the user asked for this very image."""
        return len(self.files) == 1 and list(self.files) == [self.path.name]

    def num_bytes(self, image_size, channels):
        """How many bytes they take when they are decoded, as their headers say."""
        shape = probe(self.files, self.names, self.is_alone).shape(image_size, channels)
        return len(self.names) * math.prod(shape)


def list_images(path, files, others, is_dataset):
    """The Listing of a name -> File; others: name -> why something is no file."""
    names, lines = image_names(files)
    layout = None
    if is_dataset:
        layout, is_kept, more = find_splits(names)
        names = list(itertools.compress(names, is_kept))
        layout = layout.select(is_kept)
        lines += more
    require_honest(path, files, names)
    return Listing(path, files, names, layout, others, lines)


def decode_images(listing, store, image_size, channels, progress):
    """The images of a Listing, as `Images`, whose items are those of the store: see decode."""
    names, path, files = listing.names, listing.path, listing.files
    options = {"is_alone": listing.is_alone, "store": store, "progress": progress}
    shape, done = decode(files, names, image_size, channels, **options)
    seen = done.seen
    skipped = {names[number]: reason for number, reason in done.skipped}
    lines = listing.lines + skip_lines(listing.others | skipped)
    if done.ours:
        lines.append(f"left out {counted(len(done.ours), 'picture')} that ddp wrote")
    if seen.deep and seen.brightest < DARK:
        lines.append(
            f"at most 1/8 of full brightness in {counted(seen.deep, 'image')} of 16 bits, as in "
            "12-bit data; if they are, multiply them by 16 first"
        )
    if not seen.count:
        reasons = "; ".join(lines) or f"it holds no {', '.join(IMAGE_SUFFIXES)}"
        raise OSError(f"{path}: no image could be read: {reasons}")
    summary = [summarize(path, seen, shape)]
    items = store.items()
    if not listing.layout:
        return Images(items, None, [], None, summary + lines)
    is_read = np.ones(len(names), bool)
    is_read[[number for number, _ in done.skipped] + done.ours] = False
    names = list(itertools.compress(names, is_read))
    tool_labels = read_tool_labels(files)
    splits, labels, classes, more = find_classes(
        names, listing.layout.select(is_read), *tool_labels
    )
    return Images(items, labels, classes, splits, summary + more + lines)


def image_names(files):
    """(names of the images among a name -> File, sorted; lines of text on what is none)."""
    names = sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES))
    lines = []
    count = len(files) - len(names)  # of files that are no images
    if ours := written_folders(files, names):
        kept = [name for name in files if not lies_in(name.rpartition("/")[0], ours)]
        names = [name for name in names if not lies_in(name.rpartition("/")[0], ours)]
        count = len(kept) - len(names)
        folders = printable(", ".join(sorted(ours)))
        lines.append(f"left out {counted(len(ours), 'folder')} that ddp wrote: {folders}")
        files = kept
    if count:
        count -= sum(name.rpartition("/")[2] == TOOL_FILE for name in files)
    if count:
        kinds = ", ".join(IMAGE_SUFFIXES)
        lines.append(f"ignored {counted(count, 'file')} other than {kinds}")
    return names, lines


def skip_lines(skipped):
    """Lines of text on what could not be read, name -> why; of many the first five."""
    lines = [f"skipped {printable(name)}: {reason}" for name, reason in skipped.items()]
    if len(lines) > 5:
        lines[5:] = [f"skipped {len(lines) - 5} more that could not be read"]
    return lines


def summarize(path, seen, shape):
    """A line of text: the images' number, sizes and modes, and as what they are used."""
    channels, height, width = shape
    spans = []
    for low, high in zip(seen.low, seen.high, strict=True):
        spans.append(f"{low} to {high}" if low < high else f"{low}")
    line = f"{counted(seen.count, 'image')} in {path}: width {spans[1]}, height {spans[0]}, "
    line += f"modes {', '.join(seen.modes)}; used as {height}x{width}, "
    return line + counted(channels, "channel")
