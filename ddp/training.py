"""Training: one step in one piece, EMA, BatchNorm under the EMA weights, and the loop."""

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.profiler import record_function

from ddp import planning, validation
from ddp.augment import augment_images
from ddp.distributed import broadcast, default_shards
from ddp.forward import q_sample
from ddp.learned_schedule import backward_through_schedule, bound_terms
from ddp.loss import denoising_loss
from ddp.model import build_model
from ddp.noise_dist import build_noise_dist
from ddp.optim import build_optimizers, ema_decay, load_moments, saved_lr_scales
from ddp.rng import derive_seed, normal, uniform
from ddp.shards import PartSums

LR_SCHEDULES = {  # progress in [0, 1] -> factor on lr
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}
EVERY = slice(0, None, 1)  # the part of a batch that is all of it
WARMUP_FRACTION = 0.1  # of a run: the largest in which the learning rate rises


@dataclass(frozen=True)
class StepStats:
    """What a training step has to tell."""

    step: int  # steps done, this one included
    epoch: float  # passes over the training items
    loss: torch.Tensor  # 0-d, the mean over the batch; on a GPU not yet waited for
    grad_norm: torch.Tensor  # 0-d, before clipping
    lr: float
    progress: float = 0.0  # fraction of the run that is done; 1 is its end
    previous_progress: float = 0.0  # the same after the step before


