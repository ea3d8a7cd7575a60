"""Where the time of a training step goes, and what it costs by batch, width and resolution.

python benchmarks/train_speed.py [--dataset mnist --data_dir PATH] [any other flag of train.py]

"alone" is forward and backward of each convolution of the step, over and over by itself: its
tensors stay in the cache if they fit, and what it copies counts, which in the step's table is among
the copies. Prints tables and writes them to JSON, with a figure."""

import argparse
import collections
import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
from ceilings import about, seconds_of
from matplotlib.figure import Figure
from script import exit_code
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ddp import config, data, device, profiling
from ddp.training import Trainer

COSTS = {
    "batch_size": (32, 64, 128, 256),
    "width": (16, 32, 48, 64),
    "resolution": (16, 28, 32, 64),
}
QUICK = {"batch_size": (4, 8), "width": (8, 16), "resolution": (8, 12)}
TIMING = {False: {}, True: {"least": 0.01, "repetitions": 1}}  # --quick
PROFILED = {False: 20, True: 2}  # steps
PICTURES = 1024  # of noise, in the place of a dataset of another resolution


def trainer_of(settings, dataset):
    where = device.pick_device(settings.device)
    precision = device.pick_precision(settings.precision, where)
    device.use_tf32(precision != "fp32")
    return Trainer(settings, dataset, where, precision)


def convolutions(model, function):
    """{(layer, shape, stride, dtype of the output, whether the input has a gradient): calls} in a
    call of function(); layers of one kind count as the first of them."""
    calls, layers = collections.Counter(), {}

    def record(layer, inputs, output):
        x, kind = inputs[0], layers.setdefault(repr(layer), layer)
        calls[kind, tuple(x.shape), x.stride(), output.dtype, x.requires_grad] += 1

    found = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_hook(record) for layer in found]
    function()
    for hook in hooks:
        hook.remove()
    return calls


def alone(layer, shape, stride, dtype, has_gradient, where, timing):
    """What one of `convolutions` takes by itself, as a row."""
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.empty_strided(shape, stride, dtype=dtype, device=where).normal_()
    wanted = [*layer.parameters()] + [x.requires_grad_()] * has_gradient
    gradient = torch.randn_like(layer(x))
    positions = gradient.numel() // layer.out_channels
    seconds = seconds_of(lambda: torch.autograd.grad(layer(x), wanted, gradient), where, **timing)
    flops = (2 + has_gradient) * 2 * positions * layer.weight.numel()
    row = dict(channels_in=layer.in_channels, channels_out=layer.out_channels)
    row.update(kernel=layer.kernel_size[0], height=shape[2], width=shape[3], batch=shape[0])
    return row | {"flops": flops, "seconds": seconds}


def step_of(trainer, quick):
    """What a step takes, what its convolutions do, and what those take alone, as a dict."""
    settings, where = trainer.config, trainer.device
    items = settings.batch_size * settings.grad_accumulation
    x0, label = trainer.training_batch(0, settings.batch_size, settings.noise_draws)
    level = torch.zeros(len(x0), device=where)  # whichever: no work depends on it

    def network():
        loss = trainer.unweighted(trainer.model, x0, label, level, 0, "train").mean()
        loss.backward()

    calls = convolutions(trainer.model, network)
    with FlopCounterMode(display=False) as counter:
        network()
    trainer.model.zero_grad()
    spent, batches = counter.get_flop_counts()["Global"], settings.grad_accumulation
    flops = batches * sum(spent.values())
    of_them = batches * sum(n for name, n in spent.items() if "convolution" in str(name))
    step = lambda: trainer.train_step(0.0)  # noqa: E731
    seconds, shares = profiling.measure(step, PROFILED[quick], where)
    print("", *profiling.lines(seconds, shares, items), sep="\n")
    print("\n     in    out kernel height  width  batch  calls   ms alone  GFLOP/s")
    rows = []
    for found, count in calls.items():
        rows.append(row := alone(*found, where, TIMING[quick]) | {"calls": batches * count})
        *shape, one, took, times = row.values()
        cells = "".join(f"{n:7}" for n in (*shape, times))
        print(f"{cells}{1e3 * took:11.3f}{one / took / 1e9:9.1f}", flush=True)
    inside = seconds * sum(s for (kind, _), s in shares.items() if kind == "convolutions")
    outside = sum(row["calls"] * row["seconds"] for row in rows)
    print(
        f"\nthe network takes {flops / 1e9:.2f} GFLOP a step, forward and backward, of which "
        f"convolutions {of_them / flops:.1%}",
        f"convolutions in the step: {1e3 * inside:.2f} ms, {of_them / inside / 1e9:.1f} GFLOP/s",
        f"convolutions alone: {1e3 * outside:.2f} ms, {of_them / outside / 1e9:.1f} GFLOP/s, "
        f"{outside / inside:.2f} of the time in the step",
        sep="\n",
    )
    found = dict(seconds=seconds, pictures_a_second=items / seconds, flops=flops)
    found.update(flops_of_convolutions=of_them, in_step=inside, alone=outside, layers=rows)
    shares = [{"kind": k, "part": part, "share": s} for (k, part), s in shares.items()]
    return found | {"shares": shares}


