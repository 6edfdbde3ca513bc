"""`g4.json` of a quantized checkpoint: where it came from, how each tensor was quantized, what every file must be.

The manifest holds no absolute path and no time, so the same input gives the same bytes. It is also the journal of a
run: while a checkpoint is being written, it lists the shards that are finished.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from gemma4cli.errors import G4Error
from gemma4cli.files import crc32_file, read_json, sha256_file
from gemma4cli.progress import SILENT, Progress

MANIFEST_FILE = "g4.json"
FORMAT = "g4-checkpoint"
VERSION = 1

GGUF_RECIPE = "gguf"
"""The name of a recipe that says what a GGUF file held; it has `file_type`, `types` and `weights`."""

R = TypeVar("R")

_HEX64 = re.compile(r"[0-9a-f]{64}")
_HUB_FOLDER = re.compile(r"models--(.+)")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be. `sha256` is None for a source that was not read as a whole only to be hashed (GGUF)."""

    bytes: int
    sha256: str | None

    @property
    def checksum(self) -> str:
        """What the contents are compared by."""
        return "SHA-256"

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        """Hash a file."""
        return cls(file.stat().st_size, sha256_file(file))

    def matches(self, file: Path, progress: Progress = SILENT) -> bool:
        """Tell whether a file of this size has these contents."""
        return sha256_file(file, progress) == self.sha256


@dataclass(frozen=True)
class FastFileRecord(FileRecord):
    """A file that is written as fast as the disk takes it, where SHA-256 would take longer than everything else.

    CRC-32 finds damage too. Against intent neither helps: whoever changes a shard can change its record.
    """

    crc32: str

    @property
    def checksum(self) -> str:
        """What the contents are compared by."""
        return "CRC-32"

    def matches(self, file: Path, progress: Progress = SILENT) -> bool:
        """Tell whether a file of this size has these contents."""
        return crc32_file(file, progress) == self.crc32


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from. `kind` is "safetensors" or "gguf"; `revision` is a commit on the Hub, if known."""

    kind: str
    name: str
    revision: str | None
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class TensorRecord:
    """How one tensor is stored and what that cost.

    `format` is "int4", "int8", … or a plain dtype; `method` says how it got there ("min-max", "hqq", "keep", or a GGUF
    type). The error is |stored - original| / |original| over the whole tensor, None when the original is not known;
    `snr_db` is the same in decibels, None when there is no error at all.
    """

    format: str
    shape: tuple[int, ...]
    bits_per_weight: float
    group_size: int | None
    method: str
    relative_error: float | None
    snr_db: float | None


@dataclass(frozen=True)
class Totals:
    """`bits_per_weight` divides all stored bits by the model's own parameter count, a tied embedding counted once."""

    parameters: int
    source_bytes: int
    weight_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class ManifestHead:
    """What is known before the first tensor is written; a run may continue another one only if all of it is equal."""

    created_with: dict[str, str]
    source: SourceRecord
    recipe: dict[str, Any]
    totals: Totals


