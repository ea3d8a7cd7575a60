"""The three scripts, from end to end, and as programs where signals and exit codes matter."""

import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from ddp import checkpoint, reverse
from ddp.config import Config, merged, verdict
from ddp.data import load as load_data
from ddp.guidance import CLIPS
from ddp.schedule import SPACINGS

TINY = ["--width", "8", "--depth", "1", "--batch_size", "16"]
DIGITS = ROOT / "checkpoints" / "digits.pth"


class Ran:
    """What a script did: its exit code and what it said."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def execute(script, flags, cwd):
    """Run a script's command() in this process, in the folder `cwd`."""
    flags = [str(flag) for flag in flags]
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            os.chdir(cwd)
            code = importlib.import_module(script.removesuffix(".py")).command(flags)
        except SystemExit as stop:  # argparse's
            code = stop.code
        finally:
            os.chdir(here)
    return Ran(code, out.getvalue(), err.getvalue())


def run(script, *flags, cwd):
    """What a script says that must succeed."""
    ran = execute(script, flags, cwd)
    assert ran.code == 0, ran.err
    return ran.out


def refused(script, *flags, cwd, code=2):
    """The last line of what a script says that must fail with `code`."""
    ran = execute(script, flags, cwd)
    assert ran.code == code, ran.out + ran.err
    return ran.err.strip().splitlines()[-1]


