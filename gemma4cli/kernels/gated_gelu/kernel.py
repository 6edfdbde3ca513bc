"""The product of an MLP's gate and up projections of one token, as int8 activations."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4cli.kernels.dependent_launch import start_successor, wait_for_predecessor
from gemma4cli.kernels.quantized_matmul.decode import write_int8


@triton.jit
def _tanh(x):
    """From the exponential, like torch's: 1 - 2 / (e^2x + 1), which overflows to the right limits."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def gated_gelu(
    gate_ptr, up_ptr, xq_ptr, scale_ptr, total_ptr, K: tl.constexpr, BLOCK_G: tl.constexpr, PDL: tl.constexpr = False
):
    """reference.gated_gelu of one row of K, then ``quantize_rows``; BLOCK_G groups of 32 per program."""
    dtype = gate_ptr.dtype.element_ty
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < K // 32
    k = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    wait_for_predecessor(PDL)
    start_successor(PDL)
    gate = tl.load(gate_ptr + k, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(up_ptr + k, mask=inside[:, None], other=0.0).to(tl.float32)
    # Source: Hendrycks and Gimpel, arXiv 1606.08415, the tanh form: sqrt(2 / pi) and its cubic term.
    gelu = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    x = (gelu.to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    write_int8(x, 0, group, inside, xq_ptr, scale_ptr, total_ptr, K)
