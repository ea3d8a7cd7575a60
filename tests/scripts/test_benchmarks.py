"""The programs that measure run, and write what they print."""

import argparse
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import TINY, execute, refused, run

from ddp.data import Dataset, load_dataset, permutation
from ddp.data.arrays import load_samples

sys.path.insert(0, str(ROOT / "benchmarks"))
import baseline_recipes
import baselines
import quality_vs_time
import samplers
import schedules

BENCHMARKS = ROOT / "benchmarks"
NAMES = [path.stem for path in sorted(BENCHMARKS.glob("[a-z]*.py"))]


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    short = [*TINY, "--max_steps", 3]
    run("train.py", *short, "--timesteps", 20, "--name", "steps", cwd=folder)
    run("train.py", *short, "--schedule", "learned", "--name", "learned", cwd=folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    module = import_module(name)
    with pytest.raises(SystemExit, match="0"):
        module.parse(["--help"])
    printed = capsys.readouterr().out
    first_line = module.__doc__.splitlines()[0]
    assert " ".join(first_line.split()) in " ".join(printed.split())
    assert "picture" not in printed


def test_samplers(folder):
    flags = ["--checkpoint", *["checkpoints/steps/model.pth"] * 2, "--samples", 40]
    names = ["ddim", "heun", "ddpm"]
    out = run("samplers.py", *flags, "--nfe", 1, 3, "--samplers", *names, cwd=folder)
    rows = read_json(folder / "samplers.json")["rows"]
    assert {row["nfe"] for row in rows} == {1, 3}
    assert len(rows) == 2 * 4  # ddim at two values of eta
    for row in rows:
        value, error = row["score"]
        assert f"{value:.3f} ± {error:.3f}" in out
    best = max((row for row in rows if row["nfe"] == 3), key=lambda row: row["score"][0])
    assert f"NFE 3: {best['sampler']}, score {best['score'][0]:.3f}" in out
    assert (folder / "samplers.png").stat().st_size > 1000


def test_the_judge_of_samplers_gives_real_items_a_score_of_1():
    dataset = load_dataset("digits")
    judge = samplers.Judge(dataset, "test", 200)
    held_out = dataset.train[permutation(0, 0, len(dataset.train))[200:400]]
    ratios = judge.relative(held_out)
    assert ratios["score"] == pytest.approx(1, abs=0.35)
    noise = torch.randint(0, 256, held_out.shape, dtype=torch.uint8)
    assert judge.relative(noise)["score"] < 0.2


def test_schedules(folder):
    flags = ["--checkpoint", "checkpoints/learned/model.pth", "--seeds", 4]
    out = run("schedules.py", *flags, cwd=folder)
    rows = {row["schedule"]: row for row in read_json(folder / "schedules.json")["rows"]}
    assert {"the model's", "even in log-SNR", "cosine"} <= set(rows)
    assert f"{rows['cosine']['variance']:.4f}" in out
    # two schedules estimate one number
    even = rows["even in log-SNR"]
    assert even["mean"] == pytest.approx(rows["the model's"]["mean"], abs=4 * even["se"])


def test_a_fixed_schedule_reaches_far_beyond_a_models_ends():
    wide = schedules.WideSchedule("cosine")
    assert wide.log_snr(0.0) > 20
    assert wide.log_snr(1.0) < -20
    time = schedules.time_of(wide, 3.0)
    assert wide.log_snr(time).item() == pytest.approx(3.0)


def test_schedules_need_continuous_time(folder):
    error = refused("schedules.py", "--checkpoint", "checkpoints/steps/model.pth", cwd=folder)
    assert "timesteps" in error


def test_ablation(folder, monkeypatch):
    import ablation

    monkeypatch.setitem(ablation.NORMS, "batch_no_mean", ablation.batch_no_mean)  # taken out again
    monkeypatch.setitem(ablation.DATASETS, "digits", {"max_steps": 4, "channels_base": 8})
    monkeypatch.setattr(ablation, "NFE", (2,))
    monkeypatch.chdir(folder)
    flags = ["--samples", "40", "--only", "default;norm=none", "--seeds", "2"]
    args = ablation.parse([*flags, "--out", "results"])
    assert ablation.main(args) == 0
    report = read_json(folder / "results" / "report.json")["digits"]
    none = report["norm=none"]
    assert none["seeds"] == [0, 1]
    low, high = none["v_loss"]["less_default"]["interval"]
    assert low < none["v_loss"]["mean"] - report["default"]["v_loss"]["mean"] < high
    assert {"default, nfe=2", "default, raw weights", "default, statistics averaged"} <= {*report}
    one = folder / "results" / "digits" / "norm=none-1.json"
    before = one.stat().st_mtime_ns
    (folder / "results" / "digits" / "norm=none-0.json").unlink()
    assert ablation.main(args) == 0  # goes on: only what is missing
    assert one.stat().st_mtime_ns == before
    assert (folder / "results" / "digits" / "norm=none-0.json").exists()


def test_ablation_refuses_what_it_does_not_know(folder):
    assert "studies=part" in refused("ablation.py", "--studies", "part", cwd=folder)
    assert "datasets=digit" in refused("ablation.py", "--datasets", "digit", cwd=folder)
    assert "norm=nothing" in refused("ablation.py", "--only", "norm=nothing", cwd=folder)


def test_metric_sensitivity(folder):
    out = run("metric_sensitivity.py", "--samples", 60, "--noise", 0, 50, cwd=folder)
    rows = read_json(folder / "metric_sensitivity.json")["rows"]
    assert [(row["space"], row["noise"]) for row in rows] == [
        *(("classifier", 0), ("classifier", 50), ("pixels", 0), ("pixels", 50)),
    ]
    assert rows[0]["fd"]["samples"] == rows[0]["fd"]["real_vs_real"]
    assert rows[3]["fd"]["samples"]["value"] > rows[2]["fd"]["samples"]["value"]
    assert f"{rows[3]['fd']['samples']['value']:.4g}" in out
    assert "dataset" in refused("metric_sensitivity.py", "--dataset", "moons", cwd=folder)


def test_roofline(folder):
    sizes = ["--sizes", 16, "--channels", 8, "--resolutions", 4, "--batch", 2, "--megabytes", 1]
    flags = [*sizes, "--seconds", 0.001, "--repetitions", 1]
    out = run("roofline.py", *flags, cwd=folder)
    rows = read_json(folder / "roofline.json")["rows"]
    assert [r["what"] for r in rows] == ["matrix product", "convolution", *["in-place add"] * 2]
    assert f"{rows[1]['bf16 fwd+bwd']:.1f}" in out
    assert "sizes" in refused("roofline.py", "--sizes", 0, cwd=folder)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_train_speed(folder, precision):
    flags = [*TINY, "--grad_accumulation", 2, "--precision", precision, "--quick"]
    out = run("train_speed.py", *flags, cwd=folder)
    results = read_json(folder / "train_speed.json")
    step = results["step"]
    rows = results["rows"]
    # two counts of the same FLOPs: by layer, and by operation
    assert sum(r["calls"] * r["flops"] for r in step["layers"]) == step["conv_flops"]
    assert sum(row["fraction"] for row in step["fractions"]) == pytest.approx(1)
    assert {r["what"] for r in rows} == {"batch_size", "channels_base", "resolution"}
    assert f"{rows[-1]['images_per_second']:,.0f}" in out
    assert (folder / "train_speed.png").stat().st_size > 1000


def test_train_speed_is_of_images_layer_by_layer(tmp_path):
    assert "dataset" in refused("train_speed.py", "--dataset", "moons", cwd=tmp_path)
    assert "compile" in refused("train_speed.py", "--compile", cwd=tmp_path)


@pytest.mark.slow
def test_threads(tmp_path):
    """Every setting works when its turn comes, several processes under torchrun, too."""
    flags = [*TINY, "--rounds", 1, "--seconds", 0.01, "--env", "OMP_WAIT_POLICY=passive"]
    out = run("threads.py", *flags, cwd=tmp_path)
    rows = read_json(tmp_path / "threads.json")["rows"]
    names = {row["setting"] for row in rows}
    cores = os.cpu_count()
    assert {"1 thread", f"{cores} threads, OMP_WAIT_POLICY=passive"} < names
    assert len(rows) == 2 * 2 * len(names)  # works, alone and not
    assert all(row["items_per_second"] > 0 for row in rows)
    table = out[out.index("| items a second |") :]
    assert all(f"| {name} |" in table for name in names)
    assert "(1.00)" in table  # the first setting, of itself


def test_threads_tells_what_ails_a_worker(tmp_path):
    flags = [*TINY, "--rounds", 1, "--env", "--dataset", tmp_path / "nothing"]
    assert "has ended" in refused("threads.py", *flags, cwd=tmp_path, code=1)


# ---- baselines ----


def test_recipes_import_nothing_of_ddp():
    source = (BENCHMARKS / "baseline_recipes.py").read_text()
    assert not re.search(r"^\s*(from|import) (ddp|_common)", source, re.MULTILINE)


class MadeUp(baseline_recipes.Diffusers):
    """A baseline whose step is a real one of nothing, and whose images are noise."""

    package = "torch"
    batch = 4
    samplers = (("slow", 9), ("fast", 3))
    anneals = False

    def __init__(self, feed):
        self.network = torch.nn.Linear(1, 1)
        self.batches = iter(feed)

    def step(self, progress):
        assert 0 <= progress < 1
        assert next(self.batches).shape[1:] == (1, 28, 28)

    def sample(self, count, sampler, steps):
        return 2 * torch.rand(count, 1, 28, 28)


class Learner(MadeUp):
    """A baseline whose weight is 0 in its first step and 1 after it, and which samples that."""

    def __init__(self, feed):
        super().__init__(feed)
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)

    def step(self, progress):
        self.network(torch.ones(1, 1)).sum().backward()
        torch.nn.init.ones_(self.network.weight)

    def sample(self, count, sampler, steps):
        return self.network(torch.ones(count * 784, 1)).reshape(count, 1, 28, 28)


