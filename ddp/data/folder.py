"""Images from a folder or a .zip, whatever they are, as one uint8 tensor, and as a dataset.

Hidden files and what this project wrote are passed over; damaged images and those above 89 million
pixels are skipped, to no effect on others; what the disk cannot read is an error."""

import itertools
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from ddp.data.dataset import Dataset, held_out, val_mask
from ddp.data.files import DamagedError, counted, open_files, printable, require_honest
from ddp.data.layout import (
    TEST,
    TOOL_FILE,
    TRAIN,
    VAL,
    find_classes,
    find_splits,
    lies_in,
    read_tool_labels,
    written_folders,
)
from ddp.data.pixels import GRAY_MODES, open_image, read_header, read_pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_NATIVE_SIZE = 64  # images of one common size up to this keep it
DEFAULT_SIZE = (32, 32)  # (H, W)
MAX_FILE_BYTES = 1 << 28  # of one image's file
MAX_BYTES_AT_ONCE = 1 << 30  # of images that are decoded at once, each by a thread
FILES_AT_ONCE = 1000  # that wait for a thread, so that what is decoded does not pile up
BYTES_PER_PIXEL = 8  # while an image is decoded and converted
DARK = 32  # of 255: no pixel of 12-bit data in 16 bits is above an eighth


@dataclass
class Images:  # what was read from a folder or .zip
    items: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor | None  # (N,) int64, -1 for none; None: there are no classes
    classes: list  # names of the class folders
    splits: torch.Tensor | None  # (N,) int64: TRAIN, VAL, TEST, -1 for left out; None: all in one
    summary: list  # lines of text: what was read, and what was not


def load_folder(path, image_size=None, channels=None, test_fraction=None):
    """A Dataset of images, split by folders `train` and `test`, else at random by a fixed seed."""
    images = read_images(path, image_size, channels)
    labels, splits = images.labels, images.splits
    count = len(images.items)
    if count < 2:
        raise OSError(f"{path} holds one readable image; at least 2 are needed")
    if splits is None:
        at_least = 2 if count > 3 else 1  # one item has no spread to compare with
        test_count = min(max(at_least, round((test_fraction or 0.1) * count)), count - 1)
        order = torch.from_numpy(np.random.RandomState(0).permutation(count))
        is_test = held_out(order, test_count, labels)
        if is_test.sum() < at_least:  # nearly every image is of a class of its own
            images.summary.append("the classes are not used: they have too few images for a test")
            images.classes, labels = [], None
            is_test = held_out(order, test_count)
        splits = TEST * is_test.long()  # TRAIN is 0
    elif test_fraction:
        raise ValueError(f"test_fraction={test_fraction}: {path} has a test folder; leave it out")
    if VAL not in splits:
        trained = (splits == TRAIN).nonzero()[:, 0]
        lacks_labels = labels is not None and (labels[splits == TEST] < 0).any().item()
        is_val = val_mask(len(trained), None if labels is None else labels[trained], lacks_labels)
        splits[trained[is_val]] = VAL
    for split, name in ((TRAIN, "training"), (TEST, "test")):
        if split not in splits:
            raise OSError(f"{path} holds no readable {name} image")
    parts = {}
    for split, name in ((TRAIN, "train"), (TEST, "test"), (VAL, "val")):
        is_part = splits == split
        if name == "val" and not is_part.any():
            continue
        parts[name] = images.items[is_part]
        if labels is not None and (labels[is_part] >= 0).all():
            parts[f"{name}_labels"] = labels[is_part]
    path = Path(path).resolve()
    name = path.stem if path.is_file() else path.name
    return Dataset(name, **parts, classes=images.classes, summary=images.summary)


def read_images(
    path,  # of a folder, a .zip, or one image
    image_size=None,  # (H, W); default: the images' common size up to 64, else (32, 32)
    channels=None,  # 1 or 3; default: 1 when every image is gray
    is_dataset=True,  # find splits and classes, and leave out what is in no split
):
    """All images there, in the order of their names, as `Images`.

    Raises OSError when no image, or not the whole of a file, can be read; ValueError when they do
    not fit into memory."""
    path = Path(os.path.expanduser(path))
    with open_files(path) as (files, others), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about pixels that are refused in open_image
        names, lines = image_names(files)
        places = dict.fromkeys(names)
        if is_dataset:
            places, more = find_splits(names)
            lines += more
        require_honest(path, files, places)
        tool_labels = read_tool_labels(files) if is_dataset else None
        is_alone = list(files) == [path.name]  # the user asked for this very image
        headers, skipped, items, more = decode(files, list(places), image_size, channels, is_alone)
    lines += skip_lines(others | skipped) + more
    if not headers:
        reasons = "; ".join(lines) or f"it holds no {', '.join(SUFFIXES)}"
        raise OSError(f"{path}: no image could be read: {reasons}")
    summary = [summarize(path, headers.values(), items.shape[1:])]
    items = torch.from_numpy(items)
    if not is_dataset:
        return Images(items, None, [], None, summary + lines)
    places = {name: places[name] for name in headers}
    splits, labels, classes, more = find_classes(places, *tool_labels)
    return Images(items, labels, classes, splits, summary + more + lines)


