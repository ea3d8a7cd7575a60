"""TensorBoard's files hold what log.csv does, each step once, also of a run that goes on."""

import importlib.util

import pytest

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.board import FOLDER, require_tensorboard
from ddp.io.run_log import read_log
from ddp.io.run_writer import RunWriter
from ddp.training import Trainer

SMALL = {"channels_base": 8, "blocks_per_level": 1, "noise_copies": 1, "batch_size": 8}


def train(folder, trainer, steps, resume_path=None):
    with RunWriter(folder, resume_path, trainer.step) as run:
        run.open_board(trainer)
        for _ in range(steps):
            run.log_step(trainer.train_step(0.0))
        run.save(trainer, keep=1)
        run.write_samples(trainer)


def test_scalars_samples_and_weights_are_there(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = load_dataset("digits")
    config = Config(dataset="digits", max_steps=9, tensorboard=True, **SMALL).resolve(data)
    trainer = Trainer(config, data)
    train(tmp_path / "run", trainer, 3)
    train(tmp_path / "run", trainer, 2, tmp_path / "run" / "last.pth")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / FOLDER))
    events.Reload()
    losses = events.Scalars("loss")
    rows = read_log(tmp_path / "run")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5] == [int(row["step"]) for row in rows]
    assert [event.value for event in losses] == pytest.approx([float(row["loss"]) for row in rows])
    assert [event.step for event in events.Scalars("val_loss")] == [3, 5]
    tags = events.Tags()
    assert len([tag for tag in tags["scalars"] if tag.startswith("v loss by log-SNR/")]) == 10
    assert tags["images"] == ["samples"]
    assert "conv_in.weight" in tags["histograms"]


def test_nothing_is_written_unasked(tmp_path):
    data = load_dataset("digits")
    train(tmp_path / "run", Trainer(Config(max_steps=9, **SMALL).resolve(data), data), 1)
    assert not (tmp_path / "run" / FOLDER).exists()


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_tensorboard(False)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        require_tensorboard(True)
