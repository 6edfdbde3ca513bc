"""GPUs that a program can be checked against: a table of well-known ones, and the one in this machine.

Source: compute capability and shared memory from the CUDA C++ Programming Guide, as in `kernels/targets.py`; memory is
what `cuDeviceTotalMem` reports, which is less than the data sheet says (error correction, page tables); the context is
what an empty CUDA 13 process occupies, rounded up, and depends on the driver.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.kernels.targets import GIB, KIB, TARGETS

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """What a program has to fit.

    Attributes:
        memory_bytes: in all, as the driver reports it.
        shared_bytes_per_block: opt-in limit.
        context_bytes: what a CUDA process takes before it allocates anything.
    """

    key: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    shared_bytes_per_block: int
    context_bytes: int


def _of_target(key: str, target: str, memory_gib: float, context_mib: int) -> Gpu:
    card = TARGETS[target]
    context, memory = context_mib * MIB, int(memory_gib * GIB)
    return Gpu(key, card.card, card.capability, memory, card.shared_bytes_per_block, context)


THIS = "this"
GPUS: dict[str, Gpu] = {
    gpu.key: gpu
    for gpu in (
        _of_target("a100", "sm_80", 79.1, 450),
        Gpu("h100", "NVIDIA H100", (9, 0), int(79.1 * GIB), 227 * KIB, 550 * MIB),
        _of_target("h200", "sm_90", 139.7, 550),
        _of_target("3090", "sm_86", 23.6, 350),
        Gpu("4090", "NVIDIA GeForce RTX 4090", (8, 9), int(23.5 * GIB), 99 * KIB, 450 * MIB),
        _of_target("5090", "sm_120", 31.3, 550),
    )
}

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR, _SHARED_OPTIN = 75, 76, 97
_CONTEXT_ELSEWHERE = 550 * MIB


def find_gpu(key: str) -> Gpu:
    """Look a GPU up by its short name; "this" asks the driver.

    Raises: G4Error for an unknown name, or when this machine has no GPU that CUDA can use.
    """
    if key.lower() == THIS:
        return this_gpu()
    try:
        return GPUS[key.lower()]
    except KeyError:
        raise G4Error(f"Unknown GPU {key!r}.", hint=f"Known: {', '.join(GPUS)}, {THIS}.", exit_code=2) from None


def this_gpu() -> Gpu:
    """Ask the CUDA driver about the first GPU it shows (CUDA_VISIBLE_DEVICES decides); makes no context."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise G4Error(
            f"This machine has no CUDA driver ({_DRIVER}).", hint=f"Check against one of {', '.join(GPUS)}."
        ) from None

    def call(function: str, *arguments: object) -> None:
        code = getattr(driver, function)(*arguments)
        if code:
            raise G4Error(
                f"The CUDA driver finds no usable GPU ({function}: error {code}).",
                hint="See what nvidia-smi says, and CUDA_VISIBLE_DEVICES.",
            )

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    call("cuInit", 0)
    device = ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = (attribute(_MAJOR), attribute(_MINOR))
    card = name.value.decode(errors="replace")
    context = next((gpu.context_bytes for gpu in GPUS.values() if gpu.capability == capability), _CONTEXT_ELSEWHERE)
    return Gpu(THIS, card, capability, memory.value, attribute(_SHARED_OPTIN), context)


def describe(gpu: Gpu) -> str:
    """One line: name, architecture, memory, shared memory."""
    major, minor = gpu.capability
    return (
        f"{gpu.name}: sm_{major}{minor}, {format_bytes(gpu.memory_bytes)}, "
        f"{format_bytes(gpu.shared_bytes_per_block)} shared memory per block"
    )
