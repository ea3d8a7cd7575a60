"""The folder of a run: its name, where a run goes on from, and where its data are."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from ddp.config import Config, resume_config
from ddp.data import DATASETS, resolve_name
from ddp.distributed import launch_id
from ddp.io.checkpoint import RESUME_KEYS, parse_config, read_checkpoint, require_keys
from ddp.io.files import numbered
from ddp.io.run_lock import RECORD, count_items, lock_folder, read_record

PATHS = ("labels", "cache")  # of Config, that belong to a dataset
MAX_NAMES = 3  # of changed files, that an error line shows


def resolve_run(overrides, resume=None):
    """Return (config, folder, the checkpoint's path, its dict); of a new run the last two are None.

    overrides: the fields of Config that were set. resume: a checkpoint, a run's folder, or auto,
    the newest run, see newest_run. Nothing is created. Raises ValueError when something there would
    be overwritten, OSError when the checkpoint cannot be read."""
    overrides = dict(overrides)
    resume = run_of_launch(overrides.get("out_dir", Config.out_dir)) or resume
    if "dataset" in overrides:
        overrides["dataset"] = resolve_name(overrides["dataset"])
    for name in ("data_dir", *PATHS):
        if overrides.get(name):
            overrides[name] = absolute(overrides[name])
    config = Config(**overrides)  # of a new run
    path = newest_run(config, overrides) if resume == "auto" else resume and Path(resume)
    if not path:
        config = replace(config, data_dir=absolute(config.data_dir))
        folder = Path(config.out_dir) / (config.name or run_name(config.dataset))
        return config, next(free_folders(folder, not config.name)), None, None
    path = Path(absolute(path / "last.pth" if path.is_dir() else path))
    state = read_checkpoint(path)
    if "optimizer" not in state:
        raise OSError(f"{path} was stripped for shipping; resume last.pth, best.pth or step_*.pth")
    require_keys(path, state, RESUME_KEYS)
    config = resumed_config(parse_config(state, path), overrides, path)
    own = path.parent  # the run that the checkpoint is of
    folder = Path(overrides.get("out_dir", own.parent)) / overrides.get("name", own.name)
    if folder.resolve() == own.resolve():
        if path.name != "last.pth":
            require_newest(path, state["step"])
        return config, own, path, state
    return config, next(free_folders(folder)), path, state  # a branch: a new run from there


def run_of_launch(out_dir):
    """Return the newest whole checkpoint of the run that torchrun has started anew, or None.

    That is the run of the same launch (of one rdzv_id) and the same command."""
    if launch_id() is None:
        return None
    for path in Path(out_dir).glob(f"*/{RECORD}"):
        record = read_record(path.parent, any_host=True)
        if record.get("launch") == launch_id() and record.get("command", [])[1:] == sys.argv[1:]:
            saved = sorted(path.parent.glob("step_*.pth"), reverse=True)
            found = [path.with_name("last.pth"), *saved, path.with_name("best.pth")]
            return next(filter(is_whole, found), None)
    return None


def is_whole(path):
    """Return whether a checkpoint is there and can be read."""
    try:
        return bool(read_checkpoint(path))
    except OSError:
        return False


def absolute(path):
    """Return a path as an absolute one, which means the same from another folder; ~ is a home."""
    return os.path.abspath(os.path.expanduser(path))


def resumed_config(config, overrides, path):
    """Return the Config of a run that goes on from a checkpoint, with its data where they are now.

    Raises ValueError when an override would make it another run."""
    config = replace(config, shards=config.shards or 1)  # before version 0.4 a batch was one part
    given = {name: overrides.get(name) for name in ("dataset", "data_dir", *PATHS)}
    if given["dataset"] not in DATASETS and config.dataset not in DATASETS:
        overrides = {name: value for name, value in overrides.items() if name != "dataset"}
    config = resume_config(config, overrides)  # a path may differ: the data are compared instead
    source = data_source(config, path, **given)
    paths = {name: source[name] for name in ("data_dir", *PATHS)}
    return replace(config, dataset=source["name"], **paths)


def newest_run(config, overrides):
    """Return last.pth of the run that was saved last, or None where there is none to go on with.

    Of the run called `name` or, of those numbered for it, on `dataset`; where neither was given,
    of all runs in out_dir."""
    names = ".*"
    if config.name:
        names = re.escape(config.name)
    elif "dataset" in overrides:
        names = re.escape(run_name(config.dataset)) + r"(-\d+)?"  # digits, digits-2, ...
    found = {}  # path -> time of its last change
    for path in Path(config.out_dir).glob("*/last.pth"):
        its_dataset = read_record(path.parent).get("dataset", config.dataset)
        other = "dataset" in overrides and its_dataset != config.dataset
        if re.fullmatch(names, path.parent.name) and not other:
            found[path] = path.stat().st_mtime
    return max(found, key=found.get, default=None)


def require_newest(path, step):
    """Raise ValueError when last.pth beside a checkpoint is of a later step: it would be lost."""
    last = path.parent / "last.pth"
    try:
        newest = read_checkpoint(last)["step"]
    except OSError:  # absent or damaged: there is nothing to lose
        return
    if newest > step:
        raise ValueError(
            f"resume={path} is at step {step}, but {last} is at step {newest} "
            "and would be overwritten; resume that one, or set name for a new run"
        )


def checkpoints(folder):
    """Return the checkpoints in a folder, without hidden files: those may be half written."""
    return [path for path in folder.glob("*.pth") if not path.name.startswith(".")]


def free_folders(folder, may_number=False):
    """Yield folders without checkpoints, for a new run; with may_number also folder-2, ...

    Raises ValueError where there is no other."""
    for path in numbered(folder):
        if not checkpoints(path):
            yield path
        elif not may_number:
            raise ValueError(
                f"name={folder.name}: {folder.resolve()} holds a run already; choose another "
                f"name, or go on with it: resume={folder}"
            )
        if not may_number:
            return


def take_folder(folder, may_number=False):
    """Lock the first free folder for a new run -> (folder, its open run.json).

    Raises ValueError when it holds a run, or a process trains there; with may_number the next one
    is tried."""
    for free in free_folders(folder, may_number):
        try:
            lock = lock_folder(free)
        except ValueError:
            if not may_number:
                raise
            continue
        if not checkpoints(free):  # nobody trained there meanwhile
            return free, lock
        lock.close()
    raise ValueError(f"name={folder.name}: {folder.resolve()} holds a run already; choose another")


# ---- the data of a checkpoint ----


def run_name(dataset):
    """Return what a run on a dataset is called: a name as it is, of a path its own."""
    path = Path(dataset)
    is_file = path.suffix.lower() in (".zip", ".npy", ".npz")
    return (path.stem if is_file else path.name) or "data"


def data_source(config, checkpoint_path, dataset=None, data_dir=None, labels=None, cache=None):
    """Return the keyword arguments with which data.load_dataset finds a checkpoint's data.

    A path that only the file names is not followed, for it may be a stranger's file. In its place:
    `dataset` and the others as the user gave them, else what run.json beside the checkpoint says of
    this run on this machine. Raises ValueError when neither says where the data are."""
    record = read_record(Path(checkpoint_path).parent)
    if run_name(str(record.get("dataset"))) != run_name(config.dataset):
        record = {}  # of another run
    known = str(record["dataset"]) if record else config.dataset
    is_path = known not in DATASETS
    if dataset is None and is_path and data_dir is not None:  # where the data have moved to
        inside = Path(data_dir, Path(config.dataset).name)
        dataset = str(inside if inside.exists() else data_dir)
    if dataset is None and is_path and not record:
        raise ValueError(
            f"{checkpoint_path} was trained on {config.dataset}; a path in a file is followed only "
            "in the folder of a run of this machine: set dataset to where those data are"
        )
    options = config.data_options()
    options["name"] = resolve_name(known if dataset is None else dataset)
    for name, path in (("labels", labels), ("cache", cache)):
        known = record.get(name)
        options[name] = path or (known if isinstance(known, str) else None)
    if options["name"] in DATASETS:  # which has a size and splits of its own
        options |= dict.fromkeys(("image_size", "channels", "test_fraction", *PATHS))
    options["data_dir"] = data_dir or str(record.get("data_dir", Config.data_dir))
    return options


def require_same_data(state, path, dataset):
    """Raise OSError, which says what changed, unless a checkpoint's dict is of this Dataset.

    path: the checkpoint's, beside which run.json may tell more."""
    theirs = state["provenance"].get("fingerprint")  # None in a file that lacks it
    ours = dataset.fingerprint
    if theirs == ours:
        return
    record = read_record(Path(path).parent)
    was = record.get("items")
    now = count_items(dataset)
    changes = f"fingerprint {theirs} then, {ours} now"
    if was != now and isinstance(was, dict):
        counts = {name: (was.get(name, 0), now[name]) for name in now}
        changed = [f"{a} {name} items then, {b} now" for name, (a, b) in counts.items() if a != b]
        changes = ", ".join(changed)
    names = changed_since(record.get("dataset"), record.get("started"))
    if names:
        more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
        changes += f"; changed since: {', '.join(names[:MAX_NAMES])}{more}"
    raise OSError(
        f"{path} was trained on other data than {dataset.name} is now ({changes}); put the data "
        "back, set dataset to where they are, or go on with the present ones by new_data"
    )


def changed_since(dataset, seconds):
    """Return names of the files and folders of a dataset that changed after a time since 1970."""
    if not isinstance(dataset, str) or not isinstance(seconds, float):
        return []
    place = Path(dataset)
    paths = [place, *sorted(place.rglob("*"))] if dataset not in DATASETS else []
    # a folder changes when something is put there or removed
    return [str(path) for path in paths if path.exists() and path.stat().st_ctime > seconds]


def accept_data(state, dataset):
    """Make a checkpoint's dict one of this Dataset, which has changed since.

    Raises ValueError when its items or classes are of another kind."""
    for name, now in (("event", list(dataset.event)), ("classes", list(dataset.classes))):
        if state[name] != now:
            raise ValueError(f"new_data: {name} was {state[name]} and is {now}; start a new run")
    state["provenance"]["fingerprint"] = dataset.fingerprint
    state["best"] = None  # a loss on other items
