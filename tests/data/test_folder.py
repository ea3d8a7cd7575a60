"""Images of every kind, in folders and .zip files, whole, damaged and hostile."""

import io
import itertools
import os
import random
import shutil
import struct
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from data_checks import gray, noise, refused, save
from PIL import Image, ImageOps, PngImagePlugin

from ddp.data import decode as decode_module
from ddp.data import load_dataset
from ddp.data import pixels as pixels_module
from ddp.data.folder import read_images
from ddp.data.layout import TEST, TRAIN, VAL
from ddp.data.vision import PUBLISHED

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)


def zipped(folder, path, top="", compression=zipfile.ZIP_DEFLATED):
    """The folder's files in a .zip, in an order that is not that of their names."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        random.Random(0).shuffle(files)
        for file in files:
            archive.write(file, top + file.relative_to(folder).as_posix())
    return path


def only(path, **options):
    """The one image there, (C, H, W) as a numpy array."""
    (item,) = read_images(path, **options).items
    return item.numpy()


def unreadable(path, match=""):
    """The message with which a path without a single readable image is refused."""
    return refused(OSError, match, read_images, path)


def chunk(kind, body):
    """The bytes of a chunk of a PNG."""
    length, check = struct.pack(">I", len(body)), struct.pack(">I", zlib.crc32(kind + body))
    return length + kind + body + check


# ---- modes ----


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
def test_color_is_kept_to_the_last_bit(tmp_path, suffix):
    array = noise(6, 9)
    save(tmp_path / f"a{suffix}", array, lossless=True)
    assert np.array_equal(only(tmp_path), array.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".Jpg"])
def test_jpeg_is_what_pillow_reads(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", noise(16, 24))
    assert np.array_equal(only(tmp_path), np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_gray_has_one_channel(tmp_path):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save(tmp_path / "a.png", array)
    assert np.array_equal(only(tmp_path), array[None])
    assert np.array_equal(only(tmp_path, channels=3), np.stack([array] * 3))


def test_black_and_white_is_scaled(tmp_path):
    array = np.eye(5, dtype=bool)
    save(tmp_path / "a.png", array)
    assert Image.open(tmp_path / "a.png").mode == "1"
    assert np.array_equal(only(tmp_path), 255 * array[None].astype(np.uint8))


def test_sixteen_bits_are_scaled(tmp_path):
    array = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    save(tmp_path / "a.png", array)
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    assert np.array_equal(only(tmp_path), (array / 257).round().astype(np.uint8)[None])
    assert np.array_equal(only(tmp_path, channels=3)[2], only(tmp_path)[0])


@pytest.fixture
def twelve_bits():
    """A picture of 12-bit samples, (H, W) uint16."""
    return np.random.RandomState(0).randint(0, 4096, (6, 8)).astype(np.uint16)


def png_with(path, array, kind, body):
    """Write a PNG with one more chunk behind its header."""
    content = save(path, array).read_bytes()
    path.write_bytes(content[:33] + chunk(kind, body) + content[33:])
    return path


def test_twelve_bits_in_sixteen_are_said_to_be_dark(tmp_path, twelve_bits):
    save(tmp_path / "a.png", twelve_bits)
    save(tmp_path / "b.png", twelve_bits)
    images = read_images(tmp_path)
    assert images.items.max() < 32
    assert any("1/8 of full brightness in 2 images of 16 bits" in line for line in images.summary)
    save(tmp_path / "b.png", twelve_bits * 16)
    assert not any("16 bits" in line for line in read_images(tmp_path).summary)


def test_sixteen_bits_in_color_are_said_to_be_dark(tmp_path):
    body = b"".join(b"\0" + bytes([7, 9] * 12) for _ in range(4))  # 4 x 4 pixels of three samples
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    images = read_images(tmp_path)
    assert (images.items == 7).all()
    assert any("1/8 of full brightness in 1 image of 16 bits" in line for line in images.summary)


def test_significant_bits_that_are_the_low_ones_are_scaled(tmp_path, twelve_bits):
    path = png_with(tmp_path / "a.png", twelve_bits, b"sBIT", b"\x0c")
    expected = (twelve_bits / (4095 / 255)).round().astype(np.uint8)
    assert np.array_equal(only(path), expected[None])
    # where they are the high ones, as the standard has it, a dark picture stays dark
    for array in (twelve_bits * 16, twelve_bits // 256 * 16, twelve_bits * 0):
        png_with(path, array, b"sBIT", b"\x0c")
        assert np.array_equal(only(path), (array / 257).round().astype(np.uint8)[None])
    png_with(path, twelve_bits, b"sBIT", b"\x00")
    assert only(path).max() < 32


@pytest.mark.parametrize("kind", ["profile", "text", "compressed text", "international text"])
def test_long_profile_or_text_is_no_reason_to_skip(tmp_path, monkeypatch, kind):
    """Pillow refuses a profile of more than a megabyte."""
    for limit in ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"):
        monkeypatch.setattr(PngImagePlugin, limit, 1000)
    long = bytes(3000)
    packed = zlib.compress(long)
    bodies = {
        "profile": (b"iCCP", b"name\0\0" + packed),
        "text": (b"tEXt", b"Comment\0" + long),
        "compressed text": (b"zTXt", b"Comment\0\0" + packed),
        "international text": (b"iTXt", b"Comment\0\1\0\0\0" + packed),
    }
    png_with(tmp_path / "a.png", noise(4, 4), *bodies[kind])
    assert np.array_equal(only(tmp_path), noise(4, 4).transpose(2, 0, 1))


def test_rotation_in_text_is_applied(tmp_path):
    """ImageMagick writes EXIF as text, and others as XMP."""
    array = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    text = b"\nexif\n%8d\n%s\n" % (len(content), content.hex().encode())
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    for kind, body in (
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    ):
        path = png_with(tmp_path / "a.png", array, kind, body)
        assert only(path)[0].tolist() == [[4, 1], [5, 2], [6, 3]]


def test_palette_is_looked_up(tmp_path):
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4) % 4
    image = Image.fromarray(indices).convert("P")
    image.putpalette(COLORS.flatten().tolist())
    image.putdata(indices.flatten().tolist())
    save(tmp_path / "a.png", image)
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert np.array_equal(only(tmp_path), COLORS[indices].transpose(2, 0, 1))


@pytest.mark.parametrize("transparency", [2, bytes([255, 255, 0, 128])])
def test_palette_entries_that_are_transparent_are_white(tmp_path, transparency):
    image = Image.new("P", (2, 2))
    image.putpalette(COLORS.flatten().tolist())
    image.putdata([0, 1, 2, 3])
    save(tmp_path / "a.png", image, transparency=transparency)
    expected = COLORS.copy()
    expected[2] = 255
    if isinstance(transparency, bytes):
        expected[3] = [255, 255, 127]
    assert np.array_equal(only(tmp_path), expected.reshape(2, 2, 3).transpose(2, 0, 1))


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", ".png"), ("RGBA", ".webp"), ("LA", ".png")])
def test_transparency_is_laid_over_white(tmp_path, mode, suffix):
    color = [(10, 200, 90), (77, 77, 77)][mode == "LA"]
    alphas = (0, 51, 128, 255)
    image = Image.new("RGBA", (4, 1))
    image.putdata([(*color, alpha) for alpha in alphas])
    save(tmp_path / f"a{suffix}", image, mode, lossless=True, exact=True)
    assert Image.open(tmp_path / f"a{suffix}").mode == mode
    expected = [[(c * a + 255 * (255 - a)) / 255 for a in alphas] for c in color]
    array = only(tmp_path)
    assert array.shape == (1 if mode == "LA" else 3, 1, 4)
    assert np.abs(array[:, 0] - np.array(expected)[: len(array)]).max() <= 1
    assert (array[:, 0, 0] == 255).all()
    assert array[:, 0, 3].tolist() == list(color)[: len(array)]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
def test_transparent_color_is_white(tmp_path, mode, key):
    save(tmp_path / "a.png", Image.fromarray(np.array([[6, 7]], np.uint8)), mode, transparency=key)
    assert (only(tmp_path) == np.array([6, 255])).all()


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    save(tmp_path / "a.jpg", image, quality=100)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    red, green, blue = only(tmp_path)
    assert red.min() > 250
    assert max(green.max(), blue.max()) < 5
    assert only(tmp_path, channels=1).shape == (1, 16, 16)


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_animation_counts_by_its_first_frame(tmp_path, suffix):
    frames = [Image.fromarray(noise(5, 5, seed)) for seed in range(3)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / f"a{suffix}").n_frames == 3
    assert np.array_equal(only(tmp_path), noise(5, 5, 0).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_rotation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.kron(noise(3, 5), np.ones((8, 8, 1), np.uint8))
    path = save(tmp_path / f"a{suffix}", array, exif=exif, lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(only(tmp_path), expected.transpose(2, 0, 1))
    assert ("width 24, height 40" in read_images(tmp_path).summary[0]) == (orientation >= 5)


def test_exif_orientation_six_is_a_quarter_turn_clockwise(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", np.array([[1, 2, 3], [4, 5, 6]], np.uint8), exif=exif)
    assert only(tmp_path)[0].tolist() == [[4, 1], [5, 2], [6, 3]]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\xff\1\x12", "99"])
def test_exif_that_is_damaged_is_ignored(tmp_path, exif):
    if exif == "99":
        exif = Image.Exif()
        exif[0x0112] = 99
    save(tmp_path / "a.jpg", noise(8, 16), exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only(tmp_path).shape == (3, 8, 16)


def test_exif_rotation_is_applied_beside_a_damaged_tag(tmp_path):
    """Pillow turns the image, but cannot write such EXIF data again."""
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0112] = 6
    damaged = exif.tobytes().replace(b"\x01\x0f\0\2", b"\x01\x00\0\2")  # a width that is text
    path = save(tmp_path / "a.png", np.array([[1, 2, 3], [4, 5, 6]], np.uint8), exif=damaged)
    with pytest.raises(Exception, match="integer"):
        ImageOps.exif_transpose(Image.open(path))
    assert only(tmp_path)[0].tolist() == [[4, 1], [5, 2], [6, 3]]


# ---- sizes and channels ----


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(8, 8), (8, 8)], (8, 8)),
        ([(20, 48), (20, 48)], (20, 48)),
        ([(64, 64), (64, 64)], (64, 64)),
        ([(65, 10), (65, 10)], (32, 32)),
        ([(8, 8), (8, 9)], (32, 32)),
        ([(8, 9), (9, 8)], (32, 32)),
        ([(1, 1)], (1, 1)),
    ],
)
def test_size_is_the_common_one_if_small(tmp_path, sizes, expected):
    for i, size in enumerate(sizes):
        save(tmp_path / f"{i}.png", gray(i, size))
    images = read_images(tmp_path)
    assert images.items.shape == (len(sizes), 1, *expected)
    assert (images.items == torch.arange(len(sizes))[:, None, None, None]).all()
    assert f"used as {expected[0]}x{expected[1]}, 1 channel" in images.summary[0]
    assert read_images(tmp_path, (3, 5)).items.shape == (len(sizes), 1, 3, 5)


def test_image_is_cropped_about_its_center(tmp_path):
    save(tmp_path / "wide.png", np.repeat(np.array([[9, 100, 200, 9]], np.uint8), 2, axis=0))
    assert only(tmp_path, image_size=(2, 2)).tolist() == [[[100, 200], [100, 200]]]
    (tmp_path / "wide.png").unlink()
    save(tmp_path / "tall.png", np.repeat(np.array([[9], [50], [60], [9]], np.uint8), 2, axis=1))
    assert only(tmp_path, image_size=(2, 2)).tolist() == [[[50, 50], [60, 60]]]
    assert only(tmp_path, image_size=(4, 2))[0, :, 0].tolist() == [9, 50, 60, 9]


def test_image_of_extreme_sides_is_read(tmp_path):
    save(tmp_path / "a.png", gray(5, (1, 3000)))
    save(tmp_path / "b.png", gray(5, (3000, 1)))
    assert (read_images(tmp_path).items == 5).all()


def test_channels_are_three_if_one_image_has_color(tmp_path):
    save(tmp_path / "a.png", gray(5))
    assert read_images(tmp_path).items.shape[1] == 1
    save(tmp_path / "b.png", noise(4, 4))
    assert read_images(tmp_path).items.shape[1] == 3
    first = read_images(tmp_path, channels=1).items
    assert first.shape[1] == 1
    assert np.array_equal(first[1, 0], np.asarray(Image.fromarray(noise(4, 4)).convert("L")))


def test_read_images_refuses_what_does_not_fit_into_memory(tmp_path):
    save(tmp_path / "a.png", gray(5))
    with pytest.raises(ValueError, match="image_size="):
        read_images(tmp_path, (10**8, 10**8))


# ---- damage ----


def test_damaged_files_are_skipped_with_a_reason(tmp_path):
    save(tmp_path / "good.png", gray(5))
    whole = save(tmp_path / "whole.jpg", noise(64, 64)).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no image")
    images = read_images(tmp_path)
    # the damaged ones are large and colored; the good one keeps its size and its one channel
    assert images.items.shape == (1, 1, 4, 4)
    skipped = {line.split(":")[0]: line for line in images.summary if line.startswith("skipped")}
    assert set(skipped) == {"skipped cut.jpg", "skipped empty.png", "skipped text.png"}
    assert "truncated" in skipped["skipped cut.jpg"]
    assert "cannot identify" in skipped["skipped text.png"]
    assert images.summary[0].startswith("1 image in ")
    assert "modes L;" in images.summary[0]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_truncated_image_is_skipped(tmp_path, suffix, fraction):
    path = save(tmp_path / f"cut{suffix}", noise(40, 40))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    unreadable(tmp_path, f"skipped cut{suffix}")
    save(tmp_path / "good.png", gray(3))
    alone = read_images(tmp_path)
    assert alone.items.shape == (1, 1, 4, 4)
    assert (alone.items == 3).all()


def test_skipped_files_are_counted(tmp_path):
    save(tmp_path / "good.png", gray(5))
    for i in range(8):
        (tmp_path / f"{i}.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a.gif").touch()
    lines = read_images(tmp_path).summary
    assert sum(line.startswith("skipped ") for line in lines) == 6
    assert "skipped 3 more that could not be read" in lines
    assert any(line.startswith("ignored 2 files other than .png") for line in lines)


def test_names_are_shown_on_one_line(tmp_path):
    for folder in ("b\nb", "c\x1b[2J"):
        save(tmp_path / folder / "good\n.png", gray(5))
        (tmp_path / folder / "bad\n.png").touch()
    images = read_images(tmp_path)
    assert all(line.isprintable() for line in images.summary)
    assert all(name.isprintable() for name in images.classes)
    for path in tmp_path.rglob("good*"):
        path.unlink()
    unreadable(tmp_path, "bad")


def test_names_that_are_not_utf8_are_read(tmp_path):
    for folder in (b"n\xe9e", b"bar"):
        place = bytes(tmp_path) + b"/" + folder
        try:
            os.makedirs(place)
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
        with open(place + b"/\xff.png", "wb") as file:
            Image.fromarray(gray(5)).save(file, "PNG")
        open(place + b"/\xfe.png", "wb").close()
    images = read_images(tmp_path)
    assert len(images.items) == 2
    assert "".join([*images.summary, *images.classes]).encode()


def bomb(side):
    """A PNG whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", b""), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bomb_is_skipped_in_silence(tmp_path, side):
    save(tmp_path / "good.png", gray(5))
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    with warnings.catch_warnings(record=True) as heard:
        images = read_images(tmp_path)
    assert not heard
    assert images.items.shape == (1, 1, 4, 4)
    assert any("bomb.png: DecompressionBomb" in line for line in images.summary)


