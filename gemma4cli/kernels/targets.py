"""The GPUs a kernel can be compiled for, and the limits code needs to know about each: one table, once.

Sources: CUDA C++ Programming Guide, "Technical specifications per compute capability" (shared memory, threads, blocks,
registers); vendor data sheets (memory, bandwidth, boost clock); architecture whitepapers (tensor rate: bf16 with float32
sums, dense). The SM count, clock and bandwidth are those of the card named, the usual one of its architecture; the
compiled code depends on the architecture only.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

from gemma4cli.errors import G4Error

KIB = 1 << 10
GIB = 1 << 30


@dataclass(frozen=True)
class Target:
    """Limits of one GPU architecture, with the card it stands for.

    Attributes:
        name: what `--target` takes and what the artifact records, e.g. "sm_90".
        shared_bytes_per_block: opt-in limit of one thread block, bytes.
        shared_bytes_per_sm: shared memory of one multiprocessor, bytes.
        bandwidth: memory bandwidth of `card`, bytes per second (data sheet).
        clock: boost clock, cycles per second.
        blocks_per_sm: resident at most.
        tensor_flops_per_cycle: of one multiprocessor, products of bf16 with float32 sums.
    """

    name: str
    card: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: float
    clock: float
    blocks_per_sm: int
    tensor_flops_per_cycle: int
    registers_per_sm: int = 65536
    warp_size: int = 32

    @property
    def arch(self) -> int:
        """Compute capability as Triton and ptxas write it: 80, 90, 120."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before its predecessor has ended (dependent_launch.py): Hopper and later."""
        return self.capability >= (9, 0)


# fmt: off
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "sm_80", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * KIB, 164 * KIB, 2048, 40 << 20, 80 * GIB, 2.04e12,
            clock=1.41e9, blocks_per_sm=32, tensor_flops_per_cycle=2048,
        ),
        # Code for 8.6 also runs on the RTX 40 series (8.9), whose limits are the same.
        Target(
            "sm_86", "NVIDIA GeForce RTX 3090", (8, 6), 82, 99 * KIB, 100 * KIB, 1536, 6 << 20, 24 * GIB, 0.936e12,
            clock=1.695e9, blocks_per_sm=16, tensor_flops_per_cycle=512,
        ),
        Target(
            "sm_90", "NVIDIA H200", (9, 0), 132, 227 * KIB, 228 * KIB, 2048, 60 << 20, 141 * GIB, 4.8e12,
            clock=1.83e9, blocks_per_sm=32, tensor_flops_per_cycle=4096,
        ),
        Target(
            "sm_120", "NVIDIA GeForce RTX 5090", (12, 0), 170, 99 * KIB, 100 * KIB, 1536, 96 << 20, 32 * GIB, 1.79e12,
            clock=2.407e9, blocks_per_sm=24, tensor_flops_per_cycle=512,
        ),
    )
}
# fmt: on


DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_120")
"""What is compiled for when nothing is asked for and no GPU is there."""


_MIB = 1 << 20
_CONTEXT_BYTES = {(8, 0): 450 * _MIB, (8, 6): 350 * _MIB, (8, 9): 450 * _MIB}


def context_bytes(capability: tuple[int, int]) -> int:
    """Return what a CUDA process takes before it allocates anything.

    An empty CUDA 13 process, rounded up; depends on the driver. The largest known where we do not know.
    """
    return _CONTEXT_BYTES.get(capability, 550 * _MIB)


def get_target(name: str) -> Target:
    """Look a target up by name; the error lists the names there are."""
    try:
        return TARGETS[name]
    except KeyError:
        raise G4Error(f"Unknown GPU target {name!r}.", hint=f"Choose from {', '.join(TARGETS)}.") from None


def target_for_capability(capability: tuple[int, int]) -> Target:
    """Return the newest target whose code runs on a GPU of this compute capability (same major, minor not above)."""
    fitting = [t for t in TARGETS.values() if t.capability[0] == capability[0] and t.capability[1] <= capability[1]]
    if not fitting:
        raise G4Error(
            f"No target for a GPU of compute capability {capability[0]}.{capability[1]}.",
            hint=f"g4 builds for {', '.join(TARGETS)}.",
        )
    return max(fitting, key=lambda target: target.capability)


_CURRENT: contextvars.ContextVar[Target | None] = contextvars.ContextVar("gemma4cli_target", default=None)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Make `target` the one that kernels choose their configurations for, whatever GPU is (not) there."""
    token = _CURRENT.set(target)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_target() -> Target:
    """Return the target of ``compiling_for``, else that of the GPU at hand."""
    target = _CURRENT.get()
    if target is not None:
        return target
    import torch

    if not torch.cuda.is_available():
        raise G4Error("No GPU target is set and no GPU is there.", hint="Name one with --target, e.g. --target sm_90.")
    return target_for_capability(torch.cuda.get_device_capability())
