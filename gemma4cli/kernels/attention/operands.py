"""Tiles of a cache as operands of the tensor cores, in Gluon: words as they lie in memory, already in the right registers.

Each tile is needed twice, by a product over dims and by one over positions:

    scores [positions, queries]  = K q^T     first operand ``keys``, second ``queries``
    out^T [dims, queries]       += V^T w^T   first operand ``values``

A sum does not mind the order of its terms, nor does anybody mind that of rows which are put right at the end
(``natural``). So dims come in the order that makes an operand of what a thread has: CW neighbouring words of a
position's vector, or WD neighbouring words of two neighbouring positions. Nothing goes from thread to thread.

Words are int32: two bf16 numbers, four int8 codes or eight codes of 4 bits. Numbers stay bf16, levels are float16.
Tensors of words have an axis for each of the places that an index is made of:

    for keys    [warps, 2, 8, BLOCKS, 4, CW]            position = 16 warp + 8 a + b      word = (block * 4 + t) * CW + w
    for values  [warps, 2, 4, 2, C, warps, 8, WD]       position = ((s * 2 + a) * 4 + t) * 2 + pair
                                                        word = ((c * warps + warp) * 8 + g) * WD + w

with the lanes of a warp, 0 to 31, at 8 b + t, or 4 g + t.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemma4cli.kernels.attention import levels
from gemma4cli.kernels.attention.turboquant import COEFFICIENTS

_A = gl.constexpr(COEFFICIENTS[0])
_B = gl.constexpr(COEFFICIENTS[1])
_C = gl.constexpr(COEFFICIENTS[2])


def _assembly(registers: str, body: str, results: list[str]) -> str:
    """Instructions whose 32-bit `results` are two float16 outputs each."""
    outputs = "".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {name};" for i, name in enumerate(results))
    return "{ " + levels.REGISTERS + f" .reg .b32 {registers};" + body + outputs + " }"


# Of a word's codes.
_FRACTIONS = gl.constexpr(
    _assembly(
        "code, r0, r1",
        levels.FRACTION_CONSTANTS
        + levels.unsigned("code", "$4")
        + levels.fractions("r0", "code", levels.FIRST_BYTES)
        + levels.fractions("r1", "code", levels.LAST_BYTES),
        ["r0", "r1"],
    )
)
_LEVELS = gl.constexpr(
    _assembly(
        "low, high, r0, r1, r2, r3",
        levels.LEVEL_CONSTANTS
        + levels.doubled_nibbles("low", "high", "$8")
        + levels.levels("r0", "low", levels.FIRST_BYTES)
        + levels.levels("r1", "low", levels.LAST_BYTES)
        + levels.levels("r2", "high", levels.FIRST_BYTES)
        + levels.levels("r3", "high", levels.LAST_BYTES),
        ["r0", "r1", "r2", "r3"],
    )
)
# Of two words' codes, one of each beside the other: bytes 0 and 1 of both in `near`, 2 and 3 in `far`.
_NEAR_FAR = "prmt.b32 near, {0}, {1}, 0x5140; prmt.b32 far, {0}, {1}, 0x7362;"
_FRACTION_PAIRS = gl.constexpr(
    _assembly(
        "code0, code1, near, far, r0, r1, r2, r3",
        levels.FRACTION_CONSTANTS
        + levels.unsigned("code0", "$8")
        + levels.unsigned("code1", "$9")
        + _NEAR_FAR.format("code0", "code1")
        + levels.fractions("r0", "near", levels.FIRST_BYTES)
        + levels.fractions("r1", "near", levels.LAST_BYTES)
        + levels.fractions("r2", "far", levels.FIRST_BYTES)
        + levels.fractions("r3", "far", levels.LAST_BYTES),
        ["r0", "r1", "r2", "r3"],
    )
)
_LEVEL_PAIRS = gl.constexpr(
    _assembly(
        "near, far, low, high, r0, r1, r2, r3, r4, r5, r6, r7",
        levels.LEVEL_CONSTANTS
        + _NEAR_FAR.format("$16", "$17")
        + levels.doubled_nibbles("low", "high", "near")
        + levels.levels("r0", "low", levels.FIRST_BYTES)
        + levels.levels("r1", "low", levels.LAST_BYTES)
        + levels.levels("r4", "high", levels.FIRST_BYTES)
        + levels.levels("r5", "high", levels.LAST_BYTES)
        + levels.doubled_nibbles("low", "high", "far")
        + levels.levels("r2", "low", levels.FIRST_BYTES)
        + levels.levels("r3", "low", levels.LAST_BYTES)
        + levels.levels("r6", "high", levels.FIRST_BYTES)
        + levels.levels("r7", "high", levels.LAST_BYTES),
        [f"r{i}" for i in range(8)],
    )
)


@gluon.jit
def _value(word, INDEX: gl.constexpr, CODE_BITS: gl.constexpr, DOT: gl.constexpr):
    """Number or level `INDEX` of int32 words, without assembly, which Triton's interpreter has not."""
    if CODE_BITS == 0:
        return (word & -65536 if INDEX == 1 else word << 16).to(gl.float32, bitcast=True).to(DOT)
    elif CODE_BITS == 8:
        return (((word << (24 - 8 * INDEX)) >> 24).to(gl.float32) / 128).to(DOT)
    else:  # the low nibbles of its four bytes, then the high ones
        s = (2 * ((word >> (8 * (INDEX % 4) + 4 * (INDEX // 4))) & 15) - 15).to(gl.float32) / 16
        square = s * s
        inner = (square * _C + _B).to(gl.float16).to(gl.float32)
        return (s * (inner * square + _A).to(gl.float16).to(gl.float32)).to(gl.float16).to(DOT)


@gluon.jit
def _four(a, b, c, d):
    """Join four tensors along two last axes: [..., low bit, high bit] of their index."""
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def _word_values(words, CODE_BITS: gl.constexpr, DOT: gl.constexpr, ASM: gl.constexpr):
    """The values of int32 words [...]: [..., lo, hi] of codes of 8 bits, [..., lo, hi, half] of 4, [..., lo] of numbers."""
    if CODE_BITS == 0:
        if ASM:
            a, b = gl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
            )
        else:
            a, b = _value(words, 0, 0, DOT), _value(words, 1, 0, DOT)
        return gl.join(a, b)
    elif CODE_BITS == 8:
        if ASM:
            a, b, c, d = gl.inline_asm_elementwise(
                _FRACTIONS, "=h,=h,=h,=h,r", [words],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b = _value(words, 0, 8, DOT), _value(words, 1, 8, DOT)
            c, d = _value(words, 2, 8, DOT), _value(words, 3, 8, DOT)
        return _four(a, b, c, d)
    else:
        if ASM:
            a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
                _LEVELS, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16,
                       gl.float16, gl.float16, gl.float16, gl.float16),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b = _value(words, 0, 4, DOT), _value(words, 1, 4, DOT)
            c, d = _value(words, 2, 4, DOT), _value(words, 3, 4, DOT)
            e, f = _value(words, 4, 4, DOT), _value(words, 5, 4, DOT)
            g, h = _value(words, 6, 4, DOT), _value(words, 7, 4, DOT)
        return gl.join(_four(a, b, c, d), _four(e, f, g, h))


@gluon.jit
def _word_pairs(first, second, CODE_BITS: gl.constexpr, DOT: gl.constexpr, ASM: gl.constexpr):
    """``_word_values`` of two words side by side: [..., which word, low bit, high bit, half], as many as there are."""
    if ASM:
        if CODE_BITS == 0:
            a, a2, b, b2 = gl.inline_asm_elementwise(
                "{ .reg .b32 r0, r1; prmt.b32 r0, $4, $5, 0x5410; prmt.b32 r1, $4, $5, 0x7632;"
                " mov.b32 {$0, $1}, r0; mov.b32 {$2, $3}, r1; }",
                "=h,=h,=h,=h,r,r", [first, second],
                dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
            return _four(a, a2, b, b2)
        elif CODE_BITS == 8:
            a, a2, b, b2, c, c2, d, d2 = gl.inline_asm_elementwise(
                _FRACTION_PAIRS, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [first, second],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16,
                       gl.float16, gl.float16, gl.float16, gl.float16),
                is_pure=True, pack=1,
            )  # fmt: skip
            return gl.join(_four(a, a2, b, b2), _four(c, c2, d, d2))
        else:
            a, a2, b, b2, c, c2, d, d2, e, e2, f, f2, g, g2, h, h2 = gl.inline_asm_elementwise(
                _LEVEL_PAIRS, "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r", [first, second],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16,
                       gl.float16, gl.float16, gl.float16, gl.float16,
                       gl.float16, gl.float16, gl.float16, gl.float16,
                       gl.float16, gl.float16, gl.float16, gl.float16),
                is_pure=True, pack=1,
            )  # fmt: skip
            low = gl.join(_four(a, a2, b, b2), _four(c, c2, d, d2))
            return gl.join(low, gl.join(_four(e, e2, f, f2), _four(g, g2, h, h2)))
    else:
        a, b = _word_values(first, CODE_BITS, DOT, False), _word_values(second, CODE_BITS, DOT, False)
        x = gl.join(a, b)
        if CODE_BITS == 0:
            return x.permute([0, 1, 2, 3, 4, 5, 6, 8, 7])
        elif CODE_BITS == 8:
            return x.permute([0, 1, 2, 3, 4, 5, 6, 9, 7, 8])
        else:
            return x.permute([0, 1, 2, 3, 4, 5, 6, 10, 7, 8, 9])


@gluon.jit
def keys(
    words,
    NW: gl.constexpr,
    BLOCKS: gl.constexpr,
    CW: gl.constexpr,
    CODE_BITS: gl.constexpr,
    DOT: gl.constexpr,
    ASM: gl.constexpr,
):
    """Words as a first operand [16 NW positions, dims]."""
    S: gl.constexpr = 16 * NW
    D: gl.constexpr = 4 * BLOCKS * CW * (32 // CODE_BITS if CODE_BITS > 0 else 2)
    x = _word_values(words, CODE_BITS, DOT, ASM)
    if CODE_BITS == 0:
        x = x.reshape([NW, 2, 8, BLOCKS, 4, CW // 2, 2, 2]).permute([0, 1, 2, 3, 5, 6, 4, 7])
    elif CODE_BITS == 8:
        x = x.permute([0, 1, 2, 3, 5, 7, 4, 6])
    else:
        x = x.permute([0, 1, 2, 3, 5, 8, 7, 4, 6])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    return gl.convert_layout(x.reshape([S, D]), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def queries(x, N: gl.constexpr, NW: gl.constexpr, BLOCKS: gl.constexpr, RUN: gl.constexpr, CODE_BITS: gl.constexpr):
    """Queries [N, BLOCKS, 4, RUN dims] as a second operand [dims, N], in the order of ``keys``.

    RUN is what CW words hold of neighbouring dims: half their codes of 4 bits, of which the others belong to D / 2 on.
    """
    if CODE_BITS == 4:
        x = x.reshape([N, 2, BLOCKS // 2, 4, RUN // 4, 2, 2]).permute([0, 2, 4, 1, 5, 3, 6])
    else:
        x = x.reshape([N, BLOCKS, 4, RUN // 4, 2, 2]).permute([0, 1, 3, 4, 2, 5])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    x = x.reshape([N, 4 * BLOCKS * RUN]).permute([1, 0])
    return gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def values(
    words,
    NW: gl.constexpr,
    C: gl.constexpr,
    WD: gl.constexpr,
    CODE_BITS: gl.constexpr,
    DOT: gl.constexpr,
    ASM: gl.constexpr,
):
    """Words as a first operand [dims in the order that ``natural`` undoes, 16 NW positions]."""
    S: gl.constexpr = 16 * NW
    D: gl.constexpr = 8 * NW * C * WD * (32 // CODE_BITS if CODE_BITS > 0 else 2)
    first, second = gl.split(words.permute([0, 1, 2, 4, 5, 6, 7, 3]))
    x = _word_pairs(first, second, CODE_BITS, DOT, ASM)  # [s, a, t, c, warp, g, w, pair, lo, hi, half]
    if CODE_BITS == 0:
        x = x.permute([3, 6, 4, 8, 5, 0, 1, 2, 7])
    elif CODE_BITS == 8:
        x = x.permute([3, 6, 9, 4, 8, 5, 0, 1, 2, 7])
    else:
        x = x.permute([10, 3, 6, 9, 4, 8, 5, 0, 1, 2, 7])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    return gl.convert_layout(x.reshape([D, S]), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def natural(acc, N: gl.constexpr, NW: gl.constexpr, C: gl.constexpr, WD: gl.constexpr, CODE_BITS: gl.constexpr):
    """Rows [dims, N] of a product with ``values``, put in the order of dims."""
    D: gl.constexpr = 8 * NW * C * WD * (32 // CODE_BITS if CODE_BITS > 0 else 2)
    if CODE_BITS == 0:
        acc = acc.reshape([C, WD, NW, 2, 8, N]).permute([0, 2, 4, 1, 3, 5])
    elif CODE_BITS == 8:
        acc = acc.reshape([C, WD, 2, NW, 2, 8, N]).permute([0, 3, 5, 1, 2, 4, 6])
    else:
        acc = acc.reshape([2, C, WD, 2, NW, 2, 8, N]).permute([0, 1, 4, 6, 2, 3, 5, 7])
    return acc.reshape([D, N])
