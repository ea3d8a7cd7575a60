"""Muon: momentum whose steps are made orthogonal, many matrices at once."""

import math

import torch

from ddp.device import has_fast_bf16

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024
ITERATIONS = 5


def orthogonal(matrices):
    """(K, M, N) -> the nearest matrices with orthonormal rows (or columns, if M > N), roughly:
    singular values become 0.7 to 1.2, but the smallest. Newton-Schulz iteration; Jordan et al.
    2024, "Muon: an optimizer for hidden layers in neural networks"."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if has_fast_bf16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def as_matrix(weight):
    """A view of a weight (out, in, ...) as (out, N): what a channels-last convolution multiplies
    by."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).view(len(weight), -1)


class Muon(torch.optim.Optimizer):
    """The step of torch.optim.Muon, with Nesterov's momentum and no weight decay, for the
    weights of linear layers and of convolutions in channels-last: those of one shape are made
    orthogonal in one go (docs/performance.md), in float32 where bfloat16 is slow."""

    def __init__(self, weights, lr=1e-3, momentum=0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for weight in group["params"]:
                matrix, gradient = as_matrix(weight), as_matrix(weight.grad)
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                trio = matrix, gradient, state["momentum_buffer"]
                alike.setdefault(matrix.shape, []).append(trio)
            for (rows, columns), trios in alike.items():
                matrices, gradients, moments = zip(*trios, strict=True)
                torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, moments, group["momentum"])
                steps = orthogonal(torch.stack(ahead)).unbind()
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(matrices, steps, alpha=-lr)
