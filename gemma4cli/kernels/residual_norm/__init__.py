"""`g4::residual_norm`: residual, norms and int8 activations between two products of a decoded token, in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.quantized_matmul import Int8Rows, empty_int8_rows, quantize
from gemma4cli.kernels.residual_norm import kernel, reference
from gemma4cli.kernels.residual_norm.configs import residual_norm_config
from gemma4cli.kernels.targets import current_target


def residual_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Int8Rows]:
    """``reference.residual_norm``, its second result rounded to int8 for ``quantized_matmul.matvec``."""
    hidden, *rows = residual_norm_op(residual, branch, branch_weight, factor, weight, eps)
    return hidden, Int8Rows(*rows)


@triton_op("g4::residual_norm", mutates_args={})
def residual_norm_op(
    residual: Tensor,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [1, K] and the parts of ``Int8Rows``."""
    k = residual.shape[1]
    config = residual_norm_config(current_target())
    hidden = torch.empty_like(residual)
    rows = empty_int8_rows(1, k, residual.device)
    wrap_triton(kernel.residual_norm)[(triton.cdiv(k // 32, config.groups),)](
        residual, residual if branch is None else branch, weight if branch_weight is None else branch_weight,
        weight if factor is None else factor, weight, hidden, *rows, eps, K=k, BLOCK_K=triton.next_power_of_2(k),
        BLOCK_G=config.groups, HAS_BRANCH=branch is not None, HAS_FACTOR=factor is not None,
        PDL=current_target().dependent_launch, num_warps=config.num_warps,
    )  # fmt: skip
    return hidden, *rows


@residual_norm_op.register_kernel("cpu")
def _cpu(
    residual: Tensor,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, x = reference.residual_norm(residual, branch, branch_weight, factor, weight, eps)
    # An operator must not return its argument.
    return hidden.clone() if hidden is residual else hidden, *quantize(x)
