"""What the user asks to be measured: from a line of text to Candidates, and where results go."""

import glob
import re
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path

from ddp.data import DATASETS, load_dataset
from ddp.data.arrays import load_samples
from ddp.distributed import main_first
from ddp.io.download import is_url, locate
from ddp.io.files import RUN_MODELS, file_digest, find_checkpoint, next_free_path
from ddp.io.safetensors_file import SUFFIX
from ddp.io.spelling import did_you_mean
from ddp.metrics.candidate import Candidate, checkpoint_candidate
from ddp.options import SamplerOptions

BREAK = "--"  # between groups


@dataclass
class Subject:
    """What the user asks to be measured."""

    path: str  # a checkpoint, the folder of a run, or samples
    name: str | None = None  # in tables; None: made of the path and the options
    options: dict = field(default_factory=dict)  # of SamplerOptions, and `weights`
    kind: str | None = None  # "checkpoint" or "samples"; None: as the path looks
    group: str | None = None  # of trainings to which it belongs
    beside: str | None = None  # the path beside which results go; None: `path`

    @property
    def checkpoint(self):
        """The path of the checkpoint that it means, or None: it means samples."""
        path = Path(self.path)
        if self.kind == "samples":
            return None
        file = find_checkpoint(path)
        if file != path:
            return file
        return path if self.kind or path.suffix in (".pth", SUFFIX) else None


def find_subjects(checkpoint, samples, compare):
    """A list of Subjects, of one of three: a path, a path, or texts for compared_subjects."""
    if compare:
        return compared_subjects(compare)
    if checkpoint and is_url(checkpoint):
        path, beside = locate(checkpoint)
        return [Subject(str(path), kind="checkpoint", beside=str(beside))]
    return [Subject(checkpoint or samples, kind="checkpoint" if checkpoint else "samples")]


def compared_subjects(texts):
    """The Subjects that texts name, see parse_subject, in groups where there are any.

    A group is what stands between BREAKs; without these, what one name or one pattern, such as
    "runs/a-*", means. Raises ValueError for an empty group, OSError where nothing matches."""
    parts = [[]]
    for text in texts:
        if text == BREAK:
            parts.append([])
        else:
            parts[-1].append(parse_subject(text))
    if not all(parts):
        raise ValueError(f"compare: expected something before and after each {BREAK}")
    if len(parts) > 1:
        return in_groups(parts)
    (subjects,) = parts
    named = {}  # name -> its subjects; one without a name is alone
    for i, subject in enumerate(subjects):
        named.setdefault(subject.name or i, []).append(subject)
    if len(named) == len(subjects) and not any(is_pattern(each.path) for each in subjects):
        return subjects  # each alone
    return in_groups(named.values())


def is_pattern(path):
    return glob.has_magic(path) and not Path(path).exists()


def matches(subject):
    """The Subjects that a subject's pattern means, by path; the subject alone if it is none.

    Of a pattern that matches checkpoints what else it matches, such as pictures, is left out."""
    if not is_pattern(subject.path):
        return [subject]
    paths = sorted(glob.glob(subject.path))
    if not paths:
        raise OSError(f"compare: nothing matches {subject.path}")
    found = [replace(subject, path=path) for path in paths]
    return [each for each in found if each.checkpoint] or found


def in_groups(parts):
    """The Subjects of all parts, which are lists of Subjects; each part is a group."""
    parts = [[match for subject in part for match in matches(subject)] for part in parts]
    names = group_names(parts)
    subjects = []
    for part, name_of_all, group in zip(parts, names, numbered(names), strict=True):
        for subject in part:  # what gave the group its name is called by its path
            name = None if subject.name == name_of_all else subject.name
            subjects.append(replace(subject, name=name, group=group))
    return subjects


def numbered(names):
    """The names, those that stand more than once with their place, from 1."""
    return [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names, 1)]


def group_names(parts):
    """A name for each part, a list of Subjects: the name that all share, else made of the paths."""
    paths = distinct_paths([[subject.path for subject in part] for part in parts])
    names = []
    for part, path in zip(parts, paths, strict=True):
        given = {subject.name for subject in part}
        options = "".join(f" {key}={value}" for key, value in part[0].options.items())
        alike = len(given) == 1 and part[0].name
        names.append(alike or (path or "group") + options)
    return names


def distinct_paths(groups):
    """A name for each list of paths, of what these begin with: the last part of it, or more.

    It is "a" of a/0/model.pth and a/1/model.pth, and of runs/a-0 and runs/a-1; "x/0" and "y/0" of
    x/0/model.pth alone and y/0/model.pth alone; "" where they share nothing."""
    shared = [shared_path(paths).parts for paths in groups]
    for count in range(1, max(map(len, shared), default=0)):  # parts of a name
        names = ["/".join(parts[-count:]) for parts in shared]
        if len({*names}) == len({*shared}):
            return names
    return ["/".join(parts) for parts in shared]


def shared_path(paths):
    """The Path of what paths begin with, in whole words and numbers."""
    words = [re.findall(r"\d+|[^\W\d_]+|.", path) for path in paths]
    alike = takewhile(lambda each: len({*each}) == 1, zip(*words, strict=False))
    path = Path("".join(each[0] for each in alike).rstrip("/-_. "))
    return path.parent if path.name in RUN_MODELS else path  # of one file


