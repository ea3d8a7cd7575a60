"""Metrics of samples: FID and its like in feature spaces, classes, memorization, pixel statistics.

Each is a function (candidate, reference, options) -> nested dict of Estimates.
"""

import functools
import math
from dataclasses import dataclass

import torch

from ddp.metrics.candidate import fixed_subset
from ddp.metrics.distances import (
    DISTANCES,
    find_measure,
    frechet_distance,
    nearest,
    one_hot,
    total_variation,
    wasserstein2,
)
from ddp.metrics.features import FEATURES, Extractor, pixel_features
from ddp.metrics.uncertainty import RESAMPLES, Estimate, bootstrap

MANY_FEATURES = 512  # with more, a distance takes seconds: fewer half-samples
FEW_RESAMPLES = 10
FEW_ITEMS = 1000  # with fewer, distances do not compare with those of other numbers of items
PUBLISHED_ITEMS = 50_000  # samples, against the training split, of published FIDs
CONFIDENT = 0.9  # probability from which a classifier is called sure
NEAR_QUANTILE = 0.05  # of held-out items' distances to training items: nearer is a near duplicate
N_CLOSEST = 16  # pairs to show


@dataclass
class RealFeatures:
    """What is known of the real items in a feature space, before any candidate is measured."""

    extractor: Extractor
    items: torch.Tensor  # (N, D) features of reference.items
    baseline: dict  # name -> Estimate, of reference.baseline as if it were samples
    class_probs: torch.Tensor | None = None  # (N, classes) of reference.items


def real_features(space, reference, options):
    """The RealFeatures of a space: computed for the first candidate, then kept.

    Raises OSError when the space needs what is not there."""
    if space in reference.spaces:
        return reference.spaces[space]
    extractor = FEATURES[space].build(
        reference.dataset,
        progress=functools.partial(reference.progress, desc=space),
        device=reference.device,
        inception_weights=options.inception_weights,
    )
    real = RealFeatures(extractor, extractor.features(reference.items), {})
    real.baseline = distances(space, extractor.features(reference.baseline), real.items)
    if extractor.class_probs:
        real.class_probs = extractor.class_probs(reference.items)
        real.baseline |= class_distances(
            extractor.class_probs(reference.baseline), real.class_probs
        )
    reference.spaces[space] = real
    return real


def feature_metrics(space, candidate, reference, options):
    """FID, KID, PRDC and what else DISTANCES has for the data, in a feature space (FEATURES).

    name -> {samples, real_vs_real, relative_to_real}, see with_baseline. A space that knows classes
    also has class_tv (total variation between the class frequencies), confident (the fraction of
    samples of whose class the classifier is sure), label_accuracy, of samples made for the labels
    of the real items, and `counts`, the items of each class."""
    real = real_features(space, reference, options)
    features = real.extractor.features(candidate.samples)  # (N, D)
    estimates = distances(space, features, real.items)
    results = with_baseline(estimates, real.baseline, reference.baseline_matches)
    if real.class_probs is not None:
        results |= class_metrics(candidate, reference, real)
    return results


def distances(
    space,
    samples,  # (N, D) features
    real,  # (M, D), M >= N
):
    """Each of the DISTANCES that are for this space's data: name -> Estimate."""
    real = real[: len(samples)]
    resamples = FEW_RESAMPLES if real.shape[1] > MANY_FEATURES else RESAMPLES
    estimates = {}
    for distance in DISTANCES.values():
        if FEATURES[space].kind in distance.kinds:
            estimates |= bootstrap(
                distance, samples, real, resamples=resamples, max_items=distance.max_items
            )
    return estimates


def with_baseline(
    estimates,  # name -> Estimate, of samples
    baseline,  # the same of real items in their place
    matched,  # whether of as many items: else a ratio would compare different numbers
):
    """name -> {"samples", "real_vs_real", "relative_to_real"}: the two, and their ratio.

    The ratio is 1 for samples that are as good as real items; None where the baseline is 0."""
    results = {}
    for name, estimate in estimates.items():
        real_vs_real = baseline.get(name)
        ratio = None
        if matched and real_vs_real is not None:
            ratio = estimate.divide_by(real_vs_real)
        results[name] = {
            "samples": estimate,
            "real_vs_real": real_vs_real,
            "relative_to_real": ratio,
        }
    return results


