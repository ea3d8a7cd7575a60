"""How sure a measured number is: estimates with replicates, half-sample bootstrap, intervals.

The errors of one network, of its samples; and Student's t, for the means of several trainings."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ddp.metrics.distances import find_measure

RESAMPLES = 50  # half-samples of a bootstrap
MIN_ITEMS = 4  # of a set, whose halves then have a spread
NORMAL_95 = 1.96  # standard errors on either side that hold 95% of a normal distribution


@dataclass
class Estimate:
    """A value with bootstrap replicates; its standard error is their standard deviation.

    Two estimates whose replicates belong together, one by one, have a difference with a paired
    error. Raises FloatingPointError when the value is not finite."""

    value: float
    replicates: torch.Tensor  # (R,)
    bounds: tuple = (-math.inf, math.inf)  # the values that it can take
    count: int | None = None  # of a proportion: the number of items that it is a fraction of

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise FloatingPointError(
                f"a measured value came out as {self.value}: there are too few items for it, or "
                "the weights or the samples are out of range; use an earlier checkpoint"
            )

    @classmethod
    def mean(cls, values, **rest):
        """The mean of independent values (N,); rest: bounds, count."""
        values = values.double().cpu()
        # scaled so that their std is the standard error of the mean
        return cls(values.mean().item(), values / math.sqrt(len(values)), **rest)

    @classmethod
    def proportion(cls, mask):
        """The fraction of items for which mask (N,) is true."""
        return cls.mean(mask, bounds=(0, 1), count=len(mask))

    @property
    def per_item(self):
        """The values (N,) of which it is the mean."""
        return self.replicates * math.sqrt(len(self.replicates))

    @property
    def error(self):
        """The standard error; nan with fewer than two replicates."""
        return self.replicates.std().item() if len(self.replicates) > 1 else math.nan

    @property
    def interval(self):
        """The 95% interval [low, high] within bounds, normal; of a proportion at least Wilson's."""
        low = self.value - NORMAL_95 * self.error
        high = self.value + NORMAL_95 * self.error
        if self.count:  # Wilson 1927: not empty at 0 and 1
            z2 = NORMAL_95**2 / self.count
            middle = (self.value + z2 / 2) / (1 + z2)
            reach = math.sqrt(z2 * (self.value * (1 - self.value) + z2 / 4)) / (1 + z2)
            low = min(low, middle - reach)
            high = max(high, middle + reach)
        least, most = self.bounds
        return [min(max(low, least), most), min(max(high, least), most)]

    def __sub__(self, other):
        return Estimate(self.value - other.value, self.replicates - other.replicates)

    def divide_by(self, baseline):
        """The ratio to a baseline, with the error of the delta method.

        None when the baseline is not above 0 by more than its error: nothing divides by chance."""
        if not baseline.value > NORMAL_95 * baseline.error:  # an error may be nan
            return None
        ratio = self.value / baseline.value
        replicates = (self.replicates - ratio * baseline.replicates) / baseline.value
        return Estimate(ratio, replicates, (0, math.inf))


def half_samples(count, seed, resamples=RESAMPLES):
    """Random halves of `count` items: indices (resamples, count // 2)."""
    random = np.random.RandomState(seed)
    order = np.stack([random.permutation(count) for _ in range(resamples)])  # (resamples, count)
    return torch.from_numpy(order)[:, : count // 2]


def bootstrap(function, a, b, seed=0, resamples=RESAMPLES, max_items=None):
    """The numbers of `function` (a, b) -> dict of floats, each as an Estimate: a dict.

    The standard error is the standard deviation over half-samples without replacement (delete-half
    jackknife; Shao & Wu 1989). With replacement an item would meet its own copy, which nearest
    neighbors and covariances take for likeness. Where a distance is 0 within its error, the error
    is too large rather than too small. An `fd` gets a companion `fd_inf`, of infinitely many items:
    its bias falls as 1 / n, so the line through n and n / 2 leads there (FID_inf; Chong & Forsyth
    2020, section 3). Raises ValueError for fewer than MIN_ITEMS of either."""
    a = a[:max_items]
    b = b[:max_items]
    if min(len(a), len(b)) < MIN_ITEMS:
        raise ValueError(
            f"{len(a)} samples and {len(b)} real items are too few for a distance between them; "
            f"at least {MIN_ITEMS} of each are needed"
        )
    values = dict(function(a, b))
    halves_a = half_samples(len(a), [seed, 0], resamples)  # (R, N // 2)
    halves_b = half_samples(len(b), [seed, 1], resamples)  # (R, M // 2)
    rows = [function(a[i], b[j]) for i, j in zip(halves_a, halves_b, strict=True)]
    replicates = {}
    for name in values:
        replicates[name] = torch.tensor([row[name] for row in rows]).double()  # (R,)
    if "fd" in values and len(a) >= 2 * a.shape[1]:  # else covariances are not of full rank
        values["fd_inf"] = 2 * values["fd"] - replicates["fd"].mean().item()
        replicates["fd_inf"] = replicates["fd"]
    estimates = {}
    for name, value in values.items():
        measure = find_measure(name)
        count = {"samples": len(a), "real": len(b)}.get(measure.proportion)
        spread = replicates[name]
        if count:  # at least the binomial error: halves may all be at 1 where the whole is not
            binomial = math.sqrt(value * (1 - value) / count)
            factor = max(1.0, binomial / max(spread.std().item(), 1e-12))
            spread = spread.mean() + factor * (spread - spread.mean())
        estimates[name] = Estimate(value, spread, measure.bounds, count)
    return estimates


# ---- the means of several trainings ----


@cache
def t_quantile(probability, freedom):
    """The quantile of Student's t with `freedom` degrees of freedom, 1 or more, of any fraction.

    With t = sqrt(freedom) tan(a) the density is proportional to cos(a)^(freedom - 1), whose
    integral is summed. Good to 1e-4; above 10,000 degrees it is taken as of 10,000."""
    freedom = min(freedom, 1e4)
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    integral = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # by trapezoids
    angle = np.interp(abs(2 * probability - 1), integral / integral[-1], angles)
    return math.copysign(math.sqrt(freedom) * math.tan(angle), probability - 0.5)


def mean_difference(
    first,  # values of independent trainings, two or more
    second,
    paired=False,  # whether first[i] and second[i] belong together
):
    """Return (mean of second - mean of first, its standard error, its degrees of freedom).

    Unpaired with two variances and the degrees of Welch 1947 (Satterthwaite 1946)."""
    first = np.array(first)
    second = np.array(second)
    value = float(second.mean() - first.mean())
    if paired:
        error = (second - first).std(ddof=1) / math.sqrt(len(first))
        return value, float(error), len(first) - 1
    variances = [values.var(ddof=1) / len(values) for values in (first, second)]
    total = sum(variances)
    if not total:
        return value, 0.0, len(first) + len(second) - 2
    parts = [v**2 / (len(x) - 1) for v, x in zip(variances, (first, second), strict=True)]
    return value, math.sqrt(total), float(total**2 / sum(parts))


def difference_of_trainings(first, second, paired=False):
    """Return mean_difference as a dict: value, error, and interval, 95% by Student's t."""
    value, error, freedom = mean_difference(first, second, paired)
    reach = t_quantile(0.975, freedom) * error
    return {"value": value, "error": error, "interval": [value - reach, value + reach]}