@dataclass(frozen=True)
class CheckpointManifest:
    """The whole document. `tensors` and `files` are keyed by name, in the order of the checkpoint."""

    head: ManifestHead
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "created_with": self.head.created_with,
            "source": asdict(self.head.source),
            "recipe": self.head.recipe,
            "totals": asdict(self.head.totals),
            "tensors": {name: {**asdict(t), "shape": list(t.shape)} for name, t in self.tensors.items()},
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, document: object, where: str) -> CheckpointManifest:
        """Read a parsed manifest; `where` names the file in messages."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else None
            raise G4Error(
                f"{where} has format {found!r}; a quantized checkpoint's is {FORMAT!r}.",
                hint="A bundle is run without --model: g4 run BUNDLE" if found == "g4-bundle" else None,
            )
        if document.get("version") != VERSION:
            raise G4Error(
                f"{where} has version {document.get('version')!r}; this g4 reads version {VERSION}.",
                hint="Use the g4 that wrote it, or quantize again.",
            )
        try:
            source = document["source"]
            head = ManifestHead(
                dict(document["created_with"]),
                _record(SourceRecord, {**source, "files": _records(FileRecord, source["files"])}),
                document["recipe"],
                _record(Totals, document["totals"]),
            )
            tensors = {name: {**t, "shape": tuple(t["shape"])} for name, t in document["tensors"].items()}
            return cls(head, _records(TensorRecord, tensors), _file_records(document["files"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise G4Error(f"{where} is damaged: {error}.", hint="Quantize again, or copy the folder again.") from None

    @classmethod
    def read(cls, folder: Path) -> CheckpointManifest:
        """Read `g4.json` of a folder."""
        path = folder / MANIFEST_FILE
        return cls.from_json(read_json(path), str(path))


def recipe_name(recipe: Mapping[str, Any] | None) -> str | None:
    """Return what people call it: a recipe of ours by its name, a GGUF file's mix by its type (Q4_K_M)."""
    if recipe is None or recipe["name"] != GGUF_RECIPE:
        return recipe and recipe["name"]
    return recipe.get("file_type") or GGUF_RECIPE


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """Return one line: "default: 4 bits …", or for a GGUF file "GGUF Q4_K_M: Q4_K 81.0 % of weights, Q6_K 19.0 %"."""
    if recipe["name"] != GGUF_RECIPE:
        return f"{recipe['name']}: {recipe['description']}"
    weights: Mapping[str, int] = recipe.get("weights", {})  # manifests of earlier versions have none
    total = sum(weights.values())
    # A type below 0.1 % is that of norms and the like.
    parts = sorted(((count / total, kind) for kind, count in weights.items()), reverse=True)
    mix = ", ".join(f"{kind} {share:.1%}".replace("%", " %") for share, kind in parts if share >= 0.001)
    label = " ".join(filter(None, ("GGUF", recipe.get("file_type"))))
    return f"{label}: {mix or ', '.join(recipe['types'])}"


def identify_source(
    kind: str, path: Path, files: list[Path], progress: Progress = SILENT, *, known_hashes_only: bool = False
) -> SourceRecord:
    """Name and hash what is about to be quantized: a folder, or a GGUF file.

    In a Hugging Face cache (`models--OWNER--NAME/snapshots/COMMIT/`) name, commit and hashes are read off the layout:
    large files there are links to blobs named by their SHA-256.
    """
    name, revision = path.resolve().name, None
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "snapshots" and (hub := _HUB_FOLDER.fullmatch(folder.parent.parent.name)):
        name, revision = hub[1].replace("--", "/"), folder.name
    records = {}
    for file in sorted(files):
        sha256 = _known_sha256(file)
        if sha256 is None and not known_hashes_only:
            sha256 = sha256_file(file, progress)
        records[file.name] = FileRecord(file.stat().st_size, sha256)
    return SourceRecord(kind, name, revision, records)


def _known_sha256(file: Path) -> str | None:
    blob = file.resolve()
    known = file.is_symlink() and blob.parent.name == "blobs" and _HEX64.fullmatch(blob.name)
    return blob.name if known else None


def _file_records(sections: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {
        name: _record(FastFileRecord if "crc32" in section else FileRecord, section)
        for name, section in sections.items()
    }


def _records(kind: type[R], sections: Mapping[str, Any]) -> dict[str, R]:
    return {name: _record(kind, section) for name, section in sections.items()}


def _record(kind: type[R], section: Mapping[str, Any]) -> R:
    """Build a record from exactly its own keys, each of its own type."""
    record = kind(**section)
    for name, expected in get_type_hints(kind).items():
        value = getattr(record, name)
        base = getattr(expected, "__origin__", expected)
        if not isinstance(value, base) and not (base is float and isinstance(value, int)):
            raise ValueError(f"{name} is {value!r}")
    return record
