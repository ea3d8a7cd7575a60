"""Datasets by name, and batches as a pure function of (seed, step).

Pictures live in memory as uint8 (N, C, H, W) and travel as float32 in [-1, 1]; points live and
travel as float32 (N, 2), standardised. Every dataset has a fixed train and test split.
"""

import dataclasses
import functools
import gzip
import hashlib
import http.client
import math
import os
import tarfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch

from ddp import pictures

MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
    ),
}
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
MD5 = {  # of the published files
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "cifar10": {CIFAR_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"},
}
# of MNIST's test labels, uncompressed: no other file tells the two MNISTs apart as cheaply
MNIST_TEST_LABELS_MD5 = "27ae3e4e09519cfbb04c329615203637"
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)  # what a bad archive raises
CLASSES = {
    "digits": [str(i) for i in range(10)],
    "mnist": [str(i) for i in range(10)],
    "fashion_mnist": [
        *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
    "cifar10": [
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ],
}


@dataclasses.dataclass
class Dataset:
    """Train and test items with their labels (None where there are none); `found` is what to tell
    the user about them, a list of lines; `log_density` is that of a point (in nats) where it is
    known."""

    name: str
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None
    classes: list = dataclasses.field(default_factory=list)
    found: list = dataclasses.field(default_factory=list)
    log_density: object = None

    @property
    def event(self):
        return tuple(self.train.shape[1:])

    @property
    def is_image(self):
        return len(self.event) == 3

    @functools.cached_property
    def fingerprint(self):
        """16 hex digits that tell this dataset, split and order included, from any other."""
        parts = (self.train, self.test, self.train_labels, self.test_labels)
        digest = hashlib.sha256(
            repr([None if p is None else tuple(p.shape) for p in parts]).encode()
        )
        for part in parts:
            if part is not None:
                digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def describe(self):
        """What was found, a list of lines."""
        size = "x".join(map(str, self.event))
        counts = f"{len(self.train):,} train and {len(self.test):,} test items"
        return [*self.found, f"data: {self.name}, {counts}, {size}"]

    def batch(self, seed, step, size):
        """Training batch `step`: x0 (size, *event) and label (size,) or None.

        The stream of items is epoch after epoch, each in an order of its own, cut into batches of
        `size` without regard to where an epoch ends: no batch is ever short, and BatchNorm never
        sees one item."""
        position = torch.arange(step * size, (step + 1) * size)
        epoch, place = position // len(self.train), position % len(self.train)
        items = torch.empty_like(place)
        for e in epoch.unique().tolist():
            mine = epoch == e
            items[mine] = order(seed, e, len(self.train))[place[mine]]
        label = None if self.train_labels is None else self.train_labels[items]
        return to_float(self.train[items.to(self.train.device, non_blocking=True)]), label


@functools.lru_cache(maxsize=2)
def order(seed, epoch, count):
    """The numbers below `count` in an order keyed by (seed, epoch)."""
    # all bits of both count here, where torch's generator takes the low 32 bits of one number
    return torch.from_numpy(np.random.RandomState([seed, epoch]).permutation(count))


def to_float(items):
    """uint8 pixels -> float32 in [-1, 1]; points stay as they are."""
    return items.float() / 127.5 - 1 if items.dtype == torch.uint8 else items


def to_pixels(x0):
    """float in [-1, 1] -> uint8 pixels, rounded to the nearest; points stay as they are."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().byte() if x0.ndim == 4 else x0


# Points in the plane: (count, random) -> (count, 2), and the density where it has a closed form.


def _swiss_roll(count, random):
    from sklearn.datasets import make_swiss_roll

    points, _ = make_swiss_roll(count, noise=0.5, random_state=random)
    return points[:, [0, 2]]


def _moons(count, random):
    from sklearn.datasets import make_moons

    return make_moons(count, noise=0.05, random_state=random)[0]


EIGHT = 2 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
EIGHT_SD = 0.2


def _eight_gaussians(count, random):
    return EIGHT[random.randint(8, size=count)] + EIGHT_SD * random.randn(count, 2)


def _eight_gaussians_density(x):
    squared = ((x[:, None] - torch.as_tensor(EIGHT)) ** 2).sum(-1)
    gaussian = -squared / (2 * EIGHT_SD**2) - math.log(2 * math.pi * EIGHT_SD**2)
    return torch.logsumexp(gaussian, dim=1) - math.log(8)


def _checkerboard(count, random):
    column, half = random.randint(4, size=count), random.randint(2, size=count)
    corner = np.stack([column, 2 * half + column % 2], axis=1) - 2
    # away from the edges, so that rounding to float32 carries no point out of its cell
    return corner + 1e-6 + (1 - 2e-6) * random.rand(count, 2)


def _checkerboard_density(x):
    cell = (x + 2).floor()
    inside = ((cell >= 0) & (cell < 4)).all(dim=1) & (cell.sum(dim=1) % 2 == 0)
    return torch.where(inside, x.new_tensor(-math.log(8)), -math.inf)


RADII, RING_SD = np.array([1.0, 2.0, 3.0]), 0.08


def _rings(count, random):
    radius = RADII[random.randint(3, size=count)] + RING_SD * random.randn(count)
    angle = 2 * np.pi * random.rand(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _rings_density(x):
    radius = x.norm(dim=1)
    gaussian = -((radius[:, None] - torch.as_tensor(RADII)) ** 2) / (2 * RING_SD**2)
    log_radius = torch.logsumexp(gaussian, dim=1) - math.log(3 * RING_SD * math.sqrt(2 * math.pi))
    return log_radius - (2 * math.pi * radius).log()


def _two_spirals(count, random):
    turn = np.sqrt(random.rand(count)) * 3 * np.pi
    arm = random.choice([-1, 1], size=count)
    spiral = np.stack([-turn * np.cos(turn), turn * np.sin(turn)], axis=1)
    return arm[:, None] * spiral + 0.3 * random.randn(count, 2)


POINTS = {
    "swiss_roll": (_swiss_roll, None),
    "moons": (_moons, None),
    "eight_gaussians": (_eight_gaussians, _eight_gaussians_density),
    "checkerboard": (_checkerboard, _checkerboard_density),
    "two_spirals": (_two_spirals, None),
    "rings": (_rings, _rings_density),
}
TRAIN_POINTS, TEST_POINTS = 100_000, 10_000


def load_points(name, seed=0):
    """Points drawn from `seed`, standardised by the moments of a fixed draw, the same for every
    seed. The test points are the same for every seed, too, so that figures of different runs
    compare."""
    draw, density = POINTS[name]
    fixed = draw(TRAIN_POINTS, np.random.RandomState(1))
    mean, scale = fixed.mean(axis=0), fixed.std(axis=0)

    def standardised(count, stream):
        points = (draw(count, np.random.RandomState(stream)) - mean) / scale
        return torch.from_numpy(points.astype(np.float32))

    def log_density(x):  # the change of variables adds log |det|
        original = x.double() * torch.as_tensor(scale) + torch.as_tensor(mean)
        return density(original) + math.log(scale.prod())

    return Dataset(
        name,
        standardised(TRAIN_POINTS, [seed, 2]),
        standardised(TEST_POINTS, 3),
        log_density=density and log_density,
    )


def load_digits():
    """scikit-learn's 1,797 real 8x8 digits, 17 grey levels, stratified 80/20 by a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    return Dataset(
        "digits", pixels[train], pixels[test], labels[train], labels[test], CLASSES["digits"]
    )


