"""What files there are in a folder, a .zip, or at a path: by name, and as one number."""

import contextlib
import hashlib
import os
import stat
from functools import partial
from pathlib import Path

from ddp.data.files import File, named_errors, open_file
from ddp.data.zip_files import ZipFiles


class FolderFiles:
    """Name -> File of what lies below a folder; only the names are kept in memory."""

    def __init__(self, root, names):
        self.root = root
        self.names = names

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, name):
        path = os.path.join(self.root, name)
        with named_errors(path):
            return File(os.stat(path).st_size, partial(open_file, path))


@contextlib.contextmanager
def open_files(path):
    """Of a folder, a .zip or one file: (name -> File, name -> why something else is no file).

    Hidden files are left out. Raises OSError when it cannot be read."""
    if path.is_dir():
        names, others = [], {}
        for name, _, problem in walk(path):
            if problem:
                others[name] = problem
            else:
                names.append(name)
        yield FolderFiles(path, names), others
    elif not path.is_file():
        raise OSError(f"{path} is neither an image nor a folder or .zip of images")
    elif path.suffix.lower() != ".zip":
        yield {path.name: File(path.stat().st_size, partial(open_file, path))}, {}
    else:
        with ZipFiles(path) as files:
            yield files, {}


def walk(root):
    """Yield (name, status, None) of each file below a folder; links are followed.

    Of what is none: (name, None, what it is instead). Hidden ones are passed over."""
    pending = [(root, "", ())]  # folder, what its names begin with, ids of it and those above
    while pending:
        folder, prefix, above = pending.pop()
        with named_errors(folder):
            above = (*above, file_id(os.stat(folder)))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    name = prefix + entry.name
                    status, problem = status_of(entry)
                    if problem or stat.S_ISREG(status.st_mode):
                        yield name, status, problem
                    elif file_id(status) in above:
                        yield name, None, "a link to a folder that it lies in"
                    else:
                        pending.append((Path(folder, entry.name), f"{name}/", above))


def status_of(entry):
    """(status, None) of a file or a folder, (None, what it is instead) of all else."""
    try:
        status = entry.stat()
    except OSError as error:
        return None, f"a link that leads nowhere ({error.strerror})"
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return status, None
    return None, "neither a file nor a folder"


def file_id(status):
    return status.st_dev, status.st_ino


def digest_of(path):
    """32 hex digits that change with the name, size or time of any file there.

    Those of the files are added up, in whatever order they are listed: no list is kept."""
    total = 0
    files = walk(path) if path.is_dir() else [("", path.stat(), None)]
    for name, status, problem in files:
        text = f"{name}\0{problem}"
        if status:
            text = f"{name}\0{status.st_size}\0{status.st_mtime_ns}"
        code = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=16)
        total += int.from_bytes(code.digest(), "little")
    return f"{total % (1 << 128):032x}"
