"""A run's folder: where it is, what is written there, and where a run goes on from."""

import csv
import math
import re
import shutil
from functools import partial
from pathlib import Path

import torch

from ddp import figures, profiling
from ddp.checkpoint import (
    TO_GO_ON,
    config_of,
    for_inference,
    read,
    replace,
    require,
    write,
)
from ddp.config import Config, Sampling, merged
from ddp.data import full_name, to_pixels
from ddp.device import sampling_dtype
from ddp.forward import uniform
from ddp.likelihood import NOISIEST
from ddp.loss import WEIGHTINGS
from ddp.output import free_path
from ddp.reverse import class_labels, final, generate

LEAK = 1e-3  # terminal SNR above which the data shows through the noise from which sampling starts
CHECK_EVERY = 20  # steps between two looks at the losses on a GPU, where each look waits for it
COLUMNS = ("step", "epoch", "loss", "grad_norm", "lr", "test_loss")
PROFILED = 20  # steps
GRID, POINTS = 64, 2000  # samples in the picture that is written as a run goes


def holds_run(folder):
    """Whether there is something to lose: a checkpoint, or a row in the log."""
    has_log = (folder / "log.csv").exists()
    return any(folder.glob("*.pth")) or (has_log and bool(read_log(folder)))


def new_folder(out_dir, name, dataset):
    """The folder for a new run: out_dir/name, or the first free of out_dir/dataset, dataset-2, ...

    Raises ValueError when a run of that name is there: nothing is ever overwritten."""
    out_dir = Path(out_dir)
    if name:
        if holds_run(out_dir / name):
            raise ValueError(
                f"--name {name}: {(out_dir / name).resolve()} holds a run already; choose another "
                f"name, or go on with it: --resume {out_dir / name}"
            )
        return out_dir / name
    folder, i = out_dir / dataset, 1
    while holds_run(folder):
        i += 1
        folder = out_dir / f"{dataset}-{i}"
    return folder


def settings(given, resume=None):
    """(config, checkpoint path, its contents) of a run from the flags `given` (a dict) and
    `--resume PATH|auto`; the last two are None when it starts afresh.

    A folder means its last.pth. `auto` means that of the named run, or of the one written last
    among dataset, dataset-2, ...; when there is none yet, it starts afresh."""
    if "dataset" in given:
        given["dataset"] = full_name(given["dataset"])
    fresh = Config(**given)
    if resume is None:
        return fresh, None, None
    path = Path(resume)
    if resume == "auto":
        own = re.compile(
            re.escape(fresh.name or run_name(fresh)) + ("" if fresh.name else r"(-\d+)?")
        )
        found = [p for p in Path(fresh.out_dir).glob("*/last.pth") if own.fullmatch(p.parent.name)]
        path = max(found, key=lambda p: p.stat().st_mtime, default=None)
        if path is None:
            return fresh, None, None
    elif path.is_dir():
        path = path / "last.pth"
    if not path.is_file() and path.parent.is_dir() and any(path.parent.glob("*.pth")):
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.pth")))
        raise OSError(f"there is no {path}; but there are {others}, to be given to --resume")
    state = read(path)
    if "optimizer" not in state:
        raise OSError(
            f"{path} was cut down for shipping; resume needs last.pth, best.pth or step_*.pth"
        )
    require(path, state, TO_GO_ON)
    return merged(config_of(state, path), given), path, state


def run_name(settings):
    """The name of an unnamed run: its dataset's."""
    dataset = Path(settings.dataset)
    return settings.name or (dataset.stem if dataset.is_file() else dataset.name)


def folder(settings, given, source=None, state=None):
    """The folder in which to run: a new one, or that of the checkpoint `source` unless the flags
    `given` name another. Raises ValueError when anything there would be overwritten."""
    if source is None:
        return new_folder(settings.out_dir, settings.name, run_name(settings))
    own = source.parent
    name, out_dir = given.get("name", own.name), Path(given.get("out_dir", own.parent))
    if (out_dir / name).resolve() != own.resolve():
        return new_folder(out_dir, name, name)
    last = own / "last.pth"
    try:
        newest = read(last)["step"]
    except OSError:  # absent or damaged: there is nothing to lose
        newest = 0
    if newest > state["step"]:
        raise ValueError(
            f"--resume {source} is at step {state['step']}, but {last} is at step {newest} and "
            "would be overwritten; resume that one, or give --name for a new run"
        )
    return own


