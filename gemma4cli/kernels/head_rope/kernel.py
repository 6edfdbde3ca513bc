"""Everything between a decoded token's q/k/v product and its attention: head norms, RoPE, folding, the cache write."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.attention.int8 import LARGEST, LEVELS
from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor

_LEVELS = tl.constexpr(LEVELS)
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def head_halves(ptr, heads, heads_in, D: tl.constexpr, HALF: tl.constexpr):
    """Load the vectors of `heads` [N] as two halves, float32 [N, HALF] each, and their mean squares [N]."""
    column = tl.arange(0, HALF)[None, :]
    inside = heads_in[:, None] & (column < D // 2)
    place = ptr + heads[:, None] * D + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + D // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second, tl.sum(first * first + second * second, axis=1) / D


@triton.jit
def weight_halves(ptr, D: tl.constexpr, HALF: tl.constexpr):
    """Load a head norm's weight as two halves, float32 [1, HALF] each."""
    column = tl.arange(0, HALF)[None, :]
    first = tl.load(ptr + column, mask=column < D // 2, other=0.0).to(tl.float32)
    return first, tl.load(ptr + D // 2 + column, mask=column < D // 2, other=0.0).to(tl.float32)


@triton.jit
def rotated_halves(first, second, square, weight0, weight1, cos, sin, eps, dtype: tl.constexpr):
    """Normalize, weigh and rotate what ``head_halves`` loaded, rounded to `dtype` where the model rounds."""
    rms = tl.rsqrt(square + eps)[:, None]
    first = (first * rms * weight0).to(dtype).to(tl.float32)
    second = (second * rms * weight1).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _int8(x, inverse):
    """Round to the nearest code, half to even: adding and subtracting 1.5 * 2^23 leaves the nearest integer."""
    code = (x * inverse + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(code, -_LARGEST), _LARGEST).to(tl.int8)


@triton.jit
def _store_halves(
    cache_ptr, scale_ptr, slot, first, second, mask, SIZE: tl.constexpr, HALF: tl.constexpr, CODE_BITS: tl.constexpr
):
    """Write a vector [1, SIZE] that comes as two halves [1, HALF] to `slot` [1, 1]; CODE_BITS 8: as int8.encode does."""
    place = cache_ptr + slot * SIZE + tl.arange(0, HALF)[None, :]
    if CODE_BITS == 8:
        first = tl.where(mask, first.to(tl.float32), 0.0)
        second = tl.where(mask, second.to(tl.float32), 0.0)
        largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)[:, None]
        scale = (largest * (_LEVELS / _LARGEST)).to(tl.float16)
        tl.store(scale_ptr + slot, scale)
        inverse = tl.where(scale > 0, _LEVELS / scale.to(tl.float32), 0.0)
        tl.store(place, _int8(first, inverse), mask=mask)
        tl.store(place + SIZE // 2, _int8(second, inverse), mask=mask)
    else:
        cache = cache_ptr.dtype.element_ty
        tl.store(place, first.to(cache), mask=mask)
        tl.store(place + SIZE // 2, second.to(cache), mask=mask)


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
    k_scale_ptr,
    v_cache_ptr,
    v_scale_ptr,
    q_out_ptr,
    r_out_ptr,
    eps,
    S,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    FOLDED: tl.constexpr,
    CODE_BITS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """reference.head_rope; program i < HEADS is query head i, the others the KV heads.

    q [H * D], k, v [H_kv * D], cos, sin [D / 2] float32, caches [H_kv, S, width]; writes q_out [H, D], r_out [H, R].
    CODE_BITS 8: caches int8, with scales [H_kv, S] float16.
    """
    head = tl.program_id(0) + tl.arange(0, 1)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    column = tl.arange(0, HALF)[None, :]
    inside = column < D // 2
    turned = column < R // 2
    weight0, weight1 = weight_halves(q_weight_ptr if tl.program_id(0) < HEADS else k_weight_ptr, D, HALF)
    wait_for_predecessor(PDL)
    start_successor(PDL)
    cos = tl.load(cos_ptr + column, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + column, mask=inside, other=0.0)
    if tl.program_id(0) < HEADS:
        first, second, square = head_halves(q_ptr, head, head >= 0, D, HALF)
        first, second = rotated_halves(first, second, square, weight0, weight1, cos, sin, eps, dtype)
        if FOLDED:
            r_out = r_out_ptr + head[:, None] * R + column
            tl.store(r_out, first, mask=turned)
            tl.store(r_out + R // 2, second, mask=turned)
            # What meets V is the key norm's weight times q, and nothing where RoPE turns.
            w0 = tl.load(k_weight_ptr + column, mask=inside & (column >= R // 2), other=0.0).to(tl.float32)
            w1 = tl.load(k_weight_ptr + D // 2 + column, mask=inside & (column >= R // 2), other=0.0).to(tl.float32)
            first = (first.to(tl.float32) * w0).to(dtype)
            second = (second.to(tl.float32) * w1).to(dtype)
        q_out = q_out_ptr + head[:, None] * D + column
        tl.store(q_out, first, mask=inside)
        tl.store(q_out + D // 2, second, mask=inside)
    else:
        kv_head = head - HEADS
        first, second, square = head_halves(k_ptr, kv_head, kv_head >= 0, D, HALF)
        value0, value1, value_square = head_halves(v_ptr, kv_head, kv_head >= 0, D, HALF)
        first, second = rotated_halves(first, second, square, weight0, weight1, cos, sin, eps, dtype)
        slot = (kv_head.to(tl.int64) * S + tl.load(position_ptr) % S)[:, None]
        k_in = turned if FOLDED else inside
        _store_halves(k_cache_ptr, k_scale_ptr, slot, first, second, k_in, R, HALF, CODE_BITS)
        rms = tl.rsqrt(value_square + eps)[:, None]
        value0, value1 = (value0 * rms).to(dtype), (value1 * rms).to(dtype)
        _store_halves(v_cache_ptr, v_scale_ptr, slot, value0, value1, inside, D, HALF, CODE_BITS)
