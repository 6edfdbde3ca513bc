"""`g4::head_rope`: head norms, RoPE, folding and the cache write of a decoded token, in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.attention.cache import code_bits
from gemma4cli.kernels.head_rope import kernel, reference
from gemma4cli.kernels.targets import current_target

# One warp per head, whose sums need no barrier: on an H200 1.9 us for 48 heads of 256, 2.1 with four.
WARPS = 1


@triton_op("g4::head_rope", mutates_args={"k_cache", "v_cache", "k_scale", "v_scale"})
def head_rope(
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
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``reference.head_rope``: arguments and results as there."""
    kv_heads, slots, head_dim = v_cache.shape
    width = k_cache.shape[2]
    heads = q.shape[1] // head_dim
    folded = width != head_dim
    query = torch.empty((heads, 1, head_dim), dtype=q.dtype, device=q.device)
    r = torch.empty((heads, 1, width) if folded else (0,), dtype=q.dtype, device=q.device)
    wrap_triton(kernel.head_rope)[(heads + kv_heads,)](
        q, k, v, q_weight, k_weight, cos, sin, position, k_cache, k_cache if k_scale is None else k_scale,
        v_cache, v_cache if v_scale is None else v_scale, query, r if folded else query, eps, slots,
        HEADS=heads, D=head_dim, R=width, HALF=triton.next_power_of_2(head_dim // 2), FOLDED=folded,
        CODE_BITS=code_bits(k_cache),
        PDL=current_target().dependent_launch, num_warps=WARPS,
    )  # fmt: skip
    return query, r


head_rope.register_kernel("cpu")(reference.head_rope)
