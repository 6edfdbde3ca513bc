"""An answer: stop ids, stop strings that are never shown in part, thinking apart from the answer, honest endings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4cli.engine.answer import Answer, Answering, AnswerSettings, StopStrings, to_json
from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat, Piece
from gemma4cli.model.settings import GREEDY
from tests.support.fake_engine import FakeEngine


@pytest.fixture
def chat(chat_folder: Path) -> Chat:
    return Chat.from_dir(chat_folder)


def answer(
    chat: Chat, text: str, stops: tuple[str, ...] = (), limit: int | None = None, length: int = 256
) -> tuple[Answer, list[Piece]]:
    """Let a fake engine say `text` and a stop id; return the answer and the pieces it was streamed in."""
    engine = FakeEngine([[*chat.tokenizer.encode(text), chat.stop_ids[1]]], length)
    said: list[Piece] = []
    prompt = chat.raw_ids("Hi")
    return Answering(engine, chat, prompt, AnswerSettings(GREEDY, limit, stops)).run(said.append), said


def streamed(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_stop_id_ends_the_answer_and_is_no_part_of_it(chat: Chat) -> None:
    done, said = answer(chat, "Paris 🚀.")
    assert (done.text, done.thinking, done.finish_reason, done.stop_string) == ("Paris 🚀.", "", "stop", None)
    assert streamed(said) == done.text
    assert list(done.token_ids) == chat.tokenizer.encode("Paris 🚀.")


def test_every_stop_id_of_the_model_is_asked_for(chat: Chat) -> None:
    engine = FakeEngine([[chat.stop_ids[0]]])
    Answering(engine, chat, [2], AnswerSettings(GREEDY)).run(lambda piece: None)
    assert engine.requests[0].stop_ids == frozenset(chat.stop_ids)


def test_a_stop_string_across_tokens_never_shows(chat: Chat) -> None:
    done, said = answer(chat, "One. Two. Three.", stops=("wo. T",))
    assert streamed(said) == done.text == "One. T"
    assert (done.finish_reason, done.stop_string) == ("stop", "wo. T")
    assert chat.tokenizer.decode(done.token_ids).startswith("One. Two. T")
    assert len(done.token_ids) < len(chat.tokenizer.encode("One. Two. Three.")), "it stops generating, too"


def test_a_stop_string_that_only_begins_is_shown_in_the_end(chat: Chat) -> None:
    done, said = answer(chat, "One. Tw", stops=("Two",))
    assert streamed(said) == done.text == "One. Tw"
    assert done.stop_string is None


def test_stop_strings_do_not_look_into_the_thinking(chat: Chat) -> None:
    done, _ = answer(chat, "<|channel>thought\nParis?<channel|>Paris!", stops=("?",))
    assert (done.thinking, done.text) == ("Paris?", "Paris!")


@pytest.mark.parametrize(("limit", "length", "reason"), [(2, 256, "length"), (None, 6, "context")])
def test_a_cut_answer_says_why(chat: Chat, limit: int | None, length: int, reason: str) -> None:
    done, _ = answer(chat, "One. Two. Three. Four.", limit=limit, length=length)
    assert done.finish_reason == reason
    assert done.context_length == length
    assert done.context_used == done.prompt_tokens + len(done.token_ids)


def test_half_a_character_at_the_end_is_shown_as_such(chat: Chat) -> None:
    rocket = chat.tokenizer.encode("🚀")
    done, said = answer(chat, "🚀", limit=len(rocket) - 1)
    assert done.text == streamed(said)
    assert done.text.endswith("�")


def test_cancelling_keeps_what_was_said(chat: Chat) -> None:
    engine = FakeEngine([chat.tokenizer.encode("One. Two. Three.")])
    answering = Answering(engine, chat, [2], AnswerSettings(GREEDY))
    engine.before_token = lambda said: answering.cancel() if said == 2 else None
    done = answering.run(lambda piece: None)
    assert done.finish_reason == "cancelled"
    assert done.text == chat.tokenizer.decode(chat.tokenizer.encode("One. Two. Three.")[:2])


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(chat: Chat) -> None:
    with pytest.raises(G4Error, match="has 9 tokens, but the context holds 8 including the answer"):
        Answering(FakeEngine([[5]], length=8), chat, list(range(9)), AnswerSettings(GREEDY))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(G4Error, match="A stop string is empty"):
        AnswerSettings(GREEDY, stop_strings=("a", ""))


@given(st.text("ab.", max_size=40), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3), st.data())
def test_what_comes_before_the_first_stop_string_and_nothing_else(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Whatever the pieces are, the watcher lets through exactly the text before the first stop string."""
    watcher = StopStrings(stops)
    shown, rest = "", text
    while rest and watcher.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        shown += watcher.push(rest[:size])
        rest = rest[size:]
    if watcher.matched is None:
        shown += watcher.finish()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        assert (shown, watcher.matched) == (text, None)
    else:
        assert watcher.matched is not None
        assert (shown + watcher.matched) == text[: len(shown) + len(watcher.matched)]
        assert not any(stop in shown for stop in stops)


def test_a_fresh_seed_changes_only_the_seed() -> None:
    settings = AnswerSettings(GREEDY, 5, ("x",))
    seeds = {settings.with_fresh_seed().sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert settings.with_fresh_seed().stop_strings == ("x",)


def test_the_document_has_what_is_promised(chat: Chat) -> None:
    done, _ = answer(chat, "<|channel>thought\nHm<channel|>Paris")
    document = to_json(done)
    assert {key: document[key] for key in ("text", "thinking", "finish_reason", "prompt_tokens")} == {
        "text": "Paris",
        "thinking": "Hm",
        "finish_reason": "stop",
        "prompt_tokens": done.prompt_tokens,
    }
    assert document["token_ids"] == chat.tokenizer.encode("<|channel>thought\nHm<channel|>Paris")
    assert document["sampling"]["seed"] == 0
    assert document["stats"]["ttft_s"] == 0.25
    assert document["context"] == {"used": done.context_used, "length": 256}
