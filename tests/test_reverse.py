"""Samplers against diffusers step by step, against oracles, and against known distributions."""

import math

import pytest
import torch

from ddp import reverse
from ddp.forward import alpha_sigma
from ddp.schedule import Schedule

EVENT = (3, 4, 5)


def oracle(x0):
    return lambda xt, log_snr: x0


@pytest.mark.parametrize("sampler", reverse.SAMPLERS)
@pytest.mark.parametrize("timesteps", [0, 20])
def test_an_oracle_gives_x0_back_at_every_step_count(sampler, timesteps):
    torch.manual_seed(0)
    x0, xt = torch.randn(2, 2, *EVENT)
    for steps in range(1, 21):
        grid = Schedule("cosine", timesteps).grid(steps)
        noise = lambda i: torch.randn(2, *EVENT)  # noqa: E731
        states = list(reverse.sample(oracle(x0), xt, grid, sampler, noise))
        assert len(states) == steps
        torch.testing.assert_close(states[-1][1], x0, rtol=1e-5, atol=1e-5)
        assert states[-1][0] == math.inf


def test_clipping_reaches_eps():
    """x0_hat is clipped before the step, so that all that the step derives from it is, too."""
    xt = torch.randn(1, *EVENT)
    grid = Schedule("cosine", 100).grid(10)
    wild = reverse.sample(oracle(torch.full_like(xt, 7.0)), xt, grid, "ddim", clip=(-1, 1))
    tame = reverse.sample(oracle(torch.ones_like(xt)), xt, grid, "ddim")
    for a, b in zip(wild, tame, strict=True):
        assert torch.equal(a[1], b[1])


def network(xt, log_snr):
    """A fixed nonlinear stand-in for a reverse network: its output."""
    return torch.tanh(xt * 0.8 + log_snr.reshape(-1, 1, 1, 1) / 20) * 0.9


def denoiser(predict):
    from ddp.model import PREDICTIONS

    def denoise(xt, log_snr):
        c_skip, c_out = PREDICTIONS[predict](*alpha_sigma(log_snr, xt))
        return c_skip * xt + c_out * network(xt, log_snr)

    return denoise


THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def ours(schedule, predict, steps, sampler, xt, noises, **options):
    """The states of our sampler, on the steps that diffusers calls trailing."""
    grid = Schedule(schedule, 1000).grid(steps)
    return [
        state[1]
        for state in reverse.sample(
            denoiser(predict), xt, grid, sampler, lambda i: noises[i], **options
        )
    ]


def theirs(scheduler, schedule, steps, xt, noises, monkeypatch, **options):
    """The states of a diffusers scheduler, fed the same network outputs and the same noise."""
    table = Schedule(schedule, 1000).table
    scheduler.alphas_cumprod = torch.sigmoid(table)  # in float64, as ours
    scheduler.betas = scheduler.betas.double()
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    states = []
    for i, t in enumerate(scheduler.timesteps):
        name = f"{type(scheduler).__module__}.randn_tensor"
        monkeypatch.setattr(name, lambda *a, i=i, **k: noises[i])
        output = network(xt, table[t].expand(len(xt)))
        xt = scheduler.step(output, t, xt, **options).prev_sample
        states.append(xt)
    return states


