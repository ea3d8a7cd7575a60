"""Items, latents, samples and masks from files of a user or another program."""

import math
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from data_checks import refused
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ddp.data.arrays import load_mask, load_samples, read_items, read_latents
from ddp.data.dataset import to_float
from ddp.data.npy import read_array

EVENT = (1, 8, 8)
PIXELS = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 1), dtype=np.uint8)  # (N, H, W, C)
X0 = torch.from_numpy(PIXELS[..., 0] / 127.5 - 1).float()[:, None]  # (N, C, H, W)


def test_items_are_the_same_from_images_and_arrays(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "b.npy", PIXELS[..., 0])
    np.savez(tmp_path / "c.npz", labels=np.arange(3), images=PIXELS)
    np.save(tmp_path / "d.npy", X0.numpy().astype(np.float64))
    (tmp_path / "e").mkdir()
    for i, item in enumerate(PIXELS):
        Image.fromarray(item[..., 0]).save(tmp_path / "e" / f"{i}.png")
    for name in ("a.npy", "b.npy", "c.npz", "d.npy", "e"):
        x0, summary = read_items(tmp_path / name, EVENT)
        torch.testing.assert_close(x0, X0)
        assert x0.dtype == torch.float32
        assert str(tmp_path / name) in summary[0]
    x0, _ = read_items(tmp_path / "e" / "1.png", (3, 8, 8))
    assert x0.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("array", "error", "match"),
    [
        (np.zeros((3, 8, 9), np.uint8), ValueError, r"\(3, 8, 9\)"),
        (np.zeros((3, 9, 8, 1)), ValueError, r"\(3, 9, 8, 1\)"),
        (np.full((3, 1, 8, 8), math.nan), ValueError, "finite"),
        (np.zeros((0, 8, 8), np.uint8), ValueError, r"\(0, 8, 8\)"),
        (np.full((3, 8, 8, 1), 200.0), ValueError, r"\(3, 8, 8, 1\)"),
        (np.full((3, 1, 8, 8), 200.0), ValueError, "beyond -1 to 1"),
        (np.zeros(8, np.uint8), ValueError, r"\(8,\)"),
        (np.uint8(8), ValueError, r"\(\)"),
        (np.array(["a"]), OSError, "numbers"),
        (np.array([{}], dtype=object), OSError, "objects"),
    ],
)
def test_items_that_do_not_fit_are_refused(tmp_path, array, error, match):
    np.save(tmp_path / "a.npy", array)
    message = refused(error, match, read_items, tmp_path / "a.npy", EVENT)
    assert str(tmp_path / "a.npy") in message


def test_array_takes_the_first_of_the_names(tmp_path):
    np.savez(tmp_path / "a.npz", b=np.arange(2), c=np.arange(3))
    assert len(read_array(tmp_path / "a.npz")) == 2
    assert len(read_array(tmp_path / "a.npz", ["d", "c", "b"])) == 3
    refused(OSError, "d or e", read_array, tmp_path / "a.npz", ["d", "e"])
    assert read_array(tmp_path / "a.png") is None


def test_array_that_is_damaged_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    np.savez_compressed(tmp_path / "a.npz", images=PIXELS)
    for name in ("a.npy", "a.npz"):
        path = tmp_path / name
        whole = path.read_bytes()
        for content in (b"", whole[:50], whole[:-40], b"<html>" * 99):
            path.write_bytes(content)
            refused(OSError, name, read_array, path)
    refused(OSError, "none.npy", read_array, tmp_path / "none.npy")
    np.savez(tmp_path / "empty.npz")
    refused(OSError, "empty.npz", read_array, tmp_path / "empty.npz")


def test_array_of_more_than_the_memory_is_refused(tmp_path):
    with open(tmp_path / "a.npy", "wb") as f:  # a header that promises 2^60 bytes
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 60,)}
        np.lib.format.write_array_header_1_0(f, header)
    refused(OSError, r"a\.npy", read_array, tmp_path / "a.npy")


def npy(header, content=b"", version=b"\1\0"):
    """The bytes of an .npy file with this text for a header."""
    length = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + length + header.encode() + content


HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }\n"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "header",
    [
        *(HEADER % ("|u1", shape) for shape in ("1000000000,", "9" * 30, "1" + "0" * 400)),
        *(
            HEADER % ("|u1", shape)
            for shape in ("True,", "-1,", "3, -8, 8", "1e9,", "2.0,", "'3',")
        ),
        *(HEADER % ("|u1", shape) for shape in ("0, " + "9" * 18, "1," * 40, "((3,),)", "None")),
        *(
            HEADER % (kind, "3,")
            for kind in ("|O", "<U1", "<c8", "<M8[s]", "|S5", "V8", "<f16", "f")
        ),
        *(HEADER % (kind, "3,") for kind in ("<i99999", "<f0", "", "|u1'], ['x', '|O")),
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }\n",
        "{'descr': '|u1', 'shape': (3,), }\n",
        "[" * 5000,
        "__import__('os').system('touch pwned')",
        "\xff\0{}",
        "",
    ],
)
def test_array_is_refused_for_what_its_header_declares(tmp_path, header, packed):
    path = tmp_path / ("a.npz" if packed else "a.npy")
    content = npy(header, bytes(64))
    path.write_bytes(content)
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", content)
    message = refused(OSError, "cannot be read as an array of numbers", read_array, path)
    assert len(message) < len(str(path)) + 250


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0"])
@pytest.mark.parametrize("kind", ["|u1", "|b1", "<f2", ">f4", "<f8", ">i8", "=u4", "|i1"])
@pytest.mark.parametrize("shape", ["", "3,", "2, 3", "0, 4"])
def test_array_is_the_one_that_numpy_reads(tmp_path, version, kind, shape):
    content = npy(HEADER % (kind, shape), bytes(range(60)), version)
    (tmp_path / "a.npy").write_bytes(content)
    expected = np.load(tmp_path / "a.npy")
    array = read_array(tmp_path / "a.npy")
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert array.tobytes() == expected.tobytes()


def test_array_in_the_order_of_fortran_is_the_same(tmp_path):
    array = np.arange(24.0).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", np.asfortranarray(array))
    assert np.array_equal(read_array(tmp_path / "a.npy"), array)


@pytest.mark.parametrize("version", [b"\0\0", b"\4\0", b"\xff\xff", b""])
def test_array_of_another_version_is_refused(tmp_path, version):
    (tmp_path / "a.npy").write_bytes(npy(HEADER % ("|u1", "3,"), bytes(3), version))
    refused(OSError, r"a\.npy", read_array, tmp_path / "a.npy")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_array_that_numpy_would_not_have_packed_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", npy(HEADER % ("|u1", "3,"), bytes(3)))
    refused(OSError, "neither stored nor deflated", read_array, tmp_path / "a.npz")


def test_archive_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", "text")
        archive.writestr("folder/", "")
    refused(OSError, "it holds no images", read_array, tmp_path / "a.npz", ["images"])
    refused(OSError, "it holds no array", read_array, tmp_path / "a.npz")


@pytest.mark.parametrize("value", [True, np.float64(1e300), np.float64("-inf"), 2**63])
def test_items_of_any_number_fit_or_are_refused(tmp_path, value):
    np.save(tmp_path / "a.npy", np.full((2, 2), value))
    if value in (True, 2**63):
        assert read_items(tmp_path / "a.npy", (2,))[0].dtype == torch.float32
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused(ValueError, "finite", read_items, tmp_path / "a.npy", (2,))


def test_samples_take_no_more_than_their_bytes_twice(tmp_path, monkeypatch):
    """They never are floats."""
    monkeypatch.setattr("ddp.data.npy.CHUNK_BYTES", 1 << 16)
    pixels = np.random.RandomState(0).randint(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=pixels)
    np.save(tmp_path / "a.npy", pixels)

    sizes = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            sizes.append(result.nbytes if isinstance(result, torch.Tensor) else 0)
            return result

    for name in ("a.npz", "a.npy"):
        with Noting():
            items, _ = load_samples(tmp_path / name, (3, 32, 32))
        assert torch.equal(items, torch.from_numpy(pixels).movedim(-1, 1))
        tracemalloc.start()
        load_samples(tmp_path / name, (3, 32, 32))
        peak = tracemalloc.get_traced_memory()[1]  # NumPy's arrays
        tracemalloc.stop()
        assert peak < 2.5 * pixels.nbytes
    assert max(sizes) <= pixels.nbytes


