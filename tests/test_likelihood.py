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


def view_of(timesteps):
    return "discrete" if timesteps else "continuous"


def gaussian_bound(schedule, timesteps, sd=0.5, count=4000):
    """The mean bound of Gaussian data less its exact value on the same points, and its error."""
    model = Gaussian(0.3, sd, (2,), timesteps, schedule)
    x0 = 0.3 + sd * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    terms = likelihood.bound(
        model, x0, torch.arange(count), draws=32, discrete=False, view=view_of(timesteps)
    )
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
    estimate = likelihood.bound(
        model, x0, torch.arange(count), draws=7, discrete=False, view="discrete"
    )["diffusion"]
    levels, by_hand = model.schedule.table.float(), torch.zeros(count)
    for t in range(1, 12):
        x0_hat, _ = likelihood.denoised(
            model, x0, levels[t].expand(count), 5, t, torch.arange(count), None
        )
        by_hand += likelihood.diffusion_rate(x0, x0_hat, levels[t], levels[t - 1])
    error = ((estimate.var() + by_hand.var()) / count).sqrt()
    assert abs(estimate.mean() - by_hand.mean()) < 4 * error
    assert error < 0.05 * by_hand.mean()


def test_diffusion_rate_is_the_divergence_of_two_posteriors():
    from ddp.forward import posterior

    torch.manual_seed(0)
    x0, x0_hat, xt = torch.randn(3, 5, 4, dtype=torch.float64)
    t, s = torch.full((5,), -1.0).double(), torch.full((5,), 0.5).double()
    p, q = (
        torch.distributions.Normal(m, v.sqrt())
        for m, v in (posterior(x, xt, t, s) for x in (x0, x0_hat))
    )
    by_hand = torch.distributions.kl_divergence(p, q).sum(dim=1)
    torch.testing.assert_close(likelihood.diffusion_rate(x0, x0_hat, t, s), by_hand)


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


class Mixture(Gaussian):
    """A model of an equal mixture of Gaussians of one sd, with the exact denoiser."""

    def denoise(self, xt, log_snr, label=None):
        alpha, sigma = alpha_sigma(log_snr, xt)
        variance = alpha**2 * self.sd**2 + sigma**2  # (B, 1)
        apart = xt[:, None] - alpha[..., None] * self.mean  # (B, parts, D)
        share = torch.softmax(-0.5 * apart.square().sum(-1) / variance, dim=1)[..., None]
        gain = (alpha * self.sd**2 / variance)[..., None]
        return (share * (self.mean + gain * apart)).sum(dim=1)


MEANS = torch.tensor([[1.0, 0.5], [-0.8, 0.9], [0.1, -1.2]])


def mixture(schedule, timesteps, count=800):
    """(model, x0, -log p(x0)) of a mixture of three Gaussians."""
    generator = torch.Generator().manual_seed(2)
    which = torch.randint(3, (count,), generator=generator)
    x0 = MEANS[which] + 0.3 * torch.randn(count, 2, generator=generator)
    parts = torch.distributions.Independent(torch.distributions.Normal(MEANS, 0.3), 1)
    known = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3)), parts
    )
    return Mixture(MEANS, 0.3, (2,), timesteps, schedule), x0, -known.log_prob(x0)


@pytest.mark.parametrize(("schedule", "timesteps"), [("cosine", 0), ("cosine", 1000), ("flow", 0)])
def test_exact_and_bound_of_a_mixture_are_its_entropy(schedule, timesteps):
    model, x0, known = mixture(schedule, timesteps)
    indices = torch.arange(len(x0))
    exact = likelihood.exact(model, x0, indices)[0]
    gap = exact - known
    assert gap.abs().max() < 0.05  # for each item alone
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap)) + 2e-4
    for view in ("discrete", "continuous"):
        terms = likelihood.bound(model, x0, indices, draws=16, discrete=False, view=view)
        slack = terms["total"] - exact
        error = slack.std() / math.sqrt(len(slack))
        assert slack.mean() > -4 * error
        if view == "continuous":
            assert error < 0.1
            assert slack.mean() < 4 * error


