"""Editing: what is kept is kept to the bit, and what is changed is changed as the papers say."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddp import editing, reverse
from ddp.config import Config
from ddp.data import load as load_data
from ddp.forward import alpha_sigma
from ddp.model import DiffusionModel
from ddp.schedule import Schedule

DOUBLE = {"dtype": torch.float64}


def gaussian_denoiser(xt, log_snr, mean=0.4, sd=0.5):
    alpha, sigma = alpha_sigma(log_snr, xt)
    gain = alpha * sd**2 / (alpha**2 * sd**2 + sigma**2)
    return mean + gain * (xt - alpha * mean)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_inversion_converges_and_comes_back(zero_terminal):
    """Against the flow of Gaussian data, which keeps (xt - alpha mean) / standard deviation."""
    schedule = Schedule("linear", 1000, zero_terminal=zero_terminal)
    model = SimpleNamespace(schedule=schedule)
    x0 = torch.linspace(-1, 1.5, 6, **DOUBLE)[:, None]
    errors, trips = [], []
    for steps in (50, 500):
        xt, levels = editing.inverted(gaussian_denoiser, x0, model, schedule.grid(steps))
        assert (levels.diff() > 0).all()
        assert levels[-1] == schedule.table[0]
        errors.append((xt - (x0 - 0.4) / 0.5).abs().max().item())
        back = reverse.final(reverse.sample(gaussian_denoiser, xt, levels, "ddim"))
        trips.append((back - x0).abs().max().item())
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02
    assert trips[1] < trips[0] / 4
    assert trips[1] < 0.02


def test_slerp_keeps_the_ends_and_the_length():
    a, b = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(editing.slerp(a, b, torch.zeros(5)), a)
    torch.testing.assert_close(editing.slerp(a, b, torch.ones(5)), b)
    a, b = (x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b))
    middle = editing.slerp(a, b, torch.full((5,), 0.3))
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), torch.ones(5))


def test_image_to_image_starts_where_strength_says():
    grid, x0 = Schedule("cosine", 100).grid(10), torch.rand(2, 1, 4, 4)
    for strength, steps in ((1.0, 10), (0.5, 5), (0.01, 1)):
        start = editing.image_to_image(x0, grid, strength, 0, torch.arange(2))
        assert len(start["grid"]) == steps + 1
        assert torch.equal(start["grid"], grid[-(steps + 1) :])
    faint = editing.image_to_image(x0, Schedule("cosine", 100).grid(100), 0.01, 0, torch.arange(2))
    assert (faint["xt"] - x0).abs().max() < 0.2


def test_inpainting_keeps_what_is_not_masked():
    grid, x0 = Schedule("cosine", 1000).grid(30), torch.rand(3, 1, 4, 4) * 2 - 1
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 2:] = True
    change = editing.inpaint(x0, mask, grid, 10, 3, 0, torch.arange(3))
    path = change["grid"]
    # 30 steps, and twice more the ten that end at steps 19 and 29, the cleanest level with noise
    assert (path.diff() > 0).sum() == 30 + 2 * 2 * 10
    assert (path.diff() < 0).sum() == 4
    noise = lambda: torch.randn(3, 1, 4, 4)  # noqa: E731
    states = reverse.sample(
        gaussian_denoiser, noise(), path, "ddpm", noise, project=change["project"]
    )
    made = reverse.final(states)
    assert torch.equal(made[:, :, :2], x0[:, :, :2])
    assert (made[:, :, 2:] != x0[:, :, 2:]).all()


def test_inpainting_fills_in_the_conditional_distribution():
    """Two coordinates that are nearly equal: what is filled in must follow what is kept. Jumps
    help, as RePaint says."""
    correlation = 0.95
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], **DOUBLE)

    def denoise(xt, log_snr):
        alpha, sigma = alpha_sigma(log_snr[:1], xt)
        gain = (
            alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        )
        return xt @ gain.T

    count, generator = 4000, torch.Generator().manual_seed(0)
    x0 = torch.randn(count, 2, generator=generator, **DOUBLE)
    noise = lambda: torch.randn(count, 2, generator=generator, **DOUBLE)  # noqa: E731
    mask, grid = torch.tensor([False, True]), Schedule("cosine", 1000).grid(100)
    errors = []
    for resample in (1, 8):
        change = editing.inpaint(x0, mask, grid, 5, resample, 0, torch.arange(count))
        states = reverse.sample(
            denoise, noise(), change["grid"], "ddpm", noise, 0.0, change["project"]
        )
        made = reverse.final(states)
        slope = (made[:, 0] * made[:, 1]).mean() / (made[:, 0] ** 2).mean()
        errors.append(abs(slope.item() - correlation))
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


@pytest.fixture(scope="module")
def model():
    config = Config(width=8, depth=1, dropout=0.3, timesteps=50).for_data(load_data("digits"))
    torch.manual_seed(0)
    model = DiffusionModel(config, (1, 8, 8)).eval()
    torch.nn.init.normal_(model.network.out.weight, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return model


@torch.no_grad()
def test_dropout_masks_depend_on_the_item_and_the_pass_alone(model):
    xt, log_snr = torch.randn(6, 1, 8, 8), torch.zeros(6)

    def run(items, number):
        with editing.dropout(model, 3, items, number):
            return model.denoise(xt[items], log_snr[items])

    plain, whole = model.denoise(xt, log_snr), run(torch.arange(6), 0)
    assert not torch.allclose(whole, plain, atol=1e-3)
    torch.testing.assert_close(run(torch.tensor([4, 1]), 0), whole[[4, 1]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(torch.arange(6), 1), whole, atol=1e-3)
    torch.testing.assert_close(model.denoise(xt, log_snr), plain)  # nothing stays behind


def test_dropout_keeps_the_mean():
    layer = torch.nn.Sequential(torch.nn.Dropout(0.3)).eval()
    with editing.dropout(layer, 0, torch.arange(500), 0):
        dropped = layer(torch.ones(500, 40))
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    with pytest.raises(ValueError, match="--dropout"), editing.dropout(torch.nn.ReLU(), 0, None, 0):
        pass


def test_items_come_from_pictures_and_arrays(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    expected = torch.from_numpy(pixels[..., 0] / 127.5 - 1).float()
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", pixels[..., 0])
    np.savez(tmp_path / "c.npz", labels=np.arange(3), images=pixels)
    np.save(tmp_path / "d.npy", expected[:, None].numpy().astype(np.float64))
    (tmp_path / "e").mkdir()
    for i, item in enumerate(pixels):
        Image.fromarray(item[..., 0]).save(tmp_path / "e" / f"{i}.png")
    for name in ("a.npy", "b.npy", "c.npz", "d.npy", "e"):
        x0, _ = editing.load(tmp_path / name, (1, 8, 8))
        torch.testing.assert_close(x0[:, 0], expected)
    x0, _ = editing.load(tmp_path / "e" / "1.png", (3, 8, 8))
    assert x0.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("array", "error", "word"),
    [
        (np.zeros((3, 8, 9), np.uint8), ValueError, "expected"),
        (np.zeros((3, 9, 8, 1)), ValueError, "expected"),
        (np.full((3, 1, 8, 8), math.nan), ValueError, "finite"),
        (np.zeros((0, 8, 8), np.uint8), ValueError, "expected"),
        (np.full((3, 8, 8, 1), 200.0), ValueError, "expected"),
        (np.full((3, 1, 8, 8), 200.0), ValueError, "beyond -1 to 1"),
        (np.array(["a"]), OSError, "numbers"),
        (np.array([{}], dtype=object), OSError, "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, array, error, word):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(error, match=word):
        editing.load(tmp_path / "a.npy", (1, 8, 8))


def test_masks(tmp_path):
    mask = np.zeros((6, 8), np.uint8)
    mask[:3] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    np.save(tmp_path / "m.npy", mask > 0)
    np.save(tmp_path / "ms.npy", np.stack([mask, mask.copy()]) > 0)
    for name in ("m.png", "m.npy", "ms.npy"):
        loaded = editing.load_mask(tmp_path / name, (3, 6, 8))
        assert loaded.dtype == torch.bool
        assert loaded.shape[1:] == (1, 6, 8)
        assert loaded[0, 0].tolist() == (mask > 0).tolist()
    np.save(tmp_path / "p.npy", np.array([0, 1]))
    assert editing.load_mask(tmp_path / "p.npy", (2,)).tolist() == [[False, True]]
    for wrong in (mask * 0, mask * 0 + 1, np.eye(5, 8), np.ones((1, 2, 6, 8))):
        np.save(tmp_path / "w.npy", wrong)
        with pytest.raises(ValueError, match="--mask"):
            editing.load_mask(tmp_path / "w.npy", (3, 6, 8))
    np.save(tmp_path / "w.npy", np.eye(5)[0])
    with pytest.raises(ValueError, match="--mask"):
        editing.load_mask(tmp_path / "w.npy", (2,))


def test_noise_is_not_taken_from_pictures(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(OSError, match="noise"):
        editing.load(tmp_path / "a.npz", (1, 8, 8), ["noise"])
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="npy"):
        editing.load(tmp_path / "a.png", (1, 8, 8), ["noise"])


def test_a_level_alone_cannot_be_inverted():
    schedule = Schedule("cosine", 1)
    with pytest.raises(ValueError, match="--steps 1"):
        editing.inverted(
            None, torch.zeros(1, 2), SimpleNamespace(schedule=schedule), schedule.grid(1)
        )
