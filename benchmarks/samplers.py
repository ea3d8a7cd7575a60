"""Every sampler at several numbers of network evaluations (NFE): quality and seconds.

python benchmarks/samplers.py --checkpoint checkpoints/digits.pth

Quality is the distance of samples to the test split, over that of as many training items (FD of
pixels, 2-Wasserstein of points), as mean ± standard error over seeds; every sampler starts from the
same noise. Prints a table and writes it to JSON, with a figure.
"""

import itertools
import sys
import time
from pathlib import Path

import torch
from _common import make_parser, write_json
from tqdm import tqdm

from ddp.data import load_dataset
from ddp.io.checkpoint import load_model
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import select_device
from ddp.io.figures import chart
from ddp.metrics.candidate import Candidate, EvaluateOptions, Reference, generate_samples
from ddp.metrics.evaluate import MIN_ITEMS, to_json
from ddp.metrics.features import load_or_train_classifier
from ddp.metrics.sample_metrics import CONFIDENT, distance_ratio
from ddp.metrics.uncertainty import Estimate
from ddp.options import SamplerOptions
from ddp.sampling import SAMPLERS
from ddp.schedule import SPACINGS

ETAS = (0.0, 0.5, 1.0)  # of ddim


def recipes(
    budgets,  # numbers of network evaluations
    spacings,  # keys of SPACINGS; None: the sampler's default
):
    """Yield (SamplerOptions, NFE): each sampler at each budget, which buys heun half the steps."""
    variants = []  # (sampler, eta)
    for name, sampler in SAMPLERS.items():
        for eta in ETAS if sampler.eta else (None,):
            variants.append((name, eta))
    for (name, eta), spacing, budget in itertools.product(variants, spacings, budgets):
        steps = budget
        nfe = budget
        if name == "heun":
            steps = (budget + 1) // 2
            nfe = 2 * steps - 1  # one in the last step
        yield SamplerOptions(sampler=name, steps=steps, spacing=spacing, eta=eta), nfe
    yield SamplerOptions(sampler="ddpm", steps=1000, spacing="trailing"), 1000


def name_of(options):
    return options["sampler"] + (f" eta {options['eta']:g}" if options["eta"] else "")


def confident_fraction(classifier, items):
    """Return the fraction of items of whose class the classifier is sure."""
    largest = classifier.class_probs(items).amax(dim=1)  # (N,)
    return (largest > CONFIDENT).double().mean().item()


def measure(model, dataset, sampler_options, nfe, classifier, args):
    """Return one row of the table."""
    options = sampler_options.resolve(model)
    candidate = Candidate(name_of(options), {}, sampling_model=model, sampler_options=options)
    ratios = []
    confident = []
    seconds = 0.0
    for seed in range(args.seeds):
        measuring = EvaluateOptions(num_samples=args.samples, seed=seed, batch_size=args.samples)
        measuring = measuring.resolve(dataset, [])
        reference = Reference(dataset, measuring)
        started = time.monotonic()
        samples = generate_samples(candidate, reference, measuring)
        seconds += time.monotonic() - started
        ratios.append(distance_ratio(samples, reference))
        if classifier:
            confident.append(confident_fraction(classifier, samples))
    return {
        "sampler": candidate.name,
        "spacing": options["spacing"],
        "nfe": nfe,
        "ratio": to_json(Estimate.mean(torch.tensor(ratios))),
        "confident": sum(confident) / len(confident) if confident else None,
        "seconds": seconds / args.seeds,
        "samples": len(reference.items),
    }


def line_of(row):
    """Return a row of the table as text."""
    confident = "" if row["confident"] is None else f"{row['confident']:.1%}"
    ratio = row["ratio"]
    return (
        f"{row['sampler']:<14} {row['spacing']:<9} {row['nfe']:6d} {ratio['value']:9.3f} ± "
        f"{ratio['error']:.3f} {confident:>10} {row['seconds']:8.2f}"
    )


def plot(rows):
    """Return a Figure of quality against NFE, each sampler at its best spacing."""
    figure, axes = chart(
        5.5, xscale="log", yscale="log", xlabel="NFE", ylabel="distance, relative to real vs real"
    )
    best = {}  # sampler -> NFE -> the least ratio of all spacings
    for row in rows:
        ratios = best.setdefault(row["sampler"], {})
        ratio = row["ratio"]["value"]
        ratios[row["nfe"]] = min(ratio, ratios.get(row["nfe"], ratio))
    for sampler, ratios in best.items():
        nfes = sorted(ratios)
        axes.plot(nfes, [ratios[nfe] for nfe in nfes], "o-", label=sampler)
    axes.legend()
    return figure


def parse(arguments=None):
    parser = make_parser(__doc__, "samplers.py")
    add_flag(parser, "checkpoint", required=True, help="a checkpoint that train.py wrote")
    add_flag(parser, "data_dir", help="where the dataset lies (default: as in training)")
    whole = {"type": int, "metavar": "N"}
    nfe = "numbers of network evaluations"
    add_flag(parser, "nfe", "evaluations", nargs="+", default=[5, 10, 20, 50], help=nfe, **whole)
    spacings = "spacings of the steps (default: that of each sampler)"
    add_flag(parser, "spacings", nargs="+", choices=list(SPACINGS), default=[None], help=spacings)
    samples = "samples, at most as many as test items"
    add_flag(parser, "samples", default=2000, help=samples, **whole)
    add_flag(parser, "seeds", default=3, help="number of seeds", **whole)
    add_flag(parser, "out", default="samplers.json", help="file for the table")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, seeds=2, samples=MIN_ITEMS)
    model, config, _ = load_model(args.checkpoint, device=select_device("auto"))
    data_options = config.data_options()
    if args.data_dir:
        data_options["data_dir"] = args.data_dir
    dataset = load_dataset(**data_options)
    classifier = None
    if dataset.classes:
        classifier, _ = load_or_train_classifier(dataset, tqdm)
        print(f"confident: {confident_fraction(classifier, dataset.test):.1%} of the test items")
    print("sampler        spacing      NFE   distance/real     confident  seconds")
    rows = []
    for options, nfe in tqdm(list(recipes(args.nfe, args.spacings)), disable=None):
        if model.schedule.timesteps and options.steps > model.schedule.timesteps:
            continue
        rows.append(measure(model, dataset, options, nfe, classifier, args))
        tqdm.write(line_of(rows[-1]))
        write_json(args.out, {"rows": rows})
    plot(rows).savefig(Path(args.out).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
