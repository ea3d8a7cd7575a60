"""What each metric of evaluate.py says of real items with more and more noise on them.

python benchmarks/metric_sensitivity.py [--dataset digits] [--noise 0 4 16 64]

Training items that the classifier has not seen, plus Gaussian noise of some standard deviation in
gray values, stand in the place of samples. Without noise they are the real-vs-real baseline.
Prints a table for each feature space and writes them to JSON.
"""

import sys

import torch
from _common import make_parser, write_json
from tqdm import tqdm

from ddp.data import load_dataset
from ddp.io.cli import add_flag, command, require_at_least
from ddp.metrics.candidate import Candidate, EvaluateOptions, Reference
from ddp.metrics.distances import CLASS_MEASURES
from ddp.metrics.evaluate import MIN_ITEMS, to_json
from ddp.metrics.sample_metrics import feature_metrics

SPACES = ("classifier", "pixels")  # of FEATURES
SEED = 0  # of the noise


def measure(space, items, reference, options):
    """Return the distances of items, as if they were samples, in a feature space: a dict."""
    candidate = Candidate("noisy real items", {}, samples=items)
    results = feature_metrics(space, candidate, reference, options)
    return {name: results[name] for name in results if name not in {"counts", *CLASS_MEASURES}}


def parse(arguments=None):
    parser = make_parser(__doc__, "metric_sensitivity.py")
    add_flag(parser, "dataset", default="digits", help="a dataset of images (default: digits)")
    add_flag(parser, "data_dir", default="data", help="where datasets lie (default: data)")
    samples = "items with noise, at most as many as test items"
    add_flag(parser, "samples", type=int, default=2000, help=samples)
    noise = "standard deviations of the noise, in gray values"
    add_flag(parser, "noise", type=float, nargs="+", default=[0, 4, 16, 64], help=noise)
    add_flag(parser, "out", default="metric_sensitivity.json", help="file for the tables")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, samples=MIN_ITEMS)
    dataset = load_dataset(args.dataset, args.data_dir)
    if not dataset.is_image:
        raise ValueError(f"dataset={args.dataset}: expected images")
    options = EvaluateOptions(num_samples=args.samples).resolve(dataset, [])
    reference = Reference(dataset, options, progress=tqdm)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(reference.baseline.shape, generator=generator)  # (N, C, H, W)
    rows = []
    for space in SPACES:
        for std in args.noise:
            noisy = reference.baseline + std * noise
            results = measure(space, noisy.clamp(0, 255).round().byte(), reference, options)
            rows.append({"space": space, "noise": std, **to_json(results)})
            if std == args.noise[0]:
                print(f"\n{space:<10}" + "".join(f"{name[:18]:>19}" for name in results))
            values = [cells["samples"].value for cells in results.values()]
            print(f"{std:<10g}" + "".join(f"{value:19.4g}" for value in values))
    write_json(args.out, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
