"""What a machine can do, and what DDP and a baseline do on it, in one call.

python benchmarks/all.py --data_dir PATH [--dataset cifar10] [--minutes 10] [--only diffusers]

One after the other: quality_vs_time.py, sample_speed.py of the model that it trained,
train_speed.py and roofline.py. Their tables, JSON and figures are written to OUT, and a summary.
"""

import json
import subprocess
import sys
from pathlib import Path

from _common import make_parser

from ddp.io.cli import add_flag, command

QUICK = {  # flags with which a benchmark measures little
    "roofline": "--sizes 16 --channels 8 --resolutions 4 --batch 2 --megabytes 1 --seconds 0.001",
    "train_speed": "--quick --channels_base 8 --blocks_per_level 1 --batch_size 16",
    "quality_vs_time": "--samples 60",
    "sample_speed": "--batches 1 --repetitions 1",
}


def run_benchmark(name, args, *flags):
    """Run a benchmark, which prints for itself, and return what it wrote as JSON."""
    out = args.out / f"{name}.json"
    result = out
    if name == "quality_vs_time":  # it writes a folder
        out = args.out / name
        result = out / f"{name}.json"
    words = [sys.executable, Path(__file__).with_name(f"{name}.py"), "--out", out, *flags]
    if args.quick:
        words += QUICK[name].split()
    print(f"\n== {name}.py", flush=True)
    code = subprocess.run([str(word) for word in words]).returncode
    if code:
        sys.exit(code)  # it has said why
    return json.loads(result.read_text())


def summary(roofline, training, quality, sampling):
    """Return what the four measured, as a dict of names and numbers."""
    peak = 0.0
    for row in roofline["rows"]:
        for name, rate in row.items():
            if "bf16" in name:
                peak = max(peak, rate)
    step = training["step"]
    speed = step["flops"] / step["seconds"] / 1e9
    numbers = {
        "highest rate in bf16, GFLOP/s": peak,
        "rate of a training step, GFLOP/s": speed,
        "its fraction of the highest": speed / peak,
        "memory of the GPU in training, MB": training.get("gpu_bytes", 0) / 1e6,
        "images per second in training": step["images_per_second"],
        "samples per second, at most": max(r["samples_per_second"] for r in sampling["rows"]),
    }
    for row in quality["rows"]:
        numbers[f"images per second in training, {row['who']}"] = row["images_per_second"]
    for row in quality["rows"]:
        who = "{who}, {sampler[name]}, {sampler[steps]} steps".format(**row)
        numbers[f"images per second in sampling, {who}"] = 1 / row["seconds_per_sample"]
    return numbers


def parse(arguments=None):
    parser = make_parser(__doc__, "all.py")
    add_flag(parser, "dataset", default="cifar10", help="a dataset by name (default: cifar10)")
    add_flag(parser, "data_dir", default="data", help="where datasets lie (default: data)")
    minutes = "minutes of training, of DDP and of each baseline (default: 10)"
    add_flag(parser, "minutes", type=float, default=10, help=minutes)
    only = "baselines to measure (default: diffusers; without a name: none)"
    add_flag(parser, "only", nargs="*", default=["diffusers"], metavar="BASELINE", help=only)
    quick = "measure little: only to see that it runs"
    add_flag(parser, "quick", action="store_true", help=quick)
    add_flag(parser, "out", type=Path, default=Path("machine"), help="a new folder for results")
    return parser.parse_args(arguments)


def main(args):
    if args.out.exists():
        raise ValueError(f"out={args.out} exists; choose another")
    data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    minutes = ["--ours", args.minutes, "--minutes", args.minutes, "--at", args.minutes]
    baselines = ["--only", *args.only]
    # the longest first: it refuses wrong flags before it starts, and makes OUT
    quality = run_benchmark("quality_vs_time", args, *data, *minutes, *baselines)
    model = args.out / "quality_vs_time" / f"ours-{args.minutes:g}-auto" / "model.pth"
    sampling = run_benchmark("sample_speed", args, "--checkpoint", model)
    training = run_benchmark("train_speed", args, *data)
    roofline = run_benchmark("roofline", args)
    numbers = summary(roofline, training, quality, sampling)
    (args.out / "summary.json").write_text(json.dumps(numbers, indent=1))
    print("\n== summary")
    for name, number in numbers.items():
        print(f"{number:14,.2f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
