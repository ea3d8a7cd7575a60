"""How much noise there is at a time: t -> log-SNR, from t = 0, data, to t = 1, noise.

The process is variance preserving: xt = alpha x0 + sigma eps with alpha² + sigma² = 1. One number
says how much noise that is: log_snr = log(alpha² / sigma²), so alpha² = sigmoid(log_snr) and sigma²
= sigmoid(-log_snr). Only this module knows about t, T and betas.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Continuous time lives on the interval that a table of 1000 steps covers: at t = 0 and t = 1
# themselves a schedule reaches log_snr = +inf and -inf, where neither training nor the bound is
# defined.
TIME_MARGIN = 1e-3
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2: no single step may destroy everything
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of sigma / alpha. Karras et al. 2022, table 1
# Levels to train on, normal in log-SNR: mean, standard deviation, and the share spread over t all
# the same, so that the network knows every level. The second is EDM's (the same table).
NORMAL = {"normal": (-1.0, 2.4, 1 / 32), "log_normal": (2.4, 2.4, 0.0)}
SAMPLED_SNR = SIGMA_MAX**-2  # noisier levels need no steps of their own: all is noise there
BINS = 64  # of t, in which importance sampling measures the loss


def linear(t):
    """The limit of Ho's linear betas as T grows. Song et al. 2021, eq. 33."""
    return -torch.log(torch.expm1(0.5 * t**2 * (20.0 - 0.1) + 0.1 * t))


def scaled_linear(t, first=0.85**0.5, last=12.0**0.5):
    """The limit of betas whose roots are linear, 0.00085 to 0.012. Rombach et al. 2022."""
    rise = last - first
    return -torch.log(torch.expm1(((first + rise * t) ** 3 - first**3) / (3 * rise)))


def cosine(t, offset=0.008):
    """alpha = f(t) / f(0), f(t) = cos((t + s) / (1 + s) pi / 2). Nichol & Dhariwal 2021, eq. 17."""
    angle = (t + offset) / (1 + offset) * math.pi / 2
    return torch.logit((torch.cos(angle) / math.cos(offset / (1 + offset) * math.pi / 2)) ** 2)


def sigmoid(t, start=-3.0, end=3.0):
    """alpha² is a sigmoid from `start` to `end`, rescaled. Jabri et al. 2022; Chen 2023, algorithm
    1."""
    first, last = (1 / (1 + math.exp(-x)) for x in (start, end))
    alpha2 = (last - torch.sigmoid(start + t * (end - start))) / (last - first)
    return torch.logit(alpha2.clamp_min(0))


