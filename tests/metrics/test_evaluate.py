"""Metrics of samples and models of which the answer is known, and the registry of metrics."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import ROOT
from live_memory import LiveMemory
from oracles import Gaussian, OracleModel

from ddp.data import load_dataset
from ddp.data.dataset import Dataset, permutation
from ddp.metrics.candidate import (
    Candidate,
    EvaluateOptions,
    Reference,
    checkpoint_candidate,
    fixed_subset,
    generate_samples,
)
from ddp.metrics.distances import (
    BLOCK,
    find_measure,
    frechet_distance,
    one_hot,
    total_variation,
)
from ddp.metrics.evaluate import (
    METRICS,
    OLD_METRICS,
    Metric,
    evaluate,
    parse_metrics,
    to_json,
)
from ddp.metrics.features import FEATURES, Extractor, Space, kinds_of
from ddp.metrics.fixed_features import pixel_features
from ddp.metrics.likelihood_metrics import evaluate_ode_nll, evaluate_vlb
from ddp.metrics.report import subject_tables, table_lines
from ddp.metrics.sample_metrics import (
    RealFeatures,
    distance_ratio,
    evaluate_memorization,
    evaluate_value_stats,
    feature_metrics,
    feature_warnings,
    fitting_distances,
    neighbor_measures,
)
from ddp.metrics.uncertainty import Estimate, bootstrap
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


def items_of(dataset, labels):
    """Training items of the labels, as a perfect class-conditional model would draw them."""
    by_class = [torch.where(dataset.train_labels == k)[0].tolist() for k in range(10)]
    return dataset.train[[by_class[k].pop() for k in labels.tolist()]]


def test_label_accuracy_is_of_class_conditional_models(digits, reference):
    real = candidate_of(items_of(digits, reference.sample_labels), num_classes=10)
    results = feature_metrics("classifier", real, reference, OPTIONS)
    assert results["label_accuracy"]["samples"].value > 0.95
    random = torch.randint(256, (300, 1, 8, 8)).byte()
    noise = feature_metrics("classifier", candidate_of(random, 10), reference, OPTIONS)
    assert noise["label_accuracy"]["samples"].value < 0.3
    assert noise["confident"]["samples"].value < results["confident"]["samples"].value


def test_distance_ratio_of_real_items_is_one(digits, reference):
    assert distance_ratio(reference.baseline, reference) == pytest.approx(1)
    assert distance_ratio(noisy(reference.baseline, 40), reference) > 1.5


@pytest.mark.parametrize("seed", range(3))
def test_items_in_the_place_of_conditional_samples_are_as_good_as_the_floor(seed):
    """A perfect class-conditional model scores 1, of one seed within chance, and not less.

    Classes are far apart, so that their counts are most of the distance."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randint(40, 215, (10, 1, 4, 4), generator=generator)
    labels = torch.randint(10, (24_000,), generator=generator)
    noise = 10 * torch.randn(24_000, 1, 4, 4, generator=generator)
    items = (centers[labels] + noise).round().clamp(0, 255).byte()
    ratios = {"fd": [], "class_tv": []}
    for part in torch.arange(24_000).split(3000):  # 8 datasets
        train, test = part[:1500], part[1500:]
        data = Dataset(
            "x", items[train], items[test], labels[train], labels[test], list("abcdefghij")
        )
        reference = Reference(data, EvaluateOptions(num_samples=500))
        samples = items_of(data, reference.sample_labels)
        floor_labels = fixed_subset(data.train, data.train_labels, 500)[1]
        real = pixel_features(reference.items)
        floor = frechet_distance(pixel_features(reference.baseline), real)
        ratios["fd"].append((frechet_distance(pixel_features(samples), real), floor))
        tv = [one_hot(torch.eye(10)[k]) for k in (reference.sample_labels, floor_labels)]
        real = one_hot(torch.eye(10)[reference.labels])
        ratios["class_tv"].append([total_variation(counts, real) for counts in tv])
    for name, pairs in ratios.items():
        ours, floor = torch.tensor(pairs).mean(dim=0)
        assert 0.75 < ours / floor < 1.33, (name, ours / floor)


@pytest.mark.parametrize("split", ["test", "train"])
def test_labels_of_samples_are_new_ones(digits, split):
    """Neither those of the real items nor those of the floor, but as random."""
    reference = Reference(digits, EvaluateOptions(num_samples=300, reference=split))
    labels = reference.sample_labels
    assert len(labels) == 300
    assert not torch.equal(labels, reference.labels)
    assert not torch.equal(labels.bincount(), reference.labels.bincount())
    assert not torch.equal(labels, fixed_subset(digits.train, digits.train_labels, 300)[1])
    many = Reference(digits, EvaluateOptions(num_samples=1437, reference="train"))
    assert len(many.sample_labels) == 1437  # more than the 360 test items
    unlabeled = dataclasses.replace(digits, test_labels=None)
    assert len(Reference(unlabeled, EvaluateOptions(num_samples=50)).sample_labels) == 50


