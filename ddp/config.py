"""Every hyper-parameter, written once; the flags of train.py are made from it.

A `None` default means "chosen for the data": see PRESETS.
"""

import dataclasses
import math
from pathlib import Path

from ddp.guidance import CLIPS
from ddp.loss import DISTANCES, WEIGHTINGS
from ddp.model import PREDICTIONS
from ddp.network import ACTIVATIONS, INITS, NORMS
from ddp.reverse import CHURNABLE, SAMPLERS, STOCHASTIC
from ddp.schedule import LEVELS, NORMAL, SCHEDULES, SPACINGS

LR_SCHEDULES = {  # progress in [0, 1] -> the share of --lr
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}
DEFAULT_EPOCHS = 100
# predict -> weighting: the plain loss of the output, but for x0 one that does not look at noise
# only
SUITING = {"x0": "min_snr", "eps": "snr", "v": "v", "flow": "flow"}
MAX_LIST = 8
OPTIMIZERS = ("muon", "adamw")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# What is chosen for the data where no flag says otherwise; `pictures` serves every other image
# dataset. Deep and narrow won over wide at equal cost; widths are multiples of 16, to which kernels
# pad; the few digits gain from noisy copies of each item, and nothing from normal levels.
CHOSEN = ("width", "depth", "multipliers", "patch", "noise_draws", "levels")
PRESETS = {
    "digits": (16, 4, [2, 2], 1, 2, "stratified"),
    "mnist": (32, 4, [1, 2], 2, 1, "normal"),
    "fashion_mnist": (32, 4, [1, 2], 2, 1, "normal"),
    "pictures": (32, 3, [1, 2, 2], 2, 1, "normal"),
    "points": (128, 4, [1], 1, 8, "stratified"),
}


def integers(text):
    """'4,8' or '4 8' -> [4, 8]."""
    return [int(word) for word in str(text).replace(",", " ").split()]


