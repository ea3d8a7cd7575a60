"""How many steps a run takes whose length is given in minutes.

A learning rate that follows the clock would make a run that nothing can repeat, a resume least of
all. So the speed is measured once, and the run is one of so many steps from then on.
"""

import copy
import time
from dataclasses import replace

import torch

from ddp.distributed import broadcast
from ddp.validation import fitting_batch

TRIAL_SECONDS, TRIAL_FRACTION = 5.0, 0.02  # of the time that is left; the less of both is tried
TRIAL_WARMUP, TRIAL_STEPS = 3, 3  # steps before the clock runs, and the fewest that are timed
SAVES = 10  # in a run, where nothing else is said
SHOWN_IMAGES, SHOWN_POINTS, SAMPLING_STEPS = 64, 2000, 20  # about what samples of a save cost


def plan_steps(trainer):
    """Write into trainer.config how many steps fit into what is left of max_minutes.

    Some steps and the work of a save are timed, and undone bit for bit. Writing files is not
    counted, nor that a machine may become faster or slower: the run ends a little early or late."""
    started = time.monotonic()
    config = trainer.config
    left = 60 * config.max_minutes - trainer.seconds
    state = copy.deepcopy(trainer.state_dict())
    step_seconds, save_seconds = time_trial(trainer, min(TRIAL_SECONDS, TRIAL_FRACTION * left))
    trainer.load_state_dict(state)
    left -= time.monotonic() - started
    if config.save_every:
        step_seconds += save_seconds / config.save_every
    else:
        left -= min(SAVES * save_seconds, left / 2)
    steps = trainer.step + int(max(left, 0) / max(step_seconds, 1e-9))
    trainer.config = replace(config, planned_steps=broadcast(max(steps, 1)))


def time_trial(trainer, seconds):
    """Train for so many seconds; return the seconds of a step, and of what a save computes."""
    for _ in range(TRIAL_WARMUP):  # kernels are chosen, memory is allocated
        trainer.train_step(0.0)
    synchronize(trainer.device)
    started = broadcast(time.monotonic())
    count = 0
    now = started
    while count < TRIAL_STEPS or now - started < seconds:
        trainer.train_step(0.0)
        count += 1
        now = broadcast(time.monotonic())  # all processes take the same number of steps
    synchronize(trainer.device)
    trained = time.monotonic()
    trainer.recalibrated_ema()
    trainer.val_loss()
    shown = SHOWN_IMAGES if len(trainer.dataset.event) > 1 else SHOWN_POINTS
    with torch.no_grad():
        x0, label = trainer.training_batch(0, fitting_batch(trainer.dataset.event, shown))
        for _ in range(SAMPLING_STEPS):
            trainer.ema_loss(x0, label, 0, "test")
    synchronize(trainer.device)
    return (trained - started) / count, time.monotonic() - trained


def synchronize(device):
    """Wait until the device has done all that it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
