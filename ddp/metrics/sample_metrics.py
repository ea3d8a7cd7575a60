"""Metrics of samples: FID and its like in feature spaces, classes, memorization, statistics.

Each is a function (candidate, reference, options) -> nested dict of Estimates.
"""

import functools
import math
from dataclasses import dataclass

import torch

from ddp.distributed import in_order, on_main
from ddp.metrics.candidate import fixed_subset
from ddp.metrics.distances import DISTANCES, find_measure, nearest, one_hot, total_variation
from ddp.metrics.features import FEATURES, Extractor, kinds_of
from ddp.metrics.fixed_features import PART, by_parts, pixel_features, value_features
from ddp.metrics.uncertainty import MIN_ITEMS, RESAMPLES, Estimate, bootstrap

MANY_FEATURES = 512  # with more, a distance takes seconds: fewer half-samples
FEW_RESAMPLES = 10
CLOSE = 0.05  # of held-out items lie nearer to a training item than what is called near
CONFIDENT = 0.9  # probability from which a classifier is called sure
MARKS = {"lower": "↓", "higher": "↑", None: "≈"}  # of which is better
MAX_STATS = 32  # channels or dimensions of which statistics are reported


@dataclass
class RealFeatures:
    """What is known of the real items in a feature space, the same for every candidate."""

    extractor: Extractor
    items: torch.Tensor  # (N, D) features of reference.items
    baseline: dict  # name -> Estimate, of reference.baseline as samples; {}: not yet measured
    distances: dict  # of DISTANCES, those that are for such features: name -> Distance
    class_probs: torch.Tensor | None = None  # (N, classes) of reference.items


def extract(function, items):
    """function(items), (N, ...), a part at a time; the processes share the parts."""
    return torch.cat([*in_order(function, items.split(PART))])


def real_features(space, reference, options):
    """The RealFeatures of a space. Raises OSError when the space needs what is not there."""
    if space not in reference.spaces:
        extractor = FEATURES[space].build(  # may train a classifier, or read a download
            reference.dataset,
            progress=functools.partial(reference.progress, desc=space),
            device=reference.device,
            inception_weights=options.inception_weights,
        )
        features = extract(extractor.features, reference.items)  # (N, D)
        probs = extractor.class_probs and extract(extractor.class_probs, reference.items)
        distances = fitting_distances(kinds_of(reference.dataset), features.shape[1])
        reference.spaces[space] = RealFeatures(extractor, features, {}, distances, probs)
    return reference.spaces[space]


def fitting_distances(kinds, count):
    """Those of DISTANCES that are for `count` features of data of such kinds: name -> Distance."""
    fitting = {}
    for name, distance in DISTANCES.items():
        if {*kinds} & {*distance.kinds} and count <= (distance.max_features or count):
            fitting[name] = distance
    return fitting


def feature_metrics(space, candidate, reference, options):
    """FID, KID, PRDC and what else DISTANCES has for the data, in a feature space (FEATURES).

    name -> {samples, real_vs_real, relative_to_real}: of the samples, of real items in their place,
    and the ratio, 1 for samples as good as real items and None where it has no meaning. A space
    that knows classes adds class_tv, confident and what class_results gives."""
    real = real_features(space, reference, options)
    if not real.baseline and len(reference.baseline) >= MIN_ITEMS:
        real.baseline, _ = measure(space, reference.baseline, real)
    estimates, probs = measure(space, candidate.samples, real)
    results = {}
    for name, estimate in estimates.items():
        baseline = real.baseline.get(name)
        comparable = baseline and reference.baseline_matches  # of the same number of items
        ratio = estimate.divide_by(baseline) if comparable else None
        results[name] = {"samples": estimate, "real_vs_real": baseline, "relative_to_real": ratio}
    if real.class_probs is not None:
        results |= class_results(candidate, reference, probs, real.class_probs)
    return results


def measure(space, items, real):
    """The distances of items to as many real ones, name -> Estimate; class_probs, or None."""
    resamples = FEW_RESAMPLES if real.items.shape[1] > MANY_FEATURES else RESAMPLES
    features = extract(real.extractor.features, items)  # (N, D)
    others = real.items[: len(features)]

    def estimate(distance):
        limits = {"resamples": resamples, "max_items": distance.max_items}
        return bootstrap(distance, features, others, **limits)

    estimates = {}
    for of_distance in in_order(estimate, real.distances.values()):  # the processes share them
        estimates |= of_distance
    if real.class_probs is None:
        return estimates, None
    probs = extract(real.extractor.class_probs, items)  # (N, classes)
    estimates |= bootstrap(class_measures, probs, real.class_probs[: len(probs)])
    return estimates, probs


def class_measures(probs, real_probs):
    """Total variation between the class frequencies; fraction of which the classifier is sure."""
    return {
        "class_tv": total_variation(one_hot(probs), one_hot(real_probs)),
        "confident": (probs.amax(dim=1) > CONFIDENT).double().mean().item(),
    }


