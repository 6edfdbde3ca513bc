"""One GGUF tensor -> the torchao (or plain) tensor that holds it in a checkpoint.

Rows are decoded in slabs that fit the processor's cache, on a few threads (numpy releases the interpreter lock), into
arrays of the final layout; so memory stays near the size of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import dequantize as dequantize_by_gguf
from torch import Tensor

from gemma4cli.quant.gguf.blocks import FLOAT_TYPES, FORMATS, BlockFormat
from gemma4cli.quant.gguf.reader import GGUFTensor
from gemma4cli.quant.gguf.tensors import GGUFInt4Tensor, GGUFIntxTensor
from gemma4cli.quant.recipe import QuantSpec
from gemma4cli.quant.tensors import MatrixBuilder
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor

_SLAB_BYTES = 1 << 20
# What a type without a form of its own becomes.
REQUANTIZED_AS = QuantSpec(bits=4, group_size=32, symmetric=False, method="min-max")


def convert_tensor(source: GGUFTensor, pool: ThreadPoolExecutor) -> Tensor:
    """Return the tensor in memory of its own; a matrix keeps its codes and scales exactly, except Q2_K's."""
    if source.type in FLOAT_TYPES:
        return _plain(source)
    if source.type in FORMATS:
        return _Decoded(source, FORMATS[source.type]).run(pool)
    return _requantize(source, pool)


def reference_rows(source: GGUFTensor, start: int, stop: int) -> np.ndarray:
    """Return rows as gguf-py decodes them: float32 [rows, in]."""
    rows = dequantize_by_gguf(source.blocks(start, stop), source.type)
    return rows.astype(np.float32, copy=False).reshape(stop - start, -1)


def slabs(source: GGUFTensor) -> Iterator[tuple[int, int]]:
    """Cut a tensor's rows into pieces of about a megabyte."""
    step = max(1, _SLAB_BYTES * source.rows // source.nbytes)
    for start in range(0, source.rows, step):
        yield start, min(start + step, source.rows)


def _each_slab(source: GGUFTensor, work: Callable[[int, int], None], pool: ThreadPoolExecutor) -> None:
    for future in [pool.submit(work, start, stop) for start, stop in slabs(source)]:
        future.result()


def _plain(source: GGUFTensor) -> Tensor:
    values = torch.from_numpy(source.blocks().reshape(-1).view(FLOAT_TYPES[source.type]).copy())
    return (values.view(torch.bfloat16) if source.type == GGML.BF16 else values).view(source.shape)


class _Decoded:
    """The arrays of one tensor while its slabs are decoded into them."""

    def __init__(self, source: GGUFTensor, block_format: BlockFormat) -> None:
        rows, columns = source.shape
        self.source, self.format = source, block_format
        groups, blocks = columns // block_format.group_size, columns // block_format.block_size
        pair = (2,) if block_format.has_min else ()
        packed = block_format.bits == 4
        self.codes = np.empty((rows, columns // 2 if packed else columns), np.uint8 if packed else np.int8)
        self.sub = np.empty((rows, groups, *pair), np.int8) if block_format.two_level else None
        self.step = np.empty((rows, blocks, *pair), np.float16)

    def run(self, pool: ThreadPoolExecutor) -> Tensor:
        _each_slab(self.source, self._decode, pool)
        return self._tensor()

    def _decode(self, start: int, stop: int) -> None:
        block_bytes = self.source.nbytes // self.source.rows // self.step.shape[1]
        blocks = self.format.decode(self.source.blocks(start, stop).reshape(-1, block_bytes))
        for target, part in ((self.codes, blocks.codes), (self.sub, blocks.sub), (self.step, blocks.step)):
            if target is not None:
                target[start:stop] = part.reshape(stop - start, *target.shape[1:])

    def _tensor(self) -> Tensor:
        qdata, step = torch.from_numpy(self.codes), torch.from_numpy(self.step)
        sub = None if self.sub is None else torch.from_numpy(self.sub)
        block_size, shape = [1, self.format.group_size], torch.Size(self.source.shape)
        target_dtype = getattr(torch, f"int{self.format.bits}")
        if self.format.has_min or self.format.two_level:
            if self.format.bits == 4:
                return GGUFInt4Tensor(qdata, step, block_size, shape, sub)
            return GGUFIntxTensor(qdata, step, target_dtype, block_size, sub)
        if self.format.bits == 4:
            scale = step.t().contiguous()
            return Int4Tensor(qdata, scale, torch.full_like(scale, 8), block_size, shape)
        zero_point = torch.zeros(step.shape, dtype=torch.int8)
        return IntxUnpackedToInt8Tensor(qdata, step, zero_point, target_dtype, block_size, torch.float32, None)


def _requantize(source: GGUFTensor, pool: ThreadPoolExecutor) -> Tensor:
    from gemma4cli.quant.groupwise import quantize

    builder = MatrixBuilder(source.shape, REQUANTIZED_AS)

    def work(start: int, stop: int) -> None:
        builder.put(start, quantize(torch.from_numpy(reference_rows(source, start, stop)), REQUANTIZED_AS))

    _each_slab(source, work, pool)
    return builder.finish()
