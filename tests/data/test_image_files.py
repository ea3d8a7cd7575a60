"""Files of a folder or an archive: links, devices, errors of the disk, and bombs."""

import errno
import os
import struct
import zipfile

import numpy as np
import pytest
from data_checks import gray, noise, refused, save, save_all, zip_of

from ddp.data import files as files_module
from ddp.data import load_dataset
from ddp.data.files import counted, open_archive, printable
from ddp.data.folder import read_images
from ddp.data.npy import read_array
from ddp.data.zip_files import ZipFiles

# ---- folders ----


def test_class_folders_that_are_links_are_followed(tmp_path):
    save_all(tmp_path, [f"{c}/{i}.png" for c in ("data/cat", "elsewhere/dog") for i in range(5)])
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "data" / "cat" / "9.png").symlink_to(tmp_path / "elsewhere" / "dog" / "0.png")
    dataset = load_dataset(str(tmp_path / "data"))
    assert dataset.classes == ["cat", "dog"]
    assert len(dataset.train) + len(dataset.test) == 11


def test_link_to_a_folder_above_ends(tmp_path):
    save_all(tmp_path, ["cat/a.png", "dog/a.png"])
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "dog" / "self").symlink_to("self")
    images = read_images(tmp_path)
    assert images.classes == ["cat", "dog"]
    assert "skipped cat/loop: a link to a folder that it lies in" in images.summary
    assert any("skipped dog/self: a link that leads nowhere" in line for line in images.summary)


def test_links_that_lead_nowhere_are_said(tmp_path):
    save_all(tmp_path, ["cat/a.png", "dog/a.png"])
    (tmp_path / "owl").symlink_to(tmp_path / "unmounted")
    (tmp_path / "dog" / "b.png").symlink_to(tmp_path / "deleted.png")
    lines = read_images(tmp_path).summary
    assert sum("a link that leads nowhere (No such file" in line for line in lines) == 2


def test_what_is_neither_a_file_nor_a_folder_is_not_opened(tmp_path):
    """To read a pipe is to wait for ever."""
    save_all(tmp_path, ["a.png", "b.png"])
    os.mkfifo(tmp_path / "c.png")
    os.mkfifo(tmp_path / "d.npy")
    assert "skipped c.png: neither a file nor a folder" in read_images(tmp_path).summary
    refused(OSError, "c.png", read_images, tmp_path / "c.png")
    refused(OSError, "d.npy", read_array, tmp_path / "d.npy")


def failing(monkeypatch, at, code=errno.EIO):
    """From now on an error of the disk ends what opens a path that ends like this."""
    real = open

    def broken(path, *args, **kwargs):
        if str(path).endswith(at):
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(files_module, "open", broken, raising=False)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE])
def test_error_of_the_disk_is_no_damaged_image(tmp_path, monkeypatch, code):
    save_all(tmp_path, [f"{i}.png" for i in range(5)])
    failing(monkeypatch, "3.png", code)
    message = refused(OSError, "cannot be read", read_images, tmp_path)
    assert str(tmp_path / "3.png") in message
    assert os.strerror(code) in message


def test_error_of_the_disk_within_an_archive_is_no_damaged_image(tmp_path, monkeypatch):
    save_all(tmp_path / "a", [f"{i}.png" for i in range(5)])
    path = zip_of(tmp_path / "a")

    def broken(self, *args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ZipFiles, "read_at", broken)
    assert f"{path}, 0.png" in refused(OSError, "Input/output", read_images, path)


def test_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    save_all(tmp_path, ["cat/a.png", "dog/a.png"])
    real = os.scandir

    def broken(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", broken)
    refused(OSError, "dog cannot be read: Permission denied", read_images, tmp_path)


def test_lack_of_memory_is_no_damaged_image(tmp_path, monkeypatch):
    save_all(tmp_path, ["a.png", "b.png"])

    def hungry(*args):
        raise MemoryError

    monkeypatch.setattr("ddp.data.decode.open_image", hungry)
    refused(ValueError, r"a\.png takes more memory", read_images, tmp_path)


# ---- archives ----


def test_archive_that_unpacks_to_too_much_is_refused_before_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_UNPACKED_BYTES", 10_000)
    save(tmp_path / "a" / "good.png", noise(8, 8))
    for i in range(20):
        (tmp_path / "a" / f"{i}.png").write_bytes(bytes(100_000))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "a").iterdir():
            archive.write(path, path.name)
    np.savez_compressed(tmp_path / "b.npz", images=np.zeros((100, 100, 100), np.uint8))

    def opened(*args):
        pytest.fail("it is read")

    monkeypatch.setattr(zipfile.ZipFile, "open", opened)
    monkeypatch.setattr(ZipFiles, "read", opened)
    refused(OSError, "would unpack from", read_images, tmp_path / "a.zip")
    refused(OSError, "would unpack from", read_array, tmp_path / "b.npz")


def test_archive_with_a_flipped_bit_is_refused_or_harmless(tmp_path):
    """No bit of an archive makes anything but an OSError of one line."""
    save_all(tmp_path / "a", ["cat/a.png", "dog/b.png"])
    paths = [zip_of(tmp_path / "a"), tmp_path / "b.npz"]
    np.savez_compressed(paths[1], images=np.arange(64, dtype=np.uint8).reshape(4, 4, 4))
    messages = []
    for path, function in zip(paths, (read_images, read_array), strict=True):
        whole = path.read_bytes()
        random = np.random.RandomState(0)
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << random.randint(8)
            path.write_bytes(changed)
            try:
                function(path)
            except OSError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (8, struct.pack("<H", 1), "encrypted"),
        (10, struct.pack("<H", 14), "compression, number 14"),
        (10, struct.pack("<H", 12), "compression, number 12"),
        (10, struct.pack("<H", 255), "compression, number 255"),
        (42, struct.pack("<I", 0x7FFFFFFF), "outside of the archive"),
    ],
)
def test_file_of_an_archive_that_cannot_be_read_is_skipped(tmp_path, offset, value, match):
    save_all(tmp_path / "a", ["a.png", "b.png"])
    path = zip_of(tmp_path / "a")
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\1\2")
    content[central + offset : central + offset + len(value)] = value
    path.write_bytes(content)
    images = read_images(path)
    assert len(images.items) == 1
    assert any(line.startswith("skipped a.png: ") and match in line for line in images.summary)


def test_archive_may_be_of_many_folders_and_names(tmp_path):
    save_all(tmp_path / "a", ["x/y/a.png", "x/b.png"])
    with open_archive(zip_of(tmp_path / "a")) as files:
        assert sorted(files) == ["x/b.png", "x/y/a.png"]
        assert files["x/b.png"].read() == (tmp_path / "a" / "x" / "b.png").read_bytes()


# ---- text ----


def test_text_is_safe_to_print_and_short():
    assert printable("a\x1b[2Jb\nc\N{RIGHT-TO-LEFT OVERRIDE}") == "a\\x1b[2Jb\\nc\\u202e"
    assert printable("é") == "é"
    assert len(printable("x" * 10_000)) == 120
    assert len(printable("x" * 10_000, 30)) == 30


def test_counts_have_their_plural():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == [
        *("0 images", "1 image", "2 images", "1,000 images"),
    ]


def test_image_above_the_limit_is_not_read(tmp_path, monkeypatch):
    save(tmp_path / "a.png", gray(5))
    save(tmp_path / "b.png", noise(50, 50))
    monkeypatch.setattr("ddp.data.decode.MAX_FILE_BYTES", 1000)
    images = read_images(tmp_path)
    assert len(images.items) == 1
    assert "skipped b.png: above 1,000 bytes" in images.summary
