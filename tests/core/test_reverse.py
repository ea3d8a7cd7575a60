"""The reverse network: its shapes, the order of its layers, its initialization, its labels."""

import itertools

import pytest
import torch
from torch import nn

from ddp.blocks import ACTIVATIONS, NORMS, Attention, Block, Layers
from ddp.reverse import (
    INITS,
    MLP,
    NETWORKS,
    UNet,
    fold_patches,
    fourier_features,
    unfold_patches,
)

NAMES = ("unet", "unet of sequences", "mlp")
EVENTS = {"unet": (1, 8, 8), "unet of sequences": (3, 8), "mlp": (2,)}
SMALL = {
    "unet": {"channels_base": 16, "blocks_per_level": 1, "channel_mult": [1, 2]},
    "mlp": {"channels_base": 16, "blocks_per_level": 2},
}


def build(name, num_classes=0, **options):
    """Return a small network for items of EVENTS[name]."""
    kind = name.split()[0]
    return NETWORKS[kind](EVENTS[name], num_classes, **{**SMALL[kind], **options})


def inputs(event, batch=3, num_classes=0):
    """Return x_t, log_snr (B,) and label (B,) or None."""
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(batch) % num_classes if num_classes else None
    x_t = torch.randn(batch, *event, generator=generator)
    return x_t, torch.linspace(-5, 5, batch), label


def blocks_of(network):
    return [module for module in network.modules() if isinstance(module, Block)]


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (30, 45), (1, 1), (5, 64), (33, 31)])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("channel_mult", [[1], [1, 2], [1, 2, 2]])
def test_unet_takes_images_of_any_size(size, patch_size, channel_mult):
    event = (3, *size)
    network = UNet(event, 0, 8, 1, channel_mult, patch_size, init="default")
    x_t, log_snr, _ = inputs(event)
    assert network(x_t, log_snr).shape == (3, *event)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 45, 1000])
@pytest.mark.parametrize("patch_size", [1, 2, 5])
def test_unet_takes_sequences_of_any_length(length, patch_size):
    network = UNet((2, length), 0, 8, 1, [1, 2, 2], patch_size, init="default")
    x_t, log_snr, _ = inputs((2, length))
    assert network(x_t, log_snr).shape == (3, 2, length)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_unet_shifts_its_output_with_a_sequence(patch_size):
    """By multiples of its stride, away from the ends."""
    network = UNet((1, 256), 0, 8, 1, [1, 2], patch_size, init="default").eval()
    x = torch.zeros(1, 1, 256)
    x[..., 120:130] = torch.randn(10)
    level = torch.zeros(1)
    shift = 3 * network.stride
    background = network(torch.zeros_like(x), level)
    moved = network(x.roll(shift, dims=-1), level) - background
    expected = (network(x, level) - background).roll(shift, dims=-1)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(moved[..., 60:200], expected[..., 60:200], rtol=1e-4, atol=1e-6)


def test_patches_of_a_sequence_fold_as_those_of_an_image_of_one_column():
    x = torch.randn(2, 3, 12)
    folded = fold_patches(x, 4)
    assert folded.shape == (2, 12, 3)
    assert torch.equal(folded[1, 4:8, 2], x[1, 1, 8:])  # the second channel, the third patch
    assert torch.equal(unfold_patches(folded, 4), x)


def test_network_of_another_kind_of_items_is_refused():
    with pytest.raises(ValueError, match="network=mlp: expected points"):
        MLP((1, 8, 8))
    with pytest.raises(ValueError, match="network=unet: expected items"):
        UNet((2,))


def test_unet_cuts_padding_off_where_it_was_put():
    """An image is the same in a larger one that needs no padding, made by replication."""
    network = build("unet", channels_base=8, init="default").eval()
    x = torch.randn(1, 1, 7, 5)
    padded = nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    level = torch.zeros(1)
    torch.testing.assert_close(network(x, level), network(padded, level)[..., :7, :5])


