"""Schedules against their formulas, their limits and diffusers; grids to sample along."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from ddp.schedule import MIN_GRID_LOG_SNR, SCHEDULES, SPACINGS, Schedule, ScheduleEntry

FIXED = [name for name, entry in SCHEDULES.items() if not entry.trained]
TRAINED = [name for name, entry in SCHEDULES.items() if entry.trained]
THEIRS = {  # our name -> diffusers' beta_schedule, beta_start, beta_end
    "linear": ("linear", 1e-4, 0.02),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
}
OF_BETAS = {"linear": (1, 1e-4, 0.02), "scaled_linear": (2, 0.00085, 0.012)}  # power, ends


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


def closed_alpha2(name, t):
    """Return alpha^2 at t in the terms of each paper, written without the schedule's code."""
    if name == "cosine":  # f(t) / f(0)
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / (
            math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        )
    if name == "sigmoid":  # Chen 2023, algorithm 1: start -3, end 3, tau 1
        start, end, value = (1 / (1 + math.exp(-x)) for x in (-3, 3, -3 + 6 * t))
        return (end - value) / (end - start)
    if name == "karras":
        sigma = (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        return 1 / (1 + sigma**2)
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)  # flow


def closed_betas(name, timesteps):
    """Return beta_1, ..., beta_T of each paper."""
    if name in OF_BETAS:
        power, first, last = OF_BETAS[name]
        first, last = ((1000 / timesteps * x) ** (1 / power) for x in (first, last))
        fractions = [i / (timesteps - 1) if timesteps > 1 else 1 for i in range(timesteps)]
        return [(first + f * (last - first)) ** power for f in fractions]
    alpha2 = [1.0] + [closed_alpha2(name, i / timesteps) for i in range(1, timesteps + 1)]
    return [1 - after / before for before, after in itertools.pairwise(alpha2)]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("timesteps", [1, 2, 7, 50, 1000])
def test_table_is_the_formula_of_its_paper_at_every_step(name, timesteps):
    table = Schedule(name, timesteps).table.tolist()
    alpha2 = 1.0
    clipped = False
    for i, (level, beta) in enumerate(zip(table, closed_betas(name, timesteps), strict=True), 1):
        clipped = clipped or beta > 0.999
        alpha2 *= 1 - min(beta, 0.999)
        assert level == pytest.approx(math.log(alpha2 / (1 - alpha2)), rel=1e-7, abs=1e-7), i
        if name not in OF_BETAS and not clipped:
            closed = closed_alpha2(name, i / timesteps)
            assert level == pytest.approx(math.log(closed / (1 - closed)), rel=1e-7, abs=1e-7), i
    if name in ("cosine", "sigmoid", "flow"):
        assert clipped  # at the end, where alpha is 0


@pytest.mark.parametrize("name", FIXED)
def test_continuous_time_is_the_formula_of_its_paper(name):
    """Of betas in the limit: alpha^2 = exp(-integral of T beta), here by Simpson's rule."""
    schedule = Schedule(name, 0)
    for i in range(21):
        t = 1e-3 + (1 - 2e-3) * i / 20
        if name in OF_BETAS:
            power, first, last = OF_BETAS[name]
            first, last = ((1000 * x) ** (1 / power) for x in (first, last))
            rates = [(first + u * (last - first)) ** power for u in (0, t / 2, t)]
            integral = t / 6 * (rates[0] + 4 * rates[1] + rates[2])  # exact: beta is a quadratic
            expected = -math.log(math.expm1(integral))
        else:
            alpha2 = closed_alpha2(name, t)
            expected = math.log(alpha2 / (1 - alpha2))
        assert schedule.log_snr(i / 20).item() == pytest.approx(expected, rel=1e-9), i


def test_learned_schedule_is_a_mixture_of_sigmoids_between_its_ends():
    """Kingma et al. 2021, appendix H, with sigmoids that stand still; written out."""
    schedule = Schedule("learned", 0, shift=2.0)
    with torch.no_grad():
        schedule.network.logits.copy_(torch.linspace(-2, 1, 34))
        schedule.network.endpoints.copy_(torch.tensor([9.5, -6.5]))
    weights = [math.exp(-2 + 3 * k / 33) for k in range(34)]

    def mixture(t):
        centers = [(k - 0.5) / 32 for k in range(34)]
        sigmoids = [1 / (1 + math.exp(-64 * (t - center))) for center in centers]
        return sum(w * s for w, s in zip(weights, sigmoids, strict=True))

    for t in (0.0, 0.1, 0.5, 0.93, 1.0):
        m = (mixture(t) - mixture(0)) / (mixture(1) - mixture(0))
        expected = 9.5 - 16 * m - 2 * math.log(2)
        assert schedule.log_snr(t).item() == pytest.approx(expected, abs=1e-5)


