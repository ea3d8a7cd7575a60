"""Samplers: one reverse step each, and the loop that yields every state.

A step takes x0_hat, xt (B, *event), the levels before and after it (0-d float64), `noise`, which
gives N(0, I) like xt when it is called, and `last`, the (x0_hat, log_snr) of the step before (None
at first); it returns xs at the next level. Every formula holds at next_log_snr = +inf, where the
sample is clean: the last step needs no special case.
"""

import functools
from itertools import pairwise

import torch

from ddp.forward import alpha_sigma, normal, posterior, transition


def ddpm(x0_hat, xt, log_snr, next_log_snr, noise, last=None):
    """One ancestral step, a draw from q(xs | xt, x0_hat): the fixed small variance of Ho et al.
    2020."""
    mean, variance = posterior(x0_hat, xt, log_snr, next_log_snr)
    return mean + variance.sqrt() * noise()


def ddpm_large(x0_hat, xt, log_snr, next_log_snr, noise, last=None):
    """One ancestral step with the fixed large variance, beta_t. Ho et al. 2020, section 3.2."""
    mean, _ = posterior(x0_hat, xt, log_snr, next_log_snr)
    _, beta = transition(xt, next_log_snr, log_snr)
    # into the clean level beta is no noise to add but all that is left to remove
    return mean + torch.where(next_log_snr.isinf(), 0.0, beta.sqrt()) * noise()


def ddim(x0_hat, xt, log_snr, next_log_snr, noise, last=None, eta=0.0):
    """One DDIM step; eta 0 is deterministic, eta 1 has the variance of `ddpm`. Song et al. 2021,
    eq. 12."""
    alpha_t, sigma_t = alpha_sigma(log_snr, xt)
    alpha_s, sigma_s = alpha_sigma(next_log_snr, xt)
    eps_hat = (xt - alpha_t * x0_hat) / sigma_t  # derived from x0_hat, so that clipping reaches it
    if eta:
        fresh = eta**2 * -torch.expm1(log_snr - next_log_snr)  # the share of sigma_s² drawn anew
        eps_hat = (1 - fresh).clamp_min(0).sqrt() * eps_hat + fresh.sqrt() * noise()
    return alpha_s * x0_hat + sigma_s * eps_hat


def dpm_solver_2m(x0_hat, xt, log_snr, next_log_snr, noise, last=None):
    """One step of DPM-Solver++(2M), the second-order multistep solver. Lu et al. 2022, algorithm
    2."""
    _, sigma_t = alpha_sigma(log_snr, xt)
    alpha_s, sigma_s = alpha_sigma(next_log_snr, xt)
    h = (next_log_snr - log_snr) / 2  # the paper's lambda is half the log-SNR
    if last is not None and h.isfinite():  # first order at the start and into the clean level
        last_x0_hat, last_log_snr = last
        x0_hat = x0_hat + (x0_hat - last_x0_hat) * (h / (log_snr - last_log_snr))
    return sigma_s / sigma_t * xt - alpha_s * torch.expm1(-h) * x0_hat


DEFAULT_SAMPLER, DEFAULT_STEPS = "ddpm", 100
SAMPLERS = {"ddpm": ddpm, "ddpm_large": ddpm_large, "ddim": ddim, "dpm++": dpm_solver_2m}


def sample(denoise, xt, grid, sampler="ddim", noise=None, clip=None, **options):
    """Run the reverse process, yielding (log_snr, xt, x0_hat) after every step; the last xt is x0.

    denoise: (xt, log_snr (B,)) -> x0_hat. xt: the start, (B, *event), noise at grid[0]. grid:
    rising levels that end at +inf (Schedule.grid). noise: step number -> N(0, I) like xt; needed by
    the samplers that draw it. clip: the range that x0_hat is clipped to, or None. options: eta."""
    step, last = functools.partial(SAMPLERS[sampler], **options), None
    for i, (log_snr, next_log_snr) in enumerate(pairwise(grid)):
        x0_hat = denoise(xt, log_snr.to(xt).expand(len(xt)))
        if clip is not None:
            x0_hat = x0_hat.clamp(*clip)
        fresh = functools.partial(noise, i) if noise else None
        xt, last = step(x0_hat, xt, log_snr, next_log_snr, fresh, last), (x0_hat, log_snr)
        yield next_log_snr, xt, x0_hat


def options(model, sampler=None, steps=None, eta=None):
    """The keyword arguments of `generate`, checked. sampler: None is DEFAULT_SAMPLER, or ddim when
    eta is given. steps: None is DEFAULT_STEPS, or T if that is fewer.

    Raises ValueError when they do not fit the model's schedule or each other."""
    sampler = sampler or (DEFAULT_SAMPLER if eta is None else "ddim")
    if steps is None:
        steps = min(DEFAULT_STEPS, model.schedule.timesteps or DEFAULT_STEPS)
    model.schedule.grid(steps)
    if eta is None:
        return {"sampler": sampler, "steps": steps}
    if sampler != "ddim":
        raise ValueError(f"--eta is for --sampler ddim; {sampler} has no such choice")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta}: expected 0 to 1")
    return {"sampler": sampler, "steps": steps, "eta": eta}


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


@torch.no_grad()
def generate(model, indices, seed=0, label=None, sampler=DEFAULT_SAMPLER, steps=None, **rest):
    """The states, as `sample` yields them, of the samples numbered `indices` (B,): sample i is a
    function of (seed, i) alone, whatever the batch. label: (B,) on the model's device, or None."""
    indices = indices.to(next(model.parameters()).device)
    yield from sample(
        lambda xt, log_snr: model.denoise(xt, log_snr, label),
        normal(seed, "start", 0, indices, model.event),
        model.schedule.grid(options(model, sampler, steps)["steps"]),
        sampler,
        lambda i: normal(seed, "step", i, indices, model.event),
        model.clip,
        **rest,
    )


def final(states):
    """x0 (B, *event), of the last state; the others are forgotten as they pass."""
    x0 = None
    for _, x0, _ in states:  # noqa: B007
        pass
    return x0
