"""Measures against their definitions, published implementations and sets made by hand."""

import itertools
import math

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from torchmetrics.image import fid, kid

from ddp import quality
from ddp.quality import Estimate, estimate


def normal(count, dimensions, seed, shift=0.0, mixed=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    if mixed:
        mix = torch.Generator().manual_seed(99)
        x = x @ torch.randn(dimensions, dimensions, generator=mix, dtype=torch.float64)
    return x + shift


@pytest.mark.parametrize("dimensions", [1, 12, 64])
def test_frechet_distance_is_its_definition(dimensions):
    a, b = normal(500, dimensions, 0), 1.2 * normal(400, dimensions, 1) + 0.3
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = mean + np.trace(cov_a + cov_b - 2 * root)
    assert abs(quality.frechet_distance(a, b) / expected - 1) < 1e-6
    assert abs(quality.frechet_distance(a, a)) < 1e-8 * np.trace(cov_a)


def test_frechet_distance_is_the_published_packages():
    a, b = normal(500, 48, 0), normal(300, 48, 1, shift=0.2)
    moments = [m for x in (a, b) for m in (x.mean(dim=0), torch.cov(x.T))]
    published = fid._compute_fid(*moments).item()
    assert quality.frechet_distance(a, b) == pytest.approx(published, rel=1e-6)


def test_frechet_distance_survives_a_singular_covariance():
    a = torch.rand(50, 3).double().repeat(1, 40)  # 120 features of rank 3
    assert 0 < quality.frechet_distance(a, a[:25] + 0.1) < float("inf")


def test_kernel_distance_is_the_published_packages():
    a, b = normal(200, 16, 0, mixed=False), normal(150, 16, 1, shift=0.3, mixed=False)
    published = kid.poly_mmd(a[:150], b).item()
    assert quality.kernel_distance(a[:150], b) == pytest.approx(published, rel=1e-9)


def test_kernel_distances_have_no_bias():
    """On two halves of one set the mean is 0 within its error, and is not when one is moved."""
    for measure in (quality.kernel_distance, quality.gaussian_discrepancy):
        x = normal(4000, 6, 3, mixed=False)
        parts = x.reshape(80, 50, 6)
        values = torch.tensor([measure(a, b) for a, b in zip(parts[:40], parts[40:], strict=True)])
        error = values.std() / math.sqrt(40)
        assert (values < 0).any()
        assert abs(values.mean()) < 3 * error
        moved = torch.tensor(
            [measure(a + 0.5, b) for a, b in zip(parts[:40], parts[40:], strict=True)]
        )
        assert moved.mean() > 10 * error


@pytest.mark.parametrize("k", [1, 3, 5])
def test_coverage_measures_are_the_published_packages(k):
    a, b = normal(150, 5, 0), normal(180, 5, 1, shift=0.4)
    published = prdc.compute_prdc(b.numpy(), a.numpy(), nearest_k=k)
    found = quality.coverage_measures(a, b, k)
    assert set(found) == set(published)
    for name, value in published.items():
        assert found[name] == pytest.approx(float(value), abs=1e-12), name


def test_coverage_measures_by_hand():
    """Real items at 0, 1, 2, 10 and k = 1: radii 1, 1, 1, 8."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    found = quality.coverage_measures(torch.tensor([[0.5], [0.6], [20.0], [5.0]]), real, k=1)
    # 0.5 and 0.6 lie by 0 and 1, 20 by none, 5 by 10 alone
    assert found["precision"] == 3 / 4
    assert found["density"] == (2 + 2 + 0 + 1) / 4
    assert found["coverage"] == 3 / 4  # 2 has none within 1
    # samples' radii: 0.1, 0.1, 15, 4.4; 0 and 1 are within 4.4 or 15 of 5 or 20? 1 and 2 of 5, 10
    assert found["recall"] == 2 / 4 + 1 / 4


def test_duplicates_and_few_items_do_no_harm():
    a = torch.zeros(10, 3)
    assert quality.coverage_measures(a, a)["precision"] == 0  # radius 0 holds nothing
    two = quality.coverage_measures(torch.rand(2, 3), torch.rand(2, 3))
    assert all(0 <= v <= 2 for v in two.values())


def test_wasserstein2_is_the_best_assignment():
    a, b = torch.rand(2, 6, 2).double()
    best = min(
        ((a - b[list(order)]) ** 2).sum(dim=1).mean().sqrt().item()
        for order in itertools.permutations(range(6))
    )
    assert abs(quality.wasserstein2(a, b) - best) < 1e-12
    shift = torch.tensor([3.0, 4.0])
    assert abs(quality.wasserstein2(a, a[torch.randperm(6)] + shift) - 5) < 1e-9


def test_sliced_wasserstein_of_a_shift():
    """Every line sees its share of a shift: its mean square is |shift|² / D."""
    a = normal(300, 40, 0)
    shift = torch.full((40,), 0.7, dtype=torch.float64)
    expected = 0.7  # |shift| / sqrt D
    found = quality.sliced_wasserstein(a, a[torch.randperm(300)] + shift)
    assert found == pytest.approx(expected, rel=0.1)
    assert quality.sliced_wasserstein(a, a[torch.randperm(300)]) < 1e-9


def test_histogram_divergence_by_hand():
    b = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # one in the first bin, one in the last
    assert quality.histogram_divergence(b.flip(0), b) == pytest.approx(0)
    a = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    bins = quality.BINS**2
    p, q = np.full(bins, 0.5), np.full(bins, 0.5)
    p[0] += 2
    q[[0, -1]] += 1
    p, q = p / p.sum(), q / q.sum()
    assert quality.histogram_divergence(a, b) == pytest.approx((q * np.log(q / p)).sum())


def test_total_variation_of_classes():
    a = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    assert quality.one_hot(a).tolist() == [[1, 0], [1, 0], [0, 1], [1, 0]]
    assert quality.total_variation(quality.one_hot(a), quality.one_hot(a[:2])) == 0.25


def test_nearest_finds_copies_exactly():
    train = normal(3000, 60, 0, mixed=False).float()
    distances, which = quality.nearest(train[[5, 700, 2999]], train)
    assert which.tolist() == [5, 700, 2999]
    assert (distances == 0).all()
    distances, which = quality.nearest(train[:40] + 0.01, train)
    assert which.tolist() == list(range(40))
    torch.testing.assert_close(
        distances, torch.full((40,), 0.01 * math.sqrt(60)), rtol=1e-3, atol=0
    )


MEASURES = quality.measures_of(*quality.MEASURES)


def test_every_measure_worsens_with_noise():
    real, train = normal(600, 2, 0), normal(600, 2, 1)
    noise = normal(600, 2, 2, mixed=False)
    found = [MEASURES(train + k * noise, real) for k in (0.0, 1.0, 3.0, 10.0)]
    for name in found[0]:
        values = [f[name] for f in found]
        if name in quality.HIGHER_IS_BETTER:
            values = [-v for v in values]
        if name != "recall":  # spread samples reach farther: its definition rewards noise
            assert values == sorted(values), name


def test_an_estimate_of_a_mean():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 2
    e = Estimate.mean(x)
    assert e.value == pytest.approx(x.mean().item(), abs=1e-6)
    assert e.error == pytest.approx((x.std() / math.sqrt(1000)).item(), rel=1e-6)
    low, high = e.interval
    assert (high - low) == pytest.approx(2 * 1.96 * e.error)
    paired = e - Estimate.mean(x + 0.1 * torch.randn(1000))
    assert paired.error < 0.2 * e.error  # the items' own spread is gone
    assert Estimate.mean(torch.tensor([0.0, 1, 1, 1, 1]), range=(0, 1)).interval[1] == 1
    assert math.isnan(Estimate.mean(torch.ones(1)).error)


def test_a_ratio_has_the_error_of_the_delta_method():
    generator = torch.Generator().manual_seed(0)
    top, bottom = 3 + torch.randn(2, 500, generator=generator)
    ratio = Estimate.mean(top).over(Estimate.mean(bottom))
    many = []
    for _ in range(400):
        i = torch.randint(500, (500,), generator=generator)
        many.append((top[i].mean() / bottom[i].mean()).item())
    assert ratio.error == pytest.approx(np.std(many), rel=0.15)
    assert ratio.over(Estimate(0.0, torch.randn(500))) is None
    assert ratio.over(Estimate(0.1, torch.randn(500))) is None  # it can be negative, and is near 0
    assert ratio.over(Estimate(0.1, torch.randn(500), (0, math.inf))) is not None


def test_half_samples_give_the_error_of_a_mean_and_of_a_distance():
    """A mean's error is known; a distance's is measured by drawing the sets again."""
    a, b = normal(400, 8, 0), normal(400, 8, 1, shift=1.0)
    found = estimate(lambda a, b: {"mean": a.mean().item()}, a[:, :1], b, resamples=400)
    expected = (a[:, :1].std() / math.sqrt(400)).item()
    assert found["mean"].error == pytest.approx(expected, rel=0.15)

    draws = [normal(400, 8, 10 + i) for i in range(60)]
    others = [normal(400, 8, 100 + i, shift=1.0) for i in range(60)]
    values = [quality.frechet_distance(*pair) for pair in zip(draws, others, strict=True)]
    error = estimate(quality.measures_of("frechet"), a, b)["frechet"].error
    assert 0.6 < error / np.std(values) < 1.6


def test_frechet_infinite_has_no_bias():
    """Of two sets of one distribution the distance is above 0, its extrapolation about 0."""
    found = [
        estimate(quality.measures_of("frechet"), normal(300, 10, i), normal(300, 10, 50 + i))
        for i in range(12)
    ]
    values, infinite = (
        np.array([f[name].value for f in found]) for name in ("frechet", "frechet_infinite")
    )
    assert values.mean() > 10 * abs(infinite.mean())
    assert abs(infinite.mean()) < 4 * infinite.std() / math.sqrt(12)
    few = estimate(quality.measures_of("frechet"), normal(39, 20, 0), normal(39, 20, 1))
    assert list(few) == ["frechet"]  # of covariances that are not of full rank it means nothing


def test_a_share_of_none_or_all_is_not_certain():
    """Wilson's interval: 0 of 10 is up to 0.278 (Newcombe 1998, table I)."""
    low, high = Estimate.share(torch.zeros(10)).interval
    assert low == 0
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert Estimate.share(torch.ones(10)).interval == pytest.approx([1 - 0.2775, 1], abs=1e-4)
    # half-samples of the same few centres are all within reach: the error is the binomial one
    a, b = normal(100, 64, 0), normal(100, 64, 1)
    found = estimate(quality.coverage_measures, a, b)
    for name in ("precision", "recall", "coverage"):
        e = found[name]
        assert e.error >= 0.999 * math.sqrt(e.value * (1 - e.value) / 100)


def test_what_is_no_number_is_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="came out as"):
            Estimate.mean(torch.tensor([1.0, value]))


def test_a_paired_difference_is_surer_than_its_parts():
    """Two sample sets from the same noise, against the same real items."""
    real, noise = normal(300, 5, 0), normal(300, 5, 1)
    measures = quality.measures_of("frechet", "sliced_wasserstein")
    one, two = (estimate(measures, noise + shift, real) for shift in (0.50, 0.52))
    for name in one:
        difference = two[name] - one[name]
        assert difference.value > 0
        assert difference.error < 0.3 * one[name].error


def test_a_limit_cuts_both_sets():
    a, b = normal(50, 2, 0), normal(50, 2, 1)
    found = estimate(quality.measures_of("wasserstein2"), a, b, limit=20)["wasserstein2"]
    assert found.value == quality.wasserstein2(a[:20], b[:20])
