"""Schedules against their formulas, their limits and diffusers."""

import math

import pytest
import torch

from ddp.schedule import BINS, SCHEDULES, SPACINGS, Schedule, betas

FIXED = [name for name in SCHEDULES if name != "learned"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000, 4000])
def test_table_is_a_process(name, timesteps):
    table = betas(name, timesteps)
    assert table.shape == (timesteps,)
    assert ((table > 0) & (table < 1)).all()
    log_snr = Schedule(name, timesteps).table
    assert log_snr.isfinite().all()
    assert (log_snr.diff() < 0).all()


@pytest.mark.parametrize(
    ("ours", "theirs", "ends"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
    ],
)
def test_betas_are_those_of_diffusers(ours, theirs, ends):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, *ends, beta_schedule=theirs)
    torch.testing.assert_close(betas(ours, 1000).float(), scheduler.betas, rtol=1e-5, atol=1e-9)
    alpha2 = torch.sigmoid(Schedule(ours, 1000).table).float()
    torch.testing.assert_close(alpha2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_a_zero_terminal_table_is_that_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    theirs = {"cosine": "squaredcos_cap_v2"}.get(name, name)
    ends = (0.00085, 0.012) if name == "scaled_linear" else (1e-4, 0.02)
    scheduler = diffusers.DDIMScheduler(
        1000, *ends, beta_schedule=theirs, rescale_betas_zero_snr=True
    )
    table = Schedule(name, 1000, zero_terminal=True).table
    assert table[-1] == -math.inf
    assert table[:-1].isfinite().all()
    alpha2 = torch.sigmoid(table).float()
    torch.testing.assert_close(alpha2, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_the_published_formulas():
    """EDM's sigmas, and the rectified flow's line, in their own terms."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = torch.exp(-Schedule("karras", 0).log_snr(t) / 2)
    i = 1 - (1e-3 + 0.998 * t)  # their i / (N - 1), which runs from noise
    theirs = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma, theirs)
    log_snr = Schedule("flow", 0).log_snr(t)
    inner = 1e-3 + 0.998 * t
    ratio = torch.exp(-log_snr / 2)
    torch.testing.assert_close(ratio / (1 + ratio), inner)


def test_shift_is_that_of_stable_diffusion_3():
    """t' = s t / (1 + (s - 1) t) on a rectified flow: Esser et al. 2024, eq. 23."""
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    shifted = 3 * t / (1 + 2 * t)
    ours = Schedule("flow", 0, shift=3.0).log_snr((t - 1e-3) / 0.998)
    torch.testing.assert_close(ours, 2 * torch.log((1 - shifted) / shifted))
    tables = [Schedule("cosine", 100, shift=s).table for s in (1.0, 2.0)]
    torch.testing.assert_close(tables[0] - tables[1], torch.full((100,), 2 * math.log(2)).double())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, 50])
def test_slope(name, timesteps):
    if name == "learned" and timesteps:
        return
    schedule, t = Schedule(name, timesteps), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    if timesteps:
        snr, step = schedule.table.exp(), (t * timesteps).long()
        expected = timesteps * (snr[step - 1] / snr[step] - 1)
        assert schedule.slope(torch.zeros(1)).item() == timesteps
    else:
        expected = (schedule.log_snr(t - 1e-4) - schedule.log_snr(t + 1e-4)) / 2e-4
    torch.testing.assert_close(schedule.slope(t), expected, rtol=1e-3, atol=1e-3, check_dtype=False)


def test_the_learned_schedule_is_monotone_between_its_ends():
    schedule = Schedule("learned", 0)
    network = schedule.network
    with torch.no_grad():
        network.weight.copy_(2 * torch.randn(34, generator=torch.Generator().manual_seed(0)))
        network.ends.copy_(torch.tensor([9.5, -6.5]))
    log_snr = schedule.log_snr(torch.linspace(0, 1, 1001))
    assert (log_snr.diff() < 0).all()
    assert log_snr[0].item() == pytest.approx(9.5, abs=1e-5)
    assert log_snr[-1].item() == pytest.approx(-6.5, abs=1e-5)
    with pytest.raises(ValueError, match="continuous"):
        Schedule("learned", 10)


