"""One launch between two products of a decoded token: residual, norms, and the int8 activations of the next product.

Every program sums the whole row for itself, which the L2 holds, and writes only its share of the outputs: no second
launch has to wait for a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.quantized_matmul.decode import write_int8


@triton.jit
def _read(ptr, k, inside):
    """Columns `k`, float32; 0 outside."""
    return tl.load(ptr + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _hidden(
    residual, branch, branch_weight, rms, factor, dtype: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """(residual + branch * rms * weight) * factor, rounded to the residual's dtype as it is stored."""
    hidden = residual
    if HAS_BRANCH:
        hidden = (hidden + (branch * rms * branch_weight).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if HAS_FACTOR:
        hidden = (hidden * factor).to(dtype).to(tl.float32)
    return hidden


@triton.jit
def residual_norm(
    residual_ptr,
    branch_ptr,
    branch_weight_ptr,
    factor_ptr,
    weight_ptr,
    hidden_ptr,
    xq_ptr,
    scale_ptr,
    total_ptr,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """reference.residual_norm of one row of K, then ``quantize_rows``; BLOCK_G groups of 32 per program."""
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_K)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < K // 32
    k = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    mask = inside[:, None]
    # Every load before the first sum: weights come from far away, and loads do not move up past a barrier.
    start_successor(PDL)
    weight = _read(weight_ptr, k, mask)
    factor = tl.load(factor_ptr).to(tl.float32) if HAS_FACTOR else 1.0
    row_weight = _read(branch_weight_ptr, column, column < K) if HAS_BRANCH else 0.0
    part_weight = _read(branch_weight_ptr, k, mask) if HAS_BRANCH else 0.0
    wait_for_predecessor(PDL)
    row, part = _read(residual_ptr, column, column < K), _read(residual_ptr, k, mask)
    row_branch = _read(branch_ptr, column, column < K) if HAS_BRANCH else 0.0
    part_branch = _read(branch_ptr, k, mask) if HAS_BRANCH else 0.0
    rms = tl.rsqrt(tl.sum(row_branch * row_branch, axis=0) / K + eps) if HAS_BRANCH else 1.0
    whole = _hidden(row, row_branch, row_weight, rms, factor, dtype, HAS_BRANCH, HAS_FACTOR)
    norm = tl.rsqrt(tl.sum(whole * whole, axis=0) / K + eps)
    hidden = _hidden(part, part_branch, part_weight, rms, factor, dtype, HAS_BRANCH, HAS_FACTOR)
    tl.store(hidden_ptr + k, hidden.to(dtype), mask=mask)
    x = (hidden * norm * weight).to(dtype).to(tl.float32)
    write_int8(x, 0, group, inside, xq_ptr, scale_ptr, total_ptr, K)
