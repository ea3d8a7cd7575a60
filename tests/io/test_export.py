"""Models as files for others: graphs that compute the same, a card, nothing half written."""

import json
import os

import pytest
import torch
from conftest import ROOT

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io import export as export_module
from ddp.io.checkpoint import checkpoint_state, load_model, write_checkpoint
from ddp.io.export import (
    EXPORTS,
    MAX_DIFFERENCE,
    Denoiser,
    export,
    export_onnx,
    export_torch,
    parity,
    parse_formats,
    random_inputs,
)
from ddp.io.files import file_digest
from ddp.model import build_model
from ddp.training import Trainer

TINY = {"channels_base": 8, "blocks_per_level": 1, "init": "default"}  # no weight begins as zero
STAGES = {"channel_mult": [1, 2], "patch_size": 1}
IMAGES = {**STAGES, "attention_resolutions": [4], "class_cond": True}
KINDS = {  # (event, classes, fields of Config)
    "images": ((1, 7, 8), 3, {**IMAGES, "prediction": "eps"}),
    "sequences": ((2, 9), 0, {**STAGES, "prediction": "x0"}),
    "points": ((2,), 0, {"channel_mult": [1], "patch_size": 1, "schedule": "learned"}),
}


def make_model(kind):
    """Return a model of random weights and BatchNorm statistics, in eval mode."""
    event, classes, fields = KINDS[kind]
    model = build_model(Config(dataset="mine", **TINY, **fields), event, classes).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(0.5 + torch.rand(buffer.shape))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, with last.pth, that knows paths of this machine."""
    folder = tmp_path_factory.mktemp("run")
    names = {"out_dir": "", "data_dir": "data", "labels": "labels.csv", "cache": "cache"}
    places = {name: str(folder / path) for name, path in names.items()}
    trainer = Trainer(Config(dataset="moons", **TINY, **places), load_dataset("moons"))
    write_checkpoint(folder / "last.pth", checkpoint_state(trainer) | {"seconds": 60.0})
    return folder


# ---- graphs ----


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_is_the_model(kind):
    model = make_model(kind)
    inputs = random_inputs(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(Denoiser(model)(*inputs), model.denoise(*inputs))


@pytest.mark.parametrize("kind", ["images", "points"])
def test_torch_export_computes_the_same(kind, tmp_path):
    model = make_model(kind)
    line = export_torch(model, None, tmp_path / "a.pt2")
    assert line.startswith("a.pt2: differs from PyTorch by at most")
    program = torch.export.load(tmp_path / "a.pt2").module()
    inputs = random_inputs(model, 4, seed=7)
    with torch.no_grad():
        difference = (program(*inputs) - model.denoise(*inputs)).abs().max()
    assert difference < MAX_DIFFERENCE


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_computes_the_same(kind, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_model(kind)
    export_onnx(model, None, tmp_path / "a.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]  # no file beside it
    assert str(ROOT).encode() not in (tmp_path / "a.onnx").read_bytes()  # no path of this machine
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    names = ["x_t", "log_snr", "label"][: len(graph.input)]
    assert [each.name for each in graph.input] == names
    assert [each.name for each in graph.output] == ["x0_hat"]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    inputs = random_inputs(model, 4, seed=7)
    arrays = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
    (x0_hat,) = session.run(None, arrays)
    with torch.no_grad():
        difference = (torch.from_numpy(x0_hat) - model.denoise(*inputs)).abs().max()
    assert difference < MAX_DIFFERENCE


@pytest.mark.parametrize("error", [2e-4, float("nan"), float("inf")])
def test_parity_notices_a_difference(error):
    model = make_model("points")
    denoiser = Denoiser(model)
    with pytest.raises(FloatingPointError, match="differs from PyTorch"):
        parity("a", model, denoiser, lambda *inputs: denoiser(*inputs) + error)
    assert "at most 0," in parity("a", model, denoiser, denoiser)


# ---- the folder ----


def test_folder_is_whole(run):
    pytest.importorskip("safetensors")
    lines = []
    path = export(run / "last.pth", ["safetensors"], tell=lines.append)
    assert path == run / "last-export"
    names = ["README.md", "model.safetensors", "samples.png"]
    assert sorted(file.name for file in path.iterdir()) == names
    assert [line.partition(":")[0] for line in lines] == ["model.safetensors"]
    assert (path / "samples.png").read_bytes().startswith(b"\x89PNG")
    for name in ("README.md", "model.safetensors"):
        assert str(run).encode() not in (path / name).read_bytes()  # no path of this machine
    ours, theirs = (load_model(file)[0] for file in (run / "last.pth", path / "model.safetensors"))
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        export(run / "last.pth", ["safetensors"])


def test_failure_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(FloatingPointError, match="nothing is written"):
        export(run / "last.pth", ["torch_export"], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_card(run, tmp_path):
    """It tells settings and figures; those of another file of the same name are left out."""
    folder = tmp_path / "last-evaluation"
    folder.mkdir()
    file = tmp_path / "last.pth"
    file.write_bytes((run / "last.pth").read_bytes())
    record = {"host": "elsewhere", "command": ["/home/me/train.py", "--data_dir=/home/me/data"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    estimate = {"value": 0.25, "error": 0.125, "interval": [0, 1]}
    subject = {"name": "last", "about": {"sha256": file_digest(file)}}
    subject["points"] = {"precision": {"samples": estimate, "real_vs_real": estimate}}
    recipe = {"num_samples": 7, "reference": "test", "unit": "nats"}
    text = {}
    for name in ("ours", "another"):
        (folder / "evaluation.json").write_text(
            json.dumps({"subjects": [subject], "recipe": recipe})
        )
        older = tmp_path / "last-evaluation-2" / "evaluation.json"
        older.parent.mkdir(exist_ok=True)
        other = {"subjects": [{**subject, "vlb": {"discrete": {"total": estimate}}}]}
        older.write_text(json.dumps({**other, "recipe": recipe}))
        os.utime(older, (1, 1))
        path = export(file, [], tmp_path / name)
        text[name] = (path / "README.md").read_text()
        subject["about"]["sha256"] = "0"
    assert "| precision of points | 0.2500 ± 0.1250 | 0.2500 ± 0.1250 |" in text["ours"]
    assert "| vlb, discrete, total | 0.2500 ± 0.1250 | |" in text["ours"]  # of the older
    assert "7 samples, test items" in text["ours"]
    assert "It was not measured" in text["another"]
    for card in text.values():
        assert "0 steps, 60 s" in card
        assert "channels_base=8" in card
        assert "generate.py --checkpoint last.pth" in card
        assert "home" not in card
        assert "MIT license" in card


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"subjects": []}', '{"subjects": [{}]}'])
def test_card_does_without_a_damaged_evaluation(run, tmp_path, content):
    (tmp_path / "last-evaluation").mkdir()
    (tmp_path / "last-evaluation" / "evaluation.json").write_text(content)
    (tmp_path / "last.pth").write_bytes((run / "last.pth").read_bytes())
    path = export(tmp_path / "last.pth", [])
    assert "It was not measured" in (path / "README.md").read_text()


def test_formats(monkeypatch):
    assert parse_formats("torch_export, torch_export") == ["torch_export"]
    with pytest.raises(ValueError, match=r"format=tflite: expected some of safetensors, onnx"):
        parse_formats("torch_export,tflite")
    lacking = EXPORTS["torch_export"]._replace(packages=("json", "no_such_library"))
    monkeypatch.setitem(EXPORTS, "torch_export", lacking)
    with pytest.raises(OSError, match=r"pip install no_such_library$"):
        parse_formats("torch_export")


def test_command_of_this_machine_has_no_paths(run, monkeypatch):
    from ddp.io.card import training_command

    command = ["/home/me/train.py", "--data_dir=/home/me/data", "--out_dir", "/home/me/runs"]
    monkeypatch.setattr("ddp.io.card.read_record", lambda folder: {"command": command})
    assert training_command(run) == "python train.py --data_dir=data --out_dir runs"
