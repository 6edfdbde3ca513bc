"""``decode.split`` for heads of 512, the 31B's full layers, in Gluon: a token there reads the whole cache.

On its way through shared memory, what ``decode.split`` converts is written there a second time, and that binds it, not
the memory. Here a tile lies there as it comes, by asynchronous copies a tile or more ahead, and every warp reads it twice,
straight into the registers of an operand (operands.py), converting on the way. Queries are columns, eight of them: the
31B's group needs no padding.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from gemma4cli.kernels.attention.operands import keys, natural, queries, values
from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.gluon import writes


def fits(head_dim: int, rotated: int, group: int, window: int) -> bool:
    """Whether ``split`` computes attention of these sizes."""
    return head_dim == 512 and rotated in (128, 256, 512) and group in (1, 2, 4, 8) and not window


@gluon.jit
def _keys(memory, W: gl.constexpr, NW: gl.constexpr, CODE_BITS: gl.constexpr, DOT: gl.constexpr, ASM: gl.constexpr):
    """A tile of shared memory, int32 [16 NW, W], as ``keys``."""
    CW: gl.constexpr = 8 if W >= 32 else W // 4
    BLOCKS: gl.constexpr = W // (4 * CW)
    LOAD: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, BLOCKS, 1, CW], [1, 1, 8, 1, 4, 1], [NW, 1, 1, 1, 1, 1], [5, 4, 2, 3, 1, 0]
    )
    return keys(memory.reshape([NW, 2, 8, BLOCKS, 4, CW]).load(LOAD), NW, BLOCKS, CW, CODE_BITS, DOT, ASM)


@gluon.jit
def _values(memory, W: gl.constexpr, NW: gl.constexpr, CODE_BITS: gl.constexpr, DOT: gl.constexpr, ASM: gl.constexpr):
    """A tile of shared memory, int32 [16 NW, W], as ``values``."""
    WD: gl.constexpr = min(4, W // (8 * NW))
    C: gl.constexpr = W // (8 * NW * WD)
    LOAD: gl.constexpr = gl.BlockedLayout(
        [NW, 2, 1, 2, C, 1, 1, WD], [1, 1, 4, 1, 1, 1, 8, 1], [1, 1, 1, 1, 1, NW, 1, 1], [7, 2, 6, 3, 4, 5, 1, 0]
    )
    return values(memory.reshape([NW, 2, 4, 2, C, NW, 8, WD]).load(LOAD), NW, C, WD, CODE_BITS, DOT, ASM)


@gluon.jit
def _queries(
    ptr, first, D: gl.constexpr, W: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, NW: gl.constexpr,
    CODE_BITS: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Rows `first` .. of queries [H, D] as ``queries``, for ``_keys`` of W words."""
    CW: gl.constexpr = 8 if W >= 32 else W // 4
    RUN: gl.constexpr = CW * (2 if CODE_BITS == 0 else 4)
    BLOCKS: gl.constexpr = D // (4 * RUN)
    L: gl.constexpr = gl.BlockedLayout([1, BLOCKS, 1, RUN], [8, 1, 4, 1], [NW, 1, 1, 1], [3, 2, 0, 1])
    n = gl.arange(0, N, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))[:, None, None, None]
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    run = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    dim = (block * 4 + t) * RUN + run
    x = gl.load(ptr + ((first + n) * D + dim), mask=(n < GROUP) & (dim >= 0), other=0.0).to(DOT)
    return queries(x, N, NW, BLOCKS, RUN, CODE_BITS)


