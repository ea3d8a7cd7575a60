"""A model of the time of a training step: what is multiplied, what is moved, what is called.

seconds = FLOPs / rate + bytes / bandwidth + operations * overhead; docs/scaling.md derives it, and
what gradients cost between processes. For benchmarks/scaling.py.
"""

import itertools
import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ddp.config import Config
from ddp.io.memory import training_memory
from ddp.model import build_model
from ddp.optim import ITERATIONS
from ddp.presets import PRESETS

COUNTS = ("flops", "moved", "ops")

# An H100 SXM, of NVIDIA's data sheets of it and of the DGX H100: bf16 without sparsity; HBM3;
# NVLink is 900 GB/s in both directions together; a 400 Gb/s InfiniBand port for each GPU
RATE, BANDWIDTH, MEMORY = 989e12, 3.35e12, 80e9
NODE_GPUS, NODE_BANDWIDTH, NETWORK_BANDWIDTH = 8, 450e9, 50e9
LATENCY = 5e-6  # s, of a message: assumed

BATCH = 2048  # of all GPUs together
GPUS = (8, 64, 1024)
LARGE = {  # as large as the network of Dhariwal & Nichol 2021 for 256x256
    "channels_base": 256,
    "blocks_per_level": 2,
    "channel_mult": [1, 1, 2, 2, 4, 4],
    "attention_resolutions": [8, 16, 32],
    "patch_size": 1,
}
LATENT = LARGE | {"channel_mult": [1, 2, 4], "attention_resolutions": [8, 16, 32]}
CASES = {  # what is trained -> (fields of Config, the shape of an item)
    "images 32x32, the default network": ({}, (3, 32, 32)),
    "images 256x256, the default network": ({}, (3, 256, 256)),
    "images 256x256, a large network": (LARGE, (3, 256, 256)),
    "their latents 4x32x32, a large network": (LATENT, (4, 32, 32)),
}


class Moved(TorchDispatchMode):
    """A context that counts operations, `ops`, and the bytes that they read and write, `bytes`."""

    def __init__(self):
        super().__init__()
        self.ops = 0
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.ops += 1
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, torch.Tensor):
                    self.bytes += leaf.nbytes
        return result


def count_step(
    step,  # () -> anything
):
    """Return FLOPs, bytes moved and operations of a call of step(), a dict."""
    with FlopCounterMode(display=False) as flops, Moved() as moved:
        step()
    return dict(zip(COUNTS, (flops.get_total_flops(), moved.bytes, moved.ops), strict=True))


def least_squares(counts, seconds):
    """Return costs >= 0, (3,), that predict seconds (N,) from counts (N, 3), by relative error.

    With three numbers all choices of which are 0 can be tried."""
    best = (math.inf, None)
    for chosen in itertools.product((False, True), repeat=len(COUNTS)):
        costs = np.zeros(len(COUNTS))
        relative = counts[:, chosen] / seconds[:, None]
        costs[list(chosen)] = np.linalg.lstsq(relative, np.ones(len(seconds)), rcond=None)[0]
        error = np.square(counts @ costs / seconds - 1).sum()
        if (costs >= 0).all() and error < best[0]:
            best = (error, costs)
    return best[1]


def fit_times(sweeps):
    """Fit the model to the times of all sweeps but one, and predict that one; then to all.

    sweeps: name -> rows with seconds and COUNTS. Returns costs, errors, and lines of text."""
    errors = {}
    for left_out in sweeps:
        others = [row for name, rows in sweeps.items() if name != left_out for row in rows]
        costs = least_squares(*as_arrays(others))
        counts, seconds = as_arrays(sweeps[left_out])
        errors[left_out] = float(np.abs(counts @ costs / seconds - 1).max())
    costs = least_squares(*as_arrays([row for rows in sweeps.values() for row in rows]))
    lines = [
        f"a step takes {1e9 * costs[0]:.2g} s for 1e9 FLOPs, {1e9 * costs[1]:.2g} s for a GB "
        f"moved, and {1e6 * costs[2]:.2g} us for an operation"
    ]
    for name, error in errors.items():
        lines.append(f"fitted without {name}, it is off by at most {error:.0%} there")
    names = ("seconds_per_flop", "seconds_per_byte", "seconds_per_op")
    return dict(zip(names, costs.tolist(), strict=True)) | {"errors": errors, "lines": lines}


