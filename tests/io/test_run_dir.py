"""A run's folder: its name, its files, and that nothing there is ever overwritten."""

import csv
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.checkpoint import (
    checkpoint_state,
    load_model,
    read_checkpoint,
    restore,
    strip_training_state,
    write_checkpoint,
)
from ddp.io.run_dir import COLUMNS, RunDir, read_log, resolve_run
from ddp.training import StepStats, Trainer

TINY = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 16}


def make_trainer(dataset="digits", **options):
    return Trainer(Config(dataset=dataset, **TINY, **options), load_dataset(dataset))


@pytest.fixture(scope="module")
def state():
    return checkpoint_state(make_trainer())


def stats(step, loss=0.5):
    return StepStats(step, step / 10, torch.tensor(loss), torch.tensor(2.0), 1e-3)


def put_checkpoint(folder, state, name="last.pth", step=0):
    return write_checkpoint(folder / name, state | {"step": step})


def train(run_dir, trainer, until, save_every=2, total=6):
    """What train.py's loop does."""
    while trainer.step < until:
        run_dir.log_step(trainer.train_step(trainer.step / total))
        if trainer.step % save_every == 0:
            run_dir.save(trainer, keep=2)


def test_a_run_is_named_after_its_dataset_and_numbered(tmp_path, state):
    for expected in ("digits", "digits-2", "digits-3"):
        config, folder, path, checkpoint = resolve_run({"out_dir": str(tmp_path)})
        assert folder == tmp_path / expected
        assert path is None
        assert checkpoint is None
        assert config.dataset == "digits"
        assert not folder.exists()
        put_checkpoint(folder, state)


def test_a_run_on_a_folder_is_named_after_it(tmp_path):
    images = tmp_path / "my images.v2"
    images.mkdir()
    options = {"dataset": str(images), "out_dir": str(tmp_path / "runs")}
    assert resolve_run(options)[1].name == "my images.v2"
    archive = tmp_path / "faces.zip"
    archive.touch()
    assert resolve_run(options | {"dataset": str(archive)})[1].name == "faces"


def test_a_named_run_is_not_overwritten(tmp_path, state):
    options = {"out_dir": str(tmp_path), "name": "a"}
    assert resolve_run(options)[1] == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.csv").write_text("step,loss\n")
    assert resolve_run(options)[1] == tmp_path / "a"  # a log without a row is nothing to lose
    (tmp_path / "a" / "log.csv").write_text("step,loss\n1,0.5\n")
    with pytest.raises(ValueError, match="resume="):
        resolve_run(options)
    (tmp_path / "a" / "log.csv").unlink()
    put_checkpoint(tmp_path / "a", state)
    with pytest.raises(ValueError, match="name=a"):
        resolve_run(options)


def test_resume_takes_a_folder_or_a_file(tmp_path, state):
    run = tmp_path / "a"
    path = put_checkpoint(run, state, step=3)
    early = put_checkpoint(run, state, "step_00000003.pth", step=3)
    for resume, expected in ((run, path), (path, path), (early, early)):
        config, folder, found, checkpoint = resolve_run({"max_steps": 9}, str(resume))
        assert folder == run
        assert found == expected
        assert checkpoint["step"] == 3
        assert config.max_steps == 9
        assert config.channels_base == 8


def test_resume_auto_takes_the_newest_of_its_own(tmp_path, state):
    options = {"out_dir": str(tmp_path)}
    assert resolve_run(options, "auto")[1:] == (tmp_path / "digits", None, None)
    for age, name in enumerate(["digits-2", "digits", "other", "digits-x"]):
        path = put_checkpoint(tmp_path / name, state)
        os.utime(path, (1000 - age, 1000 - age))
    os.utime(tmp_path / "other" / "last.pth", (5000, 5000))
    assert resolve_run(options, "auto")[1] == tmp_path / "digits-2"
    assert resolve_run(options | {"name": "digits"}, "auto")[1] == tmp_path / "digits"
    assert resolve_run(options | {"name": "new"}, "auto")[2] is None


