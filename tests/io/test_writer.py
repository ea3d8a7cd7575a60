"""The writer of samples: every format holds what came, whole or not at all."""

import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddp.io.figures import grid
from ddp.io.item_figures import draw_items
from ddp.io.writer import (
    FORMATS,
    MAX_FRAMES,
    WAY_MILLISECONDS,
    SampleWriter,
    parse_output,
    thin_out,
)

IMAGES = torch.randint(256, (12, 3, 8, 6), dtype=torch.uint8)
POINTS = torch.randn(12, 2)


def write(path, formats, items, reference=None, **options):
    """Write items in batches of 5, with their numbers as labels."""
    with SampleWriter(path, formats, items.shape[1:], len(items), reference, **options) as writer:
        labels = torch.arange(len(items))
        for batch, label in zip(items.split(5), labels.split(5), strict=True):
            writer.add(batch, labels=label, spread=None)
        if writer.needs_states:
            states = [(-math.inf, items * 0), (0.0, items), (9.0, items)]
            writer.animate((level, state[: writer.num_animated]) for level, state in states)
    return writer.written


def test_classes_have_a_column_in_an_animation_and_a_name_in_a_strip(tmp_path):
    options = {"columns": 5, "captions": list("abcde")}
    paths = {path.stem: path for path in write(tmp_path / "s", FORMATS, IMAGES, **options)}
    with Image.open(paths["process"]) as animation:
        assert animation.width == 5 * (6 * 6 + 2) + 2  # whose cells are 48 pixels high
        assert animation.height == 18 + 2 * 50 + 2  # two full rows
    with Image.open(paths["strip"]) as image:
        assert 4 < image.width - (3 * 38 + 2) < 20  # the names of eight rows


@pytest.mark.parametrize("items", [IMAGES, IMAGES[:, :1], POINTS])
def test_every_format_holds_the_items(tmp_path, items):
    written = write(tmp_path / "s", FORMATS, items)
    is_image = items.ndim == 4
    names = ["grid.png", "process.gif", "samples.npz", "strip.png"]
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
        writer.animate((i, torch.full((1, 1, 8, 8), i, dtype=torch.uint8)) for i in range(200))
    with Image.open(tmp_path / "s.gif") as animation:
        assert 10 < animation.n_frames <= MAX_FRAMES


