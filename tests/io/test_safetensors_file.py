"""Models as .safetensors: the same numbers as in the .pth, and damage that is noticed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ddp.config import Config
from ddp.data import Dataset, load_dataset
from ddp.io.archive import MAX_DEPTH
from ddp.io.checkpoint import (
    checkpoint_state,
    load_model,
    read_checkpoint,
    strip_training_state,
    write_checkpoint,
)
from ddp.io.safetensors_file import METADATA_KEY, inference_state, write_safetensors
from ddp.sampling import cycle_labels, sample
from ddp.training import Trainer
from ddp.units import Units

library = pytest.importorskip("safetensors.torch")
FORMAT1 = Path(__file__).parent / "data" / "format1_digits.pth"


def make_state(dataset="moons", **options):
    """Return the dict of a finished model whose weights are all random."""
    options = {"channels_base": 8, "blocks_per_level": 1, "init": "default"} | options
    data = load_dataset(dataset) if isinstance(dataset, str) else dataset
    trainer = Trainer(Config(dataset=data.name, **options), data)
    return strip_training_state(checkpoint_state(trainer))


def float_data():
    """Return a Dataset of sequences (2, 12) in units of their own."""
    items = torch.randn(32, 2, 12)
    units = Units(torch.tensor([0.1, 1e-7]), torch.tensor([1 / 3, 12345.678]))
    return Dataset("waves", items, items[:8], units=units)


@pytest.fixture(scope="module")
def state():
    return make_state()


def write_raw(path, about, weights):
    """Write a file as write_safetensors does, of any text and weights."""
    text = about if isinstance(about, str) else json.dumps(about)
    library.save_file(weights, path, metadata={METADATA_KEY: text})
    return path


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, dict):
            assert_same(value, theirs[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[key]), key
            assert value.dtype == theirs[key].dtype
        else:
            assert value == theirs[key], key
            assert type(value) is type(theirs[key]), key


@pytest.mark.parametrize("kind", ["points", "images", "sequences", "format 1"])
def test_round_trip(kind, tmp_path):
    pth, path = tmp_path / "a.pth", tmp_path / "a.safetensors"
    if kind == "format 1":
        pth = FORMAT1
    else:
        data = {"points": "moons", "images": "digits", "sequences": float_data()}[kind]
        options = {"class_cond": True} if kind == "images" else {}
        write_checkpoint(pth, make_state(data, **options))
    ours = read_checkpoint(pth)
    write_safetensors(path, ours)
    theirs = read_checkpoint(path)
    assert_same(inference_state(ours, ours["ema"]), theirs)
    samples = []
    for each in (pth, path):
        model, _, _ = load_model(each)
        indices = torch.arange(3)
        samples.append(sample(model, indices, 0, cycle_labels(model, indices), steps=3))
    assert torch.equal(*samples)


def test_training_state_is_left_out(tmp_path):
    trainer = Trainer(Config(dataset="moons", channels_base=8), load_dataset("moons"))
    path = tmp_path / "a.safetensors"
    write_safetensors(path, checkpoint_state(trainer))
    assert "optimizer" not in read_checkpoint(path)
    with pytest.raises(OSError, match="stripped for shipping"):
        load_model(path, "raw")


def test_every_flipped_byte_is_noticed_or_harmless(state, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, state)
    whole = path.read_bytes()
    expected = read_checkpoint(path)
    noticed = 0
    places = [*range(200), *range(200, len(whole), max(1, len(whole) // 300))]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            state = read_checkpoint(path)
        except OSError:
            noticed += 1
        else:
            assert_same(expected, state)
    assert noticed > 0.9 * len(places)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_cut_file_is_refused(state, tmp_path, size):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, state)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError, match="is damaged"):
        read_checkpoint(path)


def about_of(state):
    """Return the JSON that a file of this state holds."""
    about = {k: v for k, v in state.items() if k != "ema"}
    return about | {"digest": None}


@pytest.mark.parametrize(
    "about",
    [
        "no JSON",
        "[]",
        "{}",
        "9" * 5000,
        "[" * 100_000,
        '{"units": 1}',
    ],
)
def test_strange_metadata_are_refused(about, state, tmp_path):
    path = write_raw(tmp_path / "a.safetensors", about, state["ema"])
    with pytest.raises(OSError, match="is damaged, or not a model"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 1.5},
        {"event": [2, 3, 4, 5]},
        {"classes": "ab"},
        {"config": {"dataset": "\x1b[2J"}},
        {"config": {"dataset": float("nan")}},
        {"provenance": {"a": [1]}},
        {"units": {"mean": [0.0, 0.0], "std": [0.0, 1.0]}},
        {"units": {"mean": [[0.0]], "std": [[1.0]]}},
    ],
)
def test_schema_holds(change, state, tmp_path):
    path = write_raw(tmp_path / "a.safetensors", about_of(state) | change, state["ema"])
    with pytest.raises(OSError, match=r"in another form|is damaged"):
        read_checkpoint(path)


def test_deep_json_is_refused(state, tmp_path):
    deep = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    about = about_of(state) | {"provenance": {"a": deep}}
    with pytest.raises(OSError, match="too deeply"):
        read_checkpoint(write_raw(tmp_path / "a.safetensors", about, state["ema"]))


def test_newer_format_is_named(state, tmp_path):
    about = about_of(state) | {"format": 3}
    with pytest.raises(OSError, match="has format 3"):
        read_checkpoint(write_raw(tmp_path / "a.safetensors", about, state["ema"]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_unknown_dtype_is_refused(dtype, state, tmp_path):
    weights = {name: weight.to(dtype) for name, weight in state["ema"].items()}
    path = write_raw(tmp_path / "a.safetensors", about_of(state), weights)
    with pytest.raises(OSError, match=r"unknown type|is damaged"):
        read_checkpoint(path)


def test_infinite_weight_is_refused(state, tmp_path):
    name, weight = next(iter(state["ema"].items()))
    weights = state["ema"] | {name: torch.full_like(weight, float("inf"))}
    path = write_raw(tmp_path / "a.safetensors", about_of(state), weights)
    with pytest.raises(OSError, match="is not finite"):
        read_checkpoint(path)


def test_wrong_weight_is_refused(state, tmp_path):
    weights = dict(state["ema"])
    weights.pop(next(iter(weights)))
    path = write_raw(tmp_path / "a.safetensors", about_of(state), weights)
    with pytest.raises(OSError, match="do not fit its config"):
        load_model(path)


def test_file_of_another_project_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    library.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(OSError, match="not a model that this project exported"):
        read_checkpoint(path)


def test_missing_library_is_named(state, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(OSError, match="pip install safetensors"):
        read_checkpoint(path)
    with pytest.raises(OSError, match="pip install safetensors"):
        write_safetensors(path, state)
