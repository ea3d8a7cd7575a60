"""Archives: what torch.save writes is read as it is; all else is refused at once, in one line."""

import io
import os
import pickle
import random
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from ddp.io.archive import DTYPES, content_digest, read_archive

STATE = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10, "n": [1, "two", (3.5, None)]}


def parts_of(value):
    """Return the parts of the zip that torch.save makes of a value: name -> bytes."""
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write_parts(path, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def write_program(path, program, value=STATE):
    """Write what torch.save makes of a value, but for its pickle program."""
    return write_parts(path, parts_of(value) | {"archive/data.pkl": program})


def same(a, b):
    """Return whether two values are equal: types, order of names, layout of tensors, too."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    state = {
        "dtypes": [torch.ones(3).to(dtype) for dtype in DTYPES.values()],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "slice": torch.arange(9.0)[2:5],
        "scalar": torch.tensor(7),
        "nothing": torch.empty(0, 3),
        "plain": [
            1,
            -1,
            2**16,
            -(2**40),
            2**62,
            True,
            False,
            None,
            1e-300,
            "é\udcff",
            (1, [2]),
            (),
        ],
        3: {"x" * 300: 4},
    }
    torch.save(state, tmp_path / "a.pth")
    assert same(read_archive(tmp_path / "a.pth"), state)
    assert same(read_archive(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True))
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(network.state_dict(), tmp_path / "a.pth")  # an OrderedDict, with attributes
    assert same(read_archive(tmp_path / "a.pth"), dict(network.state_dict()))


def test_weights_that_share_numbers_are_read(tmp_path):
    weight = torch.randn(4, 4)
    torch.save({"embedding": weight, "output": weight.T}, tmp_path / "a.pth")
    read = read_archive(tmp_path / "a.pth")
    assert same(read, {"embedding": weight, "output": weight.T})
    torch.save([weight.view(-1) for _ in range(1000)], tmp_path / "a.pth")  # 64 bytes, 1000 times
    with pytest.raises(OSError, match="larger than what the file holds"):
        read_archive(tmp_path / "a.pth")


# ---- the zip ----


def test_compressed_parts_are_refused(tmp_path):
    """They may grow without limit as they are read."""
    parts = parts_of({"a": torch.zeros(10**6)})
    path = write_parts(tmp_path / "a.pth", parts, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(OSError, match="compressed"):
        read_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_part_that_is_there_twice_is_refused(tmp_path):
    path = write_parts(tmp_path / "a.pth", parts_of(STATE))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(OSError, match="twice"):
        read_archive(path)


@pytest.mark.parametrize("name", ["data/0", "other/data/0", "archive", "/etc/passwd", "é\n"])
def test_a_part_out_of_place_is_refused(tmp_path, name):
    path = write_parts(tmp_path / "a.pth", parts_of(STATE) | {name: b"x"})
    with pytest.raises(OSError, match="out of place") as error:
        read_archive(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/1"])
def test_a_part_that_is_missing_is_named(tmp_path, name):
    parts = parts_of(STATE)
    del parts[name]
    with pytest.raises(OSError, match=r"a\.pth is damaged"):
        read_archive(write_parts(tmp_path / "a.pth", parts))


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    path = write_parts(tmp_path / "a.pth", parts_of(STATE) | {"archive/byteorder": other})
    with pytest.raises(OSError, match="byte order"):
        read_archive(path)


def test_too_many_parts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp.io.archive.MAX_ENTRIES", 20)
    torch.save([torch.zeros(1) for _ in range(20)], tmp_path / "a.pth")
    with pytest.raises(OSError, match="26 parts"):
        read_archive(tmp_path / "a.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(OSError, match="not a file"):
        read_archive(tmp_path / "a.pth")


# ---- the pickle program ----

PROTO, END = b"\x80\x02", b"."
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
DEEP = b")" + b"\x85" * 10**5  # ((((...)))): to hash it overflows C's stack


def doubled(times):
    """A list that holds twice a list that holds twice ..., 2^times lists in all."""
    program = b"]q\x00"
    for _ in range(times):
        program += b"]q\x01h\x00ah\x00ah\x01q\x00"
    return program


PROGRAMS = {
    "a deep key": b"}" + DEEP + b"K\x01s",
    "deep": DEEP,
    "deep lists": b"]" * 10**5 + b"a" * (10**5 - 1),
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x00K\x01h\x00s",
    "doubled": doubled(40),
    "a far memo": b"Kr\xff\xff\xff\xff",
    "a far memo again": b"K\x01r\xff\xff\xff\xff0",
    "long": b"}" * 101_000,
    "a number of 600 digits": b"\x8a\xff" + b"\x7f" * 255,
    "text that is not there": b"X\xff\xff\xff\xffabc",
    "bytes": b"C\x01a",
    "a set": b"\x8f",
    "a call of print": b"cbuiltins\nprint\n)R",
    "a call of getattr": b"c__builtin__\ngetattr\n)R",
    "a name of torch": b"ctorch\nFloatStorage\n",
    "a call of a dtype": b"ctorch\nFloatStorage\n)R",
    "a tensor of nothing": TENSOR + b")R",
    "a tensor of text": TENSOR + b"(X\x01\x00\x00\x00aK\x00K\x01\x85K\x01\x85\x89NtR",
    "a storage of text": b"X\x05\x00\x00\x00abcdeQ",
    "a storage of nothing": b"(NNNNNtQ",
    "an empty stack": b"a",
    "no mark": b"K\x01t",
    "no end": b"",
    "append to a dict": b"}K\x01a",
    "set an item of a list": b"]K\x01K\x01s",
    "half an item": b"}(K\x01u",
    "an object": b"ccollections\nOrderedDict\n)\x81",
    "reduce a list": b"]]R",
    "another protocol": b"\x80\x05\x95\x00\x00\x00\x00\x00\x00\x00\x00K\x01\x94",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_torch_would_not_write_is_refused(tmp_path, name):
    program = PROTO + PROGRAMS[name] + (b"" if name == "no end" else END)
    with pytest.raises(OSError, match=r"a\.pth is damaged") as error:
        read_archive(write_program(tmp_path / "a.pth", program))
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_a_program_is_short_for_its_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp.io.archive.MAX_PROGRAM", 100)
    path = write_parts(tmp_path / "a.pth", parts_of({"x" * 10_000: 1}))
    with pytest.raises(OSError, match="its pickle has 10"):
        read_archive(path)


def test_attributes_of_a_dict_are_not_set(tmp_path):
    """`items` could be one."""
    program = PROTO + b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb" + END
    assert read_archive(write_program(tmp_path / "a.pth", program)) == {}


# ---- tensors ----


def tensor_program(numel=4, key="0", kind=b"FloatStorage", offset=0, size=(4,), stride=(1,)):
    """Return the program of one tensor of the parts of STATE, fields given as anything."""
    fields = [pickle.dumps(field, 2)[2:-1] for field in (key, numel, offset, size, stride)]
    key, numel, offset, size, stride = fields
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + key + b"X\x03\x00\x00\x00cpu"
    storage += numel + b"tQ"
    return PROTO + TENSOR + b"(" + storage + offset + size + stride + b"\x89NtR" + END


def test_the_tensor_of_a_program_is_read(tmp_path):
    path = write_program(tmp_path / "a.pth", tensor_program(key="1", size=(2, 2), stride=(1, 2)))
    assert same(read_archive(path), torch.tensor([[10.0, 12.0], [11.0, 13.0]]).T.contiguous().T)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (10**9,), "stride": (0,)},  # expanded
        {"size": (2, 4), "stride": (0, 1)},
        {"size": (2, 3), "stride": (1, 1)},  # overlapping
        {"size": (2,), "stride": (2,)},  # with a gap
        {"size": (5,)},
        {"size": (2**41,)},
        {"size": (2**39, 2**39), "stride": (2**39, 1)},
        {"size": (-4,)},
        {"size": (4,), "stride": (-1,)},
        {"size": (4.0,)},
        {"size": (True,)},
        {"size": [4]},
        {"size": 4},
        {"size": (1,) * 9, "stride": (1,) * 9},
        {"size": (4,), "stride": (1, 1)},
        {"offset": 1},
        {"offset": -1},
        {"offset": None},
        {"numel": 2**40},
        {"numel": 3},
        {"numel": -4},
        {"numel": 4.0},
        {"key": "2"},
        {"key": "../data.pkl"},
        {"key": 0},
        {"kind": b"DoubleStorage"},
        {"kind": b"ComplexFloatStorage"},
        {"kind": b"UntypedStorage"},
    ],
)
def test_a_tensor_of_which_the_file_holds_less_is_refused(tmp_path, fields):
    with pytest.raises(OSError, match=r"a\.pth is damaged"):
        read_archive(write_program(tmp_path / "a.pth", tensor_program(**fields)))


def test_a_storage_has_one_type(tmp_path):
    whole, other = tensor_program(), tensor_program(kind=b"IntStorage")
    program = PROTO + whole[2:-1] + other[2:-1] + b"\x86" + END
    with pytest.raises(OSError, match="of two types"):
        read_archive(write_program(tmp_path / "a.pth", program))


@pytest.mark.parametrize("what", ["text", "key", "tensor"])
def test_what_stands_in_many_places_counts_in_each(tmp_path, what):
    """Its digest would be taken in each, for hours."""
    text = b"X\x10\x27\x00\x00" + b"x" * 10_000
    again = b"h\x07" * 1000
    programs = {
        "text": b"](" + text + b"q\x07" + again + b"e",
        "key": b"](" + text + b"q\x07" + b"}h\x07K\x01s" * 1000 + b"e",
        "tensor": b"](" + tensor_program()[2:-1] + b"q\x07" + again + b"e",
    }
    path = write_program(tmp_path / "a.pth", PROTO + programs[what] + END)
    with pytest.raises(OSError, match="larger than what the file holds"):
        read_archive(path)


# ---- whatever the bytes are ----


def assert_read_or_refused(path):
    """Nothing but an OSError of one line may come out."""
    line = str(path)
    try:
        read_archive(path)
    except OSError as error:
        line = str(error)
    assert str(path) in line
    assert "\n" not in line


def test_any_damaged_file_is_refused_or_read(tmp_path):
    rng = random.Random(0)
    path = write_parts(tmp_path / "a.pth", parts_of(STATE))
    whole = path.read_bytes()
    directory = struct.unpack("<I", whole[-6:-2])[0]  # where the names and sizes stand
    for trial in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(directory if trial % 2 else 0, len(data))
            data[place] = rng.choice([0, 1, 0xFF, data[place] ^ 1 << rng.randrange(8)])
        if trial % 5 == 0:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        assert_read_or_refused(path)


def test_any_program_is_refused_or_read(tmp_path):
    """Unlike a damaged file it has a right checksum."""
    rng = random.Random(0)
    parts = parts_of(STATE)
    program = parts["archive/data.pkl"]
    operations = b"()]}NQRabceghjkloqrstu.012\x85\x86\x87\x88\x89\x8a\x8b\x80\x81\x93\x94"
    for trial in range(300):
        data = bytearray(program)
        for _ in range(rng.choice([1, 2, 4])):
            place = rng.randrange(len(data))
            if trial % 3 == 0:
                data[place:place] = bytes([rng.choice(operations)])
            elif trial % 3 == 1:
                data[place] = rng.choice(operations)
            else:
                data[place] = rng.randrange(256)
        write_parts(tmp_path / "a.pth", parts | {"archive/data.pkl": bytes(data)})
        assert_read_or_refused(tmp_path / "a.pth")


# ---- the digest ----


def test_the_digest_is_of_names_shapes_and_bytes_not_of_layout():
    state = {"a": torch.arange(6.0).reshape(2, 3), "n": [1, "x", (2.5, None)]}
    digest = content_digest(state)
    column_major = state["a"].T.contiguous().T
    assert column_major.stride() != state["a"].stride()
    assert content_digest({"a": column_major, "n": [1, "x", (2.5, None)]}) == digest
    assert len(digest) == 64
    others = [
        {"b": state["a"], "n": state["n"]},
        state | {"a": state["a"].reshape(3, 2)},
        state | {"a": state["a"].int()},
        state | {"a": state["a"] + torch.eye(2, 3)},
        state | {"n": [1, "x", (2.5, "None")]},
        state | {"n": [1, "x", 2.5, None]},
        state | {"n": [1.0, "x", (2.5, None)]},
        state | {"n": [True, "x", (2.5, None)]},
        {"n": state["n"], "a": state["a"]},
    ]
    assert len({digest, *map(content_digest, others)}) == 1 + len(others)


def test_numbers_of_numpy_are_refused(tmp_path):
    torch.save({"best": np.float64(1.5)}, tmp_path / "a.pth")
    with pytest.raises(OSError, match=r"a\.pth is damaged"):
        read_archive(tmp_path / "a.pth")
