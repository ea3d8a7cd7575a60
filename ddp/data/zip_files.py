"""A .zip of any number of files: its table as arrays, its files read from their places.

zipfile keeps some 800 bytes of each file in memory; this keeps its name and 32 bytes."""

import bisect
import contextlib
import io
import os
import struct
import threading
import zlib
from functools import partial

import numpy as np

from ddp.data.files import HIDDEN, DamagedError, File, named_errors, printable

ENTRY = struct.Struct("<4s6H3L5H2L")  # of the table, before a file's name
LOCAL = struct.Struct("<4s5H3L2H")  # before a file's name and content
END = struct.Struct("<4s4H2LH")  # behind the table
WIDE_END, WIDE_LOCATOR = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")  # between, if large
MAX_END_BYTES = WIDE_END.size + WIDE_LOCATOR.size + END.size + (1 << 16)  # with a comment
STORED, DEFLATED = 0, 8
ENCRYPTED, UTF8 = 0x61, 0x800  # flags; the first: encrypted, patched, strongly encrypted
WIDE = 0xFFFFFFFF  # in the place of a number that stands, in 64 bits, among the extra fields
FIELDS = [("place", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4")]  # bytes; CRC-32
FIELDS += [("method", "<u2"), ("flags", "<u2")]


class ZipFiles:
    """Name -> File of a .zip, in the order of names; hidden files are left out."""

    def __init__(self, path):
        """Raises OSError when it is no whole .zip file."""
        self.path = path
        self.lock = threading.Lock()  # where a place cannot be read in one go
        with named_errors(path):
            self.stream = open(path, "rb", buffering=1 << 20)  # noqa: SIM115
        try:
            with named_errors(path):
                self.length = os.fstat(self.stream.fileno()).st_size
                entries = np.fromiter(self.entries(), [("name", "O"), *FIELDS])
        except (struct.error, ValueError, OverflowError) as error:
            self.stream.close()
            raise OSError(f"{path} is not a whole .zip file ({printable(error)})") from None
        order = np.argsort(entries["name"], kind="stable")
        names = entries["name"][order]
        is_last = np.ones(len(names), bool)  # of a name that is there twice, the last counts
        is_last[:-1] = names[:-1] != names[1:]
        self.names = names[is_last].tolist()
        self.table = {field: entries[field][order[is_last]] for field, _ in FIELDS}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, name):
        number = bisect.bisect_left(self.names, name)
        return File(int(self.table["size"][number]), partial(self.open, number))

    def entries(self):
        """Yield (name, *FIELDS) of each file in the table."""
        start, end, shift = self.find_table()
        self.stream.seek(start)
        while start < end:
            head = ENTRY.unpack(self.stream.read(ENTRY.size))
            lengths = head[10:13]  # of the name, the extra fields, a comment
            name, extra, _ = [self.stream.read(length) for length in lengths]
            start += ENTRY.size + sum(lengths)
            if head[0] != b"PK\1\2":
                raise ValueError("its table is damaged")
            flags, method, crc = head[3], head[4], head[7]
            size, packed, place = widen((head[9], head[8], head[16]), extra)
            name = decode_name(name, flags)
            if not HIDDEN.search(name):
                yield name, place + shift, packed, size, crc, method, flags

    def find_table(self):
        """Return where the table begins and ends, and what to add to the places it names."""
        start = max(0, self.length - MAX_END_BYTES)
        self.stream.seek(start)
        tail = self.stream.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0:
            raise ValueError("it has no table of its files")
        size, place = END.unpack_from(tail, at)[5:7]
        wide = at - WIDE_LOCATOR.size - WIDE_END.size
        if wide >= 0 and tail[wide : wide + 4] == b"PK\6\6":
            size, place = WIDE_END.unpack_from(tail, wide)[8:]
            at = wide
        end = start + at
        shift = end - size - place  # bytes of something else that precede the archive
        if shift < 0:
            raise ValueError("its table is not whole")
        return end - size, end, shift

    @contextlib.contextmanager
    def open(self, number):
        """A stream of file `number` of the table. Raises DamagedError when it cannot be read."""
        with named_errors(f"{self.path}, {printable(self.names[number])}"):
            content = self.read(**{name: int(self.table[name][number]) for name in self.table})
        yield io.BytesIO(content)

    def read(self, place, packed, size, crc, method, flags):
        """The content of the file that the table describes so. Raises DamagedError."""
        if flags & ENCRYPTED:
            raise DamagedError("it is encrypted")
        if method not in (STORED, DEFLATED):
            raise DamagedError(f"its compression, number {method}, is neither stored nor deflated")
        head = self.read_at(place, LOCAL.size)
        if head[:4] != b"PK\3\4" or len(head) < LOCAL.size:
            raise DamagedError("its place lies outside of the archive")
        start = place + LOCAL.size + sum(LOCAL.unpack(head)[-2:])
        if packed > 2 * size + 1024 or start + packed > self.length:
            raise DamagedError("it is not whole")
        content = self.read_at(start, packed)
        if method == DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise DamagedError(printable(error)) from None
        if len(content) != size or zlib.crc32(content) != crc:
            raise DamagedError("its CRC-32 or its size is wrong")
        return content

    def read_at(self, place, count):
        """Return `count` bytes from a place, fewer at the end; any thread or process may ask."""
        if hasattr(os, "pread"):
            return os.pread(self.stream.fileno(), count, min(place, self.length))
        with self.lock:
            self.stream.seek(min(place, self.length))
            return self.stream.read(count)


def widen(numbers, extra):
    """Return size, packed size and place, each from the extra fields where 32 bits are too few."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    return [next(values, number) if number == WIDE else number for number in numbers]


def decode_name(name, flags):
    """A file's name from its bytes, with slashes, whichever program wrote it."""
    try:
        text = name.decode("utf-8")  # which many write without the flag
    except UnicodeError:
        if flags & UTF8:
            raise
        text = name.decode("cp437")
    return text.split("\0")[0].replace("\\", "/")
