"""Muon (Jordan et al. 2024): orthogonalized momentum, batched over weights of equal shape."""

import math

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024
ITERATIONS = 5
# The steps of Muon and of the AdamW beside it, in units of lr. A norm cancels the scale of the
# weights before it, so only the step relative to their size counts (van Laarhoven 2017); without
# one the same step diverges. Measured: docs/ablation.md, Learning rates.
MUON_LR, BESIDE_MUON_LR = 2560.0, 3.0
BARE_MUON_LR, BESIDE_BARE_MUON_LR = 20.0, 1.0  # of weights that no norm follows
BEFORE_0_6 = {MUON_LR: 320.0, BESIDE_MUON_LR: 1.0}  # with which a run of then goes on
SCHEDULE_LR = 30.0  # a learned schedule's step in units of lr: its ends are tens of nats apart


def ema_decay(decay, step):
    """Return the EMA's decay after a step, with warm-up: a short run must not keep its start."""
    return min(decay, step / (step + 9))


def has_fast_bf16(device):
    """Return whether bf16 is faster than fp32 here.

    Decided by capability, not by timing, so that a resumed run computes in the same way."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # private names, so a future PyTorch without them means fp32
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def orthogonalize(matrices):
    """Return roughly the nearest matrices, (K, M, N), with orthonormal rows (columns, if M > N).

    All but the smallest singular values become 0.7 to 1.2. Newton-Schulz iteration of Jordan et al.
    2024, "Muon: an optimizer for hidden layers in neural networks"."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if has_fast_bf16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (K, M, M)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def as_matrix(weight):
    """View a weight (out, in, ...) as (out, N), as a channels-last convolution multiplies by it."""
    if weight.ndim < 4:  # of a linear layer, or of sequences, which have no such format
        return weight.view(len(weight), -1)
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)


class Muon(torch.optim.Optimizer):
    """The step of torch.optim.Muon, with Nesterov's momentum and no weight decay.

    For weights of linear layers and of convolutions; of images, in channels-last. Those of one
    shape are orthogonalized in one go, which is faster; in float32 where bfloat16 is slow."""

    def __init__(self, weights, lr=1e-3, momentum=0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                matrix = as_matrix(weight)
                gradient = as_matrix(weight.grad)
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                same_shape = by_shape.setdefault(matrix.shape, [])
                same_shape.append((matrix, gradient, state["momentum_buffer"]))
            for (rows, columns), same_shape in by_shape.items():
                matrices, gradients, buffers = zip(*same_shape, strict=True)
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalize(torch.stack(nesterov)).unbind()
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(matrices, updates, alpha=-lr)


def build_optimizers(model, optimizer="muon", weight_decay=0.01):
    """Return the optimizers of a DiffusionModel, and the factor on lr of each parameter group.

    `muon` trains the hidden weights of a network that names them, AdamW everything else; `adamw`
    trains all. The norm sets the rate of Muon, but not which weights are Muon's."""
    hidden, has_norm = [], False
    if optimizer == "muon" and hasattr(model.network, "hidden_weights"):
        hidden, has_norm = model.network.hidden_weights()
    muon_lr, adamw_lr = BARE_MUON_LR, BESIDE_BARE_MUON_LR
    if has_norm:
        muon_lr, adamw_lr = MUON_LR, BESIDE_MUON_LR
    muon_ids = {id(weight) for weight in hidden}
    adamw_params = [p for p in model.network.parameters() if id(p) not in muon_ids]
    groups = [{"params": adamw_params}]
    lr_scales = [adamw_lr if hidden else 1.0]
    schedule_params = list(model.schedule.parameters())
    if schedule_params:
        groups.append({"params": schedule_params, "weight_decay": 0.0})
        lr_scales.append(SCHEDULE_LR)
    fused = model.device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)
    if not hidden:
        return [adamw], lr_scales
    return [adamw, Muon(hidden)], [*lr_scales, muon_lr]


def saved_lr_scales(saved, lr_scales):
    """Return the factors on lr that a checkpoint holds, a list, or [] before version 0.6.

    lr_scales: today's. Raises ValueError when the checkpoint has another number of them."""
    if not saved:
        return [BEFORE_0_6.get(scale, scale) for scale in lr_scales]
    if len(saved) != len(lr_scales):
        raise ValueError(f"it has {len(saved)} learning rates, not {len(lr_scales)}")
    return list(saved)


@torch.no_grad()
def load_moments(optimizer, saved):
    """Take over the moments and step counters of a state_dict, but no hyper-parameter.

    Raises ValueError when a moment has not the size of its weight, at which no optimizer looks."""
    state = optimizer.state_dict() | {"state": {}}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for i, moments in saved["state"].items():
        state["state"][i] = {}
        for name, value in moments.items():
            like = value if name == "step" else weights[i]
            if value.numel() != like.numel():
                raise ValueError(f"{name} of weight {i} has {value.numel()} numbers")
            # in the weight's own order in memory, in which fused AdamW goes through both
            like = like if like.shape == value.shape else value.contiguous()  # Muon's, a matrix
            state["state"][i][name] = torch.empty_like(like).copy_(value)
    optimizer.load_state_dict(state)
