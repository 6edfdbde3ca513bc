"""One GGUF tensor -> the torchao (or plain) tensor that holds it in a checkpoint.

Some rows at a time are decoded, on a few threads (the interpreter lock is released meanwhile): into arrays of the final
layout, or on their way into a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import dequantize as dequantize_by_gguf
from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.quant.gguf.blocks import FLOAT_TYPES, FORMATS, BlockFormat
from gemma4cli.quant.gguf.reader import GGUFTensor
from gemma4cli.quant.gguf.tensors import GGUFInt4Tensor, GGUFIntxTensor
from gemma4cli.quant.groupwise import CodeRange, encode, in_groups, min_max_parameters
from gemma4cli.quant.recipe import QuantSpec
from gemma4cli.quant.shards import ShardWriter
from gemma4cli.quant.tensors import MatrixBuilder, dequantize
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor

# What a thread takes at a time.
_SHARE_BYTES = 4 << 20
# A share's codes, two bytes for each byte of a GGUF at most, and the buffers for writing them.
BYTES_PER_THREAD = 16 << 20
_SAMPLE_WEIGHTS = 1 << 14
_FLOAT_DTYPES = {GGML.F32: torch.float32, GGML.F16: torch.float16, GGML.BF16: torch.bfloat16}
# What a type without a form of its own becomes.
REQUANTIZED_AS = QuantSpec(bits=4, group_size=32, symmetric=False, method="min-max")


def convert_tensor(source: GGUFTensor, pool: ThreadPoolExecutor | None) -> Tensor:
    """Return the tensor in memory of its own; a matrix keeps its codes and scales exactly, except Q2_K's.

    Args: pool: whose threads decode; None for the calling one.
    """
    if source.type in FLOAT_TYPES:
        return _plain(source)
    if source.type in FORMATS:
        return _decode(source, pool, None)
    return _requantize(source, pool)


def write_tensor(source: GGUFTensor, shard: ShardWriter, name: str, pool: ThreadPoolExecutor) -> float:
    """Convert a tensor into its place in a shard, and return its error as ``measured_error`` does.

    Of a matrix whose codes are kept memory holds the scales only, besides what each thread is at.
    """
    if source.type in FLOAT_TYPES:
        dtype = FLOAT_TYPES[source.type]
        _each_share(source, lambda at, to: shard.put_rows(name, "", at, source.blocks(at, to).view(dtype)), pool)
        return 0.0
    if source.type in FORMATS:
        shard.put(name, _decode(source, pool, shard, name), but="qdata")
        return measured_error(source, _Rows(source))
    tensor = _requantize(source, pool)
    shard.put(name, tensor)
    return measured_error(source, tensor)


def bytes_in_memory(source: GGUFTensor) -> int:
    """Return what `write_tensor` keeps of a tensor in memory, besides what each thread is at."""
    if source.type in FLOAT_TYPES:
        return 0
    tensor = empty_tensor(source)
    parts = [getattr(tensor, part) for part in (*tensor.tensor_data_names, *tensor.optional_tensor_data_names)]
    return sum(
        part.nbytes for part in parts if part is not None and (part is not tensor.qdata or source.type not in FORMATS)
    )


class _Rows:
    """A tensor whose rows are converted when asked for."""

    def __init__(self, source: GGUFTensor) -> None:
        self._source = source

    def __getitem__(self, rows: slice) -> Tensor:
        return convert_tensor(self._source.slice(rows.start, rows.stop), None)


def empty_tensor(source: GGUFTensor) -> Tensor:
    """Return what `convert_tensor` will make of it, without data: the same class, shapes and dtypes on "meta"."""
    if source.type in FLOAT_TYPES:
        return torch.empty(source.shape, dtype=_FLOAT_DTYPES[source.type], device="meta")
    if source.type in FORMATS:
        return _assemble(source, FORMATS[source.type], *_parts(source, FORMATS[source.type], "meta", "meta"))
    return MatrixBuilder(_matrix(source), REQUANTIZED_AS, "meta").finish()


def measured_error(source: GGUFTensor, tensor: Tensor | _Rows) -> float:
    """Return |stored - original| / |original| with gguf-py's decoder as the original (0 for a tensor of zeros).

    Where codes and scales are kept there is nothing to average: some rows, spread over the tensor, show it. A type that
    is quantized again is measured in full.
    """
    if source.type in FLOAT_TYPES:
        return 0.0
    everything = source.type not in FORMATS
    rows = max(1, _SAMPLE_WEIGHTS // source.shape[1])
    starts = range(0, source.rows, rows if everything else max(rows, source.rows // 4))
    error = norm = 0.0
    for start in starts:
        stop = min(start + rows, source.rows)
        reference = torch.from_numpy(reference_rows(source, start, stop))
        error += float((dequantize(tensor[start:stop]) - reference).square_().sum(dtype=torch.float64))
        norm += float(reference.square().sum(dtype=torch.float64))
    return math.sqrt(error / norm) if norm else 0.0


def reference_rows(source: GGUFTensor, start: int, stop: int) -> np.ndarray:
    """Return rows as gguf-py decodes them: float32 [rows, in]."""
    rows = dequantize_by_gguf(source.blocks(start, stop), source.type)
    return rows.astype(np.float32, copy=False).reshape(stop - start, -1)


def _pieces(start: int, stop: int, row_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into pieces of about so many bytes."""
    step = max(1, piece_bytes // row_bytes)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _each_share(source: GGUFTensor, work: Callable[[int, int], None], pool: ThreadPoolExecutor | None) -> None:
    """Call `work(start, stop)` for rows, on the pool's threads; rows that are done with leave our memory."""

    def share(start: int, stop: int) -> None:
        source.prefetch(start, min(2 * stop - start, source.rows))  # this share and the next, in large requests
        work(start, stop)
        source.drop_pages(start, stop)

    shares = list(_pieces(0, source.rows, source.nbytes // source.rows, _SHARE_BYTES))
    if pool is None:
        for start, stop in shares:
            share(start, stop)
        return
    pending = [pool.submit(share, start, stop) for start, stop in shares]
    wait(pending, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    wait(pending)  # nobody writes any more
    for future in pending:
        if not future.cancelled():
            future.result()


def _plain(source: GGUFTensor) -> Tensor:
    values = torch.from_numpy(source.blocks().reshape(-1).view(FLOAT_TYPES[source.type]).copy())
    return (values.view(torch.bfloat16) if source.type == GGML.BF16 else values).view(source.shape)


def _matrix(source: GGUFTensor) -> tuple[int, int]:
    if len(source.shape) != 2:
        raise G4Error(f"Tensor {source.name} of {source.file.path} has type {source.type.name} but is no matrix.",
                      hint="The file is damaged; fetch it again.")  # fmt: skip
    return source.shape


def _parts(
    source: GGUFTensor, block_format: BlockFormat, codes_on: str, scales_on: str = "cpu"
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Allocate (qdata, sub, step) of the shapes in tensors.py."""
    rows, columns = _matrix(source)
    packed = block_format.bits == 4
    pair = (2,) if block_format.has_min else ()
    groups, blocks = columns // block_format.group_size, columns // block_format.block_size
    codes = _empty((rows, columns // 2 if packed else columns), torch.uint8 if packed else torch.int8, codes_on)
    sub = _empty((rows, groups, *pair), torch.int8, scales_on) if block_format.two_level else None
    return codes, sub, _empty((rows, blocks, *pair), torch.float16, scales_on)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Allocate a tensor. numpy asks for huge pages, which torch does not; touching small ones costs a lot of time."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _decode(source: GGUFTensor, pool: ThreadPoolExecutor | None, shard: ShardWriter | None, name: str = "") -> Tensor:
    """Take all blocks apart. With a shard the codes go there, and the result's own are on the meta device."""
    block_format = FORMATS[source.type]
    codes, sub, step = _parts(source, block_format, "cpu" if shard is None else "meta")
    kept = codes.numpy() if shard is None else None
    dtype = np.dtype(np.uint8 if codes.dtype == torch.uint8 else np.int8)
    scales = (None if sub is None else sub.numpy(), step.numpy())
    block_bytes = source.nbytes // source.rows // step.shape[1]

    def work(start: int, stop: int) -> None:
        blocks = source.blocks(start, stop).reshape(-1, block_bytes)
        if shard is None:
            target = kept[start:stop]
        else:
            target = shard.memory(name, "qdata", start, (stop - start, codes.shape[1]), dtype)
        block_format.decode(blocks, target, *(None if array is None else array[start:stop] for array in scales))
        if shard is not None:
            shard.put_rows(name, "qdata", start, target)

    _each_share(source, work, pool)
    if not bool(step.isfinite().all()):
        raise _not_finite(source)
    return _assemble(source, block_format, codes, sub, step)


def _assemble(source: GGUFTensor, block_format: BlockFormat, qdata: Tensor, sub: Tensor | None, step: Tensor) -> Tensor:
    """Wrap the parts: in torchao's own classes when one float16 scale per group says it all, else in ours."""
    block_size, shape = [1, block_format.group_size], torch.Size(source.shape)
    target_dtype = getattr(torch, f"int{block_format.bits}")
    if block_format.has_min or block_format.two_level:
        if block_format.bits == 4:
            return GGUFInt4Tensor(qdata, step, block_size, shape, sub)
        return GGUFIntxTensor(qdata, step, target_dtype, block_size, torch.float32, sub)
    if block_format.bits == 4:
        scale = step.t().contiguous()
        return Int4Tensor(qdata, scale, torch.full_like(scale, 8), block_size, shape)
    zero_point = torch.zeros(step.shape, dtype=torch.int8, device=step.device)
    return IntxUnpackedToInt8Tensor(qdata, step, zero_point, target_dtype, block_size, torch.float32, None)


def _not_finite(source: GGUFTensor) -> G4Error:
    return G4Error(f"Tensor {source.name} of {source.file.path} has scales that are not finite numbers.",
                   hint="The file is damaged; fetch it again.")  # fmt: skip


def _requantize(source: GGUFTensor, pool: ThreadPoolExecutor | None) -> Tensor:
    """Quantize what gguf-py decodes. The zero point is no whole number: these types' grids lie even around 0."""
    builder = MatrixBuilder(_matrix(source), REQUANTIZED_AS)

    def work(start: int, stop: int) -> None:
        values = torch.from_numpy(reference_rows(source, start, stop))
        if not bool(values.isfinite().all()):
            raise _not_finite(source)
        groups = in_groups(values, REQUANTIZED_AS)
        scale, zero_point = min_max_parameters(groups, REQUANTIZED_AS)
        builder.put(start, encode(groups, scale, zero_point.bfloat16().float(), CodeRange.of(REQUANTIZED_AS)))

    _each_share(source, work, pool)
    return builder.finish()