def test_large_images_are_decoded_few_at_a_time(tmp_path, monkeypatch):
    """A palette image of 9,400 x 9,400 is 88 MB in a file of some KB, and more when converted."""
    sizes, running, most = [], [], []
    composite, read = Image.alpha_composite, decode_module.read_pixels

    def noting_composite(*images):
        sizes.append(images[0].size)
        return composite(*images)

    def noting_read(*args):
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)  # for others to come in
        pixels = read(*args)
        running.pop()
        return pixels

    monkeypatch.setattr(Image, "alpha_composite", noting_composite)
    monkeypatch.setattr(decode_module, "read_pixels", noting_read)
    monkeypatch.setattr(pixels_module, "STRIP_PIXELS", 1000)
    image = Image.fromarray(noise(200, 300)[..., 0]).convert("P")
    image.putpalette(COLORS.flatten().tolist() * 64)
    save(tmp_path / "a.png", image, transparency=2)
    assert only(tmp_path, image_size=(200, 300)).shape == (3, 200, 300)
    assert max(width * height for width, height in sizes) <= 1000
    assert len(sizes) == 67
    for i in range(8):
        shutil.copy(tmp_path / "a.png", tmp_path / f"{i}.png")
    most.clear()
    read_images(tmp_path, (200, 300))
    assert max(most) > 1
    monkeypatch.setattr(decode_module, "MAX_BYTES_AT_ONCE", 1 << 20)  # two would take more
    most.clear()
    read_images(tmp_path, (200, 300))
    assert max(most) == 1


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "EPS"])
def test_formats_other_than_the_stated_are_not_decoded(tmp_path, kind):
    """A name that ends in .png does not let in every decoder, such as PostScript's."""
    with open(tmp_path / "a.png", "wb") as file:
        Image.fromarray(noise(4, 4)).save(file, kind)
    unreadable(tmp_path, "cannot identify")


