"""Matrices in the CPU's forms: the same values as stored, or a measured error; the operators' own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4cli.export import cpu_ops
from gemma4cli.export.cpu import build_cpu_model
from gemma4cli.export.cpu_linear import CpuLinear, planned_bytes, prepare_linear
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import build_model
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint, quantize_tensor
from gemma4cli.quant.recipe import QuantSpec, load_recipe
from gemma4cli.quant.tensors import dequantize
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor
from tests.support.tiny import write_checkpoint

ROWS, COLUMNS = 24, 128


def matrix(seed: int = 0, mean: float = 0.3) -> Tensor:
    """A matrix whose groups are not centred at 0, so that zero points matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator) + mean


def stored(bits: int, group_size: int, symmetric: bool = False, method: str = "min-max") -> Tensor:
    spec = QuantSpec(bits, group_size, symmetric, method)
    return quantize_tensor(matrix(), spec, torch.device("cpu"))[0]


def all_values(layer: CpuLinear) -> Tensor:
    return layer.values(slice(None))


@pytest.mark.parametrize(
    "tensor",
    [
        stored(4, 32),
        stored(4, 32, symmetric=True),
        stored(4, 64, method="hqq"),
        stored(4, 0),
        stored(8, 0, symmetric=True),
        stored(8, 0),
        stored(8, 32),
        stored(8, 64, symmetric=True),
        matrix().to(torch.bfloat16),
    ],
    ids=["int4", "int4-symmetric", "hqq", "int4-row", "int8-row-symmetric", "int8-row", "int8-groups",
         "int8-groups-symmetric", "plain"],
)  # fmt: skip
def test_values_stay_exactly(tensor: Tensor) -> None:
    layer, change = prepare_linear(tensor)
    assert change is None
    # The same real numbers; only float32's rounding of scale * 16 and of sums may differ.
    torch.testing.assert_close(all_values(layer), dequantize(tensor), rtol=0, atol=2e-6)


@pytest.mark.parametrize("tensor", [stored(4, 32), stored(4, 32, True), stored(8, 32), stored(8, 0)], ids=str)
def test_scales_that_are_not_positive(tensor: Tensor) -> None:
    """GGUF's Q4_0 gives about half of its groups a negative scale, and 0 to a group of zeros; XNNPACK takes neither."""
    scale = tensor.scale.clone()
    scale.view(-1)[::2] *= -1
    scale.view(-1)[3] = 0
    tensor = rescaled(tensor, scale)
    layer, change = prepare_linear(tensor)
    assert change is None
    planes = [getattr(layer, f"scale{index}") for index in range(layer.planes)]
    assert all(bool((plane >= torch.finfo(torch.bfloat16).tiny).all()) for plane in planes)
    torch.testing.assert_close(all_values(layer), dequantize(tensor), rtol=0, atol=2e-6)
    assert planned_bytes(tensor) == sum(parameter.nbytes for parameter in layer.parameters())


def rescaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """Return the same codes with other scales."""
    if isinstance(tensor, Int4Tensor):
        return Int4Tensor(tensor.qdata, scale, tensor.zero_point, tensor.block_size, tensor.shape)
    return IntxUnpackedToInt8Tensor(
        tensor.qdata, scale, tensor.zero_point, tensor.target_dtype, tensor.block_size, tensor.dtype, None
    )


def test_symmetric_weights_need_no_offset() -> None:
    assert prepare_linear(stored(4, 32, symmetric=True))[0].offset is None
    assert prepare_linear(stored(8, 0, symmetric=True))[0].offset is None
    assert prepare_linear(stored(4, 32))[0].offset is not None


def test_groups_that_xnnpack_lacks_become_rows_and_the_error_is_measured() -> None:
    tensor = stored(8, 16)
    layer, change = prepare_linear(tensor)
    before = dequantize(tensor)
    error = float((all_values(layer) - before).norm() / before.norm())
    assert change is not None
    assert (change.stored, change.becomes) == ("int8 g16", "int8 per row")
    assert change.relative_error == pytest.approx(error, rel=1e-4)
    assert 0 < error < 0.01


def test_scales_beyond_bfloat16_are_rounded_and_the_error_is_measured() -> None:
    exact = stored(4, 32)
    scale = exact.scale.float() * 1.001
    tensor = Int4Tensor(exact.qdata, scale, exact.zero_point.float(), exact.block_size, torch.Size((ROWS, COLUMNS)))
    layer, change = prepare_linear(tensor)
    assert change is not None
    assert change.becomes == "int4 g32 with bfloat16 scales"
    before = dequantize(tensor)
    assert change.relative_error == pytest.approx(float((all_values(layer) - before).norm() / before.norm()), rel=1e-4)
    assert 0 < change.relative_error < 2**-8


