"""Bring a checkpoint's matrices into the forms that XNNPACK multiplies by.

XNNPACK multiplies 8-bit activations by 4-bit weights with zero point 8 and one bfloat16 scale per group of a multiple
of 32 weights, or by 8-bit weights with zero point 0 and one float32 scale per row; scales are positive and normal.
Everything else is rewritten:

| stored | becomes | exact |
|---|---|---|
| 4 bits, any zero point | the codes, and per group an offset scale * (8 - zero point) times a sum of inputs | yes |
| negative scales (GGUF) | codes that count down, positive scales, another zero point | yes |
| 5 to 8 bits in groups | two 4-bit planes, code = 16 * high + low, and an offset | yes |
| 8 bits per row | as it is, and an offset when it is asymmetric | yes |
| scales that bfloat16 cannot hold (GGUF) | the same codes and offset, rounded scales | no, error measured |
| groups that are no multiple of 32 | 8 bits per row | no, error measured |
| not quantized | float32 | yes |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma4cli.export import cpu_ops
from gemma4cli.export.cpu_ops import INT4_CENTRE
from gemma4cli.quant.tensors import is_quantized, pack_nibbles, unpack_nibbles
from gemma4cli.quant.torchao_types import Int4Tensor

_GROUP_MULTIPLE = 32
_SLAB_WEIGHTS = 1 << 24  # 64 MiB of float32 at a time


@dataclass(frozen=True)
class Change:
    """What a matrix was, what it became because XNNPACK has no such form, and |after - before| / |before|."""

    stored: str
    becomes: str
    relative_error: float


def constant(tensor: Tensor | None) -> nn.Parameter | None:
    """Make a weight of any dtype a parameter: lowering drops parameters that delegates took over, not buffers."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


