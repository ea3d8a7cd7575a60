"""Which split and which class an image is of, told by the names of files; and what is no data.

Folders `train` and `test`, or `val`, are splits, wherever they are; folders below or above them are
classes. In what StyleGAN's and EDM's dataset tools write, labels are in dataset.json."""

import contextlib
import json
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch

from ddp.data.files import DamagedError, counted, printable

TRAIN, VAL, TEST = 0, 1, 2
SPLIT = re.compile(
    r"(?:(train|training)|(val|valid|validation)|(test|testing))([ _-]?(set|data|images|\d{4}))?",
    re.IGNORECASE,
)
SHARD, SHARD_FILE = re.compile(r"\d{5}"), re.compile(r"img\d{8}\.\w+")  # of dataset tools
TOOL_FILE = "dataset.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_NAME = 1000  # of a class: no file's name is as long
MAX_TOOL_BYTES, MAX_LABEL = 1 << 27, 1 << 20  # of dataset.json
LOG_HEAD = b"step,epoch,loss,"  # of a run's log.csv
SAMPLES_FOLDER = re.compile(r"-samples(-\d+)?$")
TELLING_FILES = ("evaluation.json", "evaluation.html", "log.csv")
SAMPLES_FILE = re.compile(r"\d{6}\.png|grid\.png|samples\.npz|process\.gif")


def written_folders(files, images):
    """The folders, of a name -> File, that this project wrote: runs, evaluations, samples.

    Of images that lie in no other folders, samples are what the user asked for."""
    mixed, samples, ours = set(), set(), set()
    telling = defaultdict(set)  # folder -> which of TELLING_FILES are there
    for name in files:
        folder, _, base = name.rpartition("/")
        if not folder:  # the dataset itself
            continue
        if base in TELLING_FILES:
            telling[folder].add(base)
        if SAMPLES_FOLDER.search(folder):
            samples.add(folder)
            if not SAMPLES_FILE.fullmatch(base):
                mixed.add(folder)
    samples -= mixed
    for folder, names in telling.items():
        if {"evaluation.json", "evaluation.html"} <= names:
            ours.add(folder)
        if "log.csv" in names:
            log = files[f"{folder}/log.csv"]
            with contextlib.suppress(DamagedError), log.open() as stream:
                if stream.read(len(LOG_HEAD)) == LOG_HEAD:
                    ours.add(folder)
    folders = {name.rpartition("/")[0] for name in images}
    return ours if all(lies_in(folder, samples | ours) for folder in folders) else samples | ours


def lies_in(folder, folders):
    """Whether a folder is one of these, or lies below one."""
    while folder and folder not in folders:
        folder = folder.rpartition("/")[0]
    return folder in folders


def split_of(folder):
    """TRAIN, VAL or TEST, or None, of a folder's name."""
    match = SPLIT.fullmatch(folder)
    return match and next(i for i in (TRAIN, VAL, TEST) if match[i + 1])


@dataclass
class Layout:
    """Where images lie: the folder of each, and what each folder says of its images."""

    folder_ids: np.ndarray  # (N,) int32, numbers of folders
    places: list  # of each folder: (split or None, the folders that may name a class)

    def select(self, mask):
        """The Layout of the images that a mask (N,) bool says."""
        return Layout(self.folder_ids[mask], self.places)

    def spread(self, values, dtype=np.int64):
        """A value of each folder as one of each image, (N,)."""
        return np.array(values, dtype)[self.folder_ids]

    def present(self):
        """The numbers of the folders that any image lies in."""
        return np.unique(self.folder_ids).tolist()


def find_splits(names, noun="image"):
    """(Layout, mask (N,) of those in a split, lines of text) of images; the others are left out.

    There are splits when some folders `train` and `test`, or `val`, lie in one folder, or in each
    of several, or when every image lies in one of such names. Without `test`, `val` is for
    testing."""
    numbers = {}  # folder -> its number
    ids = np.fromiter((numbers.setdefault(n.rpartition("/")[0], len(numbers)) for n in names), "i4")
    folders = {number: PurePosixPath(folder).parts for folder, number in numbers.items()}
    for depth in range(max(map(len, folders.values()), default=0)):
        splits = {i: split_of(f[depth]) for i, f in folders.items() if len(f) > depth}
        splits = {i: split for i, split in splits.items() if split is not None}
        above = defaultdict(set)  # folder -> the splits in it; several such folders are classes
        for i, split in splits.items():
            above[folders[i][:depth]].add(split)
        kinds = set(splits.values())
        is_alike = all(kinds == of_folder for of_folder in above.values())
        is_split = TRAIN in kinds and len(kinds) > 1
        if is_split and (is_alike or len(splits) == len(folders)):
            break
    else:
        places = [(None, f) for f in folders.values()]
        return Layout(ids, places), np.ones(len(names), bool), []
    titles = {folders[i][depth] for i in splits}
    for i in splits:
        folders[i] = folders[i][:depth] + folders[i][depth + 1 :]
    for split in set(splits.values()):
        part = [i for i in splits if splits[i] == split]
        rest = [folders[i][depth:] for i in part]  # Kaggle packs test/ in test/
        if all(f and split_of(f[0]) == split for f in rest):
            folders |= {i: folders[i][:depth] + f[1:] for i, f in zip(part, rest, strict=True)}
    if TEST not in splits.values():
        splits = {i: TEST if split == VAL else split for i, split in splits.items()}
    layout = Layout(ids, [(splits.get(i), f) for i, f in folders.items()])
    is_kept = layout.spread([i in splits for i in folders], bool)
    lines = []
    if not is_kept.all():
        beside = " and ".join(f"{printable(title)}/" for title in sorted(titles))
        count = counted(int((~is_kept).sum()), noun)
        lines.append(f"left out {count} beside {beside}{such_as(names, ~is_kept)}")
    return layout, is_kept, lines


