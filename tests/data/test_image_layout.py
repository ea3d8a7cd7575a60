"""Splits and classes from the names of files, and what is no data."""

import itertools
import json
import zipfile

import numpy as np
import pytest
import torch
from data_checks import gray, noise, refused, save, save_all, zip_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddp.data import load_dataset
from ddp.data.folder import read_images
from ddp.data.layout import TEST, TRAIN, VAL, find_classes, find_splits

SPLIT = ["train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "train/dog/b.png"]
SPLIT += ["test/cat/c.png", "test/dog/c.png"]


def arrange(*names):
    """(name -> split, name -> class) of images with these names, those left out left out."""
    names = sorted(names)
    layout, is_kept, _ = find_splits(names)
    names = list(itertools.compress(names, is_kept))
    splits, labels, classes, _ = find_classes(names, layout.select(is_kept), {}, False)
    splits = [None] * len(names) if splits is None else splits.tolist()
    labels = [-1] * len(names) if labels is None else labels.tolist()
    kept = {name: split for name, split in zip(names, splits, strict=True) if split != -1}
    labels = dict(zip(names, labels, strict=True))
    return kept, {name: classes[labels[name]] if labels[name] >= 0 else None for name in kept}


# ---- splits ----


@pytest.mark.parametrize(
    "stray",
    ["cover.png", "extra/x.png", "unlabeled/0/x.png", "train.png", "extra/train/x.png"],
)
@pytest.mark.parametrize("top", ["", "photos/"])
def test_split_stands_whatever_lies_beside_it(tmp_path, stray, top):
    names = [top + name for name in SPLIT]
    splits, classes = arrange(*names, top + stray)
    assert splits == {name: TEST if "test/" in name else TRAIN for name in sorted(names)}
    assert classes == {name: "cat" if "cat" in name else "dog" for name in names}
    for i, name in enumerate([*names, top + stray]):
        save(tmp_path / name, noise(4, 4, seed=i))
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    assert "left out 1 image beside test/ and train/" in "\n".join(dataset.describe())


@pytest.mark.parametrize("stray", ["cover.png", "extra/x.png", "train.png"])
def test_split_below_each_class_stands_whatever_lies_beside_it(stray):
    names = [f"{kind}/{split}/a.png" for kind in ("cat", "dog") for split in ("train", "test")]
    splits, classes = arrange(*names, stray)
    assert splits == {name: TEST if "test/" in name else TRAIN for name in sorted(names)}
    assert classes == {name: name[:3] for name in names}


@pytest.mark.parametrize(
    ("training", "testing"),
    [
        ("training_set/training_set/{}/a.png", "test_set/test_set/{}/b.png"),
        ("{}/train/a.png", "{}/test/b.png"),
        ("images/train2017/{}/a.png", "images/val2017/{}/b.png"),
    ],
)
def test_split_is_found_where_archives_have_it(training, testing):
    names = {name.format(c): c for c in ("cat", "dog") for name in (training, testing)}
    splits, classes = arrange(*names)
    assert splits == {name: TRAIN if "train" in name else TEST for name in names}
    assert classes == names


@pytest.mark.parametrize("names", [["train/a.png", "bus/b.png"], ["train/a.png", "train/b.png"]])
def test_class_may_be_called_train(names):
    splits, classes = arrange(*names)
    assert set(splits.values()) == {None}
    assert classes["train/a.png"] == ("train" if "bus/b.png" in names else None)


def test_val_is_a_split_of_its_own_beside_test_and_else_for_testing():
    names = ["train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"]
    assert arrange(*names)[0]["val/cat/c.png"] == TEST
    splits, _ = arrange(*names, "test/cat/e.png")
    assert (splits["val/cat/c.png"], splits["test/cat/e.png"]) == (VAL, TEST)


def test_val_folder_is_chosen_on(tmp_path):
    save_all(tmp_path, [*SPLIT, "valid/cat/d.png", "valid/dog/d.png"])
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (4, 2, 2)
    assert dataset.val_labels.tolist() == [0, 1]
    assert dataset.selection_split == "val"
    assert "4 train, 2 validation and 2 test items" in dataset.describe()[-1]


@pytest.mark.parametrize("folder", ["test/", "test/unknown/"])
def test_test_set_without_labels_leaves_those_of_training(tmp_path, folder):
    names = [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(10)]
    save_all(tmp_path, [*names, folder + "a.png", folder + "b.png"])
    dataset = load_dataset(str(tmp_path))
    assert dataset.classes == ["cat", "dog"]
    assert dataset.test_labels is None
    assert len(dataset.test) == 2
    assert "without labels: 2 test images" in dataset.summary
    # the best model is chosen on items with labels, which then come from training
    assert (len(dataset.train), len(dataset.val)) == (18, 2)
    assert dataset.selection_items(torch.arange(2))[1].tolist() is not None


def test_images_of_classes_that_are_not_trained_are_left_out(tmp_path):
    save_all(tmp_path, [*SPLIT, "test/owl/a.png", "test/a.png"])
    dataset = load_dataset(str(tmp_path))
    assert dataset.classes == ["cat", "dog"]
    assert dataset.test_labels.tolist() == [0, 1]
    assert "left out 2 test images of no class in training" in "\n".join(dataset.summary)


def test_validation_images_without_labels_are_left_out(tmp_path):
    save_all(tmp_path, [*SPLIT, "val/a.png"])
    dataset = load_dataset(str(tmp_path))
    assert dataset.val is None
    assert "left out 1 validation image of no class in training" in "\n".join(dataset.summary)


@pytest.mark.parametrize(("folder", "title"), [("train", "training"), ("test", "test")])
def test_split_without_a_readable_image_is_refused(tmp_path, folder, title):
    save_all(tmp_path, SPLIT)
    for path in (tmp_path / folder).rglob("*.png"):
        path.write_bytes(b"")
    refused(OSError, f"no {title} item that can be used", load_dataset, str(tmp_path))


def test_stray_image_beside_class_folders_is_named(tmp_path):
    save_all(tmp_path, ["cat/a.png", "dog/b.png", "cover.png"])
    dataset = load_dataset(str(tmp_path))
    assert dataset.classes == []
    assert "no classes: 1 image without one, such as cover.png" in dataset.summary


# ---- classes ----


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_every_class_of_the_test_split_is_trained(tmp_path, fraction):
    names = [f"many/{i:02d}.png" for i in range(40)]
    names += [f"rare{i}/{j}.png" for i in range(20) for j in range(1 + i % 2)]
    save_all(tmp_path, names)
    dataset = load_dataset(str(tmp_path), test_fraction=fraction)
    assert len(dataset.test) == round((fraction or 0.1) * len(names))
    assert set(dataset.test_labels.tolist()) <= set(dataset.train_labels.tolist())
    assert len(dataset.train_labels.unique()) == len(dataset.classes) == 21


def test_split_of_larger_classes_is_the_first_of_the_permutation(tmp_path):
    names = [f"{c}/{i:02d}.png" for c in ("a", "b") for i in range(20)]
    for i, name in enumerate(sorted(names)):
        save(tmp_path / name, gray(i))
    test = load_dataset(str(tmp_path)).test[:, 0, 0, 0].tolist()
    assert test == sorted(np.random.RandomState(0).permutation(40)[:4])


def test_classes_of_one_image_each_are_no_classes(tmp_path):
    save_all(tmp_path, [f"album{i}/cover.png" for i in range(12)])
    dataset = load_dataset(str(tmp_path))
    assert (dataset.classes, dataset.train_labels, dataset.test_labels) == ([], None, None)
    assert len(dataset.test) == 2
    assert any("classes are not used" in line for line in dataset.summary)


def test_class_names_with_accents_are_one_name_on_every_system(tmp_path):
    for name in ("e\N{COMBINING ACUTE ACCENT}/a.png", "b/a.png"):
        save(tmp_path / "mac" / name, gray(5))
    for name in ("\N{LATIN SMALL LETTER E WITH ACUTE}/a.png", "b/a.png"):
        save(tmp_path / "linux" / name, gray(5))
    assert read_images(tmp_path / "mac").classes == read_images(tmp_path / "linux").classes


# ---- StyleGAN's and EDM's dataset tools ----


def tool_folder(path, labels, shards=2, per_shard=6, prefix=""):
    """Images in shards as the tool numbers them, and its dataset.json; its file of labels."""
    names = [f"{i // per_shard:05d}/img{i:08d}.png" for i in range(shards * per_shard)]
    for i, name in enumerate(names):
        save(path / prefix / name, gray(i))
    if labels is not None:
        pairs = None
        if labels:
            pairs = [[name, labels[i % len(labels)]] for i, name in enumerate(names)]
        (path / prefix / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_labels_of_a_dataset_tool_are_in_its_json(tmp_path, packed):
    path = tool_folder(tmp_path / "edm", [2, 10, 3])
    images = read_images(zip_of(path) if packed else path)
    assert images.classes == ["2", "3", "10"]
    assert images.labels.tolist() == [0, 2, 1] * 4
    assert not any("ignored" in line for line in images.summary)


@pytest.mark.parametrize("labels", [None, []])
def test_shards_of_a_dataset_tool_are_no_classes(tmp_path, labels):
    images = read_images(tool_folder(tmp_path, labels))
    assert (images.classes, images.labels) == ([], None)


def test_splits_of_a_dataset_tool_have_a_json_each(tmp_path):
    tool_folder(tmp_path, [0, 1], prefix="train")
    tool_folder(tmp_path, [1, 0], prefix="test")
    dataset = load_dataset(str(tmp_path))
    assert dataset.train_labels.tolist() == [0, 1] * 6
    assert dataset.test_labels.tolist() == [1, 0] * 6


def test_folders_that_are_numbers_are_classes_without_the_tool(tmp_path):
    save_all(tmp_path, [f"{c:05d}/{c:05d}_{i}.png" for c in range(3) for i in range(3)])
    assert read_images(tmp_path).classes == ["00000", "00001", "00002"]


def test_images_that_the_json_does_not_label_are_said(tmp_path):
    path = tool_folder(tmp_path, [0, 1])
    save(path / "00001" / "img00000099.png", gray(9))
    images = read_images(path)
    assert images.classes == []
    assert any("no classes: 1 image without one" in line for line in images.summary)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "[]",
        '{"labels": 3}',
        '{"labels": [["00000/img00000000.png", true], ["a", 1e999], [[], 3], 4, ["b"]]}',
        '{"labels": [["00000/img00000000.png", -1], ["a", ' + "9" * 400 + "]]}",
        '{"other": 1}',
    ],
)
def test_json_of_another_kind_does_no_harm(tmp_path, content):
    path = tool_folder(tmp_path, None)
    (path / "dataset.json").write_text(content)
    assert read_images(path).classes == []


