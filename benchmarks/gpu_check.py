"""Whether all of DDP works on a CUDA GPU, bit for bit where it must, and what a step takes there.

python benchmarks/gpu_check.py [--only NAME ...] [--batches 128 256 512] [--compile]

Each check is a line: what was found, or how it failed. Then comes the time of a step of the color
network of size l, by batch, in one order of sums and in any, eager and compiled. Prints tables and
writes them to JSON. `--tiny` takes a small network, also on a CPU: only to see that it runs.
"""

import gc
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from _common import describe_machine, make_parser, timed, write_json

from ddp.config import Config
from ddp.data import Dataset, load_dataset
from ddp.io.archive import content_digest
from ddp.io.checkpoint import checkpoint_state, read_checkpoint, restore, write_checkpoint
from ddp.io.cli import add_flag, command
from ddp.io.device import select_device, set_deterministic
from ddp.io.memory import fit_shards
from ddp.io.setup import build_trainer
from ddp.rng import normal, uniform
from ddp.sampling import SAMPLERS, sample

SMALL = {"channels_base": 16, "blocks_per_level": 1, "channel_mult": [1, 2], "batch_size": 32}
TINY = SMALL | {"channels_base": 8, "attention_resolutions": [16], "batch_size": 8}
STEPS = 5  # of a short training
TIMED_STEPS = 10
TOLERANCE = 1e-3  # of losses on the CPU and on the GPU, in float32, relative
ATTENTION = {"attention_resolutions": [16], "dropout": 0.1}
VARIANTS = {  # of a small network for images, each of them with other tensors that must travel
    "default": {},
    "classes, flip": {"class_cond": True, "augment": "flip"},
    "edm augmentation": {"augment": "edm"},
    "importance": {"noise_dist": "importance"},
    "learned schedule": {"schedule": "learned"},
    "continuous time, adamw": {"timesteps": 0, "optimizer": "adamw"},
    "attention, group norm": {"norm": "group", **ATTENTION},
    "no norm, silu": {"norm": "none", "activation": "silu"},
    "dropout, recomputed": {"dropout": 0.1, "checkpoint_activations": True},
    "accumulation": {"grad_accumulation": 2, "noise_copies": 2},
    "4 shards": {"shards": 4},
}
REPEATED = {  # trained twice; beside them the large network, whose kernels are others
    "dropout": SMALL | {"dropout": 0.1},
    "classes": SMALL | {"class_cond": True, "augment": "edm"},
    "fp32": SMALL | {"precision": "fp32"},
    "attention": SMALL | ATTENTION,
    "attention, fp32": SMALL | ATTENTION | {"precision": "fp32"},
}


class Bench:
    """What all checks share: the device, made-up images, and how large the network is."""

    def __init__(self, args):
        self.device = select_device(args.device)
        generator = torch.Generator().manual_seed(0)
        items = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.arange(256) % 10
        self.images = Dataset("images", items, items[:64], labels, labels[:64], list("0123456789"))
        self.large = {"size": "l"} | (TINY if args.tiny else {"batch_size": 256})

    def trainer(self, dataset, device=None, **fields):
        """Return a Trainer as train.py makes it."""
        fields = {"max_steps": 100, "warmup": 2} | fields
        config = Config(dataset=dataset.name, **fields).resolve(dataset)
        return build_trainer(config, dataset, device or self.device, None, lambda line: None)

    def train(self, dataset, steps=STEPS, **fields):
        """Return a Trainer after some steps, and their losses."""
        trainer = self.trainer(dataset, **fields)
        return trainer, take_steps(trainer, steps)


def take_steps(trainer, steps):
    """Train; return the losses. Raises FloatingPointError when one is not finite."""
    losses = torch.stack([trainer.train_step(0.5).loss for _ in range(steps)])
    if not losses.isfinite().all():
        raise FloatingPointError(f"losses {losses.tolist()}")
    return losses.tolist()


def digest(trainer):
    """Return the SHA-256 of all weights and moments."""
    state = trainer.state_dict()
    moments = [optimizer["state"] for optimizer in state["optimizer"]]
    return content_digest([state["ema"], state["model"], moments, state["noise_dist"]])


