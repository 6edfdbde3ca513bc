"""The token loop of engines that take one step of the model at a time from Python, and what their caches remember."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsInt

from gemma4cli.engine.base import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    GenerationStats,
    TokenStream,
)

Read = Callable[[Sequence[int], bool], SupportsInt]
"""Read tokens into the caches; `int` of the result waits for the token chosen after them.

True says that this token is what will be read next, alone, unless it ends the answer: an engine may run one step ahead,
which is to begin that step at once, on its device. A step that then is not asked for counts in `CachedTokens.written`
and not in `tokens`.
"""


@dataclass
class CachedTokens:
    """What a session's caches hold.

    tokens: from position 0 on.
    written: one more than the highest position ever written, by a step ahead, too; in a ring it has overwritten that
        minus the slots.
    owner: the generation that may use the session; a newer one takes it over.
    """

    tokens: list[int] = field(default_factory=list)
    written: int = 0
    owner: object = None

    def rewind(self, prompt: Sequence[int], window: int, slots: int) -> int:
        """Keep the longest prefix of `prompt` that can be continued from, and return its length.

        The last token is always read again, for its logits. A ring can go back by `prefill_chunk` positions from
        `written`: further back the window of the next query reaches keys that were overwritten, and everything starts
        from position 0.
        """
        start = 0
        limit = min(len(prompt) - 1, len(self.tokens))
        while start < limit and self.tokens[start] == prompt[start]:
            start += 1
        if window and max(0, start - window + 1) < self.written - slots:
            start = 0
        if start == 0:
            self.written = 0
        del self.tokens[start:]
        return start


@dataclass(frozen=True)
class Step:
    """How one engine takes a step, and the numbers that its statistics carry along."""

    read: Read
    context_length: int
    chunk: int
    load_s: float
    peak_device_bytes: Callable[[], int | None]


def answer(
    request: GenerationRequest,
    cached: CachedTokens,
    reused: int,
    step: Step,
    cancelled: threading.Event,
    started: float,
) -> TokenStream:
    """Read what the caches lack of the prompt in chunks, then choose tokens until something ends the answer.

    started: when the request came, in seconds of `time.perf_counter`.
    """
    me = cached.owner = object()
    limit = min(request.max_new_tokens or step.context_length, step.context_length - len(request.tokens))
    generated: list[int] = []
    began = time.perf_counter()
    first_token: float | None = None
    last_token = 0.0

    def read(tokens: Sequence[int], more: bool) -> SupportsInt:
        if cached.owner is not me:
            raise RuntimeError(f"a newer generation took over session {request.session!r}")
        return step.read(tokens, more)

    def end(reason: FinishReason) -> GenerationResult:
        count, prompt = len(generated), len(request.tokens)
        stats = GenerationStats(
            prompt_tokens=prompt,
            reused_tokens=reused,
            generated_tokens=count,
            load_s=step.load_s,
            ttft_s=None if first_token is None else first_token - started,
            prefill_tok_s=None if first_token is None else (prompt - reused) / (first_token - began),
            decode_tok_s=(count - 1) / (last_token - first_token) if first_token and count > 1 else None,
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=step.peak_device_bytes(),
        )
        return GenerationResult(tuple(generated), reason, stats)

    chunk = min(request.chunk or step.chunk, step.chunk)
    for start in range(reused, len(request.tokens), chunk):
        if cancelled.is_set():
            return end("cancelled")
        # Nothing runs ahead of the first token, which would come later where an engine prepares for its first step.
        chosen = read(request.tokens[start : start + chunk], False)
    token = int(chosen)
    first_token = time.perf_counter()
    while token not in request.stop_ids:
        generated.append(token)
        last_token = time.perf_counter()
        yield token
        if cancelled.is_set():
            return end("cancelled")
        if len(generated) == limit:
            return end("length" if limit == request.max_new_tokens else "context")
        token = int(read([token], len(generated) + 1 < limit))
    return end("stop")


def peak_host_bytes() -> int:
    """Return the most memory this process has held so far."""
    if sys.platform == "linux":
        # Not getrusage, whose maximum a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
