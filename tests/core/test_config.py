"""The hyper-parameters: what contradicts, what is chosen for the data, how long a run is."""

import dataclasses
import math
from types import FunctionType, SimpleNamespace

import pytest
import torch
from tiny import random_points

from ddp.config import RESUMABLE_FIELDS, Config, resume_config
from ddp.data import load_dataset
from ddp.model import build_model
from ddp.options import SamplerOptions, count_or_auto, expected
from ddp.presets import (
    FEW_DROPOUT,
    FEW_ITEMS,
    OLD_NAMES,
    OLD_VALUES,
    PRESETS,
    PURPOSES,
    SIZES,
)
from ddp.reverse import MLP, NETWORKS, UNet

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
MANY = range(1000)  # training items
IMAGES = SimpleNamespace(
    classes=["a", "b"],
    train=MANY,
    train_labels=[0, 1],
    is_image=True,
    is_pixels=True,
    event=(1, 8, 8),
)
POINTS = SimpleNamespace(
    classes=[],
    train=MANY,
    train_labels=None,
    is_image=False,
    is_pixels=False,
    event=(2,),
    units=None,
)
HUGE = 10**400  # more than a float holds


def test_fields_are_documented_and_within_their_own_bounds():
    config = Config()
    for name, field in FIELDS.items():
        assert len(field.metadata["help"]) > 8, name
        value = getattr(config, name)
        assert value is None or expected(field, value) is None, name


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset": ""},
        {"data_dir": 3},
        {"image_size": [0, 8]},
        {"channels": 0},
        {"test_fraction": 0.6},
        {"epochs": 0},
        {"max_steps": 0},
        {"max_minutes": -1.0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"batch_size": 0},
        {"optimizer": "sgd"},
        {"lr_schedule": "exponential"},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"grad_clip": -1.0},
        {"grad_accumulation": 0},
        {"noise_copies": 65},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"seed": 2**32},
        {"precision": "fp64"},
        {"compile": "yes"},
        {"schedule": "cubic"},
        {"timesteps": -1},
        {"shift": 0.0},
        {"noise_dist": "normal"},  # an old name
        {"network": "vit"},
        {"channels_base": 4},
        {"blocks_per_level": 0},
        {"channel_mult": []},
        {"channel_mult": [1] * 9},
        {"patch_size": 0},
        {"attention_resolutions": [0]},
        {"norm": "layer"},
        {"activation": "gelu"},
        {"negative_slope": 1.5},
        {"dropout": 0.95},
        {"init": "orthogonal"},
        {"label_dropout": 1.5},
        {"prediction": "score"},
        {"weighting": "bound"},  # an old name
        {"loss": "l2"},
        {"save_every": 0},
        {"keep_checkpoints": -1},
        {"sample_every": 0},
    ],
)
def test_config_names_what_is_out_of_bounds(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name}="):
        Config(**fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": "."}, "name"),
        ({"name": ".."}, "name"),
        ({"batch_size": 1}, "batch_size"),
        ({"shards": 3}, "power of two"),
        ({"shards": 8, "batch_size": 12}, "shards=8 does not divide batch_size=12"),
        ({"shards": 16, "batch_size": 16}, "BatchNorm one item"),
        ({"label_dropout": 0.2}, "label_dropout"),
        ({"negative_slope": 0.2, "activation": "relu"}, "negative_slope"),
        ({"schedule": "learned", "timesteps": 10}, "timesteps"),
        ({"schedule": "learned", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"schedule": "learned", "noise_dist": "uniform"}, "noise_dist"),
        ({"schedule": "learned", "weighting": "v"}, "weighting"),
        ({"schedule": "learned", "loss": "l1"}, "loss"),
        ({"zero_terminal_snr": True, "prediction": "eps"}, "prediction"),
        ({"zero_terminal_snr": True, "timesteps": 1}, "timesteps"),
        ({"zero_terminal_snr": True, "weighting": "vlb"}, "weighting"),
        ({"zero_terminal_snr": True, "noise_dist": "edm"}, "noise_dist"),
        ({"weighting": "vlb", "noise_dist": "lognormal"}, "noise_dist"),
        ({"weighting": "vlb", "noise_dist": "edm"}, "noise_dist"),
    ],
)
def test_config_refuses_what_contradicts(fields, name):
    with pytest.raises(ValueError, match=name):
        Config(**fields)


