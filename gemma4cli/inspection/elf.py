"""The little of ELF that GPU code needs: sections and symbols of 64-bit little-endian files, read in place.

Not pyelftools: a bundle has hundreds of small files inside its libraries, which takes that seconds, and what it raises
for damaged ones is not limited to its own errors. A test compares the two. Like flatbuffers, a file is read in time
proportional to its size, whatever its tables claim.
"""

from __future__ import annotations

import bisect
import struct
from dataclasses import dataclass
from functools import cached_property

from gemma4cli.inspection.flatbuffer import Malformed

_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_NOBITS, _SYMTAB, _DYNSYM = 8, 2, 11

# Names may be shared between symbols, so their lengths may add up to more than the file has; not to much more.
_READS_PER_BYTE = 8
_SLACK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    kind: int
    address: int
    offset: int
    size: int
    link: int
    info: int


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str
    kind: int
    other: int
    section: int
    value: int
    size: int


class Elf:
    """An ELF file at the start of `data`; what follows its end does not matter."""

    def __init__(self, data: memoryview) -> None:
        if len(data) < _HEADER.size or bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise Malformed("it holds code that is not a 64-bit ELF file")
        self.data = data
        self._budget = _READS_PER_BYTE * len(data) + _SLACK_BYTES
        ident, _, self.machine, _, _, headers, sections, self.flags, _, segment_bytes, segments, size, count, names = (
            _HEADER.unpack_from(data)
        )
        self.os_abi, self.abi_version = ident[7], ident[8]
        if count and (size != _SECTION.size or names >= count or sections + count * size > len(data)):
            raise Malformed("it holds an ELF file whose list of sections is damaged")
        raw = [_SECTION.unpack_from(data, sections + index * size) for index in range(count)]
        for _, kind, _, _, offset, length, *_ in raw:
            if kind != _NOBITS and offset + length > len(data):
                raise Malformed("it holds an ELF file with a section outside the file")
        names_at, names_size = (raw[names][4], raw[names][5]) if count else (0, 0)
        table = bytes(data[names_at : names_at + names_size])
        self.sections = [
            Section(self._string(table, name), kind, address, offset, length, link, info)
            for name, kind, _, address, offset, length, link, info, _, _ in raw
        ]
        ends = [s.offset + s.size for s in self.sections if s.kind != _NOBITS]
        self.size = max([_HEADER.size, sections + count * size, headers + segments * segment_bytes, *ends])

    @cached_property
    def symbols(self) -> list[Symbol]:
        """The symbols that dynamic linking needs, else (code for a GPU) all of them."""
        return self._symbols(_DYNSYM) or self._symbols(_SYMTAB)

    def _symbols(self, wanted: int) -> list[Symbol]:
        section = next((s for s in self.sections if s.kind == wanted), None)
        if section is None:
            return []
        if section.link >= len(self.sections):
            raise Malformed("it holds an ELF file whose symbols have no names")
        names = bytes(self.contents(self.sections[section.link]))
        return [
            Symbol(self._string(names, name), info & 15, other, index, value, size)
            for name, info, other, index, value, size in _SYMBOL.iter_unpack(
                self.data[section.offset : section.offset + section.size // _SYMBOL.size * _SYMBOL.size]
            )
        ]

    @cached_property
    def _by_name(self) -> dict[str, Section]:
        return {section.name: section for section in reversed(self.sections)}

    def section(self, name: str) -> Section | None:
        """Find a section by its name; the first one of that name."""
        return self._by_name.get(name)

    def contents(self, section: Section) -> memoryview:
        """Return a section's bytes; one that has none in the file is empty."""
        if section.kind == _NOBITS:
            return self.data[:0]
        return self.data[section.offset : section.offset + section.size]

    @cached_property
    def _loaded(self) -> list[Section]:
        """Sections with bytes in memory, by their place in the file."""
        return sorted((s for s in self.sections if s.address and s.kind != _NOBITS), key=lambda s: s.offset)

    def address_of(self, offset: int) -> int | None:
        """Return where a byte of the file lies when it is loaded."""
        index = bisect.bisect_right(self._loaded, offset, key=lambda section: section.offset) - 1
        if index < 0 or offset - self._loaded[index].offset >= self._loaded[index].size:
            return None
        return self._loaded[index].address + offset - self._loaded[index].offset

    def _string(self, table: bytes, start: int) -> str:
        end = table.find(b"\0", start)
        end = end if end >= 0 else len(table)
        self._budget -= max(0, end - start)
        if self._budget < 0:
            raise Malformed("it holds an ELF file whose names overlap over and over")
        return table[start:end].decode("utf-8", "backslashreplace")
