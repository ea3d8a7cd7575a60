"""The variance of the bound's estimate under each noise schedule, on one model.

python benchmarks/schedules.py --checkpoint checkpoints/learned/model.pth

The model knows of the noise level only, so the diffusion term of its bound can be estimated with
any schedule between the same two ends: the mean is one, the variance is not. Every schedule is cut
to the ends of the model's own. Prints a table and writes it to JSON."""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from script import exit_code

from ddp import data, schedule
from ddp.checkpoint import load_model
from ddp.config import expect
from ddp.data import to_float
from ddp.forward import uniform
from ddp.likelihood import denoised, diffusion_rate
from ddp.schedule import Schedule


def time_of(schedule, log_snr):
    """t at which the schedule reaches log_snr, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if schedule.log_snr(middle) > log_snr else (low, middle)
    return (low + high) / 2


def estimates(model, schedule, x0, seed):
    """One estimate of the diffusion term of each item, bits/dim (nats for points), (B,); None when
    the schedule does not reach the model's ends."""
    ends = [model.schedule.log_snr(t).item() for t in (0.0, 1.0)]
    first, last = (time_of(schedule, end) for end in ends)
    reached = [schedule.log_snr(t).item() for t in (first, last)]
    if max(abs(a - b) for a, b in zip(ends, reached, strict=True)) > 1e-3:
        return None
    indices = torch.arange(len(x0))
    t = first + (last - first) * uniform(seed, "test", 1 << 21, indices).double()
    log_snr = schedule.log_snr(t).to(x0)
    x0_hat, _ = denoised(model, x0, log_snr, seed, 1 << 21, indices, None)
    unit = math.log(2) * x0[0].numel() if model.is_image else 1.0
    width = (last - first) * schedule.slope(t).to(x0)
    return width * diffusion_rate(x0, x0_hat, log_snr) / unit


class Line(Schedule):
    """Evenly in log_snr between the ends of another."""

    def __init__(self, other):
        super().__init__("cosine", 0)
        self.clean, self.noisy = (other.log_snr(t).item() for t in (0.0, 1.0))

    def log_snr(self, t):
        return self.clean + (self.noisy - self.clean) * torch.as_tensor(t, dtype=torch.float64)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="of a run in continuous time")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", default="schedules.json")
    args = parser.parse_args()
    expect(args, seeds=2)
    model, config, _ = load_model(args.checkpoint)
    x0 = to_float(data.load(**config.data()).test[:2000])
    # the fixed schedules are cut by the model's ends, not by their own
    schedule.TIME_MARGIN = 1e-12
    schedules = {"the model's": model.schedule, "even in log-SNR": Line(model.schedule)}
    for name in ("linear", "cosine", "sigmoid", "karras", "flow"):
        schedules[name] = Schedule(name, 0)
    rows = []
    print(f"{'schedule':<18} {'diffusion term':>22} {'variance':>10} {'to the model':>13}")
    for name, candidate in schedules.items():
        draws = [estimates(model, candidate, x0, seed) for seed in range(args.seeds)]
        if draws[0] is None:
            print(f"{name:<18} does not reach the ends of the model's")
            continue
        draws = torch.stack(draws).double()
        variance = draws.var(dim=0).mean().item()
        mean, error = draws.mean().item(), draws.mean(dim=1).std().item() / args.seeds**0.5
        rows.append({"schedule": name, "mean": mean, "se": error, "variance": variance})
        ratio = variance / rows[0]["variance"]
        print(f"{name:<18} {mean:12.4f} ± {error:.4f} {variance:10.4f} {ratio:12.2f}x", flush=True)
    Path(args.out).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code("schedules.py", main))
