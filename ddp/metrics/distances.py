"""Distances between a set of samples and a set of real items, both as features.

Every distance is a plain function (a, b) -> float, or a dict of floats: a (N, D) are the samples,
b (M, D) the real items. DISTANCES says what is known of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

NEIGHBORS = 5  # k of the k nearest neighbors. Naeem et al. 2020, section 3.3
PROJECTIONS = 256  # random lines of the sliced distance
HISTOGRAM_BINS = 20  # on each axis
MEDIAN_ITEMS = 1000  # items whose median distance is the width of the RBF kernel
BLOCK = 1 << 26  # pairwise distances in memory at a time


def frechet_distance(
    a,  # (N, D) samples
    b,  # (M, D) real items
):
    """Frechet distance of two Gaussians fitted to the sets; in Inception features it is the FID.

    FD = |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). Heusel et al. 2017, eq. 6. The trace of
    (A B)^(1/2) is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: no complex matrix root, and no offset on the diagonal to keep it from failing."""
    a = a.double()
    b = b.double()
    mean = a.mean(dim=0) - b.mean(dim=0)  # (D,)
    cov_a = torch.cov(a.T).reshape(len(mean), -1)  # (D, D), also when D = 1
    cov_b = torch.cov(b.T).reshape(len(mean), -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # A^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()  # FID


def mmd2(
    kernel,  # (N, D), (M, D) -> (N, M), symmetric
    a,  # (N, D) samples
    b,  # (M, D) real items
):
    """Squared maximum mean discrepancy (MMD), by its unbiased estimator: it may be negative.

    Gretton et al. 2012, eq. 3."""
    within_a = off_diagonal_mean(kernel(a, a))
    within_b = off_diagonal_mean(kernel(b, b))
    return (within_a + within_b - 2 * kernel(a, b).mean()).item()


def off_diagonal_mean(matrix):
    """The mean of a square matrix (N, N) without its diagonal."""
    count = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))


def cubic_kernel(x, y):
    """(x . y / D + 1)^3 of x (N, D) and y (M, D), (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(a, b):
    """Kernel (Inception) distance, KID: the squared MMD of the cubic kernel.

    Binkowski et al. 2018, section 4."""
    return mmd2(cubic_kernel, a.double(), b.double())  # KID


def mmd2_rbf(a, b):
    """Squared MMD of a Gaussian (RBF) kernel as wide as the median distance within b.

    Gretton et al. 2012, section 8."""
    a = a.double()
    b = b.double()
    width2 = torch.pdist(b[:MEDIAN_ITEMS]).median() ** 2

    def rbf_kernel(x, y):
        return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * width2))

    return mmd2(rbf_kernel, a, b)


def radii(x, k):
    """Distance of each item of x (N, D) to its k-th nearest neighbor in the set, (N,)."""
    distances = torch.cdist(x, x)  # (N, N)
    kth = min(k, len(x) - 1) + 1  # the nearest is the item itself
    return distances.kthvalue(kth, dim=1).values


def prdc(a, b, k=NEIGHBORS):
    """Precision, recall, density and coverage (PRDC) of samples a among real items b, a dict.

    Precision: the fraction of samples within the k-th neighbor's distance of a real item. Recall:
    the same with the sets exchanged (Kynkaanniemi et al. 2019, eqs. 1-2). Density: the number of
    such real items of a sample, over k. Coverage: the fraction of real items with a sample within
    their own k-th neighbor's distance (Naeem et al. 2020, eqs. 3-4)."""
    a = a.double()
    b = b.double()
    between = torch.cdist(a, b)  # (N, M)
    radius_a = radii(a, k)  # (N,)
    radius_b = radii(b, k)  # (M,)
    near_real = between < radius_b  # (N, M), sample i lies within real item j's radius
    near_sample = between < radius_a[:, None]  # (N, M), real item j within sample i's radius
    return {
        "precision": near_real.any(dim=1).double().mean().item(),
        "recall": near_sample.any(dim=0).double().mean().item(),
        "density": near_real.sum(dim=1).double().mean().item() / k,
        "coverage": near_real.any(dim=0).double().mean().item(),
    }


def sliced_wasserstein(a, b):
    """2-Wasserstein distance of projections onto random lines, root mean square over the lines.

    Bonneel et al. 2015. Both sets have the same number of items."""
    generator = torch.Generator().manual_seed(0)  # the same lines in every evaluation
    lines = torch.randn(a.shape[1], PROJECTIONS, generator=generator, dtype=torch.float64)
    lines /= lines.norm(dim=0)  # (D, PROJECTIONS), each of length 1
    a = (a.double() @ lines).sort(dim=0).values  # (N, PROJECTIONS); in 1-D sorting is optimal
    b = (b.double() @ lines).sort(dim=0).values
    return (a - b).square().mean().sqrt().item()