@pytest.fixture
def run_recipe(tmp_path, monkeypatch, capsys):
    """Runs benchmarks/baseline_recipes.py with a recipe on black images -> its rows."""

    def run_recipe(recipe, *flags):
        monkeypatch.setitem(baseline_recipes.BASELINES["mnist"], "diffusers", recipe)
        monkeypatch.setattr(sys, "__stdout__", sys.stdout)
        np.save(tmp_path / "train.npy", np.zeros((10, 1, 28, 28), np.uint8))
        paths = ["--images", str(tmp_path / "train.npy"), "--out", str(tmp_path)]
        baseline_recipes.main(baseline_recipes.parse(["diffusers", *paths, *flags]))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run_recipe


def test_the_recipe_of_a_baseline(run_recipe):
    rows = run_recipe(MadeUp, "--samples", "3", "--at", "0.001", "0.002")
    assert [row["sampler"]["name"] for row in rows] == ["slow", "fast"] * 2
    first, second = rows[0], rows[2]
    assert 0.06 <= first["seconds"] < second["seconds"]
    assert second["seconds"] >= 0.12
    assert first["images"] / first["steps"] == pytest.approx(10 / 3, abs=0.1)
    items, _ = load_samples(second["file"], (1, 28, 28))
    assert items.shape == (3, 1, 28, 28)
    assert items.max() == 255


