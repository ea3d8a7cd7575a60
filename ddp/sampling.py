"""Sampling: the reverse process, step by step, with guidance (CFG) and thresholding.

A sampler is a function of one step, step(x0_hat, x_t, log_snr_t, log_snr_s, ...) -> x_s, with x_t
and x0_hat (B, *event) and 0-d float64 levels. By name it takes what it needs of `noise`, () ->
N(0, I) like x_t; `denoise`; `history`, the (log_snr_t, x_t, x0_hat) of up to three steps before,
newest last; and `eta`. Every formula holds at log_snr_s = +inf, where the sample is clean, and at
log_snr_t = -inf, where it is noise alone: the first and the last step need no special case.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddp.forward import alpha_sigma, expand, q_posterior, q_step, q_step_sample
from ddp.rng import normal
from ddp.schedule import lookup


def ddpm(x0_hat, x_t, log_snr_t, log_snr_s, *, noise, **_):
    """Take an ancestral step, a draw from q(x_s | x_t, x0_hat).

    Its variance is DDPM's "fixed small" one, beta tilde (Ho et al. 2020, section 3.2)."""
    mean, variance = q_posterior(x0_hat, x_t, log_snr_t, log_snr_s)
    return mean + variance.sqrt() * noise()


def ddpm_large(x0_hat, x_t, log_snr_t, log_snr_s, *, noise, **_):
    """Take an ancestral step with DDPM's "fixed large" variance, beta_t."""
    mean, _ = q_posterior(x0_hat, x_t, log_snr_t, log_snr_s)
    _, beta = q_step(x_t, log_snr_s, log_snr_t)
    std = torch.where(log_snr_s.isinf(), 0.0, beta.sqrt())  # no noise on the last step
    return mean + std * noise()


def estimate_eps(x0_hat, x_t, log_snr_t):
    """Return eps_hat (B, *event), made from x0_hat so that thresholding reaches it."""
    alpha_t, sigma_t = alpha_sigma(log_snr_t, x_t)
    return (x_t - alpha_t * x0_hat) / sigma_t


def ddim(x0_hat, x_t, log_snr_t, log_snr_s, *, noise=None, eta=0.0, **_):
    """Take a DDIM step; eta 0 is deterministic, eta 1 has DDPM's variance.

    Song et al. 2021, eq. 12. It is also Euler's step of the probability-flow ODE in x / alpha over
    sigma / alpha (EDM; Karras et al. 2022, algorithm 1), and of a rectified flow over its t."""
    alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
    eps_hat = estimate_eps(x0_hat, x_t, log_snr_t)
    if eta:
        fresh = eta**2 * -torch.expm1(log_snr_t - log_snr_s)  # fraction of sigma_s^2 drawn anew
        eps_hat = (1 - fresh).clamp_min(0).sqrt() * eps_hat + fresh.sqrt() * noise()
    return alpha_s * x0_hat + sigma_s * eps_hat


def heun(x0_hat, x_t, log_snr_t, log_snr_s, *, denoise, **_):
    """Take Heun's second-order step, two NFE (EDM; Karras et al. 2022, algorithm 1)."""
    x_s = ddim(x0_hat, x_t, log_snr_t, log_snr_s)
    if log_snr_s.isinf() or log_snr_t.isinf():
        return x_s  # one NFE into the clean level
    alpha_s, _ = alpha_sigma(log_snr_s, x_t)
    change = denoise(x_s, log_snr_s.to(x_s)) - x0_hat
    # trapezoidal rule: average the two slopes, eps_hat = (x - alpha x0_hat) / sigma
    return x_s + 0.5 * alpha_s * torch.expm1((log_snr_s - log_snr_t) / 2) * change


def second_order_x0(x0_hat, log_snr_t, log_snr_s, history):
    """Extrapolate x0_hat half a step ahead, on the line through the last two."""
    h = log_snr_s - log_snr_t
    if not history or not h.isfinite():
        return x0_hat  # first order at the start and into the clean level
    last_log_snr, _, last_x0_hat = history[-1]
    return x0_hat + (x0_hat - last_x0_hat) * (h / (log_snr_t - last_log_snr) / 2)


