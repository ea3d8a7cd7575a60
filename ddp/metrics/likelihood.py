"""Likelihood of a model: the variational bound, the probability-flow ODE, loss by noise level."""

import functools
import math

import torch
import torch.nn.functional as F

from ddp.forward import alpha_sigma, q_sample, to_double
from ddp.loss import vlb_diffusion, vlb_prior, vlb_reconstruction
from ddp.metrics.ode import dopri5
from ddp.rng import normal, uniform
from ddp.sampling import clip_static
from ddp.schedule import MIN_LOG_SNR

TOLERANCES = {"points": 1e-5, "pixels": 1e-4}  # of the ODE solver, relative and absolute


def denoise(model, x_t, log_snr, label=None):
    """x0_hat (B, *event) of the model, clipped to [-1, 1] where the items are pixels."""
    x0_hat = model.denoise(x_t, log_snr, label)
    return clip_static(x0_hat) if model.is_pixels else x0_hat


def noise_and_denoise(model, x0, log_snr, eps, label=None):
    """x0_hat (B, *event) from x_t = alpha x0 + sigma eps."""
    return denoise(model, q_sample(x0, log_snr, eps), log_snr, label)


@torch.no_grad()
def vlb(
    model,
    x0,  # (B, *event) float
    indices,  # (B,) integers: an item's noise is a function of (seed, its index)
    seed=0,
    mc_samples=8,  # noise levels for each item
    label=None,
    discrete=True,  # x0 is pixels of 256 values from -1 to 1, not a point with a density
    time="continuous",  # "discrete": the sum over steps; "continuous": the integral
    first=0,  # number of the first Monte Carlo sample: others give independent estimates
):
    """Variational bound (VLB, negative ELBO) on -log p(x0) of each item: a dict of nats (B,).

    Its three terms `prior`, `diffusion`, `reconstruction` and their sum `total`, float64, unbiased
    estimates. In discrete time it is the sum over the schedule's steps, or over 1000 where that is
    continuous (Ho et al. 2020, eq. 5); else the integral (Kingma et al. 2021, eqs. 11 and 18)."""
    if time not in ("discrete", "continuous"):
        raise ValueError(f"time={time!r}: expected 'discrete' or 'continuous'")
    indices = indices.to(x0.device)
    clean = model.schedule.log_snr(0.0).cpu()
    noisy = model.schedule.log_snr(1.0).cpu()

    # 1. RECONSTRUCTION TERM: -log p(x0 | x_t) at the cleanest level
    eps = normal(seed, "vlb_reconstruction", first, indices, model.event)
    x0_hat = noise_and_denoise(model, x0, clean.to(x0), eps, label)
    reconstruction = vlb_reconstruction(x0, x0_hat, clean.to(x0), discrete)  # (B,)
    if not discrete:  # a control variate of mean 0: what eps makes of it for unit-variance data
        noise = (eps**2 - 1).flatten(1).sum(dim=1)  # (B,)
        reconstruction -= 0.5 * torch.sigmoid(clean) ** 2 * to_double(noise)

    # 2. PRIOR TERM: KL(q(x_t | x0) || N(0, I)) at the noisiest level
    prior = vlb_prior(x0, noisy.to(x0))  # (B,)

    # 3. DIFFUSION TERM: KL(q(x_s | x_t, x0) || q(x_s | x_t, x0_hat)) over all levels between
    diffusion = diffusion_term(model, x0, indices, seed, mc_samples, label, discrete, time, first)

    terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
    terms = {name: nats.cpu().double() for name, nats in terms.items()}
    return terms | {"total": sum(terms.values())}  # VLB = -ELBO