def image_size(text):
    """'28' -> [28, 28], '30x45' -> [30, 45] (height x width)."""
    sides = [int(side) for side in str(text).lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError
    return sides * 2 if len(sides) == 1 else sides


def flag(default, help, kind=None, choices=None, at_least=None, above=None, at_most=None, count=1):
    """A field of Config: its default, and what its flag needs: help, type, choices and bounds."""
    kind = kind or type(default)
    metadata = dict(help=help, kind=kind, choices=choices and list(choices), count=count)
    metadata.update(at_least=at_least, above=above, at_most=at_most)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    # data
    dataset: str = flag("digits", "a dataset by name, or a folder or .zip of pictures")
    data_dir: str = flag("data", "where downloaded datasets lie, or are put")
    image_size: list = flag(None, "size of pictures from a folder: N, or HxW", image_size)
    channels: int = flag(None, "1 grey, 3 colour (default: as the pictures are)", int, (1, 3))
    test_fraction: float = flag(
        None, "share of a folder kept for testing (default: 0.1)", float, above=0, at_most=0.5
    )
    # the forward process
    schedule: str = flag("cosine", "noise schedule", choices=SCHEDULES)
    timesteps: int = flag(
        None,
        "steps of the discrete process, 0 for continuous time (default: 1000, of learned 0)",
        int,
        at_least=0,
        at_most=10**6,
    )
    shift: float = flag(
        1.0, "more noise, for pictures so many times larger", at_least=1e-3, at_most=1e3
    )
    zero_terminal_snr: bool = flag(False, "make the last noise level noise alone")
    levels: str = flag(
        None, "how training draws noise levels (default: what suits the data)", str, LEVELS
    )
    # the reverse network
    width: int = flag(None, "channels of the first resolution", int, at_least=8, at_most=4096)
    depth: int = flag(None, "blocks in each resolution", int, at_least=1, at_most=64)
    multipliers: list = flag(None, "width of each resolution, in units of --width", integers)
    patch: int = flag(None, "pixels of a side folded into channels", int, at_least=1, at_most=64)
    attention: list = flag([], "feature-map sizes that get self-attention, such as 4,8", integers)
    norm: str = flag("batch", "normalisation", choices=NORMS)
    activation: str = flag("leaky_relu", "activation", choices=ACTIVATIONS)
    negative_slope: float = flag(0.01, "slope of LeakyReLU below zero", at_least=0, at_most=1)
    dropout: float = flag(0.0, "share of activations dropped in training", at_least=0, at_most=0.9)
    init: str = flag("xavier", "weight initialisation", choices=INITS)
    conditional: bool = flag(False, "tell the network the labels")
    label_dropout: float = flag(0.1, "share of labels hidden in training", at_least=0, at_most=1)
    # the objective
    predict: str = flag("v", "what the network's output means", choices=PREDICTIONS)
    weighting: str = flag(
        None, "weight of the noise levels (default: what suits --predict)", str, choices=WEIGHTINGS
    )
    loss: str = flag("mse", "distance", choices=DISTANCES)
    # the optimiser
    epochs: float = flag(None, "passes over the data (default: 100)", float, above=0)
    max_steps: int = flag(None, "stop after this many steps", int, at_least=1)
    max_minutes: float = flag(
        None, "stop after this many minutes; alone, it governs the run", float, above=0
    )
    optimizer: str = flag("muon", "of the layers that are normalised", choices=OPTIMIZERS)
    lr: float = flag(1e-3, "peak learning rate", above=0)
    lr_schedule: str = flag("cosine", "course of the learning rate", choices=LR_SCHEDULES)
    warmup: int = flag(100, "steps in which the learning rate rises", at_least=0)
    batch_size: int = flag(128, "items in a batch", at_least=1, at_most=2**20)
    noise_draws: int = flag(
        None, "noisy copies of each item in a batch", int, at_least=1, at_most=64
    )
    weight_decay: float = flag(0.01, "AdamW's weight decay", at_least=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is no limit", at_least=0)
    grad_accumulation: int = flag(1, "batches in a step", at_least=1)
    ema_decay: float = flag(0.999, "decay of the averaged weights", at_least=0, at_most=0.999999)
    seed: int = flag(0, "the run is a function of it", at_least=0, at_most=2**32 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = flag("auto", "arithmetic of the network in training", choices=PRECISIONS)
    compile: bool = flag(False, "by torch.compile: slow to start, then faster; --resume drops it")
    # the run
    name: str = flag(None, "name of the run (default: the dataset's)", str)
    out_dir: str = flag("checkpoints", "where runs are written")
    save_every: int = flag(
        None, "steps between checkpoints (default: a tenth of the run)", int, at_least=1
    )
    keep: int = flag(2, "numbered checkpoints to keep", at_least=0)
    sample_every: int = flag(
        None, "steps between grids of samples (default: as --save_every)", int, at_least=1
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        named = not self.name or self.name == Path(self.name).name
        lone = self.norm == "batch" and self.batch_size == 1
        learned = self.schedule == "learned"
        if self.timesteps is None:
            self.timesteps = 0 if learned else 1000
        if self.weighting is None:
            self.weighting = "bound" if learned else SUITING[self.predict]
        zero, bound = self.zero_terminal_snr, self.weighting == "bound"
        if self.levels is None and (bound or self.schedule != Config.schedule):
            self.levels = "stratified"  # a schedule that was chosen says what is drawn
        hides = self.label_dropout != Config.label_dropout
        slopes = self.negative_slope != Config.negative_slope
        refuse(
            (not self.dataset, "--dataset: expected a name; a place is given by --data_dir"),
            (not named, f"--name {self.name}: expected a name; a place is given by --out_dir"),
            (lone, "--batch_size 1 gives BatchNorm nothing to average; use 2 or more, or --norm"),
            (hides and not self.conditional, "--label_dropout needs --conditional"),
            (slopes and self.activation != "leaky_relu", "--negative_slope is for leaky_relu"),
            (learned and self.timesteps, f"--timesteps {self.timesteps}: learned is continuous"),
            (learned and zero, "--zero_terminal_snr: learned trains its own ends"),
            (learned and self.levels != "stratified", "--levels: learned draws its own"),
            (learned and not bound, "--weighting: learned is trained on the bound"),
            (learned and self.loss != "mse", "--loss: learned is trained on the bound, of mse"),
            (zero and self.predict == "eps", "--zero_terminal_snr: eps is no --predict for it"),
            (zero and self.timesteps == 1, "--zero_terminal_snr: one step cannot be both ends"),
            (zero and bound, "--weighting bound is infinite with --zero_terminal_snr"),
            (zero and self.levels == "log_normal", "--levels log_normal leaves out the last level"),
            (bound and self.levels in NORMAL, f"--levels {self.levels}: bound weighs the levels"),
        )

    def network(self):
        """The keyword arguments of ddp.network.reverse_network."""
        names = "width depth multipliers patch attention norm activation negative_slope dropout"
        return {name: getattr(self, name) for name in [*names.split(), "init"]}

    def data(self):
        """The keyword arguments of ddp.data.load."""
        names = "data_dir seed image_size channels test_fraction"
        return {"name": self.dataset} | {name: getattr(self, name) for name in names.split()}

    def for_data(self, dataset):
        """This config with every size that was left open chosen for the data.

        Raises ValueError when the data cannot be used as the config says."""
        if self.conditional and not dataset.classes:
            raise ValueError(f"--conditional: {self.dataset} has no labels; leave the flag out")
        kind = self.dataset if self.dataset in PRESETS else "pictures"
        if not dataset.is_image:
            kind = "points"
            if self.attention or (self.patch or 1) > 1 or (self.multipliers or [1]) != [1]:
                raise ValueError(
                    "--attention, --patch and --multipliers are for images, not points"
                )
        preset = dict(zip(CHOSEN, PRESETS[kind], strict=True))
        missing = {k: v for k, v in preset.items() if getattr(self, k) is None}
        if kind == "points" and self.precision == "auto":
            missing["precision"] = "fp32"  # bf16 tells no nearer points apart than 1/128
        return dataclasses.replace(self, **missing)

    def steps(self, count):
        """Steps in a run on `count` training items, or None when --max_minutes governs it."""
        epochs = self.epochs
        if epochs is None and self.max_steps is None and self.max_minutes is None:
            epochs = DEFAULT_EPOCHS
        items = self.batch_size * self.grad_accumulation
        limits = [math.ceil(epochs * count / items)] if epochs else []
        return min(limits + ([self.max_steps] if self.max_steps else []), default=None)


# sampler -> steps and spacing of the levels. Measured: docs/sampling.md.
SUITED = dict.fromkeys(STOCHASTIC, (100, "trailing")) | {"heun": (20, "karras")}
DEFAULT_SAMPLER, DEFAULT = "unipc", (20, "trailing")


@dataclasses.dataclass
class Sampling:
    """How samples are drawn: the flags that evaluate.py and generate.py share."""

    sampler: str = flag(None, f"(default: {DEFAULT_SAMPLER})", str, choices=SAMPLERS)
    steps: int = flag(
        None, "of the sampler (default: 20; of ddpm and dpm++sde 100)", int, at_most=10**6
    )
    spacing: str = flag(None, "of the steps (default: what suits)", str, choices=SPACINGS)
    eta: float = flag(
        None, "noise of ddim, from 0 (none) to 1 (as ddpm)", float, at_least=0, at_most=1
    )
    churn: float = flag(0.0, "noise that heun or euler adds on the way (EDM's S_churn)", at_least=0)
    clip: str = flag(None, "of the estimates, to the range of pixels", str, choices=CLIPS)
    guidance: float = flag(None, "strength; 1 is none, 2 is some", float, at_least=0, at_most=1e3)
    guidance_interval: list = flag(None, "only between two log-SNR, LOW HIGH", float, count=2)
    guidance_rescale: float = flag(0.0, "of guided items' contrast", at_least=0, at_most=1)
    guide: str = flag(None, "a weaker checkpoint to guide away from, not the lack of a label", str)
    precision: str = flag(None, "arithmetic (default: the fastest)", str, ("fp32", "bf16"))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        unguided, (low, high) = self.guidance is None, self.guidance_interval or (0, 0)
        refuse(
            (self.guide == "", "--guide: expected a path"),
            (unguided and self.guide, "--guide needs --guidance, such as 2"),
            (unguided and self.guidance_interval, "--guidance_interval needs --guidance"),
            (unguided and self.guidance_rescale, "--guidance_rescale needs --guidance"),
            (low > high, f"--guidance_interval {low} {high}: expected LOW before HIGH"),
        )

    def options(self, model, guide=None):
        """The keyword arguments of ddp.reverse.generate. guide: the model in `self.guide`, or None.

        Raises ValueError when they do not fit the model or each other."""
        sampler = self.sampler or (DEFAULT_SAMPLER if self.eta is None else "ddim")
        steps, spacing = SUITED.get(sampler, DEFAULT)
        if self.steps is not None:
            steps = self.steps
        elif model.schedule.timesteps:
            steps = min(steps, model.schedule.timesteps)
        refuse(
            (self.eta is not None and sampler != "ddim", "--eta is for --sampler ddim"),
            (self.churn and sampler not in CHURNABLE, "--churn is for --sampler heun or euler"),
            (self.clip not in (None, "none") and not model.is_image, "--clip is for pictures"),
            (
                self.guidance is not None and not guide and not model.drops_label,
                "--guidance needs a model trained with --conditional and label dropout, or --guide",
            ),
            (
                guide and (guide.event, guide.classes) != (model.event, model.classes),
                f"--guide {self.guide}: it was trained on other items or labels",
            ),
        )
        model.schedule.grid(steps)
        options = dataclasses.asdict(self)
        options.update(sampler=sampler, steps=steps, spacing=self.spacing or spacing, guide=guide)
        del options["precision"]
        clip = self.clip or ("static" if model.is_image else "none")
        return options | {"eta": self.eta or 0.0, "clip": clip}


# What may change when a run is resumed. All else would make it another run.
CHANGEABLE = {
    *("data_dir", "epochs", "max_steps", "max_minutes", "lr", "lr_schedule", "warmup"),
    *("weight_decay", "grad_clip", "ema_decay", "device", "precision", "compile"),
    *("name", "out_dir", "save_every", "keep", "sample_every"),
}


def merged(config, given):
    """The config of a run with the flags `given` (a dict) on top.

    Raises ValueError when a flag would make it another run."""
    saved = dataclasses.asdict(config) | {"compile": False}  # it may not work on this machine
    changed = [k for k in given if k not in CHANGEABLE and given[k] != saved[k]]
    if changed:
        k = changed[0]
        raise ValueError(
            f"--{k} {given[k]} is not the resumed run's {saved[k]}; leave it out or start anew"
        )
    limits = ("epochs", "max_steps", "max_minutes")
    if any(k in given for k in limits):  # a new limit takes the place of the old ones
        saved.update(dict.fromkeys(limits))
    return Config(**{**saved, **given})


def refuse(*reasons):
    """Raise ValueError with the first `why` whose condition holds, of pairs (condition, why)."""
    for wrong, why in reasons:
        if wrong:
            raise ValueError(why)


def add_flags(parser, kind):
    """Give an ArgumentParser a flag for each field of the dataclass `kind`."""
    for field in dataclasses.fields(kind):
        parser.add_argument(*spellings(field.name), **argument(field))


def sampling_of(args):
    """The Sampling among the parsed flags `args`, in which None means that it was not given."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def spellings(name):
    """--batch_size and --batch-size are one flag."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def argument(field):
    """The keyword arguments of add_argument for a field of a dataclass."""
    bounds, default = field.metadata, field.default
    common = {"dest": field.name, "help": bounds["help"].replace("%", "%%")}
    if bounds["kind"] is bool:
        return common | {"action": "store_true"}
    if default not in (None, dataclasses.MISSING):
        common["help"] += f" (default: {default})"
    if bounds["count"] > 1:
        common["nargs"] = bounds["count"]
    name = None if bounds["choices"] else field.name.upper()
    return common | {"type": bounds["kind"], "choices": bounds["choices"], "metavar": name}


def check(field, value):
    """Raise ValueError, in the words of the flag, when the value of a field is out of bounds."""
    bounds = field.metadata
    types = {list: list, float: (float, int), int: int, str: str, bool: bool}
    expected = types.get(bounds["kind"], list) if bounds["count"] == 1 else list
    if value is None and field.default is None:
        return
    wanted = None
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        wanted = f"a value of type {getattr(bounds['kind'], '__name__', bounds['kind'])}"
    elif bounds["count"] > 1:
        if not all(type(v) in (int, float) and math.isfinite(v) for v in value):
            wanted = "finite numbers"
    elif isinstance(value, list):
        least = 0 if field.name == "attention" else 1
        if not least <= len(value) <= MAX_LIST or not all(type(v) is int and v > 0 for v in value):
            wanted = f"{least} to {MAX_LIST} whole numbers above 0"
    elif bounds["choices"] and value not in bounds["choices"]:
        wanted = f"one of {', '.join(map(str, bounds['choices']))}"
    elif isinstance(value, float) and not math.isfinite(value):
        wanted = "a finite number"
    elif bounds["at_least"] is not None and value < bounds["at_least"]:
        wanted = f"at least {bounds['at_least']}"
    elif bounds["above"] is not None and value <= bounds["above"]:
        wanted = f"more than {bounds['above']}"
    elif bounds["at_most"] is not None and value > bounds["at_most"]:
        wanted = f"at most {bounds['at_most']}"
    if wanted:
        raise ValueError(f"--{field.name} {value}: expected {wanted}")


def expect(args, **least):
    """Raise ValueError when a flag in `args` is below its least value, or above all reason."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < 2**32:
            raise ValueError(f"--{name} {value}: expected at least {bound}, below 2^32")


def verdict(error):
    """(exit code, what to say in a line) of what ended a script; what nobody foresaw is raised
    again.

    A ValueError says that what was asked for cannot be done, an OSError or FloatingPointError that
    it was tried and failed."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped at once; what was written before stands"
    if isinstance(error, ValueError):
        return 2, f"error: {error}"
    if isinstance(error, (OSError, FloatingPointError)):
        return 1, f"error: {error}"
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        said = " ".join(str(error).split())[:200]
        return 1, f"error: --compile does not work here ({said}); leave it out"
    if isinstance(error, RuntimeError) and "memory" in str(error):
        return 1, f"error: {str(error).splitlines()[0]}; try a smaller --batch_size"
    raise error