NUMBERS = [name for name, field in FIELDS.items() if field.metadata["kind"] in (int, float)]
LISTS = [name for name, field in FIELDS.items() if isinstance(field.metadata["kind"], FunctionType)]


@pytest.mark.parametrize("name", NUMBERS + LISTS)
@pytest.mark.parametrize("value", [1e308, 1e38, HUGE, -HUGE, 10**5000], ids=range(5))
def test_config_refuses_numbers_without_limit(name, value):
    """In one short line, though Python itself cannot print them all."""
    kind = FIELDS[name].metadata["kind"]
    value = int(value) if kind is int else value
    with pytest.raises(ValueError, match=rf"^{name}=.{{1,200}}$"):
        Config(**{name: [value] if name in LISTS else value})


@pytest.mark.parametrize("name", ["dataset", "data_dir", "out_dir", "name", "device", "schedule"])
def test_config_refuses_texts_without_limit(name):
    with pytest.raises(ValueError, match=rf"^{name}=.{{1,200}}$"):
        Config(**{name: "x" * 10**6})


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "x" * 201])
def test_config_refuses_a_name_that_no_terminal_should_show(name):
    with pytest.raises(ValueError, match=r"^name="):
        Config(name=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"grad_accumulation": 10**9},
        {"batch_size": 2**20, "grad_accumulation": 32},
        {"batch_size": 2**20, "noise_copies": 64},
        {"batch_size": 2**10, "grad_accumulation": 2**10, "noise_copies": 32},
    ],
)
def test_config_refuses_a_step_of_endless_work(fields):
    with pytest.raises(ValueError, match=r"grad_accumulation=\d+"):
        Config(**fields)


def test_the_longest_run_that_is_allowed_has_a_number_of_steps():
    assert Config(epochs=2.0**53, batch_size=2).num_steps(10**6) > 0


def test_config_takes_a_batch_of_one_where_no_batchnorm_is():
    assert Config(batch_size=1, norm="group").batch_size == 1


@pytest.mark.parametrize(
    ("fields", "weighting", "timesteps"),
    [
        ({}, "v", 1000),
        ({"prediction": "eps"}, "snr", 1000),
        ({"prediction": "x0"}, "min_snr", 1000),
        ({"prediction": "flow", "timesteps": 0}, "flow", 0),
        ({"schedule": "learned"}, "vlb", 0),
        ({"weighting": "p2"}, "p2", 1000),
    ],
)
def test_config_chooses_the_weighting_and_timesteps(fields, weighting, timesteps):
    config = resolved("mnist", **fields)
    assert config.weighting == weighting
    assert config.timesteps == timesteps


@pytest.mark.parametrize(
    ("fields", "prediction", "weighting"),
    [
        ({}, "edm", "min_snr"),
        ({"prediction": "v"}, "v", "v"),
        ({"weighting": "snr"}, "v", "snr"),  # the preset's goes with its own weighting
        ({"schedule": "learned"}, "v", "vlb"),
    ],
)
def test_prediction_of_a_preset_goes_with_its_weighting(fields, prediction, weighting):
    config = resolved("digits", **fields)
    assert (config.prediction, config.weighting) == (prediction, weighting)


@pytest.mark.parametrize(
    ("fields", "noise_dist"),
    [
        ({"dataset": "mnist"}, "lognormal"),
        ({"dataset": "some/folder"}, "lognormal"),
        ({"dataset": "digits"}, "stratified"),
        ({"dataset": "digits", "noise_dist": "lognormal"}, "lognormal"),
        ({"dataset": "mnist", "schedule": "linear"}, "stratified"),
        ({"dataset": "mnist", "schedule": "linear", "noise_dist": "lognormal"}, "lognormal"),
        ({"dataset": "mnist", "weighting": "vlb"}, "stratified"),
    ],
)
def test_resolve_chooses_the_noise_dist_for_the_data(fields, noise_dist):
    assert Config(**fields).resolve(IMAGES).noise_dist == noise_dist