def karras(t):
    """sigma / alpha is a 7th power of a line in t. Karras et al. 2022, eq. 5."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return -2 * RHO * torch.log(low + t * (high - low))


def flow(t):
    """The line from data to noise of rectified flow: alpha : sigma = 1 - t : t. Liu et al. 2022."""
    return 2 * torch.log((1 - t) / t)


SCHEDULES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "karras": karras,
    "flow": flow,
    "learned": None,
}
SPACINGS = ("trailing", "uniform", "log_snr", "karras")
LEVELS = ("stratified", "uniform", "importance", *NORMAL)


def betas(name, timesteps):
    """The table of T betas, (T,) float64: `linear` is Ho et al. 2020, section 4 (scaled to T
    steps), `scaled_linear` the same of their roots; the others are 1 - alpha²(t + 1/T) / alpha²(t),
    at most MAX_BETA (Nichol & Dhariwal 2021, eq. 17)."""
    ends = {"linear": (0.02, 1e-4, 1), "scaled_linear": (0.012, 0.00085, 2)}.get(name)
    if ends:  # from the noisy end: a single step is all noise
        last, first, power = ends
        last, first = ((beta * 1000 / timesteps) ** (1 / power) for beta in (last, first))
        table = torch.linspace(last, first, timesteps, dtype=torch.float64).flip(0) ** power
    else:
        t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        alpha2 = torch.sigmoid(SCHEDULES[name](t))
        table = 1 - alpha2[1:] / alpha2[:-1]
    return table.clamp(max=MAX_BETA)


def zero_terminal(log_snr, clean, noisy):
    """`log_snr` with alpha shifted and scaled so that it is 0 at `noisy`, and as it was at `clean`:
    the last level is noise alone, log_snr = -inf. Lin et al. 2024, algorithm 1."""
    alpha, first, last = (torch.sigmoid(x).sqrt() for x in (log_snr, clean, noisy))
    return torch.logit(((alpha - last) * first / (first - last)) ** 2)


class Monotone(nn.Module):
    """The `learned` schedule: a monotone network t -> log_snr with trained end points.

    It falls from ends[0] to ends[1] as a layer of sigmoids rises, each of which stands at its place
    in t and whose weights are positive. Kingma et al. 2021, appendix H, train the places, too; left
    where they are, training is stable at a hundred times the learning rate."""

    def __init__(self, units=32):
        super().__init__()
        self.ends = nn.Parameter(torch.tensor([13.0, -9.0]))
        self.weight = nn.Parameter(torch.zeros(units + 2))  # a line, but for its smallest waves
        self.units = units

    def forward(self, t):
        places = torch.arange(self.units + 2, device=t.device) - 0.5

        def rise(t):
            return torch.sigmoid(2 * (t[..., None] * self.units - places)) @ share

        share = torch.softmax(self.weight, dim=0).to(t.dtype)
        low, high = rise(t.new_zeros(())), rise(t.new_ones(()))
        return self.ends[0] + (self.ends[1] - self.ends[0]) * (rise(t) - low) / (high - low)


class Schedule(nn.Module):
    """A noise schedule: `timesteps` = T > 0 is the discrete process of Ho et al., 0 is continuous
    time.

    shift: noise for pictures `shift` times as large as those that the schedule was made for, which
    hide detail better (log_snr - 2 log shift; Hoogeboom et al. 2023, eq. 8; the same as the shift
    of t in Esser et al. 2024, eq. 23). zero_terminal: see that function. sampling: how training
    draws levels, one of LEVELS.

    Attributes: `table`, (T,) float64 log_snr of steps 1..T, falling; None in continuous time.
    """

    def __init__(
        self, name="cosine", timesteps=1000, shift=1.0, zero_terminal=False, sampling="stratified"
    ):
        super().__init__()
        if name not in SCHEDULES:
            raise ValueError(f"unknown schedule {name!r}; choose from {', '.join(SCHEDULES)}")
        if timesteps < 0:
            raise ValueError(
                f"timesteps {timesteps} is negative; give T > 0, or 0 for continuous time"
            )
        if name == "learned" and timesteps:
            raise ValueError("the learned schedule is continuous; give timesteps 0")
        self.name, self.timesteps, self.sampling = name, timesteps, sampling
        self.offset, self.zero_terminal, self.table = 2 * math.log(shift), zero_terminal, None
        self.network = Monotone() if name == "learned" else None
        if timesteps:
            table = torch.logit(torch.cumprod(1 - betas(name, timesteps), dim=0))
            self.table = self.adjusted(table, table[0], table[-1])
        if sampling == "importance":
            self.register_buffer("squares", torch.ones(min(BINS, timesteps or BINS)))

    def adjusted(self, *levels):
        log_snr, clean, noisy = (level - self.offset for level in levels)
        return zero_terminal(log_snr, clean, noisy) if self.zero_terminal else log_snr

    def log_snr(self, t):
        """t (any shape) in [0, 1] -> log_snr, float64. The discrete process looks up step floor(t
        T)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.table is not None:
            return self.table[(t * self.timesteps).long().clamp(0, self.timesteps - 1)]
        if self.network is not None:
            return self.network(t.to(self.network.ends.device)) - self.offset
        inner = (
            TIME_MARGIN + (1 - 2 * TIME_MARGIN) * s for s in (t, t.new_zeros(()), t.new_ones(()))
        )
        return self.adjusted(*map(SCHEDULES[self.name], inner))

    def slope(self, t):
        """-d log_snr / dt at t (B,). Of the discrete process it is T (SNR_s / SNR_t - 1), s being
        the step before t, so that SNR / 2 |x0 - x0_hat|² times it is T times a term of the bound;
        for the first step T, which makes it that of a Gaussian -log p(x0 | x1)."""
        if self.table is None:
            with torch.enable_grad():
                t = t.detach().clone().requires_grad_()
                learned = self.network is not None
                return -torch.autograd.grad(self.log_snr(t).sum(), t, create_graph=learned)[0]
        step = (t * self.timesteps).long().clamp(0, self.timesteps - 1)
        ratio = torch.expm1(self.table[(step - 1).clamp_min(0)] - self.table[step])
        return self.timesteps * torch.where(step == 0, 1.0, ratio)

    def levels(self, u, per_log_snr=False):
        """Training levels, one for each item of a batch: u (B,) in [0, 1), on the CPU -> log_snr
        and weight, (B,) float32. The mean of weight x loss estimates the mean loss over t, or, with
        per_log_snr, its integral over log_snr, which is the same for every schedule.

        Item i takes t = (i + u_i) / B: stratified, so every batch covers the whole process and the
        loss varies less from batch to batch (Kingma et al. 2021, appendix I.1); `uniform` takes
        u_i. `importance` takes t in proportion to the measured root mean square of the loss (Nichol
        & Dhariwal 2021, eq. 18). `normal` and `log_normal` (EDM's; Karras et al. 2022, table 1)
        draw log_snr from a normal distribution, shifted as the schedule is, and so weigh the levels
        anew."""
        u = u.double()
        mean, sd, spread = NORMAL.get(self.sampling, (0.0, 0.0, 1.0))
        by_t = u < spread
        u = torch.where(by_t, u / max(spread, 1e-9), (u - spread) / max(1 - spread, 1e-9))
        t = u if self.sampling == "uniform" else (torch.arange(len(u)) + u) / len(u)
        if self.sampling in NORMAL:
            log_snr = mean - self.offset - sd * torch.special.ndtri(t.clamp(1e-6))
            if self.table is None:
                log_snr = log_snr.clamp(*(self.log_snr(s) for s in (1.0, 0.0)))
            else:
                between = (self.table[1:] + self.table[:-1]) / 2
                log_snr = self.table[torch.searchsorted(-between, -log_snr)]  # the nearest
            log_snr = torch.where(by_t, self.log_snr(t), log_snr)
            return log_snr.float(), torch.ones(len(u))
        weight = torch.ones_like(t)
        if self.sampling == "importance":
            share, bins = self.shares(), len(self.squares)
            upto = share.cumsum(0)
            which = torch.searchsorted(upto, t).clamp(max=bins - 1)
            within = (1 - (upto[which] - t) / share[which]).clamp(0, 1 - 1e-9)
            t, weight = (which + within) / bins, 1 / (bins * share[which])
        if per_log_snr:
            weight = weight * self.slope(t)
        return self.log_snr(t).float(), weight.float()

    def shares(self):
        """Importance sampling: the share of levels to draw from each bin of t, (bins,)."""
        root = self.squares.double().cpu().sqrt()
        return 0.99 * root / root.sum() + 0.01 / len(root)  # no level is given up

    @torch.no_grad()
    def observe(self, log_snr, estimates):
        """Importance sampling: remember the weighted losses (B,) at levels (B,)."""
        shares, bins = self.shares(), len(self.squares)
        cleanest = self.log_snr(torch.arange(bins) / bins)  # of each bin
        which = torch.searchsorted(-cleanest, 1e-6 - log_snr.double().cpu(), right=True) - 1
        which = which.clamp_min(0)
        squares = (estimates.double().cpu() * bins * shares[which]) ** 2
        count = torch.bincount(which, minlength=bins)
        mean = torch.bincount(which, weights=squares, minlength=bins) / count.clamp_min(1)
        self.squares.lerp_(mean.to(self.squares), (0.1 * (count > 0)).to(self.squares))

    @torch.no_grad()
    def grid(self, steps, spacing="trailing"):
        """Levels to sample along, (steps + 1,) float64, rising from pure noise to log_snr = +inf
        (clean).

        spacing: `trailing`, evenly in t from the noisiest level (Lin et al. 2024, section 3.3);
        `uniform`, the same with the last network evaluation at the cleanest level; `log_snr`,
        evenly between those two in log_snr; `karras`, by the rule of Karras et al. 2022, eq. 5. The
        last two start where all is noise, at sigma / alpha = 80, if the schedule goes beyond.
        Raises ValueError when steps < 1 or, for the discrete process, steps > T."""
        if steps < 1:
            raise ValueError(f"--steps {steps} is less than 1; use at least 1")
        if self.timesteps and steps > self.timesteps:
            raise ValueError(
                f"--steps {steps} is more than the schedule's {self.timesteps}; "
                f"use at most {self.timesteps}"
            )
        left = torch.linspace(1, 0, steps, dtype=torch.float64)
        if spacing in ("log_snr", "karras"):
            noisy, clean = self.log_snr(1.0).clamp_min(math.log(SAMPLED_SNR)), self.log_snr(0.0)
            if spacing == "log_snr":
                levels = torch.lerp(clean, noisy, left)
            else:
                high, low = (torch.exp(level / (-2 * RHO)) for level in (noisy, clean))
                levels = -2 * RHO * torch.log(torch.lerp(low, high, left))
        else:
            if spacing == "trailing":
                left = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
            if self.table is None:
                levels = self.log_snr(left)
            elif spacing == "trailing":
                levels = self.table[(left * self.timesteps).round().long() - 1]
            else:
                levels = self.table[(left * (self.timesteps - 1)).round().long()]
        return F.pad(levels.cpu(), (0, 1), value=math.inf)
