"""A sample set against a real set: distances that need no download."""

import numpy as np
import torch
import torch.nn.functional as F

LARGEST_SIDE = (
    16  # larger pictures are averaged down to it: a covariance needs more items than features
)


def pixel_features(items):
    """uint8 (N, C, H, W) -> float64 (N, D) in [0, 1], averaged down to at most 16 pixels a side."""
    x = items.float() / 255
    side = [min(LARGEST_SIDE, s) for s in x.shape[-2:]]
    return F.adaptive_avg_pool2d(x, side).flatten(1).double()


def frechet_distance(a, b):
    """|mean_a - mean_b|² + tr(A + B - 2 (AB)^½), of features (N, D) and (M, D). Heusel et al. 2017,
    eq. 6.

    tr (AB)^½ is the sum of the roots of the eigenvalues of A^½ B A^½, which is symmetric: no
    complex matrix root, and no offset to keep it from failing."""
    mean = a.mean(dim=0) - b.mean(dim=0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def wasserstein2(a, b):
    """The exact 2-Wasserstein distance between two point sets of one size, (N, D): an
    assignment."""
    from scipy.optimize import linear_sum_assignment

    squared = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(squared)
    return float(np.sqrt(squared[rows, columns].mean()))
