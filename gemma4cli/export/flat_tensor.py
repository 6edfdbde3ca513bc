"""Writing ExecuTorch's data files (`.ptd`) of any size: everything is placed first, then written in any order.

ExecuTorch's own writer takes all data in memory. Here the flatbuffer in front follows from names, types and shapes
alone, and the bytes are written at their places, by several threads, in pieces of any size.

Every tensor starts on a page of its own. Tensors of zeros (caches that start empty) are one segment per size, shared by
all of that size as the format allows, at the end of the file and never written: a hole, which reads as zeros and takes
no disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma4cli.bulk_file import PAGE, BulkFile
from gemma4cli.errors import G4Error
from gemma4cli.files import require_free_space

ALIGNMENT = PAGE
_FLATBUFFER_ALIGNMENT = 16
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class DataTensor:
    """A contiguous tensor under a key; `is_zero` when all of it is 0."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    is_zero: bool = False


@dataclass(frozen=True)
class DataLayout:
    """A whole file before it is written.

    Attributes:
        header: its first bytes, up to the first tensor.
        offsets: key -> first byte in the file.
        written_bytes: what takes disk; the rest up to `file_bytes` is the hole.
    """

    header: bytes
    offsets: dict[str, int]
    written_bytes: int
    file_bytes: int


def lay_out(tensors: Sequence[DataTensor]) -> DataLayout:
    """Place tensors in their order, zeros last."""
    from executorch.exir.tensor import scalar_type_enum
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.flat_tensor_schema import DataSegment, NamedData

    segments: list[DataSegment] = []
    index: dict[str, int] = {}
    of_zeros: dict[int, int] = {}
    end = written = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.is_zero):
        shared = of_zeros.get(tensor.nbytes) if tensor.is_zero else None
        if shared is None:
            shared, start = len(segments), _aligned(end, ALIGNMENT)
            segments.append(DataSegment(start, tensor.nbytes))
            end = start + tensor.nbytes
            if tensor.is_zero:
                of_zeros[tensor.nbytes] = shared
            else:
                written = end
        index[tensor.key] = shared
    named = [
        NamedData(t.key, index[t.key], TensorLayout(scalar_type_enum(t.dtype), [*t.shape], [*range(len(t.shape))]))
        for t in tensors
    ]
    header = _header(segments, named, end)
    base = len(header)
    offsets = {tensor.key: base + segments[index[tensor.key]].offset for tensor in tensors}
    return DataLayout(header, offsets, base + written, base + end)


def _header(segments: list[object], named: list[object], data_bytes: int) -> bytes:
    """Serialize what stands before the data with ExecuTorch's own flatbuffer code; padded to ALIGNMENT."""
    from executorch.exir._serialize._program import _insert_flatbuffer_header
    from executorch.extension.flat_tensor.serialize import serialize
    from executorch.extension.flat_tensor.serialize.flat_tensor_schema import FlatTensor

    table = FlatTensor(serialize._FLAT_TENSOR_VERSION, segments, named)
    flatbuffer = bytes(serialize._serialize_to_flatbuffer(table))
    start = _aligned(serialize.FlatTensorHeader.EXPECTED_LENGTH, _FLATBUFFER_ALIGNMENT)
    base = _aligned(start + len(flatbuffer), ALIGNMENT)
    header = serialize.FlatTensorHeader(start, len(flatbuffer), base, data_bytes).to_bytes()
    return _insert_flatbuffer_header(flatbuffer, r"FT[0-9a-zA-Z][0-9a-zA-Z]", header.ljust(start, b"\0")).ljust(
        base, b"\0"
    )


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class DataWriter:
    """Bytes into a file that is being made; safe to use from several threads."""

    def __init__(self, file: BulkFile, layout: DataLayout) -> None:
        self.layout = layout
        self._file = file

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Write bytes of the tensor `key` from its byte `start` on."""
        self._file.write(data, self.layout.offsets[key] + start)


@contextlib.contextmanager
def writing(path: Path, layout: DataLayout) -> Iterator[DataWriter]:
    """Yield a writer for `path`, which appears when the block ends well; what is never written reads as zeros.

    Raises: G4Error before anything is written when the disk is too small, and when it refuses to take more.
    """
    require_free_space(path.parent, layout.written_bytes, f"Writing {path.name}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with BulkFile(partial, layout.file_bytes) as file:
            file.write(memoryview(layout.header), 0)
            yield DataWriter(file, layout)
            file.finish()
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in _DISK_ERRORS:
            raise
        raise G4Error(
            f"Writing {path.name} to {path.parent} failed: {os.strerror(error.errno)}.",
            hint="Make room and run the same command again.",
        ) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
