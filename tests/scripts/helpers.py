"""What the tests of the scripts share: a script run in this process, and small trained models."""

import contextlib
import csv
import importlib
import io
import os
import signal
import subprocess
import sys

import numpy as np
from conftest import ROOT
from PIL import Image

from ddp.data import load_dataset
from ddp.io.cli import command

TINY = ["--channels_base", 8, "--blocks_per_level", 1, "--batch_size", 16]  # a small network
SHORT = [*TINY, "--max_steps", 2, "--save_every", 2]  # and a short run of it, with one save
DIGITS = ROOT / "checkpoints" / "digits.pth"


class Result:
    """What a script did: its exit code, and what it wrote to stdout and stderr."""

    def __init__(self, code, out, err):
        self.code = code
        self.out = out
        self.err = err

    @property
    def error_line(self):
        return self.err.strip().splitlines()[-1]


def execute(script, *flags, cwd):
    """Run a script such as "train.py" in this process, in the folder `cwd`; return its Result."""
    module = importlib.import_module(script.removesuffix(".py"))
    arguments = [str(flag) for flag in flags]
    out = io.StringIO()
    err = io.StringIO()
    here = os.getcwd()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            os.chdir(cwd)
            code = command(module.main, module.parse, arguments)
        except SystemExit as stop:  # argparse's
            code = stop.code
        finally:
            os.chdir(here)
    return Result(code, out.getvalue(), err.getvalue())


def start_torchrun(world_size, script, *flags, cwd, launch, **options):
    """Start a script under torchrun on processes of one thread; options: of Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", world_size]
    command += [*launch, ROOT / script, *flags]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def torchrun(world_size, script, *flags, cwd, launch=(), timeout=120):
    """Run a script under torchrun on processes of one thread, in the folder `cwd`; its Result.

    launch: flags of torchrun itself. After `timeout` seconds all processes are killed."""
    launch = ("--standalone", *launch)
    own_group = {"stderr": subprocess.PIPE, "start_new_session": True}
    process = start_torchrun(world_size, script, *flags, cwd=cwd, launch=launch, **own_group)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Result(process.returncode, out, err)


def run(script, *flags, cwd):
    """Return what a script prints that must succeed."""
    result = execute(script, *flags, cwd=cwd)
    assert result.code == 0, result.out + result.err
    return result.out


def refused(script, *flags, cwd, code=2):
    """Return the last line of what a script says that must fail with `code`: 2 or 1."""
    result = execute(script, *flags, cwd=cwd)
    assert result.code == code, result.out + result.err
    assert "Traceback" not in result.err
    return result.error_line


def read_rows(folder):
    """Return the rows of a run's log.csv, dicts of strings."""
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def read_arrays(path):
    """Return the arrays of an .npz: name -> array."""
    with np.load(path) as npz:
        return {name: npz[name] for name in npz.files}


# ---- made once in a session; each file of tests has a fixture that calls these ----


def make_once(tmp_path_factory, name, fill):
    """Return the session's folder `name`, which fill(folder) fills when it is first asked for."""
    folder = tmp_path_factory.getbasetemp() / name
    if not folder.exists():
        aside = tmp_path_factory.mktemp("aside")  # a failure leaves nothing half done
        fill(aside)
        aside.rename(folder)
    return folder


def trained_runs(tmp_path_factory):
    """Return a folder with two short runs: digits, class-conditional with dropout, and moons."""

    def fill(folder):
        flags = [*TINY, "--save_every", 6, "--sample_every", 10, "--max_steps", 20]
        run("train.py", *flags, "--class_cond", "--dropout", 0.1, cwd=folder)
        flags = [*TINY, "--save_every", 6, "--sample_every", 12, "--max_steps", 12]
        run("train.py", *flags, "--dataset", "moons", cwd=folder)

    return make_once(tmp_path_factory, "trained", fill) / "checkpoints"


def color_images(tmp_path_factory):
    """Return a folder of color images of mixed sizes, in two class folders."""

    def fill(folder):
        random = np.random.RandomState(0)
        for i in range(24):
            path = folder / "all" / ("red" if i % 2 else "blue, dark") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (random.randint(20, 60), random.randint(20, 60), 3)
            Image.fromarray((random.rand(*size) * 255).astype(np.uint8)).save(path)

    return make_once(tmp_path_factory, "color_images", fill) / "all"


def edit_files(tmp_path_factory):
    """Return paths by name: `array`, three digits; `mask`, their lower half; `run`; `images`."""

    def fill(folder):
        digits = load_dataset("digits").test[:3]
        np.save(folder / "array.npy", digits[:, 0].numpy())  # (3, 8, 8)
        np.save(folder / "mask.npy", np.arange(64).reshape(8, 8) >= 32)

    folder = make_once(tmp_path_factory, "edit_files", fill)
    return {
        "array": folder / "array.npy",
        "mask": folder / "mask.npy",
        "run": trained_runs(tmp_path_factory) / "digits" / "last.pth",
        "images": color_images(tmp_path_factory),
    }
