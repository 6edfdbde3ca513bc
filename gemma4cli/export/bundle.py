"""The bundle: a folder with everything that runs a model, and `g4.json`, which says what it is and what it must hold.

    model.pte             the program: `prefill` and `decode`, see contract.py; for several GPU architectures one each,
                          model.sm_80.pte and so on
    *.ptd                 weights
    config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja
    g4.json               this module's manifest
    receipt.json          measured quality, if it was: see receipt.py; not in the manifest

The manifest holds no time and no absolute path: the same checkpoint and settings give the same bytes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.export.contract import Contract
from gemma4cli.files import format_bytes, read_json, sha256_file, write_json
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.manifest import FileRecord

MANIFEST_FILE = "g4.json"
PROGRAM_FILE = "model.pte"
FORMAT = "g4-bundle"
VERSION = 1
REQUIRED_ASSETS = ("config.json", "generation_config.json", "tokenizer.json")
OPTIONAL_ASSETS = ("chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json")

ALWAYS_VERIFIED_BYTES = 256 << 20
"""Files below this size are compared with their SHA-256 whenever a bundle is opened."""


_AGAIN = "Export the model again (g4 export), or copy the folder again."


def program_file(target: str, targets: Sequence[str]) -> str:
    """Name the program of one of a bundle's targets."""
    return PROGRAM_FILE if len(targets) == 1 else f"model.{target}.pte"


@dataclass(frozen=True)
class KVRecord:
    """The caches of one kind of layer ("sliding" or "full")."""

    format: str
    layers: int
    slots: int
    bytes: int


@dataclass(frozen=True)
class ReencodedRecord:
    """A matrix that the backend cannot hold as the checkpoint has it; the error is |after - before| / |before|."""

    stored: str
    becomes: str
    relative_error: float