class Trainer:
    """A model in training: raw weights, their EMA, optimizers, and how far it is.

    Attributes: `model` (raw weights) and `ema`, two DiffusionModels; `step`; `seconds` of training;
    `best`, the least val_loss so far; `bn_fresh_at_step`, when BatchNorm was last recalibrated."""

    def __init__(
        self,
        config,  # a Config
        dataset,  # a data.Dataset
        device="cpu",
        precision="fp32",  # compute dtype: fp32, bf16 or fp16
    ):
        config = config.resolve(dataset)
        self.config = config = replace(config, shards=config.shards or default_shards())
        self.device = torch.device(device)
        self.precision = precision
        self.dataset = dataset
        if self.device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            if 4 * dataset.train.nbytes < free_bytes:
                self.dataset = dataset.to(self.device)  # so that no batch has to travel
        self.step = 0
        self.seconds = 0.0
        self.best = None
        self.bn_fresh_at_step = None
        torch.manual_seed(config.seed)
        num_classes = len(dataset.classes) if config.class_cond else 0
        self.model = build_model(config, dataset.event, num_classes, dataset.units).to(self.device)
        if dataset.is_image:
            self.model.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if config.compile:
            self.model.network.compile(dynamic=False)
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p for m in self.model.modules())
        self.noise_dist = build_noise_dist(config.noise_dist, self.model.schedule)
        self.noise_dist_learns = hasattr(self.noise_dist, "update")  # from the loss: importance
        self.optimizers, self.lr_scales = build_optimizers(
            self.model, config.optimizer, config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.sums = PartSums(self.model, config)

    @property
    def num_params(self):
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_steps(self):
        """Steps of the whole run, or None where max_minutes governs it and none are planned yet."""
        return self.config.num_steps(len(self.dataset.train))

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    # ---- the step ----

    def train_step(self, lr_progress):
        """Take one optimizer step, at lr_progress in [0, 1] of the run; return its StepStats."""
        config = self.config
        lr = self.set_lr(lr_progress)
        count = config.batch_size * config.noise_copies  # items of a batch, of all parts
        self.model.train()
        for part in self.sums.parts():  # those of this process, each on its own
            for i in range(config.grad_accumulation):
                k = self.step * config.grad_accumulation + i  # the batch's number in the run
                with record_function("part batch"):
                    if self.has_dropout:  # it is keyed by position, too
                        number = k * part.step + part.start
                        torch.manual_seed(derive_seed(config.seed, "dropout", number))
                    x0, label = self.training_batch(k, config.batch_size, config.noise_copies, part)
                    x0, augment = self.augmented(k, x0, part)  # augment: None, or (b, 9)
                    log_snr, weight = self.sample_log_snr(k, count, part)  # (b,), (b,)
                    eps = self.eps(k, x0, part)  # (b, *event)
                    x_t = q_sample(x0, log_snr, eps)  # (b, *event)
                with record_function("part forward"), self.autocast():
                    x0_hat = self.model.denoise(x_t, log_snr, label, augment)  # (b, *event)
                loss = denoising_loss(x0_hat, x0, log_snr, config.weighting, config.loss)  # (b,)
                self.backward((weight * loss).sum(), count)
                self.sums.losses[i, part] = (weight * loss).detach()
                if self.model.schedule.network is not None:  # the loss is the whole bound
                    ends = backward_through_schedule(self, k, part, x0, log_snr, loss)
                    self.sums.losses[i, part] += ends
        losses = self.sums.total()  # (batches, B), and the gradients of all parts
        self.update_noise_dist(losses)
        grad_norm = self.optimizer_step()
        epoch = self.step * config.grad_accumulation * config.batch_size / len(self.dataset.train)
        return StepStats(self.step, epoch, losses.mean(), grad_norm, lr)

    def set_lr(self, lr_progress):
        """Set the learning rate of every parameter group, and return that of AdamW."""
        config = self.config
        warmup = config.warmup
        if self.num_steps is not None:
            warmup = min(warmup, int(WARMUP_FRACTION * self.num_steps))
        warmup_factor = min(1.0, (self.step + 1) / (warmup + 1))
        lr = config.lr * warmup_factor * LR_SCHEDULES[config.lr_schedule](lr_progress)
        groups = []
        for optimizer in self.optimizers:
            groups += optimizer.param_groups
        for group, scale in zip(groups, self.lr_scales, strict=True):
            group["lr"] = lr * scale
        return lr

    def training_batch(self, k, size, noise_copies=1, part=EVERY):
        """Return x0 (b, *event) and label (b,) or None of a part of batch k, on the device.

        The whole has size * noise_copies items: each copy gets its own noise. Labels are dropped
        with probability label_dropout, for CFG."""
        x0, label = self.dataset.batch(self.config.seed, k, size, part)
        x0 = x0.repeat(noise_copies, *[1] * (x0.ndim - 1))
        x0 = x0.to(self.device, non_blocking=True)
        if not self.model.num_classes:
            return x0, None
        positions = torch.arange(size * noise_copies)[part]
        u = uniform(self.config.seed, "label_dropout", k, positions)
        kept = u >= self.config.label_dropout
        label = label.repeat(noise_copies).where(kept, self.model.num_classes)
        return x0, label.to(self.device, non_blocking=True)

    def augmented(self, k, x0, part=EVERY):
        """Return a part of batch k augmented, and what the network is told of it, or None."""
        positions = torch.arange(part.start, part.step * len(x0), part.step)
        return augment_images(x0, self.config.seed, k, positions, self.config.augment)

    def draw_levels(self, k, count, purpose="train", schedule=None):
        """Return log_snr and weight, (count,) each, as functions of the schedule's parameters."""
        u = uniform(self.config.seed, f"{purpose}_log_snr", k, torch.arange(count))
        schedule = schedule or self.model.schedule
        log_snr, weight = self.noise_dist(schedule, u, self.config.weighting == "vlb")
        log_snr = log_snr.to(self.device, non_blocking=True)
        return log_snr, weight.to(self.device, non_blocking=True)

    def sample_log_snr(self, k, count, part=EVERY):
        """Return the noise levels of a part of batch k and their weights, (b,), as constants."""
        log_snr, weight = self.draw_levels(k, count)  # (count,), of the whole batch
        trained = self.model.schedule.network is not None  # then log_snr.grad is wanted
        return log_snr[part].detach().requires_grad_(trained), weight[part].detach()

    def eps(self, k, x0, part=EVERY, purpose="train"):
        """Return the noise of a part of batch k, N(0, I) like x0."""
        end = part.step * len(x0)
        indices = torch.arange(part.start, end, part.step, device=self.device)
        return normal(self.config.seed, f"{purpose}_eps", k, indices, self.model.event)

    @record_function("part backward")
    def backward(self, loss_sum, count):
        """Add the gradients of a part's share of the mean loss over all batches of the step."""
        self.scaler.scale(loss_sum * (1 / (count * self.config.grad_accumulation))).backward()

    def update_noise_dist(self, losses):
        """Let a noise distribution that learns know the step's losses, (batches, B)."""
        if not self.noise_dist_learns:
            return
        numbers = range(self.step * len(losses), (self.step + 1) * len(losses))  # of batches
        levels = [self.draw_levels(k, losses.shape[1])[0] for k in numbers]  # as were drawn
        for log_snr, loss in zip(levels, losses, strict=True):
            self.noise_dist.update(self.model.schedule, log_snr, loss)

    @record_function("part optimizer")
    @torch.no_grad()
    def optimizer_step(self):
        """Unscale, clip, step the optimizers, update the EMA; return the gradient norm, 0-d."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        params = list(self.model.network.parameters())
        grad_norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if self.config.grad_clip:  # 0 is no limit; a schedule's step is bounded by AdamW itself
            nn.utils.clip_grads_with_norm_(params, self.config.grad_clip, grad_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad()
        self.step += 1
        decay = ema_decay(self.config.ema_decay, self.step)
        weights = list(self.model.parameters())
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - decay)  # the EMA
        return grad_norm

    # ---- the EMA model ----

    def ema_loss(self, x0, label, k, purpose, denoise=None):
        """Return the weighted loss of the EMA model, (B,), at the levels of a purpose.

        Of a learned schedule it is the whole bound, since moving the ends moves all its terms.
        denoise: what takes the place of the EMA model's."""
        schedule = self.ema.schedule
        log_snr, weight = self.draw_levels(k, len(x0), purpose, schedule)
        eps = self.eps(k, x0, purpose=purpose)
        x_t = q_sample(x0, log_snr, eps)
        with self.autocast():
            x0_hat = (denoise or self.ema.denoise)(x_t, log_snr, label)
        config = self.config
        loss = weight * denoising_loss(x0_hat, x0, log_snr, config.weighting, config.loss)
        if schedule.network is None:
            return loss
        return loss + bound_terms(schedule, x0, eps, self.dataset.is_pixels)

    def recalibrated_ema(self):
        """Return the EMA model, its BatchNorm statistics recomputed under the EMA weights.

        Those of the raw model would make EMA weights a different network."""
        if self.bn_fresh_at_step != self.step:
            validation.recalibrate(self)
            self.bn_fresh_at_step = self.step
        return self.ema.eval()

    def val_loss(self):
        """Return the mean loss on `dataset.selection_items`; call `recalibrated_ema` first."""
        return validation.val_loss(self)

    def is_diverged(self, val_loss):
        """Return whether this is the val_loss of a run gone wrong, to be saved nowhere."""
        return validation.is_diverged(self, val_loss)

    # ---- the run ----

    def run(self):
        """Train from the current step to the end, yielding StepStats after every step."""
        self.plan_steps()
        num_steps = self.num_steps
        limit = self.config.seconds_limit()
        started = time.monotonic() - self.seconds

        def progress():
            self.seconds = time.monotonic() - started
            if limit < math.inf:  # all processes must end at the same step
                self.seconds = broadcast(self.seconds)
            return max(self.step / num_steps, self.seconds / limit)

        now = progress()
        while now < 1:
            # the lr follows the steps, not the clock, so that a resumed run is the same run
            stats = self.train_step(self.step / num_steps)
            previous, now = now, progress()
            yield replace(stats, progress=now, previous_progress=previous)

    def plan_steps(self):
        """Make a run that max_minutes alone governs one of so many steps, by its speed here.

        The number is in `config.planned_steps` from then on, and in checkpoints, so a resume goes
        on with the very same run. Does nothing where the steps are known; `run` calls it."""
        if self.num_steps is None:
            planning.plan_steps(self)

    def state_dict(self):
        """Return what a run must remember, as plain types and tensors."""
        return {
            "step": self.step,
            "ema": self.ema.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "lr_scales": list(self.lr_scales),
            "scaler": self.scaler.state_dict(),
            "noise_dist": self.noise_dist.state_dict() if self.noise_dist_learns else {},
            "best": self.best,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state):
        """Go on from what `state_dict` returned. What the config says stays as it says.

        Raises ValueError when something does not fit, or cannot be."""
        validation.require_possible(self, state["best"], state["seconds"])
        self.lr_scales = saved_lr_scales(state["lr_scales"], self.lr_scales)
        self.ema.load_state_dict(state["ema"])
        self.model.load_state_dict(state["model"])
        if state["scaler"]:  # else the run was not in fp16 so far
            self.scaler.load_state_dict(state["scaler"])
        for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
            load_moments(optimizer, saved)
        if self.noise_dist_learns:
            self.noise_dist.load_state_dict(state["noise_dist"])
        self.step = state["step"]
        self.best = state["best"]
        self.seconds = state["seconds"]
        self.bn_fresh_at_step = None


def train(
    config,  # a Config
    dataset,  # a data.Dataset
    callback=None,  # (trainer, StepStats) -> True to stop; called after every step
    device="cpu",
    precision="fp32",
):
    """Train a model from the start to the end of its run, and return the Trainer.

    Its model, ready to be sampled from, is `trainer.recalibrated_ema()`."""
    trainer = Trainer(config, dataset, device, precision)
    for stats in trainer.run():
        if callback is not None and callback(trainer, stats):
            break
    return trainer