def rehearse(trainer, folder):
    """One step, and what to know before the others: the ends of the schedule, how much each noise
    level counts, memory. Returns lines of text; the curves are drawn beside `folder`."""
    schedule, config = trainer.model.schedule, trainer.config
    memory = trainer.memory()
    clean, noisy = (schedule.log_snr(t).item() for t in (0.0, 1.0))
    ends = f"{math.exp(clean):.3g} at the start, terminal SNR {math.exp(noisy):.2g}"
    lines = [f"schedule: {schedule.name}, SNR {ends} (log-SNR {clean:.2f} to {noisy:.2f})"]
    if math.exp(noisy) > LEAK:
        shift = config.shift * math.exp(noisy / 2) / math.sqrt(LEAK) + 0.1
        allowed = config.predict != "eps" and config.weighting != "bound" and config.timesteps != 1
        zero = " or --zero_terminal_snr" if allowed else ""
        lines.append(
            f"warning: the last level is not noise alone, {math.exp(noisy / 2):.1%} of the data "
            f"shows through, but sampling starts from noise; try --shift {shift:.1f}{zero}"
        )
    u = uniform(0, "test", 0, torch.arange(1 << 16))
    levels, weight = schedule.levels(u, config.weighting == "bound")
    levels = levels.detach().double().cpu().clamp_min(NOISIEST)
    # of |v_hat - v|², which is of one size at all levels: it is 1 + SNR times |x0_hat - x0|²
    weight = weight.detach().cpu() * WEIGHTINGS[config.weighting](levels) / (1 + levels.exp())
    edges = torch.linspace(levels.min() - 1e-6, levels.max() + 1e-6, 13, dtype=torch.float64)
    which = torch.bucketize(levels, edges[1:-1])
    counts = torch.bincount(which, weights=weight, minlength=12)
    share = torch.bincount(which, minlength=12) / len(levels)
    columns = (edges[1:] + edges[:-1]) / 2, share, counts / counts.max()
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    lines += ["log-SNR  levels drawn  effective weight of |v_hat - v|², at most 1"]
    lines += [f"{level:7.2f} {s:12.1%}  {c:9.4f} {'#' * round(30 * c)}" for level, s, c in rows]
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in memory.items())
    lines.append(f"memory: {sum(memory.values()) / 1e6:,.0f} MB: {parts}")
    t = torch.linspace(0, 1, 201)
    curve = schedule.log_snr(t).detach().cpu().clamp_min(NOISIEST)
    picture = figures.image_of(figures.schedule(t.tolist(), curve.tolist(), rows))
    path = free_path(folder.with_name(f"{folder.name}-dry_run"), ".png").resolve()
    return [*lines, f"one step went well; wrote {replace(path, picture.save)}, and nothing else"]


def profile(trainer):
    """Where the time of a training step goes, as lines of text."""
    found = profiling.measure(lambda: trainer.train_step(0.0), PROFILED, trainer.device)
    items = trainer.config.batch_size * trainer.config.grad_accumulation
    return [*profiling.lines(*found, items), "no checkpoint was written"]


