"""Decoded images that are kept on the disk: the same as without, whole, current, and resumed."""

import errno
import itertools
import json
import os
import shutil
import signal
import threading
import time
import tracemalloc
import zipfile

import pytest
import torch
from data_checks import gray, noise, refused, save, save_all, zip_of

from ddp.config import Config
from ddp.data import cache as cache_module
from ddp.data import decode as decode_module
from ddp.data import load_dataset
from ddp.data.cache import HIDDEN_FOLDER, Cache, CacheStore
from ddp.data.decode import Memory, decode
from ddp.data.folder import list_images, read_images
from ddp.data.listing import digest_of, open_files
from ddp.data.mapped import Mapped
from ddp.training import Trainer


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 color images of two classes, one of which cannot be read."""
    for i in range(40):
        save(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02d}.png", noise(8, 8, seed=i))
    (tmp_path / "photos" / "cat" / "10.png").write_bytes(b"")
    return tmp_path / "photos"


@pytest.fixture
def short_parts(monkeypatch):
    """Decode four images at a time."""
    monkeypatch.setattr(decode_module, "MAX_PART", 4)


@pytest.fixture
def decoded(monkeypatch):
    """The parts that are decoded from now on, as their first numbers, in order."""
    starts = []
    real = decode_module.in_order

    def noting(submit, start, count, size, ahead):
        for part, pixels in real(submit, start, count, size, ahead):
            starts.append(part.stop)
            yield part, pixels

    monkeypatch.setattr(decode_module, "in_order", noting)
    return starts


def load(path, tmp_path, **options):
    return load_dataset(str(path), cache=str(tmp_path / "cache"), **options)


def entry_of(tmp_path, folder="cache"):
    """The one cache there; fails when anything half-written is beside it."""
    names = [path for path in (tmp_path / folder).iterdir() if path.suffix != ".lock"]
    (entry,) = names
    assert not entry.name.startswith(".")
    return entry


def same(cached, plain):
    """Whether two Datasets are the same to the last bit; the first one lies on the disk."""
    assert isinstance(cached.train, Mapped)
    assert cached.fingerprint == plain.fingerprint
    assert cached.classes == plain.classes
    assert [line for line in cached.summary if "decoded" not in line] == plain.summary
    for name in ("train", "val", "test"):
        items = getattr(plain, name)
        labels, expected = getattr(cached, f"{name}_labels"), getattr(plain, f"{name}_labels")
        assert (labels is None) == (expected is None)
        assert labels is None or torch.equal(labels, expected)
        assert items is None or torch.equal(getattr(cached, name)[:], items)
    return True


# ---- the same as without ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"image_size": (5, 6), "channels": 1}])
def test_cached_dataset_is_the_dataset(photos, tmp_path, decoded, packed, options):
    path = zip_of(photos) if packed else photos
    plain = load_dataset(str(path), **options)
    first = load(path, tmp_path, **options)
    assert same(first, plain)
    assert first.known_fingerprint == plain.fingerprint
    assert first.batch(1, 7, 16)[0].equal(plain.batch(1, 7, 16)[0])
    decoded.clear()
    again = load(path, tmp_path, **options)
    assert same(again, plain)
    assert not decoded
    assert f"in {entry_of(tmp_path)}" in again.summary[-1]


def test_training_on_a_cache_has_the_same_bits(photos, tmp_path, small_bn_batches):
    states = []
    for cache in (None, str(tmp_path / "cache")):
        config = Config(
            dataset=str(photos), cache=cache, batch_size=8, channels_base=8, max_steps=3
        )
        dataset = load_dataset(**config.data_options())
        trainer = Trainer(config.resolve(dataset), dataset)
        for _ in range(3):
            trainer.train_step(0.0)
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_split_is_asked_for_anew(photos, tmp_path, decoded):
    """Another test_fraction takes no other cache, and has a fingerprint of its own."""
    known = [load(photos, tmp_path, test_fraction=f).known_fingerprint for f in (None, 0.5, None)]
    assert known[0] == known[2] != known[1]
    assert known[1] == load_dataset(str(photos), test_fraction=0.5).fingerprint
    assert len(json.loads((entry_of(tmp_path) / "fingerprints.json").read_text())) == 2


def test_splits_and_missing_labels_are_kept(tmp_path):
    save_all(tmp_path / "data", [f"train/{c}/{i}.png" for c in "ab" for i in range(4)])
    save_all(tmp_path / "data", ["test/0.png", "test/1.png"])
    plain = load_dataset(str(tmp_path / "data"))
    assert plain.test_labels is None
    for _ in range(2):
        assert same(load(tmp_path / "data", tmp_path), plain)


def test_processes_and_threads_decode_alike(photos, monkeypatch, short_parts):
    monkeypatch.setattr(decode_module, "MIN_FOR_PROCESSES", 1 << 30)
    by_threads = read_images(photos)
    monkeypatch.setattr(decode_module, "MIN_FOR_PROCESSES", 0)
    by_processes = read_images(photos)
    assert torch.equal(by_threads.items, by_processes.items)
    assert by_threads.summary == by_processes.summary


@pytest.mark.parametrize("odd", [noise(8, 8), gray(9, (12, 8)), noise(3, 4)])
@pytest.mark.parametrize("cached", [False, True])
def test_an_image_that_disproves_the_shape_begins_it_anew(
    tmp_path, monkeypatch, short_parts, odd, cached
):
    save_all(tmp_path / "data", [f"{i:02d}.png" for i in range(30)])
    save(tmp_path / "data" / "20.png", odd)
    expected = read_images(tmp_path / "data").items
    monkeypatch.setattr(decode_module, "PROBED", 1)
    store = Memory()
    if cached:
        store = CacheStore(Cache(tmp_path / "data", tmp_path / "cache"))
        store.cache.folder.mkdir()
    with open_files(tmp_path / "data") as (files, _):
        shape, done = decode(files, sorted(files), None, None, False, store)
    assert shape == tuple(expected.shape[1:]) != (1, 4, 4)
    assert done.seen.count == len(expected)
    if not cached:
        assert torch.equal(store.items(), expected)


# ---- the next start ----


@pytest.mark.parametrize("change", ["new", "gone", "content", "time", "labels"])
def test_files_that_have_changed_are_decoded_again(photos, tmp_path, change):
    load(photos, tmp_path)
    path = photos / "cat" / "02.png"
    if change == "new":
        save(photos / "cat" / "99.png", noise(8, 8, seed=99))
    elif change == "gone":
        path.unlink()
    elif change == "content":
        save(path, noise(8, 8, seed=77))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    else:
        (photos / "dataset.json").write_text(json.dumps({"labels": [["cat/02.png", 5]]}))
    changed = load(photos, tmp_path)
    assert same(changed, load_dataset(str(photos)))
    assert f"{photos} has changed since it was decoded: decoded again" in changed.summary
    assert not any("has changed since" in line for line in load(photos, tmp_path).summary)
    assert entry_of(tmp_path)


def test_digest_is_of_names_sizes_and_times_and_not_of_hidden_files(photos):
    before = digest_of(photos)
    (photos / ".DS_Store").write_text("x")
    assert digest_of(photos) == before
    (photos / "dog" / "01.png").rename(photos / "dog" / "00.png")
    assert digest_of(photos) != before


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("images.npy", lambda content: content[:-1]),
        ("images.npy", lambda content: b""),
        ("images.npy", lambda content: content.replace(b"|u1", b"|i1")),
        ("cache.json", lambda content: content[: len(content) // 2]),
        ("cache.json", lambda content: b"[]"),
        ("labels.npy", lambda content: content[:99]),
        ("labels.npy", lambda content: content[:-4] + b"\2\0\0\0"),
        ("labels.npy", None),
    ],
)
def test_damaged_cache_is_made_again(photos, tmp_path, file, damage):
    load(photos, tmp_path)
    path = entry_of(tmp_path) / file
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    again = load(photos, tmp_path)
    assert same(again, load_dataset(str(photos)))
    assert any("is damaged: decoded again" in line for line in again.summary)
    assert same(load(photos, tmp_path), load_dataset(str(photos)))


def test_without_the_option_only_many_are_kept_beside_the_data(photos, tmp_path, monkeypatch):
    plain = load_dataset(str(photos))
    assert isinstance(plain.train, torch.Tensor)
    assert not (tmp_path / HIDDEN_FOLDER).exists()
    monkeypatch.setattr(cache_module, "MAX_BYTES_IN_MEMORY", 40 * 3 * 8 * 8 - 1)
    kept = load_dataset(str(photos))
    assert same(kept, plain)
    assert entry_of(tmp_path, HIDDEN_FOLDER)
    monkeypatch.undo()
    assert same(load_dataset(str(photos)), plain)  # what is there is used


# ---- a kill, and many at once ----


@pytest.mark.parametrize("by_processes", [False, True])
def test_decoding_that_was_killed_goes_on(
    photos, tmp_path, monkeypatch, short_parts, decoded, by_processes
):
    if by_processes:
        monkeypatch.setattr(decode_module, "MIN_FOR_PROCESSES", 0)
    child = os.fork()
    if not child:
        add = CacheStore.add

        def killed(self, part, pixels):
            if part.stop == 24:
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, part, pixels)

        CacheStore.add = killed
        load(photos, tmp_path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with open(Cache(photos, tmp_path / "cache").partial / "progress.jsonl", "a") as file:
        file.write('{"stop": 24, "se')  # the kill may come while it is written
    cached = load(photos, tmp_path)
    assert decoded[0] == 24
    assert same(cached, load_dataset(str(photos)))
    assert entry_of(tmp_path)


@pytest.mark.parametrize("change", ["files", "record", "images"])
def test_parts_of_other_files_or_damaged_ones_are_not_used(
    photos, tmp_path, monkeypatch, short_parts, decoded, change
):
    interrupt_after(monkeypatch, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        load(photos, tmp_path)
    monkeypatch.undo()
    (partial,) = (tmp_path / "cache").glob(".*.partial")
    if change == "files":
        save(photos / "cat" / "02.png", noise(8, 8, seed=77))
    elif change == "record":
        (partial / "progress.jsonl").write_bytes(b"\xff\xfe")
    else:
        os.truncate(partial / "images.npy", 1000)
    assert same(load(photos, tmp_path), load_dataset(str(photos)))


def interrupt_after(monkeypatch, parts, error):
    """From now on the part of this number raises an error when it is written."""
    numbers = itertools.count()
    add = CacheStore.write_line

    def failing(self, text):
        if next(numbers) == parts:
            raise error
        add(self, text)

    monkeypatch.setattr(CacheStore, "write_line", failing)


def test_of_many_at_once_one_decodes(photos, tmp_path, monkeypatch):
    opened, results = [], []
    begin = CacheStore.begin
    ready = threading.Barrier(3)

    def slow_begin(self, *args):
        opened.append(self)
        time.sleep(0.1)  # for the others to come
        return begin(self, *args)

    def work():
        ready.wait()
        results.append(load(photos, tmp_path).fingerprint)

    monkeypatch.setattr(CacheStore, "begin", slow_begin)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    assert results == [load_dataset(str(photos)).fingerprint] * 3


class Bar:
    """A progress bar as tqdm has it, which notes what it says."""

    def __init__(self, said):
        self.said = said

    def __call__(self, desc, **_):
        self.said.append(desc)
        return self

    def update(self, count):
        self.said.append(count)

    def close(self):
        pass


def test_what_is_waited_for_is_said(photos, tmp_path, short_parts):
    said = []
    with Cache(photos, tmp_path / "cache").lock():
        thread = threading.Thread(
            target=load, args=(photos, tmp_path), kwargs={"progress": Bar(said)}
        )
        thread.start()
        while not said:
            time.sleep(0.01)
    thread.join()
    assert said[:2] == ["waiting for another process that decodes photos", "decoding"]
    assert sum(said[2:]) == 40


# ---- what cannot be done ----


def test_cache_within_the_data_is_refused(photos):
    for place in (photos, photos / "cat", photos / "new"):
        refused(ValueError, "lies within", load_dataset, str(photos), cache=str(place))
    assert not (photos / "new").exists()


def test_place_that_cannot_be_written_is_named(photos, tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file")
    assert place in refused(OSError, "cannot be written", load_dataset, str(photos), cache=place)


def test_full_disk_is_told_before_anything_is_decoded(photos, tmp_path, monkeypatch, decoded):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(OSError, "7,680 bytes are needed, 1,000 are free", load, photos, tmp_path)
    assert not decoded
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_disk_that_fills_up_leaves_nothing_behind(photos, tmp_path, monkeypatch, short_parts):
    interrupt_after(monkeypatch, 5, OSError(errno.ENOSPC, "No space left on device"))
    refused(OSError, "No space left on device", load, photos, tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    monkeypatch.undo()
    assert same(load(photos, tmp_path), load_dataset(str(photos)))


def test_cache_that_others_made_is_only_read(photos, tmp_path, monkeypatch):
    load(photos, tmp_path)
    entry = entry_of(tmp_path)
    (entry / "fingerprints.json").unlink()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache_module, "atomic_write", refuse)
    monkeypatch.setattr(Cache, "lock", refuse)
    assert same(load(photos, tmp_path), load_dataset(str(photos)))


def test_memory_that_an_image_takes_is_that_of_its_name(tmp_path):
    """No object is kept for each image but its name; with zipfile's, it would be 900 bytes."""
    count = 5000
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(count):
            archive.writestr(f"class_{i % 10}/{i:08d}.png", b"")
    tracemalloc.start()
    try:
        with open_files(tmp_path / "a.zip") as (files, others):
            assert (
                len(list_images(tmp_path / "a.zip", files, others, is_dataset=True).names) == count
            )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / count < 400
