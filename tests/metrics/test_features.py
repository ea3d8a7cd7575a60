"""Feature spaces: pixels, the classifier and its cache, Inception."""

import dataclasses
import os
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from fake_mps import FakeMPS
from live_memory import LiveMemory
from PIL import Image
from torch import nn

from ddp.data import load_dataset
from ddp.data.dataset import permutation
from ddp.io.checkpoint import read_archive
from ddp.metrics import features, fixed_features
from ddp.metrics.distances import frechet_distance, prdc
from ddp.metrics.features import (
    FEATURES,
    Extractor,
    Space,
    inception,
    load_or_train_classifier,
    rotation_task,
    train_classifier,
)
from ddp.metrics.fixed_features import filter_features, pixel_features, value_features


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier(digits):
    return load_or_train_classifier(digits, iter)[0]


def test_pixel_features_average_large_images_down():
    items = torch.zeros(2, 3, 28, 8, dtype=torch.uint8)
    assert pixel_features(items).shape == (2, 3 * 16 * 8)
    gray = torch.full((1, 1, 32, 32), 51, dtype=torch.uint8)
    assert pixel_features(gray).unique() == pytest.approx(0.2)


def test_value_features_of_points_are_the_points():
    assert value_features(torch.ones(5, 2)).tolist() == [[1.0, 1.0]] * 5
    assert value_features(torch.ones(5, 2)).dtype == torch.float64


def test_classifier_of_digits_reads_digits(classifier, digits):
    values, probs = classifier.features_and_probs(digits.test)
    assert values.shape == (360, features.WIDTH)
    assert torch.equal(classifier.features(digits.test), values)
    assert torch.equal(classifier.class_probs(digits.test), probs)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(360).double(), atol=1e-5, rtol=0)
    accuracy = (probs.argmax(dim=1) == digits.test_labels).double().mean().item()
    assert classifier.accuracy.item() == pytest.approx(accuracy)
    assert accuracy > 0.95
    assert not classifier.training


def test_classifier_is_trained_once(classifier, digits):
    def never(steps):
        raise AssertionError("it is in the cache")

    again, path = load_or_train_classifier(digits, never)
    assert again.fingerprint == classifier.fingerprint
    assert again.accuracy == classifier.accuracy
    assert path.name == f"classifier-{digits.fingerprint}-{features.VERSION}.pth"


def test_classifier_is_trained_to_the_same_weights(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "EPOCHS", 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, _ = load_or_train_classifier(digits, iter)
    assert again.fingerprint == train_classifier(digits, iter).fingerprint
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are untouched


def damage_cache(damage, path):
    """Spoil the file in which a classifier is kept."""
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "flipped":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(bytes(raw))
    elif damage == "hostile":
        torch.save({"out.bias": os.system}, path)
    elif damage == "list":
        torch.save([torch.zeros(10)], path)
    elif damage == "incomplete":
        torch.save({"out.bias": torch.zeros(10)}, path)
    elif damage == "no tensor":
        torch.save(torch.load(path) | {"out.bias": "zero"}, path)
    elif damage == "classes":
        state = torch.load(path)
        state["out.weight"] = torch.zeros(7, features.WIDTH)
        state["out.bias"] = torch.zeros(7)
        torch.save(state, path)
    elif damage == "method":  # of compression, in the archive's list of its parts
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"PK\x01\x02") + 10] ^= 64
        path.write_bytes(bytes(raw))
    elif damage == "type":
        torch.save({name: x.long() for name, x in torch.load(path).items()}, path)
    elif damage == "sparse":
        state = torch.load(path)
        torch.save(state | {"out.bias": state["out.bias"].to_sparse()}, path)
    elif damage == "nan":
        state = torch.load(path)
        state["out.weight"][0] = float("nan")
        torch.save(state, path)
    else:
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("a file where the folder would be")


DAMAGES = ["cut", "flipped", "hostile", "list", "incomplete", "no tensor", "classes", "nan"]
DAMAGES += ["method", "type", "sparse"]


