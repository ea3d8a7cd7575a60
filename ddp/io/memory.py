"""How much memory training takes, found out without taking it, and how much there is.

A step is taken on PyTorch's meta device, whose tensors have shapes and no numbers.
"""

import gc
import math
import os
import weakref
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddp.distributed import alone, default_shards, gather, local_processes, world_size
from ddp.io.device import select_precision
from ddp.model import build_model
from ddp.optim import Muon, build_optimizers
from ddp.training import Trainer
from ddp.validation import BN_BATCH_IMAGES, BN_BATCH_POINTS, fitting_batch

BATCH_BYTES = 40  # of a number in a batch: x0, eps, x_t, x0_hat, and the random words behind them
TRIAL_STEPS = 2  # the second has the optimizer's moments beside the activations


class LiveBytes(TorchDispatchMode):
    """A context in which the storages of all new tensors are counted.

    Attributes: `now`, the bytes of those that are alive; `peak`, their most so far."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive = set()  # ids of storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata  # two views of one storage have it in common
        if key not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, key, storage.nbytes())

    def release(self, key, size):
        self.alive.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """A context in which attention keeps what a fused kernel keeps, not a matrix of positions.

    The meta device has no such kernel. The numbers that come out are of no use."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            if q.shape == k.shape == v.shape:
                return q * k * v
        return function(*args, **(kwargs or {}))