def test_every_signed_code_splits_into_two_planes() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(2, 1)
    ones = torch.ones(2, 8, dtype=torch.bfloat16)
    tensor = IntxUnpackedToInt8Tensor(codes, ones, torch.zeros_like(ones), torch.int8, [1, 32], torch.bfloat16, None)
    layer, change = prepare_linear(tensor)
    assert change is None
    assert layer.planes == 2
    assert torch.equal(all_values(layer), codes.float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_planned_bytes_are_what_the_layer_takes(bits: int, group_size: int, symmetric: bool) -> None:
    tensor = stored(bits, group_size, symmetric)
    layer, _ = prepare_linear(tensor)
    assert planned_bytes(tensor) == sum(parameter.nbytes for parameter in layer.parameters())


@pytest.mark.parametrize("tensor", [stored(4, 32), stored(8, 0, True), stored(8, 32), matrix()], ids=str)
def test_a_layer_multiplies_by_its_values(tensor: Tensor) -> None:
    layer, _ = prepare_linear(tensor)
    # Inputs that 8 bits hold exactly: integers whose range is 255.
    x = torch.randint(-128, 128, (1, 5, COLUMNS), generator=torch.Generator().manual_seed(1)).float()
    x[..., 0], x[..., 1] = -128, 127
    torch.testing.assert_close(layer(x), F.linear(x, all_values(layer)), rtol=1e-5, atol=2e-3)


def test_rows_are_quantized_within_half_a_step() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-20, 20, 50)[:, None]
    x[0] = 0
    x[1] = x[1].abs()
    codes, zero_point, scale = cpu_ops.quantize_rows(x)
    assert codes.min() >= -128
    assert codes.max() <= 127
    assert torch.equal(codes, codes.round())
    assert torch.equal(zero_point, zero_point.round())
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255
    error = ((codes - zero_point) * scale - x).abs().amax(-1)
    assert (error <= 1.0001 * step).all()  # half a step for the code, up to half for the rounded zero point
    assert torch.equal(((codes - zero_point) * scale)[0], x[0])


def test_operators_follow_their_formulas() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 2, 8, generator=generator)
    angles = torch.randn(3, 4, generator=generator)
    turned = torch.view_as_complex(torch.stack((x[..., :4], x[..., 4:]), -1)) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(cpu_ops.rope(x, angles.cos(), angles.sin()), expected)
    weight = torch.rand(8, generator=generator)
    torch.testing.assert_close(cpu_ops.rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))
    torch.testing.assert_close(cpu_ops.rms_norm(x, None, 1e-6), F.rms_norm(x, (8,), None, 1e-6))
    torch.testing.assert_close(cpu_ops.gelu_mul(x, x), F.gelu(x, approximate="tanh") * x)
    torch.testing.assert_close(cpu_ops.softcap(20 * x, 30.0), torch.tanh(20 * x / 30.0) * 30.0)


def last_logits(model: torch.nn.Module, chunks: list[int]) -> Tensor:
    ids = torch.randint(0, 160, (1, sum(chunks)), generator=torch.Generator().manual_seed(4))
    outputs, position = [], 0
    for count in chunks:
        positions = torch.arange(position, position + count)
        outputs.append(model(ids[:, position : position + count], positions)[0, -1])
        position += count
    return torch.stack(outputs)


def test_float_model_is_gemma4(tmp_path: Path) -> None:
    reader = open_checkpoint(write_checkpoint(tmp_path / "tiny"))
    chunks = [12, 7, 1, 12, 1, 1, 12]  # over several wraps of the ring of 19 slots
    plain = build_model(reader, CacheSpec(64, 12, torch.float32), torch.float32, "cpu")
    torch.testing.assert_close(
        last_logits(build_cpu_model(reader, 64, 12), chunks), last_logits(plain, chunks), rtol=0, atol=5e-4
    )


def test_tied_heads_and_embeddings_keep_their_form(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1, layer_types=["full_attention"])
    recipe = load_recipe("default")
    rules = (replace(recipe.rules[0], match=r"model\.embed_tokens\.weight|lm_head\.weight"), *recipe.rules[1:])
    quantize_checkpoint(source, tmp_path / "tied", replace(recipe, rules=rules))
    model = build_cpu_model(open_checkpoint(tmp_path / "tied"), 32, 8)
    assert model.changes == {}
    assert torch.equal(model.lm_head.weight0, model.embed_tokens.codes)
    table = dequantize(open_checkpoint(tmp_path / "tied").tensor("model.embed_tokens.weight"))
    tokens = torch.tensor([[0, 7, 159]])
    torch.testing.assert_close(model.embed_tokens(tokens), F.embedding(tokens, table) * 8.0)
