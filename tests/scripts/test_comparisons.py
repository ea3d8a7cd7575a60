"""Benchmarks compare like with like: a variant of the ablation changes what its name says, and
nothing else; a noise schedule is measured on its own ends, too."""

import dataclasses
import sys

import pytest
import torch
from conftest import ROOT
from oracles import Gaussian, OracleModel

from ddp.data import Dataset
from ddp.model import build_model
from ddp.optim import build_optimizers
from ddp.schedule import Schedule

sys.path.insert(0, str(ROOT / "benchmarks"))
from ablation import VARIANTS, config_of, name_of
from schedules import FIXED, cases, measure

SMALL = {"channels_base": 8, "blocks_per_level": 1}


def images(name):
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    return Dataset(name, pixels, pixels)


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_variant_differs_from_the_default_in_what_it_names(variant, dataset):
    data = images(dataset)
    default = dataclasses.asdict(config_of({}, data, dataset=dataset).resolve(data))
    other = dataclasses.asdict(config_of(variant, data, dataset=dataset).resolve(data))
    assert {name for name in default if other[name] != default[name]} == set(variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_variant_leaves_each_weight_its_optimizer(variant):
    def trained_by_muon(variant):
        data = images("digits")
        config = config_of(variant, data, dataset="digits", **SMALL)
        model = build_model(config, data.event)
        optimizers, _ = build_optimizers(model, config.optimizer)
        (group,) = optimizers[-1].param_groups if len(optimizers) > 1 else [{"params": []}]
        ids = [id(weight) for weight in group["params"]]
        return [name for name, weight in model.named_parameters() if id(weight) in ids]

    names = trained_by_muon(variant)
    assert names == ([] if variant.get("optimizer") == "adamw" else trained_by_muon({}))


def test_predictions_stand_beside_their_weightings():
    for variant in VARIANTS:
        if "prediction" in variant:
            assert {"weighting": variant["weighting"]} in VARIANTS


def test_schedules_are_compared_on_their_own_ends_too():
    data = Gaussian(0.3, 0.5, (2,))
    model = OracleModel(data, Schedule("learned", 0))
    x0 = data.sample(1000)
    with torch.no_grad():
        for name, schedule, times, ends in cases(model):
            own = name.endswith("own ends")
            if times is None:
                assert name == "karras"  # sigma / alpha ends at 80, log-SNR -8.8
                continue
            reached = [schedule.log_snr(t).item() for t in times]
            expected = [ends.log_snr(t).item() for t in (0.0, 1.0)]
            assert reached == pytest.approx(expected, abs=1e-3), name
            assert (expected == pytest.approx([13.0, -9.0])) != own
            row = measure(name, model, schedule, times, ends, x0, seeds=8)
            bound = 2 * data.vlb(*expected)[0]  # of two dimensions
            assert row["bound"] == pytest.approx(bound, abs=5 * row["se"] + 0.05), name
    assert name == f"{FIXED[-1]}, own ends"
