"""The reverse diffusion step network: it takes a noisy sample and its noise level.

A U-Net for images and sequences, an MLP for points, of the blocks in blocks.py. A network of one's
own is any nn.Module behind a function in NETWORKS; see there for the contract.
"""

import contextlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddp.blocks import CONV_LAYERS, Attention, Block, Layers, NoiseEmbedding, batch_norms

INITS = ("kaiming", "xavier", "default")
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d}  # by the number of spatial dimensions
GRAY_VALUE = 1 / 127.5  # what tells neighbors of 256 values from -1 to 1 apart
FOURIER_FEATURES = 6  # of each coordinate of a point: periods of 2, 1, ..., 1/16 std
FOURIER_DIMS = 64  # of more they cost most of a step and gain little: docs/training.md, Vectors


class ReverseNetwork(nn.Module):
    """What the U-Net and the MLP share: how they are folded, and which weights Muon trains."""

    def fold_for_inference(self, dtype):
        """Fuse every BatchNorm and cast the weights to dtype, in place; for eval mode only."""
        for module in list(self.modules()):
            if isinstance(module, (Block, Attention)):
                module.fold()
        for child in self.children():
            if child is not self.embedding:  # its frequencies would lose their digits
                child.to(dtype)

    def hidden_weights(self):
        """Return the weights within the residual blocks, and whether a norm cancels their scale."""
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        weights = [layer.weight for block in blocks for layer in (block.layer1, block.layer2)]
        return weights, not isinstance(blocks[0].norm1, nn.Identity)

    def apply_stage(self, stage, x, embedding):
        for module in stage:
            inputs = (x, embedding) if isinstance(module, Block) else (x,)
            if self.checkpoint_activations and torch.is_grad_enabled():
                contexts = partial(recompute_contexts, module)
                x = checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
            else:
                x = module(*inputs)
        return x


def recompute_contexts(module):
    """Return the contexts of a module's forward pass and of its recomputation."""
    return contextlib.nullcontext(), frozen_statistics(module)


@contextlib.contextmanager
def frozen_statistics(module):
    """Let each BatchNorm of a module count in copies of its running statistics."""
    norms = batch_norms(module)
    buffers = [dict(norm.named_buffers()) for norm in norms]
    for norm in norms:
        for name, value in norm.named_buffers():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, its_buffers in zip(norms, buffers, strict=True):
            for name, value in its_buffers.items():
                setattr(norm, name, value)


