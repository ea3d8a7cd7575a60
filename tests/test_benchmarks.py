"""The programs that measure run, and write what they print."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from ddp import data, editing

sys.path.insert(0, str(ROOT / "benchmarks"))
import peer_recipes
import peers
import time_to_quality

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


def test_ceilings(folder):
    sizes = ["--sizes", 16, "--channels", 8, "--resolutions", 4, "--batch", 2, "--megabytes", 1]
    flags = [*sizes, "--seconds", 0.001, "--repetitions", 1]
    out = python("benchmarks/ceilings.py", *flags, cwd=folder)
    rows = json.loads((folder / "ceilings.json").read_text())["rows"]
    assert [r["what"] for r in rows] == ["matrix product", "convolution", *["in-place add"] * 2]
    assert f"{rows[1]['bf16 fwd+bwd']:.1f}" in out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_speed(folder, precision):
    flags = [*TINY, "--grad_accumulation", 2, "--precision", precision, "--quick"]
    out = python("benchmarks/train_speed.py", *flags, cwd=folder)
    found = json.loads((folder / "train_speed.json").read_text())
    step, rows = found["step"], found["rows"]
    # two counts of the same FLOPs: by layer, and by operation
    assert sum(r["calls"] * r["flops"] for r in step["layers"]) == step["flops_of_convolutions"]
    assert {r["what"] for r in rows} == {"batch_size", "width", "resolution"}
    assert f"{rows[-1]['pictures_a_second']:,.0f}" in out
    assert (folder / "train_speed.png").stat().st_size > 1000


def test_sample_speed(folder):
    flags = ["--checkpoint", "checkpoints/steps/model.pth", "--batches", 1, 2, "--repetitions", 1]
    out = python("benchmarks/sample_speed.py", *flags, cwd=folder)
    found = json.loads((folder / "sample_speed.json").read_text())
    assert len(found["rows"]) == 2 * 4
    assert f"{found['rows'][0]['samples_a_second']:.1f}" in out
    worst = {row["form"]: max(row["difference"]) for row in found["differences"]}
    assert worst["as trained"] == 0
    assert worst["folded"] < 1e-4
    assert worst["folded, bf16"] < 0.1
    assert len(found["waits"]) == 3
    assert (folder / "sample_speed.png").stat().st_size > 1000


class MadeUp(peer_recipes.Diffusers):
    """A peer whose step is a real one of nothing, and whose pictures are noise."""

    package, batch = "torch", 4

    def __init__(self, feed):
        self.network, self.batches = torch.nn.Linear(1, 1), iter(feed)

    def step(self):
        assert next(self.batches).shape[1:] == (1, 28, 28)

    def draw(self, count, sampler, steps):
        return 2 * torch.rand(count, 1, 28, 28)


def test_the_recipe_of_a_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peer_recipes.PEERS["mnist"], "diffusers", MadeUp)
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    np.save(tmp_path / "train.npy", np.zeros((10, 1, 28, 28), np.uint8))
    flags = ["--pictures", tmp_path / "train.npy", "--out", tmp_path, "--samples", 3]
    peer_recipes.main(["diffusers", *map(str, flags), "--at", "0.001", "0.002"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert 0.06 <= first["seconds"] < 0.12 <= second["seconds"]
    assert first["pictures"] / first["steps"] == pytest.approx(10 / 3, abs=0.1)
    items, _ = editing.load_samples(second["file"], (1, 28, 28))
    assert items.shape == (3, 1, 28, 28)
    assert items.max() == 255


class Learner(MadeUp):
    """A peer whose weight is 0 in its first step and 1 after it, and which draws its weight."""

    def __init__(self, feed):
        super().__init__(feed)
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)

    def step(self):
        self.network(torch.ones(1, 1)).sum().backward()
        torch.nn.init.ones_(self.network.weight)

    def draw(self, count, sampler, steps):
        return self.network(torch.ones(count * 784, 1)).reshape(count, 1, 28, 28)


def test_a_peer_in_bf16_draws_by_what_it_has_learned(tmp_path, monkeypatch):
    monkeypatch.setitem(peer_recipes.PEERS["mnist"], "diffusers", Learner)
    np.save(tmp_path / "train.npy", np.zeros((10, 1, 28, 28), np.uint8))
    flags = ["--pictures", tmp_path / "train.npy", "--out", tmp_path, "--samples", 2]
    peer_recipes.main(["diffusers", *map(str, flags), "--at", "0.0001", "--bf16"])
    items, _ = editing.load_samples(tmp_path / "0.0001.npz", (1, 28, 28))
    assert (items == 255).all()


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs benchmarks/peers.py on made-up pictures -> its exit code."""
    pictures = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(data, "load", lambda *_: data.Dataset("mnist", pictures, pictures))
    folders = ["--out", tmp_path / "out", "--environments", tmp_path]
    return lambda *flags: peers.command([str(flag) for flag in (*folders, *flags)])


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for a python")
def test_peers_that_fail_leave_the_others(compare, tmp_path, capsys):
    row = {"peer": "diffusers", "minutes": 1, "steps": 5, "pictures": 640, "parameters": 7}
    row |= {"pictures_per_second": 10.7, "sampler": {"name": "DDPM", "steps": 9}}
    row |= {"seconds_per_sample": 0.5, "default_seconds_per_sample": 2.5}
    for peer, does in {
        "lucidrains": "echo Traceback >&2; echo no memory >&2; exit 1",
        "diffusers": f"echo '{json.dumps(row)}'",
    }.items():
        script = tmp_path / peer / "bin" / "python"
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)
        (tmp_path / peer / "installed.txt").touch()
    assert compare("--only", "lucidrains", "diffusers") == 1
    out, error = capsys.readouterr()
    log = Path("out", "lucidrains", "log.txt")
    assert error == f"peers.py: error: lucidrains: no memory ({tmp_path / log})\n"
    assert "DDPM, 9 steps" in out
    assert json.loads((tmp_path / "out" / "peers.json").read_text())["rows"] == [row]


