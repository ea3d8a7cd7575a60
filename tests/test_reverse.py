"""Samplers against diffusers and EDM's code step by step, against oracles, and against a mixture of
Gaussians whose denoiser is known."""

import math

import pytest
import torch

from ddp import reverse
from ddp.forward import alpha_sigma
from ddp.model import PREDICTIONS
from ddp.schedule import SPACINGS, Schedule

EVENT = (3, 4, 5)
DOUBLE = {"dtype": torch.float64}


def oracle(x0):
    return lambda xt, log_snr: x0


@pytest.mark.parametrize("sampler", reverse.SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps", [0, 20, "zero terminal"])
def test_an_oracle_gives_x0_back_at_every_step_count(sampler, spacing, timesteps):
    torch.manual_seed(0)
    x0, xt = torch.randn(2, 2, *EVENT)
    zero = timesteps == "zero terminal"
    schedule = Schedule("cosine", 20 if zero else timesteps, zero_terminal=zero)
    for steps in range(1, 21):
        grid = schedule.grid(steps, spacing)
        states = list(reverse.sample(oracle(x0), xt, grid, sampler, lambda: torch.randn_like(xt)))
        assert len(states) == steps
        torch.testing.assert_close(states[-1][1], x0, rtol=1e-5, atol=1e-5)
        assert states[-1][0] == math.inf


@pytest.mark.parametrize("sampler", reverse.SAMPLERS)
def test_an_oracle_gives_x0_back_in_a_thousand_steps(sampler):
    torch.manual_seed(0)
    x0, xt = torch.randn(2, 2, *EVENT)
    for steps in (999, 1000):
        grid = Schedule("linear", 1000).grid(steps)
        states = reverse.sample(oracle(x0), xt, grid, sampler, lambda: torch.randn_like(xt))
        torch.testing.assert_close(reverse.final(states), x0, rtol=1e-5, atol=1e-5)


# Step by step against other implementations, which are fed the same network, noise and levels.


def network(xt, log_snr):
    """A fixed nonlinear stand-in for a reverse network: its output."""
    return torch.tanh(xt * 0.8 + log_snr.clamp(-20, 20).reshape(-1, 1, 1, 1) / 20) * 0.9


def denoiser(predict):
    def denoise(xt, log_snr):
        c_skip, c_out = PREDICTIONS[predict](*alpha_sigma(log_snr, xt))
        return c_skip * xt + c_out * network(xt, log_snr)

    return denoise


def table_of(schedule, finite=False):
    """log_snr of 1000 steps. finite: a last level that diffusers' solvers, too, can take."""
    name = "linear" if schedule == "zero" else schedule
    table = Schedule(name, 1000, zero_terminal=schedule == "zero").table.clone()
    if finite and schedule == "zero":
        table[-1] = -30.0
    return table


def trailing(table, steps):
    """Levels at the steps that diffusers calls trailing, up to the clean one."""
    index = (torch.arange(steps, 0, -1, **DOUBLE) * (len(table) / steps)).round().long() - 1
    return torch.cat([table[index], torch.tensor([math.inf], **DOUBLE)])


THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2", "zero": "linear"}
CASES = [
    (schedule, predict, steps)
    for schedule in THEIR_SCHEDULE
    for predict in THEIR_PREDICTION
    for steps in (5, 20, 1000)
    if (schedule, predict) != ("zero", "eps")  # noise alone says nothing of x0
]


def common(schedule, predict, **options):
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": THEIR_SCHEDULE[schedule],
        "prediction_type": THEIR_PREDICTION[predict],
        "timestep_spacing": "trailing",
        **options,
    }


def start(steps):
    torch.manual_seed(0)
    return torch.randn(2, *EVENT, **DOUBLE), torch.randn(steps, 2, *EVENT, **DOUBLE)


def ours(denoise, xt, grid, noises, sampler, **options):
    draws = iter(noises)
    states = reverse.sample(denoise, xt, grid, sampler, lambda: next(draws), **options)
    return [state[1] for state in states]


def theirs(scheduler, table, grid, xt, noises, monkeypatch, **options):
    """The states of a diffusers scheduler whose levels are made exactly ours, in float64."""
    scheduler.alphas_cumprod = torch.sigmoid(table)
    scheduler.betas, scheduler.one = scheduler.betas.double(), torch.tensor(1.0, **DOUBLE)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, **DOUBLE)
    scheduler.set_timesteps(len(grid) - 1)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.exp(-grid / 2)
    draws, states = iter(noises), []
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: next(draws), raising=False)
    for log_snr, t in zip(grid, scheduler.timesteps, strict=False):
        xt = scheduler.step(network(xt, log_snr.expand(len(xt))), t, xt, **options).prev_sample
        states.append(xt)
    return states


