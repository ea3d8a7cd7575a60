"""Items that a user or another program gives: arrays in .npy or .npz files, images, masks."""

import math
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddp.data.dataset import to_float
from ddp.data.files import (
    DamagedError,
    File,
    counted,
    open_archive,
    open_file,
    printable,
    require_honest,
)
from ddp.data.folder import read_images

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000  # of an array, as in NumPy
MAX_DIMS = 8
DESCR = re.compile(r"'descr': *'([<>|=]?[fiub][1248])' *[,}]")
ORDER = re.compile(r"'fortran_order': *(True|False)")
SHAPE = re.compile(r"'shape': *\( *((?:\d{1,18}, *)*(?:\d{1,18} *)?)\)")
CHUNK_BYTES = 1 << 20


def read_array(path, names=()):
    """The NumPy array of numbers in an .npy or .npz file, or None when it has another suffix.

    Of an .npz, the first of `names`, default: of all. Raises OSError when it cannot be read."""
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() not in (".npy", ".npz"):
        return None
    if not path.is_file():
        raise OSError(f"{path} is no file")
    try:
        if path.suffix.lower() == ".npy":
            return parse_array(File(path.stat().st_size, partial(open_file, path)))
        with open_archive(path) as files:
            arrays = [name.removesuffix(".npy") for name in files if name.endswith(".npy")]
            present = [name for name in names or arrays if name in arrays]
            if not present:
                raise DamagedError(f"it holds no {' or '.join(names) or 'array'}")
            member = f"{present[0]}.npy"
            require_honest(path, files, [member])
            return parse_array(files[member])
    except DamagedError as error:
        raise OSError(f"{path} cannot be read as an array of numbers: {error}") from None


def parse_array(file):
    """The array of numbers in a File. Raises DamagedError when it is none, or not whole.

    What its header declares is held against the file's size before memory is taken."""
    with file.open() as stream:
        head = stream.read(8)
        length_bytes = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}.get(head[6:])  # by version
        if head[:6] != MAGIC or not length_bytes:
            raise DamagedError("it is no array that NumPy wrote")
        length = int.from_bytes(stream.read(length_bytes), "little")
        if length > MAX_HEADER_BYTES:
            raise DamagedError(f"its header is of {length:,} bytes")
        header = stream.read(length).decode("latin1")
        found = [pattern.search(header) for pattern in (DESCR, ORDER, SHAPE)]
        if not all(found):
            raise DamagedError(
                "it holds objects" if "O'" in header else f"it holds {printable(header, 100)}"
            )
        dtype = np.dtype(found[0][1])
        shape = tuple(int(n) for n in re.findall(r"\d+", found[2][1]))
        declared = math.prod(shape) * dtype.itemsize  # bytes
        there = file.size - len(head) - length_bytes - length
        if declared > there or len(shape) > MAX_DIMS or max(shape, default=0) > 1 << 40:
            raise DamagedError(f"its header declares {dtype} {shape}, but it has {there:,} bytes")
        array = np.empty(math.prod(shape), dtype)
        fill(memoryview(array).cast("B"), stream)
    return array.reshape(shape, order="F" if found[1][1] == "True" else "C")


def fill(buffer, stream):
    """Fill a memoryview of bytes from a stream, piece by piece. Raises DamagedError at its end."""
    start = 0
    while start < len(buffer):
        count = stream.readinto(buffer[start : start + CHUNK_BYTES])
        if not count:
            raise DamagedError(f"it ends after {start:,} of {len(buffer):,} bytes")
        start += count


def to_items(path, array, event):
    """An array of `path` as uint8 pixels (N, C, H, W), or float32 (N, *event) in units of x0.

    Raises ValueError when it does not fit."""
    if array is None:
        raise ValueError(f"{path}: expected an .npy or .npz of items of shape {event}")
    if array.dtype == np.uint8 and len(event) == 3 and array.ndim > 2:
        pixels = array[..., None] if array.ndim == 3 else array  # (N, H, W, C)
        items = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))
    else:
        with np.errstate(over="ignore"):  # it is refused below
            items = torch.from_numpy(array.astype(np.float32, copy=False))
    if tuple(items.shape[1:]) != tuple(event) or not len(items) or not items.isfinite().all():
        expected = f"finite items of shape {event}, or uint8 images (N, H, W, C)"
        raise ValueError(f"{path} holds {array.dtype} {array.shape}; expected {expected}")
    return items


def read_stored(path, event, names):
    """Items as to_items gives them, of an array or of images, and lines of text."""
    array = read_array(path, names)
    if array is None and len(event) == 3:
        images = read_images(path, event[1:], event[0], is_dataset=False)
        return images.items, images.summary
    items = to_items(path, array, event)
    is_float_image = len(event) == 3 and items.dtype == torch.float32
    if is_float_image and max(items.max(), -items.min()) > 1.01:  # but for rounding
        raise ValueError(f"{path} holds {array.dtype} beyond -1 to 1; pixels to 255 are uint8")
    return items, [f"{counted(len(items), 'item')} in {path}"]


def read_items(path, event, names=("images", "points")):
    """Return x0 (N, *event) and lines of text, from images as read_images takes them or an array.

    An array is uint8 (N, H, W[, C]), or numbers (N, *event) in the units of x0. Raises OSError when
    the file cannot be read, ValueError when it does not fit."""
    items, summary = read_stored(path, event, names)
    return to_float(items), summary


def read_latents(path, event):
    """Return noise x_T (N, *event) of an .npy or .npz, and lines of text; raises as read_items."""
    x_t = to_float(to_items(path, read_array(path, ("latents", "noise")), event))
    return x_t, [f"{counted(len(x_t), 'item')} in {path}"]


def load_samples(path, event):
    """Return samples that any program wrote, uint8 (N, C, H, W) or points, and lines of text."""
    names = ("images", "points", "samples", "arr_0")  # arr_0: what np.savez calls it
    items, summary = read_stored(path, event, names)
    if len(event) == 3 and items.dtype != torch.uint8:  # of unknown range
        raise ValueError(f"{path} holds {items.dtype}; expected uint8 images (N, H, W[, C])")
    return items, summary


def load_mask(path, event):
    """The part to fill in, bool, (N, *event) or broadcast to it: light, or not zero.

    Of an image, or an array (N, H, W), (H, W), (N, D) or (D,); ValueError when it does not fit."""
    array = read_array(path)
    is_image = len(event) == 3
    gray = (1, *event[1:]) if is_image else tuple(event)  # one channel counts for all
    if array is None:
        mask = read_items(path, gray)[0] > 0
    else:
        mask = torch.from_numpy(array.astype(bool))
        if mask.ndim < max(len(event), 2):
            mask = mask[None]  # one mask for all items
        if is_image and mask.ndim == 3:
            mask = mask[:, None]  # (N, 1, H, W)
    if tuple(mask.shape[1:]) not in (gray, tuple(event)):
        raise ValueError(f"mask={path}: {tuple(mask.shape)} does not fit items of {event}")
    if not mask.any() or mask.all():
        raise ValueError(
            f"mask={path}: expected some of it light, to fill in, and some dark; what is "
            "transparent counts as white"
        )
    return mask