def costs(settings, dataset, quick):
    """Rows of what a step costs as one thing at a time is changed."""
    for name, values in (QUICK if quick else COSTS).items():
        print(f"\n{name:<12}    ms a step   pictures/s")
        for value in values:
            changed, shown = settings, dataset
            if name == "resolution":
                size = (min(PICTURES, len(dataset.train)), dataset.event[0], value, value)
                noise = torch.randint(256, size, dtype=torch.uint8)
                shown = dataclasses.replace(dataset, train=noise)
            else:
                changed = dataclasses.replace(settings, **{name: value})
            try:
                trainer = trainer_of(changed, shown)
            except ValueError as error:  # --attention names sizes that other pictures lack
                print(f"{value:<12} {error}")
                continue
            step = lambda t=trainer: t.train_step(0.0)  # noqa: E731
            seconds = seconds_of(step, trainer.device, **TIMING[quick])
            speed = changed.batch_size * changed.grad_accumulation / seconds
            print(f"{value:<12} {1e3 * seconds:12.2f} {speed:12,.0f}", flush=True)
            yield {"what": name, "value": value, "seconds": seconds, "pictures_a_second": speed}


def draw(rows):
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(COSTS), sharey=True), COSTS, strict=True):
        line = {r["value"]: r["pictures_a_second"] for r in rows if r["what"] == name}
        axes.loglog(line.keys(), line.values(), "o-")
        axes.set_xticks(list(line), map(str, line))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel(name)
    figure.axes[0].set_ylabel("pictures a second")
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    config.add_flags(parser, config.Config)
    parser.add_argument("--quick", action="store_true", default=False, help="to see that it runs")
    parser.add_argument("--out", default="train_speed.json")
    given = vars(parser.parse_args())
    quick, out = given.pop("quick"), Path(given.pop("out"))
    settings = config.Config(**given)
    found = about(device.pick_device(settings.device))
    dataset = data.load(**settings.data(), progress=tqdm)
    if settings.compile:
        raise ValueError("--compile: expected the network as it is, layer by layer")
    if not dataset.is_image:
        raise ValueError(f"--dataset {settings.dataset}: expected pictures")
    settings = settings.for_data(dataset)
    trainer = trainer_of(settings, dataset)
    print(*dataset.describe(), trainer.describe(), sep="\n")
    found |= {"config": dataclasses.asdict(settings), "step": step_of(trainer, quick)}
    if trainer.device.type == "cuda":
        found["gpu_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
        print(f"memory of the GPU: {found['gpu_bytes'] / 1e6:,.0f} MB")
    rows = list(costs(settings, dataset, quick))
    out.write_text(json.dumps(found | {"rows": rows}, indent=1))
    draw(rows).savefig(out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(exit_code("train_speed.py", main))
