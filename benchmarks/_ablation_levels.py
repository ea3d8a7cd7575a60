"""BatchNorm's statistics by noise level, for benchmarks/ablation.py."""

import copy

import _common  # noqa: F401  so that ddp is found
import torch

from ddp.blocks import batch_norms
from ddp.forward import q_sample
from ddp.validation import set_statistics, statistics_batch

BATCHES = 2  # by which statistics of a level are measured; of one level they vary less

SHOWN_LOG_SNR = torch.linspace(-9, 9, 19)  # at which statistics are compared


def mix_levels(trainer, groups):
    """Let part p of a batch, its items p, p + groups, ..., have neighboring noise levels.

    The levels of a batch rise or fall with the position (they are stratified); they are handed out
    in another order. So BatchNorm's statistics in training are those of a band of levels."""
    draw = trainer.draw_levels

    def grouped(k, count, purpose="train", schedule=None):
        log_snr, weight = draw(k, count, purpose, schedule)
        if purpose != "train":
            return log_snr, weight
        i = torch.arange(count)
        order = (i % groups) * (count // groups) + i // groups
        return log_snr[order], weight[order]

    trainer.draw_levels = grouped


class LevelModel:
    """An EMA model whose BatchNorm statistics are those of each noise level, folded for each.

    Stands in for a DiffusionModel where all items of a batch have one level. share: 1 takes the
    level's own statistics, 0 those of the mixture of levels, 0.5 their mean."""

    training = False

    def __init__(self, trainer, share=1.0, dtype=torch.float32):
        self.trainer = trainer
        self.mixture = trainer.recalibrated_ema()
        self.share = share
        self.dtype = dtype
        self.folded = {}  # log_snr -> DiffusionModel

    def __getattr__(self, name):
        return getattr(self.mixture, name)

    def denoise(self, x_t, log_snr, label=None, augment=None):
        level = round(log_snr.flatten()[0].item(), 4)
        if level not in self.folded:
            self.folded[level] = self.at_level(level).for_inference(self.dtype)
        return self.folded[level].denoise(x_t, log_snr, label)

    @torch.no_grad()
    def at_level(self, level):
        """Return the model with statistics of training items at one noise level."""
        trainer = self.trainer
        model = copy.deepcopy(self.mixture)
        norms = batch_norms(model)
        mixture = [torch.stack([norm.running_mean, norm.running_var]) for norm in norms]

        def show(k):
            x0, label = statistics_batch(trainer, k)
            log_snr = torch.full((len(x0),), level, device=trainer.device)
            x_t = q_sample(x0, log_snr, trainer.eps(k, x0, purpose="bn"))
            with trainer.autocast():
                model.denoise(x_t, log_snr, label)

        set_statistics(model, show, BATCHES)
        for norm, (mean, var) in zip(norms, mixture, strict=True):
            norm.running_mean.copy_(torch.lerp(mean, norm.running_mean, self.share))
            norm.running_var.copy_(torch.lerp(var, norm.running_var, self.share))
        return model.eval()

    def differences(self):
        """Return how far a level's statistics are from the mixture's, by level and layer.

        `mean`: root mean square over channels of the difference of means over the mixture's
        standard deviation; `std`: the mean over channels of the ratio of standard deviations."""
        names = [n for n, m in self.mixture.named_modules() if m in batch_norms(self.mixture)]
        mixture = batch_norms(self.mixture)
        table = {"layers": names, "log_snr": SHOWN_LOG_SNR.tolist(), "mean": [], "std": []}
        for level in SHOWN_LOG_SNR.tolist():
            norms = batch_norms(self.at_level(level))
            means, stds = [], []
            for norm, mixed in zip(norms, mixture, strict=True):
                std = mixed.running_var.sqrt() + 1e-6
                shift = (norm.running_mean - mixed.running_mean) / std
                means.append(shift.square().mean().sqrt().item())
                stds.append((norm.running_var.sqrt() / std).mean().item())
            table["mean"].append(means)
            table["std"].append(stds)
        return table