@pytest.mark.parametrize("dimensions", [2, 4, 6])
def test_exact_of_a_gaussian_is_its_log_density(dimensions):
    """Beyond EXACT_TRACE dimensions the trace is estimated; of a Gaussian's linear denoiser without
    error, since signs see a diagonal exactly."""
    model = Gaussian(0.3, 0.5, (dimensions,), 0)
    x0 = 0.3 + 0.5 * torch.randn(200, dimensions, generator=torch.Generator().manual_seed(0))
    known = -torch.distributions.Normal(0.3, 0.5).log_prob(x0).sum(dim=1)
    exact = likelihood.exact(model, x0, torch.arange(200))[0]
    assert (exact - known).abs().max() < 0.01


class Rotated(Gaussian):
    """A Gaussian with a covariance that is not diagonal: Hutchinson's estimate has an error."""

    def __init__(self, covariance):
        super().__init__(0.0, 1.0, (len(covariance),), 0)
        self.covariance = covariance

    def denoise(self, xt, log_snr, label=None):
        values, vectors = torch.linalg.eigh(self.covariance)
        alpha, sigma = alpha_sigma(log_snr, xt)
        return (xt @ vectors * (alpha * values / (alpha**2 * values + sigma**2))) @ vectors.T


def test_hutchinson_is_unbiased():
    torch.manual_seed(0)
    root = torch.randn(8, 8) / 3
    model = Rotated(root @ root.T + 0.05 * torch.eye(8))
    normal = torch.distributions.MultivariateNormal(torch.zeros(8), model.covariance)
    x0 = normal.sample((1500,))
    gap = likelihood.exact(model, x0, torch.arange(1500))[0] + normal.log_prob(x0)
    error = (gap.std() / math.sqrt(len(gap))).item()
    assert 0.001 < error < 0.1
    assert abs(gap.mean().item()) < 4 * error


class Pixels(Gaussian):
    """A Gaussian of pictures, wide enough for a bin of 1/127.5 to be flat."""

    is_image = True

    def denoise(self, xt, log_snr, label=None):
        return super().denoise(xt, log_snr)


def test_dequantisation_bounds_the_mass_of_a_bin():
    """The mass of a pixel's bin under the Gaussian is what is bounded, by more draws more
    tightly."""
    model = Pixels(0.0, 0.004, (1, 2, 2), 0, "karras")  # narrower than a bin: it matters
    x0 = torch.zeros(300, 1, 2, 2)
    noise = math.exp(-0.5 * model.schedule.log_snr(0.0).item())  # what is left at the clean end
    normal = torch.distributions.Normal(0.0, math.hypot(0.004, noise))
    mass = 4 * (2 * normal.cdf(torch.tensor(1 / 255)) - 1).log().item()
    nats = likelihood.exact(model, x0, torch.arange(300), draws=8, dequantise="uniform")
    assert nats.shape == (8, 300)
    uniform, weighted = nats.mean(dim=0), math.log(8) - torch.logsumexp(-nats, dim=0)
    errors = [4 * x.std().item() / math.sqrt(300) for x in (uniform, weighted)]
    assert -mass - errors[0] < weighted.mean() < uniform.mean()
    assert uniform.mean() - weighted.mean() > errors[0]


