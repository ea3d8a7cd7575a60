"""One objective: every weighting is some parameterization's plain loss; the terms of the VLB."""

import math

import pytest
import torch
from oracles import Gaussian, edm_target

from ddp.forward import alpha_sigma, q_posterior, q_sample
from ddp.loss import (
    LOSSES,
    WEIGHTINGS,
    denoising_loss,
    vlb_diffusion,
    vlb_prior,
    vlb_reconstruction,
)
from ddp.model import PREDICTIONS

DOUBLE = {"dtype": torch.float64}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def draw():
    """Return x0, eps, a network's output, log_snr (B,) and x_t."""
    x0, eps, output = randn(3, 16, 3, 4, 5)
    log_snr = torch.linspace(-8, 8, 16, **DOUBLE)
    return x0, eps, output, log_snr, q_sample(x0, log_snr, eps)


def estimate(prediction, output, x_t, log_snr):
    """Return the x0_hat of a network's output."""
    c_skip, c_out = PREDICTIONS[prediction](*alpha_sigma(log_snr, x_t))
    return c_skip * x_t + c_out * output


@pytest.mark.parametrize(
    ("prediction", "weighting"),
    [("x0", "uniform"), ("eps", "snr"), ("v", "v"), ("flow", "flow"), ("edm", "edm")],
)
def test_weighting_is_the_plain_mse_of_the_output(draw, prediction, weighting):
    x0, eps, output, log_snr, x_t = draw
    alpha, sigma = alpha_sigma(log_snr, x0)
    target = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    target["edm"] = edm_target(x0, eps, log_snr)
    target = target[prediction]
    x0_hat = estimate(prediction, output, x_t, log_snr)
    plain = ((output - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising_loss(x0_hat, x0, log_snr, weighting), plain)


def test_weightings_are_their_papers():
    """In the terms of each paper: of eps for P2, of D(x; sigma) with sigma = sigma_t / alpha_t and
    sigma_data = 0.5 for EDM."""
    log_snr = torch.linspace(-8, 8, 16, **DOUBLE)
    alpha, sigma = alpha_sigma(log_snr, log_snr)
    snr = (alpha / sigma) ** 2
    edm_sigma = sigma / alpha
    expected = {
        "truncated_snr": torch.maximum(snr, torch.ones_like(snr)),
        "min_snr": torch.minimum(snr, torch.tensor(5.0)),
        "p2": snr / (1 + snr) ** 1.0,
        "edm": (edm_sigma**2 + 0.5**2) / (edm_sigma * 0.5) ** 2,
        "vlb": snr / 2,
    }
    for name, weight in expected.items():
        torch.testing.assert_close(WEIGHTINGS[name](log_snr), weight)
    assert expected.keys() | {"uniform", "snr", "v", "flow"} == WEIGHTINGS.keys()  # all of them


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_denoising_loss_is_of_each_item(draw, weighting, loss):
    x0, _, output, log_snr, _ = draw
    whole = denoising_loss(output, x0, log_snr, weighting, loss)
    assert whole.shape == (16,)
    alone = denoising_loss(output[5:6], x0[5:6], log_snr[5:6], weighting, loss)
    torch.testing.assert_close(alone, whole[5:6])
    one_level = denoising_loss(output, x0, log_snr[5], weighting, loss)  # 0-d
    torch.testing.assert_close(one_level[5], whole[5])
    assert not denoising_loss(x0, x0, log_snr, weighting, loss).any()


def test_l1_and_huber_are_of_the_same_residual(draw):
    x0, eps, output, log_snr, x_t = draw
    x0_hat = estimate("eps", output, x_t, log_snr)
    l1 = (output - eps).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising_loss(x0_hat, x0, log_snr, "snr", "l1"), l1)
    huber = torch.nn.functional.huber_loss(output, eps, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising_loss(x0_hat, x0, log_snr, "snr", "huber"), huber)


# ---- the terms of the VLB ----


def kl_of_normals(mean_1, variance_1, mean_2, variance_2):
    """Return KL of one diagonal normal from another in nats, (B,), by PyTorch."""
    p = torch.distributions.Normal(mean_1, torch.as_tensor(variance_1).sqrt())
    q = torch.distributions.Normal(mean_2, torch.as_tensor(variance_2).sqrt())
    return torch.distributions.kl_divergence(p, q).flatten(1).sum(dim=1)


@pytest.mark.parametrize("event", [(2,), (3, 4, 5)])
@pytest.mark.parametrize("level", [-12.0, -3.0, 1.0])
def test_vlb_prior_is_the_kl_from_the_standard_normal(event, level):
    x0 = randn(7, *event)
    log_snr = torch.tensor(level, **DOUBLE)
    alpha, sigma = alpha_sigma(log_snr, x0)
    expected = kl_of_normals(alpha * x0, sigma**2, torch.zeros_like(x0), 1.0)
    torch.testing.assert_close(vlb_prior(x0, log_snr), expected)


