"""Which items are trained on, chosen on and tested on: as names say, or at random but fixed."""

import numpy as np
import torch

from ddp.data.dataset import held_out, val_mask
from ddp.data.layout import TEST, TRAIN, VAL
from ddp.data.mapped import subset


def choose_splits(
    place,  # where the items are, for messages
    count,  # of items
    splits=None,  # (N,) int64: TRAIN, VAL, TEST, -1 for left out; None: all in one
    labels=None,  # (N,) int64, -1 for none
    test_fraction=None,  # default 0.1
):
    """(splits (N,), labels or None, lines of text), with items of each class to train on.

    Labels are given up where nearly each item has a class of its own. Raises ValueError when
    there is a test split already, OSError when there is nothing to train on or to test on."""
    lines = []
    if splits is not None and test_fraction:
        raise ValueError(f"test_fraction={test_fraction}: {place} has a test split; leave it out")
    if splits is None:
        at_least = 2 if count > 3 else 1  # one item has no spread to compare with
        test_count = min(max(at_least, round((test_fraction or 0.1) * count)), count - 1)
        order = torch.from_numpy(np.random.RandomState(0).permutation(count))
        is_test = held_out(order, test_count, labels)
        if is_test.sum() < at_least:
            lines.append("the classes are not used: they have too few items for a test")
            labels = None
            is_test = held_out(order, test_count)
        splits = TEST * is_test.long()  # TRAIN is 0
    if VAL not in splits:
        trained = (splits == TRAIN).nonzero()[:, 0]
        lacks_labels = labels is not None and (labels[splits == TEST] < 0).any().item()
        is_val = val_mask(len(trained), None if labels is None else labels[trained], lacks_labels)
        splits = splits.clone()
        splits[trained[is_val]] = VAL
    for split, name in ((TRAIN, "training"), (TEST, "test")):
        if split not in splits:
            raise OSError(f"{place} holds no {name} item that can be used")
    return splits, labels, lines


def split_fields(items, splits, labels=None):
    """The fields of a Dataset that items (N, *event) of these splits make."""
    parts = {}
    for split, name in ((TRAIN, "train"), (TEST, "test"), (VAL, "val")):
        is_part = splits == split
        if name == "val" and not is_part.any():
            continue
        parts[name] = subset(items, is_part)
        if labels is not None and (labels[is_part] >= 0).all():
            parts[f"{name}_labels"] = labels[is_part]
    return parts
