"""`g4::cpu_attention`: the reference against the formula spelled with plain loops, the C++ kernel against the reference.

Exporting costs seconds, so one program per shape takes the caches as inputs and is used for many positions.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemma4cli.kernels.cpu_attention import attention, attention_reference
from gemma4cli.native import load_kernels
from tests.support.mini_program import quiet


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, positions: list[int], window: int) -> Tensor:
    """One query, head and key at a time, in float64."""
    heads, queries, head_dim = q.shape[1:]
    kv_heads, slots = k.shape[1:3]
    out = torch.zeros(1, queries, heads, head_dim, dtype=torch.float64)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        for t, position in enumerate(positions):
            oldest = max(0, positions[-1] - slots + 1, position - window + 1 if window else 0)
            seen = range(oldest, position + 1)
            scores = torch.stack([q[0, h, t].double() @ k[0, kv, p % slots].double() for p in seen])
            weights = torch.softmax(scores, 0)
            out[0, t, h] = sum(w * v[0, kv, p % slots].double() for w, p in zip(weights, seen, strict=True))
    return out


def make_inputs(
    heads: int, kv_heads: int, queries: int, head_dim: int, slots: int, seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, queries, head_dim, generator=generator)
    k = torch.randn(1, kv_heads, slots, head_dim, generator=generator)
    v = torch.randn(1, kv_heads, slots, head_dim, generator=generator)
    return q / math.sqrt(head_dim), k, v


def poison(cache: Tensor, positions: Tensor, window: int, junk: float) -> Tensor:
    """Fill every slot that no query sees."""
    last, slots = int(positions[-1]), cache.shape[2]
    first = max(0, last - slots + 1, int(positions[0]) - window + 1 if window else 0)
    seen = {p % slots for p in range(first, last + 1)}
    poisoned = cache.clone()
    poisoned[:, :, [s for s in range(slots) if s not in seen]] = junk
    return poisoned


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("start", [0, 5, 100])
def test_the_reference_is_the_formula(start: int, window: int) -> None:
    q, k, v = make_inputs(4, 2, 3, 32, 13)
    positions = torch.arange(start, start + 3)
    expected = attention_by_hand(q, k, v, positions.tolist(), window)
    torch.testing.assert_close(attention_reference(q, k, v, positions, window).double(), expected, atol=1e-5, rtol=1e-5)


def test_the_operator_is_the_reference_in_eager_and_passes_pytorchs_own_checks() -> None:
    q, k, v = make_inputs(4, 2, 3, 32, 13)
    arguments = (q, k, v, torch.arange(20, 23), 8)
    torch.testing.assert_close(attention(*arguments), attention_reference(*arguments), rtol=0, atol=0)
    torch.library.opcheck(torch.ops.g4.cpu_attention.default, arguments, test_utils="test_faketensor")
    out = torch.empty(0)
    torch.ops.g4.cpu_attention.out(*arguments, out=out)
    torch.testing.assert_close(out, attention_reference(*arguments), rtol=0, atol=0)


class Attention(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        return attention(q, k, v, input_pos, self.window)


@cache
def program(heads: int, kv_heads: int, head_dim: int, slots: int, window: int) -> Any:
    """Export the bare operator for up to 64 queries; return the program and its method (which needs the program)."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    load_kernels()
    q, k, v = make_inputs(heads, kv_heads, 2, head_dim, slots)
    length = torch.export.Dim("length", min=1, max=64)
    with quiet():
        exported = torch.export.export(
            Attention(window), (q, k, v, torch.arange(2)), dynamic_shapes=({2: length}, None, None, {0: length})
        )
        edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_skip_dim_order=True))
        loaded = Runtime.get().load_program(bytes(edge.to_executorch().buffer))
    return loaded, loaded.load_method("forward")


SHAPES = [
    # heads, kv_heads, head_dim, slots, window: ring and flat; odd slot counts, groups 1 ... 8, head sizes off the
    # vector
    (4, 2, 32, 71, 8),
    (4, 1, 64, 1100, 1024),
    (2, 2, 512, 700, 0),
    (8, 1, 256, 1300, 0),
    (6, 2, 40, 600, 500),
    (3, 3, 24, 90, 0),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("queries", [1, 3, 63])
@pytest.mark.usefixtures("instruction_set")
def test_the_kernel_equals_the_reference_wherever_the_positions_are(shape: tuple[int, ...], queries: int) -> None:
    """From the first position to several wraps later, with junk in every slot that is not to be seen."""
    heads, kv_heads, head_dim, slots, window = shape
    _, method = program(*shape)
    starts = [0, 1, slots - queries] + ([slots // 2, 3 * slots + 5, 7 * slots - 2] if window else [slots // 2])
    for start in starts:
        q, k, v = make_inputs(heads, kv_heads, queries, head_dim, slots, seed=start)
        positions = torch.arange(start, start + queries)
        expected = attention_reference(q, k, v, positions, window)
        for junk in (1e30, float("nan"), float("-inf")):
            poisoned = [poison(cache, positions, window, junk) for cache in (k, v)]
            result = method.execute([q, *poisoned, positions])[0]
            # The sums have up to 1,300 terms of size about 1.
            torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    shape = SHAPES[0]
    _, method = program(*shape)
    q, k, v = make_inputs(4, 2, 3, 32, 71)
    positions = torch.arange(30, 33)
    for scale in (1e-4, 300.0):
        result = method.execute([q * scale, k, v, positions])[0]
        torch.testing.assert_close(result, attention_reference(q * scale, k, v, positions, 8), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]])
def test_a_query_gives_the_same_bits_alone_and_in_a_chunk(shape: tuple[int, ...]) -> None:
    """Chunked prefill and decode add in the same order, so that the way a prompt is cut never changes an answer."""
    heads, kv_heads, head_dim, slots, window = shape
    _, method = program(*shape)
    start, queries = (2000, 40) if window else (1200, 40)
    q, k, v = make_inputs(heads, kv_heads, queries, head_dim, slots)
    together = method.execute([q, k, v, torch.arange(start, start + queries)])[0].clone()
    for t in (0, 17, queries - 1):
        # What the later queries of the chunk wrote was not there yet when this one ran alone.
        later = [(start + u) % slots for u in range(t + 1, queries)]
        earlier_k, earlier_v = k.clone(), v.clone()
        earlier_k[:, :, later] = earlier_v[:, :, later] = 1e30
        alone = method.execute([q[:, :, t : t + 1].contiguous(), earlier_k, earlier_v, torch.tensor([start + t])])[0]
        assert torch.equal(alone[0, 0], together[0, t])


@pytest.mark.parametrize(
    "positions",
    [pytest.param([-1, 0, 1], id="negative"), pytest.param([5, 4, 6], id="falling")],
)
def test_positions_that_make_no_sense_are_an_error_and_not_a_crash(positions: list[int]) -> None:
    _, method = program(*SHAPES[0])
    with pytest.raises(RuntimeError):
        method.execute([*make_inputs(4, 2, 3, 32, 71), torch.tensor(positions)])
