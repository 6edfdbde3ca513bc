"""From a prompt's ids to text: one generation, split into thinking and answer, ended by stop ids or stop strings."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma4cli.engine.base import Engine, FinishReason, Generation, GenerationRequest, GenerationStats
from gemma4cli.errors import G4Error
from gemma4cli.model.chat import Chat, Piece
from gemma4cli.model.settings import SamplingSettings


@dataclass(frozen=True)
class AnswerSettings:
    """How to answer. `stop_strings` end the answer and are not part of it; they do not look into the thinking."""

    sampling: SamplingSettings
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stop_strings:
            raise G4Error("A stop string is empty.", hint="Give --stop some text.", exit_code=2)

    def with_fresh_seed(self) -> AnswerSettings:
        """Draw a seed; it is reported with the answer, so that the answer can be had again."""
        return replace(self, sampling=replace(self.sampling, seed=secrets.randbits(32)))


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    token_ids: everything generated, thinking and the tokens of a matched stop string included, the stop id not.
    stop_string: the one that ended the answer, or None.
    """

    text: str
    thinking: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    context_length: int
    finish_reason: FinishReason
    stop_string: str | None
    sampling: SamplingSettings
    stats: GenerationStats

    @property
    def context_used(self) -> int:
        return self.prompt_tokens + len(self.token_ids)


class StopStrings:
    """Watches a stream of text for stop strings, letting through only what cannot be the beginning of one.

    None of `stops` is empty (`AnswerSettings` sees to it).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take a piece and return what is certainly before any stop string; nothing after a match."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, _, self.matched = min(found)
            free, self._held = self._held[:at], ""
            return free
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        free, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return free

    def finish(self) -> str:
        """Return what was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Answering:
    """One answer in the making. `run` drives it; `cancel` may be called from a signal handler."""

    def __init__(
        self, engine: Engine, chat: Chat, prompt_ids: Sequence[int], settings: AnswerSettings, session: str = "default"
    ) -> None:
        """Start: a prompt that does not fit is refused here."""
        self._engine = engine
        self._settings = settings
        self._prompt_ids = tuple(prompt_ids)
        self._splitter = chat.splitter(self._prompt_ids)
        self._stop = StopStrings(settings.stop_strings)
        self._generation: Generation = engine.generate(
            GenerationRequest(
                tokens=self._prompt_ids,
                max_new_tokens=settings.max_new_tokens,
                sampling=settings.sampling,
                stop_ids=frozenset(chat.stop_ids),
                session=session,
            )
        )

    def cancel(self) -> None:
        """End the answer at the next token; what was said so far stands."""
        self._generation.cancel()

    def run(self, emit: Callable[[Piece], None]) -> Answer:
        """Generate to the end, handing every certain piece of text to `emit` at once."""
        said: list[Piece] = []

        def say(pieces: Sequence[Piece]) -> None:
            for piece in pieces:
                text = self._stop.push(piece.text) if piece.channel == "answer" else piece.text
                if text:
                    said.append(Piece(piece.channel, text))
                    emit(said[-1])

        consumed = 0
        for token in self._generation:
            if self._stop.matched is None:
                consumed += 1
                say(self._splitter.push(token))
                if self._stop.matched is not None:
                    self._generation.cancel()
        if self._stop.matched is None:
            say(self._splitter.finish())
        if self._stop.matched is None and (rest := self._stop.finish()):
            said.append(Piece("answer", rest))
            emit(said[-1])
        return self._account(said, consumed)

    def _account(self, said: Sequence[Piece], consumed: int) -> Answer:
        result = self._generation.result
        return Answer(
            text="".join(piece.text for piece in said if piece.channel == "answer"),
            thinking="".join(piece.text for piece in said if piece.channel == "thinking"),
            token_ids=result.tokens[:consumed],
            prompt_tokens=len(self._prompt_ids),
            context_length=self._engine.context_length,
            finish_reason="stop" if self._stop.matched is not None else result.finish_reason,
            stop_string=self._stop.matched,
            sampling=self._settings.sampling,
            stats=result.stats,
        )


def to_json(answer: Answer) -> dict[str, Any]:
    """The document of `g4 run --json`."""
    return {
        "text": answer.text,
        "thinking": answer.thinking,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "stop_string": answer.stop_string,
        "context": {"used": answer.context_used, "length": answer.context_length},
        "sampling": asdict(answer.sampling),
        "stats": asdict(answer.stats),
    }
