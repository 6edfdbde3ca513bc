"""The low-bit matmul kernels against their reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from gemma4cli.kernels.quantized_matmul import decode, matvec, prefill, reference
from gemma4cli.kernels.quantized_matmul.format import PackedWeight
from tests.support.gluon_interpreter import interpreted
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


def run_matvec(x: torch.Tensor, weight: PackedWeight, warps: tuple[int, int, int] = (2, 1, 1)) -> torch.Tensor:
    """`warps`: rows of a warp, warps side by side, warps that share a row."""
    fmt, (n, k), m = weight.format, weight.shape, x.shape[0]
    xq, scale, total = reference.quantize_activations(x)
    y = torch.full((m, n), torch.nan)
    interpreted(matvec.matvec)[(triton.cdiv(n, warps[0] * warps[1]), m)](
        weight.codes, weight.codes if weight.high is None else weight.high, weight.sub, weight.step,
        xq.view(torch.int32), scale, total, y, n, k, fmt.bits, fmt.group_size, fmt.has_min, *warps, False, False, 0,
    )  # fmt: skip
    return y


LOW_BITS = [fmt for fmt in FORMATS if fmt[0] != 8]
# One step and a part of one, six steps unrolled, pairs of steps with one left over and with none, a row shared by warps.
MATVEC_SHAPES = [(1, 128, 1), (35, 384, 1), (6, 1152, 3), (5, 6144, 1), (3, 8320, 1), (3, 9216, 1)]
WARPS = [(2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 1, 4)]


@pytest.mark.parametrize(("bits", "group_size", "has_min"), LOW_BITS)
@pytest.mark.parametrize(("n", "k", "m"), MATVEC_SHAPES)
def test_matvec_equals_the_reference(bits: int, group_size: int, has_min: bool, n: int, k: int, m: int) -> None:
    weight, _, _ = random_weight(bits, group_size, has_min, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(n))
    expected = reference.matmul_int8(x, weight)
    for warps in WARPS if k < 1024 else WARPS[::3]:
        assert relative_error(run_matvec(x, weight, warps), expected) < 1e-5, warps  # float32 sums in another order


@pytest.mark.parametrize(("n", "k", "m"), [(1, 128, 1), (35, 384, 1), (6, 1152, 3)])
def test_matvec_of_8_bits_equals_the_reference(n: int, k: int, m: int) -> None:
    weight, _, _ = random_weight(8, 32, False, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(n))
    xq, scale, _ = reference.quantize_activations(x)
    y = torch.full((m, n), torch.nan)
    decode.matvec_int8[(triton.cdiv(n, 4), m)](
        weight.codes, weight.sub, weight.step, xq.view(torch.int32), scale, y, n, k, 4, 8, False
    )
    assert relative_error(y, reference.matmul_int8(x, weight)) < 1e-5


@pytest.mark.parametrize("first_format", LOW_BITS)
@pytest.mark.parametrize("second_format", LOW_BITS)
def test_a_pair_is_one_matvec_after_the_other(
    first_format: tuple[int, int, bool], second_format: tuple[int, int, bool]
) -> None:
    n, n2, k = 5, 6, 1152
    first, second = random_weight(*first_format, n, k)[0], random_weight(*second_format, n2, k)[0]
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(3))
    xq, scale, total = reference.quantize_activations(x)
    y = torch.full((1, n + n2), torch.nan)
    parts = [(w.codes, w.codes if w.high is None else w.high, w.sub, w.step) for w in (first, second)]
    interpreted(matvec.matvec_pair)[(3 + 3,)](
        *parts[0], *parts[1], xq.view(torch.int32), scale, total, y, n, n2, k, *first_format, *second_format,
        2, 1, 1, False, False, 0,
    )  # fmt: skip
    assert torch.equal(y, torch.cat([run_matvec(x, first), run_matvec(x, second)], dim=1))


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
