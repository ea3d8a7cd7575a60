"""Streams that print never fails on, and signals after which everything is tidied up."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from tqdm import tqdm

from ddp.io.files import atomic_dir, atomic_write
from ddp.io.terminal import MAX_LINE, GracefulStop, SafeStream, Stopped, safe_process

HANGUP = pytest.param("SIGHUP", marks=pytest.mark.skipif(os.name == "nt", reason="POSIX"))


def printed(text, encoding="utf-8", **options):
    """Return what comes out of a SafeStream of an encoding, as bytes."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print(text, file=SafeStream(stream, **options), flush=True)
    return raw.getvalue()


# ---- what is printed ----


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("utf-8", "é µ 中", "é µ 中".encode()),
        ("cp1252", "é µ 中", b"\xe9 \xb5 \\u4e2d"),
        ("ascii", "é µ", b"\\xe9 \\xb5"),
        ("utf-8", os.fsdecode(b"a\xff"), b"a\\udcff"),  # a file's name that is no UTF-8
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding, text, expected):
    assert printed(text, encoding) == expected + os.linesep.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\x00b\x7f\x9b31m", r"a\x00b\x7f\x9b31m"),
        ("cat\rdog", r"cat\rdog"),
        ("\u202egnp.exe\u2028", r"\u202egnp.exe\u2028"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[A", r"\x1b[A"),
    ],
)
def test_control_characters_of_a_file_do_not_reach_the_terminal(text, expected):
    assert printed(text).decode() == expected + os.linesep


def test_lines_are_cut_each_on_its_own():
    lines = printed("x" * 10**6 + "\n" + "y" * 100).decode().splitlines()
    assert [len(line) for line in lines] == [MAX_LINE + 4, 100]
    text = "\n".join(["z" * 100] * 1000)
    assert printed(text).decode() == text + "\n"  # many lines are not a long one


def test_bars_may_move_the_cursor_and_nothing_else():
    raw = io.StringIO()
    stream = SafeStream(raw, bars=True)
    with tqdm(total=2, file=stream, ascii=True) as outer, tqdm(total=2, file=stream) as inner:
        inner.set_description("\x1b[31mred")
        inner.update(2)
        outer.update(2)
    assert "\x1b[A" in raw.getvalue()
    assert "\r" in raw.getvalue()
    assert r"\x1b[31mred" in raw.getvalue()
    assert "\x1b[31m" not in raw.getvalue()


def test_every_line_is_there_at_once(tmp_path):
    """Of a long run that writes to a file."""
    with open(tmp_path / "log", "w") as f:
        print("step 1", file=SafeStream(f))
        assert (tmp_path / "log").read_text() == "step 1\n"


# ---- where it is printed to ----


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_file():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [closed_pipe, closed_file, lambda: None])
def test_print_never_fails(make):
    stream = make()
    safe = SafeStream(stream)
    for _ in range(3):
        print("x" * 100_000, file=safe, flush=True)
    if make is closed_pipe:
        stream.close()  # nor does Python, when it ends


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_print_to_a_full_disk_does_not_fail():
    with open("/dev/full", "w") as full:
        print("x", file=SafeStream(full), flush=True)


PROGRAM = """
import sys
from ddp.io.cli import command

def main(args):
    print("before")
    print("wrong", file=sys.stderr)
    with open("result", "w") as f:
        f.write(f"{f.fileno()}")
    print("after" * 10_000)
    return 0

sys.exit(command(main, lambda arguments: None, []))
"""


def test_program_whose_streams_are_closed_does_its_work(tmp_path):
    """stdout is a pipe that nobody reads, stderr and stdin are closed; the exit code is 0."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with closed_pipe() as pipe:
        code = subprocess.run(
            f"exec {sys.executable} program.py 2>&- <&-",
            shell=True,
            cwd=tmp_path,
            stdout=pipe,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        ).returncode
    assert code == 0
    # what C code writes to a stream that was closed does not end up in a file
    assert int((tmp_path / "result").read_text()) > 2


# ---- signals ----


@pytest.mark.parametrize("name", ["SIGTERM", HANGUP])
def test_a_signal_leaves_no_unfinished_file(tmp_path, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def write(path):
        path.write_text("half")
        signal.raise_signal(number)

    with pytest.raises(Stopped) as stopped, safe_process(), atomic_dir(tmp_path / "out") as out:
        atomic_write(out.folder / "a", write)
    assert stopped.value.number == number
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", ["SIGTERM", HANGUP])
def test_a_second_signal_does_not_disturb_the_tidying_up(name):
    done = []

    def work():
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            signal.raise_signal(getattr(signal, name))
            done.append("tidy")

    with pytest.raises(Stopped), safe_process():
        work()
    assert done == ["tidy"]


@pytest.mark.parametrize("name", ["SIGTERM", HANGUP, "SIGINT"])
def test_a_signal_that_is_ignored_stays_so(name):
    """As nohup asks for SIGHUP."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with safe_process(), GracefulStop(print) as stop:
            signal.raise_signal(number)
        assert stop.signal is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("name", ["SIGTERM", HANGUP, "SIGINT"])
def test_graceful_stop_tells_once_and_puts_the_handlers_back(name):
    number = getattr(signal, name)
    lines = []
    before = signal.getsignal(number)
    with GracefulStop(lines.append) as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
    assert len(lines) == 1
    assert signal.getsignal(number) == before


def test_a_signal_that_comes_while_the_processes_ask_each_other_is_not_lost(monkeypatch):
    """All of them may wait at this very moment, and none would ever stop."""

    def ask(number):
        signal.raise_signal(signal.SIGTERM)
        return number  # the largest that was sent

    with GracefulStop(lambda line: None) as stop:
        monkeypatch.setattr("ddp.io.terminal.maximum", ask)
        assert not stop.came()  # as the other processes see it, too
        assert stop.signal == signal.SIGTERM
        monkeypatch.setattr("ddp.io.terminal.maximum", lambda number: number)
        assert stop.came()


def twice(first, second):
    with GracefulStop(lambda line: None) as stop:
        signal.raise_signal(getattr(signal, first))
        signal.raise_signal(getattr(signal, second))
    return stop


def test_second_signal_stops_at_once():
    for first, second in (("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")):
        with pytest.raises(KeyboardInterrupt):
            twice(first, second)


@pytest.mark.skipif(os.name == "nt", reason="POSIX")
def test_a_terminal_that_closes_sends_two_signals_that_count_as_one():
    assert twice("SIGHUP", "SIGHUP").signal == signal.SIGHUP
    with pytest.raises(KeyboardInterrupt):
        twice("SIGHUP", "SIGTERM")


def test_another_thread_may_run_a_script():
    """Only the first may set handlers."""
    failures = []

    def work():
        try:
            with safe_process(), GracefulStop(print):
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_streams_are_put_back_after_an_error():
    before = sys.stdout, sys.stderr

    def fail():
        with safe_process():
            assert sys.stdout is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (sys.stdout, sys.stderr) == before
