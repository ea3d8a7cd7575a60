"""Schedules against their formulas, their limits and diffusers; grids to sample along."""

import math

import pytest
import torch

from ddp.schedule import MIN_GRID_LOG_SNR, SCHEDULES, SPACINGS, Schedule

FIXED = [name for name, entry in SCHEDULES.items() if not entry.trained]
TRAINED = [name for name, entry in SCHEDULES.items() if entry.trained]
THEIRS = {  # our name -> diffusers' beta_schedule, beta_start, beta_end
    "linear": ("linear", 1e-4, 0.02),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
}


def betas(schedule):
    """Return 1 - alpha_t^2 / alpha_(t-1)^2 of every step of a table, (T,)."""
    alpha2 = torch.sigmoid(schedule.table)
    return 1 - alpha2 / torch.cat([torch.ones(1), alpha2[:-1]])


def diffusers_schedule(name, **options):
    """Return diffusers' scheduler of that name, with 1000 steps."""
    diffusers = pytest.importorskip("diffusers")
    beta_schedule, beta_start, beta_end = THEIRS[name]
    return diffusers.DDIMScheduler(
        1000, beta_start, beta_end, beta_schedule=beta_schedule, **options
    )


# ---- the table and continuous time ----


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000, 4000])
def test_table_is_a_process(name, timesteps):
    schedule = Schedule(name, timesteps)
    assert schedule.table.shape == (timesteps,)
    assert schedule.table.dtype == torch.float64
    assert schedule.table.isfinite().all()
    assert (schedule.table.diff() < 0).all()
    assert ((betas(schedule) > 0) & (betas(schedule) < 1)).all()


@pytest.mark.parametrize("name", THEIRS)
def test_table_is_that_of_diffusers(name):
    scheduler = diffusers_schedule(name)
    schedule = Schedule(name, 1000)
    torch.testing.assert_close(betas(schedule).float(), scheduler.betas, rtol=1e-5, atol=1e-9)
    alpha2 = torch.sigmoid(schedule.table).float()
    torch.testing.assert_close(alpha2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", THEIRS)
def test_zero_terminal_table_is_that_of_diffusers(name):
    scheduler = diffusers_schedule(name, rescale_betas_zero_snr=True)
    table = Schedule(name, 1000, zero_terminal_snr=True).table
    assert table[-1] == -math.inf
    assert table[:-1].isfinite().all()
    alpha2 = torch.sigmoid(table).float()
    torch.testing.assert_close(alpha2, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("timesteps", [0, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_zero_terminal_keeps_the_cleanest_level(name, timesteps, shift):
    plain = Schedule(name, timesteps, shift)
    zero = Schedule(name, timesteps, shift, zero_terminal_snr=True)
    assert zero.log_snr(1.0) == -math.inf
    torch.testing.assert_close(zero.log_snr(0.0), plain.log_snr(0.0))


def test_karras_is_edms_formula():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = torch.exp(-Schedule("karras", 0).log_snr(t) / 2)
    i = 1 - (1e-3 + 0.998 * t)  # their i / (N - 1), which runs from noise
    theirs = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma, theirs)


def test_flow_is_a_straight_line():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    ratio = torch.exp(-Schedule("flow", 0).log_snr(t) / 2)  # sigma / alpha
    torch.testing.assert_close(ratio / (1 + ratio), 1e-3 + 0.998 * t)


def test_shift_is_that_of_stable_diffusion_3():
    """On a rectified flow t' = s t / (1 + (s - 1) t): Esser et al. 2024, eq. 23."""
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    shifted = 3 * t / (1 + 2 * t)
    ours = Schedule("flow", 0, shift=3.0).log_snr((t - 1e-3) / 0.998)
    torch.testing.assert_close(ours, 2 * torch.log((1 - shifted) / shifted))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, 100])
def test_shift_moves_every_level_alike(name, timesteps):
    if name in TRAINED and timesteps:
        return
    t = torch.linspace(0, 1, 100)
    plain = Schedule(name, timesteps).log_snr(t)
    shifted = Schedule(name, timesteps, shift=2.0).log_snr(t)
    offset = torch.full((100,), 2 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(plain - shifted, offset)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, 50])
def test_neg_dlogsnr_dt_is_the_derivative(name, timesteps):
    if name in TRAINED and timesteps:
        return
    schedule = Schedule(name, timesteps)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    if timesteps:
        snr = schedule.table.exp()
        step = (t * timesteps).long()
        expected = timesteps * (snr[step - 1] / snr[step] - 1)
        assert schedule.neg_dlogsnr_dt(torch.zeros(1)).item() == timesteps
    else:
        expected = (schedule.log_snr(t - 1e-4) - schedule.log_snr(t + 1e-4)) / 2e-4
    slope = schedule.neg_dlogsnr_dt(t)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("name", FIXED)
