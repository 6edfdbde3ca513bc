"""From a checkpoint to a data file (`.ptd`) of packed weights: slab by slab, by several threads, in place.

The file depends on the weights and on the model's buffers only, and its size on the buffers alone. Memory holds a few
slabs, whatever the size of the model.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor, nn

from gemma4cli.bulk_file import PAGE
from gemma4cli.export.flat_tensor import DataLayout, DataTensor, DataWriter, lay_out, writing
from gemma4cli.export.packed import PARTS, PackedMatrix, PackedModel
from gemma4cli.kernels.quantized_matmul.format import PackedWeight
from gemma4cli.progress import SILENT, Progress
from gemma4cli.quant.checkpoint import Checkpoint
from gemma4cli.quant.gguf.checkpoint import GGUFCheckpoint
from gemma4cli.quant.gguf.pack import pack_rows
from gemma4cli.quant.pack import pack_weight
from gemma4cli.quant.tensors import dequantize

_PREFIX = "model."  # of a model within `export.trace.Step`
# What a thread packs at a time, at least: as many rows as make whole pages of every part are more.
_SLAB_WEIGHTS = 1 << 21
_MAX_THREADS = 8
_QUEUED_PER_THREAD = 3  # keeps threads busy across the ends of matrices, and bounds memory


@dataclass(frozen=True)
class WeightEntry:
    """One constant of a program as ExecuTorch looks it up; `is_state` for caches, which start as 0.

    Attributes:
        fqn: the name of the constant in the exported program.
        storage_key: its name in the `.ptd`.
    """

    fqn: str
    storage_key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    is_state: bool

    @property
    def path(self) -> str:
        """Its name in the model."""
        return self.fqn.removeprefix(_PREFIX)


def entries_of(
    model: nn.Module, storage_key: Callable[[str], str], is_state: Callable[[nn.Module], bool]
) -> list[WeightEntry]:
    """List every parameter and buffer of a model, in the order of the file."""
    entries = []
    for path, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            fqn = f"{_PREFIX}{path}.{name}"
            entries.append(
                WeightEntry(fqn, storage_key(fqn), tensor.dtype, tuple(tensor.shape), tensor.nbytes, is_state(module))
            )
    return entries


def layout_of(entries: Iterable[WeightEntry]) -> DataLayout:
    """Place the entries in a file."""
    return lay_out([DataTensor(e.storage_key, e.dtype, e.shape, e.nbytes, e.is_state) for e in entries])


def write_packed(
    path: Path,
    model: PackedModel,
    entries: list[WeightEntry],
    constants: Iterable[tuple[str, Tensor]],
    checkpoint: Checkpoint,
    progress: Progress = SILENT,
) -> None:
    """Pack a checkpoint into the data file `path`, which is whole afterwards or not there.

    Args:
        model: where everything belongs; its buffers are not read, so it may be on the meta device.
        entries: what the file holds: all of the model's buffers and parameters, or all but its state.
        constants: (path in the model, value) of what no checkpoint holds.
    Raises: G4Error when the disk is too small or fails, or a weight has no packed form.
    """
    total = sum(entry.nbytes for entry in entries if not entry.is_state)
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with (
        writing(path, layout_of(entries)) as writer,
        ThreadPoolExecutor(threads) as pool,
        progress.phase("pack", total) as task,
    ):
        packing = _Packing(model, entries, writer)
        for name, value in constants:
            task.advance(packing.put(name, 0, value))
        waiting: deque[tuple[str, Future[int]]] = deque()
        for name in checkpoint.names():
            for job in packing.jobs(name, checkpoint):
                waiting.append((name, pool.submit(job)))
                if len(waiting) > threads * _QUEUED_PER_THREAD:
                    done, count = waiting.popleft()
                    task.advance(count.result(), done)
        for done, count in waiting:
            task.advance(count.result(), done)
        packing.check_complete()


class _Packing:
    """Knows where every tensor of a checkpoint belongs, and puts it there."""

    def __init__(self, model: PackedModel, entries: list[WeightEntry], writer: DataWriter) -> None:
        self._model, self._writer = model, writer
        self._names = {module: name for name, module in model.named_modules()}
        self._entries = {entry.path: entry for entry in entries}
        self._written = dict.fromkeys(self._entries, 0)
        self._lock = Lock()

    def jobs(self, name: str, checkpoint: Checkpoint) -> Iterator[Callable[[], int]]:
        """Yield what there is to do for a tensor of the checkpoint; each job returns how many bytes it wrote."""
        place, part = self._model.place_of(name)
        prefix = f"{self._names[place]}."
        if not isinstance(place, PackedMatrix):
            yield from self._plain_jobs(prefix + part, getattr(place, part), checkpoint.tensor(name))
            return
        rows, prefetch, pack = _source(checkpoint, name, place.format.has_min)
        step = _slab_rows(place)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            prefetch(start, stop)
            yield partial(self._put_rows, prefix, place, int(part) + start, partial(pack, start, stop))

    def _plain_jobs(self, path: str, target: Tensor, tensor: Tensor) -> Iterator[Callable[[], int]]:
        rows = tensor.shape[0] if tensor.ndim == 2 else 1
        step = max(1, _SLAB_WEIGHTS // tensor.shape[-1]) if tensor.ndim == 2 else 1
        for start in range(0, rows, step):
            part = tensor[start : start + step] if tensor.ndim == 2 else tensor
            yield lambda start=start, part=part: self.put(path, start, dequantize(part, target.dtype))

    def check_complete(self) -> None:
        """Every byte but the caches' must have been written, once."""
        for path, entry in self._entries.items():
            wanted = 0 if entry.is_state else entry.nbytes
            assert self._written[path] == wanted, f"{path}: {self._written[path]} of {wanted} bytes were written"

    def _put_rows(self, prefix: str, place: PackedMatrix, first: int, pack: Callable[[], PackedWeight]) -> int:
        packed = pack()
        assert packed.format == place.format, f"{prefix} has {place.format}, not {packed.format}"
        parts = ((part, getattr(packed, part)) for part in PARTS)
        return sum(self.put(prefix + part, first, data) for part, data in parts if data is not None)

    def put(self, path: str, row: int, value: Tensor) -> int:
        """Write rows of a buffer, the first of which goes to `row`."""
        data = memoryview(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        row_bytes = data.nbytes // value.shape[0] if value.ndim else data.nbytes
        self._writer.write(self._entries[path].storage_key, row * row_bytes, data)
        with self._lock:
            self._written[path] += data.nbytes
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
