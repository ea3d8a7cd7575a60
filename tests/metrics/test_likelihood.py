"""The bound and the exact likelihood against closed forms, and terms against sums done by hand."""

import math

import pytest
import torch
from oracles import CorrelatedGaussian, Gaussian, GaussianMixture, OracleModel

from ddp.forward import alpha_sigma, q_posterior
from ddp.loss import vlb_diffusion, vlb_prior, vlb_reconstruction
from ddp.metrics.likelihood import loss_by_noise_level, noise_and_denoise, ode_nll, vlb
from ddp.rng import normal
from ddp.schedule import Schedule

MEAN = 0.3
SD = 0.5
MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.5], [-0.8, 0.9], [0.1, -1.2]]), sd=0.3)


def standard_error(x):
    return (x.std() / math.sqrt(len(x))).item()


def test_vlb_prior_is_the_divergence_from_the_prior():
    x0 = torch.randn(5, 4, dtype=torch.float64)
    log_snr = torch.tensor(-3.0, dtype=torch.float64)
    alpha, sigma = alpha_sigma(log_snr, x0)
    q = torch.distributions.Normal(alpha * x0, sigma)
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, prior).sum(dim=1)
    torch.testing.assert_close(vlb_prior(x0, log_snr), expected)


def test_vlb_diffusion_is_the_divergence_of_two_posteriors():
    x0, x0_hat, x_t = torch.randn(3, 5, 4, dtype=torch.float64)
    log_snr_t = torch.full((5,), -1.0).double()
    log_snr_s = torch.full((5,), 0.5).double()
    posteriors = []
    for x in (x0, x0_hat):
        mean, variance = q_posterior(x, x_t, log_snr_t, log_snr_s)
        posteriors.append(torch.distributions.Normal(mean, variance.sqrt()))
    expected = torch.distributions.kl_divergence(*posteriors).sum(dim=1)
    torch.testing.assert_close(vlb_diffusion(x0, x0_hat, log_snr_t, log_snr_s), expected)


@pytest.mark.parametrize("log_snr", [2.0, 9.0, 14.0])
@pytest.mark.parametrize("x0_hat", [-1.0, -0.2, 0.999])
def test_vlb_reconstruction_is_a_distribution_over_256_values(log_snr, x0_hat):
    pixels = (torch.arange(256) / 127.5 - 1)[:, None]
    prediction = torch.full((256, 1), x0_hat)
    nll = vlb_reconstruction(pixels, prediction, torch.tensor(log_snr), discrete=True)
    assert nll.isfinite().all()  # however far the pixel is
    torch.testing.assert_close((-nll).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    if log_snr > 5:  # with less, the outermost values gather the tails
        assert nll.argmin() == (pixels - x0_hat).abs().argmin()


def discrete_vlb_of_gaussian(table, sd=SD):
    """The expectation of the discrete bound for one dimension of Gaussian data, in float64."""
    alpha2 = torch.sigmoid(table)
    sigma2 = torch.sigmoid(-table)
    error = sd**2 * sigma2 / (alpha2 * sd**2 + sigma2)  # E (x0 - x0_hat)^2
    snr = table.exp()
    second_moment = MEAN**2 + sd**2
    prior = 0.5 * (alpha2[-1] * second_moment + sigma2[-1] - 1 - sigma2[-1].log())
    diffusion = 0.5 * ((snr[:-1] - snr[1:]) * error[1:]).sum()
    reconstruction = 0.5 * (error[0] * snr[0] - table[0] + math.log(2 * math.pi))
    return (prior + diffusion + reconstruction).item()


def gap_of_gaussian(schedule, timesteps, time, count=4000):
    """The mean bound of Gaussian data less its -log p(x0), the error of that, and the schedule."""
    data = Gaussian(MEAN, SD, (2,))
    model = OracleModel(data, Schedule(schedule, timesteps))
    x0 = data.sample(count)
    terms = vlb(model, x0, torch.arange(count), mc_samples=32, discrete=False, time=time)
    gap = terms["total"] + data.log_prob(x0)
    return gap.mean().item(), standard_error(gap), model.schedule


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_vlb_continuous_of_a_gaussian_is_its_entropy(schedule):
    gap, error, _ = gap_of_gaussian(schedule, 0, "continuous")
    assert error < 0.05
    assert abs(gap) < 4 * error


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000])
def test_vlb_discrete_of_a_gaussian_is_its_expectation(schedule, timesteps):
    """It lies above the entropy, by what the fixed variance of each step costs."""
    gap, error, schedule = gap_of_gaussian(schedule, timesteps, "discrete")
    entropy = 0.5 * math.log(2 * math.pi * math.e * SD**2)
    expected = 2 * (discrete_vlb_of_gaussian(schedule.table) - entropy)
    assert abs(gap - expected) < 4 * error
    assert gap > -4 * error


