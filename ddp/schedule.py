"""The noise schedule: how much noise there is at time t, from t = 0 (data) to t = 1 (noise).

The process is variance preserving: x_t = alpha x0 + sigma eps, with alpha^2 + sigma^2 = 1. One
number says how noisy x_t is: log_snr = log(alpha^2 / sigma^2), so that alpha^2 = sigmoid(log_snr)
and sigma^2 = sigmoid(-log_snr). Betas, T (`timesteps`) and what they mean stay in this module.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Continuous time keeps this distance from t = 0 and t = 1. There a schedule reaches log_snr = +inf
# and -inf, where neither training nor the VLB is defined.
TIME_MARGIN = 1e-3
MAX_BETA = 0.999  # no single step may destroy everything: Nichol & Dhariwal 2021, section 3.2
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # EDM, of sigma / alpha: Karras et al. 2022, table 1
MIN_GRID_LOG_SNR = math.log(SIGMA_MAX**-2)  # sampling grids start at sigma / alpha <= 80
MIN_LOG_SNR = -20.0  # stands for log_snr = -inf in sums and in figures
MAX_LOG_SNR = 20.0  # beyond either, float32 cannot tell x_t from data, or from noise
CHECKED_TIMES = 1001  # at which a schedule in continuous time must fall


# ---- fixed schedules in continuous time: t (any shape) in [0, 1] -> log_snr ----


def linear(t):
    """Return the limit of DDPM's linear betas for T -> infinity (Song et al. 2021, eq. 33)."""
    integral = 0.5 * t**2 * (20.0 - 0.1) + 0.1 * t  # of beta(t), so alpha^2 = exp(-integral)
    return -torch.log(torch.expm1(integral))


def scaled_linear(t, first=0.85**0.5, last=12.0**0.5):
    """Return the limit of betas whose square roots are linear in t (Rombach et al. 2022)."""
    slope = last - first
    return -torch.log(torch.expm1(((first + slope * t) ** 3 - first**3) / (3 * slope)))


def cosine(t, offset=0.008):
    """Return the cosine schedule, alpha^2 = f(t) / f(0) with f = cos^2.

    Nichol & Dhariwal 2021, eq. 17."""
    angle = (t + offset) / (1 + offset) * math.pi / 2
    angle_at_0 = offset / (1 + offset) * math.pi / 2
    return torch.logit((torch.cos(angle) / math.cos(angle_at_0)) ** 2)


def sigmoid(t, start=-3.0, end=3.0):
    """Return the schedule whose alpha^2 is a rescaled sigmoid (Jabri et al. 2022; Chen 2023)."""
    low = 1 / (1 + math.exp(-start))
    high = 1 / (1 + math.exp(-end))
    alpha2 = (high - torch.sigmoid(start + t * (end - start))) / (high - low)
    return torch.logit(alpha2.clamp_min(0))


def karras(t):
    """Return EDM's schedule: (sigma / alpha)^(1/7) is linear in t (Karras et al. 2022, eq. 5)."""
    low = SIGMA_MIN ** (1 / RHO)
    high = SIGMA_MAX ** (1 / RHO)
    return -2 * RHO * torch.log(low + t * (high - low))


def flow(t):
    """Return rectified flow's straight line, alpha : sigma = 1 - t : t (Liu et al. 2022)."""
    return 2 * torch.log((1 - t) / t)


# ---- discrete time: the table of T betas, (T,) float64 ----


def ddpm_betas(timesteps, first=1e-4, last=0.02, power=1):
    """Return betas whose `power`-th roots are linear (Ho et al. 2020, section 4), scaled to T."""
    last = (last * 1000 / timesteps) ** (1 / power)
    first = (first * 1000 / timesteps) ** (1 / power)
    # from the noisy end, so that timesteps = 1 gives beta_T
    roots = torch.linspace(last, first, timesteps, dtype=torch.float64).flip(0)
    return roots**power


