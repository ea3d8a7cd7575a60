"""What each part of the reverse network and of its training is worth, measured without it.

python benchmarks/ablation.py [--dataset digits] [--epochs 100] [--only "default norm=none"]

Every variant is trained from the same seed on the same batches for the same number of steps, and
measured by the same code on the same noise and at the same noise levels. A variant changes what its
name says and nothing else: what another default would follow from it stays as it is, and a
prediction is to be compared with the row of its weighting. Prints a table and writes it to JSON.
"""

import copy
import dataclasses
import math
import sys
import time

from _common import make_parser, write_json
from tqdm import tqdm

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import select_device, select_precision
from ddp.metrics.candidate import Candidate, EvaluateOptions, Reference, generate_samples
from ddp.metrics.evaluate import MIN_ITEMS
from ddp.metrics.likelihood_metrics import evaluate_loss
from ddp.metrics.sample_metrics import distance_ratio
from ddp.options import SamplerOptions
from ddp.schedule import Schedule
from ddp.training import Trainer

VARIANTS = [
    {},
    {"norm": "group"},
    {"norm": "none"},
    {"activation": "relu"},
    {"activation": "silu"},
    {"negative_slope": 0.2},
    {"dropout": 0.1},
    {"init": "kaiming"},
    {"init": "default"},
    {"optimizer": "adamw"},
    {"weighting": "snr"},
    {"prediction": "eps", "weighting": "snr"},
    {"weighting": "min_snr"},
    {"prediction": "x0", "weighting": "min_snr"},
    {"schedule": "linear"},
    {"schedule": "sigmoid"},
    {"timesteps": 0},
]


def name_of(variant):
    return ",".join(f"{name}={value}" for name, value in variant.items()) or "default"


def config_of(variant, items, **fields):
    """Return the Config of a variant: that of `fields` for a Dataset, but for what it names."""
    return dataclasses.replace(Config(**fields).resolve(items), **variant)


def train_variant(variant, dataset, args):
    """Return (trainer, seconds per step, None), or the number of the step at which it diverged."""
    fields = {"dataset": args.dataset, "data_dir": args.data_dir, "epochs": args.epochs}
    config = config_of(variant, dataset, **fields)
    device = select_device("auto")
    trainer = Trainer(config, dataset, device, select_precision("auto", device))
    steps = config.num_steps(len(dataset.train))
    started = time.monotonic()
    for step in tqdm(range(steps), desc=name_of(variant), leave=False, disable=None):
        stats = trainer.train_step(step / steps)
        if not stats.loss.isfinite():
            return trainer, None, step
    return trainer, (time.monotonic() - started) / steps, None


def measure(variant, dataset, args):
    """Return one row of the table: a variant trained and measured."""
    trainer, step_seconds, diverged = train_variant(variant, dataset, args)
    if diverged is not None:
        return {"variant": name_of(variant), "diverged": diverged}
    model = trainer.recalibrated_ema()
    at_same_levels = copy.deepcopy(model)
    at_same_levels.schedule = Schedule()  # of the default, whatever the variant's own
    candidate = Candidate(
        name_of(variant),
        about={},
        model=at_same_levels,
        sampling_model=model,
        sampler_options=SamplerOptions().resolve(model),
    )
    options = EvaluateOptions(num_samples=args.samples, vlb_items=args.samples)
    options = options.resolve(dataset, [candidate])
    reference = Reference(dataset, options)
    samples = generate_samples(candidate, reference, options)
    levels = evaluate_loss(candidate, reference, options)  # noise level -> Estimates
    v_losses = [level["v"].value for level in levels.values()]
    return {
        "variant": name_of(variant),
        "step_ms": 1000 * step_seconds,
        "v_loss": sum(v_losses) / len(v_losses),
        "ratio": distance_ratio(samples, reference),
        "config": dataclasses.asdict(trainer.config),
    }


def line_of(row, first):
    """Return a row of the table as text; it is compared with the row `first`."""
    if "diverged" in row:
        return f"{row['variant']:<28} diverged at step {row['diverged']}"
    loss_ratio = row["v_loss"] / first.get("v_loss", math.nan)
    time_ratio = row["step_ms"] / first.get("step_ms", math.nan)
    return (
        f"{row['variant']:<28} {row['v_loss']:8.4f} {loss_ratio:17.3f} "
        f"{row['ratio']:14.2f} {time_ratio:8.2f}x"
    )


def parse(arguments=None):
    parser = make_parser(__doc__, "ablation.py")
    add_flag(parser, "dataset", default="digits", help="a dataset by name (default: digits)")
    add_flag(parser, "data_dir", default="data", help="where datasets lie (default: data)")
    add_flag(parser, "epochs", type=float, default=100, help="length of a run (default: 100)")
    samples = "samples, and test items for the loss (default: 2000)"
    add_flag(parser, "samples", type=int, default=2000, help=samples)
    names = "names of variants as the table shows them, with spaces between (default: all)"
    add_flag(parser, "only", help=names)
    add_flag(parser, "out", default="ablation.json", help="file for the table")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, epochs=1e-9, samples=MIN_ITEMS)
    variants = {name_of(variant): variant for variant in VARIANTS}
    chosen = args.only.split() if args.only else list(variants)
    for name in chosen:
        if name not in variants:
            raise ValueError(f"only={name}: expected some of {' '.join(variants)}")
    titles = f"{'v loss':>8} {'ratio to default':>17} {'distance/real':>14} {'step':>9}"
    print(f"{'variant':<28} {titles}")
    dataset = load_dataset(args.dataset, args.data_dir)
    rows = []
    for name in chosen:
        rows.append(measure(variants[name], dataset, args))
        print(line_of(rows[-1], rows[0]), flush=True)
    write_json(args.out, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