def test_a_peer_that_cannot_be_installed(compare, monkeypatch, capsys):
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert compare("--only", "diffusers") == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[1].startswith("peers.py: error: diffusers: ERROR: No matching distribution")


def test_a_peer_that_nobody_knows(compare, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare("--only", "ours")
    assert "--only ours: for mnist there are diffusers, lucidrains" in capsys.readouterr().err


def test_rows_of_peers_are_taken_as_they_lie(tmp_path, capsys, monkeypatch):
    flags = ["--ours", "--reuse", "--only", "lucidrains", "--out", str(tmp_path)]
    monkeypatch.setattr(
        data, "load", lambda *_: argparse.Namespace(is_image=True, classes=["0", "1"])
    )
    assert time_to_quality.command(flags) == 2
    assert "peers has nothing of lucidrains" in capsys.readouterr().err
    keys = ("minutes", "file", "pictures_per_second", "seconds_per_sample", "sampler", "recipe")
    np.savez(tmp_path / "drawn.npz", np.zeros((40, 28, 28), np.uint8))
    row = dict.fromkeys(keys, 1) | {"file": str(tmp_path / "drawn.npz")}
    rows = [{"peer": peer} | row for peer in ("diffusers", "lucidrains")]
    table = tmp_path / "peers" / "peers.json"
    table.parent.mkdir()
    table.write_text(json.dumps({"rows": rows}))
    args = argparse.Namespace(out=tmp_path, only=["lucidrains"], reuse=True)
    assert list(time_to_quality.theirs(args)) == [{"who": "lucidrains"} | row]
    assert time_to_quality.command([*flags, "--samples", "50"]) == 2
    assert "drawn.npz has 40 samples, not 50" in capsys.readouterr().err


def test_what_peers_refuse_is_refused_before_ours_train(tmp_path, capsys):
    for flags in (["--minutes", "-1"], ["--only", "ours"], ["--at", "0"]):
        with pytest.raises(SystemExit, match="2"):
            time_to_quality.main([*flags, "--out", str(tmp_path / "out")])
        assert flags[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_time_to_quality_of_ours(folder, monkeypatch, capsys):
    flags = ["--dataset", "digits", "--only", "--ours", 0.01, "--samples", 60, "--out", "time"]
    out = python("benchmarks/time_to_quality.py", *flags, cwd=folder)
    rows = json.loads((folder / "time" / "time_to_quality.json").read_text())["rows"]
    row, fewer = rows
    assert (row["who"], fewer["who"]) == ("ours, 20 steps", "ours, 10 steps")
    assert row["pictures_per_second"] > 0
    assert f"{row['frechet']['samples']['value']:.3f} ±" in out
    names = {"samples.png", "time_to_quality.png", "time_to_quality.json"}
    assert names <= {path.name for path in (folder / "time").iterdir()}
    monkeypatch.chdir(folder)
    assert time_to_quality.command(list(map(str, flags))) == 2
    assert "ours-0.01 is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--samples 10", "--samples 10: expected at least 20"),
        ("--ours 0.01 -1", "--ours: expected numbers above 0"),
        ("--ours 1 1", "--ours: expected different minutes"),
        ("--ours", "leave nothing to measure"),
        ("--dataset moons", "--dataset moons: expected pictures of several classes"),
    ],
)
def test_what_time_to_quality_refuses(flags, said, tmp_path, capsys):
    flags = ["--only", "--out", str(tmp_path / "out"), "--dataset", "digits", *flags.split()]
    assert time_to_quality.command(flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_of_a_machine(folder):
    flags = ["--dataset", "digits", "--minutes", 0.01, "--only", "--quick", "--out", "all"]
    out = python("benchmarks/machine.py", *flags, cwd=folder)
    found = json.loads((folder / "all" / "summary.json").read_text())
    share = found["rate of a training step, GFLOP/s"] / found["highest rate in bf16, GFLOP/s"]
    assert found["its share of the highest"] == pytest.approx(share)
    assert all(f"{n:,.2f}  {name}" in out for name, n in found.items())
    written = {path.name for path in (folder / "all").iterdir()}
    assert {"ceilings.json", "train_speed.png", "sample_speed.png", "time_to_quality"} <= written


def test_what_a_machine_refuses_leaves_nothing(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "machine.py", "--minutes", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--minutes -1: expected more than 0" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
