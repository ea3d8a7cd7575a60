"""Muon against PyTorch's, one matrix at a time."""

import pytest
import torch

from ddp.muon import Muon, orthogonal

SHAPES = [(8, 24), (16, 16), (8, 24), (24, 8), (32, 9), (8, 24)]


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def trained(optimizer, parameters, steps):
    for step in steps:
        for p, gradient in zip(parameters, matrices(step), strict=True):
            p.grad = gradient
        optimizer.step()
    return parameters


def test_the_step_is_that_of_pytorch():
    ours = trained(Muon(a := matrices(0), lr=0.1), a, [1, 2, 3])
    theirs = trained(torch.optim.Muon(b := matrices(0), lr=0.1, weight_decay=0.0), b, [1, 2, 3])
    for x, y, start in zip(ours, theirs, matrices(0), strict=True):
        moved = (x - start).norm()
        assert moved > 0.1
        assert (x - y).norm() < 0.03 * moved  # of bfloat16, which has 8 bits


def test_it_goes_on_from_its_state():
    whole = trained(Muon(a := matrices(0)), a, [1, 2, 3])
    first = Muon(b := matrices(0))
    trained(first, b, [1, 2])
    other = Muon(b)
    other.load_state_dict(first.state_dict())
    for x, y in zip(whole, trained(other, b, [3]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(5, 8, 24), (5, 24, 8), (1, 16, 16)])
def test_the_singular_values_of_a_step_are_about_one(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonal(stack))
    assert values.shape == (shape[0], min(shape[1:]))
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert not orthogonal(torch.zeros(shape)).any()
