"""Plots: image grids, scatters, curves, GIFs. Grids are PIL images, charts matplotlib Figures."""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image, ImageDraw

MIN_CELL = 48  # pixels: smaller images are enlarged to about this, so that 8x8 digits can be read
GAP = 2  # pixels between the cells of a grid
GAP_COLOR = (96, 96, 128)  # neither black nor white, nor any gray
MARGIN = 24  # pixels around the images that stand side by side
LOG_SNR_LABEL = "log-SNR (noise on the left, data on the right)"


def enlargement(height, width):
    """How many pixels of a grid show one pixel of an image, in each direction."""
    return max(1, round(MIN_CELL / max(height, width)))


def chart(height, **settings):
    """A Figure of one plot with grid lines, and its axes; `settings` are those of Axes.set."""
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.set(**settings)
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def grid(
    images,  # uint8 (N, C, H, W), C = 1 or 3
    columns=None,  # default: about as many as rows
):
    """One PIL image of all images, row by row, enlarged by whole pixels, with separators."""
    images = np.asarray(images)
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    k = enlargement(height, width)
    cells = images.repeat(k, axis=2).repeat(k, axis=3)  # (N, C, kH, kW)
    cells = cells.transpose(0, 2, 3, 1)  # (N, kH, kW, C)
    pitch_y = height * k + GAP  # from one cell's top to the next
    pitch_x = width * k + GAP
    canvas = np.empty((rows * pitch_y + GAP, columns * pitch_x + GAP, 3), np.uint8)
    canvas[:] = GAP_COLOR
    for i, cell in enumerate(cells):
        top = i // columns * pitch_y + GAP
        left = i % columns * pitch_x + GAP
        canvas[top : top + height * k, left : left + width * k] = cell  # gray becomes RGB
    return Image.fromarray(canvas)


def scatter(
    points,  # (N, 2)
    reference=None,  # (M, 2), shown right of them, or None
    titles=("samples", "data"),
):
    """A Figure of one or two clouds of points on the same axes."""
    clouds = [points] if reference is None else [points, reference]
    figure = Figure(figsize=(5 * len(clouds), 5), layout="constrained")
    panels = figure.subplots(1, len(clouds), squeeze=False)[0]
    limit = np.abs(np.asarray(clouds[-1])).max() * 1.15 or 1.0
    for axes, title, cloud in zip(panels, titles, clouds, strict=False):  # the title may be spare
        x, y = np.asarray(cloud).T
        size = min(8.0, 4000 / max(1, len(cloud)) + 0.8)  # smaller where there are many
        axes.scatter(x, y, s=size, linewidths=0, alpha=0.6)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.set_title(f"{title} ({len(cloud):,})")
    return figure


def grid_or_scatter(
    items,  # uint8 (N, C, H, W) or points (N, 2)
    reference=None,  # the same of other items, shown right of them, or None
    titles=("samples", "data"),
    columns=None,  # of a grid
):
    """Items as one PIL image: a grid of images, or a scatter of points."""
    if items.ndim == 2:
        return to_pil(scatter(items, reference, titles))
    if reference is None:
        return grid(items, columns)
    return side_by_side([grid(items, columns), grid(reference, columns)], titles)


def to_pil(figure, dpi=80):
    """A Figure as a PIL image; a PIL image as it is."""
    if isinstance(figure, Image.Image):
        return figure
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba = np.asarray(canvas.buffer_rgba())  # (H, W, 4)
    return Image.fromarray(rgba[..., :3].copy())


def column(rows, name):
    """One column of log.csv as numbers, (N,)."""
    return np.array([float(row[name]) for row in rows])


