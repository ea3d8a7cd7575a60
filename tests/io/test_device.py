"""Devices and precisions: what is chosen, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from ddp.io.device import (
    sampling_dtype,
    select_device,
    select_precision,
    set_tf32,
)
from ddp.planning import synchronize

CPU = torch.device("cpu")


def test_select_device_auto_is_one_that_works():
    device = select_device("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    synchronize(device)


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", ""])
def test_select_device_refuses_what_cannot_be_used(name):
    with pytest.raises(ValueError, match=f"device={name}"):
        select_device(name)


@pytest.mark.parametrize("fast", [True, False])
def test_select_precision_auto_is_bf16_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr("ddp.io.device.has_fast_bf16", lambda device: fast)
    assert select_precision("auto", CPU) == ("bf16" if fast else "fp32")
    assert select_precision("fp32", CPU) == "fp32"
    assert select_precision("bf16", CPU) == "bf16"


def test_select_precision_fp16_needs_cuda():
    with pytest.raises(ValueError, match="precision=fp16"):
        select_precision("fp16", CPU)
    assert select_precision("fp16", SimpleNamespace(type="cuda")) == "fp16"


@pytest.mark.parametrize(
    ("name", "trained_in", "fast", "expected"),
    [
        (None, "fp32", True, torch.float32),  # chosen in training, so kept
        (None, "auto", True, torch.bfloat16),
        (None, "auto", False, torch.float32),
        (None, "bf16", False, torch.float32),
        ("bf16", "fp32", False, torch.bfloat16),
        ("fp32", "bf16", True, torch.float32),
    ],
)
def test_sampling_dtype(monkeypatch, name, trained_in, fast, expected):
    monkeypatch.setattr("ddp.io.device.has_fast_bf16", lambda device: fast)
    assert sampling_dtype(name, trained_in, CPU) == expected


def test_set_tf32_is_for_products_and_convolutions():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        for allowed, precision in ((True, "tf32"), (False, "ieee")):
            set_tf32(allowed)
            assert torch.backends.cuda.matmul.fp32_precision == precision
            assert torch.backends.cudnn.conv.fp32_precision == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
        torch.backends.cudnn.conv.fp32_precision = before[1]
