"""train.py from end to end: what it writes, refuses, resumes and reports."""

import contextlib
import itertools
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import (
    DIGITS,
    SHORT,
    TINY,
    execute,
    read_arrays,
    read_rows,
    refused,
    run,
)
from PIL import Image

from ddp.config import Config, resume_config
from ddp.data import load_dataset
from ddp.io import run_writer
from ddp.io.checkpoint import INFERENCE_KEYS, load_model, read_checkpoint
from ddp.io.config_file import read_config
from ddp.io.run_lock import RECORD, lock_folder, read_record
from ddp.io.run_writer import RunWriter


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A run of five steps that kept a checkpoint of each."""
    folder = tmp_path_factory.mktemp("numbered")
    flags = ["--max_steps", 5, "--save_every", 1, "--sample_every", 5, "--keep_checkpoints", 9]
    run("train.py", *TINY, *flags, "--name", "a", cwd=folder)
    return folder / "checkpoints" / "a"


# ---- what a run writes ----


def test_train_writes_a_run(trained):
    folder = trained / "digits"
    names = {path.name for path in folder.iterdir()}
    numbered = {"step_00000018.pth", "step_00000020.pth"}  # two are kept
    others = {"last.pth", "best.pth", "model.pth", "log.csv", "loss.png", "samples", RECORD}
    others |= {"config.json", "report.html"}
    assert names == numbered | others
    rows = read_rows(folder)
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    tested = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in tested] == [6, 12, 18, 20]
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert samples == ["step_00000010.png", "step_00000020.png"]
    best = min(float(row["val_loss"]) for row in tested)
    assert read_checkpoint(folder / "best.pth")["best"] == pytest.approx(best, rel=1e-6)


def count_saves(monkeypatch):
    """Replace what a run writes on the way by notes: return the lists of steps of saves, samples.

    The log is still written."""
    saves = []
    samples = []

    def save(self, trainer, keep, final=False):
        self.flush_log()
        saves.append(trainer.step)
        return "saved"

    def write_samples(self, trainer):
        samples.append(trainer.step)
        return "sampled"

    monkeypatch.setattr(RunWriter, "save", save)
    monkeypatch.setattr(RunWriter, "write_samples", write_samples)
    return saves, samples


@pytest.mark.parametrize(
    ("flags", "expected_saves", "expected_samples"),
    [
        ("--max_steps 20", range(2, 21, 2), range(4, 21, 4)),  # each tenth and fifth of the run
        ("--max_steps 5", range(1, 6), range(1, 6)),
        ("--max_steps 20 --save_every 8", (8, 16, 20), (8, 16, 20)),
        ("--max_steps 20 --sample_every 15", range(2, 21, 2), (15, 20)),
        ("--max_steps 20 --save_every 6 --sample_every 9", (6, 12, 18, 20), (9, 18, 20)),
    ],
)
def test_train_saves_and_samples_when_it_is_due(
    tmp_path, monkeypatch, flags, expected_saves, expected_samples
):
    saves, samples = count_saves(monkeypatch)
    run("train.py", *TINY, *flags.split(), cwd=tmp_path)
    assert saves == list(expected_saves)
    assert samples == list(expected_samples)


def test_train_prints_data_network_run_and_what_comes_next(tmp_path):
    out = run("train.py", *SHORT, cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "digits"
    assert "1,437 train and 360 test items" in out
    assert "parameters" in out
    assert f"run: {folder.relative_to(tmp_path)}, step 0 of" in out
    assert f"--checkpoint {folder / 'model.pth'}" in out


def test_exported_model_is_stripped_and_samples_like_the_last_checkpoint(trained, tmp_path):
    state = read_checkpoint(trained / "digits" / "model.pth")
    assert set(state) == set(INFERENCE_KEYS)
    images = []
    for name in ("model", "last"):
        flags = ["--checkpoint", trained / "digits" / f"{name}.pth", "--out", f"{name}.npz"]
        run("generate.py", *flags, "--num_samples", 4, "--steps", 2, cwd=tmp_path)
        images.append(read_arrays(tmp_path / f"{name}.npz")["images"])
    assert (images[0] == images[1]).all()


def test_train_overwrites_no_run(numbered, tmp_path):
    runs = tmp_path / "checkpoints"
    for name in ("digits", "digits-2", "a"):
        shutil.copytree(numbered, runs / name)
    before = {path: path.read_bytes() for path in runs.glob("*/*.*")}
    run("train.py", *SHORT, cwd=tmp_path)
    assert {path.name for path in runs.iterdir()} == {"digits", "digits-2", "digits-3", "a"}
    assert "resume" in refused("train.py", *SHORT, "--name", "a", cwd=tmp_path)
    for path, content in before.items():
        assert path.read_bytes() == content


def clock_of(monkeypatch, *modules):
    """Give modules a clock that moves a second at each look, so that no machine has a say."""
    ticks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    for module in modules:
        monkeypatch.setattr(f"ddp.{module}.time", clock)


def test_time_limit_ends_the_run_and_saves_on_the_way(tmp_path, monkeypatch):
    clock_of(monkeypatch, "training")
    saves, _ = count_saves(monkeypatch)
    run("train.py", *TINY, "--max_minutes", 0.5, "--epochs", 10**6, cwd=tmp_path)
    rows = read_rows(tmp_path / "checkpoints" / "digits")
    assert 25 < len(rows) <= 30
    assert len(saves) == 10
    assert saves[-1] == len(rows)


def test_minutes_are_planned_as_steps_of_which_a_resume_is_the_same_run(tmp_path, monkeypatch):
    flags = [*TINY, "--max_minutes", 0.5, "--sample_every", 10**6, "--save_every", 8]
    with monkeypatch.context() as patch:
        clock_of(patch, "planning", "training")
        out = run("train.py", *flags, "--dropout", 0.1, cwd=tmp_path)
    whole = tmp_path / "checkpoints" / "digits"
    found = re.search(r"step 0 of (\d+), planned from 0.5 minutes at [\d.,]+ ms a step", out)
    rows = read_rows(whole)
    assert 5 <= len(rows) == int(found[1])
    assert float(rows[-1]["lr"]) < max(float(row["lr"]) for row in rows) / 10
    half = sorted(whole.glob("step_*.pth"))[0]
    assert read_checkpoint(half)["step"] < len(rows)
    run("train.py", "--resume", half, "--name", "resumed", cwd=tmp_path)  # on another clock
    assert_same_run(whole, tmp_path / "checkpoints" / "resumed")


# ---- seeds ----


def test_seed_decides_the_run(tmp_path):
    weights = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = [*SHORT, "--seed", seed, "--name", name, "--sample_every", 9]
        run("train.py", *flags, cwd=tmp_path)
        state = read_checkpoint(tmp_path / "checkpoints" / name / "last.pth")
        weights[name] = state["model"]["network.conv_in.weight"]
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


# ---- resume ----


def assert_same_run(folder_a, folder_b):
    """Two runs have the same log, and every tensor and number in their last checkpoints."""
    a = read_checkpoint(folder_a / "last.pth")
    b = read_checkpoint(folder_b / "last.pth")
    for state in (a, b):
        del state["seconds"], state["config"]["name"], state["config"]["data_dir"]
    assert_equal(a, b, "checkpoint")
    assert (folder_a / "log.csv").read_bytes() == (folder_b / "log.csv").read_bytes()


def assert_equal(a, b, place):
    """Nested dicts and lists of plain values and tensors are the same to the bit."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_equal(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i in range(len(a)):
            assert_equal(a[i], b[i], f"{place}/{i}")
    else:
        assert a == b, place


