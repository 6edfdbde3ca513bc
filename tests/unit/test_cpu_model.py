"""The model that the CPU backend exports: Gemma 4's formulas over packed weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4cli.export.bundle import ReencodedRecord
from gemma4cli.export.cpu import EMBEDDING, LM_HEAD, CpuMatrix, CpuModel, CpuSignature, FloatMatrix, build_cpu_model
from gemma4cli.export.export import ExportSpec, export_bundle, plan_export
from gemma4cli.kernels.quantized_matmul.format import WeightFormat
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import build_model
from gemma4cli.quant.checkpoint import Checkpoint, open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import QuantSpec, Recipe, load_recipe
from gemma4cli.quant.tensors import dequantize
from tests.support.tiny import write_checkpoint

CHUNKS = [12, 7, 1, 12, 1, 1, 12]  # over several wraps of the ring of 19 slots
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


def last_logits(model: torch.nn.Module, chunks: list[int]) -> Tensor:
    ids = torch.randint(0, 160, (1, sum(chunks)), generator=torch.Generator().manual_seed(4))
    outputs, position = [], 0
    for count in chunks:
        positions = torch.arange(position, position + count)
        outputs.append(model(ids[:, position : position + count], positions)[0, -1])
        position += count
    return torch.stack(outputs)


def quantized(folder: Path, recipe: Recipe, **overrides: object) -> Checkpoint:
    quantize_checkpoint(write_checkpoint(folder / "plain", **overrides), folder / "quantized", recipe)
    return open_checkpoint(folder / "quantized")


def changed(recipe: Recipe, rule: int, **fields: object) -> Recipe:
    """Return a recipe with one rule changed."""
    rules = list(recipe.rules)
    rules[rule] = replace(rules[rule], **fields)
    return replace(recipe, rules=tuple(rules))


def test_the_float_model_is_gemma4(tmp_path: Path) -> None:
    reader = open_checkpoint(write_checkpoint(tmp_path / "tiny"))
    plain = build_model(reader, CacheSpec(64, 12, torch.float32), torch.float32, "cpu")
    model = build_cpu_model(reader, 64, 12)
    assert set(model.signature.formats.values()) == {None}
    torch.testing.assert_close(last_logits(model, CHUNKS), last_logits(plain, CHUNKS), rtol=0, atol=5e-4)


def test_the_quantized_model_follows_the_dequantized_one(tmp_path: Path) -> None:
    """Activations of 8 bits and scales of 8 bits are all that differs."""
    reader = quantized(tmp_path, load_recipe("default"))
    exact = build_model(
        reader, CacheSpec(64, 12, torch.float32), torch.float32, "cpu", prepare=lambda _, t: dequantize(t)
    )
    found, wanted = last_logits(build_cpu_model(reader, 64, 12), CHUNKS), last_logits(exact, CHUNKS)
    assert F.cosine_similarity(found, wanted).min() > 0.98


def test_a_tied_head_reads_the_embeddings_table(tmp_path: Path) -> None:
    recipe = changed(load_recipe("default"), 0, match=r"model\.embed_tokens\.weight|lm_head\.weight")
    reader = quantized(tmp_path, recipe, **ONE_LAYER)
    assert LM_HEAD not in reader.names()
    model = build_cpu_model(reader, 32, 8)
    assert model.lm_head is None
    assert model.signature.formats[EMBEDDING] == WeightFormat(8, 32, has_min=False)
    tokens = torch.tensor([[0, 7, 159]])
    rows = model.embed_tokens.rows_of(tokens, 8.0)
    # One scale per row, so that the scale's own 8 bits are exact but for float16.
    torch.testing.assert_close(rows, F.embedding(tokens, dequantize(reader.tensor(EMBEDDING))) * 8.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (QuantSpec(4, 32, False, "min-max"), WeightFormat(4, 32, has_min=True)),
        (QuantSpec(4, 32, True, "min-max"), WeightFormat(4, 32, has_min=False)),
        (QuantSpec(8, 0, False, "min-max"), WeightFormat(8, 32, has_min=True)),
        (QuantSpec(4, 16, False, "min-max"), None),
    ],
)
def test_what_has_no_packed_form_is_kept_as_floats(
    tmp_path: Path, spec: QuantSpec, expected: WeightFormat | None
) -> None:
    reader = quantized(tmp_path, changed(load_recipe("default"), 1, spec=spec), **ONE_LAYER)
    name = "model.layers.0.mlp.up_proj.weight"
    model = build_cpu_model(reader, 32, 8)
    assert model.signature.formats[name] == expected
    place, _ = model.place_of(name)
    assert isinstance(place, FloatMatrix if expected is None else CpuMatrix)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    wanted = F.linear(x, dequantize(reader.tensor(name)))
    assert (place(x) - wanted).norm() / wanted.norm() < (1e-6 if expected is None else 0.02)


def test_a_bundle_lists_what_became_floats(tmp_path: Path) -> None:
    recipe = changed(load_recipe("default"), 1, spec=QuantSpec(4, 16, False, "min-max"))
    quantized(tmp_path, recipe, **ONE_LAYER)
    spec = ExportSpec(tmp_path / "quantized", tmp_path / "bundle", context_length=32, prefill_chunk=8)
    planned = plan_export(spec)
    manifest = export_bundle(spec)
    assert manifest.reencoded["model.layers.0.mlp.up_proj.weight"] == ReencodedRecord("int4 g16", "float32", 0.0)
    assert "model.embed_tokens.weight" not in manifest.reencoded
    assert planned.files["weights.ptd"] == manifest.files["weights.ptd"].bytes
    assert planned.memory == manifest.memory


def test_every_tensor_of_a_checkpoint_has_its_place(tmp_path: Path) -> None:
    reader = quantized(tmp_path, load_recipe("sensitive"))
    with torch.device("meta"):
        model = CpuModel(CpuSignature.of(reader), CacheSpec(64, 12, torch.float32))
    places = [model.place_of(name) for name in reader.names()]
    assert len(set(places)) == len(places)
    # What no tensor of the checkpoint fills: the angles of both kinds of layers, and the caches, which are state.
    filled = {id(place) for place, _ in places}
    rest = [
        n for n, module in model.named_modules() if id(module) not in filled and list(module.buffers(recurse=False))
    ]
    assert {name.rpartition(".")[2] for name in rest} == {"sliding_attention", "full_attention", "kv_cache"}
