"""`g4::ring_attention`: all that a sliding layer does between a decoded token's q/k/v and output products, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.attention import SMALLEST_DOT, TRITON_DTYPE
from gemma4cli.kernels.attention.configs import decode_config
from gemma4cli.kernels.quantized_matmul import empty_int8_rows, quantize
from gemma4cli.kernels.ring_attention import kernel, reference
from gemma4cli.kernels.targets import current_target


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
    """
    kv_heads, slots, head_dim = v_cache.shape
    heads = q.shape[1] // head_dim
    config = decode_config(current_target(), head_dim, "plain")
    partial = torch.empty((heads, config.splits, head_dim), dtype=torch.float32, device=q.device)
    top = torch.empty((heads, config.splits), dtype=torch.float32, device=q.device)
    total = torch.empty_like(top)
    rows = empty_int8_rows(1, heads * head_dim, q.device)
    wrap_triton(kernel.ring_attention)[(kv_heads, config.splits)](
        q, k, v, q_weight, k_weight, cos, sin, position, k_cache, v_cache, arrived, partial, top, total, *rows,
        eps, slots,
        WINDOW=window, GROUP=heads // kv_heads, D=head_dim,
        HALF=max(SMALLEST_DOT, triton.next_power_of_2(head_dim // 2)), SPLITS=config.splits, BLOCK_S=config.block_s,
        ROWS=max(SMALLEST_DOT, triton.next_power_of_2(heads // kv_heads)), dtype=TRITON_DTYPE[q.dtype], DOT=tl.bfloat16,
        PDL=current_target().dependent_launch, num_warps=config.num_warps, num_stages=config.num_stages,
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
