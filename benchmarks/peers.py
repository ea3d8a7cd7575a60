"""Other packages for diffusion, trained and sampled by their own recipes, on MNIST or CIFAR-10.

python benchmarks/peers.py --data_dir PATH [--only diffusers] [--minutes 30] [--at 1 5 10 30]

Each peer is installed as its README says, from the package index into an environment of its own
(PIP_CONSTRAINT or --constraint pins versions), and trained by benchmarks/peer_recipes.py on the
items that train.py trains on. The clock of its training stops while it samples. For evaluate.py
--samples there are OUT/<peer>/<minutes>.npz; the rows of the table are in OUT/peers.json."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peer_recipes import PEERS
from script import exit_code

from ddp import data, device

ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddp" / "peers"


def run(command, log):
    """Yield what the command prints, line by line; OSError with the end of its log if it fails."""
    with log.open("a") as file:
        env = os.environ | {"TQDM_DISABLE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": file, "text": True, "env": env}
        with subprocess.Popen([str(part) for part in command], **pipes) as process:
            yield from process.stdout
    if process.returncode < 0:
        raise OSError(f"ended by signal {-process.returncode} ({log})")
    if process.returncode:
        said = log.read_text(errors="replace").split("\n")
        end = next((line for line in reversed(said) if line.strip()), "said nothing")
        raise OSError(f"{end.strip()} ({log})")


def environment(peer, args, log):
    """The python of the environment in which the peer is installed, by now."""
    folder = args.environments / peer
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = folder / "installed.txt"
    if not installed.exists():
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        constraint = ["--constraint", args.constraint] if args.constraint else []
        print(f"{peer}: installing into {folder}", file=sys.stderr)
        list(run([sys.executable, "-m", "venv", "--clear", folder], log))
        wanted = PEERS[args.dataset][peer].install
        list(run([*pip, "install", "--quiet", *constraint, *wanted], log))
        installed.write_text("".join(run([*pip, "freeze"], log)))
    return python


def measure(peer, pictures, args):
    """Yield the rows of a peer, each when it is there."""
    out = args.out / peer
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    python = environment(peer, args, log)
    command = [python, Path(__file__).with_name("peer_recipes.py"), peer, "--pictures", pictures]
    command += ["--out", out, "--samples", args.samples, "--sampler", args.sampler]
    command += ["--dataset", args.dataset, "--device", args.device]
    command += ["--batch_size", args.batch_size] if args.batch_size else []
    command += ["--bf16"] if args.bf16 else []
    command += ["--at", *sorted({m for m in args.at if m < args.minutes} | {args.minutes})]
    yield from map(json.loads, run(command, log))


def line_of(row):
    sampler = "{name}, {steps} steps".format(**row["sampler"])
    return (
        f"{row['peer']:<15} {row['minutes']:7g} {row['steps']:7d} {row['pictures']:10,} "
        f"{row['pictures_per_second']:10.1f} {row['parameters']:11,}  {sampler:<27} "
        f"{1000 * row['seconds_per_sample']:9.1f} {1000 * row['default_seconds_per_sample']:10.1f}"
    )


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=PEERS, default="mnist")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--only", nargs="+", metavar="PEER", help="(default: all of the dataset's)")
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument(
        "--at", type=float, nargs="+", default=[1, 2, 5, 10, 20, 30], help="minutes to sample after"
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument(
        "--sampler", choices=("fast", "default"), default="fast", help="of the peer, that draws"
    )
    parser.add_argument("--batch_size", type=int, help="(default: that of the peer's recipe)")
    parser.add_argument("--bf16", action="store_true", help="autocast; as they come, it is fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--constraint", type=Path, help="file of versions for pip")
    parser.add_argument("--out", type=Path, default="peers")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    args = parser.parse_args(arguments)
    args.only = args.only or list(PEERS[args.dataset])
    if unknown := set(args.only) - set(PEERS[args.dataset]):
        known = ", ".join(PEERS[args.dataset])
        parser.error(f"--only {' '.join(sorted(unknown))}: for {args.dataset} there are {known}")
    for flag in ("minutes", "at", "samples", "batch_size"):
        given = getattr(args, flag)
        if given is not None and np.min(given) <= 0:
            parser.error(f"--{flag} {np.min(given):g}: expected more than 0")
    return args


def main(arguments=None):
    args, failed = parse(arguments), False
    # no peer says that it runs on mps
    args.device = "cuda" if device.pick_device(args.device).type == "cuda" else "cpu"
    table = args.out / "peers.json"
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    dataset = data.load(args.dataset, args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures.npy")
        np.save(pictures, dataset.train.numpy())
        print(
            "peer            minutes   steps   pictures  a second  parameters  sampler"
            "                      ms/sample  by default",
            flush=True,
        )
        for peer in args.only:
            found = []
            try:
                for row in measure(peer, pictures, args):
                    found.append(row)
                    kept = [r for r in rows if r["peer"] != peer] + found
                    table.write_text(json.dumps({"rows": kept}, indent=1))
                    print(line_of(row), flush=True)
            except OSError as error:
                print(f"peers.py: error: {peer}: {error}", file=sys.stderr)
                failed = True
            rows = [r for r in rows if r["peer"] != peer] + found if found else rows
    return int(failed)


def command(arguments=None):
    return exit_code("peers.py", main, arguments)


if __name__ == "__main__":
    sys.exit(command())
