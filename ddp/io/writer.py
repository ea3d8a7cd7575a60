"""Stream samples to PNG, NPZ and GIF files in bounded memory."""

import contextlib
import functools
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ddp.io.edit_inputs import in_rows
from ddp.io.figures import save_animation, save_png
from ddp.io.files import atomic_dir, next_free_path, require_absent, shown_path
from ddp.io.item_figures import displayed, draw_items, num_images, room, strip
from ddp.io.spelling import none_of

# an image each; one image of all; arrays; an animation, and an image, of the way from noise to data
FORMATS = ("png", "grid", "npz", "gif", "strip")
FILE_FORMATS = {".png": "grid", ".npz": "npz", ".gif": "gif"}  # suffix of a file -> its format
GRID_IMAGES = 1024  # in a grid, and no more than fit into
GRID_PIXELS = 1 << 25
ANIMATED_IMAGES = 25  # in an animation, and no more than fit into
ANIMATED_PIXELS = 1 << 20
ANIMATED_POINTS, ANIMATED_SEQUENCES = 1000, 4  # the same of others
MAX_FRAMES = 50  # of an animation
STRIP_IMAGES = 8  # in a strip
STRIP_TIMES = 8
MAX_SEQUENCES = 64  # of an interpolation, that are shown
WAY_MILLISECONDS = 200  # that a step of an interpolation is shown


def parse_output(
    out,  # a folder, a file .png, .npz or .gif, or None: a new folder next to the checkpoint
    format,  # some of FORMATS, separated by commas, or None: what suits `out`
    checkpoint,  # path of the model that samples
):
    """Return (path, formats) to write to. Raises ValueError when they disagree or `out` exists.

    A folder whose name looks like a file's, such as a.tiff, ends in a slash."""
    if out == "":
        raise ValueError("out='': expected a path")
    suffix = Path(out or "").suffix.lower()
    formats = format.split(",") if format else [FILE_FORMATS.get(suffix, "grid")]
    if suffix == ".png" and formats == ["png"]:
        formats = ["grid"]
    for name in formats:
        if name not in FORMATS:
            raise ValueError(none_of("format", name, FORMATS))
    if out is None:
        checkpoint = Path(checkpoint)
        return next_free_path(checkpoint.with_name(f"{checkpoint.stem}-samples")), formats
    is_folder = str(out).endswith(("/", "\\")) or Path(out).is_dir()
    if not is_folder and suffix not in FILE_FORMATS and re.fullmatch(r"\.[a-z]{1,4}\d?", suffix):
        raise ValueError(
            f"out={out}: expected a file {', '.join(FILE_FORMATS)}, or a folder; if {suffix} is "
            f"meant to be of a folder, write {out}/"
        )
    if suffix in FILE_FORMATS and formats != [FILE_FORMATS[suffix]]:
        raise ValueError(f"out={out} is one file, but format={format}; give a folder")
    return require_absent(Path(out)), formats


