"""Tensors of safetensors files in torchao's format, checked from the headers and read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.names import FLOAT_TYPES, LM_HEAD, check_shapes, expected_shapes, is_text
from gemma4cli.model.safetensors_map import MappedTensor
from gemma4cli.model.weights import check_finite, read_weight_header
from gemma4cli.quant.gguf import tensors as _gguf_tensors  # noqa: F401 - lets torchao rebuild its classes
from gemma4cli.quant.torchao_format import Description, canonical_name, describe
from gemma4cli.quant.torchao_types import unflatten_tensor_state_dict

_FLOATS = tuple(FLOAT_TYPES)
_HINT = "Fetch the checkpoint again, or copy the folder again."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its parts by key, and torchao's description of how they make it."""

    description: Description
    parts: Mapping[str, MappedTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.description.shape(self.parts[self.description.main_key].shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def part(self, name: str) -> MappedTensor:
        """Return one part, e.g. "scale"; "" is a plain tensor itself."""
        return self.parts[self.description.keys[name]]

    @property
    def file(self) -> Path:
        return self.parts[self.description.main_key].file

    def load(self) -> Tensor:
        """Let torchao rebuild the tensor on the mapped parts.

        Raises: G4Error when a scale, a zero point or a plain weight is not a finite number, or a code has more bits
        than it should.
        """
        name, pieces = self.description.name, {key: part.map() for key, part in self.parts.items()}
        for key, piece in pieces.items():
            if piece.is_floating_point():
                check_finite(key, piece, where=self.file)
        if self.description.is_quantized and self.description.bits < 8:
            self._check_codes(pieces[self.description.main_key])
        metadata = {name: self.description.text, "tensor_names": json.dumps([name])}
        return unflatten_tensor_state_dict(pieces, metadata)[0][name]

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype == torch.uint8:
            return  # two codes of four bits fill a byte
        low, high = (int(bound) for bound in torch.aminmax(codes))
        limit = 1 << (self.description.bits - 1)
        if low < -limit or high >= limit:
            raise G4Error(
                f"{self.file}: {self.description.name} has the code {low if low < -limit else high}, which is not one "
                f"of {self.description.bits} bits.",
                hint=_HINT,
            )


class StoredCheckpoint:
    """Tensors in torchao's format, by our names."""

    is_quantized = True
    _stored: Mapping[str, StoredTensor]

    def names(self) -> list[str]:
        """Every tensor's name, in the order in which the model uses them."""
        return list(self._stored)

    def tensor(self, name: str) -> Tensor:
        """Rebuild one tensor on mappings of its parts.

        Raises: G4Error when it holds a number that is not finite, or a code out of range.
        """
        return self._stored[name].load()

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for every tensor."""
        for name in self._stored:
            yield name, self.tensor(name)


def read_stored(files: Mapping[Path, set[str] | None]) -> dict[str, StoredTensor]:
    """Return the tensors of torchao's files by our names; `files` as `weight_files` gives them."""
    return resolve_tensors((file, *read_weight_header(file, keys)) for file, keys in files.items())


def check_stored(path: Path, config: Gemma4Config, stored: Mapping[str, StoredTensor]) -> None:
    """Compare tensors with the config. A tied lm_head may be stored on its own, quantized unlike the embedding.

    Raises: G4Error naming a tensor that is missing, misshaped or none of the model's.
    """
    expected = expected_shapes(config, untied=LM_HEAD in stored)
    check_shapes(expected, {name: tensor.shape for name, tensor in stored.items()}, where=str(path))


def resolve_tensors(
    files: Iterable[tuple[Path, Mapping[str, MappedTensor], Mapping[str, str]]],
) -> dict[str, StoredTensor]:
    """Return the text model's tensors by our names, from (path, tensors by key, metadata) of each file.

    The parts of one tensor may lie in several files.

    Raises: G4Error naming what is missing, left over, misshaped or of a kind that g4 does not read.
    """
    entries: dict[str, MappedTensor] = {}
    described: dict[str, tuple[Description, Path]] = {}
    for path, tensors, metadata in files:
        for name, description in describe(metadata, path).items():
            described.setdefault(name, (description, path))
        entries |= tensors
    found: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for name, (description, path) in described.items():
        used.update(description.keys.values())
        if not is_text(name):
            continue
        ours = canonical_name(name)
        if ours in found:
            raise G4Error(f"{path}: {ours} is there twice.", hint=_HINT)
        found[ours] = _resolve(description, entries, path)
    if left := sorted(key for key in set(entries) - used if is_text(key)):
        raise G4Error(f"{entries[left[0]].file} has a tensor {left[0]} that its metadata do not describe.", hint=_HINT)
    return found


def _resolve(description: Description, entries: Mapping[str, MappedTensor], path: Path) -> StoredTensor:
    for key in description.keys.values():
        if key not in entries:
            raise G4Error(f"{path} lacks {key}, a part of {description.name}.", hint=_HINT)
    parts = {part: entries[key] for part, key in description.keys.items()}
    stored = StoredTensor(description, {key: entries[key] for key in description.keys.values()})
    if description.is_quantized:
        _check_quantized(stored, parts, path)
    elif parts[""].dtype not in _FLOATS:
        raise G4Error(
            f"{path}: {description.name} has dtype {parts[''].dtype}; a plain tensor has {', '.join(_FLOATS)}.",
            hint=_HINT,
        )
    return stored


def _check_quantized(stored: StoredTensor, parts: Mapping[str, MappedTensor], path: Path) -> None:
    """Compare every part's shape and dtype with the tensor's shape and group size."""
    description, shape = stored.description, stored.shape
    group = description.group_size
    if len(shape) != 2 or shape[1] % group:
        raise G4Error(
            f"{path}: {description.name} of shape {list(shape)} does not divide into groups of {group}.", hint=_HINT
        )
    rows, groups = shape[0], shape[1] // group
    per_group = (groups, rows) if description.is_packed else (rows, groups)
    blocks = parts["step"].shape[1] if "step" in parts and len(parts["step"].shape) > 1 else 1
    fitting: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]] = {
        "qdata": ((parts["qdata"].shape,), ("U8",) if description.is_packed else ("I8",)),
        "scale": ((per_group,), _FLOATS),
        "zero_point": ((per_group,), _FLOATS if description.is_packed else (*_FLOATS, "I8")),
        "sub": (((rows, groups), (rows, groups, 2)), ("I8",)),
        "step": (((rows, blocks), (rows, blocks, 2)) if blocks and groups % blocks == 0 else (), ("F16",)),
    }
    for part, entry in parts.items():
        shapes, dtypes = fitting[part]
        if entry.shape not in shapes or entry.dtype not in dtypes:
            raise G4Error(
                f"{path}: {description.keys[part]} of shape {list(entry.shape)} and dtype {entry.dtype} does not fit "
                f"{description.name} of shape {list(shape)} in groups of {group}.",
                hint=_HINT,
            )
