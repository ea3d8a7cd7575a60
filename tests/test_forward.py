"""The forward network: its distributions against Bayes' rule, its noise against known answers."""

import math

import pytest
import torch

from ddp import forward
from ddp.schedule import Schedule

SALMON = [  # known answers of Philox4x32-10 (Salmon et al. 2011, Random123's kat_vectors)
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), SALMON)
def test_philox_gives_the_published_words(counter, key, words):
    answer = forward.philox([torch.tensor([c]) for c in counter], key)
    assert [int(word) for word in answer] == words


def test_noise_is_a_function_of_position():
    event, indices = (3, 5, 7), torch.arange(500)
    whole = forward.normal(3, "start", 0, indices, event)
    torch.testing.assert_close(
        whole[7:8], forward.normal(3, "start", 0, indices[7:8], event), rtol=0, atol=0
    )
    shuffled = torch.randperm(500)
    torch.testing.assert_close(
        whole[shuffled], forward.normal(3, "start", 0, shuffled, event), rtol=0, atol=0
    )
    for seed, stream, step in [(4, "start", 0), (3, "step", 0), (3, "start", 1)]:
        other = forward.normal(seed, stream, step, indices, event)
        assert torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_noise_is_normal():
    eps = forward.normal(0, "train", 0, torch.arange(4000), (1, 9, 9)).double()  # odd: 81 numbers
    n = eps.numel()
    assert eps.isfinite().all()
    assert abs(eps.mean()) < 4 / math.sqrt(n)
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((eps**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # neither pixels of an item nor neighbouring items are correlated
    flat = eps.flatten(1)
    assert (flat.T @ flat / 4000 - torch.eye(81)).abs().max() < 6 / math.sqrt(4000)
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / math.sqrt(n)


def test_levels_and_noise_are_independent():
    indices = torch.arange(20000)
    u = forward.uniform(0, "train", 0, indices)
    eps = forward.normal(0, "train", 0, indices, (4,))
    assert 0 <= u.min() < u.max() < 1
    together = torch.corrcoef(torch.cat([u[None], eps.T, eps.T.abs()]))
    assert together[0, 1:].abs().max() < 5 / math.sqrt(20000)


def levels(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize(("s", "t"), [(5.0, 4.9), (2.0, -3.0), (12.0, -12.0)])
def test_posterior_is_bayes_rule(s, t):
    """q(xs | xt, x0) is proportional to q(xt | xs) q(xs | x0), in precisions."""
    log_snr_s, log_snr_t = levels(s, t)
    x0, xt = torch.randn(2, 1, 6, dtype=torch.float64)
    alpha_s, sigma_s = forward.alpha_sigma(log_snr_s, x0)
    one = torch.ones_like(x0)
    ratio, beta = forward.transition(one, log_snr_s, log_snr_t)  # the mean of xs = 1: alpha_t|s
    precision = ratio**2 / beta + 1 / sigma_s**2
    mean, variance = forward.posterior(x0, xt, log_snr_t, log_snr_s)
    torch.testing.assert_close(variance, 1 / precision[:, :1])
    torch.testing.assert_close(mean, (ratio * xt / beta + alpha_s * x0 / sigma_s**2) / precision)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_steps_add_up_to_the_jump(name):
    """q(xt | x0) by one jump and by all single steps: the same mean and variance."""
    table = Schedule(name, 50).table
    alpha, sigma = forward.alpha_sigma(table[:1], torch.ones(1, 1))
    mean, variance = alpha.double(), sigma.double() ** 2
    for s, t in zip(table[:-1, None], table[1:, None], strict=True):
        ratio, beta = forward.transition(torch.ones(1, 1, dtype=torch.float64), s, t)
        mean, variance = ratio * mean, ratio**2 * variance + beta
    alpha, sigma = forward.alpha_sigma(table[-1:], torch.ones(1, 1))
    torch.testing.assert_close(mean, alpha)
    torch.testing.assert_close(variance, sigma**2)


def test_transition_is_one_minus_beta():
    from ddp.schedule import betas

    table = Schedule("linear", 1000).table[:, None]
    for i in (1, 500, 999):
        mean, variance = forward.transition(
            torch.ones(1, 1, dtype=torch.float64), table[i - 1], table[i]
        )
        beta = betas("linear", 1000)[i]
        torch.testing.assert_close(variance[0, 0], beta)
        torch.testing.assert_close(mean[0, 0] ** 2, 1 - beta)


def test_diffuse_at_the_ends():
    x0, eps = torch.randn(2, 3, 2)
    clean, noise = torch.full((3,), math.inf), torch.full((3,), -math.inf)
    assert torch.equal(forward.diffuse(x0, clean, eps), x0)
    assert torch.equal(forward.diffuse(x0, noise, eps), eps)
    mean, variance = forward.posterior(x0, eps, torch.zeros(3), clean)
    assert torch.equal(mean, x0)
    assert not variance.any()


def test_a_level_for_all_does_not_depend_on_how_many():
    for level in torch.linspace(-8, 8, 200):
        whole = forward.alpha_sigma(level.expand(64), torch.zeros(64, 2))
        alone = forward.alpha_sigma(level.expand(1), torch.zeros(1, 2))
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal((a + torch.zeros(64, 1))[:1], b + torch.zeros(1, 1))