def test_a_baseline_in_bf16_samples_by_what_it_has_learned(run_recipe):
    row, _ = run_recipe(Learner, "--samples", "2", "--at", "0.0001", "--precision", "bf16")
    assert row["precision"] == "bf16"
    items, _ = load_samples(row["file"], (1, 28, 28))
    assert (items == 255).all()


ANNEALED = []  # runs of Annealer, each a list of how far its steps were


class Annealer(MadeUp):
    """A baseline whose learning rate falls to the end."""

    anneals = True

    def __init__(self, feed):
        super().__init__(feed)
        ANNEALED.append([])

    def step(self, progress):
        ANNEALED[-1].append(progress)


def test_a_baseline_that_anneals_has_a_run_of_its_own_for_each_budget(run_recipe):
    ANNEALED.clear()
    flags = ["--at", "0.1", "0.2", "--precision", "fp32", "--seconds_per_step", "1.5"]
    rows = run_recipe(Annealer, "--samples", "1", *flags)
    assert [row["steps"] for row in rows] == [4, 4, 8, 8]  # whatever else the machine does
    assert [[0, 0.25, 0.5, 0.75], [i / 8 for i in range(8)]] == ANNEALED


def test_the_faster_precision_of_a_baseline_is_one_of_two(run_recipe):
    row, _ = run_recipe(MadeUp, "--samples", "1", "--at", "0.0001")
    assert row["precision"] in ("fp32", "bf16")


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs benchmarks/baselines.py on black images -> its Result."""
    images = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(baselines, "load_dataset", lambda *_: Dataset("mnist", images, images))
    folders = ["--out", tmp_path / "out", "--environments", tmp_path]

    def compare(*flags):
        return execute("baselines.py", *folders, *flags, cwd=tmp_path)

    return compare


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for a python")
def test_baselines_that_fail_leave_the_others(compare, tmp_path):
    row = {
        "baseline": "diffusers",
        "minutes": 1,
        "steps": 5,
        "images": 640,
        "parameters": 7,
        "images_per_second": 10.7,
        "sampler": {"name": "DDPM", "steps": 9},
        "precision": "fp32",
        "seconds_per_sample": 0.5,
    }
    for baseline, words in {
        "lucidrains": "echo Traceback >&2; echo no memory >&2; exit 1",
        "diffusers": f"echo '{json.dumps(row)}'",
    }.items():
        script = tmp_path / baseline / "bin" / "python"
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\n{words}\n")
        script.chmod(0o755)
        (tmp_path / baseline / "installed.txt").touch()
    result = compare("--only", "lucidrains", "diffusers")
    assert result.code == 1
    log = Path("out", "lucidrains", "log.txt")
    assert result.err == f"baselines.py: error: lucidrains: no memory ({tmp_path / log})\n"
    assert "DDPM, 9 steps" in result.out
    assert read_json(tmp_path / "out" / "baselines.json")["rows"] == [row]


@pytest.mark.slow
def test_a_baseline_that_cannot_be_installed(compare, monkeypatch):
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    result = compare("--only", "diffusers")
    assert result.code == 1
    lines = result.err.splitlines()
    assert len(lines) == 2
    assert "diffusers: ERROR: No matching distribution" in lines[1]


@pytest.mark.parametrize(
    ("flags", "name"),
    [("--only ours", "only=ours"), ("--minutes -1", "minutes"), ("--at 1 0", "at=0")],
)
def test_what_baselines_refuse(compare, flags, name):
    result = compare(*flags.split())
    assert result.code == 2
    assert name in result.error_line


# ---- quality_vs_time, which calls them ----


@pytest.fixture
def labeled_images(monkeypatch):
    """In the place of a dataset: whatever it is called, it has images of two classes."""
    stand_in = argparse.Namespace(is_image=True, classes=["0", "1"])
    monkeypatch.setattr(quality_vs_time, "load_dataset", lambda *_: stand_in)


def test_rows_of_baselines_are_reused_as_they_are(tmp_path, labeled_images):
    flags = ["--ours", "--reuse", "--only", "lucidrains", "--out", tmp_path]
    error = refused("quality_vs_time.py", *flags, cwd=tmp_path)
    assert "reuse" in error
    assert "lucidrains" in error
    np.savez(tmp_path / "samples.npz", np.zeros((40, 28, 28), np.uint8))
    row = {
        "minutes": 1,
        "steps": 1,
        "parameters": 1,
        "precision": "fp32",
        "file": str(tmp_path / "samples.npz"),
        "images_per_second": 1,
        "seconds_per_sample": 1,
        "sampler": 1,
        "recipe": 1,
    }
    rows = [{"baseline": name, **row} for name in ("diffusers", "lucidrains")]
    table = tmp_path / "baselines" / "baselines.json"
    table.parent.mkdir()
    table.write_text(json.dumps({"rows": rows}))
    args = argparse.Namespace(out=tmp_path, only=["lucidrains"], reuse=True)
    assert quality_vs_time.baseline_rows(args) == [{"who": "lucidrains", **row}]
    error = refused("quality_vs_time.py", *flags, "--samples", 50, cwd=tmp_path)
    assert "samples.npz has 40 samples, not 50" in error


@pytest.mark.parametrize("flags", ["--minutes -1", "--only ours", "--at 0"])
def test_what_baselines_refuse_is_refused_before_ours_train(flags, tmp_path):
    name = flags.split()[0].removeprefix("--")
    assert name in refused("quality_vs_time.py", *flags.split(), "--out", "out", cwd=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--samples 10", "samples=10"),
        ("--ours 0.01 -1", "ours=-1"),
        ("--ours 1 1", "ours"),
        ("--ours", "ours and only"),
        ("--steps 0", "steps=0"),
        ("--dataset moons", "dataset=moons"),
    ],
)
def test_what_quality_vs_time_refuses(flags, name, tmp_path):
    flags = ["--only", "--out", "out", "--dataset", "digits", *flags.split()]
    assert name in refused("quality_vs_time.py", *flags, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gray", [0, 64, 200])
def test_what_is_left_of_digits_on_gray_paper_without_the_background(gray):
    digits = load_dataset("digits").test[:50].float()
    digits[..., 0] = digits[..., -1] = 0
    digits[..., 0, :] = digits[..., -1, :] = 0
    on_paper = (gray + digits * (255 - gray) / 255).round().byte()
    restored = quality_vs_time.without_background(on_paper)
    assert (restored - digits).abs().max() <= 255 / (255 - gray)


# ---- all of them, in one run ----


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Runs benchmarks/all.py -> the folder of its results, what it printed."""
    cwd = tmp_path_factory.mktemp("everything")
    flags = ["--dataset", "digits", "--minutes", "0.01", "--only", "--quick", "--out", "all"]
    words = [sys.executable, BENCHMARKS / "all.py", *flags]
    result = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return cwd / "all", result.stdout


