"""The eager engine: what it generates, what it keeps between requests, and how it ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4cli.engine.base import Engine, Generation, GenerationRequest
from gemma4cli.engine.eager import EagerEngine, weight_form
from gemma4cli.errors import G4Error
from gemma4cli.model.gemma4 import Gemma4
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.sampling import sample
from gemma4cli.model.settings import GREEDY, SamplingSettings
from gemma4cli.model.weights import SafetensorsReader, build_model
from gemma4cli.quant.checkpoint import open_checkpoint
from gemma4cli.quant.quantize import quantize_checkpoint
from gemma4cli.quant.recipe import load_recipe
from tests.support.tiny import write_checkpoint

CONTEXT, CHUNK = 96, 12
SAMPLED = SamplingSettings(temperature=1.0, top_k=40, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eager") / "checkpoint", 21)


@pytest.fixture
def engine(folder: Path) -> EagerEngine:
    return EagerEngine.from_checkpoint(folder, context_length=CONTEXT, prefill_chunk=CHUNK)


def _tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(160) for _ in range(count))


def _request(
    tokens: Sequence[int], count: int | None = 8, sampling: SamplingSettings = GREEDY, **more
) -> GenerationRequest:
    return GenerationRequest(tuple(tokens), count, sampling, **{"stop_ids": frozenset(), **more})


def _answer(engine: Engine, *args, **more) -> Generation:
    generation = engine.generate(_request(*args, **more))
    assert tuple(generation) == generation.result.tokens
    return generation


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Gemma4:
    """The same weights with caches so long that nothing ever wraps and every prompt is read at once."""
    cache = CacheSpec(CONTEXT, CONTEXT, torch.float32)
    return build_model(SafetensorsReader(folder), cache, torch.float32, "cpu")


def _expected(
    oracle: Gemma4, tokens: Sequence[int], count: int, sampling: SamplingSettings = GREEDY
) -> tuple[int, ...]:
    settings = [torch.tensor([getattr(sampling, field.name)]) for field in fields(SamplingSettings)]
    answer: list[int] = []
    unread = list(tokens)
    for _ in range(count):
        position = len(tokens) + len(answer)
        logits = oracle(torch.tensor([unread]), torch.arange(position - len(unread), position))[:, -1]
        unread = [int(sample(logits, torch.tensor([position - 1]), *settings))]
        answer += unread
    return tuple(answer)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 12, 13, 50])
def test_generates_what_the_model_says(
    engine: EagerEngine, oracle: Gemma4, length: int, sampling: SamplingSettings
) -> None:
    prompt = _tokens(length)
    assert _answer(engine, prompt, 10, sampling).result.tokens == _expected(oracle, prompt, 10, sampling)


def test_the_seed_decides(engine: EagerEngine) -> None:
    answers = {seed: _answer(engine, _tokens(5), 12, SamplingSettings(1.0, seed=seed)).result.tokens for seed in (1, 2)}
    assert answers[1] != answers[2]
    assert _answer(engine, _tokens(5), 12, SamplingSettings(1.0, seed=1)).result.tokens == answers[1]


def test_a_longer_conversation_reuses_what_was_read(engine: EagerEngine, oracle: Gemma4) -> None:
    prompt = _tokens(30)
    first = _answer(engine, prompt, 6).result
    assert first.stats.reused_tokens == 0
    longer = (*prompt, *first.tokens, *_tokens(9, seed=1))
    second = _answer(engine, longer, 6).result
    # The last generated token was never read.
    assert second.stats.reused_tokens == 35
    assert second.stats.prompt_tokens == 45
    assert second.tokens == _expected(oracle, longer, 6)


def test_the_same_prompt_again_reads_its_last_token_only(engine: EagerEngine) -> None:
    first = _answer(engine, _tokens(30), 6).result
    again = _answer(engine, _tokens(30), 6).result
    assert again.tokens == first.tokens
    assert again.stats.reused_tokens == 29


@pytest.mark.parametrize(("back", "reused"), [(1, 49), (CHUNK, 50 - CHUNK), (CHUNK + 1, 0)])
def test_going_back_as_far_as_the_ring_holds(engine: EagerEngine, oracle: Gemma4, back: int, reused: int) -> None:
    """After 50 tokens the ring lets the last prefill_chunk be replaced; one more and all is read again."""
    prompt = _tokens(50)
    _answer(engine, prompt, 1)
    changed = (*prompt[: 50 - back], *_tokens(back + 2, seed=5))
    assert changed[50 - back] != prompt[50 - back]
    result = _answer(engine, changed, 6).result
    assert result.stats.reused_tokens == reused
    assert result.tokens == _expected(oracle, changed, 6)


def test_going_back_twice_counts_from_the_farthest_point(engine: EagerEngine, oracle: Gemma4) -> None:
    """What was overwritten at position 50 stays overwritten after going back to 44."""
    prompt = _tokens(50)
    _answer(engine, prompt, 1)
    shorter = _tokens(50)[:44] + _tokens(1, seed=6)
    assert _answer(engine, shorter, 1).result.stats.reused_tokens == 44
    shorter = _tokens(50)[:37] + _tokens(1, seed=7)
    result = _answer(engine, shorter, 6).result
    assert result.stats.reused_tokens == 0
    assert result.tokens == _expected(oracle, shorter, 6)


def test_a_new_conversation_fills_the_ring_anew(engine: EagerEngine) -> None:
    """What a longer conversation overwrote before does not limit how far this one can go back."""
    _answer(engine, _tokens(90), 1)
    _answer(engine, _tokens(30, seed=1), 1)
    assert _answer(engine, (*_tokens(30, seed=1)[:25], 7), 1).result.stats.reused_tokens == 25


def test_any_sequence_of_conversations_answers_as_if_fresh(engine: EagerEngine, oracle: Gemma4) -> None:
    chance = random.Random(8)
    tokens: list[int] = []
    reused = 0
    for _ in range(25):
        del tokens[max(0, len(tokens) - chance.choice([0, 0, 1, 5, CHUNK, CHUNK + 1, 40])) :]
        tokens += _tokens(chance.randrange(1, 20), seed=chance.random())
        del tokens[80:]
        result = _answer(engine, tokens, 4).result
        assert result.tokens == _expected(oracle, tokens, 4), len(tokens)
        reused += result.stats.reused_tokens
        tokens += result.tokens
    assert reused > 200


def test_interleaved_sessions_give_what_they_give_alone(folder: Path) -> None:
    """Three sessions over one model, one token in turn, two requests each: no one sees another's cache."""
    prompts = {name: _tokens(20 + 5 * index, seed=index) for index, name in enumerate("abc")}

    def fresh() -> EagerEngine:
        return EagerEngine.from_checkpoint(folder, context_length=CONTEXT, prefill_chunk=CHUNK)

    alone = {}
    for name, prompt in prompts.items():
        with fresh() as engine:
            first = _answer(engine, prompt, 9).result.tokens
            alone[name] = first + _answer(engine, prompt + first + _tokens(3), 9).result.tokens
    with fresh() as engine:
        together: dict[str, tuple[int, ...]] = dict.fromkeys(prompts, ())
        for extra in ((), _tokens(3)):
            generations = [
                engine.generate(_request(prompts[name] + together[name] + extra, 9, session=name)) for name in prompts
            ]
            list(itertools.zip_longest(*generations))
            for name, generation in zip(prompts, generations, strict=True):
                together[name] += generation.result.tokens
    assert together == alone
    assert len(set(alone.values())) == 3


