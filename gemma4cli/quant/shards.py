"""Writing safetensors shards whose size is known before their contents.

The safetensors library serializes tensors that are all in memory. Here the header of every shard follows from shapes
alone, so a shard is written tensor by tensor, each at its place, and memory holds one tensor. Quantized tensors are
laid out by torchao's own `flatten_tensor_state_dict`, run on the meta device, and torchao loads the result.

A shard being written is named `….partial`; its final name means that it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from gemma4cli.bulk_file import BulkFile, ThreadMemory
from gemma4cli.errors import G4Error
from gemma4cli.quant.manifest import FastFileRecord, FileRecord
from gemma4cli.quant.torchao_format import part_keys
from gemma4cli.quant.torchao_types import flatten_tensor_state_dict

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MEMORY = ThreadMemory()


@dataclass(frozen=True)
class ShardPlan:
    """One file: its name, its header, and where each piece of each tensor goes.

    Args:
        tensors: canonical name -> {attribute of the tensor, or "" for a plain one: key in the file}.
        spans: key in the file -> (first byte, past the last byte).
        nbytes: size of the whole file.
    """

    file: str
    header: bytes
    tensors: Mapping[str, Mapping[str, str]]
    spans: Mapping[str, tuple[int, int]]
    nbytes: int

    @property
    def data_bytes(self) -> int:
        return self.nbytes - len(self.header)


def plan_shards(layout: Mapping[str, Tensor], shard_bytes: int) -> list[ShardPlan]:
    """Divide tensors, in their order, into files of at most `shard_bytes` (a larger tensor gets a file of its own).

    Args:
        layout: canonical name -> tensor on the meta device, plain or of a class that torchao can flatten.
    """
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in layout.items():
        nbytes = stored_bytes(name, tensor)
        if parts[-1] and size + nbytes > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += nbytes
    return [_plan(f"model-{n:05d}-of-{len(parts):05d}.safetensors", part) for n, part in enumerate(parts, start=1)]


def stored_bytes(name: str, tensor: Tensor) -> int:
    """Return the bytes that a tensor's data takes in a checkpoint."""
    return sum(piece.nbytes for piece in flatten_tensor_state_dict({name: tensor})[0].values())


def shard_index(plans: list[ShardPlan]) -> dict[str, object]:
    """Return Hugging Face's `model.safetensors.index.json`: which file holds which key."""
    weight_map = {key: plan.file for plan in plans for pieces in plan.tensors.values() for key in pieces.values()}
    return {"metadata": {"total_size": sum(plan.data_bytes for plan in plans)}, "weight_map": weight_map}


def _plan(file: str, tensors: Mapping[str, Tensor]) -> ShardPlan:
    pieces, metadata = flatten_tensor_state_dict(dict(tensors))
    # Wide types first, as the safetensors library orders them: every piece then starts at a multiple of its item size.
    keys = sorted(pieces, key=lambda key: -pieces[key].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    spans, position = {}, 0
    for key in keys:
        piece = pieces[key]
        end = position + piece.nbytes
        spans[key] = (position, end)
        header[key] = {"dtype": _DTYPES[piece.dtype], "shape": list(piece.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return ShardPlan(
        file,
        len(text).to_bytes(8, "little") + text,
        {name: _tensor_keys(name, metadata) for name in tensors},
        {key: (start + begin, start + end) for key, (begin, end) in spans.items()},
        start + position,
    )


def _tensor_keys(name: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return attribute -> key of one tensor, "" -> name for a plain one."""
    attributes = json.loads(metadata[name]).get("_tensor_data_names")
    return {"": name} if attributes is None else part_keys(name, attributes)


class ShardWriter:
    """Writes one planned shard; as a context manager it leaves nothing open when something fails."""

    def __init__(self, folder: Path, plan: ShardPlan, *, fast: bool = False) -> None:
        """Start the file.

        Args: fast: take a CRC-32 on the way instead of a SHA-256 afterwards, and write past the page cache.
        Raises: G4Error, as everything here, when the disk cannot take more.
        """
        self._plan, self._fast = plan, fast
        self._path = folder / plan.file
        self._partial = folder / f"{plan.file}.partial"
        self._missing = {key: end - start for key, (start, end) in plan.spans.items()}
        self._lock = Lock()
        with explained(self._path):
            self._file = BulkFile(self._partial, plan.nbytes, past_cache=fast, checksum=fast)
        try:
            self._write(memoryview(plan.header), 0)
        except G4Error:
            self._file.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, whole or not."""
        self._file.close()

    def put(self, name: str, tensor: Tensor, *, but: str | None = None) -> None:
        """Write one tensor, or all of it but one attribute; its pieces must have the planned shapes and dtypes."""
        for attribute, key in self._plan.tensors[name].items():
            if attribute == but:
                continue
            piece = getattr(tensor, attribute) if attribute else tensor
            data = memoryview(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            start, end = self._plan.spans[key]
            assert data.nbytes == end - start, f"{key} has {data.nbytes} bytes, planned were {end - start}"
            self._put(key, 0, data)

    def put_rows(self, name: str, attribute: str, first: int, rows: np.ndarray) -> None:
        """Write some rows of a tensor's attribute (of itself: ""), the first of which is row `first` of the whole.

        Safe to call from several threads. rows: contiguous, its first dimension is the tensor's.
        """
        data = memoryview(rows.reshape(-1).view(np.uint8))
        self._put(self._plan.tensors[name][attribute], first * (data.nbytes // len(rows)), data)

    def memory(self, name: str, attribute: str, first: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return memory to put such rows into, from which `put_rows` writes them as they lie there.

        It is the calling thread's until it asks again.
        """
        start, _ = self._plan.spans[self._plan.tensors[name][attribute]]
        count = math.prod(shape) * dtype.itemsize
        return np.frombuffer(_MEMORY.take(start + first * (count // shape[0]), count), dtype).reshape(shape)

    def finish(self) -> FileRecord:
        """Make the shard durable and give it its final name."""
        unwritten = sorted(key for key, left in self._missing.items() if left)
        assert not unwritten, f"{self._plan.file} lacks {unwritten}"
        with explained(self._path):
            self._file.finish()
            os.replace(self._partial, self._path)
        if self._fast:
            return FastFileRecord(self._plan.nbytes, None, self._file.crc32())
        return FileRecord.of(self._path)

    def _put(self, key: str, offset: int, data: memoryview) -> None:
        start, end = self._plan.spans[key]
        assert start + offset + data.nbytes <= end, f"{key} has more bytes than planned"
        self._write(data, start + offset)
        with self._lock:
            self._missing[key] -= data.nbytes

    def _write(self, data: memoryview, offset: int) -> None:
        with explained(self._path):
            self._file.write(data, offset)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a disk that cannot take more into a sentence; the partial folder stays for the next run."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise G4Error(
            f"Writing {path.name} to {path.parent.parent} failed: {os.strerror(error.errno)}.",
            hint="Make room and run the same command again; what is finished is kept.",
        ) from None
