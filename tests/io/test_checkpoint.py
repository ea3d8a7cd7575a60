"""Checkpoints: what a crash, a damaged file or a hostile one can do, and what they cannot."""

import copy
import dataclasses
import math
import pathlib
import pickle
import subprocess
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
from ddp.learned_schedule import backward_through_schedule
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


GRAD_SCALER = torch.amp.GradScaler("cpu").state_dict()


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
    assert "digest" not in state  # it is checked, and written anew
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


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no git"), subprocess.TimeoutExpired("git", 20)]
)
def test_provenance_does_without_git(trainer, monkeypatch, error):
    """A slim container has a .git folder and no program."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert provenance(trainer.dataset)["commit"] is None


def test_what_is_shipped_names_no_place_of_this_machine(trainer):
    state = checkpoint_state(trainer)
    state["config"] |= {
        "dataset": "/home/me/photos of cats",
        "data_dir": "/data",
        "out_dir": "/home/me/runs",
    }
    stripped = strip_training_state(state)
    assert "/home/me" in state["config"]["out_dir"]  # a run needs it to go on
    assert stripped["config"]["dataset"] == "photos of cats"
    assert "/" not in repr(stripped["config"])
    assert "/" not in repr(stripped["provenance"])
    assert Config(**strip_training_state(state | {"config": {"dataset": "/"}})["config"]).dataset
    dataset = dataclasses.replace(trainer.dataset, name="/home/me/photos")
    assert provenance(dataset)["dataset"] == "photos"


def test_a_text_that_a_terminal_would_obey_is_not_written(trainer, tmp_path):
    """No name of a folder makes a run's checkpoints unreadable."""
    names = ["\x1b[2J", "a" * 10**5, "\xe9t\xe9", "\udce9t\udce9", *"456789"]
    loud = copy.copy(trainer)
    loud.dataset = dataclasses.replace(trainer.dataset, classes=names)
    loud.config = dataclasses.replace(trainer.config, out_dir="new\nline")
    state = read_checkpoint(write_checkpoint(tmp_path / "a.pth", checkpoint_state(loud)))
    assert state["classes"][0] == "\\x1b[2J"
    assert state["classes"][2:4] == names[2:4]  # the second is bytes that are not UTF-8
    assert len(state["classes"][1]) == 4096
    assert state["config"]["out_dir"] == "new\\nline"


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


def test_numbers_that_were_swapped_are_noticed(trainer, tmp_path):
    """All checksums are right then, but not the digest over names and numbers."""
    path = write_checkpoint(tmp_path / "a.pth", checkpoint_state(trainer))
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    weights = [name for name in parts if "/data/" in name and len(parts[name]) == 9 * 16 * 16 * 4]
    one, two = weights[:2]
    parts[one], parts[two] = parts[two], parts[one]
    assert parts[one] != parts[two]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(OSError, match=r"a\.pth is damaged: its digest"):
        read_checkpoint(path)


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
    (tmp_path / ".half.pth").touch()
    with pytest.raises(OSError, match=r"there is no checkpoint.*holds none"):
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
        {"activation": None},
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


NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", True, [], {}, b"1", torch.ones(1), 1j]
LONG = "x" * 10**4
HOSTILE = {  # key -> what it must not hold
    "format": [0, -1, 99, 1.0, 10**400, None, *NOT_NUMBERS],
    "step": [-1, 2**60, 10**400, 1.0, None, *NOT_NUMBERS],
    "config": [
        *(None, [], "x", {7: 1}, {"lr": math.nan}, {"lr": math.inf}, {"seed": 10**400}),
        *({"name": "\x1b[2J"}, {"name": LONG}, {"name": "a\nb"}, {"attention_resolutions": [[1]]}),
        *({"channel_mult": [1] * 10**4}, {"lr": {}}, {"lr": torch.ones(1)}, {"\x1b": 1}),
        dict.fromkeys(map(str, range(10**4))),
    ],
    "event": [
        *([], None, 7, "188", (1, 8, 8), [1, 8], [1, 8, 8, 8], ["1", 8, 8], [[1], 8, 8]),
        *([1, -8, 8], [0, 8, 8], [1, 8.0, 8], [1, math.nan, 8], [1, True, 8], [1, 10**400, 8]),
        *([1, 4096, 4096], [1, 1, 4097], [2**40], [1, 10**5, 10**5]),
    ],
    "units": [
        *([], 7, {}, {"mean": torch.ones(1)}, {"mean": [0.0], "std": [1.0]}),
        *({"mean": torch.zeros(1), "std": std} for std in (torch.zeros(1), -torch.ones(1))),
        *({"mean": torch.zeros(1), "std": std} for std in (torch.ones(2), torch.ones(1, 1))),
        {"mean": torch.zeros(1), "std": torch.tensor([math.nan])},
        {"mean": torch.zeros(1).double(), "std": torch.ones(1).double()},
        {"mean": torch.zeros(2), "std": torch.ones(2)},  # of another number of channels
    ],
    "classes": [
        *(None, {}, "0123456789", [7], [None], [[]], ["\x1b[31m"], ["a\nb"], [LONG], ["x"] * 10**5),
    ],
    "ema": [None, [], {}, {7: torch.ones(1)}, {"weight": 7}, {"a": [torch.ones(1)]}, {"\n": 1}],
    "model": [None, [], {"weight": "x"}, {"weight": None}, {7: torch.ones(1)}],
    "provenance": [None, [], "x", {7: "x"}, {"torch": []}, {"torch": LONG}, {"torch": "\x07"}],
    "optimizer": [
        *(None, {}, [None], [[]], [{}], [7], [{"state": None}], [{"state": []}]),
        *([{"state": {"a": {}}}], [{"state": {-1: {}}}], [{"state": {0: {"step": 7}}}]),
        *([{"state": {0: {7: torch.ones(1)}}}], [{"state": {}}] * 1000),
        [{"state": {0: {"exp_avg": torch.tensor(math.inf)}}}],
    ],
    "scaler": [
        *(None, [], {"scale": 1.0}, {"a": 1}, GRAD_SCALER | {"scale": 0.0}),
        *(GRAD_SCALER | {"scale": math.inf}, GRAD_SCALER | {"growth_interval": 1.5}),
    ],
    "noise_dist": [
        *(None, [], {"loss_sq_ema": 1.0}, {"loss_sq_ema": torch.tensor([math.nan])}),
        *({"loss_sq_ema": torch.tensor([-1.0])}, {"loss_sq_ema": torch.zeros(64)}),
    ],
    "best": [-1e9, 10**400, *NOT_NUMBERS],
    "seconds": [-1e-9, 1e300, None, 10**400, *NOT_NUMBERS],
    "digest": ["", "0" * 64, 7, [], {}],
}


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("format", [1, FORMAT])
def test_a_part_that_cannot_be_is_refused(trainer, tmp_path, key, format):
    state = checkpoint_state(trainer) | {"format": format}
    for value in HOSTILE[key]:
        torch.save(state | {key: value}, tmp_path / "a.pth")
        with pytest.raises(OSError, match=r"a\.pth") as error:
            load_model(tmp_path / "a.pth")
        line = str(error.value)
        assert line.isprintable(), value
        assert len(line) < 1000


@pytest.mark.parametrize("part", ["ema", "model"])
@pytest.mark.parametrize(
    "change",
    [
        {"network.conv_in.weight": torch.ones(2)},
        {"network.conv_in.weight": torch.ones(16, 1, 3, 3, dtype=torch.float64)},
        {"network.conv_in.weight": torch.ones(16, 1, 3, 3, dtype=torch.int64)},
        {"network.down.0.0.norm1.running_var": torch.full((16,), -1.0)},
        {"network.down.0.0.norm1.running_mean": torch.full((16,), math.nan)},
        {"network.more": torch.ones(1)},
    ],
)
def test_weights_are_those_of_the_model(trainer, tmp_path, part, change):
    """Both parts are looked at, whichever is used."""
    state = checkpoint_state(trainer)
    torch.save(state | {part: state[part] | change}, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"a\.pth"):
        load_model(tmp_path / "a.pth")


