"""Weights in: read a Hugging Face safetensors checkpoint tensor by tensor and fill a model on the meta device.

A checkpoint is refused as a whole, before any weight is read, when a file is damaged or a shard, tensor or shape does
not agree with `config.json`. What nothing here can see is a flipped bit inside a weight's data that leaves a finite
number: only the hashes of a manifest find that (`g4 pull` writes and checks them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gemma4cli.errors import G4Error
from gemma4cli.files import read_json
from gemma4cli.model.attention import Attend, attend
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.names import LM_HEAD, OTHER_MODALITIES, check_shapes, expected_shapes, is_text, our_name, some
from gemma4cli.model.safetensors_map import MappedTensor, read_safetensors_header
from gemma4cli.progress import SILENT, Progress

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DAMAGED_HINT = "The file is damaged or incomplete; fetch it again: g4 pull"


class CheckpointReader(Protocol):
    """Weights of one model, whatever file they come from; names are ours, tensors plain or torchao's."""

    @property
    def config(self) -> Gemma4Config: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""

    def names(self) -> list[str]:
        """Every tensor's name, in the order in which `stream` gives them."""

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Read every tensor once; none is kept here after the next one was asked for."""


class SafetensorsReader:
    """A plain checkpoint folder: `config.json` and one `model.safetensors`, or shards with an index."""

    def __init__(self, path: Path, progress: Progress = SILENT) -> None:
        """Validate the whole checkpoint's structure; reads headers only.

        Raises: G4Error naming the file, tensor, shape or key that is wrong.
        """
        if not path.is_dir():
            raise G4Error(f"{path} is not a folder with a checkpoint.", hint="Fetch a model first: g4 pull")
        self.config = Gemma4Config.from_dir(path)
        found: dict[str, MappedTensor] = {}
        skipped: set[str] = set()
        for file, keys in weight_files(path).items():
            for key, entry in _read_plain_header(file, keys).items():
                if not is_text(key):
                    skipped.add(next(prefix for prefix in OTHER_MODALITIES if key.startswith(prefix)))
                    continue
                name = our_name(key)
                if name in found:
                    raise G4Error(f"{path}: {name} is there twice, in {found[name].file.name} and {file.name}.")
                found[name] = entry
        if skipped:
            progress.note(f"Skipping {', '.join(sorted(skipped))}*: only the text model is used.")
        expected = expected_shapes(self.config, untied=LM_HEAD in found)
        check_shapes(expected, {name: entry.shape for name, entry in found.items()}, where=str(path))
        self._entries = {name: found[name] for name in expected}

    @property
    def nbytes(self) -> int:
        """Bytes of the text model's tensors in the files."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the text model."""
        return sorted({entry.file for entry in self._entries.values()})

    def names(self) -> list[str]:
        """Every tensor's name, in the order in which the model uses them."""
        return list(self._entries)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in, without reading it."""
        return _DTYPES[self._entries[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """Map one tensor from its file, in the dtype it is stored in.

        Raises: G4Error when it holds a NaN or an infinity.
        """
        entry = self._entries[name]
        # Mapped anew each time: pages of a mapping count as our memory until it is closed.
        tensor = entry.map()
        check_finite(name, tensor, where=entry.file)
        return tensor

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for every tensor."""
        for name in self._entries:
            yield name, self.tensor(name)


def build_model(
    reader: CheckpointReader,
    cache: CacheSpec,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    attend: Attend = attend,
    prepare: Callable[[str, Tensor], Tensor] | None = None,
    progress: Progress = SILENT,
) -> Gemma4:
    """Stream a checkpoint into a model, one tensor at a time.

    Args:
        reader: any checkpoint. A separate `lm_head.weight` in it unties the head, whatever the config says.
        dtype: of activations and of plain weights. torchao tensors stay as they are unless `prepare` changes them.
        device: where weights, caches and buffers go.
        prepare: changes a tensor for a backend (a torchao tensor's class or layout) before it moves to the device.
    Raises: G4Error naming an unmatched, missing or misshaped tensor.
    """
    with torch.device("meta"):
        model = Gemma4(reader.config, cache, attend)
    expected = expected_shapes(reader.config, untied=LM_HEAD in reader.names())
    check_shapes(expected, dict.fromkeys(reader.names()), where="the checkpoint")
    with progress.phase("load weights", reader.nbytes) as task:
        for name, tensor in reader.stream():
            check_shapes({name: expected[name]}, {name: tuple(tensor.shape)}, where="the checkpoint")
            task.advance(_stored_bytes(tensor), name)
            prepared = tensor if prepare is None else prepare(name, tensor)
            is_plain = type(prepared) is Tensor
            _assign(model, name, prepared.to(device, dtype) if is_plain else prepared.to(device))
    if LM_HEAD not in expected:
        model.tie_lm_head()
    _place_buffers(model, torch.device(device))
    return model.eval().requires_grad_(False)


