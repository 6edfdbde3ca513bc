"""In-graph sampling against transformers' warpers, against exact probabilities, and its noise against chance."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma4cli.model.sampling import keep, sample

VOCAB = 300


def _warped(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return transformers' probabilities, warpers in the order of its `generate`."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return torch.softmax(warpers(None, logits.clone()), dim=-1)


def _kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return keep(scores, torch.tensor([[top_k]]), torch.tensor([[top_p]]), torch.tensor([[min_p]]))


def _draw(logits: Tensor, count: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, first=0) -> Tensor:
    """Draw once at each of `count` positions, in one batch."""
    return sample(
        logits.expand(count, -1),
        torch.arange(first, first + count),
        torch.full((count,), float(temperature)),
        torch.full((count,), top_k),
        torch.full((count,), float(top_p)),
        torch.full((count,), float(min_p)),
        torch.full((count,), seed),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 64, 0.95, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, VOCAB, 1.0, 0.0),
        (1.0, 10 * VOCAB, 1.0, 0.0),
        (0.7, 40, 0.5, 0.02),
        (2.5, 0, 0.3, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.0, 20, 1e-6, 0.0),
        (0.3, 5, 0.999, 0.3),
    ],
)
def test_keeps_what_transformers_keeps(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Every token that could be drawn; one 26 below the best (probability 5e-12 of it) is out of the noise's reach."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    probabilities = _warped(logits, temperature, top_k, top_p, min_p)
    kept = _kept(logits, temperature, top_k, top_p, min_p)
    reachable = probabilities > probabilities.amax() * 5e-12
    assert torch.equal(kept & reachable, reachable)
    unreachable = (logits - logits.amax()) / temperature < -26
    assert not (kept & ~reachable & ~unreachable).any()


def test_all_filters_off_keep_everything() -> None:
    logits = torch.linspace(-1e4, 1e4, VOCAB).unsqueeze(0)
    assert _kept(logits, 1.0, 0, 1.0, 0.0).all()


def test_top_p_counts_only_what_top_k_kept() -> None:
    """Of ten equal pairs of tokens the best two make half of what top-k 4 keeps, but a tenth of everything."""
    logits = torch.cat((torch.full((1, 2), 0.01), torch.zeros(1, 18)), dim=-1)
    logits[0, 2:4] = 0.005
    assert _kept(logits, 1.0, 4, 0.45, 0.0).sum() == 2
    assert _kept(logits, 1.0, 0, 0.45, 0.0).sum() > 4


def test_equal_tokens_share_their_fate() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert _kept(logits, 1.0, 2, 1.0, 0.0).tolist() == [[True, True, True, True, False]]
    assert _kept(torch.zeros(1, 8), 1.0, 1, 0.1, 0.9).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 12},
        {"top_p": 0.8},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_probabilities(settings: dict[str, float]) -> None:
    """Chi-square over the kept tokens: about its degrees of freedom, give or take 5 standard deviations."""
    count = 40_000
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(11)) * 1.5
    all_settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    expected = _warped(logits, **all_settings)[0] * count
    drawn = torch.bincount(_draw(logits, count, seed=5, **settings), minlength=40)
    assert (drawn[expected == 0] == 0).all()
    chi_square = ((drawn - expected) ** 2 / expected)[expected > 0].sum().item()
    freedom = int((expected > 0).sum()) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_rare_token_is_drawn_as_rarely_as_it_should_be() -> None:
    """One in 3,000, well below what noise of a few bits could resolve."""
    logits = torch.tensor([[0.0, -8.0]])
    count = 300_000
    drawn = int(_draw(logits, count, seed=1).sum())
    expected = count / (1 + torch.e**8)
    assert abs(drawn - expected) < 5 * expected**0.5


def test_greedy_is_argmax_whatever_the_filters_and_the_seed() -> None:
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(3))
    for settings in ({}, {"top_k": 3, "top_p": 0.1, "min_p": 0.5, "seed": 9}):
        chosen = torch.cat([_draw(row[None], 1, temperature=0.0, **settings) for row in logits])
        assert torch.equal(chosen, logits.argmax(dim=-1))


def test_top_k_1_is_argmax() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    assert (_draw(logits, 200, temperature=5.0, top_k=1) == logits.argmax()).all()


def test_infinities_and_negative_zero() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [7, 9]] = torch.tensor([-0.0, 0.0])
    assert set(_draw(logits, 200).tolist()) == {7, 9}
    logits[0, 9] = float("inf")
    assert set(_draw(logits, 50).tolist()) == {9}
    assert _draw(logits, 1, temperature=0.0).item() == 9


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    drawn = _draw(logits, 300, temperature=temperature)
    assert ((drawn >= 0) & (drawn < VOCAB)).all()
    if temperature < 1:
        assert (drawn == logits.argmax()).all()
    else:
        assert len(set(drawn.tolist())) > 150


def test_noise_depends_on_seed_and_position_only() -> None:
    logits = torch.zeros(1, 1000)
    assert torch.equal(_draw(logits, 100, seed=3), _draw(logits, 100, seed=3))
    # A batch draws what single rows draw.
    assert torch.equal(_draw(logits, 3, seed=3, first=10), _draw(logits, 100, seed=3)[10:13])


@pytest.mark.parametrize("other", [1, 2, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1])
def test_both_words_of_the_seed_count(other: int) -> None:
    """Of 400 draws from 1,000 tokens two independent streams share 0.4 on average."""
    logits = torch.zeros(1, 1000)
    assert int((_draw(logits, 400, seed=0) == _draw(logits, 400, seed=other)).sum()) < 6


def test_seeds_and_positions_are_not_shifts_of_each_other() -> None:
    logits = torch.zeros(1, 1000)
    base = _draw(logits, 400, seed=0)
    assert int((base == _draw(logits, 400, seed=0, first=1)).sum()) < 6
    assert int((base == _draw(logits, 400, seed=1, first=1)).sum()) < 6
    # Neighbouring seeds, positions and tokens are used together all the time: their differences must not repeat.
    differences = (base[1:] - base[:-1]).tolist()
    assert len(set(differences)) > 320


def test_every_bit_of_position_and_seed_moves_about_half_of_the_choices() -> None:
    """Between two tokens each draw is a coin; changing one input bit must flip about half of 4,000 coins."""
    logits = torch.zeros(1, 2)
    count = 4000
    base = _draw(logits, count, seed=12345)
    for bit in (0, 1, 5, 12, 31, 32, 45, 62):
        flipped = int((base != _draw(logits, count, seed=12345 ^ (1 << bit))).sum())
        assert abs(flipped - count / 2) < 5 * (count / 4) ** 0.5, bit
    for bit in (12, 15, 17, 20):
        flipped = int((base != _draw(logits, count, seed=12345, first=1 << bit)).sum())
        assert abs(flipped - count / 2) < 5 * (count / 4) ** 0.5, bit


def test_same_choices_forever() -> None:
    """A recorded seed must give the same text in the next release; these numbers were drawn by this code once."""
    assert _draw(torch.zeros(1, 262144), 4, seed=42).tolist() == [24358, 192380, 149564, 18584]


def test_exports_with_operators_that_executorch_has() -> None:
    class Sampler(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return sample(*inputs)

    inputs = (
        torch.randn(1, VOCAB),
        torch.tensor([5]),
        torch.tensor([1.0]),
        torch.tensor([64]),
        torch.tensor([0.95]),
        torch.tensor([0.0]),
        torch.tensor([7]),
    )
    program = torch.export.export(Sampler(), inputs, strict=False)
    targets = {str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"}
    allowed = {
        "add", "amax", "arange", "argmax", "bitwise_and", "bitwise_right_shift", "bitwise_xor", "clamp", "div", "exp",
        "full_like", "ge", "gt", "log", "log1p", "logical_and", "lt", "mul", "neg", "ones_like", "sub", "sum", "to",
        "unsqueeze", "where", "zeros_like",
        "_assert_tensor_metadata",  # dropped by every lowering
    }  # fmt: skip
    assert targets <= allowed, targets - allowed
    exported = program.module()
    for position in range(5):
        inputs = (inputs[0], torch.tensor([position]), *inputs[2:])
        assert torch.equal(exported(*inputs), sample(*inputs))


def test_gemmas_vocabulary_costs_less_than_a_second() -> None:
    """A guard against an accidental sort or a copy per halving; the step takes about 0.05 s on one idle core."""
    logits = torch.randn(1, 262144)
    _draw(logits, 1, top_k=64, top_p=0.95)
    started = time.process_time()
    _draw(logits, 1, top_k=64, top_p=0.95)
    assert time.process_time() - started < 1.0
