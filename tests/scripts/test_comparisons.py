"""Benchmarks compare like with like: a variant of the ablation changes what its name says, and
nothing else; a noise schedule is measured on its own ends, too."""

import dataclasses
import re
import sys

import pytest
import torch
from conftest import ROOT
from oracles import Gaussian, OracleModel

from ddp.blocks import NORMS, Block
from ddp.config import Config
from ddp.data import Dataset, load_dataset
from ddp.model import build_model
from ddp.optim import build_optimizers
from ddp.schedule import Schedule
from ddp.training import Trainer

sys.path.insert(0, str(ROOT / "benchmarks"))
from _ablation_grid import STUDIES, Variant, batch_no_mean, config_of, set_branches, spoil
from _ablation_levels import LevelModel, mix_levels
from _cuda_graph import GraphSteps
from schedules import FIXED, cases, measure

SMALL = {"channels_base": 8, "blocks_per_level": 1}


@pytest.fixture(autouse=True)
def norms(monkeypatch):
    monkeypatch.setitem(NORMS, "batch_no_mean", batch_no_mean)  # as the benchmark does


def images(name):
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    return Dataset(name, pixels, pixels)


def all_variants():
    variants = [variant for study in STUDIES.values() for variant in study()]
    return {variant.name: variant for variant in variants}.values()


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_variant_differs_from_the_default_in_what_it_names(variant, dataset):
    default, other = config_of(variant, images(dataset), dataset=dataset)
    default, other = dataclasses.asdict(default), dataclasses.asdict(other)
    assert {name for name in default if other[name] != default[name]} <= {*variant.fields}
    assert all(other[name] == value for name, value in variant.fields.items())


@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_variant_leaves_each_weight_its_optimizer(variant):
    data = images("digits")
    configs = config_of(variant, data, dataset="digits", **SMALL)
    for config in configs:
        model = build_model(config, data.event)
        optimizers, _ = build_optimizers(model, config.optimizer)
        (group,) = optimizers[-1].param_groups if len(optimizers) > 1 else [{"params": []}]
        ids = {id(weight) for weight in group["params"]}
        names = {name for name, weight in model.named_parameters() if id(weight) in ids}
        hidden = re.compile(r"\.layer[12]\.weight$")
        expected = {name for name, _ in model.named_parameters() if hidden.search(name)}
        assert names == (set() if config.optimizer == "adamw" else expected)


@pytest.mark.parametrize("study", STUDIES)
def test_names_tell_the_variants_of_a_study_apart(study):
    names = [variant.name for variant in STUDIES[study]()]
    assert len({*names}) == len(names)


@pytest.mark.parametrize("init", ["xavier", "kaiming", "default"])
def test_branches_start_at_zero_or_not_whatever_init_says(init):
    _, config = config_of(Variant("", {"init": init}), images("digits"), dataset="digits", **SMALL)
    for zero in (True, False):
        network = build_model(config, (1, 8, 8)).network
        set_branches(network, zero)
        blocks = [module for module in network.modules() if isinstance(module, Block)]
        last = [network.conv_out.weight]
        last += [weight for b in blocks for weight in (b.norm2.weight, b.film.weight)]
        assert all(weight.any() != zero for weight in last)


def test_faults_are_in_as_many_items_as_asked_for():
    torch.manual_seed(0)
    pixels = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(200) % 10
    data = Dataset("digits", pixels, pixels, labels, labels, classes=list("0123456789"))
    spoiled = spoil(data, Variant("", bad_pixels=0.4), seed=1)
    changed = (spoiled.train != pixels).flatten(1)  # (200, 64)
    assert changed.any(dim=1).sum() == 80
    assert 0.2 < changed[changed.any(dim=1)].float().mean() < 0.3
    spoiled = spoil(data, Variant("", bad_labels=0.4), seed=1)
    assert 60 < (spoiled.train_labels != labels).sum() <= 80  # a tenth keeps its label by chance
    assert len(spoil(data, Variant("", items=50), seed=1).train) == 50


def test_batchnorm_without_its_mean_divides_by_the_spread_alone():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(64, 5, 8, 8)
    norm = NORMS["batch_no_mean"](5, 2)
    assert torch.allclose(norm(x), x / x.std(dim=(0, 2, 3), keepdim=True), rtol=1e-3)
    for _ in range(100):
        norm(x)
    assert torch.allclose(norm.eval()(x), norm.train()(x), rtol=1e-3)
    points = NORMS["batch_no_mean"](5, 0)
    assert points(x[:, :, 0, 0]).shape == (64, 5)


def test_neighboring_levels_share_a_part():
    data = images("digits")
    variant = Variant("", {"shards": 4, "batch_size": 16, "noise_copies": 1})
    _, config = config_of(variant, data, dataset="digits", **SMALL)
    trainer = Trainer(config, data)
    before, _ = trainer.draw_levels(0, 16)
    mix_levels(trainer, 4)
    parts = [trainer.sample_log_snr(0, 16, slice(p, None, 4))[0] for p in range(4)]
    assert torch.equal(torch.cat(parts), before)  # in order: those of a part are neighbors


def test_statistics_by_level_are_those_of_one_level():
    torch.manual_seed(0)
    pixels = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    data = Dataset("digits", pixels, pixels)
    _, config = config_of(Variant(""), data, dataset="digits", **SMALL)
    trainer = Trainer(config, data)
    for _ in range(20):  # branches start at zero
        trainer.train_step(0.0)
    for share in (0.0, 1.0):
        model = LevelModel(trainer, share)
        x_t = torch.randn(4, 1, 8, 8)
        log_snr = torch.tensor(-4.0)
        mixed = trainer.recalibrated_ema().denoise(x_t, log_snr)
        ours = model.denoise(x_t, log_snr)
        difference = (ours - mixed).abs().max() / mixed.abs().max()
        assert difference < 1e-4 if share == 0 else difference > 1e-3


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


@pytest.mark.parametrize("fields", [{}, {"norm": "none"}, {"optimizer": "adamw"}, {"warmup": 2}])
def test_the_step_of_a_cuda_graph_is_that_of_a_trainer(fields, monkeypatch):
    steps = 6
    data = load_dataset("digits")
    config = Config(dataset="digits", max_steps=steps, batch_size=16, noise_copies=2, **fields)
    config = dataclasses.replace(config.resolve(data), **SMALL)
    ours, theirs = Trainer(config, data), Trainer(config, data)
    monkeypatch.setattr(GraphSteps, "capture", lambda self: None)  # it needs a GPU
    graph = GraphSteps(ours, steps)
    losses = []
    for step in range(steps):
        monkeypatch.setattr(torch, "randn_like", lambda x0, k=step: theirs.eps(k, x0))
        graph.step()
        losses.append(theirs.train_step(step / steps).loss)
    torch.testing.assert_close(graph.tables["loss"], torch.stack(losses))
    for models in ((ours.model, theirs.model), (ours.ema, theirs.ema)):
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
