"""One dataset: items, labels, a fixed split, and batches as a function of (seed, step)."""

import dataclasses
import functools
import hashlib

import numpy as np
import torch

from ddp.data.mapped import Mapped, slices, subset
from ddp.units import Units

VAL_FRACTION, MAX_VAL_ITEMS = 0.1, 5000  # of the training items, where there are enough
MIN_ITEMS_FOR_VAL = 2000
DIGEST_BYTES = 1 << 24  # of items that are read at a time


@dataclasses.dataclass(repr=False)  # whose own would print all items
class Dataset:
    """Items to train on, to choose on and to report on, with their labels if there are any.

    The model with the least loss on `val` is the best one; figures are reported of `test`."""

    name: str
    # or a Mapped, as val and test: uint8 images (N, C, H, W), or standardized float32 (N, *event)
    train: torch.Tensor
    test: torch.Tensor  # (M, *event)
    train_labels: torch.Tensor | None = None  # (N,) int64
    test_labels: torch.Tensor | None = None  # (M,) int64
    classes: list = dataclasses.field(default_factory=list)  # names, in the order of the labels
    summary: list = dataclasses.field(default_factory=list)  # lines of text for the user
    log_density: object = None  # (B, 2) -> (B,) float64 in nats, where it is known
    val: torch.Tensor | None = None  # (V, *event); None: the test items are chosen on, too
    val_labels: torch.Tensor | None = None  # (V,) int64
    units: Units | None = None  # of the data before they were standardized; None: as they are
    known_fingerprint: str | None = None  # what `fingerprint` is, where that is already known

    @property
    def event(self):
        """The shape of one item."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self):
        return len(self.event) == 3

    @property
    def is_pixels(self):
        """Whether items are images of 256 values in [-1, 1]."""
        return self.is_image and self.units is None

    @functools.cached_property
    def fingerprint(self):
        """16 hex digits that tell this dataset, split and order included, from any other."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        parts = [self.train, self.test, self.train_labels, self.test_labels]
        if self.val is not None:
            parts += [self.val, self.val_labels]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        return digest([part for part in parts if part is not None], header=repr(shapes))

    def describe(self):
        """Lines of text that say what was loaded."""
        shape = "x".join(map(str, self.event))
        counts = f"{len(self.train):,} train and {len(self.test):,} test items"
        remarks = [f"{self.name} has no validation items: best.pth is chosen on its test items"]
        if self.val is not None:
            counts = f"{len(self.train):,} train, {len(self.val):,} validation and "
            counts += f"{len(self.test):,} test items"
            remarks = []
        return [*self.summary, *remarks, f"data: {self.name}, {counts}, {shape}"]

    def __repr__(self):
        counts = f"{len(self.train):,} train, {0 if self.val is None else len(self.val):,} val, "
        counts += f"{len(self.test):,} test"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"Dataset({self.name!r}, items {self.event}: {counts}{classes})"

    def to(self, device):
        """A copy whose training items lie on the device; all else stays where it is."""
        return dataclasses.replace(self, train=self.train.to(device))

    def batch(self, seed, step, size, part=slice(None)):
        """Return training batch `step`: x0 (size, *event) float32, label (size,) or None.

        Epochs, each in an order of its own, make one endless stream, cut into batches wherever an
        epoch ends: no batch is short, and BatchNorm never sees one item.

        part: a slice of the batch; only its items are read, and returned."""
        count = len(self.train)
        epoch, offset = divmod(step * size, count)
        items = permutation(seed, epoch, count)[offset : offset + size]  # numbers of items
        while len(items) < size:  # the next epoch has begun
            epoch += 1
            items = torch.cat([items, permutation(seed, epoch, count)[: size - len(items)]])
        items = items[part]
        label = None if self.train_labels is None else self.train_labels[items]
        return to_float(self.train[items.to(self.train.device, non_blocking=True)]), label

    def shown(self, count):
        """Return `count` test items, evenly spread and in the data's units, to be looked at."""
        indices = torch.linspace(0, len(self.test) - 1, min(count, len(self.test))).long()
        return to_data(to_float(self.test[indices]), self.units)

    @property
    def selection_split(self):
        """The split that the best model is chosen on: "val" or, where there is none, "test"."""
        return "test" if self.val is None else "val"

    @property
    def num_selection(self):
        return len(getattr(self, self.selection_split))

    def selection_items(self, indices):
        """Return items `indices` (B,) to choose on: x0 (B, *event) float32, label (B,) or None.

        They are numbered at random, always alike, so that the first hundred of a set that is
        sorted by class are of all classes."""
        items = permutation(0, 0, self.num_selection)[indices]
        labels = getattr(self, f"{self.selection_split}_labels")
        label = None if labels is None else labels[items]
        return to_float(getattr(self, self.selection_split)[items]), label