@pytest.mark.parametrize(("mean", "sd"), [(0.1, 0.1), (-1.0, 1e-4)])
def test_dequantisation_by_noise_is_the_continuous_bound(mean, sd):
    """Of a model that knows its data the flow is worth what the diffusion term is, and the rest is
    the same: for black pixels, too, whose bin has no end."""
    model, indices = Pixels(mean, sd, (1, 2, 3), 0, "cosine"), torch.arange(600)
    x0 = mean + sd * torch.randn(600, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    exact, uniform = (
        likelihood.exact(model, x0, indices, draws=16, dequantise=way, tolerance=1e-6).mean(dim=0)
        for way in ("noise", "uniform")
    )
    gap = likelihood.bound(model, x0, indices, draws=64)["total"] - exact
    error = gap.std().item() / math.sqrt(600)
    assert error < 0.15
    assert abs(gap.mean().item()) < 4 * error + 1e-3
    more = (uniform - exact).mean().item() / 6  # nats a pixel
    assert (more > 0.3) == (mean == -1.0)  # uniform noise gives black no more than its bin


def test_exact_does_not_depend_on_the_batch():
    model, x0, _ = mixture("cosine", 0, 60)
    whole = likelihood.exact(model, x0, torch.arange(60))
    part = likelihood.exact(model, x0[20:30], torch.arange(20, 30))
    torch.testing.assert_close(whole[:, 20:30], part, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_the_solver_holds_its_tolerance(tolerance):
    """y' = y cos t and a stiff start: each item to its own tolerance, in float64."""

    def slope(y, t, which):
        return y * torch.cos(rate[which] * t)[:, None]

    rate = torch.tensor([1.0, 5.0, 40.0], dtype=torch.float64)
    y = torch.ones(3, 2, dtype=torch.float64)
    calls = []
    end = likelihood.integrate(
        lambda *a: calls.append(len(a[2])) or slope(*a), y, 0.0, 6.0, tolerance, slice(None)
    )
    known = torch.exp(torch.sin(rate * 6) / rate)[:, None].expand(3, 2)
    assert (end - known).abs().max() < 100 * tolerance
    assert calls[0] == 3
    assert calls[-1] == 1  # the fast one alone is left at the end


def test_the_solver_gives_up_where_there_is_no_solution():
    def slope(y, t, which):
        wrong = torch.tensor([1.0, math.nan, math.inf, 1e30], dtype=y.dtype)
        return (wrong[which] * torch.cos(1e30 * t * (which == 3)))[:, None]

    y = likelihood.integrate(slope, torch.zeros(4, 1).double(), 1.0, -1.0, 1e-5, slice(None))
    assert y[0] == pytest.approx(-2)
    assert y[1:].isnan().all()


def test_the_solver_meets_its_order_conditions():
    """Hairer, Norsett & Wanner 1993, section II.1: the weights integrate t^k exactly for k < 5, the
    other solution that the error compares with for k < 4."""
    nodes, last = likelihood.NODES, (*likelihood.STAGES[-1], 0)
    for node, weights in zip(nodes[1:], likelihood.STAGES, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)
    for k in range(5):
        assert sum(w * c**k for w, c in zip(last, nodes, strict=True)) == pytest.approx(1 / (k + 1))
        off = sum(w * c**k for w, c in zip(likelihood.ERROR, nodes, strict=True))
        assert (abs(off) < 1e-14) == (k < 4)


def test_the_continuous_bound_is_the_limit_of_the_sum():
    model, x0, _ = mixture("cosine", 0, 400)
    views = [
        likelihood.bound(model, x0, torch.arange(400), draws=64, discrete=False, view=view)
        for view in ("discrete", "continuous")
    ]
    prior = [v["prior"] for v in views]
    torch.testing.assert_close(*prior)
    # the sum of 1000 terms is above the integral: SNR |x0 - x0_hat|² falls from step to step
    assert views[0]["diffusion"].mean() > views[1]["diffusion"].mean()


def test_halves_of_the_draws_make_the_whole():
    """`first` numbers the draws, so that two runs are independent estimates of one number."""
    model, x0, _ = mixture("cosine", 0, 2000)
    a, b = (
        likelihood.bound(model, x0, torch.arange(2000), draws=4, discrete=False, first=f)["total"]
        for f in (0, 4)
    )
    assert not torch.equal(a, b)
    assert abs((a - b).mean()) < 4 * (a - b).std() / math.sqrt(2000)
