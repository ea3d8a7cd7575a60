"""Measure a model, or samples: python evaluate.py --checkpoint checkpoints/digits.pth"""

import shlex
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ddp.io import cli
from ddp.io.cli import add_flag, reject_if
from ddp.io.device import select_device, set_tf32
from ddp.io.files import atomic_dir, next_free_path, require_absent
from ddp.metrics.candidate import EvaluateOptions, Reference, load_candidates
from ddp.metrics.evaluate import evaluate, known_metrics, metric_names, parse_metrics
from ddp.metrics.report import candidate_figures, report_lines, write_report
from ddp.options import SamplerOptions, image_size

OLD_FLAGS = {  # names before 0.2, still accepted
    "vlb_items": "test_items",
    "vlb_samples": "draws",
    "nll_items": "exact_items",
    "dequant_samples": "exact_draws",
}


def parse(arguments=None):
    parser = cli.make_parser(__doc__)
    group = parser.add_argument_group("what to measure")
    what = group.add_mutually_exclusive_group(required=True)
    add_flag(what, "checkpoint", metavar="PATH", help="a checkpoint that train.py wrote")
    add_flag(what, "samples", metavar="PATH", help="samples: .npz, .npy, a folder or a .zip")
    add_flag(what, "compare", nargs="+", metavar="PATH", help="several of either, side by side")
    names = ", ".join(known_metrics())
    add_flag(group, "metrics", help=f"some of {names} (default: all that need no download)")
    add_flag(group, "dataset", help="what samples are of: a dataset, or a folder or .zip of images")
    add_flag(group, "image_size", type=image_size, help="size of images from a folder: N, or HxW")
    add_flag(group, "data_dir", help="where the dataset lies (default: as in training)")
    add_flag(group, "weights", choices=("ema", "raw"), default="ema", help="EMA weights, or raw")
    group = parser.add_argument_group("how to measure")
    for field in fields(EvaluateOptions):
        add_flag(group, field.name, OLD_FLAGS.get(field.name), **cli.argparse_options(field))
    add_flag(group, "out", help="a new folder for the results (default: next to what is measured)")
    add_flag(group, "device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    cli.add_config_flags(parser, SamplerOptions, "how to sample from a checkpoint")
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def given(args, options_class):
    """The fields of a dataclass that were given as flags: name -> value."""
    values = {field.name: getattr(args, field.name) for field in fields(options_class)}
    return {name: value for name, value in values.items() if value is not None}


def load(paths, args, device):
    """(candidates, dataset): what lies at the paths, and the data to compare it with."""
    checkpoints = [p for p in paths if Path(p).suffix == ".pth" or p == args.checkpoint]
    flags = [*(["weights"] if args.weights == "raw" else []), *given(args, SamplerOptions)]
    reject_if(
        (checkpoints and args.dataset, "dataset is for samples; a checkpoint knows its own"),
        (not checkpoints and not args.dataset, "samples need a dataset to be compared with"),
        (not checkpoints and flags, f"{', '.join(flags)}: for checkpoints only"),
    )
    source = {"name": args.dataset, "image_size": args.image_size, "data_dir": args.data_dir}
    source = {name: value for name, value in source.items() if value is not None}
    sampling = cli.sampler_options(args)
    return load_candidates(paths, checkpoints, source, sampling, args.weights, device, tqdm)


def main(args):
    options = EvaluateOptions(**given(args, EvaluateOptions))
    paths = args.compare or [args.checkpoint or args.samples]
    different = {Path(path).resolve() for path in paths}
    first = Path(paths[0])
    reject_if(
        (args.compare and len(different) < max(2, len(paths)), "compare: give different paths"),
        (args.image_size and not args.dataset, "image_size is for a dataset of images"),
    )
    if args.metrics:
        metric_names(args.metrics)  # an unknown one is refused before anything is loaded
    out = next_free_path(first.with_name(f"{first.stem}-evaluation"))
    if args.out:
        out = require_absent(Path(args.out))
    started = time.monotonic()
    device = select_device(args.device)
    set_tf32(False)

    candidates, dataset = load(paths, args, device)
    print(*dataset.describe(), sep="\n")
    for candidate in candidates:
        for line in candidate.about.get("summary", []):
            print(line)
    has_model = any(candidate.model is not None for candidate in candidates)
    metrics = parse_metrics(args.metrics, dataset.is_image, has_model)
    if options.inception_weights and "inception" not in metrics:
        raise ValueError("inception_weights is for metrics=inception")
    options = options.resolve(dataset, candidates)
    progress = partial(tqdm, leave=False, mininterval=0.1 if sys.stderr.isatty() else 10)
    reference = Reference(dataset, options, device, progress)
    with atomic_dir(out) as folder:
        evaluation = evaluate(candidates, reference, metrics, options)
        evaluation["recipe"]["command"] = shlex.join(["python", *sys.argv])
        evaluation["seconds"] = time.monotonic() - started
        print(*report_lines(evaluation), sep="\n")
        figures = [candidate_figures(candidate, reference) for candidate in candidates]
        write_report(folder, evaluation, figures)
    print(f"\n{evaluation['seconds']:.0f} s, wrote", *sorted(out.absolute().iterdir()), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
