"""A shared library with GPU kernels, made like AOTInductor's: from PTX by Triton's ptxas, and host code by c++.

AOTInductor generates one `call_NAME` function per kernel, which loads the kernel from `__NAME_start` on first use and
passes the launcher a constant amount of shared memory; `run` calls them in order. The kernels are written by hand so
that what they need is known.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_PTX = """
.version {version}
.target {target}
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry {name}(.param .u64 out, .param .u32 index) .reqntid {threads}, 1, 1
{{
    .reg .u64 %d<8>; .reg .u32 %r<12>;
    {declare}
    ld.param.u64 %d1, [out];
    ld.param.u32 %r1, [index];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %d2, %r2, 4;
    add.u64 %d3, %d1, %d2;
    {body}
    st.global.u32 [%d3], %r9;
    ret;
}}
"""
_STATIC = (
    ".shared .align 4 .b8 tile[{bytes}];",
    "mov.u32 %r3, tile; shl.b32 %r4, %r2, 2; add.u32 %r5, %r3, %r4; st.shared.u32 [%r5], %r1; bar.sync 0; "
    "shl.b32 %r6, %r1, 2; add.u32 %r7, %r3, %r6; ld.shared.u32 %r9, [%r7];",
)
_LOCAL = (
    ".local .align 8 .b8 stack[{bytes}];",
    "mov.u64 %d4, stack; cvta.local.u64 %d4, %d4; mul.wide.u32 %d5, %r1, 4; add.u64 %d6, %d4, %d5; "
    "st.u32 [%d6], %r2; ld.u32 %r9, [%d4];",
)
_DYNAMIC = (
    "",
    "mov.u32 %r3, dynamic; shl.b32 %r4, %r2, 2; add.u32 %r5, %r3, %r4; st.shared.u32 [%r5], %r1; bar.sync 0; "
    "shl.b32 %r6, %r1, 2; add.u32 %r7, %r3, %r6; ld.shared.u32 %r9, [%r7];",
)
_HOST = """
#include <cstdint>
#include <string>
#include <vector>
extern "C" int cuModuleLoadData(void**, const void*);
extern "C" int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                              void**, void**);
namespace {{
struct Kernels {{ std::vector<void*> loaded; {members} }};
}}
static __attribute__((noinline)) void* loadKernel(const void* start, const std::string& name, uint32_t shared,
                                                  std::vector<void*>* modules) {{
    void* module = nullptr;
    if (cuModuleLoadData(&module, start)) throw name;
    modules->push_back(module);
    return shared > 1u << 20 ? nullptr : module;
}}
static __attribute__((noinline)) void launchKernel(void* f, uint32_t x, uint32_t y, uint32_t z, uint32_t warps,
                                                   uint32_t shared, void* args[], void* stream) {{
    if (cuLaunchKernel(f, x, y, z, 32 * warps, 1, 1, shared, stream, args, nullptr)) throw x;
}}
{callers}
extern "C" __attribute__((visibility("default"))) void run(Kernels& kernels, void* out, int64_t count, void* stream) {{
{calls}
}}
"""
_CALLER = """
extern "C" {{ extern const unsigned char __{name}_start[]; }}
static __attribute__((noinline)) void call_{name}(void* const& out, int64_t count, void* stream, Kernels& kernels_) {{
    uint32_t grid = (count + 127) / 128;
    if (grid == 0) return;
    if (kernels_.{name} == nullptr) {{
        kernels_.{name} = loadKernel(__{name}_start, "{entry}", {shared}, &kernels_.loaded);
    }}
    void* scratch = nullptr;
    void* args[] = {{const_cast<void**>(&out), &count, &scratch}};
    launchKernel(kernels_.{name}, grid, 1, 1, {warps}, {shared}, args, stream);
}}
"""


@dataclass(frozen=True)
class FakeKernel:
    """A kernel to make: what it needs per block (shared) and thread (local), and how often it is launched."""

    name: str
    static_shared: int = 0
    dynamic_shared: int = 0
    local: int = 0
    warps: int = 4
    launches: int = 1


@cache
def cubin(kernel: FakeKernel, target: str) -> bytes:
    """Compile a kernel for "sm_80", "sm_90a", "sm_120a", …"""
    number = int(target[3:].rstrip("a"))
    part, size = (
        (_STATIC, kernel.static_shared)
        if kernel.static_shared
        else (_LOCAL, kernel.local)
        if kernel.local
        else (_DYNAMIC, 0)
    )
    source = _PTX.format(
        version="8.7" if number >= 100 else "8.0",
        target=target,
        name=kernel.name,
        threads=32 * kernel.warps,
        declare=part[0].format(bytes=size),
        body=part[1],
    )
    tool = TOOLS / ("ptxas-blackwell" if number >= 100 else "ptxas")
    command = [tool, f"--gpu-name={target}", "/dev/stdin", "-o", "/dev/stdout"]
    return subprocess.run(command, input=source.encode(), capture_output=True, check=True).stdout


def fatbin(entries: Sequence[tuple[str, str, bytes, bool]]) -> bytes:
    """Bundle ("elf" or "ptx", "sm_90a", bytes, whether to call it compressed) as `fatbinary --create` does."""
    body = b""
    for kind, target, data, compressed in entries:
        flags = 0x11 | (0x100000 if target.endswith("a") else 0) | (0x8000 if compressed else 0)
        number = int(target[3:].rstrip("a"))
        data += bytes(-len(data) % 8)
        code = {"ptx": 1, "elf": 2}[kind]
        body += struct.pack("<HHIQIIHHIQQQQ", code, 0x101, 64, len(data), 0, 0, 7, 1, number, 0, flags, 0, 0) + data
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def build_library(folder: Path, kernels: Sequence[FakeKernel], images: Mapping[str, bytes], *options: str) -> bytes:
    """Compile and strip a library with `images` (kernel name -> cubin or fatbin) inside; returns its bytes."""
    assembly = ['.section .rodata,"a",@progbits']
    for name, data in images.items():
        (folder / f"{name}.bin").write_bytes(data)
        assembly.append(
            f'.balign 16\n.global __{name}_start\n__{name}_start:\n.incbin "{folder}/{name}.bin"\n'
            f".global __{name}_end\n__{name}_end:"
        )
    (folder / "images.S").write_text("\n".join([*assembly, '.section .note.GNU-stack,"",@progbits', ""]))
    host = _HOST.format(
        members=" ".join(f"void* {kernel.name} = nullptr;" for kernel in kernels),
        callers="".join(
            _CALLER.format(name=k.name, entry=k.name, shared=k.dynamic_shared, warps=k.warps) for k in kernels
        ),
        calls="\n".join(
            f"    call_{kernel.name}(out, count + {number}, stream, kernels);"
            for kernel in kernels
            for number in range(kernel.launches)
        ),
    )
    (folder / "host.cpp").write_text(host)
    command = ["c++", "-O1", "-fPIC", "-shared", "-s", *options, folder / "host.cpp", folder / "images.S"]
    subprocess.run([*command, "-o", folder / "library.so"], check=True, capture_output=True)
    return (folder / "library.so").read_bytes()
