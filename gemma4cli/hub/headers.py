"""Recognize a model, and refuse what g4 cannot use, from the first bytes of its files.

A model on a hub is looked at through a skeleton: its configuration and file headers, fetched by range request into
files of the right size that are otherwise holes. The same checks then serve models on this machine and those not yet
here.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json
from gemma4cli.hub.client import Hub, RemoteFile, Repository
from gemma4cli.hub.selection import CONFIG, INDEX, SINGLE, Selection, text_shards
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.names import (
    FLOAT_TYPES,
    LM_HEAD,
    check_shapes,
    expected_shapes,
    is_text,
    our_name,
    some,
)
from gemma4cli.quant.torchao_format import (
    MAX_HEADER_BYTES,
    Description,
    canonical_name,
    describe,
    has_torchao_metadata,
    read_header,
)

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
    if len(head) < end <= min(MAX_HEADER_BYTES, file.size):
        head += hub.read(source, file, len(head), end - len(head))
    return head


def _inspect_folder(folder: Path) -> Contents:
    config = Gemma4Config.from_dir(folder)
    entries: dict[str, Any] = {}
    described: dict[str, Description] = {}
    for shard in _shards(folder):
        tensors, metadata = read_header(shard)
        entries |= {key: tensor for key, tensor in tensors.items() if is_text(key)}
        if has_torchao_metadata(metadata):
            described |= {name: d for name, d in describe(metadata, shard).items() if is_text(name)}
    if any(description.is_quantized for description in described.values()):
        return _inspect_torchao(folder, config, entries, described)
    types = Counter(tensor["dtype"] for tensor in entries.values())
    unusable = sorted(set(types) - set(FLOAT_TYPES))
    if unusable or not types:
        raise G4Error(
            f"{folder} holds {'tensors of type ' + ', '.join(unusable) if unusable else 'no text tensors'}, which g4 "
            "cannot quantize.",
            hint="Take the original checkpoint in bfloat16 (g4 pull 31b) or a GGUF (g4 pull 31b-gguf).",
        )
    _check_shapes(folder, config, {our_name(key): tuple(tensor["shape"]) for key, tensor in entries.items()})
    names = Counter({FLOAT_TYPES[dtype]: count for dtype, count in types.items()})
    return Contents("safetensors", _counted(names), sum(types.values()))


def _inspect_torchao(
    folder: Path, config: Gemma4Config, entries: dict[str, Any], described: dict[str, Description]
) -> Contents:
    lacking = [key for d in described.values() for key in d.keys.values() if key not in entries]
    if lacking:
        raise G4Error(f"{folder} lacks {some(lacking)}, which its metadata list.", hint="Fetch it again.")
    shapes = {
        canonical_name(name): description.shape(tuple(entries[description.main_key]["shape"]))
        for name, description in described.items()
    }
    _check_shapes(folder, config, shapes)
    kinds = Counter(f"int{description.bits}" for description in described.values() if description.is_quantized)
    return Contents("torchao", _counted(kinds), len(described))


def _check_shapes(folder: Path, config: Gemma4Config, found: dict[str, tuple[int, ...]]) -> None:
    check_shapes(expected_shapes(config, untied=LM_HEAD in found), found, where=str(folder))


def _counted(types: Counter[str]) -> str:
    if len(types) == 1:
        return next(iter(types))
    return ", ".join(f"{name} ({count})" for name, count in types.most_common())


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    names, _ = text_shards(str(folder), read_json(folder / INDEX))
    return [folder / name for name in names]


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
