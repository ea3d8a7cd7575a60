"""What a checkpoint is, in words."""

from conftest import ROOT

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.checkpoint import checkpoint_state, strip_training_state, write_checkpoint
from ddp.io.describe import inspect_checkpoint
from ddp.training import Trainer


def make_trainer(**options):
    config = Config(**{"channels_base": 8, "blocks_per_level": 1, "batch_size": 8, **options})
    return Trainer(config, load_dataset(config.dataset))


def facts_of(path):
    """Return what is said of a checkpoint: name -> text."""
    first, *lines = inspect_checkpoint(path)
    assert first.startswith(f"{path} (")
    assert len(lines) <= 12
    assert all("\n" not in line for line in lines)
    return {line[2:].split("  ")[0]: line.split("  ")[-1] for line in lines}


def test_run_and_finished_model(tmp_path):
    trainer = make_trainer(dataset="digits", class_cond=True, lr=3e-4, norm="group")
    trainer.train_step(0.0)
    state = checkpoint_state(trainer) | {"seconds": 1234.0}
    run = facts_of(write_checkpoint(tmp_path / "last.pth", state))
    model = facts_of(write_checkpoint(tmp_path / "model.pth", strip_training_state(state)))
    assert run["kind"].startswith("a run to go on with")
    assert model["kind"].startswith("a finished model")
    assert run["training"] == "1 step, 1,234 s"
    assert "does not keep the seconds" in model["training"]
    for facts in (run, model):
        count = sum(weight.numel() for weight in trainer.model.network.parameters())
        assert f"{count:,} parameters" in facts["network"]
        assert "class-conditional, for CFG too" in facts["network"]
        assert "(1, 8, 8), 10 classes (0, 1, 2, 3, 4, ...)" in facts["data"]
        assert trainer.dataset.fingerprint in facts["data"]
        assert "norm group" in facts["layers"]
        assert "lr 0.0003" in facts["optimizer"]


def test_points_of_a_learned_schedule(tmp_path):
    state = checkpoint_state(make_trainer(dataset="checkerboard", schedule="learned"))
    facts = facts_of(write_checkpoint(tmp_path / "a.pth", state))
    assert facts["schedule"].startswith("learned, continuous time")
    assert "points (2,), no classes" in facts["data"]
    assert "mlp" in facts["network"]


def test_shipped_models():
    for name in ("digits", "mnist"):
        facts = facts_of(ROOT / "checkpoints" / f"{name}.pth")
        assert facts["data"].startswith(name)
        assert "torch 2" in facts["made by"]
