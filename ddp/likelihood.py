"""Likelihood: the variational bound, the exact value along the probability-flow ODE, and the loss
by noise level."""

import math

import torch
import torch.nn.functional as F

from ddp.forward import alpha_sigma, diffuse, for_all, normal, uniform
from ddp.guidance import static

LOSS_STEPS = 1 << 20
TOLERANCES = (1e-5, 1e-4)  # of the solver, relative and absolute: of densities, of pixels
SUM_STEPS = 1000  # of the discrete bound of a continuous schedule
EXACT_TRACE = 4  # dimensions up to which a divergence is computed, not estimated
NOISIEST = -20.0  # log_snr that stands for -inf, in sums and in figures


def denoised(model, x0, log_snr, seed, step, indices, label):
    """x0_hat (B, *event) from a draw of xt at log_snr (B,), and the noise in it, keyed by (seed,
    step, index)."""
    eps = normal(seed, "test", step, indices.to(x0.device), model.event)
    x0_hat = model.denoise(diffuse(x0, log_snr, eps), log_snr, label)
    return (static(x0_hat) if model.is_image else x0_hat), eps


def prior_term(x0, log_snr):
    """KL(q(xT | x0) || N(0, I)) in nats, (B,). log_snr: 0-d, that of the last step T."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    return (0.5 * ((alpha * x0) ** 2 + sigma**2 - 1) - sigma.log()).flatten(1).sum(dim=1)


def diffusion_rate(x0, x0_hat, log_snr_t, log_snr_s=None):
    """KL(q(xs | xt, x0) || q(xs | xt, x0_hat)) in nats, (B,), of a step from t to the cleaner s.

    Both have the variance that is called fixed small, so it is (SNR_s - SNR_t) / 2 |x0 - x0_hat|².
    Kingma et al. 2021, eq. 13. Without s it is that of infinitely many steps, SNR / 2 |x0 -
    x0_hat|² for a unit of log-SNR, over which the integral is their sum (eq. 18)."""
    gain = log_snr_t.exp() if log_snr_s is None else log_snr_s.exp() - log_snr_t.exp()
    return 0.5 * gain * ((x0 - x0_hat) ** 2).flatten(1).sum(dim=1)


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
def bound(
    model, x0, indices, seed=0, draws=8, label=None, discrete=True, view="continuous", first=0
):
    """The variational bound on -log p(x0), item by item: a dict of nats, each (B,): `prior`,
    `diffusion`, `reconstruction` and their sum `total`.

    view: `discrete`, the sum over the schedule's steps (1000, if it is continuous; Ho et al. 2020,
    eq. 5), or `continuous`, the integral (Kingma et al. 2021, eqs. 11 and 18). Either is estimated
    from `draws` levels an item, those from number `first` on, stratified over log-SNR and keyed by
    (seed, index): unbiased, and independent of the batch. discrete: x0 is uint8 pixels in [-1, 1],
    not a point with a density."""
    schedule, indices = model.schedule, indices.to(x0.device)
    clean, last = (schedule.log_snr(t).cpu() for t in (0.0, 1.0))
    noisy = last.clamp_min(NOISIEST)
    table = schedule.table
    if table is None:
        table = schedule.log_snr(torch.linspace(0, 1, SUM_STEPS, dtype=torch.float64)).cpu()
    # Levels are drawn in proportion to what each would add for data of unit variance, sigmoid
    # (log_snr), whose integral is softplus: every draw then counts about alike.
    share, diffusion = F.softplus(clean) - F.softplus(noisy), torch.zeros(len(x0)).to(x0)
    for k in range(first, first + draws if clean > noisy else first):
        u = (k - first + uniform(seed, "test", k, indices).cpu().double()) / draws
        level = torch.expm1(F.softplus(clean) - u * share).log()
        if view == "continuous":
            t, s, width = level, None, share / torch.sigmoid(level)
        else:  # the step that spans this level
            i = torch.searchsorted(-table, -level).clamp(1, len(table) - 1)
            t, s = table[i], table[i - 1]
            width = share / (F.softplus(s) - F.softplus(t))
        t, s = t.to(x0), s if s is None else s.to(x0)
        x0_hat, eps = denoised(model, x0, t, seed, k, indices, label)
        term = diffusion_rate(x0, x0_hat, t, s)
        if not discrete:  # less what chance makes of it in unit data, which is known on average
            scale = math.prod(alpha_sigma(t, x0))
            term += diffusion_rate(scale, 0 * x0, t, s) - diffusion_rate(scale * eps, 0, t, s)
        diffusion += width.to(x0) * term / draws
    level = for_all(clean, x0)
    x0_hat, eps = denoised(model, x0, level, seed, 2 * LOSS_STEPS + first, indices, label)
    decoded = reconstruction_term(x0, x0_hat, level, discrete)
    if not discrete:
        decoded -= 0.5 * torch.sigmoid(clean) ** 2 * (eps**2 - 1).flatten(1).sum(dim=1)
    terms = {
        "prior": prior_term(x0, last.to(x0)),
        "diffusion": diffusion,
        "reconstruction": decoded,
    }
    terms = {name: term.double().cpu() for name, term in terms.items()}
    return terms | {"total": sum(terms.values())}


# Dormand & Prince 1980: nodes; weights of each stage, the last of which are the fifth order's; and
# its difference from the fourth.
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def combined(weights, slopes):
    return sum(w * slope for w, slope in zip(weights, slopes, strict=True) if w)


def integrate(slope, y, start, end, tolerance, controlled):
    """y(end), (B, D), of dy/dt = slope(y, t, which), y(start) = y. Dormand & Prince's embedded
    Runge-Kutta pair of orders 5 and 4; each item takes steps of its own, so that none depends on
    its batch. slope: of y (b, D) at t (b,), for the items `which` (b,). controlled: those of the D
    numbers whose error is held to `tolerance`, relative and absolute."""
    y, which = y.clone(), torch.arange(len(y), device=y.device)
    t = torch.full_like(y[:, 0], start)
    step = torch.full_like(t, (end - start) / 50)
    first = slope(y, t, which)
    while len(which):
        left = end - t[which]
        last = step[which].abs() >= left.abs()
        h = torch.where(last, left, step[which])
        slopes = [first[which]]
        for node, weights in zip(NODES[1:], STAGES, strict=True):
            stage = y[which] + h[:, None] * combined(weights, slopes)
            slopes.append(slope(stage, t[which] + node * h, which))
        allowed = tolerance * (1 + torch.maximum(y[which].abs(), stage.abs()))
        error = (h[:, None] * combined(ERROR, slopes) / allowed)[:, controlled]
        error = error.square().mean(dim=1).sqrt()
        # where the slope is not finite, or too steep for any step, there is no solution
        lost = ~error.isfinite() | (h.abs() < 1e-9 * abs(end - start)) & ~last
        stage[lost] = math.nan
        good, last = (error <= 1) | lost, last | lost
        step[which] = h * (0.9 * error.clamp_min(1e-9) ** -0.2).clamp(0.2, 5)
        done = which[good]
        y[done], first[done] = stage[good], slopes[-1][good]
        t[done] += h[good]
        which = which[~(good & last)]
    return y


@torch.no_grad()
def exact(model, x0, indices, seed=0, draws=1, label=None, dequantise=None, tolerance=None):
    """-log p(x0) in nats, (draws, B), by the change of variables along the probability-flow ODE.
    Song et al. 2021, eq. 39, which in log-SNR reads dx/dlog_snr = alpha (x0_hat - alpha x) / 2.

    The density is that of the model's data with the schedule's least noise. Its divergence is exact
    in up to EXACT_TRACE dimensions, and else Hutchinson's unbiased estimate, from one vector of
    signs an item; the same for every draw, so that its noise hardly enters a mean of exponentials.

    dequantise: None when x0 has a density. Pixels are given one by each draw: `uniform` noise fills
    their bin (Theis et al. 2016, section 3.1); `noise` is what the schedule leaves at its clean
    end, and the bound's decoder takes it off again (Kingma et al. 2021, eq. 11, whose diffusion
    term the flow replaces). The mean over draws is a bound; so is log K - logsumexp over K of them,
    and tighter (Burda et al. 2016, eq. 8)."""
    schedule, indices, size = model.schedule, indices.to(x0.device), x0[0].numel()
    copies = [draws, *[1] * len(model.event)]
    clean = schedule.log_snr(0.0).item()
    noisy = schedule.log_snr(1.0).clamp_min(NOISIEST).item()
    x0, label = x0.repeat(copies), None if label is None else label.repeat(draws)
    alpha, sigma = alpha_sigma(torch.tensor(clean).to(x0), x0)
    nats = torch.zeros(len(x0), dtype=torch.float64)  # beyond the flow's
    if dequantise:
        draw = {"uniform": uniform, "noise": normal}[dequantise]
        steps = range(3 * LOSS_STEPS, 3 * LOSS_STEPS + draws)
        drawn = torch.cat([draw(seed, "test", step, indices, model.event) for step in steps])
    if dequantise == "noise":
        xt, level = alpha * x0 + sigma * drawn, torch.full_like(x0.flatten(1)[:, 0], clean)
        x0_hat = model.denoise(xt, level, label)
        x0_hat = static(x0_hat) if model.is_image else x0_hat
        nats += reconstruction_term(x0, x0_hat, level, True).cpu()
        normalised = -0.5 * (drawn.double() ** 2 + math.log(2 * math.pi)) - sigma.log()
        nats += normalised.flatten(1).sum(dim=1).cpu()
    else:
        nats -= size * alpha.log().item()
        if dequantise:
            x0, nats = x0 + (2 * drawn - 1) / 255, nats - size * math.log(2 / 255)
        xt = alpha * x0
    if size <= EXACT_TRACE:
        probes = torch.eye(size).to(x0).reshape(size, 1, *model.event).expand(-1, *x0.shape)
    else:
        signs = 1 - 2 * uniform(seed, "test", 4 * LOSS_STEPS, indices, model.event).round()
        probes = signs.repeat(copies)[None]

    def slope(y, log_snr, which):
        with torch.enable_grad():
            x = y[:, :-1].to(x0).reshape(-1, *model.event).requires_grad_()
            level = log_snr.to(x0)
            x0_hat = model.denoise(x, level, None if label is None else label[which])
            x0_hat = static(x0_hat) if model.is_image else x0_hat
            trace = torch.zeros_like(log_snr)
            for i, probe in enumerate(probes):
                more = i + 1 < len(probes)
                (row,) = torch.autograd.grad(x0_hat, x, probe[which], retain_graph=more)
                trace += (row * probe[which]).flatten(1).sum(dim=1)
        alpha = torch.sigmoid(log_snr).sqrt()[:, None]
        change = alpha / 2 * (x0_hat.detach().flatten(1) - alpha * y[:, :-1])
        divergence = alpha[:, 0] / 2 * (trace - alpha[:, 0] * size)
        return torch.cat([change, divergence[:, None]], dim=1)

    y = F.pad(xt.flatten(1).double(), (0, 1))
    tolerance = tolerance or TOLERANCES[dequantise is not None]
    y = integrate(slope, y, clean, noisy, tolerance, slice(size))
    prior = -0.5 * (y[:, :-1] ** 2 + math.log(2 * math.pi)).sum(dim=1)
    return (nats - (prior + y[:, -1]).cpu()).reshape(draws, -1)


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
        x0_hat, _ = denoised(model, x0, log_snr.expand(len(x0)), seed, step, indices, label)
        error = ((x0_hat - x0) ** 2).flatten(1).mean(dim=1).cpu()
        snr = log_snr.exp().item()
        error = {"x0": error, "eps": snr * error, "v": (1 + snr) * error}
        rows.append({"t": t, "log_snr": max(log_snr.item(), NOISIEST)} | error)
    return rows
