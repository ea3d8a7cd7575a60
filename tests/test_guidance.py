"""Guidance and clipping against their papers' formulas and diffusers."""

import math

import pytest
import torch

from ddp.forward import alpha_sigma
from ddp.guidance import clipped, dynamic, guided

EVENT = (3, 6, 5)


@pytest.fixture
def two():
    """Two denoisers, xt and a level."""
    torch.manual_seed(0)
    a, b, xt = torch.randn(3, 4, *EVENT, dtype=torch.float64)
    return (lambda *_: a), (lambda *_: b), xt, torch.full((4,), 0.7, dtype=torch.float64)


def test_guidance_of_x0_is_guidance_of_eps(two):
    """Ho & Salimans 2022, eq. 6: (1 + w) eps(c) - w eps."""
    strong, weak, xt, log_snr = two
    alpha, sigma = alpha_sigma(log_snr, xt)
    eps, eps_weak = ((xt - alpha * f(xt, log_snr)) / sigma for f in (strong, weak))
    eps_guided = (1 + 1.5) * eps - 1.5 * eps_weak
    x0_hat = guided(strong, weak, 2.5)(xt, log_snr)
    torch.testing.assert_close(x0_hat, (xt - sigma * eps_guided) / alpha)
    assert torch.equal(guided(strong, weak, 0.0)(xt, log_snr), weak())


def test_guidance_of_one_is_none(two):
    strong, weak, xt, log_snr = two
    torch.testing.assert_close(guided(strong, weak, 1.0)(xt, log_snr), strong())


def test_the_weak_network_is_asked_only_within_the_interval(two):
    strong, _, xt, log_snr = two

    def never(*_):
        raise AssertionError

    assert torch.equal(guided(strong, never, 3.0, (1.0, 2.0))(xt, log_snr), strong())
    assert torch.equal(guided(strong, never, 3.0, (-2.0, 0.5))(xt, log_snr), strong())
    with pytest.raises(AssertionError):
        guided(strong, never, 3.0, (0.0, math.inf))(xt, log_snr)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_lins(two, rescale):
    """Lin et al. 2024, section 3.4, as in their pseudocode."""
    strong, weak, xt, log_snr = two
    pos, neg = strong(), weak()
    cfg = neg + 4.0 * (pos - neg)
    std_pos = pos.std([1, 2, 3], keepdim=True)
    std_cfg = cfg.std([1, 2, 3], keepdim=True)
    factor = rescale * (std_pos / std_cfg) + (1 - rescale)
    torch.testing.assert_close(
        guided(strong, weak, 4.0, rescale=rescale)(xt, log_snr), cfg * factor
    )


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_dynamic_thresholding_is_that_of_diffusers(scale):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, sample_max_value=1e9)
    x0_hat = scale * torch.randn(4, *EVENT, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dynamic(x0_hat), scheduler._threshold_sample(x0_hat))
    assert dynamic(x0_hat).abs().max() <= 1


def test_clips():
    x0_hat = torch.tensor([[-3.0, 0.5, 2.0]])
    denoise = lambda *_: x0_hat  # noqa: E731
    assert clipped(denoise, "static")(None, None).tolist() == [[-1.0, 0.5, 1.0]]
    assert clipped(denoise, "none")(None, None) is x0_hat