@gluon.jit
def _halves(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr, AXIS: gl.constexpr, P: gl.constexpr):
    """Both halves of an operand along the dims: two products that do not wait for each other."""
    if AXIS == 1:
        first, second = gl.split(x.reshape([ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]))
    else:
        first, second = gl.split(x.reshape([2, ROWS // 2, COLUMNS]).permute([1, 2, 0]))
    return gl.convert_layout(first, P, assert_trivial=True), gl.convert_layout(second, P, assert_trivial=True)


@gluon.jit
def _scores(k, q, S: gl.constexpr, D: gl.constexpr, N: gl.constexpr, NW: gl.constexpr):
    """k [S, D] times q [D, N], operands: [S, N] float32."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    zero = gl.zeros([S, N], gl.float32, layout=MMA)
    if D < 256:
        return mma_v2(k, q, zero)
    else:
        k0, k1 = _halves(k, S, D, 1, gl.DotOperandLayout(0, MMA, 2))
        q0, q1 = _halves(q, D, N, 0, gl.DotOperandLayout(1, MMA, 2))
        return mma_v2(k0, q0, zero) + mma_v2(k1, q1, zero)


@gluon.jit
def _fetch(memory, ptr, position0, end, W: gl.constexpr, NW: gl.constexpr):
    """Ask for the words [16 NW, W] of positions from `position0` on, 0 from `end` on."""
    LANES: gl.constexpr = min(32, W // 4)
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [NW, 1], [1, 0])
    position = position0 + gl.arange(0, 16 * NW, layout=gl.SliceLayout(1, L))[:, None]
    word = gl.arange(0, W, layout=gl.SliceLayout(0, L))[None, :]
    inside = (position < end) & (word >= 0)
    async_copy.async_copy_global_to_shared(memory, ptr + (position * W + word), mask=inside)


@gluon.jit
def _load_scale(ptr, position, end):
    return gl.load(ptr + position, mask=position < end, other=0.0).to(gl.float32)


@writes("partial_ptr", "top_ptr", "total_ptr")
@gluon.jit
def split(
    q_ptr,
    r_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    position_ptr,
    partial_ptr,
    top_ptr,
    total_ptr,
    S,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    R: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    NW: gl.constexpr,
    FOLDED: gl.constexpr,
    CODE_BITS: gl.constexpr,
    DOT: gl.constexpr,
    ASM: gl.constexpr,
    PDL: gl.constexpr,
):
    """``decode.split`` without a window, for sizes that ``fits``: arguments and results as there.

    A program has NW warps, walks tiles of 16 NW positions, and asks for STAGES - 1 of them ahead.
    """
    BLOCK_S: gl.constexpr = 16 * NW
    N: gl.constexpr = 8  # columns of the smallest operand
    BITS: gl.constexpr = CODE_BITS if CODE_BITS > 0 else 16
    VW: gl.constexpr = D * BITS // 32  # 32-bit words of a vector
    KW: gl.constexpr = R * BITS // 32
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    # Of eight neighbouring rows, pieces of 16 bytes lie in eight orders: neither way of reading meets a bank twice.
    V_PHASES: gl.constexpr = min(8, VW // 4)
    K_PHASES: gl.constexpr = min(8, KW // 4)
    V_SHARED: gl.constexpr = gl.SwizzledSharedLayout(4, 8 // V_PHASES, V_PHASES, [1, 0])
    K_SHARED: gl.constexpr = gl.SwizzledSharedLayout(4, 8 // K_PHASES, K_PHASES, [1, 0])
    head = gl.program_id(0)
    share = gl.program_id(1)
    last = gl.load(position_ptr).to(gl.int32)
    length = gl.cdiv(gl.cdiv(last + 1, SPLITS), BLOCK_S) * BLOCK_S
    start = share * length
    end = gl.minimum(start + length, last + 1)
    n = gl.arange(0, N, layout=COLUMN)
    out = (head * GROUP + n) * SPLITS + share
    top = gl.full([N], float("-inf"), gl.float32, layout=COLUMN)
    if start >= end:  # nobody reads what an empty share has mixed
        wait_for_predecessor(PDL)
        start_successor(PDL)
        gl.store(top_ptr + out, top, mask=n < GROUP)
        gl.store(total_ptr + out, gl.full([N], 0.0, gl.float32, layout=COLUMN), mask=n < GROUP)
        return
    # One 64-bit base per head and 32-bit offsets inside it.
    base = head.to(gl.int64) * S
    k_ptr = k_ptr.to(gl.pointer_type(gl.int32)) + base * KW
    v_ptr = v_ptr.to(gl.pointer_type(gl.int32)) + base * VW
    v_memory = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_S, VW], V_SHARED)
    k_memory = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_S, KW], K_SHARED)
    # The newest position is the predecessor's to write, older ones nobody's.
    early = start + (STAGES - 1) * BLOCK_S <= last
    if not early:
        wait_for_predecessor(PDL)
    for stage in gl.static_range(STAGES - 1):
        _fetch(k_memory.index(stage), k_ptr, start + stage * BLOCK_S, end, KW, NW)
        _fetch(v_memory.index(stage), v_ptr, start + stage * BLOCK_S, end, VW, NW)
        async_copy.commit_group()
    if early:
        wait_for_predecessor(PDL)
    start_successor(PDL)
    q = _queries(q_ptr, head * GROUP, D, VW, GROUP, N, NW, CODE_BITS, DOT)
    if FOLDED:
        r = _queries(r_ptr, head * GROUP, R, KW, GROUP, N, NW, CODE_BITS, DOT)
    row = gl.arange(0, BLOCK_S, layout=ROW)
    if CODE_BITS > 0:
        k_scale = _load_scale(k_scale_ptr + base, start + row, end)
        v_scale = _load_scale(v_scale_ptr + base, start + row, end)
    total = gl.zeros([BLOCK_S, N], gl.float32, layout=MMA)
    acc = gl.zeros([D, N], gl.float32, layout=MMA)
    stage = 0
    for position0 in range(start, end, BLOCK_S):
        ahead = gl.where(stage == 0, STAGES - 1, stage - 1)
        next0 = position0 + (STAGES - 1) * BLOCK_S
        _fetch(k_memory.index(ahead), k_ptr, next0, end, KW, NW)
        _fetch(v_memory.index(ahead), v_ptr, next0, end, VW, NW)
        async_copy.commit_group()
        if CODE_BITS > 0:
            next_k_scale = _load_scale(k_scale_ptr + base, position0 + BLOCK_S + row, end)
            next_v_scale = _load_scale(v_scale_ptr + base, position0 + BLOCK_S + row, end)
        async_copy.wait_group(STAGES - 1)
        k = _keys(k_memory.index(stage), KW, NW, CODE_BITS, DOT, ASM)
        if FOLDED:
            turned = _scores(k, r, BLOCK_S, R, N, NW)
            v = _keys(v_memory.index(stage), VW, NW, CODE_BITS, DOT, ASM)
            scores = _scores(v, q, BLOCK_S, D, N, NW)
            if CODE_BITS > 0:
                scores = scores * v_scale[:, None] + turned * k_scale[:, None]
            else:
                scores = scores + turned
        else:
            scores = _scores(k, q, BLOCK_S, D, N, NW)
            if CODE_BITS > 0:
                scores = scores * k_scale[:, None]
        scores = gl.where((position0 + row < end)[:, None], scores, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, axis=0))
        keep = gl.exp(top - higher)
        weight = gl.exp(scores - higher[None, :])
        total = total * keep[None, :] + weight
        if CODE_BITS > 0:
            weight = weight * v_scale[:, None]
            k_scale = next_k_scale
            v_scale = next_v_scale
        weight = gl.convert_layout(weight.to(DOT), gl.DotOperandLayout(1, MMA, 2))
        tile = _values(v_memory.index(stage), VW, NW, CODE_BITS, DOT, ASM)
        acc = mma_v2(tile, weight, acc * keep[None, :])
        top = higher
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    gl.store(top_ptr + out, top, mask=n < GROUP)
    gl.store(total_ptr + out, gl.sum(total, axis=0), mask=n < GROUP)
    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [NW, 1], [0, 1])
    WD: gl.constexpr = min(4, VW // (8 * NW))
    C: gl.constexpr = VW // (8 * NW * WD)
    mixed = gl.convert_layout(natural(acc, N, NW, C, WD, CODE_BITS), OUT)
    dim = gl.arange(0, D, layout=gl.SliceLayout(1, OUT))[:, None]
    query = gl.arange(0, N, layout=gl.SliceLayout(0, OUT))[None, :]
    place = ((head * GROUP + query) * SPLITS + share) * D + dim
    gl.store(partial_ptr + place, mixed, mask=(query < GROUP) & (dim >= 0))
