"""evaluate.py from end to end: what it measures, writes, prints and refuses."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DIGITS, SHORT, execute, refused, run, torchrun
from PIL import Image

import evaluate as script
from ddp.data import load_dataset
from ddp.io.checkpoint import load_model, read_checkpoint
from ddp.metrics.evaluate import METRICS, OLD_METRICS, Metric

FEW = ["--vlb_items", 30, "--num_samples", 30, "--nll_items", 4, "--vlb_samples", 2]
FEW += ["--dequant_samples", 1, "--steps", 3]


def evaluated(*flags, cwd, out="e"):
    """evaluation.json of a run that must succeed, and what it printed."""
    text = run("evaluate.py", *flags, "--out", out, cwd=cwd)
    return json.loads((cwd / out / "evaluation.json").read_text()), text


def save_digits(path, count=30):
    np.save(path, load_dataset("digits").train[:count, 0].numpy())


# ---- what is measured ----


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_evaluate_measures_a_checkpoint(trained, tmp_path, name):
    flags = ["--checkpoint", trained / name / "last.pth", *FEW, "--dequant_samples", 4]
    evaluation, text = evaluated(*flags, cwd=tmp_path)
    recipe = evaluation["recipe"]
    (subject,) = evaluation["subjects"]
    assert evaluation["schema"] == 6
    assert evaluation["dataset"]["best_chosen_on"] == ("test" if name == "digits" else "val")
    assert recipe["unit"] == ("bits/dim" if name == "digits" else "nats")
    assert (recipe["num_samples"], recipe["vlb_items"], recipe["nll_items"]) == (30, 30, 4)
    assert subject["about"]["steps"] == 3
    assert subject["about"]["sampler"] == "dpmpp_2m_sde"
    for time in ("discrete", "continuous"):
        terms = subject["vlb"][time]
        total = sum(terms[term]["value"] for term in ("prior", "diffusion", "reconstruction"))
        assert terms["total"]["value"] == pytest.approx(total)
        assert f"{terms['total']['value']:.4f} ± {terms['total']['error']:.4f}" in text
    assert set(subject["ode_nll"]) == ({"uniform", "noise"} if name == "digits" else {"density"})
    for terms in subject["ode_nll"].values():
        assert f"{terms['total']['value']:.4f}" in text
    assert len(subject["loss"]) == 10
    assert len(subject["memorization"]["closest"]) == 16
    assert "too few" in " ".join(evaluation["warnings"])
    assert "warning: " in text
    assert "the network takes about" in text
    spaces = ["classifier", "filters", "pixels"] if name == "digits" else ["points"]
    for space in spaces:
        for row in subject[space].values():
            if "real_vs_real" in row:
                assert row["samples"]["interval"][0] <= row["samples"]["value"]
                assert row["real_vs_real"]["value"] is not None
        if name == "digits":  # a model that has learned next to nothing
            row = subject[space]["fd"]
            assert row["samples"]["value"] > row["real_vs_real"]["value"]
    assert "real vs real" in text


def test_evaluate_writes_json_page_and_figures(trained, tmp_path):
    flags = ["--checkpoint", trained / "moons" / "last.pth", *FEW]
    evaluated(*flags, cwd=tmp_path)
    figures = list((tmp_path / "e").glob("*.png"))
    page = (tmp_path / "e" / "evaluation.html").read_text()
    assert page.count("data:image/png") == len(figures) == 5
    assert "http" not in page
    for figure in figures:
        assert Image.open(figure).width > 100
    assert not list(tmp_path.glob(".*"))


def test_evaluate_does_not_depend_on_the_batch(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "last.pth", *FEW]
    flags += ["--metrics", "vlb,ode_nll,pixels", "--precision", "fp32"]
    values = []
    for size in (30, 7):
        size_flags = ["--batch_size", size]
        evaluation, _ = evaluated(*flags, *size_flags, cwd=tmp_path, out=f"e{size}")
        (subject,) = evaluation["subjects"]
        values.append(
            [
                subject["vlb"]["discrete"]["total"]["value"],
                subject["ode_nll"]["uniform"]["total"]["value"],
                subject["pixels"]["fd"]["samples"]["value"],
            ]
        )
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_samples_are_measured_as_their_model_is(trained, tmp_path):
    checkpoint = ["--checkpoint", trained / "moons" / "model.pth", "--steps", 5, "--seed", 4]
    run("generate.py", *checkpoint, "--num_samples", 50, "--out", "s.npz", cwd=tmp_path)
    flags = ["--num_samples", 50, "--metrics", "points,value_stats"]
    ours, _ = evaluated(*checkpoint, *flags, cwd=tmp_path, out="ours")
    samples = ["--samples", "s.npz", "--dataset", "moons"]
    theirs, _ = evaluated(*samples, *flags, cwd=tmp_path, out="theirs")
    for name in ("points", "value_stats"):
        assert ours["subjects"][0][name] == theirs["subjects"][0][name]


def test_samples_are_read_from_every_format(tmp_path):
    images = load_dataset("digits").train[:40, 0].numpy()
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    shutil.make_archive(tmp_path / "zip", "zip", tmp_path / "folder")
    np.savez(tmp_path / "adm.npz", images[..., None])  # arr_0, as others write it
    np.save(tmp_path / "a.npy", images)
    results = []
    for name in ("folder", "zip.zip", "adm.npz", "a.npy"):
        flags = ["--samples", name, "--dataset", "digits", "--metrics", "pixels,memorization"]
        evaluation, _ = evaluated(*flags, cwd=tmp_path, out=f"e-{name}")
        (subject,) = evaluation["subjects"]
        assert subject["memorization"]["copies"] == 40
        results.append(subject["pixels"])
    assert results[1:] == results[:-1]


def test_baseline_of_another_number_gives_no_ratio(tmp_path):
    save_digits(tmp_path / "real.npy", 730)  # more than the half that no classifier sees
    flags = ["--samples", "real.npy", "--dataset", "digits", "--metrics", "pixels,classifier"]
    flags += ["--num_samples", 730, "--reference", "train"]
    evaluation, _ = evaluated(*flags, cwd=tmp_path)
    for space in ("pixels", "classifier"):
        row = evaluation["subjects"][0][space]["fd"]
        assert row["real_vs_real"]
        assert row["relative_to_real"] is None
    warnings = " ".join(evaluation["warnings"])
    assert "360 items only" in warnings
    assert "on which the classifier was trained" in warnings


def test_data_that_has_moved_is_found_and_other_data_refused(files, tmp_path):
    flags = ["--dataset", files["images"], "--image_size", "10x14", "--class_cond"]
    run("train.py", *SHORT, *flags, cwd=tmp_path)
    moved = shutil.copytree(files["images"], tmp_path / "elsewhere" / "all")
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "all" / "last.pth")
    checkpoint["config"]["dataset"] = "/gone/all"
    torch.save(checkpoint, tmp_path / "gone.pth")
    few = ["--checkpoint", "gone.pth", *FEW, "--num_samples", 2, "--nll_items", 2]
    for i, place in enumerate((moved, moved.parent)):
        evaluation, text = evaluated(*few, "--data_dir", place, cwd=tmp_path, out=f"e{i}")
        assert "2 samples or real items are too few" in text
        assert "pixels" not in evaluation["subjects"][0]
    shutil.rmtree(moved / "red")
    assert "trained on" in refused("evaluate.py", *few, "--data_dir", moved, cwd=tmp_path)
    assert "set dataset to where" in refused("evaluate.py", *few, cwd=tmp_path)


# ---- comparison ----


def test_comparison_is_paired(trained, tmp_path):
    save_digits(tmp_path / "real.npy")
    paths = [trained / "digits" / "model.pth", trained / "digits" / "step_00000018.pth", "real.npy"]
    evaluation, text = evaluated("--compare", *paths, *FEW, cwd=tmp_path)
    names = [subject["name"] for subject in evaluation["subjects"]]
    assert names == ["digits", "step_00000018", "real"]
    assert "digits: test loss by noise level" in text  # as it comes
    rows = {(row["subject"], row["path"]): row["difference"] for row in evaluation["comparison"]}
    a, b = (subject["vlb"]["discrete"]["total"] for subject in evaluation["subjects"][:2])
    difference = rows["step_00000018", "vlb/discrete/total"]
    assert difference["value"] == pytest.approx(b["value"] - a["value"])
    assert difference["error"] < 0.5 * a["error"]  # two steps apart, on the same items
    assert ("real", "vlb/discrete/total") not in rows
    assert ("step_00000018", "loss/log-SNR 4.79/v") in rows
    assert rows["real", "pixels/fd/samples"]["value"] < 0
    assert "step_00000018 - digits" in text
    assert "classifier/precision" in text
    page = (tmp_path / "e" / "evaluation.html").read_text()
    assert page.count("<h2>") == 4  # three subjects and the recipe


def test_comparison_of_runs_that_call_their_models_alike(trained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(trained / "digits" / "model.pth", tmp_path / name)
    save_digits(tmp_path / "first.npy")
    flags = ["--compare", "first.npy", "a/model.pth", "b/model.pth", "--metrics", "loss,pixels"]
    evaluation, text = evaluated(*flags, *FEW, cwd=tmp_path)
    names = [subject["name"] for subject in evaluation["subjects"]]
    assert names == ["first", "a", "b"]
    rows = {(row["subject"], row["path"]): row["difference"] for row in evaluation["comparison"]}
    assert rows["a", "loss/log-SNR 4.79/v"] is None  # samples have no loss to compare with
    assert "pixels/fd" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "e", "first.npy"]
    assert len(list((tmp_path / "e").glob("2-a-*.png"))) == 3


def test_one_model_is_compared_under_two_samplers(trained, tmp_path):
    digits = trained / "digits"  # the folder of a run
    subjects = [f"ddpm={digits},sampler=ddpm,steps=4", f"{digits},steps=2", f"raw={digits}"]
    shutil.copytree(digits, tmp_path / "own")
    (tmp_path / "own" / "model.pth").unlink()
    subjects[2] = f"raw={tmp_path / 'own'},weights=raw"
    flags = ["--compare", *subjects, "--metrics", "pixels", "--num_samples", 30, "--steps", 3]
    evaluation, text = evaluated(*flags, cwd=tmp_path)
    about = {subject["name"]: subject["about"] for subject in evaluation["subjects"]}
    assert list(about) == ["ddpm", "digits steps=2", "raw"]
    assert [about[name]["sampler"] for name in about] == ["ddpm", "dpmpp_2m_sde", "dpmpp_2m_sde"]
    assert [about[name]["steps"] for name in about] == [4, 2, 3]
    assert [about[name]["weights"] for name in about] == ["ema", "ema", "raw"]
    files = [about[name]["checkpoint"].rsplit("/", 1)[1] for name in about]
    assert files == ["model.pth", "model.pth", "last.pth"]
    assert "digits steps=2 - ddpm" in text


# ---- groups of trainings ----


def save_runs(trained, folder):
    """Write three checkpoints as of trainings of the seeds 0, 1 and 2."""
    folder.mkdir()
    shutil.copy(trained / "digits" / "model.pth", folder / "0.pth")
    for seed, name in enumerate(("step_00000018", "step_00000020"), 1):
        checkpoint = read_checkpoint(trained / "digits" / f"{name}.pth")
        checkpoint["config"]["seed"] = seed
        torch.save(checkpoint, folder / f"{seed}.pth")


def test_groups_of_trainings_are_compared_pair_by_pair(trained, tmp_path):
    save_runs(trained, tmp_path / "r")
    flags = ["--compare", "few=r/*,steps=2", "more=r/*,steps=4", "--metrics", "pixels,loss,vlb"]
    evaluation, text = evaluated(*flags, *FEW, cwd=tmp_path)
    few, more = evaluation["groups"]
    assert (few["name"], more["name"]) == ("few", "more")
    assert few["seeds"] == more["seeds"] == [0, 1, 2]
    assert few["subjects"] == ["0 steps=2", "1 steps=2", "2 steps=2"]
    values = [subject["pixels"]["fd"]["samples"]["value"] for subject in evaluation["subjects"]]
    figure = few["figures"]["pixels/fd/samples"]
    assert figure["mean"] == pytest.approx(np.mean(values[:3]))
    assert figure["sd"] == pytest.approx(np.std(values[:3], ddof=1))
    assert figure["sample_error"] > 0
    less_first = more["less_first"]
    assert (less_first["interval_of"], less_first["paired"]) == ("trainings", True)
    difference = less_first["figures"]["pixels/fd/samples"]["difference"]
    assert difference["value"] == pytest.approx(np.mean(values[3:]) - np.mean(values[:3]))
    low, high = difference["interval"]
    assert (high - low) / difference["error"] == pytest.approx(2 * 4.30265, abs=1e-3)
    assert less_first["figures"]["vlb/discrete/total"]["difference"]["value"] == 0
    assert evaluation["comparison"] == []  # not one by one
    tables = text[text.index("few (3 trainings)") : text.index("wrote")]
    assert "more - few (95% intervals over trainings, paired by seed" in tables
    assert max(map(len, tables.splitlines()[:-4])) <= 100  # below are warnings, and paths
    page = (tmp_path / "e" / "evaluation.html").read_text()
    assert "more - few" in page
    assert "few, more on digits" in page


def test_groups_are_cut_as_a_shell_gives_them_and_one_of_one_shows_nothing(trained, tmp_path):
    save_runs(trained, tmp_path / "r")
    save_digits(tmp_path / "real.npy")
    flags = ["--compare", "r/0.pth", "r/1.pth", "--", "real.npy", "--metrics", "pixels", *FEW]
    evaluation, text = evaluated(*flags, cwd=tmp_path)
    assert [group["name"] for group in evaluation["groups"]] == ["r", "real.npy"]
    less_first = evaluation["groups"][1]["less_first"]
    assert (less_first["interval_of"], less_first["paired"]) == ("samples", False)
    figure = less_first["figures"]["pixels/fd/samples"]
    assert figure["difference"]["interval"][1] < 0
    assert figure["better"] is None
    assert "cannot be told" in text
    line = "real.npy: one training each: the interval holds the samples alone"
    assert any(warning.startswith(line) for warning in evaluation["warnings"])
    result = torchrun(2, "evaluate.py", *flags, "--out", "on2", cwd=tmp_path, timeout=240)
    assert result.code == 0, result.err
    others = json.loads((tmp_path / "on2" / "evaluation.json").read_text())
    assert others["groups"] == evaluation["groups"]


# ---- flags ----

LINES = [
    "--sampler ddim --eta 0.5 --spacing uniform --seed 2 --batch_size 20 --metrics pixels",
    "--sampler heun --s_churn 4 --threshold dynamic --weights raw --device cpu --data_dir d",
    "--cfg_scale 2 --guidance_interval -3 4 --guidance_rescale 0.5 --metrics classifier",
    "--guide_checkpoint {run} --cfg_scale 2 --precision bf16 --metrics memorization",
    "--metrics pixels,ode_nll --reference train --dequant_samples 2 --threads 1",
]


@pytest.mark.parametrize("line", LINES)
def test_evaluate_with_every_option(files, tmp_path, line):
    flags = ["--checkpoint", files["run"], *FEW, *line.format(**files).split()]
    evaluation, text = evaluated(*flags, cwd=tmp_path)
    (subject,) = evaluation["subjects"]
    assert subject["about"]["cfg_scale"] == (2 if "--cfg_scale" in line else None)
    assert bool(subject["about"]["guide_checkpoint"]) == ("--guide_checkpoint" in line)
    assert subject["about"]["weights"] == ("raw" if "--weights raw" in line else "ema")
    assert evaluation["recipe"]["reference"] == ("train" if "--reference" in line else "test")
    if "ode_nll" in line:
        assert set(subject) == {"name", "about", "ode_nll", "pixels"}
        assert "2 dequantizations each" in " ".join(text.split())


def test_every_evaluate_option_is_used_by_a_test(capsys):
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    words = capsys.readouterr().out.replace("[", " ").split()
    options = {word.strip(",;") for word in words if word.startswith("--")}
    options -= {"--help", "--"}  # the second stands between groups
    used = {str(flag) for flag in FEW} | set(" ".join(LINES).split())
    elsewhere = {"--checkpoint", "--samples", "--compare", "--dataset", "--image_size", "--out"}
    elsewhere |= {"--inception_weights", "--plugin"}
    assert len(options) > 20
    assert options - used == elsewhere


def test_flags_of_before_version_0_2_still_work(trained, tmp_path):
    few = ["--test_items", 30, "--exact-items", 4, "--draws", 2, "--exact_draws", 3]
    few += ["--num-samples", 30, "--steps", 3, "--clip", "none"]
    metrics = ["--metrics", ",".join(name for name in OLD_METRICS if name != "plane")]
    flags = ["--checkpoint", trained / "digits" / "last.pth", *few, *metrics]
    evaluation, _ = evaluated(*flags, cwd=tmp_path)
    recipe = evaluation["recipe"]
    names = ("vlb_items", "nll_items", "vlb_samples", "dequant_samples")
    assert [recipe[name] for name in names] == [30, 4, 2, 3]
    (subject,) = evaluation["subjects"]
    assert subject["about"]["threshold"] == "none"
    assert set(subject) - {"name", "about"} == set(OLD_METRICS.values()) - {"points"}


def test_plugin_adds_a_metric(tmp_path):
    (tmp_path / "own.py").write_text(
        "from ddp.metrics.evaluate import METRICS, Metric\n"
        "from ddp.metrics.uncertainty import Estimate\n"
        "def ink(candidate, reference, options):\n"
        "    return {'per item': Estimate.mean(candidate.samples.flatten(1).double().mean(1))}\n"
        "METRICS['ink'] = Metric(ink, title='ink of the samples')\n"
    )
    save_digits(tmp_path / "real.npy")
    flags = ["--samples", "real.npy", "--dataset", "digits", "--plugin", "own.py"]
    try:
        evaluation, text = evaluated(*flags, "--metrics", "ink", cwd=tmp_path)
    finally:
        METRICS.pop("ink", None)
    ink = evaluation["subjects"][0]["ink"]["per item"]
    assert "ink of the samples" in text
    assert f"{ink['value']:.4f} ± {ink['error']:.4f}" in text
    assert "ink of the samples" in (tmp_path / "e" / "evaluation.html").read_text()


# ---- what is refused ----

REFUSED = {
    "": "required",
    "--checkpoint {run} --samples a.npy": "not allowed",
    "--samples a.npy": "dataset",
    "--samples a.npy --dataset none": "none",
    "--samples float.npy --dataset digits": "uint8",
    "--samples wide.npy --dataset digits": "(5, 9, 9)",
    "--samples a.npy --dataset digits --metrics vlb": "needs a model",
    "--checkpoint {run} --dataset moons": "trained on",
    "--samples one.npy --dataset digits": "one holds 1; at least 2 are needed",
    "--checkpoint {run} --metrics fid": "expected some of",
    "--checkpoint {run} --metrics points": "of the kind point",
    "--checkpoint {run} --out full": "not overwritten",
    "--checkpoint {run} --num_samples 1": "num_samples=1",
    "--checkpoint {run} --nll_items 0": "nll_items=0",
    "--checkpoint {run} --image_size 8": "image_size",
    "--checkpoint {run} --inception_weights w.pth": "metrics=inception",
    "--compare {run}": "two or more",
    "--compare {run} {run}": "give NAME=PATH",
    "--compare {run} --": "before and after each --",
    "--compare -- {run} --metrics vlb": "before and after each --",
    "--compare {run} -- {moons}": "trained on",
    "--compare {run} --seed 3 -- {run}": "unrecognized",
    "--compare {run} {moons}": "trained on",
    "--compare {run} x=a.npy,steps=5": "steps: for checkpoints only",
    "--compare {run} {run},size=5": "size=5: expected some of",
    "--samples a.npy --dataset digits --steps 5 --weights raw": "weights, steps",
}


@pytest.mark.parametrize(("flags", "reason"), REFUSED.items())
def test_evaluate_refuses_before_any_work(files, trained, tmp_path, flags, reason):
    np.save(tmp_path / "a.npy", np.zeros((5, 8, 8), np.uint8))
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    np.save(tmp_path / "wide.npy", np.zeros((5, 9, 9), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((5, 8, 8), np.float32))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    line = flags.format(run=files["run"], moons=trained / "moons" / "last.pth")
    assert reason in refused("evaluate.py", *line.split(), cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


FAILS = {
    "--samples cut.npz --dataset digits": "cut.npz is not a whole .zip",
    "--checkpoint far.pth --metrics ode_nll": "out of range",
    "--checkpoint far.pth --metrics vlb": "out of range",
    "--checkpoint far.pth --metrics pixels": "infinite",
    "--checkpoint {digits} --out cut.npz/sub": "cannot be written",
    "--compare a=none/*.pth b={digits}": "nothing matches none/*.pth",
}


@pytest.mark.parametrize(("flags", "reason"), FAILS.items())
def test_evaluate_fails_in_a_line_and_leaves_nothing(tmp_path, flags, reason):
    checkpoint = read_checkpoint(DIGITS)
    for name, weight in checkpoint["ema"].items():
        if weight.is_floating_point() and "running" not in name:
            weight *= 1e20
    torch.save(checkpoint, tmp_path / "far.pth")
    np.savez(tmp_path / "cut.npz", np.zeros((50, 8, 8), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:1000])
    before = sorted(tmp_path.rglob("*"))
    line = flags.format(digits=DIGITS).split()
    few = [] if "cut.npz --dataset" in flags else [*FEW, "--vlb_items", 2, "--nll_items", 2]
    assert reason in refused("evaluate.py", *line, *few, cwd=tmp_path, code=1)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_inception_is_one_line(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    flags = ["--checkpoint", files["run"], "--metrics", "inception", "--inception_weights", "w.pth"]
    line = refused("evaluate.py", *flags, cwd=tmp_path, code=1)
    assert "pip install torch-fidelity" in line
    assert not list(tmp_path.iterdir())


# ---- where the results are, and what outlives a signal ----


def test_results_never_lie_inside_the_dataset(files, tmp_path):
    photos = shutil.copytree(files["images"], tmp_path / "photos")
    flags = ["--samples", photos / "red", "--dataset", photos, "--metrics", "value_stats"]
    for flag in (photos / "e", photos / "red" / "e"):
        assert "inside the data" in refused("evaluate.py", *flags, "--out", flag, cwd=tmp_path)
    for cwd in (tmp_path, photos, photos / "red"):
        run("evaluate.py", *flags, cwd=cwd)
    assert sorted(path.name for path in photos.iterdir()) == ["blue, dark", "red"]
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["photos", "red-evaluation", "red-evaluation-2", "red-evaluation-3"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_figures_that_are_finished_outlive_a_signal(trained, tmp_path, monkeypatch, number):
    def stop(candidate, reference, options):
        os.kill(os.getpid(), number)
        signal.pause()

    monkeypatch.setitem(METRICS, "vlb", Metric(stop, needs_model=True))
    flags = ["--checkpoint", trained / "moons" / "last.pth", *FEW, "--out", "e"]
    result = execute("evaluate.py", *flags, "--metrics", "points,vlb", cwd=tmp_path)
    assert result.code == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    evaluation = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert "points" in evaluation["subjects"][0]
    assert "stopped before all was measured" in evaluation["warnings"][-1]
    assert str(Path("e") / "evaluation.json") in result.out
    monkeypatch.setitem(METRICS, "points", Metric(stop))
    flags[-1] = "nothing"
    assert execute("evaluate.py", *flags, "--metrics", "points", cwd=tmp_path).code == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_result_that_came_meanwhile_is_not_overwritten(trained, tmp_path, monkeypatch):
    def other(candidate, reference, options):
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / "theirs").write_text("x")
        return {}

    monkeypatch.setitem(METRICS, "points", Metric(other))
    flags = ["--checkpoint", trained / "moons" / "last.pth", *FEW, "--out", "e"]
    text = run("evaluate.py", *flags, "--metrics", "points", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "e-2"]
    assert str(Path("e-2") / "evaluation.json") in text
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["theirs"]


def test_a_path_in_a_file_is_not_followed(files, tmp_path):
    """A checkpoint that came from elsewhere says which folder to read, and is not obeyed."""
    flags = ["--dataset", files["images"], "--image_size", "10x14"]
    run("train.py", *SHORT, *flags, cwd=tmp_path)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    own = ["--checkpoint", folder, "--metrics", "value_stats", "--steps", 2]
    run("evaluate.py", *own, cwd=tmp_path)
    shutil.copy(folder / "last.pth", tmp_path / "theirs.pth")
    theirs = ["--checkpoint", "theirs.pth", "--metrics", "value_stats", "--steps", 2]
    assert "dataset" in refused("evaluate.py", *theirs, cwd=tmp_path)
    evaluated(*theirs, "--dataset", files["images"], cwd=tmp_path)


# ---- the shipped checkpoint ----


def test_shipped_digits_is_good(tmp_path):
    _, _, checkpoint = load_model(DIGITS)
    flags = ["--checkpoint", DIGITS, "--metrics", "vlb,pixels,classifier", "--vlb_samples", 4]
    evaluation, _ = evaluated(*flags, cwd=tmp_path)
    assert evaluation["dataset"]["fingerprint"] == checkpoint["provenance"]["fingerprint"]
    (subject,) = evaluation["subjects"]
    for space in ("pixels", "classifier"):
        row = subject[space]["fd"]
        assert row["samples"]["value"] < 2 * row["real_vs_real"]["value"] + 0.3
    assert subject["vlb"]["discrete"]["total"]["value"] < 5.5