@pytest.mark.parametrize("event", [(2,), (3, 4, 5)])
@pytest.mark.parametrize(("t", "s"), [(-3.0, -2.0), (0.0, 0.1), (-5.0, 6.0)])
def test_vlb_diffusion_is_the_kl_of_two_posteriors(event, t, s):
    x0, x0_hat, x_t = randn(3, 7, *event)
    log_snr_t = torch.full((7,), t, **DOUBLE)
    log_snr_s = torch.full((7,), s, **DOUBLE)
    mean, variance = q_posterior(x0, x_t, log_snr_t, log_snr_s)
    mean_hat, _ = q_posterior(x0_hat, x_t, log_snr_t, log_snr_s)
    expected = kl_of_normals(mean, variance, mean_hat, variance)
    torch.testing.assert_close(vlb_diffusion(x0, x0_hat, log_snr_t, log_snr_s), expected)


def test_vlb_diffusion_without_s_is_the_rate_of_many_steps():
    x0, x0_hat = randn(2, 7, 2)
    log_snr_t = torch.linspace(-4, 4, 7, **DOUBLE)
    small = 1e-6
    expected = vlb_diffusion(x0, x0_hat, log_snr_t, log_snr_t + small) / small
    torch.testing.assert_close(vlb_diffusion(x0, x0_hat, log_snr_t), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (7,)])
def test_vlb_reconstruction_of_points_is_a_normals_density(shape):
    """Its mean is x0_hat, its std the noise that is left, sigma / alpha."""
    x0, x0_hat = randn(2, 7, 2)
    log_snr = torch.full(shape, 3.0, **DOUBLE)
    alpha, sigma = alpha_sigma(log_snr, x0)
    normal = torch.distributions.Normal(x0_hat, (sigma / alpha).expand(7, 2))
    expected = -normal.log_prob(x0).sum(dim=1)
    torch.testing.assert_close(vlb_reconstruction(x0, x0_hat, log_snr, False), expected)


@pytest.mark.parametrize("std", [0.01, 0.3, 2.0])
def test_vlb_reconstruction_of_pixels_is_a_distribution(std):
    """The probabilities of all 256 values of a pixel add up to one, whatever x0_hat."""
    pixels = (torch.arange(256, **DOUBLE) / 127.5 - 1)[:, None]
    log_snr = torch.full((256,), -2 * math.log(std), **DOUBLE)
    for x0_hat in (-1.7, -1.0, 0.0, 0.1234, 1.0, 1.2):
        nats = vlb_reconstruction(pixels, torch.full((256, 1), x0_hat, **DOUBLE), log_snr, True)
        assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-9)


def test_vlb_reconstruction_of_pixels_is_the_mass_of_a_bin():
    """Against differences of the normal's distribution function, where they have digits left."""
    pixels = (torch.arange(1, 255, **DOUBLE) / 127.5 - 1)[:, None]
    std = 0.4
    log_snr = torch.full((254,), -2 * math.log(std), **DOUBLE)
    x0_hat = torch.full((254, 1), 0.2, **DOUBLE)
    high = torch.special.ndtr((pixels + 1 / 255 - x0_hat) / std)
    low = torch.special.ndtr((pixels - 1 / 255 - x0_hat) / std)
    expected = -torch.log(high - low)[:, 0]
    nats = vlb_reconstruction(pixels, x0_hat, log_snr, True)
    torch.testing.assert_close(nats, expected, rtol=1e-9, atol=1e-9)


def test_vlb_reconstruction_far_out_is_finite_and_symmetric():
    """Where the distribution function itself is 0 or 1 in float64."""
    pixels = torch.tensor([[-0.9], [0.9]], **DOUBLE)
    log_snr = torch.full((2,), 12.0, **DOUBLE)  # a std of 1/400: 700 of them away
    nats = vlb_reconstruction(pixels, -pixels, log_snr, True)
    assert nats.isfinite().all()
    assert (nats > 1e5).all()
    torch.testing.assert_close(nats[0], nats[1])


def test_vlb_of_a_gaussian_is_its_entropy_in_the_limit_of_many_steps():
    """The sum of all terms, for the exact denoiser; what is too much falls as 1 / T."""
    data = Gaussian(0.3, 0.5, (1,))
    x0 = data.sample(10_000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    entropy = -data.log_prob(x0).mean()
    gaps = []
    for timesteps in (100, 200):
        levels = torch.linspace(10, -10, timesteps + 1, **DOUBLE)
        total = vlb_prior(x0, levels[-1])
        for i, log_snr in enumerate(levels):
            eps = torch.randn(x0.shape, generator=generator, **DOUBLE)
            x0_hat = data.denoise(q_sample(x0, log_snr, eps), log_snr)
            if i == 0:
                total = total + vlb_reconstruction(x0, x0_hat, log_snr, False)
            else:
                total = total + vlb_diffusion(x0, x0_hat, log_snr, levels[i - 1])
        gaps.append((total.mean() - entropy).item())
    assert 0 < gaps[1] < gaps[0]
    assert 2 * gaps[1] - gaps[0] == pytest.approx(0, abs=0.1)  # Richardson's extrapolation
