"""Train a deep diffusion process: python train.py --epochs 100 --lr 0.001 --batch_size 128"""

import argparse
import shlex
import sys

from tqdm import tqdm

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io import cli
from ddp.io.checkpoint import restore
from ddp.io.cli import add_flag
from ddp.io.device import select_device, select_precision, set_tf32
from ddp.io.diagnostics import dry_run, profile
from ddp.io.run_dir import RunDir, resolve_run
from ddp.training import Trainer


def parse(arguments=None):
    """Return the flags that were given; those of the hyper-parameters are made from Config."""
    parser = cli.make_parser(__doc__, argument_default=argparse.SUPPRESS)
    add_flag(
        parser, "resume", metavar="PATH", help="a checkpoint or run, or auto: the last, if any"
    )
    add_flag(parser, "dry_run", action="store_true", help="one step, then diagnostics")
    add_flag(parser, "profile", action="store_true", help="show where the time of a step goes")
    cli.add_config_flags(parser, Config)
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    overrides = dict(vars(args))
    overrides.pop("plugin", None)
    resume = overrides.pop("resume", None)
    diagnostics = {name: overrides.pop(name, False) for name in ("dry_run", "profile")}
    config, folder, resume_path, checkpoint = resolve_run(overrides, resume)
    if resume == "auto" and not checkpoint:
        print("nothing to resume: a new run")
    device = select_device(config.device)
    select_precision(config.precision, device)  # refused before anything is downloaded
    dataset = load_dataset(**config.data_options(), progress=tqdm)
    config = config.resolve(dataset)
    precision = select_precision(config.precision, device)
    set_tf32(precision != "fp32")
    trainer = Trainer(config, dataset, device, precision)
    if checkpoint:
        restore(trainer, checkpoint)
    num_steps = config.num_steps(len(dataset.train))
    print(*dataset.describe(), sep="\n")
    print(f"network: {trainer.num_params:,} parameters on {device}, trained in {precision}")
    length = f"{num_steps:,} steps" if num_steps else f"{config.max_minutes:g} minutes"
    print(f"run: {folder.resolve()}, step {trainer.step:,}, to run for {length}")
    if diagnostics["dry_run"]:
        print(*dry_run(trainer, folder), sep="\n")
    if diagnostics["profile"]:
        print(*profile(trainer), sep="\n")
    if any(diagnostics.values()):
        return 0
    return train_loop(trainer, RunDir(folder, resume_path, trainer.step), num_steps)


def train_loop(trainer, run_dir, num_steps):
    """Train to the end of the run or to a signal, saving on the way -> exit code."""
    config = trainer.config
    items = config.batch_size * config.grad_accumulation  # of a step
    bar = tqdm(
        total=num_steps and num_steps * items,
        initial=trainer.step * items,
        unit="item",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    finished = False
    with bar, cli.GracefulStop(lambda line: tqdm.write(line, file=sys.stderr)) as stop:
        for stats in trainer.run():
            finished = stats.progress >= 1
            run_dir.log_step(stats)
            if finished or is_due(stats, config.save_every):
                bar.write(run_dir.save(trainer, config.keep_checkpoints))
            if finished or is_due(stats, config.sample_every or config.save_every):
                bar.write(run_dir.write_samples(trainer))
            bar.set_postfix_str(progress_text(trainer, run_dir, num_steps), refresh=False)
            bar.update(items)
            if stop.signal and not finished:
                break
        finished = finished or not stop.signal
        if not finished:
            path = run_dir.save_interrupted(trainer)
            bar.write(f"stopped at step {trainer.step:,}, wrote {path}")
    if not finished:
        print(f"go on with: python train.py --resume {shlex.quote(str(run_dir.folder))}")
        return 128 + stop.signal
    print(run_dir.export(trainer))
    model = shlex.quote(str(run_dir.folder / "model.pth"))
    print(f"draw samples with: python generate.py --checkpoint {model}")
    return 0


def is_due(stats, every):
    """Return whether something is to be done after this step.

    Every so many steps or, when that is None, at each tenth of the run."""
    if every:
        return stats.step % every == 0
    return int(10 * stats.progress) > int(10 * stats.previous_progress)


def progress_text(trainer, run_dir, num_steps):
    text = f"loss {run_dir.latest_loss:.4f}"
    if num_steps:
        return text
    minutes_left = max(0, trainer.config.max_minutes - trainer.seconds / 60)
    return f"{text}, {minutes_left:.1f} min left"


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
