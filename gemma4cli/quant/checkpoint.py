"""Every kind of checkpoint behind one door, and the one writer of quantized ones.

A quantized checkpoint is a folder: `model-00001-of-000NN.safetensors` shards of torchao tensors with
`model.safetensors.index.json`, the model's own `config.json`, tokenizer, chat template and generation config byte for
byte, and the `g4.json` manifest.

What is checked when one is opened: the manifest and its version, every file's presence and size, the SHA-256 of
everything but the shards, the shards' headers and the list of tensors against the config. The shards' own checksums
(SHA-256, or CRC-32 when converted from GGUF) are compared when all of them together are below 1 GiB, or when the caller
asks (`verify=True`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.files import (
    atomic_directory,
    empty_directory,
    require_free_space,
    write_json,
)
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.weights import CheckpointReader, SafetensorsReader
from gemma4cli.progress import SILENT, Progress, Task
from gemma4cli.quant.manifest import MANIFEST_FILE, CheckpointManifest, FileRecord, ManifestHead, TensorRecord
from gemma4cli.quant.shards import ShardPlan, ShardWriter, explained, plan_shards, shard_index
from gemma4cli.quant.stored import StoredCheckpoint, check_stored, read_stored
from gemma4cli.quant.torchao_checkpoint import TorchaoCheckpoint
from gemma4cli.quant.torchao_format import is_quantized_folder

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
ALWAYS_VERIFIED_BYTES = 1 << 30

_GGUF_MAGIC = b"GGUF"
_AGAIN = "Quantize again, or copy the folder again."


class Checkpoint(CheckpointReader, Protocol):
    """What quantizing and exporting need of a checkpoint beyond its tensors."""

    is_quantized: bool
    manifest: CheckpointManifest | None


def open_checkpoint(path: Path, progress: Progress = SILENT, *, verify: bool = False) -> Checkpoint:
    """Open a plain Hugging Face folder, a quantized checkpoint, or a folder that another program wrote with torchao.

    Args:
        verify: compare the checksums of a quantized checkpoint's shards whatever their size.

    Raises: G4Error when there is nothing, something else, or something damaged at `path`.
    """
    if not path.exists():
        raise G4Error(f"{path} does not exist.", hint="Check the path, or get a model with g4 pull.")
    if path.is_file():
        if _starts_with(path, _GGUF_MAGIC):
            raise G4Error(f"{path} is a GGUF file.", hint=f"Convert it first: g4 convert-gguf {path}")
        raise G4Error(f"{path} is a file; a checkpoint is a folder.", hint=f"Try {path.parent}.")
    if (path / MANIFEST_FILE).exists():
        checkpoint = QuantizedCheckpoint(path, progress, verify=verify)
        if any(record.group_size for record in checkpoint.manifest.tensors.values()):
            return checkpoint
        # Converted from a GGUF file of floats: as good a source for quantizing as any plain folder.
    elif is_quantized_folder(path):
        return TorchaoCheckpoint(path)
    return PlainCheckpoint(path, progress)


class PlainCheckpoint(SafetensorsReader):
    """A Hugging Face folder as it was published."""

    is_quantized = False
    manifest = None


class QuantizedCheckpoint(StoredCheckpoint):
    """A folder that `write_checkpoint` wrote, validated on opening."""

    def __init__(self, path: Path, progress: Progress = SILENT, *, verify: bool = False) -> None:
        self.path = path
        self.manifest = CheckpointManifest.read(path)
        self.config = Gemma4Config.from_dir(path)
        shards = [name for name in self.manifest.files if name.endswith(".safetensors")]
        total = sum(self.manifest.files[name].bytes for name in shards)
        _check_files(path, self.manifest.files, shards, verify or total < ALWAYS_VERIFIED_BYTES, progress)
        self._stored = read_stored({path / shard: None for shard in shards})
        if names := set(self.manifest.tensors) ^ set(self._stored):
            raise G4Error(f"{path} and its {MANIFEST_FILE} disagree about {min(names)}.", hint=_AGAIN)
        check_stored(path, self.config, self._stored)

    @property
    def nbytes(self) -> int:
        return self.manifest.head.totals.weight_bytes


def _check_files(
    path: Path, files: Mapping[str, FileRecord], shards: list[str], verify_shards: bool, progress: Progress
) -> None:
    for name, record in files.items():
        file = path / name
        if Path(name).name != name:
            raise G4Error(f"{path / MANIFEST_FILE} names {name!r}, which is not a file of its folder.", hint=_AGAIN)
        if not file.is_file():
            raise G4Error(f"{file} is missing.", hint=_AGAIN)
        size = file.stat().st_size
        if size != record.bytes:
            raise G4Error(
                f"{file} has {size:,} bytes instead of {record.bytes:,}: it is incomplete or damaged.", hint=_AGAIN
            )
        if (name not in shards or verify_shards) and not record.matches(file, progress):
            raise G4Error(f"{file} is damaged: its {record.checksum} is not the one in {MANIFEST_FILE}.", hint=_AGAIN)


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


@dataclass(frozen=True)
class CheckpointPlan:
    """The files of a quantized checkpoint before any is written.

    Args:
        layout: canonical name -> tensor on the meta device with the shapes, dtypes and class to be stored.
        assets: file name -> bytes, or the file to copy.
    """

    layout: Mapping[str, Tensor]
    assets: Mapping[str, bytes | Path]
    shard_bytes: int = SHARD_BYTES
    shards: list[ShardPlan] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", plan_shards(self.layout, self.shard_bytes))

    @property
    def files(self) -> dict[str, int]:
        """The size of every file but the manifest, whose size depends on the errors measured."""
        files = {shard.file: shard.nbytes for shard in self.shards} | {INDEX_FILE: len(self.index)}
        return files | {name: _asset_bytes(asset) for name, asset in sorted(self.assets.items())}

    @property
    def weight_bytes(self) -> int:
        """The size of all tensors as stored."""
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def index(self) -> bytes:
        return (json.dumps(shard_index(self.shards), indent=2, ensure_ascii=False) + "\n").encode()


Produce = Callable[[str, ShardWriter, Task], TensorRecord]
"""Makes the tensor of a name and puts it into the shard; advances the task by its stored bytes on the way."""


def write_checkpoint(
    target: Path,
    plan: CheckpointPlan,
    head: ManifestHead,
    produce: Produce,
    *,
    force: bool = False,
    progress: Progress = SILENT,
    label: str = "quantize",
    fast: bool = False,
    at_once: int = 1,
) -> CheckpointManifest:
    """Write a quantized checkpoint; nothing is at `target` before all of it is there.

    Args:
        produce: called for one tensor after the other, so that memory holds one.
        fast: as for ``ShardWriter``.
        at_once: how many tensors may be worked on at a time, each in a thread of its own when more than one.

    A run that was killed leaves its finished shards in `.<name>.partial`, listed in a manifest; the next run with the
    same source, recipe and library versions keeps them, and any other run starts over and says so.

    Raises: G4Error when `target` exists, when the disk is too small or becomes full, when another g4 is at it.
    """
    with atomic_directory(target, force=force, resume=True) as folder:
        finished = _finished_shards(folder, plan, head, progress)
        pending = [shard for shard in plan.shards if shard.file not in finished.files]
        require_space(target, plan)
        book = _Book(folder, plan, finished)
        # Making a shard durable and hashing it takes as long as writing it; the next ones are written meanwhile.
        with (
            progress.phase(label, sum(shard.data_bytes for shard in pending)) as task,
            ThreadPoolExecutor(2) as clerks,
        ):
            entries = []
            for shard in pending:
                writer = ShardWriter(folder, shard, fast=fast)
                records = _fill(writer, lambda name, writer=writer: produce(name, writer, task), shard.tensors, at_once)
                entries.append(clerks.submit(book.enter, writer, shard, records))
            for entry in entries:
                entry.result()
        return _write_rest(folder, plan, book.manifest)


class _Book:
    """The manifest on disk of a run that is under way."""

    def __init__(self, folder: Path, plan: CheckpointPlan, manifest: CheckpointManifest) -> None:
        self.manifest = manifest
        self._folder, self._plan = folder, plan
        self._lock = Lock()

    def enter(self, writer: ShardWriter, shard: ShardPlan, records: Mapping[str, TensorRecord]) -> None:
        """Finish a shard and add it; from then on a later run keeps it."""
        with writer:
            record = writer.finish()
        with self._lock, explained(self._folder / MANIFEST_FILE):
            self.manifest = _with_shard(self._plan, self.manifest, shard.file, record, records)
            write_json(self._folder / MANIFEST_FILE, self.manifest.to_json())


def require_space(target: Path, plan: CheckpointPlan) -> None:
    """Refuse when the disk lacks room for what an earlier run has not written yet.

    Cheap, so that a command can ask before it hashes a large source.
    """
    partial = target.with_name(f".{target.name}.partial")
    there = sum((partial / shard.file).stat().st_size for shard in plan.shards if (partial / shard.file).is_file())
    # The manifest and its next version, at about 300 bytes for each tensor.
    manifest = 2 * (len(plan.layout) * 400 + 16_384)
    require_free_space(target.parent, sum(plan.files.values()) + manifest - there, f"The checkpoint {target.name}")


def _fill(
    writer: ShardWriter, produce: Callable[[str], TensorRecord], names: Collection[str], at_once: int
) -> dict[str, TensorRecord]:
    """Produce a shard's tensors; the writer is left to be finished, and closed only when something fails."""
    try:
        if at_once == 1:
            return {name: produce(name) for name in names}
        with ThreadPoolExecutor(at_once) as makers:
            return dict(zip(names, makers.map(produce, names), strict=True))
    except BaseException:
        writer.close()
        raise


