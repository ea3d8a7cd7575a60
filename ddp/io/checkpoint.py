"""Checkpoints: a crash while writing loses nothing, a damaged or hostile file does no harm.

A checkpoint is one dict of tensors and plain types, with INFERENCE_KEYS and, unless it was
stripped for shipping, RESUME_KEYS.
"""

import contextlib
import dataclasses
import math
import pickle
import platform
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import torch

import ddp
from ddp.config import OLD_NAMES, OLD_VALUES, Config
from ddp.io.files import atomic_write
from ddp.model import build_model

FORMAT = 2
INFERENCE_KEYS = {  # what sampling and evaluation need
    "format": int,
    "step": int,
    "config": dict,  # the fields of ddp.config.Config
    "event": list,  # shape of one item
    "classes": list,  # their names
    "ema": dict,  # the averaged weights, and the BatchNorm statistics that belong to them
    "provenance": dict,  # see `provenance`
}
RESUME_KEYS = {  # what a run needs to go on
    "model": dict,  # the raw weights
    "optimizer": list,  # the state of each
    "scaler": dict,  # fp16's
    "noise_dist": dict,  # what importance sampling has learned
    "best": (float, type(None)),  # lowest test loss
    "seconds": (float, int),  # of training
}
MAX_EVENT_SIZE = 1 << 24  # numbers in one item; a sanity limit for untrusted files

RENAMED_WEIGHTS = {  # part of a name in format 1, before ddp 0.2 -> now; {} is conv or proj
    "network.door.": "network.{}_in.",
    "network.out.": "network.{}_out.",
    ".first.": ".layer1.",
    ".second.": ".layer2.",
    ".modulation.": ".film.",
    ".project.": ".proj.",
    "schedule.network.ends": "schedule.network.endpoints",
    "schedule.network.weight": "schedule.network.logits",
}


def provenance(dataset):
    """Return where a checkpoint comes from: versions, the code's git commit if any, the data."""
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():  # else git would look in the folders above
        describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
        command = ["git", "-C", root, *describe]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = result.stdout.strip() or None  # with -dirty when files differ from it
    return {
        "ddp": ddp.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,  # a run goes on with the same data only
    }


def checkpoint_state(trainer):
    """Return all that a run must remember, as a checkpoint's dict."""
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(trainer.config),
        "event": list(trainer.model.event),
        "classes": list(trainer.dataset.classes),  # kept for unconditional models, too
        "provenance": provenance(trainer.dataset),
        **trainer.state_dict(),
    }


def strip_training_state(state):
    """Return a checkpoint without what only training needs: a third to a quarter of its size."""
    return {key: state[key] for key in INFERENCE_KEYS}


def write_checkpoint(path, state):
    """Write `state` to a temporary file, flush it, read it back, and only then rename it to `path`.

    Raises FloatingPointError, and writes nothing, when a weight is not finite."""
    for part in ("model", "ema"):
        for name, weight in state.get(part, {}).items():
            if not weight.isfinite().all():
                raise FloatingPointError(f"{name} of {part} is not finite; {path} is not written")

    def write(temporary):
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what its zip writer raises on a full disk
            raise OSError(f"{path} could not be written, is the disk full? ({error})") from None
        if read_checkpoint(temporary)["step"] != state["step"]:  # this verifies every CRC
            raise OSError(f"{path} could not be read back as it was written")

    return atomic_write(path, write)


def read_checkpoint(path):
    """Return the dict in `path`, on the CPU, in the present format.

    Raises OSError, saying why, for anything but a whole checkpoint."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"{path} is a folder; give a checkpoint in it, such as {path / 'last.pth'}")
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.pth")))
        raise OSError(f"there is no checkpoint {path}; its folder holds {others or 'none'}")
    state = read_archive(path)
    require_keys(path, state, INFERENCE_KEYS)
    if state["format"] not in (1, FORMAT):
        raise OSError(f"{path} has format {state['format']}; this version reads up to {FORMAT}")
    for part in ("ema", "model"):
        for name, weight in state.get(part, {}).items():
            if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
                raise OSError(f"{path} is not a checkpoint of this project: {name} is not a weight")
    return upgrade(state) if state["format"] == 1 else state


def read_archive(path):
    """Return what torch.save wrote to `path`. Raises OSError when it is damaged or hostile.

    torch.load checks no checksum and unpickles on request: here every CRC of the archive is
    verified first, and only tensors and plain types are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the first part whose CRC is wrong, or None
        if damaged:
            raise OSError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)  # runs no code
    except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} is damaged or not a checkpoint ({reason})") from None
    except pickle.UnpicklingError:
        raise OSError(f"{path} holds more than tensors and plain types; not loaded") from None


