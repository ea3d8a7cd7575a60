"""Pictures from a folder or a .zip, whatever they are, as one uint8 tensor.

The rules: EXIF rotation is applied; a palette is looked up, and counts as colour; transparency is
laid over white; 16 bits are scaled to 8, not cut off; CMYK becomes RGB; of an animation the first
frame counts. A picture is scaled until it covers the target and cut to it about its centre. Hidden
files are passed over; damaged ones, and those above Pillow's limit of 89 million pixels, are
skipped and change nothing for the others.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import os
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # by content: a decoder that no one asked for is a risk
GREY_MODES = ("1", "L", "LA", "I", "I;16")
LARGEST_NATIVE = 64  # pictures of one common size up to this keep it
DEFAULT_SIZE = (32, 32)
LARGEST_FILE = 1 << 28  # bytes; a .zip can promise more than fits into memory
SPLITS = dict.fromkeys(("train", "training"), False)  # name of a folder -> is it for testing
SPLITS |= dict.fromkeys(("test", "testing", "val", "valid", "validation"), True)
ORIENTATION = 0x0112  # the EXIF tag, and the turn that undoes each of its values
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass
class Pictures:
    """items: uint8 (N, C, H, W). labels: int64 (N,) when every picture lies in one of two or more
    class folders, else None. is_test: bool (N,) when the folders are `train` and `test` (or `val`),
    else None. found: what was found and what was skipped, a list of lines."""

    items: torch.Tensor
    labels: torch.Tensor | None
    classes: list
    is_test: torch.Tensor | None
    found: list


def read(path, image_size=None, channels=None):
    """All pictures under the folder or .zip `path`, in the order of their names, as `Pictures`.

    image_size: (H, W), or None for the pictures' common size up to 64, else 32x32. channels: 1 or
    3, or None for 1 when every picture is grey. Raises OSError when no picture can be read, and
    ValueError when they do not fit into memory."""
    with (
        _opened(Path(path)) as (names, load, ignored),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

        def each(function, names, *args):  # (name, result) of each, in threads
            results = pool.map(lambda name: _attempt(function, load, name, *args), names)
            return zip(names, results, strict=True)

        headers, skipped, items = _decode(names, each, image_size, channels)
    passed_over = [f"skipped {_shown(name)}: {why}" for name, why in list(skipped.items())[:5]]
    if len(skipped) > 5:
        passed_over.append(f"skipped {len(skipped) - 5} more that could not be read")
    if ignored:
        passed_over.append(f"ignored {ignored} files that are not {', '.join(SUFFIXES)}")
    if not headers:
        reasons = "; ".join(passed_over) or f"it holds no {', '.join(SUFFIXES)}"
        raise OSError(f"{path}: no picture could be read: {reasons}")
    labels, classes, is_test = _classes(headers)
    found = [*_found(path, headers, items.shape[1:], labels, classes), *passed_over]
    return Pictures(torch.from_numpy(items), labels, classes, is_test, found)


def _decode(names, each, image_size, channels):
    """(headers, skipped, items): what was read, (size, mode) by name; what was not, the reason by
    name; and the pixels, (N, C, H, W)."""
    headers, skipped, shape = {}, {}, None
    for name, header in each(_header, names):
        (skipped if isinstance(header, str) else headers)[name] = header
    # a header can promise what the rest does not hold: then the others may want another shape
    while shape != (shape := _shape(headers.values(), image_size, channels)):
        try:
            items = np.empty((len(headers), *shape), np.uint8)
        except (MemoryError, ValueError):
            size = f"{len(headers)} pictures of {shape[1]}x{shape[2]}"
            raise ValueError(f"--image_size: {size} do not fit into memory") from None
        broken = {}
        for i, (name, pixels) in enumerate(each(_pixels, headers, shape)):
            if isinstance(pixels, str):
                broken[name] = pixels
            else:
                items[i - len(broken)] = pixels
        skipped |= broken
        headers = {name: header for name, header in headers.items() if name not in broken}
    return headers, skipped, items[: len(headers)]


def _found(path, headers, shape, labels, classes):
    """What to tell about the pictures that were read, a list of lines."""
    sides = zip(*[size for size, _ in headers.values()], strict=True)
    width, height = (f"{min(s)} to {max(s)}" if min(s) < max(s) else f"{s[0]}" for s in sides)
    modes = ", ".join(sorted({mode for _, mode in headers.values()}))
    used = f"{shape[1]}x{shape[2]}, {shape[0]} channel{'s' if shape[0] > 1 else ''}"
    found = f"{len(headers)} pictures in {path}: width {width}, height {height}, modes {modes}"
    if not classes:
        return [f"{found}; used as {used}", "no classes: that takes two or more class folders"]
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    some = [f"{c} {n}" for c, n in zip(classes, counts, strict=True)]
    some = ", ".join(some[:20] + ["..."] * (len(some) > 20))
    return [f"{found}; used as {used}", f"{len(classes)} classes: {some}"]


@contextlib.contextmanager
def _opened(path):
    """(names of pictures in order, name -> bytes, number of files that are no pictures)."""
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            files = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]

            def load(name):
                return (path / name).read_bytes()
        elif path.suffix.lower() == ".zip":
            file = stack.enter_context(open(path, "rb"))
            try:
                archive = zipfile.ZipFile(file)
            except Exception as error:  # it, too, raises nearly anything on damaged files
                raise OSError(f"{path} is not a whole .zip file ({error})") from None
            files = {name for name in archive.namelist() if not name.endswith("/")}

            def load(name):
                if archive.getinfo(name).file_size > LARGEST_FILE:
                    raise ValueError(f"unpacks to more than {LARGEST_FILE:,} bytes")
                return archive.read(name)
        elif path.is_file():
            files = [path.name]

            def load(name):
                return path.read_bytes()
        else:
            raise OSError(f"{path} is neither a picture nor a folder or .zip of pictures")
        seen = [
            f
            for f in files
            if not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(f).parts)
        ]
        names = sorted(f for f in seen if f.lower().endswith(SUFFIXES))
        yield names, load, len(seen) - len(names)


def _shown(name):
    """A file's name as one printable line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _attempt(function, load, name, *args):
    """function(opened picture, *args), or the reason why this file cannot be read, a str."""
    try:
        with Image.open(io.BytesIO(load(name)), formats=FORMATS) as picture:
            return function(picture, *args)
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = _shown(" ".join(str(error).split("<_io")[0].split()))
        return f"{type(error).__name__} {reason[:80]}".strip()