def loss_curve(
    rows,  # of log.csv: dicts of strings
):
    """A Figure of the training loss (raw and smoothed) and the test loss against the step."""
    steps = column(rows, "step")
    loss = column(rows, "loss")
    window = max(1, len(loss) // 50)
    total = np.cumsum(np.pad(loss, (window, 0), mode="edge"))
    smooth = (total[window:] - total[:-window]) / window  # moving average, as long as loss
    figure, axes = chart(4.5, xlabel="step", ylabel="loss", yscale="log")
    axes.plot(steps, loss, color="tab:blue", alpha=0.2, linewidth=0.7)
    axes.plot(steps, smooth, color="tab:blue", label=f"train (mean of {window})")
    tested = [row for row in rows if row["test_loss"]]  # at each save
    if tested:
        x = column(tested, "step")
        y = column(tested, "test_loss")
        axes.plot(x, y, "o-", color="tab:orange", markersize=4, label="test (EMA)")
    axes.legend()
    return figure


def loss_by_level(
    levels,  # rows {"log_snr": float, "x0", "eps" and "v": Estimate} in a dict
):
    """A Figure of the test loss against the noise level, in the units of x0, eps and v."""
    rows = list(levels.values())
    log_snr = [row["log_snr"] for row in rows]
    figure, axes = chart(4.5, xlabel=LOG_SNR_LABEL, ylabel="test loss", yscale="log")
    for unit in ("x0", "eps", "v"):
        values = [row[unit].value for row in rows]
        errors = [row[unit].error for row in rows]
        axes.errorbar(log_snr, values, errors, marker="o", markersize=4, label=f"{unit} units")
    axes.legend()
    return figure


def metric_ratios(
    spaces,  # feature space -> metric -> Estimate of the ratio to real vs real, or None
):
    """A Figure of each metric relative to its real-vs-real value, with its 95% interval."""
    rows = []
    for space, ratios in spaces.items():
        for name, ratio in ratios.items():
            if ratio is not None:
                rows.append((f"{space}: {name}", ratio))
    rows.reverse()  # the first on top
    label = "samples relative to real vs real (1: as good as real items)"
    figure, axes = chart(1 + 0.32 * len(rows), xlabel=label, xscale="log")
    for y, (_, ratio) in enumerate(rows):
        least = max(ratio.value / 4, 1e-3)  # an interval may reach 0, a log axis cannot
        low, high = ratio.interval
        axes.plot([max(low, least), max(high, least)], [y, y], color="tab:blue")
        axes.plot(max(ratio.value, 1e-3), y, "o", color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=False, axis="y")
    return figure


def histogram(
    counts,  # name of a set of items -> how many are in each class, (classes,)
    names,  # of the classes
):
    """A Figure of how many items of each set are in each class."""
    figure, axes = chart(3.5, ylabel="items")
    axes.grid(visible=False)
    width = 0.8 / len(counts)
    for i, (label, heights) in enumerate(counts.items()):
        axes.bar(np.arange(len(heights)) + i * width, heights, width, label=label)
    rotation = 45 if len(names) > 5 else 0
    axes.set_xticks(np.arange(len(names)) + width / 2, names, rotation=rotation)
    axes.legend()
    return figure


def neighbors(
    items,  # uint8 (N, C, H, W) or points (N, 2)
    nearest,  # the same: the nearest other item of each
):
    """Each item with its nearest neighbor: pairs in a grid, or points joined by lines."""
    items = np.asarray(items)
    nearest = np.asarray(nearest)
    if items.ndim == 4:
        pairs = np.stack([items, nearest], axis=1)  # (N, 2, C, H, W)
        return grid(pairs.reshape(-1, *items.shape[1:]), columns=8)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for a, b in zip(items, nearest, strict=True):
        axes.plot([a[0], b[0]], [a[1], b[1]], "o-", markersize=3)
    axes.set(aspect="equal")
    return to_pil(figure)


def schedule_curve(
    t,  # (T,) in [0, 1]
    log_snr,  # (T,)
    rows,  # of the noise levels: (log_snr, fraction of training items, weight in the loss)
):
    """A Figure of log-SNR against t, and of how much each noise level counts in training."""
    levels, fractions, weights = np.array(rows).T
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(t, log_snr)
    left.set(xlabel="t", ylabel="log-SNR", title="noise schedule")
    right.step(
        levels, weights / weights.max(), where="mid", label="effective weight of |v_hat - v|²"
    )
    right.step(levels, fractions / fractions.max(), where="mid", label="fraction of training items")
    right.set(
        xlabel=LOG_SNR_LABEL, ylabel="relative to its maximum", title="noise levels in training"
    )
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def side_by_side(images, titles):
    """PIL images in a row on white, as they are, each under its title."""
    images = list(images)
    width = sum(image.width + MARGIN for image in images) + MARGIN
    height = max(image.height for image in images) + 2 * MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    left = MARGIN
    for image, title in zip(images, titles, strict=True):
        canvas.paste(image, (left, MARGIN + MARGIN // 2))
        ImageDraw.Draw(canvas).text((left, 8), title, fill="black", font_size=16)
        left += image.width + MARGIN
    return canvas


def save_animation(frames, path):
    """Write PIL images as a looping GIF that rests on the last."""
    duration = [60] * (len(frames) - 1) + [2000]  # milliseconds
    first, *rest = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
