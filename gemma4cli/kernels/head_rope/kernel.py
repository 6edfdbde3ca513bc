"""Everything between a decoded token's q/k/v product and its attention: head norms, RoPE, folding, the cache write."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor


@triton.jit
def _halves(ptr, head, D: tl.constexpr, HALF: tl.constexpr):
    """Load a head's vector as two halves, float32 [HALF] each, and its mean square."""
    column = tl.arange(0, HALF)
    inside = column < D // 2
    first = tl.load(ptr + head * D + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(ptr + head * D + D // 2 + column, mask=inside, other=0.0).to(tl.float32)
    return first, second, tl.sum(first * first + second * second, axis=0) / D


@triton.jit
def _rotated(
    ptr, head, weight_ptr, cos_ptr, sin_ptr, eps, D: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Normalize, weigh and rotate a head's vector; both halves rounded to `dtype` where the model's modules round."""
    column = tl.arange(0, HALF)
    inside = column < D // 2
    w0 = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + D // 2 + column, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + column, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + column, mask=inside, other=0.0)
    first, second, mean = _halves(ptr, head, D, HALF)
    rms = tl.rsqrt(mean + eps)
    first = (first * rms * w0).to(dtype).to(tl.float32)
    second = (second * rms * w1).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def head_rope(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_out_ptr,
    r_out_ptr,
    eps,
    S,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    FOLDED: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """reference.head_rope; program i < HEADS is query head i, the others the KV heads.

    q [H * D], k, v [H_kv * D], cos, sin [D / 2] float32, caches [H_kv, S, width]; writes q_out [H, D], r_out [H, R].
    """
    head = tl.program_id(0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    column = tl.arange(0, HALF)
    inside = column < D // 2
    turned = column < R // 2
    wait_for_predecessor(PDL)
    start_successor(PDL)
    if head < HEADS:
        first, second = _rotated(q_ptr, head, q_weight_ptr, cos_ptr, sin_ptr, eps, D, HALF, dtype)
        if FOLDED:
            tl.store(r_out_ptr + head * R + column, first, mask=turned)
            tl.store(r_out_ptr + head * R + R // 2 + column, second, mask=turned)
            # What meets V is the key norm's weight times q, and nothing where RoPE turns.
            w0 = tl.load(k_weight_ptr + column, mask=inside & (column >= R // 2), other=0.0).to(tl.float32)
            w1 = tl.load(k_weight_ptr + D // 2 + column, mask=inside & (column >= R // 2), other=0.0).to(tl.float32)
            first = (first.to(tl.float32) * w0).to(dtype)
            second = (second.to(tl.float32) * w1).to(dtype)
        tl.store(q_out_ptr + head * D + column, first, mask=inside)
        tl.store(q_out_ptr + head * D + D // 2 + column, second, mask=inside)
    else:
        kv_head = head - HEADS
        slot = kv_head.to(tl.int64) * S + tl.load(position_ptr) % S
        value0, value1, mean = _halves(v_ptr, kv_head, D, HALF)
        first, second = _rotated(k_ptr, kv_head, k_weight_ptr, cos_ptr, sin_ptr, eps, D, HALF, dtype)
        cache = k_cache_ptr.dtype.element_ty
        if FOLDED:
            tl.store(k_cache_ptr + slot * R + column, first.to(cache), mask=turned)
            tl.store(k_cache_ptr + slot * R + R // 2 + column, second.to(cache), mask=turned)
        else:
            tl.store(k_cache_ptr + slot * D + column, first.to(cache), mask=inside)
            tl.store(k_cache_ptr + slot * D + D // 2 + column, second.to(cache), mask=inside)
        rms = tl.rsqrt(mean + eps)
        tl.store(v_cache_ptr + slot * D + column, (value0 * rms).to(dtype).to(cache), mask=inside)
        tl.store(v_cache_ptr + slot * D + D // 2 + column, (value1 * rms).to(dtype).to(cache), mask=inside)
