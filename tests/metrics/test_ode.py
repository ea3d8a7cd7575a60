"""The ODE solver against closed forms and its order conditions."""

import math

import pytest
import torch

from ddp.metrics.ode import ERROR, NODES, STAGES, dopri5


def test_tableau_meets_its_order_conditions():
    """Hairer, Norsett & Wanner 1993, section II.1: the weights integrate t^k exactly for k < 5, the
    solution that the error compares with for k < 4."""
    solution = (*STAGES[-1], 0)
    for node, weights in zip(NODES[1:], STAGES, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)
    for k in range(5):
        powers = [node**k for node in NODES]
        integral = sum(w * p for w, p in zip(solution, powers, strict=True))
        difference = sum(w * p for w, p in zip(ERROR, powers, strict=True))
        assert integral == pytest.approx(1 / (k + 1))
        assert (abs(difference) < 1e-14) == (k < 4)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_dopri5_keeps_its_tolerance_with_steps_per_item(tolerance):
    """y' = y cos(rate t): each item to the tolerance, and with as many steps as it needs."""
    rate = torch.tensor([1.0, 5.0, 40.0], dtype=torch.float64)
    batch_sizes = []

    def slope(y, t, items):
        batch_sizes.append(len(items))
        return y * torch.cos(rate[items] * t)[:, None]

    y = torch.ones(3, 2, dtype=torch.float64)
    end = dopri5(slope, y, 0.0, 6.0, tolerance, slice(None))
    expected = torch.exp(torch.sin(rate * 6) / rate)[:, None].expand(3, 2)
    assert (end - expected).abs().max() < 100 * tolerance
    assert batch_sizes[0] == 3
    assert batch_sizes[-1] == 1  # only the fastest is left at the end
    assert torch.equal(y, torch.ones(3, 2, dtype=torch.float64))  # its input is not changed


def test_dopri5_item_does_not_depend_on_its_batch():
    rate = torch.linspace(1, 9, 20, dtype=torch.float64)

    def solve(which):
        def slope(y, t, items):
            return y * torch.cos(rate[which][items] * t)[:, None]

        y = torch.ones(len(which), 1, dtype=torch.float64)
        return dopri5(slope, y, 0.0, 3.0, 1e-5, slice(None))

    whole = solve(torch.arange(20))
    part = solve(torch.arange(5, 9))
    torch.testing.assert_close(whole[5:9], part, rtol=1e-12, atol=0)


def test_dopri5_controls_the_error_of_error_dims_only():
    """The last number is as rough as can be; without control it costs no steps."""
    calls = []

    def slope(y, t, items):
        calls.append(len(items))
        return torch.stack([torch.ones_like(t), torch.cos(300 * t)], dim=1)

    counts = []
    for error_dims in (slice(1), slice(2)):
        calls.clear()
        y = dopri5(slope, torch.zeros(1, 2).double(), 0.0, 1.0, 1e-6, error_dims)
        assert y[0, 0].item() == pytest.approx(1)
        counts.append(len(calls))
    assert counts[0] < counts[1] / 3


def test_dopri5_gives_nan_where_there_is_no_solution():
    scale = torch.tensor([1.0, math.nan, math.inf, 1e30], dtype=torch.float64)

    def slope(y, t, items):
        return (scale[items] * torch.cos(1e30 * t * (items == 3)))[:, None]

    y = dopri5(slope, torch.zeros(4, 1).double(), 1.0, -1.0, 1e-5, slice(None))
    assert y[0] == pytest.approx(-2)
    assert y[1:].isnan().all()
