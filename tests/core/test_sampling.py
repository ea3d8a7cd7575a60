"""Samplers against diffusers and EDM's code step by step, against oracles, and against a mixture of
Gaussians whose denoiser is known; guidance and thresholding against their papers."""

import functools
import itertools
import math

import pytest
import torch
from oracles import Gaussian, GaussianMixture, OracleModel
from tiny import random_points, tiny_trainer
from torch import nn

from ddp.forward import alpha_sigma, q_step
from ddp.model import PREDICTIONS, DiffusionModel
from ddp.rng import normal
from ddp.sampling import (
    SAMPLERS,
    THRESHOLDS,
    Sampler,
    clip_dynamic,
    clip_static,
    cycle_labels,
    ddim,
    ddpm,
    default_steps,
    guide_x0,
    ipndm,
    make_denoiser,
    sample,
    sample_loop,
    sample_trajectory,
)
from ddp.schedule import SPACINGS, Schedule

EVENT = (3, 4, 5)
DOUBLE = {"dtype": torch.float64}
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]


def last_state(states):
    """Return the x_t of the last state."""
    *_, (_, x_t, _) = states
    return x_t


def noise_source(*shape, seed=0):
    """Return a function () -> N(0, I) of that shape, float64."""
    generator = torch.Generator().manual_seed(seed)
    return functools.partial(torch.randn, *shape, generator=generator, **DOUBLE)


# ---- an oracle: a denoiser that always answers x0 ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps", [0, 20, "zero terminal"])
def test_oracle_gives_x0_back_at_every_number_of_steps(sampler, spacing, timesteps):
    torch.manual_seed(0)
    x0, x_t = torch.randn(2, 2, *EVENT)
    zero = timesteps == "zero terminal"
    schedule = Schedule("cosine", 20 if zero else timesteps, zero_terminal_snr=zero)
    noise = functools.partial(torch.randn_like, x_t)
    for steps in (1, 2, 3, 7, 19, 20):
        grid = schedule.sampling_grid(steps, spacing)
        states = list(sample_loop(lambda *_: x0, x_t, grid, sampler, noise))
        assert len(states) == steps
        log_snr, x, x0_hat = states[-1]
        assert log_snr == math.inf
        assert x0_hat is x0
        torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_oracle_gives_x0_back_in_a_thousand_steps(sampler):
    torch.manual_seed(0)
    x0, x_t = torch.randn(2, 2, *EVENT)
    noise = functools.partial(torch.randn_like, x_t)
    grid = Schedule("linear", 1000).sampling_grid(1000)
    states = sample_loop(lambda *_: x0, x_t, grid, sampler, noise)
    torch.testing.assert_close(last_state(states), x0, rtol=1e-5, atol=1e-5)


# ---- step by step against other implementations, fed the same network, noise and levels ----


def network(x_t, log_snr):
    """A fixed nonlinear stand-in for a reverse network: its output."""
    level = log_snr.clamp(-20, 20).reshape(-1, 1, 1, 1) / 20
    return torch.tanh(x_t * 0.8 + level) * 0.9


def denoiser(prediction):
    def denoise(x_t, log_snr):
        c_skip, c_out = PREDICTIONS[prediction](*alpha_sigma(log_snr, x_t))
        return c_skip * x_t + c_out * network(x_t, log_snr)

    return denoise


def table_of(schedule, finite=False):
    """Return log_snr of 1000 steps; finite: a last level that diffusers' solvers, too, can take."""
    name = "linear" if schedule == "zero" else schedule
    table = Schedule(name, 1000, zero_terminal_snr=schedule == "zero").table.clone()
    if finite and schedule == "zero":
        table[-1] = -30.0
    return table


def trailing(table, steps):
    """Return the levels at the steps that diffusers calls trailing, up to the clean one."""
    index = (torch.arange(steps, 0, -1, **DOUBLE) * (len(table) / steps)).round().long() - 1
    return torch.cat([table[index], torch.tensor([math.inf], **DOUBLE)])


THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2", "zero": "linear"}
CASES = [("cosine", "v", 250)]
for case in itertools.product(THEIR_SCHEDULE, THEIR_PREDICTION, (5, 20)):
    if case[:2] != ("zero", "eps"):  # noise alone says nothing of x0
        CASES.append(case)


