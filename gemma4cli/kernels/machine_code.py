"""What one warp of a compiled kernel does, read from its machine code: how much it asks of each unit of a
multiprocessor, and how long it takes when it is alone.

The time alone comes from walking the instructions in order, as a warp does: an instruction waits until the registers it
reads are there. It has the form ``round_trips * latency + cycles``, where round trips are the global loads' latencies
that nothing of the warp's own covers: a kernel that has all loads in flight at once has one, whatever their number.
Around the instructions' latencies (of which only those of tens of cycles matter) all is read, nothing fitted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LATENCY = {"LDS": 29, "LDSM": 29, "LDL": 33, "SHFL": 24, "MUFU": 22, "I2F": 14, "F2F": 14, "F2I": 14, "HMMA": 33,
           "BAR": 20}  # fmt: skip
"""Cycles until the result is there (microbenchmarks: arXiv 1804.06826, 2206.02874, 2402.13499); others take 5."""
LATENCY_OTHERS = 5
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z0-9_.x]+)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


@dataclass(frozen=True)
class Work:
    """What one pass over a piece of code asks for, per warp.

    Attributes:
        instructions: issued.
        round_trips, cycles: the time alone is round_trips * latency of a global load + cycles.
        global_bytes: of global loads and stores, as the first-level cache sees them.
        shared_bytes: read and written in shared memory, by the warp or by tensor instructions on its behalf.
        tensor_flops: of tensor-core instructions.
        dots: of dp4a instructions.
    """

    instructions: float
    round_trips: float
    cycles: float
    global_bytes: float
    shared_bytes: float
    tensor_flops: float
    dots: float


@dataclass(frozen=True)
class Profile:
    """A warp's code outside its main loop, and one pass of that loop (None: no loop does the kernel's work)."""

    once: Work
    loop: Work | None


@dataclass(frozen=True)
class _Instruction:
    address: int
    op: str
    operands: str

    @cached_property
    def registers(self) -> list[tuple[int, bool]]:
        """Numbers of the registers named, and whether each stands for itself and the next."""
        return [(int(number), bool(pair)) for number, pair in _REGISTER.findall(self.operands)]

    @cached_property
    def kind(self) -> str:
        return self.op.split(".")[0]

    @cached_property
    def width(self) -> int:
        """Bytes a thread of a load or store."""
        return next((int(bits) // 8 for bits in ("128", "64") if bits in self.op.split(".")), 4)

    @property
    def global_bytes(self) -> int:
        return 32 * self.width if self.kind in ("LDG", "STG", "LDGSTS") else 0

    @cached_property
    def tensor_flops(self) -> float:
        if self.kind == "HMMA":
            return 2 * 16 * 8 * (16 if "16816" in self.op else 8)
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.op)
        # A warpgroup's four warps each carry the instruction.
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4 if shape else 0

    @property
    def shared_bytes(self) -> float:
        if self.kind == "LDSM":
            return 128 * int(self.op[-1]) if self.op[-1].isdigit() else 128
        if self.kind in ("LDS", "STS", "LDGSTS", "LDL", "STL"):
            return 32 * self.width
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.op)
        if not shape:
            return 0
        first = self.operands.split(",")[1]  # the left operand: registers or shared memory
        rows = int(shape[2]) + (int(shape[1]) if "gdesc" in first else 0)
        return 2 * rows * int(shape[3]) / 4


def read_profile(cubin: bytes) -> Profile:
    """Read a cubin with one kernel."""
    return _profile(_disassemble(cubin))


def _disassemble(cubin: bytes) -> list[_Instruction]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = (_INSTRUCTION.match(line) for line in listing.splitlines())
    return [_Instruction(int(match[1], 16), match[3], match[4].strip()) for match in found if match]


def _profile(code: list[_Instruction]) -> Profile:
    end = max(i for i, one in enumerate(code) if one.kind == "EXIT") + 1
    code = [one for one in code[:end] if one.kind != "NOP"]
    loop = _main_loop(code)
    if loop is None:
        return Profile(_work(code, _walk(code, 0), _walk(code, 1)), None)
    body = code[slice(*loop)]
    before, after = code[: loop[0]], code[loop[1] :]
    # A loop's steady state: what a second and third pass add to the first.
    passes = [[_walk(before + body * count, latency) for count in (1, 3)] for latency in (0, 1)]
    each = [(three - one) / 2 for one, three in passes]
    rest = [_walk(before + body, latency) - each[latency] + _walk(after, latency) for latency in (0, 1)]
    return Profile(_work(before + after, *rest), _work(body, *each))


def _main_loop(code: list[_Instruction]) -> tuple[int, int] | None:
    """The innermost loop with the most products, as a slice of `code`."""
    index = {one.address: i for i, one in enumerate(code)}
    loops = []
    for i, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.kind == "BRA" else None
        if target and int(target[1], 16) in index and index[int(target[1], 16)] < i:
            start = index[int(target[1], 16)]
            loops.append((_products(code[start : i + 1]), -(i + 1 - start), start, i + 1))
    best = max(loops, default=None)
    return (best[2], best[3]) if best and best[0] > 0 else None


def _products(code: Iterable[_Instruction]) -> float:
    return sum(one.tensor_flops or 256 * (one.kind == "IDP") for one in code)


def _work(code: list[_Instruction], alone: float, alone_with_latency: float) -> Work:
    return Work(
        instructions=len(code),
        round_trips=(alone_with_latency - alone) / _PROBE,
        cycles=alone - (alone_with_latency - alone) / _PROBE * _BASE,
        global_bytes=sum(one.global_bytes for one in code),
        shared_bytes=sum(one.shared_bytes for one in code),
        tensor_flops=sum(one.tensor_flops for one in code),
        dots=sum(one.kind == "IDP" for one in code),
    )


_BASE, _PROBE = 700.0, 50.0
"""Cycles of latency at which the time alone is taken, and by how many they are raised to see it follow."""


def _walk(code: list[_Instruction], probe: int) -> float:
    """Cycles until a warp that is alone has issued `code` and its results are there."""
    latency = _BASE + probe * _PROBE
    now, last = 0.0, 0.0
    ready: dict[int, float] = {}
    copies: list[float] = []  # when each closed group of asynchronous copies is there
    open_copy, open_product, tensor_free = 0.0, 0.0, 0.0
    products: list[float] = []
    for one in code:
        stores = one.kind in ("STG", "STS", "STL", "BRA", "LDGSTS", "HGMMA")
        sources = one.registers if stores else one.registers[1:]
        now += 1
        for number, pair in sources:
            for each in range(number, number + (2 if pair else _source_width(one))):
                now = max(now, ready.get(each, 0.0))
        if one.kind == "LDGSTS":
            open_copy = now + latency
        elif one.kind == "LDGDEPBAR":
            copies.append(open_copy)
        elif one.kind == "DEPBAR" and "SB0" in one.operands and copies:
            kept = int(one.operands.rsplit(",")[-1].strip(), 16)
            now = max(now, *copies[: len(copies) - kept or None]) if kept < len(copies) else now
        elif one.kind == "HGMMA":
            # Half of what a multiprocessor does: the other warpgroup's products come between.
            tensor_free = max(tensor_free, now) + one.tensor_flops * 4 / 4096
            open_product = tensor_free + LATENCY["HMMA"]
            if "gsb" in one.operands:
                products.append(open_product)
        elif one.kind == "WARPGROUP" and "DEPBAR" in one.op and products:
            kept = int(one.operands.rsplit(",")[-1].strip(), 16)
            now = max(now, *products[: len(products) - kept or None]) if kept < len(products) else now
        elif one.registers and not stores:
            result = now + (latency if one.kind == "LDG" else LATENCY.get(one.kind, LATENCY_OTHERS))
            last = max(last, result)
            first = one.registers[0][0]
            for each in range(first, first + _result_width(one)):
                ready[each] = result
    return max(now, last)


def _source_width(one: _Instruction) -> int:
    return 4 if one.kind == "HMMA" else one.width // 4 if one.kind in ("STG", "STS", "STL") else 1


def _result_width(one: _Instruction) -> int:
    if one.kind == "LDSM":
        return int(one.op[-1]) if one.op[-1].isdigit() else 1
    if one.kind in ("LDG", "LDS", "LDL"):
        return one.width // 4
    return 4 if one.kind == "HMMA" else 2 if "WIDE" in one.op else 1
