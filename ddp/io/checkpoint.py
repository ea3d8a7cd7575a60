"""Checkpoints: a crash while writing loses nothing, a damaged or hostile file does no harm.

A checkpoint is one dict of tensors and plain types, with INFERENCE_KEYS and, unless it was
stripped for shipping, RESUME_KEYS.
"""

import contextlib
import dataclasses
import platform
import subprocess
import zipfile
from pathlib import Path, PurePath

import numpy as np
import torch

import ddp
from ddp.config import Config
from ddp.data.files import printable
from ddp.io.archive import content_digest, read_archive
from ddp.io.files import atomic_write
from ddp.io.safetensors_file import SUFFIX, read_safetensors
from ddp.io.schema import (
    FORMAT,
    INFERENCE_KEYS,
    MAX_TEXT,
    RESUME_KEYS,
    is_tensor,
    is_text,
    is_whole,
)
from ddp.model import build_model
from ddp.optim import Muon, as_matrix
from ddp.presets import OLD_NAMES, OLD_VALUES
from ddp.units import Units

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
    return {
        "ddp": ddp.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": git_commit(Path(__file__).parents[2]),
        "dataset": PurePath(dataset.name).name,  # no path
        "fingerprint": dataset.fingerprint,  # a run goes on with the same data only
    }


def git_commit(root):
    """Return the commit of the code in `root`, with -dirty when files differ from it, or None."""
    if not (root / ".git").exists():  # git would look in the folders above
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 20}
    try:
        result = subprocess.run(["git", "-C", root, *describe], check=False, **options)
    except (OSError, subprocess.TimeoutExpired):  # there is no git, or its disk does not answer
        return None
    return result.stdout.strip() or None


def checkpoint_state(trainer):
    """Return all that a run must remember, as a checkpoint's dict."""
    config = dataclasses.asdict(trainer.config)
    origin = provenance(trainer.dataset)
    return {
        "format": FORMAT,
        "config": {name: as_text(value) for name, value in config.items()},
        "event": list(trainer.model.event),
        "units": trainer.model.units and trainer.model.units.state_dict(),
        "classes": [as_text(name) for name in trainer.dataset.classes],  # of all models
        "provenance": {name: as_text(value) for name, value in origin.items()},
        **trainer.state_dict(),
    }


def as_text(value):
    """Return a str as text that may stand in a checkpoint; anything else as it is."""
    return printable(value, MAX_TEXT) if type(value) is str and not is_text(value) else value


def strip_training_state(state):
    """Return a checkpoint without what only training needs: a third to a quarter of its size.

    Nor does it have a path of this machine: a dataset from a folder keeps its name alone."""
    places = {"dataset": PurePath(state["config"]["dataset"]).name or "data"}
    places |= {"data_dir": Config.data_dir, "out_dir": Config.out_dir}
    for name in ("labels", "cache"):
        if state["config"].get(name):
            places[name] = PurePath(state["config"][name]).name
    return {key: state.get(key) for key in INFERENCE_KEYS} | {"config": state["config"] | places}


def write_checkpoint(path, state):
    """Write `state` to a temporary file, flush it, read it back, and only then rename it to `path`.

    With it goes a digest of all names and numbers. Raises FloatingPointError, and writes nothing,
    when a number is not finite."""
    for name, tensor in tensors_in(state):
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite; {path} is not written")
    state = state | {"digest": content_digest(state)}

    def write(temporary):
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what its zip writer raises on a full disk
            raise OSError(f"{path} could not be written, is the disk full? ({error})") from None
        read_checkpoint(temporary)  # this verifies every CRC, and the digest

    return atomic_write(path, write)


def read_checkpoint(path):
    """Return the dict in `path`, on the CPU, in the present format.

    Raises OSError, saying why, for anything but a whole checkpoint."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"{path} is a folder without a model.pth or last.pth; give a run's folder")
    if not path.is_file():
        names = sorted(other.name for other in path.parent.glob("[!.]*.pth"))  # not half written
        others = printable(", ".join(names) or "none", 300)
        raise OSError(f"there is no checkpoint {path}; its folder holds {others}")
    is_safe = path.suffix == SUFFIX
    if not is_safe and not zipfile.is_zipfile(path) and path.suffix != ".pth":
        raise OSError(f"{path} is no checkpoint; expected a .pth or a {SUFFIX}")
    state = read_safetensors(path) if is_safe else read_archive(path)
    require_keys(path, state, {})
    digest = state.pop("digest", None)  # older files have none
    if digest is not None and digest != content_digest(state):
        raise OSError(f"{path} is damaged: its digest is that of other contents")
    if is_whole(state.get("format"), FORMAT + 1):
        raise OSError(f"{path} has format {state['format']}; this version reads up to {FORMAT}")
    require_sound(path, state)
    state.setdefault("units", None)  # before version 0.4
    if "optimizer" in state:
        state.setdefault("lr_scales", [])  # before version 0.6
    if state["format"] == 1:
        state = upgrade(state)
        require_sound(path, state)
    if digest is None and "best" in state:
        state["best"] = None  # before version 0.3 it was a loss on other items
    return state


def require_sound(path, state):
    """Raise OSError unless all parts that `state` has are what they must be, and finite."""
    parts = {key: check for key, check in RESUME_KEYS.items() if key in state}
    require_keys(path, state, INFERENCE_KEYS | parts)
    for name, tensor in tensors_in(state):
        if not tensor.isfinite().all():
            raise OSError(f"{path}: {name} is not finite; use an earlier checkpoint")


def require_keys(path, state, keys):
    """Raise OSError unless `state` is a dict that holds all `keys`, each as its check says."""
    if type(state) is not dict:
        raise OSError(f"{path} is not a checkpoint of this project: it holds a {type(state)}")
    # a key that is missing reads as `...`, which is nothing that is asked for
    wrong = [key for key, check in keys.items() if not check(state.get(key, ...))]
    if wrong:
        raise OSError(
            f"{path} is not a checkpoint of this project: it lacks {', '.join(wrong)}, or holds it "
            "in another form"
        )


def tensors_in(value, name=""):
    """Yield (name, tensor) of every tensor in a checkpoint's dict, however deep."""
    if is_tensor(value):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(part, f"{name} {key}".strip()[:200])


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
    """Return a checkpoint's Config, whose model has just the weights that are there.

    Nothing is allocated to find that out. Raises OSError when it has what this version does not
    know, or other weights."""
    try:
        config = Config(**state["config"])
    except (TypeError, ValueError) as error:
        hint = ""
        if "expected one of" in str(error):
            hint = "; if a plugin registers it, give plugin=FILE, or import that file first"
        raise OSError(f"{path} has a config that cannot be used: {shorten(error)}{hint}") from None
    with misfit_is_os_error(f"{path}: its weights do not fit its config"):
        with torch.device("meta"):  # of which tensors have no numbers
            expected = model_of(config, state).state_dict()
        for part in ("ema", "model"):
            require_same(part, state.get(part, expected), expected)
    return config


