"""One objective: every weighting is the plain loss of some parameterisation."""

import pytest
import torch

from ddp.forward import alpha_sigma, diffuse
from ddp.loss import DISTANCES, WEIGHTINGS, denoising
from ddp.model import PREDICTIONS


@pytest.fixture
def draw():
    torch.manual_seed(0)
    x0, eps, output = torch.randn(3, 16, 3, 4, 5, dtype=torch.float64)
    log_snr = torch.linspace(-8, 8, 16, dtype=torch.float64)
    return x0, eps, output, log_snr, diffuse(x0, log_snr, eps)


def estimate(predict, output, xt, log_snr):
    c_skip, c_out = PREDICTIONS[predict](*alpha_sigma(log_snr, xt))
    return c_skip * xt + c_out * output


def targets(x0, eps, alpha, sigma):
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}


@pytest.mark.parametrize(
    ("predict", "weighting"), [("x0", "uniform"), ("eps", "snr"), ("v", "v"), ("flow", "flow")]
)
def test_weighting_is_plain_mse_of_the_output(draw, predict, weighting):
    x0, eps, output, log_snr, xt = draw
    alpha, sigma = alpha_sigma(log_snr, x0)
    target = targets(x0, eps, alpha, sigma)[predict]
    x0_hat = estimate(predict, output, xt, log_snr)
    plain = ((output - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising(x0_hat, x0, log_snr, weighting), plain)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_right_output_gives_x0_back(draw, predict):
    x0, eps, _, log_snr, xt = draw
    alpha, sigma = alpha_sigma(log_snr, x0)
    target = targets(x0, eps, alpha, sigma)[predict]
    torch.testing.assert_close(estimate(predict, target, xt, log_snr), x0)


def test_min_snr_is_the_smaller_weight(draw):
    x0, _, output, log_snr, _ = draw
    snr = log_snr.exp()
    torch.testing.assert_close(
        WEIGHTINGS["min_snr"](log_snr), torch.minimum(snr, torch.tensor(5.0))
    )
    assert denoising(output, x0, log_snr, "min_snr").shape == (16,)


def test_weights_are_their_papers(draw):
    """In the terms of each paper: of eps for P2, of D(x; sigma) with sigma = sigma_t / alpha_t and
    sigma_data = 0.5 for EDM."""
    x0, _, _, log_snr, _ = draw
    alpha, sigma = (v.flatten() for v in alpha_sigma(log_snr, x0))
    snr, edm_sigma = (alpha / sigma) ** 2, sigma / alpha
    expected = {
        "truncated_snr": torch.maximum(snr, torch.ones_like(snr)),
        "p2": snr / (1 + snr) ** 1.0,
        "edm": (edm_sigma**2 + 0.5**2) / (edm_sigma * 0.5) ** 2,
        "bound": snr / 2,
    }
    for name, weight in expected.items():
        torch.testing.assert_close(WEIGHTINGS[name](log_snr), weight)


def test_l1_and_huber_are_of_the_same_residual(draw):
    x0, eps, output, log_snr, xt = draw
    x0_hat = estimate("eps", output, xt, log_snr)
    l1 = (output - eps).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising(x0_hat, x0, log_snr, "snr", "l1"), l1)
    huber = torch.nn.functional.huber_loss(output, eps, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising(x0_hat, x0, log_snr, "snr", "huber"), huber)
    assert all(d(torch.zeros(3)).sum() == 0 for d in DISTANCES.values())
