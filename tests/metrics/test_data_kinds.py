"""Metrics of data that are no pixels: what is measured by default, in which space and unit."""

import math

import pytest
import torch
from oracles import Gaussian, OracleModel

from ddp.data import Dataset
from ddp.data.mapped import Mapped
from ddp.metrics.candidate import (
    Candidate,
    EvaluateOptions,
    Reference,
    change_units,
    nats_per_unit,
)
from ddp.metrics.distances import histogram_kl
from ddp.metrics.evaluate import evaluate, metric_names, parse_metrics
from ddp.metrics.features import kinds_of, train_classifier
from ddp.metrics.fixed_features import MAX_VALUES, filter_features, value_features
from ddp.metrics.likelihood_metrics import evaluate_ode_nll, evaluate_vlb
from ddp.metrics.sample_metrics import MAX_STATS, evaluate_value_stats, fitting_distances
from ddp.schedule import Schedule
from ddp.units import Units


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dataset_of(*event, count=60, mean=100.0, std=5.0, **fields):
    channels = (event[0],)
    units = Units(torch.full(channels, mean), torch.full(channels, std))
    items = normal(2 * count, *event)
    return Dataset("mine", items[:count], items[count:], units=units, **fields)


BY_DEFAULT = {
    (4, 8, 8): ["classifier", "filters", "values"],
    (2, 40): ["filters", "values"],
    (2,): ["points"],
    (30,): ["points"],
}


@pytest.mark.parametrize(("event", "spaces"), BY_DEFAULT.items())
def test_what_is_measured_by_default(event, spaces):
    names = parse_metrics(None, kinds_of(dataset_of(*event)), has_model=True)
    assert names == [*spaces, "memorization", "value_stats", "loss", "vlb", "ode_nll"]
    assert metric_names("pixel_stats") == ["value_stats"]


@pytest.mark.parametrize("event", [(4, 8, 8), (2, 40), (2,), (30,), (1,)])
def test_samples_of_every_kind_are_measured(event):
    dataset = dataset_of(*event)
    candidate = Candidate("c", {}, samples=1.5 * normal(60, *event, seed=1))
    options = EvaluateOptions().resolve(dataset, [candidate])
    names = [n for n in parse_metrics(None, kinds_of(dataset), False) if n != "classifier"]
    evaluation = evaluate([candidate], Reference(dataset, options), names, options)
    (subject,) = evaluation["subjects"]
    assert set(names) < set(subject)
    assert evaluation["recipe"]["unit"] == "nats/dim"
    sliced = subject["points" if len(event) == 1 else "values"]["sliced_wasserstein"]
    assert sliced["samples"]["value"] > 1.2 * sliced["real_vs_real"]["value"]


def test_distances_suit_the_number_of_dimensions():
    low, high = ("point", "low_dim"), ("point", "high_dim")
    assert {"wasserstein2", "histogram_kl"} <= set(fitting_distances(low, 2))
    assert "fd" not in fitting_distances(low, 2)
    assert {"wasserstein2", "fd"} <= set(fitting_distances(high, 8))
    assert "wasserstein2" not in fitting_distances(high, 9)
    assert "histogram_kl" not in fitting_distances(high, 3)


def test_histogram_kl_of_numbers_and_of_a_plane_with_a_constant_agree():
    a, b = normal(3000, 1), 1 + normal(3000, 1, seed=1)
    assert histogram_kl(b, b) == pytest.approx(0)
    assert histogram_kl(a, b) > 0.3


# ---- features ----


def test_values_of_long_items_are_projected_and_keep_distances():
    items = normal(40, 3, 50, 40)
    features = value_features(items)
    assert features.shape == (40, 256)
    ratio = torch.pdist(features) / torch.pdist(items.flatten(1).double())
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    assert ratio.std() < 0.1
    assert value_features(items[:, 0, :10, :]).equal(items[:, 0, :10, :].flatten(1).double())
    assert items[0, 0, :10, :].numel() <= MAX_VALUES


