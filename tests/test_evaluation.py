"""What is measured of samples, on samples of which it is known."""

import dataclasses
import json
import math
import re

import pytest
import torch
from PIL import Image
from test_likelihood import Gaussian

from ddp import evaluation, features, quality, report
from ddp.data import Dataset, load
from ddp.evaluation import Setting
from ddp.quality import Estimate


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def setting(digits):
    return Setting(digits, 300)


def test_a_setting_takes_as_many_real_items_of_either_split(digits):
    setting = Setting(digits, 2000)
    assert setting.count == len(setting.reference) == len(setting.floor) == 360
    assert sorted(setting.labels.tolist()) == sorted(digits.test_labels.tolist())
    turned = Setting(digits, 2000, against="train")
    assert (turned.count, len(turned.floor)) == (1437, 360)
    few = Setting(digits, 50)
    assert torch.equal(few.reference, setting.reference[:50])
    assert len(few.labels.unique()) > 5  # not the first of a sorted folder


@pytest.mark.parametrize("space", ["judge", "pixels"])
def test_every_figure_worsens_with_noise(digits, setting, space):
    extract = features.pixel_features
    if space == "judge":
        judge, _ = features.judge_of(digits, iter)
        extract = lambda items: judge.of(items)[0]  # noqa: E731
    measure, _ = evaluation.in_space(space, setting, extract)
    noise = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = [
        measure((setting.floor + sd * noise).clamp(0, 255).round().byte()) for sd in (0, 40, 120)
    ]
    for name, first in found[0].items():
        values = [f[name]["samples"].value for f in found]
        assert first["samples"].value == first["floor"].value
        if first["ratio"]:
            assert first["ratio"].value == pytest.approx(1)
            assert first["ratio"].error == pytest.approx(0, abs=1e-9)
        if name in quality.HIGHER_IS_BETTER:
            values = [-v for v in values]
        if name != "recall":  # spread samples reach farther: its definition rewards noise
            assert values == sorted(values), (name, values)
            assert values[0] < values[2], (name, values)


def test_classes_of_samples_of_one_class(digits, setting):
    judge, _ = features.judge_of(digits, iter)
    sort = evaluation.in_classes(judge, setting)
    threes = digits.train[digits.train_labels == 3]
    found = sort(threes[:100].repeat(3, 1, 1, 1), False)
    assert found["histogram"]["samples"].value == pytest.approx(0.9, abs=0.03)
    assert found["histogram"]["floor"].value < 0.2
    assert found["counts"]["samples"][3] > 285
    assert "agreement" not in found
    labelled = sort(setting.reference, True)
    assert labelled["agreement"]["samples"].value > 0.95
    assert labelled["histogram"]["samples"].value == 0
    noise = torch.randint(256, (300, 1, 8, 8)).byte()
    assert sort(noise, True)["agreement"]["samples"].value < 0.3
    assert sort(noise, False)["named"]["samples"].value < labelled["named"]["samples"].value


def test_memorisation_finds_copies(digits, setting):
    copies = digits.train[40:340]
    found = evaluation.memorisation(copies, setting)
    assert found["copies"] == 300
    assert found["ratio"].value == 0
    assert found["close"].value == 1
    assert {p["train"] - p["sample"] for p in found["closest"]} == {40}
    near = (copies.int() + torch.randint(-8, 9, copies.shape)).clamp(0, 255).byte()
    found = evaluation.memorisation(near, setting)
    assert found["copies"] == 0
    assert found["ratio"].value < 0.3
    assert found["close"].value > 0.95


def test_held_out_items_are_not_memorised(digits):
    """The rest of the test split in the place of samples."""
    both = dataclasses.replace(digits, test=digits.test[:180], test_labels=digits.test_labels[:180])
    found = evaluation.memorisation(digits.test[180:], Setting(both, 180))
    assert abs(found["ratio"].value - 1) < 4 * found["ratio"].error
    assert abs(found["close"].value - 0.05) < 0.05
    assert found["copies"] < 5


def test_calibration_sees_a_shift_of_colour():
    items = torch.randint(
        60, 160, (400, 3, 6, 6), generator=torch.Generator().manual_seed(0)
    ).byte()
    setting = Setting(Dataset("x", items[:200], items[200:]), 200)
    changed = setting.reference.float()
    changed[:, 1] += 20
    changed[:, 2] = (changed[:, 2] - 110) * 1.3 + 110
    found = evaluation.calibration(changed.round().byte(), setting)
    by = {
        k: (v["mean"]["difference"], v["sd"]["difference"]) for k, v in found.items() if "ch" in k
    }
    assert by["channel 0"][0].value == 0
    assert by["channel 1"][0].value == pytest.approx(20)
    assert abs(by["channel 1"][1].value) < 0.1
    assert by["channel 2"][1].value == pytest.approx(
        0.3 * found["channel 2"]["sd"]["real"].value, rel=0.02
    )
    assert found["saturated"]["share"]["samples"].value == 0
    black = evaluation.calibration(torch.zeros(200, 3, 6, 6).byte(), setting)
    assert black["saturated"]["share"]["samples"].value == 1


def test_the_error_of_a_standard_deviation():
    points = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    setting = Setting(Dataset("x", points[:2500], points[2500:]), 2500)
    found = evaluation.calibration(points[:2500] * 1.5, setting)
    assert "saturated" not in found
    sd = found["channel 0"]["sd"]["samples"]
    assert abs(sd.value - 1.5) < 4 * sd.error
    assert sd.error == pytest.approx(1.5 / math.sqrt(2 * 2500), rel=0.1)  # of a normal distribution


