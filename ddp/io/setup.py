"""A Trainer made ready: precision, weights to go on from, parts of a batch, threads."""

from ddp.distributed import parts_line
from ddp.io.checkpoint import restore
from ddp.io.device import select_precision, set_deterministic, set_tf32
from ddp.threads import choose_training_threads
from ddp.training import Trainer


def build_trainer(config, dataset, device, state, tell):
    """Return a Trainer at the step of a checkpoint's dict, or at the start for None.

    config: resolved, its shards chosen. tell: called with lines of text, such as print."""
    precision = select_precision(config.precision, device)
    set_tf32(precision != "fp32")
    set_deterministic(True, device)
    trainer = Trainer(config, dataset, device, precision)
    if state:
        restore(trainer, state)
    tell(f"network: {trainer.num_params:,} parameters on {device}, trained in {precision}")
    for line in (parts_line(config), choose_training_threads(trainer)):
        if line:
            tell(line)
    return trainer