def test_a_newer_generation_takes_the_session_over(engine: EagerEngine) -> None:
    old = engine.generate(_request(_tokens(5), session="s"))
    next(old)
    _answer(engine, _tokens(5, seed=1), session="s")
    with pytest.raises(RuntimeError, match="a newer generation took over session 's'"):
        next(old)


def test_stop_ids_end_the_answer_and_are_not_part_of_it(engine: EagerEngine) -> None:
    free = _answer(engine, _tokens(5), 12).result.tokens
    stop = free[4]
    expected = free[: free.index(stop)]
    result = _answer(engine, _tokens(5), 12, stop_ids=frozenset({stop, 159})).result
    assert (result.tokens, result.finish_reason) == (expected, "stop")
    assert result.stats.generated_tokens == len(expected)


def test_length_and_context(engine: EagerEngine) -> None:
    assert _answer(engine, _tokens(5), 3).result.finish_reason == "length"
    full = _answer(engine, _tokens(CONTEXT - 4), None).result
    assert (full.finish_reason, len(full.tokens)) == ("context", 4)
    assert _answer(engine, _tokens(CONTEXT - 4), 9).result.finish_reason == "context"
    assert _answer(engine, _tokens(CONTEXT - 4), 4).result.finish_reason == "length"
    assert len(_answer(engine, _tokens(CONTEXT - 1), None).result.tokens) == 1