def dpmpp_2m(x0_hat, x_t, log_snr_t, log_snr_s, *, history, **_):
    """Take a step of DPM-Solver++(2M), second-order multistep (Lu et al. 2022b, algorithm 2)."""
    _, sigma_t = alpha_sigma(log_snr_t, x_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
    h = (log_snr_s - log_snr_t) / 2  # the paper's lambda is half the log-SNR
    ahead = second_order_x0(x0_hat, log_snr_t, log_snr_s, history)
    return sigma_s / sigma_t * x_t - alpha_s * torch.expm1(-h) * ahead


def dpmpp_2m_sde(x0_hat, x_t, log_snr_t, log_snr_s, *, noise, history, **_):
    """Take a step of SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix D)."""
    _, sigma_t = alpha_sigma(log_snr_t, x_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s, x_t)
    h = (log_snr_s - log_snr_t) / 2
    ahead = second_order_x0(x0_hat, log_snr_t, log_snr_s, history)
    mean = sigma_s / sigma_t * torch.exp(-h) * x_t - alpha_s * torch.expm1(-2 * h) * ahead
    return mean + sigma_s * (-torch.expm1(-2 * h)).sqrt() * noise()


def unic_corrector(x0_hat, log_snr_t, history):
    """Return x_t once more, now that x0_hat there is known: UniC-2, or UniC-1 on the second step.

    B(h) = e^h - 1; the predictor, UniP-2, is DPM-Solver++(2M). Zhao et al. 2023, algorithm 1."""
    log_snr_1, x_1, x0_hat_1 = history[-1]  # the step before
    _, sigma_1 = alpha_sigma(log_snr_1, x_1)
    alpha_t, sigma_t = alpha_sigma(log_snr_t, x_1)
    h = (log_snr_t - log_snr_1) / 2
    phi = torch.expm1(-h)
    change = 0.5 * (x0_hat - x0_hat_1)
    if len(history) > 1:
        log_snr_2, _, x0_hat_2 = history[-2]
        r = (log_snr_2 - log_snr_1) / 2 / h  # where the step before it stands, below 0
        b1 = (phi / -h - 1) / phi
        b2 = 2 * (b1 * phi / -h - 0.5) / phi
        weight = (b1 - b2) / (1 - r)
        change = weight * ((x0_hat_2 - x0_hat_1) / r) + (b1 - weight) * (x0_hat - x0_hat_1)
    return sigma_t / sigma_1 * x_1 - alpha_t * phi * (x0_hat_1 + change)


# Adams & Bashforth's weights of the last 2, 3 and 4 slopes, newest first, each over their sum.
ADAMS_BASHFORTH = ((3, -1), (23, -16, 5), (55, -59, 37, -9))


def ipndm(x0_hat, x_t, log_snr_t, log_snr_s, *, history, **_):
    """Take a step of iPNDM: Adams & Bashforth's, of order 1, 2 and 3 at the start and then 4.

    Zhang & Chen 2023: DDIM with an extrapolated eps_hat, the slope of x / alpha over sigma / alpha.
    The weights are those of steps of one length in sigma / alpha; on other grids its order is 2."""
    x_s = ddim(x0_hat, x_t, log_snr_t, log_snr_s)
    if not history:
        return x_s
    now = (log_snr_t, x_t, x0_hat)
    slopes = [estimate_eps(x0, x, level) for level, x, x0 in (now, *reversed(history))]
    weights = ADAMS_BASHFORTH[len(history) - 1]
    ahead = sum(w * slope for w, slope in zip(weights, slopes, strict=True)) / sum(weights)
    alpha_s, _ = alpha_sigma(log_snr_s, x_t)
    length = torch.exp(-log_snr_s / 2) - torch.exp(-log_snr_t / 2)  # of the step, below 0
    return x_s + alpha_s * length * (ahead - slopes[0])


@dataclass(frozen=True)
class Sampler:
    step: Callable  # (x0_hat, x_t, log_snr_t, log_snr_s, *, noise, denoise, history, eta) -> x_s
    corrector: Callable | None = None  # (x0_hat, log_snr_t, history) -> x_t, before the step
    stochastic: bool = False  # it draws noise
    churn: bool = False  # it takes s_churn
    eta: bool = False  # it takes eta
    steps: int = 20  # default; measured in docs/sampling.md
    spacing: str = "trailing"  # default, a key of schedule.SPACINGS


SAMPLERS = {
    "ddpm": Sampler(ddpm, stochastic=True, steps=100),
    "ddpm_large": Sampler(ddpm_large, stochastic=True, steps=100),
    "ddim": Sampler(ddim, eta=True),
    "euler": Sampler(ddim, churn=True),
    "heun": Sampler(heun, churn=True, spacing="karras"),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, stochastic=True),
    "unipc": Sampler(dpmpp_2m, corrector=unic_corrector),
    "ipndm": Sampler(ipndm),
}
DEFAULT_SAMPLER = "dpmpp_2m_sde"  # measured in docs/sampling.md


