"""Stream samples to PNG, NPZ and GIF files in bounded memory."""

import contextlib
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ddp.data.folder import SUFFIXES
from ddp.io.figures import grid_or_scatter, save_animation
from ddp.io.files import atomic_dir, next_free_path, require_absent

FORMATS = ("png", "grid", "npz", "gif")  # an image each; one image of all; arrays; an animation
FILE_FORMATS = {".png": "grid", ".npz": "npz", ".gif": "gif"}  # suffix of a file -> its format
GRID_IMAGES = 100  # in a grid
SCATTER_POINTS = 5000  # in a scatter
ANIMATED_IMAGES = 25  # in an animation
ANIMATED_POINTS = 1000  # the same of points
MAX_FRAMES = 50  # of an animation


def parse_output(
    out,  # a folder, a file .png, .npz or .gif, or None: a new folder next to the checkpoint
    format,  # some of FORMATS, separated by commas, or None: what suits `out`
    checkpoint,  # path of the model that samples
):
    """Return (path, formats) to write to. Raises ValueError when they disagree or `out` exists."""
    suffix = Path(out or "").suffix.lower()
    formats = format.split(",") if format else [FILE_FORMATS.get(suffix, "grid")]
    if suffix == ".png" and formats == ["png"]:
        formats = ["grid"]
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"format={name}: expected some of {','.join(FORMATS)}")
    if out is None:
        checkpoint = Path(checkpoint)
        return next_free_path(checkpoint.with_name(f"{checkpoint.stem}-samples")), formats
    if suffix in SUFFIXES and suffix not in FILE_FORMATS:  # .jpg, say
        raise ValueError(f"out={out}: expected a folder, or a file {', '.join(FILE_FORMATS)}")
    if suffix in FILE_FORMATS and formats != [FILE_FORMATS[suffix]]:
        raise ValueError(f"out={out} is one file, but format={format}; give a folder")
    return require_absent(Path(out)), formats


@contextlib.contextmanager
def atomic_output(path):
    """Make a hidden folder that becomes `path`, or whose only file does if that names a file."""
    if path.suffix.lower() not in FILE_FORMATS:
        with atomic_dir(path) as folder:
            yield folder
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = {"prefix": f".{path.name}.", "suffix": ".partial", "dir": path.parent}
    with tempfile.TemporaryDirectory(**hidden) as folder:
        yield Path(folder)
        (only,) = Path(folder).iterdir()
        only.replace(path)


class SampleWriter(contextlib.ExitStack):
    """A context that writes samples as they come; `path` appears when all is well, or not at all.

    path and formats: of parse_output; event: the shape of a sample; total: how many will come;
    reference: items to show right of them; options: titles and columns of grid_or_scatter."""

    def __init__(self, path, formats, event, total, reference=None, **options):
        super().__init__()
        self.path = path.absolute()
        self.formats = formats
        self.event = event
        self.total = total
        self.options = options
        self.is_image = len(event) == 3  # (C, H, W), else (D,)
        self.count = 0  # samples written so far
        self.shown = []  # the first samples, for the grid
        self.references = [] if reference is None else [reference]  # to show right of them
        self.arrays = {}  # name -> parts, for the .npz

    @property
    def num_animated(self):
        """How many samples an animation shows."""
        return min(self.total, ANIMATED_IMAGES if self.is_image else ANIMATED_POINTS)

    @property
    def written(self):
        """The files, after all went well."""
        return [self.path] if self.path.is_file() else sorted(self.path.iterdir())

    def __enter__(self):
        self.folder = self.enter_context(atomic_output(self.path))
        if "npz" in self.formats:
            self.open_archive()
        self.push(self.finish)  # contexts are left, and this is called, in reverse order
        return self

    def open_archive(self):
        """Start samples.npz with an array whose bytes follow, sample by sample.

        numpy writes whole arrays only, but an .npz is a .zip of .npy files."""
        name, dtype, shape = "points", "<f4", self.event
        if self.is_image:
            channels, height, width = self.event
            name, dtype, shape = "images", "|u1", (height, width, channels)
        self.archive = self.enter_context(zipfile.ZipFile(self.folder / "samples.npz", "w"))
        self.array = self.enter_context(self.archive.open(f"{name}.npy", "w", force_zip64=True))
        header = {"descr": dtype, "fortran_order": False, "shape": (self.total, *shape)}
        np.lib.format.write_array_header_1_0(self.array, header)

    def add(self, items, reference=None, **arrays):
        """Write the next samples, on the CPU: uint8 (B, C, H, W) or float32 (B, D).

        reference: items to show right of them. arrays: (B, ...) tensors for the .npz, such as
        labels; None is left out."""
        items = items.numpy()
        wanted = (GRID_IMAGES if self.is_image else SCATTER_POINTS) - self.count
        if wanted > 0:
            self.shown.append(items[:wanted])
            if reference is not None:
                self.references.append(reference[:wanted])
        if self.is_image:
            items = np.ascontiguousarray(items.transpose(0, 2, 3, 1))  # (B, H, W, C)
        if "npz" in self.formats:
            self.array.write(items.tobytes())
            for name, array in arrays.items():
                if array is not None:
                    self.arrays.setdefault(name, []).append(array.cpu().numpy())
        if "png" in self.formats and self.is_image:
            for i, item in enumerate(items, self.count):
                image = Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
                image.save(self.folder / f"{i:06d}.png")
        self.count += len(items)

    def animate(self, states):
        """Write an animation of states, each like the items of `add`, in at most MAX_FRAMES."""
        states = list(states)
        keep = np.linspace(0, len(states) - 1, MAX_FRAMES).round().astype(int)
        columns = self.options.get("columns")
        frames = [grid_or_scatter(states[i], columns=columns) for i in np.unique(keep)]
        save_animation(frames, self.folder / "process.gif")

    def finish(self, error, *_):
        """Write the grid, and the arrays that came with the samples, unless there was an error."""
        if error:
            return
        if "grid" in self.formats or ("png" in self.formats and not self.is_image):
            reference = np.concatenate(self.references) if self.references else None
            image = grid_or_scatter(np.concatenate(self.shown), reference, **self.options)
            image.save(self.folder / "grid.png")  # of points a scatter
        if "npz" in self.formats:
            self.array.close()  # the archive takes one array at a time
            for name, parts in self.arrays.items():
                with self.archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array(f, np.concatenate(parts))
