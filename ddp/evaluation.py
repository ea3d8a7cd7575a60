"""Everything that evaluate.py measures: means with standard errors, a distance with its floor."""

import math

import torch

from ddp import figures, likelihood, quality
from ddp.data import to_float, to_pixels
from ddp.reverse import class_labels, final, generate

SCHEMA = 1


def figure(values):
    """The mean of independent values (N,) with its standard error."""
    values = values.double()
    return {"mean": values.mean().item(), "se": (values.std() / math.sqrt(len(values))).item()}


def batches(dataset, model, count, size, progress):
    """(x0, indices, label) of the first `count` test items on the model's device."""
    device = next(model.parameters()).device
    for indices in progress(torch.arange(count).split(size)):
        label = dataset.test_labels[indices].to(device) if model.classes else None
        yield to_float(dataset.test[indices]).to(device), indices, label


def loss_by_level(dataset, model, count, size, seed, progress):
    """The test loss at ten levels, a list of dicts: t, log_snr, and figures x0, eps and v."""
    parts = [
        likelihood.losses(model, x0, indices, seed, label=label)
        for x0, indices, label in batches(dataset, model, count, size, progress)
    ]
    joined = []
    for rows in zip(*parts, strict=True):
        row = {unit: figure(torch.cat([r[unit] for r in rows])) for unit in ("x0", "eps", "v")}
        joined.append({"t": rows[0]["t"], "log_snr": rows[0]["log_snr"]} | row)
    return joined


def bound(dataset, model, count, size, seed, draws, progress):
    """The variational bound: figures prior, diffusion, reconstruction and total, and their unit:
    bits/dim for images (of uint8 data), nats for points."""
    parts = [
        likelihood.bound(model, x0, indices, seed, draws, label, dataset.is_image)
        for x0, indices, label in batches(dataset, model, count, size, progress)
    ]
    unit = math.log(2) * math.prod(dataset.event) if dataset.is_image else 1.0
    terms = {k: figure(torch.cat([p[k] for p in parts]) / unit) for k in parts[0]}
    terms["unit"] = "bits/dim" if dataset.is_image else "nats"
    if dataset.log_density:
        terms["entropy"] = figure(-dataset.log_density(dataset.test[:count]))
    return terms


def samples(model, count, size, seed, options, progress):
    """`count` samples as uint8 pixels or points."""
    parts = []
    for indices in progress(torch.arange(count).split(size)):
        states = generate(model, indices, seed, class_labels(model, indices), **options)
        parts.append(to_pixels(final(states)).cpu())
    return torch.cat(parts)


def distance(dataset, drawn):
    """The distance of samples to as many test items, and its floor: that of training items to them.

    Images: the Frechet distance of pixels. Points: the exact 2-Wasserstein distance in the
    plane."""
    count = min(len(drawn), len(dataset.test))
    if dataset.is_image:
        name, measure, features = "frechet_pixels", quality.frechet_distance, quality.pixel_features
    else:
        name, measure, features = "wasserstein2", quality.wasserstein2, lambda items: items
    count = min(count, len(dataset.train))
    test = features(dataset.test[:count])
    train = dataset.train[
        torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    ]
    ours, floor = (measure(features(items[:count]), test) for items in (drawn, train))
    ratio = ours / floor if floor else None
    return {"name": name, "value": ours, "floor": floor, "ratio": ratio, "count": count}


def table(results):
    """The results as lines of text."""
    lines = [
        "",
        "test loss by noise level (± standard error)",
        f"{'t':>6} {'log-SNR':>9} {'x0':>20} {'eps':>20} {'v':>20}",
    ]
    for row in results["loss_by_level"]:
        cells = [f"{row[u]['mean']:.5f} ± {row[u]['se']:.5f}" for u in ("x0", "eps", "v")]
        lines.append(
            f"{row['t']:6.2f} {row['log_snr']:9.2f} " + " ".join(f"{c:>20}" for c in cells)
        )
    terms = results["bound"]
    lines += ["", f"variational bound, {terms['unit']} (± standard error)"]
    for name in ("prior", "diffusion", "reconstruction", "total", "entropy"):
        if name in terms:
            note = "  of the data, on the same points" if name == "entropy" else ""
            lines.append(f"  {name:<16} {terms[name]['mean']:9.4f} ± {terms[name]['se']:.4f}{note}")
    d = results["quality"]
    lines += [
        "",
        f"distance of {d['count']:,} samples to the test split, {d['name']}",
        f"  samples          {d['value']:9.4f}",
        f"  floor            {d['floor']:9.4f}  as many training items",
        f"  ratio            {d['ratio'] or math.inf:9.2f}",
    ]
    return lines


def picture(results, drawn, dataset):
    """One PIL image: the loss by level, and samples beside test items."""
    levels = [
        {k: v["mean"] if isinstance(v, dict) else v for k, v in row.items()}
        for row in results["loss_by_level"]
    ]
    curve = figures.image_of(figures.loss_by_level(levels))
    if dataset.is_image:
        panels = [curve, figures.grid(drawn[:64]), figures.grid(dataset.test[:64])]
        return figures.side_by_side(panels, ["", "samples", "test items"])
    return figures.side_by_side(
        [curve, figures.overview(drawn, dataset.test[: len(drawn)])], ["", ""]
    )
