"""Linear layers and an embedding over packed low-bit weights, from the formulas in ``quantized_matmul.format``."""

from __future__ import annotations

from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.kernels.quantized_matmul.format import STEP_WIDTH, PackedWeight, WeightFormat, dequantize
from gemma4cli.kernels.quantized_matmul.reference import matmul_int8

_WEIGHTS_PER_WORD = {4: 8, 6: 8, 8: 4}


def packed_weight(
    codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, columns: int | None = None
) -> PackedWeight:
    """Return the weight that the four tensors hold; their shapes say in which format.

    Args:
        columns: K, if known. By shapes alone, 8-bit weights in groups of 16 with up to 128 columns would be 4-bit ones
            in groups of 32, with twice the columns.
    Raises: G4Error when the shapes belong to no format.
    """
    rows, words = codes.shape
    groups, steps = sub.shape[1], step.shape[1]
    for bits in (4, 8) if high is None else (6,):
        k = words * _WEIGHTS_PER_WORD[bits]
        for group_size in (16, 32):
            if columns in (None, k) and k == groups * group_size and steps == -(-k // STEP_WIDTH):
                weight_format = WeightFormat(bits, group_size, has_min=sub.ndim == 3)
                return PackedWeight(weight_format, (rows, k), codes, high, sub, step)
    raise G4Error(f"Codes {tuple(codes.shape)} and scales {tuple(sub.shape)} and {tuple(step.shape)} do not fit.")


def linear_reference(x: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor) -> Tensor:
    """Multiply activations, rounded to int8, by a packed weight [N, K] transposed.

    Args:
        x: [..., K]; rounded in runs of 32 as `quantize_activations` does.
        codes, high, sub, step: as in ``quantized_matmul.format``; high is None unless 6-bit.
    Returns: [..., N] float32.
    """
    weight = packed_weight(codes, high, sub, step, x.shape[-1])
    return matmul_int8(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def embedding_reference(
    tokens: Tensor, codes: Tensor, high: Tensor | None, sub: Tensor, step: Tensor, factor: float
) -> Tensor:
    """Look tokens up in a packed table.

    Args:
        tokens: [1, T] int64.
        codes, high, sub, step: the table [N, K] as in ``quantized_matmul.format``; high is None unless 6-bit.
    Returns: the tokens' rows times factor, [1, T, K] float32.
    """
    row = tokens.flatten()
    rows = packed_weight(codes[row], None if high is None else high[row], sub[row], step[row])
    return (dequantize(rows) * factor).unflatten(0, tokens.shape)


def linear_float_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N], all float32."""
    return x @ weight.T
