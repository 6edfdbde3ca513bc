"""GGUF's blocks straight into the layout that the backends' kernels read.

The kernels' layout has GGUF's own order of nibbles (kernels/quantized_matmul/format.py), so the usual types are taken
apart and copied (in C++, `runner/codes/`), with no code touched; the rest goes through a checkpoint's tensors, a few
rows at a time. Both ways give the same bytes.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML

from gemma4cli.bulk_file import PAGE, ThreadMemory
from gemma4cli.errors import G4Error
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, WeightFormat, encode_scales
from gemma4cli.native import load_codes
from gemma4cli.quant.gguf.convert_tensor import convert_tensor
from gemma4cli.quant.gguf.reader import GGUFTensor
from gemma4cli.quant.pack import pack_weight

_DIRECT = {
    GGML.Q4_0: WeightFormat(4, 32, has_min=False),
    GGML.Q8_0: WeightFormat(8, 32, has_min=False),
    GGML.Q4_K: WeightFormat(4, 32, has_min=True),
    GGML.Q5_K: WeightFormat(6, 32, has_min=True),
    GGML.Q6_K: WeightFormat(6, 16, has_min=False),
}
_MEMORY = ThreadMemory()


def pack_rows(source: GGUFTensor, start: int, stop: int, has_min: bool) -> PackedWeight:
    """Pack rows of a matrix; `has_min` as in ``pack_weight``. The result is valid until the thread's next call.

    Raises: G4Error naming the tensor when a scale is not a finite number, or when the kernels have no form for it.
    """
    rows, columns = stop - start, source.shape[1]
    weight_format = _DIRECT.get(source.type)
    if weight_format is None or columns % 64:
        return pack_weight(convert_tensor(source.slice(start, stop), None), source.name, has_min)
    block_weights, _ = GGML_QUANT_SIZES[source.type]
    levels, has_sub = 1 + weight_format.has_min, block_weights > weight_format.group_size
    codes, high, sub, step = parts = _in_pages(
        rows * columns // (1 if weight_format.bits == 8 else 2),
        rows * columns // 4 if weight_format.bits == 6 else 0,
        rows * columns // weight_format.group_size * levels if has_sub else 0,
        rows * columns // block_weights * levels * 2,
    )
    blocks, *targets = (ctypes.c_void_p(array.ctypes.data) for array in (source.blocks(start, stop), *parts))
    count = ctypes.c_int64(rows * columns // block_weights)
    load_codes()[f"g4_pack_{source.type.name.lower()}"](blocks, count, *targets)
    source.drop_pages(start, stop)
    if ((step.view(np.uint16) & 0x7C00) == 0x7C00).any():
        raise G4Error(f"Tensor {source.name} of {source.file.path} has scales that are not finite numbers.",
                      hint="The file is damaged; fetch it again.")  # fmt: skip
    pair = (2,) if weight_format.has_min else ()
    steps = torch.from_numpy(step).view(torch.float16).view(rows, -1, *pair)
    if has_sub:
        subs = torch.from_numpy(sub).view(torch.int8).view(rows, -1, *pair)
    else:
        subs, steps = encode_scales(steps, weight_format.group_size)
    words = [torch.from_numpy(part).view(torch.int32).view(rows, -1) if len(part) else None for part in (codes, high)]
    return PackedWeight(weight_format, (rows, columns), *words, subs, steps)


def _in_pages(*sizes: int) -> list[np.ndarray]:
    """Return the calling thread's memory for parts of so many bytes, each from a page of its own on: whole pages are
    written from where they lie.
    """
    ends = list(accumulate(-(-size // PAGE) * PAGE for size in sizes))
    memory = np.frombuffer(_MEMORY.take(0, ends[-1]), np.uint8)
    return [memory[end - -(-size // PAGE) * PAGE :][:size] for end, size in zip(ends, sizes, strict=True)]
