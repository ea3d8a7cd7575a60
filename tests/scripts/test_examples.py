"""The examples run, and so do the recipes of CONTRIBUTING.md, through the three scripts.

Each runs in a process of its own: what a recipe registers must not stay in this one."""

import ast
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import DIGITS, SHORT
from PIL import Image

EXAMPLES = ROOT / "examples"
RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


def execute(file, *arguments, cwd):
    """Run a Python file in a process of its own; return what it prints."""
    command = [sys.executable, str(file), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as if ddp were installed
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_from_scratch_imports_no_ddp():
    source = (EXAMPLES / "from_scratch.py").read_text()
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules == {"sys", "torch", "PIL", "sklearn"}
    assert len(source.splitlines()) <= 120


def test_from_scratch_learns_and_writes_an_image(tmp_path):
    out = execute(EXAMPLES / "from_scratch.py", 30, cwd=tmp_path)
    assert "step 0, loss" in out
    image = np.asarray(Image.open(tmp_path / "from_scratch.png"))
    assert image.shape == (600, 1000)
    assert image.std() > 20  # strokes on black


def test_swiss_roll_writes_an_image(tmp_path):
    out = execute(EXAMPLES / "swiss_roll.py", 100, cwd=tmp_path)
    assert "step 100, loss" in out
    assert Image.open(tmp_path / "swiss_roll.png").size == (800, 400)


@pytest.mark.slow
def test_new_sampler_is_nearer_than_ddim(tmp_path):
    out = execute(EXAMPLES / "new_sampler.py", 200, cwd=tmp_path)
    errors = [float(error) for error in re.findall(r"error (\d\.\d+)", out)]
    ddim_10, ddim_20, midpoint = errors
    assert midpoint < ddim_20 < ddim_10


# ---- CONTRIBUTING.md ----


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Return a file of one's own that holds every recipe."""
    path = tmp_path_factory.mktemp("recipes") / "my_file.py"
    path.write_text("\n".join(RECIPES))
    return path


@pytest.fixture(scope="module")
def bars(plugin):
    """Return a model that was trained with parts from the recipes."""
    parts = "--dataset bars --network plain --schedule straight --noise_dist noisy"
    parts += " --prediction residual --weighting sqrt_snr"
    flags = [*SHORT, *parts.split(), "--plugin", plugin]
    execute(ROOT / "train.py", *flags, cwd=plugin.parent)
    return plugin.parent / "checkpoints" / "bars" / "model.pth"


def test_every_recipe_runs_alone(tmp_path):
    for i, recipe in enumerate(RECIPES):
        (tmp_path / f"recipe_{i}.py").write_text(recipe)
    names = [f"recipe_{i}.py" for i in range(len(RECIPES))]
    program = f"import runpy\nfor name in {names}:\n    runpy.run_path(name)\n"
    (tmp_path / "all.py").write_text(program)
    execute("all.py", cwd=tmp_path)


def test_recipes_of_training(bars):
    assert bars.is_file()


def test_recipe_of_a_preset(plugin):
    flags = [*SHORT[4:], "--dataset", "bars", "--name", "preset", "--plugin", plugin]
    out = execute(ROOT / "train.py", *flags, "--dry_run", cwd=plugin.parent)
    parameters = int(re.search(r"network: ([\d,]+) parameters", out)[1].replace(",", ""))
    assert parameters < 50_000  # 8 channels and a block a level; digits' own has 290,785


def test_recipes_of_sampling(bars, plugin):
    flags = ["--checkpoint", bars, "--plugin", plugin, "--num_samples", 4]
    out = execute(ROOT / "generate.py", *flags, "--sampler", "half_noisy", cwd=plugin.parent)
    assert "by half_noisy in 50 steps" in out


def test_recipe_of_an_edit(plugin):
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    np.savez(plugin.parent / "images.npz", images=images)
    flags = ["--checkpoint", DIGITS, "--plugin", plugin, "--touch_up", "images.npz"]
    out = execute(ROOT / "generate.py", *flags, "--out", "edited.npz", cwd=plugin.parent)
    assert "3 samples" in out
    with np.load(plugin.parent / "edited.npz") as edited:
        assert edited["images"].mean() < 64  # dark, as it was


def test_recipes_of_evaluation(bars, plugin):
    flags = ["--checkpoint", bars, "--plugin", plugin, "--num_samples", 40]
    flags += ["--metrics", "row_means,brightness", "--steps", 5, "--out", "evaluation"]
    execute(ROOT / "evaluate.py", *flags, cwd=plugin.parent)
    written = (plugin.parent / "evaluation" / "evaluation.json").read_text()
    (subject,) = json.loads(written)["subjects"]
    assert subject["row_means"]["mean_distance"]["samples"]["error"] > 0
    assert 0 <= subject["brightness"]["mean"]["samples"]["value"] <= 255


def test_readmes_python_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 12
    assert "max_steps=1000" in code
    file = tmp_path / "readme.py"
    file.write_text(code.replace("max_steps=1000", "max_steps=5") + "\nprint(x0_hat.shape)")
    assert "[1000, 2]" in execute(file, cwd=tmp_path)
