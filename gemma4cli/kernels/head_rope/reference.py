"""What the kernel computes, in plain PyTorch from the model's own parts."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.kernels.attention import int8
from gemma4cli.kernels.attention.reference import fold_query, rotated_part
from gemma4cli.model.layers import normalize
from gemma4cli.model.rope import rotate


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
    """Normalize and rotate the heads of one token, and write its key and value to the cache.

    Args:
        q: [1, H * D]; k, v: [1, H_kv * D], of the projections.
        q_weight, k_weight: [D], of the head norms; values are normalized without one.
        cos, sin: [1, D / 2] float32.
        position: [1] int64; the slot is its remainder by the slots.
        k_cache: [H_kv, S, D], or [H_kv, S, R] of a folded cache; v_cache: [H_kv, S, D]. Written in place.
        k_scale, v_scale: [H_kv, S] float16 of int8 caches (attention/int8.py), written too; None of others.
    Returns: the query [H, 1, D] and, of a folded cache, its part for the rotated keys [H, 1, R], else an empty tensor.
    """
    head_dim, width = v_cache.shape[-1], k_cache.shape[-1]

    def heads(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.view(1, 1, -1, head_dim)
        y = normalize(x.to(torch.float32), eps)
        return (y if weight is None else y * weight.to(torch.float32)).to(x.dtype)

    query = rotate(heads(q, q_weight), cos, sin)[0].transpose(0, 1).contiguous()
    key = rotate(heads(k, k_weight), cos, sin)[0].transpose(0, 1)
    slot = torch.remainder(position, v_cache.shape[1])
    r = query.new_empty(0)
    if width != head_dim:
        key, r = rotated_part(key, width), rotated_part(query, width).contiguous()
        query = fold_query(query, k_weight, width)
    value = heads(v, None)[0].transpose(0, 1)
    for vector, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        if scale is None:
            cache.index_copy_(1, slot, vector.to(cache.dtype))
        else:
            codes, unit = int8.encode(vector)
            cache.index_copy_(1, slot, codes)
            scale.index_copy_(1, slot, unit)
    return query, r
