"""What an edit works on, as the user's files have it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddp.io.edit_inputs import check_edit, grid_options, in_rows, read_edit_inputs
from ddp.options import SamplerOptions

EVENT = (1, 8, 8)
MODEL = SimpleNamespace(
    event=EVENT, is_pixels=True, units=None, schedule=SimpleNamespace(timesteps=None)
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """one.npy and two.npy, uint8 images; masks.npy for three."""
    monkeypatch.chdir(tmp_path)
    np.save("one.npy", np.zeros((1, 8, 8), np.uint8))
    np.save("two.npy", np.zeros((2, 8, 8), np.uint8))
    np.save("masks.npy", np.eye(8)[None].repeat(3, axis=0) > 0)


def read(name, path, steps=20, **given):
    return read_edit_inputs(MODEL, {"steps": steps}, steps, 0, name, path, **given)


@pytest.mark.usefixtures("files")
def test_edit_reads_one_item_or_more():
    inputs, count, summary = read("image", "one.npy")
    assert (count, summary) == (1, ["1 item in one.npy"])
    assert torch.equal(inputs.items, -torch.ones(1, *EVENT))
    assert read("image", "two.npy")[2] == ["2 items in two.npy"]


@pytest.mark.usefixtures("files")
def test_edit_refuses_masks_of_another_number():
    with pytest.raises(ValueError, match="3 masks for 1 item; give one, or one for each"):
        read("inpaint", "one.npy", mask="masks.npy")
    with pytest.raises(ValueError, match="3 masks for 2 items"):
        read("inpaint", "two.npy", mask="masks.npy")


@pytest.mark.usefixtures("files")
def test_edit_says_that_transparency_counts_as_white():
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 4, 8))
    image.save("mask.png")
    with pytest.raises(ValueError, match=r"mask=mask\.png.*transparent counts as white"):
        read("inpaint", "one.npy", mask="mask.png")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("steps", [1, 5])
def test_edit_refuses_a_jump_longer_than_the_way(steps):
    with pytest.raises(ValueError, match=f"fewer than the number of steps, {steps}"):
        read("inpaint", "one.npy", steps=steps, mask="masks.npy", jump_length=steps + 1)


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_edit_that_inverts_takes_ddim_alone(sampler):
    with pytest.raises(ValueError, match="reconstruct"):
        check_edit(SamplerOptions(sampler=sampler), "reconstruct", "x.npy")
    assert check_edit(SamplerOptions(), "reconstruct", "x.npy").sampler in ("ddim", None)


def test_samples_without_an_edit_are_64_and_of_points_more():
    inputs, count, lines = read_edit_inputs(MODEL, {"steps": 20}, 20, 0, None, None)
    assert (inputs.name, count, lines) == (None, 64, [])
    points = SimpleNamespace(event=(2,))
    assert read_edit_inputs(points, {"steps": 20}, 20, 0, None, None)[1] == 2000


def test_rows_are_full_where_there_is_one():
    assert [in_rows(64, columns) for columns in (None, 1, 10, 64, 65)] == [64, 64, 60, 64, 64]


def test_classes_have_a_column_each_where_there_is_room():
    assert grid_options(None, classes=["a", "b"]) == {"columns": 8, "captions": ["a", "b"] * 4}
    assert grid_options(None, classes=list("abcdef"), count=5)["captions"] == list("abcde")
    assert grid_options(None, classes=["a"]) == {"captions": ["a"]}  # over all
    assert grid_options(None, classes=["a", "b"], count=1) == {"captions": ["a"]}
    assert grid_options(None, classes=["a"] * 21) == {}
    assert "captions" not in grid_options("image", classes=["a", "b"])
    assert grid_options("image")["titles"][1] == "given"
