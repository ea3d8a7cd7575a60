"""Figures of items of any kind, samples or data: images, sequences, points; floats in any units.

Floats have no black and no white of their own: every channel is shown between two percentiles of
the data, or of the samples where there is no data beside them.
"""

import itertools
import math

import numpy as np
from matplotlib.figure import Figure

from ddp.data.files import counted
from ddp.io.figures import (
    LOG_SNR_LABEL,
    grid,
    marker_size,
    num_fitting,
    plain,
    plane_axes,
    scatter,
    shades,
    side_by_side,
    to_pil,
)

PERCENTILES = (1, 99)  # of a channel of floats, that are black and white
MAX_TILES = 16  # channels of an image that are shown, the first
IMAGES = 64  # in a figure; the same of the next
SEQUENCES = 16
POINTS = 5000  # and no more than of so many numbers
POINT_NUMBERS = 1 << 22
MAX_LINES = 4  # channels of a sequence that are shown, the first
UNLIKE = 3  # times the least range of a channel: beyond it channels share no axis
BINS = 50
PATHS = 12  # from noise to data, that are shown
COMPONENT_ITEMS = 1000  # of which principal components are computed


def draw_items(
    items,  # uint8 or float images (N, C, H, W), sequences (N, C, L), or points (N, D)
    reference=None,  # items to show right of them
    titles=("samples", "data"),
    columns=None,  # of a grid
    like=None,  # the items that fix scales and axes; default: the reference, or the items
    own_scale=False,  # of images: each side has a scale of its own
    captions=(),  # above the columns of a grid of images; the reference has none
    given_first=False,  # the reference stands left of the items
):
    """Return a PIL image of items: a grid, lines or a scatter, left of a reference if any."""
    sets = [np.asarray(each) for each in (items, reference) if each is not None]
    like = sets[-1] if like is None else np.asarray(like)
    if own_scale and len(sets) > 1 and sets[1].shape[1] == 1:
        low, high = (float(end[0]) for end in channel_range(sets[1]))
        titles = (titles[0], f"{titles[1]} ({low:.2g} to {high:.2g})")
    texts = (captions, ())
    if given_first and len(sets) > 1 and sets[0].ndim > 2:
        sets, titles, texts = sets[::-1], titles[::-1], texts[::-1]
    if sets[0].ndim == 4:
        shown = [displayed(each, each if own_scale else like) for each in sets]
        grids = [grid(each, columns, text) for each, text in zip(shown, texts, strict=False)]
        titles = [with_channels(title, items.shape[1], MAX_TILES) for title in titles]
        return side_by_side(grids, titles) if len(grids) > 1 else grids[0]
    if sets[0].ndim == 3:
        return to_pil(lines(sets, titles, columns, like))
    dimensions = sets[0].shape[1]
    if dimensions == 2 and columns:
        return to_pil(ways(sets[0], columns, like))
    draw = {1: values, 2: plane}.get(dimensions, components)
    return to_pil(draw(sets, titles, like))


