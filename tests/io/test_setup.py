"""A run that starts with the weights of another: with those, and with nothing else of it."""

import pytest
import torch

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.checkpoint import checkpoint_state, strip_training_state, write_checkpoint
from ddp.io.setup import build_trainer, starting_weights
from ddp.training import Trainer

SMALL = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def config_of(dataset, **fields):
    return Config(max_steps=3, **{**SMALL, **fields}).resolve(dataset)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(config_of(digits), digits)
    for _ in trainer.run():
        pass
    trainer.recalibrated_ema()
    write_checkpoint(folder / "model.pth", strip_training_state(checkpoint_state(trainer)))
    return folder


@pytest.mark.parametrize("name", ["", "model.pth"])
def test_a_run_starts_with_the_weights_of_another(digits, folder, name):
    config = config_of(digits, lr=1e-4, seed=5, prediction="v")
    lines = []
    weights = starting_weights(folder / name, config, digits, lines.append)
    assert lines == [f"it starts with the weights of {folder / name}"]
    trainer = build_trainer(config, digits, torch.device("cpu"), None, lambda line: None, weights)
    for model in (trainer.model, trainer.ema):
        assert model.network.state_dict().keys() == weights.keys()
        for key, value in model.network.state_dict().items():
            assert value.equal(weights[key])
    assert (trainer.step, trainer.best) == (0, None)
    trainer.train_step(0.0)
    assert not trainer.model.network.conv_in.weight.equal(weights["conv_in.weight"])


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"channels_base": 16}, "channels_base=8"),
        ({"norm": "none", "dropout": 0.2}, "norm=batch"),  # dropout has no weights
        ({"class_cond": True}, "class_cond=False"),
    ],
)
def test_weights_of_another_network_are_refused(digits, folder, fields, needed):
    with pytest.raises(ValueError, match=f"its network is of {needed}; give the same"):
        starting_weights(folder, config_of(digits, **fields), digits, print)


def test_no_weights_and_no_checkpoint(digits, tmp_path):
    assert starting_weights(None, config_of(digits), digits, print) is None
    with pytest.raises(OSError, match=r"nowhere.pth"):
        starting_weights(tmp_path / "nowhere.pth", config_of(digits), digits, print)