def common_options(schedule, prediction, **options):
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": THEIR_SCHEDULE[schedule],
        "prediction_type": THEIR_PREDICTION[prediction],
        "timestep_spacing": "trailing",
        **options,
    }


def start(steps):
    """Return x_T and the noise of every step."""
    noise = noise_source(2, *EVENT)
    return noise(), torch.stack([noise() for _ in range(steps)])


def our_states(denoise, x_t, grid, noises, sampler, **options):
    noises = iter(noises)
    states = sample_loop(denoise, x_t, grid, sampler, lambda: next(noises), **options)
    return [state[1] for state in states]


def their_states(scheduler, table, grid, x_t, noises, monkeypatch, **options):
    """Return the states of a diffusers scheduler whose levels are made exactly ours, in float64."""
    scheduler.alphas_cumprod = torch.sigmoid(table)
    scheduler.betas = scheduler.betas.double()
    scheduler.one = torch.tensor(1.0, **DOUBLE)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, **DOUBLE)
    scheduler.set_timesteps(len(grid) - 1)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.exp(-grid / 2)
    noises = iter(noises)
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: next(noises), raising=False)
    states = []
    for log_snr, t in zip(grid, scheduler.timesteps, strict=False):
        output = network(x_t, log_snr.expand(len(x_t)))
        x_t = scheduler.step(output, t, x_t, **options).prev_sample
        states.append(x_t)
    return states


