"""A decoded token's attention over a ring, in one kernel, against plain PyTorch; float32, as test_decode_fusions.py."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from gemma4cli.kernels.ring_attention import kernel, reference
from tests.kernels.interpreter.test_decode_fusions import EPS, assert_int8, int8_outputs, random


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
    ],
)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 2, 64), (1, 3, 96)])
def test_ring_attention(position: int, slots: int, window: int, kv_heads: int, group: int, head_dim: int) -> None:
    heads = kv_heads * group
    q, k, v = (random(1, n * head_dim, seed=n + 10 * i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    q_weight, k_weight = random(head_dim, seed=4), random(head_dim, seed=5)
    angle = torch.linspace(0, 2, head_dim // 2)[None] * position
    where = torch.tensor([position])
    caches = [random(kv_heads, slots, head_dim, seed=seed) for seed in (6, 7)]
    # Slots that no position of the window has, the newest's own among them, must not be looked at.
    seen = [p % slots for p in range(max(0, position - window + 1), position)]
    unseen = [slot for slot in range(slots) if slot not in seen]
    expected = [cache.clone() for cache in caches]
    caches[0][:, unseen], caches[1][:, unseen] = 1e30, torch.nan
    mixed = reference.ring_attention(
        q, k, v, q_weight, k_weight, angle.cos(), angle.sin(), where, *expected, EPS, window
    )
    outputs = int8_outputs(heads * head_dim)
    arrived = torch.zeros(kv_heads, dtype=torch.int32)
    partial, top, total = (torch.full((heads, 4, n), torch.nan) for n in (head_dim, 1, 1))
    for _ in range(2):  # the counters are ready for the next token
        kernel.ring_attention[(kv_heads, 4)](
            q, k, v, q_weight, k_weight, angle.cos(), angle.sin(), where, *caches, arrived, partial, top, total,
            *outputs, EPS, slots, WINDOW=window, GROUP=group, D=head_dim, HALF=max(16, 1 << (head_dim // 2 - 1).bit_length()),
            SPLITS=4, BLOCK_S=16, ROWS=16, dtype=tl.float32, DOT=tl.float32,
        )  # fmt: skip
        assert not arrived.any()
        assert_int8(outputs, mixed)
    for made, wanted in zip(caches, expected, strict=True):
        assert torch.allclose(made[:, position % slots], wanted[:, position % slots], rtol=1e-5, atol=1e-6)
        assert torch.equal(made[:, seen], wanted[:, seen])
