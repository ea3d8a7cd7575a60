"""The programs that measure run, and write what they print."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = ["--width", "8", "--depth", "1", "--batch_size", "16", "--max_steps", "3"]


def python(script, *flags, cwd):
    """What a program prints that must succeed."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    python("train.py", *TINY, "--timesteps", 20, "--name", "steps", cwd=folder)
    python("train.py", *TINY, "--schedule", "learned", "--name", "learned", cwd=folder)
    return folder


def test_samplers(folder):
    flags = ["--checkpoint", "checkpoints/steps/model.pth", "--evaluations", 1, 3, "--samples", 40]
    out = python("benchmarks/samplers.py", *flags, "--seeds", 2, cwd=folder)
    rows = json.loads((folder / "samplers.json").read_text())["rows"]
    assert {row["evaluations"] for row in rows} == {1, 3}
    assert len(rows) == 2 * 10
    for row in rows:
        assert f"{row['ratio']['value']:.3f} ± {row['ratio']['error']:.3f}" in out
    assert (folder / "samplers.png").stat().st_size > 1000


def test_schedules(folder):
    flags = ["--checkpoint", "checkpoints/learned/model.pth", "--seeds", 2]
    out = python("benchmarks/schedules.py", *flags, cwd=folder)
    rows = json.loads((folder / "schedules.json").read_text())["rows"]
    assert {"the model's", "even in log-SNR", "cosine"} <= {row["schedule"] for row in rows}
    assert f"{rows[0]['variance']:.4f}" in out


def test_ablation(folder):
    flags = ["--epochs", 0.05, "--samples", 40, "--only", "default norm=none"]
    out = python("benchmarks/ablation.py", *flags, cwd=folder)
    assert "norm=none" in out
    assert len(json.loads((folder / "ablation.json").read_text())["rows"]) == 2


def test_sensitivity(folder):
    out = python("benchmarks/sensitivity.py", "--samples", 60, "--noise", 0, 50, cwd=folder)
    rows = json.loads((folder / "sensitivity.json").read_text())["rows"]
    assert [(r["space"], r["noise"]) for r in rows] == [
        *(("judge", 0), ("judge", 50), ("pixels", 0), ("pixels", 50)),
    ]
    assert rows[0]["frechet"]["samples"] == rows[0]["frechet"]["floor"]
    assert f"{rows[3]['frechet']['samples']['value']:.4g}" in out
