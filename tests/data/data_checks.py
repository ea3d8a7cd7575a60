"""What the tests of the data share: how a refusal looks, files of images, and IDX files."""

import gzip
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddp.data.vision import PUBLISHED

IDX_FILES = list(PUBLISHED["mnist"]["md5"])


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


def idx(array):
    """The bytes of an IDX file."""
    array = np.asarray(array, np.uint8)
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def idx_contents(count=6, side=3):
    """The four files' contents; every byte differs from its neighbors."""
    images = np.arange(count * side * side).reshape(count, side, side) % 251
    labels = np.arange(count) % 10
    return [idx(images), idx(labels), idx(images[:4] + 1), idx(labels[3::-1])]


def put(folder, contents, suffix=""):
    """Write the four files of MNIST into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in zip(IDX_FILES, contents, strict=True):
        path = folder / (file.removesuffix(".gz") + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
    return folder


def save_all(folder, names):
    """Write a gray image of a level of its own to each name."""
    for i, name in enumerate(names):
        save(folder / name, gray(i))


def zip_of(folder):
    """A .zip of all files in a folder, next to it and of its name."""
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())
    return path