class CpuLinear(nn.Module):
    """``forward(x [..., K]) -> [..., N]``: the sum of one or more planes, and an offset.

    Args:
        planes: (weight, scale) pairs. uint8 [N, K / 2] with bfloat16 [N, G] is int4, int8 [N, K] with float32 [N] is
            int8, float32 [N, K] with None is itself.
        offset: float32 [N, G], added to every weight of its group.
    """

    def __init__(self, planes: list[tuple[Tensor, Tensor | None]], offset: Tensor | None = None) -> None:
        super().__init__()
        self.planes = len(planes)
        for index, (weight, scale) in enumerate(planes):
            self.register_parameter(f"weight{index}", constant(weight))
            self.register_parameter(f"scale{index}", constant(scale))
        self.register_parameter("offset", constant(offset))

    def forward(self, x: Tensor) -> Tensor:
        y = self._multiply(x, 0, self.offset)
        for index in range(1, self.planes):
            y = y + self._multiply(x, index, None)
        return y

    def _multiply(self, x: Tensor, index: int, offset: Tensor | None) -> Tensor:
        weight, scale = getattr(self, f"weight{index}"), getattr(self, f"scale{index}")
        if weight.dtype == torch.float32:
            return cpu_ops.linear_float(x, weight)
        multiply = cpu_ops.linear_int4 if weight.dtype == torch.uint8 else cpu_ops.linear_int8
        return multiply(x, weight, scale, offset)

    def values(self, rows: slice) -> Tensor:
        """Return rows of the matrix that this layer multiplies by, float32."""
        total = self._plane_values(0, rows)
        for index in range(1, self.planes):
            total = total + self._plane_values(index, rows)
        if self.offset is not None:
            total = total + self.offset[rows].repeat_interleave(total.shape[1] // self.offset.shape[1], dim=1)
        return total

    def _plane_values(self, index: int, rows: slice) -> Tensor:
        weight, scale = getattr(self, f"weight{index}"), getattr(self, f"scale{index}")
        if weight.dtype == torch.float32:
            return weight[rows]
        if weight.dtype == torch.int8:
            return weight[rows] * scale[rows, None]
        codes = unpack_nibbles(weight[rows]).float() - INT4_CENTRE
        return codes * scale[rows].float().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


@dataclass(frozen=True)
class Stored:
    """A quantized matrix as its checkpoint has it, whatever its class: value = scale * (code - zero_point).

    qdata is uint8 [N, K / 2] (`packed`) or int8 [N, K]; scale and zero_point are float32 [N, G].
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    packed: bool
    bits: int

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        if isinstance(tensor, Int4Tensor):
            scale, zero_point = tensor.scale.float().t(), tensor.zero_point.float().t()
            return cls(tensor.qdata, scale.contiguous(), zero_point.contiguous(), True, 4)
        bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
        return cls(tensor.qdata, tensor.scale.float(), tensor.zero_point.float(), False, bits)

    def with_positive_scales(self) -> Stored:
        """Return the same values with scales that XNNPACK takes; a scale of 0 becomes the smallest that is normal."""
        negative, qdata, zero_point = self.scale < 0, self.qdata, self.zero_point
        if bool(negative.any()):
            # Inverting the bits makes a code 15 - code, a signed one -1 - code: both count down.
            flipped = negative.repeat_interleave(qdata.shape[1] // negative.shape[1], dim=1)
            qdata = torch.where(flipped, ~qdata, qdata)
            zero_point = torch.where(negative, (15 if self.packed else -1) - zero_point, zero_point)
        scale = self.scale.abs().clamp(min=torch.finfo(torch.bfloat16).tiny)
        return Stored(qdata, scale, zero_point, self.packed, self.bits)

    @property
    def columns(self) -> int:
        return self.qdata.shape[1] * (2 if self.packed else 1)

    @property
    def group(self) -> int:
        return self.columns // self.scale.shape[1]

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """Return one code per byte, uint8 or int8 [N, K]."""
        return unpack_nibbles(self.qdata[rows]) if self.packed else self.qdata[rows]

    def values(self, rows: slice) -> Tensor:
        codes = self.codes(rows).float().unflatten(1, (-1, self.group))
        return ((codes - self.zero_point[rows, :, None]) * self.scale[rows, :, None]).flatten(1)

    def may_have_offset(self, zero: float) -> bool:
        """Tell whether some zero point is not `zero`, or will not be; a tensor on the meta device cannot say no."""
        return self.zero_point.is_meta or bool(((self.zero_point != zero) | (self.scale < 0)).any())

    def describe(self) -> str:
        return f"int{self.bits} {'per row' if self.scale.shape[1] == 1 else f'g{self.group}'}"


def prepare_linear(tensor: Tensor) -> tuple[CpuLinear, Change | None]:
    """Make the layer that multiplies by a checkpoint's matrix [N, K], and say what had to change, if anything."""
    if not is_quantized(tensor):
        return CpuLinear([(tensor.to(torch.float32), None)]), None
    stored = Stored.of(tensor).with_positive_scales()
    if not stored.packed and stored.scale.shape[1] == 1:
        offset = _unless_zero(-stored.scale * stored.zero_point)
        return CpuLinear([(stored.qdata, stored.scale[:, 0].contiguous())], offset), None
    if stored.group % _GROUP_MULTIPLE:
        return _changed(stored, _per_row(stored), "int8 per row")
    scale = stored.scale.to(torch.bfloat16)
    planes = [(stored.qdata, scale)] if stored.packed else _two_planes(stored.qdata, scale)
    # The planes give scale * (code - 8); the rest of the value is the same for a whole group.
    layer = CpuLinear(planes, _unless_zero(stored.scale * (INT4_CENTRE - stored.zero_point)))
    if torch.equal(scale.float(), stored.scale):
        return layer, None
    return _changed(stored, layer, f"{stored.describe()} with bfloat16 scales")


def planned_bytes(tensor: Tensor) -> int:
    """Return the bytes of what `prepare_linear` makes of a matrix, without reading its codes."""
    rows, columns = tensor.shape
    if not is_quantized(tensor):
        return 4 * rows * columns
    stored = Stored.of(tensor)
    groups = stored.scale.shape[1]
    if not stored.packed and groups == 1:
        return rows * columns + 4 * rows + (4 * rows if stored.may_have_offset(0) else 0)
    if stored.group % _GROUP_MULTIPLE:
        return rows * columns + 4 * rows
    offset = 4 * rows * groups if stored.may_have_offset(INT4_CENTRE) else 0
    return (1 if stored.packed else 2) * (rows * columns // 2 + 2 * rows * groups) + offset


def _two_planes(codes: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split signed codes into 16 * high + low with high in -8…7 and low in 0…15: each fits 4 bits around 8."""
    low, high = (codes & 15).to(torch.uint8), ((codes >> 4) + INT4_CENTRE).to(torch.uint8)
    return [(pack_nibbles(low), scale), (pack_nibbles(high), scale * 16)]


def _per_row(stored: Stored) -> CpuLinear:
    rows = stored.qdata.shape[0]
    codes, scale = torch.empty(rows, stored.columns, dtype=torch.int8), torch.empty(rows)
    for part in _slabs(rows, stored.columns):
        values = stored.values(part)
        scale[part] = values.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        codes[part] = torch.round(values / scale[part, None]).to(torch.int8)
    return CpuLinear([(codes, scale)])


def _changed(stored: Stored, layer: CpuLinear, becomes: str) -> tuple[CpuLinear, Change]:
    error = norm = 0.0
    for part in _slabs(stored.qdata.shape[0], stored.columns):
        before = stored.values(part)
        error += float((layer.values(part) - before).square().sum(dtype=torch.float64))
        norm += float(before.square().sum(dtype=torch.float64))
    return layer, Change(stored.describe(), becomes, float(f"{math.sqrt(error / norm) if norm else 0.0:.6g}"))


def _slabs(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _SLAB_WEIGHTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _unless_zero(offset: Tensor) -> Tensor | None:
    return offset if bool(offset.any()) else None
