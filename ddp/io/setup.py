"""A Trainer made ready: precision, weights to go on from, parts of a batch, threads."""

from ddp.distributed import parts_line
from ddp.io.checkpoint import load_model, restore
from ddp.io.device import select_precision, set_deterministic, set_tf32
from ddp.io.files import find_checkpoint
from ddp.model import build_model
from ddp.threads import choose_training_threads
from ddp.training import Trainer


def build_trainer(config, dataset, device, state, tell, weights=None):
    """Return a Trainer at the step of a checkpoint's dict, or at the start for None.

    config: resolved, its shards chosen. tell: called with lines of text, such as print. weights:
    those of the network to start with, see starting_weights."""
    precision = select_precision(config.precision, device)
    set_tf32(precision != "fp32")
    set_deterministic(True, device)
    trainer = Trainer(config, dataset, device, precision)
    if state:
        restore(trainer, state)
    elif weights:
        for model in (trainer.model, trainer.ema):
            model.network.load_state_dict(weights)
    dropout = f", dropout {trainer.config.dropout:g}" if trainer.config.dropout else ""
    network = f"network: {trainer.num_params:,} parameters on {device}"
    tell(f"{network}, trained in {precision}{dropout}")
    for line in (parts_line(config), choose_training_threads(trainer)):
        if line:
            tell(line)
    return trainer


def starting_weights(path, config, dataset, tell):
    """Return the EMA weights of a checkpoint or run, with which a new run is to start; None: None.

    A state_dict of the network. tell: called with a line. Raises ValueError when that is not the
    network of the config."""
    if path is None:
        return None
    model, theirs, _ = load_model(find_checkpoint(path))
    weights = model.network.state_dict()
    num_classes = len(dataset.classes) if config.class_cond else 0
    ours = build_model(config, dataset.event, num_classes).network.state_dict()
    shapes = [{name: x.shape for name, x in each.items()} for each in (ours, weights)]
    if shapes[0] != shapes[1]:
        options = theirs.network_options() | {"class_cond": theirs.class_cond}
        now = config.network_options() | {"class_cond": config.class_cond}
        options.pop("dropout")  # has no weights
        other = [f"{name}={options[name]}" for name in options if options[name] != now[name]]
        what = ", ".join(other) or f"items of {model.event} and {model.num_classes} classes"
        raise ValueError(f"init_from={path}: its network is of {what}; give the same")
    tell(f"it starts with the weights of {path}")
    return weights