def download(name, file, folder, progress=None):
    """Fetch a published file into `folder`, from the first mirror that has it whole, and return its
    path. `progress` makes a bar as tqdm does.

    It is written as `.partial` and renamed when its MD5 is the published one, so a file that is
    there is whole. Raises OSError with each mirror's reason when none serves."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--data_dir {folder.parent}: {error}; give another folder") from None
    path, partial, reasons = folder / file, folder / f"{file}.{os.getpid()}.partial", []
    for mirror in MIRRORS[name]:
        try:
            md5 = _fetch(mirror + file, partial, progress)
            if md5 == MD5[name][file]:
                return partial.replace(path)
            reasons.append(f"{mirror}: not the published file (MD5 {md5})")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{mirror}: {' '.join(str(error).split())}")
        finally:
            partial.unlink(missing_ok=True)
    raise OSError(
        f"could not download {file} ({'; '.join(reasons)}); put it into "
        f"{folder.resolve()} yourself, or give --data_dir a folder that holds it"
    )


def _fetch(url, partial, progress):
    """Write what `url` holds to the path `partial`, and return its MD5."""
    md5 = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=30) as source, open(partial, "wb") as f:
        total = int(source.headers.get("Content-Length") or 0) or None
        show = {"total": total, "unit": "B", "unit_scale": True, "desc": url.rsplit("/", 1)[1]}
        bar = progress(**show) if progress else None
        try:
            while chunk := source.read(1 << 18):
                md5.update(chunk)
                f.write(chunk)
                if bar is not None:  # a bar without a total has no truth value
                    bar.update(len(chunk))
        finally:
            if bar is not None:
                bar.close()
    return md5.hexdigest()


def _find(name, files, data_dir):
    """The first of `files` that exists in data_dir/name or data_dir, or None."""
    folders = (Path(data_dir, name), Path(data_dir), Path(data_dir, "MNIST", "raw"))
    for folder in folders if name == "mnist" else folders[:2]:
        for file in files:
            if (folder / file).is_file():
                return folder / file
    return None


def read_idx(path):
    """An IDX file of unsigned bytes, plain or gzipped -> uint8 tensor. Raises OSError when it is
    damaged.

    The format: two zero bytes, the type (8 = uint8), the number of dimensions, each dimension as a
    big-endian uint32, then the items."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except DAMAGE as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    dims = raw[3] if raw[:4] in (b"\0\0\x08\x01", b"\0\0\x08\x03") else 0
    start = 4 + 4 * dims
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if not dims or len(raw) != start + math.prod(shape):
        raise OSError(
            f"{path} is not a whole IDX file of pictures or labels: {len(raw)} bytes, header "
            f"{raw[:16].hex()}; delete it to download it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def load_idx(name, data_dir, progress=None):
    """MNIST or Fashion-MNIST from its four IDX files; those that are absent are downloaded."""
    paths = [
        _find(name, (file.removesuffix(".gz"), file), data_dir)
        or download(name, file, Path(data_dir, name), progress)
        for file in MD5[name]
    ]
    train, train_labels, test, test_labels = map(read_idx, paths)
    for images, labels, path in ((train, train_labels, paths[1]), (test, test_labels, paths[3])):
        if images.ndim != 3 or not images.numel() or labels.shape != images.shape[:1]:
            raise OSError(
                f"{path}: labels {tuple(labels.shape)} and pictures {tuple(images.shape)} do not "
                "belong together; expected (N,) and (N, H, W)"
            )
        if labels.max() > 9:
            raise OSError(f"{path}: a label is {labels.max()}; expected 0 to 9")
    if train.shape[1:] != test.shape[1:]:
        raise OSError(f"{paths[0]} and {paths[2]} hold pictures of different sizes")
    file = bytes.fromhex("00000801") + len(test_labels).to_bytes(4, "big") + bytes(test_labels)
    if name != "mnist" and hashlib.md5(file, usedforsecurity=False).hexdigest() == (
        MNIST_TEST_LABELS_MD5
    ):
        raise OSError(f"{paths[3]} is MNIST's, not {name}'s; give --data_dir another folder")
    return Dataset(
        name, train[:, None], test[:, None], train_labels.long(), test_labels.long(), CLASSES[name]
    )


def load_cifar10(data_dir, progress=None):
    """CIFAR-10 from the published binary archive (no pickle), its members read without unpacking.

    A record is one byte of label, then 3 x 32 x 32 bytes: red, green, blue."""
    path = _find("cifar10", (CIFAR_ARCHIVE,), data_dir)
    path = path or download("cifar10", CIFAR_ARCHIVE, Path(data_dir, "cifar10"), progress)
    wanted = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    members = dict.fromkeys(wanted, b"")
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                file = Path(member.name).name
                if member.isfile() and file in wanted:
                    members[file] = archive.extractfile(member).read()
            stream.read()  # up to the checksum, which is at the end
    except DAMAGE as error:
        raise OSError(f"{path} is damaged ({error}); delete it to download it again") from None
    for file, content in members.items():
        if not content or len(content) % 3073:
            raise OSError(
                f"{path}: member {file} has {len(content)} bytes; expected records of 3,073"
            )
    records = [np.frombuffer(members[file], np.uint8).reshape(-1, 3073) for file in wanted]
    parts = [torch.from_numpy(np.concatenate(r)) for r in (records[:5], records[5:])]
    labels = [part[:, 0].long() for part in parts]
    if max(label.max() for label in labels) > 9:
        raise OSError(f"{path}: a label is above 9; expected CIFAR-10's 0 to 9")
    images = [part[:, 1:].reshape(-1, 3, 32, 32) for part in parts]
    return Dataset("cifar10", *images, *labels, CLASSES["cifar10"])


def load_folder(path, image_size=None, channels=None, test_fraction=None):
    """A folder or .zip of pictures, split by its folders `train` and `test` if it has them, else
    at random (default: 0.1 for testing), the same way every time; see ddp/pictures.py for how each
    is read."""
    read = pictures.read(path, image_size, channels)
    items, labels, is_test = read.items, read.labels, read.is_test
    if len(items) < 2:
        raise OSError(f"{path} holds one readable picture; at least 2 are needed")
    if is_test is not None and test_fraction:
        raise ValueError(
            f"--test_fraction {test_fraction}: {path} has folders for training and testing; "
            "leave the flag out"
        )
    if is_test is None:
        order = np.random.RandomState(0).permutation(len(items))
        least = 2 if len(items) > 3 else 1  # one item has no spread to compare with
        count = min(max(least, round((test_fraction or 0.1) * len(items))), len(items) - 1)
        is_test = torch.zeros(len(items), dtype=torch.bool)
        is_test[order[:count]] = True
    parts = [items[~is_test], items[is_test]]
    parts += [None, None] if labels is None else [labels[~is_test], labels[is_test]]
    path = Path(path).resolve()
    name = path.stem if path.is_file() else path.name
    return Dataset(name, *parts, classes=read.classes, found=read.found)


def full_name(name):
    """A dataset's name as it is, the path to a folder or .zip made absolute."""
    return str(Path(name).resolve()) if name and name not in NAMES and Path(name).exists() else name


NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", *POINTS)


def load(
    name,
    data_dir="data",
    *,
    seed=0,
    image_size=None,
    channels=None,
    test_fraction=None,
    progress=None,
):
    """The dataset called `name`, or the pictures at the path `name`, as a Dataset.

    Raises ValueError for a name that is neither, OSError for data that is missing or damaged."""
    flags = {"image_size": image_size, "channels": channels, "test_fraction": test_fraction}
    given = [f"--{flag}" for flag, value in flags.items() if value is not None]
    if name in NAMES and given:
        raise ValueError(
            f"{', '.join(given)}: only for a folder or .zip of pictures, not for --dataset {name}"
        )
    if name in POINTS:
        return load_points(name, seed)
    if name == "digits":
        return load_digits()
    if name in ("mnist", "fashion_mnist"):
        return load_idx(name, data_dir, progress)
    if name == "cifar10":
        return load_cifar10(data_dir, progress)
    # a folder that a checkpoint remembers may have moved to, or into, data_dir
    moved = (Path(data_dir, Path(name).name), Path(data_dir)) if Path(name).is_absolute() else ()
    path = next((p for p in (Path(name), *moved) if p.exists()), None)
    if path is None:
        raise ValueError(
            f"--dataset {name} is neither a dataset ({', '.join(NAMES)}) nor a folder "
            "or .zip of pictures; one that has moved is found by --data_dir"
        )
    return load_folder(path, image_size, channels, test_fraction)
