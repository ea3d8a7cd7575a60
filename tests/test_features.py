"""The spaces in which samples are judged."""

import dataclasses
import os
import sys
import types

import pytest
import torch
from torch import nn

from ddp import features
from ddp.data import load, order


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def judge(digits):
    return features.judge_of(digits, iter)[0]


def test_large_pictures_are_averaged_down():
    items = torch.zeros(2, 3, 28, 8, dtype=torch.uint8)
    assert features.pixel_features(items).shape == (2, 3 * 16 * 8)
    assert features.pixel_features(torch.full((1, 1, 32, 32), 51, dtype=torch.uint8)).unique() == (
        pytest.approx(0.2)
    )
    assert features.pixel_features(torch.ones(5, 2)).tolist() == [[1.0, 1.0]] * 5


def test_the_judge_of_digits_can_read(judge, digits):
    found, probabilities = judge.of(digits.test)
    assert found.shape == (360, features.WIDTH)
    torch.testing.assert_close(
        probabilities.sum(dim=1), torch.ones(360).double(), atol=1e-5, rtol=0
    )
    right = (probabilities.argmax(dim=1) == digits.test_labels).double().mean().item()
    assert judge.accuracy.item() == pytest.approx(right)
    assert right > 0.95
    assert not judge.training


def test_a_judge_is_trained_once_and_the_same_each_time(judge, digits, monkeypatch, tmp_path):
    def never(steps):
        raise AssertionError("it was remembered")

    again, path = features.judge_of(digits, never)
    assert again.fingerprint == judge.fingerprint
    assert again.accuracy == judge.accuracy
    assert digits.fingerprint in path.name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    anew, _ = features.judge_of(digits, iter)
    assert anew.fingerprint == judge.fingerprint
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["cut", "flipped", "hostile", "other", "nan", "unwritable"])
def test_a_damaged_memory_is_replaced(damage, digits, monkeypatch, tmp_path):
    few = dataclasses.replace(
        digits, train=digits.train[:300], train_labels=digits.train_labels[:300]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "EPOCHS", 2)
    first, path = features.judge_of(few, iter)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "flipped":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(bytes(raw))
    elif damage == "hostile":
        torch.save({"out.bias": os.system}, path)
    elif damage == "other":
        torch.save({"out.bias": torch.zeros(10)}, path)
    elif damage == "nan":
        state = torch.load(path)
        state["out.weight"][0] = float("nan")
        torch.save(state, path)
    else:
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("a file where the folder would be")
    again, place = features.judge_of(few, iter)
    assert again.fingerprint == first.fingerprint
    assert (place is None) == (damage == "unwritable")
    if place:
        features.read_archive(path)


def test_a_judge_does_not_see_what_floors_are_made_of(digits, monkeypatch):
    """Other items in the half that it does not see make no other judge."""
    monkeypatch.setattr(features, "EPOCHS", 1)
    first = features.train_judge(digits, iter)
    unseen, seen = order(0, 0, 1437)[:718], order(0, 0, 1437)[718:]
    prints = []
    for which in (unseen, seen):
        train = digits.train.clone()
        train[which] = 0
        prints.append(
            features.train_judge(dataclasses.replace(digits, train=train), iter).fingerprint
        )
    assert prints[0] == first.fingerprint
    assert prints[1] != first.fingerprint


@pytest.mark.parametrize(("shape", "turns"), [((1, 8, 8), 4), ((3, 12, 20), 2), ((3, 40, 33), 2)])
def test_without_labels_a_judge_tells_how_pictures_are_turned(digits, shape, turns, monkeypatch):
    items = digits.train[:200].float()
    items = nn.functional.interpolate(items, shape[1:]).byte().expand(-1, *shape)
    plain = dataclasses.replace(
        digits, train=items[:150], test=items[150:], train_labels=None, test_labels=None, classes=[]
    )
    x, which = features.questions(items[:2], None)
    assert x.shape == (2 * turns, *shape)
    assert which.tolist() == [t for t in range(turns) for _ in range(2)]
    assert torch.equal(x[2 * (turns // 2)], items[0].rot90(2, (-2, -1)))
    monkeypatch.setattr(features, "EPOCHS", 20)
    judge = features.train_judge(plain, iter)
    assert judge.of(items[:7])[0].shape == (7, features.WIDTH)
    assert judge.out.out_features == turns
    if turns == 4:
        assert judge.accuracy > 0.5


class Network(nn.Module):
    """Stands in for the published network: what it is given is what it is told to expect."""

    def __init__(self, name, wanted, feature_extractor_weights_path=None):
        super().__init__()
        assert wanted == ["2048"]
        if feature_extractor_weights_path is None:
            raise OSError("<urlopen error no route to host>")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 2048),)


@pytest.fixture
def fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_takes_grey_pictures_and_given_weights(fidelity, tmp_path):
    torch.save({}, tmp_path / "w.pth")
    read = features.inception(str(tmp_path / "w.pth"))
    found = read(torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8))
    assert found.shape == (120, 2048)
    assert found.dtype == torch.float64
    assert found[:, 7].tolist() == list(range(120))


def test_inception_says_in_a_line_what_is_missing(fidelity, tmp_path, monkeypatch):
    def said(weights):
        with pytest.raises(OSError, match=r"^[^\n]+$") as error:
            features.inception(weights)
        return str(error.value)

    assert "--inception_weights" in said(None)
    assert "no route to host" in said(None)
    assert "none.pth" in said(str(tmp_path / "none.pth"))
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    assert "bad.pth" in said(str(tmp_path / "bad.pth"))
    torch.save({"x": os.system}, tmp_path / "hostile.pth")
    assert "hostile.pth" in said(str(tmp_path / "hostile.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    assert "pip install torch-fidelity" in said(None)
