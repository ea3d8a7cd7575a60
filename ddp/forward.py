"""The forward diffusion step network: it takes a sample and adds noise to it.

It has no weights to train: a step is xt = alpha x0 + sigma eps. The noise is a function of
position, not of history: eps is keyed by (seed, stream, step, index of the item), so item 7 gets
the same noise in a batch of 1 and of 500, on one process and on four, in a resumed run and in an
uninterrupted one.
"""

import math

import torch

# A stream for each purpose, and in each one for noise and one for uniform numbers, so that
# training, statistics, tests and samples do not share random numbers.
STREAMS = {
    name: i for i, name in enumerate(["train", "label", "statistics", "start", "step", "test"])
}
WORD = 0xFFFFFFFF


def expand(level, x):
    """(B,) -> (B, 1, ..., 1), to broadcast against x (B, *event). A 0-d level broadcasts as it
    is."""
    return level if level.ndim == 0 else level.reshape(-1, *[1] * (x.ndim - 1))


def once(log_snr):
    """log_snr (B,), or 0-d where that is one level that was expanded: then what follows from it is
    computed once, and does not depend on B by the last bit, which that of a sigmoid does."""
    return log_snr[0] if log_snr.ndim and log_snr.stride(0) == 0 else log_snr


def for_all(log_snr, x):
    """log_snr, 0-d -> (B,), the level of all the items of x, (B, ...), expanded as `once` sees."""
    return log_snr.to(x, non_blocking=True).expand(len(x))


def alpha_sigma(log_snr, x):
    """alpha and sigma at log_snr, (B,) or 0-d, ready to multiply x (B, *event)."""
    log_snr = expand(once(log_snr), x)
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def diffuse(x0, log_snr, eps):
    """A draw from q(xt | x0): xt = alpha x0 + sigma eps. Ho et al. 2020, eq. 4."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    return alpha * x0 + sigma * eps


def transition(xs, log_snr_s, log_snr_t):
    """Mean and variance of q(xt | xs), one forward step to a noisier level (log_snr_t <=
    log_snr_s).

    Kingma et al. 2021, eqs. 24-25. The variance is alpha_t² (1/SNR_t - 1/SNR_s) = beta_t of Ho et
    al."""
    alpha_s, _ = alpha_sigma(log_snr_s, xs)
    alpha_t, sigma_t = alpha_sigma(log_snr_t, xs)
    removed = -torch.expm1(expand(log_snr_t - log_snr_s, xs))
    return alpha_t / alpha_s * xs, sigma_t**2 * removed


def posterior(x0, xt, log_snr_t, log_snr_s):
    """Mean and variance of q(xs | xt, x0), one step back to a cleaner level (log_snr_s >=
    log_snr_t).

    Ho et al. 2020, eqs. 6-7; Kingma et al. 2021, eqs. 32-33. At log_snr_s = +inf it is x0, variance
    0."""
    alpha_t, sigma_t = alpha_sigma(log_snr_t, xt)
    alpha_s, sigma_s = alpha_sigma(log_snr_s, xt)
    removed = -torch.expm1(expand(log_snr_t - log_snr_s, xt))  # 1 - SNR_t / SNR_s
    mean = (alpha_t / alpha_s) * (sigma_s / sigma_t) ** 2 * xt + alpha_s * removed * x0
    return mean, sigma_s**2 * removed


def philox(counter, key):
    """Philox4x32-10: four random 32-bit words for each counter. Salmon et al. 2011, section 3.3.

    counter: four int64 tensors of words, broadcast together; key: two ints. Returns four such
    tensors. A counter-based generator gives the same bits on every device, in any order, at any
    batch size."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around, but their 64 bits are the unsigned product's
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32 & WORD) ^ c1 ^ k0,
            p1 & WORD,
            (p0 >> 32 & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words(seed, stream, step, indices, count):
    """Random 32-bit words, int64 (B, count), keyed by (seed, stream, step, index). stream: an
    int."""
    blocks = torch.arange(-(-count // 4), device=indices.device)[None]
    indices = indices[:, None].long()
    step = torch.full_like(indices, step)
    counter = (blocks, indices & WORD, step & WORD, indices >> 32 & WORD)
    four = philox(counter, (seed & WORD, stream))
    return torch.cat(four, dim=1)[:, :count]


def uniform(seed, stream, step, indices, event=()):
    """u (B, *event) float32 in [0, 1), keyed by (seed, stream, step, index). indices: (B,)
    integers."""
    bits = words(seed, len(STREAMS) + STREAMS[stream], step, indices, math.prod(event))
    return ((bits >> 8) * 2.0**-24).reshape(-1, *event)


def draw_seed(seed, step):
    """A seed in [0, 2³²) for a generator of PyTorch's, keyed by (seed, step): the CPU's keeps 32
    bits."""
    return int(words(seed, 2 * len(STREAMS), step, torch.zeros(1, dtype=torch.long), 1))


def normal(seed, stream, step, indices, event):
    """eps ~ N(0, I), (B, *event) float32, keyed by (seed, stream, step, index); by Box & Muller
    1958."""
    half = -(-math.prod(event) // 2)
    bits = words(seed, STREAMS[stream], step, indices, 2 * half).float()
    radius = torch.sqrt(-2 * torch.log((bits[:, :half] + 0.5) * 2.0**-32))
    angle = bits[:, half:] * (2 * math.pi * 2.0**-32)
    eps = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return eps[:, : math.prod(event)].reshape(-1, *event)
