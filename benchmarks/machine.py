"""What a machine can do, and what DDP and a peer do on it, in one call.

python benchmarks/machine.py --data_dir PATH [--dataset cifar10] [--minutes 10] [--only diffusers]

One after the other: time_to_quality.py, sample_speed.py of the model that it trained,
train_speed.py and ceilings.py. Their tables, JSON and figures are written to OUT, and a summary."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from script import exit_code

QUICK = {  # to see that it runs
    "ceilings": "--sizes 16 --channels 8 --resolutions 4 --batch 2 --megabytes 1 --seconds 0.001",
    "train_speed": "--quick --width 8 --depth 1 --batch_size 16",
    "time_to_quality": "--samples 60",
    "sample_speed": "--batches 1 --repetitions 1",
}


def run(script, args, *flags):
    """Run a benchmark, which prints for itself -> what it wrote as JSON."""
    out = args.out / (script if script == "time_to_quality" else f"{script}.json")
    command = [sys.executable, Path(__file__).with_name(f"{script}.py"), "--out", out, *flags]
    command += QUICK[script].split() if args.quick else []
    print(f"\n== {script}.py", flush=True)
    if code := subprocess.run([str(word) for word in command]).returncode:
        sys.exit(code)  # it has said why
    return json.loads((out / f"{script}.json" if out.is_dir() else out).read_text())


def summary(ceilings, step, quality, sampling):
    """What the four found, as a dict of names and numbers."""
    rates = [rate for row in ceilings["rows"] for name, rate in row.items() if "bf16" in name]
    speed = step["step"]["flops"] / step["step"]["seconds"] / 1e9
    trained = {f"training, {r['who']}": r["pictures_per_second"] for r in quality["rows"]}
    drawn = {f"sampling, {r['who']}": 1 / r["seconds_per_sample"] for r in quality["rows"]}
    return {
        "highest rate in bf16, GFLOP/s": max(rates),
        "rate of a training step, GFLOP/s": speed,
        "its share of the highest": speed / max(rates),
        "memory of the GPU in training, MB": step.get("gpu_bytes", 0) / 1e6,
        "pictures a second in training": step["step"]["pictures_a_second"],
        "samples a second, at most": max(row["samples_a_second"] for row in sampling["rows"]),
        **{f"pictures a second in {name}": number for name, number in (trained | drawn).items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--minutes", type=float, default=10, help="of training, ours and a peer's")
    parser.add_argument("--only", nargs="*", default=["diffusers"], metavar="PEER")
    parser.add_argument("--bf16", action="store_true", help="autocast of the peers")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("machine"))
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists; choose another")
    data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
    minutes = ["--ours", args.minutes, "--minutes", args.minutes, "--at", args.minutes]
    peers = ["--only", *args.only, *["--bf16"] * args.bf16]
    # the longest first: it refuses wrong flags before it starts, and makes OUT
    quality = run("time_to_quality", args, *data, *minutes, *peers)
    model = args.out / "time_to_quality" / f"ours-{args.minutes:g}" / "model.pth"
    sampling = run("sample_speed", args, "--checkpoint", model)
    step = run("train_speed", args, *data)
    found = summary(run("ceilings", args), step, quality, sampling)
    (args.out / "summary.json").write_text(json.dumps(found, indent=1))
    print("\n== summary", *(f"{n:14,.2f}  {name}" for name, n in found.items()), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_code("machine.py", main))
