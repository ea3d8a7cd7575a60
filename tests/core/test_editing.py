"""Editing: what is kept is kept to the bit, and what is changed is changed as the papers say."""

import functools
import math

import pytest
import torch
from oracles import CorrelatedGaussian, Gaussian, GaussianMixture, OracleModel
from tiny import random_points, tiny_trainer
from torch import nn

from ddp.editing import (
    EDITS,
    FRAMES,
    EditInputs,
    changes,
    ddim_invert,
    dropout_layers,
    edited_samples,
    from_latents,
    interpolate,
    mc_dropout,
    repaint,
    sample_mc_dropout,
    sdedit,
    slerp,
)
from ddp.options import SamplerOptions
from ddp.rng import normal
from ddp.sampling import sample, sample_loop
from ddp.schedule import Schedule

DOUBLE = {"dtype": torch.float64}
DATA = Gaussian(0.4, 0.5, (1, 4, 4))


def edit_inputs(data=DATA, schedule=None, name=None, num_classes=0, fields=None, **given):
    """Return the EditInputs of a perfect model of `data`; fields: of SamplerOptions."""
    model = OracleModel(data, schedule or Schedule(), num_classes, has_null_label=True)
    options = SamplerOptions(**{"threshold": "none", **(fields or {})}).resolve(model)
    return EditInputs(model, options, seed=3, name=name, **given)


def last_state(states):
    *_, (_, x_t, _) = states
    return x_t


# ---- inversion and interpolation ----


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ddim_invert_converges_and_comes_back(zero_terminal_snr):
    """Against the flow of Gaussian data, which keeps (x_t - alpha mean) / standard deviation."""
    schedule = Schedule("linear", 1000, zero_terminal_snr=zero_terminal_snr)
    data = Gaussian(0.4, 0.5, (1,))
    x0 = torch.linspace(-1, 1.5, 6, **DOUBLE)[:, None]
    errors = []
    round_trips = []
    for steps in (50, 500):
        x_T, grid = ddim_invert(data.denoise, x0, schedule, schedule.sampling_grid(steps))
        assert (grid.diff() > 0).all()
        assert grid[-1] == schedule.table[0]
        errors.append((x_T - (x0 - 0.4) / 0.5).abs().max().item())
        back = last_state(sample_loop(data.denoise, x_T, grid, "ddim"))
        round_trips.append((back - x0).abs().max().item())
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02
    assert round_trips[1] < round_trips[0] / 4
    assert round_trips[1] < 0.02


def test_ddim_invert_refuses_a_level_alone():
    schedule = Schedule("cosine", 1)
    with pytest.raises(ValueError, match="steps=1"):
        ddim_invert(None, torch.zeros(1, 2), schedule, schedule.sampling_grid(1))


def test_slerp_keeps_the_ends_and_the_length():
    a, b = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, torch.zeros(5)), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(5)), b)
    a = a / a.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    b = b / b.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    between = slerp(a, b, torch.full((5,), 0.3))
    torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.ones(5))
    angle = torch.acos((a * b).flatten(1).sum(dim=1))
    part = torch.acos((a * between).flatten(1).sum(dim=1))
    torch.testing.assert_close(part / angle, torch.full((5,), 0.3))


def test_slerp_of_a_noise_with_itself_is_that_noise():
    a = torch.randn(2, 16)
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.2, 0.7])), a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_items", [False, True])
def test_interpolate_goes_from_one_end_to_the_other(with_items):
    items = DATA.sample(3)
    inputs = edit_inputs(items=items if with_items else None, fields={"steps": 5})
    indices = torch.arange(2 * FRAMES)
    x_t = interpolate(inputs, indices, None)["x_t"]
    if with_items:
        ends, _ = inputs.invert(torch.arange(3), None)
        pairs = ((0, 1), (1, 2))  # a row goes on where the last one ended
    else:
        ends = normal(3, "x_T", 0, torch.arange(4), (1, 4, 4))
        pairs = ((0, 1), (2, 3))
    for row, (first, last) in enumerate(pairs):
        torch.testing.assert_close(x_t[row * FRAMES], ends[first], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x_t[(row + 1) * FRAMES - 1], ends[last], rtol=1e-4, atol=1e-5)
    part = interpolate(inputs, indices[3:6], None)["x_t"]  # whatever the batch
    torch.testing.assert_close(part, x_t[3:6])


