"""The data's own units, in which float data come and samples go back; the model sees mean 0, std 1.

Pixels have none: from 0 to 255 they are -1 to 1 to every model.
"""

import numpy as np
import torch


class Units:
    """A mean and a standard deviation of each channel, or of each dimension of points.

    Raises ValueError where they are none: not finite, or a standard deviation of 0."""

    def __init__(
        self,
        mean,  # (C,) float32
        std,  # (C,) float32
    ):
        alike = mean.ndim == 1 and mean.shape == std.shape and mean.isfinite().all()
        if not (alike and std.isfinite().all() and (std > 0).all()):
            raise ValueError("units: expected a finite mean and std > 0, (C,) each, in float32")
        self.mean = mean
        self.std = std

    def standardize(self, items):
        """Return items (B, C, ...) of the data, in any dtype, as x0 (B, C, ...) float32."""
        wide = items.double() if items.dtype == torch.float64 else items.float()  # copies neither
        mean, std = self.broadcast(wide)
        return ((wide - mean) / std).float()

    def restore(self, x0):
        """Return x0 (B, C, ...) as items in the units of the data, float32."""
        mean, std = self.broadcast(x0.float())
        return x0.float() * std + mean

    def broadcast(self, items):
        shape = (-1, *[1] * (items.ndim - 2))  # of the channels, along the other axes
        return self.mean.reshape(shape).to(items), self.std.reshape(shape).to(items)

    def state_dict(self):
        return {"mean": self.mean, "std": self.std}


class Moments:
    """Mean and standard deviation of numbers that come in pieces, in float64.

    Chan et al. 1979: neither many numbers nor a mean far from 0 cost digits."""

    def __init__(self):
        self.count = 0
        self.mean = 0.0  # (C,), as is the next
        self.squares = 0.0  # sum of (x - mean)^2

    def add(self, items):
        """Take in numbers, an array (B, C, ...) of NumPy."""
        if len(items) == 0:
            return
        axes = (0, *range(2, items.ndim))
        count = items.size // items.shape[1]  # of each channel
        mean = items.mean(axis=axes, dtype=np.float64)
        delta = mean - self.mean
        total = self.count + count
        with np.errstate(over="ignore"):  # then there are no Units
            centered = items - mean.reshape(-1, *[1] * (items.ndim - 2))  # float64
            self.squares += np.square(centered, out=centered).sum(axis=axes)
            self.squares += delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def units(self):
        """Return the Units of all that was added; a constant channel has the std 1.

        Raises ValueError for numbers beyond those of float32."""
        std = np.sqrt(self.squares / self.count)
        std = np.where(std > 1e-12 * np.abs(self.mean), std, 1.0)  # but for rounding, constant
        with np.errstate(over="ignore"):
            return Units(*(torch.from_numpy(part.astype(np.float32)) for part in (self.mean, std)))
