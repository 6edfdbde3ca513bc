"""What the kernel computes, from the references of its parts."""

from __future__ import annotations

from torch import Tensor

from gemma4cli.kernels.attention.cache import AttentionCache
from gemma4cli.kernels.attention.reference import attention
from gemma4cli.kernels.head_rope.reference import head_rope


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
    eps: float,
    window: int,
) -> Tensor:
    """Write one token's key and value to a ring and let its query attend to the window: [1, H * D] in q's dtype.

    Args: as ``head_rope.reference.head_rope`` takes them; window: positions that a query sees, itself included.
    """
    query, _ = head_rope(q, k, v, q_weight, k_weight, cos, sin, position, k_cache, v_cache, None, None, eps)
    mixed = attention(query, None, AttentionCache(k_cache, v_cache), position, window)
    return mixed.to(q.dtype).view(1, -1)