def test_a_weight_of_which_the_file_holds_one_number_is_refused(state, tmp_path):
    """However large its shape, it would cost the file nothing."""
    ema = dict(state["ema"])
    ema["network.conv_in.weight"] = torch.zeros(1).expand(ema["network.conv_in.weight"].shape)
    torch.save(state | {"ema": ema}, tmp_path / "a.pth")
    with pytest.raises(OSError, match="whose numbers overlap"):
        load_model(tmp_path / "a.pth")


def test_weights_that_are_not_finite_are_not_used(state, tmp_path):
    torch.save(state | {"ema": with_nan(state["ema"])}, tmp_path / "a.pth")
    with pytest.raises(OSError, match="not finite"):
        load_model(tmp_path / "a.pth")


def test_nothing_bad_is_saved_over_something_good(trainer, tmp_path):
    state = checkpoint_state(trainer)
    path = write_checkpoint(tmp_path / "a.pth", state)
    good = path.read_bytes()
    moments = copy.deepcopy(state["optimizer"])
    moments[0]["state"][0]["exp_avg"].fill_(math.inf)
    for part in ({"model": with_nan(state["model"])}, {"optimizer": moments}):
        with pytest.raises(FloatingPointError, match="not finite"):
            write_checkpoint(path, state | part)
    with pytest.raises(OSError, match="lacks best"):
        write_checkpoint(path, state | {"best": math.nan})
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
    with pytest.raises(OSError, match="fingerprint"):
        restore(other, checkpoint_state(trainer))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": []},
        {"optimizer": [{"state": {}}]},
        {"ema": {}},
        {"model": {}},
        {"provenance": {}},
        {"noise_dist": {}},
        {"noise_dist": {"loss_sq_ema": torch.ones(63)}},
        {"noise_dist": {"loss_sq_ema": torch.ones(64, dtype=torch.float64)}},
    ],
)
def test_restore_refuses_what_does_not_fit(change):
    trainer = make_trainer(batch_size=8, noise_dist="importance")
    with pytest.raises(OSError, match=r"fit|fingerprint"):
        restore(trainer, checkpoint_state(trainer) | change)


ADAMW, MUON = 0, 1  # the optimizers of a trainer


@pytest.mark.parametrize(
    ("optimizer", "change"),
    [
        (ADAMW, {"exp_avg": torch.ones(1)}),  # fused AdamW would read beyond it
        (ADAMW, {"exp_avg_sq": torch.ones(32, 17)}),
        (ADAMW, {"exp_avg": torch.ones(16, 32)}),
        (ADAMW, {"exp_avg": torch.ones(32, 16, dtype=torch.float64)}),
        (ADAMW, {"exp_avg_sq": torch.full((32, 16), -1.0)}),
        (ADAMW, {"step": torch.tensor(-1.0)}),
        (ADAMW, {"step": torch.tensor(1e30)}),
        (ADAMW, {"step": torch.ones(2)}),
        (ADAMW, {"max_exp_avg_sq": torch.ones(32, 16)}),
        (MUON, {"momentum_buffer": torch.ones(8, 9)}),
        (MUON, {"momentum_buffer": torch.ones(8, 8, 3, 3)}),
        (MUON, {"exp_avg": torch.ones(8, 72)}),
    ],
)
def test_restore_refuses_moments_that_are_not_those_of_the_weights(trainer, optimizer, change):
    state = checkpoint_state(trainer)
    state["optimizer"] = copy.deepcopy(state["optimizer"])
    state["optimizer"][optimizer]["state"][0] |= change
    with pytest.raises(OSError, match="an optimizer"):
        restore(make_trainer(batch_size=8), state)