@pytest.mark.parametrize("schedule", THEIR_SCHEDULE)
@pytest.mark.parametrize("predict", THEIR_PREDICTION)
@pytest.mark.parametrize("steps", [5, 20, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_large", "ddim-0", "ddim-0.5", "ddim-1"])
def test_steps_are_those_of_diffusers(schedule, predict, steps, sampler, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    xt = torch.randn(2, *EVENT, dtype=torch.float64)
    noises = torch.randn(steps, *xt.shape, dtype=torch.float64)
    # with fixed_large diffusers adds noise even on its last step, unless that is at t = 0
    noises[-1] = 0
    common = {
        "beta_schedule": THEIR_SCHEDULE[schedule],
        "prediction_type": THEIR_PREDICTION[predict],
        "timestep_spacing": "trailing",
        "clip_sample": True,
    }
    if sampler.startswith("ddpm"):
        variance = {"ddpm": "fixed_small", "ddpm_large": "fixed_large"}[sampler]
        scheduler = diffusers.DDPMScheduler(1000, variance_type=variance, **common)
        options, our_options = {}, {}
    else:
        sampler, eta = sampler.split("-")
        scheduler = diffusers.DDIMScheduler(1000, **common)
        # diffusers keeps the network's eps unless told that clipping changed it
        our_options = {"eta": float(eta)}
        options = {"use_clipped_model_output": True, **our_options}
    expected = theirs(scheduler, schedule, steps, xt, noises, monkeypatch, **options)
    states = ours(schedule, predict, steps, sampler, xt, noises, clip=(-1, 1), **our_options)
    for state, their_state in zip(states, expected, strict=True):
        torch.testing.assert_close(state, their_state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", THEIR_SCHEDULE)
@pytest.mark.parametrize("predict", THEIR_PREDICTION)
@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_is_that_of_diffusers(schedule, predict, steps):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    xt = torch.randn(2, *EVENT, dtype=torch.float64)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000,
        beta_schedule=THEIR_SCHEDULE[schedule],
        prediction_type=THEIR_PREDICTION[predict],
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    table = Schedule(schedule, 1000).table
    scheduler.alphas_cumprod = torch.sigmoid(table)
    scheduler.set_timesteps(steps)
    grid = Schedule(schedule, 1000).grid(steps)
    scheduler.sigmas = torch.exp(-grid / 2)  # diffusers rounds its own to float32
    states = ours(schedule, predict, steps, "dpm++", xt, None)
    for state, t in zip(states, scheduler.timesteps, strict=True):
        xt = scheduler.step(network(xt, table[t].expand(len(xt))), t, xt).prev_sample
        torch.testing.assert_close(state, xt, rtol=1e-6, atol=1e-6)


def gaussian_denoiser(mean, sd):
    """E[x0 | xt] for data ~ N(mean, sd²), in closed form."""

    def denoise(xt, log_snr):
        alpha, sigma = alpha_sigma(log_snr, xt)
        gain = alpha * sd**2 / (alpha**2 * sd**2 + sigma**2)
        return mean + gain * (xt - alpha * mean)

    return denoise


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", None), ("ddpm_large", None), ("ddim", 1.0)])
def test_stochastic_samplers_reach_a_gaussian(sampler, eta):
    count = 20000
    generator = torch.Generator().manual_seed(0)
    draw = lambda *_: torch.randn(count, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    grid = Schedule("cosine", 1000).grid(250)
    options = {} if eta is None else {"eta": eta}
    states = reverse.sample(gaussian_denoiser(0.7, 0.3), draw(), grid, sampler, draw, **options)
    x0 = reverse.final(states)
    assert abs(x0.mean() - 0.7) < 4 * 0.3 / math.sqrt(count) + 0.002
    assert abs(x0.std() / 0.3 - 1) < 0.03


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2)])
def test_deterministic_samplers_converge_at_their_order(sampler, order):
    """Against the exact flow of Gaussian data, x0 = mean + sd (xT - alpha mean) / scale."""
    mean, sd = 0.5, 0.4
    xt = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors, counts = [], [32, 64, 128, 256]
    for steps in counts:
        grid = torch.linspace(-9, 9, steps + 1, dtype=torch.float64)  # ends short of clean
        *_, (_, end, _) = reverse.sample(gaussian_denoiser(mean, sd), xt, grid, sampler)
        alpha, sigma = alpha_sigma(grid[[0, -1]], xt)
        scale = (alpha**2 * sd**2 + sigma**2).sqrt().flatten()
        start = (xt - alpha[0] * mean) / scale[0]
        errors.append((end - (alpha[1] * mean + scale[1] * start)).abs().max())
    slope = math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])
    assert abs(slope - order) < 0.2


def test_ddim_with_eta_one_is_ddpm():
    torch.manual_seed(0)
    x0_hat, xt, noise = torch.randn(3, 2, *EVENT, dtype=torch.float64)
    for s in (-3.0, 2.0, math.inf):
        levels = torch.tensor(-4.0, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
        a = reverse.ddpm(x0_hat, xt, *levels, lambda: noise)
        b = reverse.ddim(x0_hat, xt, *levels, lambda: noise, eta=1.0)
        torch.testing.assert_close(a, b)
