"""The gradient of a learned noise schedule. Kingma et al. 2021, section 5.1 and appendix I.2.

Let f = weight * loss be one item's estimate of the VLB's diffusion term, at a level log_snr(t).
What the schedule does between its end points cannot change the mean of f, only its variance: it is
trained to lower E[f^2], whose gradient is E[2 f grad f]. The end points do change the VLB: they
are trained on it, that is, on f and on the prior and reconstruction terms.
"""

import math

import torch

from ddp.loss import vlb_prior, vlb_reconstruction
from ddp.rng import normal

ENDPOINT_ITEMS = 64  # of a batch, for the prior and reconstruction terms


def bound_terms(
    schedule,  # a learned Schedule
    x0,  # (B, *event)
    eps,  # (B, *event), N(0, I)
    discrete,  # x0 is pixels of 256 values from -1 to 1, not a point with a density
):
    """Return the VLB's prior and reconstruction terms of each item, in nats a dimension, (B,).

    The mean of weight * loss estimates the diffusion term alone, which moving the ends can lower
    while the bound gets worse: these belong to it. The reconstruction is that of x_t / alpha, so it
    costs no NFE (Kingma et al. 2021). Infinite where the ends have crossed or are not finite."""
    clean = schedule.log_snr(0.0).to(x0)
    noisy = schedule.log_snr(1.0).to(x0)
    x0_hat = x0 + torch.exp(-0.5 * clean) * eps
    reconstruction = vlb_reconstruction(x0, x0_hat, clean.expand(len(x0)), discrete)  # float64
    nats = (reconstruction + vlb_prior(x0, noisy).to(reconstruction.device)) / x0[0].numel()
    return torch.where((clean > noisy).to(nats.device), nats, math.inf).to(x0)


def backward_through_schedule(
    trainer,  # a Trainer, after the network's backward pass
    k,  # the batch's number
    part,  # a slice: which of its items
    x0,  # (b, *event), those
    log_snr,  # (b,), a leaf: log_snr.grad is the scaled gradient of the mean of f
    loss,  # (b,), before its weight
):
    """Add the schedule's gradients to its parameters; return what an item's loss lacks, 0-d.

    That is the mean of `bound_terms`: with it the loss of the step is the whole bound."""
    config = trainer.config
    schedule = trainer.model.schedule
    scale = trainer.scaler.scale
    count = len(x0) * part.step  # items of the batch
    level, weight = trainer.draw_levels(k, count)  # the same once more, with their graph
    level, weight = level[part], weight[part]
    loss = loss.detach()
    grad_level = log_snr.grad  # of the mean of f
    grad_weight = scale(loss / (count * config.grad_accumulation))
    f = weight.detach() * loss
    between = [p for p in schedule.parameters() if p is not schedule.network.endpoints]
    torch.autograd.backward(
        [level, weight],
        [2 * f * grad_level, 2 * f * grad_weight],
        inputs=between,
        retain_graph=True,
    )
    x0 = x0[: max(1, ENDPOINT_ITEMS // part.step)]
    indices = torch.arange(count, device=x0.device)[part][: len(x0)]
    eps = normal(config.seed, "endpoint", k, indices, trainer.model.event)
    ends = bound_terms(schedule, x0, eps, trainer.dataset.is_pixels).mean()
    share = part.step * config.grad_accumulation  # the mean is over all parts and batches
    torch.autograd.backward(
        [level, weight, scale(ends / share)],
        [grad_level, grad_weight, None],
        inputs=[schedule.network.endpoints],
    )
    return ends.detach()
