"""Augmentation of training images, a function of (seed, step, position).

`flip` mirrors half of the images, and so half of the samples. `edm` does not leak into samples
(Karras et al. 2022, appendix F.2): the network is told what was done to an image, in 9 numbers that
are 0 when it samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ddp.rng import uniform

# Karras et al. 2022, appendix F.2, for CIFAR-10
PROBABILITY = 0.12  # of each transform but mirroring, which half of the images are
RATE = 0.2 * math.log(2)  # a scale, or a stretch, of 1 is one of 2^0.2
SHIFT = 1 / 8  # standard deviation of a translation, in sides of the image


def leave(x0, seed, k, positions):
    return x0, None


def flip(x0, seed, k, positions):
    """Mirror each image, left to right, with probability 1/2."""
    mirrored = uniform(seed, "augment", k, positions) < 0.5
    return flip_where(mirrored, x0, -1), None


def flip_where(chosen, x0, dim):
    chosen = chosen.to(x0.device, non_blocking=True)
    return torch.where(chosen[:, None, None, None], x0.flip(dim), x0)


def edm(x0, seed, k, positions):
    """Transform each image at random, and return what was done to it, too."""
    params = draw_params(seed, k, positions)
    return transform(x0, params), params.to(x0.device, non_blocking=True)


def draw_params(seed, k, positions):
    """Return random parameters of `transform`, (B, 9) float32."""
    u = uniform(seed, "augment", k, positions, (13,)).double().unbind(dim=1)  # 13 of (B,)
    mirrored = u[0] < 0.5
    upside_down = u[1] < PROBABILITY / 2  # a mirror image is one of two outcomes
    scaled, turned, stretched, moved = [v < PROBABILITY for v in u[2:6]]
    gaussian = [torch.special.ndtri(v + 2.0**-25) for v in u[6:10]]  # by inversion
    angle = turned * math.pi * (2 * u[10] - 1)
    axis = (u[11] < 0.5) * math.pi * (2 * u[12] - 1)  # twice its angle; half are horizontal
    stretch = stretched * gaussian[1]
    params = [mirrored, upside_down, scaled * gaussian[0], angle.cos() - 1, angle.sin()]
    params += [stretch * axis.cos(), stretch * axis.sin(), moved * gaussian[2], moved * gaussian[3]]
    return torch.stack([param.float() for param in params], dim=1)


def transform(
    x0,  # (B, C, H, W)
    params,  # (B, 9), on the CPU; 0 is the identity
):
    """Flip, scale, turn, stretch and move images; return new ones like x0.

    params: mirrored (1 or 0); upside down; scale; cos - 1 and sin of an angle; a stretch times cos
    and sin of twice the angle of its axis (EDM: of the angle itself, where a stretch and a squeeze
    share their numbers); moved right and down. A flip is exact. All else is one bicubic
    interpolation of the image, which its mirror images continue (EDM: a wavelet's low-pass)."""
    x0 = flip_where(params[:, 0] == 1, x0, -1)
    x0 = flip_where(params[:, 1] == 1, x0, -2)
    chosen = (params[:, 2:] != 0).any(dim=1).nonzero()[:, 0]
    grid = sampling_grid(params[chosen, 2:], *x0.shape[-2:])
    grid = grid.to(x0, non_blocking=True)
    chosen = chosen.to(x0.device, non_blocking=True)
    x0[chosen] = F.grid_sample(
        x0[chosen], grid, "bicubic", padding_mode="reflection", align_corners=True
    )
    return x0


def sampling_grid(params, height, width):
    """Return where each pixel comes from: (B, height, width, 2) of x, y in [-1, 1]."""
    scale, cos_less_1, sin, a, b, right, down = params.double().unbind(dim=1)
    x = torch.arange(width) - (width - 1) / 2 - SHIFT * width * right[:, None]  # (B, W), pixels
    y = torch.arange(height) - (height - 1) / 2 - SHIFT * height * down[:, None]  # (B, H), down
    x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])  # (B, H, W) each
    x, y = matmul(inverse_stretch(a, b), x, y)
    cos = 1 + cos_less_1
    shrink = torch.exp(-RATE * scale)
    x, y = matmul((shrink * cos, -shrink * sin, shrink * sin, shrink * cos), x, y)
    halves = [max(side - 1, 1) / 2 for side in (width, height)]  # from the center to the edge
    return torch.stack([x / halves[0], y / halves[1]], dim=-1)


def inverse_stretch(a, b):
    """Return the matrix exponential of -RATE [[a, -b], [-b, -a]], four of (B,).

    Of torch's functions exp has the same bits in a batch of any size; cosh and sinh have not."""
    size = torch.sqrt(a * a + b * b).clamp(min=1e-9)
    up, down = torch.exp(RATE * size), torch.exp(-RATE * size)
    cosh = (up + down) / 2
    a, b = [(up - down) / 2 / size * entry for entry in (a, b)]
    return cosh - a, b, b, cosh + a


def matmul(matrix, x, y):
    """Return (x, y), (B, H, W) each, multiplied by a matrix of four entries, (B,) each."""
    a, b, c, d = [entry[:, None, None] for entry in matrix]
    return a * x + b * y, c * x + d * y


class Augmentation(NamedTuple):
    apply: Callable  # (x0, seed, k, positions) -> x0, what the network is told or None
    num_params: int = 0  # numbers that the network is told of each image


AUGMENTATIONS = {
    "none": Augmentation(leave),
    "flip": Augmentation(flip),
    "edm": Augmentation(edm, num_params=9),
}


def augment_images(
    x0,  # (B, C, H, W) float32
    seed,
    k,  # the batch's number in the run
    positions,  # (B,) integers, on the CPU: the place of each image in its batch
    kind,  # a key of AUGMENTATIONS
):
    """Return augmented images like x0, and what `denoise` is told of them: (B, 9) or None."""
    return AUGMENTATIONS[kind].apply(x0, seed, k, positions)
