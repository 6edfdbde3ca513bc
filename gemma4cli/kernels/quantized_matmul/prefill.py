"""Low-bit weight times many bf16 rows: the arithmetic-bound product of prefill, on the tensor cores.

acc [BLOCK_N, BLOCK_M] = W x^T: the weight tile is dequantized in registers, is the register operand of the product and
is never stored. The product waits for the instructions that make its operand, so there must be few (bench/notes.md):

- One product of 128 columns a step. Triton leaves a step's only product asynchronous, so that it runs while the next
  tile's loads and arithmetic go on; for two into one accumulator it waits. The scale codes of 128 columns are one word
  a row.
- Codes are read as pairs of bytes: a thread holds the operand's columns two by two, and two bytes are two such pairs.
- No code is converted to float. Moved into the mantissa of 1.0 at bit p, code c makes 1 + c / 2^(23 - p); one
  multiply-add with the group's scale and offset turns that into the weight. The two nibbles of a byte go to p = 15 and
  p = 19 with one shift, and their groups' scales make up for the difference.
- GROUP_M = 2 on an H200. A tile of x has seven times the bytes of a tile of a 4-bit weight, so programs that run
  together had better share x than weight; measured, 8 is 1 to 5 % slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.quantized_matmul.words import signed_byte


@triton.jit
def _alternate(a, b):
    """[R, C] twice -> [R, 2 C]: a0 b0 a1 b1 and so on."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _append(a, b):
    """[R, C] twice -> [R, 2 C], one after the other; nothing moves between threads."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _select(MASK: tl.constexpr, a, b, LOP3: tl.constexpr):
    """The bits of `a` where the constant MASK has ones, those of `b` elsewhere.

    In one instruction: ptxas makes two of it where two of the operands are immediates.
    """
    mask = tl.full(a.shape, MASK, tl.int32)
    if LOP3:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [mask, a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (a & mask) | (b & ~mask)


@triton.jit
def _under_one(word, MASK: tl.constexpr, LOP3: tl.constexpr):
    """The float32 with the bits of MASK from `word` and all others from 1.0."""
    one = tl.full(word.shape, 0x3F800000, tl.int32)
    return _select(MASK, word, one, LOP3).to(tl.float32, bitcast=True)


@triton.jit
def _codes(
    codes_ptr, high_ptr, row, block,
    K: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, LOP3: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of codes in the mantissa of 1.0: float32 [BLOCK_N, COLUMNS].

    At bit 15 (8-bit codes, low nibbles of 4-bit ones), 19 (high nibbles) or 17 (6-bit codes).
    """
    if BITS == 8:
        pair = tl.arange(0, COLUMNS // 2)
        # Signed bytes; with the top bit flipped they count from -128.
        w = tl.load(codes_ptr + (row[:, None] * (K // 2) + (block * (COLUMNS // 2) + pair)[None, :])).to(tl.int32)
        w ^= 0x8080
        return _under_one(_alternate(w << 15, w << 7), 255 << 15, LOP3)
    else:
        pair = tl.arange(0, COLUMNS // 4)
        w = tl.load(codes_ptr + (row[:, None] * (K // 4) + (block * (COLUMNS // 4) + pair)[None, :])).to(tl.int32)
        if BITS == 4:
            w = _alternate(w << 15, w << 7)
            first = _under_one(w, 15 << 15, LOP3)
            second = _under_one(w, 15 << 19, LOP3)
        else:
            quad = tl.arange(0, COLUMNS // 8)
            h = tl.load(high_ptr + (row[:, None] * (K // 8) + (block * (COLUMNS // 8) + quad)[None, :])).to(tl.int32)
            # The two high bits go above the nibble they belong to, over bits of another code.
            first = _select(0x0F0F, w, _append(h << 4, h), LOP3)
            second = _select(0xF0F0, w, _append(h << 6, h << 2), LOP3)
            first = _under_one(_alternate(first << 17, first << 9), 63 << 17, LOP3)
            second = _under_one(_alternate(second << 13, second << 5), 63 << 17, LOP3)
        BLOCKS: tl.constexpr = COLUMNS // 64
        both = tl.join(tl.reshape(first, [BLOCK_N, BLOCKS, 32]), tl.reshape(second, [BLOCK_N, BLOCKS, 32]))
        return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [BLOCK_N, COLUMNS])


@triton.jit
def _half(word):
    """The float16 in the low half of 32-bit words, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _two_groups(word, FIRST: tl.constexpr, step, step_min, BITS: tl.constexpr, HAS_MIN: tl.constexpr):
    """(scale, offset) [BLOCK_N, 2] by the scale codes from byte FIRST on: weight = ``_codes`` * scale - offset."""
    SECOND: tl.constexpr = FIRST + 2 if HAS_MIN else FIRST + 1
    # 2^(23 - p) of ``_codes``: the second group of 4-bit codes is the high nibbles.
    RANGE: tl.constexpr = 64.0 if BITS == 6 else 256.0
    SECOND_RANGE: tl.constexpr = 16.0 if BITS == 4 else RANGE
    scale = signed_byte(word, FIRST) * (step * RANGE)
    second = signed_byte(word, SECOND) * (step * SECOND_RANGE)
    if HAS_MIN:
        offset = scale + signed_byte(word, FIRST + 1) * step_min
        second_offset = second + signed_byte(word, SECOND + 1) * step_min
    else:
        ZERO: tl.constexpr = 1 << (BITS - 1)
        offset = scale * (1 + ZERO / RANGE)
        second_offset = second * (1 + ZERO / SECOND_RANGE)
    return tl.join(scale, second), tl.join(offset, second_offset)


@triton.jit
def _word_scales(word, step, step_min, BYTES: tl.constexpr, BITS: tl.constexpr, HAS_MIN: tl.constexpr):
    """``_two_groups`` of all BYTES (2 or 4) bytes of scale codes."""
    scale, offset = _two_groups(word, 0, step, step_min, BITS, HAS_MIN)
    if BYTES == 4 and not HAS_MIN:
        next_scale, next_offset = _two_groups(word, 2, step, step_min, BITS, HAS_MIN)
        scale, offset = _append(scale, next_scale), _append(offset, next_offset)
    return scale, offset


@triton.jit
def _scales(
    sub_ptr, both_steps, row, block,
    K: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MIN: tl.constexpr,
):  # fmt: skip
    """(scale, offset) float32 [BLOCK_N, groups], of 16 columns each for 6-bit weights, else of GROUP."""
    step, step_min = _half(both_steps), _half(both_steps >> 16)
    BYTES: tl.constexpr = COLUMNS // GROUP * (2 if HAS_MIN else 1)
    WORD: tl.constexpr = tl.int64 if BYTES == 8 else tl.int32 if BYTES == 4 else tl.int16
    word = tl.load(sub_ptr.to(tl.pointer_type(WORD)) + (row * (K // COLUMNS) + block))
    if BYTES == 8:
        scale, offset = _word_scales(word.to(tl.int32), step, step_min, 4, BITS, HAS_MIN)
        next_scale, next_offset = _word_scales((word >> 32).to(tl.int32), step, step_min, 4, BITS, HAS_MIN)
        scale, offset = _append(scale, next_scale), _append(offset, next_offset)
    else:
        scale, offset = _word_scales(word.to(tl.int32), step, step_min, BYTES, BITS, HAS_MIN)
    if BITS == 6 and GROUP == 32:
        # Without this Triton moves the weight tile through shared memory to change its layout.
        scale, offset = _alternate(scale, scale), _alternate(offset, offset)
    return scale, offset


@triton.jit
def _steps(step_ptr, row, column, K: tl.constexpr, HAS_MIN: tl.constexpr):
    """The float16 steps of a column: the scales' in the low half of int32 [BLOCK_N], the minima's in the high half."""
    WORD: tl.constexpr = tl.int32 if HAS_MIN else tl.int16
    return tl.load(step_ptr.to(tl.pointer_type(WORD)) + (row * ((K + 255) // 256) + column // 256)).to(tl.int32)


@triton.jit
def matmul(
    codes_ptr,
    high_ptr,
    sub_ptr,
    step_ptr,
    x_ptr,
    y_ptr,
    M,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOT: tl.constexpr,
    LOP3: tl.constexpr,
):
    """y [M, N] = x [M, K] times the weight [N, K] transposed (format.py).

    Triton's interpreter wants DOT (the type of the product's operands) float32, because its bf16 product is wrong, and
    LOP3 false, because it has no inline assembly.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs that run together share weight rows and activation rows: walk N inside bands of GROUP_M row tiles.
    band = pid // (GROUP_M * tiles_n)
    band_rows = min(tiles_m - band * GROUP_M, GROUP_M)
    tile_m = band * GROUP_M + pid % (GROUP_M * tiles_n) % band_rows
    tile_n = pid % (GROUP_M * tiles_n) // band_rows
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rows_n < N, rows_m < M
    LEVELS: tl.constexpr = 2 if HAS_MIN else 1
    # One 64-bit base per tile and 32-bit offsets inside it; rows past the end read the first one again.
    row = tl.where(n_in, tl.arange(0, BLOCK_N), 0)
    x_row = tl.where(m_in, tl.arange(0, BLOCK_M), 0) * K
    first_row = tile_n.to(tl.int64) * BLOCK_N
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.int16)) + first_row * (K // 2 if BITS == 8 else K // 4)
    high_ptr = high_ptr.to(tl.pointer_type(tl.int16)) + first_row * (K // 8)
    sub_ptr += first_row * (K // GROUP * LEVELS)
    step_ptr += first_row * ((K + 255) // 256 * LEVELS)
    x_ptr += tile_m.to(tl.int64) * BLOCK_M * K
    # Short steps where long ones would leave a tail to mask (not with 6 bits: format.py).
    COLUMNS: tl.constexpr = 128 if K % 128 == 0 else 64
    k = tl.arange(0, COLUMNS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    steps = _steps(step_ptr, row, 0, K, HAS_MIN)
    for block in range(0, K // COLUMNS):
        x = tl.load(x_ptr + (x_row[None, :] + (block * COLUMNS + k)[:, None]))
        t = _codes(codes_ptr, high_ptr, row, block, K, COLUMNS, BITS, BLOCK_N, LOP3)
        scale, offset = _scales(sub_ptr, steps, row, block, K, COLUMNS, BITS, GROUP, HAS_MIN)
        t = tl.reshape(t, [BLOCK_N, scale.shape[1], COLUMNS // scale.shape[1]]) * scale[:, :, None] - offset[:, :, None]
        tile = tl.reshape(t, [BLOCK_N, COLUMNS])
        # Fetched a step ahead by hand: words of 16 bits have no asynchronous copy.
        steps = _steps(step_ptr, row, min((block + 1) * COLUMNS, K - COLUMNS), K, HAS_MIN)
        acc = tl.dot(tile.to(DOT), x.to(DOT), acc, input_precision="ieee")
    # One 64-bit base and 32-bit offsets inside the tile: a tile of 64-bit addresses would not fit the registers.
    y_tile = y_ptr + tile_m.to(tl.int64) * BLOCK_M * N
    offset = tl.arange(0, BLOCK_M)[None, :] * N + rows_n[:, None]
    tl.store(y_tile + offset, acc.to(y_ptr.dtype.element_ty), mask=n_in[:, None] & m_in[None, :])
