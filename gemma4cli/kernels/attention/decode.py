"""One query token against a long cache, the cache read once: split over the context, then combined.

A cache is plain or folded, and holds numbers, 8-bit or 4-bit codes; all are read by the same kernel:

    plain    scores = q . K                       values V
    folded   scores = q_v . V + q_r . K_r         values V      (layers whose K and V share a projection: reference.py)
    q8       each vector as int8 times a scale (int8.py)
    tq4      each vector as 4-bit codes of a rotated unit vector times a scale (turboquant.py); the query comes rotated

Scales meet scores and weights, not vectors. Vectors are read as two halves, dims 0 .. D/2 - 1 and D/2 .. D - 1: the two
nibbles of a 4-bit code's byte. Positions, not slots, are walked, from the first the window shows to the last written, so
cost follows the context and never the allocation, and a slot that was never written is never read. The position is read
on the device: a captured graph stays right as it grows.

``split`` takes heads of any size. Those of the 31B's full layers, where a token reads the whole cache, have a kernel of
their own (wide.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.attention import levels
from gemma4cli.kernels.attention.turboquant import COEFFICIENTS
from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.quantized_matmul.decode import write_int8

_A = tl.constexpr(COEFFICIENTS[0])
_B = tl.constexpr(COEFFICIENTS[1])
_C = tl.constexpr(COEFFICIENTS[2])


# Of four bytes: their low nibbles' levels, two in a register, then their high nibbles'.
_LEVELS = tl.constexpr(
    "{ "
    + levels.REGISTERS
    + " .reg .b32 low, high;"
    + levels.LEVEL_CONSTANTS
    + levels.doubled_nibbles("low", "high", "$4")
    + levels.levels("$0", "low", levels.FIRST_BYTES)
    + levels.levels("$1", "low", levels.LAST_BYTES)
    + levels.levels("$2", "high", levels.FIRST_BYTES)
    + levels.levels("$3", "high", levels.LAST_BYTES)
    + " }"
)
_FRACTIONS = tl.constexpr(
    "{ "
    + levels.REGISTERS
    + " .reg .b32 code;"
    + levels.FRACTION_CONSTANTS
    + levels.unsigned("code", "$2")
    + levels.fractions("$0", "code", levels.FIRST_BYTES)
    + levels.fractions("$1", "code", levels.LAST_BYTES)
    + " }"
)


@triton.jit
def block_slots(position0, S, WINDOW: tl.constexpr, BLOCK_S: tl.constexpr):
    """Slots of BLOCK_S positions from `position0` on. In a ring, one division of scalars instead of one per slot."""
    if WINDOW == 0:
        return position0 + tl.arange(0, BLOCK_S)
    slot = position0 % S + tl.arange(0, BLOCK_S)
    return tl.where(slot < S, slot, slot - S)


@triton.jit
def _level(code):
    """turboquant.codebook of codes 0 .. 15, float16, without assembly."""
    s = ((2 * code.to(tl.int32) - 15).to(tl.float32) / 16).to(tl.float32)
    square = s * s
    inner = (square * _C + _B).to(tl.float16).to(tl.float32)
    return (s * (inner * square + _A).to(tl.float16).to(tl.float32)).to(tl.float16)


@triton.jit
def _levels(packed, ASM: tl.constexpr):
    """turboquant.codebook of the low and of the high nibbles of bytes, float16."""
    if ASM:
        return tl.inline_asm_elementwise(
            _LEVELS, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:  # Triton's interpreter has no inline assembly
        return _level(packed & 15), _level(packed >> 4)


@triton.jit
def _fractions(codes, ASM: tl.constexpr):
    """int8 codes / 128, float16: exact."""
    if ASM:
        return tl.inline_asm_elementwise(_FRACTIONS, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return (codes.to(tl.float32) / 128).to(tl.float16)


@triton.jit
def load_halves(
    ptr, head, slot, inside, S,
    D: tl.constexpr, WIDTH: tl.constexpr, CODE_BITS: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Load both halves of the vectors in the given slots: [BLOCK_S, WIDTH] each; WIDTH >= D / 2, the rest anything.

    CODE_BITS: 0 where vectors are stored as numbers, 8 or 4 where as codes: levels, without the vectors' scales. One
    64-bit base per head and 32-bit offsets inside it: a head's cache has fewer than 2^31 values.
    """
    HALF: tl.constexpr = D // 2
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] if WIDTH == HALF else inside[:, None] & (column < HALF)[None, :]
    base = head.to(tl.int64) * S
    if CODE_BITS == 4:
        packed = tl.load(ptr + base * HALF + (slot[:, None] * HALF + column[None, :]), mask=mask, other=0)
        first, second = _levels(packed, ASM)
        return first.to(DOT), second.to(DOT)
    else:
        first = tl.load(ptr + base * D + (slot[:, None] * D + column[None, :]), mask=mask, other=0)
        second = tl.load(ptr + base * D + (slot[:, None] * D + HALF + column[None, :]), mask=mask, other=0)
        if CODE_BITS == 8:
            first = _fractions(first, ASM)
            second = _fractions(second, ASM)
        return first.to(DOT), second.to(DOT)


