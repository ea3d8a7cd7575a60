"""Train a deep diffusion process: python train.py --epochs 100 --lr 0.001 --batch_size 128"""

import argparse
import math
import shlex
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
    config.add_flags(parser, config.Config)
    parser.add_argument(
        "--resume", metavar="PATH", help="a checkpoint or run to go on with, or auto"
    )
    parser.add_argument(
        *config.spellings("dry_run"), action="store_true", help="one step, and diagnostics"
    )
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    return vars(parser.parse_args(arguments))


class Stop:
    """Ctrl-C or SIGTERM asks the loop to stop after this step; a second one stops at once."""

    signal = None

    def __enter__(self):
        self.old = {n: signal.signal(n, self) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        tqdm.write("stopping after this step; again to stop at once", file=sys.stderr)


def main(given):
    resume, dry_run = given.pop("resume", None), given.pop("dry_run", False)
    profile = given.pop("profile", False)
    settings, source, state = run.settings(given, resume)
    where = device.pick_device(settings.device)
    device.pick_precision(settings.precision, where)  # refused before anything is downloaded
    dataset = data.load(**settings.data(), progress=tqdm)
    settings = settings.for_data(dataset)
    precision = device.pick_precision(settings.precision, where)
    device.use_tf32(precision != "fp32")
    folder = run.folder(settings, given, source, state)
    trainer = Trainer(settings, dataset, where, precision)
    if state:
        trainer.load(state)
    steps, minutes = settings.steps(len(dataset.train)), settings.max_minutes
    print(*dataset.describe(), trainer.describe(), sep="\n")
    length = f"{steps:,} steps" if steps else f"{minutes:g} minutes"
    print(f"run: {folder.resolve()}, step {trainer.step:,}, to run for {length}")
    if dry_run:
        print(*run.rehearse(trainer, folder), sep="\n")
    if profile:
        print(*run.profile(trainer), sep="\n")
    if dry_run or profile:
        return 0

    log = run.Run(folder, source, trainer.step)
    started = time.monotonic() - trainer.seconds

    def progress():
        """Two shares of the run that are done: one for the learning rate, which follows the steps
        where they are known, so that a resumed run is the same run; one that ends the run at 1."""
        trainer.seconds = time.monotonic() - started
        by_time = trainer.seconds / (60 * (minutes or math.inf))
        by_steps = trainer.step / steps if steps else 0.0
        return min(by_steps if steps else by_time, 1.0), max(by_steps, by_time)

    items = settings.batch_size * settings.grad_accumulation
    quiet = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(total=steps and steps * items, initial=trainer.step * items, unit="item",
               unit_scale=True, mininterval=quiet)  # fmt: skip
    saving, drawing = settings.save_every, settings.sample_every or settings.save_every
    share, now = progress()
    with bar, Stop() as stop:
        while now < 1 and not stop.signal:
            log.add(trainer.step + 1, *trainer.train_step(share))
            before, (share, now) = now, progress()
            if now >= 1 or due(saving, trainer.step, before, now):
                bar.write(log.save(trainer, settings.keep))
            if now >= 1 or due(drawing, trainer.step, before, now):
                bar.write(log.draw(trainer))
            left = "" if steps else f", {max(0, minutes - trainer.seconds / 60):.1f} min left"
            bar.set_postfix_str(f"loss {log.latest:.4f}{left}", refresh=False)
            bar.update(items)
        if now < 1:
            bar.write(f"stopped at step {trainer.step:,}, wrote {log.pause(trainer)}")
    if now < 1:
        print(f"go on with: python train.py --resume {shlex.quote(str(folder))}")
        return 128 + stop.signal
    print(log.finish(trainer))
    model = shlex.quote(str(folder / "model.pth"))
    print(f"draw samples with: python generate.py --checkpoint {model}")
    return 0


def due(every, step, before, now):
    """Whether something is to be done after this step: every so many, or each tenth of the run."""
    return step % every == 0 if every else int(10 * now) > int(10 * before)


def command(arguments=None):
    """Run the script -> its exit code, 2 for a wrong flag and 1 for a failed run."""
    given = parse(arguments)
    try:
        return main(given)
    except (Exception, KeyboardInterrupt) as error:
        code, line = config.verdict(error)
        print(f"train.py: {line}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(command())