def class_metrics(candidate, reference, real):
    """How the classifier of a space sorts samples, see feature_metrics."""
    probs = real.extractor.class_probs(candidate.samples)  # (N, classes)
    estimates = class_distances(probs, real.class_probs)
    results = with_baseline(estimates, real.baseline, reference.baseline_matches)
    if candidate.model is not None and candidate.model.num_classes:
        correct = probs.argmax(dim=1) == reference.labels
        results["label_accuracy"] = {"samples": Estimate.proportion(correct)}
    results["counts"] = {
        "samples": class_counts(probs),
        "real": class_counts(real.class_probs),
    }
    return results


def class_distances(probs, real_probs):
    """class_tv and confident of class probabilities (N, classes): name -> Estimate."""
    return bootstrap(class_measures, probs, real_probs[: len(probs)])


def class_measures(probs, real_probs):
    return {
        "class_tv": total_variation(one_hot(probs), one_hot(real_probs)),
        "confident": (probs.amax(dim=1) > CONFIDENT).double().mean().item(),
    }


def class_counts(probs):
    """How many items fall into each class, a list."""
    return torch.bincount(probs.argmax(dim=1), minlength=probs.shape[1]).tolist()


def feature_warnings(space, reference, options):
    """What to know before comparing numbers of a feature space, lines."""
    count = len(reference.items)
    dimension = real_features(space, reference, options).items.shape[1]
    warnings = []
    if count < 2 * dimension and FEATURES[space].kind == "image":
        warnings.append(
            f"too few samples: {count:,} for {dimension:,} features, so fd is mostly its bias; "
            "compare it at this number only"
        )
    elif count < FEW_ITEMS:
        warnings.append(f"too few samples, {count:,}, to compare with results of another number")
    if not reference.baseline_matches:
        warnings.append(
            f"real vs real is of {len(reference.baseline):,} items only, all of the other split, "
            "so nothing is relative to it"
        )
    num_train = len(reference.dataset.train)
    if space == "classifier" and options.reference == "train" and count > num_train // 2:
        warnings.append("among the real items are some on which the classifier was trained")
    for name, distance in DISTANCES.items():
        limit = distance.max_items
        if FEATURES[space].kind in distance.kinds and limit and count > limit:
            warnings.append(f"{name} is of {limit:,} items only")
    published = count >= PUBLISHED_ITEMS and options.reference == "train"
    if space == "inception" and not published:
        warnings.append(
            "published FIDs take 50,000 samples against the training split: num_samples=50000, "
            "reference=train"
        )
    return [f"{space}: {line}" for line in warnings]


def feature_tables(space, results, evaluation):
    """The tables of a feature space: its classes, if it knows any, and its distances."""
    recipe = evaluation["recipe"]
    tables = []
    if "counts" in results:
        rows = {}
        counts = results["counts"]
        for i, name in enumerate(evaluation["dataset"]["classes"]):
            rows[name] = {"samples": counts["samples"][i], "real": counts["real"][i]}
        tables.append((f"classes by the {space}", "items of each", rows))
    rows = {}
    for name, cells in results.items():
        if name != "counts":
            arrow = "↑" if find_measure(name).higher_is_better else "↓"
            rows[f"{name} {arrow}"] = cells
    note = (
        f"{recipe['num_samples']:,} samples against as many {recipe['reference']} items; "
        f"real vs real: {recipe['baseline_items']:,} items of the other split; 95% intervals; "
        "↓ lower is better"
    )
    about = recipe["feature_spaces"].get(space, {})
    if "accuracy" in about:
        note += f"; trained on {about['trained_on']}, accuracy {about['accuracy']:.1%}"
    if space == "inception":
        note += "; fd is the FID"
    tables.append((f"feature space: {space}", note, rows))
    return tables


