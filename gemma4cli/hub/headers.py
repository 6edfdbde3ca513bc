"""Recognize a model, and refuse what g4 cannot use, from the first bytes of its files.

A model on a hub is looked at through a skeleton: its configuration and file headers, fetched by range request into
files of the right size that are otherwise holes. The same checks then serve models on this machine and those not yet
here.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json
from gemma4cli.hub.client import Hub, RemoteFile, Repository
from gemma4cli.hub.selection import CONFIG, INDEX, SINGLE, Selection, is_text_tensor, text_shards
from gemma4cli.model.config import Gemma4Config

_PLAIN_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_TORCHAO_TYPES = ("Int4Tensor", "IntxUnpackedToInt8Tensor", "Tensor")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_HEADER_GUESS_BYTES = 256 << 10
# A GGUF header says nowhere how long it is; the 31B's, with its vocabulary, has 15.8 MB.
_GGUF_PREFIXES = (1 << 20, 17 << 20, 96 << 20)


@dataclass(frozen=True)
class Contents:
    """What a model is made of: `precision` names its tensor types and how many there are, the weightiest first."""

    format: Literal["safetensors", "torchao", "gguf"]
    precision: str
    tensors: int


def peek(hub: Hub, source: Repository, selection: Selection, folder: Path) -> Contents:
    """Build the skeleton of a model in an empty `folder` and check it, before anything large is fetched."""
    if selection.format == "gguf":
        return _peek_gguf(hub, source, selection, folder)
    for name in (CONFIG, INDEX):
        if name in selection.companions:
            (folder / name).write_bytes(hub.read(source, source.files[name], 0, source.files[name].size))
    for name in selection.weights:
        _write_sparse(folder / name, _safetensors_head(hub, source, source.files[name]), source.files[name].size)
    try:
        return inspect(folder)
    except G4Error as error:
        raise _renamed(error, folder, source) from None


def inspect(path: Path) -> Contents:
    """Check a checkpoint folder or a GGUF file from its headers alone.

    Raises: G4Error when it is not a dense Gemma 4 model in a type g4 can use.
    """
    if path.is_dir():
        return _inspect_folder(path)
    if path.name.endswith(".safetensors"):
        raise G4Error(f"{path} is one file of a checkpoint.", hint=f"Give its folder: {path.parent}.")
    return _inspect_gguf(path)


def _renamed(error: G4Error, folder: Path, source: Repository) -> G4Error:
    """Name the repository in a sentence about the skeleton."""
    message = error.message.replace(f"{folder}/", f"{source.repo}/").replace(str(folder), source.repo)
    return G4Error(message, hint=error.hint)


def _write_sparse(path: Path, head: bytes, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def _safetensors_head(hub: Hub, source: Repository, file: RemoteFile) -> bytes:
    head = hub.read(source, file, 0, _HEADER_GUESS_BYTES)
    end = 8 + struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 8
    if len(head) < end <= min(_MAX_HEADER_BYTES, file.size):
        head += hub.read(source, file, len(head), end - len(head))
    return head


def _inspect_folder(folder: Path) -> Contents:
    Gemma4Config.from_dir(folder)
    shards = _shards(folder)
    types: Counter[str] = Counter()
    quantized: dict[str, str] = {}
    for shard in shards:
        header = read_safetensors_header(shard)
        metadata = header.pop("__metadata__", None) or {}
        quantized |= _torchao_types(shard, metadata)
        types.update(tensor["dtype"] for name, tensor in header.items() if is_text_tensor(name))
    if quantized:
        kinds = Counter(kind for kind in quantized.values() if kind != "Tensor")
        return Contents("torchao", _counted(kinds), len(quantized))
    unusable = sorted(set(types) - set(_PLAIN_TYPES))
    if unusable or not types:
        raise G4Error(
            f"{folder} holds {'tensors of type ' + ', '.join(unusable) if unusable else 'no text tensors'}, which g4 "
            "cannot quantize.",
            hint="Take the original checkpoint in bfloat16 (g4 pull 31b) or a GGUF (g4 pull 31b-gguf).",
        )
    names = Counter({_PLAIN_TYPES[dtype]: count for dtype, count in types.items()})
    return Contents("safetensors", _counted(names), sum(types.values()))


def _counted(types: Counter[str]) -> str:
    if len(types) == 1:
        return next(iter(types))
    return ", ".join(f"{name} ({count})" for name, count in types.most_common())


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    names, _ = text_shards(str(folder), read_json(folder / INDEX))
    return [folder / name for name in names]


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: tensor name -> dtype, shape, data_offsets; `__metadata__` as it is."""
    damaged = G4Error(f"{path} is not a safetensors file.", hint="The file is damaged; fetch it again.")
    if not path.is_file():
        raise G4Error(f"{path} does not exist.", hint="A checkpoint has config.json and its safetensors in one folder.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise damaged
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise damaged from None
    tensors = {name: value for name, value in header.items() if name != "__metadata__"} if type(header) is dict else {}
    if not tensors or not all(isinstance(value, dict) and "dtype" in value for value in tensors.values()):
        raise damaged
    return header


def _torchao_types(shard: Path, metadata: dict[str, str]) -> dict[str, str]:
    """Return the tensor class of each name torchao's metadata lists; {} for a plain file."""
    if "tensor_names" not in metadata:
        return {}
    damaged = G4Error(f"{shard} has damaged torchao metadata.", hint="Fetch the checkpoint again.")
    try:
        types = {name: json.loads(metadata[name])["_type"] for name in json.loads(metadata["tensor_names"])}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise damaged from None
    unusable = sorted(set(types.values()) - set(_TORCHAO_TYPES))
    if unusable:
        raise G4Error(
            f"{shard} holds torchao tensors of type {', '.join(unusable)}, which g4 cannot use.",
            hint=f"It reads {' and '.join(_TORCHAO_TYPES[:2])}.",
        )
    return types


def _peek_gguf(hub: Hub, source: Repository, selection: Selection, folder: Path) -> Contents:
    """Fetch growing prefixes of each part until its header is whole; then what is wrong is wrong with the file."""
    from gemma4cli.quant.gguf.keymap import ROPE_FREQS
    from gemma4cli.quant.gguf.reader import GGUFFile

    for name in selection.weights:
        file, head = source.files[name], b""
        for length in _GGUF_PREFIXES:
            head += hub.read(source, file, len(head), length - len(head))
            _write_sparse(folder / name, head, file.size)
            try:
                tensors = GGUFFile(folder / name).tensors
                break
            except G4Error as error:
                if len(head) == file.size or length == _GGUF_PREFIXES[-1] or not head.startswith(b"GGUF"):
                    raise _renamed(error, folder, source) from None
        if ROPE_FREQS in tensors:
            # The one tensor whose values are checked; it has a kilobyte.
            place = tensors[ROPE_FREQS]
            with open(folder / name, "r+b") as skeleton:
                skeleton.seek(place.offset)
                skeleton.write(hub.read(source, file, place.offset, place.nbytes))
    try:
        return _inspect_gguf(folder / selection.weights[0])
    except G4Error as error:
        raise _renamed(error, folder, source) from None


def _inspect_gguf(path: Path) -> Contents:
    from gguf.constants import GGMLQuantizationType

    from gemma4cli.quant.gguf.blocks import SUPPORTED_TYPES
    from gemma4cli.quant.gguf.keymap import match_tensors
    from gemma4cli.quant.gguf.metadata import read_config
    from gemma4cli.quant.gguf.reader import open_gguf
    from gemma4cli.quant.gguf.tokenizer import read_vocabulary

    gguf = open_gguf([path])
    architecture = gguf.metadata.get("general.architecture")
    types = Counter(tensor.type for tensor in gguf.tensors.values())
    if architecture != "gemma4":
        raise G4Error(
            f"{path} is a model of architecture {architecture!r}; g4 runs gemma4.",
            hint="g4 pull 31b-gguf gets one that fits.",
        )
    unusable = sorted(kind.name for kind in types if kind not in SUPPORTED_TYPES)
    if unusable:
        raise G4Error(
            f"{path} holds tensors of type {', '.join(unusable)}, which g4 cannot convert.",
            hint="Take another quantization, e.g. Q4_K_M.",
        )
    document = read_config(gguf, read_vocabulary(gguf))
    try:
        config = Gemma4Config.from_json(document)
    except G4Error as error:
        raise G4Error(f"{path}: {error.message}", hint=error.hint) from None
    match_tensors(gguf, config)
    nbytes = Counter({kind.name: 0 for kind in types})
    for tensor in gguf.tensors.values():
        nbytes[tensor.type.name] += tensor.nbytes
    gguf.close()
    precision = ", ".join(f"{name} ({types[GGMLQuantizationType[name]]})" for name, _ in nbytes.most_common())
    return Contents("gguf", precision, types.total())
