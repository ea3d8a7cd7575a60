"""CIFAR-10 on one GPU: train for so many minutes, draw samples, write distances to real images.

python benchmarks/cifar10.py --dataset PATH --minutes 10 [--compile] [any other flag of train.py]

The clock counts training steps: not start-up, compilation, checkpoints and sampling, which the
wall clock counts too. Called again with the same flags it goes on where it stopped, also in the
midst of training: --slice_minutes ends a call early. Prints tables, and writes them to OUT as JSON,
with grids of samples and the model. See docs/cifar10.md.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from _common import describe_machine, make_parser, timed, write_json
from roofline import rate
from tqdm import tqdm
from train_speed import count_flops

from ddp.config import Config, resume_config
from ddp.data import load_dataset
from ddp.io.checkpoint import checkpoint_state, parse_config, read_checkpoint, write_checkpoint
from ddp.io.checkpoint import strip_training_state as strip
from ddp.io.cli import add_config_flags, add_flag, add_plugin_flag, command, require_at_least
from ddp.io.device import sampling_dtype, select_device, set_deterministic
from ddp.io.figures import grid, save_png
from ddp.io.memory import fit_shards
from ddp.io.setup import build_trainer
from ddp.io.terminal import GracefulStop
from ddp.metrics.candidate import Candidate, EvaluateOptions, Reference, generate_samples
from ddp.metrics.distances import frechet_distance, prdc
from ddp.metrics.sample_metrics import extract, real_features
from ddp.model import build_model
from ddp.options import SamplerOptions
from ddp.planning import synchronize
from ddp.sampling import SAMPLERS

DEFAULTS = {"dataset": "cifar10", "size": "l", "augment": "flip"}  # where no flag says more
OWN = ("minutes", "slice_minutes", "samples", "seeds", "seed_samples", "nfe", "sampler")
OWN += ("sample_batch", "inception_weights", "any_order", "out", "plugin")  # flags, not Config's
WARMUP_STEPS = 10  # before a step is timed
TIMED_STEPS = 10  # of each of three rounds, whose median says how many steps fit
LOG_STEPS = 50  # between two losses that are read, for which the CPU waits
MATRIX_SIDE = {"cuda": 8192, "cpu": 512}  # of the product that measures the peak
PRDC_ITEMS = 5000  # pairs take time as the square of the number
GRID_ITEMS = 100  # in a picture
FIGURES = ("fd_train", "fd_test", "precision", "recall")


# ---- the run ----


def load_images(config):
    """Return the Dataset with its validation items among the training items, as others train."""
    dataset = load_dataset(**config.data_options(), progress=tqdm)
    if not dataset.is_pixels:
        raise ValueError(f"dataset={config.dataset}: expected images of 256 values")
    if dataset.val is None:
        return dataset
    whole = {"train": torch.cat([dataset.train[:], dataset.val[:]]), "val": None}
    if dataset.train_labels is not None:
        whole["train_labels"] = torch.cat([dataset.train_labels, dataset.val_labels])
    return dataclasses.replace(dataset, **whole, val_labels=None, known_fingerprint=None)


def open_run(args, overrides):
    """Return the Trainer of the run in args.out, new or at the step where it stopped."""
    path = args.out / "last.pth"
    state = read_checkpoint(path) if path.exists() else None
    if state:
        config = resume_config(parse_config(state, path), overrides)
    else:
        by_steps = "epochs" in overrides or "max_steps" in overrides
        length = {} if by_steps else {"max_minutes": args.minutes}
        config = Config(**DEFAULTS | length | overrides)
    if config.planned_steps and config.max_minutes != args.minutes:
        raise ValueError(f"minutes={args.minutes:g}: out={args.out} has {config.max_minutes:g}")
    device = select_device(config.device)
    dataset = load_images(config)
    print(*dataset.describe(), sep="\n")
    config = fit_shards(config.resolve(dataset), dataset, device, print)
    trainer = build_trainer(config, dataset, device, state, print)
    if args.any_order:
        set_deterministic(False, device)
    return trainer


def seconds_of_step(trainer):
    """Return the seconds of a training step; compile and warm up first, and undo all of it."""
    state = copy.deepcopy(trainer.state_dict())
    step = partial(trainer.train_step, 0.0)
    timed(step, WARMUP_STEPS, trainer.device)
    rounds = [timed(step, TIMED_STEPS, trainer.device) for _ in range(3)]
    trainer.load_state_dict(state)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trainer.device)
    return statistics.median(rounds) / TIMED_STEPS


def plan(trainer, minutes, step_seconds):
    """Fix the number of steps that fit into the minutes, unless it is known."""
    if trainer.num_steps is None:
        steps = max(1, round(60 * minutes / step_seconds))
        limits = {"max_minutes": minutes, "planned_steps": steps}
        trainer.config = dataclasses.replace(trainer.config, **limits)


def train(trainer, results, deadline):
    """Train to the end, the deadline or a signal; return whether the run has ended."""
    num_steps = trainer.num_steps
    before = trainer.seconds
    started = time.monotonic()
    with (
        GracefulStop(print) as stop,
        tqdm(total=num_steps, initial=trainer.step, disable=None) as bar,
    ):
        while trainer.step < num_steps and time.monotonic() < deadline and not stop.came():
            stats = trainer.train_step(trainer.step / num_steps)
            bar.update()
            if trainer.step % LOG_STEPS and trainer.step < num_steps:
                continue
            loss = stats.loss.item()  # waits for the device
            trainer.seconds = before + time.monotonic() - started
            results["losses"].append([trainer.step, round(trainer.seconds, 2), loss])
            if not stats.loss.isfinite():
                raise FloatingPointError(f"the loss is {loss} at step {trainer.step}")
    synchronize(trainer.device)
    trainer.seconds = before + time.monotonic() - started
    return trainer.step >= num_steps


# ---- what it costs ----


def step_flops(trainer):
    """Return the floating-point operations of a step's networks, forward and backward.

    Counted on PyTorch's meta device, so they are of the network and not of its kernels."""
    config = trainer.config
    items = config.batch_size * config.noise_copies
    with torch.device("meta"):
        model = build_model(config, trainer.model.event, trainer.model.num_classes)
        label = torch.zeros(items, dtype=torch.long) if model.num_classes else None
        inputs = (torch.empty(items, *model.event), torch.zeros(items), label)
        flops, _ = count_flops(lambda: model.denoise(*inputs).sum().backward())
    return config.grad_accumulation * flops


