"""Speed of training and sampling by threads and processes, on an idle machine and beside another.

python benchmarks/threads.py [--dataset mnist --data_dir PATH] [any other flag of train.py]

Each setting is a process of its own, or one for each core under torchrun. They take turns, round by
round, alone and beside --busy processes that only count. Beside the numbers of threads: how long a
thread spins while it waits, before it gives its core to others (libgomp's own choice is 300,000
turns). Prints a table of medians, and writes all speeds to JSON.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from _common import describe_machine, make_parser, write_json

from ddp.config import Config
from ddp.data import load_dataset
from ddp.distributed import broadcast, gather, is_main, world_size
from ddp.io.cli import add_config_flags, add_flag, add_plugin_flag, command, require_at_least
from ddp.io.device import sampling_dtype, select_precision
from ddp.training import Trainer

CPU = torch.device("cpu")
SAMPLES = 64  # at a time
COUNTER = ("-c", "while True: pass")  # Python's words for a process that keeps a core busy
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
CONDITIONS = ("idle", "busy")
WORKS = ("training", "sampling")
MORE_CORES = (8, 16, 64)  # than were measured
SPINS = ("GOMP_SPINCOUNT=300000", "GOMP_SPINCOUNT=5000", "GOMP_SPINCOUNT=1000")
SPINS += ("OMP_WAIT_POLICY=passive",)  # beside the default, which ddp/__init__.py sets


def settings(cores, variables):
    """Return name -> (variables of the environment, number of processes).

    variables: texts such as "NAME=VALUE", each of which makes a setting of all threads."""
    one = {"OMP_NUM_THREADS": "1"}
    every = {"OMP_NUM_THREADS": str(cores)}
    chosen = {f"{cores} threads": (every, 1), "1 thread": (one, 1)}
    for variable in variables:
        name, value = variable.split("=", 1)
        chosen[f"{cores} threads, {variable}"] = (every | {name: value}, 1)
    chosen[f"{cores} processes of 1 thread"] = (one, cores)
    return chosen


# ---- a process that does what it is told ----


def works_of(config):
    """Return what is timed, name -> (call, items that all processes compute in it)."""
    dataset = load_dataset(**config.data_options())
    trainer = Trainer(config, dataset, CPU, select_precision(config.precision, CPU))
    model = trainer.recalibrated_ema().for_inference(sampling_dtype(None, config.precision, CPU))
    x_t = torch.zeros(SAMPLES, *model.event)
    label = torch.zeros(SAMPLES, dtype=torch.long) if model.num_classes else None
    denoise = torch.inference_mode()(partial(model.denoise, x_t, torch.tensor(0.0), label))
    items = trainer.config.batch_size * trainer.config.grad_accumulation
    return {
        "training": (partial(trainer.train_step, 0.0), items),
        "sampling": (denoise, SAMPLES * world_size()),
    }


def serve(config):
    """Do what each line of the input says, such as "training 10"; print its items and seconds."""
    works = works_of(config)
    while words := broadcast(sys.stdin.readline().split() if is_main() else None):
        call, items = works[words[0]]
        calls = int(words[1])
        gather(None)  # all begin together
        started = time.perf_counter()
        for _ in range(calls):
            call()
        gather(None)  # and wait for the last
        print(items * calls, time.perf_counter() - started, flush=True)
    return 0


# ---- who tells it ----


class Worker:
    """A process, or several under torchrun, in one of the settings."""

    def __init__(self, variables, count, flags):
        words = [*TORCHRUN, str(count)] if count > 1 else []
        self.process = subprocess.Popen(
            [sys.executable, *words, __file__, *flags],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, work, calls):
        """Return the items and the seconds of so many calls of a work."""
        try:
            self.process.stdin.write(f"{work} {calls}\n")
            self.process.stdin.flush()
            items, seconds = self.process.stdout.readline().split()
        except (OSError, ValueError):
            raise OSError("a process of the benchmark has ended; it said why") from None
        return int(items), float(seconds)

    def speed(self, work, seconds):
        """Return the items a second of a work, in a time of about so many seconds."""
        _, once = self.run(work, 1)
        items, seconds = self.run(work, math.ceil(seconds / once))
        return items / seconds

    def close(self):
        self.process.stdin.close()  # the end of its input is the end of its work
        self.process.wait()


@contextlib.contextmanager
def counting(count):
    """Keep so many cores busy until the block ends, as other programs do."""
    others = [subprocess.Popen([sys.executable, *COUNTER]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(workers, args):
    """Yield a row for each speed, round by round."""
    for number in range(args.rounds):
        for condition in CONDITIONS:
            with counting(args.busy if condition == "busy" else 0):
                for work in WORKS:
                    for name, worker in workers.items():
                        speed = worker.speed(work, args.seconds)
                        row = {"round": number, "condition": condition, "work": work}
                        yield row | {"setting": name, "items_per_second": speed}


def summarize(rows):
    """Return a row for each setting: (work, condition) -> (items a second, ratio), medians.

    The ratio is to the first setting, idle, in the same round."""
    speeds = {}  # (setting, work, condition) -> a speed of each round
    for row in rows:
        key = row["setting"], row["work"], row["condition"]
        speeds.setdefault(key, []).append(row["items_per_second"])
    first = rows[0]["setting"]
    table = {}
    for (name, work, condition), values in speeds.items():
        baseline = speeds[first, work, "idle"]
        ratios = [value / base for value, base in zip(values, baseline, strict=True)]
        cell = statistics.median(values), statistics.median(ratios)
        table.setdefault(name, {})[work, condition] = cell
    return table


def print_table(table):
    """Print a table in Markdown."""
    columns = [(work, condition) for work in WORKS for condition in CONDITIONS]
    titles = " | ".join(f"{work}, {condition}" for work, condition in columns)
    print(f"\n| items a second | {titles} |\n|---|" + "---|" * len(columns))
    for name, cells in table.items():
        texts = [f"{cells[column][0]:.0f} ({cells[column][1]:.2f})" for column in columns]
        print(f"| {name} | {' | '.join(texts)} |")
    print("\nIn brackets: of the first setting, idle, in the same round. Medians over rounds.")


def print_serial_fraction(table, cores):
    """Print what Amdahl's law makes of one thread and all, idle: time = serial + parallel / n."""
    for work in WORKS:
        speedup = table[f"{cores} threads"][work, "idle"][0] / table["1 thread"][work, "idle"][0]
        serial = (cores / speedup - 1) / (cores - 1)  # of the time of one thread
        limits = [f"{n}: {1 / (serial + (1 - serial) / n):.1f}" for n in MORE_CORES]
        print(f"{work}: {serial:.0%} is serial; times one thread, by threads: {', '.join(limits)}")


