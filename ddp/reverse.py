"""The reverse diffusion step network: it takes a noisy sample and its noise level.

One residual block serves images and points: (conv or linear) -> BatchNorm -> FiLM by the noise
level -> LeakyReLU -> Dropout -> (conv or linear) -> BatchNorm, added to a skip connection, and a
LeakyReLU. The noise level enters after the normalization, which would cancel it before: a
BatchNorm subtracts any offset that a whole channel has (arXiv 2405.14126). A BatchNorm follows its
layer directly, so that it can be folded into it for inference.

A network of one's own is any nn.Module behind a function in NETWORKS; see there for the contract.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ddp.schedule import MAX_LOG_SNR, MIN_LOG_SNR

ACTIVATIONS = {
    "leaky_relu": lambda negative_slope: nn.LeakyReLU(negative_slope, inplace=True),
    "relu": lambda negative_slope: nn.ReLU(inplace=True),
    "silu": lambda negative_slope: nn.SiLU(),
}
NORMS = {  # (channels, spatial dimensions) -> a module
    "batch": lambda channels, dims: (nn.BatchNorm2d if dims else nn.BatchNorm1d)(channels),
    "group": lambda channels, dims: nn.GroupNorm(math.gcd(channels, 8), channels),
    "none": lambda channels, dims: nn.Identity(),
}
INITS = ("kaiming", "xavier", "default")
FOURIER_FEATURES = 6  # of each coordinate of a point: periods of 2, 1, ..., 1/16 std


class Layers:
    """What blocks are made of: the layer, norm, activation and dropout that the user chose."""

    def __init__(
        self, dims, norm="batch", activation="leaky_relu", negative_slope=0.01, dropout=0.0
    ):
        self.dims = dims  # spatial dimensions: 2 for images, 0 for points
        self.norm_name = norm
        self.activation = ACTIVATIONS[activation](negative_slope)
        self.dropout = nn.Dropout(dropout)

    def layer(self, c_in, c_out, kernel_size=3):
        """Return a same-size convolution or a linear layer."""
        bias = self.norm_name == "none"  # a norm has its own, and would cancel this one
        if self.dims == 0:
            return nn.Linear(c_in, c_out, bias=bias)
        return nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2, bias=bias)

    def norm(self, channels):
        return NORMS[self.norm_name](channels, self.dims)


class Block(nn.Module):
    """A residual block, (B, c_in, ...) -> (B, c_out, ...), conditioned on the noise by FiLM."""

    def __init__(self, layers, c_in, c_out, embedding_size):
        super().__init__()
        self.layer1 = layers.layer(c_in, c_out)
        self.norm1 = layers.norm(c_out)
        self.layer2 = layers.layer(c_out, c_out)
        self.norm2 = layers.norm(c_out)
        self.film = nn.Linear(embedding_size, 2 * c_out)  # scale and shift (Perez et al. 2018)
        self.activation = layers.activation
        self.dropout = layers.dropout
        self.skip = nn.Identity() if c_in == c_out else layers.layer(c_in, c_out, kernel_size=1)

    def forward(self, x, embedding):
        film = self.film(embedding)  # (B, 2 c_out), or (2 c_out,) where all items share it
        if embedding.ndim == 1 and isinstance(self.norm1, nn.Identity):
            h = self.layer_with_film(x, *film.chunk(2))
        else:
            spatial = [1] * (x.ndim - 2)
            scale, shift = film.reshape(-1, film.shape[-1], *spatial).chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(self.layer1(x)), 1 + scale)  # FiLM
        h = self.dropout(self.activation(h))
        h = self.norm2(self.layer2(h))
        return self.activation(h.add_(self.skip(x)))

    def layer_with_film(self, x, scale, shift):
        """Apply FiLM, (c_out,) each, to the weights of layer1 instead of to its output.

        Valid when the whole batch has one embedding, and cheaper: weights are fewer than pixels."""
        gain = 1 + scale
        weight = self.layer1.weight * gain.reshape(-1, *[1] * (x.ndim - 1))
        bias = torch.addcmul(shift, self.layer1.bias, gain)
        if x.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=self.layer1.padding)

    def fold(self):
        """Fuse each BatchNorm into the layer before it (conv-BN fusion); for eval mode only."""
        fuse = fuse_conv_bn_eval if isinstance(self.layer1, nn.Conv2d) else fuse_linear_bn_eval
        if isinstance(self.norm1, nn.modules.batchnorm._BatchNorm):
            self.layer1 = fuse(self.layer1, self.norm1)
            self.layer2 = fuse(self.layer2, self.norm2)
            self.norm1 = nn.Identity()
            self.norm2 = nn.Identity()


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, (B, C, H, W) -> (B, C, H, W).

    Heads have 32 channels, or more where 32 does not divide C."""

    def __init__(self, layers, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        while channels % self.heads:
            self.heads -= 1
        self.norm = layers.norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        batch, channels, *size = x.shape
        qkv = self.qkv(self.norm(x))  # (B, 3 C, H, W)
        qkv = qkv.reshape(batch, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(dim=1)  # (B, heads, H W, C / heads) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.proj(attended.reshape(batch, channels, *size))

    def fold(self):
        """Fuse the BatchNorm into the layer after it; for eval mode only."""
        if isinstance(self.norm, nn.BatchNorm2d):
            gain = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            offset = self.norm.bias - gain * self.norm.running_mean
            self.qkv.bias += self.qkv.weight.flatten(1) @ offset
            self.qkv.weight *= gain[:, None, None]
            self.norm = nn.Identity()


class NoiseEmbedding(nn.Module):
    """Embed log_snr, 0-d or (B,), and label (B,) or None -> (size,) or (B, size).

    The last row of the label table, number `num_classes`, is the null label of CFG."""

    def __init__(self, size, activation, num_classes=0):
        super().__init__()
        n = size // 4
        # periods from 3 to 125 in log-SNR: slow ones tell where, fast ones tell neighbors apart
        frequencies = torch.logspace(math.log10(0.05), math.log10(2.0), n)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * n, size), activation, nn.Linear(size, size), activation
        )
        self.num_classes = num_classes
        if num_classes:
            self.label = nn.Embedding(num_classes + 1, 2 * n)

    def forward(self, log_snr, label=None):
        angle = log_snr.clamp(MIN_LOG_SNR, MAX_LOG_SNR)[..., None] * self.frequencies
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (2 n,) or (B, 2 n)
        if self.num_classes:
            if label is None:
                label = torch.full_like(log_snr, self.num_classes, dtype=torch.long)
            features = features + self.label(label)
        return self.mlp(features)


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
            x = module(x, embedding) if isinstance(module, Block) else module(x)
        return x


