"""Images of many files as pixels of one shape, decoded by all processors, in the order of names.

Parts of some hundred images are decoded by processes, which Python's lock does not hold up, or by
threads, where there are few images or no fork. What is kept of an image is its pixels alone."""

import collections
import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from ddp.data.files import DamagedError, printable
from ddp.data.pixels import GRAY_MODES, open_image, read_header, read_pixels

MAX_NATIVE_SIZE = 64  # images of one common size up to this keep it
DEFAULT_SIZE = (32, 32)  # (H, W)
MAX_FILE_BYTES = 1 << 28  # of one image's file
MAX_BYTES_AT_ONCE = 1 << 30  # of images that are decoded at once; larger ones go one by one
BYTES_PER_PIXEL = 8  # while an image is decoded and converted
PART_BYTES, MAX_PART = 1 << 22, 1000  # of pixels, and images, that a process decodes at a time
MIN_FOR_PROCESSES = 2000  # images; they take some tenths of a second to start
MAX_WORKERS = 64
PROBED = 32  # images that tell in which shape to begin
JOB = None  # of a process that decodes: function(start, stop)


@dataclass
class Seen:
    """What is known of images together: the same few numbers, whatever their count."""

    count: int = 0
    low: list = field(default_factory=lambda: [1 << 30, 1 << 30])  # the least height, and width
    high: list = field(default_factory=lambda: [0, 0])  # the largest
    modes: list = field(default_factory=list)  # Pillow's, sorted
    deep: int = 0  # images of 16 bits
    brightest: int = 0  # pixel of those

    def add(self, other):
        """Count in what another Seen knows."""
        self.count += other.count
        self.low = [min(pair) for pair in zip(self.low, other.low, strict=True)]
        self.high = [max(pair) for pair in zip(self.high, other.high, strict=True)]
        self.modes = sorted({*self.modes, *other.modes})
        self.deep += other.deep
        self.brightest = max(self.brightest, other.brightest)

    def add_image(self, header, brightest=0):
        """Count in an image with this Header."""
        size = list(header.size)
        deep = int(header.is_deep)
        self.add(Seen(1, size, size, [header.mode], deep, deep * brightest))

    def shape(self, image_size=None, channels=None):
        """(C, H, W) for these images, but for what is asked for."""
        if not image_size:
            is_native = self.low == self.high and max(self.high) <= MAX_NATIVE_SIZE
            image_size = self.high if is_native else DEFAULT_SIZE
        is_gray = all(mode in GRAY_MODES for mode in self.modes)
        return (channels or (1 if is_gray else 3), *image_size)


@dataclass
class Part:
    """What came of images number ... to `stop`, apart from their pixels."""

    stop: int = 0
    seen: Seen = field(default_factory=Seen)
    ours: list = field(default_factory=list)  # numbers of those that this project wrote
    skipped: list = field(default_factory=list)  # (number, why it cannot be read)

    def add(self, other):
        """Count in the part that comes next."""
        self.stop = other.stop
        self.seen.add(other.seen)
        self.ours += other.ours
        self.skipped += other.skipped

    def to_json(self):
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text):
        """Raises ValueError or TypeError when it is none."""
        values = json.loads(text)
        return cls(**{**values, "seen": Seen(**values["seen"])})


class Memory:
    """Where pixels go that are kept in memory."""

    known = None  # no earlier attempt knows anything of the images

    def begin(self, shape, known, count):
        """Take memory for `count` items; return the Part that is there already: none."""
        try:
            self.array = np.empty((count, *shape), np.uint8)  # (N, C, H, W)
        except (MemoryError, ValueError):
            raise ValueError(f"image_size={shape[1:]} needs too much memory; lower it") from None
        self.count = 0
        return Part()

    def add(self, part, pixels):
        self.array[self.count : self.count + len(pixels)] = pixels
        self.count += len(pixels)

    def items(self):
        """The items, (N, C, H, W) uint8."""
        return torch.from_numpy(self.array[: self.count])


