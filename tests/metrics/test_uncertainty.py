"""Estimates and their errors, against errors that are known or measured by repetition."""

import math

import numpy as np
import pytest
import torch

from ddp.metrics.distances import DISTANCES, frechet_distance, prdc, wasserstein2
from ddp.metrics.uncertainty import (
    Estimate,
    bootstrap,
    half_samples,
    mean_difference,
    t_quantile,
)


def normal(count, dimensions, seed, shift=0.0):
    """Correlated Gaussian features (count, dimensions)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    generator = torch.Generator().manual_seed(99)
    x = x @ torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return x + shift


def test_estimate_of_a_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator) + 2
    estimate = Estimate.mean(x)
    assert estimate.value == pytest.approx(x.mean().item(), abs=1e-6)
    assert estimate.error == pytest.approx((x.std() / math.sqrt(1000)).item(), rel=1e-6)
    torch.testing.assert_close(estimate.per_item, x.double())
    low, high = estimate.interval
    assert (high - low) == pytest.approx(2 * 1.96 * estimate.error)


def test_estimate_interval_stays_within_bounds():
    values = torch.tensor([0.0, 1, 1, 1, 1])
    assert Estimate.mean(values).interval[1] > 1
    assert Estimate.mean(values, bounds=(0, 1)).interval[1] == 1


def test_estimate_of_one_value_has_no_error():
    estimate = Estimate.mean(torch.ones(1))
    assert math.isnan(estimate.error)
    assert math.isnan(estimate.interval[0])


def test_estimate_difference_has_a_paired_error():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1000, generator=generator)
    estimate = Estimate.mean(x)
    difference = estimate - Estimate.mean(x + 0.1 * noise)
    assert difference.error < 0.2 * estimate.error  # the items' own spread cancels


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_estimate_refuses_values_that_are_not_finite(value):
    with pytest.raises(FloatingPointError, match="came out as"):
        Estimate.mean(torch.tensor([1.0, value]))


def test_proportion_of_none_or_all_is_not_certain():
    """Wilson's interval: 0 of 10 is up to 0.278 (Newcombe 1998, table I)."""
    low, high = Estimate.proportion(torch.zeros(10)).interval
    assert low == 0
    assert high == pytest.approx(0.2775, abs=1e-4)
    interval = Estimate.proportion(torch.ones(10)).interval
    assert interval == pytest.approx([1 - 0.2775, 1], abs=1e-4)


def test_divide_by_has_the_error_of_the_delta_method():
    generator = torch.Generator().manual_seed(0)
    top, bottom = 3 + torch.randn(2, 500, generator=generator)
    ratio = Estimate.mean(top).divide_by(Estimate.mean(bottom))
    ratios = []
    for _ in range(400):
        i = torch.randint(500, (500,), generator=generator)
        ratios.append((top[i].mean() / bottom[i].mean()).item())
    assert ratio.value == pytest.approx((top.mean() / bottom.mean()).item())
    assert ratio.error == pytest.approx(np.std(ratios), rel=0.15)


def test_divide_by_a_baseline_of_zero_is_none():
    ratio = Estimate(1.0, torch.randn(500))
    spread = torch.randn(500)
    assert ratio.divide_by(Estimate(0.0, spread)) is None
    assert ratio.divide_by(Estimate(0.1, spread)) is None  # it can be negative, and is near 0
    assert ratio.divide_by(Estimate(0.1, spread, bounds=(0, math.inf))) is None  # chance, too
    assert ratio.divide_by(Estimate(3.0, spread, bounds=(0, math.inf))) is not None
    assert ratio.divide_by(Estimate.mean(torch.ones(1))) is None  # its error is not known


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bootstrap_says_when_there_are_too_few_items(count):
    """The first thing said is the number of items, not that weights are out of range."""
    with pytest.raises(ValueError, match=f"^{count} samples and 9 real items are too few"):
        bootstrap(DISTANCES["fd"], normal(count, 2, 0), normal(9, 2, 1))


def test_half_samples_are_random_halves():
    halves = half_samples(9, seed=[3, 0], resamples=200)
    assert halves.shape == (200, 4)
    for half in halves[:20]:
        assert len(half.unique()) == 4
    counts = torch.bincount(halves.flatten(), minlength=9)
    assert (counts > 0).all()
    assert torch.equal(halves, half_samples(9, seed=[3, 0], resamples=200))
    assert not torch.equal(halves, half_samples(9, seed=[3, 1], resamples=200))


def test_bootstrap_error_of_a_mean():
    a = normal(400, 8, 0)[:, :1]
    b = normal(400, 8, 1)

    def mean(a, b):
        return {"mean": a.mean().item()}

    estimates = bootstrap(mean, a, b, resamples=400)
    expected = (a.std() / math.sqrt(400)).item()
    assert estimates["mean"].error == pytest.approx(expected, rel=0.15)


def test_bootstrap_error_of_a_distance_is_that_of_new_sets():
    a = normal(400, 8, 0)
    b = normal(400, 8, 1, shift=1.0)
    values = []
    for i in range(60):
        values.append(frechet_distance(normal(400, 8, 10 + i), normal(400, 8, 100 + i, shift=1.0)))
    error = bootstrap(DISTANCES["fd"], a, b)["fd"].error
    assert 0.6 < error / np.std(values) < 1.6


