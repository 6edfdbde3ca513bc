"""Checkpoints are validated before they are read, and build_model puts every tensor where it belongs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.weights import SafetensorsReader, build_model
from gemma4cli.progress import SILENT
from tests.support.tiny import random_weights, tiny_config, write_checkpoint, write_shards

CACHE = CacheSpec(64, 16, torch.float32)
Q_PROJ = "model.language_model.layers.3.self_attn.q_proj.weight"
SHARD_2 = "model-00002-of-00003.safetensors"


class Notes:
    """Progress that remembers what was said and how far the bars came."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done = 0
        self.total = 0

    def phase(self, label: str, total: int, unit: str = "B") -> Notes:
        self.total = total
        return self

    def __enter__(self) -> Notes:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, amount: int, label: str | None = None) -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_was_written(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    notes = Notes()
    reader = SafetensorsReader(write_checkpoint(tmp_path / "c", 7, shards=shards, dtype=dtype), notes)
    expected = random_weights(tiny_config(), 7, dtype)
    assert reader.config == tiny_config()
    assert reader.names() == list(expected)
    assert reader.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in reader.stream():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(reader.tensor("model.norm.weight"), expected["model.norm.weight"])
    assert notes.said == ["Skipping model.vision_tower.*: only the text model is used."]


def test_text_only_names_need_no_prefix(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", 7)
    save_file(random_weights(tiny_config(), 7), folder / "model.safetensors")
    notes = Notes()
    assert len(SafetensorsReader(folder, notes).names()) == 168
    assert notes.said == []


def _rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a damage that loads all tensors of the one file, changes them, and writes them back."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def _bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def _flip(index: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (_bytes("model.safetensors", lambda data: data[:-5]), "model.safetensors is not a whole safetensors file"),
        (_bytes("model.safetensors", lambda data: data[:500]), "model.safetensors is not a whole safetensors file"),
        (_bytes("model.safetensors", lambda data: b""), "model.safetensors is not a whole safetensors file"),
        (_bytes("model.safetensors", lambda data: data + b"x"), "model.safetensors is not a whole safetensors file"),
        (_bytes("model.safetensors", _flip(1)), "model.safetensors is not a whole safetensors file"),
        (_bytes("model.safetensors", _flip(8)), "model.safetensors is not a whole safetensors file"),
        (_bytes("config.json", lambda data: data[:100]), "config.json is not valid JSON"),
        (_rewrite(lambda weights: weights.pop(Q_PROJ)), r"model.layers.3.self_attn.q_proj.weight is missing"),
        (_rewrite(lambda weights: [weights.pop(Q_PROJ), weights.pop("model.language_model.norm.weight")]),
         r"q_proj.weight \(and 1 more\) is missing"),
        (_rewrite(lambda weights: weights.update({"model.language_model.layers.0.router.weight": torch.ones(2)})),
         "model.layers.0.router.weight does not belong to the model"),
        (_rewrite(lambda weights: weights.update({Q_PROJ: torch.ones(64, 32)})),
         r"q_proj.weight has shape \[64, 32\], but config.json makes it \[64, 64\]"),
        (_rewrite(lambda weights: weights.update({Q_PROJ: torch.ones(64, 64, dtype=torch.int8)})),
         "q_proj.weight has dtype I8; a plain checkpoint has F32, F16, BF16"),
        (_rewrite(lambda weights: weights.update({"model.norm.weight": torch.ones(64)})),
         "model.norm.weight is there twice"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_checkpoint(tmp_path / "c")
    damage(folder)
    with pytest.raises(G4Error, match=message) as caught:
        SafetensorsReader(folder)
    assert str(folder) in caught.value.message


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Return a damage that changes the weight_map of the index."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        document = json.loads(file.read_text())
        change(document["weight_map"])
        file.write_text(json.dumps(document))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARD_2).unlink(), f"{SHARD_2} does not exist, but model.safetensors.index"),
        (_bytes(SHARD_2, lambda data: data[:-1]), f"{SHARD_2} is not a whole safetensors file"),
        (_index(lambda names: names.update({"model.language_model.extra": SHARD_2})),
         f"{SHARD_2} does not agree with model.safetensors.index.json: it lacks model.language_model.extra"),
        (_index(lambda names: names.pop(next(name for name, file in names.items() if file == SHARD_2))),
         f"{SHARD_2} does not agree with model.safetensors.index.json: it also has "),
        (_index(lambda names: names.update({Q_PROJ: "../model.safetensors"})), "which is not a file of this folder"),
        (_index(lambda names: names.update({Q_PROJ: 3})), "places .* in 3, which is not a file of this folder"),
        (_index(lambda names: names.clear()), "has no weight_map"),
        (_bytes("model.safetensors.index.json", lambda data: b"[]"), "has no weight_map"),
        (_bytes("model.safetensors.index.json", lambda data: data[:50]), "is not valid JSON"),
        (lambda folder: write_shards(folder, {"a": torch.ones(1)}), "has both model.safetensors and"),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_checkpoint(tmp_path / "c", shards=3)
    damage(folder)
    with pytest.raises(G4Error, match=message):
        SafetensorsReader(folder)


def test_a_shard_of_the_vision_tower_may_be_absent(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", shards=3, vision=False)
    _index(lambda names: names.update({"model.vision_tower.x": "model-00004-of-00004.safetensors"}))(folder)
    assert len(SafetensorsReader(folder).names()) == 168


@pytest.mark.parametrize("path", ["absent", "empty", "file"])
def test_no_checkpoint(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    message = "config.json does not exist" if path == "empty" else f"{path} is not a folder with a checkpoint"
    with pytest.raises(G4Error, match=message):
        SafetensorsReader(tmp_path / path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_found_when_it_is_read(tmp_path: Path, value: float) -> None:
    folder = write_checkpoint(tmp_path / "c", dtype=torch.bfloat16)
    _rewrite(lambda weights: weights[Q_PROJ].view(-1)[1234:1235].fill_(value))(folder)
    reader = SafetensorsReader(folder)
    with pytest.raises(
        G4Error, match=r"model.safetensors: model.layers.3.self_attn.q_proj.weight holds a value that is"
    ):
        list(reader.stream())


def test_build_model_fills_everything(tmp_path: Path) -> None:
    reader = SafetensorsReader(write_checkpoint(tmp_path / "c", 7, dtype=torch.bfloat16))
    progress = Notes()
    model = build_model(reader, CACHE, torch.float32, "cpu", progress=progress)
    state = model.state_dict()
    for name, tensor in random_weights(tiny_config(), 7, torch.bfloat16).items():
        assert torch.equal(state[name], tensor.float()), name
    everything = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in everything if tensor.is_meta or tensor.requires_grad]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert progress.done == progress.total == reader.nbytes


def test_bfloat16_keeps_angles_and_scale_in_float32(tmp_path: Path) -> None:
    reader = SafetensorsReader(write_checkpoint(tmp_path / "c", dtype=torch.bfloat16))
    model = build_model(reader, CacheSpec(64, 16, torch.bfloat16), torch.bfloat16, "cpu")
    assert {rotary.inv_freq.dtype for rotary in model.model.rotary_emb.values()} == {torch.float32}
    assert model(torch.tensor([[1, 2, 3]]), torch.arange(3)).dtype == torch.float32


def test_a_head_of_its_own_unties(tmp_path: Path) -> None:
    """A quantized checkpoint may store a tied head apart, with other bits than the embedding."""
    folder = write_checkpoint(tmp_path / "c")
    _rewrite(lambda weights: weights.update({"lm_head.weight": torch.ones(160, 64)}))(folder)
    model = build_model(SafetensorsReader(folder), CACHE, torch.float32, "cpu")
    assert model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, torch.ones(160, 64))
    assert not torch.equal(model.model.embed_tokens.weight, torch.ones(160, 64))


def test_prepare_sees_every_tensor_and_its_result_is_used(tmp_path: Path) -> None:
    seen: list[str] = []

    def zero(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return torch.zeros_like(tensor)

    reader = SafetensorsReader(write_checkpoint(tmp_path / "c"))
    model = build_model(reader, CACHE, torch.float32, "cpu", prepare=zero)
    assert seen == reader.names()
    assert not any(tensor.any() for tensor in model.parameters())


class _Reader:
    """A reader that gives whatever it is told to."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.config = tiny_config()
        self.nbytes = 0
        self._weights = weights

    def names(self) -> list[str]:
        return list(self._weights)

    def stream(self):
        return iter(self._weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.extra": torch.ones(1)}, "model.layers.0.extra does not belong to the model"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.norm.weight": torch.ones(65)}, r"model.norm.weight has shape \[65\], but config.json makes it \[64\]"),
    ],
)
def test_build_model_checks_any_reader(change: dict[str, Tensor | None], message: str) -> None:
    weights = {k: v for k, v in (random_weights(tiny_config()) | change).items() if v is not None}
    with pytest.raises(G4Error, match=message):
        build_model(_Reader(weights), CACHE, torch.float32, "cpu", progress=SILENT)
