"""The estimate of memory against what a step really takes, and against what there is."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ddp.config import Config
from ddp.data import Dataset, load_dataset
from ddp.io import memory
from ddp.io.memory import (
    LiveBytes,
    available_memory,
    cgroup_memory,
    fit_shards,
    require_memory,
    system_memory,
    training_memory,
)
from ddp.model import DiffusionModel
from ddp.reverse import NETWORKS
from ddp.training import Trainer

CPU = torch.device("cpu")
SMALL = {"channels_base": 8, "blocks_per_level": 1, "warmup": 2, "batch_size": 64}
TWO_LEVELS = {"channel_mult": [2, 2], "patch_size": 1, "noise_copies": 2}  # of images


def images(side, count=4):
    """Return a Dataset of color images that take no memory: one pixel, expanded."""
    items = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(count, 3, side, side)
    return Dataset("mine", items, items)


def saved_bytes(trainer):
    """Take a step; return the bytes that its forward passes kept for the backward pass."""
    saved = {}  # address -> bytes

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train_step(0.0)
    weights = [weight.data_ptr() for weight in trainer.model.parameters()]
    return sum(size for address, size in saved.items() if address not in weights)


@pytest.mark.parametrize(
    ("dataset", "fields", "precision"),
    [
        ("digits", {}, "fp32"),
        ("digits", {}, "bf16"),
        ("digits", {"attention_resolutions": [4, 8], "activation": "silu"}, "fp32"),
        ("digits", {"attention_resolutions": [4, 8], "channel_mult": [8, 8]}, "bf16"),
        ("digits", {"norm": "group", "dropout": 0.1, "class_cond": True}, "fp32"),
        ("digits", {"norm": "none", "optimizer": "adamw", "patch_size": 2}, "fp32"),
        ("digits", {"schedule": "learned", "channels_base": 32}, "fp32"),
        ("sequences", {"channels_base": 16}, "fp32"),
        ("moons", {"channels_base": 64}, "fp32"),
        ("checkerboard", {"channels_base": 64, "dropout": 0.1}, "bf16"),
    ],
)
def test_estimate_is_what_a_step_takes(dataset, fields, precision, monkeypatch):
    monkeypatch.setattr(memory, "BN_BATCH_IMAGES", 2)
    monkeypatch.setattr(memory, "BN_BATCH_POINTS", 2)
    levels = TWO_LEVELS if dataset == "digits" else {}
    config = Config(dataset=dataset, **{**SMALL, **levels, **fields})
    is_mine = dataset == "sequences"  # (C, L)
    items = Dataset("mine", *[torch.randn(64, 3, 64)] * 2) if is_mine else load_dataset(dataset)
    trainer = Trainer(config, items, precision=precision)
    model = trainer.model
    report = training_memory(trainer.config, model.event, model.num_classes, precision)
    kept = saved_bytes(trainer)
    assert 0.9 * kept < report["activations"] < 1.5 * kept  # and what the backward pass adds
    assert report["sums"] == 0
    weights = sum(weight.nbytes for weight in model.parameters())
    assert report["weights"] == report["EMA"] == report["gradients"] == weights
    moments = 0
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            moments += sum(value.nbytes for value in state.values() if value.ndim)
    assert report["optimizer"] == moments


def test_live_bytes_are_those_of_tensors_that_are_alive():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[10:] + 1
        assert live.now == live.peak == 4 * 1990
        del a
        assert live.now == 4 * 990
        b.view(10, 99).mul_(2)
        assert live.peak == 4 * 1990
    with LiveBytes() as live, torch.device("meta"):
        c = torch.zeros(10**12)
        assert live.now == 4 * c.numel()


def test_estimate_takes_no_memory():
    """Of a batch of a million images, whose activations would take terabytes."""
    config = Config(batch_size=2**20, blocks_per_level=1).resolve(images(64))
    report = training_memory(config, (3, 64, 64))
    assert report["activations"] > 10**12
    half = training_memory(config, (3, 64, 64), precision="bf16")
    assert half["activations"] == pytest.approx(report["activations"] / 2)


def test_estimate_counts_the_batches_that_recalibrate_batchnorm():
    """Of small training batches they need the most."""
    reports = []
    for batch_size in (2, 4, 4096):
        config = Config(dataset="mine", **{**SMALL, "batch_size": batch_size})
        reports.append(training_memory(config.resolve(images(32)), (3, 32, 32))["activations"])
    assert reports[0] == reports[1] < reports[2] / 10


def test_images_that_do_not_fit_are_refused_with_what_would(monkeypatch):
    """Before anything is allocated. What is named does fit, and half of it does not."""
    monkeypatch.setattr(memory, "available_memory", lambda device: 16e9)
    dataset = images(512)
    config = Config(dataset="mine", blocks_per_level=1).resolve(dataset)
    with pytest.raises(
        ValueError, match=r"^batch_size=128, 128 at a time of 3x512x512, takes .* 16.0 GB"
    ) as caught:
        require_memory(config, dataset, CPU)
    fits = int(str(caught.value).split("shards=")[1].split()[0])
    assert 2 <= fits <= 64
    require_memory(replace(config, shards=fits), dataset, CPU)
    with pytest.raises(ValueError, match="fits"):
        require_memory(replace(config, shards=fits // 2), dataset, CPU)


def test_network_that_fits_with_no_batch_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1e9)
    config = Config(channels_base=4096).resolve(images(32))
    with pytest.raises(
        ValueError, match=r"parts of 2 still take .* a smaller batch_size, channels"
    ):
        require_memory(config, images(32), CPU)


def test_what_fits_is_reported(monkeypatch):
    dataset = load_dataset("digits")
    config = Config(precision="fp32", **SMALL).resolve(dataset)
    report = require_memory(config, dataset, CPU)
    assert report == training_memory(config, dataset.event)
    monkeypatch.setattr(memory, "available_memory", lambda device: sum(report.values()) - 1)
    with pytest.raises(ValueError, match="batch_size=64"):
        require_memory(config, dataset, CPU)


# ---- shards, and blocks that are recomputed ----


@pytest.mark.parametrize("fields", [{"shards": 4}, {"checkpoint_activations": True}])
def test_estimate_follows_what_is_alive_in_a_step(fields, monkeypatch):
    """Both take less: of a part, or of the inputs of blocks."""
    monkeypatch.setattr(memory, "BN_BATCH_IMAGES", 2)
    dataset = load_dataset("digits")
    peaks = []
    estimates = []
    for more in ({}, fields):
        config = Config(**{**SMALL, **TWO_LEVELS, "blocks_per_level": 3, **more})
        trainer = Trainer(config, dataset)
        with LiveBytes() as live:
            trainer.train_step(0.0)
        report = training_memory(trainer.config, dataset.event)
        kept = report["weights"] + report["EMA"]  # they are there before the step
        peaks.append(live.peak)
        estimates.append(sum(report.values()) - kept)
    assert estimates[1] < 0.6 * estimates[0]
    assert estimates == pytest.approx(peaks, rel=0.25)


def test_sums_over_parts_are_counted():
    """Of as many parts as there are levels in their tree, and one more."""
    reports = []
    for shards in (1, 2, 8):
        config = Config(**SMALL, shards=shards).resolve(images(8))
        reports.append(training_memory(config, (3, 8, 8)))
    weights = reports[0]["weights"]
    assert [report["sums"] / weights for report in reports] == [0, 2, 4]


def test_shards_that_were_given_stay():
    config = Config(**SMALL, shards=2).resolve(images(8))
    assert fit_shards(config, images(8), CPU, told := []) is config
    assert not told


def test_auto_takes_the_fewest_shards_that_the_estimate_fits(monkeypatch):
    monkeypatch.setattr(memory, "BN_BATCH_IMAGES", 2)
    dataset = images(32)
    config = Config(**SMALL, shards=0).resolve(dataset)
    told = []
    assert fit_shards(config, dataset, CPU, told.append).shards == 1
    assert told == []
    enough = sum(training_memory(replace(config, shards=4), dataset.event).values())
    monkeypatch.setattr(memory, "available_memory", lambda device: enough)
    assert fit_shards(config, dataset, CPU, told.append).shards == 4
    assert told == ["shards: 4; parts of 32 items do not fit in memory"]
    monkeypatch.setattr(memory, "available_memory", lambda device: 1e6)
    with pytest.raises(ValueError, match="parts of 2 of batch_size=64 take more memory"):
        fit_shards(config, dataset, CPU, told.append)


def gpu_of(items, monkeypatch):
    """Pretend that the CPU is a GPU whose memory is enough for so many items at once."""

    def denoise(model, x_t, *rest):
        if len(x_t) > items:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, x_t, *rest)

    whole = DiffusionModel.denoise
    monkeypatch.setattr(DiffusionModel, "denoise", denoise)
    monkeypatch.setattr(memory, "fits_by_estimate", memory.fits_by_trial)


@pytest.mark.parametrize(("items", "shards"), [(64, 1), (63, 2), (17, 4), (4, 16)])
def test_auto_tries_steps_until_a_part_fits(items, shards, monkeypatch):
    """And the run that follows is the one with so many shards from the start."""
    gpu_of(items, monkeypatch)
    dataset = load_dataset("digits")
    config = Config(**SMALL, dropout=0.1, noise_copies=1, precision="fp32", shards=0)
    told = []
    fitted = fit_shards(config.resolve(dataset), dataset, CPU, told.append)
    assert fitted.shards == shards
    assert len(told) == (shards > 1)
    trainer = Trainer(fitted, dataset)
    trainer.train_step(0.0)
    same = Trainer(replace(config, shards=shards), dataset)
    same.train_step(0.0)
    for weight, other in zip(trainer.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_trainer_takes_auto_as_one_part():
    """Without fit_shards nobody has looked at the memory."""
    trainer = Trainer(Config(**SMALL, shards=0), load_dataset("digits"))
    assert trainer.config.shards == 1
    trainer.train_step(0.0)


@pytest.mark.parametrize(("norm", "least"), [("batch", 2), ("group", 1)])
def test_auto_stops_where_the_least_part_does_not_fit(norm, least, monkeypatch):
    gpu_of(0, monkeypatch)
    dataset = load_dataset("digits")
    config = Config(**SMALL, norm=norm, shards=0).resolve(dataset)
    with pytest.raises(ValueError, match=f"parts of {least} of batch_size=64"):
        fit_shards(config, dataset, CPU, print)


def test_network_that_asks_for_numbers_is_not_refused(monkeypatch):
    """Of its activations nothing is known."""

    class Asks(nn.Conv2d):
        def forward(self, x_t, log_snr, label=None):
            return super().forward(x_t) * float(x_t.mean())

    monkeypatch.setitem(NETWORKS, "asks", lambda event, num_classes, **_: Asks(1, 1, 3, padding=1))
    dataset = load_dataset("digits")
    report = require_memory(Config(network="asks").resolve(dataset), dataset, CPU)
    assert report["activations"] == 0
    assert report["weights"] == 40
    monkeypatch.setitem(NETWORKS, "asks", lambda *_, **__: torch.ones(2).mean().item())
    assert require_memory(Config(network="asks").resolve(dataset), dataset, CPU) == {}


# ---- how much there is ----


def test_available_memory_is_known_here():
    assert 0 < available_memory(CPU) < 1e15


def test_system_memory_is_what_the_kernel_could_give(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n")
    assert system_memory(tmp_path / "meminfo") == [7 * 1024]
    assert system_memory(tmp_path / "absent")[0] > 2**28  # of the whole machine


def test_unknown_memory_has_no_limit(monkeypatch):
    monkeypatch.setattr(memory, "lines_of", lambda path: [])
    monkeypatch.setattr(memory.os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError))
    assert available_memory(CPU) == math.inf


@pytest.mark.parametrize(
    ("line", "base", "limit", "usage", "cache"),
    [
        ("0::/a/b", ".", "memory.max", "memory.current", "inactive_file"),
        *(
            (
                line,
                "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
            for line in ("4:memory:/a/b",)
        ),
    ],
)
def test_memory_of_a_container_is_bounded_by_its_control_groups(
    tmp_path, line, base, limit, usage, cache
):
    own = tmp_path / "cgroup"
    own.write_text(f"7:pids:/\n{line}\n")
    folder = tmp_path / base / "a"
    (folder / "b").mkdir(parents=True)
    assert cgroup_memory(own, tmp_path) == []
    (folder / limit).write_text("1000\n")  # of the group above
    (folder / usage).write_text("600\n")
    (folder / "memory.stat").write_text(f"cache 9\ninactive_file 1\n{cache} 50\n")
    (folder / "b" / limit).write_text("max\n")
    (folder / "b" / usage).write_text("5\n")
    assert cgroup_memory(own, tmp_path) == [450]
    (folder / "b" / limit).write_text("7\n")
    (folder / "b" / usage).write_text("9\n")
    assert cgroup_memory(own, tmp_path) == [0, 450]
    assert cgroup_memory(tmp_path / "absent", tmp_path) == []
