"""What a run will be like before it is one: schedule, noise levels, memory, time of a step."""

import math
import time
from collections import Counter
from functools import partial

import torch
from torch.profiler import profile as record_profile

from ddp.data import to_data
from ddp.forward import q_sample
from ddp.io.figures import save_png, schedule_curve, side_by_side, to_pil
from ddp.io.files import atomic_write, next_free_path, shown_path
from ddp.io.item_figures import draw_items, room, strip
from ddp.io.memory import training_memory
from ddp.loss import WEIGHTINGS
from ddp.planning import synchronize
from ddp.rng import normal, uniform
from ddp.schedule import MIN_LOG_SNR

MAX_TERMINAL_SNR = 1e-3  # above it the data shows through the noise from which sampling starts
LEVEL_ITEMS = 1 << 16  # noise levels sampled for the table
LEVEL_BINS = 12  # rows of the table
NOISED_ITEMS, NOISED_TIMES = 8, 8  # in the picture of the forward network
PROFILED_STEPS = 20
TIMED_STEPS = 3  # by a dry run
WARMUP_STEPS = 5  # in which kernels are chosen and memory is allocated
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


def dry_run(trainer, folder):
    """Yield lines of text: memory, the schedule's ends, its noise levels; then take some steps.

    Each line is known before what comes after it is tried. Figures of the schedule and of training
    items are written next to `folder`, that of the run."""
    schedule = trainer.model.schedule
    memory = memory_report(trainer)
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in memory.items())
    yield f"memory: about {sum(memory.values()) / 1e6:,.0f} MB: {parts or 'not known'}"
    yield "besides that of Python and PyTorch themselves, some 500 MB on a CPU"
    yield from schedule_summary(trainer.config, schedule)
    rows = noise_levels(trainer)
    yield "log-SNR    % of items  effective weight of |v_hat - v|² (largest = 1)"
    for log_snr, fraction, weight in rows:
        bar = "#" * round(30 * weight)
        yield f"{log_snr:7.2f} {fraction:12.1%}  {weight:9.4f} {bar}"
    yield duration(trainer)
    t = torch.linspace(0, 1, 201)  # for the curve
    log_snr = schedule.log_snr(t).detach().cpu().clamp_min(MIN_LOG_SNR)  # (201,)
    curve = to_pil(schedule_curve(t.tolist(), log_snr.tolist(), rows))
    paths = []
    for name, image in (("dry_run", curve), ("items", training_items(trainer))):
        path = next_free_path(folder.with_name(f"{folder.name}-{name}"), ".png")
        atomic_write(path, partial(save_png, image))
        paths.append(path)
    yield f"all went well; wrote {shown_path(paths[0])},"
    yield f"and {shown_path(paths[1])}: items as the network will see them; and nothing else"


def duration(trainer):
    """Take a few steps; return a line that says how long they take, and how long the run will."""
    step = partial(trainer.train_step, 0.0)
    repeat(step, 1, trainer.device)  # it sets the device up
    seconds = repeat(step, TIMED_STEPS, trainer.device) / TIMED_STEPS
    text = f"time: about {1e3 * seconds:,.0f} ms a step"
    if trainer.num_steps is None:  # the clock governs it
        minutes = trainer.config.max_minutes
        return f"{text}, {60 * minutes / seconds:,.0f} steps in {minutes:g} minutes"
    minutes = seconds * trainer.num_steps / 60
    return f"{text}, {minutes:,.1f} minutes for {trainer.num_steps:,} steps, and saving"


def training_items(trainer):
    """Return a PIL image of training items: cropped, scaled and augmented as in a run.

    Right of images the first few, as the forward network noises them."""
    dataset = trainer.dataset
    count = min(trainer.config.batch_size, room(dataset.event), len(dataset.train))
    x0, _ = trainer.training_batch(0, count)  # (count, *event)
    x0, _ = trainer.augmented(0, x0)
    items = to_data(x0.cpu(), trainer.dataset.units)
    image = draw_items(items)
    if not trainer.model.is_image:
        return image
    few = x0[:NOISED_ITEMS]
    eps = normal(trainer.config.seed, "train_eps", 0, torch.arange(len(few)), few.shape[1:])
    levels = trainer.model.schedule.log_snr(torch.linspace(1, 0, NOISED_TIMES)).detach().cpu()
    states = []
    for log_snr in levels.float():
        x_t = q_sample(few.cpu(), log_snr, eps)  # (NOISED_ITEMS, *event)
        states.append(to_data(x_t, trainer.dataset.units))
    noised = strip(states, levels.tolist(), items, end="data")
    return side_by_side([image, noised], ["training items", "noised, by log-SNR"])


