"""What the reverse networks are made of: residual blocks, attention, the noise embedding.

One residual block serves images, sequences and points: (conv or linear) -> BatchNorm -> FiLM by the
noise level -> LeakyReLU -> Dropout -> (conv or linear) -> BatchNorm, added to a skip connection,
and a LeakyReLU. The noise level enters after the normalization, which would cancel it before: a
BatchNorm subtracts any offset that a whole channel has (arXiv 2405.14126). A BatchNorm follows its
layer directly, so that it can be folded into it for inference.
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
CONVS = (F.linear, F.conv1d, F.conv2d)  # by the number of spatial dimensions
CONV_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # private; without it, no
SMALL_MAP = 6  # pixels a side, up to which the weight gradient is taken of images in rows
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = {  # (channels, spatial dimensions) -> a module
    "batch": lambda channels, dims: BATCH_NORMS[dims](channels),
    "group": lambda channels, dims: nn.GroupNorm(math.gcd(channels, 8), channels),
    "none": lambda channels, dims: nn.Identity(),
}


def batch_norms(module):
    """Return every BatchNorm within a module, a list."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class SmallMapConv(torch.autograd.Function):
    """A same-size convolution, x (B, c_in, H, W), whose weight gradient is of images in rows.

    A CPU's AMX kernels sum that gradient image by image, which is slow where an image is a few
    pixels. With a column of zeros between them many images are one wide one, whose gradient is
    the same sum. Measured: docs/training.md, Speed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = convolution_gradients(grad, x, weight, [True, False, False])[0]
        rows = (in_rows(grad), in_rows(x))
        return grad_x, convolution_gradients(*rows, weight, [False, True, False])[1]


def convolution_gradients(grad, x, weight, wanted):
    """Return the gradients of a same-size convolution by x, weight, bias, where wanted."""
    padding = [weight.shape[-1] // 2] * 2
    one, zero = [1, 1], [0, 0]  # stride and dilation; no padding of a transposed output
    how = (None, one, padding, one, False, zero, 1, wanted)
    return torch.ops.aten.convolution_backward(grad, x, weight, *how)


def in_rows(x):
    """Return images (B, C, H, W) as (B / n, C, H, n (W + 1)): n in a row, a 0 behind each."""
    batch, channels, height, width = x.shape
    n = math.gcd(batch, 32)
    rows = x.new_zeros(batch // n, height, n, width + 1, channels)  # channels-last
    images = x.permute(0, 2, 3, 1).unflatten(0, (-1, n))  # (B / n, n, H, W, C)
    rows[..., :width, :] = images.transpose(1, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that trains faster on small feature maps, in bfloat16 on a CPU with AMX."""

    def forward(self, x):
        if not self.gains_by_rows(x):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        return SmallMapConv.apply(x.to(dtype), self.weight.to(dtype))

    def gains_by_rows(self, x):
        """Return whether SmallMapConv is faster for x."""
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        is_small = max(x.shape[-2:]) <= SMALL_MAP and self.kernel_size == (3, 3)
        is_bf16 = HAS_AMX and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        return is_trained and is_small and is_bf16 and self.bias is None


class Layers:
    """What blocks are made of: the layer, norm, activation and dropout that the user chose."""

    def __init__(
        self, dims, norm="batch", activation="leaky_relu", negative_slope=0.01, dropout=0.0
    ):
        self.dims = dims  # spatial dimensions: 2 for images, 1 for sequences, 0 for points
        self.norm_name = norm
        self.activation = ACTIVATIONS[activation](negative_slope)
        self.dropout = nn.Dropout(dropout)

    def layer(self, c_in, c_out, kernel_size=3):
        """Return a same-size convolution or a linear layer."""
        bias = self.norm_name == "none"  # a norm has its own, and would cancel this one
        if self.dims == 0:
            return nn.Linear(c_in, c_out, bias=bias)
        return self.conv(c_in, c_out, kernel_size, bias=bias)

    def conv(self, c_in, c_out, kernel_size, bias=True):
        """Return a same-size convolution."""
        padding = kernel_size // 2
        layer = nn.Conv1d if self.dims == 1 else Conv2d
        return layer(c_in, c_out, kernel_size, padding=padding, bias=bias)

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
        return CONVS[x.ndim - 2](x, weight, bias, padding=self.layer1.padding)

    def fold(self):
        """Fuse each BatchNorm into the layer before it (conv-BN fusion); for eval mode only."""
        is_linear = isinstance(self.layer1, nn.Linear)
        fuse = fuse_linear_bn_eval if is_linear else fuse_conv_bn_eval
        if isinstance(self.norm1, nn.modules.batchnorm._BatchNorm):
            self.layer1 = fuse(self.layer1, self.norm1)
            self.layer2 = fuse(self.layer2, self.norm2)
            self.norm1 = nn.Identity()
            self.norm2 = nn.Identity()


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, (B, C, ...) -> (B, C, ...).

    Heads have 32 channels, or more where 32 does not divide C."""

    def __init__(self, layers, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        while channels % self.heads:
            self.heads -= 1
        self.norm = layers.norm(channels)
        self.qkv = layers.conv(channels, 3 * channels, kernel_size=1)
        self.proj = layers.conv(channels, channels, kernel_size=1)

    def forward(self, x):
        batch, channels, *size = x.shape
        qkv = self.qkv(self.norm(x))  # (B, 3 C, ...)
        qkv = qkv.reshape(batch, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(dim=1)  # (B, heads, positions, C / heads) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.proj(attended.reshape(batch, channels, *size))

    def fold(self):
        """Fuse the BatchNorm into the layer after it; for eval mode only."""
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            gain = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            offset = self.norm.bias - gain * self.norm.running_mean
            self.qkv.bias += self.qkv.weight.flatten(1) @ offset
            self.qkv.weight *= gain.reshape(-1, *[1] * (self.qkv.weight.ndim - 2))
            self.norm = nn.Identity()


class NoiseEmbedding(nn.Module):
    """Embed log_snr, 0-d or (B,), and label (B,) or None -> (size,) or (B, size).

    The last row of the label table, number `num_classes`, is the null label of CFG. augment,
    (B, num_augment) or None, says how the images were augmented; None is 0: not at all."""

    def __init__(self, size, activation, num_classes=0, num_augment=0):
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
        if num_augment:
            self.augment = nn.Linear(num_augment, 2 * n, bias=False)

    def forward(self, log_snr, label=None, augment=None):
        angle = log_snr.clamp(MIN_LOG_SNR, MAX_LOG_SNR)[..., None] * self.frequencies
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (2 n,) or (B, 2 n)
        if self.num_classes:
            if label is None:
                label = torch.full_like(log_snr, self.num_classes, dtype=torch.long)
            features = features + self.label(label)
        if augment is not None:
            features = features + self.augment(augment)
        return self.mlp(features)
