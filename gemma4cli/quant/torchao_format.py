"""torchao's safetensors format, read from headers alone and without torch.

torchao keeps a quantized tensor as several plain ones and describes it in the file's metadata
(`torchao.prototype.safetensors`, as of torchao 0.18):

    tensor_names                 JSON list of the tensors' names
    model.norm.weight            JSON: {"_type": "Tensor"}; the tensor lies in the file under this name
    layers.0.mlp.up_proj.weight  JSON: _type (class), _data (attributes), _tensor_data_names (its parts)
    layers.0.mlp.up_proj._weight_qdata, …                      the parts

g4's own checkpoints have this form, and so have those of ExecuTorch's gemma4_31b example, which names tensors without
`model.` in front and stores `lm_head.weight` beside the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.model.names import our_name

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
PLAIN = "Tensor"
CLASSES = ("Int4Tensor", "IntxUnpackedToInt8Tensor")
_OUR_CLASSES = ("GGUFInt4Tensor", "GGUFIntxTensor")
_PACKED = ("Int4Tensor", "GGUFInt4Tensor")
_PARTS = {
    "Int4Tensor": {"qdata", "scale", "zero_point"},
    "IntxUnpackedToInt8Tensor": {"qdata", "scale", "zero_point"},
    "GGUFInt4Tensor": {"qdata", "step", "sub"},
    "GGUFIntxTensor": {"qdata", "step", "sub"},
}
_OPTIONAL_PARTS = {"sub"}
_NAMES = "tensor_names"
_METADATA = "__metadata__"
_BFLOAT16 = {"_type": "torch.dtype", "_data": "bfloat16"}
# What ExecuTorch's model calls its modules.
_BARE_PREFIXES = ("embed_tokens.", "layers.", "norm.")
_FETCH_AGAIN = "Fetch the checkpoint again, or copy the folder again."


@dataclass(frozen=True)
class Description:
    """One tensor as a file describes it.

    Attributes:
        name: its name in the file.
        kind: its class, PLAIN for one that is not quantized.
        text: torchao's JSON.
        keys: part -> key in the file; "" -> name for a plain one.
        bits, group_size: of a quantized one, else 0.
    """

    name: str
    kind: str
    text: str
    keys: Mapping[str, str]
    bits: int = 0
    group_size: int = 0

    @property
    def is_quantized(self) -> bool:
        return self.kind != PLAIN

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.kind in _PACKED

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tensor's shape from that of its codes (or of itself, when plain)."""
        return (*stored[:-1], 2 * stored[-1]) if self.is_packed and stored else stored

    @property
    def main_key(self) -> str:
        """The key of the codes, or of the plain tensor."""
        return self.keys["qdata"] if self.is_quantized else self.name


def canonical_name(name: str) -> str:
    """Return our name of a text tensor: layers.3.mlp.up_proj.weight -> model.layers.3.mlp.up_proj.weight."""
    return f"model.{name}" if name.startswith(_BARE_PREFIXES) else our_name(name)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a safetensors file's tensors (key -> dtype, shape, data_offsets) and its metadata.

    Raises: G4Error when the file is none.
    """
    damaged = G4Error(f"{path} is not a safetensors file.", hint="The file is damaged; fetch it again.")
    if not path.is_file():
        raise G4Error(f"{path} does not exist.", hint="A checkpoint has config.json and its safetensors in one folder.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise damaged from None
    tensors = {key: value for key, value in header.items() if key != _METADATA} if type(header) is dict else {}
    if not tensors or not all(map(_is_entry, tensors.values())):
        raise damaged
    metadata = header.get(_METADATA) or {}
    return tensors, metadata if isinstance(metadata, dict) else {}


def is_quantized_folder(folder: Path) -> bool:
    """Whether a checkpoint folder holds quantized tensors of torchao's; damage is for whoever opens it to name."""
    return any(_holds_quantized(file) for file in sorted(folder.glob("*.safetensors")))


