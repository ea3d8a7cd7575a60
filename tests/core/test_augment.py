"""Augmentation: keyed by position, what each transform does, and what the network is told."""

import math

import pytest
import torch
from tiny import random_points, tiny_trainer

from ddp.augment import AUGMENTATIONS, augment_images, draw_params, transform
from ddp.config import Config
from ddp.model import build_model
from ddp.reverse import NETWORKS

SMALL = {"channels_base": 16, "blocks_per_level": 1, "channel_mult": [1, 2], "patch_size": 1}
# the nine parameters, in their order
MIRRORED, UPSIDE_DOWN, SCALE, COS_LESS_1, SIN, STRETCH_COS, STRETCH_SIN, RIGHT, DOWN = range(9)


def images(count=8, shape=(3, 12, 16)):
    return torch.rand(count, *shape) * 2 - 1


def coordinates(size=33):
    """An image of its own coordinates, (1, 2, size, size): x and y (down), 0 at the center."""
    x = torch.arange(size) - (size - 1) / 2
    return torch.stack(torch.broadcast_tensors(x, x[:, None]))[None]


def params(**values):
    """Return parameters of one image, (1, 9), by the names above."""
    row = torch.zeros(1, 9)
    for name, value in values.items():
        row[0, globals()[name.upper()]] = value
    return row


def rotation(degrees):
    angle = math.radians(degrees)
    return {"cos_less_1": math.cos(angle) - 1, "sin": math.sin(angle)}


def inner(x, margin=8):
    return x[..., margin:-margin, margin:-margin]


# ---- a function of position ----


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_image_is_a_function_of_seed_step_and_position(kind):
    x0 = images(64)
    positions = torch.arange(64)
    whole, told = augment_images(x0, 5, 3, positions, kind)
    for part in (slice(0, None, 4), slice(3, None, 4), slice(7, 8), torch.randperm(64)):
        ours, ours_told = augment_images(x0[part], 5, 3, positions[part], kind)
        assert torch.equal(ours, whole[part])
        assert told is None or torch.equal(ours_told, told[part])
    if kind != "none":
        for seed, k, shift in ((4, 3, 0), (5, 4, 0), (5, 3, 64)):
            assert not torch.equal(augment_images(x0, seed, k, positions + shift, kind)[0], whole)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_images_that_are_given_stay_as_they_are(kind):
    x0 = images(64)
    before = x0.clone()
    ours, _ = augment_images(x0, 0, 0, torch.arange(64), kind)
    assert torch.equal(x0, before)
    assert ours.dtype == x0.dtype
    assert torch.equal(ours, x0) == (kind == "none")


