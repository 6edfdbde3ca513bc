"""Predict how long a compiled kernel takes on a target that is not there.

A program's time on a multiprocessor that it shares with others like it is the longest of

    alone     what its own warp waits for: round trips to memory and dependent instructions (machine_code.py)
    issue     instructions, four a cycle
    tensor    products, at the tensor cores' rate
    nearby    bytes through shared memory and the first-level cache, 128 a cycle
    memory    bytes that must come from memory, at the bandwidth that a copy reaches

where all but the first grow with the number of programs that run together, and so bind when there are enough of them:
Little's law, with the bytes in flight not counted but followed from the round trips. They overlap imperfectly, so their
sum in a higher norm is taken instead of the largest. Programs come in waves of as many as fit; the last may be smaller.
No launch ends before the GPU has started all its programs, one after the other.

The constants are fitted on one H200 and used for every target; how well they do there is in bench/notes.md, and
tests/kernels/test_occupancy.py holds them to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma4cli.kernels.machine_code import Profile, Work
from gemma4cli.kernels.targets import Target

# Fitted together on bench/results/occupancy-h200.json: least mean |log(predicted / measured)|, the four kernels counting
# the same.
OVERLAP = 2.5  # exponent of the norm: 1 adds, infinity takes the largest
LAUNCH = 1.5e-6  # s: a launch's ramp and its last stores, in a graph and in plain order
LATENCY = 570  # cycles of a global load under load
STALLS = 2.0  # dependent instructions take so many times as long as those of a warp that is alone
TENSOR_EFFICIENCY = 0.65  # of the data sheet's rate
SPILLED = 1 / 1750  # a byte spilled per thread slows a kernel down by this part
# Measured in the same file: with one row a program, 16,384 to 262,144 rows take 1.2 to 1.3 ns each.
START = 2.2  # cycles of the GPU per program
COPY_EFFICIENCY = 0.89  # of the data sheet's bandwidth, read and written by a copy

# CUDA C++ Programming Guide and the architectures' tuning guides.
REGISTER_UNIT = 256  # registers are given to a warp in such pieces
SCHEDULERS = 4  # of a multiprocessor, each with a quarter of the registers
SHARED_RESERVED = 1024  # bytes of shared memory that every program takes beside its own
SHARED_UNIT = 128
L1_BYTES_PER_CYCLE = 128


@dataclass(frozen=True)
class Facts:
    """One configuration of a kernel, compiled for one target."""

    registers: int
    local_bytes: int
    shared_bytes: int
    warps: int
    profile: Profile

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Facts:
        once, loop = (None if work is None else Work(*work) for work in (row["once"], row["loop"]))
        assert once is not None
        return cls(row["registers"], row["local_bytes"], row["shared_bytes"], row["warps"], Profile(once, loop))


@dataclass(frozen=True)
class Load:
    """What one launch is given: programs, passes of the main loop in each, bytes that memory must deliver once."""

    programs: int
    passes: float
    memory_bytes: float


def resident_programs(facts: Facts, target: Target) -> int:
    """How many programs one multiprocessor holds at a time; 0 where not one fits."""
    if facts.shared_bytes > target.shared_bytes_per_block:
        return 0
    a_warp = math.ceil(facts.registers * target.warp_size / REGISTER_UNIT) * REGISTER_UNIT
    warps = target.registers_per_sm // SCHEDULERS // a_warp * SCHEDULERS
    shared = math.ceil(facts.shared_bytes / SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    return min(
        warps // facts.warps,
        target.threads_per_sm // (target.warp_size * facts.warps),
        target.shared_bytes_per_sm // shared,
        target.blocks_per_sm,
    )


def predict(facts: Facts, load: Load, target: Target) -> float:
    """Seconds of one launch."""
    resident = resident_programs(facts, target)
    if not resident:
        return math.inf
    places = resident * target.multiprocessors
    waves, rest = divmod(load.programs, places)
    cycles = waves * _wave(facts, load, target, resident)
    if rest:
        cycles += _wave(facts, load, target, rest / target.multiprocessors)
    return LAUNCH + max(cycles, load.programs * START) / target.clock


def _wave(facts: Facts, load: Load, target: Target, together: float) -> float:
    """Cycles of `together` programs on each multiprocessor (below 1: on fewer multiprocessors)."""
    once, loop, passes = facts.profile.once, facts.profile.loop, load.passes

    def total(name: str) -> float:
        return getattr(once, name) + (passes * getattr(loop, name) if loop else 0)

    warps = max(together, 1) * facts.warps
    moved = load.memory_bytes / load.programs * together * target.multiprocessors
    times = (
        total("round_trips") * LATENCY + total("cycles") * STALLS,
        warps * total("instructions") / SCHEDULERS,
        warps * total("tensor_flops") / (target.tensor_flops_per_cycle * TENSOR_EFFICIENCY),
        warps * (total("shared_bytes") + total("global_bytes")) / L1_BYTES_PER_CYCLE,
        moved / (target.bandwidth * COPY_EFFICIENCY) * target.clock,
    )
    largest = max(times)
    overlapped = largest * sum((time / largest) ** OVERLAP for time in times) ** (1 / OVERLAP)
    return overlapped * (1 + facts.local_bytes * SPILLED)
