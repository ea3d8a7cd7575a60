"""What an edit works on, read from the user's files and checked."""

import dataclasses

from ddp.data.arrays import load_mask, read_items, read_latents
from ddp.editing import EDITS, FRAMES, EditInputs
from ddp.sampling import SAMPLERS

DEFAULT_COUNT = 64  # samples, where nothing says how many


def check_edit(
    sampler,  # SamplerOptions, as the user gave them
    name,  # a key of EDITS, or None: plain samples
    path,  # what the user gives to edit, or "" where the edit works without
    mask=None,
    strength=None,
    jump_length=None,
    jump_n_sample=None,
):
    """Return the SamplerOptions that suit an edit. Raises ValueError when something does not."""
    if strength is not None and name != "image":
        raise ValueError(f"strength={strength} is for image")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: expected more than 0, at most 1")
    if mask == "" or bool(mask) != (name == "inpaint"):
        raise ValueError("inpaint and mask go together, each with a path")
    if (jump_length or jump_n_sample) and name != "inpaint":
        raise ValueError("jump_length and jump_n_sample are for inpaint")
    if name is None:
        return sampler
    edit = EDITS[name]
    if not path and not edit.optional:
        raise ValueError(f"{name}='': expected a path")
    noisy = sampler.eta or sampler.s_churn
    if sampler.sampler is not None:
        noisy = noisy or SAMPLERS[sampler.sampler].stochastic
    if edit.deterministic and noisy:
        raise ValueError(f"{name} needs a sampler without noise: no eta, no s_churn, not ddpm")
    if not path:
        return sampler
    if edit.inverts and sampler.sampler not in (None, "ddim"):
        raise ValueError(f"sampler={sampler.sampler}: {name} inverts ddim, and no other")
    changes = {}
    for option, default in edit.defaults.items():
        if getattr(sampler, option) is None:
            changes[option] = default
    if sampler.eta is not None:
        changes.pop("sampler", None)  # eta says ddim
    return dataclasses.replace(sampler, **changes)


def read_edit_inputs(
    model,
    options,  # of SamplerOptions.resolve
    steps,  # as the user gave them, or None
    seed,
    name,  # a key of EDITS
    path,  # what the user gives to edit, or ""
    mask=None,  # a path
    strength=None,
    jump_length=None,
    jump_n_sample=None,
):
    """Return (EditInputs, number of samples, lines of text that say what was read).

    Raises OSError when a file cannot be read, ValueError when it does not fit."""
    edit = EDITS[name]
    if edit.steps and steps is None:
        options = options | {"steps": min(edit.steps, model.schedule.timesteps or edit.steps)}
    inputs = EditInputs(model, options, seed, name)
    items = None
    summary = []
    if path and edit.reads == "latents":
        items, summary = read_latents(path, model.event)
        inputs.latents = items
    elif path:
        items, summary = read_items(path, model.event)
        inputs.items = items
    if mask:
        inputs.mask = load_mask(mask, model.event)
        if len(inputs.mask) not in (1, len(items)):
            raise ValueError(f"mask={mask}: {len(inputs.mask)} masks for {len(items)} items")
    inputs.strength = inputs.strength if strength is None else strength
    inputs.jump_length = jump_length or max(1, min(10, options["steps"] // 2))
    inputs.jump_n_sample = jump_n_sample or inputs.jump_n_sample
    if jump_length and jump_length >= options["steps"]:
        raise ValueError(f"jump_length={jump_length}: expected fewer than {options['steps']} steps")
    if items is None:
        return inputs, DEFAULT_COUNT, summary
    if name != "interpolate":
        return inputs, len(items), summary
    if len(items) < 2:
        raise ValueError(f"interpolate={path}: one item has no other to go to; give two or more")
    return inputs, FRAMES * (len(items) - 1), summary
