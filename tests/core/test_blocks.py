"""Convolutions of small feature maps: their gradients are those of any convolution."""

import pytest
import torch
import torch.nn.functional as F

from ddp import blocks
from ddp.blocks import Conv2d, SmallMapConv


@pytest.mark.parametrize("batch", [1, 6, 32, 48])  # 1, 2, 32 and 16 images in a row
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gradients_by_rows_of_images_are_those_of_a_convolution(batch, size, kernel_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 3, kernel_size, kernel_size, generator=generator, dtype=torch.float64)
    direction = torch.randn(batch, 5, *size, generator=generator, dtype=torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    out = SmallMapConv.apply(*inputs)
    expected = F.conv2d(*inputs, padding=kernel_size // 2)
    assert torch.equal(out, expected)
    ours = torch.autograd.grad(out, inputs, direction)
    theirs = torch.autograd.grad(expected, inputs, direction)
    for gradient, of_conv2d in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, of_conv2d, rtol=1e-12, atol=1e-12)


@pytest.fixture
def amx(monkeypatch):
    monkeypatch.setattr(blocks, "HAS_AMX", True)


def conv(**options):
    torch.manual_seed(0)
    return Conv2d(16, 16, 3, padding=1, **{"bias": False, **options})


def test_a_small_map_in_bf16_trains_as_another_convolution(amx, monkeypatch):
    x = torch.randn(32, 16, 4, 4)
    gradients = []
    for has_amx in (True, False):
        monkeypatch.setattr(blocks, "HAS_AMX", has_amx)
        layer = conv()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.gains_by_rows(x) == has_amx
            out = layer(x)
        out.float().square().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        gradients.append(layer.weight.grad)
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 0.01  # both round to bf16


@pytest.mark.parametrize(
    ("size", "options", "autocast", "grad"),
    [
        ((7, 7), {}, True, True),  # a large map
        ((4, 4), {"bias": True}, True, True),
        ((4, 4), {}, False, True),  # float32
        ((4, 4), {}, True, False),  # no gradient is wanted
    ],
)
def test_anything_else_is_a_plain_convolution(amx, size, options, autocast, grad):
    layer = conv(**options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
        assert not layer.gains_by_rows(torch.randn(2, 16, *size))
