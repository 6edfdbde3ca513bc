"""One launch between two products of a decoded token: residual, norms, and the int8 activations of the next product.

Every program sums the whole row for itself, which the L2 holds, and writes only its share of the outputs: no second
launch has to wait for a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.quantized_matmul.decode import write_int8


@triton.jit
def _hidden(
    residual_ptr, branch_ptr, branch_weight_ptr, factor_ptr, k, inside, rms,
    HAS_BRANCH: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """(residual + branch * rms * weight) * factor at columns `k`, rounded to the residual's dtype as it is stored."""
    dtype = residual_ptr.dtype.element_ty
    hidden = tl.load(residual_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + k, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(branch_weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
        hidden = (hidden + (branch * rms * weight).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if HAS_FACTOR:
        hidden = (hidden * tl.load(factor_ptr).to(tl.float32)).to(dtype).to(tl.float32)
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
):
    """reference.residual_norm of one row of K, then ``quantize_rows``; BLOCK_G groups of 32 per program."""
    dtype = residual_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_K)
    whole = column < K
    rms = 1.0
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + column, mask=whole, other=0.0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(branch * branch, axis=0) / K + eps)
    row = _hidden(residual_ptr, branch_ptr, branch_weight_ptr, factor_ptr, column, whole, rms, HAS_BRANCH, HAS_FACTOR)
    norm = tl.rsqrt(tl.sum(row * row, axis=0) / K + eps)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < K // 32
    k = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    mask = inside[:, None]
    part = _hidden(residual_ptr, branch_ptr, branch_weight_ptr, factor_ptr, k, mask, rms, HAS_BRANCH, HAS_FACTOR)
    tl.store(hidden_ptr + k, part.to(dtype), mask=mask)
    weight = tl.load(weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    x = (part * norm * weight).to(dtype).to(tl.float32)
    write_int8(x, 0, group, inside, xq_ptr, scale_ptr, total_ptr, K)