def test_restore_refuses_moments_that_are_missing_or_too_many(trainer):
    for change in ({"state": {}}, {"state": {0: {}}}, {"state": {10**6: {}}}):
        state = checkpoint_state(trainer)
        state["optimizer"] = [state["optimizer"][0] | change, *state["optimizer"][1:]]
        with pytest.raises(OSError, match="an optimizer"):
            restore(make_trainer(batch_size=8), state)


def test_restore_takes_moments_from_a_file_and_all_else_from_the_config(trainer):
    """Moments get the layout of their weights, in which a fused AdamW reads them."""
    state = checkpoint_state(trainer)
    state["optimizer"] = copy.deepcopy(state["optimizer"])
    for saved in state["optimizer"]:
        saved["param_groups"] = [
            group | {"maximize": True, "betas": (0.0, 0.0), "momentum": 7.0}
            for group in saved["param_groups"]
        ]
        for moments in saved["state"].values():
            for name, moment in moments.items():
                moments[name] = moment.contiguous()  # convolutions have another layout
    resumed = make_trainer(batch_size=8)
    restore(resumed, state)
    for ours, theirs in zip(resumed.optimizers, trainer.optimizers, strict=True):
        assert [group.get("betas") for group in ours.param_groups] == [
            group.get("betas") for group in theirs.param_groups
        ]
        assert not ours.param_groups[0].get("maximize")
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            for name in b:
                assert torch.equal(a[name], b[name])
                assert a[name].stride() == b[name].stride()
    assert torch.equal(resumed.train_step(0.0).loss, copy.deepcopy(trainer).train_step(0.0).loss)


def test_a_run_in_fp16_may_have_no_moments_yet(trainer):
    """Its scaler skips the steps whose gradients overflow, such as the first."""
    other = make_trainer(batch_size=8)
    state = checkpoint_state(other) | {"step": 3}
    with pytest.raises(OSError, match="no moments"):
        restore(other, state)
    other.scaler = torch.amp.GradScaler("cpu")
    restore(other, state | {"scaler": GRAD_SCALER})
    assert other.step == 3


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


def test_format_1_resumes_as_it_did(format1, monkeypatch):
    """But for what was mended since: points have a validation part, the loss of a learned schedule
    is the whole bound, and importance sampling observes every bin."""
    name, path, _, losses = format1
    if name == "moons":

        def without_the_ends(*args):
            backward_through_schedule(*args)
            return 0.0

        monkeypatch.setattr(ddp.training, "backward_through_schedule", without_the_ends)
    state = read_checkpoint(path)
    config = dataclasses.replace(parse_config(state, path), max_steps=6)
    trainer = Trainer(config, load_dataset(**config.data_options()))
    state["provenance"]["fingerprint"] = trainer.dataset.fingerprint
    restore(trainer, state)
    assert trainer.step == 3
    for expected in losses:
        loss = trainer.train_step(trainer.step / 6).loss
        tolerance = {"digits": 5e-3, "moons": 1e-4}[name]
        assert float(loss) == pytest.approx(expected.item(), rel=tolerance)


def test_format_1_is_rewritten_without_a_change(format1, tmp_path):
    _, path, _, _ = format1
    old = read_checkpoint(path)
    new = torch.load(write_checkpoint(tmp_path / "a.pth", old), weights_only=True)
    assert len(new.pop("digest")) == 64
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


def test_units_go_with_the_weights_and_a_file_without_them_is_of_pixels(trainer, tmp_path):
    state = checkpoint_state(trainer)
    assert state["units"] is None
    units = {"mean": torch.tensor([5.0]), "std": torch.tensor([2.0])}
    write_checkpoint(tmp_path / "a.pth", state | {"units": units})
    model = load_model(tmp_path / "a.pth")[0]
    assert not model.is_pixels
    assert model.units.restore(torch.ones(2, 1, 8, 8)).unique().tolist() == [7]
    del state["units"]  # as before version 0.4
    write_checkpoint(tmp_path / "b.pth", state)
    assert load_model(tmp_path / "b.pth")[0].is_pixels
    assert strip_training_state(state)["units"] is None
