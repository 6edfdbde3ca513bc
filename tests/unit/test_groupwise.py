"""Min-max quantization and the torchao tensors: properties that hold for any weights, and independent references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

from gemma4cli.quant.groupwise import SMALLEST_SCALE, CodeRange, Quantized, quantize
from gemma4cli.quant.recipe import QuantSpec
from gemma4cli.quant.tensors import (
    MatrixBuilder,
    dequantize,
    int4_to_intx,
    intx_to_int4,
    is_quantized,
    pack_nibbles,
    unpack_nibbles,
)
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor

SPECS = [
    QuantSpec(bits, group, symmetric, "min-max") for bits in (4, 8) for group in (0, 32) for symmetric in (False, True)
]
BF16_ROUNDING = 2**-8


def ids(spec: QuantSpec) -> str:
    return spec.describe().replace(" ", "-")


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices [3, 64] of every kind: any magnitude from 1e-20 to 1e20, one-sided, sparse, constant, heavy-tailed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(3, 64, generator=generator)
    kind = draw(st.sampled_from(["normal", "one-sided", "sparse", "constant", "heavy", "zeros"]))
    if kind == "one-sided":
        w = w.abs() + draw(st.sampled_from([0.0, 1.0, 100.0]))
    elif kind == "sparse":
        w = w * (torch.rand(3, 64, generator=generator) < 0.1)
    elif kind == "constant":
        w = torch.ones(3, 64)
    elif kind == "heavy":
        w = w / torch.rand(3, 64, generator=generator).clamp(min=1e-3)
    elif kind == "zeros":
        w = torch.zeros(3, 64)
    return w * draw(st.sampled_from([-1, 1])) * 10.0 ** draw(st.integers(-20, 20))


def per_weight(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and zero point, each [N, K] float32."""
    group = quantized.codes.shape[1] // quantized.scale.shape[1]
    scale, zero = (t.float().repeat_interleave(group, dim=1) for t in (quantized.scale, quantized.zero_point))
    return quantized.codes.float(), scale, zero


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@settings(max_examples=40, deadline=None)
@given(w=weights())
def test_error_is_half_a_step_inside_the_range_and_little_more_at_its_ends(spec: QuantSpec, w: Tensor) -> None:
    quantized = quantize(w, spec)
    _, scale, zero = per_weight(quantized)
    codes = CodeRange.of(spec)
    error = (quantized.dequantize() - w).abs()
    ideal = w / scale + zero
    inside = (ideal >= codes.low) & (ideal <= codes.high)
    slack = scale * 1e-4
    assert (error[inside] <= (scale / 2 + slack)[inside]).all()
    # A scale rounded down, and a zero point rounded to a whole number, push the last weight out of the range.
    beyond = 0.5 + (codes.high - codes.low) * BF16_ROUNDING
    assert (error <= scale * beyond + slack).all()


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@settings(max_examples=25, deadline=None)
@given(w=weights())
def test_codes_stay_in_range_and_scales_are_positive_normal(spec: QuantSpec, w: Tensor) -> None:
    quantized = quantize(w, spec)
    codes = CodeRange.of(spec)
    assert quantized.codes.min() >= codes.low
    assert quantized.codes.max() <= codes.high
    assert quantized.scale.dtype == torch.bfloat16
    assert (quantized.scale.float() >= SMALLEST_SCALE).all()
    assert torch.equal(quantized.zero_point.float(), quantized.zero_point.float().round())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.symmetric], ids=ids)