def test_vlb_diffusion_term_is_the_sum_over_steps():
    count = 3000
    data = Gaussian(0.0, 1.3, (3,))
    model = OracleModel(data, Schedule("cosine", 12))
    x0 = data.sample(count, seed=1)
    indices = torch.arange(count)
    terms = vlb(model, x0, indices, mc_samples=7, discrete=False, time="discrete")
    estimate = terms["diffusion"]
    table = model.schedule.table.float()
    by_hand = torch.zeros(count)
    for t in range(1, 12):
        eps = normal(5, "test_eps", t, indices, model.event)
        x0_hat = noise_and_denoise(model, x0, table[t], eps)
        by_hand += vlb_diffusion(x0, x0_hat, table[t], table[t - 1])
    error = ((estimate.var() + by_hand.var()) / count).sqrt()
    assert abs(estimate.mean() - by_hand.mean()) < 4 * error
    assert error < 0.05 * by_hand.mean()


def test_vlb_total_is_the_sum_of_its_terms():
    model = OracleModel(MIXTURE, Schedule("cosine", 0))
    terms = vlb(model, MIXTURE.sample(50), torch.arange(50), discrete=False)
    assert list(terms) == ["prior", "diffusion", "reconstruction", "total"]
    parts = terms["prior"] + terms["diffusion"] + terms["reconstruction"]
    assert torch.equal(terms["total"], parts)
    assert terms["total"].dtype == torch.float64


def test_vlb_item_does_not_depend_on_its_batch():
    data = Gaussian(0.0, 0.7, (2,))
    model = OracleModel(data, Schedule("cosine", 1000))
    x0 = data.sample(50)
    for time in ("discrete", "continuous"):
        whole = vlb(model, x0, torch.arange(50), discrete=False, time=time)["total"]
        part = vlb(model, x0[20:30], torch.arange(20, 30), discrete=False, time=time)["total"]
        torch.testing.assert_close(whole[20:30], part, rtol=1e-5, atol=1e-5)  # float32 rounding


def test_vlb_continuous_is_below_the_sum_over_1000_steps():
    """SNR |x0 - x0_hat|^2 falls from step to step: each term of the sum is above its integral."""
    model = OracleModel(MIXTURE, Schedule("cosine", 0))
    x0 = MIXTURE.sample(400)
    options = {"mc_samples": 64, "discrete": False}
    discrete = vlb(model, x0, torch.arange(400), time="discrete", **options)
    continuous = vlb(model, x0, torch.arange(400), time="continuous", **options)
    assert torch.equal(discrete["prior"], continuous["prior"])
    assert discrete["diffusion"].mean() > continuous["diffusion"].mean()


