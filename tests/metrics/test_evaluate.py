"""Metrics of samples and models of which the answer is known, and the registry of metrics."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import ROOT
from oracles import Gaussian, OracleModel

from ddp.data import load_dataset
from ddp.data.dataset import Dataset
from ddp.metrics.candidate import (
    Candidate,
    EvaluateOptions,
    Reference,
    checkpoint_candidate,
    distinct_names,
    generate_samples,
)
from ddp.metrics.distances import find_measure
from ddp.metrics.evaluate import (
    METRICS,
    OLD_METRICS,
    Metric,
    comparison,
    evaluate,
    parse_metrics,
    to_json,
)
from ddp.metrics.features import FEATURES, Extractor, Space
from ddp.metrics.likelihood_metrics import evaluate_ode_nll, evaluate_vlb
from ddp.metrics.report import report_lines
from ddp.metrics.sample_metrics import (
    RealFeatures,
    distance_ratio,
    evaluate_memorization,
    evaluate_pixel_stats,
    feature_metrics,
    feature_warnings,
)
from ddp.metrics.uncertainty import Estimate
from ddp.schedule import Schedule

OPTIONS = EvaluateOptions(num_samples=300)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def reference(digits):
    return Reference(digits, OPTIONS)


def candidate_of(samples, num_classes=None):
    """A Candidate of samples, or one whose model has made them for the labels of real items."""
    candidate = Candidate("c", {}, samples=samples)
    if num_classes:
        candidate.model = OracleModel(Gaussian(), Schedule(), num_classes)
    return candidate


def noisy(items, sd):
    noise = torch.randn(items.shape, generator=torch.Generator().manual_seed(0))
    return (items + sd * noise).clamp(0, 255).round().byte()


# ---- options and the real items ----


def test_reference_takes_as_many_items_of_either_split(digits):
    reference = Reference(digits, EvaluateOptions())
    assert len(reference.items) == len(reference.baseline) == 360
    assert reference.baseline_matches
    assert sorted(reference.labels.tolist()) == sorted(digits.test_labels.tolist())
    of_train = Reference(digits, EvaluateOptions(reference="train"))
    assert (len(of_train.items), len(of_train.baseline)) == (1437, 360)
    assert not of_train.baseline_matches
    few = Reference(digits, EvaluateOptions(num_samples=50))
    assert torch.equal(few.items, reference.items[:50])
    assert len(few.labels.unique()) > 5  # not the first of a sorted folder


def test_options_are_resolved_for_the_data(digits):
    options = EvaluateOptions(vlb_samples=3).resolve(digits, [])
    assert (options.num_samples, options.vlb_items, options.nll_items) == (360, 360, 128)
    assert options.vlb_samples == 4  # two halves
    few = [candidate_of(torch.zeros(7, 1, 8, 8))]
    assert EvaluateOptions().resolve(digits, few).num_samples == 7
    points = Dataset("x", torch.zeros(9000, 2), torch.zeros(5000, 2))
    options = EvaluateOptions(reference="train").resolve(points, [])
    assert (options.vlb_samples, options.nll_items, options.num_samples) == (64, 2000, 2000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 1},
        {"vlb_items": 1},
        {"nll_items": 0},
        {"vlb_samples": 0},
        {"dequant_samples": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"reference": "validation"},
    ],
)
def test_options_refuse(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        EvaluateOptions(**wrong)


def test_names_are_distinct(tmp_path):
    assert distinct_names(["a/x.pth", "b/y.npz"]) == ["x", "y"]
    assert distinct_names(["a/x.pth", "b/x.pth"]) == ["a", "b"]
    assert distinct_names(["a/x.pth", "a/x.npz"]) == ["a/x.pth", "a/x.npz"]


# ---- metrics of samples ----


@pytest.mark.parametrize("space", ["classifier", "pixels"])
def test_feature_metrics_worsen_with_noise(reference, space):
    results = []
    for sd in (0, 40, 120):
        candidate = candidate_of(noisy(reference.baseline, sd))
        results.append(feature_metrics(space, candidate, reference, OPTIONS))
    for name, first in results[0].items():
        if name == "counts":
            continue
        assert first["samples"].value == first["real_vs_real"].value
        if first["relative_to_real"]:
            assert first["relative_to_real"].value == pytest.approx(1)
            assert first["relative_to_real"].error == pytest.approx(0, abs=1e-9)
        if name in ("recall", "class_tv"):  # wide samples reach farther: recall rewards noise
            continue
        values = [result[name]["samples"].value for result in results]
        if find_measure(name).higher_is_better:
            values = [-value for value in values]
        assert values == sorted(values), (name, values)
        assert values[0] < values[2], (name, values)


def test_real_items_are_measured_once(reference):
    candidate = candidate_of(reference.baseline)
    feature_metrics("pixels", candidate, reference, OPTIONS)
    kept = reference.spaces["pixels"]
    feature_metrics("pixels", candidate, reference, OPTIONS)
    assert reference.spaces["pixels"] is kept


def test_class_metrics_of_samples_of_one_class(digits, reference):
    threes = digits.train[digits.train_labels == 3][:100].repeat(3, 1, 1, 1)
    results = feature_metrics("classifier", candidate_of(threes), reference, OPTIONS)
    assert results["class_tv"]["samples"].value == pytest.approx(0.9, abs=0.03)
    assert results["class_tv"]["real_vs_real"].value < 0.2
    assert results["counts"]["samples"][3] > 285
    assert "label_accuracy" not in results


def test_label_accuracy_is_of_class_conditional_models(reference):
    real = candidate_of(reference.items, num_classes=10)
    results = feature_metrics("classifier", real, reference, OPTIONS)
    assert results["label_accuracy"]["samples"].value > 0.95
    assert results["class_tv"]["samples"].value == 0
    random = torch.randint(256, (300, 1, 8, 8)).byte()
    noise = feature_metrics("classifier", candidate_of(random, 10), reference, OPTIONS)
    assert noise["label_accuracy"]["samples"].value < 0.3
    assert noise["confident"]["samples"].value < results["confident"]["samples"].value


def test_distance_ratio_of_real_items_is_one(digits, reference):
    assert distance_ratio(reference.baseline, reference) == pytest.approx(1)
    assert distance_ratio(noisy(reference.baseline, 40), reference) > 1.5


def test_memorization_finds_copies(digits, reference):
    copies = digits.train[40:340]
    results = evaluate_memorization(candidate_of(copies), reference, OPTIONS)
    assert results["copies"] == 300
    assert results["nn_distance_ratio"].value == 0
    assert results["near_duplicates"].value == 1
    assert {pair["train"] - pair["sample"] for pair in results["closest"]} == {40}
    near = (copies.int() + torch.randint(-8, 9, copies.shape)).clamp(0, 255).byte()
    results = evaluate_memorization(candidate_of(near), reference, OPTIONS)
    assert results["copies"] == 0
    assert results["nn_distance_ratio"].value < 0.3
    assert results["near_duplicates"].value > 0.95


def test_heldout_items_are_not_memorized(digits):
    """The rest of the test split in the place of samples."""
    half = dataclasses.replace(digits, test=digits.test[:180], test_labels=digits.test_labels[:180])
    reference = Reference(half, EvaluateOptions(num_samples=180))
    results = evaluate_memorization(candidate_of(digits.test[180:]), reference, OPTIONS)
    ratio = results["nn_distance_ratio"]
    assert abs(ratio.value - 1) < 4 * ratio.error
    assert abs(results["near_duplicates"].value - 0.05) < 0.05
    assert results["copies"] < 5


def test_pixel_stats_see_a_shift_of_color():
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(60, 160, (400, 3, 6, 6), generator=generator).byte()
    reference = Reference(Dataset("x", items[:200], items[200:]), EvaluateOptions(num_samples=200))
    changed = reference.items.float()
    changed[:, 1] += 20
    changed[:, 2] = (changed[:, 2] - 110) * 1.3 + 110
    results = evaluate_pixel_stats(candidate_of(changed.round().byte()), reference, OPTIONS)
    assert results["channel 0"]["mean"]["difference"].value == 0
    assert results["channel 1"]["mean"]["difference"].value == pytest.approx(20)
    assert abs(results["channel 1"]["sd"]["difference"].value) < 0.1
    sd = results["channel 2"]["sd"]
    assert sd["difference"].value == pytest.approx(0.3 * sd["real"].value, rel=0.02)
    assert results["saturated"]["fraction"]["samples"].value == 0
    black = candidate_of(torch.zeros(200, 3, 6, 6).byte())
    results = evaluate_pixel_stats(black, reference, OPTIONS)
    assert results["saturated"]["fraction"]["samples"].value == 1


def test_pixel_stats_error_of_a_standard_deviation():
    points = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    dataset = Dataset("x", points[:2500], points[2500:])
    reference = Reference(dataset, EvaluateOptions(num_samples=2500))
    results = evaluate_pixel_stats(candidate_of(points[:2500] * 1.5), reference, OPTIONS)
    assert "saturated" not in results
    sd = results["channel 0"]["sd"]["samples"]
    assert abs(sd.value - 1.5) < 4 * sd.error
    assert sd.error == pytest.approx(1.5 / math.sqrt(2 * 2500), rel=0.1)  # of a normal distribution


# ---- metrics of models ----


def test_likelihoods_of_a_model_that_knows_its_data():
    data = Gaussian(mean=0.3, sd=0.5)
    points = data.sample(3000)
    dataset = Dataset("x", points[:1000], points[1000:])
    dataset.log_density = lambda x: data.log_prob(x).double()
    model = OracleModel(data, Schedule(timesteps=0))
    candidate = Candidate("c", {}, model=model)
    options = EvaluateOptions(vlb_items=1000, nll_items=1000, vlb_samples=16)
    reference = Reference(dataset, options)
    bound = candidate.results["vlb"] = evaluate_vlb(candidate, reference, options)
    nll = evaluate_ode_nll(candidate, reference, options)["density"]
    assert set(nll) == {"total", "gap", "below_vlb"}
    assert nll["below_vlb"].error < 0.1
    for estimate in (bound["continuous"]["gap"], nll["gap"], nll["below_vlb"]):
        assert abs(estimate.value) < 4 * estimate.error + 1e-3
    assert bound["discrete"]["gap"].value > bound["continuous"]["gap"].value
    spread = bound["continuous"]["monte_carlo"]
    assert 0 < spread < bound["continuous"]["total"].error
    more = dataclasses.replace(options, vlb_samples=64)
    assert evaluate_vlb(candidate, reference, more)["continuous"]["monte_carlo"] < spread


def test_samples_of_a_checkpoint_do_not_depend_on_the_batch(digits):
    candidate = checkpoint_candidate(ROOT / "checkpoints" / "digits.pth")
    candidate.require_fit(digits)
    candidate.sampler_options["steps"] = 2
    parts = []
    for size in (7, 20):
        options = EvaluateOptions(num_samples=20, batch_size=size)
        parts.append(generate_samples(candidate, Reference(digits, options), options))
    assert parts[0].dtype == torch.uint8
    assert (parts[0].int() - parts[1].int()).abs().max() <= 1


def test_a_checkpoint_of_other_data_is_refused():
    candidate = checkpoint_candidate(ROOT / "checkpoints" / "digits.pth")
    with pytest.raises(ValueError, match="trained on"):
        candidate.require_fit(load_dataset("moons"))


# ---- the registry ----


def test_parse_metrics_by_what_there_is():
    by_default = parse_metrics(None, is_image=True, has_model=True)
    assert "points" not in by_default
    assert "inception" not in by_default
    assert "classifier" not in parse_metrics(None, is_image=False, has_model=True)
    of_samples = parse_metrics(None, is_image=True, has_model=False)
    assert of_samples == ["classifier", "pixels", "memorization", "pixel_stats"]
    assert parse_metrics("classifier, ode_nll,vlb", True, True) == ["vlb", "ode_nll", "classifier"]


def test_parse_metrics_takes_old_names():
    of_images = "bound,exact,judge,memorisation,calibration"
    names = ["vlb", "ode_nll", "classifier", "memorization", "pixel_stats"]
    assert parse_metrics(of_images, is_image=True, has_model=True) == names
    assert parse_metrics("plane", is_image=False, has_model=False) == ["points"]
    assert set(OLD_METRICS.values()) <= set(METRICS)


@pytest.mark.parametrize(
    ("text", "is_image", "has_model", "reason"),
    [
        ("fid", True, True, "expected some of"),
        ("", True, True, "expected some of"),
        ("points", True, True, "is for points"),
        ("pixels", False, True, "is for images"),
        ("vlb", True, False, "needs a model"),
    ],
)
def test_parse_metrics_refuses(text, is_image, has_model, reason):
    with pytest.raises(ValueError, match=reason):
        parse_metrics(text, is_image, has_model)


def brightness(candidate, reference, options):
    """A metric of one's own."""
    value = Estimate.mean(candidate.samples.double().flatten(1).mean(dim=1))
    return {"samples": value, "half": {"of it": value.value / 2}}


