"""Device and precision selection."""

import os

import torch

from ddp.optim import has_fast_bf16


def select_device(name="auto"):
    """Return the torch.device called `name`, tried out; auto is CUDA, else MPS, else the CPU.

    Raises ValueError when it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # read once, before the first product of matrices
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or they add in any order
        torch.zeros(1, device=device).item()  # a build may know a device that this machine lacks
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here ({reason}); use auto or cpu") from None
    return device


def select_precision(name, device):
    """Return the precision to train in: fp32, bf16 or fp16; auto is bf16 where it is fast.

    Raises ValueError for fp16 without a CUDA GPU."""
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp16" and device.type != "cuda":  # only CUDA's kernels handle its small range well
        raise ValueError(f"precision=fp16 needs a CUDA GPU, not {device.type}; use bf16 or fp32")
    return name


def sampling_dtype(name, trained_in, device):
    """Return the torch.dtype in which a model holds its weights when it samples.

    `name` is fp32, bf16, or None: fp32 if the training's config asked for it, else the fastest."""
    if name is None:
        name = "fp32" if trained_in == "fp32" else "auto"
    return torch.bfloat16 if select_precision(name, device) == "bf16" else torch.float32


def set_tf32(allowed):
    """Choose whether float32 products on a CUDA GPU may round their factors to TF32's 10 bits."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def set_deterministic(wanted, device):
    """Choose whether kernels add in one order, so that a run has the same bits each time.

    Else cuDNN takes the fastest it finds. A CPU's always add in one order. On a GPU the gradients
    of attention may not, of which PyTorch warns."""
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted
    if device.type == "cuda":
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass, finds bugs
