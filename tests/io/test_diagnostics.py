"""Diagnostics: memory, the weight of noise levels and the time of a step, as they are."""

import math
import re

import pytest
import torch
from PIL import Image

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.diagnostics import (
    KINDS,
    OTHER,
    TIMED_STEPS,
    dry_run,
    kind_of,
    memory_report,
    noise_levels,
    profile,
    time_table,
)
from ddp.io.memory import training_memory
from ddp.training import Trainer


def make_trainer(**options):
    config = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 16, "warmup": 2, **options}
    dataset = load_dataset(config.get("dataset", "digits"))
    return Trainer(Config(**config), dataset)


def test_memory_is_reported_before_it_is_taken(tmp_path):
    trainer = make_trainer()
    report = memory_report(trainer)
    assert report == training_memory(trainer.config, trainer.model.event)
    first = next(dry_run(trainer, tmp_path / "run"))
    assert trainer.step == 0
    assert first.startswith(f"memory: about {sum(report.values()) / 1e6:,.0f} MB: weights")
    assert not list(tmp_path.iterdir())


def test_dry_run_reports_and_plots(tmp_path):
    trainer = make_trainer(schedule="scaled_linear")
    lines = list(dry_run(trainer, tmp_path / "run"))
    text = "\n".join(lines)
    assert trainer.step == 1 + TIMED_STEPS
    assert re.search(r"time: about [\d,]+ ms a step, [\d.]+ minutes for [\d,]+ steps", text)
    assert "terminal SNR 0.0047" in text  # the published figure: Lin et al. 2024, table 1
    assert "warning" in text
    assert "shift=2.3" in text
    assert "zero_terminal_snr" in text
    assert "effective weight" in text
    assert "activations" in text
    assert "--" not in text
    names = ["run-dry_run.png", "run-items.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert str(tmp_path / name) in text
        assert Image.open(tmp_path / name).width > 150


def test_dry_run_says_how_many_steps_fit_into_the_minutes(tmp_path):
    text = "\n".join(dry_run(make_trainer(max_steps=None, max_minutes=2), tmp_path / "run"))
    assert re.search(r"time: about [\d,]+ ms a step, [\d,]+ steps in 2 minutes", text)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "scaled_linear", "zero_terminal_snr": True},
        {"schedule": "learned"},
        {"noise_dist": "importance"},
        {},
    ],
)
def test_dry_run_warns_only_where_the_data_shows_through(tmp_path, options):
    assert "warning" not in "\n".join(dry_run(make_trainer(**options), tmp_path / "run"))


def test_the_shift_that_dry_run_advises_is_enough(tmp_path):
    trainer = make_trainer(schedule="scaled_linear", shift=2.3)
    assert "warning" not in "\n".join(dry_run(trainer, tmp_path / "run"))


def test_noise_levels_of_weighting_v_are_equal():
    """The weight of |v_hat - v|² is 1 everywhere, so it is the fraction of items that counts."""
    rows = torch.tensor(noise_levels(make_trainer(weighting="v")))
    log_snr, fraction, weight = rows.T
    assert (log_snr.diff() > 0).all()
    assert fraction.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weight, fraction / fraction.max(), rtol=1e-3, atol=1e-5)


def test_noise_levels_of_weighting_vlb_follow_the_sigmoid():
    """Of the VLB, d log_snr SNR / 2 |x0_hat - x0|² is SNR / (1 + SNR) of |v_hat - v|²."""
    trainer = make_trainer(weighting="vlb", timesteps=0, schedule="cosine")
    rows = torch.tensor(noise_levels(trainer))
    log_snr, _, weight = rows.T
    expected = torch.sigmoid(log_snr)
    middle = log_snr.abs() < 4  # coarse bins blur the rest
    ratio = (weight / expected)[middle]
    assert ratio.max() / ratio.min() < 1.3


def test_profile_says_where_the_time_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddp.io.diagnostics.PROFILED_STEPS", 3)
    lines = profile(make_trainer())
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    assert rows[""][-1] == "all"
    assert {"batch", "forward", "backward", "optimizer"} <= set(rows[""])
    sums = {name: float(rows[name][-1].rstrip("%")) for name in (*KINDS, OTHER)}
    assert sum(sums.values()) == pytest.approx(100, abs=1)
    assert rows["all"][-1] == "100.0%"
    assert float(rows["convolutions"][rows[""].index("forward")].rstrip("%")) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::convolution_backward", "convolutions"),
        ("aten::addmm", "matrix products"),
        ("aten::native_batch_norm", "normalization"),
        ("aten::leaky_relu_", "activations"),
        ("aten::_foreach_lerp_", "sums and products"),
        ("aten::copy_", "copies"),
        ("aten::randperm", "the rest"),
        ("part forward of conv", "the rest"),
    ],
)
def test_kind_of_operation(name, kind):
    assert kind_of(name) == kind


def test_time_table_sums_rows_and_columns():
    fractions = {
        ("convolutions", "forward"): 0.25,
        ("convolutions", "backward"): 0.5,
        ("copies", "batch"): 0.125,
        ("the rest", "the rest"): 0.125,
    }
    first, header, *rows = time_table(0.5, fractions, 64)
    assert "500.0 ms" in first
    assert "128 items" in first
    assert header.split() == ["batch", "forward", "backward", "the", "rest", "all"]
    cells = {row[:20].strip(): [float(c.rstrip("%")) for c in row[20:].split()] for row in rows}
    assert cells["convolutions"] == [0, 25, 50, 0, 75]
    assert cells["all"] == [12.5, 25, 50, 12.5, 100]
    assert math.isclose(sum(c[-1] for name, c in cells.items() if name != "all"), 100)
