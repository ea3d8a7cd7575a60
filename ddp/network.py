"""The reverse diffusion step network: it takes a noisy sample and its noise level.

One block serves pictures and points: (convolution or linear) -> BatchNorm -> scale and shift by the
noise level -> LeakyReLU -> Dropout -> (convolution or linear) -> BatchNorm, added to a skip
connection. The noise level enters after the normalisation, which would cancel it before (a
channel's offset is the same in every batch statistic). A block's BatchNorm follows its layer
directly, so that it folds into it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ddp.forward import once

ACTIVATIONS = {
    "leaky_relu": lambda slope: nn.LeakyReLU(slope, inplace=True),
    "relu": lambda slope: nn.ReLU(inplace=True),
    "silu": lambda slope: nn.SiLU(),
}
NORMS = {
    "batch": lambda width, dims: (nn.BatchNorm2d if dims else nn.BatchNorm1d)(width),
    "group": lambda width, dims: nn.GroupNorm(math.gcd(width, 8), width),
    "none": lambda width, dims: nn.Identity(),
}
INITS = ("kaiming", "xavier", "default")
WAVES = 6  # of each coordinate of a point: periods of 2, 1, ... 1/16 standard deviations
MAX_LOG_SNR = 20.0  # beyond it the level is all signal or all noise; the embedding stays finite


class Pieces:
    """What the blocks are made of: the layer for `dims` spatial dimensions (2 for images, 0 for
    points), the norm, the activation and the dropout that the user chose."""

    def __init__(self, dims, norm, activation, negative_slope, dropout):
        self.dims, self.norm_name = dims, norm
        self.activation = ACTIVATIONS[activation](negative_slope)
        self.dropout = nn.Dropout(dropout)

    def layer(self, width_in, width_out, size=3):
        """A same-size convolution or a linear layer; its bias is left to the norm that follows."""
        bias = self.norm_name == "none"
        if self.dims == 0:
            return nn.Linear(width_in, width_out, bias=bias)
        return nn.Conv2d(width_in, width_out, size, padding=size // 2, bias=bias)

    def norm(self, width):
        return NORMS[self.norm_name](width, self.dims)


class Block(nn.Module):
    """A residual block, (B, width_in, ...) -> (B, width_out, ...), told the noise level by
    `embedding`."""

    def __init__(self, pieces, width_in, width_out, embedding_width):
        super().__init__()
        self.first, self.norm1 = pieces.layer(width_in, width_out), pieces.norm(width_out)
        self.second, self.norm2 = pieces.layer(width_out, width_out), pieces.norm(width_out)
        self.modulation = nn.Linear(embedding_width, 2 * width_out)
        self.activation, self.dropout = pieces.activation, pieces.dropout
        same = width_in == width_out
        self.skip = nn.Identity() if same else pieces.layer(width_in, width_out, size=1)

    def forward(self, x, embedding):
        modulation = self.modulation(embedding)
        if embedding.ndim == 1 and isinstance(self.norm1, nn.Identity):
            h = self.modulated(x, *modulation.chunk(2))
        else:
            ones = [1] * (x.ndim - 2)
            scale, shift = modulation.reshape(-1, modulation.shape[-1], *ones).chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(self.first(x)), 1 + scale)
        h = self.norm2(self.second(self.dropout(self.activation(h))))
        return self.activation(h.add_(self.skip(x)))

    def modulated(self, x, scale, shift):
        """The first layer, scaled and shifted by what is the same for all items, (width_out,) each:
        in its weights, which are fewer."""
        layer, gain = self.first, 1 + scale
        weight = layer.weight * gain.reshape(-1, *[1] * (x.ndim - 1))
        bias = torch.addcmul(shift, layer.bias, gain)
        if x.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=layer.padding)

    def normalised_weights(self):
        """The weights whose scale a norm cancels."""
        norms = ((self.first, self.norm1), (self.second, self.norm2))
        return [layer.weight for layer, norm in norms if not isinstance(norm, nn.Identity)]

    def fold(self):
        """Make one layer of each layer and the BatchNorm that follows it; for eval mode alone."""
        fuse = fuse_conv_bn_eval if isinstance(self.first, nn.Conv2d) else fuse_linear_bn_eval
        if isinstance(self.norm1, nn.modules.batchnorm._BatchNorm):
            self.first, self.norm1 = fuse(self.first, self.norm1), nn.Identity()
            self.second, self.norm2 = fuse(self.second, self.norm2), nn.Identity()

    def start_at_zero(self):
        """Make the residual branch zero, so that the block begins as its skip (Goyal et al.
        2017)."""
        last = self.second if isinstance(self.norm2, nn.Identity) else self.norm2
        nn.init.zeros_(last.weight)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, (B, width, H, W); heads of 32
    channels, or of more where those do not divide the width."""

    def __init__(self, pieces, width):
        super().__init__()
        self.heads = next(n for n in range(max(1, width // 32), 0, -1) if width % n == 0)
        self.norm = pieces.norm(width)
        self.qkv, self.project = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        batch, width, *size = x.shape
        heads = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, width // self.heads, -1)
        q, k, v = heads.transpose(-1, -2).unbind(dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.project(mixed.reshape(batch, width, *size))

    def fold(self):
        """Make one layer of the BatchNorm and the layer that follows it; for eval mode alone."""
        if isinstance(self.norm, nn.BatchNorm2d):
            gain = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            offset = self.norm.bias - gain * self.norm.running_mean
            self.qkv.bias += self.qkv.weight.flatten(1) @ offset
            self.qkv.weight *= gain[:, None, None]
            self.norm = nn.Identity()

    def start_at_zero(self):
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)


class LevelEmbedding(nn.Module):
    """log_snr (B,) and label (B,) or None -> (B, width), or (width,) where it is the same for all:
    one level, expanded, and no labels. The last row of the label table means "no label"."""

    def __init__(self, width, activation, classes=0):
        super().__init__()
        # periods from 3 to 125 in log-SNR: slow ones tell where, fast ones tell neighbours apart
        frequencies = torch.logspace(math.log10(0.05), math.log10(2.0), width // 4)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * (width // 4), width), activation, nn.Linear(width, width), activation
        )
        self.classes = classes
        if classes:
            self.label = nn.Embedding(classes + 1, 2 * (width // 4))

    def forward(self, log_snr, label=None):
        log_snr = once(log_snr)
        angle = log_snr.clamp(-MAX_LOG_SNR, MAX_LOG_SNR)[..., None] * self.frequencies
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        if self.classes:
            none = torch.full_like(log_snr, self.classes, dtype=torch.long)
            features = features + self.label(none if label is None else label)
        return self.mlp(features)


class UNet(nn.Module):
    """A U-Net for images of any size: (B, C, H, W), log_snr (B,), label (B,) or None -> (B, C, H,
    W).

    `patch` folds p x p pixels into channels at the door, `multipliers` give the width of each
    resolution, `depth` the blocks in each, `attention` the resolutions (in pixels of the feature
    map) that attend."""

    def __init__(self, pieces, event, width, depth, multipliers, patch, attention, classes):
        super().__init__()
        channels, height, size = event
        widths = [width * m for m in multipliers]
        self.patch, self.stride = patch, patch * 2 ** (len(widths) - 1)
        self.embedding = LevelEmbedding(4 * width, pieces.activation, classes)
        side = min(-(-s // self.stride) * self.stride // patch for s in (height, size))
        sides = [side // 2**i for i in range(len(widths))]
        if set(attention) - set(sides):
            raise ValueError(
                f"--attention {','.join(map(str, attention))}: the feature maps here have "
                f"{', '.join(map(str, sides))} pixels on their shorter side"
            )

        def stage(width_in, width_out, level):
            inputs = [width_in] + [width_out] * (depth - 1)
            blocks = [Block(pieces, w, width_out, 4 * width) for w in inputs]
            return nn.ModuleList(
                [*blocks, Attention(pieces, width_out)] if sides[level] in attention else blocks
            )

        self.door = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        inner = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(
            stage(a, b, i) for i, (a, b) in enumerate(zip(inner, widths, strict=True))
        )
        self.up = nn.ModuleList(
            stage(widths[i + 1] + widths[i], widths[i], i) for i in reversed(range(len(widths) - 1))
        )
        self.out = nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)

    def forward(self, xt, log_snr, label=None):
        xt, embedding = held(self, xt, self.embedding(log_snr, label))
        height, width = xt.shape[-2:]
        x = F.pad(xt, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        x = self.door(F.pixel_unshuffle(x, self.patch))
        skips = []
        for i, stage in enumerate(self.down):
            x = run(stage, x if i == 0 else F.avg_pool2d(x, 2), embedding)
            skips.append(x)
        skips.pop()
        for stage in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = run(stage, torch.cat([x, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.out(x), self.patch)[..., :height, :width]


class MLP(nn.Module):
    """A residual network for points: (B, D), log_snr (B,), label (B,) or None -> (B, D).

    It also sees waves of each coordinate, by which it tells close points apart (Fourier features;
    Kingma et al. 2021, section 5.3)."""

    def __init__(self, pieces, event, width, depth, classes):
        super().__init__()
        self.embedding = LevelEmbedding(width, pieces.activation, classes)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(WAVES), persistent=False)
        self.door = nn.Linear(event[0] * (1 + 2 * WAVES), width)
        self.blocks = nn.ModuleList(Block(pieces, width, width, width) for _ in range(depth))
        self.out = nn.Linear(width, event[0])

    def forward(self, xt, log_snr, label=None):
        angle = xt[..., None] * self.frequencies
        # each as high as it is on average over the noise, so that none is seen where all is noise
        height = torch.exp(-0.5 * torch.sigmoid(-log_snr)[:, None] * self.frequencies**2)[:, None]
        waves = [(wave * height).flatten(1) for wave in (angle.sin(), angle.cos())]
        x = torch.cat([xt, *waves], dim=1)
        x, embedding = held(self, x, self.embedding(log_snr, label))
        return self.out(run(self.blocks, self.door(x), embedding))


def held(network, *tensors):
    """The tensors in the precision in which the network's weights are held; the noise level is
    embedded in float32."""
    return [tensor.to(network.door.weight.dtype) for tensor in tensors]


def run(stage, x, embedding):
    for part in stage:
        x = part(x, embedding) if isinstance(part, Block) else part(x)
    return x


def initialise(network, init, negative_slope):
    """Write the start of every weight. `kaiming` keeps the variance through LeakyReLU (He et al.
    2015), `xavier` is Glorot & Bengio 2010; both start residual branches and the output at zero, so
    that the network begins as its skip connections. `default` leaves PyTorch's own initialisation
    untouched."""
    if init == "default":
        return
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if init == "kaiming":
                nn.init.kaiming_normal_(module.weight, a=negative_slope, nonlinearity="leaky_relu")
            else:
                nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, (Block, Attention)):
            module.start_at_zero()
        if isinstance(module, Block):
            nn.init.zeros_(module.modulation.weight)
    nn.init.zeros_(network.out.weight)


def reverse_network(
    event,
    *,
    width,
    depth,
    multipliers=(1, 2),
    patch=1,
    attention=(),
    classes=0,
    norm="batch",
    activation="leaky_relu",
    negative_slope=0.01,
    dropout=0.0,
    init="xavier",
):
    """The reverse network for `event`: a U-Net for images (C, H, W), an MLP for points (D,)."""
    dims = len(event) - 1
    pieces = Pieces(dims, norm, activation, negative_slope, dropout)
    if dims == 0:
        network = MLP(pieces, event, width, depth, classes)
    else:
        network = UNet(pieces, event, width, depth, multipliers, patch, attention, classes)
    initialise(network, init, negative_slope)
    return network
