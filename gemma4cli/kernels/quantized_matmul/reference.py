"""What the matmul kernels compute, written from the formulas in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.kernels.quantized_matmul.format import PackedWeight, dequantize

ACTIVATION_GROUP = 32  # activations that share one int8 scale


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations to symmetric int8 in groups of 32 along K.

    Args: x: [M, K] float, K a multiple of 32.
    Returns: xq [M, K] int8; scale [M, K / 32] float32 = max|x| / 127; total [M, K / 32] float32 = scale * sum(xq).
    """
    m, k = x.shape
    grouped = x.float().view(m, k // ACTIVATION_GROUP, ACTIVATION_GROUP)
    scale = grouped.abs().amax(dim=-1) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    xq = torch.round(grouped * inverse[..., None])
    return xq.to(torch.int8).view(m, k), scale, scale * xq.sum(dim=-1)


def matmul_int8(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [M, K] times the weight transposed, activations rounded to int8: [M, N] float32."""
    xq, scale, _ = quantize_activations(x)
    return matvec_int8(xq, scale, weight)


def matvec_int8(xq: Tensor, scale: Tensor, weight: PackedWeight) -> Tensor:
    """Activations that are int8 already, xq [M, K] and scale [M, K / 32], times the weight transposed."""
    rounded = xq.float() * scale.repeat_interleave(ACTIVATION_GROUP, dim=1)
    return rounded @ dequantize(weight).T


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [M, K] times the weight transposed, activations as they are: [M, N] float32."""
    return x.float() @ dequantize(weight).T
