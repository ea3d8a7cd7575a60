"""Roofline of this machine: peak rates of matrix products, 3x3 convolutions and memory.

python benchmarks/roofline.py [--batch 128] [--channels 32 64] [--resolutions 14 28]

Convolutions are square, channels-last, without a bias. fp32 is PyTorch's default, so on a GPU
convolutions use TF32 and matrix products do not. Prints tables and writes them to JSON.
"""

import itertools
import sys
from functools import partial

import torch
from _common import describe_machine, make_parser, seconds_per_call, write_json
from torch import nn

from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import select_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHED_BYTES = {"cpu": 2**18}  # that lie in a core's own cache; elsewhere in the device's
CACHED_BYTES_ELSEWHERE = 2**24


def rate(
    function,  # () -> anything
    amount,  # FLOPs, or bytes, of a call
    device,
    **timing,  # of seconds_per_call
):
    """Return the rate in units of 1e9 a second: GFLOP/s, or GB/s."""
    return amount / seconds_per_call(function, device, **timing) / 1e9


def forward(layer, x):
    with torch.no_grad():
        layer(x)


def forward_backward(layer, x, gradient):
    torch.autograd.grad(layer(x), (x, layer.weight), gradient)


def matrix_products(sizes, device, timing):
    """Yield rows: rates in GFLOP/s of products of two square matrices."""
    for size in sizes:
        row = {"what": "matrix product", "size": size}
        for name, dtype in DTYPES.items():
            a = torch.randn(size, size, dtype=dtype, device=device)
            flops = 2 * size**3
            row[name] = rate(partial(torch.matmul, a, a), flops, device, **timing)
        yield row


def convolution(channels, side, batch, device, timing):
    """Return a row: rates in GFLOP/s of a 3x3 convolution, forward and with its backward pass."""
    row = {"what": "convolution", "channels": channels, "side": side}
    flops = 2 * 9 * channels**2 * side**2 * batch  # of the forward pass
    for name, dtype in DTYPES.items():
        layout = {"device": device, "dtype": dtype}
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **layout)
        layer.to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, side, side, **layout)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.randn_like(x)
        row[f"{name} fwd"] = rate(partial(forward, layer, x), flops, device, **timing)
        both = partial(forward_backward, layer, x, gradient)
        row[f"{name} fwd+bwd"] = rate(both, 3 * flops, device, **timing)
    return row


def memory(sizes, device, timing):
    """Yield rows: rates in GB/s of an addition in place, which reads and writes every byte."""
    for size in sizes:
        x = torch.zeros(size // 4, device=device)  # float32
        row = {"what": "in-place add", "MiB": size / 2**20}
        row["read + write"] = rate(partial(x.add_, 1.0), 2 * size, device, **timing)
        yield row


def print_row(row, shape_columns):
    """Print the name, the columns of the shape, such as a size, and the rates."""
    name, *numbers = row.values()
    cells = [f"{number:10g}" for number in numbers[:shape_columns]]
    cells += [f"{number:14.1f}" for number in numbers[shape_columns:]]
    print(f"{name:<16}" + "".join(cells), flush=True)


def parse(arguments=None):
    parser = make_parser(__doc__, "roofline.py")
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    whole = {"type": int, "nargs": "+", "metavar": "N"}
    sizes = "sizes of the matrices"
    add_flag(parser, "sizes", default=[256, 512, 1024, 2048], help=sizes, **whole)
    channels = "channels of the convolutions"
    add_flag(parser, "channels", default=[32, 64, 128, 256], help=channels, **whole)
    resolutions = "heights and widths of the convolutions"
    add_flag(parser, "resolutions", default=[7, 14, 28], help=resolutions, **whole)
    add_flag(parser, "batch", type=int, default=128, help="batch size of the convolutions")
    megabytes = "size of the tensor in memory: far more than a cache holds"
    add_flag(parser, "megabytes", type=int, default=512, help=megabytes)
    add_flag(parser, "seconds", type=float, default=0.2, help="least time of a repetition")
    add_flag(parser, "repetitions", type=int, default=5, help="repetitions of each measurement")
    add_flag(parser, "out", default="roofline.json", help="file for the tables")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, batch=1, megabytes=1, repetitions=1)
    for name in ("sizes", "channels", "resolutions"):
        smallest = min(getattr(args, name))
        if smallest < 1:
            raise ValueError(f"{name}={smallest}: expected numbers above 0")
    device = select_device(args.device)
    timing = {"min_seconds": args.seconds, "repetitions": args.repetitions}
    machine = describe_machine(device)
    rows = []

    print(f"\n{'GFLOP/s':<16}      size" + "".join(f"{name:>14}" for name in DTYPES))
    for row in matrix_products(args.sizes, device, timing):
        rows.append(row)
        print_row(row, 1)

    passes = ("fp32 fwd", "fp32 fwd+bwd", "bf16 fwd", "bf16 fwd+bwd")
    print(f"\n{'GFLOP/s':<16}  channels      side" + "".join(f"{name:>14}" for name in passes))
    for channels, side in itertools.product(args.channels, args.resolutions):
        row = convolution(channels, side, args.batch, device, timing)
        rows.append(row)
        print_row(row, 2)

    print(f"\n{'GB/s':<16}       MiB{'read + write':>14}")
    cached = CACHED_BYTES.get(device.type, CACHED_BYTES_ELSEWHERE)
    for row in memory((args.megabytes * 2**20, cached), device, timing):
        rows.append(row)
        print_row(row, 1)
    write_json(args.out, {**machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
