"""Metrics of a model: test loss by noise level, the VLB and the ODE NLL of test items.

Each is a function (candidate, reference, options) -> nested dict of Estimates.
"""

import math
from time import perf_counter

import torch

from ddp.data import to_float
from ddp.metrics.candidate import (
    log_density,
    measure_test_set,
    nats_of_units,
    nats_per_unit,
)
from ddp.metrics.likelihood import loss_by_noise_level, ode_nll, vlb
from ddp.metrics.uncertainty import Estimate

TIMED_ITEMS = 64  # on which a network is timed
LOSS_TABLE = "test loss by noise level"  # of a table and a figure
LEVELS = 10  # of the noise, evenly spaced in t, at which the loss is measured
ODE_CALLS = 80  # slopes that the solver asks for, about; measured of digits
BACKWARD = 3  # a slope's divergence takes a backward pass, too


def seconds_of_a_call(model, items):
    """Seconds that the network takes for one of the items, about: the best of three calls."""
    x = to_float(items[:TIMED_ITEMS]).to(model.device)  # (B, *event)
    level = torch.zeros(len(x), device=model.device)
    label = torch.zeros(len(x), dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(3):  # the first sets the device up
        started = perf_counter()
        model.denoise(x, level, label if model.num_classes else None).sum().item()
        seconds.append(perf_counter() - started)
    return min(seconds) / len(x)


def sampling_calls(candidate):
    """How often a network evaluates a sample, about."""
    options = candidate.sampler_options
    guided = options["cfg_scale"] not in (None, 1)
    return options["steps"] * (1 + guided) * (1 + (options["sampler"] == "heun"))


def loss_calls(options, is_pixels):
    """The same of evaluate_loss, of all test items together."""
    return LEVELS * options.vlb_items


def vlb_calls(options, is_pixels):
    """The same of evaluate_vlb: two times, and two reconstruction terms in each."""
    return 2 * (options.vlb_samples + 2) * options.vlb_items


def ode_nll_calls(options, is_pixels):
    """The same of evaluate_ode_nll."""
    copies = 2 * options.dequant_samples if is_pixels else 1
    return ODE_CALLS * BACKWARD * copies * options.nll_items


def evaluate_loss(candidate, reference, options):
    """Test loss at ten noise levels, in units of x0, eps and v.

    Rows are named by log-SNR, since two schedules have different levels at one t."""
    model = candidate.model

    def measure(x0, indices, label):  # ten rows, of a level each
        return loss_by_noise_level(model, x0, indices, options.seed, LEVELS, label)

    batches = measure_test_set(measure, model, reference, options, "loss", options.vlb_items)
    results = {}
    for rows in zip(*batches, strict=True):  # the rows of one level, of a batch each
        log_snr = rows[0]["log_snr"]
        result = {"log_snr": log_snr, "t": rows[0]["t"]}
        for unit in ("x0", "eps", "v"):
            result[unit] = Estimate.mean(torch.cat([row[unit] for row in rows]))  # of (N,)
        results[f"log-SNR {log_snr:.2f}"] = result
    return results


def loss_tables(results, evaluation):
    """The rows of the test loss, of which each is called by its log-SNR."""
    rows = {}
    for name, cells in results.items():
        rows[name] = {key: cell for key, cell in cells.items() if key != "log_snr"}
    return [(LOSS_TABLE, "in units of x0, eps and v, ± standard error", rows)]


def evaluate_vlb(candidate, reference, options):
    """Variational bound (VLB) in discrete and in continuous time, in the unit of likelihood_unit.

    Its terms, their `total`, `monte_carlo`, the part of the total's error that more noise levels
    would lower, and the total's `gap` to the entropy of the data, where that is known."""
    known = log_density(reference.dataset, options.vlb_items)  # (N,) or None
    results = {}
    for time in ("discrete", "continuous"):
        first = vlb_half(candidate.model, reference, options, time, 0)
        second = vlb_half(candidate.model, reference, options, time, 1)
        terms = {name: (first[name] + second[name]) / 2 for name in first}  # each (N,)
        results[time] = {name: Estimate.mean(values) for name, values in terms.items()}
        noise = (first["total"] - second["total"]) / 2  # the halves have independent noise
        results[time]["monte_carlo"] = (noise.square().sum().sqrt() / len(noise)).item()
        if known is not None:
            results[time]["gap"] = Estimate.mean(terms["total"] + known)  # 0: a perfect model
    return results


def vlb_half(model, reference, options, time, number):
    """Terms of the VLB of the test items, each (N,), from half 0 or 1 of their noise levels."""
    half = options.vlb_samples // 2  # noise levels of each item
    discrete = reference.dataset.is_pixels
    parts = {}  # term -> a list of (B,)

    def measure(x0, indices, label):
        how = (label, discrete, time, number * half)
        return vlb(model, x0, indices, options.seed, half, *how)

    items = (f"vlb, {time}", options.vlb_items)
    for terms in measure_test_set(measure, model, reference, options, *items):
        for term, nats in terms.items():
            parts.setdefault(term, []).append(nats / nats_per_unit(reference.dataset))  # (B,)
    offset = nats_of_units(model.units, reference.dataset) / nats_per_unit(reference.dataset)
    terms = {term: torch.cat(values) for term, values in parts.items()}
    return terms | {name: terms[name] + offset for name in ("reconstruction", "total")}


def evaluate_ode_nll(candidate, reference, options):
    """Negative log-likelihood along the probability-flow ODE, in the unit of likelihood_unit.

    Floats have a density; pixels are dequantized, by `uniform` noise and by the VLB's own `noise`,
    where `total` is a bound and `importance_weighted` a tighter one. `gap`: to the entropy of the
    data, where it is known. `below_vlb`: how far below the continuous VLB of the same items."""
    dataset = reference.dataset
    unit = nats_per_unit(dataset)
    known = log_density(dataset, options.nll_items)  # (N,) or None
    copies = options.dequant_samples if dataset.is_pixels else 1  # K
    model = candidate.model
    results = {}
    for name in ("uniform", "noise") if dataset.is_pixels else ("density",):
        noise = name if dataset.is_pixels else None  # that makes a density of pixels

        def measure(x0, indices, label, noise=noise):  # (K, B)
            return ode_nll(model, x0, indices, options.seed, copies, label, noise)

        items = (options, f"ode_nll, {name}", options.nll_items, copies)
        parts = measure_test_set(measure, model, reference, *items)
        nats = torch.cat([*parts], dim=1) + nats_of_units(model.units, dataset)  # (K, N)
        values = {"total": nats.mean(dim=0) / unit}  # each (N,)
        if dataset.is_pixels:
            weighted = math.log(copies) - torch.logsumexp(-nats, dim=0)
            values["importance_weighted"] = weighted / unit  # Burda et al. 2016, eq. 8
        elif known is not None:
            values["gap"] = values["total"] + known
        if "vlb" in candidate.results and name != "uniform":  # which bounds another quantity
            vlb_total = candidate.results["vlb"]["continuous"]["total"].per_item
            both = min(len(vlb_total), nats.shape[1])  # items that were measured by either
            values["below_vlb"] = vlb_total[:both] - values["total"][:both]
        results[name] = {value: Estimate.mean(each) for value, each in values.items()}
    return results


def nll_tables(name, items, results, evaluation):
    """The table of a VLB or an ODE NLL: its rows, and the entropy of the data where it is known."""
    recipe = evaluation["recipe"]
    note = f"{recipe['unit']}, ± standard error; {recipe[items]:,} test items"
    if "uniform" in results:
        note += f", {recipe['dequant_samples']} dequantizations each"
    if recipe["unit"] == "nats/dim":
        offset = evaluation["dataset"]["log_std"]
        note += f", of standardized data; in its own units {abs(offset):.4f} "
        note += "more" if offset > 0 else "less"
    rows = dict(results)  # discrete, continuous; or a row for each dequantization
    if evaluation["entropy"]:
        rows["entropy of the data"] = {"total": evaluation["entropy"]}
    return [(f"negative log-likelihood: {name}", note, rows)]
