"""GGUF blocks -> checkpoint tensors: bit-equal values, the same codes, and no rounding on the way to the GPU format."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML
from gguf.quants import dequantize as dequantize_by_gguf

from gemma4cli.errors import G4Error
from gemma4cli.kernels.quantized_matmul.format import dequantize as dequantize_packed
from gemma4cli.quant.gguf.blocks import FLOAT_TYPES, FORMATS, REQUANTIZED_TYPES, SUPPORTED_TYPES
from gemma4cli.quant.gguf.convert_tensor import convert_tensor, empty_tensor, measured_error
from gemma4cli.quant.gguf.reader import GGUFTensor
from gemma4cli.quant.gguf.tensors import GGUFInt4Tensor, GGUFIntxTensor
from gemma4cli.quant.pack import pack_weight
from gemma4cli.quant.shards import stored_bytes
from gemma4cli.quant.tensors import dequantize, int4_to_intx
from gemma4cli.quant.torchao_types import (
    Int4Tensor,
    IntxUnpackedToInt8Tensor,
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from tests.support.gguf_writer import random_blocks, tensor_of

EXACT = tuple(FORMATS)
TWO_LEVEL = (GGML.Q3_K, GGML.Q4_K, GGML.Q5_K, GGML.Q6_K, GGML.IQ4_XS)
CLASSES = {
    GGML.Q4_0: Int4Tensor, GGML.Q5_0: IntxUnpackedToInt8Tensor, GGML.Q8_0: IntxUnpackedToInt8Tensor,
    GGML.IQ4_NL: IntxUnpackedToInt8Tensor, GGML.Q4_1: GGUFInt4Tensor, GGML.Q4_K: GGUFInt4Tensor,
    GGML.Q5_1: GGUFIntxTensor, GGML.Q3_K: GGUFIntxTensor, GGML.Q5_K: GGUFIntxTensor, GGML.Q6_K: GGUFIntxTensor,
    GGML.IQ4_XS: GGUFIntxTensor,
}  # fmt: skip
ROWS, COLUMNS = 40, 768


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def random_source(kind: GGML, seed: int = 0) -> GGUFTensor:
    return tensor_of(random_blocks(kind, (ROWS, COLUMNS), np.random.default_rng(seed)), kind)


def reference(source: GGUFTensor) -> torch.Tensor:
    return torch.from_numpy(dequantize_by_gguf(source.blocks(), source.type).astype(np.float32))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", EXACT)
def test_values_are_bit_equal_to_gguf_py(kind: GGML, pool: ThreadPoolExecutor) -> None:
    source = random_source(kind)
    tensor = convert_tensor(source, pool)
    assert type(tensor) is CLASSES[kind]
    assert tensor.shape == source.shape
    assert torch.equal(bits(dequantize(tensor)), bits(reference(source)))
    assert measured_error(source, tensor) == 0


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("step", [0x0000, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF])
def test_extreme_steps(kind: GGML, step: int, pool: ThreadPoolExecutor) -> None:
    """Zero, the smallest and largest subnormal, the largest float16, and negative ones."""
    blocks = random_blocks(kind, (ROWS, COLUMNS), np.random.default_rng(1)).reshape(-1, GGML_QUANT_SIZES[kind][1])
    for offset in {GGML.Q3_K: (108,), GGML.Q6_K: (208,)}.get(kind, (0, 2) if FORMATS[kind].has_min else (0,)):
        blocks[:, offset : offset + 2] = np.array([step], "<u2").view(np.uint8)
    source = tensor_of(blocks.reshape(ROWS, -1), kind)
    assert torch.equal(bits(dequantize(convert_tensor(source, pool))), bits(reference(source)))


@pytest.mark.parametrize("kind", EXACT)
def test_scale_and_zero_point_say_the_same(kind: GGML, pool: ThreadPoolExecutor) -> None:
    """Code that knows torchao's classes only computes scale * (code - zero_point)."""
    source = random_source(kind)
    tensor = convert_tensor(source, pool)
    if isinstance(tensor, Int4Tensor):
        codes = torch.stack([tensor.qdata & 15, tensor.qdata >> 4], -1).flatten(1).float()
        scale, zero_point = tensor.scale.float().t(), tensor.zero_point.float().t()
    else:
        codes, scale, zero_point = tensor.qdata.float(), tensor.scale.float(), tensor.zero_point.float()
        low, high = -(1 << (tensor.qdata.new_tensor(FORMATS[kind].bits).item() - 1)), 1 << (FORMATS[kind].bits - 1)
        assert low <= codes.min() and codes.max() < high, "codes are in the range of their target_dtype"
    group = codes.shape[1] // scale.shape[1]
    assert group == tensor.block_size[1] == FORMATS[kind].group_size
    values = (codes.unflatten(1, (-1, group)) - zero_point[..., None]) * scale[..., None]
    expected = reference(source)
    assert (values.flatten(1) - expected).abs().max() <= 2e-6 * expected.abs().max()


