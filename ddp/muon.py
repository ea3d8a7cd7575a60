"""Muon: momentum whose steps are made orthogonal, many matrices at once."""

import math

import torch

from ddp.device import has_fast_bf16

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024
ITERATIONS = 5


def orthogonal(matrices):
    """(K, M, N) -> the nearest matrices with orthonormal rows (or columns, if M > N), roughly: all
    singular values become 0.7 to 1.2. Newton-Schulz iteration; Jordan et al. 2024, "Muon: an
    optimizer for hidden layers in neural networks"."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if has_fast_bf16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """The step of torch.optim.Muon, with Nesterov's momentum and no weight decay, for many small
    matrices (M, N): those of one shape are made orthogonal in one go, about three times faster."""

    def __init__(self, matrices, lr=1e-3, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for matrix in group["params"]:
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix.grad)
                alike.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in alike.items():
                gradients = [matrix.grad for matrix in matrices]
                moments = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, moments, group["momentum"])
                steps = orthogonal(torch.stack(ahead)).unbind()
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(matrices, steps, alpha=-lr)
