"""How time and memory grow with the batch, the network, the images, the data and the processes.

python benchmarks/scaling.py [--only batch_size shards] [--quick]

Each measurement is a process of its own, so that its peak memory is its own: one thread, images of
noise, the network that images get. Exponents are fitted by least squares in log-log. From counts of
a step it says what a model of time makes of them, here and on many GPUs (docs/scaling.md). Prints
tables and writes them to JSON, with a figure; --only measures some again, and keeps the rest.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import ROOT, describe_machine, make_parser, timed, write_json
from _scaling_model import CASES, count_step, fit_times, predictions
from matplotlib.figure import Figure

from ddp.config import Config
from ddp.data import load_dataset
from ddp.distributed import TreeSum, broadcast, is_main, my_parts, sum_over_parts, world_size
from ddp.io.cli import add_flag, command
from ddp.io.device import select_device, select_precision
from ddp.io.memory import needed_memory
from ddp.training import Trainer

BASE = {"channels_base": 32, "batch_size": 64, "shards": 1}  # else what images get
SIDE, ITEMS = 32, 1000  # images are 3x32x32
SWEEPS = {  # what is changed -> its values
    "batch_size": (16, 32, 64, 128, 256),
    "channels_base": (16, 32, 64, 128),
    "image_size": (16, 32, 64, 128),
    "shards": (1, 2, 4, 8, 16, 32),
    "checkpoint_activations": (False, True),  # of images of 64x64
    "items": (10_000, 100_000, 1_000_000),
    "samples": (1_000, 10_000, 100_000),
    "processes": ("1x1", "1x2", "2x1", "2x1 fast"),  # processes x threads, of 2 shards
    "sums": (2**12, 2**16, 2**20, 2**24),  # float32 numbers summed over two processes
}
QUICK = {
    "batch_size": (4, 8),
    "channels_base": (8, 16),
    "image_size": (8, 16),
    "shards": (1, 2),
    "checkpoint_activations": (True,),
    "items": (100, 1000),
    "samples": (10, 20),
    "processes": ("1x1", "2x1"),
    "sums": (2**12,),
}
FITTED = ("batch_size", "channels_base", "image_size", "items", "samples")  # have an exponent
MODELLED = ("batch_size", "channels_base", "image_size", "shards")  # times that the model is of
MIN_SECONDS, REPETITIONS = 0.3, 5
SUMS = 20  # repetitions of a sum over processes


# ---- one measurement, in a process of its own ----


def status(field):
    """Return a number of bytes that Linux knows of this process, such as VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])  # in kB
    raise OSError(f"/proc/self/status has no {field}")


def make_data(folder, items, side):
    """Return the Dataset of a new .npy file of black images; a file of holes, it takes no disk."""
    path = Path(folder) / "images.npy"
    shape = (items, side, side, 3)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    return load_dataset(str(path))


def step_seconds(trainer, quick):
    """Return the seconds of a training step, the median over repetitions."""
    step = partial(trainer.train_step, 0.0)
    timed(step, 2, trainer.device)
    calls = math.ceil(MIN_SECONDS / timed(step, 1, trainer.device))
    calls = 1 if quick else broadcast(calls)  # all processes take the same number of steps
    seconds = []
    for _ in range(1 if quick else REPETITIONS):
        seconds.append(timed(step, calls, trainer.device) / calls)
    return statistics.median(seconds)


def measure_step(point, quick):
    """Return time, memory and counts of the training steps of a point, a dict."""
    device = select_device("auto")
    fields = {**BASE, **point["fields"]}
    with tempfile.TemporaryDirectory() as folder:
        tiny = {**fields, "batch_size": 2 * fields["shards"], "channels_base": 8}
        small = make_data(folder, 100, point["side"])
        Trainer(Config(dataset="noise", **tiny), small, device).train_step(0.0)  # loads libraries
        before = status("VmRSS") - status("RssFile")
        started = time.perf_counter()
        dataset = make_data(folder, point["items"], point["side"])
        loading = time.perf_counter() - started
        config = Config(dataset="noise", **fields).resolve(dataset)
        trainer = Trainer(config, dataset, device, select_precision(config.precision, device))
        seconds = step_seconds(trainer, quick)
        peak = status("VmHWM") - status("RssFile") - before
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        row = {"seconds": seconds, "bytes": peak, "load_seconds": loading}
        row["params"] = trainer.num_params
        row["estimate"] = sum(needed_memory(config, dataset, device).values())
        if world_size() == 1:
            row |= count_step(partial(trainer.train_step, 0.0))
    return row


