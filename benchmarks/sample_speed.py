"""Speed of the default sampler by the form of the network, and how long the scripts take.

python benchmarks/sample_speed.py --checkpoint checkpoints/digits.pth [--compile]

Every form is compared with the network as it was trained, in fp32: the largest difference of its
x0_hat, of noisy samples at some noise levels. Prints tables and writes them to JSON, with a figure.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import ROOT, describe_machine, make_parser, seconds_per_call, write_json

from ddp.forward import q_sample
from ddp.io.checkpoint import load_model
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import select_device, set_tf32
from ddp.io.figures import chart
from ddp.options import SamplerOptions
from ddp.rng import normal
from ddp.sampling import cycle_labels, sample

LOG_SNR = (-6.0, -2.0, 0.0, 2.0, 6.0)
COMPARED = 64  # samples
COMPILED = "folded, bf16, compiled"
WIDTH = 24  # of a table's first column


def forms(model, device, with_compiled):
    """Yield (name, model, a context to use it in) of each form of the network."""
    plain = contextlib.nullcontext()
    yield "as trained", model, plain
    yield "bf16 autocast", model, torch.autocast(device.type, torch.bfloat16)
    yield "folded", model.for_inference(), plain
    yield "folded, bf16", model.for_inference(torch.bfloat16), plain
    if with_compiled:
        compiled = model.for_inference(torch.bfloat16)
        # for each batch size anew, as code for known shapes is faster
        compiled.network = torch.compile(compiled.network, dynamic=False, fullgraph=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
            # what an earlier run compiled would hide what it costs
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            yield COMPILED, compiled, plain


def generate(model, count):
    """Return samples (count, *event) of the default sampler, on the CPU."""
    indices = torch.arange(count)
    options = SamplerOptions().resolve(model)
    return sample(model, indices, 0, cycle_labels(model, indices), **options).cpu()


def measure(form, model, batch, device, repetitions):
    """Return a row: how fast one form of the network draws `batch` samples at a time."""
    started = time.perf_counter()
    try:
        generate(model, batch)
    except RuntimeError as error:
        if form != COMPILED:
            raise
        raise OSError(f"compile: {str(error).splitlines()[0]}") from None
    first = time.perf_counter() - started
    seconds = seconds_per_call(lambda: generate(model, batch), device, repetitions=repetitions)
    row = {"form": form, "batch": batch, "samples_per_second": batch / seconds}
    if form == COMPILED:
        row["compile_seconds"] = first - seconds
    return row


@torch.no_grad()
def denoise_levels(model, x0):
    """Return x0_hat, (levels, B, *event), of x0 with noise."""
    indices = torch.arange(len(x0), device=x0.device)
    label = cycle_labels(model, indices.cpu())
    eps = normal(0, "test_eps", 0, indices, model.event)
    estimates = []
    for level in LOG_SNR:
        log_snr = torch.tensor(level, device=x0.device)  # 0-d, as samplers pass it
        estimates.append(model.denoise(q_sample(x0, log_snr, eps), log_snr, label))
    return torch.stack(estimates)


def measure_form(form, model, args, x0, exact, device):
    """Return the rows of a form, one for each batch size, and its difference from `exact`."""
    rows = []
    print(f"{form:<{WIDTH}}", end="", flush=True)
    for batch in args.batches:
        rows.append(measure(form, model, batch, device, args.repetitions))
        print(f"{rows[-1]['samples_per_second']:10.1f}", end="", flush=True)
    print()
    difference = (denoise_levels(model, x0) - exact).abs().flatten(1).amax(dim=1)  # (levels,)
    return rows, {"form": form, "log_snr": LOG_SNR, "difference": difference.tolist()}


def run_python(*words):
    """Return the seconds of a run of Python, from its start to its end."""
    started = time.perf_counter()
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.splitlines() or ["failed"]
        raise OSError(f"{' '.join(words)}: {lines[-1]}")
    return time.perf_counter() - started


def script_times(checkpoint, repetitions):
    """Yield {"command", "seconds"}, the median, of what a user waits for."""
    path = str(Path(checkpoint).resolve())
    commands = (
        ["generate.py", "--checkpoint", path, "--num_samples", "64"],
        ["train.py", "--help"],
        ["-c", "import ddp.model"],
    )
    with tempfile.TemporaryDirectory() as folder:
        for words in commands:
            seconds = []
            for i in range(repetitions):
                out = ["--out", f"{folder}/{i}.png"] if words[0] == "generate.py" else []
                seconds.append(run_python(*words, *out))
            yield {"command": " ".join(words), "seconds": statistics.median(seconds)}


def plot(rows):
    """Return a Figure of the speed of each form against the number of samples at a time."""
    figure, axes = chart(4.5, xlabel="samples at a time", ylabel="samples per second")
    speeds = {}  # form -> batch -> samples per second
    for row in rows:
        speeds.setdefault(row["form"], {})[row["batch"]] = row["samples_per_second"]
    for form, line in speeds.items():
        axes.loglog(line.keys(), line.values(), "o-", label=form)
    axes.legend()
    return figure


def print_table(rows, differences):
    """Print what compiling took, and the differences of the forms."""
    compile_seconds = [row["compile_seconds"] for row in rows if row["form"] == COMPILED]
    if compile_seconds:
        cells = "".join(f"{seconds:10.1f}" for seconds in compile_seconds)
        print(f"{'seconds to compile':<{WIDTH}}{cells}")
    print(f"\n{'difference at log-SNR':<{WIDTH}}" + "".join(f"{level:10g}" for level in LOG_SNR))
    for row in differences:
        cells = "".join(f"{difference:10.1e}" for difference in row["difference"])
        print(f"{row['form']:<{WIDTH}}{cells}")
    print()


def parse(arguments=None):
    parser = make_parser(__doc__, "sample_speed.py")
    add_flag(parser, "checkpoint", required=True, help="a checkpoint that train.py wrote")
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    batches = "numbers of samples at a time"
    sizes = [1, 16, 64, 256, 1024]
    add_flag(parser, "batches", type=int, nargs="+", default=sizes, metavar="N", help=batches)
    add_flag(parser, "compile", action="store_true", help="also measure torch.compile")
    add_flag(parser, "repetitions", type=int, default=3, help="repetitions of each measurement")
    add_flag(parser, "out", default="sample_speed.json", help="file for the tables")
    return parser.parse_args(arguments)


def main(args):
    require_at_least(args, repetitions=1)
    if min(args.batches) < 1:
        raise ValueError(f"batches={min(args.batches)}: expected numbers above 0")
    device = select_device(args.device)
    set_tf32(False)  # as generate.py does
    model, _, _ = load_model(args.checkpoint, device=device)
    machine = describe_machine(device)
    x0 = generate(model, COMPARED).to(device)
    exact = denoise_levels(model, x0)
    rows = []
    differences = []
    titles = "".join(f"{batch:10}" for batch in args.batches)
    print(f"\n{'samples per second':<{WIDTH}}{titles}")
    for form, variant, context in forms(model, device, args.compile):
        with context:
            form_rows, difference = measure_form(form, variant, args, x0, exact, device)
        rows += form_rows
        differences.append(difference)
    print_table(rows, differences)
    waits = []
    for wait in script_times(args.checkpoint, args.repetitions):
        waits.append(wait)
        print(f"{wait['seconds']:6.2f} s  python {wait['command']}", flush=True)
    results = {"rows": rows, "differences": differences, "waits": waits}
    write_json(args.out, {**machine, **results})
    plot(rows).savefig(Path(args.out).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
