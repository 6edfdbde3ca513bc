"""GGUF's block formats, taken apart into integer codes and their scales. No float arithmetic happens here.

Source: ggml's ggml-common.h and gguf-py's quants.py, which the tests compare with bit for bit. A quantized row is a
sequence of blocks; each block is decoded into

    codes  4-bit types: uint8 [n, block / 2], two codes 0..15 per byte, the even column in the low nibble
           others:      int8 [n, block], centred: unsigned b-bit codes minus 2^(b-1)
    sub    int8 [n, block / group] or [n, block / group, 2]: integer (scale, minimum) per group; None without
    step   float16 [n, 1] or [n, 1, 2]: (scale, minimum) per block

and the value of a weight, with code in its unsigned or signed form as the type defines it, is

    step_scale * sub_scale * code - step_min * sub_min        (a factor that the type does not have is 1, a term 0)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import IQ4_NL

from gemma4cli.native import load_codes

_RUN = np.dtype((np.void, 32))
# What is decoded at a time, and all that is computed on the way, stays in the second-level cache.
_SLAB_BYTES = 256 << 10


@dataclass(frozen=True)
class Blocks:
    """Decoded blocks; shapes in the module's docstring."""

    codes: np.ndarray
    sub: np.ndarray | None
    step: np.ndarray


Decode = Callable[[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray], None]
"""Decodes blocks uint8 [n, bytes] into `codes`, `sub` and `step`: contiguous arrays of as many bytes as in `Blocks`."""


@dataclass(frozen=True)
class BlockFormat:
    """How one GGUF type is kept: bits and group of its codes, whether groups have a minimum, and the decoder."""

    type: GGML
    bits: int
    group_size: int
    has_min: bool
    two_level: bool
    decode: Decode

    @property
    def block_size(self) -> int:
        """Weights per block."""
        return GGML_QUANT_SIZES[self.type][0]


def _native(name: str) -> Decode:
    """The types that most files have are decoded in C++, some fifteen times faster than by whole-array arithmetic."""

    def decode(block: np.ndarray, codes: np.ndarray, sub: np.ndarray | None, step: np.ndarray) -> None:
        arrays = (block, codes, sub, step)
        assert all(array is None or array.flags.c_contiguous for array in arrays)
        start, *targets = (ctypes.c_void_p(None if array is None else array.ctypes.data) for array in arrays)
        load_codes()[f"g4_split_{name}"](start, ctypes.c_int64(len(block)), *targets)

    return decode


