"""The number of threads: the fastest by trial, alike every time, and without a trace."""

import copy
from dataclasses import replace

import pytest
import torch
from test_training import tensors
from tiny import random_points, tiny_trainer

from ddp import threads
from ddp.config import resume_config
from ddp.threads import choose_sampling_threads, choose_threads, choose_training_threads


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight idle cores, and an environment that says nothing; PyTorch's threads are put back."""
    monkeypatch.setattr(threads, "ALL_THREADS", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (0.4, 0.4, 0.4))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Work:
    """A call that takes so many seconds by number of threads, of a clock that only it moves."""

    def __init__(self, monkeypatch, seconds):
        self.seconds = seconds
        self.now = 0.0
        self.calls = []  # the number of threads of each
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def __call__(self, *_):
        self.calls.append(torch.get_num_threads())
        self.now += self.seconds[torch.get_num_threads()]


IDLE = {1: 0.08, 2: 0.042, 4: 0.023, 8: 0.013}
NO_GAIN = {1: 0.08, 2: 0.042, 4: 0.012, 8: 0.013}  # 4 are faster, by less than a tenth
ONE_CORE_TAKEN = {1: 0.08, 2: 0.042, 4: 0.023, 8: 0.2}
ALL_TAKEN = {1: 0.1, 2: 0.4, 4: 0.5, 8: 0.6}


@pytest.mark.parametrize(
    ("seconds", "fastest"), [(IDLE, 8), (NO_GAIN, 8), (ONE_CORE_TAKEN, 4), (ALL_TAKEN, 1)]
)
def test_fastest_number_is_taken(monkeypatch, seconds, fastest):
    work = Work(monkeypatch, seconds)
    number, line = choose_threads(work, 0, 1.0, "a step")
    assert number == torch.get_num_threads() == fastest
    assert f"{fastest} of 8" in line
    assert set(work.calls) == {1, 2, 4, 8}


def test_trial_is_short(monkeypatch):
    """What is slow is tried no second time, and nothing when the time is over."""
    work = Work(monkeypatch, ALL_TAKEN)
    choose_threads(work, 0, 2.5, "a step")
    assert work.calls.count(8) == 1
    assert work.now < 2.5
    work.calls.clear()
    choose_threads(work, 0, 0.0, "a step")
    assert sorted(work.calls) == [1, 1, 2, 4, 8]  # the first prepares what is prepared once


def test_known_number_is_set_and_nothing_tried():
    def call():
        raise AssertionError

    assert choose_threads(call, 3, 1.0, "a step") == (3, "threads: 3")
    assert torch.get_num_threads() == 3


def test_line_says_when_the_machine_is_busy(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (2.7, 0.4, 0.4))
    assert "load 2.7" in choose_threads(None, 8, 1.0, "a step")[1]
    assert "load" not in choose_threads(None, 5, 1.0, "a step")[1]  # there are cores for both
    assert "load" not in choose_threads(None, 1, 1.0, "a step")[1]  # nothing that would help
    line = choose_threads(Work(monkeypatch, ONE_CORE_TAKEN), 0, 1.0, "a step")[1]
    assert "load 2.7" in line
    assert "threads=auto" in line


@pytest.mark.parametrize("fields", [{}, {"noise_dist": "importance"}, {"schedule": "learned"}])
def test_training_trial_leaves_no_trace(monkeypatch, fields):
    """Bit for bit, in the state; and the number is the run's from then on."""
    monkeypatch.setattr(threads, "ALL_THREADS", 2)
    trainer = tiny_trainer(random_points(), max_steps=300, **fields)
    trainer.train_step(0.0)
    before = copy.deepcopy(trainer.state_dict())
    line = choose_training_threads(trainer)
    assert "a step takes" in line
    assert trainer.config.threads == torch.get_num_threads() > 0
    after = dict(tensors(trainer.state_dict()))
    for path, tensor in tensors(before):
        assert torch.equal(after.pop(path), tensor), path
    assert not after
    assert (trainer.step, trainer.seconds, trainer.best) == (1, 0.0, None)


def test_resume_keeps_the_number_and_auto_tries_anew(monkeypatch):
    first = tiny_trainer(random_points(), max_steps=500, threads=4)
    assert choose_training_threads(first) == "threads: 4"
    work = Work(monkeypatch, IDLE)
    resumed = tiny_trainer(random_points(), max_steps=500)
    resumed.train_step = work
    resumed.config = resume_config(first.config, {})
    assert choose_training_threads(resumed) == "threads: 4"
    assert not work.calls
    resumed.config = resume_config(first.config, {"threads": 0})
    choose_training_threads(resumed)
    assert resumed.config.threads == 8


@pytest.mark.parametrize("fields", [{"max_steps": 200}, {"compile": True}])
def test_short_or_compiled_run_takes_all_threads(monkeypatch, fields):
    """The trial would be more than 2% of it, or compile for each number."""
    trainer = tiny_trainer(random_points(), max_steps=500)
    trainer.config = replace(trainer.config, **fields)
    trainer.train_step = work = Work(monkeypatch, ALL_TAKEN)
    assert choose_training_threads(trainer) == "threads: 8"
    assert not work.calls


def test_environment_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)  # as PyTorch does when it starts
    trainer = tiny_trainer(random_points(), max_steps=500)
    trainer.train_step = work = Work(monkeypatch, IDLE)
    assert choose_training_threads(trainer) == "threads: 2"
    assert trainer.config.threads == 2
    assert not work.calls
    trainer.config = resume_config(trainer.config, {"threads": 4})
    assert choose_training_threads(trainer) == "threads: 4"  # what was asked for here and now


@pytest.mark.parametrize("classes", [0, 3])
def test_sampling_tries_the_model_itself(classes):
    dataset = random_points(classes=classes)
    model = tiny_trainer(dataset, class_cond=bool(classes)).recalibrated_ema()
    assert "a pass of 64 items takes" in choose_sampling_threads(model, 64)[0]
    assert choose_sampling_threads(model, 64, threads=2) == ["threads: 2"]
    assert torch.get_num_threads() == 2
    assert choose_sampling_threads(None, 64) == ["threads: 2"]


@pytest.mark.parametrize("number", [-1, 2**13])
def test_impossible_number_is_refused(number):
    with pytest.raises(ValueError, match="threads"):
        choose_sampling_threads(None, 64, number)


def test_gpu_is_left_alone(monkeypatch):
    trainer = tiny_trainer(random_points(), max_steps=500)
    trainer.device = torch.device("cuda")
    trainer.train_step = work = Work(monkeypatch, IDLE)
    before = torch.get_num_threads()
    assert choose_training_threads(trainer) is None
    assert (torch.get_num_threads(), work.calls, trainer.config.threads) == (before, [], 0)
