"""Files of a user, in a folder or an archive: listed and sized first, then read one by one.

Nothing that a file declares of itself is believed: sizes are compared with those on the disk before
memory is taken, and a name is made safe to print."""

import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

HIDDEN = re.compile(r"(^|/)(\.[^/]|__MACOSX)|/$")  # .name, macOS's by-product, a .zip's folder
MAX_UNPACKED_BYTES = 1 << 30  # of an archive that unpacks to more than MAX_RATIO times its size
MAX_RATIO = 100
UTF8_FLAG, UNREADABLE_FLAGS = 0x800, 0x61  # of a .zip: encrypted, patched, strongly encrypted
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError)
ZIP_ERRORS += (OverflowError, RuntimeError)  # all that zipfile raises on damaged files


class DamagedError(Exception):
    """One file of an archive cannot be read, whatever the others are."""


@dataclass(frozen=True)
class File:
    size: int  # bytes, as it is unpacked
    open: Callable  # () -> a binary stream; raises OSError, or DamagedError of a file in an archive

    def read(self):
        with self.open() as stream:
            return stream.read()


@contextlib.contextmanager
def named_errors(path):
    """A context in which an error of the disk becomes an OSError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # what is read is wrong, not the reading
            raise
        raise OSError(f"{path} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def open_file(path):
    with named_errors(path), open(path, "rb") as stream:
        yield stream


@contextlib.contextmanager
def open_archive(path):
    """name -> File of a .zip or .npz, folders too. Raises OSError when it is damaged."""
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except (*ZIP_ERRORS, OSError) as error:
        raise OSError(f"{path} is not a whole .zip file ({printable(error)})") from None
    with archive:
        files = {}
        for info in archive.infolist():
            opener = partial(open_member, path, archive, info, size)
            files[member_name(info)] = File(info.file_size, opener)
        yield files


def member_name(info):
    """A file's name in an archive, with slashes, whichever program wrote it."""
    name = info.filename
    if not info.flag_bits & UTF8_FLAG and not name.isascii():  # many write UTF-8 unasked
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")  # cp437: what zipfile takes it for
    return name.replace("\\", "/")


@contextlib.contextmanager
def open_member(path, archive, info, archive_size):
    """A stream of one file of an archive. Raises DamagedError when it cannot be read."""
    inside = 0 <= info.header_offset <= archive_size - info.compress_size
    problem = "its place lies outside of the archive" if not inside else ""
    if info.flag_bits & UNREADABLE_FLAGS:
        problem = "it is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = f"its compression, number {info.compress_type}, is neither stored nor deflated"
    if problem:
        raise DamagedError(problem)
    try:
        with named_errors(f"{path}, {printable(info.filename)}"), archive.open(info) as stream:
            yield stream
    except ZIP_ERRORS as error:
        raise DamagedError(f"{type(error).__name__} {printable(error)}") from None


def require_honest(path, files, names):
    """Raise OSError when the files of these names unpack to suspiciously much: a bomb."""
    if not path.is_file():
        return
    unpacked = sum(files[name].size for name in names)
    packed = path.stat().st_size
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * packed):
        raise OSError(
            f"{path} would unpack from {packed:,} to {unpacked:,} bytes; if that is right, give "
            "the files as they are, unpacked"
        )


def printable(text, length=120):
    """Text, such as a file's name or an error, on one line that is safe to print, cut to length."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return text if len(text) <= length else f"{text[: length - 3]}..."


def counted(count, noun):
    """The number and its noun, in the plural but for one."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
