"""What an edit works on, read from the user's files and checked."""

import dataclasses

from ddp.data.arrays import load_mask, read_items, read_latents
from ddp.data.files import counted
from ddp.editing import EDITS, FRAMES, WITHOUT_NOISE, EditInputs
from ddp.io.spelling import none_of
from ddp.sampling import SAMPLERS

DEFAULT_COUNT = 64  # samples, where nothing says how many
DEFAULT_POINTS = 2000  # the same of points
FEW_COLUMNS = 8  # of a grid of few classes
MAX_CLASSES = 20  # that have a column each


def check_edit(sampler, name, path, mask=None, strength=None, **jumps):
    """Return the SamplerOptions that suit an edit. Raises ValueError when something does not.

    name: a key of EDITS, or None for plain samples. path: what the user gives to edit, or "".
    jumps: jump_length and jump_n_sample, None where the user gives none."""
    if strength is not None and name != "image":
        raise ValueError(f"strength={strength} is for image")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: expected more than 0, at most 1")
    if mask == "" or bool(mask) != (name == "inpaint"):
        raise ValueError("inpaint and mask go together, each with a path")
    if any(jumps.values()) and name != "inpaint":
        raise ValueError("jump_length and jump_n_sample are for inpaint")
    if name is None:
        return sampler
    edit = EDITS[name]
    if not path and not edit.optional:
        raise ValueError(f"{name}='': expected a path")
    stochastic = sampler.sampler and SAMPLERS[sampler.sampler].stochastic
    if edit.deterministic and (stochastic or sampler.eta or sampler.s_churn):
        raise ValueError(f"{name} needs a sampler without noise: no eta, no s_churn, not ddpm")
    if not path:  # the defaults are for the user's items
        quiet = sampler.sampler or ("ddim" if sampler.eta is not None else WITHOUT_NOISE)
        return dataclasses.replace(sampler, sampler=quiet)
    if edit.inverts and sampler.sampler not in (None, "ddim"):
        raise ValueError(f"sampler={sampler.sampler}: {name} inverts ddim, and no other")
    defaults = {k: v for k, v in edit.defaults.items() if getattr(sampler, k) is None}
    if sampler.eta is not None:
        defaults.pop("sampler", None)  # eta says ddim
    return dataclasses.replace(sampler, **defaults)


def read_edit_inputs(model, options, steps, seed, name, path, mask=None, **given):
    """Return (EditInputs, number of samples, lines of text that say what was read).

    options: of SamplerOptions.resolve. steps: as the user gave them, or None. given: the other
    arguments of check_edit. Raises OSError when a file cannot be read, ValueError when it does
    not fit."""
    if name is None:
        count = DEFAULT_POINTS if len(model.event) == 1 else DEFAULT_COUNT
        return EditInputs(model, options, seed), count, []
    edit = EDITS[name]
    if edit.steps and steps is None:  # as many as the edit needs
        options = options | {"steps": min(edit.steps, model.schedule.timesteps or edit.steps)}
    settings = {k: v for k, v in given.items() if v is not None}
    steps = options["steps"]
    length = settings.setdefault("jump_length", max(1, min(10, steps // 2)))
    if length >= max(2, steps):  # one step has nothing to undo
        raise ValueError(f"jump_length={length}: expected fewer than the number of steps, {steps}")
    inputs = EditInputs(model, options, seed, name, **settings)
    if not path:  # an interpolation between new samples
        return inputs, DEFAULT_COUNT, []
    if edit.reads == "latents":
        inputs.latents, summary = read_latents(path, model.event)
        return inputs, len(inputs.latents), summary
    inputs.items, summary = read_items(path, model.event, model.units)
    count = len(inputs.items)
    if mask:
        inputs.mask = load_mask(mask, model.event)
        if len(inputs.mask) not in (1, count):
            masks, items = counted(len(inputs.mask), "mask"), counted(count, "item")
            raise ValueError(f"mask={mask}: {masks} for {items}; give one, or one for each")
    if name == "interpolate" and count < 2:
        raise ValueError(f"interpolate={path}: one item has no other to go to; give two or more")
    return inputs, FRAMES * (count - 1) if name == "interpolate" else count, summary


def parse_labels(text, model, classes, of_edit=False):
    """Return the class numbers that `text`, such as "3" or "cat,dog", means; None for None.

    of_edit: they are of the user's items, which have no label unless it is given. Raises
    ValueError for an unknown class, or a model that does not fit."""
    if text is None:
        if of_edit and model.num_classes and not model.has_null_label:
            raise ValueError("label=None: this model was never trained without a label; give it")
        return None
    if not model.num_classes:
        raise ValueError(f"label={text}: needs a model trained with class_cond; this one was not")
    numbers = {str(i): i for i in range(len(classes))}
    numbers |= {name: i for i, name in enumerate(classes)}
    words = [text] if text in numbers else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in numbers:
            raise ValueError(none_of("label", word, classes))
    return [numbers[word] for word in words]


def grid_options(name, mc_dropout=None, classes=(), count=DEFAULT_COUNT):
    """Return how SampleWriter shows samples: titles of an edit, or the number of columns.

    classes: the names of those that plain samples are of, in turn: a column each, or some, of
    those that `count` samples come to."""
    if mc_dropout:
        return {"titles": (f"mean of {mc_dropout}", "std, from least to most"), "own_scale": True}
    if name == "interpolate":
        return {"columns": FRAMES, "is_way": True}
    if name and EDITS[name].title:
        return {"titles": (EDITS[name].title, "given"), "given_first": True}
    classes = list(classes[:count])
    if name or not classes or len(classes) > MAX_CLASSES:
        return {}
    if len(classes) == 1:
        return {"captions": classes}
    classes *= max(1, min(count, FEW_COLUMNS) // len(classes))  # of two classes four columns each
    return {"columns": len(classes), "captions": classes}


def in_rows(count, columns):
    """Return how many of `count` items fill rows of so many columns; all where there are none."""
    return count - count % columns if columns and columns <= count else count
