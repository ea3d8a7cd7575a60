"""Images from a folder or a .zip, whatever they are, as one uint8 tensor.

The rules: EXIF rotation is applied; a palette is looked up, and counts as color; transparency is
laid over white; 16 bits are scaled to 8, not cut off; CMYK becomes RGB; of an animation the first
frame counts. An image is scaled to cover the target and cropped about its center. Hidden files are
passed over; damaged ones and those above 89 million pixels are skipped, to no effect on others."""

import contextlib
import io
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from ddp.data.dataset import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # by content: a decoder that no one asked for is a risk
GRAY_MODES = ("1", "L", "LA", "I", "I;16")
MAX_NATIVE_SIZE = 64  # images of one common size up to this keep it
DEFAULT_SIZE = (32, 32)  # (H, W)
MAX_FILE_BYTES = 1 << 28  # a .zip can promise more than fits into memory
HIDDEN = re.compile(r"(^|/)(\.[^/]|__MACOSX)|/$")  # .name, macOS's by-product, a .zip's folder
IS_TEST = {"train": False, "training": False, "test": True, "testing": True}  # folder -> split
IS_TEST |= {"val": True, "valid": True, "validation": True}


@dataclass
class Images:  # what was read from a folder or .zip
    items: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor | None  # (N,) int64, if all lie in class folders, of which are two or more
    classes: list  # names of the class folders
    is_test: torch.Tensor | None  # (N,) bool, if there are folders `train` and `test` (or `val`)
    summary: list  # lines of text: what was read, and what was skipped


def load_folder(path, image_size=None, channels=None, test_fraction=None):
    """A Dataset of images, split by folders `train` and `test`, else at random by a fixed seed."""
    images = read_images(path, image_size, channels)
    is_test = images.is_test
    count = len(images.items)
    if count < 2:
        raise OSError(f"{path} holds one readable image; at least 2 are needed")
    if is_test is None:
        at_least = 2 if count > 3 else 1  # one item has no spread to compare with
        test_count = min(max(at_least, round((test_fraction or 0.1) * count)), count - 1)
        is_test = torch.zeros(count, dtype=torch.bool)
        is_test[np.random.RandomState(0).permutation(count)[:test_count]] = True
    elif test_fraction:
        raise ValueError(f"test_fraction={test_fraction}: {path} has a test folder; leave it out")
    parts = [images.items[~is_test], images.items[is_test]]
    if images.labels is not None:
        parts += [images.labels[~is_test], images.labels[is_test]]
    path = Path(path).resolve()
    name = path.stem if path.is_file() else path.name
    return Dataset(name, *parts, classes=images.classes, summary=images.summary)


def read_images(
    path,  # of a folder, a .zip, or one image
    image_size=None,  # (H, W); default: the images' common size up to 64, else (32, 32)
    channels=None,  # 1 or 3; default: 1 when every image is gray
):
    """All images there, in the order of their names, as `Images`.

    Raises OSError when no image can be read, ValueError when they do not fit into memory."""
    with open_files(Path(path)) as files, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        visible = [name for name in files if not HIDDEN.search(name)]
        names = sorted(name for name in visible if name.lower().endswith(SUFFIXES))
        headers, skipped, items = decode(files, names, image_size, channels)
    remarks = [f"skipped {printable(name)}: {reason}" for name, reason in skipped.items()]
    if len(remarks) > 5:
        remarks[5:] = [f"skipped {len(remarks) - 5} more that could not be read"]
    if ignored := len(visible) - len(names):
        remarks.append(f"ignored {ignored} files that are not {', '.join(SUFFIXES)}")
    if not headers:
        reasons = "; ".join(remarks) or f"it holds no {', '.join(SUFFIXES)}"
        raise OSError(f"{path}: no image could be read: {reasons}")
    labels, classes, is_test = labels_from_folders(headers)
    summary = summarize(path, headers.values(), items.shape[1:], classes, labels)
    return Images(torch.from_numpy(items), labels, classes, is_test, summary + remarks)