def compare(states, expected, tolerance=1e-6):
    assert len(states) == len(expected)
    for state, their_state in zip(states, expected, strict=True):
        torch.testing.assert_close(state, their_state.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("schedule", "prediction", "steps"), CASES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_large", "ddim-0", "ddim-0.5", "ddim-1"])
def test_ddpm_and_ddim_are_those_of_diffusers(schedule, prediction, steps, sampler, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    x_t, noises = start(steps)
    # with fixed_large diffusers adds noise even on its last step, unless that is at t = 0
    noises[-1] = 0
    options = {}
    our_options = {}
    shared = common_options(schedule, prediction, clip_sample=True)
    if sampler.startswith("ddpm"):
        variance = {"ddpm": "fixed_small", "ddpm_large": "fixed_large"}[sampler]
        scheduler = diffusers.DDPMScheduler(variance_type=variance, **shared)
    else:
        sampler, eta = sampler.split("-")
        scheduler = diffusers.DDIMScheduler(**shared)
        # diffusers keeps the network's eps unless an option says that clipping changed it
        our_options = {"eta": float(eta)}
        options = {"use_clipped_model_output": True, **our_options}
    table = table_of(schedule)
    grid = trailing(table, steps)
    denoise = denoiser(prediction)
    states = our_states(
        lambda *a: clip_static(denoise(*a)), x_t, grid, noises, sampler, **our_options
    )
    compare(states, their_states(scheduler, table, grid, x_t, noises, monkeypatch, **options))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # within diffusers
@pytest.mark.parametrize(("schedule", "prediction", "steps"), CASES)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_solvers_are_those_of_diffusers(schedule, prediction, steps, sampler, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    x_t, noises = start(steps)
    shared = common_options(schedule, prediction, solver_order=2, final_sigmas_type="zero")
    if sampler == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(solver_type="bh2", **shared)
    else:
        kind = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}[sampler]
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type=kind, solver_type="midpoint", lower_order_final=True, **shared
        )
    table = table_of(schedule, finite=True)
    grid = trailing(table, steps)
    states = our_states(denoiser(prediction), x_t, grid, noises, sampler)
    # diffusers rounds the state to float32 at every step
    compare(states, their_states(scheduler, table, grid, x_t, noises, monkeypatch), 1e-5)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # within diffusers
@pytest.mark.parametrize(("schedule", "prediction", "steps"), CASES)
def test_heun_is_that_of_diffusers(schedule, prediction, steps):
    diffusers = pytest.importorskip("diffusers")
    x_t, _ = start(steps)
    scheduler = diffusers.HeunDiscreteScheduler(**common_options(schedule, prediction))
    table = table_of(schedule, finite=True)
    grid = trailing(table, steps)
    states = our_states(denoiser(prediction), x_t, grid, [], "heun")
    scheduler.set_timesteps(steps)
    sigmas = torch.exp(-grid / 2)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = torch.cat([grid[:1], grid[1:-1].repeat_interleave(2)])
    x = x_t / alpha_sigma(grid[0], x_t)[0]
    expected = []
    for i, (t, log_snr) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        alpha, _ = alpha_sigma(log_snr, x)
        x = scheduler.step(network(alpha * x, log_snr.expand(len(x))), t, x).prev_sample
        if i % 2 == 1 or i == len(levels) - 1:
            after = grid[i // 2 + 1]
            expected.append(alpha_sigma(after, x)[0] * x)
    compare(states, expected)


def edm_sampler(denoise, x, sigmas, churn, noises):
    """EDM's sampler, line by line: Karras et al. 2022, algorithm 2 (S_noise = 1)."""
    steps = len(sigmas) - 1
    states = []
    gamma = min(churn / steps, math.sqrt(2) - 1)
    for i in range(steps):
        t = sigmas[i]
        t_next = sigmas[i + 1]
        t_hat = t + gamma * t
        x_hat = x + (t_hat**2 - t**2).sqrt() * noises[i]
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            d_next = (x - denoise(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_next)
        states.append(x)
    return states


@pytest.mark.parametrize(
    ("prediction", "steps"),
    [("v", 250), *itertools.product(THEIR_PREDICTION, (1, 5, 20))],
)
@pytest.mark.parametrize("s_churn", [0.0, 3.0, 40.0])
def test_heun_with_churn_is_edm(prediction, steps, s_churn):
    x_t, noises = start(steps)
    ramp = torch.linspace(0, 0.999, steps, **DOUBLE)  # a table's first step is that of t = 1 / T
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # their eq. 5
    grid = Schedule("karras", 1000).sampling_grid(steps, "karras")
    torch.testing.assert_close(grid[:-1], -2 * sigmas.log())
    denoise = denoiser(prediction)

    def their_denoise(x, sigma):
        log_snr = -2 * sigma.log()
        return denoise(alpha_sigma(log_snr, x)[0] * x, log_snr)

    x = x_t / alpha_sigma(grid[0], x_t)[0]
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    expected = edm_sampler(their_denoise, x, sigmas, s_churn, noises)
    expected = [alpha_sigma(g, x)[0] * x for g, x in zip(grid[1:], expected, strict=True)]
    compare(our_states(denoise, x_t, grid, noises, "heun", s_churn=s_churn), expected)


@pytest.mark.parametrize("s_churn", [0.0, 5.0])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_is_edms_of_diffusers(s_churn, steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    scheduler.precondition_outputs = lambda sample, output, sigma: output
    x_t, noises = start(steps)
    sigmas = scheduler.sigmas.double()
    grid = -2 * sigmas.log()
    x = (x_t / alpha_sigma(grid[0], x_t)[0]).float()
    their_noises = iter(noises.float())
    module = "diffusers.schedulers.scheduling_edm_euler.randn_tensor"
    monkeypatch.setattr(module, lambda *a, **k: next(their_noises))
    denoise = denoiser("v")
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    expected = []
    for t, sigma, after in zip(scheduler.timesteps, sigmas, grid[1:], strict=False):
        # theirs asks the network before it adds noise; ours, as EDM does, after
        sigma_hat = sigma * (1 + gamma)
        noise = noises[len(expected)].float()
        x_hat = x + noise * (sigma_hat**2 - sigma**2).sqrt().float() if gamma else x
        log_snr = -2 * sigma_hat.log()
        x0_hat = denoise(alpha_sigma(log_snr, x)[0] * x_hat.double(), log_snr)
        x = scheduler.step(x0_hat.float(), t, x, s_churn=s_churn).prev_sample
        expected.append(alpha_sigma(after, x)[0] * x.double())
    states = our_states(denoise, x_t, grid, noises, "euler", s_churn=s_churn)
    compare(states, expected, tolerance=3e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "zero"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20])
def test_ipndm_is_that_of_diffusers(schedule, steps):
    diffusers = pytest.importorskip("diffusers")
    x_t, _ = start(steps)
    grid = trailing(table_of(schedule, finite=True), steps)
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps)
    scheduler.alphas, scheduler.betas = alpha_sigma(grid, grid)  # what they call the sigmas
    expected = []
    x = x_t
    for log_snr, t in zip(grid, scheduler.timesteps, strict=False):
        x = scheduler.step(network(x, log_snr.expand(len(x))), t, x).prev_sample
        expected.append(x)
    compare(our_states(denoiser("v"), x_t, grid, [], "ipndm"), expected)


# ---- samplers against each other and against their limits ----


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "heun"])
def test_noise_alone_is_the_limit_of_much_noise(sampler):
    x_t, noises = start(10)
    finite = torch.cat([torch.tensor([-60.0], **DOUBLE), trailing(table_of("cosine"), 9)[1:]])
    infinite = finite.clone()
    infinite[0] = -math.inf
    one = our_states(denoiser("v"), x_t, finite, noises, sampler)
    other = our_states(denoiser("v"), x_t, infinite, noises, sampler)
    # the multistep solvers' line through x0_hat at -60 is not quite level
    multistep = sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "ipndm")
    compare(one, other, tolerance=0.05 if multistep else 1e-6)


