"""Choose the next token inside the graph: temperature, top-k, top-p, min-p, and noise that depends on the seed only.

Semantics and order are those of transformers' logits warpers: temperature, top-k, top-p (of what top-k kept), min-p.

No sort: "the k best" and "the fewest tokens that reach mass p" are both "everything above a threshold", and the
threshold is found by bisection, 3 passes over the vocabulary per halving, for any k, p and vocabulary, with shapes that
never depend on data.

The draw is Gumbel-max: argmax(log p + g) with g = -log(E), E exponential. g comes from a hash of (seed, position,
token id), not from a generator with state, so every backend draws the same noise and no draw depends on an earlier one.
Only operators that ExecuTorch's kernels and AOTInductor both have are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Log-probabilities relative to the best token in which thresholds are sought. Noise spans -2.9 to 22.9 (see `_gumbel`),
# so a token 26 below the best cannot win; where no threshold is found within the range, nothing is filtered.
_RANGE = 26.0
# 26 / 2^24 = 1.5e-6, about one float32 step of a logit of 16: tokens whose probabilities agree to that count as equal.
_HALVINGS = 24
_MASK32 = 0xFFFFFFFF
_NEVER = torch.finfo(torch.float32).min


def sample(
    logits: Tensor, position: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: [B, V] float32; infinities are allowed, NaN is not.
        position: [B] int64, position of the last token that was read; the noise differs per position.
        temperature: [B] float32; 0 is greedy, exactly argmax(logits).
        top_k: [B] int64, 0 is off. top_p: [B] float32, 1 is off. min_p: [B] float32, 0 is off.
        seed: [B] int64, all 64 bits count.
    Returns: [B] int64.
    """
    finite = torch.clamp(logits, -1e38, 1e38)
    scores = finite - torch.amax(finite, dim=-1, keepdim=True)
    # A temperature of 0 takes the greedy branch below; the clamp keeps the other branch free of 0 / 0.
    scores = scores / torch.clamp(temperature, min=1e-30).unsqueeze(-1)
    kept = keep(scores, top_k.unsqueeze(-1), top_p.unsqueeze(-1), min_p.unsqueeze(-1))
    noise = _gumbel(seed.unsqueeze(-1), position.unsqueeze(-1), scores.shape[-1])
    drawn = torch.argmax(torch.where(kept, scores + noise, _NEVER), dim=-1)
    return torch.where(temperature > 0, drawn, torch.argmax(logits, dim=-1))


def keep(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return [B, V] bool: which tokens pass all filters; the best always does, and equal tokens share their fate.

    Args: scores: [B, V] log-probabilities relative to the best token (0); the settings are [B, 1].
    """
    mass = torch.exp(scores)
    top_k_threshold = _threshold(scores, torch.ones_like(scores), torch.where(top_k > 0, top_k, scores.shape[-1]))
    mass = torch.where(scores >= top_k_threshold, mass, 0.0)
    top_p_threshold = _threshold(scores, mass, top_p * mass.sum(dim=-1, keepdim=True))
    # Off means off: rounding in the sum must not drop the last tokens.
    top_p_threshold = torch.where(top_p < 1.0, top_p_threshold, _NEVER)
    kept = torch.logical_and(scores >= top_k_threshold, scores >= top_p_threshold)
    return torch.logical_and(kept, torch.exp(scores) >= min_p)


def _threshold(scores: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the largest t, up to the bisection's resolution, whose tokens scores >= t weigh at least `target`."""
    low = torch.full_like(target, -_RANGE, dtype=torch.float32)
    for halving in range(1, _HALVINGS + 1):
        middle = low + _RANGE * 2.0**-halving
        # A difference, a comparison with a constant and a product: ExecuTorch compares and selects with broadcasting
        # 3 to 6 times slower. The sign of a float difference is exact.
        above = (scores - middle) >= 0.0
        reached = (above * weight).sum(dim=-1, keepdim=True) >= target
        low = torch.where(reached, middle, low)
    return torch.where(low > -_RANGE, low, _NEVER)


def _gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Return Gumbel noise [B, V] float32 for ``seed, position [B, 1] int64``: a function of its arguments only."""
    key = _mix(torch.bitwise_and(seed, _MASK32) + 0x9E3779B9)
    key = _mix(torch.bitwise_xor(key, torch.bitwise_and(torch.bitwise_right_shift(seed, 32), _MASK32)) + 0x85EBCA6B)
    key = _mix(torch.bitwise_xor(key, torch.bitwise_and(position, _MASK32)) + 0xC2B2AE35)
    # Two keyed rounds: with one, two positions whose keys differ in low bits only would see the same noise permuted.
    token = torch.arange(vocab_size, device=seed.device).unsqueeze(0)
    hashed = _mix(_mix(torch.bitwise_xor(token, key)) + _mix(key + 0x27D4EB2F))
    # w in (0, 1): finest near 0, where E = -log(1 - w) is small and a token far below the best may still win.
    uniform = (hashed.to(torch.float32) + 0.5) * 2.0**-32
    exponential = -torch.log1p(-torch.clamp(uniform, max=1.0 - 2.0**-24))
    return -torch.log(exponential)


def _mix(x: Tensor) -> Tensor:
    """Scramble 32 bits, held in int64 so that a product with a 31-bit constant stays below 2^63.

    Every input bit flips every output bit about half of the time. The constants are those of Chris Wellons' search for
    low-bias 32-bit hashes ("hash-prospector").
    """
    x = torch.bitwise_and(x, _MASK32)
    x = torch.bitwise_xor(x, torch.bitwise_right_shift(x, 16))
    x = torch.bitwise_and(x * 0x21F0AAAD, _MASK32)
    x = torch.bitwise_xor(x, torch.bitwise_right_shift(x, 15))
    x = torch.bitwise_and(x * 0x735A2D97, _MASK32)
    return torch.bitwise_xor(x, torch.bitwise_right_shift(x, 15))