# ---- what this project wrote is no data ----


def write_run(folder):
    for name in ("loss.png", "samples/step_00000100.png"):
        save(folder / name, gray(200, (30, 30)))
    (folder / "log.csv").write_text("step,epoch,loss,grad_norm,lr,val_loss\n1,0,1,1,1,\n")
    (folder / "last.pth").touch()


def write_evaluation(folder):
    save(folder / "neighbors.png", gray(200, (30, 30)))
    for name in ("evaluation.json", "evaluation.html"):
        (folder / name).touch()


def write_samples(folder):
    save_all(folder, [f"{i:06d}.png" for i in range(5)])
    save(folder / "grid.png", gray(200, (30, 30)))
    (folder / "samples.npz").touch()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("write", "folder"),
    [
        (write_run, "checkpoints/digits"),
        (write_evaluation, "cat-evaluation"),
        (write_samples, "cat-samples"),
        (write_samples, "cat-samples-2"),
    ],
)
def test_folders_that_this_project_wrote_are_no_data(tmp_path, write, folder, packed):
    root = tmp_path / "photos"
    save_all(root, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)])
    before = load_dataset(str(root)).fingerprint
    write(root / folder)
    dataset = load_dataset(str(zip_of(root) if packed else root))
    assert dataset.fingerprint == before
    assert f"left out 1 folder that ddp wrote: {folder}" in dataset.summary


