"""The data's own units: there and back, and moments of what comes in pieces."""

import numpy as np
import pytest
import torch

from ddp.data import Dataset
from ddp.model import DiffusionModel
from ddp.schedule import Schedule
from ddp.units import Moments, Units

EVENTS = [(3,), (3, 5), (3, 4, 5)]
UNITS = Units(torch.tensor([-2.0, 0.0, 1e4]), torch.tensor([0.5, 1.0, 30.0]))


@pytest.mark.parametrize("event", EVENTS)
def test_restore_undoes_standardize(event):
    x0 = torch.randn(7, *event)
    items = UNITS.restore(x0)
    assert items.dtype == torch.float32
    torch.testing.assert_close(UNITS.standardize(items), x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(items[:, 0], x0[:, 0] * 0.5 - 2)  # channel by channel
    assert torch.equal(UNITS.standardize(items)[3], UNITS.standardize(items[3:4])[0])


def test_float64_is_centered_before_its_digits_are_cut():
    items = 1e9 + torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    units = Units(torch.tensor([1e9]), torch.tensor([1.0]))
    assert units.standardize(items).flatten().tolist() == [0, 1, 2]


def test_what_was_given_stays_as_it_is():
    for items in (torch.randn(4, 3), torch.randn(4, 3).double()):
        before = items.clone()
        UNITS.standardize(items)
        UNITS.restore(items)
        assert torch.equal(items, before)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 0, 17, 13)])
def test_moments_of_pieces_are_those_of_the_whole(event, sizes):
    items = 1e6 + np.random.RandomState(0).randn(50, *event)  # far from 0, where squares lose all
    moments = Moments()
    start = 0
    for size in sizes:
        moments.add(items[start : start + size])
        start += size
    units = moments.units()
    axes = (0, *range(2, items.ndim))
    assert np.allclose(units.mean, items.mean(axis=axes), rtol=1e-7)
    assert np.allclose(units.std, items.std(axis=axes), rtol=1e-6)


def test_constant_channel_has_std_1():
    for value in (0.0, 1.0, 0.1, -1e-30, 12345.678):
        moments = Moments()
        for _ in range(3):
            moments.add(np.full((1000, 1), value))
        assert moments.units().std.tolist() == [1]


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.0], [0.0]), ([0.0], [-1.0]), ([np.nan], [1.0]), ([0.0], [np.inf]), ([0.0, 0.0], [1.0])],
)
def test_units_that_are_none_are_refused(mean, std):
    with pytest.raises(ValueError, match="units: expected a finite mean and std > 0"):
        Units(torch.tensor(mean), torch.tensor(std))


def test_numbers_beyond_float32_are_refused():
    moments = Moments()
    moments.add(np.array([[1e300], [-1e300]]))
    with pytest.raises(ValueError, match="float32"):
        moments.units()


def test_pixels_are_images_without_units():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert Dataset("a", images, images).is_pixels
    assert not Dataset("a", images.float(), images.float(), units=UNITS).is_pixels
    assert not Dataset("a", images[:, 0].float(), images[:, 0].float()).is_pixels
    network = torch.nn.Identity()
    assert DiffusionModel(Schedule(), network, event=(3, 8, 8)).is_pixels
    model = DiffusionModel(Schedule(), network, event=(3, 8, 8), units=UNITS)
    assert not model.is_pixels
    assert model.is_image


def test_model_refuses_units_of_other_channels():
    with pytest.raises(ValueError, match="of 3 channels, items of 1"):
        DiffusionModel(Schedule(), torch.nn.Identity(), event=(1, 8, 8), units=UNITS)