def compare(states, expected, tolerance=1e-6):
    assert len(states) == len(expected)
    for state, their_state in zip(states, expected, strict=True):
        torch.testing.assert_close(state, their_state.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("schedule", "predict", "steps"), CASES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_large", "ddim-0", "ddim-0.5", "ddim-1"])
def test_ddpm_and_ddim_are_those_of_diffusers(schedule, predict, steps, sampler, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    xt, noises = start(steps)
    # with fixed_large diffusers adds noise even on its last step, unless that is at t = 0
    noises[-1] = 0
    options, our_options = {}, {}
    shared = common(schedule, predict, clip_sample=True)
    if sampler.startswith("ddpm"):
        variance = {"ddpm": "fixed_small", "ddpm_large": "fixed_large"}[sampler]
        scheduler = diffusers.DDPMScheduler(variance_type=variance, **shared)
    else:
        sampler, eta = sampler.split("-")
        scheduler = diffusers.DDIMScheduler(**shared)
        # diffusers keeps the network's eps unless told that clipping changed it
        our_options = {"eta": float(eta)}
        options = {"use_clipped_model_output": True, **our_options}
    table = table_of(schedule)
    grid = trailing(table, steps)
    denoise = reverse.clipped(denoiser(predict), "static")
    states = ours(denoise, xt, grid, noises, sampler, **our_options)
    compare(states, theirs(scheduler, table, grid, xt, noises, monkeypatch, **options))


@pytest.mark.parametrize(("schedule", "predict", "steps"), CASES)
@pytest.mark.parametrize("sampler", ["dpm++", "dpm++sde", "unipc"])
def test_solvers_are_those_of_diffusers(schedule, predict, steps, sampler, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    xt, noises = start(steps)
    shared = common(schedule, predict, solver_order=2, final_sigmas_type="zero")
    if sampler == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(solver_type="bh2", **shared)
    else:
        kind = {"dpm++": "dpmsolver++", "dpm++sde": "sde-dpmsolver++"}[sampler]
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type=kind, solver_type="midpoint", lower_order_final=True, **shared
        )
    table = table_of(schedule, finite=True)
    grid = trailing(table, steps)
    states = ours(denoiser(predict), xt, grid, noises, sampler)
    # diffusers rounds the state to float32 at every step
    compare(states, theirs(scheduler, table, grid, xt, noises, monkeypatch), tolerance=1e-5)


@pytest.mark.parametrize(("schedule", "predict", "steps"), CASES)
def test_heun_is_that_of_diffusers(schedule, predict, steps):
    diffusers = pytest.importorskip("diffusers")
    xt, _ = start(steps)
    scheduler = diffusers.HeunDiscreteScheduler(**common(schedule, predict))
    table = table_of(schedule, finite=True)
    grid = trailing(table, steps)
    states = ours(denoiser(predict), xt, grid, [], "heun")
    scheduler.set_timesteps(steps)
    sigmas = torch.exp(-grid / 2)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    levels = torch.cat([grid[:1], grid[1:-1].repeat_interleave(2)])
    alpha, _ = alpha_sigma(grid[:1], xt)
    x, expected = xt / alpha, []
    for i, (t, log_snr) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        alpha, _ = alpha_sigma(log_snr, x)
        x = scheduler.step(network(alpha * x, log_snr.expand(len(x))), t, x).prev_sample
        if i % 2 == 1 or i == len(levels) - 1:
            after = grid[i // 2 + 1]
            expected.append(alpha_sigma(after, x)[0] * x)
    compare(states, expected, tolerance=1e-6)


def edm_sampler(denoise, x, sigmas, churn, noises):
    """EDM's sampler, line by line: Karras et al. 2022, algorithm 2 (S_noise = 1)."""
    steps, states = len(sigmas) - 1, []
    gamma = min(churn / steps, math.sqrt(2) - 1)
    for i in range(steps):
        t, t_next = sigmas[i], sigmas[i + 1]
        t_hat = t + gamma * t
        x_hat = x + (t_hat**2 - t**2).sqrt() * noises[i]
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            d_next = (x - denoise(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_next)
        states.append(x)
    return states


@pytest.mark.parametrize("predict", THEIR_PREDICTION)
@pytest.mark.parametrize("churn", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("steps", [1, 5, 20, 1000])
def test_heun_with_churn_is_edm(predict, churn, steps):
    xt, noises = start(steps)
    ramp = torch.linspace(0, 1, steps, **DOUBLE)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # their eq. 5
    schedule = Schedule("karras", 1000)
    schedule.table[0], schedule.table[-1] = -2 * math.log(0.002), -2 * math.log(80)
    grid = schedule.grid(steps, "karras")
    torch.testing.assert_close(grid[:-1], -2 * sigmas.log())
    denoise = denoiser(predict)

    def their_denoise(x, sigma):
        alpha, _ = alpha_sigma(-2 * sigma.log(), x)
        return denoise(alpha * x, (-2 * sigma.log()).expand(len(x)))

    alpha, _ = alpha_sigma(grid[:1], xt)
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    expected = edm_sampler(their_denoise, xt / alpha, sigmas, churn, noises)
    expected = [alpha_sigma(g, x)[0] * x for g, x in zip(grid[1:], expected, strict=True)]
    compare(ours(denoise, xt, grid, noises, "heun", churn=churn), expected)


@pytest.mark.parametrize("churn", [0.0, 5.0])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_is_edms_of_diffusers(churn, steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    xt, noises = start(steps)
    sigmas = scheduler.sigmas.double()
    grid = -2 * sigmas.log()
    alpha, _ = alpha_sigma(grid[:1], xt)
    x, draws, expected = (xt / alpha).float(), iter(noises), []
    module = "diffusers.schedulers.scheduling_edm_euler.randn_tensor"
    monkeypatch.setattr(module, lambda *a, **k: next(draws).float())
    denoise = denoiser("v")
    gamma = min(churn / steps, math.sqrt(2) - 1)
    for t, sigma, after in zip(scheduler.timesteps, sigmas, grid[1:], strict=False):
        # theirs asks the network before it adds noise; ours, as EDM does, after: see below
        hat = sigma * (1 + gamma)
        noise = noises[len(expected)].float()
        x_hat = x + noise * (hat**2 - sigma**2).sqrt().float() if gamma else x
        alpha, _ = alpha_sigma(-2 * hat.log(), x)
        x0_hat = denoise(alpha * x_hat.double(), (-2 * hat.log()).expand(len(x)))
        scheduler.precondition_outputs = lambda sample, output, sigma: output
        x = scheduler.step(x0_hat.float(), t, x, s_churn=churn).prev_sample
        expected.append(alpha_sigma(after, x)[0] * x.double())
    states = ours(denoise, xt, grid, noises, "euler", churn=churn)
    compare(states, expected, tolerance=3e-5)


@pytest.mark.parametrize("sampler", [s for s in reverse.SAMPLERS if s != "heun"])
def test_noise_alone_is_the_limit_of_much_noise(sampler):
    xt, noises = start(10)
    finite = torch.cat([torch.tensor([-60.0], **DOUBLE), trailing(table_of("cosine"), 9)[1:]])
    infinite = finite.clone()
    infinite[0] = -math.inf
    runs = [ours(denoiser("v"), xt, grid, noises, sampler) for grid in (finite, infinite)]
    # the multistep solvers' line through x0_hat at -60 is not quite level
    compare(*runs, tolerance=0.05 if sampler in ("dpm++", "dpm++sde", "unipc") else 1e-6)


def test_euler_is_ddim():
    xt, _ = start(1)
    grid = Schedule("linear", 1000).grid(7)
    compare(*(ours(denoiser("v"), xt, grid, [], s) for s in ("euler", "ddim")), tolerance=0)


def test_euler_is_that_of_a_rectified_flow():
    """x over t with x = (1 - t) x0 + t eps: Liu et al. 2022, eq. 1."""
    xt, _ = start(1)
    grid = Schedule("flow", 0).grid(8)
    alpha, sigma = (v.flatten() for v in alpha_sigma(grid, grid[:, None]))
    t = sigma / (alpha + sigma)
    x, expected = xt / (alpha[0] + sigma[0]), []
    for i in range(8):
        vp = x * (alpha[i] + sigma[i])
        x0_hat = denoiser("v")(vp, grid[i].expand(len(x)))
        x = x + (t[i + 1] - t[i]) * (x - x0_hat) / t[i]
        expected.append(x * (alpha[i + 1] + sigma[i + 1]))
    compare(ours(denoiser("v"), xt, grid, [], "euler"), expected)


def test_ddim_with_eta_one_is_ddpm():
    x0_hat, xt, noise = torch.randn(3, 2, *EVENT, **DOUBLE)
    for t in (-math.inf, -4.0):
        for s in (-3.0, 2.0, math.inf):
            levels = torch.tensor([t, s], **DOUBLE)
            a = reverse.ddpm(x0_hat, xt, *levels, noise=lambda: noise)
            b = reverse.ddim(x0_hat, xt, *levels, noise=lambda: noise, eta=1.0)
            torch.testing.assert_close(a, b)


# A mixture of Gaussians: E[x0 | xt] in closed form.

MEANS = torch.tensor([[-1.2, 0.4], [0.9, 0.8], [0.3, -1.1]], **DOUBLE)
WEIGHTS, SD = torch.tensor([0.5, 0.3, 0.2], **DOUBLE), 0.35


def mixture_denoiser(xt, log_snr):
    alpha, sigma = alpha_sigma(log_snr, xt)
    variance = alpha**2 * SD**2 + sigma**2
    away = xt[:, None] - alpha[..., None] * MEANS  # (B, 3, 2)
    share = torch.softmax(WEIGHTS.log() - (away**2).sum(-1) / (2 * variance), dim=1)
    means = MEANS + (alpha * SD**2 / variance)[..., None] * away
    return (share[..., None] * means).sum(dim=1)


RECIPES = [*((s, {}) for s in reverse.SAMPLERS), ("ddim", {"eta": 0.5}), ("heun", {"churn": 40.0})]


@pytest.mark.parametrize(("sampler", "options"), RECIPES)
def test_every_sampler_reaches_the_mixture(sampler, options):
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(count, 2, generator=generator, **DOUBLE)  # noqa: E731
    grid = Schedule("cosine", 1000).grid(200, "karras" if sampler == "heun" else "log_snr")
    states = reverse.sample(mixture_denoiser, draw(), grid, sampler, draw, **options)
    x0 = reverse.final(states)
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    covariance = (MEANS - mean).T @ ((MEANS - mean) * WEIGHTS[:, None]) + SD**2 * torch.eye(2)
    torch.testing.assert_close(x0.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x0.T), covariance, rtol=0, atol=0.04)
    nearest = torch.cdist(x0, MEANS).argmin(1)
    share = torch.bincount(nearest, minlength=3) / count
    truth = WEIGHTS.expand(100_000, 3).multinomial(1, generator=generator)[:, 0]
    real = MEANS[truth] + SD * torch.randn(100_000, 2, generator=generator, **DOUBLE)
    expected = torch.bincount(torch.cdist(real, MEANS).argmin(1), minlength=3) / 100_000
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)
    spread = (
        (x0 - MEANS[nearest]).square().mean(),
        (real - MEANS[torch.cdist(real, MEANS).argmin(1)]).square().mean(),
    )
    assert abs(spread[0] / spread[1] - 1) < 0.05


@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 3)]
)
def test_solvers_converge_at_their_order(sampler, order):
    """UniPC's corrector adds one to the order 2 of its predictor (Zhao et al. 2023, theorem
    3.1)."""
    xt = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), **DOUBLE)

    def end(sampler, steps):
        grid = torch.linspace(-5, 5, steps + 1, **DOUBLE)  # ends short of clean
        *_, (_, state, _) = reverse.sample(mixture_denoiser, xt, grid, sampler)
        return state

    exact = end("heun", 8192) * 4 / 3 - end("heun", 4096) / 3  # Richardson's extrapolation
    counts = [128, 256, 512]
    errors = [(end(sampler, n) - exact).square().mean().sqrt() for n in counts]
    slope = math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])
    assert abs(slope - order) < 0.2, slope


def test_noise_is_drawn_again_where_the_levels_fall():
    """What RePaint's jumps need: down and up again is the same distribution."""
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(count, 2, generator=generator, **DOUBLE)  # noqa: E731
    grid = Schedule("cosine", 1000).grid(100)
    path = torch.cat([grid[:60], grid[40:60], grid[40:]])
    states = list(reverse.sample(mixture_denoiser, draw(), path, "ddpm", draw))
    assert len(states) == 100 + 38
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    torch.testing.assert_close(states[-1][1].mean(0), mean, rtol=0, atol=0.03)
