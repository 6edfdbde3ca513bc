"""The weight layout that the kernels for matrix products read: low-bit codes with two levels of scales.

One family for every input and for CPU and GPU, so that min-max, HQQ and GGUF codes arrive there as they are:

    value[n, k] = step_scale[n, k // 256] * sub_scale[n, k // group] * (code[n, k] - zero)
                - step_min[n, k // 256] * sub_min[n, k // group]

| bits | code      | zero | group | with minimum    | bits per weight   | holds exactly the codes of               |
|------|-----------|------|-------|-----------------|-------------------|------------------------------------------|
| 4    | 0..15     | 8    | 32    | no              | 4.3125            | Q4_0, symmetric int4                     |
| 4    | 0..15     | 0    | 32    | yes             | 4.625             | Q4_K, Q4_1, asymmetric int4 and HQQ      |
| 6    | 0..63     | 32   | 16    | no              | 6.5625            | Q6_K                                     |
| 6    | 0..63     | 0    | 32    | yes             | 6.625             | Q5_K, Q5_1 (Q5_0 through its minimum)    |
| 8    | -128..127 | 0    | 32    | no              | 8.3125            | Q8_0, int8 per row (one scale repeated)  |
| 8    | -128..127 | 0    | 32    | yes             | 8.625             | asymmetric int8; on the CPU only         |

Layout, chosen for the reader: a warp reads whole 32-bit words of one row, and a 64-wide block of K is 8 code words
whose low nibbles are its first 32 weights and whose high nibbles are its last 32 (the order of GGUF's Q4_K, so packing
such a file copies bytes). The scale codes of a row lie apart from its codes, in the same order.

    codes  int32 [N, K / 8]   word j of block b: byte i, low nibble  = code[64 b + 4 j + i]
                                              high nibble = code[64 b + 32 + 4 j + i]
           (8-bit weights: int32 [N, K / 4], byte i of word j = code[4 j + i])
    high   int32 [N, K / 16]  6-bit only: word j of the 128-wide block c: byte i, bits 2 p .. 2 p + 1
                                              = code[128 c + 32 p + 4 j + i] >> 4
    sub    int8  [N, K / group] or, with a minimum, int8 [N, K / group, 2]: (sub_scale, sub_min)
    step   float16 [N, ceil(K / 256)] or [N, ceil(K / 256), 2]: (step_scale, step_min)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4cli.errors import G4Error

STEP_WIDTH = 256  # weights that share one pair of float16 steps
_SUB_LIMIT = 127


class NotPackable(G4Error):
    """Raised when a matrix has no form in this layout."""


@dataclass(frozen=True)
class WeightFormat:
    """One row of the table above: everything a kernel is specialised on except the shape."""

    bits: int
    group_size: int
    has_min: bool

    @property
    def zero(self) -> int:
        """The code that stands for 0 when there is no minimum."""
        return 0 if self.has_min or self.bits == 8 else 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (K a multiple of 256)."""
        levels = 2 if self.has_min else 1
        return self.bits + levels * (8 / self.group_size + 16 / STEP_WIDTH)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the layout above; `high` is None unless 6-bit."""

    format: WeightFormat
    shape: tuple[int, int]
    codes: Tensor
    high: Tensor | None
    sub: Tensor
    step: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.high, self.sub, self.step) if t is not None)


def pack(code: Tensor, scale: Tensor, minimum: Tensor | None, bits: int, group_size: int) -> PackedWeight:
    """Pack codes and per-group scales; codes survive exactly, scales are re-encoded on the per-256 step.

    Args:
        code: [N, K] integer; 0..15 (4-bit), 0..63 (6-bit) or -128..127 (8-bit). K a multiple of 64 (128 for 6-bit).
        scale: [N, K // group_size] float; may be negative.
        minimum: [N, K // group_size] float: value = scale * code - minimum; None for value = scale * (code - zero).
    Raises:
        NotPackable: when K does not divide.
    """
    return assemble(code, *encode_levels(scale, minimum, group_size), bits, group_size)


def assemble(code: Tensor, sub: Tensor, step: Tensor, bits: int, group_size: int) -> PackedWeight:
    """Lay out codes whose scales already have two levels (GGUF's K-quants do): nothing is rounded.

    Args:
        code: as in ``pack``.
        sub: int8 [N, K // group_size] or, with a minimum, [N, K // group_size, 2].
        step: float16 [N, ceil(K / 256)] or [N, ceil(K / 256), 2].
    Raises:
        NotPackable: when K does not divide.
    """
    n, k = code.shape
    check_columns(k, bits, group_size)
    if bits == 8:
        codes, high = code.to(torch.int8).contiguous().view(torch.int32), None
    else:
        low = (code & 15).to(torch.uint8).view(n, k // 64, 2, 32)
        codes = (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(n, k // 2).view(torch.int32)
        high = _pack_high(code) if bits == 6 else None
    weight_format = WeightFormat(bits, group_size, has_min=sub.ndim == 3)
    return PackedWeight(weight_format, (n, k), codes, high, sub.contiguous(), step.contiguous())


def check_columns(columns: int, bits: int, group_size: int) -> None:
    """Refuse in_features that the layout cannot hold.

    Raises: NotPackable with the number that must divide it.
    """
    block = 128 if bits == 6 else 64
    if columns % block or columns % group_size:
        raise NotPackable(f"A {bits}-bit weight needs in_features that are a multiple of {block}, got {columns}.")


def _pack_high(code: Tensor) -> Tensor:
    """Return bits 4 and 5 of 6-bit codes [N, K] as int32 [N, K / 16]."""
    n, k = code.shape
    two = (code >> 4).to(torch.uint8).view(n, k // 128, 4, 32)
    packed = two[:, :, 0] | (two[:, :, 1] << 2) | (two[:, :, 2] << 4) | (two[:, :, 3] << 6)
    return packed.reshape(n, k // 4).view(torch.int32)


def encode_levels(scale: Tensor, minimum: Tensor | None, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (sub, step) of scales and, unless None, minima: both float [N, G]."""
    sub_scale, step_scale = encode_scales(scale, group_size)
    if minimum is None:
        return sub_scale, step_scale
    sub_min, step_min = encode_scales(minimum, group_size)
    return torch.stack([sub_scale, sub_min], dim=-1), torch.stack([step_scale, step_min], dim=-1)


def encode_scales(value: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Split per-group values [N, G] into int8 codes [N, G] and a float16 step per 256 weights [N, ceil(K / 256)].

    The error of a group is at most half a step: 1/254 of the largest magnitude among the 256 weights' groups, plus the
    rounding of the step to float16.
    """
    n, groups = value.shape
    per_step = STEP_WIDTH // group_size
    steps = -(-groups // per_step)
    padded = torch.nn.functional.pad(value.float(), (0, steps * per_step - groups)).view(n, steps, per_step)
    step = (padded.abs().amax(dim=-1) / _SUB_LIMIT).to(torch.float16)
    # A subnormal step would lose the codes' precision: such groups are zero to any other weight's scale.
    divisor = torch.where(step > 0, step.float(), torch.ones_like(step, dtype=torch.float32))
    sub = torch.round(padded / divisor[..., None]).clamp(-_SUB_LIMIT, _SUB_LIMIT).to(torch.int8)
    return sub.view(n, -1)[:, :groups], step


def unpack_codes(weight: PackedWeight) -> Tensor:
    """Return the integer codes [N, K] int32, unsigned for 4 and 6 bits, signed for 8."""
    n, k = weight.shape
    if weight.format.bits == 8:
        return ((_bytes(weight.codes) << 24) >> 24).view(n, k)
    low = _bytes(weight.codes).view(n, k // 64, 32)
    code = torch.stack([low & 15, low >> 4], dim=2).view(n, k)
    if weight.high is not None:
        high = _bytes(weight.high).view(n, k // 128, 32)
        two = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).view(n, k)
        code = code | (two << 4)
    return code


def _bytes(words: Tensor) -> Tensor:
    """Return the four bytes of each int32 word as int32 [..., 4]: exported graphs have no view in another dtype."""
    return torch.stack([(words >> shift) & 255 for shift in (0, 8, 16, 24)], dim=-1)


def dequantize(weight: PackedWeight) -> Tensor:
    """Return the weight [N, K] float32 by the formula at the top of this file."""
    k = weight.shape[1]
    fmt = weight.format
    sub, step = weight.sub.float(), weight.step.float()
    if not fmt.has_min:
        sub, step = sub[..., None], step[..., None]
    per_step = STEP_WIDTH // fmt.group_size
    level = sub * step.repeat_interleave(per_step, dim=1)[:, : sub.shape[1]]
    level = level.repeat_interleave(fmt.group_size, dim=1)[:, :k]
    value = level[..., 0] * (unpack_codes(weight).float() - fmt.zero)
    return value - level[..., 1] if fmt.has_min else value
