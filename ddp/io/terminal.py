"""What a process lives in: streams that print never fails on, signals after which all is tidied."""

import contextlib
import io
import os
import re
import signal
import sys
import threading

from ddp.distributed import maximum, world_size

MAX_LINE = 4000  # characters of a line that are printed
# escape sequences and the like, Unicode's ends of a line and its changes of direction
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
MOVES = re.compile(r"(\n|\x1b\[A)*")  # how tqdm goes from one bar to another


class SafeStream:
    """A stream to print to that never fails, and shows no more than text.

    What its encoding lacks and control characters are printed as escapes, long lines are cut. When
    it cannot be written to, such as a closed pipe or a full disk, what is printed is lost, and no
    more than that."""

    def __init__(self, stream, bars=False):
        self.stream = io.StringIO() if stream is None else stream  # None: closed from the start
        self.bars = bars  # tqdm writes here, which moves the cursor

    def __getattr__(self, name):
        return getattr(self.stream, name)  # isatty, fileno, encoding, ...

    def write(self, text):
        with self.failing_quietly():
            self.stream.write(self.clean(text))
        if "\n" in text:  # so that a log is read as it grows
            self.flush()
        return len(text)

    def flush(self):
        with self.failing_quietly():
            self.stream.flush()

    def clean(self, text):
        if self.bars and MOVES.fullmatch(text):
            return text
        lines = text.split("\n") if len(text) > MAX_LINE else [text]
        text = "\n".join(line[:MAX_LINE] + " ..." * (len(line) > MAX_LINE) for line in lines)
        text = CONTROLS.sub(self.escape, text)
        encoding = self.stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def escape(self, found):
        if self.bars and found[0] == "\r":
            return "\r"
        return found[0].encode("unicode_escape").decode()

    @contextlib.contextmanager
    def failing_quietly(self):
        try:
            yield
        except BlockingIOError:  # it takes the rest later
            pass
        except (OSError, ValueError):  # ValueError: it was closed
            with contextlib.suppress(OSError, ValueError):
                number = self.stream.fileno()  # Python itself flushes it at the end, and would fail
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), number)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came. Like Ctrl-C it unwinds all, so that what is unfinished is removed."""

    def __init__(self, number):
        super().__init__()
        self.number = number  # of the signal


def handle_signals(handler, *names):
    """Have handler(number, frame) called for signals -> {number: the handler of before}.

    What is ignored stays so, as nohup wants it for SIGHUP; so does what this system lacks."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may do this
        for number in (getattr(signal, name, None) for name in names):
            if number and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def restore_signals(before):
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def safe_process():
    """Streams that print never fails on, and signals that tidy up, until the block ends."""
    for number in range(3):  # one that is closed would be given to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    came = []

    def stop(number, frame):
        if not came:  # a terminal that closes sends two; the second finds all being tidied up
            came.append(number)
            raise Stopped(number)

    before = handle_signals(stop, "SIGTERM", "SIGHUP")
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr, bars=True)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
        restore_signals(before)


class GracefulStop:
    """Ctrl-C, SIGTERM or SIGHUP asks the loop to stop after this step; a second one stops at once.

    But for SIGHUP, of which a terminal that closes sends two."""

    signal = None  # the number of the signal that came

    def __init__(self, tell):
        self.tell = tell  # a function of one line of text

    def __enter__(self):
        self.before = handle_signals(self, "SIGINT", "SIGTERM", "SIGHUP")
        return self

    def __exit__(self, *error):
        restore_signals(self.before)

    def came(self):
        """Return whether the signal came to any process, so that all stop after the same step.

        One that comes while the processes ask each other stays, and counts at the next step."""
        number = maximum(self.signal or 0)
        if number:
            self.signal = number
        return bool(number)

    def __call__(self, number, frame):
        if self.signal is None:
            self.signal = number
            self.tell("stopping after this step; again to stop at once")
        elif number != getattr(signal, "SIGHUP", None) and world_size() == 1:
            raise Stopped(number)  # torchrun hands on what the terminal has sent to all