def test_euler_is_ddim():
    x_t, _ = start(1)
    grid = Schedule("linear", 1000).sampling_grid(7)
    euler = our_states(denoiser("v"), x_t, grid, [], "euler")
    compare(euler, our_states(denoiser("v"), x_t, grid, [], "ddim"), tolerance=0)


def test_euler_is_that_of_a_rectified_flow():
    """Over t, with x = (1 - t) x0 + t eps: Liu et al. 2022, eq. 1."""
    x_t, _ = start(1)
    grid = Schedule("flow", 0).sampling_grid(8)
    alpha, sigma = alpha_sigma(grid, grid)
    t = sigma / (alpha + sigma)
    x = x_t / (alpha[0] + sigma[0])
    expected = []
    for i in range(8):
        x0_hat = denoiser("v")(x * (alpha[i] + sigma[i]), grid[i])
        x = x + (t[i + 1] - t[i]) * (x - x0_hat) / t[i]
        expected.append(x * (alpha[i + 1] + sigma[i + 1]))
    compare(our_states(denoiser("v"), x_t, grid, [], "euler"), expected)


def test_ddim_with_eta_one_is_ddpm():
    (x0_hat, x_t), noises = start(1)[1].expand(2, -1, -1, -1, -1), start(2)[1]
    x0_hat = x0_hat.flip(0)
    for t in (-math.inf, -4.0):
        for s in (-3.0, 2.0, math.inf):
            levels = torch.tensor([t, s], **DOUBLE)
            a = ddpm(x0_hat, x_t, *levels, noise=lambda: noises[1])
            b = ddim(x0_hat, x_t, *levels, noise=lambda: noises[1], eta=1.0)
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_level_for_all_equals_a_level_for_each(sampler):
    """A denoiser that is given one 0-d level does what one does that is given it for each item."""
    x_t, noises = start(10)
    grid = Schedule("cosine", 1000).sampling_grid(10)
    data = GaussianMixture(torch.randn(3, *EVENT, **DOUBLE), 0.3)

    def for_each(x_t, log_snr):
        assert log_snr.ndim == 0
        return data.denoise(x_t, log_snr.expand(len(x_t)))

    one = our_states(data.denoise, x_t, grid, noises, sampler)
    compare(one, our_states(for_each, x_t, grid, noises, sampler), tolerance=1e-10)


# ---- a mixture of Gaussians: E[x0 | x_t] in closed form ----

MIXTURE = GaussianMixture(
    torch.tensor([[-1.2, 0.4], [0.9, 0.8], [0.3, -1.1]], **DOUBLE),
    sd=0.35,
    weights=torch.tensor([0.5, 0.3, 0.2], **DOUBLE),
)


@functools.lru_cache(maxsize=1)
def real_items():
    return MIXTURE.sample(100_000)


def nearest_component(x0):
    """Return the component (B,) that each item is nearest to, and their frequencies (K,)."""
    nearest = torch.cdist(x0, MIXTURE.means).argmin(dim=1)
    return nearest, torch.bincount(nearest, minlength=3) / len(x0)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [*((s, {}) for s in SAMPLERS), ("ddim", {"eta": 0.5}), ("heun", {"s_churn": 40.0})],
)
def test_sampler_reaches_the_mixture(sampler, options):
    noise = noise_source(5000, 2)
    steps = 300 if sampler in ("ddpm", "ddpm_large") else 100
    spacing = "karras" if sampler == "heun" else "log_snr"
    grid = Schedule("cosine", 1000).sampling_grid(steps, spacing)
    x0 = last_state(sample_loop(MIXTURE.denoise, noise(), grid, sampler, noise, **options))
    torch.testing.assert_close(x0.mean(dim=0), MIXTURE.mean(), rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x0.T), MIXTURE.covariance(), rtol=0, atol=0.05)
    nearest, frequency = nearest_component(x0)
    real_nearest, real_frequency = nearest_component(real_items())
    torch.testing.assert_close(frequency, real_frequency, rtol=0, atol=0.02)
    width = (x0 - MIXTURE.means[nearest]).square().mean()
    real_width = (real_items() - MIXTURE.means[real_nearest]).square().mean()
    assert abs(width / real_width - 1) < 0.05