def test_long_table_approaches_continuous_time(name):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    # step i of T stands at t = (i + 1) / T; continuous time has a margin at both ends
    table = Schedule(name, 20_000).table
    stretched = 1e-3 + (1 - 2e-3) * t
    index = (stretched * 20_000).round().long() - 1
    continuous = Schedule(name, 0).log_snr(t)
    torch.testing.assert_close(continuous, table[index], rtol=2e-2, atol=2e-2)


def test_learned_schedule_is_monotone_between_its_ends():
    schedule = Schedule("learned", 0)
    with torch.no_grad():
        logits = torch.randn(34, generator=torch.Generator().manual_seed(0))
        schedule.network.logits.copy_(2 * logits)
        schedule.network.endpoints.copy_(torch.tensor([9.5, -6.5]))
    log_snr = schedule.log_snr(torch.linspace(0, 1, 1001))
    assert (log_snr.diff() < 0).all()
    assert log_snr[0].item() == pytest.approx(9.5, abs=1e-5)
    assert log_snr[-1].item() == pytest.approx(-6.5, abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("timesteps", [0, 10])
def test_log_snr_takes_t_of_any_shape(name, shape, timesteps):
    if name in TRAINED and timesteps:
        return
    log_snr = Schedule(name, timesteps).log_snr(torch.full(shape, 0.5))
    assert log_snr.shape == shape
    assert log_snr.dtype == torch.float64


def test_log_snr_of_a_table_is_of_the_step_around_t():
    schedule = Schedule("cosine", 10)
    t = (torch.arange(10) + 0.5) / 10
    assert torch.equal(schedule.log_snr(t), schedule.table)
    assert schedule.log_snr(0.0) == schedule.table[0]
    assert schedule.log_snr(1.0) == schedule.table[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("cubic",), "schedule='cubic'.*cosine"), (("cosine", -1), "timesteps=-1")],
)
def test_schedule_refuses_what_it_does_not_know(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_schedule_refuses_a_table(name):
    with pytest.raises(ValueError, match="timesteps"):
        Schedule(name, 10)


# ---- the grid to sample along ----


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("timesteps", [0, 1, 12])
def test_sampling_grid_rises_to_the_clean_level(spacing, name, timesteps):
    schedule = Schedule(name, timesteps)
    noisy = schedule.log_snr(1.0).item()
    clean = schedule.log_snr(0.0).item()
    for steps in range(1, 13 if timesteps != 1 else 2):
        grid = schedule.sampling_grid(steps, spacing)
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert (grid.diff() > 0).all()
        assert grid[-1] == math.inf
        first = noisy if spacing in ("trailing", "uniform") else max(noisy, MIN_GRID_LOG_SNR)
        assert grid[0].item() == pytest.approx(first)
        if steps > 1 and spacing != "trailing":
            assert grid[-2].item() == pytest.approx(clean)


@pytest.mark.parametrize("timesteps", [1, 7, 10, 1000])
def test_sampling_grid_of_a_table_starts_at_its_noisiest_level(timesteps):
    schedule = Schedule("linear", timesteps)
    for steps in {1, 2, 3, 7, timesteps - 1, timesteps}:
        if not 1 <= steps <= timesteps:
            continue
        grid = schedule.sampling_grid(steps)
        assert len(grid) == steps + 1
        assert grid[0] == schedule.table[-1]
        assert grid[-1] == math.inf
        assert (grid.diff() > 0).all()
    assert torch.equal(schedule.sampling_grid(timesteps)[:-1], schedule.table.flip(0))


def test_spacings_are_even_in_what_they_name():
    schedule = Schedule("cosine", 0)
    t = torch.linspace(1, 0, 9, dtype=torch.float64)
    log_snr = schedule.sampling_grid(9, "log_snr")[:-1]
    root = torch.exp(schedule.sampling_grid(9, "karras")[:-1] / -14)  # (sigma / alpha)^(1 / 7)
    for even in (log_snr, root):
        torch.testing.assert_close(even.diff(), even.diff()[:1].expand(8))
    assert torch.equal(schedule.sampling_grid(9, "uniform")[:-1], schedule.log_snr(t))
    assert torch.equal(schedule.sampling_grid(8, "trailing")[:-1], schedule.log_snr(t[:-1]))


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_sampling_grid_refuses_a_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        Schedule("cosine", 10).sampling_grid(steps)
