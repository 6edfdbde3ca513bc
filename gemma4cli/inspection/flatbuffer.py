"""Read flatbuffers that nobody vouches for.

ExecuTorch's own reader goes through JSON text made by `flatc`, wants the whole file in memory and trusts every offset.
This one reads tables in place, checks every offset before it is followed, and does work proportional to the size of the
buffer: tables that point at each other again and again are refused (`Malformed`).

Source: FlatBuffers internals, "Format details" (flatbuffers.dev/internals).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# Writers may share a string between tables, never more; a sound buffer is read at most a few times over.
_READS_PER_BYTE = 8
_SLACK_BYTES = 64 << 10

_SCALARS = {code: struct.Struct("<" + code) for code in "bBhHiIqQfd?"}
_U16, _I32, _U32 = _SCALARS["H"], _SCALARS["i"], _SCALARS["I"]


class Malformed(Exception):
    """The bytes are not what their format says; the message completes "FILE is damaged: …"."""


class Buffer:
    """The bytes of one flatbuffer."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.size = len(data)
        self._budget = _READS_PER_BYTE * self.size + _SLACK_BYTES

    def root(self) -> Table:
        """Return the table that the first four bytes point to."""
        return Table(self, self.scalar(_U32, 0))

    def scalar(self, kind: struct.Struct, position: int) -> Any:
        """Read one number at a position."""
        if position < 0 or position + kind.size > self.size:
            raise Malformed(f"a value at byte {position:,} lies outside its {self.size:,} bytes")
        return kind.unpack_from(self.data, position)[0]

    def target(self, position: int) -> int:
        """Follow the offset stored at a position."""
        return position + self.scalar(_U32, position)

    def vector(self, position: int, item_bytes: int) -> tuple[int, int]:
        """Return (first byte, number of items) of the vector at a position."""
        count = self.scalar(_U32, position)
        if position + 4 + count * item_bytes > self.size:
            raise Malformed(f"a list of {count:,} items at byte {position:,} does not fit in {self.size:,} bytes")
        return position + 4, count

    def spend(self, count: int) -> None:
        """Account for bytes read; more than any sound buffer needs is a trap."""
        self._budget -= count
        if self._budget < 0:
            raise Malformed("its tables point at each other over and over")


class Table:
    """One table; fields go by their number in the schema, in order of declaration (a union counts twice)."""

    __slots__ = ("_buffer", "_position", "_size", "_vtable", "_vtable_size")

    def __init__(self, buffer: Buffer, position: int) -> None:
        vtable = position - buffer.scalar(_I32, position)
        vtable_size = buffer.scalar(_U16, vtable)
        size = buffer.scalar(_U16, vtable + 2)
        if vtable_size < 4 or vtable + vtable_size > buffer.size or size < 4 or position + size > buffer.size:
            raise Malformed(f"the table at byte {position:,} lies outside its {buffer.size:,} bytes")
        buffer.spend(size)
        self._buffer, self._position, self._size = buffer, position, size
        self._vtable, self._vtable_size = vtable, vtable_size

    def _field(self, number: int, size: int) -> int | None:
        slot = 4 + 2 * number
        if slot + 2 > self._vtable_size:
            return None
        offset = self._buffer.scalar(_U16, self._vtable + slot)
        if offset == 0:
            return None
        if offset < 4 or offset + size > self._size:
            raise Malformed(f"field {number} of the table at byte {self._position:,} lies outside it")
        return self._position + offset

    def scalar(self, number: int, code: str, default: Any = 0) -> Any:
        """Read a number; `code` as in the struct module."""
        kind = _SCALARS[code]
        position = self._field(number, kind.size)
        return default if position is None else self._buffer.scalar(kind, position)

    def table(self, number: int) -> Table | None:
        """Read a table; None when it is not there."""
        position = self._field(number, 4)
        return None if position is None else Table(self._buffer, self._buffer.target(position))

    def tables(self, number: int, make: Callable[[Table], T]) -> list[T]:
        """Read a list of tables through `make`; an absent list is empty."""
        first, count = self._vector(number, 4)
        self._buffer.spend(4 * count)
        return [make(Table(self._buffer, self._buffer.target(first + 4 * index))) for index in range(count)]

    def numbers(self, number: int, code: str) -> tuple[Any, ...]:
        """Read a list of numbers."""
        item_bytes = _SCALARS[code].size
        first, count = self._vector(number, item_bytes)
        self._buffer.spend(item_bytes * count)
        return struct.unpack_from(f"<{count}{code}", self._buffer.data, first)

    def span(self, number: int) -> tuple[int, int] | None:
        """Return (first byte, length) of a list of bytes, without reading them."""
        position = self._field(number, 4)
        return None if position is None else self._buffer.vector(self._buffer.target(position), 1)

    def data(self, number: int) -> bytes:
        """Read a list of bytes; an absent one is empty."""
        found = self.span(number)
        if found is None:
            return b""
        first, count = found
        self._buffer.spend(count)
        return bytes(self._buffer.data[first : first + count])

    def text(self, number: int) -> str | None:
        """Read a string; None when it is not there."""
        if self._field(number, 4) is None:
            return None
        try:
            return self.data(number).decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"field {number} of the table at byte {self._position:,} is not text") from None

    def _vector(self, number: int, item_bytes: int) -> tuple[int, int]:
        position = self._field(number, 4)
        return (0, 0) if position is None else self._buffer.vector(self._buffer.target(position), item_bytes)