@pytest.mark.parametrize("dataset", [*PRESETS, "elsewhere/folder", "moons"])
@pytest.mark.parametrize("data", [IMAGES, POINTS])
def test_resolve_leaves_nothing_open(dataset, data):
    if dataset in ("images", "sequences", "points"):  # kinds of data, not datasets
        return
    kind = "images" if data.is_image else "points"
    if (dataset == "moons") != (kind == "points"):
        return
    config = Config(dataset=dataset).resolve(data)
    preset = PRESETS.get(dataset, PRESETS[kind])
    for name, value in preset.items():
        assert getattr(config, name) == value
    assert config.network == ("unet" if data.is_image else "mlp")
    limits = {"epochs", "max_steps", "max_minutes"}
    of_folders = {"image_size", "channels", "test_fraction", "labels", "cache"}
    of_output = {"name", "save_every", "sample_every", "planned_steps"}
    for name in FIELDS.keys() - limits - of_folders - of_output:
        assert getattr(config, name) is not None, name
    assert config.resolve(data) == config


def test_resolve_keeps_what_was_chosen():
    chosen = {
        "channels_base": 24,
        "blocks_per_level": 2,
        "channel_mult": [1, 3],
        "patch_size": 4,
        "noise_copies": 5,
        "noise_dist": "uniform",
    }
    config = Config(dataset="mnist", **chosen).resolve(IMAGES)
    assert {name: getattr(config, name) for name in chosen} == chosen


def test_resolve_trains_points_in_fp32():
    assert Config(dataset="moons").resolve(POINTS).precision == "fp32"
    assert Config(dataset="moons", precision="bf16").resolve(POINTS).precision == "bf16"
    assert Config().resolve(IMAGES).precision == "auto"


@pytest.mark.parametrize(
    ("fields", "data", "name"),
    [
        ({"class_cond": True}, POINTS, "class_cond"),
        ({"attention_resolutions": [4]}, POINTS, "attention_resolutions"),
        ({"patch_size": 2}, POINTS, "patch_size"),
        ({"channel_mult": [1, 2]}, POINTS, "channel_mult"),
    ],
)
def test_resolve_refuses_what_the_data_cannot_do(fields, data, name):
    with pytest.raises(ValueError, match=name):
        Config(**fields).resolve(data)


def test_resolve_refuses_class_names_without_labels():
    """They are of a test set, or of nothing."""
    data = SimpleNamespace(classes=["a", "b"], train_labels=None, train=MANY, is_image=True)
    with pytest.raises(ValueError, match="class_cond"):
        Config(class_cond=True).resolve(data)


@pytest.mark.parametrize("event", [(2,), (1, 8, 8)])
def test_model_of_a_config_that_leaves_sizes_open_is_refused_by_name(event):
    with pytest.raises(ValueError, match=r"^channels_base=None: give it, or call config.resolve"):
        build_model(Config(), event)


def test_network_options_are_those_of_the_networks():
    for event, data in (((1, 8, 8), IMAGES), ((2,), POINTS)):
        config = Config(channels_base=16).resolve(data)
        assert config.network_options().keys() <= FIELDS.keys()
        network = NETWORKS[config.network](event, 0, **config.network_options())
        assert isinstance(network, UNet if data.is_image else MLP)


def test_data_options_are_those_of_load_dataset():
    options = Config(dataset="moons", data_dir="x", seed=4).data_options()
    assert options == {
        "name": "moons",
        "data_dir": "x",
        "seed": 4,
        "image_size": None,
        "channels": None,
        "test_fraction": None,
        "labels": None,
        "cache": None,
    }


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 100 * 10),  # the default: 100 epochs, here of 10 batches
        ({"epochs": 3}, 30),
        ({"epochs": 0.25}, 3),  # rounded up
        ({"epochs": 3, "max_steps": 20}, 20),
        ({"epochs": 1, "max_steps": 20}, 10),
        ({"max_steps": 20}, 20),
        ({"max_minutes": 1.0}, None),
        ({"max_minutes": 1.0, "epochs": 3}, 30),
        ({"max_minutes": 1.0, "planned_steps": 17}, 17),
        ({"epochs": 3, "grad_accumulation": 4}, 8),
    ],
)
def test_num_steps_is_the_length_of_the_run(fields, steps):
    assert Config(batch_size=100, **fields).num_steps(1000) == steps


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, math.inf),
        ({"max_steps": 3, "max_minutes": 0.5}, 30),
        ({"max_minutes": 0.5, "planned_steps": 17}, math.inf),
    ],
)
def test_seconds_limit_cuts_off_what_no_clock_has_planned(fields, seconds):
    assert Config(**fields).seconds_limit() == seconds


