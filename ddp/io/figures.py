"""Plots: image grids, scatters, curves, GIFs. Grids are PIL images, charts matplotlib Figures."""

import math
import re
import warnings

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

import ddp

MIN_CELL = 48  # pixels: smaller images are enlarged to about this, so that 8x8 digits can be read
FEW_PIXELS = 192  # pixels: the same of a grid of few images
GAP = 2  # pixels between the cells of a grid
GAP_COLOR = (96, 96, 128)  # neither black nor white, nor any gray
MARGIN = 24  # pixels around the images that stand side by side
TITLE_SIZE = 16  # pixels, of a letter
CAPTION_SIZE, CAPTION_HEIGHT = 12, 18  # pixels, of a letter and of the line above a column
MAX_NAME_PIXELS = 120  # of a text left of a row
MIN_SHADED, CELLS = 500, 40  # points, from which on their density is seen; cells a side, for that
MAX_LABEL = 32  # characters of a name in a chart
# of Okabe and Ito: color-blind people can tell them apart, and most are told apart in gray
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
LOG_SNR_LABEL = "log-SNR (noise on the left, data on the right)"


def save_png(image, path):
    """Write a PIL image that this project drew as a PNG which says so: it is never data."""
    software = PngInfo()
    software.add_text("Software", f"ddp {ddp.__version__}")
    image.save(path, "PNG", pnginfo=software)


def plain(name):
    """Return a name that anybody chose, such as a class's, as text for a chart.

    Matplotlib would take what is between two $ for a formula, and give up where it is none."""
    name = re.sub(r"\s+", " ", str(name))
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    name = name if len(name) <= MAX_LABEL else name[:MAX_LABEL] + "..."
    return name.replace("$", r"\$")


def pitch(height, width, count=100):
    """Return (k, y, x) of a grid's cells: k pixels for one of the image, in each direction; y and
    x pixels from one cell to the next. Of few images the cells are larger."""
    cell = max(MIN_CELL, FEW_PIXELS / math.ceil(math.sqrt(count)))
    k = max(1, round(cell / max(height, width)))
    return k, height * k + GAP, width * k + GAP


