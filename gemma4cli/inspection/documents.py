"""What `g4 inspect-pte` answers, view by view, as plain data: `--json` prints it, people get it drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from gemma4cli.errors import G4Error
from gemma4cli.export.contract import INPUTS, METHODS, MIN_PREFILL_TOKENS, OUTPUTS
from gemma4cli.export.receipt import RECEIPT_FILE, read_receipt
from gemma4cli.inspection.artifact import Artifact, DelegatePart
from gemma4cli.inspection.conformance import contract_problems
from gemma4cli.inspection.gpus import GPUS, Gpu
from gemma4cli.inspection.library import Kernel
from gemma4cli.inspection.predict import GpuCheck, device_of, interesting_lengths, memory_model
from gemma4cli.inspection.program import Method, Value
from gemma4cli.inspection.weights import join_packed, list_state, list_weights

Document = dict[str, Any]

_PRINTABLE_SPEC_BYTES = 200
_CONTEXT_OF = "h200"
"""Whose CUDA context is counted when no GPU is named."""


def overview(artifact: Artifact) -> Document:
    """What it is, where it came from, and how large its parts are."""
    manifest, program = artifact.manifest, artifact.program
    problems = contract_problems(artifact)
    document: Document = {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "bytes": artifact.nbytes,
        "device": device_of(artifact) if program else None,
        "methods": [m.name for m in program.methods if not m.is_constant] if program else [],
        "backends": dict(Counter(part.delegate.backend for part in artifact.delegates)),
        "architectures": architectures(artifact),
        "contract": None if problems is None else {"problems": problems, "runs": not problems},
        "sizes": sizes(artifact),
    }
    if manifest:
        document |= {
            "model": manifest.model,
            "backend": manifest.backend,
            "targets": list(manifest.targets),
            "target": artifact.target,
            "context_length": manifest.contract.context_length,
            "prefill_chunk": manifest.contract.prefill_chunk,
            "kv": {kind: asdict(record) for kind, record in manifest.kv.items()},
            "reencoded": {name: asdict(record) for name, record in manifest.reencoded.items()},
            "created_with": manifest.created_with,
            "files": {name: asdict(record) for name, record in manifest.files.items()},
            "hashed": list(artifact.hashed),
            "receipt": _receipt(artifact),
        }
    return document


def _receipt(artifact: Artifact) -> Document | None:
    """What `g4 bench --quality --save-receipt` measured, if it did."""
    receipt = read_receipt(artifact.path)
    if receipt is None:
        return None
    try:
        numbers = {key: float(receipt.result[key]) for key in ("perplexity", "reference_perplexity", "top1_agreement")}
        return {
            **numbers,
            "kl_mean": float(receipt.result["kl"]["mean"]),
            "text": str(receipt.text["name"]),
            "is_current": receipt.is_current,
        }
    except (KeyError, TypeError, ValueError):
        raise G4Error(
            f"{artifact.path / RECEIPT_FILE} is damaged: a number is missing.",
            hint="Measure it again: g4 bench --quality --save-receipt",
        ) from None


def sizes(artifact: Artifact) -> Document:
    """Bytes by part. Delegate blobs and libraries count once however many methods use them."""
    blobs = {(part.delegate.blob.offset, part.delegate.blob.size) for part in artifact.delegates}
    libraries = {part.blob.library: part.library_bytes for part in artifact.delegates}
    return {
        "program": artifact.program.code_bytes if artifact.program else 0,
        "delegates": sum(size for _, size in blobs) + sum(libraries.values()),
        "weights": sum(weight.nbytes for weight in list_weights(artifact)),
        "state": sum(buffer.nbytes for buffer in list_state(artifact)),
    }


def architectures(artifact: Artifact) -> list[str]:
    """GPU architectures that the program has code for."""
    return sorted({name for part in artifact.delegates if part.library for name in part.library.architectures})


def methods(artifact: Artifact) -> Document:
    """Inputs and outputs of every method, and the constant methods with their values."""
    program = artifact.program
    listed = [method for method in program.methods if not method.is_constant] if program else []
    is_ours = contract_problems(artifact) is not None
    return {
        "methods": [
            {
                "name": method.name,
                "inputs": _values(artifact, method, method.inputs, "input", is_ours),
                "outputs": _values(artifact, method, method.outputs, "output", is_ours),
                "instructions": method.instructions,
                "memory": [asdict(buffer) for buffer in method.buffers if buffer.nbytes],
            }
            for method in listed
        ],
        "constant_methods": artifact.constants,
    }


def _values(artifact: Artifact, method: Method, indices: tuple[int, ...], what: str, is_ours: bool) -> list[Document]:
    specs = INPUTS if what == "input" else OUTPUTS
    named = is_ours and method.name in METHODS and len(specs) == len(indices)
    names = [spec.name for spec in specs] if named else [f"{what} {number}" for number in range(len(indices))]
    ranges = [_range(artifact, method.values[index], spec.shape) for index, spec in zip(indices, specs, strict=False)]
    return [
        {"name": name, **_value(method.values[index]), "range": ranges[number] if named else None}
        for number, (name, index) in enumerate(zip(names, indices, strict=True))
    ]


def _value(value: Value) -> Document:
    if value.kind != "tensor":
        return {"dtype": value.kind, "shape": None, "is_dynamic": False, "device": None, "bytes": None}
    tensor = value.value
    return {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "is_dynamic": tensor.is_dynamic,
        "device": tensor.device,
        "bytes": tensor.nbytes,
    }


def _range(artifact: Artifact, value: Value, shape: tuple[int | str, ...]) -> str | None:
    """The contract's range of T for a dynamic tensor; the file itself holds only upper bounds."""
    if value.kind != "tensor" or not value.value.is_dynamic or "T" not in shape:
        return None
    return f"T = {MIN_PREFILL_TOKENS} to {artifact.constants.get('get_max_prefill_chunk')}"


