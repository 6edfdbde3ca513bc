"""Low-bit weight times many bf16 rows: the arithmetic-bound product of prefill, on the tensor cores.

The weight tile is dequantized in registers and never stored, and it is the register operand of the product:
acc [BLOCK_N, BLOCK_M] = W x^T, so that it does not pass through shared memory on its way to the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half_tile(
    codes_ptr, high_ptr, sub_ptr, step_ptr, row, row_in, block,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MIN: tl.constexpr, HALF: tl.constexpr, BLOCK_N:
        tl.constexpr,
):  # fmt: skip
    """Dequantize columns 64 * block + 32 * HALF .. + 31 of the rows: [BLOCK_N, 32] float32."""
    byte = tl.arange(0, 32)
    inside = row_in[:, None]
    if BITS == 8:
        code = tl.load(codes_ptr + (row[:, None] * K + (block * 64 + HALF * 32 + byte)[None, :]), mask=inside, other=0)
        code = code.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        packed = tl.load(codes_ptr + (row[:, None] * (K // 2) + (block * 32 + byte)[None, :]), mask=inside, other=0)
        low = (packed >> (4 * HALF)) & 15
        if BITS == 6:
            h = tl.load(high_ptr + (row[:, None] * (K // 4) + (block // 2 * 32 + byte)[None, :]), mask=inside, other=0)
            two = (h.to(tl.int32) >> (block % 2 * 4 + 2 * HALF)) & 3
            low = low.to(tl.int32) | (two << 4)
        code = low.to(tl.float32)
        if not HAS_MIN:
            code -= 1 << (BITS - 1)
    steps: tl.constexpr = (K + 255) // 256
    LEVELS: tl.constexpr = 2 if HAS_MIN else 1
    PER: tl.constexpr = 32 // GROUP
    step = tl.load(step_ptr + (row * steps + block // 4) * LEVELS, mask=row_in, other=0.0).to(tl.float32)
    group = row[:, None] * (K // GROUP) + (block * 2 + HALF) * PER + tl.arange(0, PER)[None, :]
    scale = tl.load(sub_ptr + group * LEVELS, mask=inside, other=0).to(tl.float32) * step[:, None]  # [BLOCK_N, PER]
    tile = tl.reshape(code, [BLOCK_N, PER, GROUP]) * scale[:, :, None]
    if HAS_MIN:
        step_min = tl.load(step_ptr + (row * steps + block // 4) * 2 + 1, mask=row_in, other=0.0).to(tl.float32)
        low = tl.load(sub_ptr + group * 2 + 1, mask=inside, other=0).to(tl.float32) * step_min[:, None]
        tile -= low[:, :, None]
    return tl.reshape(tile, [BLOCK_N, 32])


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
):
    """y [M, N] = x [M, K] times the weight [N, K] transposed; words of codes and high are read as bytes (format.py).

    DOT is the type of the product's operands: bfloat16, or float32 under Triton's interpreter, whose bf16 product is
    wrong.
    """
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.uint8))
    high_ptr = high_ptr.to(tl.pointer_type(tl.uint8))
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
    codes_ptr += first_row * (K if BITS == 8 else K // 2)
    high_ptr += first_row * (K // 4)
    sub_ptr += first_row * (K // GROUP * LEVELS)
    step_ptr += first_row * ((K + 255) // 256 * LEVELS)
    x_ptr += tile_m.to(tl.int64) * BLOCK_M * K
    k32 = tl.arange(0, 32)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(0, K // 64):
        x_first = tl.load(x_ptr + (x_row[None, :] + (block * 64 + k32)[:, None]), mask=m_in[None, :], other=0.0)
        x_second = tl.load(x_ptr + (x_row[None, :] + (block * 64 + 32 + k32)[:, None]), mask=m_in[None, :], other=0.0)
        first = _half_tile(
            codes_ptr, high_ptr, sub_ptr, step_ptr, row, n_in, block, K, BITS, GROUP, HAS_MIN, 0, BLOCK_N
        )
        acc = tl.dot(first.to(DOT), x_first.to(DOT), acc, input_precision="ieee")
        second = _half_tile(
            codes_ptr, high_ptr, sub_ptr, step_ptr, row, n_in, block, K, BITS, GROUP, HAS_MIN, 1, BLOCK_N
        )
        acc = tl.dot(second.to(DOT), x_second.to(DOT), acc, input_precision="ieee")
    # One 64-bit base and 32-bit offsets inside the tile: a tile of 64-bit addresses would not fit the registers.
    y_tile = y_ptr + tile_m.to(tl.int64) * BLOCK_M * N
    offset = tl.arange(0, BLOCK_M)[None, :] * N + rows_n[:, None]
    tl.store(y_tile + offset, acc.to(y_ptr.dtype.element_ty), mask=n_in[:, None] & m_in[None, :])
