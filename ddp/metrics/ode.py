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


def weighted_sum(weights, slopes):
    return sum(w * slope for w, slope in zip(weights, slopes, strict=True) if w)


def dopri5(slope, y, start, end, tolerance, error_dims):
    """Solve dy/dt = slope(y, t, items), y (B, D) at start, by dopri5: y at end (B, D).

    Each item takes steps of its own, so that it does not depend on its batch; `items` (b,) are the
    indices of those still on their way, y (b, D) and t (b,) theirs. `tolerance` limits the error of
    a step, relative and absolute, in the slice `error_dims` of the D numbers. An item is nan where
    there is no solution: its slope is not finite, or no step is short enough."""
    y = y.clone()
    items = torch.arange(len(y), device=y.device)  # (b,)
    t = torch.full_like(y[:, 0], start)  # (B,)
    step = torch.full_like(t, (end - start) / 50)  # (B,), size of the next step
    first_slope = slope(y, t, items)  # (B, D)
    while len(items):
        remaining = end - t[items]  # (b,)
        is_last = step[items].abs() >= remaining.abs()
        h = torch.where(is_last, remaining, step[items])  # (b,)
        slopes = [first_slope[items]]  # of the 7 stages, each (b, D)
        for node, weights in zip(NODES[1:], STAGES, strict=True):
            y_new = y[items] + h[:, None] * weighted_sum(weights, slopes)  # (b, D)
            slopes.append(slope(y_new, t[items] + node * h, items))

        scale = tolerance * (1 + torch.maximum(y[items].abs(), y_new.abs()))
        error = (h[:, None] * weighted_sum(ERROR, slopes) / scale)[:, error_dims]
        error = error.square().mean(dim=1).sqrt()  # (b,), at most 1 is good
        too_short = (h.abs() < 1e-9 * abs(end - start)) & ~is_last
        failed = ~error.isfinite() | too_short
        y_new[failed] = math.nan
        accepted = (error <= 1) | failed

        factor = 0.9 * error.clamp_min(1e-9) ** -0.2  # the error grows as the step to the 5th
        step[items] = h * factor.clamp(0.2, 5)
        moved = items[accepted]
        y[moved] = y_new[accepted]
        first_slope[moved] = slopes[-1][accepted]  # the last stage lies at the next step's start
        t[moved] += h[accepted]
        items = items[~(accepted & (is_last | failed))]
    return y
