"""A chunk of query tokens against the cache they were just written to: causal, one pass, blocks above the diagonal
skipped.

Reads the same caches as ``decode.split`` (see there). The query heads that share a KV head are rows of one tile, so
each key is loaded once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.attention.decode import _halves, _products, _scale, _slots


@triton.jit
def _query_half(ptr, head, token, row_in, T, D: tl.constexpr, SECOND: tl.constexpr, WIDTH: tl.constexpr):
    """Load one half of queries [H, T, D] for row-wise (head, token): [ROWS, WIDTH]."""
    column = tl.arange(0, WIDTH)
    mask = row_in[:, None] & (column < D // 2)[None, :]
    address = (head.to(tl.int64) * T + token)[:, None] * D + SECOND * (D // 2) + column[None, :]
    return tl.load(ptr + address, mask=mask, other=0.0)


@triton.jit
def attend(
    q_ptr,
    r_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    position_ptr,
    out_ptr,
    T,
    S,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    R_HALF: tl.constexpr,
    FOLDED: tl.constexpr,
    TQ4: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
):
    """out [H, T, D] = attention of q [H, T, D] (and r [H, T, R]) at the consecutive positions `position` [T].

    A program owns ROWS = tokens * GROUP rows of one KV head.
    """
    kv_head = tl.program_id(1)
    TOKENS: tl.constexpr = ROWS // GROUP
    token0 = tl.program_id(0) * TOKENS
    row = tl.arange(0, ROWS)
    token = token0 + row // GROUP
    row_in = token < T
    head = kv_head * GROUP + row % GROUP
    base = tl.load(position_ptr).to(tl.int32)
    query = base + token
    last = base + tl.minimum(token0 + TOKENS, T) - 1
    first = tl.maximum(base + token0 - WINDOW + 1, 0) if WINDOW > 0 else 0
    q0 = _query_half(q_ptr, head, token, row_in, T, D, 0, HALF).to(DOT)
    q1 = _query_half(q_ptr, head, token, row_in, T, D, 1, HALF).to(DOT)
    if FOLDED:
        r0 = _query_half(r_ptr, head, token, row_in, T, R, 0, R_HALF).to(DOT)
        r1 = _query_half(r_ptr, head, token, row_in, T, R, 1, R_HALF).to(DOT)
    top = tl.full([ROWS], -1e38, tl.float32)  # not -inf: a row may see nothing of the first block of its window
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, HALF], tl.float32)
    acc1 = tl.zeros([ROWS, HALF], tl.float32)
    for position0 in range(first, last + 1, BLOCK_S):
        position = position0 + tl.arange(0, BLOCK_S)
        inside = position <= last
        slot = _slots(position0, S, WINDOW, BLOCK_S)
        v0, v1 = _halves(v_ptr, kv_head, slot, inside, S, D, HALF, TQ4, DOT, ASM)
        k0, k1 = _halves(k_ptr, kv_head, slot, inside, S, R, R_HALF, TQ4, DOT, ASM)
        if TQ4:
            k_scale = _scale(k_scale_ptr, kv_head, slot, inside, S)[None, :]
            v_scale = _scale(v_scale_ptr, kv_head, slot, inside, S)[None, :]
        if FOLDED:
            scores, turned = _products(q0, q1, v0, v1), _products(r0, r1, k0, k1)
            scores = scores * v_scale + turned * k_scale if TQ4 else scores + turned
        else:
            scores = _products(q0, q1, k0, k1)
            scores = scores * k_scale if TQ4 else scores
        seen = inside[None, :] & (position[None, :] <= query[:, None])
        if WINDOW > 0:
            seen = seen & (query[:, None] - position[None, :] < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp(top - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        if TQ4:
            weight *= v_scale
        acc0 = tl.dot(weight.to(DOT), v0, acc0 * keep[:, None], input_precision="ieee")
        acc1 = tl.dot(weight.to(DOT), v1, acc1 * keep[:, None], input_precision="ieee")
        top = higher
    column = tl.arange(0, HALF)
    mask = row_in[:, None] & (column < D // 2)[None, :]
    # One 64-bit base and 32-bit offsets inside the KV head: a tile of 64-bit addresses would not fit the registers.
    offset = (row % GROUP * T + token)[:, None] * D + column[None, :]
    address = out_ptr + kv_head.to(tl.int64) * GROUP * T * D + offset
    inverse = 1.0 / total
    tl.store(address, (acc0 * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(address + D // 2, (acc1 * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
