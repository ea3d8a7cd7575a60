"""Where the time of a training step goes, and what it costs by batch, width and resolution.

python benchmarks/train_speed.py [--dataset mnist --data_dir PATH] [any other flag of train.py]

"alone" is forward and backward of each convolution of the step, over and over by itself: its
tensors stay in the cache if they fit, and what it copies counts, which in the step's table is among
the copies. Prints tables and writes them to JSON, with a figure.
"""

import argparse
import collections
import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch
from _common import describe_machine, make_parser, seconds_per_call, write_json
from matplotlib.figure import Figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ddp import blocks
from ddp.config import Config
from ddp.data import load_dataset
from ddp.forward import q_sample
from ddp.io.cli import add_config_flags, add_flag, add_plugin_flag, command
from ddp.io.device import select_device, select_precision, set_tf32
from ddp.io.diagnostics import measure, time_table
from ddp.loss import denoising_loss
from ddp.training import Trainer

COSTS = {
    "batch_size": (32, 64, 128, 256),
    "channels_base": (16, 32, 48, 64),
    "resolution": (16, 28, 32, 64),
}
QUICK_COSTS = {"batch_size": (4, 8), "channels_base": (8, 16), "resolution": (8, 12)}
QUICK_TIMING = {"min_seconds": 0.01, "repetitions": 1}
PROFILED_STEPS = 20
QUICK_STEPS = 2
NOISE_IMAGES = 1024  # in the place of a dataset of another resolution


@dataclasses.dataclass(frozen=True)
class ConvCall:
    """How a convolution is called: calls with equal fields take equal time."""

    layer: nn.Conv2d  # layers of one kind count as the first of them
    shape: tuple  # of the input, (B, C, H, W)
    stride: tuple  # of the input in memory
    dtype: torch.dtype  # of the output
    has_gradient: bool  # whether the input's gradient is computed


def make_trainer(config, dataset):
    device = select_device(config.device)
    precision = select_precision(config.precision, device)
    set_tf32(precision != "fp32")
    return Trainer(config, dataset, device, precision)


def forward_backward(trainer, x0, label):
    """Run the network forward and backward once, as a training step does."""
    config = trainer.config
    log_snr = torch.zeros(len(x0), device=trainer.device)  # whichever: no work depends on it
    x_t = q_sample(x0, log_snr, trainer.eps(0, x0))
    with trainer.autocast():
        x0_hat = trainer.model.denoise(x_t, log_snr, label)
    denoising_loss(x0_hat, x0, log_snr, config.weighting, config.loss).mean().backward()


def count_convolutions(
    model,
    function,  # () -> None, which runs the model
):
    """Return how often each ConvCall occurs in a call of function(), a Counter."""
    calls = collections.Counter()
    kinds = {}  # text -> the first layer of that kind

    def record(layer, inputs, output):
        x = inputs[0]
        kind = kinds.setdefault(repr(layer), layer)
        calls[ConvCall(kind, tuple(x.shape), x.stride(), output.dtype, x.requires_grad)] += 1

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(record))
    function()
    for hook in hooks:
        hook.remove()
    return calls


def measure_alone(call, device, timing):
    """Return a row: what one ConvCall takes by itself, forward and backward."""
    layer = copy.deepcopy(call.layer).to(call.dtype)
    x = torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device=device).normal_()
    inputs = [*layer.parameters()]  # of which gradients are computed
    if call.has_gradient:
        inputs.append(x.requires_grad_())
    gradient = torch.randn_like(layer(x))
    positions = gradient.numel() // layer.out_channels
    passes = 2 + call.has_gradient  # forward, gradient of the weight, and of the input
    seconds = seconds_per_call(
        lambda: torch.autograd.grad(layer(x), inputs, gradient), device, **timing
    )
    batch, _, height, width = call.shape
    return {
        "channels_in": layer.in_channels,
        "channels_out": layer.out_channels,
        "kernel": layer.kernel_size[0],
        "height": height,
        "width": width,
        "batch": batch,
        "flops": passes * 2 * positions * layer.weight.numel(),
        "seconds": seconds,
    }


def measure_layers(calls, batches, device, timing):
    """Print and return a row for each ConvCall, how often it occurs in a step included."""
    print("\n     in    out kernel height  width  batch  calls   ms alone  GFLOP/s")
    rows = []
    for call, count in calls.items():
        row = measure_alone(call, device, timing)
        row["calls"] = batches * count
        names = ("channels_in", "channels_out", "kernel", "height", "width", "batch", "calls")
        cells = "".join(f"{row[name]:7}" for name in names)
        speed = row["flops"] / row["seconds"] / 1e9
        print(f"{cells}{1e3 * row['seconds']:11.3f}{speed:9.1f}", flush=True)
        rows.append(row)
    return rows


def count_flops(function):
    """Return the FLOPs of a call of function(), and those of its convolutions.

    Without those of the zeros that blocks.SmallMapConv puts between images."""
    has_amx = blocks.HAS_AMX
    blocks.HAS_AMX = False
    with FlopCounterMode(display=False) as counter:
        function()
    blocks.HAS_AMX = has_amx
    flops = 0
    conv_flops = 0
    for name, count in counter.get_flop_counts()["Global"].items():
        flops += count
        if "convolution" in str(name):
            conv_flops += count
    return flops, conv_flops