@pytest.mark.parametrize("count", [1, 2, 7, 50, 51, 99, 100, 101, 1000])
def test_states_are_thinned_out_evenly_to_the_last_and_few_are_held(count):
    class State:
        alive = 0

        def __init__(self, number):
            self.number = number
            State.alive += 1
            assert State.alive < 110

        def __del__(self):
            State.alive -= 1

    numbers = [state.number for state in thin_out((State(i) for i in range(count)), 50)]
    assert len(numbers) == min(count, 50)
    assert (numbers[0], numbers[-1]) == (0, count - 1)
    steps = np.diff(numbers)
    assert not len(steps) or 1 <= steps.min() <= steps.max() <= 2 * -(-count // 50)


@pytest.mark.parametrize("items", [IMAGES, POINTS])
def test_an_animated_interpolation_goes_along_its_rows(tmp_path, items):
    """Three rows of four: the first frame is the first column, the last the last."""
    write(tmp_path / "s", ["gif"], items, columns=4, is_way=True)
    with Image.open(tmp_path / "s" / "process.gif") as animation:
        assert animation.n_frames == 4
        assert animation.info["duration"] == WAY_MILLISECONDS
        for k in range(4):
            animation.seek(k)
            frame = np.asarray(animation.convert("RGB")).astype(float)
            expected = np.asarray(draw_items(items[k::4])).astype(float)
            assert np.abs(frame - expected).mean() < 12  # a .gif has few colors


def test_an_interpolation_that_stops_within_its_first_row_is_animated(tmp_path):
    write(tmp_path / "s.gif", ["gif"], IMAGES[:3], columns=8, is_way=True)
    with Image.open(tmp_path / "s.gif") as animation:
        assert animation.n_frames == 3


@pytest.mark.parametrize(
    ("event", "total", "shown", "animated"),
    [
        ((1, 28, 28), 150, 150, 25),
        ((1, 28, 28), 5000, 1024, 25),
        ((3, 8, 8), 10, 10, 10),
        ((3, 512, 512), 5000, 127, 3),
        ((3, 8000, 8000), 5, 1, 1),
        ((2,), 10_000, 5000, 1000),
    ],
)
def test_what_is_shown_is_bounded_by_memory_alone(tmp_path, event, total, shown, animated):
    writer = SampleWriter(tmp_path / "s", ["grid"], event, total)
    assert (writer.num_shown, writer.num_animated) == (shown, animated)


def test_a_grid_shows_all_samples(tmp_path):
    images = torch.zeros(150, 1, 48, 48, dtype=torch.uint8)
    (path,) = write(tmp_path / "s.png", ["grid"], images)
    with Image.open(path) as image:
        assert (image.width // 50) * (image.height // 50) >= 150


def test_a_grid_says_who_drew_it_and_a_sample_does_not(tmp_path):
    """So that a folder of samples, which has a grid beside them, is read as the samples alone."""
    written = write(tmp_path / "s", ["png", "grid"], IMAGES)
    for path in written:
        with Image.open(path) as image:
            assert ("Software" in image.info) == (path.name == "grid.png")


@pytest.mark.parametrize("name", ["s.npz", "s.png", "s"])
def test_of_two_writers_at_once_both_keep_their_work(tmp_path, name):
    path, formats = parse_output(tmp_path / name, None, "model.pth")
    with SampleWriter(path, formats, (3, 8, 6), 12) as slow:
        written = write(path, formats, IMAGES)
        slow.add(255 - IMAGES)
    assert written[0].exists()
    assert slow.written[0].exists()
    assert written[0].read_bytes() != slow.written[0].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted({tmp_path / name, slow.out.path})
    assert slow.out.path.stem == "s-2"


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that only POSIX has")
@pytest.mark.parametrize("limit", [0, 100, 1000])
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, format, limit):
    import resource

    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # bytes of a file
    try:
        with pytest.raises(OSError, match=r"File too large"):
            write(tmp_path / "s", [format], images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_arrays_beside_the_samples_wait_on_the_disk_not_in_memory(tmp_path):
    latents = torch.randn(64, 4, 64, 64)  # 4 MB
    items = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
    tracemalloc.start()
    with SampleWriter(tmp_path / "s.npz", ["npz"], (1, 4, 4), 64) as writer:
        for i in range(64):
            writer.add(items[i : i + 1], latents=latents[i : i + 1], labels=torch.tensor([i]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    with np.load(tmp_path / "s.npz") as arrays:
        assert (arrays["latents"] == latents.numpy()).all()
        assert arrays["labels"].tolist() == list(range(64))


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

    monkeypatch.setattr("ddp.io.writer.draw_items", full)
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
        ("v1.5", None, ["grid"]),
        ("of.epoch-20", "npz", ["npz"]),
        ("there.tiff", None, ["grid"]),  # a folder that is there
    ],
)
def test_parse_output(tmp_path, out, format, expected):
    (tmp_path / "there.tiff").mkdir()
    assert parse_output(tmp_path / out, format, "model.pth") == (tmp_path / out, expected)


def test_parse_output_takes_a_slash_as_a_word():
    assert parse_output("new.tiff/", None, "model.pth") == (Path("new.tiff"), ["grid"])


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
        ("s.bmp", None, "out=.*s.bmp/"),
        ("s.TIFF", None, "out="),
        ("s.npy", "npz", "out="),
        ("s.mp4", "gif", "out="),
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


def test_parse_output_refuses_no_path():
    with pytest.raises(ValueError, match="out=''"):
        parse_output("", None, "model.pth")


# ---- floats, sequences ----


@pytest.mark.parametrize(
    ("event", "name"),
    [((4, 8, 6), "images"), ((1, 8, 6), "images"), ((2, 30), "sequences"), ((9,), "points")],
)
def test_floats_are_written_as_they_are_and_shown(tmp_path, event, name):
    items = 1000 + 7 * torch.randn(12, *event)
    written = write(tmp_path / "s", FORMATS, items, reference=items + 1)
    with np.load(tmp_path / "s" / "samples.npz") as arrays:
        expected = items.movedim(1, -1) if len(event) == 3 else items
        assert arrays[name].dtype == np.float32
        assert (arrays[name] == expected.numpy()).all()
    pngs = [path for path in written if path.suffix == ".png"]
    assert len(pngs) == (14 if len(event) == 3 else 2)
    for path in pngs:
        assert np.asarray(Image.open(path)).std() > 0


def test_pngs_of_floats_share_a_scale(tmp_path):
    dark, light = torch.zeros(6, 1, 4, 4), torch.ones(6, 1, 4, 4)
    write(tmp_path / "s", ["png"], torch.cat([light, dark]), reference=torch.cat([dark, light]))
    shown = [np.asarray(Image.open(tmp_path / "s" / f"{i:06d}.png")) for i in (0, 11)]
    assert [image.max() for image in shown] == [255, 0]


@pytest.mark.parametrize("event", [(1, 8, 8), (3, 8, 6), (5, 8, 8), (2, 16), (1,), (2,), (7,)])
def test_a_strip_goes_from_noise_to_data(tmp_path, event):
    items = torch.randn(12, *event)
    (path,) = write(tmp_path / "s", ["strip"], items)
    assert path.name == "strip.png"
    image = Image.open(path)
    if event == (1, 8, 8):  # 8 items at 3 times, each 48 pixels a side, under a line of captions
        assert image.size == (3 * 50 + 2, 18 + 8 * 50 + 2)
    assert image.width > image.height or len(event) != 1