# ---- checks: (bench) -> what was found, a line; they raise what went wrong ----


def check_random_numbers(bench):
    """The keyed bits are the same on both devices, the normal numbers but for rounding."""
    indices = torch.arange(64)
    event = (3, 32, 32)
    u = uniform(0, "benchmark", 3, indices, event)
    assert torch.equal(u, uniform(0, "benchmark", 3, indices.to(bench.device), event).cpu()), "bits"
    eps = normal(0, "x_T", 3, indices, event)
    difference = (normal(0, "x_T", 3, indices.to(bench.device), event).cpu() - eps).abs()
    assert difference.max() < 1e-4, f"differ by {difference.max():g}"
    return f"uniform equal; normal differ by at most {difference.max():.2g}"


def check_datasets(bench):
    """Digits, points and the large color network train in every precision."""
    lines = []
    for precision in ("fp32", "bf16", "fp16") if bench.device.type == "cuda" else ("fp32", "bf16"):
        _, digits = bench.train(load_dataset("digits"), precision=precision)
        _, points = bench.train(load_dataset("moons"), precision=precision, batch_size=64)
        _, large = bench.train(bench.images, precision=precision, **bench.large)
        last = [f"{losses[-1]:.3f}" for losses in (digits, points, large)]
        lines.append(f"{precision} {' '.join(last)}")
    return "losses " + "; ".join(lines)


def check_variants(bench):
    """Every kind of option trains, recalibrates, validates, samples."""
    failed = []
    for name, fields in VARIANTS.items():
        try:
            trainer, _ = bench.train(bench.images, 2, **SMALL | fields)
            trainer.val_loss()
            model = trainer.recalibrated_ema().for_inference(torch.bfloat16)
            label = torch.zeros(4, dtype=torch.long, device=bench.device)
            sample(model, torch.arange(4), 0, label if model.num_classes else None, steps=2)
        except Exception as error:
            failed.append(f"{name}: {last_lines(error)}")
    assert not failed, "; ".join(failed)
    return f"{len(VARIANTS)} variants"


def check_samplers(bench):
    """Every sampler runs with guidance; a sample is nearly the same in a batch of 4 and of 64."""
    trainer, _ = bench.train(bench.images, 2, **SMALL, class_cond=True)
    model = trainer.recalibrated_ema().for_inference()
    label = torch.arange(64, device=bench.device) % 10
    guidance = {"cfg_scale": 2.0, "guidance_interval": (-5, 5), "guidance_rescale": 0.5}
    worst = 0.0
    for name in SAMPLERS:
        few = sample(model, torch.arange(4), 0, label[:4], sampler=name, steps=6, **guidance)
        many = sample(model, torch.arange(64), 0, label, sampler=name, steps=6, **guidance)
        worst = max(worst, (few - many[:4]).abs().max().item())
    assert worst < 0.01, f"4 against 64 at a time: {worst:g}"
    return f"{len(SAMPLERS)} samplers; 4 against 64 at a time: {worst:.2g}"


def check_bits(bench):
    """The same seed gives the same bits twice."""
    networks = REPEATED | {"size l": bench.large}
    for name, fields in networks.items():
        digests = [digest(bench.train(bench.images, **fields)[0]) for _ in range(2)]
        assert digests[0] == digests[1], f"{name}: other bits"
    return f"the same bits twice: {'; '.join(networks)}"


def check_resume(bench):
    """A run from a checkpoint ends with the bits of one that went on."""
    fields = SMALL | {"dropout": 0.1, "augment": "flip"}
    trainer, _ = bench.train(bench.images, **fields)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.pth")
        write_checkpoint(path, checkpoint_state(trainer))
        state = read_checkpoint(path)
    resumed = bench.trainer(bench.images, **fields)
    restore(resumed, state)
    for each in (trainer, resumed):
        take_steps(each, STEPS)
    assert digest(resumed) == digest(trainer), "a resumed run has other bits"
    return "the same bits"


def check_devices(bench):
    """The CPU and the GPU train alike, in float32."""
    fields = SMALL | {"precision": "fp32", "shards": 4}
    _, ours = bench.train(bench.images, **fields)
    _, theirs = bench.train(bench.images, device=torch.device("cpu"), **fields)
    difference = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    assert difference < TOLERANCE, f"losses {theirs} on the CPU, {ours}"
    return f"losses differ by at most {difference:.2g}, relatively"


