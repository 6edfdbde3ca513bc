"""A decoded token's attention over a ring, in one kernel, against plain PyTorch.

The interpreter cuts off where a GPU rounds to bf16.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gemma4cli.kernels.attention.cache import AttentionCache
from gemma4cli.kernels.attention.reference import attention
from gemma4cli.kernels.head_rope.reference import head_rope
from gemma4cli.kernels.ring_attention import kernel
from tests.kernels.interpreter.test_decode_fusions import EPS, assert_int8, int8_outputs, random
from tests.support.gluon_interpreter import interpreted


@pytest.mark.parametrize(
    ("position", "slots", "window"),
    [
        (0, 23, 8),
        (1, 23, 8),
        (7, 23, 8),
        (22, 23, 8),
        (1000, 23, 8),
        (16, 64, 17),
        (17, 64, 17),
        (33, 64, 33),
        (200, 64, 33),
        (63, 40, 40),  # the newest key takes the slot of one that has just left the window
        (127, 200, 64),
    ],
)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "warps"), [(2, 2, 64, 1), (1, 4, 128, 2), (2, 1, 64, 4), (1, 2, 256, 8)]
)
def test_ring_attention(
    position: int, slots: int, window: int, kv_heads: int, group: int, head_dim: int, warps: int
) -> None:
    heads = kv_heads * group
    assert kernel.fits(head_dim, group, warps)
    q, k, v = (random(1, n * head_dim, seed=n + 10 * i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    q_weight, k_weight = random(head_dim, seed=4), random(head_dim, seed=5)
    angle = torch.linspace(0, 2, head_dim // 2)[None] * position
    where, splits = torch.tensor([position]), triton.next_power_of_2(triton.cdiv(window, 16 * warps))
    caches = [random(kv_heads, slots, head_dim, seed=seed).bfloat16() for seed in (6, 7)]
    # Slots that no position of the window has, the newest's own among them, must not be looked at.
    seen = [p % slots for p in range(max(0, position - window + 1), position)]
    unseen = [slot for slot in range(slots) if slot not in seen]
    before = [cache.clone() for cache in caches]
    caches[0][:, unseen], caches[1][:, unseen] = 1e30, torch.nan
    outputs = int8_outputs(heads * head_dim)
    arrived = torch.zeros(kv_heads, dtype=torch.int32)
    partial, top, total = (torch.full((heads, splits, n), torch.nan) for n in (head_dim, 1, 1))
    arguments = (q, k, v, q_weight, k_weight, angle.cos(), angle.sin(), where)
    for _ in range(2):  # the counters are ready for the next token
        interpreted(kernel.ring_attention)[(kv_heads, splits)](
            *arguments, *caches, arrived, partial, top, total, *outputs, EPS, slots, WINDOW=window, GROUP=group,
            D=head_dim, SPLITS=splits, NW=warps, dtype=tl.float32, DOT=tl.float32, ASM=False, PDL=False,
        )  # fmt: skip
        assert not arrived.any()
    query, _ = head_rope(*arguments, *(cache.float() for cache in before), None, None, EPS)
    query = (query.view(torch.int32) & -65536).view(torch.float32)  # to bf16 as the interpreter does it
    exact = [cache.float() for cache in before]
    head_rope(*arguments, *exact, None, None, EPS)
    slot = position % slots
    for made, wanted in zip(caches, exact, strict=True):
        assert torch.allclose(made[:, slot].float(), wanted[:, slot], rtol=2**-7, atol=1e-6)
        assert torch.equal(made[:, seen].float(), wanted[:, seen])
    for cache, made in zip(before, caches, strict=True):
        cache[:, slot] = made[:, slot]
    assert_int8(outputs, attention(query, None, AttentionCache(*before), where, window).view(1, -1), most=0.01)
