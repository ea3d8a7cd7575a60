"""What torch.save wrote, read as data: whole, at a bounded cost, by a machine that runs no code.

torch.load checks no checksum and, though it runs nothing of a file's, a file can make it crash or
hang. An honest one needs little: a zip of stored parts, and a pickle of some thirty operations.
"""

import hashlib
import math
import pickletools
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

MAX_ENTRIES = 1 << 16  # parts of the zip: one for each storage, and six more
MAX_PROGRAM, PROGRAM_PER_ENTRY = 1 << 20, 512  # bytes of the pickle; honest ones need 130 an entry
MAX_OPERATIONS, OPERATIONS_PER_ENTRY = 100_000, 64  # of the pickle; honest ones need 36 an entry
MAX_DEPTH = 8  # of dicts and lists in one another
MAX_DIMS = 8
PLAIN_TYPES = (str, int, float, bool, type(None), torch.Tensor)
ZIP_FLAGS = 0x808  # those that torch sets: sizes follow the data, names are UTF-8
MALFORMED = (  # all that zipfile, pickletools and this module raise for bad data
    *(zipfile.BadZipFile, struct.error, ValueError, LookupError, EOFError, RuntimeError),
    *(OSError, OverflowError, MemoryError),
)

DTYPES = {  # the class of a storage -> dtype
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
GLOBALS = {  # what a program may name -> what stands for it
    "collections OrderedDict": dict,
    "torch._utils _rebuild_tensor_v2": torch.Tensor,
    **{f"torch {name}": dtype for name, dtype in DTYPES.items()},
}
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # operation -> the items that it takes
TAKES |= {"APPEND": 1, "SETITEM": 2, "BINPERSID": 1, "REDUCE": 2, "BUILD": 1}
TAKES |= dict.fromkeys(("TUPLE", "APPENDS", "SETITEMS"))  # None: all since the last mark


def read_archive(path):
    """Return what torch.save wrote to `path`: dicts, lists and tuples of tensors and plain types.

    Raises OSError when it is damaged, or holds anything else. Memory and time are those of the
    file's own size: every tensor is dense, and what it has is there."""
    path = Path(path)
    if not path.is_file():  # a pipe would wait for ever
        raise OSError(f"{path} is not a file")
    with open(path, "rb") as f:
        try:
            with zipfile.ZipFile(f) as archive:
                entries = checked_entries(archive, path.stat().st_size)
                damaged = archive.testzip()  # the first part whose CRC is wrong, or None
                if damaged:
                    raise ValueError(f"the checksum of its part {damaged[:80]!a} is wrong")
                return Machine(archive, entries).run()
        except MALFORMED as error:
            reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
            raise OSError(
                f"{path} is damaged, or holds more than tensors and plain types ({reason})"
            ) from None


def checked_entries(archive, size):
    """Return the parts of a ZipFile of `size` bytes by their names in torch's one folder.

    Raises ValueError for what torch.save does not write: compressed or encrypted parts, two of one
    name, or parts that are larger than the file."""
    infos = archive.infolist()
    if not 1 <= len(infos) <= MAX_ENTRIES:
        raise ValueError(f"it has {len(infos)} parts")
    folder = infos[0].filename.partition("/")[0] + "/"
    entries = {}
    for info in infos:
        name = info.filename.removeprefix(folder)
        is_stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & ~ZIP_FLAGS
        if not is_stored or info.compress_size != info.file_size:
            raise ValueError(f"its part {name[:80]!a} is compressed or encrypted")
        if name in entries or name == info.filename:
            raise ValueError(f"its part {name[:80]!a} is there twice, or out of place")
        entries[name] = info
    if sum(info.file_size for info in infos) > size:
        raise ValueError("its parts are larger than the file")
    return entries


class Machine:
    """Runs the pickle program of an archive, whose operations can make plain types and tensors."""

    def __init__(self, archive, entries):
        self.archive = archive  # a ZipFile
        self.entries = entries  # name -> ZipInfo
        self.storages = {}  # key -> (numel,) tensor
        # what stands in two places, as tied weights do, counts twice: a few bytes that stand in a
        # million would keep all busy that goes through the tree
        storages = (info for name, info in entries.items() if name.startswith("data/"))
        self.bytes_left = 2 * sum(info.file_size for info in storages)  # of tensors
        self.text_left = 2 * entries["data.pkl"].file_size  # characters
        self.operations_left = MAX_OPERATIONS + OPERATIONS_PER_ENTRY * len(entries)

    def run(self):
        """Return what the program makes. Raises one of MALFORMED when it is not a plain tree."""
        info = self.entries["data.pkl"]
        if info.file_size > MAX_PROGRAM + PROGRAM_PER_ENTRY * len(self.entries):
            raise ValueError(f"its pickle has {info.file_size} bytes")
        byteorder = self.entries.get("byteorder")
        if byteorder and self.archive.read(byteorder) != sys.byteorder.encode():
            raise ValueError("it was written on a machine of another byte order")
        result = self.execute(pickletools.genops(self.archive.read(info)))
        self.visits_left = 2 * (MAX_OPERATIONS + OPERATIONS_PER_ENTRY * len(self.entries))
        self.require_plain(result)
        return result

    def execute(self, operations):
        """Return the result of a program: (opcode, argument, position) of each operation."""
        stack = []
        outer = []  # the stacks below each mark
        memo = {}
        for opcode, argument, _ in operations:
            self.operations_left -= 1
            if self.operations_left < 0:
                raise ValueError("its pickle is too long")
            name = opcode.name
            if name in VALUES:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in CONTAINERS:
                stack.append(CONTAINERS[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(GLOBALS[argument])
            elif name == "MARK":
                outer.append(stack)
                stack = []
            elif name == "STOP":
                return stack.pop()
            elif name in TAKES:
                items = stack
                if TAKES[name] is None:
                    stack = outer.pop()
                else:
                    items = [stack.pop() for _ in range(TAKES[name])][::-1]
                self.apply(name, items, stack)
            elif name != "PROTO":
                raise ValueError(f"its pickle has the operation {name}")
        raise ValueError("its pickle has no end")

    def apply(self, name, items, stack):
        """Do what operation `name` does with the items that it took from the stack."""
        if name.startswith("TUPLE"):
            stack.append(tuple(items))
        elif name == "BINPERSID":
            stack.append(self.storage(*unpack(items[0], 5)))
        elif name == "REDUCE" and items[0] is dict:
            stack.append({})
        elif name == "REDUCE" and items[0] is torch.Tensor:
            stack.append(self.tensor(*unpack(items[1], 6)))
        elif name.startswith("APPEND") and type(stack[-1]) is list:
            stack[-1].extend(items)
        elif name.startswith("SETITEM") and type(stack[-1]) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) not in (str, int):  # to hash a deep tuple would crash Python
                    raise ValueError("it has a key that is neither text nor a number")
                stack[-1][key] = value
        elif name != "BUILD":  # of an OrderedDict's attributes none is needed
            raise ValueError(f"its pickle has {name} out of place")

    def storage(self, _, dtype, key, __, numel):
        """Return the (numel,) tensor of all numbers in one part of the archive."""
        info = self.entries.get(f"data/{key}") if type(key) is str else None
        if info is None or type(dtype) is not torch.dtype or type(numel) is not int:
            raise ValueError("it lacks a tensor's numbers")
        if numel * dtype.itemsize != info.file_size:
            raise ValueError(f"its part data/{key} has another size than its pickle says")
        if key not in self.storages:
            storage = torch.empty(info.file_size, dtype=torch.uint8)
            storage.numpy()[:] = np.frombuffer(self.archive.read(info), np.uint8)
            self.storages[key] = storage != 0 if dtype == torch.bool else storage.view(dtype)
        if self.storages[key].dtype != dtype:
            raise ValueError(f"its part data/{key} is of two types")
        return self.storages[key]

    def tensor(self, storage, offset, size, stride, _, __):
        """Return a tensor whose numbers lie in a storage, each in a place of its own."""
        if type(storage) is not torch.Tensor or not all(map(is_shape, ((offset,), size, stride))):
            raise ValueError("it has a tensor of no shape")
        if len(size) != len(stride) or not is_dense(size, stride):
            raise ValueError("it has a tensor whose numbers overlap or have gaps")
        if offset + math.prod(size) > storage.numel():
            raise ValueError("it has a tensor that is larger than what the file holds of it")
        return storage.as_strided(size, stride, offset)

    def require_plain(self, value, depth=0):
        """Raise ValueError unless a value is a tree of plain types: bounded, nothing in itself."""
        self.visits_left -= 1
        if depth > MAX_DEPTH or self.visits_left < 0:
            raise ValueError("its dicts and lists are nested too deeply")
        if type(value) in (dict, list, tuple):
            for key in value if type(value) is dict else ():
                self.require_plain(key, depth + 1)
            for part in value.values() if type(value) is dict else value:
                self.require_plain(part, depth + 1)
        elif type(value) not in PLAIN_TYPES or (type(value) is int and abs(value) >= 2**63):
            raise ValueError("it holds more than tensors and plain types")
        elif type(value) is str:
            self.text_left -= len(value)
        elif type(value) is torch.Tensor:
            self.bytes_left -= value.nbytes
        if min(self.bytes_left, self.text_left) < 0:
            raise ValueError("its tensors or texts are larger than what the file holds of them")


def unpack(value, count):
    """Return a tuple of `count` items. Raises ValueError for anything else."""
    if type(value) is not tuple or len(value) != count:
        raise ValueError("its pickle calls something with the wrong arguments")
    return value


def is_shape(value):
    """Return whether a value is a short tuple of whole numbers that memory could have."""
    if type(value) is not tuple or len(value) > MAX_DIMS:
        return False
    return all(type(n) is int and 0 <= n < 2**40 for n in value)


def is_dense(size, stride):
    """Return whether a tensor's numbers fill a piece of memory, in any order of its dimensions."""
    expected = 1
    for step, n in sorted(zip(stride, size, strict=True)):
        if n != 1 and step != expected:
            return 0 in size  # of nothing at all, any stride is right
        expected *= n
    return True


def content_digest(value):
    """Return the SHA-256 of a tree of tensors and plain types: of names, shapes and bytes, a str.

    The layout of a tensor in memory does not count."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous()
            sha.update(f"{data.dtype} {list(data.shape)}".encode())
            sha.update(data.view(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(f"dict {len(value)}".encode())
            for key, part in value.items():
                add(key)
                add(part)
        elif isinstance(value, (list, tuple)):
            sha.update(f"{len(value)} items".encode())
            for part in value:
                add(part)
        else:
            sha.update(f"{value!a} ".encode())

    add(value)
    return sha.hexdigest()