def test_flip_mirrors_half_of_the_images_and_twice_is_not_at_all():
    x0 = images(1000, (1, 2, 3))
    positions = torch.arange(1000)
    flipped, told = augment_images(x0, 0, 0, positions, "flip")
    changed = (flipped != x0).flatten(1).any(dim=1)
    assert told is None
    assert torch.equal(flipped[changed], x0[changed].flip(-1))
    assert abs(changed.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(1000)
    assert torch.equal(augment_images(flipped, 0, 0, positions, "flip")[0], x0)


def test_parameters_of_edm_follow_the_paper():
    """Karras et al. 2022, table 6: each transform with probability 0.12, N(0, 1) or uniform."""
    count = 20_000
    drawn = draw_params(0, 0, torch.arange(count))
    share = (drawn != 0).double().mean(dim=0)
    expected = torch.tensor([0.5, 0.06, *[0.12] * 4, 0.06, 0.12, 0.12]).double()
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert torch.equal(drawn[:, COS_LESS_1] != 0, drawn[:, SIN] != 0)  # one transform
    assert torch.equal(drawn[:, RIGHT] != 0, drawn[:, DOWN] != 0)
    stretch = torch.hypot(drawn[:, STRETCH_COS], drawn[:, STRETCH_SIN])
    for normal in (drawn[:, SCALE], drawn[:, RIGHT], drawn[:, DOWN], stretch):
        square = normal[normal != 0].double() ** 2  # chi-squared
        assert abs(square.mean() - 1) < 5 * math.sqrt(2 / len(square))
    cos = 1 + drawn[:, COS_LESS_1][drawn[:, SIN] != 0]
    sin = drawn[:, SIN][drawn[:, SIN] != 0]
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    assert abs(cos.mean()) < 5 * math.sqrt(0.5 / len(cos))
    assert abs(sin.mean()) < 5 * math.sqrt(0.5 / len(sin))
    happened = (drawn != 0).double()[:, [MIRRORED, UPSIDE_DOWN, SCALE, SIN, STRETCH_COS, RIGHT]]
    correlation = torch.corrcoef(happened.T) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(count)


# ---- what the transforms do ----


def test_zero_is_the_identity_and_flips_are_exact():
    x0 = images(1)
    assert torch.equal(transform(x0, params()), x0)
    assert torch.equal(transform(x0, params(mirrored=1)), x0.flip(-1))
    assert torch.equal(transform(x0, params(upside_down=1)), x0.flip(-2))
    assert torch.equal(transform(x0, params(mirrored=1, upside_down=1)), x0.flip(-1, -2))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_those_of_torch(quarters):
    x0 = images(1, (3, 16, 16))
    turned = transform(x0, params(**rotation(90 * quarters)))
    torch.testing.assert_close(turned, torch.rot90(x0, quarters, (2, 3)), atol=1e-4, rtol=0)


def test_translation_by_whole_pixels_moves_them_and_the_edge_reflects():
    x0 = images(1, (2, 16, 24))  # an eighth of its sides: 2 and 3 pixels
    moved = transform(x0, params(right=1, down=-1))
    torch.testing.assert_close(moved[..., :-2, 3:], x0[..., 2:, :-3], atol=1e-4, rtol=0)
    edge = x0[..., 2:, 1:4].flip(-1)  # the first column is not repeated
    torch.testing.assert_close(moved[..., :-2, :3], edge, atol=1e-4, rtol=0)


def test_scale_of_five_doubles_the_size():
    x = coordinates()
    torch.testing.assert_close(inner(transform(x, params(scale=5))), inner(x / 2))


@pytest.mark.parametrize("degrees", [0, 30, 90, 135])
def test_stretch_is_along_its_axis_and_keeps_the_area(degrees):
    x = coordinates()
    twice = math.radians(2 * degrees)
    stretch = params(stretch_cos=5 * math.cos(twice), stretch_sin=5 * math.sin(twice))
    source = inner(transform(x, stretch), 12)
    x = inner(x, 12)
    axis = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))  # y is down

    def along(points):
        return axis[0] * points[:, 0] + axis[1] * points[:, 1]

    def across(points):
        return axis[1] * points[:, 0] - axis[0] * points[:, 1]

    # bicubic interpolation is not exact on a ramp: by a tenth of a pixel
    torch.testing.assert_close(along(source), along(x) / 2, atol=0.1, rtol=0)
    torch.testing.assert_close(across(source), across(x) * 2, atol=0.1, rtol=0)


def test_transforms_come_one_after_the_other():
    """Mirrored, scaled, turned, stretched, moved: all in one are all in turn."""
    x = coordinates(65)
    steps = [{"mirrored": 1}, {"scale": 1.5}, rotation(40)]
    steps += [{"stretch_cos": 0.8, "stretch_sin": -0.6}, {"right": 0.3, "down": 0.5}]
    in_turn = x
    together = {}
    for step in steps:
        in_turn = transform(in_turn, params(**step))
        together |= step
    at_once = transform(x, params(**together))
    torch.testing.assert_close(inner(at_once, 24), inner(in_turn, 24), atol=0.2, rtol=0)  # pixels


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 5), (2, 7, 1)])
def test_images_of_one_row_are_transformed(shape):
    ours, told = augment_images(images(64, shape), 0, 0, torch.arange(64), "edm")
    assert ours.shape == (64, *shape)
    assert ours.isfinite().all()
    assert told.shape == (64, 9)


# ---- what the network is told ----


def model_of(augment, event=(1, 8, 8), num_classes=0, **fields):
    return build_model(Config(augment=augment, **SMALL, **fields), event, num_classes).eval()


