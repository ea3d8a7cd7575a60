"""How much noise there is at a time: t -> log-SNR.

The process is variance preserving: xt = alpha x0 + sigma eps with alpha² + sigma² = 1. One number
says how much noise that is: log_snr = log(alpha² / sigma²), so alpha² = sigmoid(log_snr) and sigma²
= sigmoid(-log_snr). Only this module knows about t, T and betas.
"""

import math

import torch

# Continuous time lives on the interval that a table of 1000 steps covers: at t = 0 and t = 1
# themselves a schedule reaches log_snr = +inf and -inf, where neither training nor the bound is
# defined.
TIME_MARGIN = 1e-3
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2: no single step may destroy everything


def linear(t):
    """alpha²(t), the limit of Ho's linear betas as T grows. Song et al. 2021, eq. 33."""
    return torch.exp(-0.5 * t**2 * (20.0 - 0.1) - 0.1 * t)


def cosine(t, offset=0.008):
    """alpha²(t) = f(t) / f(0), f(t) = cos²((t + s) / (1 + s) pi / 2). Nichol & Dhariwal 2021, eq.
    17."""
    angle = (t + offset) / (1 + offset) * math.pi / 2
    return (torch.cos(angle) / math.cos(offset / (1 + offset) * math.pi / 2)) ** 2


def sigmoid(t, start=-3.0, end=3.0):
    """alpha²(t), a rescaled sigmoid from `start` to `end`. Jabri et al. 2022, algorithm 1 (tau =
    1)."""
    first, last = (1 / (1 + math.exp(-x)) for x in (start, end))
    return ((last - torch.sigmoid(start + t * (end - start))) / (last - first)).clamp_min(0)


SCHEDULES = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}


def betas(name, timesteps):
    """The table of T betas, (T,) float64: `linear` is Ho et al. 2020, section 4 (scaled to T
    steps); the others are 1 - alpha²(t + 1/T) / alpha²(t), at most MAX_BETA (Nichol & Dhariwal
    2021, eq. 18)."""
    if name == "linear":
        scale = 1000 / timesteps
        ends = (0.02 * scale, 1e-4 * scale)  # from the noisy end: a single step is all noise
        table = torch.linspace(*ends, timesteps, dtype=torch.float64).flip(0)
    else:
        alpha2 = SCHEDULES[name](torch.linspace(0, 1, timesteps + 1, dtype=torch.float64))
        table = 1 - alpha2[1:] / alpha2[:-1]
    return table.clamp(max=MAX_BETA)


class Schedule:
    """A noise schedule: `timesteps` = T > 0 is the discrete process of Ho et al., 0 is continuous
    time.

    Attributes: `table`, (T,) float64 log_snr of steps 1..T, falling; None in continuous time.
    """

    def __init__(self, name="cosine", timesteps=1000):
        if name not in SCHEDULES:
            raise ValueError(f"unknown schedule {name!r}; choose from {', '.join(SCHEDULES)}")
        if timesteps < 0:
            raise ValueError(
                f"timesteps {timesteps} is negative; give T > 0, or 0 for continuous time"
            )
        self.name, self.timesteps = name, timesteps
        if timesteps:
            self.table = torch.logit(torch.cumprod(1 - betas(name, timesteps), dim=0))
        else:
            self.table = None

    def log_snr(self, t):
        """t (any shape) in [0, 1] -> log_snr, float64. The discrete process looks up step floor(t
        T)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.table is None:
            return torch.logit(SCHEDULES[self.name](TIME_MARGIN + (1 - 2 * TIME_MARGIN) * t))
        return self.table[(t * self.timesteps).long().clamp(0, self.timesteps - 1)]

    def levels(self, u):
        """Training levels, one for each item of a batch: u (B,) in [0, 1) -> log_snr (B,) float32.

        u is on the CPU. Item i takes t = (i + u_i) / B: stratified, so every batch covers the whole
        process and the loss varies less from batch to batch (compare Kingma et al. 2021, appendix
        I.1)."""
        strata = torch.arange(len(u), dtype=torch.float64)
        return self.log_snr((strata + u.double()) / len(u)).float()

    def grid(self, steps):
        """Levels to sample along, (steps + 1,) float64, rising from pure noise to log_snr = +inf
        (clean).

        Evenly spaced in t and always starting at the noisiest level ("trailing", Lin et al. 2024,
        3.3). Raises ValueError when steps < 1 or, for the discrete process, steps > T."""
        if steps < 1:
            raise ValueError(f"--steps {steps} is less than 1; use at least 1")
        if self.timesteps and steps > self.timesteps:
            raise ValueError(
                f"--steps {steps} is more than the schedule's {self.timesteps}; "
                f"use at most {self.timesteps}"
            )
        ahead = torch.arange(steps, 0, -1, dtype=torch.float64) / steps  # 1, ..., 1 / steps
        if self.table is None:
            levels = self.log_snr(ahead)
        else:
            levels = self.table[(ahead * self.timesteps).round().long() - 1]
        return torch.cat([levels, torch.tensor([math.inf], dtype=torch.float64)])