def diffusion_term(model, x0, indices, seed, mc_samples, label, discrete, time, first):
    """Unbiased estimate (B,) of the diffusion term of the VLB in nats; arguments as of vlb.

    Importance sampling: levels, stratified over the mc_samples of an item, have the density of the
    integrand for unit-variance data, which is proportional to sigmoid(log_snr)."""
    clean = model.schedule.log_snr(0.0).cpu()
    noisy = model.schedule.log_snr(1.0).cpu().clamp_min(MIN_LOG_SNR)
    area = F.softplus(clean) - F.softplus(noisy)  # integral of sigmoid(log_snr)
    table = model.schedule.table  # (T,), falling
    if table is None:
        table = model.schedule.log_snr(torch.linspace(0, 1, 1000, dtype=torch.float64)).cpu()
    diffusion = torch.zeros(len(x0)).to(x0)
    if not clean > noisy:  # one step: there is nothing between the other two terms
        return diffusion
    for k in range(first, first + mc_samples):
        u = uniform(seed, "vlb_log_snr", k, indices).cpu().double()  # (B,)
        u = (k - first + u) / mc_samples  # in stratum k of [0, 1)
        log_snr_t = torch.expm1(F.softplus(clean) - u * area).log()  # the inverse of the CDF
        if time == "continuous":
            log_snr_s = None
            weight = area / torch.sigmoid(log_snr_t)  # 1 / density
        else:
            i = torch.searchsorted(-table, -log_snr_t).clamp(1, len(table) - 1)
            log_snr_t, log_snr_s = table[i], table[i - 1]  # the ends of the step around it
            weight = area / (F.softplus(log_snr_s) - F.softplus(log_snr_t))  # 1 / probability
            log_snr_s = log_snr_s.to(x0)
        log_snr_t = log_snr_t.to(x0)
        eps = normal(seed, "vlb_eps", k, indices, model.event)
        x0_hat = noise_and_denoise(model, x0, log_snr_t, eps, label)
        term = vlb_diffusion(x0, x0_hat, log_snr_t, log_snr_s)  # (B,)
        if not discrete:  # a control variate of mean 0: the same of unit-variance data
            scale = math.prod(alpha_sigma(log_snr_t, x0))  # (B, 1, ...), of eps in x0 - x0_hat
            mean = vlb_diffusion(scale, 0 * x0, log_snr_t, log_snr_s)
            term += mean - vlb_diffusion(scale * eps, 0, log_snr_t, log_snr_s)
        diffusion += weight.to(x0) * term / mc_samples
    return diffusion


@torch.no_grad()
def ode_nll(
    model,
    x0,  # (B, *event) float
    indices,  # (B,) integers: an item's noise is a function of (seed, its index)
    seed=0,
    dequantizations=1,  # K noisy copies of each item
    label=None,
    dequantization=None,  # None: x0 has a density; pixels: "uniform" or "noise", see flow_start
    tolerance=None,  # of the ODE solver
):
    """-log p(x0) in nats (K, B), by the change of variables along the probability-flow ODE.

    Song et al. 2021, eq. 39, which in log-SNR reads dx/dlog_snr = alpha (x0_hat - alpha x) / 2. The
    density is that of the model's data with the schedule's least noise. Of pixels it is a bound:
    the mean over K is one; log K - logsumexp over K is a tighter one (Burda et al. 2016, eq. 8)."""
    if dequantization not in (None, "uniform", "noise"):
        raise ValueError(f"dequantization={dequantization!r}: expected None, 'uniform' or 'noise'")
    indices = indices.to(x0.device)
    clean = model.schedule.log_snr(0.0).item()
    noisy = model.schedule.log_snr(1.0).clamp_min(MIN_LOG_SNR).item()
    x0 = x0.repeat(dequantizations, *[1] * len(model.event))  # (K * B, *event)
    label = None if label is None else label.repeat(dequantizations)
    is_point = len(model.event) == 1 and not dequantization
    tolerance = tolerance or TOLERANCES["points" if is_point else "pixels"]

    x, nats = flow_start(model, x0, indices, seed, label, dequantization)
    probes = divergence_probes(x, indices, seed)
    slope = functools.partial(flow_slope, model, label, probes)
    y = F.pad(to_double(x.flatten(1)), (0, 1))  # (K * B, D + 1), last the log-density's change
    y = dopri5(slope, y, clean, noisy, tolerance, error_dims=slice(-1))
    log_prior = -0.5 * (y[:, :-1] ** 2 + math.log(2 * math.pi)).sum(dim=1)  # log N(0, I)
    return (nats - (log_prior + y[:, -1]).cpu()).reshape(dequantizations, -1)