def test_folder_of_samples_may_be_a_dataset_by_itself(tmp_path):
    write_samples(tmp_path / "a-samples")
    (tmp_path / "a-samples" / "grid.png").unlink()
    assert len(read_images(tmp_path / "a-samples").items) == 5
    write_samples(tmp_path / "b" / "cat-samples")
    write_samples(tmp_path / "b" / "dog-samples")
    assert len(read_images(tmp_path / "b").items) == 12


def save_chart(path):
    text = PngInfo()
    text.add_text("Software", "ddp 0.5.0")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(90, 90)).save(path, pnginfo=text)
    return path


def test_grids_and_charts_are_no_data(tmp_path):
    save_all(tmp_path, [f"{i:06d}.png" for i in range(5)])
    save_chart(tmp_path / "grid.png")
    images = read_images(tmp_path, is_dataset=False)
    assert images.items.shape == (5, 1, 4, 4)  # the grid's size and color do not count either
    assert "left out 1 picture that ddp wrote" in images.summary
    assert len(read_images(tmp_path / "grid.png").items) == 1  # the very image that is asked for
    for path in tmp_path.glob("0*"):
        path.unlink()
    refused(OSError, "left out 1 picture", load_dataset, str(tmp_path))


def test_pictures_of_other_programs_are_data(tmp_path):
    for i, name in enumerate(("ddpaint 1.0", "Adobe ImageReady", "x ddp 1")):
        text = PngInfo()
        text.add_text("Software", name)
        Image.fromarray(gray(i)).save(tmp_path / f"{i}.png", pnginfo=text)
    (tmp_path / "log.csv").write_text("my,own,log\n")
    save(tmp_path / "mine" / "a.png", gray(5))
    (tmp_path / "mine" / "log.csv").write_text("step,epoch,accuracy\n")
    assert len(read_images(tmp_path).items) == 4


# ---- names in archives ----


def zip_entries(path, names, flags=0):
    """A .zip of gray images whose names are these bytes."""
    image = save(path.with_suffix(".png"), gray(5)).read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(f"{i:0{len(name)}d}", image)
    content = path.read_bytes()
    for i, name in enumerate(names):
        content = content.replace(b"%0*d" % (len(name), i), name)
    path.write_bytes(content)
    return path


def test_backslashes_in_a_zip_separate_folders(tmp_path):
    names = [f"{s}\\{c}\\{i}.png" for s in ("train", "test") for c in "ab" for i in range(3)]
    images = read_images(zip_entries(tmp_path / "w.zip", [name.encode() for name in names]))
    assert images.classes == ["a", "b"]
    assert sorted(images.splits.tolist()) == [TRAIN] * 6 + [TEST] * 6


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_accents_in_a_zip_are_those_of_its_writer(tmp_path, encoding):
    names = [f"{c}/{i}.png".encode(encoding) for c in ("bébé", "cat") for i in range(2)]
    assert read_images(zip_entries(tmp_path / "a.zip", names)).classes == ["bébé", "cat"]
