"""A decoded token's attention over a sliding layer's ring, from raw projections to int8 activations, in Gluon.

One program has one KV head and one share of the window, 16 positions a warp. All their keys and values are on the way,
straight into the registers of the tensor cores' operands (attention/operands.py), before the program waits for the
projections. Each normalizes and rotates the head's queries for itself: that is less work than a launch. The newest
position is not read from the ring: the program whose share it belongs to makes its key and value, adds them at the end,
and writes them to the ring, where nobody else looks. The last of a head's programs to end merges the shares.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from gemma4cli.kernels.attention.operands import keys, natural, queries, values
from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.gluon import barrier, writes


def fits(head_dim: int, group: int, warps: int) -> bool:
    """Whether ``ring_attention`` computes heads and groups of these sizes with so many warps a program."""
    return head_dim & (head_dim - 1) == 0 and head_dim >= max(64, 16 * warps) and group in (1, 2, 4)


@gluon.jit
def _slot(position, first_slot, first, S):
    """Ring slots of positions from `first` on, whose slot is `first_slot`."""
    slot = first_slot + (position - first)
    return gl.where(slot < S, slot, slot - S)


@gluon.jit
def _key_words(ptr, start, end, S, D: gl.constexpr, NW: gl.constexpr):
    """Words of the keys at positions `start` .., 0 from `end` on, as ``operands.keys`` takes them."""
    W: gl.constexpr = D // 2
    CW: gl.constexpr = 4  # 16 bytes, of which four threads have 64 side by side
    BLOCKS: gl.constexpr = W // (4 * CW)
    L: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, BLOCKS, 1, CW], [1, 1, 8, 1, 4, 1], [NW, 1, 1, 1, 1, 1], [5, 4, 2, 3, 1, 0]
    )
    L5: gl.constexpr = gl.SliceLayout(5, L)
    L4: gl.constexpr = gl.SliceLayout(4, L5)
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    warp = gl.arange(0, NW, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None, None]
    eight = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :, None]
    one = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :]
    position = start + (warp * 16 + eight * 8 + one)
    position = position[:, :, :, None, None, None]
    M: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, gl.SliceLayout(2, M)))[:, None, None]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, M)))[None, :, None]
    w = gl.arange(0, CW, layout=gl.SliceLayout(0, gl.SliceLayout(1, M)))[None, None, :]
    word = ((block * 4 + t) * CW + w)[None, None, None, :, :, :]
    place = _slot(position, start % S, start, S) * W + word
    return gl.load(ptr + place, mask=(position < end) & (word >= 0), other=0)


@gluon.jit
def _value_words(ptr, start, end, S, D: gl.constexpr, NW: gl.constexpr):
    """Words of the values at positions `start` .., 0 from `end` on, as ``operands.values`` takes them."""
    W: gl.constexpr = D // 2
    WD: gl.constexpr = min(4, W // (8 * NW))
    C: gl.constexpr = W // (8 * NW * WD)
    L: gl.constexpr = gl.BlockedLayout(
        [NW, 2, 1, 2, C, 1, 1, WD], [1, 1, 4, 1, 1, 1, 8, 1], [1, 1, 1, 1, 1, NW, 1, 1], [7, 2, 6, 3, 4, 5, 1, 0]
    )
    P: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(6, gl.SliceLayout(7, L))))
    s = gl.arange(0, NW, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P))))[:, None, None, None]
    a = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, P))))[None, :, None, None]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, P))))[None, None, :, None]
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, P))))[None, None, None, :]
    position = start + (((s * 2 + a) * 4 + t) * 2 + pair)
    position = position[:, :, :, :, None, None, None, None]
    M: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    c = gl.arange(0, C, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, M))))[:, None, None, None]
    warp = gl.arange(0, NW, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, M))))[None, :, None, None]
    g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, M))))[None, None, :, None]
    w = gl.arange(0, WD, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, M))))[None, None, None, :]
    word = (((c * NW + warp) * 8 + g) * WD + w)[None, None, None, None, :, :, :, :]
    place = _slot(position, start % S, start, S) * W + word
    return gl.load(ptr + place, mask=(position < end) & (word >= 0), other=0)


@gluon.jit
def _merge(
    partial_ptr, top_ptr, total_ptr, xq_ptr, scale_ptr, sums_ptr, head,
    GROUP: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr, NW: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Merge the shares of a KV head's queries and write them as int8 rows, as ``quantize_rows`` does."""
    WARPS: gl.constexpr = min(NW, GROUP)
    L: gl.constexpr = gl.BlockedLayout([SPLITS, 1, 4], [1, 1, 32], [1, WARPS, NW // WARPS], [2, 1, 0])
    R: gl.constexpr = gl.SliceLayout(2, L)
    share = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, R))[:, None]
    query = head * GROUP + gl.arange(0, GROUP, layout=gl.SliceLayout(0, R))[None, :]
    row = query * SPLITS + share
    top = gl.load(top_ptr + row)
    total = gl.load(total_ptr + row)
    factor = gl.exp(top - gl.max(top, axis=0)[None, :])  # 0 for an empty share, of which nobody reads what it mixed
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    mask = (factor > 0)[:, :, None] & (dim >= 0)
    partial = gl.load(partial_ptr + (row[:, :, None] * D + dim), mask=mask, other=0.0)
    M: gl.constexpr = gl.SliceLayout(0, L)
    total = gl.convert_layout(gl.sum(total * factor, axis=0), gl.SliceLayout(1, M))
    mixed = gl.sum(partial * factor[:, :, None], axis=0) / total[:, None]
    GROUPS: gl.constexpr = GROUP * D // 32
    Q: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [NW, 1], [1, 0])
    x = gl.convert_layout(mixed.to(dtype).to(gl.float32).reshape([GROUPS, 32]), Q)
    scale = gl.max(gl.abs(x), axis=1) / 127.0
    inverse = gl.where(scale > 0, 1.0 / scale, 0.0)
    # Half to even: adding and subtracting 1.5 * 2^23 leaves the nearest integer.
    code = (x * inverse[:, None] + 12582912.0) - 12582912.0
    group = head * GROUPS + gl.arange(0, GROUPS, layout=gl.SliceLayout(1, Q))
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, Q))
    gl.store(xq_ptr.to(gl.pointer_type(gl.int8)) + (group[:, None] * 32 + column[None, :]), code.to(gl.int8))
    gl.store(scale_ptr + group, scale)
    gl.store(sums_ptr + group, scale * gl.sum(code, axis=1))


