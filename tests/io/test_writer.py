"""The writer of samples: every format holds what came, whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddp.io.figures import grid
from ddp.io.writer import FORMATS, MAX_FRAMES, SampleWriter, parse_output

IMAGES = torch.randint(256, (12, 3, 8, 6), dtype=torch.uint8)
POINTS = torch.randn(12, 2)


def write(path, formats, items, reference=None, **options):
    """Write items in batches of 5, with their numbers as labels."""
    with SampleWriter(path, formats, items.shape[1:], len(items), reference, **options) as writer:
        labels = torch.arange(len(items))
        for batch, label in zip(items.split(5), labels.split(5), strict=True):
            writer.add(batch, labels=label, spread=None)
        if "gif" in formats:
            states = [items * 0, items, items]
            writer.animate(state[: writer.num_animated] for state in states)
    return writer.written


@pytest.mark.parametrize("items", [IMAGES, IMAGES[:, :1], POINTS])
def test_every_format_holds_the_items(tmp_path, items):
    written = write(tmp_path / "s", FORMATS, items)
    is_image = items.ndim == 4
    names = ["grid.png", "process.gif", "samples.npz"]
    names += [f"{i:06d}.png" for i in range(12)] if is_image else []
    assert [path.name for path in written] == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    with np.load(tmp_path / "s" / "samples.npz") as arrays:
        assert sorted(arrays) == sorted(["images" if is_image else "points", "labels"])
        assert arrays["labels"].tolist() == list(range(12))
        if is_image:
            expected = items.permute(0, 2, 3, 1).numpy()
            assert (arrays["images"] == expected).all()
        else:
            assert (arrays["points"] == items.numpy()).all()
    if is_image:
        for i, item in enumerate(expected):
            image = np.asarray(Image.open(tmp_path / "s" / f"{i:06d}.png"))
            assert (image.reshape(item.shape) == item).all()
        assert (
            np.asarray(Image.open(tmp_path / "s" / "grid.png")) == np.asarray(grid(items))
        ).all()
    with Image.open(tmp_path / "s" / "process.gif") as animation:
        assert animation.n_frames >= 2  # Pillow joins equal ones


@pytest.mark.parametrize(("suffix", "format"), [("png", "grid"), ("npz", "npz"), ("gif", "gif")])
def test_a_file_is_all_that_is_left(tmp_path, suffix, format):
    path = tmp_path / "new" / f"s.{suffix}"
    assert write(path, [format], IMAGES) == [path]
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    if suffix == "npz":
        with np.load(path) as arrays:
            assert len(arrays["images"]) == 12
    else:
        with Image.open(path) as image:
            assert image.width > 50


def test_an_animation_has_a_bounded_number_of_frames(tmp_path):
    with SampleWriter(tmp_path / "s.gif", ["gif"], (1, 8, 8), 1) as writer:
        writer.animate(torch.full((1, 1, 8, 8), i, dtype=torch.uint8) for i in range(200))
    with Image.open(tmp_path / "s.gif") as animation:
        assert 10 < animation.n_frames <= MAX_FRAMES


@pytest.mark.parametrize("name", ["s", "s.npz"])
def test_nothing_is_left_after_an_error(tmp_path, name):
    def fail():
        with SampleWriter(tmp_path / name, ["npz"], (3, 8, 6), 12) as writer:
            writer.add(IMAGES[:5])
            raise FloatingPointError("samples became infinite")

    with pytest.raises(FloatingPointError):
        fail()
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_the_last_step_fails(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("ddp.io.writer.grid_or_scatter", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "s", ["grid", "npz"], IMAGES)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_there_already(tmp_path):
    (tmp_path / "s").mkdir()
    path, formats = parse_output(tmp_path / "s", None, "model.pth")
    assert write(path, formats, POINTS, POINTS) == [tmp_path / "s" / "grid.png"]


def test_reference_items_are_shown(tmp_path):
    (alone,) = write(tmp_path / "a.png", ["grid"], IMAGES)
    (both,) = write(tmp_path / "b.png", ["grid"], IMAGES, IMAGES, titles=("new", "old"))
    assert Image.open(both).width > 2 * Image.open(alone).width


def test_reference_items_may_come_with_each_batch(tmp_path):
    with SampleWriter(tmp_path / "a.png", ["grid"], (3, 8, 6), 12) as writer:
        for batch in IMAGES.split(5):
            writer.add(batch, 255 - batch)
    write(tmp_path / "b.png", ["grid"], IMAGES, 255 - IMAGES)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("out", "format", "expected"),
    [
        ("s", None, ["grid"]),
        ("s", "png,npz", ["png", "npz"]),
        ("s.png", None, ["grid"]),
        ("s.png", "png", ["grid"]),
        ("s.npz", None, ["npz"]),
        ("s.gif", "gif", ["gif"]),
    ],
)
def test_parse_output(tmp_path, out, format, expected):
    assert parse_output(tmp_path / out, format, "model.pth") == (tmp_path / out, expected)


def test_parse_output_defaults_to_a_new_folder_beside_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "model.pth"
    assert parse_output(None, None, checkpoint) == (tmp_path / "model-samples", ["grid"])
    (tmp_path / "model-samples").mkdir()
    assert parse_output(None, "npz", checkpoint) == (tmp_path / "model-samples-2", ["npz"])


@pytest.mark.parametrize(
    ("out", "format", "word"),
    [
        ("s", "jpg", "format=jpg"),
        ("s", "", "exists"),
        ("s.jpg", None, "out="),
        ("s.png", "npz", "format=npz"),
        ("s.npz", "npz,grid", "format=npz,grid"),
    ],
)
def test_parse_output_refuses(tmp_path, out, format, word):
    if word == "exists":
        (tmp_path / out).mkdir()
        (tmp_path / out / "mine").touch()
    with pytest.raises(ValueError, match=word):
        parse_output(Path(tmp_path / out), format, "model.pth")
