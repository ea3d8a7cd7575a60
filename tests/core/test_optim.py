"""Muon against PyTorch's, one matrix at a time; which optimizer trains which weight."""

import pytest
import torch
from tiny import TINY, random_points
from torch import nn

from ddp.blocks import ACTIVATIONS, NORMS
from ddp.config import Config
from ddp.model import PREDICTIONS, DiffusionModel, build_model
from ddp.optim import (
    BARE_MUON_LR,
    BESIDE_BARE_MUON_LR,
    BESIDE_MUON_LR,
    MUON_LR,
    SCHEDULE_LR,
    Muon,
    as_matrix,
    build_optimizers,
    orthogonalize,
    saved_lr_scales,
)
from ddp.reverse import INITS
from ddp.schedule import Schedule

SHAPES = [(8, 24), (16, 16), (8, 24), (24, 8), (32, 9), (8, 24)]


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def train(optimizer, parameters, steps):
    """Take steps of which each has random gradients."""
    for step in steps:
        for parameter, gradient in zip(parameters, matrices(step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def test_muon_step_is_that_of_pytorch():
    ours = matrices(0)
    theirs = matrices(0)
    train(Muon(ours, lr=0.1), ours, [1, 2, 3])
    train(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0), theirs, [1, 2, 3])
    for x, y, start in zip(ours, theirs, matrices(0), strict=True):
        moved = (x - start).norm()
        assert moved > 0.1
        assert (x - y).norm() < 0.03 * moved  # of bfloat16, which has 8 bits


def test_muon_goes_on_from_its_state():
    whole = matrices(0)
    train(Muon(whole), whole, [1, 2, 3])
    resumed = matrices(0)
    first = Muon(resumed)
    train(first, resumed, [1, 2])
    second = Muon(resumed)
    second.load_state_dict(first.state_dict())
    train(second, resumed, [3])
    for x, y in zip(whole, resumed, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(5, 8, 24), (5, 24, 8), (1, 16, 16)])
def test_orthogonalize_makes_singular_values_about_one(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalize(stack))
    assert values.shape == (shape[0], min(shape[1:]))
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert not orthogonalize(torch.zeros(shape)).any()


def test_as_matrix_of_a_sequences_convolution_is_a_view_too():
    conv = torch.nn.Conv1d(3, 5, 3)
    matrix = as_matrix(conv.weight.data)
    assert matrix.shape == (5, 9)
    assert matrix.data_ptr() == conv.weight.data_ptr()


def test_as_matrix_is_a_view_of_what_a_convolution_multiplies_by():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 4, 4)
    matrix = as_matrix(conv.weight.data)
    patches = nn.functional.unfold(x, 3, padding=1).reshape(2, 3, 9, 16)  # (B, C, 3 x 3, H W)
    patches = patches.transpose(1, 2).reshape(2, 27, 16)  # channels last
    torch.testing.assert_close((matrix @ patches).reshape(2, 5, 4, 4), conv(x))
    matrix.zero_()
    assert not conv.weight.any()


# ---- which optimizer trains what ----


def parameter_ids(optimizer):
    ids = []
    for group in optimizer.param_groups:
        ids += [id(parameter) for parameter in group["params"]]
    return ids


@pytest.mark.parametrize("event", [(1, 8, 8), (2,)])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("schedule", ["cosine", "learned"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_build_optimizers_trains_every_weight_once(event, norm, schedule, optimizer):
    data = random_points(event=event)
    config = Config(**TINY, norm=norm, schedule=schedule, optimizer=optimizer).resolve(data)
    model = build_model(config, event)
    optimizers, lr_scales = build_optimizers(model, optimizer, 0.01)
    ids = []
    groups = []
    for each in optimizers:
        ids += parameter_ids(each)
        groups += each.param_groups
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert len(groups) == len(lr_scales)
    expected_scales = [1.0]
    if schedule == "learned":
        expected_scales.append(SCHEDULE_LR)
        assert groups[1]["weight_decay"] == 0
    if optimizer == "muon":
        hidden, scale_invariant = model.network.hidden_weights()
        assert scale_invariant == (norm != "none")
        expected_scales[0] = BESIDE_MUON_LR if scale_invariant else BESIDE_BARE_MUON_LR
        expected_scales.append(MUON_LR if scale_invariant else BARE_MUON_LR)
        assert parameter_ids(optimizers[1]) == [id(weight) for weight in hidden]
    assert lr_scales == expected_scales


def muon_names(event, **fields):
    """Return the names of the weights that Muon trains."""
    config = Config(**TINY, **fields).resolve(random_points(event=event))
    model = build_model(config, event)
    ids = parameter_ids(build_optimizers(model, "muon")[0][1])
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("event", [(1, 8, 8), (2,)])
@pytest.mark.parametrize(
    "variant",
    [
        *({"norm": norm} for norm in NORMS),
        *({"activation": activation} for activation in ACTIVATIONS),
        *({"init": init} for init in INITS),
        *({"prediction": prediction} for prediction in PREDICTIONS),
        {"dropout": 0.1},
        {"timesteps": 0},
    ],
    ids=str,
)
def test_optimizer_of_a_weight_does_not_depend_on_what_is_compared(event, variant):
    names = muon_names(event, **variant)
    assert names == muon_names(event)
    assert len(names) >= 2


def test_build_optimizers_takes_a_foreign_network():
    model = DiffusionModel(Schedule(), nn.Linear(2, 2), "v", (2,))
    optimizers, lr_scales = build_optimizers(model, "muon")
    assert len(optimizers) == len(lr_scales) == 1
    assert len(parameter_ids(optimizers[0])) == 2


def test_a_run_goes_on_with_the_rates_that_it_has():
    today = [BESIDE_MUON_LR, SCHEDULE_LR, MUON_LR]
    assert saved_lr_scales([2.0, 3.0, 4.0], today) == [2.0, 3.0, 4.0]
    assert saved_lr_scales([], today) == [1.0, SCHEDULE_LR, 320.0]  # before version 0.6
    bare = [BESIDE_BARE_MUON_LR, BARE_MUON_LR]
    assert saved_lr_scales([], bare) == bare
    with pytest.raises(ValueError, match="2 learning rates, not 3"):
        saved_lr_scales([1.0, 2.0], today)
