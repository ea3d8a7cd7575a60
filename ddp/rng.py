"""Random numbers as a function of position: keyed by (seed, purpose, counter, index).

Item 7 gets the same noise in a batch of 1 and of 500, on one process or on four, in a resumed run
and in an uninterrupted one; on another device but for the rounding of log, cos and sin. The
generator is Philox (Salmon et al. 2011), whose bits are the same everywhere.
"""

import math

import torch

# One id for each purpose, so that no two share random numbers. An id is part of every result that
# was ever drawn with it: it never changes, and a new purpose takes a new one.
STREAMS = {
    "train_eps": 0,  # noise of a training batch; counter: the batch's number
    "train_log_snr": 6,  # its noise levels (uniform)
    "label_dropout": 7,  # which labels are dropped (uniform)
    "augment": 22,  # how its images are augmented (uniform)
    "dropout": 12,  # the seed of PyTorch's generator for nn.Dropout
    "endpoint": 1,  # noise for the ends of a learned schedule
    "bn_eps": 2,  # noise and levels (uniform) for BatchNorm's statistics under EMA weights
    "bn_log_snr": 8,
    "test_eps": 5,  # noise and levels (uniform) of the test loss
    "test_log_snr": 11,
    "x_T": 3,  # the start of a sample; index: the sample's number
    "sampler_noise": 4,  # noise of stochastic samplers; counter: the draw's number
    "repaint": 13,  # noise on the known part when inpainting
    "mc_dropout": 10,  # dropout masks (uniform) when sampling
    "vlb_eps": 14,  # likelihoods; counter: the Monte Carlo draw's number
    "vlb_log_snr": 15,  # (uniform)
    "vlb_reconstruction": 16,
    "dequant_uniform": 17,  # (uniform)
    "dequant_normal": 18,
    "hutchinson": 19,  # random signs of a trace estimate (uniform)
    "loss_eps": 20,  # loss by noise level; counter: the level's number
    "benchmark": 21,  # (uniform)
}
MASK32 = 0xFFFFFFFF


def philox(
    counter,  # four int64 tensors of 32-bit words, broadcast together
    key,  # two ints of 32 bits
):
    """Return four random 32-bit words for each counter: Philox4x32-10.

    Salmon et al. 2011, section 3.3. Counter-based, so the bits are the same on every device, in any
    order, at any batch size."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around, but their 64 bits are those of the unsigned product
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32 & MASK32) ^ c1 ^ k0
        c2 = (p0 >> 32 & MASK32) ^ c3 ^ k1
        c1 = p1 & MASK32
        c3 = p0 & MASK32
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def random_words(seed, stream, counter, indices, count):
    """Return random 32-bit words, (B, count) int64; see `normal` for the arguments."""
    blocks = torch.arange(-(-count // 4), device=indices.device)[None]  # (1, count / 4)
    indices = indices[:, None].long()  # (B, 1)
    low = indices & MASK32
    high = indices >> 32 & MASK32
    words = (blocks, low, torch.full_like(indices, counter) & MASK32, high)
    random = philox(words, (seed & MASK32, STREAMS[stream]))  # four of (B, count / 4)
    return torch.cat(random, dim=1)[:, :count]


def uniform(seed, stream, counter, indices, event=()):
    """Return u (B, *event) float32 in [0, 1); see `normal` for the arguments."""
    words = random_words(seed, stream, counter, indices, math.prod(event))
    return ((words >> 8) * 2.0**-24).reshape(-1, *event)


def normal(
    seed,  # int, 32 bits count
    stream,  # the purpose: a key of STREAMS
    counter,  # int: the number of the batch or of the draw
    indices,  # (B,) integers: the items' numbers
    event,  # the shape of one item
):
    """Return eps ~ N(0, I), (B, *event) float32, by Box & Muller 1958."""
    size = math.prod(event)
    n_pairs = -(-size // 2)
    words = random_words(seed, stream, counter, indices, 2 * n_pairs).float()
    radius = torch.sqrt(-2 * torch.log((words[:, :n_pairs] + 0.5) * 2.0**-32))
    angle = words[:, n_pairs:] * (2 * math.pi * 2.0**-32)
    eps = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)  # (B, 2 n_pairs)
    return eps[:, :size].reshape(-1, *event)


def derive_seed(seed, stream, counter):
    """Return a seed in [0, 2^32) for PyTorch's own generator, whose CPU version keeps 32 bits."""
    return int(random_words(seed, stream, counter, torch.zeros(1, dtype=torch.long), 1))
