"""What each figure of evaluate.py says of real items with more and more noise on them.

python benchmarks/sensitivity.py [--dataset digits] [--noise 0 4 16 64]

Training items that the judge has not seen, plus Gaussian noise of some standard deviation in grey
values, stand in the place of samples. Without noise they are the
floor. Prints a table and writes it to JSON."""

import argparse
import json
import sys
from pathlib import Path

import torch
from script import exit_code
from tqdm import tqdm

from ddp import data, evaluation, features
from ddp.config import expect


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--samples", type=int, default=2000, help="at most as many as test items")
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 4, 16, 64])
    parser.add_argument("--out", default="sensitivity.json")
    args = parser.parse_args()
    expect(args, samples=evaluation.FEWEST)
    dataset = data.load(args.dataset, args.data_dir)
    if not dataset.is_image:
        parser.error(f"--dataset {args.dataset}: expected pictures")
    setting = evaluation.Setting(dataset, args.samples)
    judge, _ = features.judge_of(dataset, tqdm)
    extract = {"judge": lambda items: judge.of(items)[0], "pixels": features.pixel_features}
    generator, rows = torch.Generator().manual_seed(0), []
    noise = torch.randn(setting.floor.shape, generator=generator)
    for space, function in extract.items():
        measure, _ = evaluation.in_space(space, setting, function)
        for sd in args.noise:
            found = measure((setting.floor + sd * noise).clamp(0, 255).round().byte())
            rows.append({"space": space, "noise": sd, **evaluation.plain(found)})
            if sd == args.noise[0]:
                print(f"\n{space:<7}" + "".join(f"{name[:18]:>19}" for name in found))
            print(f"{sd:<7g}" + "".join(f"{e['samples'].value:19.4g}" for e in found.values()))
    Path(args.out).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code("sensitivity.py", main))
