"""Schedules against their formulas, their limits and diffusers."""

import math

import pytest
import torch

from ddp.schedule import SCHEDULES, Schedule, betas


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000, 4000])
def test_table_is_a_process(name, timesteps):
    table = betas(name, timesteps)
    assert table.shape == (timesteps,)
    assert ((table > 0) & (table < 1)).all()
    log_snr = Schedule(name, timesteps).table
    assert log_snr.isfinite().all()
    assert (log_snr.diff() < 0).all()


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_betas_are_those_of_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule=theirs)
    torch.testing.assert_close(betas(ours, 1000).float(), scheduler.betas, rtol=1e-5, atol=1e-9)
    alpha2 = torch.sigmoid(Schedule(ours, 1000).table).float()
    torch.testing.assert_close(alpha2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
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
    schedule = Schedule(name, timesteps)
    levels = schedule.levels(torch.rand(64, generator=torch.Generator().manual_seed(0)))
    assert levels.dtype == torch.float32
    edges = schedule.log_snr(torch.arange(65) / 64)
    assert (levels <= edges[:-1] + 1e-4).all()
    assert (levels >= edges[1:] - 1e-4).all()


def test_every_discrete_step_is_trained():
    schedule = Schedule("cosine", 10)
    assert set(schedule.levels(torch.zeros(1000)).tolist()) == set(schedule.table.float().tolist())
    assert schedule.log_snr(1.0) == schedule.table[-1]


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


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"'cubic'.*cosine"):
        Schedule("cubic")
    with pytest.raises(ValueError, match="-1"):
        Schedule("cosine", -1)
