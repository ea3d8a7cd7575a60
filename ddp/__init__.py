"""DDP, a deep diffusion process: a forward network that adds noise, a reverse one that removes it.

The public names, in reading order. Those of files and figures are in ddp.io, those of evaluation in
ddp.metrics.
"""

__version__ = "0.9.0"

import os

# A thread that waits spins before it gives its core to others; libgomp's own 300,000 turns are a
# time slice (docs/performance.md). PyTorch's looks here when it is loaded; what is set stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from ddp.schedule import SCHEDULES, SPACINGS, Schedule
from ddp.noise_dist import NOISE_DISTS
from ddp.forward import q_posterior, q_sample, q_step
from ddp.reverse import NETWORKS, MLP, UNet
from ddp.model import PREDICTIONS, DiffusionModel, build_model
from ddp.loss import WEIGHTINGS, denoising_loss
from ddp.sampling import SAMPLERS, sample, sample_loop, sample_trajectory
from ddp.training import Trainer, train
from ddp.options import SamplerOptions
from ddp.presets import PRESETS
from ddp.config import Config
from ddp.data import DATASETS, Dataset, load_dataset
