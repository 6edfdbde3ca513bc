"""Facts of GPU kernels against NVIDIA's own tool, ELF against pyelftools, launches against source code."""

from __future__ import annotations

import io
import re
import struct
import subprocess
from pathlib import Path

import pytest
import triton
import triton.language as tl
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from gemma4cli.inspection.cubin import Architecture, find_images, read_cubin
from gemma4cli.inspection.elf import Elf
from gemma4cli.inspection.flatbuffer import Malformed
from gemma4cli.inspection.library import read_library
from gemma4cli.kernels.compile import compile_kernel
from gemma4cli.kernels.targets import TARGETS
from tests.support.gpu_library import TOOLS, FakeKernel, build_library, cubin, fatbin

KERNELS = (
    FakeKernel("scale", static_shared=2048, dynamic_shared=4096, launches=3),
    FakeKernel("gather", local=64, warps=2),
    FakeKernel("reduce", dynamic_shared=70000, launches=2),
)
SCALE = KERNELS[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    images = {kernel.name: cubin(kernel, "sm_90a") for kernel in KERNELS}
    return build_library(tmp_path_factory.mktemp("library"), KERNELS, images)


def resource_usage(path: Path) -> tuple[int, ...]:
    """Registers, stack and local bytes, shared bytes, as NVIDIA's tool reports them."""
    report = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report.stdout)
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_facts_are_those_of_cuobjdump(kernel: FakeKernel, target: str, tmp_path: Path) -> None:
    data = cubin(kernel, target)
    (tmp_path / "kernel.cubin").write_bytes(data)
    found, size = read_cubin(memoryview(data))
    (facts,) = found.kernels
    reserved = 0 if target in ("sm_80", "sm_89") else 1024  # the tool counts what CUDA keeps for itself
    assert resource_usage(tmp_path / "kernel.cubin") == (
        facts.registers,
        facts.local_bytes,
        facts.static_shared_bytes + reserved,
    )
    assert (facts.entry, facts.threads, size) == (kernel.name, 32 * kernel.warps, len(data))
    assert facts.static_shared_bytes == kernel.static_shared
    assert facts.local_bytes >= kernel.local


@triton.jit
def double(x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(x_ptr + offsets, 2 * x, mask=offsets < n)


def test_facts_of_a_triton_kernel() -> None:
    arguments = {"x_ptr": "*fp32", "n": "i32", "BLOCK": 1024}
    code = compile_kernel(double, arguments, TARGETS["sm_90"], num_warps=2, num_stages=1)
    found, _ = read_cubin(memoryview(code.cubin))
    (facts,) = found.kernels
    assert (facts.registers, facts.local_bytes, facts.threads) == (code.registers, code.local_bytes, 64)
    assert facts.static_shared_bytes == 0


@pytest.mark.parametrize(
    "target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a"]
)
def test_architectures(target: str) -> None:
    assert str(read_cubin(memoryview(cubin(FakeKernel("k"), target)))[0].architecture) == target


@pytest.mark.parametrize(
    ("code", "gpu", "runs"),
    [
        (Architecture((8, 0), False), (8, 0), True),
        (Architecture((8, 0), False), (8, 9), True),
        (Architecture((8, 9), False), (8, 6), False),
        (Architecture((8, 0), False), (9, 0), False),
        (Architecture((9, 0), True), (9, 0), True),
        (Architecture((12, 0), True), (12, 1), False),
        (Architecture((12, 0), False), (12, 1), True),
    ],
)
def test_where_code_runs(code: Architecture, gpu: tuple[int, int], runs: bool) -> None:
    assert code.runs_on(gpu) is runs


def test_elf_files_are_read_as_pyelftools_reads_them(library: bytes) -> None:
    for data in (library, cubin(SCALE, "sm_80"), cubin(SCALE, "sm_120a")):
        ours, theirs = Elf(memoryview(data)), ELFFile(io.BytesIO(data))
        assert [(s.name, s.address, s.offset, s.size, s.info) for s in ours.sections] == [
            (s.name, s["sh_addr"], s["sh_offset"], s["sh_size"], s["sh_info"]) for s in theirs.iter_sections()
        ]
        table = next(s for s in theirs.iter_sections() if isinstance(s, SymbolTableSection))
        assert [(s.name, s.value, s.size) for s in ours.symbols] == [
            (s.name, s["st_value"], s["st_size"]) for s in table.iter_symbols()
        ]
        assert ours.flags == theirs.header["e_flags"]


def test_launches_and_shared_memory_are_read_off_stripped_host_code(library: bytes) -> None:
    found = {
        k.name: (k.launches, k.dynamic_shared_bytes, k.shared_bytes) for k in read_library(memoryview(library)).kernels
    }
    assert found == {"scale": (3, 4096, 6144), "gather": (1, 0, 0), "reduce": (2, 70000, 70000)}


@pytest.mark.parametrize("option", ["-O0", "-O2", "-O3"])
def test_host_code_is_understood_or_said_to_be_unknown(option: str, tmp_path: Path) -> None:
    """Never a wrong number, however the host code was compiled."""
    images = {kernel.name: cubin(kernel, "sm_90a") for kernel in KERNELS}
    data = build_library(tmp_path, KERNELS, images, option)
    for kernel, expected in zip(read_library(memoryview(data)).kernels, KERNELS, strict=True):
        assert kernel.launches in (expected.launches, None)
        assert kernel.dynamic_shared_bytes in (expected.dynamic_shared, None)


