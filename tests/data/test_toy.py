"""Points in the plane: standardized, reproducible, and with the densities that they claim."""

import math

import numpy as np
import pytest
import torch

from ddp.data import load_dataset
from ddp.data.toy import EIGHT_SD, RING_RADII, RING_SD, TEST_POINTS, TOYS, TRAIN_POINTS

WITH_DENSITY = [name for name, (_, log_density) in TOYS.items() if log_density]


@pytest.mark.parametrize("name", TOYS)
def test_points_are_standardized_and_keyed_by_the_seed(name):
    points = load_dataset(name, seed=1)
    others = load_dataset(name, seed=2)
    assert points.event == (2,)
    assert not points.is_image
    for part in (points.train, others.train):
        assert part.dtype == torch.float32
        error = 5 / math.sqrt(len(part))
        assert part.mean(dim=0).abs().max() < error
        assert (part.std(dim=0) - 1).abs().max() < error
    assert not torch.equal(points.train, others.train)
    assert torch.equal(points.test, others.test)
    assert points.fingerprint == load_dataset(name, seed=1).fingerprint
    # no point of one part lies in another
    together = torch.cat([points.train, others.train, points.test])
    assert len(together.unique(dim=0)) == len(together)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_density_is_that_of_the_points(name):
    """In each of 20 x 20 cells: the integral of the density against the proportion of points."""
    points = load_dataset(name, seed=3)
    cells = 20
    fine = 60  # steps of the integral in a cell, along each axis
    side = 3.0
    width = 2 * side / (cells * fine)
    middle = torch.arange(cells * fine) * width - side + width / 2
    grid = torch.cartesian_prod(middle, middle)
    density = points.log_density(grid)
    assert density.dtype == torch.float64
    mass = density.exp().reshape(cells, fine, cells, fine).sum(dim=(1, 3)) * width**2
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    index = ((points.train + side) / (2 * side / cells)).floor().long()
    assert ((index >= 0) & (index < cells)).all()
    count = torch.bincount(index[:, 0] * cells + index[:, 1], minlength=cells**2).double()
    proportion = count.reshape(cells, cells) / len(points.train)
    # five standard errors, and what the grid misses at the edge of a density that jumps
    jump = 1.5e-4 if name == "checkerboard" else 1e-5
    assert ((proportion - mass).abs() < 5 * (mass / len(points.train)).sqrt() + jump).all()


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_density_of_every_point_is_finite(name):
    for seed in range(3):
        points = load_dataset(name, seed=seed)
        for part in (points.train, points.test):
            assert points.log_density(part).isfinite().all()


def test_density_is_none_where_it_is_unknown():
    for name in TOYS:
        assert (load_dataset(name).log_density is None) == (name not in WITH_DENSITY)


def test_density_gives_the_entropy_in_closed_form():
    def entropy(name):
        points = load_dataset(name)
        scale = TOYS[name][0](TRAIN_POINTS, np.random.RandomState(1)).std(axis=0)
        return -points.log_density(points.test).mean().item() + math.log(scale.prod())

    assert entropy("checkerboard") == pytest.approx(math.log(8), abs=1e-12)
    gaussian = math.log(2 * math.pi * math.e)  # of a standard normal in the plane
    error = 5 / math.sqrt(TEST_POINTS)
    expected = math.log(8) + gaussian + 2 * math.log(EIGHT_SD)  # they hardly overlap
    assert entropy("eight_gaussians") == pytest.approx(expected, abs=error)
    around = np.log(2 * np.pi * RING_RADII).mean()
    expected = math.log(3) + gaussian / 2 + math.log(RING_SD) + around
    assert entropy("rings") == pytest.approx(expected, abs=error)
