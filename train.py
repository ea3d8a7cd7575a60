"""Train a deep diffusion process: python train.py --epochs 100 --lr 0.001 --batch_size 128"""

import argparse
import dataclasses
import math
import signal
import sys
import time

from tqdm import tqdm

from ddp import config, data, device, run
from ddp.training import Trainer


def parse(arguments=None):
    """The flags that were given, as a dict; those of the hyper-parameters are made from Config."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for field in dataclasses.fields(config.Config):
        parser.add_argument(*config.spellings(field.name), **config.argument(field))
    parser.add_argument(
        "--resume", metavar="PATH", help="a checkpoint or run to go on with, or auto"
    )
    parser.add_argument(*config.spellings("dry_run"), action="store_true", help="write nothing")
    return vars(parser.parse_args(arguments))


class Stop:
    """Ctrl-C or SIGTERM asks the loop to stop after the step at hand; a second one stops at
    once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        tqdm.write("stopping after this step; again to stop at once", file=sys.stderr)


def main(given):
    resume, dry_run = given.pop("resume", None), given.pop("dry_run", False)
    settings, source, state = run.settings(given, resume)
    where = device.pick_device(settings.device)
    precision = device.pick_precision(settings.precision, where)
    dataset = data.load(**settings.data(), progress=tqdm)
    settings = settings.for_data(dataset)
    folder = run.folder(settings, given, source, state)
    trainer = Trainer(settings, dataset, where, precision)
    if state:
        trainer.load(state)
    items, minutes = settings.batch_size * settings.grad_accumulation, settings.max_minutes
    steps = settings.steps(len(dataset.train))
    length = f"{steps:,} steps" if steps else f"{minutes:g} minutes"
    print(*dataset.describe(), trainer.describe(), sep="\n")
    print(
        f"run: {folder.resolve()}, {length}" + (f", on from step {trainer.step:,}" if state else "")
    )
    if dry_run:
        _, loss, _, _ = trainer.train_step(0.0)
        print(f"dry run: one step went well, loss {loss:.4f}; nothing was written")
        return 0

    log, stop = run.Run(folder, source, trainer.step), Stop()
    started = time.monotonic() - trainer.seconds

    def progress():
        """The share of the run that is done: of its steps, or of its minutes when they govern
        it."""
        trainer.seconds = time.monotonic() - started
        return trainer.step / steps if steps else min(1.0, trainer.seconds / (60 * minutes))

    now = progress()
    with tqdm(
        total=steps and steps * items,
        initial=trainer.step * items,
        unit="item",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:
        while now < 1 and not stop.signal and trainer.seconds < 60 * (minutes or math.inf):
            log.add(trainer.step + 1, *trainer.train_step(now))
            before, now = now, progress()
            last = now >= 1 or trainer.seconds >= 60 * (minutes or math.inf)
            if last or due(settings.save_every, trainer.step, before, now):
                bar.write(log.save(trainer, settings.keep))
            if last or due(settings.sample_every or settings.save_every, trainer.step, before, now):
                bar.write(log.draw(trainer))
            left = "" if steps else f", {max(0, minutes - trainer.seconds / 60):.1f} min left"
            bar.set_postfix_str(f"loss {log.latest:.4f}{left}", refresh=False)
            bar.update(items)
    if stop.signal:
        print(f"stopped at step {trainer.step:,}: {log.pause(trainer)}")
        print(f"go on with: python train.py --resume {folder}")
        return 128 + stop.signal
    print(
        log.finish(trainer),
        f"draw samples: python generate.py --checkpoint {folder / 'model.pth'}",
        sep="\n",
    )
    return 0


def due(every, step, before, now):
    """Whether something is to be done after this step: every so many, or each tenth of the run."""
    return step % every == 0 if every else int(10 * now) > int(10 * before)


if __name__ == "__main__":
    given = parse()
    try:
        sys.exit(main(given))
    except ValueError as error:  # what was asked for cannot be done
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, FloatingPointError) as error:  # it was tried and failed
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("train.py: stopped at once, nothing more was saved", file=sys.stderr)
        sys.exit(130)
