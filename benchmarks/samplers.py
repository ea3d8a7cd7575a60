"""Every sampler at several numbers of network evaluations (NFE): quality and seconds.

python benchmarks/samplers.py --checkpoint A/model.pth B/model.pth C/model.pth --data_dir PATH

The checkpoints are trainings of one recipe that differ in their seed; every figure is a mean ±
standard error over them. Quality is three figures, each relative to as many real items in the place
of samples: the Frechet distance (FD), precision and recall, in the features of the classifier or,
of points, of coordinates (2-Wasserstein distance for FD). Their geometric mean says which sampler
is best: 1 is as good as real items. Real items are the validation split, on which defaults are
chosen, or `--split test`. Prints a table and writes it to JSON, with a figure.
"""

import itertools
import math
import sys
import time
from pathlib import Path

import torch
from _common import make_parser, write_json
from tqdm import tqdm

from ddp.data import load_dataset, permutation, to_pixels
from ddp.io.checkpoint import load_model
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import sampling_dtype, select_device
from ddp.io.figures import chart
from ddp.metrics.distances import frechet_distance, prdc, wasserstein2
from ddp.metrics.evaluate import MIN_ITEMS
from ddp.metrics.features import FEATURES
from ddp.options import SamplerOptions
from ddp.sampling import SAMPLERS, cycle_labels, sample
from ddp.schedule import SPACINGS

ETAS = (0.0, 0.5)  # of ddim; with 1 it is ddpm
BATCH = 500  # samples at a time
FIGURES = ("fd", "precision", "recall")


def recipes(
    budgets,  # numbers of network evaluations
    spacings,  # keys of SPACINGS; None: the sampler's default
    samplers,  # keys of SAMPLERS
):
    """Yield (SamplerOptions, budget, NFE) of each sampler; a budget buys heun half the steps."""
    variants = []  # (sampler, eta)
    for name in samplers:
        for eta in ETAS if SAMPLERS[name].eta else (None,):
            variants.append((name, eta))
    for (name, eta), spacing, budget in itertools.product(variants, spacings, budgets):
        steps = budget
        nfe = budget
        if name == "heun":
            steps = (budget + 1) // 2
            nfe = 2 * steps - 1  # one in the last step
        yield SamplerOptions(sampler=name, steps=steps, spacing=spacing, eta=eta), budget, nfe


def name_of(options):
    return options["sampler"] + (f" eta {options['eta']:g}" if options["eta"] else "")


class Judge:
    """The three figures of items, as many as there are real ones, beside those of real items.

    features: items -> (N, D); distance: FD, or W2 of points; real and baseline: (N, D) each, the
    split that is compared with and as many training items in the place of samples."""

    def __init__(self, dataset, split, count):
        space = FEATURES["classifier" if dataset.is_image else "points"]
        self.features = space.build(dataset, progress=tqdm).features
        self.distance = frechet_distance if dataset.is_image else wasserstein2
        items = getattr(dataset, split)
        # the border of dark pictures is their background
        self.real_images_are_dark = bool((items[..., 0] == 0).double().mean() > 0.9)
        count = min(count, len(items), len(dataset.train))
        self.real = self.features(items[permutation(0, 0, len(items))[:count]])
        # the front of this order, which the classifier was not trained on
        baseline = dataset.train[permutation(0, 0, len(dataset.train))[:count]]
        self.floor = self.figures(self.features(baseline))

    def figures(self, features):
        """Return the three figures of features (N, D), a dict."""
        neighbors = prdc(features, self.real)
        distance = self.distance(features, self.real)
        return {"fd": distance, **{name: neighbors[name] for name in FIGURES[1:]}}

    def relative(self, items):
        """Return the figures of items over those of real ones; the distance is below the bar."""
        ratios = {}
        for name, value in self.figures(self.features(items)).items():
            ratios[name] = value / self.floor[name]
        quality = ratios["precision"] * ratios["recall"] / max(ratios["fd"], 1e-9)
        ratios["score"] = max(quality, 1e-9) ** (1 / 3)
        return ratios


def draw(model, options, seed, count):
    """Return samples (count, *event), pixels or points, of a model."""
    parts = []
    for indices in torch.arange(count).split(BATCH):  # (B,)
        label = cycle_labels(model, indices)  # (B,) or None
        parts.append(to_pixels(sample(model, indices, seed, label, **options)).cpu())
    return torch.cat(parts)


def measure(models, sampler_options, budget, nfe, judge):
    """Return one row of the table: figure -> mean and standard error over the models."""
    options = sampler_options.resolve(models[0])
    count = len(judge.real)
    started = time.monotonic()
    ratios = []
    for seed, model in enumerate(models):
        ratios.append(judge.relative(draw(model, options, seed, count)))
    row = {"sampler": name_of(options), "spacing": options["spacing"]}
    row |= {"budget": budget, "nfe": nfe}
    for name in (*FIGURES, "score"):
        row[name] = mean_and_error([ratio[name] for ratio in ratios])
    row["seconds"] = (time.monotonic() - started) / len(models)
    return row


