"""A sample set against a real set, as features: distances, coverage, memorisation.

Every measure is a function of two sets, (N, D) and (M, D) float, that gives one number. An
`Estimate` is such a number, or a mean over items, with its error.
"""

import dataclasses
import math

import numpy as np
import torch

NEIGHBOURS = 5  # k of the nearest neighbours. Naeem et al. 2020, section 3.3
PROJECTIONS = 256  # of the sliced distance
BINS = 20  # of the histogram of points, on each axis
RESAMPLES = 50  # half-samples, for an error
BLOCK = 1 << 26  # distances in memory at a time
NORMAL_95 = 1.96  # standard errors on either side that hold 95% of a normal distribution


def frechet_distance(a, b):
    """|mean_a - mean_b|² + tr(A + B - 2 (AB)^½). Heusel et al. 2017, eq. 6.

    tr (AB)^½ is the sum of the roots of the eigenvalues of A^½ B A^½, which is symmetric: no
    complex matrix root, and no offset to keep it from failing."""
    a, b = a.double(), b.double()
    mean = a.mean(dim=0) - b.mean(dim=0)
    cov_a, cov_b = torch.cov(a.T).reshape(len(mean), -1), torch.cov(b.T).reshape(len(mean), -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def discrepancy(kernel, a, b):
    """The squared maximum mean discrepancy by its unbiased estimator, which may be negative.
    Gretton et al. 2012, eq. 3. kernel: (N, D), (M, D) -> (N, M), symmetric."""
    within = [
        (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
        for k in (kernel(a, a), kernel(b, b))
    ]
    return (sum(within) - 2 * kernel(a, b).mean()).item()


def kernel_distance(a, b):
    """The kernel (inception) distance: the kernel (x·y / D + 1)³. Bińkowski et al. 2018, section
    4."""
    return discrepancy(lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, a.double(), b.double())


def gaussian_discrepancy(a, b):
    """The same with a Gaussian kernel as wide as the median distance within `b`. Gretton et al.
    2012, section 8."""
    a, b = a.double(), b.double()
    squared = torch.pdist(b[:1000]).median() ** 2
    return discrepancy(lambda x, y: torch.exp(-(torch.cdist(x, y) ** 2) / (2 * squared)), a, b)


def radii(x, k):
    """The distance of each item (N, D) to its k-th nearest neighbour in the set, (N,)."""
    within = torch.cdist(x, x)
    return within.kthvalue(min(k, len(x) - 1) + 1, dim=1).values  # the nearest is itself


def coverage_measures(a, b, k=NEIGHBOURS):
    """How samples `a` lie among real items `b`, a dict. `precision`, the share of samples within
    the k-th neighbour's distance of a real item, and `recall`, the other way round (Kynkäänniemi et
    al. 2019, eqs. 1-2); `density`, such real items over k, and `coverage`, the share of real items
    with a sample that near (Naeem et al. 2020, eqs. 3-4)."""
    a, b = a.double(), b.double()
    between, radius_a, radius_b = torch.cdist(a, b), radii(a, k), radii(b, k)
    inside = between < radius_b
    return {
        "precision": inside.any(dim=1).double().mean().item(),
        "recall": (between < radius_a[:, None]).any(dim=0).double().mean().item(),
        "density": inside.sum(dim=1).double().mean().item() / k,
        "coverage": inside.any(dim=0).double().mean().item(),
    }


def sliced_wasserstein(a, b):
    """The 2-Wasserstein distance of projections onto random lines, root mean square over the lines.
    Bonneel et al. 2015. Sets of one size."""
    generator = torch.Generator().manual_seed(0)  # the same lines in every evaluation
    lines = torch.randn(a.shape[1], PROJECTIONS, generator=generator, dtype=torch.float64)
    lines /= lines.norm(dim=0)
    a, b = ((x.double() @ lines).sort(dim=0).values for x in (a, b))
    return (a - b).square().mean().sqrt().item()


def wasserstein2(a, b):
    """The exact 2-Wasserstein distance of two sets of one size: an assignment."""
    from scipy.optimize import linear_sum_assignment

    squared = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(squared)
    return float(np.sqrt(squared[rows, columns].mean()))


def histogram_divergence(a, b):
    """KL(b || a) in nats, of histograms of points in the plane over the range of `b`, with half an
    item more in each bin."""
    low, high = b.min(dim=0).values, b.max(dim=0).values
    bins = [((x - low) / (high - low) * BINS).long().clamp(0, BINS - 1) for x in (a, b)]
    counts = [torch.bincount(BINS * i[:, 0] + i[:, 1], minlength=BINS**2) + 0.5 for i in bins]
    p, q = (n / n.sum() for n in counts)
    return (q * (q / p).log()).sum().item()


def one_hot(probabilities):
    """(N, classes) of probabilities -> of 0 and 1, the 1 where the probability is highest."""
    return torch.eye(probabilities.shape[1])[probabilities.argmax(dim=1)].double()


def total_variation(a, b):
    """Half the sum of the differences of two distributions, each the mean of rows of
    probabilities."""
    return (a.mean(dim=0) - b.mean(dim=0)).abs().sum().item() / 2


def nearest(a, b):
    """For each item of `a` (N, D) the distance to its nearest in `b` (M, D), and which it is: (N,)
    and (N,)."""
    parts = [torch.cdist(part, b).argmin(dim=1) for part in a.split(max(1, BLOCK // len(b)))]
    which = torch.cat(parts)
    return (a - b[which]).norm(dim=1), which  # by hand: cdist of many is not exact for equal items


@dataclasses.dataclass
class Estimate:
    """A number and what its error is made of: the standard deviation of `draws`, (B,), is its
    standard error. Estimates whose draws belong together, one by one, are compared with a paired
    error. count: the number of items that it is a share of, if it is one.

    Raises FloatingPointError when it is not a finite number."""

    value: float
    draws: torch.Tensor
    range: tuple = (-math.inf, math.inf)
    count: int | None = None

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise FloatingPointError(
                f"a figure came out as {self.value}: the weights or the samples are out of range"
            )

    @classmethod
    def mean(cls, values, **rest):
        """The mean of independent values (N,)."""
        values = values.double().cpu()
        return cls(values.mean().item(), values / math.sqrt(len(values)), **rest)

    @classmethod
    def share(cls, which):
        """The share of items that are so, from bool (N,)."""
        return cls.mean(which, range=(0, 1), count=len(which))

    @property
    def items(self):
        """The values, (N,), that it is the mean of."""
        return self.draws * math.sqrt(len(self.draws))

    @property
    def error(self):
        return self.draws.std().item() if len(self.draws) > 1 else math.nan

    @property
    def interval(self):
        """95%, as of a normal distribution, within what the number can be; of a share at least
        Wilson's (1927), which is not empty at 0 and 1."""
        reach = NORMAL_95 * self.error
        ends = [self.value - reach, self.value + reach]
        if self.count:
            z2 = NORMAL_95**2 / self.count
            middle = (self.value + z2 / 2) / (1 + z2)
            reach = math.sqrt(z2 * (self.value * (1 - self.value) + z2 / 4)) / (1 + z2)
            ends = [min(ends[0], middle - reach), max(ends[1], middle + reach)]
        return [min(max(end, self.range[0]), self.range[1]) for end in ends]

    def __sub__(self, other):
        return Estimate(self.value - other.value, self.draws - other.draws)

    def over(self, floor):
        """The ratio to a floor, its error by the delta method. None when the floor is not above 0
        or, of a measure that can be negative, not by more than its error allows."""
        unbiased = floor.range[0] < 0
        if floor.value <= 0 or (unbiased and floor.value < NORMAL_95 * floor.error):
            return None
        ratio = self.value / floor.value
        return Estimate(ratio, (self.draws - ratio * floor.draws) / floor.value, (0, math.inf))


def halves(count, seed, resamples=RESAMPLES):
    """Random halves of `count` items: (resamples, count // 2) indices."""
    random = np.random.RandomState(seed)
    return torch.from_numpy(np.stack([random.permutation(count) for _ in range(resamples)]))[
        :, : count // 2
    ]


def estimate(measures, a, b, seed=0, resamples=RESAMPLES, limit=None):
    """Estimates of what `measures` (a, b) -> dict of numbers gives, a dict.

    The error is a bootstrap by half-samples, without replacement (the delete-half jackknife; Shao &
    Wu 1989): their standard deviation is the standard error. With replacement an item would meet
    its copy, which nearest neighbours and covariances take for likeness. Where a distance is
    nought within its error, this one is too large rather than too small; that of a share is at
    least the binomial one, since half-samples may all be at 1 where the whole is not.

    A `frechet` gets a companion `frechet_infinite`: its bias falls as 1 / n, so the line through n
    and n / 2 leads to what infinitely many items would give (Chong & Forsyth 2020, section 3, with
    the half-samples for points). It takes covariances of full rank, twice as many items as
    features. limit: at most so many items."""
    a, b = a[:limit], b[:limit]
    value = measures(a, b)
    parts = zip(
        halves(len(a), [seed, 0], resamples), halves(len(b), [seed, 1], resamples), strict=True
    )
    found = [measures(a[i], b[j]) for i, j in parts]
    draws = {name: torch.tensor([f[name] for f in found]).double() for name in value}
    if "frechet" in value and len(a) >= 2 * a.shape[1]:
        value["frechet_infinite"] = 2 * value["frechet"] - draws["frechet"].mean().item()
        draws["frechet_infinite"] = draws["frechet"]
    found = {}
    for name, number in value.items():
        of = {"precision": len(a), "named": len(a), "recall": len(b), "coverage": len(b)}.get(name)
        if of:
            least, mean = math.sqrt(number * (1 - number) / of), draws[name].mean()
            widening = max(1.0, least / max(draws[name].std().item(), 1e-12))
            draws[name] = mean + widening * (draws[name] - mean)
        found[name] = Estimate(number, draws[name], RANGES.get(name, (0, math.inf)), of)
    return found


def measures_of(*names):
    """A function of two sets, giving a dict of these of the MEASURES."""

    def measures(a, b):
        found = {}
        for name in names:
            number = MEASURES[name](a, b)
            found.update(number if isinstance(number, dict) else {name: number})
        return found

    return measures


MEASURES = {
    "frechet": frechet_distance,
    "kernel": kernel_distance,
    "coverage_measures": coverage_measures,
    "sliced_wasserstein": sliced_wasserstein,
    "wasserstein2": wasserstein2,
    "mmd": gaussian_discrepancy,
    "histogram_kl": histogram_divergence,
}
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "named", "agreement")
RANGES = dict.fromkeys(("precision", "recall", "coverage", "histogram", "named"), (0, 1))
RANGES |= dict.fromkeys(("kernel", "mmd", "frechet_infinite"), (-math.inf, math.inf))
