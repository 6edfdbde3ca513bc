"""Quantized matrices in the GPU layout: no code changes, scales within the stated error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as GGML

from gemma4cli.errors import G4Error
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, WeightFormat, assemble, dequantize, unpack_codes
from gemma4cli.quant.gguf.convert_tensor import convert_tensor
from gemma4cli.quant.gguf.tensors import GGUFInt4Tensor, GGUFIntxTensor
from gemma4cli.quant.groupwise import quantize
from gemma4cli.quant.pack import pack_weight, packed_format
from gemma4cli.quant.planes import words_of_bytes, words_of_nibbles
from gemma4cli.quant.recipe import QuantSpec
from gemma4cli.quant.tensors import MatrixBuilder, pack_nibbles
from gemma4cli.quant.tensors import dequantize as dequantize_stored
from tests.support.gguf_writer import random_blocks, tensor_of


def quantized(spec: QuantSpec, rows: int = 6, columns: int = 512) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    builder = MatrixBuilder((rows, columns), spec)
    builder.put(0, quantize(weight, spec))
    return builder.finish()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (QuantSpec(4, 32, True, "min-max"), WeightFormat(4, 32, False)),
        (QuantSpec(4, 32, False, "min-max"), WeightFormat(4, 32, True)),
        (QuantSpec(4, 64, False, "min-max"), WeightFormat(4, 32, True)),
        (QuantSpec(8, 0, True, "min-max"), WeightFormat(8, 32, False)),
    ],
)
def test_our_own_quantization(spec: QuantSpec, expected: WeightFormat) -> None:
    tensor = quantized(spec)
    packed = pack_weight(tensor, "w")
    assert packed.format == packed_format(tensor, "w") == expected
    value = dequantize_stored(tensor)
    # 1/254 of the largest scale, times at most 15 steps, and of the largest minimum; 8 bits have one scale per row.
    spread = value.max() - value.min()
    bound = spread * (1e-3 if spec.bits == 8 else 1.1 / 254 * (2 if expected.has_min else 1))
    assert (dequantize(packed) - value).abs().max() <= bound


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GGML.Q4_K, WeightFormat(4, 32, True)),
        (GGML.Q5_K, WeightFormat(6, 32, True)),
        (GGML.Q6_K, WeightFormat(6, 16, False)),
    ],
)
def test_k_quants_are_exact(kind: GGML, expected: WeightFormat) -> None:
    """Their two levels of scales are the format's: packing rounds nothing."""
    tensor = gguf_tensor(kind, (4, 512))
    packed = pack_weight(tensor, "w")
    assert packed.format == expected
    torch.testing.assert_close(dequantize(packed), dequantize_stored(tensor), rtol=1e-6, atol=1e-7)


def gguf_tensor(kind: GGML, shape: tuple[int, int]) -> torch.Tensor:
    """Convert random blocks of a GGUF type as `g4 convert-gguf` does."""
    blocks = random_blocks(kind, shape, np.random.default_rng(int(kind)))
    with ThreadPoolExecutor(1) as pool:
        return convert_tensor(tensor_of(blocks, kind), pool)


def test_codes_survive() -> None:
    tensor = gguf_tensor(GGML.Q4_K, (4, 512))
    assert isinstance(tensor, GGUFInt4Tensor)
    assert torch.equal(unpack_codes(pack_weight(tensor, "w")), tensor.codes().int())
    tensor = gguf_tensor(GGML.Q6_K, (4, 512))
    assert isinstance(tensor, GGUFIntxTensor)
    assert torch.equal(unpack_codes(pack_weight(tensor, "w")), tensor.qdata.int() + 32)


@pytest.mark.parametrize("columns", [64, 192, 640])
def test_regrouped_nibbles_are_the_layout_s(columns: int) -> None:
    """`format.assemble` lays out one code after the other."""
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns))
    expected = laid_out(codes, 4)
    assert torch.equal(words_of_nibbles(pack_nibbles(codes)), expected.codes)
    words, high = words_of_bytes(codes.view(torch.int8) - 8, 8, 4)
    assert torch.equal(words, expected.codes)
    assert high is None


@pytest.mark.parametrize("centre", [0, 16, 32])
@pytest.mark.parametrize("columns", [128, 384])
def test_regrouped_bytes_are_the_layout_s(columns: int, centre: int) -> None:
    codes = torch.randint(0, 64, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))
    expected = laid_out(codes, 6)
    words, high = words_of_bytes(codes - centre, centre, 6)
    assert torch.equal(words, expected.codes)
    assert torch.equal(high, expected.high)


def laid_out(codes: torch.Tensor, bits: int) -> PackedWeight:
    rows, columns = codes.shape
    sub, step = torch.zeros(rows, columns // 32, dtype=torch.int8), torch.zeros(rows, 1, dtype=torch.float16)
    return assemble(codes, sub, step, bits, 32)


def test_rows_pack_like_the_whole() -> None:
    tensor = quantized(QuantSpec(4, 64, False, "min-max"), rows=12)
    whole, rows = pack_weight(tensor, "w"), pack_weight(tensor[3:7], "w", has_min=True)
    for part in ("codes", "sub", "step"):
        assert torch.equal(getattr(rows, part), getattr(whole, part)[3:7])


def test_what_the_kernels_cannot_read_is_refused_by_name() -> None:
    with pytest.raises(G4Error, match=r"model\.x is not quantized"):
        pack_weight(torch.zeros(4, 64), "model.x")
    with pytest.raises(G4Error, match=r"model\.x is quantized in groups of 16"):
        pack_weight(quantized(QuantSpec(4, 16, True, "min-max")), "model.x")
    with pytest.raises(G4Error, match="A 4-bit weight needs in_features that are a multiple of 64, got 96"):
        pack_weight(quantized(QuantSpec(4, 32, False, "min-max"), columns=96), "model.x")
