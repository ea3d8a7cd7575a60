"""train.py under torchrun: the same bits on any number of processes, whatever happens to them."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import TINY, read_rows, run, start_torchrun, torchrun
from test_train_script import assert_same_run, small_disk

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.checkpoint import parse_config, read_checkpoint
from ddp.io.run_dir import resumed_config, run_of_launch
from ddp.io.run_lock import write_record

SHARDS = [*TINY, "--shards", 4, "--sample_every", 10**6]
MANY = "--class_cond --dropout 0.1 --grad_accumulation 2 --noise_dist importance --augment edm"
LEARNED = "--schedule learned --noise_copies 2"
ENDLESS = ["--max_steps", 10**6]

SUMS = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, ROOT)
from ddp.distributed import *

def fail(rank):
    raise FileNotFoundError("the cause") if rank == 0 else AssertionError

def pairwise(values):
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return pairwise(values[:half]) + pairwise(values[half:])

with processes():
    rank = 0 if is_main() else 1
    for shards in (1, 2, 8, 16):
        for size in (1, 2, 100):
            values = torch.randn(shards, size, generator=torch.Generator().manual_seed(size))
            for reduce in ("tree", "fast"):
                tree = TreeSum()
                for part in my_parts(shards):
                    tree.add(part, 1, values[part])
                total = sum_over_parts(tree, shards, size, "cpu", reduce)
                torch.testing.assert_close(total, values.sum(0), rtol=0, atol=1e-4)
                assert reduce == "fast" or torch.equal(total, pairwise(values)), (shards, size)
    assert list(in_order(lambda i: i * i, range(7))) == [i * i for i in range(7)]
    assert list(in_order(abs, range(7), everywhere=False)) == [*range(7)] * (rank == 0)
    assert broadcast(rank) == 0
    assert maximum(rank) == 1
    assert gather(rank) == [0, 1, 1]
    assert on_main(divmod, 7, 2) == (3, 1)
    try:
        on_main(fail, rank)
    except FileNotFoundError as error:
        assert str(error) == "the cause"
    else:
        raise AssertionError("on_main")
    mark = Path("mark")
    with main_first():
        assert mark.exists() == (rank > 0)
        mark.touch()
    print("done by", rank)
"""

NO_DATA_ON_THE_SECOND_PROCESS = """
import os

import ddp.data

def digits(*args, read=ddp.data.DATASETS["digits"], **options):
    if os.environ["RANK"] == "1":
        raise FileNotFoundError("no data on this machine")
    return read(*args, **options)

ddp.data.DATASETS["digits"] = digits
"""


def succeed(count, *flags, cwd, launch=()):
    """Return what train.py prints on so many processes."""
    result = torchrun(count, "train.py", *flags, cwd=cwd, launch=launch)
    assert result.code == 0, result.err
    return result.out


@contextlib.contextmanager
def started(count, *flags, cwd, launch=("--standalone",)):
    """Start train.py on so many processes; what is left of them at the end is killed."""
    where = {"cwd": cwd, "launch": launch, "stderr": subprocess.STDOUT}
    process = start_torchrun(count, "train.py", *flags, **where)
    left = []
    try:
        yield process
    finally:
        left = workers(process) if process.poll() is None else []
        for number in [process.pid] * bool(left) + left:
            os.kill(number, signal.SIGKILL)