@functools.lru_cache(maxsize=1)
def exact_flow():
    """Return x at log_snr = -5 and at 5, joined by the probability-flow ODE, (64, 2) each.

    dx/dlog_snr = alpha (x0_hat - alpha x) / 2, by 1000 classical Runge-Kutta steps."""
    x_t = noise_source(64, 2)()

    def slope(x, log_snr):
        alpha, _ = alpha_sigma(log_snr, x)
        return 0.5 * alpha * (MIXTURE.denoise(x, log_snr) - alpha * x)

    grid = torch.linspace(-5, 5, 1001, **DOUBLE)
    h = grid[1] - grid[0]
    x = x_t
    for log_snr in grid[:-1]:
        k1 = slope(x, log_snr)
        k2 = slope(x + h / 2 * k1, log_snr + h / 2)
        k3 = slope(x + h / 2 * k2, log_snr + h / 2)
        k4 = slope(x + h * k3, log_snr + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x_t, x


@pytest.mark.parametrize(
    ("sampler", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3), ("ipndm", 2)],
)
def test_solver_converges_at_its_order(sampler, order):
    """UniPC's corrector adds one to the order 2 of its predictor (Zhao et al. 2023, thm. 3.1)."""
    x_t, exact = exact_flow()
    errors = []
    for steps in (128, 512):
        grid = torch.linspace(-5, 5, steps + 1, **DOUBLE)  # ends short of clean
        x = last_state(sample_loop(MIXTURE.denoise, x_t, grid, sampler))
        errors.append((x - exact).square().mean().sqrt())
    slope = math.log(errors[0] / errors[1]) / math.log(512 / 128)
    assert abs(slope - order) < 0.2, slope


@pytest.mark.parametrize("past", [0, 1, 2, 3])
def test_ipndm_step_has_the_order_of_its_past_where_steps_are_even_in_sigma(past):
    """Of a Gaussian x / alpha = mean + c sqrt(sd^2 + (sigma / alpha)^2), exactly.

    From exact states the error of one step falls with the power past + 2."""
    data = Gaussian(0.3, 0.5, (3,))
    c = torch.tensor([[-1.0, 0.5, 2.0]], **DOUBLE)
    errors = []
    for length in (0.02, 0.01):
        ratio = 1.0 + length * torch.arange(past, -2, -1, **DOUBLE)  # sigma / alpha of the levels
        levels = -2 * ratio.log()
        past_and_now = []
        for level, r in zip(levels, ratio, strict=True):
            x = alpha_sigma(level, c)[0] * (0.3 + c * (0.5**2 + r**2).sqrt())
            past_and_now.append((level, x, data.denoise(x, level)))
        *history, (log_snr_t, x_t, x0_hat), (log_snr_s, exact, _) = past_and_now
        x_s = ipndm(x0_hat, x_t, log_snr_t, log_snr_s, history=history)
        errors.append((x_s - exact).norm())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(past + 2, abs=0.2)


def test_noise_is_added_again_where_the_levels_fall():
    """What RePaint's jumps need: up and down again is the same distribution."""
    noise = noise_source(8000, 2)
    grid = Schedule("cosine", 1000).sampling_grid(100)
    path = torch.cat([grid[:60], grid[40:60], grid[40:]])
    states = list(sample_loop(MIXTURE.denoise, noise(), path, "ddpm", noise))
    assert len(states) == 100 + 38
    x0 = states[-1][1]
    torch.testing.assert_close(x0.mean(dim=0), MIXTURE.mean(), rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x0.T), MIXTURE.covariance(), rtol=0, atol=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_multistep_samplers_start_anew_where_the_levels_fall(sampler):
    grid = Schedule("cosine", 1000).sampling_grid(8)
    path = torch.cat([grid[:6], grid[2:]])
    x_t, noises = start(20)
    whole = our_states(denoiser("v"), x_t, path, noises, sampler)
    drawn = 5 if SAMPLERS[sampler].stochastic else 0  # noises, on the way up to grid[5]
    mean, variance = q_step(whole[4], grid[5], grid[2])
    x_t = mean + variance.sqrt() * noises[drawn]
    expected = our_states(denoiser("v"), x_t, grid[2:], noises[drawn + 1 :], sampler)
    compare(whole[5:], expected, tolerance=0)


