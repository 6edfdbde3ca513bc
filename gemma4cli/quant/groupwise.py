"""Min-max quantization of a matrix in groups along its rows.

Every method ends in the same affine form, value = scale * (code - zero_point), with one bfloat16 scale and one
bfloat16 zero point per group. Codes are computed against the rounded scale, the one that is stored, so rounding the
scale costs range, never a bias. Codes are unsigned at 4 bits (0 to 15) and signed at 8 (-128 to 127), as torchao's
`Int4Tensor` and `IntxUnpackedToInt8Tensor` store them.

- asymmetric: the range is [min(w, 0), max(w, 0)], the zero point a whole number, so a weight of 0 stays exactly 0;
- symmetric: scale = max|w| / 7 or / 127 and the code range loses its lowest value, so that q(-w) = -q(w).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4cli.quant.recipe import QuantSpec

# The smallest normal bfloat16: a group of zeros needs some scale, and one that is not 0 can be divided by.
SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class Quantized:
    """Rows of a quantized matrix: codes [N, K] int8, scale and zero_point [N, K / group] bfloat16."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def to(self, device: str) -> Quantized:
        """Move all three."""
        return Quantized(self.codes.to(device), self.scale.to(device), self.zero_point.to(device))

    def dequantize(self) -> Tensor:
        """Return scale * (code - zero_point), [N, K] float32."""
        rows, columns = self.codes.shape
        groups = self.codes.float().view(rows, self.scale.shape[1], -1)
        return ((groups - self.zero_point.float()[..., None]) * self.scale.float()[..., None]).view(rows, columns)


@dataclass(frozen=True)
class CodeRange:
    """The codes a spec may use. `centre` is the zero point of symmetric quantization."""

    low: int
    high: int
    centre: int

    @classmethod
    def of(cls, spec: QuantSpec) -> CodeRange:
        low, centre = (0, 8) if spec.bits == 4 else (-128, 0)
        return cls(low + 1 if spec.symmetric else low, low + 2**spec.bits - 1, centre)


def quantize(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Quantize a matrix, or some rows of it, by the spec's method.

    Args:
        weight: [N, K] finite, any float type, on the device to compute on; K a multiple of the group.
    """
    from gemma4cli.quant.hqq import quantize_hqq

    return quantize_hqq(weight, spec) if spec.method == "hqq" else quantize_min_max(weight, spec)


def quantize_min_max(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Quantize [N, K] with the range of each group as it is; see the module for the two kinds."""
    groups = in_groups(weight, spec)
    scale, zero_point = min_max_parameters(groups, spec)
    if not spec.symmetric:
        zero_point = zero_point.round()
    return encode(groups, scale, zero_point, CodeRange.of(spec))


def in_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return the weight as float32 [N, K / group, group]."""
    rows, columns = weight.shape
    group = spec.group_of(columns)
    return weight.float().view(rows, columns // group, group)


def min_max_parameters(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the scale, rounded to bfloat16, and the unrounded zero point that map each group's range onto the codes.

    Both are [N, G] float32.
    """
    codes = CodeRange.of(spec)
    if spec.symmetric:
        scale = stored_scale(groups.abs().amax(-1) / (codes.high - codes.centre))
        return scale, torch.full_like(scale, codes.centre)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = stored_scale((high - low) / (codes.high - codes.low))
    return scale, codes.low - low / scale


def stored_scale(scale: Tensor) -> Tensor:
    """Round a scale to what the checkpoint holds, as float32."""
    return scale.clamp(min=SMALLEST_SCALE).bfloat16().float()


def encode(groups: Tensor, scale: Tensor, zero_point: Tensor, codes: CodeRange) -> Quantized:
    """Round each weight to its nearest code.

    Args:
        groups: [N, G, g] float32.
        scale, zero_point: [N, G] float32 holding bfloat16 values.
    """
    # Adding the whole part of the zero point after rounding keeps w / scale at full precision beside a large zero.
    whole = zero_point.round()
    rounded = (groups / scale[..., None]).add_((zero_point - whole)[..., None]).round_().add_(whole[..., None])
    rounded.clamp_(codes.low, codes.high)
    return Quantized(rounded.flatten(1).to(torch.int8), scale.bfloat16(), zero_point.bfloat16())