def test_discrete_karras_runs_between_edms_sigmas():
    sigma = torch.exp(-Schedule("karras", 1000).table / 2)
    assert sigma[0].item() == pytest.approx(0.002, rel=0.03)  # that of t = 1/1000
    assert sigma[-1].item() == pytest.approx(80)


def test_table_of_a_schedule_with_noise_at_its_start_is_the_schedule(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "straight", ScheduleEntry(lambda t: 13.0 - 22.0 * t))
    expected = 13 - 22 * torch.arange(1, 101, dtype=torch.float64) / 100
    torch.testing.assert_close(Schedule("straight", 100).table, expected)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, float])
def test_every_step_is_found_by_its_time(dtype):
    """By i / T, however rounded, as well as by (i + 0.5) / T."""
    for timesteps in [*range(1, 201), 1000]:
        schedule = Schedule("cosine", timesteps)
        for offset in (0.0, 0.5):
            times = [(i + offset) / timesteps for i in range(timesteps)]
            if dtype is float:
                levels = [schedule.log_snr(t).item() for t in times] if timesteps < 50 else None
            else:
                levels = schedule.log_snr(torch.tensor(times, dtype=dtype)).tolist()
                rates = schedule.neg_dlogsnr_dt(torch.tensor(times, dtype=dtype))
                assert len(set(rates.tolist())) == timesteps
            assert levels in (None, schedule.table.tolist()), timesteps


@pytest.mark.parametrize(
    "function",
    [
        lambda t: -8 + 16 * t,
        lambda t: 0 * t,
        lambda t: 0 * t + math.nan,
        lambda t: 8 - 20 * t + 12 * t**2,  # falls, then rises
    ],
)
@pytest.mark.parametrize("timesteps", [0, 10, 1000])
def test_schedule_that_does_not_fall_is_refused(function, timesteps, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "own", ScheduleEntry(function))
    with pytest.raises(ValueError, match="schedule=own: expected log_snr to fall"):
        Schedule("own", timesteps)


@pytest.mark.parametrize("betas", [lambda n: torch.full((n,), -0.1), lambda n: torch.zeros(n)])
def test_betas_that_take_no_step_are_refused(betas, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "own", ScheduleEntry(lambda t: 8 - 16 * t, betas=betas))
    with pytest.raises(ValueError, match="schedule=own: expected log_snr to fall"):
        Schedule("own", 10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, 10])
def test_schedule_of_a_model_on_the_meta_device_has_its_levels(name, timesteps):
    timesteps = 0 if name in TRAINED else timesteps
    with torch.device("meta"):
        schedule = Schedule(name, timesteps)
    if name not in TRAINED:
        t = torch.tensor([0.0, 0.5, 1.0])
        assert torch.equal(schedule.log_snr(t), Schedule(name, timesteps).log_snr(t))


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_shift_is_a_positive_number(shift):
    with pytest.raises(ValueError, match="shift="):
        Schedule("cosine", 10, shift)


def test_ends_of_a_learned_schedule_stay_where_float32_tells_levels_apart():
    schedule = Schedule("learned", 0)
    with torch.no_grad():
        schedule.network.endpoints.copy_(torch.tensor([1e5, -3e38]))
    assert schedule.log_snr(torch.tensor([0.0, 1.0])).tolist() == [20.0, -20.0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sampling_grid_of_a_learned_schedule_that_rises_is_refused(spacing):
    schedule = Schedule("learned", 0)
    with torch.no_grad():
        schedule.network.endpoints.copy_(torch.tensor([-5.0, 5.0]))
    with pytest.raises(ValueError, match="levels do not rise"):
        schedule.sampling_grid(5, spacing)


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


@pytest.mark.parametrize("timesteps", [1, 10, 37, 100, 200])
def test_spacings_of_a_table_round_exact_fractions(timesteps):
    """As Python rounds them, half to even: no number of steps skips a level by a rounded t."""
    schedule = Schedule("linear", timesteps)
    for steps in range(1, timesteps + 1):
        trailing = [round(Fraction(k * timesteps, steps)) - 1 for k in range(steps, 0, -1)]
        last = max(steps - 1, 1)
        whole = range(last, last - steps, -1)
        uniform = [round(Fraction(k * (timesteps - 1), last)) for k in whole]
        for name, index in (("trailing", trailing), ("uniform", uniform)):
            grid = schedule.sampling_grid(steps, name)[:-1]
            assert torch.equal(grid, schedule.table[index]), (name, steps)


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
