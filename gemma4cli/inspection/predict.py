"""What running a program takes, and whether a GPU has it: memory by part, architecture, shared memory.

Weights and caches are counted from the artifact; the workspace of one step is what the export recorded. A program that
is not g4's does not say what its CUDA delegates allocate while they run, so there the workspace is only a lower bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gemma4cli.files import format_bytes
from gemma4cli.inspection.artifact import Artifact
from gemma4cli.inspection.gpus import Gpu
from gemma4cli.inspection.library import Kernel, KernelImage
from gemma4cli.inspection.weights import list_state, list_weights
from gemma4cli.model.config import Gemma4Config

_CONTEXT_METHOD = "get_max_context_len"
_LONGEST = 256 << 10


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by part. `device_context` is the CUDA context; 0 without a GPU."""

    tokens: int | None
    weights: int
    state: int
    workspace: int
    device_context: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.workspace + self.device_context

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MemoryModel:
    """How memory depends on the context length the model is exported with.

    Attributes:
        context_length: as exported; None when the program does not say, and then nothing is known to grow.
        state_per_token: bytes that one more token of context takes.
        workspace_is_known: False when the workspace is only what ExecuTorch itself plans for.
    """

    device: str
    context_length: int | None
    weights: int
    state_fixed: int
    state_per_token: int
    workspace: int
    workspace_is_known: bool

    def at(self, tokens: int | None, context_bytes: int = 0) -> MemoryUse:
        """Predict for an export with a context of `tokens`; None means as it is."""
        tokens = self.context_length if tokens is None else tokens
        state = self.state_fixed + self.state_per_token * (tokens or 0)
        return MemoryUse(tokens, self.weights, state, self.workspace, context_bytes)

    def longest(self, memory_bytes: int, context_bytes: int) -> int | None:
        """Return the longest context that fits, 0 if none does; None when memory does not depend on it."""
        if not self.state_per_token:
            return None
        free = memory_bytes - self.at(0, context_bytes).total
        return max(0, free // self.state_per_token)


def device_of(artifact: Artifact) -> str:
    """Return "cuda" when any part of the program runs on a GPU, else "cpu"."""
    on_gpu = any(part.library is not None or part.delegate.backend == "CudaBackend" for part in artifact.delegates)
    return "cuda" if on_gpu else "cpu"


def memory_model(artifact: Artifact) -> MemoryModel:
    """Count what an artifact takes on its device."""
    device, manifest = device_of(artifact), artifact.manifest
    context = artifact.constants.get(_CONTEXT_METHOD)
    context = context if type(context) is int and context > 0 else None
    weights = [w for w in list_weights(artifact) if w.device.startswith(device)]
    state = list_state(artifact)
    per_token = sum(buffer.bytes_per_token(context) or 0 for buffer in state)
    planned = _planned_bytes(artifact, device)
    return MemoryModel(
        device,
        context,
        sum(weight.nbytes for weight in weights),
        sum(buffer.nbytes for buffer in state) - per_token * (context or 0),
        per_token,
        manifest.memory.workspace_bytes if manifest else planned,
        workspace_is_known=manifest is not None or device == "cpu",
    )


def _planned_bytes(artifact: Artifact, device: str) -> int:
    """Largest memory that a method plans for on a device, without its named buffers."""
    largest = 0
    for method in artifact.program.methods if artifact.program else ():
        kept = sum(tensor.nbytes for tensor in method.tensors if tensor.is_state)
        planned = sum(buffer.nbytes for buffer in method.buffers if buffer.device.startswith(device))
        largest = max(largest, planned - kept if device == "cpu" else planned)
    return max(0, largest)


def longest_possible(artifact: Artifact) -> int | None:
    """Return the longest context that the model can be exported with; only a bundle says."""
    return Gemma4Config.from_dir(artifact.path).max_position_embeddings if artifact.manifest else None


def interesting_lengths(artifact: Artifact, model: MemoryModel) -> list[int]:
    """Context lengths worth a row: powers of four from 1k up to what the model can hold, and the exported one."""
    if model.context_length is None:
        return []
    most = longest_possible(artifact)
    powers = {length for step in range(5) if (length := 1024 * 4**step) <= (most or _LONGEST)}
    return sorted({*powers, model.context_length, *([most] if most else [])})


@dataclass(frozen=True)
class GpuCheck:
    """The verdict on one GPU; `problems` are empty when it fits, `remarks` say what could not be checked."""

    gpu: Gpu
    use: MemoryUse
    longest_context: int | None
    worst_kernel: Kernel | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


def check_gpu(artifact: Artifact, gpu: Gpu) -> GpuCheck:
    """Check architecture, shared memory and memory."""
    model = memory_model(artifact)
    use = model.at(None, gpu.context_bytes)
    if device_of(artifact) != "cuda":
        problem = "the program runs on the CPU: it has no GPU code"
        return GpuCheck(gpu, model.at(None), None, None, (problem,), ())
    images = _images(artifact)
    chosen, problems, remarks = _choose(images, gpu)
    if not images:
        remarks.append("its compiled library was not given, so architecture and shared memory are unchecked")
    worst = max(chosen, key=lambda kernel: kernel.shared_bytes, default=None)
    if worst and worst.shared_bytes > gpu.shared_bytes_per_block:
        problems.append(
            f"kernel {worst.name} takes {worst.shared_bytes:,} bytes of shared memory per block, "
            f"and it has {gpu.shared_bytes_per_block:,}"
        )
    unknown = sum(kernel.dynamic_shared_bytes is None for kernel in chosen)
    if unknown:
        remarks.append(f"dynamic shared memory is not known (kernels: {unknown})")
    if use.total > gpu.memory_bytes:
        excess = use.total - gpu.memory_bytes
        problems.append(
            f"it takes {format_bytes(use.total)}, {format_bytes(excess)} more than its {format_bytes(gpu.memory_bytes)}"
        )
    if not model.workspace_is_known:
        remarks.append("the program does not say what its kernels allocate while they run; that comes on top")
    longest = model.longest(gpu.memory_bytes, gpu.context_bytes)
    most = longest_possible(artifact)
    if longest is not None and most is not None:
        longest = min(longest, most)
    return GpuCheck(gpu, use, longest, worst, tuple(problems), tuple(remarks))


def _images(artifact: Artifact) -> list[KernelImage]:
    """The code of every kernel, once: methods may share a library."""
    libraries = {id(part.library): part.library for part in artifact.delegates if part.library}
    return [image for library in libraries.values() for image in library.images]


def _choose(images: list[KernelImage], gpu: Gpu) -> tuple[list[Kernel], list[str], list[str]]:
    """Return the kernels that a GPU would execute, and in words what it cannot and what was not seen."""
    chosen: list[Kernel] = []
    missing: list[KernelImage] = []
    compiled = unreadable = 0
    for image in images:
        found = image.for_gpu(gpu.capability)
        chosen += found
        if found:
            continue
        if any(architecture.runs_on(gpu.capability) for architecture in image.closed):
            unreadable += 1
        elif image.compiles_for(gpu.capability):
            compiled += 1
        else:
            missing.append(image)
    name = "sm_{}{}".format(*gpu.capability)
    problems, remarks = [], []
    if missing:
        kinds = sorted({str(kind) for image in missing for kind in image.architectures})
        problems.append(
            f"{len(missing)} of {len(images)} kernels do not run on {name}: they are for {', '.join(kinds)}"
        )
    if unreadable:
        remarks.append(f"compressed code was not read (kernels: {unreadable})")
    if compiled:
        remarks.append(f"there is only PTX for {name}, which its driver would compile at load (kernels: {compiled})")
    return chosen, problems, remarks