def test_a_library_without_names_has_the_entries_names(tmp_path: Path) -> None:
    data = build_library(tmp_path, [SCALE], {"scale": cubin(SCALE, "sm_80")}).replace(
        b"__scale_start", b"__other_thing"
    )
    (kernel,) = read_library(memoryview(data)).kernels
    assert (kernel.name, kernel.launches, kernel.dynamic_shared_bytes) == ("scale", None, None)


def test_a_fatbin_serves_several_gpus(tmp_path: Path) -> None:
    entries = [
        ("elf", "sm_80", cubin(SCALE, "sm_80"), False),
        ("elf", "sm_86", cubin(SCALE, "sm_86"), False),
        ("elf", "sm_90a", cubin(SCALE, "sm_90a"), False),
        ("ptx", "sm_80", b".version 8.0 ...", True),
        ("elf", "sm_120a", cubin(SCALE, "sm_120a"), True),
    ]
    found = read_library(memoryview(build_library(tmp_path, [SCALE], {"scale": fatbin(entries)})))
    assert found.architectures == ["sm_80", "sm_86", "sm_90a", "sm_120a"]
    (image,) = found.images
    chosen = {gpu: [str(k.architecture) for k in image.for_gpu(gpu)] for gpu in ((8, 0), (8, 9), (9, 0), (12, 0))}
    assert chosen == {(8, 0): ["sm_80"], (8, 9): ["sm_86"], (9, 0): ["sm_90a"], (12, 0): []}
    assert [str(a) for a in image.closed] == ["sm_120a"]
    assert image.compiles_for((10, 0)) and not image.compiles_for((7, 5))
    assert {k.launches for k in found.kernels} == {3}


def test_ptx_for_exactly_one_gpu_serves_no_other() -> None:
    images = find_images(memoryview(fatbin([("ptx", "sm_90a", b"ptx", False)])))
    assert [str(ptx) for ptx in images[0].ptx] == ["sm_90a"]


def test_a_program_without_gpu_code_has_none(tmp_path: Path) -> None:
    assert read_library(memoryview(build_library(tmp_path, [], {}))).images == ()


def corrupt(data: bytes, position: int, layout: str, value: int) -> memoryview:
    changed = bytearray(data)
    struct.pack_into(layout, changed, position, value)
    return memoryview(bytes(changed))


@pytest.mark.parametrize(
    ("position", "layout", "value", "sentence"),
    [
        (4, "B", 1, "it holds code that is not a 64-bit ELF file"),
        (40, "<Q", 2**62, "it holds an ELF file whose list of sections is damaged"),
        (62, "<H", 60000, "it holds an ELF file whose list of sections is damaged"),
        (18, "<H", 62, "it holds a fatbin with code for something that is not a GPU"),
    ],
)
def test_damaged_cubins_get_a_sentence(position: int, layout: str, value: int, sentence: str) -> None:
    with pytest.raises(Malformed, match=sentence):
        read_cubin(corrupt(cubin(SCALE, "sm_90a"), position, layout, value))


def test_damaged_sections_get_a_sentence() -> None:
    data = cubin(SCALE, "sm_90a")
    headers = struct.unpack_from("<Q", data, 40)[0]
    symbols = next(i for i, s in enumerate(Elf(memoryview(data)).sections) if s.name == ".symtab")
    info = next(s for s in Elf(memoryview(data)).sections if s.name == ".nv.info")
    with pytest.raises(Malformed, match="a section outside the file"):
        read_cubin(corrupt(data, headers + 64 * symbols + 24, "<Q", 2**40))
    with pytest.raises(Malformed, match="whose symbols have no names"):
        read_cubin(corrupt(data, headers + 64 * symbols + 40, "<I", 999))
    with pytest.raises(Malformed, match="whose list of attributes is damaged"):
        read_cubin(corrupt(data, info.offset + 2, "<H", 60000))


def test_names_that_overlap_over_and_over_are_refused() -> None:
    """Every symbol's name may be the whole table of names: a small file once meant gigabytes of text."""
    names, symbols = b"x" * 60_000, 20_000
    body = names + struct.pack("<IBBHQQ", 0, 0x12, 0x10, 1, 0, 0) * symbols
    sections = [(0, 0, 0, 0), (3, 64, len(names), 0), (2, 64 + len(names), 24 * symbols, 1)]
    headers = b"".join(struct.pack("<IIQQQQIIQQ", 59_999, k, 0, 0, o, n, link, 0, 0, 0) for k, o, n, link in sections)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 190, 1, 0, 0, 64 + len(body), 90, 64, 0, 0, 64, 3, 1
    )
    with pytest.raises(Malformed, match="whose names overlap over and over"):
        read_cubin(memoryview(head + body + headers))


def test_damaged_fatbins_get_a_sentence() -> None:
    data = fatbin([("elf", "sm_90a", cubin(SCALE, "sm_90a"), False)])
    for cut in (12, len(data) - 1):
        with pytest.raises(Malformed, match="it holds a fatbin that was cut off"):
            find_images(memoryview(data[:cut]))
    with pytest.raises(Malformed, match="it holds a fatbin with an entry outside it"):
        find_images(corrupt(data, 16 + 8, "<Q", 2**40))


def test_a_library_that_is_no_elf_file_gets_a_sentence() -> None:
    with pytest.raises(Malformed, match="it holds code that is not a 64-bit ELF file"):
        read_library(memoryview(b"MZ a Windows library" * 10))