@pytest.mark.slow
def test_all_benchmarks_of_a_machine(everything):
    folder, out = everything
    numbers = read_json(folder / "summary.json")
    fraction = numbers["rate of a training step, GFLOP/s"]
    fraction /= numbers["highest rate in bf16, GFLOP/s"]
    assert numbers["its fraction of the highest"] == pytest.approx(fraction)
    for name, number in numbers.items():
        assert f"{number:,.2f}  {name}" in out
    written = {path.name for path in folder.iterdir()}
    assert {"roofline.json", "train_speed.png", "sample_speed.png", "quality_vs_time"} <= written


@pytest.mark.slow
def test_quality_vs_time_of_ours(everything, tmp_path):
    folder, out = everything
    folder = folder / "quality_vs_time"
    rows = read_json(folder / "quality_vs_time.json")["rows"]
    assert [(row["who"], row["sampler"]["steps"]) for row in rows] == [("ours", 20), ("ours", 10)]
    assert rows[0]["images_per_second"] > 0
    assert rows[0]["parameters"] > 10_000
    assert f"{rows[0]['plain']['fd']:9.3f}" in out
    names = {"samples.png", "quality_vs_time.png", "quality_vs_time.json"}
    assert names <= {path.name for path in folder.iterdir()}
    flags = ["--dataset", "digits", "--only", "--ours", 0.01, "--out", folder]
    assert "ours-0.01-auto exists" in refused("quality_vs_time.py", *flags, cwd=tmp_path)