def peak_flops(device, precision):
    """Return the rate, FLOP/s, of a large product of matrices of random numbers."""
    side = MATRIX_SIDE.get(device.type, 1024)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.randn(side, side, device=device).to(dtype)
    return 1e9 * rate(lambda: a @ a, 2 * side**3, device)


def training_results(trainer):
    """Return what training took, a dict, and print two lines of it."""
    config = trainer.config
    items = trainer.step * config.batch_size * config.grad_accumulation
    on_gpu = trainer.device.type == "cuda"
    milliseconds = 1e3 * trainer.seconds / max(1, trainer.step)  # none, where compiling took all
    result = {
        "parameters": trainer.num_params,
        "batch_size": config.batch_size,
        "precision": trainer.precision,
        "steps": trainer.step,
        "epochs": items / len(trainer.dataset.train),
        "seconds": trainer.seconds,
        "images_per_second": items / trainer.seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated(trainer.device) if on_gpu else None,
        "flops": trainer.step * step_flops(trainer) / trainer.seconds,  # FLOP/s
        "peak_flops": peak_flops(trainer.device, trainer.precision),
    }
    print(
        f"trained: {trainer.step:,} of {trainer.num_steps:,} steps, {result['epochs']:.1f} epochs, "
        f"{trainer.seconds / 60:.2f} minutes, {result['images_per_second']:,.0f} images a second, "
        f"at most {(result['gpu_bytes'] or 0) / 1e9:.2f} GB of the GPU\n"
        f"a step: {milliseconds:.2f} ms, {result['flops'] / 1e12:.1f} "
        f"TFLOP/s, {result['flops'] / result['peak_flops']:.1%} of a large {trainer.precision} "
        f"matrix product's {result['peak_flops'] / 1e12:.1f}"
    )
    return result


# ---- samples and distances ----


