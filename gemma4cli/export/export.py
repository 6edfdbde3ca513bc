"""From a checkpoint to a bundle, whatever the backend.

A backend says what a program will take (`plan`) and makes it (`build`); everything around it (checking the request and
the disk, copying the model's own files, hashes, manifest, atomicity) happens here, once.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from gemma4cli import __version__
from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import (
    MANIFEST_FILE,
    BundleManifest,
    KVRecord,
    MemoryRecord,
    ReencodedRecord,
    find_assets,
    write_manifest,
)
from gemma4cli.export.contract import MIN_PREFILL_TOKENS, Contract
from gemma4cli.export.sources import PlannedCheckpoint
from gemma4cli.files import atomic_directory, require_absent, require_free_space, write_json
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.settings import GenerationDefaults
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint, open_checkpoint
from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint
from gemma4cli.quant.manifest import identify_source
from gemma4cli.quant.quantize import available_memory

DEFAULT_CONTEXT = 4096
_MANIFEST_BYTES = 16 << 10

_BACKENDS = {"cpu": "gemma4cli.export.cpu_backend", "cuda": "gemma4cli.export.cuda_backend"}
"""Name -> module with `plan` and `build`; imported when chosen."""


@dataclass(frozen=True)
class ExportSpec:
    """One export. `context_length` None means the model's maximum, but no more than 4,096.

    prefill_chunk: the most tokens of one `prefill` call; None leaves it to the backend, or less in a shorter context.
    targets: GPU architectures; none means that of the GPU at hand, else all.
    kv: the format of the full layers' caches, or "auto": the most exact that fits into `vram` bytes.
    programs: where compiled programs are kept for the next export.
    verify: run the program on the GPU at hand and compare it with the uncompiled model before the bundle counts.
    """

    checkpoint: Path
    target: Path
    backend: str = "cpu"
    context_length: int | None = None
    prefill_chunk: int | None = None
    force: bool = False
    targets: tuple[str, ...] = ()
    kv: str = "auto"
    vram: int | None = None
    programs: Path = Path("programs")
    verify: bool = False


@dataclass(frozen=True)
class ExportRequest:
    """What a backend is asked for: the model, the contract to fulfil, and how."""

    reader: Checkpoint
    contract: Contract
    targets: tuple[str, ...] = ()
    kv: str = "auto"
    vram: int | None = None
    programs: Path = Path("programs")


@dataclass(frozen=True)
class BackendPlan:
    """What building will take: files with their estimated bytes, and the peak memory of the exporting process."""

    files: dict[str, int]
    peak_memory_bytes: int
    memory: MemoryRecord


@dataclass(frozen=True)
class Built:
    """What a backend made, besides the files it wrote."""

    targets: tuple[str, ...]
    kv: dict[str, KVRecord]
    memory: MemoryRecord
    reencoded: dict[str, ReencodedRecord] = field(default_factory=dict)


class Backend(Protocol):
    """A module that lowers the model for one kind of hardware."""

    DEFAULT_CHUNK: int

    def plan(self, request: ExportRequest) -> BackendPlan:
        """Estimate without reading weights."""

    def build(self, request: ExportRequest, folder: Path, progress: Progress) -> Built:
        """Write `model.pte` and its `.ptd` files into `folder`."""

    def verify(self, request: ExportRequest, folder: Path, progress: Progress) -> dict[str, Any]:
        """Run a finished bundle beside the uncompiled model; returns how close they were.

        Raises: G4Error when they are not, or when this cannot be done here.
        """


@dataclass(frozen=True)
class ExportPlan:
    """A whole bundle before it is written."""

    files: dict[str, int]
    free_disk_bytes: int
    peak_memory_bytes: int
    available_memory_bytes: int
    contract: Contract
    memory: MemoryRecord

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_disk_bytes and self.peak_memory_bytes <= self.available_memory_bytes


def plan_export(spec: ExportSpec, reader: Checkpoint | None = None, progress: Progress = SILENT) -> ExportPlan:
    """Check a request and say what it will take; reads headers, scales and small files only.

    reader: the checkpoint, when it is not what lies in `spec.checkpoint` but what will be made of it.
    Raises: G4Error when the backend, the context, the chunk or the checkpoint does not allow it.
    """
    backend = find_backend(spec.backend)
    reader = reader or _open(spec, progress)
    with _model_files(spec, reader) as files:
        return _plan(spec, _request(spec, reader, files), backend, find_assets(files))


def _open(spec: ExportSpec, progress: Progress) -> Checkpoint:
    """Open a checkpoint; a GGUF file, too, where the backend packs weights straight from it."""
    if spec.checkpoint.is_file():
        return GGUFCheckpoint([spec.checkpoint])
    return open_checkpoint(spec.checkpoint, progress)


@contextlib.contextmanager
def _model_files(spec: ExportSpec, reader: Checkpoint) -> Iterator[Path]:
    """Yield the folder with the model's own small files, which a GGUF file holds as metadata."""
    assets = reader.assets if isinstance(reader, GGUFCheckpoint | PlannedCheckpoint) else None
    if assets is None:
        yield spec.checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="g4-") as name:
        for file, content in assets.items():
            (Path(name) / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        yield Path(name)


def _plan(spec: ExportSpec, request: ExportRequest, backend: Backend, files: list[Path]) -> ExportPlan:
    plan = backend.plan(request)
    assets = {path.name: path.stat().st_size for path in files}
    existing = next(folder for folder in spec.target.absolute().parents if folder.exists())
    return ExportPlan(
        {**plan.files, **assets, MANIFEST_FILE: _MANIFEST_BYTES},
        shutil.disk_usage(existing).free,
        plan.peak_memory_bytes,
        available_memory(),
        request.contract,
        plan.memory,
    )


def export_bundle(spec: ExportSpec, progress: Progress = SILENT) -> BundleManifest:
    """Write a bundle; `spec.target` is whole afterwards, or as it was.

    Raises: G4Error for anything wrong with the request, the checkpoint or the disk.
    """
    require_absent(spec.target, spec.force)
    if spec.target.resolve() in (spec.checkpoint.resolve(), *spec.checkpoint.resolve().parents):
        raise G4Error(f"{spec.target} would replace the model that is being exported.", hint="Choose another --output.")
    backend = find_backend(spec.backend)
    reader = _open(spec, progress)
    with _model_files(spec, reader) as files:
        return _export(spec, _request(spec, reader, files), backend, find_assets(files), progress)


def _export(
    spec: ExportSpec, request: ExportRequest, backend: Backend, assets: list[Path], progress: Progress
) -> BundleManifest:
    plan = _plan(spec, request, backend, assets)
    require_free_space(spec.target.absolute().parent, plan.total_bytes, f"Exporting {spec.checkpoint.name}")
    model = _describe_model(request.reader, spec.checkpoint, progress)
    with atomic_directory(spec.target, force=spec.force) as folder:
        built = backend.build(request, folder, progress)
        for asset in assets:
            shutil.copyfile(asset, folder / asset.name)
        manifest = write_manifest(
            folder,
            lambda files: BundleManifest(
                created_with=_created_with(),
                model=model,
                backend=spec.backend,
                targets=built.targets,
                contract=request.contract,
                kv=built.kv,
                memory=built.memory,
                reencoded=built.reencoded,
                files=files,
            ),
            progress,
        )
        if spec.verify:
            manifest = replace(manifest, verified=backend.verify(request, folder, progress))
            write_json(folder / MANIFEST_FILE, manifest.to_json())
        return manifest


def _request(spec: ExportSpec, reader: Checkpoint, files: Path) -> ExportRequest:
    contract = make_contract(reader.config, GenerationDefaults.from_dir(files), spec)
    return ExportRequest(reader, contract, spec.targets, spec.kv, spec.vram, spec.programs)


def find_backend(name: str) -> Backend:
    """Import a backend by its name; an unknown one is wrong usage."""
    if name not in _BACKENDS:
        raise G4Error(
            f"This g4 cannot export for the backend {name!r}.", hint=f"Available: {', '.join(_BACKENDS)}.", exit_code=2
        )
    return importlib.import_module(_BACKENDS[name])


def make_contract(config: Gemma4Config, defaults: GenerationDefaults, spec: ExportSpec) -> Contract:
    """Fill the contract's values, refusing sizes that the model does not have.

    Raises: G4Error with the number and the limit.
    """
    limit = config.max_position_embeddings
    context = min(limit, DEFAULT_CONTEXT) if spec.context_length is None else spec.context_length
    if not MIN_PREFILL_TOKENS <= context <= limit:
        raise G4Error(
            f"A context of {context:,} tokens is outside {MIN_PREFILL_TOKENS} to {limit:,}, which this model can hold.",
            hint=f"Use --ctx {limit} or less.",
        )
    chunk = min(find_backend(spec.backend).DEFAULT_CHUNK, context) if spec.prefill_chunk is None else spec.prefill_chunk
    if not MIN_PREFILL_TOKENS <= chunk <= context:
        raise G4Error(
            f"Prefill chunks of {chunk:,} tokens are outside {MIN_PREFILL_TOKENS} to the context of {context:,}.",
            hint="Use another --chunk.",
        )
    window = max(config.layer(index).window for index in range(config.num_hidden_layers))
    return Contract(
        context_length=context,
        prefill_chunk=chunk,
        vocab_size=config.vocab_size,
        window=window,
        ring_slots=window + chunk - 1 if window else 0,
        eos_ids=defaults.stop_ids,
        bos_id=-1 if defaults.bos_id is None else defaults.bos_id,
    )


def _describe_model(reader: Checkpoint, checkpoint: Path, progress: Progress) -> dict[str, Any]:
    """A quantized checkpoint's own provenance; a plain one is hashed now."""
    if reader.manifest is not None:
        head = reader.manifest.head
        return {"source": asdict(head.source), "recipe": head.recipe, "totals": asdict(head.totals)}
    if isinstance(reader, GGUFCheckpoint):
        source = identify_source("gguf", checkpoint, reader.files, progress)
        return {"source": asdict(source), "recipe": reader.recipe, "totals": asdict(reader.totals)}
    files = [*sorted(checkpoint.glob("*.safetensors")), *find_assets(checkpoint)]
    source = identify_source("safetensors", checkpoint, files, progress)
    return {"source": asdict(source), "recipe": None, "totals": None}


def _created_with() -> dict[str, str]:
    return {"g4": __version__, **{name: metadata.version(name) for name in ("torch", "executorch", "torchao")}}
