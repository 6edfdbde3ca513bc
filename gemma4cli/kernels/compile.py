"""Compile a kernel in Triton or Gluon for a target without a GPU, and read what the machine code needs.

`ptxas` and `cuobjdump` ship inside Triton's package; nothing is launched and no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from gemma4cli.kernels.targets import Target


@dataclass(frozen=True)
class KernelUsage:
    """What a block of one kernel needs: registers and local memory per thread, shared memory in bytes."""

    registers: int
    local_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class KernelCode:
    """One kernel compiled for one target.

    Attributes:
        shared_bytes: dynamic and static shared memory of a block.
        registers: per thread.
        local_bytes: per thread; anything above 0 is spilled registers or an array in local memory.
    """

    name: str
    target: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    registers: int
    local_bytes: int


def compile_kernel(
    kernel: triton.JITFunction,
    arguments: Mapping[str, Any],
    target: Target,
    *,
    num_warps: int,
    num_stages: int,
) -> KernelCode:
    """Compile `kernel` for `target`.

    Args:
        arguments: every parameter by name: a Triton type ("*bf16", "*i8", "i32"; "i32:16" for a multiple of 16) for a
            run-time argument, any other value for a constexpr one. Pointers are taken as 16-byte aligned, as PyTorch
            allocates them.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = value.removesuffix(":16")
            if value.startswith("*") or value.endswith(":16"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = source_type(kernel)(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, **register_limit(constants)}
    compiled = triton.compile(source, target=GPUTarget("cuda", target.arch, target.warp_size), options=options)
    registers, local_bytes = resource_usage(compiled.asm["cubin"])
    return KernelCode(
        name=compiled.metadata.name,
        target=target.name,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        local_bytes=local_bytes,
    )


def source_type(kernel: triton.JITFunction) -> type[ASTSource]:
    """Return what Triton's compiler is handed a kernel in: that tells Gluon from Triton's own language."""
    return GluonASTSource if kernel.is_gluon() else ASTSource


def register_limit(constants: Mapping[str, Any]) -> dict[str, int]:
    """Return Triton's option for a kernel whose constants name a limit (REGISTERS): launches have no such argument."""
    limit = constants.get("REGISTERS")
    return {"maxnreg": limit} if limit else {}


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers, local memory bytes) per thread of a cubin with one kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {report[:200]!r}")
    registers, stack, local = (int(group) for group in match.groups())
    return registers, stack + local
