"""Checkpoints that another program wrote with torchao: read as they are, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemma4cli.errors import G4Error
from gemma4cli.hub.headers import inspect
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import plan_quantization
from gemma4cli.quant.recipe import load_recipe
from gemma4cli.quant.tensors import dequantize
from gemma4cli.quant.torchao_checkpoint import TorchaoCheckpoint
from gemma4cli.quant.torchao_format import is_quantized_folder
from gemma4cli.quant.torchao_types import Int4Tensor
from tests.support.tiny import write_checkpoint
from tests.support.torchao_saver import executorch_name, quantized_tensors, save

MATRIX = "layers.3.mlp.up_proj.weight"
PART = "layers.3.mlp.up_proj._weight_"
ROWS = {"qdata": 0, "scale": 1, "zero_point": 1}  # where each part has the matrix' rows
HEADED = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("torchao") / "tiny", **HEADED)


@pytest.fixture(scope="module")
def tensors(source: Path) -> dict[str, torch.Tensor]:
    return quantized_tensors(source)


@pytest.fixture
def folder(source: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    return save(tmp_path / "prequantized", source, tensors)


def test_every_tensor_by_our_name_with_its_values(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = open_checkpoint(folder)
    assert isinstance(reader, TorchaoCheckpoint)
    assert reader.is_quantized
    assert set(reader.names()) == set(tensors)
    assert reader.nbytes == sum(piece.nbytes for piece in load_file(folder / "model.safetensors").values())
    for name, tensor in reader.stream():
        assert type(tensor) is type(tensors[name])
        assert torch.equal(dequantize(tensor), dequantize(tensors[name])), name


def test_what_it_says_of_itself(folder: Path) -> None:
    manifest = open_checkpoint(folder).manifest
    assert manifest.head.source.kind == "torchao"
    assert set(manifest.head.source.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(record.sha256 for record in manifest.head.source.files.values())
    assert manifest.head.recipe["types"]["int8"] == 1
    record = manifest.tensors[f"model.{MATRIX}"]
    assert (record.format, record.group_size, record.method, record.bits_per_weight) == ("int4", 32, "torchao", 5.0)
    assert manifest.tensors["model.norm.weight"].format == "bfloat16"


def test_parts_of_a_tensor_may_lie_in_two_files(folder: Path) -> None:
    """As transformers shards: the index places parts, and every shard repeats the metadata."""
    pieces, metadata = read(folder)
    names, weight_map = sorted(pieces), {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        mine = names[number - 1 :: 2]
        save_file({key: pieces[key] for key in mine}, folder / file, metadata)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weight_map[f"{PART}qdata"] != weight_map[f"{PART}scale"]
    assert type(open_checkpoint(folder).tensor(f"model.{MATRIX}")) is Int4Tensor
    assert inspect(folder).format == "torchao"


def test_tensors_of_other_modalities_are_left_out(
    source: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    vision = {"model.vision_tower.proj.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    folder = tmp_path / "with-vision"
    save(folder, source, tensors)
    pieces, metadata = read(folder)
    metadata["tensor_names"] = json.dumps([*json.loads(metadata["tensor_names"]), *vision])
    metadata |= {name: json.dumps({"_type": "Tensor"}) for name in vision}
    save_file({**pieces, **vision}, folder / "model.safetensors", metadata)
    assert set(open_checkpoint(folder).names()) == set(tensors)
    assert inspect(folder).tensors == len(tensors)


def test_it_cannot_be_quantized_again(folder: Path) -> None:
    with pytest.raises(G4Error, match="is quantized already"):
        plan_quantization(folder, load_recipe("default"))


def test_floats_that_torchao_wrote_are_a_plain_checkpoint(source: Path, tmp_path: Path) -> None:
    plain = dict(open_checkpoint(source).stream())
    folder = save(tmp_path / "floats", source, plain)
    pieces, metadata = read(folder)
    renamed = {f"model.{key}": piece for key, piece in pieces.items()}
    metadata = {f"model.{name}" if name in pieces else name: text for name, text in metadata.items()}
    metadata["tensor_names"] = json.dumps([*renamed])
    save_file(renamed, folder / "model.safetensors", metadata)
    assert not is_quantized_folder(folder)
    assert not open_checkpoint(folder).is_quantized
    assert inspect(folder).format == "safetensors"


Pieces = dict[str, torch.Tensor]
Metadata = dict[str, str]


def read(folder: Path) -> tuple[Pieces, Metadata]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return load_file(folder / "model.safetensors"), file.metadata()


def describing(**changes: Any) -> Callable[[Pieces, Metadata], None]:
    """Change the matrix' description; None removes a key, dotted names reach into `_data`."""

    def change(pieces: Pieces, metadata: Metadata) -> None:
        document = json.loads(metadata[MATRIX])
        for key, value in changes.items():
            where = document["_data"] if key in ("block_size", "activation_dtype", "target_dtype") else document
            if value is None:
                del where[key]
            else:
                where[key] = value
        metadata[MATRIX] = json.dumps(document)

    return change


