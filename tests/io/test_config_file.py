"""config.json: a run that begins from another's repeats it, or varies what was asked for."""

import json
from dataclasses import asdict

import pytest

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.config_file import NAME, read_config, write_config
from ddp.io.spelling import did_you_mean


@pytest.fixture
def config():
    return Config(size="m", max_steps=7, name="mine").resolve(load_dataset("digits"))


@pytest.fixture
def file(tmp_path, config):
    write_config(tmp_path, {"size": "m", "max_steps": 7, "name": "mine"}, config)
    return tmp_path / NAME


def test_a_run_is_repeated_with_all_that_was_chosen(file, config):
    values, given = read_config(file, {})
    assert Config(**values) == Config(**{**asdict(config), "name": None})
    assert given == {"size": "m", "max_steps": 7}


@pytest.mark.parametrize("name", ["lr", "seed"])
def test_what_stands_alone_varies_alone(file, config, name):
    values, given = read_config(file, {name: 5})
    changed = {key for key, value in asdict(config).items() if values.get(key) != value}
    assert changed == {name, "name"}
    assert given[name] == 5


def test_what_follows_from_another_field_is_chosen_anew(file):
    values, _ = read_config(file, {"size": "s"})
    assert values == {"size": "s", "max_steps": 7}


def test_a_new_length_takes_the_place_of_the_old_one(file):
    values, _ = read_config(file, {"epochs": 2.0})
    assert values["epochs"] == 2.0
    assert not {"max_steps", "planned_steps"} & values.keys()


def test_a_file_may_hold_fields_alone_and_old_names(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"lr": 0.5, "width": 16}')
    assert read_config(path, {})[0] == {"lr": 0.5, "channels_base": 16}


def test_a_resumed_run_keeps_what_was_given(file, config):
    write_config(file.parent, {"max_steps": 9}, config)
    assert json.loads(file.read_text())["given"] == {"size": "m", "max_steps": 9, "name": "mine"}


def test_a_run_with_a_plugin_is_repeated_with_one(tmp_path, config):
    write_config(tmp_path, {"lr": 0.5}, config, ["mine.py"])
    assert read_config(tmp_path / NAME, {}, ["mine.py"])[1] == {"lr": 0.5}
    with pytest.raises(ValueError, match=r"that run had plugin=mine\.py; give it, too$"):
        read_config(tmp_path / NAME, {})


NO_CONFIGS = [
    "",
    "[3]",
    "{",
    '{"given": 3}',
    '{"given": {}, "chosen": []}',
    '{"given": {}, "plugin": 3}',
]


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_what_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / NAME
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no config.json of a run \(.+\)"):
        read_config(path, {})


def test_a_misspelled_field_is_told_from_the_nearest(tmp_path):
    path = tmp_path / NAME
    path.write_text('{"bach_size": 3}')
    with pytest.raises(ValueError, match="bach_size; did you mean batch_size"):
        read_config(path, {})
    with pytest.raises(OSError, match="there is no such file"):
        read_config(tmp_path / "nowhere.json", {})


def test_a_runs_folder_means_its_file_and_weights_to_start_with_stay(tmp_path, config):
    write_config(tmp_path, {"init_from": "a.pth"}, config)
    values, given = read_config(tmp_path, {"lr": 0.5})
    assert values["init_from"] == given["init_from"] == "a.pth"
    assert values["channels_base"] == config.channels_base


def test_nothing_is_meant_where_nothing_is_near():
    assert did_you_mean("--ephocs", ["--lr", "--epochs"]) == "; did you mean --epochs?"
    assert did_you_mean("--learning_rate", ["--lr", "--planned_steps"]) == ""
