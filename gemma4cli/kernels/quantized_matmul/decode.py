"""Low-bit weight times a few int8 activation rows: the memory-bound product of decoding.

One program owns BLOCK_N rows of the weight and walks K in steps of BLOCK_B 64-wide blocks. Codes are read as 32-bit
words and multiplied with `dp4a` (four int8 products a lane); each group's integer sum meets its scales once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor

UNROLLED_STEPS = tl.constexpr(6)


@triton.jit
def write_int8(x, row, group, inside, xq_ptr, scale_ptr, total_ptr, K: tl.constexpr):
    """Write reference.quantize_activations of x [BLOCK_G, 32] float32, the groups `group` [BLOCK_G] of row `row`.

    xq may be given as 32-bit words, as ``matvec`` reads it: exported graphs have no view in another dtype.
    """
    xq_ptr = xq_ptr.to(tl.pointer_type(tl.int8))
    k = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    scale = tl.max(tl.abs(x), axis=1) / 127.0
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
    scaled = x * inverse[:, None]
    # Half to even, as torch.round: adding and subtracting 1.5 * 2^23 leaves the nearest integer of |scaled| <= 127.
    xq = (scaled + 12582912.0) - 12582912.0
    tl.store(xq_ptr + row * K + k, xq.to(tl.int8), mask=inside[:, None])
    tl.store(scale_ptr + row * (K // 32) + group, scale, mask=inside)
    tl.store(total_ptr + row * (K // 32) + group, scale * tl.sum(xq, axis=1), mask=inside)


@triton.jit
def quantize_rows(x_ptr, xq_ptr, scale_ptr, total_ptr, K: tl.constexpr, BLOCK_G: tl.constexpr):
    """Write reference.quantize_activations of row `program_id(1)`; BLOCK_G groups of 32 per program."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < K // 32
    k = group[:, None] * 32 + tl.arange(0, 32)[None, :]  # [BLOCK_G, 32]
    x = tl.load(x_ptr + row * K + k, mask=inside[:, None], other=0.0).to(tl.float32)
    write_int8(x, row, group, inside, xq_ptr, scale_ptr, total_ptr, K)


