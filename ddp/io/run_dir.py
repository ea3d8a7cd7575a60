"""The folder of a run: its name, what is written there, and where a run goes on from."""

import csv
import math
import re
import shutil
from functools import partial
from pathlib import Path

import torch

from ddp.config import Config, resume_config
from ddp.data import resolve_name, to_pixels
from ddp.io.checkpoint import (
    RESUME_KEYS,
    checkpoint_state,
    parse_config,
    read_checkpoint,
    require_keys,
    strip_training_state,
    write_checkpoint,
)
from ddp.io.device import sampling_dtype
from ddp.io.figures import grid_or_scatter, loss_curve, to_pil
from ddp.io.files import atomic_write
from ddp.options import SamplerOptions
from ddp.sampling import cycle_labels, sample

CHECK_EVERY = 20  # steps between two looks at the losses on a GPU, where each look waits for it
COLUMNS = ("step", "epoch", "loss", "grad_norm", "lr", "test_loss")  # of log.csv
SAMPLE_IMAGES = 64  # that are written as a run goes
SAMPLE_POINTS = 2000  # the same of points


def resolve_run(overrides, resume=None):
    """Return (config, folder, the checkpoint's path, its dict); of a new run the last two are None.

    overrides: the fields of Config that were set. resume: a checkpoint, a run's folder, or auto,
    the newest of this run. Nothing is created. Raises ValueError when something there would be
    overwritten, OSError when the checkpoint cannot be read."""
    if "dataset" in overrides:
        overrides = overrides | {"dataset": resolve_name(overrides["dataset"])}
    config = Config(**overrides)  # of a new run
    dataset = Path(config.dataset)
    name = config.name or (dataset.stem if dataset.is_file() else dataset.name)
    folder = Path(config.out_dir) / name
    path = find_checkpoint(folder, resume, may_number=not config.name)
    if path is None:
        return config, new_folder(folder, may_number=not config.name), None, None
    state = read_checkpoint(path)
    if "optimizer" not in state:
        raise OSError(f"{path} was stripped for shipping; resume last.pth, best.pth or step_*.pth")
    require_keys(path, state, RESUME_KEYS)
    config = resume_config(parse_config(state, path), overrides)  # or it would be another run
    own = path.parent  # the run that the checkpoint is of
    folder = Path(overrides.get("out_dir", own.parent)) / overrides.get("name", own.name)
    if folder.resolve() != own.resolve():  # a branch: a new run from this checkpoint
        return config, new_folder(folder), path, state
    try:
        newest = read_checkpoint(own / "last.pth")["step"]
    except OSError:  # absent or damaged: there is nothing to lose
        newest = 0
    if newest > state["step"]:
        raise ValueError(
            f"resume={path} is at step {state['step']}, but {own / 'last.pth'} is at step {newest} "
            "and would be overwritten; resume that one, or set name for a new run"
        )
    return config, own, path, state


def new_folder(folder, may_number=False):
    """Return the folder for a new run, with may_number the first free of it, folder-2, ...

    Raises ValueError where something would be lost: a checkpoint, or a row in the log."""
    free = folder
    i = 1
    while any(free.glob("*.pth")) or read_log(free):  # a log without rows is nothing to lose
        if not may_number:
            raise ValueError(
                f"name={folder.name}: {folder.resolve()} holds a run already; choose another "
                f"name, or go on with it: resume={folder}"
            )
        i += 1
        free = folder.with_name(f"{folder.name}-{i}")
    return free


def find_checkpoint(folder, resume, may_number):
    """Return the path that `resume` means, or None: there is no run at `folder` to go on with."""
    if resume is None:
        return None
    if resume == "auto":
        own = re.escape(folder.name) + (r"(-\d+)?" if may_number else "")  # digits, digits-2, ...
        paths = folder.parent.glob("*/last.pth")
        paths = [path for path in paths if re.fullmatch(own, path.parent.name)]
        return max(paths, key=lambda path: path.stat().st_mtime, default=None)
    path = Path(resume)
    return path / "last.pth" if path.is_dir() else path


