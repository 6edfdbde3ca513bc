"""Read ExecuTorch's data files (`.ptd`): names, layouts and places of tensors, not their contents.

Layout: a header after the first eight bytes, a flatbuffer (schema `executorch/extension/flat_tensor/serialize/
flat_tensor.fbs`), then segments.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma4cli.errors import G4Error
from gemma4cli.inspection.files import Span, map_file, naming, segment_spans
from gemma4cli.inspection.flatbuffer import Buffer, Malformed, Table
from gemma4cli.inspection.tensors import dtype_name, nbytes_of, sound_shape

IDENTIFIER = b"FT01"
_HEADER = b"FH01"
_HEADER_BYTES = 40
_SHOWN_NAME = 100


@dataclass(frozen=True, slots=True)
class DataEntry:
    """Named bytes; `dtype` and `shape` are None for what only a backend understands."""

    span: Span
    dtype: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class DataFile:
    """A `.ptd` file. Several names may stand for the same bytes."""

    path: Path
    data: memoryview
    entries: dict[str, DataEntry]

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, span: Span) -> memoryview:
        return self.data[span.offset : span.offset + span.size]


def read_data_file(path: Path) -> DataFile:
    """Read a `.ptd` file.

    Raises: G4Error naming the file and what is wrong with it.
    """
    data = map_file(path)
    if bytes(data[4:8]) != IDENTIFIER:
        raise G4Error(
            f"{path} is not an ExecuTorch data file: bytes 4 to 7 are {bytes(data[4:8])!r} instead of {IDENTIFIER!r}."
        )
    with naming(path):
        return DataFile(path, data, _entries(data))


def _entries(data: memoryview) -> dict[str, DataEntry]:
    if bytes(data[8:12]) != _HEADER or len(data) < 8 + _HEADER_BYTES:
        raise Malformed("it has no header")
    length, start, size, base, _ = struct.unpack_from("<IQQQQ", data, 12)
    if length < _HEADER_BYTES:
        raise Malformed(f"its header says to be {length} bytes long")
    if start + size > len(data) or base > len(data):
        raise Malformed(f"it has {len(data):,} of {max(start + size, base):,} bytes, so it was cut off")
    # The header was inserted into the flatbuffer, whose root offset still counts from the first byte of the file.
    root = Buffer(data[: start + size]).root()
    segments = segment_spans(root.tables(1, lambda t: Span(t.scalar(0, "Q"), t.scalar(1, "Q"))), base, len(data))
    return dict(root.tables(2, lambda t: _entry(t, segments)))


def _entry(table: Table, segments: Sequence[Span]) -> tuple[str, DataEntry]:
    key, index, layout = table.text(0) or "", table.scalar(1, "I"), table.table(2)
    shown = repr(key[:_SHOWN_NAME])
    if index >= len(segments):
        raise Malformed(f"{shown} refers to segment {index} of {len(segments)}")
    if layout is None:
        return key, DataEntry(segments[index], None, None)
    dtype, shape = dtype_name(layout.scalar(0, "b")), sound_shape(layout.numbers(1, "i"))
    if nbytes_of(dtype, shape) > segments[index].size:
        raise Malformed(f"{shown} has {segments[index].size:,} of {nbytes_of(dtype, shape):,} bytes")
    return key, DataEntry(segments[index], dtype, shape)
