"""GGUF's blocks straight into the layout that the GPU kernels read.

The kernels' layout has GGUF's own order of nibbles (kernels/quantized_matmul/format.py), so the usual types are taken
apart and copied, with no code touched; the rest goes through a checkpoint's tensors, a few rows at a time. Both ways
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML

from gemma4cli.errors import G4Error
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, WeightFormat, encode_scales
from gemma4cli.quant.gguf.blocks import block_bytes, half_pair, half_step, six_bit_pairs
from gemma4cli.quant.gguf.convert_tensor import convert_tensor
from gemma4cli.quant.gguf.reader import GGUFTensor
from gemma4cli.quant.pack import pack_weight
from gemma4cli.quant.planes import swap_nibbles

_Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]
"""Per block: codes, high, sub (None where `step` is one float16 per group, still to be encoded), step."""


def pack_rows(source: GGUFTensor, start: int, stop: int, has_min: bool) -> PackedWeight:
    """Pack rows of a matrix; `has_min` as in ``pack_weight``.

    Raises: G4Error naming the tensor when a scale is not a finite number, or when the kernels have no form for it.
    """
    if source.type not in _DIRECT or source.shape[1] % 64:
        return pack_weight(convert_tensor(source.slice(start, stop), None), source.name, has_min)
    weight_format, take_apart = _DIRECT[source.type]
    rows, columns = stop - start, source.shape[1]
    codes, high, sub, step = take_apart(source.blocks(start, stop).reshape(-1, GGML_QUANT_SIZES[source.type][1]))
    if ((step.view(np.uint16) & 0x7C00) == 0x7C00).any():
        raise G4Error(f"Tensor {source.name} of {source.file.path} has scales that are not finite numbers.",
                      hint="The file is damaged; fetch it again.")  # fmt: skip
    source.drop_pages(start, stop)
    levels = (2,) if weight_format.has_min else ()
    if sub is None:
        scale = torch.from_numpy(step.astype(np.float32)).view(rows, -1)
        packed_sub, packed_step = encode_scales(scale, weight_format.group_size)
    else:
        packed_sub = torch.from_numpy(sub).view(rows, -1, *levels)
        packed_step = torch.from_numpy(step).view(rows, -1, *levels)
    return PackedWeight(
        weight_format,
        (rows, columns),
        _words(codes, rows),
        None if high is None else _words(high, rows),
        packed_sub.contiguous(),
        packed_step,
    )


def _words(data: np.ndarray, rows: int) -> torch.Tensor:
    return torch.from_numpy(data.view(np.uint8).reshape(rows, -1).view(np.int32))


def _exchange(runs: np.ndarray) -> np.ndarray:
    """Exchange the high nibbles of every even run with the low nibbles of the odd run after it.

    runs: [n, 2 r] items of whole bytes. Returns them as [n r, 2].
    """
    first, second = (np.ascontiguousarray(runs[:, side::2]).reshape(-1).view(np.uint64) for side in (0, 1))
    swap_nibbles(first, second)
    exchanged = np.empty((runs.size // 2, 2), runs.dtype)
    exchanged[:, 0], exchanged[:, 1] = first.view(runs.dtype), second.view(runs.dtype)
    return exchanged


def _q4_0(block: np.ndarray) -> _Parts:
    # GGUF's byte i holds weights i and 16 + i of a block of 32; ours i and 32 + i of two blocks.
    runs = block_bytes(block, 2, 18).view(np.dtype((np.void, 16))).reshape(-1, 2)
    return _exchange(runs), None, None, half_step(block, 0)


def _q8_0(block: np.ndarray) -> _Parts:
    return block_bytes(block, 2, 34), None, None, half_step(block, 0)


def _q4_k(block: np.ndarray) -> _Parts:
    return block_bytes(block, 16, 144), None, six_bit_pairs(block_bytes(block, 4, 16)), half_pair(block)


def _q5_k(block: np.ndarray) -> _Parts:
    # Bit g of byte i is the fifth bit of weight 32 g + i; ours has two bits for each of four groups per byte.
    fifth = block_bytes(block, 16, 48).view(np.uint64)
    high = np.empty((len(block), 2, 4), np.uint64)
    for half, nibble in enumerate((fifth & _LOW, (fifth >> _FOUR) & _LOW)):
        pairs = (nibble | (nibble << np.uint64(2))) & np.uint64(0x3333333333333333)
        high[:, half] = (pairs | (pairs << np.uint64(1))) & np.uint64(0x5555555555555555)
    return block_bytes(block, 48, 176), high, six_bit_pairs(block_bytes(block, 4, 16)), half_pair(block)


def _q6_k(block: np.ndarray) -> _Parts:
    # Of 128 weights, GGUF pairs (i, 64 + i) and (32 + i, 96 + i) in a byte; here (i, 32 + i) and (64 + i, 96 + i) meet.
    codes = _exchange(block[:, :128].view(np.dtype((np.void, 32))))
    return codes, block_bytes(block, 128, 192), block_bytes(block, 192, 208).view(np.int8), half_step(block, 208)


_LOW, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
_DIRECT: dict[GGML, tuple[WeightFormat, Callable[[np.ndarray], _Parts]]] = {
    GGML.Q4_0: (WeightFormat(4, 32, has_min=False), _q4_0),
    GGML.Q8_0: (WeightFormat(8, 32, has_min=False), _q8_0),
    GGML.Q4_K: (WeightFormat(4, 32, has_min=True), _q4_k),
    GGML.Q5_K: (WeightFormat(6, 32, has_min=True), _q5_k),
    GGML.Q6_K: (WeightFormat(6, 16, has_min=False), _q6_k),
}
