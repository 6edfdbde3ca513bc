"""The low-bit matmul kernels against their reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from gemma4cli.kernels.quantized_matmul import decode, prefill, reference
from gemma4cli.kernels.quantized_matmul.format import PackedWeight
from tests.support.packed_weights import FORMATS, random_weight, relative_error


@pytest.mark.parametrize(("m", "k"), [(1, 128), (3, 352), (2, 5376)])
def test_quantize_rows_equals_the_reference(m: int, k: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    x[0, :32] = 0
    xq = torch.full((m, k // 4), 99, dtype=torch.int32)
    scale, total = torch.full((m, k // 32), torch.nan), torch.full((m, k // 32), torch.nan)
    decode.quantize_rows[(triton.cdiv(k // 32, 8), m)](x, xq, scale, total, k, 8)
    expected_xq, expected_scale, expected_total = reference.quantize_activations(x)
    assert torch.equal(xq.view(torch.int8), expected_xq)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "group_size", "has_min"), FORMATS)
@pytest.mark.parametrize(("n", "k", "m"), [(1, 128, 1), (35, 384, 1), (6, 1152, 3), (5, 2048, 1), (3, 2432, 1)])
def test_matvec_equals_the_reference(bits: int, group_size: int, has_min: bool, n: int, k: int, m: int) -> None:
    weight, _, _ = random_weight(bits, group_size, has_min, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(n))
    xq, scale, total = reference.quantize_activations(x)
    y = torch.full((m, n), torch.nan)
    words, grid = xq.view(torch.int32), (triton.cdiv(n, 4), m)
    if bits == 8:
        decode.matvec_int8[grid](weight.codes, weight.sub, weight.step, words, scale, y, n, k, 4, 8, False)
    else:
        high = weight.codes if weight.high is None else weight.high
        decode.matvec[grid](
            weight.codes, high, weight.sub, weight.step, words, scale, total, y, n, k, bits, group_size, has_min, 4, 4,
            False
        )  # fmt: skip
    assert relative_error(y, reference.matmul_int8(x, weight)) < 1e-5  # float32 sums in another order


def run_prefill(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    fmt, (m, n, k) = weight.format, (x.shape[0], *weight.shape)
    y = torch.full((m, n), torch.nan)
    high = weight.codes if weight.high is None else weight.high
    prefill.matmul[(triton.cdiv(n, 16) * triton.cdiv(m, 32),)](
        weight.codes, high, weight.sub, weight.step, x, y, m, n, k, fmt.bits, fmt.group_size, fmt.has_min,
        16, 32, 2, tl.float32, False,
    )  # fmt: skip
    return y


PREFILL_SHAPES = [(2, 1, 64), (3, 17, 128), (63, 33, 192), (63, 40, 384), (130, 5, 640)]
# 6-bit weights come in 128 columns.
PREFILL_CASES = [(*fmt, *shape) for fmt in FORMATS for shape in PREFILL_SHAPES if fmt[0] != 6 or shape[2] % 128 == 0]


@pytest.mark.parametrize(("bits", "group_size", "has_min", "m", "n", "k"), PREFILL_CASES)
def test_prefill_equals_the_reference(bits: int, group_size: int, has_min: bool, m: int, n: int, k: int) -> None:
    weight, _, _ = random_weight(bits, group_size, has_min, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    assert relative_error(run_prefill(x, weight), reference.matmul(x, weight)) < 1e-5


def run_matvec(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    fmt, (n, k) = weight.format, weight.shape
    xq, scale, total = reference.quantize_activations(x)
    y = torch.full((1, n), torch.nan)
    decode.matvec[(triton.cdiv(n, 4), 1)](
        weight.codes, weight.codes, weight.sub, weight.step, xq.view(torch.int32), scale, total, y, n, k,
        fmt.bits, fmt.group_size, fmt.has_min, 4, 4, False,
    )  # fmt: skip
    return y


@pytest.mark.parametrize(("run", "m"), [(run_matvec, 1), (run_prefill, 5)])
def test_fused_rows_are_bit_exact(run: Callable[[torch.Tensor, PackedWeight], torch.Tensor], m: int) -> None:
    """Gate and up (or q, k, v) stacked along N give exactly what they give apart: rows do not meet."""
    first, _, _ = random_weight(4, 32, True, 12, 256)
    second, _, _ = random_weight(4, 32, True, 20, 256)
    fused = PackedWeight(
        first.format, (32, 256), *(None if a is None else torch.cat([a, b]) for a, b in (
            (first.codes, second.codes), (first.high, second.high), (first.sub, second.sub), (first.step, second.step)
        ))
    )  # fmt: skip
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(x, fused), torch.cat([run(x, first), run(x, second)], dim=1))