def test_conditional_and_unconditional_models_are_compared_without_bias(digits):
    """Real items, once in the place of each: which is better is chance."""
    reference = Reference(digits, EvaluateOptions(num_samples=360))
    conditional = items_of(digits, reference.sample_labels)
    order = permutation(7, 0, len(digits.train))
    real = digits.test_labels.bincount()
    ours = [reference.sample_labels.bincount(), digits.train_labels[order[:360]].bincount()]
    distances = [(counts - real).abs().sum().item() for counts in ours]
    assert 0.3 < distances[0] / distances[1] < 3
    assert len(conditional) == 360


def test_floor_of_zero_gives_no_ratio(digits):
    """The classifier's Frechet distance of digits is 0 within its error."""
    reference = Reference(digits, OPTIONS)
    results = feature_metrics("classifier", candidate_of(reference.baseline), reference, OPTIONS)
    for name in ("fd", "kid", "fd_inf"):
        assert results[name]["real_vs_real"].interval[0] <= 0.01
        assert results[name]["relative_to_real"] is None, name
    assert results["precision"]["relative_to_real"].value == pytest.approx(1)


def test_other_split_of_two_items_gives_no_floor(digits):
    few = dataclasses.replace(digits, test=digits.test[:2], test_labels=digits.test_labels[:2])
    reference = Reference(few, EvaluateOptions(num_samples=60, reference="train"))
    row = feature_metrics("pixels", candidate_of(digits.test[:60]), reference, OPTIONS)["fd"]
    assert row["real_vs_real"] is row["relative_to_real"] is None
    assert row["samples"].value > 0


def test_memorization_of_new_items_has_its_own_error():
    """That of 100 repetitions: the threshold is estimated, too, and makes it larger by sqrt 2."""
    estimates = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        samples, heldout = torch.rand(2, 400, generator=generator, dtype=torch.float64) + 1
        estimates.append(bootstrap(neighbor_measures, samples, heldout)["near_duplicates"])
    spread = torch.tensor([estimate.value for estimate in estimates]).std()
    error = torch.tensor([estimate.error for estimate in estimates]).mean()
    assert 0.85 < error / spread < 1.25  # that of a proportion alone is 0.7 of it
    covered = [low <= 0.05 <= high for low, high in (each.interval for each in estimates)]
    assert sum(covered) > 90


def test_memorization_of_three_items_is_of_three_items(digits):
    reference = Reference(digits, EvaluateOptions(num_samples=3))
    results = evaluate_memorization(candidate_of(digits.train[:3]), reference, OPTIONS)
    assert results["copies"] == 3
    assert "near_duplicates" not in results


