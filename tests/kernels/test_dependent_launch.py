"""Kernels that start early: what they do before their predecessor has ended, read off the code that Triton makes."""

from __future__ import annotations

import re

import pytest
import triton.language as tl

from gemma4cli.kernels.attention import wide
from gemma4cli.kernels.attention.configs import WideConfig, wide_config
from gemma4cli.kernels.compile import KernelCode, compile_kernel
from gemma4cli.kernels.targets import TARGETS, Target
from tests.kernels.test_decode_fusions import kernels as fused_kernels
from tests.kernels.test_quantized_matmul import compile_matvec, compile_pair

WAIT, START = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
READ, WRITTEN = r"\bld\.global", r"\b(st|atom|red)\.global|cp\.async"
# They read weights before, and older positions; the others read nothing.
READERS = ("matvec", "residual_norm", "head_rope", "ring_attention")


def kernels(target: Target) -> list[KernelCode]:
    """What a token of the 31B launches, but for ``wide.split``."""
    found = [*fused_kernels(target), *(compile_matvec(target, *fmt) for fmt in ((4, 32, True), (8, 32, False)))]
    # Long rows, two steps at a time, and rows that warps share.
    return [*found, *(compile_matvec(target, 4, 32, True, n=5376, k=k) for k in (21504, 8192))]


def compile_wide(target: Target, kind: str, stored: str, bits: int) -> KernelCode:
    config = wide_config(target, kind)
    assert isinstance(config, WideConfig)
    return compile_kernel(
        wide.split,
        {"q_ptr": "*bf16", "r_ptr": "*bf16", "k_ptr": stored, "k_scale_ptr": "*fp16", "v_ptr": stored,
         "v_scale_ptr": "*fp16", "position_ptr": "*i64", "partial_ptr": "*fp32", "top_ptr": "*fp32",
         "total_ptr": "*fp32", "S": "i32", "GROUP": 8, "D": 512, "R": 128, "SPLITS": config.splits,
         "STAGES": config.stages, "NW": config.num_warps, "FOLDED": True, "CODE_BITS": bits,
         "DOT": tl.float16 if bits else tl.bfloat16, "ASM": True, "PDL": target.dependent_launch},
        target, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


@pytest.mark.parametrize("target_name", ["sm_90", "sm_120"])
def test_nothing_is_written_before_the_wait(target_name: str) -> None:
    for code in kernels(TARGETS[target_name]):
        assert code.ptx.count(WAIT) == code.ptx.count(START) == 1, code.name
        before = code.ptx[: code.ptx.index(WAIT)]
        assert not re.search(WRITTEN, before), code.name
        assert bool(re.search(READ, before)) == (code.name in READERS), code.name
        assert re.search(READ, code.ptx[code.ptx.index(WAIT) :]), code.name


def test_each_half_of_a_pair_waits() -> None:
    """Two products in one launch: programs of one take one way through it, those of the other another."""
    code = compile_pair(TARGETS["sm_90"], (4, 32, True), (6, 16, False))
    assert (code.ptx.count(START), code.ptx.count(WAIT)) == (1, 2)
    before, first, second = code.ptx.split(WAIT)
    assert not re.search(WRITTEN, before)
    assert re.search(READ, before)
    for way in (first, second):
        assert re.search(r"\bst\.global", way)


@pytest.mark.parametrize(
    ("kind", "stored", "bits"), [("folded", "*bf16", 0), ("folded-q8", "*i8", 8), ("folded-tq4", "*u8", 4)]
)
def test_every_way_through_attention_waits(kind: str, stored: str, bits: int) -> None:
    """An empty share, one that holds the newest position, and one that fetches its first tile before it waits."""
    code = compile_wide(TARGETS["sm_90"], kind, stored, bits)
    assert (code.ptx.count(START), code.ptx.count(WAIT)) == (2, 3)
    before, rest = code.ptx.split(WAIT, 1)
    assert not re.search(r"\b(st|atom|red)\.global", before)
    assert re.search(r"cp\.async", rest[: rest.rindex(WAIT)])  # before the last one


def test_older_gpus_launch_in_plain_order() -> None:
    for code in (*kernels(TARGETS["sm_86"]), compile_wide(TARGETS["sm_86"], "folded-q8", "*i8", 8)):
        assert WAIT not in code.ptx and START not in code.ptx, code.name