def check_auto_shards(bench):
    """Shards are found for a batch that does not fit."""
    if bench.device.type != "cuda":
        return "needs a GPU"
    total = torch.cuda.get_device_properties(bench.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 4e9 / total))  # as if it had 4 GB
    try:
        config = Config(dataset="images", size="l", batch_size=512, shards=0, max_steps=2)
        config = fit_shards(config.resolve(bench.images), bench.images, bench.device, str)
        take_steps(build_trainer(config, bench.images, bench.device, None, str), 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return f"512 items in 4 GB: {config.shards} shards"


CHECKS = {
    "random numbers": check_random_numbers,
    "datasets": check_datasets,
    "variants": check_variants,
    "samplers": check_samplers,
    "CPU and GPU": check_devices,
    "bits": check_bits,
    "resume": check_resume,
    "auto shards": check_auto_shards,
}


def run_checks(bench, names):
    """Return a row for each check: its name, whether it went well, seconds and what was found."""
    rows = []
    for name in names:
        started = time.monotonic()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                ok, found = True, CHECKS[name](bench)
            except Exception as error:
                ok, found = False, last_lines(error)
        if any("determinis" in str(warning.message) for warning in told):
            found += "; PyTorch warns of kernels that add in any order"
        seconds = time.monotonic() - started
        rows.append({"check": name, "ok": ok, "seconds": seconds, "found": found})
        print(f"{'ok  ' if ok else 'FAIL'} {name:<16}{seconds:6.1f} s  {found}", flush=True)
    return rows


def last_lines(error):
    """Return the end of an error's traceback as one line."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({places})"


# ---- the time of a step, and the program ----


def step_row(bench, batch, name, fields):
    """Return the milliseconds of a step and the GPU's memory, a dict, and print them."""
    gc.collect()  # the Trainer before
    trainer = bench.trainer(bench.images, **bench.large | {"batch_size": batch} | fields)
    if name == "any order":
        set_deterministic(False, bench.device)
    step = partial(trainer.train_step, 0.5)
    row = {"name": name, "batch": batch, "first_seconds": timed(step, STEPS, bench.device)}
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    row["ms"] = 1e3 * timed(step, TIMED_STEPS, bench.device) / TIMED_STEPS
    row["gpu_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else 0
    numbers = f"{batch:6}{row['ms']:9.2f}{1e3 * batch / row['ms']:10,.0f}"
    print(f"{numbers}{row['gpu_bytes'] / 1e9:8.2f}{row['first_seconds']:8.1f}  {name}", flush=True)
    return row


def parse(arguments=None):
    parser = make_parser(__doc__, "gpu_check.py")
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda (default: auto)")
    add_flag(parser, "tiny", action="store_true", help="a small network, to see that it runs")
    names = "checks to make (default: all; without a name: none)"
    add_flag(parser, "only", nargs="*", choices=list(CHECKS), default=list(CHECKS), help=names)
    batches = {"default": [128, 256, 512], "help": "of which a step is timed (128 256 512)"}
    add_flag(parser, "batches", type=int, metavar="N", nargs="*", **batches)
    add_flag(parser, "compile", action="store_true", help="time the compiled network, too")
    add_flag(parser, "out", default="gpu_check.json", help="file for the tables")
    return parser.parse_args(arguments)


def main(args):
    bench = Bench(args)
    results = {"machine": describe_machine(bench.device), "steps": []}
    results["checks"] = run_checks(bench, args.only)
    write_json(args.out, results)
    kinds = {"one order": {}, "any order": {}}
    if args.compile:
        kinds["compiled"] = {"compile": True}
    if args.batches:
        print("\n batch       ms  images/s      GB first s")
    for batch in args.batches:
        for name, fields in kinds.items():
            results["steps"].append(step_row(bench, batch, name, fields))
            write_json(args.out, results)
    failed = [row["check"] for row in results["checks"] if not row["ok"]]
    print(f"\n{len(failed)} of {len(results['checks'])} checks failed: {', '.join(failed) or '-'}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
