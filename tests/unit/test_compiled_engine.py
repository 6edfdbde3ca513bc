"""The compiled engine's own part, without a GPU: which step is launched when, and what stays true afterwards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from gemma4cli.engine.base import Generation, GenerationRequest
from gemma4cli.engine.compiled import CompiledEngine
from gemma4cli.model.settings import GREEDY, SamplingSettings
from tests.support.fake_cuda import CHUNK, CONTEXT, FakeDevice, expected

SAMPLED = SamplingSettings(1.0, seed=3)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice.install(monkeypatch)


def _tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(1000) for _ in range(count))


def _start(
    engine: CompiledEngine,
    tokens: Sequence[int],
    count: int | None = 8,
    sampling: SamplingSettings = GREEDY,
    **more: Any,
) -> Generation:
    return engine.generate(GenerationRequest(tuple(tokens), count, sampling, **{"stop_ids": frozenset(), **more}))


def _answer(*args: Any, **more: Any) -> Generation:
    generation = _start(*args, **more)
    assert tuple(generation) == generation.result.tokens
    return generation


def test_each_step_is_launched_before_the_token_before_is_waited_for(device: FakeDevice) -> None:
    _answer(device.engine(), _tokens(3), 5)
    assert device.log == ["wait", "launch", *["launch", "wait"] * 3, "wait"]


def test_settings_are_set_once_an_answer(device: FakeDevice) -> None:
    """Each fill would be a kernel of its own between two tokens."""
    engine = device.engine()
    seed = engine._inputs.tensors[-1]
    before = seed._version
    _answer(engine, _tokens(3), 9, SAMPLED)
    assert seed._version == before + 1


def test_nothing_is_launched_past_the_last_token(device: FakeDevice) -> None:
    for count, prompt in ((1, 3), (2, 3), (6, 3), (None, CONTEXT - 4)):
        device.log.clear()
        engine = device.engine()
        generation = _answer(engine, _tokens(prompt), count)
        said = len(generation.result.tokens)
        assert device.log.count("launch") == said - 1
        assert engine._sessions["default"].written == prompt + said - 1 < CONTEXT
    assert generation.result.finish_reason == "context"


def test_nothing_is_launched_after_a_cancel(device: FakeDevice) -> None:
    generation = _start(device.engine(), _tokens(3), 9)
    next(generation), next(generation)
    assert device.log.count("launch") == 2
    generation.cancel()
    assert list(generation) == []
    assert device.log.count("launch") == 2


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 40])
def test_tokens_are_those_of_steps_that_are_waited_for(
    device: FakeDevice, length: int, sampling: SamplingSettings
) -> None:
    engine, prompt = device.engine(), _tokens(length)
    assert _answer(engine, prompt, 20, sampling).result.tokens == expected(prompt, 20, sampling)


def test_a_step_too_many_counts_as_written_and_not_as_read(device: FakeDevice) -> None:
    engine, prompt = device.engine(), _tokens(30)
    free = _answer(engine, prompt, 12, session="free").result.tokens
    stop = free[5]
    assert stop not in free[:5]
    result = _answer(engine, prompt, 12, stop_ids=frozenset({stop})).result
    assert (result.tokens, result.finish_reason) == (free[:5], "stop")
    held = engine._sessions["default"]
    assert (held.tokens, held.written) == ([*prompt, *free[:5]], 30 + 5 + 1)


@pytest.mark.parametrize(("back", "reused"), [(0, 35), (CHUNK - 1, 35 - CHUNK + 1), (CHUNK, 0)])
def test_going_back_as_far_as_the_ring_holds_after_a_step_too_many(device: FakeDevice, back: int, reused: int) -> None:
    """Without the step too many it would be `CHUNK`."""
    engine, prompt = device.engine(), _tokens(30)
    said = _answer(engine, prompt, 6, session="free").result.tokens
    _answer(engine, prompt, 12, stop_ids=frozenset({said[5]}))
    changed = (*(*prompt, *said[:5])[: 35 - back], 999, 998)
    result = _answer(engine, changed, 9).result
    assert result.stats.reused_tokens == reused
    assert result.tokens == expected(changed, 9, GREEDY)


def test_sessions_in_turn_give_what_they_give_alone(device: FakeDevice) -> None:
    """Three sessions, one token in turn, each with a step in flight while the others set the inputs they share."""
    settings = {"a": GREEDY, "b": SAMPLED, "c": SamplingSettings(1.0, seed=4)}
    alone = {name: expected(_tokens(20), 9, settings[name]) for name in settings}
    engine = device.engine()
    generations = [_start(engine, _tokens(20), 9, settings[name], session=name) for name in settings]
    list(itertools.zip_longest(*generations))
    assert {name: g.result.tokens for name, g in zip(settings, generations, strict=True)} == alone
    assert len(set(alone.values())) == 3


@pytest.mark.parametrize("said", [1, 2, 5])
def test_a_session_whose_answer_was_abandoned_answers_as_if_fresh(device: FakeDevice, said: int) -> None:
    engine, prompt = device.engine(), _tokens(20)
    abandoned = _start(engine, prompt, 30)
    tokens = tuple(itertools.islice(abandoned, said))
    longer = (*prompt, *tokens, 5)
    # What has been said last was not read when its session was taken over.
    result = _answer(engine, longer, 9).result
    assert result.stats.reused_tokens == len(prompt) + said - 1
    assert result.tokens == expected(longer, 9, GREEDY)
    with pytest.raises(RuntimeError, match="a newer generation took over"):
        next(abandoned)
    assert _answer(engine, (*longer, *result.tokens), 3).result.stats.reused_tokens == len(longer) + 8


def test_closing_between_tokens_is_safe(device: FakeDevice) -> None:
    engine = device.engine()
    generation = _start(engine, _tokens(20), 30)
    next(generation), next(generation)
    generation._stream.close()
    assert _answer(engine, _tokens(20), 9).result.tokens == expected(_tokens(20), 9, GREEDY)
    engine.close()


def test_a_step_by_itself_does_not_run_ahead(device: FakeDevice) -> None:
    """Its results stay, also when a generation stands still in mid-answer."""
    engine = device.engine()
    generation = _start(engine, _tokens(20), 9, session="other")
    next(generation), next(generation)
    device.log.clear()
    for token in _tokens(5):
        chosen, logits = engine.step("s", [token], GREEDY)
        assert int(logits.argmax()) == int(chosen)
    assert device.log == ["launch"] * 5
    assert len(list(engine.logits(_tokens(5)))) == 5
    assert (*_answer(engine, _tokens(20), 9).result.tokens[2:],) == tuple(generation)


def test_prompts_read_a_token_at_a_time_run_two_steps_ahead_at_most(device: FakeDevice) -> None:
    """As `g4 bench` reads them for `tg`: not waited for one by one, yet a cancel never finds a queue of steps."""
    engine = device.engine()
    generation = _answer(engine, _tokens(6), 1, chunk=1)
    assert device.log == ["launch", "launch", *["launch", "wait"] * 4, "wait"]
    assert generation.result.tokens == expected(_tokens(6), 1, GREEDY)


def test_any_sequence_of_conversations_answers_as_if_fresh(device: FakeDevice) -> None:
    """Stop ids, limits and cancels in turn, going back by anything: a step too many never shows."""
    chance, engine = random.Random(8), device.engine()
    tokens: list[int] = []
    reused = 0
    for _ in range(60):
        del tokens[max(0, len(tokens) - chance.choice([0, 0, 1, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 40])) :]
        tokens += _tokens(chance.randrange(1, 12), seed=chance.random())
        del tokens[80:]
        whole = expected(tokens, 6, GREEDY)
        stops = frozenset(chance.sample(whole[1:], chance.randrange(2)))
        generation = _start(engine, tokens, 6, stop_ids=stops)
        said = tuple(itertools.islice(generation, chance.choice([2, 9])))
        generation.cancel()
        tokens += [*said, *generation]
        assert said == whole[: len(said)]
        reused += generation.result.stats.reused_tokens
    assert reused > 500
