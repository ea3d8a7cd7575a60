"""Decoded images of a folder or .zip in one file, which is mapped into memory: decoded once.

A cache is a folder of images.npy (N, C, H, W), labels.npy, splits.npy and cache.json, which says of
what files it is. It appears whole; until then a hidden folder holds the parts that are done, and
the next process to come goes on from there."""

import contextlib
import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddp.data.decode import Part, Seen
from ddp.data.files import printable
from ddp.data.layout import MAX_NAME, TEST
from ddp.data.listing import digest_of
from ddp.data.mapped import Mapped
from ddp.io.files import atomic_write

try:
    import fcntl
except ImportError:  # Windows, where two processes that decode at once do it twice
    fcntl = None

VERSION = 1  # of what is kept, and of the rules by which images are read, split and labeled
MAX_BYTES_IN_MEMORY = 1 << 30  # of decoded images that are not kept on the disk unless asked
HIDDEN_FOLDER = ".ddp-cache"  # beside the data
HEADER_BYTES = 128  # of images.npy, whatever its shape
MAX_LINE = 10_000  # characters of a line of text
DAMAGE = (OSError, ValueError, LookupError, TypeError, EOFError)


class Cache:
    """The place of one dataset's decoded images, for one size and number of channels."""

    def __init__(self, path, folder=None, image_size=None, channels=None):
        """folder: default a hidden one beside the data, used where they are many.

        Raises ValueError when the folder lies within the data."""
        path = Path(path).resolve()
        self.path = path
        self.is_asked = folder is not None
        self.folder = Path(os.path.expanduser(folder or path.parent / HIDDEN_FOLDER)).absolute()
        if path.is_dir() and self.folder.resolve().is_relative_to(path):
            raise ValueError(f"cache={folder} lies within dataset={path}; choose another folder")
        key = repr((str(path), image_size and tuple(image_size), channels))
        code = hashlib.blake2b(key.encode(errors="backslashreplace"), digest_size=6).hexdigest()
        self.entry = self.folder / f"{path.stem[:40]}-{code}"
        self.partial = self.folder / f".{self.entry.name}.partial"
        self.digest = digest_of(path)
        self.remarks = []  # lines of text: why what is there is not used

    def wants(self, count):
        """Whether `count` bytes of decoded images are to be kept here."""
        return self.is_asked or count > MAX_BYTES_IN_MEMORY

    def load(self):
        """A dict of items (a Mapped), labels, splits, classes and summary; None without them.

        None as well, and a remark, when they are damaged or of files that have changed since."""
        if not self.entry.is_dir():
            return None
        place = printable(self.entry, 1000)
        try:
            record = json.loads((self.entry / "cache.json").read_text(encoding="utf-8"))
            if record["digest"] != self.digest or record["version"] != VERSION:
                name = printable(self.path, 1000)
                self.remarks = [f"{name} has changed since it was decoded: decoded again"]
                return None
            values = {"classes": [printable(name, MAX_NAME) for name in record["classes"]]}
            images = np.load(self.entry / "images.npy", mmap_mode="r")
            if images.dtype != np.uint8 or list(images.shape) != record["shape"]:
                raise ValueError
            for name, limit in (("labels", len(values["classes"])), ("splits", TEST + 1)):
                values[name] = self.load_array(name, len(images), limit) if record[name] else None
            lines = [printable(line, MAX_LINE) for line in record["summary"]]
        except DAMAGE:
            self.remarks = [f"{place} is damaged: decoded again"]
            return None
        values["items"] = Mapped(np.asarray(images), images.shape[1:])
        lines += [*self.remarks, f"decoded images: {images.nbytes:,} bytes in {place}"]
        return values | {"summary": lines}

    def load_array(self, name, count, limit):
        """A tensor (count,) of integers from -1 to below the limit. Raises ValueError."""
        array = np.load(self.entry / f"{name}.npy")
        if array.shape != (count,) or array.min() < -1 or array.max() >= limit:
            raise ValueError
        return torch.from_numpy(array).long()

    @contextlib.contextmanager
    def lock(self, progress=None):
        """A context in which no other process decodes into this cache; waits for its turn.

        The lock is the system's, so it ends with the process, however that ends."""
        with self.named_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f".{self.entry.name}.lock", "ab")  # noqa: SIM115
        with file:
            if fcntl:
                self.wait_for(file, progress or partial(tqdm, disable=True))
            yield

    def wait_for(self, file, progress):
        """Lock a file; show a line while another process has it."""
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = f"waiting for another process that decodes {printable(self.path.name)}"
                with contextlib.closing(progress(desc=text, bar_format="{desc}")):
                    fcntl.flock(file, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def named_errors(self):
        """A context in which an error of the disk says what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cache={self.folder} cannot be written ({error.strerror}); {self.path} needs a "
                "folder for its decoded images: choose another cache"
            ) from None

    def fingerprint(self, dataset, split):
        """A Dataset's fingerprint, computed the first time that these images are split so."""
        path = self.entry / "fingerprints.json"
        known = {}
        with contextlib.suppress(*DAMAGE):
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        if isinstance(known.get(split), str):
            return known[split]
        text = json.dumps({**known, split: dataset.fingerprint})
        with contextlib.suppress(OSError):  # it may not be ours to write
            atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))
        return dataset.fingerprint


