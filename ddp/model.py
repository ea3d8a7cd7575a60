"""The two networks as one thing: what the reverse network's output means, as an estimate of the
data."""

import copy

import torch
from torch import nn

from ddp.forward import alpha_sigma
from ddp.network import Attention, Block, reverse_network
from ddp.schedule import Schedule

# predict -> (c_skip, c_out): x0_hat = c_skip xt + c_out F. Salimans & Ho 2022, section 4 and
# appendix D; `flow` is the velocity eps - x0 of rectified flow (Liu et al. 2022, eq. 1).
PREDICTIONS = {
    "x0": lambda alpha, sigma: (0.0, 1.0),
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "flow": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
}


class DiffusionModel(nn.Module):
    """A forward network (a schedule) and a reverse network, joined by `denoise`.

    `config` is a ddp.config.Config, `event` the shape of one item, `classes` the number of labels
    that the network is told of (0 when it is not conditional)."""

    def __init__(self, config, event, classes=0):
        super().__init__()
        self.event, self.classes, self.predict = tuple(event), classes, config.predict
        names = ("schedule", "timesteps", "shift", "zero_terminal_snr", "levels")
        self.schedule = Schedule(*(getattr(config, name) for name in names))
        # whether the network has learned to do without a label, too
        self.drops_label = bool(classes) and config.label_dropout > 0
        self.network = reverse_network(self.event, classes=classes, **config.network())

    @property
    def is_image(self):
        return len(self.event) == 3

    def denoise(self, xt, log_snr, label=None):
        """x0_hat (B, *event), the estimate of the data in xt (B, *event) at log_snr (B,)."""
        c_skip, c_out = PREDICTIONS[self.predict](*alpha_sigma(log_snr, xt))
        return c_skip * xt + c_out * self.network(xt, log_snr, label).to(xt.dtype)

    def prepare_for_sampling(self, dtype=torch.float32):
        """A copy in eval mode that denoises alike, and faster: each BatchNorm is folded into the
        layer beside it, and the weights are held in dtype, but those of the noise level.

        In float32 x0_hat differs by rounding, in bfloat16 by about a hundredth of the range."""
        ready = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(ready.network.modules()):
            if isinstance(module, (Block, Attention)):
                module.fold()
        for piece in ready.network.children():
            if piece is not ready.network.embedding:  # its frequencies would lose their digits
                piece.to(dtype)
        return ready