def such_as(names, mask):
    """The first of the names that a mask says, as the end of a line of text."""
    return f", such as {printable(names[int(mask.argmax())])}"


def read_tool_labels(files):
    """(name of an image -> int, whether there is a dataset.json) as StyleGAN's and EDM's tools do.

    {"labels": [["00000/img00000000.png", 6], ...]}, or null; names are relative to its folder."""
    labels, is_there = {}, False
    for name in files:
        folder, _, base = name.rpartition("/")
        if base != TOOL_FILE or files[name].size > MAX_TOOL_BYTES:
            continue
        try:
            content = json.loads(files[name].read())
        except (ValueError, RecursionError, DamagedError):
            continue  # of another program
        if not isinstance(content, dict) or "labels" not in content:
            continue
        is_there = True
        for entry in content["labels"] if isinstance(content["labels"], list) else ():
            is_pair = isinstance(entry, list) and [type(value) for value in entry] == [str, int]
            if is_pair and 0 <= entry[1] <= MAX_LABEL:
                labels[f"{folder}/{entry[0]}".lstrip("/")] = entry[1]
    return labels, is_there


def class_of_folder(names, layout, has_tool_file):
    """The name of each folder's class, or None, from the folders below what all have in common."""
    present = layout.present()
    folders = {i: layout.places[i][1] for i in present}
    parts = defaultdict(list)  # split -> numbers of folders
    for i in present:
        parts[layout.places[i][0]].append(i)
    while True:
        nested = [i for part in parts.values() if all(map(folders.get, part)) for i in part]
        if len({folders[i][0] for i in nested}) != 1:
            break
        folders |= {i: folders[i][1:] for i in nested}
    firsts = [f[0] for f in folders.values() if f]
    keys = [None] * len(layout.places)
    if all(map(SHARD.fullmatch, firsts)):
        bases = (name.rpartition("/")[2] for name in names)
        if has_tool_file or all(map(SHARD_FILE.fullmatch, bases)):
            return keys
    for i, f in folders.items():
        if f:  # an accent is one character or two, depending on the system
            keys[i] = unicodedata.normalize("NFC", printable(f[0], MAX_NAME))
    return keys


def find_classes(names, layout, tool_labels, has_tool_file):
    """(splits (N,) or None, labels (N,) or None, class names, lines of text) of images.

    tool_labels, has_tool_file: of read_tool_labels. Classes are those of the training images, each
    of which has one. -1 is the label of a test split without labels, and the split of other images
    that have none of these classes: they are left out."""
    if any(name in tool_labels for name in names):
        keys = sorted(set(tool_labels.values()))
        number = {key: i for i, key in enumerate(keys)}
        ids = np.fromiter((number.get(tool_labels.get(name), -1) for name in names), np.int64)
    else:
        of_folder = class_of_folder(names, layout, has_tool_file)
        keys = sorted(set(of_folder) - {None})
        number = {key: i for i, key in enumerate(keys)}
        ids = layout.spread([number.get(key, -1) for key in of_folder])
    splits = None
    if layout.places[layout.folder_ids[0]][0] is not None:
        splits = layout.spread([-1 if split is None else split for split, _ in layout.places])
    is_trained = np.ones(len(names), bool) if splits is None else splits == TRAIN
    is_class = np.bincount(ids[is_trained & (ids >= 0)], minlength=len(keys)) > 0
    is_lacking = is_trained & (ids < 0)
    if is_lacking.any() or is_class.sum() < 2:
        line = "no classes: that takes two or more class folders"
        if is_class.sum() > 1:
            count = counted(int(is_lacking.sum()), "image")
            line = f"no classes: {count} without one{such_as(names, is_lacking)}"
        return None if splits is None else torch.from_numpy(splits), None, [], [line]
    classes = [key for key, is_used in zip(keys, is_class, strict=True) if is_used]
    labels = np.append(np.where(is_class, np.cumsum(is_class) - 1, -1), -1)[ids]  # -1: the last
    lines = [class_line(classes, labels)]
    lines += leave_out_unlabeled(names, splits, labels)
    splits = None if splits is None else torch.from_numpy(splits)
    return splits, torch.from_numpy(labels), [str(key) for key in classes], lines


def class_line(classes, labels):
    """A line of text: how many images each class has."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    parts = [f"{key} {count}" for key, count in zip(classes, counts, strict=True)]
    more = ", ..." if len(parts) > 20 else ""
    return f"{len(classes)} classes: {', '.join(parts[:20])}{more}"


def leave_out_unlabeled(names, splits, labels):
    """Set the splits (N,) of images without a label to -1, unless it is a whole test split.

    Returns lines of text."""
    lines = []
    for split, title in ((VAL, "validation"), (TEST, "test")) if splits is not None else ():
        is_part = splits == split
        is_lacking = is_part & (labels < 0)
        count = int(is_lacking.sum())
        if split == TEST and count and count == is_part.sum():
            lines.append(f"without labels: {counted(count, 'test image')}")
        elif count:
            text = f"left out {counted(count, f'{title} image')} of no class in training"
            lines.append(text + such_as(names, is_lacking))
            splits[is_lacking] = -1
    return lines
