"""What this machine can do: rates of matrix products, of 3x3 convolutions, and of memory.

python benchmarks/ceilings.py [--batch 128] [--channels 32 64] [--resolutions 14 28]

Convolutions are square, channels-last, without a bias. fp32 is PyTorch's default, so on a GPU
convolutions use TF32 and matrix products do not. Prints tables and writes them to JSON."""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from script import exit_code
from torch import nn

from ddp import config, device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHED = {"cpu": 2**18}  # bytes that lie in a core's own cache; elsewhere in the device's
CACHED_ELSEWHERE = 2**24


def seconds_of(function, where, least=0.2, repetitions=5):
    """Seconds of a call of function(): the median of repetitions of at least `least` seconds."""

    def timed(calls):
        device.wait(where)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        device.wait(where)
        return time.perf_counter() - started

    timed(1)  # what is prepared once is prepared here
    calls = 1
    while (spent := timed(calls)) < least:
        # the first calls tell little of how many fill the time: not too many at once
        calls *= math.ceil(min(10.0, max(2.0, 1.1 * least / spent)))
    return statistics.median([spent, *(timed(calls) for _ in range(repetitions - 1))]) / calls


def rate(function, amount, where, **timing):
    """Units of 1e9 a second, where a call of function() does `amount`: GFLOP/s, or GB/s."""
    return amount / seconds_of(function, where, **timing) / 1e9


def about(where):
    """What the figures hold for, a dict; printed, too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    found = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "fast_bf16": device.has_fast_bf16(where),
    }
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    return found


def convolution(channels, side, batch, dtype, where):
    """(forward, forward and backward, FLOPs of forward) of a 3x3 convolution."""
    layout = {"device": where, "dtype": dtype}
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **layout)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, **layout)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            layer(x)

    def both():
        torch.autograd.grad(layer(x), (x, layer.weight), gradient)

    return forward, both, 2 * 9 * channels**2 * side**2 * batch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--resolutions", type=int, nargs="+", default=[7, 14, 28])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--megabytes", type=int, default=512, help="far more than a cache holds")
    parser.add_argument("--seconds", type=float, default=0.2, help="least time of a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", default="ceilings.json")
    args = parser.parse_args()
    config.expect(args, batch=1, megabytes=1, repetitions=1)
    if min(*args.sizes, *args.channels, *args.resolutions) < 1:
        parser.error("--sizes, --channels, --resolutions: expected numbers above 0")
    where = device.pick_device(args.device)
    timing = {"least": args.seconds, "repetitions": args.repetitions}
    found, rows = about(where), []

    def add(what, values, **shape):
        rows.append({"what": what, **shape, **values})
        cells = [f"{v:10g}" for v in shape.values()] + [f"{v:14.1f}" for v in values.values()]
        print(f"{what:<16}" + "".join(cells), flush=True)

    print(f"\n{'GFLOP/s':<16}      size" + "".join(f"{name:>14}" for name in DTYPES))
    for size in args.sizes:
        values = {}
        for name, dtype in DTYPES.items():
            a = torch.randn(size, size, dtype=dtype, device=where)
            values[name] = rate(lambda a=a: a @ a, 2 * size**3, where, **timing)
        add("matrix product", values, size=size)
    names = [f"{name} {way}" for name in DTYPES for way in ("fwd", "fwd+bwd")]
    print(f"\n{'GFLOP/s':<16}  channels      side" + "".join(f"{name:>14}" for name in names))
    for channels, side in itertools.product(args.channels, args.resolutions):
        values = {}
        for name, dtype in DTYPES.items():
            forward, both, flops = convolution(channels, side, args.batch, dtype, where)
            values[f"{name} fwd"] = rate(forward, flops, where, **timing)
            values[f"{name} fwd+bwd"] = rate(both, 3 * flops, where, **timing)
        add("convolution", values, channels=channels, side=side)
    print(f"\n{'GB/s':<16}       MiB{'read + write':>14}")
    for size in (args.megabytes * 2**20, CACHED.get(where.type, CACHED_ELSEWHERE)):
        x = torch.zeros(size // 4, device=where)
        values = {"read + write": rate(lambda x=x: x.add_(1.0), 2 * size, where, **timing)}
        add("in-place add", values, MiB=size / 2**20)
    Path(args.out).write_text(json.dumps(found | {"rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code("ceilings.py", main))
