"""Samplers: one reverse step each, and the loop that yields every state.

A step takes x0_hat, xt (B, *event), the levels before and after it (0-d float64), and by name what
it needs of: `noise`, which gives N(0, I) like xt when it is called; `denoise`; and `history`, the
(log_snr, xt, x0_hat) of the steps before, the newest last. It returns xs at the next level. Every
formula holds at next_log_snr = +inf, where the sample is clean, and at log_snr = -inf, where it is
noise alone: the first and the last step need no special case.
"""

import itertools
import math

import torch

from ddp.forward import alpha_sigma, for_all, normal, posterior, transition
from ddp.guidance import clipped, guided


def ddpm(x0_hat, xt, log_snr, next_log_snr, *, noise, **_):
    """One ancestral step, a draw from q(xs | xt, x0_hat): the fixed small variance of Ho et al.
    2020."""
    mean, variance = posterior(x0_hat, xt, log_snr, next_log_snr)
    return mean + variance.sqrt() * noise()


def ddpm_large(x0_hat, xt, log_snr, next_log_snr, *, noise, **_):
    """One ancestral step with the fixed large variance, beta_t. Ho et al. 2020, section 3.2."""
    mean, _ = posterior(x0_hat, xt, log_snr, next_log_snr)
    _, beta = transition(xt, next_log_snr, log_snr)
    # into the clean level beta is no noise to add but all that is left to remove
    return mean + torch.where(next_log_snr.isinf(), 0.0, beta.sqrt()) * noise()


def ddim(x0_hat, xt, log_snr, next_log_snr, *, noise=None, eta=0.0, **_):
    """One DDIM step; eta 0 is deterministic, eta 1 has the variance of `ddpm`. Song et al. 2021,
    eq. 12. It is also Euler's step of the probability-flow ODE in x / alpha over sigma / alpha
    (Karras et al. 2022, algorithm 1), and of a rectified flow over its t."""
    alpha_t, sigma_t = alpha_sigma(log_snr, xt)
    alpha_s, sigma_s = alpha_sigma(next_log_snr, xt)
    eps_hat = (xt - alpha_t * x0_hat) / sigma_t  # derived from x0_hat, so that clipping reaches it
    if eta:
        fresh = eta**2 * -torch.expm1(log_snr - next_log_snr)  # the share of sigma_s² drawn anew
        eps_hat = (1 - fresh).clamp_min(0).sqrt() * eps_hat + fresh.sqrt() * noise()
    return alpha_s * x0_hat + sigma_s * eps_hat


def heun(x0_hat, xt, log_snr, next_log_snr, *, denoise, **_):
    """Heun's step, second order, in x / alpha over sigma / alpha: two network evaluations, but one
    into the clean level. Karras et al. 2022, algorithm 1, lines 6-11."""
    xs = ddim(x0_hat, xt, log_snr, next_log_snr)
    if next_log_snr.isinf() or log_snr.isinf():
        return xs
    alpha_s, _ = alpha_sigma(next_log_snr, xt)
    change = denoise(xs, for_all(next_log_snr, xs)) - x0_hat
    # the mean of both slopes, eps_hat = (x - alpha x0_hat) / sigma, takes the place of the first
    return xs + 0.5 * alpha_s * torch.expm1((next_log_snr - log_snr) / 2) * change


def extrapolated(x0_hat, log_snr, next_log_snr, history):
    """x0_hat half a step ahead, on the line through the last two: what makes a solver second order.
    The first order is left at the start and into the clean level."""
    h = next_log_snr - log_snr
    if not history or not h.isfinite():
        return x0_hat
    last_log_snr, _, last_x0_hat = history[-1]
    return x0_hat + (x0_hat - last_x0_hat) * (h / (log_snr - last_log_snr) / 2)


