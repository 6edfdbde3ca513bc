"""The attention kernels against their reference: ring and flat, plain and folded caches of numbers and of codes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gemma4cli.kernels.attention import decode, int8, prefill, reference, turboquant, wide
from gemma4cli.kernels.attention.cache import AttentionCache, code_bits
from tests.support.gluon_interpreter import interpreted

KINDS = ["plain", "folded", "q8", "folded-q8", "tq4", "folded-tq4"]


def make_cache(
    kind: str, kv_heads: int, slots: int, head_dim: int, rotated: int, written: int, seed: int
) -> AttentionCache:
    """A cache whose first `written` slots hold vectors and whose others hold garbage of large magnitude."""
    generator = torch.Generator().manual_seed(seed)
    width = rotated if kind.startswith("folded") else head_dim
    k = torch.randn(kv_heads, slots, width, generator=generator)
    v = torch.randn(kv_heads, slots, head_dim, generator=generator)
    k_scale = v_scale = None
    if kind.endswith("q8"):
        (k, k_scale), (v, v_scale) = int8.encode(k), int8.encode(v)
    elif kind.endswith("tq4"):
        table = turboquant.codebook()
        k, k_scale = turboquant.encode(k, torch.eye(width), table)
        v, v_scale = turboquant.encode(v, torch.eye(head_dim), table)
    if k_scale is not None and v_scale is not None:
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
        SPLITS=splits, BLOCK_S=16, ROWS=16, FOLDED=cache.folded, CODE_BITS=code_bits(cache.k), DOT=tl.float32, ASM=False,
    )  # fmt: skip
    out = torch.full_like(q, torch.nan)
    decode.combine[(kv_heads * group, 2)](partial, top, total, out, D=head_dim, SPLITS=splits, BLOCK_D=32)
    assert error(out, reference.attention(q, r, cache, where, window)) < 2e-6


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("position", [3, 15, 16, 31, 32, 40])
def test_only_older_positions_are_read_before_the_predecessor_ends(
    position: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one is the predecessor's to write, and so is the query."""
    head_dim, rotated, slots = 512, 128, 128
    cache = make_cache("folded-q8", 1, slots, head_dim, rotated, position + 1, seed=5)
    assert cache.k_scale is not None and cache.v_scale is not None
    generator = torch.Generator().manual_seed(7)
    q, r = (torch.randn(8, 1, size, generator=generator) * 0.1 for size in (head_dim, rotated))
    where = torch.tensor([position])
    expected = reference.attention(q, r, cache, where, 0)
    made = [tensor[:, position] for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale)] + [q, r]
    values = [tensor.clone() for tensor in made]
    for tensor in made:
        tensor.fill_(77)

    def end_of_predecessor(_: bool) -> None:
        for tensor, value in zip(made, values, strict=True):
            tensor.copy_(value)

    monkeypatch.setattr(wide, "wait_for_predecessor", end_of_predecessor)
    monkeypatch.setattr(wide, "start_successor", lambda _: None)
    partial, top, total = (
        torch.full((8, 1, head_dim), torch.nan),
        torch.full((8, 1), torch.nan),
        torch.full((8, 1), torch.nan),
    )
    interpreted(wide.split)[(1, 1)](
        *pointers(cache, q, r), where, partial, top, total, slots, GROUP=8, D=head_dim, R=rotated, SPLITS=1,
        STAGES=stages, NW=1, FOLDED=True, CODE_BITS=8, DOT=tl.float32, ASM=False, PDL=True,
    )  # fmt: skip
    assert error(partial / total[..., None], expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("position", "slots", "splits", "warps", "stages"),
    [
        (0, 40, 2, 1, 2),
        (15, 40, 2, 1, 2),
        (16, 40, 2, 1, 2),
        (97, 128, 2, 2, 2),
        (200, 201, 4, 2, 3),
        (127, 128, 1, 4, 2),
        (255, 300, 1, 8, 2),
    ],
)
def test_decode_over_wide_heads(kind: str, position: int, slots: int, splits: int, warps: int, stages: int) -> None:
    head_dim, rotated, kv_heads, group = 512, 128, 2, 4
    cache = make_cache(kind, kv_heads, slots, head_dim, rotated, position + 1, seed=position)
    if cache.k_scale is None:  # of numbers the kernel reads bf16
        cache = AttentionCache(cache.k.bfloat16(), cache.v.bfloat16(), folded=cache.folded)
    generator = torch.Generator().manual_seed(99)
    q = torch.randn(kv_heads * group, 1, head_dim, generator=generator) * 0.1
    r = torch.randn(kv_heads * group, 1, rotated, generator=generator) * 0.1 if cache.folded else None
    where = torch.tensor([position])
    partial = torch.full((kv_heads * group, splits, head_dim), torch.nan)
    top, total = torch.full((kv_heads * group, splits), torch.nan), torch.full((kv_heads * group, splits), torch.nan)
    interpreted(wide.split)[(kv_heads, splits)](
        *pointers(cache, q, r), where, partial, top, total, slots, GROUP=group, D=head_dim,
        R=rotated if cache.folded else head_dim, SPLITS=splits, STAGES=stages, NW=warps, FOLDED=cache.folded,
        CODE_BITS=code_bits(cache.k), DOT=tl.float32, ASM=False, PDL=False,
    )  # fmt: skip
    out = torch.full_like(q, torch.nan)
    decode.combine[(kv_heads * group, 8)](partial, top, total, out, D=head_dim, SPLITS=splits, BLOCK_D=64)
    assert error(out, reference.attention(q, r, cache, where, 0)) < 2e-6


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
        CODE_BITS=code_bits(cache.k), DOT=tl.float32, ASM=False, AHEAD=ahead,
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