def schedule_summary(config, schedule):
    """Return lines of text: the schedule's ends, and a warning if the last is not noise alone."""
    clean = schedule.log_snr(0.0).item()  # at t = 0
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
    """Return rows (log_snr, fraction of training items, weight in the loss, at most 1).

    The weight is that of |v_hat - v|², which is about as large at every level: it is 1 + SNR times
    |x0_hat - x0|²."""
    config = trainer.config
    u = uniform(0, "test_log_snr", 0, torch.arange(LEVEL_ITEMS))
    log_snr, weight = trainer.noise_dist(trainer.model.schedule, u, config.weighting == "vlb")
    log_snr = log_snr.detach().double().cpu().clamp_min(MIN_LOG_SNR)  # (LEVEL_ITEMS,)
    weight = weight.detach().cpu() * WEIGHTINGS[config.weighting](log_snr) / (1 + log_snr.exp())
    ends = (log_snr.min().item() - 1e-6, log_snr.max().item() + 1e-6)
    count, edges = torch.histogram(log_snr, LEVEL_BINS, range=ends)
    total, _ = torch.histogram(log_snr, LEVEL_BINS, range=ends, weight=weight)
    centers = (edges[1:] + edges[:-1]) / 2  # (LEVEL_BINS,)
    return torch.stack([centers, count / LEVEL_ITEMS, total / total.max()], dim=1).tolist()


def memory_report(trainer):
    """Return the bytes that training takes, by what they are for: a dict. No step is taken."""
    model = trainer.model
    return training_memory(trainer.config, model.event, model.num_classes, trainer.precision)


def profile(trainer):
    """Return lines of text: where the time of a training step goes."""
    items = trainer.config.batch_size * trainer.config.grad_accumulation
    step = partial(trainer.train_step, 0.0)
    seconds, fractions = measure(step, PROFILED_STEPS, trainer.device)
    return [*time_table(seconds, fractions, items), "no checkpoint was written"]


def measure(step, count, device):
    """Time `count` calls of step() and profile as many; return (seconds of one, fractions).

    fractions: (kind, part) -> fraction of the time; on a GPU of its own time."""
    on_gpu = device.type == "cuda"
    repeat(step, WARMUP_STEPS, device)
    seconds = repeat(step, count, device) / count
    with record_profile() as profiler:  # of the CPU, and of a GPU where there is one
        repeat(step, count, device)
    spent = Counter()  # (kind, part) -> microseconds
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time is also that of the operation that launched it
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.name), part_of(event)] += own
    total = sum(spent.values())  # in the step, on one clock
    return seconds, {cell: time / total for cell, time in spent.items()}


def repeat(step, count, device):
    """Call step() `count` times, and return the seconds until the device has done it all."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)  # a GPU works behind Python's back
    return time.perf_counter() - started


def kind_of(name):
    """Return the kind of an operation, by its name."""
    if name.startswith("aten::"):
        for kind, words in KINDS.items():
            if any(word in name for word in words):
                return kind
    return OTHER


def part_of(event):
    """Return the part of the step in which an operation ran: the span "part ..." around it."""
    while event is not None:
        if event.name.startswith("part "):
            return event.name.removeprefix("part ")
        if event.name.startswith("autograd::engine::evaluate_function"):
            return "backward"  # on a GPU in a thread of its own
        event = event.cpu_parent
    return OTHER


def time_table(seconds, fractions, items):
    """Return lines of text: a table of what `measure` returned of a step on so many items."""
    cells = Counter()  # (kind or all, part or all) -> fraction
    for (kind, part), fraction in fractions.items():
        for cell in ((kind, part), (kind, "all"), ("all", part), ("all", "all")):
            cells[cell] += fraction  # with the sums of rows and columns
    parts = [part for part in (*PARTS, "all") if ("all", part) in cells]
    titles = "".join(f"{part:>11}" for part in parts)
    lines = [f"a step takes {seconds * 1e3:.1f} ms, {items / seconds:,.0f} items a second; of it"]
    lines.append(" " * 20 + titles)
    for kind in (*KINDS, OTHER, "all"):
        row = "".join(f"{cells[kind, part]:11.1%}" for part in parts)
        lines.append(f"{kind:<20}{row}")
    return lines
