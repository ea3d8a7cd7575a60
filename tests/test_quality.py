"""Distances against their definitions."""

import itertools

import numpy as np
import scipy.linalg
import torch

from ddp import quality


def test_frechet_distance_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    a = (
        torch.randn(500, 12, generator=generator).double()
        @ torch.randn(12, 12, generator=generator).double()
    )
    b = torch.randn(400, 12, generator=generator).double() + 0.3
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = mean + np.trace(cov_a + cov_b - 2 * root)
    assert abs(quality.frechet_distance(a, b) / expected - 1) < 1e-6
    assert abs(quality.frechet_distance(a, a)) < 1e-8 * np.trace(cov_a)


def test_frechet_distance_survives_a_singular_covariance():
    a = torch.rand(50, 3).double().repeat(1, 40)  # 120 features of rank 3
    assert 0 < quality.frechet_distance(a, a[:25] + 0.1) < float("inf")


def test_frechet_distance_grows_with_noise():
    x = torch.rand(400, 1, 8, 8)
    noisy = [(x + k * torch.randn_like(x)).clamp(0, 1).mul(255).byte() for k in (0, 0.1, 0.3, 0.6)]
    features = [quality.pixel_features(n) for n in noisy]
    distances = [quality.frechet_distance(f, features[0]) for f in features]
    assert distances == sorted(distances)


def test_wasserstein2_is_the_best_assignment():
    a, b = torch.rand(2, 6, 2).double()
    best = min(
        ((a - b[list(order)]) ** 2).sum(dim=1).mean().sqrt().item()
        for order in itertools.permutations(range(6))
    )
    assert abs(quality.wasserstein2(a, b) - best) < 1e-12
    shift = torch.tensor([3.0, 4.0])
    assert abs(quality.wasserstein2(a, a[torch.randperm(6)] + shift) - 5) < 1e-9


def test_large_pictures_are_averaged_down():
    assert quality.pixel_features(torch.zeros(2, 3, 28, 8, dtype=torch.uint8)).shape == (
        2,
        3 * 16 * 8,
    )
