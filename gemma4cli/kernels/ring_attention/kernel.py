"""A decoded token's attention over a sliding layer's ring, from raw projections to int8 activations.

One program has one KV head and one share of the window, as in ``attention.decode``. Each normalizes and rotates the
head's queries for itself: that is less work than a launch. The newest position is not read from the ring: the program
of the first share makes its key and value, begins with them, and writes them to the ring, where nobody else looks.
The last of a head's programs to end merges the shares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.attention.decode import block_slots, load_halves, merge_shares, products
from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.head_rope.kernel import head_halves, rotated_halves, weight_halves
from gemma4cli.kernels.quantized_matmul.decode import write_int8


@triton.jit
def _block(
    k_ptr, v_ptr, head, position0, end, S,
    WINDOW: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_S: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Both halves of the keys and of the values of BLOCK_S positions, 0 from `end` on."""
    inside = position0 + tl.arange(0, BLOCK_S) < end
    slot = block_slots(position0, S, WINDOW, BLOCK_S)
    k0, k1 = load_halves(k_ptr, head, slot, inside, S, D, HALF, False, DOT, False)
    v0, v1 = load_halves(v_ptr, head, slot, inside, S, D, HALF, False, DOT, False)
    return k0, k1, v0, v1


@triton.jit
def _attend(
    q0, q1, k0, k1, v0, v1, position0, end, top, total, acc0, acc1, BLOCK_S: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """A step of the online softmax; a share may be empty, and its largest score then stays -inf."""
    inside = position0 + tl.arange(0, BLOCK_S) < end
    scores = tl.where(inside[None, :], products(q0, q1, k0, k1), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher > float("-inf"), higher, 0.0)
    keep = tl.exp(top - base)
    weight = tl.exp(scores - base[:, None])
    total = total * keep + tl.sum(weight, axis=1)
    acc0 = tl.dot(weight.to(DOT), v0, acc0 * keep[:, None], input_precision="ieee")
    acc1 = tl.dot(weight.to(DOT), v1, acc1 * keep[:, None], input_precision="ieee")
    return higher, total, acc0, acc1


@triton.jit
def ring_attention(
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
    arrived_ptr,
    partial_ptr,
    top_ptr,
    total_ptr,
    xq_ptr,
    scale_ptr,
    sums_ptr,
    eps,
    S,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
    dtype: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """reference.ring_attention, then ``quantize_rows``.

    q [H * D], k, v [H_kv * D], cos, sin [D / 2] float32, caches [H_kv, S, D]; partial [H, SPLITS, D], top and total
    [H, SPLITS] are scratch as in ``attention.decode.split``; arrived [H_kv] is zeros before and after.
    """
    head = tl.program_id(0)
    share = tl.program_id(1)
    # What no kernel of this step writes, while the predecessor ends: older positions and weights.
    newest = tl.load(position_ptr).to(tl.int32)
    first = tl.maximum(newest - WINDOW + 1, 0)
    length = tl.cdiv(tl.cdiv(newest - first, SPLITS), BLOCK_S) * BLOCK_S
    start = first + share * length
    end = tl.minimum(start + length, newest)
    k0, k1, v0, v1 = _block(k_cache_ptr, v_cache_ptr, head, start, end, S, WINDOW, D, HALF, BLOCK_S, DOT)
    column = tl.arange(0, HALF)[None, :]
    q_weight0, q_weight1 = weight_halves(q_weight_ptr, D, HALF)
    k_weight0, k_weight1 = weight_halves(k_weight_ptr, D, HALF)
    wait_for_predecessor(PDL)
    start_successor(PDL)
    cos = tl.load(cos_ptr + column, mask=column < D // 2, other=0.0)
    sin = tl.load(sin_ptr + column, mask=column < D // 2, other=0.0)
    row = tl.arange(0, ROWS)
    rows = head * GROUP + row
    rows_in = row < GROUP
    # The newest position, which belongs to the first share: its score and value are what that share starts from.
    one = head + tl.arange(0, 1)
    is_first = (one >= 0) & (share == 0)
    query0, query1, query_square = head_halves(q_ptr, rows, rows_in, D, HALF)
    key0, key1, key_square = head_halves(k_ptr, one, is_first, D, HALF)
    value0, value1, value_square = head_halves(v_ptr, one, is_first, D, HALF)
    q0, q1 = rotated_halves(query0, query1, query_square, q_weight0, q_weight1, cos, sin, eps, dtype)
    q0, q1 = q0.to(DOT), q1.to(DOT)
    key0, key1 = rotated_halves(key0, key1, key_square, k_weight0, k_weight1, cos, sin, eps, dtype)
    cache = k_cache_ptr.dtype.element_ty
    rms = tl.rsqrt(value_square + eps)[:, None]
    key0, key1 = key0.to(cache), key1.to(cache)
    value0, value1 = (value0 * rms).to(dtype).to(cache), (value1 * rms).to(dtype).to(cache)
    written = is_first[:, None] & (column < D // 2)
    place = (head.to(tl.int64) * S + newest % S) * D + column
    tl.store(k_cache_ptr + place, key0, mask=written)
    tl.store(k_cache_ptr + place + D // 2, key1, mask=written)
    tl.store(v_cache_ptr + place, value0, mask=written)
    tl.store(v_cache_ptr + place + D // 2, value1, mask=written)
    turned = q0.to(tl.float32) * key0.to(DOT).to(tl.float32) + q1.to(tl.float32) * key1.to(DOT).to(tl.float32)
    top = tl.where(share == 0, tl.sum(turned, axis=1), float("-inf"))
    total = tl.where(share == 0, tl.full([ROWS], 1.0, tl.float32), 0.0)
    acc0 = tl.broadcast_to(value0.to(DOT).to(tl.float32), [ROWS, HALF])
    acc1 = tl.broadcast_to(value1.to(DOT).to(tl.float32), [ROWS, HALF])
    top, total, acc0, acc1 = _attend(q0, q1, k0, k1, v0, v1, start, end, top, total, acc0, acc1, BLOCK_S, DOT)
    for position0 in range(start + BLOCK_S, end, BLOCK_S):
        k0, k1, v0, v1 = _block(k_cache_ptr, v_cache_ptr, head, position0, end, S, WINDOW, D, HALF, BLOCK_S, DOT)
        top, total, acc0, acc1 = _attend(q0, q1, k0, k1, v0, v1, position0, end, top, total, acc0, acc1, BLOCK_S, DOT)
    out = rows * SPLITS + share
    tl.store(top_ptr + out, top, mask=rows_in)
    tl.store(total_ptr + out, total, mask=rows_in)
    mask = rows_in[:, None] & (column < D // 2)
    address = partial_ptr + out[:, None].to(tl.int64) * D + column
    tl.store(address, acc0, mask=mask)
    tl.store(address + D // 2, acc1, mask=mask)
    tl.debug_barrier()  # all warps have written before the program counts itself
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived_ptr + head, 0)
        WIDTH: tl.constexpr = 2 * HALF
        wide = tl.arange(0, WIDTH)
        group = tl.arange(0, WIDTH // 32)
        for index in tl.static_range(GROUP):
            one_head = (head * GROUP + index).to(tl.int64)
            x = merge_shares(partial_ptr, top_ptr, total_ptr, one_head, wide, D, SPLITS)
            x = tl.reshape(tl.where(wide < D, x, 0.0).to(dtype).to(tl.float32), [WIDTH // 32, 32])
            write_int8(x, 0, one_head * (D // 32) + group, group < D // 32, xq_ptr, scale_ptr, sums_ptr, 32)
