"""The bound against closed forms, and its terms against sums done by hand."""

import math

import pytest
import torch

from ddp import likelihood
from ddp.forward import alpha_sigma
from ddp.schedule import Schedule


class Gaussian:
    """A model that knows its data: independent N(mean, sd²), with the exact denoiser."""

    is_image = False

    def __init__(self, mean, sd, event, timesteps=1000, schedule="cosine", **rest):
        self.mean, self.sd, self.event = mean, sd, event
        self.schedule = Schedule(schedule, timesteps, **rest)

    def denoise(self, xt, log_snr, label=None):
        alpha, sigma = alpha_sigma(log_snr, xt)
        gain = alpha * self.sd**2 / (alpha**2 * self.sd**2 + sigma**2)
        return self.mean + gain * (xt - alpha * self.mean)


def exact_bound(model):
    """The expectation of the discrete bound for one dimension of Gaussian data, in float64."""
    table = model.schedule.table
    alpha2, sigma2 = torch.sigmoid(table), torch.sigmoid(-table)
    least = model.sd**2 * sigma2 / (alpha2 * model.sd**2 + sigma2)  # E (x0 - x0_hat)²
    snr, second = table.exp(), model.mean**2 + model.sd**2
    prior = 0.5 * (alpha2[-1] * second + sigma2[-1] - 1 - sigma2[-1].log())
    diffusion = 0.5 * ((snr[:-1] - snr[1:]) * least[1:]).sum()
    reconstruction = 0.5 * (least[0] * snr[0] - table[0] + math.log(2 * math.pi))
    return (prior + diffusion + reconstruction).item()


def gaussian_bound(schedule, timesteps, sd=0.5, count=4000):
    """The mean bound of Gaussian data less its exact value on the same points, and its error."""
    model = Gaussian(0.3, sd, (2,), timesteps, schedule)
    x0 = 0.3 + sd * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    terms = likelihood.bound(model, x0, torch.arange(count), draws=32, discrete=False)
    exact = -torch.distributions.Normal(0.3, sd).log_prob(x0).sum(dim=1)
    gap = terms["total"] - exact
    return model, gap.mean().item(), (gap.std() / math.sqrt(count)).item()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_continuous_bound_of_a_gaussian_is_its_entropy(schedule):
    _, gap, error = gaussian_bound(schedule, 0)
    assert error < 0.05
    assert abs(gap) < 4 * error


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000])
def test_discrete_bound_of_a_gaussian_is_its_expectation(schedule, timesteps):
    """It lies above the entropy, by what the fixed variance of each step costs."""
    model, gap, error = gaussian_bound(schedule, timesteps)
    entropy = 0.5 * math.log(2 * math.pi * math.e * model.sd**2)
    assert abs(gap - 2 * (exact_bound(model) - entropy)) < 4 * error
    assert gap > -4 * error


def test_the_sum_over_steps_is_estimated_without_bias():
    model, count = Gaussian(0.0, 1.3, (3,), 12), 3000
    x0 = 1.3 * torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    estimate = likelihood.bound(model, x0, torch.arange(count), draws=7, discrete=False)[
        "diffusion"
    ]
    levels, by_hand = model.schedule.table.float(), torch.zeros(count)
    for t in range(1, 12):
        x0_hat = likelihood.denoised(
            model, x0, levels[t].expand(count), 5, t, torch.arange(count), None
        )
        by_hand += likelihood.diffusion_term(x0, x0_hat, levels[t], levels[t - 1])
    error = ((estimate.var() + by_hand.var()) / count).sqrt()
    assert abs(estimate.mean() - by_hand.mean()) < 4 * error
    assert error < 0.05 * by_hand.mean()


def test_diffusion_term_is_the_divergence_of_two_posteriors():
    from ddp.forward import posterior

    torch.manual_seed(0)
    x0, x0_hat, xt = torch.randn(3, 5, 4, dtype=torch.float64)
    t, s = torch.full((5,), -1.0).double(), torch.full((5,), 0.5).double()
    p, q = (
        torch.distributions.Normal(m, v.sqrt())
        for m, v in (posterior(x, xt, t, s) for x in (x0, x0_hat))
    )
    by_hand = torch.distributions.kl_divergence(p, q).sum(dim=1)
    torch.testing.assert_close(likelihood.diffusion_term(x0, x0_hat, t, s), by_hand)


def test_prior_term_is_the_divergence_from_the_prior():
    x0, level = torch.randn(5, 4, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    alpha, sigma = alpha_sigma(level, x0)
    q = torch.distributions.Normal(alpha * x0, sigma)
    by_hand = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(likelihood.prior_term(x0, level), by_hand)


@pytest.mark.parametrize("log_snr", [2.0, 9.0, 14.0])
@pytest.mark.parametrize("x0_hat", [-1.0, -0.2, 0.999])
def test_the_decoder_is_a_distribution_over_256_values(log_snr, x0_hat):
    pixels = (torch.arange(256) / 127.5 - 1)[:, None]
    level = torch.full((256,), log_snr)
    nll = likelihood.reconstruction_term(pixels, torch.full((256, 1), x0_hat), level, discrete=True)
    assert nll.isfinite().all()  # however far the pixel is
    torch.testing.assert_close((-nll).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    if log_snr > 5:  # with less, the outermost values gather the tails
        assert nll.argmin() == ((pixels - x0_hat).abs()).argmin()


def test_losses_are_one_error_in_three_units():
    model = Gaussian(0.0, 1.0, (6,))
    rows = likelihood.losses(model, torch.randn(500, 6), torch.arange(500), count=8)
    for row in rows:
        snr = math.exp(row["log_snr"])
        torch.testing.assert_close(row["eps"], row["x0"] * snr)
        torch.testing.assert_close(row["v"], row["x0"] + row["eps"])
        # for unit Gaussian data the least error in x0 is sigma²
        assert abs(row["x0"].mean() * (1 + snr) - 1) < 0.1


def test_the_estimate_does_not_depend_on_the_batch():
    model, x0 = Gaussian(0.0, 0.7, (2,)), torch.randn(50, 2)
    whole = likelihood.bound(model, x0, torch.arange(50), discrete=False)["total"]
    part = likelihood.bound(model, x0[20:30], torch.arange(20, 30), discrete=False)["total"]
    torch.testing.assert_close(whole[20:30], part)
