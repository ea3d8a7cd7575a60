"""Digits, MNIST, Fashion-MNIST and CIFAR-10: found on disk or downloaded, checked, read."""

import gzip
import hashlib
import math
import queue
import threading
import time
import zlib
from contextlib import closing
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from tqdm import tqdm

from ddp.data.dataset import Dataset, hold_out_val
from ddp.data.files import named_errors, printable
from ddp.io.files import atomic_write

GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)  # when it is damaged
MAX_BYTES = 1 << 28  # of a download, and of what a file unpacks to; CIFAR-10 has 184 million
TOO_LONG = "it is longer than {:,} bytes"
CHUNK_BYTES = 1 << 18
PATIENCE = 60  # seconds in which a mirror sends at least MIN_BYTES_PER_SECOND
MIN_BYTES_PER_SECOND = 1000
DIGITS = list("0123456789")
FASHION_CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR_CLASSES += ["dog", "frog", "horse", "ship", "truck"]
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_MEMBERS = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue
TAR_BLOCK = 512  # bytes: a header, or a part of a file
MNIST_TEST_LABELS_MD5 = "073c3904dfbd3e141ff8aa01cfde6b15"  # tells MNIST from Fashion-MNIST

PUBLISHED = {  # URLs lack the name of a file; files are in the order in which they are read
    "mnist": {
        "classes": DIGITS,
        "torchvision": "MNIST/raw",  # where that puts the files
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
        "torchvision": "FashionMNIST/raw",
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
    summary = []
    if name == "mnist" and len(test_labels) == 10_000 and md5 != MNIST_TEST_LABELS_MD5:
        summary = [f"{paths[3]} holds as many labels as MNIST, but others"]  # Fashion-MNIST's, say
    labels = (train_labels.long(), test_labels.long())
    classes = PUBLISHED[name]["classes"]
    dataset = Dataset(name, train[:, None], test[:, None], *labels, classes, summary)
    return hold_out_val(dataset)


def read_idx(path):
    """An IDX file of bytes, plain or .gz, as a uint8 tensor. Raises OSError when it is damaged."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with named_errors(path), opener(path, "rb") as stream:
            # the header: two zero bytes, 8 for uint8, the number of dimensions, each as uint32
            ndim = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}.get(stream.read(4), 0)
            header = stream.read(4 * ndim)  # big-endian
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(0, 4 * ndim, 4)]
            size = math.prod(shape)
            is_whole = ndim and len(header) == 4 * ndim and size <= MAX_BYTES
            content = stream.read(size + 1) if is_whole else b""  # one byte more is one too many
    except GZIP_ERRORS as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    if not is_whole or len(content) != size:
        what = f"it declares {shape} bytes" if ndim else "it is no IDX file of bytes"
        raise OSError(f"{path} is damaged ({what}); delete it to download it again")
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8).reshape(shape))


def load_cifar10(data_dir="data", progress=None, **_):
    """CIFAR-10 from the published binary archive, without pickle and without unpacking it."""
    path = find_or_download("cifar10", CIFAR_ARCHIVE, data_dir, progress)
    try:
        with named_errors(path), gzip.open(path) as stream:
            members = read_tar(stream, CIFAR_MEMBERS)
    except (*GZIP_ERRORS, ValueError) as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    parts = []
    for name in CIFAR_MEMBERS:
        content = members.pop(name, b"")
        if not content or len(content) % CIFAR_RECORD:
            raise OSError(f"{path}: {name} has {len(content)} bytes, not records of {CIFAR_RECORD}")
        parts.append(torch.frombuffer(content, dtype=torch.uint8).reshape(-1, CIFAR_RECORD))
    labels = torch.cat([part[:, 0] for part in parts]).long()
    if labels.max() > 9:
        raise OSError(f"{path}: a label is above 9; expected 0 to 9")
    n = len(labels) - len(parts[-1])  # training items
    train = torch.cat([part[:, 1:] for part in parts[:-1]]).reshape(-1, 3, 32, 32)
    test = parts[-1][:, 1:].reshape(-1, 3, 32, 32).contiguous()
    del parts
    return hold_out_val(Dataset("cifar10", train, test, labels[:n], labels[n:], CIFAR_CLASSES))


def read_tar(stream, names):
    """A dict of the plain files of these names in a .tar, each a bytearray.

    Reads to the end, where gzip's checksum is. Raises ValueError when it is damaged or above
    MAX_BYTES: links, sparse files and all else that a .tar may hold are passed over."""
    found = {}
    total = 0
    while header := stream.read(TAR_BLOCK):
        total += TAR_BLOCK
        if total > MAX_BYTES:
            raise ValueError(TOO_LONG.format(MAX_BYTES))
        if not header.strip(b"\0"):  # the end, and what pads it
            continue
        # a name to byte 100, the size as octal digits from 124, a checksum, the kind at 156
        checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        if len(header) < TAR_BLOCK or checksum != to_octal(header[148:156]):
            raise ValueError("a header is not whole")
        size = to_octal(header[124:136])
        name = header[:100].rstrip(b"\0").decode("latin1").rsplit("/", 1)[-1]
        padded = -(-size // TAR_BLOCK) * TAR_BLOCK
        total += padded
        if total > MAX_BYTES:
            raise ValueError(TOO_LONG.format(MAX_BYTES))
        content = stream.read(padded)
        if len(content) < padded:
            raise ValueError(f"{printable(name)} is cut short")
        if header[156:157] in b"0\0" and name in names:
            found[name] = bytearray(content[:size])
    return found


def to_octal(field):
    """The number of a field of a .tar's header. Raises ValueError when it is none."""
    digits = field.strip(b" \0")
    if not digits.isdigit():  # a sign, or the binary form for files above 8 GB
        raise ValueError("a header holds no number")
    return int(digits, 8)


def find_or_download(name, file, data_dir, progress):
    """The path of a file of PUBLISHED[name] in data_dir, downloaded when it is not there."""
    for folder in (name, ".", PUBLISHED[name].get("torchvision", ".")):
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
            reasons += f"; {mirror}: {printable(' '.join(str(error).split()))}"
    raise OSError(f"data_dir={data_dir}: cannot download {file}{reasons}; put it into {folder}")


def fetch(
    url,
    expected,  # the digest of what it holds, in hexadecimal digits; None: any
    progress,  # see ddp.data.load_dataset
    path,
    algorithm="md5",  # of the digest
    most=None,  # bytes; default: MAX_BYTES
):
    """Write what `url` holds to `path`.

    Raises ValueError when it is another file, cut short, or longer than `most`."""
    most = most or MAX_BYTES
    progress = progress or partial(tqdm, disable=True)
    name = url.rsplit("/", 1)[1]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    received = 0
    with closing(stream_chunks(url)) as chunks, open(path, "wb") as f:
        total = next(chunks)
        with closing(progress(total=total, unit="B", unit_scale=True, desc=name)) as bar:
            for chunk in chunks:
                received += len(chunk)
                if max(received, total or 0) > most:
                    raise ValueError(TOO_LONG.format(most))
                f.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    if expected not in (None, digest.hexdigest()):
        what = f"{algorithm.upper()} {digest.hexdigest()}"
        raise ValueError(f"not the published file ({what})")
    if received != (total or received):
        raise ValueError(f"it ended after {received:,} of {total:,} bytes")


def stream_chunks(url):
    """Yield the length of what `url` holds, in bytes or None, then its bytes, chunk by chunk.

    A thread does the waiting, since a mirror that sends a byte now and then, of the answer's head
    or of its body, runs into no timeout of a socket. Raises TimeoutError when it is too slow."""
    arrived = queue.SimpleQueue()  # what takes them stops where it is too long
    stopped = threading.Event()

    def pull():
        try:
            with urlopen(url, timeout=PATIENCE / 2) as source:
                arrived.put(int(source.headers.get("Content-Length") or 0) or None)
                while (chunk := source.read1(CHUNK_BYTES)) and not stopped.is_set():
                    arrived.put(chunk)
            arrived.put(b"")
        except BaseException as error:  # whatever it is, it is the main thread's
            arrived.put(error)

    def take():
        try:
            item = arrived.get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"nothing came for {PATIENCE} seconds") from None
        if isinstance(item, BaseException):
            raise item
        return item

    threading.Thread(target=pull, daemon=True).start()
    try:
        yield take()
        since, count = time.monotonic(), 0  # bytes since then
        while chunk := take():
            yield chunk
            count += len(chunk)
            if time.monotonic() - since > PATIENCE:
                if count < PATIENCE * MIN_BYTES_PER_SECOND:
                    raise TimeoutError(f"it sends less than {MIN_BYTES_PER_SECOND} bytes a second")
                since, count = time.monotonic(), 0
    finally:
        stopped.set()
