"""Checkpoints: written so that a crash loses nothing, read so that a bad or hostile file does no
harm.

A checkpoint is one dict of tensors and plain types: `format`, `step`, `config`, `event`, `classes`,
`ema` (weights and the BatchNorm statistics that belong to them), `provenance`; and, unless it was
cut down for shipping, what a run needs to go on: `model`, `optimizer`, `scaler`, `best`, `seconds`.
"""

import dataclasses
import math
import os
import pickle
import platform
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import torch

from ddp.config import Config
from ddp.model import DiffusionModel

FORMAT = 1
INFERENCE = dict(format=int, step=int, config=dict, event=list, classes=list, ema=dict)
INFERENCE |= dict(provenance=dict)
TO_GO_ON = dict(model=dict, optimizer=list, scaler=dict)
TO_GO_ON |= dict(best=(float, type(None)), seconds=(float, int))
LARGEST_EVENT = 1 << 24  # numbers in an item; more is not an item but an attack


def provenance(dataset):
    """Where a checkpoint comes from: versions, the git commit of the code if any, the data."""
    root = Path(__file__).parent.parent
    git = None
    if (root / ".git").exists():
        describe = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40"]
        git = subprocess.run(
            [*describe, "--exclude=*"], capture_output=True, text=True, check=False
        )
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() if git and git.returncode == 0 else None,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
    }


def replace(path, write):
    """Call write(temporary path) and rename the result to `path`: it is there whole, or not at
    all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, because writers choose a format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write(path, state):
    """Write the dict `state` to `path`: to a temporary file, flushed, read back, and only then
    renamed.

    Raises FloatingPointError, and writes nothing, when a weight is not finite."""
    for name in ("model", "ema"):
        for key, tensor in state.get(name, {}).items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} weight {key} is not finite; {path} is not written"
                )

    def save(temporary):
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what its zip writer raises on a full disk
            raise OSError(f"{path} could not be written, is the disk full? ({error})") from None
        if read(temporary)["step"] != state["step"]:
            raise OSError(f"{path} could not be read back as it was written")

    return replace(path, save)


def read(path):
    """The dict in `path`, on the CPU. Raises OSError, saying why, for anything but a whole
    checkpoint."""
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise OSError(
                f"{path} is a folder; give a checkpoint in it, such as {path / 'last.pth'}"
            )
        raise OSError(f"there is no checkpoint {path}; train.py prints where it writes them")
    state = read_archive(path)
    require(path, state, INFERENCE)
    if state["format"] != FORMAT:
        raise OSError(f"{path} has format {state['format']}; this version reads format {FORMAT}")
    return state


def read_archive(path):
    """What torch.save wrote to `path`, on the CPU. Raises OSError when it is damaged or hostile.

    torch.load checks no checksum and unpickles on request: here every CRC of the archive is
    verified first, and only tensors and plain types are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise OSError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} is damaged or not a checkpoint ({reason})") from None
    except pickle.UnpicklingError:
        raise OSError(
            f"{path} holds more than tensors and plain types and was not loaded; "
            "it is not a checkpoint of this project"
        ) from None


def require(path, state, parts):
    """Raise OSError unless `state` is a dict with all `parts`, name -> type."""
    if not isinstance(state, dict):
        raise OSError(f"{path} is not a checkpoint of this project: it holds a {type(state)}")
    wrong = [name for name, kind in parts.items() if not isinstance(state.get(name, ...), kind)]
    if wrong:
        raise OSError(
            f"{path} is not a checkpoint of this project: it lacks {', '.join(wrong)}, or holds it "
            "in another form"
        )


def config_of(state, path):
    """The Config in a checkpoint. Raises OSError when it holds what this version does not know."""
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        unknown = sorted(set(state["config"]) - known)
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}")
        return Config(**state["config"])
    except (TypeError, ValueError) as error:
        raise OSError(f"{path} has a config that cannot be used: {error}") from None


def load_model(path, weights="ema", device="cpu"):
    """(model in eval mode, config, state) from a checkpoint; weights: `ema` or `raw`."""
    state = read(path)
    config = config_of(state, path)
    key = {"ema": "ema", "raw": "model"}[weights]
    if key not in state:
        raise OSError(
            f"{path} was cut down for shipping and holds no raw weights; use --weights ema"
        )
    classes = len(state["classes"]) if config.conditional else 0
    try:
        if math.prod(state["event"]) > LARGEST_EVENT:
            raise ValueError(f"an item of {state['event']} numbers")
        # shapes are compared on the meta device first: a hostile config allocates nothing
        with torch.device("meta"):
            model = DiffusionModel(config, state["event"], classes)
        model.load_state_dict(state[key], assign=True)
        model = DiffusionModel(config, state["event"], classes)
        model.load_state_dict(state[key])
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{path}: its weights do not fit its config ({reason})") from None
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise OSError(f"{path}: its weights are not finite; use an earlier checkpoint")
    if model.is_image:  # the layout in which convolutions are fastest
        model.to(memory_format=torch.channels_last)
    return model.to(device).eval().requires_grad_(False), config, state


def for_inference(state):
    """The checkpoint without what only training needs, a third to a quarter of its size."""
    return {key: state[key] for key in INFERENCE}