@dataclass(frozen=True)
class MemoryRecord:
    """What running needs, predicted: bytes of weights as the backend keeps them, caches, and buffers of one step."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True)
class BundleManifest:
    """The document `g4.json`.

    model: the checkpoint's own account of itself: `source`, `recipe` (None when it is not quantized), `totals`.
    targets: what the program runs on: "cpu", or GPU architectures such as "sm_90".
    verified: how the program compared with the uncompiled model on a GPU (export/cuda/verify.py), if it was.
    kv, reencoded, files: keyed by layer kind, tensor name and file name.
    """

    created_with: dict[str, str]
    model: dict[str, Any]
    backend: str
    targets: tuple[str, ...]
    contract: Contract
    kv: dict[str, KVRecord]
    memory: MemoryRecord
    reencoded: dict[str, ReencodedRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    verified: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "created_with": self.created_with,
            "model": self.model,
            "backend": self.backend,
            "targets": list(self.targets),
            "context_length": self.contract.context_length,
            "prefill_chunk": self.contract.prefill_chunk,
            "contract": self.contract.to_json(),
            "kv": {kind: asdict(record) for kind, record in self.kv.items()},
            "memory": asdict(self.memory),
            "reencoded": {name: asdict(record) for name, record in self.reencoded.items()},
            "verified": self.verified,
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, document: Any, where: str) -> BundleManifest:
        """Read a parsed manifest; `where` names the file in messages."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else None
            raise G4Error(
                f"{where} has format {found!r}; a bundle's is {FORMAT!r}.",
                hint="Export it first: g4 export" if found == "g4-checkpoint" else "Is this the right folder?",
            )
        if document.get("version") != VERSION:
            raise G4Error(
                f"{where} has version {document.get('version')!r}; this g4 reads version {VERSION}.",
                hint="Use the g4 that wrote it, or export the model again: g4 export",
            )
        try:
            return cls(
                created_with=dict(document["created_with"]),
                model=dict(document["model"]),
                backend=str(document["backend"]),
                targets=tuple(document["targets"]),
                contract=Contract.from_json(document["contract"]),
                kv=_records(KVRecord, document["kv"]),
                memory=MemoryRecord(**document["memory"]),
                reencoded=_records(ReencodedRecord, document["reencoded"]),
                files=_records(FileRecord, document["files"]),
                verified=document.get("verified"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise G4Error(f"{where} is damaged: {error}.", hint=_AGAIN) from None


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found whole."""

    path: Path
    manifest: BundleManifest

    @property
    def contract(self) -> Contract:
        return self.manifest.contract

    def program_for(self, target: str) -> Path:
        """Return the program for a target such as "cpu" or "sm_90".

        Raises: G4Error naming the targets there are, and the command that makes another.
        """
        targets = self.manifest.targets
        if target not in targets:
            raise G4Error(
                f"{self.path} is for {', '.join(targets)}; this machine needs {target}.",
                hint=f"Export it for this machine: g4 export --target {target}",
            )
        return self.path / program_file(target, targets)

    @property
    def weights(self) -> list[Path]:
        return [self.path / name for name in self.manifest.files if name.endswith(".ptd")]


def open_bundle(path: Path, *, verify: bool = False, progress: Progress = SILENT) -> Bundle:
    """Check that a folder is a whole bundle.

    Every file must be there with its recorded size; the SHA-256 is compared for files below 256 MiB, and for all of
    them with `verify`.

    Raises: G4Error naming what is wrong: no folder, no bundle, an unknown version, a missing or changed file.
    """
    if not path.exists():
        raise G4Error(f"{path} does not exist.", hint="Check the path, or export a model: g4 export")
    if not path.is_dir():
        raise G4Error(f"{path} is a file; a bundle is a folder.", hint=f"Try {path.parent}.")
    if not (path / MANIFEST_FILE).is_file():
        hint = "Export it first: g4 export" if (path / "config.json").is_file() else "Export a model: g4 export"
        raise G4Error(f"{path} is not a bundle: it has no {MANIFEST_FILE}.", hint=hint)
    manifest = BundleManifest.from_json(read_json(path / MANIFEST_FILE), str(path / MANIFEST_FILE))
    for target in manifest.targets:
        if program_file(target, manifest.targets) not in manifest.files:
            raise G4Error(f"{path / MANIFEST_FILE} lists no {program_file(target, manifest.targets)}.", hint=_AGAIN)
    for name, record in manifest.files.items():
        _check_file(path, name, record, verify, progress)
    return Bundle(path, manifest)


def _check_file(folder: Path, name: str, record: FileRecord, verify: bool, progress: Progress) -> None:
    if Path(name).name != name:
        raise G4Error(f"{folder / MANIFEST_FILE} lists {name!r}, which is not a file of this folder.", hint=_AGAIN)
    path = folder / name
    if not path.is_file():
        raise G4Error(f"{path} is missing.", hint=_AGAIN)
    size = path.stat().st_size
    if size != record.bytes:
        raise G4Error(
            f"{path} has {size:,} bytes instead of {record.bytes:,}: it is incomplete or damaged.", hint=_AGAIN
        )
    if (verify or size < ALWAYS_VERIFIED_BYTES) and sha256_file(path, progress) != record.sha256:
        raise G4Error(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST_FILE}.", hint=_AGAIN)


def write_manifest(
    folder: Path, make: Callable[[dict[str, FileRecord]], BundleManifest], progress: Progress = SILENT
) -> BundleManifest:
    """Hash every file of a folder, let `make` put the records into a manifest, and write that."""
    files = {
        path.name: FileRecord(path.stat().st_size, sha256_file(path, progress))
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_FILE
    }
    manifest = make(files)
    write_json(folder / MANIFEST_FILE, manifest.to_json())
    return manifest


def find_assets(checkpoint: Path) -> list[Path]:
    """Find the files that a bundle copies from a checkpoint.

    Raises: G4Error naming a required file that is not there.
    """
    for name in REQUIRED_ASSETS:
        if not (checkpoint / name).is_file():
            raise G4Error(f"{checkpoint} has no {name}.", hint="Fetch the whole model again: g4 pull")
    return [checkpoint / name for name in (*REQUIRED_ASSETS, *OPTIONAL_ASSETS) if (checkpoint / name).is_file()]


def describe(manifest: BundleManifest) -> list[tuple[str, str]]:
    """Return (what, value) pairs that tell people what a bundle is."""
    contract, memory = manifest.contract, manifest.memory
    return [
        ("backend", ", ".join((manifest.backend, *(t for t in manifest.targets if t != manifest.backend)))),
        ("context", f"{contract.context_length:,} tokens, read in chunks of up to {contract.prefill_chunk:,}"),
        ("files", format_bytes(sum(record.bytes for record in manifest.files.values()))),
        ("weights in memory", format_bytes(memory.weight_bytes)),
        *((f"{kind} cache", f"{format_bytes(kv.bytes)} {kv.format}") for kind, kv in manifest.kv.items()),
        ("memory to run", format_bytes(memory.total_bytes)),
    ]


def _records(kind: type, sections: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind(**section) for name, section in sections.items()}
