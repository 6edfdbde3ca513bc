"""Codes of a checkpoint regrouped into the words of the packed layout (kernels/quantized_matmul/format.py).

The same as unpacking to one code per element and ``format.assemble``, several times faster: whole runs of bytes are
moved, and eight bytes are worked on at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_RUN16, _RUN32 = np.dtype((np.void, 16)), np.dtype((np.void, 32))
_LOW, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)


def _swap_nibbles(first: np.ndarray, second: np.ndarray) -> None:
    """Exchange the high nibbles of `first` with the low nibbles of `second`; both uint64, changed in place."""
    exchanged = first >> _FOUR
    exchanged ^= second
    exchanged &= _LOW
    second ^= exchanged
    exchanged <<= _FOUR
    first ^= exchanged


def words_of_nibbles(qdata: Tensor) -> Tensor:
    """Regroup 4-bit codes, two neighbours per byte: uint8 [N, K / 2] -> int32 [N, K / 8]. K a multiple of 64."""
    first, second = _runs(qdata, _RUN16, 2)
    _swap_nibbles(first, second)
    # Now bytes j hold codes (2 j, 32 + 2 j) and (2 j + 1, 33 + 2 j) of a block.
    pairs = second.view(np.uint8).astype(np.uint16)
    pairs <<= np.uint16(8)
    pairs |= first.view(np.uint8)
    return _words(pairs, len(qdata))


def words_of_bytes(qdata: Tensor, centre: int, bits: int) -> tuple[Tensor, Tensor | None]:
    """Regroup codes of one byte each: int8 [N, K] plus `centre` -> (codes, high) of `bits` 4, 6 or 8.

    K a multiple of 64, or of 128 for 6 bits. For 8 bits the result is a view.
    """
    if bits == 8:
        return qdata.contiguous().view(torch.int32), None
    codes = qdata + centre
    runs = _runs(codes, _RUN32, 2 if bits == 4 else 4)
    low = np.empty((runs[0].size // 4, len(runs) // 2), _RUN32)
    for index in range(len(runs) // 2):
        first, second = runs[2 * index], runs[2 * index + 1]
        low[:, index] = ((first & _LOW) | ((second & _LOW) << _FOUR)).view(_RUN32)
    high = _words(_upper_bits(runs), len(codes)) if bits == 6 else None
    return _words(low, len(codes)), high


def _upper_bits(runs: list[np.ndarray]) -> np.ndarray:
    """Put bits 4 and 5 of four runs into one byte, the first run's lowest."""
    two, four = np.uint64(2), np.uint64(4)
    masks = [np.uint64(0x0303030303030303 << shift) for shift in (0, 2, 4, 6)]
    high = (runs[0] >> four) & masks[0]
    high |= (runs[1] >> two) & masks[1]
    high |= runs[2] & masks[2]
    high |= (runs[3] << two) & masks[3]
    return high


def _runs(data: Tensor, run: np.dtype, count: int) -> list[np.ndarray]:
    """Deal out runs of bytes to `count` arrays in turn, each uint64 and contiguous."""
    table = data.contiguous().numpy().reshape(-1).view(run).reshape(-1, count)
    return [np.ascontiguousarray(table[:, index]).view(np.uint64) for index in range(count)]


def _words(data: np.ndarray, rows: int) -> Tensor:
    return torch.from_numpy(data.view(np.uint8).reshape(rows, -1).view(np.int32))