@pytest.mark.parametrize("fields", [{}, {"max_minutes": 1.0, "epochs": 3.0}, {"max_steps": 3}])
def test_planned_steps_are_of_a_run_by_minutes_alone(fields):
    with pytest.raises(ValueError, match="planned_steps"):
        Config(planned_steps=17, **fields)


# ---- a resumed run, and old names ----


@pytest.mark.parametrize("name", sorted(RESUMABLE_FIELDS))
def test_resume_config_takes_what_may_change(name):
    new = {
        str: "other",
        int: 7,
        float: 0.5,
        bool: True,
        count_or_auto: 4,
    }[FIELDS[name].metadata["kind"]]
    if FIELDS[name].metadata["choices"]:
        new = list(FIELDS[name].metadata["choices"])[-1]
    config = resume_config(Config(max_minutes=2.0), {name: new})
    assert getattr(config, name) == new


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - RESUMABLE_FIELDS))
def test_resume_config_refuses_what_makes_another_run(name):
    config = Config()
    assert resume_config(config, {name: getattr(config, name)}) == config  # the same may be said
    with pytest.raises(ValueError, match=rf"^{name}="):
        resume_config(config, {name: "something else"})


def test_resume_config_keeps_the_shards_that_were_found():
    """A job that is started again with shards=auto goes on as it began."""
    assert resume_config(Config(shards=4), {"shards": 0}).shards == 4


def test_resume_config_puts_a_new_limit_in_the_place_of_the_old():
    config = resume_config(Config(epochs=5, max_minutes=3.0), {"max_steps": 10})
    assert (config.epochs, config.max_steps, config.max_minutes) == (None, 10, None)
    assert resume_config(Config(epochs=5), {"lr": 0.1}).epochs == 5


def test_resume_config_keeps_the_plan_of_the_same_minutes():
    planned = Config(max_minutes=2.0, planned_steps=17)
    assert resume_config(planned, {}) == planned
    assert resume_config(planned, {"max_minutes": 2.0}) == planned
    assert resume_config(planned, {"max_minutes": 3.0}) == Config(max_minutes=3.0)
    assert resume_config(planned, {"max_steps": 9}) == Config(max_steps=9)
    assert resume_config(planned, {"max_minutes": 2.0, "epochs": 1.0}).planned_steps is None


def test_resume_config_drops_compile():
    """It may not work on this machine."""
    assert not resume_config(Config(compile=True), {}).compile
    assert resume_config(Config(), {"compile": True}).compile


def test_old_names_stand_for_fields():
    new = FIELDS.keys() | {field.name for field in dataclasses.fields(SamplerOptions)}
    assert set(OLD_NAMES.values()) <= new
    assert not OLD_NAMES.keys() & new  # an old name means one thing only


def test_old_values_stand_for_choices():
    fields = dict(FIELDS)
    for field in dataclasses.fields(SamplerOptions):
        fields[field.name] = field
    for name, values in OLD_VALUES.items():
        choices = fields[name].metadata["choices"]
        assert set(values.values()) <= set(choices), name
        assert not values.keys() & set(choices), name


def test_config_of_a_dataset_of_ones_own():
    data = random_points(classes=3)
    config = Config(dataset="mine", class_cond=True).resolve(data)
    assert config.network == "mlp"
    assert config.noise_copies == PRESETS["points"]["noise_copies"]


# ---- size and purpose ----

KINDS = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "some/folder": (3, 32, 32),
    "some/series.npy": (2, 500),
    "moons": (2,),
}


def resolved(dataset, **fields):
    """Return the Config that is chosen for a dataset."""
    data = SimpleNamespace(classes=[], train_labels=None, train=MANY, event=KINDS[dataset])
    return Config(dataset=dataset, **fields).resolve(data)


def num_params(config):
    with torch.device("meta"):
        model = build_model(config, KINDS[config.dataset])
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("dataset", KINDS)
def test_a_larger_size_is_a_larger_network(dataset):
    small, middle, large = (num_params(resolved(dataset, size=size)) for size in "sml")
    assert 3.5 * small < middle < 4.5 * small  # twice as wide
    assert 2 * middle < large


def test_size_s_is_the_preset_and_the_default():
    for dataset in KINDS:
        assert resolved(dataset, size="s") == resolved(dataset)
    assert num_params(resolved("mnist")) == 608_804  # that of before there were sizes
    assert num_params(resolved("some/folder")) == 1_057_324


