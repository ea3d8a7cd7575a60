"""The forward network: its distributions against Bayes' rule and against each other."""

import itertools
import math

import pytest
import torch
from oracles import WithoutFloat64

from ddp.forward import alpha_sigma, expand, q_posterior, q_sample, q_step, to_double
from ddp.loss import vlb_reconstruction
from ddp.schedule import Schedule, ddpm_betas


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("s", "t"), [(5.0, 4.9), (2.0, -3.0), (12.0, -12.0)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_q_posterior_is_bayes_rule(s, t, shape):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0), in precisions."""
    log_snr_s = torch.full(shape, s, dtype=torch.float64)
    log_snr_t = torch.full(shape, t, dtype=torch.float64)
    x0, x_t = randn(2, 1, 6)
    alpha_s, sigma_s = alpha_sigma(log_snr_s, x0)
    ratio, beta = q_step(torch.ones_like(x0), log_snr_s, log_snr_t)  # the mean of x_s = 1
    precision = ratio**2 / beta + 1 / sigma_s**2
    mean, variance = q_posterior(x0, x_t, log_snr_t, log_snr_s)
    expected = (ratio * x_t / beta + alpha_s * x0 / sigma_s**2) / precision
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(variance.expand(1, 6), (1 / precision).expand(1, 6))


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_q_step_adds_up_to_q_sample(name):
    """q(x_t | x0) by one jump and by all single steps: the same mean and variance."""
    table = Schedule(name, 50).table
    one = torch.ones(1, 1, dtype=torch.float64)
    mean, sigma = alpha_sigma(table[0], one)
    variance = sigma**2
    for log_snr_s, log_snr_t in itertools.pairwise(table):
        ratio, beta = q_step(one, log_snr_s, log_snr_t)
        mean = ratio * mean
        variance = ratio**2 * variance + beta
    alpha, sigma = alpha_sigma(table[-1], one)
    torch.testing.assert_close(mean, alpha.expand(1, 1))
    torch.testing.assert_close(variance, (sigma**2).expand(1, 1))


def test_q_step_has_ddpms_beta():
    """Mean sqrt(1 - beta_t) x_s and variance beta_t: Ho et al. 2020, eq. 2."""
    table = Schedule("linear", 1000).table
    betas = ddpm_betas(1000)
    for i in (1, 500, 999):
        one = torch.ones(1, 1, dtype=torch.float64)
        mean, variance = q_step(one, table[i - 1], table[i])
        torch.testing.assert_close(variance, betas[i])
        torch.testing.assert_close(mean[0, 0] ** 2, 1 - betas[i])


@pytest.mark.parametrize("shape", [(), (3,)])
def test_q_sample_at_the_ends_is_data_and_noise(shape):
    x0, eps = torch.randn(2, 3, 2)
    clean = torch.full(shape, math.inf)
    noise = torch.full(shape, -math.inf)
    assert torch.equal(q_sample(x0, clean, eps), x0)
    assert torch.equal(q_sample(x0, noise, eps), eps)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_q_posterior_into_the_clean_level_is_x0(shape):
    x0, x_t = torch.randn(2, 3, 2)
    mean, variance = q_posterior(x0, x_t, torch.zeros(shape), torch.full(shape, math.inf))
    assert torch.equal(mean, x0)
    assert not variance.any()


def test_alpha_sigma_preserve_the_variance():
    log_snr = torch.linspace(-30, 30, 61, dtype=torch.float64)
    alpha, sigma = alpha_sigma(log_snr, torch.zeros(61, 1))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(61, 1, dtype=torch.float64))
    torch.testing.assert_close(torch.log(alpha**2 / sigma**2)[:, 0], log_snr)


@pytest.mark.parametrize("event", [(2,), (3, 4, 5)])
def test_expand_gives_each_item_its_level(event):
    x = torch.zeros(7, *event)
    level = torch.arange(7.0)
    assert ((x + expand(level, x)).flatten(1) == level[:, None]).all()
    assert expand(level[0], x).shape == ()


@pytest.mark.parametrize("event", [(2,), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_level_for_all_equals_a_level_for_each(event, dtype):
    x0, x_t = randn(2, 6, *event).to(dtype)
    for level in (-8.0, -0.3, 0.0, 4.0):
        t = torch.tensor(level, dtype=dtype)
        s = t + 0.7
        for function, arguments in (
            (q_sample, (x0, t, x_t)),
            (q_step, (x_t, s, t)),
            (q_posterior, (x0, x_t, t, s)),
        ):
            for_each = [a.expand(6) if a.ndim == 0 else a for a in arguments]
            ours = torch.stack([r.expand(x0.shape) for r in function(*arguments)])
            theirs = torch.stack([r.expand(x0.shape) for r in function(*for_each)])
            torch.testing.assert_close(ours, theirs)
            assert ours.dtype == dtype


def test_level_for_all_does_not_depend_on_how_many():
    """Bit for bit: a 0-d level is computed once, whatever the batch."""
    x0, eps = torch.randn(2, 64, 2)
    for level in torch.linspace(-8, 8, 200):
        assert torch.equal(q_sample(x0, level, eps)[:1], q_sample(x0[:1], level, eps[:1]))


def test_to_double_goes_to_the_cpu_where_a_device_has_no_float64():
    x = torch.randn(5)
    for given in (x, x.as_subclass(WithoutFloat64)):
        double = to_double(given)
        assert type(double) is torch.Tensor
        assert torch.equal(double, x.double())


@pytest.mark.parametrize("discrete", [True, False])
def test_reconstruction_needs_no_float64_of_its_device(discrete):
    x0, x0_hat = torch.randn(2, 7, 2).clamp(-1, 1)
    log_snr = torch.full((7,), 3.0)
    expected = vlb_reconstruction(x0, x0_hat, log_snr, discrete)
    given = [x.as_subclass(WithoutFloat64) for x in (x0, x0_hat, log_snr)]
    assert torch.equal(vlb_reconstruction(*given, discrete), expected)