def room(event):
    """Return how many items of a shape a figure has room for."""
    if len(event) == 1:
        return max(1, min(POINTS, POINT_NUMBERS // event[0]))
    return SEQUENCES if len(event) == 2 else IMAGES


def with_channels(title, channels, most):
    """Return a title that says which channels are shown, where that is not all."""
    return title if channels <= most or channels == 3 else f"{title}, {most} of {channels} channels"


# ---- images ----


def tiling(channels):
    """Return (rows, columns) in which channels are shown: all in one where they have a color."""
    if channels in (1, 3):
        return 1, 1
    columns = math.ceil(math.sqrt(min(channels, MAX_TILES)))
    return math.ceil(min(channels, MAX_TILES) / columns), columns


def num_images(event, pixels):
    """Return how many images of shape (C, H, W) a grid of so many pixels shows, at least 1."""
    rows, columns = tiling(event[0])
    return num_fitting((1, rows * event[1], columns * event[2]), pixels)


def displayed(images, like):
    """Return images (N, C, H, W) as uint8 pixels (N, 1 or 3, H', W') that can be looked at.

    One channel is gray and three are color; of others each is a tile of gray, row by row."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        low, high = channel_range(like)
        fraction = (images - low[:, None, None]) / (high - low)[:, None, None]
        images = np.round(fraction.clip(0, 1) * 255).astype(np.uint8)
    count, channels, height, width = images.shape
    rows, columns = tiling(channels)
    if rows * columns == 1:
        return images
    tiles = np.zeros((count, rows * columns, height, width), np.uint8)
    tiles[:, :channels] = images[:, : rows * columns]
    tiles = tiles.reshape(count, rows, columns, height, width).swapaxes(2, 3)
    return tiles.reshape(count, 1, rows * height, columns * width)


def channel_range(items):
    """Return (low, high), (C,) each: PERCENTILES of the channels of items (N, C, ...), high > low.

    Where most values are one, the extremes; of a constant, a unit around it."""
    channels = np.moveaxis(np.asarray(items, np.float64), 1, 0).reshape(items.shape[1], -1)
    low, high = np.percentile(channels, PERCENTILES, axis=1)
    flat = low == high
    low = np.where(flat, channels.min(axis=1), low)
    high = np.where(flat, channels.max(axis=1), high)
    constant = low == high
    return low - 0.5 * constant, high + 0.5 * constant


# ---- sequences ----


def lines(sets, titles, columns, like):
    """Return a Figure of the first sequences (N, C, L) of each set, a panel each, on one scale."""
    label = ""
    channels = sets[0].shape[1]
    low, high = channel_range(like[:, :MAX_LINES])
    sets = [each[:, :MAX_LINES] for each in sets]
    if high.max() - low.min() > UNLIKE * (high - low).min():  # temperatures beside pressures
        sets = [(each - low[:, None]) / (high - low)[:, None] for each in sets]
        label = "0: 1st, 1: 99th percentile of each channel"
        low, high = np.zeros(1), np.ones(1)
    margin = 0.3 * (high.max() - low.min())
    limits = (low.min() - margin, high.max() + margin)
    most = max(map(len, sets)) if columns else min(SEQUENCES, max(map(len, sets)))
    columns = columns or math.ceil(math.sqrt(most))
    rows = math.ceil(most / columns)
    size = (len(sets) * (1 + 1.4 * columns), 0.8 + 1.1 * rows)
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(1, len(sets), squeeze=False)[0]
    for part, title, sequences in zip(parts, titles, sets, strict=False):  # the title may be spare
        part.suptitle(plain(with_channels(title, channels, MAX_LINES)))
        part.supylabel(label, fontsize="small")
        panels = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, sequence in itertools.zip_longest(panels.flat, sequences[: rows * columns]):
            if sequence is None:
                axes.axis("off")
                continue
            axes.plot(sequence.T, linewidth=0.9)  # a line for each channel
            axes.set_ylim(limits)
            axes.tick_params(labelsize="x-small")
    return figure


# ---- points ----


def plane(sets, titles, like):
    """Return a Figure of points (N, 2) of each set."""
    return scatter(*sets, titles=titles, like=like)


def ways(points, columns, like):
    """Return a Figure of points (N, 2), every `columns` of which are a way from its begin on."""
    figure = scatter(like, titles=("data",))
    axes = figure.axes[0]
    axes.set_title(f"{counted(len(points) // columns, 'way')}, from the circle to the square")
    for i in range(0, len(points), columns):
        x, y = points[i : i + columns].T  # (columns,) each
        (line,) = axes.plot(x, y, "-", linewidth=1, marker=".", markersize=3)
        axes.plot(x[0], y[0], "o", color=line.get_color())
        axes.plot(x[-1], y[-1], "s", color=line.get_color())
    return figure


def values(sets, titles, like):
    """Return a Figure of the distribution of numbers (N, 1) of each set, as histograms."""
    low, high = like.min(), like.max()
    margin = 0.15 * (high - low) or 0.5
    bins = np.linspace(low - margin, high + margin, BINS + 1)  # their edges
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for title, numbers in zip(titles, sets, strict=False):
        inside = numbers[(numbers > bins[0]) & (numbers < bins[-1])]  # strays lie beyond
        label = f"{plain(title)} ({len(numbers):,})"
        weights = np.full(len(inside), 1 / (bins[1] - bins[0]) / len(numbers))
        axes.hist(inside, bins, weights=weights, histtype="step", linewidth=1.5, label=label)
    axes.set(xlabel="value", ylabel="density")
    axes.legend()
    return figure


def components(sets, titles, like):
    """Return a Figure of points (N, D) on the two leading principal components of the data.

    Every dimension is standardized by the data first. Components are of half of the data, and the
    other half is shown: along its own it would look wider than any new points. Right of them, given
    data, the mean and the standard deviation of each dimension, relative to the data's."""
    like = np.asarray(like, np.float64)
    mean, std = like.mean(axis=0), like.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    fitted = (like[::2][:COMPONENT_ITEMS] - mean) / std
    _, _, vectors = np.linalg.svd(fitted, full_matrices=False)
    vectors = np.resize(vectors, (2, len(mean)))  # also of one item
    projected = ((like[1::2] - mean) / std) @ vectors.T
    shares = projected.var(axis=0) / np.square((like[1::2] - mean) / std).mean(axis=0).sum()
    names = [f"component {k + 1} ({share:.0%} of variance)" for k, share in enumerate(shares)]
    clouds = [((each - mean) / std) @ vectors.T for each in sets]
    clouds[1:] = [cloud[1::2] for cloud in clouds[1:]]
    figure = scatter(*clouds, titles=titles, like=projected, labels=names, spare=len(sets) - 1)
    if len(sets) > 1:
        axes = figure.axes[-1]
        ours = sets[0]
        axes.plot((ours.mean(axis=0) - mean) / std, ".", label="(mean - data's) / data's std")
        axes.plot(ours.std(axis=0) / std, ".", label="std / data's std")
        for level in (0, 1):
            axes.axhline(level, color="gray", linewidth=0.8)
        axes.set(xlabel="dimension", title=f"{plain(titles[0])}, each dimension")
        axes.legend(fontsize="small")
    return figure


# ---- from noise to data ----


def strip(states, levels, like, end="sample", names=()):
    """Return a PIL image of a few items on their way from noise to data, left to right.

    states: (N, *event) at each of some times. levels: their log-SNR. like: as of draw_items.
    end: what the last are called. names: of images, a text left of each."""
    titles = ["noise" if level == -math.inf else f"log-SNR {level:.1f}" for level in levels]
    titles[-1] = end
    like = np.asarray(like)
    states = [np.asarray(state) for state in states]
    if states[0].ndim == 4:
        shown = np.stack([displayed(state, like) for state in states], axis=1)  # (N, T, ...)
        shown = shown.reshape(-1, *shown.shape[2:])
        titles = [title.removeprefix("log-SNR ") for title in titles]
        return grid(shown, len(states), titles, names)
    if states[0].ndim == 3:
        return to_pil(lines(states, titles, 1, like))
    if states[0].shape[1] != 2:
        return to_pil(spread(states, levels))
    return to_pil(paths(states, titles, like))


def paths(states, titles, like):
    """Return a Figure of points (N, 2) at each of some times, and the paths of the first.

    All on the same axes, which hold the points at all times and those of `like`."""
    settings = plane_axes(np.concatenate([*states, like])) | {"xticks": [], "yticks": []}
    figure = Figure(figsize=(2.4 * (len(states) + 1), 2.8), layout="constrained")
    panels = figure.subplots(1, len(states) + 1)
    for axes, title, points in zip(panels, titles, states, strict=False):
        axes.scatter(*points.T, s=marker_size(len(points)), linewidths=0, c=shades(points))
        axes.set(**settings, title=title)
    ways = np.stack(states)[:, :PATHS]  # (T, PATHS, 2)
    panels[-1].plot(*ways.transpose(2, 0, 1), linewidth=0.8, alpha=0.7)  # PATHS lines
    panels[-1].scatter(*ways[-1].T, s=8, color="black", zorder=3)
    panels[-1].set(**settings, title=counted(ways.shape[1], "path"))
    return figure


def spread(states, levels):
    """Return a Figure of the standard deviation of each dimension of points (N, D), over time."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(levels, [state.std(axis=0) for state in states], linewidth=0.8)  # (T, D)
    axes.set(xlabel=LOG_SNR_LABEL, ylabel="standard deviation of each dimension")
    return figure


# ---- pairs ----


def neighbors(items, nearest):
    """Return a PIL image of items, each with its nearest other: pairs, or points with a line."""
    items, nearest = np.asarray(items), np.asarray(nearest)
    pairs = np.stack([items, nearest], axis=1)  # (N, 2, *event)
    if items.ndim == 4:
        flat = pairs.reshape(-1, *items.shape[1:])
        captions = ["sample", "nearest"] * min(4, len(items))
        return grid(displayed(flat, nearest), len(captions), captions)
    if items.ndim == 2 and items.shape[1] == 2:
        figure = Figure(figsize=(5, 5), layout="compressed")
        axes = figure.subplots()
        axes.plot(*pairs.T, "o-", markersize=3)  # x and y, (2, N) each: N lines
        axes.set(aspect="equal")
        return to_pil(figure)
    curves = pairs.reshape(len(pairs), 2, -1)  # all channels of a sequence, end to end
    figure = lines([curves], ["a sample (blue) and its nearest"], None, curves)
    return to_pil(figure)
