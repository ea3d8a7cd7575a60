"""What a run will be like before it is one: schedule, noise levels, memory, time of a step."""

import math
import time
from collections import Counter

import numpy as np
import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record_profile

from ddp.io.device import synchronize
from ddp.io.figures import schedule_curve, to_pil
from ddp.io.files import atomic_write, next_free_path
from ddp.loss import WEIGHTINGS
from ddp.rng import uniform
from ddp.schedule import MIN_LOG_SNR

MAX_TERMINAL_SNR = 1e-3  # above it the data shows through the noise from which sampling starts
LEVEL_ITEMS = 1 << 16  # noise levels sampled for the table
LEVEL_BINS = 12  # rows of the table
PROFILED_STEPS = 20
WARMUP_STEPS = 5
PARTS = ("batch", "forward", "backward", "optimizer", "the rest")
KINDS = {  # words in the names of PyTorch's operations, of which the first that matches counts
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "attention"),
    "normalization": ("batch_norm", "group_norm"),
    "activations": ("relu", "silu", "dropout"),
    "sums and products": ("add", "mul", "sub", "div", "sum", "lerp", "sqrt", "norm"),
    "copies": ("copy", "cat", "fill", "zero", "empty", "index", "shuffle"),
}
OTHER = "the rest"


def dry_run(
    trainer,  # takes one step
    folder,  # of the run; the figure is written next to it
):
    """One step, and lines of text: the schedule's ends, the weight of each noise level, memory."""
    schedule = trainer.model.schedule
    memory = memory_report(trainer)
    rows = noise_levels(trainer)
    lines = schedule_summary(trainer.config, schedule)
    lines.append("log-SNR    % of items  effective weight of |v_hat - v|² (largest = 1)")
    for log_snr, fraction, weight in rows:
        bar = "#" * round(30 * weight)
        lines.append(f"{log_snr:7.2f} {fraction:12.1%}  {weight:9.4f} {bar}")
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in memory.items())
    lines.append(f"memory: {sum(memory.values()) / 1e6:,.0f} MB: {parts}")
    t = torch.linspace(0, 1, 201)
    log_snr = schedule.log_snr(t).detach().cpu().clamp_min(MIN_LOG_SNR)  # (201,)
    image = to_pil(schedule_curve(t.tolist(), log_snr.tolist(), rows))
    path = next_free_path(folder.with_name(f"{folder.name}-dry_run"), ".png").resolve()
    atomic_write(path, image.save)
    lines.append(f"one step went well; wrote {path}, and nothing else")
    return lines


def schedule_summary(config, schedule):
    """Lines of text: the ends of the schedule, and a warning when the last is not noise alone."""
    clean = schedule.log_snr(0.0).item()
    noisy = schedule.log_snr(1.0).item()  # -inf with zero terminal SNR
    terminal_snr = math.exp(noisy)
    lines = [
        f"schedule: {schedule.name}, SNR {math.exp(clean):.3g} at the start, "
        f"terminal SNR {terminal_snr:.2g} (log-SNR {clean:.2f} to {noisy:.2f})"
    ]
    if terminal_snr > MAX_TERMINAL_SNR:
        shift = config.shift * math.sqrt(terminal_snr / MAX_TERMINAL_SNR) + 0.1
        advice = f"try shift={shift:.1f}"
        if config.prediction != "eps" and config.weighting != "vlb" and config.timesteps != 1:
            advice += " or zero_terminal_snr"
        lines.append(
            f"warning: the last level is not noise alone, {math.sqrt(terminal_snr):.1%} of the "
            f"data shows through, but sampling starts from noise; {advice}"
        )
    return lines


