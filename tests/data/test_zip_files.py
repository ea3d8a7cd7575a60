"""Our reading of a .zip against zipfile's."""

import os
import zipfile

import pytest
from data_checks import refused

from ddp.data import zip_files as zip_module
from ddp.data.files import DamagedError
from ddp.data.zip_files import ZipFiles

NAMES = ["b/2.png", "a.png", "a/1.png", "é.png", "b/empty", ".hidden", "c/.thumbs/1.png"]
SEEN = ["a.png", "a/1.png", "b/2.png", "b/empty", "é.png"]


def contents():
    """Name -> bytes, some of which pack well."""
    texts = {name: os.urandom(50) + bytes(5000) for name in NAMES}
    return {**texts, "b/empty": b""}


def write(path, files, compression=zipfile.ZIP_DEFLATED, comment=b"", before=b""):
    path.write_bytes(before)
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.comment = comment
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"of photographs" * 9, bytes(65535)])
@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 99])
@pytest.mark.parametrize("is_large", [False, True])
def test_files_are_those_that_zipfile_reads(
    tmp_path, monkeypatch, compression, comment, before, is_large
):
    if is_large:  # numbers of 64 bits
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    files = contents()
    path = write(tmp_path / "a.zip", files, compression, comment, before)
    with zipfile.ZipFile(path) as archive, ZipFiles(path) as ours:
        assert list(ours) == SEEN
        assert len(ours) == len(SEEN)
        for name in ours:
            assert ours[name].size == archive.getinfo(name).file_size
            assert ours[name].read() == archive.read(name) == files[name]


def test_without_pread_files_are_the_same(tmp_path, monkeypatch):
    files = contents()
    path = write(tmp_path / "a.zip", files)
    monkeypatch.delattr(zip_module.os, "pread", raising=False)
    with ZipFiles(path) as ours:
        assert all(ours[name].read() == files[name] for name in ours)


def test_empty_archive_has_no_files(tmp_path):
    with ZipFiles(write(tmp_path / "a.zip", {})) as ours:
        assert list(ours) == []


def test_more_than_was_declared_is_not_unpacked(tmp_path):
    """A size in the table that is too small is found out after that many bytes."""
    path = write(tmp_path / "a.zip", {"a.png": bytes(100_000)})
    content = bytearray(path.read_bytes())
    table = content.index(b"PK\1\2")
    content[table + 24 : table + 28] = (500).to_bytes(4, "little")
    path.write_bytes(content)
    with ZipFiles(path) as ours, pytest.raises(DamagedError, match="size is wrong"):
        ours["a.png"].read()


@pytest.mark.parametrize("cut", [1, 21, 22, 23, 60])
def test_archive_that_is_cut_short_is_refused(tmp_path, cut):
    path = write(tmp_path / "a.zip", contents())
    os.truncate(path, path.stat().st_size - cut)
    refused(OSError, "not a whole .zip", ZipFiles, path)
