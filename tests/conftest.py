"""What all tests have in common: the repository's root on the path, one thread a process, and a
cache of its own, so that the user's is neither read nor written.

The tensors here are tiny; more threads would spend their time on waiting for each other."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
# nohup and a shell's & have signals ignored, for which a test would wait for ever
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def shared_data():
    """The folder of real datasets that tests may use; it lies next to the repository, not in it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def small_bn_batches(monkeypatch):
    """Recompute BatchNorm's statistics on little data, where they need not be good."""
    monkeypatch.setattr("ddp.validation.BN_BATCHES", 2)
    monkeypatch.setattr("ddp.validation.BN_BATCH_IMAGES", 32)
    monkeypatch.setattr("ddp.validation.BN_BATCH_POINTS", 64)


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same state of PyTorch's generator, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two short runs; for the tests of the scripts, which lie beside helpers.py."""
    from helpers import trained_runs

    return trained_runs(tmp_path_factory)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What an edit may be of, by name, for the tests of the scripts."""
    from helpers import edit_files

    return edit_files(tmp_path_factory)