def as_intx(**data: Any) -> Callable[[Pieces, Metadata], None]:
    """Store the matrix as IntxUnpackedToInt8Tensor with these attributes."""

    def change(pieces: Pieces, metadata: Metadata) -> None:
        rows, half = pieces[f"{PART}qdata"].shape
        pieces[f"{PART}qdata"] = torch.full((rows, 2 * half), 31, dtype=torch.int8)
        for part in ("scale", "zero_point"):
            pieces[f"{PART}{part}"] = pieces[f"{PART}{part}"].t().contiguous()
        attributes = {
            "target_dtype": {"_type": "torch.dtype", "_data": "int6"},
            "block_size": [1, 32],
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            "activation_quantization": None,
        }
        document = json.loads(metadata[MATRIX])
        metadata[MATRIX] = json.dumps(
            {**document, "_type": "IntxUnpackedToInt8Tensor", "_data": {**attributes, **data}}
        )

    return change


def with_piece(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pieces, Metadata], None]:
    def apply(pieces: Pieces, metadata: Metadata) -> None:
        pieces[PART + key] = change(pieces[PART + key]).contiguous()

    return apply


def rename(old: str, new: str) -> Callable[[Pieces, Metadata], None]:
    def apply(pieces: Pieces, metadata: Metadata) -> None:
        pieces[new] = pieces.pop(old)
        metadata[new] = metadata.pop(old)
        names = json.loads(metadata["tensor_names"])
        metadata["tensor_names"] = json.dumps([new if name == old else name for name in names])

    return apply


def add(key: str, piece: torch.Tensor) -> Callable[[Pieces, Metadata], None]:
    return lambda pieces, metadata: pieces.__setitem__(key, piece)


