"""Arrays in .npy and .npz files: their headers first, then their numbers, read or mapped.

What a header declares is held against the file's size before memory is taken."""

import functools
import math
import os
import re
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ddp.data.files import (
    DamagedError,
    File,
    open_archive,
    open_file,
    printable,
    require_honest,
)

SUFFIXES = (".npy", ".npz")
MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000  # of an array, as in NumPy
MAX_DIMS = 8
DESCR = re.compile(r"'descr': *'([<>|=]?(?:[fiub][1248]|[US][1-9]\d{0,5}))' *[,}]")
ORDER = re.compile(r"'fortran_order': *(True|False)")
SHAPE = re.compile(r"'shape': *\( *((?:\d{1,18}, *)*(?:\d{1,18} *)?)\)")
CHUNK_BYTES = 1 << 20
LOCAL_HEADER = struct.Struct("<26xHH")  # of a .zip: lengths of the name and of what follows it
OPEN_ARRAYS = 100  # files that are kept open; a system may allow 256


@dataclass(frozen=True)
class Array:
    """An array of numbers in a file, of which only the header was read."""

    path: Path
    name: str  # in an .npz, without .npy; "" of an .npy
    dtype: np.dtype
    shape: tuple
    order: str  # "C" or "F"
    offset: int | None  # in the file, of the numbers; None: they are compressed

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self):
        return f"{self.path}, {printable(self.name)}" if self.name else str(self.path)


@functools.lru_cache(maxsize=OPEN_ARRAYS)
def open_array(array):
    """The numbers of an Array, mapped where they are not compressed: read when they are used."""
    if array.offset is None:
        try:
            return read_array(array.path, (array.name,))
        except MemoryError:
            raise ValueError(
                f"{array} needs {array.nbytes:,} bytes of memory, since it is compressed; write it "
                "by numpy.savez or numpy.save, and it is read where it lies"
            ) from None
    mapped = np.memmap(array.path, array.dtype, "r", array.offset, array.shape, array.order)
    return np.asarray(mapped)  # without what a memmap does at every index


def list_arrays(path):
    """The Arrays in an .npy or .npz file, in the order there.

    Raises OSError when it cannot be read, or holds what is no array of numbers or of text."""
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            file = File(path.stat().st_size, partial(open_file, path))
            return [list_array(path, "", file, offset=0)]
        arrays = []
        with open_archive(path) as files:
            starts = stored_offsets(path)
            for name, file in files.items():
                if name.endswith(".npy"):
                    arrays.append(list_array(path, name, file, starts.get(name)))
        return arrays
    except DamagedError as error:
        raise OSError(f"{path} cannot be read as an array of numbers: {error}") from None


def list_array(path, name, file, offset):
    """The Array of a File that begins at `offset` of `path`; None: it is compressed."""
    with file.open() as stream:
        dtype, shape, order, start = read_header(stream, file.size)
    offset = None if offset is None else offset + start
    return Array(path, name.removesuffix(".npy"), dtype, shape, order, offset)


def stored_offsets(path):
    """Where the files of an archive begin that are not compressed: name -> bytes."""
    starts = {}
    with zipfile.ZipFile(path) as archive, open_file(path) as stream:
        for info in archive.infolist():
            stream.seek(info.header_offset)
            header = stream.read(LOCAL_HEADER.size)
            is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if is_plain and len(header) == LOCAL_HEADER.size:
                skipped = LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
                starts[info.filename] = info.header_offset + skipped
    return starts


def read_array(path, names=(), text=False):
    """The NumPy array in an .npy or .npz file, or None when it has another suffix.

    Of an .npz, the first of `names`, default: of all. text: whether it may hold text. Raises
    OSError when it cannot be read."""
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() not in SUFFIXES:
        return None
    if not path.is_file():
        raise OSError(f"{path} is no file")
    try:
        if path.suffix.lower() == ".npy":
            return parse_array(File(path.stat().st_size, partial(open_file, path)), text)
        with open_archive(path) as files:
            arrays = [name.removesuffix(".npy") for name in files if name.endswith(".npy")]
            present = [name for name in names or arrays if name in arrays]
            if not present:
                raise DamagedError(f"it holds no {' or '.join(names) or 'array'}")
            member = f"{present[0]}.npy"
            require_honest(path, files, [member])
            return parse_array(files[member], text)
    except DamagedError as error:
        raise OSError(f"{path} cannot be read as an array of numbers: {error}") from None


def parse_array(file, text=False):
    """The array in a File. Raises DamagedError when it is none of numbers, or not whole."""
    with file.open() as stream:
        dtype, shape, order, _ = read_header(stream, file.size)
        if dtype.kind in "US" and not text:
            raise DamagedError("it holds text")
        array = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        fill(memoryview(array), stream)
    return array.view(dtype).reshape(shape, order=order)


def read_header(stream, size):
    """(dtype, shape, order, where the numbers begin) of an array in a stream of `size` bytes."""
    head = stream.read(8)
    length_bytes = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}.get(head[6:])  # by version
    if head[:6] != MAGIC or not length_bytes:
        raise DamagedError("it is no array that NumPy wrote")
    length = int.from_bytes(stream.read(length_bytes), "little")
    if length > MAX_HEADER_BYTES:
        raise DamagedError(f"its header is of {length:,} bytes")
    header = stream.read(length).decode("latin1")
    found = [pattern.search(header) for pattern in (DESCR, ORDER, SHAPE)]
    if not all(found):
        raise DamagedError(
            "it holds objects" if "O'" in header else f"it holds {printable(header, 100)}"
        )
    dtype = np.dtype(found[0][1])
    shape = tuple(int(n) for n in re.findall(r"\d+", found[2][1]))
    declared = math.prod(shape) * dtype.itemsize  # bytes
    start = len(head) + length_bytes + length
    there = size - start
    if declared > there or len(shape) > MAX_DIMS or max(shape, default=0) > 1 << 40:
        raise DamagedError(f"its header declares {dtype} {shape}, but it has {there:,} bytes")
    return dtype, shape, "F" if found[1][1] == "True" else "C", start


def fill(buffer, stream):
    """Fill a memoryview of bytes from a stream, piece by piece. Raises DamagedError at its end."""
    start = 0
    while start < len(buffer):
        count = stream.readinto(buffer[start : start + CHUNK_BYTES])
        if not count:
            raise DamagedError(f"it ends after {start:,} of {len(buffer):,} bytes")
        start += count


class Joined:
    """Rows of several Arrays of one dtype and shape as one array: read when they are indexed."""

    def __init__(self, arrays):
        self.arrays = arrays
        counts = [array.shape[0] for array in arrays]
        self.ends = np.cumsum(counts)
        self.starts = self.ends - counts
        self.dtype = arrays[0].dtype
        self.shape = (int(self.ends[-1]), *arrays[0].shape[1:])
        self.nbytes = sum(array.nbytes for array in arrays)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """Rows (B, ...) of a slice or of integers (B,), in memory."""
        if len(self.arrays) == 1:
            rows = open_array(self.arrays[0])[index]
            return rows.copy() if isinstance(index, slice) else rows  # others are copies
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        number = np.searchsorted(self.ends, index, side="right")  # of the array that has it
        rows = np.empty((len(index), *self.shape[1:]), self.dtype)
        for k in np.unique(number):
            rows[number == k] = open_array(self.arrays[k])[index[number == k] - self.starts[k]]
        return rows