def _by_arrays(take_apart: Callable[[np.ndarray], Blocks]) -> Decode:
    def decode(block: np.ndarray, codes: np.ndarray, sub: np.ndarray | None, step: np.ndarray) -> None:
        count = max(1, _SLAB_BYTES // block.shape[1])
        targets = [None if array is None else array.reshape(len(block), -1) for array in (codes, sub, step)]
        for start in range(0, len(block), count):
            blocks = take_apart(block[start : start + count])
            for target, part in zip(targets, (blocks.codes, blocks.sub, blocks.step), strict=True):
                if target is not None:
                    target[start : start + count] = part.reshape(len(part), -1)

    return decode


def _block_bytes(block: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Copy some bytes of every block: uint8 [n, stop - start], contiguous.

    One opaque item per block copies several times faster than its bytes one by one.
    """
    item = np.dtype((np.void, stop - start))
    return np.ascontiguousarray(block[:, start:stop].view(item)).view(np.uint8)


def _runs(block: np.ndarray) -> np.ndarray:
    """Cut bytes into runs of 32: uint8 [n, 32 r] -> [r][n, 32], contiguous, as whole-array arithmetic likes it."""
    runs = block.view(_RUN)
    return np.ascontiguousarray(runs.T).view(np.uint8).reshape(runs.shape[1], len(block), 32)


def _join_runs(runs: list[np.ndarray]) -> np.ndarray:
    """Undo `_runs` for codes: r arrays uint8 [n, 32] -> int8 [n, 32 r]."""
    joined = np.empty((len(runs[0]), len(runs)), _RUN)
    for index, run in enumerate(runs):
        joined[:, index] = run.view(_RUN).reshape(-1)
    return joined.view(np.int8)


def _half_step(block: np.ndarray, start: int) -> np.ndarray:
    """Return a float16 per block, [n, 1]."""
    return _block_bytes(block, start, start + 2).view(np.float16)


def _step_and_negated_offset(block: np.ndarray) -> np.ndarray:
    """Q4_1 and Q5_1 add an offset where the K-quants subtract a minimum; flipping a sign bit is exact."""
    pair = _block_bytes(block, 0, 4).view(np.uint16).reshape(-1, 1, 2)
    pair[..., 1] ^= 0x8000
    return pair.view(np.float16)


def _five_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Q5_0's and Q5_1's codes: 16 bytes of nibbles and 4 of fifth bits -> centred int8 [n, 32]."""
    code = np.empty((len(low), 2), np.dtype((np.void, 16)))
    code[:, :1] = (low & 15).view(code.dtype)
    code[:, 1:] = (low >> 4).view(code.dtype)
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return (code.view(np.uint8) + (fifth << 4) - np.uint8(16)).view(np.int8)


def _q5_0(block: np.ndarray) -> Blocks:
    return Blocks(_five_bits(_block_bytes(block, 6, 22), _block_bytes(block, 2, 6)), None, _half_step(block, 0))


def _q5_1(block: np.ndarray) -> Blocks:
    return Blocks(
        _five_bits(_block_bytes(block, 8, 24), _block_bytes(block, 4, 8)), None, _step_and_negated_offset(block)
    )


def _q3_k(block: np.ndarray) -> Blocks:
    third, low = _block_bytes(block, 0, 32), _runs(_block_bytes(block, 32, 96))
    codes = []
    for run in range(8):
        # A set bit means that there is no 4 to subtract.
        codes.append((((low[run // 4] >> (2 * (run % 4))) & 3) | (((third >> run) & 1) << 2)) - np.uint8(4))
    packed = _block_bytes(block, 96, 108)
    low_scale = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high_scale = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)) & 3
    sub = (low_scale | (high_scale.reshape(-1, 16) << 4)) - np.uint8(32)
    return Blocks(_join_runs(codes), sub.view(np.int8), _half_step(block, 108))


# The points of the non-uniform 4-bit grid are whole numbers. A byte of two codes -> its low and its high code's point.
_IQ4_LOW, _IQ4_HIGH = (
    np.array(IQ4_NL.kvalues, np.int8)[codes].tobytes() for codes in (np.arange(256) & 15, np.arange(256) >> 4)
)


def _iq4_values(packed: np.ndarray) -> np.ndarray:
    """Look up codes: uint8 [n, 16 r] -> int8 [n, 32 r]; `bytes.translate` is several times faster than indexing."""
    raw, item = packed.tobytes(), np.dtype((np.void, 16))
    values = np.empty((len(packed) * packed.shape[1] // 16, 2), item)
    values[:, 0] = np.frombuffer(raw.translate(_IQ4_LOW), item)
    values[:, 1] = np.frombuffer(raw.translate(_IQ4_HIGH), item)
    return values.view(np.int8).reshape(len(packed), -1)


def _iq4_nl(block: np.ndarray) -> Blocks:
    return Blocks(_iq4_values(_block_bytes(block, 2, 18)), None, _half_step(block, 0))


def _iq4_xs(block: np.ndarray) -> Blocks:
    high = _block_bytes(block, 2, 4).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([block[:, 4:8] & 15, block[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    sub = (low | ((high.astype(np.uint8) & 3) << 4)) - np.uint8(32)
    return Blocks(_iq4_values(_block_bytes(block, 8, 136)), sub.view(np.int8), _half_step(block, 0))


FORMATS = {
    block_format.type: block_format
    for block_format in (
        BlockFormat(GGML.Q4_0, 4, 32, has_min=False, two_level=False, decode=_native("q4_0")),
        BlockFormat(GGML.Q4_1, 4, 32, has_min=True, two_level=False, decode=_native("q4_1")),
        BlockFormat(GGML.Q5_0, 5, 32, has_min=False, two_level=False, decode=_by_arrays(_q5_0)),
        BlockFormat(GGML.Q5_1, 5, 32, has_min=True, two_level=False, decode=_by_arrays(_q5_1)),
        BlockFormat(GGML.Q8_0, 8, 32, has_min=False, two_level=False, decode=_native("q8_0")),
        BlockFormat(GGML.Q3_K, 3, 16, has_min=False, two_level=True, decode=_by_arrays(_q3_k)),
        BlockFormat(GGML.Q4_K, 4, 32, has_min=True, two_level=True, decode=_native("q4_k")),
        BlockFormat(GGML.Q5_K, 5, 32, has_min=True, two_level=True, decode=_native("q5_k")),
        BlockFormat(GGML.Q6_K, 6, 16, has_min=False, two_level=True, decode=_native("q6_k")),
        BlockFormat(GGML.IQ4_NL, 8, 32, has_min=False, two_level=False, decode=_by_arrays(_iq4_nl)),
        BlockFormat(GGML.IQ4_XS, 8, 32, has_min=False, two_level=True, decode=_by_arrays(_iq4_xs)),
    )
}
# Kept as they are, in their own dtype.
FLOAT_TYPES = {GGML.F32: np.dtype("<f4"), GGML.F16: np.dtype("<f2"), GGML.BF16: np.dtype("<u2")}
# Decoded by gguf-py and quantized again: their grids and groups are none of our formats.
REQUANTIZED_TYPES = (
    GGML.Q2_K, GGML.IQ1_S, GGML.IQ1_M, GGML.IQ2_XXS, GGML.IQ2_XS, GGML.IQ2_S, GGML.IQ3_XXS, GGML.IQ3_S,
    GGML.TQ1_0, GGML.TQ2_0, GGML.MXFP4,
)  # fmt: skip
SUPPORTED_TYPES = (*FLOAT_TYPES, *FORMATS, *REQUANTIZED_TYPES)
