"""Measured models side by side: each less the first, and groups of trainings less the first group.

Training a network again moves its figures, often by more than other samples do: a Frechet distance
about three times as much ("The FID Lottery", arXiv 2606.20536). Two models show how these two
differ; only groups of trainings, of a seed each, show which way of training is better.
"""

import math
from statistics import fmean, stdev

import torch

from ddp.metrics.uncertainty import Estimate, difference_of_trainings

MIN_PAIRS = 3  # two differences may agree by chance, all the more where items are counted
NOT_COMPARED = ("real_vs_real", "real", "relative_to_real")  # the same for all, or a ratio to it


def flatten(tree, path=()):
    """Nested dicts as one, {("vlb", "discrete", "total"): ...}; an estimate stays as it is."""
    if not isinstance(tree, dict) or tree.keys() == {"value", "error", "interval"}:
        return {path: tree}  # a leaf
    flat = {}
    for name, part in tree.items():
        flat |= flatten(part, (*path, str(name)))
    return flat


def flat_results(subject):
    """The results of a subject of an evaluation, as JSON, flattened: without name and origin."""
    return flatten({key: subject[key] for key in subject if key not in ("name", "about")})


def compared(candidate):
    """The results of a candidate that are compared, keys -> Estimate."""
    flat = flatten(candidate.results)
    return {k: e for k, e in flat.items() if isinstance(e, Estimate) and k[-1] not in NOT_COMPARED}


def comparison(candidates):
    """The results of each further candidate less those of the first, None where it has none.

    Groups are compared instead, where there are any."""
    rows = []
    first = flatten(candidates[0].results)
    for candidate in candidates[1:] if candidates[0].group is None else []:
        for keys, estimate in compared(candidate).items():
            difference = estimate - first[keys] if keys in first else None  # with a paired error
            path = "/".join(keys)
            rows.append({"subject": candidate.name, "path": path, "difference": difference})
    return rows


# ---- groups of trainings ----


def members_of(candidates):
    """The candidates of each group, name -> list; {} where they are in none."""
    groups = {}
    for candidate in candidates:
        if candidate.group is not None:
            groups.setdefault(candidate.group, []).append(candidate)
    return groups


def seeds_of(members):
    """The seeds of the trainings; None of samples, whose training is not known."""
    return [candidate.config and candidate.config.seed for candidate in members]


def pairing(seeds, others):
    """The indices in `others` of the seeds, whose trainings can be paired.

    None unless both are the same seeds, each once, and MIN_PAIRS or more."""
    if None in (*seeds, *others) or sorted(seeds) != sorted(others):
        return None
    if len({*seeds}) < max(len(seeds), MIN_PAIRS):  # one twice, or too few
        return None
    return [others.index(seed) for seed in seeds]


def group_warnings(candidates):
    """What groups of trainings cannot show, lines."""
    groups = members_of(candidates)
    single = [name for name, members in groups.items() if len(members) == 1]
    warnings = []
    if single and len(groups) > 1:
        warnings.append(
            f"{', '.join(single)}: one training each: the interval holds the samples alone, and "
            "shows nothing about trainings; give two or more, each of another seed"
        )
    for name, members in groups.items():
        seeds = [seed for seed in seeds_of(members) if seed is not None]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            warnings.append(f"{name}: two runs have seed {twice[0]}; are they two trainings?")
    return warnings


def group_comparison(
    candidates,
    find_better,  # (keys) -> "lower", "higher", or None: neither is better
):
    """Of each group of trainings its spreads, and its differences to the first group: a list.

    `figures`: path -> `mean`; `sd`, the standard deviation between trainings, None of one;
    `sample_error`, the mean of the trainings' own errors. Figures that a training lacks are left
    out. `less_first`: see differences."""
    groups = members_of(candidates)
    results = []
    for name, members in groups.items():
        figures = {}
        for keys, estimates in common_figures(members).items():
            values = [estimate.value for estimate in estimates]
            figures["/".join(keys)] = {
                "mean": fmean(values),
                "sd": stdev(values) if len(values) > 1 else None,
                "sample_error": fmean(estimate.error for estimate in estimates),
            }
        about = {"name": name, "subjects": [candidate.name for candidate in members]}
        about |= {"seeds": seeds_of(members), "figures": figures}
        first = next(iter(groups))
        about["less_first"] = None
        if name != first:
            about["less_first"] = differences(first, groups[first], name, members, find_better)
        results.append(about)
    return results


def common_figures(members):
    """The results that all candidates have, keys -> their Estimates, a list."""
    parts = [compared(candidate) for candidate in members]
    keys = [key for key in parts[0] if all(key in part for part in parts)]
    return {key: [part[key] for part in parts] for key in keys}


def differences(first, first_members, name, members, find_better):
    """The figures of the group `name` less those of the group `first`, and which is better.

    `interval_of`: "trainings", by Student's t, `paired` where three or more seeds match, else by
    Welch's test; or "samples", the normal interval of these very networks, where a group has one
    training: then neither is called better. `better`: a group's name, or None: it cannot be told,
    or neither direction is better."""
    order = pairing(seeds_of(first_members), seeds_of(members))
    by_training = min(len(first_members), len(members)) > 1
    baseline = common_figures(first_members)
    figures = {}
    for keys, estimates in common_figures(members).items():
        if keys not in baseline:
            continue
        better = None
        if by_training:
            difference = training_difference(baseline[keys], estimates, order)
            low, high = difference["interval"]
            wanted = find_better(keys)
            if wanted and (low > 0 or high < 0):
                better = name if (low > 0) == (wanted == "higher") else first
        else:
            difference = mean_estimate(estimates) - mean_estimate(baseline[keys])
        figures["/".join(keys)] = {"difference": difference, "better": better}
    of = "trainings" if by_training else "samples"
    return {"interval_of": of, "paired": by_training and order is not None, "figures": figures}


def training_difference(first, second, order):
    """The mean of the second Estimates less that of the first, with the interval of Student's t.

    order: the indices in `second` of the partners of the first, or None."""
    first = [estimate.value for estimate in first]
    second = [estimate.value for estimate in second]
    if order is not None:
        second = [second[i] for i in order]
    return difference_of_trainings(first, second, order is not None)


def mean_estimate(estimates):
    """The mean of Estimates, whose replicates belong together, as an Estimate."""
    value = math.fsum(estimate.value for estimate in estimates) / len(estimates)
    return Estimate(value, torch.stack([e.replicates for e in estimates]).mean(dim=0))
