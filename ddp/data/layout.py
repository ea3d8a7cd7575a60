"""Which split and which class an image is of, told by the names of files; and what is no data.

Folders `train` and `test`, or `val`, are splits, wherever they are; folders below or above them are
classes. In what StyleGAN's and EDM's dataset tools write, labels are in dataset.json."""

import contextlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import PurePosixPath

import torch

from ddp.data.files import DamagedError, counted, printable

TRAIN, VAL, TEST = 0, 1, 2
SPLIT = re.compile(
    r"(?:(train|training)|(val|valid|validation)|(test|testing))([ _-]?(set|data|images|\d{4}))?",
    re.IGNORECASE,
)
SHARD, SHARD_FILE = re.compile(r"\d{5}"), re.compile(r"img\d{8}\.\w+")  # of dataset tools
TOOL_FILE = "dataset.json"
MAX_NAME = 1000  # of a class: no file's name is as long
MAX_TOOL_BYTES, MAX_LABEL = 1 << 27, 1 << 20  # of dataset.json
LOG_HEAD = b"step,epoch,loss,"  # of a run's log.csv
SAMPLES_FOLDER = re.compile(r"-samples(-\d+)?$")
SAMPLES_FILE = re.compile(r"\d{6}\.png|grid\.png|samples\.npz|process\.gif")


def written_folders(files, images):
    """The folders, of a name -> File, that this project wrote: runs, evaluations, samples.

    Of images that lie in no other folders, samples are what the user asked for."""
    contents = defaultdict(dict)  # folder -> file's own name -> name
    for name in files:
        path = PurePosixPath(name)
        contents[str(path.parent)][path.name] = name
    ours, samples = set(), set()
    for folder, names in contents.items():
        if folder == ".":  # the dataset itself
            continue
        if SAMPLES_FOLDER.search(folder) and all(map(SAMPLES_FILE.fullmatch, names)):
            samples.add(folder)
        if {"evaluation.json", "evaluation.html"} <= set(names):
            ours.add(folder)
        if "log.csv" in names:
            with contextlib.suppress(DamagedError), files[names["log.csv"]].open() as stream:
                if stream.read(len(LOG_HEAD)) == LOG_HEAD:
                    ours.add(folder)
    return ours if all(lies_in(name, samples | ours) for name in images) else samples | ours


def lies_in(name, folders):
    """Whether a file lies in one of these folders, or below it."""
    return any(str(parent) in folders for parent in PurePosixPath(name).parents)


def split_of(folder):
    """TRAIN, VAL or TEST, or None, of a folder's name."""
    match = SPLIT.fullmatch(folder)
    return match and next(i for i in (TRAIN, VAL, TEST) if match[i + 1])


def find_splits(names):
    """(name -> (split or None, folders), lines of text) of images; those in no split are left out.

    There are splits when some folders `train` and `test`, or `val`, lie in one folder, or in each
    of several, or when every image lies in one of such names. Without `test`, `val` is for
    testing."""
    folders = {name: PurePosixPath(name).parent.parts for name in names}
    for depth in range(max(map(len, folders.values()), default=0)):
        splits = {name: split_of(f[depth]) for name, f in folders.items() if len(f) > depth}
        splits = {name: split for name, split in splits.items() if split is not None}
        above = defaultdict(set)  # folder -> the splits in it; several such folders are classes
        for name, split in splits.items():
            above[folders[name][:depth]].add(split)
        kinds = set(splits.values())
        is_alike = all(kinds == of_folder for of_folder in above.values())
        is_split = TRAIN in kinds and len(kinds) > 1
        if is_split and (is_alike or len(splits) == len(folders)):
            break
    else:
        return {name: (None, f) for name, f in folders.items()}, []
    titles = {folders[name][depth] for name in splits}
    for name in splits:
        folders[name] = folders[name][:depth] + folders[name][depth + 1 :]
    for split in set(splits.values()):
        part = [name for name in splits if splits[name] == split]
        rest = [folders[name][depth:] for name in part]  # Kaggle packs test/ in test/
        if all(f and split_of(f[0]) == split for f in rest):
            folders |= {n: folders[n][:depth] + f[1:] for n, f in zip(part, rest, strict=True)}
    if TEST not in splits.values():
        splits = {name: TEST if split == VAL else split for name, split in splits.items()}
    lines = []
    if stray := [name for name in names if name not in splits]:
        beside = " and ".join(f"{printable(title)}/" for title in sorted(titles))
        lines.append(f"left out {counted(len(stray), 'image')} beside {beside}{such_as(stray)}")
    return {name: (split, folders[name]) for name, split in splits.items()}, lines


