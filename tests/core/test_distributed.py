"""Sums over the parts of a batch, in an order that no number of processes changes."""

import os
import platform
import sys

import pytest
import torch

from ddp.distributed import (
    TreeSum,
    broadcast,
    default_shards,
    gather,
    in_order,
    is_main,
    launch_id,
    leave,
    main_first,
    maximum,
    my_parts,
    nodes_of,
    on_main,
    parts_of,
    processes,
    sum_over_parts,
)

WORLDS = range(1, 18)


def pairwise(values):
    """Return the sum of 2^n values: that of the first half and that of the second."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return pairwise(values[:half]) + pairwise(values[half:])


def random_vectors(shards):
    """Return vectors whose sum has other bits in another order."""
    generator = torch.Generator().manual_seed(shards)
    return torch.randn(shards, 999, generator=generator)


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("world", WORLDS)
def test_tree_sum_is_pairwise_whatever_the_runs(shards, world, monkeypatch):
    """Each process adds its own parts, and then come the nodes of all, as sum_over_parts does."""
    monkeypatch.setattr("ddp.distributed.WORLD", world)
    values = random_vectors(shards)
    whole = TreeSum()
    for rank in range(world):
        own = TreeSum()
        for part in parts_of(rank, shards):
            own.add(part, 1, values[part])
        assert [(first, count) for first, count, _ in own.nodes] == nodes_of(rank, shards)
        for node in own.nodes:
            whole.add(*node)
    assert [(first, count) for first, count, _ in whole.nodes] == [(0, shards)]
    assert torch.equal(whole.nodes[0][2], pairwise(values))


def test_another_order_has_other_bits():
    values = random_vectors(16)
    assert not torch.equal(sum(values), pairwise(values))  # or the tests above could not fail


@pytest.mark.parametrize("world", WORLDS)
def test_the_parts_of_all_processes_are_all_parts_in_order(world, monkeypatch):
    monkeypatch.setattr("ddp.distributed.WORLD", world)
    for shards in (1, 2, 8, 32):
        all_parts = [part for rank in range(world) for part in parts_of(rank, shards)]
        assert all_parts == list(range(shards))
        counts = [len(parts_of(rank, shards)) for rank in range(world)]
        assert max(counts) - min(counts) <= 1


def test_a_process_has_one_part_at_least_where_nothing_else_is_said(monkeypatch):
    for world in WORLDS:
        monkeypatch.setattr("ddp.distributed.WORLD", world)
        shards = default_shards()
        assert shards & (shards - 1) == 0
        assert world <= shards < 2 * world


def test_without_torchrun_there_is_one_process_and_all_are_plain_calls(monkeypatch):
    monkeypatch.delattr("torch.distributed")  # nothing of it is touched
    with processes() as stderr:
        assert stderr is sys.stderr
        assert is_main()
        assert on_main(divmod, 7, 2) == (3, 1)
        assert (broadcast("x"), gather("x"), maximum(3)) == ("x", ["x"], 3)
        assert list(in_order(abs, [-1, 2, -3])) == [1, 2, 3]
        assert list(my_parts(4)) == [0, 1, 2, 3]
        with main_first():
            pass
        tree = TreeSum()
        values = random_vectors(4)
        for part in my_parts(4):
            tree.add(part, 1, values[part])
        assert torch.equal(sum_over_parts(tree, 4, 999, "cpu"), pairwise(values))
    with pytest.raises(ValueError, match="cause"):
        on_main(fail)


def fail():
    raise ValueError("the cause")


def test_a_process_of_a_launch_leaves_at_once_after_all_are_done(monkeypatch):
    done = []
    monkeypatch.setattr("os._exit", done.append)
    monkeypatch.setattr("torch.distributed.barrier", lambda: done.append("barrier"))
    leave(3)
    assert done == []  # without torchrun
    monkeypatch.setattr("ddp.distributed.STORE", "a store")
    leave(3)
    assert done == ["barrier", 3]


def test_in_order_computes_an_item_when_it_is_asked_for():
    computed = []
    results = in_order(computed.append, iter(range(10**9)))
    next(results)
    next(results)
    assert computed == [0, 1]


def test_a_launch_has_a_name_that_its_restarts_share(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_id() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")  # torchrun --rdzv_id
    assert launch_id() == "job 7"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # none was given: that of torchrun itself
    assert launch_id() == f"{platform.node()}-{os.getppid()}"