def scaled_linear_betas(timesteps):
    """Return betas whose square roots are linear, 0.00085 to 0.012 (Rombach et al. 2022)."""
    return ddpm_betas(timesteps, first=0.00085, last=0.012, power=2)


def betas_from(log_snr, timesteps):
    """Return 1 - alpha^2(t) / alpha^2(t - 1/T), t = 1/T, ..., 1 (Nichol & Dhariwal 2021, eq. 17).

    Their product is alpha^2(t) itself: the first step starts from data, whose alpha is 1."""
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha2 = torch.sigmoid(log_snr(t))
    alpha2[0] = 1.0  # a schedule with noise at t = 0, such as karras, has less there
    return 1 - alpha2[1:] / alpha2[:-1]


def zero_terminal(log_snr, clean, noisy):
    """Shift and scale alpha so that it is 0 at the level `noisy` and as it was at `clean`.

    The last level is then noise alone, log_snr = -inf. Lin et al. 2024, algorithm 1."""
    alpha = torch.sigmoid(log_snr).sqrt()
    first = torch.sigmoid(clean).sqrt()
    last = torch.sigmoid(noisy).sqrt()
    return torch.logit(((alpha - last) * first / (first - last)) ** 2)


class MonotoneNetwork(nn.Module):
    """The learned schedule: log_snr(t) = a + (b - a) m(t), with trained end points a and b.

    m is a convex combination of fixed sigmoids, hence monotone. Kingma et al. 2021, appendix H,
    train where the sigmoids stand, too; fixed, training is stable at 100 times that rate. The ends
    stay within [-20, 20]: float32 would take the VLB's diffusion term for 0 beyond. It computes
    where t is, that is on the CPU."""

    def __init__(self, units=32):
        super().__init__()
        self.endpoints = nn.Parameter(torch.tensor([13.0, -9.0]))  # log_snr at t = 0 and t = 1
        self.logits = nn.Parameter(torch.zeros(units + 2))  # equal weights: nearly a line
        self.units = units

    def forward(self, t):
        weights = torch.softmax(self.logits.to(t.device), dim=0).to(t.dtype)  # (units + 2,)
        low = self.monotone(t.new_zeros(()), weights)
        high = self.monotone(t.new_ones(()), weights)
        m = (self.monotone(t, weights) - low) / (high - low)  # 0 to 1
        clean, noisy = self.endpoints.to(t.device).clamp(MIN_LOG_SNR, MAX_LOG_SNR)
        return clean + (noisy - clean) * m

    def monotone(self, t, weights):
        centers = torch.arange(self.units + 2, device=t.device) - 0.5
        return torch.sigmoid(2 * (t[..., None] * self.units - centers)) @ weights


def lookup(table, name, what):
    """Return table[name]; raise ValueError, naming the choices, when it is not there."""
    if name not in table:
        raise ValueError(f"{what}={name!r} is unknown; choose from {', '.join(table)}")
    return table[name]


@dataclass(frozen=True)
class ScheduleEntry:
    log_snr: Callable  # t in [0, 1] -> log_snr, in continuous time; or the class of a trained one
    betas: Callable | None = None  # timesteps -> (T,), where the discrete process has its own
    trained: bool = False  # log_snr is an nn.Module, trained with the network


SCHEDULES = {
    "linear": ScheduleEntry(linear, betas=ddpm_betas),
    "scaled_linear": ScheduleEntry(scaled_linear, betas=scaled_linear_betas),
    "cosine": ScheduleEntry(cosine),
    "sigmoid": ScheduleEntry(sigmoid),
    "karras": ScheduleEntry(karras),
    "flow": ScheduleEntry(flow),
    "learned": ScheduleEntry(MonotoneNetwork, trained=True),
}


