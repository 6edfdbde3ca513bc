"""Reading a prompt in chunks equals reading it token by token, for every chunk size and past several wraps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from tests.parity.reference import clear, our_model, read_in_chunks
from tests.support.tiny import random_weights, tiny_config

LENGTH = 75
LONGEST_CHUNK = 13  # ring of 8 + 13 - 1 = 20 slots: wrapped more than three times


@pytest.fixture(scope="module")
def model() -> Gemma4:
    return our_model(tiny_config(), random_weights(tiny_config(), 5), CacheSpec(128, LONGEST_CHUNK, torch.float32))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 160, (1, LENGTH), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def one_by_one(model: Gemma4, tokens: Tensor) -> Tensor:
    clear(model)
    return read_in_chunks(model, tokens, [1])


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("chunk", range(2, LONGEST_CHUNK + 1))
def test_every_chunk_size(model: Gemma4, tokens: Tensor, one_by_one: Tensor, chunk: int) -> None:
    # Far from 0 and finite: a slot that was never written must not matter.
    clear(model, value=100.0)
    assert _error(read_in_chunks(model, tokens, [chunk]), one_by_one) <= 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_mixed_chunks(model: Gemma4, tokens: Tensor, one_by_one: Tensor, seed: int) -> None:
    sizes = torch.randint(1, LONGEST_CHUNK + 1, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()
    clear(model, value=100.0)
    assert _error(read_in_chunks(model, tokens, sizes), one_by_one) <= 1e-4


@pytest.mark.parametrize("longest", [1, 8, 40])
def test_rings_shorter_and_longer_than_the_window(tokens: Tensor, one_by_one: Tensor, longest: int) -> None:
    spec = CacheSpec(128, longest, torch.float32)
    model = our_model(tiny_config(), random_weights(tiny_config(), 5), spec)
    assert _error(read_in_chunks(model, tokens, [longest]), one_by_one) <= 1e-4


def test_a_chunk_longer_than_the_ring_allows_is_wrong(model: Gemma4, tokens: Tensor, one_by_one: Tensor) -> None:
    """The ring has no slot to spare: one token more per chunk overwrites a key that its first query needs."""
    clear(model)
    assert _error(read_in_chunks(model, tokens, [LONGEST_CHUNK + 1]), one_by_one) > 0.05


def test_last_only_is_the_last_of_all(model: Gemma4, tokens: Tensor) -> None:
    clear(model)
    positions = torch.arange(10)
    every = model(tokens[:, :10], positions, last_only=False)
    clear(model)
    last = model(tokens[:, :10], positions)
    assert last.shape == (1, 1, 160)
    assert torch.allclose(last, every[:, -1:], atol=1e-5)