def log(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which short runs on digits, conditional, and moons have been trained."""
    folder = tmp_path_factory.mktemp("trained")
    out = run("train.py", *TINY, "--max_steps", 20, "--conditional", "--dropout", 0.1, cwd=folder)
    assert str(folder / "checkpoints" / "digits") in out
    run("train.py", *TINY, "--dataset", "moons", "--max-steps", "12", cwd=folder)
    return folder / "checkpoints"


def test_train_writes_a_run(trained):
    names = {p.name for p in (trained / "digits").iterdir()}
    assert names == {
        "last.pth", "best.pth", "model.pth", "log.csv", "loss.png", "samples",
        "step_00000018.pth", "step_00000020.pth",
    }  # fmt: skip
    rows = log(trained / "digits")
    assert [int(r["step"]) for r in rows] == list(range(1, 21))
    assert [int(r["step"]) for r in rows if r["test_loss"]] == list(range(2, 21, 2))
    assert len(list((trained / "digits" / "samples").iterdir())) == 10
    best = min(float(r["test_loss"]) for r in rows if r["test_loss"])
    assert checkpoint.read(trained / "digits" / "best.pth")["best"] == pytest.approx(best, rel=1e-6)


def test_generate_every_format(trained, tmp_path):
    out = run(
        "generate.py",
        "--checkpoint",
        trained / "digits" / "model.pth",
        "--num-samples",
        12,
        "--format",
        "png,grid,npz,gif",
        "--steps",
        5,
        "--batch_size",
        5,
        "--out",
        "s",
        cwd=tmp_path,
    )
    assert str(tmp_path / "s") in out
    with np.load(tmp_path / "s" / "samples.npz") as arrays:
        assert arrays["images"].shape == (12, 8, 8, 1)
        assert arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [*range(10), 0, 1]
        for i in range(12):
            picture = np.asarray(Image.open(tmp_path / "s" / f"{i:06d}.png"))
            assert (picture == arrays["images"][i, ..., 0]).all()
    assert Image.open(tmp_path / "s" / "process.gif").n_frames == 5
    assert Image.open(tmp_path / "s" / "grid.png").width > 150
    assert "exists" in refused(
        "generate.py", "--checkpoint", trained / "digits" / "model.pth", "--out", "s", cwd=tmp_path
    )


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", None), ("dpm++", None), ("ddim", 0.5)])
def test_a_sample_does_not_depend_on_its_batch(trained, tmp_path, sampler, eta):
    flags = ["--checkpoint", trained / "moons" / "last.pth", "--sampler", sampler, "--steps", 6]
    flags += [] if eta is None else ["--eta", eta]
    run("generate.py", *flags, "--num_samples", 9, "--out", "a.npz", cwd=tmp_path)
    run(
        "generate.py", *flags, "--num_samples", 8, "--batch_size", 3, "--out", "b.npz", cwd=tmp_path
    )
    a, b = (np.load(tmp_path / f"{n}.npz")["points"] for n in "ab")
    assert a.shape == (9, 2)
    assert a.dtype == np.float32
    np.testing.assert_allclose(a[:8], b, rtol=1e-4, atol=1e-5)


def test_points_are_shown_beside_real_ones(trained, tmp_path):
    run("generate.py", "--checkpoint", trained / "moons" / "best.pth", "--num_samples", 50,
        "--format", "grid,gif", "--steps", 3, "--out", "s", cwd=tmp_path)  # fmt: skip
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"grid.png", "process.gif"}
    assert Image.open(tmp_path / "s" / "grid.png").width > 700


def test_labels_are_chosen(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--num_samples", 4, "--steps", 2]
    run("generate.py", *flags, "--label", "3,5", "--out", "a.npz", cwd=tmp_path)
    assert np.load(tmp_path / "a.npz")["labels"].tolist() == [3, 5, 3, 5]
    assert "--label 11" in refused("generate.py", *flags, "--label", "11", cwd=tmp_path)


FEW = ["--test_items", 30, "--num_samples", 30, "--exact_items", 4, "--out", "e"]


def evaluated(*flags, cwd):
    """evaluation.json of a run of evaluate.py that must succeed, and what it printed."""
    out = run("evaluate.py", *flags, "--out", "e", cwd=cwd)
    return json.loads((cwd / "e" / "evaluation.json").read_text()), out


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_evaluate(trained, tmp_path, name):
    path = trained / name / "last.pth"
    few = ["--test_items", 60, "--num_samples", 40, "--draws", 2, "--steps", 4, "--exact_items", 6]
    results, out = evaluated("--checkpoint", path, *few, cwd=tmp_path)
    recipe, (subject,) = results["recipe"], results["subjects"]
    assert recipe["unit"] == ("bits/dim" if name == "digits" else "nats")
    assert (recipe["num_samples"], recipe["test_items"], recipe["exact_items"]) == (40, 60, 6)
    assert subject["about"]["steps"] == 4
    assert subject["about"]["sampler"] == "unipc"
    for view in ("discrete", "continuous"):
        terms = subject["bound"][view]
        total = sum(terms[term]["value"] for term in ("prior", "diffusion", "reconstruction"))
        assert terms["total"]["value"] == pytest.approx(total)
        assert f"{terms['total']['value']:.4f} ± {terms['total']['error']:.4f}" in out
    assert set(subject["exact"]) == ({"uniform", "noise"} if name == "digits" else {"density"})
    for terms in subject["exact"].values():
        assert f"{terms['total']['value']:.4f}" in out
    assert len(subject["loss"]) == 10
    spaces = {"digits": {"judge", "pixels"}, "moons": {"plane"}}[name]
    assert set(subject["quality"]) == spaces
    for space in spaces:
        for figure, e in subject["quality"][space].items():
            if figure not in ("counts", "agreement"):
                assert e["samples"]["interval"][0] <= e["samples"]["value"], figure
                assert e["floor"]["value"] is not None
    if name == "digits":  # of a model that has learned next to nothing
        assert all(subject["quality"][s]["frechet"]["ratio"]["value"] > 1 for s in spaces)
    assert len(subject["memorisation"]["closest"]) == 16
    assert "too few" in out
    page = (tmp_path / "e" / "evaluation.html").read_text()
    assert "http" not in page
    assert page.count("data:image/png") == len(list((tmp_path / "e").glob("*.png")))
    for picture in (tmp_path / "e").glob("*.png"):
        assert Image.open(picture).width > 100
    assert not list(tmp_path.glob(".*"))


def test_evaluate_does_not_depend_on_the_batch(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "last.pth", "--steps", 3, "--draws", 2, *FEW[:-2]]
    found = []
    for size in (30, 7):
        run("evaluate.py", *flags, "--batch_size", size, "--out", f"e{size}", cwd=tmp_path)
        results = json.loads((tmp_path / f"e{size}" / "evaluation.json").read_text())
        (subject,) = results["subjects"]
        found.append(
            [
                subject["bound"]["discrete"]["total"]["value"],
                subject["exact"]["uniform"]["total"]["value"],
                subject["quality"]["pixels"]["frechet"]["samples"]["value"],
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_samples_of_a_model_are_judged_as_the_model_is(trained, tmp_path):
    """Whether evaluate.py draws them, or is given them in an .npz, a folder or a .zip."""
    path = trained / "moons" / "model.pth"
    run("generate.py", "--checkpoint", path, "--num_samples", 50, "--steps", 5, "--seed", 4,
        "--out", "s.npz", cwd=tmp_path)  # fmt: skip
    flags = ["--num_samples", 50, "--metrics", "plane,calibration"]
    ours, _ = evaluated("--checkpoint", path, *flags, "--steps", 5, "--seed", 4, cwd=tmp_path)
    shutil.rmtree(tmp_path / "e")
    theirs, _ = evaluated("--samples", "s.npz", "--dataset", "moons", *flags, cwd=tmp_path)
    for name in ("quality", "calibration"):
        a, b = (r["subjects"][0][name] for r in (ours, theirs))
        assert json.dumps(a) == json.dumps(b)
    shutil.rmtree(tmp_path / "e")

    images = load_data("digits").train[:40, 0].numpy()
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    shutil.make_archive(tmp_path / "zip", "zip", tmp_path / "folder")
    np.savez(tmp_path / "adm.npz", images[..., None])  # arr_0, as others write it
    np.save(tmp_path / "a.npy", images)
    found = set()
    for name in ("folder", "zip.zip", "adm.npz", "a.npy"):
        flags = ["--samples", name, "--dataset", "digits", "--metrics", "pixels,memorisation"]
        results, _ = evaluated(*flags, cwd=tmp_path)
        assert results["subjects"][0]["memorisation"]["copies"] == 40
        found.add(json.dumps(results["subjects"][0]["quality"]))
        shutil.rmtree(tmp_path / "e")
    assert len(found) == 1


def test_comparison(trained, tmp_path):
    paths = [trained / "digits" / "model.pth", trained / "digits" / "step_00000018.pth"]
    np.save(tmp_path / "real.npy", load_data("digits").train[:30, 0].numpy())
    few = [*FEW[:-2], "--draws", 2, "--steps", 3]
    results, out = evaluated("--compare", *paths, "real.npy", *few, cwd=tmp_path)
    names = [s["name"] for s in results["subjects"]]
    assert names == ["model", "step_00000018", "real"]
    rows = {(r["subject"], r["figure"]): r["difference"] for r in results["comparison"]}
    a, b = (s["bound"]["discrete"]["total"] for s in results["subjects"][:2])
    difference = rows["step_00000018", "bound/discrete/total"]
    assert difference["value"] == pytest.approx(b["value"] - a["value"])
    assert difference["error"] < 0.5 * a["error"]  # paired: two steps apart, on the same items
    assert ("real", "bound/discrete/total") not in rows
    assert ("step_00000018", "loss/log-SNR 4.79/v") in rows
    assert rows["real", "quality/pixels/frechet/samples"]["value"] < 0
    assert "step_00000018 less model" in out
    assert "quality/judge/precision" in out
    page = (tmp_path / "e" / "evaluation.html").read_text()
    assert page.count("<h2>") == 4


def test_comparison_of_two_runs_that_call_their_models_alike(trained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(trained / "digits" / "model.pth", tmp_path / name)
    np.save(tmp_path / "first.npy", load_data("digits").train[:30, 0].numpy())
    paths = ["first.npy", "a/model.pth", "b/model.pth"]
    flags = ["--metrics", "loss,pixels", "--num_samples", 30, "--steps", 2, "--test_items", 30]
    results, out = evaluated("--compare", *paths, *flags, cwd=tmp_path)
    assert [s["name"] for s in results["subjects"]] == [tmp_path.name, "a", "b"]
    rows = {(r["subject"], r["figure"]): r["difference"] for r in results["comparison"]}
    assert rows["a", "loss/log-SNR 4.79/v"] is None  # samples have no loss to compare with
    assert "loss/log-SNR 4.79/v" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "e", "first.npy"]
    assert len(list((tmp_path / "e").glob("2-a-*.png"))) == 3


def test_a_floor_of_another_number_gives_no_ratio(tmp_path):
    flags = ["--metrics", "pixels,judge", "--num_samples", 1000, "--reference", "train"]
    np.save(tmp_path / "real.npy", load_data("digits").train[:1000, 0].numpy())
    flags = ["--samples", "real.npy", "--dataset", "digits", *flags]
    results, _ = evaluated(*flags, cwd=tmp_path)
    for space in ("pixels", "judge"):
        row = results["subjects"][0]["quality"][space]["frechet"]
        assert row["floor"]
        assert row["ratio"] is None
    notes = " ".join(results["notes"])
    assert "360 items only" in notes
    assert "on which the judge was trained" in notes


def start(*flags, cwd):
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, *map(str, flags)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, number):
    flags = ["--max_steps", 300, "--save_every", 100, "--sample_every", 300, "--dropout", 0.1]
    whole = start(*flags, "--name", "whole", cwd=tmp_path)
    assert whole.wait(240) == 0, whole.stdout.read()
    broken = start(*flags, "--name", "broken", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "broken"
    wait_for(folder / "step_00000100.pth", broken)
    broken.send_signal(number)
    said = broken.communicate(timeout=60)[0]
    assert broken.returncode == 128 + number, said
    assert "--resume" in said
    step = checkpoint.read(folder / "last.pth")["step"]
    assert 100 <= step < 300
    run("train.py", "--resume", folder, cwd=tmp_path)
    a, b = (checkpoint.read(tmp_path / "checkpoints" / n / "last.pth") for n in ("whole", "broken"))
    assert a["step"] == b["step"] == 300
    assert a["best"] == b["best"]
    for part in ("model", "ema"):
        for key in a[part]:
            assert torch.equal(a[part][key], b[part][key]), key
    for ours, theirs in zip(a["optimizer"], b["optimizer"], strict=True):
        for i, moments in ours["state"].items():
            for key in moments:
                assert torch.equal(moments[key], theirs["state"][i][key])
    logs = [(tmp_path / "checkpoints" / n / "log.csv").read_bytes() for n in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    flags = ["--max_steps", 60, "--save_every", 20, "--sample_every", 60, "--name", "a"]
    killed = start(*flags, cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "a"
    wait_for(folder / "step_00000020.pth", killed)
    killed.kill()
    killed.wait()
    with open(folder / "log.csv", "a") as f:
        f.write("21,0.2,")  # a row that the crash cut short
    run("train.py", *TINY, *flags, "--resume", "auto", cwd=tmp_path)
    assert [int(r["step"]) for r in log(folder)] == list(range(1, 61))


def test_nothing_is_overwritten(trained, tmp_path):
    flags = [*TINY, "--max_steps", 2]
    for _ in range(3):
        run("train.py", *flags, cwd=tmp_path)
    runs = tmp_path / "checkpoints"
    assert {p.name for p in runs.iterdir()} == {"digits", "digits-2", "digits-3"}
    run("train.py", *flags, "--name", "a", cwd=tmp_path)
    before = {p: p.read_bytes() for p in (runs / "a").glob("*.*")}
    assert "--resume" in refused("train.py", *flags, "--name", "a", cwd=tmp_path)
    assert {p: p.read_bytes() for p in (runs / "a").glob("*.*")} == before
    run("train.py", "--resume", runs / "a", "--max_steps", 6, "--keep", 9, cwd=tmp_path)
    early = runs / "a" / "step_00000004.pth"
    assert "--name" in refused("train.py", "--resume", early, "--max_steps", 9, cwd=tmp_path)
    run("train.py", "--resume", early, "--max_steps", 5, "--name", "branch", cwd=tmp_path)
    assert [int(r["step"]) for r in log(runs / "branch")] == [1, 2, 3, 4, 5]


def test_a_dry_run_tells_and_draws(tmp_path):
    out = run("train.py", *TINY, "--dry-run", "--schedule", "scaled_linear", cwd=tmp_path)
    assert "parameters" in out
    assert "terminal SNR 0.0047" in out  # the published figure: Lin et al. 2024, table 1
    assert "warning" in out
    assert "effective weight" in out
    assert "activations" in out
    (picture,) = (tmp_path / "checkpoints").iterdir()
    assert str(picture) in out
    assert Image.open(picture).width > 500
    for flags in ("--schedule scaled_linear --zero_terminal_snr", "--schedule learned", ""):
        assert "warning" not in run("train.py", *TINY, "--dry-run", *flags.split(), cwd=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    flags = [*TINY, "--lr", 1e30, "--grad_clip", 0, "--warmup", 0, "--save_every", 1]
    said = refused("train.py", *flags, "--max_steps", 50, cwd=tmp_path, code=1)
    assert "--lr" in said
    for path in (tmp_path / "checkpoints" / "digits").glob("*.pth"):
        state = checkpoint.read(path)
        assert all(v.isfinite().all() for part in ("model", "ema") for v in state[part].values())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--epochs 0", "--epochs"),
        ("--epochs -3", "--epochs"),
        ("--lr nan", "--lr"),
        ("--lr abc", "--lr"),
        ("--batch_size 0", "--batch_size"),
        ("--batch_size 1", "BatchNorm"),
        ("--dropout 1.5", "--dropout"),
        ("--width 0", "--width"),
        ("--dataset nowhere", "nowhere"),
        ("--schedule cubic", "schedule"),
        ("--image_size 0", "image_size"),
        ("--image_size 8x8", "--image_size"),
        ("--seed -1", "--seed"),
        ("--device tpu", "tpu"),
        ("--precision fp16 --device cpu", "fp16"),
        ("--dataset moons --conditional", "--conditional"),
        ("--dataset moons --attention 4", "--attention"),
        ("--attention 5", "--attention"),
        ("--timesteps -1", "--timesteps"),
        ("--unknown 1", "--unknown"),
        ("--multipliers 0,1", "--multipliers"),
        ("--name ../evil", "--name"),
        ("--device meta", "meta"),
        ("--schedule learned --timesteps 10", "--timesteps"),
        ("--schedule learned --zero_terminal_snr", "--zero_terminal_snr"),
        ("--schedule learned --levels uniform", "--levels"),
        ("--schedule learned --weighting v", "--weighting"),
        ("--schedule learned --loss l1", "--loss"),
        ("--zero_terminal_snr --predict eps", "--predict"),
        ("--zero_terminal_snr --timesteps 1", "--zero_terminal_snr"),
        ("--zero_terminal_snr --weighting bound", "--weighting"),
        ("--levels log_normal --weighting bound", "--levels"),
        ("--levels normal --weighting bound", "--levels"),
        ("--levels log_normal --zero_terminal_snr", "--levels"),
        ("--shift 1e-300", "--shift"),
        ("--label_dropout 0.5", "--conditional"),
        ("--negative_slope 0.3 --activation silu", "--negative_slope"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(tmp_path, flags, word):
    assert word in refused("train.py", *flags.split(), cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--num_samples 0", "--num_samples"),
        ("--steps 0", "--steps"),
        ("--steps 1001", "--steps 1001"),
        ("--eta 0.5 --sampler dpm++", "--eta"),
        ("--eta 2", "--eta"),
        ("--seed 4294967296", "--seed"),
        ("--out x.jpg", "x.jpg"),
        ("--label 3", "--conditional"),
        ("--format bmp", "bmp"),
        ("--format npz --out x.png", "x.png"),
        ("--batch_size 0", "--batch_size"),
        ("--sampler magic", "magic"),
        ("--eta 0.5 --sampler unipc", "--eta"),
        ("--churn 3", "--churn"),
        ("--churn -1 --sampler heun", "--churn"),
        ("--clip dynamic", "--clip"),
        ("--spacing leading", "leading"),
        ("--guidance 2", "--guidance"),
        ("--guidance nan", "--guidance"),
        ("--guidance_rescale 0.5", "--guidance"),
        ("--guidance_interval -1 1", "--guidance"),
        ("--guide x.pth", "--guidance"),
        ("--strength 0.5", "--image"),
        ("--image x.npy --strength 0", "--strength"),
        ("--image x.npy --reconstruct x.npy", "not allowed"),
        ("--mask x.npy", "--inpaint"),
        ("--inpaint x.npy", "--mask"),
        ("--resample 2", "--inpaint"),
        ("--inpaint x.npy --mask x.npy --jump 0", "--jump"),
        ("--reconstruct x.npy --sampler ddpm", "ddim"),
        ("--reconstruct x.npy --eta 1", "--eta"),
        ("--interpolate --sampler ddpm", "--interpolate"),
        ("--mc_dropout 1", "--mc_dropout"),
        ("--mc_dropout 4", "--dropout"),
        ("--mc_dropout 4 --format gif", "gif"),
        ("--image x.png", "expected"),
        ("--mc_dropout 3 --out x.gif", "gif"),
        ("--reconstruct x.npy --churn 2 --sampler ddim", "--churn"),
    ]
    + [(f"--{name} =", "expected a path") for name in ("image", "inpaint", "reconstruct", "noise")],
)
def test_generate_refuses(trained, tmp_path, flags, word):
    path = trained / "moons" / "model.pth"
    flags = ["" if flag == "=" else flag for flag in flags.split()]
    if "--inpaint" in flags and "" in flags:
        flags += ["--mask", "x.npy"]
    assert word in refused("generate.py", "--checkpoint", path, *flags, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["evaluate.py", "generate.py"])
def test_a_missing_or_damaged_checkpoint_is_one_line_and_code_1(script, tmp_path):
    assert "none.pth" in refused(script, "--checkpoint", "none.pth", cwd=tmp_path, code=1)
    (tmp_path / "bad.pth").write_bytes(b"PK nonsense")
    assert "bad.pth" in refused(script, "--checkpoint", "bad.pth", cwd=tmp_path, code=1)


# Every option of every script is run, by the lines below or by another test of this file; {run} is
# the conditional digits model, {array} some digits, {mask} their lower half.

TRAIN_LINES = [
    "--dataset moons --data_dir d --width 16 --depth 2 --timesteps 0 --schedule flow "
    "--predict flow --shift 2 --seed 3 --name a --out_dir o --device cpu --precision fp32 --keep 0",
    "--channels 3 --image_size 8x10 --test_fraction 0.5 --label_dropout 0.2 --conditional "
    "--multipliers 1,2 --patch 2 --attention 2 --dataset {pictures}",
    "--schedule scaled_linear --zero_terminal_snr --levels uniform --weighting p2 --loss huber "
    "--norm group --activation silu --dropout 0.1 --init xavier",
    "--levels importance --weighting bound --optimizer adamw --lr 0.01 --lr_schedule linear "
    "--warmup 2 --noise_draws 2 --weight_decay 0 --grad_clip 0 --grad_accumulation 2 "
    "--ema_decay 0.9",
    "--epochs 0.02 --max_minutes 1 --save_every 1 --keep 1 --sample_every 1",
    *("--schedule learned", "--schedule karras --levels log_normal --weighting edm"),
    "--levels normal --zero_terminal_snr",
    *(f"--schedule {name} --timesteps 20" for name in ("linear", "sigmoid", "cosine")),
    *(f"--predict {name}" for name in ("x0", "eps", "v")),
    *(f"--weighting {n}" for n in ("uniform", "snr", "truncated_snr", "v", "flow", "min_snr")),
    *("--loss l1 --activation relu", "--loss mse --activation leaky_relu --negative_slope 0.2"),
    "--norm none --init default --lr_schedule constant",
    "--norm batch --init kaiming --lr_schedule cosine",
]  # fmt: skip
GENERATE_LINES = [
    *(f"--sampler {name} --steps 3" for name in reverse.SAMPLERS),
    *(f"--spacing {name} --steps 3 --sampler heun --churn 2" for name in SPACINGS),
    *(f"--clip {name} --weights raw --device cpu --seed 3 --steps 2" for name in CLIPS),
    "--eta 0.3 --steps 3 --batch_size 2 --label 3",
    "--guidance 2 --guidance_interval -3 4 --guidance_rescale 0.5 --clip dynamic --steps 4",
    "--guidance 1.5 --guide {run} --steps 3 --precision bf16",
    "--image {array} --strength 0.7 --label 2",
    "--inpaint {array} --mask {mask} --jump 2 --resample 2 --steps 6",
    "--reconstruct {array} --steps 4",
    "--interpolate --steps 3",
    "--interpolate {array} --steps 3",
    "--mc_dropout 2 --steps 3",
]
EVALUATE_LINES = [
    "--sampler ddim --steps 3 --eta 0.5 --spacing uniform --draws 1 --seed 2 --batch_size 20",
    "--sampler heun --churn 4 --steps 3 --clip dynamic --weights raw --device cpu --data_dir d",
    "--guidance 2 --guidance_interval -3 4 --guidance_rescale 0.5 --steps 3",
    "--guide {run} --guidance 2 --steps 3 --precision bf16",
    "--metrics pixels,exact --reference train --exact_draws 2 --steps 3",
]


@pytest.fixture(scope="module")
def given(trained, pictures):
    """What the lines name."""
    digits = load_data("digits").test[:3]
    np.save(trained / "array.npy", digits[:, 0].numpy())
    np.save(trained / "mask.npy", np.arange(64).reshape(8, 8) >= 32)
    paths = {"array": trained / "array.npy", "mask": trained / "mask.npy", "pictures": pictures}
    return {**paths, "run": trained / "digits" / "last.pth"}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_a_run_like_others(tmp_path):
    run("train.py", *TINY, "--max_steps", 2, "--compile", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "digits"
    assert checkpoint.read(folder / "last.pth")["config"]["compile"]
    run("generate.py", "--checkpoint", folder / "model.pth", "--num_samples", 4, cwd=tmp_path)


def test_a_resumed_run_is_compiled_when_it_is_asked_for():
    assert not merged(Config(compile=True), {}).compile
    assert merged(Config(), {"compile": True}).compile


def test_a_compiler_that_does_not_work_is_one_line():
    code, line = verdict(torch._dynamo.exc.InternalTorchDynamoError("no\ncompiler"))
    assert (code, line) == (1, "error: --compile does not work here (no compiler); leave it out")


@pytest.mark.parametrize("line", TRAIN_LINES)
def test_train_lines(given, tmp_path, line):
    size = [] if "--width" in line else TINY
    limit = [] if "--epochs" in line else ["--max_steps", 2]
    run("train.py", *size, *limit, *line.format(**given).split(), cwd=tmp_path)
    (path,) = tmp_path.glob("*/*/model.pth")
    count = 1000 if "--dataset moons" in line else 4
    out = run("generate.py", "--checkpoint", path, "--num_samples", count, cwd=tmp_path)
    assert "unipc in 20 steps" in out


@pytest.mark.parametrize("line", GENERATE_LINES)
def test_generate_lines(given, tmp_path, line):
    flags = ["--checkpoint", given["run"], *line.format(**given).split()]
    count = [] if "array" in line else ["--num_samples", 5]
    run("generate.py", *flags, *count, "--format", "npz,grid", "--out", "s", cwd=tmp_path)
    with np.load(tmp_path / "s" / "samples.npz") as arrays:
        expected = 16 if "--interpolate {" in line else 3 if "array" in line else 5
        assert arrays["images"].shape == (expected, 8, 8, 1)
        if "--inpaint" in line:
            kept = np.load(given["array"])[:, :4]
            assert (arrays["images"][:, :4, :, 0] == kept).all()
        if "--reconstruct" in line:
            again = ["--noise", tmp_path / "s" / "samples.npz", "--out", "again.npz"]
            assert arrays["noise"].shape == (3, 1, 8, 8)
            run("generate.py", "--checkpoint", given["run"], *again, cwd=tmp_path)
        if "--mc_dropout" in line:
            assert (arrays["std"] > 0).any()
    assert Image.open(tmp_path / "s" / "grid.png").width > 100


@pytest.mark.parametrize("line", EVALUATE_LINES)
def test_evaluate_lines(given, tmp_path, line):
    flags = ["--checkpoint", given["run"], *FEW[:-2], *line.format(**given).split()]
    results, out = evaluated(*flags, cwd=tmp_path)
    about = results["subjects"][0]["about"]
    assert about["guidance"] == (2 if "--guidance" in line else None)
    assert about["weights"] == ("raw" if "--weights raw" in line else "ema")
    assert results["recipe"]["reference"] == ("train" if "--reference" in line else "test")
    if "--metrics" in line:
        assert set(results["subjects"][0]) == {"name", "about", "exact", "quality"}
        assert "2 draws each" in out


@pytest.mark.parametrize("script", ["train", "generate", "evaluate"])
def test_every_option_is_run_by_some_test(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).command(["--help"])
    found = re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)
    options = {"--" + word[2:].replace("-", "_") for word in found} - {"--help"}
    lines = {"train": TRAIN_LINES, "generate": GENERATE_LINES, "evaluate": EVALUATE_LINES}[script]
    elsewhere = {
        "train": {
            *("--batch_size", "--resume", "--dry_run", "--max_steps", "--profile", "--compile"),
        },
        "generate": {"--checkpoint", "--num_samples", "--format", "--out", "--noise"},
        "evaluate": {
            *("--checkpoint", "--num_samples", "--test_items", "--exact_items", "--out"),
            *("--samples", "--compare", "--dataset", "--image_size", "--inception_weights"),
        },
    }[script]
    assert len(options) > 10
    assert options - set(" ".join(lines).split()) == elsewhere


def test_samples_of_an_edit_do_not_depend_on_the_batch(given, tmp_path):
    for line in ("--image {array}", "--inpaint {array} --mask {mask}", "--mc_dropout 3",
                 "--interpolate {array}", "--interpolate {array} --label 0,1,2",
                 "--reconstruct {array} --label 0,1,2,3",
                 "--sampler heun --churn 8"):  # fmt: skip
        flags = ["--checkpoint", given["run"], *line.format(**given).split(), "--steps", 4]
        arrays = []
        for size in (7, 2):
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
            run("generate.py", *flags, "--num_samples", 7, "--batch_size", size, "--out", path,
                cwd=tmp_path)  # fmt: skip
            with np.load(path) as npz:
                arrays.append({name: npz[name].astype(float) for name in npz.files})
        for name in arrays[0]:
            np.testing.assert_allclose(arrays[0][name], arrays[1][name], atol=1.01, err_msg=line)


def test_noise_of_a_reconstruction_gives_it_back(given, tmp_path):
    flags = ["--checkpoint", DIGITS, "--steps", 30]
    run("generate.py", *flags, "--reconstruct", given["array"], "--format", "npz", "--out", "r",
        cwd=tmp_path)  # fmt: skip
    run("generate.py", *flags, "--noise", "r/samples.npz", "--out", "n.npz", cwd=tmp_path)
    a, b = (np.load(tmp_path / p)["images"].astype(float) for p in ("r/samples.npz", "n.npz"))
    assert abs(a - b).mean() < 1
    assert abs(a[..., 0] - np.load(given["array"])).mean() < 6


def test_a_learned_schedule_goes_through_all_scripts(given, tmp_path):
    run("train.py", *TINY, "--schedule", "learned", "--max_steps", 3, cwd=tmp_path)
    path = tmp_path / "checkpoints" / "digits" / "last.pth"
    for i, edit in enumerate(("--reconstruct", "--interpolate", "--image")):
        run("generate.py", "--checkpoint", path, edit, given["array"], "--out", f"{i}.png",
            cwd=tmp_path)  # fmt: skip
    run("evaluate.py", "--checkpoint", path, *FEW, cwd=tmp_path)
    run("train.py", "--resume", path, "--max_steps", 5, cwd=tmp_path)


@pytest.mark.parametrize("flags", ["--timesteps 3", "--timesteps 1", "--zero_terminal_snr"])
def test_few_steps_and_noise_alone_go_through_all_scripts(given, tmp_path, flags):
    run("train.py", *TINY, *flags.split(), "--max_steps", 3, cwd=tmp_path)
    path = tmp_path / "checkpoints" / "digits" / "last.pth"
    run("evaluate.py", "--checkpoint", path, *FEW, cwd=tmp_path)
    run("generate.py", "--checkpoint", path, "--image", given["array"], cwd=tmp_path)
    if flags != "--timesteps 1":
        run("generate.py", "--checkpoint", path, "--reconstruct", given["array"], cwd=tmp_path)


def test_what_does_not_belong_together_is_refused(given, trained, tmp_path):
    run("train.py", *TINY, "--conditional", "--label_dropout", 0, "--max_steps", 2, cwd=tmp_path)
    bare, digits = tmp_path / "checkpoints" / "digits" / "model.pth", given["run"]
    moons = trained / "moons" / "model.pth"
    np.save(tmp_path / "masks.npy", np.eye(8)[None].repeat(2, axis=0))
    inpaint = ["--inpaint", given["array"], "--mask"]
    for path, flags, word in (
        (digits, ["--guidance", 2, "--guide", moons], "--guide"),
        (bare, ["--guidance", 2], "label"),
        (bare, ["--image", given["array"]], "--label"),
        (digits, [*inpaint, "masks.npy"], "2 masks for 3"),
        (digits, [*inpaint, given["mask"], "--jump", 30, "--steps", 20], "--jump"),
        (digits, ["--reconstruct", moons], "no picture"),
        (digits, ["--interpolate", given["array"], "--steps", 2000], "--steps"),
        (digits, ["--guidance", 2, "--guidance_interval", 3, -3], "LOW"),
    ):  # fmt: skip
        code = 1 if word == "no picture" else 2
        out = ["--checkpoint", path, "--out", "new/deep/s"]
        assert word in refused("generate.py", *out, *flags, cwd=tmp_path, code=code)
        assert not (tmp_path / "new").exists()
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    one = ["--checkpoint", digits, "--interpolate", "one.npy"]
    assert "two" in refused("generate.py", *one, cwd=tmp_path)


def test_samples_that_become_infinite_are_not_written(given, tmp_path):
    np.save(tmp_path / "huge.npy", np.full((4, 1, 8, 8), 1e38))
    flags = ["--noise", "huge.npy", "--out", "a.npz"]
    said = refused("generate.py", "--checkpoint", given["run"], *flags, cwd=tmp_path, code=1)
    assert "infinite" in said
    assert [p.name for p in tmp_path.iterdir()] == ["huge.npy"]


def test_points_are_edited_too(trained, tmp_path):
    """The moons' first coordinate is kept, and the second filled in."""
    points = np.array([[0.5, 0.0], [-0.5, 0.0]], np.float32)
    np.save(tmp_path / "p.npy", points)
    np.save(tmp_path / "m.npy", [0, 1])
    flags = ["--inpaint", "p.npy", "--mask", "m.npy", "--num_samples", 6, "--steps", 5]
    path = trained / "moons" / "model.pth"
    run("generate.py", "--checkpoint", path, *flags, "--out", "a.npz", cwd=tmp_path)
    made = np.load(tmp_path / "a.npz")["points"]
    np.testing.assert_array_equal(made[:, 0], np.tile(points[:, 0], 3))
    assert len(np.unique(made[:, 1])) == 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Colour pictures of mixed sizes in two class folders."""
    folder = tmp_path_factory.mktemp("pictures") / "all"
    random = np.random.RandomState(0)
    for i in range(24):
        name = folder / ("red" if i % 2 else "blue, dark") / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        size = random.randint(20, 60), random.randint(20, 60), 3
        Image.fromarray((random.rand(*size) * 255).astype(np.uint8)).save(name)
    return folder


def test_a_folder_of_pictures(pictures, tmp_path):
    flags = [*TINY, "--dataset", pictures, "--image_size", "10x14", "--conditional"]
    out = run("train.py", *flags, "--max_steps", 2, cwd=tmp_path)
    assert "2 classes" in out
    path = tmp_path / "checkpoints" / "all" / "last.pth"
    draw = ["--checkpoint", path, "--num_samples", 3, "--steps", 2]
    run("generate.py", *draw, "--label", "blue, dark", "--out", "a.npz", cwd=tmp_path)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (3, 10, 14, 3)
        assert arrays["labels"].tolist() == [0, 0, 0]
    # the folder moves: --data_dir finds it again, and other data is refused
    moved = shutil.copytree(pictures, tmp_path / "elsewhere" / "all")
    state = checkpoint.read(path)
    state["config"]["dataset"] = "/gone/all"
    torch.save(state, path)
    torch.save(state, tmp_path / "gone.pth")
    few = [
        "--checkpoint",
        tmp_path / "gone.pth",
        "--num_samples",
        2,
        "--steps",
        2,
        "--draws",
        1,
        "--exact_items",
        2,
    ]
    for place in (moved, moved.parent):
        results, out = evaluated(*few, "--data_dir", place, cwd=tmp_path)
        assert "too few samples or real items, 2" in out
        assert "quality" not in results["subjects"][0]
        shutil.rmtree(tmp_path / "e")
    run("train.py", "--resume", path, "--data_dir", moved, "--max_steps", 3, cwd=tmp_path)
    shutil.rmtree(moved / "red")
    assert "trained on" in refused("evaluate.py", *few, "--data_dir", moved, cwd=tmp_path)
    assert "--data_dir" in refused("evaluate.py", *few, cwd=tmp_path)


def test_a_time_limit_ends_the_run_and_saves_on_the_way(tmp_path, monkeypatch):
    """On a clock that moves a second at each look, so that this machine's speed has no say."""
    ticks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(importlib.import_module("train"), "time", clock)
    run("train.py", *TINY, "--max_minutes", 0.5, "--epochs", 10**6, cwd=tmp_path)
    run("train.py", *TINY, "--max_minutes", 0.5, "--name", "timed", cwd=tmp_path)
    for name in ("digits", "timed"):
        rows = log(tmp_path / "checkpoints" / name)
        assert 25 < len(rows) <= 30
        assert sum(1 for r in rows if r["test_loss"]) == 10
    peak = max(float(r["lr"]) for r in rows)
    assert float(rows[-1]["lr"]) < peak / 10


def test_a_damaged_last_checkpoint_leaves_the_numbered_ones(tmp_path):
    run("train.py", *TINY, "--max_steps", 4, "--keep", 2, cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "digits"
    (folder / "last.pth").write_bytes((folder / "last.pth").read_bytes()[:1000])
    assert "damaged" in refused("train.py", "--resume", folder, cwd=tmp_path, code=1)
    run("train.py", "--resume", folder / "step_00000003.pth", cwd=tmp_path)
    assert checkpoint.read(folder / "last.pth")["step"] == 4
    (folder / "last.pth").unlink()
    assert "best.pth" in refused("train.py", "--resume", folder, cwd=tmp_path, code=1)


@pytest.mark.parametrize(
    "change", [{"optimizer": []}, {"best": "x"}, {"provenance": {}}, {"ema": {}}]
)
def test_resume_refuses_a_checkpoint_that_does_not_fit(trained, tmp_path, change):
    torch.save(checkpoint.read(trained / "digits" / "last.pth") | change, tmp_path / "a.pth")
    refused("train.py", "--resume", "a.pth", "--name", "n", cwd=tmp_path, code=1)


def test_the_shipped_digits(tmp_path):
    assert DIGITS.stat().st_size <= 2_000_000
    _, config, state = checkpoint.load_model(DIGITS)
    assert (config.dataset, config.epochs, config.lr, config.batch_size) == (
        "digits",
        100,
        1e-3,
        128,
    )
    assert set(state) == set(checkpoint.INFERENCE)
    results, _ = evaluated(
        "--checkpoint", DIGITS, "--metrics", "bound,pixels,judge", "--draws", 4, cwd=tmp_path
    )
    assert results["dataset"]["fingerprint"] == state["provenance"]["fingerprint"]
    (subject,) = results["subjects"]
    for space in ("pixels", "judge"):
        assert subject["quality"][space]["frechet"]["ratio"]["value"] < 2
    assert subject["bound"]["discrete"]["total"]["value"] < 5


def test_the_shipped_mnist(tmp_path):
    """It is the run that the README shows and docs/evaluation.md measures."""
    path = ROOT / "checkpoints" / "mnist.pth"
    assert path.stat().st_size <= 4_000_000
    _, config, state = checkpoint.load_model(path)
    assert (config.dataset, config.data_dir) == ("mnist", "data")
    assert f"mnist --max_minutes {config.max_minutes:g}`" in (ROOT / "README.md").read_text()
    assert f"{state['step']:,} steps" in (ROOT / "docs" / "evaluation.md").read_text()
    run("generate.py", "--checkpoint", path, "--num_samples", 16, "--out", "a.npz", cwd=tmp_path)
    images = np.load(tmp_path / "a.npz")["images"]
    assert images.shape == (16, 28, 28, 1)
    assert 20 < images.mean() < 50  # of the data: 34


EVALUATE_REFUSED = {
    "": "required",
    "--checkpoint {run} --samples a.npy": "not allowed",
    "--samples a.npy": "--dataset",
    "--samples a.npy --dataset none": "none",
    "--samples float.npy --dataset digits": "uint8",
    "--samples wide.npy --dataset digits": "(5, 9, 9)",
    "--samples a.npy --dataset digits --metrics bound": "needs a model",
    "--checkpoint {run} --dataset digits": "--dataset",
    "--checkpoint {run} --metrics fid": "expected some of",
    "--checkpoint {run} --metrics plane": "points",
    "--checkpoint {run} --out full": "not overwritten",
    "--checkpoint {run} --num_samples 1": "--num_samples",
    "--checkpoint {run} --exact_items 0": "--exact_items",
    "--checkpoint {run} --image_size 8": "--image_size",
    "--checkpoint {run} --inception_weights w.pth": "--metrics inception",
    "--compare {run}": "different paths",
    "--compare {run} {run}": "different paths",
    "--compare {run} {moons}": "trained on",
    "--samples a.npy --dataset digits --steps 5 --weights raw": "--weights, --steps",
}


@pytest.mark.parametrize(("flags", "word"), EVALUATE_REFUSED.items())
def test_evaluate_refuses_in_a_line_before_any_work(given, tmp_path, flags, word):
    np.save(tmp_path / "a.npy", np.zeros((5, 8, 8), np.uint8))
    np.save(tmp_path / "wide.npy", np.zeros((5, 9, 9), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((5, 8, 8), np.float32))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    line = flags.format(run=given["run"], moons=given["run"].parent.parent / "moons" / "last.pth")
    assert word in refused("evaluate.py", *line.split(), cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_fails_in_a_line_and_leaves_nothing(given, tmp_path):
    state = torch.load(DIGITS)
    for name, weight in state["ema"].items():
        if weight.is_floating_point() and "running" not in name:
            weight *= 1e20
    torch.save(state, tmp_path / "far.pth")
    np.savez(tmp_path / "cut.npz", np.zeros((50, 8, 8), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:1000])
    before = sorted(tmp_path.rglob("*"))
    few = ["--num_samples", 30, "--test_items", 2, "--exact_items", 2, "--exact_draws", 1]
    for flags, word in (
        (["--samples", "cut.npz", "--dataset", "digits"], "cannot be read"),
        (["--checkpoint", "far.pth", *few, "--metrics", "exact"], "out of range"),
        (["--checkpoint", "far.pth", *few, "--metrics", "bound"], "out of range"),
        (["--checkpoint", "far.pth", *few, "--metrics", "pixels"], "not finite"),
        (["--checkpoint", DIGITS, "--out", tmp_path / "cut.npz" / "sub"], "cannot be written"),
    ):
        assert word in refused("evaluate.py", *flags, cwd=tmp_path, code=1)
        assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_says_in_a_line_that_inception_is_missing(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    flags = ["--checkpoint", given["run"], "--metrics", "inception", "--inception_weights", "w.pth"]
    line = refused("evaluate.py", *flags, cwd=tmp_path, code=1)
    assert "pip install torch-fidelity" in line
    assert not list(tmp_path.iterdir())


def test_profile_says_where_the_time_goes_and_writes_nothing(tmp_path):
    out = run("train.py", *TINY, "--profile", cwd=tmp_path)
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
    assert rows[""][-1] == "all"
    assert {"batch", "forward", "backward", "optimiser"} <= set(rows[""])
    shares = {name: [float(c.rstrip("%")) for c in cells] for name, cells in rows.items()
              if cells and all(c.endswith("%") for c in cells)}  # fmt: skip
    assert sum(cells[-1] for name, cells in shares.items() if name != "all") == pytest.approx(
        100, abs=1
    )
    assert shares["all"][-1] == 100
    assert shares["convolutions"][rows[""].index("forward")] > 0
    assert not list(tmp_path.iterdir())


def test_precision_of_sampling_changes_little(tmp_path):
    images = []
    for precision in ("fp32", "bf16"):
        path = tmp_path / f"{precision}.npz"
        run("generate.py", "--checkpoint", DIGITS, "--num_samples", 20, "--precision", precision,
            "--out", path, cwd=tmp_path)  # fmt: skip
        with np.load(path) as npz:
            images.append(npz["images"].astype(float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 8  # of 255
