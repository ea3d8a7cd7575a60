"""A device that lies on the CPU and, like Apple's MPS, has no float64.

    with FakeMPS() as mps:
        model = mps.move(model)
        nats = vlb(model, mps.move(x0), ...)

Tensors there say that their device is mps, mix with those of the CPU only where these are 0-d, and
raise TypeError as soon as they would hold float64.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps")
FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.eye, torch.full, torch.tensor)
FACTORIES += (torch.empty, torch.linspace, torch.rand, torch.randn)


class OnMPS(torch.Tensor):
    """A tensor of the device; __torch_function__ of FakeMPS does what makes it one."""


class FakeMPS(TorchFunctionMode):
    def move(self, x):
        """A tensor, or a module with its weights and buffers, on the device."""
        if isinstance(x, torch.Tensor):
            return to_mps(x)
        for module in x.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    moved = to_mps(weight.data)
                    module._parameters[name] = torch.nn.Parameter(moved, weight.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = to_mps(buffer)
        return x

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return self.call(function, args, kwargs)

    def call(self, function, args, kwargs):
        here = isinstance(args[0], OnMPS) if args else False
        if function == torch.Tensor.device.__get__:  # a new wrapper each time
            return MPS if here else function(*args)
        if function in (torch.Tensor.cpu, torch.Tensor.to, torch.Tensor.double):
            return move_or_cast(function, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_mps = any(isinstance(x, OnMPS) for x in tensors)
        if function in FACTORIES and kwargs.get("device") is not None:
            on_mps = torch.device(kwargs.pop("device")) == MPS
        index = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if on_mps and not index:  # an index may lie on the CPU
            strangers = [x for x in tensors if not isinstance(x, OnMPS) and x.ndim]
            assert not strangers, f"{function}: tensors of two devices"
        result = function(*args, **kwargs)
        return tree_map(to_mps, result) if on_mps else tree_map(to_cpu, result)


def move_or_cast(function, args, kwargs):
    """What .cpu(), .double() and .to(...) do: first the type where the tensor is, then the move."""
    x, *rest = args
    if function is torch.Tensor.cpu:
        return to_cpu(x)
    place = MPS if isinstance(x, OnMPS) else torch.device("cpu")
    dtype = torch.float64 if function is torch.Tensor.double else kwargs.get("dtype")
    for value in [*rest, kwargs.get("device")]:
        if isinstance(value, torch.Tensor):
            place = MPS if isinstance(value, OnMPS) else torch.device("cpu")
            dtype = value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            place = torch.device(value)
    if isinstance(x, OnMPS) and dtype is torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    x = to_cpu(x) if dtype is None else to_cpu(x).to(dtype)
    return to_mps(x) if place == MPS else x


def to_mps(x):
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype is torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    return x if isinstance(x, OnMPS) else as_class(x, OnMPS)


def to_cpu(x):
    return as_class(x, torch.Tensor) if isinstance(x, OnMPS) else x


def as_class(x, kind):
    with torch._C.DisableTorchFunction():  # or the mode would see it
        return x.as_subclass(kind)