def init_weights(network, out_layer, init, negative_slope):
    """Initialize every weight.

    `kaiming` keeps the variance through LeakyReLU (He et al. 2015), `xavier` is Glorot & Bengio
    2010. Both start residual branches, FiLM and the output at zero, so that the network begins as
    its skip connections (Goyal et al. 2017). `default` is PyTorch's own initialization."""
    if init == "default":
        return
    for module in network.modules():
        if isinstance(module, CONV_LAYERS):
            if init == "kaiming":
                nn.init.kaiming_normal_(module.weight, a=negative_slope, nonlinearity="leaky_relu")
            else:
                nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Block):
            has_norm = not isinstance(module.norm2, nn.Identity)
            nn.init.zeros_((module.norm2 if has_norm else module.layer2).weight)
            nn.init.zeros_(module.film.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    nn.init.zeros_(out_layer.weight)


class UNet(ReverseNetwork):
    """A U-Net for images and sequences of any size: x_t (B, C, H, W) or (B, C, L) -> like it."""

    def __init__(
        self,
        event,  # (C, H, W) or (C, L)
        num_classes=0,  # labels that the network is told; 0: unconditional
        channels_base=32,  # channels of the first resolution
        blocks_per_level=3,
        channel_mult=(1, 2),  # channels of each resolution, in units of channels_base
        patch_size=1,  # so many neighbors, each way, are folded into channels
        attention_resolutions=(),  # feature-map sizes with self-attention
        init="xavier",
        negative_slope=0.01,
        checkpoint_activations=False,  # recompute blocks in the backward pass, to save memory
        fourier_features=0,  # of each pixel: periods of 1, 2, 4, ... gray values
        num_augment=0,  # numbers that say how an image was augmented
        **options,  # norm, activation, dropout: of Layers
    ):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        if len(event) not in (2, 3):
            raise ValueError(f"network=unet: expected items (C, H, W) or (C, L), not {event}")
        layers = Layers(len(event) - 1, negative_slope=negative_slope, **options)
        self.event = tuple(event)
        self.patch_size = patch_size
        self.num_augment = num_augment
        size = 4 * channels_base  # of the embedding
        self.embedding = NoiseEmbedding(size, layers.activation, num_classes, num_augment)
        attends = self.find_resolutions(attention_resolutions, len(channel_mult))

        def stage(c_in, c_out, has_attention):
            modules = [Block(layers, c_in, c_out, size)]
            modules += [Block(layers, c_out, c_out, size) for _ in range(blocks_per_level - 1)]
            return nn.ModuleList(modules + ([Attention(layers, c_out)] if has_attention else []))

        channels = [channels_base * m for m in channel_mult]  # of each resolution
        inputs = event[0] * patch_size**layers.dims
        self.register_buffer("frequencies", gray_frequencies(fourier_features), persistent=False)
        self.conv_in = layers.conv(inputs * (1 + 2 * fourier_features), channels[0], kernel_size=3)
        self.down = nn.ModuleList()
        for i, c in enumerate(channels):
            self.down.append(stage(channels[max(i - 1, 0)], c, attends[i]))
        self.up = nn.ModuleList()
        for i in reversed(range(len(channels) - 1)):  # what comes from below, and the skip
            self.up.append(stage(channels[i + 1] + channels[i], channels[i], attends[i]))
        self.conv_out = layers.conv(channels[0], inputs, kernel_size=3)
        init_weights(self, self.conv_out, init, negative_slope)

    @property
    def stride(self):
        """Pixels of which sides are padded to a multiple."""
        return self.patch_size * 2 ** (len(self.down) - 1)

    def find_resolutions(self, wanted, levels):
        """Return for each level whether its feature maps have one of the wanted shorter sides.

        Raises ValueError when one is wanted that no level has."""
        sides = feature_sides(self.event, self.patch_size, levels)
        if set(wanted) - set(sides):
            raise ValueError(
                f"attention_resolutions={wanted}: expected some of {sides}, the shorter sides of "
                "the feature maps"
            )
        return [side in wanted for side in sides]

    def forward(self, x_t, log_snr, label=None, augment=None):
        dtype = self.conv_in.weight.dtype  # float32, or bf16 after folding
        embedding = self.embedding(log_snr, label, augment).to(dtype)
        size = x_t.shape[2:]  # (H, W) or (L,)
        padding = []  # the last axis first: before it and behind it
        for side in reversed(size):
            padding += [0, -side % self.stride]
        if len(self.frequencies):  # in float32, which tells x_t near clean data apart
            x_t = torch.cat([x_t, fourier_features(x_t, log_snr, self.frequencies)], dim=1)
        x = F.pad(x_t.to(dtype), padding, mode="replicate")
        x = self.conv_in(fold_patches(x, self.patch_size))
        skips = []
        for i, stage in enumerate(self.down):
            if i > 0:
                x = POOLS[len(size)](x, 2)
            x = self.apply_stage(stage, x, embedding)
            skips.append(x)
        skips.pop()
        for stage in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.apply_stage(stage, x, embedding)
        x = unfold_patches(self.conv_out(x), self.patch_size)
        return x[(..., *map(slice, size))]


def gray_frequencies(count):
    """Return frequencies of pixels, (count,), whose periods are 1, 2, 4, ... gray values."""
    return 2 * math.pi / GRAY_VALUE * 0.5 ** torch.arange(count)


def fourier_features(x_t, log_snr, frequencies):
    """Return sin and cos of x_t (B, C, ...) times each frequency (n,): (B, 2 n C, ...).

    By them a network tells close values apart (Kingma et al. 2021, section 5.3 and appendix C).
    Each is damped by its mean over the noise, exp(-sigma^2 f^2 / 2)."""
    frequencies = frequencies.reshape(-1, *[1] * (x_t.ndim - 2))  # (n, 1, ...)
    angle = x_t.unsqueeze(2) * frequencies  # (B, C, n, ...)
    sigma2 = torch.sigmoid(-log_snr).reshape(-1, *[1] * x_t.ndim)  # (1 or B, 1, 1, ...)
    damping = torch.exp(-0.5 * sigma2 * frequencies**2)  # (1 or B, 1, n, ...)
    sin = (angle.sin() * damping).flatten(1, 2)  # (B, C n, ...)
    cos = (angle.cos() * damping).flatten(1, 2)
    return torch.cat([sin, cos], dim=1)


def feature_sides(event, patch_size, levels):
    """Return the shorter side of the feature maps of each resolution of a U-Net, falling."""
    stride = patch_size * 2 ** (levels - 1)
    side = -(-min(event[1:]) // stride) * stride // patch_size  # padded to a multiple
    return [side // 2**i for i in range(levels)]


def fold_patches(x, patch_size):
    """Fold each patch of neighbors into channels: (B, C, L) -> (B, C p, L / p), images alike."""
    if x.ndim == 4:
        return F.pixel_unshuffle(x, patch_size)
    return x.unflatten(2, (-1, patch_size)).transpose(2, 3).flatten(1, 2)


def unfold_patches(x, patch_size):
    """Undo fold_patches."""
    if x.ndim == 4:
        return F.pixel_shuffle(x, patch_size)
    return x.unflatten(1, (-1, patch_size)).transpose(2, 3).flatten(2)


class MLP(ReverseNetwork):
    """A residual network for points: (B, D), log_snr, label -> (B, D).

    Of points of up to FOURIER_DIMS it also sees Fourier features of each coordinate, by which it
    tells close ones apart, see fourier_features. Of more it adds x_t to its output,
    each dimension times a gain by noise level: noise in D dimensions does not pass through hidden
    layers narrower than that."""

    def __init__(
        self,
        event,  # (D,)
        num_classes=0,
        channels_base=128,  # width of every hidden layer
        blocks_per_level=4,
        init="xavier",
        negative_slope=0.01,
        norm="batch",
        activation="leaky_relu",
        dropout=0.0,
        checkpoint_activations=False,
        **_,  # what only a U-Net has
    ):
        super().__init__()
        if len(event) != 1:
            raise ValueError(f"network=mlp: expected points (D,), not items {tuple(event)}")
        self.checkpoint_activations = checkpoint_activations
        layers = Layers(0, norm, activation, negative_slope, dropout)
        self.event = tuple(event)
        self.embedding = NoiseEmbedding(channels_base, layers.activation, num_classes)
        is_wide = event[0] > FOURIER_DIMS
        frequencies = math.pi * 2.0 ** torch.arange(0 if is_wide else FOURIER_FEATURES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.proj_in = nn.Linear(event[0] * (1 + 2 * len(frequencies)), channels_base)
        self.blocks = nn.ModuleList()
        for _ in range(blocks_per_level):
            self.blocks.append(Block(layers, channels_base, channels_base, channels_base))
        self.proj_out = nn.Linear(channels_base, event[0])
        self.gain = nn.Linear(channels_base, event[0]) if is_wide else None
        init_weights(self, self.proj_out, init, negative_slope)
        if is_wide:
            nn.init.zeros_(self.gain.weight)
            nn.init.zeros_(self.gain.bias)

    def forward(self, x_t, log_snr, label=None):
        features = fourier_features(x_t, log_snr, self.frequencies)  # none where D is large
        dtype = self.proj_in.weight.dtype
        x = self.proj_in(torch.cat([x_t, features], dim=1).to(dtype))
        embedding = self.embedding(log_snr, label).to(dtype)
        x = self.proj_out(self.apply_stage(self.blocks, x, embedding))
        return x if self.gain is None else x + self.gain(embedding) * x_t


# A network of one's own: anything called as f(event, num_classes, **options) that returns an
# nn.Module; options are the fields of Config that UNet takes, so it names what it needs and **_.
# The module maps x_t (B, *event) and log_snr, 0-d or (B,), both float32, and label, (B,) int64 or
# None (no label; the number num_classes is the null label), to a tensor like x_t. One that is to
# be trained with augment=edm takes the option num_augment, has it as an attribute, and takes a
# fourth argument augment, (B, num_augment) or None. Optional methods:
#   fold_for_inference(dtype)  fuse norms and cast in place; without it: float32, nothing fused
#   hidden_weights()           a list of 2-d to 4-d weights for Muon, and whether a norm follows all
#                              of them, so that their scale does not matter; without it: AdamW
# Any BatchNorm in it gets fresh statistics under the EMA weights; any nn.Dropout serves MC dropout.
NETWORKS = {"unet": UNet, "mlp": MLP}
