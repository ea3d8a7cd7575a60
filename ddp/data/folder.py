"""Images from a folder or a .zip, whatever they are, as one uint8 tensor.

The rules: EXIF rotation is applied; a palette is looked up, and counts as color; transparency is
laid over white; 16 bits are scaled to 8, not cut off; CMYK becomes RGB; of an animation the first
frame counts. An image is scaled until it covers the target and cropped to it about its center.
Hidden files are passed over; damaged ones, and those above Pillow's limit of 89 million pixels,
are skipped and change nothing for the others.
"""

import contextlib
import io
import os
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
MAX_SKIPPED_SHOWN = 5
MAX_CLASSES_SHOWN = 20
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
IS_TEST = {"train": False, "training": False, "test": True, "testing": True}  # folder -> split
IS_TEST |= {"val": True, "valid": True, "validation": True}


@dataclass
class Images:
    """What was read from a folder or .zip."""

    items: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor | None  # (N,) int64, if all lie in class folders, of which are two or more
    classes: list  # names of the class folders
    is_test: torch.Tensor | None  # (N,) bool, if there are folders `train` and `test` (or `val`)
    summary: list  # lines of text: what was read, and what was skipped


def load_folder(
    path,  # of a folder or .zip of images
    image_size=None,  # (H, W), see read_images
    channels=None,  # 1 or 3, see read_images
    test_fraction=None,  # when there are no folders `train` and `test`; default 0.1
):
    """A Dataset of images, split by folders `train` and `test`, else at random from a fixed seed.

    Raises OSError when fewer than two can be read, ValueError when the options do not fit."""
    images = read_images(path, image_size, channels)
    labels = images.labels
    is_test = images.is_test
    if len(images.items) < 2:
        raise OSError(f"{path} holds one readable image; at least 2 are needed")
    if is_test is None:
        is_test = random_split(len(images.items), test_fraction or 0.1)
    elif test_fraction:
        raise ValueError(
            f"test_fraction={test_fraction} is for data without a split, but {path} has folders "
            "for training and testing; leave it out"
        )
    path = Path(path).resolve()
    return Dataset(
        path.stem if path.is_file() else path.name,
        images.items[~is_test],
        images.items[is_test],
        None if labels is None else labels[~is_test],
        None if labels is None else labels[is_test],
        images.classes,
        images.summary,
    )


def random_split(count, test_fraction):
    """Which of `count` items are for testing, (count,) bool; at least one is for training."""
    at_least = 2 if count > 3 else 1  # one item has no spread to compare with
    test_count = min(max(at_least, round(test_fraction * count)), count - 1)
    is_test = torch.zeros(count, dtype=torch.bool)
    is_test[np.random.RandomState(0).permutation(count)[:test_count]] = True
    return is_test


def read_images(
    path,  # of a folder, a .zip, or one image
    image_size=None,  # (H, W); default: the images' common size up to 64, else (32, 32)
    channels=None,  # 1 or 3; default: 1 when every image is gray
):
    """All images there, in the order of their names, as `Images`.

    Raises OSError when no image can be read, ValueError when they do not fit into memory."""
    with contextlib.closing(Source(Path(path))) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        headers, skipped, items = decode(source, image_size, channels)
    remarks = [f"skipped {printable(name)}: {reason}" for name, reason in skipped.items()]
    if len(remarks) > MAX_SKIPPED_SHOWN:
        more = len(remarks) - MAX_SKIPPED_SHOWN
        remarks[MAX_SKIPPED_SHOWN:] = [f"skipped {more} more that could not be read"]
    if source.ignored:
        remarks.append(f"ignored {source.ignored} files that are not {', '.join(SUFFIXES)}")
    if not headers:
        reasons = "; ".join(remarks) or f"it holds no {', '.join(SUFFIXES)}"
        raise OSError(f"{path}: no image could be read: {reasons}")
    labels, classes, is_test = labels_from_folders(headers)
    summary = summarize(path, headers.values(), items.shape[1:], classes, labels)
    return Images(torch.from_numpy(items), labels, classes, is_test, summary + remarks)


class Source:
    """The files of a folder or .zip, or one file. Raises OSError when it is none of these."""

    def __init__(self, path):
        self.folder = path
        self.archive = None
        if path.is_dir():
            files = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        elif not path.is_file():
            raise OSError(f"{path} is neither an image nor a folder or .zip of images")
        elif path.suffix.lower() == ".zip":
            self.archive = open_zip(path)
            files = {name for name in self.archive.namelist() if not name.endswith("/")}
        else:
            self.folder = path.parent
            files = [path.name]
        visible = [file for file in files if not is_hidden(file)]
        self.names = sorted(file for file in visible if file.lower().endswith(SUFFIXES))
        self.ignored = len(visible) - len(self.names)  # files that are not images

    def read(self, name):
        """The bytes of a file."""
        if self.archive is None:
            return (self.folder / name).read_bytes()
        if self.archive.getinfo(name).file_size > MAX_FILE_BYTES:
            raise ValueError(f"unpacks to more than {MAX_FILE_BYTES:,} bytes")
        return self.archive.read(name)

    def close(self):
        if self.archive is not None:
            self.archive.close()


