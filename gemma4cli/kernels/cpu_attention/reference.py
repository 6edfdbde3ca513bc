"""Attention over a ring or flat cache, from the formula."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Attend to every position that is in the cache, not later than the query and inside the window.

    Args:
        q: [1, H, T, D]; scores are q . k, without a scale.
        k_cache, v_cache: [1, H_kv, S, D]; position p is in slot p mod S, so with `last` the newest position, slot s
            holds position last - (last - s) mod S. Slots of negative or invisible positions may hold anything.
        input_pos: [T] int64, ascending: the positions of the queries, already written to the cache.
        window: a query sees itself and the window - 1 positions before it; 0 means all positions before it.
    Returns: [1, T, H, D], as the output projection reads it, in q's dtype, computed in float32; a query that sees no
        position gives zeros.
    """
    group = q.shape[1] // k_cache.shape[1]
    slots = torch.arange(k_cache.shape[2], device=q.device)
    held = input_pos[-1] - (input_pos[-1] - slots) % k_cache.shape[2]  # [S]
    distance = input_pos[:, None] - held[None, :]  # [T, S]
    visible = (held >= 0) & (distance >= 0)
    if window > 0:
        visible = visible & (distance < window)
    used = visible.any(0)[:, None]
    k = torch.where(used, k_cache.float(), 0).repeat_interleave(group, dim=1)
    v = torch.where(used, v_cache.float(), 0).repeat_interleave(group, dim=1)
    scores = (q.float() @ k.transpose(2, 3)).masked_fill(~visible, float("-inf"))
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()
