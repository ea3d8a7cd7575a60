"""Pictures from a folder or a .zip, whatever they are, as one uint8 tensor.

The rules: EXIF rotation is applied; a palette is looked up; transparency is laid over white; 16
bits are scaled to 8, not cut off; CMYK becomes RGB; of an animation the first frame counts. A
picture is scaled until it covers the target and cut to it about its centre. Hidden files are passed
over.
"""

import concurrent.futures
import dataclasses
import io
import os
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
LARGEST_NATIVE = 64  # pictures of one common size up to this keep it
DEFAULT_SIZE = (32, 32)


@dataclasses.dataclass
class Pictures:
    """items: uint8 (N, C, H, W). labels: int64 (N,) when every picture lies in one of two or more
    class folders, else None. is_test: bool (N,) when the folders are `train` and `test`, else None.
    found: what was found and what was skipped, a list of lines."""

    items: torch.Tensor
    labels: torch.Tensor | None
    classes: list
    is_test: torch.Tensor | None
    found: list


def read(path, image_size=None, channels=None):
    """All pictures under the folder or .zip `path`, in the order of their names, as `Pictures`.

    image_size: (H, W), or None for the pictures' common size up to 64, else 32x32. channels: 1 or
    3, or None for 1 when every picture is grey. Raises OSError when no picture can be read."""
    names, load, ignored = _list(Path(path))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        headers = list(pool.map(lambda name: _attempt(_header, load, name), names))
        good = [h for h in headers if not isinstance(h, str)]
        sizes, modes = Counter(h[0] for h in good), Counter(h[1] for h in good)
        channels = channels or (1 if all(m.startswith(GREY_MODES) for m in modes) else 3)
        height, width = image_size or _common_size(sizes)

        def decode(name):
            return _attempt(_pixels, load, name, height, width, channels)

        decoded = list(pool.map(decode, names))
    kept = [name for name, d in zip(names, decoded, strict=True) if not isinstance(d, str)]
    skipped = [(name, d) for name, d in zip(names, decoded, strict=True) if isinstance(d, str)]
    passed_over = [f"skipped {name}: {why}" for name, why in skipped[:5]]
    if len(skipped) > 5:
        passed_over.append(f"skipped {len(skipped) - 5} more that could not be read")
    if ignored:
        passed_over.append(f"ignored {ignored} files that are not {', '.join(SUFFIXES)}")
    if not kept:
        reasons = "; ".join(passed_over) or "it is empty"
        raise OSError(f"{path}: no picture could be read: {reasons}")
    items = torch.from_numpy(np.stack([d for d in decoded if not isinstance(d, str)]))
    labels, classes, is_test = _classes(kept)
    spans = [
        f"{min(s)} to {max(s)}" if len(set(s)) > 1 else f"{s[0]}" for s in zip(*sizes, strict=True)
    ]
    found = [
        f"{len(kept)} pictures in {path}: width {spans[0]}, height {spans[1]}, "
        f"modes {', '.join(sorted(modes))}; used as {height}x{width}, "
        f"{channels} channel{'s' if channels > 1 else ''}"
    ]
    if classes:
        counts = torch.bincount(labels, minlength=len(classes)).tolist()
        some = [f"{c} {n}" for c, n in zip(classes, counts, strict=True)]
        found.append(
            f"{len(classes)} classes: " + ", ".join(some[:20] + ["..."] * (len(some) > 20))
        )
    return Pictures(items, labels, classes, is_test, found + passed_over)


def _list(path):
    """(names of pictures in order, name -> bytes, number of files that are no pictures)."""
    if path.is_dir():
        files = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]

        def load(name):
            return (path / name).read_bytes()
    elif path.suffix.lower() == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise OSError(f"{path} is not a whole .zip file ({error})") from None
        files, load = [n for n in archive.namelist() if not n.endswith("/")], archive.read
    else:
        raise OSError(f"{path} is neither a folder nor a .zip of pictures")
    seen = [
        f for f in files if not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(f).parts)
    ]
    names = sorted(f for f in seen if f.lower().endswith(SUFFIXES))
    return names, load, len(seen) - len(names)


def _attempt(function, load, name, *args):
    """function(opened picture, *args), or the reason why this file cannot be read, a str."""
    try:
        with Image.open(io.BytesIO(load(name))) as picture:
            return function(picture, *args)
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = str(error).split("<_io")[0].splitlines()
        return f"{type(error).__name__} {reason[0][:80] if reason else ''}".strip()


def _header(picture):
    """((width, height) as seen, mode), without decoding."""
    turned = picture.getexif().get(0x0112, 1) >= 5
    return (picture.size[::-1] if turned else picture.size), picture.mode


def _pixels(picture, height, width, channels):
    """A decoded picture as uint8 (channels, height, width)."""
    picture = ImageOps.exif_transpose(picture)
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


def _common_size(sizes):
    if len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_NATIVE:
        width, height = next(iter(sizes))
        return height, width
    return DEFAULT_SIZE


def _classes(names):
    """(labels, classes, is_test) from the folders that the pictures lie in, below those that all
    share."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    while all(folders) and len({f[0] for f in folders}) == 1:
        folders = [f[1:] for f in folders]
    is_test = None
    if {f[0].lower() for f in folders if f} == {"train", "test"} and all(folders):
        is_test = torch.tensor([f[0].lower() == "test" for f in folders])
        folders = [f[1:] for f in folders]
    classes = sorted({f[0] for f in folders if f})
    if len(classes) < 2 or not all(folders):
        return None, [], is_test
    return torch.tensor([classes.index(f[0]) for f in folders]), classes, is_test