def test_resume_does_not_overwrite_a_later_checkpoint(tmp_path, state):
    put_checkpoint(tmp_path / "a", state, step=6)
    early = put_checkpoint(tmp_path / "a", state, "step_00000003.pth", step=3)
    with pytest.raises(ValueError, match=r"at step 3.*at step 6"):
        resolve_run({}, early)
    config, folder, path, _ = resolve_run({"name": "branch"}, early)
    assert folder == tmp_path / "branch"
    assert path == early
    assert config.name == "branch"
    put_checkpoint(folder, state)
    with pytest.raises(ValueError, match="name=branch"):
        resolve_run({"name": "branch"}, early)
    assert resolve_run({"out_dir": str(tmp_path / "b")}, early)[1] == tmp_path / "b" / "a"


def test_resume_passes_over_a_damaged_last_checkpoint(tmp_path, state):
    last = put_checkpoint(tmp_path / "a", state, step=6)
    early = put_checkpoint(tmp_path / "a", state, "step_00000003.pth", step=3)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(OSError, match="damaged"):
        resolve_run({}, tmp_path / "a")
    assert resolve_run({}, early)[1] == tmp_path / "a"
    last.unlink()
    with pytest.raises(OSError, match=r"step_00000003\.pth"):
        resolve_run({}, tmp_path / "a")


def test_resume_refuses_what_cannot_go_on(tmp_path, state):
    with pytest.raises(OSError, match="there is no checkpoint"):
        resolve_run({}, tmp_path / "nowhere")
    small = write_checkpoint(tmp_path / "a" / "model.pth", strip_training_state(state))
    with pytest.raises(OSError, match="stripped"):
        resolve_run({}, small)
    torch.save(state | {"best": "x"}, tmp_path / "b.pth")
    with pytest.raises(OSError, match="lacks best"):
        resolve_run({}, tmp_path / "b.pth")
    path = put_checkpoint(tmp_path / "c", state)
    with pytest.raises(ValueError, match="channels_base=16"):
        resolve_run({"channels_base": 16}, path)


def test_log_has_a_row_for_each_step(tmp_path):
    run_dir = RunDir(tmp_path / "a")
    for step in range(1, 5):
        run_dir.log_step(stats(step, loss=1 / step))
        if step % 2 == 0:
            run_dir.write_log(test_loss=0.25)
    assert run_dir.latest_loss == 0.25
    rows = read_log(tmp_path / "a")
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["1", "0.5", "0.333333343", "0.25"]
    assert [row["test_loss"] for row in rows] == ["", "0.25", "", "0.25"]
    assert float(rows[2]["epoch"]) == 0.3
    assert float(rows[2]["grad_norm"]) == 2
    assert float(rows[2]["lr"]) == 1e-3


