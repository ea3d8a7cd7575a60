"""How far a run is: a bar where stderr is a terminal, else a plain line now and then."""

import sys
import time
from functools import partial

from tqdm import tqdm

loading_bar = partial(tqdm, disable=None)  # of data; None: only where stderr is a terminal
FIRST_WAIT, LONGEST_WAIT = 2, 60  # seconds to the next line, twice as many after each


class Pace:
    """Says where no bar is shown, in a file or a notebook, when a line is due: after 2 s, 4 s, ...
    and then every minute."""

    def __init__(self, start=0):
        self.start = start  # what was done before
        self.started = time.monotonic()
        self.wait = FIRST_WAIT
        self.due = self.started + self.wait

    def time_left(self, done, total):
        """Return how long the rest will take, as text; None while no line is due."""
        now = time.monotonic()
        if now < self.due or done >= total:
            return None
        self.wait = min(2 * self.wait, LONGEST_WAIT)
        self.due = now + self.wait
        left = (now - self.started) / (done - self.start) * (total - done)  # seconds
        return f"about {left / 60:,.0f} min left" if left > 90 else f"about {left:.0f} s left"


class Progress:
    """A context manager that shows a run's progress on stderr, and lines of text above it."""

    def __init__(
        self,
        step,  # at which the run goes on
        num_steps,  # of the whole run
    ):
        self.num_steps = num_steps
        self.pace = Pace(step)
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,  # a terminal may become narrower
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def tell(self, line):
        """Write a line to stdout."""
        tqdm.write(line)

    def warn(self, line):
        """Write a line to stderr."""
        tqdm.write(line, file=sys.stderr)

    def doing(self, what):
        """Show what goes on between two steps, such as "saving"."""
        self.bar.set_description_str(what)

    def update(self, step, epoch, loss):
        """Show that a step is done, and the loss of one that was looked at."""
        if not self.bar.disable:
            self.bar.set_description_str(f"epoch {epoch:.1f}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self.bar.update()
            return
        left = self.pace.time_left(step, self.num_steps)
        if left:
            self.warn(f"step {step:,} of {self.num_steps:,}, loss {loss:.4f}, {left}")


def plan(trainer):
    """Fix how many steps a Trainer's run has -> a text that says so, and of what it was made."""
    is_known = trainer.num_steps is not None
    trainer.plan_steps()
    text = f"step {trainer.step:,} of {trainer.num_steps:,}"
    if is_known:
        return text
    config = trainer.config
    seconds = 60 * config.max_minutes - trainer.seconds
    milliseconds = 1e3 * seconds / max(1, trainer.num_steps - trainer.step)
    length = f"{config.max_minutes:g} minutes at {milliseconds:,.1f} ms a step"
    return f"{text}, planned from {length}; it may end a little early or late"