class Schedule(nn.Module):
    """A noise schedule, with the grid of levels to sample along.

    Attributes: `table`, (T,) float64 log_snr of steps 1..T, falling, or None in continuous time;
    `network`, the MonotoneNetwork of a learned schedule, or None."""

    def __init__(
        self,
        name="cosine",  # a key of SCHEDULES
        timesteps=1000,  # T > 0: the discrete process of Ho et al. 2020; 0: continuous time
        shift=1.0,  # resolution ratio: larger images need more noise to hide the same detail;
        #   log_snr - 2 log(shift), Hoogeboom et al. 2023, eq. 8 (Esser et al. 2024, eq. 23)
        zero_terminal_snr=False,  # make the last level noise alone
    ):
        super().__init__()
        entry = lookup(SCHEDULES, name, "schedule")
        if timesteps < 0:
            raise ValueError(f"timesteps={timesteps} is negative; use 0 for continuous time")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}: expected a positive number; 1 is no shift")
        if entry.trained and timesteps:
            raise ValueError(f"schedule={name} is continuous; give timesteps=0")
        self.name = name
        self.timesteps = timesteps
        self.offset = 2 * math.log(shift)
        self.zero_terminal_snr = zero_terminal_snr
        self.function = entry.log_snr
        self.network = entry.log_snr() if entry.trained else None
        self.table = None
        with torch.device("cpu"):  # levels are numbers of the CPU, of a model on "meta", too
            if timesteps:
                self.table = self.make_table(entry)
            if not entry.trained:
                self.require_falling()

    def extra_repr(self):  # of repr(schedule)
        steps = f"{self.timesteps} steps" if self.timesteps else "continuous time"
        return f"{self.name}, {steps}, shift {math.exp(self.offset / 2):g}"

    def make_table(self, entry):
        if entry.betas:
            betas = entry.betas(self.timesteps)
        else:
            betas = betas_from(entry.log_snr, self.timesteps)
        alpha2 = torch.cumprod(1 - betas.clamp(max=MAX_BETA), dim=0)
        log_snr = torch.logit(alpha2) - self.offset
        return self.rescale(log_snr, log_snr[0], log_snr[-1])

    def require_falling(self):
        """Raise ValueError when log_snr does not fall from t = 0 to t = 1, or is not a number."""
        levels = self.table
        if levels is None:
            t = torch.linspace(0, 1, CHECKED_TIMES, dtype=torch.float64)
            levels = Schedule.log_snr(self, t)  # that of a subclass may not be ready
        if levels.is_meta:  # a model that is built to compare shapes has no numbers
            return
        falls = levels.diff() < 0  # False for NaN
        bounded = levels[:1].isfinite() & ~levels[-1:].isnan()
        if not (falls.all() and bounded.all()):
            raise ValueError(
                f"schedule={self.name}: expected log_snr to fall from t = 0 (data) to t = 1 "
                f"(noise), and to be finite between; it goes from {levels[0]:.4g} to "
                f"{levels[-1]:.4g}, and does not fall at {(~falls).sum()} of {len(falls)} steps"
            )

    def rescale(self, log_snr, clean, noisy):
        return zero_terminal(log_snr, clean, noisy) if self.zero_terminal_snr else log_snr

    def continuous(self, t):
        return self.function(TIME_MARGIN + (1 - 2 * TIME_MARGIN) * t) - self.offset

    def log_snr(self, t):
        """Return log_snr, float64 on the CPU, at t (any shape, CPU) in [0, 1].

        In discrete time it is that of step floor(t T)."""
        if self.table is not None:
            return self.table[self.step_at(t)]
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.network is not None:
            return self.network(t) - self.offset
        clean = self.continuous(t.new_zeros(()))
        noisy = self.continuous(t.new_ones(()))
        return self.rescale(self.continuous(t), clean, noisy)

    def step_at(self, t):
        """Return the index into `table` of time t, floor(t T).

        i / T is step i, though rounded to float32 or float64 it may lie below."""
        t = t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)
        rounding = 2 * torch.finfo(t.dtype).eps
        step = torch.floor(t.double() * self.timesteps * (1 + rounding))
        return step.long().clamp(0, self.timesteps - 1)

    def neg_dlogsnr_dt(self, t):
        """Return -d log_snr / dt at t (B,), the rate at which the VLB's integral grows.

        In discrete time it is T (SNR_s / SNR_t - 1), s being the step before t, so that
        SNR / 2 |x0 - x0_hat|^2 times it is T times one term of the VLB; for the first step it is T,
        which makes that term a Gaussian's -log p(x0 | x_1)."""
        if self.table is None:
            with torch.enable_grad():
                t = t.detach().clone().requires_grad_()
                total = self.log_snr(t).sum()
                trained = self.network is not None  # then it is differentiated once more
                return -torch.autograd.grad(total, t, create_graph=trained)[0]
        step = self.step_at(t)
        before = (step - 1).clamp_min(0)
        ratio = torch.expm1(self.table[before] - self.table[step])  # SNR_s / SNR_t - 1
        return self.timesteps * torch.where(step == 0, 1.0, ratio)

    @torch.no_grad()
    def sampling_grid(self, steps, spacing="trailing"):
        """Return the levels to sample along, (steps + 1,) float64, rising to log_snr = +inf.

        spacing: a key of SPACINGS. Raises ValueError when steps < 1 or, in discrete time, > T, and
        when they do not rise, as those of a learned schedule may whose training diverged."""
        if steps < 1:
            raise ValueError(f"steps={steps} is less than 1; use at least 1")
        if self.timesteps and steps > self.timesteps:
            raise ValueError(
                f"steps={steps} is more than timesteps={self.timesteps}; "
                f"use at most {self.timesteps}"
            )
        space = lookup(SPACINGS, spacing, "spacing")
        levels = space(self, steps)  # (steps,), from the noisiest level
        if not (levels.diff() > 0).all():
            raise ValueError(
                f"schedule={self.name}, spacing={spacing}, steps={steps}: the levels do not rise; "
                "use fewer steps, or a model whose training did not diverge"
            )
        return F.pad(levels, (0, 1), value=math.inf)  # the clean level comes last


