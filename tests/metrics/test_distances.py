"""Distances against their definitions, published implementations and sets made by hand."""

import itertools
import math

import numpy as np
import prdc as published_prdc
import pytest
import scipy.linalg
import torch
from live_memory import LiveMemory
from torchmetrics.image import fid, kid

from ddp.metrics import distances
from ddp.metrics.distances import (
    CLASS_MEASURES,
    DISTANCES,
    HISTOGRAM_BINS,
    Distance,
    Measure,
    find_measure,
    frechet_distance,
    histogram_kl,
    mmd2_rbf,
    nearest,
    one_hot,
    prdc,
    sliced_wasserstein,
    total_variation,
    wasserstein2,
)


def normal(count, dimensions, seed, shift=0.0, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    if correlated:
        generator = torch.Generator().manual_seed(99)
        x = x @ torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return x + shift


@pytest.mark.parametrize("dimensions", [1, 12, 64])
def test_frechet_distance_is_its_definition(dimensions):
    a = normal(500, dimensions, 0)
    b = 1.2 * normal(400, dimensions, 1) + 0.3
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a = np.atleast_2d(np.cov(a.T))
    cov_b = np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = mean + np.trace(cov_a + cov_b - 2 * root)
    assert abs(frechet_distance(a, b) / expected - 1) < 1e-6
    assert abs(frechet_distance(a, a)) < 1e-8 * np.trace(cov_a)


def test_frechet_distance_is_that_of_torchmetrics():
    a = normal(500, 48, 0)
    b = normal(300, 48, 1, shift=0.2)
    published = fid._compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)).item()
    assert frechet_distance(a, b) == pytest.approx(published, rel=1e-6)


def test_frechet_distance_of_a_singular_covariance_is_finite():
    a = torch.rand(50, 3).double().repeat(1, 40)  # 120 features of rank 3
    assert 0 < frechet_distance(a, a[:25] + 0.1) < float("inf")


def test_kid_is_that_of_torchmetrics():
    a = normal(150, 16, 0, correlated=False)
    b = normal(150, 16, 1, shift=0.3, correlated=False)
    published = kid.poly_mmd(a, b).item()
    assert distances.kid(a, b) == pytest.approx(published, rel=1e-9)


def test_nearest_finds_copies_far_from_zero():
    """White pictures that differ in one pixel: all squares are alike but for rounding."""
    items = torch.full((784, 1, 28, 28), 255, dtype=torch.uint8)
    items.view(784, 784).fill_diagonal_(254)
    values, index = nearest(items[::2], items)
    assert values.tolist() == [0] * 392
    assert index.tolist() == list(range(0, 784, 2))


@pytest.mark.parametrize("function", [distances.kid, mmd2_rbf])
def test_mmd_has_no_bias(function):
    """On two halves of one set the mean is 0 within its error, and is not when one is moved."""
    x = normal(4000, 6, 3, correlated=False).reshape(80, 50, 6)
    values = []
    moved = []
    for a, b in zip(x[:40], x[40:], strict=True):
        values.append(function(a, b))
        moved.append(function(a + 0.5, b))
    error = np.std(values) / math.sqrt(40)
    assert min(values) < 0
    assert abs(np.mean(values)) < 3 * error
    assert np.mean(moved) > 10 * error


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_is_that_of_the_prdc_package(k):
    a = normal(150, 5, 0)
    b = normal(180, 5, 1, shift=0.4)
    published = published_prdc.compute_prdc(b.numpy(), a.numpy(), nearest_k=k)
    values = prdc(a, b, k)
    assert set(values) == set(published)
    for name, value in published.items():
        assert values[name] == pytest.approx(float(value), abs=1e-12), name


def test_prdc_by_hand():
    """Real items at 0, 1, 2, 10 and k = 1: radii 1, 1, 1, 8."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    values = prdc(torch.tensor([[0.5], [0.6], [20.0], [5.0]]), real, k=1)
    # 0.5 and 0.6 lie near 0 and 1, 20 near none, 5 near 10 alone
    assert values["precision"] == 3 / 4
    assert values["density"] == (2 + 2 + 0 + 1) / 4
    assert values["coverage"] == 3 / 4  # 2 has none within 1
    # the samples' radii are 0.1, 0.1, 15, 4.4: 1 and 2 lie near 5, 10 near 20, 0 near none
    assert values["recall"] == 3 / 4


def test_prdc_of_duplicates_and_of_two_items():
    a = torch.zeros(10, 3)
    assert prdc(a, a)["precision"] == 0  # nothing is nearer than a radius of 0
    for value in prdc(torch.rand(2, 3), torch.rand(2, 3)).values():
        assert 0 <= value <= 2


def test_wasserstein2_is_the_best_assignment():
    a, b = torch.rand(2, 6, 2).double()
    costs = []
    for order in itertools.permutations(range(6)):
        costs.append(((a - b[list(order)]) ** 2).sum(dim=1).mean().sqrt().item())
    assert abs(wasserstein2(a, b) - min(costs)) < 1e-12
    shift = torch.tensor([3.0, 4.0])
    assert abs(wasserstein2(a, a[torch.randperm(6)] + shift) - 5) < 1e-9


def test_sliced_wasserstein_of_a_shift():
    """A line sees a part of a shift: its mean square is |shift|^2 / D."""
    a = normal(300, 40, 0)
    shift = torch.full((40,), 0.7, dtype=torch.float64)  # |shift| / sqrt(D) = 0.7
    value = sliced_wasserstein(a, a[torch.randperm(300)] + shift)
    assert value == pytest.approx(0.7, rel=0.1)
    assert sliced_wasserstein(a, a[torch.randperm(300)]) < 1e-9


def test_histogram_kl_by_hand():
    b = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # one in the first bin, one in the last
    assert histogram_kl(b.flip(0), b) == pytest.approx(0)
    a = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    p = np.full(HISTOGRAM_BINS**2, 0.5)
    q = np.full(HISTOGRAM_BINS**2, 0.5)
    p[0] += 2
    q[0] += 1
    q[-1] += 1
    p = p / p.sum()
    q = q / q.sum()
    assert histogram_kl(a, b) == pytest.approx((q * np.log(q / p)).sum())


def test_total_variation_of_classes():
    a = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    assert one_hot(a).tolist() == [[1, 0], [1, 0], [0, 1], [1, 0]]
    assert total_variation(one_hot(a), one_hot(a[:2])) == 0.25


def test_nearest_measures_copies_as_zero():
    train = normal(3000, 60, 0, correlated=False).float()
    values, index = nearest(train[[5, 700, 2999]], train)
    assert index.tolist() == [5, 700, 2999]
    assert (values == 0).all()
    values, index = nearest(train[:40] + 0.01, train)
    assert index.tolist() == list(range(40))
    expected = torch.full((40,), 0.01 * math.sqrt(60))
    torch.testing.assert_close(values.float(), expected, rtol=1e-3, atol=0)


def test_nearest_finds_every_copy_among_near_copies():
    """One gray value of one pixel apart: less than the rounding of the expanded square."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(200, 255, (400, 1, 28, 28), generator=generator).byte()
    others = items.clone()
    others[:, 0, 14, 14] += 1
    values, index = nearest(items, torch.cat([others, items]))
    assert values.tolist() == [0] * 400
    assert index.tolist() == list(range(400, 800))