# ---- guidance and thresholding ----


@pytest.fixture
def strong_and_weak():
    """Return the estimates of two denoisers, x_t and a level."""
    strong, weak, x_t = start(3)[1].unbind()
    return strong, weak, x_t, torch.tensor(0.7, **DOUBLE)


def test_guidance_of_x0_is_guidance_of_eps(strong_and_weak):
    """Ho & Salimans 2022, eq. 6: (1 + w) eps(c) - w eps."""
    strong, weak, x_t, log_snr = strong_and_weak
    alpha, sigma = alpha_sigma(log_snr, x_t)
    eps = (x_t - alpha * strong) / sigma
    eps_weak = (x_t - alpha * weak) / sigma
    eps_guided = (1 + 1.5) * eps - 1.5 * eps_weak
    x0_hat = guide_x0(strong, weak, 2.5)
    torch.testing.assert_close(x0_hat, (x_t - sigma * eps_guided) / alpha)


def test_guidance_of_zero_is_the_weak_network(strong_and_weak):
    strong, weak, _, _ = strong_and_weak
    assert torch.equal(guide_x0(strong, weak, 0.0), weak)


def test_guidance_of_one_is_none(strong_and_weak):
    strong, weak, _, _ = strong_and_weak
    torch.testing.assert_close(guide_x0(strong, weak, 1.0), strong)


def test_weak_network_is_asked_only_within_the_interval(strong_and_weak):
    strong, _, x_t, log_snr = strong_and_weak

    class Model:
        def denoise(self, x_t, log_snr, label=None):
            assert label is not None, "the weak network was asked"
            return strong

    for interval in ((1.0, 2.0), (-2.0, 0.5)):
        denoise = make_denoiser(Model(), "label", "none", 3.0, interval)
        assert torch.equal(denoise(x_t, log_snr), strong)
    with pytest.raises(AssertionError, match="weak"):
        make_denoiser(Model(), "label", "none", 3.0, (0.0, math.inf))(x_t, log_snr)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_guidance_rescale_is_that_of_its_paper(strong_and_weak, rescale):
    """Lin et al. 2024, section 3.4, as in their pseudocode."""
    pos, neg, _, _ = strong_and_weak
    cfg = neg + 4.0 * (pos - neg)
    std_pos = pos.std([1, 2, 3], keepdim=True)
    std_cfg = cfg.std([1, 2, 3], keepdim=True)
    factor = rescale * (std_pos / std_cfg) + (1 - rescale)
    torch.testing.assert_close(guide_x0(pos, neg, 4.0, rescale), cfg * factor)


def test_make_denoiser_guides_by_the_null_label_or_by_a_guide():
    x_t = noise_source(6, 2)()
    log_snr = torch.tensor(-1.0, **DOUBLE)
    label = torch.arange(6) % 3
    model = OracleModel(MIXTURE, Schedule(), num_classes=3, has_null_label=True)
    guide = OracleModel(GaussianMixture(MIXTURE.means.flip(0), 0.9), Schedule(), num_classes=3)
    with_label = MIXTURE.denoise(x_t, log_snr, label)
    without_label = MIXTURE.denoise(x_t, log_snr)
    by_guide = guide.denoise(x_t, log_snr, label)

    plain = make_denoiser(model, label, "none")
    assert torch.equal(plain(x_t, log_snr), with_label)
    cfg = make_denoiser(model, label, "none", cfg_scale=3.0)
    expected = without_label + 3.0 * (with_label - without_label)
    torch.testing.assert_close(cfg(x_t, log_snr), expected)
    autoguidance = make_denoiser(model, label, "none", cfg_scale=3.0, guide=guide)
    torch.testing.assert_close(autoguidance(x_t, log_snr), by_guide + 3.0 * (with_label - by_guide))
    clipped = make_denoiser(model, label, "static", cfg_scale=3.0)
    torch.testing.assert_close(clipped(x_t, log_snr), expected.clamp(-1, 1))
    outside = make_denoiser(model, label, "none", cfg_scale=3.0, guidance_interval=(0.0, 5.0))
    assert torch.equal(outside(x_t, log_snr), with_label)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_clip_dynamic_is_that_of_diffusers(scale):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, sample_max_value=1e9)
    x0_hat = scale * torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clip_dynamic(x0_hat), scheduler._threshold_sample(x0_hat))
    assert clip_dynamic(x0_hat).abs().max() <= 1


