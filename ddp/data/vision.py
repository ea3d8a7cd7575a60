"""Digits, MNIST, Fashion-MNIST and CIFAR-10: found on disk or downloaded, checked, read."""

import gzip
import hashlib
import math
import tarfile
import zlib
from contextlib import closing
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from tqdm import tqdm

from ddp.data.dataset import Dataset
from ddp.io.files import atomic_write

ARCHIVE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)  # when it is damaged
DIGITS = list("0123456789")
FASHION_CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR_CLASSES += ["dog", "frog", "horse", "ship", "truck"]
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_MEMBERS = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue
MNIST_TEST_LABELS_MD5 = "073c3904dfbd3e141ff8aa01cfde6b15"  # tells MNIST from Fashion-MNIST

PUBLISHED = {  # URLs lack the name of a file; files are in the order in which they are read
    "mnist": {
        "classes": DIGITS,
        "mirrors": (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        "md5": {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    },
    "fashion_mnist": {
        "classes": FASHION_CLASSES,
        "mirrors": (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        "md5": {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    },
    "cifar10": {
        "classes": CIFAR_CLASSES,
        "mirrors": (
            "https://www.cs.toronto.edu/~kriz/",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        ),
        "md5": {CIFAR_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"},
    },
}


def load_digits(**_):
    """1,797 real 8x8 digits of 17 gray levels from scikit-learn, split 80/20 within each class."""
    from sklearn.datasets import load_digits as load_bunch
    from sklearn.model_selection import train_test_split

    bunch = load_bunch()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().byte()[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).long()
    items = np.arange(len(labels))
    train, test = train_test_split(items, test_size=0.2, stratify=labels, random_state=0)
    return Dataset("digits", images[train], images[test], labels[train], labels[test], DIGITS)


def load_mnist(name, data_dir="data", progress=None, **_):
    """MNIST or Fashion-MNIST from four IDX files; those that are absent are downloaded."""
    paths = [find_or_download(name, file, data_dir, progress) for file in PUBLISHED[name]["md5"]]
    train, train_labels, test, test_labels = [read_idx(path) for path in paths]
    for images, labels, path in ((train, train_labels, paths[1]), (test, test_labels, paths[3])):
        if images.ndim != 3 or not images.numel() or labels.shape != images.shape[:1]:
            shapes = f"{tuple(labels.shape)} and {tuple(images.shape)}, not (N,) and (N, H, W)"
            raise OSError(f"{path}: labels and images do not belong together: {shapes}")
        if labels.max() > 9:
            raise OSError(f"{path}: a label is {labels.max()}; expected 0 to 9")
    if train.shape[1:] != test.shape[1:]:
        raise OSError(f"{paths[0]} and {paths[2]} hold images of different sizes")
    md5 = hashlib.md5(test_labels.numpy(), usedforsecurity=False).hexdigest()
    if name != "mnist" and md5 == MNIST_TEST_LABELS_MD5:
        raise OSError(f"{paths[3]} is MNIST's, not {name}'s; use another data_dir for {name}")
    labels = (train_labels.long(), test_labels.long())
    return Dataset(name, train[:, None], test[:, None], *labels, PUBLISHED[name]["classes"])


def read_idx(path):
    """An IDX file of bytes, plain or .gz, as a uint8 tensor. Raises OSError when it is damaged."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except ARCHIVE_ERRORS as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    # the header: two zero bytes, 8 for uint8, the number of dimensions, each as big-endian uint32
    ndim = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}.get(raw[:4], 0)  # labels, images, unknown
    start = 4 + 4 * ndim  # of the items
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if not ndim or len(raw) != start + math.prod(shape):
        raise OSError(f"{path} is damaged ({len(raw)} bytes); delete it to download it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def load_cifar10(data_dir="data", progress=None, **_):
    """CIFAR-10 from the published binary archive, without pickle and without unpacking it."""
    path = find_or_download("cifar10", CIFAR_ARCHIVE, data_dir, progress)
    members = dict.fromkeys(CIFAR_MEMBERS, b"")  # what is not there is empty
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in members:
                    members[name] = archive.extractfile(member).read()
            stream.read()  # to the end, where gzip's checksum is
    except ARCHIVE_ERRORS as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    for name, content in members.items():
        if not content or len(content) % CIFAR_RECORD:
            raise OSError(f"{path}: {name} has {len(content)} bytes, not records of {CIFAR_RECORD}")
    content = bytearray().join(members.values())  # a bytearray, because bytes are read-only
    records = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, CIFAR_RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise OSError(f"{path}: a label is above 9; expected 0 to 9")
    n = len(records) - len(members[CIFAR_MEMBERS[-1]]) // CIFAR_RECORD  # training items
    return Dataset("cifar10", images[:n], images[n:], labels[:n], labels[n:], CIFAR_CLASSES)


def find_or_download(name, file, data_dir, progress):
    """The path of a file of PUBLISHED[name] in data_dir, downloaded when it is not there."""
    for folder in (name, ".", "MNIST/raw" if name == "mnist" else "."):  # the last: torchvision's
        for candidate in (file.replace("ubyte.gz", "ubyte"), file):
            path = Path(data_dir, folder, candidate)
            if path.is_file():
                return path
    folder = Path(data_dir, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"data_dir={data_dir}: {error}; use another folder") from None
    reasons = ""
    for mirror in PUBLISHED[name]["mirrors"]:
        write = partial(fetch, mirror + file, PUBLISHED[name]["md5"][file], progress)
        try:
            return atomic_write(folder / file, write)  # a file that is there is whole
        except (OSError, HTTPException, ValueError) as error:
            reasons += f"; {mirror}: {' '.join(str(error).split())}"
    raise OSError(f"data_dir={data_dir}: cannot download {file}{reasons}; put it into {folder}")


def fetch(url, expected_md5, progress, path):
    """Write what `url` holds to `path`. Raises ValueError when its MD5 is another."""
    progress = progress or partial(tqdm, disable=True)
    with urlopen(url, timeout=30) as source, open(path, "wb") as f:
        total = int(source.headers.get("Content-Length") or 0) or None  # bytes
        name = url.rsplit("/", 1)[1]
        with closing(progress(total=total, unit="B", unit_scale=True, desc=name)) as bar:
            while chunk := source.read(1 << 18):
                f.write(chunk)
                bar.update(len(chunk))
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if md5 != expected_md5:
        raise ValueError(f"not the published file (MD5 {md5})")
