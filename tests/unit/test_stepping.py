"""The token loop that engines share, over steps that only record: what is begun when, and what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from gemma4cli.engine.base import Generation, GenerationRequest
from gemma4cli.engine.stepping import CachedTokens, Step, answer
from gemma4cli.model.settings import GREEDY

CONTEXT = 20
SLOW_S = 0.02


@dataclass
class FakeSteps:
    """Chooses the number of the step; `log` has what was begun, with whether more was announced, and what was awaited."""

    log: list[Any] = field(default_factory=list)
    steps: int = 0

    def read(self, tokens: Sequence[int], more: bool) -> FakeToken:
        self.log.append((list(tokens), more))
        self.steps += 1
        return FakeToken(self, self.steps)


@dataclass
class FakeToken:
    source: FakeSteps
    number: int

    def __int__(self) -> int:
        time.sleep(SLOW_S)
        self.source.log.append(self.number)
        return self.number


def _generation(
    source: FakeSteps, prompt: Sequence[int], count: int | None, cached: CachedTokens | None = None, **more: Any
) -> Generation:
    request = GenerationRequest(tuple(prompt), count, GREEDY, **{"stop_ids": frozenset(), **more})
    step = Step(source.read, CONTEXT, 4, 0.0, lambda: None)

    def produce(cancelled: threading.Event):
        return answer(request, cached or CachedTokens(), 0, step, cancelled, time.perf_counter())

    return Generation(produce)


def test_more_is_announced_as_long_as_more_is_allowed() -> None:
    source = FakeSteps()
    assert list(_generation(source, (7,), 4)) == [1, 2, 3, 4]
    assert source.log == [([7], False), 1, ([1], True), 2, ([2], True), 3, ([3], False), 4]


@pytest.mark.parametrize("count", [None, 3, 9])
def test_no_more_is_announced_where_the_context_ends(count: int | None) -> None:
    source = FakeSteps()
    generation = _generation(source, (7,) * (CONTEXT - 3), count)
    assert len(list(generation)) == 3
    assert [step for step in source.log if isinstance(step, tuple)][-2:] == [([5], True), ([6], False)]


def test_of_a_prompt_only_the_last_piece_is_waited_for() -> None:
    source = FakeSteps()
    assert list(_generation(source, range(10), 1)) == [3]
    assert source.log == [([0, 1, 2, 3], False), ([4, 5, 6, 7], False), ([8, 9], False), 3]


def test_nothing_is_begun_after_a_cancel() -> None:
    source = FakeSteps()
    generation = _generation(source, (7,), 9)
    assert [next(generation), next(generation)] == [1, 2]
    begun = list(source.log)
    generation.cancel()
    assert list(generation) == []
    assert (generation.result.finish_reason, source.log) == ("cancelled", begun)


def test_a_generation_that_lost_its_session_begins_nothing() -> None:
    source, cached = FakeSteps(), CachedTokens()
    old = _generation(source, (7,), 9, cached)
    assert [next(old), next(old)] == [1, 2]
    list(_generation(source, (8,), 1, cached))
    begun = list(source.log)
    with pytest.raises(RuntimeError, match="a newer generation took over session 'default'"):
        next(old)
    assert source.log == begun


def test_times_are_those_of_tokens_that_were_waited_for() -> None:
    generation = _generation(FakeSteps(), (7,), 4)
    list(generation)
    stats = generation.result.stats
    assert stats.ttft_s >= SLOW_S
    assert stats.decode_tok_s <= 1 / SLOW_S
