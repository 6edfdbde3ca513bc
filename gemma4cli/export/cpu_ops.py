"""Operators of the CPU backend's graph, each one exactly what a few XNNPACK nodes compute.

Tracing sees one node per linear layer, norm or rotation instead of dozens; `xnnpack.py` writes each of them down as
XNNPACK nodes, so none of them exists in an exported program. Here they are defined with their arithmetic in PyTorch:
the prepared model that is made of them is the eager reference of the exported program.

Linear layers quantize their input to 8 bits per token, like XNNPACK ("qd8"), and multiply integers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4cli.quant.tensors import unpack_nibbles

INT4_CENTRE = 8

_library = torch.library.Library("g4", "FRAGMENT")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the last dimension to int8 with one scale and zero point per row.

    Returns: codes -128…127, zero point and scale, all float32; x ~ (codes - zero_point) * scale.
    Source: XNNPACK's `xnn_f32_qd8_asymmetric_quantization_params`; the range always includes 0.
    """
    low = torch.clamp(x.amin(-1, keepdim=True), max=0.0)
    high = torch.clamp(x.amax(-1, keepdim=True), min=0.0)
    inverse = torch.where(low == high, 1.0, 255.0 / torch.where(low == high, 1.0, high - low))
    low, high = low * inverse, high * inverse
    # Both ends cannot be exact after rounding the zero point: it follows the end whose error is smaller.
    zero_point = torch.where((-128.0 + low) + (127.0 + high) > 0, -128.0 - low, 127.0 - high)
    zero_point = torch.round(torch.clamp(zero_point, -128.0, 127.0))
    codes = torch.clamp(torch.round(x * inverse) + zero_point, -128.0, 127.0)
    return codes, zero_point, 1.0 / inverse


def group_sums(x: Tensor, groups: int) -> Tensor:
    """Sum runs of K / groups neighbours along the last dimension: [..., K] -> [..., groups]."""
    return x.unflatten(-1, (groups, -1)).sum(-1)


def _add_offset(y: Tensor, x: Tensor, offset: Tensor | None) -> Tensor:
    return y if offset is None else y + F.linear(group_sums(x, offset.shape[1]), offset)


def _linear_int4(x: Tensor, qdata: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    codes, zero_point, x_scale = quantize_rows(x)
    signed = (unpack_nibbles(qdata).float() - INT4_CENTRE).unflatten(-1, (scale.shape[1], -1))
    weight = (signed * scale.float().unsqueeze(-1)).flatten(-2)
    return _add_offset(F.linear(codes - zero_point, weight) * x_scale, x, offset)


def _linear_int8(x: Tensor, qdata: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    codes, zero_point, x_scale = quantize_rows(x)
    return _add_offset(F.linear(codes - zero_point, qdata.float()) * x_scale * scale, x, offset)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normal if weight is None else normal * weight


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x * (1 / cap)) * cap


def _define(schema: str, reference: object, shape: object) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, shape, "Meta")


def _linear_shape(x: Tensor, qdata: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


_define("linear_int4(Tensor x, Tensor qdata, Tensor scale, Tensor? offset) -> Tensor", _linear_int4, _linear_shape)
_define("linear_int8(Tensor x, Tensor qdata, Tensor scale, Tensor? offset) -> Tensor", _linear_int8, _linear_shape)
_define(
    "linear_float(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: F.linear(x, weight),
    lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_define(
    "rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    _rope,
    lambda x, cos, sin: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_define(
    "gelu_mul(Tensor gate, Tensor up) -> Tensor",
    _gelu_mul,
    lambda gate, up: torch.empty_like(gate, memory_format=torch.contiguous_format),
)
_define("softcap(Tensor x, float cap) -> Tensor", _softcap, lambda x, cap: torch.empty_like(x))


def linear_int4(x: Tensor, qdata: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Multiply by 4-bit weights ``scale * (code - 8) + offset``.

    Args:
        x: [..., K] float32.
        qdata: [N, K / 2] uint8, two codes 0…15 per byte, the even column in the low nibble.
        scale: [N, K / group] bfloat16, which is what XNNPACK's block-quantized weights hold; group a multiple of 32.
        offset: [N, K / group] float32, or None when all weights are symmetric. It carries zero points other than 8
            exactly: the offset's share is ``group sums of x @ offset.T``, 1 / group of the layer's arithmetic.
    Returns: [..., N] float32.
    """
    return torch.ops.g4.linear_int4(x, qdata, scale, offset)


def linear_int8(x: Tensor, qdata: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Multiply by 8-bit weights ``scale * code + offset``.

    Args: x [..., K] float32; qdata [N, K] int8; scale [N] float32; offset [N, 1] float32 or None.
    """
    return torch.ops.g4.linear_int8(x, qdata, scale, offset)


def linear_float(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by float32 weights [N, K]."""
    return torch.ops.g4.linear_float(x, weight)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square, times weight [D] when there is one."""
    return torch.ops.g4.rms_norm(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [1, T, H, D] by cos, sin [T, D / 2], pairing dimension i with i + D / 2."""
    return torch.ops.g4.rope(x, cos, sin)


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh form of GELU. XNNPACK's own GELU is the erf form."""
    return torch.ops.g4.gelu_mul(gate, up)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Keep x within -cap…cap. ExecuTorch's tanh takes 262,144 logits one by one in one thread; XNNPACK's does not."""
    return torch.ops.g4.softcap(x, cap)