class Judge:
    """Distances of samples to all training and all test images, in each feature space."""

    def __init__(self, dataset, device, weights=None):
        options = EvaluateOptions(2**31, reference="train", inception_weights=weights)
        reference = Reference(dataset, options, device)
        names = ("inception",) if weights else ("classifier", "filters")
        self.spaces = {}  # name -> features of: items, training images, test images
        self.about = {}
        for name in names:
            real = real_features(name, reference, options)
            test = extract(real.extractor.features, dataset.test)  # (M, D)
            self.spaces[name] = (real.extractor.features, real.items, test)
            self.about[name] = real.extractor.about | {"weak": real.extractor.weak}

    def rows(self, items, counts):
        """Return the figures of the first `counts` of items (N, C, H, W): a list of dicts."""
        rows = []
        for name, (features_of, _, _) in self.spaces.items():
            features = extract(features_of, items)  # (N, D)
            rows += [self.row(name, features[:count], features[:count]) for count in counts]
        return rows

    def real_rows(self):
        """Return the figures of real images: test images as samples, or training images."""
        spaces = self.spaces.items()
        return [self.row(name, test, train[: len(test)]) for name, (_, train, test) in spaces]

    def row(self, name, for_train, for_test):
        """Return the figures of features (N, D), compared with training and with test images."""
        _, train, test = self.spaces[name]
        near = prdc(for_test[:PRDC_ITEMS], test[:PRDC_ITEMS])
        return {
            "space": name,
            "count": len(for_test),
            "fd_train": frechet_distance(for_train, train),
            "fd_test": frechet_distance(for_test, test),
            "precision": near["precision"],
            "recall": near["recall"],
        }


def draw(dataset, model, nfe, seed, count, args):
    """Return samples (count, C, H, W) uint8 of a model, and the seconds that they took."""
    options = SamplerOptions(sampler=args.sampler, steps=nfe).resolve(model)
    measured = EvaluateOptions(count, reference="train", seed=seed, batch_size=args.sample_batch)
    reference = Reference(dataset, measured)
    candidate = Candidate("model", {}, sampling_model=model, sampler_options=options)
    started = time.monotonic()
    items = generate_samples(candidate, reference, measured)
    return items, time.monotonic() - started


def measure_samples(trainer, args, results, started):
    """Add rows to the results until all are there or the time is over; return if all are."""
    deadline = started + 60 * args.slice_minutes
    todo = [(nfe, 0) for nfe in args.nfe]
    todo += [(nfe, seed) for seed in range(1, args.seeds) for nfe in args.nfe]
    done = {(row["nfe"], row["seed"]) for row in results["rows"]}
    todo = [pair for pair in todo if pair not in done]
    if not todo or time.monotonic() >= deadline:
        return not todo
    dtype = sampling_dtype(None, trainer.config.precision, trainer.device)
    model = trainer.recalibrated_ema().for_inference(dtype)
    dataset = trainer.dataset.to("cpu")  # its training images lie on the GPU; features do not
    judge = Judge(dataset, trainer.device, args.inception_weights)
    results["spaces"] = judge.about
    results["real"] = judge.real_rows()
    draw(dataset, model, min(args.nfe), 0, args.sample_batch, args)  # kernels are chosen
    most = len(dataset.train)
    for nfe, seed in tqdm(todo, desc="samples", disable=None):
        if time.monotonic() >= deadline:
            return False
        counts = {min(args.seed_samples, most)}
        counts |= {min(args.samples, most)} if seed == 0 else set()
        items, seconds = draw(dataset, model, nfe, seed, max(counts), args)
        speed = len(items) / seconds
        for row in judge.rows(items, sorted(counts)):
            row |= {"nfe": nfe, "seed": seed, "samples_per_second": speed}
            results["rows"].append(row)
        if seed == 0:
            save_png(grid(items[:GRID_ITEMS]), args.out / f"samples-{nfe}.png")
        save(results, args, started)
    return True


def table(results):
    """Return lines of text: a row for each space, number of samples and of evaluations."""
    titles = "".join(f"{name:>17}" for name in FIGURES)
    lines = [f"{'space':<11}{'samples':>8}{'seeds':>6}{'NFE':>5}{titles}{'samples/s':>11}"]
    rows = results["rows"]
    keys = sorted({(row["space"], -row["count"], row["nfe"]) for row in rows})
    for space, count, nfe in keys:
        these = [r for r in rows if (r["space"], -r["count"], r["nfe"]) == (space, count, nfe)]
        line = f"{space:<11}{-count:8,}{len(these):6}{nfe:5}"
        for name in FIGURES:
            line += f"{spread([row[name] for row in these]):>17}"
        speed = statistics.median(row["samples_per_second"] for row in these)
        lines.append(f"{line}{speed:11,.0f}")
    for row in results["real"]:
        cells = "".join(f"{row[name]:17.4g}" for name in FIGURES)
        lines.append(f"{row['space']:<11}{row['count']:8,}  real      {cells}")
    return lines


