"""What generate.py writes: a batch of samples with all that goes with it, and data beside it."""

from ddp.data import load_dataset, to_data, to_pixels
from ddp.editing import edited_samples, sample_mc_dropout
from ddp.io.item_figures import room
from ddp.io.run_dir import data_source


def data_to_compare(config, path, event):
    """Return test items of a model's data and [], or None and a line that says why not."""
    try:
        dataset = load_dataset(**data_source(config, path))
        if dataset.event != event:
            raise ValueError(f"its items are {dataset.event} now")
        return dataset.shown(room(event)), []
    except (OSError, ValueError) as error:
        return None, [f"samples alone, without the data ({error})"]


def draw(inputs, labels, passes, indices):
    """Return samples `indices` (B,), the arguments of SampleWriter.add, and their errors or None.

    labels: of cli.parse_labels. passes: of MC dropout, or None."""
    label = inputs.labels(indices, labels)  # (B,) or None
    std = latents = errors = reference = None
    model = inputs.model
    units = model.units
    if passes:
        how = (inputs.seed, label, passes)
        std, x0 = sample_mc_dropout(model, indices, *how, **inputs.options)
        if units is not None:
            std = std * units.broadcast(std)[1]  # in the units of the data
        if model.is_image:
            reference = to_pixels(4 * std - 1) if model.is_pixels else std
    else:
        x0, given, latents = edited_samples(inputs, indices, label)  # (B, *event) each
        reference = None if given is None else to_data(given, units)
    if latents is not None:
        errors = ((x0 - given) ** 2).flatten(1).mean(dim=1).cpu()  # (B,), squared
    batch = {"items": to_data(x0, units), "reference": reference}
    batch |= {"labels": label, "std": std, "latents": latents}
    return {k: v.cpu() for k, v in batch.items() if v is not None}, errors
