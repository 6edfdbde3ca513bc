"""How an answer reaches the terminal: streamed text, thinking set apart, Ctrl-C, and what to say about its end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from gemma4cli.console import Console, format_duration
from gemma4cli.engine.answer import Answer, Answering
from gemma4cli.files import format_bytes
from gemma4cli.model.chat import Piece
from gemma4cli.model.settings import SamplingSettings

CONTEXT_WARNINGS = (0.95, 0.80)

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Speaker:
    """Prints pieces as they come: the answer on stdout, thinking on stderr (dim on a terminal)."""

    def __init__(self, console: Console, *, thinking_to_stdout: bool = False) -> None:
        self._console = console
        self._thinking_stream = console.stdout if thinking_to_stdout else console.stderr
        self._dim = console.allows_style(self._thinking_stream)
        self._last: Piece | None = None

    def say(self, piece: Piece) -> None:
        """Print one piece at once."""
        if piece.channel == "thinking":
            self._think(piece.text)
        else:
            if self._last is not None and self._last.channel == "thinking":
                self._think("" if self._last.text.endswith("\n") else "\n")
            self._console.write(piece.text)
        self._last = piece

    def end(self) -> None:
        """Close the last line."""
        if self._last is None or not self._last.text.endswith("\n"):
            if self._last is not None and self._last.channel == "thinking":
                self._think("\n")
            else:
                self._console.write("\n")

    def _think(self, text: str) -> None:
        if self._console.mode == "quiet" or not text:
            return
        self._thinking_stream.write(f"{_DIM}{text}{_PLAIN}" if self._dim else text)
        self._thinking_stream.flush()


@contextlib.contextmanager
def interruptible(answering: Answering) -> Iterator[None]:
    """Let the first Ctrl-C end the answer and a second one, for a model stuck in its prompt, the command."""

    def cancel(number: int, frame: FrameType | None) -> None:
        answering.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def speak(answering: Answering, emit: Callable[[Piece], None]) -> Answer:
    """Run an answer to its end or to Ctrl-C."""
    with interruptible(answering):
        return answering.run(emit)


def say_how_it_ended(console: Console, answer: Answer) -> None:
    """Warn about an answer that is not whole, and about a context that is nearly full."""
    if answer.finish_reason == "length":
        console.warn(f"The answer was cut at --max-new-tokens {len(answer.token_ids)}.")
    elif answer.finish_reason == "context":
        console.warn(f"The answer was cut: the context of {answer.context_length} tokens is full.")
        return
    elif answer.finish_reason == "cancelled":
        console.note("(stopped)")
    share = answer.context_used / answer.context_length
    if any(share >= limit for limit in CONTEXT_WARNINGS):
        console.warn(f"{share:.0%} of the context is used ({answer.context_used} of {answer.context_length} tokens).")


def describe_stats(answer: Answer) -> list[str]:
    """The lines of --stats and /stats: what was measured; what was not is left out."""
    stats = answer.stats
    prompt = f"prompt {answer.prompt_tokens} tokens"
    if stats.reused_tokens:
        prompt += f" ({stats.reused_tokens} reused)"
    prompt += _rate(stats.prefill_tok_s)
    speeds = [prompt, f"answer {len(answer.token_ids)} tokens{_rate(stats.decode_tok_s)}"]
    times = [f"loaded in {format_duration(stats.load_s)}"]
    if stats.ttft_s is not None:
        times.insert(0, f"first token after {format_duration(stats.ttft_s)}")
    if stats.peak_host_bytes is not None:
        times.append(f"peak memory {format_bytes(stats.peak_host_bytes)}")
    if stats.peak_device_bytes is not None:
        times.append(f"peak GPU memory {format_bytes(stats.peak_device_bytes)}")
    state = [f"context {answer.context_used}/{answer.context_length}", f"ended by {_end(answer)}"]
    return [" · ".join(speeds), " · ".join(times), " · ".join(state), _settings(answer.sampling)]


def _settings(s: SamplingSettings) -> str:
    if s.temperature == 0:
        return "greedy"
    return f"temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}, min-p {s.min_p:g}, seed {s.seed}"


def _rate(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f" at {tokens_per_second:.1f} tok/s"


def _end(answer: Answer) -> str:
    return f"the stop string {answer.stop_string!r}" if answer.stop_string is not None else answer.finish_reason
