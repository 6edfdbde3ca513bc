"""A chunk of query tokens against the cache they were just written to: causal, one pass, blocks above the diagonal
skipped.

Reads the same caches as ``decode.split`` (see there). The query heads that share a KV head are rows of one tile, so
each key is loaded once for all of them. A step takes BLOCK_S positions through two products, scores and weighted
values, and is written so that Triton 3.7 shares both evenly among the warps of Hopper:

    Triton gives a product whose result reaches another product all its columns in every warpgroup: with 64 rows, two
    warpgroups would each compute all scores. So several products of a score are added scaled, not chained; and the
    mask sits in a branch between scores and weights, which hides the one product from the other. (The branch is worth
    having for itself: only steps on the diagonal or at the window's edge are masked.)

Positions past the last one repeat the last one's slot, where a mask on loads would cost registers: causality gives
them no weight. Numbers are read as whole vectors; codes as two halves, as ``decode`` does. With AHEAD a
folded cache's K_r comes a step ahead into registers, not shared memory: Hopper then has room for 64 positions of V twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.attention.decode import load_halves, load_scale

_LOG2_E = tl.constexpr(1.4426950408889634)  # scores are kept in base 2: the exponential is then one instruction


@triton.jit
def _query(ptr, head, token, T, D: tl.constexpr, START: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load columns START .. START + COLUMNS - 1 of queries [H, T, D], zeros up to WIDTH: [ROWS, WIDTH]."""
    column = tl.arange(0, WIDTH)
    address = ptr + (head.to(tl.int64) * T + token)[:, None] * D + START + column[None, :]
    if WIDTH == COLUMNS:
        return tl.load(address)
    else:
        return tl.load(address, mask=(column < COLUMNS)[None, :], other=0.0)


@triton.jit
def _slots_to(last, position0, S, WINDOW: tl.constexpr, BLOCK_S: tl.constexpr):
    """Slots of BLOCK_S positions from `position0` on, the slot of `last` for those past it."""
    position0 = tl.minimum(position0, last)
    step = tl.minimum(tl.arange(0, BLOCK_S), last - position0)
    if WINDOW == 0:
        return position0 + step
    slot = position0 % S + step
    return tl.where(slot < S, slot, slot - S)


