"""What AOTInductor compiled: a shared library whose host code launches the GPU kernels inside it.

Each kernel is launched by a function of its own, `call_NAME`, which loads it on first use (from the symbol
`__NAME_start`) and passes it a constant amount of shared memory. A stripped library still has all that is needed to see
this: the exported symbols, the relocations that refer to them, and the list of functions kept for exceptions
(`.eh_frame_hdr`). So launches and dynamic shared memory are read off the x86-64 code. Where the code does not look as
expected, they stay unknown (None); nothing is guessed.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass

from gemma4cli.inspection.cubin import Architecture, Image, KernelFacts, find_images
from gemma4cli.inspection.elf import Elf

_X86_64 = 62
_GLOB_DAT = 6
_START = re.compile(r"__(.+)_start")
_RELOCATION = struct.Struct("<QIIq")

# mov or lea of 64 bits from an address relative to the next instruction, which is 7 bytes after this one.
_RIP_RELATIVE = re.compile(rb"[\x48\x4c]([\x8b\x8d])[\x05\x0d\x15\x1d\x25\x2d\x35\x3d](?=(.{4}))", re.DOTALL)
_LEA = b"\x8d"
_CALL = re.compile(rb"[\xe8\xe9](?=(.{4}))", re.DOTALL)
# The sixth argument of launchKernel, in r9d: a constant, or zero made by xor.
_SHARED = re.compile(rb"\x41\xb9(.{4})|\x45\x31\xc9", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a library.

    Attributes:
        name: AOTInductor's; `facts.entry` is the name inside the cubin, which variants of a kernel share.
        dynamic_shared_bytes: of a block, as the host code passes it; None when that cannot be told.
        launches: places in the host code that launch it, so launches per call; None when that cannot be told.
    """

    name: str
    architecture: Architecture
    facts: KernelFacts
    sha256: str
    dynamic_shared_bytes: int | None
    launches: int | None

    @property
    def shared_bytes(self) -> int:
        """Static and, where it is known, dynamic shared memory of a block."""
        return self.facts.static_shared_bytes + (self.dynamic_shared_bytes or 0)


@dataclass(frozen=True)
class KernelImage:
    """All code that a library has for one kernel: for several architectures, perhaps as PTX, perhaps compressed."""

    kernels: tuple[Kernel, ...]
    ptx: tuple[Architecture, ...]
    closed: tuple[Architecture, ...]

    @property
    def architectures(self) -> set[Architecture]:
        return {*self.closed, *(kernel.architecture for kernel in self.kernels)}

    def for_gpu(self, capability: tuple[int, int]) -> tuple[Kernel, ...]:
        """Return what a GPU of this compute capability would execute; empty when there is nothing for it."""
        fitting = [kernel for kernel in self.kernels if kernel.architecture.runs_on(capability)]
        best = max((kernel.architecture.capability for kernel in fitting), default=None)
        return tuple(kernel for kernel in fitting if kernel.architecture.capability == best)

    def compiles_for(self, capability: tuple[int, int]) -> bool:
        """Whether a driver can compile its PTX for a GPU; "a" is for exactly one, and so no help to newer ones."""
        return any(not ptx.is_exact and ptx.capability <= capability for ptx in self.ptx)


@dataclass(frozen=True)
class Library:
    """GPU code of one library."""

    images: tuple[KernelImage, ...]

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel for image in self.images for kernel in image.kernels]

    @property
    def architectures(self) -> list[str]:
        """All architectures that some code is for, by number."""
        found = {architecture for image in self.images for architecture in image.architectures}
        return [str(architecture) for architecture in sorted(found, key=lambda a: (a.capability, a.is_exact))]


@dataclass(frozen=True)
class _Launcher:
    launches: int | None
    dynamic_shared_bytes: int | None