def test_thresholds_do_what_they_are_called():
    x0_hat = torch.tensor([[-3.0, 0.5, 2.0]])
    assert THRESHOLDS["static"](x0_hat).tolist() == [[-1.0, 0.5, 1.0]]
    assert THRESHOLDS["none"](x0_hat) is x0_hat
    assert THRESHOLDS["dynamic"] is clip_dynamic


# ---- sample: a function of (seed, index) ----


class Elementwise(nn.Module):
    """A network without matrix products, so that no kernel depends on the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, 0.05]))

    def fold_for_inference(self, dtype):
        self.to(dtype)

    def forward(self, x_t, log_snr, label=None):
        level = log_snr.clamp(-20, 20).reshape(-1, *[1] * (x_t.ndim - 1))
        x_t = x_t.to(self.weight.dtype)
        return torch.tanh(self.weight[0] * x_t + self.weight[1] * level.to(x_t))


NUMBERS = torch.arange(20)
SUBSETS = (NUMBERS[:1], NUMBERS[7:8], NUMBERS[3:14], NUMBERS.flip(0), NUMBERS[::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("event", [(2,), (1, 5, 3)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_does_not_depend_on_its_batch(sampler, event, dtype):
    """Bit for bit, as far as the kernels of PyTorch do not; for those see below."""
    model = DiffusionModel(Schedule(), Elementwise(), "v", event).for_inference(dtype)
    options = {"sampler": sampler, "steps": 6}
    if SAMPLERS[sampler].churn:
        options["s_churn"] = 2.0
    if SAMPLERS[sampler].eta:
        options["eta"] = 0.7
    whole = sample(model, NUMBERS, 3, **options)
    for numbers in SUBSETS:
        assert torch.equal(sample(model, numbers, 3, **options), whole[numbers])


@functools.lru_cache(maxsize=2)
def trained_model(event):
    trainer = tiny_trainer(random_points(classes=3, event=event), init="default", class_cond=True)
    trainer.train_step(0.0)
    return trainer.recalibrated_ema()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("sampler", ["unipc", "ddpm"])
@pytest.mark.parametrize("event", [(1, 8, 8), (2,)])
def test_sample_of_a_network_does_not_depend_on_its_batch(event, sampler, dtype, tolerance):
    """Up to rounding: of matrix products and convolutions PyTorch chooses kernels by the batch."""
    model = trained_model(event).for_inference(dtype)
    options = {"sampler": sampler, "steps": 6, "threshold": "none"}
    whole = sample(model, NUMBERS, 3, cycle_labels(model, NUMBERS), **options)
    for numbers in SUBSETS:
        part = sample(model, numbers, 3, cycle_labels(model, numbers), **options)
        assert (part - whole[numbers]).abs().max() < tolerance * whole.abs().max()


def test_sample_is_a_function_of_the_seed_and_the_number():
    model = OracleModel(MIXTURE, Schedule())
    for sampler in ("unipc", *STOCHASTIC):
        x0 = sample(model, NUMBERS, 3, sampler=sampler, steps=5)
        assert torch.equal(x0, sample(model, NUMBERS, 3, sampler=sampler, steps=5))
        other = sample(model, NUMBERS, 4, sampler=sampler, steps=5)
        assert not torch.isclose(x0, other).all(dim=1).any()
        assert not torch.isclose(x0[1:], x0[:-1]).all(dim=1).any()


def test_sampler_noise_is_new_at_every_step(monkeypatch):
    noises = []

    def collect(x0_hat, x_t, log_snr_t, log_snr_s, *, noise, **_):
        noises.append(noise())
        return x_t

    monkeypatch.setitem(SAMPLERS, "collect", Sampler(collect, stochastic=True))
    sample(OracleModel(MIXTURE, Schedule()), NUMBERS[5:], 3, sampler="collect", steps=4)
    expected = [normal(3, "sampler_noise", k, NUMBERS[5:], (2,)) for k in range(4)]
    assert torch.equal(torch.stack(noises), torch.stack(expected))
    assert len(set(torch.stack(noises).flatten().tolist())) == 4 * 15 * 2


def test_sample_is_the_last_state_of_the_trajectory():
    model = OracleModel(MIXTURE, Schedule())
    states = list(sample_trajectory(model, NUMBERS, 3, steps=7))
    assert len(states) == 7
    assert [x_t.shape for _, x_t, _ in states] == [(20, 2)] * 7
    log_snr, x_t, x0_hat = states[-1]
    assert log_snr == math.inf
    torch.testing.assert_close(x_t, x0_hat)
    assert torch.equal(sample(model, NUMBERS, 3, steps=7), x_t)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_knows_the_samplers_defaults(sampler):
    model = OracleModel(MIXTURE, Schedule())
    record = SAMPLERS[sampler]
    plain = sample(model, NUMBERS, sampler=sampler)
    said = sample(model, NUMBERS, sampler=sampler, steps=record.steps, spacing=record.spacing)
    assert torch.equal(plain, said)
    assert default_steps(sampler, Schedule("cosine", 7)) == 7
    assert default_steps(sampler, Schedule("cosine", 0)) == record.steps


def test_sample_clips_images_by_default_and_points_not():
    far = torch.full((1, 1, 4, 4), 3.0)
    images = OracleModel(GaussianMixture(far, 0.1), Schedule())
    points = OracleModel(GaussianMixture(far.reshape(1, 16), 0.1), Schedule())
    assert sample(images, NUMBERS).max() <= 1
    assert sample(points, NUMBERS).mean() > 2
    assert sample(images, NUMBERS, threshold="none").mean() > 2


def test_sample_starts_from_x_t_and_follows_the_grid():
    model = OracleModel(MIXTURE, Schedule())
    grid = Schedule().sampling_grid(20)[8:]
    x_t = MIXTURE.sample(20).float()
    seen = []

    def project(x_s, log_snr_s):
        seen.append(log_snr_s)
        return x_s

    x0 = sample(model, NUMBERS, x_t=x_t, grid=grid, sampler="ddim", project=project)
    assert seen == list(grid[1:])
    loop = sample_loop(MIXTURE.denoise, x_t, grid, "ddim")
    assert torch.equal(x0, last_state(loop))


def test_churn_is_as_strong_in_each_step_of_a_shorter_grid():
    """An edit takes the last of `steps` levels; its noise is that of those steps in a whole run."""
    model = OracleModel(MIXTURE, Schedule())
    grid = Schedule().sampling_grid(20, "karras")
    x_t = MIXTURE.sample(20).float()
    one = sample(model, NUMBERS, x_t=x_t, grid=grid[10:], sampler="euler", steps=20, s_churn=4.0)
    other = sample(model, NUMBERS, x_t=x_t, grid=grid[10:], sampler="euler", steps=10, s_churn=2.0)
    assert torch.equal(one, other)


def test_sample_that_is_not_finite_is_an_error():
    model = OracleModel(Gaussian(math.inf), Schedule())
    with pytest.raises(FloatingPointError, match="infinite"):
        sample(model, NUMBERS)


def test_cycle_labels_takes_all_classes_in_turn():
    model = OracleModel(MIXTURE, Schedule(), num_classes=3)
    assert cycle_labels(model, NUMBERS[:5]).tolist() == [0, 1, 2, 0, 1]
    assert cycle_labels(model, NUMBERS[4:7]).tolist() == [1, 2, 0]
    assert cycle_labels(model, NUMBERS[:4], [2, 1]).tolist() == [2, 1, 2, 1]
    assert cycle_labels(OracleModel(MIXTURE, Schedule()), NUMBERS) is None


def test_sample_of_a_class_is_of_its_component():
    model = OracleModel(MIXTURE, Schedule(), num_classes=3, has_null_label=True)
    numbers = torch.arange(300)
    label = cycle_labels(model, numbers)
    x0 = sample(model, numbers, label=label, steps=50)
    means = MIXTURE.means.float()
    offset = (x0 - means[label]).norm(dim=1)
    assert offset.mean() < 0.6  # of a component's standard deviation, 0.35 in each of two
    assert (nearest_component(x0.double())[0] == label).float().mean() > 0.95
