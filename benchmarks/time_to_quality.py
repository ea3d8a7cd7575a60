"""Quality against minutes of training: ours and other packages, on the same data and cores.

python benchmarks/time_to_quality.py --data_dir PATH [--ours 1 2 5 10] [--minutes 30 --only ...]

Each of our budgets is a run of train.py of its own, since its learning rate falls to the end; a
peer is one run, looked at on the way (benchmarks/peers.py). All samples are files, and judged by
evaluate.py --samples. Prints a table and writes it to JSON, with a figure and the first samples."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peers
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from ddp import config, figures
from ddp.checkpoint import read

ROOT = Path(__file__).parent.parent
SHOWN = 64
FIGURES = ("frechet", "coverage", "named")  # of the judge


def python(script, *flags):
    """Seconds that a script of this project takes. Raises OSError when it fails."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError((done.stderr.splitlines() or [f"{script} failed"])[-1])
    return time.perf_counter() - started


def ours(minutes, args):
    """Train for so many minutes and draw samples -> a row."""
    name, checkpoint = f"ours-{minutes:g}", args.out / f"ours-{minutes:g}" / "model.pth"
    data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    python("train.py", *data, "--max_minutes", minutes, "--out_dir", args.out, "--name", name)
    file = checkpoint.with_name("samples.npz")
    draw = ["generate.py", "--checkpoint", checkpoint, "--num_samples"]
    first = python(*draw, 1, "--out", file.with_name("one.npz"))
    took = python(*draw, args.samples, "--out", file) - first  # without the start of Python
    state = read(checkpoint)
    speed = state["step"] * state["config"]["batch_size"] / (60 * minutes)
    row = {"who": "ours", "minutes": minutes, "file": str(file), "pictures_per_second": speed}
    return row | {"seconds_per_sample": took / args.samples}


def theirs(args):
    """Yield the rows of the peers, by benchmarks/peers.py."""
    flags = ["--data_dir", args.data_dir, "--minutes", args.minutes, "--samples", args.samples]
    flags += ["--out", args.out / "peers", "--environments", args.environments, "--only"]
    flags += [*args.only, "--at", *args.ours]
    flags += ["--constraint", args.constraint] if args.constraint else []
    if peers.main([str(flag) for flag in flags]):
        print("time_to_quality.py: a peer failed and is left out", file=sys.stderr)
    table = args.out / "peers" / "peers.json"
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    keys = ("minutes", "file", "pictures_per_second", "seconds_per_sample", "sampler", "recipe")
    for row in rows:
        yield {"who": row["peer"]} | {key: row[key] for key in keys}


def judged(row, args):
    """The row with what evaluate.py says of its samples."""
    out = args.out / "judged" / f"{row['who']}-{row['minutes']:g}"
    flags = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--metrics", "judge"]
    python("evaluate.py", "--samples", row["file"], *flags, "--out", out)
    space = json.loads((out / "evaluation.json").read_text())["subjects"][0]["quality"]["judge"]
    return row | {name: space[name] for name in FIGURES}


def line_of(row):
    distance, named = row["frechet"], row["named"]["samples"]["value"]
    ratio = distance["ratio"]["value"] if distance["ratio"] else float("nan")
    return (
        f"{row['who']:<15} {row['minutes']:7g} {row['pictures_per_second']:10.1f} "
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
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", help="(peers are for mnist alone)")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--ours", type=float, nargs="+", default=[1, 2, 5, 10], metavar="MINUTES")
    parser.add_argument("--minutes", type=float, default=30, help="of a peer's training")
    parser.add_argument("--only", nargs="*", choices=peers.PEERS, default=list(peers.PEERS))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--environments", type=Path, default=peers.ENVIRONMENTS)
    parser.add_argument("--constraint", type=Path, help="file of versions for pip")
    parser.add_argument("--out", type=Path, default="time_to_quality")
    args = parser.parse_args(arguments)
    if args.only and args.dataset != "mnist":
        parser.error(f"--dataset {args.dataset}: peers are for mnist; give --only without a name")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    print(f"{'who':<15} minutes pictures/s  ms/sample frechet (judge)  / floor  coverage   named")
    measured = itertools.chain(
        (ours(minutes, args) for minutes in args.ours), theirs(args) if args.only else ()
    )
    for row in measured:
        rows.append(judged(row, args))
        print(line_of(rows[-1]), flush=True)
        (args.out / "time_to_quality.json").write_text(json.dumps({"rows": rows}, indent=1))
        with np.load(row["file"]) as npz:
            first = torch.from_numpy(npz[npz.files[0]][:SHOWN])
        height, width = first.shape[1:3]
        picture = figures.overview(first.reshape(-1, 1, height, width))
        picture.save(args.out / f"{row['who']}-{row['minutes']:g}.png")
    draw(rows).savefig(args.out / "time_to_quality.png")
    return 0


def command(arguments=None):
    try:
        return main(arguments)
    except (Exception, KeyboardInterrupt) as error:
        code, line = config.verdict(error)
        print(f"time_to_quality.py: {line}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(command())