def spread(values):
    """Return a mean as text and, of several values, their standard deviation."""
    text = f"{statistics.mean(values):.4g}"
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


# ---- the program ----


def parse(arguments=None):
    parser = make_parser(__doc__, "cifar10.py", argument_default=argparse.SUPPRESS)
    add_flag(parser, "minutes", type=float, default=10.0, help="of training steps (default: 10)")
    part = "end this call after so many minutes; the same flags go on (default: never)"
    add_flag(parser, "slice_minutes", type=float, default=1e6, help=part)
    numbers = {
        "samples": (50_000, "samples of seed 0 (default: 50000)"),
        "seeds": (3, "sampling seeds (default: 3)"),
        "seed_samples": (None, "samples by which seeds are compared (default: as samples)"),
        "sample_batch": (1000, "samples at a time (default: 1000)"),
    }
    for name, (default, text) in numbers.items():
        add_flag(parser, name, type=int, metavar="N", default=default, help=text)
    nfe = {"default": [10, 20, 50], "help": "numbers of network evaluations (default: 10 20 50)"}
    add_flag(parser, "nfe", type=int, metavar="N", nargs="+", **nfe)
    names = [name for name in SAMPLERS if name != "heun"]  # one evaluation a step
    add_flag(parser, "sampler", default="unipc", choices=names, help="default: unipc")
    add_flag(parser, "inception_weights", default=None, help="a file: its FID, as published")
    order = "let cuDNN take the fastest kernels, which add in any order: other bits in each run"
    add_flag(parser, "any_order", action="store_true", default=False, help=order)
    add_flag(parser, "out", type=Path, default=Path("cifar10"), help="folder (default: cifar10)")
    add_config_flags(parser, Config)
    add_plugin_flag(parser)
    return parser.parse_args(arguments)


def save(results, args, started):
    """Write the results, so that no later failure takes them."""
    results["calls"][-1]["seconds"] = time.monotonic() - started
    write_json(args.out / "cifar10.json", results)


def main(args):
    started = time.monotonic()
    args.seed_samples = args.seed_samples or args.samples
    bounds = dict.fromkeys(("seeds", "sample_batch"), 1)
    require_at_least(args, minutes=1e-9, samples=20, seed_samples=20, **bounds)
    overrides = {name: value for name, value in vars(args).items() if name not in OWN}
    if "max_minutes" in overrides:
        raise ValueError("max_minutes: expected minutes, which counts training steps alone")
    args.out.mkdir(parents=True, exist_ok=True)
    before = args.out / "cifar10.json"
    empty = {"calls": [], "losses": [], "rows": []}
    results = json.loads(before.read_text()) if before.exists() else empty
    results["machine"] = describe_machine(select_device(overrides.get("device", "auto")))
    trainer = open_run(args, overrides)
    results["losses"] = [row for row in results["losses"] if row[0] <= trainer.step]
    seconds_before = trainer.seconds
    results["calls"].append({"training": 0.0})
    ended = trainer.num_steps is not None and trainer.step >= trainer.num_steps
    if not ended:
        plan(trainer, args.minutes, seconds_of_step(trainer))
        ended = train(trainer, results, started + 60 * args.slice_minutes)
        write_checkpoint(args.out / "last.pth", checkpoint_state(trainer))
        results["config"] = dataclasses.asdict(trainer.config)
        results["calls"][-1]["training"] = trainer.seconds - seconds_before
        save(results, args, started)  # before all else that may fail
        results["training"] = training_results(trainer)
    if ended and "test_loss" not in results:
        trainer.recalibrated_ema()
        results["test_loss"] = trainer.val_loss()
        write_checkpoint(args.out / "model.pth", strip(checkpoint_state(trainer)))
    save(results, args, started)
    done = ended and measure_samples(trainer, args, results, started)
    if results["rows"]:
        print(*table(results), sep="\n")
    save(results, args, started)
    if not done:
        print("stopped; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
