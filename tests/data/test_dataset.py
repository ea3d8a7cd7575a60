"""A Dataset's batches, pixels and fingerprint, and the registry of datasets."""

import hashlib
import inspect

import numpy as np
import pytest
import torch
from data_checks import gray, idx_contents, put, refused, save

from ddp.data import DATASETS, Dataset, load_dataset, resolve_name, to_float, to_pixels
from ddp.data.arrays import read_items
from ddp.data.dataset import digest, held_out, hold_out_val, permutation

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
    for x0, label in (moons.batch(0, 0, 8), moons.selection_items(torch.arange(8))):
        assert x0.shape == (8, 2)
        assert label is None


def test_to_moves_the_training_items_alone(numbered):
    moved = numbered.to("meta")
    assert moved.train.is_meta
    assert moved.test is numbered.test
    assert moved.train_labels is numbered.train_labels
    assert not numbered.train.is_meta


# ---- the validation split ----


def sorted_by_class(count, classes=10):
    """A Dataset whose items, sorted by class, tell their own number; the test split is alike."""
    items = torch.arange(float(count))[:, None]
    labels = torch.arange(count) * classes // count
    return Dataset("sorted", items, items[: count // 2], labels, labels[: count // 2])


@pytest.mark.parametrize(("count", "size"), [(1999, 0), (2000, 200), (2345, 234), (70_000, 5000)])
def test_val_is_a_fixed_part_of_the_training_items(count, size):
    before = sorted_by_class(count)
    after = hold_out_val(before)
    chosen = np.sort(np.random.RandomState([0, 0]).permutation(count)[:size])
    if not size:
        assert after.val is None
        return
    assert after.val[:, 0].tolist() == chosen.tolist()
    assert torch.equal(after.val_labels, before.train_labels[chosen])
    rest = np.delete(np.arange(count), chosen)  # in its stored order
    assert after.train[:, 0].tolist() == rest.tolist()
    assert torch.equal(after.train_labels, before.train_labels[rest])
    assert after.test is before.test
    assert hold_out_val(after) is after


def test_val_leaves_an_item_of_each_class_to_training():
    labels = torch.arange(3000).clamp_min(2000)  # of one class 2001 items, and one of each other
    items = labels[:, None].float()
    dataset = hold_out_val(Dataset("rare", items, items, labels, labels))
    assert len(dataset.val) == 300
    assert set(dataset.val_labels.tolist()) == {2000}


def test_held_out_items_are_the_first_of_the_order_that_classes_can_spare():
    order = torch.tensor([3, 0, 4, 1, 2])
    assert held_out(order, 2).nonzero()[:, 0].tolist() == [0, 3]
    labels = torch.tensor([0, 1, 0, 2, 0])  # items 1 and 3 are alone in their class, 2 is the last
    assert held_out(order, 2, labels).nonzero()[:, 0].tolist() == [0, 4]
    assert held_out(order, 5, labels).nonzero()[:, 0].tolist() == [0, 4]
    assert not held_out(order, 0, labels).any()


@pytest.mark.parametrize("has_val", [True, False])
def test_items_to_choose_on_are_of_all_classes(has_val):
    dataset = sorted_by_class(4000)
    dataset = hold_out_val(dataset) if has_val else dataset
    split = "val" if has_val else "test"
    assert dataset.selection_split == split
    assert dataset.num_selection == len(getattr(dataset, split)) == (400 if has_val else 2000)
    x0, label = dataset.selection_items(torch.arange(100))
    assert len(label.unique()) == len(getattr(dataset, f"{split}_labels").unique())
    assert torch.equal(label, (x0[:, 0] * 10 / 4000).long())  # each with its own label
    every, _ = dataset.selection_items(torch.arange(dataset.num_selection))
    assert torch.equal(every.sort(dim=0).values, getattr(dataset, split))
    assert torch.equal(dataset.selection_items(torch.tensor([7]))[0][0], every[7])


def test_items_to_choose_on_are_numbered_as_in_an_evaluation():
    dataset = sorted_by_class(1000)
    expected = dataset.test[permutation(0, 0, len(dataset.test))]
    assert torch.equal(dataset.selection_items(torch.arange(500))[0], expected)


def test_items_to_choose_on_are_float_images_without_labels():
    images = torch.arange(256, dtype=torch.uint8).reshape(64, 1, 2, 2)
    x0, label = Dataset("images", images, images).selection_items(torch.arange(5))
    assert label is None
    assert torch.equal(x0, to_float(images[permutation(0, 0, 64)[:5]]))


def test_points_have_validation_items_of_their_own():
    points, others = load_dataset("moons", seed=1), load_dataset("moons", seed=2)
    assert points.selection_split == "val"
    assert len(points.val) == 5000
    assert torch.equal(points.val, others.val)
    together = torch.cat([points.train, points.test, points.val])
    assert len(together.unique(dim=0)) == len(together)


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
    prints.add(Dataset("d", first.train, first.test, val=first.train).fingerprint)
    labels = torch.zeros(3).long()
    prints.add(
        Dataset("d", first.train, first.test, val=first.train, val_labels=labels).fingerprint
    )
    assert len(prints) == 10
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


def test_load_dataset_takes_the_path_that_was_typed_and_no_other(tmp_path):
    """The images under data_dir are not those of a path that is mistyped."""
    for level in range(4):
        save(tmp_path / "data" / "images" / f"{level}.png", gray(level))
    typo = tmp_path / "old" / "images"
    for data_dir in (tmp_path / "data", tmp_path / "data" / "images"):
        assert str(typo) in refused(ValueError, "dataset=", load_dataset, str(typo), data_dir)
        refused(ValueError, "dataset=", load_dataset, "", data_dir)


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for level in range(4):
        save(tmp_path / "images" / f"{level}.png", gray(level))
    assert load_dataset("~/images").name == "images"
    assert resolve_name("~/images") == str((tmp_path / "images").resolve())
    assert len(read_items("~/images/0.png", (1, 4, 4))[0]) == 1
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    assert len(read_items("~/a.npy", (2,))[0]) == 3
    put(tmp_path / "mine", idx_contents())
    assert load_dataset("mnist", "~/mine").event == (1, 3, 3)


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
    assert "best.pth is chosen on its test items" in lines[-2]
    assert max(map(len, lines)) <= 80
    (line,) = load_dataset("moons").describe()
    assert line == "data: moons, 100,000 train, 5,000 validation and 10,000 test items, 2"


@pytest.mark.parametrize("part", [slice(0, None, 4), slice(3, None, 4), slice(8, 16)])
def test_part_of_a_batch_is_its_items(part):
    """Also where an epoch ends within the batch."""
    items = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1)
    dataset = Dataset("x", items, items, torch.arange(50))
    for step in range(4):
        whole, labels = dataset.batch(3, step, 32)
        x0, label = dataset.batch(3, step, 32, part)
        assert torch.equal(x0, whole[part])
        assert torch.equal(label, labels[part])
