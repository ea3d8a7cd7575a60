"""The training objective: the distance of x0_hat to x0, weighted by the noise level."""

import torch
import torch.nn.functional as F

from ddp.forward import expand

# log_snr -> the weight of |x0_hat - x0|². SNR is plain eps-MSE (Ho et al. 2020, eq. 14), 1 + SNR
# plain v-MSE (Salimans & Ho 2022), min(SNR, 5) is min-SNR-gamma (Hang et al. 2023, eq. 7).
WEIGHTINGS = {
    "uniform": lambda log_snr: torch.ones_like(log_snr),
    "snr": lambda log_snr: log_snr.exp(),
    "v": lambda log_snr: 1 + log_snr.exp(),
    "min_snr": lambda log_snr: log_snr.exp().clamp(max=5.0),
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
