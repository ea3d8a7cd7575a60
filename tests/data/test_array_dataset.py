"""Arrays as datasets: how a shape is read, splits, labels, units, and what stays in its file."""

import numpy as np
import pytest
import torch
from data_checks import gray, refused, save

from ddp.config import Config
from ddp.data import array_dataset, load_dataset
from ddp.data.array_sources import read_labels
from ddp.data.mapped import Mapped
from ddp.data.npy import list_arrays, open_array
from ddp.io.checkpoint import checkpoint_state, load_model, restore, units_of, write_checkpoint
from ddp.training import Trainer
from ddp.units import Units

RANDOM = np.random.RandomState(0)
NUMBERS = {}  # event -> float32 items as they are saved, each a multiple of one
for event, shape in (((5,), (5,)), ((2, 12), (2, 12)), ((4, 6, 8), (6, 8, 4))):
    multiple = RANDOM.randn(60, *[1] * len(shape))
    NUMBERS[event] = (7 + 3 * multiple * RANDOM.randn(*shape)).astype(np.float32)
SMALL = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 16, "warmup": 2}
PIXELS = RANDOM.randint(0, 256, (60, 6, 8), dtype=np.uint8)


def load(tmp_path, array, name="a.npy", **options):
    np.save(tmp_path / name, array)
    return load_dataset(str(tmp_path / name), **options)


def all_items(dataset):
    """All items, in the order of the file where they were numbered there."""
    parts = [dataset.train, dataset.test] + ([] if dataset.val is None else [dataset.val])
    return torch.cat([part[:] for part in parts])


# ---- what a shape means ----


@pytest.mark.parametrize(
    ("shape", "dtype", "channels", "event", "text"),
    [
        ((9, 6, 8), "u1", None, (1, 6, 8), "images 6x8, 1 channel"),
        ((9, 6, 8, 4), "u1", None, (4, 6, 8), "images 6x8, 4 channels"),
        ((9, 8, 8), "f4", None, (1, 8, 8), "images 8x8, 1 channel; if they are sequences"),
        ((9, 8, 8), "f4", 8, (8, 8), "sequences of length 8, 8 channels"),
        ((9, 2, 8), "f2", None, (2, 8), "sequences of length 8, 2 channels; if they are gray"),
        ((9, 2, 8), "f8", 1, (1, 2, 8), "images 2x8, 1 channel"),
        ((9, 1, 8), "f8", 1, (1, 8), "sequences of length 8, 1 channel"),
        ((9, 3, 8), "u1", 3, (3, 8), "sequences of length 8, 3 channels"),
        ((9, 6, 8, 4), "f4", None, (4, 6, 8), "images 6x8, 4 channels"),
        ((9, 4, 8, 8), "f4", None, (4, 8, 8), "images 8x8, 4 channels; if the channels are last"),
        ((9, 4, 8, 8), "f4", 8, (8, 4, 8), "images 4x8, 8 channels"),
        ((9, 4, 6, 8), "f4", 4, (4, 6, 8), "images 6x8, 4 channels"),
        ((9, 5), "i8", None, (5,), "vectors of 5 numbers"),
        ((9, 1), "u1", None, (1,), "vectors of 1 number"),
    ],
)
def test_shape_says_what_items_are(tmp_path, shape, dtype, channels, event, text):
    dataset = load(tmp_path, RANDOM.randint(0, 9, shape).astype(dtype), channels=channels)
    assert dataset.event == event
    assert text in dataset.summary[0]
    assert str(tmp_path / "a.npy") in dataset.summary[0]
    assert dataset.is_pixels == (dtype == "u1" and len(event) == 3)
    assert (dataset.units is None) == dataset.is_pixels


@pytest.mark.parametrize(
    ("name", "shape", "event"),
    [
        ("images", (9, 2, 8), (1, 2, 8)),
        ("images", (9, 4, 8, 8), (8, 4, 8)),
        ("sequences", (9, 8, 8), (8, 8)),
        ("vectors", (9, 3), (3,)),
        ("anything", (9, 2, 8), (2, 8)),
    ],
)
def test_name_in_an_npz_says_what_items_are(tmp_path, name, shape, event):
    np.savez(tmp_path / "a.npz", **{name: RANDOM.randn(*shape)})
    dataset = load_dataset(str(tmp_path / "a.npz"))
    assert dataset.event == event
    assert "set channels" not in dataset.summary[0] or name == "anything"