def hold_out_val(dataset):
    """The dataset with some of its training items as `val`, see val_mask, unless it has `val`."""
    labels = dataset.train_labels
    is_val = val_mask(
        len(dataset.train), labels, labels is not None and dataset.test_labels is None
    )
    if dataset.val is not None or not is_val.any():
        return dataset
    parts = {"train": subset(dataset.train, ~is_val), "val": subset(dataset.train, is_val)}
    if labels is not None:
        parts |= {"train_labels": labels[~is_val], "val_labels": labels[is_val]}
    return dataclasses.replace(dataset, **parts)


def val_mask(count, labels=None, required=False):
    """Which of `count` training items are for validation, (count,) bool: always the same.

    None where there are fewer than MIN_ITEMS_FOR_VAL, unless a validation set is required."""
    size = min(MAX_VAL_ITEMS, max(int(count * VAL_FRACTION), 1))
    enough = count >= MIN_ITEMS_FOR_VAL or required
    return held_out(permutation(0, 0, count), size if enough else 0, labels)


def held_out(order, size, labels=None):
    """A mask (N,) of the first `size` items of an order (N,), such that no class loses its last.

    labels: (N,) int64 or None. Fewer are held out where the classes can spare no more."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    if labels is not None:
        # of each class the item that comes last in the order stays
        _, last = np.unique(labels[order.flip(0)].numpy(), return_index=True)
        keep = torch.ones(len(order), dtype=torch.bool)
        keep[len(order) - 1 - torch.from_numpy(last)] = False
        order = order[keep]
    mask[order[:size]] = True
    return mask


@functools.lru_cache(maxsize=2)  # a batch takes items of one epoch or two
def permutation(seed, epoch, count):
    """The integers below `count` in an order keyed by (seed, epoch), (count,) int64."""
    # NumPy uses all bits of both keys; PyTorch's generator takes the low 32 bits of one number
    return torch.from_numpy(np.random.RandomState([seed, epoch]).permutation(count))


def to_float(items):
    """Pixels 0 to 255 (uint8) as float32 in [-1, 1]; points stay as they are."""
    return items.float().div_(127.5).sub_(1) if items.dtype == torch.uint8 else items


def to_pixels(x0):
    """Images (B, C, H, W) in [-1, 1] as the nearest uint8 pixels; points stay as they are."""
    if x0.ndim != 4:
        return x0
    return x0.float().clamp(-1, 1).add_(1).mul_(127.5).round_().byte()  # clamp copies


def to_data(x0, units=None):
    """x0 as what the data is: uint8 pixels, points or, of float data, items in their Units."""
    return to_pixels(x0) if units is None else units.restore(x0)


def digest(tensors, header=""):
    """The first 16 hex digits of the SHA-256 of the header, a str, and of the tensors' bytes."""
    sha = hashlib.sha256(header.encode())
    for tensor in tensors:
        parts = slices(tensor, DIGEST_BYTES) if isinstance(tensor, Mapped) else [...]
        for part in parts:
            sha.update(tensor[part].cpu().contiguous().numpy())
    return sha.hexdigest()[:16]