def test_log_is_taken_over_up_to_the_step_of_the_checkpoint(tmp_path):
    old = RunDir(tmp_path / "a")
    for step in range(1, 6):
        old.log_step(stats(step))
    old.write_log()
    with open(tmp_path / "a" / "log.csv", "a") as f:
        f.write("6,0.2,")  # a row that a crash cut short
    assert len(read_log(tmp_path / "a")) == 5
    RunDir(tmp_path / "b", tmp_path / "a" / "step_00000003.pth", step=3)
    assert [row["step"] for row in read_log(tmp_path / "b")] == ["1", "2", "3"]
    RunDir(tmp_path / "a", tmp_path / "a" / "last.pth", step=4)
    assert [row["step"] for row in read_log(tmp_path / "a")] == ["1", "2", "3", "4"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.log_step(stats(1))
    with pytest.raises(FloatingPointError, match=r"nan at step 2.*lower lr"):
        run_dir.log_step(stats(2, loss=float("nan")))


class Remote:
    """A number on a device that is asked for it only by float()."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, value):
        self.value = value
        self.looks = 0

    def __float__(self):
        self.looks += 1
        return self.value


def test_losses_on_a_gpu_are_looked_at_now_and_then(tmp_path):
    run_dir = RunDir(tmp_path)
    losses = [Remote(1.0) for _ in range(19)] + [Remote(float("inf"))]
    for step, loss in enumerate(losses[:-1], 1):
        run_dir.log_step(StepStats(step, 0.0, loss, Remote(1.0), 1e-3))
    assert sum(loss.looks for loss in losses) == 0
    with pytest.raises(FloatingPointError, match="inf at step 20"):
        run_dir.log_step(StepStats(20, 0.0, losses[-1], Remote(1.0), 1e-3))
    assert [loss.looks for loss in losses[:-1]] == [1] * 19


def test_save_writes_and_rotates(tmp_path):
    trainer = make_trainer(max_steps=6)
    run_dir = RunDir(tmp_path / "a")
    train(run_dir, trainer, 6)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "last.pth",
        "best.pth",
        "log.csv",
        "step_00000004.pth",
        "step_00000006.pth",
    }
    tested = [float(row["test_loss"]) for row in read_log(tmp_path / "a") if row["test_loss"]]
    assert len(tested) == 3
    best = read_checkpoint(tmp_path / "a" / "best.pth")
    assert best["best"] == pytest.approx(min(tested), rel=1e-6)
    last = tmp_path / "a" / "last.pth"
    assert last.read_bytes() == (tmp_path / "a" / "step_00000006.pth").read_bytes()
    line = run_dir.save(trainer, keep=0)
    assert not list((tmp_path / "a").glob("step_*"))
    assert "test loss" in line
    assert str(last) in line


def test_save_keeps_the_good_when_the_test_loss_diverges(tmp_path, monkeypatch):
    trainer = make_trainer()
    run_dir = RunDir(tmp_path)
    run_dir.save(trainer, keep=0)
    good = (tmp_path / "last.pth").read_bytes()
    monkeypatch.setattr(trainer, "test_loss", lambda: float("nan"))
    with pytest.raises(FloatingPointError, match="test loss"):
        run_dir.save(trainer, keep=0)
    assert (tmp_path / "last.pth").read_bytes() == good


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = make_trainer(max_steps=6, dropout=0.1)
    train(RunDir(tmp_path / "whole"), whole, 6)
    trainer = make_trainer(max_steps=6, dropout=0.1)
    run_dir = RunDir(tmp_path / "broken")
    train(run_dir, trainer, 3)
    path = run_dir.save_interrupted(trainer)
    assert path == tmp_path / "broken" / "last.pth"
    config, folder, path, state = resolve_run({}, path.parent)
    trainer = Trainer(config, load_dataset("digits"))
    restore(trainer, state)
    train(RunDir(folder, path, trainer.step), trainer, 6)
    a, b = (read_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "broken"))
    assert a["best"] == b["best"]
    for part in ("model", "ema"):
        for key in a[part]:
            assert torch.equal(a[part][key], b[part][key]), key
    logs = [(tmp_path / name / "log.csv").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]
    with open(tmp_path / "whole" / "log.csv", newline="") as f:
        assert [row["step"] for row in csv.DictReader(f)] == list("123456")


def test_export_is_all_that_sampling_needs(tmp_path):
    trainer = make_trainer()
    trainer.train_step(0.0)
    trainer.recalibrated_ema()
    line = RunDir(tmp_path).export(trainer)
    assert str(tmp_path / "model.pth") in line
    model, _, state = load_model(tmp_path / "model.pth")
    assert "optimizer" not in state
    assert "model" not in state
    for key, weight in trainer.ema.state_dict().items():
        assert torch.equal(model.state_dict()[key], weight)


@pytest.mark.parametrize("dataset", ["digits", "moons"])
def test_write_samples_writes_images_and_leaves_no_trace(tmp_path, dataset):
    trainer = make_trainer(dataset)
    run_dir = RunDir(tmp_path)
    run_dir.log_step(trainer.train_step(0.0))
    line = run_dir.write_samples(trainer)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "log.csv",
        "loss.png",
        "samples/step_00000001.png",
    ]
    assert str(tmp_path / "loss.png") in line
    image = tmp_path / "samples" / "step_00000001.png"
    assert Image.open(image).width > 300
    first = image.read_bytes()
    run_dir.write_samples(trainer)  # the same noise, the same image
    assert image.read_bytes() == first


def test_samples_that_are_not_finite_do_not_end_the_run(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise FloatingPointError("samples are not finite")

    trainer = make_trainer("moons")
    run_dir = RunDir(tmp_path)
    run_dir.log_step(trainer.train_step(0.0))
    monkeypatch.setattr("ddp.io.run_dir.sample", fail)
    line = run_dir.write_samples(trainer)
    assert line == "step 1: samples are not finite yet, no image written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "loss.png"]
