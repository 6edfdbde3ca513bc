"""Bytes inside 32-bit words, for the kernels of both kinds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signed_byte(word, INDEX: tl.constexpr):
    """Signed byte INDEX of 32-bit words, as float32."""
    return ((word << (24 - 8 * INDEX)) >> 24).to(tl.float32)


@triton.jit
def subtract_from_bytes(code, ZERO: tl.constexpr):
    """Subtract ZERO from each byte of a word of codes below 128, without borrows between bytes."""
    zeros: tl.constexpr = ZERO * 0x01010101
    top: tl.constexpr = -2139062144  # 0x80808080
    return ((code | top) - zeros) ^ top
