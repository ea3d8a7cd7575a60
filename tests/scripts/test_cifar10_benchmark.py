"""What measures a GPU: slices of a run are the run, and a check that fails does not end all."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import TINY, refused, run

from ddp.config import Config
from ddp.data import Dataset
from ddp.io.archive import content_digest
from ddp.io.checkpoint import read_checkpoint
from ddp.io.device import set_deterministic
from ddp.model import build_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import cifar10
import gpu_check

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = [*TINY, "--dataset", "digits", "--max_steps", 6, "--samples", 40, "--seed_samples", 30]
SMALL += ["--nfe", 2, 3, "--seeds", 2, "--sample_batch", 20]


@pytest.fixture
def few_steps(monkeypatch, small_bn_batches):
    """Few steps that are timed, and a small product of matrices."""
    monkeypatch.setattr(cifar10, "WARMUP_STEPS", 1)
    monkeypatch.setattr(cifar10, "TIMED_STEPS", 1)
    monkeypatch.setattr(cifar10, "MATRIX_SIDE", {"cpu": 16})


def digest_of(path):
    state = read_checkpoint(path)
    return content_digest([state["step"], state["ema"]])


def test_a_run_in_slices_is_the_run(tmp_path, few_steps, monkeypatch):
    out = run("cifar10.py", *SMALL, "--out", "whole", cwd=tmp_path)
    results = json.loads((tmp_path / "whole" / "cifar10.json").read_text())
    keys = [(row["space"], row["count"], row["nfe"], row["seed"]) for row in results["rows"]]
    expected = {("classifier", 40, 2, 0), ("filters", 30, 3, 1)}
    assert expected <= set(keys)
    assert len(keys) == len(set(keys)) == 2 * 2 * 3  # spaces, NFE; seed 0 twice, seed 1
    row = next(row for row in results["rows"] if row["count"] == 40)
    assert f"{row['fd_train']:.4g}" in out
    assert (tmp_path / "whole" / "samples-3.png").stat().st_size > 1000
    seconds = iter(range(10**6))  # one at each look at the clock
    monkeypatch.setattr(cifar10, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    for _ in range(40):
        out = run("cifar10.py", *SMALL, "--slice_minutes", 0.2, "--out", "slices", cwd=tmp_path)
        if "the same command goes on" not in out:
            break
    calls = json.loads((tmp_path / "slices" / "cifar10.json").read_text())["calls"]
    assert len(calls) > 2
    paths = [tmp_path / name / "model.pth" for name in ("whole", "slices")]
    assert digest_of(paths[0]) == digest_of(paths[1])
    again = json.loads((tmp_path / "slices" / "cifar10.json").read_text())["rows"]
    for ours, theirs in zip(again, results["rows"], strict=True):
        assert ours["fd_test"] == theirs["fd_test"]


def test_minutes_plan_the_steps_once(tmp_path, few_steps):
    flags = [*SMALL[: SMALL.index("--max_steps")], *SMALL[SMALL.index("--samples") :]]
    run("cifar10.py", *flags, "--minutes", 0.002, "--slice_minutes", 1e-4, cwd=tmp_path)
    steps = read_checkpoint(tmp_path / "cifar10" / "last.pth")["config"]["planned_steps"]
    assert steps >= 1
    assert "minutes=1" in refused("cifar10.py", *flags, "--minutes", 1, cwd=tmp_path)
    assert "max_minutes" in refused("cifar10.py", "--max_minutes", 1, cwd=tmp_path)


def test_nothing_is_lost_when_measuring_fails(tmp_path, few_steps, monkeypatch):
    def fail(*_):
        raise OSError("no such weights")

    monkeypatch.setattr(cifar10, "Judge", fail)
    path = tmp_path / "cifar10" / "cifar10.json"
    results = []
    for _ in range(2):
        assert "no such weights" in refused("cifar10.py", *SMALL, cwd=tmp_path, code=1)
        results.append(json.loads(path.read_text()))
    assert results[0]["losses"][-1][0] == results[0]["training"]["steps"] == 6
    assert results[0]["calls"][0]["training"] > 0
    for name in ("losses", "training", "test_loss", "config"):
        assert results[1][name] == results[0][name]
    assert [call["training"] for call in results[1]["calls"][1:]] == [0.0]


def test_images_on_a_gpu_are_measured_on_the_cpu(monkeypatch):
    """The training images of a Trainer lie on its device, the features of samples do not."""
    on_cpu = SimpleNamespace(train=range(30))
    model = SimpleNamespace(for_inference=lambda dtype: "model")
    trainer = SimpleNamespace(device=CPU, config=Config(), recalibrated_ema=lambda: model)
    trainer.dataset = SimpleNamespace(train=range(30), to={"cpu": on_cpu}.get)
    seen = []

    class Judge:
        def __init__(self, dataset, *_):
            self.about = {}
            seen.append(dataset)

        def real_rows(self):
            return []

        def rows(self, items, counts):
            return [{"count": count} for count in counts]

    def draw(dataset, model, nfe, seed, count, args):
        seen.append(dataset)
        return range(count), 1.0

    for name, function in {"Judge": Judge, "draw": draw, "save": print}.items():
        monkeypatch.setattr(cifar10, name, function)
    flags = ["--nfe", "2", "--seeds", "2", "--samples", "20", "--seed_samples", "20"]
    args = cifar10.parse(flags)
    results = {"rows": [{"nfe": 2, "seed": 0}]}
    assert cifar10.measure_samples(trainer, args, results, time.monotonic())
    assert results["rows"][1:] == [{"count": 20, "nfe": 2, "seed": 1, "samples_per_second": 20}]
    assert len(seen) == 3
    assert all(dataset is on_cpu for dataset in seen)


def test_all_training_items_are_trained_on(monkeypatch):
    items = torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1).expand(-1, 3, 4, 4)
    parts = {"train": items[:6], "val": items[6:9], "test": items[9:]}
    labels = {"train_labels": torch.zeros(6), "val_labels": torch.ones(3)}
    dataset = Dataset("images", **parts, **labels)
    monkeypatch.setattr(cifar10, "load_dataset", lambda **_: dataset)
    whole = cifar10.load_images(Config())
    assert torch.equal(whole.train, items[:9])
    assert whole.train_labels.tolist() == [0] * 6 + [1] * 3
    assert whole.selection_split == "test"


def test_flops_are_those_of_the_convolutions_and_products():
    """By hand: forward twice the multiplications, backward twice that but for the first layer."""
    fields = {"channels_base": 8, "blocks_per_level": 1, "channel_mult": [1], "patch_size": 1}
    config = Config(batch_size=5, grad_accumulation=3, noise_copies=2, **fields)
    model = build_model(config, (1, 4, 4))
    trainer = SimpleNamespace(config=config, model=model)
    calls = []
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, y: calls.append((layer, y)))
    x_t = torch.zeros(10, 1, 4, 4)
    model.denoise(x_t, torch.zeros(10))
    products = [y.numel() * layer.weight[0].numel() for layer, y in calls]
    first = [n for n, (layer, _) in zip(products, calls, strict=True) if layer in first_of(model)]
    assert cifar10.step_flops(trainer) == 3 * 2 * (3 * sum(products) - sum(first))


def first_of(model):
    """Return the layers whose input asks for no gradient."""
    return [model.network.conv_in, model.network.embedding.mlp[0]]


def test_a_check_that_fails_is_a_line(tmp_path, monkeypatch):
    def fail(bench):
        raise RuntimeError("no kernel for it")

    monkeypatch.setitem(gpu_check.CHECKS, "resume", fail)
    flags = ["--tiny", "--only", "resume", "random numbers", "--batches", 4, "--device", "cpu"]
    out = run("gpu_check.py", *flags, cwd=tmp_path)
    assert "FAIL resume" in out
    assert "no kernel for it" in out
    assert "ok   random numbers" in out
    assert "1 of 2 checks failed: resume" in out
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["ok"] for row in results["checks"]] == [False, True]
    assert [row["name"] for row in results["steps"]] == ["one order", "any order"]
    assert all(row["ms"] > 0 for row in results["steps"])


@pytest.fixture
def rules():
    """Leave PyTorch's rules for kernels as they were."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_kernels_add_in_one_order_unless_they_need_not(rules):
    for wanted in (True, False):
        set_deterministic(wanted, CUDA)
        assert torch.backends.cudnn.deterministic == wanted
        assert torch.backends.cudnn.benchmark != wanted
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not wanted or torch.is_deterministic_algorithms_warn_only_enabled()