def test_vlb_first_gives_independent_estimates():
    model = OracleModel(MIXTURE, Schedule("cosine", 0))
    x0 = MIXTURE.sample(2000)
    options = {"mc_samples": 4, "discrete": False}
    a = vlb(model, x0, torch.arange(2000), first=0, **options)["total"]
    b = vlb(model, x0, torch.arange(2000), first=4, **options)["total"]
    assert (a != b).all()
    assert abs((a - b).mean()) < 4 * standard_error(a - b)
    noise_a = a + MIXTURE.log_prob(x0)
    noise_b = b + MIXTURE.log_prob(x0)
    correlation = torch.corrcoef(torch.stack([noise_a, noise_b]))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(2000)


def test_vlb_monte_carlo_error_falls_with_samples():
    """Stratified levels: four times the samples cut the error by more than two."""
    model = OracleModel(MIXTURE, Schedule("cosine", 0))
    x0 = MIXTURE.sample(1000)
    spreads = []
    for mc_samples in (4, 16):
        options = {"mc_samples": mc_samples, "discrete": False}
        a = vlb(model, x0, torch.arange(1000), first=0, **options)["diffusion"]
        b = vlb(model, x0, torch.arange(1000), first=100, **options)["diffusion"]
        spreads.append((a - b).std().item())
    assert spreads[1] < 0.6 * spreads[0]


@pytest.mark.parametrize(("schedule", "timesteps"), [("cosine", 0), ("cosine", 1000), ("flow", 0)])
def test_ode_nll_and_vlb_of_a_mixture_are_its_entropy(schedule, timesteps):
    model = OracleModel(MIXTURE, Schedule(schedule, timesteps))
    x0 = MIXTURE.sample(800, seed=2)
    indices = torch.arange(800)
    nll = ode_nll(model, x0, indices)[0]
    gap = nll + MIXTURE.log_prob(x0)
    assert gap.abs().max() < 0.05  # for each item alone
    assert abs(gap.mean()) < 4 * standard_error(gap) + 2e-4
    for time in ("discrete", "continuous"):
        terms = vlb(model, x0, indices, mc_samples=16, discrete=False, time=time)
        slack = terms["total"] - nll
        assert slack.mean() > -4 * standard_error(slack)
        if time == "continuous":
            assert standard_error(slack) < 0.1
            assert slack.mean() < 4 * standard_error(slack)


def test_ode_nll_and_vlb_given_labels_are_the_conditional_entropy():
    model = OracleModel(MIXTURE, Schedule("cosine", 0), num_classes=3)
    label = torch.arange(600) % 3
    x0 = MIXTURE.sample(600, seed=3, label=label)
    expected = -MIXTURE.log_prob(x0, label)
    nll = ode_nll(model, x0, torch.arange(600), label=label)[0]
    assert (nll - expected).abs().max() < 0.02
    total = vlb(model, x0, torch.arange(600), mc_samples=32, label=label, discrete=False)["total"]
    assert abs((total - expected).mean()) < 4 * standard_error(total - expected)


@pytest.mark.parametrize("dimensions", [2, 4, 6])
def test_ode_nll_of_a_gaussian_is_its_log_density(dimensions):
    """With more than 4 dimensions the trace is estimated; of a Gaussian's linear denoiser without
    error, since random signs see a diagonal exactly."""
    data = Gaussian(MEAN, SD, (dimensions,))
    model = OracleModel(data, Schedule("cosine", 0))
    x0 = data.sample(200)
    nll = ode_nll(model, x0, torch.arange(200))[0]
    assert (nll + data.log_prob(x0)).abs().max() < 0.01


def test_ode_nll_hutchinson_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator) / 3
    data = CorrelatedGaussian(root @ root.T + 0.05 * torch.eye(8))
    model = OracleModel(data, Schedule("cosine", 0))
    x0 = data.sample(1500)
    gap = ode_nll(model, x0, torch.arange(1500))[0] + data.log_prob(x0)
    assert 0.001 < standard_error(gap) < 0.1
    assert abs(gap.mean().item()) < 4 * standard_error(gap)