@writes(
    "k_cache_ptr",
    "v_cache_ptr",
    "arrived_ptr",
    "partial_ptr",
    "top_ptr",
    "total_ptr",
    "xq_ptr",
    "scale_ptr",
    "sums_ptr",
)
@gluon.jit
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
    WINDOW: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    SPLITS: gl.constexpr,
    NW: gl.constexpr,
    dtype: gl.constexpr,
    DOT: gl.constexpr,
    ASM: gl.constexpr,
    PDL: gl.constexpr,
):
    """reference.ring_attention, then ``quantize_rows``; SPLITS programs of NW warps a head, which see WINDOW positions.

    q [H * D], k, v [H_kv * D], cos, sin [D / 2] float32, caches [H_kv, S, D] bf16; partial [H, SPLITS, D], top and total
    [H, SPLITS] are scratch as in ``attention.decode.split``; arrived [H_kv] is zeros before and after.
    """
    TILE: gl.constexpr = 16 * NW
    gl.static_assert(SPLITS * TILE >= WINDOW)
    N: gl.constexpr = 8
    ROWS: gl.constexpr = 4 if GROUP <= 2 else 8  # the queries, the key, the value
    HALF: gl.constexpr = D // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    head = gl.program_id(0)
    share = gl.program_id(1)
    newest = gl.load(position_ptr).to(gl.int32)
    start = gl.maximum(newest - WINDOW + 1, 0) + share * TILE
    end = gl.minimum(start + TILE, newest)
    base = head.to(gl.int64) * S * D
    n = gl.arange(0, N, layout=COLUMN)
    out = (head * GROUP + n) * SPLITS + share
    # What no kernel of this step writes, while the predecessor ends: older positions and weights.
    k_words = _key_words(k_cache_ptr.to(gl.pointer_type(gl.int32)) + base // 2, start, end, S, D, NW)
    v_words = _value_words(v_cache_ptr.to(gl.pointer_type(gl.int32)) + base // 2, start, end, S, D, NW)
    # Rows of raw heads, one a warp: the head's queries, its key, its value.
    L: gl.constexpr = gl.BlockedLayout([1, 2, HALF // 32], [1, 1, 32], [NW, 1, 1], [2, 1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    column = gl.arange(0, HALF, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    dim = half * HALF + column
    is_q = (row < GROUP) & (dim >= 0)
    is_k = (row == GROUP) & (dim >= 0)
    is_v = (row == GROUP + 1) & (dim >= 0)
    weight = gl.load(q_weight_ptr + row * 0 + dim, mask=is_q, other=0.0).to(gl.float32)
    weight += gl.load(k_weight_ptr + row * 0 + dim, mask=is_k, other=0.0).to(gl.float32)
    weight = gl.where(is_v, 1.0, weight)
    wait_for_predecessor(PDL)
    start_successor(PDL)
    if start > newest:
        gl.store(top_ptr + out, gl.full([N], float("-inf"), gl.float32, layout=COLUMN), mask=n < GROUP)
        gl.store(total_ptr + out, gl.full([N], 0.0, gl.float32, layout=COLUMN), mask=n < GROUP)
    else:
        x = gl.load(q_ptr + ((head * GROUP + row) * D + dim), mask=is_q, other=0.0).to(gl.float32)
        x += gl.load(k_ptr + (head * D + row * 0 + dim), mask=is_k, other=0.0).to(gl.float32)
        x += gl.load(v_ptr + (head * D + row * 0 + dim), mask=is_v, other=0.0).to(gl.float32)
        cos = gl.load(cos_ptr + column)
        sin = gl.load(sin_ptr + column)
        square = gl.sum(gl.sum(x * x, axis=2), axis=1) / D
        x = (x * gl.rsqrt(square + eps)[:, None, None] * weight).to(dtype).to(gl.float32)
        first, second = gl.split(x.permute([0, 2, 1]))
        other = gl.convert_layout(gl.join(second, first).permute([0, 2, 1]), L, assert_trivial=True)
        turned = x * cos + gl.where(half == 0, -other, other) * sin
        x = gl.where(is_v, x, turned).to(dtype).to(k_cache_ptr.dtype.element_ty)
        mine = newest < start + TILE
        place = base + (newest % S) * D + row * 0 + dim
        gl.store(k_cache_ptr + place, x, mask=is_k & mine)
        gl.store(v_cache_ptr + place, x, mask=is_v & mine)
        # To all warps: the queries as an operand, the newest key and value.
        memory = gl.allocate_shared_memory(x.dtype, [N, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        memory.slice(0, ROWS, 0).store(x.reshape([ROWS, D]))
        RUN: gl.constexpr = 8
        BLOCKS: gl.constexpr = D // (4 * RUN)
        LQ: gl.constexpr = gl.BlockedLayout([1, BLOCKS, 1, RUN], [8, 1, 4, 1], [NW, 1, 1, 1], [3, 2, 0, 1])
        q = queries(memory.reshape([N, BLOCKS, 4, RUN]).load(LQ).to(DOT), N, NW, BLOCKS, RUN, 0)
        LN: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [NW, 1], [1, 0])
        newest_key = memory.slice(GROUP, 1, 0).load(LN).to(gl.float32)
        newest_score = gl.sum(memory.load(LN).to(gl.float32) * newest_key, axis=1)
        newest_score = gl.where(mine, gl.convert_layout(newest_score, COLUMN), float("-inf"))
        k = keys(k_words, NW, BLOCKS, 4, 0, DOT, ASM)
        scores = mma_v2(k, q, gl.zeros([TILE, N], gl.float32, layout=MMA))
        position = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
        scores = gl.where((position < end)[:, None], scores, float("-inf"))
        top = gl.maximum(gl.max(scores, axis=0), newest_score)
        scores = gl.exp(scores - top[None, :])
        newest_score = gl.exp(newest_score - top)
        gl.store(top_ptr + out, top, mask=n < GROUP)
        gl.store(total_ptr + out, gl.sum(scores, axis=0) + newest_score, mask=n < GROUP)
        WD: gl.constexpr = min(4, D // (16 * NW))
        C: gl.constexpr = D // (16 * NW * WD)
        v = values(v_words, NW, C, WD, 0, DOT, ASM)
        weights = gl.convert_layout(scores.to(DOT), gl.DotOperandLayout(1, MMA, 2))
        acc = mma_v2(v, weights, gl.zeros([D, N], gl.float32, layout=MMA))
        OUT: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [NW, 1], [0, 1])
        mixed = gl.convert_layout(natural(acc, N, NW, C, WD, 0), OUT)
        newest_value = memory.slice(GROUP + 1, 1, 0).permute([1, 0]).load(OUT).to(gl.float32)
        mixed += newest_value * gl.convert_layout(newest_score, gl.SliceLayout(0, OUT))[None, :]
        d = gl.arange(0, D, layout=gl.SliceLayout(1, OUT))[:, None]
        query = gl.arange(0, N, layout=gl.SliceLayout(0, OUT))[None, :]
        place = ((head * GROUP + query) * SPLITS + share) * D + d
        gl.store(partial_ptr + place, mixed, mask=(query < GROUP) & (d >= 0))
    barrier()  # all warps have written before the program counts itself
    if gl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
        gl.store(arrived_ptr + head, 0)
        _merge(partial_ptr, top_ptr, total_ptr, xq_ptr, scale_ptr, sums_ptr, head, GROUP, D, SPLITS, NW, dtype)
