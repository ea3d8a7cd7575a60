"""The two networks as one thing: the reverse network's output, read as an estimate of the data."""

import copy

import torch
from torch import nn

from ddp.augment import AUGMENTATIONS
from ddp.forward import SIGMA_DATA, alpha_sigma
from ddp.reverse import NETWORKS
from ddp.schedule import Schedule, lookup


def edm_coefficients(alpha, sigma):
    """Return c_skip and c_out of EDM's preconditioning (Karras et al. 2022, table 1)."""
    variance = (alpha * SIGMA_DATA) ** 2 + sigma**2  # of x_t
    return alpha * SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance.sqrt()


# What the network predicts: (alpha, sigma) -> c_skip, c_out of x0_hat = c_skip x_t + c_out F, where
# F is the network's output. Salimans & Ho 2022, section 4 and appendix D; `flow` is the velocity
# eps - x0 of rectified flow (Liu et al. 2022, eq. 1). `edm` has c_skip and c_out of Karras et al.
# 2022, table 1, of their x_t / alpha with noise sigma / alpha: x0 under much noise, while near the
# data x0_hat leans on x_t. With SIGMA_DATA = 1 it is v but for the sign of F. The network gets x_t
# and log_snr as always, not scaled by their c_in.
PREDICTIONS = {
    "x0": lambda alpha, sigma: (0.0, 1.0),
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "flow": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "edm": edm_coefficients,
}


class DiffusionModel(nn.Module):
    """A forward network (a noise schedule) and a reverse network, joined by `denoise`."""

    def __init__(
        self,
        schedule,  # a Schedule
        network,  # an nn.Module: (x_t, log_snr, label) -> like x_t; see reverse.NETWORKS
        prediction="v",  # a key of PREDICTIONS
        event=None,  # the shape of one item; default: the network's own
        num_classes=0,  # labels that the network is told; 0: unconditional
        has_null_label=False,  # trained with label dropout, so that CFG works
        units=None,  # the Units that its samples go back to; None: they are as the data
    ):
        super().__init__()
        if event is None:
            event = getattr(network, "event", None)
        if event is None:
            raise ValueError("event=None: the network has no attribute `event`; give the shape")
        lookup(PREDICTIONS, prediction, "prediction")  # raises when it is unknown
        self.event = tuple(event)
        if units is not None and len(units.mean) != self.event[0]:
            raise ValueError(f"units are of {len(units.mean)} channels, items of {self.event[0]}")
        self.units = units
        self.schedule = schedule
        self.network = network
        self.prediction = prediction
        self.num_classes = num_classes
        self.has_null_label = has_null_label

    def extra_repr(self):  # of repr(model), above its parts
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        count = sum(weight.numel() for weight in self.network.parameters())
        return f"{self.prediction}-prediction of items {self.event}{classes}, {count:,} weights"

    @property
    def is_image(self):
        return len(self.event) == 3

    @property
    def is_pixels(self):
        """Whether items are images of 256 values in [-1, 1]."""
        return self.is_image and self.units is None

    @property
    def device(self):
        return next(self.parameters()).device

    def denoise(
        self,
        x_t,  # (B, *event)
        log_snr,  # (), one level for all, or (B,)
        label=None,  # (B,), or None
        augment=None,  # (B, num_augment): how x0 was augmented; None: not at all
    ):
        """Return x0_hat, (B, *event): whatever is predicted becomes x0 here.

        In the dtype of x_t, whatever the network computes in. Of an eps-model the error of the
        output counts sigma / alpha times in x0_hat: in bfloat16 that is 0.1 at log_snr = -8."""
        alpha, sigma = alpha_sigma(log_snr, x_t)
        c_skip, c_out = PREDICTIONS[self.prediction](alpha, sigma)
        told = (label,) if augment is None else (label, augment)
        return c_skip * x_t + c_out * self.network(x_t, log_snr, *told).to(x_t.dtype)

    def for_inference(self, dtype=torch.float32):
        """Return a frozen copy in eval mode: BatchNorm fused into the layer beside it, and faster.

        Its weights are cast to dtype; the noise embedding stays float32. In float32 x0_hat differs
        by rounding, in bfloat16 by about 1% of the range. A network without `fold_for_inference`
        is copied as it is."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        if hasattr(model.network, "fold_for_inference"):
            model.network.fold_for_inference(dtype)
        return model


def build_model(config, event, num_classes=0, units=None):
    """Return the DiffusionModel of a Config for items of shape `event`."""
    schedule = Schedule(config.schedule, config.timesteps, config.shift, config.zero_terminal_snr)
    name = config.network or ("unet" if len(event) > 1 else "mlp")
    options = config.network_options()
    num_augment = AUGMENTATIONS[config.augment].num_params
    if num_augment:
        options["num_augment"] = num_augment
    network = NETWORKS[name](tuple(event), num_classes, **options)
    if getattr(network, "num_augment", 0) != num_augment:
        raise ValueError(f"augment={config.augment}: network={name} cannot be told; try flip")
    has_null_label = num_classes > 0 and config.label_dropout > 0
    about = (event, num_classes, has_null_label, units)
    return DiffusionModel(schedule, network, config.prediction or "v", *about)
