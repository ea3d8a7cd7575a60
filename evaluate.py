"""Measure a model, or samples: python evaluate.py --checkpoint checkpoints/digits.pth"""

import argparse
import dataclasses
import hashlib
import json
import re
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ddp import config, data, device, editing, evaluation, output, report
from ddp.checkpoint import load_model

QUIET = 0.1 if sys.stderr.isatty() else 10


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)

    def add(name, to=parser, **kwargs):
        to.add_argument(*config.spellings(name), dest=name, **kwargs)

    what = parser.add_argument_group("what to measure").add_mutually_exclusive_group(required=True)
    add("checkpoint", what, metavar="PATH", help="a checkpoint that train.py wrote")
    add("samples", what, metavar="PATH", help="samples of --dataset: .npz, .npy, a folder, a .zip")
    add("compare", what, nargs="+", metavar="PATH", help="checkpoints or samples, side by side")
    add("metrics", help=f"some of {','.join(evaluation.METRICS)} (default: all but inception)")
    add("reference", choices=("test", "train"), default="test", help="real items (default: test)")
    add("test_items", type=int, default=2000, help="for the loss and the bound (default: 2000)")
    add("exact_items", type=int, help="for the exact likelihood (default: 128, of points 2000)")
    add("num_samples", type=int, default=2000, help="to judge; at most as many as real items")
    config.add_flags(parser, config.Sampling)
    add("draws", type=int, help="of the noise level for each item (default: 16, of points 64)")
    add("exact_draws", type=int, default=4, help="of dequantisation for each item")
    add("seed", type=int, default=0, help="of noise and samples (default: 0)")
    add("out", help="a new folder for the results (default: beside what is measured)")
    add("dataset", help="of --samples: a name, or a folder or .zip of pictures")
    add("image_size", type=config.image_size, help="of a --dataset of pictures: N, or HxW")
    add("data_dir", help="where the dataset lies, if it has moved")
    add("batch_size", type=int, default=250, help="items at a time")
    add("device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("weights", choices=("ema", "raw"), default="ema", help="averaged or raw (default: ema)")
    add("inception_weights", metavar="PATH", help="for inception (default: downloaded)")
    return parser.parse_args(arguments)


def progress(name):
    return lambda parts: tqdm(parts, desc=name, leave=False, mininterval=QUIET)


def subjects_of(paths, args, where):
    """(subjects, dataset): what lies at `paths`, and the data to judge it by."""
    sampling, subjects, dataset = config.sampling_of(args), [], None
    guide = load_model(sampling.guide, "ema", where)[0] if sampling.guide else None
    kinds = {path: Path(path).suffix == ".pth" or path == args.checkpoint for path in paths}
    drawing = ["weights"] * (args.weights == "raw") + [
        f.name for f in dataclasses.fields(config.Sampling) if getattr(args, f.name) is not None
    ]
    config.refuse(
        (any(kinds.values()) and args.dataset, "--dataset is for samples; a checkpoint knows its"),
        (not any(kinds.values()) and not args.dataset, "samples need a --dataset to be judged by"),
        (not any(kinds.values()) and drawing, f"--{', --'.join(drawing)}: for checkpoints only"),
    )
    ways = (Path(p).stem for p in paths), (Path(p).resolve().parent.name for p in paths), paths
    names = next(names for names in map(list, ways) if len(set(names)) == len(paths))
    loaded = {p: load_model(p, args.weights, where) for p in paths if kinds[p]}
    source = {"name": args.dataset, "image_size": args.image_size}
    if loaded:
        source = next(iter(loaded.values()))[1].data()
    source |= {"data_dir": args.data_dir} if args.data_dir else {}
    dataset = data.load(**source, progress=tqdm)
    print(*dataset.describe(), sep="\n")
    for name, path in zip(names, paths, strict=True):
        if path in loaded:
            model, settings, state = loaded[path]
            evaluation.check_fit(name, model, state, dataset)
            dtype = device.sampling_dtype(sampling.precision, settings.precision, where)
            options = sampling.options(model, guide and guide.prepare_for_sampling(dtype))
            fast = model.prepare_for_sampling(dtype)
            about = {"checkpoint": str(Path(path).resolve()), "sha256": digest(path),
                     "step": state["step"],
                     "weights": args.weights, **options, "guide": sampling.guide,
                     "precision": str(dtype).removeprefix("torch."),
                     "provenance": state["provenance"]}  # fmt: skip
            exact = model.prepare_for_sampling()
            subjects.append(evaluation.Subject(name, about, exact, fast, options))
        else:
            items, found = editing.load_samples(path, dataset.event)
            print(*found, sep="\n")
            about = {"samples": str(Path(path).resolve()), "count": len(items)}
            # pictures may have been resized to be judged: that goes with the figures
            about |= {"sha256": digest(path)} if Path(path).is_file() else {"found": found[:1]}
            subjects.append(evaluation.Subject(name, about, drawn=items))
    return subjects, dataset


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def main(args):
    config.expect(args, test_items=2, num_samples=2, exact_items=2, draws=1, exact_draws=1,
                  batch_size=1, seed=0)  # fmt: skip
    paths = args.compare or [args.checkpoint or args.samples]
    different = {Path(path).resolve() for path in paths}
    asks = "inception" in (args.metrics or "").split(",")
    config.refuse(
        (args.compare and len(different) < max(2, len(paths)), "--compare: give different paths"),
        (args.image_size and not args.dataset, "--image_size is for a --dataset of pictures"),
        (args.inception_weights and not asks, "--inception_weights is for --metrics inception"),
    )
    first = Path(paths[0])
    beside = first.with_name(f"{first.stem}-evaluation")
    out = output.free(Path(args.out)) if args.out else output.free_path(beside)
    started, where = time.monotonic(), device.pick_device(args.device)
    device.use_tf32(False)
    subjects, dataset = subjects_of(paths, args, where)
    metrics = evaluation.chosen(args.metrics, dataset.is_image, [s.model for s in subjects])
    with output.whole_folder(out) as folder:
        results, pictures = evaluation.evaluate(subjects, dataset, metrics, args, where, progress)
        results["recipe"]["command"] = shlex.join(["python", *sys.argv])
        results["seconds"] = time.monotonic() - started
        print(*report.text(results), sep="\n")
        page = report.page(results, [pictures[s.name] for s in subjects])
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1, allow_nan=False))
        (folder / "evaluation.html").write_text(page, encoding="utf-8")
        for i, subject in enumerate(subjects):
            whose = f"{i + 1}-{subject.name}-" if len(subjects) > 1 else ""
            for caption, picture in pictures[subject.name].items():
                file = re.sub(r"[^\w.-]+", "_", whose + caption.split(",")[0])
                picture.save(folder / f"{file}.png")
    print(f"\n{results['seconds']:.0f} s, wrote", *sorted(out.absolute().iterdir()), sep="\n  ")
    return 0


def command(arguments=None):
    """Run the script -> its exit code, 2 for a wrong flag and 1 for a failed run."""
    given = parse(arguments)
    try:
        return main(given)
    except (Exception, KeyboardInterrupt) as error:
        code, line = config.verdict(error)
        print(f"evaluate.py: {line}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(command())