def measure_step(trainer, quick):
    """Return what a step takes, what its convolutions do, and what they take alone, a dict."""
    config = trainer.config
    batches = config.grad_accumulation  # of a step
    items = config.batch_size * batches
    x0, label = trainer.training_batch(0, config.batch_size, config.noise_copies)
    network = partial(forward_backward, trainer, x0, label)
    calls = count_convolutions(trainer.model, network)
    flops, conv_flops = count_flops(network)
    trainer.model.zero_grad()
    steps = QUICK_STEPS if quick else PROFILED_STEPS
    seconds, fractions = measure(partial(trainer.train_step, 0.0), steps, trainer.device)
    print("", *time_table(seconds, fractions, items), sep="\n")
    layers = measure_layers(calls, batches, trainer.device, QUICK_TIMING if quick else {})
    table = []
    in_step = 0.0  # seconds of the convolutions
    for (kind, part), fraction in fractions.items():
        table.append({"kind": kind, "part": part, "fraction": fraction})
        if kind == "convolutions":
            in_step += seconds * fraction
    return {
        "seconds": seconds,
        "images_per_second": items / seconds,
        "flops": batches * flops,
        "conv_flops": batches * conv_flops,
        "in_step": in_step,
        "alone": sum(row["calls"] * row["seconds"] for row in layers),
        "layers": layers,
        "fractions": table,
    }


def summary(step):
    """Return lines of text: FLOPs of a step, and its convolutions in the step and alone."""
    conv_flops = step["conv_flops"]
    in_step = step["in_step"]
    alone = step["alone"]
    return [
        f"\nthe network takes {step['flops'] / 1e9:.2f} GFLOP a step, forward and backward, of "
        f"which convolutions {conv_flops / step['flops']:.1%}",
        f"convolutions in the step: {1e3 * in_step:.2f} ms, {conv_flops / in_step / 1e9:.1f} "
        "GFLOP/s",
        f"convolutions alone: {1e3 * alone:.2f} ms, {conv_flops / alone / 1e9:.1f} GFLOP/s, "
        f"{alone / in_step:.2f} of the time in the step",
    ]


def change(name, value, config, dataset):
    """Return the config and the dataset with one of COSTS changed."""
    if name != "resolution":
        return dataclasses.replace(config, **{name: value}), dataset
    size = (min(NOISE_IMAGES, len(dataset.train)), dataset.event[0], value, value)
    noise = torch.randint(256, size, dtype=torch.uint8)
    return config, dataclasses.replace(dataset, train=noise)


def costs(config, dataset, quick):
    """Yield rows of what a step costs as one thing at a time is changed."""
    for name, values in (QUICK_COSTS if quick else COSTS).items():
        print(f"\n{name:<13}   ms a step     images/s")
        for value in values:
            try:
                trainer = make_trainer(*change(name, value, config, dataset))
            except ValueError as error:  # attention_resolutions that other images lack
                print(f"{value:<12} {error}")
                continue
            step = partial(trainer.train_step, 0.0)
            seconds = seconds_per_call(step, trainer.device, **(QUICK_TIMING if quick else {}))
            items = trainer.config.batch_size * trainer.config.grad_accumulation
            speed = items / seconds
            print(f"{value:<12} {1e3 * seconds:12.2f} {speed:12,.0f}", flush=True)
            yield {"what": name, "value": value, "seconds": seconds, "images_per_second": speed}


def plot(rows):
    """Return a Figure of the speed against each of COSTS."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, name in zip(panels, COSTS, strict=True):
        speeds = {}  # value -> images per second
        for row in rows:
            if row["what"] == name:
                speeds[row["value"]] = row["images_per_second"]
        axes.loglog(speeds.keys(), speeds.values(), "o-")
        axes.set_xticks(list(speeds), [str(value) for value in speeds])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel(name)
    panels[0].set_ylabel("images per second")
    return figure


def parse(arguments=None):
    parser = make_parser(__doc__, "train_speed.py", argument_default=argparse.SUPPRESS)
    quick = "measure little: only to see that it runs"
    add_flag(parser, "quick", action="store_true", default=False, help=quick)
    add_flag(parser, "out", default="train_speed.json", help="file for the tables")
    add_config_flags(parser, Config)
    add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    overrides = dict(vars(args))
    overrides.pop("plugin", None)
    quick = overrides.pop("quick")
    out = Path(overrides.pop("out"))
    config = Config(**overrides)
    if config.compile:
        raise ValueError("compile=True: expected the network as it is, layer by layer")
    results = describe_machine(select_device(config.device))
    dataset = load_dataset(**config.data_options(), progress=tqdm)
    if not dataset.is_image:
        raise ValueError(f"dataset={config.dataset}: expected images")
    config = config.resolve(dataset)
    trainer = make_trainer(config, dataset)
    print(*dataset.describe(), sep="\n")
    print(
        f"network: {trainer.num_params:,} parameters on {trainer.device}, trained in "
        f"{trainer.precision}"
    )
    results["config"] = dataclasses.asdict(config)
    results["step"] = measure_step(trainer, quick)
    print(*summary(results["step"]), sep="\n")
    if trainer.device.type == "cuda":
        results["gpu_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
        print(f"memory of the GPU: {results['gpu_bytes'] / 1e6:,.0f} MB")
    results["rows"] = list(costs(config, dataset, quick))
    write_json(out, results)
    plot(results["rows"]).savefig(out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
