"""Items that a user or another program gives: arrays in .npy or .npz files, images, masks."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ddp.data.dataset import to_float, to_pixels
from ddp.data.folder import read_images

READ_ERRORS = (ValueError, EOFError, IndexError, OSError, NotImplementedError)  # of np.load
READ_ERRORS += (MemoryError, zipfile.BadZipFile, zlib.error)
ITEM_NAMES = ("images", "points")  # of the array in an .npz that holds several
SAMPLE_NAMES = (*ITEM_NAMES, "samples", "arr_0")  # arr_0: what np.savez calls it
LATENT_NAMES = ("latents", "noise")
MAX_X0 = 1.01  # of a float image: -1 to 1, but for rounding


def read_array(
    path,  # of a file
    names=(),  # of the array to take from an .npz, the first that is there; default: any
):
    """The NumPy array of numbers in an .npy or .npz file, or None when it has another suffix.

    Raises OSError when it cannot be read, or holds anything but numbers."""
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        return None
    try:
        array = np.load(path)  # no pickles
        if not isinstance(array, np.ndarray):  # an .npz
            with array as arrays:
                array = pick_array(arrays, names)
        if array.dtype.kind not in "fiub":  # float, int, uint, bool
            raise ValueError(f"it holds {array.dtype}")
        return array
    except READ_ERRORS as error:
        reason = "it holds objects" if "pickle" in str(error) else error
        raise OSError(f"{path} cannot be read as an array of numbers: {reason}") from None


def pick_array(arrays, names):
    """The first array of an opened .npz whose name is in `names`."""
    for name in names or arrays.files:
        if name in arrays.files:
            return arrays[name]
    raise ValueError(f"it holds no {' or '.join(names) or 'array'}")


def to_items(path, array, event):
    """An array of `path` as x0 (N, *event) float32. Raises ValueError when it does not fit."""
    if array is None:
        raise ValueError(f"{path}: expected an .npy or .npz of items of shape {event}")
    if array.dtype == np.uint8 and len(event) == 3 and array.ndim > 2:
        pixels = array[..., None] if array.ndim == 3 else array  # (N, H, W, C)
        x0 = to_float(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()))
    else:
        x0 = torch.from_numpy(array.astype(np.float32))
    if tuple(x0.shape[1:]) != tuple(event) or not len(x0) or not x0.isfinite().all():
        raise ValueError(
            f"{path} holds {array.dtype} {array.shape}; expected finite items of shape {event}, or "
            "uint8 images (N, H, W, C)"
        )
    return x0


def read_items(
    path,  # of an image, a folder or .zip of images, an .npy or an .npz
    event,  # the shape of one item
    names=ITEM_NAMES,  # of the array in an .npz
):
    """Return x0 (N, *event) in [-1, 1] for images, and lines of text that say what was read.

    Arrays are uint8 (N, H, W[, C]), or numbers (N, *event) in the units of x0. Raises OSError when
    the file cannot be read, ValueError when it does not fit."""
    array = read_array(path, names)
    is_image = len(event) == 3
    if array is None and is_image:
        channels, height, width = event
        images = read_images(path, (height, width), channels)
        return to_float(images.items), images.summary
    x0 = to_items(path, array, event)
    if is_image and x0.abs().max() > MAX_X0:
        raise ValueError(f"{path} holds {array.dtype} beyond -1 to 1; pixels to 255 are uint8")
    return x0, [f"{len(x0)} items in {path}"]


def read_latents(path, event):
    """Return noise x_T (N, *event) of an .npy or .npz, and lines of text; raises as read_items."""
    x_t = to_items(path, read_array(path, LATENT_NAMES), event)
    return x_t, [f"{len(x_t)} items in {path}"]


def load_samples(path, event):
    """Return samples that any program wrote, and lines of text; arguments like read_items.

    They are uint8 pixels (N, C, H, W) or points (N, D). Float images are refused, because nobody
    knows their range."""
    array = read_array(path, SAMPLE_NAMES)
    if array is not None and len(event) == 3 and array.dtype != np.uint8:
        raise ValueError(f"{path} holds {array.dtype}; expected uint8 images (N, H, W[, C])")
    x0, summary = read_items(path, event, SAMPLE_NAMES)
    return to_pixels(x0), summary


def load_mask(
    path,  # of an image, or an array (N, H, W), (H, W), (N, D) or (D,)
    event,  # the shape of one item
):
    """The part to fill in, bool, (N, *event) or broadcast to it: light, or not zero.

    Raises ValueError when it does not fit the items, or is all or nothing."""
    array = read_array(path)
    if array is None:
        x0, _ = read_items(path, (1, *event[1:]))
        mask = x0 > 0  # (N, 1, H, W)
    else:
        mask = torch.from_numpy(array.astype(bool))
        if mask.ndim < max(len(event), 2):
            mask = mask[None]  # one mask for all items
        if len(event) == 3 and mask.ndim == 3:
            mask = mask[:, None]  # (N, 1, H, W)
    channels = (1, event[0]) if len(event) == 3 else (event[0],)
    fits = mask.ndim == len(event) + 1 and mask.shape[1] in channels
    if not fits or tuple(mask.shape[2:]) != tuple(event[1:]):
        raise ValueError(f"mask={path}: {tuple(mask.shape)} does not fit items of {event}")
    if not mask.any() or mask.all():
        raise ValueError(f"mask={path}: expected some of it light, to fill in, and some dark")
    return mask