def _with_shard(
    plan: CheckpointPlan,
    manifest: CheckpointManifest,
    file: str,
    record: FileRecord,
    records: Mapping[str, TensorRecord],
) -> CheckpointManifest:
    """Add a finished shard, keeping the order of the plan whatever was finished first."""
    tensors = {**manifest.tensors, **records}
    files = {**manifest.files, file: record}
    return replace(
        manifest,
        tensors={name: tensors[name] for name in plan.layout if name in tensors},
        files={shard.file: files[shard.file] for shard in plan.shards if shard.file in files},
    )


def _write_rest(folder: Path, plan: CheckpointPlan, manifest: CheckpointManifest) -> CheckpointManifest:
    """Write index, assets and the final manifest, and remove what does not belong to the checkpoint."""
    contents = {INDEX_FILE: plan.index, **dict(sorted(plan.assets.items()))}
    files = dict(manifest.files)
    for name, content in contents.items():
        with explained(folder / name):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        files[name] = FileRecord.of(folder / name)
    manifest = replace(manifest, files=files)
    with explained(folder / MANIFEST_FILE):
        write_json(folder / MANIFEST_FILE, manifest.to_json())
    for path in folder.iterdir():
        if path.name not in files and path.name != MANIFEST_FILE:
            path.unlink()
    return manifest


