"""The weight gradient of convolutions on small feature maps: image by image, by rows of images.

python benchmarks/small_maps.py

One convolution of 64 channels in bfloat16 on the CPU, by the side of its map; and the step of
digits with and without ddp.blocks.SmallMapConv, in turn. See docs/training.md.
"""

import statistics
import sys
import time

import torch
from _common import describe_machine, make_parser, seconds_per_call, write_json

from ddp import blocks
from ddp.blocks import convolution_gradients, in_rows
from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import select_precision
from ddp.training import Trainer

CPU = torch.device("cpu")
BATCH, CHANNELS = 384, 64
SIDES = (3, 4, 5, 6, 7, 8, 14)


def time_gradients(side):
    """Return the milliseconds of the weight gradient of a map, plain and by rows."""
    shape = (BATCH, CHANNELS, side, side)
    x, grad = (torch.randn(shape).bfloat16() for _ in range(2))
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3).bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last)
    wanted = [False, True, False]

    def plain():
        return convolution_gradients(grad, x, weight, wanted)

    def by_rows():
        return convolution_gradients(in_rows(grad), in_rows(x), weight, wanted)

    return [1000 * seconds_per_call(function, CPU) for function in (plain, by_rows)]


def time_steps(pairs):
    """Return the milliseconds of a step of digits with and without rows, lists of `pairs`."""
    dataset = load_dataset("digits")
    config = Config(dataset="digits").resolve(dataset)
    trainer = Trainer(config, dataset, CPU, select_precision("auto", CPU))
    times = {True: [], False: []}
    for i in range(pairs + 1):  # the first is not counted
        for by_rows in times:
            blocks.HAS_AMX = by_rows
            started = time.perf_counter()
            trainer.train_step(0.0)
            if i > 0:
                times[by_rows].append(1000 * (time.perf_counter() - started))
    return times[True], times[False]


def parse(arguments=None):
    parser = make_parser(__doc__, "small_maps.py")
    add_flag(parser, "pairs", type=int, default=50, help="pairs of steps (default: 50)")
    add_flag(parser, "out", default="small_maps.json", help="JSON (default: small_maps.json)")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, pairs=1)
    results = {"machine": describe_machine(CPU), "amx": blocks.HAS_AMX, "gradient_ms": {}}
    print(f"AMX: {blocks.HAS_AMX}")
    print("| side | plain, ms | by rows, ms | ratio |\n|---|---|---|---|")
    for side in SIDES:
        plain, by_rows = time_gradients(side)
        results["gradient_ms"][side] = [plain, by_rows]
        print(f"| {side} | {plain:.2f} | {by_rows:.2f} | {by_rows / plain:.2f} |")
    with_rows, without = time_steps(args.pairs)
    ratio = statistics.median(a / b for a, b in zip(with_rows, without, strict=True))
    results["step_ms"] = [statistics.median(with_rows), statistics.median(without)]
    results["step_ratio"] = ratio
    print("a step of digits: {:.0f} ms by rows, {:.0f} plain".format(*results["step_ms"]))
    print(f"the median ratio of {args.pairs} pairs in turn: {ratio:.2f}")
    write_json(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
