"""One query token against a long cache, the cache read once: split over the context, then combined.

A cache is one of four kinds, all read by the same kernel:

    plain    scores = q . K                       values V
    folded   scores = q_v . V + q_r . K_r         values V      (layers whose K and V share a projection: reference.py)
    tq4      each vector as 4-bit codes of a rotated unit vector times a scale (turboquant.py); the query comes rotated

Vectors are read as two halves, dims 0 .. D/2 - 1 and D/2 .. D - 1: the two nibbles of a 4-bit code's byte. Positions,
not slots, are walked, from the first the window shows to the last written, so cost follows the context and never the
allocation, and a slot that was never written is never read. The position is read on the device: a captured graph stays
right as it grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.quantized_matmul.decode import write_int8


@triton.jit
def _slots(position0, S, WINDOW: tl.constexpr, BLOCK_S: tl.constexpr):
    """Slots of BLOCK_S positions from `position0` on. In a ring, one division of scalars instead of one per slot."""
    if WINDOW == 0:
        return position0 + tl.arange(0, BLOCK_S)
    slot = position0 % S + tl.arange(0, BLOCK_S)
    return tl.where(slot < S, slot, slot - S)


@triton.jit
def _half(
    ptr, scale_ptr, table_ptr, head, slot, inside,
    S, D: tl.constexpr, SECOND: tl.constexpr, WIDTH: tl.constexpr, TQ4: tl.constexpr,
):  # fmt: skip
    """Load one half of the vectors in the given slots: [BLOCK_S, WIDTH], float32 if TQ4; WIDTH >= D / 2, the rest 0.

    One 64-bit base per head and 32-bit offsets inside it: a head's cache has fewer than 2^31 values.
    """
    HALF: tl.constexpr = D // 2
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < HALF)[None, :]
    base = head.to(tl.int64) * S
    if TQ4:
        packed = tl.load(ptr + base * HALF + (slot[:, None] * HALF + column[None, :]), mask=mask, other=0)
        code = (packed.to(tl.int32) >> (4 * SECOND)) & 15
        scale = tl.load(scale_ptr + base + slot, mask=inside, other=0.0).to(tl.float32)
        return tl.where(mask, tl.load(table_ptr + code) * scale[:, None], 0.0)
    else:
        return tl.load(ptr + base * D + (slot[:, None] * D + SECOND * HALF + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _query_half(ptr, rows, rows_in, D: tl.constexpr, SECOND: tl.constexpr, WIDTH: tl.constexpr):
    """Load one half of the query vectors `rows`: [ROWS, WIDTH]."""
    column = tl.arange(0, WIDTH)
    mask = rows_in[:, None] & (column < D // 2)[None, :]
    address = rows[:, None].to(tl.int64) * D + SECOND * (D // 2) + column[None, :]
    return tl.load(ptr + address, mask=mask, other=0.0)


@triton.jit
def split(
    q_ptr,
    r_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    table_ptr,
    position_ptr,
    partial_ptr,
    top_ptr,
    total_ptr,
    S,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    R_HALF: tl.constexpr,
    FOLDED: tl.constexpr,
    TQ4: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Attention of one KV head's query group over one share of the positions.

    q [H, D]; plain: k [H_kv, S, D]; folded: k is K_r [H_kv, S, R] and r the query's part for it [H, R]; v [H_kv, S, D]
    (4-bit: half as many bytes, scales [H_kv, S]). Writes partial [H, SPLITS, D] (not normalized), top [H, SPLITS]
    (largest score, -inf for an empty share) and total [H, SPLITS] (sum of exponentials).
    """
    wait_for_predecessor(PDL)
    start_successor(PDL)
    head = tl.program_id(0)
    share = tl.program_id(1)
    last = tl.load(position_ptr).to(tl.int32)
    first = tl.maximum(last - WINDOW + 1, 0) if WINDOW > 0 else 0
    length = tl.cdiv(tl.cdiv(last - first + 1, SPLITS), BLOCK_S) * BLOCK_S
    start = first + share * length
    end = tl.minimum(start + length, last + 1)
    row = tl.arange(0, ROWS)
    rows = head * GROUP + row
    rows_in = row < GROUP
    q0 = _query_half(q_ptr, rows, rows_in, D, 0, HALF).to(DOT)
    q1 = _query_half(q_ptr, rows, rows_in, D, 1, HALF).to(DOT)
    if FOLDED:
        r0 = _query_half(r_ptr, rows, rows_in, R, 0, R_HALF).to(DOT)
        r1 = _query_half(r_ptr, rows, rows_in, R, 1, R_HALF).to(DOT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, HALF], tl.float32)
    acc1 = tl.zeros([ROWS, HALF], tl.float32)
    for position0 in range(start, end, BLOCK_S):
        position = position0 + tl.arange(0, BLOCK_S)
        inside = position < end
        slot = _slots(position0, S, WINDOW, BLOCK_S)
        v0 = _half(v_ptr, v_scale_ptr, table_ptr, head, slot, inside, S, D, 0, HALF, TQ4).to(DOT)
        v1 = _half(v_ptr, v_scale_ptr, table_ptr, head, slot, inside, S, D, 1, HALF, TQ4).to(DOT)
        if FOLDED:
            scores = tl.dot(q0, tl.trans(v0), input_precision="ieee")
            scores = tl.dot(q1, tl.trans(v1), scores, input_precision="ieee")
            k0 = _half(k_ptr, k_scale_ptr, table_ptr, head, slot, inside, S, R, 0, R_HALF, TQ4).to(DOT)
            k1 = _half(k_ptr, k_scale_ptr, table_ptr, head, slot, inside, S, R, 1, R_HALF, TQ4).to(DOT)
            scores = tl.dot(r0, tl.trans(k0), scores, input_precision="ieee")
            scores = tl.dot(r1, tl.trans(k1), scores, input_precision="ieee")
        else:
            k0 = _half(k_ptr, k_scale_ptr, table_ptr, head, slot, inside, S, D, 0, HALF, TQ4).to(DOT)
            k1 = _half(k_ptr, k_scale_ptr, table_ptr, head, slot, inside, S, D, 1, HALF, TQ4).to(DOT)
            scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp(top - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        acc0 = tl.dot(weight.to(DOT), v0, acc0 * keep[:, None], input_precision="ieee")
        acc1 = tl.dot(weight.to(DOT), v1, acc1 * keep[:, None], input_precision="ieee")
        top = higher
    out = rows * SPLITS + share
    tl.store(top_ptr + out, top, mask=rows_in)
    tl.store(total_ptr + out, total, mask=rows_in)
    column = tl.arange(0, HALF)
    mask = rows_in[:, None] & (column < D // 2)[None, :]
    address = partial_ptr + out[:, None].to(tl.int64) * D + column[None, :]
    tl.store(address, acc0, mask=mask)
    tl.store(address + D // 2, acc1, mask=mask)


@triton.jit
def _mixed(partial_ptr, top_ptr, total_ptr, head, column, D: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the shares of a head: sum partial e^(top - max) / sum total e^(top - max), float32 at `column`."""
    share = tl.arange(0, SPLITS)
    top = tl.load(top_ptr + head * SPLITS + share)
    total = tl.load(total_ptr + head * SPLITS + share)
    factor = tl.exp(top - tl.max(top, axis=0))  # 0 for an empty share
    # Empty shares hold zeros that need not be read: long allocations with short contexts have many.
    mask = (factor > 0)[:, None] & (column < D)[None, :]
    partial = tl.load(partial_ptr + (head * SPLITS + share)[:, None] * D + column[None, :], mask=mask, other=0.0)
    return tl.sum(partial * factor[:, None], axis=0) / tl.sum(total * factor, axis=0)


@triton.jit
def combine(
    partial_ptr, top_ptr, total_ptr, out_ptr,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Merge the shares of head `program_id(0)`: out [H, D]."""
    wait_for_predecessor(PDL)
    start_successor(PDL)
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixed = _mixed(partial_ptr, top_ptr, total_ptr, head, column, D, SPLITS)
    tl.store(out_ptr + head * D + column, mixed.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def combine_int8(
    partial_ptr, top_ptr, total_ptr, xq_ptr, scale_ptr, sums_ptr,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """``combine`` rounded to `dtype`, then to int8 as ``quantize_rows`` does: one row of H * D activations."""
    wait_for_predecessor(PDL)
    start_successor(PDL)
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixed = _mixed(partial_ptr, top_ptr, total_ptr, head, column, D, SPLITS)
    x = tl.reshape(tl.where(column < D, mixed, 0.0).to(dtype).to(tl.float32), [BLOCK_D // 32, 32])
    local = tl.program_id(1) * (BLOCK_D // 32) + tl.arange(0, BLOCK_D // 32)
    write_int8(x, 0, head * (D // 32) + local, local < D // 32, xq_ptr, scale_ptr, sums_ptr, 32)
