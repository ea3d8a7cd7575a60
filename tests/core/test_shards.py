"""A batch in parts: each on its own, with BatchNorm statistics of its own, summed as a tree."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_trainer
from torch import nn

from ddp.config import Config, resume_config
from ddp.shards import PartSums

SHARDS = 4
COPIES = {"noise_copies": 2, "batch_size": 16, "augment": "edm", "class_cond": True}


def small_network():
    """A network with a BatchNorm, and a parameter that gets no gradient."""
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.LeakyReLU(), nn.Linear(5, 1))
    network.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return network.train()


def sum_by_parts(network, x0, shards, batches=1):
    """Run each batch, x0 (batches * B, 3), in parts; return the losses of all items."""
    items = len(x0) // batches
    config = SimpleNamespace(
        shards=shards, reduce="tree", batch_size=items, noise_copies=1, grad_accumulation=batches
    )
    sums = PartSums(network, config)
    for part in sums.parts():
        for i, batch in enumerate(x0.split(items)):
            loss = network(batch[part]).square().flatten()
            loss.sum().backward()
            sums.losses[i, part] = loss.detach()
    return sums.total()


def by_hand(network, x0, shards, batches):
    """Run each part on a copy of the network -> the copies, and the losses of all items."""
    items = len(x0) // batches
    copies = [copy.deepcopy(network) for _ in range(shards)]
    losses = torch.zeros(batches, items)
    for p, own in enumerate(copies):
        for i, batch in enumerate(x0.split(items)):
            loss = own(batch[p::shards]).square().flatten()
            loss.sum().backward()
            losses[i, p::shards] = loss.detach()
    return copies, losses


@pytest.mark.parametrize("batches", [1, 3])
def test_parts_equal_backward_passes_of_their_own_summed_by_hand(batches):
    network = small_network()
    x0 = torch.randn(batches * 32, 3)
    copies, losses = by_hand(network, x0, SHARDS, batches)
    assert torch.equal(sum_by_parts(network, x0, SHARDS, batches), losses)
    for name, param in network.named_parameters():
        if name == "unused":
            assert not param.grad.any()
            continue
        g = [dict(own.named_parameters())[name].grad for own in copies]
        assert torch.equal(param.grad, (g[0] + g[1]) + (g[2] + g[3])), name
    norm = network[1]
    for name in ("running_mean", "running_var"):
        s = [getattr(own[1], name) for own in copies]
        assert torch.equal(getattr(norm, name), ((s[0] + s[1]) + (s[2] + s[3])) / 4), name
        assert not torch.equal(s[0], s[1])
    assert norm.num_batches_tracked == copies[0][1].num_batches_tracked == batches


def test_one_part_in_a_tree_is_the_plain_backward_pass():
    network = small_network()
    x0 = torch.randn(32, 3)
    plain = copy.deepcopy(network)
    plain(x0).square().sum().backward()
    sum_by_parts(network, x0, 1)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is None or torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(network.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_one_part_on_one_process_goes_no_detour():
    """The bits are those of the tree of one node, but nothing is copied."""
    states = []
    for is_alone in (True, False):
        trainer = tiny_trainer(dropout=0.1, grad_accumulation=2, shards=1)
        assert trainer.sums.is_alone
        trainer.sums.is_alone = is_alone
        losses = [trainer.train_step(0.0).loss, trainer.train_step(0.5).loss]
        states.append([*losses, *trainer.model.state_dict().values()])
    for alone, tree in zip(*states, strict=True):
        assert torch.equal(alone, tree)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.LayerNorm(5)])
def test_only_batchnorm_sees_the_parts(norm):
    """All else is the same sum over the batch, but for rounding."""
    network = small_network()
    network[1] = norm
    x0 = torch.randn(32, 3)
    gradients = []
    for shards in (1, SHARDS):
        sum_by_parts(network, x0, shards)
        gradients.append(network[0].weight.grad)
        network.zero_grad()
    assert torch.allclose(*gradients, rtol=1e-4) == isinstance(norm, nn.LayerNorm)


def test_a_part_has_the_same_items_and_noise_as_in_the_whole_batch():
    trainer = tiny_trainer(**COPIES, shards=SHARDS)
    k = 5
    x0, label = trainer.training_batch(k, 16, 2)
    augmented, told = trainer.augmented(k, x0)
    log_snr, weight = trainer.sample_log_snr(k, 32)
    eps = trainer.eps(k, x0)
    assert len(x0) == len(label) == len(log_snr) == len(eps) == 32
    for p in range(SHARDS):
        part = slice(p, None, SHARDS)
        its_x0, its_label = trainer.training_batch(k, 16, 2, part)
        assert torch.equal(its_x0, x0[part])
        assert torch.equal(its_label, label[part])
        its_x0, its_told = trainer.augmented(k, its_x0, part)
        assert torch.equal(its_x0, augmented[part])
        assert torch.equal(its_told, told[part])
        its_log_snr, its_weight = trainer.sample_log_snr(k, 32, part)
        assert torch.equal(its_log_snr, log_snr[part])
        assert torch.equal(its_weight, weight[part])
        assert torch.equal(trainer.eps(k, its_x0, part), eps[part])


def test_the_levels_of_each_part_are_stratified():
    trainer = tiny_trainer(schedule="flow", timesteps=0, shards=SHARDS)
    for p in range(SHARDS):
        log_snr, _ = trainer.sample_log_snr(
            3, trainer.config.batch_size * trainer.config.noise_copies, slice(p, None, SHARDS)
        )
        t = torch.sigmoid(-log_snr / 2)  # of the flow schedule, log_snr = 2 log((1 - t) / t)
        assert (t * len(t)).floor().tolist() == list(range(len(t)))  # one in each stratum


def test_dropout_is_keyed_by_batch_and_part(monkeypatch):
    seeds = []
    monkeypatch.setattr("ddp.training.torch.manual_seed", seeds.append)
    trainer = tiny_trainer(dropout=0.1, shards=SHARDS, grad_accumulation=2)
    del seeds[:]  # that of the initialization
    trainer.train_step(0.0)
    trainer.train_step(0.0)
    assert len(set(seeds)) == len(seeds) == 2 * 2 * SHARDS


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shards": 3}, "shards=3: expected a power of two"),
        ({"shards": 8, "batch_size": 20}, "shards=8 does not divide batch_size=20"),
        ({"shards": 16, "batch_size": 16}, "leaves BatchNorm one item"),
    ],
)
def test_parts_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        Config(**fields)


def test_parts_of_one_item_need_no_batchnorm():
    assert Config(shards=16, batch_size=16, norm="group").shards == 16


def test_parts_stay_as_they_were_when_a_run_goes_on():
    saved = Config(shards=4)
    assert resume_config(saved, {}).shards == 4
    assert resume_config(saved, {"shards": 4}).shards == 4
    with pytest.raises(ValueError, match="shards=8 is not the resumed run's 4"):
        resume_config(saved, {"shards": 8})