# ---- the denoiser, (x_t, log_snr ()) -> x0_hat: thresholding, CFG, autoguidance ----


def clip_static(x0_hat):
    """Clip to the range of pixels, [-1, 1]."""
    return x0_hat.clamp(-1, 1)


def clip_dynamic(x0_hat, quantile=0.995):
    """Clip each item at a quantile of its absolute values, if above 1, and divide by that.

    Dynamic thresholding: Saharia et al. 2022 (Imagen), section 2.3."""
    limit = expand(x0_hat.flatten(1).abs().quantile(quantile, dim=1).clamp_min(1), x0_hat)
    return x0_hat.clamp(-limit, limit) / limit


THRESHOLDS = {"static": clip_static, "dynamic": clip_dynamic, "none": lambda x0_hat: x0_hat}


def guide_x0(x0_hat, x0_weak, cfg_scale, rescale=0.0):
    """Push x0_hat away from the estimate of a weaker denoiser, both (B, *event).

    That is the network without its label (CFG; Ho & Salimans 2022, eq. 6, whose w is cfg_scale - 1;
    x0_hat and eps_hat differ by a linear map) or a worse network (autoguidance; Karras et al. 2024,
    eq. 2). rescale: how far each item's std is brought back to that of x0_hat, 0 to 1 (Lin et al.
    2024, eqs. 15-16)."""
    x0_guided = x0_weak + cfg_scale * (x0_hat - x0_weak)  # CFG
    if rescale:
        std_ratio = x0_hat.flatten(1).std(dim=1) / x0_guided.flatten(1).std(dim=1)  # (B,)
        x0_guided = x0_guided * expand(1 + rescale * (std_ratio - 1), x0_guided)
    return x0_guided


def make_denoiser(
    model,
    label=None,  # (B,) on the model's device, or None
    threshold="static",  # a key of THRESHOLDS
    cfg_scale=None,  # None: no guidance
    guidance_interval=None,  # (low, high) log_snr between which to guide (Kynkäänniemi et al. 2024)
    guidance_rescale=0.0,
    guide=None,  # a weaker model; None: the model itself without its label
):
    """Return the model's denoiser, (x_t, log_snr ()) -> x0_hat, guided and thresholded."""
    low, high = guidance_interval or (-math.inf, math.inf)

    def denoise(x_t, log_snr):
        x0_hat = model.denoise(x_t, log_snr, label)
        if cfg_scale is not None and low <= log_snr <= high:
            x0_weak = guide.denoise(x_t, log_snr, label) if guide else model.denoise(x_t, log_snr)
            x0_hat = guide_x0(x0_hat, x0_weak, cfg_scale, guidance_rescale)
        return THRESHOLDS[threshold](x0_hat)

    return denoise


# ---- the loop ----


def sample_loop(
    denoise,  # (x_t (B, *event), log_snr ()) -> x0_hat
    x_t,  # (B, *event), noise at grid[0]
    grid,  # (steps + 1,) log_snr, rising to +inf; where it falls, noise is added again
    sampler="ddim",  # a key of SAMPLERS
    noise=None,  # () -> N(0, I) like x_t; for stochastic samplers
    s_churn=0.0,  # EDM, Karras et al. 2022, algorithm 2, with S_noise = 1
    project=None,  # (x_s, log_snr_s) -> x_s, after every step
    **options,  # eta
):
    """Run the reverse process, yielding (log_snr, x_t, x0_hat) after every step."""
    sampler = SAMPLERS[sampler]
    history = []
    gamma = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1)
    for log_snr_t, log_snr_s in itertools.pairwise(grid):
        if log_snr_s < log_snr_t:
            x_t = q_step_sample(x_t, log_snr_t, log_snr_s, noise)
            history = []
            continue
        if gamma and log_snr_t.isfinite():  # churn: sigma / alpha rises by gamma, lines 4-6
            log_snr_before = log_snr_t
            log_snr_t = log_snr_t - 2 * math.log1p(gamma)
            x_t = q_step_sample(x_t, log_snr_before, log_snr_t, noise)
        x0_hat = denoise(x_t, log_snr_t.to(x_t))  # one NFE
        if sampler.corrector and history and project is None:  # a projection moved x_t
            x_t = sampler.corrector(x0_hat, log_snr_t, history)
        context = {"noise": noise, "denoise": denoise, "history": history, **options}
        x_s = sampler.step(x0_hat, x_t, log_snr_t, log_snr_s, **context)
        history = [*history[-2:], (log_snr_t, x_t, x0_hat)]
        x_t = x_s if project is None else project(x_s, log_snr_s)
        yield log_snr_s, x_t, x0_hat