@triton.jit
def load_scale(ptr, head, slot, inside, S):
    """Load the scales of the vectors in the given slots: [BLOCK_S] float32."""
    return tl.load(ptr + head.to(tl.int64) * S + slot, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def products(a0, a1, b0, b1):
    """a b^T from the halves of both, float32."""
    first = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    return tl.dot(a1, tl.trans(b1), first, input_precision="ieee")


@triton.jit
def _query_half(ptr, rows, rows_in, D: tl.constexpr, SECOND: tl.constexpr, WIDTH: tl.constexpr):
    """Load one half of the query vectors `rows`: [ROWS, WIDTH]."""
    column = tl.arange(0, WIDTH)
    mask = rows_in[:, None] & (column < D // 2)[None, :]
    address = rows[:, None].to(tl.int64) * D + SECOND * (D // 2) + column[None, :]
    return tl.load(ptr + address, mask=mask, other=0.0)


@triton.jit
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
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    R_HALF: tl.constexpr,
    FOLDED: tl.constexpr,
    CODE_BITS: tl.constexpr,
    DOT: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Attention of one KV head's query group over one share of the positions.

    q [H, D]; plain: k [H_kv, S, D]; folded: k is K_r [H_kv, S, R] and r the query's part for it [H, R]; v [H_kv, S, D]
    (codes: scales [H_kv, S], 4-bit half as many bytes). Writes partial [H, SPLITS, D] (not normalized), top [H, SPLITS]
    (largest score, -inf for an empty share) and total [H, SPLITS] (sum of exponentials).
    """
    wait_for_predecessor(PDL)
    start_successor(PDL)
    head = tl.program_id(0)
    share = tl.program_id(1)
    last = tl.load(position_ptr).to(tl.int32)
    first = tl.maximum(last - WINDOW + 1, 0) if WINDOW > 0 else 0
    length = tl.cdiv(tl.cdiv(last - first + 1, SPLITS), BLOCK_S) * BLOCK_S
    start = first + share * length
    end = tl.minimum(start + length, last + 1)
    row = tl.arange(0, ROWS)
    rows = head * GROUP + row
    rows_in = row < GROUP
    q0 = _query_half(q_ptr, rows, rows_in, D, 0, HALF).to(DOT)
    q1 = _query_half(q_ptr, rows, rows_in, D, 1, HALF).to(DOT)
    if FOLDED:
        r0 = _query_half(r_ptr, rows, rows_in, R, 0, R_HALF).to(DOT)
        r1 = _query_half(r_ptr, rows, rows_in, R, 1, R_HALF).to(DOT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, HALF], tl.float32)
    acc1 = tl.zeros([ROWS, HALF], tl.float32)
    for position0 in range(start, end, BLOCK_S):
        position = position0 + tl.arange(0, BLOCK_S)
        inside = position < end
        slot = block_slots(position0, S, WINDOW, BLOCK_S)
        v0, v1 = load_halves(v_ptr, head, slot, inside, S, D, HALF, CODE_BITS, DOT, ASM)
        k0, k1 = load_halves(k_ptr, head, slot, inside, S, R, R_HALF, CODE_BITS, DOT, ASM)
        if CODE_BITS:
            k_scale = load_scale(k_scale_ptr, head, slot, inside, S)[None, :]
            v_scale = load_scale(v_scale_ptr, head, slot, inside, S)[None, :]
        if FOLDED:
            scores, turned = products(q0, q1, v0, v1), products(r0, r1, k0, k1)
            scores = scores * v_scale + turned * k_scale if CODE_BITS else scores + turned
        else:
            scores = products(q0, q1, k0, k1)
            scores = scores * k_scale if CODE_BITS else scores
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp(top - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        if CODE_BITS:
            weight *= v_scale
        acc0 = tl.dot(weight.to(DOT), v0, acc0 * keep[:, None], input_precision="ieee")
        acc1 = tl.dot(weight.to(DOT), v1, acc1 * keep[:, None], input_precision="ieee")
        top = higher
    out = rows * SPLITS + share
    tl.store(top_ptr + out, top, mask=rows_in)
    tl.store(total_ptr + out, total, mask=rows_in)
    column = tl.arange(0, HALF)
    mask = rows_in[:, None] & (column < D // 2)[None, :]
    address = partial_ptr + out[:, None].to(tl.int64) * D + column[None, :]
    tl.store(address, acc0, mask=mask)
    tl.store(address + D // 2, acc1, mask=mask)


@triton.jit
def merge_shares(partial_ptr, top_ptr, total_ptr, head, column, D: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the shares of a head: sum partial e^(top - max) / sum total e^(top - max), float32 at `column`."""
    share = tl.arange(0, SPLITS)
    top = tl.load(top_ptr + head * SPLITS + share)
    total = tl.load(total_ptr + head * SPLITS + share)
    factor = tl.exp(top - tl.max(top, axis=0))  # 0 for an empty share
    # Empty shares hold zeros that need not be read: long allocations with short contexts have many.
    mask = (factor > 0)[:, None] & (column < D)[None, :]
    partial = tl.load(partial_ptr + (head * SPLITS + share)[:, None] * D + column[None, :], mask=mask, other=0.0)
    return tl.sum(partial * factor[:, None], axis=0) / tl.sum(total * factor, axis=0)


@triton.jit
def combine(
    partial_ptr, top_ptr, total_ptr, out_ptr,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Merge the shares of head `program_id(0)`: out [H, D]."""
    wait_for_predecessor(PDL)
    start_successor(PDL)
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixed = merge_shares(partial_ptr, top_ptr, total_ptr, head, column, D, SPLITS)
    tl.store(out_ptr + head * D + column, mixed.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def combine_int8(
    partial_ptr, top_ptr, total_ptr, xq_ptr, scale_ptr, sums_ptr,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """``combine`` rounded to `dtype`, then to int8 as ``quantize_rows`` does: one row of H * D activations."""
    wait_for_predecessor(PDL)
    start_successor(PDL)
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mixed = merge_shares(partial_ptr, top_ptr, total_ptr, head, column, D, SPLITS)
    x = tl.reshape(tl.where(column < D, mixed, 0.0).to(dtype).to(tl.float32), [BLOCK_D // 32, 32])
    local = tl.program_id(1) * (BLOCK_D // 32) + tl.arange(0, BLOCK_D // 32)
    write_int8(x, 0, head * (D // 32) + local, local < D // 32, xq_ptr, scale_ptr, sums_ptr, 32)