def flow_start(model, x0, indices, seed, label, dequantization):
    """Where the flow of x0 (K * B, *event) starts, and the nats (K * B,) that it leaves out.

    Pixels get a density by noise: `uniform` fills their bin (Theis et al. 2016, section 3.1);
    `noise` is what the schedule leaves at its clean end, and the VLB's decoder takes it off again
    (Kingma et al. 2021, eq. 11, whose diffusion term the flow replaces)."""
    copies = range(len(x0) // len(indices))
    dimensions = x0[0].numel()
    clean = model.schedule.log_snr(0.0).to(x0)  # ()
    alpha, sigma = alpha_sigma(clean, x0)  # (), ()
    nats = torch.zeros(len(x0), dtype=torch.float64)
    if dequantization == "noise":
        eps = torch.cat([normal(seed, "dequant_normal", k, indices, model.event) for k in copies])
        x = alpha * x0 + sigma * eps
        x0_hat = denoise(model, x, clean.expand(len(x)), label)
        nats += vlb_reconstruction(x0, x0_hat, clean, discrete=True).cpu()
        log_q = -0.5 * (to_double(eps) ** 2 + math.log(2 * math.pi))  # log q(x | x0)
        log_q -= to_double(sigma.log())
        return x, nats + log_q.flatten(1).sum(dim=1).cpu()
    nats -= dimensions * alpha.log().item()  # x = alpha x0 stretches the density
    if dequantization == "uniform":
        u = torch.cat([uniform(seed, "dequant_uniform", k, indices, model.event) for k in copies])
        x0 = x0 + (2 * u - 1) / 255
        nats -= dimensions * math.log(2 / 255)  # log of the bin's volume
    return alpha * x0, nats


def divergence_probes(x, indices, seed):
    """Vectors v (P, K * B, *event): their sum of v . Jv is the divergence of the flow at x.

    In up to 4 dimensions the basis: it is exact. Else one vector of random signs for each item
    (Hutchinson's unbiased estimate), the same for all its copies, so that its noise hardly enters a
    mean of exponentials."""
    event = x.shape[1:]
    dimensions = x[0].numel()
    if dimensions <= 4:  # few enough for one backward pass each
        basis = torch.eye(dimensions).to(x).reshape(dimensions, 1, *event)
        return basis.expand(-1, *x.shape)
    rademacher = 1 - 2 * uniform(seed, "hutchinson", 0, indices, event).round()  # -1 or 1
    return rademacher.repeat(len(x) // len(indices), *[1] * len(event))[None]


def flow_slope(model, label, probes, y, log_snr, items):
    """dy/dlog_snr (b, D + 1) of the probability-flow ODE, see dopri5: of x, and its divergence.

    label (K * B,) and probes (P, K * B, *event) are of all items, y and log_snr of `items`."""
    at = items.to(probes.device)  # the solver's numbers are on the CPU where MPS has no float64
    label = None if label is None else label[at]
    with torch.enable_grad():
        x = y[:, :-1].to(probes).reshape(-1, *model.event).requires_grad_()
        x0_hat = denoise(model, x, log_snr.to(probes), label)
        trace = torch.zeros_like(log_snr)  # (b,), of the Jacobian of x0_hat
        for probe in probes[:, at]:
            (row,) = torch.autograd.grad(x0_hat, x, probe, retain_graph=len(probes) > 1)
            trace += to_double((row * probe).flatten(1).sum(dim=1))
    alpha = torch.sigmoid(log_snr).sqrt()  # (b,)
    x0_hat = to_double(x0_hat.detach().flatten(1))  # where y is
    dx = alpha[:, None] / 2 * (x0_hat - alpha[:, None] * y[:, :-1])
    divergence = alpha / 2 * (trace - alpha * dx.shape[1])
    return torch.cat([dx, divergence[:, None]], dim=1)


@torch.no_grad()
def loss_by_noise_level(model, x0, indices, seed=0, count=10, label=None):
    """Mean squared error at `count` noise levels, evenly spaced in t: a list of dicts.

    Keys: `t`, `log_snr`, and the error (B,), averaged over the event, in units of `x0`, `eps`, `v`:
    eps_hat - eps = -alpha / sigma (x0_hat - x0) and v_hat - v = -1 / sigma (x0_hat - x0)."""
    indices = indices.to(x0.device)
    rows = []
    for k in range(count):
        t = (k + 0.5) / count
        log_snr = model.schedule.log_snr(t).to(x0)  # ()
        eps = normal(seed, "loss_eps", k, indices, model.event)
        x0_hat = noise_and_denoise(model, x0, log_snr, eps, label)
        error = ((x0_hat - x0) ** 2).flatten(1).mean(dim=1).cpu()  # (B,)
        snr = log_snr.exp().item()
        row = {"t": t, "log_snr": max(log_snr.item(), MIN_LOG_SNR)}
        rows.append(row | {"x0": error, "eps": snr * error, "v": (1 + snr) * error})
    return rows
