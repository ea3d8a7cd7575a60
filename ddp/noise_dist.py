"""The noise distribution: which noise levels training draws.

Each entry maps u (B,), uniform in [0, 1), to log_snr (B,) and weight (B,). The mean of weight times
loss estimates the mean loss over t or, with `per_log_snr`, its integral over log_snr, which is the
same for every schedule (the VLB; Kingma et al. 2021, eq. 18).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

IMPORTANCE_BINS = 64  # bins of t in which importance sampling measures the loss


def stratify(u):
    """Return t (B,) with one item in each B-th of [0, 1]: t_i = (i + u_i) / B.

    Every batch covers the whole process, so the loss varies less from batch to batch (Kingma et al.
    2021, appendix I.1)."""
    return (torch.arange(len(u)) + u) / len(u)


def at_time(schedule, t, weight, per_log_snr):
    """Return log_snr and weight, (B,) float32, of times t (B,)."""
    if per_log_snr:
        weight = weight * schedule.neg_dlogsnr_dt(t)
    return schedule.log_snr(t).float(), weight.float()


def stratified(schedule, u, per_log_snr=False):
    """Draw t uniformly, one item in each B-th of the process."""
    t = stratify(u.double())
    return at_time(schedule, t, torch.ones_like(t), per_log_snr)


def uniform(schedule, u, per_log_snr=False):
    """Draw t uniformly and independently, as DDPM does (Ho et al. 2020, algorithm 1)."""
    t = u.double()
    return at_time(schedule, t, torch.ones_like(t), per_log_snr)


def lognormal(schedule, u, per_log_snr=False, *, mean, std, uniform_fraction):
    """Draw log_snr from N(mean, std^2): log-normally in sigma; the draw itself is the weighting.

    A fraction is drawn uniformly in t, so that no level stays untrained. The mean moves with the
    schedule's shift. EDM: Karras et al. 2022, table 1, whose P_mean and P_std are of log sigma."""
    u = u.double()
    from_t = u < uniform_fraction
    within_fraction = u / max(uniform_fraction, 1e-9)  # u, stretched to [0, 1) on either side
    beyond_fraction = (u - uniform_fraction) / max(1 - uniform_fraction, 1e-9)
    t = stratify(torch.where(from_t, within_fraction, beyond_fraction))
    log_snr = mean - schedule.offset - std * torch.special.ndtri(t.clamp(1e-6))
    if schedule.table is None:
        log_snr = log_snr.clamp(schedule.log_snr(1.0), schedule.log_snr(0.0))
    else:
        midpoints = (schedule.table[1:] + schedule.table[:-1]) / 2
        log_snr = schedule.table[torch.searchsorted(-midpoints, -log_snr)]  # the nearest level
    log_snr = torch.where(from_t, schedule.log_snr(t), log_snr)
    return log_snr.float(), torch.ones(len(u))


class Importance:
    """Draw t in proportion to the root mean square of the measured loss.

    Nichol & Dhariwal 2021, eq. 18. Call `update` with the loss after each batch. Discrete time is
    cut between steps, so that a level says which bin it was drawn from.

    Attribute: `loss_sq_ema`, (bins,), the moving average of the squared loss in each bin of t."""

    def __init__(self, schedule):
        steps = schedule.timesteps
        bins = min(IMPORTANCE_BINS, steps or IMPORTANCE_BINS)
        self.loss_sq_ema = torch.ones(bins)
        k = torch.arange(bins + 1)
        if steps:
            first = -(-k * steps // bins)  # the first step of bin k, k steps / bins rounded up
            inner = first[1:-1]
            self.edges = first.double() / steps  # (bins + 1,), in t
            self.inner_levels = (schedule.table[inner - 1] + schedule.table[inner]) / 2
        else:
            self.edges = k.double() / bins
            self.inner_levels = schedule.log_snr(self.edges[1:-1])  # (bins - 1,), between bins

    def __call__(self, schedule, u, per_log_snr=False):
        t = stratify(u.double())
        probabilities = self.bin_probabilities()
        cdf = probabilities.cumsum(0)
        bin_index = torch.searchsorted(cdf, t).clamp(max=len(cdf) - 1)
        position = 1 - (cdf[bin_index] - t) / probabilities[bin_index]  # within the bin, 0 to 1
        width = self.edges.diff()[bin_index]
        t = self.edges[bin_index] + position.clamp(0, 1 - 1e-9) * width
        weight = width / probabilities[bin_index]  # makes the estimate unbiased
        return at_time(schedule, t, weight, per_log_snr)

    def bin_probabilities(self):
        """Return the probability of each bin, (bins,); 1% is uniform, so every bin is sampled."""
        width = self.edges.diff()
        share = width * self.loss_sq_ema.double().sqrt()
        return 0.99 * share / share.sum() + 0.01 * width

    @torch.no_grad()
    def update(self, schedule, log_snr, weighted_loss):
        """Remember the losses (B,), weighted by their noise distribution, at log_snr (B,)."""
        level = -log_snr.cpu().double()
        bin_index = torch.searchsorted(-self.inner_levels, level, right=True)
        weight = self.edges.diff() / self.bin_probabilities()  # (bins,)
        loss = weighted_loss.cpu().double() / weight[bin_index]
        bins = len(weight)
        count = torch.bincount(bin_index, minlength=bins)
        total = torch.bincount(bin_index, weights=loss**2, minlength=bins)
        mean = total / count.clamp_min(1)
        rate = 0.1 * (count > 0)  # bins that were not sampled keep their value
        self.loss_sq_ema.lerp_(mean.to(self.loss_sq_ema), rate.to(self.loss_sq_ema))

    def state_dict(self):
        return {"loss_sq_ema": self.loss_sq_ema}

    def load_state_dict(self, state):
        self.loss_sq_ema.copy_(state["loss_sq_ema"])


@dataclass(frozen=True)
class NoiseDist:
    sample: Callable  # (schedule, u (B,), per_log_snr) -> log_snr (B,), weight (B,)
    over_t: bool = True  # estimates the mean over t, so it fits every weighting, the VLB included
    reaches_noise: bool = True  # draws the noisiest level, too


# Before version 0.2 `lognormal` was called "normal" and `edm` "log_normal", though both are normal
# in log_snr and log-normal in sigma: they differ in the mean, and in the uniform fraction.
NOISE_DISTS = {
    "stratified": NoiseDist(stratified),
    "uniform": NoiseDist(uniform),
    "importance": NoiseDist(Importance),
    "lognormal": NoiseDist(
        partial(lognormal, mean=-1.0, std=2.4, uniform_fraction=1 / 32), over_t=False
    ),
    "edm": NoiseDist(  # P_mean = -1.2, P_std = 1.2 of log sigma, times -2 and 2
        partial(lognormal, mean=2.4, std=2.4, uniform_fraction=0.0),
        over_t=False,
        reaches_noise=False,
    ),
}


def build_noise_dist(name, schedule):
    """Return the noise distribution `name`: (schedule, u, per_log_snr) -> log_snr, weight."""
    sample = NOISE_DISTS[name].sample
    return sample(schedule) if isinstance(sample, type) else sample
