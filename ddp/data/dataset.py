"""One dataset: items, labels, a fixed split, and batches as a function of (seed, step)."""

import dataclasses
import functools
import hashlib

import numpy as np
import torch


@dataclasses.dataclass
class Dataset:
    """Training and test items, with their labels if there are any."""

    name: str
    train: torch.Tensor  # (N, C, H, W) uint8 images, or (N, 2) float32 standardized points
    test: torch.Tensor  # (M, *event)
    train_labels: torch.Tensor | None = None  # (N,) int64
    test_labels: torch.Tensor | None = None  # (M,) int64
    classes: list = dataclasses.field(default_factory=list)  # names, in the order of the labels
    summary: list = dataclasses.field(default_factory=list)  # lines of text for the user
    log_density: object = None  # (B, 2) -> (B,) float64 in nats, where it is known

    @property
    def event(self):
        """The shape of one item."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self):
        return len(self.event) == 3

    @functools.cached_property
    def fingerprint(self):
        """16 hex digits that tell this dataset, split and order included, from any other."""
        parts = (self.train, self.test, self.train_labels, self.test_labels)
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        return digest([part for part in parts if part is not None], header=repr(shapes))

    def describe(self):
        """Lines of text that say what was loaded."""
        shape = "x".join(map(str, self.event))
        counts = f"{len(self.train):,} train and {len(self.test):,} test items"
        return [*self.summary, f"data: {self.name}, {counts}, {shape}"]

    def to(self, device):
        """A copy whose training items lie on the device; all else stays where it is."""
        return dataclasses.replace(self, train=self.train.to(device))

    def batch(self, seed, step, size):
        """Return training batch `step`: x0 (size, *event) float32, label (size,) or None.

        Epochs, each in an order of its own, make one endless stream, cut into batches wherever an
        epoch ends: no batch is short, and BatchNorm never sees one item."""
        count = len(self.train)
        epoch, offset = divmod(step * size, count)
        items = permutation(seed, epoch, count)[offset : offset + size]  # numbers of items
        while len(items) < size:  # the next epoch has begun
            epoch += 1
            items = torch.cat([items, permutation(seed, epoch, count)[: size - len(items)]])
        label = None if self.train_labels is None else self.train_labels[items]
        return to_float(self.train[items.to(self.train.device, non_blocking=True)]), label

    def test_batch(self, indices):
        """Return test items `indices` (B,): x0 (B, *event) float32, label (B,) or None."""
        label = None if self.test_labels is None else self.test_labels[indices]
        return to_float(self.test[indices]), label


@functools.lru_cache(maxsize=2)  # a batch takes items of one epoch or two
def permutation(seed, epoch, count):
    """The integers below `count` in an order keyed by (seed, epoch), (count,) int64."""
    # NumPy uses all bits of both keys; PyTorch's generator takes the low 32 bits of one number
    return torch.from_numpy(np.random.RandomState([seed, epoch]).permutation(count))


def to_float(items):
    """Pixels 0 to 255 (uint8) as float32 in [-1, 1]; points stay as they are."""
    return items.float() / 127.5 - 1 if items.dtype == torch.uint8 else items


def to_pixels(x0):
    """Images (B, C, H, W) in [-1, 1] as the nearest uint8 pixels; points stay as they are."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().byte() if x0.ndim == 4 else x0


def digest(tensors, header=""):
    """The first 16 hex digits of the SHA-256 of the header, a str, and of the tensors' bytes."""
    sha = hashlib.sha256(header.encode())
    for tensor in tensors:
        sha.update(tensor.cpu().contiguous().numpy())
    return sha.hexdigest()[:16]
