"""The training objective, ||x0_hat - x0||^2 weighted by noise level, and the terms of the VLB."""

import math

import torch
import torch.nn.functional as F

from ddp.forward import SIGMA_DATA, alpha_sigma, expand, to_double

# log_snr -> the weight of |x0_hat - x0|^2, SNR being exp(log_snr).
WEIGHTINGS = {
    "uniform": lambda log_snr: torch.ones_like(log_snr),  # plain MSE of x0
    "snr": lambda log_snr: log_snr.exp(),  # plain MSE of eps: DDPM, Ho et al. 2020, eq. 14
    "truncated_snr": lambda log_snr: log_snr.exp().clamp_min(1.0),  # Salimans & Ho 2022, section 4
    "v": lambda log_snr: 1 + log_snr.exp(),  # plain MSE of v: Salimans & Ho 2022, section 4
    "flow": lambda log_snr: (1 + (log_snr / 2).exp()) ** 2,  # plain MSE of the flow's velocity
    "min_snr": lambda log_snr: log_snr.exp().clamp(max=5.0),  # Hang et al. 2023, eq. 7
    "p2": lambda log_snr: log_snr.sigmoid(),  # Choi et al. 2022, eq. 8, k = gamma = 1
    "edm": lambda log_snr: log_snr.exp() + 1 / SIGMA_DATA**2,  # Karras et al. 2022, table 1
    # A weight of log_snr itself, not of the levels that are drawn: with per_log_snr the loss is the
    # VLB's diffusion term in nats a dimension (Kingma et al. 2021, eq. 18). The other two terms are
    # constants of a fixed schedule, and left out; of a learned one bound_terms adds them.
    "vlb": lambda log_snr: 0.5 * log_snr.exp(),
}
LOSSES = {
    "mse": lambda residual: residual**2,
    "l1": lambda residual: residual.abs(),
    "huber": lambda residual: F.huber_loss(residual, torch.zeros_like(residual), reduction="none"),
}


def denoising_loss(
    x0_hat,  # (B, *event)
    x0,  # (B, *event)
    log_snr,  # () or (B,)
    weighting="v",  # a key of WEIGHTINGS
    loss="mse",  # a key of LOSSES
):
    """Return the loss of each item, (B,): of sqrt(weight) (x0_hat - x0), averaged over the event.

    The weight goes inside, so that `l1` with the weighting `snr` is exactly |eps_hat - eps|."""
    weight = expand(WEIGHTINGS[weighting](log_snr), x0)
    return LOSSES[loss](weight.sqrt() * (x0_hat - x0)).flatten(1).mean(dim=1)


# The three terms of the variational lower bound (VLB, or ELBO) on log p(x0), with the sign turned:
# -log p(x0) <= vlb_prior + the sum of vlb_diffusion over all steps + vlb_reconstruction.


def vlb_prior(x0, log_snr):
    """Return term 1, KL(q(x_T | x0) || N(0, I)) in nats, (B,); log_snr: 0-d, of the last step T."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    kl = 0.5 * ((alpha * x0) ** 2 + sigma**2 - 1) - sigma.log()
    return kl.flatten(1).sum(dim=1)


def vlb_diffusion(x0, x0_hat, log_snr_t, log_snr_s=None):
    """Return term 2, KL(q(x_s | x_t, x0) || q(x_s | x_t, x0_hat)) in nats, (B,), for s < t.

    Both have the "fixed small" variance, so it is (SNR_s - SNR_t) / 2 |x0 - x0_hat|^2 (Kingma et
    al. 2021, eq. 13). Without s it is the rate of infinitely many steps, SNR / 2 |x0 - x0_hat|^2
    for a unit of log_snr, whose integral over log_snr is their sum (eq. 18)."""
    snr_difference = log_snr_t.exp()
    if log_snr_s is not None:
        snr_difference = log_snr_s.exp() - log_snr_t.exp()
    return 0.5 * snr_difference * ((x0 - x0_hat) ** 2).flatten(1).sum(dim=1)


def vlb_reconstruction(
    x0,  # (B, *event)
    x0_hat,  # (B, *event)
    log_snr,  # () or (B,), of the first step
    discrete,  # x0 is pixels of 256 values from -1 to 1, not a point with a density
):
    """Return term 3, -log p(x0 | x_1) in nats, (B,) float64.

    p is a Gaussian about x0_hat whose std is the noise that is left, sigma / alpha; for pixels its
    mass in each of 256 bins (Ho et al. 2020, eq. 13)."""
    x0 = to_double(x0)
    x0_hat = to_double(x0_hat)
    std = expand(torch.exp(-0.5 * to_double(log_snr)), x0)
    if not discrete:
        nll = 0.5 * ((x0 - x0_hat) / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi)
        return nll.flatten(1).sum(dim=1)
    inf = torch.tensor(math.inf, dtype=torch.float64)
    low = torch.where(x0 < -1 + 1 / 255, -inf, (x0 - 1 / 255 - x0_hat) / std)  # edges of the bin
    high = torch.where(x0 > 1 - 1 / 255, inf, (x0 + 1 / 255 - x0_hat) / std)
    # The left tail is exact however far out it is, so a bin on the right is mirrored to the left.
    right = low > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_cdf_low = torch.special.log_ndtr(low)
    log_cdf_high = torch.special.log_ndtr(high)
    log_mass = log_cdf_high + torch.log1p(-torch.exp(log_cdf_low - log_cdf_high))
    return -log_mass.flatten(1).sum(dim=1)