def as_arrays(rows):
    """Return counts (N, 3) and seconds (N,) of rows."""
    counts = [[row[name] for name in COUNTS] for row in rows]
    return np.array(counts, dtype=float), np.array([row["seconds"] for row in rows])


# ---- many GPUs ----


def count_model(fields, event):
    """Return what a case takes: parameters, FLOPs and bytes of an item, operations, Muon's FLOPs.

    Counted on the meta device, so without any memory, forward and backward; bytes as of bf16."""
    config = Config(**{**PRESETS["images"], **fields})
    counts = []
    with torch.device("meta"):
        model = build_model(config, event)
        for items in (2, 4):

            def passes(items=items):
                x0_hat = model.denoise(torch.empty(items, *event), torch.empty(items))
                (x0_hat**2).sum().backward()

            passes()  # from now on gradients are added, as in every step but the first
            counts.append(count_step(passes))
    two, four = counts
    newton_schulz = 0
    for weight in model.network.hidden_weights()[0]:
        rows, columns = sorted(weight.flatten(1).shape)
        newton_schulz += ITERATIONS * (4 * rows**2 * columns + 2 * rows**3)
    return {
        "config": config,
        "params": sum(weight.numel() for weight in model.parameters()),
        "flops": (four["flops"] - two["flops"]) / 2,
        "moved": (four["moved"] - two["moved"]) / 4,  # two items, in half of the bytes
        "ops": two["ops"],
        "muon_flops": newton_schulz,
    }


def fitting_part(config, event, part):
    """Return the part, halved until the training of it fits in a GPU's memory; 0: none does."""
    while part >= 2:
        fields = {"batch_size": part, "shards": 1}
        alone = Config(**{**vars(config), **fields})
        if sum(training_memory(alone, event, 0, "bf16").values()) < MEMORY:
            return part
        part //= 2
    return 0


def communication(params, gpus):
    """Return the seconds in which gradients are summed, all-to-all and all-gather together.

    Each GPU sends and receives 2 * 4 P (W - 1) / W bytes, in 2 (W - 1) messages; NCCL's own
    all-reduce as many bytes, in 2 log2(W) messages. Returns both."""
    sent = 2 * 4 * params * (gpus - 1) / gpus
    bandwidth = NODE_BANDWIDTH if gpus <= NODE_GPUS else NETWORK_BANDWIDTH
    by_tree = sent / bandwidth + 2 * (gpus - 1) * LATENCY
    return by_tree, sent / bandwidth + 2 * math.log2(gpus) * LATENCY


def predictions(
    cases,  # keys of CASES
    seconds_per_op,  # of a CPU that calls operations, for which a fast GPU waits
):
    """Return what the model predicts of H100s: rows, and lines of a table."""
    rows = []
    columns = ("arithmetic", "calls", "muon", "sums", "fast_sums", "seconds")  # of time
    titles = ["part", "arithmetic", "calls", "Muon", "sums", "sums, fast", "a step", "efficiency"]
    lines = [f"\na batch of {BATCH:<29,}{'GPUs':>6}" + "".join(f"{t:>12}" for t in titles)]
    for name in cases:
        fields, event = CASES[name]
        case = count_model(fields, event)
        config = case.pop("config")
        for gpus in GPUS:
            part = fitting_part(config, event, BATCH // gpus)
            row = {"case": name, "gpus": gpus, "part": part, **case}
            items = BATCH / gpus
            row["arithmetic"] = items * (case["flops"] / RATE + case["moved"] / BANDWIDTH)
            row["calls"] = items / max(part, 1) * case["ops"] * seconds_per_op
            row["muon"] = case["muon_flops"] / RATE
            row["sums"], row["fast_sums"] = communication(case["params"], gpus)
            row["seconds"] = max(row["arithmetic"], row["calls"]) + row["muon"] + row["sums"]
            row["efficiency"] = row["arithmetic"] / row["seconds"]
            rows.append(row)
            cells = "".join(f"{1e3 * row[column]:12.2f}" for column in columns)
            lines.append(f"{name:<40}{gpus:6}{part:12}{cells}{row['efficiency']:12.0%}")
    return {"rows": rows, "lines": lines}
