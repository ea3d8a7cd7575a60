"""The training objective: the distance of x0_hat to x0, weighted by the noise level."""

import torch
import torch.nn.functional as F

from ddp.forward import expand

# log_snr -> the weight of |x0_hat - x0|². The plain losses of the outputs: SNR of eps (Ho et al.
# 2020, eq. 14), 1 + SNR of v and max(SNR, 1), "truncated SNR" (Salimans & Ho 2022, section 4), and
# (1 + sqrt SNR)² of the flow's velocity. min(SNR, 5) is min-SNR-gamma (Hang et al. 2023, eq. 7),
# `p2` SNR / (1 + SNR) (Choi et al. 2022, eq. 8, k = gamma = 1), `edm` its lambda(sigma) with
# sigma_data = 0.5 (Karras et al. 2022, table 1). `bound` is a weight of log_snr itself, not of the
# levels that a schedule draws: with Schedule.levels(per_log_snr=True) the loss is the variational
# bound's diffusion term in nats a dimension (Kingma et al. 2021, eq. 18).
WEIGHTINGS = {
    "uniform": lambda log_snr: torch.ones_like(log_snr),
    "snr": lambda log_snr: log_snr.exp(),
    "truncated_snr": lambda log_snr: log_snr.exp().clamp_min(1.0),
    "v": lambda log_snr: 1 + log_snr.exp(),
    "flow": lambda log_snr: (1 + (log_snr / 2).exp()) ** 2,
    "min_snr": lambda log_snr: log_snr.exp().clamp(max=5.0),
    "p2": lambda log_snr: log_snr.sigmoid(),
    "edm": lambda log_snr: log_snr.exp() + 1 / 0.5**2,
    "bound": lambda log_snr: 0.5 * log_snr.exp(),
}
DISTANCES = {
    "mse": lambda residual: residual**2,
    "l1": lambda residual: residual.abs(),
    "huber": lambda residual: F.huber_loss(residual, torch.zeros_like(residual), reduction="none"),
}


def denoising(x0_hat, x0, log_snr, weighting="v", distance="mse"):
    """The loss of each item, (B,): a distance of sqrt(weight) (x0_hat - x0), averaged over the
    event.

    The weight goes under the distance, so that `l1` with weighting `snr` is exactly |eps_hat -
    eps|."""
    weight = expand(WEIGHTINGS[weighting](log_snr), x0)
    return DISTANCES[distance](weight.sqrt() * (x0_hat - x0)).flatten(1).mean(dim=1)
