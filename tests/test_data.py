"""Datasets: splits, batches, densities, damaged files, and mirrors that fail on loopback."""

import gzip
import hashlib
import http.server
import io
import math
import shutil
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from ddp import data
from ddp.data import Dataset, to_float, to_pixels

DENSITIES = [name for name, (_, density) in data.POINTS.items() if density]


def refused(kind, match, function, *args, **kwargs):
    """The one-line message with which it is refused."""
    with pytest.raises(kind, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- batches ----


@pytest.fixture
def numbered():
    """Ten items that tell their own number, and labels that do, too."""
    items = torch.arange(20.0).reshape(10, 2)
    return Dataset("numbered", items, items[:2], torch.arange(10), torch.arange(2))


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_every_epoch_visits_each_item_once(numbered, size):
    batches = [numbered.batch(5, step, size) for step in range(-(-60 // size))]
    assert all(len(x0) == len(label) == size for x0, label in batches)
    labels = torch.cat([label for _, label in batches])[:60]
    assert torch.equal(torch.cat([x0 for x0, _ in batches])[:60], numbered.train[labels])
    orders = [tuple(epoch.tolist()) for epoch in labels.reshape(6, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 6


def test_a_batch_is_a_function_of_seed_and_step(numbered):
    keys = [(seed, step) for seed in range(3) for step in (9, 0)]
    once = {key: numbered.batch(*key, 4)[1] for key in keys}
    again = {key: numbered.batch(*key, 4)[1] for key in sorted(keys)}
    for key, label in once.items():
        assert torch.equal(label, again[key])
    # the stream does not depend on how it is cut
    whole = numbered.batch(2, 0, 40)[1]
    assert torch.equal(whole[36:], once[2, 9])


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, 2**32 - 1), (2**31, 2**31 - 1)])
def test_seeds_give_orders_of_their_own(seeds):
    dataset = Dataset("many", torch.arange(1000.0)[:, None], torch.zeros(1, 1))
    first, second = (dataset.batch(seed, 0, 1000)[0] for seed in seeds)
    # of two independent orders about one item in a thousand stands at the same place
    assert (first == second).sum() < 10


def test_batch_without_labels():
    x0, label = data.load("moons").batch(0, 0, 8)
    assert x0.shape == (8, 2)
    assert label is None


# ---- pixels ----


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x0 = to_float(pixels)
    assert x0.dtype == torch.float32
    assert (x0.min(), x0.max()) == (-1, 1)
    assert torch.equal(to_pixels(x0), pixels)
    nudged = x0 + torch.rand(x0.shape) * 0.99 / 255 - 0.495 / 255  # rounds to the nearest
    assert torch.equal(to_pixels(nudged), pixels)
    assert torch.equal(to_pixels(x0 * 3).unique(), to_pixels((x0 * 3).clamp(-1, 1)).unique())


def test_half_precision_pixels_are_rounded_in_single():
    x0 = torch.linspace(-1, 1, 999).reshape(1, 1, 27, 37)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(to_pixels(x0.to(dtype)), to_pixels(x0.to(dtype).float()))


def test_points_travel_as_they_are():
    points = torch.randn(5, 2)
    assert torch.equal(to_float(points), points)
    assert torch.equal(to_pixels(points), points)


# ---- digits ----


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, bunch = data.load("digits"), load_digits()
    assert digits.event == (1, 8, 8)
    assert digits.is_image
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert len(torch.cat([digits.train, digits.test]).unique()) == 17
    ours = torch.cat([digits.train, digits.test]).flatten(1)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    expected = {}
    for image, label in zip(bunch.data, bunch.target, strict=True):
        expected.setdefault(tuple(image), []).append(int(label))
    found = {}
    for image, label in zip((ours.double() * 16 / 255).round().tolist(), labels, strict=True):
        found.setdefault(tuple(image), []).append(int(label))
    assert found == expected  # each item once, with its label: the parts are disjoint, too


def test_digits_are_stratified():
    digits = data.load("digits")
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert ((test - 0.2 * (train + test)).abs() < 1).all()


def test_the_split_is_fixed():
    digits = data.load("digits")
    assert digits.fingerprint == data.load("digits", seed=7).fingerprint
    assert len(digits.fingerprint) == 16
    assert "1,437 train and 360 test items" in digits.describe()[-1]


def test_fingerprint_changes_with_anything():
    def dataset(change=None):
        parts = [torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.ones(2, 1, 2, 2).byte()]
        parts += [torch.zeros(3).long(), torch.zeros(2).long()]
        if change is not None:
            parts[change].view(-1)[-1] += 1
        return Dataset("d", *parts)

    first = dataset()
    prints = {dataset(change).fingerprint for change in (None, 0, 1, 2, 3)}
    prints.add(Dataset("d", first.train, first.test).fingerprint)
    prints.add(Dataset("d", first.train.reshape(3, 1, 4, 1), first.test).fingerprint)
    prints.add(Dataset("d", first.train[:2], torch.cat([first.train[2:], first.test])).fingerprint)
    assert len(prints) == 8
    assert dataset().fingerprint == dataset().fingerprint


# ---- points ----


@pytest.mark.parametrize("name", data.POINTS)
def test_points_are_standardised_and_drawn_from_the_seed(name):
    points, others = data.load(name, seed=1), data.load(name, seed=2)
    assert points.event == (2,)
    assert not points.is_image
    for part in (points.train, others.train):
        assert part.dtype == torch.float32
        error = 5 / math.sqrt(len(part))
        assert part.mean(dim=0).abs().max() < error
        assert (part.std(dim=0) - 1).abs().max() < error
    assert not torch.equal(points.train, others.train)
    assert torch.equal(points.test, others.test)
    assert points.fingerprint == data.load(name, seed=1).fingerprint
    # no point of one part lies in another
    together = torch.cat([points.train, others.train, points.test])
    assert len(together.unique(dim=0)) == len(together)


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_that_of_the_points(name):
    """In each of 20 x 20 cells: the integral of the density against the share of points."""
    points = data.load(name, seed=3)
    cells, fine, side = 20, 60, 3.0
    width = 2 * side / (cells * fine)
    middle = torch.arange(cells * fine) * width - side + width / 2
    grid = torch.cartesian_prod(middle, middle)
    density = points.log_density(grid)
    assert density.dtype == torch.float64
    mass = density.exp().reshape(cells, fine, cells, fine).sum(dim=(1, 3)) * width**2
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    index = ((points.train + side) / (2 * side / cells)).floor().long()
    assert ((index >= 0) & (index < cells)).all()
    share = torch.bincount(index[:, 0] * cells + index[:, 1], minlength=cells**2).double()
    share = share.reshape(cells, cells) / len(points.train)
    # five standard errors, and what the grid misses at the edge of a density that jumps
    jump = 1.5e-4 if name == "checkerboard" else 1e-5
    assert ((share - mass).abs() < 5 * (mass / len(points.train)).sqrt() + jump).all()


@pytest.mark.parametrize("name", DENSITIES)
def test_every_point_has_a_density(name):
    for seed in range(3):
        points = data.load(name, seed=seed)
        for part in (points.train, points.test):
            assert points.log_density(part).isfinite().all()


def test_entropies_in_closed_form():
    def entropy(name):
        points = data.load(name)
        scale = data.POINTS[name][0](data.TRAIN_POINTS, np.random.RandomState(1)).std(axis=0)
        return -points.log_density(points.test).mean().item() + math.log(scale.prod())

    assert entropy("checkerboard") == pytest.approx(math.log(8), abs=1e-12)
    gaussian = math.log(2 * math.pi * math.e)  # of a standard normal in the plane
    error = 5 / math.sqrt(data.TEST_POINTS)
    expected = math.log(8) + gaussian + 2 * math.log(data.EIGHT_SD)  # they hardly overlap
    assert entropy("eight_gaussians") == pytest.approx(expected, abs=error)
    around = np.log(2 * np.pi * data.RADII).mean()
    expected = math.log(3) + gaussian / 2 + math.log(data.RING_SD) + around
    assert entropy("rings") == pytest.approx(expected, abs=error)


# ---- IDX ----


def idx(array):
    array = np.asarray(array, np.uint8)
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def idx_contents(count=6, side=3):
    """The four files' contents; every byte differs from its neighbours."""
    images = np.arange(count * side * side).reshape(count, side, side) % 251
    labels = np.arange(count) % 10
    return [idx(images), idx(labels), idx(images[:4] + 1), idx(labels[3::-1])]


def put(folder, contents, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in zip(data.MD5["mnist"], contents, strict=True):
        path = folder / (file.removesuffix(".gz") + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
    return folder


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to download fails the test."""

    def urlopen(*args, **kwargs):
        pytest.fail(f"tried to download {args}")

    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("where", [".", "named"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_of_the_user_are_read(tmp_path, name, where, suffix):
    put(tmp_path / (name if where == "named" else "."), idx_contents(), suffix)
    dataset = data.load(name, tmp_path)
    assert dataset.event == (1, 3, 3)
    assert torch.equal(dataset.train.flatten(), torch.arange(54, dtype=torch.uint8))
    assert torch.equal(dataset.test.flatten(), torch.arange(1, 37, dtype=torch.uint8))
    assert dataset.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.test_labels.tolist() == [3, 2, 1, 0]
    assert dataset.train_labels.dtype == torch.int64
    assert len(dataset.classes) == 10


images, labels, test_images, test_labels = idx_contents()
DAMAGED = {
    "empty": (0, b""),
    "header only": (0, images[:16]),
    "cut header": (0, images[:7]),
    "cut pixels": (0, images[:-1]),
    "one byte more": (0, images + b"\0"),
    "wrong magic": (0, b"\0\0\x09\x03" + images[4:]),
    "text": (0, b"<html>404</html>" * 9),
    "labels in place of images": (0, labels),
    "images in place of labels": (1, images),
    "other count": (1, idx([0, 1, 2, 3, 4])),
    "label of 10": (1, idx([0, 1, 2, 3, 4, 10])),
    "test label of 255": (3, idx([0, 1, 2, 255])),
    "negative sides": (0, images[:4] + bytes.fromhex("00000006fffffffdfffffffd") + images[16:]),
    "huge sides": (0, images[:4] + bytes.fromhex("ffffffffffffffffffffffff") + images[16:]),
    "no items": (2, idx(np.zeros((0, 3, 3)))),
    "no pixels": (2, idx(np.zeros((4, 0, 3)))),
    "other size": (2, idx(np.zeros((4, 3, 4)))),
    "a hundred sides": (0, b"\0\0\x08\x64" + b"\0\0\0\1" * 100 + b"\0"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_idx_is_refused(tmp_path, damage, suffix):
    contents, (which, content) = idx_contents(), DAMAGED[damage]
    contents[which] = content
    put(tmp_path, contents, suffix)
    message = refused(OSError, "ubyte", data.load, "mnist", tmp_path)
    assert str(tmp_path) in message


@pytest.mark.usefixtures("offline")
def test_pictures_without_pixels_are_refused(tmp_path):
    nothing = idx(np.zeros((4, 0, 3)))
    put(tmp_path, [nothing, idx([0, 1, 2, 3]), nothing, idx([0, 1, 2, 3])])
    refused(OSError, "belong together", data.load, "mnist", tmp_path)


def noticed_or_harmless(path, name):
    """Flip a bit of each byte of the file in turn: loading is refused, or gives what it gave."""
    whole, fingerprint = path.read_bytes(), data.load(name, path.parent).fingerprint
    messages, harmless = [], 0
    for i in np.unique(np.linspace(0, len(whole) - 1, 100).astype(int)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        try:
            assert data.load(name, path.parent).fingerprint == fingerprint
            harmless += 1  # the date in a header, say
        except OSError as error:
            messages.append(str(error))
    assert harmless < 15
    assert all(str(path) in message and "\n" not in message for message in messages)
    for share in (0, 0.01, 0.3, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(OSError, path.name, data.load, name, path.parent)
    path.write_bytes(whole[:-1])
    refused(OSError, path.name, data.load, name, path.parent)


@pytest.mark.usefixtures("offline")
def test_every_flipped_bit_of_idx_is_noticed_or_harmless(tmp_path):
    put(tmp_path, idx_contents(), ".gz")
    noticed_or_harmless(tmp_path / "train-images-idx3-ubyte.gz", "mnist")


@pytest.fixture(scope="module")
def mnist():
    folder = Path(__file__).parent.parent.parent / "shared" / "data"
    if not (folder / "mnist").is_dir():
        pytest.skip(f"{folder / 'mnist'} is absent")
    return data.load("mnist", folder)


def test_mnist_is_mnist(mnist):
    assert mnist.train.shape == (60000, 1, 28, 28)
    assert mnist.test.shape == (10000, 1, 28, 28)
    published = {
        "6bbc9ace898e44ae57da46a324031adb": ("00000803", mnist.train, (60000, 28, 28)),
        "a25bea736e30d166cdddb491f175f624": ("00000801", mnist.train_labels, (60000,)),
        "2646ac647ad5339dbf082846283269ea": ("00000803", mnist.test, (10000, 28, 28)),
        "27ae3e4e09519cfbb04c329615203637": ("00000801", mnist.test_labels, (10000,)),
    }
    for md5, (magic, items, shape) in published.items():
        header = bytes.fromhex(magic) + b"".join(n.to_bytes(4, "big") for n in shape)
        assert hashlib.md5(header + items.byte().numpy().tobytes()).hexdigest() == md5


@pytest.mark.usefixtures("offline")
def test_mnist_is_not_fashion(shared_data, tmp_path):
    refused(OSError, "MNIST's", data.load, "fashion_mnist", shared_data / "mnist")
    for file in (shared_data / "mnist").iterdir():
        plain = gzip.decompress(file.read_bytes())
        (tmp_path / file.stem).write_bytes(plain)
    refused(OSError, "t10k-labels.*MNIST's", data.load, "fashion_mnist", tmp_path)


# ---- CIFAR-10 ----


def records(*numbers):
    """Records of label n % 10, of red n, green n + 1 and blue n + 2 at the top left."""
    return b"".join(
        bytes([n % 10]) + b"".join(bytes([n + c]) + bytes(1022) + bytes([99]) for c in range(3))
        for n in numbers
    )


def cifar_members():
    members = {f"data_batch_{i}.bin": records(10 * i, 10 * i + 1) for i in range(1, 6)}
    return members | {"test_batch.bin": records(7), "batches.meta.txt": b"airplane\n"}


def cifar_archive(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("where", [".", "cifar10"])
@pytest.mark.parametrize("backwards", [False, True])
def test_cifar_is_read_from_its_archive(tmp_path, where, backwards):
    members = cifar_members()
    if backwards:
        members = dict(reversed(members.items()))
    cifar_archive(tmp_path / where / data.CIFAR_ARCHIVE, members)
    before = sorted(tmp_path.rglob("*"))
    cifar = data.load("cifar10", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked
    assert cifar.train.shape == (10, 3, 32, 32)
    numbers = torch.tensor([10, 11, 20, 21, 30, 31, 40, 41, 50, 51])
    corner = numbers[:, None] + torch.arange(3)  # red, green, blue
    assert torch.equal(cifar.train[:, :, 0, 0].long(), corner)
    assert (cifar.train[:, :, 31, 31] == 99).all()
    assert cifar.train.sum() == (corner + 99).sum()
    assert torch.equal(cifar.train_labels, numbers % 10)
    assert cifar.test[0, :, 0, 0].tolist() == [7, 8, 9]
    assert cifar.test_labels.tolist() == [7]


@pytest.mark.usefixtures("offline")
def test_damaged_cifar_is_refused(tmp_path):
    path = cifar_archive(tmp_path / data.CIFAR_ARCHIVE, cifar_members())
    plain = gzip.decompress(path.read_bytes())
    noticed_or_harmless(path, "cifar10")
    cuts = [plain[: len(plain) * i // 8] for i in range(7)]  # an archive that ends too early
    for content in [*cuts, b"<html>" * 999]:
        path.write_bytes(gzip.compress(content))
        refused(OSError, path.name, data.load, "cifar10", tmp_path)
    path.write_bytes(plain)
    refused(OSError, path.name, data.load, "cifar10", tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data_batch_3.bin": records(1)[:-1]}, "data_batch_3.bin has 3072 bytes"),
        ({"test_batch.bin": b""}, "test_batch.bin has 0 bytes"),
        ({"data_batch_1.bin": b"\x0a" + records(1)[1:]}, "label"),
        ({"test_batch.bin": b"\xff" + records(1)[1:]}, "label"),
    ],
)
def test_inconsistent_cifar_is_refused(tmp_path, change, match):
    cifar_archive(tmp_path / data.CIFAR_ARCHIVE, cifar_members() | change)
    refused(OSError, match, data.load, "cifar10", tmp_path)


# ---- downloads ----


class Handler(http.server.BaseHTTPRequestHandler):
    """The first part of the path says how the mirror behaves."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        _, kind, file = self.path.split("/")
        content = self.server.files[file]
        self.server.asked.append(kind)
        self.close_connection = True
        if kind == "garbage":
            self.wfile.write(b"this is\n no answer\n\n")
        elif kind == "missing":
            self.send_error(404)
        else:
            if kind == "wrong":
                content = content[:-1] + b"?"
            self.send_response(200)
            if kind == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                content = b"%x\r\n" % (len(content) + 1) + content[:9]
            elif kind == "lying":
                self.send_header("Content-Length", "many")
            elif kind != "endless":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if kind == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """set(*kinds): makes these the mirrors of all datasets; .files: what they hold."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.files = [], {}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        ports = {"refused": closed.getsockname()[1]}

        def use(*kinds):
            urls = [f"http://127.0.0.1:{ports.get(k, server.server_port)}/{k}/" for k in kinds]
            monkeypatch.setattr(data, "MIRRORS", dict.fromkeys(data.MIRRORS, urls))
            md5 = {file: hashlib.md5(content).hexdigest() for file, content in server.files.items()}
            monkeypatch.setattr(data, "MD5", dict.fromkeys(data.MD5, md5))

        server.use = use
        yield server
        server.shutdown()
        server.server_close()


class Bars:
    """A stand-in for tqdm that keeps account."""

    def __init__(self):
        self.made = []

    def __call__(self, **kwargs):
        bar = tqdm(**kwargs, file=io.StringIO())
        self.made.append(bar)
        bar.closed, close = False, bar.close

        def closing():
            bar.closed = True
            close()

        bar.close = closing
        return bar


@pytest.mark.parametrize(
    "bad",
    ["missing", "wrong", "cut", "chunked", "lying", "garbage", "refused"],
)
def test_the_next_mirror_takes_over(mirrors, tmp_path, bad):
    mirrors.files = {
        file: gzip.compress(content)
        for file, content in zip(data.MD5["mnist"], idx_contents(), strict=True)
    }
    mirrors.use(bad, "good")
    bars = Bars()
    dataset = data.load("fashion_mnist", tmp_path / "new", progress=bars)
    folder = tmp_path / "new" / "fashion_mnist"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == mirrors.files
    assert dataset.fingerprint == data.load("fashion_mnist", tmp_path / "new").fingerprint
    assert mirrors.asked.count("good") == 4  # the second load found the files
    assert all(bar.closed for bar in bars.made)
    done = [bar for bar in bars.made if bar.n == bar.total]
    assert {bar.desc.split(":")[0] for bar in done} == set(mirrors.files)

    # no mirror serves: what each said, in one line, and nothing is left
    mirrors.use(bad, bad)
    message = refused(OSError, "could not download", data.load, "mnist", tmp_path / "none")
    assert message.count(f"/{bad}/") == 2
    assert str(tmp_path / "none" / "mnist") in message
    assert not list((tmp_path / "none" / "mnist").iterdir())


def test_a_download_without_a_length(mirrors, tmp_path):
    path = cifar_archive(tmp_path / "there" / data.CIFAR_ARCHIVE, cifar_members())
    mirrors.files = {data.CIFAR_ARCHIVE: path.read_bytes()}
    mirrors.use("endless")
    bars = Bars()
    cifar = data.load("cifar10", tmp_path / "here", progress=bars)
    assert cifar.fingerprint == data.load("cifar10", tmp_path / "there").fingerprint
    (bar,) = bars.made
    assert (bar.n, bar.total, bar.closed) == (path.stat().st_size, None, True)


def test_only_what_is_absent_is_downloaded(mirrors, tmp_path):
    contents = dict(zip(data.MD5["mnist"], idx_contents(), strict=True))
    mirrors.files = {file: gzip.compress(content) for file, content in contents.items()}
    mirrors.use("good")
    put(tmp_path, contents.values())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    data.load("mnist", tmp_path)
    assert mirrors.asked == ["good"]
    assert [p.name for p in (tmp_path / "mnist").iterdir()] == ["t10k-labels-idx1-ubyte.gz"]


def test_an_interrupted_download_leaves_nothing(mirrors, tmp_path):
    mirrors.files = {data.CIFAR_ARCHIVE: b"x" * 10**6}
    mirrors.use("good")

    class Bar:
        closed = False

        def update(self, count):
            raise KeyboardInterrupt

        def close(self):
            Bar.closed = True

    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", tmp_path, progress=lambda **_: Bar())
    assert not list((tmp_path / "cifar10").iterdir())
    assert Bar.closed


def test_a_data_dir_that_is_a_file(mirrors, tmp_path):
    mirrors.files = {data.CIFAR_ARCHIVE: b"x"}
    mirrors.use("good")
    (tmp_path / "file").touch()
    refused(OSError, r"--data_dir .*file", data.load, "cifar10", tmp_path / "file")
    assert not mirrors.asked


def test_every_published_file_has_two_mirrors_and_a_checksum():
    assert set(data.MIRRORS) == set(data.MD5) == {"mnist", "fashion_mnist", "cifar10"}
    for name, urls in data.MIRRORS.items():
        assert len(set(urls)) >= 2
        assert all(url.startswith("http") and url.endswith("/") for url in urls)
        assert all(len(bytes.fromhex(md5)) == 16 for md5 in data.MD5[name].values())


# ---- what is asked for ----


def test_an_unknown_name_is_refused():
    for name in ("mnits", "/no/such/folder", "none.zip", "", "a\0b"):
        if name:
            message = refused(ValueError, "--dataset", data.load, name)
            assert "digits" in message


@pytest.mark.parametrize("name", ["digits", "moons", "cifar10"])
@pytest.mark.parametrize(
    "flag", [{"image_size": [16, 16]}, {"channels": 3}, {"test_fraction": 0.1}]
)
def test_flags_of_folders_are_refused_elsewhere(name, flag, tmp_path):
    refused(ValueError, f"--{next(iter(flag))}.*{name}", data.load, name, tmp_path, **flag)
    assert not list(tmp_path.iterdir())


# ---- folders: how they are split; how pictures are read is in test_pictures.py ----


@pytest.fixture
def folder(tmp_path):
    """100 grey pictures, picture i of grey level i."""
    for i in range(100):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:03d}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("share", "count"), [(0.1, 10), (0.5, 50), (0.25, 25), (0.001, 2), (None, 10)]
)
def test_test_fraction(folder, share, count):
    parts = [data.load(str(folder), seed=seed, test_fraction=share) for seed in (0, 1)]
    assert len(parts[0].test) == count
    assert parts[0].fingerprint == parts[1].fingerprint
    assert parts[0].name == folder.name
    levels = torch.cat([parts[0].train, parts[0].test])[:, 0, 0, 0]
    assert levels.sort().values.tolist() == list(range(100))
    assert parts[0].test[:, 0, 0, 0].tolist() != list(range(100 - count, 100))


def test_fingerprint_of_a_folder_changes_with_one_pixel(folder):
    before = data.load(str(folder)).fingerprint
    picture = Image.open(folder / "050.png")
    picture.putpixel((3, 3), 51)
    picture.save(folder / "050.png")
    assert data.load(str(folder)).fingerprint != before


def test_two_pictures_are_the_least(folder):
    for path in sorted(folder.iterdir())[2:]:
        path.unlink()
    two = data.load(str(folder), test_fraction=0.5)
    assert (len(two.train), len(two.test)) == (1, 1)
    (folder / "000.png").unlink()
    refused(OSError, "at least 2", data.load, str(folder))


def test_folders_named_train_and_test_are_the_split(folder, tmp_path):
    for part, numbers in (("train", range(30)), ("test", range(30, 40))):
        for i in numbers:
            place = tmp_path / "split" / part / ("even", "odd")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{i:03d}.png", place)
    refused(ValueError, "--test_fraction", data.load, str(tmp_path / "split"), test_fraction=0.5)
    dataset = data.load(str(tmp_path / "split"))
    assert sorted(dataset.train[:, 0, 0, 0].tolist()) == list(range(30))
    assert sorted(dataset.test[:, 0, 0, 0].tolist()) == list(range(30, 40))
    assert torch.equal(dataset.train_labels, dataset.train[:, 0, 0, 0].long() % 2)
    assert torch.equal(dataset.test_labels, dataset.test[:, 0, 0, 0].long() % 2)
    assert dataset.classes == ["even", "odd"]
