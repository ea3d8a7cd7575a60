"""Points in the plane from six distributions, three of them with a density in closed form."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ddp.data.dataset import Dataset

TRAIN_POINTS = 100_000
TEST_POINTS = 10_000
EIGHT_ANGLES = np.arange(8) * np.pi / 4
EIGHT_CENTERS = 2 * np.stack([np.cos(EIGHT_ANGLES), np.sin(EIGHT_ANGLES)], axis=1)  # (8, 2)
EIGHT_SD = 0.2
RING_RADII = np.array([1.0, 2.0, 3.0])
RING_SD = 0.08  # of the radius

# Samplers: (count, random: a RandomState) -> (count, 2) float64.
# Densities: x (B, 2) float64 -> log-density (B,) in nats.


def swiss_roll(count, random):
    from sklearn.datasets import make_swiss_roll  # here, because it takes a second to import

    points, _ = make_swiss_roll(count, noise=0.5, random_state=random)  # (count, 3)
    return points[:, [0, 2]]


def moons(count, random):
    from sklearn.datasets import make_moons

    points, _ = make_moons(count, noise=0.05, random_state=random)
    return points


def eight_gaussians(count, random):
    centers = EIGHT_CENTERS[random.randint(8, size=count)]
    return centers + EIGHT_SD * random.randn(count, 2)


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
    on_board = ((cell >= 0) & (cell < 4)).all(dim=1)
    dark = cell.sum(dim=1) % 2 == 0
    return torch.where(on_board & dark, x.new_tensor(-math.log(8)), -math.inf)  # 8 cells of area 1


def rings(count, random):
    radius = RING_RADII[random.randint(3, size=count)] + RING_SD * random.randn(count)
    angle = 2 * np.pi * random.rand(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def rings_log_density(x):
    radius = x.norm(dim=1)  # (B,)
    exponent = -((radius[:, None] - torch.as_tensor(RING_RADII)) ** 2) / (2 * RING_SD**2)  # (B, 3)
    log_norm = math.log(3 * RING_SD * math.sqrt(2 * math.pi))
    log_radial = torch.logsumexp(exponent, dim=1) - log_norm
    return log_radial - (2 * math.pi * radius).log()  # spread over the circle


def two_spirals(count, random):
    turn = np.sqrt(random.rand(count)) * 3 * np.pi
    arm = random.choice([-1, 1], size=count)
    spiral = np.stack([-turn * np.cos(turn), turn * np.sin(turn)], axis=1)
    return arm[:, None] * spiral + 0.3 * random.randn(count, 2)


@dataclass(frozen=True)
class Toy:
    """One distribution in the plane."""

    sample: object  # (count, random) -> (count, 2)
    log_density: object = None  # x (B, 2) -> (B,), where it is known


TOYS = {
    "swiss_roll": Toy(swiss_roll),
    "moons": Toy(moons),
    "eight_gaussians": Toy(eight_gaussians, eight_gaussians_log_density),
    "checkerboard": Toy(checkerboard, checkerboard_log_density),
    "two_spirals": Toy(two_spirals),
    "rings": Toy(rings, rings_log_density),
}


def load_toy(
    name,  # a key of TOYS
    seed=0,  # of the training points
    **_,  # data_dir and progress, which are for other datasets
):
    """Points standardized by the moments of one fixed sample, the same for every seed.

    The test points, too, are the same for every seed: figures of different runs compare."""
    toy = TOYS[name]
    fixed = toy.sample(TRAIN_POINTS, np.random.RandomState(1))
    mean = fixed.mean(axis=0)  # (2,) float64
    sd = fixed.std(axis=0)
    train = (toy.sample(TRAIN_POINTS, np.random.RandomState([seed, 2])) - mean) / sd
    test = (toy.sample(TEST_POINTS, np.random.RandomState(3)) - mean) / sd
    dataset = Dataset(
        name, torch.from_numpy(train.astype(np.float32)), torch.from_numpy(test.astype(np.float32))
    )
    if toy.log_density:
        dataset.log_density = partial(standardized_log_density, toy, mean, sd)
    return dataset


def standardized_log_density(toy, mean, sd, x):
    """Log-density of standardized points x (B, 2) in nats, (B,) float64."""
    original = x.double() * torch.as_tensor(sd) + torch.as_tensor(mean)
    return toy.log_density(original) + math.log(sd.prod())  # change of variables: + log |det|