def such_as(names):
    return f", such as {printable(names[0])}"


def read_tool_labels(files):
    """(name of an image -> int, whether there is a dataset.json) as StyleGAN's and EDM's tools do.

    {"labels": [["00000/img00000000.png", 6], ...]}, or null; names are relative to its folder."""
    labels, is_there = {}, False
    for name, file in files.items():
        folder, _, base = name.rpartition("/")
        if base != TOOL_FILE or file.size > MAX_TOOL_BYTES:
            continue
        try:
            content = json.loads(file.read())
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


def class_of_folder(places, has_tool_file):
    """name -> name of its class, or None, from the folders below those that all have in common."""
    folders = {name: f for name, (_, f) in places.items()}
    parts = defaultdict(list)  # split -> names
    for name, (split, _) in places.items():
        parts[split].append(name)
    while True:
        nested = [name for part in parts.values() if all(map(folders.get, part)) for name in part]
        if len({folders[name][0] for name in nested}) != 1:
            break
        folders |= {name: folders[name][1:] for name in nested}
    firsts = [f[0] for f in folders.values() if f]
    of_tool = has_tool_file or all(
        SHARD_FILE.fullmatch(PurePosixPath(name).name) for name in places
    )
    if of_tool and all(map(SHARD.fullmatch, firsts)):
        return dict.fromkeys(places)
    # an accent is one character or two, depending on the system
    names = {n: printable(f[0], MAX_NAME) if f else None for n, f in folders.items()}
    return {n: name and unicodedata.normalize("NFC", name) for n, name in names.items()}


def find_classes(places, tool_labels, has_tool_file):
    """(splits (N,) or None, labels (N,) or None, class names, lines of text) of places, in order.

    tool_labels, has_tool_file: of read_tool_labels. Classes are those of the training images, each
    of which has one. -1 is the label of a test split without labels, and the split of other images
    that have none of these classes: they are left out."""
    keys = {name: tool_labels.get(name) for name in places}
    if not any(name in tool_labels for name in places):
        keys = class_of_folder(places, has_tool_file)
    splits = {name: split for name, (split, _) in places.items()}
    trained = [name for name, split in splits.items() if split in (None, TRAIN)]
    classes = sorted({keys[name] for name in trained} - {None})
    lines = []
    lacking = [name for name in trained if keys[name] is None]
    if lacking or len(classes) < 2:
        lines = ["no classes: that takes two or more class folders"]
        if len(classes) > 1:
            lines = [f"no classes: {counted(len(lacking), 'image')} without one{such_as(lacking)}"]
        classes, keys = [], {}
    number = {key: i for i, key in enumerate(classes)}
    labels = {name: number.get(keys.get(name), -1) for name in places}
    for split, title in ((VAL, "validation"), (TEST, "test")) if classes else ():
        part = [name for name in places if splits[name] == split]
        lacking = [name for name in part if labels[name] < 0]
        if len(lacking) == len(part) and split == TEST:
            lines += [f"without labels: {counted(len(part), 'test image')}"] * bool(part)
        elif lacking:
            splits |= dict.fromkeys(lacking, -1)
            text = f"left out {counted(len(lacking), f'{title} image')} of no class in training"
            lines.append(text + such_as(lacking))
    if classes:
        counts = Counter(labels.values())
        parts = [f"{key} {counts[i]}" for key, i in number.items()]
        more = ", ..." if len(parts) > 20 else ""
        lines.insert(0, f"{len(classes)} classes: {', '.join(parts[:20])}{more}")
    return (
        torch.tensor(list(splits.values())) if None not in splits.values() else None,
        torch.tensor(list(labels.values())) if classes else None,
        [str(key) for key in classes],
        lines,
    )