def parse_subject(text):
    """The Subject in "PATH", "NAME=PATH" or "NAME=PATH,sampler=ddpm,steps=50"."""
    if Path(text).exists():  # a path may have any character
        return Subject(text)
    options = {}
    rest = text
    while match := re.fullmatch(r"(.*),(\w+)=([^,=]*)", rest):
        rest, key, value = match.groups()
        options[key] = value
    match = re.fullmatch(r"([^=/\\]+)=(.*)", rest)
    name, path = match.groups() if match else (None, rest)
    known = {each.name: each for each in fields(SamplerOptions)}
    for key, value in options.items():
        if key == "weights" and value in ("ema", "raw"):
            continue
        option = known.get(key)
        if option is None or option.metadata["bounds"].get("count", 1) > 1:
            names = [n for n, f in known.items() if "count" not in f.metadata["bounds"]]
            names.append("weights")
            wanted = f"expected some of {', '.join(names)}{did_you_mean(key, names)}"
            raise ValueError(f"{text}: {key}={value}: {wanted}")
        try:
            options[key] = option.metadata["kind"](value)
        except ValueError:
            raise ValueError(f"{text}: {key}={value}: expected a number") from None
    return Subject(path, name, dict(reversed(options.items())))


def distinct_names(subjects):
    """A name for each Subject: its own; else its run's or file's, both where two are alike."""
    spellings = []  # of each subject, from short to long
    for subject in subjects:
        path = Path(subject.path)
        options = "".join(f" {key}={value}" for key, value in subject.options.items())
        short = path.stem if path.stem else path.resolve().name  # of "." and the like
        folder = path.resolve().parent.name
        paths = [folder if path.name in RUN_MODELS else short, f"{folder}/{short}", subject.path]
        spellings.append([subject.name] if subject.name else [path + options for path in paths])
    names = []
    for i, spelling in enumerate(spellings):
        others = [other for j, other in enumerate(spellings) if j != i]
        if subjects[i].name:  # which stands; it is the others that give way
            others = [[other.name] for j, other in enumerate(subjects) if j != i]
        others = {name for other in others for name in other}
        free = [name for name in spelling if name not in others]
        if not free:
            raise ValueError(f"compare: two are called {spelling[0]}; give NAME=PATH, each another")
        names.append(free[0])
    return names


def load_candidates(subjects, data_source, sampling, weights, device, progress):
    """(candidates, dataset, its arguments): those of Subjects, and the data to compare them with.

    data_source: function of the first Candidate that has a model, or of None, -> the arguments of
    load_dataset. sampling: the fields of SamplerOptions, a dict; a subject's own go before."""
    names = distinct_names(subjects)
    flags = ({} if weights == "ema" else {"weights": weights}) | sampling
    candidates = {}  # name -> Candidate; checkpoints first, since one may name the dataset
    for name, subject in zip(names, subjects, strict=True):
        if subject.checkpoint:
            options = {"weights": weights} | sampling | subject.options
            kind = options.pop("weights")
            own = SamplerOptions(**options)
            candidates[name] = checkpoint_candidate(subject.checkpoint, name, own, kind, device)
        elif subject.options:
            raise ValueError(f"{name}: {', '.join(subject.options)}: for checkpoints only")
    if flags and not candidates:
        raise ValueError(f"{', '.join(flags)}: for checkpoints only")
    arguments = data_source(next(iter(candidates.values()), None))
    with main_first():  # which downloads or decodes for all
        dataset = load_dataset(**arguments, progress=progress)
    for name, subject in zip(names, subjects, strict=True):
        if name in candidates:
            candidates[name].require_fit(dataset)
        else:
            candidates[name] = samples_candidate(subject.path, name, dataset)
    for name, subject in zip(names, subjects, strict=True):
        candidates[name].group = subject.group
    require_trainings(candidates.values())
    return [candidates[name] for name in names], dataset, arguments


def require_trainings(candidates):
    """Raise ValueError when the same file stands twice in a group of trainings."""
    files = {}  # (group, digest) -> the name of the candidate
    for candidate in candidates:
        digest = candidate.about.get("sha256")
        if candidate.group is None or digest is None:
            continue
        other = files.setdefault((candidate.group, digest), candidate.name)
        if other != candidate.name:
            raise ValueError(
                f"compare: {other} and {candidate.name} of {candidate.group} are one training"
            )


def samples_candidate(path, name, dataset):
    """The Candidate of samples: .npz, .npy, a folder or a .zip."""
    items, summary = load_samples(path, dataset.event, dataset.units)
    about = {"samples": str(Path(path).resolve()), "count": len(items), "summary": summary}
    if Path(path).is_file():
        about["sha256"] = file_digest(path)
    return Candidate(name, about, samples=items)


def free_place(subjects, dataset, out=None):
    """The path for an evaluation's results: `out`, or one beside the first subject.

    Never inside data, where they would be read as such: of images in a folder the results lie in
    the current folder, and what would be inside the dataset goes beside it. dataset: its name or
    path. Raises ValueError when `out` is inside data."""
    first = Path(subjects[0].beside or subjects[0].path).absolute()
    data = [subject.path for subject in subjects if not subject.checkpoint]
    data += [dataset] if dataset not in DATASETS else []
    folders = [Path(path).resolve() for path in data if Path(path).is_dir()]
    is_folder = first.resolve() in folders
    place = (Path.cwd() if is_folder else first.parent).resolve()  # the folder that they lie in
    if out:
        place = Path(out).resolve().parent
    for folder in folders * len(folders):  # what is beside one may be inside another
        if place.is_relative_to(folder):
            if out:
                raise ValueError(f"out={out} is inside the data, {folder}; choose another place")
            place = folder.parent
    name = first.name if first.is_dir() else first.stem  # lr0.001 is no file of a kind .001
    name = "comparison" if len(subjects) > 1 else f"{name}-evaluation"
    return Path(out) if out else next_free_path(place / name)
