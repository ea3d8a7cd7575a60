"""Quality against minutes of training: DDP and other packages, on the same data and cores.

python benchmarks/quality_vs_time.py --data_dir PATH [--ours 2 10] [--minutes 10]

Each budget in --ours is a run of train.py of its own, since its learning rate falls to the end; so
is each budget of a baseline whose recipe anneals, any other is looked at on the way
(benchmarks/baselines.py). Figures are relative to real items in the place of samples, in the
features of the classifier of evaluate.py, of the images as they are and of the images with their
background removed: how dark the paper is counts for as much as what is written on it. Every row is
of one training. Prints a table and writes it to JSON, with a figure and the first samples.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import baselines
import numpy as np
import torch
from _common import ROOT, make_parser, write_json
from matplotlib.ticker import NullLocator
from samplers import FIGURES, Judge

from ddp.data import load_dataset
from ddp.io.checkpoint import read_checkpoint
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.figures import chart, grid, save_png, side_by_side
from ddp.metrics.evaluate import MIN_ITEMS
from ddp.sampling import DEFAULT_SAMPLER

SHOWN = 32  # samples of each row in the image
COLUMNS = 4


def run_script(script, *flags):
    """Return what a script of this project prints. Raises OSError when it fails."""
    words = [sys.executable, str(ROOT / script)]
    words += [str(flag) for flag in flags]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.splitlines() or [f"{script} failed"]
        raise OSError(lines[-1])
    return result.stdout


def checkpoint_path(minutes, precision, args):
    return args.out / f"ours-{minutes:g}-{precision}" / "model.pth"


def our_rows(minutes, precision, args):
    """Train for so many minutes, all that train.py does counted; yield a row for each of steps."""
    checkpoint = checkpoint_path(minutes, precision, args)
    if not checkpoint.exists():
        flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--precision", precision]
        flags += ["--out_dir", args.out, "--name", checkpoint.parent.name]
        run_script("train.py", *flags, "--max_minutes", minutes)
    state = read_checkpoint(checkpoint)
    images_per_second = state["step"] * state["config"]["batch_size"] / (60 * minutes)
    for steps in args.steps:
        file = checkpoint.with_name(f"samples-{steps}.npz")
        file.unlink(missing_ok=True)
        flags = ["--num_samples", args.samples, "--steps", steps, "--out", file]
        printed = run_script("generate.py", "--checkpoint", checkpoint, *flags)
        samples_per_second = float(re.search(r"([\d.]+) a second", printed)[1])
        yield {
            "who": "ours",
            "minutes": minutes,
            "steps": state["step"],
            "file": str(file),
            "images_per_second": images_per_second,
            "parameters": count_parameters(state["ema"]),
            "precision": precision,
            "sampler": {"name": DEFAULT_SAMPLER, "steps": steps},
            "seconds_per_sample": 1 / samples_per_second,
        }


def count_parameters(weights):
    """Return how many numbers a network's weights have, without what BatchNorm has averaged."""
    names = [name for name in weights if "running_" not in name and "num_batches" not in name]
    return sum(weights[name].numel() for name in names if weights[name].is_floating_point())


def baseline_args(args):
    """Return the flags of benchmarks/baselines.py, parsed."""
    flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--minutes", args.minutes]
    flags += ["--samples", args.samples, "--out", args.out / "baselines"]
    flags += ["--environments", args.environments, "--only", *args.only, "--at", *args.at]
    if args.constraint:
        flags += ["--constraint", args.constraint]
    return baselines.parse([str(flag) for flag in flags])


def baseline_rows(args):
    """Return the rows of the baselines, measured by benchmarks/baselines.py or as it left them."""
    if not args.reuse:
        baselines.main(baseline_args(args))
    keys = ("minutes", "steps", "file", "images_per_second", "parameters", "precision", "sampler")
    keys += ("seconds_per_sample", "recipe")
    rows = []
    for measured in measured_baselines(args):
        row = {"who": measured["baseline"]}
        for key in keys:
            row[key] = measured[key]
        rows.append(row)
    return rows