class CacheStore:
    """Where pixels go that are kept in a Cache, part by part; see decode.Memory.

    progress.jsonl tells the parts that are done: what they are of, then a line for each."""

    def __init__(self, cache):
        self.cache = cache
        self.images = self.log = None  # files, while they are written
        self.known, self.shape, self.done, self.rows = None, None, Part(), 0
        with contextlib.suppress(*DAMAGE):
            head, *lines = (cache.partial / "progress.jsonl").read_bytes().splitlines()
            head = json.loads(head)
            if [head["digest"], head["version"]] == [cache.digest, VERSION]:
                self.known, self.shape = Seen(**head["known"]), tuple(head["shape"])
            for line in lines:  # the last one may be cut short
                self.done.add(Part.from_json(line))

    def begin(self, shape, known, count):
        """Go on, or begin again where the shape is another; return the Part that is done."""
        cache = self.cache
        self.close()
        size = int(np.prod(shape))  # bytes of an item
        rows = self.done.seen.count
        path = cache.partial / "images.npy"
        with self.writing():
            resumes = self.shape == shape and path.is_file()
            if not (resumes and path.stat().st_size >= HEADER_BYTES + rows * size):
                rows, self.done = 0, Part()
                shutil.rmtree(cache.partial, ignore_errors=True)
                cache.partial.mkdir()
                path.write_bytes(bytes(HEADER_BYTES))
            free = shutil.disk_usage(cache.partial).free
            needed = (count - self.done.stop) * size
            if needed > free:
                raise OSError(0, f"{needed:,} bytes are needed, {free:,} are free")
            self.images = open(path, "r+b")  # noqa: SIM115
            self.images.truncate(HEADER_BYTES + rows * size)
            self.images.seek(0, os.SEEK_END)
            self.log = open(cache.partial / "progress.jsonl", "w", encoding="utf-8")  # noqa: SIM115
            head = {"digest": cache.digest, "version": VERSION}
            self.write_line(json.dumps({**head, "shape": shape, "known": vars(known)}))
            if self.done.stop:
                self.write_line(self.done.to_json())
        self.shape, self.rows = shape, rows
        return self.done

    @contextlib.contextmanager
    def writing(self):
        """A context in which an error of the disk leaves nothing half-written behind."""
        try:
            with self.cache.named_errors():
                yield
        except OSError:
            self.close()
            shutil.rmtree(self.cache.partial, ignore_errors=True)
            raise

    def write_line(self, text):
        self.log.write(f"{text}\n")
        self.log.flush()

    def add(self, part, pixels):
        with self.writing():
            self.images.write(pixels.data)
            self.rows += len(pixels)
            self.images.flush()
            self.write_line(part.to_json())

    def close(self):
        for file in (self.images, self.log):
            if file:
                with contextlib.suppress(OSError):  # of a full disk, which has been said
                    file.close()

    def items(self):
        """None: they are the cache's when all is done."""

    def finish(self, images):
        """Make it the cache of these folder.Images."""
        cache = self.cache
        shape = [self.rows, *self.shape]
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        record = {"digest": cache.digest, "version": VERSION, "shape": shape}
        record |= {"classes": images.classes, "summary": images.summary}
        with self.writing():
            self.images.seek(0)
            np.lib.format.write_array_header_1_0(self.images, header)
            self.images.flush()  # what close() would not tell of
            os.fsync(self.images.fileno())
            self.close()
            (cache.partial / "progress.jsonl").unlink()
            for name in ("labels", "splits"):
                values = getattr(images, name)
                record[name] = values is not None
                if record[name]:
                    np.save(cache.partial / f"{name}.npy", values.numpy().astype(np.int32))
            (cache.partial / "cache.json").write_text(json.dumps(record), encoding="utf-8")
            old = cache.entry.with_name(f".{cache.entry.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if cache.entry.is_dir():
                cache.entry.rename(old)
            cache.partial.rename(cache.entry)
            shutil.rmtree(old, ignore_errors=True)
