"""A sampler of one's own: one step, one line that registers it, and a comparison with DDIM.

pip install -e . && python examples/new_sampler.py
python generate.py --checkpoint checkpoints/digits.pth --plugin examples/new_sampler.py \
    --sampler midpoint
"""

import sys
from pathlib import Path

import torch

from ddp import SAMPLERS, sample
from ddp.io.checkpoint import load_model
from ddp.sampling import Sampler, ddim

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits.pth"


def midpoint(x0_hat, x_t, log_snr_t, log_snr_s, *, denoise, **_):
    """Take a step of DPM-Solver++(2S), two NFE: with x0_hat from halfway (Lu et al. 2022b)."""
    if log_snr_s.isinf() or log_snr_t.isinf():
        return ddim(x0_hat, x_t, log_snr_t, log_snr_s)
    halfway = (log_snr_t + log_snr_s) / 2
    x_halfway = ddim(x0_hat, x_t, log_snr_t, halfway)
    x0_hat = denoise(x_halfway, halfway.to(x_t))  # (B, *event)
    return ddim(x0_hat, x_t, log_snr_t, log_snr_s)


SAMPLERS["midpoint"] = Sampler(midpoint, steps=10, spacing="log_snr")  # as in the paper

if __name__ == "__main__":
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    model, _, _ = load_model(CHECKPOINT)
    indices = torch.arange(64)
    exact = sample(model, indices, sampler="ddim", steps=many)  # the ODE, all but solved
    for name, steps, nfe in (("ddim", 10, 10), ("ddim", 20, 20), ("midpoint", 10, 19)):
        x0 = sample(model, indices, sampler=name, steps=steps, spacing="log_snr")  # same noise
        rmse = (x0 - exact).square().mean().sqrt()
        print(f"{name:9} {nfe:3} NFE, root mean square error {rmse:.4f} of a range of 2")
