"""Quality against minutes of training: DDP and other packages, on the same data and cores.

python benchmarks/quality_vs_time.py --data_dir PATH [--ours 1 2 5 10] [--minutes 30 --at 10]

Each budget in --ours is a run of train.py of its own, since its learning rate falls to the end; a
baseline is one run, looked at on the way (benchmarks/baselines.py). All samples are files, measured
by evaluate.py --samples. Prints a table and writes it to JSON, with a figure and the first samples.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import baselines
import numpy as np
import torch
from _common import ROOT, make_parser, write_json
from matplotlib.ticker import NullLocator

from ddp.data import load_dataset
from ddp.io.checkpoint import read_checkpoint
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.figures import chart, grid, side_by_side
from ddp.metrics.evaluate import MIN_ITEMS

SHOWN = 32  # samples of each row in the image
COLUMNS = 4
MEASURES = ("fd", "coverage", "confident")  # in the classifier's features


def run_script(script, *flags):
    """Return what a script of this project prints. Raises OSError when it fails."""
    words = [sys.executable, str(ROOT / script)]
    words += [str(flag) for flag in flags]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.splitlines() or [f"{script} failed"]
        raise OSError(lines[-1])
    return result.stdout


def checkpoint_path(minutes, args):
    return args.out / f"ours-{minutes:g}" / "model.pth"


def our_rows(minutes, args):
    """Train for so many minutes, all that train.py does counted; yield a row for each of steps."""
    checkpoint = checkpoint_path(minutes, args)
    if not checkpoint.exists():
        data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
        folder = ["--out_dir", args.out, "--name", checkpoint.parent.name]
        run_script("train.py", *data, "--max_minutes", minutes, *folder)
    state = read_checkpoint(checkpoint)
    images_per_second = state["step"] * state["config"]["batch_size"] / (60 * minutes)
    for steps in args.steps:
        file = checkpoint.with_name(f"samples-{steps}.npz")
        file.unlink(missing_ok=True)
        flags = ["--num_samples", args.samples, "--steps", steps, "--out", file]
        printed = run_script("generate.py", "--checkpoint", checkpoint, *flags)
        samples_per_second = float(re.search(r"([\d.]+) a second", printed)[1])
        yield {
            "who": f"ours, {steps} steps",
            "minutes": minutes,
            "file": str(file),
            "images_per_second": images_per_second,
            "seconds_per_sample": 1 / samples_per_second,
        }


def baseline_args(args):
    """Return the flags of benchmarks/baselines.py, parsed."""
    flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--minutes", args.minutes]
    flags += ["--samples", args.samples, "--out", args.out / "baselines"]
    flags += ["--environments", args.environments, "--only", *args.only, "--at", *args.at]
    if args.constraint:
        flags += ["--constraint", args.constraint]
    if args.bf16:
        flags.append("--bf16")
    return baselines.parse([str(flag) for flag in flags])


def baseline_rows(args):
    """Return the rows of the baselines, measured by benchmarks/baselines.py or as it left them."""
    if not args.reuse:
        baselines.main(baseline_args(args))
    keys = ("minutes", "file", "images_per_second", "seconds_per_sample", "sampler", "recipe")
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
    for minutes in args.ours:
        folder = checkpoint_path(minutes, args).parent
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


def with_quality(row, args):
    """Return the row with what evaluate.py says of its samples."""
    flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--metrics", "classifier"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "evaluation")
        run_script("evaluate.py", "--samples", row["file"], *flags, "--out", out)
        evaluation = json.loads((out / "evaluation.json").read_text())
    measured = evaluation["subjects"][0]["classifier"]
    return row | {name: measured[name] for name in MEASURES}


def line_of(row):
    """Return a row of the table as text."""
    fd = row["fd"]["samples"]
    relative = row["fd"]["relative_to_real"]
    ratio = relative["value"] if relative else float("nan")
    coverage = row["coverage"]["samples"]["value"]
    confident = row["confident"]["samples"]["value"]
    return (
        f"{row['who']:<16} {row['minutes']:7g} {row['images_per_second']:10.1f} "
        f"{1000 * row['seconds_per_sample']:10.2f} {fd['value']:9.3f} ± {fd['error']:.3f} "
        f"{ratio:8.1f} {coverage:9.3f} {confident:10.3f}"
    )


def plot(rows):
    """Return a Figure of the Frechet distance against minutes of training."""
    label = "Frechet distance (FD) in classifier features"
    figure, axes = chart(4.5, xlabel="minutes of training", ylabel=label)
    curves = {}  # who -> minutes, distances
    for row in rows:
        minutes, distances = curves.setdefault(row["who"], ([], []))
        minutes.append(row["minutes"])
        distances.append(row["fd"]["samples"]["value"])
    for who, (minutes, distances) in curves.items():
        axes.loglog(minutes, distances, "o-", label=who)
    real_vs_real = rows[0]["fd"]["real_vs_real"]["value"]
    axes.axhline(real_vs_real, color="gray", linestyle=":", label="real vs real")
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
    ours = "minutes of training of each DDP run (default: 1 2 5 10)"
    add_flag(parser, "ours", nargs="*", default=[1, 2, 5, 10], help=ours, **minutes)
    steps = "sampling steps of DDP"
    add_flag(parser, "steps", type=int, nargs="+", default=[20, 10], metavar="N", help=steps)
    add_flag(parser, "minutes", default=30, help="minutes of a baseline's training", **minutes)
    at = "minutes of a baseline's training after which to sample, too"
    add_flag(parser, "at", nargs="+", default=[10], help=at, **minutes)
    only = "baselines to measure (default: all of the dataset; without a name: none)"
    add_flag(parser, "only", nargs="*", metavar="BASELINE", help=only)
    add_flag(parser, "bf16", action="store_true", help="run the baselines under bf16 autocast")
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
    for minutes in args.ours:
        yield from our_rows(minutes, args)
    if args.only:
        yield from baseline_rows(args)


def main(args):
    if args.only is None:
        args.only = list(baselines.BASELINES.get(args.dataset, {}))
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    grids = {}  # title -> image
    print(
        f"{'who':<16} minutes   images/s  ms/sample                FD  to real  coverage  confident"
    )
    for row in all_rows(args):
        rows.append(with_quality(row, args))
        print(line_of(rows[-1]), flush=True)
        write_json(args.out / "quality_vs_time.json", {"rows": rows})
        first = torch.from_numpy(read_samples(row["file"])[:SHOWN])
        first = first.reshape(*first.shape[:3], -1).movedim(-1, 1)  # (N, C, H, W)
        grids[f"{row['who']}, {row['minutes']:g} min"] = grid(first, COLUMNS)
        side_by_side(grids.values(), grids).save(args.out / "samples.png")
    plot(rows).savefig(args.out / "quality_vs_time.png")
    missing = set(args.only) - {row["who"] for row in rows}
    if missing:
        raise OSError(f"left out, as it failed: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