def measure_sum(point, quick):
    """Return the seconds of a sum of one vector of each process, by the tree and by the backend."""
    vector = torch.zeros(point["size"])
    seconds = {}
    for reduce in ("tree", "fast"):
        tree = TreeSum()
        for part in my_parts(world_size()):
            tree.add(part, 1, vector)
        call = partial(sum_over_parts, tree, world_size(), len(vector), "cpu", reduce)
        timed(call, 2, vector.device)
        repeated = [timed(call, 1, vector.device) for _ in range(2 if quick else SUMS)]
        seconds[reduce] = statistics.median(repeated)
    return {"seconds": seconds["tree"], "fast_seconds": seconds["fast"]}


def measure(point, out, quick):
    function = measure_sum if "size" in point else measure_step
    row = function(point, quick)
    if is_main():
        Path(out).write_text(json.dumps(row))


# ---- all measurements ----


def point_of(sweep, value):
    """Return what the measurement of a value of a sweep is of, a dict of plain types."""
    point = {"fields": {}, "side": SIDE, "items": ITEMS, "processes": 1, "threads": 1}
    if sweep == "image_size":
        point["side"] = value
    elif sweep == "checkpoint_activations":
        point |= {"side": 2 * SIDE, "fields": {sweep: value}}
    elif sweep == "items":
        point["items"] = value
    elif sweep == "sums":
        point |= {"processes": 2, "size": value}
    elif sweep == "processes":
        numbers, *reduce = value.split()
        point["processes"], point["threads"] = map(int, numbers.split("x"))
        point["fields"] = {"shards": 2, "reduce": "fast" if reduce else "tree"}
    else:
        point["fields"] = {sweep: value}
    return point


def run_point(point, quick):
    """Return the row that `measure` writes in a new process, or in several of torchrun's."""
    words = [sys.executable]
    if point["processes"] > 1:
        words += ["-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc_per_node", str(point["processes"])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        words += [__file__, "--measure", json.dumps(point), "--out", str(out)]
        words += ["--quick"] if quick else []
        environment = os.environ | {"OMP_NUM_THREADS": str(point["threads"])}
        result = subprocess.run(words, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"{json.dumps(point)}: {result.stderr.strip().splitlines()[-1]}")
        return json.loads(out.read_text())


def generate(count):
    """Return the seconds and the peak memory of generate.py for so many samples."""
    checkpoint = ROOT / "checkpoints" / "digits.pth"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, ROOT / "generate.py", "--checkpoint", checkpoint]
        words += ["--out", Path(folder) / "samples.npz", "--num_samples", count, "--steps", 1]
        words = [str(word) for word in words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
            _, code, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode:
            raise OSError(f"generate.py ended with exit code {process.returncode}")
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "bytes": 1024 * usage.ru_maxrss}  # in kB on Linux


def run_sweep(sweep, values, quick):
    """Return the rows of a sweep, and print them as they come."""
    columns = [("seconds", "ms", 1e3), ("bytes", "MB", 1e-6), ("estimate", "estimated MB", 1e-6)]
    if sweep == "sums":
        columns = [("seconds", "ms", 1e3), ("fast_seconds", "ms, fast", 1e3)]
    print(f"\n{sweep:<24}" + "".join(f"{title:>14}" for _, title, _ in columns), flush=True)
    rows = []
    for value in values:
        row = generate(value) if sweep == "samples" else run_point(point_of(sweep, value), quick)
        rows.append({"value": value, **row})
        cells = [f"{unit * row[name]:14,.1f}" for name, _, unit in columns if name in row]
        print(f"{value!s:<24}" + "".join(cells), flush=True)
    return rows