def _finished_shards(folder: Path, plan: CheckpointPlan, head: ManifestHead, progress: Progress) -> CheckpointManifest:
    """Return the manifest of an earlier run reduced to the shards that this run would write just so."""
    empty = CheckpointManifest(head)
    if not any(folder.iterdir()):
        return empty
    try:
        earlier = CheckpointManifest.read(folder)
    except G4Error:
        earlier = None
    if earlier is None or _as_stored(earlier.head) != _as_stored(head):
        if earlier is not None:
            progress.note("An unfinished checkpoint of another source, recipe or version was there; starting over.")
        empty_directory(folder)
        return empty
    whole = [shard for shard in plan.shards if _is_whole(folder, shard, earlier, progress)]
    if whole:
        progress.note(f"Continuing: {len(whole)} of {len(plan.shards)} shards are finished.")
    names = {name for shard in whole for name in shard.tensors}
    return CheckpointManifest(
        head,
        {name: earlier.tensors[name] for name in plan.layout if name in names},
        {shard.file: earlier.files[shard.file] for shard in whole},
    )


def _as_stored(head: ManifestHead) -> str:
    return json.dumps(CheckpointManifest(head).to_json())


def _is_whole(folder: Path, shard: ShardPlan, earlier: CheckpointManifest, progress: Progress) -> bool:
    """Tell whether a shard on disk is the planned one, complete and undamaged."""
    path, record = folder / shard.file, earlier.files.get(shard.file)
    if record is None or not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    if not set(shard.tensors) <= set(earlier.tensors) or not _starts_with(path, shard.header):
        return False
    return record.matches(path, progress)


def _asset_bytes(asset: bytes | Path) -> int:
    return len(asset) if isinstance(asset, bytes) else asset.stat().st_size