def test_filters_of_sequences_tell_smooth_from_rough_and_ignore_nothing():
    t = torch.linspace(0, 6.28, 64)
    smooth = torch.sin(t + normal(50, 1, 1))
    rough = smooth[..., torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    far = (filter_features(smooth).mean(dim=0) - filter_features(rough).mean(dim=0)).norm()
    near = filter_features(smooth)[:25].mean(dim=0) - filter_features(smooth)[25:].mean(dim=0)
    assert far > 3 * near.norm()
    assert filter_features(smooth).shape == (50, 5 + 3 * 32)


def test_a_classifier_of_mapped_floats_is_that_of_a_tensor():
    items, labels = normal(60, 2, 6, 6), torch.arange(60) % 2
    items += 2 * labels[:, None, None, None]
    how = {"train_labels": labels, "test_labels": labels, "classes": ["0", "1"]}
    mapped = Mapped(items.numpy(), (2, 6, 6))
    weights = []
    for data in (items, mapped):
        classifier = train_classifier(Dataset("x", data, data, **how), lambda steps: steps)
        weights.append(classifier.out.weight)
        assert classifier.accuracy > 0.9
    assert weights[0].equal(weights[1])


# ---- units ----


def test_statistics_are_in_the_units_of_the_data():
    dataset = dataset_of(3, 20, mean=1e4, std=2.0)
    candidate = Candidate("c", {}, samples=dataset.test + 1)
    results = evaluate_value_stats(candidate, Reference(dataset, EvaluateOptions()), None)
    cells = results["channel 1"]
    real = dataset.units.restore(dataset.test).double()[:, 1]
    assert cells["mean"]["real"].value == pytest.approx(real.mean().item(), abs=1e-3)
    assert cells["sd"]["real"].value == pytest.approx(real.std().item(), rel=1e-3)
    assert cells["mean"]["difference"].value == pytest.approx(2, abs=1e-5)


def test_of_many_dimensions_those_that_differ_most_are_told():
    dataset = dataset_of(200)
    samples = normal(60, 200, seed=1)
    samples[:, 150] += 3
    reference = Reference(dataset, EvaluateOptions())
    results = evaluate_value_stats(Candidate("c", {}, samples=samples), reference, None)
    assert len(results) == MAX_STATS
    assert "channel 150" in results


def test_likelihoods_do_not_depend_on_the_units_of_the_model():
    """The same density, told in the dataset's units, whatever the model standardized by."""
    dataset = dataset_of(2, 3, count=40)
    values = []
    for mean, std in ((100.0, 5.0), (90.0, 20.0)):
        own = Units(torch.full((2,), mean), torch.full((2,), std))
        data = Gaussian((100 - mean) / std, 5 / std, (2, 3))
        model = OracleModel(data, Schedule("cosine", 0))
        model.units = own
        options = EvaluateOptions(vlb_samples=64, nll_items=40).resolve(dataset, [])
        what = (Candidate("c", {}, model=model), Reference(dataset, options), options)
        vlb = evaluate_vlb(*what)["continuous"]["total"].value
        values.append((vlb, evaluate_ode_nll(*what)["density"]["total"].value))
    entropy = 0.5 * math.log(2 * math.pi) + 0.5 * dataset.test.square().mean().item()
    for pair in values:
        assert pair == pytest.approx((entropy, entropy), abs=0.06)
    assert nats_per_unit(dataset) == 6


def test_change_of_units_keeps_the_data():
    x0 = normal(5, 3, 4)
    old = Units(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 10, 100]))
    new = Units(torch.tensor([0.0, 9, 1]), torch.tensor([3.0, 1, 7]))
    assert new.restore(change_units(x0, old, new)) == pytest.approx(old.restore(x0), abs=1e-4)
    assert change_units(x0, old, old) is x0
    assert change_units(x0, None, None) is x0


def test_a_model_of_floats_is_refused_for_pixels_and_the_other_way():
    model = OracleModel(Gaussian(event=(1, 4, 4)), Schedule("cosine", 0))
    candidate = Candidate("c", {}, model=model)
    with pytest.raises(ValueError, match=r"floats \(1, 4, 4\)"):
        candidate.require_fit(dataset_of(1, 4, 4))
    model.units = dataset_of(1, 4, 4).units
    candidate.require_fit(dataset_of(1, 4, 4))