def delegates(artifact: Artifact) -> Document:
    """Every delegate, the operators left outside, and the GPU kernels of compiled libraries."""
    program = artifact.program
    libraries: dict[str | None, list[DelegatePart]] = {}
    for part in artifact.delegates:
        if part.library:
            libraries.setdefault(part.blob.library, []).append(part)
    return {
        "delegates": [_delegate(part) for part in artifact.delegates],
        "outside": {m.name: m.operators for m in program.methods if not m.is_constant} if program else {},
        "libraries": [_library(key, users) for key, users in libraries.items()],
        "limits": {gpu.key: gpu.shared_bytes_per_block for gpu in GPUS.values()},
    }


def _delegate(part: DelegatePart) -> Document:
    return {
        "method": part.method,
        "index": part.number,
        "backend": part.delegate.backend,
        "calls": part.delegate.calls,
        "blob_bytes": part.delegate.blob.size,
        "inline": part.delegate.is_inline,
        "compile_specs": {key: _spec_text(value) for key, value in part.delegate.specs},
        "operators": part.blob.operators,
        "weights": len(part.blob.weights),
        "library": part.blob.library,
        "library_bytes": part.library_bytes,
    }


def _spec_text(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    return (
        text
        if text.isprintable() and len(value) <= _PRINTABLE_SPEC_BYTES
        else f"{len(value)} bytes: {value[:16].hex()}…"
    )


def _library(key: str | None, users: list[DelegatePart]) -> Document:
    library = users[0].library
    assert library is not None
    kernels = library.kernels
    worst = max(kernels, key=lambda kernel: kernel.shared_bytes, default=None)
    closed = sum(bool(image.closed) for image in library.images)
    return {
        "library": key,
        "methods": list(dict.fromkeys(part.method for part in users)),
        "bytes": users[0].library_bytes,
        "architectures": library.architectures,
        "ptx": sorted({str(a).replace("sm", "compute") for image in library.images for a in image.ptx}),
        "compressed_images": closed,
        "launches": sum(k.launches or 0 for k in _once(kernels)) if all(k.launches for k in kernels) else None,
        "kernels": [_kernel(kernel) for kernel in kernels],
        "most_shared_memory": _kernel(worst) if worst else None,
    }


def _once(kernels: list[Kernel]) -> list[Kernel]:
    """One of the variants that a kernel has for several architectures."""
    return list({kernel.name: kernel for kernel in kernels}.values())


def _kernel(kernel: Kernel) -> Document:
    facts = kernel.facts
    return {
        "name": kernel.name,
        "entry": facts.entry,
        "architecture": str(kernel.architecture),
        "registers": facts.registers,
        "local_bytes": facts.local_bytes,
        "static_shared_bytes": facts.static_shared_bytes,
        "dynamic_shared_bytes": kernel.dynamic_shared_bytes,
        "threads": facts.threads,
        "launches": kernel.launches,
        "code_bytes": facts.code_bytes,
        "sha256": kernel.sha256,
    }


def weights(artifact: Artifact) -> Document:
    """Every tensor that is stored; a packed matrix is one."""
    listed = join_packed(list_weights(artifact))
    return {
        "total_bytes": sum(weight.nbytes for weight in listed),
        "weights": [
            {
                "name": w.name,
                "short_name": w.short_name,
                "layer": w.layer,
                "role": w.role,
                "format": w.format,
                "shape": None if w.shape is None else list(w.shape),
                "bytes": w.nbytes,
                "device": w.device,
                "file": w.file,
            }
            for w in listed
        ],
    }


def state(artifact: Artifact) -> Document:
    """Caches and other buffers that live between calls."""
    model, listed = memory_model(artifact), list_state(artifact)
    return {
        "context_length": model.context_length,
        "total_bytes": sum(buffer.nbytes for buffer in listed),
        "bytes_per_token": model.state_per_token if model.context_length else None,
        "fixed_bytes": model.state_fixed,
        "buffers": [
            {
                "name": b.name,
                "dtype": b.dtype,
                "shape": list(b.shape),
                "bytes": b.nbytes,
                "bytes_per_token": b.bytes_per_token(model.context_length),
                "device": b.device,
                "methods": list(b.methods),
            }
            for b in listed
        ],
    }


def memory(artifact: Artifact, gpu: Gpu | None = None) -> Document:
    """Predicted memory for this export, and for exports with other context lengths."""
    model = memory_model(artifact)
    card = (gpu or GPUS[_CONTEXT_OF]) if model.device == "cuda" else None
    context = card.context_bytes if card else 0
    return {
        "device": model.device,
        "context_of": card.name if card else None,
        "workspace_is_known": model.workspace_is_known,
        "now": model.at(None, context).to_json(),
        "by_context": [model.at(tokens, context).to_json() for tokens in interesting_lengths(artifact, model)],
    }


def check(found: GpuCheck) -> Document:
    """The verdict on one GPU."""
    worst = found.worst_kernel
    return {
        "gpu": {**asdict(found.gpu), "capability": "{}.{}".format(*found.gpu.capability)},
        "fits": found.fits,
        "problems": list(found.problems),
        "remarks": list(found.remarks),
        "memory": found.use.to_json(),
        "longest_context": found.longest_context,
        "most_shared_memory": _kernel(worst) if worst else None,
    }