def test_interpolate_inverts_with_the_label_of_the_row():
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    inputs = edit_inputs(
        GaussianMixture(means, 0.3), items=means, num_classes=2, fields={"steps": 5}
    )
    label = torch.ones(FRAMES, dtype=torch.long)
    x_t = interpolate(inputs, torch.arange(FRAMES), label)["x_t"]
    first, _ = inputs.invert(torch.tensor([0]), label[:1])
    torch.testing.assert_close(x_t[:1], first)
    other, _ = inputs.invert(torch.tensor([0]), 0 * label[:1])
    assert not torch.allclose(other, first, atol=1e-2)


def test_reconstruct_is_inversion_and_back():
    items = DATA.sample(5)
    inputs = edit_inputs(name="reconstruct", items=items, fields={"sampler": "ddim", "steps": 200})
    x0, given, latents = edited_samples(inputs, torch.arange(7), None)
    assert torch.equal(given, items[torch.arange(7) % 5])
    assert (x0 - given).abs().max() < 0.03
    inputs.latents = latents
    changed = from_latents(inputs, torch.arange(7), None)
    assert torch.equal(changed["x_t"], latents)


def test_without_an_edit_samples_are_plain():
    inputs = edit_inputs(fields={"sampler": "ddim", "steps": 5})
    x0, given, latents = edited_samples(inputs, torch.arange(3), None)
    assert torch.equal(x0, sample(inputs.model, torch.arange(3), 3, None, **inputs.options))
    assert given is None
    assert latents is None
    assert changes(inputs, torch.arange(3), None) == {}


# ---- SDEdit ----


def test_sdedit_starts_where_strength_says():
    items = torch.rand(2, 1, 4, 4)
    inputs = edit_inputs(schedule=Schedule("cosine", 100), items=items, fields={"steps": 10})
    for strength, steps in ((1.0, 10), (0.5, 5), (0.01, 1)):
        inputs.strength = strength
        start = sdedit(inputs, torch.arange(2), None)
        assert len(start["grid"]) == steps + 1
        assert torch.equal(start["grid"], inputs.grid[-(steps + 1) :])
    inputs.options["steps"] = 100
    faint = sdedit(inputs, torch.arange(2), None)
    assert (faint["x_t"] - items).abs().max() < 0.2


def test_sdedit_keeps_more_of_the_item_the_weaker_it_is():
    items = DATA.sample(200)
    inputs = edit_inputs(name="image", items=items, fields={"steps": 50})
    distances = []
    for strength in (0.1, 0.5, 1.0):
        inputs.strength = strength
        x0, given, latents = edited_samples(inputs, torch.arange(200), None)
        assert latents is None
        assert torch.equal(given, items)
        distances.append((x0 - items).square().mean().item())
    assert distances[0] < 0.2 * distances[1] < 0.2 * distances[2]
    assert distances[2] == pytest.approx(2 * DATA.sd**2, rel=0.1)  # nothing is left of it


# ---- RePaint ----


def test_repaint_keeps_what_is_not_masked():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:, :] = True
    inputs = edit_inputs(
        name="inpaint",
        items=torch.rand(3, 1, 4, 4) * 2 - 1,
        mask=mask,
        jump_length=10,
        jump_n_sample=3,
        fields={"sampler": "ddpm", "steps": 30},
    )
    path = repaint(inputs, torch.arange(3), None)["grid"]
    # 30 steps, and twice more the ten that end at steps 19 and 29, the cleanest level with noise
    assert (path.diff() > 0).sum() == 30 + 2 * 2 * 10
    assert (path.diff() < 0).sum() == 4
    x0, given, _ = edited_samples(inputs, torch.arange(3), None)
    assert torch.equal(x0[:, :, :2], inputs.items[:, :, :2])
    assert (x0[:, :, 2:] != inputs.items[:, :, 2:]).all()
    assert torch.equal(given, inputs.items * ~mask)  # what is to be filled in is gray


def test_repaint_fills_in_the_conditional_distribution():
    """Two coordinates that are nearly equal: what is filled in must follow what is kept. Jumps
    help, as RePaint says."""
    correlation = 0.95
    data = CorrelatedGaussian(torch.tensor([[1.0, correlation], [correlation, 1.0]], **DOUBLE))
    count = 1500
    generator = torch.Generator().manual_seed(0)
    noise = functools.partial(torch.randn, count, 2, generator=generator, **DOUBLE)
    inputs = edit_inputs(
        data,
        items=data.sample(count),
        mask=torch.tensor([[False, True]]),
        jump_length=5,
        fields={"sampler": "ddpm", "steps": 100},
    )
    errors = []
    for jump_n_sample in (1, 8):
        inputs.jump_n_sample = jump_n_sample
        change = repaint(inputs, torch.arange(count), None)
        states = sample_loop(
            data.denoise, noise(), change["grid"], "ddpm", noise, project=change["project"]
        )
        x0 = last_state(states)
        slope = (x0[:, 0] * x0[:, 1]).mean() / (x0[:, 0] ** 2).mean()
        errors.append(abs(slope.item() - correlation))
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


