"""The EMA model made ready, its loss on items that no gradient sees, and what a lost run is."""

import math

import torch

from ddp.blocks import batch_norms
from ddp.distributed import in_order
from ddp.forward import alpha_sigma
from ddp.model import PREDICTIONS

VAL_ITEMS, VAL_BATCH = 2000, 500
BN_BATCHES = 8  # to recompute BatchNorm's statistics
BN_BATCH_IMAGES, BN_BATCH_POINTS = 512, 8192  # an image has many positions, a point one
BATCH_POSITIONS = 64 * 64  # of an image for which batches are as large as asked for
FAR_BOUND = 5.0  # nats a dimension
LEAST_BOUND = -10.0  # nats a dimension of points, to which a learned schedule's ends hold the VLB


def fitting_batch(event, size):
    """Return `size`, or less for images of more than 64x64 pixels: as many numbers as of those."""
    positions = math.prod(event[1:])  # 1 for points
    return max(1, min(size, size * BATCH_POSITIONS // positions))


@torch.no_grad()
def recalibrate(trainer):
    """Recompute BatchNorm's statistics of the EMA model under its own weights.

    Batches are noised as in training, dropout is off, and the statistics are means over all
    batches: a function of the weights and the seed alone."""

    def show(k):
        x0, label = statistics_batch(trainer, k)
        augmented, told = trainer.augmented(k, x0)
        trainer.ema_loss(augmented if told is None else x0, label, k, "bn")

    set_statistics(trainer.ema, show, BN_BATCHES)


def statistics_batch(trainer, k):
    """Return x0 and label of batch k of those by which statistics are measured."""
    size = BN_BATCH_IMAGES if len(trainer.dataset.event) > 1 else BN_BATCH_POINTS
    return trainer.training_batch(k, fitting_batch(trainer.dataset.event, size))


@torch.no_grad()
def set_statistics(
    model,
    show,  # (k): runs the model on batch k
    batches,
):
    """Set the running statistics of a model's BatchNorms to the means over so many batches."""
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # running statistics that were reset become those of the batch
        norm.train()

    def statistics(k):
        for norm in norms:
            norm.reset_running_stats()
        show(k)
        pairs = [torch.stack([norm.running_mean, norm.running_var]) for norm in norms]
        return [pair.cpu() for pair in pairs]  # (2, channels) each

    of_batches = list(in_order(statistics, range(batches if norms else 0)))
    for i, norm in enumerate(norms):
        mean, var = torch.stack([of_norms[i] for of_norms in of_batches]).mean(dim=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.num_batches_tracked.fill_(batches)
        norm.momentum = momenta[i]


@torch.no_grad()
def val_loss(
    trainer,  # a Trainer
    denoise=None,  # in the place of the EMA model's: (x_t, log_snr, label) -> x0_hat
):
    """Return the mean of trainer.ema_loss over `selection_items`, at fixed levels, fixed noise."""
    dataset = trainer.dataset
    items = torch.arange(min(dataset.num_selection, VAL_ITEMS))
    batches = items.split(fitting_batch(dataset.event, VAL_BATCH))

    def loss_sum(k):
        x0, label = dataset.selection_items(batches[k])
        if label is not None:
            label = label.to(trainer.device) if trainer.model.num_classes else None
        return trainer.ema_loss(x0.to(trainer.device), label, k, "test", denoise).sum().item()

    return sum(in_order(loss_sum, range(len(batches)))) / len(items)


def require_possible(trainer, best, seconds):
    """Raise ValueError unless a checkpoint's best loss and seconds of training can be."""
    least = least_loss(trainer)
    if not (best is None or least < best < math.inf):
        raise ValueError(f"best={best}: expected a loss, more than {least:g}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds={seconds}: expected 0 or more")


def least_loss(trainer):
    """Return a number that every loss of the trainer's is above."""
    learned = trainer.model.schedule.network is not None
    return LEAST_BOUND if learned and not trainer.dataset.is_pixels else 0.0


@torch.no_grad()
def is_diverged(trainer, loss):
    """Return whether a val_loss is that of a run gone wrong.

    It is not finite, or as small as none can be, or far above the best one so far: by half of the
    loss of a network that outputs 0 or, without a best, above 10 times that. The bound of a learned
    schedule has no such scale: 5 nats a dimension are far. The loss of training items must be so,
    too, or the model is only overfitted."""
    if not math.isfinite(loss) or loss <= least_loss(trainer):
        return True
    if trainer.best is not None and loss <= trainer.best:  # as most are: nothing to measure
        return False

    def output_zero(x_t, log_snr, label):
        c_skip, _ = PREDICTIONS[trainer.model.prediction](*alpha_sigma(log_snr, x_t))
        return c_skip * x_t

    of_zero = val_loss(trainer, output_zero)
    if trainer.model.schedule.network is not None:
        limit = FAR_BOUND + (of_zero if trainer.best is None else trainer.best)
    else:
        limit = 10 * of_zero if trainer.best is None else trainer.best + of_zero / 2
    if loss <= limit:
        return False
    x0, label = trainer.training_batch(0, fitting_batch(trainer.dataset.event, VAL_BATCH))
    return not trainer.ema_loss(x0, label, 0, "test").mean().item() <= limit  # NaN is above, too
