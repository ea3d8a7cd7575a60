"""Every sampler at every number of network evaluations: quality, evaluations, seconds.

python benchmarks/samplers.py --checkpoint checkpoints/digits.pth

Quality is the distance of samples to the test split over its floor, the distance of as many
training items (ddp/evaluation.py: Frechet of pixels, 2-Wasserstein of points), as mean ± standard
error over seeds; every sampler starts from the same noise. Prints a table and writes it to JSON,
with a figure."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from script import exit_code
from tqdm import tqdm

from ddp import data, device, evaluation, features
from ddp.checkpoint import load_model
from ddp.config import Sampling, expect
from ddp.quality import Estimate
from ddp.reverse import SAMPLERS
from ddp.schedule import SPACINGS


def recipes(evaluations, spacings):
    """(recipe, network evaluations): each sampler at each budget, which buys heun half the
    steps."""
    for sampler in SAMPLERS:
        etas = (0.0, 0.5, 1.0) if sampler == "ddim" else (None,)
        for eta in etas:
            for spacing in spacings:
                for budget in evaluations:
                    steps = (budget + 1) // 2 if sampler == "heun" else budget
                    used = 2 * steps - 1 if sampler == "heun" else steps
                    yield Sampling(sampler=sampler, steps=steps, spacing=spacing, eta=eta), used
    yield Sampling(sampler="ddpm", steps=1000, spacing="trailing"), 1000


def name_of(options):
    return options["sampler"] + (f" eta {options['eta']:g}" if options["eta"] else "")


def measure(model, dataset, recipe, used, args, judge):
    """One row of the table."""
    options, ratios, seconds, named = recipe.options(model), [], 0.0, []
    for seed in range(args.seeds):
        setting = evaluation.Setting(dataset, args.samples, seed, args.samples)
        started = time.monotonic()
        drawn = evaluation.draw(model, setting, options)
        seconds += time.monotonic() - started
        ratios.append(evaluation.distance_ratio(drawn, setting))
        named += [judged(judge, drawn)] if judge else []
    return {
        "sampler": name_of(options),
        "spacing": options["spacing"],
        "evaluations": used,
        "ratio": evaluation.plain(Estimate.mean(torch.tensor(ratios))),
        "named": sum(named) / len(named) if named else None,
        "seconds": seconds / args.seeds,
        "samples": setting.count,
    }


def judged(judge, items):
    """The share of items that the judge is sure of."""
    return (judge.of(items)[1].amax(dim=1) > evaluation.NAMED).double().mean().item()


def draw(rows):
    """Quality against evaluations, the best spacing of each sampler."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        best = {}
        for row in (r for r in rows if r["sampler"] == sampler):
            n = row["evaluations"]
            best[n] = min(best.get(n, row["ratio"]["value"]), row["ratio"]["value"])
        axes.plot(sorted(best), [best[n] for n in sorted(best)], "o-", label=sampler)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="distance / floor")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_dir", help="where the dataset lies, if it has moved")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument(
        "--spacings", nargs="+", choices=SPACINGS, default=[None], help="(default: what suits each)"
    )
    parser.add_argument("--samples", type=int, default=2000, help="at most as many as test items")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="samplers.json")
    args = parser.parse_args()
    expect(args, seeds=2, samples=evaluation.FEWEST)
    model, config, _ = load_model(args.checkpoint, device=device.pick_device("auto"))
    source = config.data() | ({"data_dir": args.data_dir} if args.data_dir else {})
    dataset, rows = data.load(**source), []
    judge = features.judge_of(dataset, tqdm)[0] if dataset.classes else None
    if judge:
        print(f"named: {judged(judge, dataset.test):.1%} of the test items")
    print("sampler        spacing   evaluations   distance/floor  named  seconds")
    for recipe, used in tqdm(list(recipes(args.evaluations, args.spacings)), disable=None):
        if model.schedule.timesteps and recipe.steps > model.schedule.timesteps:
            continue
        rows.append(row := measure(model, dataset, recipe, used, args, judge))
        named = f"{row['named']:.1%}" if judge else ""
        tqdm.write(
            f"{row['sampler']:<14} {row['spacing']:<9} {used:11d} {row['ratio']['value']:9.3f} ± "
            f"{row['ratio']['error']:.3f} {named:>6} {row['seconds']:8.2f}"
        )
        Path(args.out).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    draw(rows).savefig(Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(exit_code("samplers.py", main))
