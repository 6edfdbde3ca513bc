"""Quantized matrices as torchao tensor subclasses, and back.

`Int4Tensor` (4 bits, two codes per byte) and `IntxUnpackedToInt8Tensor` (one code per byte, up to 8 bits) are the two
classes of our checkpoints; their layouts are in docs/architecture.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.quant.gguf.tensors import GGUFInt4Tensor, GGUFIntxTensor
from gemma4cli.quant.groupwise import Quantized
from gemma4cli.quant.recipe import QuantSpec
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor

_INT4_CENTRE = 8


class MatrixBuilder:
    """Fills one quantized matrix slab by slab, so that its parts are never held twice.

    With device "meta" it holds no data: `finish()` then gives the shapes and dtypes that a real one will have.
    """

    def __init__(self, shape: tuple[int, int], spec: QuantSpec, device: str = "cpu") -> None:
        rows, columns = shape
        group = spec.group_of(columns)
        self._spec, self._shape, self._group = spec, shape, group
        if spec.bits == 4:
            parameters = (columns // group, rows)
            self._qdata = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
            zero_dtype = torch.bfloat16
        else:
            parameters = (rows, columns // group)
            self._qdata = torch.empty(shape, dtype=torch.int8, device=device)
            zero_dtype = torch.bfloat16 if spec.method == "hqq" and not spec.symmetric else torch.int8
        self._scale = torch.empty(parameters, dtype=torch.bfloat16, device=device)
        self._zero_point = torch.empty(parameters, dtype=zero_dtype, device=device)

    def put(self, row: int, slab: Quantized) -> None:
        """Store quantized rows, the first of which is `row`."""
        rows = slice(row, row + slab.codes.shape[0])
        if self._spec.bits == 4:
            self._qdata[rows] = pack_nibbles(slab.codes.to(torch.uint8))
            self._scale[:, rows] = slab.scale.t()
            self._zero_point[:, rows] = slab.zero_point.t()
        else:
            self._qdata[rows] = slab.codes.to(torch.int8)
            self._scale[rows] = slab.scale
            self._zero_point[rows] = slab.zero_point.to(self._zero_point.dtype)

    def finish(self) -> Tensor:
        """Return the torchao tensor; the builder must not be used afterwards."""
        block_size = [1, self._group]
        if self._spec.bits == 4:
            return Int4Tensor(self._qdata, self._scale, self._zero_point, block_size, torch.Size(self._shape))
        return IntxUnpackedToInt8Tensor(
            self._qdata, self._scale, self._zero_point, torch.int8, block_size, torch.bfloat16, None
        )


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes 0 to 15, [N, K], into [N, K / 2]: the even column is the low nibble."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(qdata: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    return torch.stack((qdata & 0x0F, qdata >> 4), dim=-1).flatten(1)


def is_quantized(tensor: Tensor) -> bool:
    """Tell a torchao tensor of ours from a plain one."""
    return isinstance(tensor, Int4Tensor | IntxUnpackedToInt8Tensor)


def dequantize(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of a plain or quantized tensor; the arithmetic is float32 whatever `dtype`."""
    if isinstance(tensor, GGUFInt4Tensor | GGUFIntxTensor):
        return tensor.values().to(dtype)  # bit-equal to GGUF's own formula, which scale and zero point are not
    if isinstance(tensor, Int4Tensor):
        codes, parameters = unpack_nibbles(tensor.qdata), (tensor.scale.t(), tensor.zero_point.t())
    elif isinstance(tensor, IntxUnpackedToInt8Tensor):
        codes, parameters = tensor.qdata, (tensor.scale, tensor.zero_point)
    else:
        return tensor.to(dtype)
    return Quantized(codes, *parameters).dequantize().to(dtype)


def int4_to_intx(tensor: Int4Tensor) -> IntxUnpackedToInt8Tensor:
    """Re-wrap with signed codes, one per byte, for code that wants torchao's exportable class. Lossless.

    The zero point becomes int8 when all of them are whole numbers that fit, else float32.
    """
    if isinstance(tensor, GGUFInt4Tensor):
        return tensor.to_intx()
    zero_point = tensor.zero_point.t().float() - _INT4_CENTRE
    if bool((zero_point == zero_point.round()).all() & (zero_point.abs() < 128).all()):
        zero_point = zero_point.to(torch.int8)
    qdata = unpack_nibbles(tensor.qdata).to(torch.int8) - _INT4_CENTRE
    scale = tensor.scale.t().contiguous()
    return IntxUnpackedToInt8Tensor(
        qdata, scale, zero_point.contiguous(), torch.int4, tensor.block_size, scale.dtype, None
    )


def intx_to_int4(tensor: IntxUnpackedToInt8Tensor) -> Int4Tensor:
    """Undo `int4_to_intx`.

    Raises: ValueError when the tensor does not have 4-bit codes, or a zero point that the scale's dtype cannot hold.
    """
    if tensor.target_dtype != torch.int4:
        raise ValueError(f"an Int4Tensor cannot hold {tensor.target_dtype} codes")
    exact = tensor.zero_point.t().float() + _INT4_CENTRE
    zero_point = exact.to(tensor.scale.dtype)
    if not torch.equal(zero_point.float(), exact):
        raise ValueError(f"{tensor.scale.dtype} cannot hold these zero points exactly")
    qdata = pack_nibbles((tensor.qdata + _INT4_CENTRE).to(torch.uint8))
    scale = tensor.scale.t().contiguous()
    return Int4Tensor(qdata, scale, zero_point.contiguous(), list(tensor.block_size), torch.Size(tensor.qdata.shape))
