"""What a checkpoint is, in words."""

from pathlib import Path

import torch

from ddp.data.files import counted
from ddp.io.checkpoint import model_of, parse_config, read_checkpoint
from ddp.io.schema import RESUME_KEYS

SHOWN_CLASSES = 5  # names of classes on a line


def inspect_checkpoint(path):
    """Return lines that say what the checkpoint in `path` is. Raises OSError when it is none."""
    state = read_checkpoint(path)
    config = parse_config(state, path)
    facts = describe(state, config)
    width = max(map(len, facts))
    megabytes = Path(path).stat().st_size / 1e6
    lines = [f"{path} ({megabytes:.1f} MB)"]
    return lines + [f"  {name:<{width}}  {text}" for name, text in facts.items()]


def describe(state, config):
    """Return what a checkpoint's dict is: name of a fact -> text. config: its Config."""
    is_run = all(key in state for key in RESUME_KEYS)
    kind = "a run to go on with" if is_run else "a finished model"
    rate = "lr open" if config.lr is None else f"lr {config.lr:g}"
    weighting = config.weighting or "by prediction"
    return {
        "kind": f"{kind}, format {state['format']}",
        "training": training_text(state),
        "data": data_text(state),
        "network": network_text(state, config),
        "prediction": f"{config.prediction or 'v'}, weighting {weighting}",
        "schedule": schedule_text(config),
        "layers": layers_text(config),
        "optimizer": f"{config.optimizer}, {rate}, {config.lr_schedule}, batch {config.batch_size}",
        "precision": f"{config.precision}, in training",
        "made by": made_by_text(state["provenance"]),
    }


def training_text(state):
    steps = counted(state["step"], "step")
    if "seconds" not in state:
        return f"{steps}; a finished model does not keep the seconds"
    return f"{steps}, {state['seconds']:,.0f} s"


def data_text(state):
    """Return the name, shape, classes and fingerprint of the data."""
    event = tuple(state["event"])
    kind = {1: "points", 2: "sequences", 3: "images"}[len(event)]
    names = state["classes"]
    classes = "no classes"
    if names:
        more = ", ..." if len(names) > SHOWN_CLASSES else ""
        classes = f"{len(names)} classes ({', '.join(names[:SHOWN_CLASSES])}{more})"
    origin = state["provenance"]
    units = "" if state["units"] is None else " in units of their own"
    name = origin.get("dataset") or state["config"].get("dataset")
    fingerprint = origin.get("fingerprint") or "unknown"
    return f"{name}: {kind} {event}{units}, {classes}, fingerprint {fingerprint}"


def network_text(state, config):
    """Return the network's name, its size and whether it is told the class."""
    with torch.device("meta"):  # of which tensors have no numbers
        model = model_of(config, state)
    count = sum(weight.numel() for weight in model.network.parameters())
    name = config.network or type(model.network).__name__.lower()
    told = "class-conditional" if model.num_classes else "unconditional"
    guided = ", for CFG too" if model.has_null_label else ""
    return f"{name}, {count:,} parameters, {told}{guided}"


def schedule_text(config):
    times = f"{config.timesteps} steps" if config.timesteps else "continuous time"
    shift = "" if config.shift == 1 else f", shift {config.shift:g}"
    zero = ", zero terminal SNR" if config.zero_terminal_snr else ""
    levels = f", noise levels {config.noise_dist}" if config.noise_dist else ""
    return f"{config.schedule}, {times}{shift}{zero}{levels}"


def layers_text(config):
    slope = f" {config.negative_slope:g}" if config.activation == "leaky_relu" else ""
    parts = [f"norm {config.norm}", f"activation {config.activation}{slope}"]
    parts += [f"dropout {config.dropout or 0:g}", f"init {config.init}"]
    return ", ".join(parts)


def made_by_text(origin):
    """Return the versions in a checkpoint's provenance; what older files lack is left out."""
    names = ("ddp", "torch", "numpy", "python", "commit")
    known = [f"{name} {origin[name]}" for name in names if origin.get(name)]
    return ", ".join(known) or "unknown"