def require_keys(path, state, keys):
    """Raise OSError unless `state` is a dict that holds all `keys`, each of its type or types."""
    if not isinstance(state, dict):
        raise OSError(f"{path} is not a checkpoint of this project: it holds a {type(state)}")
    wrong = [name for name, kind in keys.items() if not isinstance(state.get(name, ...), kind)]
    if wrong:  # a key that is missing reads as `...`, which is of no type asked for
        raise OSError(
            f"{path} is not a checkpoint of this project: it lacks {', '.join(wrong)}, or holds it "
            "in another form"
        )


def upgrade(state):
    """Return a checkpoint of format 1 in the present format.

    To keep it so: write_checkpoint(path, read_checkpoint(path)), which changes no number."""
    is_image = len(state["event"]) == 3
    config = {"network": "unet" if is_image else "mlp"}
    for name, value in state["config"].items():
        name = OLD_NAMES.get(name, name)
        if isinstance(value, str):  # a choice; numbers kept their meaning
            value = OLD_VALUES.get(name, {}).get(value, value)
        config[name] = value
    new = {**state, "format": FORMAT, "config": config}
    for part in ("ema", "model"):
        weights = {}
        for name, weight in state.get(part, {}).items():
            for old, now in RENAMED_WEIGHTS.items():  # several may apply
                name = name.replace(old, now.format("conv" if is_image else "proj"))
            weights[name] = weight
        loss_sq_ema = weights.pop("schedule.squares", None)  # importance sampling's
        if part in state:
            new[part] = weights
    if "model" in state:  # the last one that was looked at
        new["noise_dist"] = {} if loss_sq_ema is None else {"loss_sq_ema": loss_sq_ema}
    return new


def parse_config(state, path):
    """Return a checkpoint's Config. Raises OSError when it has what this version does not know."""
    try:
        return Config(**state["config"])
    except (TypeError, ValueError) as error:
        hint = ""
        if "expected one of" in str(error):
            hint = "; if a plugin registers it, give plugin=FILE, or import that file first"
        raise OSError(f"{path} has a config that cannot be used: {error}{hint}") from None


@contextlib.contextmanager
def misfit_is_os_error(message):
    """Turn what PyTorch raises for data that does not fit into one OSError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{message} ({reason})") from None


def load_model(path, weights="ema", device="cpu"):
    """Return (model in eval mode, its Config, the checkpoint's dict); weights: ema or raw.

    Raises OSError when they cannot be used."""
    state = read_checkpoint(path)
    config = parse_config(state, path)
    part = {"ema": "ema", "raw": "model"}[weights]  # its key
    if part not in state:
        raise OSError(f"{path} was stripped for shipping, without raw weights; use weights=ema")
    event = state["event"]  # [C, H, W] or [D]
    num_classes = len(state["classes"]) if config.class_cond else 0
    with misfit_is_os_error(f"{path}: its weights do not fit its config"):
        if min(event) < 1 or math.prod(event) > MAX_EVENT_SIZE:
            raise ValueError(f"event={event}: expected 1 to {MAX_EVENT_SIZE} numbers")
        for name, weight in state[part].items():
            if weight.nbytes > weight.untyped_storage().nbytes():  # a few numbers, expanded
                raise ValueError(f"{name} is larger than what the file holds of it")
        # shapes are compared on the meta device first: a hostile config allocates nothing
        with torch.device("meta"):
            model = build_model(config, event, num_classes)
        model.load_state_dict(state[part], assign=True)  # raises when names or shapes differ
        model = build_model(config, event, num_classes)  # now with memory
        model.load_state_dict(state[part])
    for tensor in model.state_dict().values():
        if not tensor.isfinite().all():
            raise OSError(f"{path}: its weights are not finite; use an earlier checkpoint")
    if model.is_image:
        model.to(memory_format=torch.channels_last)  # in which convolutions are fastest
    return model.to(device).eval().requires_grad_(False), config, state


def load_guide(path, device, dtype):
    """Return the model to guide away from (autoguidance), ready for inference; None for None."""
    return load_model(path, "ema", device)[0].for_inference(dtype) if path else None


def restore(trainer, state):
    """Go on from a checkpoint's dict. Raises OSError when it has other data, or does not fit."""
    theirs = state["provenance"].get("fingerprint")  # None in a file that lacks it
    ours = trainer.dataset.fingerprint
    if theirs != ours:
        raise OSError(
            f"the run was trained on data with fingerprint {theirs}, this has {ours}; "
            "set data_dir to the folder that it was trained on"
        )
    with misfit_is_os_error("the checkpoint does not fit its own config"):
        trainer.load_state_dict(state)