def parse(arguments=None):
    parser = make_parser(__doc__, "threads.py", argument_default=argparse.SUPPRESS)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)  # the Config's fields
    add_flag(parser, "busy", type=int, default=1, help="processes that only count (default: 1)")
    env = "settings of all threads, each with one variable (default: how long they spin)"
    add_flag(parser, "env", nargs="*", default=SPINS, metavar="NAME=VALUE", help=env)
    add_flag(parser, "rounds", type=int, default=5, help="rounds of measurements (default: 5)")
    add_flag(parser, "seconds", type=float, default=1.0, help="of a measurement (default: 1)")
    add_flag(parser, "out", default="threads.json", help="file for the speeds")
    add_config_flags(parser, Config)
    add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    if args.worker:
        return serve(Config(**json.loads(args.worker)))
    require_at_least(args, busy=0, rounds=1)
    overrides = dict(vars(args))
    names = ("worker", "busy", "env", "rounds", "seconds", "out", "plugin")
    options = {name: overrides.pop(name, None) for name in names}
    Config(**overrides)  # refused here, not by each worker
    flags = ["--worker", json.dumps(overrides)]
    for path in options["plugin"] or ():
        flags += ["--plugin", path]
    machine = describe_machine(CPU)
    cores = os.cpu_count()
    rows = []
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (variables, count) in settings(cores, args.env).items():
            worker = Worker(variables, count, flags)
            workers[name] = stack.enter_context(contextlib.closing(worker))
        for row in measure(workers, args):
            rows.append(row)
            cells = "{round:3} {condition:5} {work:9} {items_per_second:9.1f}  {setting}"
            print(cells.format(**row), flush=True)
    table = summarize(rows)
    print_table(table)
    if cores > 1:
        print_serial_fraction(table, cores)
    write_json(args.out, {**machine, "busy": args.busy, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
