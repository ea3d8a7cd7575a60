"""Files that appear whole or not at all, and paths that are still free."""

import contextlib
import os
import shutil
from pathlib import Path


def atomic_write(
    path,  # of a file, which is replaced if it is there
    write,  # function(path), which writes a file there
):
    """Write a file aside, flush it to the disk, then rename it to `path`, which is returned.

    Whatever `write` raises passes through; then `path` is as it was and nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, because writers choose a format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path):
    """A hidden folder to write into; it becomes `path` when all is well, else it is removed.

    Raises OSError when it cannot be made."""
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OSError(f"out={path} cannot be written ({error.strerror}); choose another") from None
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # works only when it is empty: nothing is overwritten
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def next_free_path(path, suffix=""):
    """`path` + suffix or, when that exists, the first of path-2, path-3, ... that does not."""
    candidate = path.with_name(path.name + suffix)
    number = 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}{suffix}")
    return candidate


def require_absent(path):
    """Return `path`. Raises ValueError when a file, or a folder that is not empty, is there."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"out={path} exists and is not overwritten; choose another, or remove it")
    return path
