"""A batch in parts: each is computed on its own, and what comes of them is summed as a tree.

A part has the same items, noise and BatchNorm statistics ("ghost batches"; Hoffer et al. 2017)
on whichever process it is computed, and the sums have one order (see distributed.py). So a run
has the same bits on one process and on many.
"""

import torch

from ddp.blocks import batch_norms
from ddp.distributed import TreeSum, my_parts, sum_over_parts, world_size


class PartSums:
    """The gradients, running statistics and losses of a step, summed over the parts of its batches.

    `losses`: (batches, B), the items' losses; who computes a part writes those of its items."""

    def __init__(
        self,
        model,  # an nn.Module in training
        config,  # a Config; p, p + shards, p + 2 shards, ... are the items of part p of a batch
    ):
        self.shards = config.shards
        self.reduce = config.reduce  # see distributed.sum_over_parts
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
        self.running = [x for norm in self.norms for x in (norm.running_mean, norm.running_var)]
        items = config.batch_size * config.noise_copies
        device = self.params[0].device
        self.losses = torch.zeros(config.grad_accumulation, items, device=device)
        self.is_alone = self.shards == 1 and world_size() == 1

    def parts(self):
        """Yield each part that this process computes, as a slice of the batch's items."""
        if self.is_alone:  # what backward and BatchNorm leave is the sum already
            yield slice(0, None, 1)
            return
        self.tree = TreeSum()
        before = [x.clone() for x in self.running]
        counts = [norm.num_batches_tracked.clone() for norm in self.norms]
        for part in my_parts(self.shards):
            self.losses.zero_()
            yield slice(part, None, self.shards)
            self.tree.add(part, 1, self.take_vector())
            for x, old in zip(self.running, before, strict=True):
                x.copy_(old)  # every part goes on from the same statistics
        for norm, count in zip(self.norms, counts, strict=True):
            norm.num_batches_tracked.copy_(count + len(self.losses))

    @torch.no_grad()
    def take_vector(self):
        """Return all that a part came to as one vector (P,), and clear the gradients."""
        tensors = []
        for param in self.params:
            tensors.append(torch.zeros_like(param) if param.grad is None else param.grad)
            param.grad = None
        return torch.cat([x.reshape(-1) for x in (*tensors, *self.running, self.losses)])

    @torch.no_grad()
    def total(self):
        """Sum over all parts: gradients into param.grad, running statistics as their mean.

        Returns the losses of all items, (batches, B)."""
        if self.is_alone:
            return self.losses
        targets = [torch.empty_like(param) for param in self.params]  # in its order in memory
        filled = (*targets, *self.running, self.losses)
        sizes = [x.numel() for x in filled]
        device = self.losses.device
        vector = sum_over_parts(self.tree, self.shards, sum(sizes), device, self.reduce)
        for x, values in zip(filled, vector.split(sizes), strict=True):
            x.copy_(values.view(x.shape))
        for x in self.running:
            x.div_(self.shards)  # exact: a power of two
        for param, gradient in zip(self.params, targets, strict=True):
            param.grad = gradient
        return self.losses
