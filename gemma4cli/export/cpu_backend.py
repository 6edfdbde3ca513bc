"""The CPU backend: a program of our own operators, and the packed weights that it reads from where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma4cli.errors import G4Error
from gemma4cli.export.bundle import PROGRAM_FILE, KVRecord, MemoryRecord, ReencodedRecord
from gemma4cli.export.contract import Contract
from gemma4cli.export.cpu import CpuModel, CpuSignature
from gemma4cli.export.cpu_lower import WEIGHTS_FILE, lower
from gemma4cli.export.export import BackendPlan, Built, ExportRequest
from gemma4cli.export.trace import Step, trace_methods
from gemma4cli.export.weights import WeightEntry, entries_of, layout_of, write_packed
from gemma4cli.kernels.cpu_sampling import sample
from gemma4cli.model.config import FULL, SLIDING, Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec, KVCache
from gemma4cli.progress import Progress
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint
from gemma4cli.quant.tensors import is_quantized
from gemma4cli.quant.torchao_types import Int4Tensor

TARGETS = ("cpu",)
DEFAULT_CHUNK = 256
KV_FORMAT = "float32"

# Program bytes of one layer of one method, and of everything else; measured, they hardly depend on sizes.
_PROGRAM_BYTES_PER_LAYER = 6 << 10
_PROGRAM_BYTES_ELSE = 12 << 10
# Python with torch and ExecuTorch, tracing and lowering included, and the share of the weights whose mapped pages count
# at the peak; measured: 0.57 GB for the demo, 0.85 GB for four layers of the 31B, 3.7 GB for all of it.
_LIBRARIES_BYTES = 480 << 20
_COUNTED_SHARE = 6


def plan(request: ExportRequest) -> BackendPlan:
    """Estimate files and memory from shapes; of each matrix one row is read."""
    config, contract = request.reader.config, request.contract
    entries = _entries(_model(request, "meta"))
    program_bytes = _PROGRAM_BYTES_ELSE + 2 * config.num_hidden_layers * _PROGRAM_BYTES_PER_LAYER
    files = {PROGRAM_FILE: program_bytes, WEIGHTS_FILE: layout_of(entries).written_bytes}
    peak_bytes = _LIBRARIES_BYTES + files[WEIGHTS_FILE] // _COUNTED_SHARE
    return BackendPlan(files, peak_bytes, _memory(config, contract, entries))


def build(request: ExportRequest, folder: Path, progress: Progress) -> Built:
    """Trace and lower a model without weights; then pack the weights."""
    contract, config = request.contract, request.reader.config
    model = _model(request, "cpu")
    with progress.phase("trace and lower", 2, "steps") as task:
        programs = trace_methods(Step(model, sample), contract.prefill_chunk)
        task.advance(1, "lower")
        program = lower(programs, contract)
        with open(folder / PROGRAM_FILE, "wb") as file:
            program.write_to_file(file)
        task.advance(1)
    angles = [(f"rotary_emb.{kind}.inv_freq", rotary.inv_freq) for kind, rotary in model.rotary_emb.items()]
    entries = _entries(model)
    write_packed(folder / WEIGHTS_FILE, model, entries, angles, request.reader, progress)
    reencoded = _reencoded(_rows_of(request.reader), model.signature)
    return Built(TARGETS, kv_records(config, contract), _memory(config, contract, entries), reencoded)


def verify(request: ExportRequest, folder: Path, progress: Progress) -> dict[str, Any]:
    """Refuse: nothing is compiled for a CPU that could differ from what was traced."""
    raise G4Error("--verify runs compiled CUDA code; this bundle is for the CPU.", hint="Leave --verify away.")


def _model(request: ExportRequest, device: str) -> CpuModel:
    """Build the model without weights: nothing touches the memory of its buffers."""
    cache = CacheSpec(request.contract.context_length, request.contract.prefill_chunk, torch.float32)
    signature = CpuSignature.of(_rows_of(request.reader))
    with torch.device(device):
        return CpuModel(signature, cache).eval().requires_grad_(False)


def _rows_of(reader: Checkpoint) -> Checkpoint:
    """Return what tells the formats without converting whole matrices of a GGUF file."""
    return reader.first_rows() if isinstance(reader, GGUFCheckpoint) else reader


def _reencoded(reader: Checkpoint, signature: CpuSignature) -> dict[str, ReencodedRecord]:
    """List the quantized matrices that no packed format holds: float32 holds their values, in more bytes."""
    tensors = {name: reader.tensor(name) for name, fmt in signature.formats.items() if fmt is None}
    return {
        name: ReencodedRecord(_describe(tensor), "float32", 0.0)
        for name, tensor in tensors.items()
        if is_quantized(tensor)
    }


def _describe(tensor: Tensor) -> str:
    bits = 4 if isinstance(tensor, Int4Tensor) else int(str(tensor.target_dtype).removeprefix("torch.int"))
    group = tensor.block_size[-1]
    return f"int{bits} {'per row' if group == tensor.shape[1] else f'g{group}'}"


def _entries(model: CpuModel) -> list[WeightEntry]:
    """List what the program looks up; the runtime makes the caches itself."""
    entries = entries_of(model, lambda fqn: fqn, lambda module: isinstance(module, KVCache))
    return [entry for entry in entries if not entry.is_state]


def kv_records(config: Gemma4Config, contract: Contract) -> dict[str, KVRecord]:
    """Account for the caches of each kind of layer; keys and values are float32."""
    records = {}
    for kind, name, slots in ((SLIDING, "sliding", contract.ring_slots), (FULL, "full", contract.context_length)):
        layers = [config.layer(i) for i in range(config.num_hidden_layers) if config.layer(i).kind == kind]
        if layers:
            values = sum(2 * layer.num_key_value_heads * slots * layer.head_dim for layer in layers)
            records[name] = KVRecord(KV_FORMAT, len(layers), slots, 4 * values)
    return records


def _memory(config: Gemma4Config, contract: Contract, entries: list[WeightEntry]) -> MemoryRecord:
    widest = max(config.layer(i).head_dim * config.num_attention_heads for i in range(config.num_hidden_layers))
    activations = 6 * config.hidden_size + 4 * config.intermediate_size + 4 * widest
    kv_bytes = sum(record.bytes for record in kv_records(config, contract).values())
    weight_bytes = sum(entry.nbytes for entry in entries)
    return MemoryRecord(weight_bytes, kv_bytes, 4 * (contract.prefill_chunk * activations + 2 * config.vocab_size))
