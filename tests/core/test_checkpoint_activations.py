"""Recomputed blocks: the same bits as without, from less memory."""

import operator

import pytest
import torch
from tiny import random_points, tiny_trainer

from ddp.io.memory import step_bytes
from ddp.model import build_model

TWO_LEVELS = {"patch_size": 1, "channel_mult": [2, 2]}  # 8 and 4 a side, of digits


def trained(steps=3, **fields):
    """Return what a run remembers after some steps."""
    trainer = tiny_trainer(**fields)
    for _ in range(steps):
        trainer.train_step(0.0)
    state = trainer.state_dict()
    return {name: state[name] for name in ("model", "ema", "optimizer", "noise_dist")}


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.2, "class_cond": True, "attention_resolutions": [4, 8], **TWO_LEVELS},
        {"grad_accumulation": 2, "noise_dist": "importance", "blocks_per_level": 2},
        {"schedule": "learned", "norm": "group", "dropout": 0.2},
        {"dataset": "moons", "dropout": 0.2, "batch_size": 64},
        {"dataset": random_points(event=(2, 12)), "attention_resolutions": [8]},  # sequences
        {"precision": "bf16", "norm": "none", "activation": "silu", "augment": "edm"},
        {"precision": "bf16", "fourier_features": 2, "patch_size": 2, "augment": "edm"},
        {"shards": 4, "dropout": 0.2},
    ],
)
def test_recomputed_blocks_give_the_same_bits(fields):
    """Those of weights, moments and BatchNorm's running statistics, its counter included."""
    state = trained(**fields)
    recomputed = trained(checkpoint_activations=True, **fields)
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    others, other_spec = torch.utils._pytree.tree_flatten(recomputed)
    assert spec == other_spec
    for value, other in zip(leaves, others, strict=True):
        is_same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert is_same(value, other)


def test_recomputed_blocks_keep_less():
    """The more blocks, the more: what is within them is there once, and not once for each."""
    trainer = tiny_trainer(blocks_per_level=4, **TWO_LEVELS)
    config = trainer.config
    bytes_of = {}
    for recompute in (False, True):
        config.checkpoint_activations = recompute
        with torch.device("meta"):
            bytes_of[recompute] = step_bytes(build_model(config, (3, 32, 32)), 256)
    assert bytes_of[True] < 0.5 * bytes_of[False]


def test_nothing_is_kept_or_recomputed_without_gradients(monkeypatch):
    trainer = tiny_trainer(random_points(), checkpoint_activations=True)
    monkeypatch.setattr("ddp.reverse.checkpoint", None)
    x0_hat = trainer.recalibrated_ema()
    with torch.no_grad():
        assert x0_hat.denoise(torch.zeros(4, 2), torch.zeros(())).shape == (4, 2)
