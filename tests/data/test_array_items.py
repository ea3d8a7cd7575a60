"""Arrays that a user gives to a model of floats: in the units of the data, as they are written."""

import numpy as np
import pytest
import torch

from ddp.data.arrays import load_mask, load_samples, read_items
from ddp.io.writer import SampleWriter
from ddp.units import Units


def units_of(channels):
    return Units(torch.arange(channels) * 100.0, torch.arange(1, channels + 1) * 3.0)


@pytest.mark.parametrize("event", [(4, 6, 5), (1, 6, 5), (2, 9), (1, 9), (7,)])
def test_what_was_written_is_read_again(tmp_path, event):
    units = units_of(event[0])
    x0 = torch.randn(5, *event)
    with SampleWriter(tmp_path / "s.npz", ["npz"], event, 5) as writer:
        writer.add(units.restore(x0))
    for read in (read_items, load_samples):
        items, (line,) = read(tmp_path / "s.npz", event, units)
        assert items == pytest.approx(x0, abs=1e-4)
        assert "5 items" in line


@pytest.mark.parametrize(
    ("event", "shape"), [((1, 6, 5), (3, 6, 5)), ((1, 9), (3, 9)), ((2, 9), (3, 9, 2))]
)
def test_other_orders_are_understood(tmp_path, event, shape):
    values = np.random.RandomState(0).randn(*shape)
    np.save(tmp_path / "a.npy", values)
    items, _ = read_items(tmp_path / "a.npy", event, units_of(event[0]))
    assert items.shape == (3, *event)
    first = values[0, ..., 0] if shape[-1] == 2 else values[0]
    expected = first / 3.0  # of channel 0: mean 0, std 3
    assert items[0, 0].numpy() == pytest.approx(expected, abs=1e-6)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 6, 5, 2)))
    with pytest.raises(ValueError, match=r"expected finite numbers .*\(N, 6, 5, 4\)"):
        read_items(tmp_path / "a.npy", (4, 6, 5), units_of(4))
    np.save(tmp_path / "a.npy", np.full((3, 7), np.nan))
    with pytest.raises(ValueError, match="finite"):
        read_items(tmp_path / "a.npy", (7,), units_of(7))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((9,), (1, 1, 9)), ((2, 9), (1, 2, 9)), ((5, 9), (5, 1, 9)), ((5, 2, 9), (5, 2, 9))],
)
def test_masks_of_sequences(tmp_path, shape, expected):
    mask = np.zeros(shape, bool)
    mask[..., :4] = True
    np.save(tmp_path / "mask.npy", mask)
    read = load_mask(tmp_path / "mask.npy", (2, 9))
    assert read.shape == expected
    assert read.expand(-1, 2, 9)[..., :4].all()
    assert not read[..., 4:].any()
