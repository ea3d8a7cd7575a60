"""What a run writes: its log, its checkpoints, its pictures, and that none of them ends the run."""

import contextlib
import csv
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io import run_writer
from ddp.io.checkpoint import load_model, read_checkpoint, restore
from ddp.io.run_dir import resolve_run
from ddp.io.run_lock import RECORD
from ddp.io.run_writer import COLUMNS, RunWriter, read_log
from ddp.training import StepStats, Trainer

TINY = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 16}


def make_trainer(dataset="digits", **options):
    return Trainer(Config(dataset=dataset, **TINY, **options), load_dataset(dataset))


def stats(step, loss=0.5):
    return StepStats(step, step / 10, torch.tensor(loss), torch.tensor(2.0), 1e-3)


def train(run, trainer, until, save_every=2, total=6):
    """What train.py's loop does."""
    while trainer.step < until:
        run.log_step(trainer.train_step(trainer.step / total))
        if trainer.step % save_every == 0:
            run.save(trainer, keep=2)


def files_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def writes_fail(monkeypatch):
    """A set of names of files that cannot be written, as a spreadsheet or a full disk has it."""
    names = set()

    def failing(function):
        def call(path, *args, **options):
            is_read = function is open and not args  # the mode
            if os.path.basename(path) in names and not is_read:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **options)

        return call

    monkeypatch.setattr(run_writer, "atomic_write", failing(run_writer.atomic_write))
    monkeypatch.setattr(run_writer, "write_checkpoint", failing(run_writer.write_checkpoint))
    monkeypatch.setattr(run_writer, "open", failing(open), raising=False)
    return names


# ---- the log ----


def test_log_has_a_row_for_each_step(tmp_path):
    run = RunWriter(tmp_path / "a")
    for step in range(1, 5):
        run.log_step(stats(step, loss=1 / step))
        if step % 2 == 0:
            run.pending[-1][-1] = 0.25
            run.flush_log()
    assert run.latest_loss == 0.25
    rows = read_log(tmp_path / "a")
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["1", "0.5", "0.333333343", "0.25"]
    assert [row["val_loss"] for row in rows] == ["", "0.25", "", "0.25"]
    assert float(rows[2]["epoch"]) == 0.3
    assert float(rows[2]["grad_norm"]) == 2
    assert float(rows[2]["lr"]) == 1e-3