def test_cancel_between_tokens_and_before_the_first(engine: EagerEngine, oracle: Gemma4) -> None:
    generation = engine.generate(_request(_tokens(5), 50))
    tokens = []
    for token in generation:
        tokens.append(token)
        if len(tokens) == 3:
            generation.cancel()
    assert generation.result.finish_reason == "cancelled"
    assert generation.result.tokens == tuple(tokens)
    assert len(tokens) == 3

    generation = engine.generate(_request(_tokens(40, seed=3), 50))
    generation.cancel()
    assert list(generation) == []
    result = generation.result
    assert (result.finish_reason, result.stats.ttft_s, result.stats.decode_tok_s) == ("cancelled", None, None)
    # What was cancelled leaves a cache that still answers correctly.
    assert _answer(engine, _tokens(40, seed=3), 5).result.tokens == _expected(oracle, _tokens(40, seed=3), 5)


def test_a_finished_generation_stays_finished(engine: EagerEngine) -> None:
    generation = _answer(engine, _tokens(5), 3)
    assert list(generation) == []
    assert len(generation.result.tokens) == 3


def test_the_result_is_there_at_the_end_only(engine: EagerEngine) -> None:
    generation = engine.generate(_request(_tokens(5), 3))
    with pytest.raises(RuntimeError, match="has not been iterated to its end"):
        _ = generation.result


def test_statistics(engine: EagerEngine) -> None:
    stats = _answer(engine, _tokens(20), 5).result.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (20, 0, 5)
    assert 0 < stats.ttft_s < 60
    assert stats.prefill_tok_s >= 20 / stats.ttft_s
    assert stats.decode_tok_s > 0
    assert stats.load_s > 0
    assert stats.peak_host_bytes > 50 << 20
    assert stats.peak_device_bytes is None
    assert _answer(engine, _tokens(20), 1).result.stats.decode_tok_s is None


def test_prompts_that_do_not_fit(engine: EagerEngine) -> None:
    with pytest.raises(G4Error, match="The conversation has 96 tokens, but the context holds 96 including the answer"):
        engine.generate(_request(_tokens(CONTEXT)))
    with pytest.raises(G4Error, match="a token outside the vocabulary of 160"):
        engine.generate(_request((5, 160)))
    with pytest.raises(G4Error, match="The prompt is empty"):
        _request(())
    with pytest.raises(G4Error, match="chunk is 0; it must be at least 1"):
        _request((1, 2), chunk=0)
    with pytest.raises(G4Error, match="max_new_tokens is 0"):
        _request((1,), 0)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "'gpu' is not a device"),
        ("meta", "g4 does not run on 'meta'"),
        ("cuda:99", "There is no GPU 'cuda:99' on this machine"),
    ],
)
def test_devices_that_are_not_there(folder: Path, device: str, message: str) -> None:
    with pytest.raises(G4Error, match=message):
        EagerEngine.from_checkpoint(folder, context_length=CONTEXT, device=device)