def wasserstein2(a, b):
    """Exact 2-Wasserstein distance of two sets of the same size, by optimal assignment."""
    from scipy.optimize import linear_sum_assignment

    squared = torch.cdist(a.double(), b.double()).square().numpy()  # (N, N)
    rows, columns = linear_sum_assignment(squared)
    return float(np.sqrt(squared[rows, columns].mean()))


def histogram_kl(a, b):
    """KL(b || a) in nats of 2-D histograms over the range of b, with half a count in every bin."""
    low = b.min(dim=0).values  # (2,)
    high = b.max(dim=0).values
    p = histogram(a, low, high)
    q = histogram(b, low, high)
    return (q * (q / p).log()).sum().item()


def histogram(points, low, high):
    """Probabilities (HISTOGRAM_BINS^2,) of points (N, 2); points outside go to the nearest bin."""
    bins = ((points - low) / (high - low) * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    index = HISTOGRAM_BINS * bins[:, 0] + bins[:, 1]  # (N,)
    counts = torch.bincount(index, minlength=HISTOGRAM_BINS**2) + 0.5
    return counts / counts.sum()


def one_hot(probabilities):
    """Probabilities (N, classes) -> float64 (N, classes), 1 at the largest of each row, else 0."""
    return torch.eye(probabilities.shape[1])[probabilities.argmax(dim=1)].double()


def total_variation(a, b):
    """Total variation between two distributions, each the mean of its rows of probabilities."""
    return (a.mean(dim=0) - b.mean(dim=0)).abs().sum().item() / 2


def nearest(a, b):
    """Distance of each item of a (N, D) to its nearest in b (M, D), and that item's index: (N,)."""
    indices = []
    for part in a.split(max(1, BLOCK // len(b))):
        indices.append(torch.cdist(part, b).argmin(dim=1))
    index = torch.cat(indices)  # (N,)
    # by hand: cdist of many items is not exact where two are equal
    return (a - b[index]).norm(dim=1), index


@dataclass(frozen=True)
class Measure:
    """What is known of one reported number."""

    higher_is_better: bool = False
    bounds: tuple = (0, math.inf)  # the values that it can take
    proportion: str | None = None  # "samples" or "real": it is a fraction of these items


@dataclass(frozen=True)
class Distance:
    """A function of two feature sets and the numbers that it gives."""

    function: Callable  # (a, b) -> float, or a dict of floats
    measures: dict  # reported name -> Measure; a function that gives a float names it first
    kinds: tuple = ("image", "point")  # the data that it is for
    max_items: int | None = None  # use at most so many items of each set

    def __call__(self, a, b):
        """The numbers of a against b, a dict."""
        value = self.function(a, b)
        if isinstance(value, dict):
            return value
        name = next(iter(self.measures))
        return {name: value}


SIGNED = Measure(bounds=(-math.inf, math.inf))  # an unbiased estimate: below 0 by chance
OF_SAMPLES = Measure(higher_is_better=True, bounds=(0, 1), proportion="samples")
OF_REAL = Measure(higher_is_better=True, bounds=(0, 1), proportion="real")

DISTANCES = {
    # fd_inf is fd extrapolated to infinitely many items, see uncertainty.py
    "fd": Distance(frechet_distance, {"fd": Measure(), "fd_inf": SIGNED}, kinds=("image",)),
    "kid": Distance(kid, {"kid": SIGNED}, kinds=("image",)),
    "wasserstein2": Distance(
        wasserstein2,
        {"wasserstein2": Measure()},
        kinds=("point",),
        max_items=2000,  # an assignment takes time as the cube of the number
    ),
    "mmd_rbf": Distance(mmd2_rbf, {"mmd_rbf": SIGNED}, kinds=("point",)),
    "histogram_kl": Distance(histogram_kl, {"histogram_kl": Measure()}, kinds=("point",)),
    "prdc": Distance(
        prdc,
        {
            "precision": OF_SAMPLES,
            "recall": OF_REAL,
            "density": Measure(higher_is_better=True),
            "coverage": OF_REAL,
        },
        max_items=10_000,  # nearest neighbors take memory as the square of the number
    ),
    "sliced_wasserstein": Distance(sliced_wasserstein, {"sliced_wasserstein": Measure()}),
}

# Measures of how a classifier sorts the samples, which are not distances of features.
CLASS_MEASURES = {
    "confident": OF_SAMPLES,  # the classifier is sure of the class
    "label_accuracy": OF_SAMPLES,  # the class is the label that was asked for
    "class_tv": Measure(bounds=(0, 1)),  # total variation between the class frequencies
}


def find_measure(name):
    """The Measure of a reported name; a name that no registry has is a plain distance."""
    for distance in DISTANCES.values():
        if name in distance.measures:
            return distance.measures[name]
    return CLASS_MEASURES.get(name, Measure())
