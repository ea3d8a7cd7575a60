"""Between the network and a sampler: x0_hat is guided, and held to the range of the data.

Each function takes a `denoise`, (xt, log_snr (B,)) -> x0_hat, and gives another.
"""

import math

from ddp.forward import expand


def static(x0_hat):
    """Clipped to [-1, 1]."""
    return x0_hat.clamp(-1, 1)


def dynamic(x0_hat, share=0.995):
    """Dynamic thresholding: each item is clipped at the `share` quantile of its absolute values, if
    that is above 1, and divided by it. Saharia et al. 2022, section 2.3."""
    limit = x0_hat.flatten(1).abs().quantile(share, dim=1).clamp_min(1)
    limit = expand(limit, x0_hat)
    return x0_hat.clamp(-limit, limit) / limit


CLIPS = {"static": static, "dynamic": dynamic, "none": lambda x0_hat: x0_hat}


def clipped(denoise, clip):
    return lambda xt, log_snr: CLIPS[clip](denoise(xt, log_snr))


def guided(denoise, weak, guidance, interval=(-math.inf, math.inf), rescale=0.0):
    """x0_hat pushed away from what a weaker denoiser says: weak + guidance (x0_hat - weak).

    `weak` is the network without its label (classifier-free guidance; Ho & Salimans 2022, eq. 6,
    whose w is guidance - 1; x0_hat and eps_hat differ by a linear map) or a worse network (Karras
    et al. 2024, eq. 2). It is asked only within `interval`, two log_snr (Kynkäänniemi et al. 2024).
    rescale: how far the standard deviation of each item is brought back to that of x0_hat, from 0
    to 1 (Lin et al. 2024, eqs. 15-16)."""

    def denoise_guided(xt, log_snr):
        x0_hat = denoise(xt, log_snr)
        if not interval[0] <= log_snr[0] <= interval[1]:
            return x0_hat
        weak_hat = weak(xt, log_snr)
        pushed = weak_hat + guidance * (x0_hat - weak_hat)
        if rescale:
            ratio = x0_hat.flatten(1).std(dim=1) / pushed.flatten(1).std(dim=1)
            pushed = pushed * expand(1 + rescale * (ratio - 1), pushed)
        return pushed

    return denoise_guided