def test_ode_nll_item_does_not_depend_on_its_batch():
    model = OracleModel(MIXTURE, Schedule("cosine", 0))
    x0 = MIXTURE.sample(60)
    whole = ode_nll(model, x0, torch.arange(60))
    part = ode_nll(model, x0[20:30], torch.arange(20, 30))
    torch.testing.assert_close(whole[:, 20:30], part, atol=1e-3, rtol=0)


def test_ode_nll_uniform_dequantization_bounds_the_mass_of_a_bin():
    """It bounds the mass of a pixel's bin under the Gaussian, with more copies more tightly."""
    data = Gaussian(0.0, 0.004, (1, 2, 2))  # narrower than a bin: it matters
    model = OracleModel(data, Schedule("karras", 0))
    x0 = torch.zeros(300, 1, 2, 2)
    noise = math.exp(-0.5 * model.schedule.log_snr(0.0).item())  # what is left at the clean end
    density = torch.distributions.Normal(0.0, math.hypot(0.004, noise))
    log_mass = 4 * (2 * density.cdf(torch.tensor(1 / 255)) - 1).log().item()
    options = {"dequantizations": 8, "dequantization": "uniform"}
    nats = ode_nll(model, x0, torch.arange(300), **options)
    assert nats.shape == (8, 300)
    mean = nats.mean(dim=0)
    weighted = math.log(8) - torch.logsumexp(-nats, dim=0)
    assert -log_mass - 4 * standard_error(mean) < weighted.mean() < mean.mean()
    assert mean.mean() - weighted.mean() > 4 * standard_error(mean)


@pytest.mark.parametrize(("mean", "sd"), [(0.1, 0.1), (-1.0, 1e-4)])
def test_ode_nll_noise_dequantization_is_the_continuous_vlb(mean, sd):
    """For a perfect model the flow is worth what the diffusion term is, and the rest is the same:
    for black pixels, too, whose bin has no end."""
    model = OracleModel(Gaussian(mean, sd, (1, 2, 3)), Schedule("cosine", 0))
    indices = torch.arange(600)
    x0 = mean + sd * torch.randn(600, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    options = {"dequantizations": 16, "tolerance": 1e-6}
    noise = ode_nll(model, x0, indices, dequantization="noise", **options).mean(dim=0)
    uniform = ode_nll(model, x0, indices, dequantization="uniform", **options).mean(dim=0)
    gap = vlb(model, x0, indices, mc_samples=64)["total"] - noise
    assert standard_error(gap) < 0.15
    assert abs(gap.mean().item()) < 4 * standard_error(gap) + 1e-3
    excess = (uniform - noise).mean().item() / 6  # nats a pixel
    assert (excess > 0.3) == (mean == -1.0)  # uniform noise gives black no more than its bin


def test_vlb_refuses_an_unknown_time():
    model = OracleModel(Gaussian(), Schedule("cosine", 0))
    with pytest.raises(ValueError, match="time='integral'"):
        vlb(model, torch.zeros(2, 2), torch.arange(2), time="integral")


def test_ode_nll_refuses_an_unknown_dequantization():
    model = OracleModel(Gaussian(event=(1, 2, 2)), Schedule("cosine", 0))
    with pytest.raises(ValueError, match="dequantization='normal'"):
        ode_nll(model, torch.zeros(2, 1, 2, 2), torch.arange(2), dequantization="normal")


def test_loss_by_noise_level_is_one_error_in_three_units():
    data = Gaussian(0.0, 1.0, (6,))
    model = OracleModel(data, Schedule("cosine", 1000))
    rows = loss_by_noise_level(model, data.sample(500), torch.arange(500), count=8)
    assert [row["t"] for row in rows] == [(k + 0.5) / 8 for k in range(8)]
    for row in rows:
        snr = math.exp(row["log_snr"])
        torch.testing.assert_close(row["eps"], row["x0"] * snr)
        torch.testing.assert_close(row["v"], row["x0"] + row["eps"])
        # for unit Gaussian data the least error in x0 is sigma^2
        assert abs(row["x0"].mean() * (1 + snr) - 1) < 0.1
