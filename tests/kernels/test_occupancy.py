"""The model that chooses configurations for GPUs that are not there: what it is made of, how well it orders what was
timed on the GPU that is, and that the tables follow it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest

from gemma4cli.kernels.machine_code import Profile, Work, read_profile
from gemma4cli.kernels.occupancy import LATENCY, LAUNCH, STALLS, Facts, Load, predict, resident_programs
from gemma4cli.kernels.quantized_matmul.configs import matvec_config
from gemma4cli.kernels.targets import TARGETS
from tests.kernels.test_quantized_matmul import compile_matvec

ROOT = Path(__file__).resolve().parents[2]
STREAM = Work(instructions=100, round_trips=1, cycles=100, global_bytes=1024, shared_bytes=0, tensor_flops=0, dots=0)
FACTS = Facts(registers=72, local_bytes=0, shared_bytes=0, warps=1, profile=Profile(STREAM, None))


@pytest.mark.parametrize("name", ["sm_86", "sm_90"])
def test_machine_code_tells_what_a_program_multiplies(name: str) -> None:
    """A step is 16 blocks of 64 columns of each of a warp's rows: 8 words each, their nibbles in two products."""
    target = TARGETS[name]
    step = matvec_config(target, 5376, 5376).rows * 16 * 8 * 2 // 32
    short = read_profile(compile_matvec(target, 4, 32, True, k=5376).cubin)
    assert (short.loop, short.once.dots) == (None, 6 * step)
    long = read_profile(compile_matvec(target, 4, 32, True, k=21504).cubin)
    assert (long.once.dots, long.loop.dots) == (step, 2 * step)
    assert long.loop.round_trips < 2  # the weights of both steps of a pass are asked for together


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


@pytest.fixture(scope="module")
def choose_configs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choose_configs", ROOT / "tools" / "choose_configs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_model_orders_what_was_timed(choose_configs: ModuleType) -> None:
    """What it chooses is nearly the fastest: per kernel, means over the shapes that were timed, and per entry."""
    shapes, entries = choose_configs.check(ROOT / "bench" / "results" / "occupancy-h200.json")
    bounds = {"matvec": (0.70, 0.05), "wide": (0.85, 0.06), "matmul": (0.80, 0.02), "attend": (0.90, 0.06)}
    assert shapes.keys() == bounds.keys()
    for kernel, (correlation, regret) in bounds.items():
        assert mean(one.correlation for one in shapes[kernel]) > correlation, kernel
        assert mean(one.regret for one in shapes[kernel]) < regret, kernel
    # Two shapes of a tile lie close together there, and the model takes the wrong one.
    missed = {one.name for one in entries if one.regret >= 0.15}
    assert missed == {"prefill folded-q8"}


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"sm_90"}))
def test_every_entry_that_was_not_timed_is_nearly_the_models_best(name: str, choose_configs: ModuleType) -> None:
    model = choose_configs.Model(name)
    for entry in choose_configs.entries():
        slowness = choose_configs.mean_slowness(entry, model.seconds)
        if (entry.name, name) in (("decode plain", "sm_86"), ("decode plain", "sm_120")):
            assert not slowness  # nothing fits without spills: ``decode.split`` has such heads
            continue
        assert slowness[entry.present(model.target)] <= 1.02 * min(slowness.values()), entry.name