@pytest.mark.parametrize("function", [distances.kid, mmd2_rbf, prdc, sliced_wasserstein])
def test_distances_hold_blocks_instead_of_all_pairs(function, monkeypatch):
    a = normal(1500, 16, 0)
    b = normal(1500, 16, 1)
    expected = function(a, b)
    monkeypatch.setattr(distances, "BLOCK", 1 << 16)
    with LiveMemory() as memory:
        values = function(a, b)
    assert values == pytest.approx(expected, rel=1e-9)
    few_pairs = 8 * 1500**2 / 2
    assert memory.peak < (few_pairs if function is not mmd2_rbf else 2 * few_pairs)  # its median


def test_nearest_takes_less_memory_than_the_data(monkeypatch):
    items = torch.randint(0, 255, (4000, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    items = items.byte()
    monkeypatch.setattr(distances, "BLOCK", 1 << 16)
    with LiveMemory() as memory:
        nearest(items[:1000], items)
    assert memory.peak < items.nbytes


def test_nearest_does_not_depend_on_the_block(monkeypatch):
    a = normal(50, 4, 0)
    b = normal(70, 4, 1)
    values, index = nearest(a, b)
    monkeypatch.setattr(distances, "BLOCK", 3 * 70)
    small_values, small_index = nearest(a, b)
    assert torch.equal(index, small_index)
    assert torch.equal(values, small_values)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_worsens_with_noise(name):
    real = normal(600, 2, 0)
    train = normal(600, 2, 1)
    noise = normal(600, 2, 2, correlated=False)
    results = []
    for scale in (0.0, 1.0, 3.0, 10.0):
        results.append(DISTANCES[name](train + scale * noise, real))
    for measure in results[0]:
        values = []
        for result in results:
            values.append(result[measure])
        if measure == "recall":  # spread samples reach farther: its definition rewards noise
            continue
        if find_measure(measure).higher_is_better:
            values.reverse()
        assert values == sorted(values), measure


@pytest.mark.parametrize("name", DISTANCES)
def test_every_number_of_a_distance_has_a_measure(name):
    """Each is reported under a name that the registry knows, and lies within its bounds."""
    distance = DISTANCES[name]
    values = distance(normal(100, 2, 0), normal(100, 2, 1))
    extrapolated = {"fd_inf"}  # which the bootstrap adds
    assert set(values) == set(distance.measures) - extrapolated
    for measure, value in values.items():
        low, high = find_measure(measure).bounds
        assert low <= value <= high
        assert find_measure(measure) is distance.measures[measure]


def test_find_measure_knows_direction_and_bounds():
    assert find_measure("fd") == Measure()
    assert find_measure("fd_inf").bounds == (-math.inf, math.inf)
    assert find_measure("precision").proportion == "samples"
    assert find_measure("recall").proportion == "real"
    assert find_measure("class_tv").bounds == (0, 1)
    better = []
    for distance in DISTANCES.values():
        for name, measure in distance.measures.items():
            if measure.higher_is_better:
                better.append(name)
    assert better == ["precision", "recall", "density", "coverage"]
    assert CLASS_MEASURES["label_accuracy"].higher_is_better


def test_a_new_distance_is_one_function_and_one_entry(monkeypatch):
    def mean_distance(a, b):
        return (a.mean(dim=0) - b.mean(dim=0)).norm().item()

    entry = Distance(mean_distance, {"mean_distance": Measure(bounds=(0, 9))})
    monkeypatch.setitem(DISTANCES, "mean_distance", entry)
    values = DISTANCES["mean_distance"](torch.zeros(5, 2), torch.ones(5, 2))
    assert values == {"mean_distance": pytest.approx(math.sqrt(2))}
    assert find_measure("mean_distance").bounds == (0, 9)
