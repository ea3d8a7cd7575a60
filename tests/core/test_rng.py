"""Random numbers as a function of position: known answers, independence, and one id a purpose."""

import ast
import math

import pytest
import torch
from conftest import ROOT

from ddp.rng import STREAMS, derive_seed, normal, philox, uniform

SALMON = [  # known answers of Philox4x32-10 (Salmon et al. 2011, Random123's kat_vectors)
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

# An id is part of every result that was ever drawn with it: a new purpose is added here, and
# nothing else in this table ever changes.
PINNED = {
    "train_eps": 0,
    "endpoint": 1,
    "bn_eps": 2,
    "x_T": 3,
    "sampler_noise": 4,
    "test_eps": 5,
    "train_log_snr": 6,
    "label_dropout": 7,
    "bn_log_snr": 8,
    "mc_dropout": 10,
    "test_log_snr": 11,
    "dropout": 12,
    "repaint": 13,
    "vlb_eps": 14,
    "vlb_log_snr": 15,
    "vlb_reconstruction": 16,
    "dequant_uniform": 17,
    "dequant_normal": 18,
    "hutchinson": 19,
    "loss_eps": 20,
    "benchmark": 21,
    "augment": 22,
}


def test_streams_ids_are_pinned():
    assert STREAMS == PINNED


def test_streams_ids_are_unique():
    assert len(set(STREAMS.values())) == len(STREAMS)


@pytest.mark.parametrize(("counter", "key", "words"), SALMON)
def test_philox_gives_the_published_words(counter, key, words):
    answer = philox([torch.tensor([c]) for c in counter], key)
    assert [int(word) for word in answer] == words


@pytest.mark.parametrize("draw", [normal, uniform])
def test_draws_are_a_function_of_position(draw):
    event = (3, 5, 7)
    indices = torch.arange(500)
    whole = draw(3, "x_T", 0, indices, event)
    assert torch.equal(draw(3, "x_T", 0, indices[7:8], event), whole[7:8])
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, "x_T", 0, shuffled, event), whole[shuffled])


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize(
    ("seed", "stream", "counter", "first"),
    [
        (4, "x_T", 0, 0),
        (3, "sampler_noise", 0, 0),
        (3, "x_T", 1, 0),
        (3, "x_T", 0, 500),
        (3, "x_T", 0, 2**32),  # an index has 64 bits
    ],
)
def test_draws_of_other_positions_are_independent(draw, seed, stream, counter, first):
    indices = torch.arange(500)
    one = draw(3, "x_T", 0, indices, (105,)).flatten()
    other = draw(seed, stream, counter, first + indices, (105,)).flatten()
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / math.sqrt(500 * 105)


def test_normal_has_the_moments_of_a_normal():
    eps = normal(0, "train_eps", 0, torch.arange(4000), (1, 9, 9)).double()  # odd: 81 numbers
    n = eps.numel()
    assert eps.isfinite().all()
    assert abs(eps.mean()) < 4 / math.sqrt(n)
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((eps**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # neither the pixels of an item nor neighboring items are correlated
    flat = eps.flatten(1)
    assert (flat.T @ flat / 4000 - torch.eye(81)).abs().max() < 6 / math.sqrt(4000)
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / math.sqrt(n)


def test_uniform_is_uniform():
    u = uniform(0, "train_log_snr", 0, torch.arange(40_000)).double()
    assert u.shape == (40_000,)
    assert 0 <= u.min() < u.max() < 1
    for k in (1, 2, 3, 4):  # E[u^k] = 1 / (k + 1)
        error = (u**k).std() / math.sqrt(len(u))
        assert abs((u**k).mean() - 1 / (k + 1)) < 4 * error


def test_levels_and_noise_are_independent():
    indices = torch.arange(20_000)
    u = uniform(0, "train_log_snr", 0, indices)
    eps = normal(0, "train_eps", 0, indices, (4,))
    together = torch.corrcoef(torch.cat([u[None], eps.T, eps.T.abs()]))
    assert together[0, 1:].abs().max() < 5 / math.sqrt(20_000)


def test_derived_seeds_are_32_bits_and_differ():
    seeds = [derive_seed(0, "dropout", k) for k in range(200)]
    assert seeds == [derive_seed(0, "dropout", k) for k in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**32 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))  # PyTorch takes them


# ---- one purpose has one distribution: how the code calls `normal`, `uniform`, `derive_seed` ----


def draws(tree):
    """Yield (name of the function of ddp.rng, its stream argument) of every call in a module.

    A function may also be handed on with its first arguments: f(normal, seed, stream, ...)."""
    names = {}  # what the module calls the functions of ddp.rng
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ddp.rng":
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = [node.func, *node.args]
            for i, word in enumerate(words):
                if isinstance(word, ast.Name) and word.id in names:
                    yield names[word.id], words[i + 2]


def calls():
    """Return (function, stream argument, place) of every draw in ddp/ and benchmarks/."""
    draws_by_place = []
    for folder in ("ddp", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for function, stream in draws(ast.parse(path.read_text())):
                place = f"{path.relative_to(ROOT)}:{stream.lineno}"
                draws_by_place.append((function, stream, place))
    return draws_by_place


def purposes(stream):
    """Return the keys of STREAMS that a stream argument, a piece of source, may be."""
    if isinstance(stream, ast.Constant):
        return {stream.value}
    if isinstance(stream, ast.JoinedStr):  # f"{purpose}_eps": every stream of that ending
        (_, ending) = stream.values
        return {purpose for purpose in STREAMS if purpose.endswith(ending.value)}
    return set()


def test_calls_name_their_purpose():
    assert len(calls()) > 10
    for function, stream, place in calls():
        assert purposes(stream), f"{place}: {function} gets no purpose by name"
        assert purposes(stream) <= STREAMS.keys(), place


def test_a_purpose_has_one_distribution():
    drawn_by = {}
    for function, stream, _ in calls():
        for purpose in purposes(stream):
            drawn_by.setdefault(purpose, set()).add(function)
    for purpose, functions in drawn_by.items():
        assert len(functions) == 1, f"{purpose} is drawn by {functions}"
    assert drawn_by.keys() == STREAMS.keys()  # and none is left over
