"""Distances between a set of samples and a set of real items, both as features.

Every distance is a plain function (a, b) -> float, or a dict of floats: a (N, D) are the samples,
b (M, D) the real items. DISTANCES lists them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

NEIGHBORS = 5  # k of the k nearest neighbors. Naeem et al. 2020, section 3.3
PROJECTIONS = 256  # random lines of the sliced distance
HISTOGRAM_BINS = 20  # on each axis
BLOCK = 1 << 22  # numbers that are in memory at a time: all pairs of a large set would be too many
CLOSEST = 8  # candidates for the nearest neighbor that are measured without rounding


def frechet_distance(a, b):
    """Frechet distance of two Gaussians fitted to the sets; in Inception features it is the FID.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). Heusel et al. 2017, eq. 6. A^(1/2) B A^(1/2)
    has the eigenvalues of A B and is symmetric: no complex root, no offset on the diagonal."""
    a = a.double()
    b = b.double()
    mean = a.mean(dim=0) - b.mean(dim=0)  # (D,)
    cov_a = torch.cov(a.T).reshape(len(mean), -1)  # (D, D), also when D = 1
    cov_b = torch.cov(b.T).reshape(len(mean), -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # A^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()  # FID


def blocks(count, width):
    """The slices that cut `count` rows of `width` numbers into parts of at most BLOCK numbers."""
    rows = max(1, BLOCK // max(1, width))
    return [slice(start, start + rows) for start in range(0, count, rows)]


def mmd2(kernel, a, b):
    """Squared maximum mean discrepancy (MMD), by its unbiased estimator: it may be negative.

    Gretton et al. 2012, eq. 3. kernel: (N, D), (M, D) -> (N, M), symmetric."""
    within = 0
    for x in (a, b):
        for rows in blocks(len(x), len(x)):
            matrix = kernel(x[rows], x)  # (n, N), without the diagonal of the whole
            part = matrix.sum() - matrix.diagonal(offset=rows.start).sum()
            within += part / (len(x) * (len(x) - 1))
    between = sum(kernel(a[rows], b).sum() for rows in blocks(len(a), len(b)))
    return (within - 2 * between / (len(a) * len(b))).item()


def kid(a, b):
    """Kernel (Inception) distance, KID: MMD^2 of (x . y / D + 1)^3 (Binkowski et al. 2018)."""
    return mmd2(lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, a.double(), b.double())  # KID


def mmd2_rbf(a, b):
    """MMD^2 of an RBF kernel as wide as the median distance in b (Gretton et al. 2012, sec. 8)."""
    b = b.double()
    width2 = torch.pdist(b[:1000]).median() ** 2
    return mmd2(lambda x, y: torch.exp(-(torch.cdist(x, y) ** 2) / (2 * width2)), a.double(), b)


def radii(x, k):
    """Distance of each item of x (N, D) to its k-th nearest neighbor in the set, (N,)."""
    kth = min(k, len(x) - 1) + 1  # the nearest is the item itself
    parts = blocks(len(x), len(x))
    return torch.cat([torch.cdist(x[rows], x).kthvalue(kth, dim=1).values for rows in parts])


def prdc(a, b, k=NEIGHBORS):
    """Precision, recall, density and coverage (PRDC) of samples a among real items b, a dict.

    Precision: the fraction of samples within the k-th neighbor's distance of a real item; recall:
    the same with the sets exchanged (Kynkaanniemi et al. 2019, eqs. 1-2). Density: the mean number
    of such real items, over k; coverage: the fraction of real items with a sample within their own
    k-th neighbor's distance (Naeem et al. 2020, eqs. 3-4)."""
    a = a.double()
    b = b.double()
    radii_a = radii(a, k)  # (N,)
    radii_b = radii(b, k)  # (M,)
    counts = torch.zeros(len(a))  # (N,), of the real items within whose radius a sample lies
    recalled = torch.zeros(len(b), dtype=torch.bool)  # (M,), it lies within a sample's radius
    covered = torch.zeros(len(b), dtype=torch.bool)  # (M,), a sample lies within its radius
    for rows in blocks(len(a), len(b)):
        between = torch.cdist(a[rows], b)  # (n, M)
        near_real = between < radii_b  # (n, M)
        counts[rows] = near_real.sum(dim=1).float()
        covered |= near_real.any(dim=0)
        recalled |= (between < radii_a[rows, None]).any(dim=0)
    return {
        "precision": (counts > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": counts.double().mean().item() / k,
        "coverage": covered.double().mean().item(),
    }


def sliced_wasserstein(a, b):
    """2-Wasserstein distance of projections onto random lines (Bonneel et al. 2015); N = M."""
    generator = torch.Generator().manual_seed(0)  # the same lines in every evaluation
    lines = torch.randn(a.shape[1], PROJECTIONS, generator=generator, dtype=torch.float64)
    lines /= lines.norm(dim=0)  # (D, PROJECTIONS), each of length 1
    squared = 0
    for columns in blocks(PROJECTIONS, 2 * len(a)):
        x = (a.double() @ lines[:, columns]).sort(dim=0).values  # (N, p); in 1-D sorting is optimal
        y = (b.double() @ lines[:, columns]).sort(dim=0).values
        squared += (x - y).square().sum()
    return math.sqrt(squared / (len(a) * PROJECTIONS))


def wasserstein2(a, b):
    """Exact 2-Wasserstein distance by optimal assignment; N = M."""
    from scipy.optimize import linear_sum_assignment

    squared = torch.cdist(a.double(), b.double()).square().numpy()  # (N, N)
    rows, columns = linear_sum_assignment(squared)
    return float(np.sqrt(squared[rows, columns].mean()))


def histogram_kl(a, b):
    """KL(b || a) in nats of histograms over the range of b, with half a count in every bin.

    a (N, D), b (M, D) of one or two dimensions."""
    low, high = b.aminmax(dim=0)  # (D,), (D,)
    cells = HISTOGRAM_BINS ** a.shape[1]
    strides = HISTOGRAM_BINS ** torch.arange(a.shape[1] - 1, -1, -1)
    histograms = []
    for points in (a, b):
        bins = ((points - low) / (high - low) * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
        index = (bins * strides).sum(dim=1)  # (N,)
        counts = torch.bincount(index, minlength=cells) + 0.5
        histograms.append(counts / counts.sum())
    p, q = histograms
    return (q * (q / p).log()).sum().item()


def one_hot(probabilities):
    """Probabilities (N, classes) as float64, 1 at the largest of each row and 0 elsewhere."""
    return torch.eye(probabilities.shape[1])[probabilities.argmax(dim=1)].double()


def total_variation(a, b):
    """Total variation between two distributions, each the mean of its rows of probabilities."""
    return (a.mean(dim=0) - b.mean(dim=0)).abs().sum().item() / 2


def nearest(a, b):
    """Distance of each item of a (N, *event) to its nearest in b (M, *event), and its index: (N,).

    Items of any type, uint8 too. The expanded square (|x|^2 - 2 x . y + |y|^2) is fast but rounded,
    so that an exact copy may lose to another item; the CLOSEST by it are measured one by one."""
    width = a[0].numel()
    center = b[:100].flatten(1).float().mean(dim=0)  # far from 0 the squares are mostly rounding
    distances = []
    nearest_index = []
    for rows in blocks(len(a), width):
        x = a[rows].flatten(1) - center  # (n, D) float32
        values = []  # of each block of b the CLOSEST, (n, CLOSEST)
        index = []
        for columns in blocks(len(b), max(width, len(x))):
            y = b[columns].flatten(1) - center  # (m, D)
            squared = y.square().sum(dim=1) - 2 * x @ y.T  # (n, m), less |x|^2
            value, i = squared.topk(min(CLOSEST, len(y)), largest=False)
            values.append(value)
            index.append(i + columns.start)
        close = torch.cat(values, dim=1).topk(min(CLOSEST, len(b)), largest=False).indices
        close = torch.cat(index, dim=1).gather(1, close)  # (n, CLOSEST), indices into b
        x = a[rows].flatten(1).float()  # as it is
        exact = [(x - b[i].flatten(1).float()).double().norm(dim=1) for i in close.unbind(dim=1)]
        distance, which = torch.stack(exact, dim=1).min(dim=1)  # (n,) each
        distances.append(distance)
        nearest_index.append(close.gather(1, which[:, None])[:, 0])
    return torch.cat(distances), torch.cat(nearest_index)


@dataclass(frozen=True)
class Measure:
    """What is known of one reported number."""

    higher_is_better: bool = False
    bounds: tuple = (0, math.inf)  # the values that it can take
    proportion: str | None = None  # "samples" or "real": it is a fraction of these items
    up_to_real: bool = False  # more than real items have is no gain

    @property
    def better(self):
        """Which is better: "lower", "higher", or None: as real items have it."""
        if self.up_to_real:
            return None
        return "higher" if self.higher_is_better else "lower"


@dataclass(frozen=True)
class Distance:
    """A function of two feature sets and the numbers that it gives; called, it gives a dict."""

    function: Callable  # (a, b) -> float, or a dict of floats
    measures: dict  # reported name -> Measure; a function that gives a float names it first
    kinds: tuple = ("image", "sequence", "point")  # the data that it is for, see kinds_of
    max_items: int | None = None  # use at most so many items of each set
    max_features: int | None = None  # it means little of more

    def __call__(self, a, b):
        value = self.function(a, b)
        return value if isinstance(value, dict) else {next(iter(self.measures)): value}


PLAIN = Measure()
UP_TO_REAL = Measure(higher_is_better=True, up_to_real=True)
SIGNED = Measure(bounds=(-math.inf, math.inf))  # an unbiased estimate: below 0 by chance
OF_SAMPLES = Measure(higher_is_better=True, bounds=(0, 1), proportion="samples")
OF_REAL = Measure(higher_is_better=True, bounds=(0, 1), proportion="real")

DISTANCES = {
    "fd": Distance(  # see bootstrap
        frechet_distance, {"fd": PLAIN, "fd_inf": SIGNED}, ("image", "sequence", "high_dim")
    ),
    "kid": Distance(kid, {"kid": SIGNED}, ("image", "sequence"), max_items=10_000),
    # an assignment takes time as the cube of the number; in many dimensions all are far apart
    "wasserstein2": Distance(
        wasserstein2, {"wasserstein2": PLAIN}, ("point",), max_items=2000, max_features=8
    ),
    "mmd_rbf": Distance(mmd2_rbf, {"mmd_rbf": SIGNED}, ("point",), max_items=10_000),
    "histogram_kl": Distance(histogram_kl, {"histogram_kl": PLAIN}, ("low_dim",)),
    "prdc": Distance(
        prdc,
        {"precision": OF_SAMPLES, "recall": OF_REAL, "density": UP_TO_REAL, "coverage": OF_REAL},
        max_items=10_000,  # pairs take time as the square of the number
    ),
    "sliced_wasserstein": Distance(sliced_wasserstein, {"sliced_wasserstein": PLAIN}),
}
CLASS_MEASURES = {  # of how a classifier sorts the samples, which are not distances of features
    # the classifier is sure of the class
    "confident": replace(OF_SAMPLES, up_to_real=True),
    "label_accuracy": OF_SAMPLES,  # the class is the label that was asked for
    "class_tv": Measure(bounds=(0, 1)),  # total variation between the class frequencies
}
NEIGHBOR_MEASURES = {  # of the distances to the nearest training item
    "nn_distance_ratio": PLAIN,
    "near_duplicates": Measure(bounds=(0, 1), proportion="samples"),
}


def find_measure(name):
    """The Measure of a reported name; a name that no registry has is a plain distance."""
    known = CLASS_MEASURES | NEIGHBOR_MEASURES
    for distance in DISTANCES.values():
        known |= distance.measures
    return known.get(name, PLAIN)
