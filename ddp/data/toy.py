"""Points in the plane from six distributions, three of them with a density in closed form."""

import math
from functools import partial

import numpy as np
import torch

from ddp.data.dataset import Dataset

TRAIN_POINTS = 100_000
TEST_POINTS = 10_000
VAL_POINTS = 5_000
EIGHT_ANGLES = np.arange(8) * np.pi / 4
EIGHT_CENTERS = 2 * np.stack([np.cos(EIGHT_ANGLES), np.sin(EIGHT_ANGLES)], axis=1)  # (8, 2)
EIGHT_SD = 0.2
RING_RADII = np.array([1.0, 2.0, 3.0])
RING_SD = 0.08  # of the radius

# samplers: (count, RandomState) -> (count, 2) float64; log-densities: (B, 2) float64 -> (B,) nats


def swiss_roll(count, random):
    from sklearn.datasets import make_swiss_roll  # here, because it takes a second to import

    return make_swiss_roll(count, noise=0.5, random_state=random)[0][:, [0, 2]]  # of x, y, z


def moons(count, random):
    from sklearn.datasets import make_moons

    return make_moons(count, noise=0.05, random_state=random)[0]


def eight_gaussians(count, random):
    return EIGHT_CENTERS[random.randint(8, size=count)] + EIGHT_SD * random.randn(count, 2)


def eight_gaussians_log_density(x):
    distance_sq = ((x[:, None] - torch.as_tensor(EIGHT_CENTERS)) ** 2).sum(-1)  # (B, 8)
    log_normal = -distance_sq / (2 * EIGHT_SD**2) - math.log(2 * math.pi * EIGHT_SD**2)
    return torch.logsumexp(log_normal, dim=1) - math.log(8)


def checkerboard(count, random):
    column = random.randint(4, size=count)
    half = random.randint(2, size=count)  # lower or upper dark cell of the column
    corner = np.stack([column, 2 * half + column % 2], axis=1) - 2
    # away from the edges, so that rounding to float32 moves no point out of its cell
    return corner + 1e-6 + (1 - 2e-6) * random.rand(count, 2)


def checkerboard_log_density(x):
    cell = (x + 2).floor()  # (B, 2) column and row, 0 to 3 on the board
    dark = ((cell >= 0) & (cell < 4)).all(dim=1) & (cell.sum(dim=1) % 2 == 0)
    return torch.where(dark, x.new_tensor(-math.log(8)), -math.inf)  # 8 cells of area 1


def rings(count, random):
    radius = RING_RADII[random.randint(3, size=count)] + RING_SD * random.randn(count)
    angle = 2 * np.pi * random.rand(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def rings_log_density(x):
    radius = x.norm(dim=1)  # (B,)
    exponent = -((radius[:, None] - torch.as_tensor(RING_RADII)) ** 2) / (2 * RING_SD**2)  # (B, 3)
    log_radial = exponent.logsumexp(dim=1) - math.log(3 * RING_SD * math.sqrt(2 * math.pi))
    return log_radial - (2 * math.pi * radius).log()  # spread over the circle


def two_spirals(count, random):
    turn = np.sqrt(random.rand(count)) * 3 * np.pi
    arm = random.choice([-1, 1], size=count)
    spiral = np.stack([-turn * np.cos(turn), turn * np.sin(turn)], axis=1)
    return arm[:, None] * spiral + 0.3 * random.randn(count, 2)


TOYS = {  # name -> sampler, log-density where it is known
    "swiss_roll": (swiss_roll, None),
    "moons": (moons, None),
    "eight_gaussians": (eight_gaussians, eight_gaussians_log_density),
    "checkerboard": (checkerboard, checkerboard_log_density),
    "two_spirals": (two_spirals, None),
    "rings": (rings, rings_log_density),
}


def load_toy(name, seed=0, **_):
    """Points standardized by a fixed sample's moments; all others are those of every seed."""
    sample, log_density = TOYS[name]
    fixed = sample(TRAIN_POINTS, np.random.RandomState(1))
    mean, sd = fixed.mean(axis=0), fixed.std(axis=0)  # (2,) float64
    train = (sample(TRAIN_POINTS, np.random.RandomState([seed, 2])) - mean) / sd
    test = (sample(TEST_POINTS, np.random.RandomState(3)) - mean) / sd
    val = (sample(VAL_POINTS, np.random.RandomState(4)) - mean) / sd
    train, test, val = (torch.from_numpy(part).float() for part in (train, test, val))
    dataset = Dataset(name, train, test, val=val)
    if log_density:
        dataset.log_density = partial(standardized_log_density, log_density, mean, sd)
    return dataset


def standardized_log_density(log_density, mean, sd, x):
    """Log-density of standardized points x (B, 2) in nats, (B,) float64."""
    original = x.double() * torch.as_tensor(sd) + torch.as_tensor(mean)
    return log_density(original) + math.log(sd.prod())  # change of variables: + log |det|
