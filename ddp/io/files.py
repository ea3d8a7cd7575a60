"""Files and folders that appear whole or not at all, and paths that are still free."""

import contextlib
import hashlib
import os
import secrets
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

RUN_MODELS = ("model.pth", "last.pth")  # which of its checkpoints a run's folder means
EXPORTED = "model.safetensors"  # what a folder of ddp.export means


def hidden_path(path, suffix=""):
    """Return a hidden path beside `path` that nobody can foresee, nor plant a link at."""
    stem = path.name.removesuffix(suffix)[:40]  # a name has 255 bytes, and letters up to 4
    return path.with_name(f".{stem}.{secrets.token_hex(8)}.partial{suffix}")


def atomic_write(
    path,  # of a file, which is replaced if it is there
    write,  # function(path), which writes to the empty file there
):
    """Write a file aside, flush it to the disk, then rename it to `path`, which is returned.

    Whatever `write` raises passes through; then `path` is as it was and nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, because writers choose a format by it
    temporary = hidden_path(path, path.suffix)
    temporary.touch(exist_ok=False)
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path, of_file=False):
    """Yield an object with a hidden `folder` to write into. When all is well that becomes `path`,
    or the next free name if something came there meanwhile; else it is removed.

    of_file: `path` is of a file, the only one in the folder, which alone is kept. Afterwards the
    object's `path` is where the result is. Raises OSError when it cannot be made."""
    path = Path(path).absolute()
    out = SimpleNamespace(path=path, folder=hidden_path(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        out.folder.mkdir()
    except OSError as error:
        raise OSError(f"out={path} cannot be written ({error.strerror}); choose another") from None
    try:
        yield out
        result = next(out.folder.iterdir()) if of_file else out.folder
        out.path = move_to_free(result, path)
    finally:
        shutil.rmtree(out.folder, ignore_errors=True)


def move_to_free(temporary, path):
    """Rename a finished file or folder to `path` or, when that is taken, to the next free name.

    Returns the name. Nothing is overwritten, whoever else writes there at the same time; the place
    of an empty folder is taken by a folder."""
    is_dir = temporary.is_dir()
    suffix = "" if is_dir else path.suffix
    base = path.with_name(path.name.removesuffix(suffix))
    for candidate in numbered(base, suffix):
        try:
            if is_dir:
                temporary.rename(candidate)  # fails where there is a file, or a folder with any
            else:
                candidate.touch(exist_ok=False)  # takes the name, which a rename would not ask
            break
        except OSError:
            if not os.path.lexists(candidate):
                raise
    if not is_dir:
        temporary.replace(candidate)
    return candidate


def numbered(path, suffix=""):
    """Yield path + suffix, path-2 + suffix, path-3 + suffix, ..."""
    yield path.with_name(path.name + suffix)
    for number in range(2, 10**9):
        yield path.with_name(f"{path.name}-{number}{suffix}")


def next_free_path(path, suffix=""):
    """`path` + suffix or, when that exists, the first of path-2, path-3, ... that does not."""
    return next(name for name in numbered(path, suffix) if not os.path.lexists(name))


def require_absent(path):
    """Return `path`. Raises ValueError when a file, or a folder that is not empty, is there."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"out={path} exists and is not overwritten; choose another, or remove it")
    return path


def shown_path(path):
    """Return a path as it is told: from the current folder where it lies in that, else absolute."""
    path = Path(path).absolute()
    with contextlib.suppress(OSError, ValueError):  # no current folder; elsewhere
        return path.relative_to(Path.cwd())
    return path


def command_line(script, flag, path):
    """Return the line that starts a script with a path: short where the script lies in the current
    folder, else one that works in any."""
    script, path = Path(script).resolve(), Path(path).resolve()
    if script.parent == Path.cwd():
        script, path = script.name, shown_path(path)
    return shlex.join(["python", str(script), f"--{flag}", str(path)])


def file_digest(path):
    """Return the SHA-256 of a file, in hexadecimal digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def cache_folder():
    """Return the folder of what can be had again. Raises OSError where there is no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise OSError("there is no home for a cache; set XDG_CACHE_HOME") from None
    return cache / "ddp"


def find_checkpoint(path):
    """Return the path of the checkpoint that `path` means: itself or, of a run's folder, one of
    RUN_MODELS, of an exported one EXPORTED."""
    inside = [Path(path, name) for name in (*RUN_MODELS, EXPORTED)]
    return next((file for file in inside if file.is_file()), Path(path))
