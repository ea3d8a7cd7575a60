"""Models side by side, and groups of trainings whose differences are known."""

import math

import pytest
import torch

from ddp.config import Config
from ddp.metrics.candidate import Candidate
from ddp.metrics.comparison import comparison, group_comparison, group_warnings
from ddp.metrics.evaluate import find_better, to_json
from ddp.metrics.uncertainty import Estimate

ITEMS = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def training(group, seed, value, metric="vlb"):
    """A measured network of a group: its only figure is `value`, with the error 1 / 20."""
    config = None if seed is None else Config(seed=seed)
    items = value + (ITEMS - ITEMS.mean()) / ITEMS.std()
    row = {"samples": Estimate.mean(items), "real_vs_real": Estimate.mean(items)}
    results = {metric: {"fd": row, "counts": {"samples": [1, 2]}, "copies": 3}}
    name = f"{group}-{seed}-{value}"
    return Candidate(name, {}, config=config, group=group, results=results)


def groups_of(metric="vlb", **values):
    """The comparison of groups; values: of each group, seed -> value, or a list without seeds."""
    candidates = []
    for name, of_seeds in values.items():
        pairs = of_seeds.items() if isinstance(of_seeds, dict) else [(None, v) for v in of_seeds]
        candidates += [training(name, seed, value, metric) for seed, value in pairs]
    return candidates, group_comparison(candidates, find_better)


def less_first(groups, path="vlb/fd/samples"):
    """What the last group has less the first: all of `less_first`, its only figure."""
    about = groups[-1]["less_first"]
    assert list(about["figures"]) == [path]
    return about, about["figures"][path]


# ---- one by one ----


def test_comparison_is_paired():
    x = torch.randn(200)
    a = Candidate("a", {}, results={"vlb": {"total": Estimate.mean(x), "monte_carlo": 0.1}})
    b = Candidate("b", {}, results={"vlb": {"total": Estimate.mean(x + 1), "monte_carlo": 0.1}})
    (row,) = comparison([a, b])
    assert (row["subject"], row["path"]) == ("b", "vlb/total")
    assert row["difference"].value == pytest.approx(1)
    assert row["difference"].error < 1e-6
    assert group_comparison([a, b], find_better) == []


def test_comparison_leaves_out_what_says_no_more():
    estimate = Estimate.mean(torch.randn(9))
    row = {"samples": estimate, "real_vs_real": estimate, "relative_to_real": estimate}
    candidates = [Candidate(name, {}, results={"pixels": {"fd": row}}) for name in "ab"]
    assert [row["path"] for row in comparison(candidates)] == ["pixels/fd/samples"]
    candidates[0].results = {}
    assert comparison(candidates)[0]["difference"] is None


# ---- groups of trainings ----


def test_the_spread_of_trainings_and_that_of_samples_stand_apart():
    candidates, groups = groups_of(a={0: 1, 1: 2, 2: 3}, b=[5, 5])
    assert [group["name"] for group in groups] == ["a", "b"]
    assert groups[0]["seeds"] == [0, 1, 2]
    assert groups[0]["subjects"] == ["a-0-1", "a-1-2", "a-2-3"]
    assert groups[0]["less_first"] is None
    (figure,) = groups[0]["figures"].values()
    assert figure == pytest.approx({"mean": 2, "sd": 1, "sample_error": 0.05})
    (figure,) = groups[1]["figures"].values()
    assert figure == pytest.approx({"mean": 5, "sd": 0, "sample_error": 0.05})
    assert comparison(candidates) == []  # not one by one
    to_json(groups)


def test_trainings_with_the_same_seeds_are_paired_whatever_their_order():
    """The seeds differ by far more than the groups do."""
    _, groups = groups_of(a={0: 1, 1: 10, 2: 100}, b={2: 101.2, 0: 1.9, 1: 10.9})
    about, figure = less_first(groups)
    assert (about["interval_of"], about["paired"]) == ("trainings", True)
    assert figure["better"] == "a"
    difference = figure["difference"]  # of 0.9, 0.9, 1.2; t of 2 degrees is 4.3027
    assert difference["value"] == pytest.approx(1)
    assert difference["error"] == pytest.approx(0.1)
    low, high = difference["interval"]
    assert (low, high) == pytest.approx((1 - 0.43027, 1 + 0.43027), abs=1e-5)