@pytest.mark.slow
def test_sample_speed(everything):
    folder, out = everything
    results = read_json(folder / "sample_speed.json")
    assert len(results["rows"]) == 4
    assert f"{results['rows'][0]['samples_per_second']:.1f}" in out
    worst = {row["form"]: max(row["difference"]) for row in results["differences"]}
    assert worst["as trained"] == 0
    assert worst["folded"] < 1e-4
    assert worst["folded, bf16"] < 0.1
    assert len(results["waits"]) == 3
    assert (folder / "sample_speed.png").stat().st_size > 1000


def test_what_all_refuse_leaves_nothing(tmp_path):
    words = [sys.executable, BENCHMARKS / "all.py", "--minutes", "-1"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "minutes" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# ---- the metrics of the code ----

SOURCE = '''"""A docstring
of two lines."""

A = 1  # at the end of a line
# alone
a, b = A, 2
c, d = divmod(A, 2)


def long(x):
    """Do something."""
    pairs = [(i, j) for i in range(x) for j in range(x)]
    return {k: [v for v in pairs] for k in pairs}


def short(x): return sum(y for y in x)
'''


def test_code_metrics(tmp_path):
    for name, text in {"core.py": SOURCE, "io/files.py": "x = 1\n", "io/other.py": ""}.items():
        path = tmp_path / "repo" / "ddp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out = run("code_metrics.py", tmp_path / "repo", "--json", "table.json", cwd=tmp_path)
    root, io, total = read_json(tmp_path / "table.json")
    assert [row["name"] for row in (root, io, total)] == ["ddp", "ddp/io", "total"]
    assert (root["lines"], io["lines"], total["lines"]) == (16, 1, 17)
    assert (root["code"], io["code"], io["tokens"]) == (7, 1, 3)
    assert root["estimated_tokens"] == round(len(SOURCE) / 4)
    assert (root["comprehensions"], root["nested"]) == (4, 2)
    assert (root["assignments"], root["unpacked"], root["packed"]) == (4, 2, 1)
    assert (root["commented"], root["code_or_comment"]) == (2, 8)
    assert total["comments_percent"] == pytest.approx(100 * 2 / 17)
    assert root["longest_function"] == [4, "core.py:long"]
    assert total["longest_file"] == [16, "core.py"]
    assert "core.py:long" in out
    assert "path" in refused("code_metrics.py", tmp_path, cwd=tmp_path)
