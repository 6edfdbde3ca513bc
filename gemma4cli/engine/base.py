"""What every engine does: take a whole conversation as token ids, give token ids back one by one, and account for it.

Text, chat turns and thinking live above; the model and its caches live below.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from gemma4cli.errors import G4Error
from gemma4cli.model.settings import SamplingSettings

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to produce.

    tokens: the whole conversation so far, at least one id; the engine reuses what its cache still holds of it.
    max_new_tokens: at most this many tokens are generated; None means until the context is full.
    stop_ids: ids that end the answer. The stop id itself is neither yielded nor counted.
    session: requests of one session share a cache; sessions never see each other.
    chunk: the prompt is read in pieces of at most this many tokens; None means as many as the engine takes at once.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int | None
    sampling: SamplingSettings
    stop_ids: frozenset[int]
    session: str = "default"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise G4Error("The prompt is empty.", hint="Give at least one token.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise G4Error(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.chunk is not None and self.chunk < 1:
            raise G4Error(f"chunk is {self.chunk}; it must be at least 1.")


@dataclass(frozen=True)
class GenerationStats:
    """Timings of one generation; a rate or peak that was not measured is None, never 0 or infinity.

    prompt_tokens counts the whole conversation, reused_tokens those of it that the cache still held.
    load_s is the time this engine took to become ready. ttft_s runs from the request to the first token.
    prefill_tok_s is over the tokens really computed, decode_tok_s over the tokens after the first.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    load_s: float
    ttft_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    peak_host_bytes: int | None
    peak_device_bytes: int | None


@dataclass(frozen=True)
class GenerationResult:
    """What came out: `tokens` without the stop id, and why it ended."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats


TokenStream = Generator[int, None, GenerationResult]


@dataclass
class Generation:
    """An answer in the making: iterate it for token ids; `result` is there when the iteration has ended.

    `produce` receives the event that `cancel` sets, looks at it between tokens, yields ids and returns the result.
    """

    produce: Callable[[threading.Event], TokenStream]
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False)
    _stream: TokenStream | None = field(default=None, init=False)
    _result: GenerationResult | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._result is not None:
            raise StopIteration
        if self._stream is None:
            self._stream = self.produce(self._cancelled)
        try:
            return next(self._stream)
        except StopIteration as end:
            self._result = end.value
            raise StopIteration from None

    def cancel(self) -> None:
        """Ask for the end, from any thread or a signal handler; the iteration then ends at the next token."""
        self._cancelled.set()

    @property
    def result(self) -> GenerationResult:
        """The result of a finished generation; asking for it earlier is a mistake in the caller."""
        if self._result is None:
            raise RuntimeError("the generation has not been iterated to its end")
        return self._result


class Engine(ABC):
    """A loaded model. Use it as a context manager, or call `close`."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that one session can hold."""

    @abstractmethod
    def generate(self, request: GenerationRequest) -> Generation:
        """Start an answer.

        Raises: G4Error at once when the prompt does not fit into the context, with both numbers.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the model; a second call does nothing."""

    def check_fits(self, request: GenerationRequest) -> None:
        """Refuse a prompt that leaves no room for a single new token."""
        if len(request.tokens) >= self.context_length:
            raise G4Error(
                f"The conversation has {len(request.tokens)} tokens, but the context holds {self.context_length} "
                "including the answer.",
                hint="Shorten the prompt, /clear the chat, or use a longer context (--ctx).",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
