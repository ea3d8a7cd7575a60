"""run.json in a run's folder: which process trains there, and on what data."""

import json
import os
import platform
import sys
import time
from pathlib import Path

from ddp.distributed import launch_id

try:
    import fcntl
except ImportError:  # Windows, where two runs at once in one folder are not told apart
    fcntl = None

RECORD = "run.json"
PATIENCE = 120  # seconds; NFS keeps a lock of a lost machine for 90
MAX_RECORD_BYTES = 1 << 16  # a sanity limit, the file may be a stranger's
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # a link planted there is not written through


def lock_folder(folder):
    """Return run.json of a folder, open; while it is open, no other process trains there.

    The lock is the system's, so it ends with the process, however that ends and on whichever host.
    Raises ValueError, which names the other process, when one trains there, OSError when the file
    cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    file = open(number, "r+", encoding="utf-8")  # noqa: SIM115
    try:
        if fcntl:
            flock(file, folder)
    except BlockingIOError:
        file.close()
        other = read_record(folder, any_host=True)
        who = f"process {other.get('pid', '?')} on {other.get('host', 'an unknown host')}"
        raise ValueError(
            f"name={folder.name}: {folder.resolve()} is in use, {who} trains there; wait for its "
            "end, stop it, or set name for another run"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def flock(file, folder):
    """Lock a file of a folder. Raises BlockingIOError when another process has it.

    One of the same launch of torchrun, which starts all anew, has some time to end."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            launch = read_record(folder, any_host=True).get("launch")
            if launch is None or launch != launch_id() or time.monotonic() > give_up:
                raise
        time.sleep(1)


def write_record(file, config, dataset):
    """Write into run.json, open and locked, who trains on what; dataset: a data.Dataset.

    file: None on a process that does not write."""
    if file is None:
        return
    record = {
        "first_command": first_command(file),  # with which the run began; "command": goes on
        "launch": launch_id(),  # of torchrun
        "host": platform.node(),
        "pid": os.getpid(),
        "started": time.time(),  # seconds since 1970
        "command": sys.argv,
        "dataset": config.dataset,
        "data_dir": str(Path(config.data_dir).absolute()),
        "labels": config.labels,
        "cache": config.cache,
        "items": count_items(dataset),
    }
    file.seek(0)
    file.truncate()
    json.dump(record, file, indent=1)
    file.flush()


def first_command(file):
    """Return the command with which the run of run.json, open, began: this one, in a new run."""
    file.seek(0)
    try:
        before = json.loads(file.read(MAX_RECORD_BYTES))
    except (ValueError, RecursionError):  # an empty file, of a new run
        before = {}
    before = before if isinstance(before, dict) else {}
    return before.get("first_command", before.get("command", sys.argv))


def read_record(folder, any_host=False):
    """Return run.json of a folder, a dict; {} where there is none that this machine wrote."""
    path = Path(folder) / RECORD
    try:
        if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
            return {}
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(record, dict) and (any_host or record.get("host") == platform.node())
    return record if ours else {}


def count_items(dataset):
    """Return how many items each split of a Dataset has: a dict."""
    parts = {name: getattr(dataset, name, None) for name in ("train", "val", "test")}
    return {name: len(part) for name, part in parts.items() if part is not None}
