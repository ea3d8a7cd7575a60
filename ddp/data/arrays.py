"""Items that a user or another program gives: arrays in .npy or .npz files, images, masks."""

from pathlib import Path

import numpy as np
import torch

from ddp.data.dataset import to_float, to_pixels
from ddp.data.folder import read_images


def read_array(path, names=()):
    """The NumPy array of numbers in an .npy or .npz file, or None when it has another suffix.

    Of an .npz, the first of `names`, default: of all. Raises OSError when it cannot be read."""
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        return None
    try:
        array = np.load(path)  # no pickles
        if not isinstance(array, np.ndarray):  # an .npz
            present = [name for name in names or array.files if name in array.files]
            if not present:
                raise ValueError(f"it holds no {' or '.join(names) or 'array'}")
            array = array[present[0]]
        if array.dtype.kind not in "fiub":  # float, int, uint, bool
            raise ValueError(f"it holds {array.dtype}")
        return array
    except Exception as error:  # NumPy raises nearly anything on damaged files
        reason = "it holds objects" if "pickle" in str(error) else error
        raise OSError(f"{path} cannot be read as an array of numbers: {reason}") from None


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
        expected = f"finite items of shape {event}, or uint8 images (N, H, W, C)"
        raise ValueError(f"{path} holds {array.dtype} {array.shape}; expected {expected}")
    return x0


def read_items(path, event, names=("images", "points")):
    """Return x0 (N, *event) and lines of text, from images as read_images takes them or an array.

    An array is uint8 (N, H, W[, C]), or numbers (N, *event) in the units of x0. Raises OSError when
    the file cannot be read, ValueError when it does not fit."""
    array = read_array(path, names)
    is_image = len(event) == 3
    if array is None and is_image:
        images = read_images(path, image_size=event[1:], channels=event[0])
        return to_float(images.items), images.summary
    x0 = to_items(path, array, event)
    if is_image and x0.abs().max() > 1.01:  # but for rounding
        raise ValueError(f"{path} holds {array.dtype} beyond -1 to 1; pixels to 255 are uint8")
    return x0, [f"{len(x0)} items in {path}"]


def read_latents(path, event):
    """Return noise x_T (N, *event) of an .npy or .npz, and lines of text; raises as read_items."""
    x_t = to_items(path, read_array(path, ("latents", "noise")), event)
    return x_t, [f"{len(x_t)} items in {path}"]


def load_samples(path, event):
    """Return samples that any program wrote, uint8 (N, C, H, W) or points, and lines of text."""
    names = ("images", "points", "samples", "arr_0")  # arr_0: what np.savez calls it
    array = read_array(path, names)
    if array is not None and len(event) == 3 and array.dtype != np.uint8:  # of unknown range
        raise ValueError(f"{path} holds {array.dtype}; expected uint8 images (N, H, W[, C])")
    x0, summary = read_items(path, event, names)
    return to_pixels(x0), summary


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
        raise ValueError(f"mask={path}: expected some of it light, to fill in, and some dark")
    return mask