@triton.jit
def _load(ptr, slot, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load the vectors in the given slots of [S, D]: [BLOCK_S, WIDTH], zeros from D on."""
    column = tl.arange(0, WIDTH)
    address = ptr + (slot[:, None] * D + column[None, :])
    if WIDTH == D:
        return tl.load(address)
    else:
        return tl.load(address, mask=(column < D)[None, :], other=0.0)


@triton.jit
def _fetch(ptr, slot, D: tl.constexpr, WIDTH: tl.constexpr):
    """``_load`` for a later step: 16-bit values in pairs, since a loop carries each in a register of its own."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        return _load(ptr.to(tl.pointer_type(tl.int32)), slot, D // 2, WIDTH // 2)
    else:
        return _load(ptr, slot, D, WIDTH)


@triton.jit
def _fetched(words, dtype: tl.constexpr):
    """What ``_fetch`` loaded, as `dtype`."""
    if dtype.primitive_bitwidth == 16:
        pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        return tl.reshape(pairs, [words.shape[0], 2 * words.shape[1]]).to(dtype, bitcast=True)
    else:
        return words


@triton.jit
def _product(a, b):
    """a b^T: [ROWS, BLOCK_S] float32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


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
    CODE_BITS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr = False,
):
    """out [H, T, D] = attention of q [H, T, D] (and r [H, T, R]) at the consecutive positions `position` [T].

    A program owns ROWS = tokens * GROUP rows of one KV head. AHEAD: fetch a folded cache's K_r a step ahead.
    """
    kv_head = tl.program_id(1)
    TOKENS: tl.constexpr = ROWS // GROUP
    PARTS: tl.constexpr = 2 if CODE_BITS else 1  # in which vectors come
    WIDTH: tl.constexpr = 2 * HALF // PARTS
    R_WIDTH: tl.constexpr = 2 * R_HALF // PARTS
    token0 = tl.program_id(0) * TOKENS
    row = tl.arange(0, ROWS)
    token = token0 + row // GROUP
    row_in = token < T
    head = kv_head * GROUP + row % GROUP
    base = tl.load(position_ptr).to(tl.int32)
    query = base + token
    last = base + tl.minimum(token0 + TOKENS, T) - 1
    first = tl.maximum(base + token0 - WINDOW + 1, 0) if WINDOW > 0 else 0
    source = tl.where(row_in, token, 0)  # rows past the last token repeat the first and are not stored
    q0 = _query(q_ptr, head, source, T, D, 0, D // PARTS, WIDTH).to(DOT)
    if FOLDED:
        r0 = _query(r_ptr, head, source, T, R, 0, R // PARTS, R_WIDTH).to(DOT)
    top = tl.full([ROWS], -1e38, tl.float32)  # not -inf: a row may see nothing of the first block of its window
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, WIDTH], tl.float32)
    if CODE_BITS:
        q1 = _query(q_ptr, head, source, T, D, D // 2, D // 2, WIDTH).to(DOT)
        if FOLDED:
            r1 = _query(r_ptr, head, source, T, R, R // 2, R // 2, R_WIDTH).to(DOT)
        acc1 = tl.zeros([ROWS, WIDTH], tl.float32)
        all_in = tl.full([BLOCK_S], 1, tl.int1)
    else:
        k_ptr += kv_head.to(tl.int64) * S * R
        v_ptr += kv_head.to(tl.int64) * S * D
        if AHEAD:
            ahead = _fetch(k_ptr, _slots_to(last, first, S, WINDOW, BLOCK_S), R, R_WIDTH)
    for position0 in range(first, last + 1, BLOCK_S):
        slot = _slots_to(last, position0, S, WINDOW, BLOCK_S)
        if CODE_BITS:
            k0, k1 = load_halves(k_ptr, kv_head, slot, all_in, S, R, R_WIDTH, CODE_BITS, DOT, ASM)
            v0, v1 = load_halves(v_ptr, kv_head, slot, all_in, S, D, WIDTH, CODE_BITS, DOT, ASM)
            k_unit = load_scale(k_scale_ptr, kv_head, slot, all_in, S)[None, :] * _LOG2_E
            v_unit = load_scale(v_scale_ptr, kv_head, slot, all_in, S)[None, :] * _LOG2_E
        else:
            v0 = _load(v_ptr, slot, D, WIDTH).to(DOT)
            if AHEAD:
                k0 = _fetched(ahead, k_ptr.dtype.element_ty).to(DOT)
            else:
                k0 = _load(k_ptr, slot, R, R_WIDTH).to(DOT)
            k_unit = _LOG2_E
            v_unit = _LOG2_E
        # A score's products are scaled and added, and the mask stands in a branch: see the module's first lines.
        scores = _product(r0 if FOLDED else q0, k0) * k_unit
        if CODE_BITS:
            scores += _product(r1 if FOLDED else q1, k1) * k_unit
        if FOLDED:
            scores += _product(q0, v0) * v_unit
            if CODE_BITS:
                scores += _product(q1, v1) * v_unit
            elif AHEAD:
                ahead = _fetch(k_ptr, _slots_to(last, position0 + BLOCK_S, S, WINDOW, BLOCK_S), R, R_WIDTH)
        hidden = position0 + BLOCK_S - 1 > base + token0
        if WINDOW > 0:
            hidden = hidden | (base + token0 + TOKENS - 1 - position0 >= WINDOW)
        if hidden:
            position = position0 + tl.arange(0, BLOCK_S)
            seen = position[None, :] <= query[:, None]
            if WINDOW > 0:
                seen = seen & (query[:, None] - position[None, :] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp2(top - higher)
        weight = tl.exp2(scores - higher[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        if CODE_BITS:
            weight *= v_unit
        weight = weight.to(DOT)
        acc0 = tl.dot(weight, v0, acc0 * keep[:, None], input_precision="ieee")
        if CODE_BITS:
            acc1 = tl.dot(weight, v1, acc1 * keep[:, None], input_precision="ieee")
        top = higher
    column = tl.arange(0, WIDTH)
    mask = row_in[:, None]
    if WIDTH * PARTS != D:
        mask = mask & (column < D // PARTS)[None, :]
    # One 64-bit base and 32-bit offsets inside the KV head: a tile of 64-bit addresses would not fit the registers.
    offset = (row % GROUP * T + token)[:, None] * D + column[None, :]
    address = out_ptr + kv_head.to(tl.int64) * GROUP * T * D + offset
    inverse = (1.0 / _LOG2_E if CODE_BITS else 1.0) / total  # weights of codes were scaled by v_unit
    tl.store(address, (acc0 * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    if CODE_BITS:
        tl.store(address + D // 2, (acc1 * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