def dpm_solver_2m(x0_hat, xt, log_snr, next_log_snr, *, history, **_):
    """One step of DPM-Solver++(2M), second-order multistep. Lu et al. 2022b, algorithm 2."""
    _, sigma_t = alpha_sigma(log_snr, xt)
    alpha_s, sigma_s = alpha_sigma(next_log_snr, xt)
    h = (next_log_snr - log_snr) / 2  # the paper's lambda is half the log-SNR
    ahead = extrapolated(x0_hat, log_snr, next_log_snr, history)
    return sigma_s / sigma_t * xt - alpha_s * torch.expm1(-h) * ahead


def dpm_solver_2m_sde(x0_hat, xt, log_snr, next_log_snr, *, noise, history, **_):
    """One step of SDE-DPM-Solver++(2M). Lu et al. 2022b, appendix D."""
    _, sigma_t = alpha_sigma(log_snr, xt)
    alpha_s, sigma_s = alpha_sigma(next_log_snr, xt)
    h = (next_log_snr - log_snr) / 2
    ahead = extrapolated(x0_hat, log_snr, next_log_snr, history)
    mean = sigma_s / sigma_t * torch.exp(-h) * xt - alpha_s * torch.expm1(-2 * h) * ahead
    return mean + sigma_s * (-torch.expm1(-2 * h)).sqrt() * noise()


def unic(x0_hat, log_snr, history):
    """xt once more, now that x0_hat there is known: the corrector UniC-2 (UniC-1 after the first
    step) with B(h) = e^h - 1, whose predictor UniP-2 is DPM-Solver++(2M). Zhao et al. 2023,
    algorithm 1."""
    last_log_snr, last_xt, last_x0_hat = history[-1]
    _, sigma_s = alpha_sigma(last_log_snr, last_xt)
    alpha_t, sigma_t = alpha_sigma(log_snr, last_xt)
    h = (log_snr - last_log_snr) / 2
    phi = torch.expm1(-h)
    change = 0.5 * (x0_hat - last_x0_hat)
    if len(history) > 1:
        r = (history[-2][0] - last_log_snr) / 2 / h  # where the step before stands, below 0
        b1 = (phi / -h - 1) / phi
        b2 = 2 * (b1 * phi / -h - 0.5) / phi
        before = (history[-2][2] - last_x0_hat) / r
        weight = (b1 - b2) / (1 - r)
        change = weight * before + (b1 - weight) * (x0_hat - last_x0_hat)
    return sigma_t / sigma_s * last_xt - alpha_t * phi * (last_x0_hat + change)


SAMPLERS = {
    "ddpm": ddpm,
    "ddpm_large": ddpm_large,
    "ddim": ddim,
    "euler": ddim,
    "heun": heun,
    "dpm++": dpm_solver_2m,
    "dpm++sde": dpm_solver_2m_sde,
    "unipc": dpm_solver_2m,
}
CORRECTORS = {"unipc": unic}
STOCHASTIC = ("ddpm", "ddpm_large", "dpm++sde")
CHURNABLE = ("euler", "heun")


def noised(xs, log_snr, next_log_snr, noise):
    """One step of the forward network, a draw from q(xt | xs) at a noisier level."""
    mean, variance = transition(xs, log_snr, next_log_snr)
    return mean + variance.sqrt() * noise()


