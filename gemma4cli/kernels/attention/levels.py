"""Instructions that make float16 levels of a cache's codes, two at a time, for kernels to put together as text.

Bytes become float16 numbers by way of their bits: as the low bits of a number whose high byte is a constant they are
that number plus a multiple of its last bit, and one instruction takes the constant off again.
"""

from __future__ import annotations

import struct

from gemma4cli.kernels.attention.turboquant import COEFFICIENTS

FIRST_BYTES, LAST_BYTES = "0x4140", "0x4342"  # which two of a register's bytes, for ``prmt``

REGISTERS = ".reg .b32 unit, offset, centre, a, b, c, s, u, v;"


def _pair(value: float) -> str:
    """Two float16 of one value, as the immediate of an instruction."""
    return f"0x{2 * struct.pack('>e', value).hex()}"


FRACTION_CONSTANTS = f"mov.b32 unit, {_pair(1 / 128)}; mov.b32 offset, {_pair(-9)};"
LEVEL_CONSTANTS = f"mov.b32 centre, {_pair(-64 - 15 / 16)};" + "".join(
    f"mov.b32 {name}, {_pair(value)};" for name, value in zip("abc", COEFFICIENTS, strict=True)
)


def unsigned(register: str, code: str) -> str:
    """int8 codes plus 128, as ``fractions`` wants them."""
    return f"xor.b32 {register}, {code}, 0x80808080;"


def fractions(result: str, source: str, which: str) -> str:
    """Two int8 codes / 128, exactly: bytes with 128 added are the low bits of float16 numbers from 1024 on."""
    return f"prmt.b32 {result}, {source}, 0x64646464, {which}; fma.rn.f16x2 {result}, {result}, unit, offset;"


def doubled_nibbles(low: str, high: str, code: str) -> str:
    """Both nibbles of four bytes, times two, as bytes."""
    return (
        f"shl.b32 {low}, {code}, 1; and.b32 {low}, {low}, 0x1E1E1E1E;"
        f"shr.u32 {high}, {code}, 3; and.b32 {high}, {high}, 0x1E1E1E1E;"
    )


def levels(result: str, source: str, which: str) -> str:
    """Two levels of turboquant.codebook: doubled codes are the low bits of float16 numbers from 64 on, in sixteenths."""
    return (
        f"prmt.b32 s, {source}, 0x54545454, {which}; add.rn.f16x2 s, s, centre; mul.rn.f16x2 u, s, s;"
        f"fma.rn.f16x2 v, u, c, b; fma.rn.f16x2 v, v, u, a; mul.rn.f16x2 {result}, s, v;"
    )