# Seen from the headers alone, so `g4 pull` refuses these before it fetches anything.
BEFORE_THE_DOWNLOAD: dict[str, tuple[Callable[[Pieces, Metadata], None], str]] = {
    "names": (lambda p, m: m.update(tensor_names="[1"), "has damaged torchao metadata"),
    "no description": (lambda p, m: m.pop(MATRIX), "has damaged torchao metadata"),
    "description": (lambda p, m: m.update({MATRIX: "[]"}), "has damaged torchao metadata"),
    "attributes": (describing(_data=[]), "has damaged torchao metadata"),
    "parts": (describing(_tensor_data_names=["qdata", "scale"]), "has damaged torchao metadata"),
    "group": (describing(block_size=[1, 0]), "has damaged torchao metadata"),
    "dtype": (as_intx(target_dtype={"_type": "torch.dtype", "_data": "int9"}), "has damaged torchao metadata"),
    "older": (describing(_tensor_data_names=None), f"version of torchao that does not list the parts of {MATRIX}"),
    "class": (describing(_type="NVFP4Tensor"), "holds torchao tensors of type NVFP4Tensor, which g4 cannot use"),
    "rows": (describing(block_size=[2, 32]), f"{MATRIX} has blocks of 2 rows, which g4 does not do"),
    "awq": (
        describing(_tensor_data_names=["act_pre_scale", "qdata", "scale", "zero_point"]),
        f"{MATRIX} has a part act_pre_scale, which g4 does not do",
    ),
    "8da4w": (
        as_intx(activation_quantization="int8_asym_per_token"),
        f"{MATRIX} has activations quantized by 'int8_asym_per_token', which g4 does not do",
    ),
    "fp8": (
        describing(activation_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"}),
        f"{MATRIX} has activations of another type than bfloat16",
    ),
    "lacking": (lambda p, m: p.pop(f"{PART}scale"), f"lacks {PART}scale"),
    "another model": (rename("norm.weight", "layers.99.norm.weight"), "model.layers.99.norm.weight does not belong"),
    "misshaped": (
        lambda p, m: p.update({PART + k: torch.cat([p[PART + k]] * 2, d) for k, d in ROWS.items()}),
        f"model.{MATRIX} has shape [256, 64], but config.json makes it [128, 64]",
    ),
}  # fmt: skip
# Seen when the checkpoint is opened.
ON_OPENING = {
    "left over": (add("layers.3.stray", torch.ones(2)), "a tensor layers.3.stray that its metadata do not describe"),
    "twice": (rename("norm.weight", "model.embed_tokens.weight"), "model.embed_tokens.weight is there twice"),
    "plain dtype": (
        lambda p, m: p.update({"norm.weight": p["norm.weight"].to(torch.float64)}),
        "norm.weight has dtype F64; a plain tensor has BF16, F16, F32",
    ),
    "groups": (describing(block_size=[1, 48]), f"{MATRIX} of shape [128, 64] does not divide into groups of 48"),
    "scale shape": (
        with_piece("scale", lambda t: t.t()),
        f"{PART}scale of shape [128, 2] and dtype BF16 does not fit {MATRIX} of shape [128, 64] in groups of 32",
    ),
    "scale dtype": (with_piece("scale", lambda t: t.to(torch.int8)), "dtype I8 does not fit"),
    "code dtype": (with_piece("qdata", lambda t: t.to(torch.int8)), f"{PART}qdata of shape [128, 32] and dtype I8"),
    "convention": (
        lambda p, m: p.update({key: p[key] * 0.01 for key in p if key.endswith("zero_point")}),
        "are in units of the weights, as torchao's own 4-bit quantizer for GPUs writes them",
    ),
}  # fmt: skip
# Seen when the tensor is read.
ON_READING = {
    "infinite scale": (with_piece("scale", lambda t: t / 0), f"{PART}scale holds a value that is not a finite number"),
    "code": (as_intx(target_dtype={"_type": "torch.dtype", "_data": "int5"}), "has the code 31, which is not one of 5"),
}


def damaged(folder: Path, change: Callable[[Pieces, Metadata], None]) -> Path:
    pieces, metadata = read(folder)
    change(pieces, metadata)
    save_file(pieces, folder / "model.safetensors", metadata)
    return folder


def sentence_of(work: Callable[[], object]) -> str:
    with pytest.raises(G4Error) as caught:
        work()
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("what", BEFORE_THE_DOWNLOAD)
def test_refused_from_the_headers(folder: Path, what: str) -> None:
    change, sentence = BEFORE_THE_DOWNLOAD[what]
    damaged(folder, change)
    assert sentence in sentence_of(lambda: inspect(folder))
    assert sentence in sentence_of(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("what", ON_OPENING)
def test_refused_on_opening(folder: Path, what: str) -> None:
    change, sentence = ON_OPENING[what]
    assert sentence in sentence_of(lambda: open_checkpoint(damaged(folder, change)))


@pytest.mark.parametrize("what", ON_READING)
def test_refused_on_reading(folder: Path, what: str) -> None:
    change, sentence = ON_READING[what]
    reader = open_checkpoint(damaged(folder, change))
    assert sentence in sentence_of(lambda: reader.tensor(f"model.{MATRIX}"))


def test_six_bits_are_read(folder: Path) -> None:
    tensor = open_checkpoint(damaged(folder, as_intx())).tensor(f"model.{MATRIX}")
    assert tensor.target_dtype == torch.int6
    assert (tensor.qdata == 31).all()


def test_names_are_executorchs() -> None:
    assert executorch_name(f"model.{MATRIX}") == MATRIX
    assert executorch_name("lm_head.weight") == "lm_head.weight"
