"""`g4::gated_gelu`: what lies between an MLP's two products of a decoded token, in one launch."""

from __future__ import annotations

import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.gated_gelu import kernel, reference
from gemma4cli.kernels.gated_gelu.configs import gated_gelu_config
from gemma4cli.kernels.quantized_matmul import Int8Rows, empty_int8_rows, quantize
from gemma4cli.kernels.targets import current_target


def gated_gelu(gate: Tensor, up: Tensor) -> Int8Rows:
    """``reference.gated_gelu`` of gate, up [1, K], rounded to int8 for ``quantized_matmul.matvec``."""
    return Int8Rows(*gated_gelu_op(gate, up))


@triton_op("g4::gated_gelu", mutates_args={})
def gated_gelu_op(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of ``Int8Rows``."""
    k = gate.shape[1]
    config = gated_gelu_config(current_target())
    rows = empty_int8_rows(1, k, gate.device)
    wrap_triton(kernel.gated_gelu)[(triton.cdiv(k // 32, config.groups),)](
        gate, up, *rows, K=k, BLOCK_G=config.groups, PDL=current_target().dependent_launch, num_warps=config.num_warps
    )
    return rows.words, rows.scale, rows.total


@gated_gelu_op.register_kernel("cpu")
def _cpu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize(reference.gated_gelu(gate, up))