@pytest.mark.parametrize(
    "b",
    [
        {0: 1.9, 1: 10.9, 3: 101.2},  # another seed
        {0: 1.9, 1: 10.9},  # fewer
        {0: 1.9, 1: 10.9, 2: 101.2, 3: 7},  # more
        [1.9, 10.9, 101.2],  # samples, whose seeds nobody knows
    ],
)
def test_other_seeds_or_numbers_are_not_paired(b):
    _, groups = groups_of(a={0: 1, 1: 10, 2: 100}, b=b)
    about, figure = less_first(groups)
    assert (about["interval_of"], about["paired"]) == ("trainings", False)
    assert figure["better"] is None  # it cannot be told
    low, high = figure["difference"]["interval"]
    assert low < 0 < high


def test_a_difference_beyond_the_spread_of_trainings_is_told_by_the_metric_s_direction():
    a, b = [1.0, 1.1, 0.9], [3.0, 3.2, 2.8, 3.0]
    better = {}
    for metric, measure in (
        ("vlb", "fd"),
        ("pixels", "fd"),
        ("pixels", "recall"),
        ("memorization", "x"),
    ):
        candidates, _ = groups_of(metric, a=a, b=b)
        for candidate in candidates:
            candidate.results = {metric: {measure: candidate.results[metric]["fd"]}}
        _, figure = less_first(
            group_comparison(candidates, find_better), f"{metric}/{measure}/samples"
        )
        better[metric, measure] = figure["better"]
        assert figure["difference"]["interval"][0] > 1.5
    assert list(better.values()) == ["a", "a", "b", None]
    assert find_better(("ode_nll", "noise", "below_vlb")) is None
    assert find_better(("loss", "log-SNR 1.00", "v")) == "lower"


@pytest.mark.parametrize(("a", "b"), [([1], [9]), ([1], [9, 9.1, 8.9]), ([1, 1.1, 0.9], [9])])
def test_a_group_of_one_shows_nothing_about_trainings(a, b):
    candidates, groups = groups_of(a=a, b=b)
    about, figure = less_first(groups)
    assert (about["interval_of"], about["paired"]) == ("samples", False)
    assert figure["better"] is None  # however far apart
    assert isinstance(figure["difference"], Estimate)  # of the same items: here they have no spread
    assert figure["difference"].value == pytest.approx(8)
    assert figure["difference"].error < 1e-6
    single = [name for name, values in (("a", a), ("b", b)) if len(values) == 1]
    (warning,) = group_warnings(candidates)
    assert warning.startswith(f"{', '.join(single)}: one training each: the interval holds the sam")
    (figure,) = groups[0 if "a" in single else 1]["figures"].values()
    assert figure["sd"] is None


def test_two_differences_that_agree_by_chance_show_nothing():
    _, groups = groups_of(a={0: 1, 1: 10}, b={0: 2, 1: 11})
    about, figure = less_first(groups)
    assert (about["paired"], figure["better"]) == (False, None)


def test_one_seed_twice_is_told_and_not_paired():
    candidates, _ = groups_of(a={0: 1, 1: 2, 2: 3}, b={0: 3, 1: 4, 2: 5})
    candidates[1].config = candidates[4].config = Config(seed=0)
    (a, b) = group_warnings(candidates)
    assert a == "a: two runs have seed 0; are they two trainings?"
    assert b.startswith("b: two runs have seed 0")
    assert not group_comparison(candidates, find_better)[1]["less_first"]["paired"]


def test_a_figure_that_one_training_lacks_is_left_out():
    candidates, _ = groups_of(a=[1, 2], b=[3, 4], c=[5, 6])
    candidates[2].results = {}
    a, b, c = group_comparison(candidates, find_better)
    assert (len(a["figures"]), len(b["figures"]), len(c["figures"])) == (1, 0, 1)
    assert b["less_first"]["figures"] == {}
    assert less_first([a, b, c])[1]["difference"]["value"] == pytest.approx(4)


def test_a_group_alone_has_its_spreads():
    candidates, (group,) = groups_of(a=[1, 3])
    assert group["figures"]["vlb/fd/samples"]["sd"] == pytest.approx(math.sqrt(2))
    assert group_warnings(candidates) == []