@pytest.mark.parametrize(
    "line",
    [
        # across the end of an epoch: the 1,437 digits are passed within the 12th batch, of 16
        "--noise_dist importance --grad_accumulation 2 --class_cond --dropout 0.1 "
        "--batch_size 128 --noise_copies 1 --augment edm",
        "--schedule learned --lr_schedule linear --warmup 2",
        "--dataset moons --optimizer adamw --norm group",
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, line):
    flags = [*TINY, *line.split(), "--max_steps", 8, "--save_every", 4, "--sample_every", 8]
    run("train.py", *flags, "--name", "whole", cwd=tmp_path)
    whole = tmp_path / "checkpoints" / "whole"
    half = whole / "step_00000004.pth"
    run("train.py", "--resume", half, "--name", "resumed", cwd=tmp_path)
    assert_same_run(whole, tmp_path / "checkpoints" / "resumed")
    before = read_checkpoint(half)["ema"]
    after = read_checkpoint(whole / "last.pth")["ema"]
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(changed) > len(before) / 2  # it did train


# ---- signals ----


def interrupt_at(step, number, monkeypatch):
    """Let a signal come right after a step of whatever is trained in this process."""
    log_step = RunWriter.log_step

    def log_step_and_interrupt(self, stats):
        log_step(self, stats)
        if stats.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(RunWriter, "log_step", log_step_and_interrupt)


INTERRUPTED = [*TINY, "--max_steps", 8, "--save_every", 4, "--sample_every", 8, "--dropout", 0.1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("train.py", *INTERRUPTED, cwd=folder)
    return folder / "checkpoints" / "digits"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch, number
):
    with monkeypatch.context() as patch:
        interrupt_at(6, number, patch)
        result = execute("train.py", *INTERRUPTED, "--name", "broken", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "broken"
    assert result.code == 128 + number
    assert f"python {ROOT / 'train.py'} --resume {folder}" in result.out  # from any folder
    assert read_checkpoint(folder / "last.pth")["step"] == 6
    assert len(read_rows(folder)) == 6
    assert "again to stop at once" in result.err
    assert not (folder / "model.pth").exists()  # that of a whole run
    run("train.py", "--resume", folder, cwd=tmp_path)
    assert_same_run(uninterrupted, folder)


def test_second_signal_stops_at_once(tmp_path, monkeypatch):
    interrupt_at(3, signal.SIGINT, monkeypatch)
    interrupt_at(3, signal.SIGINT, monkeypatch)  # once more, in the same step
    result = execute("train.py", *TINY, "--max_steps", 8, "--save_every", 2, cwd=tmp_path)
    assert result.code == 130
    assert read_checkpoint(tmp_path / "checkpoints" / "digits" / "last.pth")["step"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_while_the_model_is_exported_leaves_it_whole(tmp_path, monkeypatch):
    write_checkpoint = run_writer.write_checkpoint

    def write_and_interrupt(path, state):
        if path.name == "model.pth":
            signal.raise_signal(signal.SIGTERM)
        return write_checkpoint(path, state)

    monkeypatch.setattr(run_writer, "write_checkpoint", write_and_interrupt)
    result = execute("train.py", *SHORT, cwd=tmp_path)
    assert result.code == 0, result.err
    folder = tmp_path / "checkpoints" / "digits"
    assert read_checkpoint(folder / "model.pth")["step"] == 2
    assert not list(folder.glob(".*"))


def test_interrupted_resume_says_what_model_it_leaves(numbered, tmp_path, monkeypatch):
    folder = shutil.copytree(numbered, tmp_path / "a")
    interrupt_at(7, signal.SIGINT, monkeypatch)
    out = execute("train.py", "--resume", folder, "--max_steps", 9, cwd=tmp_path).out
    assert "a/model.pth is still that of step 5" in out


def start(*flags, cwd):
    """Start train.py as a program of its own, on a run without an end."""
    flags = [*TINY, "--max_steps", 10**6, "--sample_every", 10**6, *flags]
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def test_ctrl_c_to_the_program_saves_and_says_how_to_go_on(tmp_path):
    process = start("--save_every", 3, "--name", "a", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "a"
    wait_for(folder / "step_00000003.pth", process)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    assert f"--resume {folder}" in text
    assert "Traceback" not in text
    state = read_checkpoint(folder / "last.pth")
    assert state["step"] == len(read_rows(folder))


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    process = start("--save_every", 3, "--name", "a", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "a"
    wait_for(folder / "step_00000006.pth", process)
    process.kill()
    process.communicate()
    step = read_checkpoint(folder / "last.pth")["step"]
    with open(folder / "log.csv", "a") as f:
        f.write(f"{step + 1},0.2,")  # a row that the crash cut short
    flags = ["--max_steps", step + 2, "--name", "a", "--resume", "auto"]
    run("train.py", *flags, cwd=tmp_path)
    assert [int(row["step"]) for row in read_rows(folder)] == list(range(1, step + 3))


def test_finished_run_says_how_to_go_on(numbered, tmp_path):
    folder = shutil.copytree(numbered, tmp_path / "a")
    before = {path: path.read_bytes() for path in folder.glob("*.pth")}
    out = run("train.py", "--resume", folder, cwd=tmp_path)
    assert "step 5 of 5" in out
    assert "to go on, give a larger --epochs, --max_steps or --max_minutes" in out
    assert {path: path.read_bytes() for path in folder.glob("*.pth")} == before
    (folder / "model.pth").unlink()  # as if it was killed right before
    assert "model.pth" in run("train.py", "--resume", folder, cwd=tmp_path)
    a, b = (read_checkpoint(path / "model.pth") for path in (numbered, folder))
    assert_equal(a["ema"], b["ema"], "weights")


def test_resume_auto_says_what_it_found_or_where_there_is_nothing(numbered, tmp_path):
    out = run("train.py", *SHORT, "--resume", "auto", "--out_dir", "runs", cwd=tmp_path)
    assert "nothing to resume in runs: a new run" in out
    folder = shutil.copytree(numbered, tmp_path / "runs" / "b")
    (folder / "last.pth").touch()
    out = run("train.py", "--resume", "auto", "--out_dir", "runs", "--max_steps", 6, cwd=tmp_path)
    assert f"resume: {folder / 'last.pth'}, step 5, the newest" in out
    assert read_checkpoint(folder / "last.pth")["step"] == 6


# ---- two at once ----


def test_folder_in_which_a_process_trains_is_left_to_it(numbered, tmp_path):
    runs = tmp_path / "checkpoints"
    folder = shutil.copytree(numbered, runs / "a")
    with lock_folder(runs / "digits"), lock_folder(folder):
        run("train.py", *SHORT, cwd=tmp_path)
        assert "in use" in refused("train.py", *SHORT, "--name", "digits", cwd=tmp_path)
        resume = ["--resume", folder, "--max_steps", 6]
        assert "in use" in refused("train.py", *resume, cwd=tmp_path)
        run("train.py", *resume, "--name", "branch", cwd=tmp_path)
    assert {path.name for path in runs.iterdir()} == {"a", "digits", "digits-2", "branch"}
    assert [path.name for path in (runs / "digits").iterdir()] == [RECORD]
    run("train.py", *SHORT, "--name", "digits", cwd=tmp_path)  # now it is free
    run("train.py", *resume, cwd=tmp_path)


# ---- what fails on the way ----


def test_log_that_is_removed_on_the_way_does_not_end_the_run(tmp_path, monkeypatch):
    log_step = RunWriter.log_step

    def log_step_and_remove(self, stats):
        log_step(self, stats)
        if stats.step == 3:
            (self.folder / "log.csv").unlink()

    monkeypatch.setattr(RunWriter, "log_step", log_step_and_remove)
    run("train.py", *TINY, "--max_steps", 5, "--save_every", 2, cwd=tmp_path)
    assert (tmp_path / "checkpoints" / "digits" / "model.pth").exists()


@contextlib.contextmanager
def small_disk(size):
    """A system on which no file gets larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, 16_000])
def test_full_disk_is_said_in_a_line_and_leaves_nothing_half_written(tmp_path, size):
    with small_disk(size):
        line = refused("train.py", *SHORT, cwd=tmp_path, code=1)
    assert "error:" in line
    assert not list(tmp_path.rglob("*.pth"))
    run("train.py", *SHORT, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["digits"]


def test_disk_that_is_full_for_a_while_costs_nothing(tmp_path, monkeypatch):
    log_step = RunWriter.log_step
    flags = [*TINY, "--max_steps", 8, "--save_every", 2]
    run("train.py", *flags, "--name", "whole", cwd=tmp_path)
    with contextlib.ExitStack() as disk:

        def log_step_on_a_full_disk(self, stats):
            log_step(self, stats)
            if stats.step == 3:
                disk.enter_context(small_disk(100))
            if stats.step == 7:
                disk.close()

        monkeypatch.setattr(RunWriter, "log_step", log_step_on_a_full_disk)
        result = execute("train.py", *flags, "--name", "poor", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.count("warning") == 4  # two checkpoints, two grids
    assert result.err.count("warning") == 1  # the log
    assert_same_run(tmp_path / "checkpoints" / "whole", tmp_path / "checkpoints" / "poor")


def test_resume_of_an_early_checkpoint_needs_a_name(numbered, tmp_path):
    runs = tmp_path / "checkpoints"
    shutil.copytree(numbered, runs / "a")
    early = runs / "a" / "step_00000003.pth"
    assert "name" in refused("train.py", "--resume", early, "--max_steps", 9, cwd=tmp_path)
    run("train.py", "--resume", early, "--max_steps", 4, "--name", "branch", cwd=tmp_path)
    assert [int(row["step"]) for row in read_rows(runs / "branch")] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in read_rows(runs / "a")] == [1, 2, 3, 4, 5]


def test_damaged_last_checkpoint_leaves_the_numbered_ones(numbered, tmp_path):
    folder = shutil.copytree(numbered, tmp_path / "a")
    (folder / "last.pth").write_bytes((folder / "last.pth").read_bytes()[:1000])
    assert "damaged" in refused("train.py", "--resume", folder, cwd=tmp_path, code=1)
    run("train.py", "--resume", folder / "step_00000004.pth", cwd=tmp_path)
    assert read_checkpoint(folder / "last.pth")["step"] == 5
    (folder / "last.pth").unlink()
    assert "best.pth" in refused("train.py", "--resume", folder, cwd=tmp_path, code=1)


@pytest.mark.parametrize(
    "change", [{"optimizer": []}, {"best": "x"}, {"provenance": {}}, {"ema": {}}]
)
def test_resume_refuses_a_checkpoint_that_does_not_fit(trained, tmp_path, change):
    torch.save(read_checkpoint(trained / "digits" / "last.pth") | change, tmp_path / "a.pth")
    refused("train.py", "--resume", "a.pth", "--name", "n", cwd=tmp_path, code=1)


def test_resume_refuses_a_stripped_checkpoint(tmp_path):
    assert "resume" in refused("train.py", "--resume", DIGITS, cwd=tmp_path, code=1)
    assert not list(tmp_path.iterdir())


def test_resume_refuses_what_would_make_it_another_run(trained, tmp_path):
    resume = ["--resume", trained / "digits" / "last.pth", "--name", "n"]
    for flags, name in (
        ("--seed 5", "seed"),
        ("--schedule linear", "schedule"),
        ("--batch_size 8", "batch_size"),
    ):
        line = refused("train.py", *resume, *flags.split(), cwd=tmp_path)
        assert re.search(rf"\b{name}\b", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_run_is_a_run_like_others(tmp_path):
    run("train.py", *SHORT, "--compile", "--dataset", "moons", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "moons"
    assert read_checkpoint(folder / "last.pth")["config"]["compile"]
    flags = ["--checkpoint", folder / "model.pth", "--num_samples", 4]
    run("generate.py", *flags, cwd=tmp_path)


def test_resumed_run_is_compiled_only_when_it_is_asked_for():
    assert not resume_config(Config(compile=True), {}).compile
    assert resume_config(Config(), {"compile": True}).compile


def test_a_run_begins_from_the_settings_and_the_weights_of_another(tmp_path):
    run("train.py", *TINY, "--max_steps", 2, "--dropout", 0.1, cwd=tmp_path)
    first, second = (tmp_path / "checkpoints" / name for name in ("digits", "digits-2"))
    flags = ["--config", first / "config.json", "--init_from", first, "--lr", 0.0]
    assert "lr" in refused("train.py", *flags, cwd=tmp_path)
    flags[-1] = 1e-30
    run("train.py", *flags, cwd=tmp_path)
    folders = (first, second)
    configs = [read_config(folder / "config.json", {})[0] for folder in folders]
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {"lr"}
    models = [read_checkpoint(folder / "model.pth")["ema"] for folder in folders]
    weights = [model["network.conv_in.weight"] for model in models]
    torch.testing.assert_close(*weights)  # it went on from there, so slowly


# ---- diagnostics ----


def test_dry_run_reports_and_writes_two_figures(tmp_path):
    out = run("train.py", *TINY, "--dry-run", "--schedule", "scaled_linear", cwd=tmp_path)
    assert "parameters" in out
    assert "terminal SNR 0.0047" in out  # the published figure: Lin et al. 2024, table 1
    assert "warning" in out
    assert "effective weight" in out
    assert "activations" in out
    paths = list((tmp_path / "checkpoints").iterdir())
    assert len(paths) == 2
    for path in paths:
        assert str(path.relative_to(tmp_path)) in out
        assert Image.open(path).width > 150


@pytest.mark.parametrize(
    "flags", ["--schedule scaled_linear --zero_terminal_snr", "--schedule learned", ""]
)
def test_dry_run_does_not_warn_of_a_schedule_that_ends_in_noise(tmp_path, flags):
    assert "warning" not in run("train.py", *TINY, "--dry_run", *flags.split(), cwd=tmp_path)


def test_profile_reports_where_the_time_goes_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp.io.diagnostics.PROFILED_STEPS", 3)
    out = run("train.py", *TINY, "--profile", cwd=tmp_path)
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
    heads = rows[""]
    assert heads[-1] == "all"
    assert {"batch", "forward", "backward", "optimizer"} <= set(heads)
    percents = {}
    for name, cells in rows.items():
        if cells and all(cell.endswith("%") for cell in cells):
            percents[name] = [float(cell.rstrip("%")) for cell in cells]
    kinds_total = sum(cells[-1] for name, cells in percents.items() if name != "all")
    assert kinds_total == pytest.approx(100, abs=1)
    assert percents["all"][-1] == 100
    assert percents["convolutions"][heads.index("forward")] > 0
    assert not list(tmp_path.iterdir())


# ---- what is refused ----


def test_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    flags = [*TINY, "--lr", 1e6, "--grad_clip", 0, "--warmup", 0, "--save_every", 1]
    line = refused("train.py", *flags, "--max_steps", 50, cwd=tmp_path, code=1)
    assert re.search(r"\blr\b", line)
    for path in (tmp_path / "checkpoints" / "digits").glob("*.pth"):
        state = read_checkpoint(path)
        for part in ("model", "ema"):
            assert all(weight.isfinite().all() for weight in state[part].values())


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--epochs 0", "epochs"),
        ("--epochs -3", "epochs"),
        ("--lr nan", "lr"),
        ("--lr abc", "lr"),
        ("--batch_size 0", "batch_size"),
        ("--batch_size 1", "batch_size"),
        ("--dropout 1.5", "dropout"),
        ("--channels_base 0", "channels_base"),
        ("--dataset nowhere", "dataset"),
        ("--dataset =", "dataset"),
        ("--schedule cubic", "schedule"),
        ("--noise_dist cubic", "noise_dist"),
        ("--network cubic", "network"),
        ("--image_size 0", "image_size"),
        ("--image_size 8x8", "image_size"),
        ("--seed -1", "seed"),
        ("--device tpu", "device"),
        ("--precision fp16 --device cpu", "precision"),
        ("--dataset moons --class_cond", "class_cond"),
        ("--dataset moons --attention_resolutions 4", "attention_resolutions"),
        ("--attention_resolutions 5", "attention_resolutions"),
        ("--timesteps -1", "timesteps"),
        ("--unknown 1", "unknown"),
        ("--epoch 1", "epoch"),
        ("--channel_mult 0,1", "channel_mult"),
        ("--name ../evil", "name"),
        ("--device meta", "device"),
        ("--schedule learned --timesteps 10", "timesteps"),
        ("--schedule learned --zero_terminal_snr", "zero_terminal_snr"),
        ("--schedule learned --noise_dist uniform", "noise_dist"),
        ("--schedule learned --weighting v", "weighting"),
        ("--schedule learned --loss l1", "loss"),
        ("--zero_terminal_snr --prediction eps", "prediction"),
        ("--zero_terminal_snr --timesteps 1", "zero_terminal_snr"),
        ("--zero_terminal_snr --weighting vlb", "weighting"),
        ("--noise_dist edm --weighting vlb", "noise_dist"),
        ("--noise_dist lognormal --weighting vlb", "noise_dist"),
        ("--noise_dist edm --zero_terminal_snr", "noise_dist"),
        ("--shift 1e-300", "shift"),
        ("--label_dropout 0.5", "class_cond"),
        ("--negative_slope 0.3 --activation silu", "negative_slope"),
    ],
)
def test_train_refuses_a_wrong_flag_before_any_work(tmp_path, flags, name):
    arguments = ["" if flag == "=" else flag for flag in flags.split()]
    result = execute("train.py", *arguments, cwd=tmp_path)
    assert result.code == 2, result.out + result.err
    assert re.search(rf"\b{name}\b", result.error_line)
    assert len(result.err.strip().splitlines()) <= 2  # the usage is one line
    assert not list(tmp_path.iterdir())


# ---- every option ----

# Every option is used by a line below or by another test of this file; {images} is a folder.
TRAIN_LINES = [
    "--dataset moons --data_dir d --channels_base 16 --blocks_per_level 2 --timesteps 0 "
    "--schedule flow --prediction flow --weighting flow --shift 2 --seed 3 --name a --out_dir o "
    "--device cpu --precision fp32 --keep_checkpoints 0 --network mlp",
    "--channels 3 --image_size 8x10 --test_fraction 0.5 --label_dropout 0.2 --class_cond "
    "--channel_mult 1,2 --patch_size 2 --attention_resolutions 2 --dataset {images} "
    "--weighting v --loss l1 --activation relu --augment edm",
    "--schedule scaled_linear --zero_terminal_snr --noise_dist uniform --weighting p2 "
    "--loss huber --norm group --activation silu --dropout 0.1 --init xavier --network unet "
    "--augment flip",
    "--noise_dist importance --weighting vlb --optimizer adamw --lr 0.01 --lr_schedule linear "
    "--threads 1 --shards 2 --reduce fast --checkpoint_activations "
    "--warmup 2 --noise_copies 2 --weight_decay 0 --grad_clip 0 --grad_accumulation 2 "
    "--ema_decay 0.9",
    "--epochs 0.02 --max_minutes 1 --save_every 1 --keep_checkpoints 1 --sample_every 1",
    "--schedule learned --optimizer muon --lr_schedule cosine --reduce tree",
    "--schedule karras --noise_dist edm --weighting edm --norm batch --init kaiming",
    "--schedule linear --noise_dist lognormal --zero_terminal_snr --timesteps 20 "
    "--weighting truncated_snr --prediction v --precision bf16",
    "--schedule sigmoid --timesteps 20 --prediction x0 --weighting uniform "
    "--loss mse --activation leaky_relu --negative_slope 0.2",
    "--schedule cosine --timesteps 20 --prediction eps --weighting snr --noise_dist stratified",
    "--weighting min_snr --norm none --init default --lr_schedule constant --augment none "
    "--size s --preset samples --fourier_features 2",
    "--size m --preset likelihood --channels_base 8 --blocks_per_level 1",
    "--size l --channels_base 16 --blocks_per_level 1",
]


@pytest.mark.parametrize("line", TRAIN_LINES)
def test_train_and_generate_with_every_option(files, tmp_path, line):
    size = ["--batch_size", 16] if "--channels_base" in line else TINY
    limit = [] if "--epochs" in line else ["--max_steps", 2, "--save_every", 2]
    run("train.py", *size, *limit, *line.format(**files).split(), cwd=tmp_path)
    (path,) = tmp_path.glob("*/*/model.pth")
    out = run("generate.py", "--checkpoint", path, "--num_samples", 4, cwd=tmp_path)
    assert "dpmpp_2m_sde in 20 steps" in out


def test_every_train_option_and_choice_is_used_by_a_test():
    elsewhere = {"--batch_size", "--resume", "--dry_run", "--max_steps", "--profile", "--compile"}
    elsewhere |= {"--new_data", "--labels", "--cache"}
    elsewhere |= {"--config", "--init_from", "--plugin"}  # of which the last by test_registries.py
    elsewhere |= {"--tensorboard"}  # by tests/io/test_board.py
    text = execute("train.py", "--help", cwd=ROOT).out
    options = {"--" + name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", text)}
    words = set(" ".join(TRAIN_LINES).split())
    assert len(options) > 40
    assert options - {"--help"} - words == elsewhere
    for choices in re.findall(r"(--\w+) \{(.+?)\}", text):
        unused = set(choices[1].split(",")) - words
        unused -= {"auto", "fp16", "1"}  # defaults of a machine, CUDA only, gray images
        assert not unused, choices[0]


# ---- through all scripts ----

FEW = ["--vlb_items", 20, "--vlb_samples", 2, "--nll_items", 2, "--dequant_samples", 1]
FEW += ["--num_samples", 20, "--steps", 2, "--metrics", "loss,vlb,ode_nll,pixels"]


def test_learned_schedule_goes_through_all_scripts(files, tmp_path):
    run("train.py", *SHORT, "--schedule", "learned", cwd=tmp_path)
    path = tmp_path / "checkpoints" / "digits" / "last.pth"
    for edit in ("reconstruct", "interpolate", "image"):
        flags = [f"--{edit}", files["array"], "--steps", 10, "--out", f"{edit}.png"]
        run("generate.py", "--checkpoint", path, *flags, cwd=tmp_path)
    run("evaluate.py", "--checkpoint", path, *FEW, cwd=tmp_path)
    run("train.py", "--resume", path, "--max_steps", 3, cwd=tmp_path)


@pytest.mark.parametrize("flags", ["--timesteps 3", "--timesteps 1", "--zero_terminal_snr"])
def test_few_timesteps_and_zero_terminal_snr_go_through_all_scripts(files, tmp_path, flags):
    run("train.py", *SHORT, *flags.split(), cwd=tmp_path)
    path = tmp_path / "checkpoints" / "digits" / "last.pth"
    steps = ["--steps", 1] if flags == "--timesteps 1" else []
    run("evaluate.py", "--checkpoint", path, *FEW, *steps, cwd=tmp_path)
    run("generate.py", "--checkpoint", path, "--image", files["array"], cwd=tmp_path)
    if flags == "--timesteps 1":
        return  # there is no other level to invert to: test_generate_script.py
    steps = ["--steps", 10] if flags == "--zero_terminal_snr" else []
    run("generate.py", "--checkpoint", path, "--reconstruct", files["array"], *steps, cwd=tmp_path)


def test_folder_of_images_is_trained_on_and_found_again_when_it_moves(files, tmp_path):
    flags = [*SHORT, "--dataset", files["images"], "--image_size", "10x14", "--class_cond"]
    out = run("train.py", *flags, cwd=tmp_path)
    assert "2 classes" in out
    path = tmp_path / "checkpoints" / "all" / "last.pth"
    flags = ["--checkpoint", path, "--num_samples", 3, "--steps", 2]
    run("generate.py", *flags, "--label", "blue, dark", "--out", "a.npz", cwd=tmp_path)
    arrays = read_arrays(tmp_path / "a.npz")
    assert arrays["images"].shape == (3, 10, 14, 3)
    assert arrays["labels"].tolist() == [0, 0, 0]
    images = shutil.copytree(files["images"], tmp_path / "elsewhere" / "all")
    assert read_checkpoint(path.with_name("model.pth"))["config"]["dataset"] == "all"
    (path.parent / RECORD).unlink()  # as in a checkpoint that came from elsewhere
    resume = ["--resume", path, "--max_steps", 3]
    assert "set dataset" in refused("train.py", *resume, cwd=tmp_path)
    run("train.py", *resume, "--dataset", images, cwd=tmp_path)
    assert read_record(path.parent)["dataset"] == str(images)
    run("train.py", "--resume", path, "--max_steps", 4, cwd=tmp_path)  # found there from now on
    (images / "red" / "1.png").unlink()
    resume = ["--resume", path, "--max_steps", 5]
    line = refused("train.py", *resume, cwd=tmp_path, code=1)  # other data
    assert re.search(r"(22 train|2 test) items then, \d+ now", line), line
    assert f"{images / 'red'}" in line
    assert "new_data" in line
    assert read_checkpoint(path)["step"] == 4
    run("train.py", *resume, "--new_data", cwd=tmp_path)
    assert read_checkpoint(path)["step"] == 5


def test_wrong_path_of_a_dataset_is_refused_by_name(files, tmp_path):
    """Whatever lies in data_dir: a run on other images would be called after the wrong path."""
    wrong = tmp_path / "photos" / files["images"].name
    for place in (files["images"], files["images"].parent):
        flags = ["--dataset", wrong, "--data_dir", place]
        assert str(wrong) in refused("train.py", *SHORT, *flags, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_dataset_by_path_is_remembered_as_an_absolute_path(tmp_path):
    images = load_dataset("digits").train[:30, 0].numpy()
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "mine" / f"{i}.png")
    run("train.py", *SHORT, "--dataset", "mine", cwd=tmp_path)
    state = read_checkpoint(tmp_path / "checkpoints" / "mine" / "last.pth")
    assert state["config"]["dataset"] == str(tmp_path / "mine")


# ---- the shipped models ----


def test_shipped_digits_is_the_run_that_the_first_example_makes():
    assert DIGITS.stat().st_size <= 2_500_000
    _, config, state = load_model(DIGITS)
    chosen = (config.dataset, config.epochs, config.lr, config.batch_size)
    assert chosen == ("digits", 100, 1e-3, 128)
    assert set(state) == set(INFERENCE_KEYS)
    assert state["provenance"]["fingerprint"] == load_dataset("digits").fingerprint


def test_shipped_mnist_is_the_run_of_the_documents(tmp_path):
    path = ROOT / "checkpoints" / "mnist.pth"
    assert path.stat().st_size <= 4_000_000
    _, config, state = load_model(path)
    assert (config.dataset, config.data_dir) == ("mnist", "data")
    assert f"mnist --max_minutes {config.max_minutes:g}`" in (ROOT / "README.md").read_text()
    assert f"{state['step']:,} steps" in (ROOT / "docs" / "evaluation.md").read_text()
    run("generate.py", "--checkpoint", path, "--num_samples", 16, "--out", "a.npz", cwd=tmp_path)
    images = read_arrays(tmp_path / "a.npz")["images"]
    assert images.shape == (16, 28, 28, 1)
    assert 20 < images.mean() < 50  # of the data: 34
