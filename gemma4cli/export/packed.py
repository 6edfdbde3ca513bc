"""Matrices as the backends' kernels read them (kernels/quantized_matmul/format.py): a module of buffers.

The buffers have shapes that follow from a weight's format alone, so a model of them can be built and traced before a
single weight is read; `weights.write_packed` puts a checkpoint's into the data file, `fill` into memory.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from gemma4cli.kernels.quantized_matmul.format import STEP_WIDTH, PackedWeight, WeightFormat
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.pack import pack_weight
from gemma4cli.quant.tensors import dequantize, is_quantized

PARTS = ("codes", "high", "sub", "step")
# Rows of a matrix that are packed at a time: bounds the memory beside the packed result.
_SLAB_ROWS = 8192


class PackedMatrix(nn.Module):
    """A packed weight [N, K] as buffers: `codes`, `high` (6-bit only), `sub`, `step`."""

    def __init__(self, fmt: WeightFormat, rows: int, columns: int) -> None:
        super().__init__()
        self.format, self.rows, self.columns = fmt, rows, columns
        levels = (2,) if fmt.has_min else ()
        self.register_buffer("codes", torch.empty(rows, columns // (4 if fmt.bits == 8 else 8), dtype=torch.int32))
        self.register_buffer("high", torch.empty(rows, columns // 16, dtype=torch.int32) if fmt.bits == 6 else None)
        self.register_buffer("sub", torch.empty(rows, columns // fmt.group_size, *levels, dtype=torch.int8))
        self.register_buffer("step", torch.empty(rows, -(-columns // STEP_WIDTH), *levels, dtype=torch.float16))

    def put(self, weight: PackedWeight, row: int) -> None:
        """Copy packed rows in; the first goes to `row`."""
        for name in PARTS:
            part = getattr(weight, name)
            if part is not None:
                getattr(self, name)[row : row + part.shape[0]] = part


class PackedModel(Protocol):
    """A module of which some parts are packed matrices."""

    def place_of(self, name: str) -> tuple[nn.Module, str]:
        """Return module and attribute of a checkpoint's plain tensor, or the matrix and first row of a packed one."""


Model = TypeVar("Model", bound=PackedModel)


def fill(model: Model, checkpoint: Checkpoint, progress: Progress = SILENT) -> Model:
    """Stream every tensor of a checkpoint into a model, one at a time, packing matrices slab by slab; returns it."""
    with progress.phase("pack", checkpoint.nbytes) as task:
        for name, tensor in checkpoint.stream():
            _put(model, name, tensor)
            parts = [getattr(tensor, part) for part in tensor.tensor_data_names] if is_quantized(tensor) else [tensor]
            task.advance(sum(part.numel() * part.element_size() for part in parts), name)
    return model


def _put(model: PackedModel, name: str, tensor: Tensor) -> None:
    place, part = model.place_of(name)
    if not isinstance(place, PackedMatrix):
        target = getattr(place, part)
        target.data.copy_(dequantize(tensor, target.dtype))
        return
    first = int(part)
    for row in range(0, tensor.shape[0], _SLAB_ROWS):
        place.put(pack_weight(tensor[row : row + _SLAB_ROWS], name, place.format.has_min), first + row)
