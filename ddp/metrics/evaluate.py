"""Measure models and sets of samples: METRICS, each number an Estimate with its error.

Every candidate meets the same real items and the same noise, so that the difference of two has a
paired error. From a metric's name to its formula: METRICS["inception"] is feature_metrics, which
passes each of the DISTANCES, such as frechet_distance, to bootstrap.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from ddp.data import permutation
from ddp.io.checkpoint import provenance
from ddp.metrics.candidate import generate_samples, log_density
from ddp.metrics.distances import DISTANCES, NEIGHBORS
from ddp.metrics.features import FEATURES
from ddp.metrics.likelihood import TOLERANCES
from ddp.metrics.likelihood_metrics import (
    evaluate_loss,
    evaluate_ode_nll,
    evaluate_vlb,
    ode_nll_tables,
    vlb_tables,
)
from ddp.metrics.sample_metrics import (
    FEW_RESAMPLES,
    MANY_FEATURES,
    evaluate_memorization,
    evaluate_pixel_stats,
    feature_metrics,
    feature_tables,
    feature_warnings,
    memorization_tables,
    real_features,
)
from ddp.metrics.uncertainty import RESAMPLES, Estimate

SCHEMA = 3  # of the JSON; raise when a key changes
MIN_ITEMS = 20  # real items, below which there is nothing to compare with in a feature space
OLD_METRICS = {  # names before 0.2, still accepted
    "bound": "vlb",
    "exact": "ode_nll",
    "judge": "classifier",
    "plane": "points",
    "memorisation": "memorization",
    "calibration": "pixel_stats",
}


@dataclass(frozen=True)
class Metric:
    """What is known of a metric. Only `function` is needed: the rest has defaults."""

    function: Callable  # (candidate, reference, options) -> nested dict of Estimates or numbers
    needs_model: bool = False  # left out of samples alone
    needs_samples: bool = True  # as candidate.samples
    kinds: tuple = ("image", "point")  # the data that it is for
    by_default: bool = True  # measured unless metrics are chosen by name
    min_items: int = 0  # real items, below which it is left out
    prepare: Callable | None = None  # (reference, options): done first, since it may fail
    warnings: Callable | None = None  # (reference, options) -> lines
    title: str = ""  # of its table; default: its name
    note: str = ""
    show_interval: bool = False  # print 95% intervals instead of ± standard errors
    tables: Callable | None = None  # (results, evaluation), as JSON -> (title, note, rows), a list


def feature_space_metric(space):
    """The Metric of a feature space: FID, KID, PRDC and the like (DISTANCES) in FEATURES[space]."""
    return Metric(
        functools.partial(feature_metrics, space),
        kinds=(FEATURES[space].kind,),
        by_default=FEATURES[space].by_default,
        min_items=MIN_ITEMS,
        prepare=functools.partial(real_features, space),
        warnings=functools.partial(feature_warnings, space),
        show_interval=True,
        tables=functools.partial(feature_tables, space),
    )


METRICS = {
    "loss": Metric(
        evaluate_loss,
        needs_model=True,
        needs_samples=False,
        title="test loss by noise level",
        note="in units of x0, eps and v, ± standard error",
    ),
    "vlb": Metric(evaluate_vlb, needs_model=True, needs_samples=False, tables=vlb_tables),
    "ode_nll": Metric(
        evaluate_ode_nll, needs_model=True, needs_samples=False, tables=ode_nll_tables
    ),
    "classifier": feature_space_metric("classifier"),
    "pixels": feature_space_metric("pixels"),
    "inception": feature_space_metric("inception"),
    "points": feature_space_metric("points"),
    "memorization": Metric(evaluate_memorization, show_interval=True, tables=memorization_tables),
    "pixel_stats": Metric(
        evaluate_pixel_stats, title="pixel statistics", note="by channel, ± standard error"
    ),
}


def known_metrics():
    """METRICS, and a metric for each further space that somebody added to FEATURES."""
    metrics = dict(METRICS)
    for space in FEATURES:
        if space not in metrics:
            metrics[space] = feature_space_metric(space)
    return metrics


def parse_metrics(
    text,  # names separated by commas; None: all that apply and need no download
    is_image,
    has_model,  # whether any candidate is a model
):
    """Names of METRICS, in their order. Raises ValueError for one that is not or does not apply."""
    kind = "image" if is_image else "point"
    known = known_metrics()
    if text is None:
        chosen = []
        for name, metric in known.items():
            applies = kind in metric.kinds and (has_model or not metric.needs_model)
            if applies and metric.by_default:
                chosen.append(name)
        return chosen
    names = [word.strip() for word in text.split(",")]
    names = [OLD_METRICS.get(name, name) for name in names]
    for name in names:
        if name not in known:
            raise ValueError(f"metrics={name}: expected some of {','.join(known)}")
        if kind not in known[name].kinds:
            raise ValueError(f"metrics={name} is for {known[name].kinds[0]}s, not for this data")
        if known[name].needs_model and not has_model:
            raise ValueError(f"metrics={name} needs a model, not samples alone")
    return [name for name in known if name in names]


def evaluate(
    candidates,  # a list of Candidate; their `samples` and `results` are filled in
    reference,  # a Reference
    metrics,  # a list of names, see parse_metrics
    options,  # an EvaluateOptions, resolved
):
    """Measure all metrics of all candidates: a dict for JSON, see docs/evaluation.md."""
    known = known_metrics()
    count = len(reference.items)
    measured = [name for name in metrics if count >= known[name].min_items]
    for name in measured:  # what may fail, before hours of work
        if known[name].prepare:
            known[name].prepare(reference, options)
    needs_samples = any(known[name].needs_samples for name in measured)
    for candidate in candidates:
        if candidate.samples is not None:  # somebody's, perhaps more than real items
            candidate.samples = spread_subset(candidate.samples, count)
        elif needs_samples:
            candidate.samples = generate_samples(candidate, reference, options)
        for name in reference.progress(measured, desc=candidate.name):
            if candidate.model is not None or not known[name].needs_model:
                candidate.results[name] = known[name].function(candidate, reference, options)

    warnings = candidate_warnings(candidates, reference.dataset)
    for name in metrics:
        if name not in measured:
            warnings.append(f"{name}: not measured, too few samples or real items, {count}")
        elif known[name].warnings:
            warnings += known[name].warnings(reference, options)
    evaluation = {
        "schema": SCHEMA,
        "dataset": describe_dataset(reference.dataset),
        "recipe": recipe(reference, metrics, options),
        "warnings": warnings,
        "entropy": entropy(reference.dataset, options),
        "subjects": [{"name": c.name, "about": c.about, **c.results} for c in candidates],
        "comparison": comparison(candidates),
    }
    return to_json(evaluation)


def entropy(dataset, options):
    """The entropy of the data in nats, from the test items of the VLB; None where unknown."""
    known = log_density(dataset, options.vlb_items)
    return None if known is None else Estimate.mean(-known)


def spread_subset(items, count):
    """`count` of the items, in their order, from everywhere: they may be sorted by class."""
    return items[permutation(0, 0, len(items))[:count].sort().values]


def candidate_warnings(candidates, dataset):
    """What to know of the candidates, lines: how files were read, and data of another training."""
    warnings = []
    for candidate in candidates:
        if "summary" in candidate.about and "sha256" not in candidate.about:
            warnings += candidate.about["summary"][:1]  # images of a folder may have been resized
        trained_on = candidate.about.get("provenance", {})
        # points of another seed have the same test items
        same_distribution = not dataset.is_image and trained_on.get("dataset") == dataset.name
        fingerprint = trained_on.get("fingerprint", dataset.fingerprint)
        if fingerprint != dataset.fingerprint and not same_distribution:
            warnings.append(
                f"{candidate.name}: this is not the data that the model was trained on; its test "
                "items may have been among the training items"
            )
    return warnings


def describe_dataset(dataset):
    """The data, in plain types."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "event": dataset.event,
        "classes": dataset.classes,
        "train": len(dataset.train),
        "test": len(dataset.test),
    }


