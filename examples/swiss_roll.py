"""Points in the plane: learn the Swiss roll, sample from it, and plot both in swiss_roll.png.

pip install -e . && python examples/swiss_roll.py        # half a minute on two CPU cores
"""

import sys

import torch

from ddp import Config, load_dataset, sample, train
from ddp.io.figures import scatter, to_pil

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1500


def report(trainer, stats):
    if stats.step % 100 == 0:
        print(f"step {stats.step}, loss {stats.loss.item():.3f}")


dataset = load_dataset("swiss_roll")  # dataset.train is (100000, 2), standardized
config = Config(dataset="swiss_roll", max_steps=STEPS)  # an MLP, v-prediction, cosine schedule
trainer = train(config, dataset, callback=report)
model = trainer.recalibrated_ema()  # EMA weights with BatchNorm statistics of their own
x0 = sample(model, torch.arange(5000), seed=0)  # (5000, 2); sample i is a function of (seed, i)
to_pil(scatter(x0, dataset.test[:5000])).save("swiss_roll.png")
