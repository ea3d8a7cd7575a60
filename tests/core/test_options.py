"""Typed options: what a field takes, and how samples are drawn when some of it is left open."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from oracles import Gaussian, OracleModel

from ddp.options import SamplerOptions, check_fields, flag, image_size, integers
from ddp.sampling import DEFAULT_SAMPLER, SAMPLERS, sample
from ddp.schedule import SPACINGS, Schedule

POINTS = OracleModel(Gaussian(event=(2,)), Schedule())
IMAGES = OracleModel(Gaussian(event=(1, 4, 4)), Schedule())
LABELED = OracleModel(Gaussian(event=(2,)), Schedule(), num_classes=3, has_null_label=True)


@dataclass
class Options:
    count: int = flag(3, "a number", at_least=1, at_most=9)
    rate: float = flag(0.5, "a rate", above=0, at_most=1)
    name: str = flag("a", "a choice", choices=("a", "b"))
    text: str = flag(None, "a text", str)
    on: bool = flag(False, "a switch")
    left_open: int = flag(None, "chosen later", int, at_least=1)
    sizes: list = flag([], "none or some", integers)
    chosen_sizes: list = flag(None, "some", integers)
    interval: list = flag(None, "two numbers", float, count=2)

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"count": 1},
        {"count": 9},
        {"rate": 1},  # a whole number is a number
        {"rate": 1e-9},
        {"name": "b"},
        {"on": True},
        {"left_open": 2},
        {"sizes": [4, 8]},
        {"chosen_sizes": [1]},
        {"interval": [-1, 2.5]},
    ],
)
def test_check_fields_takes_what_is_within_bounds(fields):
    options = Options(**fields)
    for name, value in fields.items():
        assert getattr(options, name) == value


@pytest.mark.parametrize(
    "fields",
    [
        {"count": 0},
        {"count": 10},
        {"count": 2.5},
        {"count": True},
        {"count": "3"},
        {"count": None},
        {"rate": 0},
        {"rate": 1.5},
        {"rate": math.nan},
        {"rate": math.inf},
        {"rate": False},
        {"name": "c"},
        {"name": 3},
        {"on": 1},
        {"left_open": 0},
        {"left_open": "x"},
        {"sizes": [0]},
        {"sizes": [2.5]},
        {"sizes": 4},
        {"sizes": [1] * 9},
        {"chosen_sizes": []},
        {"interval": [1.0]},
        {"interval": [1.0, math.inf]},
        {"interval": 1.0},
        {"left_open": 10**400},
        {"sizes": [10**5000]},
        {"sizes": [2**13 + 1]},
        {"interval": [0, 1e308]},
        {"interval": [0, 10**400]},
        {"text": "x" * 10**6},
    ],
)
def test_check_fields_names_what_is_out_of_bounds(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name}=.{{1,200}}$"):
        Options(**fields)


def test_flag_gives_each_object_a_list_of_its_own():
    one = Options()
    one.sizes.append(4)
    assert Options().sizes == []


@pytest.mark.parametrize(
    ("text", "expected"), [("4,8", [4, 8]), ("4 8", [4, 8]), ("4, 8", [4, 8]), ("", []), (7, [7])]
)
def test_integers_reads_commas_and_spaces(text, expected):
    assert integers(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("28", [28, 28]), ("30x45", [30, 45]), (8, [8, 8])])
def test_image_size_reads_one_side_or_two(text, expected):
    assert image_size(text) == expected


@pytest.mark.parametrize("text", ["0", "1x2x3", "x", "a", "-3"])
def test_image_size_refuses(text):
    with pytest.raises(ValueError):  # noqa: PT011, the command line says what was expected
        image_size(text)


# ---- SamplerOptions ----


def test_sampler_options_are_documented():
    for field in dataclasses.fields(SamplerOptions):
        assert len(field.metadata["help"]) > 8


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sampler": "dpm++"}, "sampler"),  # an old name, which only the command line knows
        ({"steps": 10**7}, "steps"),
        ({"steps": -(10**5000)}, "steps"),
        ({"s_churn": 1e308}, "s_churn"),
        ({"spacing": "even"}, "spacing"),
        ({"eta": 1.5}, "eta"),
        ({"s_churn": -1.0}, "s_churn"),
        ({"threshold": "clip"}, "threshold"),
        ({"cfg_scale": -0.1}, "cfg_scale"),
        ({"precision": "fp16"}, "precision"),
        ({"guide_checkpoint": "", "cfg_scale": 2.0}, "guide_checkpoint"),
        ({"guide_checkpoint": "a.pth"}, "cfg_scale"),
        ({"guidance_interval": [-1.0, 1.0]}, "cfg_scale"),
        ({"guidance_rescale": 0.5}, "cfg_scale"),
        ({"guidance_interval": [2.0, 1.0], "cfg_scale": 2.0}, "guidance_interval"),
    ],
)
def test_sampler_options_refuses_what_contradicts(fields, name):
    with pytest.raises(ValueError, match=name):
        SamplerOptions(**fields)


@pytest.mark.parametrize(
    ("fields", "model", "name"),
    [
        ({"eta": 0.5, "sampler": "ddpm"}, POINTS, "eta"),
        ({"s_churn": 1.0, "sampler": "ddim"}, POINTS, "s_churn"),
        ({"s_churn": 1.0}, POINTS, "s_churn"),
        ({"threshold": "static"}, POINTS, "threshold"),
        ({"cfg_scale": 2.0}, POINTS, "cfg_scale"),
        ({"steps": 1001}, POINTS, "steps"),
        ({"steps": 0}, POINTS, "steps"),
    ],
)
def test_resolve_refuses_what_does_not_fit_the_model(fields, model, name):
    with pytest.raises(ValueError, match=name):
        SamplerOptions(**fields).resolve(model)


@pytest.mark.parametrize("guide", [IMAGES, LABELED])
def test_resolve_refuses_a_guide_of_other_items_or_labels(guide):
    options = SamplerOptions(cfg_scale=2.0, guide_checkpoint="a.pth")
    with pytest.raises(ValueError, match="guide_checkpoint"):
        options.resolve(POINTS, guide)


@pytest.mark.parametrize("model", [POINTS, IMAGES])
@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_resolve_leaves_nothing_open(model, sampler):
    options = SamplerOptions(sampler=sampler).resolve(model)
    record = SAMPLERS[sampler or DEFAULT_SAMPLER]
    assert options == {
        "sampler": sampler or DEFAULT_SAMPLER,
        "steps": record.steps,
        "spacing": record.spacing,
        "eta": 0.0,
        "s_churn": 0.0,
        "threshold": "static" if model.is_image else "none",
        "cfg_scale": None,
        "guidance_interval": None,
        "guidance_rescale": 0.0,
        "guide": None,
    }


def test_resolve_keeps_what_was_chosen():
    chosen = {
        "sampler": "heun",
        "steps": 7,
        "spacing": "uniform",
        "s_churn": 3.0,
        "threshold": "dynamic",
        "cfg_scale": 2.0,
        "guidance_interval": [-3.0, 3.0],
        "guidance_rescale": 0.5,
    }
    model = OracleModel(Gaussian(event=(1, 4, 4)), Schedule(), 3, has_null_label=True)
    options = SamplerOptions(**chosen).resolve(model)
    assert {name: options[name] for name in chosen} == chosen


def test_resolve_takes_eta_as_a_wish_for_ddim():
    options = SamplerOptions(eta=0.3).resolve(POINTS)
    assert (options["sampler"], options["eta"]) == ("ddim", 0.3)


def test_resolve_takes_no_more_steps_than_the_schedule_has():
    model = OracleModel(Gaussian(), Schedule("cosine", 12))
    assert SamplerOptions().resolve(model)["steps"] == 12
    assert SamplerOptions(sampler="ddpm").resolve(model)["steps"] == 12


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_resolved_options_are_those_of_sample(sampler, spacing):
    options = SamplerOptions(sampler=sampler, spacing=spacing, steps=3).resolve(POINTS)
    indices = torch.arange(4)
    x0 = sample(POINTS, indices, **options)
    assert torch.equal(x0, sample(POINTS, indices, sampler=sampler, spacing=spacing, steps=3))


def test_resolved_guide_guides():
    guide = OracleModel(Gaussian(0.5, 1.5), Schedule())
    options = SamplerOptions(cfg_scale=2.0, guide_checkpoint="a.pth").resolve(POINTS, guide)
    assert options["guide"] is guide
    guided = sample(POINTS, torch.arange(4), **options)
    assert not torch.allclose(guided, sample(POINTS, torch.arange(4)))
