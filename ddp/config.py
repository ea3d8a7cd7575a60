"""Every hyper-parameter, written once; the flags of the scripts are made from it.

A default of None means "chosen": for the purpose, and for the data and the size. See presets.py.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ddp.augment import AUGMENTATIONS
from ddp.blocks import ACTIVATIONS, NORMS
from ddp.distributed import REDUCTIONS, default_shards
from ddp.loss import LOSSES, WEIGHTINGS
from ddp.model import PREDICTIONS
from ddp.noise_dist import NOISE_DISTS
from ddp.options import HIDDEN, check_fields, count_or_auto, flag, image_size, integers, shown
from ddp.presets import PRESETS, PURPOSES, SIZES, preset_of  # noqa: F401
from ddp.reverse import INITS, NETWORKS, feature_sides
from ddp.schedule import SCHEDULES
from ddp.training import LR_SCHEDULES

DEFAULT_EPOCHS = 100
DEFAULT_SCHEDULE = "cosine"
# prediction -> weighting: the plain loss of the output, but for x0 and edm one that looks less at
# levels where almost nothing, or almost all, is left to predict
DEFAULT_WEIGHTING = {"x0": "min_snr", "eps": "snr", "v": "v", "flow": "flow", "edm": "min_snr"}
OPTIMIZERS = ("muon", "adamw")
MAX_NAME = 200  # characters; file systems take 255, and something may come behind it
MAX_STEP_ITEMS = 2**24  # of which a step takes the mean; more are a slip of the keyboard
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass
class Config:
    """The hyper-parameters of a run. Raises ValueError for what is out of bounds or contradicts."""

    # data
    dataset: str = flag(
        "digits", "a dataset by name; images, a folder or .zip; arrays, .npy, .npz or a folder"
    )
    data_dir: str = flag("data", "where downloaded datasets lie, or are put")
    image_size: list = flag(None, "size of images from a folder: N, or HxW", image_size)
    channels: int = flag(
        None,
        "1 gray, 3 color; or of an array whose shape leaves it open",
        int,
        at_least=1,
        at_most=2**20,
    )
    test_fraction: float = flag(None, "test share (default: 0.1)", float, above=0, at_most=0.5)
    labels: str = flag(None, "labels of the items of an array: a .npy or .csv", str)
    cache: str = flag(None, "keep decoded images of a folder in this folder, on disk", str)
    augment: str = flag("none", "augmentation of training images", choices=AUGMENTATIONS)
    # what is chosen where nothing else is said
    size: str = flag("s", "size of the network: l is of the class of DDPM's", choices=SIZES)
    preset: str = flag("samples", "what the run is good for", choices=PURPOSES)
    # length of the run
    epochs: float = flag(None, "passes over the data (default: 100)", float, above=0)
    max_steps: int = flag(None, "stop after this many steps", int, at_least=1)
    max_minutes: float = flag(
        None, "stop after this many minutes; alone, it plans the steps", float, above=0
    )
    planned_steps: int = flag(None, HIDDEN, int, at_least=1)  # what max_minutes alone came to
    # optimization
    lr: float = flag(None, "peak learning rate", float, fallback=1e-3, above=0, at_most=10**6)
    batch_size: int = flag(128, "items in a batch", at_least=1, at_most=2**20)
    optimizer: str = flag("muon", "for weights in blocks; others: AdamW", choices=OPTIMIZERS)
    lr_schedule: str = flag("cosine", "course of the learning rate", choices=LR_SCHEDULES)
    warmup: int = flag(100, "steps in which the learning rate rises", at_least=0)
    weight_decay: float = flag(0.01, "AdamW's weight decay", at_least=0, at_most=10**6)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is no limit", at_least=0)
    grad_accumulation: int = flag(1, "batches in a step", at_least=1, at_most=2**16)
    noise_copies: int = flag(
        None, "noisy copies of each item in a batch (default: by data)", int, at_least=1, at_most=64
    )
    ema_decay: float = flag(
        None, "decay of the EMA weights", float, fallback=0.999, at_least=0, at_most=0.999999
    )
    seed: int = flag(0, "the run is a function of it", at_least=0, at_most=2**32 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = flag("auto", "compute dtype of training", choices=PRECISIONS)
    compile: bool = flag(False, "use torch.compile; a resume drops it")
    threads: int = flag(
        0, "CPU threads; auto: what is fastest now", count_or_auto, at_least=0, at_most=2**12
    )
    # many processes, and memory
    shards: int = flag(
        None,
        "parts of a batch, each with its own BatchNorm (default: one for each process, or more)",
        count_or_auto,
        at_least=0,
        at_most=2**16,
    )
    reduce: str = flag("tree", "how gradients are summed over processes", choices=REDUCTIONS)
    checkpoint_activations: bool = flag(False, "recompute blocks in the backward pass")
    # the forward network
    schedule: str = flag(None, "noise schedule (default: cosine, or by preset)", str, SCHEDULES)
    timesteps: int = flag(
        None,
        "steps of the discrete process, 0 for continuous time (default: 1000; learned: 0)",
        int,
        at_least=0,
        at_most=10**6,
    )
    shift: float = flag(
        1.0, "resolution ratio: shifts log-SNR by -2 log(shift)", at_least=1e-3, at_most=1e3
    )
    zero_terminal_snr: bool = flag(False, "make the last noise level noise alone")
    noise_dist: str = flag(
        None, "distribution of training noise levels (default: by data)", str, NOISE_DISTS
    )
    # the reverse network
    network: str = flag(None, "architecture (default: unet; mlp for points)", str, NETWORKS)
    channels_base: int = flag(
        None, "channels of the first resolution (default: by data)", int, at_least=8, at_most=4096
    )
    blocks_per_level: int = flag(
        None, "residual blocks in each resolution (default: by data)", int, at_least=1, at_most=64
    )
    channel_mult: list = flag(
        None, "channels of each resolution, in units of channels_base", integers
    )
    patch_size: int = flag(
        None, "side of squares folded into channels (default: by data)", int, at_least=1, at_most=64
    )
    fourier_features: int = flag(
        None, "sines and cosines of each pixel", int, fallback=0, at_least=0, at_most=16
    )
    attention_resolutions: list = flag(
        None, "feature-map sizes with self-attention", integers, fallback=[], least=0
    )
    norm: str = flag(None, "normalization", str, choices=NORMS, fallback="batch")
    activation: str = flag("leaky_relu", "activation", choices=ACTIVATIONS)
    negative_slope: float = flag(0.01, "slope of LeakyReLU below zero", at_least=0, at_most=1)
    dropout: float = flag(
        None, "dropout rate of activations", float, fallback=0.0, at_least=0, at_most=0.9
    )
    init: str = flag("xavier", "weight initialization", choices=INITS)
    class_cond: bool = flag(False, "condition the network on the class labels")
    label_dropout: float = flag(0.1, "dropout rate of labels, for CFG", at_least=0, at_most=1)
    # the objective
    prediction: str = flag(None, "what the network predicts", str, PREDICTIONS, fallback="v")
    weighting: str = flag(
        None, "weight of noise levels in the loss (default: by prediction)", str, WEIGHTINGS
    )
    loss: str = flag("mse", "loss function", choices=LOSSES)
    # output
    name: str = flag(None, "name of the run (default: the dataset's)", str)
    out_dir: str = flag("checkpoints", "where runs are written")
    save_every: int = flag(
        None, "steps between checkpoints (default: a tenth of the run)", int, at_least=1
    )
    keep_checkpoints: int = flag(2, "numbered checkpoints to keep", at_least=0)
    sample_every: int = flag(None, "steps between sample grids (default: 5 a run)", int, at_least=1)
    tensorboard: bool = flag(False, "write files for TensorBoard, too")

    def __post_init__(self):
        check_fields(self)
        for name, value in PURPOSES[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.schedule = self.schedule or DEFAULT_SCHEDULE
        learned = SCHEDULES[self.schedule].trained
        if self.timesteps is None:
            self.timesteps = 0 if learned else 1000
        if self.weighting is None and learned:
            self.weighting = "vlb"
        if self.weighting is None and self.prediction is not None:
            self.weighting = DEFAULT_WEIGHTING.get(self.prediction, "uniform")
        if self.prediction is None and self.weighting is not None:
            self.prediction = "v"  # a preset's goes with its own weighting
        says = self.weighting == "vlb" or self.schedule != DEFAULT_SCHEDULE
        if self.noise_dist is None and says:
            self.noise_dist = "stratified"  # a schedule that was chosen says what is drawn
        for wrong, message in (*self.slips(), *self.contradictions()):
            if wrong:
                raise ValueError(message)

    def slips(self):
        """Return pairs (what is wrong with single fields or with the run's size, message)."""
        name = self.name or "run"
        is_name = name == Path(name).name and name != ".." and name.isprintable()
        step_items = self.batch_size * self.grad_accumulation * (self.noise_copies or 1)
        by_steps = self.epochs is not None or self.max_steps is not None
        return (
            (not self.dataset, "dataset='': expected a name; a place is given by data_dir"),
            (
                not is_name or len(name) > MAX_NAME,
                f"name={shown(name)}: expected a name; a place is given by out_dir",
            ),
            (
                self.norm in (None, "batch") and self.batch_size == 1,
                "batch_size=1 gives BatchNorm nothing to average; use 2 or more, or norm=group",
            ),
            (
                step_items > MAX_STEP_ITEMS,
                f"batch_size={self.batch_size}, grad_accumulation={self.grad_accumulation} and "
                f"noise_copies={self.noise_copies or 1} make a step of {step_items:,} items; "
                f"expected at most {MAX_STEP_ITEMS:,}",
            ),
            (
                self.shards and self.shards & (self.shards - 1),
                f"shards={self.shards}: expected a power of two, such as 2, 4 or 8",
            ),
            (
                self.shards and self.batch_size % self.shards,
                f"shards={self.shards} does not divide batch_size={self.batch_size}; choose a "
                "power of two that does",
            ),
            (
                self.norm in (None, "batch") and self.shards == self.batch_size > 1,
                f"shards={self.shards} leaves BatchNorm one item of batch_size={self.batch_size}"
                " to average; use fewer, or norm=group",
            ),
            (
                self.planned_steps and (by_steps or not self.max_minutes),
                "planned_steps is of a run that max_minutes alone governs",
            ),
        )

    def contradictions(self):
        """Return pairs (which fields contradict each other, message)."""
        learned = SCHEDULES[self.schedule].trained
        vlb = self.weighting == "vlb"
        zero = self.zero_terminal_snr
        dist = NOISE_DISTS[self.noise_dist or "stratified"]
        drops_labels = self.label_dropout != Config.label_dropout
        slopes = self.negative_slope != Config.negative_slope
        return (
            (drops_labels and not self.class_cond, "label_dropout needs class_cond"),
            (slopes and self.activation != "leaky_relu", "negative_slope is for leaky_relu"),
            (learned and self.timesteps, f"timesteps={self.timesteps}: learned is continuous"),
            (learned and zero, "zero_terminal_snr: a learned schedule trains its own ends"),
            (learned and self.noise_dist != "stratified", "noise_dist: learned draws its own"),
            (learned and not vlb, f"weighting={self.weighting}: learned is trained on the VLB"),
            (learned and self.loss != "mse", f"loss={self.loss}: the VLB, of learned, is mse"),
            (zero and self.prediction == "eps", "prediction=eps: not for zero_terminal_snr"),
            (zero and self.timesteps == 1, "timesteps=1: zero_terminal_snr needs two levels"),
            (zero and vlb, "weighting=vlb is infinite with zero_terminal_snr"),
            (zero and not dist.reaches_noise, f"noise_dist={self.noise_dist} omits the last level"),
            (vlb and not dist.over_t, f"noise_dist={self.noise_dist}: vlb weighs the levels"),
        )

    def network_options(self):
        """Return the keyword arguments of a function in reverse.NETWORKS.

        Raises ValueError where one is left open: `resolve` chooses it for the data."""
        names = "channels_base blocks_per_level channel_mult patch_size attention_resolutions"
        names += " norm activation negative_slope dropout init checkpoint_activations"
        names += " fourier_features"
        values = FALLBACKS | {name: v for name, v in asdict(self).items() if v is not None}
        options = {name: values.get(name) for name in names.split()}
        left_open = [name for name, value in options.items() if value is None]
        if left_open:
            raise ValueError(f"{left_open[0]}=None: give it, or call config.resolve(dataset)")
        return options

    def data_options(self):
        """Return the keyword arguments of data.load_dataset."""
        names = "data_dir seed image_size channels test_fraction labels cache"
        options = {name: getattr(self, name) for name in names.split()}
        return {"name": self.dataset, **options}

    def resolve(self, dataset):
        """Return this config with everything that was left open chosen for the dataset.

        Raises ValueError when the data cannot be used as the config says."""
        if self.class_cond and (not dataset.classes or dataset.train_labels is None):
            raise ValueError(f"class_cond: {self.dataset} has no labels; leave it out")
        kind = {3: "images", 2: "sequences"}.get(len(dataset.event), "points")
        of_unet = self.attention_resolutions or (self.patch_size or 1) > 1
        if kind == "points" and (of_unet or (self.channel_mult or [1]) != [1]):
            names = "attention_resolutions, patch_size and channel_mult"
            raise ValueError(f"{names} are for images and sequences, not points")
        if kind != "images" and self.augment != "none":
            raise ValueError(f"augment={self.augment} is for images, not {kind}")
        of_data = preset_of(self.dataset, kind, self.size, self.preset, len(dataset.train))
        preset = FALLBACKS | {"network": "mlp" if kind == "points" else "unet"} | of_data
        preset["shards"] = default_shards()
        chosen = {name: value for name, value in preset.items() if getattr(self, name) is None}
        if chosen.get("attention_resolutions"):
            both = asdict(self) | chosen
            sides = feature_sides(dataset.event, both["patch_size"], len(both["channel_mult"]))
            (most,) = chosen["attention_resolutions"]
            chosen["attention_resolutions"] = [side for side in sides if side <= most][:1]
        if kind == "points" and self.precision == "auto":
            chosen["precision"] = "fp32"  # bf16 tells no nearer points apart than 1/128
        return replace(self, **chosen)

    def seconds_limit(self):
        """Return after how many seconds a run is cut off: inf where the clock only planned it."""
        cut_off = self.max_minutes is not None and self.planned_steps is None
        return 60 * self.max_minutes if cut_off else math.inf

    def num_steps(self, count):
        """Return the steps of a run on `count` training items.

        None where max_minutes alone governs it, and Trainer.plan_steps has not planned any yet."""
        epochs = self.epochs
        if epochs is None and self.max_steps is None and self.max_minutes is None:
            epochs = DEFAULT_EPOCHS
        limits = []
        if epochs is not None:
            limits.append(math.ceil(epochs * count / (self.batch_size * self.grad_accumulation)))
        if self.max_steps is not None:
            limits.append(self.max_steps)
        if self.planned_steps is not None:
            limits.append(self.planned_steps)
        return min(limits, default=None)


# What fields that are open become where no preset says more.
FALLBACKS = {f.name: f.metadata["fallback"] for f in fields(Config) if "fallback" in f.metadata}

# What may change when a run is resumed. All else would make it another run.
LIMITS = ("epochs", "max_steps", "max_minutes", "planned_steps")  # of a run
RESUMABLE_FIELDS = {
    *(*LIMITS, "lr", "lr_schedule", "warmup"),
    *("weight_decay", "grad_clip", "ema_decay", "device", "precision", "compile", "threads"),
    *("reduce", "checkpoint_activations", "labels", "cache", "tensorboard"),
    *("name", "data_dir", "out_dir", "save_every", "keep_checkpoints", "sample_every"),
}


def resume_config(config, overrides):
    """Return the config of a resumed run: its own, with `overrides` (a dict) on top.

    Raises ValueError when an override would make it another run."""
    saved = asdict(config) | {"compile": False}  # it may not work on this machine
    if overrides.get("shards") == 0:  # auto: what was found to fit when the run began
        overrides = overrides | {"shards": saved["shards"]}
    for name, value in overrides.items():
        if name not in RESUMABLE_FIELDS and value != saved[name]:
            raise ValueError(
                f"{name}={value} is not the resumed run's {saved[name]}; leave it out or start anew"
            )
    given = [overrides.get(name) for name in LIMITS[:-1]]
    if any(given) and given != [saved[name] for name in LIMITS[:-1]]:
        saved.update(dict.fromkeys(LIMITS))  # new limits take the place of the old ones
    return Config(**{**saved, **overrides})
