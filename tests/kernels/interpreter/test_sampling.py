"""The four sampling passes against `model.sampling.sample`: the same token, whatever the logits and settings.

Scratch memory starts as NaN and the largest integers (`poisoned`), so that a pass reads only what was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4cli.kernels.sampling import launch, passes
from gemma4cli.kernels.sampling.configs import SampleConfig
from gemma4cli.model.sampling import _gumbel, sample

# Wide lanes: the interpreter's time goes by operations, not by elements.
CONFIG = SampleConfig(block=1024, num_warps=8, tally_bits=6, search_bits=4, finish_warps=32)
KINDS = ["normal", "flat", "equal", "wide", "peaked", "ties", "masked", "far"]
SIZES = [1, 1000, 2048, 2500]
SETTINGS = list(product([1.0, 0.7, 0.0], [64, 0, 1], [0.95, 1.0, 0.1], [0.0, 0.05]))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def settings(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All arguments after the logits."""
    return (torch.tensor([position]), torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]),
            torch.tensor([min_p]), torch.tensor([seed]))  # fmt: skip


def make_logits(kind: str, vocab_size: int, generator: torch.Generator) -> Tensor:
    logits = torch.randn(1, vocab_size, generator=generator)
    match kind:
        case "flat":
            return logits * 0.01
        case "equal":
            return torch.full_like(logits, 3.0)
        case "wide":
            return logits * 3
        case "peaked":
            return logits * 12
        case "ties":
            return (logits * 4).round() / 2
        case "masked":
            return logits.where(torch.rand(logits.shape, generator=generator) < 0.02, float("-inf"))
        case "far":  # the best is 40 above everything else
            logits[0, vocab_size // 2] += 40
            return logits
        case _:
            return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_same_token_as_the_reference(kind: str, vocab_size: int) -> None:
    """Each pair of logits and vocabulary sees a share of the 54 settings; together they see every one twice."""
    generator = torch.Generator().manual_seed(vocab_size)
    start = KINDS.index(kind) + 8 * SIZES.index(vocab_size)
    for index in range(start % 16, len(SETTINGS), 16):
        logits = make_logits(kind, vocab_size, generator)
        arguments = settings(*SETTINGS[index], seed=index * 0x123456789AB - 7, position=index * 1009)
        drawn = launch(CONFIG, logits, *arguments)
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, sample(logits, *arguments)), SETTINGS[index]


@pytest.mark.parametrize("share", [1e-4, 0.05, 0.9])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *product([1, 2, 200, 999], [1.0], [0.0]),
        *product([0, 400, 900], [0.1, 0.3, 0.5, 0.7, 0.9], [0.0]),
        (0, 1.0, 0.3),
        (950, 1.0, 0.014),
        (700, 0.8, 0.3),
    ],
)
def test_the_draw_reveals_the_threshold(share: float, top_k: int, top_p: float, min_p: float) -> None:
    """A token's noise makes up for its score: of those kept the last has the best sum, so one more or less shows."""
    vocab_size, seed, position = 1000, 77, 5
    noise = _gumbel(torch.tensor([[seed]]), torch.tensor([[position]]), vocab_size)
    logits = noise * -share
    arguments = settings(1.0, top_k, top_p, min_p, seed, position)
    drawn = launch(replace(CONFIG, block=256), logits, *arguments)
    assert torch.equal(drawn, sample(logits, *arguments))
    if share > 1e-3 and top_p == 1.0 and min_p == 0.0:  # else neighbours are closer than the thresholds' resolution
        assert drawn == noise[0].argsort()[top_k - 1]


@pytest.mark.parametrize(
    ("tally_bits", "search_bits", "block", "lanes"), [(4, 2, 2048, 1), (5, 3, 512, 4), (6, 6, 512, 2), (3, 8, 1024, 8)]
)
def test_every_shape_of_search_finds_the_same(tally_bits: int, search_bits: int, block: int, lanes: int) -> None:
    config = SampleConfig(block, lanes, tally_bits, search_bits, lanes)
    logits = make_logits("normal", 1500, torch.Generator().manual_seed(1))
    for top_k, top_p in ((30, 1.0), (50, 0.9)):
        arguments = settings(1.0, top_k, top_p, 0.0, 3, 4)
        assert torch.equal(launch(config, logits, *arguments), sample(logits, *arguments))


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # numpy's; the quotient is meant to be -inf
@pytest.mark.parametrize("temperature", [1e-30, 0.1, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = make_logits("normal", 1000, torch.Generator().manual_seed(2))
    for top_k, top_p in ((64, 0.95), (0, 0.95)):
        arguments = settings(temperature, top_k, top_p, 0.0, 3, 4)
        assert torch.equal(launch(CONFIG, logits, *arguments), sample(logits, *arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_infinities_and_zeros_of_both_signs(temperature: float) -> None:
    logits = torch.full((1, 1500), float("-inf"))
    everything_off = settings(temperature, 0, 1.0, 0.0, 1, 2)
    assert launch(CONFIG, logits, *settings(0.0, 0, 1.0, 0.0, 1, 2)) == 0
    logits[0, [1111, 1300]] = torch.tensor([-0.0, 0.0])
    for arguments in (
        everything_off,
        settings(temperature, 5, 0.9, 0.1, 1, 2),
        settings(temperature, 1, 1.0, 0.0, 1, 3),
    ):
        assert torch.equal(launch(CONFIG, logits, *arguments), sample(logits, *arguments))
    logits[0, 7] = float("inf")
    assert launch(CONFIG, logits, *everything_off) == 7


@pytest.mark.parametrize("top_k", [-1, 999, 1000, 1001, 1 << 40])
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.999999, 1.0, 2.0])
def test_settings_at_and_beyond_their_limits(top_k: int, top_p: float) -> None:
    logits = make_logits("normal", 1000, torch.Generator().manual_seed(3))
    arguments = settings(2.0, top_k, top_p, 0.0, (1 << 63) - 1, (1 << 33) + 1)
    assert torch.equal(launch(CONFIG, logits, *arguments), sample(logits, *arguments))


@triton.jit
def write_noise(seed_ptr, position_ptr, out_ptr, first, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out_ptr + index, passes._noise(seed_ptr, position_ptr, first + index))


@pytest.mark.parametrize(("position", "token"), [(330, 27264), (336, 202270)])
def test_noise_is_exact_at_its_ends(position: int, token: int) -> None:
    """The hash of these tokens is 4 and 2^32 - 5: below what 1 - w can hold, and clamped."""
    where, count = torch.tensor([position]), 1024
    first = token - token % count
    expected = _gumbel(torch.tensor([[0]]), where[None], 262144)[0, first : first + count]
    assert expected.argmax() == token - first or expected.argmin() == token - first
    out = torch.full((count,), torch.nan)
    write_noise[(1,)](torch.tensor([0]), where, out, first, COUNT=count)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-7)


def test_gemmas_vocabulary() -> None:
    logits = make_logits("wide", 262144, torch.Generator().manual_seed(4))
    config = SampleConfig(16384, 32, 6, 4, 32)
    arguments = settings(1.0, 64, 0.95, 0.0, 8, 9)
    assert torch.equal(launch(config, logits, *arguments), sample(logits, *arguments))