@contextlib.contextmanager
def open_files(path):
    """Of a folder, a .zip or one file: a dict of each file's name -> function() -> its bytes."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        yield {file.relative_to(path).as_posix(): file.read_bytes for file in files}
    elif not path.is_file():
        raise OSError(f"{path} is neither an image nor a folder or .zip of images")
    elif path.suffix.lower() != ".zip":
        yield {path.name: path.read_bytes}
    else:
        try:
            archive = zipfile.ZipFile(path)
        except Exception as error:  # it raises nearly anything on damaged files
            raise OSError(f"{path} is not a whole .zip file ({error})") from None
        with archive:
            yield {name: partial(read_member, archive, name) for name in archive.namelist()}


def read_member(archive, name):
    if archive.getinfo(name).file_size > MAX_FILE_BYTES:
        raise ValueError(f"unpacks to more than {MAX_FILE_BYTES:,} bytes")
    return archive.read(name)


def decode(files, names, image_size, channels):
    """Read sizes first, then pixels into memory of known size."""
    skipped = {}  # name -> why it was not read
    headers = dict(read_each(read_header, files, names, skipped))  # name -> (size, mode)
    shape = None
    # a header can promise what the rest does not hold: then the others may want another shape
    while shape != choose_shape(headers.values(), image_size, channels):
        shape = choose_shape(headers.values(), image_size, channels)
        try:
            items = np.empty((len(headers), *shape), np.uint8)  # (N, C, H, W)
        except (MemoryError, ValueError):
            raise ValueError(f"image_size={shape[1:]} needs too much memory; lower it") from None
        readable = {}
        for name, pixels in read_each(partial(read_pixels, shape=shape), files, headers, skipped):
            items[len(readable)] = pixels
            readable[name] = headers[name]
        headers = readable
    return headers, skipped, items[: len(headers)]


def read_each(function, files, names, skipped):
    """Yield (name, function(image)) in the order of names; `skipped` gets the others' reasons."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for name, result, reason in pool.map(partial(attempt, function, files), names):
            if reason:
                skipped[name] = reason
            else:
                yield name, result


def attempt(function, files, name):
    try:
        with Image.open(io.BytesIO(files[name]()), formats=FORMATS) as image:
            return name, function(image), None
    except Exception as error:  # decoders raise nearly anything on damaged files
        text = " ".join(str(error).split("<_io")[0].split())  # without the address of a buffer
        return name, None, f"{type(error).__name__} {printable(text)[:80]}".strip()


def printable(text):
    """Text, such as a file's name, on one line that is safe to print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_header(image):
    """((height, width) as seen, mode) of an opened image, without its pixels where possible."""
    width, height = image.size
    with contextlib.suppress(Exception):  # a damaged tag says nothing of the pixels
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # a quarter turn
            return (width, height), image.mode
    return (height, width), image.mode


def choose_shape(headers, image_size, channels):
    """(C, H, W) for images of these (size, mode)s."""
    if not image_size:
        sizes = {size for size, _ in headers}
        common = sizes.pop() if len(sizes) == 1 else DEFAULT_SIZE
        image_size = common if max(common) <= MAX_NATIVE_SIZE else DEFAULT_SIZE
    is_gray = all(mode in GRAY_MODES for _, mode in headers)
    return (channels or (1 if is_gray else 3), *image_size)


def read_pixels(image, shape):
    """An opened image in the shape (C, H, W), uint8."""
    channels, height, width = shape
    image.load()  # here, so that what it raises does not pass for damaged EXIF
    with contextlib.suppress(Exception):  # a damaged tag says nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)  # turns the pixels, then edits the EXIF
    if image.mode.startswith("I"):  # 16 bits; convert() would cut them off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    array = np.asarray(image)  # (H, W) or (H, W, 3)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def labels_from_folders(names):
    """(labels, classes, is_test) from the folders that the images lie in, below those in common."""
    folders = [PurePosixPath(printable(name)).parent.parts for name in names]
    is_test = None
    while all(folders):
        parts = [IS_TEST.get(f[0].lower()) for f in folders]
        if is_test is None and set(parts) == {True, False}:
            is_test = torch.tensor(parts)
        elif len({f[0] for f in folders}) > 1:  # these are class folders
            break
        folders = [f[1:] for f in folders]  # below the split, or below what all have in common
    if not all(folders):  # some image lies in no class folder
        return None, [], is_test
    classes, labels = np.unique([f[0] for f in folders], return_inverse=True)
    return torch.from_numpy(labels), classes.tolist(), is_test


def summarize(path, headers, shape, classes, labels):
    """Two lines of text: the images' sizes and modes, and their classes."""
    channels, height, width = shape
    sizes = np.array([size for size, _ in headers])  # (N, 2): height, width
    spans = []
    for low, high in zip(sizes.min(axis=0), sizes.max(axis=0), strict=True):
        spans.append(f"{low} to {high}" if low < high else f"{low}")
    modes = ", ".join(sorted({mode for _, mode in headers}))
    line = f"{len(headers)} images in {path}: width {spans[1]}, height {spans[0]}, modes {modes}; "
    line += f"used as {height}x{width}, {channels} channel{'s' if channels > 1 else ''}"
    if not classes:
        return [line, "no classes: that takes two or more class folders"]
    counts = [f"{name} {count}" for name, count in zip(classes, labels.bincount(), strict=True)]
    more = ", ..." if len(counts) > 20 else ""
    return [line, f"{len(classes)} classes: {', '.join(counts[:20])}{more}"]
