"""report.html of a run: what it shows, that it stays small, and that a run outlives it."""

import re

import pytest
from PIL import Image

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io import run_writer
from ddp.io.run_page import MAX_GRIDS, NAME, evenly, slider, summary
from ddp.io.run_writer import RunWriter
from ddp.training import Trainer

SMALL = {"channels_base": 8, "blocks_per_level": 1, "noise_copies": 1, "batch_size": 8}


def trained(tmp_path, dataset="digits", **fields):
    """Return (RunWriter, Trainer) of a run of two steps, of which all is written."""
    data = load_dataset(dataset)
    config = Config(dataset=dataset, max_steps=2, **SMALL, **fields).resolve(data)
    trainer = Trainer(config, data)
    warnings = []
    run = RunWriter(tmp_path / "run", warn=warnings.append)
    for stats in trainer.run():
        run.log_step(stats)
        run.save(trainer, keep=1)
        run.write_samples(trainer)
    return run, trainer, warnings


@pytest.mark.parametrize(
    ("dataset", "fields"), [("digits", {"class_cond": True}), ("moons", {}), ("digits", {})]
)
def test_page_shows_where_a_run_stands(tmp_path, dataset, fields):
    run, trainer, warnings = trained(tmp_path, dataset, **fields)
    page = (run.folder / NAME).read_text()
    assert warnings == []
    assert f"<h1>run: {trainer.num_params:,} weights on {dataset}</h1>" in page
    assert "Step 2 of 2, epoch 0.0; loss " in page
    assert re.findall(r'data-step="(\d+)"( hidden)?', page) == [("1", " hidden"), ("2", "")]
    assert page.count("<figure>") == 3  # curves
    assert "&quot;batch_size&quot;: 8" in page
    assert trainer.dataset.fingerprint in page
    assert "http" not in page.replace("http-equiv", "")  # needs no network
    assert len(page) < 1_000_000


def test_page_leaves_no_trace_in_the_run(tmp_path):
    _, watched, _ = trained(tmp_path / "a")
    plain = Trainer(watched.config, watched.dataset)
    for _ in plain.run():
        plain.recalibrated_ema()
    for one, other in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert one.equal(other)


def test_a_run_outlives_its_page(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no page today")

    monkeypatch.setattr(run_writer, "write_page", fail)
    run, _, warnings = trained(tmp_path)
    assert (
        warnings == ["warning: report.html cannot be written (no page today); the run goes on"] * 2
    )
    assert (run.folder / "samples" / "step_00000002.png").exists()


def test_grids_are_few_and_small(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for step in range(40):
        Image.effect_noise((400, 400), 50).save(folder / f"step_{step:08d}.png")
    shown = slider(tmp_path)
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', shown)]
    assert steps[0] == 0
    assert steps[-1] == 39
    assert 2 <= len(steps) <= MAX_GRIDS
    assert len(shown) < 2_100_000
    assert f'max="{len(steps) - 1}"' in shown


def test_evenly_keeps_both_ends():
    assert evenly([1, 2, 3], 5) == [1, 2, 3]
    assert evenly([*range(10)], 4) == [0, 3, 6, 9]
    assert evenly([1, 2], 1) == [2]


def test_summary_says_how_long_it_takes(tmp_path):
    _, trainer, _ = trained(tmp_path)
    trainer.step, trainer.seconds = 1, 120.0
    text = summary(trainer, [])
    assert "Step 1 of 2" in text
    assert "2.0 minutes of training, 2.0 left" in text
    trainer.step = 2
    assert "2.0 minutes of training, all of it" in summary(trainer, [])
    assert "0 items a second" in text