@pytest.mark.parametrize("name", FIXED)
def test_a_long_table_approaches_continuous_time(name):
    continuous = Schedule(name, 0)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    # step i of T stands at t = (i + 1) / T; continuous time has a margin at both ends
    table = Schedule(name, 20000).table
    stretched = 1e-3 + (1 - 2e-3) * t
    index = (stretched * 20000).round().long() - 1
    torch.testing.assert_close(continuous.log_snr(t), table[index], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, 1000])
def test_levels_are_stratified(name, timesteps):
    schedule = Schedule(name, 0 if name == "learned" else timesteps)
    levels, weight = schedule.levels(torch.rand(64, generator=torch.Generator().manual_seed(0)))
    assert levels.dtype == torch.float32
    assert (weight == 1).all()
    edges = schedule.log_snr(torch.arange(65) / 64)
    assert (levels <= edges[:-1] + 1e-4).all()
    assert (levels >= edges[1:] - 1e-4).all()


def test_every_discrete_step_is_trained():
    schedule = Schedule("cosine", 10)
    assert set(schedule.levels(torch.zeros(1000))[0].tolist()) == set(
        schedule.table.float().tolist()
    )
    assert schedule.log_snr(1.0) == schedule.table[-1]


def draws(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("timesteps", [0, 1000])
def test_log_normal_levels_are_edms(timesteps):
    levels, weight = Schedule("karras", timesteps, sampling="log_normal").levels(draws(20000))
    ln_sigma = -levels / 2
    assert ln_sigma.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert ln_sigma.std().item() == pytest.approx(1.2, abs=0.02)
    clean, noisy = (Schedule("karras", timesteps).log_snr(t) for t in (0.0, 1.0))
    assert (levels <= clean + 1e-4).all()
    assert (levels >= noisy - 1e-4).all()
    assert (weight == 1).all()


@pytest.mark.parametrize("timesteps", [0, 1000])
def test_normal_levels_are_normal_but_for_a_share_that_is_spread_over_t(timesteps):
    """Their distribution function, against that of the two shares that they are made of."""
    levels, weight = Schedule("cosine", timesteps, sampling="normal").levels(draws(20000))
    spread, _ = Schedule("cosine", timesteps).levels(draws(20000))
    for level in range(-9, 10):
        below = torch.special.ndtr(torch.tensor((level + 1.0) / 2.4)).item()
        expected = 31 / 32 * below + (spread <= level).float().mean().item() / 32
        assert (levels <= level).float().mean().item() == pytest.approx(expected, abs=0.01), level
    assert (weight == 1).all()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_normal_levels_of_small_batches_are_normal_too(size):
    schedule = Schedule("cosine", 0, sampling="normal")
    levels = torch.cat([schedule.levels(draws(size, step))[0] for step in range(4000 // size)])
    below = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0])) * 31 / 32
    spread, _ = Schedule("cosine", 0).levels(draws(20000))
    for level, share in zip((-3.4, -1.0, 1.4), below.tolist(), strict=True):
        expected = share + (spread <= level).float().mean().item() / 32
        assert (levels <= level).float().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("sampling", ["normal", "log_normal"])
def test_normal_levels_are_shifted_as_the_schedule_is(sampling):
    levels, _ = Schedule("cosine", 0, sampling=sampling).levels(draws(20000))
    shifted, _ = Schedule("cosine", 0, shift=3.0, sampling=sampling).levels(draws(20000))
    assert torch.allclose(shifted, levels - 2 * math.log(3), atol=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_normal_levels_leave_no_level_out(schedule):
    """Sampling starts at the last level, which may be far from where the normal ones lie."""
    schedule = Schedule(schedule, 1000, sampling="normal")
    levels = torch.cat([schedule.levels(draws(128, step))[0] for step in range(200)])
    assert levels.min() == schedule.table[-1].float()
    assert levels.max() == schedule.table[0].float()


@pytest.mark.parametrize("timesteps", [0, 10, 1000])
@pytest.mark.parametrize("sampling", ["uniform", "stratified", "importance"])
@pytest.mark.parametrize("per_log_snr", [False, True])
def test_every_sampling_of_levels_estimates_the_same_mean(timesteps, sampling, per_log_snr):
    """A known function of log_snr, against its mean over t, or its integral over log_snr."""
    schedule = Schedule("cosine", timesteps, sampling=sampling)
    if sampling == "importance":
        schedule.squares.copy_(torch.linspace(0.1, 3, len(schedule.squares)) ** 2)

    def loss(log_snr):
        return torch.exp(-(log_snr.double() ** 2) / 8)

    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    exact = loss(schedule.log_snr(t)) * (schedule.slope(t) if per_log_snr else 1)
    log_snr, weight = schedule.levels(draws(50_000), per_log_snr)
    estimate = weight * loss(log_snr)
    error = estimate.std() / math.sqrt(len(estimate))
    assert abs(estimate.mean() - exact.mean()) < 4 * error
    if per_log_snr and not timesteps:
        torch.testing.assert_close(exact.mean().item(), math.sqrt(8 * math.pi), rtol=1e-3, atol=0)


@pytest.mark.parametrize("timesteps", [0, 10, 1000])
def test_importance_sampling_learns_where_the_loss_is(timesteps):
    schedule = Schedule("cosine", timesteps, sampling="importance")
    assert len(schedule.squares) == (timesteps if timesteps == 10 else BINS)
    variances = []
    for step in range(100):
        log_snr, weight = schedule.levels(draws(256, step))
        estimates = weight * torch.exp(log_snr / 2)
        variances.append(estimates.var().item())
        schedule.observe(log_snr, estimates)
    assert sum(variances[-20:]) / 20 < 0.2 * sum(variances[:2]) / 2
    assert schedule.shares().argmax() == 0
    assert schedule.shares().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("timesteps", [0, 1, 12])
def test_every_grid_rises_to_the_clean_level(spacing, name, timesteps):
    schedule = Schedule(name, timesteps)
    noisy, clean = (schedule.log_snr(t).item() for t in (1.0, 0.0))
    for steps in range(1, 13 if timesteps != 1 else 2):
        grid = schedule.grid(steps, spacing)
        assert len(grid) == steps + 1
        assert (grid.diff() > 0).all()
        assert grid[-1] == math.inf
        started = noisy if spacing in ("trailing", "uniform") else max(noisy, -2 * math.log(80))
        assert grid[0].item() == pytest.approx(started)
        if steps > 1 and spacing != "trailing":
            assert grid[-2].item() == pytest.approx(clean)


@pytest.mark.parametrize("timesteps", [1, 7, 10, 1000])
def test_grid_starts_at_pure_noise_and_ends_clean(timesteps):
    schedule = Schedule("linear", timesteps)
    for steps in {1, 2, 3, min(7, timesteps), timesteps - 1, timesteps} - {0}:
        if steps > timesteps:
            continue
        grid = schedule.grid(steps)
        assert len(grid) == steps + 1
        assert grid[0] == schedule.table[-1]
        assert grid[-1] == math.inf
        assert (grid.diff() > 0).all()
    assert schedule.grid(timesteps)[:-1].tolist() == schedule.table.flip(0).tolist()


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_grid_refuses(steps):
    with pytest.raises(ValueError, match=rf"--steps {steps}"):
        Schedule("cosine", 10).grid(steps)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_t_may_have_any_shape(name, shape):
    for timesteps in (0, 10):
        if name != "learned" or not timesteps:
            assert Schedule(name, timesteps).log_snr(torch.full(shape, 0.5)).shape == shape


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"'cubic'.*cosine"):
        Schedule("cubic")
    with pytest.raises(ValueError, match="-1"):
        Schedule("cosine", -1)