@pytest.mark.parametrize("damage", [*DAMAGES, "unwritable"])
def test_classifier_cache_is_rebuilt_when_damaged(damage, digits, monkeypatch, tmp_path):
    few = dataclasses.replace(
        digits, train=digits.train[:300], train_labels=digits.train_labels[:300]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "EPOCHS", 2)
    first, path = load_or_train_classifier(few, iter)
    damage_cache(damage, path)
    again, new_path = load_or_train_classifier(few, iter)
    assert again.fingerprint == first.fingerprint
    if damage == "unwritable":
        assert new_path is None
    else:
        assert new_path == path
        read_archive(path)


@pytest.mark.parametrize("error", [KeyError("x"), OverflowError("x"), RecursionError("x")])
def test_classifier_is_trained_whatever_reading_raises(digits, monkeypatch, tmp_path, error):
    def read(path):
        raise error

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "read_archive", read)
    monkeypatch.setattr(features, "train_classifier", lambda *_: nn.Linear(1, 1))
    classifier, _ = load_or_train_classifier(digits, iter)
    assert isinstance(classifier, nn.Linear)


def test_classifier_needs_no_home(digits, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", no_home)
    monkeypatch.setattr(features, "train_classifier", lambda *_: "trained")
    assert load_or_train_classifier(digits, iter) == ("trained", None)


def test_classifier_is_tested_on_labels_where_the_test_items_have_none(digits, monkeypatch):
    monkeypatch.setattr(features, "EPOCHS", 10)
    unlabeled = dataclasses.replace(digits, test_labels=None)
    classifier = train_classifier(unlabeled, iter)
    seen = permutation(0, 0, 1437)[718:]
    probs = classifier.class_probs(digits.train[seen])
    accuracy = (probs.argmax(dim=1) == digits.train_labels[seen]).double().mean()
    assert 0.8 < classifier.accuracy < accuracy + 0.05


def test_weak_classifier_is_called_so(digits, monkeypatch):
    """One that knows nothing, and one that knows half of digits."""
    for epochs, is_weak in ((0.1, True), (8, False)):
        monkeypatch.setattr(features, "EPOCHS", epochs)
        trained = train_classifier(digits, iter)
        monkeypatch.setattr(features, "load_or_train_classifier", lambda *_, t=trained: (t, None))
        weak = FEATURES["classifier"].build(digits).weak
        assert bool(weak) == is_weak
        assert not weak or f"only {trained.accuracy:.0%}" in weak


# ---- filters: what no classifier sees ----


def color_images(count=300):
    """Striped disks on a gradient that is brighter above, each in colors of its own."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    u = torch.rand(count, 8, generator=generator)[..., None, None]  # (N, 8, 1, 1)
    inside = ((x - u[:, 0] + 0.5) ** 2 + (y - u[:, 1] + 0.5) ** 2) < 0.1 + 0.3 * u[:, 2]  # a disk
    sky = (200 * u[:, 3] + 50)[:, None] * (1 - y) / 2  # (N, 1, 32, 32), brighter above
    stripes = torch.sin(40 * (x * u[:, 4] + y * (1 - u[:, 4])))[:, None]  # (N, 1, 32, 32)
    color = 255 * u[:, 5:8] + 40 * stripes
    images = torch.where(inside[:, None], color, sky)
    return images.clamp(0, 255).round().byte()


def spoil(images):
    """name -> what a bad generator makes of images."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(len(images), 3, 4, 4, generator=generator)
    blobs = nn.functional.interpolate(low, size=(32, 32), mode="bicubic")
    tiles = images.reshape(-1, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    tiles = torch.stack([t[torch.randperm(16, generator=generator)] for t in tiles])
    mixed = tiles.reshape(-1, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    return {
        "color noise": torch.randint(256, images.shape, generator=generator).byte(),
        "blobs": (127 + 60 * blobs).clamp(0, 255).byte(),
        "blur": nn.functional.avg_pool2d(images.float(), 5, 1, 2, count_include_pad=False).byte(),
        "shuffled tiles": mixed,
        "mixtures of two": ((images.float() + images.roll(1, 0).float()) / 2).byte(),
        "upside down": images.flip(2),
    }


def test_classifier_that_takes_noise_for_real_is_called_weak(classifier, digits, monkeypatch):
    """Easy classes leave it right in all, and blind to what a picture is."""
    assert FEATURES["classifier"].build(digits).weak is None
    monkeypatch.setattr(
        features.Classifier, "features", lambda self, items: items.double().mean(dim=(2, 3))
    )  # shuffled pixels have the same mean
    assert "takes 100% of pure noise for real" in FEATURES["classifier"].build(digits).weak


def test_filters_tell_mush_from_color_images():
    """A few hundred color images, of which no classifier can be trained."""
    images = color_images(900)
    real = filter_features(images[:300])
    floor = frechet_distance(filter_features(images[300:600]), real)
    ours = frechet_distance(filter_features(images[600:]), real)
    assert 0.6 < ours / floor < 1.6
    spoiled = {name: filter_features(items) for name, items in spoil(images[600:]).items()}
    ratios = {name: frechet_distance(a, real) / floor for name, a in spoiled.items()}
    assert min(ratios.values()) > 3, ratios
    assert ratios["color noise"] > ratios["blobs"] > ratios["mixtures of two"]
    for name in ("color noise", "blobs"):
        assert prdc(spoiled[name], real)["precision"] < 0.2


def test_filters_rank_photographs(shared_data):
    """The same of CIFAR-10, where a small classifier is right of three items in four."""
    with zipfile.ZipFile(shared_data / "cifar10-jpeg-test.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith((".jpg", ".jpeg"))]
        names = [names[i] for i in permutation(0, 0, len(names))[:900]]
        arrays = [np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names]
    images = torch.from_numpy(np.stack(arrays)).movedim(3, 1)
    real = filter_features(images[:300])
    floor = frechet_distance(filter_features(images[300:600]), real)
    for items in spoil(images[600:]).values():
        assert frechet_distance(filter_features(items), real) > 3 * floor


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (1, 1, 2), (3, 64, 48)])
def test_filters_take_images_of_any_size(shape):
    items = torch.randint(256, (7, *shape), generator=torch.Generator().manual_seed(0)).byte()
    values = filter_features(items)
    assert values.shape == (7, 5 * shape[0] + 3 * fixed_features.FILTERS)
    assert values.isfinite().all()
    assert torch.equal(filter_features(items[:2]), values[:2])


@pytest.mark.parametrize("function", [pixel_features, value_features, filter_features])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 16, 16)])
def test_features_of_items_on_any_device_end_on_the_cpu(function, shape):
    items = torch.randint(256, (5, *shape)).byte()
    with FakeMPS() as mps:
        values = function(mps.move(items))
        assert values.device == torch.device("cpu")
    assert torch.equal(values, function(items))


