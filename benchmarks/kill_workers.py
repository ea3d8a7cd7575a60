"""Whether a run under torchrun ends with the same bits when one of its processes is killed.

python benchmarks/kill_workers.py [--runs 10] [--processes 4] [--steps 60]

One run is left alone. In each of the others a process is killed by SIGKILL: by turns while it
starts, while the main one writes a checkpoint, and any process at any moment. torchrun starts all
anew, and they go on. Prints a table; writes it to JSON.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import ROOT, make_parser, write_json

from ddp.io.checkpoint import read_checkpoint
from ddp.io.cli import add_flag, command, require_at_least

MOMENTS = ("startup", "save", "any")
RUN = "--shards 4 --channels_base 8 --blocks_per_level 1 --class_cond --dropout 0.1 --save_every 5"
RUN += " --noise_dist importance --sample_every 1000 --keep_checkpoints 1 --name run"
PAUSE = 0.001  # seconds between two looks at a run
PATIENCE = 600  # seconds
NEAR_END = 0.8  # of the time that a run takes which is left alone: the others may be faster


class Launch:
    """A training of its own folder under torchrun, started now."""

    def __init__(self, folder, processes, steps):
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", 3]
        words += ["--nproc_per_node", processes, ROOT / "train.py", *RUN.split()]
        words += ["--max_steps", steps, "--out_dir", folder]
        self.folder = folder / "run"
        self.started = time.monotonic()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(word) for word in words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def seconds(self):
        return time.monotonic() - self.started

    def workers(self):
        """Return the ids of the processes that torchrun started, the main one first."""
        own = self.process.pid
        return [int(word) for word in Path(f"/proc/{own}/task/{own}/children").read_text().split()]

    def half_written(self):
        return list(self.folder.glob(".*.partial*"))

    def wait_until(self, is_so):
        while not is_so():
            if self.seconds() > PATIENCE or self.process.poll() is not None:
                raise OSError(f"the run ended too soon, or never:\n{self.text()}")
            time.sleep(PAUSE)

    def text(self):
        self.output.seek(0)
        return self.output.read()

    def wait(self):
        """Wait for the end; return the exit code."""
        return self.process.wait(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()  # it ends its workers


def tensors(state, path=""):
    """Yield (path, tensor) of every tensor in a checkpoint."""
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, (dict, list)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{path}.{key}")


def same_bits(folder, other):
    """Return whether two runs have the same log, and the same tensors in their last checkpoints."""
    if (folder / "log.csv").read_bytes() != (other / "log.csv").read_bytes():
        return False
    ours, theirs = (dict(tensors(read_checkpoint(x / "last.pth"))) for x in (folder, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def disturb(launch, moment, startup, end, processes):
    """Kill a process of a launch at a moment -> what was done, a dict; None if it was too late."""
    launch.wait_until(lambda: len(launch.workers()) == processes)
    victim = random.randrange(processes)
    if moment == "save":
        victim = 0
        launch.wait_until(lambda: (launch.folder / "log.csv").exists())
        saves = random.randrange(3)  # that are let pass
        for _ in range(saves):
            launch.wait_until(launch.half_written)
            launch.wait_until(lambda: not launch.half_written())
        launch.wait_until(launch.half_written)
    else:
        latest = startup if moment == "startup" else NEAR_END * end
        seconds = random.uniform(launch.seconds(), max(launch.seconds(), latest))
        launch.wait_until(lambda: launch.seconds() >= seconds)
    killed_at = launch.seconds()
    workers = launch.workers()
    if len(workers) < processes:  # they have ended before
        return None
    os.kill(workers[victim], signal.SIGKILL)
    left = len(launch.half_written())
    return {"moment": moment, "seconds": killed_at, "process": victim, "half_written": left}


def parse(arguments=None):
    parser = make_parser(__doc__, "kill_workers.py")
    add_flag(parser, "runs", type=int, default=10, help="that are disturbed (default: 10)")
    add_flag(parser, "processes", type=int, default=4, help="of a run (default: 4)")
    add_flag(parser, "steps", type=int, default=60, help="of a run (default: 60)")
    add_flag(parser, "seed", type=int, default=0, help="of the moments")
    add_flag(parser, "out", type=Path, default=Path("kill_workers.json"), help="JSON")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, runs=1, processes=2, steps=1)
    random.seed(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        alone = Launch(Path(scratch, "alone"), args.processes, args.steps)
        alone.wait_until(lambda: (alone.folder / "log.csv").exists())
        startup = alone.seconds()
        if alone.wait():
            raise OSError(f"the run that was left alone failed:\n{alone.text()}")
        end = alone.seconds()
        print(f"left alone: {end:.0f} s, of which the first step was begun after {startup:.0f} s")
        print("killed in    at s  process  half-written  went on from  exit code  same bits")
        while len(rows) < args.runs:
            moment = MOMENTS[len(rows) % len(MOMENTS)]
            folder = Path(tempfile.mkdtemp(dir=scratch))
            with Launch(folder, args.processes, args.steps) as launch:
                row = disturb(launch, moment, startup, end, args.processes)
                if row is None:
                    continue
                row["exit_code"] = launch.wait()
            found = [line for line in launch.text().splitlines() if line.startswith("resume: ")]
            row["from_step"] = int(found[-1].split("step ")[1].split(",")[0]) if found else 0
            row["same_bits"] = row["exit_code"] == 0 and same_bits(launch.folder, alone.folder)
            row["left_over"] = len(launch.half_written())
            print(
                f"{row['moment']:10s}{row['seconds']:7.1f}{row['process']:9d}"
                f"{row['half_written']:14d}{row['from_step']:14d}{row['exit_code']:11d}"
                f"  {'yes' if row['same_bits'] else 'NO'}"
            )
            if not row["same_bits"]:
                print(launch.text())
            rows.append(row)
    write_json(args.out, {"startup_seconds": startup, "seconds": end, "rows": rows})
    return 0 if all(row["same_bits"] and not row["left_over"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(command(main, parse))