def init_weights(network, out_layer, init, negative_slope):
    """Initialize every weight.

    `kaiming` keeps the variance through LeakyReLU (He et al. 2015), `xavier` is Glorot & Bengio
    2010. Both start residual branches, FiLM and the output at zero, so that the network begins as
    its skip connections (Goyal et al. 2017). `default` is PyTorch's own initialization."""
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
        if isinstance(module, Block):
            has_norm = not isinstance(module.norm2, nn.Identity)
            nn.init.zeros_((module.norm2 if has_norm else module.layer2).weight)
            nn.init.zeros_(module.film.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    nn.init.zeros_(out_layer.weight)


class UNet(ReverseNetwork):
    """A U-Net for images of any size: (B, C, H, W), log_snr, label -> (B, C, H, W)."""

    def __init__(
        self,
        event,  # (C, H, W)
        num_classes=0,  # labels that the network is told; 0: unconditional
        channels_base=32,  # channels of the first resolution
        blocks_per_level=3,
        channel_mult=(1, 2),  # channels of each resolution, in units of channels_base
        patch_size=1,  # the input is pixel-unshuffled by it
        attention_resolutions=(),  # feature-map sizes with self-attention
        init="xavier",
        negative_slope=0.01,
        **options,  # norm, activation, dropout: of Layers
    ):
        super().__init__()
        layers = Layers(dims=2, negative_slope=negative_slope, **options)
        self.event = tuple(event)
        self.patch_size = patch_size
        self.stride = patch_size * 2 ** (len(channel_mult) - 1)  # H, W are padded to a multiple
        self.embedding = NoiseEmbedding(4 * channels_base, layers.activation, num_classes)
        side = -(-min(event[1:]) // self.stride) * self.stride // patch_size
        resolutions = [side // 2**i for i in range(len(channel_mult))]
        if set(attention_resolutions) - set(resolutions):
            wanted = f"some of {resolutions}, the shorter sides of the feature maps"
            raise ValueError(f"attention_resolutions={attention_resolutions}: expected {wanted}")

        def stage(c_in, c_out, resolution):
            modules = [Block(layers, c_in, c_out, 4 * channels_base)]
            for _ in range(blocks_per_level - 1):
                modules.append(Block(layers, c_out, c_out, 4 * channels_base))
            if resolution in attention_resolutions:
                modules.append(Attention(layers, c_out))
            return nn.ModuleList(modules)

        channels = [channels_base * m for m in channel_mult]  # of each resolution
        pixels = event[0] * patch_size**2
        self.conv_in = nn.Conv2d(pixels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, c in enumerate(channels):
            self.down.append(stage(channels[max(i - 1, 0)], c, resolutions[i]))
        self.up = nn.ModuleList()
        for i in reversed(range(len(channels) - 1)):  # what comes from below, and the skip
            self.up.append(stage(channels[i + 1] + channels[i], channels[i], resolutions[i]))
        self.conv_out = nn.Conv2d(channels[0], pixels, 3, padding=1)
        init_weights(self, self.conv_out, init, negative_slope)

    def forward(self, x_t, log_snr, label=None):
        dtype = self.conv_in.weight.dtype  # float32, or bf16 after folding
        embedding = self.embedding(log_snr, label).to(dtype)
        height, width = x_t.shape[-2:]
        padding = (0, -width % self.stride, 0, -height % self.stride)
        x = F.pad(x_t.to(dtype), padding, mode="replicate")
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = []
        for i, stage in enumerate(self.down):
            if i > 0:
                x = F.avg_pool2d(x, 2)
            x = self.apply_stage(stage, x, embedding)
            skips.append(x)
        skips.pop()
        for stage in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.apply_stage(stage, x, embedding)
        return F.pixel_shuffle(self.conv_out(x), self.patch_size)[..., :height, :width]


class MLP(ReverseNetwork):
    """A residual network for points: (B, D), log_snr, label -> (B, D).

    It also sees Fourier features of each coordinate, by which it tells close points apart
    (Kingma et al. 2021, section 5.3)."""

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
        **_,  # what only a U-Net has
    ):
        super().__init__()
        layers = Layers(0, norm, activation, negative_slope, dropout)
        self.event = tuple(event)
        self.embedding = NoiseEmbedding(channels_base, layers.activation, num_classes)
        frequencies = math.pi * 2.0 ** torch.arange(FOURIER_FEATURES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.proj_in = nn.Linear(event[0] * (1 + 2 * FOURIER_FEATURES), channels_base)
        self.blocks = nn.ModuleList()
        for _ in range(blocks_per_level):
            self.blocks.append(Block(layers, channels_base, channels_base, channels_base))
        self.proj_out = nn.Linear(channels_base, event[0])
        init_weights(self, self.proj_out, init, negative_slope)

    def forward(self, x_t, log_snr, label=None):
        angle = x_t[..., None] * self.frequencies  # (B, D, 6)
        # damp each frequency by its mean over the noise, exp(-sigma^2 f^2 / 2)
        sigma2 = torch.sigmoid(-log_snr)[..., None]
        damping = torch.exp(-0.5 * sigma2 * self.frequencies**2)[..., None, :]  # (1, 6), (B, 1, 6)
        sin = (angle.sin() * damping).flatten(1)  # (B, 6 D)
        cos = (angle.cos() * damping).flatten(1)
        dtype = self.proj_in.weight.dtype
        x = self.proj_in(torch.cat([x_t, sin, cos], dim=1).to(dtype))
        embedding = self.embedding(log_snr, label).to(dtype)
        return self.proj_out(self.apply_stage(self.blocks, x, embedding))


# A network of one's own: anything called as f(event, num_classes, **options) that returns an
# nn.Module; options are the fields of Config that UNet takes, so it names what it needs and **_.
# The module maps x_t (B, *event) and log_snr, 0-d or (B,), both float32, and label, (B,) int64 or
# None (no label; the number num_classes is the null label), to a tensor like x_t. Optional methods:
#   fold_for_inference(dtype)  fuse norms and cast in place; without it: float32, nothing fused
#   hidden_weights()           a list of 2-d or 4-d weights for Muon, and whether a norm follows all
#                              of them, so that their scale does not matter; without it: AdamW
# Any BatchNorm in it gets fresh statistics under the EMA weights; any nn.Dropout serves MC dropout.
NETWORKS = {"unet": UNet, "mlp": MLP}