def default_steps(sampler, schedule):
    """Return the sampler's default number of steps, at most the schedule's."""
    steps = SAMPLERS[sampler].steps
    return min(steps, schedule.timesteps) if schedule.timesteps else steps


def check_options(model, sampler, eta, s_churn, threshold, cfg_scale=None, guide=None, **_):
    """Raise ValueError when a sampler or a model cannot do what is asked for."""
    entry = lookup(SAMPLERS, sampler, "sampler")
    lookup(THRESHOLDS, threshold, "threshold")
    if eta and not entry.eta:
        raise ValueError(f"eta={eta}: sampler={sampler} takes none; it is for ddim")
    if s_churn and not entry.churn:
        raise ValueError(f"s_churn={s_churn}: for sampler=heun or euler, not {sampler}")
    if cfg_scale is not None and not guide and not model.has_null_label:
        raise ValueError(
            f"cfg_scale={cfg_scale} needs a model trained with class_cond and label_dropout, "
            "or guide_checkpoint"
        )
    if guide and (guide.event, guide.num_classes) != (model.event, model.num_classes):
        raise ValueError("guide_checkpoint: trained on other items or labels")


@torch.no_grad()
def sample_trajectory(
    model,
    indices,  # (B,) the samples' numbers: sample i is a function of (seed, i), whatever the batch
    seed=0,
    label=None,  # (B,) on the model's device, or None
    *,
    sampler=DEFAULT_SAMPLER,  # a key of SAMPLERS
    steps=None,  # default: the sampler's
    spacing=None,  # a key of SPACINGS; default: the sampler's
    threshold=None,  # a key of THRESHOLDS; default: static for pixels, else none
    eta=0.0,  # of ddim
    s_churn=0.0,  # of euler and heun
    x_t=None,  # (B, *event); default: pure noise
    grid=None,  # (steps + 1,) log_snr; default: the schedule's grid
    project=None,  # as in sample_loop
    **guidance,  # cfg_scale, guidance_interval, guidance_rescale, guide: of make_denoiser
):
    """Yield (log_snr, x_t, x0_hat) after every step from noise to data; the last x_t is x0.

    In another batch a sample differs by rounding (1e-5 in float32): kernels go by the batch size.
    Raises ValueError for options that do not fit, or a model in training mode."""
    threshold = threshold or ("static" if model.is_pixels else "none")
    check_options(model, sampler, eta, s_churn, threshold, **guidance)
    if model.training:  # BatchNorm would mix the samples of a batch
        raise ValueError("model.training is True; sample from model.eval() or for_inference()")
    indices = indices.to(model.device)
    if steps is None:
        steps = default_steps(sampler, model.schedule)
    if grid is None:
        grid = model.schedule.sampling_grid(steps, spacing or SAMPLERS[sampler].spacing)
    if x_t is None:
        x_t = normal(seed, "x_T", 0, indices, model.event)
    counter = itertools.count()

    def noise():
        return normal(seed, "sampler_noise", next(counter), indices, model.event)

    denoise = make_denoiser(model, label, threshold, **guidance)
    s_churn = s_churn * (len(grid) - 1) / steps  # the same churn per step as on the full grid
    options = {"eta": eta} if SAMPLERS[sampler].eta else {}
    yield from sample_loop(denoise, x_t, grid, sampler, noise, s_churn, project, **options)


def sample(model, indices, seed=0, label=None, **options):
    """Return samples x0, (B, *event), numbered `indices`; the options of sample_trajectory.

    Raises FloatingPointError when a sample is not finite."""
    for _, x_t, _ in sample_trajectory(model, indices, seed, label, **options):
        x0 = x_t
    if not x0.isfinite().all():
        raise FloatingPointError(
            "samples became infinite; try a smaller cfg_scale, or another number of steps"
        )
    return x0


def cycle_labels(model, indices, chosen=None):
    """Return labels (B,) for samples `indices`, cycling through `chosen` (default: all classes).

    None when the model is not class-conditional."""
    if not model.num_classes:
        return None
    table = torch.tensor(chosen or range(model.num_classes))
    return table[indices % len(table)].to(model.device)