@pytest.mark.parametrize("name", ["latents", "noise"])
def test_latents_may_be_of_any_size(tmp_path, name):
    x_t = 3 * torch.randn(2, *EVENT)
    np.savez(tmp_path / "a.npz", images=PIXELS, **{name: x_t.numpy()})
    latents, summary = read_latents(tmp_path / "a.npz", EVENT)
    assert torch.equal(latents, x_t)
    assert "2 items" in summary[0]


def test_latents_are_not_taken_from_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS)
    refused(OSError, "latents", read_latents, tmp_path / "a.npz", EVENT)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    refused(ValueError, "npy", read_latents, tmp_path / "a.png", EVENT)


@pytest.mark.parametrize("name", ["images", "samples", "arr_0"])
def test_samples_come_back_as_pixels(tmp_path, name):
    np.savez(tmp_path / "a.npz", labels=np.arange(3), **{name: PIXELS})
    items, _ = load_samples(tmp_path / "a.npz", EVENT)
    assert items.dtype == torch.uint8
    assert torch.equal(to_float(items), to_float(torch.from_numpy(PIXELS)).movedim(-1, 1))


def test_samples_that_are_points_stay_as_they_are(tmp_path):
    points = np.random.RandomState(0).randn(5, 2).astype(np.float32)
    np.savez(tmp_path / "a.npz", points=points)
    assert torch.equal(load_samples(tmp_path / "a.npz", (2,))[0], torch.from_numpy(points))


def test_samples_that_are_float_images_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", X0.numpy())
    refused(ValueError, "uint8", load_samples, tmp_path / "a.npy", EVENT)


def test_mask_comes_from_an_image_or_an_array(tmp_path):
    mask = np.zeros((6, 8), np.uint8)
    mask[:3] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    np.save(tmp_path / "m.npy", mask > 0)
    np.save(tmp_path / "ms.npy", np.stack([mask, mask]) > 0)
    for name in ("m.png", "m.npy", "ms.npy"):
        loaded = load_mask(tmp_path / name, (3, 6, 8))
        assert loaded.dtype == torch.bool
        assert loaded.shape[1:] == (1, 6, 8)
        assert loaded[0, 0].tolist() == (mask > 0).tolist()
    np.save(tmp_path / "p.npy", np.array([0, 1]))
    assert load_mask(tmp_path / "p.npy", (2,)).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("array", "event"),
    [
        (np.zeros((6, 8)), (3, 6, 8)),
        (np.ones((6, 8)), (3, 6, 8)),
        (np.eye(5, 8), (3, 6, 8)),
        (np.ones((1, 2, 6, 8)), (3, 6, 8)),
        (np.ones(8), (3, 6, 8)),
        (np.eye(5)[0], (2,)),
        (np.float32(1), (2,)),
    ],
)
def test_mask_that_does_not_fit_is_refused(tmp_path, array, event):
    np.save(tmp_path / "w.npy", array)
    refused(ValueError, "mask=", load_mask, tmp_path / "w.npy", event)


def test_mask_on_transparency_is_refused_with_the_reason(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 4, 8))  # white on nothing, which counts as white
    image.save(tmp_path / "m.png")
    refused(ValueError, "transparent counts as white", load_mask, tmp_path / "m.png", (3, 8, 8))


def test_counts_of_one_item_are_in_the_singular(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 2)))
    assert read_items(tmp_path / "a.npy", (2,))[1] == [f"1 item in {tmp_path / 'a.npy'}"]
    assert read_latents(tmp_path / "a.npy", (2,))[1] == [f"1 item in {tmp_path / 'a.npy'}"]
