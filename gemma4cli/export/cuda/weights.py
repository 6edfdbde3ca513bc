"""From a checkpoint to the `.ptd` of a CUDA program: one entry per buffer of ``CudaModel``, packed slab by slab.

The file depends on the weights and the signature only, and its size on the signature alone. Memory holds a few slabs,
whatever the size of the model.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor, nn

from gemma4cli.bulk_file import PAGE
from gemma4cli.export.cuda.layers import CudaCache, PackedMatrix, TurboQuant
from gemma4cli.export.cuda.model import CudaModel, Signature
from gemma4cli.export.flat_tensor import DataLayout, DataTensor, DataWriter, lay_out, writing
from gemma4cli.kernels.quantized_matmul.format import PackedWeight
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint
from gemma4cli.quant.gguf.pack import pack_rows
from gemma4cli.quant.pack import pack_weight

_PREFIX = "model."  # of CudaModel within `export.trace.Step`
_PARTS = ("codes", "high", "sub", "step")
# What a thread packs at a time, at least: as many rows as make whole pages of every part are more.
_SLAB_WEIGHTS = 1 << 21
_MAX_THREADS = 8
_QUEUED_PER_THREAD = 3  # keeps threads busy across the ends of matrices, and bounds memory


@dataclass(frozen=True)
class WeightEntry:
    """One constant of the program as ExecuTorch's CUDA delegate looks it up; `is_state` for caches, which start as 0.

    Attributes:
        fqn: the name of the constant in the exported program.
    """

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    is_state: bool

    @property
    def storage_key(self) -> str:
        """Its name in the `.ptd`, as `executorch/backends/cuda/cuda_weight_collector.py` forms it."""
        return f"cuda_fqn_weight:cuda:{self.fqn}"


def weight_entries(signature: Signature) -> list[WeightEntry]:
    """List every buffer and parameter of the program, in the order of the file but for the caches, which come last."""
    return _entries(_meta_model(signature))


def planned_bytes(signature: Signature) -> int:
    """Return what the `.ptd` takes on the disk. Its size as listed is larger: empty caches are a hole in it."""
    return _layout(weight_entries(signature)).written_bytes


def state_bytes(signature: Signature) -> int:
    """Return the bytes of all caches on the device."""
    return sum(entry.nbytes for entry in weight_entries(signature) if entry.is_state)


def write_weights(path: Path, signature: Signature, checkpoint: Checkpoint, progress: Progress = SILENT) -> None:
    """Pack a checkpoint into the data file `path`, which is whole afterwards or not there.

    Args: checkpoint: one whose signature this is.
    Raises: G4Error when the disk is too small or fails, or a weight has no packed form.
    """
    model = _meta_model(signature)
    entries = _entries(model)
    total = sum(entry.nbytes for entry in entries if not entry.is_state)
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with (
        writing(path, _layout(entries)) as writer,
        ThreadPoolExecutor(threads) as pool,
        progress.phase("pack", total) as task,
    ):
        packing = _Packing(model, writer)
        for name, value in _constants(model):
            task.advance(packing.put_plain(name, value))
        waiting: deque[tuple[str, Future[int]]] = deque()
        for name in checkpoint.names():
            for job in packing.jobs(name, checkpoint):
                waiting.append((name, pool.submit(job)))
                if len(waiting) > threads * _QUEUED_PER_THREAD:
                    done, count = waiting.popleft()
                    task.advance(count.result(), done)
        for done, count in waiting:
            task.advance(count.result(), done)
        packing.check_complete(entries)


class _Packing:
    """Knows where every tensor of a checkpoint belongs, and puts it there."""

    def __init__(self, model: CudaModel, writer: DataWriter) -> None:
        self._model, self._writer = model, writer
        self._names = {module: name for name, module in model.named_modules()}
        self._key = {entry.fqn.removeprefix(_PREFIX): entry.storage_key for entry in _entries(model)}
        self._written = dict.fromkeys(self._key, 0)
        self._lock = Lock()

    def jobs(self, name: str, checkpoint: Checkpoint) -> Iterator[Callable[[], int]]:
        """Yield what there is to do for a tensor of the checkpoint; each job returns how many bytes it wrote."""
        place, part = self._model.place_of(name)
        prefix = f"{self._names[place]}."
        if not isinstance(place, PackedMatrix):
            value = checkpoint.tensor(name).to(getattr(place, part).dtype)
            yield lambda: self.put_plain(prefix + part, value)
            return
        rows, prefetch, pack = _source(checkpoint, name, place.format.has_min)
        step = _slab_rows(place)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            prefetch(start, stop)
            yield partial(self._put_rows, prefix, place, int(part) + start, partial(pack, start, stop))

    def put_plain(self, name: str, value: Tensor) -> int:
        """Write a whole buffer."""
        return self._write(name, 0, value)

    def check_complete(self, entries: list[WeightEntry]) -> None:
        """Every byte but the caches' must have been written, once."""
        for entry in entries:
            name = entry.fqn.removeprefix(_PREFIX)
            wanted = 0 if entry.is_state else entry.nbytes
            assert self._written[name] == wanted, f"{name}: {self._written[name]} of {wanted} bytes were written"

    def _put_rows(self, prefix: str, place: PackedMatrix, first: int, pack: Callable[[], PackedWeight]) -> int:
        packed = pack()
        assert packed.format == place.format, f"{prefix} has {place.format}, not {packed.format}"
        parts = ((part, getattr(packed, part)) for part in _PARTS)
        return sum(self._write(prefix + part, first, data) for part, data in parts if data is not None)

    def _write(self, name: str, row: int, value: Tensor) -> int:
        """Write rows of a buffer, the first of which goes to `row`."""
        data = memoryview(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        row_bytes = data.nbytes // value.shape[0] if value.ndim else data.nbytes
        self._writer.write(self._key[name], row * row_bytes, data)
        with self._lock:
            self._written[name] += data.nbytes
        return data.nbytes


def _slab_rows(place: PackedMatrix) -> int:
    """Return how many rows to pack at a time: whole pages of every part, which are written from where they lie."""
    whole = max(PAGE // math.gcd(PAGE, part[0].nbytes) for part in place.buffers())
    return -(-_SLAB_WEIGHTS // (place.columns * whole)) * whole


def _source(
    checkpoint: Checkpoint, name: str, has_min: bool
) -> tuple[int, Callable[[int, int], None], Callable[[int, int], PackedWeight]]:
    """Return how many rows a matrix has, what asks the disk for some of them, and what packs them."""
    if isinstance(checkpoint, GGUFCheckpoint):
        source = checkpoint.source(name)
        return source.rows, source.prefetch, lambda start, stop: pack_rows(source, start, stop, has_min)
    tensor = checkpoint.tensor(name)
    return tensor.shape[0], _nothing, lambda start, stop: pack_weight(tensor[start:stop], name, has_min)


def _nothing(start: int, stop: int) -> None:
    """The system reads ahead by itself where a tensor is a mapping of its own."""


def _meta_model(signature: Signature) -> CudaModel:
    with torch.device("meta"):
        return CudaModel(signature)


def _entries(model: CudaModel) -> list[WeightEntry]:
    entries = []
    for path, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            fqn = f"{_PREFIX}{path}.{name}"
            entries.append(
                WeightEntry(fqn, tensor.dtype, tuple(tensor.shape), tensor.nbytes, isinstance(module, CudaCache))
            )
    return entries


def _layout(entries: list[WeightEntry]) -> DataLayout:
    return lay_out([DataTensor(e.storage_key, e.dtype, e.shape, e.nbytes, e.is_state) for e in entries])


def _constants(model: CudaModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what no checkpoint holds: the numbers that the architecture and the KV format bring along."""
    scale = model.config.hidden_size**0.5
    yield "constants.embed_scale", torch.tensor(scale).to(model.dtype)
    for kind, rotary in model.rotary_emb.items():
        yield f"rotary_emb.{kind}.inv_freq", rotary.inv_freq
    if model.turboquant is not None:
        sizes = [buffer.shape[0] for name, buffer in model.turboquant.named_buffers() if name != "table"]
        for name, buffer in _built_on_cpu(sizes).named_buffers():
            yield f"turboquant.{name}", buffer


def _built_on_cpu(sizes: list[int]) -> nn.Module:
    with torch.device("cpu"):
        return TurboQuant(sizes)
