"""Two torchao tensors whose scales stay as GGUF keeps them: small integers times a float16 step per block.

torchao's `Int4Tensor` and `IntxUnpackedToInt8Tensor` have one scale and one zero point per group. A K-quant has more to
say: per group of 16 or 32 an integer scale (and minimum), per 256 weights their float16 steps,

    value = step_scale * sub_scale * code - step_min * sub_min

Keeping that costs 0.63 bits per weight at group 32 where a float32 scale and zero point cost 2, nothing is rounded, and
the GPU format (kernels/quantized_matmul/format.py) takes `sub` and `step` as they are. For everyone else these classes
are what they derive from: `qdata` has its codes and layout, `scale` and `zero_point` are computed when asked for.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gemma4cli.quant.torchao_types import (
    ALLOWED_CLASSES,
    ALLOWED_TENSORS_SUBCLASSES,
    Int4Tensor,
    IntxUnpackedToInt8Tensor,
)

# A group whose integer scale is 0 but whose minimum is not has no zero point. This scale, in units of the minimum,
# gives it one; its weights then differ by at most 31 / 2^20 of their value. `values` is exact even there.
_FLAT_SCALE = 2.0**-20


class _GroupScales:
    """What both classes share; `qdata`, `step` and `sub` are theirs.

    step: float16 [N, K / block] or, with a minimum, [N, K / block, 2].
    sub: int8 [N, K / group] or [N, K / group, 2]; None when a block is one group (Q4_1, Q5_1).
    """

    step: Tensor
    sub: Tensor | None

    @property
    def has_min(self) -> bool:
        return self.step.ndim == 3

    def group_scales(self) -> tuple[Tensor, Tensor | None]:
        """Return (scale, minimum) per group as float32 [N, G]; both are exact products, minimum None without one."""
        level = self.step.float()
        if self.sub is not None:
            level = level.repeat_interleave(self.sub.shape[1] // level.shape[1], dim=1) * self.sub.float()
        return (level[..., 0], level[..., 1]) if self.has_min else (level, None)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return float32 (scale, zero point) [N, G] for unsigned codes: value = scale * (code - zero point)."""
        scale, minimum = self.group_scales()
        if minimum is None:
            return scale, torch.zeros_like(scale)
        flat = (scale == 0) & (minimum != 0)
        scale = torch.where(flat, minimum * _FLAT_SCALE, scale)
        return scale, torch.where(scale == 0, torch.zeros_like(scale), minimum / scale)

    def _exact(self, codes: Tensor) -> Tensor:
        """Return scale * code - minimum in float32, in gguf-py's order of operations. `codes` [N, K], uncentred."""
        scale, minimum = self.group_scales()
        groups = codes.float().view(*scale.shape, -1) * scale[..., None]
        if minimum is not None:
            groups -= minimum[..., None]
        return groups.view(codes.shape)


class GGUFInt4Tensor(_GroupScales, Int4Tensor):
    """Q4_1 and Q4_K. `qdata` uint8 [N, K / 2] as in Int4Tensor."""

    tensor_data_names: ClassVar[list[str]] = ["qdata", "step"]
    tensor_attribute_names: ClassVar[list[str]] = ["block_size", "shape"]
    optional_tensor_data_names: ClassVar[list[str]] = ["sub"]
    optional_tensor_attribute_names: ClassVar[list[str]] = []
    act_pre_scale = None
    activation_dtype = torch.bfloat16

    def __new__(
        cls, qdata: Tensor, step: Tensor, block_size: list[int], shape: torch.Size, sub: Tensor | None = None
    ) -> GGUFInt4Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=qdata.device, requires_grad=False
        )

    def __init__(
        self, qdata: Tensor, step: Tensor, block_size: list[int], shape: torch.Size, sub: Tensor | None = None
    ) -> None:
        self.qdata, self.step, self.sub, self.block_size = qdata, step, sub, block_size

    @property
    def scale(self) -> Tensor:
        """float32 [K / group, N], Int4Tensor's layout."""
        return self._affine()[0].t().contiguous()

    @property
    def zero_point(self) -> Tensor:
        """float32 [K / group, N], Int4Tensor's layout."""
        return self._affine()[1].t().contiguous()

    def codes(self) -> Tensor:
        """Return the codes 0..15, uint8 [N, K]."""
        return torch.stack([self.qdata & 15, self.qdata >> 4], dim=-1).view(self.shape)

    def to_intx(self) -> GGUFIntxTensor:
        """Re-wrap with centred codes, one per byte. Lossless."""
        return GGUFIntxTensor(
            (self.codes() - 8).view(torch.int8), self.step, torch.int4, self.block_size, self.dtype, self.sub
        )

    def values(self) -> Tensor:
        """Return the weights in float32, bit-equal to gguf-py's."""
        return self._exact(self.codes())

    dequantize = values