def measured_baselines(args):
    """Return the rows that benchmarks/baselines.py left of the chosen baselines."""
    table = args.out / "baselines" / "baselines.json"
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    return [row for row in rows if row["baseline"] in args.only]


def read_samples(file):
    """Return the samples in an .npz, (N, H, W[, C])."""
    with np.load(file) as npz:
        return npz[npz.files[0]]


def check(args):
    """Raise ValueError for what would fail later, before anything is trained."""
    if args.only:
        baselines.check(baseline_args(args))
    require_at_least(args, samples=MIN_ITEMS)
    for name in ("ours", "steps"):
        for value in getattr(args, name):
            if value <= 0:
                raise ValueError(f"{name}={value:g}: expected numbers above 0")
    if not args.ours and not args.only:
        raise ValueError("ours and only are both empty, which leaves nothing to measure")
    if len(set(args.ours)) < len(args.ours):
        raise ValueError("ours: expected different minutes")
    dataset = load_dataset(args.dataset, args.data_dir)
    if not (dataset.is_image and dataset.classes):
        raise ValueError(f"dataset={args.dataset}: expected images of several classes")
    if args.reuse:
        check_reused(args)
        return
    for minutes, precision in itertools.product(args.ours, args.precisions):
        folder = checkpoint_path(minutes, precision, args).parent
        if folder.exists():
            raise ValueError(f"{folder} exists; choose another out, or reuse it")


def check_reused(args):
    """Raise ValueError unless the chosen baselines are there, with as many samples as asked for."""
    rows = measured_baselines(args)
    missing = set(args.only) - {row["baseline"] for row in rows}
    if missing:
        raise ValueError(f"reuse: {args.out / 'baselines'} has nothing of {', '.join(missing)}")
    for row in rows:
        count = len(read_samples(row["file"]))
        if count != args.samples:
            raise ValueError(f"reuse: {row['file']} has {count} samples, not {args.samples}")


def read_images(file):
    """Return the images in an .npz, uint8 (N, C, H, W)."""
    images = torch.from_numpy(read_samples(file))
    return images.reshape(*images.shape[:3], -1).movedim(-1, 1)


def without_background(images):
    """Return uint8 images (N, C, H, W) whose border is 0 at its median; what is 255 stays so."""
    sides = (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1])
    border = torch.cat(sides, dim=-1).float()  # (N, C, pixels)
    level = border.median(dim=-1).values[..., None, None]  # (N, C, 1, 1)
    stretched = (images - level) * 255 / (255 - level).clamp_min(1)
    return stretched.clamp(0, 255).round().byte()


def with_quality(row, judge):
    """Return the row with its figures, plain and without background, relative to real items."""
    images = read_images(row["file"])
    row = row | {"plain": judge.relative(images)}
    if judge.real_images_are_dark:  # else a border is no background
        row["no_background"] = judge.relative(without_background(images))
    return row


def line_of(row):
    """Return a row of the table as text."""
    sampler = "{name}, {steps}".format(**row["sampler"])
    cells = []
    for kind in ("plain", "no_background"):
        figures = row.get(kind, {})
        cells.append(" ".join(f"{figures.get(name, float('nan')):9.3f}" for name in FIGURES))
    return (
        f"{row['who']:<15} {row['minutes']:7g} {row['steps']:6d} {row['images_per_second']:9.1f} "
        f"{row['parameters']:10,} {row['precision']:<5} {sampler:<20} "
        f"{1000 * row['seconds_per_sample']:9.2f} {' '.join(cells)}"
    )


