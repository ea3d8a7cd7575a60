"""Where the time of a training step goes: by kind of operation, in each part of the step."""

import collections
import time

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ddp.device import wait

PARTS = ("batch", "forward", "backward", "optimiser", "the rest")
KINDS = {  # words in the names of PyTorch's operations, the first that matches
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "attention"),
    "normalisation": ("batch_norm", "group_norm"),
    "activations": ("relu", "silu", "dropout"),
    "sums and products": ("add", "mul", "sub", "div", "sum", "lerp", "sqrt", "norm"),
    "copies": ("copy", "cat", "fill", "zero", "empty", "index", "shuffle"),
}
OTHER = "the rest"
WARM_UP = 5


def part(name):
    """A context: what happens in it is part `name` of a step."""
    return record_function(f"part {name}")


def kind_of(name):
    kinds = KINDS.items() if name.startswith("aten::") else ()
    return next((kind for kind, parts in kinds if any(w in name for w in parts)), OTHER)


def part_of(event):
    while event is not None:
        if event.name.startswith("part "):
            return event.name.removeprefix("part ")
        if event.name.startswith("autograd::engine::evaluate_function"):
            return "backward"  # on a GPU in a thread of its own
        event = event.cpu_parent
    return OTHER


def measure(step, count, device):
    """(seconds, {(kind, part): share}) of a call of step(): what it takes, from `count` calls, and
    where that goes, from `count` more under PyTorch's profiler: on a GPU the GPU's time."""
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP):
        step()
    wait(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    seconds = (time.perf_counter() - started) / count
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        wait(device)
    spent = collections.Counter()
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time is also that of the operation that launched it
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.name), part_of(event)] += own
    total = sum(spent.values())
    return seconds, {place: time / total for place, time in spent.items()}


def lines(seconds, shares, items):
    """What `measure` found of a step on so many items, as lines of text."""
    shown = [p for p in PARTS if any(where == p for _, where in shares)]
    rows = [f"a step takes {seconds * 1e3:.1f} ms, {items / seconds:,.0f} items a second; of it"]
    rows += [" " * 20 + "".join(f"{name:>11}" for name in (*shown, "all"))]
    for kind in (*KINDS, OTHER):
        cells = [shares.get((kind, p), 0.0) for p in shown]
        rows.append(f"{kind:<20}" + "".join(f"{c:11.1%}" for c in (*cells, sum(cells))))
    sums = [sum(s for (_, where), s in shares.items() if where == p) for p in shown]
    return [*rows, f"{'all':<20}" + "".join(f"{c:11.1%}" for c in (*sums, sum(sums)))]