def workers(process):
    """Return the ids of the processes that torchrun has started, the main one first."""
    own = process.pid
    return [int(word) for word in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def test_sums_and_turns_of_three_processes(tmp_path):
    script = tmp_path / "sums.py"
    script.write_text(SUMS.replace("ROOT", repr(str(ROOT))))
    result = torchrun(3, script, cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.strip() == "done by 0"  # the others are silent


@pytest.mark.parametrize(("line", "counts"), [(MANY, (2, 4)), (LEARNED, (2,))])
def test_a_run_has_the_same_bits_on_1_2_and_4_processes(line, counts, tmp_path):
    flags = [*SHARDS, *line.split(), "--max_steps", 6, "--save_every", 3]
    alone = run("train.py", *flags, "--name", "on1", cwd=tmp_path)
    folder = tmp_path / "checkpoints"
    for count in counts:
        out = succeed(count, *flags, "--name", f"on{count}", cwd=tmp_path)
        assert f"parts: 4 of 4 items on {count} processes" in out
        assert out.count("wrote") == alone.count("wrote")  # by one process
        assert_same_run(folder / f"on{count}", folder / "on1")
        names = {path.name for path in (folder / f"on{count}").iterdir()}
        assert names == {path.name for path in (folder / "on1").iterdir()}


def test_killed_on_4_processes_and_resumed_on_1_and_2(tmp_path):
    flags = [*SHARDS, "--dropout", 0.1, "--save_every", 3, "--lr_schedule", "constant"]
    flags += ["--warmup", 0]  # so that the length of the run does not matter
    killed = tmp_path / "checkpoints" / "killed"
    with started(4, *flags, *ENDLESS, "--name", "killed", cwd=tmp_path) as process:
        wait_for(killed / "step_00000003.pth", process)
        wait_for(killed / "last.pth", process)
        os.kill(workers(process)[0], signal.SIGKILL)
        text = process.communicate(timeout=240)[0]
        assert process.returncode == 1, text
    until = read_checkpoint(killed / "last.pth")["step"] + 2
    flags += ["--max_steps", until]
    run("train.py", *flags, "--name", "whole", cwd=tmp_path)
    for count in (1, 2):
        folder = shutil.copytree(killed, killed.with_name(f"on{count}"))
        resume = ["--resume", folder, "--max_steps", until]
        if count == 1:
            run("train.py", *resume, cwd=tmp_path)
        else:
            succeed(count, *resume, cwd=tmp_path)
        assert_same_run(folder, killed.with_name("whole"))


def test_a_killed_process_is_started_anew_and_all_go_on(tmp_path):
    flags = [*SHARDS, "--max_steps", 40, "--save_every", 5]
    flags += ["--keep_checkpoints", 40]
    folder = tmp_path / "checkpoints" / "digits"
    with started(2, *flags, cwd=tmp_path, launch=["--standalone", "--max-restarts", 1]) as process:
        wait_for(folder / "step_00000010.pth", process)
        os.kill(workers(process)[1], signal.SIGKILL)
        text = process.communicate(timeout=240)[0]
        assert process.returncode == 0, text
    assert f"resume: {folder / 'last.pth'}, step " in text
    run("train.py", *flags, "--name", "whole", cwd=tmp_path)
    assert_same_run(folder, folder.with_name("whole"))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["digits", "whole"]


def test_two_machines_train_as_one_process_does(tmp_path):
    """Here they are two torchruns, which find each other as those of two machines do."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launch = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    launch += ["--rdzv_id", "job 7", "--local_addr", "localhost"]
    flags = [*SHARDS, "--max_steps", 4, "--save_every", 4, "--class_cond"]
    with contextlib.ExitStack() as stack:
        machines = []
        for _ in range(2):
            machine = started(1, *flags, "--name", "on2", cwd=tmp_path, launch=launch)
            machines.append(stack.enter_context(machine))
        texts = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], texts
    assert sorted("wrote" in text for text in texts) == [False, True]  # one of them writes
    run("train.py", *flags, "--name", "on1", cwd=tmp_path)
    folder = tmp_path / "checkpoints"
    assert_same_run(folder / "on2", folder / "on1")


def test_a_launch_finds_its_newest_whole_checkpoint(tmp_path, monkeypatch):
    """Whatever the kill has left: the first save writes best.pth, a numbered one, and last.pth."""
    flags = [*TINY, "--max_steps", 4, "--save_every", 2]
    run("train.py", *flags, cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "digits"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert run_of_launch(folder.parent) is None  # the run is of no launch
    state = read_checkpoint(folder / "last.pth")
    with open(folder / "run.json", "w") as file:
        write_record(file, parse_config(state, "last.pth"), load_dataset("digits"))
    names = ["last.pth", "step_00000004.pth", "step_00000002.pth", "best.pth"]
    for name in names:
        assert run_of_launch(folder.parent) == folder / name
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])  # cut short
    assert run_of_launch(folder.parent) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    assert run_of_launch(folder.parent) is None


def test_a_run_of_before_has_one_part_on_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp.distributed.WORLD", 4)
    assert resumed_config(Config(), {}, tmp_path / "last.pth").shards == 1


def test_a_signal_to_torchrun_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "checkpoints" / "digits"
    with started(2, *SHARDS, *ENDLESS, "--save_every", 3, cwd=tmp_path) as process:
        wait_for(folder / "last.pth", process)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert text.count(f"--resume {folder}") == text.count("stopped at step") == 1
    assert text.count("stopping after this step") == 1
    state = read_checkpoint(folder / "last.pth")
    assert state["step"] == len(read_rows(folder))


def test_data_that_one_process_lacks_are_named_once_and_end_all(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(NO_DATA_ON_THE_SECOND_PROCESS)
    flags = [*SHARDS, *ENDLESS, "--plugin", plugin]
    result = torchrun(2, "train.py", *flags, cwd=tmp_path)
    assert result.code == 1
    assert result.err.count("no data on this machine") == 1
    assert "Traceback" not in result.err.split("torch/distributed")[0]
    assert not list(tmp_path.rglob("*.pth"))


def test_what_cannot_be_done_is_said_once(tmp_path):
    result = torchrun(2, "train.py", *SHARDS, "--batch_size", 6, cwd=tmp_path)
    assert result.code == 1  # torchrun's
    assert result.err.count("error: shards=4 does not divide batch_size=6") == 1
    result = torchrun(2, "train.py", "--no_such_flag", cwd=tmp_path)
    assert result.code == 1
    assert result.err.count("unrecognized arguments: --no_such_flag") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_the_main_process_ends_all(tmp_path):
    with small_disk(16_000):
        result = torchrun(2, "train.py", *SHARDS, "--max_steps", 2, cwd=tmp_path)
    assert result.code == 1
    assert result.err.count("train.py: error: ") == 1
    assert "best.pth could not be written" in result.err
    assert not list(tmp_path.rglob("*.pth"))


def test_more_processes_than_parts_are_warned_of_and_break_nothing(tmp_path):
    flags = [*TINY, "--shards", 1, "--max_steps", 3, "--sample_every", 10**6]
    out = succeed(2, *flags, "--name", "on2", cwd=tmp_path)
    assert "of which 1 train nothing; give shards=2 or more" in out
    run("train.py", *flags, "--name", "on1", cwd=tmp_path)
    folder = tmp_path / "checkpoints"
    assert_same_run(folder / "on2", folder / "on1")


def test_the_fast_sum_is_the_same_but_for_rounding_and_says_so(tmp_path):
    flags = [*SHARDS, "--norm", "group", "--max_steps", 3, "--save_every", 3]
    out = succeed(2, *flags, "--reduce", "fast", "--name", "fast", cwd=tmp_path)
    assert "reduce=fast: the last bits depend on the number of processes" in out
    run("train.py", *flags, "--name", "tree", cwd=tmp_path)
    folder = tmp_path / "checkpoints"
    for fast, tree in zip(*map(read_rows, (folder / "fast", folder / "tree")), strict=True):
        assert float(fast["loss"]) == pytest.approx(float(tree["loss"]), rel=1e-4)
