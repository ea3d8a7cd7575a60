"""One training step; EMA; BatchNorm under the EMA weights; what a run must remember."""

import copy
import dataclasses

import torch
from torch import nn

from ddp.checkpoint import FORMAT, provenance
from ddp.config import LR_SCHEDULES
from ddp.data import to_float
from ddp.forward import diffuse, draw_seed, normal, uniform
from ddp.likelihood import prior_term, reconstruction_term
from ddp.loss import denoising
from ddp.model import DiffusionModel
from ddp.muon import Muon
from ddp.network import Block
from ddp.profiling import part

STATISTICS_BATCHES = 8  # of STATISTICS_ITEMS each, to recompute BatchNorm's statistics
STATISTICS_ITEMS = {True: 512, False: 8192}  # is_image: a picture has many positions, a point one
# Muon's step in units of --lr. A normalisation cancels the scale of the weights before it, so only
# the step relative to their size counts (van Laarhoven 2017).
MUON_LR = 320.0
SCHEDULE_LR = 30.0  # a learned schedule's step in units of --lr: its ends are tens of nats apart
ENDS_ITEMS = 64  # of a batch, on which the ends of a learned schedule are trained
TEST_ITEMS, TEST_BATCH = 2000, 500


class Trainer:
    """A model in training: raw weights, their exponential moving average, optimiser, and how far it
    is (`step`, `seconds`, `best` test loss). precision: `fp32`, `bf16` or `fp16`."""

    def __init__(self, config, dataset, device="cpu", precision="fp32"):
        self.device, self.precision = torch.device(device), precision
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if 4 * dataset.train.nbytes < free:  # so that no batch has to travel
                dataset = dataclasses.replace(dataset, train=dataset.train.to(self.device))
        self.config, self.dataset = config, dataset
        self.step, self.seconds, self.best = 0, 0.0, None
        self.averaged = None  # the step at which the EMA model's statistics were recomputed
        torch.manual_seed(config.seed)
        classes = len(dataset.classes) if config.conditional else 0
        self.model = DiffusionModel(config, dataset.event, classes).to(self.device)
        if dataset.is_image:
            self.model.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if config.compile:
            self.model.network.compile(dynamic=False)
        blocks = [m for m in self.model.modules() if isinstance(m, Block)]
        by_muon = blocks if config.optimizer == "muon" else []
        hidden = [w for b in by_muon for w in b.normalised_weights()]
        taken = {id(weight) for weight in hidden}
        plain = [p for p in self.model.network.parameters() if id(p) not in taken]
        groups, self.scales = [{"params": plain}], [1.0, MUON_LR]
        if list(self.model.schedule.parameters()):
            groups.append({"params": list(self.model.schedule.parameters()), "weight_decay": 0.0})
            self.scales.insert(1, SCHEDULE_LR)
        if config.levels == "importance":  # one memory of the losses for both
            self.ema.schedule.squares = self.model.schedule.squares
        self.optimizers = [
            torch.optim.AdamW(
                groups,
                betas=(0.9, 0.99),
                weight_decay=config.weight_decay,
                fused=self.device.type in ("cpu", "cuda"),
            )
        ]
        if hidden:
            self.optimizers.append(Muon(hidden))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def describe(self):
        count = sum(p.numel() for p in self.model.parameters())
        return f"network: {count:,} parameters on {self.device}, trained in {self.precision}"

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def loss(self, model, x0, label, step, stream):
        """The loss of each item, (B,), at levels and with noise keyed by (seed, stream, step)."""
        log_snr, weight = self.levels(model, len(x0), step, stream)
        return weight * self.unweighted(model, x0, label, log_snr, step, stream)

    def levels(self, model, count, step, stream):
        """log_snr and weight, each (count,), keyed by (seed, stream, step); see Schedule.levels."""
        u = uniform(self.config.seed, stream, step, torch.arange(count))
        log_snr, weight = model.schedule.levels(u, self.config.weighting == "bound")
        return tuple(v.to(self.device, non_blocking=True) for v in (log_snr, weight))

    def unweighted(self, model, x0, label, log_snr, step, stream):
        """The loss of each item, (B,), at log_snr (B,), before the weight of its level is drawn."""
        with part("batch"):
            x0 = x0.to(self.device, non_blocking=True)
            indices = torch.arange(len(x0), device=self.device)
            eps = normal(self.config.seed, stream, step, indices, model.event)
            xt = diffuse(x0, log_snr, eps)
        with part("forward"), self.autocast():
            label = label.to(self.device, non_blocking=True) if model.classes else None
            x0_hat = model.denoise(xt, log_snr, label)
        return denoising(x0_hat, x0, log_snr, self.config.weighting, self.config.loss)

    def training_batch(self, step, size, copies=1):
        """x0 and label of `size` items, each `copies` times, to be noised each time anew; some
        labels are hidden when the model is conditional."""
        x0, label = self.dataset.batch(self.config.seed, step, size)
        x0 = x0.repeat(copies, *[1] * (x0.ndim - 1))
        if self.config.conditional:
            u = uniform(self.config.seed, "label", step, torch.arange(len(x0)))
            label = label.repeat(copies).where(u >= self.config.label_dropout, self.model.classes)
        return x0, label

    def train_step(self, progress):
        """One optimiser step, `progress` in [0, 1] of the way through the run.

        Returns (epoch, loss, gradient norm, learning rate); loss and norm are 0-d tensors."""
        config = self.config
        warm = min(1.0, (self.step + 1) / (config.warmup + 1))
        lr = config.lr * warm * LR_SCHEDULES[config.lr_schedule](progress)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, scale in zip(groups, self.scales, strict=False):
            group["lr"] = lr * scale
        self.model.train()
        total = 0.0
        for i in range(config.grad_accumulation):
            batch = self.step * config.grad_accumulation + i
            with part("batch"):
                if config.dropout:  # it is positional, too
                    torch.manual_seed(draw_seed(config.seed, batch))
                x0, label = self.training_batch(batch, config.batch_size, config.noise_draws)
            total = total + self.backward(x0, label, batch) / config.grad_accumulation
        with part("optimiser"):
            norm = self.update()
        items = self.step * config.grad_accumulation * config.batch_size
        return items / len(self.dataset.train), total, norm, lr

    @torch.no_grad()
    def update(self):
        """Move the weights by their gradients, and their average after them -> the gradients' norm,
        0-d."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        weights = list(self.model.network.parameters())
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        if self.config.grad_clip:  # a limit of inf would make NaN of a norm of inf
            nn.utils.clip_grads_with_norm_(weights, self.config.grad_clip, norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad()
        self.step += 1
        # a young average forgets faster: it would hold on to the start for the whole of a short run
        decay = min(self.config.ema_decay, self.step / (self.step + 9))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return norm

    def backward(self, x0, label, batch):
        """Add the gradients of one batch -> its mean loss, 0-d."""
        schedule, share = self.model.schedule, 1 / (len(x0) * self.config.grad_accumulation)
        log_snr, weight = self.levels(self.model, len(x0), batch, "train")
        drawn = log_snr.detach().requires_grad_(schedule.network is not None)
        items = self.unweighted(self.model, x0, label, drawn, batch, "train")
        loss = (weight.detach() * items).sum()
        with part("backward"):
            self.scaler.scale(loss * share).backward()
        items, slope = items.detach(), drawn.grad
        if schedule.sampling == "importance":
            schedule.observe(log_snr, weight * items)
        if schedule.network is None:
            return loss.detach() / len(x0)
        # What lies between its ends does not change the mean of the bound's estimate, only its
        # square, and is trained to lower that; the ends are trained on the bound itself. Kingma et
        # al. 2021, section 5.1 and appendix I.2.
        inner = [p for p in schedule.parameters() if p is not schedule.network.ends]
        ways = [slope, self.scaler.scale(items * share)]
        twice = [2 * weight.detach() * items * way for way in ways]
        torch.autograd.backward([log_snr, weight], twice, inputs=inner, retain_graph=True)
        rest = self.scaler.scale(self.ends_loss(x0[:ENDS_ITEMS].to(self.device), batch))
        torch.autograd.backward(
            [log_snr, weight, rest / self.config.grad_accumulation],
            [*ways, None],
            inputs=[schedule.network.ends],
        )
        return loss.detach() / len(x0)

    def ends_loss(self, x0, step):
        """The bound's prior and reconstruction terms, nats a dimension, 0-d; the latter of xt /
        alpha, as in Kingma et al. 2021, so that it costs no network evaluation."""
        schedule, size = self.model.schedule, x0[0].numel()
        clean, noisy = (schedule.log_snr(t).float() for t in (0.0, 1.0))
        indices = torch.arange(len(x0), device=self.device)
        # of labels only uniform numbers are drawn: the normal ones of that stream are free
        eps = normal(self.config.seed, "label", step, indices, self.model.event)
        x0_hat = x0 + torch.exp(-0.5 * clean) * eps
        clean = clean.expand(len(x0))
        terms = reconstruction_term(x0, x0_hat, clean, self.dataset.is_image)
        return (terms + prior_term(x0, noisy)).mean() / size

    def memory(self):
        """Bytes that training takes, by what they are for, a dict; measured in a step, which is
        done."""
        saved = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.train_step(0.0)
        weights = [p.untyped_storage() for p in self.model.parameters()]
        states = [s for optimizer in self.optimizers for s in optimizer.state.values()]
        moments = [v for s in states for v in s.values() if torch.is_tensor(v)]
        size = sum(w.nbytes() for w in weights)
        activations = sum(saved.values()) - sum(saved.get(w.data_ptr(), 0) for w in weights)
        parts = dict.fromkeys(("weights", "their average", "gradients"), size)
        return parts | {"optimiser": sum(m.nbytes for m in moments), "activations": activations}

    @torch.no_grad()
    def average(self):
        """The EMA model, ready to be used: BatchNorm's statistics are recomputed under its weights.

        The batches are drawn as in training, and the statistics are means over all of them; dropout
        is off, as it will be when they are used. A function of the weights and the seed alone."""
        if self.averaged == self.step:
            return self.ema.eval()
        norms = [m for m in self.ema.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum, saved = None, norm.momentum  # None: the mean of all batches
        for i in range(STATISTICS_BATCHES if norms else 0):
            x0, label = self.training_batch(i, STATISTICS_ITEMS[self.dataset.is_image])
            self.loss(self.ema, x0, label, i, "statistics")
        for norm in norms:
            norm.momentum = saved
        self.averaged = self.step
        return self.ema.eval()

    @torch.no_grad()
    def test_loss(self):
        """The mean loss of the EMA model on test items, at fixed levels with fixed noise. Its
        BatchNorm statistics must be fresh: call average first."""
        dataset, total = self.dataset, 0.0
        items = torch.arange(min(len(dataset.test), TEST_ITEMS))
        for i, which in enumerate(items.split(TEST_BATCH)):
            x0 = to_float(dataset.test[which])
            label = dataset.test_labels[which] if self.model.classes else None
            total += self.loss(self.ema, x0, label, i, "test").sum().item()
        return total / len(items)

    def state(self):
        """What a run must remember, as a checkpoint's dict (see ddp.checkpoint)."""
        return {
            "format": FORMAT,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "event": list(self.model.event),
            "classes": list(self.dataset.classes),
            "provenance": provenance(self.dataset),
            "ema": self.ema.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "seconds": self.seconds,
        }

    def load(self, state):
        """Go on from a checkpoint's dict. Raises OSError when it was trained on other data, or does
        not fit."""
        theirs, ours = state["provenance"].get("fingerprint"), self.dataset.fingerprint
        if theirs != ours:
            raise OSError(
                f"the run was trained on data {theirs}, this is {ours}; "
                "give --data_dir the folder that it was trained on"
            )
        self.averaged = None
        try:
            self.ema.load_state_dict(state["ema"])
            self.model.load_state_dict(state["model"])
            self.scaler.load_state_dict(state["scaler"])
            for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OSError(f"the checkpoint does not fit its own config ({reason})") from None
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
