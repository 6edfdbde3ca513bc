"""The attention kernels against their reference: ring and flat, plain, folded and TQ4 caches."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gemma4cli.kernels.attention import decode, prefill, reference, turboquant
from gemma4cli.kernels.attention.cache import AttentionCache

KINDS = ["plain", "folded", "tq4", "folded-tq4"]


def make_cache(
    kind: str, kv_heads: int, slots: int, head_dim: int, rotated: int, written: int, seed: int
) -> AttentionCache:
    """A cache whose first `written` slots hold vectors and whose others hold garbage of large magnitude."""
    generator = torch.Generator().manual_seed(seed)
    width = rotated if kind.startswith("folded") else head_dim
    k = torch.randn(kv_heads, slots, width, generator=generator)
    v = torch.randn(kv_heads, slots, head_dim, generator=generator)
    k_scale = v_scale = None
    if kind.endswith("tq4"):
        table = turboquant.codebook()
        k, k_scale = turboquant.encode(k, torch.eye(width), table)
        v, v_scale = turboquant.encode(v, torch.eye(head_dim), table)
        k_scale[:, written:] = torch.inf
        v_scale[:, written:] = torch.nan
    else:
        k[:, written:] = 1e30
        v[:, written:] = torch.nan
    return AttentionCache(k, v, k_scale, v_scale, folded=kind.startswith("folded"))


def widths(head_dim: int, rotated: int) -> dict[str, int]:
    return {"D": head_dim, "R": rotated, "HALF": max(16, head_dim // 2), "R_HALF": max(16, rotated // 2)}


def pointers(cache: AttentionCache, q: torch.Tensor, r: torch.Tensor | None) -> list[torch.Tensor]:
    instead = lambda tensor, other: other if tensor is None else tensor  # noqa: E731
    return [q, instead(r, q), cache.k, instead(cache.k_scale, cache.k), cache.v, instead(cache.v_scale, cache.v)]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("position", "slots", "window"),
    [
        (0, 64, 0),
        (14, 64, 0),
        (15, 64, 0),
        (16, 64, 0),
        (64, 100, 0),
        (5, 23, 8),
        (22, 23, 8),
        (23, 23, 8),
        (70, 23, 8),
    ],
)
def test_decode(kind: str, position: int, slots: int, window: int) -> None:
    head_dim, rotated, kv_heads, group, splits = 64, 32, 2, 3, 4
    cache = make_cache(kind, kv_heads, slots, head_dim, rotated, min(position + 1, slots), seed=position)
    generator = torch.Generator().manual_seed(99)
    q = torch.randn(kv_heads * group, 1, head_dim, generator=generator) * 0.3
    r = torch.randn(kv_heads * group, 1, rotated, generator=generator) * 0.3 if cache.folded else None
    where = torch.tensor([position])
    partial = torch.full((kv_heads * group, splits, head_dim), torch.nan)
    top, total = torch.full((kv_heads * group, splits), torch.nan), torch.full((kv_heads * group, splits), torch.nan)
    decode.split[(kv_heads, splits)](
        *pointers(cache, q, r), where, partial, top, total, slots, WINDOW=window, GROUP=group, **widths(head_dim, rotated if cache.folded else head_dim),
        SPLITS=splits, BLOCK_S=16, ROWS=16, FOLDED=cache.folded, TQ4=cache.k_scale is not None, DOT=tl.float32, ASM=False,
    )  # fmt: skip
    out = torch.full_like(q, torch.nan)
    decode.combine[(kv_heads * group, 2)](partial, top, total, out, D=head_dim, SPLITS=splits, BLOCK_D=32)
    assert error(out, reference.attention(q, r, cache, where, window)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "tokens", "slots", "window"),
    [(0, 1, 40, 0), (0, 17, 40, 0), (19, 13, 40, 0), (0, 9, 16, 8), (37, 9, 16, 8)],
)
def test_prefill(kind: str, first: int, tokens: int, slots: int, window: int) -> None:
    head_dim, rotated, kv_heads, group = 64, 32, 2, 2
    cache = make_cache(kind, kv_heads, slots, head_dim, rotated, min(first + tokens, slots), seed=first)
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(kv_heads * group, tokens, head_dim, generator=generator) * 0.3
    r = torch.randn(kv_heads * group, tokens, rotated, generator=generator) * 0.3 if cache.folded else None
    where = torch.arange(first, first + tokens)
    out = torch.full_like(q, torch.nan)
    rows = 16
    prefill.attend[(triton.cdiv(tokens, rows // group), kv_heads)](
        *pointers(cache, q, r), where, out, tokens, slots, WINDOW=window, GROUP=group, **widths(head_dim, rotated if cache.folded else head_dim),
        BLOCK_S=16, ROWS=rows, FOLDED=cache.folded, TQ4=cache.k_scale is not None, DOT=tl.float32, ASM=False,
    )  # fmt: skip
    assert error(out, reference.attention(q, r, cache, where, window)) < 2e-6


def test_levels_are_the_codebook() -> None:
    """The arithmetic that stands for the assembly, which tests/kernels/test_attention.py compiles."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    first, second = (
        torch.full((256,), torch.nan, dtype=torch.float16),
        torch.full((256,), torch.nan, dtype=torch.float16),
    )

    @triton.jit
    def both(codes_ptr, first_ptr, second_ptr):
        index = tl.arange(0, 256)
        low, high = decode._levels(tl.load(codes_ptr + index), False)
        tl.store(first_ptr + index, low)
        tl.store(second_ptr + index, high)

    both[(1,)](codes, first, second)
    table = turboquant.codebook()
    assert torch.equal(first.float(), table[codes.long() & 15])
    assert torch.equal(second.float(), table[codes.long() >> 4])