def test_likelihoods_of_a_model_that_knows_its_data():
    torch.manual_seed(0)
    known = torch.distributions.Normal(0.3, 0.5)
    points = known.sample((3000, 2))
    dataset = Dataset("x", points[:1000], points[1000:])
    dataset.log_density = lambda x: known.log_prob(x).sum(dim=1).double()
    model = Gaussian(0.3, 0.5, (2,), 0)
    model.classes, model.parameters = 0, lambda: iter([torch.zeros(1)])
    setting = Setting(dataset, 500)
    found = evaluation.bound(model, setting, 1000, 16)
    bounds = found["continuous"]["total"].items
    exact = evaluation.exact(model, setting, 1000, 4, bounds)["density"]
    assert set(exact) == {"total", "gap", "below"}
    assert exact["below"].error < 0.1
    for e in (found["continuous"]["gap"], exact["gap"], exact["below"]):
        assert abs(e.value) < 4 * e.error + 1e-3
    assert found["discrete"]["gap"].value > found["continuous"]["gap"].value
    total, spread = found["continuous"]["total"], found["continuous"]["monte_carlo"]
    assert 0 < spread < total.error
    more = evaluation.bound(model, setting, 1000, 64)["continuous"]["monte_carlo"]
    assert more < spread


def test_metrics_are_chosen_by_what_there_is():
    chosen, model = evaluation.chosen, [object()]
    assert "plane" not in chosen(None, True, model)
    assert "inception" not in chosen(None, True, model)
    assert "judge" not in chosen(None, False, model)
    assert set(chosen(None, True, [None])) == {"judge", "pixels", "memorisation", "calibration"}
    assert chosen("exact, judge", True, model) == ["exact", "judge"]
    for text, is_image, models, word in (
        ("fid", True, model, "expected some of"),
        ("plane", True, model, "points"),
        ("pixels", False, model, "pictures"),
        ("bound", True, [None], "needs a model"),
        ("", True, model, "expected some of"),
    ):
        with pytest.raises(ValueError, match=word):
            chosen(text, is_image, models)


def test_notes_say_when_there_are_too_few():
    def said(name, count, dimension, against="test"):
        items = torch.zeros(count, 2)
        return " ".join(
            evaluation.notes(
                name, Setting(Dataset("x", items, items), count, against=against), dimension
            )
        )

    assert "too few" in said("judge", 100, 64)
    assert "bias" in said("judge", 100, 64)
    assert "too few" in said("judge", 900, 64)
    assert said("judge", 5000, 64) == ""
    assert "50,000" in said("inception", 5000, 2048)
    assert "50,000" not in said("inception", 50_000, 2048, "train")
    assert "10,000 items only" in said("inception", 50_000, 2048, "train")


def test_a_comparison_is_paired():
    x = torch.randn(200)
    subjects = [evaluation.Subject(name, {}) for name in "ab"]
    subjects[0].found = {"bound": {"total": Estimate.mean(x), "monte_carlo": 0.1}}
    subjects[1].found = {"bound": {"total": Estimate.mean(x + 1), "monte_carlo": 0.1}}
    (row,) = evaluation.comparison(subjects)
    assert row["subject"] == "b"
    assert row["figure"] == "bound/total"
    assert row["difference"].value == pytest.approx(1)
    assert row["difference"].error < 1e-6


def test_plain_is_json():
    tree = {"a": Estimate.mean(torch.ones(1)), "b": [math.inf, 1, "x", None, {"c": 0.5}]}
    text = json.dumps(evaluation.plain(tree), allow_nan=False)
    assert json.loads(text)["a"] == {"value": 1.0, "error": None, "interval": [None, None]}
    assert json.loads(text)["b"] == [None, 1, "x", None, {"c": 0.5}]


HOSTILE = "<script>alert(1)</script>"


def results(**found):
    subject = {"name": HOSTILE, "about": {"checkpoint": "/a&b.pth", "step": 3}}
    return {
        "dataset": {"name": HOSTILE, "event": [1, 8, 8], "classes": [], "train": 9, "test": 5},
        "recipe": {
            "seed": 0,
            "command": "python evaluate.py --checkpoint '<b>'",
            "unit": "nats",
            "test_items": 5,
        },
        "notes": ["too few <items>"],
        "entropy": None,
        "subjects": [subject | found],
        "comparison": [],
    }


def test_a_page_needs_no_network_and_escapes_what_it_is_given():
    e = evaluation.plain(Estimate.mean(torch.rand(50)))
    row = {"samples": e, "real": e, "difference": e}
    page = report.page(
        results(calibration={HOSTILE: {"mean": row}}), [{"a <caption>": Image.new("L", (4, 4))}]
    )
    assert HOSTILE not in page
    assert "<b>" not in page
    assert "<items>" not in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert "http" not in page
    assert "data:image/png;base64," in page
    assert 'name="viewport"' in page


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0456, "1.235 [1.145, 1.324]"),
        (123.456, 12.3, "123 [99, 148]"),
        (0.5, 0.0, "0.500 [0.500, 0.500]"),
    ],
)
def test_an_interval_shows_the_digits_that_its_error_allows(value, error, text):
    ends = [value - 1.96 * error, value + 1.96 * error]
    assert report.interval({"value": value, "error": error, "interval": ends}) == text