def training_memory(config, event, num_classes=0, precision="fp32"):
    """Return the bytes that training takes, by what they are for: a dict. No memory is taken.

    config: resolved. event: the shape of an item. num_classes: labels that the network is told.
    "activations" are the most that a forward and backward pass over a part of a batch has at once,
    gradients aside. "sums" are over parts: in a tree they wait for each other. What of the dataset
    lies in memory is there already. Empty for a network that cannot be built without numbers."""
    shards = config.shards or 1  # auto is tried with 1 first
    items = -(-config.batch_size // shards) * config.noise_copies
    size = BN_BATCH_IMAGES if len(event) > 1 else BN_BATCH_POINTS
    with torch.device("meta"):
        try:
            model = build_model(config, event, num_classes)
        except (RuntimeError, NotImplementedError):
            return {}
        optimizers, _ = build_optimizers(model, config.optimizer, config.weight_decay)
        weights = sum(weight.nbytes for weight in model.parameters())
        moments = 0  # AdamW's are two for each weight, Muon's one
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                size_of_one = sum(weight.nbytes for weight in group["params"])
                moments += size_of_one * (1 if isinstance(optimizer, Muon) else 2)
        passed = step_bytes(model, items) - weights  # without the gradients
        with torch.no_grad():  # the EMA model, when BatchNorm is recalibrated
            passed = max(passed, step_bytes(model, fitting_batch(event, size)))
    if precision != "fp32":
        passed //= 2
    report = dict.fromkeys(("weights", "EMA", "gradients"), weights)  # each as large as the others
    sums = 0
    if max(shards, world_size()) > 1:  # of each level of the tree one, and one that is added
        own_parts = -(-shards // world_size())
        sums = weights * own_parts.bit_length()
    if world_size() > 1:  # what is sent, received and handed round, when no activation is left
        passed = max(passed, 3 * weights)
    batch = BATCH_BYTES * items * math.prod(event)
    return report | {"sums": sums, "optimizer": moments, "activations": passed, "batch": batch}


def step_bytes(model, items):
    """Return the most bytes at once in a pass of a model on the meta device over so many items.

    0 for a network that cannot be called there, such as one that asks for numbers."""
    x_t = torch.empty(items, *model.event)
    log_snr = torch.empty(items)
    label = torch.zeros(items, dtype=torch.long) if model.num_classes else None
    with LiveBytes() as live, FusedAttention():
        try:
            x0_hat = model.denoise(x_t, log_snr, label)
            if x0_hat.requires_grad:
                (x0_hat**2).sum().backward()
        except (RuntimeError, NotImplementedError):
            return 0
    return live.peak


def require_memory(config, dataset, device):
    """Return what `training_memory` says of a run, or raise ValueError when there is less.

    config: resolved for the dataset. The message says which number of shards would fit."""
    available = available_memory(device)
    memory = needed_memory(config, dataset, device)
    needed = sum(memory.values())
    if needed <= available:
        return memory
    for smaller in with_more_shards(config):
        needed_by_part = sum(needed_memory(smaller, dataset, device).values())
        if needed_by_part <= available:
            advice = f"shards={smaller.shards} fits, and checkpoint_activations=True takes less"
            break
    else:
        advice = (
            f"parts of {smaller.batch_size // smaller.shards} still take "
            f"{needed_by_part / 1e9:,.1f} GB; use checkpoint_activations=True, or a smaller "
            "batch_size, channels_base or image"
        )
    part = config.batch_size // (config.shards or 1)
    raise ValueError(
        f"batch_size={config.batch_size}, {part} at a time of {'x'.join(map(str, dataset.event))}, "
        f"takes {needed / 1e9:,.1f} GB, and {available / 1e9:,.1f} GB are free; {advice}"
    )


def needed_memory(config, dataset, device):
    """Return `training_memory` of a run on a dataset, a dict."""
    num_classes = len(dataset.classes) if config.class_cond else 0
    precision = select_precision(config.precision, device)
    return training_memory(config, dataset.event, num_classes, precision)


def with_more_shards(config):
    """Yield the config, and with twice as many shards as often as the batch can be halved."""
    least = 2 if config.norm == "batch" else 1  # items in a part
    shards = config.shards or default_shards()
    yield replace(config, shards=shards)
    while config.batch_size % (2 * shards) == 0 and config.batch_size >= 2 * shards * least:
        shards *= 2
        yield replace(config, shards=shards)


# ---- the number of shards that fits ----


def fit_shards(
    config,  # resolved for the dataset
    dataset,
    device,
    tell,  # called with a line of text
):
    """Return the config with shards chosen where it was auto (0): the fewest that fit in memory.

    On a GPU some steps are tried, by a Trainer that is thrown away; elsewhere the estimate decides.
    Raises ValueError where the memory is not enough, also for a number of shards that was given."""
    if config.shards != 0:
        require_memory(config, dataset, device)
        return config
    fits = fits_by_trial if device.type == "cuda" else fits_by_estimate
    for fitted in with_more_shards(config):
        part = fitted.batch_size // fitted.shards
        if not any(gather(not fits(fitted, dataset, device))):  # on all processes
            if fitted.shards > default_shards():
                tell(f"shards: {fitted.shards}; parts of {2 * part} items do not fit in memory")
            return fitted
    raise ValueError(
        f"shards=auto: parts of {part} of batch_size={config.batch_size} take more memory than "
        "there is; use checkpoint_activations=True, or a smaller channels_base or image"
    )


def fits_by_estimate(config, dataset, device):
    needed = sum(needed_memory(config, dataset, device).values())
    return needed <= available_memory(device)


def fits_by_trial(config, dataset, device):
    """Return whether a few steps of this process fit in its GPU's memory."""
    precision = select_precision(config.precision, device)
    fits = True
    try:
        with alone():  # else a process would wait for one that ran out of memory
            trainer = Trainer(config, dataset, device, precision)
            for _ in range(TRIAL_STEPS):
                trainer.train_step(0.0)
    except torch.OutOfMemoryError:
        fits = False
    trainer = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that the next trial finds it in one piece
    return fits


# ---- how much there is ----


def available_memory(device):
    """Return the bytes that are free on a device for this process, inf where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([*cgroup_memory(), *system_memory()], default=math.inf) / local_processes()


def system_memory(meminfo="/proc/meminfo"):
    """Return the bytes that the machine could give to a new program, in a list, empty if unknown.

    Where only its whole memory is known, it is that."""
    for line in lines_of(meminfo):
        if line.startswith("MemAvailable:"):
            return [1024 * int(line.split()[1])]  # in kB
    try:
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows has none of it
        return []


def cgroup_memory(own="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Return what is left of each memory limit that a container or batch system has set, a list."""
    left = []
    for line in lines_of(own):  # "0::/path" of version 2, "4:memory:/path" of version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = Path(root), "memory.max", "memory.current"
        elif controllers == "memory":
            base = Path(root) / "memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        while folder.is_relative_to(base):  # a limit holds for all that is below it
            numbers = [*lines_of(folder / limit), *lines_of(folder / usage)]
            if len(numbers) == 2 and numbers[0] != "max":
                left.append(max(0, int(numbers[0]) - int(numbers[1]) + cache_of(folder)))
            folder = folder.parent
    return left


def cache_of(folder):
    """Return the bytes of a control group that cache files, and are given up on demand.

    Mapped arrays that were read are among them."""
    sizes = dict(line.split() for line in lines_of(folder / "memory.stat"))
    cached = 0
    for name in ("inactive_file", "active_file"):
        cached += int(sizes.get(f"total_{name}", sizes.get(name, 0)))
    return cached


def lines_of(path):
    """Return the lines of a file of the system, none where it is not there."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
