"""Kernels that start early: what they do before their predecessor has ended, read off the code that Triton makes."""

from __future__ import annotations

import re

import pytest
import triton.language as tl

from gemma4cli.kernels.attention import decode
from gemma4cli.kernels.attention.configs import decode_config
from gemma4cli.kernels.compile import KernelCode, compile_kernel
from gemma4cli.kernels.targets import TARGETS, Target
from tests.kernels.test_decode_fusions import kernels as fused_kernels
from tests.kernels.test_quantized_matmul import compile_matvec, compile_pair

WAIT, START = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
READ, WRITTEN = r"\bld\.global", r"\b(st|atom|red)\.global|cp\.async"
# They read weights before, and older positions; the others read nothing.
READERS = ("matvec", "residual_norm", "head_rope", "ring_attention")


def kernels(target: Target) -> list[KernelCode]:
    """What a token of the 31B launches; full layers with a folded cache of either kind."""
    found = [*fused_kernels(target)]
    for kind, stored, number in (("folded", "*bf16", tl.bfloat16), ("folded-tq4", "*u8", tl.float16)):
        config = decode_config(target, 512, kind)
        found.append(compile_kernel(
            decode.split,
            {"q_ptr": "*bf16", "r_ptr": "*bf16", "k_ptr": stored, "k_scale_ptr": "*fp16", "v_ptr": stored,
             "v_scale_ptr": "*fp16", "position_ptr": "*i64", "partial_ptr": "*fp32", "top_ptr": "*fp32",
             "total_ptr": "*fp32", "S": "i32", "WINDOW": 0, "GROUP": 8, "D": 512, "R": 128, "HALF": 256, "R_HALF": 64,
             "SPLITS": config.splits, "BLOCK_S": config.block_s, "ROWS": 16, "FOLDED": True, "TQ4": stored == "*u8",
             "DOT": number, "ASM": True, "PDL": target.dependent_launch},
            target, num_warps=config.num_warps, num_stages=config.num_stages,
        ))  # fmt: skip
    found += [compile_matvec(target, *fmt) for fmt in ((4, 32, True), (8, 32, False))]
    # Long rows, two steps at a time, and rows that warps share.
    return [*found, *(compile_matvec(target, 4, 32, True, n=5376, k=k) for k in (21504, 8192))]


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


def test_older_gpus_launch_in_plain_order() -> None:
    for code in kernels(TARGETS["sm_86"]):
        assert WAIT not in code.ptx and START not in code.ptx, code.name