def test_memorization_and_value_stats_hold_little_more_than_the_data():
    items = torch.randint(256, (3000, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    reference = Reference(Dataset("x", items, items[:500]), EvaluateOptions(num_samples=500))
    candidate = candidate_of(items[:500])
    for metric in (evaluate_memorization, evaluate_value_stats):
        with LiveMemory() as memory:
            metric(candidate, reference, OPTIONS)
        blocks = 4 * 8 * BLOCK  # of distances, at most
        assert memory.peak < 3 * items.nbytes + blocks


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


def test_value_stats_see_a_shift_of_color():
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(60, 160, (400, 3, 6, 6), generator=generator).byte()
    reference = Reference(Dataset("x", items[:200], items[200:]), EvaluateOptions(num_samples=200))
    changed = reference.items.float()
    changed[:, 1] += 20
    changed[:, 2] = (changed[:, 2] - 110) * 1.3 + 110
    results = evaluate_value_stats(candidate_of(changed.round().byte()), reference, OPTIONS)
    assert results["channel 0"]["mean"]["difference"].value == 0
    assert results["channel 1"]["mean"]["difference"].value == pytest.approx(20)
    assert abs(results["channel 1"]["sd"]["difference"].value) < 0.1
    sd = results["channel 2"]["sd"]
    assert sd["difference"].value == pytest.approx(0.3 * sd["real"].value, rel=0.02)
    assert results["saturated"]["fraction"]["samples"].value == 0
    black = candidate_of(torch.zeros(200, 3, 6, 6).byte())
    results = evaluate_value_stats(black, reference, OPTIONS)
    assert results["saturated"]["fraction"]["samples"].value == 1


def test_value_stats_error_of_a_standard_deviation():
    points = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    dataset = Dataset("x", points[:2500], points[2500:])
    reference = Reference(dataset, EvaluateOptions(num_samples=2500))
    results = evaluate_value_stats(candidate_of(points[:2500] * 1.5), reference, OPTIONS)
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

PIXELS, POINTS = ("image", "pixels"), ("point", "low_dim")  # of kinds_of


def test_parse_metrics_by_what_there_is():
    by_default = parse_metrics(None, PIXELS, has_model=True)
    assert "points" not in by_default
    assert "inception" not in by_default
    assert "classifier" not in parse_metrics(None, POINTS, has_model=True)
    of_samples = parse_metrics(None, PIXELS, has_model=False)
    assert of_samples == ["classifier", "filters", "pixels", "memorization", "value_stats"]
    of_model = parse_metrics("ode_nll, classifier,vlb", PIXELS, True)
    assert of_model == ["classifier", "vlb", "ode_nll"]


def test_parse_metrics_takes_old_names():
    of_images = "bound,exact,judge,memorisation,calibration"
    names = ["classifier", "memorization", "value_stats", "vlb", "ode_nll"]
    assert parse_metrics(of_images, PIXELS, has_model=True) == names
    assert parse_metrics("plane", POINTS, has_model=False) == ["points"]
    assert set(OLD_METRICS.values()) <= set(METRICS)


@pytest.mark.parametrize(
    ("text", "kinds", "has_model", "reason"),
    [
        ("fid", PIXELS, True, "expected some of"),
        ("", PIXELS, True, "expected some of"),
        ("points", PIXELS, True, "kind point, not pixels"),
        ("pixels", POINTS, True, "kind pixels, not low_dim"),
        ("pixels", ("image", "float_image"), True, "not float_image"),
        ("vlb", PIXELS, False, "needs a model"),
    ],
)
def test_parse_metrics_refuses(text, kinds, has_model, reason):
    with pytest.raises(ValueError, match=reason):
        parse_metrics(text, kinds, has_model)


def brightness(candidate, reference, options):
    """A metric of one's own."""
    value = Estimate.mean(candidate.samples.double().flatten(1).mean(dim=1))
    return {"samples": value, "half": {"of it": value.value / 2}}


def evaluated(candidates, dataset, text, how=None, **options):
    """The evaluation of the metrics in `text`, as JSON; how: further arguments of evaluate."""
    options = EvaluateOptions(**options).resolve(dataset, candidates)
    metrics = parse_metrics(text, kinds_of(dataset), candidates[0].model is not None)
    return evaluate(candidates, Reference(dataset, options), metrics, options, **(how or {}))


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
    (subject,) = evaluation["subjects"]
    text = "\n".join(table_lines(subject_tables(subject, evaluation)))
    assert f"{value:.4f}" in text
    assert f"{value / 2:.4g}" in text
    assert "brightness" in parse_metrics(None, POINTS, has_model=False)


def test_a_new_feature_space_is_a_metric(digits, monkeypatch):
    def mean_space(dataset, **options):
        return Extractor(lambda items: items.flatten(1).double().mean(dim=1, keepdim=True))

    monkeypatch.setitem(FEATURES, "mean", Space(mean_space, "image"))
    evaluation = evaluated([candidate_of(digits.train[:40])], digits, "mean")
    (subject,) = evaluation["subjects"]
    assert {"fd", "kid", "precision", "sliced_wasserstein"} < set(subject["mean"])
    text = "\n".join(table_lines(subject_tables(subject, evaluation)))
    assert "feature space: mean" in text


def test_a_metric_with_too_few_items_is_left_out_and_said(digits):
    candidate = candidate_of(digits.train[:19])
    evaluation = evaluated([candidate], digits, "pixels,value_stats")
    assert set(candidate.results) == {"value_stats"}
    assert "pixels: not measured, 19 samples" in evaluation["warnings"][0]


def test_given_samples_are_taken_from_everywhere(digits):
    candidate = candidate_of(digits.train[digits.train_labels.argsort()])
    evaluated([candidate], digits, "value_stats", num_samples=50)
    assert len(candidate.samples) == 50
    assert not torch.equal(candidate.samples, digits.train[digits.train_labels.argsort()][:50])


def test_data_of_another_training_is_said(digits):
    candidate = candidate_of(digits.train[:20])
    candidate.about["provenance"] = {"dataset": "digits", "fingerprint": "other"}
    evaluation = evaluated([candidate], digits, "value_stats")
    assert "not the data that the model was trained on" in evaluation["warnings"][0]


def test_metrics_that_need_labels_are_left_out_where_there_are_none(digits):
    unlabeled = dataclasses.replace(digits, test_labels=None)
    conditional = candidate_of(digits.train[:40], num_classes=10)
    conditional.sampler_options = {}
    evaluation = evaluated([conditional], unlabeled, "value_stats,loss,vlb")
    (subject,) = evaluation["subjects"]
    assert set(subject) == {"name", "about", "value_stats"}
    assert "test items have no labels" in " ".join(evaluation["warnings"])


@pytest.mark.parametrize(("val", "is_said"), [(None, True), (True, False)])
def test_best_that_was_chosen_on_the_test_items_is_said(digits, val, is_said):
    data = dataclasses.replace(digits, val=val and digits.test)
    best = candidate_of(digits.train[:20])
    best.about["checkpoint"] = "/runs/digits/best.pth"
    evaluation = evaluated([best], data, "value_stats")
    assert ("chosen on the test items" in " ".join(evaluation["warnings"])) == is_said
    assert evaluation["dataset"]["best_chosen_on"] == ("test" if is_said else "val")


def test_a_weak_space_is_measured_only_when_it_is_asked_for(digits, monkeypatch):
    def weak_space(dataset, **options):
        return Extractor(pixel_features, weak="it knows nothing")

    monkeypatch.setitem(FEATURES, "classifier", Space(weak_space, "image"))
    how = {"by_default": True}
    evaluation = evaluated([candidate_of(digits.train[:40])], digits, None, how)
    assert "classifier" not in evaluation["subjects"][0]
    assert "filters" in evaluation["subjects"][0]
    said = "classifier: it knows nothing; it is not measured unless asked for: metrics=classifier"
    assert said in evaluation["warnings"]
    evaluation = evaluated([candidate_of(digits.train[:40])], digits, "classifier")
    assert "classifier" in evaluation["subjects"][0]
    assert "classifier: it knows nothing" in evaluation["warnings"]


def test_time_is_told_first_and_what_is_long_left_out(monkeypatch):
    told = []
    points = Gaussian().sample(60)
    candidate = Candidate("c", {}, model=OracleModel(Gaussian(), Schedule(timesteps=0)))
    candidate.samples = points[:30]
    data = Dataset("x", points[:30], points[30:])
    numbers = {"vlb_items": 30, "nll_items": 20, "vlb_samples": 2}
    monkeypatch.setattr("ddp.metrics.evaluate.seconds_of_a_call", lambda *_: 0.1)
    how = {"by_default": True, "tell": told.append}
    evaluation = evaluated([candidate], data, None, how, **numbers)
    assert told == ["the network takes about 54 s: loss 30 s, vlb 24 s"]
    assert "ode_nll" not in evaluation["subjects"][0]
    expected = "ode_nll: left out, it takes about 8 min; to ask for it: metrics=ode_nll"
    assert expected in evaluation["warnings"]
    evaluation = evaluated([candidate], data, "ode_nll", **numbers)
    assert "ode_nll" in evaluation["subjects"][0]


def test_every_figure_is_reported_as_it_comes(digits):
    seen = []

    def report(evaluation, candidate, name):
        seen.append((candidate.name, name))
        assert name in next(s for s in evaluation["subjects"] if s["name"] == candidate.name)

    candidates = [candidate_of(digits.train[:40]), candidate_of(digits.train[40:80])]
    candidates[1].name = "d"
    evaluated(candidates, digits, "pixels,value_stats", {"report": report})
    metrics = ("pixels", "value_stats")
    assert seen == [(name, metric) for name in "cd" for metric in metrics]


def feature_warnings_of(space, count, dimension, split="test"):
    items = torch.zeros(count, 2)
    options = EvaluateOptions(num_samples=count, reference=split)
    reference = Reference(Dataset("x", items, items), options)
    distances = fitting_distances(PIXELS, dimension)
    real = RealFeatures(Extractor(None), torch.zeros(1, dimension), {}, distances)
    reference.spaces[space] = real
    return " ".join(feature_warnings(space, reference, options))


def test_feature_warnings_say_when_there_are_too_few():
    assert "bias" in feature_warnings_of("classifier", 100, 64)
    assert "too few" in feature_warnings_of("classifier", 900, 64)
    of_floor = feature_warnings_of("classifier", 5000, 64)  # as many as there are
    assert of_floor == (
        "classifier: among the items of real vs real are some on which the classifier was trained"
    )
    assert "50,000" in feature_warnings_of("inception", 5000, 2048)
    published = feature_warnings_of("inception", 50_000, 2048, "train")
    assert "50,000" not in published
    assert "10,000 items only" in published
    assert "was trained" in feature_warnings_of("classifier", 5000, 64, "train")


# ---- JSON ----


def test_to_json_is_json():
    tree = {"a": Estimate.mean(torch.ones(1)), "b": [math.inf, 1, "x", None, {"c": 0.5}]}
    read = json.loads(json.dumps(to_json(tree), allow_nan=False))
    assert read["a"] == {"value": 1.0, "error": None, "interval": [None, None]}
    assert read["b"] == [None, 1, "x", None, {"c": 0.5}]
