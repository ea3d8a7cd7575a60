"""Quality against minutes of training: ours and other packages, on the same data and cores.

python benchmarks/time_to_quality.py --data_dir PATH [--ours 1 2 5 10] [--minutes 30 --at 10]

Each of our budgets is a run of train.py of its own, since its learning rate falls to the end; a
peer is one run, looked at on the way (benchmarks/peers.py). All samples are files, and judged by
evaluate.py --samples. Prints a table and writes it to JSON, with a figure and the first samples."""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import peers
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from script import exit_code

from ddp import config, data, figures
from ddp.checkpoint import read
from ddp.evaluation import FEWEST

ROOT = Path(__file__).parent.parent
SHOWN, COLUMNS = 32, 4  # samples in a picture
FIGURES = ("frechet", "coverage", "named")  # of the judge


def python(script, *flags):
    """What a script of this project prints. Raises OSError when it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError((done.stderr.splitlines() or [f"{script} failed"])[-1])
    return done.stdout


def checkpoint_of(minutes, args):
    return args.out / f"ours-{minutes:g}" / "model.pth"


def ours(minutes, args):
    """Train for so many minutes, all that train.py does counted -> a row for each --steps."""
    checkpoint = checkpoint_of(minutes, args)
    source = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    if not checkpoint.exists():
        where = ["--out_dir", args.out, "--name", checkpoint.parent.name]
        python("train.py", *source, "--max_minutes", minutes, *where)
    state = read(checkpoint)
    speed = state["step"] * state["config"]["batch_size"] / (60 * minutes)
    for steps in args.steps:
        file = checkpoint.with_name(f"samples-{steps}.npz")
        file.unlink(missing_ok=True)
        draw = ["--num_samples", args.samples, "--steps", steps, "--out", file]
        said = python("generate.py", "--checkpoint", checkpoint, *draw)
        rate = float(re.search(r"([\d.]+) a second", said)[1])
        row = {"who": f"ours, {steps} steps", "minutes": minutes, "file": str(file)}
        yield row | {"pictures_per_second": speed, "seconds_per_sample": 1 / rate}


def flags_of_peers(args):
    flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--minutes", args.minutes]
    flags += ["--samples", args.samples, "--out", args.out / "peers"]
    flags += ["--environments", args.environments, "--only", *args.only, "--at", *args.at]
    flags += ["--constraint", args.constraint] if args.constraint else []
    return [str(flag) for flag in flags + ["--bf16"] * args.bf16]


def theirs(args):
    """Yield the rows of the peers, by benchmarks/peers.py, or as it left them."""
    if not args.reuse:
        peers.main(flags_of_peers(args))
    keys = ("minutes", "file", "pictures_per_second", "seconds_per_sample", "sampler", "recipe")
    for row in measured(args):
        yield {"who": row["peer"]} | {key: row[key] for key in keys}


def measured(args):
    """The rows that benchmarks/peers.py left of the peers --only."""
    table = args.out / "peers" / "peers.json"
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    return [row for row in rows if row["peer"] in args.only]


def check(args):
    """Raise ValueError for what would fail later, before anything is trained."""
    if args.only:
        peers.parse(flags_of_peers(args))
    config.expect(args, samples=FEWEST)
    for name in ("ours", "steps"):
        if any(value <= 0 for value in getattr(args, name)):
            raise ValueError(f"--{name}: expected numbers above 0")
    if not args.ours and not args.only:
        raise ValueError("--ours and --only without values leave nothing to measure")
    if len(set(args.ours)) < len(args.ours):
        raise ValueError("--ours: expected different minutes")
    dataset = data.load(args.dataset, args.data_dir)
    if not (dataset.is_image and dataset.classes):
        raise ValueError(f"--dataset {args.dataset}: expected pictures of several classes")
    if not args.reuse:
        for folder in (checkpoint_of(minutes, args).parent for minutes in args.ours):
            if folder.exists():
                raise ValueError(f"{folder} is there already; choose another --out, or --reuse it")
        return
    if missing := set(args.only) - {row["peer"] for row in measured(args)}:
        raise ValueError(f"--reuse: {args.out / 'peers'} has nothing of {', '.join(missing)}")
    for row in measured(args):
        with np.load(row["file"]) as npz:
            count = len(npz[npz.files[0]])
        if count != args.samples:
            raise ValueError(f"--reuse: {row['file']} has {count} samples, not {args.samples}")


def judged(row, args):
    """The row with what evaluate.py says of its samples."""
    flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--metrics", "judge"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "judged")
        python("evaluate.py", "--samples", row["file"], *flags, "--out", out)
        found = json.loads((out / "evaluation.json").read_text())["subjects"][0]
    space = found["quality"]["judge"]
    return row | {name: space[name] for name in FIGURES}


def line_of(row):
    distance, named = row["frechet"], row["named"]["samples"]["value"]
    ratio = distance["ratio"]["value"] if distance["ratio"] else float("nan")
    return (
        f"{row['who']:<16} {row['minutes']:7g} {row['pictures_per_second']:10.1f} "
        f"{1000 * row['seconds_per_sample']:10.2f} {distance['samples']['value']:9.3f} ± "
        f"{distance['samples']['error']:.3f} {ratio:8.1f} "
        f"{row['coverage']['samples']['value']:9.3f} {named:7.3f}"
    )


def draw(rows):
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = [row for row in rows if row["who"] == who]
        distances = [row["frechet"]["samples"]["value"] for row in mine]
        axes.loglog([row["minutes"] for row in mine], distances, "o-", label=who)
    floor = rows[0]["frechet"]["floor"]["value"]
    axes.axhline(floor, color="grey", linestyle=":", label="floor: real items")
    axes.set(xlabel="minutes of training", ylabel="Frechet distance, judge")
    minutes = sorted({row["minutes"] for row in rows})
    axes.set_xticks(minutes, [f"{m:g}" for m in minutes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", help="(peers are for mnist and cifar10)")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--ours", type=float, nargs="*", default=[1, 2, 5, 10], metavar="MINUTES")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 10], help="of our sampler")
    parser.add_argument("--minutes", type=float, default=30, help="of a peer's training")
    parser.add_argument("--at", type=float, nargs="+", default=[10], help="see benchmarks/peers.py")
    parser.add_argument("--only", nargs="*", metavar="PEER", help="without a name: ours alone")
    parser.add_argument("--bf16", action="store_true", help="autocast of the peers")
    parser.add_argument("--reuse", action="store_true", help="what was trained lies in OUT")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--environments", type=Path, default=peers.ENVIRONMENTS)
    parser.add_argument("--constraint", type=Path, help="file of versions for pip")
    parser.add_argument("--out", type=Path, default="time_to_quality")
    args = parser.parse_args(arguments)
    known = list(peers.PEERS.get(args.dataset, {}))
    args.only = known if args.only is None else args.only
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, grids = [], {}
    print(f"{'who':<16} minutes pictures/s  ms/sample frechet (judge)  / floor  coverage   named")
    sources = [*(ours(minutes, args) for minutes in args.ours), theirs(args) if args.only else ()]
    for row in itertools.chain.from_iterable(sources):
        rows.append(judged(row, args))
        print(line_of(rows[-1]), flush=True)
        (args.out / "time_to_quality.json").write_text(json.dumps({"rows": rows}, indent=1))
        with np.load(row["file"]) as npz:
            first = torch.from_numpy(npz[npz.files[0]][:SHOWN])
        first = first.reshape(*first.shape[:3], -1).movedim(-1, 1)
        title = f"{row['who']}, {row['minutes']:g} min"
        grids[title] = figures.grid(first, COLUMNS)
        figures.side_by_side(grids.values(), grids).save(args.out / "samples.png")
    draw(rows).savefig(args.out / "time_to_quality.png")
    if missing := set(args.only) - {row["who"] for row in rows}:
        raise OSError(f"left out, as it failed: {', '.join(missing)}")


def command(arguments=None):
    return exit_code("time_to_quality.py", main, arguments)


if __name__ == "__main__":
    sys.exit(command())
