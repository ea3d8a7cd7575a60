"""What every benchmark imports first: it finds ddp, times calls, and writes results."""

import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that ddp is found from anywhere
from ddp.io import cli
from ddp.optim import has_fast_bf16
from ddp.planning import synchronize

ROOT = Path(__file__).parent.parent  # of the repository


def make_parser(
    doc,  # the benchmark's docstring, of which the first line is shown
    script,  # its file name
    **options,  # of argparse.ArgumentParser
):
    """Return the ArgumentParser of a benchmark."""
    return cli.make_parser(doc.splitlines()[0], prog=f"benchmarks/{script}", **options)


def write_json(path, results):
    """Write results, a dict of plain types, with the version of PyTorch."""
    results = {"torch": torch.__version__, **results}
    Path(path).write_text(json.dumps(results, indent=1))


def timed(
    function,  # () -> anything
    calls,
    device,
):
    """Return the seconds that so many calls take together."""
    synchronize(device)  # a GPU works behind Python's back
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return time.perf_counter() - started


def seconds_per_call(
    function,  # () -> anything
    device,
    min_seconds=0.2,  # of a repetition, which makes as many calls as that takes
    repetitions=5,
):
    """Return the seconds of a call: the median over repetitions."""
    timed(function, 1, device)  # what is prepared once is prepared here
    calls = 1
    seconds = timed(function, calls, device)
    while seconds < min_seconds:
        # the first calls tell little of how many fill the time: not too many at once
        growth = min(10.0, max(2.0, 1.1 * min_seconds / seconds))
        calls *= math.ceil(growth)
        seconds = timed(function, calls, device)
    repeated = [seconds]
    for _ in range(repetitions - 1):
        repeated.append(timed(function, calls, device))
    return statistics.median(repeated) / calls


def cpu_name():
    """Return the model name of the CPU, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device):
    """Print what the numbers hold for, and return it as a dict."""
    machine = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "fast_bf16": has_fast_bf16(device),
    }
    for name, value in machine.items():
        print(f"{name}: {value}")
    return machine
