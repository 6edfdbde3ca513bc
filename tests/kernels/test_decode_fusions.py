"""The kernels between a decoded token's products, compiled for every target, and as operators on the CPU."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from gemma4cli.kernels.attention import attend, decode, decode_attention_int8
from gemma4cli.kernels.attention.cache import AttentionCache
from gemma4cli.kernels.attention.configs import COMBINE_BLOCK_D, wide_config
from gemma4cli.kernels.compile import KernelCode, compile_kernel
from gemma4cli.kernels.gated_gelu import kernel as gelu_kernel
from gemma4cli.kernels.gated_gelu.configs import gated_gelu_config
from gemma4cli.kernels.head_rope import WARPS, head_rope
from gemma4cli.kernels.head_rope import kernel as rope_kernel
from gemma4cli.kernels.quantized_matmul import quantize
from gemma4cli.kernels.residual_norm import kernel as norm_kernel
from gemma4cli.kernels.residual_norm.configs import residual_norm_config
from gemma4cli.kernels.ring_attention import WARPS as RING_WARPS
from gemma4cli.kernels.ring_attention import kernel as ring_kernel
from gemma4cli.kernels.targets import TARGETS, Target, compiling_for, get_target

ROWS = {"xq_ptr": "*i32", "scale_ptr": "*fp32", "total_ptr": "*fp32"}
NORM = {"residual_ptr": "*bf16", "branch_ptr": "*bf16", "branch_weight_ptr": "*bf16", "factor_ptr": "*bf16",
        "weight_ptr": "*bf16", "hidden_ptr": "*bf16", **ROWS, "eps": "fp32"}  # fmt: skip
HEADS = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "q_weight_ptr": "*bf16", "k_weight_ptr": "*bf16",
         "cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64", "k_cache_ptr": "*bf16", "v_cache_ptr": "*bf16",
         "eps": "fp32", "S": "i32"}  # fmt: skip
ROPE = {**HEADS, "q_out_ptr": "*bf16", "r_out_ptr": "*bf16"}
SHARES = {"partial_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32"}
OUTPUT = {"xq_ptr": "*i32", "scale_ptr": "*fp32", "sums_ptr": "*fp32"}


def kernels(target: Target) -> list[KernelCode]:
    """All of them in the 31B's shapes."""
    norm, gelu = residual_norm_config(target), gated_gelu_config(target)
    made = [
        compile_kernel(
            ring_kernel.ring_attention,
            {**HEADS, **SHARES, **OUTPUT, "arrived_ptr": "*i32", "WINDOW": 1024, "GROUP": 2, "D": 256,
             "SPLITS": 1024 // (16 * RING_WARPS), "NW": RING_WARPS, "dtype": tl.bfloat16, "DOT": tl.bfloat16, "ASM": True,
             "PDL": target.dependent_launch},
            target, num_warps=RING_WARPS, num_stages=1,
        ),
        compile_kernel(
            norm_kernel.residual_norm,
            {**NORM, "K": 5376, "BLOCK_K": 8192, "BLOCK_G": norm.groups, "HAS_BRANCH": True, "HAS_FACTOR": True,
             "PDL": target.dependent_launch},
            target, num_warps=norm.num_warps, num_stages=3,
        ),
        compile_kernel(
            gelu_kernel.gated_gelu, {"gate_ptr": "*bf16", "up_ptr": "*bf16", **ROWS, "K": 21504, "BLOCK_G": gelu.groups,
                                     "PDL": target.dependent_launch}, target, num_warps=gelu.num_warps, num_stages=3,
        ),
    ]  # fmt: skip
    for head_dim, rotated, bits in ((512, 512, 0), (512, 128, 0), (512, 128, 8)):
        shape = {
            **dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*i8" if bits else "*bf16"),
            "k_scale_ptr": "*fp16",
            "v_scale_ptr": "*fp16",
            "HEADS": 32,
            "D": head_dim,
            "R": rotated,
            "HALF": head_dim // 2,
            "FOLDED": rotated < head_dim,
            "CODE_BITS": bits,
            "PDL": target.dependent_launch,
        }
        made.append(compile_kernel(rope_kernel.head_rope, {**ROPE, **shape}, target, num_warps=WARPS, num_stages=3))
        splits = wide_config(target, "plain").splits
        made.append(compile_kernel(
            decode.combine_int8,
            {**SHARES, **OUTPUT, "D": head_dim, "SPLITS": splits, "BLOCK_D": COMBINE_BLOCK_D, "dtype": tl.bfloat16,
             "PDL": target.dependent_launch},
            target, num_warps=4, num_stages=3,
        ))  # fmt: skip
    return made


@pytest.mark.parametrize("target_name", sorted(TARGETS))
def test_every_kernel_fits_its_target(target_name: str) -> None:
    target = TARGETS[target_name]
    for code in kernels(target):
        assert code.shared_bytes <= target.shared_bytes_per_block, code.name
        assert code.local_bytes == 0, f"{code.name} spills {code.local_bytes} bytes a thread"


def test_attention_that_ends_in_int8_is_attention_rounded_to_int8() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in ((4, 1, 64), (2, 9, 64), (2, 9, 64)))
    where = torch.tensor([6])
    rows = decode_attention_int8(q, None, k, v, None, None, where, 0, False)
    mixed = attend(q, None, AttentionCache(k, v), where, 0)
    for made, expected in zip(rows, quantize(mixed.view(1, -1)), strict=True):
        assert torch.equal(made, expected)


def test_an_exported_graph_writes_the_cache() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k", torch.zeros(2, 5, 16))
            self.register_buffer("v", torch.zeros(2, 5, 64))

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            weight, angle = torch.ones(64), position.float()[:, None] * torch.ones(32)
            query, r = head_rope(
                x,
                x[:, :128],
                x[:, :128],
                weight,
                weight,
                angle.cos(),
                angle.sin(),
                position,
                self.k,
                self.v,
                None,
                None,
                1e-6,
            )
            return query.sum() + r.sum() + self.v.sum()

    x, step = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)), Step()
    with compiling_for(get_target("sm_90")):
        program = torch.export.export(step, (x, torch.tensor([7])), strict=False).module()
    assert torch.equal(program(x, torch.tensor([7])), step(x, torch.tensor([7])))
    assert program.v[:, 2].abs().min() > 0 and not program.v[:, [0, 1, 3, 4]].any()
    assert torch.equal(program.k, step.k)
