"""What a run writes into its folder: log.csv, checkpoints, pictures.

A run is worth more than its log or its pictures: where those cannot be written, it goes on.
"""

import contextlib
import csv
import io
import math
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

from ddp.distributed import broadcast, is_main, on_main
from ddp.io.board import Board
from ddp.io.checkpoint import (
    checkpoint_state,
    read_checkpoint,
    strip_training_state,
    write_checkpoint,
)
from ddp.io.device import sampling_dtype
from ddp.io.figures import loss_curve, save_png, to_pil
from ddp.io.files import atomic_write, move_to_free, shown_path
from ddp.io.run_dir import checkpoints, require_newest, take_folder
from ddp.io.run_lock import lock_folder
from ddp.io.run_log import COLUMNS, read_log
from ddp.io.run_page import loss_levels, write_page
from ddp.io.sample_batches import picture

CHECK_EVERY = 20  # steps between two looks at the losses on a GPU, where each look waits for it
FLUSH_SECONDS = 5  # between two writes to log.csv
# what a killed process leaves of the files below, see files.atomic_write
LEFTOVER = re.compile(r"\.(last|best|model|step_\d{8}|log|loss|report|config)\..+\.partial\.\w+")


class RunWriter:
    """A writer of log.csv, *.pth, samples/, loss.png and report.html.

    It holds the lock of the folder, run.json, until it is closed; a new run gets the next free
    folder when another process is in it. A run that goes on from a checkpoint keeps the log next to
    it, up to its step. Raises ValueError when the folder is in use."""

    def __init__(
        self,
        folder,  # as resolve_run returned it
        resume_path=None,  # the checkpoint to go on from
        step=0,  # its step
        may_number=False,  # whether a new run may be written to folder-2, ...
        warn=lambda line: None,  # a function of one line of text
    ):
        self.warn = warn
        self.warned = False  # that log.csv cannot be written
        self.pending = []  # rows that are not in log.csv yet
        self.numbered = []  # step_*.pth that this run wrote
        self.log_begun = False  # whether log.csv is there, to be appended to
        self.latest_loss = math.nan  # the newest one that was looked at
        self.flushed = time.monotonic()
        self.lock = None  # run.json, open, on the main process
        self.board = None  # TensorBoard's files
        self.folder = on_main(self.take, folder, resume_path, step, may_number)

    def take(self, folder, resume_path, step, may_number):
        """Take the folder, and go on with the log that is there -> the folder, resolved."""
        old = read_log(resume_path.parent) if resume_path else []
        rows = [row for row in old if int(row["step"]) <= step]  # later ones are done again
        goes_on = resume_path is not None and resume_path.parent.resolve() == folder.resolve()
        if goes_on:
            self.lock = lock_folder(folder)
            require_newest(resume_path, step)  # the other process may have ended just now
        else:
            folder, self.lock = take_folder(folder, may_number)
        self.folder = folder.resolve()
        self.pending = [list(row.values()) for row in rows]
        self.tidy(goes_on)
        self.flush_log()
        self.warned = False  # `warn` may be set only now; the next try tells
        # a file that a user put there stays
        saved = {f"step_{int(row['step']):08d}.pth" for row in rows if row["val_loss"]}
        self.numbered = [path for path in checkpoints(self.folder) if path.name in saved]
        return self.folder

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.board:
            self.board.close()
        if self.lock:
            self.lock.close()  # and with it ends the lock

    def tidy(self, goes_on):
        """Remove what a killed process left half written, and set aside the log of a dead run."""
        for path in [*self.folder.iterdir(), *self.folder.glob("samples/.*")]:
            if LEFTOVER.fullmatch(path.name):
                path.unlink()
        if not goes_on and read_log(self.folder):
            move_to_free(self.folder / "log.csv", self.folder / "log.csv")  # as log-2.csv

    def open_board(self, trainer):
        """Write TensorBoard's files from now on, on the main process."""
        if trainer.config.tensorboard and is_main():
            self.board = Board(self.folder, trainer.step)

    # ---- the log ----

    def log_step(self, stats):
        """Remember a step's StepStats; it is in log.csv within seconds.

        On a GPU the losses stay there, and are checked at times. Raises FloatingPointError when a
        loss is not finite."""
        row = [stats.step, stats.epoch, stats.loss, stats.grad_norm, stats.lr, None]
        self.pending.append(row)
        if stats.loss.device.type == "cpu" or len(self.pending) % CHECK_EVERY == 0:
            self.check()
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush_log(keep=1)  # the newest may still get a val_loss

    def check(self):
        """Move the newest losses to the CPU. Raises FloatingPointError when one is not finite."""
        for row in self.pending[-CHECK_EVERY:]:
            row[2] = float(row[2])  # loss
            row[3] = float(row[3])  # gradient norm
            if not math.isfinite(row[2]):
                self.give_up(f"the loss became {row[2]}", row[0])
            self.latest_loss = row[2]

    def give_up(self, reason, step):
        """Raise FloatingPointError, which says what may help."""
        last = self.folder / "last.pth"
        saved = (
            f"{shown_path(last)} is of before that" if last.exists() else "nothing was saved yet"
        )
        raise FloatingPointError(
            f"{reason} at step {step}, the run has diverged; {saved}. "
            "Try a lower lr, a smaller grad_clip, more warmup, or precision=fp32"
        )

    def flush_log(self, keep=0):
        """Write the remembered rows to log.csv, but for the last `keep`.

        Where that fails they stay for the next time, and a warning is told once: a run is worth
        more than its log."""
        self.check()
        self.flushed = time.monotonic()
        done = len(self.pending) - keep
        lines = io.StringIO(newline="")
        writer = csv.writer(lines)
        for row in self.pending[:done]:  # nine digits tell float32 numbers apart
            writer.writerow([f"{v:.9g}" if isinstance(v, float) else v for v in row])
        try:
            self.append_log(lines.getvalue())
        except OSError as error:
            if not self.warned:
                path = self.folder / "log.csv"
                self.warn(f"warning: {path} cannot be written ({error}); its rows are kept")
            self.warned = True
        else:
            self.warned = False
            if self.board:
                self.board.add_rows(self.pending[:done])
            del self.pending[:done]

    def append_log(self, text):
        """Append rows to log.csv, which is begun anew at first, and when it was removed."""
        if not is_main():
            return
        path = self.folder / "log.csv"
        if not (self.log_begun and path.exists()):
            text = ",".join(COLUMNS) + "\r\n" + text
            atomic_write(path, partial(Path.write_text, data=text, newline=""))
            self.log_begun = True
            return
        size = path.stat().st_size
        try:
            with open(path, "a", newline="") as f:
                f.write(text)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no row by halves
            raise

    # ---- checkpoints ----

    def save(self, trainer, keep, final=False):
        """Measure the EMA model, write last.pth, step_*.pth and, if it is the best, best.pth.

        Of the step_*.pth of this run the newest `keep` stay. Returns a line that says what was
        done. Raises FloatingPointError, and leaves all as it was, when the run has diverged, and
        OSError when the final checkpoints cannot be written; others are tried again later."""
        val_loss = self.measure(trainer)
        if self.pending:
            self.pending[-1][-1] = val_loss
        self.flush_log()
        try:
            paths = on_main(self.write_checkpoints, trainer, val_loss, keep)
        except OSError as error:
            if final:
                raise
            return f"warning: {error}; the run goes on, and is saved later"
        finally:
            trainer.best = broadcast(trainer.best)
        return f"step {trainer.step:,}: val loss {val_loss:.5f}, wrote {self.names(paths)}"

    def names(self, paths):  # of files within the run's folder, as text
        return ", ".join(str(path.relative_to(self.folder)) for path in paths)

    def write_checkpoints(self, trainer, val_loss, keep):
        """Write the checkpoints of a step, and remove those that are no longer kept -> paths."""
        is_best = trainer.best is None or val_loss < trainer.best
        state = checkpoint_state(trainer) | {"best": val_loss if is_best else trainer.best}
        new = [self.folder / f"step_{trainer.step:08d}.pth"] if keep else []
        # last.pth last: what came before it is written again when a run goes on from the old one
        paths = [self.folder / "best.pth"] * is_best + [*new, self.folder / "last.pth"]
        write_checkpoint(paths[0], state)
        trainer.best = state["best"]
        for path in paths[1:]:
            atomic_write(path, partial(shutil.copyfile, paths[0]))  # the same bytes
        written = sorted({*self.numbered, *new})
        count = max(0, len(written) - keep)
        for path in written[:count]:
            path.unlink(missing_ok=True)
        self.numbered = written[count:]
        return paths

    def measure(self, trainer):
        """Return the loss of the EMA model. Raises FloatingPointError when the run has diverged."""
        trainer.recalibrated_ema()  # BatchNorm statistics that belong to the EMA weights
        val_loss = trainer.val_loss()
        if trainer.is_diverged(val_loss):
            self.give_up(f"the val loss became {val_loss:.4g}", trainer.step)
        return val_loss

    def save_interrupted(self, trainer):
        """Write last.pth between two regular saves, leaving no other trace.

        Returns what was done, as text. Raises FloatingPointError, and leaves the last.pth of
        before, when the run has diverged."""
        self.measure(trainer)
        self.flush_log()
        path = on_main(self.write, "last.pth", trainer)
        text = f"stopped at step {trainer.step:,}, wrote {shown_path(path)}"
        exported = self.exported_step()
        if exported is not None:
            model = shown_path(self.folder / "model.pth")
            text += f"; {model} is still that of step {exported:,}"
        return text

    def exported_step(self):
        """Return the step of model.pth, or None where there is none that can be read."""
        try:
            return on_main(lambda: read_checkpoint(self.folder / "model.pth")["step"])
        except OSError:
            return None

    def write(self, name, trainer, change=lambda state: state):
        """Write a checkpoint of what `change` makes of the trainer's state -> path."""
        return write_checkpoint(self.folder / name, change(checkpoint_state(trainer)))

    def export(self, trainer):
        """Write model.pth: all that sampling needs, no more. Returns what was done, a line."""
        self.flush_log()
        path = on_main(self.write, "model.pth", trainer, strip_training_state)
        megabytes = path.stat().st_size / 1e6
        return f"step {trainer.step:,}: done, wrote {shown_path(path)} ({megabytes:.1f} MB)"

    # ---- pictures ----

    def write_samples(self, trainer):
        """Write the loss curve, and samples of the EMA model from fixed noise.

        Returns a line: what was done or, for a run is worth more than its pictures, what failed."""
        self.flush_log()
        trainer.recalibrated_ema()  # together
        return on_main(self.write_pictures, trainer)

    def write_pictures(self, trainer):
        """Write what `write_samples` says, on one process."""
        paths = [self.folder / "samples" / f"step_{trainer.step:08d}.png", self.folder / "loss.png"]
        try:
            rows = read_log(self.folder)  # another program may hold it
            curve = to_pil(loss_curve(rows)) if rows else None
            if curve:
                atomic_write(paths[1], partial(save_png, curve))
            atomic_write(paths[0], partial(save_png, draw_samples(trainer)))
        except FloatingPointError:  # of points, early in a run; the weights are finite
            return f"step {trainer.step:,}: samples are not finite yet, no image written"
        except OSError as error:
            return f"warning: a picture cannot be written ({error}); the run goes on"
        self.write_reports(trainer, rows, curve, paths[0])
        return f"step {trainer.step:,}: wrote {self.names(p for p in paths if p.exists())}"

    def write_reports(self, trainer, rows, curve, grid):
        """Write report.html and, if wanted, TensorBoard's files; where that fails, warn.

        rows: of log.csv. curve: the picture of the loss. grid: the path of that of samples."""
        try:
            levels = loss_levels(trainer)
            write_page(self.folder, trainer, rows, curve, levels)
            if self.board:
                self.board.add_samples(trainer, grid, levels)
        except Exception as error:
            self.warn(f"warning: report.html cannot be written ({error}); the run goes on")


def is_due(stats, every, times=10):
    """Return whether something is to be done after a step, of which `stats` tells.

    Every so many steps or, when that is None, so many times in the run."""
    if every:
        return stats.step % every == 0
    return int(times * stats.progress) > int(times * stats.previous_progress)


def draw_samples(trainer):
    """Return a PIL image of samples of the EMA model from fixed noise.

    Raises FloatingPointError when they are not finite."""
    dtype = sampling_dtype(None, trainer.precision, trainer.device)
    model = trainer.recalibrated_ema().for_inference(dtype)
    return picture(model, trainer.config.seed, trainer.dataset.classes, trainer.dataset)
