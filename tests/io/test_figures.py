"""Figures: every pixel and every line is where it belongs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddp.io import figures


@pytest.mark.parametrize("event", [(1, 8, 8), (3, 30, 45), (1, 100, 20)])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_grid_shows_every_image_enlarged_without_blur(event, count):
    images = torch.randint(256, (count, *event), dtype=torch.uint8)
    canvas = np.asarray(figures.grid(images))
    k = max(1, round(48 / max(event[1:])))  # pixels for one pixel, in each direction
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


def test_to_pil_passes_images_through():
    image = Image.new("RGB", (3, 4))
    assert figures.to_pil(image) is image


def test_grid_or_scatter_shows_the_reference_on_the_right():
    images = torch.randint(256, (4, 1, 48, 48), dtype=torch.uint8)
    alone = figures.grid_or_scatter(images)
    both = np.asarray(figures.grid_or_scatter(images, 255 - images))
    margin = figures.MARGIN
    top = margin + margin // 2
    for left, expected in (
        (margin, alone),
        (2 * margin + alone.width, figures.grid(255 - images)),
    ):
        pasted = both[top : top + alone.height, left : left + alone.width]
        assert (pasted == np.asarray(expected)).all()
    assert isinstance(figures.grid_or_scatter(torch.randn(9, 2), torch.randn(9, 2)), Image.Image)


def test_neighbors_are_pairs():
    items = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    nearest = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    pairs = torch.stack([items, nearest], dim=1).flatten(0, 1)
    expected = figures.grid(pairs, columns=8)
    assert (np.asarray(figures.neighbors(items, nearest)) == np.asarray(expected)).all()
    assert figures.neighbors(torch.randn(3, 2), torch.randn(3, 2)).width > 100


def test_loss_curve_has_train_and_test():
    rows = [
        {"step": str(i), "loss": "0.5", "test_loss": "0.4" if i % 5 == 0 else ""}
        for i in range(1, 21)
    ]
    (axes,) = figures.loss_curve(rows).axes
    raw, smooth, test = axes.get_lines()
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 20
    np.testing.assert_allclose(smooth.get_ydata(), 0.5)
    assert test.get_xdata().tolist() == [5, 10, 15, 20]


def test_loss_curve_smooths_by_a_moving_average():
    loss = np.arange(1.0, 201.0)
    rows = [
        {"step": str(i), "loss": str(value), "test_loss": ""} for i, value in enumerate(loss, 1)
    ]
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