def plot(rows):
    """Return a Figure of the Frechet distance against minutes of training."""
    kind = "no_background" if "no_background" in rows[0] else "plain"
    label = f"FD, {kind.replace('_', ' ')}, relative to real items"
    figure, axes = chart(4.5, xlabel="minutes of training", ylabel=label)
    curves = {}  # who -> minutes, distances
    for row in rows:
        name = "{who}, {precision}, {sampler[name]}, {sampler[steps]} steps".format(**row)
        minutes, distances = curves.setdefault(name, ([], []))
        minutes.append(row["minutes"])
        distances.append(row[kind]["fd"])
    for who, (minutes, distances) in curves.items():
        axes.loglog(minutes, distances, "o-", label=who)
    axes.axhline(1, color="gray", linestyle=":", label="real vs real")
    ticks = sorted({row["minutes"] for row in rows})
    axes.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend()
    return figure


def parse(arguments=None):
    parser = make_parser(__doc__, "quality_vs_time.py")
    data = "a dataset of images with labels; baselines are for mnist and cifar10 (default: mnist)"
    add_flag(parser, "dataset", default="mnist", help=data)
    add_flag(parser, "data_dir", default="data", help="where datasets lie (default: data)")
    minutes = {"type": float, "metavar": "MINUTES"}
    ours = "minutes of training of each DDP run (default: 2 10)"
    add_flag(parser, "ours", nargs="*", default=[2, 10], help=ours, **minutes)
    precisions = "of training, of each budget of DDP (default: auto)"
    choices = ("auto", "fp32", "bf16")
    add_flag(parser, "precisions", nargs="+", choices=choices, default=["auto"], help=precisions)
    steps = "sampling steps of DDP"
    add_flag(parser, "steps", type=int, nargs="+", default=[20, 10], metavar="N", help=steps)
    add_flag(parser, "minutes", default=30, help="minutes of a baseline's training", **minutes)
    at = "minutes of a baseline's training after which to sample, too"
    add_flag(parser, "at", nargs="+", default=[10], help=at, **minutes)
    only = "baselines to measure (default: all of the dataset; without a name: none)"
    add_flag(parser, "only", nargs="*", metavar="BASELINE", help=only)
    reuse = "use what an earlier call trained in the folder of results"
    add_flag(parser, "reuse", action="store_true", help=reuse)
    add_flag(parser, "samples", type=int, default=2000, help="samples of each row (default: 2000)")
    environments = "folder of the baselines' environments (default: in the user's cache)"
    add_flag(parser, "environments", type=Path, default=baselines.ENVIRONMENTS, help=environments)
    add_flag(parser, "constraint", type=Path, help="a file of package versions for pip")
    add_flag(parser, "out", type=Path, default=Path("quality_vs_time"), help="folder for results")
    return parser.parse_args(arguments)


def all_rows(args):
    """Yield the rows of DDP and of the baselines, each when it is there."""
    for minutes, precision in itertools.product(args.ours, args.precisions):
        yield from our_rows(minutes, precision, args)
    if args.only:
        yield from baseline_rows(args)


def main(args):
    if args.only is None:
        args.only = list(baselines.BASELINES.get(args.dataset, {}))
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(load_dataset(args.dataset, args.data_dir), "test", args.samples)
    rows = []
    grids = {}  # title -> image
    figures = " ".join(f"{name:>9}" for name in FIGURES)
    print(f"{'':<88} {'plain':<29} without background")
    print(
        f"{'who':<15} minutes  steps  images/s parameters in    {'sampler, steps':<20} ms/sample "
        f"{figures} {figures}"
    )
    for row in all_rows(args):
        rows.append(with_quality(row, judge))
        print(line_of(rows[-1]), flush=True)
        write_json(args.out / "quality_vs_time.json", {"real": judge.floor, "rows": rows})
        title = "{who}, {minutes:g} min, {sampler[steps]} steps".format(**row)
        grids[title] = grid(read_images(row["file"])[:SHOWN], COLUMNS)
        save_png(side_by_side(grids.values(), grids), args.out / "samples.png")
    plot(rows).savefig(args.out / "quality_vs_time.png")
    missing = set(args.only) - {row["who"] for row in rows}
    if missing:
        raise OSError(f"left out, as it failed: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
