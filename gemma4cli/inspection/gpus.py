"""GPUs that a program can be checked against: a table of well-known ones, and the one in this machine.

Source: compute capability and shared memory from the CUDA C++ Programming Guide, as in `kernels/targets.py`; memory is
what `cuDeviceTotalMem` reports, which is less than the data sheet says (error correction, page tables).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from gemma4cli.errors import G4Error
from gemma4cli.files import format_bytes
from gemma4cli.kernels.targets import GIB, KIB, TARGETS, context_bytes


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


def _of_target(key: str, target: str, memory_gib: float) -> Gpu:
    card = TARGETS[target]
    return _card(key, card.card, card.capability, memory_gib, card.shared_bytes_per_block)


def _card(key: str, name: str, capability: tuple[int, int], memory_gib: float, shared_bytes_per_block: int) -> Gpu:
    memory = int(memory_gib * GIB)
    return Gpu(key, name, capability, memory, shared_bytes_per_block, context_bytes(capability))


THIS = "this"
GPUS: dict[str, Gpu] = {
    gpu.key: gpu
    for gpu in (
        _of_target("a100", "sm_80", 79.1),
        _card("h100", "NVIDIA H100", (9, 0), 79.1, 227 * KIB),
        _of_target("h200", "sm_90", 139.7),
        _of_target("3090", "sm_86", 23.6),
        _card("4090", "NVIDIA GeForce RTX 4090", (8, 9), 23.5, 99 * KIB),
        _of_target("5090", "sm_120", 31.3),
    )
}

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR, _SHARED_OPTIN = 75, 76, 97


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
    return Gpu(THIS, card, capability, memory.value, attribute(_SHARED_OPTIN), context_bytes(capability))


def describe(gpu: Gpu) -> str:
    """One line: name, architecture, memory, shared memory."""
    major, minor = gpu.capability
    return (
        f"{gpu.name}: sm_{major}{minor}, {format_bytes(gpu.memory_bytes)}, "
        f"{format_bytes(gpu.shared_bytes_per_block)} shared memory per block"
    )
