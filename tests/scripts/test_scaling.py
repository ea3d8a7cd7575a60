"""benchmarks/scaling.py: what it counts and fits, and that it runs and goes on."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from helpers import refused, run

from ddp.config import Config
from ddp.presets import PRESETS

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling
from _scaling_model import (
    BATCH,
    CASES,
    COUNTS,
    communication,
    count_model,
    count_step,
    fit_times,
    fitting_part,
    predictions,
)


def test_operations_are_counted():
    a = torch.ones(3, 4)
    b = torch.ones(4, 5)
    counts = count_step(lambda: (a @ b).t())  # a view is no operation
    assert counts == {"flops": 2 * 3 * 4 * 5, "moved": 4 * (12 + 20 + 15), "ops": 1}


def test_fit_finds_the_costs_of_times_that_follow_them():
    """And leaves out what costs nothing, where least squares alone would give it less."""
    costs = (2e-12, 0.0, 5e-6)
    sweeps = {}
    for i, name in enumerate("ab"):
        rows = []
        for n in (1, 2, 5):
            row = dict(zip(COUNTS, (n * 1e9, n * n * 1e6 * (i + 1), 300 + n + i), strict=True))
            row["seconds"] = sum(cost * row[key] for cost, key in zip(costs, COUNTS, strict=True))
            rows.append(row)
        sweeps[name] = rows
    fit = fit_times(sweeps)
    found = [fit[f"seconds_per_{what}"] for what in ("flop", "byte", "op")]
    assert found == pytest.approx(costs, abs=1e-18)
    assert max(fit["errors"].values()) < 1e-6


def test_exponent_is_that_of_a_power_law():
    rows = [{"value": n, "seconds": 3 * n**1.5} for n in (1, 10, 100)]
    assert scaling.exponent(rows, "seconds") == pytest.approx(1.5)


def test_sums_send_what_a_ring_sends():
    """Twice the vector, but for what stays; in messages to all, or up and down a tree."""
    by_tree, fast = communication(params=10**9, gpus=2)
    assert by_tree == pytest.approx(4e9 / 450e9 + 2 * 5e-6)
    assert fast == by_tree
    by_tree, fast = communication(params=0, gpus=1024)
    assert (by_tree, fast) == pytest.approx((2 * 1023 * 5e-6, 2 * 10 * 5e-6))


def test_counts_of_an_item_grow_with_its_pixels():
    """By 16, for images whose sides are 4 times as long and a network without attention."""
    fields = {"blocks_per_level": 1}
    small, large = (count_model(fields, (3, side, side)) for side in (32, 128))
    for name in ("params", "ops", "muon_flops"):
        assert small[name] == large[name]
    assert 15 < large["flops"] / small["flops"] < 16.5


def test_part_is_halved_until_it_fits(monkeypatch):
    config = Config(**PRESETS["images"])
    assert fitting_part(config, (3, 32, 32), 64) == 64
    monkeypatch.setattr("_scaling_model.MEMORY", 2e8)
    part = fitting_part(config, (3, 32, 32), 256)
    assert 2 <= part < 256
    assert fitting_part(config, (3, 256, 256), 256) == 0


def test_more_gpus_wait_more():
    rows = predictions(list(CASES)[:1], seconds_per_op=1e-6)["rows"]
    assert [row["gpus"] * row["part"] for row in rows] == [BATCH] * 3
    efficiency = [row["efficiency"] for row in rows]
    assert 1 > efficiency[0] > efficiency[1] > efficiency[2] > 0


def test_program_measures_and_goes_on(tmp_path):
    """A sweep that is measured later joins those in the file."""
    out = run("scaling.py", "--quick", "--only", "batch_size", cwd=tmp_path)
    first = json.loads((tmp_path / "scaling.json").read_text())
    rows = first["sweeps"]["batch_size"]
    assert [row["value"] for row in rows] == [4, 8]
    assert rows[1]["flops"] > 1.5 * rows[0]["flops"]
    assert f"time ~ batch_size^{first['exponents']['batch_size']['seconds']:.2f}" in out
    run("scaling.py", "--quick", "--only", "sums", cwd=tmp_path)
    both = json.loads((tmp_path / "scaling.json").read_text())["sweeps"]
    assert both["batch_size"] == rows
    assert all(row["seconds"] > 0 and row["fast_seconds"] > 0 for row in both["sums"])
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert "choose from" in refused("scaling.py", "--only", "nothing", cwd=tmp_path)