def read_library(data: memoryview) -> Library:
    """Find the kernels of a library.

    Raises: Malformed when it is no ELF file, or one whose parts lie outside it.
    """
    elf = Elf(data)
    images = find_images(data)
    addresses = {address: image for image in images if (address := elf.address_of(image.offset)) is not None}
    symbols = {symbol.value: match[1] for symbol in elf.symbols if (match := _START.fullmatch(symbol.name))}
    names = {address: name for address, name in symbols.items() if address in addresses}
    launchers = _launchers(elf, names) if elf.machine == _X86_64 else {}
    return Library(tuple(_kernel_image(image, names.get(elf.address_of(image.offset)), launchers) for image in images))


def _kernel_image(image: Image, name: str | None, launchers: dict[str, _Launcher]) -> KernelImage:
    launcher = launchers.get(name, _Launcher(None, None))
    kernels = tuple(
        Kernel(name or facts.entry, cubin.architecture, facts, cubin.sha256, launcher.dynamic_shared_bytes,
               launcher.launches)
        for cubin in image.cubins
        for facts in cubin.kernels
    )  # fmt: skip
    return KernelImage(kernels, image.ptx, image.closed)


def _launchers(elf: Elf, names: dict[int, str]) -> dict[str, _Launcher]:
    """Kernel name -> how the host code launches it. `names` are the kernels by the address of their code."""
    text, starts = elf.section(".text"), _function_starts(elf)
    if text is None or not starts:
        return {}
    code = bytes(elf.contents(text))
    slots = _got_slots(elf, names)
    users = defaultdict(set)  # first byte of a function -> kernels that it refers to
    for match in _RIP_RELATIVE.finditer(code):
        target = text.address + match.end() + 4 + _signed(match[2])
        name = names.get(target) if match[1] == _LEA else slots.get(target)
        if name is not None:
            users[_function_of(starts, text.address + match.start())].add(name)
    calls = Counter(text.address + match.end() + 4 + _signed(match[1]) for match in _CALL.finditer(code))
    owners = Counter(name for found in users.values() for name in found)
    launchers = {}
    for start, found in users.items():
        name = next(iter(found))
        if len(found) > 1 or owners[name] > 1 or not calls[start]:
            continue
        first = start - text.address
        after = bisect.bisect_right(starts, start)
        last = starts[after] - text.address if after < len(starts) else len(code)
        launchers[name] = _Launcher(calls[start], _shared_bytes(code[first:last]))
    return launchers


def _shared_bytes(function: bytes) -> int | None:
    amounts = {struct.unpack("<I", match[1])[0] if match[1] else 0 for match in _SHARED.finditer(function)}
    return amounts.pop() if len(amounts) == 1 else None


def _got_slots(elf: Elf, names: dict[int, str]) -> dict[int, str]:
    """Address of a slot that the loader fills with a kernel's address -> the kernel's name."""
    section = elf.section(".rela.dyn")
    slots = {}
    data = elf.contents(section) if section else elf.data[:0]
    for address, kind, index, _ in _RELOCATION.iter_unpack(data[: len(data) // _RELOCATION.size * _RELOCATION.size]):
        if kind == _GLOB_DAT and index < len(elf.symbols):
            name = names.get(elf.symbols[index].value)
            if name is not None:
                slots[address] = name
    return slots


def _function_starts(elf: Elf) -> list[int]:
    """Addresses of all functions, in order, from `.eh_frame_hdr` in the encoding that all Linux linkers use."""
    section = elf.section(".eh_frame_hdr")
    if section is None:
        return []
    data = elf.contents(section)
    if len(data) < 12 or bytes(data[:4]) != b"\x01\x1b\x03\x3b":
        return []
    (count,) = struct.unpack_from("<I", data, 8)
    if 12 + 8 * count > len(data):
        return []
    return sorted(section.address + start for start, _ in struct.iter_unpack("<ii", data[12 : 12 + 8 * count]))


def _function_of(starts: list[int], address: int) -> int:
    index = bisect.bisect_right(starts, address) - 1
    return starts[index] if index >= 0 else -1


def _signed(four: bytes) -> int:
    return struct.unpack("<i", four)[0]
