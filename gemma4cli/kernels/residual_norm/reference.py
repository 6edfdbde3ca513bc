"""What the kernel computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def residual_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add a normalized branch to the residual stream, scale the sum, and normalize it for the next product.

    Args: residual, branch: [1, K]; branch_weight, weight: [K]; factor: [1].
    Returns: hidden [1, K] = (residual + norm(branch) * branch_weight) * factor, and norm(hidden) * weight, each step
        rounded to the residual's dtype as the model's modules do.
    """
    hidden = residual
    if branch is not None and branch_weight is not None:
        hidden = hidden + _norm(branch, branch_weight, eps).to(residual.dtype)
    if factor is not None:
        hidden = hidden * factor.to(residual.dtype)
    return hidden, _norm(hidden, weight, eps).to(residual.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(torch.float32)
