"""The little of ELF that GPU code needs: sections and symbols of 64-bit little-endian files, read in place.

Not pyelftools: a bundle has hundreds of small files inside its libraries, which takes that seconds, and what it raises
for damaged ones is not limited to its own errors. A test compares the two.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from gemma4cli.inspection.flatbuffer import Malformed

_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_NOBITS, _SYMTAB, _DYNSYM = 8, 2, 11


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
            Section(_string(table, name), kind, address, offset, length, link, info)
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
            Symbol(_string(names, name), info & 15, other, index, value, size)
            for name, info, other, index, value, size in _SYMBOL.iter_unpack(
                self.data[section.offset : section.offset + section.size // _SYMBOL.size * _SYMBOL.size]
            )
        ]

    def section(self, name: str) -> Section | None:
        """Find a section by its name."""
        return next((section for section in self.sections if section.name == name), None)

    def contents(self, section: Section) -> memoryview:
        """Return a section's bytes; one that has none in the file is empty."""
        if section.kind == _NOBITS:
            return self.data[:0]
        return self.data[section.offset : section.offset + section.size]

    def address_of(self, offset: int) -> int | None:
        """Return where a byte of the file lies when it is loaded."""
        for section in self.sections:
            if section.address and section.kind != _NOBITS and 0 <= offset - section.offset < section.size:
                return section.address + offset - section.offset
        return None


def _string(table: bytes, start: int) -> str:
    end = table.find(b"\0", start)
    return table[start : end if end >= 0 else len(table)].decode("utf-8", "backslashreplace")