def _holds_quantized(file: Path) -> bool:
    try:
        _, metadata = read_header(file)
    except G4Error:
        return False
    try:
        return has_torchao_metadata(metadata) and any(d.is_quantized for d in describe(metadata, file).values())
    except G4Error:
        return True


def has_torchao_metadata(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file was written by torchao."""
    return _NAMES in metadata


def describe(metadata: Mapping[str, str], where: Path) -> dict[str, Description]:
    """Return what torchao's metadata says of each tensor, by its name in the file.

    Raises: G4Error for metadata that are damaged, or a class or an option that g4 does not read.
    """
    try:
        names = json.loads(metadata[_NAMES])
        documents = {name: json.loads(metadata[name]) for name in names}
    except (KeyError, TypeError, ValueError):
        raise _damaged(where) from None
    if unknown := sorted({str(_type_of(d, where)) for d in documents.values()} - {PLAIN, *_PARTS}):
        raise G4Error(
            f"{where} holds torchao tensors of type {', '.join(unknown)}, which g4 cannot use.",
            hint=f"It reads {' and '.join(CLASSES)}.",
        )
    return {name: _describe(name, metadata[name], document, where) for name, document in documents.items()}


def part_keys(name: str, parts: list[str]) -> dict[str, str]:
    """Return part -> key, following torchao's naming `module._weight_part`."""
    module, _, weight = name.rpartition(".")
    return {part: f"{module}._{weight}_{part}" for part in parts}


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("dtype"), str) and isinstance(value.get("shape"), list)


def _describe(name: str, text: str, document: dict[str, Any], where: Path) -> Description:
    kind = document["_type"]
    if kind == PLAIN:
        return Description(name, kind, text, {"": name})
    data, parts = document.get("_data"), document.get("_tensor_data_names")
    if parts is None:
        raise G4Error(
            f"{where} was written by a version of torchao that does not list the parts of {name}.",
            hint="Quantize the original model again: g4 quantize",
        )
    if not isinstance(data, dict) or not isinstance(parts, list) or len(set(map(str, parts))) != len(parts):
        raise _damaged(where)
    if extra := sorted(set(map(str, parts)) - _PARTS[kind]):
        raise _unsupported(where, name, f"a part {extra[0]}")
    if data.get("activation_quantization") is not None:
        raise _unsupported(where, name, f"activations quantized by {data['activation_quantization']!r}")
    if data.get("activation_dtype") not in (None, _BFLOAT16):
        raise _unsupported(where, name, "activations of another type than bfloat16")
    if not _PARTS[kind] - _OPTIONAL_PARTS <= set(parts):
        raise _damaged(where)
    return Description(name, kind, text, part_keys(name, parts), _bits(kind, data, where), _group(name, data, where))


def _type_of(document: object, where: Path) -> object:
    if not isinstance(document, dict) or "_type" not in document:
        raise _damaged(where)
    return document["_type"]


def _bits(kind: str, data: dict[str, Any], where: Path) -> int:
    if kind in _PACKED:
        return 4
    target = data.get("target_dtype")
    name = target.get("_data") if isinstance(target, dict) else None
    if name not in (f"int{bits}" for bits in range(1, 9)):
        raise _damaged(where)
    return int(name.removeprefix("int"))


def _group(name: str, data: dict[str, Any], where: Path) -> int:
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise _damaged(where)
    if block[0] != 1:
        raise _unsupported(where, name, f"blocks of {block[0]} rows")
    return block[1]


def _unsupported(where: Path, name: str, what: str) -> G4Error:
    return G4Error(f"{where}: {name} has {what}, which g4 does not do.", hint=f"It reads {' and '.join(CLASSES)}.")


def _damaged(where: Path) -> G4Error:
    return G4Error(f"{where} has damaged torchao metadata.", hint=_FETCH_AGAIN)
