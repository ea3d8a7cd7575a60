"""Other diffusion packages, trained and sampled by their own recipes, on MNIST or CIFAR-10.

python benchmarks/baselines.py --data_dir PATH [--only diffusers] [--minutes 30] [--at 1 5 10 30]

Each baseline is installed as its README says, from the package index into an environment of its own
(PIP_CONSTRAINT or --constraint pins versions), and trained by benchmarks/baseline_recipes.py on the
items that train.py trains on, in fp32 or bf16, whichever is faster here. It is sampled by its own
sampler and by a fast one, if it has one, and the clock of its training stops meanwhile. For
evaluate.py --samples there are OUT/<baseline>/<minutes>-<steps>.npz; the rows of the table are in
OUT/baselines.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _common import make_parser
from baseline_recipes import BASELINES, PRECISIONS

from ddp.data import load_dataset
from ddp.io.cli import add_flag, command
from ddp.io.device import select_device

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENVIRONMENTS = CACHE / "ddp" / "baselines"


def run_lines(words, log):
    """Yield the lines that a command prints; OSError with the end of its log if it fails."""
    with log.open("a") as file:
        env = os.environ | {"TQDM_DISABLE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": file, "text": True, "env": env}
        with subprocess.Popen([str(word) for word in words], **pipes) as process:
            yield from process.stdout
    if process.returncode < 0:
        raise OSError(f"ended by signal {-process.returncode} ({log})")
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").split("\n")]
        lines = [line for line in lines if line] or ["it said nothing"]
        raise OSError(f"{lines[-1]} ({log})")


def run(words, log):
    """Return what a command prints; OSError with the end of its log if it fails."""
    return "".join(run_lines(words, log))


def install(baseline, args, log):
    """Return the python of the baseline's environment, which is made if it is not there."""
    folder = args.environments / baseline
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = folder / "installed.txt"
    if not installed.exists():
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        constraint = ["--constraint", args.constraint] if args.constraint else []
        packages = BASELINES[args.dataset][baseline].install
        print(f"{baseline}: installing into {folder}", file=sys.stderr)
        run([sys.executable, "-m", "venv", "--clear", folder], log)
        run([*pip, "install", "--quiet", *constraint, *packages], log)
        installed.write_text(run([*pip, "freeze"], log))
    return python


def measure(baseline, images, args):
    """Yield the rows of a baseline, each when it is there."""
    out = args.out / baseline
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    python = install(baseline, args, log)
    minutes = {m for m in args.at if m < args.minutes} | {args.minutes}
    words = [python, Path(__file__).with_name("baseline_recipes.py"), baseline]
    words += ["--dataset", args.dataset, "--images", images, "--device", args.device]
    words += ["--out", out, "--samples", args.samples, "--precision", args.precision]
    if args.batch_size:
        words += ["--batch_size", args.batch_size]
    if args.seconds_per_step:
        words += ["--seconds_per_step", args.seconds_per_step]
    words += ["--at", *sorted(minutes)]
    for line in run_lines(words, log):
        yield json.loads(line)


def line_of(row):
    """Return a row of the table as text."""
    sampler = "{name}, {steps} steps".format(**row["sampler"])
    return (
        f"{row['baseline']:<15} {row['minutes']:7g} {row['steps']:7d} {row['images']:10,} "
        f"{row['images_per_second']:10.1f} {row['parameters']:11,} {row['precision']:<5} "
        f"{sampler:<27} {1000 * row['seconds_per_sample']:9.1f}"
    )


def parse(arguments=None):
    parser = make_parser(__doc__, "baselines.py")
    data = "the dataset to train on (default: mnist)"
    add_flag(parser, "dataset", choices=list(BASELINES), default="mnist", help=data)
    add_flag(parser, "data_dir", default="data", help="where datasets lie (default: data)")
    only = "baselines to measure (default: all of the dataset)"
    add_flag(parser, "only", nargs="+", metavar="BASELINE", help=only)
    add_flag(parser, "minutes", type=float, default=30, help="minutes of training (default: 30)")
    at = "minutes of training after which to sample, too"
    default_at = [1, 2, 5, 10, 20, 30]
    add_flag(parser, "at", type=float, nargs="+", default=default_at, metavar="MINUTES", help=at)
    add_flag(parser, "samples", type=int, default=2000, help="samples each time (default: 2000)")
    add_flag(parser, "batch_size", type=int, help="batch size (default: the baseline's own)")
    precision = "of training and sampling, by autocast (default: the faster one)"
    choices = ("faster", *PRECISIONS)
    add_flag(parser, "precision", choices=choices, default="faster", help=precision)
    fixed = "count a training step as so many seconds, as measured when nothing else ran"
    add_flag(parser, "seconds_per_step", type=float, help=fixed)
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda (default: auto)")
    add_flag(parser, "constraint", type=Path, help="a file of package versions for pip")
    add_flag(parser, "out", type=Path, default=Path("baselines"), help="folder for the results")
    environments = "folder of the baselines' environments (default: in the user's cache)"
    add_flag(parser, "environments", type=Path, default=ENVIRONMENTS, help=environments)
    return parser.parse_args(arguments)


def check(args):
    """Raise ValueError for flags that cannot be used; the baselines that are left open are set."""
    known = list(BASELINES[args.dataset])
    args.only = args.only or known
    for name in args.only:
        if name not in known:
            raise ValueError(f"only={name}: for {args.dataset} there are {', '.join(known)}")
    for name in ("minutes", "at", "samples", "batch_size", "seconds_per_step"):
        value = getattr(args, name)
        if value is not None and np.min(value) <= 0:
            raise ValueError(f"{name}={np.min(value):g}: expected more than 0")


def compare(args):
    """Measure the baselines; return the names of those that failed."""
    # no baseline says that it runs on mps
    args.device = "cuda" if select_device(args.device).type == "cuda" else "cpu"
    table = args.out / "baselines.json"
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    dataset = load_dataset(args.dataset, args.data_dir)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images.npy")
        np.save(images, dataset.train.numpy())
        print(
            "baseline        minutes   steps     images  a second  parameters in    sampler"
            "                      ms/sample",
            flush=True,
        )
        for baseline in args.only:
            others = [row for row in rows if row["baseline"] != baseline]
            new = []
            try:
                for row in measure(baseline, images, args):
                    new.append(row)
                    rows = others + new
                    table.write_text(json.dumps({"rows": rows}, indent=1))
                    print(line_of(row), flush=True)
            except OSError as error:
                print(f"baselines.py: error: {baseline}: {error}", file=sys.stderr)
                failed.append(baseline)
    return failed


def main(args):
    check(args)
    return 1 if compare(args) else 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