def model_of(config, state):
    """Return a new model of a checkpoint's dict."""
    num_classes = len(state["classes"]) if config.class_cond else 0
    return build_model(config, state["event"], num_classes, units_of(state))


def units_of(state):
    """Return the Units that a checkpoint's dict has, or None: of pixels, and of None for it."""
    units = state and state["units"]
    return units and Units(**units)


def require_same(what, tensors, expected):
    """Raise ValueError when two dicts of tensors differ in a name, a shape or a dtype."""
    if unmatched := sorted(tensors.keys() ^ expected.keys()):
        has = "lacks" if unmatched[0] in expected else "should not have"
        raise ValueError(f"{what} {has} {unmatched[0]}")
    for name, tensor in tensors.items():
        theirs, ours = ((t.dtype, *t.shape) for t in (tensor, expected[name]))
        if theirs != ours:
            raise ValueError(f"{name} of {what} is {theirs}, not {ours}")


def shorten(error):
    """Return what an error says, in one short line."""
    return printable(" ".join(str(error).split()), 300)


@contextlib.contextmanager
def misfit_is_os_error(message):
    """Turn what PyTorch raises for data that does not fit into one OSError."""
    try:
        yield
    except (
        *(RuntimeError, TypeError, ValueError, LookupError, AttributeError),
        *(ArithmeticError, AssertionError, MemoryError),
    ) as error:
        raise OSError(f"{message} ({shorten(error)})") from None


def load_model(path, weights="ema", device="cpu"):
    """Return (model in eval mode, its Config, the checkpoint's dict); weights: ema or raw.

    Raises OSError when they cannot be used."""
    state = read_checkpoint(path)
    config = parse_config(state, path)
    part = {"ema": "ema", "raw": "model"}[weights]  # its key
    if part not in state:
        raise OSError(f"{path} was stripped for shipping, without raw weights; use weights=ema")
    model = model_of(config, state)
    model.load_state_dict(state[part])
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
            "give it the data that it was trained on"
        )
    with misfit_is_os_error("the checkpoint does not fit its own config"):
        require_same("ema", state["ema"], trainer.ema.state_dict())
        require_same("model", state["model"], trainer.model.state_dict())
        if trainer.noise_dist_learns:
            require_same("noise_dist", state["noise_dist"], trainer.noise_dist.state_dict())
        if len(state["optimizer"]) != len(trainer.optimizers):
            raise ValueError(f"it has {len(state['optimizer'])} optimizers")
        for optimizer, saved in zip(trainer.optimizers, state["optimizer"], strict=True):
            require_moments(optimizer, saved["state"], state)
        trainer.load_state_dict(state)


def require_moments(optimizer, saved, state):
    """Raise ValueError unless the moments `saved` in a checkpoint's dict are an optimizer's.

    A fused AdamW reads as many numbers of a moment as its weight has, whether they are there."""
    weights = [weight.detach() for group in optimizer.param_groups for weight in group["params"]]
    if not saved and state["step"] and not state["scaler"]:  # fp16 may skip its first steps
        raise ValueError("an optimizer has no moments")
    for number, theirs in saved.items():
        if number >= len(weights):
            raise ValueError(f"an optimizer has moments of weight {number} of {len(weights)}")
        weight = weights[number]
        ours = {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
        if isinstance(optimizer, Muon):
            ours = {"momentum_buffer": as_matrix(weight)}
        require_same("an optimizer", theirs, ours)
        step_count, squares = theirs.get("step", 0), theirs.get("exp_avg_sq", torch.zeros(()))
        if not 0 <= step_count <= state["step"] or (squares < 0).any():
            raise ValueError(f"an optimizer has impossible moments of weight {number}")