def test_bootstrap_fd_inf_has_no_bias():
    """Of two sets of one distribution the distance is above 0, its extrapolation about 0."""
    values = []
    extrapolated = []
    for i in range(12):
        estimates = bootstrap(DISTANCES["fd"], normal(300, 10, i), normal(300, 10, 50 + i))
        values.append(estimates["fd"].value)
        extrapolated.append(estimates["fd_inf"].value)
    assert np.mean(values) > 10 * abs(np.mean(extrapolated))
    assert abs(np.mean(extrapolated)) < 4 * np.std(extrapolated, ddof=1) / math.sqrt(12)


def test_bootstrap_gives_fd_inf_only_with_covariances_of_full_rank():
    few = bootstrap(DISTANCES["fd"], normal(39, 20, 0), normal(39, 20, 1))
    assert list(few) == ["fd"]
    enough = bootstrap(DISTANCES["fd"], normal(40, 20, 0), normal(40, 20, 1))
    assert list(enough) == ["fd", "fd_inf"]


def test_bootstrap_error_of_a_proportion_is_at_least_binomial():
    """Half-samples of the same few centers are all within reach of one another."""
    a = normal(100, 64, 0)
    b = normal(80, 64, 1)
    estimates = bootstrap(prdc, a, b)
    counts = {"precision": 100, "recall": 80, "coverage": 80}
    for name, count in counts.items():
        estimate = estimates[name]
        variance = estimate.value * (1 - estimate.value) / count
        assert estimate.count == count
        assert estimate.error >= 0.999 * math.sqrt(variance)
    assert estimates["density"].count is None


@pytest.mark.parametrize("name", ["fd", "sliced_wasserstein"])
def test_bootstrap_difference_is_surer_than_its_parts(name):
    """Two sample sets from the same noise, against the same real items."""
    real = normal(300, 5, 0)
    noise = normal(300, 5, 1)
    one = bootstrap(DISTANCES[name], noise + 0.50, real)
    two = bootstrap(DISTANCES[name], noise + 0.52, real)
    for measure in one:
        difference = two[measure] - one[measure]
        assert difference.value > 0
        assert difference.error < 0.3 * one[measure].error


def test_bootstrap_max_items_cuts_both_sets():
    a = normal(50, 2, 0)
    b = normal(50, 2, 1)
    estimate = bootstrap(DISTANCES["wasserstein2"], a, b, max_items=20)["wasserstein2"]
    assert estimate.value == wasserstein2(a[:20], b[:20])


# ---- the means of several trainings ----


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # from tables of Student's t
    [
        *((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (8, 2.3060)),
        *((10, 2.2281), (20, 2.0860), (30, 2.0423), (60, 2.0003), (120, 1.9799), (1000, 1.9623)),
    ],
)
def test_t_quantile_is_that_of_tables(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-4)
    assert t_quantile(0.025, freedom) == pytest.approx(-quantile, abs=1e-4)


def test_t_quantile_ends_in_the_normal_one_and_takes_any_probability():
    assert t_quantile(0.975, 1e9) == pytest.approx(1.95996, abs=5e-4)
    assert t_quantile(0.5, 3) == 0
    assert t_quantile(0.9, 4) == pytest.approx(1.5332, abs=1e-4)
    assert t_quantile(0.995, 7) == pytest.approx(3.4995, abs=1e-4)
    assert t_quantile(0.975, 3) < t_quantile(0.975, 2.5) < t_quantile(0.975, 2)  # Welch's degrees


def test_mean_difference_paired_and_not():
    value, error, freedom = mean_difference([1, 10, 100], [2, 11, 101.3], paired=True)
    assert (value, freedom) == (pytest.approx(1.1), 2)
    assert error == pytest.approx(0.1)  # of 1, 1 and 1.3
    value, error, freedom = mean_difference([1, 2, 3], [5, 6, 7])
    assert (value, error) == (pytest.approx(4), pytest.approx(math.sqrt(2 / 3)))
    assert freedom == pytest.approx(4)  # equal numbers and spreads: 2 (n - 1)
    value, error, freedom = mean_difference([1, 1, 1], [5, 6, 7, 8])
    assert freedom == pytest.approx(3)  # only one of them has a spread
    assert mean_difference([1, 1], [2, 2]) == (1.0, 0.0, 2)


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_mean_differences_hold_the_truth_as_often_as_they_say(paired):
    random = np.random.RandomState(0)
    held = []
    for _ in range(1000):
        first = random.normal(0, 1, 3)
        second = random.normal(2, 4, 3 if paired else 6)
        value, error, freedom = mean_difference(first, second, paired)
        held.append(abs(value - 2) <= t_quantile(0.975, freedom) * error)
    assert np.mean(held) == pytest.approx(0.95, abs=0.025)
    z = np.mean([abs(random.standard_t(2)) <= 1.96 for _ in range(1000)])
    assert z < 0.85  # what 1.96 would hold of three pairs