def test_rows_are_in_the_log_within_seconds(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(run_writer, "time", clock)
    run = RunWriter(tmp_path / "a")
    assert "val_loss" in (tmp_path / "a" / "log.csv").read_text()  # from the start
    for step in range(1, 5):
        run.log_step(stats(step))
    assert not read_log(tmp_path / "a")
    clock.now += 6
    run.log_step(stats(5))
    assert len(read_log(tmp_path / "a")) == 4  # the newest may still get a val_loss
    run.flush_log()
    assert [row["step"] for row in read_log(tmp_path / "a")] == ["1", "2", "3", "4", "5"]


def test_log_is_taken_over_up_to_the_step_of_the_checkpoint(tmp_path):
    with RunWriter(tmp_path / "a") as old:
        for step in range(1, 6):
            old.log_step(stats(step))
        old.flush_log()
    with open(tmp_path / "a" / "log.csv", "a") as f:
        f.write("6,0.2,")  # a row that a crash cut short
    assert len(read_log(tmp_path / "a")) == 5
    RunWriter(tmp_path / "b", tmp_path / "a" / "step_00000003.pth", step=3)
    assert [row["step"] for row in read_log(tmp_path / "b")] == ["1", "2", "3"]
    RunWriter(tmp_path / "a", tmp_path / "a" / "last.pth", step=4)
    assert [row["step"] for row in read_log(tmp_path / "a")] == ["1", "2", "3", "4"]


def test_log_of_before_version_0_3_is_taken_over(tmp_path):
    old = "step,epoch,loss,grad_norm,lr,test_loss\n1,0.1,0.5,2,0.001,\n2,0.2,0.4,2,0.001,0.3\n"
    (tmp_path / "log.csv").write_text(old)
    RunWriter(tmp_path, tmp_path / "last.pth", step=2)
    assert [row["val_loss"] for row in read_log(tmp_path)] == ["", "0.3"]
    assert "test_loss" not in (tmp_path / "log.csv").read_text()


@pytest.mark.parametrize(
    "row",
    ["x,0.1,0.5,2,0.001,", "3;0,1;0,5;2;0,001;", "3,0.1,nan,2,0.001,", "3,", "3,0,0,0,0,0,0,0"],
)
def test_log_that_another_program_wrote_is_read_without_its_rows(tmp_path, row):
    text = f"{','.join(COLUMNS)}\n1,0.1,0.5,2,0.001,\n{row}\n2,0.1,0.5,2,0.001,\n"
    (tmp_path / "log.csv").write_text(text)
    run = RunWriter(tmp_path, tmp_path / "last.pth", step=9)
    run.flush_log()
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2"]


def test_log_that_cannot_be_written_is_a_warning_and_its_rows_are_kept(tmp_path, writes_fail):
    warnings = []
    run = RunWriter(tmp_path, warn=warnings.append)
    trainer = make_trainer(max_steps=6)
    writes_fail.add("log.csv")
    train(run, trainer, 4)
    assert read_checkpoint(tmp_path / "last.pth")["step"] == 4
    assert len(warnings) == 1
    assert "log.csv cannot be written" in warnings[0]
    writes_fail.clear()
    train(run, trainer, 6)
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == list("123456")
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3


def test_log_that_cannot_be_begun_again_is_a_warning(tmp_path, writes_fail):
    with RunWriter(tmp_path) as old:
        for step in range(1, 6):
            old.log_step(stats(step))
        old.flush_log()
    writes_fail.add("log.csv")
    run = RunWriter(tmp_path, tmp_path / "last.pth", step=3)
    run.log_step(stats(4, loss=0.25))
    writes_fail.clear()
    run.flush_log()
    assert [row["loss"] for row in read_log(tmp_path)] == ["0.5", "0.5", "0.5", "0.25"]


def test_row_that_was_written_by_halves_is_taken_back(tmp_path, monkeypatch):
    run = RunWriter(tmp_path)

    class HalfFull:
        def __init__(self, f):
            self.f = f

        def write(self, text):
            self.f.write(text[: len(text) // 2])
            self.f.flush()
            raise OSError(28, "No space left on device")

    @contextlib.contextmanager
    def open_on_a_full_disk(*args, **options):
        with open(*args, **options) as f:
            yield HalfFull(f)

    for step in (1, 2):
        run.log_step(stats(step))
    with monkeypatch.context() as patch:
        patch.setattr(run_writer, "open", open_on_a_full_disk, raising=False)
        run.flush_log()
    run.flush_log()
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2"]


def test_log_that_was_removed_is_begun_anew(tmp_path):
    run = RunWriter(tmp_path)
    run.log_step(stats(1))
    run.flush_log()
    (tmp_path / "log.csv").unlink()
    trainer = make_trainer()
    assert "loss.png" not in run.write_samples(trainer)  # there is nothing to draw
    run.log_step(stats(2))
    run.flush_log()
    assert [row["step"] for row in read_log(tmp_path)] == ["2"]


def test_log_that_ends_in_zeros_is_read_up_to_there(tmp_path):
    run = RunWriter(tmp_path)
    run.log_step(stats(1))
    run.flush_log()
    with open(tmp_path / "log.csv", "ab") as f:
        f.write(bytes(200_000))  # what a power cut leaves of a file that had grown
    assert [row["step"] for row in read_log(tmp_path)] == ["1"]


def test_log_that_cannot_be_read_is_a_warning(tmp_path, monkeypatch):
    def locked(folder):
        raise PermissionError(13, "Permission denied", str(folder / "log.csv"))

    run = RunWriter(tmp_path)
    monkeypatch.setattr(run_writer, "read_log", locked)
    assert "warning: a picture cannot be written" in run.write_samples(make_trainer())


def test_log_that_cannot_be_written_from_the_start_is_told_to_who_listens_later(tmp_path):
    (tmp_path / "log.csv").mkdir()
    run = RunWriter(tmp_path)
    told = []
    run.warn = told.append  # as train.py does
    for step in (1, 2):
        run.log_step(stats(step))
        run.flush_log()
    assert len(told) == 1
    assert "log.csv cannot be written" in told[0]


def test_log_of_a_run_that_saved_nothing_is_set_aside(tmp_path):
    with RunWriter(tmp_path / "a") as dead:
        dead.log_step(stats(1))
        dead.flush_log()
    RunWriter(tmp_path / "a")
    assert not read_log(tmp_path / "a")
    assert "\n1,0.1,0.5," in (tmp_path / "a" / "log-2.csv").read_text()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = RunWriter(tmp_path)
    run.log_step(stats(1))
    with pytest.raises(FloatingPointError, match=r"nan at step 2.*nothing was saved.*lower lr"):
        run.log_step(stats(2, loss=float("nan")))


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
    run = RunWriter(tmp_path)
    losses = [Remote(1.0) for _ in range(19)] + [Remote(float("inf"))]
    run.flushed += 1000  # no look because of the clock
    for step, loss in enumerate(losses[:-1], 1):
        run.log_step(StepStats(step, 0.0, loss, Remote(1.0), 1e-3))
    assert sum(loss.looks for loss in losses) == 0
    with pytest.raises(FloatingPointError, match="inf at step 20"):
        run.log_step(StepStats(20, 0.0, losses[-1], Remote(1.0), 1e-3))
    assert [loss.looks for loss in losses[:-1]] == [1] * 19


# ---- checkpoints ----


def test_save_writes_and_rotates(tmp_path):
    trainer = make_trainer(max_steps=6)
    run = RunWriter(tmp_path / "a")
    train(run, trainer, 6)
    numbered = {"step_00000004.pth", "step_00000006.pth"}
    assert files_in(tmp_path / "a") == {"last.pth", "best.pth", "log.csv", RECORD} | numbered
    tested = [float(row["val_loss"]) for row in read_log(tmp_path / "a") if row["val_loss"]]
    assert len(tested) == 3
    best = read_checkpoint(tmp_path / "a" / "best.pth")
    assert best["best"] == pytest.approx(min(tested), rel=1e-6)
    last = tmp_path / "a" / "last.pth"
    assert last.read_bytes() == (tmp_path / "a" / "step_00000006.pth").read_bytes()
    line = run.save(trainer, keep=0)
    assert not list((tmp_path / "a").glob("step_*"))
    assert "val loss" in line
    assert "last.pth" in line


def test_only_checkpoints_that_the_run_numbered_go(tmp_path):
    trainer = make_trainer(max_steps=9)
    with RunWriter(tmp_path) as run:
        train(run, trainer, 4)
    mine = ["step_00000002-good.pth", "step_2.pth", "step_00000001.pth", "step_00000003.pth.bak"]
    for name in mine:
        (tmp_path / name).write_bytes(b"a copy of the user's")
    run = RunWriter(tmp_path, tmp_path / "last.pth", step=4)
    train(run, trainer, 8)
    numbered = {path.name for path in tmp_path.glob("step_*")} - set(mine)
    assert numbered == {"step_00000006.pth", "step_00000008.pth"}  # 2 and 4 were the run's
    run.save(trainer, keep=0)
    assert {path.name for path in tmp_path.glob("step_*")} == set(mine)


@pytest.mark.parametrize("val_loss", [float("nan"), 1e6])
def test_a_run_that_diverged_replaces_nothing(tmp_path, monkeypatch, val_loss):
    trainer = make_trainer()
    run = RunWriter(tmp_path)
    run.save(trainer, keep=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(trainer, "val_loss", lambda: val_loss)
    monkeypatch.setattr(trainer, "is_diverged", lambda loss: True)
    for save in (lambda: run.save(trainer, keep=2), lambda: run.save_interrupted(trainer)):
        with pytest.raises(FloatingPointError, match=r"val loss became.*last\.pth is of before"):
            save()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["best.pth", "last.pth", "step_00000004.pth"])
def test_checkpoint_that_cannot_be_written_is_a_warning_but_at_the_end(tmp_path, writes_fail, name):
    trainer = make_trainer(max_steps=6)
    run = RunWriter(tmp_path)
    train(run, trainer, 3)
    writes_fail.add(name)
    run.log_step(trainer.train_step(0.5))
    trainer.best = 1e9  # so that this is the best
    assert "warning" in run.save(trainer, keep=2)
    with pytest.raises(OSError, match=name):
        run.save(trainer, keep=2, final=True)
    if name == "best.pth":
        assert trainer.best == 1e9  # best.pth is of before, too
    writes_fail.clear()
    train(run, trainer, 6)
    assert read_checkpoint(tmp_path / "last.pth")["step"] == 6
    assert len(read_log(tmp_path)) == 6


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = tmp_path / "a"
    (folder / "samples").mkdir(parents=True)
    left = [".last.0123456789abcdef.partial.pth", ".step_00000003.12.partial.pth"]
    left += [".log.1f.partial.csv", "samples/.step_00000003.1f.partial.png"]
    mine = [".hidden.pth", ".notes.1f.partial.txt", "best.partial.pth"]
    for name in left + mine:
        (folder / name).touch()
    RunWriter(folder, folder / "last.pth")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert names == {*mine, "log.csv", RECORD}


def test_a_run_does_not_go_on_from_what_another_process_went_on_from(tmp_path):
    trainer = make_trainer(max_steps=4)
    with RunWriter(tmp_path / "a") as run:
        train(run, trainer, 2)
        with pytest.raises(ValueError, match="in use"):
            RunWriter(tmp_path / "a", tmp_path / "a" / "last.pth", step=2)
        train(run, trainer, 4)
    with pytest.raises(ValueError, match=r"at step 2.*at step 4"):  # it was read before
        RunWriter(tmp_path / "a", tmp_path / "a" / "last.pth", step=2)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = make_trainer(max_steps=6, dropout=0.1)
    train(RunWriter(tmp_path / "whole"), whole, 6)
    trainer = make_trainer(max_steps=6, dropout=0.1)
    with RunWriter(tmp_path / "broken") as run:
        train(run, trainer, 3)
        text = run.save_interrupted(trainer)
    last = tmp_path / "broken" / "last.pth"
    assert text == f"stopped at step 3, wrote {last}"
    config, folder, path, state = resolve_run({}, last.parent)
    trainer = Trainer(config, load_dataset("digits"))
    restore(trainer, state)
    train(RunWriter(folder, path, trainer.step), trainer, 6)
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
    run = RunWriter(tmp_path)
    assert run.exported_step() is None
    trainer.train_step(0.0)
    trainer.recalibrated_ema()
    line = run.export(trainer)
    assert str(tmp_path / "model.pth") in line
    assert run.exported_step() == 1
    model, _, state = load_model(tmp_path / "model.pth")
    assert "optimizer" not in state
    assert "model" not in state
    for key, weight in trainer.ema.state_dict().items():
        assert torch.equal(model.state_dict()[key], weight)
    trainer.train_step(0.5)
    assert "model.pth is still that of step 1" in run.save_interrupted(trainer)


# ---- pictures ----


@pytest.mark.parametrize("dataset", ["digits", "moons"])
def test_write_samples_writes_images_and_leaves_no_trace(tmp_path, dataset):
    trainer = make_trainer(dataset)
    run = RunWriter(tmp_path)
    run.log_step(trainer.train_step(0.0))
    line = run.write_samples(trainer)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "log.csv",
        "loss.png",
        "report.html",
        "run.json",
        "samples/step_00000001.png",
    ]
    assert "samples/step_00000001.png, loss.png" in line
    image = tmp_path / "samples" / "step_00000001.png"
    assert Image.open(image).width > 300
    first = image.read_bytes()
    run.write_samples(trainer)  # the same noise, the same image
    assert image.read_bytes() == first


def test_samples_that_are_not_finite_do_not_end_the_run(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise FloatingPointError("samples are not finite")

    trainer = make_trainer("moons")
    run = RunWriter(tmp_path)
    run.log_step(trainer.train_step(0.0))
    monkeypatch.setattr(run_writer, "picture", fail)
    line = run.write_samples(trainer)
    assert line == "step 1: samples are not finite yet, no image written"
    assert files_in(tmp_path) == {"log.csv", "loss.png", RECORD}


@pytest.mark.parametrize("name", ["loss.png", "step_00000001.png"])
def test_pictures_that_cannot_be_written_are_a_warning(tmp_path, writes_fail, name):
    trainer = make_trainer("moons")
    run = RunWriter(tmp_path)
    run.log_step(trainer.train_step(0.0))
    writes_fail.add(name)
    assert "warning: a picture cannot be written" in run.write_samples(trainer)
