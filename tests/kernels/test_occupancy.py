"""The model that chooses configurations for GPUs that are not there: what it is made of."""

from __future__ import annotations

import math
from dataclasses import replace

from gemma4cli.kernels.machine_code import Profile, Work
from gemma4cli.kernels.occupancy import LATENCY, LAUNCH, STALLS, Facts, Load, predict, resident_programs
from gemma4cli.kernels.targets import TARGETS

STREAM = Work(instructions=100, round_trips=1, cycles=100, global_bytes=1024, shared_bytes=0, tensor_flops=0, dots=0)
FACTS = Facts(registers=72, local_bytes=0, shared_bytes=0, warps=1, profile=Profile(STREAM, None))


def test_resident_programs_are_those_of_the_occupancy_calculator() -> None:
    a100, rtx3090, h200 = TARGETS["sm_80"], TARGETS["sm_86"], TARGETS["sm_90"]
    assert resident_programs(FACTS, h200) == 28  # 7 warps of 2,304 registers in each of 4 quarters of 16,384
    assert resident_programs(FACTS, rtx3090) == 16  # programs at most
    assert resident_programs(replace(FACTS, registers=32), a100) == 32
    assert resident_programs(replace(FACTS, registers=255, warps=8), h200) == 1
    assert resident_programs(replace(FACTS, registers=32, warps=8), h200) == 8
    assert resident_programs(replace(FACTS, shared_bytes=50 << 10), rtx3090) == 1  # two and 2 KiB are more than 100 KiB
    assert resident_programs(replace(FACTS, shared_bytes=100 << 10), rtx3090) == 0


def test_many_programs_take_as_long_as_memory_and_few_as_long_as_a_round_trip() -> None:
    target = TARGETS["sm_90"]
    many = predict(FACTS, Load(1 << 18, 0, 4e9), target) - LAUNCH
    assert 4e9 / target.bandwidth < many < 1.5 * 4e9 / target.bandwidth
    few = predict(FACTS, Load(8, 0, 8192), target) - LAUNCH
    alone = LATENCY + 100 * STALLS
    assert alone <= few * target.clock < 1.2 * alone
    assert predict(replace(FACTS, shared_bytes=1 << 20), Load(8, 0, 8192), target) == math.inf