class Run:
    """The folder of one run: log.csv, last.pth, best.pth, step_*.pth, model.pth, samples/,
    loss.png.

    source: the checkpoint that it goes on from, at `step`; the log beside it is taken over up to
    there."""

    def __init__(self, folder, source=None, step=0):
        self.folder, self.pending, self.latest = folder.resolve(), [], math.nan
        old = read_log(source.parent) if source and (source.parent / "log.csv").exists() else []
        rows = [row for row in old if int(row["step"]) <= step]
        replace(self.folder / "log.csv", lambda path: write_log(path, rows))

    def add(self, step, epoch, loss, grad_norm, lr):
        """Remember a step. On a GPU loss and norm are still on their way, and looked at now and
        then only.

        Raises FloatingPointError when a loss was not finite."""
        self.pending.append([step, epoch, loss, grad_norm, lr, None])
        if loss.device.type == "cpu" or len(self.pending) % CHECK_EVERY == 0:
            self.check()

    def failure(self, reason):
        return FloatingPointError(
            f"{reason}. Nothing was saved since {self.folder / 'last.pth'}, if that is there. "
            "Try a lower --lr, a smaller --grad_clip, more --warmup, or --precision fp32"
        )

    def check(self):
        for row in self.pending[-CHECK_EVERY:]:
            row[2], row[3] = float(row[2]), float(row[3])
            if not math.isfinite(row[2]):
                raise self.failure(f"the loss became {row[2]} at step {row[0]}")
            self.latest = row[2]

    def flush(self, test_loss=None):
        """Write the remembered steps to log.csv, the last with its test loss."""
        self.check()
        if self.pending:
            self.pending[-1][-1] = test_loss
        with open(self.folder / "log.csv", "a", newline="") as f:
            rows = [
                [f"{v:.9g}" if isinstance(v, float) else v for v in row] for row in self.pending
            ]
            csv.writer(f).writerows(rows)
        self.pending = []

    def save(self, trainer, keep):
        """Test the EMA model and write last.pth, best.pth when it is the best, and a numbered
        checkpoint, of which the newest `keep` stay -> what was done, in a line."""
        trainer.average()
        test_loss = trainer.test_loss()
        if not math.isfinite(test_loss):
            raise self.failure(f"the test loss became {test_loss} at step {trainer.step}")
        self.flush(test_loss)
        is_best = trainer.best is None or test_loss < trainer.best
        trainer.best = test_loss if is_best else trainer.best
        state = trainer.state()
        paths = [self.folder / name for name in ["last.pth"] + ["best.pth"] * is_best]
        paths += [self.folder / f"step_{trainer.step:08d}.pth"] if keep else []
        last, *others = paths
        write(last, state)
        for path in others:
            replace(path, partial(shutil.copyfile, last))
        for old in sorted(self.folder.glob("step_*.pth"))[: -keep or None]:
            old.unlink()
        return (
            f"step {trainer.step:,}: test loss {test_loss:.5f}, wrote {', '.join(map(str, paths))}"
        )

    def pause(self, trainer):
        """Write last.pth between two regular saves, leaving no other trace -> its path."""
        self.flush()
        trainer.average()
        return write(self.folder / "last.pth", trainer.state())

    def finish(self, trainer):
        """Write model.pth, all that sampling needs and no more -> what was done, in a line."""
        path = write(self.folder / "model.pth", for_inference(trainer.state()))
        return f"step {trainer.step:,}: done, wrote {path} ({path.stat().st_size / 1e6:.1f} MB)"

    def draw(self, trainer):
        """Samples of the EMA model from fixed noise, and the loss curve so far, as pictures -> a
        line."""
        self.flush()
        dtype = sampling_dtype(None, trainer.precision, trainer.device)
        model = trainer.average().prepare_for_sampling(dtype)
        indices = torch.arange(GRID if model.is_image else POINTS)
        labels = class_labels(model, indices)
        options = Sampling().options(model)
        states = generate(model, indices, trainer.config.seed, labels, **options)
        items = to_pixels(final(states)).cpu()
        picture = figures.overview(items, None if model.is_image else trainer.dataset.test)
        curve = figures.image_of(figures.loss_curve(read_log(self.folder)))
        paths = (
            replace(self.folder / "samples" / f"step_{trainer.step:08d}.png", picture.save),
            replace(self.folder / "loss.png", curve.save),
        )
        return f"step {trainer.step:,}: wrote {', '.join(map(str, paths))}"


def read_log(folder):
    """The rows of log.csv, dicts of strings; a last row that a crash cut short is left out."""
    with open(folder / "log.csv", newline="", errors="replace") as f:
        return [row for row in csv.DictReader(f) if None not in row.values()]


def write_log(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