@settings(max_examples=25, deadline=None)
@given(w=weights())
def test_symmetric_codes_mirror(spec: QuantSpec, w: Tensor) -> None:
    centre = CodeRange.of(spec).centre
    plus, minus = quantize(w, spec), quantize(-w, spec)
    assert torch.equal(plus.codes.int() - centre, centre - minus.codes.int())
    assert torch.equal(plus.scale, minus.scale)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_extremes_use_the_whole_range(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 64)
    quantized = quantize(w, spec)
    codes = CodeRange.of(spec)
    group = spec.group_of(64)
    used, groups = quantized.codes.int().view(16, -1, group), w.view(16, -1, group)
    if spec.symmetric:
        largest = groups.abs().argmax(-1, keepdim=True)
        reached = (used.gather(-1, largest) - codes.centre) * groups.gather(-1, largest).sign()
        assert (reached == codes.high - codes.centre).all()
    else:
        assert (used.gather(-1, groups.argmin(-1, keepdim=True)) == codes.low).all()
        assert (used.gather(-1, groups.argmax(-1, keepdim=True)) >= codes.high - 1).all()


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_zeros_stay_zero_beside_anything(spec: QuantSpec) -> None:
    w = torch.randn(2, 64)
    w[0] = 0
    w[1, ::3] = 0
    stored = quantize(w, spec).dequantize()
    assert (stored[w == 0] == 0).all()


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("value", [3.0, -0.017, 1e-12])
def test_a_constant_group_is_right_to_the_scale_s_rounding(spec: QuantSpec, value: float) -> None:
    w = torch.full((2, 64), value)
    assert torch.allclose(quantize(w, spec).dequantize(), w, rtol=BF16_ROUNDING, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_torchao_agrees(spec: QuantSpec) -> None:
    """Equal scales; equal codes but for ties, as torchao rounds w * (1 / scale) and we round w / scale.

    torchao takes the zero point from the unrounded scale, we from the stored one, so some of them differ, by one.
    """
    torch.manual_seed(1)
    w = torch.distributions.StudentT(4.0).sample((64, 256)).bfloat16().float()
    codes = CodeRange.of(spec)
    block = (1, spec.group_of(256))
    kind = MappingType.SYMMETRIC if spec.symmetric else MappingType.ASYMMETRIC
    shift = codes.centre if spec.symmetric else 0
    bounds = {"quant_min": codes.low - shift, "quant_max": codes.high - shift}
    scale, zero = choose_qparams_affine(
        w, kind, block, target_dtype=torch.int32, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int32,
        keepdim=True, **bounds,
    )  # fmt: skip
    ours = quantize(w, spec)
    assert torch.equal(ours.scale, scale.view_as(ours.scale))
    moved = ours.zero_point.int() - (zero + shift).view_as(ours.zero_point)
    assert moved.abs().max() <= (0 if spec.symmetric else 1)
    assert (moved != 0).float().mean() < 0.3
    zero = ours.zero_point.int() - shift
    theirs = quantize_affine(w, block, scale.float(), zero, output_dtype=torch.int32, **bounds) + shift
    _, step, _ = per_weight(ours)
    ties = ((w / step).frac().abs() - 0.5).abs() < 1e-4
    assert torch.equal(ours.codes.int()[~ties], theirs[~ties])
    assert ties.float().mean() < 0.02


def test_nibbles_keep_the_even_column_low() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("method", ["min-max", "hqq"])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_a_matrix_built_by_slabs_is_the_same_tensor(spec: QuantSpec, method: str) -> None:
    spec = QuantSpec(spec.bits, spec.group_size, spec.symmetric, method)
    torch.manual_seed(2)
    w = torch.randn(10, 64)
    whole = quantize(w, spec)
    builder = MatrixBuilder((10, 64), spec)
    for row in range(0, 10, 4):
        builder.put(row, quantize(w[row : row + 4], spec))
    built = builder.finish()
    assert isinstance(built, Int4Tensor if spec.bits == 4 else IntxUnpackedToInt8Tensor)
    assert is_quantized(built)
    assert not is_quantized(w)
    assert torch.equal(dequantize(built), whole.dequantize())
    planned = MatrixBuilder((10, 64), spec, "meta").finish()
    for part in ("qdata", "scale", "zero_point"):
        real, meta = getattr(built, part), getattr(planned, part)
        assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


@pytest.mark.parametrize("method", ["min-max", "hqq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_torchao_s_own_arithmetic_gives_our_values(method: str, symmetric: bool) -> None:
    """8 bits by IntxUnpackedToInt8Tensor.dequantize; 4 bits by the same after re-wrapping."""
    torch.manual_seed(3)
    w = torch.randn(8, 64)
    for bits in (4, 8):
        spec = QuantSpec(bits, 32, symmetric, method)
        builder = MatrixBuilder((8, 64), spec)
        builder.put(0, quantize(w, spec))
        tensor = builder.finish()
        torchao_s = (int4_to_intx(tensor) if bits == 4 else tensor).to(torch.float32).dequantize()
        assert torch.allclose(torchao_s, dequantize(tensor), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["min-max", "hqq"])
def test_re_wrapping_loses_nothing(method: str) -> None:
    torch.manual_seed(4)
    w = torch.distributions.StudentT(2.0).sample((16, 128))
    spec = QuantSpec(4, 32, False, method)
    builder = MatrixBuilder((16, 128), spec)
    builder.put(0, quantize(w, spec))
    tensor = builder.finish()
    intx = int4_to_intx(tensor)
    assert intx.zero_point.dtype == (torch.int8 if method == "min-max" else torch.float32)
    assert torch.equal(dequantize(intx), dequantize(tensor))
    back = intx_to_int4(intx)
    for part in ("qdata", "scale", "zero_point"):
        assert torch.equal(getattr(back, part), getattr(tensor, part))


def test_re_wrapping_refuses_what_does_not_fit() -> None:
    spec = QuantSpec(8, 0, True, "min-max")
    builder = MatrixBuilder((4, 32), spec)
    builder.put(0, quantize(torch.randn(4, 32), spec))
    with pytest.raises(ValueError, match=r"cannot hold torch\.int8 codes"):
        intx_to_int4(builder.finish())
    inexact = IntxUnpackedToInt8Tensor(
        torch.zeros(1, 32, dtype=torch.int8), torch.ones(1, 1).bfloat16(), torch.full((1, 1), 1 / 3), torch.int4,
        [1, 32], torch.bfloat16, None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot hold these zero points exactly"):
        intx_to_int4(inexact)