class SampleWriter(contextlib.ExitStack):
    """A context that writes samples as they come; `path` appears when all is well, or not at all.

    path and formats: of parse_output; event: the shape of a sample; total: how many will come;
    reference: items to show right of them; is_way: every `columns` samples lead from one item to
    another; options: titles, columns and the like of draw_items."""

    def __init__(self, path, formats, event, total, reference=None, is_way=False, **options):
        super().__init__()
        self.path = path.absolute()
        self.formats = formats
        self.event = event
        self.total = total
        self.is_way = is_way
        self.options = options
        self.is_image = len(event) == 3  # (C, H, W), else (C, L) or (D,)
        self.count = 0  # samples written so far
        self.shown = []  # the first samples, num_shown of them
        self.references = [] if reference is None else [reference]  # to show right of them
        self.array = None  # the member of the archive that samples are written to
        self.arrays = {}  # name -> (file, dtype, shape of one), what else goes into the .npz

    @property
    def num_shown(self):
        """How many samples a figure shows, the first."""
        if len(self.event) == 2 and self.is_way:
            return min(self.total, MAX_SEQUENCES)
        if not self.is_image:
            return min(self.total, room(self.event))
        return min(self.total, GRID_IMAGES, num_images(self.event, GRID_PIXELS))

    @property
    def num_animated(self):
        """How many samples an animation or a strip shows, the first; of an interpolation how many
        ways."""
        if self.formats == ["strip"] and self.is_image:
            return min(self.total, STRIP_IMAGES)
        if not self.is_image:
            most = ANIMATED_POINTS if len(self.event) == 1 else ANIMATED_SEQUENCES
            return min(self.total, most)
        count = min(self.total, ANIMATED_IMAGES, num_images(self.event, ANIMATED_PIXELS))
        return in_rows(count, self.options.get("columns"))

    @property
    def needs_states(self):
        """Whether `animate` is to be called; an animated interpolation is of the samples alone."""
        return not self.is_way and bool({"gif", "strip"} & {*self.formats})

    @property
    def bounds(self):
        """Lines that say how many samples are shown, where that is not all."""
        moving = self.num_animated if self.needs_states else None
        few = min(moving, STRIP_IMAGES) if moving and self.is_image else moving
        shown = {"grid": self.num_shown, "gif": moving, "strip": few}
        return [
            f"{self.total:,} samples, of which the {name} shows the first {count:,}"
            for name, count in shown.items()
            if name in self.formats and count and count < self.total
        ]

    @property
    def written(self):
        """The files, after all went well."""
        path = self.out.path
        return [path] if path.is_file() else sorted(path.iterdir())

    @property
    def summary(self):
        """Lines that name what was written: the first files, and how many more."""
        files = self.written
        if len(files) == 1:
            return [f"wrote {shown_path(files[0])}"]
        lines = ["wrote", *(f"  {shown_path(path)}" for path in files[:5])]
        more = [f"  and {len(files) - 5:,} more in {shown_path(self.out.path)}"]
        return lines + more if len(files) > 5 else lines

    def __enter__(self):
        of_file = self.path.suffix.lower() in FILE_FORMATS
        self.out = self.enter_context(atomic_dir(self.path, of_file))
        self.folder = self.out.folder
        if "npz" in self.formats:
            self.aside = self.enter_context(contextlib.ExitStack())  # files without a name
            self.archive = self.enter_context(zipfile.ZipFile(self.folder / "samples.npz", "w"))
        self.push(self.finish)  # contexts are left, and this is called, in reverse order
        return self

    def open_array(self, dtype):
        """Start samples.npz with an array whose bytes follow, sample by sample.

        numpy writes whole arrays only, but an .npz is a .zip of .npy files."""
        name = {1: "points", 2: "sequences", 3: "images"}[len(self.event)]
        shape = (*self.event[1:], self.event[0]) if self.is_image else self.event  # (H, W, C)
        self.array = self.enter_context(self.archive.open(f"{name}.npy", "w", force_zip64=True))
        write_header(self.array, np.lib.format.dtype_to_descr(dtype), (self.total, *shape))

    def add(self, items, reference=None, **arrays):
        """Write the next samples, on the CPU: uint8 pixels or float32, (B, *event).

        reference: items to show right of them. arrays: (B, ...) tensors for the .npz, such as
        labels; None is left out."""
        items = items.numpy()
        wanted = self.num_shown - self.count
        if wanted > 0:
            self.shown.append(items[:wanted])
            if reference is not None:
                self.references.append(reference[:wanted])
        if "png" in self.formats and self.is_image:
            self.write_each(items)
        if self.is_image:
            items = np.ascontiguousarray(items.transpose(0, 2, 3, 1))  # (B, H, W, C)
        if "npz" in self.formats:
            if self.array is None:
                self.open_array(items.dtype)
            self.array.write(items.tobytes())
            for name, array in arrays.items():
                if array is not None:
                    self.put_aside(name, array.cpu().numpy())
        self.count += len(items)

    def write_each(self, items):
        """Write a PNG of each of the images (B, C, H, W), floats on one scale."""
        for i, item in enumerate(displayed(items, self.like), self.count):
            image = Image.fromarray(item[0] if len(item) == 1 else item.transpose(1, 2, 0).copy())
            image.save(self.folder / f"{i:06d}.png")

    @functools.cached_property
    def like(self):
        """The items that fix scales and axes: the reference or, without one, the first samples."""
        items = self.references or self.shown
        return np.concatenate(items) if items else None

    def put_aside(self, name, array):
        """Append the next entries of an array, whose turn comes when the samples are written."""
        if name not in self.arrays:
            file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            self.aside.enter_context(file)
            self.arrays[name] = (file, array.dtype, array.shape[1:])
        self.arrays[name][0].write(array.tobytes())

    def animate(self, states):
        """Write a GIF and a strip of states, each (log-SNR, items like those of `add`)."""
        states = thin_out(states, MAX_FRAMES)
        if "gif" in self.formats:
            kept = {k: v for k, v in self.options.items() if k in ("columns", "captions")}
            frames = [draw_items(state, like=self.like, **kept) for _, state in states]
            save_animation(frames, self.folder / "process.gif")
        if "strip" in self.formats:
            few = STRIP_IMAGES if self.is_image else self.num_animated
            levels, items = zip(*thin_out(states, STRIP_TIMES), strict=True)
            classes = self.options.get("captions")
            names = [classes[i % len(classes)] for i in range(few)] if classes else ()
            image = strip([each[:few] for each in items], levels, self.like, names=names)
            save_png(image, self.folder / "strip.png")

    def animate_ways(self, items, columns):
        """Write an animation that goes from one end of each row of the grid to the other."""
        rows = len(items) // columns or 1
        frames = [items[k::columns][: min(rows, self.num_animated)] for k in range(columns)]
        frames = [draw_items(frame, like=self.like) for frame in frames if len(frame)]
        save_animation(frames, self.folder / "process.gif", WAY_MILLISECONDS)

    def finish(self, error, *_):
        """Write the grid, and the arrays that came with the samples, unless there was an error."""
        if error:
            return
        if "grid" in self.formats or ("png" in self.formats and not self.is_image):
            reference = np.concatenate(self.references) if self.references else None
            shown = np.concatenate(self.shown)
            image = draw_items(shown, reference, like=self.like, **self.options)
            save_png(image, self.folder / "grid.png")  # of points a scatter
        if "gif" in self.formats and self.is_way:
            self.animate_ways(np.concatenate(self.shown), self.options["columns"])
        if "npz" in self.formats:
            self.array.close()  # the archive takes one array at a time
            for name, (file, dtype, shape) in self.arrays.items():
                with self.archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                    write_header(f, np.lib.format.dtype_to_descr(dtype), (self.count, *shape))
                    file.seek(0)
                    shutil.copyfileobj(file, f)


def write_header(file, dtype, shape):
    """Write what stands at the head of an .npy file, before the bytes of an array."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def thin_out(states, count):
    """Return at most `count` of the states, evenly, with the last; twice as many are ever held."""
    kept = []
    every = 1
    for i, state in enumerate(states):
        if i % every == 0:
            kept.append(state)
        if len(kept) == 2 * count:
            kept = kept[::2]
            every *= 2
    if i % every:
        kept.append(state)
    chosen = np.linspace(0, len(kept) - 1, count).round().astype(int)
    return [kept[k] for k in np.unique(chosen)]