def evaluated(candidates, dataset, text, **options):
    """The evaluation of the metrics in `text`, as JSON."""
    options = EvaluateOptions(**options).resolve(dataset, candidates)
    metrics = parse_metrics(text, dataset.is_image, False)
    return evaluate(candidates, Reference(dataset, options), metrics, options)


def test_a_new_metric_is_one_function_and_one_entry(digits, monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", Metric(brightness))
    bright = candidate_of(digits.train[:30].clamp_min(100))
    dark = Candidate("dark", {}, samples=digits.train[:30])
    evaluation = evaluated([bright, dark], digits, "brightness")
    value = evaluation["subjects"][0]["brightness"]["samples"]["value"]
    assert value > evaluation["subjects"][1]["brightness"]["samples"]["value"]
    (row,) = evaluation["comparison"]
    assert row["path"] == "brightness/samples"
    assert row["difference"]["value"] < 0
    evaluation["subjects"].pop()
    evaluation["comparison"] = []
    text = "\n".join(report_lines(evaluation))
    assert f"{value:.4f}" in text
    assert f"{value / 2:.4g}" in text
    assert "brightness" in parse_metrics(None, is_image=False, has_model=False)


def test_a_new_feature_space_is_a_metric(digits, monkeypatch):
    def mean_space(dataset, **options):
        return Extractor(lambda items: items.flatten(1).double().mean(dim=1, keepdim=True))

    monkeypatch.setitem(FEATURES, "mean", Space(mean_space, "image"))
    evaluation = evaluated([candidate_of(digits.train[:40])], digits, "mean")
    (subject,) = evaluation["subjects"]
    assert {"fd", "kid", "precision", "sliced_wasserstein"} < set(subject["mean"])
    assert "feature space: mean" in "\n".join(report_lines(evaluation))


def test_a_metric_with_too_few_items_is_left_out_and_said(digits):
    candidate = candidate_of(digits.train[:19])
    evaluation = evaluated([candidate], digits, "pixels,pixel_stats")
    assert set(candidate.results) == {"pixel_stats"}
    assert "pixels: not measured" in evaluation["warnings"][0]


def test_given_samples_are_taken_from_everywhere(digits):
    candidate = candidate_of(digits.train[digits.train_labels.argsort()])
    evaluated([candidate], digits, "pixel_stats", num_samples=50)
    assert len(candidate.samples) == 50
    assert not torch.equal(candidate.samples, digits.train[digits.train_labels.argsort()][:50])


def test_data_of_another_training_is_said(digits):
    candidate = candidate_of(digits.train[:20])
    candidate.about["provenance"] = {"dataset": "digits", "fingerprint": "other"}
    evaluation = evaluated([candidate], digits, "pixel_stats")
    assert "not the data that the model was trained on" in evaluation["warnings"][0]


def feature_warnings_of(space, count, dimension, split="test"):
    items = torch.zeros(count, 2)
    options = EvaluateOptions(num_samples=count, reference=split)
    reference = Reference(Dataset("x", items, items), options)
    reference.spaces[space] = RealFeatures(Extractor(None), torch.zeros(1, dimension), {})
    return " ".join(feature_warnings(space, reference, options))


def test_feature_warnings_say_when_there_are_too_few():
    assert "bias" in feature_warnings_of("classifier", 100, 64)
    assert "too few" in feature_warnings_of("classifier", 900, 64)
    assert feature_warnings_of("classifier", 5000, 64) == ""
    assert "50,000" in feature_warnings_of("inception", 5000, 2048)
    published = feature_warnings_of("inception", 50_000, 2048, "train")
    assert "50,000" not in published
    assert "10,000 items only" in published
    assert "was trained" in feature_warnings_of("classifier", 5000, 64, "train")


# ---- comparison and JSON ----


def test_comparison_is_paired():
    x = torch.randn(200)
    a = Candidate("a", {}, results={"vlb": {"total": Estimate.mean(x), "monte_carlo": 0.1}})
    b = Candidate("b", {}, results={"vlb": {"total": Estimate.mean(x + 1), "monte_carlo": 0.1}})
    (row,) = comparison([a, b])
    assert (row["subject"], row["path"]) == ("b", "vlb/total")
    assert row["difference"].value == pytest.approx(1)
    assert row["difference"].error < 1e-6


def test_comparison_leaves_out_what_says_no_more():
    estimate = Estimate.mean(torch.randn(9))
    row = {"samples": estimate, "real_vs_real": estimate, "relative_to_real": estimate}
    candidates = [Candidate(name, {}, results={"pixels": {"fd": row}}) for name in "ab"]
    assert [row["path"] for row in comparison(candidates)] == ["pixels/fd/samples"]
    candidates[0].results = {}
    assert comparison(candidates)[0]["difference"] is None


def test_to_json_is_json():
    tree = {"a": Estimate.mean(torch.ones(1)), "b": [math.inf, 1, "x", None, {"c": 0.5}]}
    read = json.loads(json.dumps(to_json(tree), allow_nan=False))
    assert read["a"] == {"value": 1.0, "error": None, "interval": [None, None]}
    assert read["b"] == [None, 1, "x", None, {"c": 0.5}]
