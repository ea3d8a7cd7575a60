"""How fast the default sampler is by the form of the network, and how long the scripts take.

python benchmarks/sample_speed.py --checkpoint checkpoints/digits.pth [--compile]

Every form is compared with the network as it was trained, in fp32: the largest difference of its
estimates x0_hat, of noisy samples at some noise levels. Prints tables and writes them to JSON, with
a figure."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ceilings import about, seconds_of
from matplotlib.figure import Figure
from script import exit_code

from ddp import config, device, forward, reverse
from ddp.checkpoint import load_model

ROOT = Path(__file__).parent.parent
LOG_SNR = (-6.0, -2.0, 0.0, 2.0, 6.0)
COMPARED = 64  # samples
COMPILED = "folded, bf16, compiled"
WIDTH = 24  # of a table's first column


def forms(model, where, compiles):
    """(name, model, a context to use it in) of each form of the network."""
    half = torch.bfloat16
    autocast = torch.autocast(where.type, half)
    yield "as trained", model, contextlib.nullcontext()
    yield "bf16 autocast", model, autocast
    yield "folded", model.prepare_for_sampling(), contextlib.nullcontext()
    yield "folded, bf16", model.prepare_for_sampling(half), contextlib.nullcontext()
    if compiles:
        ready = model.prepare_for_sampling(half)
        # for each batch size anew, as code for known shapes is faster
        ready.network = torch.compile(ready.network, dynamic=False, fullgraph=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
            # what an earlier run compiled would hide what it costs
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            yield COMPILED, ready, contextlib.nullcontext()


def samples(model, count):
    indices = torch.arange(count)
    label = reverse.class_labels(model, indices)
    options = config.Sampling().options(model)
    return reverse.final(reverse.generate(model, indices, 0, label, **options)).cpu()


def speed(name, model, batch, where, repetitions):
    """A row: how fast one form of the network draws `batch` samples at a time."""
    started = time.perf_counter()
    try:
        samples(model, batch)
    except RuntimeError as error:
        if name != COMPILED:
            raise
        raise OSError(f"--compile: {str(error).splitlines()[0]}") from None
    first = time.perf_counter() - started
    seconds = seconds_of(lambda: samples(model, batch), where, repetitions=repetitions)
    row = {"form": name, "batch": batch, "samples_a_second": batch / seconds}
    return row | ({"compile_seconds": first - seconds} if name == COMPILED else {})


@torch.no_grad()
def estimates(model, x0):
    """x0_hat (levels, B, *event), of x0 with noise."""
    indices = torch.arange(len(x0), device=x0.device)
    label = reverse.class_labels(model, indices.cpu())
    eps = forward.normal(0, "test", 0, indices, model.event)
    # a level is expanded, as samplers do it
    levels = [torch.tensor(level, device=x0.device).expand(len(x0)) for level in LOG_SNR]
    return torch.stack([model.denoise(forward.diffuse(x0, v, eps), v, label) for v in levels])


def run_once(*command):
    """Seconds of a run of Python, from its start to its end."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return time.perf_counter() - started


def scripts(checkpoint, repetitions):
    """(command, median seconds) of what a user waits for."""
    with tempfile.TemporaryDirectory() as folder:
        for words in (
            ["generate.py", "--checkpoint", str(checkpoint.resolve()), "--num_samples", "64"],
            ["train.py", "--help"],
            ["-c", "import ddp.model"],
        ):
            spent = []
            for i in range(repetitions):
                out = ["--out", f"{folder}/{i}.png"] if words[0] == "generate.py" else []
                spent.append(run_once(*words, *out))
            yield " ".join(words), statistics.median(spent)


def draw(rows):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for form in dict.fromkeys(row["form"] for row in rows):
        line = {r["batch"]: r["samples_a_second"] for r in rows if r["form"] == form}
        axes.loglog(line.keys(), line.values(), "o-", label=form)
    axes.set(xlabel="samples at a time", ylabel="samples a second")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", default="sample_speed.json")
    args = parser.parse_args()
    config.expect(args, repetitions=1)
    if min(args.batches) < 1:
        parser.error("--batches: expected numbers above 0")
    where, out = device.pick_device(args.device), Path(args.out)
    device.use_tf32(False)  # as generate.py does
    model, _, _ = load_model(args.checkpoint, device=where)
    found, rows, errors, waits = about(where), [], [], []
    x0 = samples(model, COMPARED).to(where)
    exact = estimates(model, x0)
    print(f"\n{'samples a second':<{WIDTH}}" + "".join(f"{batch:10}" for batch in args.batches))
    for name, form, context in forms(model, where, args.compile):
        print(f"{name:<{WIDTH}}", end="", flush=True)
        with context:
            for batch in args.batches:
                rows.append(speed(name, form, batch, where, args.repetitions))
                print(f"{rows[-1]['samples_a_second']:10.1f}", end="", flush=True)
            difference = (estimates(form, x0) - exact).abs().flatten(1).amax(dim=1).tolist()
        errors.append({"form": name, "log_snr": LOG_SNR, "difference": difference})
        print()
    spent = [row["compile_seconds"] for row in rows if "compile_seconds" in row]
    if spent:
        print(f"{'seconds to compile':<{WIDTH}}" + "".join(f"{s:10.1f}" for s in spent))
    print(f"\n{'difference at log-SNR':<{WIDTH}}" + "".join(f"{level:10g}" for level in LOG_SNR))
    for row in errors:
        print(f"{row['form']:<{WIDTH}}" + "".join(f"{d:10.1e}" for d in row["difference"]))
    print()
    for command, seconds in scripts(Path(args.checkpoint), args.repetitions):
        waits.append({"command": command, "seconds": seconds})
        print(f"{seconds:6.2f} s  python {command}", flush=True)
    found |= {"rows": rows, "differences": errors, "waits": waits}
    out.write_text(json.dumps(found, indent=1))
    draw(rows).savefig(out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(exit_code("sample_speed.py", main))
