"""Samples on their way to files, in memory that does not grow with their number."""

import contextlib
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ddp import figures
from ddp.pictures import SUFFIXES

FORMATS = ("png", "grid", "npz", "gif")
FILE_FORMATS = {".png": "grid", ".npz": "npz", ".gif": "gif"}
SHOWN, SHOWN_POINTS = 100, 5000  # samples in a grid, points in a scatter
ANIMATED, FRAMES = {True: 25, False: 1000}, 50  # is_image: samples in an animation; its frames


def free_path(path, suffix=""):
    """`path` and suffix, or the first of path-2, path-3, ... that does not exist."""
    free, i = path.with_name(path.name + suffix), 1
    while free.exists():
        i += 1
        free = path.with_name(f"{path.name}-{i}{suffix}")
    return free


def plan(out, format, checkpoint):
    """(path, formats) for what the user asked for; by default a grid in a new folder beside the
    checkpoint. Raises ValueError when the two disagree or the path is taken."""
    suffix = Path(out or "").suffix.lower()
    formats = format.split(",") if format else [FILE_FORMATS.get(suffix, "grid")]
    if suffix == ".png" and formats == ["png"]:
        formats = ["grid"]
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise ValueError(f"--format {unknown[0]}: expected some of {','.join(FORMATS)}")
    if out is None:
        checkpoint = Path(checkpoint)
        return free_path(checkpoint.with_name(f"{checkpoint.stem}-samples")), formats
    out = Path(out)
    if suffix in SUFFIXES[1:]:
        raise ValueError(f"--out {out}: expected a folder, or a file {', '.join(FILE_FORMATS)}")
    if suffix in FILE_FORMATS and formats != [FILE_FORMATS[suffix]]:
        raise ValueError(f"--out {out} is one file, but --format says {format}; give a folder")
    return free(out), formats


def free(out):
    """`out`, the path that a user gave. Raises ValueError when something is there."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not overwritten; choose another, or remove it")
    return out


@contextlib.contextmanager
def whole_folder(path):
    """A hidden folder to write into, which takes its name `path` when all is well, or is not."""
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        temporary.mkdir()
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}); choose another --out"
        ) from None
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # empty, or it would have been refused
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Folder:
    """Writes samples as they come into a hidden folder, which takes its name `path` when all is
    well; when `path` is a file, only that is kept. Afterwards `written` lists what is there.

    event: the shape of a sample. total: how many will come. beside: items to show beside, or None.
    shown: further arguments of figures.overview."""

    def __init__(self, path, formats, event, total, beside=None, **shown):
        self.path, self.formats, self.total = path.absolute(), formats, total
        self.is_image = len(event) == 3
        self.item = (*event[1:], event[0]) if self.is_image else event
        self.count, self.items, self.arrays, self.written = 0, [], {}, []
        self.beside, self.options = [] if beside is None else [beside], shown

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self.temporary.mkdir()
        if "npz" in self.formats:
            # numpy writes whole arrays only; an .npz is a .zip of .npy files, so their bytes can
            # follow
            self.archive = zipfile.ZipFile(self.temporary / "samples.npz", "w")
            name, dtype = ("images", "|u1") if self.is_image else ("points", "<f4")
            self.array = self.archive.open(f"{name}.npy", "w", force_zip64=True)
            header = {"descr": dtype, "fortran_order": False, "shape": (self.total, *self.item)}
            np.lib.format.write_array_header_1_0(self.array, header)
        return self

    def add(self, items, beside=None, **arrays):
        """The next samples: uint8 (B, C, H, W) or float32 (B, D); items to show beside them; and
        arrays (B, ...), such as their labels, for the .npz. What is None is left out."""
        items = items.numpy()
        wanted = (SHOWN if self.is_image else SHOWN_POINTS) - self.count
        if wanted > 0:
            self.items.append(items[:wanted])
            self.beside += [] if beside is None else [beside[:wanted]]
        if self.is_image:
            items = np.ascontiguousarray(items.transpose(0, 2, 3, 1))
        if "npz" in self.formats:
            self.array.write(items.tobytes())
            for name, array in arrays.items():
                if array is not None:
                    self.arrays.setdefault(name, []).append(array.cpu().numpy())
        if "png" in self.formats and self.is_image:
            for i, item in enumerate(items, self.count):
                picture = Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
                picture.save(self.temporary / f"{i:06d}.png")
        self.count += len(items)

    def animate(self, states):
        """An animation of `states`, the samples from noise to data, in at most FRAMES frames."""
        states = list(states)
        keep = np.unique(np.linspace(0, len(states) - 1, FRAMES).round().astype(int))
        frames = [figures.overview(states[i], columns=self.options.get("columns")) for i in keep]
        figures.save_animation(frames, self.temporary / "process.gif")

    def finish(self):
        items, beside = np.concatenate(self.items), np.concatenate(self.beside or [[]])
        if "grid" in self.formats or ("png" in self.formats and not self.is_image):
            picture = figures.overview(items, beside if len(beside) else None, **self.options)
            picture.save(self.temporary / "grid.png")
        if "npz" in self.formats:
            self.array.close()
            for name, parts in self.arrays.items():
                with self.archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array(f, np.concatenate(parts))
            self.archive.close()

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.finish()
                if self.path.suffix.lower() in FILE_FORMATS:
                    (only,) = self.temporary.iterdir()
                    self.written = [only.replace(self.path)]
                else:
                    if self.path.exists():
                        self.path.rmdir()  # empty, or plan would have refused
                    self.temporary.replace(self.path)
                    self.written = sorted(self.path.iterdir())
        finally:
            if "npz" in self.formats:
                with contextlib.suppress(OSError, ValueError):  # on a full disk closing fails, too
                    self.array.close()
                    self.archive.close()
            shutil.rmtree(self.temporary, ignore_errors=True)
