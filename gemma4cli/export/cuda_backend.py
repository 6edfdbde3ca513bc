"""The CUDA backend: a compiled program per GPU architecture, and the packed weights that all of them read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import KVRecord, MemoryRecord, program_file
from gemma4cli.export.cuda.compile import compiled_libraries
from gemma4cli.export.cuda.layers import KV_FORMATS
from gemma4cli.export.cuda.model import Signature
from gemma4cli.export.cuda.weights import planned_bytes, weight_entries, write_weights
from gemma4cli.export.export import BackendPlan, Built, ExportRequest
from gemma4cli.export.weights import WeightEntry
from gemma4cli.files import format_bytes
from gemma4cli.kernels.targets import DEFAULT_TARGETS, context_bytes, get_target, target_for_capability
from gemma4cli.model.config import FULL, SLIDING, Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.progress import Progress
from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint

WEIGHTS_FILE = "weights.ptd"
AUTO = "auto"
# What AUTO chooses from, the most exact first. Folding is exact, and layers that have two projections for K and V are
# stored without it.
AUTO_FORMATS = ("folded", "folded-q8", "folded-tq4")
DEFAULT_CHUNK = 512
"""Long enough for the tensor cores, and short because every sliding layer's ring is longer by it."""
DEFAULT_VRAM = 24 << 30

# Program bytes per layer and for everything else: 2.0 MB for 12 layers of the demo, 4.8 MB for 60 of the 31B.
_PROGRAM_BYTES_PER_LAYER = 56 << 10
_PROGRAM_BYTES_ELSE = 1600 << 10
# The exporting process and two compilers beside it; 1.1 GB was the largest of each with 60 layers.
_PEAK_BYTES = 4 << 30


def plan(request: ExportRequest) -> BackendPlan:
    """Estimate files and memory from shapes; of each matrix one row is read."""
    targets = _targets(request)
    signature = signature_of(request)
    layers = signature.config.num_hidden_layers
    program_bytes = _PROGRAM_BYTES_ELSE + layers * _PROGRAM_BYTES_PER_LAYER
    files = {program_file(target, targets): program_bytes for target in targets}
    files[WEIGHTS_FILE] = planned_bytes(signature)
    return BackendPlan(files, _PEAK_BYTES, _memory(signature, weight_entries(signature)))


def build(request: ExportRequest, folder: Path, progress: Progress) -> Built:
    """Compile, or take from the cache, a program per target; then pack the weights, which they share."""
    from gemma4cli.export.cuda.lower import assemble

    targets = _targets(request)
    signature = signature_of(request)
    for name in targets:
        libraries = compiled_libraries(signature, get_target(name), request.programs, progress)
        (folder / program_file(name, targets)).write_bytes(assemble(libraries, signature, request.contract))
    write_weights(folder / WEIGHTS_FILE, signature, request.reader, progress)
    entries = weight_entries(signature)
    total = _memory(signature, entries).total_bytes + _context(request)
    progress.note(f"KV cache {signature.kv_format}; {_fit(total)}")
    return Built(targets, _kv_records(signature, entries), _memory(signature, entries))


def verify(request: ExportRequest, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run a finished bundle beside the uncompiled model on the GPU at hand; see cuda/verify.py."""
    from gemma4cli.export.cuda.verify import verify_bundle

    return verify_bundle(folder, signature_of(request), progress).to_json()


def signature_of(request: ExportRequest) -> Signature:
    """Return the signature that a request asks for, choosing the KV format where that is left to us.

    Raises: G4Error when the format does not fit into the memory that was named.
    """
    spec = CacheSpec(request.contract.context_length, request.contract.prefill_chunk, torch.bfloat16)
    reader = request.reader.first_rows() if isinstance(request.reader, GGUFCheckpoint) else request.reader
    if request.kv != AUTO:
        signature = Signature.of(reader, spec, request.kv)
        if request.vram is not None:
            _require_fit(signature, request.vram, _context(request))
        return signature
    vram = request.vram or _memory_here() or DEFAULT_VRAM
    base = Signature.of(reader, spec, AUTO_FORMATS[0])
    for name in AUTO_FORMATS:
        signature = Signature(base.config, base.formats, base.cache, name)
        if _total(signature) + _context(request) <= vram:
            return signature
    _require_fit(signature, vram, _context(request))
    return signature


def _targets(request: ExportRequest) -> tuple[str, ...]:
    """The targets asked for; else that of the GPU at hand, else DEFAULT_TARGETS."""
    if request.targets:
        return tuple(get_target(name).name for name in dict.fromkeys(request.targets))
    if torch.cuda.is_available():
        return (target_for_capability(torch.cuda.get_device_capability()).name,)
    return DEFAULT_TARGETS


def _memory_here() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _context(request: ExportRequest) -> int:
    """What a process takes on the most demanding target before it allocates anything."""
    return max(context_bytes(get_target(name).capability) for name in _targets(request))


def _total(signature: Signature) -> int:
    return _memory(signature, weight_entries(signature)).total_bytes


def _require_fit(signature: Signature, vram: int, context: int) -> None:
    needed = _total(signature) + context
    if needed > vram:
        smaller = KV_FORMATS[KV_FORMATS.index(signature.kv_format) + 1 :]
        raise G4Error(
            f"Running this with {signature.cache.context_length:,} tokens of context and the {signature.kv_format} "
            f"cache takes {format_bytes(needed)}; {format_bytes(vram)} are there.",
            hint=f"Use --kv {smaller[-1]}, a shorter --ctx, or a smaller --chunk."
            if smaller
            else "Use a shorter --ctx, a smaller --chunk, or weights with fewer bits.",
        )


def _memory(signature: Signature, entries: list[WeightEntry]) -> MemoryRecord:
    state = sum(entry.nbytes for entry in entries if entry.is_state)
    return MemoryRecord(
        sum(entry.nbytes for entry in entries) - state,
        state,
        _workspace(signature.config, signature.cache.prefill_chunk),
    )


def _workspace(config: Gemma4Config, chunk: int) -> int:
    """Bytes of activations that are alive at once in `prefill`: bf16, some in float32; two rows of logits."""
    widest = max(config.layer(i).head_dim * config.num_attention_heads for i in range(config.num_hidden_layers))
    per_token = 2 * (4 * config.hidden_size + 3 * config.intermediate_size + 4 * widest)
    return chunk * per_token + 4 * 6 * config.vocab_size


def _kv_records(signature: Signature, entries: list[WeightEntry]) -> dict[str, KVRecord]:
    records = {}
    config = signature.config
    for kind, name in ((SLIDING, "sliding"), (FULL, "full")):
        layers = [i for i in range(config.num_hidden_layers) if config.layer(i).kind == kind]
        if not layers:
            continue
        prefixes = tuple(f"model.layers.{i}." for i in layers)
        nbytes = sum(entry.nbytes for entry in entries if entry.is_state and entry.fqn.startswith(prefixes))
        kv_format = signature.kv_format if name == "full" else "bf16"
        records[name] = KVRecord(kv_format, len(layers), signature.cache.slots(config.layer(layers[0])), nbytes)
    return records


def _fit(total: int) -> str:
    """Say which sizes of GPU the model runs on."""
    verdicts = (f"{'fits' if total <= size << 30 else 'does not fit'} {size} GB" for size in (24, 32, 80))
    return f"running takes {format_bytes(total)}: {', '.join(verdicts)}."