class GGUFIntxTensor(_GroupScales, IntxUnpackedToInt8Tensor):
    """Q3_K, Q5_1, Q5_K, Q6_K and IQ4_XS. `qdata` int8 [N, K]; codes with a minimum are centred (minus 2^(bits-1))."""

    tensor_data_names: ClassVar[list[str]] = ["qdata", "step"]
    tensor_attribute_names: ClassVar[list[str]] = ["target_dtype", "block_size", "dtype"]
    optional_tensor_data_names: ClassVar[list[str]] = ["sub"]
    optional_tensor_attribute_names: ClassVar[list[str]] = []
    activation_quantization = None

    def __new__(
        cls,
        qdata: Tensor,
        step: Tensor,
        target_dtype: torch.dtype,
        block_size: list[int],
        dtype: torch.dtype,
        sub: Tensor | None = None,
    ) -> GGUFIntxTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self,
        qdata: Tensor,
        step: Tensor,
        target_dtype: torch.dtype,
        block_size: list[int],
        dtype: torch.dtype,
        sub: Tensor | None = None,
    ) -> None:
        self.qdata, self.step, self.sub = qdata, step, sub
        self.target_dtype, self.block_size = target_dtype, block_size

    def to(self, *args: object, **kwargs: object) -> GGUFIntxTensor:
        """Move, or choose the dtype of `dequantize`; codes and scales stay as they are."""
        target = self._get_to_kwargs(*args, **kwargs)
        parts = [part if part is None else part.to(target["device"]) for part in (self.qdata, self.step, self.sub)]
        return GGUFIntxTensor(parts[0], parts[1], self.target_dtype, self.block_size, target["dtype"], parts[2])

    @property
    def bits(self) -> int:
        return int(str(self.target_dtype).removeprefix("torch.int"))

    @property
    def scale(self) -> Tensor:
        """float32 [N, K / group]."""
        return self._affine()[0]

    @property
    def zero_point(self) -> Tensor:
        """float32 [N, K / group], for the centred codes of `qdata`."""
        return self._affine()[1] - self._centre

    @property
    def _centre(self) -> int:
        return 1 << (self.bits - 1) if self.has_min else 0

    def values(self) -> Tensor:
        """Return the weights in float32, bit-equal to gguf-py's."""
        return self._exact(self.qdata.to(torch.int16) + self._centre)

    def dequantize(self) -> Tensor:
        """Return the weights in this tensor's dtype."""
        return self.values().to(self.dtype)


@GGUFInt4Tensor.implements([torch.ops.aten.slice.Tensor])
def _(func: object, types: object, args: tuple[GGUFInt4Tensor, int, int, int], kwargs: object) -> GGUFInt4Tensor:
    tensor, rows = _row_slice(*args)
    sub = None if tensor.sub is None else tensor.sub[rows]
    qdata = tensor.qdata[rows]
    return GGUFInt4Tensor(qdata, tensor.step[rows], tensor.block_size, torch.Size((len(qdata), tensor.shape[1])), sub)


@GGUFIntxTensor.implements([torch.ops.aten.slice.Tensor])
def _(func: object, types: object, args: tuple[GGUFIntxTensor, int, int, int], kwargs: object) -> GGUFIntxTensor:
    tensor, rows = _row_slice(*args)
    sub = None if tensor.sub is None else tensor.sub[rows]
    return GGUFIntxTensor(
        tensor.qdata[rows], tensor.step[rows], tensor.target_dtype, tensor.block_size, tensor.dtype, sub
    )


def _row_slice(
    tensor: Tensor, dim: int = 0, start: int = 0, end: int | None = None, step: int = 1
) -> tuple[Any, slice]:
    if dim != 0:
        raise NotImplementedError("only rows can be sliced: a block spans many columns")
    return tensor, slice(start, end)


# torchao's own safetensors support then writes and reads both classes.
ALLOWED_CLASSES |= {"GGUFInt4Tensor": GGUFInt4Tensor, "GGUFIntxTensor": GGUFIntxTensor}
ALLOWED_TENSORS_SUBCLASSES += ["GGUFInt4Tensor", "GGUFIntxTensor"]