# ---- every edit ----


@pytest.mark.parametrize("name", EDITS)
def test_edit_does_not_depend_on_the_batch(name):
    edit = EDITS[name]
    items = DATA.sample(3)
    inputs = edit_inputs(
        name=name,
        items=items if edit.reads == "items" else None,
        latents=items if edit.reads == "latents" else None,
        mask=(items[:1] > 0) if name == "inpaint" else None,
        jump_length=2,
        jump_n_sample=2,
        fields={"steps": 6, "sampler": edit.defaults.get("sampler")},
    )
    indices = torch.arange(2 * FRAMES)
    whole, given, latents = edited_samples(inputs, indices, None)
    assert whole.isfinite().all()
    assert (given is not None) == (edit.title is not None)
    assert (latents is not None) == edit.keeps_latents
    for part in (indices[:1], indices[5:12], indices.flip(0)):
        x0, _, _ = edited_samples(inputs, part, None)
        torch.testing.assert_close(x0, whole[part], rtol=1e-4, atol=1e-5)


def test_edit_inputs_repeat_what_was_given():
    items = DATA.sample(3)
    inputs = edit_inputs(items=items)
    assert torch.equal(inputs.take(items, torch.tensor([4, 2])), items[[1, 2]])
    assert torch.equal(inputs.given(torch.tensor([3])), items[:1])


# ---- MC dropout ----


@pytest.fixture(scope="module")
def model():
    """A model with dropout whose activations matter, in eval mode."""
    fields = {"dropout": 0.3, "timesteps": 50, "init": "default"}
    trainer = tiny_trainer(random_points(event=(1, 8, 8)), **fields)
    return trainer.ema.eval()


@torch.no_grad()
def test_mc_dropout_depends_on_the_item_and_the_call_alone(model):
    x_t = torch.randn(6, 1, 8, 8)
    log_snr = torch.zeros(6)

    def outputs(items, calls):
        results = []
        with mc_dropout(model, 3, items):
            for _ in range(calls):
                results.append(model.denoise(x_t[items], log_snr[items]))
        return results

    plain = model.denoise(x_t, log_snr)
    first, second = outputs(torch.arange(6), 2)
    assert not torch.allclose(first, plain, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)
    few = outputs(torch.tensor([4, 1]), 2)
    for whole, part in zip((first, second), few, strict=True):
        torch.testing.assert_close(part, whole[[4, 1]], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.denoise(x_t, log_snr), plain)  # nothing stays behind


def test_mc_dropout_keeps_the_mean():
    layer = nn.Sequential(nn.Dropout(0.3)).eval()
    with mc_dropout(layer, 0, torch.arange(500)):
        dropped = layer(torch.ones(500, 40))
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_mc_dropout_leaves_nothing_behind_after_an_error(model):
    with pytest.raises(KeyError), mc_dropout(model, 0, torch.arange(1)):
        raise KeyError
    assert not any(layer._forward_hooks for layer in dropout_layers(model))


def test_mc_dropout_needs_dropout():
    with pytest.raises(ValueError, match="dropout"):
        dropout_layers(nn.Sequential(nn.ReLU(), nn.Dropout(0.0)))


def test_sample_mc_dropout_is_the_spread_of_samples(model):
    indices = torch.arange(4)
    options = {"steps": 3, "threshold": "none"}
    std, mean = sample_mc_dropout(model, indices, 3, None, 5, **options)
    samples = []
    with mc_dropout(model, 3, indices):
        for _ in range(5):
            samples.append(sample(model, indices, 3, None, **options))
    samples = torch.stack(samples)
    torch.testing.assert_close(mean, samples.mean(dim=0))
    torch.testing.assert_close(std, samples.std(dim=0))
    assert std.min() > 0
    few, _ = sample_mc_dropout(model, indices[2:], 3, None, 5, **options)
    torch.testing.assert_close(few, std[2:], rtol=1e-3, atol=1e-5)
    assert math.isfinite(std.max())
