"""An ODE solver in which every item takes steps of its own."""

import math

import torch

# The tableau of Dormand & Prince 1980, table 2 (7 stages, orders 5 and 4).
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)  # where in the step each stage lies
STAGES = (  # weights of the slopes so far; the last row is the solution of order 5
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # 5th less 4th
FIRST_STEPS = 50  # the first step is the whole way over this
MIN_STEP = 1e-9  # of the whole way: with shorter steps an item is given up
SAFETY = 0.9  # of the step that would just hold the tolerance


def weighted_sum(weights, slopes):
    """The sum of weight * slope, leaving out weights of 0."""
    total = 0
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = total + weight * slope
    return total


def runge_kutta_step(slope, y, t, h, first_slope, items):
    """One step of size h (b,) from y (b, D) at t (b,): y_new (b, D), and its 7 slopes (b, D)."""
    slopes = [first_slope]
    for node, weights in zip(NODES[1:], STAGES, strict=True):
        y_new = y + h[:, None] * weighted_sum(weights, slopes)  # (b, D)
        slopes.append(slope(y_new, t + node * h, items))
    return y_new, slopes  # the last slope is that at y_new, the first one of the next step


def dopri5(
    slope,  # (y (b, D), t (b,), items (b,)) -> dy/dt (b, D); items: indices into the batch
    y,  # (B, D) float64, y at start
    start,  # a float
    end,  # a float, above or below start
    tolerance,  # of a step's error, relative and absolute
    error_dims,  # a slice of the D numbers: those whose error the tolerance limits
):
    """Solve dy/dt = slope(y, t) by Dormand & Prince's pair (dopri5): y at end, (B, D).

    Each item takes steps of its own, so that it does not depend on its batch. An item is nan where
    there is no solution: its slope is not finite, or no step is short enough."""
    y = y.clone()
    items = torch.arange(len(y), device=y.device)  # (b,), those on their way
    t = torch.full_like(y[:, 0], start)  # (B,)
    step = torch.full_like(t, (end - start) / FIRST_STEPS)  # (B,), size of the next step
    first_slope = slope(y, t, items)  # (B, D)
    while len(items):
        remaining = end - t[items]  # (b,)
        is_last = step[items].abs() >= remaining.abs()
        h = torch.where(is_last, remaining, step[items])  # (b,)
        y_old = y[items]
        y_new, slopes = runge_kutta_step(slope, y_old, t[items], h, first_slope[items], items)

        tolerance_scale = tolerance * (1 + torch.maximum(y_old.abs(), y_new.abs()))
        error = h[:, None] * weighted_sum(ERROR, slopes) / tolerance_scale  # (b, D)
        error = error[:, error_dims].square().mean(dim=1).sqrt()  # (b,), at most 1 is good
        too_short = (h.abs() < MIN_STEP * abs(end - start)) & ~is_last
        failed = ~error.isfinite() | too_short
        y_new[failed] = math.nan
        accepted = (error <= 1) | failed

        factor = SAFETY * error.clamp_min(1e-9) ** -0.2  # the error grows as the step to the 5th
        step[items] = h * factor.clamp(0.2, 5)
        moved = items[accepted]
        y[moved] = y_new[accepted]
        first_slope[moved] = slopes[-1][accepted]
        t[moved] += h[accepted]
        arrived = accepted & (is_last | failed)
        items = items[~arrived]
    return y
