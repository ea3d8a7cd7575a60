"""Train a deep diffusion process: python train.py --epochs 100 --lr 0.001 --batch_size 128"""

import argparse
import sys
from pathlib import Path

from ddp.config import Config
from ddp.data import load_dataset
from ddp.distributed import main_first, on_main
from ddp.io import cli
from ddp.io.board import require_tensorboard
from ddp.io.checkpoint import units_of
from ddp.io.cli import add_flag
from ddp.io.config_file import read_config, write_config
from ddp.io.device import select_device, select_precision
from ddp.io.diagnostics import dry_run, profile
from ddp.io.files import command_line, shown_path
from ddp.io.memory import fit_shards
from ddp.io.progress import Progress, loading_bar, plan
from ddp.io.run_dir import accept_data, require_same_data, resolve_run
from ddp.io.run_lock import write_record
from ddp.io.run_writer import RunWriter, is_due
from ddp.io.setup import build_trainer, starting_weights
from ddp.io.terminal import GracefulStop


def parse(arguments=None):
    """Return the flags that were given; those of the hyper-parameters are made from Config."""
    parser = cli.make_parser(__doc__, argument_default=argparse.SUPPRESS)
    add_flag(parser, "resume", metavar="PATH", help="a checkpoint or run, or auto: the newest run")
    help = "a config.json of another run: its fields, unless a flag (no_SWITCH) says otherwise"
    add_flag(parser, "config", type=cli.path, metavar="FILE", help=help)
    help = "a checkpoint with whose weights a new run starts, to fine-tune them"
    add_flag(parser, "init_from", type=cli.path, metavar="PATH", help=help)
    add_flag(parser, "new_data", action="store_true", help="resume on data that changed since")
    group = parser.add_mutually_exclusive_group()
    add_flag(group, "dry_run", action="store_true", help="a few steps, then diagnostics")
    add_flag(group, "profile", action="store_true", help="show where the time of a step goes")
    cli.add_config_flags(parser, Config)
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    overrides = dict(vars(args))
    names = ("plugin", "resume", "config", "new_data", "dry_run", "profile")
    options = {name: overrides.pop(name, None) for name in names}
    new = options["resume"] and (options["config"] or overrides.get("init_from"))
    cli.reject_if((new, "resume: config and init_from are of new runs; leave them out"))
    overrides, given = read_config(options["config"], overrides, cli.PLUGINS)
    init_from = overrides.pop("init_from", None)
    config, folder, path, state = on_main(resolve_run, overrides, options["resume"])
    if state:
        newest = ", the newest" if options["resume"] == "auto" else ""
        print(f"resume: {path}, step {state['step']:,}{newest}")
    elif options["resume"]:
        print(f"nothing to resume in {shown_path(config.out_dir)}: a new run")
    device = select_device(config.device)
    select_precision(config.precision, device)  # refused before anything is downloaded
    require_tensorboard(config.tensorboard)
    with main_first():  # which downloads or decodes for all
        dataset = load_dataset(**config.data_options(), units=units_of(state), progress=loading_bar)
    print(*dataset.describe(), sep="\n")
    if state and options["new_data"]:
        accept_data(state, dataset)
    elif state:
        require_same_data(state, path, dataset)
    config = fit_shards(config.resolve(dataset), dataset, device, print)
    weights = starting_weights(init_from, config, dataset, print)
    if options["dry_run"] or options["profile"]:
        trainer = build_trainer(config, dataset, device, state, print, weights)
        for line in dry_run(trainer, folder) if options["dry_run"] else profile(trainer):
            print(line)
        return 0
    may_number = not (state or config.name)
    with RunWriter(folder, path, state["step"] if state else 0, may_number) as run:
        write_record(run.lock, config, dataset)
        trainer = build_trainer(config, dataset, device, state, print, weights)
        print(f"run: {shown_path(run.folder)}, {plan(trainer)}")
        on_main(write_config, run.folder, given, trainer.config, cli.PLUGINS)
        return train_loop(trainer, run)


def train_loop(trainer, run):
    """Train to the end of the run or to a signal, saving on the way -> exit code."""
    if trainer.step >= trainer.num_steps and run.exported_step() == trainer.step:
        print("it has ended; to go on, give a larger --epochs, --max_steps or --max_minutes")
        return 0
    finished = False
    config = trainer.config
    progress = Progress(trainer.step, trainer.num_steps)
    run.warn = progress.warn
    run.open_board(trainer)
    with progress, GracefulStop(progress.warn) as stop:
        for stats in trainer.run():
            finished = stats.progress >= 1
            run.log_step(stats)
            progress.update(trainer.step, stats.epoch, run.latest_loss)
            if finished or is_due(stats, config.save_every):
                progress.doing("testing, saving")
                progress.tell(run.save(trainer, config.keep_checkpoints, finished))
            if finished or is_due(stats, config.sample_every or config.save_every, 5):
                progress.doing("sampling")
                progress.tell(run.write_samples(trainer))
            if not finished and stop.came():
                break
        finished = finished or not stop.signal
        progress.tell(run.export(trainer) if finished else run.save_interrupted(trainer))
    if not finished:
        print("go on with:", command_line(__file__, "resume", run.folder))
        return 128 + stop.signal
    generate = Path(__file__).with_name("generate.py")
    print("draw samples with:", command_line(generate, "checkpoint", run.folder / "model.pth"))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
