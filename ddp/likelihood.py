"""Bits per dimension: the variational bound on the log-likelihood, and the loss by noise level."""

import math

import torch

from ddp.forward import alpha_sigma, diffuse, normal, uniform
from ddp.guidance import static

LOSS_STEPS = 1 << 20
NOISIEST = -20.0  # log_snr that stands for -inf, in sums and in figures


def denoised(model, x0, log_snr, seed, step, indices, label):
    """x0_hat (B, *event) from a draw of xt at log_snr (B,), its noise keyed by (seed, step,
    index)."""
    eps = normal(seed, "test", step, indices.to(x0.device), model.event)
    x0_hat = model.denoise(diffuse(x0, log_snr, eps), log_snr, label)
    return static(x0_hat) if model.is_image else x0_hat


def prior_term(x0, log_snr):
    """KL(q(xT | x0) || N(0, I)) in nats, (B,). log_snr: 0-d, that of the last step T."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    return (0.5 * ((alpha * x0) ** 2 + sigma**2 - 1) - sigma.log()).flatten(1).sum(dim=1)


def diffusion_term(x0, x0_hat, log_snr_t, log_snr_s):
    """KL(q(xs | xt, x0) || q(xs | xt, x0_hat)) in nats, (B,), of a step from t to the cleaner s.

    Both have the variance that is called fixed small, so it is (SNR_s - SNR_t) / 2 |x0 - x0_hat|².
    Kingma et al. 2021, eq. 13."""
    squared = ((x0 - x0_hat) ** 2).flatten(1).sum(dim=1)
    return 0.5 * (log_snr_s.exp() - log_snr_t.exp()) * squared


def diffusion_rate(x0, x0_hat, log_snr):
    """The diffusion term of infinitely many steps, nats for a unit of log-SNR, (B,): the integral
    of SNR / 2 |x0 - x0_hat|² over log-SNR is the sum. Kingma et al. 2021, eq. 18."""
    return 0.5 * log_snr.exp() * ((x0 - x0_hat) ** 2).flatten(1).sum(dim=1)


def reconstruction_term(x0, x0_hat, log_snr, discrete):
    """-log p(x0 | x1) in nats, (B,): a Gaussian about x0_hat of standard deviation sigma / alpha,
    the noise that is left; for pixels its mass in each of 256 bins. Ho et al. 2020, eq. 13."""
    sd = torch.exp(-0.5 * log_snr.double()).reshape(-1, *[1] * (x0.ndim - 1))
    x0, x0_hat = x0.double(), x0_hat.double()
    if not discrete:
        nll = 0.5 * ((x0 - x0_hat) / sd) ** 2 + sd.log() + 0.5 * math.log(2 * math.pi)
        return nll.flatten(1).sum(dim=1)
    inf = torch.tensor(math.inf, dtype=torch.float64)
    low = torch.where(x0 < -1 + 1 / 255, -inf, (x0 - 1 / 255 - x0_hat) / sd)
    high = torch.where(x0 > 1 - 1 / 255, inf, (x0 + 1 / 255 - x0_hat) / sd)
    # the tail on the left is exact however far out it is; a bin on the right is mirrored there
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    below, upto = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(upto + torch.log1p(-torch.exp(below - upto))).flatten(1).sum(dim=1)


@torch.no_grad()
def bound(model, x0, indices, seed=0, draws=8, label=None, discrete=True):
    """The variational bound on -log p(x0), item by item: a dict of nats, each (B,): `prior`,
    `diffusion`, `reconstruction` and their sum `total`. Ho et al. 2020, eq. 5; in continuous time
    Kingma et al. 2021, eqs. 11 and 18.

    The sum over steps, or the integral, is estimated from `draws` levels an item, stratified over
    log-SNR and keyed by (seed, index): unbiased, and independent of the batch. discrete: x0 is
    uint8 pixels in [-1, 1], not a point with a density."""
    schedule = model.schedule
    clean, noisy = (schedule.log_snr(t).to(x0) for t in (0.0, 1.0))
    # all that a step from log_snr = -inf adds is at its other end
    span, diffusion = clean - noisy.clamp_min(NOISIEST), torch.zeros(len(x0), device=x0.device)
    table = None if schedule.table is None else schedule.table.to(x0)
    for k in range(draws if span > 0 else 0):
        u, width = (k + uniform(seed, "test", k, indices.to(x0.device))) / draws, span
        level = clean - u * span
        if table is None:
            if schedule.network:  # it was trained to lower the variance here
                level, width = schedule.log_snr(u).to(x0), schedule.slope(u.double()).to(x0)
            x0_hat = denoised(model, x0, level, seed, k, indices, label)
            rate = diffusion_rate(x0, x0_hat, level)
        else:  # the step that spans this level
            t = torch.searchsorted(-table, -level).clamp(1, len(table) - 1)
            x0_hat = denoised(model, x0, table[t], seed, k, indices, label)
            step = table[t - 1] - table[t].clamp_min(NOISIEST)
            rate = diffusion_term(x0, x0_hat, table[t], table[t - 1]) / step
        diffusion += width * rate / draws
    clean = clean.expand(len(x0))
    x0_hat = denoised(model, x0, clean, seed, draws, indices, label)
    terms = {
        "prior": prior_term(x0, noisy),
        "diffusion": diffusion,
        "reconstruction": reconstruction_term(x0, x0_hat, clean, discrete),
    }
    terms = {name: term.double().cpu() for name, term in terms.items()}
    return terms | {"total": sum(terms.values())}


@torch.no_grad()
def losses(model, x0, indices, seed=0, count=10, label=None):
    """The mean squared error at `count` levels evenly spaced in t, a list of dicts: `t`, `log_snr`,
    and the error in units of `x0`, `eps` and `v`, each (B,) averaged over the event.

    They are one error: eps_hat - eps = -alpha / sigma (x0_hat - x0), v_hat - v = -1 / sigma
    (...)."""
    rows = []
    for k in range(count):
        t = (k + 0.5) / count
        log_snr = model.schedule.log_snr(t).to(x0)
        step = LOSS_STEPS + k  # other noise than the bound's
        x0_hat = denoised(model, x0, log_snr.expand(len(x0)), seed, step, indices, label)
        error = ((x0_hat - x0) ** 2).flatten(1).mean(dim=1).cpu()
        snr = log_snr.exp().item()
        error = {"x0": error, "eps": snr * error, "v": (1 + snr) * error}
        rows.append({"t": t, "log_snr": max(log_snr.item(), NOISIEST)} | error)
    return rows