def class_results(candidate, reference, probs, real_probs):
    """`counts`, the items of each class; `label_accuracy` of samples that were made for labels."""
    results = {}
    if candidate.model is not None and candidate.model.num_classes:
        correct = probs.argmax(dim=1) == reference.sample_labels  # (N,)
        results["label_accuracy"] = {"samples": Estimate.proportion(correct)}
    counts = {}
    for name, p in (("samples", probs), ("real", real_probs)):  # (N, classes)
        counts[name] = torch.bincount(p.argmax(dim=1), minlength=p.shape[1]).tolist()
    return results | {"counts": counts}


def feature_warnings(space, reference, options):
    """What to know before comparing numbers of a feature space, lines."""
    count = len(reference.items)
    real = real_features(space, reference, options)
    dimension = real.items.shape[1]
    of_train = options.reference == "train"
    lines = [real.extractor.weak] if real.extractor.weak else []
    if count < 2 * dimension and "fd" in real.distances:  # a half-sample has a singular covariance
        lines.append(
            f"too few samples: {count:,} for {dimension:,} features, so fd is mostly its bias; "
            "compare it at this number only"
        )
    elif count < 1000:  # the bias of a distance falls with the number of items
        lines.append(f"too few samples, {count:,}, to compare with results of another number")
    if not reference.baseline_matches:
        lines.append(
            f"real vs real is of {len(reference.baseline):,} items only, all of the other split, "
            "so nothing is relative to it"
        )
    seen = count if of_train else len(reference.baseline)  # taken from the training split
    if space == "classifier" and seen > len(reference.dataset.train) // 2:
        of = "the real items" if of_train else "the items of real vs real"
        lines.append(f"among {of} are some on which the classifier was trained")
    for name, distance in real.distances.items():
        if count > (distance.max_items or count):
            lines.append(f"{name} is of {distance.max_items:,} items only")
    if space == "inception" and not (of_train and count >= 50_000):
        lines.append(
            "published FIDs take 50,000 samples against the training split: num_samples=50000, "
            "reference=train"
        )
    return [f"{space}: {line}" for line in lines]


def feature_tables(space, results, evaluation):
    """The tables of a feature space: its classes, if it knows any, and its distances."""
    recipe = evaluation["recipe"]
    tables = []
    if "counts" in results:
        counts = results["counts"]
        rows = {}
        for i, name in enumerate(evaluation["dataset"]["classes"]):
            rows[name] = {"samples": counts["samples"][i], "real": counts["real"][i]}
        tables.append((f"classes by the {space}", "items of each", rows))
    rows = {}
    same_number = recipe["baseline_items"] == recipe["num_samples"]
    for name, cells in results.items():
        if name != "counts":
            if cells.get("real_vs_real") and cells["relative_to_real"] is None and same_number:
                cells = cells | {"relative_to_real": "real vs real near 0"}
            rows[f"{name} {MARKS[find_measure(name).better]}"] = cells
    note = (
        f"{recipe['num_samples']:,} samples against as many {recipe['reference']} items; "
        f"real vs real: {recipe['baseline_items']:,} items of the other split; 95% intervals; "
        "↓ lower is better, ≈ as of real items"
    )
    about = recipe["feature_spaces"].get(space, {})
    if "accuracy" in about:
        note += f"; trained on {about['trained_on']}, accuracy {about['accuracy']:.1%}"
    if space == "inception":
        note += "; fd is the FID"
    return [*tables, (f"feature space: {space}", note, rows)]


def distance_ratio(samples, reference):
    """One number for benchmarks: 2-Wasserstein of points, else FD of values, over real vs real.

    It is 1 for a perfect model, but for chance; it has no error, so take several seeds."""
    distance = DISTANCES["wasserstein2" if samples.ndim == 2 else "fd"].function
    features = pixel_features if samples.dtype == torch.uint8 else value_features
    samples, real, baseline = map(features, (samples, reference.items, reference.baseline))
    return distance(samples, real) / distance(baseline, real[: len(baseline)])


def evaluate_memorization(candidate, reference, options):
    """How near samples lie to training items, in root mean square over the numbers of an item.

    `nn_distance_ratio`: their median distance to the nearest, over that of held-out items.
    `near_duplicates`: the fraction nearer than all but 5% of these. `copies`: at distance 0.
    `closest`: the pairs at the smallest distance."""
    train = reference.dataset.train  # (M, *event)
    heldout, _ = fixed_subset(reference.dataset.test, None, len(reference.items))
    sample_distances, index = on_main(rms_to_nearest, candidate.samples, train)  # (N,), (N,)
    heldout_distances, _ = on_main(rms_to_nearest, heldout, train)  # (N,)
    results = {}
    if min(len(sample_distances), len(heldout)) >= MIN_ITEMS:
        results |= bootstrap(neighbor_measures, sample_distances, heldout_distances)
    results["copies"] = int((sample_distances == 0).sum())
    sample_median = sample_distances.median().item()
    heldout_median = heldout_distances.median().item()
    results["median_distance"] = {"samples": sample_median, "heldout": heldout_median}
    results["closest"] = []
    for i in sample_distances.argsort()[:16].tolist():  # as many pairs as a figure shows
        pair = {"sample": i, "train": index[i].item(), "distance": sample_distances[i].item()}
        results["closest"].append(pair)
    return results


