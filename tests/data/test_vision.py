"""Digits, MNIST and CIFAR-10: as published, damaged, and from mirrors that fail on loopback."""

import errno
import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from data_checks import IDX_FILES, idx, idx_contents, put, refused
from tqdm import tqdm

from ddp.data import load_dataset, vision
from ddp.data.dataset import val_mask
from ddp.data.vision import CIFAR_ARCHIVE, PUBLISHED

# ---- digits ----


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, bunch = load_dataset("digits"), load_digits()
    assert digits.event == (1, 8, 8)
    assert digits.is_image
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert len(torch.cat([digits.train, digits.test]).unique()) == 17
    ours = torch.cat([digits.train, digits.test]).flatten(1)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    expected = {}
    for image, label in zip(bunch.data, bunch.target, strict=True):
        expected.setdefault(tuple(image), []).append(int(label))
    ours_by_image = {}
    for image, label in zip((ours.double() * 16 / 255).round().tolist(), labels, strict=True):
        ours_by_image.setdefault(tuple(image), []).append(int(label))
    assert ours_by_image == expected  # each item once, with its label: the parts are disjoint, too


def test_digits_are_stratified():
    digits = load_dataset("digits")
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert ((test - 0.2 * (train + test)).abs() < 1).all()


def test_digits_split_does_not_depend_on_the_seed():
    digits = load_dataset("digits")
    assert digits.fingerprint == load_dataset("digits", seed=7).fingerprint
    assert len(digits.fingerprint) == 16
    assert "1,437 train and 360 test items" in digits.describe()[-1]


