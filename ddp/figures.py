"""What people look at: grids, scatters, curves, animations. Each returns a PIL image or a
Figure."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image, ImageDraw

CELL = 48  # pixels: pictures smaller than this are enlarged, so that an 8x8 digit can be read
LINE = (96, 96, 128)  # of the separators: neither black nor white, nor any grey


def scale_for(height, width):
    return max(1, round(CELL / max(height, width)))


def grid(images, columns=None):
    """uint8 (N, C, H, W) -> one picture, row by row, enlarged by whole pixels, with separators."""
    images = np.asarray(images)
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows, k, gap = -(-count // columns), scale_for(height, width), 2
    cells = images.repeat(k, axis=2).repeat(k, axis=3).transpose(0, 2, 3, 1)
    height, width = height * k, width * k
    canvas = np.empty((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), np.uint8)
    canvas[:] = LINE
    for i, cell in enumerate(cells):
        top, left = (
            n * (side + gap) + gap
            for n, side in zip(divmod(i, columns), (height, width), strict=True)
        )
        canvas[top : top + height, left : left + width] = cell
    return Image.fromarray(canvas)


def scatter(points, beside=None, titles=("samples", "data")):
    """Points (N, 2), beside others where they are given, on the same axes."""
    clouds = [points] if beside is None else [points, beside]
    panels = list(zip(titles, clouds, strict=False))
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    limit = np.abs(np.asarray(panels[-1][1])).max() * 1.15 or 1.0
    for axes, (name, cloud) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        size = min(8.0, 4000 / max(1, len(cloud)) + 0.8)
        axes.scatter(*np.asarray(cloud).T, s=size, linewidths=0, alpha=0.6)
        axes.set(
            xlim=(-limit, limit),
            ylim=(-limit, limit),
            aspect="equal",
            title=f"{name} ({len(cloud):,})",
        )
    return figure


def overview(items, beside=None, titles=("samples", "data"), columns=None):
    """Items in one PIL image, `beside` others where they are given: grids of pictures (N, C, H, W),
    or scatters of points."""
    if items.ndim == 2:
        return image_of(scatter(items, beside, titles))
    if beside is None:
        return grid(items, columns)
    return side_by_side([grid(items, columns), grid(beside, columns)], titles)


def image_of(figure, dpi=80):
    """A Figure as a PIL image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def loss_curve(rows):
    """Training loss (raw, and smoothed) and test loss against the step. rows: dicts of log.csv."""
    steps = np.array([int(r["step"]) for r in rows])
    loss = np.array([float(r["loss"]) for r in rows])
    window = max(1, len(loss) // 50)
    total = np.cumsum(np.pad(loss, (window, 0), mode="edge"))
    smooth = (total[window:] - total[:-window]) / window
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, color="tab:blue", alpha=0.2, linewidth=0.7)
    axes.plot(steps, smooth, color="tab:blue", label=f"train (mean of {window})")
    tested = [(int(r["step"]), float(r["test_loss"])) for r in rows if r["test_loss"]]
    if tested:
        axes.plot(
            *zip(*tested, strict=True), "o-", color="tab:orange", markersize=4, label="test (EMA)"
        )
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def loss_by_level(levels):
    """Test loss against the noise level, in the three units. levels: of evaluation.loss."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    levels = list(levels.values())
    log_snr = [row["log_snr"] for row in levels]
    for unit in ("x0", "eps", "v"):
        values, errors = zip(*((row[unit].value, row[unit].error) for row in levels), strict=True)
        axes.errorbar(log_snr, values, errors, marker="o", markersize=4, label=f"{unit} units")
    axes.set(
        xlabel="log-SNR (noise on the left, data on the right)", ylabel="test loss", yscale="log"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def ratios(spaces):
    """Each measure over its floor, with its 95% interval. spaces: name -> measure -> Estimate."""
    rows = [
        (f"{space}: {name}", e) for space, found in spaces.items() for name, e in found.items() if e
    ]
    figure = Figure(figsize=(7, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (_, e) in enumerate(reversed(rows)):
        low, high = (max(end, e.value / 4, 1e-3) for end in e.interval)
        axes.plot([low, high], [y, y], color="tab:blue")
        axes.plot(max(e.value, 1e-3), y, "o", color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set(xscale="log", xlabel="samples over floor (1: as real items)")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both", axis="x")
    return figure


def histogram(counts, names):
    """How many samples and real items each class has. counts: name -> (classes,)."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(counts)
    for i, (name, heights) in enumerate(counts.items()):
        axes.bar(np.arange(len(heights)) + i * width, heights, width, label=name)
    axes.set_xticks(np.arange(len(names)) + width / 2, names, rotation=45 if len(names) > 5 else 0)
    axes.set(ylabel="items")
    axes.legend()
    return figure


def neighbours(items, nearest):
    """Items and, right of each, the nearest other: pairs in a grid, or points joined by lines."""
    if items.ndim == 4:
        pairs = np.stack([np.asarray(items), np.asarray(nearest)], axis=1)
        return grid(pairs.reshape(-1, *items.shape[1:]), columns=8)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for a, b in zip(np.asarray(items), np.asarray(nearest), strict=True):
        axes.plot(*zip(a, b, strict=True), "o-", markersize=3)
    axes.set(aspect="equal")
    return image_of(figure)


def schedule(t, log_snr, rows):
    """log-SNR against t, and how much each level counts. rows: (log_snr, share of levels,
    weight)."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(t, log_snr)
    left.set(xlabel="t", ylabel="log-SNR", title="schedule")
    levels, share, weight = zip(*rows, strict=True)
    right.step(levels, weight, where="mid", label="effective weight of |v_hat - v|²")
    right.step(levels, [s / max(share) for s in share], where="mid", label="levels drawn")
    right.set(xlabel="log-SNR (noise on the left, data on the right)", title="of the most, 1")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def side_by_side(pictures, titles):
    """PIL images in a row on white, as they are, each under its title."""
    pictures, margin = list(pictures), 24
    width = sum(p.width + margin for p in pictures) + margin
    canvas = Image.new("RGB", (width, max(p.height for p in pictures) + 2 * margin), "white")
    left = margin
    for picture, title in zip(pictures, titles, strict=True):
        canvas.paste(picture, (left, margin + margin // 2))
        ImageDraw.Draw(canvas).text((left, 8), title, fill="black", font_size=16)
        left += picture.width + margin
    return canvas


def save_animation(frames, path):
    """A looping GIF of PIL images that rests on the last."""
    duration = [60] * (len(frames) - 1) + [2000]
    frames = [f.quantize(64, dither=Image.Dither.NONE) for f in frames]
    frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0
    )
