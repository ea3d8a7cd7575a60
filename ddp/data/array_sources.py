"""Which arrays, labels and splits a path holds, and what their shapes mean: headers alone are read.

Names say it where they do: of the arrays in an .npz, and of folders."""

import csv
import os
from dataclasses import dataclass
from itertools import compress

import numpy as np

from ddp.data.files import HIDDEN, counted, printable
from ddp.data.layout import IMAGE_SUFFIXES, TEST, TRAIN, VAL, class_of_folder, find_splits, split_of
from ddp.data.listing import open_files
from ddp.data.npy import SUFFIXES, Array, list_arrays, read_array

# names in an .npz -> what the array is of; None: as its shape says
ITEM_NAMES = {"images": "images", "sequences": "sequences"}
ITEM_NAMES |= dict.fromkeys(("points", "vectors"), "vectors")
ITEM_NAMES |= dict.fromkeys(("x", "data", "items", "samples", "latents", "arr_0", ""))
KIND_NAMES = tuple(name for name, kind in ITEM_NAMES.items() if kind)  # that say what they are
LABEL_NAMES = ("labels", "label", "y", "targets", "arr_1")
KINDS = {1: ("vectors",), 2: ("images", "sequences"), 3: ("images",)}  # by the axes of an item


@dataclass
class Source:
    """Items of one split, or of none, and their labels where they are in the same place."""

    array: Array
    name: str = ""  # in an .npz, without its split: a key of ITEM_NAMES, or any
    split: int | None = None
    labels: np.ndarray | None = None  # (N,) integers or text


@dataclass(frozen=True)
class ArrayLayout:
    """How the rows of an array are items."""

    event: tuple  # the shape of an item
    axis: int | None  # of the rows, on which the channels are; None: there is none
    is_pixels: bool  # uint8 images
    text: str  # says so to the user


def is_array_path(path):
    """Whether a path is of arrays: an .npy, an .npz, or a folder of .npy without any image."""
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    has_arrays = False
    for _, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not HIDDEN.search(name)]
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES):
                return False  # at the first: a folder may have a million
            has_arrays |= name.lower().endswith(".npy") and not HIDDEN.search(name)
    return has_arrays


# ---- which arrays there are ----


def find_sources(path):
    """(Sources in their order, lines of text) of an .npy, an .npz or a folder of .npy."""
    if path.is_dir():
        sources, lines = sources_of_folder(path)
    elif path.suffix.lower() == ".npz":
        sources, lines = sources_of_npz(path)
    else:
        sources, lines = [Source(*list_arrays(path))], []
    splits = {source.split for source in sources}
    if TEST not in splits and VAL in splits:  # as of images
        for source in sources:
            source.split = TEST if source.split == VAL else source.split
    for source in sources:
        array = source.array
        first = sources[0].array
        if array.dtype.kind in "US" or not array.shape:
            raise ValueError(f"{array} holds {array.dtype} {array.shape}; expected numbers (N, D)")
        if (array.dtype, *array.shape[1:]) != (first.dtype, *first.shape[1:]):
            raise ValueError(
                f"{array} holds {array.dtype} {array.shape}, but {first} {first.dtype} "
                f"{first.shape}; expected one dtype, and one shape but for the number of items"
            )
    return sources, lines


def sources_of_folder(root):
    """(Sources, lines of text) of all .npy below a folder, in the order of their names."""
    with open_files(root) as (files, others):
        names = sorted(name for name in files if name.lower().endswith(".npy"))
    layout, is_kept, lines = find_splits(names, "file")
    names = list(compress(names, is_kept))
    layout = layout.select(is_kept)
    lines += [f"skipped {printable(name)}: {why}" for name, why in others.items()]
    classes = class_of_folder(names, layout, has_tool_file=False)  # of each folder
    unknown = sum(classes[folder] is None for folder in layout.folder_ids)
    if 0 < unknown < len(names):
        lines.append(f"no classes: {counted(unknown, 'file')} in no class folder")
    sources = []
    for name, folder in zip(names, layout.folder_ids, strict=True):
        (array,) = list_arrays(root / name)
        labels = None if unknown else np.full(array.shape[:1], classes[folder])
        sources.append(Source(array, split=layout.places[folder][0], labels=labels))
    return sources, lines


def sources_of_npz(path):
    """(Sources, lines of text) of the arrays in an .npz, by their names.

    x_train, train_images, test_labels and the like are of a split."""
    arrays = {array.name: array for array in list_arrays(path)}
    if not arrays:
        raise OSError(f"{path} holds no array")
    items, labels, unused = {}, {}, []  # of each split, or None: (name without split, Array)
    for key, array in arrays.items():
        split, name = split_key(key)
        if name in ITEM_NAMES or len(arrays) == 1:
            items.setdefault(split, []).append((name, array))
        elif name in LABEL_NAMES:
            labels.setdefault(split, array)
        else:
            unused.append(key)
    if TRAIN not in items:  # then there are no splits
        items = {None: [pair for split in items for pair in items[split]]}
    elif None in items:
        unused += [array.name for _, array in items.pop(None)]
    order = list(ITEM_NAMES)
    sources = []
    for split, pairs in items.items():
        pairs.sort(key=lambda pair: order.index(pair[0]) if pair[0] in order else 0)
        unused += [array.name for _, array in pairs[1:]]
        for name, array in pairs[:1]:
            sources.append(Source(array, name, split, text_or_numbers(labels.get(split))))
    if not sources:
        known = ", ".join(name for name in ITEM_NAMES if name)
        raise ValueError(
            f"{path} holds {printable(', '.join(arrays))}; expected one array, or one called "
            f"{known}, with or without train_ and test_"
        )
    return sources, [f"not used: {printable(', '.join(unused))}"] if unused else []


