"""The variance of the VLB's estimate under each noise schedule, on one model.

python benchmarks/schedules.py --checkpoint checkpoints/learned/model.pth

The network is given the noise level only, so the diffusion term of its VLB can be estimated with
any schedule between the same two ends: the mean is one, the variance is not. Every fixed schedule
is measured twice: cut to the ends of the model's own, which another schedule did not choose, and on
its own ends, as it would be trained with. There the diffusion term is another one; the bound, with
the prior and reconstruction terms at those ends, is what to compare. Prints a table and writes it
to JSON.
"""

import math
import sys

import torch
from _common import make_parser, write_json

from ddp.data import load_dataset, to_float
from ddp.io.checkpoint import load_model
from ddp.io.cli import add_flag, command, require_at_least
from ddp.learned_schedule import bound_terms
from ddp.loss import vlb_diffusion
from ddp.metrics.likelihood import noise_and_denoise
from ddp.rng import normal, uniform
from ddp.schedule import Schedule

FIXED = ("linear", "cosine", "sigmoid", "karras", "flow")  # of SCHEDULES
MARGIN = 1e-12  # of time: fixed schedules are cut by the model's ends, not by their own
ITEMS = 2000  # test items
BISECTIONS = 60


class WideSchedule(Schedule):
    """A fixed schedule in continuous time, nearly to log_snr = +inf and -inf."""

    def __init__(self, name):
        super().__init__(name, timesteps=0)

    def log_snr(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.function(MARGIN + (1 - 2 * MARGIN) * t)


class EvenSchedule(Schedule):
    """A line in log_snr between the ends of another schedule."""

    def __init__(self, other):
        super().__init__("cosine", timesteps=0)
        self.clean = other.log_snr(0.0).item()
        self.noisy = other.log_snr(1.0).item()

    def log_snr(self, t):
        return self.clean + (self.noisy - self.clean) * torch.as_tensor(t, dtype=torch.float64)


def time_of(schedule, log_snr):
    """Return t at which the schedule reaches log_snr, by bisection."""
    low = 0.0
    high = 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if schedule.log_snr(middle) > log_snr:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def cut(schedule, model):
    """Return the times (first, last) at which the schedule is at the ends of the model's own.

    None when it does not reach them."""
    times = []
    for t in (0.0, 1.0):
        end = model.schedule.log_snr(t).item()
        times.append(time_of(schedule, end))
        if abs(schedule.log_snr(times[-1]).item() - end) > 1e-3:
            return None
    return times


def estimate_diffusion(model, schedule, times, x0, seed):
    """Return an estimate of each item's diffusion term, (B,), bits/dim, or nats for points."""
    first, last = times
    indices = torch.arange(len(x0))
    u = uniform(seed, "benchmark", 0, indices).double()  # (B,)
    t = first + (last - first) * u
    log_snr = schedule.log_snr(t).to(x0)  # (B,)
    eps = normal(seed, "vlb_eps", 0, indices, model.event)
    x0_hat = noise_and_denoise(model, x0, log_snr, eps)
    weight = (last - first) * schedule.neg_dlogsnr_dt(t).to(x0)  # log_snr passed in a unit of u
    return weight * vlb_diffusion(x0, x0_hat, log_snr) / nats_in_unit(model)


def nats_in_unit(model):
    """Return how many nats the unit of the table has: bits/dim, or nats for points."""
    return math.log(2) * math.prod(model.event) if model.is_image else 1.0


def measure(name, model, schedule, times, ends, x0, seeds):
    """Return one row of the table; `ends` is a schedule whose ends are those at `times`."""
    replicates = []
    terms = []
    for seed in range(seeds):
        replicates.append(estimate_diffusion(model, schedule, times, x0, seed))
        eps = normal(seed, "vlb_reconstruction", 0, torch.arange(len(x0)), model.event)
        terms.append(bound_terms(ends, x0, eps, model.is_image).mean())  # nats a dimension
    replicates = torch.stack(replicates).double()  # (seeds, B)
    others = torch.stack(terms).double().mean().item() * math.prod(model.event)
    return {
        "schedule": name,
        "mean": replicates.mean().item(),
        "se": replicates.mean(dim=1).std().item() / seeds**0.5,
        "variance": replicates.var(dim=0).mean().item(),
        "bound": replicates.mean().item() + others / nats_in_unit(model),
    }


def cases(model):
    """Yield (name, schedule, times, ends) of each row of the table, the model's first.

    times is None where a schedule does not reach the model's ends."""
    yield "the model's", model.schedule, (0.0, 1.0), model.schedule
    yield "even in log-SNR", EvenSchedule(model.schedule), (0.0, 1.0), model.schedule
    for name in FIXED:
        wide = WideSchedule(name)
        yield name, wide, cut(wide, model), model.schedule
    for name in FIXED:
        own = Schedule(name, timesteps=0)
        yield f"{name}, own ends", own, (0.0, 1.0), own


def parse(arguments=None):
    parser = make_parser(__doc__, "schedules.py")
    add_flag(parser, "checkpoint", required=True, help="a checkpoint of a run in continuous time")
    add_flag(parser, "seeds", type=int, default=20, help="estimates of each item")
    add_flag(parser, "out", default="schedules.json", help="file for the table")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(args):
    require_at_least(args, seeds=2)
    model, config, _ = load_model(args.checkpoint)
    if model.schedule.table is not None:
        raise ValueError(f"checkpoint={args.checkpoint}: expected one trained with timesteps=0")
    x0 = to_float(load_dataset(**config.data_options()).test[:ITEMS])
    rows = []
    titles = f"{'diffusion term':>22} {'bound':>9} {'variance':>10} {'to the model':>13}"
    print(f"{'schedule':<20} {titles}")
    for name, schedule, times, ends in cases(model):
        if times is None:
            print(f"{name:<20} does not reach the ends of the model's")
            continue
        row = measure(name, model, schedule, times, ends, x0, args.seeds)
        rows.append(row)
        ratio = row["variance"] / rows[0]["variance"]
        print(
            f"{name:<20} {row['mean']:12.4f} ± {row['se']:.4f} {row['bound']:9.4f} "
            f"{row['variance']:10.4f} {ratio:12.2f}x",
            flush=True,
        )
    write_json(args.out, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