def distance_ratio(samples, reference):
    """One number for benchmarks: FD of pixels, or 2-Wasserstein of points, over real vs real."""
    function = frechet_distance if samples.ndim == 4 else wasserstein2
    samples = pixel_features(samples)
    real = pixel_features(reference.items)
    baseline = pixel_features(reference.baseline)
    return function(samples, real) / function(baseline, real[: len(baseline)])


def evaluate_memorization(candidate, reference, options):
    """How near samples lie to training items, in root mean square over pixels or coordinates.

    `nn_distance_ratio`: their median distance to the nearest, over that of held-out items.
    `near_duplicates`: the fraction nearer than all but 5% of these. `copies`: at distance 0.
    `closest`: the pairs at the smallest distance."""
    dataset = reference.dataset
    heldout, _ = fixed_subset(dataset.test, None, len(reference.items))
    train = flat_items(dataset.train)
    sample_distances, index = nearest(flat_items(candidate.samples), train)  # (N,), (N,)
    heldout_distances, _ = nearest(flat_items(heldout), train)
    heldout_median = heldout_distances.median().item()
    results = {}
    if heldout_median:  # 0 where most held-out items have a copy among the training items
        results |= bootstrap(median_ratio, sample_distances, heldout_distances)
    near = sample_distances < heldout_distances.quantile(NEAR_QUANTILE)
    results["near_duplicates"] = Estimate.proportion(near)
    results["copies"] = int((sample_distances == 0).sum())
    results["median_distance"] = {
        "samples": sample_distances.median().item(),
        "heldout": heldout_median,
    }
    results["closest"] = []
    for i in sample_distances.argsort()[:N_CLOSEST].tolist():
        pair = {"sample": i, "train": index[i].item(), "distance": sample_distances[i].item()}
        results["closest"].append(pair)
    return results


def flat_items(items):
    """Items (N, *event) as (N, D) float, scaled so that a distance is a root mean square."""
    return items.flatten(1).float() / math.sqrt(math.prod(items.shape[1:]))


def median_ratio(a, b):
    return {"nn_distance_ratio": (a.median() / b.median()).item()}


def memorization_tables(results, evaluation):
    """The table of memorization: each number with what it is of copies and of new items."""
    rows = {
        "median distance to the nearest training item": results["median_distance"]["samples"],
        "the same of held-out items": results["median_distance"]["heldout"],
        "nn_distance_ratio (0: copies, 1: new items)": results.get("nn_distance_ratio"),
        "near_duplicates (0.05: new items)": results["near_duplicates"],
        "exact copies": results["copies"],
    }
    rows = {name: {"": cell} for name, cell in rows.items()}
    return [("memorization", "root mean square over pixels or coordinates", rows)]


def evaluate_pixel_stats(candidate, reference, options):
    """Mean and sd of each channel, or coordinate; of images also the fraction of saturated values.

    In gray values or the units of points; of samples, of real items, and their difference."""
    sample_stats = channel_stats(candidate.samples)
    real_stats = channel_stats(reference.items)
    results = {}
    for channel, stats in sample_stats.items():
        results[channel] = {}
        for name, estimate in stats.items():
            real = real_stats[channel][name]
            results[channel][name] = {
                "samples": estimate,
                "real": real,
                "difference": estimate - real,
            }
    return results


def channel_stats(items):
    """channel -> {"mean", "sd"} of items (N, C, ...), and "saturated" of pixels, as Estimates."""
    stats = {}
    channels = items.double().reshape(*items.shape[:2], -1).unbind(dim=1)
    for c, x in enumerate(channels):  # (N, H * W)
        first = x.mean(dim=1)  # moments of each item, (N,)
        second = x.square().mean(dim=1)
        sd = math.sqrt(max(0.0, second.mean().item() - first.mean().item() ** 2))
        # each item's influence on the sd, by the delta method
        influence = (second - 2 * first.mean() * first) / (2 * sd or 1) / math.sqrt(len(first))
        stats[f"channel {c}"] = {"mean": Estimate.mean(first), "sd": Estimate(sd, influence)}
    if items.ndim == 4:
        saturated = ((items == 0) | (items == 255)).flatten(1).double().mean(dim=1)  # (N,)
        stats["saturated"] = {"fraction": Estimate.mean(saturated, bounds=(0, 1))}
    return stats
