"""One plugin that adds one of everything: a function and a line in a registry, and no more."""

import contextlib
import json
import types

import numpy as np
import pytest
import torch
from helpers import execute, read_arrays, refused, run

from ddp.augment import AUGMENTATIONS
from ddp.blocks import ACTIVATIONS, NORMS
from ddp.data import DATASETS
from ddp.editing import EDITS
from ddp.io.checkpoint import read_checkpoint
from ddp.loss import LOSSES, WEIGHTINGS
from ddp.metrics.distances import DISTANCES
from ddp.metrics.evaluate import METRICS
from ddp.metrics.features import FEATURES
from ddp.model import PREDICTIONS
from ddp.noise_dist import NOISE_DISTS
from ddp.presets import PRESETS
from ddp.reverse import NETWORKS
from ddp.sampling import SAMPLERS, THRESHOLDS
from ddp.schedule import SCHEDULES, SPACINGS
from ddp.training import LR_SCHEDULES

REGISTRIES = {
    "schedule": SCHEDULES,
    "spacing": SPACINGS,
    "noise_dist": NOISE_DISTS,
    "prediction": PREDICTIONS,
    "weighting": WEIGHTINGS,
    "loss": LOSSES,
    "network": NETWORKS,
    "augment": AUGMENTATIONS,
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "lr_schedule": LR_SCHEDULES,
    "sampler": SAMPLERS,
    "threshold": THRESHOLDS,
    "dataset": DATASETS,
    "preset": PRESETS,
    "edit": EDITS,
    "metric": METRICS,
    "distance": DISTANCES,
    "space": FEATURES,
}

# Each thing is called own_<kind>, and notes in a file that it was used.
PLUGIN = '''
"""One of everything."""

import os
from pathlib import Path

import torch
from torch import nn

from ddp.augment import AUGMENTATIONS, Augmentation
from ddp.presets import PRESETS
from ddp.data import DATASETS, Dataset
from ddp.editing import EDITS, Edit
from ddp.loss import LOSSES, WEIGHTINGS
from ddp.metrics.distances import DISTANCES, Distance, Measure
from ddp.metrics.evaluate import METRICS, Metric
from ddp.metrics.features import FEATURES, Extractor, Space
from ddp.metrics.uncertainty import Estimate
from ddp.model import PREDICTIONS
from ddp.noise_dist import NOISE_DISTS, NoiseDist
from ddp.blocks import ACTIVATIONS, NORMS
from ddp.reverse import NETWORKS
from ddp.sampling import SAMPLERS, THRESHOLDS, Sampler, ddim
from ddp.schedule import SCHEDULES, SPACINGS, ScheduleEntry
from ddp.training import LR_SCHEDULES


def used(kind):
    (Path(os.environ["OWN_USED"]) / kind).touch()


def own_schedule(t):
    used("schedule")
    return 8 - 16 * t


def own_spacing(schedule, steps):
    used("spacing")
    t = torch.linspace(1, 0.1, steps, dtype=torch.float64) ** 2
    return schedule.log_snr(t)


def own_noise_dist(schedule, u, per_log_snr=False):
    used("noise_dist")
    return schedule.log_snr(u.double().sqrt()).float(), torch.ones(len(u))


def own_prediction(alpha, sigma):
    used("prediction")
    return alpha, sigma


def own_weighting(log_snr):
    used("weighting")
    return (log_snr / 2).exp()


def own_loss(residual):
    used("loss")
    return residual**4


class OwnNetwork(nn.Module):
    def __init__(self, event, num_classes, channels_base=8, norm="batch",
                 activation="leaky_relu", negative_slope=0.01, **_):
        super().__init__()
        used("network")
        self.layers = nn.Sequential(
            nn.Conv2d(event[0] + 1, channels_base, 3, padding=1),
            NORMS[norm](channels_base, 2),
            ACTIVATIONS[activation](negative_slope),
            nn.Dropout(0.1),
            nn.Conv2d(channels_base, event[0], 3, padding=1),
        )

    def forward(self, x_t, log_snr, label=None):
        level = log_snr.reshape(-1, 1, 1, 1).expand(len(x_t), 1, *x_t.shape[2:]) / 10
        return self.layers(torch.cat([x_t, level], dim=1))


def own_augment(x0, seed, k, positions):
    used("augment")
    return x0.transpose(2, 3), None


def own_norm(channels, dims):
    used("norm")
    return nn.GroupNorm(1, channels)


def own_activation(negative_slope):
    used("activation")
    return nn.Tanh()


def own_lr_schedule(progress):
    used("lr_schedule")
    return 1 - progress**2


def own_sampler(x0_hat, x_t, log_snr_t, log_snr_s, **context):
    used("sampler")
    return ddim(x0_hat, x_t, log_snr_t, log_snr_s)


def own_threshold(x0_hat):
    used("threshold")
    return torch.tanh(x0_hat)


def own_dataset(data_dir, seed, progress):
    used("dataset")
    stripes = 255 * (torch.arange(6) % 2).byte().expand(6, 6)
    items = torch.stack([stripes, stripes.T]).repeat(60, 1, 1)[:, None]  # (120, 1, 6, 6)
    return Dataset("own_dataset", items[:80].clone(), items[80:].clone())


def own_edit(inputs, indices, label):
    used("edit")
    return {"x_t": -inputs.take(inputs.items, indices)}


def own_metric(candidate, reference, options):
    used("metric")
    ink = candidate.samples.flatten(1).double().mean(dim=1)
    return {"all channels": {"ink": Estimate.mean(ink)}}


def own_distance(a, b):
    used("distance")
    return (a.mean(dim=0) - b.mean(dim=0)).abs().sum().item()


def own_space(dataset, **_):
    used("space")
    return Extractor(lambda items: items.double().mean(dim=(1, 2)))


SCHEDULES["own_schedule"] = ScheduleEntry(own_schedule)
SPACINGS["own_spacing"] = own_spacing
NOISE_DISTS["own_noise_dist"] = NoiseDist(own_noise_dist, over_t=False)
PREDICTIONS["own_prediction"] = own_prediction
WEIGHTINGS["own_weighting"] = own_weighting
LOSSES["own_loss"] = own_loss
NETWORKS["own_network"] = OwnNetwork
AUGMENTATIONS["own_augment"] = Augmentation(own_augment)
NORMS["own_norm"] = own_norm
ACTIVATIONS["own_activation"] = own_activation
LR_SCHEDULES["own_lr_schedule"] = own_lr_schedule
SAMPLERS["own_sampler"] = Sampler(own_sampler, steps=3, spacing="own_spacing")
THRESHOLDS["own_threshold"] = own_threshold
DATASETS["own_dataset"] = own_dataset
PRESETS["own_dataset"] = PRESETS["images"] | {"channels_base": 9, "network": "own_network"}
EDITS["own_edit"] = Edit(own_edit, "turn the colors of this around", title="turned")
METRICS["own_metric"] = Metric(own_metric, title="how much ink")
DISTANCES["own_distance"] = Distance(own_distance, {"own_distance": Measure()})
FEATURES["own_space"] = Space(own_space, "image")
'''
TRAIN = (
    "--dataset own_dataset --batch_size 8 --max_steps 3 --save_every 3 --schedule own_schedule "
    "--noise_dist own_noise_dist --prediction own_prediction --weighting own_weighting "
    "--loss own_loss --norm own_norm --activation own_activation --lr_schedule own_lr_schedule "
    "--augment own_augment"
)


