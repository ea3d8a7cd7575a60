"""generate.py and evaluate.py under torchrun: the same files on any number of processes."""

import json

import pytest
from helpers import DIGITS, read_arrays, run, torchrun

FEW = ["--steps", 4, "--batch_size", 6]  # steps, and items of a batch: more batches than processes

FAILS_ON_THE_SECOND_PROCESS = """
import os

import ddp.sampling

def sample(*args, step=ddp.sampling.SAMPLERS["ddim"].step, **options):
    if os.environ["RANK"] == "1":
        raise FloatingPointError("the cause of it all")
    return step(*args, **options)

ddp.sampling.SAMPLERS["fails"] = ddp.sampling.Sampler(sample)
"""


def assert_same_files(folders):
    """Check that folders hold files of the same names, with the same arrays or the same bytes."""
    first, *others = folders
    names = sorted(path.name for path in first.iterdir())
    for folder in others:
        assert sorted(path.name for path in folder.iterdir()) == names
        for name in names:
            if name.endswith(".npz"):  # whose entries have a time
                arrays = read_arrays(first / name)
                others = read_arrays(folder / name)
                assert arrays.keys() == others.keys()
                for key, array in arrays.items():
                    assert array.dtype == others[key].dtype
                    assert array.tobytes() == others[key].tobytes(), (folder, key)
            else:
                assert (first / name).read_bytes() == (folder / name).read_bytes(), (folder, name)


def test_samples_are_the_same_on_1_2_and_3_processes(tmp_path):
    flags = ["--checkpoint", DIGITS, *FEW, "--num_samples", 20, "--format", "npz,grid,gif"]
    run("generate.py", *flags, "--out", "on1", cwd=tmp_path)
    for count in (2, 3):
        result = torchrun(count, "generate.py", *flags, "--out", f"on{count}", cwd=tmp_path)
        assert result.code == 0, result.err
        assert result.out.count("20 samples") == result.out.count("wrote") == 1  # by the main one
    assert_same_files([tmp_path / f"on{count}" for count in (1, 2, 3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["on1", "on2", "on3"]


def test_processes_without_work_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("generate.world_size", lambda: 3)
    flags = ["--checkpoint", DIGITS, *FEW, "--out"]
    said = "batch_size=6 leaves some of 3 processes idle; a smaller one does not"
    assert said in run("generate.py", *flags, "few", "--num_samples", 12, cwd=tmp_path)
    assert said not in run("generate.py", *flags, "enough", "--num_samples", 13, cwd=tmp_path)


@pytest.mark.parametrize("edit", ["reconstruct", "mc_dropout"])
def test_edits_are_the_same_on_two_processes(edit, files, tmp_path):
    flags = ["--checkpoint", files["run"], "--steps", 4, "--batch_size", 2, "--format", "npz,grid"]
    flags += {
        "reconstruct": ["--reconstruct", files["array"], "--label", 3],
        "mc_dropout": ["--mc_dropout", 3, "--num_samples", 5],
    }[edit]
    alone = run("generate.py", *flags, "--out", "on1", cwd=tmp_path)
    result = torchrun(2, "generate.py", *flags, "--out", "on2", cwd=tmp_path)
    assert result.code == 0, result.err
    assert_same_files([tmp_path / "on1", tmp_path / "on2"])
    assert len(read_arrays(tmp_path / "on1" / "samples.npz")) > 2  # latents or std, and labels
    errors = [line for line in alone.splitlines() if "root mean square error" in line]
    assert len(errors) == (edit == "reconstruct")
    assert all(line in result.out for line in errors)


def evaluation(folder):
    """Return what evaluation.json says, less the seconds, the command and where it was cached."""
    found = json.loads((folder / "evaluation.json").read_text())
    assert found.pop("seconds") > 0
    assert found["recipe"].pop("command")
    return found


def test_figures_are_the_same_on_1_2_and_3_processes(tmp_path):
    flags = ["--checkpoint", DIGITS, *FEW, "--num_samples", 40, "--vlb_items", 20]
    flags += ["--nll_items", 3, "--dequant_samples", 2, "--vlb_samples", 2]
    flags += ["--metrics", "filters,pixels,memorization,value_stats,loss,vlb,ode_nll"]
    run("evaluate.py", *flags, "--out", "on1", cwd=tmp_path)
    for count in (2, 3):
        result = torchrun(count, "evaluate.py", *flags, "--out", f"on{count}", cwd=tmp_path)
        assert result.code == 0, result.err
        assert f"shared by {count} processes" in result.out
        assert evaluation(tmp_path / f"on{count}") == evaluation(tmp_path / "on1")
    names = sorted(path.name for path in (tmp_path / "on1").iterdir())
    assert sorted(path.name for path in (tmp_path / "on2").iterdir()) == names


def test_a_classifier_is_trained_once_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # empty
    flags = ["--checkpoint", DIGITS, *FEW, "--num_samples", 40, "--metrics", "classifier"]
    result = torchrun(2, "evaluate.py", *flags, "--out", "on2", cwd=tmp_path)
    assert result.code == 0, result.err
    (cached,) = (tmp_path / "cache" / "ddp").iterdir()
    written = cached.stat().st_mtime_ns
    run("evaluate.py", *flags, "--out", "on1", cwd=tmp_path)  # by what was kept
    assert evaluation(tmp_path / "on1") == evaluation(tmp_path / "on2")
    assert cached.stat().st_mtime_ns == written


def test_a_failure_of_one_process_ends_all_and_is_shown_once(tmp_path):
    plugin = tmp_path / "fails.py"
    plugin.write_text(FAILS_ON_THE_SECOND_PROCESS)
    flags = [*FEW, "--plugin", plugin, "--out", "out"]
    alone = ["--checkpoint", DIGITS, "--sampler", "fails"]
    two = ["--compare", f"good={DIGITS}", f"bad={DIGITS},sampler=fails", "--metrics", "pixels"]
    for script, more in {"generate.py": alone, "evaluate.py": [*two, "--num_samples", 24]}.items():
        assert not (tmp_path / "out").exists()
        result = torchrun(2, script, *more, *flags, cwd=tmp_path)
        assert result.code == 1
        assert result.err.count(f"{script}: error: the cause of it all") == 1
        assert "FloatingPointError" not in result.err  # no traceback but torchrun's
    found = evaluation(tmp_path / "out")  # what was finished stands
    assert "stopped before all was measured (another process failed)" in found["warnings"]
    assert ["pixels" in subject for subject in found["subjects"]] == [True, False]


def test_what_cannot_be_done_is_refused_once(tmp_path):
    (tmp_path / "out.npz").touch()
    result = torchrun(2, "generate.py", "--checkpoint", DIGITS, "--out", "out.npz", cwd=tmp_path)
    assert result.code == 1  # torchrun's
    assert result.err.count("out=out.npz exists and is not overwritten") == 1