def num_fitting(event, pixels):
    """Return how many images of shape (C, H, W) a grid of so many pixels shows, at least 1."""
    _, pitch_y, pitch_x = pitch(*event[1:])
    return max(1, pixels // (pitch_y * pitch_x))


def grid(images, columns=None, captions=(), names=()):
    """Return one PIL image of uint8 images (N, C, H, W), row by row, enlarged by whole pixels.

    captions: a text above each column, one for all, or none; names: the same left of each row."""
    images = np.asarray(images)
    count, channels, height, width = images.shape
    k, pitch_y, pitch_x = pitch(height, width) if columns else pitch(height, width, count)
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    font = ImageFont.load_default(CAPTION_SIZE)
    names = [fitting(name, font, MAX_NAME_PIXELS) for name in names]
    side = max((math.ceil(font.getlength(name)) + 3 * GAP for name in names), default=0)
    top = CAPTION_HEIGHT if captions else 0
    size = (side + columns * pitch_x + GAP, top + rows * pitch_y + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        caption = fitting(caption, font, pitch_x if len(captions) > 1 else canvas.width)
        draw.text((side + GAP + column * pitch_x, 2), caption, fill="black", font=font)
    for row, name in enumerate(names):
        middle = top + row * pitch_y + pitch_y // 2
        draw.text((GAP, middle), name, fill="black", font=font, anchor="lm")
    for i, image in enumerate(images):
        left, upper = side + i % columns * pitch_x, top + i // columns * pitch_y
        around = (left, upper, left + pitch_x + GAP - 1, upper + pitch_y + GAP - 1)
        draw.rectangle(around, fill=GAP_COLOR)  # a cell without an image stays white
        image = image.repeat(3 // channels, axis=0)  # (3, H, W): gray becomes RGB
        cell = Image.fromarray(image.transpose(1, 2, 0))
        cell = ImageOps.scale(cell, k, Image.Resampling.NEAREST)
        canvas.paste(cell, (GAP + left, GAP + upper))
    return canvas


def fitting(text, font, width):
    """Return as much of a text as fits into a width, in pixels, on one line."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def side_by_side(images, titles):
    """Return PIL images in a row on white, as they are, each under its title."""
    font = ImageFont.load_default(TITLE_SIZE)
    texts = [math.ceil(font.getlength(title)) for title in titles]
    widths = [max(image.width, text) for image, text in zip(images, texts, strict=True)]
    height = max(image.height for image in images) + 2 * MARGIN
    canvas = Image.new("RGB", (sum(widths) + MARGIN * (len(widths) + 1), height), "white")
    left = MARGIN
    for image, title, width in zip(images, titles, widths, strict=True):
        canvas.paste(image, (left, MARGIN + MARGIN // 2))
        ImageDraw.Draw(canvas).text((left, 8), title, fill="black", font=font)
        left += width + MARGIN
    return canvas


def scatter(
    points,  # (N, 2)
    reference=None,  # (M, 2), shown right of them on the same axes
    titles=("samples", "data"),
    like=None,  # (K, 2), the points that fix the axes; default: the reference, or the points
    labels=("", ""),  # of the axes
    spare=0,  # panels for others to fill, on the right
):
    """Return a Figure of points and of a reference."""
    clouds = [points] if reference is None else [points, reference]
    count = len(clouds) + spare
    figure = Figure(figsize=(5 * count, 5), layout="compressed")  # for a fixed aspect
    panels = figure.subplots(1, count, squeeze=False)[0]
    settings = plane_axes(np.asarray(clouds[-1] if like is None else like))
    settings |= {"xlabel": labels[0], "ylabel": labels[1]}
    for axes, title, cloud in zip(panels, titles, clouds, strict=False):  # the title may be spare
        cloud = np.asarray(cloud)
        axes.scatter(*cloud.T, s=marker_size(len(cloud)), linewidths=0, c=shades(cloud))
        axes.set(**settings, title=f"{plain(title)} ({len(cloud):,})")
    return figure


def marker_size(count):
    """Return the area of each of so many points, smaller where there are many."""
    return min(20.0, 4000 / max(1, count) + 0.8)


def shades(points):
    """Return the color of each of the points (N, 2): the darker, the more points lie near it.

    Near is the same cell of a grid; few points, of which this would say little, are dark."""
    if len(points) < MIN_SHADED:
        return "tab:blue"
    low, high = np.percentile(points, (1, 99), axis=0)  # (2,) each: strays get no cells
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    cells = (scaled * CELLS).clip(0, CELLS - 1).astype(int)  # (N, 2)
    _, cell, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    share = counts[cell.reshape(-1)] / np.percentile(counts, 95)
    return colormaps["Blues"](0.4 + 0.6 * share.clip(0, 1))  # (N, 4)


def plane_axes(points):
    """Return the limits and the aspect of axes for points (N, 2): strays of a model lie beyond.

    A square about 0 or, of points that would fill little of that, a box around them."""
    low, high = points.min(axis=0), points.max(axis=0)  # (2,) each
    limit = np.abs(points).max() * 1.15 or 1.0
    if 2 * (high - low).min() > limit or limit == 1.0:
        return {"xlim": (-limit, limit), "ylim": (-limit, limit), "aspect": "equal"}
    margin = 0.15 * (high - low)
    margin = np.where(margin > 0, margin, 1.0)
    (left, bottom), (right, top) = low - margin, high + margin
    return {"xlim": (left, right), "ylim": (bottom, top), "box_aspect": 1}


def to_pil(figure):
    """Return a Figure as a PIL image; a PIL image as it is."""
    if isinstance(figure, Image.Image):
        return figure
    figure.set_dpi(80)  # 560 pixels for the 7 inches of a chart
    canvas = FigureCanvasAgg(figure)  # draws in memory, without pyplot and its global state
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks becomes a box
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


class PlainNumbers(LogFormatter):
    """Ticks of a logarithmic axis as 0.2, not as a power of ten."""

    def _num_to_string(self, x, vmin, vmax):
        return f"{x:g}"


def chart(height, **settings):
    """Return a Figure of one plot with grid lines, and its axes; `settings` as of Axes.set."""
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.set(**settings)
    if settings.get("yscale") == "log":
        axes.yaxis.set_major_formatter(PlainNumbers())
        axes.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(2, 0.5)))
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, *range(2, 10))))
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def loss_curve(rows):
    """Return a Figure of the training loss, raw and smoothed, and that of held-out items.

    rows: of log.csv; before version 0.3 the latter was of test items."""
    steps, loss = np.array([(row["step"], row["loss"]) for row in rows], float).T  # (N,) each
    window = max(1, len(loss) // 50)
    total = np.cumsum(np.pad(loss, (window, 0), mode="edge"))
    smooth = (total[window:] - total[:-window]) / window  # moving average, as long as loss
    figure, axes = chart(4.5, xlabel="step", ylabel="loss", yscale="log")
    axes.plot(steps, loss, color="tab:blue", alpha=0.2, linewidth=0.7)
    axes.plot(steps, smooth, color="tab:blue", label=f"train (mean of {window})")
    held_out = [(row["step"], row.get("val_loss") or row.get("test_loss")) for row in rows]
    held_out = [pair for pair in held_out if pair[1]]  # at each save
    if held_out:
        x, y = np.array(held_out, float).T
        axes.plot(x, y, "o-", color="tab:orange", markersize=4, label="held out (EMA)")
    figure.legend(loc="outside upper center", ncols=2)  # not over the curves
    return figure


def overlaid_losses(curves, xlabel):
    """Return a Figure of the losses of held-out items of groups of runs, over each other.

    curves: name of a group -> a list of (x, loss), (N,) each, of a training each."""
    figure, axes = chart(4.5, xlabel=xlabel, ylabel="loss of held-out items", yscale="log")
    for i, (name, trainings) in enumerate(curves.items()):
        color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
        for k, (x, loss) in enumerate(trainings):
            label = plain(name) if k == 0 else None
            axes.plot(x, loss, style, color=color, linewidth=1.2, marker=".", label=label)
    axes.legend()
    return figure


def rate_curve(rows):
    """Return a Figure of the learning rate and of the norm of the gradient; rows: of log.csv."""
    names = ("step", "lr", "grad_norm")
    steps, lr, norm = np.array([[row[name] for name in names] for row in rows], float).T
    figure, axes = chart(4.5, xlabel="step", ylabel="learning rate")
    axes.plot(steps, lr, color="tab:blue", label="learning rate")
    other = axes.twinx()
    other.plot(steps, norm, color="tab:orange", linewidth=0.7, label="norm of the gradient")
    other.set_ylabel("norm of the gradient")
    other.set_yscale("log")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def loss_by_level(levels):
    """Return a Figure of the test loss against the noise level, in the units of x0, eps and v.

    The values of `levels` are dicts: log_snr, and an Estimate for each unit."""
    rows = levels.values()
    log_snr = [row["log_snr"] for row in rows]
    figure, axes = chart(4.5, xlabel=LOG_SNR_LABEL, ylabel="test loss", yscale="log")
    for unit in ("x0", "eps", "v"):
        values = [row[unit].value for row in rows]
        errors = [row[unit].error for row in rows]
        axes.errorbar(log_snr, values, errors, marker="o", markersize=4, label=f"{unit} units")
    axes.legend()
    return figure


def metric_ratios(spaces):
    """Return a Figure of each metric relative to its real-vs-real value, with its 95% interval.

    spaces: feature space -> metric -> Estimate of the ratio, or None."""
    rows = {}
    for space, ratios in spaces.items():
        for name, ratio in ratios.items():
            if ratio is not None:
                rows[f"{space}: {name}"] = ratio
    names = list(reversed(rows))  # the first on top
    label = "samples relative to real vs real (1: as good as real items)"
    figure, axes = chart(1 + 0.32 * len(rows), xlabel=label, xscale="log")
    for y, name in enumerate(names):
        value = rows[name].value
        least = max(value / 4, 1e-3)  # an interval may reach 0, a log axis cannot
        axes.plot(np.maximum(rows[name].interval, least), [y, y], color="tab:blue")
        axes.plot(max(value, 1e-3), y, "o", color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(rows)), [plain(name) for name in names]
    )  # y is the row, from the bottom
    low, high = axes.get_xlim()
    few = high < 5 * low  # which the marks 1, 2, 5, 10 would not tell
    axes.xaxis.set_major_locator(MaxNLocator(6) if few else LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=False, axis="y")
    return figure


def histogram(counts, names):
    """Return a Figure of how many items of each set are in each class.

    counts: name of a set -> (classes,); names: of the classes."""
    figure, axes = chart(3.5, ylabel="items")
    axes.grid(visible=False)  # bars need none
    width = 0.8 / len(counts)  # of a bar; 1 is from one class to the next
    x = np.arange(len(names))
    for i, (label, heights) in enumerate(counts.items()):
        axes.bar(x + i * width, heights, width, label=plain(label))
    rotation = 45 if len(names) > 5 else 0
    axes.set_xticks(x + width / 2, [plain(name) for name in names], rotation=rotation)
    axes.legend()
    return figure


def schedule_curve(t, log_snr, rows):
    """Return a Figure of log-SNR against t, and of how much each noise level counts in training.

    rows: (log_snr, fraction of training items, weight in the loss)."""
    levels, fractions, weights = np.array(rows).T  # (levels,) each
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(t, log_snr)
    left.set(xlabel="t", ylabel="log-SNR", title="noise schedule")
    curves = {"effective weight of |v_hat - v|²": weights, "fraction of training items": fractions}
    for (label, values), style in zip(curves.items(), ("-", "--"), strict=True):  # they may agree
        right.step(levels, values / values.max(), style, where="mid", label=label)
    right.set(xlabel=LOG_SNR_LABEL, title="noise levels in training")
    right.set(ylabel="relative to its maximum", ylim=(-0.05, 1.3))  # room for the legend
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def save_animation(frames, path, milliseconds=60):
    """Write PIL images as a looping GIF, so long each; it rests on the last."""
    duration = [milliseconds] * (len(frames) - 1) + [2000]
    first, *rest = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