@contextlib.contextmanager
def registries_restored():
    """Take out of the registries what a plugin adds to them."""
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    try:
        yield
    finally:
        for kind, registry in REGISTRIES.items():
            registry.clear()
            registry.update(before[kind])


@pytest.fixture(autouse=True)
def restore_registries():
    with registries_restored():
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The plugin, and a model that was trained with it."""
    folder = tmp_path_factory.mktemp("own")
    plugin = folder / "own.py"
    plugin.write_text(PLUGIN)
    used = folder / "used"
    used.mkdir()
    with registries_restored(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_USED", str(used))
        text = run("train.py", "--plugin", plugin, *TRAIN.split(), cwd=folder)
    return types.SimpleNamespace(
        plugin=plugin,
        used={path.name for path in used.iterdir()},
        text=text,
        checkpoint=folder / "checkpoints" / "own_dataset" / "last.pth",
    )


@pytest.fixture
def used(tmp_path, monkeypatch):
    """Return a function that says which kinds of thing were used since."""
    folder = tmp_path / "used"
    folder.mkdir()
    monkeypatch.setenv("OWN_USED", str(folder))
    return lambda: {path.name for path in folder.iterdir()}


def test_train_uses_what_a_plugin_adds(own):
    assert own.used == {
        *("dataset", "schedule", "noise_dist", "prediction", "weighting", "loss", "network"),
        *("augment", "norm", "activation", "lr_schedule"),
    }
    assert "80 train and 40 test items" in own.text
    config = read_checkpoint(own.checkpoint)["config"]
    for name in ("schedule", "noise_dist", "prediction", "weighting", "loss", "network", "norm"):
        assert config[name] == f"own_{name}"
    assert config["channels_base"] == 9  # the preset's
    assert config["patch_size"] == 2  # and what it took over


def test_resume_needs_the_plugin_and_goes_on_with_it(own, tmp_path, used):
    flags = ["--resume", own.checkpoint, "--out_dir", "o", "--max_steps", 5]
    line = refused("train.py", *flags, cwd=tmp_path, code=1)
    assert "plugin=FILE" in line
    run("train.py", *flags, "--plugin", own.plugin, cwd=tmp_path)
    assert read_checkpoint(tmp_path / "o" / "own_dataset" / "last.pth")["step"] == 5


def test_generate_uses_what_a_plugin_adds(own, tmp_path, used):
    flags = ["--plugin", own.plugin, "--checkpoint", own.checkpoint, "--num_samples", 4]
    flags += ["--sampler", "own_sampler", "--threshold", "own_threshold", "--out", "a.npz"]
    text = run("generate.py", *flags, cwd=tmp_path)
    assert "own_sampler in 3 steps" in text  # its own default
    assert read_arrays(tmp_path / "a.npz")["images"].shape == (4, 6, 6, 1)
    assert {"sampler", "spacing", "threshold", "prediction", "network", "schedule"} <= used()


def test_generate_edits_as_a_plugin_says(own, tmp_path, used):
    np.save(tmp_path / "x.npy", np.zeros((2, 6, 6), np.uint8))
    flags = ["--plugin", own.plugin, "--checkpoint", own.checkpoint, "--own_edit", "x.npy"]
    run("generate.py", *flags, "--steps", 2, "--format", "grid,npz", "--out", "s", cwd=tmp_path)
    assert "edit" in used()
    assert read_arrays(tmp_path / "s" / "samples.npz")["images"].shape == (2, 6, 6, 1)
    assert (tmp_path / "s" / "grid.png").exists()


def test_generate_drops_activations_of_a_network_that_a_plugin_adds(own, tmp_path, used):
    flags = ["--plugin", own.plugin, "--checkpoint", own.checkpoint, "--num_samples", 4]
    run("generate.py", *flags, "--mc_dropout", 3, "--out", "a.npz", cwd=tmp_path)
    assert (read_arrays(tmp_path / "a.npz")["std"] > 0).any()


def test_evaluate_uses_what_a_plugin_adds(own, tmp_path, used):
    flags = ["--plugin", own.plugin, "--checkpoint", own.checkpoint, "--num_samples", 30]
    flags += ["--metrics", "own_metric,own_space", "--sampler", "own_sampler"]
    text = run("evaluate.py", *flags, "--out", "e", cwd=tmp_path)
    assert {"metric", "distance", "space", "sampler", "spacing", "dataset"} <= used()
    evaluation = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    (subject,) = evaluation["subjects"]
    assert subject["own_metric"]["all channels"]["ink"]["value"] > 0
    distance = subject["own_space"]["own_distance"]
    assert distance["samples"]["value"] > distance["real_vs_real"]["value"]
    assert "fd" in subject["own_space"]  # like any space of images
    assert subject["about"]["sampler"] == "own_sampler"
    for word in ("how much ink", "own_space", "own_distance"):
        assert word in text
        assert word in (tmp_path / "e" / "evaluation.html").read_text()


def test_evaluate_measures_what_a_plugin_adds_by_default(own, tmp_path, used):
    np.save(tmp_path / "s.npy", np.arange(30 * 36, dtype=np.uint8).reshape(30, 6, 6))
    flags = ["--samples", "s.npy", "--dataset", "own_dataset", "--out", "e"]
    text = run("evaluate.py", "--plugin", own.plugin, *flags, cwd=tmp_path)
    assert "how much ink" in text
    assert "feature space: own_space" in text


@pytest.mark.parametrize("flags", ["", "--num_samples 2"])
def test_checkpoint_with_a_network_of_a_plugin_fails_in_a_line_without_it(own, tmp_path, flags):
    for script in ("generate.py", "evaluate.py"):
        result = execute(script, "--checkpoint", own.checkpoint, *flags.split(), cwd=tmp_path)
        assert result.code == 1
        (line,) = result.err.splitlines()
        assert str(own.checkpoint) in line
        assert "plugin=FILE" in line


def test_checkpoint_with_a_schedule_of_a_plugin_fails_in_a_line_without_it(own, tmp_path):
    state = read_checkpoint(own.checkpoint)
    state["config"]["network"] = "unet"
    torch.save(state, tmp_path / "a.pth")
    result = execute("generate.py", "--checkpoint", "a.pth", cwd=tmp_path)
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert "own_" in line


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("train.py", "schedule noise_dist prediction weighting loss network norm activation"),
        ("generate.py", "sampler spacing threshold edit"),
        ("evaluate.py", "sampler spacing threshold metric space"),
    ],
)
def test_help_shows_what_a_plugin_adds(own, tmp_path, script, kinds, used):
    without = execute(script, "--help", cwd=tmp_path)
    with_plugin = execute(script, "--plugin", own.plugin, "--help", cwd=tmp_path)
    assert with_plugin.code == 0
    for kind in kinds.split():
        assert f"own_{kind}" in with_plugin.out
        assert f"own_{kind}" not in without.out


def test_unknown_dataset_is_told_those_that_a_plugin_adds(own, tmp_path, used):
    line = refused("train.py", "--plugin", own.plugin, "--dataset", "nowhere", cwd=tmp_path)
    assert "own_dataset" in line