def q4_k_by_hand(block: bytes) -> tuple[list[int], list[int], list[int]]:
    """Codes, scales and minima of one Q4_K block, from the prose of ggml's ggml-common.h, bit by bit."""
    scales, quants = block[4:16], block[16:]
    sub, minimum = [], []
    for j in range(8):
        if j < 4:
            sub.append(scales[j] % 64)
            minimum.append(scales[j + 4] % 64)
        else:
            sub.append(scales[j + 4] % 16 + scales[j - 4] // 64 * 16)
            minimum.append(scales[j + 4] // 16 + scales[j] // 64 * 16)
    codes = [quants[32 * (i // 64) + i % 32] // (16 if i % 64 >= 32 else 1) % 16 for i in range(256)]
    return codes, sub, minimum


def q6_k_by_hand(block: bytes) -> tuple[list[int], list[int]]:
    """Codes (0 to 63) and scales of one Q6_K block: 4 low bits and 2 high bits of each weight apart."""
    codes = []
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, column = divmod(rest, 32)
        low = block[64 * half + 32 * (quarter % 2) + column] // (16 if quarter >= 2 else 1) % 16
        high = block[128 + 32 * half + column] // 4**quarter % 4
        codes.append(low + 16 * high)
    return codes, [scale - 256 if scale > 127 else scale for scale in block[192:208]]


def test_codes_of_q4_k(pool: ThreadPoolExecutor) -> None:
    source = random_source(GGML.Q4_K)
    tensor = convert_tensor(source, pool)
    codes, sub, minimum = q4_k_by_hand(source.blocks()[7, 144:288].tobytes())
    assert tensor.codes()[7, 256:512].tolist() == codes
    assert tensor.qdata[7, 128].item() == codes[0] + 16 * codes[1], "the even column is the low nibble"
    assert tensor.sub[7, 8:16, 0].tolist() == sub
    assert tensor.sub[7, 8:16, 1].tolist() == minimum


def test_codes_of_q6_k(pool: ThreadPoolExecutor) -> None:
    source = random_source(GGML.Q6_K)
    tensor = convert_tensor(source, pool)
    codes, sub = q6_k_by_hand(source.blocks()[7, 210:420].tobytes())
    assert (tensor.qdata[7, 256:512] + 32).tolist() == codes
    assert tensor.sub[7, 16:32].tolist() == sub


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_k_quants_reach_the_gpu_format_without_rounding(kind: GGML, pool: ThreadPoolExecutor) -> None:
    source = random_source(kind)
    packed = pack_weight(convert_tensor(source, pool), "t")
    assert torch.equal(dequantize_packed(packed), reference(source))


@pytest.mark.parametrize("kind", EXACT)
def test_survives_torchaos_safetensors(kind: GGML, pool: ThreadPoolExecutor) -> None:
    tensor = convert_tensor(random_source(kind), pool)
    pieces, metadata = flatten_tensor_state_dict({"a.weight": tensor})
    again = unflatten_tensor_state_dict(pieces, metadata)[0]["a.weight"]
    assert type(again) is type(tensor)
    assert torch.equal(bits(dequantize(again)), bits(dequantize(tensor)))


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_the_layout_is_known_before_the_data(kind: GGML, pool: ThreadPoolExecutor) -> None:
    source = float_source(kind) if kind in FLOAT_TYPES else random_source(kind)
    empty, full = empty_tensor(source), convert_tensor(source, pool)
    assert type(empty) is type(full)
    assert empty.is_meta
    assert stored_bytes("a.weight", empty) == stored_bytes("a.weight", full)
    pieces = [flatten_tensor_state_dict({"a.weight": tensor})[0] for tensor in (empty, full)]
    described = [{key: (piece.shape, piece.dtype) for key, piece in part.items()} for part in pieces]
    assert described[0] == described[1]


def float_source(kind: GGML) -> GGUFTensor:
    width = GGML_QUANT_SIZES[kind][1]
    return tensor_of(np.random.default_rng(0).integers(0, 60, (4, 8 * width), dtype=np.uint8), kind)


@pytest.mark.parametrize("kind", [GGML.F32, GGML.F16, GGML.BF16])
def test_floats_keep_their_type_and_bits(kind: GGML, pool: ThreadPoolExecutor) -> None:
    source = float_source(kind)
    tensor = convert_tensor(source, pool)
    assert tensor.dtype == {GGML.F32: torch.float32, GGML.F16: torch.float16, GGML.BF16: torch.bfloat16}[kind]
    assert tensor.view(torch.uint8).numpy().tobytes() == source.blocks().tobytes()
    assert measured_error(source, tensor) == 0


def test_every_type_that_gguf_py_decodes_is_read() -> None:
    """NVFP4 has a factor in a tensor of its own, which gguf-py's decoder does not know."""
    assert set(SUPPORTED_TYPES) == {GGML.F32, GGML.F16, *quants._type_traits} - {GGML.NVFP4}


@pytest.mark.parametrize("kind", REQUANTIZED_TYPES)
def test_other_types_are_quantized_again_and_their_error_measured_in_full(kind: GGML, pool: ThreadPoolExecutor) -> None:
    source = random_source(kind)
    tensor = convert_tensor(source, pool)
    assert type(tensor) is Int4Tensor
    assert tensor.block_size == [1, 32]
    expected = reference(source)
    assert expected.unique().numel() > 2
    error = float((dequantize(tensor) - expected).double().norm() / expected.double().norm())
    assert 0.001 < error < 0.1
    assert measured_error(source, tensor) == pytest.approx(error, rel=1e-6)


def test_the_measured_error_sees_a_wrong_row(pool: ThreadPoolExecutor) -> None:
    source = random_source(GGML.Q4_K)
    tensor = convert_tensor(source, pool)
    tensor.qdata[ROWS // 2] ^= 0xFF
    assert measured_error(source, tensor) > 0.05


def test_a_group_with_a_minimum_but_no_scale(pool: ThreadPoolExecutor) -> None:
    """Such groups have no zero point; the stand-in for torchao's view is close, dequantize is exact."""
    blocks = random_blocks(GGML.Q4_K, (2, 256), np.random.default_rng(0))
    blocks[:, 4:8] = 0  # scales of groups 0 to 3, and the high bits of groups 4 to 7
    blocks[:, 8:12] |= 1
    source = tensor_of(blocks, GGML.Q4_K)
    tensor = convert_tensor(source, pool)
    assert torch.equal(dequantize(tensor), reference(source))
    codes = tensor.codes().float().unflatten(1, (-1, 32))
    values = (codes - tensor.zero_point.t()[..., None]) * tensor.scale.t()[..., None]
    expected = reference(source)
    assert (values.flatten(1) - expected).abs().max() <= 2e-5 * expected.abs().max()
    empty = tensor_of(np.zeros_like(blocks), GGML.Q4_K)
    assert not convert_tensor(empty, pool).zero_point.any()
    assert measured_error(empty, convert_tensor(empty, pool)) == 0


@pytest.mark.parametrize("kind", [GGML.Q4_1, GGML.Q4_K, GGML.Q5_K, GGML.Q6_K])
def test_rows_and_dtypes(kind: GGML, pool: ThreadPoolExecutor) -> None:
    tensor = convert_tensor(random_source(kind), pool)
    values = dequantize(tensor)
    for start, stop in ((0, 1), (3, 7), (39, 40)):
        rows = tensor[start:stop]
        assert type(rows) is type(tensor)
        assert torch.equal(dequantize(rows), values[start:stop])
    with pytest.raises(NotImplementedError, match="only rows"):
        tensor[:, 256:512]
    intx = int4_to_intx(tensor) if isinstance(tensor, GGUFInt4Tensor) else tensor
    assert torch.equal(dequantize(intx), values)
    half = intx.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), values.bfloat16())
    assert torch.equal(dequantize(half), values), "the codes and scales are still there"
    x = torch.randn(2, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(torch.nn.functional.linear(x, half), torch.nn.functional.linear(x, values.bfloat16()))


@pytest.mark.parametrize("kind", [GGML.Q8_0, GGML.IQ2_S])
@pytest.mark.parametrize("step", [0x7C00, 0xFE00])
def test_scales_must_be_finite(step: int, kind: GGML, pool: ThreadPoolExecutor) -> None:
    blocks = random_blocks(kind, (2, 256), np.random.default_rng(0))
    blocks[1, :2] = np.array([step], "<u2").view(np.uint8)
    with pytest.raises(G4Error, match=r"Tensor t of m\.gguf has scales that are not finite numbers"):
        convert_tensor(tensor_of(blocks, kind), pool)


@pytest.mark.parametrize("kind", [GGML.Q4_0, GGML.Q2_K])
def test_only_a_matrix_can_be_quantized(kind: GGML, pool: ThreadPoolExecutor) -> None:
    flat = random_source(kind)
    cube = GGUFTensor("t", (2, ROWS // 2, COLUMNS), kind, 0, flat.nbytes, flat.file)
    with pytest.raises(G4Error, match=f"has type {kind.name} but is no matrix"):
        convert_tensor(cube, pool)