def noise_levels(trainer):
    """Rows (log_snr, fraction of training items, weight in the loss, at most 1), by log_snr.

    The weight is that of |v_hat - v|², which is about as large at every level: it is 1 + SNR times
    |x0_hat - x0|²."""
    config = trainer.config
    u = uniform(0, "test_log_snr", 0, torch.arange(LEVEL_ITEMS))
    log_snr, weight = trainer.noise_dist(trainer.model.schedule, u, config.weighting == "vlb")
    log_snr = log_snr.detach().double().cpu().clamp_min(MIN_LOG_SNR)  # (LEVEL_ITEMS,)
    weight = weight.detach().cpu() * WEIGHTINGS[config.weighting](log_snr) / (1 + log_snr.exp())
    low = log_snr.min() - 1e-6
    high = log_snr.max() + 1e-6
    edges = torch.linspace(low, high, LEVEL_BINS + 1, dtype=torch.float64)
    bin_index = torch.bucketize(log_snr, edges[1:-1])  # (LEVEL_ITEMS,)
    fraction = torch.bincount(bin_index, minlength=LEVEL_BINS) / LEVEL_ITEMS  # (LEVEL_BINS,)
    total = torch.bincount(bin_index, weights=weight, minlength=LEVEL_BINS)  # (LEVEL_BINS,)
    centers = (edges[1:] + edges[:-1]) / 2
    return torch.stack([centers, fraction.double(), total / total.max()], dim=1).tolist()


def memory_report(trainer):
    """Bytes that training takes, by what they are for: a dict. Takes one step to measure it."""
    saved = {}  # address -> bytes of what the backward pass needs

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        trainer.train_step(0.0)
    size = 0
    for weight in trainer.model.parameters():
        size += weight.nbytes
        saved.pop(weight.data_ptr(), None)  # weights are no activations
    moments = 0  # bytes of the optimizers' running averages
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            moments += sum(value.nbytes for value in state.values() if torch.is_tensor(value))
    return {
        "weights": size,
        "EMA": size,  # as large as the weights, and so are the gradients
        "gradients": size,
        "optimizer": moments,
        "activations": sum(saved.values()),
    }


def profile(trainer):
    """Lines of text: where the time of a training step goes."""

    def step():
        trainer.train_step(0.0)

    items = trainer.config.batch_size * trainer.config.grad_accumulation
    seconds, fractions = measure(step, PROFILED_STEPS, trainer.device)
    return [*time_table(seconds, fractions, items), "no checkpoint was written"]


def measure(
    step,  # () -> None
    count,  # calls to time, and calls to profile
    device,
):
    """(seconds of a step, {(kind, part): fraction of them}); on a GPU the fractions are its own."""
    on_gpu = device.type == "cuda"
    for _ in range(WARMUP_STEPS):  # kernels are chosen and memory is allocated in the first ones
        step()
    synchronize(device)  # a GPU works behind Python's back
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    seconds = (time.perf_counter() - started) / count
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with record_profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        synchronize(device)
    spent = Counter()  # (kind, part) -> microseconds
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time is also that of the operation that launched it
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.name), part_of(event)] += own
    total = sum(spent.values())  # in the step, on one clock
    return seconds, {cell: time / total for cell, time in spent.items()}


def kind_of(name):
    """The kind of an operation, by its name."""
    if name.startswith("aten::"):
        for kind, words in KINDS.items():
            if any(word in name for word in words):
                return kind
    return OTHER


def part_of(event):
    """The part of the step in which an operation ran: the span "part ..." around it."""
    while event is not None:
        if event.name.startswith("part "):
            return event.name.removeprefix("part ")
        if event.name.startswith("autograd::engine::evaluate_function"):
            return "backward"  # on a GPU in a thread of its own
        event = event.cpu_parent
    return OTHER


def time_table(
    seconds,  # and fractions: of `measure`
    fractions,
    items,  # in a step
):
    """Lines of text: a table of the kinds of operation in each part of a step."""
    parts_seen = {part for _, part in fractions}
    parts = [part for part in PARTS if part in parts_seen]
    titles = "".join(f"{title:>11}" for title in [*parts, "all"])
    lines = [
        f"a step takes {seconds * 1e3:.1f} ms, {items / seconds:,.0f} items a second; of it",
        f"{'':<20}{titles}",
    ]
    sums = np.zeros(len(parts))
    for kind in (*KINDS, OTHER):
        cells = np.array([fractions.get((kind, part), 0.0) for part in parts])
        sums += cells
        lines.append(table_row(kind, cells))
    return [*lines, table_row("all", sums)]


def table_row(title, cells):
    """One line of the table, with the sum of its cells."""
    return f"{title:<20}" + "".join(f"{cell:11.1%}" for cell in [*cells, sum(cells)])
