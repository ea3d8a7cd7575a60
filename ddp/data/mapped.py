"""Items that stay in a file, mapped into memory, and are used like a tensor of them."""

import numpy as np
import torch


class Mapped:
    """Rows of an array in a file, in the place of a tensor (N, *event): read when they are indexed.

    Indexed by integers (B,), a slice or a mask (N,), it gives a tensor of those items."""

    def __init__(
        self,
        array,  # (M, ...), such as a numpy.memmap
        event,  # the shape of an item, as `convert` makes it
        convert=torch.from_numpy,  # rows (B, ...) of the array -> a tensor (B, *event)
        rows=None,  # (N,) int64, which of the array; None: all
        device="cpu",  # where the items that are read go to
    ):
        self.array = array
        self.event = tuple(event)
        self.convert = convert
        self.rows = rows
        self.device = torch.device(device)
        self.dtype = convert(np.array(array[:1])).dtype

    def __len__(self):
        return len(self.array) if self.rows is None else len(self.rows)

    @property
    def shape(self):
        return torch.Size((len(self), *self.event))

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def nbytes(self):
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, index):
        if self.rows is None and isinstance(index, slice):
            rows = np.array(self.array[index])  # in one go
        else:
            numbers = self.numbers(index)
            rows = self.array[numbers.numpy()]
        return self.convert(rows).to(self.device, non_blocking=True)

    def numbers(self, index):
        """Return the rows of the array, (B,) int64, that integers, a slice or a mask mean."""
        if self.rows is not None:
            return self.rows[index.cpu() if torch.is_tensor(index) else index]
        if torch.is_tensor(index) and index.dtype != torch.bool:
            return index.cpu()
        return torch.arange(len(self.array))[index]

    def subset(self, mask):
        """Return the items (N,) bool that a mask says, still in the file."""
        return Mapped(self.array, self.event, self.convert, self.numbers(mask), self.device)

    def to(self, device):
        """Return the same items: they stay in the file, and go to the device as they are read."""
        return Mapped(self.array, self.event, self.convert, self.rows, device)


def slices(rows, size):
    """Yield slices of an array, a tensor or a Mapped, of `size` bytes each, or of a row."""
    count = max(1, size * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(rows), count):
        yield slice(start, start + count)


def subset(items, mask):
    """Return the items that a mask (N,) says, of a tensor or of a Mapped."""
    return items.subset(mask) if isinstance(items, Mapped) else items[mask]
