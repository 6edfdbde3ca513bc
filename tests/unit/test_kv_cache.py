"""The cache, and attention over what it holds, against attention written over positions instead of slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma4cli.engine.eager import attend_to_filled
from gemma4cli.errors import G4Error
from gemma4cli.model.attention import attend, visible_slots
from gemma4cli.model.config import Gemma4Config
from gemma4cli.model.kv_cache import CacheSpec, KVCache
from tests.support import gemma4_31b
from tests.support.tiny import tiny_config

SLIDING, FULL = tiny_config().layer(0), tiny_config().layer(5)


def _attention_over_positions(q: Tensor, k: Tensor, v: Tensor, first: int, window: int) -> Tensor:
    """Reference: one query and head at a time over all positions' keys [H_kv, N, D], by Python slices."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        kv_head = head * k.shape[0] // q.shape[1]
        for index in range(q.shape[2]):
            position = first + index
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            weights = torch.softmax(k[kv_head, seen] @ q[0, head, index], dim=0)
            out[0, head, index] = weights @ v[kv_head, seen]
    return out


@pytest.mark.parametrize("layer", [SLIDING, FULL], ids=["ring", "flat"])
def test_attention_over_the_cache(layer) -> None:
    """Chunks of 1 to 6 tokens over 60 positions: the ring of 13 slots wraps four times."""
    generator = torch.Generator().manual_seed(0)
    spec = CacheSpec(60, 6, torch.float32)
    cache = KVCache(layer, spec)
    cache.k.fill_(1e3)  # never written slots must not matter
    k, v = torch.randn(2, layer.num_key_value_heads, 60, layer.head_dim, generator=generator)
    q = torch.randn(1, 4, 60, layer.head_dim, generator=generator)
    start = 0
    while start < 60:
        end = min(60, start + int(torch.randint(1, 7, (), generator=generator)))
        positions = torch.arange(start, end)
        keys, values = cache.update(positions, k[None, :, start:end], v[None, :, start:end])
        expected = _attention_over_positions(q[:, :, start:end], k, v, start, layer.window)
        for function in (attend, attend_to_filled):
            found = function(q[:, :, start:end], keys, values, positions, layer.window)
            assert torch.allclose(found, expected, atol=1e-5), (function.__name__, start, end)
        start = end


def test_visible_slots_of_a_ring() -> None:
    """Window 3, chunk of 2 at positions 5 and 6 in 4 slots, which hold positions 4, 5, 6, 3."""
    assert visible_slots(torch.tensor([5, 6]), 4, 3).tolist() == [[True, True, False, True], [True, True, True, False]]


def test_visible_slots_before_the_first_wrap() -> None:
    assert visible_slots(torch.tensor([1]), 4, 3).tolist() == [[True, True, False, False]]
    assert visible_slots(torch.tensor([1]), 4, 0).tolist() == [[True, True, False, False]]


def test_slots_and_bytes() -> None:
    spec = CacheSpec(100, 6, torch.bfloat16)
    assert spec.slots(SLIDING) == 8 + 6 - 1
    assert spec.slots(FULL) == 100
    caches = [KVCache(tiny_config().layer(index), spec) for index in range(12)]
    assert spec.nbytes(tiny_config()) == sum(cache.k.nbytes + cache.v.nbytes for cache in caches)


def test_bytes_of_the_31b_at_128k() -> None:
    """10 full layers of 2 x 4 x 131072 x 512 and 50 sliding ones of 2 x 16 x 2047 x 256 values of 2 bytes."""
    config = Gemma4Config.from_json(gemma4_31b.config_dict())
    expected = 2 * (10 * 2 * 4 * 131072 * 512 + 50 * 2 * 16 * 2047 * 256)
    assert CacheSpec(131072, 1024, torch.bfloat16).nbytes(config) == expected


def test_the_cache_keeps_its_own_dtype() -> None:
    cache = KVCache(FULL, CacheSpec(8, 2, torch.bfloat16))
    k, _ = cache.update(torch.tensor([0]), torch.ones(1, 1, 1, 32), torch.ones(1, 1, 1, 32))
    assert k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("context_length", "prefill_chunk", "message"),
    [
        (4097, 16, "A context of 4097 tokens is outside 2 to 4096"),
        (1, 1, "A context of 1 tokens is outside 2 to 4096"),
        (64, 65, "Prefill chunks of 65 tokens are outside 1 to the context of 64"),
        (64, 0, "Prefill chunks of 0 tokens"),
    ],
)
def test_sizes_are_checked(context_length: int, prefill_chunk: int, message: str) -> None:
    with pytest.raises(G4Error, match=message):
        CacheSpec(context_length, prefill_chunk, torch.float32).check(tiny_config())
