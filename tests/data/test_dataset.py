"""A Dataset's batches, pixels and fingerprint, and the registry of datasets."""

import hashlib
import inspect

import numpy as np
import pytest
import torch
from data_checks import gray, refused, save

from ddp.data import DATASETS, Dataset, load_dataset, resolve_name, to_float, to_pixels
from ddp.data.dataset import digest, permutation

# ---- batches ----


@pytest.fixture
def numbered():
    """Ten items that tell their own number, and labels that do, too."""
    items = torch.arange(20.0).reshape(10, 2)
    return Dataset("numbered", items, items[:2], torch.arange(10), torch.arange(2))


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_batch_visits_each_item_once_an_epoch(numbered, size):
    batches = [numbered.batch(5, step, size) for step in range(-(-60 // size))]
    assert all(len(x0) == len(label) == size for x0, label in batches)
    labels = torch.cat([label for _, label in batches])[:60]
    assert torch.equal(torch.cat([x0 for x0, _ in batches])[:60], numbered.train[labels])
    orders = [tuple(epoch.tolist()) for epoch in labels.reshape(6, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 6


def test_batch_is_a_function_of_seed_and_step(numbered):
    keys = [(seed, step) for seed in range(3) for step in (9, 0)]
    first = {key: numbered.batch(*key, 4)[1] for key in keys}
    again = {key: numbered.batch(*key, 4)[1] for key in sorted(keys)}
    for key, label in first.items():
        assert torch.equal(label, again[key])
    # the stream does not depend on how it is cut
    whole = numbered.batch(2, 0, 40)[1]
    assert torch.equal(whole[36:], first[2, 9])


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, 2**32 - 1), (2**31, 2**31 - 1)])
def test_batch_order_differs_between_seeds(seeds):
    dataset = Dataset("many", torch.arange(1000.0)[:, None], torch.zeros(1, 1))
    first, second = (dataset.batch(seed, 0, 1000)[0] for seed in seeds)
    # of two independent orders about one item in a thousand stands at the same place
    assert (first == second).sum() < 10


def test_batch_order_is_numpys_of_seed_and_epoch():
    """Results of every run depend on it: a change here changes them all."""
    for seed, epoch in ((0, 0), (7, 3)):
        expected = np.random.RandomState([seed, epoch]).permutation(50)
        assert permutation(seed, epoch, 50).tolist() == expected.tolist()


def test_batch_without_labels_has_none():
    moons = load_dataset("moons")
    for x0, label in (moons.batch(0, 0, 8), moons.test_batch(torch.arange(8))):
        assert x0.shape == (8, 2)
        assert label is None


def test_test_batch_holds_the_items_asked_for():
    digits = load_dataset("digits")
    x0, label = digits.test_batch(torch.tensor([5, 0]))
    assert torch.equal(x0, to_float(digits.test[[5, 0]]))
    assert torch.equal(label, digits.test_labels[[5, 0]])


def test_to_moves_the_training_items_alone(numbered):
    moved = numbered.to("meta")
    assert moved.train.is_meta
    assert moved.test is numbered.test
    assert moved.train_labels is numbered.train_labels
    assert not numbered.train.is_meta


# ---- pixels ----


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x0 = to_float(pixels)
    assert x0.dtype == torch.float32
    assert (x0.min(), x0.max()) == (-1, 1)
    assert torch.equal(to_pixels(x0), pixels)
    nudged = x0 + torch.rand(x0.shape) * 0.99 / 255 - 0.495 / 255  # rounds to the nearest
    assert torch.equal(to_pixels(nudged), pixels)
    assert torch.equal(to_pixels(x0 * 3).unique(), to_pixels((x0 * 3).clamp(-1, 1)).unique())


def test_pixels_of_half_precision_are_rounded_in_single():
    x0 = torch.linspace(-1, 1, 999).reshape(1, 1, 27, 37)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(to_pixels(x0.to(dtype)), to_pixels(x0.to(dtype).float()))


def test_points_stay_as_they_are():
    points = torch.randn(5, 2)
    assert torch.equal(to_float(points), points)
    assert torch.equal(to_pixels(points), points)


# ---- fingerprints ----


def test_fingerprint_changes_with_anything():
    def dataset(change=None):
        parts = [torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.ones(2, 1, 2, 2).byte()]
        parts += [torch.zeros(3).long(), torch.zeros(2).long()]
        if change is not None:
            parts[change].view(-1)[-1] += 1
        return Dataset("d", *parts)

    first = dataset()
    prints = {dataset(change).fingerprint for change in (None, 0, 1, 2, 3)}
    prints.add(Dataset("d", first.train, first.test).fingerprint)
    prints.add(Dataset("d", first.train.reshape(3, 1, 4, 1), first.test).fingerprint)
    prints.add(Dataset("d", first.train[:2], torch.cat([first.train[2:], first.test])).fingerprint)
    assert len(prints) == 8
    assert dataset().fingerprint == dataset().fingerprint


def test_fingerprint_of_digits_is_the_one_in_old_checkpoints():
    """A run is resumed only with data of the same fingerprint."""
    assert load_dataset("digits").fingerprint == "0cff9c4d11e75ab9"


def test_digest_is_sha256_of_the_bytes():
    tensors = [torch.arange(6).reshape(2, 3).T, torch.tensor(3)]  # not contiguous; 0-d
    content = np.array([0, 3, 1, 4, 2, 5, 3]).astype(np.int64).tobytes()
    assert digest(tensors) == hashlib.sha256(content).hexdigest()[:16]
    assert digest(tensors, header="x") == hashlib.sha256(b"x" + content).hexdigest()[:16]


# ---- the registry ----


def test_datasets_accept_an_entry_at_run_time(monkeypatch):
    def ramp(seed, **_):
        items = torch.arange(24.0).reshape(12, 2) + seed
        return Dataset("ramp", items[:10], items[10:])

    monkeypatch.setitem(DATASETS, "ramp", ramp)
    dataset = load_dataset("ramp", seed=3)
    assert dataset.event == (2,)
    assert dataset.train[0].tolist() == [3, 4]
    assert resolve_name("ramp") == "ramp"
    refused(ValueError, "channels=3", load_dataset, "ramp", channels=3)
    assert "ramp" in refused(ValueError, "dataset=", load_dataset, "rmap")


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_are_functions_of_the_same_keywords(name):
    inspect.signature(DATASETS[name]).bind(data_dir="data", seed=0, progress=None)


@pytest.mark.parametrize("name", ["mnits", "/no/such/folder", "none.zip", "a\0b"])
def test_load_dataset_refuses_an_unknown_name(name):
    assert "digits" in refused(ValueError, "dataset=", load_dataset, name)


@pytest.mark.parametrize("name", ["digits", "moons", "cifar10"])
@pytest.mark.parametrize(
    "option", [{"image_size": [16, 16]}, {"channels": 3}, {"test_fraction": 0.1}]
)
def test_load_dataset_refuses_options_of_folders_elsewhere(name, option, tmp_path):
    match = f"{next(iter(option))}=.*{name}"
    refused(ValueError, match, load_dataset, name, tmp_path, **option)
    assert not list(tmp_path.iterdir())


def test_load_dataset_finds_a_folder_that_has_moved(tmp_path):
    """A checkpoint remembers an absolute path."""
    for level in range(4):
        save(tmp_path / "new" / "images" / f"{level}.png", gray(level))
    old = tmp_path / "old" / "images"
    for data_dir in (tmp_path / "new", tmp_path / "new" / "images"):
        assert len(load_dataset(str(old), data_dir).train) == 2
    refused(ValueError, "data_dir", load_dataset, str(old), tmp_path / "none")
    refused(ValueError, "dataset=", load_dataset, "old/images", tmp_path / "new")


def test_resolve_name_makes_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "digits").mkdir()  # a name of a dataset goes before a folder
    assert resolve_name("images") == str((tmp_path / "images").resolve())
    for name in ("digits", "none", "", None):
        assert resolve_name(name) == name


def test_describe_ends_with_the_sizes():
    lines = load_dataset("digits").describe()
    assert "1,437 train and 360 test items" in lines[-1]
    assert "1x8x8" in lines[-1]
