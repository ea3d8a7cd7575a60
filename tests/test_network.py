"""The reverse network: shapes, the order of its pieces, its start."""

import itertools

import pytest
import torch
from torch import nn

from ddp.network import ACTIVATIONS, INITS, NORMS, Attention, Block, Pieces, reverse_network

IMAGE = {"width": 16, "depth": 1, "multipliers": [1, 2]}


def output(network, event, batch=3, classes=0):
    torch.manual_seed(1)
    label = torch.arange(batch) % classes if classes else None
    return network(torch.randn(batch, *event), torch.linspace(-5, 5, batch), label)


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (30, 45), (1, 1), (5, 64), (33, 31)])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("multipliers", [[1], [1, 2], [1, 2, 2]])
def test_any_size_of_picture(size, patch, multipliers):
    event = (3, *size)
    network = reverse_network(
        event, width=8, depth=1, multipliers=multipliers, patch=patch, init="default"
    )
    assert output(network, event).shape == (3, *event)


def test_padding_is_cut_off_where_it_was_put():
    """A picture that needs no padding is the same in a larger one that is padded by replication."""
    network = reverse_network(
        (1, 8, 8), width=8, depth=1, multipliers=[1, 2], init="default"
    ).eval()
    x = torch.randn(1, 1, 7, 5)
    padded = nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    level = torch.zeros(1)
    torch.testing.assert_close(network(x, level), network(padded, level)[..., :7, :5])


@pytest.mark.parametrize("event", [(1, 8, 8), (2,)])
@pytest.mark.parametrize(
    ("norm", "activation", "init"), list(itertools.product(NORMS, ACTIVATIONS, INITS))
)
def test_every_piece_can_be_switched(event, norm, activation, init):
    size = IMAGE if len(event) == 3 else {"width": 16, "depth": 2, "multipliers": [1], "patch": 1}
    network = reverse_network(
        event, **size, norm=norm, activation=activation, init=init, dropout=0.1, attention=[4]
    )
    kinds = {type(m) for m in network.modules()}
    assert (nn.BatchNorm2d in kinds or nn.BatchNorm1d in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group")
    assert (nn.LeakyReLU in kinds) == (activation == "leaky_relu")
    assert Attention not in kinds or len(event) == 3
    out = output(network, event)
    assert out.isfinite().all()
    assert out.any() == (init == "default")  # the others start at zero
    out.sum().backward()


def test_kaiming_keeps_the_variance_for_the_leaky_slope():
    slope = 0.3
    network = reverse_network(
        (1, 8, 8), width=64, depth=2, multipliers=[1, 2], negative_slope=slope, init="kaiming"
    )
    for block in (m for m in network.modules() if isinstance(m, Block)):
        fan_in = block.first.weight[0].numel()
        expected = (2 / ((1 + slope**2) * fan_in)) ** 0.5
        assert abs(block.first.weight.std() / expected - 1) < 0.05
        assert not block.norm2.weight.any()  # the residual branch starts at zero


def test_heads_divide_the_width():
    pieces = Pieces(2, "batch", "leaky_relu", 0.01, 0.0)
    assert [Attention(pieces, w).heads for w in (16, 32, 64, 96, 112)] == [1, 1, 2, 3, 2]
    assert Attention(pieces, 112)(torch.randn(2, 112, 4, 4)).shape == (2, 112, 4, 4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_block_starts_as_its_skip(norm):
    network = reverse_network((4,), width=16, depth=1, norm=norm)
    x, embedding = torch.randn(8, 16), torch.randn(8, 16)
    block = network.blocks[0]
    torch.testing.assert_close(block(x, embedding), block.activation(x))


def test_the_noise_level_is_not_cancelled_by_batchnorm():
    """Just before a BatchNorm, the level's shift would not reach the output in training mode."""
    network = reverse_network((2,), width=32, depth=2, init="default").train()
    x = torch.randn(64, 2)
    one, other = (network(x, torch.full((64,), level)) for level in (-3.0, 3.0))
    assert (one - other).abs().mean() > 0.05 * one.std()


@pytest.mark.parametrize("event", [(1, 8, 8), (2,)])
def test_batchnorm_follows_its_layer_so_that_it_folds(event):
    """In eval mode layer and BatchNorm are one layer with other weights."""
    network = reverse_network(event, width=16, depth=1, init="default")
    for _ in range(3):
        output(network.train(), event, 32)  # statistics worth folding
    reference = output(network.eval(), event)
    fuse = {2: nn.utils.fuse_conv_bn_eval, 0: nn.utils.fuse_linear_bn_eval}[len(event) - 1]
    for block in [m for m in network.modules() if isinstance(m, Block)]:
        block.first, block.norm1 = fuse(block.first, block.norm1), nn.Identity()
        block.second, block.norm2 = fuse(block.second, block.norm2), nn.Identity()
    torch.testing.assert_close(output(network, event), reference, rtol=1e-4, atol=1e-5)


def test_labels_change_the_output_and_none_is_a_label_of_its_own():
    network = reverse_network((2,), width=16, depth=1, classes=3, init="default").eval()
    x, level = torch.randn(1, 2).expand(4, 2), torch.zeros(4)
    outs = network(x, level, torch.arange(4))
    assert len({tuple(o.tolist()) for o in outs}) == 4
    torch.testing.assert_close(network(x, level)[0], outs[3])


def test_levels_beyond_all_bounds_are_finite():
    network = reverse_network((2,), width=16, depth=1, init="default").eval()
    level = torch.tensor([float("inf"), -float("inf"), 1e9])
    assert network(torch.randn(3, 2), level).isfinite().all()


def test_an_item_with_a_label_is_the_same_alone():
    """Of one level for all the modulation goes into the weights, but not where labels differ."""
    network = reverse_network((1, 8, 8), width=8, depth=1, norm="none", classes=3, init="default")
    network.eval()
    x, level, label = torch.randn(3, 1, 8, 8), torch.tensor(0.5), torch.arange(3)
    embeddings = []
    network.embedding.register_forward_hook(lambda *args: embeddings.append(args[-1].shape))
    for named in (label, None):
        whole = network(x, level.expand(3), named)
        alone = network(x[:1], level.expand(1), None if named is None else named[:1])
        torch.testing.assert_close(alone, whole[:1], rtol=1e-5, atol=1e-6)
    assert embeddings == [(3, 32), (1, 32), (32,), (32,)]
