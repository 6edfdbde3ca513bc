"""The runner with a real exported program: tokens, chunks, sessions, reuse of the cache, limits."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4cli.engine.base import GenerationRequest, GenerationResult
from gemma4cli.engine.runner import RunnerEngine
from gemma4cli.errors import G4Error
from gemma4cli.export.contract import CONTRACT_VERSION
from gemma4cli.model.settings import GREEDY, SamplingSettings
from tests.support import mini_program
from tests.support.mini_program import CHUNK, CONTEXT, CONTRACT, RING_SLOTS, VOCAB, reference_tokens, write_mini_bundle

PROMPT = (2, 5, 9, 11)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_bundle(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[RunnerEngine]:
    with RunnerEngine(bundle) as running:
        yield running


def answer(
    engine: RunnerEngine,
    tokens: tuple[int, ...],
    count: int | None,
    *,
    session: str,
    sampling: SamplingSettings = GREEDY,
    stop: frozenset[int] = frozenset(),
) -> GenerationResult:
    generation = engine.generate(GenerationRequest(tokens, count, sampling, stop, session))
    assert tuple(generation) == generation.result.tokens
    return generation.result


def random_tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCAB), k=count))


@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 3 * CHUNK, 3 * CHUNK + 1, CONTEXT - 4])
def test_every_way_to_cut_a_prompt_into_chunks_gives_the_same_tokens(engine: RunnerEngine, length: int) -> None:
    prompt = random_tokens(length, length)
    result = answer(engine, prompt, 4, session=f"cut-{length}")
    assert list(result.tokens) == reference_tokens(prompt, 4)
    assert result.finish_reason == "length"


def test_the_tokens_stay_right_past_several_wraps_of_the_ring_to_the_end_of_the_context(engine: RunnerEngine) -> None:
    result = answer(engine, PROMPT, None, session="long")
    assert result.finish_reason == "context"
    assert len(PROMPT) + len(result.tokens) == CONTEXT > 6 * RING_SLOTS
    assert list(result.tokens) == reference_tokens(PROMPT, CONTEXT - len(PROMPT))


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "min_p", "seed"])
def test_every_sampling_setting_reaches_its_own_input(engine: RunnerEngine, field: str) -> None:
    values = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.25, "seed": 2}
    changed = {**values, field: values[field] / 2 if isinstance(values[field], float) else values[field] + 5}
    for settings in (values, changed):
        result = answer(engine, PROMPT, 12, session=f"sampling-{field}", sampling=SamplingSettings(**settings))
        assert list(result.tokens) == reference_tokens(PROMPT, 12, tuple(settings.values()))
    assert reference_tokens(PROMPT, 12, tuple(values.values())) != reference_tokens(PROMPT, 12, tuple(changed.values()))


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(engine: RunnerEngine) -> None:
    expected = reference_tokens(PROMPT, 12)
    result = answer(engine, PROMPT, 12, session="stop", stop=frozenset({expected[7]}))
    assert list(result.tokens) == expected[: expected.index(expected[7])]
    assert result.finish_reason == "stop"
    assert result.stats.generated_tokens == len(result.tokens)


def test_interleaved_sessions_give_what_they_give_alone(engine: RunnerEngine) -> None:
    """Three conversations that grow turn by turn, far past the ring, each answer between two of the others."""
    talks = {name: random_tokens(seed, 7) for seed, name in enumerate(("red", "green", "blue"), start=100)}
    for _ in range(5):
        for name, tokens in talks.items():
            result = answer(engine, tokens, 6, session=name)
            assert list(result.tokens) == reference_tokens(tokens, 6)
            talks[name] = (*tokens, *result.tokens, *random_tokens(len(tokens), 3))
            # The last answer's last token was never fed, and three tokens are new.
            assert result.stats.reused_tokens == (0 if len(tokens) == 7 else len(tokens) - 4)


@pytest.mark.parametrize("taken_back", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_a_prefix_is_reused_as_far_back_as_the_ring_allows_and_no_further(
    engine: RunnerEngine, taken_back: int
) -> None:
    first = random_tokens(7, 60)
    answer(engine, first, 1, session=f"rewind-{taken_back}")
    different = (first[60 - taken_back] + 1) % VOCAB
    second = (*first[: 60 - taken_back], different, *random_tokens(8, 9))
    result = answer(engine, second, 20, session=f"rewind-{taken_back}")
    assert result.stats.reused_tokens == (60 - taken_back if taken_back <= CHUNK else 0)
    assert list(result.tokens) == reference_tokens(second, 20)


def test_a_second_rewind_counts_from_the_furthest_position_ever_written(engine: RunnerEngine) -> None:
    """Sixty positions were written, the first rewind kept 54; the ring has lost what a second one to 52 would need."""
    first = random_tokens(7, 60)
    answer(engine, first, 1, session="twice")
    second = (*first[:54], (first[54] + 1) % VOCAB)
    assert answer(engine, second, 1, session="twice").stats.reused_tokens == 54
    third = (*second[:52], (second[52] + 1) % VOCAB)
    result = answer(engine, third, 20, session="twice")
    assert result.stats.reused_tokens == 0
    assert list(result.tokens) == reference_tokens(third, 20)


def test_before_the_ring_wraps_any_prefix_is_reused(engine: RunnerEngine) -> None:
    first = random_tokens(9, RING_SLOTS)
    answer(engine, first, 1, session="unwrapped")
    result = answer(engine, (first[0], 60, 61), 30, session="unwrapped")
    assert result.stats.reused_tokens == 1
    assert list(result.tokens) == reference_tokens((first[0], 60, 61), 30)


def test_the_same_prompt_again_computes_only_its_last_token(engine: RunnerEngine) -> None:
    prompt = random_tokens(10, 30)
    first = answer(engine, prompt, 1, session="again")
    second = answer(engine, prompt, 1, session="again")
    assert first.tokens == second.tokens
    assert second.stats.reused_tokens == 29
    assert second.stats.prompt_tokens == 30


def test_a_long_random_walk_of_edits_always_equals_a_fresh_start(engine: RunnerEngine) -> None:
    """Rewinds after rewinds: a cache that forgets how far it once was written would go wrong here."""
    source = random.Random(11)
    tokens: tuple[int, ...] = (3,)
    for _ in range(40):
        cut = max(1, len(tokens) - source.choice((0, 0, 1, 2, 4, CHUNK, CHUNK + 3, 30)))
        added = source.choices(range(VOCAB), k=source.choice((1, 2, 5, 8)))
        tokens = (*tokens[:cut], *added)[-(CONTEXT - 20) :]
        count = source.choice((1, 3, 9))
        result = answer(engine, tokens, count, session="walk")
        assert list(result.tokens) == reference_tokens(tokens, count)
        tokens = (*tokens, *result.tokens)


def test_a_session_opened_after_another_was_closed_starts_empty(engine: RunnerEngine) -> None:
    answer(engine, random_tokens(12, 40), 5, session="closing")
    engine.close_session("closing")
    result = answer(engine, PROMPT, 9, session="opening")
    assert result.stats.reused_tokens == 0
    assert list(result.tokens) == reference_tokens(PROMPT, 9)
    with pytest.raises(G4Error, match="no session `closing`"):
        engine.close_session("closing")


def test_cancelling_ends_the_answer_and_the_session_goes_on_from_there(engine: RunnerEngine) -> None:
    generation = engine.generate(GenerationRequest(PROMPT, None, GREEDY, frozenset(), "cancel"))
    first = next(generation)
    generation.cancel()
    rest = list(generation)
    assert generation.result.finish_reason in ("cancelled", "context")
    assert [first, *rest] == reference_tokens(PROMPT, 1 + len(rest))
    result = answer(engine, (*PROMPT, first), 5, session="cancel")
    assert list(result.tokens) == reference_tokens((*PROMPT, first), 5)


def test_an_abandoned_generation_does_not_disturb_the_next(engine: RunnerEngine) -> None:
    generation = engine.generate(GenerationRequest(PROMPT, None, GREEDY, frozenset(), "abandon"))
    next(generation)
    del generation
    result = answer(engine, PROMPT, 5, session="after")
    assert list(result.tokens) == reference_tokens(PROMPT, 5)


def test_statistics_are_measured_and_plausible(engine: RunnerEngine) -> None:
    stats = answer(engine, random_tokens(13, 30), 10, session="stats").stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (30, 0, 10)
    assert 0 < stats.load_s < 60 and stats.ttft_s is not None and 0 < stats.ttft_s < 60
    assert stats.prefill_tok_s == pytest.approx(30 / stats.ttft_s, rel=1e-3)
    assert stats.decode_tok_s is not None and stats.decode_tok_s > 0
    # The peak is the runner's own and not that of this process, which has torch loaded.
    assert stats.peak_host_bytes is not None and 1 << 20 < stats.peak_host_bytes < 200 << 20
    assert stats.peak_device_bytes is None
    single = answer(engine, random_tokens(14, 3), 1, session="stats").stats
    assert single.decode_tok_s is None


def test_a_token_outside_the_vocabulary_is_refused_with_its_position(engine: RunnerEngine) -> None:
    with pytest.raises(G4Error, match=f"Token {VOCAB} at position 1 is outside the vocabulary of {VOCAB}"):
        answer(engine, (2, VOCAB, 3), 1, session="vocabulary")


def test_logits_are_given_after_every_token(engine: RunnerEngine) -> None:
    """Given up half way, too, the next ones are right."""
    prompt = random_tokens(8, CONTEXT - 2)
    model, greedy = mini_program.MiniModel(), mini_program.GREEDY
    expected = [model(*mini_program._inputs([token], position, greedy))[1] for position, token in enumerate(prompt)]
    unfinished = engine.logits(prompt)
    assert next(unfinished).shape == (1, VOCAB)
    unfinished.close()
    rows = np.concatenate(list(engine.logits(prompt)))
    torch.testing.assert_close(torch.from_numpy(rows), torch.cat(expected), rtol=1e-4, atol=1e-3)
    assert len(list(engine.logits(prompt, chunk=CHUNK))) == -(-len(prompt) // CHUNK)


def test_logits_that_cannot_be_had_are_an_error(
    engine: RunnerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(G4Error, match=f"Token {VOCAB} at position 1 is outside the vocabulary"):
        list(engine.logits([1, VOCAB]))
    with pytest.raises(G4Error, match=f"has {CONTEXT} tokens, but the context holds {CONTEXT}"):
        list(engine.logits([1] * CONTEXT))
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(G4Error, match="cannot be named to the runner"):
        list(engine.logits([1, 2]))


def test_the_runner_reports_the_contract_that_was_exported(engine: RunnerEngine) -> None:
    expected = {**CONTRACT.to_json(), "contract_version": CONTRACT_VERSION, "backends": ["XnnpackBackend"]}
    expected.pop("version")
    assert {name: engine.contract[name] for name in expected} == expected


def test_python_runs_the_same_program_with_the_same_library(bundle: Path) -> None:
    """One libg4_kernels.so serves g4-runner and ExecuTorch's Python runtime; both share the cache between methods."""
    import executorch.kernels.quantized  # noqa: F401  (its operators must not collide with ours)
    from executorch.runtime import Runtime

    from gemma4cli.native import load_kernels

    load_kernels()
    program = Runtime.get().load_program(bundle / "model.pte")
    prefill, decode = program.load_method("prefill"), program.load_method("decode")
    token = int(prefill.execute(list(mini_program._inputs(PROMPT, 0, mini_program.GREEDY)))[0])
    produced = [token]
    for position in range(len(PROMPT), len(PROMPT) + 30):
        token = int(decode.execute(list(mini_program._inputs([token], position, mini_program.GREEDY)))[0])
        produced.append(token)
    assert produced == reference_tokens(PROMPT, 31)
