"""Checkpoints: what a crash, a damaged file or a hostile one can do, and what they cannot."""

import dataclasses
import pathlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ddp
from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.checkpoint import (
    FORMAT,
    checkpoint_state,
    load_model,
    parse_config,
    provenance,
    read_checkpoint,
    restore,
    strip_training_state,
    write_checkpoint,
)
from ddp.reverse import NETWORKS
from ddp.sampling import cycle_labels, sample
from ddp.training import Trainer

DATA = Path(__file__).parent / "data"  # format1_*.pth: written by the last version before format 2


def make_trainer(dataset="digits", **options):
    config = Config(**{"dataset": dataset, "channels_base": 8, "blocks_per_level": 1, **options})
    return Trainer(config, load_dataset(dataset))


@pytest.fixture(scope="module")
def trainer():
    trainer = make_trainer(batch_size=8)
    trainer.train_step(0.0)
    return trainer


@pytest.fixture
def state(trainer):
    return strip_training_state(checkpoint_state(trainer))


def with_nan(weights):
    """Weights of which every number that can be is NaN."""
    bad = {}
    for name, weight in weights.items():
        bad[name] = weight * float("nan") if weight.is_floating_point() else weight
    return bad


def assert_plain(value):
    """Tensors and plain types only, however deep."""
    if isinstance(value, dict):
        for key, part in value.items():
            assert type(key) in (str, int)
            assert_plain(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            assert_plain(part)
    else:
        assert type(value) in (torch.Tensor, str, int, float, bool, type(None)), type(value)


def test_state_has_only_tensors_and_plain_types(trainer):
    assert_plain(checkpoint_state(trainer))


def test_round_trip(trainer, tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", checkpoint_state(trainer))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    state = read_checkpoint(path)
    assert state["format"] == FORMAT
    assert state["config"] == dataclasses.asdict(trainer.config)
    assert state["provenance"]["fingerprint"] == trainer.dataset.fingerprint
    for weights, source in (("ema", trainer.ema), ("raw", trainer.model)):
        model, config, _ = load_model(path, weights)
        assert config == trainer.config
        assert not model.training
        for key, tensor in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_provenance_has_the_versions(trainer, monkeypatch):
    monkeypatch.setattr(ddp, "__version__", "1.2.3", raising=False)
    versions = provenance(trainer.dataset)
    assert versions["ddp"] == "1.2.3"
    assert versions["torch"] == torch.__version__
    assert versions["dataset"] == "digits"


def test_strip_training_state_is_small_and_enough(trainer, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.pth", checkpoint_state(trainer))
    small = write_checkpoint(
        tmp_path / "small.pth", strip_training_state(checkpoint_state(trainer))
    )
    assert small.stat().st_size < whole.stat().st_size / 2
    load_model(small)
    with pytest.raises(OSError, match="weights=ema"):
        load_model(small, "raw")


def test_every_flipped_byte_is_noticed_or_harmless(state, tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", state)
    whole = path.read_bytes()
    noticed = 0
    for position in torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x40
        path.write_bytes(flipped)
        try:
            read = read_checkpoint(path)
        except OSError:
            noticed += 1
        else:  # padding between the members, say
            assert all(torch.equal(read["ema"][k], v) for k, v in state["ema"].items())
    assert noticed > 40


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_a_cut_off_file_is_refused(trainer, tmp_path, fraction):
    path = write_checkpoint(tmp_path / "a.pth", checkpoint_state(trainer))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(OSError, match=r"a\.pth is damaged"):
        read_checkpoint(path)


class Hostile:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_a_hostile_file_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "ema": Hostile()}, "zip.pth")
    Path("raw.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(OSError, match=name):
            read_checkpoint(name)
    assert not Path("owned").exists()


def test_what_is_not_a_checkpoint_is_named(tmp_path, state):
    with pytest.raises(OSError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(OSError, match=r"folder.*last\.pth"):
        read_checkpoint(tmp_path)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(OSError, match="lacks format"):
        read_checkpoint(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(OSError, match="holds a"):
        read_checkpoint(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(OSError, match=r"zip\.pth"):
        read_checkpoint(tmp_path / "zip.pth")
    torch.save(state | {"format": 99}, tmp_path / "new.pth")
    with pytest.raises(OSError, match="format 99"):
        read_checkpoint(tmp_path / "new.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"channels_base": 4096, "blocks_per_level": 64},
        {"channels_base": 10**9},
        {"blocks_per_level": 10**9},
        {"channel_mult": [1] * 10**6},
        {"channel_mult": []},
        {"norm": None},
        {"negative_slope": None},
        {"channels_base": 8.0},
        {"channels_base": None},
        {"channels_base": -1},
        {"schedule": "none"},
        {"timesteps": 10**12},
        {"channels_base": "8"},
        {"network": "mlp"},
        {"network": ["unet"]},
        {"surprise": 1},
        {7: 1},
    ],
)
@pytest.mark.parametrize("format", [1, FORMAT])
def test_a_config_that_does_not_fit_is_refused_before_it_costs_anything(
    state, tmp_path, change, format
):
    state |= {"format": format, "config": state["config"] | change}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"a\.pth"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"event": [1, 10**5, 10**5]},
        {"event": []},
        {"event": ["1", 8, 8]},
        {"event": [1, -8, 8]},
        {"format": torch.ones(2)},
        {"classes": None},
        {"ema": {}},
        {"ema": {7: torch.ones(1)}},
        {"ema": {"weight": 7}},
        {"model": {"weight": "x"}},
    ],
)
@pytest.mark.parametrize("format", [1, FORMAT])
def test_a_part_that_does_not_fit_is_refused(state, tmp_path, change, format):
    torch.save(state | {"format": format} | change, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"a\.pth"):
        load_model(tmp_path / "a.pth")


def test_a_weight_of_which_the_file_holds_one_number_is_refused(state, tmp_path):
    """However large its shape, it would cost the file nothing."""
    ema = dict(state["ema"])
    ema["network.conv_in.weight"] = torch.zeros(1).expand(ema["network.conv_in.weight"].shape)
    torch.save(state | {"ema": ema}, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"conv_in.weight is larger"):
        load_model(tmp_path / "a.pth")


def test_weights_that_are_not_finite_are_not_used(state, tmp_path):
    torch.save(state | {"ema": with_nan(state["ema"])}, tmp_path / "a.pth")
    with pytest.raises(OSError, match="not finite"):
        load_model(tmp_path / "a.pth")


def test_nothing_bad_is_saved_over_something_good(trainer, tmp_path):
    state = checkpoint_state(trainer)
    path = write_checkpoint(tmp_path / "a.pth", state)
    good = path.read_bytes()
    with pytest.raises(FloatingPointError, match="not finite"):
        write_checkpoint(path, state | {"model": with_nan(state["model"])})
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(state, tmp_path, monkeypatch, error):
    path = write_checkpoint(tmp_path / "a.pth", state)
    good = path.read_bytes()

    def fail(state, temporary):
        Path(temporary).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    expected = OSError if isinstance(error, RuntimeError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_checkpoint(path, state)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_network_that_is_not_registered_is_named(trainer, state, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", NETWORKS["unet"])
    path = tmp_path / "a.pth"
    write_checkpoint(path, state | {"config": state["config"] | {"network": "mine"}})
    assert load_model(path)[1].network == "mine"
    monkeypatch.delitem(NETWORKS, "mine")
    with pytest.raises(OSError, match=r"network=mine.*plugin=FILE.*import"):
        load_model(path)


def test_restore_refuses_other_data(trainer):
    other = make_trainer(batch_size=8)
    other.dataset = dataclasses.replace(other.dataset, train=other.dataset.train.flip(0))
    with pytest.raises(OSError, match="data_dir"):
        restore(other, checkpoint_state(trainer))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": []},
        {"optimizer": [{}, {}]},
        {"optimizer": [[], []]},
        {"optimizer": [{"state": {}, "param_groups": [7]}] * 2},
        {"ema": {}},
        {"provenance": {}},
        {"noise_dist": {}},
    ],
)
def test_restore_refuses_what_does_not_fit(change):
    trainer = make_trainer(batch_size=8, noise_dist="importance")
    with pytest.raises(OSError, match=r"fit|fingerprint"):
        restore(trainer, checkpoint_state(trainer) | change)


@pytest.fixture(params=["digits", "moons"])
def format1(request):
    """(name, path, samples and losses that the old code got from it)."""
    with np.load(DATA / "format1.npz") as arrays:
        expected = {key: torch.from_numpy(array) for key, array in arrays.items()}
    name = request.param
    path = DATA / f"format1_{name}.pth"
    return name, path, expected[f"{name}_samples"], expected[f"{name}_losses"]


def test_format_1_config_has_the_present_names(format1):
    name, path, _, _ = format1
    config = parse_config(read_checkpoint(path), path)
    assert config.channels_base == 8
    assert config.blocks_per_level == 1
    if name == "digits":
        assert config.network == "unet"
        assert config.class_cond
        assert config.noise_dist == "importance"
        assert config.attention_resolutions == [4]
        assert config.channel_mult == [1, 1]
    else:
        assert config.network == "mlp"
        assert config.schedule == "learned"
        assert config.weighting == "vlb"
        assert config.noise_copies == 8


def test_format_1_samples_as_it_did(format1):
    _, path, samples, _ = format1
    model, _, _ = load_model(path)
    indices = torch.arange(len(samples))
    label = cycle_labels(model, indices)
    threshold = "static" if model.is_image else "none"
    x0 = sample(model, indices, 3, label, sampler="unipc", steps=5, threshold=threshold)
    torch.testing.assert_close(x0, samples, rtol=0, atol=1e-4)


def test_format_1_resumes_as_it_did(format1):
    _, path, _, losses = format1
    state = read_checkpoint(path)
    config = dataclasses.replace(parse_config(state, path), max_steps=6)
    trainer = Trainer(config, load_dataset(**config.data_options()))
    restore(trainer, state)
    assert trainer.step == 3
    for expected in losses:
        loss = trainer.train_step(trainer.step / 6).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_format_1_is_rewritten_without_a_change(format1, tmp_path):
    _, path, _, _ = format1
    old = read_checkpoint(path)
    new = torch.load(write_checkpoint(tmp_path / "a.pth", old), weights_only=True)
    assert new["format"] == FORMAT
    assert new["config"] == old["config"]
    assert new["provenance"] == old["provenance"]
    assert set(new) == set(old)
    for part in ("ema", "model"):
        assert set(new[part]) == set(old[part])
        for key, weight in old[part].items():
            assert torch.equal(new[part][key], weight), key
    load_model(tmp_path / "a.pth", "raw")


def test_format_1_without_training_state_loads(format1, tmp_path):
    """As the files that were shipped: of importance sampling only the buffer is left."""
    _, path, _, _ = format1
    state = torch.load(path, weights_only=True)
    torch.save(strip_training_state(state), tmp_path / "a.pth")
    assert "noise_dist" not in read_checkpoint(tmp_path / "a.pth")
    load_model(tmp_path / "a.pth")


def test_format_1_edm_levels_have_their_present_name(tmp_path):
    state = torch.load(DATA / "format1_digits.pth", weights_only=True)
    path = tmp_path / "a.pth"
    for old, new in (("normal", "lognormal"), ("log_normal", "edm"), ("uniform", "uniform")):
        torch.save(state | {"config": state["config"] | {"levels": old}}, path)
        assert read_checkpoint(path)["config"]["noise_dist"] == new