def exponent(rows, name):
    """Return p of name ~ value^p, by least squares in log-log."""
    logs = [(math.log(row["value"]), math.log(row[name])) for row in rows]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def plot(sweeps):
    """Return a Figure of time and memory against what has an exponent; None: nothing has."""
    shown = [name for name in (*FITTED, "shards") if name in sweeps]
    if not shown:
        return None
    figure = Figure(figsize=(0.6 + 2.1 * len(shown), 4), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, sharex="col", sharey="row")
    for i, name in enumerate(shown):
        values = [row["value"] for row in sweeps[name]]
        for axes, what, unit in ((panels[0, i], "seconds", 1e3), (panels[1, i], "bytes", 1e-6)):
            axes.loglog(values, [unit * row[what] for row in sweeps[name]], "o-")
            axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[1, i].set_xlabel(name)
    panels[0, 0].set_ylabel("ms (samples: of all)")
    panels[1, 0].set_ylabel("MB")
    return figure


def summarize(results, quick):
    """Print and return exponents, what the model makes of the times, and its predictions."""
    sweeps = results["sweeps"]
    exponents = {}
    for name in FITTED:
        if name in sweeps:
            of_time, of_memory = (exponent(sweeps[name], what) for what in ("seconds", "bytes"))
            exponents[name] = {"seconds": of_time, "bytes": of_memory}
            print(f"{name}: time ~ {name}^{of_time:.2f}, memory ~ {name}^{of_memory:.2f}")
    results["exponents"] = exponents
    if "processes" in sweeps and "sums" in sweeps:
        results["two_processes"] = two_processes(sweeps["processes"], sweeps["sums"])
    if all(name in sweeps for name in MODELLED):
        fit = fit_times({name: sweeps[name] for name in MODELLED})
        results["model"] = fit
        print(*fit["lines"], sep="\n")
        cases = list(CASES)[: 1 if quick else None]
        results["predictions"] = predictions(cases, fit["seconds_per_op"])
        print(*results["predictions"]["lines"], sep="\n")


def two_processes(processes, sums):
    """Print and return what a step of two processes should take, by one and by sums, and takes.

    A sum of n numbers takes a latency, that of the fewest numbers measured, and 4 n bytes that each
    process sends (2 * 4 n (W - 1) / W, with W = 2)."""
    seconds = {row["value"]: row["seconds"] for row in processes}
    latency = sums[0]["seconds"]
    bandwidth = 4 * sums[-1]["value"] / max(sums[-1]["seconds"] - latency, 1e-9)
    summing = latency + 4 * processes[0]["params"] / bandwidth
    predicted = seconds["1x1"] / 2 + summing
    measured = seconds["2x1"]
    print(
        f"a sum over two processes takes {1e3 * latency:.2f} ms and {bandwidth / 1e9:.2f} GB/s, so "
        f"a step {1e3 * predicted:.1f} ms, of which {1e3 * summing:.1f} ms are the sum; measured: "
        f"{1e3 * measured:.1f} ms"
    )
    names = ("latency", "bandwidth", "summing", "predicted", "measured")
    return dict(zip(names, (latency, bandwidth, summing, predicted, measured), strict=True))


def parse(arguments=None):
    parser = make_parser(__doc__, "scaling.py")
    only = f"some of {', '.join(SWEEPS)} (default: all)"
    add_flag(parser, "only", nargs="+", choices=SWEEPS, default=list(SWEEPS), help=only)
    quick = "measure little: only to see that it runs"
    add_flag(parser, "quick", action="store_true", help=quick)
    add_flag(parser, "out", default="scaling.json", help="file for the tables")
    add_flag(parser, "measure", type=json.loads, help=argparse.SUPPRESS)  # a point, in a process
    return parser.parse_args(arguments)


def main(args):
    if args.measure:
        measure(args.measure, args.out, args.quick)
        return 0
    out = Path(args.out)
    torch.set_num_threads(1)  # as the measurements have, unless they say otherwise
    results = describe_machine(select_device("auto"))
    results["sweeps"] = json.loads(out.read_text())["sweeps"] if out.exists() else {}
    for sweep in args.only:
        values = (QUICK if args.quick else SWEEPS)[sweep]
        results["sweeps"][sweep] = run_sweep(sweep, values, args.quick)
        write_json(out, results)  # so that a run that is ended goes on with only the rest
    print()
    summarize(results, args.quick)
    write_json(out, results)
    figure = plot(results["sweeps"])
    if figure is not None:
        figure.savefig(out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
