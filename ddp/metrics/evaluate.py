"""Measure models and sets of samples: METRICS, each number an Estimate with its error.

Every candidate meets the same real items and the same noise, so that the difference of two has a
paired error. From a metric's name to its formula: METRICS["inception"] is feature_metrics, which
passes each of the DISTANCES, DISTANCES["fd"] being frechet_distance, to bootstrap.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from ddp.data import permutation
from ddp.io.checkpoint import provenance
from ddp.metrics.candidate import generate_samples, log_density
from ddp.metrics.distances import DISTANCES, NEIGHBORS
from ddp.metrics.features import FEATURES
from ddp.metrics.likelihood import TOLERANCES
from ddp.metrics.likelihood_metrics import evaluate_loss, evaluate_ode_nll, evaluate_vlb, nll_tables
from ddp.metrics.sample_metrics import (
    FEW_RESAMPLES,
    MANY_FEATURES,
    evaluate_memorization,
    evaluate_pixel_stats,
    feature_metrics,
    feature_tables,
    feature_warnings,
    memorization_tables,
)
from ddp.metrics.uncertainty import RESAMPLES, Estimate

SCHEMA = 3  # of the JSON; raise when a key changes
MIN_ITEMS = 20  # real items, below which there is nothing to compare with in a feature space
NOT_COMPARED = ("real_vs_real", "real", "relative_to_real")  # the same for all, or a ratio to it
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
    needs_model: bool = False  # and no samples, which all others need
    kinds: tuple = ("image", "point")  # the data that it is for
    by_default: bool = True  # measured unless metrics are chosen by name
    title: str = ""  # of its table; default: its name
    note: str = ""
    show_interval: bool = False  # print 95% intervals instead of ± standard errors
    tables: Callable | None = None  # (results, evaluation), as JSON -> (title, note, rows), a list


def feature_space_metric(space):
    """The Metric of a feature space: FID, KID, PRDC and the like (DISTANCES) in FEATURES[space]."""
    return Metric(
        partial(feature_metrics, space),
        kinds=(FEATURES[space].kind,),
        by_default=FEATURES[space].by_default,
        show_interval=True,
        tables=partial(feature_tables, space),
    )


METRICS = {
    "loss": Metric(
        evaluate_loss,
        needs_model=True,
        title="test loss by noise level",
        note="in units of x0, eps and v, ± standard error",
    ),
    "vlb": Metric(evaluate_vlb, True, tables=partial(nll_tables, "VLB", "vlb_items")),
    "ode_nll": Metric(evaluate_ode_nll, True, tables=partial(nll_tables, "ODE NLL", "nll_items")),
    **{space: feature_space_metric(space) for space in FEATURES},
    "memorization": Metric(evaluate_memorization, show_interval=True, tables=memorization_tables),
    "pixel_stats": Metric(
        evaluate_pixel_stats, title="pixel statistics", note="by channel, ± standard error"
    ),
}


def known_metrics():
    """METRICS, and a metric for each further space that somebody added to FEATURES."""
    added = [space for space in FEATURES if space not in METRICS]
    return METRICS | {space: feature_space_metric(space) for space in added}


def metric_names(text):
    """Return the names in "vlb,pixels". Raises ValueError for one that is unknown."""
    words = [word.strip() for word in text.split(",")]
    names = [OLD_METRICS.get(word, word) for word in words]
    for name in names:
        if name not in known_metrics():
            raise ValueError(f"metrics={name}: expected some of {', '.join(known_metrics())}")
    return names


def parse_metrics(text, is_image, has_model):
    """The names in "vlb,pixels", in the order of METRICS; of None all that apply by default."""
    kind = "image" if is_image else "point"  # of Metric.kinds
    known = known_metrics()
    if text is None:
        fit = [name for name, metric in known.items() if metric.by_default and kind in metric.kinds]
        return [name for name in fit if has_model or not known[name].needs_model]
    names = metric_names(text)
    for name in names:
        if kind not in known[name].kinds:
            raise ValueError(f"metrics={name} is for {known[name].kinds[0]}s, not for this data")
        if known[name].needs_model and not has_model:
            raise ValueError(f"metrics={name} needs a model, not samples alone")
    return [name for name in known if name in names]  # the VLB before what is compared with it


def evaluate(candidates, reference, metrics, options):
    """Measure candidates, whose `samples` and `results` it fills in: a dict for JSON."""
    known = known_metrics()
    count = len(reference.items)
    measured = [name for name in metrics if name not in FEATURES or count >= MIN_ITEMS]
    warnings = []
    for name in metrics:
        if name not in measured:
            warnings.append(f"{name}: not measured, too few samples or real items, {count}")
        elif name in FEATURES:  # reads the real items: what may fail, before hours of work
            warnings += feature_warnings(name, reference, options)
    for candidate in candidates:
        if candidate.samples is not None:  # somebody's, perhaps more than real items, or sorted
            chosen = permutation(0, 0, len(candidate.samples))[:count].sort().values
            candidate.samples = candidate.samples[chosen]
        elif not all(known[name].needs_model for name in measured):
            candidate.samples = generate_samples(candidate, reference, options)
        for name in reference.progress(measured, desc=candidate.name):
            if candidate.model is not None or not known[name].needs_model:
                candidate.results[name] = known[name].function(candidate, reference, options)
    dataset = reference.dataset
    density = log_density(dataset, options.vlb_items)  # (N,) in nats, or None
    about = {name: getattr(dataset, name) for name in ("name", "fingerprint", "event", "classes")}
    evaluation = {  # see docs/evaluation.md
        "schema": SCHEMA,
        "dataset": about | {"train": len(dataset.train), "test": len(dataset.test)},
        "recipe": recipe(reference, metrics, options),
        "warnings": candidate_warnings(candidates, dataset) + warnings,
        "entropy": None if density is None else Estimate.mean(-density),
        "subjects": [{"name": c.name, "about": c.about, **c.results} for c in candidates],
        "comparison": comparison(candidates),
    }
    return to_json(evaluation)


def candidate_warnings(candidates, dataset):
    """What to know of the candidates, lines: how files were read, and data of another training."""
    warnings = []
    for candidate in candidates:
        if "sha256" not in candidate.about:  # images of a folder may have been resized
            warnings += candidate.about.get("summary", [])[:1]
        trained_on = candidate.about.get("provenance", {})
        same_points = not dataset.is_image and trained_on.get("dataset") == dataset.name  # any seed
        fingerprint = trained_on.get("fingerprint", dataset.fingerprint)  # samples have none
        if fingerprint != dataset.fingerprint and not same_points:
            warnings.append(
                f"{candidate.name}: this is not the data that the model was trained on; its test "
                "items may have been among the training items"
            )
    return warnings


def recipe(reference, metrics, options):
    """All that the numbers depend on besides data and candidates: two that agree in it compare."""
    return {
        **asdict(options),
        "metrics": metrics,
        "baseline_items": len(reference.baseline),
        "unit": "bits/dim" if reference.dataset.is_image else "nats",
        "device": str(reference.device),
        "feature_spaces": {name: real.extractor.about for name, real in reference.spaces.items()},
        "ode_tolerances": TOLERANCES,
        "neighbors": NEIGHBORS,
        "resamples": RESAMPLES,
        f"resamples_above_{MANY_FEATURES}_features": FEW_RESAMPLES,
        "max_items": {name: d.max_items for name, d in DISTANCES.items() if d.max_items},
        "provenance": provenance(reference.dataset),
    }


def comparison(candidates):
    """The results of each further candidate less those of the first, None where it has none."""
    rows = []
    first = flatten(candidates[0].results)
    for candidate in candidates[1:]:
        for keys, estimate in flatten(candidate.results).items():
            if not isinstance(estimate, Estimate) or keys[-1] in NOT_COMPARED:
                continue
            difference = estimate - first[keys] if keys in first else None  # with a paired error
            path = "/".join(keys)
            rows.append({"subject": candidate.name, "path": path, "difference": difference})
    return rows


def flatten(tree, path=()):
    """Nested dicts as one, {("vlb", "discrete", "total"): ...}; an estimate stays as it is."""
    if not isinstance(tree, dict) or tree.keys() == {"value", "error", "interval"}:
        return {path: tree}  # a leaf
    flat = {}
    for name, part in tree.items():
        flat |= flatten(part, (*path, str(name)))
    return flat


def to_json(tree):
    """Nested dicts and lists with each Estimate as a dict, and None for what is not finite."""
    if isinstance(tree, Estimate):
        tree = {"value": tree.value, "error": tree.error, "interval": tree.interval}
    if isinstance(tree, dict):
        return {name: to_json(part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_json(part) for part in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
