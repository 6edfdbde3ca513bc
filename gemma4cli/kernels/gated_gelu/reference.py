"""What the kernel computes, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up, GELU in its tanh form, each step rounded to the inputs' dtype. All [1, K]."""
    return F.gelu(gate, approximate="tanh") * up