def sample(denoise, xt, grid, sampler="ddim", noise=None, churn=0.0, project=None, **options):
    """Run the reverse process, yielding (log_snr, xt, x0_hat) after every step; the last xt is x0.

    denoise: (xt, log_snr (B,)) -> x0_hat. xt: the start, (B, *event), noise at grid[0]. grid:
    rising levels, to +inf for clean data (Schedule.grid); where they fall, noise is added again.
    noise: () -> N(0, I) like xt; needed by the samplers that draw it. churn: S_churn of Karras et
    al. 2022, with S_noise = 1. project: (xs, log_snr) -> xs, done after every step. options:
    eta."""
    step, corrector, history = SAMPLERS[sampler], CORRECTORS.get(sampler), []
    share = min(churn / (len(grid) - 1), math.sqrt(2) - 1)
    for log_snr, next_log_snr in itertools.pairwise(grid):
        if next_log_snr < log_snr:
            xt, history = noised(xt, log_snr, next_log_snr, noise), []
            continue
        if share and log_snr.isfinite():  # sigma / alpha rises by `share`: algorithm 2, lines 4-6
            quieter, log_snr = log_snr, log_snr - 2 * math.log1p(share)
            xt = noised(xt, quieter, log_snr, noise)
        x0_hat = denoise(xt, for_all(log_snr, xt))
        if corrector and history and project is None:  # else xt is no longer the step's
            xt = corrector(x0_hat, log_snr, history)
        rest = {"noise": noise, "denoise": denoise, "history": history, **options}
        xs = step(x0_hat, xt, log_snr, next_log_snr, **rest)
        history = [*history[-1:], (log_snr, xt, x0_hat)]
        xt = xs if project is None else project(xs, next_log_snr)
        yield next_log_snr, xt, x0_hat


def class_labels(model, indices, chosen=None):
    """Labels (B,) for samples `indices`, on the model's device: sample i gets the i-th of `chosen`,
    or of all classes, going round. None when the model is told of no classes."""
    if not model.classes:
        return None
    table = torch.tensor(chosen or range(model.classes))
    return table[indices % len(table)].to(next(model.parameters()).device)


def chosen_labels(model, classes, text):
    """The class numbers that `text`, such as "3" or "cat,dog", means; None when it is None.

    Raises ValueError for a class that there is not, or a model that is told of none."""
    if text is None:
        return None
    if not model.classes:
        raise ValueError(
            "--label needs a model that was trained with --conditional; this one was not"
        )
    numbers = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    words = [text] if text in numbers else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in numbers:
            raise ValueError(f"--label {word}: expected some of {', '.join(classes)}")
    return [numbers[word] for word in words]


def denoiser(
    model,
    label=None,
    clip="static",
    guidance=None,
    guidance_interval=None,
    guidance_rescale=0.0,
    guide=None,
):
    """The model's `denoise`, (xt, log_snr (B,)) -> x0_hat, guided and clipped. guidance: None is
    none; by `guide`, a weaker model, or else by the model itself without its label."""

    def denoise(xt, log_snr):
        return model.denoise(xt, log_snr, label)

    if guidance is None:
        return clipped(denoise, clip)

    def weak(xt, log_snr):
        return guide.denoise(xt, log_snr, label) if guide else model.denoise(xt, log_snr)

    interval = guidance_interval or (-math.inf, math.inf)
    return clipped(guided(denoise, weak, guidance, interval, guidance_rescale), clip)


@torch.no_grad()
def generate(
    model,
    indices,
    seed=0,
    label=None,
    *,
    sampler="ddim",
    steps=10,
    spacing="trailing",
    eta=0.0,
    churn=0.0,
    xt=None,
    grid=None,
    project=None,
    **rest,
):
    """The states, as `sample` yields them, of the samples numbered `indices` (B,): sample i is a
    function of (seed, i) alone, whatever the batch. label: (B,) on the model's device, or None. xt,
    grid, project: as for `sample`, in place of pure noise, the schedule's grid, and nothing. rest:
    of `denoiser`."""
    indices = indices.to(next(model.parameters()).device)
    draws = itertools.count()
    if xt is None:
        xt = normal(seed, "start", 0, indices, model.event)
    if grid is None:
        grid = model.schedule.grid(steps, spacing)
    yield from sample(
        denoiser(model, label, **rest),
        xt,
        grid,
        sampler,
        lambda: normal(seed, "step", next(draws), indices, model.event),
        churn * (len(grid) - 1) / steps,  # a part of the way is churned as it is in the whole
        project,
        **({"eta": eta} if sampler == "ddim" else {}),
    )


def final(states):
    """x0 (B, *event), of the last state; the others are forgotten as they pass."""
    x0 = None
    for _, x0, _ in states:  # noqa: B007
        pass
    return x0
