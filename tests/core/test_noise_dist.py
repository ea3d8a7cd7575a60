"""Noise distributions: unbiased estimates of means over t; the distributions of their papers."""

import math

import pytest
import torch
from oracles import WithoutFloat64

from ddp.noise_dist import IMPORTANCE_BINS, NOISE_DISTS, build_noise_dist
from ddp.schedule import SCHEDULES, Schedule

OVER_T = [name for name, dist in NOISE_DISTS.items() if dist.over_t]
UNIFORM_FRACTION = 1 / 32  # of `lognormal`


def draws(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def levels_of(name, schedule, u, per_log_snr=False):
    """Return log_snr and weight, (B,) each, of a noise distribution by name."""
    return build_noise_dist(name, schedule)(schedule, u, per_log_snr)


@pytest.mark.parametrize("name", NOISE_DISTS)
@pytest.mark.parametrize("timesteps", [0, 1000])
def test_levels_are_the_schedules(name, timesteps):
    schedule = Schedule("cosine", timesteps)
    log_snr, weight = levels_of(name, schedule, draws(500))
    for part in (log_snr, weight):
        assert part.shape == (500,)
        assert part.dtype == torch.float32
    assert (weight > 0).all()
    if timesteps:
        assert torch.isin(log_snr, schedule.table.float()).all()
    else:
        assert (log_snr <= schedule.log_snr(0.0).float()).all()
        assert (log_snr >= schedule.log_snr(1.0).float()).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, 1000])
def test_stratified_has_one_item_in_each_part_of_t(name, timesteps):
    schedule = Schedule(name, 0 if SCHEDULES[name].trained else timesteps)
    log_snr, weight = levels_of("stratified", schedule, draws(64))
    assert (weight == 1).all()
    edges = schedule.log_snr(torch.arange(65) / 64)
    assert (log_snr <= edges[:-1] + 1e-4).all()
    assert (log_snr >= edges[1:] - 1e-4).all()


def test_stratified_trains_every_discrete_step():
    schedule = Schedule("cosine", 10)
    log_snr, _ = levels_of("stratified", schedule, torch.zeros(1000))
    assert set(log_snr.tolist()) == set(schedule.table.float().tolist())


@pytest.mark.parametrize("timesteps", [0, 10, 100, 1000])
@pytest.mark.parametrize("name", OVER_T)
@pytest.mark.parametrize("per_log_snr", [False, True])
def test_over_t_estimates_the_mean(timesteps, name, per_log_snr):
    """Of a known function of log_snr: its mean over t, or its integral over log_snr."""
    schedule = Schedule("cosine", timesteps)
    dist = build_noise_dist(name, schedule)
    if name == "importance":
        dist.loss_sq_ema.copy_(torch.linspace(0.1, 3, len(dist.loss_sq_ema)) ** 2)

    def loss(log_snr):
        return torch.exp(-(log_snr.double() ** 2) / 8)

    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    exact = loss(schedule.log_snr(t)) * (schedule.neg_dlogsnr_dt(t) if per_log_snr else 1)
    log_snr, weight = dist(schedule, draws(50_000), per_log_snr)
    estimate = weight * loss(log_snr)
    error = estimate.std() / math.sqrt(len(estimate))
    assert abs(estimate.mean() - exact.mean()) < 4 * error
    if per_log_snr and not timesteps:  # the same for every schedule
        torch.testing.assert_close(exact.mean().item(), math.sqrt(8 * math.pi), rtol=1e-3, atol=0)


@pytest.mark.parametrize("timesteps", [0, 10, 1000])
def test_importance_learns_where_the_loss_is(timesteps):
    schedule = Schedule("cosine", timesteps)
    dist = build_noise_dist("importance", schedule)
    assert len(dist.loss_sq_ema) == (timesteps if timesteps == 10 else IMPORTANCE_BINS)
    variances = []
    for step in range(100):
        log_snr, weight = dist(schedule, draws(256, step))
        estimates = weight * torch.exp(log_snr / 2)
        variances.append(estimates.var().item())
        dist.update(schedule, log_snr, estimates)
    assert sum(variances[-20:]) / 20 < 0.2 * sum(variances[:2]) / 2
    probabilities = dist.bin_probabilities()
    assert probabilities.argmax() == 0
    assert probabilities.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("timesteps", [*range(1, 66), 100, 127, 130, 1000, 0])
def test_importance_keeps_even_shares_of_an_even_loss(timesteps):
    """Every bin is observed, and its loss is that of its own items."""
    schedule = Schedule("cosine", timesteps)
    dist = build_noise_dist("importance", schedule)
    bins = len(dist.loss_sq_ema)
    dist.loss_sq_ema.copy_(torch.linspace(0.5, 2.0, bins) ** 2)  # uneven at the start
    for step in range(90):
        log_snr, weight = dist(schedule, draws(256, step))
        dist.update(schedule, log_snr, 3.0 * weight)
    torch.testing.assert_close(dist.loss_sq_ema, torch.full((bins,), 9.0), rtol=0.01, atol=0)
    log_snr, weight = dist(schedule, draws(4096))
    assert weight.min() > 0.99
    assert weight.max() < 1.01
    if timesteps:
        steps = torch.searchsorted(-schedule.table, 1e-6 - log_snr.double(), right=True) - 1
        count = torch.bincount(steps, minlength=timesteps)
        assert count.min() >= 4096 // timesteps - 2
        assert count.max() <= 4096 // timesteps + 3


