"""The quantized checkpoint on disk: torchao alone can load it, and damage of every kind is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

from gemma4cli.errors import G4Error
from gemma4cli.progress import Task
from gemma4cli.quant import checkpoint
from gemma4cli.quant.checkpoint import CheckpointPlan, open_checkpoint, write_checkpoint
from gemma4cli.quant.manifest import (
    CheckpointManifest,
    ManifestHead,
    SourceRecord,
    TensorRecord,
    Totals,
    describe_recipe,
    recipe_name,
)
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from gemma4cli.quant.shards import ShardWriter, plan_shards
from gemma4cli.quant.tensors import dequantize, is_quantized
from gemma4cli.quant.torchao_checkpoint import TorchaoCheckpoint
from gemma4cli.quant.torchao_types import Int4Tensor, IntxUnpackedToInt8Tensor
from tests.support.tiny import random_weights, tiny_config
from tests.support.tiny import write_checkpoint as write_tiny

SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    source = write_tiny(folder / "tiny", dtype=torch.bfloat16)
    quantize_checkpoint(source, folder / "tiny-default", load_recipe("default"), shard_bytes=SHARD_BYTES)
    return folder / "tiny-default"


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_torchao_alone_loads_every_shard(written: Path) -> None:
    found = {}
    for path in shards(written):
        assert path.stat().st_size < SHARD_BYTES * 1.5
        with safe_open(path, framework="pt") as file:
            tensors, left = unflatten_tensor_state_dict(load_file(path), file.metadata())
        assert not left
        found |= tensors
    reader = open_checkpoint(written)
    assert set(found) == set(reader.names()) == {*tiny_config().parameter_shapes(), "lm_head.weight"}
    for name, tensor in reader.stream():
        assert type(found[name]) is type(tensor)
        assert torch.equal(dequantize(found[name]), dequantize(tensor))


def test_what_is_stored_is_the_model(written: Path) -> None:
    reader = open_checkpoint(written)
    weights = random_weights(tiny_config(), dtype=torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    classes = {}
    for name, tensor in reader.stream():
        original = weights[name].float()
        assert tensor.shape == original.shape
        classes[name] = type(tensor)
        if not is_quantized(tensor):
            assert torch.equal(tensor, weights[name])
        error = ((dequantize(tensor) - original).norm() / original.norm()).item()
        assert error == pytest.approx(reader.manifest.tensors[name].relative_error, rel=1e-4)
    assert classes["model.embed_tokens.weight"] is IntxUnpackedToInt8Tensor
    assert classes["lm_head.weight"] is classes["model.layers.3.mlp.up_proj.weight"] is Int4Tensor


def test_the_index_and_the_files_agree(written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text())
    held = {}
    for path in shards(written):
        with safe_open(path, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == held
    manifest = CheckpointManifest.read(written)
    assert index["metadata"]["total_size"] == manifest.head.totals.weight_bytes == open_checkpoint(written).nbytes
    assert {*manifest.files, "g4.json"} == {path.name for path in written.iterdir()}


def test_tensors_of_odd_size_leave_the_next_one_aligned(tmp_path: Path) -> None:
    """A bfloat16 tensor at an odd offset cannot be viewed in place: wide types come first."""
    tensors = {"m.b": torch.arange(3, dtype=torch.uint8), "m.a": torch.arange(5.0).bfloat16(), "m.c": torch.arange(3.0)}
    plan = plan_shards({name: tensor.to("meta") for name, tensor in tensors.items()}, 1 << 20)[0]
    assert all(plan.spans[name][0] % tensor.itemsize == 0 for name, tensor in tensors.items())
    with ShardWriter(tmp_path, plan) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        writer.finish()
    path = tmp_path / plan.file
    assert path.stat().st_size == plan.nbytes
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own() -> None:
    layout = {f"m.{i}": torch.empty(size, dtype=torch.uint8, device="meta") for i, size in enumerate((10, 500, 10, 80))}
    plans = plan_shards(layout, 100)
    assert [list(plan.tensors) for plan in plans] == [["m.0"], ["m.1"], ["m.2", "m.3"]]
    assert [plan.file for plan in plans] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_any_class_that_torchao_can_flatten_is_written(tmp_path: Path) -> None:
    """5 and 6 bits in groups of 16 come from GGUF files."""

    def make(bits: int, device: str) -> IntxUnpackedToInt8Tensor:
        torch.manual_seed(bits)
        qdata = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (4, 64), dtype=torch.int8)
        parts = (qdata, torch.rand(4, 4).bfloat16(), torch.zeros(4, 4, dtype=torch.int8))
        return IntxUnpackedToInt8Tensor(
            *(part.to(device) for part in parts), getattr(torch, f"int{bits}"), [1, 16], torch.bfloat16, None
        )

    def produce(name: str, shard: ShardWriter, task: Task) -> TensorRecord:
        shard.put(name, make(int(name[-1]), "cpu"))
        return TensorRecord("int", (4, 64), 9.5, 16, "Q6_K", None, None)

    head = ManifestHead({}, SourceRecord("gguf", "x", None, {}), {}, Totals(1, 1, 1, 1.0))
    plan = CheckpointPlan({f"m.w{bits}": make(bits, "meta") for bits in (5, 6)}, {"config.json": b"{}"})
    manifest = write_checkpoint(tmp_path / "out", plan, head, produce)
    assert CheckpointManifest.read(tmp_path / "out") == manifest
    path = tmp_path / "out" / "model-00001-of-00001.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, _ = unflatten_tensor_state_dict(load_file(path), file.metadata())
    for bits in (5, 6):
        assert tensors[f"m.w{bits}"].target_dtype == getattr(torch, f"int{bits}")
        assert torch.equal(dequantize(tensors[f"m.w{bits}"]), dequantize(make(bits, "cpu")))


def test_a_plain_folder_is_read_as_it_is(tmp_path: Path) -> None:
    reader = open_checkpoint(write_tiny(tmp_path / "plain"))
    assert reader.manifest is None
    assert not reader.is_quantized
    assert type(reader.tensor("model.norm.weight")) is torch.Tensor


def test_without_its_manifest_it_is_what_torchao_wrote(copy: Path) -> None:
    ours = open_checkpoint(copy)
    (copy / "g4.json").unlink()
    theirs = open_checkpoint(copy)
    assert type(theirs) is TorchaoCheckpoint
    assert theirs.names() == ours.names()
    assert theirs.manifest.head.totals.bits_per_weight == ours.manifest.head.totals.bits_per_weight


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shards(c)[1].unlink(), r"model-00002-of-00004\.safetensors is missing\."),
        (lambda c: shards(c)[1].write_bytes(shards(c)[1].read_bytes()[:-1]), r"model-00002-of-.* bytes instead of"),
        (lambda c: flip_bit(shards(c)[2], -1), r"model-00003-of-00004\.safetensors is damaged: its SHA-256"),
        (lambda c: flip_bit(c / "tokenizer.json", 40), r"tokenizer\.json is damaged: its SHA-256"),
        (lambda c: (c / "config.json").unlink(), r"config\.json does not exist"),
        (lambda c: edit(c / "g4.json", version=2), r"g4\.json has version 2; this g4 reads version 1"),
        (lambda c: edit(c / "g4.json", format="g4-bundle"), r"g4\.json has format 'g4-bundle'; a quantized"),
        (lambda c: (c / "g4.json").write_text("[]"), r"g4\.json has format None"),
        (lambda c: (c / "g4.json").write_text("{"), r"g4\.json is not valid JSON"),
        (lambda c: edit(c / "g4.json", files={"a": {"bytes": 1}}), r"g4\.json is damaged: .*sha256"),
        (lambda c: edit(c / "g4.json", totals={"parameters": "many"}), r"g4\.json is damaged"),
        (
            lambda c: edit(c / "g4.json", files={"../source": {"bytes": 1, "sha256": "x"}}),
            r"g4\.json names '\.\./source', which is not a file of its folder",
        ),
        (lambda c: edit(c / "g4.json", tensors={}), r"g4\.json disagree about lm_head\.weight"),
    ],
)  # fmt: skip
def test_damage_is_named(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(G4Error, match=message):
        open_checkpoint(copy)


def test_a_bundle_in_its_place_is_named_with_what_runs_it(copy: Path) -> None:
    edit(copy / "g4.json", format="g4-bundle")
    with pytest.raises(G4Error) as caught:
        open_checkpoint(copy)
    assert "g4 run BUNDLE" in str(caught.value.hint)


def test_a_flipped_bit_in_a_large_checkpoint_is_found_on_request(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bit(shards(copy)[0], -1)
    monkeypatch.setattr(checkpoint, "ALWAYS_VERIFIED_BYTES", 1)
    open_checkpoint(copy)
    with pytest.raises(G4Error, match=r"model-00001-of-00004\.safetensors is damaged"):
        open_checkpoint(copy, verify=True)


def test_a_damaged_header_is_named_even_without_hashing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ALWAYS_VERIFIED_BYTES", 1)
    flip_bit(shards(copy)[0], 8)  # the header's opening brace
    with pytest.raises(G4Error, match=r"model-00001-of-00004\.safetensors is not a whole safetensors file"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("drop", "extra", "message"),
    [
        ("model.norm.weight", None, r"model\.norm\.weight is missing"),
        ("model.embed_tokens.weight", None, r"model\.embed_tokens\.weight is missing"),
        (
            None,
            "model.layers.99.mlp.up_proj.weight",
            r"\.99\.mlp\.up_proj\.weight does not belong to the model",
        ),
    ],
)
def test_tensors_are_compared_with_the_config(copy: Path, drop: str | None, extra: str | None, message: str) -> None:
    """A folder whose manifest and hashes agree with each other, but not with its config."""
    reader = open_checkpoint(copy)
    tensors, records = dict(reader.stream()), dict(reader.manifest.tensors)
    if drop:
        del tensors[drop], records[drop]
    if extra:
        like = "model.layers.0.mlp.up_proj.weight"
        tensors[extra], records[extra] = tensors[like], records[like]
    assets = {name: (copy / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    plan = CheckpointPlan({name: to_meta(tensor) for name, tensor in tensors.items()}, assets)

    def produce(name: str, shard: ShardWriter, task: Task) -> TensorRecord:
        shard.put(name, tensors[name])
        return records[name]

    write_checkpoint(copy, plan, reader.manifest.head, produce, force=True)
    with pytest.raises(G4Error, match=message):
        open_checkpoint(copy)


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    if not is_quantized(tensor):
        return tensor.to("meta")
    parts = {part: getattr(tensor, part).to("meta") for part in ("qdata", "scale", "zero_point")}
    attributes = {name: getattr(tensor, name) for name in tensor.tensor_attribute_names}
    return type(tensor)(**parts, **attributes)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(G4Error, match=r"gone does not exist\.") as caught:
        open_checkpoint(tmp_path / "gone")
    assert "g4 pull" in caught.value.hint
    (tmp_path / "x.bin").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(G4Error, match=r"x\.bin is a GGUF file\.") as caught:
        open_checkpoint(tmp_path / "x.bin")
    assert "g4 convert-gguf" in caught.value.hint
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(G4Error, match=r"x\.txt is a file; a checkpoint is a folder\."):
        open_checkpoint(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(G4Error, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize(
    ("recipe", "name", "line"),
    [
        ({"name": "default", "description": "4 bits"}, "default", "default: 4 bits"),
        (
            {"name": "gguf", "file_type": "Q4_K_M", "types": {}, "weights": {"F32": 1, "Q4_K": 8100, "Q6_K": 1899}},
            "Q4_K_M",
            "GGUF Q4_K_M: Q4_K 81.0 %, Q6_K 19.0 %",
        ),
        ({"name": "gguf", "file_type": None, "types": {}, "weights": {"Q4_0": 1}}, "gguf", "GGUF: Q4_0 100.0 %"),
        ({"name": "gguf", "types": {"F32": 2, "Q4_0": 3}}, "gguf", "GGUF: F32, Q4_0"),
    ],
)
def test_a_recipe_in_one_line(recipe: dict[str, object], name: str, line: str) -> None:
    """The last one is as earlier versions stored it."""
    assert recipe_name(recipe) == name
    assert describe_recipe(recipe) == line
