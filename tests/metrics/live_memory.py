"""How many bytes of tensors a computation holds at once, which tracemalloc does not see."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A context manager; afterwards `peak` is the most bytes that new tensors held at a time."""

    def __init__(self):
        super().__init__()
        self.owners = {}  # address of a storage -> how many tensors hold it
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        result = function(*args, **(kwargs or {}))
        for x in filter(is_tensor, tree_leaves(result)):
            address = x.untyped_storage().data_ptr()
            if address in given and address not in self.owners:
                continue  # a view of what was there before
            if address not in self.owners:
                self.live += x.untyped_storage().nbytes()
                self.peak = max(self.peak, self.live)
            self.owners[address] = self.owners.get(address, 0) + 1
            weakref.finalize(x, self.release, address, x.untyped_storage().nbytes())
        return result

    def release(self, address, size):
        self.owners[address] -= 1
        if not self.owners[address]:
            del self.owners[address]
            self.live -= size


def is_tensor(x):
    return isinstance(x, torch.Tensor)
