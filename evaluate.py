"""Measure a model: python evaluate.py --checkpoint checkpoints/digits.pth"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from ddp import config, data, device, evaluation, output
from ddp.checkpoint import load_model, replace


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)

    def add(name, **kwargs):
        parser.add_argument(*config.spellings(name), dest=name, **kwargs)

    add("checkpoint", required=True, help="a checkpoint that train.py wrote")
    add("test_items", type=int, default=2000, help="measure on the first so many (default: 2000)")
    add("num_samples", type=int, default=2000, help="to judge; at most as many as test items")
    config.add_flags(parser, config.Sampling)
    add("draws", type=int, default=16, help="of the noise level for each item of the bound")
    add("seed", type=int, default=0, help="of noise and samples (default: 0)")
    add("out", help="folder for the results (default: a new one by the checkpoint)")
    add("data_dir", help="where the dataset lies, if it has moved")
    add("batch_size", type=int, default=250, help="items at a time")
    add("device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("weights", choices=("ema", "raw"), default="ema", help="averaged or raw (default: ema)")
    return parser.parse_args(arguments)


def main(args):
    config.expect(args, test_items=2, num_samples=2, draws=1, batch_size=1, seed=0)
    where = device.pick_device(args.device)
    sampling = config.sampling_of(args)
    model, settings, state = load_model(args.checkpoint, args.weights, where)
    guide = load_model(sampling.guide, "ema", where)[0] if sampling.guide else None
    options = sampling.options(model, guide)
    source = settings.data() | ({"data_dir": args.data_dir} if args.data_dir else {})
    dataset = data.load(**source, progress=tqdm)
    print(*dataset.describe(), sep="\n")
    same_labels = not model.classes or dataset.classes == state["classes"]
    if dataset.event != model.event or not same_labels or len(dataset.test) < 2:
        raise ValueError(
            f"the data, {dataset.event} of classes {dataset.classes}, is not what the model was "
            f"trained on, {model.event} of classes {state['classes']}, or has too few test items"
        )
    if dataset.fingerprint != state["provenance"].get("fingerprint"):
        print(
            "warning: this is not the data that the model was trained on; its test items may have "
            "been among the training items",
            file=sys.stderr,
        )

    def progress(name):
        return lambda parts: tqdm(parts, desc=name, leave=False, disable=None)

    count, size = min(args.test_items, len(dataset.test)), args.batch_size
    what = (dataset, model, count, size, args.seed)
    levels = evaluation.loss_by_level(*what, progress("loss"))
    bound = evaluation.bound(*what, args.draws, progress("bound"))
    number = min(args.num_samples, count)
    drawn = evaluation.samples(model, number, size, args.seed, options, progress("samples"))
    results = {
        "schema": evaluation.SCHEMA,
        "checkpoint": str(Path(args.checkpoint).resolve()),
        "step": state["step"],
        "provenance": state["provenance"],
        "fingerprint": dataset.fingerprint,
        "test_items": count,
        "recipe": {
            **options,
            "guide": sampling.guide,
            "weights": args.weights,
            "seed": args.seed,
            "draws": args.draws,
        },
        "loss_by_level": levels,
        "bound": bound,
        "quality": evaluation.distance(dataset, drawn),
    }
    print(*evaluation.table(results), sep="\n")
    checkpoint = Path(args.checkpoint)
    beside = checkpoint.with_name(f"{checkpoint.stem}-evaluation")
    out = (Path(args.out) if args.out else output.free_path(beside)).resolve()
    picture = evaluation.picture(results, drawn, dataset)
    text = json.dumps(results, indent=1, allow_nan=False)
    print(
        "\nwrote",
        replace(out / "evaluation.json", lambda path: path.write_text(text)),
        replace(out / "evaluation.png", picture.save),
        sep="\n  ",
    )
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
