"""Measure a model, or samples: python evaluate.py --checkpoint checkpoints/digits.pth"""

import shlex
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ddp.distributed import is_main
from ddp.io import cli
from ddp.io.cli import add_flag, reject_if
from ddp.io.device import select_device, set_tf32
from ddp.io.files import atomic_dir, require_absent, shown_path
from ddp.io.progress import loading_bar
from ddp.io.run_dir import data_source
from ddp.io.tables import wrapped
from ddp.metrics.candidate import OLD_OPTIONS, EvaluateOptions, Reference
from ddp.metrics.evaluate import evaluate, known_metrics, metric_names, parse_metrics
from ddp.metrics.features import kinds_of
from ddp.metrics.report import measure_and_report
from ddp.metrics.subjects import find_subjects, free_place, load_candidates
from ddp.options import SamplerOptions, image_size
from ddp.threads import choose_sampling_threads


def parse(arguments=None):
    parser = cli.make_parser(__doc__)
    group = parser.add_argument_group("what to measure")
    what = group.add_mutually_exclusive_group(required=True)
    a_path = {"type": cli.path, "metavar": "PATH"}
    add_flag(what, "checkpoint", help="a checkpoint, a run's folder, or a URL", **a_path)
    add_flag(what, "samples", help="samples: .npz, .npy, a folder or a .zip", **a_path)
    help = "several: PATH, NAME=PATH or NAME=PATH,sampler=ddpm,steps=50; -- between groups of runs"
    add_flag(what, "compare", nargs="+", type=cli.subject, metavar="SUBJECT", help=help)
    names = ", ".join(known_metrics())
    add_flag(group, "metrics", help=f"some of {names} (default: all that need no download)")
    add_flag(group, "dataset", help="a dataset, or a folder or .zip (default: the checkpoint's)")
    add_flag(group, "image_size", type=image_size, help="size of images from a folder: N, or HxW")
    add_flag(group, "data_dir", help="where the dataset lies (default: as in training)")
    add_flag(group, "weights", choices=("ema", "raw"), default="ema", help="EMA weights, or raw")
    group = parser.add_argument_group("how to measure")
    for field in fields(EvaluateOptions):
        add_flag(group, field.name, OLD_OPTIONS.get(field.name), **cli.argparse_options(field))
    add_flag(group, "out", help="a new folder (default: beside what is measured)", **a_path)
    cli.add_machine_flags(group)
    cli.add_config_flags(parser, SamplerOptions, "how to sample from a checkpoint")
    cli.add_plugin_flag(parser)
    return parser.parse_args(cli.with_breaks(arguments))


def given(args, options_class):
    """The fields of a dataclass that were given as flags: name -> value."""
    values = {field.name: getattr(args, field.name) for field in fields(options_class)}
    return {name: value for name, value in values.items() if value is not None}


def parse_subjects(args):
    """What is to be measured, a list of Subjects. Raises ValueError for flags that do not fit."""
    subjects = find_subjects(args.checkpoint, args.samples, args.compare)
    has_model = any(subject.checkpoint for subject in subjects)
    weights = args.inception_weights and "inception" not in (args.metrics or "")
    reject_if(
        (weights, "inception_weights is for metrics=inception"),
        (args.compare and len(subjects) < 2, "compare: give two or more, each another"),
        (not has_model and not args.dataset, "samples need a dataset to be compared with"),
        (has_model and args.image_size, "image_size is for samples; a checkpoint has its own"),
    )
    if args.metrics:
        metric_names(args.metrics)  # an unknown one is refused before anything is loaded
    if args.out:
        require_absent(Path(args.out))
    return subjects


def find_data(args, candidate):
    """The arguments of load_dataset: of a candidate's training, or of None as the flags say."""
    if candidate:
        path = candidate.about["checkpoint"]
        return data_source(candidate.config, path, args.dataset, args.data_dir)
    source = {"name": args.dataset, "image_size": args.image_size, "data_dir": args.data_dir}
    return {name: value for name, value in source.items() if value is not None}


def main(args):
    tell = tqdm.write  # above a progress bar
    options = EvaluateOptions(**given(args, EvaluateOptions))
    subjects = parse_subjects(args)
    device = select_device(args.device)
    set_tf32(False)
    how = (partial(find_data, args), given(args, SamplerOptions), args.weights, device, loading_bar)
    candidates, dataset, source = load_candidates(subjects, *how)
    out = free_place(subjects, source["name"], args.out)
    lines = [line for candidate in candidates for line in candidate.about.get("summary", [])]
    models = [candidate.model for candidate in candidates if candidate.model]
    lines += choose_sampling_threads(next(iter(models), None), options.batch_size, args.threads)
    tell("\n".join(dataset.describe() + lines))
    metrics = parse_metrics(args.metrics, kinds_of(dataset), bool(models))
    options = options.resolve(dataset, candidates)
    progress = partial(tqdm, leave=False, disable=None)  # None: a bar in a terminal only
    reference = Reference(dataset, options, device, progress)
    what = (candidates, reference, metrics, options)
    if not is_main():
        evaluate(*what, by_default=args.metrics is None)
        return 0
    how = (shlex.join(["python", *sys.argv]), args.metrics is None, tell)
    with atomic_dir(out) as written:
        evaluation, stopped = measure_and_report(*what, written.folder, *how)
    page, numbers = (shown_path(written.path / f"evaluation.{kind}") for kind in ("html", "json"))
    line = f"{evaluation['seconds']:.0f} s, wrote {page}, {numbers} and the figures beside them"
    tell("\n".join(["", *wrapped(line)]))
    if stopped:
        raise stopped
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
