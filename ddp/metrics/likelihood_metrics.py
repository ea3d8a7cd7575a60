"""Metrics of a model: test loss by noise level, the VLB and the ODE NLL of test items.

Each is a function (candidate, reference, options) -> nested dict of Estimates.
"""

import math

import torch

from ddp.metrics.candidate import iterate_test_set, log_density, nats_per_unit
from ddp.metrics.likelihood import loss_by_noise_level, ode_nll, vlb
from ddp.metrics.uncertainty import Estimate


def evaluate_loss(candidate, reference, options):
    """Test loss at ten noise levels, in units of x0, eps and v.

    Rows are named by log-SNR, since two schedules have different levels at one t."""
    model = candidate.model
    batches = []  # for each batch ten rows, of a level each
    items = iterate_test_set(model, reference, options, "loss", options.vlb_items)
    for x0, indices, label in items:
        batches.append(loss_by_noise_level(model, x0, indices, options.seed, label=label))
    results = {}
    for rows in zip(*batches, strict=True):  # the rows of one level, of a batch each
        log_snr = rows[0]["log_snr"]
        result = {"log_snr": log_snr, "t": rows[0]["t"]}
        for unit in ("x0", "eps", "v"):
            losses = torch.cat([row[unit] for row in rows])  # (N,)
            result[unit] = Estimate.mean(losses)
        results[f"log-SNR {log_snr:.2f}"] = result
    return results


def evaluate_vlb(candidate, reference, options):
    """Variational bound (VLB) in discrete and in continuous time, in bits/dim, or nats for points.

    Its terms, their `total`, `monte_carlo`, the part of the total's error that more noise levels
    would lower, and the total's `gap` to the entropy of the data, where that is known."""
    known = log_density(reference.dataset, options.vlb_items)  # (N,) or None
    half = options.vlb_samples // 2  # noise levels of each item
    results = {}
    for time in ("discrete", "continuous"):
        first = vlb_of_test_set(candidate.model, reference, options, time, range(half))
        second = vlb_of_test_set(candidate.model, reference, options, time, range(half, 2 * half))
        terms = {name: (first[name] + second[name]) / 2 for name in first}  # each (N,)
        results[time] = {name: Estimate.mean(values) for name, values in terms.items()}
        noise = (first["total"] - second["total"]) / 2  # the halves have independent noise
        results[time]["monte_carlo"] = (noise.square().sum().sqrt() / len(noise)).item()
        if known is not None:
            results[time]["gap"] = Estimate.mean(terms["total"] + known)
    return results


def vlb_of_test_set(model, reference, options, time, numbers):
    """Terms of the VLB of the test items, each (N,), from the noise levels of these numbers."""
    dataset = reference.dataset
    parts = {}  # term -> a list of (B,)
    name = f"vlb, {time}"
    for x0, indices, label in iterate_test_set(model, reference, options, name, options.vlb_items):
        terms = vlb(
            model,
            x0,
            indices,
            options.seed,
            len(numbers),
            label,
            discrete=dataset.is_image,
            time=time,
            first=numbers[0],
        )
        for term, nats in terms.items():
            parts.setdefault(term, []).append(nats)
    unit = nats_per_unit(dataset)
    return {term: torch.cat(nats) / unit for term, nats in parts.items()}


def evaluate_ode_nll(candidate, reference, options):
    """Negative log-likelihood along the probability-flow ODE, in bits/dim, or nats for points.

    Points have a density; images are dequantized, by `uniform` noise and by the VLB's own `noise`,
    where `total` is a bound and `importance_weighted` a tighter one. `gap`: to the entropy of the
    data, where it is known. `below_vlb`: how far below the continuous VLB of the same items."""
    dataset = reference.dataset
    unit = nats_per_unit(dataset)
    known = log_density(dataset, options.nll_items)  # (N,) or None
    bound = candidate.results.get("vlb")
    results = {}
    for dequantization in ("uniform", "noise") if dataset.is_image else ("density",):
        nats = nll_of_test_set(candidate.model, reference, options, dequantization)  # (K, N)
        values = {"total": nats.mean(dim=0) / unit}  # each (N,)
        if dataset.is_image:
            weighted = math.log(len(nats)) - torch.logsumexp(-nats, dim=0)
            values["importance_weighted"] = weighted / unit
        elif known is not None:
            values["gap"] = values["total"] + known
        if bound and dequantization != "uniform":  # which bounds another quantity than the VLB
            vlb_total = bound["continuous"]["total"].per_item
            both = min(len(vlb_total), nats.shape[1])  # items that were measured by either
            values["below_vlb"] = vlb_total[:both] - values["total"][:both]
        results[dequantization] = {name: Estimate.mean(each) for name, each in values.items()}
    return results


def nll_of_test_set(model, reference, options, dequantization):
    """The ODE NLL of the test items in nats, (K, N): of K dequantizations, or K = 1 for points."""
    name = f"ode_nll, {dequantization}"
    copies = options.dequant_samples
    if not reference.dataset.is_image:
        copies = 1
        dequantization = None
    parts = []
    for x0, indices, label in iterate_test_set(
        model, reference, options, name, options.nll_items, copies
    ):
        nats = ode_nll(model, x0, indices, options.seed, copies, label, dequantization)
        parts.append(nats)  # (K, B)
    return torch.cat(parts, dim=1)


def vlb_tables(results, evaluation):
    """The table of a VLB: one row for each kind of time."""
    return likelihood_tables("negative log-likelihood: VLB", "vlb_items", results, evaluation)


def ode_nll_tables(results, evaluation):
    """The table of an ODE NLL: one row for each dequantization."""
    return likelihood_tables("negative log-likelihood: ODE NLL", "nll_items", results, evaluation)


def likelihood_tables(title, items, results, evaluation):
    """The rows as they are, and below them the entropy of the data where it is known."""
    recipe = evaluation["recipe"]
    note = f"{recipe['unit']}, ± standard error; {recipe[items]:,} test items"
    if "uniform" in results:
        note += f", {recipe['dequant_samples']} dequantizations each"
    rows = dict(results)
    if evaluation["entropy"]:
        rows["entropy of the data"] = {"total": evaluation["entropy"]}
    return [(title, note, rows)]
