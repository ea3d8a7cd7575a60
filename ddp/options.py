"""Typed options: dataclass fields that know their help, choices and bounds; how samples are drawn.

The flags of the scripts are made from these fields, and a library user gets the same checks.
"""

import dataclasses
import math
from dataclasses import asdict, dataclass, fields

from ddp.sampling import DEFAULT_SAMPLER, SAMPLERS, THRESHOLDS, check_options, default_steps
from ddp.schedule import SPACINGS

MAX_LIST = 8
MAX_ENTRY = 2**13  # of a list of whole numbers
MAX_NUMBER = 2**53  # up to which every whole number is a float, too
MAX_TEXT = 4096  # characters, as of a path
MAX_SHOWN = 80  # characters of a value in a message
HIDDEN = "==SUPPRESS=="  # argparse's mark for the help of a flag that is not listed


def integers(text):
    """Parse '4,8' or '4 8' -> [4, 8]."""
    return [int(word) for word in str(text).replace(",", " ").split()]


def count_or_auto(text):
    """Parse '4' -> 4, 'auto' -> 0, which means that it is found out."""
    return 0 if str(text).lower() == "auto" else int(text)


def image_size(text):
    """Parse '28' -> [28, 28], '30x45' -> [30, 45] (height x width)."""
    sides = [int(side) for side in str(text).lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError
    return sides * 2 if len(sides) == 1 else sides


def flag(default, help, kind=None, choices=None, fallback=None, **bounds):
    """Return a dataclass field that knows its help, type, choices and bounds.

    fallback: what None becomes where no preset says more. bounds: at_least, above, at_most; count,
    the number of values; least, the fewest of a list."""
    metadata = {"kind": kind or type(default), "choices": choices, "bounds": bounds}
    if fallback is not None:
        default_text = "none" if fallback == [] else fallback
        help += f" unless a preset says more (default: {default_text})"
        metadata["fallback"] = fallback
    metadata["help"] = help
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(options):
    """Raise ValueError when a field of a dataclass made of `flag`s is out of bounds."""
    for field in fields(options):
        value = getattr(options, field.name)
        if value is None and field.default is None:
            continue
        wanted = expected(field, value)
        if wanted:
            raise ValueError(f"{field.name}={shown(value)}: expected {wanted}")


def shown(value):
    """Return a value as text for a message, short however long the value is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict)):
        return f"[{', '.join(shown(v) for v in list(value)[: MAX_LIST + 1])}]"
    text = str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def expected(field, value):
    """Return what a field expects, as text, or None when the value is that."""
    kind = field.metadata["kind"]
    choices = field.metadata["choices"]
    bounds = field.metadata["bounds"]
    count = bounds.get("count", 1)
    types = {float: (float, int), int: int, str: str, bool: bool, count_or_auto: int}
    wanted_type = types.get(kind, list) if count == 1 else list
    if not isinstance(value, wanted_type) or (isinstance(value, bool) and kind is not bool):
        return f"a value of type {getattr(kind, '__name__', kind)}"
    at_most = bounds.get("at_most", MAX_NUMBER)
    if count > 1:
        finite = all(type(v) in (int, float) and abs(v) <= at_most for v in value)
        return None if len(value) == count and finite else f"{count} finite numbers"
    if isinstance(value, list):
        least = bounds.get("least", 1 if field.default is None else 0)
        positive = all(type(v) is int and 0 < v <= MAX_ENTRY for v in value)
        fits = least <= len(value) <= MAX_LIST and positive
        return None if fits else f"{least} to {MAX_LIST} whole numbers from 1 to {MAX_ENTRY}"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"at most {MAX_TEXT} characters"
    if choices and value not in choices:
        return f"one of {', '.join(map(str, choices))}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if "at_least" in bounds and value < bounds["at_least"]:
        return f"at least {bounds['at_least']}"
    if "above" in bounds and value <= bounds["above"]:
        return f"more than {bounds['above']}"
    if isinstance(value, (int, float)) and value > at_most:
        return f"at most {at_most:,}"
    return None


@dataclass
class SamplerOptions:
    """How samples are drawn: what evaluate.py and generate.py share."""

    sampler: str = flag(None, f"sampler (default: {DEFAULT_SAMPLER})", str, SAMPLERS)
    steps: int = flag(
        None, "sampling steps (default: per sampler, 20 or 100)", int, at_least=1, at_most=10**6
    )
    spacing: str = flag(None, "how sampling steps are spaced in time", str, SPACINGS)
    eta: float = flag(None, "noise of ddim, 0 (none) to 1 (as ddpm)", float, at_least=0, at_most=1)
    s_churn: float = flag(0.0, "EDM's S_churn: noise that euler or heun adds", at_least=0)
    threshold: str = flag(None, "thresholding of x0_hat", str, THRESHOLDS)
    cfg_scale: float = flag(None, "CFG scale; 1 is none", float, at_least=0, at_most=1e3)
    guidance_interval: list = flag(None, "guide between two log-SNR, LOW HIGH", float, count=2)
    guidance_rescale: float = flag(0.0, "rescale to the unguided std", at_least=0, at_most=1)
    guide_checkpoint: str = flag(None, "autoguidance: a weaker checkpoint to guide away from", str)
    precision: str = flag(None, "compute dtype of sampling", str, ("fp32", "bf16"))

    def __post_init__(self):
        check_fields(self)
        if self.guide_checkpoint == "":
            raise ValueError("guide_checkpoint='': expected a path")
        for name in ("guide_checkpoint", "guidance_interval", "guidance_rescale"):
            if getattr(self, name) and self.cfg_scale is None:
                raise ValueError(f"{name} needs cfg_scale, such as 2")
        low, high = self.guidance_interval or (0, 0)
        if low > high:
            raise ValueError(f"guidance_interval={low} {high}: expected LOW before HIGH")

    def resolve(self, model, guide=None):
        """Return the keyword arguments of sampling.sample for a model, nothing left open.

        guide: the model in `guide_checkpoint`. Raises ValueError when they do not fit."""
        name = self.sampler or (DEFAULT_SAMPLER if self.eta is None else "ddim")
        sampler = SAMPLERS[name]
        if self.eta is not None and not sampler.eta:
            raise ValueError(f"eta={self.eta}: sampler={name} takes none; it is for ddim")
        if self.threshold not in (None, "none") and not model.is_pixels:
            raise ValueError(f"threshold={self.threshold} is for pixels in [-1, 1], not this data")
        options = asdict(self)
        del options["precision"], options["guide_checkpoint"]
        options["guide"] = guide
        options["sampler"] = name
        options["eta"] = self.eta or 0.0
        options["spacing"] = self.spacing or sampler.spacing
        options["threshold"] = self.threshold or ("static" if model.is_pixels else "none")
        if self.steps is None:
            options["steps"] = default_steps(name, model.schedule)
        check_options(model, **options)
        model.schedule.sampling_grid(options["steps"])  # raises when they do not fit
        return options
