"""4- and 6-bit weights times a few int8 activation rows: the memory-bound product of decoding.

Written in Gluon, Triton's language in which layouts are the author's: a warp reads 16 blocks of 64 columns of a row at a
time, 512 bytes of codes, and each of its threads keeps half a block to itself from the load to the end of the row. So
nothing goes from thread to thread inside the loop; Triton of itself moves scales to where the codes are by shuffles.
Codes are read as 32-bit words and multiplied with `dp4a` (four int8 products a lane); sums meet their scales once a block.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.gluon import writes
from gemma4cli.kernels.quantized_matmul.words import signed_byte, subtract_from_bytes

BLOCKS = gl.constexpr(16)  # of 64 columns, of a warp at a time
UNROLLED_STEPS = gl.constexpr(6)


@gluon.jit
def _dot4(a, b, total, UNSIGNED: gl.constexpr, DP4A: gl.constexpr):
    """Add to `total` the four products of the bytes of two int32 tensors; those of `b` are signed."""
    if DP4A and UNSIGNED:
        return gl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=gl.int32, is_pure=True, pack=1
        )
    elif DP4A:
        return gl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=gl.int32, is_pure=True, pack=1
        )
    else:  # the interpreter has no inline assembly
        for byte in gl.static_range(4):
            value = (a << (24 - 8 * byte)) >> 24
            if UNSIGNED:
                value = value & 0xFF
            total += value * ((b << (24 - 8 * byte)) >> 24)
        return total


@gluon.jit
def _four(x, ROWS: gl.constexpr, B: gl.constexpr):
    """The last axis of x [ROWS, B, 2, 4] apart, in an order that does not matter; a thread has all of it."""
    x, y = gl.split(x.reshape([ROWS, B, 2, 2, 2]))
    a, b = gl.split(x)
    c, d = gl.split(y)
    return a, b, c, d


@gluon.jit
def _half_sums(
    codes, x, UNSIGNED: gl.constexpr, ROWS: gl.constexpr, B: gl.constexpr, DP4A: gl.constexpr, P: gl.constexpr
):
    """Dot products of half blocks: codes [ROWS, B, 2, 4], x [1, B, 2, 4] to float32 [ROWS, B, 2]."""
    codes, x = gl.broadcast(codes, x)
    c0, c1, c2, c3 = _four(codes, ROWS, B)
    x0, x1, x2, x3 = _four(x, ROWS, B)
    total = _dot4(c0, x0, gl.zeros_like(c0), UNSIGNED, DP4A)
    total = _dot4(c1, x1, total, UNSIGNED, DP4A)
    total = _dot4(c2, x2, total, UNSIGNED, DP4A)
    total = _dot4(c3, x3, total, UNSIGNED, DP4A)
    return gl.convert_layout(total, gl.SliceLayout(3, P), assert_trivial=True).to(gl.float32)


@gluon.jit
def _load_step(
    codes_ptr, high_ptr, sub_ptr, step_ptr, rows_left, step,
    K: gl.constexpr, BITS: gl.constexpr, ROWS: gl.constexpr, B: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The weight's part of step `step`: words, upper bits, scale codes, steps, all as stored; 0 beyond the matrix."""
    blocks: gl.constexpr = K // 64
    S: gl.constexpr = gl.SliceLayout(3, P)
    S2: gl.constexpr = gl.SliceLayout(2, S)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S2))[:, None]
    block = step * B + gl.arange(0, B, layout=gl.SliceLayout(0, S2))[None, :]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, None, :, None]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, P))))[None, None, None, :]
    inside = row < rows_left
    if blocks % B != 0:
        inside = inside & (block < blocks)
    else:
        inside = inside & (block >= 0)
    row4, block4, inside4 = row[:, :, None, None], block[:, :, None, None], inside[:, :, None, None]
    codes = gl.load(codes_ptr + (row4 * (K // 8) + block4 * 8 + half * 4 + word), mask=inside4, other=0)
    high = codes
    if BITS == 6:
        place = row4 * (K // 16) + block4 // 2 * 8 + half * 4 + word
        high = gl.load(high_ptr + place, mask=inside4, other=0) >> (block4 % 2 * 4)
    # The scale codes of a block come in one load, and its steps in another.
    sub = gl.load(sub_ptr + (row * blocks + block), mask=inside, other=0).to(gl.int32)
    both = gl.load(step_ptr + (row * ((K + 255) // 256) + block // 4), mask=inside, other=0)
    return codes, high, sub, both


@gluon.jit
def _add_step(
    acc, codes, high, sub, both, xq_ptr, scale_ptr, total_ptr, step,
    K: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_MIN: gl.constexpr, ROWS: gl.constexpr, B: gl.constexpr,
    WR: gl.constexpr, WK: gl.constexpr, DP4A: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Add to acc [ROWS, B, 2] what step `step` of the weight makes with the activations."""
    blocks: gl.constexpr = K // 64
    S: gl.constexpr = gl.SliceLayout(3, P)
    SX: gl.constexpr = gl.SliceLayout(0, P)
    SB: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, S))
    block = step * B + gl.arange(0, B, layout=gl.SliceLayout(1, gl.SliceLayout(2, SX)))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, SX)))[None, :, None]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, SX)))[None, None, :]
    inside = (block < blocks)[:, None, None]
    place = block[:, None, None] * 16 + half * 4 + word
    x_first = gl.load(xq_ptr + place, mask=inside, other=0)[None, :, :, :]
    x_second = gl.load(xq_ptr + 8 + place, mask=inside, other=0)[None, :, :, :]
    # A block's two scales in one load, to the threads that have the block.
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4, 2], [1, 16, 2, 1, 1], [WR, WK, 1, 1, 1], [4, 3, 2, 1, 0])
    SP: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PAIRS)))
    block2 = (step * B + gl.arange(0, B, layout=gl.SliceLayout(1, SP)))[:, None]
    pair = block2 * 2 + gl.arange(0, 2, layout=gl.SliceLayout(0, SP))[None, :]
    scale_first, scale_second = gl.split(gl.load(scale_ptr + pair, mask=block2 < blocks, other=0.0))
    scale_first = gl.convert_layout(scale_first, SB, assert_trivial=True)[None, :]
    scale_second = gl.convert_layout(scale_second, SB, assert_trivial=True)[None, :]
    first = codes & 0x0F0F0F0F
    if BITS == 4 and HAS_MIN:
        second = codes & -252645136  # 0xF0F0F0F0: sixteen times the code, one shift less
        scale_second = scale_second * 0.0625
    else:
        second = (codes >> 4) & 0x0F0F0F0F
    if BITS == 6:
        first = first | ((high & 0x03030303) << 4)
        second = second | (((high >> 2) & 0x03030303) << 4)
    if not HAS_MIN:
        first = subtract_from_bytes(first, 1 << (BITS - 1))
        second = subtract_from_bytes(second, 1 << (BITS - 1))
    sum_first = _half_sums(first, x_first, False, ROWS, B, DP4A, P)
    sum_second = _half_sums(second, x_second, BITS == 4 and HAS_MIN, ROWS, B, DP4A, P)
    if HAS_MIN:
        total_first, total_second = gl.split(gl.load(total_ptr + pair, mask=block2 < blocks, other=0.0) * 0.5)
        total_first = gl.convert_layout(total_first, SB, assert_trivial=True)[None, :]
        total_second = gl.convert_layout(total_second, SB, assert_trivial=True)[None, :]
        value = (both & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        value_min = (both >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        by_first = signed_byte(sub, 0) * scale_first
        by_second = signed_byte(sub, 2) * scale_second
        # Each half of a block takes half of its minimum.
        minimum = (signed_byte(sub, 1) * total_first + signed_byte(sub, 3) * total_second) * value_min
        sums = sum_first * by_first[:, :, None] + sum_second * by_second[:, :, None]
        return acc + sums * value[:, :, None] - minimum[:, :, None]
    elif GROUP == 16:  # a half of a block's first 32 weights is a group, and so is one of its last
        own = sub[:, :, None] >> (8 * gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, None, :])
        by_first = signed_byte(own, 0) * scale_first[:, :, None]
        by_second = signed_byte(own, 2) * scale_second[:, :, None]
        return acc + (sum_first * by_first + sum_second * by_second) * both.to(gl.float32)[:, :, None]
    else:
        by_first = signed_byte(sub, 0) * scale_first
        by_second = signed_byte(sub, 1) * scale_second
        sums = sum_first * by_first[:, :, None] + sum_second * by_second[:, :, None]
        return acc + sums * both.to(gl.float32)[:, :, None]


@gluon.jit
def _product(
    program, codes_ptr, high_ptr, sub_ptr, step_ptr, xq_ptr, scale_ptr, total_ptr, y_ptr, N,
    K: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_MIN: gl.constexpr, ROWS_A_WARP: gl.constexpr,
    WR: gl.constexpr, WK: gl.constexpr, DP4A: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Write y [N] = one row of activations times the weight, the rows of one program of ``matvec``."""
    gl.static_assert(GROUP == 32 or not HAS_MIN)
    ROWS: gl.constexpr = ROWS_A_WARP * WR
    B: gl.constexpr = BLOCKS * WK
    # [rows, blocks, halves of a block, words]; a half is 16 of the block's first 32 weights and 16 of its last.
    P: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 16, 2, 1], [WR, WK, 1, 1], [3, 2, 1, 0])
    S: gl.constexpr = gl.SliceLayout(3, P)
    blocks: gl.constexpr = K // 64
    steps: gl.constexpr = (blocks + B - 1) // B
    if HAS_MIN or GROUP == 16:  # a block has four scale codes, or two
        sub_ptr = sub_ptr.to(gl.pointer_type(gl.int32))
    else:
        sub_ptr = sub_ptr.to(gl.pointer_type(gl.int16))
    if HAS_MIN:
        step_ptr = step_ptr.to(gl.pointer_type(gl.int32))
    # One 64-bit base per program and 32-bit offsets inside it.
    first_row = program.to(gl.int64) * ROWS
    rows_left = N - program * ROWS
    codes_ptr += first_row * (K // 8)
    high_ptr += first_row * (K // 16)
    sub_ptr += first_row * blocks
    step_ptr += first_row * ((K + 255) // 256)
    # Before the predecessor has ended, which makes x: the weight is there already.
    w0, h0, s0, b0 = _load_step(codes_ptr, high_ptr, sub_ptr, step_ptr, rows_left, 0, K, BITS, ROWS, B, P)
    wait_for_predecessor(PDL)
    acc = gl.zeros([ROWS, B, 2], gl.float32, layout=S)
    acc = _add_step(
        acc, w0, h0, s0, b0, xq_ptr, scale_ptr, total_ptr, 0, K, BITS, GROUP, HAS_MIN, ROWS, B, WR, WK, DP4A, P
    )
    # Of short rows all loads can be in flight; of long ones those of two steps, without which narrow matrices, whose
    # few programs all fit at once, ask for too little at a time.
    pairs: gl.constexpr = (steps - 1) // 2 if steps > UNROLLED_STEPS else 0
    if pairs > 0:
        for i in range(pairs):
            k0 = 1 + 2 * i
            k1 = k0 + 1
            w0, h0, s0, b0 = _load_step(codes_ptr, high_ptr, sub_ptr, step_ptr, rows_left, k0, K, BITS, ROWS, B, P)
            w1, h1, s1, b1 = _load_step(codes_ptr, high_ptr, sub_ptr, step_ptr, rows_left, k1, K, BITS, ROWS, B, P)
            acc = _add_step(
                acc, w0, h0, s0, b0, xq_ptr, scale_ptr, total_ptr, k0, K, BITS, GROUP, HAS_MIN, ROWS, B, WR, WK, DP4A, P
            )
            acc = _add_step(
                acc, w1, h1, s1, b1, xq_ptr, scale_ptr, total_ptr, k1, K, BITS, GROUP, HAS_MIN, ROWS, B, WR, WK, DP4A, P
            )
    for k in gl.static_range(1 + 2 * pairs, steps):
        w0, h0, s0, b0 = _load_step(codes_ptr, high_ptr, sub_ptr, step_ptr, rows_left, k, K, BITS, ROWS, B, P)
        acc = _add_step(
            acc, w0, h0, s0, b0, xq_ptr, scale_ptr, total_ptr, k, K, BITS, GROUP, HAS_MIN, ROWS, B, WR, WK, DP4A, P
        )
    y = gl.sum(gl.sum(acc, axis=2), axis=1)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, S)))
    gl.store(y_ptr + first_row + row, y.to(y_ptr.dtype.element_ty), mask=row < rows_left)


@writes("y_ptr")
@gluon.jit
def matvec(
    codes_ptr,
    high_ptr,
    sub_ptr,
    step_ptr,
    xq_ptr,
    scale_ptr,
    total_ptr,
    y_ptr,
    N,
    K: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_MIN: gl.constexpr,
    ROWS_A_WARP: gl.constexpr,
    WR: gl.constexpr,
    WK: gl.constexpr,
    DP4A: gl.constexpr,
    PDL: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """y [M, N] = x [M, K] times a 4- or 6-bit weight [N, K] transposed; x as xq, scale, total of ``quantize_rows``.

    xq is read as int32 [M, K / 4], sub as int8, step as float16; see format.py for the layout. A program has WR * WK
    warps: WR of them side by side, with ROWS_A_WARP rows each, and WK of them sharing each row. Rows of x are one axis
    of the grid: with more than one, the weight comes from the L2 after the first. REGISTERS is for who compiles it
    (kernels.compile): the most a thread may have, 0 for the assembler's choice.
    """
    m = gl.program_id(1)
    start_successor(PDL)
    _product(
        gl.program_id(0), codes_ptr, high_ptr, sub_ptr, step_ptr,
        xq_ptr + m * (K // 4), scale_ptr + m * (K // 32), total_ptr + m * (K // 32), y_ptr + m.to(gl.int64) * N, N,
        K, BITS, GROUP, HAS_MIN, ROWS_A_WARP, WR, WK, DP4A, PDL,
    )  # fmt: skip


@writes("y_ptr")
@gluon.jit
def matvec_pair(
    codes_ptr,
    high_ptr,
    sub_ptr,
    step_ptr,
    codes2_ptr,
    high2_ptr,
    sub2_ptr,
    step2_ptr,
    xq_ptr,
    scale_ptr,
    total_ptr,
    y_ptr,
    N,
    N2,
    K: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_MIN: gl.constexpr,
    BITS2: gl.constexpr,
    GROUP2: gl.constexpr,
    HAS_MIN2: gl.constexpr,
    ROWS_A_WARP: gl.constexpr,
    WR: gl.constexpr,
    WK: gl.constexpr,
    DP4A: gl.constexpr,
    PDL: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Two weights [N, K] and [N2, K] of different formats in one launch: y [N + N2] is one ``matvec`` after the other.

    A launch after another costs what it takes to empty and fill the GPU, though these two do not wait for each other.
    """
    first = gl.cdiv(N, ROWS_A_WARP * WR)
    start_successor(PDL)
    if gl.program_id(0) < first:
        _product(
            gl.program_id(0), codes_ptr, high_ptr, sub_ptr, step_ptr, xq_ptr, scale_ptr, total_ptr, y_ptr, N,
            K, BITS, GROUP, HAS_MIN, ROWS_A_WARP, WR, WK, DP4A, PDL,
        )  # fmt: skip
    else:
        _product(
            gl.program_id(0) - first, codes2_ptr, high2_ptr, sub2_ptr, step2_ptr, xq_ptr, scale_ptr, total_ptr,
            y_ptr + N, N2, K, BITS2, GROUP2, HAS_MIN2, ROWS_A_WARP, WR, WK, DP4A, PDL,
        )  # fmt: skip