def image_names(files):
    """(names of the images among a name -> File, sorted; lines of text on what is none)."""
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    lines = []
    if ours := written_folders(files, names):
        files = [name for name in files if not lies_in(name, ours)]
        names = [name for name in names if not lies_in(name, ours)]
        folders = printable(", ".join(sorted(ours)))
        lines.append(f"left out {counted(len(ours), 'folder')} that ddp wrote: {folders}")
    if ignored := sum(PurePosixPath(name).name != TOOL_FILE for name in files) - len(names):
        kinds = ", ".join(SUFFIXES)
        lines.append(f"ignored {counted(ignored, 'file')} other than {kinds}")
    return names, lines


def skip_lines(skipped):
    """Lines of text on what could not be read, name -> why; of many the first five."""
    lines = [f"skipped {printable(name)}: {reason}" for name, reason in skipped.items()]
    if len(lines) > 5:
        lines[5:] = [f"skipped {len(lines) - 5} more that could not be read"]
    return lines


def decode(files, names, image_size, channels, is_alone):
    """Read sizes first, then pixels into memory of known size.

    Returns name -> Header, name -> why it was not read, items (N, C, H, W), lines of text."""
    skipped = {}
    headers = dict(read_each(read_header, files, names, skipped))
    ours = {name for name, header in headers.items() if header.is_ours and not is_alone}
    headers = {name: header for name, header in headers.items() if name not in ours}
    lines = [f"left out {counted(len(ours), 'picture')} that ddp wrote"] if ours else []
    shape = None
    # a header can promise what the rest does not hold: then the others may want another shape
    while shape != choose_shape(headers.values(), image_size, channels):
        shape = choose_shape(headers.values(), image_size, channels)
        try:
            items = np.empty((len(headers), *shape), np.uint8)  # (N, C, H, W)
        except (MemoryError, ValueError):
            raise ValueError(f"image_size={shape[1:]} needs too much memory; lower it") from None
        readable, deep = {}, []  # deep: the brightest pixel of each image of 16 bits
        largest = max((math.prod(header.size) for header in headers.values()), default=0)
        for name, pixels in read_each(
            partial(read_pixels, shape=shape), files, headers, skipped, largest
        ):
            items[len(readable)] = pixels
            readable[name] = headers[name]
            if headers[name].is_deep:
                deep.append(pixels.max())
        headers = readable
    if deep and max(deep) < DARK:
        lines.append(
            f"at most 1/8 of full brightness in {counted(len(deep), 'image')} of 16 bits, as in "
            "12-bit data; if they are, multiply them by 16 first"
        )
    return headers, skipped, items[: len(headers)], lines


def read_each(function, files, names, skipped, pixels=0):
    """Yield (name, function(image)) in the order of names; `skipped` gets the others' reasons.

    pixels: of the largest image, so that as many are decoded at once as memory allows."""
    largest = max((files[name].size for name in names), default=0) + BYTES_PER_PIXEL * pixels
    workers = min((os.cpu_count() or 1) + 4, 32, max(1, MAX_BYTES_AT_ONCE // max(largest, 1)))
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside of Python's lock
        names = iter(names)
        while part := list(itertools.islice(names, FILES_AT_ONCE)):
            for name, result, reason in pool.map(partial(attempt, function, files), part):
                if reason:
                    skipped[name] = reason
                else:
                    yield name, result


def attempt(function, files, name):
    """(name, function(image), None), or (name, None, why it cannot be read).

    An error of the disk passes through: it says nothing of the image."""
    if files[name].size > MAX_FILE_BYTES:
        return name, None, f"above {MAX_FILE_BYTES:,} bytes"
    try:
        data = files[name].read()
    except DamagedError as error:
        return name, None, str(error)
    try:
        with open_image(data) as image:
            return name, function(image), None
    except MemoryError:
        raise ValueError(f"{printable(name)} takes more memory to decode than there is") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        text = " ".join(str(error).split("<_io")[0].split())  # without the address of a buffer
        return name, None, f"{type(error).__name__} {printable(text, 80)}".strip()


def choose_shape(headers, image_size, channels):
    """(C, H, W) for images of these Headers."""
    if not image_size:
        sizes = {header.size for header in headers}
        common = sizes.pop() if len(sizes) == 1 else DEFAULT_SIZE
        image_size = common if max(common) <= MAX_NATIVE_SIZE else DEFAULT_SIZE
    is_gray = all(header.mode in GRAY_MODES for header in headers)
    return (channels or (1 if is_gray else 3), *image_size)


def summarize(path, headers, shape):
    """A line of text: the images' number, sizes and modes, and as what they are used."""
    channels, height, width = shape
    sizes = np.array([header.size for header in headers])  # (N, 2): height, width
    spans = []
    for low, high in zip(sizes.min(axis=0), sizes.max(axis=0), strict=True):
        spans.append(f"{low} to {high}" if low < high else f"{low}")
    modes = ", ".join(sorted({header.mode for header in headers}))
    line = f"{counted(len(sizes), 'image')} in {path}: width {spans[1]}, height {spans[0]}, "
    return line + f"modes {modes}; used as {height}x{width}, {counted(channels, 'channel')}"
