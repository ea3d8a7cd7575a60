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


@pytest.mark.parametrize(("predict", "weighting"), [("x0", "uniform"), ("eps", "snr"), ("v", "v")])
def test_weighting_is_plain_mse_of_the_output(draw, predict, weighting):
    x0, eps, output, log_snr, xt = draw
    alpha, sigma = alpha_sigma(log_snr, x0)
    target = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[predict]
    x0_hat = estimate(predict, output, xt, log_snr)
    plain = ((output - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising(x0_hat, x0, log_snr, weighting), plain)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_right_output_gives_x0_back(draw, predict):
    x0, eps, _, log_snr, xt = draw
    alpha, sigma = alpha_sigma(log_snr, x0)
    target = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[predict]
    torch.testing.assert_close(estimate(predict, target, xt, log_snr), x0)


def test_min_snr_is_the_smaller_weight(draw):
    x0, _, output, log_snr, _ = draw
    snr = log_snr.exp()
    torch.testing.assert_close(
        WEIGHTINGS["min_snr"](log_snr), torch.minimum(snr, torch.tensor(5.0))
    )
    assert denoising(output, x0, log_snr, "min_snr").shape == (16,)


def test_l1_and_huber_are_of_the_same_residual(draw):
    x0, eps, output, log_snr, xt = draw
    x0_hat = estimate("eps", output, xt, log_snr)
    l1 = (output - eps).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising(x0_hat, x0, log_snr, "snr", "l1"), l1)
    huber = torch.nn.functional.huber_loss(output, eps, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising(x0_hat, x0, log_snr, "snr", "huber"), huber)
    assert all(d(torch.zeros(3)).sum() == 0 for d in DISTANCES.values())
