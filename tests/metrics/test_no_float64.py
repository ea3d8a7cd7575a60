"""Likelihoods and the classifier on a device without float64, such as Apple's MPS."""

import dataclasses

import pytest
import torch
from fake_mps import MPS, FakeMPS, OnMPS

from ddp.config import Config
from ddp.data import load_dataset, to_float
from ddp.metrics import features
from ddp.metrics.features import Classifier, train_classifier
from ddp.metrics.likelihood import loss_by_noise_level, ode_nll, vlb
from ddp.model import build_model

TINY = {"channels_base": 8, "blocks_per_level": 1}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_fake_device_is_one():
    with FakeMPS() as mps:
        x = mps.move(torch.ones(3))
        assert x.device == MPS
        assert (2 * x + 1).device == MPS
        assert x.cpu().device == torch.device("cpu")
        assert not isinstance(x.cpu().double(), OnMPS)
        assert torch.ones(2, device=MPS).device == MPS
        for wrong in (x.double, lambda: x.to(torch.float64), lambda: x.to("cpu", torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(3)


def tiny_model(dataset, schedule, num_classes=0):
    """A model of random weights, of which the last are not 0."""
    timesteps = 0 if schedule == "learned" else 1000
    config = Config(schedule=schedule, timesteps=timesteps, **TINY)
    model = build_model(config.resolve(dataset), dataset.event, num_classes)
    for weight in model.network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return model.eval().requires_grad_(False)


FUNCTIONS = {
    "vlb": lambda model, x0, i, label: vlb(model, x0, i, 0, 2, label),
    "vlb, discrete": lambda model, x0, i, label: vlb(model, x0, i, 0, 2, label, time="discrete"),
    "density": lambda model, x0, i, label: ode_nll(model, x0, i, tolerance=0.1),
    "uniform": lambda model, x0, i, label: ode_nll(model, x0, i, 0, 2, label, "uniform", 0.1),
    "noise": lambda model, x0, i, label: ode_nll(model, x0, i, 0, 2, label, "noise", 0.1),
    "loss": lambda model, x0, i, label: loss_by_noise_level(model, x0, i, 0, 3, label),
}


@pytest.mark.parametrize("schedule", ["cosine", "learned"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_likelihoods_do_without_float64(digits, name, schedule):
    """They come out as on the CPU, bit for bit, since the same numbers are computed."""
    function = FUNCTIONS[name]
    x0 = to_float(digits.test[:3])
    indices = torch.arange(3)
    label = digits.test_labels[:3]
    torch.manual_seed(0)
    model = tiny_model(digits, schedule, 0 if name == "density" else 10)
    expected = function(model, x0, indices, label)
    with FakeMPS() as mps:
        found = function(mps.move(model), mps.move(x0), indices, mps.move(label))
    torch.testing.assert_close(found, expected)


def test_points_do_without_float64():
    moons = load_dataset("moons")
    model = tiny_model(moons, "cosine")
    x0 = moons.test[:3]
    indices = torch.arange(3)
    expected = vlb(model, x0, indices, discrete=False)["total"], ode_nll(model, x0, indices)
    with FakeMPS() as mps:
        model, x0 = mps.move(model), mps.move(x0)
        found = vlb(model, x0, indices, discrete=False)["total"], ode_nll(model, x0, indices)
    torch.testing.assert_close(found, expected)


def test_classifier_does_without_float64(digits, monkeypatch):
    monkeypatch.setattr(features, "EPOCHS", 0.1)
    with FakeMPS() as mps:
        classifier = mps.move(Classifier(digits.event, 10))
        values, probs = classifier.eval().features_and_probs(digits.test[:5])
        assert values.dtype == probs.dtype == torch.float64
        monkeypatch.setattr(Classifier, "to", lambda self, device: mps.move(self))
        few = dataclasses.replace(
            digits, test=digits.test[:20], test_labels=digits.test_labels[:20]
        )
        trained = train_classifier(few, iter, MPS)
        assert 0 <= trained.accuracy.item() <= 1
