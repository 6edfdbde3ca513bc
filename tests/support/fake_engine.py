"""An engine without a model: it says prepared token ids, and otherwise keeps the promises of `engine.base.Engine`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gemma4cli.engine.base import (
    Engine,
    FinishReason,
    Generation,
    GenerationRequest,
    GenerationResult,
    GenerationStats,
    TokenStream,
)


@dataclass
class FakeEngine(Engine):
    """Answers request number n with `answers[n]` (the last one repeats).

    before_token: called with the number of tokens said so far, before each one; a test cancels or signals there.
    requests: what was asked, for tests to look at.
    """

    answers: Sequence[Sequence[int]]
    length: int = 256
    before_token: Callable[[int], None] = lambda said: None
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: bool = False

    @property
    def context_length(self) -> int:
        return self.length

    def generate(self, request: GenerationRequest) -> Generation:
        self.check_fits(request)
        ids = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(request)
        return Generation(lambda cancelled: self._say(request, ids, cancelled))

    def close(self) -> None:
        self.closed = True

    def _say(self, request: GenerationRequest, ids: Sequence[int], cancelled: threading.Event) -> TokenStream:
        said: list[int] = []
        reason: FinishReason = "stop"
        for token in ids:
            self.before_token(len(said))
            if cancelled.is_set():
                reason = "cancelled"
                break
            if token in request.stop_ids:
                break
            if len(said) == request.max_new_tokens:
                reason = "length"
                break
            if len(request.tokens) + len(said) == self.length:
                reason = "context"
                break
            said.append(token)
            yield token
        stats = GenerationStats(
            prompt_tokens=len(request.tokens),
            reused_tokens=0,
            generated_tokens=len(said),
            load_s=0.5,
            ttft_s=0.25,
            prefill_tok_s=100.0,
            decode_tok_s=None,
            peak_host_bytes=1 << 20,
            peak_device_bytes=None,
        )
        return GenerationResult(tuple(said), reason, stats)
