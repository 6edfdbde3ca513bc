"""The CUDA backend's model, run on the CPU implementations of its kernels, against the reference model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma4cli.errors import G4Error
from gemma4cli.export.cuda.layers import KV_FORMATS, FusedLinear
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.packed import fill
from gemma4cli.kernels.quantized_matmul.format import WeightFormat, dequantize, pack
from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import build_model
from gemma4cli.quant.checkpoint import Checkpoint, open_checkpoint
from gemma4cli.quant.pack import pack_weight
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import QuantSpec, load_recipe
from gemma4cli.quant.tensors import is_quantized
from tests.support.tiny import write_checkpoint

SPEC = CacheSpec(context_length=96, prefill_chunk=12, dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("cuda-model")
    quantize_checkpoint(write_checkpoint(folder / "plain"), folder / "quantized", load_recipe("default"))
    return open_checkpoint(folder / "quantized")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 160, (1, 60), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def chunk_logits(model: Gemma4 | CudaModel, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits after every chunk, [n, V]: past several wraps of the window of 8."""
    return torch.stack([
        model(tokens[:, start : start + chunk], torch.arange(start, start + chunk))[0, 0]
        for start in range(0, tokens.shape[1], chunk)
    ])  # fmt: skip


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Of the reference model with the values that packing leaves: scales re-encoded."""

    def prepare(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return dequantize(pack_weight(tensor, name)) if is_quantized(tensor) else tensor

    return chunk_logits(build_model(checkpoint, SPEC, torch.float32, torch.device("cpu"), prepare=prepare), tokens, 12)


@pytest.mark.parametrize(
    ("kv_format", "bound"),
    [("bf16", 0.9995), ("folded", 0.9995), ("q8", 0.999), ("folded-q8", 0.999), ("tq4", 0.95), ("folded-tq4", 0.95)],
)
def test_equals_the_reference_model(
    checkpoint: Checkpoint, tokens: torch.Tensor, expected: torch.Tensor, kv_format: str, bound: float
) -> None:
    """What differs: the head's int8 activations (cosine 0.9999) and caches of codes, to which random weights are far
    more sensitive than trained ones."""
    model = fill(CudaModel(Signature.of(checkpoint, SPEC, kv_format)), checkpoint)
    assert cosine(chunk_logits(model, tokens, 12), expected) > bound


def test_folding_is_exact_to_rounding(checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    plain, folded = (
        chunk_logits(fill(CudaModel(Signature.of(checkpoint, SPEC, kv)), checkpoint), tokens, 12)
        for kv in ("bf16", "folded")
    )
    torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", [2, 5, 10])
def test_chunks_of_any_size_agree(checkpoint: Checkpoint, tokens: torch.Tensor, chunk: int) -> None:
    signature = Signature.of(checkpoint, SPEC, "folded")
    whole = chunk_logits(fill(CudaModel(signature), checkpoint), tokens, 12)[-1]
    torch.testing.assert_close(
        chunk_logits(fill(CudaModel(signature), checkpoint), tokens, chunk)[-1], whole, rtol=1e-3, atol=1e-3
    )


def test_folded_caches_are_smaller_and_hold_constants_apart(checkpoint: Checkpoint) -> None:
    sizes = {}
    for kv_format in KV_FORMATS:
        caches = [layer.self_attn.kv_cache for layer in CudaModel(Signature.of(checkpoint, SPEC, kv_format)).layers]
        full = [cache for cache in caches if not layer_is_ring(cache.slots)]
        sizes[kv_format] = sum(b.numel() * b.element_size() for cache in full for b in cache.buffers())
    assert sizes["folded"] == sizes["bf16"] * 0.625
    assert sorted(KV_FORMATS, key=sizes.__getitem__, reverse=True) == list(KV_FORMATS)
    assert 0.25 < sizes["folded-q8"] / sizes["folded"] < 0.3  # of float32 here, and a scale for 32 dims
    codebook = CudaModel(Signature.of(checkpoint, SPEC, "tq4")).turboquant
    assert codebook is not None
    assert codebook.table.any()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_shapes_alone_say_how_everything_lies_in_memory(checkpoint: Checkpoint, kv_format: str) -> None:
    """Programs are compiled for a model on the meta device, where some operators lay their results out otherwise."""
    with torch.device("meta"):
        model = CudaModel(Signature.of(checkpoint, SPEC, kv_format))
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        assert tensor.is_contiguous(), name


def layer_is_ring(slots: int) -> bool:
    return slots == 8 + SPEC.prefill_chunk - 1


def test_the_signature_depends_on_shapes_and_not_on_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(write_checkpoint(tmp_path / "plain", seed=1), tmp_path / "other", load_recipe("default"))
    other = open_checkpoint(tmp_path / "other")
    signature = Signature.of(checkpoint, SPEC, "bf16")
    assert Signature.of(other, SPEC, "bf16").digest() == signature.digest()
    assert Signature.of(checkpoint, SPEC, "folded").digest() != signature.digest()
    longer = CacheSpec(95, 12, torch.float32)
    assert Signature.of(checkpoint, longer, "bf16").digest() != signature.digest()


def test_mixed_formats_stay_unfused_and_right() -> None:
    int4, int8 = WeightFormat(4, 32, True), WeightFormat(8, 32, False)
    fused = FusedLinear(["q_proj", "k_proj", "v_proj"], [int4, int4, int8], [8, 4, 4], 64)
    assert [matrix.rows for matrix in fused.matrices] == [12, 4]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 64, generator=generator)
    outputs = []
    for name, fmt, rows in (("q_proj", int4, 8), ("k_proj", int4, 4), ("v_proj", int8, 4)):
        code = torch.randint(0, 16, (rows, 64), generator=generator)
        scale = torch.rand(rows, 2, generator=generator)
        weight = pack(code, scale, scale if fmt.has_min else None, fmt.bits, 32)
        fused.put(name, weight)
        value = scale.repeat_interleave(32, 1) * code - (scale.repeat_interleave(32, 1) if fmt.has_min else 0)
        outputs.append(x @ value.T)
    for got, wanted in zip(fused(x), outputs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=0.2)


def test_unknown_kv_format(checkpoint: Checkpoint) -> None:
    with pytest.raises(G4Error, match="Unknown KV format 'fp8'"):
        Signature.of(checkpoint, SPEC, "fp8")


def test_eight_bits_with_zero_points_are_refused(tmp_path: Path) -> None:
    """The packed layout has them, for the CPU; no kernel of the GPU does."""
    recipe = load_recipe("default")
    rules = (recipe.rules[0], replace(recipe.rules[1], spec=QuantSpec(8, 0, False, "min-max")), *recipe.rules[2:])
    quantize_checkpoint(write_checkpoint(tmp_path / "plain"), tmp_path / "quantized", replace(recipe, rules=rules))
    with pytest.raises(G4Error, match=r"_proj\.weight has 8-bit codes with a zero point"):
        Signature.of(open_checkpoint(tmp_path / "quantized"), SPEC, "bf16")