def check_finite(name: str, tensor: Tensor, *, where: Path) -> None:
    """Refuse a weight with a NaN or an infinity: one of them turns every answer into noise."""
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise G4Error(f"{where}: {name} holds a value that is not a finite number.", hint=_DAMAGED_HINT)


def weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Return each weight file with the keys that the index expects in it, None when there is no index.

    Raises: G4Error when there are no weights, two kinds of them, or the index names a file that is not there.
    """
    single, index = path / WEIGHTS_FILE, path / INDEX_FILE
    if single.exists() and index.exists():
        raise G4Error(f"{path} has both {WEIGHTS_FILE} and {INDEX_FILE}.", hint="Remove the one that is a leftover.")
    if single.exists():
        return {single: None}
    if not index.exists():
        raise G4Error(f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}.", hint="Fetch the model: g4 pull")
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise G4Error(f"{index} has no weight_map.", hint=_DAMAGED_HINT)
    files: dict[Path, set[str] | None] = {}
    for key, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise G4Error(f"{index} places {key} in {file!r}, which is not a file of this folder.")
        if not (path / file).is_file():
            if not is_text(key):
                continue  # `g4 pull` leaves out shards that hold nothing else
            raise G4Error(f"{path / file} does not exist, but {INDEX_FILE} places {key} in it.", hint=_DAMAGED_HINT)
        files.setdefault(path / file, set()).add(key)
    return files


def read_weight_header(file: Path, keys: set[str] | None) -> tuple[dict[str, MappedTensor], dict[str, str]]:
    """Return a weight file's tensors by key, and its metadata; `keys` is what the index expects in it, if there is one.

    The library checks the header's length, its JSON and that the data cover the file exactly.

    Raises: G4Error when the file is damaged or disagrees with the index.
    """
    try:
        entries, metadata = read_safetensors_header(file)
    except SafetensorError as error:
        raise G4Error(f"{file} is not a whole safetensors file: {error}.", hint=_DAMAGED_HINT) from None
    if keys is not None and keys != set(entries):
        lacking, extra = sorted(keys - set(entries)), sorted(set(entries) - keys)
        what = f"lacks {some(lacking)}" if lacking else f"also has {some(extra)}"
        raise G4Error(f"{file} does not agree with {INDEX_FILE}: it {what}.", hint=_DAMAGED_HINT)
    return entries, metadata


def _read_plain_header(file: Path, keys: set[str] | None) -> dict[str, MappedTensor]:
    entries, _ = read_weight_header(file, keys)
    for key, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise G4Error(f"{file}: {key} has dtype {entry.dtype}; a plain checkpoint has {', '.join(_DTYPES)}.")
    return entries


def _stored_bytes(tensor: Tensor) -> int:
    """Return a tensor's bytes in memory: of codes, scales and zero points for one of torchao's."""
    if type(tensor) is Tensor:
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, part).nbytes for part in parts)


def _assign(model: Gemma4, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the meta tensor called `name`, as what that one is: parameter or buffer."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner.register_buffer(leaf, tensor)
    else:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def _place_buffers(model: Gemma4, device: torch.device) -> None:
    """Allocate the caches and move what the model computed itself to the device."""
    for cache in model.kv_caches():
        cache.k = torch.zeros_like(cache.k, device=device)
        cache.v = torch.zeros_like(cache.v, device=device)
    model.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale.to(device)
    for rotary in model.model.rotary_emb.values():
        rotary.inv_freq = rotary.inv_freq.to(device)