def test_formats_are_told_by_content(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        Image.fromarray(noise(4, 4)).save(file, "PNG")
    assert np.array_equal(only(tmp_path), noise(4, 4).transpose(2, 0, 1))


# ---- where images are ----


def test_hidden_files_are_passed_over(tmp_path):
    place = tmp_path / ".cache" / "images"  # the dataset itself may lie in a hidden folder
    save(place / "good.png", gray(5))
    for hidden in ("._good.png", ".hidden.png", ".thumbs/a.png", "__MACOSX/._good.png"):
        save(place / hidden, noise(9, 9))
    (place / ".DS_Store").touch()
    for path in (place, zipped(place, tmp_path / "images.zip")):
        images = read_images(path)
        assert images.items.shape == (1, 1, 4, 4)
        assert not any(line.startswith(("skipped", "ignored")) for line in images.summary)


LAYOUTS = {
    "flat": ["a.png", "b.jpg", "c.webp"],
    "nested": ["x/y/a.png", "x/y/b.jpg", "x/y/z/c.webp"],
    "classes": ["cat/a.png", "cat/deep/b.jpg", "dog/a.webp", "dog/c.png"],
    "prefix": ["train/airplane/a.png", "train/airplane/b.png", "train/bird/a.png"],
    "split": ["Train/cat/a.png", "train/dog/a.png", "test/cat/b.png", "test/dog/b.png"],
    "split below": ["d/train/x/cat/a.png", "d/train/x/dog/a.png", "d/val/x/dog/b.png"],
    "three parts": ["train/a.png", "val/a.png", "test/a.png"],
    "stray": ["cat/a.png", "dog/a.png", "cover.png"],
}
EXPECTED = {  # by file in the order of names: class, and split
    "flat": ([], None, None),
    "nested": ([], None, None),
    "classes": (["cat", "dog"], [0, 0, 1, 1], None),
    "prefix": (["airplane", "bird"], [0, 0, 1], None),
    "split": (["cat", "dog"], [0, 0, 1, 1], [TRAIN, TEST, TEST, TRAIN]),  # T stands before t
    "split below": (["cat", "dog"], [0, 1, 1], [TRAIN, TRAIN, TEST]),
    "three parts": ([], None, [TEST, TRAIN, VAL]),
    "stray": ([], None, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top", ["", "top/", "./"])
def test_folders_give_classes_and_split_as_a_zip_does(tmp_path, layout, top):
    folder = tmp_path / "folder"
    for i, name in enumerate(LAYOUTS[layout]):
        save(folder / name, noise(9, 6, seed=i))
    paths = folder, zipped(folder, tmp_path / "a.ZIP", top)
    read = [read_images(path) for path in paths]
    classes, labels, splits = EXPECTED[layout]
    for images in read:
        assert torch.equal(images.items, read[0].items)
        assert images.classes == classes
        assert labels is None or images.labels.tolist() == labels
        assert (images.labels is None) == (labels is None)
        assert splits is None or images.splits.tolist() == splits
        assert (images.splits is None) == (splits is None)
        assert any("classes" in line for line in images.summary)
        lines = [line.replace(f" {top}", " ") for line in images.summary]
        assert lines[1:] == read[0].summary[1:]
    assert len({load_dataset(str(path)).fingerprint for path in paths}) == 1


def test_items_are_in_the_order_of_names(tmp_path):
    for name in ("10", "9", "b", "a", "A"):
        save(tmp_path / f"{name}.png", gray(ord(name[0])))
    levels = read_images(tmp_path).items[:, 0, 0, 0].tolist()
    assert levels == [ord(c) for c in "19Aab"]


def test_labels_follow_their_images_when_some_are_skipped(tmp_path):
    for c, i in itertools.product(range(3), range(6)):
        save(tmp_path / f"class{c}" / f"{i}.png", gray(10 * c + i))
    (tmp_path / "class0" / "0.png").write_bytes(b"")
    whole = (tmp_path / "class1" / "3.png").read_bytes()
    (tmp_path / "class1" / "3.png").write_bytes(whole[:-20])
    images = read_images(tmp_path)
    assert len(images.items) == 16
    assert torch.equal(images.labels, images.items[:, 0, 0, 0].long() // 10)
    assert "3 classes: class0 5, class1 5, class2 6" in images.summary


def test_read_images_refuses_a_missing_or_empty_path(tmp_path):
    unreadable(tmp_path, "it holds no .png")
    (tmp_path / "notes.txt").touch()
    unreadable(tmp_path, "ignored 1 file other")
    unreadable(tmp_path / "notes.txt", "ignored 1 file other")
    unreadable(tmp_path / "none", "none is neither")
    unreadable(tmp_path / "none.zip", "none.zip")


def test_read_images_takes_one_image(tmp_path):
    save(tmp_path / "a.png", noise(8, 8))
    read = read_images(tmp_path / "a.png", (4, 6), 3)
    assert read.items.shape == (1, 3, 4, 6)


# ---- .zip ----


def test_zip_is_read_by_many_threads_at_once(tmp_path):
    for i in range(200):
        save(tmp_path / "folder" / f"{i:03d}.png", noise(8, 8, seed=i))
    path = zipped(tmp_path / "folder", tmp_path / "a.zip")
    assert torch.equal(read_images(path).items, read_images(tmp_path / "folder").items)


def test_zip_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    for content in (b"", b"PK", b"this is no archive" * 99):
        path.write_bytes(content)
        unreadable(path, "not a whole .zip")
    save(tmp_path / "folder" / "a.png", noise(8, 8))
    whole = zipped(tmp_path / "folder", path).read_bytes()
    path.write_bytes(whole[:-30])
    unreadable(path, "not a whole .zip")
    name = whole.replace(b"a.png", b"\xff\xfe.png")  # claims to be UTF-8 when its flag is set
    flagged = bytearray(name)
    flagged[flagged.index(b"PK\1\2") + 9] |= 0x08
    path.write_bytes(flagged)
    with pytest.raises(OSError, match=r"a\.zip"):
        read_images(path)


def test_zip_members_that_are_damaged_are_skipped(tmp_path):
    for name in ("bad.png", "good.png", "locked.png"):
        save(tmp_path / "folder" / name, noise(8, 8))
    path = zipped(tmp_path / "folder", tmp_path / "a.zip", compression=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    start = content.index(b"bad.png") + len("bad.png")
    content[start + 100] ^= 1  # its CRC is wrong now
    central = content.index(b"PK\1\2")
    while not content[central + 46 :].startswith(b"locked.png"):
        central = content.index(b"PK\1\2", central + 4)
    content[central + 8] |= 1  # encrypted, says the flag
    local = content.index(b"locked.png") - 30
    content[local + 6] |= 1
    path.write_bytes(content)
    images = read_images(path)
    assert len(images.items) == 1
    assert any("bad.png" in line and "CRC" in line for line in images.summary)
    assert any("locked.png" in line and "encrypted" in line for line in images.summary)


def test_zip_with_a_name_twice_holds_one_image(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(gray(5)).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a.png", buffer.getvalue())
        archive.writestr("a.png", buffer.getvalue())
    assert only(tmp_path / "a.zip").shape == (1, 4, 4)


def test_zip_member_that_unpacks_to_too_much_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_module, "MAX_FILE_BYTES", 1000)
    save(tmp_path / "folder" / "good.png", gray(5))
    (tmp_path / "folder" / "bomb.png").write_bytes(bytes(1001))
    images = read_images(zipped(tmp_path / "folder", tmp_path / "a.zip"))
    assert len(images.items) == 1
    assert any("bomb.png" in line and "1,000 bytes" in line for line in images.summary)


def test_zip_of_real_images_is_what_pillow_reads(shared_data, tmp_path):
    """200 of CIFAR-10's, from the .zip and from a folder, against Pillow alone."""
    with zipfile.ZipFile(shared_data / "cifar10-jpeg-test.zip") as source:
        names = sorted(n for n in source.namelist() if n.endswith(".jpg"))[::50]
        source.extractall(tmp_path / "folder", names)
    path = zipped(tmp_path / "folder", tmp_path / "a.zip", compression=zipfile.ZIP_STORED)
    images, again = read_images(path), read_images(tmp_path / "folder")
    assert torch.equal(images.items, again.items)
    assert images.items.shape == (200, 3, 32, 32)
    assert images.classes == PUBLISHED["cifar10"]["classes"]
    assert images.labels.bincount().tolist() == [20] * 10
    for item, label, name in zip(images.items, images.labels, names, strict=True):
        image = np.asarray(Image.open(tmp_path / "folder" / name))
        assert np.array_equal(item.numpy().transpose(1, 2, 0), image)
        assert name.split("/")[1] == images.classes[label]


# ---- the split into training and test data ----


@pytest.fixture
def folder(tmp_path):
    """100 gray images, image i of gray level i."""
    for i in range(100):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:03d}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.1, 10), (0.5, 50), (0.25, 25), (0.001, 2), (None, 10)]
)
def test_split_has_the_test_fraction(folder, fraction, count):
    parts = [load_dataset(str(folder), seed=seed, test_fraction=fraction) for seed in (0, 1)]
    assert len(parts[0].test) == count
    assert parts[0].fingerprint == parts[1].fingerprint
    assert parts[0].name == folder.name
    levels = torch.cat([parts[0].train, parts[0].test])[:, 0, 0, 0]
    assert levels.sort().values.tolist() == list(range(100))
    expected = sorted(np.random.RandomState(0).permutation(100)[:count])  # the same in every run
    assert parts[0].test[:, 0, 0, 0].tolist() == expected


def test_fingerprint_of_a_folder_changes_with_one_pixel(folder):
    before = load_dataset(str(folder)).fingerprint
    image = Image.open(folder / "050.png")
    image.putpixel((3, 3), 51)
    image.save(folder / "050.png")
    assert load_dataset(str(folder)).fingerprint != before


def test_split_needs_two_images(folder):
    for path in sorted(folder.iterdir())[2:]:
        path.unlink()
    two = load_dataset(str(folder), test_fraction=0.5)
    assert (len(two.train), len(two.test)) == (1, 1)
    (folder / "000.png").unlink()
    refused(OSError, "at least 2", load_dataset, str(folder))


def test_split_is_that_of_folders_train_and_test(folder, tmp_path):
    for part, numbers in (("train", range(30)), ("test", range(30, 40))):
        for i in numbers:
            place = tmp_path / "split" / part / ("even", "odd")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{i:03d}.png", place)
    refused(ValueError, "test_fraction=", load_dataset, str(tmp_path / "split"), test_fraction=0.5)
    dataset = load_dataset(str(tmp_path / "split"))
    assert sorted(dataset.train[:, 0, 0, 0].tolist()) == list(range(30))
    assert sorted(dataset.test[:, 0, 0, 0].tolist()) == list(range(30, 40))
    assert torch.equal(dataset.train_labels, dataset.train[:, 0, 0, 0].long() % 2)
    assert torch.equal(dataset.test_labels, dataset.test[:, 0, 0, 0].long() % 2)
    assert dataset.classes == ["even", "odd"]
