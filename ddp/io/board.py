"""TensorBoard's files of a run, by PyTorch's own writer, which needs the package tensorboard."""

import importlib.util

import numpy as np
from PIL import Image

from ddp.io.run_log import COLUMNS

FOLDER = "tensorboard"  # within the run's


def require_tensorboard(wanted):
    """Raise ValueError where TensorBoard is wanted and its package is not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard: the package is not installed; pip install tensorboard")


class Board:
    """A writer of scalars, grids of samples, the loss by noise level and histograms of weights."""

    def __init__(self, folder, step):
        from torch.utils.tensorboard import SummaryWriter  # here, since it may be absent

        purge_step = step + 1 if step else None  # what a run that goes on does again
        self.writer = SummaryWriter(folder / FOLDER, purge_step=purge_step)
        self.close = self.writer.close

    def add_rows(self, rows):
        """Add rows of log.csv, each a list in the order of COLUMNS."""
        for step, *values in rows:
            for name, value in zip(COLUMNS[1:], values, strict=True):
                if value is not None and value != "":
                    self.writer.add_scalar(name, float(value), int(step))

    def add_samples(self, trainer, path, levels):
        """Add the grid of samples in a PNG, the loss by noise level, and histograms of weights.

        levels: see run_page.loss_levels."""
        step = trainer.step
        with Image.open(path) as image:
            self.writer.add_image(
                "samples", np.asarray(image.convert("RGB")), step, dataformats="HWC"
            )
        for level, row in levels.items():
            self.writer.add_scalar(f"v loss by log-SNR/{level}", row["v"].value, step)
        for name, weight in trainer.ema.network.named_parameters():
            self.writer.add_histogram(name, weight.float().cpu(), step)
        self.writer.flush()
