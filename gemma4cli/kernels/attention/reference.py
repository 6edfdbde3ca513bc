"""What the attention kernels compute, written from the formulas in plain PyTorch, and the folding of K = V caches.

Folding. On layers whose keys and values come from one projection, V = x / rms(x) and K = RoPE(w * x / rms(x)), with w
the key norm's weight. Proportional RoPE turns only the first R / 2 dims of each half, so everywhere else K = w * V and
need not be stored:

    q . K = (w * q)[unrotated] . V[unrotated] + q[rotated] . K[rotated]

The cache keeps V (D values) and the R rotated values of K: for the 31B 512 + 128 instead of 1,024, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4cli.kernels.attention import int8, turboquant
from gemma4cli.kernels.attention.cache import AttentionCache, code_bits


def rotated_part(x: Tensor, rotated: int) -> Tensor:
    """Return the dims that RoPE turns, the first `rotated` / 2 of each half: [..., D] to [..., rotated]."""
    half, turned = x.shape[-1] // 2, rotated // 2
    return torch.cat([x[..., :turned], x[..., half : half + turned]], dim=-1)


def fold_query(q: Tensor, key_weight: Tensor, rotated: int) -> Tensor:
    """Return the part of the query that meets V: key_weight * q, 0 in the rotated dims. [..., D] in q's dtype."""
    half, turned = q.shape[-1] // 2, rotated // 2
    dim = torch.arange(q.shape[-1], device=q.device) % half
    return torch.where(dim < turned, torch.zeros((), dtype=q.dtype, device=q.device), q * key_weight.to(q.dtype))


def attention(q: Tensor, r: Tensor | None, cache: AttentionCache, position: Tensor, window: int) -> Tensor:
    """Attend with scale 1.

    Args:
        q: [H, T, D]; what meets the keys, or for a folded cache what meets the values (``fold_query``).
        r: [H, T, R], a folded cache's ``rotated_part`` of the query; None otherwise.
            Both already rotated by the cache's rotations when it is TQ4.
        position: [T] int64, consecutive; everything up to the last is in the cache.
        window: keys a query sees including itself, 0 for all.
    Returns: [H, T, D] float32, for a TQ4 cache still rotated.
    """
    kv_heads, slots = cache.v.shape[0], cache.v.shape[1]
    group = q.shape[0] // kv_heads
    values = _vectors(cache.v, cache.v_scale)
    keys = _vectors(cache.k, cache.k_scale)
    last = position[-1:]
    held = last - torch.remainder(last - torch.arange(slots, device=q.device), slots)
    seen = (held >= 0) & (held <= position[:, None])
    if window:
        seen &= position[:, None] - held < window

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("htd,hsd->hts", query.float(), key.repeat_interleave(group, 0))

    # Slots never written may hold anything, also NaN: zero their vectors, do not only mask their scores.
    written = (held >= 0)[None, :, None]
    values, keys = torch.where(written, values, 0.0), torch.where(written, keys, 0.0)
    score = scores(q, keys) if r is None else scores(q, values) + scores(r, keys)
    weight = torch.softmax(score.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.einsum("hts,hsd->htd", weight, values.repeat_interleave(group, 0))


def _vectors(stored: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return stored.float()
    if code_bits(stored) == 8:
        return int8.decode(stored, scale)
    return turboquant.decode(stored, scale, turboquant.codebook().to(stored.device))
