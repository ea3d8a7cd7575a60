"""What this machine has: the device, and the arithmetic that pays on it."""

import torch


def pick_device(name="auto"):
    """The torch.device called `name`; auto is CUDA, else MPS, else the CPU.

    Raises ValueError when this machine or this build of PyTorch lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); try auto or cpu"
        ) from None
    return device


def has_fast_bf16(device):
    """Whether bf16 convolutions are faster than fp32 here: by capability, so that a run that is
    resumed on the same machine computes in the same way."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # private names, so a future PyTorch without them means fp32
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def pick_precision(name, device):
    """fp32, bf16 or fp16 for `name`; auto is bf16 where it is fast. Raises ValueError for fp16 on a
    CPU, whose small range only CUDA's kernels handle well."""
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"--precision fp16 needs a CUDA GPU, not {device.type}; use bf16 or fp32")
    return name


def wait(device):
    """Until the device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def use_tf32(allowed):
    """Whether products of float32 on a CUDA GPU may round their factors to TF32's 10 bits."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def sampling_dtype(name, trained_in, device):
    """The torch.dtype in which a model that samples holds its weights. name: fp32, bf16, or None:
    fp32 if it was trained in that by choice, else the fastest here."""
    name = name or ("fp32" if trained_in == "fp32" else "auto")
    return torch.bfloat16 if pick_precision(name, device) == "bf16" else torch.float32