class RunDir:
    """A writer of log.csv, last.pth, best.pth, step_*.pth, model.pth, samples/ and loss.png.

    A run that goes on from a checkpoint keeps the log next to it, up to its step."""

    def __init__(self, folder, resume_path=None, step=0):
        self.folder = folder.resolve()
        self.pending = []  # rows that are not in log.csv yet
        self.latest_loss = math.nan  # the newest one that was looked at
        old = read_log(resume_path.parent) if resume_path else []
        rows = [row for row in old if int(row["step"]) <= step]  # later ones are done again

        def write(path):
            with open(path, "w", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

        atomic_write(self.folder / "log.csv", write)

    def log_step(self, stats):
        """Remember a step's StepStats. On a GPU the losses stay there, and are checked at times.

        Raises FloatingPointError when a loss is not finite."""
        row = [stats.step, stats.epoch, stats.loss, stats.grad_norm, stats.lr, None]
        self.pending.append(row)
        if stats.loss.device.type == "cpu" or len(self.pending) % CHECK_EVERY == 0:
            self.check()

    def check(self):
        """Move the newest losses to the CPU. Raises FloatingPointError when one is not finite."""
        for row in self.pending[-CHECK_EVERY:]:
            row[2] = float(row[2])  # loss
            row[3] = float(row[3])  # gradient norm
            self.require_finite(row[2], "loss", row[0])
            self.latest_loss = row[2]

    def require_finite(self, loss, name, step):
        """Raise FloatingPointError, which says what may help, when a loss is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the {name} became {loss} at step {step}. Nothing was saved since "
                f"{self.folder / 'last.pth'}, if that is there. "
                "Try a lower lr, a smaller grad_clip, more warmup, or precision=fp32"
            )

    def write_log(self, test_loss=None):
        """Append the remembered steps to log.csv, the last with its test loss."""
        self.check()
        if self.pending:
            self.pending[-1][-1] = test_loss  # None leaves the cell empty
        with open(self.folder / "log.csv", "a", newline="") as f:
            writer = csv.writer(f)
            for row in self.pending:  # nine digits tell float32 numbers apart
                writer.writerow([f"{v:.9g}" if isinstance(v, float) else v for v in row])
        self.pending = []

    def save(self, trainer, keep):
        """Test the EMA model, write last.pth, step_*.pth and, if it is the best, best.pth.

        Of step_*.pth the newest `keep` stay. Returns a line that says what was done."""
        trainer.recalibrated_ema()  # BatchNorm statistics that belong to the EMA weights
        test_loss = trainer.test_loss()
        self.require_finite(test_loss, "test loss", trainer.step)
        self.write_log(test_loss)
        copies = []
        if trainer.best is None or test_loss < trainer.best:
            trainer.best = test_loss
            copies.append(self.folder / "best.pth")
        if keep:
            copies.append(self.folder / f"step_{trainer.step:08d}.pth")
        last = write_checkpoint(self.folder / "last.pth", checkpoint_state(trainer))
        for path in copies:  # the same bytes as last.pth
            atomic_write(path, partial(shutil.copyfile, last))
        for old in sorted(self.folder.glob("step_*.pth"))[: -keep or None]:  # keep=0: all
            old.unlink()
        paths = ", ".join(str(path) for path in [last, *copies])
        return f"step {trainer.step:,}: test loss {test_loss:.5f}, wrote {paths}"

    def save_interrupted(self, trainer):
        """Write last.pth between two regular saves, leaving no other trace. Returns its path."""
        self.write_log()
        trainer.recalibrated_ema()  # as in save, but nothing is tested
        return write_checkpoint(self.folder / "last.pth", checkpoint_state(trainer))

    def export(self, trainer):
        """Write model.pth: all that sampling needs, no more. Returns what was done, a line."""
        state = strip_training_state(checkpoint_state(trainer))
        path = write_checkpoint(self.folder / "model.pth", state)
        return f"step {trainer.step:,}: done, wrote {path} ({path.stat().st_size / 1e6:.1f} MB)"

    def write_samples(self, trainer):
        """Write the loss curve, and samples of the EMA model from fixed noise. Returns a line."""
        self.write_log()
        curve = to_pil(loss_curve(read_log(self.folder)))
        curve_path = atomic_write(self.folder / "loss.png", curve.save)
        dtype = sampling_dtype(None, trainer.precision, trainer.device)
        model = trainer.recalibrated_ema().for_inference(dtype)
        indices = torch.arange(SAMPLE_IMAGES if model.is_image else SAMPLE_POINTS)
        label = cycle_labels(model, indices)  # (N,) or None
        options = SamplerOptions().resolve(model)
        try:
            x0 = sample(model, indices, trainer.config.seed, label, **options)  # (N, *event)
        except FloatingPointError:  # of points, early in a run; the weights are finite
            return f"step {trainer.step:,}: samples are not finite yet, no image written"
        reference = None if model.is_image else trainer.dataset.test  # points say little alone
        image = grid_or_scatter(to_pixels(x0).cpu(), reference)
        path = atomic_write(self.folder / "samples" / f"step_{trainer.step:08d}.png", image.save)
        return f"step {trainer.step:,}: wrote {path}, {curve_path}"


def read_log(folder):
    """Return the rows of log.csv, dicts of strings, without a last row that a crash cut short."""
    path = folder / "log.csv"
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as f:  # a crash writes anything
        return [row for row in csv.DictReader(f) if None not in row.values()]
