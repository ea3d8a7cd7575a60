"""Checkpoints by URL, from a server of this machine."""

import hashlib
import http.server
import threading

import pytest
from conftest import ROOT

from ddp.io.download import cache_folder, download, locate

CONTENT = (ROOT / "checkpoints" / "digits.pth").read_bytes()
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every path with what the server's `answer` is, (status, content, declared length)."""

    def do_GET(self):
        self.server.asked.append(self.path)
        status, content, length = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer = [], (200, CONTENT, len(CONTENT))
    server.url = f"http://127.0.0.1:{server.server_port}/models/digits.pth"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def files_in_cache():
    return [path for path in cache_folder().rglob("*") if path.is_file()]


def test_download_is_kept(server):
    path, beside = locate(server.url)
    assert path.read_bytes() == CONTENT
    assert (path.name, str(beside)) == ("digits.pth", "digits.pth")
    assert locate(server.url)[0] == path
    assert locate(f"{server.url}#sha256={SHA.upper()}")[0] == path
    assert len(server.asked) == 1
    assert files_in_cache() == [path]


def test_query_tells_urls_apart(server):
    paths = {download(server.url + query) for query in ("", "?a=1", "?a=2")}
    assert len(paths) == 3
    assert {path.name for path in paths} == {"digits.pth"}


def test_wrong_digest_keeps_nothing(server):
    with pytest.raises(OSError, match="not the published file") as caught:
        download(f"{server.url}#sha256={'0' * 64}")
    assert "\n" not in str(caught.value)
    assert files_in_cache() == []


def test_changed_file_comes_again(server):
    download(server.url).write_bytes(b"other")
    assert download(f"{server.url}#sha256={SHA}").read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "answer",
    [
        (404, b"no", 2),
        (200, b"<html>", 6),
        (200, CONTENT[:1000], 1000),
        (200, CONTENT[:1000], len(CONTENT)),
        (200, CONTENT, 1 << 60),
    ],
)
def test_anything_else_is_refused(server, answer):
    server.answer = answer
    with pytest.raises(OSError, match="cannot download http://127") as caught:
        download(server.url)
    assert "\n" not in str(caught.value)
    assert files_in_cache() == []


@pytest.mark.parametrize("tail", ["#md5=1", "#sha256=12", "#x"])
def test_strange_fragment_is_refused(server, tail):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        download(server.url + tail)
    assert server.asked == []


@pytest.mark.parametrize("path", ["", "/", "/model", "/a.zip", "/.pth", "/..%2fa.txt"])
def test_strange_path_is_refused(path):
    with pytest.raises(ValueError, match=r"expected the URL of a \.pth or \.safetensors"):
        download(f"http://127.0.0.1:9{path}")


def test_path_is_left_as_it_is(tmp_path):
    assert locate(str(tmp_path / "a.pth")) == (tmp_path / "a.pth", tmp_path / "a.pth")
    (tmp_path / "model.pth").write_bytes(b"")
    assert locate(tmp_path)[0] == tmp_path / "model.pth"