def decode(
    files,  # name -> File
    names,  # of the images, in their order
    image_size,  # (H, W), or None
    channels,  # 1, 3, or None
    is_alone,  # the user asked for this very image, so it counts though this project wrote it
    store,  # a Memory, or what writes to a cache
    progress=None,  # makes a progress bar as tqdm does
):
    """Decode all images into the store; return (shape (C, H, W), a Part of them all).

    The shape follows from all images that can be read, and the first ones tell it mostly. Where a
    later one disproves it, decoding begins again."""
    known = store.known or probe(files, names, is_alone)
    while True:
        shape = known.shape(image_size, channels)
        done = store.begin(shape, known, len(names))
        known.add(done.seen)
        bar = (progress or partial(tqdm, disable=True))(
            total=len(names), initial=done.stop, unit=" images", desc="decoding", delay=1
        )
        with contextlib.closing(bar), closing_parts(files, names, shape, is_alone, done) as parts:
            for part, pixels in parts:
                known.add(part.seen)
                if known.shape(image_size, channels) != shape:
                    break
                bar.update(part.stop - done.stop)
                store.add(part, pixels)
                done.add(part)
        if known.shape(image_size, channels) == shape:
            if done.seen.shape(image_size, channels) == shape:
                return shape, done
            known = done.seen  # a header promised what the rest does not hold


def probe(files, names, is_alone):
    """What the headers of some images say, as a Seen."""
    known = Seen()
    for number in np.linspace(0, len(names) - 1, min(PROBED, len(names))).astype(int):
        header, _ = attempt(read_header, files[names[number]], names[number])
        if header and (is_alone or not header.is_ours):
            known.add_image(header)
    return known


@contextlib.contextmanager
def closing_parts(files, names, shape, is_alone, done):
    """An iterator of the (Part, pixels (n, C, H, W)) that are not done yet, in order."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min((cpus or 1) + 4, MAX_WORKERS)  # some wait for the disk
    by_processes = sys.platform == "linux" and len(names) - done.stop >= MIN_FOR_PROCESSES
    context = multiprocessing.get_context("fork") if by_processes else threading
    limit = MAX_BYTES_AT_ONCE // workers
    job = partial(decode_part, files, names, shape, is_alone, limit, context.RLock())
    if by_processes:  # what they are to do is theirs by the fork: nothing is sent to them
        begin = (start_worker, (job, os.getpid()))
        pool, job = ProcessPoolExecutor(workers, context, *begin), run_job
    else:
        pool = ThreadPoolExecutor(workers)
    size = min(MAX_PART, PART_BYTES // math.prod(shape), len(names) // (4 * workers))
    try:
        yield in_order(partial(pool.submit, job), done.stop, len(names), max(1, size), 2 * workers)
    except BrokenProcessPool:
        raise OSError("a process that decoded images was ended, perhaps for memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(submit, start, count, size, ahead):
    """Yield the results of parts of `size` up to `count`, while `ahead` more are computed."""
    pending = collections.deque()
    while start < count or pending:
        while start < count and len(pending) < ahead:
            stop = min(start + size, count)
            pending.append(submit(start, stop))
            start = stop
        yield pending.popleft().result()


def start_worker(job, parent):
    """Make this a process that runs the job, and ends when its parent has."""
    global JOB
    JOB = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(start, stop):
    return JOB(start, stop)


def decode_part(files, names, shape, is_alone, limit, lock, start, stop):
    """(Part, pixels (n, C, H, W)) of the images from `start` to `stop` that can be read.

    One that takes more than `limit` bytes is decoded while no other such is: under the lock."""
    part = Part(stop)
    pixels = np.empty((stop - start, *shape), np.uint8)

    def read(image):
        header = read_header(image)
        if header.is_ours and not is_alone:
            return header, None
        is_large = math.prod(header.size) * BYTES_PER_PIXEL > limit
        with lock if is_large else contextlib.nullcontext():
            return header, read_pixels(image, shape)

    for number in range(start, stop):
        file = files[names[number]]
        with lock if file.size > limit else contextlib.nullcontext():
            result, reason = attempt(read, file, names[number])
        if reason:
            part.skipped.append((number, reason))
            continue
        header, array = result
        if array is None:
            part.ours.append(number)
            continue
        pixels[part.seen.count] = array
        part.seen.add_image(header, int(array.max()))
    return part, pixels[: part.seen.count]


def attempt(function, file, name):
    """(function(image), None), or (None, why the image cannot be read).

    An error of the disk passes through: it says nothing of the image."""
    if file.size > MAX_FILE_BYTES:
        return None, f"above {MAX_FILE_BYTES:,} bytes"
    try:
        data = file.read()
    except DamagedError as error:
        return None, str(error)
    try:
        with open_image(data) as image:
            return function(image), None
    except MemoryError:
        raise ValueError(f"{printable(name)} takes more memory to decode than there is") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        text = " ".join(str(error).split("<_io")[0].split())  # without the address of a buffer
        return None, f"{type(error).__name__} {printable(text, 80)}".strip()