def test_a_context_that_the_model_does_not_have(folder: Path) -> None:
    with pytest.raises(G4Error, match="A context of 5000 tokens is outside 2 to 4096"):
        EagerEngine.from_checkpoint(folder, context_length=5000)


def test_compiled_decoding_says_the_same(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    folder = write_checkpoint(tmp_path / "c", num_hidden_layers=2, layer_types=kinds)
    answers = []
    for compile in (False, True):
        with EagerEngine.from_checkpoint(folder, context_length=64, prefill_chunk=CHUNK, compile=compile) as engine:
            answers.append([_answer(engine, _tokens(20), 8, SAMPLED, session=name).result.tokens for name in "ab"])
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "checkpoint"
    quantize_checkpoint(folder, target, load_recipe("default"))
    return target


def test_quantized_weights_as_values_and_as_codes(quantized: Path) -> None:
    """Both ways of holding them give the same logits, near but not equal to those of the plain checkpoint."""
    reader = open_checkpoint(quantized)
    values = sum(torch.Size(shape).numel() for shape in reader.config.parameter_shapes().values()) * 4
    said: list[str] = []

    class Notes:
        def note(self, message: str) -> None:
            said.append(message)

    logits = []
    for available in (2 * values, 2 * values - 1):
        prepare = weight_form(reader, torch.float32, available, Notes())
        model = build_model(reader, CacheSpec(64, 16, torch.float32), torch.float32, "cpu", prepare=prepare)
        plain = type(model.model.layers[0].mlp.up_proj.weight.data) is torch.Tensor
        assert plain == (available == 2 * values)
        logits.append(model(torch.tensor([_tokens(10)]), torch.arange(10), last_only=False))
    assert len(said) == 1
    assert "quantized weights stay as codes" in said[0]
    assert torch.allclose(logits[0], logits[1], atol=1e-3)


def test_a_quantized_checkpoint_runs(quantized: Path) -> None:
    with EagerEngine.from_checkpoint(quantized, context_length=CONTEXT, prefill_chunk=CHUNK) as engine:
        answer = _answer(engine, _tokens(30), 8).result.tokens
    reader = open_checkpoint(quantized)
    prepare = weight_form(reader, torch.float32, 1 << 30)
    cache = CacheSpec(CONTEXT, CONTEXT, torch.float32)
    assert answer == _expected(build_model(reader, cache, torch.float32, "cpu", prepare=prepare), _tokens(30), 8)


def test_weights_that_do_not_fit_are_refused_before_loading(folder: Path, quantized: Path) -> None:
    plain = open_checkpoint(folder)
    with pytest.raises(G4Error, match=r"The weights need 1\.79 MiB; 1\.00 MiB are free"):
        weight_form(plain, torch.float32, 1 << 20)
    with pytest.raises(G4Error, match=r"The weights need \d+ KiB; 10.0 KiB are free"):
        weight_form(open_checkpoint(quantized), torch.float32, 10 << 10)


@pytest.mark.parametrize("chunk", [1, 5, CHUNK, 1000])
def test_a_prompt_may_be_read_in_smaller_pieces(engine: EagerEngine, oracle: Gemma4, chunk: int) -> None:
    tokens = _tokens(40)
    assert _answer(engine, tokens, chunk=chunk).result.tokens == _expected(oracle, tokens, 8)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_logits_are_given_after_every_token(engine: EagerEngine, oracle: Gemma4, chunk: int | None) -> None:
    """The second time, too, and without disturbing a conversation."""
    tokens = _tokens(50)
    expected = oracle(torch.tensor([tokens]), torch.arange(50), last_only=False)[0]
    _answer(engine, _tokens(20, seed=1))
    for _ in range(2):
        rows = np.concatenate(list(engine.logits(tokens, chunk=chunk)))
        torch.testing.assert_close(torch.from_numpy(rows), expected, rtol=0, atol=2e-4)
    assert _answer(engine, _tokens(20, seed=1)).result.stats.reused_tokens == 19
    with pytest.raises(G4Error, match="outside the vocabulary"):
        next(engine.logits([160]))