def test_channels_come_first_and_pixels_stay_as_they_are(tmp_path):
    images = RANDOM.randint(0, 256, (30, 6, 8, 2), dtype=np.uint8)
    dataset = load(tmp_path, images)
    assert dataset.train.dtype == torch.uint8
    ours = {tuple(item.permute(1, 2, 0).flatten().tolist()) for item in all_items(dataset)}
    assert ours == {tuple(item.flatten().tolist()) for item in images}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", ">i2", "|b1"])
def test_numbers_of_any_type_and_order_are_the_same(tmp_path, dtype, order):
    array = (10 * RANDOM.rand(30, 5)).astype(dtype)
    dataset = load(tmp_path, np.asarray(array, order=order))
    restored = dataset.units.restore(all_items(dataset)).numpy()
    assert np.allclose(np.sort(restored, axis=0), np.sort(array.astype(float), axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("array", "options", "error", "match"),
    [
        (np.zeros((0, 3)), {}, ValueError, r"float64 \(0, 3\)"),
        (np.zeros((1, 3)), {}, ValueError, "1 item; at least 2"),
        (np.zeros((9, 0)), {}, ValueError, r"\(9, 0\)"),
        (np.zeros(9), {}, ValueError, r"\(9,\); expected images"),
        (np.zeros((2,) * 5), {}, ValueError, "expected images"),
        (np.float64(3), {}, ValueError, r"\(\)"),
        (np.array(["a", "b"]), {}, ValueError, "expected numbers"),
        (np.zeros((9, 2), complex), {}, OSError, "cannot be read as an array of numbers"),
        (np.array([{}] * 3), {}, OSError, "objects"),
        (np.array([[0.0], [1.0], [np.inf]]), {}, ValueError, "item 2 .*NaN or infinity"),
        (np.array([[np.nan], [1.0], [0.0]]), {}, ValueError, "item 0 .*NaN or infinity"),
        (np.zeros((9, 6, 8)), {"channels": 3}, ValueError, "channels=3 does not fit"),
        (np.zeros((9, 6, 8, 4)), {"channels": 3}, ValueError, "channels=3 does not fit"),
        (np.zeros((9, 4)), {"channels": 4}, ValueError, "channels=4 does not fit"),
        (np.zeros((9, 4)), {"image_size": (8, 8)}, ValueError, "image_size"),
        (np.zeros((9, 4)), {"cache": "x"}, ValueError, "cache"),
        (PIXELS, {"units": Units(torch.zeros(1), torch.ones(1))}, ValueError, "256 values"),
        (np.zeros((9, 4)), {"units": Units(torch.zeros(1), torch.ones(1))}, ValueError, "not 1"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, array, options, error, match):
    refused(error, match, load, tmp_path, array, **options)


def test_options_of_arrays_are_not_for_images(tmp_path):
    save(tmp_path / "b" / "0.png", gray(7))
    refused(ValueError, "labels", load_dataset, str(tmp_path / "b"), labels="x.npy")
    refused(ValueError, "channels=2", load_dataset, str(tmp_path / "b"), channels=2)
    refused(ValueError, "labels", load_dataset, "digits", labels="x.npy")


# ---- splits ----


def test_split_is_fixed_and_of_the_size_that_was_asked_for(tmp_path):
    numbers = np.arange(3000.0)[:, None]
    dataset = load(tmp_path, numbers, test_fraction=0.2)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (2160, 240, 600)
    restored = dataset.units.restore(all_items(dataset)).round().flatten()
    assert sorted(restored.tolist()) == numbers[:, 0].tolist()
    again = load(tmp_path, numbers, test_fraction=0.2)
    assert torch.equal(again.test, dataset.test)
    assert again.fingerprint == dataset.fingerprint


def test_units_are_of_the_training_items_alone(tmp_path):
    train, test = RANDOM.randn(50, 3), 100 + RANDOM.randn(20, 3)
    np.savez(tmp_path / "a.npz", x_train=train, x_test=test)
    dataset = load_dataset(str(tmp_path / "a.npz"))
    assert np.allclose(dataset.units.mean, train.mean(axis=0), atol=1e-6)
    assert np.allclose(dataset.units.std, train.std(axis=0), atol=1e-6)
    assert (len(dataset.train), len(dataset.test)) == (50, 20)
    refused(ValueError, "test_fraction", load_dataset, str(tmp_path / "a.npz"), test_fraction=0.1)


@pytest.mark.parametrize("save_as", [np.savez, np.savez_compressed])
def test_splits_and_labels_by_the_names_in_an_npz(tmp_path, save_as):
    counts = {"train": 30, "val": 10, "test": 20}
    arrays = {f"{split}_images": PIXELS[:count] for split, count in counts.items()}
    arrays |= {f"{split}_labels": np.arange(count)[:, None] % 3 for split, count in counts.items()}
    save_as(tmp_path / "a.npz", **arrays, other=np.zeros(3))
    dataset = load_dataset(str(tmp_path / "a.npz"))
    for split, count in counts.items():
        assert getattr(dataset, split)[:, 0].numpy().tolist() == PIXELS[:count].tolist()
        assert getattr(dataset, f"{split}_labels").tolist() == [i % 3 for i in range(count)]
    assert dataset.classes == ["0", "1", "2"]
    assert "not used: other" in dataset.summary


def test_folder_joins_files_and_its_folders_are_splits_and_classes(tmp_path):
    for split, shift in (("train", 0), ("test", 100)):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(2):  # 3 and 2 items
                array = np.arange(3.0 - k)[:, None] + 10 * k + 20 * i + shift
                np.save(tmp_path / split / name / f"{k}.npy", array)
    dataset = load_dataset(str(tmp_path))
    expected = [0, 1, 2, 10, 11, 20, 21, 22, 30, 31]
    restored = dataset.units.restore(dataset.train)[:, 0].round().tolist()
    assert sorted(restored) == expected  # a validation set would need more items
    assert dataset.train_labels.tolist() == [int(number >= 20) for number in restored]
    assert dataset.classes == ["cat", "dog"]
    np.save(tmp_path / "test" / "dog" / "1.npy", np.zeros((3, 2)))
    refused(ValueError, "one shape but for", load_dataset, str(tmp_path))


def test_folder_with_an_image_is_of_images(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", gray(i))
    np.save(tmp_path / "a.npy", PIXELS)
    assert load_dataset(str(tmp_path)).event == (1, 4, 4)


# ---- labels ----


@pytest.mark.parametrize("kind", ["ints.npy", "text.npy", "lines.csv", "columns.csv"])
def test_labels_from_a_file(tmp_path, kind):
    numbers = np.arange(60) % 3
    names = np.array(["ant", "bee", "cow"])[numbers]
    path = tmp_path / kind
    if kind == "ints.npy":
        np.save(path, numbers * 10)
    elif kind == "text.npy":
        np.save(path, names)
    elif kind == "lines.csv":
        path.write_text("\n".join(names), encoding="utf-8")
    else:
        lines = [f'"item, {i}",{name}' for i, name in enumerate(names)]
        path.write_text("\n".join(["file,label", *lines]), encoding="utf-8-sig")
    items = np.arange(60.0)[:, None]
    dataset = load(tmp_path, items, labels=str(path))
    assert dataset.classes == (["0", "10", "20"] if kind == "ints.npy" else ["ant", "bee", "cow"])
    for part in ("train", "test"):
        restored = dataset.units.restore(getattr(dataset, part))[:, 0].round().long()
        assert torch.equal(getattr(dataset, f"{part}_labels"), restored % 3)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.arange(59), r"\(59,\); expected a whole number or a text for each of 60 items"),
        (np.zeros(60), "float64"),
        (np.zeros((60, 3), int), r"\(60, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, match):
    np.save(tmp_path / "labels.npy", labels)
    path = str(tmp_path / "labels.npy")
    refused(ValueError, match, load, tmp_path, NUMBERS[(5,)], labels=path)


def test_items_of_a_class_that_training_lacks_are_left_out(tmp_path):
    labels = {"train_y": np.arange(30) % 2, "test_y": np.arange(30) % 3}
    items = {"train_x": np.arange(30.0)[:, None], "test_x": np.arange(30.0)[:, None]}
    np.savez(tmp_path / "a.npz", **items, **labels)
    dataset = load_dataset(str(tmp_path / "a.npz"))
    assert len(dataset.test) == 20
    assert set(dataset.test_labels.tolist()) == {0, 1}
    assert "left out 10 items of no class in training" in dataset.summary


# ---- what stays in its file ----


@pytest.mark.parametrize("event", NUMBERS)
def test_large_array_is_mapped_and_trains_to_the_same_bits(tmp_path, monkeypatch, event):
    in_memory = load(tmp_path, NUMBERS[event])
    monkeypatch.setattr(array_dataset, "MAX_IN_MEMORY", 0)
    monkeypatch.setattr(array_dataset, "CHUNK_BYTES", 1000)
    units = load_dataset(str(tmp_path / "a.npy")).units  # those of pieces differ in the last bits
    torch.testing.assert_close(units.state_dict(), in_memory.units.state_dict())
    mapped = load_dataset(str(tmp_path / "a.npy"), units=in_memory.units)
    assert torch.is_tensor(in_memory.train)
    assert isinstance(mapped.train, Mapped)
    losses = []
    for dataset in (in_memory, mapped):
        trainer = Trainer(Config(dataset="a", **SMALL), dataset)
        losses.append([trainer.train_step(0.0).loss.item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert torch.equal(mapped.test[:], in_memory.test)


def test_large_images_are_mapped_where_they_lie(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", labels=np.arange(60) % 2, images=PIXELS)
    in_memory = load_dataset(str(tmp_path / "a.npz"))
    monkeypatch.setattr(array_dataset, "MAX_IN_MEMORY", 0)
    dataset = load_dataset(str(tmp_path / "a.npz"))
    assert isinstance(dataset.train, Mapped)
    assert dataset.fingerprint == in_memory.fingerprint
    for step in range(5):
        (x0, label), (x0_too, label_too) = dataset.batch(0, step, 16), in_memory.batch(0, step, 16)
        assert torch.equal(x0, x0_too)
        assert torch.equal(label, label_too)
    array = next(array for array in list_arrays(tmp_path / "a.npz") if array.name == "images")
    with open(tmp_path / "a.npz", "rb") as file:
        file.seek(array.offset)
        assert file.read(PIXELS.nbytes) == PIXELS.tobytes()
    assert np.array_equal(open_array(array), PIXELS)


def test_fingerprint_tells_other_data_split_or_labels(tmp_path, monkeypatch):
    np.save(tmp_path / "labels.npy", np.arange(60) % 2)
    changed = NUMBERS[(5,)].copy()
    changed[17, 3] += 1e-3
    prints = [
        load(tmp_path, NUMBERS[(5,)]).fingerprint,
        load(tmp_path, NUMBERS[(5,)], test_fraction=0.3).fingerprint,
        load(tmp_path, NUMBERS[(5,)], labels=str(tmp_path / "labels.npy")).fingerprint,
        load(tmp_path, changed).fingerprint,
        load(tmp_path, NUMBERS[(5,)].reshape(60, 1, 5)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load(tmp_path, NUMBERS[(5,)], "b.npy").fingerprint == prints[0]  # where does not matter
    monkeypatch.setattr(array_dataset, "CHUNK_BYTES", 1)  # now by a sample of blocks
    monkeypatch.setattr(array_dataset, "HASHED_BLOCKS", 8)
    sampled = load(tmp_path, NUMBERS[(5,)]).fingerprint
    assert sampled == load_dataset(str(tmp_path / "a.npy")).fingerprint
    assert sampled not in prints
    changed[0] += 1  # of the first block
    assert load(tmp_path, changed).fingerprint != sampled


# ---- a run on it ----


@pytest.mark.parametrize("event", NUMBERS)
def test_run_learns_and_goes_on_with_its_units(tmp_path, small_bn_batches, event):
    dataset = load(tmp_path, NUMBERS[event])
    config = Config(dataset=str(tmp_path / "a.npy"), **SMALL)
    trainer = Trainer(config, dataset)
    losses = []
    for _ in range(2):
        trainer.recalibrated_ema()
        losses.append(trainer.val_loss())
        for _ in range(30):
            trainer.train_step(0.0)
    assert losses[1] < 0.98 * losses[0]
    write_checkpoint(tmp_path / "a.pth", checkpoint_state(trainer))
    model, _, state = load_model(tmp_path / "a.pth")
    assert torch.equal(model.units.mean, dataset.units.mean)
    assert torch.equal(model.units.std, dataset.units.std)
    again = load_dataset(str(tmp_path / "a.npy"), units=units_of(state))
    assert again.units.mean is state["units"]["mean"]
    resumed = Trainer(config, again)
    restore(resumed, state)
    for _ in range(3):
        assert torch.equal(trainer.train_step(0.5).loss, resumed.train_step(0.5).loss)


def test_units_of_a_model_win_over_those_of_the_data(tmp_path):
    units = Units(torch.full((5,), 10.0), torch.full((5,), 2.0))
    dataset = load(tmp_path, NUMBERS[(5,)], units=units)
    assert dataset.units is units
    own = load(tmp_path, NUMBERS[(5,)])
    torch.testing.assert_close(dataset.train * 2 + 10, own.units.restore(own.train))


def test_a_line_too_many_is_no_header_where_it_is_a_number(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("0\n1\n0\n1\n")
    assert len(read_labels(path, 3)) == 4  # which check_labels refuses
    path.write_text("label\n1\n0\n1\n")
    assert read_labels(path, 3).tolist() == [1, 0, 1]