@pytest.mark.parametrize("function", [pixel_features, filter_features])
def test_features_are_made_of_a_part_at_a_time(function, monkeypatch):
    items = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(fixed_features, "PART", 20)
    with LiveMemory() as memory:
        values = function(items)
    assert memory.peak < 2.1 * values.nbytes + items.nbytes


def test_classifier_does_not_see_the_items_of_the_baseline(digits, monkeypatch):
    """Other items in the half that it does not see give the same weights."""
    monkeypatch.setattr(features, "EPOCHS", 1)
    first = train_classifier(digits, iter)
    order = permutation(0, 0, 1437)
    for half, is_same in ((order[:718], True), (order[718:], False)):
        train = digits.train.clone()
        train[half] = 0
        changed = train_classifier(dataclasses.replace(digits, train=train), iter)
        assert (changed.fingerprint == first.fingerprint) == is_same


@pytest.mark.parametrize(
    ("shape", "rotations"), [((1, 8, 8), 4), ((3, 12, 20), 2), ((3, 40, 33), 2)]
)
def test_rotation_task_gives_every_rotation(digits, shape, rotations):
    items = nn.functional.interpolate(digits.train[:2].float(), shape[1:]).expand(-1, *shape)
    x, target = rotation_task(items, None)
    assert x.shape == (2 * rotations, *shape)
    assert target.tolist() == sorted(list(range(rotations)) * 2)
    half_turn = 2 * (rotations // 2)
    assert torch.equal(x[half_turn], items[0].rot90(2, (-2, -1)))


def test_rotation_task_with_labels_is_the_labels(digits):
    x, target = rotation_task(digits.train[:5], digits.train_labels[:5])
    assert torch.equal(x, digits.train[:5])
    assert torch.equal(target, digits.train_labels[:5])


@pytest.mark.parametrize(("shape", "rotations"), [((1, 8, 8), 4), ((3, 12, 20), 2)])
def test_classifier_without_labels_learns_rotations(digits, shape, rotations, monkeypatch):
    items = nn.functional.interpolate(digits.train[:200].float(), shape[1:])
    items = items.byte().expand(-1, *shape)
    unlabeled = dataclasses.replace(
        digits, train=items[:150], test=items[150:], train_labels=None, test_labels=None, classes=[]
    )
    monkeypatch.setattr(features, "EPOCHS", 20)
    classifier = train_classifier(unlabeled, iter)
    assert classifier.features(items[:7]).shape == (7, features.WIDTH)
    assert classifier.out.out_features == rotations
    if rotations == 4:
        assert classifier.accuracy > 0.5


class FakeInception(nn.Module):
    """Stands in for the published network: its features are the mean of the pixels."""

    def __init__(self, name, wanted, weights=None):
        super().__init__()
        assert wanted == ["2048"]
        if weights is None:
            raise OSError("<urlopen error no route to host>")
        self.load_state_dict(torch.load(weights, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 2048),)


@pytest.fixture
def torch_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_takes_gray_images_and_given_weights(torch_fidelity, tmp_path):
    torch.save({}, tmp_path / "w.pth")
    extract = inception(str(tmp_path / "w.pth"))
    items = torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    values = extract(items)
    assert values.shape == (120, 2048)
    assert values.dtype == torch.float64
    assert values[:, 7].tolist() == list(range(120))


def test_inception_error_names_what_is_missing(torch_fidelity, tmp_path, monkeypatch):
    def message(weights):
        with pytest.raises(OSError, match=r"^[^\n]+$") as error:  # one line
            inception(weights)
        return str(error.value)

    assert "inception_weights=None" in message(None)
    assert "no route to host" in message(None)
    assert "none.pth" in message(str(tmp_path / "none.pth"))
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    torch.save({"x": torch.zeros(3)}, tmp_path / "method.pth")
    damage_cache("method", tmp_path / "method.pth")
    assert "method.pth" in message(str(tmp_path / "method.pth"))
    assert "bad.pth" in message(str(tmp_path / "bad.pth"))
    torch.save({"x": os.system}, tmp_path / "hostile.pth")
    assert "hostile.pth" in message(str(tmp_path / "hostile.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    assert "pip install torch-fidelity" in message(None)


def test_feature_spaces_build_extractors(classifier, digits, torch_fidelity, tmp_path):
    torch.save({}, tmp_path / "w.pth")
    options = {"progress": iter, "device": "cpu", "inception_weights": str(tmp_path / "w.pth")}
    for name, space in FEATURES.items():
        extractor = space.build(digits, **options)
        items = torch.zeros(9, 2) if space.kind == "point" else digits.test[:9]
        values = extractor.features(items)
        assert values.dtype == torch.float64
        assert len(values) == 9
        assert (extractor.class_probs is not None) == (name == "classifier")
    about = FEATURES["classifier"].build(digits, **options).about
    assert about["trained_on"] == "labels"
    assert about["fingerprint"] == classifier.fingerprint
    assert about["accuracy"] == pytest.approx(classifier.accuracy.item())
    low, high = about["accuracy_interval"]
    assert 0.9 < low < about["accuracy"] < high <= 1


def test_a_new_feature_space_is_one_function_and_one_entry(digits, monkeypatch):
    def mean_space(dataset, **_):
        return Extractor(lambda items: items.double().mean(dim=(2, 3)))

    monkeypatch.setitem(FEATURES, "mean", Space(mean_space, "image"))
    extractor = FEATURES["mean"].build(digits, device="cpu")
    assert extractor.features(digits.test[:4]).shape == (4, 1)
