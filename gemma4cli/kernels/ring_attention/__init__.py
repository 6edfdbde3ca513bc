"""`g4::ring_attention`: all that a sliding layer does between a decoded token's q/k/v and output products, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.attention import TRITON_DTYPE, decode_attention_int8
from gemma4cli.kernels.head_rope import head_rope
from gemma4cli.kernels.quantized_matmul import empty_int8_rows, quantize
from gemma4cli.kernels.ring_attention import kernel, reference
from gemma4cli.kernels.targets import current_target

# Of a program, each with 16 positions. On an H200 a layer takes 88.8 us with 4 and with 8, a full window; 84.3 and 84.7, a
# tenth of one (bench/notes.md).
WARPS = 4


@triton_op("g4::ring_attention", mutates_args={"k_cache", "v_cache", "arrived"})
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    arrived: Tensor,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.ring_attention`` rounded to int8 as the activations of the output projection: the parts of ``Int8Rows``.

    arrived: int32 [H_kv], zeros, and zeros again afterwards: the programs of a head count themselves in it.
    Sizes that the kernel does not fit take three launches: ``head_rope`` and ``decode_attention_int8``.
    """
    kv_heads, slots, head_dim = v_cache.shape
    heads = q.shape[1] // head_dim
    group, splits = heads // kv_heads, triton.next_power_of_2(triton.cdiv(window, 16 * WARPS))
    if not kernel.fits(head_dim, group, WARPS):
        query, _ = head_rope(q, k, v, q_weight, k_weight, cos, sin, position, k_cache, v_cache, None, None, eps)
        return decode_attention_int8(query, None, k_cache, v_cache, None, None, position, window, False)
    partial = torch.empty((heads, splits, head_dim), dtype=torch.float32, device=q.device)
    top = torch.empty((heads, splits), dtype=torch.float32, device=q.device)
    total = torch.empty_like(top)
    rows = empty_int8_rows(1, heads * head_dim, q.device)
    wrap_triton(kernel.ring_attention)[(kv_heads, splits)](
        q, k, v, q_weight, k_weight, cos, sin, position, k_cache, v_cache, arrived, partial, top, total, *rows,
        eps, slots, WINDOW=window, GROUP=group, D=head_dim, SPLITS=splits, NW=WARPS, dtype=TRITON_DTYPE[q.dtype],
        DOT=tl.bfloat16, ASM=True, PDL=current_target().dependent_launch, num_warps=WARPS,
    )  # fmt: skip
    return rows.words, rows.scale, rows.total


@ring_attention.register_kernel("cpu")
def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    arrived: Tensor,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize(
        reference.ring_attention(q, k, v, q_weight, k_weight, cos, sin, position, k_cache, v_cache, eps, window)
    )
