"""Measure models and sets of samples: METRICS, each number an Estimate with its error.

Every candidate meets the same real items and the same noise, so that the difference of two has a
paired error. From a metric's name to its formula: METRICS["inception"] is feature_metrics, which
passes each of the DISTANCES, DISTANCES["fd"] being frechet_distance, to bootstrap.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ddp.data import permutation
from ddp.distributed import on_main, world_size
from ddp.io.checkpoint import provenance
from ddp.io.spelling import none_of
from ddp.metrics.candidate import generate_samples, likelihood_unit, log_density, log_std
from ddp.metrics.comparison import comparison, group_comparison, group_warnings
from ddp.metrics.distances import DISTANCES, NEIGHBORS, find_measure
from ddp.metrics.features import FEATURES
from ddp.metrics.likelihood import TOLERANCES
from ddp.metrics.likelihood_metrics import (
    evaluate_loss,
    evaluate_ode_nll,
    evaluate_vlb,
    loss_calls,
    loss_tables,
    nll_tables,
    ode_nll_calls,
    sampling_calls,
    seconds_of_a_call,
    vlb_calls,
)
from ddp.metrics.sample_metrics import (
    FEW_RESAMPLES,
    MANY_FEATURES,
    evaluate_memorization,
    evaluate_value_stats,
    feature_metrics,
    feature_tables,
    feature_warnings,
    memorization_tables,
    value_tables,
)
from ddp.metrics.uncertainty import RESAMPLES, Estimate

SCHEMA = 6  # of the JSON; raise when a key changes
MIN_ITEMS = 20  # real items, below which there is nothing to compare with in a feature space
LONG = 300  # seconds: what would take longer is measured when it is asked for by name
OLD_METRICS = {  # names before 0.2, still accepted
    "bound": "vlb",
    "exact": "ode_nll",
    "judge": "classifier",
    "plane": "points",
    "memorisation": "memorization",
    "calibration": "value_stats",
    "pixel_stats": "value_stats",  # before 0.4
}


@dataclass(frozen=True)
class Metric:
    """What is known of a metric. Only `function` is needed: the rest has defaults."""

    function: Callable  # (candidate, reference, options) -> nested dict of Estimates or numbers
    needs_model: bool = False  # and no samples, which all others need
    kinds: tuple = ("image", "sequence", "point")  # the data that it is for, see kinds_of
    by_default: bool = True  # measured unless metrics are chosen by name
    title: str = ""  # of its table; default: its name
    note: str = ""
    show_interval: bool = False  # print 95% intervals instead of ± standard errors
    tables: Callable | None = None  # (results, evaluation), as JSON -> (title, note, rows), a list
    calls: Callable | None = None  # (options, is_pixels) -> network evaluations of one item
    better: Callable | None = None  # (keys of a result) -> "lower", "higher", None: neither


def better_feature(keys):
    """Which is better of a distance or proportion, ("pixels", "fd", "samples")."""
    return find_measure(keys[1]).better


def better_loss(keys):
    """Which is better of a loss or a likelihood, which is negative; less is below_vlb itself."""
    return None if keys[-1] == "below_vlb" else "lower"


def find_better(keys):
    """Which is better of the results with such keys, those of flatten."""
    metric = known_metrics().get(keys[0])  # None: of a plugin that is not here
    return metric and metric.better and metric.better(keys)


def feature_space_metric(space):
    """The Metric of a feature space: FID, KID, PRDC and the like (DISTANCES) in FEATURES[space]."""
    return Metric(
        partial(feature_metrics, space),
        kinds=FEATURES[space].kinds,
        by_default=FEATURES[space].by_default,
        show_interval=True,
        tables=partial(feature_tables, space),
        better=better_feature,
    )


METRICS = {  # of samples first; the dearest last, which is also compared with the VLB
    **{space: feature_space_metric(space) for space in FEATURES},
    "memorization": Metric(evaluate_memorization, show_interval=True, tables=memorization_tables),
    "value_stats": Metric(evaluate_value_stats, tables=value_tables),
    "loss": Metric(
        evaluate_loss,
        needs_model=True,
        tables=loss_tables,
        calls=loss_calls,
        better=better_loss,
    ),
    "vlb": Metric(
        evaluate_vlb,
        True,
        tables=partial(nll_tables, "VLB", "vlb_items"),
        calls=vlb_calls,
        better=better_loss,
    ),
    "ode_nll": Metric(
        evaluate_ode_nll,
        True,
        tables=partial(nll_tables, "ODE NLL", "nll_items"),
        calls=ode_nll_calls,
        better=better_loss,
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
            raise ValueError(none_of("metrics", name, known_metrics()))
    return names


def parse_metrics(text, kinds, has_model):
    """The names in "vlb,pixels", in the order of METRICS; of None all that apply by default.

    kinds: of the data, as kinds_of gives them."""
    known = known_metrics()
    fit = [name for name, metric in known.items() if {*kinds} & {*metric.kinds}]
    if text is None:
        fit = [name for name in fit if known[name].by_default]
        return [name for name in fit if has_model or not known[name].needs_model]
    names = metric_names(text)
    for name in names:
        if name not in fit:
            wanted = " or ".join(known[name].kinds)
            raise ValueError(f"metrics={name} is for data of the kind {wanted}, not {kinds[-1]}")
        if known[name].needs_model and not has_model:
            raise ValueError(f"metrics={name} needs a model, not samples alone")
    return [name for name in known if name in names]  # the VLB before what is compared with it


def evaluate(candidates, reference, metrics, options, by_default=False, tell=None, report=None):
    """Measure candidates, whose `samples` and `results` it fills in: a dict for JSON.

    by_default: nobody asked for these metrics, so one that takes LONG, or means little, is left
    out with a warning. tell: function of a line, how long it will take. report: function (what is
    measured so far, candidate, metric's name), called after each metric."""
    measured, warnings = choose_metrics(candidates, reference, metrics, options, by_default, tell)
    warnings = candidate_warnings(candidates, reference.dataset) + warnings
    warnings += group_warnings(candidates)
    evaluation = to_json(summary(candidates, reference, metrics, options, warnings))
    for candidate in candidates:
        names = [name for name in measured if fits(name, candidate, reference.dataset)]
        for name in reference.progress(names, desc=candidate.name):
            metric = known_metrics()[name]
            if not metric.needs_model:
                prepare_samples(candidate, reference, options)
            candidate.results[name] = metric.function(candidate, reference, options)
            evaluation = to_json(summary(candidates, reference, metrics, options, warnings))
            if report:
                report(evaluation, candidate, name)
    return evaluation


def choose_metrics(candidates, reference, metrics, options, by_default, tell):
    """(those of the metrics that will be measured, warnings); arguments as of evaluate."""
    warnings = []
    seconds = on_main(estimate_seconds, candidates, reference, metrics, options)
    for name in metrics:
        if by_default and name != "samples" and seconds.get(name, 0) > LONG:
            line = f"{name}: left out, it takes about {duration(seconds.pop(name))}"
            warnings.append(f"{line}; to ask for it: metrics={name}")
            metrics = [other for other in metrics if other != name]
    if seconds and tell:
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        shared = f", shared by {world_size()} processes" if world_size() > 1 else ""
        tell(f"the network takes about {duration(sum(seconds.values()))}{shared}: {parts}")
    measured = []
    count = len(reference.items)
    for name in metrics:
        if name not in FEATURES:
            measured.append(name)
            continue
        if count < MIN_ITEMS:
            line = f"{name}: not measured, {count} samples or real items are too few"
            warnings.append(f"{line}; at least {MIN_ITEMS} are needed")
            continue
        lines = feature_warnings(name, reference, options)  # reads the real items: it may fail
        if by_default and reference.spaces[name].extractor.weak:
            warnings.append(f"{lines[0]}; it is not measured unless asked for: metrics={name}")
            continue
        measured.append(name)
        warnings += lines
    return measured, warnings


def fits(name, candidate, dataset):
    """Whether a metric can be measured of a candidate: by its model, and by the labels of items."""
    if not known_metrics()[name].needs_model:
        return True
    model = candidate.model
    return model is not None and not (model.num_classes and dataset.test_labels is None)


def prepare_samples(candidate, reference, options):
    """Give a candidate as many samples as real items, by its model or out of those it has."""
    count = len(reference.items)
    if candidate.samples is None:
        candidate.samples = generate_samples(candidate, reference, options)
    elif len(candidate.samples) > count:  # somebody's, perhaps sorted
        chosen = permutation(0, 0, len(candidate.samples))[:count].sort().values
        candidate.samples = candidate.samples[chosen]


def estimate_seconds(candidates, reference, metrics, options):
    """Seconds that the networks will take, about: "samples" or a metric's name -> a float."""
    known = known_metrics()
    seconds = {}
    for candidate in candidates:
        calls = {n: known[n].calls for n in metrics if fits(n, candidate, reference.dataset)}
        calls = {n: f(options, reference.dataset.is_pixels) for n, f in calls.items() if f}
        if candidate.samples is None and not all(known[n].needs_model for n in metrics):
            calls["samples"] = sampling_calls(candidate) * len(reference.items)
        each = seconds_of_a_call(candidate.model, reference.items) if calls else 0
        for name, number in calls.items():
            seconds[name] = seconds.get(name, 0) + number * each
    return seconds


def duration(seconds):
    """Seconds as text, such as "40 s" or "6 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def summary(candidates, reference, metrics, options, warnings):
    """All that is measured so far, a dict with Estimates; see docs/evaluation.md."""
    dataset = reference.dataset
    density = log_density(dataset, options.vlb_items)  # (N,) in nats, or None
    about = {name: getattr(dataset, name) for name in ("name", "fingerprint", "event", "classes")}
    about |= {"train": len(dataset.train), "test": len(dataset.test)}
    about["val"] = 0 if dataset.val is None else len(dataset.val)
    about["standardized"] = dataset.units is not None
    about["log_std"] = log_std(dataset.units)  # nats/dim of its own units, less standardized ones
    about["best_chosen_on"] = dataset.selection_split
    return {
        "schema": SCHEMA,
        "dataset": about,
        "recipe": recipe(reference, metrics, options),
        "warnings": warnings,
        "entropy": None if density is None else Estimate.mean(-density),
        "subjects": [{"name": c.name, "about": c.about, **c.results} for c in candidates],
        "comparison": comparison(candidates),
        "groups": group_comparison(candidates, find_better),
    }


def candidate_warnings(candidates, dataset):
    """What to know of the candidates, lines: how files were read, and data of another training."""
    warnings = []
    for candidate in candidates:
        if Path(candidate.about.get("checkpoint", "")).name == "best.pth" and dataset.val is None:
            warnings.append(
                f"{candidate.name}: {dataset.name} has no validation items, so best.pth was chosen "
                "on the test items, of which its figures are: they are a little too good"
            )
        model = candidate.model
        if model is not None and model.num_classes and dataset.test_labels is None:
            warnings.append(
                f"{candidate.name}: the test items have no labels, so its losses and likelihoods "
                "are not measured"
            )
        if "sha256" not in candidate.about:  # images of a folder may have been resized
            warnings += candidate.about.get("summary", [])[:1]
        trained_on = candidate.about.get("provenance", {})
        is_toy = len(dataset.event) == 1 and dataset.units is None
        same_points = is_toy and trained_on.get("dataset") == dataset.name  # any seed
        fingerprint = trained_on.get("fingerprint", dataset.fingerprint)  # samples have none
        if fingerprint != dataset.fingerprint and not same_points:
            warnings.append(
                f"{candidate.name}: this is not the data that the model was trained on, or not its "
                "split; the test items may have been among the training items"
            )
    return warnings


def recipe(reference, metrics, options):
    """All that the numbers depend on besides data and candidates: two that agree in it compare."""
    return {
        **asdict(options),
        "metrics": metrics,
        "baseline_items": len(reference.baseline),
        "unit": likelihood_unit(reference.dataset),
        "device": str(reference.device),
        "feature_spaces": {name: real.extractor.about for name, real in reference.spaces.items()},
        "ode_tolerances": TOLERANCES,
        "neighbors": NEIGHBORS,
        "resamples": RESAMPLES,
        f"resamples_above_{MANY_FEATURES}_features": FEW_RESAMPLES,
        "max_items": {name: d.max_items for name, d in DISTANCES.items() if d.max_items},
        "provenance": provenance(reference.dataset),
    }


def to_json(tree):
    """Nested dicts and lists with each Estimate as a dict, and None for what is not finite."""
    if isinstance(tree, Estimate):
        tree = {"value": tree.value, "error": tree.error, "interval": tree.interval}
    if isinstance(tree, dict):
        return {name: to_json(part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_json(part) for part in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