def split_key(key):
    """(TRAIN, VAL, TEST or None, the rest in lower case) of a name: x_train, train_images."""
    key = key.lower()
    start, _, after = key.partition("_")
    before, _, end = key.rpartition("_")
    for word, rest in ((start, after), (end, before)):
        if split_of(word) is not None:
            return split_of(word), rest
    return None, key


def text_or_numbers(array):
    return None if array is None else read_array(array.path, (array.name,), text=True)


# ---- what a shape means ----


def find_layout(path, array, name, channels=None):
    """The ArrayLayout of an array (N, ...) by dtype, shape, its name in an .npz, and `channels`.

    Images are (N, H, W) or (N, H, W, C); sequences (N, C, L); vectors (N, D). Raises ValueError
    where it is none of them."""
    sides = array.shape[1:]
    named = ITEM_NAMES.get(name)
    kinds = [kind for kind in KINDS.get(len(sides), ()) if named in (kind, None)]
    if not kinds or 0 in array.shape:
        expected = {"images": "(N, H, W) or (N, H, W, C)", "sequences": "(N, C, L)"}
        expected |= {"vectors": "(N, D)", None: "images (N, H, W[, C]), (N, C, L) or (N, D)"}
        raise ValueError(f"{path} holds {array.dtype} {array.shape}; expected {expected[named]}")
    kind, axis, hint = kinds[0], {1: 1, 2: None, 3: 3}[len(sides)], ""
    if len(kinds) > 1:  # (N, H, W) or (N, C, L)
        is_square = sides[0] == sides[1]
        if channels:
            kind = "sequences" if channels == sides[0] else "images"
        elif array.dtype != np.uint8 and not is_square:
            kind, hint = "sequences", "; if they are gray images, set channels=1"
        elif array.dtype != np.uint8:
            hint = f"; if they are sequences (N, C, L), set channels={sides[0]}"
    elif len(sides) == 3 and not named:  # (N, H, W, C) or (N, C, H, W)
        first_is_odd = sides[0] != sides[1] == sides[2]
        if channels in sides:
            axis = 3 if channels == sides[2] else 1
        elif not channels and first_is_odd:
            axis, hint = 1, f"; if the channels are last, set channels={sides[2]}"
    if kind == "sequences":
        axis = 1
    event = event_of(sides, axis)
    if channels and (channels != event[0] or kind == "vectors"):
        raise ValueError(f"channels={channels} does not fit {array.dtype} {array.shape} of {path}")
    is_pixels = kind == "images" and array.dtype == np.uint8
    return ArrayLayout(
        event, axis, is_pixels, f"{array.dtype} {array.shape}, {describe(event)}{hint}"
    )


def event_of(sides, axis):
    """The shape of an item with its channels first, of the sides of an array and their axis."""
    if axis is None:
        return (1, *sides)
    sides = list(sides)
    return (sides.pop(axis - 1), *sides)


def describe(event):
    """What items of a shape are, such as `images 28x28, 1 channel`."""
    if len(event) == 1:
        return f"vectors of {counted(event[0], 'number')}"
    if len(event) == 2:
        return f"sequences of length {event[1]:,}, {counted(event[0], 'channel')}"
    return f"images {event[1]}x{event[2]}, {counted(event[0], 'channel')}"


# ---- labels ----


def read_labels(path, count):
    """The labels of `count` items, integers or text (N,), in a .npy or a .csv.

    Of a .csv, its last column; a line above them, if there is one more, is its header. Raises
    ValueError for anything else."""
    path = os.path.expanduser(path)
    if not path.lower().endswith(".csv"):
        labels = read_array(path, LABEL_NAMES if path.lower().endswith(".npz") else (), text=True)
        if labels is None:
            raise ValueError(f"labels={path}: expected a .npy or a .csv")
        return labels
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            values = [line[-1].strip() for line in csv.reader(file) if any(line)]
    except (UnicodeError, csv.Error) as error:
        raise OSError(f"{path} is no .csv file ({error})") from None
    if len(values) == count + 1 and not values[0].lstrip("-").isdigit():  # a number is a label
        values = values[1:]
    try:
        return np.array([int(value) for value in values])
    except (ValueError, OverflowError):
        return np.array(values)


def check_labels(labels, count, where):
    """Labels as integers or text (N,). Raises ValueError for others than one for each item."""
    if labels.size == count and labels.ndim == 2:  # a column
        labels = labels.reshape(count)
    if labels.shape != (count,) or labels.dtype.kind not in "biuUS":
        raise ValueError(
            f"{where}: {labels.dtype} {labels.shape}; expected a whole number or a text for each "
            f"of {counted(count, 'item')}"
        )
    return labels


def find_labels(sources, file=None):
    """(labels (N,) as integers or text, which items have one, (N,) bool), or None.

    file: of all labels, in the order of the items; else each source has its own, and None is for
    training items that have none."""
    counts = [source.array.shape[0] for source in sources]
    total = sum(counts)
    if file:
        labels = check_labels(read_labels(file, total), total, f"labels={file}")
        return labels, np.full(total, True)
    if any(source.labels is None for source in sources if source.split in (None, TRAIN)):
        return None
    labels, has_label = [], []
    for source, count in zip(sources, counts, strict=True):
        has_label.append(np.full(count, source.labels is not None))
        if source.labels is not None:
            labels.append(check_labels(source.labels, count, f"the labels of {source.array}"))
        else:
            labels.append(np.zeros(count, labels[0].dtype if labels else np.int64))
    return np.concatenate(labels), np.concatenate(has_label)
