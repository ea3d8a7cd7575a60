"""generate.py from end to end: samples in every format, with every sampler, and every edit."""

import contextlib
import errno
import io
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import (
    DIGITS,
    SHORT,
    execute,
    read_arrays,
    refused,
    run,
)
from PIL import Image

import generate as generate_script
from ddp.data import load_dataset
from ddp.editing import EDITS
from ddp.io import cli
from ddp.io.checkpoint import load_model
from ddp.io.device import sampling_dtype
from ddp.io.figures import grid
from ddp.options import SamplerOptions
from ddp.sampling import SAMPLERS, THRESHOLDS, sample
from ddp.schedule import SPACINGS


def generate(*flags, cwd, name="a"):
    """Return the arrays of the .npz that generate.py writes with these flags."""
    run("generate.py", *flags, "--out", f"{name}.npz", cwd=cwd)
    return read_arrays(cwd / f"{name}.npz")


# ---- formats ----


def test_generate_writes_every_format(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--num_samples", 12, "--steps", 5]
    flags += ["--batch_size", 5, "--format", "png,grid,npz,gif", "--out", "s"]
    out = run("generate.py", *flags, cwd=tmp_path)
    folder = tmp_path / "s"
    assert f"  {folder.name}/000000.png" in out
    arrays = read_arrays(folder / "samples.npz")
    assert arrays["images"].shape == (12, 8, 8, 1)
    assert arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [*range(10), 0, 1]
    for i in range(12):
        image = np.asarray(Image.open(folder / f"{i:06d}.png"))
        assert (image == arrays["images"][i, ..., 0]).all()
    assert Image.open(folder / "process.gif").n_frames == 6
    assert Image.open(folder / "grid.png").width > 150
    assert "out" in refused("generate.py", *flags, cwd=tmp_path)  # it exists


def test_generate_shows_points_next_to_real_ones(trained, tmp_path):
    flags = ["--checkpoint", trained / "moons" / "best.pth", "--num_samples", 50, "--steps", 3]
    run("generate.py", *flags, "--format", "grid,gif", "--out", "s", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"grid.png", "process.gif"}
    assert Image.open(tmp_path / "s" / "grid.png").width > 700


def test_generate_writes_next_to_the_checkpoint_by_default(trained, tmp_path):
    shutil.copy(trained / "digits" / "model.pth", tmp_path / "m.pth")
    for _ in range(2):
        run("generate.py", "--checkpoint", "m.pth", "--steps", 1, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"m.pth", "m-samples", "m-samples-2"}


def test_generate_of_a_file_writes_that_file_only(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--num_samples", 2, "--steps", 2]
    for name in ("new/a.png", "new/a.npz", "new/a.gif"):
        run("generate.py", *flags, "--out", name, cwd=tmp_path)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a.png", "a.npz", "a.gif"}


def test_generate_of_a_run_takes_its_model_else_its_last_checkpoint(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "digits", folder)
    flags = ["--num_samples", 3, "--steps", 2]
    model = generate("--checkpoint", folder / "model.pth", *flags, cwd=tmp_path, name="a")
    of_run = generate("--checkpoint", folder, *flags, cwd=tmp_path, name="b")
    assert (of_run["images"] == model["images"]).all()
    (folder / "model.pth").unlink()
    generate("--checkpoint", folder, *flags, cwd=tmp_path, name="c")
    (folder / "last.pth").unlink()
    line = refused("generate.py", "--checkpoint", folder, *flags, cwd=tmp_path, code=1)
    assert str(folder) in line


def test_generate_says_how_many_of_the_samples_are_shown(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ddp.io.writer.GRID_IMAGES", 9)
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--steps", 1]
    out = run("generate.py", *flags, "--num_samples", 10, "--out", "a", cwd=tmp_path)
    assert "10 samples, of which the grid shows the first 9" in out
    out = run("generate.py", *flags, "--num_samples", 9, "--out", "b", cwd=tmp_path)
    assert "shows the first" not in out
    out = run("generate.py", *flags, "--num_samples", 10, "--out", "c.npz", cwd=tmp_path)
    assert "shows the first" not in out  # there is no grid


@pytest.mark.parametrize(
    ("count", "steps", "text"),
    [
        (1, 1, "1 sample by ddim in 1 step:"),
        (2, 2, "2 samples by ddim in 2 steps:"),
    ],
)
def test_generate_counts_in_words_that_fit(trained, tmp_path, count, steps, text):
    flags = ["--num_samples", count, "--steps", steps, "--sampler", "ddim", "--out", "a.png"]
    path = trained / "moons" / "model.pth"
    assert text in run("generate.py", "--checkpoint", path, *flags, cwd=tmp_path)


def test_points_are_shown_alone_where_their_data_may_not_be_loaded(trained, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("set dataset")

    monkeypatch.setattr("ddp.io.sample_batches.data_source", refuse)
    flags = ["--checkpoint", trained / "moons" / "model.pth", "--steps", 2, "--out", "a.png"]
    assert "without the data (set dataset)" in run("generate.py", *flags, cwd=tmp_path)
    assert Image.open(tmp_path / "a.png").width < 500  # one panel


class Broken(io.StringIO):
    """A stdout that shows nothing: it raises at every print."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(),
        OSError(errno.ENOSPC, "No space left on device"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"),
    ],
)
def test_samples_are_there_whatever_becomes_of_stdout(trained, tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    arguments = ["--num_samples", "2", "--steps", "1", "--out", "é.npz"]
    arguments += ["--checkpoint", str(trained / "moons" / "model.pth")]
    with contextlib.redirect_stdout(Broken(error)), contextlib.redirect_stderr(Broken(error)):
        assert cli.command(generate_script.main, generate_script.parse, arguments) == 0
    assert read_arrays(tmp_path / "é.npz")["points"].shape == (2, 2)


def test_two_at_once_lose_nothing(trained, tmp_path, monkeypatch):
    """The second comes and goes while the first draws; each tells the name of its own file."""
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--steps", 1, "--num_samples", 2]
    flags += ["--out", "a.npz", "--seed"]

    def sample_later(*arguments, **options):
        monkeypatch.undo()
        assert "a.npz" in run("generate.py", *flags, 1, cwd=tmp_path)
        return sample(*arguments, **options)

    monkeypatch.setattr("ddp.editing.sample", sample_later)
    assert "a-2.npz" in run("generate.py", *flags, 0, cwd=tmp_path)
    first, second = (read_arrays(tmp_path / name)["images"] for name in ("a-2.npz", "a.npz"))
    assert (first != second).any()


def test_the_library_draws_what_the_script_draws(trained, tmp_path):
    path = trained / "moons" / "model.pth"
    points = generate("--checkpoint", path, "--num_samples", 3, cwd=tmp_path)["points"]
    model, config, _ = load_model(path)
    model = model.for_inference(sampling_dtype(None, config.precision, model.device))
    x0 = sample(model, torch.arange(3))
    np.testing.assert_allclose(points, x0.numpy(), rtol=1e-6)
    options = SamplerOptions().resolve(model)
    np.testing.assert_array_equal(sample(model, torch.arange(3), **options), x0)


# ---- a sample is a function of (seed, i) ----


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "ddim --eta 0.5"])
def test_sample_does_not_depend_on_its_batch(trained, tmp_path, sampler):
    flags = ["--checkpoint", trained / "moons" / "last.pth", "--steps", 6]
    flags += ["--sampler", *sampler.split()]
    a = generate(*flags, "--num_samples", 9, cwd=tmp_path)["points"]
    flags += ["--num_samples", 8, "--batch_size", 3]
    b = generate(*flags, cwd=tmp_path, name="b")["points"]
    assert a.shape == (9, 2)
    assert a.dtype == np.float32
    np.testing.assert_allclose(a[:8], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        "--image {array}",
        "--inpaint {array} --mask {mask}",
        "--mc_dropout 3",
        "--interpolate {array}",
        "--interpolate {array} --label 0,1,2",
        "--reconstruct {array} --label 0,1,2,3",
        "--sampler heun --s_churn 8",
    ],
)
def test_edited_sample_does_not_depend_on_its_batch(files, tmp_path, line):
    flags = ["--checkpoint", files["run"], *line.format(**files).split(), "--steps", 4]
    flags += ["--num_samples", 7]
    a = generate(*flags, "--batch_size", 7, cwd=tmp_path)
    b = generate(*flags, "--batch_size", 2, cwd=tmp_path, name="b")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name].astype(float), b[name].astype(float), atol=1.01)


def test_seed_decides_the_samples(trained, tmp_path):
    flags = ["--checkpoint", trained / "moons" / "model.pth", "--num_samples", 5, "--steps", 3]
    a = generate(*flags, "--seed", 7, cwd=tmp_path, name="a")["points"]
    b = generate(*flags, "--seed", 7, cwd=tmp_path, name="b")["points"]
    c = generate(*flags, "--seed", 8, cwd=tmp_path, name="c")["points"]
    assert (a == b).all()
    assert (a != c).all()


def test_labels_are_chosen_by_number_or_name(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--num_samples", 4, "--steps", 2]
    arrays = generate(*flags, "--label", "3,5", cwd=tmp_path)
    assert arrays["labels"].tolist() == [3, 5, 3, 5]
    assert "label" in refused("generate.py", *flags, "--label", "11", cwd=tmp_path)


def test_without_a_number_every_class_has_as_many_samples(trained, tmp_path):
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--steps", 1]
    assert generate(*flags, cwd=tmp_path)["labels"].tolist() == [*range(10)] * 6
    assert generate(*flags, "--label", 3, cwd=tmp_path, name="b")["labels"].tolist() == [3] * 64


def test_precision_of_sampling_changes_little(tmp_path):
    images = []
    for precision in ("fp32", "bf16"):
        flags = ["--checkpoint", DIGITS, "--num_samples", 20, "--precision", precision]
        arrays = generate(*flags, cwd=tmp_path, name=precision)
        images.append(arrays["images"].astype(float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 8  # of 255


# ---- every option ----

# Every option is used by a line below or by another test of this file. Names in braces are files:
# {run} is the class-conditional digits model, {array} three digits, {mask} their lower half.
SAMPLING_LINES = [
    *(f"--sampler {name} --steps 3" for name in SAMPLERS),
    *(f"--spacing {name} --steps 3 --sampler heun --s_churn 2" for name in SPACINGS),
    *(f"--threshold {name} --weights raw --device cpu --seed 3 --steps 2" for name in THRESHOLDS),
    "--eta 0.3 --steps 3 --batch_size 2 --label 3 --threads 1",
    "--cfg_scale 2 --guidance_interval -3 4 --guidance_rescale 0.5 --threshold dynamic --steps 4",
    "--cfg_scale 1.5 --guide_checkpoint {run} --steps 3 --precision bf16",
]
EDIT_LINES = [
    "--image {array} --strength 0.7 --label 2",
    "--inpaint {array} --mask {mask} --jump_length 2 --jump_n_sample 2 --steps 6",
    "--reconstruct {array} --steps 4",
    "--interpolate --steps 3",
    "--interpolate {array} --steps 3",
    "--mc_dropout 2 --steps 3",
]


@pytest.mark.parametrize("line", SAMPLING_LINES + EDIT_LINES)
def test_generate_with_every_option(files, tmp_path, line):
    flags = ["--checkpoint", files["run"], *line.format(**files).split()]
    count = 5
    if "{array}" in line:
        count = 16 if "--interpolate" in line else 3  # 8 from each digit to the next
    else:
        flags += ["--num_samples", count]
    run("generate.py", *flags, "--format", "npz,grid", "--out", "s", cwd=tmp_path)
    arrays = read_arrays(tmp_path / "s" / "samples.npz")
    assert arrays["images"].shape == (count, 8, 8, 1)
    assert ("std" in arrays) == ("--mc_dropout" in line)
    if "--mc_dropout" in line:
        assert (arrays["std"] > 0).any()
    assert Image.open(tmp_path / "s" / "grid.png").width > 100


def test_every_generate_option_is_used_by_a_test():
    elsewhere = {"--checkpoint", "--num_samples", "--format", "--out", "--latents"}
    elsewhere |= {"--plugin"}  # by test_registries.py
    text = execute("generate.py", "--help", cwd=ROOT).out
    options = {"--" + name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", text)}
    words = set(" ".join(SAMPLING_LINES + EDIT_LINES).split())
    assert len(options) > 25
    assert options - {"--help"} - words == elsewhere
    assert {f"--{name}" for name in EDITS} < options


# ---- edits ----


def test_inpaint_keeps_what_is_not_masked(files, tmp_path):
    flags = ["--checkpoint", files["run"], "--inpaint", files["array"], "--mask", files["mask"]]
    images = generate(*flags, "--steps", 6, cwd=tmp_path)["images"][..., 0]  # (3, 8, 8)
    given = np.load(files["array"])
    assert (images[:, :4] == given[:, :4]).all()
    assert (images[:, 4:] != given[:, 4:]).any()


@pytest.mark.parametrize("line", ["--image {array}", "--inpaint {array} --mask {mask}"])
def test_animation_of_an_edit_ends_in_its_samples(files, tmp_path, line):
    flags = ["--checkpoint", files["run"], *line.format(**files).split(), "--steps", 6]
    run("generate.py", *flags, "--format", "gif,grid,npz", "--out", "s", cwd=tmp_path)
    images = read_arrays(tmp_path / "s" / "samples.npz")["images"]
    with Image.open(tmp_path / "s" / "process.gif") as animation:
        assert animation.n_frames > 1
        assert_frame(animation, -1, images)


def assert_frame(animation, number, images):
    """Require that a frame of an animation shows images (N, H, W, C)."""
    animation.seek(number % animation.n_frames)
    frame = np.asarray(animation.convert("RGB")).astype(float)
    expected = np.asarray(grid(images.transpose(0, 3, 1, 2))).astype(float)  # (H, W, 3)
    assert frame.shape == expected.shape
    assert np.abs(frame - expected).mean() < 4  # a .gif has 256 colors


@pytest.mark.parametrize("line", ["--interpolate {array}", "--interpolate --num_samples 16"])
def test_animation_of_an_interpolation_goes_from_one_end_to_the_other(files, tmp_path, line):
    """It shows the way between, not how each of the samples comes out of noise."""
    flags = ["--checkpoint", files["run"], *line.format(**files).split(), "--steps", 3]
    run("generate.py", *flags, "--format", "gif,npz", "--out", "s", cwd=tmp_path)
    images = read_arrays(tmp_path / "s" / "samples.npz")["images"]  # (16, 8, 8, 1)
    with Image.open(tmp_path / "s" / "process.gif") as animation:
        assert animation.n_frames == 8
        for k in (0, 3, 7):
            assert_frame(animation, k, images[k::8])


def test_latents_of_a_reconstruction_give_it_back(files, tmp_path):
    flags = ["--checkpoint", DIGITS, "--steps", 30]
    reconstruct = ["--reconstruct", files["array"], "--format", "npz", "--out", "r"]
    out = run("generate.py", *flags, *reconstruct, cwd=tmp_path)
    assert "root mean square error" in out
    a = read_arrays(tmp_path / "r" / "samples.npz")
    assert a["latents"].shape == (3, 1, 8, 8)
    b = generate(*flags, "--latents", "r/samples.npz", cwd=tmp_path)
    difference = a["images"].astype(float) - b["images"]
    assert np.abs(difference).mean() < 1
    error = a["images"][..., 0].astype(float) - np.load(files["array"])
    assert np.abs(error).mean() < 6


def test_latents_of_before_version_0_2_are_read(files, tmp_path):
    noise = np.random.RandomState(0).randn(2, 1, 8, 8).astype(np.float32)
    np.savez(tmp_path / "old.npz", images=np.zeros((2, 8, 8, 1), np.uint8), noise=noise)
    np.save(tmp_path / "new.npy", noise)
    flags = ["--checkpoint", files["run"], "--steps", 2]
    old = generate(*flags, "--latents", "old.npz", cwd=tmp_path, name="a")
    new = generate(*flags, "--latents", "new.npy", cwd=tmp_path, name="b")
    assert (old["images"] == new["images"]).all()


def test_latents_are_not_read_from_images(files, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    flags = ["--checkpoint", files["run"], "--latents"]
    assert "latents" in refused("generate.py", *flags, "a.npz", cwd=tmp_path, code=1)
    assert "npy" in refused("generate.py", *flags, "a.png", cwd=tmp_path)


def test_interpolation_goes_from_one_item_to_the_next(files, tmp_path):
    flags = ["--checkpoint", DIGITS, "--interpolate", files["array"], "--steps", 30]
    images = generate(*flags, cwd=tmp_path)["images"][..., 0].astype(float)  # (16, 8, 8)
    given = np.load(files["array"]).astype(float)
    for frame, item in ((0, 0), (7, 1), (8, 1), (15, 2)):
        assert np.abs(images[frame] - given[item]).mean() < 6


def test_strength_of_sdedit_says_how_much_changes(files, tmp_path):
    given = np.load(files["array"]).astype(float)
    changes = []
    for strength in (0.05, 1):
        flags = ["--checkpoint", DIGITS, "--image", files["array"], "--strength", strength]
        arrays = generate(*flags, cwd=tmp_path, name=f"s{strength}")
        changes.append(np.abs(arrays["images"][..., 0] - given).mean())
    assert changes[0] < 15
    assert changes[1] > 2 * changes[0]


def test_default_strength_changes_a_digit_and_mostly_not_into_another(shared_data, tmp_path):
    """By MNIST: more than a third of the way to another item, in four of five the same digit."""
    dataset = load_dataset("mnist", shared_data / "mnist")
    given = dataset.test[:20]
    np.save(tmp_path / "a.npy", given[:, 0].numpy())
    checkpoint = ROOT / "checkpoints" / "mnist.pth"
    images = generate("--checkpoint", checkpoint, "--image", "a.npy", cwd=tmp_path)["images"]
    made = torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1).float()
    given = given.flatten(1).float()
    change = (made - given).square().mean().sqrt()
    between = (given[1:] - given[:-1]).square().mean().sqrt()  # one item and another
    assert 0.33 < change / between < 0.6
    train = dataset.train[:5000].flatten(1).float()
    nearest = dataset.train_labels[torch.cdist(made, train).argmin(dim=1)]
    assert (nearest == dataset.test_labels[:20]).float().mean() >= 0.8


def test_items_to_edit_come_from_images_and_arrays(files, tmp_path):
    """The same edit whether the digits are in an .npy, an .npz, a folder or a .zip."""
    pixels = np.load(files["array"])  # (3, 8, 8) uint8
    np.save(tmp_path / "gray.npy", pixels)
    np.save(tmp_path / "channels.npy", pixels[..., None])
    np.savez(tmp_path / "several.npz", labels=np.arange(3), images=pixels[..., None])
    np.save(tmp_path / "float.npy", pixels[:, None] / 127.5 - 1)
    (tmp_path / "folder").mkdir()
    for i, item in enumerate(pixels):
        Image.fromarray(item).save(tmp_path / "folder" / f"{i}.png")
    shutil.make_archive(tmp_path / "zip", "zip", tmp_path / "folder")
    results = []
    names = ("gray.npy", "channels.npy", "several.npz", "float.npy", "folder", "zip.zip")
    for i, name in enumerate(names):
        flags = ["--checkpoint", files["run"], "--image", name, "--steps", 2]
        results.append(generate(*flags, cwd=tmp_path, name=f"out{i}")["images"])
    assert results[0].shape == (3, 8, 8, 1)
    for images in results[1:]:
        assert (images == results[0]).all()
    one = ["--checkpoint", files["run"], "--image", "folder/1.png", "--steps", 2]
    assert generate(*one, cwd=tmp_path)["images"].shape == (1, 8, 8, 1)


def test_mask_comes_from_an_image_or_an_array(files, tmp_path):
    mask = np.load(files["mask"])  # (8, 8) bool
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.png")
    np.save(tmp_path / "numbers.npy", mask.astype(float))
    np.save(tmp_path / "each.npy", np.stack([mask] * 3))
    results = []
    for i, path in enumerate((files["mask"], "m.png", "numbers.npy", "each.npy")):
        flags = ["--checkpoint", files["run"], "--inpaint", files["array"], "--mask", path]
        results.append(generate(*flags, "--steps", 3, cwd=tmp_path, name=f"out{i}")["images"])
    for images in results[1:]:
        assert (images == results[0]).all()


@pytest.mark.parametrize(
    "mask", [np.zeros((8, 8)), np.ones((8, 8)), np.eye(5, 8), np.ones((1, 2, 8, 8))]
)
def test_mask_that_does_not_fit_is_refused(files, tmp_path, mask):
    np.save(tmp_path / "w.npy", mask)
    flags = ["--checkpoint", files["run"], "--inpaint", files["array"], "--mask", "w.npy"]
    assert "mask" in refused("generate.py", *flags, cwd=tmp_path)


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((3, 8, 9), np.uint8), 2),
        (np.zeros((3, 9, 8, 1)), 2),
        (np.full((3, 1, 8, 8), np.nan), 2),
        (np.zeros((0, 8, 8), np.uint8), 2),
        (np.full((3, 8, 8, 1), 200.0), 2),
        (np.full((3, 1, 8, 8), 200.0), 2),
        (np.array(["a"]), 1),
        (np.array([{}], dtype=object), 1),
    ],
)
def test_array_that_does_not_fit_is_refused(files, tmp_path, array, code):
    np.save(tmp_path / "w.npy", array)
    flags = ["--checkpoint", files["run"], "--image", "w.npy", "--out", "s"]
    assert "w.npy" in refused("generate.py", *flags, cwd=tmp_path, code=code)
    assert [path.name for path in tmp_path.iterdir()] == ["w.npy"]


def test_points_are_edited_too(trained, tmp_path):
    """The moons' first coordinate is kept, and the second filled in."""
    points = np.array([[0.5, 0.0], [-0.5, 0.0]], np.float32)
    np.save(tmp_path / "p.npy", points)
    np.save(tmp_path / "m.npy", [0, 1])
    flags = ["--inpaint", "p.npy", "--mask", "m.npy", "--num_samples", 6, "--steps", 5]
    flags += ["--checkpoint", trained / "moons" / "model.pth"]
    made = generate(*flags, cwd=tmp_path)["points"]
    np.testing.assert_array_equal(made[:, 0], np.tile(points[:, 0], 3))
    assert len(np.unique(made[:, 1])) == 6
    np.save(tmp_path / "wrong.npy", np.eye(5)[0])
    flags[3] = "wrong.npy"
    assert "mask" in refused("generate.py", *flags, cwd=tmp_path)


# ---- what is refused ----

# of the moons model, which has no labels, no dropout and no pixels
REFUSED = [
    ("--num_samples 0", "num_samples"),
    ("--steps 0", "steps"),
    ("--steps 1001", "steps"),
    ("--eta 0.5 --sampler dpmpp_2m", "eta"),
    ("--eta 2", "eta"),
    ("--seed 4294967296", "seed"),
    ("--seed -1", "seed"),
    ("--out x.jpg", "out"),
    ("--label 3", "label"),
    ("--format bmp", "format"),
    ("--format npz --out x.png", "out"),
    ("--batch_size 0", "batch_size"),
    ("--device tpu", "device"),
    ("--device foo", "device"),
    ("--device =", "device"),
    ("--out x.tiff", "out"),
    ("--out =", "out"),
    (f"--num_samples {10**400}", "num_samples"),
    ("--sampler magic", "sampler"),
    ("--eta 0.5 --sampler unipc", "eta"),
    ("--s_churn 3", "s_churn"),
    ("--s_churn -1 --sampler heun", "s_churn"),
    ("--threshold dynamic", "threshold"),
    ("--spacing leading", "spacing"),
    ("--cfg_scale 2", "cfg_scale"),
    ("--cfg_scale nan", "cfg_scale"),
    ("--guidance_rescale 0.5", "cfg_scale"),
    ("--guidance_interval -1 1", "cfg_scale"),
    ("--guide_checkpoint x.pth", "cfg_scale"),
    ("--guide_checkpoint = --cfg_scale 2", "guide_checkpoint"),
    ("--strength 0.5", "strength"),
    ("--image x.npy --strength 0", "strength"),
    ("--image x.npy --strength 1.5", "strength"),
    ("--image x.npy --reconstruct x.npy", "reconstruct"),
    ("--image x.npy --mc_dropout 3", "mc_dropout"),
    ("--mask x.npy", "mask"),
    ("--inpaint x.npy", "mask"),
    ("--jump_n_sample 2", "jump_n_sample"),
    ("--inpaint x.npy --mask x.npy --jump_length 0", "jump_length"),
    ("--reconstruct x.npy --sampler ddpm", "reconstruct"),
    ("--reconstruct x.npy --sampler heun", "sampler"),
    ("--reconstruct x.npy --eta 1", "eta"),
    ("--reconstruct x.npy --s_churn 2 --sampler ddim", "s_churn"),
    ("--interpolate --sampler ddpm", "interpolate"),
    ("--mc_dropout 1", "mc_dropout"),
    ("--mc_dropout 4", "mc_dropout"),
    ("--mc_dropout 4 --format gif", "mc_dropout"),
    ("--mc_dropout 3 --out x.gif", "mc_dropout"),
    ("--image x.png", "x.png"),
    ("--image =", "image"),
    ("--inpaint = --mask x.npy", "inpaint"),
    ("--inpaint x.npy --mask =", "mask"),
    ("--reconstruct =", "reconstruct"),
    ("--latents =", "latents"),
    ("--unknown 1", "unknown"),
]


@pytest.mark.parametrize(("flags", "name"), REFUSED)
def test_generate_refuses_a_wrong_flag_before_any_work(trained, tmp_path, flags, name):
    arguments = ["" if flag == "=" else flag for flag in flags.split()]
    path = trained / "moons" / "model.pth"
    result = execute("generate.py", "--checkpoint", path, *arguments, cwd=tmp_path)
    assert result.code == 2, result.out + result.err
    assert re.search(rf"\b{re.escape(name)}\b", result.error_line)
    assert len(result.err.strip().splitlines()) <= 2  # the usage is one line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def without_null_label(tmp_path_factory):
    """A model that was never trained without a label."""
    folder = tmp_path_factory.mktemp("label")
    run("train.py", *SHORT, "--class_cond", "--label_dropout", 0, cwd=folder)
    return folder / "checkpoints" / "digits" / "model.pth"


@pytest.mark.parametrize(
    ("model", "flags", "name", "code"),
    [
        ("run", "--cfg_scale 2 --guide_checkpoint {moons}", "guide_checkpoint", 2),
        ("bare", "--cfg_scale 2", "cfg_scale", 2),
        ("bare", "--image {array}", "label", 2),
        ("run", "--inpaint {array} --mask masks.npy", "mask", 2),
        ("run", "--inpaint {array} --mask {mask} --jump_length 30 --steps 20", "jump_length", 2),
        ("run", "--reconstruct {moons}", "model.pth", 1),
        ("run", "--interpolate {array} --steps 2000", "steps", 2),
        ("run", "--cfg_scale 2 --guidance_interval 3 -3", "guidance_interval", 2),
        ("run", "--interpolate one.npy", "interpolate", 2),
        ("run", "--cfg_scale 2 --guide_checkpoint none.pth", "none.pth", 1),
        ("run", "--image none.npy", "none.npy", 1),
    ],
)
def test_generate_refuses_what_does_not_fit_together(
    files, trained, without_null_label, tmp_path, model, flags, name, code
):
    np.save(tmp_path / "masks.npy", np.eye(8)[None].repeat(2, axis=0))  # for three digits
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    path = {"run": files["run"], "bare": without_null_label}[model]
    places = {**files, "moons": trained / "moons" / "model.pth"}
    flags = ["--checkpoint", path, "--out", "new/deep/s", *flags.format(**places).split()]
    line = refused("generate.py", *flags, cwd=tmp_path, code=code)
    assert re.search(rf"\b{re.escape(name)}\b", line)
    assert not (tmp_path / "new").exists()


def test_schedule_of_one_level_cannot_be_inverted(files, tmp_path):
    run("train.py", *SHORT, "--timesteps", 1, cwd=tmp_path)
    path = tmp_path / "checkpoints" / "digits" / "last.pth"
    flags = ["--checkpoint", path, "--reconstruct", files["array"], "--out", "s"]
    assert "steps" in refused("generate.py", *flags, cwd=tmp_path)
    assert not (tmp_path / "s").exists()


def test_samples_that_become_infinite_are_not_written(files, tmp_path):
    np.save(tmp_path / "huge.npy", np.full((4, 1, 8, 8), 3.4e38))
    flags = ["--checkpoint", files["run"], "--latents", "huge.npy", "--out", "a.npz"]
    assert "infinite" in refused("generate.py", *flags, cwd=tmp_path, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["huge.npy"]


# ---- signals ----


MANY = ["--num_samples", 10**6, "--batch_size", 20, "--format", "png", "--out", "s"]


def test_interrupted_generate_leaves_nothing(trained, tmp_path, monkeypatch):
    def sample_and_interrupt(model, indices, *arguments, **options):
        if indices[0] == 20:  # the second batch
            assert list(tmp_path.glob(".s.*/*.png"))  # the first is written, out of sight
            signal.raise_signal(signal.SIGINT)
        return sample(model, indices, *arguments, **options)

    monkeypatch.setattr("ddp.editing.sample", sample_and_interrupt)
    flags = ["--checkpoint", trained / "digits" / "model.pth", "--steps", 2, *MANY]
    assert "stopped" in refused("generate.py", *flags, cwd=tmp_path, code=130)
    assert not list(tmp_path.iterdir())


def test_terminated_generate_leaves_nothing(trained, tmp_path):
    """As a program, which SIGTERM would end without tidying up."""
    flags = ["--checkpoint", trained / "digits" / "model.pth", *MANY]
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", *map(str, flags)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(tmp_path.glob(".s.*/*.png")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


# ---- the shipped digits ----


def test_samples_of_the_shipped_digits_are_as_near_to_digits_as_new_ones_are(tmp_path):
    images = generate("--checkpoint", DIGITS, "--num_samples", 50, cwd=tmp_path)["images"]
    dataset = load_dataset("digits")
    train = dataset.train.flatten(1).float()
    samples = torch.from_numpy(images).flatten(1).float()
    heldout = dataset.test[:50].flatten(1).float()
    distance = torch.cdist(samples, train).amin(dim=1).mean()
    usual = torch.cdist(heldout, train).amin(dim=1).mean()
    assert 0.3 * usual < distance < 1.5 * usual