def _header(picture):
    """((width, height) as seen, mode)."""
    return (picture.size[::-1] if _orientation(picture) >= 5 else picture.size), picture.mode


def _orientation(picture):
    """1 to 8; 1, upright, when the EXIF data are absent or damaged."""
    try:
        orientation = picture.getexif().get(ORIENTATION)
        return orientation if orientation in TURNS else 1
    except Exception:  # a damaged tag says nothing of the pixels
        return 1


def _shape(headers, image_size, channels):
    """(C, H, W) for pictures of these (size, mode)s."""
    sizes = {size for size, _ in headers}
    if len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_NATIVE:
        default = next(iter(sizes))[::-1]
    else:
        default = DEFAULT_SIZE
    grey = all(mode in GREY_MODES for _, mode in headers)
    return (channels or (1 if grey else 3), *(image_size or default))


def _pixels(picture, shape):
    """A decoded picture as uint8 (C, H, W)."""
    channels, height, width = shape
    picture.load()  # what it raises within _orientation would pass for damaged EXIF
    turn = TURNS.get(_orientation(picture))
    picture = picture if turn is None else picture.transpose(turn)
    if picture.mode.startswith("I"):  # 16 bits; convert() would cut them off at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _classes(names):
    """(labels, classes, is_test) from the folders that the pictures lie in, below those that all
    share."""
    folders = _below_shared([PurePosixPath(_shown(name)).parent.parts for name in names])
    parts = [SPLITS.get(f[0].lower()) if f else None for f in folders]
    is_test = None
    if set(parts) == {True, False}:
        is_test = torch.tensor(parts)
        folders = _below_shared([f[1:] for f in folders])
    classes = sorted({f[0] for f in folders if f})
    if len(classes) < 2 or not all(folders):
        return None, [], is_test
    number = {c: i for i, c in enumerate(classes)}
    return torch.tensor([number[f[0]] for f in folders]), classes, is_test


def _below_shared(folders):
    while all(folders) and len({f[0] for f in folders}) == 1:
        folders = [f[1:] for f in folders]
    return folders