def open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # it raises nearly anything on damaged files
        raise OSError(f"{path} is not a whole .zip file ({error})") from None


def is_hidden(name):
    """Whether a file, or a folder that it lies in, is hidden or macOS's by-product."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def decode(source, image_size, channels):
    """Read all images of a Source: sizes first, then pixels into memory of known size.

    Returns (headers, skipped, items): (size, mode) of each image that was read, by name; why each
    other one was not, by name; and the pixels (N, C, H, W)."""
    headers = {}
    skipped = {}
    for name, header, reason in for_each(read_header, source, source.names):
        if reason:
            skipped[name] = reason
        else:
            headers[name] = header
    shape = None
    # a header can promise what the rest does not hold: then the others may want another shape
    while shape != choose_shape(headers.values(), image_size, channels):
        shape = choose_shape(headers.values(), image_size, channels)
        try:
            items = np.empty((len(headers), *shape), np.uint8)
        except (MemoryError, ValueError):
            raise ValueError(
                f"image_size={shape[1]}x{shape[2]}: {len(headers)} images do not fit into memory; "
                "use a smaller one"
            ) from None
        count = 0
        for name, pixels, reason in for_each(read_pixels, source, list(headers), shape):
            if reason:
                skipped[name] = reason
                del headers[name]
            else:
                items[count] = pixels
                count += 1
    return headers, skipped, items[:count]


def for_each(function, source, names, *args):
    """Yield (name, function(image, *args), None), or (name, None, the reason) of each, in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
        yield from pool.map(partial(attempt, function, source, args), names)


def attempt(function, source, args, name):
    try:
        with Image.open(io.BytesIO(source.read(name)), formats=FORMATS) as image:
            return name, function(image, *args), None
    except Exception as error:  # decoders raise nearly anything on damaged files
        text = " ".join(str(error).split("<_io")[0].split())  # without the address of a buffer
        return name, None, f"{type(error).__name__} {printable(text)[:80]}".strip()


def printable(text):
    """Text, such as a file's name, on one line that is safe to print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_header(image):
    """((width, height) as seen, mode) of an opened image, without its pixels where possible."""
    width, height = image.size
    try:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except Exception:  # a damaged tag says nothing of the pixels
        sideways = False
    return (height, width) if sideways else (width, height), image.mode


def choose_shape(headers, image_size, channels):
    """(C, H, W) for images of these (size, mode)s."""
    sizes = {size for size, _ in headers}
    if not image_size:
        image_size = DEFAULT_SIZE
        if len(sizes) == 1:
            ((width, height),) = sizes
            if max(width, height) <= MAX_NATIVE_SIZE:
                image_size = (height, width)
    if not channels:
        channels = 1 if all(mode in GRAY_MODES for _, mode in headers) else 3
    return (channels, *image_size)


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
    folders = below_common([PurePosixPath(printable(name)).parent.parts for name in names])
    is_test = [IS_TEST.get(f[0].lower()) if f else None for f in folders]
    if set(is_test) == {True, False}:
        is_test = torch.tensor(is_test)
        folders = below_common([f[1:] for f in folders])
    else:
        is_test = None
    classes = sorted({f[0] for f in folders if f})
    if len(classes) < 2 or not all(folders):  # some image lies in no class folder
        return None, [], is_test
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[f[0]] for f in folders]), classes, is_test


def below_common(folders):
    """Paths, as tuples of names, without the top folders that all have in common."""
    while all(folders) and len({f[0] for f in folders}) == 1:
        folders = [f[1:] for f in folders]
    return folders


def summarize(path, headers, shape, classes, labels):
    """Two lines of text: the images' sizes and modes, and their classes."""
    channels, height, width = shape
    widths = span([size[0] for size, _ in headers])
    heights = span([size[1] for size, _ in headers])
    modes = ", ".join(sorted({mode for _, mode in headers}))
    line = f"{len(headers)} images in {path}: width {widths}, height {heights}, modes {modes}; "
    line += f"used as {height}x{width}, {channels} channel{'s' if channels > 1 else ''}"
    if not classes:
        return [line, "no classes: that takes two or more class folders"]
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    parts = [f"{name} {count}" for name, count in zip(classes, counts, strict=True)]
    if len(parts) > MAX_CLASSES_SHOWN:
        parts[MAX_CLASSES_SHOWN:] = ["..."]
    return [line, f"{len(classes)} classes: {', '.join(parts)}"]


def span(numbers):
    """The range of some numbers as text."""
    low = min(numbers)
    high = max(numbers)
    return f"{low} to {high}" if low < high else f"{low}"
