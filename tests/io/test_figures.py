"""Figures: every pixel and every line is where it belongs."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddp.io import figures, item_figures


@pytest.mark.parametrize("event", [(1, 8, 8), (3, 30, 45), (1, 100, 20)])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_grid_shows_every_image_enlarged_without_blur(event, count):
    images = torch.randint(256, (count, *event), dtype=torch.uint8)
    canvas = np.asarray(figures.grid(images))
    cell = {1: 192, 5: 64, 9: 64}[count]  # pixels of an image: few are larger
    k = max(1, round(cell / max(event[1:])))  # pixels for one pixel, in each direction
    height = event[1] * k + 2
    width = event[2] * k + 2
    columns = (canvas.shape[1] - 2) // width
    for i in range(count):
        top = (i // columns) * height + 2
        left = (i % columns) * width + 2
        cell = canvas[top : top + height - 2, left : left + width - 2]
        expected = images[i].permute(1, 2, 0).expand(-1, -1, 3)
        assert (cell[::k, ::k] == expected.numpy()).all()
        assert (cell[k - 1 :: k, k - 1 :: k] == expected.numpy()).all()
    assert (canvas[0] == figures.GAP_COLOR).all()


def test_grid_enlarges_an_eight_by_eight_digit():
    assert figures.grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).width >= 48


def test_grid_has_the_columns_asked_for():
    images = torch.zeros(6, 1, 48, 48, dtype=torch.uint8)
    assert figures.grid(images, columns=6).size == (6 * 50 + 2, 50 + 2)
    assert figures.grid(images, columns=2).size == (2 * 50 + 2, 3 * 50 + 2)


def test_scatter_puts_both_clouds_on_the_same_axes():
    figure = figures.scatter(torch.randn(50, 2), torch.randn(70, 2) * 3)
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() == left.get_ylim()
    assert "50" in left.get_title()
    assert "70" in right.get_title()
    assert figures.to_pil(figure).width > figures.to_pil(figure).height


@pytest.mark.parametrize("reference", [None, torch.randn(70, 2)])
def test_titles_of_a_scatter_are_within_the_image(reference):
    figure = figures.scatter(torch.randn(50, 2), reference)
    image = np.asarray(figures.to_pil(figure))
    assert (image[0] == 255).all()
    for axes in figure.axes:
        assert axes.title.get_window_extent().y1 < figure.bbox.height


def test_titles_of_narrow_grids_do_not_overlap():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    both = np.asarray(item_figures.draw_items(image, image, ("reconstructed", "given")))
    heading = (both[: figures.MARGIN] < 255).any(axis=(0, 2))  # (W,) where a title's letters are
    gaps = np.diff(np.flatnonzero(heading))
    assert gaps.max() > 10  # between the titles


# ---- names that anybody chose ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cat"),
        ("$x$", r"\$x\$"),
        ("$\\frac{", r"\$\frac{"),
        ("a\n b\t", "a b "),
        ("\x1b[2J", "?[2J"),
        ("x" * 100, "x" * 32 + "..."),
        (7, "7"),
    ],
)
def test_plain(name, expected):
    assert figures.plain(name) == expected


NAMES = ["$\\frac{", "$x$ and $", "\x1b[2J\x00", "a" * 10_000, "中文", "$" * 99, "\\$a$"]


def test_charts_show_any_name():
    counts = {name: np.arange(len(NAMES)) for name in NAMES}
    figure = figures.histogram(counts, NAMES)
    assert figures.to_pil(figure).width == 560
    assert figure.axes[0].get_xticklabels()[0].get_text() == r"\$\frac{"
    ratio = SimpleNamespace(value=1.0, interval=(0.5, 2.0))
    figure = figures.metric_ratios({name: {name: ratio} for name in NAMES})
    assert len(figure.axes[0].get_yticklabels()) == len(NAMES)
    assert figures.to_pil(figure).width == 560
    assert figures.to_pil(figures.scatter(torch.randn(5, 2), titles=("$x$ $",))).width == 400


def test_names_that_begin_alike_have_a_line_each():
    ratio = SimpleNamespace(value=1.0, interval=(0.5, 2.0))
    metrics = {"x" * 100 + end: ratio for end in "ab"}
    assert len(figures.metric_ratios({"space": metrics}).axes[0].get_yticklabels()) == 2


# ---- files ----


def test_a_figure_says_who_drew_it(tmp_path):
    """So that it is never taken for data."""
    image = figures.grid(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8))
    for file in (tmp_path / "grid.png", io.BytesIO()):
        figures.save_png(image, file)
        with Image.open(file) as read:
            assert read.text["Software"].startswith("ddp ")
            assert (np.asarray(read) == np.asarray(image)).all()


@pytest.mark.parametrize("event", [(1, 8, 8), (3, 64, 64), (3, 300, 200), (1, 4000, 1)])
def test_num_fitting_is_what_a_grid_shows_in_so_many_pixels(event):
    count = figures.num_fitting(event, 10**6)
    canvas = figures.grid(torch.zeros(count, *event, dtype=torch.uint8), columns=count)
    gap = figures.GAP
    assert (canvas.width - gap) * (canvas.height - gap) <= 10**6
    assert figures.num_fitting((3, 10**4, 10**4), 10**6) == 1


def test_to_pil_passes_images_through():
    image = Image.new("RGB", (3, 4))
    assert figures.to_pil(image) is image


def test_grid_or_scatter_shows_the_reference_on_the_right():
    images = torch.randint(256, (4, 1, 48, 48), dtype=torch.uint8)
    alone = item_figures.draw_items(images)
    both = np.asarray(item_figures.draw_items(images, 255 - images))
    margin = figures.MARGIN
    top = margin + margin // 2
    for left, expected in (
        (margin, alone),
        (2 * margin + alone.width, figures.grid(255 - images)),
    ):
        pasted = both[top : top + alone.height, left : left + alone.width]
        assert (pasted == np.asarray(expected)).all()
    assert isinstance(item_figures.draw_items(torch.randn(9, 2), torch.randn(9, 2)), Image.Image)


def test_neighbors_are_pairs():
    items = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    nearest = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    pairs = torch.stack([items, nearest], dim=1).flatten(0, 1)
    expected = figures.grid(pairs, 8, ["sample", "nearest"] * 4)
    assert (np.asarray(item_figures.neighbors(items, nearest)) == np.asarray(expected)).all()
    assert item_figures.neighbors(torch.randn(3, 2), torch.randn(3, 2)).width > 100


@pytest.mark.parametrize("name", ["val_loss", "test_loss"])  # the latter before version 0.3
def test_loss_curve_has_train_and_held_out(name):
    rows = [
        {"step": str(i), "loss": "0.5", name: "0.4" if i % 5 == 0 else ""} for i in range(1, 21)
    ]
    (axes,) = figures.loss_curve(rows).axes
    raw, smooth, held_out = axes.get_lines()
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 20
    np.testing.assert_allclose(smooth.get_ydata(), 0.5)
    assert held_out.get_xdata().tolist() == [5, 10, 15, 20]


def test_loss_curve_of_a_log_without_a_held_out_loss():
    (axes,) = figures.loss_curve([{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "1"}]).axes
    assert len(axes.get_lines()) == 2


def test_loss_curve_smooths_by_a_moving_average():
    loss = np.arange(1.0, 201.0)
    rows = [{"step": str(i), "loss": str(value), "val_loss": ""} for i, value in enumerate(loss, 1)]
    (axes,) = figures.loss_curve(rows).axes
    smooth = axes.get_lines()[1].get_ydata()
    np.testing.assert_allclose(smooth[10:], loss[10:] - 1.5)  # a window of 4 lags by 1.5


def test_loss_by_level_has_the_three_units():
    estimate = SimpleNamespace(value=0.5, error=0.1)
    units = {"x0": estimate, "eps": estimate, "v": estimate}
    levels = {str(level): {"log_snr": level, **units} for level in (-4.0, 0.0, 4.0)}
    (axes,) = figures.loss_by_level(levels).axes
    assert [label.get_text() for label in axes.get_legend().get_texts()] == [
        "x0 units",
        "eps units",
        "v units",
    ]
    assert axes.get_yscale() == "log"


def test_metric_ratios_show_intervals_that_reach_zero():
    spaces = {
        "pixels": {"fd": SimpleNamespace(value=2.0, interval=(1.5, 3.0)), "kid": None},
        "inception": {"fid": SimpleNamespace(value=0.5, interval=(-1.0, 1.0))},
    }
    (axes,) = figures.metric_ratios(spaces).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["inception: fid", "pixels: fd"]  # from the bottom
    low = axes.get_lines()[0].get_xdata()
    assert low.tolist() == [0.125, 1.0]  # a quarter of the value, where the interval reaches zero
    assert figures.to_pil(axes.figure).width > 100


def test_histogram_has_a_bar_for_each_class_of_each_set():
    counts = {"samples": np.array([3, 1, 2]), "data": np.array([2, 2, 2])}
    (axes,) = figures.histogram(counts, ["a", "b", "c"]).axes
    assert [bar.get_height() for bar in axes.patches] == [3, 1, 2, 2, 2, 2]


def test_schedule_curve_scales_to_the_maximum():
    rows = [(-3.0, 0.2, 0.5), (0.0, 0.5, 0.25), (3.0, 0.3, 0.1)]
    left, right = figures.schedule_curve([0.0, 1.0], [5.0, -5.0], rows).axes
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), [5.0, -5.0])
    weights, fractions = right.get_lines()
    np.testing.assert_allclose(weights.get_ydata(), [1.0, 0.5, 0.2])
    np.testing.assert_allclose(fractions.get_ydata(), [0.4, 1.0, 0.6])


def test_save_animation_rests_on_the_last_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(4)]
    figures.save_animation(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 4
        assert animation.info["loop"] == 0
        animation.seek(3)
        assert animation.info["duration"] == 2000


def test_captions_stand_above_the_columns_and_empty_cells_are_white():
    images = np.zeros((5, 1, 48, 48), np.uint8)
    plain = np.asarray(figures.grid(images, columns=3))
    captioned = np.asarray(figures.grid(images, columns=3, captions=["a", "bb", "c" * 90]))
    top = figures.CAPTION_HEIGHT
    assert (captioned[top:] == plain).all()
    for column in range(3):  # each has a text of its own
        assert (captioned[:top, column * 66 : (column + 1) * 66] != 255).any()
    assert (plain[-40:, -40:] == 255).all()
    assert (plain[-30:-10, 10:30] == 0).all()


def test_names_stand_left_of_the_rows():
    images = np.zeros((4, 1, 48, 48), np.uint8)
    plain = np.asarray(figures.grid(images, columns=2))
    named = np.asarray(figures.grid(images, columns=2, names=["a", "bb" * 90]))
    side = named.shape[1] - plain.shape[1]
    assert (named[:, side:] == plain).all()
    assert figures.MAX_NAME_PIXELS / 2 < side <= figures.MAX_NAME_PIXELS + 3 * figures.GAP
    for row in range(2):
        assert (named[row * 50 : (row + 1) * 50, :side] != 255).any()


def test_points_are_darker_where_there_are_more():
    random = np.random.default_rng(0)
    many, few = random.normal(0, 0.1, (900, 2)), random.normal(3, 0.5, (100, 2))
    colors = figures.shades(np.concatenate([many, few]))  # (1000, 4)
    assert colors[:900].mean() < colors[900:].mean() - 0.05
    assert figures.shades(few) == "tab:blue"
    assert len(figures.shades(np.zeros((1000, 2)))) == 1000  # all in one place


def test_what_was_given_stands_left_of_what_came_of_it():
    items = np.zeros((1, 1, 48, 48), np.uint8)
    given = np.full((1, 1, 48, 48), 255, np.uint8)
    image = np.asarray(item_figures.draw_items(items, given, ("varied", "given"), given_first=True))
    middle = image[len(image) // 2]
    assert middle[:200].mean() > middle[-200:].mean()


def test_captions_are_of_the_samples_alone():
    items = np.zeros((4, 1, 48, 48), np.uint8)
    options = {"columns": 2, "captions": ("a", "b")}
    both = np.asarray(item_figures.draw_items(items, items, **options))
    top = both[figures.MARGIN + figures.MARGIN // 2 :][: figures.CAPTION_HEIGHT]  # below the titles
    half = both.shape[1] // 2
    assert (top[:, half:] == figures.GAP_COLOR).any()  # the reference begins here
    assert not (top[:, :half] == figures.GAP_COLOR).all(axis=2).any()
