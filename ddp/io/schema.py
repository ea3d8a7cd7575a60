"""What each key of a checkpoint may hold: a file is checked by this table before it is used.

The functions say whether a value is such a thing; they raise nothing.
"""

import math
import re
from functools import partial

import torch

FORMAT = 2  # of what is written; 1 is that of before version 0.2
MAX_EVENT_SIZE = 3 * 2048**2  # numbers in one item
MAX_SIDE = 4096  # of an image
MAX_CLASSES = 1 << 15
MAX_TEXT = 4096  # characters, as of a path
MAX_ITEMS = 256  # of a list or dict


def is_whole(value, least=0, most=2**53):
    return type(value) is int and least <= value <= most


def is_real(value, least=-1e300, most=1e300):
    return type(value) in (int, float) and least <= value <= most  # NaN is not


def is_text(value):
    """Return whether it is a short text that does nothing to a terminal.

    Surrogates, which stand for the bytes of a path that is not UTF-8, are let through."""
    if type(value) is not str or len(value) > MAX_TEXT:
        return False
    return re.sub(r"[\udc80-\udcff]", "", value).isprintable()


def is_plain(value):
    return value is None or type(value) is bool or is_text(value) or is_real(value)


def is_option(value):
    """Return whether it may be a field of Config."""
    return is_plain(value) or is_list(value, is_plain)


def is_list(value, is_item, most=MAX_ITEMS):
    return type(value) is list and len(value) <= most and all(map(is_item, value))


def is_dict(value, is_item, is_key=is_text, most=math.inf):
    if type(value) is not dict or len(value) > most:
        return False
    return all(is_key(key) and is_item(item) for key, item in value.items())


def is_event(value):
    if not is_list(value, lambda n: is_whole(n, 1, MAX_EVENT_SIZE)) or len(value) not in (1, 2, 3):
        return False
    return math.prod(value) <= MAX_EVENT_SIZE and (len(value) < 3 or max(value) <= MAX_SIDE)


def is_tensor(value):
    return type(value) is torch.Tensor


def is_units(value):
    """Return whether it is a mean and a std > 0 of each channel, or nothing."""
    if value in (None, ...):
        return True
    if not is_dict(value, is_tensor) or value.keys() != {"mean", "std"}:
        return False
    mean, std = value["mean"], value["std"]
    alike = mean.ndim == 1 and mean.shape == std.shape and mean.dtype == std.dtype == torch.float32
    return alike and bool((std > 0).all())


def is_weights(value):
    """Return whether it is named tensors, of which no variance is negative."""
    if not is_dict(value, is_tensor):
        return False
    return not any((value[name] < 0).any() for name in value if name.endswith("running_var"))


def is_optimizer(value):
    """Return whether it is an optimizer's state: for each weight's number, its moments."""
    is_state = partial(is_dict, is_item=partial(is_dict, is_item=is_tensor), is_key=is_whole)
    return type(value) is dict and is_state(value.get("state"))


def is_scaler(value):
    """Return whether it is the state of a GradScaler, empty unless training is in fp16."""
    if not is_dict(value, is_plain):
        return False
    wrong = [key for key, check in SCALER_KEYS.items() if not check(value.get(key))]
    return not value or (not wrong and len(value) == len(SCALER_KEYS))


def is_noise_dist(value):
    """Return whether it is what a noise distribution has learned, empty unless it learns."""
    if not is_dict(value, is_tensor):
        return False
    loss_sq_ema = value.get("loss_sq_ema", torch.ones(1))
    return bool((loss_sq_ema >= 0).all() and (loss_sq_ema > 0).any())


SCALER_KEYS = {
    "scale": partial(is_real, least=1e-30, most=1e38),
    "growth_factor": partial(is_real, least=1.0, most=1e3),
    "backoff_factor": partial(is_real, least=1e-3, most=1.0),
    "growth_interval": partial(is_whole, least=1, most=2**31 - 1),
    "_growth_tracker": partial(is_whole, most=2**31 - 1),
}
INFERENCE_KEYS = {  # what sampling and evaluation need
    "format": partial(is_whole, least=1, most=FORMAT),
    "step": is_whole,
    "config": partial(is_dict, is_item=is_option, most=MAX_ITEMS),  # the fields of Config
    "event": is_event,  # shape of one item
    "units": is_units,  # of the data before they were standardized; not there before version 0.4
    "classes": partial(is_list, is_item=is_text, most=MAX_CLASSES),  # their names
    "ema": is_weights,  # the averaged weights, and the BatchNorm statistics that belong to them
    "provenance": partial(is_dict, is_item=is_plain, most=MAX_ITEMS),  # see `provenance`
}
RESUME_KEYS = {  # what a run needs to go on
    "model": is_weights,  # the raw weights
    "optimizer": partial(is_list, is_item=is_optimizer),  # the state of each
    "lr_scales": partial(is_list, is_item=partial(is_real, least=0, most=1e6)),  # factors on lr
    "scaler": is_scaler,  # fp16's
    "noise_dist": is_noise_dist,  # what importance sampling has learned
    "best": lambda value: value is None or is_real(value, -1e3),  # lowest val_loss
    "seconds": partial(is_real, least=0, most=1e10),  # of training
}
