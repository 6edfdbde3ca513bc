"""GPU code as the CUDA tools store it: cubins (ELF files) and fatbins that bundle them; facts of their kernels.

What a kernel needs is in its cubin: registers and stack in `.nv.info`, static shared memory as the size of
`.nv.shared.NAME`. Dynamic shared memory is not: whoever launches a kernel chooses it. NVIDIA does not document the
format; `cuobjdump -elf` shows it, and tests compare all numbers with `cuobjdump -res-usage`.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from gemma4cli.inspection.elf import Elf, Symbol
from gemma4cli.inspection.flatbuffer import Malformed

EM_CUDA = 190
_FATBIN_MAGIC = 0xBA55ED50
_START = re.compile(rb"\x7fELF\x02\x01\x01|\x50\xed\x55\xba\x01\x00\x10\x00")
_FATBIN_HEADER = struct.Struct("<IHHQ")
_FATBIN_ENTRY = struct.Struct("<HHIQIIHHIQQQQ")
_PTX, _CUBIN = 1, 2
_COMPRESSED, _EXACT = 0x2000 | 0x8000, 0x100000  # LZ4 or Zstandard; "a"

_ENTRY_POINT = 0x10
_FUNCTION = 2
_FRAME_SIZE, _MIN_STACK, _REGISTERS = 0x11, 0x12, 0x2F  # in .nv.info: (symbol, number)
_REQUIRED_THREADS, _MAX_THREADS = 0x10, 0x05  # in .nv.info.NAME: three numbers
_WITH_DATA = 4

# Up to ELF ABI 7 the lowest byte of e_flags is the architecture and a bit there says "a" (for exactly this one). From
# 8 on, which CUDA 13 writes for sm_100 and newer, it is the second byte, and `.nv.compat` says "a".
_NEW_ABI = 8
_EXACT_FLAG, _EXACT_ATTRIBUTE = 0x800, 0x09

# CUDA keeps the first KiB of a block's shared memory for itself from sm_80 on; limits per block are without it.
_RESERVED_SHARED_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a cubin was compiled for: "sm_90", or "sm_90a" for exactly that one."""

    capability: tuple[int, int]
    is_exact: bool

    def __str__(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}{'a' if self.is_exact else ''}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU executes it as it is: the same major version, and a minor one that is not below."""
        if self.is_exact:
            return capability == self.capability
        return capability[0] == self.capability[0] and capability[1] >= self.capability[1]


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """One kernel of a cubin.

    Attributes:
        local_bytes: stack per thread, which is spilled registers and arrays that did not fit; 0 is what one wants.
        threads: of a block, when the code demands or bounds it; else None.
    """

    entry: str
    registers: int
    local_bytes: int
    static_shared_bytes: int
    threads: int | None
    code_bytes: int


@dataclass(frozen=True)
class Cubin:
    """A cubin in a larger file: where it begins there, and its kernels. `sha256` is that of its bytes."""

    offset: int
    architecture: Architecture
    kernels: tuple[KernelFacts, ...]
    sha256: str


@dataclass(frozen=True)
class Image:
    """What one fatbin (or lone cubin) holds. `ptx` are versions that a driver can compile for newer GPUs.

    closed: architectures whose cubins are compressed, so that their kernels cannot be read.
    """

    offset: int
    cubins: tuple[Cubin, ...]
    ptx: tuple[Architecture, ...] = ()
    closed: tuple[Architecture, ...] = ()


def find_images(data: memoryview) -> list[Image]:
    """Find all GPU code in a library."""
    images, end = [], 0
    for match in _START.finditer(data):
        start = match.start()
        if start < end:
            continue  # inside the fatbin that was just read
        if data[start] == 0x50:
            image, end = _fatbin(data, start)
        else:
            if start + 20 > len(data) or struct.unpack_from("<H", data, start + 18)[0] != EM_CUDA:
                continue
            cubin, size = read_cubin(data, start)
            image, end = Image(start, (cubin,)), start + size
        images.append(image)
    return images


def _fatbin(data: memoryview, start: int) -> tuple[Image, int]:
    """Return a fatbin and where it ends."""
    if start + _FATBIN_HEADER.size > len(data):
        raise Malformed("it holds a fatbin that was cut off")
    _, _, header_bytes, size = _FATBIN_HEADER.unpack_from(data, start)
    position, end = start + header_bytes, start + header_bytes + size
    if end > len(data):
        raise Malformed("it holds a fatbin that was cut off")
    cubins, ptx, closed = [], [], []
    while position + _FATBIN_ENTRY.size <= end:
        kind, _, entry_bytes, payload, _, _, _, _, number, _, flags, _, _ = _FATBIN_ENTRY.unpack_from(data, position)
        if entry_bytes < _FATBIN_ENTRY.size or position + entry_bytes + payload > end:
            raise Malformed("it holds a fatbin with an entry outside it")
        architecture = Architecture(divmod(number, 10), bool(flags & _EXACT))
        if kind == _PTX:
            ptx.append(architecture)
        elif kind == _CUBIN and flags & _COMPRESSED:
            closed.append(architecture)
        elif kind == _CUBIN:
            cubins.append(read_cubin(data[: position + entry_bytes + payload], position + entry_bytes)[0])
        position += entry_bytes + payload
    return Image(start, tuple(cubins), tuple(ptx), tuple(closed)), end


def read_cubin(data: memoryview, start: int = 0) -> tuple[Cubin, int]:
    """Read the cubin that begins at `start`; returns it and its size in bytes."""
    elf = Elf(data[start:])
    if elf.machine != EM_CUDA:
        raise Malformed("it holds a fatbin with code for something that is not a GPU")
    architecture = _architecture(elf)
    numbers = _per_symbol(elf)
    entries = {
        symbol.name: (index, symbol)
        for index, symbol in enumerate(elf.symbols)
        if symbol.kind == _FUNCTION and symbol.other & _ENTRY_POINT
    }
    kernels = tuple(_kernel(elf, index, symbol, numbers) for index, symbol in entries.values())
    return Cubin(start, architecture, kernels, hashlib.sha256(elf.data[: elf.size]).hexdigest()), elf.size


def _architecture(elf: Elf) -> Architecture:
    if elf.abi_version < _NEW_ABI:
        return Architecture(divmod(elf.flags & 0xFF, 10), bool(elf.flags & _EXACT_FLAG))
    section = elf.section(".nv.compat")
    attributes = _attributes(elf.contents(section)) if section else ()
    is_exact = any(attribute == _EXACT_ATTRIBUTE and number == 1 for attribute, number, _ in attributes)
    return Architecture(divmod(elf.flags >> 8 & 0xFF, 10), is_exact)


def _kernel(elf: Elf, index: int, symbol: Symbol, numbers: dict[tuple[int, int], int]) -> KernelFacts:
    name = symbol.name
    local, shared, text = (elf.section(prefix + name) for prefix in (".nv.local.", ".nv.shared.", ".text."))
    registers = numbers.get((_REGISTERS, index))
    if registers is None:
        registers = text.info >> 24 if text else 0  # where CUDA before 10 kept it
    stack = max(numbers.get((_FRAME_SIZE, index), 0), numbers.get((_MIN_STACK, index), 0))
    reserved = _RESERVED_SHARED_BYTES if elf.section(".nv.shared.reserved.0") else 0
    return KernelFacts(
        entry=name,
        registers=registers,
        local_bytes=stack + (local.size if local else 0),
        static_shared_bytes=max(0, shared.size - reserved) if shared else 0,
        threads=_threads(elf, name),
        code_bytes=text.size if text else symbol.size,
    )


def _per_symbol(elf: Elf) -> dict[tuple[int, int], int]:
    """(attribute, symbol) -> number, from `.nv.info`."""
    section = elf.section(".nv.info")
    found = {}
    for attribute, _, value in _attributes(elf.contents(section)) if section else ():
        if attribute in (_FRAME_SIZE, _MIN_STACK, _REGISTERS) and len(value) == 8:
            symbol, number = struct.unpack("<II", value)
            found[attribute, symbol] = number
    return found


def _threads(elf: Elf, name: str) -> int | None:
    section = elf.section(f".nv.info.{name}")
    found = {attribute: value for attribute, _, value in _attributes(elf.contents(section))} if section else {}
    value = found.get(_REQUIRED_THREADS, found.get(_MAX_THREADS, b""))
    if len(value) != 12:
        return None
    x, y, z = struct.unpack("<III", value)
    return x * y * z


def _attributes(data: memoryview) -> Iterator[tuple[int, int, bytes]]:
    """Yield (attribute, number, data) of an information section; an attribute has either a number or data."""
    position = 0
    while position + 4 <= len(data):
        kind, attribute, number = struct.unpack_from("<BBH", data, position)
        position += 4
        size = number if kind == _WITH_DATA else 0
        if position + size > len(data):
            raise Malformed("it holds GPU code whose list of attributes is damaged")
        yield attribute, number, bytes(data[position : position + size])
        position += size
