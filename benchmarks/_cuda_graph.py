"""Many training steps of a small network on a CUDA GPU, as one CUDA graph that is replayed.

The kernels of a small network end before the next is launched, so a step takes as long as its
launches: of digits 19 ms, and 2 ms as a graph. The step is that of ddp.training.Trainer, but for
its noise, which is PyTorch's instead of keyed: a run is another draw of the same distribution.
"""

import math

import torch
from torch import nn

from ddp.data import permutation, to_float
from ddp.forward import q_sample
from ddp.loss import denoising_loss
from ddp.optim import Muon, as_matrix, ema_decay, orthogonalize

WARMUP_STEPS = 3  # before a capture; they are undone


def can_graph(trainer):
    """Return whether GraphSteps can take the steps of a Trainer."""
    config = trainer.config
    plain = not config.class_cond and config.augment == "none" and config.schedule != "learned"
    return trainer.device.type == "cuda" and plain and trainer.sums.is_alone


class GraphSteps:
    """The training steps of a Trainer on a CUDA GPU; can_graph says which have a graph."""

    def __init__(self, trainer, steps):
        self.trainer = trainer
        config = trainer.config
        items = config.batch_size * steps
        count = len(trainer.dataset.train)
        epochs = range(math.ceil(items / count))
        order = torch.cat([permutation(config.seed, epoch, count) for epoch in epochs])[:items]
        batch = config.batch_size * config.noise_copies  # B
        levels = [trainer.draw_levels(k, batch) for k in range(steps)]
        log_snr, weight = zip(*levels, strict=True)
        lr = []
        for k in range(steps):
            trainer.step = k
            lr.append(trainer.set_lr(k / steps))
        trainer.step = 0
        decay = [ema_decay(config.ema_decay, k + 1) for k in range(steps)]
        self.items = trainer.dataset.train.to(trainer.device)
        self.tables = {  # what a step takes, a row each
            "order": order.view(steps, -1),  # (steps, batch_size)
            "log_snr": torch.stack(log_snr).detach(),  # (steps, B)
            "weight": torch.stack(weight).detach(),
            "lr": torch.tensor(lr),  # (steps,)
            "decay": torch.tensor(decay),
            "loss": torch.zeros(steps),  # written by each step
        }
        self.tables = {name: table.to(trainer.device) for name, table in self.tables.items()}
        self.row = torch.zeros(1, dtype=torch.long, device=trainer.device)  # the step to be taken
        self.params = list(trainer.model.network.parameters())
        self.build_optimizers()
        self.graph = self.capture()

    def build_optimizers(self):
        """Make those of the Trainer anew, with a learning rate that a graph can read."""
        self.lr = torch.zeros((), device=self.row.device)  # of AdamW
        self.muon = []
        scales = list(self.trainer.lr_scales)
        for optimizer in self.trainer.optimizers:
            scale = scales.pop(0)
            (group,) = optimizer.param_groups
            if isinstance(optimizer, Muon):
                self.muon = group["params"]
                self.muon_lr = scale
                self.momentum = group["momentum"]
            else:
                options = {name: group[name] for name in ("betas", "weight_decay")}
                on_gpu = self.lr.is_cuda  # else it is tested
                options |= {"lr": self.lr, "fused": True, "capturable": on_gpu}
                self.adamw_lr = scale
                self.adamw = torch.optim.AdamW(group["params"], **options)
        self.buffers = [torch.zeros_like(as_matrix(weight)) for weight in self.muon]

    def now(self, name):
        """Return the step's row of a table."""
        return self.tables[name].index_select(0, self.row)[0]

    def step(self):
        """Take a training step, without a number that the CPU knows."""
        trainer = self.trainer
        config = trainer.config
        x0 = to_float(self.items.index_select(0, self.now("order")))
        x0 = x0.repeat(config.noise_copies, *[1] * (x0.ndim - 1))
        log_snr = self.now("log_snr")
        x_t = q_sample(x0, log_snr, torch.randn_like(x0))
        dtype = torch.bfloat16 if trainer.precision == "bf16" else None
        kind = trainer.device.type
        with torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False):
            x0_hat = trainer.model.denoise(x_t, log_snr)
        loss = denoising_loss(x0_hat, x0, log_snr, config.weighting, config.loss)
        loss = (self.now("weight") * loss).mean()
        for param in self.params:
            param.grad = None
        loss.backward()
        with torch.no_grad():
            grads = [param.grad for param in self.params if param.grad is not None]
            if config.grad_clip:
                norm = nn.utils.get_total_norm(grads)
                nn.utils.clip_grads_with_norm_(self.params, config.grad_clip, norm)
            lr = self.now("lr")
            self.lr.copy_(lr * self.adamw_lr)
            self.adamw.step()
            if self.muon:
                self.muon_step(lr * self.muon_lr)
            ema = list(trainer.ema.network.parameters())
            change = torch._foreach_sub(self.params, ema)
            torch._foreach_mul_(change, 1 - self.now("decay"))
            torch._foreach_add_(ema, change)
            self.tables["loss"].index_copy_(0, self.row, loss.detach().float().view(1))
            self.row += 1

    def muon_step(self, lr):
        """Take the step of optim.Muon, whose rate is a tensor."""
        by_shape = {}
        for weight, buffer in zip(self.muon, self.buffers, strict=True):
            matrix = as_matrix(weight)
            by_shape.setdefault(matrix.shape, []).append((matrix, as_matrix(weight.grad), buffer))
        for (rows, columns), same_shape in by_shape.items():
            matrices, gradients, buffers = map(list, zip(*same_shape, strict=True))
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            nesterov = torch._foreach_lerp(gradients, buffers, self.momentum)
            updates = list(orthogonalize(torch.stack(nesterov)).unbind())
            torch._foreach_mul_(updates, -lr * math.sqrt(max(1, rows / columns)))
            torch._foreach_add_(matrices, updates)

    def state(self):
        """Return every tensor that a step changes, but the moments."""
        networks = (self.trainer.model.network, self.trainer.ema.network)
        return [x for network in networks for x in (*network.parameters(), *network.buffers())]

    def capture(self):
        """Return a step as a CUDA graph; what the steps before it changed is undone."""
        self.trainer.model.train()
        before = [x.detach().clone() for x in self.state()]
        torch.manual_seed(self.trainer.config.seed)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        with torch.no_grad():
            for x, old in zip(self.state(), before, strict=True):
                x.copy_(old)
            moments = [x for state in self.adamw.state.values() for x in state.values()]
            for x in (*self.buffers, *moments, self.row):
                x.zero_()
        return graph

    def take(self):
        """Take a training step; return its loss, 0-d, for which nobody has waited yet."""
        self.graph.replay()
        self.trainer.step += 1
        return self.tables["loss"][self.trainer.step - 1]
