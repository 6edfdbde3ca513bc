"""The CPU backend: XNNPACK for everything between two attention calls, g4's kernels for attention and sampling."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import PROGRAM_FILE, KVRecord, MemoryRecord, ReencodedRecord
from gemma4cli.export.contract import Contract
from gemma4cli.export.cpu import EMBEDDING, LM_HEAD, build_cpu_model
from gemma4cli.export.cpu_linear import Stored, planned_bytes
from gemma4cli.export.cpu_lower import WEIGHTS_FILE, lower, write
from gemma4cli.export.export import BackendPlan, Built, ExportRequest
from gemma4cli.export.trace import Step, trace_methods
from gemma4cli.kernels.cpu_sampling import sample
from gemma4cli.model.config import FULL, SLIDING, Gemma4Config
from gemma4cli.progress import Progress
from gemma4cli.quant.tensors import is_quantized

TARGETS = ("cpu",)
DEFAULT_CHUNK = 256
KV_FORMAT = "float32"

# Program bytes of one layer of one method, and of everything else; measured, they hardly depend on sizes.
_PROGRAM_BYTES_PER_LAYER = 18 << 10
_PROGRAM_BYTES_ELSE = 16 << 10
# Python with torch and ExecuTorch, tracing and lowering included; measured.
_LIBRARIES_BYTES = 480 << 20


def plan(request: ExportRequest) -> BackendPlan:
    """Estimate files and memory from shapes and scales; no codes are read."""
    weight_bytes = _weight_bytes(request)
    config, contract = request.reader.config, request.contract
    program_bytes = _PROGRAM_BYTES_ELSE + 2 * config.num_hidden_layers * _PROGRAM_BYTES_PER_LAYER
    # The prepared model, and its weights as bytes of the file to be written unless those are on disk.
    copies = 1 if request.low_memory else 2
    kv_bytes = sum(record.bytes for record in kv_records(config, contract).values())
    return BackendPlan(
        {PROGRAM_FILE: program_bytes, WEIGHTS_FILE: sum(weight_bytes.values())},
        _LIBRARIES_BYTES + copies * sum(weight_bytes.values()) + kv_bytes,
        _memory(config, contract, sum(weight_bytes.values())),
    )


def build(request: ExportRequest, folder: Path, progress: Progress) -> Built:
    """Load, trace, lower and write."""
    contract, config = request.contract, request.reader.config
    model = build_cpu_model(request.reader, contract.context_length, contract.prefill_chunk, progress)
    with progress.phase("trace and lower", 3, "steps") as task, _scratch(folder, request.low_memory) as scratch:
        programs = trace_methods(Step(model, sample), contract.prefill_chunk)
        task.advance(1, "lower")
        program = lower(programs, contract, scratch)
        task.advance(1, "write")
        write(program, folder)
        task.advance(1)
    return Built(
        TARGETS,
        kv_records(config, contract),
        _memory(config, contract, (folder / WEIGHTS_FILE).stat().st_size),
        {name: ReencodedRecord(**asdict(change)) for name, change in model.changes.items()},
    )


def verify(request: ExportRequest, folder: Path, progress: Progress) -> dict[str, Any]:
    """Refuse: nothing is compiled for a CPU that could differ from what was traced."""
    raise G4Error("--verify runs compiled CUDA code; this bundle is for the CPU.", hint="Leave --verify away.")


@contextlib.contextmanager
def _scratch(folder: Path, wanted: bool) -> Iterator[Path | None]:
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        yield Path(scratch)


def kv_records(config: Gemma4Config, contract: Contract) -> dict[str, KVRecord]:
    """Account for the caches of each kind of layer; keys and values are float32."""
    records = {}
    for kind, name, slots in ((SLIDING, "sliding", contract.ring_slots), (FULL, "full", contract.context_length)):
        layers = [config.layer(i) for i in range(config.num_hidden_layers) if config.layer(i).kind == kind]
        if layers:
            values = sum(2 * layer.num_key_value_heads * slots * layer.head_dim for layer in layers)
            records[name] = KVRecord(KV_FORMAT, len(layers), slots, 4 * values)
    return records


def _weight_bytes(request: ExportRequest) -> dict[str, int]:
    """Bytes that each tensor will take in the weights file."""
    reader = request.reader
    names = reader.names()
    sizes = {}
    for name, shape in reader.config.parameter_shapes().items():
        if name == EMBEDDING:
            sizes[name] = _embedding_bytes(reader.tensor(name))
        elif name != LM_HEAD:
            sizes[name] = planned_bytes(reader.tensor(name)) if len(shape) == 2 else 4 * math.prod(shape)
    head = reader.tensor(LM_HEAD if LM_HEAD in names else EMBEDDING)
    sizes[LM_HEAD] = planned_bytes(head)
    if LM_HEAD not in names and sizes[LM_HEAD] == sizes[EMBEDDING]:
        sizes[LM_HEAD] = 0  # the same bytes, stored once
    return sizes


def _embedding_bytes(table: Tensor) -> int:
    if not is_quantized(table):
        return 4 * table.numel()
    stored = Stored.of(table)
    parameters = 2 if stored.may_have_offset(0) else 1
    return table.shape[0] * table.shape[1] + 4 * parameters * stored.scale.numel()


def _memory(config: Gemma4Config, contract: Contract, weight_bytes: int) -> MemoryRecord:
    widest = max(config.layer(i).head_dim * config.num_attention_heads for i in range(config.num_hidden_layers))
    activations = 6 * config.hidden_size + 4 * config.intermediate_size + 4 * widest
    kv_bytes = sum(record.bytes for record in kv_records(config, contract).values())
    return MemoryRecord(weight_bytes, kv_bytes, 4 * (contract.prefill_chunk * activations + 2 * config.vocab_size))
