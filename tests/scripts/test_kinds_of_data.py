"""Data of any kind through all three scripts: what comes out is in the units that went in."""

import json

import numpy as np
import pytest
from helpers import SHORT, execute, run

KINDS = {
    "images": (40, 8, 8, 2),  # (N, H, W, C)
    "sequences": (40, 2, 16),  # (N, C, L)
    "vectors": (40, 5),  # (N, D)
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_edits_and_figures_of_any_kind(tmp_path, kind):
    data = 1000 + 5 * np.random.RandomState(0).standard_normal(KINDS[kind])
    np.savez(tmp_path / "data.npz", **{kind: data})
    run("train.py", "--dataset", "data.npz", "--name", "run", *SHORT, cwd=tmp_path)
    checkpoint = ["--checkpoint", "checkpoints/run"]
    name = "points" if kind == "vectors" else kind

    few = ["--num_samples", 6, "--steps", 2]
    run("generate.py", *checkpoint, *few, "--format", "grid,npz", "--out", "new", cwd=tmp_path)
    with np.load(tmp_path / "new" / "samples.npz") as arrays:
        assert arrays[name].shape == (6, *KINDS[kind][1:])
        assert abs(arrays[name].mean() - 1000) < 20
    assert (tmp_path / "new" / "grid.png").exists()

    edit = ["--reconstruct", "new/samples.npz", "--steps", 10, "--out", "again.npz"]
    assert "root mean square error" in run("generate.py", *checkpoint, *edit, cwd=tmp_path)
    with np.load(tmp_path / "again.npz") as arrays, np.load(tmp_path / "new/samples.npz") as given:
        assert abs(arrays[name] - given[name]).max() < 25

    flags = ["--metrics", "value_stats,memorization,loss", "--vlb_items", 2, "--steps", 2]
    flags += ["--num_samples", 4, "--out", "of-samples"]
    result = execute("evaluate.py", *checkpoint, *flags, cwd=tmp_path)
    assert result.code == 0, result.err
    evaluation = json.loads((tmp_path / "of-samples" / "evaluation.json").read_text())
    (subject,) = evaluation["subjects"]
    assert abs(subject["value_stats"]["channel 0"]["mean"]["real"]["value"] - 1000) < 5
    theirs = ["--samples", "new/samples.npz", "--dataset", "data.npz", "--metrics", "value_stats"]
    assert "in the data's units" in run("evaluate.py", *theirs, cwd=tmp_path)
