"""A model as .safetensors: its weights and, as JSON in the metadata, all that goes with them.

The layout is that of Hugging Face's library safetensors, which is needed for these files alone.
"""

import json
from pathlib import Path

import torch

from ddp.io.archive import DTYPES, MALFORMED, MAX_DEPTH, MAX_ENTRIES, content_digest
from ddp.io.schema import INFERENCE_KEYS

SUFFIX = ".safetensors"
METADATA_KEY = "ddp"  # of the file's metadata, below which the JSON stands
MAX_JSON = 1 << 24  # characters; a model of a thousand classes has some 20,000


def load_library():
    """Return the module `safetensors`. Raises OSError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        message = f"{SUFFIX} files need the library safetensors: pip install safetensors"
        raise OSError(message) from None
    return safetensors


def write_safetensors(path, state):
    """Write what inference needs of a checkpoint's dict to `path`; all else is left out."""
    state = inference_state(state, state["ema"])
    about = {key: value for key, value in state.items() if key != "ema"}
    if state["units"] is not None:
        about["units"] = {name: tensor.tolist() for name, tensor in state["units"].items()}
    about["digest"] = content_digest(state)
    weights = {}
    for name, tensor in state["ema"].items():
        weights[name] = tensor.clone(memory_format=torch.contiguous_format)  # shares no memory
    metadata = {"format": "pt", METADATA_KEY: json.dumps(about)}
    Path(path).write_bytes(load_library().torch.save(weights, metadata))


def inference_state(about, weights):
    """Return INFERENCE_KEYS of a checkpoint's dict in one order, whatever that of the weights."""
    state = {key: about[key] for key in INFERENCE_KEYS if key != "ema"}
    return state | {"ema": {name: weights[name] for name in sorted(weights)}}


def read_safetensors(path):
    """Return the dict in `path`, as it was before write_safetensors, and its digest.

    Memory and time are those of the file's own size. Raises OSError when it is damaged, or is not
    of this project."""
    library = load_library()
    try:
        with library.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            names = file.keys()
            if text is None or len(names) > MAX_ENTRIES or len(text) > MAX_JSON:
                raise ValueError(f"its metadata have no short {METADATA_KEY}")
            weights = {name: file.get_tensor(name).clone() for name in names}  # not of the map
        if any(weight.dtype not in DTYPES.values() for weight in weights.values()):
            raise ValueError("it has weights of an unknown type")
        about = json.loads(text)
        if depth(about) > MAX_DEPTH:
            raise ValueError("its JSON is nested too deeply")
        if about["units"] is not None:
            about["units"] = {k: torch.tensor(v).float() for k, v in about["units"].items()}
        return inference_state(about, weights) | {"digest": about["digest"]}
    except (library.SafetensorError, AttributeError, TypeError, *MALFORMED) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise OSError(
            f"{path} is damaged, or not a model that this project exported ({reason})"
        ) from None


def depth(value):
    """Return how deep dicts and lists stand in one another."""
    parts = value.values() if type(value) is dict else value if type(value) is list else ()
    return 1 + max(map(depth, parts), default=0)