def rms_to_nearest(items, train):
    """Root mean square distance (N,) of items to their nearest in train, and that one's index."""
    distance, index = nearest(items, train)
    return distance / math.sqrt(math.prod(train.shape[1:])), index


def neighbor_measures(sample_distances, heldout_distances):
    """Numbers of the distances (N,) and (M,) to the nearest training item.

    Of both sets at once: the threshold of near_duplicates is itself an estimate, whose error is
    as large as that of the fraction below it."""
    close = heldout_distances.quantile(CLOSE)
    measures = {"near_duplicates": (sample_distances < close).double().mean().item()}
    median = heldout_distances.median()
    if median:  # 0 where most held-out items have a copy among the training items
        measures["nn_distance_ratio"] = (sample_distances.median() / median).item()
    return measures


def memorization_tables(results, evaluation):
    """The table of memorization: each number with what it is of copies and of new items."""
    rows = {
        "median distance to the nearest training item": results["median_distance"]["samples"],
        "the same of held-out items": results["median_distance"]["heldout"],
        "nn_distance_ratio (0: copies, 1: new items)": results.get("nn_distance_ratio"),
        "near_duplicates (0.05: new items)": results.get("near_duplicates"),
        "exact copies": results["copies"],
    }
    rows = {name: {"": cell} for name, cell in rows.items()}
    values = "standardized values" if evaluation["dataset"]["standardized"] else "values"
    return [("memorization", f"root mean square over {values}", rows)]


def evaluate_value_stats(candidate, reference, options):
    """Mean and sd of each channel or dimension, in the data's units; of pixels the saturated.

    Of more than MAX_STATS channels, those that differ most, by their errors."""
    units = reference.dataset.units
    real_stats = channel_stats(reference.items, units)
    results = {}
    deviations = {}  # channel -> its largest difference, in standard errors
    for channel, stats in channel_stats(candidate.samples, units).items():
        results[channel] = {}
        deviations[channel] = 0.0
        for name, ours in stats.items():
            real = real_stats[channel][name]
            error = math.hypot(ours.error, real.error)
            deviation = abs(ours.value - real.value) / error if error else 0.0
            deviations[channel] = max(deviations[channel], deviation)
            results[channel][name] = {"samples": ours, "real": real, "difference": ours - real}
    if len(results) > MAX_STATS:
        chosen = sorted(results, key=deviations.get, reverse=True)[:MAX_STATS]
        results = {channel: results[channel] for channel in results if channel in chosen}
    return results


def channel_stats(items, units=None):
    """channel -> {"mean", "sd"} of items (N, C, ...), and "saturated" of pixels, as Estimates."""
    items = items.reshape(*items.shape[:2], -1)  # (N, C, H * W)
    first = by_parts(lambda part: part.double().mean(dim=2), items)  # moments of each item, (N, C)
    second = by_parts(lambda part: part.double().square().mean(dim=2), items)
    stats = {}
    for c, (x, x2) in enumerate(zip(first.unbind(dim=1), second.unbind(dim=1), strict=True)):
        sd = math.sqrt(max(0.0, x2.mean().item() - x.mean().item() ** 2))
        # each item's influence on the sd, by the delta method
        influence = (x2 - 2 * x.mean() * x) / (2 * sd or 1) / math.sqrt(len(x))
        if units is not None:  # after the squares, which of a mean far from 0 would lose digits
            mean, std = units.mean[c].item(), units.std[c].item()
            x, sd, influence = mean + std * x, std * sd, std * influence
        stats[f"channel {c}"] = {"mean": Estimate.mean(x), "sd": Estimate(sd, influence)}
    if items.dtype == torch.uint8:

        def share_of_ends(part):
            return ((part == 0) | (part == 255)).double().mean(dim=(1, 2))

        saturated = by_parts(share_of_ends, items)  # (N,)
        stats["saturated"] = {"fraction": Estimate.mean(saturated, bounds=(0, 1))}
    return stats


def value_tables(results, evaluation):
    """The table of statistics: a row for each channel or dimension and number."""
    dataset = evaluation["dataset"]
    note = "in the data's units" if dataset["standardized"] else "by channel"
    if len(results) == MAX_STATS < dataset["event"][0]:
        note += f"; of {dataset['event'][0]:,} the {MAX_STATS} that differ most"
    rows = {}
    for channel, stats in results.items():
        for name, cells in stats.items():
            rows[f"{channel}, {name}"] = cells
    return [("statistics of the values", f"{note}, ± standard error", rows)]