# ---- IDX ----


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to download fails the test."""

    def urlopen(*args, **kwargs):
        pytest.fail(f"tried to download {args}")

    monkeypatch.setattr(vision, "urlopen", urlopen)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("folder", [".", "named"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_from_files_of_the_user(tmp_path, name, folder, suffix):
    put(tmp_path / (name if folder == "named" else "."), idx_contents(), suffix)
    dataset = load_dataset(name, tmp_path)
    assert dataset.event == (1, 3, 3)
    assert torch.equal(dataset.train.flatten(), torch.arange(54, dtype=torch.uint8))
    assert torch.equal(dataset.test.flatten(), torch.arange(1, 37, dtype=torch.uint8))
    assert dataset.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.test_labels.tolist() == [3, 2, 1, 0]
    assert dataset.train_labels.dtype == torch.int64
    assert len(dataset.classes) == 10


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_is_read_from_where_torchvision_puts_it(tmp_path, name, folder):
    put(tmp_path / folder / "raw", idx_contents())
    assert len(load_dataset(name, tmp_path).train) == 6


@pytest.mark.usefixtures("offline")
def test_mnist_has_validation_items(tmp_path):
    put(tmp_path, idx_contents(count=2000, side=2))
    mnist = load_dataset("mnist", tmp_path)
    is_val = val_mask(2000)
    assert is_val.sum() == 200
    images = torch.from_numpy(np.arange(8000).reshape(2000, 1, 2, 2) % 251).byte()
    assert torch.equal(mnist.val, images[is_val])
    assert torch.equal(mnist.train, images[~is_val])
    assert torch.equal(mnist.val_labels, torch.arange(2000)[is_val] % 10)
    assert torch.equal(mnist.train_labels, torch.arange(2000)[~is_val] % 10)


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
def test_mnist_refuses_damaged_files(tmp_path, damage, suffix):
    contents, (which, content) = idx_contents(), DAMAGED[damage]
    contents[which] = content
    put(tmp_path, contents, suffix)
    message = refused(OSError, "ubyte", load_dataset, "mnist", tmp_path)
    assert str(tmp_path) in message


@pytest.mark.usefixtures("offline")
def test_mnist_refuses_images_without_pixels(tmp_path):
    nothing = idx(np.zeros((4, 0, 3)))
    put(tmp_path, [nothing, idx([0, 1, 2, 3]), nothing, idx([0, 1, 2, 3])])
    refused(OSError, "labels", load_dataset, "mnist", tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("declared", [(6, 3, 3), (2**31, 1, 1), (2**32 - 1,) * 3])
def test_mnist_unpacks_no_more_than_is_declared(tmp_path, monkeypatch, declared):
    """Neither a .gz of many zeros nor a header of many items takes memory."""
    monkeypatch.setattr(vision, "MAX_BYTES", 1 << 16)
    contents = idx_contents()
    header = contents[0][:4] + b"".join(n.to_bytes(4, "big") for n in declared)
    contents[0] = header + bytes(10_000_000)
    put(tmp_path, contents, ".gz")
    tracemalloc.start()
    refused(OSError, "train-images.*is damaged", load_dataset, "mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def noticed_or_harmless(path, name):
    """Flip a bit of each byte of the file in turn: loading is refused, or gives what it gave."""
    whole, fingerprint = path.read_bytes(), load_dataset(name, path.parent).fingerprint
    messages, harmless = [], 0
    for i in np.unique(np.linspace(0, len(whole) - 1, 100).astype(int)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        try:
            assert load_dataset(name, path.parent).fingerprint == fingerprint
            harmless += 1  # the date in a header, say
        except OSError as error:
            messages.append(str(error))
    assert harmless < 15
    assert all(str(path) in message and "\n" not in message for message in messages)
    for fraction in (0, 0.01, 0.3, 0.9):
        path.write_bytes(whole[: int(len(whole) * fraction)])
        refused(OSError, path.name, load_dataset, name, path.parent)
    path.write_bytes(whole[:-1])
    refused(OSError, path.name, load_dataset, name, path.parent)


@pytest.mark.usefixtures("offline")
def test_mnist_notices_flipped_bits(tmp_path):
    put(tmp_path, idx_contents(), ".gz")
    noticed_or_harmless(tmp_path / "train-images-idx3-ubyte.gz", "mnist")


def test_mnist_is_the_published_one(shared_data):
    mnist = load_dataset("mnist", shared_data)
    assert mnist.train.shape == (55000, 1, 28, 28)
    assert mnist.val.shape == (5000, 1, 28, 28)
    assert mnist.test.shape == (10000, 1, 28, 28)
    is_val = val_mask(60000)
    train = torch.empty(60000, 1, 28, 28, dtype=torch.uint8)
    train[is_val], train[~is_val] = mnist.val, mnist.train
    labels = torch.empty(60000).long()
    labels[is_val], labels[~is_val] = mnist.val_labels, mnist.train_labels
    published = {
        "6bbc9ace898e44ae57da46a324031adb": ("00000803", train, (60000, 28, 28)),
        "a25bea736e30d166cdddb491f175f624": ("00000801", labels, (60000,)),
        "2646ac647ad5339dbf082846283269ea": ("00000803", mnist.test, (10000, 28, 28)),
        "27ae3e4e09519cfbb04c329615203637": ("00000801", mnist.test_labels, (10000,)),
    }
    for md5, (magic, items, shape) in published.items():
        header = bytes.fromhex(magic) + b"".join(n.to_bytes(4, "big") for n in shape)
        assert hashlib.md5(header + items.byte().numpy().tobytes()).hexdigest() == md5


@pytest.mark.usefixtures("offline")
def test_fashion_mnist_refuses_mnist(shared_data, tmp_path):
    refused(OSError, "MNIST's", load_dataset, "fashion_mnist", shared_data / "mnist")
    for file in (shared_data / "mnist").iterdir():
        plain = gzip.decompress(file.read_bytes())
        (tmp_path / file.stem).write_bytes(plain)
    refused(OSError, "t10k-labels.*MNIST's", load_dataset, "fashion_mnist", tmp_path)


@pytest.mark.usefixtures("offline")
def test_mnist_says_that_its_labels_are_others(tmp_path):
    """Fashion-MNIST has files of the same names."""
    contents = idx_contents()
    contents[2:] = idx(np.zeros((10_000, 3, 3))), idx(np.arange(10_000) % 10)
    put(tmp_path, contents)
    assert "as many labels as MNIST, but others" in load_dataset("mnist", tmp_path).describe()[0]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_error_of_the_disk_names_the_file(tmp_path, monkeypatch, name):
    put(tmp_path, idx_contents(), ".gz")
    path = cifar_archive(tmp_path / CIFAR_ARCHIVE, cifar_members())

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "read", broken)
    message = refused(OSError, "cannot be read: Input/output error", load_dataset, name, tmp_path)
    assert (str(path) if name == "cifar10" else "train-images-idx3-ubyte.gz") in message


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
    cifar_archive(tmp_path / where / CIFAR_ARCHIVE, members)
    before = sorted(tmp_path.rglob("*"))
    cifar = load_dataset("cifar10", tmp_path)
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
def test_cifar_refuses_a_damaged_archive(tmp_path):
    path = cifar_archive(tmp_path / CIFAR_ARCHIVE, cifar_members())
    plain = gzip.decompress(path.read_bytes())
    noticed_or_harmless(path, "cifar10")
    cuts = [plain[: len(plain) * i // 8] for i in range(7)]  # an archive that ends too early
    for content in [*cuts, b"<html>" * 999]:
        path.write_bytes(gzip.compress(content))
        refused(OSError, path.name, load_dataset, "cifar10", tmp_path)
    path.write_bytes(plain)
    refused(OSError, path.name, load_dataset, "cifar10", tmp_path)


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
def test_cifar_refuses_inconsistent_members(tmp_path, change, match):
    cifar_archive(tmp_path / CIFAR_ARCHIVE, cifar_members() | change)
    refused(OSError, match, load_dataset, "cifar10", tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cifar_is_read_from_a_tar_of_every_format(tmp_path, kind):
    """With headers of other kinds between the files, as other systems write them."""
    path = tmp_path / CIFAR_ARCHIVE
    with tarfile.open(path, "w:gz", format=kind) as archive:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in cifar_members().items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            info.mtime = 1.5
            info.uname = "\N{LATIN SMALL LETTER E WITH ACUTE}" * 20
            archive.addfile(info, io.BytesIO(content))
    expected = load_dataset(
        "cifar10", cifar_archive(tmp_path / "b" / path.name, cifar_members()).parent
    )
    assert load_dataset("cifar10", tmp_path).fingerprint == expected.fingerprint


def tar_header(size, kind=b"0", name=b"data_batch_1.bin", **fields):
    """A header of a .tar whose field for the size holds these bytes."""
    header = bytearray(512)
    header[: len(name)] = name
    header[124 : 124 + len(size)] = size
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = fields.get("checksum", b"%06o\0 " % sum(header))
    return bytes(header)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "header",
    [
        tar_header(b"77777777777\0"),
        tar_header(b"-0000000001\0"),
        tar_header(b"\x80" + bytes(3) + b"\xff" * 8),
        tar_header(b"\xff" * 12),
        tar_header(b"00000000999\0"),
        tar_header(b"+1_0\0"),
        tar_header(b"\xb2\0"),
        tar_header(b""),
        tar_header(b"00000030010\0", kind=b"S"),
        tar_header(b"00000030010\0", kind=b"2"),
        tar_header(b"00000030010\0", checksum=b"0\0"),
        tar_header(b"00000030010\0", checksum=b"-1\0"),
        tar_header(b"77777777777\0", kind=b"x"),
        tar_header(b"77777777777\0", kind=b"L"),
        tar_header(b"00000030010\0")[:300],
    ],
)
def test_cifar_refuses_a_header_that_lies(tmp_path, header):
    path = cifar_archive(tmp_path / CIFAR_ARCHIVE, cifar_members())
    plain = gzip.decompress(path.read_bytes())
    batch = plain.index(b"cifar-10-batches-bin/data_batch_1.bin")
    path.write_bytes(gzip.compress(plain[:batch] + header + plain[batch + 512 :]))
    refused(OSError, path.name, load_dataset, "cifar10", tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("zeros", ["in a file", "behind the end", "in another file"])
def test_cifar_unpacks_no_more_than_it_may(tmp_path, monkeypatch, zeros):
    monkeypatch.setattr(vision, "MAX_BYTES", 1 << 20)
    members = cifar_members()
    if zeros == "in a file":
        members["test_batch.bin"] = bytes(3073 * 5000)
    elif zeros == "in another file":
        members["readme"] = bytes(3073 * 5000)
    path = cifar_archive(tmp_path / CIFAR_ARCHIVE, members)
    if zeros == "behind the end":
        path.write_bytes(path.read_bytes() + gzip.compress(bytes(3073 * 5000)))
    tracemalloc.start()
    refused(OSError, "longer than", load_dataset, "cifar10", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


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
            if kind.startswith("dripping"):
                self.drip(kind)
                return
            if kind == "huge":
                self.send_header("Content-Length", "9" * 30)
            if kind == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                content = b"%x\r\n" % (len(content) + 1) + content[:9]
            elif kind == "lying":
                self.send_header("Content-Length", "many")
            elif kind == "flood":
                content = bytes(1 << 20)
            elif kind not in ("endless", "huge"):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if kind == "cut" else content)

    def drip(self, kind):
        """Send a byte now and then, of the answer's head or of its body."""
        self.send_header("Content-Length", "1000")
        if kind == "dripping-body":
            self.end_headers()
        self.flush_headers()
        while not self.server.stopped.wait(0.02):
            try:
                self.wfile.write(b"x")
            except OSError:  # the other side is gone
                return

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """use(*kinds): makes these the mirrors of all datasets; .files: what they hold."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.files, server.stopped = [], {}, threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        ports = {"refused": closed.getsockname()[1]}

        def use(*kinds):
            urls = [f"http://127.0.0.1:{ports.get(k, server.server_port)}/{k}/" for k in kinds]
            md5 = {file: hashlib.md5(content).hexdigest() for file, content in server.files.items()}
            for name in list(PUBLISHED):
                changed = PUBLISHED[name] | {"mirrors": urls, "md5": md5}
                monkeypatch.setitem(PUBLISHED, name, changed)

        server.use = use
        yield server
        server.stopped.set()
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
def test_download_goes_on_to_the_next_mirror(mirrors, tmp_path, bad):
    mirrors.files = {
        file: gzip.compress(content)
        for file, content in zip(IDX_FILES, idx_contents(), strict=True)
    }
    mirrors.use(bad, "good")
    bars = Bars()
    dataset = load_dataset("fashion_mnist", tmp_path / "new", progress=bars)
    folder = tmp_path / "new" / "fashion_mnist"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == mirrors.files
    assert dataset.fingerprint == load_dataset("fashion_mnist", tmp_path / "new").fingerprint
    assert mirrors.asked.count("good") == 4  # the second load found the files
    assert all(bar.closed for bar in bars.made)
    done = [bar for bar in bars.made if bar.n == bar.total]
    assert {bar.desc.split(":")[0] for bar in done} == set(mirrors.files)

    # no mirror serves: what each said, in one line, and nothing is left
    mirrors.use(bad, bad)
    message = refused(OSError, "data_dir", load_dataset, "mnist", tmp_path / "none")
    assert message.count(f"/{bad}/") == 2
    assert str(tmp_path / "none" / "mnist") in message
    assert not list((tmp_path / "none" / "mnist").iterdir())


@pytest.mark.parametrize("kind", ["dripping-head", "dripping-body", "silent"])
def test_download_gives_up_a_mirror_that_is_too_slow(mirrors, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(vision, "PATIENCE", 0.2)
    mirrors.files = {CIFAR_ARCHIVE: b"x"}
    mirrors.use(kind)
    if kind == "silent":
        monkeypatch.setattr(Handler, "drip", lambda self, kind: self.server.stopped.wait())
        mirrors.use("dripping")
    message = refused(OSError, "cannot download", load_dataset, "cifar10", tmp_path)
    assert "nothing came" in message or "bytes a second" in message or "timed out" in message
    assert not list((tmp_path / "cifar10").iterdir())


@pytest.mark.parametrize("kind", ["huge", "flood"])
def test_download_ends_when_it_is_too_long(mirrors, tmp_path, monkeypatch, kind):
    """Before the disk is full."""
    monkeypatch.setattr(vision, "MAX_BYTES", 1 << 16)
    monkeypatch.setattr(vision, "CHUNK_BYTES", 1 << 12)
    mirrors.files = {CIFAR_ARCHIVE: b"x"}
    mirrors.use(kind)
    bars = Bars()
    refused(OSError, "it is longer than", load_dataset, "cifar10", tmp_path, progress=bars)
    assert not list((tmp_path / "cifar10").iterdir())
    assert bars.made[0].n <= 1 << 16


def test_download_shows_little_of_what_a_mirror_says(mirrors, tmp_path, monkeypatch):
    mirrors.files = {CIFAR_ARCHIVE: b"x"}
    mirrors.use("missing", "missing")
    text = "no \x1b[2J" + "x" * 10_000

    def answer(self, code):
        self.send_response(code, text)
        self.end_headers()

    monkeypatch.setattr(Handler, "send_error", answer)
    message = refused(OSError, r"\\x1b", load_dataset, "cifar10", tmp_path)
    assert message.isprintable()
    assert len(message) < 800


def test_download_takes_a_file_of_unknown_length(mirrors, tmp_path):
    path = cifar_archive(tmp_path / "there" / CIFAR_ARCHIVE, cifar_members())
    mirrors.files = {CIFAR_ARCHIVE: path.read_bytes()}
    mirrors.use("endless")
    bars = Bars()
    cifar = load_dataset("cifar10", tmp_path / "here", progress=bars)
    assert cifar.fingerprint == load_dataset("cifar10", tmp_path / "there").fingerprint
    (bar,) = bars.made
    assert (bar.n, bar.total, bar.closed) == (path.stat().st_size, None, True)


def test_download_fetches_only_what_is_absent(mirrors, tmp_path):
    contents = dict(zip(IDX_FILES, idx_contents(), strict=True))
    mirrors.files = {file: gzip.compress(content) for file, content in contents.items()}
    mirrors.use("good")
    put(tmp_path, contents.values())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    load_dataset("mnist", tmp_path)
    assert mirrors.asked == ["good"]
    assert [p.name for p in (tmp_path / "mnist").iterdir()] == ["t10k-labels-idx1-ubyte.gz"]


def test_download_leaves_nothing_when_interrupted(mirrors, tmp_path):
    mirrors.files = {CIFAR_ARCHIVE: b"x" * 10**6}
    mirrors.use("good")

    class Bar:
        closed = False

        def update(self, count):
            raise KeyboardInterrupt

        def close(self):
            Bar.closed = True

    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar10", tmp_path, progress=lambda **_: Bar())
    assert not list((tmp_path / "cifar10").iterdir())
    assert Bar.closed


def test_download_refuses_a_data_dir_that_is_a_file(mirrors, tmp_path):
    mirrors.files = {CIFAR_ARCHIVE: b"x"}
    mirrors.use("good")
    (tmp_path / "file").touch()
    refused(OSError, r"data_dir=.*file", load_dataset, "cifar10", tmp_path / "file")
    assert not mirrors.asked


def test_published_files_have_two_mirrors_and_a_checksum():
    assert set(PUBLISHED) == {"mnist", "fashion_mnist", "cifar10"}
    for record in PUBLISHED.values():
        assert len(set(record["mirrors"])) >= 2
        assert all(url.startswith("http") and url.endswith("/") for url in record["mirrors"])
        assert all(len(bytes.fromhex(md5)) == 16 for md5 in record["md5"].values())
        assert len(set(record["classes"])) == 10
