"""Digits, MNIST, Fashion-MNIST and CIFAR-10: found on disk or downloaded, checked, read."""

import gzip
import hashlib
import math
import tarfile
import zlib
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch

from ddp.data.dataset import Dataset
from ddp.io.files import atomic_write

ARCHIVE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)  # when it is damaged
CHUNK = 1 << 18  # bytes of a download at a time
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue
# of MNIST's test labels, uncompressed: the cheapest way to tell MNIST from Fashion-MNIST
MNIST_TEST_LABELS_MD5 = "27ae3e4e09519cfbb04c329615203637"


@dataclass(frozen=True)
class Published:
    """All that is known of a dataset that can be downloaded."""

    classes: list  # names, in the order of the labels
    mirrors: tuple  # URLs to which a file's name is appended, in the order in which they are tried
    md5: dict  # name of each file, in the order in which they are read -> MD5
    folders: tuple = ()  # where else within data_dir the files may lie


PUBLISHED = {
    "mnist": Published(
        classes=list("0123456789"),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        folders=("MNIST/raw",),  # where torchvision puts them
    ),
    "fashion_mnist": Published(
        classes=[
            *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ],
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": Published(
        classes=[
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ],
        mirrors=(
            "https://www.cs.toronto.edu/~kriz/",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        ),
        md5={CIFAR_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
}


def load_digits(**_):
    """1,797 real 8x8 digits of 17 gray levels from scikit-learn, split 80/20 within each class."""
    from sklearn.datasets import load_digits as load_bunch
    from sklearn.model_selection import train_test_split

    bunch = load_bunch()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    images = torch.from_numpy(pixels)[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    items = np.arange(len(labels))
    train, test = train_test_split(items, test_size=0.2, stratify=labels, random_state=0)
    return Dataset(
        "digits", images[train], images[test], labels[train], labels[test], list("0123456789")
    )


def load_mnist(
    name,  # "mnist" or "fashion_mnist", which has the same format
    data_dir="data",
    progress=None,  # makes a progress bar as tqdm does
    **_,
):
    """MNIST or Fashion-MNIST from four IDX files; those that are absent are downloaded.

    Raises OSError when they are damaged, do not belong together, or cannot be downloaded."""
    paths = []
    for file in PUBLISHED[name].md5:
        path = find_file(name, (file.removesuffix(".gz"), file), data_dir)
        paths.append(path or download(name, file, Path(data_dir, name), progress))
    train, train_labels, test, test_labels = [read_idx(path) for path in paths]
    check_pair(train, train_labels, paths[1])
    check_pair(test, test_labels, paths[3])
    if train.shape[1:] != test.shape[1:]:
        raise OSError(f"{paths[0]} and {paths[2]} hold images of different sizes")
    header = bytes.fromhex("00000801") + len(test_labels).to_bytes(4, "big")
    file = header + test_labels.numpy().tobytes()
    md5 = hashlib.md5(file, usedforsecurity=False).hexdigest()
    if name != "mnist" and md5 == MNIST_TEST_LABELS_MD5:
        raise OSError(f"{paths[3]} is MNIST's, not {name}'s; use another data_dir for {name}")
    labels = (train_labels.long(), test_labels.long())
    return Dataset(name, train[:, None], test[:, None], *labels, PUBLISHED[name].classes)


def check_pair(images, labels, path):
    """Raise OSError unless images (N, H, W) and labels (N,) belong together; path: the labels'."""
    if images.ndim != 3 or not images.numel() or labels.shape != images.shape[:1]:
        raise OSError(
            f"{path}: labels {tuple(labels.shape)} and images {tuple(images.shape)} do not "
            "belong together; expected (N,) and (N, H, W)"
        )
    if labels.max() > 9:
        raise OSError(f"{path}: a label is {labels.max()}; expected 0 to 9")


def read_idx(path):
    """An IDX file of bytes, plain or .gz, as a uint8 tensor. Raises OSError when it is damaged.

    The format: two zero bytes, the type (8 = uint8), the number of dimensions, each dimension as a
    big-endian uint32, then the items."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except ARCHIVE_ERRORS as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    ndim = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}.get(raw[:4], 0)  # labels, images, unknown
    start = 4 + 4 * ndim  # of the items
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if not ndim or len(raw) != start + math.prod(shape):
        raise OSError(
            f"{path} is not a whole IDX file of images or labels: {len(raw)} bytes, header "
            f"{raw[:16].hex()}; delete it to download it again"
        )
    items = np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(items.copy())  # a copy, because bytes are read-only


def load_cifar10(data_dir="data", progress=None, **_):
    """CIFAR-10 from the published binary archive, without pickle and without unpacking it.

    Raises OSError when it is damaged or cannot be downloaded."""
    path = find_file("cifar10", (CIFAR_ARCHIVE,), data_dir)
    path = path or download("cifar10", CIFAR_ARCHIVE, Path(data_dir, "cifar10"), progress)
    members = read_members(path, (*CIFAR_TRAIN, CIFAR_TEST))
    for name, content in members.items():
        if not content or len(content) % CIFAR_RECORD:
            size = f"{len(content)} bytes"
            raise OSError(f"{path}: member {name} has {size}; expected records of {CIFAR_RECORD}")
    # bytearrays, because bytes are read-only
    train = bytearray().join(members[name] for name in CIFAR_TRAIN)
    test = bytearray(members[CIFAR_TEST])
    train = torch.frombuffer(train, dtype=torch.uint8).reshape(-1, CIFAR_RECORD)  # (N, 3073)
    test = torch.frombuffer(test, dtype=torch.uint8).reshape(-1, CIFAR_RECORD)
    if max(train[:, 0].max(), test[:, 0].max()) > 9:
        raise OSError(f"{path}: a label is above 9; expected 0 to 9")
    images = (train[:, 1:].reshape(-1, 3, 32, 32), test[:, 1:].reshape(-1, 3, 32, 32))
    labels = (train[:, 0].long(), test[:, 0].long())
    return Dataset("cifar10", *images, *labels, PUBLISHED["cifar10"].classes)


def read_members(path, names):
    """Files of a .tar.gz, in any folder: name -> bytes. Raises OSError when it is damaged."""
    members = dict.fromkeys(names, b"")  # what is not there is empty
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in names:
                    members[name] = archive.extractfile(member).read()
            stream.read()  # to the end, where gzip's checksum is
    except ARCHIVE_ERRORS as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    return members


def find_file(name, files, data_dir):
    """The path of the first of `files` that is in data_dir/name, data_dir, ...; None if absent."""
    for folder in (name, ".", *PUBLISHED[name].folders):
        for file in files:
            path = Path(data_dir, folder, file)
            if path.is_file():
                return path
    return None


def download(
    name,  # a key of PUBLISHED
    file,  # one of its files
    folder,  # Path to write it into
    progress=None,  # makes a progress bar as tqdm does
):
    """Download a published file from the first mirror that has it whole, and return its path.

    Only a file with the published MD5 gets its name, so a file that is there is whole. Raises
    OSError with each mirror's reason when none serves."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"data_dir={folder.parent}: {error}; use another folder") from None
    reasons = []
    for mirror in PUBLISHED[name].mirrors:
        write = partial(fetch, mirror + file, PUBLISHED[name].md5[file], progress)
        try:
            return atomic_write(folder / file, write)
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{mirror}: {' '.join(str(error).split())}")
    raise OSError(
        f"could not download {file} ({'; '.join(reasons)}); put it into {folder.resolve()} "
        "yourself, or set data_dir to a folder that holds it"
    )


def fetch(url, expected_md5, progress, path):
    """Write what `url` holds to `path`. Raises ValueError when its MD5 is another."""
    md5 = hashlib.md5(usedforsecurity=False)
    with urlopen(url, timeout=30) as source, open(path, "wb") as f:
        total = int(source.headers.get("Content-Length") or 0) or None
        bar = None
        if progress:
            name = url.rsplit("/", 1)[1]
            bar = progress(total=total, unit="B", unit_scale=True, desc=name)
        try:
            while chunk := source.read(CHUNK):
                md5.update(chunk)
                f.write(chunk)
                if bar is not None:  # a tqdm bar without a total has no truth value
                    bar.update(len(chunk))
        finally:
            if bar is not None:
                bar.close()
    if md5.hexdigest() != expected_md5:
        raise ValueError(f"not the published file (MD5 {md5.hexdigest()})")