@triton.jit
def _dot4(a, b, DP4A: tl.constexpr):
    """Sum of the four products of the signed bytes of two int32 tensors."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:  # Triton's interpreter has no inline assembly
        total = ((a << 24) >> 24) * ((b << 24) >> 24)
        total += ((a << 16) >> 24) * ((b << 16) >> 24)
        total += ((a << 8) >> 24) * ((b << 8) >> 24)
        return total + (a >> 24) * (b >> 24)


@triton.jit
def _signed_bytes(code, ZERO: tl.constexpr):
    """Subtract ZERO from each byte of a word of codes below 128, without borrows between bytes."""
    zeros: tl.constexpr = ZERO * 0x01010101
    top: tl.constexpr = -2139062144  # 0x80808080
    return ((code | top) - zeros) ^ top


@triton.jit
def _byte(word, INDEX: tl.constexpr):
    """Signed byte INDEX of 32-bit words, as float32."""
    return ((word << (24 - 8 * INDEX)) >> 24).to(tl.float32)


@triton.jit
def _load_blocks(
    codes_ptr, high_ptr, sub_ptr, step_ptr, row, row_in, b0,
    K: tl.constexpr, BITS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The weight's part of BLOCK_B 64-wide blocks from `b0` on: words, upper bits, scale codes, steps as stored."""
    blocks: tl.constexpr = K // 64
    steps: tl.constexpr = (K + 255) // 256
    # Where the blocks come out even, a mask that is always true costs registers and a branch.
    last: tl.constexpr = blocks if blocks % BLOCK_B else 1 << 30
    word = tl.arange(0, BLOCK_B * 8)
    block_of_word = b0 + word // 8
    load_in = row_in[:, None] & (block_of_word < last)[None, :]
    w = tl.load(codes_ptr + (row[:, None] * (K // 8) + (b0 * 8 + word)[None, :]), mask=load_in, other=0)
    h = w
    if BITS == 6:
        high = row[:, None] * (K // 16) + (block_of_word // 2 * 8 + word % 8)[None, :]
        h = tl.load(high_ptr + high, mask=load_in, other=0) >> (block_of_word % 2 * 4)[None, :]
    block = b0 + tl.arange(0, BLOCK_B)
    scale_in = row_in[:, None] & (block < last)[None, :]
    # The scale codes of a block, and its steps, come in one load each: byte loads would outnumber the codes'.
    sub = tl.load(sub_ptr + (row[:, None] * blocks + block[None, :]), mask=scale_in, other=0).to(tl.int32)
    both = tl.load(step_ptr + (row[:, None] * steps + (block // 4)[None, :]), mask=scale_in, other=0)
    return w, h, sub, both


@triton.jit
def _block_sums(
    w, h, sub, both, xq_ptr, scale_ptr, total_ptr, m, b0,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """What BLOCK_B 64-wide blocks from `b0` on add to each row: [BLOCK_N, BLOCK_B] float32."""
    blocks: tl.constexpr = K // 64
    WORDS: tl.constexpr = BLOCK_B * 8
    last: tl.constexpr = blocks if blocks % BLOCK_B else 1 << 30
    word = tl.arange(0, WORDS)
    block_of_word = b0 + word // 8
    word_in = block_of_word < last
    block = b0 + tl.arange(0, BLOCK_B)
    block_in = block < last
    first = w & 0x0F0F0F0F
    second = (w >> 4) & 0x0F0F0F0F
    if BITS == 6:
        first = first | ((h & 0x03030303) << 4)
        second = second | (((h >> 2) & 0x03030303) << 4)
    if not HAS_MIN:
        first = _signed_bytes(first, 1 << (BITS - 1))
        second = _signed_bytes(second, 1 << (BITS - 1))
    x_word = m * (K // 4) + block_of_word * 16 + word % 8
    x_first = tl.load(xq_ptr + x_word, mask=word_in, other=0)
    x_second = tl.load(xq_ptr + x_word + 8, mask=word_in, other=0)
    dot_first = _dot4(first, tl.broadcast_to(x_first[None, :], [BLOCK_N, WORDS]), DP4A)
    dot_second = _dot4(second, tl.broadcast_to(x_second[None, :], [BLOCK_N, WORDS]), DP4A)
    x_group = m * (K // 32) + block * 2
    scale_first = tl.load(scale_ptr + x_group, mask=block_in, other=0.0)[None, :]
    scale_second = tl.load(scale_ptr + x_group + 1, mask=block_in, other=0.0)[None, :]
    if GROUP == 32:
        dot_first = tl.sum(tl.reshape(dot_first, [BLOCK_N, BLOCK_B, 8]), axis=2).to(tl.float32)
        dot_second = tl.sum(tl.reshape(dot_second, [BLOCK_N, BLOCK_B, 8]), axis=2).to(tl.float32)
        sums = dot_first * _byte(sub, 0) * scale_first
        sums += dot_second * _byte(sub, 2 if HAS_MIN else 1) * scale_second
    else:
        dot_first = tl.sum(tl.reshape(dot_first, [BLOCK_N, BLOCK_B, 2, 4]), axis=3).to(tl.float32)
        dot_second = tl.sum(tl.reshape(dot_second, [BLOCK_N, BLOCK_B, 2, 4]), axis=3).to(tl.float32)
        sums = tl.sum(dot_first * tl.join(_byte(sub, 0), _byte(sub, 1)), axis=2) * scale_first
        sums += tl.sum(dot_second * tl.join(_byte(sub, 2), _byte(sub, 3)), axis=2) * scale_second
    if HAS_MIN:
        step = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        step_min = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total_first = tl.load(total_ptr + x_group, mask=block_in, other=0.0)[None, :]
        total_second = tl.load(total_ptr + x_group + 1, mask=block_in, other=0.0)[None, :]
        return sums * step - (_byte(sub, 1) * total_first + _byte(sub, 3) * total_second) * step_min
    else:
        return sums * both.to(tl.float32)


@triton.jit
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
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr = False,
    REGISTERS: tl.constexpr = 0,
):
    """y [M, N] = x [M, K] times a 4- or 6-bit weight [N, K] transposed; x as xq, scale, total of ``quantize_rows``.

    xq is read as int32 [M, K / 4], sub as int8, step as float16; see format.py for the layout. Rows of x are one axis
    of the grid: with more than one, the weight comes from the L2 after the first. REGISTERS is for who compiles it
    (kernels.compile): the most a thread may have, 0 for the assembler's choice.
    """
    m = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < N
    blocks: tl.constexpr = K // 64
    if HAS_MIN or GROUP == 16:  # a block has four scale codes, or two
        tl.static_assert(GROUP == 32 or not HAS_MIN)
        sub_ptr = sub_ptr.to(tl.pointer_type(tl.int32))
    else:
        sub_ptr = sub_ptr.to(tl.pointer_type(tl.int16))
    if HAS_MIN:
        step_ptr = step_ptr.to(tl.pointer_type(tl.int32))
    # One 64-bit base per program and 32-bit offsets inside it; rows past the end read the first one again.
    row = tl.where(row_in, tl.arange(0, BLOCK_N), 0)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    codes_ptr += first_row * (K // 8)
    high_ptr += first_row * (K // 16)
    sub_ptr += first_row * blocks
    step_ptr += first_row * ((K + 255) // 256)
    # Before the predecessor has ended, which makes x: the weight is there already.
    start_successor(PDL)
    w, h, sub, both = _load_blocks(codes_ptr, high_ptr, sub_ptr, step_ptr, row, row_in, 0, K, BITS, BLOCK_B)
    wait_for_predecessor(PDL)
    acc = _block_sums(
        w, h, sub, both, xq_ptr, scale_ptr, total_ptr, m, 0, K, BITS, GROUP, HAS_MIN, BLOCK_N, BLOCK_B, DP4A
    )
    steps: tl.constexpr = (blocks + BLOCK_B - 1) // BLOCK_B
    # Of short rows all loads can be in flight; of long ones those of two steps, without which narrow matrices, whose
    # few programs all fit at once, ask for too little at a time.
    pairs: tl.constexpr = (steps - 1) // 2 if steps > UNROLLED_STEPS else 0
    if pairs > 0:
        for b0 in range(BLOCK_B, BLOCK_B * (1 + 2 * pairs), 2 * BLOCK_B):
            b1 = b0 + BLOCK_B
            w, h, sub, both = _load_blocks(codes_ptr, high_ptr, sub_ptr, step_ptr, row, row_in, b0, K, BITS, BLOCK_B)
            next_w, next_h, next_sub, next_both = _load_blocks(
                codes_ptr, high_ptr, sub_ptr, step_ptr, row, row_in, b1, K, BITS, BLOCK_B
            )
            acc += _block_sums(
                w, h, sub, both, xq_ptr, scale_ptr, total_ptr, m, b0, K, BITS, GROUP, HAS_MIN, BLOCK_N, BLOCK_B, DP4A
            )
            acc += _block_sums(
                next_w, next_h, next_sub, next_both, xq_ptr, scale_ptr, total_ptr, m, b1,
                K, BITS, GROUP, HAS_MIN, BLOCK_N, BLOCK_B, DP4A,
            )  # fmt: skip
    for step in tl.static_range(1 + 2 * pairs, steps):
        b = step * BLOCK_B
        w, h, sub, both = _load_blocks(codes_ptr, high_ptr, sub_ptr, step_ptr, row, row_in, b, K, BITS, BLOCK_B)
        acc += _block_sums(
            w, h, sub, both, xq_ptr, scale_ptr, total_ptr, m, b, K, BITS, GROUP, HAS_MIN, BLOCK_N, BLOCK_B, DP4A
        )
    tl.store(y_ptr + m.to(tl.int64) * N + rows, tl.sum(acc, axis=1).to(y_ptr.dtype.element_ty), mask=row_in)


@triton.jit
def matvec_int8(
    codes_ptr,
    sub_ptr,
    step_ptr,
    xq_ptr,
    scale_ptr,
    y_ptr,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """``matvec`` for 8-bit weights: codes int32 [N, K / 4], groups of 32, BLOCK_G groups per step."""
    m = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < N
    row = tl.where(row_in, rows, 0).to(tl.int64)
    groups: tl.constexpr = K // 32
    steps: tl.constexpr = (K + 255) // 256
    WORDS: tl.constexpr = BLOCK_G * 8
    start_successor(PDL)
    wait_for_predecessor(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for g0 in range(0, groups, BLOCK_G):
        word = g0 * 8 + tl.arange(0, WORDS)
        word_in = word < groups * 8
        w = tl.load(
            codes_ptr + row[:, None] * (K // 4) + word[None, :], mask=row_in[:, None] & word_in[None, :], other=0
        )
        x = tl.load(xq_ptr + m * (K // 4) + word, mask=word_in, other=0)
        dot = _dot4(w, tl.broadcast_to(x[None, :], [BLOCK_N, WORDS]), DP4A)
        dot = tl.sum(tl.reshape(dot, [BLOCK_N, BLOCK_G, 8]), axis=2).to(tl.float32)
        group = g0 + tl.arange(0, BLOCK_G)
        group_in = group < groups
        scale_in = row_in[:, None] & group_in[None, :]
        sub = tl.load(sub_ptr + row[:, None] * groups + group[None, :], mask=scale_in, other=0).to(tl.float32)
        step = tl.load(step_ptr + row[:, None] * steps + (group // 8)[None, :], mask=scale_in, other=0.0).to(tl.float32)
        x_scale = tl.load(scale_ptr + m * groups + group, mask=group_in, other=0.0)
        acc += dot * (sub * step * x_scale[None, :])
    tl.store(y_ptr + m * N + rows, tl.sum(acc, axis=1).to(y_ptr.dtype.element_ty), mask=row_in)