def recipe(reference, metrics, options):
    """All that the numbers depend on besides data and candidates: two that agree in it compare."""
    spaces = {name: space.extractor.about for name, space in reference.spaces.items()}
    return {
        **dataclasses.asdict(options),
        "metrics": metrics,
        "baseline_items": len(reference.baseline),
        "unit": "bits/dim" if reference.dataset.is_image else "nats",
        "device": str(reference.device),
        "feature_spaces": spaces,
        "ode_tolerances": TOLERANCES,
        "neighbors": NEIGHBORS,
        "resamples": RESAMPLES,
        f"resamples_above_{MANY_FEATURES}_features": FEW_RESAMPLES,
        "max_items": {name: d.max_items for name, d in DISTANCES.items() if d.max_items},
        "provenance": provenance(reference.dataset),
    }


def comparison(candidates):
    """The results of each further candidate less those of the first, with paired errors: a list.

    The difference is None for what was not measured of the first."""
    first = flatten_estimates(candidates[0].results)
    rows = []
    for candidate in candidates[1:]:
        for path, estimate in flatten_estimates(candidate.results).items():
            if path.endswith(("/real_vs_real", "/real", "/relative_to_real")):
                continue  # the same for all, or says no more than the numbers do
            difference = estimate - first[path] if path in first else None
            rows.append({"subject": candidate.name, "path": path, "difference": difference})
    return rows


def flatten_estimates(tree, prefix=""):
    """Every Estimate in nested dicts: {"vlb/discrete/total": Estimate}."""
    if isinstance(tree, Estimate):
        return {prefix: tree}
    estimates = {}
    if isinstance(tree, dict):
        for name, part in tree.items():
            path = f"{prefix}/{name}" if prefix else str(name)
            estimates |= flatten_estimates(part, path)
    return estimates


def to_json(tree):
    """Nested dicts and lists with each Estimate as a dict, and None for what is not finite."""
    if isinstance(tree, Estimate):
        tree = {"value": tree.value, "error": tree.error, "interval": tree.interval}
    if isinstance(tree, dict):
        return {name: to_json(part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_json(part) for part in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