def randomized(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    return model


@pytest.mark.parametrize("log_snr", [torch.tensor(1.0), torch.linspace(-4, 4, 5)])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_zero_parameters_are_the_network_that_samples(log_snr, num_classes):
    model = randomized(model_of("edm", num_classes=num_classes))
    x_t = torch.randn(5, 1, 8, 8)
    label = torch.arange(5) % 3 if num_classes else None
    plain = model.denoise(x_t, log_snr, label)
    told = draw_params(0, 0, torch.arange(5))
    torch.testing.assert_close(model.denoise(x_t, log_snr, label, torch.zeros(5, 9)), plain)
    assert not torch.allclose(model.denoise(x_t, log_snr, label, told), plain)


def test_network_without_it_has_the_weights_that_it_always_had():
    names = set(model_of("none").state_dict())
    assert set(model_of("flip").state_dict()) == names
    assert set(model_of("edm").state_dict()) - names == {"network.embedding.augment.weight"}


def test_folded_model_is_told_too():
    model = randomized(model_of("edm"))
    told = draw_params(0, 0, torch.arange(5))
    x_t = torch.randn(5, 1, 8, 8)
    folded = model.for_inference()
    level = torch.tensor(0.5)
    torch.testing.assert_close(
        folded.denoise(x_t, level, augment=told), model.denoise(x_t, level, augment=told)
    )


def test_foreign_network_may_flip_but_cannot_be_told(monkeypatch):
    class Plain(torch.nn.Conv2d):
        def forward(self, x_t, log_snr, label=None):
            return super().forward(x_t)

    monkeypatch.setitem(NETWORKS, "plain", lambda *_, **__: Plain(1, 1, 3, padding=1))
    model = model_of("flip", network="plain")
    assert model.denoise(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="augment=edm: network=plain"):
        model_of("edm", network="plain")


# ---- in training ----


def test_points_are_not_augmented():
    with pytest.raises(ValueError, match="augment=flip is for images, not points"):
        tiny_trainer(random_points(), augment="flip")


def test_nothing_is_augmented_unless_asked():
    assert tiny_trainer().config.augment == "none"


@pytest.mark.parametrize("kind", ["flip", "edm"])
def test_training_denoises_what_augment_images_gives(kind, monkeypatch):
    trainer = tiny_trainer(augment=kind, noise_copies=2, schedule="flow", timesteps=0, shards=1)
    seen = []
    denoise = trainer.model.denoise

    def watch(x_t, log_snr, label=None, augment=None):
        seen.append((x_t, log_snr, augment))
        return denoise(x_t, log_snr, label, augment)

    monkeypatch.setattr(trainer.model, "denoise", watch)
    trainer.train_step(0.0)
    ((x_t, log_snr, told),) = seen
    x0, _ = trainer.training_batch(0, 16, 2)
    augmented, params = augment_images(x0, trainer.config.seed, 0, torch.arange(32), kind)
    eps = trainer.eps(0, augmented)
    alpha = torch.sigmoid(log_snr).sqrt().reshape(-1, 1, 1, 1)
    sigma = torch.sigmoid(-log_snr).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, alpha * augmented + sigma * eps)
    assert (told is None) == (params is None)
    assert told is None or torch.equal(told, params)


@pytest.mark.parametrize("kind", ["flip", "edm"])
def test_batchnorm_of_samples_is_of_what_is_sampled(kind, small_bn_batches, monkeypatch):
    """Mirrored images are sampled, too; what edm made of images is not."""
    trainer = tiny_trainer(augment=kind)
    seen = []

    def watch(x0, label, k, *_, **__):
        seen.append((k, x0))

    monkeypatch.setattr(trainer, "ema_loss", watch)
    trainer.recalibrated_ema()
    assert seen
    for k, x0 in seen:
        plain, _ = trainer.training_batch(k, 32)
        flipped, _ = augment_images(plain, 0, k, torch.arange(32), "flip")
        assert torch.equal(x0, flipped if kind == "flip" else plain)


@pytest.mark.parametrize("kind", ["flip", "edm"])
def test_resumed_equals_uninterrupted(kind):
    whole = tiny_trainer(augment=kind)
    first = tiny_trainer(augment=kind)
    for trainer in (whole, whole, first):
        trainer.train_step(0.0)
    resumed = tiny_trainer(augment=kind)
    resumed.load_state_dict(first.state_dict())
    resumed.train_step(0.0)
    assert resumed.step == whole.step == 2
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)
