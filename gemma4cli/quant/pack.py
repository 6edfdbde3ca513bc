"""Quantized matrices of a checkpoint in the layout that the kernels read. Codes never change on the way.

What a matrix was made by (min-max, HQQ, a GGUF type) no longer matters afterwards. Scales that already have two levels
(GGUF's K-quants) are taken as they are; any other scale is re-encoded on a step per 256 weights, an error of at most
1/254 of the largest scale among them (kernels/quantized_matmul/format.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.kernels.quantized_matmul.format import (
    STEP_WIDTH,
    NotPackable,
    PackedWeight,
    WeightFormat,
    check_columns,
    encode_levels,
)
from gemma4cli.quant.gguf.tensors import GGUFInt4Tensor, GGUFIntxTensor
from gemma4cli.quant.planes import words_of_bytes, words_of_nibbles
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor

_GROUP = 32  # the kernels' group; wider groups repeat their scale


def pack_weight(tensor: Tensor, name: str, has_min: bool | None = None) -> PackedWeight:
    """Pack a quantized matrix [N, K], or some rows of one.

    Args: has_min: the whole matrix's, from ``packed_format``, when these are only rows of it.
    Raises: NotPackable naming the tensor when the kernels have no form for it.
    """
    if has_min is None:
        has_min = _has_min(tensor)
    if isinstance(tensor, GGUFInt4Tensor):
        return _with_own_levels(tensor, 4)
    if isinstance(tensor, GGUFIntxTensor):
        return _with_own_levels(tensor, 8 if tensor.bits == 8 else 6)
    if isinstance(tensor, Int4Tensor):
        scale, zero_point = (_per_group(p.t(), tensor.shape[1], name) for p in (tensor.scale, tensor.zero_point))
        return _with_affine_levels(tensor, scale, zero_point, 4, 0, has_min)
    if isinstance(tensor, IntxUnpackedToInt8Tensor):
        return _pack_intx(tensor, name, has_min)
    raise NotPackable(
        f"{name} is not quantized, and the GPU kernels multiply quantized weights only.",
        hint="Quantize the checkpoint with a recipe that covers every linear layer, e.g. g4 quantize --recipe default.",
    )


def packed_format(tensor: Tensor, name: str) -> WeightFormat:
    """Return the format ``pack_weight`` gives; of a matrix's codes one row is read."""
    row = tensor[:1]
    if tensor.is_meta and hasattr(row, "_apply_fn_to_data"):
        row = row._apply_fn_to_data(lambda part: torch.zeros(part.shape, dtype=part.dtype))
    return pack_weight(row, name, _has_min(tensor)).format


def _has_min(tensor: Tensor) -> bool:
    """Tell whether any zero point is not the middle of the codes. GGUF's tensors know by themselves: see their
    packing.
    """
    if isinstance(tensor, GGUFInt4Tensor | GGUFIntxTensor):
        return tensor.has_min
    if tensor.is_meta:  # planning ahead: nothing is known of the values, and 4 bits are seldom symmetric
        return isinstance(tensor, Int4Tensor)
    if isinstance(tensor, Int4Tensor):
        return bool((tensor.zero_point != 8).any())
    return isinstance(tensor, IntxUnpackedToInt8Tensor) and bool(tensor.zero_point.any())


def _with_own_levels(tensor: GGUFInt4Tensor | GGUFIntxTensor, bits: int) -> PackedWeight:
    """Pack codes whose scales may already be (sub, step) pairs."""
    columns = tensor.shape[1]
    if tensor.sub is not None and columns // tensor.step.shape[1] == STEP_WIDTH:
        sub, step = tensor.sub.contiguous(), tensor.step.contiguous()
    else:
        scale, minimum = tensor.group_scales()
        sub, step = encode_levels(scale, minimum, columns // scale.shape[1])
    # Codes of 3, 5 and 6 bits share the 6-bit planes: as they are above a minimum, else around the middle of 6 bits.
    centre = 0 if isinstance(tensor, GGUFInt4Tensor) else 1 << (tensor.bits - 1) if tensor.has_min else 32
    return _lay_out(tensor, centre, sub, step, bits, columns // sub.shape[1])


def _pack_intx(tensor: IntxUnpackedToInt8Tensor, name: str, has_min: bool) -> PackedWeight:
    bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
    scale, zero_point = (_per_group(p, tensor.shape[1], name) for p in (tensor.scale, tensor.zero_point))
    if bits == 8:
        return _with_affine_levels(tensor, scale, zero_point, 8, 0, has_min)
    target, centre = (4, 8) if bits <= 4 else (6, 32)
    return _with_affine_levels(tensor, scale, zero_point + centre, target, centre, has_min)


def _with_affine_levels(
    tensor: Tensor, scale: Tensor, zero_point: Tensor, bits: int, centre: int, has_min: bool
) -> PackedWeight:
    """Pack value = scale * (code - zero_point); without `has_min` every zero point is the middle of the codes."""
    sub, step = encode_levels(scale, scale * zero_point if has_min else None, _GROUP)
    return _lay_out(tensor, centre, sub, step, bits, _GROUP)


def _lay_out(tensor: Tensor, centre: int, sub: Tensor, step: Tensor, bits: int, group_size: int) -> PackedWeight:
    """Regroup a tensor's codes, to whose `qdata` the centre is added where it has one byte per code."""
    rows, columns = tensor.shape
    check_columns(columns, bits, group_size)
    if isinstance(tensor, Int4Tensor):
        codes, high = words_of_nibbles(tensor.qdata), None
    else:
        codes, high = words_of_bytes(tensor.qdata, centre, bits)
    weight_format = WeightFormat(bits, group_size, has_min=sub.ndim == 3)
    return PackedWeight(weight_format, (rows, columns), codes, high, sub, step)


def _per_group(parameter: Tensor, columns: int, name: str) -> Tensor:
    """Spread per-group parameters [N, G] over groups of 32: float32 [N, K / 32]."""
    width, rest = divmod(columns, parameter.shape[1])
    if rest or width % _GROUP:
        raise NotPackable(
            f"{name} is quantized in groups of {width}, and the kernels need a multiple of {_GROUP}.",
            hint=f"Use group_size = {_GROUP} in the recipe.",
        )
    spread = parameter.float()
    return spread if width == _GROUP else spread.repeat_interleave(width // _GROUP, dim=1)
