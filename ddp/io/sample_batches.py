"""What generate.py writes: a batch of samples with all that goes with it, and data beside it."""

import math

import torch

from ddp.data import load_dataset, to_data
from ddp.editing import changes, edited_samples, sample_mc_dropout
from ddp.io.edit_inputs import grid_options, in_rows
from ddp.io.item_figures import draw_items, room
from ddp.io.run_dir import data_source
from ddp.options import SamplerOptions
from ddp.rng import normal
from ddp.sampling import cycle_labels, sample, sample_trajectory
from ddp.validation import fitting_batch

SAMPLES = 2000  # in a picture, or as many as it has room for


def data_to_compare(config, path, event):
    """Return test items of a model's data and [], or None and a line that says why not."""
    try:
        dataset = load_dataset(**data_source(config, path))
        if dataset.event != event:
            raise ValueError(f"its items are {dataset.event} now")
        return dataset.shown(room(event)), []
    except (OSError, ValueError) as error:
        return None, [f"samples alone, without the data ({error})"]


def picture(model, seed, classes=(), dataset=None):
    """Return a PIL image of the first samples of a model in eval mode, by the default sampler.

    classes: their names, a column each if the model is told the class. dataset: what stands beside
    samples that say little alone, all but pixels. Raises FloatingPointError, see sample."""
    options = SamplerOptions().resolve(model)
    count = min(SAMPLES, room(model.event))
    shown = grid_options(None, classes=classes if model.is_image and model.num_classes else ())
    count = in_rows(count, shown.get("columns"))
    indices = torch.arange(count)
    label = cycle_labels(model, indices)  # (N,) or None
    parts = []
    for part in indices.split(fitting_batch(model.event, count)):  # large images: fewer
        labels = None if label is None else label[part]
        x0 = sample(model, part, seed, labels, **options)  # (B, *event)
        parts.append(to_data(x0, model.units).cpu())
    reference = None if model.is_pixels or dataset is None else dataset.shown(count)
    return draw_items(torch.cat(parts), reference, **shown)


def states_of(inputs, labels, count):
    """Yield (log-SNR, items) of the first `count` samples on their way from noise to data.

    The first is where they start from, the last is what they become; see draw."""
    model = inputs.model
    indices = torch.arange(count)
    label = inputs.labels(indices, labels)
    options = inputs.options | changes(inputs, indices, label)
    start = options.get("x_t")
    if start is None:
        start = normal(inputs.seed, "x_T", 0, indices.to(model.device), model.event)
        yield -math.inf, to_data(start, model.units).cpu()
    for log_snr, x_t, _ in sample_trajectory(model, indices, inputs.seed, label, **options):
        yield float(log_snr), to_data(x_t, model.units).cpu()


def draw(inputs, labels, passes, indices):
    """Return samples `indices` (B,), the arguments of SampleWriter.add, and their errors or None.

    labels: of edit_inputs.parse_labels. passes: of MC dropout, or None."""
    label = inputs.labels(indices, labels)  # (B,) or None
    std = latents = errors = reference = None
    model = inputs.model
    units = model.units
    if passes:
        how = (inputs.seed, label, passes)
        std, x0 = sample_mc_dropout(model, indices, *how, **inputs.options)
        if units is not None:
            std = std * units.broadcast(std)[1]  # in the units of the data
        reference = std if model.is_image else None
    else:
        x0, given, latents = edited_samples(inputs, indices, label)  # (B, *event) each
        reference = None if given is None else to_data(given, units)
    if latents is not None:
        errors = ((x0 - given) ** 2).flatten(1).mean(dim=1).cpu()  # (B,), squared
    batch = {"items": to_data(x0, units), "reference": reference}
    batch |= {"labels": label, "std": std, "latents": latents}
    return {k: v.cpu() for k, v in batch.items() if v is not None}, errors
