"""Items that stay in a file, against the same items in memory."""

import numpy as np
import pytest
import torch

from ddp.data.dataset import Dataset, digest, hold_out_val
from ddp.data.mapped import Mapped, subset


@pytest.fixture
def pair(tmp_path):
    """The same 3,000 gray images in a file, as a Mapped, and in memory."""
    array = np.random.RandomState(0).randint(0, 256, (3000, 1, 2, 3)).astype(np.uint8)
    np.save(tmp_path / "images.npy", array)
    return Mapped(np.load(tmp_path / "images.npy", mmap_mode="r"), (1, 2, 3)), torch.tensor(array)


INDICES = [
    *(slice(None), slice(5, 9), slice(0, 0), slice(2990, 4000), slice(1, 90, 7), [3, 0]),
    *(torch.tensor([7, 2, 7]), torch.tensor([-1]), torch.empty(0, dtype=torch.int64)),
]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("is_part", [False, True])
def test_indexing_gives_what_the_tensor_gives(pair, index, is_part):
    mask = torch.arange(3000) % 7 < 3
    mapped, tensor = [subset(items, mask) for items in pair] if is_part else pair
    assert torch.equal(mapped[index], tensor[index])
    assert (len(mapped), mapped.shape, mapped.dtype) == (len(tensor), tensor.shape, tensor.dtype)
    assert (mapped.ndim, mapped.nbytes) == (tensor.ndim, tensor.nbytes)
    assert torch.equal(mapped[torch.arange(len(tensor)) % 5 == 0], tensor[::5])
    assert torch.equal(mapped.to("cpu")[index], tensor[index])


def test_what_is_read_is_not_the_file(pair):
    mapped, tensor = pair
    for index in (slice(0, 5), torch.arange(5)):
        mapped[index].zero_()
    assert torch.equal(mapped[:], tensor)


def test_dataset_of_a_file_is_that_of_its_items(pair, monkeypatch):
    """Its validation items, batches, and fingerprint, which reads a part at a time."""
    monkeypatch.setattr("ddp.data.dataset.DIGEST_BYTES", 1000)
    labels = torch.arange(3000) % 3
    ours, theirs = [
        hold_out_val(Dataset("x", items, items[:9], labels, labels[:9], list("abc")))
        for items in pair
    ]
    assert isinstance(ours.val, Mapped)
    assert ours.fingerprint == theirs.fingerprint
    for step in (0, 40, 100):
        for mine, its in zip(ours.batch(1, step, 64), theirs.batch(1, step, 64), strict=True):
            assert torch.equal(mine, its)
    indices = torch.tensor([5, 1, 9])
    assert torch.equal(ours.selection_items(indices)[0], theirs.selection_items(indices)[0])
    assert ours.describe() == theirs.describe()
    assert digest([ours.train]) == digest([theirs.train])
    assert digest([ours.train]) != digest([ours.train[:-1]])
