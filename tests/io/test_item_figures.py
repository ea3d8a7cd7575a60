"""Figures of items of any kind: what is shown, and on which scale."""

import numpy as np
import pytest
import torch

from ddp.io.item_figures import (
    MAX_LINES,
    SEQUENCES,
    channel_range,
    components,
    displayed,
    draw_items,
    lines,
    neighbors,
    num_images,
    room,
    tiling,
    values,
)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape)


KINDS = [(1, 8, 8), (2, 8, 8), (3, 8, 8), (4, 8, 8), (20, 8, 8), (1, 30), (6, 30), (1,), (2,), (9,)]


@pytest.mark.parametrize("event", KINDS)
def test_every_kind_is_shown_beside_the_data(event):
    items, reference = normal(5, *event), normal(7, *event, seed=1)
    alone = draw_items(items)
    both = draw_items(items, reference)
    assert alone.mode == both.mode == "RGB"
    assert both.width >= alone.width
    assert np.asarray(both).std() > 0
    assert neighbors(items, reference[:5]).width > 50
    assert room(event) >= 16


# ---- images ----


def test_floats_are_shown_between_percentiles_of_the_data_in_any_unit():
    data = np.linspace(0, 1, 1001).reshape(1, 1, 1, 1001)
    shown = displayed(data, data)
    assert (shown == 0).mean() == pytest.approx(0.01, abs=0.002)
    assert (shown == 255).mean() == pytest.approx(0.01, abs=0.002)
    other = displayed(1e5 + 300 * data, 1e5 + 300 * data).astype(int)
    assert abs(other - shown).max() <= 1
    assert displayed(data - 9, data).max() == 0  # what lies beyond


def test_each_channel_has_its_own_scale():
    data = normal(50, 3, 4, 4)
    scale = np.array([1, 1e-3, 1e5])[:, None, None]
    difference = displayed(data, data).astype(int) - displayed(data * scale + 7, data * scale + 7)
    assert abs(difference).max() <= 1


def test_mostly_one_value_and_constants_have_a_range():
    mostly = np.zeros((1, 2, 1000))
    mostly[0, 0, 0] = 5
    low, high = channel_range(mostly)
    assert (low.tolist(), high.tolist()) == ([0, -0.5], [5, 0.5])


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (5, (2, 3))]
)
def test_channels_are_tiles_in_their_order(channels, expected):
    rows, columns = tiling(channels)
    assert (rows, columns) == expected
    images = torch.arange(channels, dtype=torch.uint8)[None, :, None, None].expand(1, -1, 3, 4)
    shown = displayed(images, None)
    assert shown.shape == (1, 1, 3 * rows, 4 * columns)
    of_tiles = shown[0, 0, ::3, ::4].ravel()
    assert of_tiles.tolist() == [*range(channels)] + [0] * (rows * columns - channels)


def test_pixels_are_shown_as_they_are():
    images = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)
    assert (displayed(images, None) == images.numpy()).all()
    assert num_images((4, 48, 48), 10**6) < num_images((1, 48, 48), 10**6) / 3


# ---- sequences and points ----


def test_sequences_have_a_panel_each_and_their_units():
    sequences = 100 + normal(40, 1, 25)
    figure = lines([sequences, sequences], ("samples", "data"), None, sequences)
    panels = figure.get_axes()
    assert len(panels) == 2 * SEQUENCES
    assert (panels[0].lines[0].get_ydata() == sequences[0, 0]).all()
    low, high = panels[0].get_ylim()
    assert 90 < low < 100 < high < 110


def test_channels_of_unlike_units_are_scaled_each_and_said_so():
    sequences = normal(16, 6, 25) * np.array([1, 1e4, 1, 1, 1, 1])[:, None]
    figure = lines([sequences], ("samples",), None, sequences)
    panel = figure.get_axes()[0]
    assert len(panel.lines) == MAX_LINES
    assert panel.get_ylim() == pytest.approx((-0.3, 1.3))
    texts = [part.get_suptitle() + part._supylabel.get_text() for part in figure.subfigs]
    assert "4 of 6 channels" in texts[0]
    assert "percentile" in texts[0]


def test_a_histogram_has_the_area_of_what_it_shows():
    numbers = normal(1000, 1)
    figure = values([numbers, numbers], ("samples", "data"), numbers)
    corners = figure.axes[0].patches[0].get_xy()
    width = np.diff(np.unique(corners[:, 0]))[0]
    heights = figure.axes[0].patches[0].get_xy()[1:-1:2, 1]
    assert width * heights.sum() == pytest.approx(1, abs=0.02)


def test_components_do_not_make_the_data_look_wider_than_new_points():
    figure = components(
        [normal(400, 300), normal(400, 300, seed=1)], ("a", "b"), normal(400, 300, seed=1)
    )
    spread = [np.std(axes.collections[0].get_offsets()) for axes in figure.axes[:2]]
    assert spread[1] / spread[0] == pytest.approx(1, abs=0.2)


def test_components_see_two_clusters_in_any_units():
    side = np.sign(normal(600, 1))
    data = (side @ np.ones((1, 12)) * 3 + normal(600, 12, seed=1)) * np.logspace(-3, 3, 12)
    figure = components([data, data], ("a", "b"), data)
    first = figure.axes[0].collections[0].get_offsets()[:, 0]
    assert abs(np.corrcoef(first, side[:, 0])[0, 1]) > 0.95
    mean, std = (line.get_ydata() for line in figure.axes[-1].lines[:2])
    assert mean == pytest.approx(np.zeros(12), abs=1e-9)
    assert std == pytest.approx(np.ones(12))
