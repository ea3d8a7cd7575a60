"""The forward diffusion step network: it takes a sample and adds noise to it.

It has no weights to train: x_t = alpha x0 + sigma eps. A noise level `log_snr` is 0-d (one for the
whole batch) or (B,), one for each item.
"""

import torch

SIGMA_DATA = 0.5  # the standard deviation of the data in Karras et al. 2022, table 1


def expand(level, x):
    """Return a level (B,) as (B, 1, ..., 1), to broadcast against x (B, *event); 0-d stays 0-d."""
    return level if level.ndim == 0 else level.reshape(-1, *[1] * (x.ndim - 1))


def to_double(x):
    """Return x in float64, on the CPU where its own device has none (Apple's MPS)."""
    try:
        return x.double()
    except TypeError:
        return x.cpu().double()


def alpha_sigma(log_snr, x):
    """Return alpha and sigma at log_snr, ready to multiply x (B, *event)."""
    log_snr = expand(log_snr, x)
    alpha = log_snr.sigmoid().sqrt()
    sigma = (-log_snr).sigmoid().sqrt()
    return alpha, sigma


def q_sample(x0, log_snr, eps):
    """Draw from q(x_t | x0): x_t = alpha x0 + sigma eps (DDPM; Ho et al. 2020, eq. 4)."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    return alpha * x0 + sigma * eps


def q_step(x_s, log_snr_s, log_snr_t):
    """Return mean and variance of q(x_t | x_s), one forward step to a noisier level.

    Kingma et al. 2021, eqs. 24-25. The variance is alpha_t^2 (1 / SNR_t - 1 / SNR_s), which is the
    beta_t of Ho et al. 2020."""
    alpha_s, _ = alpha_sigma(log_snr_s, x_s)
    alpha_t, sigma_t = alpha_sigma(log_snr_t, x_s)
    mean = alpha_t / alpha_s * x_s
    variance = sigma_t**2 * -torch.expm1(expand(log_snr_t - log_snr_s, x_s))  # 1 - SNR_t / SNR_s
    return mean, variance


def q_step_sample(x_s, log_snr_s, log_snr_t, noise):
    """Take one step of the forward network, a draw from q(x_t | x_s) at a noisier level."""
    mean, variance = q_step(x_s, log_snr_s, log_snr_t)
    return mean + variance.sqrt() * noise()


def q_posterior(x0, x_t, log_snr_t, log_snr_s):
    """Return mean and variance of q(x_s | x_t, x0), one step back to a cleaner level.

    Ho et al. 2020, eqs. 6-7; Kingma et al. 2021, eqs. 32-33. The variance is DDPM's "fixed small"
    one, beta tilde. At log_snr_s = +inf the mean is x0 and the variance 0."""
    alpha_t, sigma_t = alpha_sigma(log_snr_t, x_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
    one_minus_snr_ratio = -torch.expm1(expand(log_snr_t - log_snr_s, x_t))  # 1 - SNR_t / SNR_s
    weight_t = (alpha_t / alpha_s) * (sigma_s / sigma_t) ** 2
    mean = weight_t * x_t + alpha_s * one_minus_snr_ratio * x0
    variance = sigma_s**2 * one_minus_snr_ratio
    return mean, variance
