"""What lies between the linear layers and attention of a CPU program, from the formulas."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4cli.model.layers import normalize
from gemma4cli.model.rope import rotate


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square.

    Args: x [..., N]; weight [N], which the result is multiplied with, or None; eps is added to the mean square.
    Returns: [..., N].
    """
    normal = normalize(x, eps)
    return normal if weight is None else normal * weight


def norm_add_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor, scale: Tensor | None) -> Tensor:
    """Add the RMS norm of x [..., N] with weight [N] to residual [..., N]; multiply by scale [1] when there is one."""
    total = residual + rms_norm_reference(x, weight, eps)
    return total if scale is None else total * scale


def head_rope_reference(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int
) -> Tensor:
    """Normalize every head, rotate it, and lay the heads out for the cache and attention.

    Args:
        x: [1, T, H * D], a projection's result.
        weight, eps: of the RMS norm of each head's D values; weight [D] or None.
        cos, sin: [T, D / 2], the angles of `model.rope.RotaryEmbedding`; dimension i is paired with i + D / 2. None
            leaves out the rotation.
        heads: H.
    Returns: [1, H, T, D].
    """
    normal = rms_norm_reference(x.unflatten(-1, (heads, -1)), weight, eps)
    turned = normal if cos is None or sin is None else rotate(normal, cos, sin)
    return turned.transpose(1, 2).contiguous()


def gelu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh form of GELU."""
    return F.gelu(gate, approximate="tanh") * up


def softcap_reference(x: Tensor, cap: float) -> Tensor:
    """Keep x within -cap…cap: ``tanh(x / cap) * cap``."""
    return torch.tanh(x / cap) * cap
