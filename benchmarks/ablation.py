"""What each piece of the reverse network and of its training is worth, by taking it away.

python benchmarks/ablation.py [--dataset digits] [--epochs 100] [--only "default norm=none"]

Every variant is trained from the same seed on the same batches for the same number of steps, and
judged by the same code on the same noise. Prints a table and writes it to JSON.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from script import exit_code
from tqdm import tqdm

from ddp import data, device, evaluation
from ddp.config import Config, Sampling, expect
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
    {"predict": "eps", "weighting": "snr"},
    {"predict": "x0"},
    {"weighting": "min_snr"},
    {"schedule": "linear"},
    {"schedule": "sigmoid"},
    {"timesteps": 0},
]


def name_of(variant):
    return ",".join(f"{k}={v}" for k, v in variant.items()) or "default"


def measure(variant, args):
    """One row of the table: a variant trained and judged."""
    config = Config(dataset=args.dataset, data_dir=args.data_dir, epochs=args.epochs, **variant)
    dataset = data.load(**config.data())
    where = device.pick_device("auto")
    precision = device.pick_precision("auto", where)
    trainer = Trainer(config.for_data(dataset), dataset, where, precision)
    steps = config.steps(len(dataset.train))
    started = time.monotonic()
    for step in tqdm(range(steps), desc=name_of(variant), leave=False, disable=None):
        _, loss, _, _ = trainer.train_step(step / steps)
        if not loss.isfinite():
            return {"variant": name_of(variant), "diverged": step}
    seconds = time.monotonic() - started
    model = trainer.average()
    setting = evaluation.Setting(dataset, args.samples)
    drawn = evaluation.draw(model, setting, Sampling().options(model))
    levels = evaluation.loss(model, setting, args.samples)
    return {
        "variant": name_of(variant),
        "step_ms": 1000 * seconds / steps,
        "v_loss": sum(row["v"].value for row in levels.values()) / len(levels),
        "ratio": evaluation.distance_ratio(drawn, setting),
        "config": dataclasses.asdict(trainer.config),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--epochs", type=float, default=100)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument(
        "--only", help="names of variants as the table shows them, separated by spaces"
    )
    parser.add_argument("--out", default="ablation.json")
    args = parser.parse_args()
    expect(args, epochs=1e-9, samples=evaluation.FEWEST)
    variants = {name_of(variant): variant for variant in VARIANTS}
    chosen = args.only.split() if args.only else list(variants)
    if unknown := set(chosen) - set(variants):
        parser.error(f"--only: no {', '.join(unknown)}; there are {' '.join(variants)}")
    rows = []
    print(
        f"{'variant':<28} {'v loss':>8} {'ratio to default':>17} {'distance/floor':>15} {'step':>9}"
    )
    for name in chosen:
        row = measure(variants[name], args)
        rows.append(row)
        if "diverged" in row:
            print(f"{row['variant']:<28} diverged at step {row['diverged']}")
            continue
        first = rows[0]
        print(
            f"{row['variant']:<28} {row['v_loss']:8.4f} {row['v_loss'] / first['v_loss']:17.3f} "
            f"{row['ratio']:15.2f} {row['step_ms'] / first['step_ms']:8.2f}x",
            flush=True,
        )
    Path(args.out).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code("ablation.py", main))
