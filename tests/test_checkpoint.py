"""Checkpoints: what a crash, a damaged file or a hostile one can do, and what they cannot."""

import dataclasses
import pathlib
import pickle
import zipfile

import pytest
import torch

from ddp import checkpoint, data
from ddp.config import Config
from ddp.training import Trainer


@pytest.fixture(scope="module")
def trainer():
    config = Config(dataset="digits", width=8, depth=1, batch_size=8)
    dataset = data.load("digits")
    trainer = Trainer(config.for_data(dataset), dataset)
    trainer.train_step(0.0)
    return trainer


def test_only_tensors_and_plain_types(trainer):
    def walk(value):
        if isinstance(value, dict):
            for k, v in value.items():
                assert type(k) in (str, int)
                walk(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                walk(v)
        else:
            assert type(value) in (torch.Tensor, str, int, float, bool, type(None)), type(value)

    state = trainer.state()
    state["ema"] = dict(state["ema"])
    walk({k: dict(v) if isinstance(v, dict) else v for k, v in state.items()})


def test_round_trip(trainer, tmp_path):
    path = checkpoint.write(tmp_path / "a.pth", trainer.state())
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    state = checkpoint.read(path)
    assert state["config"] == dataclasses.asdict(trainer.config)
    assert state["provenance"]["fingerprint"] == trainer.dataset.fingerprint
    for weights, source in (("ema", trainer.ema), ("raw", trainer.model)):
        model, config, _ = checkpoint.load_model(path, weights)
        assert config == trainer.config
        assert not model.training
        for key, tensor in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_for_inference_is_small_and_enough(trainer, tmp_path):
    whole = checkpoint.write(tmp_path / "whole.pth", trainer.state())
    small = checkpoint.write(tmp_path / "small.pth", checkpoint.for_inference(trainer.state()))
    assert small.stat().st_size < whole.stat().st_size / 2
    checkpoint.load_model(small)
    with pytest.raises(OSError, match="--weights ema"):
        checkpoint.load_model(small, "raw")


def test_every_flipped_byte_is_noticed_or_harmless(trainer, tmp_path):
    path = checkpoint.write(tmp_path / "a.pth", checkpoint.for_inference(trainer.state()))
    whole, reference = path.read_bytes(), checkpoint.read(path)
    noticed = 0
    for position in torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x40
        path.write_bytes(flipped)
        try:
            state = checkpoint.read(path)
        except OSError:
            noticed += 1
        else:  # padding between the members, say
            assert all(torch.equal(state["ema"][k], v) for k, v in reference["ema"].items())
    assert noticed > 40


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_off_file_is_refused(trainer, tmp_path, share):
    path = checkpoint.write(tmp_path / "a.pth", trainer.state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(OSError, match=r"a\.pth is damaged"):
        checkpoint.read(path)


class Hostile:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_a_hostile_file_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "ema": Hostile()}, "zip.pth")
    pathlib.Path("raw.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(OSError, match=name):
            checkpoint.read(name)
    assert not pathlib.Path("owned").exists()


def test_what_is_not_a_checkpoint_is_named(tmp_path, trainer):
    with pytest.raises(OSError, match="there is no checkpoint"):
        checkpoint.read(tmp_path / "none.pth")
    with pytest.raises(OSError, match=r"folder.*last\.pth"):
        checkpoint.read(tmp_path)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(OSError, match="lacks format"):
        checkpoint.read(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(OSError, match="holds a"):
        checkpoint.read(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(OSError, match=r"zip\.pth"):
        checkpoint.read(tmp_path / "zip.pth")
    torch.save(trainer.state() | {"format": 99}, tmp_path / "new.pth")
    with pytest.raises(OSError, match="format 99"):
        checkpoint.read(tmp_path / "new.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"width": 4096, "depth": 64},
        {"width": 10**9},
        {"depth": 10**9},
        {"multipliers": [1] * 10**6},
        {"multipliers": []},
        {"norm": None},
        {"negative_slope": None},
        {"width": 8.0},
        {"width": -1},
        {"schedule": "none"},
        {"timesteps": 10**12},
        {"width": "8"},
        {"surprise": 1},
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_it_costs_anything(trainer, tmp_path, change):
    state = checkpoint.for_inference(trainer.state())
    torch.save(state | {"config": state["config"] | change}, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"a\.pth"):
        checkpoint.load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "change", [{"event": [1, 10**5, 10**5]}, {"format": torch.ones(2)}, {"classes": None}]
)
def test_other_parts_are_looked_at_too(trainer, tmp_path, change):
    torch.save(checkpoint.for_inference(trainer.state()) | change, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"a\.pth"):
        checkpoint.load_model(tmp_path / "a.pth")


def test_weights_that_are_not_finite_are_not_used(trainer, tmp_path):
    state = checkpoint.for_inference(trainer.state())
    state["ema"] = {
        k: v * float("nan") if v.is_floating_point() else v for k, v in state["ema"].items()
    }
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(OSError, match="not finite"):
        checkpoint.load_model(tmp_path / "a.pth")


def test_nothing_bad_is_saved_over_something_good(trainer, tmp_path):
    path = checkpoint.write(tmp_path / "a.pth", trainer.state())
    good = path.read_bytes()
    bad = trainer.state()
    bad["model"] = {
        k: v * float("nan") if v.is_floating_point() else v for k, v in bad["model"].items()
    }
    with pytest.raises(FloatingPointError, match="not finite"):
        checkpoint.write(path, bad)

    def crash(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace(path, crash)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
