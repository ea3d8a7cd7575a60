"""Features that need no training: pixels, values, fixed random filters.

Each is a function (N, *event) -> (N, D) float64 on the CPU, whatever the device of the items.
"""

import torch
import torch.nn.functional as F

from ddp.data.dataset import to_float

PART = 500  # items that become floats at a time
FILTERS = 32  # random filters of each layer
MAX_VALUES = 512  # of an item; more are projected onto
DIRECTIONS = 256  # random ones: so few that 2,000 items tell their covariance
ROWS = 1 << 14  # of the matrix of directions, at a time


def by_parts(function, items):
    """function(items) of a part at a time: floats of all items would be many times their bytes."""
    return torch.cat([function(part) for part in items.split(PART)])


def pixel_features(items):
    """Pixels in [0, 1], averaged down to at most 16 a side."""
    size = [min(16, side) for side in items.shape[-2:]]  # so that items outnumber features

    def pooled(part):
        return F.adaptive_avg_pool2d(part.float() / 255, size).flatten(1).cpu().double()

    return by_parts(pooled, items)


def value_features(items):
    """The numbers of items (N, *event) or, of more than MAX_VALUES, their random projections.

    These are onto DIRECTIONS fixed random lines, scaled so that a distance between two items is
    kept on average (Johnson & Lindenstrauss 1984)."""
    x = items.flatten(1).cpu().double()  # (N, D)
    if x.shape[1] <= MAX_VALUES:
        return x
    generator = torch.Generator().manual_seed(0)  # the same lines in every evaluation
    projected = 0
    for part in x.split(ROWS, dim=1):
        lines = torch.randn(part.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
        projected = projected + part @ lines
    return projected / DIRECTIONS**0.5


@torch.no_grad()
def filter_features(items, layers=3):
    """Responses of images (N, C, H, W) or sequences (N, C, L) to fixed random filters, (N, D).

    A layer is FILTERS random filters of width 3 and mean 0, the magnitude, and an average over 2
    neighbors, on each axis (Mallat 2012's scattering, with random filters); of each the mean over
    the item. Before them each channel's mean in four parts, and its standard deviation: texture,
    edges and colors. Nothing is learned, so it holds for a few hundred items of any kind."""
    axes = items.ndim - 2  # 2 of images, 1 of sequences
    convolve = F.conv2d if axes == 2 else F.conv1d
    over = tuple(range(2, items.ndim))
    generator = torch.Generator().manual_seed(0)  # the same filters in every evaluation
    filters = []
    channels = items.shape[1]
    for _ in range(layers):
        weight = torch.randn(FILTERS, channels, *[3] * axes, generator=generator)
        weight -= weight.mean(dim=over, keepdim=True)  # blind to a constant
        norm = weight.flatten(1).norm(dim=1)
        filters.append(weight / norm.reshape(-1, *[1] * (axes + 1)))
        channels = FILTERS

    def responses(part):
        x = to_float(part)
        quarters = F.adaptive_avg_pool2d(x, 2) if axes == 2 else F.adaptive_avg_pool1d(x, 4)
        means = [quarters.flatten(1), x.std(dim=over)]
        for weight in filters:
            x = convolve(x, weight.to(x.device), padding=1).abs()
            means.append(x.mean(dim=over))  # (n, FILTERS)
            pool = F.avg_pool2d if axes == 2 else F.avg_pool1d
            x = pool(x, 2, ceil_mode=True)
        return torch.cat(means, dim=1).cpu().double()

    return value_features(by_parts(responses, items))
