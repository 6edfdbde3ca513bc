"""Attention over a cache, written from the formula: the reference that every kernel is compared with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Attend(Protocol):
    """What a layer calls, and what a backend may replace by its own kernel."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Attend to the keys that a ring or flat cache holds; scale 1, because q and k are normalized.

    Args:
        q: [1, H, T, D], queries of the consecutive positions `input_pos`, already in the cache.
        k, v: [1, H_kv, S, D] cache buffers; head h reads KV head h // (H / H_kv).
        input_pos: [T] int64.
        window: a query sees this many keys including itself; 0 means all earlier ones.
    Returns: [1, H, T, D] in q's dtype; scores and their softmax are float32.
    """
    kv_heads, slots = k.shape[1], k.shape[2]
    group, tokens, head_dim = q.shape[1] // kv_heads, q.shape[2], q.shape[3]
    # Queries of one KV head side by side, so that no key is copied per query head.
    grouped = q.reshape(kv_heads, group * tokens, head_dim)
    scores = torch.bmm(grouped, k[0].to(q.dtype).transpose(1, 2)).to(torch.float32)
    # The smallest float instead of -inf: each query sees at least itself, so masked slots still get weight 0.
    scores = torch.where(
        visible_slots(input_pos, slots, window), scores.unflatten(1, (group, tokens)), torch.finfo(torch.float32).min
    )
    weights = torch.softmax(scores, dim=-1).to(q.dtype).flatten(1, 2)  # [H_kv, group * T, S]
    mixed = torch.bmm(weights, v[0].to(q.dtype))
    # In two steps: one view to [1, H, T, D] makes torch.export guard on T.
    return mixed.unflatten(1, (group, tokens)).flatten(0, 1).unsqueeze(0)


def visible_slots(input_pos: Tensor, slots: int, window: int) -> Tensor:
    """Return [T, slots] bool: whether the query at ``input_pos[t]`` sees what slot s holds.

    Slot s holds position ``last - (last - s) mod slots``, the newest one not after the last written that maps to it;
    below 0 it was never written. A flat cache is the ring that never wraps.
    """
    last = input_pos[-1:]
    slot = torch.arange(slots, device=input_pos.device)
    held = last - torch.remainder(last - slot, slots)  # [slots]
    query = input_pos.unsqueeze(-1)  # [T, 1]
    visible = torch.logical_and(held >= 0, held <= query)
    return torch.logical_and(visible, query - held < window) if window else visible
