"""What the tests of the data share: how a refusal looks, and files of images."""

import numpy as np
import pytest
from PIL import Image


def refused(kind, match, function, *args, **kwargs):
    """The one-line message of the error with which the call is refused."""
    with pytest.raises(kind, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path, array, mode=None, **options):
    """Write an array or a Pillow image, converted to `mode`, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    if mode:
        image = image.convert(mode)
    image.save(path, **options)
    return path


def gray(level, size=(4, 4)):
    """An image of one gray level, uint8 (H, W)."""
    return np.full(size, level, np.uint8)


def noise(height, width, seed=0):
    """A color image of random pixels, uint8 (H, W, 3)."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