def test_importance_needs_no_float64_of_the_losss_device():
    schedule = Schedule("cosine", 0)
    one = build_noise_dist("importance", schedule)
    other = build_noise_dist("importance", schedule)
    log_snr, weight = one(schedule, draws(256))
    loss = weight * torch.exp(log_snr / 2)
    one.update(schedule, log_snr, loss)
    other.update(schedule, *(x.as_subclass(WithoutFloat64) for x in (log_snr, loss)))
    assert torch.equal(one.loss_sq_ema, other.loss_sq_ema)


def test_importance_goes_on_from_its_state():
    schedule = Schedule("cosine", 0)
    one = build_noise_dist("importance", schedule)
    other = build_noise_dist("importance", schedule)
    log_snr, weight = one(schedule, draws(256))
    one.update(schedule, log_snr, weight * torch.exp(log_snr / 2))
    assert not torch.equal(one.loss_sq_ema, other.loss_sq_ema)
    other.load_state_dict(one.state_dict())
    for a, b in zip(one(schedule, draws(64, 1)), other(schedule, draws(64, 1)), strict=True):
        assert torch.equal(a, b)


# ---- lognormal and edm ----


@pytest.mark.parametrize("timesteps", [0, 1000])
def test_edm_is_edms(timesteps):
    """log sigma ~ N(-1.2, 1.2^2): Karras et al. 2022, table 1."""
    log_snr, weight = levels_of("edm", Schedule("karras", timesteps), draws(20_000))
    ln_sigma = -log_snr / 2
    assert ln_sigma.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert ln_sigma.std().item() == pytest.approx(1.2, abs=0.02)
    assert (weight == 1).all()


def lognormal_cdf(level, schedule):
    """Return the probability of log_snr <= level: a normal, but for what is spread over t."""
    normal = torch.special.ndtr(torch.tensor((level + 1.0) / 2.4)).item()
    spread = schedule.log_snr(torch.linspace(0, 1, 20_000)) <= level
    return (1 - UNIFORM_FRACTION) * normal + UNIFORM_FRACTION * spread.double().mean().item()


@pytest.mark.parametrize("timesteps", [0, 1000])
def test_lognormal_is_normal_and_a_part_is_spread_over_t(timesteps):
    schedule = Schedule("cosine", timesteps)
    log_snr, weight = levels_of("lognormal", schedule, draws(20_000))
    for level in range(-9, 10):
        below = (log_snr <= level).float().mean().item()
        assert below == pytest.approx(lognormal_cdf(level, schedule), abs=0.01), level
    assert (weight == 1).all()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_lognormal_of_small_batches_is_that_too(size):
    schedule = Schedule("cosine", 0)
    levels = []
    for u in (torch.arange(500) + 0.5) / 500:  # every u alike, so that no chance is left
        levels.append(levels_of("lognormal", schedule, u.expand(size))[0])
    levels = torch.cat(levels)
    for level in (-3.4, -1.0, 1.4):
        below = (levels <= level).float().mean().item()
        assert below == pytest.approx(lognormal_cdf(level, schedule), abs=0.005)


@pytest.mark.parametrize("name", ["lognormal", "edm"])
def test_lognormal_moves_with_the_shift(name):
    log_snr, _ = levels_of(name, Schedule("cosine", 0), draws(20_000))
    shifted, _ = levels_of(name, Schedule("cosine", 0, shift=3.0), draws(20_000))
    assert torch.allclose(shifted, log_snr - 2 * math.log(3), atol=1e-3)


@pytest.mark.parametrize("name", NOISE_DISTS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_reaches_noise_says_whether_the_noisiest_level_is_drawn(name, schedule):
    """Sampling starts there, which may be far from where a normal's levels lie."""
    schedule = Schedule(schedule, 1000)
    batches = [levels_of(name, schedule, draws(128, step))[0] for step in range(200)]
    levels = torch.cat(batches)
    assert (levels.min() == schedule.table[-1].float()) == NOISE_DISTS[name].reaches_noise
    if NOISE_DISTS[name].reaches_noise:
        assert levels.max() == schedule.table[0].float()


@pytest.mark.parametrize("name", NOISE_DISTS)
def test_zero_terminal_levels_are_finite_but_for_noise_alone(name):
    schedule = Schedule("cosine", 100, zero_terminal_snr=True)
    log_snr, weight = levels_of(name, schedule, draws(500))
    assert not log_snr.isnan().any()
    assert log_snr.max() < math.inf
    assert weight.isfinite().all()
