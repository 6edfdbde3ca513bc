"""Activations rounded to int8, and their product with 8-bit weights; for those of 4 and 6 bits see matvec.py."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor


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
    """``matvec.matvec`` for 8-bit weights: codes int32 [N, K / 4], groups of 32.

    A program owns BLOCK_N rows of the weight and walks K in steps of BLOCK_G groups, each of whose integer sums meets
    its scales once.
    """
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