# ---- how the levels of a sampling grid are spaced: (schedule, steps) -> (steps,) log_snr ----


def trailing(schedule, steps):
    """Space evenly in t, from the noisiest level on (Lin et al. 2024, section 3.3)."""
    k = torch.arange(steps, 0, -1, dtype=torch.float64)  # t = k / steps: 1, ..., 1 / steps
    if schedule.table is None:
        return schedule.log_snr(k / steps)
    return schedule.table[(k * schedule.timesteps / steps).round().long() - 1]


def uniform(schedule, steps):
    """Space evenly in t, from the noisiest level to the cleanest."""
    if schedule.table is None:
        return schedule.log_snr(torch.linspace(1, 0, steps, dtype=torch.float64))
    last = max(steps - 1, 1)
    k = torch.arange(last, -1, -1, dtype=torch.float64)[:steps]  # t = k / last: 1, ..., 0
    return schedule.table[(k * (schedule.timesteps - 1) / last).round().long()]


def even_log_snr(schedule, steps):
    """Space evenly in log_snr (Lu et al. 2022), from sigma / alpha = 80 where it goes beyond."""
    noisy = schedule.log_snr(1.0).clamp_min(MIN_GRID_LOG_SNR)
    clean = schedule.log_snr(0.0)
    return torch.lerp(clean, noisy, torch.linspace(1, 0, steps, dtype=torch.float64))


def even_karras(schedule, steps):
    """Space evenly in (sigma / alpha)^(1/7), as EDM does (Karras et al. 2022, eq. 5)."""
    noisy = schedule.log_snr(1.0).clamp_min(MIN_GRID_LOG_SNR)
    clean = schedule.log_snr(0.0)
    high = torch.exp(noisy / (-2 * RHO))  # (sigma / alpha)^(1 / rho)
    low = torch.exp(clean / (-2 * RHO))
    fraction = torch.linspace(1, 0, steps, dtype=torch.float64)
    return -2 * RHO * torch.log(torch.lerp(low, high, fraction))


SPACINGS = {
    "trailing": trailing,
    "uniform": uniform,
    "log_snr": even_log_snr,
    "karras": even_karras,
}
