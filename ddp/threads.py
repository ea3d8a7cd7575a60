"""How many CPU threads a run uses: the number that is fastest on this machine, as busy as it is.

Each of the hundreds of operations of a step waits for the slowest of its threads. When another
process takes a core, or a container has fewer than the machine, one thread may be several times as
fast as all. The last bits of a run depend on the number, so a checkpoint keeps it.
"""

import copy
import os
import statistics
import time
from dataclasses import replace
from functools import partial

import torch

from ddp.distributed import broadcast, local_processes

ALL_THREADS = torch.get_num_threads()  # PyTorch's choice: OMP_NUM_THREADS, or one for each core
MARGIN = 1.1  # so many times as fast must fewer threads be, that an idle machine decides alike
TRIAL_SECONDS, TRIAL_FRACTION = 1.0, 0.02  # of the run; the less of both is tried
SAMPLING_SECONDS = 0.2  # sampling is over sooner
MAX_ROUNDS = 5  # in which each number of threads has its turn
MAX_THREADS = 2**12
NEAR = 2.0  # times the least seconds; what takes longer is not tried again
LIGHT_LOAD = 0.5  # processes; so much of the load may have been ourselves


def choose_training_threads(trainer):
    """Set PyTorch's threads and trainer.config.threads; return a line to print, or None on a GPU.

    A number in the config stands, and 0 is auto. Trial steps leave no trace in the trainer."""
    config = trainer.config
    known = config.threads or known_threads(trainer.device)
    seconds = TRIAL_SECONDS
    if trainer.num_steps is not None:  # the least of trials is too long for a short run
        steps = TRIAL_FRACTION * (trainer.num_steps - trainer.step)
        is_short = len(candidates()) + 1 > steps
        known = known or (ALL_THREADS if is_short or config.compile else 0)
    elif config.max_minutes is not None:
        seconds = min(seconds, TRIAL_FRACTION * (60 * config.max_minutes - trainer.seconds))
    state = None if known else copy.deepcopy(trainer.state_dict())
    threads, line = choose_threads(partial(trainer.train_step, 0.0), known, seconds, "a step")
    if state is not None:
        trainer.load_state_dict(state)
    if trainer.device.type != "cpu":
        return None
    trainer.config = replace(config, threads=threads)
    return line


def choose_sampling_threads(
    model,  # a DiffusionModel that samples, or None: there is nothing to try
    batch_size,
    threads=0,  # 0 is auto
):
    """Set PyTorch's threads for a model that samples; return lines to print, none on a GPU."""
    if not 0 <= threads <= MAX_THREADS:
        raise ValueError(f"threads={threads}: expected 1 to {MAX_THREADS}, or auto")
    if model is None:
        return [choose_threads(None, threads or torch.get_num_threads())[1]]
    device = next(model.parameters()).device
    x_t = torch.zeros(batch_size, *model.event, device=device)
    log_snr = torch.zeros((), device=device)
    label = torch.zeros(batch_size, dtype=torch.long, device=device) if model.num_classes else None
    call = torch.inference_mode()(partial(model.denoise, x_t, log_snr, label))
    known = threads or known_threads(device)
    _, line = choose_threads(call, known, SAMPLING_SECONDS, f"a pass of {batch_size} items")
    return [line] if device.type == "cpu" else []


def known_threads(device):
    """Return the number of threads where there is nothing to choose, else 0."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or ALL_THREADS == 1:
        return torch.get_num_threads()
    return 0


def candidates():
    """Return the numbers of threads to try: all of them, halved until one is left, rising."""
    numbers = [ALL_THREADS]
    while numbers[0] > 1:
        numbers.insert(0, numbers[0] // 2)
    return numbers


def choose_threads(
    call,  # () -> anything: what takes the time
    known,  # the number of threads, or 0: it is found out
    seconds=TRIAL_SECONDS,
    what="a step",  # a call is
):
    """Set PyTorch's number of threads; return it, and a line that says why."""
    known, numbers = broadcast((known, candidates()))  # all processes do the same
    if known:
        torch.set_num_threads(known)
        return known, f"threads: {known}{advice(known, 'threads=auto looks for the fastest')}"
    times = trial(call, numbers, seconds)
    chosen = broadcast(max(n for n in numbers if times[n] <= MARGIN * min(times.values())))
    torch.set_num_threads(chosen)
    measured = ", ".join(f"{1e3 * times[n]:.3g} ms with {n}" for n in numbers)
    line = f"threads: {chosen} of {ALL_THREADS} ({what} takes {measured})"
    return chosen, line + advice(ALL_THREADS, "threads=auto chooses anew when they have ended")


def trial(call, numbers, seconds):
    """Return the median seconds of a call by number of threads, which take turns."""
    started = time.monotonic()
    timed(call, numbers[0])  # kernels are chosen, memory is allocated
    times = {n: [timed(call, n)] for n in numbers}
    fastest = min(times.values())
    near = [n for n in numbers if times[n][0] <= NEAR * fastest[0]]
    left = seconds - (time.monotonic() - started)
    rounds = int(left / sum(times[n][0] for n in near))
    near, rounds = broadcast((near, min(rounds, MAX_ROUNDS - 1)))
    for _ in range(rounds):
        for n in near:
            times[n].append(timed(call, n))
    return {n: statistics.median(times[n]) for n in numbers}


def timed(call, threads):
    """Return the seconds of a call with so many threads."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    call()
    return time.monotonic() - started


def advice(threads, what_helps):
    """Return the end of a line where other processes leave too few cores for so many threads."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # processes, in the last minute
    wanted = threads * local_processes()
    if threads == 1 or load + wanted <= os.cpu_count() + LIGHT_LOAD:
        return ""
    return f"; this machine is busy (load {load:.1f}, {os.cpu_count()} cores): {what_helps}"