def test_few_images_get_dropout():
    few = SimpleNamespace(**vars(IMAGES) | {"train": range(FEW_ITEMS - 1)})
    assert Config(dataset="some/folder").resolve(few).dropout == FEW_DROPOUT
    assert Config(dataset="some/folder", dropout=0.0).resolve(few).dropout == 0
    few.train = range(FEW_ITEMS)
    assert Config(dataset="some/folder").resolve(few).dropout == 0


def test_size_l_of_color_images_is_of_the_class_of_ddpm():
    """35.7 M weights, Ho et al. 2020, appendix B."""
    config = resolved("some/folder", size="l")
    assert 34e6 < num_params(config) < 37e6
    assert config.attention_resolutions == [16]
    assert (config.dropout, config.patch_size) == (0.1, 1)


@pytest.mark.parametrize(
    ("event", "attention"),
    [
        ((3, 32, 32), [16]),
        ((3, 100, 64), [16]),
        ((3, 48, 48), [12]),
        ((3, 30, 45), [16]),  # padded to 32
        ((3, 256, 256), []),  # the smallest map is 32
    ],
)
def test_attention_of_a_size_is_on_the_largest_map_of_at_most_16(event, attention):
    data = SimpleNamespace(classes=[], train_labels=None, train=MANY, event=event)
    config = Config(dataset="mine", size="l").resolve(data)
    assert config.attention_resolutions == attention
    with torch.device("meta"):
        build_model(config, event)  # raises where the maps have no such side


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.0},
        {"attention_resolutions": []},
        {"attention_resolutions": [8]},
        {"channels_base": 32},
        {"channel_mult": [1, 2]},
        {"patch_size": 2, "blocks_per_level": 1},
    ],
)
def test_a_field_that_is_given_wins_over_the_size(fields):
    config = resolved("some/folder", size="l", **fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
    assert num_params(config) != num_params(resolved("some/folder"))


def test_a_preset_of_ones_own_is_changed_by_size_as_its_kind(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", PRESETS["images"] | {"noise_copies": 3})
    data = SimpleNamespace(classes=[], train_labels=None, train=MANY, event=(3, 32, 32))
    config = Config(dataset="mine", size="m").resolve(data)
    assert config.noise_copies == 3
    assert config.channels_base == SIZES["m"]["images"]["channels_base"]


def test_a_preset_may_set_what_has_a_fallback(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", PRESETS["images"] | {"lr": 0.5, "ema_decay": 0.25})
    data = SimpleNamespace(classes=[], train_labels=None, train=MANY, event=(3, 32, 32))
    config = Config(dataset="mine").resolve(data)
    assert (config.lr, config.ema_decay) == (0.5, 0.25)
    assert Config(dataset="mine", lr=1e-3).resolve(data).lr == 1e-3  # given, though the fallback
    assert (resolved("digits").lr, resolved("digits").ema_decay) == (1e-3, 0.999)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_change_what_presets_name(size):
    for dataset, changes in SIZES[size].items():
        assert dataset in PRESETS
        assert changes.keys() <= FIELDS.keys()


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("dataset", KINDS)
def test_a_purpose_fits_all_data(purpose, dataset):
    config = resolved(dataset, preset=purpose)
    for name, value in PURPOSES[purpose].items():
        assert getattr(config, name) == value
    assert num_params(config) > 0


def test_a_field_that_is_given_wins_over_the_purpose():
    config = resolved("mnist", preset="likelihood", schedule="cosine")
    assert (config.schedule, config.weighting, config.timesteps) == ("cosine", "v", 1000)


def test_likelihood_has_a_smaller_network_of_images_without_patches():
    config = resolved("mnist", preset="likelihood")
    assert (config.patch_size, config.fourier_features, config.schedule) == (1, 8, "learned")
    assert num_params(config) == 184_789
    larger = resolved("mnist", preset="likelihood", size="m")
    assert num_params(larger) > num_params(resolved("mnist", size="m"))


def test_likelihood_of_points_has_no_norm_unless_one_is_given():
    points = load_dataset("moons")
    small = {"dataset": "moons", "channels_base": 8}
    assert Config(**small).resolve(points).norm == "batch"
    assert Config(**small, preset="likelihood").resolve(points).norm == "none"
    assert Config(**small, preset="likelihood", norm="batch").resolve(points).norm == "batch"
