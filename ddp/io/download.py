"""A checkpoint from the web: downloaded once, checked, kept in ~/.cache/ddp."""

import hashlib
import re
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag, urlsplit

from ddp.data.files import printable
from ddp.data.vision import fetch
from ddp.distributed import main_first
from ddp.io.checkpoint import read_checkpoint
from ddp.io.files import atomic_write, cache_folder, file_digest, find_checkpoint
from ddp.io.safetensors_file import SUFFIX

MAX_MODEL_BYTES = 1 << 32  # of a download


def is_url(text):
    return re.match("https?://", str(text)) is not None


def locate(text, progress=None):
    """Return (the checkpoint's path, the path beside which its results go).

    text: a path, a run's folder, or a URL, which may end in #sha256=... Of a URL results go into
    the current folder. progress: see data.load_dataset. Raises ValueError for a URL that cannot be
    one of a checkpoint, OSError when what it holds cannot be had, or is another file."""
    if not is_url(text):
        path = find_checkpoint(text)
        return path, path
    with main_first():
        path = download(text, progress)
    return path, Path(path.name)


def download(text, progress=None):
    """Return the path of a URL's checkpoint in the cache, where it comes when it is not there."""
    url, fragment = urldefrag(text)
    match = re.fullmatch("(?:sha256=([0-9a-fA-F]{64}))?", fragment)
    if match is None:
        raise ValueError(f"{printable(text)}: expected #sha256= and 64 hexadecimal digits")
    expected = match[1] and match[1].lower()
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(url).path).name)[-100:]
    if not name.endswith((".pth", SUFFIX)) or name.startswith("."):
        raise ValueError(f"{printable(text)}: expected the URL of a .pth or {SUFFIX} file")
    path = cache_folder() / "models" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if path.is_file() and expected in (None, file_digest(path)):
        return path

    def write(temporary):
        fetch(url, expected, progress, temporary, "sha256", MAX_MODEL_BYTES)
        try:
            read_checkpoint(temporary)
        except OSError as error:
            reason = str(error).replace(str(temporary), "the file")
            raise OSError(reason) from None

    try:
        return atomic_write(path, write)
    except (OSError, HTTPException, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise OSError(f"cannot download {printable(url)}: {reason}") from None
