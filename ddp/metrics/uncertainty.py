"""How sure a measured number is: estimates with replicates, half-sample bootstrap, intervals."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ddp.metrics.distances import find_measure

RESAMPLES = 50  # half-samples of a bootstrap
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
                f"a measured value came out as {self.value}: the weights or the samples are out "
                "of range; use an earlier checkpoint"
            )

    @classmethod
    def mean(
        cls,
        values,  # (N,), independent
        **rest,  # bounds, count
    ):
        """The mean of independent values."""
        values = values.double().cpu()
        # scaled so that their std is the standard error of the mean
        return cls(values.mean().item(), values / math.sqrt(len(values)), **rest)

    @classmethod
    def proportion(
        cls,
        mask,  # (N,) bool
    ):
        """The fraction of items for which mask is true."""
        return cls.mean(mask, bounds=(0, 1), count=len(mask))

    @property
    def per_item(self):
        """The values (N,) of which it is the mean."""
        return self.replicates * math.sqrt(len(self.replicates))

    @property
    def error(self):
        """The standard error; nan with fewer than two replicates."""
        if len(self.replicates) < 2:
            return math.nan
        return self.replicates.std().item()

    @property
    def interval(self):
        """The 95% interval [low, high] within bounds, normal; of a proportion at least Wilson's."""
        reach = NORMAL_95 * self.error
        low = self.value - reach
        high = self.value + reach
        if self.count:
            wilson_low, wilson_high = wilson_interval(self.value, self.count)
            low = min(low, wilson_low)
            high = max(high, wilson_high)
        least, most = self.bounds
        return [min(max(low, least), most), min(max(high, least), most)]

    def __sub__(self, other):
        return Estimate(self.value - other.value, self.replicates - other.replicates)

    def divide_by(self, baseline):
        """The ratio to a baseline, with the error of the delta method.

        None when the baseline is not above 0 or, of a measure that can be negative, not by more
        than its error."""
        can_be_negative = baseline.bounds[0] < 0
        if baseline.value <= 0:
            return None
        if can_be_negative and baseline.value < NORMAL_95 * baseline.error:
            return None
        ratio = self.value / baseline.value
        replicates = (self.replicates - ratio * baseline.replicates) / baseline.value
        return Estimate(ratio, replicates, (0, math.inf))


def wilson_interval(
    proportion,  # in [0, 1]
    count,  # items that it is a fraction of
):
    """Wilson's 95% interval (low, high) of a proportion: not empty at 0 and 1. Wilson 1927."""
    z2 = NORMAL_95**2 / count
    middle = (proportion + z2 / 2) / (1 + z2)
    reach = math.sqrt(z2 * (proportion * (1 - proportion) + z2 / 4)) / (1 + z2)
    return middle - reach, middle + reach


def half_samples(
    count,  # items to choose from
    seed,  # an int or a list of ints
    resamples=RESAMPLES,
):
    """Random halves of `count` items: indices (resamples, count // 2)."""
    random = np.random.RandomState(seed)
    permutations = []
    for _ in range(resamples):
        permutations.append(random.permutation(count))
    order = torch.from_numpy(np.stack(permutations))  # (resamples, count)
    return order[:, : count // 2]


def bootstrap(
    function,  # (a, b) -> dict of floats, such as an entry of DISTANCES
    a,  # (N, D) samples
    b,  # (M, D) real items
    seed=0,
    resamples=RESAMPLES,
    max_items=None,  # use at most so many items of each set
):
    """The numbers of `function`, each as an Estimate, a dict.

    The error comes from half-samples without replacement (the delete-half jackknife; Shao & Wu
    1989): their standard deviation is the standard error. With replacement an item would meet its
    own copy, which nearest neighbors and covariances take for likeness. Where a distance is 0
    within its error, this error is too large rather than too small. That of a proportion is at
    least the binomial one. An `fd` gets a companion `fd_inf`, see extrapolate_fd."""
    a = a[:max_items]
    b = b[:max_items]
    values = dict(function(a, b))
    replicates = half_sample_values(function, a, b, seed, resamples)
    if "fd" in values and len(a) >= 2 * a.shape[1]:  # else covariances are not of full rank
        values["fd_inf"] = extrapolate_fd(values["fd"], replicates["fd"])
        replicates["fd_inf"] = replicates["fd"]
    estimates = {}
    for name, value in values.items():
        measure = find_measure(name)
        count = {"samples": len(a), "real": len(b), None: None}[measure.proportion]
        spread = replicates[name]
        if count:
            spread = widen_to_binomial(spread, value, count)
        estimates[name] = Estimate(value, spread, measure.bounds, count)
    return estimates


def half_sample_values(function, a, b, seed, resamples):
    """What `function` gives of `resamples` pairs of half-samples: name -> (resamples,) float64."""
    values = {}
    halves_a = half_samples(len(a), [seed, 0], resamples)  # (resamples, N // 2)
    halves_b = half_samples(len(b), [seed, 1], resamples)  # (resamples, M // 2)
    for half_a, half_b in zip(halves_a, halves_b, strict=True):
        for name, value in function(a[half_a], b[half_b]).items():
            values.setdefault(name, []).append(value)
    replicates = {}
    for name, numbers in values.items():
        replicates[name] = torch.tensor(numbers).double()  # rounded to float32
    return replicates


def extrapolate_fd(
    value,  # the Frechet distance of all n items
    replicates,  # (R,) those of n / 2 items
):
    """The Frechet distance of infinitely many items (FID_inf, in Inception features).

    Its bias falls as 1 / n, so the line through n and n / 2 leads there (Chong & Forsyth 2020,
    section 3, with the half-samples for points)."""
    return 2 * value - replicates.mean().item()


def widen_to_binomial(
    replicates,  # (R,)
    value,  # a proportion
    count,  # of so many items
):
    """Replicates whose standard deviation is at least the binomial error of the proportion.

    Half-samples may all be at 1 where the whole is not."""
    binomial = math.sqrt(value * (1 - value) / count)
    mean = replicates.mean()  # ()
    factor = max(1.0, binomial / max(replicates.std().item(), 1e-12))
    return mean + factor * (replicates - mean)
