"""Models that are shared: the commands that say what one is and export it, and what reads that."""

import http.server
import threading
from functools import partial

import pytest
from helpers import execute, read_arrays, run

FAST = ["--num_samples", 4, "--steps", 3]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The folder that ddp.export wrote of a run."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("shared") / "model-export"  # other tests look at the run
    out = run("ddp.export.py", trained / "digits", "--out", folder, cwd=trained)
    assert "model.safetensors: holds the same numbers" in out
    return folder


def test_generate_draws_the_same(trained, exported, tmp_path):
    samples = []
    for i, path in enumerate((trained / "digits" / "model.pth", exported / "model.safetensors")):
        run("generate.py", "--checkpoint", path, *FAST, "--out", f"{i}.npz", cwd=tmp_path)
        samples.append(read_arrays(tmp_path / f"{i}.npz")["images"])
    assert (samples[0] == samples[1]).all()


def test_evaluate_measures_the_same(trained, exported, tmp_path):
    flags = ["--metrics", "loss,pixel_stats", "--num_samples", 8, "--vlb_items", 8]
    out = []
    for i, path in enumerate((trained / "digits" / "model.pth", exported / "model.safetensors")):
        text = run("evaluate.py", "--checkpoint", path, *flags, "--out", f"{i}", cwd=tmp_path)
        out.append(text.rpartition("wrote")[0].splitlines()[:-1])
    assert out[0] == out[1]
    assert len(out[0]) > 10


def test_compare_takes_both(trained, exported, tmp_path):
    paths = [trained / "digits" / "model.pth", exported / "model.safetensors"]
    flags = ["--metrics", "loss", "--vlb_items", 8, "--out", "c"]
    run("evaluate.py", "--compare", *paths, *flags, cwd=tmp_path)


@pytest.mark.parametrize("command", ["ddp.inspect.py", "ddp.export.py"])
def test_errors_are_one_line(command, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"bad")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    for name in ("nothing.pth", "bad.pth", "bad.safetensors", "."):
        result = execute(command, name, cwd=tmp_path)
        assert result.code == 1
        assert result.out == ""
        assert len(result.err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "bad.safetensors"]


def test_export_refuses_what_cannot_be(trained, exported, tmp_path):
    folder = trained / "digits"
    for flags in ((folder, "--format", "tflite"), (folder, "--out", exported)):
        result = execute("ddp.export.py", *flags, cwd=tmp_path)
        assert result.code == 2
        assert len(result.err.strip().splitlines()) == 1


def test_inspect_says_the_same_of_both(trained, exported, tmp_path):
    pth = run("ddp.inspect.py", trained / "digits", cwd=tmp_path).splitlines()
    other = run("ddp.inspect.py", exported / "model.safetensors", cwd=tmp_path).splitlines()
    assert "digits: images (1, 8, 8)" in "".join(pth)
    assert pth[1:] == other[1:]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def url(trained, monkeypatch, tmp_path):
    """The URL of a folder of models, on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handler = partial(Quiet, directory=trained / "digits")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_scripts_take_a_url(url, tmp_path):
    """What they write lies in the current folder, not in the cache."""
    run("generate.py", "--checkpoint", f"{url}/model.pth", *FAST, cwd=tmp_path)
    flags = ["--metrics", "loss", "--vlb_items", 8]
    run("evaluate.py", "--checkpoint", f"{url}/model.pth", *flags, cwd=tmp_path)
    assert "digits" in run("ddp.inspect.py", f"{url}/model.pth", cwd=tmp_path)
    run("ddp.export.py", f"{url}/model.pth", "--format", "torch_export", cwd=tmp_path)
    names = ["cache", "model-evaluation", "model-export", "model-samples"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    cached = [path.name for path in (tmp_path / "cache" / "ddp" / "models").rglob("*.*")]
    assert cached == ["model.pth"]


def test_wrong_digest_is_one_line(url, tmp_path):
    checkpoint = f"{url}/model.pth#sha256={'0' * 64}"
    result = execute("generate.py", "--checkpoint", checkpoint, *FAST, cwd=tmp_path)
    assert result.code == 1
    assert "not the published file" in result.error_line
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
