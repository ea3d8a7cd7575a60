"""Where a run is written and goes on from, where its data are: nothing there is ever overwritten,
and no path out of a stranger's file is followed."""

import json
import os
import platform
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ddp.config import Config
from ddp.data import Dataset, load_dataset
from ddp.io.checkpoint import checkpoint_state, strip_training_state, write_checkpoint
from ddp.io.run_dir import (
    accept_data,
    data_source,
    free_folders,
    require_same_data,
    resolve_run,
    take_folder,
)
from ddp.io.run_lock import RECORD, lock_folder, read_record, write_record
from ddp.training import Trainer

TINY = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 16}


def make_trainer(dataset="digits", **options):
    return Trainer(Config(dataset=dataset, **TINY, **options), load_dataset(dataset))


@pytest.fixture(scope="module")
def state():
    return checkpoint_state(make_trainer())


def put_checkpoint(folder, state, name="last.pth", step=0):
    return write_checkpoint(folder / name, state | {"step": step})


def put_images(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def put_record(folder, dataset, **change):
    """Write the run.json of a run on a dataset's path, as lock_folder's process would."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"host": platform.node(), "pid": 1, "dataset": str(dataset), "data_dir": "/data"}
    (folder / RECORD).write_text(json.dumps(record | change))


# ---- names ----


def test_a_run_is_named_after_its_dataset_and_numbered(tmp_path, state):
    for expected in ("digits", "digits-2", "digits-3"):
        config, folder, path, checkpoint = resolve_run({"out_dir": str(tmp_path)})
        assert folder == tmp_path / expected
        assert path is None
        assert checkpoint is None
        assert config.dataset == "digits"
        assert not folder.exists()
        put_checkpoint(folder, state)


def test_a_run_on_a_folder_is_named_after_it(tmp_path):
    images = tmp_path / "my images.v2"
    images.mkdir()
    options = {"dataset": str(images), "out_dir": str(tmp_path / "runs")}
    assert resolve_run(options)[1].name == "my images.v2"
    archive = tmp_path / "faces.zip"
    archive.touch()
    assert resolve_run(options | {"dataset": str(archive)})[1].name == "faces"
    assert resolve_run(options | {"dataset": "/"})[1].name == "data"  # it has no name


def test_a_named_run_is_not_overwritten(tmp_path, state):
    options = {"out_dir": str(tmp_path), "name": "a"}
    assert resolve_run(options)[1] == tmp_path / "a"
    put_checkpoint(tmp_path / "a", state)
    with pytest.raises(ValueError, match="name=a"):
        resolve_run(options)


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", [None, "digits"])
def test_a_run_killed_in_its_first_save_does_not_take_the_name(tmp_path, resume, name):
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "log.csv").write_text("step,loss\n1,0.5\n")
    for partial in (".last.0123456789abcdef.partial.pth", ".best.77.partial.pth"):
        (folder / partial).write_bytes(b"half a checkpoint")
    options = {"out_dir": str(tmp_path)} | ({"name": name} if name else {})
    assert resolve_run(options, resume)[1:] == (folder, None, None)


def test_the_name_of_a_run_cannot_leave_its_place(tmp_path):
    for name in ("..", ".", "a/b", "../a", "/a"):
        with pytest.raises(ValueError, match="name="):
            resolve_run({"out_dir": str(tmp_path), "name": name})


# ---- the lock ----


def test_a_folder_is_taken_by_one_process(tmp_path):
    folder = tmp_path / "a"
    with lock_folder(folder) as file:
        write_record(file, Config(dataset="digits"), load_dataset("digits"))
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on {platform.node()}"):
            lock_folder(folder)
        with pytest.raises(ValueError, match=r"name=a.*in use"):
            take_folder(folder)
        numbered, other = take_folder(folder, may_number=True)
        assert numbered == tmp_path / "a-2"
        other.close()
    with lock_folder(folder) as file:  # the record stays, the lock does not
        assert read_record(folder)["pid"] == os.getpid()
        assert read_record(folder)["items"] == {"train": 1437, "test": 360}
        write_record(file, Config(dataset="digits"), load_dataset("moons"))  # a longer one, at last
        assert read_record(folder)["items"]["train"] == 100_000


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    child = os.fork()
    if child == 0:
        lock_folder(tmp_path / "a")
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert (tmp_path / "a" / RECORD).exists()
    lock_folder(tmp_path / "a").close()


def test_a_folder_with_a_run_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "last.pth").touch()
    with pytest.raises(ValueError, match="resume="):
        take_folder(tmp_path / "a")

    def lock_after_another(folder):  # which began, and ended, since the folder was looked at
        file = lock_folder(folder)
        if folder.name == "b":
            (folder / "last.pth").touch()
        return file

    monkeypatch.setattr("ddp.io.run_dir.lock_folder", lock_after_another)
    folder, file = take_folder(tmp_path / "b", may_number=True)
    assert folder == tmp_path / "b-2"
    file.close()
    (tmp_path / "b" / "last.pth").unlink()
    with pytest.raises(ValueError, match="name=b"):
        take_folder(tmp_path / "b")


def test_a_link_that_was_planted_is_not_written_through(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / RECORD).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match=RECORD):
        lock_folder(tmp_path / "a")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"host": 3}', "\udcff", " " * (1 << 20)]
)
def test_a_record_that_is_none_says_nothing(tmp_path, text):
    (tmp_path / RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_record(tmp_path) == {}
    assert read_record(tmp_path / "nowhere") == {}


# ---- resume ----


def test_resume_takes_a_folder_or_a_file(tmp_path, state):
    run = tmp_path / "a"
    path = put_checkpoint(run, state, step=3)
    early = put_checkpoint(run, state, "step_00000003.pth", step=3)
    for resume, expected in ((run, path), (path, path), (early, early)):
        config, folder, found, checkpoint = resolve_run({"max_steps": 9}, str(resume))
        assert folder == run
        assert found == expected
        assert checkpoint["step"] == 3
        assert config.max_steps == 9
        assert config.channels_base == 8


def test_resume_of_a_file_in_the_present_folder_is_of_that_run(tmp_path, state, monkeypatch):
    put_checkpoint(tmp_path / "a", state)
    monkeypatch.chdir(tmp_path / "a")
    assert resolve_run({}, "last.pth")[1] == tmp_path / "a"
    assert resolve_run({"name": "b"}, "last.pth")[1] == tmp_path / "b"  # not a/b


def test_resume_auto_takes_the_newest_of_its_own(tmp_path, state):
    options = {"out_dir": str(tmp_path), "dataset": "digits"}
    assert resolve_run(options, "auto")[1:] == (tmp_path / "digits", None, None)
    for age, name in enumerate(["digits-2", "digits", "other", "digits-x"]):
        path = put_checkpoint(tmp_path / name, state)
        os.utime(path, (1000 - age, 1000 - age))
    os.utime(tmp_path / "other" / "last.pth", (5000, 5000))
    assert resolve_run(options, "auto")[1] == tmp_path / "digits-2"
    assert resolve_run(options | {"name": "digits"}, "auto")[1] == tmp_path / "digits"
    assert resolve_run(options | {"name": "new"}, "auto")[2] is None
    put_record(tmp_path / "digits-2", "/elsewhere/digits")  # a folder of that name
    assert resolve_run(options, "auto")[1] == tmp_path / "digits"


def test_resume_auto_without_a_dataset_takes_the_newest_of_all(tmp_path, state):
    cats = put_images(tmp_path / "photos" / "cats")
    runs = tmp_path / "runs"
    photographs = state | {"config": state["config"] | {"dataset": str(cats)}}
    put_record(runs / "cats", cats)
    path = put_checkpoint(runs / "cats", photographs)
    os.utime(put_checkpoint(runs / "digits", state), (1000, 1000))
    config, folder, found, _ = resolve_run({"out_dir": str(runs)}, "auto")
    assert folder == runs / "cats"
    assert found == path
    assert config.dataset == str(cats)


def test_resume_does_not_overwrite_a_later_checkpoint(tmp_path, state):
    put_checkpoint(tmp_path / "a", state, step=6)
    early = put_checkpoint(tmp_path / "a", state, "step_00000003.pth", step=3)
    with pytest.raises(ValueError, match=r"at step 3.*at step 6"):
        resolve_run({}, early)
    config, folder, path, _ = resolve_run({"name": "branch"}, early)
    assert folder == tmp_path / "branch"
    assert path == early
    assert config.name == "branch"
    put_checkpoint(folder, state)
    with pytest.raises(ValueError, match="name=branch"):
        resolve_run({"name": "branch"}, early)
    assert resolve_run({"out_dir": str(tmp_path / "b")}, early)[1] == tmp_path / "b" / "a"


def test_resume_passes_over_a_damaged_last_checkpoint(tmp_path, state):
    last = put_checkpoint(tmp_path / "a", state, step=6)
    early = put_checkpoint(tmp_path / "a", state, "step_00000003.pth", step=3)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(OSError, match="damaged"):
        resolve_run({}, tmp_path / "a")
    assert resolve_run({}, early)[1] == tmp_path / "a"
    last.unlink()
    with pytest.raises(OSError, match=r"step_00000003\.pth"):
        resolve_run({}, tmp_path / "a")


def test_resume_refuses_what_cannot_go_on(tmp_path, state):
    with pytest.raises(OSError, match="there is no checkpoint"):
        resolve_run({}, tmp_path / "nowhere")
    small = write_checkpoint(tmp_path / "a" / "model.pth", strip_training_state(state))
    with pytest.raises(OSError, match="stripped"):
        resolve_run({}, small)
    torch.save(state | {"best": "x"}, tmp_path / "b.pth")
    with pytest.raises(OSError, match="best"):
        resolve_run({}, tmp_path / "b.pth")
    path = put_checkpoint(tmp_path / "c", state)
    with pytest.raises(ValueError, match="channels_base=16"):
        resolve_run({"channels_base": 16}, path)
    with pytest.raises(ValueError, match="dataset=mnist"):
        resolve_run({"dataset": "mnist"}, path)


def test_free_folders_are_numbered_and_end_at_a_name(tmp_path):
    assert list(free_folders(tmp_path / "a")) == [tmp_path / "a"]
    names = free_folders(tmp_path / "a", may_number=True)
    assert [next(names).name for _ in range(3)] == ["a", "a-2", "a-3"]


# ---- the data of a checkpoint ----


def config_of(path, **options):
    return Config(dataset=str(path), **options)


def test_a_path_that_only_a_file_names_is_not_followed(tmp_path):
    cats = put_images(tmp_path / "cats")
    config = config_of(cats, data_dir="/usr")
    checkpoint = tmp_path / "runs" / "cats" / "last.pth"
    with pytest.raises(ValueError, match=rf"{cats}.*set dataset"):
        data_source(config, checkpoint)
    put_record(checkpoint.parent, cats, host="another")  # copied from elsewhere
    with pytest.raises(ValueError, match="set dataset"):
        data_source(config, checkpoint)
    put_record(checkpoint.parent, "/etc")  # of another run
    with pytest.raises(ValueError, match="set dataset"):
        data_source(config, checkpoint)
    named = data_source(config_of("mnist", data_dir="/usr"), tmp_path / "a.pth")
    assert named["name"] == "mnist"
    assert named["data_dir"] == "data"  # the default, not the file's


@pytest.mark.parametrize("stripped", [False, True])
def test_a_runs_own_folder_says_where_its_data_are(tmp_path, stripped):
    cats = put_images(tmp_path / "cats")
    checkpoint = tmp_path / "runs" / "cats" / "model.pth"
    put_record(checkpoint.parent, cats)
    config = config_of("cats" if stripped else cats, image_size=[8, 8], channels=1)
    assert data_source(config, checkpoint) == {
        "name": str(cats),
        "data_dir": "/data",
        "seed": 0,
        "image_size": [8, 8],
        "channels": 1,
        "test_fraction": None,
        "labels": None,
        "cache": None,
    }


def test_the_users_word_on_where_the_data_are_is_taken(tmp_path):
    cats = put_images(tmp_path / "cats")
    moved = put_images(tmp_path / "moved" / "cats")
    checkpoint = tmp_path / "runs" / "cats" / "last.pth"
    for own in (False, True):
        if own:
            put_record(checkpoint.parent, cats)
        for given in ({"dataset": str(moved)}, {"data_dir": moved}, {"data_dir": moved.parent}):
            assert data_source(config_of(cats), checkpoint, **given)["name"] == str(moved)
    mnist = data_source(config_of("mnist"), checkpoint, data_dir="here")
    assert (mnist["name"], mnist["data_dir"]) == ("mnist", "here")


def test_a_folder_that_is_called_as_a_dataset_is_not_that_dataset(tmp_path):
    mnist = put_images(tmp_path / "mnist")
    checkpoint = tmp_path / "runs" / "mnist" / "model.pth"
    put_record(checkpoint.parent, mnist)
    assert data_source(config_of("mnist"), checkpoint)["name"] == str(mnist)


def make_data(items, name="cats"):
    images = torch.arange(items * 64, dtype=torch.uint8).reshape(items, 1, 8, 8)
    return Dataset(name, images[2:], images[:2], classes=["a"])


def test_data_that_changed_are_told_apart_in_words(tmp_path):
    cats = put_images(tmp_path / "cats")
    before, after = make_data(10), make_data(11)
    state = {"provenance": {"fingerprint": before.fingerprint}}
    path = tmp_path / "runs" / "cats" / "last.pth"
    with lock_folder(path.parent) as file:
        write_record(file, config_of(cats), before)
    require_same_data(state, path, before)
    with pytest.raises(OSError, match=r"8 train items then, 9 now.*new_data"):
        require_same_data(state, path, after)
    shutil.copy(cats / "0.png", cats / "new.png")
    os.utime(cats / "new.png", (1000, 1000))  # of a photograph, when it was taken
    with pytest.raises(OSError, match=r"changed since.*new\.png"):
        require_same_data(state, path, after)
    (path.parent / RECORD).unlink()
    with pytest.raises(OSError, match=r"fingerprint .* then, .* now"):
        require_same_data(state, path, after)


def test_data_that_changed_can_be_gone_on_with():
    before, after = make_data(10), make_data(11)
    state = {"event": [1, 8, 8], "classes": ["a"], "best": 0.1}
    state["provenance"] = {"fingerprint": before.fingerprint}
    accept_data(state, after)
    require_same_data(state, "last.pth", after)
    assert state["best"] is None  # a loss on other items
    with pytest.raises(ValueError, match=r"event was \[1, 4, 4\]"):
        accept_data(state | {"event": [1, 4, 4]}, after)
    with pytest.raises(ValueError, match="classes"):
        accept_data(state | {"classes": ["a", "b"]}, after)