def test_unet_refuses_a_resolution_that_it_does_not_have():
    with pytest.raises(ValueError, match="attention_resolutions"):
        UNet((1, 8, 8), channels_base=8, channel_mult=[1, 2], attention_resolutions=[4, 5])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("norm", "activation", "init"), list(itertools.product(NORMS, ACTIVATIONS, INITS))
)
def test_network_is_made_of_what_was_chosen(name, norm, activation, init):
    network = build(
        name, norm=norm, activation=activation, init=init, dropout=0.1, attention_resolutions=[4]
    )
    kinds = {type(module) for module in network.modules()}
    assert (nn.BatchNorm2d in kinds or nn.BatchNorm1d in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group")
    assert (nn.LeakyReLU in kinds) == (activation == "leaky_relu")
    assert (nn.SiLU in kinds) == (activation == "silu")
    assert nn.Dropout in kinds
    assert (Attention in kinds) == (name != "mlp")
    output = network(*inputs(EVENTS[name]))
    assert output.isfinite().all()
    assert output.any() == (init == "default")  # the others start at zero
    output.sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", ["kaiming", "xavier"])
def test_init_keeps_the_variance(name, init):
    """Kaiming's for the slope of LeakyReLU, Glorot's for fan in and fan out."""
    slope = 0.3
    network = build(name, channels_base=64, negative_slope=slope, init=init)
    for block in blocks_of(network):
        weight = block.layer1.weight
        fan_in = weight[0].numel()
        fan_out = weight[:, 0].numel()
        variance = 2 / ((1 + slope**2) * fan_in)
        if init == "xavier":
            variance = 2 / (fan_in + fan_out)
        assert weight.std().item() == pytest.approx(variance**0.5, rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["kaiming", "xavier"])
def test_block_starts_as_its_skip(norm, init):
    network = build("mlp", norm=norm, init=init)
    x, embedding = torch.randn(2, 8, 16)
    block = network.blocks[0]
    torch.testing.assert_close(block(x, embedding), block.activation(x))


@pytest.mark.parametrize("size", [(8, 8), (8,)])
def test_attention_starts_as_its_skip(size):
    network = build("unet" if len(size) == 2 else "unet of sequences", attention_resolutions=[8])
    (attention, *_) = [m for m in network.modules() if isinstance(m, Attention)]
    x = torch.randn(2, 16, *size)
    assert torch.equal(attention(x), x)


def test_attention_heads_divide_the_channels():
    layers = Layers(dims=2)
    heads = [Attention(layers, channels).heads for channels in (16, 32, 64, 96, 112)]
    assert heads == [1, 1, 2, 3, 2]
    assert Attention(layers, 112)(torch.randn(2, 112, 4, 4)).shape == (2, 112, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_noise_level_is_not_cancelled_by_batchnorm(name):
    """Just before a BatchNorm, the level's shift would not reach the output in training mode."""
    network = build(name, channels_base=32, init="default").train()
    x = torch.randn(64, *EVENTS[name])
    one = network(x, torch.full((64,), -3.0))
    other = network(x, torch.full((64,), 3.0))
    assert (one - other).abs().mean() > 0.05 * one.std()


@pytest.mark.parametrize("name", NAMES)
def test_batchnorm_follows_its_layer_so_that_it_folds(name):
    """In eval mode layer and BatchNorm are one layer with other weights."""
    network = build(name, init="default")
    for _ in range(3):
        network.train()(*inputs(EVENTS[name], 32))  # statistics worth folding
    expected = network.eval()(*inputs(EVENTS[name]))
    fuse = nn.utils.fuse_linear_bn_eval if name == "mlp" else nn.utils.fuse_conv_bn_eval
    for block in blocks_of(network):
        block.layer1 = fuse(block.layer1, block.norm1)
        block.layer2 = fuse(block.layer2, block.norm2)
        block.norm1 = nn.Identity()
        block.norm2 = nn.Identity()
    torch.testing.assert_close(network(*inputs(EVENTS[name])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_hidden_weights_are_those_of_the_blocks_and_scale_invariant_before_a_norm(name, norm):
    """In training mode twice the weight is the same function; Muon's step is chosen for that."""
    network = build(name, norm=norm, channels_base=128, init="default").train()
    weights, scale_invariant = network.hidden_weights()
    assert scale_invariant == (norm != "none")
    assert len(weights) == 2 * len(blocks_of(network))
    before = network(*inputs(EVENTS[name], 32))
    with torch.no_grad():
        for weight in weights:
            weight *= 2
    after = network(*inputs(EVENTS[name], 32))
    close = torch.allclose(after, before, rtol=1e-2, atol=1e-3)
    assert close == (norm != "none")


@pytest.mark.parametrize("name", NAMES)
def test_label_changes_the_output_and_none_is_the_null_label(name):
    network = build(name, num_classes=3, init="default").eval()
    x = torch.randn(1, *EVENTS[name]).expand(4, *EVENTS[name])
    level = torch.zeros(4)
    outputs = network(x, level, torch.arange(4))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 4
    torch.testing.assert_close(network(x, level)[0], outputs[3])


@pytest.mark.parametrize("name", NAMES)
def test_levels_beyond_all_bounds_are_finite(name):
    network = build(name, init="default").eval()
    level = torch.tensor([float("inf"), -float("inf"), 1e9])
    x_t = torch.randn(3, *EVENTS[name])
    assert network(x_t, level).isfinite().all()
    for one in level:
        assert network(x_t, one).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_level_for_all_equals_a_level_for_each(name, norm, num_classes):
    network = build(name, num_classes, norm=norm, init="default", attention_resolutions=[4]).eval()
    x_t, _, label = inputs(EVENTS[name], 6, num_classes)
    for level in (-20.0, -1.5, 0.0, 3.0):
        log_snr = torch.tensor(level)
        for given in (label, None):
            for_all = network(x_t, log_snr, given)
            for_each = network(x_t, log_snr.expand(6), given)
            torch.testing.assert_close(for_all, for_each, rtol=1e-5, atol=1e-5)


def test_one_embedding_serves_a_batch_of_one_level():
    """Of one level for all, FiLM goes into the weights, but not where labels differ."""
    network = build("unet", num_classes=3, channels_base=8, norm="none", init="default").eval()
    shapes = []
    network.embedding.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
    x_t, _, label = inputs(EVENTS["unet"], 3, 3)
    level = torch.tensor(0.5)
    for given in (label, None):
        whole = network(x_t, level, given)
        alone = network(x_t[:1], level, None if given is None else given[:1])
        torch.testing.assert_close(alone, whole[:1], rtol=1e-5, atol=1e-6)
    assert shapes == [(3, 32), (1, 32), (32,), (32,)]


def test_mlp_of_many_dimensions_passes_noise_by_its_narrow_layers():
    """Times a gain by noise level, which starts at 0; folding keeps it."""
    network = MLP((100,), channels_base=16).eval()
    x_t, log_snr, _ = inputs((100,))
    assert not network(x_t, log_snr).any()
    nn.init.ones_(network.gain.bias)
    assert torch.equal(network(x_t, log_snr), x_t)
    network.requires_grad_(False).fold_for_inference(torch.float32)
    assert torch.equal(network(x_t, log_snr[0]), x_t)


def test_mlp_tells_close_points_apart_only_where_little_noise_is():
    """Its Fourier features are damped by their mean over the noise."""
    network = MLP((2,), init="default", channels_base=16).eval()
    features = []
    network.proj_in.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    x = torch.tensor([[0.5, 0.0], [0.5 + 1 / 32, 0.0]])  # half the shortest period, 1/16
    for level in (10.0, -10.0):
        network(x, torch.tensor(level))
    apart = [(f[0, 2:] - f[1, 2:]).abs().max() for f in features]  # beyond the points themselves
    assert apart[0] > 1
    assert apart[1] < 0.1


def fourier_unet(event=(1, 8, 8), **options):
    options = {"channels_base": 16, "blocks_per_level": 1, "init": "default", **options}
    return UNet(event, fourier_features=3, **options).eval()


def seen_by(network):
    """Return a list to which each call of a U-Net adds what its first layer sees."""
    seen = []
    network.conv_in.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("event", [(3, 8, 8), (1, 7, 5), (2, 12)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_unet_sees_fourier_features(event, patch_size):
    network = fourier_unet(event, patch_size=patch_size)
    seen = seen_by(network)
    x_t, log_snr, _ = inputs(event)
    assert network(x_t, log_snr).shape == x_t.shape
    assert seen[0].shape[1] == 7 * event[0] * patch_size ** (len(event) - 1)
    for_all = network(x_t, log_snr[1])
    torch.testing.assert_close(for_all, network(x_t, log_snr[1].expand(3)), rtol=1e-5, atol=1e-5)


def test_fourier_features_have_periods_of_gray_values():
    """The first does not tell 256 values apart, but what lies between them; the second does."""
    pixels = torch.arange(256.0)
    x = (2 * pixels / 255 - 1)[:, None]  # (256, 1)
    frequencies = fourier_unet().frequencies
    features = fourier_features(x, torch.tensor(float("inf")), frequencies)  # (256, 6)
    sin, cos = features.unflatten(1, (2, 3)).unbind(dim=1)  # (256, 3)
    for j, period in enumerate((1, 2, 4)):
        torch.testing.assert_close(sin[period:, j], sin[:-period, j], rtol=0, atol=1e-3)
        torch.testing.assert_close(cos[period:, j], cos[:-period, j], rtol=0, atol=1e-3)
    assert ((sin[1:, 1] - sin[:-1, 1]).abs() + (cos[1:, 1] - cos[:-1, 1]).abs()).min() > 1


def test_fourier_features_are_damped_by_their_mean_over_the_noise():
    """E[sin(f (x + sigma eps))] = exp(-sigma^2 f^2 / 2) sin(f x)."""
    frequency = torch.tensor([3.0])
    x, eps = torch.tensor(0.4), torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    for level in (-4.0, 0.0, 3.0):
        log_snr = torch.tensor(level)
        sigma = torch.sigmoid(-log_snr).sqrt()
        mean = torch.sin(3 * (x + sigma * eps)).mean()
        feature = fourier_features(x.reshape(1, 1), log_snr, frequency)[0, 0]
        torch.testing.assert_close(feature, mean, rtol=0, atol=5e-3)


def test_unet_in_bf16_sees_what_bf16_cannot_tell_apart():
    """The features are taken in float32, of a folded network, too."""
    network = fourier_unet(channels_base=32).requires_grad_(False)
    network.fold_for_inference(torch.bfloat16)
    assert network.frequencies.dtype == torch.float32
    seen = seen_by(network)
    for shift in (0, 1e-3):  # an eighth of a gray value; bf16 has steps of 1/256 here
        network(torch.full((1, 1, 8, 8), -0.95 + shift), torch.tensor(14.0))
    pixel, *features = (seen[0] - seen[1]).abs().amax(dim=(0, 2, 3)).float()
    assert pixel == 0
    assert max(features) > 0.2
