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
    [
        (0, 1, 40, 0),
        (0, 17, 40, 0),
        (19, 13, 40, 0),
        (15, 8, 40, 0),  # steps that end where the tile begins: wholly seen, then wholly on the diagonal
        (16, 9, 40, 0),
        (40, 17, 63, 0),
        (0, 9, 16, 8),
        (37, 9, 16, 8),
        (40, 17, 63, 32),  # the middle of the window is wholly seen, its edges are not
        (63, 8, 71, 24),
        (120, 19, 50, 32),  # steps that wrap around the ring
    ],
)
def test_prefill(kind: str, first: int, tokens: int, slots: int, window: int) -> None:
    cache = make_cache(kind, 2, slots, 64, 32, min(first + tokens, slots), seed=first)
    out, expected = run_prefill(cache, first, tokens, window)
    assert error(out, expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_fetches_ahead(dtype: torch.dtype) -> None:
    """Values of 16 bits are carried in pairs."""
    cache = make_cache("folded", 2, 60, 64, 32, 56, seed=3)
    cache = AttentionCache(cache.k.to(dtype), cache.v.to(dtype), folded=True)
    out, _ = run_prefill(cache, 37, 19, 0, ahead=True)
    _, expected = run_prefill(AttentionCache(cache.k.float(), cache.v.float(), folded=True), 37, 19, 0)
    assert error(out, expected) < 2e-6


def run_prefill(
    cache: AttentionCache, first: int, tokens: int, window: int, ahead: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and the reference make of float32 queries."""
    head_dim, rotated, kv_heads, group, rows = 64, 32, 2, 2, 16
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(kv_heads * group, tokens, head_dim, generator=generator) * 0.3
    r = torch.randn(kv_heads * group, tokens, rotated, generator=generator) * 0.3 if cache.folded else None
    where = torch.arange(first, first + tokens)
    out = torch.full_like(q, torch.nan)
    prefill.attend[(triton.cdiv(tokens, rows // group), kv_heads)](
        *pointers(cache, q, r), where, out, tokens, cache.v.shape[1], WINDOW=window, GROUP=group,
        **widths(head_dim, rotated if cache.folded else head_dim), BLOCK_S=16, ROWS=rows, FOLDED=cache.folded,
        TQ4=cache.k_scale is not None, DOT=tl.float32, ASM=False, AHEAD=ahead,
    )  # fmt: skip
    return out, reference.attention(q, r, cache, where, window)


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
