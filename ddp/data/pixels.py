"""One image's bytes as pixels of a given shape.

The rules: EXIF rotation is applied; a palette is looked up, and counts as color; transparency is
laid over white; 16 bits are scaled to 8, not cut off; CMYK becomes RGB; of an animation the first
frame counts. An image is scaled to cover the target and cropped about its center."""

import contextlib
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")  # by content: a decoder that no one asked for is a risk
GRAY_MODES = ("1", "L", "LA", "I", "I;16")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNUSED_CHUNKS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")  # color profiles, text; of any length
ROTATION_TEXT = (b"Raw profile type ", b"XML:com.adobe.xmp")  # where text says how it is turned
OUR_TEXT = b"Software\0ddp "  # in the grids and charts that this project writes
MAX_PIXELS = 89_478_485  # of an image, Pillow's own limit
STRIP_PIXELS = 1 << 20  # that are laid over white at a time


class Header(NamedTuple):  # what is known of an image before its pixels are
    size: tuple  # (height, width) as seen
    mode: str  # Pillow's
    is_deep: bool  # 16 bits a sample
    is_ours: bool  # a grid or chart that this project wrote


def png_chunks(data):
    """Yield (type, start, end, body's start) of each whole chunk of a PNG, from its first byte."""
    start = len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            break  # cut short
        yield data[start + 4 : start + 8], start, end, start + 8
        start = end


@contextlib.contextmanager
def open_image(data):
    """Pillow's image of a file's bytes, with .info["ours"], ["deep"] and ["significant_bits"].

    Of a PNG what does not bear on the pixels is cut out first: Pillow unpacks it, and refuses the
    image when it is long."""
    ours, bits = False, 16
    kept, last = [], 0
    is_png = data.startswith(PNG_SIGNATURE)
    for kind, start, end, body in png_chunks(data) if is_png else ():
        ours |= kind == b"tEXt" and data[body:end].startswith(OUR_TEXT)
        if kind == b"sBIT":
            bits = data[body] or 16
        if kind in UNUSED_CHUNKS and not data[body : body + 20].startswith(ROTATION_TEXT):
            kept.append(data[last:start])
            last = end
    deep = is_png and data[24:25] == b"\x10"  # IHDR's bit depth
    data = b"".join([*kept, data[last:]]) if kept else data
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if math.prod(image.size) > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{math.prod(image.size):,} pixels")
        image.info |= {"ours": ours, "deep": deep, "significant_bits": bits}
        yield image


def read_header(image):
    """The Header of an opened image, without its pixels where possible."""
    width, height = image.size
    size = (height, width)
    with contextlib.suppress(Exception):  # a damaged tag says nothing of the pixels
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # a quarter turn
            size = (width, height)
    return Header(size, image.mode, image.info["deep"], image.info["ours"])


def read_pixels(image, shape):
    """An opened image in the shape (C, H, W), uint8."""
    channels, height, width = shape
    bits = image.info["significant_bits"]
    image.load()  # here, so that what it raises does not pass for damaged EXIF
    with contextlib.suppress(Exception):  # a damaged tag says nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)  # turns the pixels, then edits the EXIF
    if image.mode.startswith("I"):  # 16 bits; convert() would cut them off at 255
        image = Image.fromarray(to_eight_bits(np.asarray(image), bits))
    elif image.has_transparency_data:
        image = over_white(image)
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    array = np.asarray(image)  # (H, W) or (H, W, 3)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def to_eight_bits(array, bits):
    """16-bit samples (H, W) as uint8; of a file that says that `bits` of them are significant.

    Those should be the high ones. Where all high ones are zero, and the low ones are not, they are
    the low ones."""
    step = 1 << (16 - bits) if 8 <= bits < 16 else 1  # between two samples, if they are the high
    is_low = step > 1 and array.max() < 1 << bits and (array % step > 1).any()
    return (array / (((1 << bits) - 1) / 255 if is_low else 257)).round().astype(np.uint8)


def over_white(image):
    """An image with transparency laid over white, RGB; strip by strip, to take little memory."""
    result = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return result
