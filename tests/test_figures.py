"""Pictures of pictures: every pixel is where it belongs."""

import numpy as np
import pytest
import torch

from ddp import figures


@pytest.mark.parametrize("event", [(1, 8, 8), (3, 30, 45), (1, 100, 20)])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_grid_shows_every_picture_enlarged_without_blur(event, count):
    images = torch.randint(256, (count, *event), dtype=torch.uint8)
    canvas = np.asarray(figures.grid(images))
    k = figures.scale_for(*event[1:])
    height, width = event[1] * k + 2, event[2] * k + 2
    columns = (canvas.shape[1] - 2) // width
    for i in range(count):
        top, left = (i // columns) * height + 2, (i % columns) * width + 2
        cell = canvas[top : top + height - 2, left : left + width - 2]
        expected = images[i].permute(1, 2, 0).expand(-1, -1, 3)
        assert (cell[::k, ::k] == expected.numpy()).all()
        assert (cell[k - 1 :: k, k - 1 :: k] == expected.numpy()).all()
    assert (canvas[0] == figures.LINE).all()  # a separator


def test_an_eight_by_eight_digit_can_be_read():
    assert figures.grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).width >= 48


def test_scatter_puts_both_clouds_on_the_same_axes():
    figure = figures.scatter(torch.randn(50, 2), torch.randn(70, 2) * 3)
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() == left.get_ylim()
    assert "50" in left.get_title()
    assert "70" in right.get_title()
    assert figures.image_of(figure).width > figures.image_of(figure).height


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
