"""Items that a user or another program gives: arrays in .npy or .npz files, images, masks."""

import numpy as np
import torch

from ddp.data.array_sources import KIND_NAMES
from ddp.data.dataset import to_float
from ddp.data.files import counted
from ddp.data.folder import read_images
from ddp.data.npy import read_array


def to_items(path, array, event, units=None):
    """An array of `path` as uint8 pixels (N, C, H, W), or float32 (N, *event) in units of x0.

    Given Units, it is in those of the data. Raises ValueError when it does not fit."""
    if array is None:
        raise ValueError(f"{path}: expected an .npy or .npz of items of shape {event}")
    if units is not None:
        items = units_to_x0(array, event, units)
    elif array.dtype == np.uint8 and len(event) == 3 and array.ndim > 2:
        pixels = array[..., None] if array.ndim == 3 else array  # (N, H, W, C)
        items = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))
    else:
        with np.errstate(over="ignore"):  # it is refused below
            items = torch.from_numpy(array.astype(np.float32, copy=False))
    if tuple(items.shape[1:]) != tuple(event) or not len(items) or not items.isfinite().all():
        expected = f"finite items of shape {event}, or uint8 images (N, H, W, C)"
        if units is not None:
            shape = (*event[1:], event[0]) if len(event) == 3 else event  # channels last
            expected = f"finite numbers in the data's units, (N, {', '.join(map(str, shape))})"
        raise ValueError(f"{path} holds {array.dtype} {array.shape}; expected {expected}")
    return items


def units_to_x0(array, event, units):
    """An array of items in the units of the data as x0, (N, *event) if it fits.

    Images are (N, H, W[, C]), as are data and samples; sequences (N, C, L), or (N, L) of one
    channel. The other order is understood where no axis could be another."""
    if array.ndim == len(event) and event[0] == 1:
        array = array[:, None]  # of one channel
    last_to_first = np.moveaxis(array, -1, 1) if array.ndim > 2 else array
    either = (last_to_first, array) if len(event) == 3 else (array, last_to_first)
    for items in either:
        if items.shape[1:] == tuple(event):
            break
    with np.errstate(over="ignore"):  # it is refused
        items = torch.from_numpy(np.ascontiguousarray(items).astype(np.float64, copy=False))
    return units.standardize(items) if items.shape[1:] == tuple(event) else items


def read_stored(path, event, names, units=None):
    """Items as to_items gives them, of an array or of images, and lines of text."""
    array = read_array(path, names)
    if array is None and len(event) == 3 and units is None:
        images = read_images(path, event[1:], event[0], is_dataset=False)
        return images.items, images.summary
    items = to_items(path, array, event, units)
    is_float_image = len(event) == 3 and units is None and items.dtype == torch.float32
    if is_float_image and max(items.max(), -items.min()) > 1.01:  # but for rounding
        raise ValueError(f"{path} holds {array.dtype} beyond -1 to 1; pixels to 255 are uint8")
    return items, [f"{counted(len(items), 'item')} in {path}"]


def read_items(path, event, units=None, names=KIND_NAMES):
    """Return x0 (N, *event) and lines of text, from images as read_images takes them or an array.

    An array is uint8 (N, H, W[, C]), or numbers (N, *event) in the units of x0 or, given Units, in
    those of the data. Raises OSError when the file cannot be read, ValueError when it does not
    fit."""
    items, summary = read_stored(path, event, names, units)
    return to_float(items), summary


def read_latents(path, event):
    """Return noise x_T (N, *event) of an .npy or .npz, and lines of text; raises as read_items."""
    x_t = to_float(to_items(path, read_array(path, ("latents", "noise")), event))
    return x_t, [f"{counted(len(x_t), 'item')} in {path}"]


def load_samples(path, event, units=None):
    """Return samples that any program wrote, uint8 (N, C, H, W) or x0, and lines of text.

    units: of the data, which the samples are in, too; None: they are pixels or built-in points."""
    names = (*KIND_NAMES, "samples", "x", "data", "arr_0")  # arr_0: what np.savez calls it
    items, summary = read_stored(path, event, names, units)
    if len(event) == 3 and units is None and items.dtype != torch.uint8:  # of unknown range
        raise ValueError(f"{path} holds {items.dtype}; expected uint8 images (N, H, W[, C])")
    return items, summary


def load_mask(path, event):
    """The part to fill in, bool, (N, *event) or broadcast to it: light, or not zero.

    Of an image, or an array (N, H, W) or (H, W), of sequences (N, C, L), (C, L), (N, L) or (L,), of
    points (N, D) or (D,). Raises ValueError when it does not fit."""
    array = read_array(path)
    is_image = len(event) == 3
    gray = (1, *event[1:]) if len(event) > 1 else tuple(event)  # one channel counts for all
    if array is None and is_image:
        mask = read_items(path, gray)[0] > 0
    elif array is None:
        raise ValueError(f"mask={path}: expected an .npy or .npz for items of {event}")
    else:
        mask = torch.from_numpy(array.astype(bool))
        is_whole = len(event) == 2 and tuple(mask.shape) == tuple(event)  # (C, L)
        if mask.ndim == max(1, len(event) - 1) or is_whole:
            mask = mask[None]  # one mask for all items
        if mask.ndim == len(event) > 1:
            mask = mask[:, None]  # one for all channels
    if tuple(mask.shape[1:]) not in (gray, tuple(event)):
        raise ValueError(f"mask={path}: {tuple(mask.shape)} does not fit items of {event}")
    if not mask.any() or mask.all():
        raise ValueError(
            f"mask={path}: expected some of it light, to fill in, and some dark; what is "
            "transparent counts as white"
        )
    return mask
