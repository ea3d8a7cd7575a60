"""How far a run is: lines of text where there is no terminal, and what a run's length is called."""

import io
from types import SimpleNamespace

import pytest

from ddp.io import progress
from ddp.io.progress import Pace, Progress, plan


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_within_seconds_and_then_now_and_then(monkeypatch, clock):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    times = []
    with Progress(step=100, num_steps=10_000) as shown:
        for step in range(101, 501):
            clock.now += 1.0
            length = len(stderr.getvalue())
            shown.update(step, 1.0, 0.25)
            if len(stderr.getvalue()) > length:
                times.append(clock.now)
    assert times == [2, 6, 14, 30, 62, 122, 182, 242, 302, 362]
    lines = stderr.getvalue().splitlines()
    assert lines[0] == "step 102 of 10,000, loss 0.2500, about 165 min left"
    assert "\r" not in stderr.getvalue()


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    with Progress(step=0, num_steps=4) as shown:
        for step in range(1, 5):
            shown.update(step, step / 2, 0.5)
        shown.bar.refresh()
        for text in ("epoch 2.0: 100%", "loss 0.5000", "4/4", "step/s"):
            assert text in stderr.getvalue()
        shown.doing("testing, saving")
        assert "testing, saving: 100%" in stderr.getvalue()
        shown.tell("saved")
    assert capsys.readouterr().out == "saved\n"


def test_plan_says_what_a_length_in_minutes_came_to():
    def plan_steps():
        trainer.num_steps = 700

    config = SimpleNamespace(max_minutes=2.0)
    trainer = SimpleNamespace(step=100, num_steps=None, seconds=60.0, config=config)
    trainer.plan_steps = plan_steps
    text = plan(trainer)
    assert text.startswith("step 100 of 700, planned from 2 minutes at 100.0 ms a step;")
    assert plan(trainer) == "step 100 of 700"  # from then on


def test_pace_tells_the_time_left_when_a_line_is_due(clock):
    pace = Pace(start=10)
    clock.now = 1.0
    assert pace.time_left(20, 1010) is None  # too early
    clock.now = 2.0
    assert pace.time_left(30, 1030) == "about 2 min left"  # 20 in 2 s, 1,000 are left
    assert pace.time_left(30, 1030) is None
    clock.now = 6.0
    assert pace.time_left(110, 410) == "about 18 s left"
    clock.now = 1000.0
    assert pace.time_left(410, 410) is None  # all is done