def mean_and_error(values):
    """Return (mean, standard error) of a list, the error None where it holds one value."""
    values = torch.tensor(values, dtype=torch.float64)
    error = None
    if len(values) > 1:
        error = values.std().item() / math.sqrt(len(values))
    return values.mean().item(), error


def line_of(row):
    """Return a row of the table as text."""
    cells = []
    for name in (*FIGURES, "score"):
        value, error = row[name]
        cells.append(f"{value:7.3f}" + (" " * 8 if error is None else f" ± {error:.3f}"))
    figures = " ".join(cells)
    return (
        f"{row['sampler']:<14} {row['spacing']:<9} {row['nfe']:5d} {figures} {row['seconds']:8.2f}"
    )


def best_lines(rows):
    """Return lines of text: the best sampler of each budget, and what cannot be told from it."""
    lines = []
    for budget in sorted({row["budget"] for row in rows}):
        these = [row for row in rows if row["budget"] == budget]
        these.sort(key=lambda row: -row["score"][0])
        best, best_error = these[0]["score"]
        near = []
        for row in these[1:]:
            value, error = row["score"]
            if best - value <= 2 * math.hypot(best_error or 0, error or 0):
                near.append(row["sampler"])
        also = f"; within two standard errors: {', '.join(near)}" if near else ""
        lines.append(f"NFE {budget}: {these[0]['sampler']}, score {best:.3f}{also}")
    return lines


def plot(rows):
    """Return a Figure of the score against NFE, each sampler at its best spacing."""
    label = "score relative to real items (1: as good)"
    figure, axes = chart(5.5, xscale="log", yscale="log", xlabel="NFE", ylabel=label)
    best = {}  # sampler -> NFE -> the highest score of all spacings
    for row in rows:
        scores = best.setdefault(row["sampler"], {})
        scores[row["nfe"]] = max(row["score"][0], scores.get(row["nfe"], 0))
    for sampler, scores in best.items():
        nfes = sorted(scores)
        axes.plot(nfes, [scores[nfe] for nfe in nfes], "o-", label=sampler)
    axes.legend()
    return figure


def parse(arguments=None):
    parser = make_parser(__doc__, "samplers.py")
    help = "checkpoints of trainings that differ in their seed"
    add_flag(parser, "checkpoint", nargs="+", required=True, metavar="PATH", help=help)
    add_flag(parser, "dataset", help="what they are of (default: as in training)")
    add_flag(parser, "data_dir", default="data", help="where the dataset lies (default: data)")
    split = "real items to compare with (default: val or, where there is none, test)"
    add_flag(parser, "split", choices=("val", "test"), help=split)
    whole = {"type": int, "metavar": "N"}
    nfe = "numbers of network evaluations"
    add_flag(
        parser, "nfe", "evaluations", nargs="+", default=[5, 10, 20, 50, 100], help=nfe, **whole
    )
    samplers = "samplers to measure (default: all)"
    names = list(SAMPLERS)
    add_flag(parser, "samplers", nargs="+", choices=names, default=names, help=samplers)
    spacings = "spacings of the steps (default: that of each sampler)"
    add_flag(parser, "spacings", nargs="+", choices=list(SPACINGS), default=[None], help=spacings)
    samples = "samples, at most as many as real items"
    add_flag(parser, "samples", default=2000, help=samples, **whole)
    add_flag(parser, "precision", choices=("fp32", "bf16"), help="of sampling (default: by model)")
    add_flag(parser, "out", default="samplers.json", help="file for the table")
    return parser.parse_args(arguments)


def load_models(args):
    """Return the models, ready to be sampled from, and the dataset that they are of."""
    device = select_device("auto")
    models = []
    for path in args.checkpoint:
        model, config, _ = load_model(path, device=device)
        dtype = sampling_dtype(args.precision, config.precision, device)
        models.append(model.for_inference(dtype))
        if models[0].event != model.event:
            raise ValueError(f"checkpoint={path}: of {model.event}, not {models[0].event}")
    options = config.data_options() | {"data_dir": args.data_dir}
    if args.dataset:
        options["name"] = args.dataset
    return models, load_dataset(**options, progress=tqdm)


def main(args):
    require_at_least(args, samples=MIN_ITEMS)
    models, dataset = load_models(args)
    judge = Judge(dataset, args.split or dataset.selection_split, args.samples)
    floor = ", ".join(f"{name} {value:.4g}" for name, value in judge.floor.items())
    print(f"real items in the place of samples, {len(judge.real):,} of them: {floor}")
    titles = "".join(f"{name:>16}" for name in ("distance", *FIGURES[1:], "score"))
    print(f"sampler        spacing     NFE{titles}  seconds")
    rows = []
    todo = list(recipes(args.nfe, args.spacings, args.samplers))
    for options, budget, nfe in tqdm(todo, disable=None):
        if models[0].schedule.timesteps and options.steps > models[0].schedule.timesteps:
            continue
        rows.append(measure(models, options, budget, nfe, judge))
        tqdm.write(line_of(rows[-1]))
        write_json(args.out, {"real": judge.floor, "models": len(models), "rows": rows})
    print(*best_lines(rows), sep="\n")
    plot(rows).savefig(Path(args.out).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
